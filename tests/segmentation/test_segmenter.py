"""Training, resuming, measuring and predicting by the command line."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image

import odenets.training
from odenets.segmentation import DrawnShapes, Segmenter
from odenets.segmentation.pictures import drawn, numbered, shown
from odenets.shapes import write
from odenets.training.command import run
from odenets.training.errors import DataError

from .scenes import config, revcol

SHAPES = {
    "class_path": "odenets.segmentation.DrawnShapes",
    "init_args": {"train": 16, "val": 4, "size": 32, "batch_size": 8},
}


class Losses(Callback):
    found: list = []  # noqa: RUF012  one run at a time

    def on_train_start(self, trainer, pl_module):
        self.found.clear()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found.append(float(outputs["loss"]))


class Keep(Callback):
    """Copies the run's folder when two batches of the second epoch are done."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        folder = Path(trainer.default_root_dir)
        if trainer.current_epoch == 1 and batch_idx == 2 and not (folder.parent / "kept").exists():
            shutil.copytree(folder, folder.parent / "kept", ignore=shutil.ignore_patterns(".lock"))


def test_the_name_of_the_module():
    assert odenets.training.Segmenter is Segmenter


@pytest.mark.long
def test_the_loss_halves_on_drawn_shapes(tmp_path):
    trainer = {"max_epochs": 16, "check_val_every_n_epoch": 16, "callbacks": [{"class_path": f"{__name__}.Losses"}]}
    file = config(tmp_path, SHAPES, trainer, schedule={"class_path": "odenets.training.Constant"})
    command = run(["fit", "-c", str(file), "--model.optimizer.lr", "1e-2"])
    first, last = np.mean(Losses.found[:2]), np.mean(Losses.found[-4:])
    assert last < 0.5 * first
    figures = command.trainer.callback_metrics
    assert {"val/mIoU", "val/mAcc", "val/aAcc", "train/loss", "train/auxiliary"} <= set(figures)
    assert (tmp_path / "run/checkpoints/best.ckpt").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run over a folder, with cuts, mirror images, colours and averaged weights, and a copy from its middle."""
    root = tmp_path_factory.mktemp("trained")
    write(root / "data", {"train": 12, "val": 5}, size=40, seed=1)
    data = {
        "class_path": "odenets.segmentation.SegmentationData",
        "init_args": {"root": str(root / "data"), "classes": 5, "crop": 32, "batch_size": 4, "num_workers": 0},
    }
    average = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.9}}
    trainer = {"max_epochs": 2, "callbacks": [average, {"class_path": f"{__name__}.Keep"}]}
    file = config(
        root, data, trainer, inference={"class_path": "odenets.segmentation.Inference", "init_args": {"window": 32}}
    )
    run(["fit", "-c", str(file), "--last.every_n_train_steps", "1"])
    return root


@pytest.mark.long
def test_a_resumed_run_ends_as_one_that_was_not_stopped(trained, tmp_path):
    shutil.copytree(trained / "kept", tmp_path / "run")
    held = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert held["odenets"]["place"][:2] == (1, 2)
    args = ["--last.every_n_train_steps", "1", "--run_dir", str(tmp_path / "run"), "--ckpt_path", "last"]
    run(["fit", "-c", str(trained / "c.yaml"), *args])
    want, got = (torch.load(f / "run/checkpoints/last.ckpt", weights_only=True) for f in (trained, tmp_path))
    assert got["global_step"] == want["global_step"] == 6
    for name in ("state_dict", "current_model_state"):
        assert (name in want) == (name in got)
        for key, value in want.get(name, {}).items():
            assert torch.equal(got[name][key], value), (name, key)


@pytest.mark.filterwarnings("ignore:.*WeightAveraging.*")  # it says that it averages in training alone
def test_predictions_are_pictures_and_give_the_figures_of_the_validation(trained, tmp_path, monkeypatch, capsys):
    where = ["-c", str(trained / "c.yaml"), "--run_dir", str(trained / "run"), "--ckpt_path", "best"]
    run(["predict", *where])
    assert "predictions: 5 pictures" in capsys.readouterr().out
    folder, truth = trained / "run/predict/predictions", trained / "data/masks/val"
    names = [f"{i:06d}.png" for i in range(5)]
    for kind in ("masks", "drawn"):
        assert sorted(p.name for p in (folder / kind).iterdir()) == names
    said = np.stack([np.asarray(Image.open(folder / "masks" / name)) for name in names])
    true = np.stack([np.asarray(Image.open(truth / name)) for name in names])
    command = run(["validate", *where])
    figures = {name: float(value) for name, value in command.trainer.callback_metrics.items()}
    assert figures["val/aAcc"] == pytest.approx((said == true).mean())
    ious = [((said == c) & (true == c)).sum() / ((said == c) | (true == c)).sum() for c in np.unique([said, true])]
    assert figures["val/mIoU"] == pytest.approx(np.mean(ious), abs=1e-6)


def test_pictures_are_seen_together_where_their_sizes_agree():
    torch.manual_seed(0)
    module = Segmenter(revcol(), torch.optim.AdamW).eval()
    sizes = [(16, 16), (16, 16), (16, 20), (16, 16), (12, 12)]
    x = [torch.randn(3, *size) for size in sizes]
    y = [torch.zeros(*size) for size in [(16, 16), (16, 16), (32, 40), (32, 32), (12, 12)]]
    seen = []
    module.net.register_forward_hook(lambda net, args, out: seen.append(len(args[0])))
    found = module.predicted(x, y)
    assert seen == [2, 1, 1, 1] and [p.shape for p in found] == [m.shape for m in y]
    for picture, mask, own in zip(x, y, found, strict=True):
        assert torch.equal(module.predicted([picture], [mask])[0], own)


def test_no_class_anywhere_is_said_and_not_taken_for_a_figure():
    with pytest.raises(DataError, match="no pixel"):
        module = Segmenter(revcol(), torch.optim.AdamW)
        module._trainer = type("Trainer", (), {"sanity_checking": False})()  # type: ignore[assignment]
        module.overlap.update(torch.zeros(1), torch.full((1,), -100))
        module._log_overlap("val")


def test_a_picture_of_a_prediction():
    mask = torch.tensor([[0, 0, 1], [0, 0, 1]])
    levels = torch.full((2, 3, 3), 100, dtype=torch.uint8)
    colors = [[0, 0, 0], [200, 0, 0]]
    picture = np.asarray(drawn(levels, mask, colors, strength=0.5))
    assert picture[0, 0].tolist() == [50, 50, 50] and picture[0, 2].tolist() == [255] * 3  # the edge
    assert np.array_equal(np.asarray(numbered(mask, colors)), mask)
    assert np.asarray(numbered(mask, colors).convert("RGB"))[0, 2].tolist() == [200, 0, 0]
    x = (torch.full((3, 4, 6), 100 / 255) - 0.5) / 0.25
    assert torch.equal(shown(x, [0.5] * 3, [0.25] * 3, (2, 3)), levels)


def test_figures_of_each_class():
    module = Segmenter(revcol(), torch.optim.AdamW, per_class=True)
    logged = {}
    module.log_dict = lambda figures, **kwargs: logged.update(figures)  # type: ignore[method-assign]
    data = DrawnShapes(train=1, val=1, size=16)
    module._trainer = type("Trainer", (), {"sanity_checking": False, "datamodule": data})()  # type: ignore[assignment]
    module.overlap.update(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]))
    module._log_overlap("val")
    assert {k: float(v) for k, v in logged.items() if "IoU/" in k} == {"val/IoU/background": 0.5, "val/IoU/disc": 0.5}
