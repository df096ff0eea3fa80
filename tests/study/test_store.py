"""A study's file is whole or not there, waits for its readers, and averages only what was trained."""

import dataclasses
import os
import re
import shutil
import sqlite3
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odenets.study import store as module
from odenets.study.runs import RUNS, Outcome, Run
from odenets.study.space import SPACES, sample
from odenets.study.store import NETWORKS, Result, Store, conflicts, joined, read
from odenets.study.train import Study, train
from schemes import SchemeError

CANDIDATES = sample(SPACES["mini"], ("euler", "dense"), 1, size=32)
RUN = Run("scheme=rk4, seed 3", "scheme=rk4", 3, {"model.net.scheme": "rk4"})


@pytest.fixture
def hurried(monkeypatch, capsys):
    """Lets each look at the clock of the store be a second later; returns a wait for the notice."""
    ticks = iter(range(10**6))
    clock = SimpleNamespace(monotonic=lambda: float(next(ticks)), sleep=lambda s: time.sleep(0.001))
    monkeypatch.setattr(module, "time", clock)
    real, said = sqlite3.connect, threading.Event()
    monkeypatch.setattr(module.sqlite3, "connect", lambda *a, **k: real(*a, **{**k, "timeout": 0.001}))
    monkeypatch.setattr("builtins.print", lambda *a, **k: said.set())
    return said


@pytest.mark.parametrize("act", ["add", "forget_failed"])
def test_a_line_waits_for_a_reader_however_long_it_reads(tmp_path, hurried, act):
    path = tmp_path / "s.sqlite"
    with Store(path, {}) as store:
        store.add(CANDIDATES[0], Result("failed"))
        reader = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM networks").fetchone() == (1,)
        # The reader goes when, by the store's clock, the line has waited for longer than SQLite would.
        thread = threading.Thread(target=lambda: (hurried.wait(20), reader.execute("COMMIT"), reader.close()))
        thread.start()
        if act == "add":
            store.add(CANDIDATES[1], Result("trained"))
            assert store.done() == {0, 1}
        else:
            assert store.forget_failed() == 1 and store.done() == set()
        assert hurried.is_set(), "and the notice was given"
        thread.join()


def test_a_report_waits_for_a_writer(tmp_path, hurried):
    path = tmp_path / "s.sqlite"
    with Store(path, {"a": 1}):
        pass
    writer = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    thread = threading.Thread(target=lambda: (hurried.wait(20), writer.execute("COMMIT"), writer.close()))
    thread.start()
    assert read(path) == ({"a": 1}, [])
    thread.join()


def test_an_empty_file_is_refused_and_kept(tmp_path):
    path = tmp_path / "s.sqlite"
    path.write_bytes(b"")
    for attempt in (lambda: Store(path, {}).__enter__(), lambda: read(path)):
        with pytest.raises(SchemeError, match="it is empty") as error:
            attempt()
        assert len(str(error.value).splitlines()) == 2 and path.read_bytes() == b""
    path.unlink()
    with Store(path, {}):
        pass


def test_a_file_is_there_when_it_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "s.sqlite"

    def cut(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            Store(path, {"a": 1}).__enter__()
    assert not path.exists()
    with Store(path, {"a": 2}):
        assert os.path.getsize(path) > 0 and read(path) == ({"a": 2}, [])


def test_a_file_of_something_else_is_refused_and_kept(tmp_path):
    path = tmp_path / "s.sqlite"
    with Store(path, {}, RUNS) as store:
        store.add(RUN, Outcome("trained"))
    other = tmp_path / "o.sqlite"
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE places (name TEXT)")
    connection.close()
    for file in (path, other):
        before = file.read_bytes()
        for attempt in (lambda file=file: Store(file, {}).__enter__(), lambda file=file: read(file)):
            with pytest.raises(SchemeError, match="is no file of a study: it has no table 'networks'"):
                attempt()
        assert file.read_bytes() == before


def test_lines_come_back_as_they_were(tmp_path):
    outcome = Outcome("trained", 12, 36.0, 1.5e9, 2.5, 0.5, [{"epoch": 0, "val/acc": 0.25}], 'an "error"', "w:1")
    with Store(tmp_path / "s.sqlite", {"x": [1, None]}, RUNS) as store:
        store.add(RUN, outcome)
        with pytest.raises(sqlite3.IntegrityError):
            store.add(RUN, outcome)
        assert store.done() == {RUN.name} and store.failed() == 0
    settings, (line,) = read(tmp_path / "s.sqlite", RUNS)
    assert settings == {"x": [1, None]} and line == dataclasses.asdict(RUN) | dataclasses.asdict(outcome)
    assert NETWORKS.columns[:2] == ["number", "scheme"] and RUNS.structured == ["options", "epochs"]


NESTED = st.recursive(
    st.integers(0, 3), lambda x: st.lists(x, max_size=3, unique_by=str) | st.dictionaries(st.sampled_from("abc"), x)
)


@given(old=NESTED, new=NESTED)
def test_what_grows_keeps_what_it_has(old, new):
    found = joined(old, new)
    assert joined(found, new) == found and joined(new, new) == new
    if isinstance(old, list) and isinstance(new, list):
        assert found[: len(old)] == old and all(value in found for value in new)
    elif isinstance(old, dict) and isinstance(new, dict):
        assert list(found)[: len(old)] == list(old) and set(found) == {*old, *new}
    else:
        assert found == new


def test_settings_grow_where_they_may(tmp_path):
    path = tmp_path / "s.sqlite"
    for plan in ({"a": [0]}, {"a": [1, 0], "b": [5]}):
        with Store(path, {"x": 1, "plan": plan}, RUNS, growing=("plan",)) as store:
            if "b" not in plan:
                store.add(RUN, Outcome("trained"))
    assert read(path, RUNS)[0] == {"x": 1, "plan": {"a": [0, 1], "b": [5]}}
    with pytest.raises(SchemeError, match=r"x: 1 there, 2 now\);"):
        Store(path, {"x": 2, "plan": {"c": [1]}}, RUNS, growing=("plan",)).__enter__()
    assert read(path, RUNS)[0]["plan"] == {"a": [0, 1], "b": [5]}


@given(old=NESTED, new=NESTED)
def test_what_would_be_replaced_is_a_conflict(old, new):
    """What two have in common stays as it is exactly where there is none: lists grow, and nothing else changes."""

    def kept(before, after):
        if isinstance(before, dict) and isinstance(after, dict):
            return all(kept(before[k], after[k]) for k in before)
        if isinstance(before, list) and isinstance(after, list):
            return after[: len(before)] == before
        return before == after

    assert bool(conflicts(old, new)) != kept(old, joined(old, new))
    for place, a, b in conflicts(old, new):
        x, y = old, new
        for key in place.split(", ") if place else ():
            x, y = x[key], y[key]
        assert (x, y) == (a, b)


def test_what_grows_does_not_change(tmp_path):
    path, plan = tmp_path / "s.sqlite", {"a": {"seeds": [0], "config": {"lr": "1"}}}
    with Store(path, {"plan": plan}, RUNS, growing=("plan",)) as store:
        store.add(RUN, Outcome("trained"))
    other = {"a": {"seeds": [1], "config": {"lr": "1.0"}}}
    with pytest.raises(SchemeError, match=r"\(a, config, lr: 1 there, 1\.0 now"):
        Store(path, {"plan": other}, RUNS, growing=("plan",)).__enter__()
    assert read(path, RUNS)[0]["plan"] == plan


def begun(folder: Path) -> Path:
    with Store(folder / "s.sqlite", {}, RUNS) as store:
        store.add(RUN, Outcome("trained", epochs=[{"epoch": 0, "val/acc": 0.5}]))
    return folder / "s.sqlite"


def test_a_change_that_was_cut_off_is_taken_back(tmp_path):
    """A process that dies while it writes leaves a journal; a reader must not take the file for a foreign one."""
    path, copy = begun(tmp_path), tmp_path / "copy"
    before, connection = read(path, RUNS), sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA cache_size = 1")  # so that pages are written before the end of the transaction
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(f"UPDATE runs SET error = '{'x' * 100_000}'")
    for _ in range(20):
        connection.execute("INSERT INTO study VALUES (?)", ["y" * 10_000])
    copy.mkdir()
    for file in tmp_path.glob("s.sqlite*"):
        shutil.copy(file, copy / file.name)
    connection.execute("ROLLBACK")
    connection.close()
    assert (copy / "s.sqlite-journal").exists() and (copy / "s.sqlite").read_bytes() != path.read_bytes()
    assert read(copy / "s.sqlite", RUNS) == before
    assert not (copy / "s.sqlite-journal").exists()


def spoil(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(statement)
    connection.close()


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_file_that_cannot_be_written_to_is_said_to_be(tmp_path, monkeypatch, when):
    path, real = tmp_path / "s.sqlite", sqlite3.connect
    with Store(path, {"a": [1]}, growing=("a",)):
        pass
    frozen = lambda file, **k: real(f"{Path(file).absolute().as_uri()}?mode=ro", uri=True, **k)  # noqa: E731
    monkeypatch.setattr(module.sqlite3, "connect", frozen)
    settings = {"a": [1, 2]} if when == "before" else {"a": [1]}
    with (
        pytest.raises(SchemeError, match=r"cannot be written to: .*readonly.*\n  Make the file"),
        Store(path, settings, growing=("a",)) as store,
    ):
        assert when == "between"
        store.add(CANDIDATES[0], Result("trained"))


def test_files_that_are_damaged_or_of_another_version_are_said_to_be(tmp_path):
    for folder in "abcd":
        (tmp_path / folder).mkdir()
    path = begun(tmp_path / "a")
    spoil(path, "UPDATE runs SET epochs = '[{'")
    with pytest.raises(SchemeError, match="the line of 'scheme=rk4, seed 3' is not whole"):
        read(path, RUNS)
    path = begun(tmp_path / "b")
    spoil(path, "ALTER TABLE runs DROP COLUMN cpu_s")
    for act in (lambda: read(path, RUNS), Store(path, {}, RUNS).__enter__):
        with pytest.raises(SchemeError, match="of another version: its table 'runs' has no cpu_s"):
            act()
    path = begun(tmp_path / "c")
    spoil(path, "ALTER TABLE runs ADD COLUMN later TEXT")
    with Store(path, {}, RUNS) as store:
        store.add(dataclasses.replace(RUN, name="another"), Outcome("trained"))
    assert len(read(path, RUNS)[1]) == 2
    path = begun(tmp_path / "d")
    held = bytearray(path.read_bytes())
    held[2 * 4096 + 100 :] = bytes(len(held) - 2 * 4096 - 100)  # the first pages are whole: the schema can be read
    held[2 * 4096 : 2 * 4096 + 8] = b"\xff" * 8
    path.write_bytes(held)
    with pytest.raises(SchemeError, match="cannot be read or written"):
        read(path, RUNS)


def test_the_pages_average_leaves_out_what_diverged(pictures, tmp_path):
    study = Study(root=str(pictures), size=32, epochs=2, batch_size=16, per_kind=1, rank_pictures=0)
    candidates = study.candidates(4)
    diverged = train(dataclasses.replace(study, lr=1e30), candidates[0])
    assert diverged.status == "diverged" and diverged.accuracy is None and "no finite number" in diverged.error
    with Store(tmp_path / "s.sqlite", study.settings) as store:
        store.add(candidates[0], diverged)
        for n in (2, 4):
            store.add(candidates[n], Result("trained", accuracy=n / 10))
    page = (Path(__file__).parents[2] / "docs/pages/study.md").read_text("utf-8")
    (statement,) = re.findall(r'sqlite3 runs/pilot_mini\.sqlite "(.+?)"', page)
    connection = sqlite3.connect(tmp_path / "s.sqlite")
    assert connection.execute(statement).fetchall() == [("euler", pytest.approx(0.3))]
    assert connection.execute("SELECT avg(accuracy) FROM networks").fetchall() == [(pytest.approx(0.3),)]
    # A file of an earlier version has figures of such networks: the statement leaves them out by itself.
    with connection:
        connection.execute("UPDATE networks SET accuracy = 0.02 WHERE status = 'diverged'")
    assert connection.execute(statement).fetchall() == [("euler", pytest.approx(0.3))]
    connection.close()
