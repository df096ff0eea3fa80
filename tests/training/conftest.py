"""Small synthetic pictures in each of the layouts that the data module reads."""

import importlib.util
import io
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

if importlib.util.find_spec("odenets.models") is None:
    from . import standin

    sys.modules["odenets.models"] = types.ModuleType("odenets.models")
    sys.modules["odenets.models"].HOResNet = standin.HOResNet
    sys.modules["odenets.models"].ResNet = standin.ResNet


def picture(seed: int, size: tuple[int, int] = (32, 32), mode: str = "RGB") -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randint(0, 256, (size[0] * size[1] * 3,), dtype=torch.uint8, generator=generator)
    return Image.frombytes("RGB", size, bytes(flat.tolist())).convert(mode)


def encoded(image: Image.Image) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_parquet(file: Path, n: int, classes: int, image_key="img", label_key="label", size=(32, 32)) -> None:
    import datasets

    features = {image_key: datasets.Image(), label_key: datasets.ClassLabel(names=[f"c{i}" for i in range(classes)])}
    rows = {image_key: [encoded(picture(i, size)) for i in range(n)], label_key: [i % classes for i in range(n)]}
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(str(file))


def write_folder(root: Path, per_class: int, classes: int, size=(80, 60)) -> None:
    for c in range(classes):
        (root / f"n{c:04d}").mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            mode = "L" if (c + i) % 3 == 0 else "RGB"  # some are grey, as in ImageNet
            picture(100 * c + i, size, mode).save(root / f"n{c:04d}" / f"{i}.jpeg")


@pytest.fixture(scope="session")
def cifar(tmp_path_factory) -> Path:
    """40 training and 20 test pictures of ten classes, as the hub's uoft-cs/cifar10 stores them."""
    root = tmp_path_factory.mktemp("cifar")
    write_parquet(root / "train.parquet", 40, 10)
    write_parquet(root / "test.parquet", 20, 10)
    return root


@pytest.fixture(scope="session")
def cifar100(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cifar100")
    for split, n in (("train", 200), ("test", 100)):
        write_parquet(root / f"{split}.parquet", n, 100, label_key="fine_label")
    return root


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory) -> Path:
    """One folder per class, without a validation split."""
    root = tmp_path_factory.mktemp("imagenet")
    write_folder(root, 2, 6)
    return root
