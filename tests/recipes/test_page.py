"""What the page of the papers says was measured."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from odenets import recipes
from odenets.config_files import flat

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tables():
    if str(ROOT / "docs") not in sys.path:  # it imports its neighbours
        sys.path.insert(0, str(ROOT / "docs"))
    return importlib.import_module("tables")


def write(folder, recipe, accuracies, options=None, status="trained", **changes):
    """Results as `odenets compare` exports them."""
    folder.mkdir()
    settings = {k.replace("init_args.", ""): v for k, v in flat(recipe.settings).items()}
    settings |= {"model.net.step": "1.0", "data.root": None}
    settings |= {k.replace("__", "."): v for k, v in changes.items()}
    line = {"status": status, "options": options or {}}
    runs = [{**line, "epochs": [{"val/acc": 0.5}, {"val/acc": accuracy}]} for accuracy in accuracies]
    (folder / "found.json").write_text(json.dumps({"settings": settings, "runs": runs}))
    return folder


def test_a_row_shows_the_mean_of_the_runs_with_its_settings(tables, tmp_path):
    recipe = recipes.find("cifar10_ho_resnet26_rk4")
    found = write(tmp_path / "a", recipe, [0.91, 0.92], seed_everything=7)
    assert tables.measured(recipe, found) == "91.50 % top-1, 8.50 % error (2 seeds)"
    # What a comparison varied counts as a setting.
    varied = write(tmp_path / "b", recipe, [0.9], {"model.net.scheme": "midpoint"})
    assert tables.measured(recipe, varied) == ""
    midpoint = recipes.find("cifar10_ho_resnet26_midpoint")
    assert tables.measured(midpoint, varied) == "90.00 % top-1, 10.00 % error (1 seed)"


@pytest.mark.parametrize("change", [{"trainer__max_epochs": 10}, {"data__batch_size": 64}, {"status": "unfinished"}])
def test_other_settings_and_unfinished_runs_are_no_measurement(tables, tmp_path, change):
    recipe = recipes.find("cifar10_ho_resnet26_rk4")
    assert tables.measured(recipe, write(tmp_path / "a", recipe, [0.9], **change)) == ""


def test_the_page_names_every_recipe_and_every_row():
    text = (ROOT / "docs/pages/papers.md").read_text(encoding="utf-8")
    for name in recipes.names():
        assert f"| `recipe:{name}` |" in text
    for paper in recipes.PAPERS:
        assert f"## {paper.title}\n" in text
        for row in paper.rows:
            assert f"| {row.what} |" in text
