"""A comparison that is killed goes on; its runs are those that one would train by hand; what went wrong is shown."""

import copy
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sqlite3
import struct
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from scipy import stats
from torch import nn
from training.runs import ROOT, kills
from training.test_classifier import Random, trainer

from odenets.cli import main
from odenets.config_files import flat
from odenets.study import engine, workers
from odenets.study.compare_command import planned
from odenets.study.comparison import carry_out
from odenets.study.comparison_report import Found, _curve, export, find, hours, rows_of, table_of, usual_target
from odenets.study.runs import RUNS, Cost, epochs_of
from odenets.study.statistics import paired
from odenets.study.store import read
from odenets.study.train import Study
from odenets.training import Classifier
from odenets.training.command import resolve
from odenets.training.command import run as fit
from schemes import SchemeError
from study import deeds

EPOCHS = 8  # of a comparison that is killed in its first, and notices before it ends
OVER = ["--over", "model.net.scheme=euler,midpoint", "--seeds", "0..1"]


def write_experiment(folder: Path, **trainer) -> Path:
    """A small net on some of the digits."""
    net = {"functions": [2, 2], "widths": [4, 8], "placement": "preact", "stem": "conv3", "drop_rate": 0.1}
    config = {
        "threads": 1,
        "model": {
            "class_path": "odenets.training.Classifier",
            "init_args": {
                "net": {"class_path": "odenets.models.HOResNet", "init_args": {"scheme": "euler", **net}},
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
            },
        },
        "data": {"class_path": "odenets.training.Digits", "init_args": {"batch_size": 16}},
        "trainer": {
            **{"max_epochs": 3, "accelerator": "cpu", "limit_train_batches": 6, "limit_val_batches": 4},
            **{"enable_model_summary": False, "num_sanity_val_steps": 0, "logger": False, **trainer},
        },
    }
    del config["trainer"]["logger"]
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    return folder / "c.yaml"


def compare(experiment: Path, *words: str) -> None:
    main(["compare", str(experiment), "--dir", str(experiment.parent / "all"), *words])


def start(experiment: Path, *words: str) -> int:
    """The same in a process of its own, with a group of its own; returns its id.

    A new one and no fork of this: a fork would take the forkserver of an earlier test for its own, and end.
    """
    command = [sys.executable, "-m", "odenets", "compare", str(experiment), "--dir", str(experiment.parent / "all")]
    out = (os.POSIX_SPAWN_OPEN, 1, experiment.parent / "out", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    files = [out, (os.POSIX_SPAWN_DUP2, 1, 2)]
    return os.posix_spawn(sys.executable, [*command, *words], os.environ, file_actions=files, setsid=True)


def wait_for(what, seconds=300.0):
    """Until something is true."""
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.01)
    return found


def unlocked(folder: Path) -> bool:
    return not list(folder.rglob(".lock"))


@pytest.fixture(params=["fork", pytest.param("forkserver", marks=pytest.mark.long)])
def processes(request):
    """How workers begin: for quick tests as copies of this process, which has imported what they need."""
    before, workers.START = workers.START, request.param
    assert before == "forkserver"
    yield request.param
    workers.START = before


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    return write_experiment(tmp_path_factory.mktemp("comparison"), max_epochs=EPOCHS)


@pytest.fixture(scope="module")
def killed(experiment) -> Path:
    """The folder of a comparison that was killed while its first runs were under way."""
    folder = experiment.parent / "all"
    pid = start(experiment, *OVER, "--workers", "2")
    try:
        wait_for(lambda: list(folder.glob("*/seed-*/checkpoints/last.ckpt")))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    wait_for(lambda: unlocked(folder))  # the runs notice, save what they have, and end
    return Path(shutil.copytree(folder, experiment.parent / "half"))


@pytest.fixture(scope="module")
def finished(experiment, killed) -> Path:
    """The folder of that comparison after the same command was given again."""
    assert os.waitstatus_to_exitcode(os.waitpid(start(experiment, *OVER, "--workers", "2"), 0)[1]) == 0, (
        experiment.parent / "out"
    ).read_text()
    return experiment.parent / "all"


@pytest.mark.long
def test_a_killed_comparison_goes_on_to_what_was_not_killed(experiment, killed, finished, tmp_path):
    _, before = read(killed / "runs.sqlite", RUNS)
    _, lines = read(finished / "runs.sqlite", RUNS)
    assert len(before) < 4 and len(lines) == 4 and {line["status"] for line in lines} == {"trained"}
    assert [line for line in lines if line in before] == before, "what was recorded stays"
    assert "unfinished" in {line["status"] for line in find(killed).lines}
    assert list(finished.glob("*/seed-*/metrics-1.csv")), "a run went on, and did not begin again"
    for line in lines:
        assert [epoch["epoch"] for epoch in line["epochs"]] == list(range(EPOCHS))
        assert [epoch["cost/samples"] for epoch in line["epochs"]] == [6 * 16 * (n + 1) for n in range(EPOCHS)]
        assert line["evaluations"] == 4 and line["parameters"] == lines[0]["parameters"] > 0
        assert 0 < line["cpu_s"] and 0 < line["wall_s"]
    # One of those that the kill interrupted, trained by hand without a stop.
    words = ["fit", "-c", str(experiment), "--model.net.scheme=midpoint", "--seed_everything=0"]
    fit([*words, "--run_dir", str(tmp_path)])
    folder = finished / "scheme=midpoint" / "seed-0"
    one, other = (torch.load(f / "checkpoints/last.ckpt", weights_only=True) for f in (tmp_path, folder))
    assert kills.differing(one["state_dict"], other["state_dict"]) == []
    (line,) = (line for line in lines if line["name"] == "scheme=midpoint, seed 0")
    for own, theirs in zip(epochs_of(tmp_path), line["epochs"], strict=True):
        times = ("train/images_per_s",)
        assert own == {k: v for k, v in theirs.items() if not k.startswith("cost/") and k not in times} | {
            k: own[k] for k in times if k in own
        }


def test_counts_are_exact_and_figures_have_seven_digits(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,cost/samples,val/loss,lr-SGD\n0,115305031.0,0.12345678912,0.1\n")
    assert epochs_of(tmp_path) == [{"epoch": 0, "cost/samples": 115305031.0, "val/loss": 0.1234568}]


class Known(Cost):
    """Takes the times of a process from its rank."""

    def on_train_start(self, trainer, pl_module):
        self.rank = trainer.global_rank

    def _count(self):
        self.wall, self.cpu = 5.0, 2.0 + 3 * self.rank


@pytest.mark.filterwarnings("ignore")  # of Lightning: workers, intervals, forks of a process with threads
@pytest.mark.parametrize(("devices", "cpu"), [(1, 2.0), (2, 7.0)])
def test_processor_time_is_that_of_all_processes(tmp_path, devices, cpu):
    """The clock runs once for all of them."""
    module = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), partial(torch.optim.SGD, lr=0.1))
    options = {"devices": devices, "strategy": "ddp_fork"} if devices > 1 else {}
    run = trainer(tmp_path, callbacks=[Known()], max_epochs=1, **options)
    run.fit(module, Random(n=16))
    assert (float(run.callback_metrics["cost/cpu_s"]), float(run.callback_metrics["cost/wall_s"])) == (cpu, 5.0)


@pytest.mark.long
def test_two_workers_work_at_the_same_time(finished):
    lines = {line["name"]: line for line in read(finished / "runs.sqlite", RUNS)[1]}
    assert len({line["worker"] for line in lines.values()}) == 4, "a process for each run"
    log = [(finished / f"scheme={s}" / "seed-0.log").read_text() for s in ("euler", "midpoint")]
    assert all(f"epoch 1/{EPOCHS}" in text for text in log)


@pytest.mark.long
def test_a_half_finished_folder_is_reported(killed, capsys):
    main(["compare", "report", str(killed)])
    out = capsys.readouterr().out
    found = find(killed)
    statuses = [line["status"] for line in found.lines]
    unfinished = [len(line["epochs"]) for line in found.lines if line["status"] == "unfinished"]
    assert unfinished and len(statuses) == 4
    assert min(unfinished) < EPOCHS, "a run whose command is killed does not go on alone"
    done = statuses.count("trained")
    assert f"2 cells, {done} of 4 runs have ended" in out and "unfinished" in out
    for name in ("table.md", "runs.json", "curves.png", "evaluations.png"):
        assert (killed / "report" / name).stat().st_size > 0
    shutil.rmtree(killed / "report")


@pytest.mark.long
def test_the_exported_file_says_what_the_folder_says(finished, tmp_path, capsys):
    main(["compare", "report", str(finished), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert (tmp_path / "epochs.png").read_bytes().startswith(b"\x89PNG")
    again = find(tmp_path / "runs.json")
    assert again == find(finished) and table_of(again) == table_of(find(finished))
    assert (tmp_path / "table.md").read_text() in printed
    main(["compare", "report", str(tmp_path / "runs.json")])
    assert capsys.readouterr().out.strip() == (tmp_path / "table.md").read_text().strip()
    text = (tmp_path / "runs.json").read_text()
    assert str(finished) not in text and os.uname().nodename not in text, "no path and no name of this machine"


@pytest.mark.long
def test_nothing_is_trained_twice_and_seeds_and_values_can_be_added(experiment, finished, tmp_path, capsys):
    folder = shutil.copytree(finished, experiment.parent / "more")
    shutil.copytree(folder / "scheme=midpoint" / "seed-1", tmp_path / "kept")
    with sqlite3.connect(folder / "runs.sqlite") as connection:  # ended, and killed before it was recorded, say
        connection.execute("UPDATE runs SET status = 'failed', epochs = '[]' WHERE name = 'scheme=midpoint, seed 1'")
    connection.close()
    words = ["--over", "model.net.scheme=midpoint,heun2", "--seeds", "1", "--workers", "0", "--retry"]
    main(["compare", str(experiment), "--dir", str(folder), *words])
    out = capsys.readouterr().out
    assert "trained again: 1 failed run\n" in out and "2 runs to do" in out
    assert "2/2 scheme=heun2, seed 1 trained: val/acc" in out
    found = find(folder)
    assert found.cells == ["scheme=euler", "scheme=midpoint", "scheme=heun2"] and len(found.lines) == 5
    assert {line["status"] for line in found.lines} == {"trained"}
    assert [line for line in found.lines if line in find(finished).lines] == [*found.lines[:4]], "to the second"
    one, other = (
        (f / "checkpoints/last.ckpt").read_bytes() for f in (tmp_path / "kept", folder / "scheme=midpoint/seed-1")
    )
    assert one == other


def refused(capsys, *words: str) -> list[str]:
    with pytest.raises(SystemExit) as stop:
        main(["compare", *words])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 2 and lines[0].startswith("error: "), lines
    return lines


def test_other_settings_are_refused_and_named(tmp_path, capsys):
    path, folder = write_experiment(tmp_path, max_epochs=1), tmp_path / "all"
    words = ["--over", "model.net.scheme=euler", "--seeds", "0"]
    compare(path, *words, "--workers", "0")
    capsys.readouterr()
    lines = refused(capsys, str(path), "--dir", str(folder), *words, "--trainer.max_epochs", "9")
    assert "trainer.max_epochs: 1 there, 9 now" in lines[0]
    assert len(read(folder / "runs.sqlite", RUNS)[1]) == 1
    # Where the pictures are and how many threads work is no other comparison.
    comparison, _ = planned([str(path), "--dir", str(folder), *words, "--threads", "2"])
    assert comparison.settings == find(folder).settings


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--over", "model.net.scheme=euler,verner8"],
            "scheme=verner8: level 1 has 2 residual functions",
        ),
        (["--over", "model.net.scheme=euler,rk5"], "scheme=rk5"),
        (["--over", "model.net.schem=euler,rk4"], "model.net.schem: there is no such option"),
        (["--over", "model.net.scheme=rk(4"], "is missing at the end"),
        (["--over", "seed_everything=1,2"], "seed_everything is not for you to set"),
        (["--over", "model.net.scheme=euler", "--run_dir", "x"], "run_dir is not for you to set"),
        (["--over", "model.net.scheme=euler", "--model.net.scheme", "rk4"], "both by --over and by"),
        (["--over", "model.net.functions=[2,2],[2, 2]"], "mean the same"),
        (["--over", "model.net.scheme=euler", "--trainer.max_epochs", "-7"], "trainer.max_epochs is -7"),
        (["--over", "model.net.scheme=euler", "--workers", "many"], "many"),
        (["--over", "model.net.scheme=euler", "--seeds", "3..1"], "is no seed and no range"),
        (["--over", "model.net.scheme=euler", "--gpus", "0.5"], "Give --address auto too"),
        ([], "--over KEY=V1,V2 is not given"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is(tmp_path, capsys, words, said):
    path = write_experiment(tmp_path)
    lines = refused(capsys, str(path), "--dir", str(tmp_path / "all"), *words)
    assert said in " ".join(lines)
    assert not (tmp_path / "all").exists()


def test_no_experiment_and_no_folder(tmp_path, capsys):
    assert "there is no experiment 'none.yaml'" in refused(capsys, "none.yaml", "--over", "a=b")[0]
    assert "holds no comparison" in refused(capsys, "report", str(tmp_path))[0]
    (tmp_path / "runs.json").write_text("{}")
    assert "neither the folder" in refused(capsys, "report", str(tmp_path / "runs.json"))[0]


def commands() -> list[str]:
    """Comparisons of experiments on the pages, each in one line."""
    texts = [path.read_text("utf-8").replace("\\\n", " ") for path in (ROOT / "docs/pages").glob("*.md")]
    return sorted({line for text in texts for line in re.findall(r"^odenets compare experiments/.*$", text, re.M)})


@pytest.mark.cases(1)
@pytest.mark.parametrize("command", commands())
def test_commands_on_the_pages_name_files_and_options_that_exist(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    comparison, _ = planned(shlex.split(command)[2:])
    *_, last = comparison.cells().values()
    config, settings = resolve(comparison.words(last)), comparison.settings
    for option, value in last.items():
        assert str(flat(config)[long_name(option)]) == value and option not in settings


def long_name(option: str) -> str:
    return option.replace("model.net.", "model.init_args.net.init_args.")


class Breaks(Callback):
    """Raises in the second epoch of a run with the seed 1."""

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1 and os.environ["PL_GLOBAL_SEED"] == "1":
            raise RuntimeError("out of memory, say\nand where")


def test_runs_that_crash_or_diverge_are_shown_and_left_out_of_the_means(tmp_path, capsys):
    path = write_experiment(tmp_path, max_epochs=2, callbacks=[{"class_path": f"{__name__}.Breaks"}])
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    compare(path, "--over", "model.optimizer.lr=0.1,1e30", "--seeds", "0..1", "--workers", "0")
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers, "as they were"
    out = capsys.readouterr().out
    assert "lr=0.1, seed 1 failed: RuntimeError: out of memory, say" in out and "2 runs failed" not in out
    found = find(tmp_path / "all")
    status = {line["name"]: (line["status"], len(line["epochs"])) for line in found.lines}
    assert status["lr=0.1, seed 0"] == ("trained", 2) and status["lr=0.1, seed 1"] == ("failed", 1)
    assert {status[f"lr=1e30, seed {seed}"][0] for seed in (0, 1)} == {"diverged"}
    table = table_of(found)
    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines() if line.startswith("| lr")]
    assert [row[2] for row in rows] == ["1, 1 failed", "0, 2 diverged"] and rows[1][3] == "–"
    assert "- lr=0.1, seed 1: failed after 1 epochs; RuntimeError: out of memory, say" in table
    assert table.count("diverged after 0 epochs; the loss is") == 2


# --- figures ----------------------------------------------------------------------------------------------------------


FIGURES = st.dictionaries(st.integers(0, 9), st.floats(-1, 1), min_size=2, max_size=8)


@given(a=FIGURES, b=FIGURES, confidence=st.floats(0.5, 0.99), comparisons=st.integers(1, 6))
def test_pairs_are_student_of_the_differences(a, b, confidence, comparisons):
    found = paired(a, b, confidence, comparisons)
    both = sorted(set(a) & set(b))
    if not both:
        assert found is None
        return
    differences = [b[s] - a[s] for s in both]
    assert found.pairs == len(both) and found.mean == pytest.approx(sum(differences) / len(both), abs=1e-12)
    if len(both) == 1:
        assert found.interval is None and found.visible is None
        return
    if max(differences) - min(differences) < 1e-3:
        return
    for ours, level in ((found.interval, confidence), (found.together, 1 - (1 - confidence) / comparisons)):
        theirs = stats.ttest_rel([b[s] for s in both], [a[s] for s in both]).confidence_interval(level)
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-9, abs=1e-9)
    assert found.spread == pytest.approx(stats.tstd(differences))


@pytest.mark.parametrize("n", [2, 3, 6, 20])
@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_the_visible_difference_is_seen_eight_times_of_ten(n, confidence):
    """In draws, and by the noncentral t distribution, which scipy has for more than one degree of freedom."""
    figures = torch.arange(n, dtype=torch.float64) ** 2 / 10
    one = paired(dict.fromkeys(range(n), 0.0), dict(enumerate(figures.tolist())), confidence)
    shift, bound = one.visible / (one.spread / n**0.5), stats.t.ppf((1 + confidence) / 2, n - 1)
    if n > 2:
        seen = stats.nct.sf(bound, n - 1, shift) + stats.nct.cdf(-bound, n - 1, shift)
        assert seen == pytest.approx(0.8, abs=1e-6)
    draws = torch.randn(20_000, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + shift / n**0.5
    t = draws.mean(1) / (draws.std(1) / n**0.5)
    assert (t.abs() > bound).double().mean().item() == pytest.approx(0.8, abs=0.01)


def made_up(figures, status=None, epochs=4):
    """A comparison that never ran: cell -> seed -> the last accuracy, which rises to it in equal steps."""
    plan = {cell: {"options": {"k": cell}, "seeds": list(seeds)} for cell, seeds in figures.items()}
    lines = []
    for cell, seeds in figures.items():
        for seed, last in seeds.items():
            rows = [
                {"epoch": n, "val/acc": last * (n + 1) / epochs, "val/loss": 1 - last * (n + 1) / epochs}
                | {"evaluations": 12.0, "cost/samples": 100.0 * (n + 1)}
                for n in range(epochs)
            ]
            line = {"name": f"{cell}, seed {seed}", "cell": cell, "seed": seed, "options": {"k": cell}, "error": "e"}
            line |= {"parameters": 7, "evaluations": 12.0, "cpu_s": 60.0, "wall_s": 90.0, "samples": 400.0}
            lines.append({**line, "status": (status or {}).get((cell, seed), "trained"), "epochs": rows})
    return Found({"experiment": "x.yaml", "over": ["k"], "plan": plan}, lines)


def test_the_table_pairs_by_seed():
    base = {0: 0.50, 1: 0.60, 2: 0.70}
    found = made_up({"a": base, "b": {s: v + 0.01 + 0.001 * s for s, v in base.items()}, "c": {2: 0.9, 5: 0.1}})
    rows = rows_of(found, target=0.35)
    assert rows[0].pairs is None and rows[1].pairs.pairs == 3 and rows[2].pairs.pairs == 1
    assert rows[1].pairs.mean == pytest.approx(0.011) and rows[1].pairs.interval.low > 0.008
    assert rows[2].pairs.mean == pytest.approx(0.2) and rows[2].pairs.interval is None
    assert rows[0].reached == {0: 3, 1: 3, 2: 2} and rows[2].reached == {2: 2, 5: None}
    again = rows_of(found, baseline="b", target=0.35)
    assert again[0].pairs.mean == pytest.approx(-0.011) and again[1].pairs is None
    assert hours(found) == pytest.approx((8 / 60, 8 * 1.5 / 60))
    with pytest.raises(SchemeError, match="no cell 'z'"):
        rows_of(found, baseline="z")


def test_what_did_not_end_well_has_no_part_in_means():
    base = {0: 0.50, 1: 0.60, 2: 0.70}
    bad = made_up({"a": base, "b": base}, {("b", 1): "diverged", ("a", 2): "failed"})
    a, b = rows_of(bad)
    assert a.figures == {0: 0.50, 1: 0.60} and b.figures == {0: 0.50, 2: 0.70} and b.pairs.pairs == 1
    table = table_of(bad)
    assert "| a | 2, 1 failed |" in table and "| b | 2, 1 diverged |" in table
    assert "- b, seed 1: diverged after 4 epochs; e" in table


@pytest.mark.parametrize("calls", [[6, 6, 6, 6], [3, 6, 12, 6], [2.5, None, 4.25, 8]])
@pytest.mark.parametrize("judged", [1, 2])
def test_what_a_run_has_cost_is_the_sum_over_its_epochs(calls, judged):
    """A net may be refined, or choose its steps: an epoch costs what its own evaluations say."""
    (line,) = made_up({"a": {0: 0.5}}).lines
    total, wanted, waiting = 0.0, [], 0
    for n, (epoch, count) in enumerate(zip(line["epochs"], calls, strict=True), 1):
        waiting += 100
        if count is None:
            del epoch["evaluations"]
        else:
            epoch["evaluations"] = count
            total, waiting = total + count * waiting / 1e6, 0
        if n % judged:
            del epoch["val/acc"]
        else:
            wanted.append(None if count is None else pytest.approx(total))
    assert [cost for _, cost, _ in _curve(line, "val/acc")] == wanted


def test_the_usual_target_is_one_that_every_run_of_the_baseline_reaches():
    found = made_up({"a": {0: 0.57, 1: 0.61}, "b": {0: 0.9, 1: 0.1}})
    assert usual_target(found, "val/acc") == 0.55 and usual_target(found, "val/loss") == 0.45
    assert usual_target(found, "none") is None
    assert all(n is not None for n in rows_of(found, target=0.55)[0].reached.values())
    assert all(n is not None for n in rows_of(found, "val/loss", target=0.45)[0].reached.values())
    assert rows_of(found, target=0.55)[1].reached == {0: 3, 1: None}
    assert "never (1 of 2)" in table_of(found)


def test_an_export_differs_where_runs_differ(tmp_path):
    found = made_up({"a": {0: 0.5, 1: 0.6}, "b": {0: 0.5}})
    export(found, tmp_path / "1.json")
    other = copy.deepcopy(found)
    other.lines[1]["error"] = "x"
    export(other, tmp_path / "2.json")
    one, two = ((tmp_path / f"{n}.json").read_text().splitlines() for n in (1, 2))
    assert sum(a != b for a, b in zip(one, two, strict=True)) == 1
    assert json.loads("\n".join(one))["runs"] == found.lines


# --- workers ----------------------------------------------------------------------------------------------------------


def by(work, tasks, **options):
    options.setdefault("preload", ["odenets.study.comparison"])
    return workers.by_processes(tasks, work, lambda error: f"failed: {error}", workers=2, **options)


@pytest.mark.parametrize("sent", [b"", b"\0", struct.pack("!i", 1000), struct.pack("!i", 1000) + b"x" * 10])
def test_a_process_that_dies_in_the_middle_of_a_word_has_said_nothing(sent):
    ours, theirs = multiprocessing.Pipe(duplex=False)
    os.write(theirs.fileno(), sent)
    theirs.close()
    assert workers._received(ours) is None


@pytest.mark.parametrize("address", [None, "auto"])
def test_workers_are_0_or_more(address):
    """Below 0 no task would ever be given to one."""
    for run in (lambda **who: carry_out(None, None, **who), lambda **who: engine.run(Study(), None, **who)):
        with pytest.raises(SchemeError, match="--workers -1: want 0 or more") as e:
            next(run(workers=-1, address=address))
        assert len(str(e.value).splitlines()) == 2


def test_tasks_are_done_once_each(processes):
    assert sorted(by(deeds.square, [1, 2, 3])) == [(1, 1), (2, 4), (3, 9)]
    places = [found for _, found in by(deeds.place, [1, 2, 3, 4], prepare=deeds.take_place)]
    assert set(places) == {"0", "1"}


def test_a_task_whose_process_dies_is_begun_again_three_times(processes, tmp_path):
    found = dict(by(deeds.die, [(str(tmp_path / "a"), 1), (str(tmp_path / "b"), 9)]))
    assert found[str(tmp_path / "a"), 1] == 2
    assert found[str(tmp_path / "b"), 9] == f"failed: its process ended with status {-signal.SIGKILL}"
    assert (tmp_path / "b").read_text() == "xxxx"


@pytest.mark.long
def test_ray_trains_the_runs(tmp_path, capsys):
    pytest.importorskip("ray", reason='needs Ray: pip install "odenets[study]"')
    path = write_experiment(tmp_path, max_epochs=1)
    compare(path, "--over", "model.net.scheme=euler,midpoint", "--seeds", "0", "--workers", "2", "--address", "local")
    assert "2/2" in capsys.readouterr().out
    found = find(tmp_path / "all")
    assert [line["status"] for line in found.lines] == ["trained"] * 2


def test_what_work_raises_is_the_tasks_outcome(processes):
    assert list(by(deeds.complain, ["luck"])) == [("luck", "failed: ValueError: no luck")]


def test_who_stops_asking_leaves_no_process_behind(processes, tmp_path):
    tasks = by(deeds.sleep_or_square, [str(tmp_path / "pid"), 3])
    assert next(tasks) == (3, 9)
    pid = int(wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
    tasks.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
