"""Small synthetic pictures in each of the layouts that the data module reads."""

import warnings
from pathlib import Path

import pytest

from odenets.cli import repair_torchvision

from .pictures import write_folder, write_parquet

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    repair_torchvision()  # one that was built for another torch keeps Lightning from importing


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
