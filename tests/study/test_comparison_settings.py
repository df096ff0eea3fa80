"""One configuration for all runs of a cell: whatever would put others into one table is refused, with both values."""

import json
import math
from pathlib import Path

import pytest

from odenets.cli import main
from odenets.study.compare_command import planned
from odenets.study.comparison import folder_of
from odenets.study.comparison_report import Found, find, table_of, usual_target
from odenets.study.runs import RUNS, Outcome, train
from odenets.study.statistics import markdown
from odenets.study.store import read
from odenets.training.options import FREE, HARMLESS, changes
from schemes import SchemeError
from study.test_comparison import made_up, refused, write_experiment

SCHEME = ("--over", "model.net.scheme=euler")
OPTIMIZERS = ("--over", "model.optimizer=torch.optim.SGD,torch.optim.Adam")


@pytest.fixture
def place(tmp_path):
    """An experiment, and how its comparison is opened: as by a command that has not begun a run yet."""
    path = write_experiment(tmp_path, max_epochs=1)

    def opened(*words, begin=False, record=None):
        comparison, _ = planned([str(path), "--dir", str(tmp_path / "all"), *words])
        comparison.check()
        with comparison.open_store() as store:
            run = comparison.runs()[0]
            if begin:
                folder_of(comparison.folder, run).mkdir(parents=True)
            if record:
                store.add(run, Outcome(record))
        return comparison

    return opened


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    ("words", "then", "said"),
    [
        (SCHEME, ["--model.optimizer.lr", "0.2"], "model.optimizer.lr: 0.1 there, 0.2 now"),
        (SCHEME, ["--weights", "w.ckpt"], "weights: None there, 'w.ckpt' now"),
        (SCHEME, ["--trainer.limit_val_batches", "3"], "trainer.limit_val_batches: 4 there, 3 now"),
        (SCHEME, ["--trainer.max_time", "00:00:00:01"], "trainer.max_time: None there, '00:00:00:01' now"),
        (SCHEME, ["--trainer.devices", "2"], "trainer.devices: 'auto' there, '2' now"),
        # Six batches and six epochs' worth of them: a number and a share.
        ((*SCHEME, "--trainer.limit_train_batches", "1"), ["--trainer.limit_train_batches", "1.0"], "1 there, 1.0 now"),
        # Below an option that varies, where all cells have it, some, or it came with one of the values.
        ((*OPTIMIZERS, "--model.optimizer.lr", "0.1"), ["--model.optimizer.lr", "1e-5"], "lr: 0.1 there, 1e-05 now"),
        (OPTIMIZERS, ["--model.optimizer.weight_decay", "0.5"], "model.optimizer.weight_decay: 0"),
    ],
)
def test_another_option_is_refused_as_soon_as_a_run_has_begun(place, tmp_path, words, then, said):
    place(*words, begin=True)
    before = (tmp_path / "all/runs.sqlite").read_bytes()
    with pytest.raises(SchemeError) as refusal:
        place(*words, *then, "--seeds", "0..9")
    assert said in str(refusal.value) and len(str(refusal.value).splitlines()) == 2
    assert (tmp_path / "all/runs.sqlite").read_bytes() == before


@pytest.mark.cases(1)
@pytest.mark.parametrize("status", ["trained", "diverged", "failed"])
def test_so_it_is_when_one_has_ended(place, tmp_path, status):
    place(*SCHEME)
    other = place(*SCHEME, "--trainer.max_epochs", "7")
    assert other.settings == find(tmp_path / "all").settings, "nothing has begun: the new ones hold"
    place(*SCHEME, "--trainer.max_epochs", "7", record=status)
    with pytest.raises(SchemeError, match="max_epochs: 7 there, 1 now"):
        place(*SCHEME)


def test_what_no_figure_depends_on_may_change(place):
    words = ["--threads", "2", "--trainer.log_every_n_steps", "7", "--trainer.num_sanity_val_steps", "2"]
    place(*SCHEME, begin=True)
    place(*SCHEME, *words, "--trainer.enable_progress_bar", "false", "--checkpoint.filename", "x", "--seeds", "0..9")


def test_what_is_harmless_may_change_on_resume_too():
    options = ["threads", "run_dir", "checkpoint.monitor", "data.num_workers", "trainer.enable_progress_bar"]
    assert all(HARMLESS.fullmatch(name) and FREE.fullmatch(name) for name in options)
    begun = ["weights", "adapt.labels", "trainer.limit_val_batches", "trainer.max_time", "trainer.devices"]
    assert all(FREE.fullmatch(name) and not HARMLESS.fullmatch(name) for name in begun)
    assert changes({"trainer": {"limit_train_batches": 1}}, {"trainer": {"limit_train_batches": 1.0}})


def test_cells_of_one_meaning_are_refused_whenever_they_come(place):
    place("--over", "model.optimizer.lr=0.1,0.2")
    with pytest.raises(SchemeError, match=r"lr=0\.1 and lr=1e-1 mean the same"):
        place("--over", "model.optimizer.lr=1e-1")
    with pytest.raises(SchemeError, match=r"lr=0\.2 and lr=2e-1 mean the same"):
        place("--over", "model.optimizer.lr=2e-1,0.3")
    # One batch and all of them; and what no figure depends on, but the times do.
    place("--over", "model.optimizer.lr=0.3", "--seeds", "7")


@pytest.mark.parametrize("over", ["trainer.limit_train_batches=1,1.0", "threads=1,2"])
def test_cells_of_two_meanings_are_not(place, over):
    assert len(place("--over", over).cells()) == 2


def test_an_option_that_varies_is_the_last_word(place, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    comparison = place("--over", "threads=1,3", "--workers", "2")
    for run in comparison.runs():
        words = [word for word in comparison.words_of(run) if word.startswith("--threads")]
        assert words == [f"--threads={run.options['threads']}"]
    assert comparison.cores == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*SCHEME, "--model.init_args.net.init_args.scheme", "rk4"], "both by --over and by"),
        ([*SCHEME, "--over", "model.init_args.net.init_args.scheme=rk4"], "in two spellings"),
        ([*SCHEME, "--trainer.fast_dev_run", "true"], "under trainer.fast_dev_run nothing is logged"),
        (["--over", "trainer.fast_dev_run=0,2"], "fast_dev_run=2: under trainer.fast_dev_run nothing is logged"),
        ([*SCHEME, "--dir", ""], "--dir DIR is not given"),
        ([*SCHEME, "--seeds", "4294967296"], "4294967296 is too large"),
    ],
)
def test_what_is_said_twice_or_cannot_be_compared(tmp_path, capsys, words, said):
    path = write_experiment(tmp_path)
    assert said in " ".join(refused(capsys, str(path), "--dir", str(tmp_path / "all"), *words))
    assert not (tmp_path / "all").exists()


def test_a_run_goes_on_only_as_it_began(place):
    """Also where the file that would have refused is gone."""
    words = [*SCHEME, "--seeds", "0", "--trainer.limit_train_batches", "1"]
    comparison = place(*words)
    (run,) = comparison.runs()
    folder = str(folder_of(comparison.folder, run))
    assert train(run, folder, comparison.words_of(run)).status == "trained"
    Path(folder).parents[1].joinpath("runs.sqlite").unlink()
    other = place(*words, "--model.optimizer.lr", "0.2", "--trainer.max_epochs", "2", "--threads", "1")
    checkpoint = Path(folder, "checkpoints/last.ckpt").read_bytes()
    outcome = train(run, folder, other.words_of(run))
    assert outcome.status == "failed" and len(outcome.epochs) == 1
    assert "model.optimizer.lr was 0.1 when it began, and is 0.2 now" in outcome.error
    assert Path(folder, "checkpoints/last.ckpt").read_bytes() == checkpoint
    again = train(run, folder, comparison.words_of(run))
    assert again.status == "trained" and len(again.epochs) == 1


def test_only_what_would_be_trained_again_is_forgotten(place, tmp_path):
    place("--over", "model.net.scheme=midpoint,euler", "--seeds", "0", record="failed")
    comparison = place("--over", "model.net.scheme=euler", "--seeds", "0", record="failed")
    with comparison.open_store() as store:
        assert store.forget_failed([run.name for run in comparison.runs()]) == 1 and store.failed() == 1
    assert [line["cell"] for line in read(tmp_path / "all/runs.sqlite", RUNS)[1]] == ["scheme=midpoint"]


# --- the report -------------------------------------------------------------------------------------------------------


def test_a_metric_is_that_of_the_last_epoch_that_was_judged():
    found = made_up({"a": {0: 0.5, 1: 0.6}})
    for line in found.lines:
        del line["epochs"][-1]["val/acc"]
    assert "| a | 2 | 41.25 ± 5.30 |" in table_of(found)


def test_an_accuracy_of_zero_is_no_target():
    found = made_up({"a": {0: 0.04, 1: 0.6}, "b": {0: 0.5}})
    assert usual_target(found, "val/acc") is None and "epochs to" not in table_of(found)


def test_any_text_stands_in_one_column():
    table = markdown("a | b", [["x|y", "1"], ["two\nlines", "2"]])
    assert table.splitlines()[2:] == ["| x\\|y | 1 |", "| two lines | 2 |"]
    lines = table_of(made_up({"k=a | b": {0: 0.5, 1: 0.6}, "k=c": {0: 0.5, 1: 0.55}})).splitlines()
    assert len({len(line.replace("\\|", "").split("|")) for line in lines}) == 1


@pytest.mark.parametrize("name", ["README.md", "README.md/below", "runs.sqlite"])
def test_places_that_cannot_be_written_to(tmp_path, capsys, name):
    path = write_experiment(tmp_path)
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "runs.sqlite/runs.sqlite").mkdir(parents=True)
    lines = refused(capsys, str(path), *SCHEME, "--dir", str(tmp_path / name))
    assert "cannot be written to" in lines[0] or "it is a folder" in lines[0]
    (tmp_path / "runs.json").write_text(json.dumps(made_up({"a": {0: 0.5}})._asdict() | {"runs": []}))
    if name != "runs.sqlite":
        lines = refused(capsys, "report", str(tmp_path / "runs.json"), "--out", str(tmp_path / name))
        assert "cannot be written to" in lines[0] and (tmp_path / "README.md").read_text() == "x"


@pytest.mark.parametrize(
    "change",
    [
        lambda held: held["settings"].clear(),
        lambda held: held["settings"]["plan"].clear(),
        lambda held: held["runs"][0].pop("epochs"),
        lambda held: held["runs"][0].update(cell="z"),
        lambda held: held["runs"].append(7),
        lambda held: held.update(settings=[]),
    ],
)
def test_a_report_of_what_is_not_whole(tmp_path, capsys, change):
    found = made_up({"a": {0: 0.5, 1: 0.6}})
    held = {"settings": found.settings, "runs": found.lines}
    path = tmp_path / "runs.json"
    path.write_text(json.dumps(held))
    assert isinstance(find(path), Found)
    change(held)
    path.write_text(json.dumps(held))
    assert "neither the folder of a comparison" in refused(capsys, "report", str(path))[0]


def test_targets_and_help(tmp_path, capsys):
    assert "no finite number" in refused(capsys, "report", str(tmp_path), "--target", str(math.nan))[0]
    for words in (["report", "--help"], ["quickstart", *SCHEME, "--help"]):
        main(["compare", *words])
        assert capsys.readouterr().out.startswith("usage: odenets compare FILE.yaml")
