"""The table of recipes: every row builds, has the published size, and is the configuration that is printed and run."""

import functools
import importlib
import inspect
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from training.pictures import write_folder, write_parquet

from odenets import recipes
from odenets.cli import main
from odenets.recipes.table import FILES, joined
from odenets.training.command import resolve, run
from schemes import MixingWarning, SchemeError

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
NAMES = recipes.names()


def test_the_table_has_its_rows_in_the_files_of_the_papers():
    assert len(NAMES) >= 80
    assert NAMES == [recipe.name for file in FILES for recipe in file.RECIPES]
    for file in FILES:
        for recipe in file.RECIPES:
            assert recipe.paper is file.PAPER
            assert recipe.published, f"{recipe.name} stands in no table"
            assert {where for where, _ in recipe.published} <= set(file.PAPER.shown), recipe.name


def test_every_table_and_figure_has_a_row():
    for paper in recipes.PAPERS:
        rows = {where for recipe in recipes.table().values() if recipe.paper is paper for where, _ in recipe.published}
        assert set(paper.shown) == rows | {row.shown for row in paper.rows}
        assert all(row.command or row.needs for row in paper.rows)


def test_no_name_stands_twice():
    one = recipes.find("rdnet_tiny")
    with pytest.raises(SchemeError, match="two recipes are named 'rdnet_tiny'"):
        joined([one, replace(one, size="T again")])


@pytest.mark.cases(6)
@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_builds_the_published_network(name):
    recipe = recipes.find(name)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", MixingWarning)
        net = recipe.build()
    assert net.num_classes == recipe.data.classes
    if recipe.parameters is not None:
        assert sum(p.numel() for p in net.parameters()) == recipe.parameters


def test_sizes_that_facts_give_are_compared():
    """Otherwise the test above would hold of nothing."""
    with_sizes = [r for r in recipes.table().values() if r.parameters]
    assert {r.family for r in with_sizes} >= {
        "HO-ResNet",
        "RevCol",
        "RDNet",
        "DenseNet",
        "ConvNeXt",
        "ResNet",
        "RevNet",
    }
    assert len(with_sizes) > 60


def test_the_printed_file_is_the_table():
    for name in NAMES:
        recipe = recipes.find(name)
        assert yaml.load(recipe.text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) == recipe.settings
        head = re.match(r"(#.*\n)+", recipe.text)
        assert head and head[0].startswith(f"# lightning fit -c recipe:{name} ")
        unwrapped = re.sub(r"\n# +", " ", head[0])
        for _, figure in recipe.published:
            assert figure in unwrapped


def test_settings_are_nobody_elses():
    one = recipes.find("revcol_tiny")
    changed = one.settings
    changed["model"]["init_args"]["net"]["init_args"]["channels"][0] = 1
    changed["trainer"]["max_epochs"] = 1
    assert one.settings["model"]["init_args"]["net"]["init_args"]["channels"][0] == 64
    assert (
        one.settings["trainer"]["max_epochs"] == recipes.find("revcol_small").settings["trainer"]["max_epochs"] == 300
    )


def full(config):
    """A configuration whose network has every option written out, without the names of folders."""
    net = config["model"]["init_args"].get("net")
    if not net:
        return config
    module, _, name = net["class_path"].rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    defaults = {key: p.default for key, p in parameters.items() if p.default is not p.empty}
    args = {**defaults, **net["init_args"]}
    # The data say it, whatever the file says.
    args.pop("num_classes", None)
    net["init_args"] = {key: list(value) if isinstance(value, tuple) else value for key, value in args.items()}
    return {key: value for key, value in config.items() if key != "run_dir"}


@functools.cache
def every():
    return {name: full(recipe.settings) for name, recipe in recipes.table().items()}


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_files_for_readers_are_the_table(path):
    text = path.read_text()
    config = full(yaml.safe_load(text))
    equal = {name for name, settings in every().items() if settings == config}
    shown = [recipe for recipe in recipes.table().values() if recipe.file == path.name]
    # A file that shows no recipe shows something else: what is a row is typed once.
    assert equal == {recipe.name for recipe in shown}
    for recipe in shown:
        for _, figure in recipe.published:
            # Some heads give accuracies where the table has errors.
            if found := re.match(r"(\d+\.\d+) % (error|top-1)", figure):
                assert found[1] in text or f"{100 - float(found[1]):.2f}" in text


def test_no_half_precision_where_it_leaves_nothing_of_the_stream():
    for recipe in recipes.table().values():
        if "verner8" in str(recipe.net["init_args"].get("scheme")):
            assert "precision" not in recipe.settings["trainer"], recipe.name


def test_every_recipe_names_a_file_that_exists():
    assert all((EXPERIMENTS / r.file).is_file() for r in recipes.table().values() if r.file)


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_takes_every_recipe(name):
    """Every option is one that exists, of a value that it can have; nothing is built."""
    found = resolve(["fit", "-c", f"recipe:{name}", "--data.root", "x"])
    assert found["run_dir"] == f"runs/{name}" and found["data"]["init_args"]["root"] == "x"
    net = recipes.find(name).settings["model"]["init_args"]["net"]
    assert found["model"]["init_args"]["net"]["class_path"] == net["class_path"]
    for key, value in net["init_args"].items():
        assert found["model"]["init_args"]["net"]["init_args"][key] == value


# One of each family, and what makes it small; all else is taken as it is.
SMALL = {
    "cifar10_ho_resnet58_verner8_scheduled": ["--model.net.widths", "[4, 8]"],
    "vit_tiny_nested": ["--model.net.depth", "2", "--model.net.dim", "12", "--model.net.heads", "2"],
    "revcol_tiny": ["--model.net.channels", "[4, 8, 16, 32]", "--model.net.blocks", "[1, 1, 1, 1]"],
    "revcol_tiny_unsupervised": ["--model.net.channels", "[4, 8, 16, 32]", "--model.net.blocks", "[1, 1, 1, 1]"],
    "multicolumn_tiny": ["--model.net.channels", "[4, 8, 16, 32]", "--model.net.blocks", "[1, 1, 1, 1]"],
    "revcol_vit_base_depth_init": [
        *("--model.net.dim", "12", "--model.net.heads", "2", "--model.net.columns", "2"),
        *("--model.net.blocks", "[1, 1]", "--model.net.patch", "8"),
    ],
    "rdnet_tiny_every4": [
        *("--model.net.growths", "[4, 4]", "--model.net.functions", "[2, 1]"),
        *("--model.net.downsample", "[false, true]", "--model.net.init_channels", "16"),
    ],
    "rdnet_roadmap_b": ["--model.net.step", "e"],
    "svhn_densenet40_k12": ["--model.net.functions", "[2, 2, 2]", "--model.net.growth", "4"],
    "convnext_base_ft384": ["--model.net.widths", "[4, 8, 16, 32]", "--model.net.functions", "[1, 1, 2, 1]"],
    "resnet50_to_convnext_layer_norm": [],
    "cifar10_resnet20": ["--model.net.functions", "[1, 1, 1]", "--model.net.widths", "[4, 8, 16]"],
    "cifar100_revnet38": ["--model.net.units", "[2, 2, 2]", "--model.net.widths", "[8, 8, 16, 32]"],
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for name, classes, key in (("cifar10", 10, "label"), ("cifar100", 100, "fine_label"), ("svhn", 10, "label")):
        splits = ("train", "test", "extra") if name == "svhn" else ("train", "test")
        for split in splits:
            write_parquet(root / name / f"{split}.parquet", 2 * classes, classes, label_key=key)
    write_folder(root / "imagenet", 3, 4, size=(120, 100))
    return root


def test_one_of_each_family_is_run():
    assert {recipes.find(name).family for name in SMALL} >= {
        re.sub(r" to .*|-\d+", "", r.family) for r in recipes.table().values()
    } - {"ViT"}  # HO-Net ViT is one


@pytest.mark.filterwarnings("ignore:.*sums residual functions")
@pytest.mark.cases(1)
@pytest.mark.parametrize("name", SMALL)
def test_one_of_each_family_runs(name, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = pictures / next((k for k in ("cifar100", "cifar10", "svhn") if name.startswith(k)), "imagenet")
    words = ["fit", "-c", f"recipe:{name}", "--data.root", str(folder), *SMALL[name], "--data.num_workers", "0"]
    words += ["--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"]
    words += ["--trainer.enable_progress_bar", "false", *(["--data.size", "64"] if folder.name == "imagenet" else [])]
    command = run(words)
    assert command.trainer.global_step == 1 and "val/acc" in command.trainer.callback_metrics


def test_the_command_prints_and_lists(capsys):
    main(["recipe", "rdnet_tiny"])
    assert capsys.readouterr().out == recipes.find("rdnet_tiny").text
    main(["recipe", "--list", "cifar10_densenet*"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipes.names("cifar10_densenet*") and len(lines) > 5
    assert any(re.search(r"DenseNet BC, L 100, k 12, CIFAR-10, train: 4\.51 % error$", line) for line in lines)
    main(["recipe", "--list"])
    assert len(capsys.readouterr().out.splitlines()) == len(NAMES)


@pytest.mark.parametrize(
    ("words", "first", "second"),
    [
        (["recipe", "rdnet_tny"], "there is no recipe 'rdnet_tny'", "Closest: rdnet_tiny"),
        (["recipe", "--list", "x*"], "no recipe is named like 'x*'", "odenets recipe --list"),
        (["recipe"], "wanted the name of one recipe, or --list", "odenets recipe --list"),
        (["recipe", "a", "--list"], "wanted the name of one recipe, or --list", "odenets recipe --list"),
        (["fit", "-c", "recipe:rdnet_tny"], "there is no recipe 'rdnet_tny'", "Closest: rdnet_tiny"),
        (["fit", "--config=recipe:rdnet_tny"], "there is no recipe 'rdnet_tny'", "Closest: rdnet_tiny"),
    ],
)
def test_errors_are_two_lines(words, first, second, capsys):
    with pytest.raises(SystemExit):
        main(words)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith(f"error: {first}") and lines[1].strip().startswith(second)


def test_a_word_that_is_no_configuration_stays():
    words = ["fit", "--data.root", "recipe:rdnet_tiny", "-c", "file.yaml", "--config=file.yaml"]
    assert recipes.written_out(words) == words
    named = recipes.written_out(["fit", "--config=recipe:rdnet_tiny"])
    assert named[1] == f"--config={recipes.find('rdnet_tiny').text}"


def test_all_that_a_recipe_says_of_its_training_is_in_its_file():
    for recipe in recipes.table().values():
        assert set(recipe.training) <= set(recipe.settings), recipe.name
    given = replace(recipes.find("revcol_small"), training={**recipes.find("revcol_small").training, "threads": 3})
    assert given.settings["threads"] == 3
