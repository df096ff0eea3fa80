"""A run that is stopped and resumed ends as one that was not, to the bit; and it says what it cannot go on from."""

import os
import shutil
import signal
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from odenets.training import Classifier, Constant, files
from odenets.training.command import resuming_line, run
from odenets.training.files import CheckpointError, open_checkpoint, write_whole
from odenets.training.options import changes, check_resumed
from odenets.training.resume import Resume
from schemes import SchemeError

from .runs import kills, two_lines
from .test_classifier import Net, Random, trainer

QUICK = {"max_epochs": 2, "limit_train_batches": 5, "limit_val_batches": 2}


class Copies(Callback):
    """Keeps each state of ``last.ckpt``, with the metrics that were written by then."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def _keep(self) -> None:
        if (self.folder / "checkpoints/last.ckpt").exists():
            step = torch.load(self.folder / "checkpoints/last.ckpt", weights_only=True)["odenets"]["place"]
            name = self.folder.parent / "copies" / "-".join(str(int(n)) for n in step[:3])
            if not name.exists():
                shutil.copytree(self.folder, name, ignore=shutil.ignore_patterns(".lock"))

    def on_train_batch_end(self, *args) -> None:
        self._keep()

    def on_validation_batch_start(self, *args) -> None:
        self._keep()

    def on_train_epoch_end(self, *args) -> None:
        self._keep()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that was not stopped, with a copy of each state that it could be resumed from."""
    folder = tmp_path_factory.mktemp("whole")
    kills.write_config(folder, **QUICK)
    config = yaml.safe_load((folder / "c.yaml").read_text())
    config["trainer"]["callbacks"].append(
        {"class_path": f"{__name__}.Copies", "init_args": {"folder": str(folder / "run")}}
    )
    config["last"]["every_n_train_steps"] = 1
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    assert kills.wait(kills.start(folder)) == 0, (folder / "err").read_text()[-2000:]
    return folder


def resumed(whole: Path, folder: Path, place: str, *args: str) -> Path:
    """A folder in which the run was resumed at a place."""
    shutil.copy(whole / "c.yaml", folder)
    shutil.copytree(whole / "copies" / place, folder / "run")
    assert kills.wait(kills.start(folder, "--ckpt_path", "last", *args)) == 0, (folder / "err").read_text()[-2000:]
    return folder


# Between steps, before the validation of an epoch (its last batches done), and between epochs.
@pytest.mark.cases(1)
@pytest.mark.parametrize("place", ["0-4-0", "0-5-1", "1-0-0", "1-2-0"])
def test_every_checkpoint_of_a_run_leads_to_its_end(whole, tmp_path, place):
    assert place in {p.name for p in (whole / "copies").iterdir()}
    assert kills.differing(kills.state(whole), kills.state(resumed(whole, tmp_path, place))) == []


@pytest.mark.long
def test_best_resumes_with_the_next_epoch(whole, tmp_path):
    shutil.copy(whole / "c.yaml", tmp_path)
    shutil.copytree(whole / "copies" / "1-0-0", tmp_path / "run")
    best = torch.load(tmp_path / "run/checkpoints/best.ckpt", weights_only=True)
    assert best["odenets"]["place"][:3] == (1, 0, False)
    assert kills.wait(kills.start(tmp_path, "--ckpt_path", "best")) == 0
    want, found = kills.state(whole), kills.state(tmp_path)
    want.pop("metrics"), found.pop("metrics")  # the row of the epoch's end came after the checkpoint
    assert kills.differing(want, found) == []


@pytest.mark.long
def test_killed_while_it_writes(whole, tmp_path):
    shutil.copy(whole / "c.yaml", tmp_path)
    for call in (4, 9):  # of those that write a file: in a sync, and before a rename
        last = ("--ckpt_path", "last") if (tmp_path / "run/checkpoints/last.ckpt").exists() else ()
        pid = kills.start(tmp_path, *last, before=kills.die_while_writing(call))
        assert kills.wait(pid) == -signal.SIGKILL
        for file in (tmp_path / "run/checkpoints").glob("*.ckpt"):
            open_checkpoint(file, resume=True)
    assert kills.wait(kills.start(tmp_path, "--ckpt_path", "last")) == 0
    assert kills.differing(kills.state(whole), kills.state(tmp_path)) == []
    left = {p.name for p in (tmp_path / "run/checkpoints").iterdir()}
    assert left == {"best.ckpt", "last.ckpt"}, "what was half written is gone"


class Signal(Callback):
    """Sends a signal to its own process after a step."""

    def __init__(self, step: int, signum: int) -> None:
        self.step, self.signum = step, signum

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.step and not hasattr(self, "sent"):
            self.sent = True
            os.kill(os.getpid(), self.signum)


@pytest.mark.cases(1)
@pytest.mark.parametrize(("step", "signum"), [(1, signal.SIGTERM), (3, signal.SIGINT)])
def test_a_signal_saves_and_names_the_line_that_resumes(whole, tmp_path, step, signum):
    config = yaml.safe_load((whole / "c.yaml").read_text())
    config["last"]["every_n_train_steps"] = None
    kept = config["trainer"]["callbacks"]
    sender = {"class_path": f"{__name__}.Signal", "init_args": {"step": step, "signum": int(signum)}}
    config["trainer"]["callbacks"] = [*kept, sender]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    lines = two_lines(tmp_path, kills.wait(kills.start(tmp_path)), 128 + signum)
    assert signum.name in lines[0] and f"step {step}" in lines[0] and lines[1].endswith("-c c.yaml --ckpt_path last")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**config, "trainer": {**config["trainer"], "callbacks": kept}}))
    words = ("--ckpt_path", "last", "--trainer.callbacks", yaml.safe_dump(kept, default_flow_style=True).strip())
    assert kills.wait(kills.start(tmp_path, *words)) == 0, (tmp_path / "err").read_text()[-2000:]
    want, found = kills.state(whole), kills.state(tmp_path)
    assert kills.differing(want, found) == []


def test_the_line_that_resumes_replaces_the_checkpoint():
    words = ["fit", "-c", "a b.yaml", "--ckpt_path", "x.ckpt", "--data.root", "d"]
    assert resuming_line(words, "odenets") == "odenets fit -c 'a b.yaml' --data.root d --ckpt_path last"
    assert resuming_line(["fit", "--ckpt_path=x"], "odenets") == "odenets fit --ckpt_path last"


def damaged(path: Path, kind: str) -> None:
    data = path.read_bytes()
    if kind == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("last\n")
    elif kind == "zeros":
        path.write_bytes(bytes(len(data)))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a", "b")
    elif kind == "weights":
        torch.save(torch.load(path, weights_only=True)["state_dict"], path)
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "no optimiser":
        held = torch.load(path, weights_only=True)
        torch.save({k: v for k, v in held.items() if k != "optimizer_states"}, path)
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "pickle":
        torch.save({"state_dict": {}, "global_step": 1, "x": Copies}, path)


@pytest.mark.cases(4)
@pytest.mark.parametrize(
    "kind", ["cut", "empty", "text", "zeros", "zip", "weights", "folder", "no optimiser", "list", "pickle"]
)
def test_a_checkpoint_that_is_not_whole_names_one_that_is(whole, tmp_path, kind):
    shutil.copytree(whole / "run/checkpoints", tmp_path / "checkpoints")
    damaged(tmp_path / "checkpoints/last.ckpt", kind)
    with pytest.raises(CheckpointError) as e:
        open_checkpoint(tmp_path / "checkpoints/last.ckpt", resume=True)
    first, second = str(e.value).splitlines()
    assert "last.ckpt" in first and "best.ckpt is whole, of step" in second
    damaged(tmp_path / "checkpoints/best.ckpt", kind)
    with pytest.raises(CheckpointError, match="Give another"):
        open_checkpoint(tmp_path / "checkpoints/last.ckpt", resume=True)


@pytest.mark.cases(3)
@pytest.mark.parametrize("name", files._PARTS)
def test_a_part_of_a_checkpoint_that_is_another_is_named(whole, tmp_path, name):
    """Whoever is given the file, and whoever looks at it to name one that is whole."""
    shutil.copytree(whole / "run/checkpoints", tmp_path / "checkpoints")
    path = tmp_path / "checkpoints/best.ckpt"
    held = torch.load(path, weights_only=True)
    *above, last = name.split(".")
    (held[above[0]] if above else held)[last] = "x"
    torch.save(held, path)
    for resume in (True, False):
        with pytest.raises(CheckpointError, match=rf"its {name} is x\n.*last.ckpt is whole, of step"):
            open_checkpoint(path, resume)
    path.with_name("last.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is empty\n.*Give another"):
        open_checkpoint(path.with_name("last.ckpt"), resume=True)


@pytest.mark.cases(1)
@pytest.mark.parametrize(("key", "said"), [("lr_schedulers", "0 schedules"), ("optimizer_states", "0 optimisers")])
def test_a_state_that_is_missing_is_no_new_one(whole, tmp_path, key, said):
    """Lightning would go on without a word: with no momentum, or with the rate of the first step."""
    held = torch.load(whole / "run/checkpoints/best.ckpt", weights_only=True)
    torch.save({**held, key: []}, tmp_path / "less.ckpt")
    shutil.copy(whole / "c.yaml", tmp_path)
    lines = two_lines(tmp_path, kills.wait(kills.start(tmp_path, "--ckpt_path", "less.ckpt")))
    assert f"holds the states of {said}, and this run has 1" in lines[0]


@pytest.mark.filterwarnings("ignore")  # of Lightning: workers, intervals
def test_the_state_of_another_optimiser_is_refused(tmp_path):
    """From AdamW to SGD nothing would fail: its momentum would be gone."""

    def fit(optimizer, path=None):
        run_ = trainer(tmp_path, max_steps=4 if path else 2, max_epochs=-1, callbacks=[Resume()], limit_val_batches=0)
        run_.fit(Classifier(Net(), optimizer, Constant()), Random(), ckpt_path=path)
        run_.save_checkpoint(tmp_path / "a.ckpt")

    fit(partial(torch.optim.AdamW, lr=0.1))
    with pytest.raises(SchemeError, match=r"an optimiser AdamW, and this run has SGD\n  Resume with AdamW; or"):
        fit(partial(torch.optim.SGD, lr=0.1, momentum=0.9), tmp_path / "a.ckpt")
    fit(partial(torch.optim.AdamW, lr=0.1, eps=1e-3), tmp_path / "a.ckpt")


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    write_whole(tmp_path / "a", b"first")
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space"):
                write_whole(tmp_path / "a", b"second")
        assert (tmp_path / "a").read_bytes() == b"first" and len(list(tmp_path.iterdir())) == 1
    mask = os.umask(0o022)
    write_whole(tmp_path / "a", b"second")
    os.umask(mask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_a_full_disk_is_two_lines_and_the_last_checkpoint_stays(whole, tmp_path):
    shutil.copy(whole / "c.yaml", tmp_path)
    shutil.copytree(whole / "copies" / "1-0-0", tmp_path / "run")
    before = (tmp_path / "run/checkpoints/last.ckpt").read_bytes()

    def full() -> None:
        real = os.fsync

        def fsync(number: int) -> None:
            if os.fstat(number).st_size > 10_000:  # a checkpoint
                raise OSError(28, "No space left on device")
            real(number)

        os.fsync = fsync

    lines = two_lines(tmp_path, kills.wait(kills.start(tmp_path, "--ckpt_path", "last", before=full)))
    assert "No space left" in lines[0] and "last.ckpt" in lines[0] and "resume" in lines[1]
    assert (tmp_path / "run/checkpoints/last.ckpt").read_bytes() == before


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "old"),
    [
        ("model.optimizer.lr", "0.002", "0.01"),
        ("trainer.max_epochs", "3", "2"),
        ("model.net.widths", "[4, 4]", "8"),
    ],
)
def test_what_changed_in_the_file_alone_is_refused_with_both_values(
    whole, tmp_path, monkeypatch, capsys, option, value, old
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole / "copies" / "1-0-0", tmp_path / "run")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    shutil.copy(whole / "c.yaml", tmp_path)
    name = option.replace("model.", "model.init_args.").replace("net.", "net.init_args.")
    name = name.replace("optimizer.", "optimizer.init_args.").replace("data.", "data.init_args.")
    config = yaml.safe_load((tmp_path / "c.yaml").read_text())
    at = config
    *above, last = name.split(".")
    for key in above:
        at = at[key]
    at[last] = yaml.safe_load(value)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as e:
        run(["fit", "-c", "c.yaml", "--ckpt_path", "last"])
    assert e.value.code == 2
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert option in first and old in first and value.strip("[]").split(", ")[-1] in first and f"--{option}" in second
    (tmp_path / "c.yaml").unlink()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before, "nothing was changed"


@pytest.mark.long
def test_what_the_command_line_gives_is_used_from_the_first_step_on(whole, tmp_path):
    options = ["--model.optimizer.lr", "0.002", "--trainer.max_epochs", "3"]
    folder = resumed(whole, tmp_path, "1-0-0", *options)
    held = torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)
    assert held["epoch"] == 3 and held["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.002
    config = yaml.safe_load((folder / "run/config.yaml").read_text())
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.002 and config["ckpt_path"] is None
    from odenets.training import WarmupCosine

    rates = [float(row["lr-AdamW/pg1"]) for row in kills.state(folder)["metrics"] if "lr-AdamW/pg1" in row]
    want = [0.002 * WarmupCosine(1).factor(i, 9, 3) for i in range(3, 9)]
    found = list(dict.fromkeys(rates[5:]))  # one row a batch, two batches a step
    assert found == pytest.approx(list(dict.fromkeys(want)))


@pytest.mark.long
@pytest.mark.parametrize("epochs", [4, 1])
def test_one_cycle_of_another_length(tmp_path, monkeypatch, capsys, epochs):
    monkeypatch.chdir(tmp_path)
    kills.write_config(tmp_path, **QUICK, callbacks=[])
    schedule = ["--model.schedule", "odenets.training.OneCycle"]
    run(["fit", "-c", "c.yaml", *schedule])
    again = ["fit", "-c", "c.yaml", *schedule, "--ckpt_path", "last", "--trainer.max_epochs", str(epochs)]
    command = run(again)
    assert command.trainer.global_step == (12 if epochs == 4 else 6)
    scheduler = command.trainer.lr_scheduler_configs[0].scheduler
    if epochs == 4:
        assert scheduler.total_steps == 3 * epochs + 1
        straight = run(["fit", "-c", "c.yaml", *schedule, "--trainer.max_epochs", "4", "--run_dir", "straight"])
        assert scheduler.get_last_lr() == straight.trainer.lr_scheduler_configs[0].scheduler.get_last_lr()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_another_batch_size_goes_on_with_the_next_epoch_and_says_so(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(whole / "c.yaml", tmp_path)
    shutil.copytree(whole / "copies" / "0-4-0", "run")
    with pytest.warns(UserWarning, match="batch size 16 there, 8 here.*goes on with epoch 1"):
        command = run(["fit", "-c", "c.yaml", "--ckpt_path", "last", "--data.batch_size", "8"])
    assert command.trainer.global_step == 2 + 3 and command.trainer.current_epoch == 2


def test_changes_are_of_what_determines_the_result():
    before = {"run_dir": "a", "trainer": {"devices": 1, "max_epochs": 3}, "data": {"init_args": {"n": [1]}}}
    now = {"run_dir": "b", "trainer": {"devices": 2, "max_epochs": 4}, "data": {"init_args": {"n": [1, 2]}}}
    assert changes(before, now) == {"trainer.max_epochs": (3, 4), "data.n.1": (None, 2)}
    assert changes(before, before) == {}


def of_class(**parts):
    return {"class_path": "a.Net", **parts}


@pytest.mark.parametrize(
    ("before", "now", "name"),
    [
        (None, {"kinetic": 1.0}, "model.x.kinetic"),
        ({}, {"kinetic": 1.0}, "model.x.kinetic"),
        ({"a": 1.0}, {"a": 1.0, "kinetic": 1.0}, "model.x.kinetic"),
        ({"a": 1.0}, {"kinetic": 1.0}, "model.x.kinetic"),
        ({"a": {"b": 1}}, {"a": {"c": 1}}, "model.x.a.c"),
        ([{"a": 1}], [{"b": 1}], "model.x.0.b"),
        ("text", {"a": 1}, "model.x.a"),
        (of_class(), of_class(dict_kwargs={"scheme": "euler"}), "model.x.dict_kwargs.scheme"),
        (of_class(dict_kwargs={}), of_class(dict_kwargs={"scheme": "euler"}), "model.x.dict_kwargs.scheme"),
        (of_class(dict_kwargs={"a": 1}), of_class(dict_kwargs={"b": {"c": 1}}), "model.x.dict_kwargs.b.c"),
        (None, of_class(), "model.x.class_path"),
        # Options of another release: of a class that had others, none, or did not exist.
        (of_class(init_args={"a": 1}), of_class(init_args={"a": 1, "b": 2}), None),
        (of_class(init_args={}), of_class(init_args={"b": 2}), None),
        (of_class(), of_class(init_args={"b": 2}), None),
        (of_class(init_args={"a": 1}), of_class(init_args={"a": 1, "b": {"c": 2}}), None),
    ],
)
def test_a_part_that_one_side_lacks_is_a_change_and_an_option_that_it_lacks_is_not(before, now, name):
    before, now = ({"model": {"init_args": {"x": value, "y": 1}}} for value in (before, now))
    for a, b in ((before, now), (now, before)):
        found = changes(a, b)
        assert bool(found) == (name is not None)
        if name is not None:
            assert name in {*changes(before, now), *changes(now, before)}
            with pytest.raises(SchemeError, match=r"model\.x.* now, and last was trained with"):
                check_resumed(a, b, ["fit"], "last")
            check_resumed(a, b, ["fit", "--model.x", "{}"], "last")


@pytest.mark.parametrize("word", ["--trainer.callbacks+=X", "--trainer.callbacks+", "--trainer.callbacks=[X]"])
def test_what_is_appended_on_the_command_line_was_said_there(word):
    now = {"trainer": {"callbacks": [{"class_path": "X", "init_args": {"n": 1}}]}}
    for before in (None, [], [{"class_path": "Y", "init_args": {}}]):
        check_resumed({"trainer": {"callbacks": before}}, now, ["fit", word], "last")


def test_refuses_a_step_of_no_checkpoint():
    from odenets.training.resume import LastCheckpoint

    with pytest.raises(SchemeError, match="every_n_train_steps=0"):
        LastCheckpoint(0)


class Counting(torch.optim.SGD):
    """Counts its steps in its groups, as optimisers do that find their own learning rate."""

    def __init__(self, params, lr, decay=0.0):
        super().__init__(params, lr=lr)
        self.defaults.update(count=0, decay=decay)
        for group in self.param_groups:
            group.update(count=0, decay=decay)

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] += 1
        return super().step(closure)


@pytest.mark.filterwarnings("ignore")  # of Lightning: workers, intervals
def test_what_an_optimiser_counts_in_its_groups_goes_on_and_what_is_configured_anew_is_used(tmp_path):
    def fit(epochs, decay, path=None):
        optimizer = partial(Counting, lr=0.1, decay=decay)
        fitted = trainer(tmp_path, max_epochs=epochs, callbacks=[Resume()], limit_val_batches=0)
        fitted.fit(Classifier(Net(), optimizer, Constant()), Random(), ckpt_path=path)
        fitted.save_checkpoint(tmp_path / "x.ckpt")
        return fitted.optimizers[0].param_groups, fitted.global_step

    groups, steps = fit(1, 0.5)
    assert [group["count"] for group in groups] == [steps] * len(groups)
    groups, steps = fit(2, 0.25, tmp_path / "x.ckpt")
    assert [(group["count"], group["decay"]) for group in groups] == [(steps, 0.25)] * len(groups)
