"""The command line: short errors with status 2, one folder per run, resuming, and the other subcommands."""

import csv
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from odenets.cli import main
from odenets.messages import explain
from odenets.training import Classifier
from odenets.training.command import run
from schemes import SchemeError

QUICK = str(Path(__file__).parents[2] / "experiments" / "quickstart.yaml")
SMALL = ["-c", QUICK, "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
SMALL += ["--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1"]
SMALL += ["--model.net.widths", "[4, 4]", "--model.net.functions", "[4, 4]", "--trainer.accelerator", "cpu"]
SMALL += ["--trainer.log_every_n_steps", "1"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fails(capsys, *args: str) -> list[str]:
    """The two lines with which a command line ends, its status being 2."""
    with pytest.raises(SystemExit) as e:
        main(list(args))
    assert e.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("error: "), lines
    return lines


def rows(file: str) -> list[dict]:
    with open(file) as lines:
        return list(csv.DictReader(lines))


def fit(*args: str):
    return run(["fit", *SMALL, *args])


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    ("args", "first", "second"),
    [
        (["fot"], "no 'fot'; wanted one of fit, validate", "fit"),
        (["fit"], "data and model not given", "-c experiments"),
        (["fit", "-c", "nope.yaml"], "no file", ""),
        (["fit", "-c", QUICK, "--trainer.max_epoch", "3"], "trainer.max_epoch: there is no", "trainer.max_epochs"),
        (["fit", "-c", QUICK, "--model.net.schem", "rk4"], "model.net.schem: there is no such option", "scheme"),
        (["fit", "-c", QUICK, "--model.net.scheme", "rk5"], "rk5", "rk4"),
        (["fit", "-c", QUICK, "--model.net.functions", "two"], "model.net.functions: got 'two'", ""),
        (["fit", "-c", QUICK, "--model.net.functions", "[3, 4]"], "level 1 has 3", ""),
        (["fit", "-c", QUICK, "--model.net.placement", "publik"], "got 'publik', wanted one of post, public", "public"),
        (["fit", "-c", QUICK, "--model.net", "HoResNet"], "'HoResNet' cannot be imported", "odenets.models.HOResNet"),
        (["fit", "-c", QUICK, "--model.optimizer.lrr", "1"], "model.optimizer.lrr: there is no", "lr"),
        (["fit", "-c", QUICK, "--data.batch_size", "x"], "data.batch_size: got 'x', wanted int", ""),
        (["fit", "-c", QUICK, "--trainer.precision", "17"], "trainer.precision: got '17', wanted one of", ""),
        (["fit", "-c", QUICK, "--trainer.accelerator", "gpux"], "gpux", ""),
        (["fit", "-c", QUICK, "--nope"], "nope: there is no such option", ""),
        (["fit", "-c", QUICK, "--ckpt_path", "last"], "no such file", "Train first"),
        (["test", "-c", QUICK, "--ckpt_path", "nope.ckpt"], "nope.ckpt", "Train first"),
        (["fit", "-c", QUICK.replace("quickstart", "cifar10_resnet")], "no data", "--data.root"),
        (["fit", "-c", QUICK.replace("quickstart", "cifar10_resnet"), "--data.root", "/no"], "'/no'", "--data.hub"),
    ],
    ids=lambda value: " ".join(value[-2:]).replace(str(Path(QUICK).parent), "") if isinstance(value, list) else "",
)
def test_wrong_options_end_in_two_lines(capsys, args, first, second):
    lines = fails(capsys, *args)
    assert first in lines[0], lines
    assert second in " ".join(lines), lines


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    ("args", "first"),
    [
        (["--model.optimizer.nesterov", "true", "--model.optimizer.momentum", "0"], "model.optimizer: Nesterov"),
        (["--model.optimizer", "torch.optim.LBFGS"], "model.optimizer: LBFGS doesn't support"),
        (["--model.optimizer", "torch.optim.SparseAdam", "--model.optimizer.lr", "1"], "SparseAdam does not support"),
        (
            ["--model.optimizer", "torch.optim.Adagrad", "--model.schedule", "odenets.training.OneCycle"],
            "OneCycle moves the momentum, and Adagrad has none",
        ),
        (["--trainer.val_check_interval", "1000"], "`val_check_interval` (1000)"),
        (["--trainer.limit_train_batches", "0"], "trainer.limit_train_batches is 0; wanted"),
        (["--trainer.devices", "foo"], "TypeError: `devices` selected"),
        (["--seed_everything", "-1"], "seed_everything is -1; wanted 0 to"),
    ],
)
def test_what_torch_and_lightning_refuse_late_ends_in_two_lines(capsys, args, first):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *SMALL, "--trainer.max_epochs", "1", *args])
    lines = capsys.readouterr().err.strip().splitlines()[-2:]
    assert stop.value.code == 2 and lines[0].startswith(f"error: {first}") and lines[1].startswith("  "), lines


def test_an_optimiser_is_refused_before_the_earlier_run_is_set_aside():
    """And nothing that it leaves at parameters stays: it is tried on others."""
    seen = []

    def hooked(groups):
        params = [p for group in groups for p in group["params"]]
        seen.extend(params)
        for p in params:
            p.register_post_accumulate_grad_hook(lambda p: None)
        return torch.optim.SGD(groups, lr=0.1)

    net = torch.nn.Linear(2, 2)
    Classifier(net, hooked)
    assert len(seen) == 2 and not {id(p) for p in seen} & {id(p) for p in net.parameters()}
    assert all(not p._post_accumulate_grad_hooks for p in net.parameters())
    with pytest.raises(SchemeError, match="momentum"):
        Classifier(net, partial(torch.optim.SGD, lr=0.1, nesterov=True))


def test_wrong_keys_and_syntax_in_a_file(capsys):
    Path("bad.yaml").write_text("a: [1\nb: 2")
    assert "parsing" in fails(capsys, "fit", "-c", "bad.yaml")[0]
    Path("bad.yaml").write_text("trainer: {max_epoch: 3}")
    lines = fails(capsys, "fit", "-c", QUICK, "-c", "bad.yaml")
    assert "max_epoch" in lines[0] and "trainer.max_epochs" in lines[1]


@pytest.mark.cases(1)
@pytest.mark.parametrize("group", ["trainer", "checkpoint", "last"])
def test_null_is_no_group_of_options(capsys, group):
    Path("c.yaml").write_text(f"{group}: null\n")
    first, second = fails(capsys, "fit", *SMALL, "-c", "c.yaml")
    assert first.startswith(f"error: {group}") and "null" in first + second


def test_an_unknown_message_is_passed_on_in_one_line():
    assert explain("something\n  new\n", [], [])[0] == "something new"


def test_fit_leaves_everything_in_one_folder_and_says_where(capsys):
    command = fit("--trainer.max_epochs", "2", "--model.net.scheme", "midpoint")
    out = capsys.readouterr().out
    files = ["checkpoints/best.ckpt", "checkpoints/last.ckpt", "config.yaml", "metrics.csv"]
    for file in files:
        assert f"runs/quickstart/{file}" in out and Path("runs/quickstart", file).exists()
    assert sorted(p.name for p in Path().iterdir()) == ["runs"]
    assert list(Path("runs/quickstart").glob("events.out.tfevents*"))
    columns = set(rows("runs/quickstart/metrics.csv")[0])
    wanted = {"train/loss", "train/acc", "val/loss", "val/acc", "train/images_per_s", "evaluations", "lr-SGD/pg1"}
    assert wanted <= columns
    assert {str(level.scheme) for level in command.model.net.levels} == {"midpoint"}
    config = yaml.safe_load(Path("runs/quickstart/config.yaml").read_text())
    assert config["model"]["init_args"]["net"]["init_args"]["scheme"] == "midpoint"


def test_data_decides_classes_and_channels():
    net = fit("--trainer.fast_dev_run", "true").model.net
    assert net.head.out_features == 10 and next(net.parameters()).shape[1] == 1
    assert not Path("runs").exists()


@pytest.mark.long
def test_the_saved_configuration_repeats_the_run():
    first = fit("--trainer.max_epochs", "1")
    Path("runs/quickstart/config.yaml").rename("again.yaml")
    second = run(["fit", "-c", "again.yaml", "--run_dir", "runs/again"])
    assert Path("runs/again/checkpoints/best.ckpt").exists()
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.long
def test_last_resumes_to_the_same_weights_as_an_uninterrupted_run():
    constant = ["--model.schedule", "odenets.training.Constant"]
    straight = fit("--trainer.max_epochs", "3", "--run_dir", "runs/straight", *constant)
    fit("--trainer.max_epochs", "1", *constant)
    resumed = fit("--trainer.max_epochs", "3", "--ckpt_path", "last", *constant)
    assert resumed.trainer.current_epoch == 3 and resumed.trainer.global_step == 6 == straight.trainer.global_step
    assert sorted(p.name for p in Path("runs/quickstart").glob("metrics*")) == ["metrics-1.csv", "metrics.csv"]
    epochs = [row["epoch"] for row in rows("runs/quickstart/metrics.csv") if row["epoch"]]
    assert set(epochs) == {"1", "2"}
    assert sorted(p.name for p in Path("runs/quickstart/checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert torch.load("runs/quickstart/checkpoints/last.ckpt", weights_only=True)["global_step"] == 6


@pytest.mark.long
def test_an_earlier_run_is_set_aside_not_overwritten():
    fit("--trainer.max_epochs", "1", "--model.net.scheme", "euler")
    fit("--trainer.max_epochs", "1")
    assert "scheme: euler" in Path("runs/quickstart-1/config.yaml").read_text()
    assert "scheme: rk4" in Path("runs/quickstart/config.yaml").read_text()


def test_a_run_that_fails_to_start_leaves_the_earlier_one(capsys):
    fit("--trainer.max_epochs", "1")
    capsys.readouterr()
    fails(capsys, "fit", *SMALL, "--trainer.accelerator", "gpux")
    assert Path("runs/quickstart/checkpoints/last.ckpt").exists()


@pytest.mark.filterwarnings("ignore:.*uses the net as it was built.*")
def test_validate_test_and_predict(capsys):
    trained = fit("--trainer.max_epochs", "1")
    before = Path("runs/quickstart/metrics.csv").read_text()
    for name in ("validate", "test"):
        done = run([name, *SMALL, "--ckpt_path", "best"])
        assert {"validate": "val/acc", "test": "test/acc"}[name] in done.trainer.callback_metrics
        for a, b in zip(trained.model.parameters(), done.model.parameters(), strict=True):
            assert torch.equal(a, b)
    run(["predict", *SMALL, "--ckpt_path", "last"])
    predicted = rows("runs/quickstart/predict/predictions.csv")
    assert len(predicted) == 359 and {row["class"] for row in predicted} <= set("0123456789")
    assert Path("runs/quickstart/metrics.csv").read_text() == before
    run(["test", *SMALL])


@pytest.mark.long
def test_untrained_evaluation_warns():
    with pytest.warns(UserWarning, match="untrained"):
        run(["test", *SMALL])


@pytest.mark.long
def test_checkpoint_rebuilds_its_net():
    command = fit("--trainer.max_epochs", "1", "--model.net.scheme", "midpoint")
    path = "runs/quickstart/checkpoints/last.ckpt"
    torch.load(path, weights_only=True)
    model = Classifier.load_from_checkpoint(path)
    assert str(model.net.levels[0].scheme) == "midpoint" and model.net.head.out_features == 10
    for a, b in zip(command.model.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.long
def test_loading_into_another_scheme_warns():
    fit("--trainer.max_epochs", "1")
    with pytest.warns(UserWarning, match=r"differs from the configured one: step=1.0 against 0.5"):
        run(["test", *SMALL, "--ckpt_path", "last", "--model.net.step", "0.5"])


NAMED = ["--model.net", "odenets.create_model", "--model.net.name", "ho_resnet26", "--model.net.scheme", "midpoint"]
SIZES = ["--model.net.dict_kwargs.widths", "[4, 4]", "--model.net.dict_kwargs.functions", "[2, 2]"]


def test_a_model_by_its_name_trains_and_its_checkpoint_knows_it():
    from odenets.training.trained import open_trained

    fit = ["fit", *SMALL[:2], *NAMED, *SIZES, "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"]
    command = run([*fit, "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1"])
    path = "runs/quickstart/checkpoints/last.ckpt"
    for net in (open_trained(path).net, Classifier.load_from_checkpoint(path).net):
        assert str(net.levels[0].scheme) == "midpoint" and net.in_chans == 1 and net.num_classes == 10
        for a, b in zip(command.model.net.state_dict().values(), net.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_a_wrong_option_of_a_named_model_ends_in_two_lines(capsys):
    lines = fails(capsys, "fit", *SMALL[:2], *NAMED, "--model.net.dict_kwargs.widhts", "[4, 4]")
    assert "ho_resnet26 has no option 'widhts'" in lines[0] and "Closest: widths" in lines[1]
    lines = fails(capsys, "fit", *SMALL[:2], "--model.net", "odenets.create_model", "--model.net.name", "ho_resnet27")
    assert "ho_resnet26" in lines[0]


@pytest.mark.long
def test_no_checkpoints_no_logger():
    fit("--trainer.max_epochs", "1", "--trainer.enable_checkpointing", "false", "--trainer.logger", "false")
    assert [p.name for p in Path("runs/quickstart").iterdir()] == ["config.yaml"] and len(list(Path().iterdir())) == 1


def test_the_printed_configuration_is_complete(capsys):
    with pytest.raises(SystemExit) as e:
        main(["fit", "-c", QUICK, "--print_config"])
    assert e.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["trainer"]["max_epochs"] and config["checkpoint"]["monitor"] == "val/acc"


@pytest.mark.long
def test_help_and_version_need_nothing_heavy():
    code = """
import sys
from odenets.cli import main
for args in ([], ["--help"], ["-h"], ["--version"]):
    sys.argv[1:] = args
    main()
    assert "lightning" not in sys.modules, args
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.count("usage: ") == 3, done.stderr
    assert done.stdout.count("fit|validate|test|predict") == 3 and done.stdout.splitlines()[-1].startswith("odenets ")


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["fot"], "fot"),
        pytest.param(["fit", "-c", QUICK, "--model.net.scheme", "rk5"], "rk5", marks=pytest.mark.long),
    ],
)
def test_python_m_exits_with_status_2_and_two_lines(words, named):
    done = subprocess.run([sys.executable, "-m", "odenets", *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 2, done.stderr
    assert named in done.stderr


def test_a_missing_extra_names_its_install_line(capsys, monkeypatch):
    for name in list(sys.modules):
        if name.startswith("odenets.training"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)
    lines = fails(capsys, "fit", "-c", QUICK)
    assert "lightning" in lines[0] and 'pip install "odenets[train]"' in lines[1]


def test_a_torchvision_that_does_not_fit_is_repaired(monkeypatch):
    from odenets import cli

    if hasattr(torch.ops.torchvision, "nms"):
        pytest.skip("a torchvision that fits has declared its operators in this process")
    # A package that fails as the real one does: its operators are declared only in its missing binary.
    folder = Path("fake/torchvision")
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(
        "import torch\n"
        "for name in ('nms', 'qnms'):\n"
        "    if not hasattr(torch.ops.torchvision, name):\n"
        "        raise RuntimeError(f'operator torchvision::{name} does not exist')\n"
    )
    monkeypatch.syspath_prepend(str(folder.parent.absolute()))
    with pytest.warns(UserWarning, match="does not fit this torch"):
        cli.repair_torchvision()
    assert "torchvision" in sys.modules
    del sys.modules["torchvision"]  # for good: monkeypatch would put it back for other tests to find
