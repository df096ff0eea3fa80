"""From published weights through the command line: started, judged, resumed, with Lightning's callbacks beside."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from odenets import checkpoints, create_model
from odenets.cli import main
from odenets.training.command import run

QUICK = str(Path(__file__).parents[2] / "experiments" / "quickstart.yaml")
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
QUIET += ["--trainer.accelerator", "cpu", "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1"]
SMALL = ["-c", QUICK, *QUIET, "--model.net.widths", "[4, 4]", "--model.net.functions", "[4, 4]"]
SMALL += ["--trainer.limit_train_batches", "3"]
NET = {"widths": (4, 4), "functions": (4, 4), "scheme": "rk4", "placement": "preact", "stem": "conv3"}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def published(tmp_path) -> Path:
    """A randomly filled file as one would publish it: of RGB pictures and 22 classes, wrapped, beside raw weights."""
    torch.manual_seed(5)
    net = create_model("ho_resnet26", num_classes=22, in_chans=3, **NET)
    state = {"module." + key: torch.rand(v.shape).to(v.dtype) for key, v in net.state_dict().items()}
    path = tmp_path / "published.pth"
    torch.save({"model": {key: torch.zeros_like(v) for key, v in state.items()}, "model_ema": state, "epoch": 3}, path)
    return path


def fit(*args: str):
    return run(["fit", *SMALL, *args])


def fails(capsys, *args: str) -> list[str]:
    with pytest.raises(SystemExit) as e:
        main(list(args))
    assert e.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error: ", "  "))]
    assert len(lines) == 2 and lines[0].startswith("error: "), lines
    return lines


def weights(folder: str, name: str = "last") -> dict:
    return torch.load(Path(folder) / "checkpoints" / f"{name}.ckpt", weights_only=True)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.long
def test_a_published_file_is_fine_tuned_with_a_rate_for_each_depth(published, capsys):
    """Its head is new, its first convolution sums the channels up, and each group has the rate of its depth."""
    # A rate of zero shows where training begins: what is loaded stays.
    args = ["--weights", str(published), "--trainer.max_epochs", "1"]
    fit("--run_dir", "still", *args, "--model.optimizer.lr", "0", "--model.frozen", '["*", "!head"]')
    out = capsys.readouterr().out
    assert "new: head.weight, head.bias" in out and "adapted: stem.conv from 3 channels to 1" in out
    assert "model (raw; the averaged model_ema is loaded)" in out
    there = torch.load(published, weights_only=True)["model_ema"]
    for key, value in weights("still")["state_dict"].items():
        source = there["module." + key.removeprefix("net.")]
        if "head" in key:
            assert value.shape[0] == 10
        elif key == "net.stem.conv.weight":
            torch.testing.assert_close(value, source[:, :1] + source[:, 1:2] + source[:, 2:])
        else:
            torch.testing.assert_close(value, source.to(value.dtype))
    fit("--run_dir", "run", *args, "--model.layer_decay", "0.6", "--model.optimizer.lr", "0.01")
    held = weights("run")
    # stem 0, two levels of one step of rk4 each, norm and head: rates 0.6^3, 0.6^2, 0.6, 1.
    names = [key for key in held["state_dict"] if not re.search(r"running|num_batches", key)]
    depth = {key: 0 if ".stem." in key else int(key.split(".")[2]) + 1 if ".levels." in key else 3 for key in names}
    groups = held["optimizer_states"][0]["param_groups"]
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert [g["depth"] for g in groups] == sorted((g["depth"] for g in groups), reverse=True)
    for group in groups:
        assert group["lr_scale"] == pytest.approx(0.6 ** (3 - group["depth"]))
        assert group["initial_lr"] == pytest.approx(0.01 * 0.6 ** (3 - group["depth"]))
        sizes = [held["state_dict"][key].ndim > 1 for key in names if depth[key] == group["depth"]]
        assert len(group["params"]) == sizes.count(group["weight_decay"] > 0)
    assert not same(held["state_dict"], weights("still")["state_dict"])


def test_groups_are_printed_and_nothing_is_trained_or_written(capsys):
    with pytest.raises(SystemExit) as e:
        main(["fit", *SMALL, "--print_groups", "--model.layer_decay", "0.5", "--model.frozen", "[stem]"])
    lines = capsys.readouterr().out.splitlines()
    assert not e.value.code and lines[0].split()[:2] == ["depth", "scale"] and not Path("runs").exists()
    assert [float(line.split()[1]) for line in lines[1:-1]] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert lines[-1] == "frozen: 36 parameters"


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    ("args", "first", "second"),
    [
        (["--weights", "nowhere.pth"], "there is no file nowhere.pth", "a published tag"),
        (["--weights", "resnet5.v1"], "there is no file resnet5.v1", "Closest: resnet50.v1"),
        (["--weights", "published.pth", "--model.net.widths", "[8, 8]"], "does not fit HOResNet", "Build the network"),
        (["--model.frozen", "[stm]"], "'stm' is no part of HOResNet", "Closest: stem"),
        (["--model.layer_decay", "2"], "layer_decay is 2.0", "one rate for all"),
    ],
)
def test_what_cannot_be_started_from_is_two_lines_and_no_folder(published, capsys, args, first, second):
    lines = fails(capsys, "fit", *SMALL, *args)
    assert first in lines[0] and second in lines[1], lines
    assert not Path("runs").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    fit("--run_dir", str(folder), "--trainer.max_epochs", "2")
    return folder


@pytest.mark.long
def test_a_checkpoint_is_judged_without_a_configuration(trained, capsys):
    """What it says is what the configuration's command says; predict writes beside the run."""
    path = trained / "checkpoints" / "best.ckpt"
    want = run(["test", "-c", str(trained / "config.yaml"), "--ckpt_path", "best"]).trainer.callback_metrics
    got = run(["test", *QUIET[:6], "--ckpt_path", str(path)]).trainer.callback_metrics
    short = run(["test", *QUIET[:6], "--ckpt_path=best", "--run_dir", str(trained)]).trainer.callback_metrics
    for key in ("test/loss", "test/acc"):
        # The configuration limits the pictures; without it all are seen.
        assert torch.equal(got[key], short[key]) and want[key].isfinite()
    every = run(["test", "-c", QUICK, *SMALL[-6:-2], *QUIET[:6], "--ckpt_path", str(path)]).trainer.callback_metrics
    assert torch.equal(got["test/loss"], every["test/loss"])
    run(["predict", *QUIET[:6], "--ckpt_path", str(path)])
    with (trained / "predict" / "predictions.csv").open() as file:
        assert len(list(csv.DictReader(file))) > 100


@pytest.mark.long
def test_evaluation_takes_weights_and_says_what_does_not_fit(trained, capsys, tmp_path):
    net = create_model("ho_resnet26", num_classes=10, in_chans=1, **NET)
    held = weights(str(trained), "best")["state_dict"]
    checkpoints.load(net, held)
    torch.save({"state_dict": {"module." + k: v for k, v in net.state_dict().items()}}, "raw.pth")
    checkpoints.save(net, "raw.safetensors")
    args = ["-c", QUICK, *QUIET, "--model.net.widths", "[4, 4]", "--model.net.functions", "[4, 4]"]
    want = run(["test", *args, "--ckpt_path", str(trained / "checkpoints" / "best.ckpt")]).trainer.callback_metrics
    for name in ("raw.pth", "raw.safetensors"):
        got = run(["test", *args, "--ckpt_path", name]).trainer.callback_metrics
        assert torch.equal(got["test/loss"], want["test/loss"])
    capsys.readouterr()
    wide = ["-c", QUICK, *QUIET, "--model.net.widths", "[8, 8]", "--model.net.functions", "[4, 4]"]
    lines = fails(capsys, "test", *wide, "--ckpt_path", str(trained / "checkpoints" / "best.ckpt"))
    assert "best.ckpt does not fit Classifier: " in lines[0] and "of another shape: net.stem.conv.weight is" in lines[0]
    lines = fails(capsys, "test", *wide, "--ckpt_path", "raw.pth")
    assert "raw.pth does not fit HOResNet; nothing was loaded" in lines[0]
    # A head that is not there would guess: evaluation wants the file's.
    torch.save(create_model("ho_resnet26", num_classes=3, in_chans=1, **NET).state_dict(), "three.pth")
    assert "head.weight is (3, 4), want (10, 4)" in fails(capsys, "test", *args, "--ckpt_path", "three.pth")[0]
    assert "-c FILE.yaml" in fails(capsys, "test", "--ckpt_path", "raw.pth")[1]
    assert "-c FILE.yaml" in fails(capsys, "test", "--ckpt_path", "nowhere.ckpt")[1]


@pytest.mark.long
def test_a_file_does_not_decide_what_code_is_imported(trained, capsys, tmp_path):
    held = weights(str(trained))
    for place, key in (("model", "net"), ("data", "augment")):
        spoiled = json.loads(json.dumps(held["odenets"]["config"]))
        spoiled[place]["init_args"][key] = {"class_path": "evil.Code", "init_args": {}}
        torch.save({**held, "odenets": {**held["odenets"], "config": spoiled}}, "spoiled.ckpt")
        assert "evil.Code" in fails(capsys, "test", "--ckpt_path", "spoiled.ckpt")[0]
    # An optimiser is not built from the file at all.
    held["odenets"]["config"]["model"]["init_args"]["optimizer"] = {"class_path": "evil.Optimizer"}
    torch.save(held, "optimizer.ckpt")
    run(["test", *QUIET, "--ckpt_path", "optimizer.ckpt"])


class Keep(Callback):
    """Copies the checkpoint that another callback has just written at the start of an epoch."""

    def __init__(self, folder: str, epoch: int) -> None:
        self.folder, self.epoch = Path(folder), epoch

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        if trainer.current_epoch == self.epoch and not Path("copy").exists():
            shutil.copytree(self.folder, "copy")


def callback(name: str, **options):
    return {"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": options}


CALLBACKS = {
    "rate": callback("LearningRateFinder", num_training_steps=16, min_lr=1e-4, max_lr=0.5, early_stop_threshold=None),
    "batch": callback("BatchSizeFinder", max_trials=2, steps_per_trial=1, init_val=16),
    "ema": callback("EMAWeightAveraging", decay=0.5),
    "early": callback("EarlyStopping", monitor="val/acc", mode="max", patience=9),
    "thaw": callback("BackboneFinetuning", unfreeze_backbone_at_epoch=1, train_bn=False),
    "cycle": callback("BackboneFinetuning", unfreeze_backbone_at_epoch=1, train_bn=False),
    "swa": callback("StochasticWeightAveraging", swa_lrs=0.01, swa_epoch_start=1, device=None),
}


ANNEALED = pytest.mark.xfail(reason="Lightning saves nothing of the schedule by which SWA anneals", strict=True)


@pytest.mark.long
@pytest.mark.parametrize("name", [pytest.param(n, marks=ANNEALED) if n == "swa" else n for n in CALLBACKS])
def test_lightnings_callbacks_run_and_a_resumed_run_ends_as_one_that_was_not(name, tmp_path):
    keep = {"class_path": f"{__name__}.Keep", "init_args": {"folder": "run", "epoch": 2}}
    given = ["--trainer.callbacks", json.dumps([CALLBACKS[name], keep]), "--trainer.max_epochs", "3"]
    given += ["--model.schedule", "odenets.training.OneCycle"] if name == "cycle" else []
    given += ["--trainer.limit_train_batches", "7"] if name == "rate" else []  # a search is no longer than the run
    whole = fit("--run_dir", "run", *given)
    held = weights("run")
    resumed = fit("--run_dir", "copy", *given, "--ckpt_path", "last")
    again = weights("copy")
    assert whole.trainer.global_step == resumed.trainer.global_step == held["global_step"]
    assert same(again["state_dict"], held["state_dict"])
    for a, b in zip(*(h["optimizer_states"][0]["param_groups"] for h in (held, again)), strict=True):
        assert a == b
    rate = held["odenets"]["lr"]
    if name == "rate":
        assert rate is not None and rate != 0.1 and whole.model.lr == rate == resumed.model.lr
        # The rate that was found is the schedule's peak.
        assert held["lr_schedulers"][0]["base_lrs"] == [rate] * 2
    if name == "batch":
        assert whole.datamodule.batch_size == resumed.datamodule.batch_size == 32
    if name in ("thaw", "cycle"):
        assert all(p.requires_grad for p in resumed.model.parameters())


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", ["rate", "batch"])
def test_a_value_given_anew_replaces_the_one_that_was_found(name, tmp_path, caplog):
    option, first, other = {
        "rate": ("--model.optimizer.lr", "0.1", "0.003"),
        "batch": ("--data.batch_size", "64", "16"),
    }[name]
    given = ["--trainer.callbacks", json.dumps([CALLBACKS[name]]), "--trainer.limit_train_batches", "7"]

    def used(command):
        size = command.trainer.train_dataloader.batch_size
        return size if name == "batch" else command.trainer.lr_scheduler_configs[0].scheduler.base_lrs[0]

    found = used(fit("--run_dir", "run", *given, option, first, "--trainer.max_epochs", "3"))
    assert found != float(first)
    # The line that resumes repeats the first one.
    for epochs, (value, want) in enumerate([(first, found), (other, float(other)), (other, float(other))], 4):
        caplog.clear()
        line = "--run_dir", "run", *given, option, value, "--trainer.max_epochs", str(epochs), "--ckpt_path", "last"
        assert used(fit(*line)) == want
        assert ("as a finder has found" in caplog.text) == (want == found)


@pytest.mark.long
def test_the_schedule_lasts_as_long_as_the_run_whose_batches_a_finder_made(tmp_path):
    args = ["-c", QUICK, *QUIET, *SMALL[-6:-2], "--trainer.max_epochs", "1", "--data.batch_size", "64"]
    given = callback("BatchSizeFinder", max_trials=1, steps_per_trial=1, init_val=256)
    command = run(["fit", *args, "--run_dir", "run", "--trainer.callbacks", json.dumps([given])])
    scheduler = command.trainer.lr_scheduler_configs[0].scheduler
    assert command.datamodule.batch_size == 256 and scheduler.last_epoch == command.trainer.global_step
    # At the end of half a cosine, not somewhere on its way.
    assert scheduler.get_last_lr()[0] < 0.1 * 1e-3


@pytest.mark.long
def test_a_resumed_run_remembers_what_it_began_with_and_does_not_read_it_again(published, capsys):
    fit("--run_dir", "run", "--weights", str(published), "--trainer.max_epochs", "1")
    published.unlink()
    for args in ([], ["--weights", str(published)]):
        command = fit("--run_dir", "run", "--ckpt_path", "last", "--trainer.max_epochs", "2", *args)
        assert command.trainer.global_step == 6
        assert yaml.safe_load(Path("run/config.yaml").read_text())["weights"] == str(published)
        assert weights("run")["odenets"]["config"]["weights"] == str(published)
    lines = fails(capsys, "fit", *SMALL, "--run_dir", "run", "--ckpt_path", "last", "--weights", "other.pth")
    assert "other.pth begins a run" in lines[0] and "Give one of them" in lines[1]
