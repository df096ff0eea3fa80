"""What the pictures of each experiment go through, as a whole.

Measured against timm's pipeline where it imports, and against a drawing of our own by the published rules.
"""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import odenets
from odenets.training import Augment, Images
from odenets.training import augment as A
from odenets.training import rand_augment as R

FOLDER = Path(odenets.__file__).parents[1] / "experiments"
WIDTH, HEIGHT, SIZE, N = 200, 150, 32, 700
# As published: ConvNeXt (arXiv 2201.03545, table 5, and its main.py), RevCol (arXiv 2212.11696, appendix), RDNet (arXiv
# 2403.19588, table A, with timm's default of an interpolation that is drawn), He et al. 2016 on CIFAR; ho_resnet50 has
# the crop and the flip of torchvision's ResNet-50.
LARGE = {"smallest": 0.08, "flip": 0.5, "erase": 0.25, "magnitude": (9, 0.5), "mixup": 0.8, "cutmix": 1.0}
RECIPES = {
    "convnext_tiny.yaml": LARGE | {"interpolation": "bicubic", "inner": 224 / 256},
    "revcol_tiny.yaml": LARGE | {"interpolation": "bicubic", "inner": 224 / 256},
    "rdnet_tiny.yaml": LARGE | {"interpolation": "random", "inner": 0.9},
    "ho_resnet50.yaml": {"smallest": 0.08, "flip": 0.5, "interpolation": "bilinear", "inner": 224 / 256},
}
# Fine-tuning, as released: the same without mixing, and evaluation that sees the whole of a larger picture.
FINE = {key: value for key, value in LARGE.items() if key not in ("mixup", "cutmix")}
RECIPES |= {
    "convnext_base_from_22k.yaml": FINE | {"interpolation": "bicubic", "inner": 224 / 256},
    "revcol_base_from_22k.yaml": FINE | {"interpolation": "bicubic", "inner": 1.0},
    "rdnet_large_384.yaml": FINE | {"interpolation": "random", "inner": 1.0},
    "fine_tune_cifar100.yaml": {"smallest": 0.08, "flip": 0.5, "interpolation": "bicubic", "inner": 224 / 256},
}
CIFAR = {"shift": 4, "flip": 0.5}


def data_of(name: str) -> dict | None:
    data = yaml.safe_load((FOLDER / name).read_text()).get("data", {})
    return data["init_args"] if data.get("class_path", "").endswith(".Images") else None


PICTURES = {path.name: spec for path in sorted(FOLDER.glob("*.yaml")) if (spec := data_of(path.name)) is not None}
NAMES = {
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "brightness": "BrightnessIncreasing",
    "contrast": "ContrastIncreasing",
    "rotate": "Rotate",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
    "color": "ColorIncreasing",
    "sharpness": "SharpnessIncreasing",
}


def place(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Red is the column and green the row, as shares of the sides."""
    a = np.zeros((height, width, 3), np.uint8)
    a[..., 0], a[..., 1] = np.linspace(0, 255, width).round(), np.linspace(0, 255, height).round()[:, None]
    return Image.fromarray(a)


def grey(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    return Image.new("RGB", (width, height), (128, 128, 128))


def module(folder: Path, name: str, picture: Image.Image, size: int | None = SIZE, **off) -> Images:
    """The data module of an experiment on copies of one picture, with some of its augmentation turned off."""
    spec = dict(PICTURES[name])
    augment = spec.pop("augment")["init_args"] | off
    folder = folder / f"{name}-{len(list(folder.iterdir()))}"
    for kind in ("train/a", "train/b", "val/a", "val/b"):
        (folder / kind).mkdir(parents=True)
        picture.save(folder / kind / "x.bmp")
    options = {} if size is None else {"size": size}
    data = Images(**spec | options | {"root": str(folder), "num_workers": 0}, augment=Augment(**augment))
    data.setup("fit")
    return data


def batch(data: Images, n: int = N) -> torch.Tensor:
    torch.manual_seed(0)
    x, y = data.sets["train"].__getitems__([i % 2 for i in range(n)])
    return data.augment(x, y, [0.0] * 3, [1.0] * 3, 2)[0]


def boxes(x: torch.Tensor) -> dict[str, float]:
    """Means of what pictures of places show: area, aspect, flips, and where."""
    lo, hi, span = 4, SIZE - 5, SIZE - 9
    across, down = (x[:, 0, SIZE // 2, hi] - x[:, 0, SIZE // 2, lo]), (x[:, 1, hi, SIZE // 2] - x[:, 1, lo, SIZE // 2])
    wide, high = across.abs() * SIZE / span, down.abs() * SIZE / span
    aspect = (wide * WIDTH / (high * HEIGHT)).log()
    return {
        "area": float((wide * high).mean()),
        "area, spread": float((wide * high).std()),
        "log aspect": float(aspect.mean()),
        "log aspect, spread": float(aspect.std()),
        "flips": float((across < 0).float().mean()),
        "place, spread": float(x[:, 0, SIZE // 2, SIZE // 2].std()),
    }


def erased(x: torch.Tensor) -> dict[str, float]:
    """Of pictures of one grey: the share that is erased somewhere, and the erased boxes' area and aspect."""
    held = (x - x[:, :, :1, :1].median()).abs().amax(1) > 0.02
    some = held.flatten(1).any(1)
    rows, cols = (held[some].any(axis).sum(1).float() for axis in (2, 1))
    return {
        "erased": float(some.float().mean()),
        "area": float((rows * cols).mean() / SIZE**2) if some.any() else 0.0,
        "log aspect, spread": float((rows / cols).log().std()) if some.sum() > 1 else 0.0,
    }


def published_boxes(recipe: dict, n: int = 6 * N) -> dict[str, float]:
    """The same figures by the published rule of drawing, with Python's own generator."""
    draw = random.Random(1)
    rows = []
    for _ in range(n):
        w, h = WIDTH, HEIGHT
        for _ in range(10):
            area, aspect = (
                draw.uniform(recipe["smallest"], 1) * WIDTH * HEIGHT,
                math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3))),
            )
            if round((area * aspect) ** 0.5) <= WIDTH and round((area / aspect) ** 0.5) <= HEIGHT:
                w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
                break
        middle = (draw.randint(0, WIDTH - w) + w / 2) / WIDTH
        rows.append((w * h / (WIDTH * HEIGHT), math.log(w / h), draw.random() < recipe["flip"], middle))
    area, aspect, flips, middle = (np.array(column, float) for column in zip(*rows, strict=True))
    figures = area.mean(), area.std(), aspect.mean(), aspect.std(), flips.mean(), middle.std()
    return dict(zip(boxes(torch.zeros(2, 3, SIZE, SIZE)), map(float, figures), strict=True))


def close(got: dict[str, float], want: dict[str, float], within: float = 0.045) -> None:
    """Equal to about three standard errors of N pictures."""
    apart = {k: (round(got[k], 3), round(want[k], 3)) for k in want if abs(got[k] - want[k]) > within}
    assert not apart, apart


def test_every_experiment_on_pictures_is_measured():
    cifar = {name for name in PICTURES if name.startswith("cifar")}
    assert PICTURES.keys() - cifar == RECIPES.keys() and cifar


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", RECIPES)
def test_crop_and_flip_are_those_of_the_recipe(tmp_path, name):
    off = dict.fromkeys(("rand_augment", "rand_augment_std", "erase", "mixup", "cutmix"), 0)
    recipe, data = RECIPES[name], module(tmp_path, name, place(), **off)
    got = boxes(batch(data))
    close(got, published_boxes(recipe))
    assert 0.40 < got["area"] < 0.46  # 0.43 where a box is drawn again, 0.53 where it is cut to fit, 0.25 with two cuts
    assert data.interpolation == recipe["interpolation"] and data.sets["val"].inner == pytest.approx(recipe["inner"])
    assert (data.augment.mixup, data.augment.cutmix) == (0, 0)


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", [name for name in RECIPES if "erase" in RECIPES[name]])
def test_erasing_is_that_of_the_recipe(tmp_path, name):
    off = dict.fromkeys(("rand_augment", "rand_augment_std", "mixup", "cutmix"), 0)
    got = erased(batch(module(tmp_path, name, grey(), **off)))
    draw = random.Random(1)
    rows = []
    while len(rows) < 4000:  # a box that does not fit is drawn again
        area, aspect = draw.uniform(0.02, 1 / 3) * SIZE**2, math.exp(draw.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if h < SIZE and w < SIZE:
            rows.append((h * w / SIZE**2, math.log(h / w)))
    area, aspect = np.array(rows).T
    close(got, {"erased": RECIPES[name]["erase"], "area": float(area.mean())})
    close(got, {"log aspect, spread": float(aspect.std())}, 0.1)


def drawn_strengths(data: Images, monkeypatch, n: int = 6000) -> dict[str, tuple[float, float, float]]:
    """Share, and mean and spread of the absolute strength, of each operation that training pictures get."""
    seen = {}

    def keep(x, kinds, strengths, fill):
        seen.update(kinds=kinds, strengths=strengths)
        return x

    monkeypatch.setattr(R, "operate", keep)
    torch.manual_seed(0)
    data.augment(torch.zeros(n, 3, 2, 2, dtype=torch.uint8), torch.zeros(n, dtype=torch.long), [0.5] * 3, [1.0] * 3, 2)
    found = {}
    for number, name in enumerate(R.OPERATIONS):
        s = seen["strengths"][seen["kinds"] == number].abs()
        found[name] = float((seen["kinds"] == number).float().sum() / n), float(s.mean()), float(s.std())
    return found


@pytest.mark.parametrize("name", [name for name in RECIPES if "magnitude" in RECIPES[name]])
def test_magnitudes_are_those_of_the_recipe(tmp_path, name, monkeypatch):
    found = drawn_strengths(module(tmp_path, name, grey(8, 8), size=None), monkeypatch)
    level, std = RECIPES[name]["magnitude"]
    m = np.clip(np.random.default_rng(0).normal(level, std, 50_000), 0, 10)
    expected = {"rotate": 3 * m, "shear_x": 0.03 * m, "translate_y": 0.045 * m, "solarize_add": np.floor(11 * m)}
    expected |= {"posterize": np.maximum(4 - np.floor(0.4 * m), 1), "solarize": 256 - np.floor(25.6 * m)}
    for operation, (share, mean, spread) in found.items():
        assert share == pytest.approx(2 * 0.5 / 15, abs=0.015), operation
        if operation in expected:
            s = expected[operation]
            assert mean == pytest.approx(s.mean(), rel=0.03, abs=0.02) and spread == pytest.approx(
                s.std(), rel=0.2, abs=0.06
            )


@pytest.mark.parametrize("name", [name for name in PICTURES if name.startswith("cifar")])
def test_cifar_pictures_are_shifted_and_flipped(tmp_path, name):
    data = module(tmp_path, name, place(32, 32), size=None)
    x = (batch(data) * 31).round()  # columns and rows; 0 is also what moves in
    assert x.shape == (N, 3, 32, 32)
    left, right, upper = x[:, 0, 16, 12], x[:, 0, 16, 19], x[:, 1, 12, 16]
    flipped = right < left
    across, down = torch.where(flipped, left - 19, left - 12), upper - 12
    for shift in (across, down):
        counts = torch.bincount((shift + 4).long(), minlength=9) / N
        assert len(counts) == 9 and (counts - 1 / 9).abs().max() < 0.05
    assert float(flipped.float().mean()) == pytest.approx(CIFAR["flip"], abs=0.06)
    assert data.augment.crop == CIFAR["shift"] and not (data.augment.rand_augment or data.augment.erase)


# --- beside timm ------------------------------------------------------------------------------------------------------


def timm_transform(recipe: dict, **off):
    timm_data = pytest.importorskip("timm.data")
    level, std = recipe.get("magnitude", (0, 0))
    policy = f"rand-m{level}-mstd{std}-inc1" if level and not off.get("plain") else None
    return timm_data.create_transform(
        off.get("size", SIZE),
        is_training=True,
        scale=(recipe["smallest"], 1.0),
        hflip=recipe["flip"],
        color_jitter=None,
        auto_augment=policy,
        interpolation=recipe["interpolation"],
        re_prob=recipe.get("erase", 0.0),
        re_mode="pixel",
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
    )


@pytest.mark.parametrize("name", RECIPES)
def test_the_pipeline_measures_as_that_of_timm(tmp_path, name, monkeypatch):
    recipe = RECIPES[name]
    transform = timm_transform(recipe | {"erase": 0.0}, plain=True)
    random.seed(0), torch.manual_seed(0)
    picture = place()
    off = dict.fromkeys(("rand_augment", "rand_augment_std", "erase", "mixup", "cutmix"), 0)
    theirs = torch.stack([transform(picture) for _ in range(N)])
    close(boxes(batch(module(tmp_path, name, place(), **off))), boxes(theirs), 0.06)
    if "erase" in recipe:
        transform, picture = timm_transform(recipe, plain=True), grey()
        theirs = erased(torch.stack([transform(picture) for _ in range(N)]))
        got = erased(
            batch(module(tmp_path, name, grey(), **off | {"erase": PICTURES[name]["augment"]["init_args"]["erase"]}))
        )
        close(got, {k: theirs[k] for k in ("erased", "area")}, 0.05)
        assert got["log aspect, spread"] == pytest.approx(theirs["log aspect, spread"], abs=0.12)
    if "magnitude" in recipe:
        [policy] = [t for t in timm_transform(recipe).transforms if type(t).__name__ == "RandAugment"]
        seen: dict[str, list[float]] = {op.name: [] for op in policy.ops}
        for op in policy.ops:
            op.aug_fn = lambda img, *args, op=op, **kw: seen[op.name].append(args[0] if args else 0.0) or img
        for _ in range(6000):
            policy(picture)
        ours = drawn_strengths(module(tmp_path, name, grey(8, 8), size=None), monkeypatch)
        assert {NAMES[k] for k in ours} == seen.keys()
        for operation, (share, mean, spread) in ours.items():
            s = np.abs(seen[NAMES[operation]])
            assert share == pytest.approx(len(s) / 6000, abs=0.02), operation
            if operation not in ("auto_contrast", "equalize", "invert"):
                # 0 bits, a black picture, is where we differ on purpose: one bit stays.
                s = np.maximum(s, 1) if operation == "posterize" else s
                error = math.hypot(spread, s.std()) / len(s) ** 0.5
                assert abs(mean - s.mean()) < 4 * error + 1e-3 * s.mean(), operation
                assert spread == pytest.approx(s.std(), rel=0.25, abs=0.06), operation


def test_interpolation_is_as_the_recipe_says(tmp_path):
    """Of pictures that are cut and resized as told, bicubic overshoots where bilinear does not; random does in half."""
    a = np.zeros((375, 500, 3), np.uint8)
    a[:, ::8] = 200
    a[:, 1::8] = 200
    overshoot = {}
    for name in ("bilinear", "bicubic", "random"):
        for kind in ("train/a", "train/b", "val/a", "val/b"):
            (tmp_path / name / kind).mkdir(parents=True)
            Image.fromarray(a).save(tmp_path / name / kind / "x.png")
        data = Images(str(tmp_path / name), size=448, smallest_crop=0.9, interpolation=name, num_workers=0)
        data.setup("fit")
        x = data.sets["train"].__getitems__([i % 2 for i in range(24)])[0]
        overshoot[name] = float((x.amax((1, 2, 3)) > 200).float().mean())
        assert bool((data.sets["val"][0][0] > 200).any()) == (name != "bilinear")
    assert overshoot["bilinear"] == 0 and overshoot["bicubic"] == 1 and 0.1 < overshoot["random"] < 0.9


@pytest.mark.parametrize("size", [(64, 64), (60, 80), (20, 90)])
def test_boxes_on_the_batch_are_drawn_as_those_of_decoding(size):
    from odenets.training.decode import random_box

    torch.manual_seed(0)
    h, w = size
    ends = torch.linspace(0, 1, w).expand(h, w), torch.linspace(0, 1, h)[:, None].expand(h, w)
    x = A.random_resized_crop(torch.stack(ends)[None].expand(3000, 2, h, w), 32)
    wide, high = (x[:, 0, 16, 24] - x[:, 0, 16, 8]).abs() * 2, (x[:, 1, 24, 16] - x[:, 1, 8, 16]).abs() * 2
    drawn = torch.tensor([random_box(w, h) for _ in range(3000)]).float()
    share = (drawn[:, 2] - drawn[:, 0]) / w * (drawn[:, 3] - drawn[:, 1]) / h
    assert float((wide * high).mean()) == pytest.approx(float(share.mean()), abs=0.03)
    # The grid's last row and column of centres are half a pixel inside.
    assert float((wide / high).log().std()) == pytest.approx(
        float(((drawn[:, 2] - drawn[:, 0]) / (drawn[:, 3] - drawn[:, 1])).log().std()), abs=0.05
    )


def test_a_crop_that_the_augmentation_names_is_cut_once(tmp_path):
    for kind in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / kind).mkdir(parents=True)
        place().save(tmp_path / kind / "x.bmp")
    augment = Augment(resized_crop=0.08)
    data = Images(str(tmp_path), size=SIZE, num_workers=0, augment=augment)
    data.setup("fit")
    assert (data.smallest_crop, data.augment.resized_crop, augment.resized_crop) == (0.08, None, 0.08)
    assert 0.38 < boxes(batch(data, 300))["area"] < 0.48
    with pytest.raises(ValueError, match="two figures for one crop"):
        Images(str(tmp_path), size=SIZE, smallest_crop=0.3, augment=augment)
