"""Figures that can be read: no name covers another, however long the names of places are."""

from itertools import combinations
from pathlib import Path

import pytest
import torch

from odenets import plots
from schemes import SchemeError


@pytest.mark.cases(1)
@pytest.mark.parametrize("draw", [plots.heat_maps_by_column, plots.heat_maps])
@pytest.mark.parametrize("prefix", ["levels.0.steps.1", "backbone.trunk.levels.0.steps.10"])
def test_names_above_heat_maps_do_not_cover_each_other(draw, prefix, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    found = []
    monkeypatch.setattr(plots, "_write", lambda figure, path: found.append(figure) or path)
    names = [f"{prefix}{k}:readout" for k in range(4)]
    draw(torch.rand(2, 3, 8, 8), [torch.rand(2, 8, 8) for _ in names], names, tmp_path / "x.png")
    [figure] = found
    figure.draw_without_rendering()
    titles = [axes.title for axes in figure.axes if axes.title.get_text()]
    assert {title.get_text().replace("\n", "") for title in titles} >= set(names)
    boxes = [title.get_window_extent() for title in titles]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def cells(figure):
    """The texts in the fields of the first panel, by column and level."""
    return {tuple(map(int, text.get_position())): text.get_text() for text in figure.axes[0].texts}


PLACES = {
    "columns": ([f"net.columns.steps.{n}:{level + 1}" for n in range(2) for level in range(2)], 2),
    "of the root": ([f"steps.{n}:{level}" for n in range(2) for level in range(2)], 2),
    "two stacks": ([f"levels.{level}.steps.0:{i}" for level in range(2) for i in range(2)], 1),
    "two networks": ([f"{net}.columns.steps.0:{level}" for net in ("a", "b") for level in (1, 2)], 1),
    "mixed": (["levels.0.steps.0:0", "levels.1.steps.0:readout", "levels.2.steps.0:1", "levels.2.steps.1:1"], 1),
    "calls": (["f.steps.0@0:1", "f.steps.0@1:1", "f.steps.0@0:2", "f.steps.0@1:2"], 1),
    "twice": (["columns.steps.0:1", "columns.steps.0:2", "columns.steps.1:1", "columns.steps.1:1"], 1),
}


@pytest.mark.parametrize("case", PLACES)
def test_each_place_has_a_field_of_its_own(case, monkeypatch):
    names, levels = PLACES[case]
    own = names[:3] if case == "twice" else names  # a matrix has one row for a name
    matrix = torch.eye(len(own) + 2)
    matrix[-2, : len(own)] = torch.tensor([0.11, 0.22, 0.33, 0.44])[: len(own)]
    figure = figure_of(monkeypatch, lambda: plots.alignment_by_column(matrix, [*own, "input", "label"], "a.png"))
    assert sorted(cells(figure).values()) == ["0.11", "0.22", "0.33", "0.44"][: len(own)]
    figure = figure_of(monkeypatch, lambda: plots.class_alignment([0.1] * 4, [0.1, 0.2, 0.3, 0.4], names, "a.png"))
    lines = figure.axes[0].lines
    assert len(lines) == levels and sorted(y for line in lines for y in line.get_ydata()) == [0.1, 0.2, 0.3, 0.4]
    assert all(len(set(line.get_xdata())) == len(line.get_xdata()) for line in lines)
    heats = [torch.full((1, 4, 4), float(k)) for k in range(4)]
    figure = figure_of(monkeypatch, lambda: plots.heat_maps_by_column(torch.rand(1, 3, 4, 4), heats, names, "a.png"))
    assert [len(axes.images) for axes in figure.axes].count(2) == 4


def test_figures_of_nothing_are_refused(tmp_path):
    for points in ([], [{"group": "a", "error": 0.1}], [{"group": "a", "error": 0.1, "macs": None}]):
        with pytest.raises(SchemeError, match="cost: no row has a number"):
            plots.cost(points, tmp_path / "x.png")
    empty = {"from": 0.0, "to": 1.0, "pictures": 0, "accuracy": 0.0, "confidence": 0.0}
    for bins in ([], [empty]):
        with pytest.raises(SchemeError, match="reliability: no bin holds a picture"):
            plots.reliability(bins, tmp_path / "x.png")


FLAT = [24.0, 24.1, 24.0]
CURVES = {
    "rk4: width": ([0, 1, 2], FLAT),
    "rk4: rank": ([0, 1, 2], [23.0, 24.1, 24.0]),
    "dense": ([0, 1, 2], [26, 99, 180]),
}


def drawn(monkeypatch, tmp_path, *args, **options):
    pytest.importorskip("matplotlib")
    found = []
    monkeypatch.setattr(plots, "_write", lambda figure, path: found.append(figure) or path)
    plots.lines(CURVES, tmp_path / "x.png", "step", "directions", *args, **options)
    return found[0]


def test_a_curve_that_another_covers_is_wide_and_pale_below_it(monkeypatch, tmp_path):
    [axes] = drawn(monkeypatch, tmp_path).axes
    below, above, apart = axes.lines
    assert below.get_linewidth() > 2 * above.get_linewidth() and below.get_alpha() < 1 == above.get_alpha()
    assert below.get_markersize() > above.get_markersize() and below.get_zorder() <= above.get_zorder()
    assert apart.get_linewidth() == above.get_linewidth()
    assert below.get_color() == above.get_color() and below.get_linestyle() != above.get_linestyle()


def test_close_curves_have_a_panel_of_their_own(monkeypatch, tmp_path):
    names = ["rk4: width", "rk4: rank"]
    whole, part = drawn(monkeypatch, tmp_path, apart=names).axes
    assert [line.get_label() for line in part.lines] == names and len(whole.lines) == 3
    assert part.get_ylim()[1] < 30 < whole.get_ylim()[1]
    for a, b in zip(whole.lines, part.lines, strict=False):
        assert (a.get_color(), a.get_marker(), a.get_linestyle()) == (b.get_color(), b.get_marker(), b.get_linestyle())


def test_covered_counts_curves_that_lie_on_one():
    near, far = ([1, 2, 4], [1.0, 10, 100]), ([1, 2, 4], [1.05, 10.5, 150])
    # Within a fiftieth of the range: of 149 at two places of three, of log 150 at the same two.
    assert plots.covered([near, far]) == [1, 0]
    assert plots.covered([([1, 2], [1.0, 100]), ([1, 2], [4.0, 100])]) == [1, 0]
    assert plots.covered([([1, 2, 3], [1.0, 2, 100]), ([1, 2, 3], [2.0, 4, 100])], log=True) == [0, 0]
    assert plots.covered([([1, 2], [0.0, 1]), ([3], [1.0])], log=True) == [0, 0], "what a logarithm does not have"


def test_a_model_a_mode_and_a_quantity_have_one_look():
    from odenets.palette import MODES, looks

    found = looks(["RevCol-T: stored", "RevCol-T: reverse", "DenseNet-121: stored"])
    assert (
        found["RevCol-T: stored"].colour
        == found["RevCol-T: reverse"].colour
        == looks(["revcol_tiny"])["revcol_tiny"].colour
    )
    assert found["RevCol-T: stored"].dash != found["RevCol-T: reverse"].dash
    assert looks(["RevCol"])["RevCol"] != looks(["revcol"])["revcol"], "a model, and a scheme"
    assert [looks([mode])[mode].colour for mode in MODES] == [light for light, _ in MODES.values()]
    assert looks(["store", "euler"])["store"] == looks(["reverse", "store"])["store"]


def figure_of(monkeypatch, draw):
    """The figure that a function draws."""
    pytest.importorskip("matplotlib")
    seen = []
    monkeypatch.setattr(plots, "_write", lambda figure, path: seen.append(figure) or Path(path))
    draw()
    return seen[0]


def laid_out(monkeypatch, draw):
    """The same, laid out."""
    figure = figure_of(monkeypatch, draw)
    figure.draw_without_rendering()
    return figure


@pytest.mark.parametrize("columns", [1, 4, 12, 16, 30])
def test_numbers_in_fields_do_not_cover_each_other(columns, monkeypatch):
    from odenets.analysis import WeightMap

    names = tuple(str(i + 1) for i in range(columns))
    maps = [WeightMap("levels.0", torch.full((1, columns), 0.0163), ("1",), names, "stage", "step")]
    figure = laid_out(monkeypatch, lambda: plots.weight_maps(maps, "a.png"))
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == (columns if columns <= 16 else 0)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert figure.axes[1].get_ylabel() == "mean |weight|"


def test_the_legend_of_ranks_covers_no_curve(monkeypatch):
    from odenets.analysis import Rank

    profile = {f"columns.steps.{i}:1": Rank(10, 9 - i, 1.5) for i in range(9)}
    figure = laid_out(monkeypatch, lambda: plots.ranks(profile, "a.png", "title"))
    axes = figure.axes[0]
    assert not figure.legends[0].get_window_extent().overlaps(axes.get_window_extent())
    assert axes.get_ylabel() == "dimensions" and all(float(y).is_integer() for y in axes.get_yticks())


def test_the_legend_of_lines_covers_no_curve(monkeypatch):
    # Curves that leave no corner free, as errors that fall at different rates do.
    curves = {name: ([1, 2, 3], [3.0 * k, 1.5 * k, 0.1 * k]) for k, name in enumerate(("euler", "rk4", "dense"), 1)}
    curves["midpoint"] = ([1, 2, 3], [0.1, 5.0, 9.0])
    figure = laid_out(monkeypatch, lambda: plots.lines(curves, "x.png", "steps", "error"))
    [axes] = figure.axes
    assert axes.get_legend() is None
    assert not figure.legends[0].get_window_extent().overlaps(axes.get_window_extent())


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    "draw",
    [
        lambda xs, path: plots.lines({"euler": (xs, xs)}, path, "epochs", "y"),
        lambda xs, path: plots.bands({"euler": [[(x, x) for x in xs]]}, path, "epochs", "y"),
        lambda xs, path: plots.strips({"euler": xs, "rk4": [*xs, None]}, path, "epochs"),
    ],
)
def test_counts_have_no_ticks_between_them(draw, whole, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    found = []
    monkeypatch.setattr(plots, "_write", lambda figure, path: found.append(figure) or path)
    draw([6, 7] if whole else [6.5, 7.0], tmp_path / "x.png")
    ticks = found[0].axes[0].get_xticks()
    assert all(float(tick).is_integer() for tick in ticks) == whole
