"""Training, resuming, measuring and predicting by the command line."""

import shutil
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image

import odenets.training
from odenets import create_model
from odenets.checkpoints import save
from odenets.cli import main
from odenets.models.depth import parameter_depths
from odenets.segmentation import DrawnShapes, SegmentationAugment, SegmentationData, Segmenter, UPerNet
from odenets.segmentation.nets import pixel_cross_entropy
from odenets.segmentation.pictures import drawn, numbered, shown
from odenets.shapes import write
from odenets.training import Constant
from odenets.training.command import run
from odenets.training.errors import DataError
from schemes import SchemeError

from .scenes import REVCOL, PerPixel, config, returning, revcol
from .test_nets import mask2former

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
    average = {"class_path": "odenets.training.MovingAverage", "init_args": {"decay": 0.9}}
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
    averaged = want["current_model_state"]  # EMA puts its own in the place of the weights
    assert any(not torch.equal(averaged[key], value) for key, value in want["state_dict"].items())
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
    tested = run(["test", *where]).trainer.callback_metrics  # on the same pictures: there is no third split
    assert {name: float(tested[f"test/{name[4:]}"]) for name in figures} == figures


def test_pictures_are_seen_together_where_their_sizes_agree():
    torch.manual_seed(0)
    module = Segmenter(revcol(), torch.optim.AdamW).eval()
    sizes = [(16, 16), (16, 16), (16, 16), (16, 20), (16, 16), (12, 12)]
    x = [torch.randn(3, *size) for size in sizes]
    y = [torch.zeros(*size) for size in [(16, 16), (16, 16), (24, 24), (32, 40), (32, 32), (12, 12)]]
    seen = []
    module.net.register_forward_hook(lambda net, args, out: seen.append(len(args[0])))
    found = module.predicted(x, y)
    assert seen == [2, 1, 1, 1, 1] and [p.shape for p in found] == [m.shape for m in y]
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
    x[:, :, ::4], x[:, :, 1::4] = -2, -2  # black; a third as large, each pixel is of three and more
    small = shown(x, [0.5] * 3, [0.25] * 3, (4, 2)).float()
    assert 30 < small.min() and small.max() < 80, "a mean of black and of 100, not one of its pixels"


def test_figures_of_each_class():
    module = Segmenter(revcol(), torch.optim.AdamW, per_class=True)
    logged = {}
    module.log_dict = lambda figures, **kwargs: logged.update(figures)  # type: ignore[method-assign]
    data = DrawnShapes(train=1, val=1, size=16)
    module._trainer = type("Trainer", (), {"sanity_checking": False, "datamodule": data})()  # type: ignore[assignment]
    module.overlap.update(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]))
    module._log_overlap("val")
    assert {k: float(v) for k, v in logged.items() if "IoU/" in k} == {"val/IoU/background": 0.5, "val/IoU/disc": 0.5}


@pytest.mark.parametrize("build", [revcol, mask2former])
def test_rates_decay_from_the_head_to_the_stem(build):
    """A model's layer has the rate of its depth in the classifier; all of a head has the whole rate."""
    module = Segmenter(build(), partial(torch.optim.AdamW, lr=0.1, weight_decay=0.3), layer_decay=0.5)
    names = {id(p): name for name, p in module.net.named_parameters()}
    groups = module.make_optimizer().param_groups
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups) == len(names)
    classifier = parameter_depths(create_model("revcol_tiny", **REVCOL))
    body = next(name for name in found if name.endswith("net.stem.conv.weight")).removesuffix("stem.conv.weight")
    below = {body + name: depth for name, depth in classifier.items() if body + name in found}
    assert set(below) == {name for name in found if name.startswith(body)} and len(below) < len(found)
    deepest = max(classifier.values())
    for name, p in module.net.named_parameters():
        depth = below.get(name, deepest)
        assert found[name][0] == pytest.approx(0.1 * 0.5 ** (deepest - depth)), name
        assert found[name][1] == (0.3 if p.ndim > 1 else 0), name


def alone(net, **options) -> tuple[Segmenter, dict]:
    """A module without a trainer, and what it logs."""
    module, logged = Segmenter(net, partial(torch.optim.SGD, lr=0.1), **options), {}
    module.log = lambda name, value, **_: logged.__setitem__(name, float(value.detach()))  # type: ignore[method-assign]
    module._trainer = type("Trainer", (), {"world_size": 1})()  # type: ignore[assignment]
    return module, logged


def test_auxiliary_values_are_added_to_the_loss_in_every_mode():
    x, y = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.randint(0, 5, (2, 16, 16))
    found = []
    for mode in ("store", "reverse"):
        torch.manual_seed(0)
        net = revcol(backprop=mode).double()
        functions = returning(net.body)
        module, logged = alone(net, aux={"size": 0.5})
        loss = module.training_step((x, y), 0)
        if mode == "store":
            size = sum(float(f.seen[0].detach()) for f in functions)
            assert logged["train/size"] == pytest.approx(size) and size > 0
            assert float(loss.detach()) == pytest.approx(logged["train/loss"] + 0.5 * size)
            assert logged["train/loss"] == pytest.approx(float(sum(net(x, y).values()).detach()))
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in net.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_auxiliary_values_that_cannot_be_logged_or_found_are_refused():
    net, batch = revcol(), (torch.randn(2, 3, 16, 16), torch.zeros(2, 16, 16).long())
    returning(net.body, "auxiliary")
    for name, says in (("auxiliary", "logged as train/auxiliary, which is a part"), ("energy", "there are auxiliary")):
        with pytest.raises(SchemeError, match=says):
            alone(net, aux={name: 1.0})[0].training_step(batch, 0)
    with pytest.raises(SchemeError, match="PerPixel has no Stack"):
        alone(PerPixel(), aux={"energy": 1.0})


def test_frozen_parts_of_the_model_stay_as_they_are():
    """By their names in a classifier; the head learns, and norms with statistics keep them."""
    torch.manual_seed(0)
    net = UPerNet("resnet20", num_classes=5, width=16, auxiliary_width=16)
    module, _ = alone(net, frozen=["stem", "levels.[01]"])
    assert not net.body.stem.norm.training and net.body.levels[2].steps[0].fs[0].norm1.training
    prefix = next(key for key in net.state_dict() if key.endswith("stem.conv.weight")).removesuffix("stem.conv.weight")
    before = {key: value.clone() for key, value in net.state_dict().items()}
    optimizer = module.make_optimizer()
    for mode in (True, False, True):  # as validation lies between two epochs
        module.train(mode)
        if mode:
            optimizer.zero_grad()
            module.training_step((torch.randn(2, 3, 32, 32), torch.randint(0, 5, (2, 32, 32))), 0).backward()
            optimizer.step()
    held = tuple(f"{prefix}{part}." for part in ("stem", "levels.0", "levels.1"))
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith(held), key


@pytest.mark.parametrize("mode", ["store", "reverse"])
def test_all_of_the_model_may_be_frozen(mode):
    net = revcol(backprop=mode)
    module, _ = alone(net, frozen=["*"], layer_decay=0.5)
    below = {id(p) for p in net.body.parameters()}
    trained = [p for group in module.make_optimizer().param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in net.parameters()} - below
    module.training_step((torch.randn(2, 3, 16, 16), torch.zeros(2, 16, 16).long()), 0).backward()
    assert all(p.grad is not None for p in trained) and all(p.grad is None for p in net.body.parameters())
    with pytest.raises(SchemeError, match=r"'levels.9' is no part of RevCol"):
        alone(revcol(), frozen=["levels.9"])
    with pytest.raises(SchemeError, match="nothing to train"):
        alone(PerPixel(), frozen=["*"])


class Body(Callback):
    """The weights of the body before each epoch."""

    def __init__(self):
        self.found = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.found.append({key: value.clone() for key, value in pl_module.body.state_dict().items()})


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_lightning_thaws_the_model_below_the_head(tmp_path):
    module, seen = Segmenter(revcol(), partial(torch.optim.SGD, lr=0.1), Constant()), Body()
    thaw = L.pytorch.callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.1)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=3, callbacks=[thaw, seen], limit_val_batches=0, **quiet
    )
    trainer.fit(module, DrawnShapes(train=4, val=2, size=16, batch_size=2))
    first, second, third = seen.found
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(second[key], third[key]) for key in second)


def test_a_network_without_depths_and_a_decay_that_is_none_are_refused():
    with pytest.raises(SchemeError, match="PerPixel does not say how deep"):
        Segmenter(PerPixel(), torch.optim.AdamW, layer_decay=0.9)
    with pytest.raises(SchemeError, match="layer_decay is 0"):
        Segmenter(revcol(), torch.optim.AdamW, layer_decay=0)


def test_a_classifier_below_the_head(tmp_path, capsys):
    """``--weights`` fills the model and leaves the head; kernels are padded; there is no such start in evaluation."""
    options = {"channels": [8, 16], "blocks": [1, 1], "columns": 2, "patch": 2}
    classifier = create_model("revcol_tiny", num_classes=7, **options)
    save(classifier, tmp_path / "w.safetensors")
    file = config(tmp_path, SHAPES, {"fast_dev_run": True})
    where = ["-c", str(file), "--weights", str(tmp_path / "w.safetensors")]
    still = ["--model.optimizer.lr", "0", "--model.schedule", "odenets.training.Constant"]
    padded = ["--model.net.options.kernel_size", "7", "--adapt.pad_kernels", "true"]
    net = run(["fit", *where, *still, *padded]).model.body
    assert "kernels from 3x3 to 7x7" in capsys.readouterr().out
    for name, value in net.state_dict().items():
        old = classifier.state_dict()[name]
        if value.shape != old.shape:
            assert value.shape[2:] == (7, 7) and "dwconv" in name
            assert value.count_nonzero() == old.count_nonzero()
            value = value[..., 2:5, 2:5]
        assert torch.equal(value, old), name
    with pytest.raises(SystemExit):
        main(["validate", *where])
    lines = capsys.readouterr().err.splitlines()
    assert "Segmenter would guess with the rest" in lines[0] and "--ckpt_path" in lines[1]


def test_groups_of_net_and_head_are_printed(tmp_path, capsys):
    file = config(tmp_path, SHAPES, {"max_epochs": 1})
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(file), "--model.layer_decay", "0.5", "--print_groups"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [float(row[1]) for row in rows] == sorted((float(row[1]) for row in rows), reverse=True)
    assert rows[0][:2] == ["4", "1"] and float(rows[-1][1]) == 0.5**4
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(file), "--model.frozen", "[stem]", "--model.layer_decay", "0.5", "--print_groups"])
    assert len(capsys.readouterr().out.splitlines()[1:]) < len(rows)


class Pixels(PerPixel):
    """Learns; without norms, whose statistics are those of a process."""

    mean_over_pixels = True

    def forward(self, x, y=None):
        scores = self.map(x)
        return scores if y is None else {"loss": pixel_cross_entropy(scores, y)}


class Kept(Callback):
    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            held = {"weights": pl_module.net.state_dict(), "figures": dict(trainer.callback_metrics)}
            torch.save(held, Path(trainer.default_root_dir, f"{trainer.world_size}.pt"))


def trained_by(root: Path, devices: int) -> dict:
    torch.manual_seed(3)
    data = SegmentationData(
        str(root / "data"), classes=5, crop=48, scales=(0.6, 1.4), batch_size=4 // devices, num_workers=0,
        augment=SegmentationAugment(flip=0, distort=False),
    )  # fmt: skip
    options = {"devices": devices, "strategy": "ddp_fork"} if devices > 1 else {"devices": 1}
    trainer = L.Trainer(
        default_root_dir=root, accelerator="cpu", max_epochs=2, precision="64-true", logger=False, callbacks=[Kept()],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(Segmenter(Pixels(5), partial(torch.optim.SGD, lr=0.5), Constant()), data)
    return torch.load(root / f"{devices}.pt", weights_only=True)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # of Lightning: workers, forks of a process with threads
def test_two_processes_train_and_measure_as_one(tmp_path):
    """Pictures that do not fill the crop have fewer pixels, so that the mean of two means is not the mean of all."""
    write(tmp_path / "data", {"train": 8, "val": 5}, size=40, seed=1)
    one, two = (trained_by(tmp_path, devices) for devices in (1, 2))
    assert one["weights"]["map.weight"].abs().max() > 0
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, atol=1e-7, rtol=1e-6)
    for name in ("val/mIoU", "val/mAcc", "val/aAcc", "train/loss"):
        torch.testing.assert_close(two["figures"][name], one["figures"][name], atol=1e-6, rtol=1e-5)


def test_processes_weigh_their_pixels():
    """The mean of the parts, each with its share, is the mean over the whole batch."""
    torch.manual_seed(0)
    net, x = Pixels(3), torch.randn(2, 3, 4, 4)
    y = torch.randint(0, 3, (2, 4, 4))
    y[0, :3] = -100
    whole = net(x, y)["loss"]
    module = Segmenter(net, torch.optim.SGD)
    counts = [float((part != -100).sum()) for part in y]
    strategy = type("Strategy", (), {"reduce": lambda self, own, reduce_op: torch.tensor(sum(counts) / 2)})()
    module._trainer = type("Trainer", (), {"world_size": 2, "strategy": strategy})()  # type: ignore[assignment]
    module.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    parts = [module.training_step((x[n : n + 1], y[n : n + 1]), 0) for n in range(2)]
    torch.testing.assert_close(sum(parts) / 2, whole)
    plain = sum(net(x[n : n + 1], y[n : n + 1])["loss"] for n in range(2)) / 2
    assert abs(float((plain - whole).detach())) > 1e-3
