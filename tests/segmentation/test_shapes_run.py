"""What the page about segmentation says of a run on drawn shapes: minutes each, ``pytest -m slow``."""

from pathlib import Path

import pytest

from odenets.training.command import run

FILE = Path(__file__).parents[2] / "experiments" / "shapes_upernet.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reverse", "store"])
def test_a_small_upernet_reaches_an_miou_of_080(tmp_path, mode):
    args = ["--model.net.backprop", mode, "--run_dir", str(tmp_path / "run"), "--trainer.accelerator", "cpu"]
    command = run(["fit", "-c", str(FILE), *args])
    assert float(command.trainer.checkpoint_callback.best_model_score) > 0.8
