"""A study's file is whole or not there, waits for its readers, and averages only what was trained."""

import dataclasses
import os
import re
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
from odenets.study.store import NETWORKS, Result, Store, joined, read
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
