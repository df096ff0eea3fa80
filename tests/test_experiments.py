"""Every experiment file runs one batch of training and validation on small synthetic pictures or texts."""

import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scripts import load
from training.pictures import write_folder, write_parquet
from training.texts import write_texts

from odenets import shapes
from odenets.training.command import run
from schemes import SchemeError

FILES = sorted((Path(__file__).parents[1] / "experiments").glob("*.yaml"))
# Options that shorten the run: fewer functions and channels. The rest of each file is used unchanged.
CHEAPER = {
    "cifar10_ho_resnet": ["--model.net.functions", "[4, 4, 4]", "--model.net.widths", "[4, 8, 16]"],
    "cifar100_ho_resnet": ["--model.net.functions", "[4, 4, 4]", "--model.net.widths", "[4, 8, 16]"],
    "synthetic_translation": ["--data.sentences", "200"],
    "wmt_translation": [
        *("--model.net.dim", "16", "--model.net.heads", "2", "--model.net.columns", "2"),
        *("--model.net.decoder_layers", "1", "--data.batch_size", "4"),
    ],
    "cifar10_revcol": ["--model.net.channels", "[4, 8, 16]", "--model.net.blocks", "[1, 1, 1]"],
    "cifar10_revnet110": ["--model.net.units", "[2, 2, 2]", "--model.net.widths", "[8, 8, 16, 32]"],
    "cifar10_resnet110": ["--model.net.functions", "[2, 2, 2]", "--model.net.widths", "[4, 8, 16]"],
    "cifar10_densenet_bc100": ["--model.net.functions", "[2, 2, 2]", "--model.net.growth", "4"],
    "convnext_tiny": ["--model.net.widths", "[4, 8, 16, 32]", "--data.size", "64", "--data.num_workers", "0"],
    "rdnet_tiny": [
        *("--model.net.growths", "[4, 4, 4, 4, 4, 4, 4]", "--model.net.init_channels", "16"),
        *("--data.size", "64", "--data.num_workers", "0"),
    ],
    "revcol_tiny": [
        *("--model.net.channels", "[4, 8, 16, 32]", "--model.net.blocks", "[1, 1, 1, 1]"),
        *("--data.size", "64", "--data.num_workers", "0"),
    ],
    "coco_deformable_revcol_tiny": [
        *("--model.net.channels", "[4, 8, 16, 32]", "--model.net.blocks", "[1, 1, 1, 1]", "--model.head.width", "32"),
        *("--model.head.heads", "4", "--model.head.encoder_layers", "1", "--model.head.decoder_layers", "2"),
        *("--data.size", "64", "--data.scales", "[64]", "--data.num_workers", "0", "--model.head.queries", "10"),
    ],
    "shapes_rtdetr": ["--model.head.queries", "10", "--data.batch_size", "4"],
    "convnext_base_from_22k": [
        *("--model.net.functions", "[1, 1, 3, 1]", "--model.net.widths", "[4, 8, 16, 32]"),
        *("--data.size", "64", "--data.num_workers", "0"),
    ],
    "rdnet_large_384": [
        *(
            "--model.net.growths",
            "[4, 4]",
            "--model.net.downsample",
            "[false, true]",
            "--model.net.init_channels",
            "16",
        ),
        *("--data.size", "64", "--data.num_workers", "0"),
    ],
    "revcol_base_from_22k": [
        *("--model.net.channels", "[4, 8, 16, 32]", "--model.net.columns", "2"),
        *("--data.size", "64", "--data.num_workers", "0"),
    ],
    "fine_tune_cifar100": ["--model.net.name", "resnet18", "--data.size", "32", "--data.num_workers", "0"],
    "shapes_upernet": ["--data.train", "32", "--data.val", "16", "--data.size", "32"],
    "ade20k_upernet_revcol_tiny": [
        *("--model.net.options", "{channels: [4, 8, 16, 32], blocks: [1, 1, 1, 1]}", "--model.net.width", "8"),
        *("--data.short", "32", "--data.crop", "32", "--data.num_workers", "0", "--model.inference.window", "32"),
        *("--model.inference.stride", "16", "--trainer.precision", "32", "--data.batch_size", "4"),
    ],
    "ho_resnet50": ["--model.net.widths", "[4, 8, 16, 32]", "--data.size", "64", "--data.num_workers", "0"],
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pictures")
    for name, classes, key in (("cifar10", 10, "label"), ("cifar100", 100, "fine_label")):
        write_parquet(root / name / "train.parquet", 2 * classes, classes, label_key=key)
        write_parquet(root / name / "test.parquet", classes, classes, label_key=key)
    write_folder(root / "imagenet", 3, 4, size=(120, 100))
    shapes.write(root / "shapes", {"train": 8, "val": 2}, size=32)
    write_texts(root / "wmt" / "train.parquet", 8)
    write_texts(root / "wmt" / "validation.parquet", 4)
    return {
        "cifar10": root / "cifar10",
        "cifar100": root / "cifar100",
        "ho_resnet50": root / "imagenet",
        "convnext_tiny": root / "imagenet",
        "rdnet_tiny": root / "imagenet",
        "revcol_tiny": root / "imagenet",
        "fine_tune_cifar100": root / "cifar100",
        "convnext_base_from_22k": root / "imagenet",
        "rdnet_large_384": root / "imagenet",
        "revcol_base_from_22k": root / "imagenet",
        "wmt_translation": root / "wmt",
        "coco_deformable_revcol_tiny": root / "shapes",
        "shapes_rtdetr": root / "shapes",
        "ade20k_upernet_revcol_tiny": root / "shapes",
    }


@pytest.mark.cases(2)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_runs(file, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["fit", "-c", str(file), "--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"]
    args += [*CHEAPER.get(file.stem, []), "--trainer.enable_progress_bar", "false"]
    root = pictures.get(file.stem, pictures.get(file.stem.split("_")[0]))
    command = run([*args, *(["--data.root", str(root)] if root else [])])
    figure = getattr(command.model, "monitor", "val/acc")
    assert command.trainer.global_step == 1 and figure in command.trainer.callback_metrics


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_opens_with_its_command_what_to_expect_and_on_what(file):
    head = re.match(r"(#.*\n)+", file.read_text())
    assert head and head[0].startswith(f"# lightning fit -c experiments/{file.name}")
    assert "Expect:" in head[0] and "Hardware:" in head[0]


def test_the_usual_files_are_there():
    assert {"quickstart", "cifar10_ho_resnet", "cifar10_resnet", "cifar100_ho_resnet", "ho_resnet50"} <= {
        file.stem for file in FILES
    }


@pytest.fixture(scope="module")
def depth():
    """The script of the experiment with weights as functions of depth, and its committed lines."""
    script = load("experiments/benchmarks/depth_is_time.py")
    return script, script.lines(FILES[0].parent / "results/depth_is_time.jsonl")


TABLES = ["arms", "otherwise", "distances", "fits", "projected", "fitted"]


@pytest.mark.parametrize("name", TABLES)
def test_runs_of_several_settings_are_in_no_table(depth, name):
    script, rows = depth
    assert list(script.TABLES) == TABLES and "|" in script.TABLES[name](rows)
    other = {**rows[0], "settings": {**rows[0]["settings"], "epochs": 2}}
    with pytest.raises(SchemeError, match="of 2 settings") as e:
        script.TABLES[name]([*rows, other])
    assert len(str(e.value).splitlines()) == 2


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("arms", [(), ("spline euler",), ("separate euler",)], ids=len)
def test_tables_of_a_file_that_has_just_begun(depth, name, arms):
    """Some arms have no line yet."""
    script, rows = depth
    assert isinstance(script.TABLES[name]([r for r in rows if r["arm"] in arms]), str)


def test_a_report_of_no_lines_says_so(depth, tmp_path):
    with pytest.raises(SchemeError, match="holds no line") as e:
        depth[0].report(SimpleNamespace(file=tmp_path / "none.jsonl", pictures=None))
    assert len(str(e.value).splitlines()) == 2


def test_learned_steps_are_those_of_the_last_checkpoints(tmp_path, monkeypatch):
    script = load("experiments/benchmarks/learned_steps.py")
    statuses = {0: "trained", 1: "trained", 2: "failed"}
    runs = {seed: script.Run(f"seed {seed}", "step=learned", seed, {}) for seed in statuses}
    lines = [{**asdict(runs[seed]), "status": status} for seed, status in statuses.items()]
    monkeypatch.setattr(script, "find", lambda folder: SimpleNamespace(lines=lines))
    for seed in (0, 1):
        # In the order of text, step 10 would precede step 2.
        sizes = {
            f"net.levels.{level}.steps.{n}.h": torch.tensor(seed + level + n / 16)
            for level in (1, 0)
            for n in range(11)
        }
        path = script.folder_of(tmp_path, runs[seed]) / "checkpoints/last.ckpt"
        path.parent.mkdir(parents=True)
        torch.save({"state_dict": {**sizes, "net.levels.0.steps.0.fs.0.weight": torch.zeros(2)}}, path)
    found = script.sizes_of(tmp_path)
    assert found == {"step=learned": {str(s): [[s + k + n / 16 for n in range(11)] for k in (0, 1)] for s in (0, 1)}}
    assert "| step=learned | 2 | 11-11 | 8.94 ± 7.78 | 19.94 ± 7.78 |" in script.table(found)
