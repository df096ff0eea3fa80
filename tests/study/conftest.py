"""Small pictures for studies."""

from pathlib import Path

import pytest
from training.pictures import write_parquet


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """32 training and 16 validation pictures of four classes, of 32 pixels."""
    root = tmp_path_factory.mktemp("study")
    write_parquet(root / "train.parquet", 32, 4)
    write_parquet(root / "val.parquet", 16, 4)
    return root
