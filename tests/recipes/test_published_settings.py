"""Settings of recipes against tables of the papers and of the released configurations, typed once more from these."""

import pytest

from odenets import recipes

KEYS = ("lr", "decay", "epochs", "batch", "warmup", "least", "depth", "layer", "head", "ema", "clip", "mixup", "side")


def settings(name: str) -> dict:
    """What a recipe trains with, under the names of KEYS."""
    found = recipes.find(name).settings
    model, data, trainer = found["model"]["init_args"], found["data"]["init_args"], found["trainer"]
    net, augment = model["net"]["init_args"], data["augment"]["init_args"]
    optimizer, schedule = model["optimizer"]["init_args"], model["schedule"]["init_args"]
    averages = [
        c["init_args"]["decay"]
        for c in trainer.get("callbacks", [])
        if c["class_path"] == "odenets.training.MovingAverage"
    ]
    assert model["optimizer"]["class_path"] == "torch.optim.AdamW" and model["label_smoothing"] == 0.1
    assert (augment["rand_augment"], augment["rand_augment_std"], augment["erase"]) == (9, 0.5, 0.25)
    assert "color_jitter" not in augment and augment["flip"] == 0.5 and data["smallest_crop"] == 0.08
    return {
        "lr": optimizer["lr"],
        "decay": optimizer["weight_decay"],
        "epochs": trainer["max_epochs"],
        "batch": data["batch_size"] * trainer.get("accumulate_grad_batches", 1),
        "warmup": schedule["warmup"],
        "least": optimizer["lr"] * schedule.get("final", 0.0),
        "depth": net["drop_path_rate"],
        "layer": model.get("layer_decay", 1.0),
        "head": net.get("head_init_scale", 1.0),
        "ema": averages[0] if averages else 0.0,
        "clip": trainer.get("gradient_clip_val", 0.0),
        "mixup": (augment.get("mixup", 0.0), augment.get("cutmix", 0.0)),
        "side": data["size"],
    }


BOTH, NONE = (0.8, 1.0), (0.0, 0.0)
# Liu et al. 2022, tables 5 and 6 and appendix A.1; the least rate is the default of the released code.
CONVNEXT = {
    **{
        f"convnext_{size}": (4e-3, 0.05, 300, 4096, 20, 1e-6, rate, 1, 1, 0.9999, 0, BOTH, 224)
        for size, rate in {"tiny": 0.1, "small": 0.4, "base": 0.5, "large": 0.5}.items()
    },
    **{
        f"convnext_isotropic_{size}": (4e-3, 0.05, 300, 4096, 50, 1e-6, rate, 1, 1, 0.9999, 0, BOTH, 224)
        for size, rate in {"small": 0.1, "base": 0.2, "large": 0.5}.items()
    },
    **{
        f"convnext_{size}_22k": (4e-3, 0.05, 90, 4096, 5, 1e-6, rate, 1, 1, 0, 0, BOTH, 224)
        for size, rate in {"tiny": 0.0, "small": 0.0, "base": 0.1, "large": 0.1, "xlarge": 0.2}.items()
    },
    **{
        f"convnext_{size}_ft384": (5e-5, 1e-8, 30, 512, 0, 1e-6, rate, 0.7, 0.001, 0, 0, NONE, 384)
        for size, rate in {"base": 0.8, "large": 0.95}.items()
    },
    **{
        f"convnext_{size}_22k_ft{side}": (5e-5, 1e-8, 30, 512, 0, 1e-6, rate, 0.8, 0.001, ema, 0, NONE, side)
        for size, (rate, ema) in {
            **{"tiny": (0.0, 0), "small": (0.1, 0), "base": (0.2, 0), "large": (0.3, 0), "xlarge": (0.4, 0.9999)}
        }.items()
        for side in (224, 384)
    },
}
# github.com/megvii-research/RevCol, configs: rates of 1,024 pictures per step.
REVCOL = {
    "revcol_tiny": (1e-3, 0.05, 300, 1024, 20, 1e-6, 0.1, 1, 1, 0.9999, 0, BOTH, 224),
    "revcol_small": (1e-3, 0.05, 300, 1024, 20, 1e-6, 0.3, 1, 1, 0.9999, 0, BOTH, 224),
    "revcol_base": (1e-3, 0.05, 300, 1024, 20, 1e-8, 0.4, 1, 1, 0.9999, 5, BOTH, 224),
    "revcol_base_22k": (1.25e-4, 0.1, 90, 1024, 5, 1e-7, 0.3, 1, 1, 0, 10, BOTH, 224),
    "revcol_large_22k": (1.25e-4, 0.1, 90, 1024, 5, 1e-7, 0.3, 1, 1, 0, 10, BOTH, 224),
    "revcol_xlarge_22k": (1.25e-4, 0.1, 90, 1024, 5, 1e-7, 0.4, 1, 1, 0, 10, BOTH, 224),
    "revcol_base_22k_ft224": (1e-4, 1e-8, 30, 1024, 0, 2e-7, 0.2, 0.9, 0.001, 0, 10, NONE, 224),
    "revcol_base_22k_ft384": (1e-4, 1e-8, 30, 1024, 0, 2e-7, 0.2, 0.9, 0.001, 0, 10, NONE, 384),
    "revcol_large_22k_ft224": (5e-5, 1e-8, 30, 1024, 0, 2e-7, 0.3, 0.8, 0.001, 0, 10, NONE, 224),
    "revcol_large_22k_ft384": (5e-5, 1e-8, 30, 1024, 0, 2e-7, 0.3, 0.8, 0.001, 0, 10, NONE, 384),
    "revcol_xlarge_22k_ft384": (2e-5, 1e-8, 30, 1024, 0, 2e-7, 0.4, 0.8, 0.001, 0.9999, 10, NONE, 384),
    "revcol_huge_22k_ft640": (4e-5, 1e-8, 20, 1024, 0, 2e-8, 0.4, 0.8, 0.001, 0.9999, 100, NONE, 640),
}
# github.com/naver-ai/rdnet, train_configs and TRAINING.md: 64 (16) pictures on each of 4 GPUs, 2 (8) such per step.
RDNET = {
    **{
        f"rdnet_{size}": (1e-3, 0.05, 300, 512, 20, 1e-6, rate, 1, 1, 0, 0, BOTH, 224)
        for size, rate in {"tiny": 0.15, "small": 0.35, "base": 0.4, "large": 0.5}.items()
    },
    "rdnet_large_ft384": (2e-5, 1e-8, 30, 512, 5, 1e-6, 0.6, 0.7, 0.001, 0, 0, NONE, 384),
}


@pytest.mark.parametrize("published", [CONVNEXT, REVCOL, RDNET], ids=["convnext", "revcol", "rdnet"])
def test_recipes_have_the_published_settings(published):
    for name, row in published.items():
        expected = dict(zip(KEYS, row, strict=True))
        found = settings(name)
        for key in KEYS:
            assert found[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-15), (name, key)


def test_densenets_are_trained_as_section_4_says():
    """Huang et al. 2017, sections 4.1 and 4.2: dropout exactly where pictures are not augmented, SVHN in [0, 1]."""
    for name in recipes.names("*densenet*"):
        recipe = recipes.find(name)
        if recipe.family != "DenseNet":
            continue
        found = recipe.settings
        model, data = found["model"]["init_args"], found["data"]["init_args"]
        assert model["optimizer"]["init_args"] == {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
        batch = data["batch_size"] * found["trainer"].get("accumulate_grad_batches", 1)
        length, size = {"SVHN": (40, 64), "ImageNet-1K": (90, 256)}.get(recipe.data.name, (300, 64))
        assert (found["trainer"]["max_epochs"], batch) == (length, size), name
        at = model["schedule"]["init_args"].get("at", [1 / 3, 2 / 3])
        assert [round(length * share) for share in at] == ([30, 60] if length == 90 else [length / 2, length * 3 / 4])
        augmented = "augment" in data
        assert augmented == (recipe.data.name != "SVHN" and not name.endswith("_plain"))
        assert model["net"]["init_args"].get("drop_rate", 0.0) == (0.0 if augmented else 0.2), name
        if recipe.data.name == "SVHN":
            assert (data["mean"], data["std"], data["train_split"]) == ([0.0] * 3, [1.0] * 3, "train+extra")
