"""Synthetic pictures, and the layouts on disk that the data module reads."""

import io
from pathlib import Path

import torch
from PIL import Image


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
