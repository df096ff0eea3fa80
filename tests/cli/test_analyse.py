"""`odenets analyse ... cost`: points as the files of results hold them, and a figure of them."""

import csv
import json
from pathlib import Path

import pytest

from odenets import plots
from odenets.cli import main
from odenets.cli.analyse import read_points
from odenets.study.comparison_report import find, rows_of
from odenets.study.store import read
from schemes import SchemeError

from .test_pictures import fails

RESULTS = Path(__file__).parents[2] / "experiments/results"


def test_points_are_those_of_the_trained_networks():
    _, lines = read(RESULTS / "pilot_mini.sqlite")
    done = [line for line in lines if line["status"] == "trained"]
    points = read_points(RESULTS / "pilot_mini.sqlite")
    assert [(p["parameters"], p["macs"], 1 - p["error"]) for p in points] == [
        (line["params"], line["macs"], pytest.approx(line["accuracy"])) for line in done
    ]
    runs = json.loads((RESULTS / "campaign_digits.json").read_text())["runs"]
    done = [run for run in runs if run["status"] == "trained"]
    points = read_points(RESULTS / "campaign_digits.json")
    assert [(p["group"], p["parameters"], 1 - p["error"]) for p in points] == [
        (run["cell"], run["parameters"], pytest.approx(run["epochs"][-1]["val/acc"])) for run in done
    ]


def table(path, *rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_table_of_ones_own(tmp_path, monkeypatch, capsys):
    own = table(
        tmp_path / "own.csv",
        {"name": "a", "error": 0.2, "accuracy": "", "parameters": 1e6, "macs": "", "group": "x"},
        {"name": "b", "error": "", "accuracy": 0.9, "parameters": "", "macs": 2e9, "group": ""},
        {"name": "c", "error": 0.1, "accuracy": "", "parameters": "", "macs": "", "group": ""},
    )
    points = read_points(own)
    assert points == [
        {"group": "x", "error": 0.2, "parameters": 1e6, "macs": None},
        {"group": "b", "error": pytest.approx(0.1), "parameters": None, "macs": 2e9},
    ]
    out = tmp_path / "cost.svg"
    seen = []
    monkeypatch.setattr(plots, "cost", lambda points, *args: seen.append(points) or out)
    main(["analyse", str(own), str(RESULTS / "campaign_digits.json"), "cost", "--out", str(out)])
    groups = {p["group"] for p in seen[0]}
    assert "own: x" in groups and any(group.startswith("campaign_digits: ") for group in groups)
    assert capsys.readouterr().out.strip() == str(out)


@pytest.mark.parametrize("every", [1, 2, 3, 4])
def test_a_run_counts_by_the_last_epoch_that_was_judged(tmp_path, every):
    held = json.loads((RESULTS / "campaign_digits.json").read_text())
    for run in held["runs"]:
        for n, epoch in enumerate(run["epochs"], 1):
            if n % every:
                del epoch["val/acc"]
    (tmp_path / "runs.json").write_text(json.dumps(held))
    found = find(tmp_path / "runs.json")
    figures = [value for row in rows_of(found) for value in row.figures.values()]
    assert [1 - p["error"] for p in read_points(tmp_path / "runs.json")] == pytest.approx(figures) and figures


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_the_first_column_has_its_name_however_a_spreadsheet_wrote_it(tmp_path, encoding):
    (tmp_path / "a.csv").write_text("group,error,macs\nmine,0.1,5\n", encoding=encoding)
    assert read_points(tmp_path / "a.csv") == [{"group": "mine", "error": 0.1, "parameters": None, "macs": 5.0}]


@pytest.mark.parametrize("column", ["parameters", "macs"])
@pytest.mark.parametrize("cost", [-5, 0, "nan", "inf", "-inf", "1e999"])
def test_a_cost_is_a_finite_number_above_0(tmp_path, column, cost):
    path = table(tmp_path / "a.csv", {"name": "a", "error": 0.1, column: 7}, {"name": "b", "error": 0.1, column: cost})
    with pytest.raises(SchemeError, match=rf"line 3: {column} \S+ is no finite number above 0") as e:
        read_points(path)
    assert len(str(e.value).splitlines()) == 2


def test_the_figure_is_drawn(tmp_path, capsys):
    out = tmp_path / "new" / "cost.svg"
    main(["analyse", str(RESULTS / "campaign_digits.json"), "cost", "--out", str(out)])
    assert "<svg" in out.read_text() and capsys.readouterr().out.strip() == str(out)


def test_what_does_not_go_is_said_in_two_lines(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("a")
    wrong = table(tmp_path / "wrong.csv", {"name": "a", "error": 5, "parameters": 1e6})
    lacks = table(tmp_path / "lacks.csv", {"name": "a", "parameters": 1e6})
    empty = table(tmp_path / "empty.csv", {"name": "a", "error": 0.1})
    word = table(tmp_path / "word.csv", {"name": "a", "error": "low", "parameters": 1e6})
    (tmp_path / "json.json").write_text("[]")
    for words, said in (
        (["cost"], "FILE"),
        ([str(tmp_path / "no.csv"), "cost"], "no file"),
        ([str(tmp_path / "text.txt"), "cost"], ".sqlite, .json, .csv"),
        ([str(wrong), "cost"], "line 2: error 5"),
        ([str(lacks), "cost"], "no column 'accuracy'"),
        ([str(empty), "cost"], "no trained network"),
        ([str(word), "cost"], "'low'"),
        ([str(tmp_path / "json.json"), "cost"], "neither the folder"),
        ([str(RESULTS / "campaign_digits.json"), "cost", "--out", "x.bmp"], ".svg"),
    ):
        assert said in fails(capsys, "analyse", *words), words
