"""Figures that can be read: no name covers another, however long the names of places are."""

from itertools import combinations

import pytest
import torch

from odenets import plots


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
