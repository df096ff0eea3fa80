"""What the lists say: `odenets schemes`, `show` and `models`, against what the library says of itself."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import odenets
import schemes
from cli.lines import answer, fails
from odenets import create_model, list_models
from odenets.cli import models, show
from odenets.cli import words as w
from odenets.cli.entry import COMMANDS, LIGHTNING
from odenets.cli.schemes import source
from schemes import Tableau, stability


@pytest.fixture
def narrow(monkeypatch):
    """A terminal of some columns."""

    def of(columns: int) -> None:
        import rich.console

        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(w, "width", lambda: columns)
        monkeypatch.setattr(rich.console.Console, "is_terminal", property(lambda self: True))

    return of


def test_every_scheme_is_listed_with_what_it_says_of_itself(capsys):
    found = json.loads(answer(capsys, "schemes", "--json")[0])
    assert len(found) == len(schemes.names())
    for row in found:
        scheme = schemes.get(row["scheme"])
        assert (row["order"], row["stages"], row["calls"]) == (scheme.order, scheme.stages, scheme.evaluations)
        assert (row["inverse"] == "yes") == scheme.invertible and row["mixing"] == scheme.mixing
    table = answer(capsys, "schemes")[0]
    assert all(row["scheme"] in table for row in found)


def test_every_scheme_that_is_no_composition_says_where_it_was_published():
    lacking = [name for name in schemes.names() if not source(schemes.get(schemes.examples(name)[0]))]
    assert lacking == ["nested", "repeat", "substeps"]


@pytest.mark.parametrize(("pattern", "first"), [("RK4", "rk4"), ("ssp*3", "ssprk33"), ("heun", "heun2")])
def test_patterns_are_wildcards_or_parts(capsys, pattern, first):
    assert json.loads(answer(capsys, "schemes", pattern, "--json")[0])[0]["scheme"] == first


def test_a_pattern_without_a_match_ends_with_status_1(capsys):
    assert "no scheme matches 'rkk4'" in fails(capsys, "schemes", "rkk4", status=1)
    assert "Closest: resnet50" in fails(capsys, "models", "resnet500", status=1)


@pytest.mark.parametrize("columns", [None, 120, 48])
@pytest.mark.parametrize("name", ["rk4", "dopri5", "ees25", "nested(midpoint, rk4)", "3*rk4 + midpoint"])
def test_the_array_is_printed_as_it_is_read(capsys, narrow, name, columns):
    """In a narrow terminal too, whose long rows go on below."""
    if columns:
        narrow(columns)
    out, _ = answer(capsys, "show", name)
    tableau = schemes.get(name).tableau
    assert tableau is not None
    read = Tableau.parse(out.split("\n\n")[1], order=None)
    assert (read.a, read.b, read.c, read.b_hat) == (tableau.a, tableau.b, tableau.c, tableau.b_hat)
    assert columns is None or max(map(len, out.splitlines())) <= columns


@pytest.mark.cases(6)
@pytest.mark.parametrize("text", schemes.examples())
def test_every_scheme_is_shown(capsys, text):
    out, _ = answer(capsys, "show", text)
    found = json.loads(answer(capsys, "show", text, "--json")[0])
    scheme = schemes.get(text)
    assert out.startswith(f"{scheme}\n") and re.search(r"^cost +\d+ residual", out, re.M)
    if scheme.tableau is not None:
        real = stability.real_interval(scheme.tableau)
        assert found["stability"]["real"] == real and f"[-{real:.4g}, 0]" in out
    assert found["source"] == source(scheme)


def test_updates_are_those_of_both_steps_and_of_training(capsys):
    out, _ = answer(capsys, "show", "leapfrog")
    assert "first step:\n  x0 <- x0 + h F0(x1)\n" in out and "other steps:\n  x0 <- x0 + 2 h F0(x1)\n" in out
    found = json.loads(answer(capsys, "show", "bdia", "--json")[0])
    assert found["updates"]["step"] == ["x0 <- x0 + h F0(x0)"] and found["amplification"] == 2.0
    (line, _) = found["updates"]["other steps in training, for one draw"]
    assert line in ("x0 <- -0.5 x0 + 1.5 x1 + 0.5 h F0(x1)", "x0 <- 0.5 x0 + 0.5 x1 + 1.5 h F0(x1)")


def test_looking_at_a_scheme_draws_nothing():
    before = torch.get_rng_state()
    show.described(schemes.get("bdia"))
    assert torch.equal(before, torch.get_rng_state())


def test_the_region_is_drawn(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    out, _ = answer(capsys, "show", "rk4", "--plot", str(tmp_path / "new" / "rk4.svg"))
    assert (tmp_path / "new" / "rk4.svg").read_text().startswith("<?xml") and "plot: " in out
    assert "no stability function" in fails(capsys, "show", "revnet", "--plot", str(tmp_path / "x.png"))
    assert ".pdf" in fails(capsys, "show", "rk4", "--plot", str(tmp_path / "x.txt"))
    assert "cannot be written" in fails(capsys, "show", "rk4", "--plot", str(tmp_path / "new/rk4.svg/x.png"))


def test_every_model_is_listed(capsys):
    found = json.loads(answer(capsys, "models", "--json")[0])
    assert [row["model"] for row in found] == list_models()
    assert "parameters" not in found[0]
    assert next(row for row in found if row["model"] == "resnet50")["weights"] == ["v2", "v1"]


def test_costs_are_those_of_the_built_model(capsys):
    (row,) = json.loads(answer(capsys, "models", "resnet20", "--json")[0])
    net = create_model("resnet20")
    assert row["parameters"] == sum(p.numel() for p in net.parameters()) and row["size"] == 32
    # He et al. 2016 and torchvision: 40.8 million multiply-adds, three levels of three functions.
    assert abs(row["macs"] / 40.8e6 - 1) < 0.01 and row["evaluations"] == 9
    (larger,) = json.loads(answer(capsys, "models", "resnet20", "--size", "64", "--json")[0])
    assert 3.99 < larger["macs"] / row["macs"] < 4.01
    (other,) = json.loads(answer(capsys, "models", "ho_resnet26", "--scheme", "euler", "--json")[0])
    assert other["evaluations"] == sum(len(s.fs) for level in create_model("ho_resnet26").levels for s in level.steps)
    out, _ = answer(capsys, "models", "resnet20")
    assert f"{row['parameters']:,}" in out and "0.041" in out


@pytest.mark.long
def test_memory_is_that_of_a_plan():
    found = models.memory("revnet38", 16, 2)
    net = create_model("revnet38", backprop="store").train()
    assert found["stored"] == pytest.approx(odenets.plan(net, torch.rand(2, 3, 16, 16)).measured, rel=0.02)
    assert found["reverse"] < found["stored"] and found["checkpoint"] < found["stored"]
    assert found["without"] == {}
    other = models.memory("resnet20", 16, 2)
    assert other["reverse"] is None and other["checkpoint"] < other["stored"]
    assert "no inverse" in other["without"]["reverse"]


@pytest.mark.parametrize("args", [["schemes", "rk4"], ["models", "resnet20"], ["experiments", "cifar10"]])
def test_narrow_terminals_break_no_word(capsys, narrow, args):
    """A table whose columns are too many becomes paragraphs; no line is longer than the terminal."""
    wide, _ = answer(capsys, *args)
    narrow(40)
    out, _ = answer(capsys, *args)
    assert max(map(len, out.splitlines())) <= 40 and "│" not in out
    words = {word for word in re.findall(r"[\w,.]{4,}", wide) if word[0].islower() or word[0].isdigit()}
    assert words and words <= set(re.findall(r"[\w,.]{4,}", out))


@pytest.mark.long  # a process of its own
def test_output_into_a_closed_pipe_ends_quietly(tmp_path):
    import os
    import subprocess
    import sys

    shell = shutil.which("bash")
    assert shell
    env = {**os.environ, "PYTHONPATH": str(Path(odenets.__file__).parents[1])}
    done = subprocess.run(
        [shell, "-c", f"{sys.executable} -m odenets schemes | head -n 1"], env=env, capture_output=True, text=True
    )
    assert done.stdout.startswith("┏") and done.stderr == ""


PAGE = (Path(odenets.__file__).parents[1] / "docs/pages/command_line.md").read_text("utf-8")
SHOWN = re.findall(r"^```console\n\$ odenets (.+)\n((?:.*\n)*?)```$", PAGE, re.M)


def plain(text):
    """Without what a measurement may change, and the width of its column."""
    return re.sub(r"[━ ]+", " ", re.sub(r"[\d.]+ MiB", "MiB", text)).strip()


# What is measured takes a second on top.
MARKED = [pytest.param(*case, marks=[pytest.mark.long] if "--memory" in case[0] else [], id=case[0]) for case in SHOWN]


@pytest.mark.parametrize(("words", "printed"), MARKED)
def test_the_page_shows_what_commands_print(capsys, words, printed):
    args = shlex.split(words)
    if printed.startswith("error: "):
        assert answer(capsys, *args, status=2)[1] == printed
    else:
        assert plain(answer(capsys, *args)[0]) == plain(printed)


def test_the_page_names_every_command():
    lacking = [
        name for name in (*LIGHTNING, *COMMANDS) if not re.search(rf"^\| .*`(?:odenets )?{name}`.*\|", PAGE, re.M)
    ]
    assert not lacking and len(SHOWN) > 5
