"""Drawn shapes as a set in COCO's format."""

import warnings
from pathlib import Path

import pytest

from odenets import shapes
from odenets.cli import repair_torchvision

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    repair_torchvision()  # one that was built for another torch keeps Lightning from importing


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    """A folder of 12 pictures of 48 pixels to train on and 9 to validate on; some are empty."""
    root = tmp_path_factory.mktemp("shapes") / "set"
    shapes.write(root, {"train": 12, "val": 9}, size=48, seed=9)
    return root
