"""The run's folder, configuration files and options: what is refused before anything is opened, and what is kept."""

import csv
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

from odenets.cli import main
from odenets.config_files import check_file, check_files
from odenets.training.command import find_checkpoint, requeued, resolve, run
from odenets.training.files import FolderLock, close_part, parts_of
from odenets.training.finite import NotFinite, repeat
from odenets.training.options import RULES, check_numbers
from odenets.training.sources import DataError
from schemes import SchemeError

from .runs import kills

QUICK = {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 1, "callbacks": []}


def child(work) -> int:
    """A forked process that does some work and then waits to be killed; returns when the work is done."""
    ready, done = os.pipe()
    if not (pid := os.fork()):
        try:
            work()
            os.write(done, b".")
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(done)
    assert os.read(ready, 1) == b".", "the child failed"
    return pid


# --- the lock ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_one_runs_until_its_process_dies(tmp_path):
    folder = tmp_path / "a" / "run"
    pid = child(FolderLock(folder).acquire)
    try:
        with pytest.raises(DataError, match=rf"run is in use: process {pid} on .*\n.*--run_dir"):
            FolderLock(folder).acquire()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    lock = FolderLock(folder)
    lock.acquire()
    lock.release()
    assert list(folder.iterdir()) == []


def test_workers_do_not_inherit_the_lock(tmp_path):
    def hold() -> None:
        FolderLock(tmp_path / "run").acquire()
        if not os.fork():  # a worker, which outlives its parent
            time.sleep(30)
            os._exit(0)

    pid = child(hold)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    FolderLock(tmp_path / "run").acquire()


def test_what_a_refused_run_made_is_gone(tmp_path):
    lock = FolderLock(tmp_path / "a/b/run")
    lock.acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "file above", "long"])
def test_a_wrong_folder_is_two_lines(tmp_path, kind):
    (tmp_path / "file").write_text("x")
    folder = {"file": tmp_path / "file", "file above": tmp_path / "file/run", "long": tmp_path / ("x" * 300)}[kind]
    with pytest.raises(DataError, match=r"run_dir: .* cannot be written: .*\n  Give a folder"):
        FolderLock(folder).acquire()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", [".", "", "..", "{cwd}"])
def test_the_folder_that_the_command_runs_in_is_not_renamed(tmp_path, monkeypatch, name):
    """Nor one around it: they hold more than a run."""
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    folder = Path(name.format(cwd=Path.cwd()))
    (folder / "config.yaml").write_text("a: 1")
    before = sorted(tmp_path.rglob("*"))
    lock = FolderLock(folder)
    lock.acquire()
    with pytest.raises(DataError, match=r"runs in this folder: it is not set aside\n  Give a folder of its own"):
        lock.set_aside()
    lock.release()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_whose_name_is_none(tmp_path):
    with pytest.raises(DataError, match="is no path"):
        FolderLock(Path(f"{tmp_path}/a\0b")).acquire()


def test_the_earlier_run_is_set_aside_and_the_new_folder_held(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("a: 1")
    lock = FolderLock(folder)
    lock.acquire()
    lock.set_aside()
    assert (tmp_path / "run-1/config.yaml").exists() and [p.name for p in folder.iterdir()] == [".lock"]

    def refused() -> None:
        with pytest.raises(DataError):
            FolderLock(folder).acquire()

    pid = child(refused)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    lock.release()


# --- metrics in parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_parts_in_order_hold_every_row_once(tmp_path, seed):
    """However often a run is killed and resumed, from whichever of its checkpoints."""
    draw = random.Random(seed)
    saved = [{"part": 0, "rows": 0}]
    at = [0]  # the first row after each checkpoint
    row = 0
    for _ in range(6):
        part, rows = len(parts_of(tmp_path)), []
        for _ in range(draw.randint(0, 5)):
            rows.append([row])
            row += 1
            if draw.random() < 0.4:
                saved.append({"part": part, "rows": len(rows)})
                at.append(row)
        with (tmp_path / "metrics.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["n"], *rows])
        chosen = draw.choice([len(saved) - 1, draw.randrange(len(saved))])
        del saved[chosen + 1 :], at[chosen + 1 :]
        row = at[chosen]
        close_part(tmp_path, saved[chosen])
        texts = [path.read_text().splitlines()[1:] for path in parts_of(tmp_path)]
        assert [int(line) for lines in texts for line in lines] == list(range(row))


# --- configuration files ----------------------------------------------------------------------------------------------

_BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"b{i}: &b{i} [{', '.join([f'*b{i - 1}' if i else '*a'] * 10)}]\n" for i in range(9)
)


@pytest.fixture
def _little_memory():
    """Fails where a file fills the memory, and leaves the machine its own."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.cases(4)
@pytest.mark.usefixtures("_little_memory")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"a: 1\nb:\n  c: 2\n  c: 3\n", ["'c' stands twice", "lines 3 and 4"]),
        (b"{a: 1, b: 2, a: 3}", ["'a' stands twice"]),
        (b"- {x: 1, x: 1}", ["'x' stands twice"]),
        (b"a:\n\tb: 1\n", ["line 2", "tab"]),
        (b"a: [\n\t1,\n]\nb: {c\t: 1", ["line"]),
        ("a: 1\nb: größer\n".encode("latin-1"), ["line 2", "UTF-8"]),
        ("a: 1\n".encode("utf-16"), ["UTF-8"]),
        (_BOMB.encode(), ["aliases"]),
        (b"a: &a [1, *a]\n", ["alias"]),
        (b"[" * 3000, ["nested too deeply"]),
        (b"{a: " * 300 + b"1" + b"}" * 300, ["nested too deeply"]),
        (b"a: [1\nb: 2", ["parsing", "line 2"]),
        (b"a: 1\nbatch: 010\n", ["line 2", "010 in base 8"]),
        (b"{a: [7, 1:30]}", ["1:30 in base 60"]),
    ],
    ids=lambda v: v[:12].decode("latin-1").replace("\n", " ") if isinstance(v, bytes) else "",
)
def test_a_file_that_a_parser_takes_in_silence_or_chokes_on_is_two_lines(tmp_path, capsys, text, words):
    path = tmp_path / "c.yaml"
    path.write_bytes(text)
    for command in (["fit", "-c", str(path)], ["study", "run", "-c", str(path)]):
        with pytest.raises(SystemExit) as e:
            main(command)
        lines = capsys.readouterr().err.splitlines()
        assert e.value.code == 2 and len(lines) == 2 and "c.yaml" in lines[0], lines
        assert all(word in " ".join(lines) for word in words), lines


def test_usual_files_pass(tmp_path):
    for path in Path(__file__).parents[2].glob("experiments/**/*.yaml"):
        check_file(path)
    (tmp_path / "c.yaml").write_text("x: &x {a: 1, b: 2}\ny: {<<: *x, a: 3}\nz: [*x, *x]\n")
    (tmp_path / "d.yaml").write_text("a: '1:30'\nb: 0\nc: 0x10\nd: [0.07, 1e-3, 00:01:30, \"010\"]\n")
    check_file(tmp_path / "d.yaml")
    check_file(tmp_path / "c.yaml")
    check_files(["fit", "-c", "there is none.yaml", "--data.root", str(tmp_path), "--x=a\0b.yaml"])


def refused(capsys, *words):
    """The first of the two lines that refuse a run of the quickstart with some words more."""
    with pytest.raises((SystemExit, SchemeError)) as e:
        resolve(["fit", "-c", "quickstart", *words])
    text = str(e.value) if isinstance(e.value, SchemeError) else capsys.readouterr().err
    first, _ = text.splitlines()
    return first


FAULTS = {"twice": ("{max_epochs: 3, max_epochs: 4}", "stands twice"), "octal": ("{max_epochs: 010}", "in base 8")}


@pytest.mark.parametrize(("text", "said"), FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize(
    "words",
    [
        "-c f.yaml",
        "-cf.yaml",
        "-c=f.yaml",
        "--config f.yaml",
        "--config=f.yaml",
        "-c f",
        "-cf",
        "-c=f",
        "--config=f",
        "-c outer.yaml",
        "--trainer below",
        "--trainer=below",
        "--trainer {below}",
        "-c {trainer: {below}}",
    ],
)
def test_a_fault_is_found_however_its_file_is_named(tmp_path, monkeypatch, capsys, text, said, words):
    """Also by another file, without an ending, or as a value."""
    monkeypatch.chdir(tmp_path)
    for name in ("f", "f.yaml"):
        (tmp_path / name).write_text(f"trainer: {text}\n")
    (tmp_path / "outer.yaml").write_text("trainer: below\n")
    (tmp_path / "below").write_text(text)
    option, space, value = words.replace("{below}", text).partition(" ")
    assert said in refused(capsys, option, *([value] if space else []))


@pytest.mark.parametrize("text", ["1:30", "0_10", "+010"])
@pytest.mark.parametrize("words", ["--trainer.max_epochs {}", "--trainer.max_epochs={}", "--model.net.widths [{},8]"])
def test_a_number_of_another_base_is_no_value(capsys, text, words):
    assert f"YAML reads {text} in base" in refused(capsys, *words.format(text).split())


def test_a_text_may_look_like_one():
    words = ["fit", "-c", "quickstart", "--trainer.max_time", "1:30:00", "--trainer.max_epochs", "010"]
    trainer = resolve(words)["trainer"]
    assert trainer["max_time"] == "1:30:00" and trainer["max_epochs"] == 10


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--model.optimizer.lr", ".nan"], "model.optimizer.lr is nan"),
        (["--model.optimizer.lr", ".inf"], "model.optimizer.lr is inf"),
        (["--model.optimizer.lr", "1e400"], "model.optimizer.lr is inf"),
        (["--model.optimizer.lr=-0.1"], "model.optimizer.lr is -0.1; wanted 0 or more"),
        (["--data.batch_size", "0"], "data.batch_size is 0; wanted 1 or more"),
        (["--threads", "0"], "threads is 0; wanted 1 or more"),
        (["--trainer.max_epochs", "-2"], "trainer.max_epochs is -2"),
        (["--trainer.accumulate_grad_batches", "0"], "trainer.accumulate_grad_batches is 0"),
        (["--model.label_smoothing", "1.5"], "model.label_smoothing is 1.5"),
        (["--model.schedule.warmup", "-1"], "model.schedule.warmup is -1"),
        (["--last.every_n_train_steps", "0"], "last.every_n_train_steps is 0"),
    ],
)
def test_numbers_that_no_run_can_have_are_refused_before_the_data_is_opened(
    tmp_path, monkeypatch, capsys, options, name
):
    monkeypatch.chdir(tmp_path)
    kills.write_config(tmp_path, **QUICK)

    def built(command):
        raise AssertionError("the data module and the net were built")

    monkeypatch.setattr("odenets.training.command.Command.instantiate_classes", built)
    with pytest.raises(SystemExit) as e:
        run(["fit", "-c", "c.yaml", *options])
    lines = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and len(lines) == 2 and name in lines[0], lines
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize("name", RULES)
def test_every_rule_refuses_a_number_and_takes_one(name):
    with pytest.raises(SchemeError, match=rf"a\.{name} is -2; wanted"):
        check_numbers({"a": {"init_args": {name: -2}}})
    check_numbers({"a": {"init_args": {name: 1 if RULES[name][0](1) else 0.5}}})
    check_numbers({"a": {"init_args": {name: None}}, "b": [True, "x"]})


# --- a loss that is no number -----------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_and_leaves_the_step(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kills.write_config(tmp_path, max_epochs=1, callbacks=[], limit_val_batches=0, accumulate_grad_batches=1)
    nothing = ["--trainer.limit_train_batches", "8", "--model.optimizer", "torch.optim.SGD"]
    # Weights beyond what 32 bits hold after a few steps.
    with pytest.raises(SystemExit) as e:
        run(["fit", "-c", "c.yaml", *nothing, "--model.optimizer.lr", "1e30", "--model.schedule.warmup", "0"])
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert e.value.code == 2 and "the loss is" in first and "learning rate 9" in first and "samples" in first
    held = torch.load("run/not_finite.pt", weights_only=True)
    assert f"at step {held['step']}" in first and str(held["samples"][0]) in first and "not_finite.pt" in second
    assert not list(Path("run").rglob("*.ckpt"))

    command = run(["fit", "-c", "c.yaml", "--trainer.fast_dev_run", "true"])
    assert not repeat(command.model, "run/not_finite.pt").isfinite()


def test_no_checkpoint_holds_what_is_no_number(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kills.write_config(tmp_path, **{**QUICK, "max_epochs": 2})
    from odenets.training.classifier import Classifier

    real = Classifier.on_train_epoch_end

    def spoilt(self):
        real(self)
        if self.current_epoch == 1:
            self.net.head.bias.data[0] = float("nan")

    monkeypatch.setattr(Classifier, "on_train_epoch_end", spoilt)
    with pytest.raises(SystemExit):
        run(["fit", "-c", "c.yaml"])
    first = capsys.readouterr().err.splitlines()[-2]
    assert "net.head.bias is not finite at step" in first and "learning rate" in first
    for name in ("best", "last"):
        held = torch.load(f"run/checkpoints/{name}.ckpt", weights_only=True)
        assert held["global_step"] == 1 and all(v.isfinite().all() for v in held["state_dict"].values())
    assert issubclass(NotFinite, SchemeError)


# --- odds and ends ----------------------------------------------------------------------------------------------------


def test_a_job_that_slurm_put_back_goes_on(tmp_path, monkeypatch):
    for number in (1, 2, 10):
        (tmp_path / f"hpc_ckpt_{number}.ckpt").touch()
    assert requeued(tmp_path) is None
    for name, value in (("SLURM_NTASKS", "1"), ("SLURM_JOB_NAME", "train"), ("SLURM_JOB_ID", "7")):
        monkeypatch.setenv(name, value)
    assert requeued(tmp_path) == str(tmp_path / "hpc_ckpt_10.ckpt")
    assert find_checkpoint(requeued(tmp_path), tmp_path, "fit") == str(tmp_path / "hpc_ckpt_10.ckpt")


@pytest.mark.long
def test_the_saved_configuration_of_a_resumed_run_starts_a_new_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kills.write_config(tmp_path, **QUICK)
    run(["fit", "-c", "c.yaml"])
    run(["fit", "-c", "c.yaml", "--ckpt_path", "last", "--trainer.max_epochs", "2"])
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert saved["ckpt_path"] is None and saved["trainer"]["max_epochs"] == 2
    again = run(["fit", "-c", "run/config.yaml", "--run_dir", "again", "--trainer.max_epochs", "1"])
    assert again.trainer.global_step == 1 and torch.load("run/checkpoints/last.ckpt", weights_only=True)["epoch"] == 2


def test_output_off_a_terminal_is_a_line_per_epoch(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    kills.write_config(tmp_path, **{**QUICK, "max_epochs": 2}, enable_progress_bar=True, enable_model_summary=True)
    run(["fit", "-c", "c.yaml"])
    out, err = capfd.readouterr()
    assert [line.partition(",")[0] for line in out.splitlines() if "train/loss" in line] == ["epoch 1/2", "epoch 2/2"]
    for text in ("Total FLOPs", "modules in train mode", "Modules in train mode", "\r", "it/s", "weights_only"):
        assert text not in out + err


@pytest.mark.long
def test_more_loggers_add_to_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "mine"}}
    kills.write_config(tmp_path, **QUICK, logger=[logger])
    command = run(["fit", "-c", "c.yaml"])
    assert Path("run/metrics.csv").exists() and list(Path("mine").rglob("metrics.csv"))
    assert len(command.trainer.loggers) == 3 and Path("run/config.yaml").exists()


@pytest.mark.cases(1)
@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
@pytest.mark.parametrize("mixing", [0.0, 0.5])
def test_precisions(tmp_path, monkeypatch, precision, mixing):
    monkeypatch.chdir(tmp_path)
    kills.write_config(tmp_path, **QUICK, precision=precision)
    # AdamW divides by its eps, which 16 bits do not hold.
    options = ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.01", "--trainer.fast_dev_run", "true"]
    command = run(["fit", "-c", "c.yaml", "--data.augment.mixup", str(mixing), *options])
    wanted = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}[precision]
    assert command.model.net.head.weight.dtype == wanted
    assert torch.isfinite(command.trainer.callback_metrics["train/loss"])
