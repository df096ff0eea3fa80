"""The project's statements about itself agree: its version, its checks, the definition of a long function."""

import os
import re
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest
import yaml
from scripts import ROOT, load

import odenets.cli

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def lines():
    return load(".ci/lines.py")


def test_there_is_one_version(capsys):
    assert "version" in PROJECT["project"]["dynamic"] and "version" not in PROJECT["project"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "odenets/__init__.py"
    assert CITATION["version"] == odenets.__version__
    changes = (ROOT / "docs/pages/changelog.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## (\d+)\.(\d+)\.(\d+) - \d{4}-\d\d-\d\d$", changes, re.M)
    numbers = [tuple(map(int, r)) for r in releases]
    assert ".".join(releases[0]) == odenets.__version__ and numbers == sorted(set(numbers), reverse=True)
    odenets.cli.main(["--version"])
    assert capsys.readouterr().out == f"odenets {odenets.__version__}\n"


def test_the_authors_are_those_of_the_citation():
    assert [a["name"] for a in PROJECT["project"]["authors"]] == [a["name"] for a in CITATION["authors"]]
    assert PROJECT["project"]["license"] == CITATION["license"]


def test_a_classifier_for_each_python():
    lowest = int(re.fullmatch(r">=3\.(\d+)", PROJECT["project"]["requires-python"])[1])  # type: ignore[index]
    found = [re.fullmatch(r"Programming Language :: Python :: 3\.(\d+)", c) for c in PROJECT["project"]["classifiers"]]
    minors = [int(m[1]) for m in found if m]
    assert minors == list(range(lowest, lowest + len(minors))) and minors


def test_hooks_run_what_ci_runs():
    """Each check of .ci/check has a hook, which fetches nothing; .ci/run runs them all."""
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert local["repo"] == "local" and {hook["language"] for hook in local["hooks"]} == {"system"}
    asked = subprocess.run(["bash", ROOT / ".ci/check", "nothing"], capture_output=True, text=True)
    assert asked.returncode == 2
    checks = asked.stderr.split("wanted: ")[1].split()
    assert [hook["entry"] for hook in local["hooks"]] == [f".ci/check {name}" for name in checks]
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert re.search(r"^\.ci/check >\S+ 2>&1 &\ncheck=\$!$", script, re.M), "all of them, beside the tests"
    assert '\nwait "$check" || checked=$?\n' in script and '[ "$checked" -eq 0 ] || exit "$checked"' in script


def body(count: int, head: str = "def f():", above: str = "") -> str:
    return "\n".join([above, head, '    """Says\n\n    a lot.\n    """', "    # why", "", *["    a = 1"] * (count - 1)])


@pytest.mark.parametrize(
    ("text", "size", "said"),
    [
        (body(3), 3, False),
        (body(41), 41, False),
        (body(41, above="# long: a table"), 41, True),
        (body(41, "def f():  # long: a table"), 41, True),
        (body(41, "def f():  # long:"), 41, False),  # no reason
        (body(41, above="# long: a table\n"), 41, False),  # not on the line above
        (body(41, "@cache\ndef f():", above="# long: a table"), 41, True),
        ("def f():\n    x = '''\n    a\n    '''\n    return x  # as it is", 5, False),  # a string, not a docstring
    ],
)
def test_what_a_long_function_is(text, size, said):
    ((node, found, why),) = lines().Source(text).functions()
    assert (node.name, found, why) == ("f", size, said)


def test_a_function_counts_with_those_inside_it():
    text = 'def f():\n    def g():\n        """What."""\n        return 1\n    return g\n'
    assert {node.name: size for node, size, _ in lines().Source(text).functions()} == {"f": 4, "g": 2}


def test_comments_are_those_for_readers():
    source = lines().Source("# why\na = 1  # and so\nb = '# no'\nc = d  # type: ignore\n# noqa\n")
    assert sorted(source.comments) == [1, 2] and source.code == {2, 3, 4} and source.length == 5


@pytest.mark.parametrize(
    ("args", "cores", "workers"),
    [
        (["tests"], "2", 2),
        (["tests/schemes", "tests/test_docs.py"], "3", 3),
        (["tests"], "64", 8),
        (["tests"], "1", 0),
        (["tests/test_docs.py"], "2", 0),
        (["tests/test_docs.py::test_the_pages_build", "tests/test_workshop.py"], "2", 0),
    ],
)
def test_folders_are_tested_by_workers_and_files_by_none(args, cores, workers, request, monkeypatch):
    conftest = request.config.pluginmanager.get_plugin(str(ROOT / "tests/conftest.py"))
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", cores)
    config = SimpleNamespace(args=args, invocation_params=SimpleNamespace(dir=ROOT))
    assert conftest.pytest_xdist_auto_num_workers(config) == workers


LINES = """
def f(n):
    if n == 0:
        return "first case"
    if n == 1:
        return "later case"
    if n == 2:
        return "early example"
    if n == 3:
        return "late example"
    return "another test"
"""
TRACED = """
import time
import pytest
from hypothesis import given, settings, strategies as st
from lines import f

def work(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass

@pytest.mark.parametrize("n", [0, 1])
def test_cases(n):
    f(n)
    work(0.4)

examples = []

@settings(max_examples=4, database=None)
@given(st.integers())
def test_examples(n):
    f(2 if len(examples) < 3 else 3)
    examples.append(n)
    work(0.12)

def test_another():
    f(4)
"""


@pytest.mark.long
def test_lines_are_counted_where_each_test_begins(tmp_path):
    """Where they are traced; and what is paused goes on, in the frames that it was in."""
    conftest = (ROOT / "tests/conftest.py").read_text(encoding="utf-8")
    for name, text in (("lines", LINES), ("test_traced", TRACED), ("conftest", conftest)):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    tracing = {"COVERAGE_CORE": "ctrace", "COVERAGE_FILE": str(tmp_path / "data")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--cov=lines", "--cov-report=term-missing"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k not in ("PYTEST_ADDOPTS", "PYTHONPATH")} | tracing,
        capture_output=True,
        text=True,
    )
    assert re.search(r"^lines.py +10 +2 +80% +6, 10$", done.stdout, re.M), done.stdout + done.stderr


def test_the_named_faults_can_still_be_planted():
    mutants = load("experiments/benchmarks/mutants.py")
    assert len(list(mutants.named())) == len(mutants.NAMED) > 10
