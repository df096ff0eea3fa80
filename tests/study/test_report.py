"""Intervals are Welch's and cover what they promise; the report says what the lines hold."""

import dataclasses
import json
import logging
import random
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from odenets.cli import main
from odenets.study.report import common_depth, compare, difference, print_report, ranks
from odenets.study.space import SPACES, Candidate, sample
from odenets.study.store import Result, Store
from odenets.study.train import Study
from schemes import SchemeError
from study.lines import made_up_lines

FIGURES = st.lists(st.floats(-10, 10), min_size=2, max_size=8).filter(lambda x: max(x) - min(x) > 1e-3)


@given(a=FIGURES, b=FIGURES, confidence=st.floats(0.5, 0.99))
def test_one_stratum_is_welch(a, b, confidence):
    ours = difference([(a, b)], confidence)
    theirs = stats.ttest_ind(b, a, equal_var=False).confidence_interval(confidence)
    assert ours.low == pytest.approx(theirs.low, rel=1e-9, abs=1e-9)
    assert ours.high == pytest.approx(theirs.high, rel=1e-9, abs=1e-9)
    assert ours.mean == pytest.approx((theirs.low + theirs.high) / 2, abs=1e-9)


@given(a=FIGURES, b=FIGURES)
def test_exchange_of_the_groups_turns_the_sign(a, b):
    one, other = difference([(a, b)]), difference([(b, a)])
    assert (one.mean, one.low, one.high) == pytest.approx((-other.mean, -other.high, -other.low), abs=1e-12)


def test_strata_take_out_what_they_differ_in():
    """Two strata whose levels lie 100 apart: pooled, the spread would drown the difference of 1."""
    low, high = ([1.0, 2, 3], [2.0, 3, 4]), ([101.0, 102, 103], [102.0, 103, 104])
    found = difference([low, high])
    assert found.mean == pytest.approx(1) and found.high - found.low < 4
    twice = difference([low, low])
    one = difference([low])
    assert twice.high - twice.low < one.high - one.low


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator, hits, trials = random.Random(0), 0, 2000
    for _ in range(trials):
        strata = [
            ([generator.gauss(0, 1) for _ in range(5)], [generator.gauss(0.5, 3) for _ in range(8)]),
            ([generator.gauss(9, 2) for _ in range(4)], [generator.gauss(9.5, 1) for _ in range(4)]),
        ]
        found = difference(strata)
        hits += found.low <= 0.5 <= found.high
    assert abs(hits / trials - 0.95) < 0.015


def test_equal_figures_have_an_interval_of_no_width():
    assert difference([([1.0, 1.0], [2.0, 2.0])]) == (1, 1, 1)


def test_groups_of_one_have_no_interval():
    with pytest.raises(SchemeError, match="two networks in every group"):
        difference([([1.0], [1.0, 2.0])])


def test_compare_by_columns():
    lines = made_up_lines()
    (row,) = compare(lines, "euler", "dense", "accuracy")
    assert row.name == "all" and row.counts == (18, 18)
    assert row.difference.mean == pytest.approx(0.05, abs=0.01) and row.difference.low > 0.04
    rows = compare(lines, "euler", "dense", "accuracy", "order")
    assert [r.name for r in rows] == ["post", "post_linear", "pre"] and all(r.counts == (6, 6) for r in rows)
    for r in rows:
        own = [line["accuracy"] for line in lines if line["scheme"] == "euler" and line["order"] == r.name]
        assert r.means[0] == pytest.approx(sum(own) / 6) and r.spreads[0] == pytest.approx(stats.tstd(own))
    many = made_up_lines(20)
    shifted = [{**line, "accuracy": line["accuracy"] + (line["norm"] == "batch")} for line in many]
    (row,) = compare(shifted, "euler", "dense", "accuracy", within=("order", "augment", "norm"))
    assert row.difference.mean == pytest.approx(0.05, abs=0.01)  # whatever the norms' shares are
    assert compare(lines[:6], "euler", "dense", "accuracy") == []  # one of each kind has no spread


def test_ranks_by_step_are_means_over_networks_of_that_depth():
    lines = made_up_lines()
    depth = common_depth(lines)
    rows = ranks(lines, depth)
    for scheme in ("euler", "dense"):
        own = [r for r in rows if r.scheme == scheme]
        widths = [line["width"] for line in lines if line["scheme"] == scheme and line["depth"] == depth]
        assert [r.step for r in own] == list(range(depth + 1)) and own[0].networks == len(widths)
        grow = [r.step + 1 if scheme == "dense" else 1 for r in own]
        assert [r.width for r in own] == pytest.approx([g * sum(widths) / len(widths) for g in grow])
        assert [r.numerical for r in own] == pytest.approx([r.width - 1 for r in own])


@pytest.fixture
def store(tmp_path):
    study = Study(size=32, classes=50)
    path = tmp_path / "s.sqlite"
    with Store(path, study.settings) as store:
        for line in made_up_lines(20):
            candidate = Candidate(**{f.name: line[f.name] for f in dataclasses.fields(Candidate)})
            result = Result(**{f.name: line[f.name] for f in dataclasses.fields(Result) if f.name in line})
            store.add(candidate, dataclasses.replace(result, status="diverged") if candidate.number == 0 else result)
    return path


def test_the_command_prints_tables_and_draws(store, tmp_path, capsys):
    main(["study", "report", str(store), "--out", str(tmp_path / "figures")])
    out = capsys.readouterr().out
    assert "120 networks\n" in out and "| add | 59 | 1 | 0 |" in out and "| concat | 60 | 0 | 0 |" in out
    everything = next(line for line in out.splitlines() if line.startswith("| all |"))
    _, name, added, joined, *_, gain, loss, _ = (cell.strip() for cell in everything.split("|"))
    assert (name, added, joined) == ("all", "59", "60")
    assert 4 < float(gain.split()[0]) < 6 and float(loss.split()[0]) == pytest.approx(
        -float(gain.split()[0]) / 100, abs=1e-3
    )
    for kind in ("all, norms apart", "order pre", "norm layer", "kernel 3"):
        assert f"| {kind} |" in out
    for name in ("accuracy.png", "ranks.png"):
        assert (tmp_path / "figures" / name).read_bytes().startswith(b"\x89PNG")


def test_a_scheme_without_a_trained_network_has_dashes(store, tmp_path, capsys):
    connection = sqlite3.connect(store)
    with connection:
        (text,) = connection.execute("SELECT settings FROM study").fetchone()
        settings = json.loads(text)
        settings["schemes"].append("rk4")
        connection.execute("UPDATE study SET settings = ?", [json.dumps(settings)])
    connection.close()
    main(["study", "report", str(store), "--out", str(tmp_path / "figures")])
    assert "| rk4 | 0 | 0 | 0 | – | – | – | – |" in capsys.readouterr().out
    assert (tmp_path / "figures" / "accuracy.png").is_file()


def test_the_page_says_what_the_committed_lines_say(capsys):
    root = Path(__file__).parents[2]
    print_report(root / "experiments/results/pilot_mini.sqlite")
    page = (root / "docs/pages/study.md").read_text("utf-8")
    tables = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(tables) == 36 and [line for line in tables if line not in page] == []


def test_too_few_networks_are_said_to_be(tmp_path):
    study = Study()
    with Store(tmp_path / "s.sqlite", study.settings) as store:
        store.add(sample(SPACES["mini"], study.schemes, 1, size=32)[0], Result("trained", accuracy=0.1, loss=1.0))
    with pytest.raises(SchemeError, match="too few networks to compare"):
        print_report(tmp_path / "s.sqlite")


@pytest.mark.parametrize("lines", [[], [Result("failed", error="x")], [Result("diverged")] * 6], ids=len)
def test_so_are_none_that_were_trained(lines, tmp_path):
    study = Study()
    drawn = sample(SPACES["mini"], study.schemes, 2, size=32)
    with Store(tmp_path / "s.sqlite", study.settings) as store:
        for candidate, result in zip(drawn, lines, strict=False):
            store.add(candidate, result)
    with pytest.raises(SchemeError, match="too few networks to compare"):
        print_report(tmp_path / "s.sqlite")


def test_the_sample_is_shown(pictures, capsys):
    main(["study", "sample", "--study.root", str(pictures), "--study.size", "32", "--study.per_kind", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["number", "scheme", "order"] and len(lines) == 13
    assert lines[1].split()[1] == "euler" and lines[2].split()[1] == "dense"


@pytest.mark.long
def test_a_study_runs_from_the_command_line(pictures, tmp_path, capsys):
    file = tmp_path / "s.sqlite"
    args = ["study", "run", "--study.root", str(pictures), "--study.size", "32", "--study.per_kind", "1"]
    args += ["--study.epochs", "1", "--workers", "0", "--store", str(file)]
    level = logging.getLogger("lightning.pytorch").level
    main(args)
    assert logging.getLogger("lightning.pytorch").level == level
    out = capsys.readouterr().out
    assert "6/6 #5 dense post_linear trained: accuracy" in out and f"6 networks in {file}" in out
    main(args)
    assert "1/6" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["run", "--study.space", "Q"], "space is 'Q', want one of"),
        (["run", "--study.spacee", "A"], "spacee"),
        (["run", "--study.epochs", "many"], "epochs"),
        (["run"], "no data"),
        (["report", "none.sqlite"], "there is no file 'none.sqlite'"),
        (["rung"], "rung"),
        ([], "subcommand"),
    ],
)
def test_errors_are_two_lines_with_status_2(args, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        main(["study", *args])
    lines = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and len(lines) == 2 and lines[0].startswith("error: ") and text in "".join(lines), lines
