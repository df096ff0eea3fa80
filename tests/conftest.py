"""One thread, fixed seeds, hypothesis profiles, and the folder of real pictures (``ODENETS_DATA``)."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may touch the network
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# The first call of a torch operator can take longer than hypothesis' default deadline of 200 ms.
settings.register_profile("dev", max_examples=20, deadline=None)
settings.register_profile("ci", max_examples=200, deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder with cifar10/, cifar100/, tiny_imagenet/ and imagenet_sample/; the test skips where there is none."""
    root = os.environ.get("ODENETS_DATA", "")
    if not root or not Path(root).is_dir():
        pytest.skip("set ODENETS_DATA to a folder with cifar10/ and imagenet_sample/ to run this test")
    return Path(root)
