"""Recipes of segmentation and detection: the published sizes and figures, and that small ones of each head run."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from odenets import recipes
from odenets.training.command import run
from odenets.training.schedules import Milestones

BELOW = [name for name in recipes.names() if name.startswith(("ade20k", "coco"))]

# Millions of parameters of the whole, from the authors' table; mIoU of one scale and of several.
UPERNET = {
    "tiny": (60, "46.0", "46.7"),
    "small": (82, "48.7", "49.6"),
    "base": (122, "49.1", "49.9"),
    "base_22k": (122, "52.6", "53.1"),
    "large_22k": (235, "53.2", "53.7"),
    "xlarge_22k": (391, "53.6", "54.0"),
}


@pytest.mark.cases(3)
@pytest.mark.parametrize("name", UPERNET)
def test_convnext_below_upernet_has_the_published_size(name):
    recipe = recipes.find(f"ade20k_upernet_convnext_{name}")
    with torch.device("meta"):
        net = recipe.build()
    millions, one, several = UPERNET[name]
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions
    assert [figure.split()[0] for _, figure in recipe.published] == [several, one]


def test_every_published_figure_is_a_row():
    """T to H of RevCol, T to B of RDNet; the heads of H."""
    figures = {figure.split(" m")[0].split(" b")[0] for name in BELOW for _, figure in recipes.find(name).published}
    ade = "47.4 / 47.6, 47.9 / 49.0, 49.0 / 50.1, 52.7 / 53.3, 53.4 / 53.7, 57.8 / 58.0, 61.0"
    ade += ", 47.6 / 48.6, 48.7 / 49.8, 49.6 / 50.5"
    coco = "50.8 / 44.0, 52.6 / 45.5, 53.0 / 45.9, 55.0 / 47.5, 55.9 / 48.4, 63.8, 47.5 / 42.4"
    assert {*ade.split(", "), *coco.split(", ")} <= figures
    assert {"51.6", "52.3", "52.9"} <= {figure[:4] for figure in figures}


@pytest.mark.parametrize("name", BELOW)
def test_rates_and_sizes_agree_within_a_row(name):
    recipe = recipes.find(name)
    settings = recipe.settings
    model, data = (settings[key]["init_args"] for key in ("model", "data"))
    net = model["net"]["init_args"]
    if name.startswith("ade20k"):
        side = data.get("crop", 512)
        assert f"{side} pixels" in recipe.size or "rdnet" in name
        assert model["inference"]["init_args"]["window"] == side
        assert data.get("short", 512) == side and data.get("longest", 2048) == 4 * side
        assert settings["trainer"]["max_steps"] == 160_000 and data["batch_size"] == 16
        net = net["options"] | {"model": net["model"]}
        assert ("revcol" in name) == ("backprop" in model["net"]["init_args"])
    else:
        assert settings["trainer"]["max_epochs"] == 36 and model["schedule"]["init_args"]["at"] == [0.75, 33 / 36]
        assert ("mask / " in recipe.published[0][1] or "/ mask" in recipe.published[0][1]) == data.get("masks", False)
    # A kernel that is not the published one of ImageNet takes its weights by padding.
    assert ("kernel_size" in net) == ("adapt" in settings) == ("kernel" in recipe.size)
    assert recipe.stage == "fine-tune" and "--weights FILE" in recipe.head
    assert any("begins" in d or "starts from" in d for d in recipe.differs)


def test_a_rise_before_the_milestones():
    schedule = Milestones((0.5, 0.75), warmup_steps=2)
    assert [schedule.factor_at(i, 8) for i in range(8)] == pytest.approx([0.5, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert Milestones((0.75,), warmup_steps=100).factor_at(3, 8) == 1
    with pytest.raises(ValueError, match="warmup_steps is -1"):
        Milestones(warmup_steps=-1)


SMALL = ["--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
SMALL += ["--trainer.enable_progress_bar", "false", "--data.num_workers", "0", "--data.batch_size", "2"]
BLOCKS = {"channels": [8, 16, 32, 64], "blocks": [1, 1, 1, 1], "columns": 2}
QUERIES = {"width": 32, "queries": 8, "decoder_layers": 2, "encoder_layers": 1, "heads": 2, "feedforward": 32}


@pytest.fixture
def ade20k(tmp_path):
    for split in ("training", "validation"):
        for folder, levels in (
            ("images", np.zeros((70, 90, 3))),
            ("annotations", np.arange(6300).reshape(70, 90) % 151),
        ):
            (tmp_path / folder / split).mkdir(parents=True)
            for n in range(2):
                Image.fromarray(levels.astype(np.uint8)).save(tmp_path / folder / split / f"{n}.png")
    return tmp_path


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "net"),
    [
        ("ade20k_upernet_revcol_huge", {"width": 16, "auxiliary_width": 16}),
        ("ade20k_mask2former_revcol_huge", {**QUERIES, "points": 32}),
    ],
)
def test_small_segmenters_run(ade20k, tmp_path, monkeypatch, name, net):
    monkeypatch.chdir(tmp_path)
    words = ["fit", "-c", f"recipe:{name}", "--data.root", str(ade20k), *SMALL, "--data.crop", "64"]
    words += ["--data.short", "64", "--model.inference.window", "64", "--model.inference.stride", "40"]
    words += [f"--model.net.{key}={value}" for key, value in net.items()]
    words += [f"--model.net.options.{key}={value}" for key, value in BLOCKS.items()]
    command = run(words)
    assert command.trainer.global_step == 1 and "val/mIoU" in command.trainer.callback_metrics
    assert command.model.layer_decay == 0.9 and command.model.body.columns.steps[0].fs[0].blocks[
        0
    ].dwconv.kernel_size == (7, 7)


@pytest.mark.long
def test_a_small_detector_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 30, 20], "area": 600, "iscrowd": 0}
    held = {"images": [{"id": 1, "file_name": "1.png", "width": 90, "height": 70}], "annotations": [box]}
    held["categories"] = [{"id": n + 1, "name": f"kind {n}"} for n in range(80)]
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (90, 70)).save(tmp_path / split / "1.png")
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(held))
    words = ["fit", "-c", "recipe:coco_detr_revcol_huge", "--data.root", str(tmp_path), *SMALL, "--data.size", "64"]
    words += ["--data.scales", "[64]", *(f"--model.head.{key}={value}" for key, value in QUERIES.items())]
    words += [f"--model.net.{key}={value}" for key, value in BLOCKS.items()]
    command = run(words)
    assert command.trainer.global_step == 1 and "val/AP" in command.trainer.callback_metrics
