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


@pytest.mark.parametrize(
    "change", [{"trainer__limit_train_batches": 0.01}, {"model__label_smoothing": 0.3}, {"data__augment__mixup": 0.1}]
)
def test_nor_are_runs_with_a_setting_more(tables, tmp_path, change):
    """What a recipe does not write out has its default."""
    recipe = recipes.find("cifar10_ho_resnet26_rk4")
    assert tables.measured(recipe, write(tmp_path / "a", recipe, [0.9], **change)) == ""
    usual = {name: 0.0 for name in change if "train_batches" not in name}
    assert "90.00 %" in tables.measured(recipe, write(tmp_path / "b", recipe, [0.9], **usual))


def test_cells_are_no_seeds_of_one_another(tables, tmp_path):
    recipe = recipes.find("cifar10_ho_resnet26_rk4")
    folder = write(tmp_path / "a", recipe, [0.5, 0.9, 0.92, 0.1])
    held = json.loads((folder / "found.json").read_text())
    for run, smoothing in zip(held["runs"], ("0.9", "0.0", "0.0", "0.1"), strict=True):
        run |= {"cell": f"smoothing={smoothing}", "options": {"model.label_smoothing": smoothing}}
    (folder / "found.json").write_text(json.dumps(held))
    assert tables.measured(recipe, folder) == "91.00 % top-1, 9.00 % error (2 seeds)"


def test_the_last_epoch_that_was_judged_counts(tables, tmp_path):
    recipe = recipes.find("cifar10_ho_resnet26_rk4")
    folder = write(tmp_path / "a", recipe, [0.9])
    held = json.loads((folder / "found.json").read_text())
    held["runs"][0]["epochs"].append({"train/loss": 1.0})
    held["runs"].append({**held["runs"][0], "epochs": [{"train/loss": 1.0}]})
    (folder / "found.json").write_text(json.dumps(held))
    assert tables.measured(recipe, folder) == "90.00 % top-1, 10.00 % error (1 seed)"


def test_the_page_names_every_recipe_and_every_row():
    text = (ROOT / "docs/pages/papers.md").read_text(encoding="utf-8")
    for name in recipes.names():
        assert f"| `recipe:{name}` |" in text
    for paper in recipes.PAPERS:
        assert f"## {paper.title}\n" in text
        for row in paper.rows:
            assert f"| {row.what} |" in text
