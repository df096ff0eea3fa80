"""A study that is stopped goes on; a killed worker's network is trained again; none is recorded twice."""

import dataclasses
import os
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from odenets.study.engine import run
from odenets.study.store import Result, Store, read
from odenets.study.train import Study, train
from schemes import SchemeError


@pytest.fixture
def study(pictures):
    return Study(root=str(pictures), size=32, epochs=1, batch_size=16, per_kind=2, rank_pictures=0)


def quick(study, candidate):
    """A training that takes no time."""
    return Result("trained", accuracy=candidate.number / 100, loss=float(study.seed))


def finish(study, path, **options):
    with Store(path, study.settings) as store:
        return [p.candidate.number for p in run(study, store, workers=0, **options)]


def test_an_interrupted_study_goes_on_where_it_stopped(study, tmp_path):
    path = tmp_path / "s.sqlite"

    def interrupted(study, candidate):
        if candidate.number == 5:
            raise KeyboardInterrupt
        return quick(study, candidate)

    with pytest.raises(KeyboardInterrupt):
        finish(study, path, trainer=interrupted)
    assert [line["number"] for line in read(path)[1]] == [0, 1, 2, 3, 4]
    assert finish(study, path, trainer=quick) == [5, 6, 7, 8, 9, 10, 11]
    assert finish(study, path, trainer=quick) == []
    assert [line["accuracy"] for line in read(path)[1]] == [n / 100 for n in range(12)]


def test_a_study_can_be_extended(study, tmp_path):
    path = tmp_path / "s.sqlite"
    finish(study, path, trainer=quick)
    before = read(path)[1]
    assert finish(dataclasses.replace(study, per_kind=3), path, trainer=quick) == [12, 13, 14, 15, 16, 17]
    assert read(path)[1][:12] == before


@pytest.mark.long
def test_lines_hold_the_network_and_the_result(study, tmp_path):
    path = tmp_path / "s.sqlite"
    own = dataclasses.replace(study, per_kind=1, rank_pictures=4)
    finish(own, path)
    settings, lines = read(path)
    assert settings["space"] == "mini" and settings["schemes"] == ["euler", "dense"]
    for candidate, line in zip(own.candidates(4), lines, strict=True):
        assert {k: line[k] for k in vars(candidate)} == vars(candidate)
        again = train(own, candidate)
        assert (line["loss"], line["accuracy"], line["kept_mib"]) == (again.loss, again.accuracy, again.kept_mib)
        assert line["ranks"] == [list(r) for r in again.ranks] and line["status"] == "trained"


def test_other_settings_are_refused_and_named(study, tmp_path):
    path = tmp_path / "s.sqlite"
    finish(study, path, trainer=quick)
    other = dataclasses.replace(study, seed=1, epochs=2)
    with pytest.raises(SchemeError, match=r"seed: 0 there, 1 now; epochs: 1 there, 2 now") as e:
        finish(other, path, trainer=quick)
    assert len(str(e.value).splitlines()) == 2
    with Store(tmp_path / "empty.sqlite", other.settings):
        pass
    assert len(finish(study, tmp_path / "empty.sqlite", trainer=quick)) == 12  # nothing was trained under the others
    assert read(tmp_path / "empty.sqlite")[0]["seed"] == 0
    moved = dataclasses.replace(study, root=study.root + "/.", threads=2)  # neither changes a result
    assert finish(moved, path, trainer=quick) == []


@pytest.mark.parametrize(("first", "then"), [(4, 3), (4, 200), (10, 11)])
def test_all_classes_are_as_many_as_before(study, tmp_path, monkeypatch, first, then):
    """Settings that say "all of them" mean other networks over pictures of other classes."""
    path, seen = tmp_path / "s.sqlite", [first]
    monkeypatch.setattr(Study, "data", lambda self: SimpleNamespace(num_classes=seen[0]))
    finish(study, path, trainer=quick)
    seen[0], more = then, dataclasses.replace(study, per_kind=3)
    with pytest.raises(SchemeError, match=f"other networks than are drawn for pictures of {then} classes") as e:
        finish(more, path, trainer=quick)
    assert len(str(e.value).splitlines()) == 2 and len(read(path)[1]) == 12
    seen[0] = first
    assert len(finish(more, path, trainer=quick)) == 6
    # A study that names its classes takes these, however many there are.
    own = dataclasses.replace(study, classes=3)
    finish(own, tmp_path / "own.sqlite", trainer=quick)
    seen[0] = then
    assert finish(own, tmp_path / "own.sqlite", trainer=quick) == []


def test_one_process_writes(study, tmp_path):
    path = tmp_path / "s.sqlite"
    with Store(path, study.settings):
        with pytest.raises(SchemeError, match="another process writes to"):
            Store(path, study.settings).__enter__()
        assert read(path)[1] == []  # but all may read
    with Store(path, study.settings):
        pass


def test_no_network_is_recorded_twice(study, tmp_path):
    with Store(tmp_path / "s.sqlite", study.settings) as store:
        candidate = study.candidates(4)[0]
        store.add(candidate, Result("trained"))
        with pytest.raises(sqlite3.IntegrityError):
            store.add(candidate, Result("trained"))
        assert store.done() == {0}


def test_failed_networks_are_trained_again_if_asked(study, tmp_path):
    path = tmp_path / "s.sqlite"
    finish(study, path, trainer=lambda s, c: Result("failed", error="no") if c.number % 2 else quick(s, c))
    assert finish(study, path, trainer=quick) == []
    with Store(path, study.settings) as store:
        assert store.forget_failed() == 6
        assert [p.candidate.number for p in run(study, store, workers=0, trainer=quick)] == [1, 3, 5, 7, 9, 11]


@pytest.mark.parametrize("content", [b"no database at all, but longer than a header of one" * 9, b""])
def test_a_file_that_is_no_study(tmp_path, content):
    path = tmp_path / "s.sqlite"
    path.write_bytes(content)
    with pytest.raises(SchemeError, match="is no file of a study"):
        read(path)
    if content:
        with pytest.raises(SchemeError, match="is no file of a study"):
            Store(path, {}).__enter__()
    assert path.read_bytes() == content
    with pytest.raises(SchemeError, match="there is no file"):
        read(tmp_path / "other.sqlite")


SCRIPT = """
    import os, signal, sys
    from pathlib import Path
    from odenets.study.engine import run
    from odenets.study.store import Result, Store
    from odenets.study.train import Study

    folder = Path(sys.argv[1])

    def deadly(study, candidate):
        with open(folder / f"{candidate.number}", "a") as log:
            log.write("x")
        # Number 1 takes its worker with it the first time, number 3 each time.
        begun = len((folder / f"{candidate.number}").read_text())
        if candidate.number == 3 or (candidate.number == 1 and begun == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return Result("trained", accuracy=candidate.number / 100, worker=str(os.getpid()))

    if __name__ == "__main__":
        study = Study(root=sys.argv[2], size=32, per_kind=1)
        with Store(folder / "s.sqlite", study.settings) as store:
            for p in run(study, store, workers=2, trainer=deadly):
                print(p.done, p.candidate.number, p.result.status, flush=True)
"""


@pytest.mark.long
def test_ray_gives_a_killed_workers_network_to_another_three_times_at_most(pictures, tmp_path):
    pytest.importorskip("ray", reason='needs Ray: pip install "odenets[study]"')
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    # Ray would have its workers step back behind all other processes.
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "RAY_worker_niceness": "0"}
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(pictures)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    _, lines = read(tmp_path / "s.sqlite")
    assert [line["number"] for line in lines] == list(range(6))  # each once
    status = {line["number"]: line["status"] for line in lines}
    assert status.pop(3) == "failed" and set(status.values()) == {"trained"}
    calls = {n: len((tmp_path / str(n)).read_text()) for n in range(6)}
    assert calls.pop(1) == 2 and calls.pop(3) == 4
    assert set(calls.values()) == {1}  # a crash takes no other network with it


def test_gpus_that_are_not_there(study, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SchemeError, match=r"study.gpus is 0.5, and this machine has 0 GPUs"):
        finish(dataclasses.replace(study, gpus=0.5), tmp_path / "s.sqlite", trainer=quick)
    assert read(tmp_path / "s.sqlite")[1] == []


def test_without_ray_the_remedy_is_named(study, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with Store(tmp_path / "s.sqlite", study.settings) as store:
        with pytest.raises(SchemeError, match=r'pip install "odenets\[study\]".*--workers 0'):
            list(run(study, store, workers=2))
