"""Checkpoints of short runs, trained once for all tests of commands."""

from pathlib import Path

import pytest
from training.conftest import cifar as cifar
from training.pictures import picture

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SHORT = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"]
SHORT += ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_model_summary", "false"]
SHORT += ["--model.net.widths", "[4, 4]", "--model.net.functions", "[4, 4]"]


def _train(folder: Path, file: str, *args: str) -> Path:
    from odenets.training.command import run

    run(["fit", "-c", str(EXPERIMENTS / file), *SHORT, "--run_dir", str(folder), *args])
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """A checkpoint of the quickstart, grey pictures of 8x8, whose step size moved to 0.5."""
    moves = '[{"class_path": "odenets.training.StepSchedule", "init_args": {"start": 0.5, "stop": 0.5}}]'
    return _train(tmp_path_factory.mktemp("digits"), "quickstart.yaml", "--trainer.callbacks", moves)


@pytest.fixture(scope="session")
def photos(cifar, tmp_path_factory) -> Path:
    """A checkpoint over RGB pictures of 32x32 of the classes c0 to c9, kept at 24 pixels, 0.75 of which are seen."""
    args = ["--data.root", str(cifar), "--data.size", "24", "--data.inner", "0.75", "--data.interpolation", "bicubic"]
    args += ["--data.batch_size", "20", "--model.net.widths", "[4, 4, 4]", "--model.net.functions", "[4, 4, 4]"]
    return _train(tmp_path_factory.mktemp("photos"), "cifar10_ho_resnet.yaml", *args)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Twelve pictures of various sizes in folders of the classes c0, c1 and c2, and a file that is none."""
    root = tmp_path_factory.mktemp("pictures")
    for c in range(3):
        (root / f"c{c}").mkdir()
        for i in range(4):
            picture(10 * c + i, (30 + 7 * i, 40)).save(root / f"c{c}" / f"{i}.png")
    (root / "c1" / "broken.png").write_bytes(b"no picture")
    return root
