"""The script for a GPU: its behaviour when time is short, when a case ends the process, and on a second call."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments" / "gpu"


@pytest.fixture(scope="module")
def scripts():
    """The modules of the folder, which import each other by their names."""
    before, known = list(sys.path), dict(sys.modules)
    sys.path.insert(0, str(FOLDER))
    found = {}
    for name in ("tables", "measure", "session"):
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        found[name] = importlib.util.module_from_spec(spec)
        sys.modules[name] = found[name]
        spec.loader.exec_module(found[name])
    yield found
    sys.path[:] = before
    for name, module in list(sys.modules.items()):
        if known.get(name) is not module and str(ROOT / "experiments") in str(getattr(module, "__file__", "")):
            del sys.modules[name]
    # Other folders have scripts of the same names.
    sys.modules |= {name: known[name] for name in found if name in known}


def raising(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize("most", [1, 3, 8])
@pytest.mark.parametrize("room", [0, 1, 2, 5, 100])
def test_the_largest_batch_is_the_largest_that_fits(scripts, monkeypatch, room, most):
    def prepared(build, batch, size, device):
        if batch > room:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(scripts["measure"], "prepared", prepared)
    fitting = [b for b in (1, 2, 4, 8) if b <= min(room, most)]
    found = scripts["measure"].largest_batch(lambda: None, 8, "cpu", most)
    bound = "memory" if any(room < b <= most for b in (1, 2, 4, 8)) else f"not above {most}"
    assert found == {"size": 8, "batch": max(fitting, default=0), "bound": bound}


def test_each_case_is_measured_once_whatever_ends_it(scripts, tmp_path):
    measure, tables, calls = scripts["measure"], scripts["tables"], []
    path = tmp_path / "measured.jsonl"

    def case(name, run=None):
        return measure.Case("t", name, run or (lambda: calls.append(name) or {"ms": 1.5}))

    class Gone(BaseException):
        """The process, say."""

    all_cases = [
        case("a"),
        case("b", raising(torch.OutOfMemoryError("no room"))),
        case("c", raising(ImportError("no timm"))),
        case("d", raising(ValueError("no\nmore"))),
        case("e", raising(KeyboardInterrupt())),
        case("f", raising(Gone())),
        case("g"),
    ]
    measure.measure(iter(all_cases), path, 60)
    assert [line["status"] for line in tables.measured(path).values()] == [
        *("measured", "out of memory", "not installed", "failed"),
    ], "what was stopped is no case that is done"
    all_cases[4] = case("e")
    with pytest.raises(Gone):
        measure.measure(iter(all_cases), path, 60)
    measure.measure(iter(all_cases), path, 60)
    found = {name: line["status"] for (_, name), line in tables.measured(path).items()}
    assert found["e"] == found["g"] == "measured" and found["f"] == "crashed" and calls == ["a", "e", "g"]
    names, rows = tables.table(list(tables.measured(path).values()))
    assert names == ["case", "ms"] and ["a", "1.5"] in rows and ["d (failed: ValueError: no)", "–"] in rows


@pytest.mark.long
def test_no_case_is_begun_that_will_not_fit(scripts, tmp_path):
    measure, tables = scripts["measure"], scripts["tables"]
    slow = [measure.Case("t", str(n), lambda: time.sleep(0.2) or {}) for n in range(9)]
    measure.measure(iter(slow), tmp_path / "measured.jsonl", 0.5)
    assert 1 <= len(tables.measured(tmp_path / "measured.jsonl")) <= 3
    measure.measure(iter(slow), tmp_path / "measured.jsonl", 60)
    assert len(tables.measured(tmp_path / "measured.jsonl")) == 9


def test_failures_are_sorted_by_what_was_raised(scripts, tmp_path):
    (tmp_path / "r.xml").write_text(
        """<testsuites><testsuite><testcase classname="a" name="x"/>
        <testcase classname="a" name="y"><failure message="ValueError: 1 &#10;more"/></testcase>
        <testcase classname="b" name="z"><failure message="ValueError: 2"/></testcase>
        <testcase classname="b" name="u"><error message="RuntimeError: CUDA"/></testcase>
        <testcase classname="b" name="w"><skipped message="no"/></testcase></testsuite></testsuites>"""
    )
    found = scripts["session"].sorted_failures(tmp_path / "r.xml")
    assert found["counts"] == {"passed": 1, "skipped": 1, "failed": 3}
    assert found["failures"] == {"ValueError": ["a::y", "b::z"], "RuntimeError": ["b::u"]}


def test_a_part_that_does_not_stop_is_ended(scripts, tmp_path):
    session = scripts["session"].Session(tmp_path, 1, tiny=True)
    began = time.monotonic()
    assert session.run("x", ["-c", "import time; time.sleep(60)"], 0.3) is None
    assert session.run("x", ["-c", "print('said')"], 20) == 0
    assert time.monotonic() - began < 20 and "said" in (tmp_path / "x.log").read_text()


@pytest.mark.parametrize("words", [["0.1"], ["many"], []])
def test_what_cannot_be_run_is_refused(words, tmp_path):
    """One process for all would be quicker, but this is the way in."""
    done = subprocess.run(
        ["bash", str(FOLDER / "run.sh"), *([str(tmp_path / "out")] if words else []), *words],
        env={**os.environ, "PYTHON": "false" if not words else sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and ("usage" in done.stderr)


@pytest.mark.long
def test_all_of_it_at_a_tiny_size_and_again(scripts, tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        done = subprocess.run(
            ["bash", str(FOLDER / "run.sh"), str(out), "9", "--tiny"],
            env={**os.environ, "PYTHON": sys.executable},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    statuses = [json.loads(line)["status"] for line in (out / "measured.jsonl").read_text().splitlines()]
    assert statuses.count("measured") == statuses.count("begun") - statuses.count("not installed") >= 10
    assert json.loads((out / "tests.json").read_text())["in_time"]
    runs = json.loads((out / "campaign/report/runs.json").read_text())["runs"]
    assert [run["status"] for run in runs] == ["trained", "trained"]
    text = (out / "tables.md").read_text()
    assert text.count("\n## ") == len(scripts["tables"].TITLES) + 1
    assert "not installed" not in text.partition("## Campaign")[2]
