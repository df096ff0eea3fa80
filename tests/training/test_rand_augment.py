"""Each operation against PIL on any picture, and laws of what is drawn: independence, seeds, ranges, nothing at 0."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from odenets.training import augment as A
from odenets.training import rand_augment as R

seeds = st.integers(0, 2**31 - 1)
magnitudes = st.floats(0, 10, width=32)
signs = st.sampled_from([-1.0, 1.0])
BILINEAR = Image.Resampling.BILINEAR


@st.composite
def batches(draw, most: int = 5):
    """uint8 (n, 1 or 3, h, w), of all levels or of a few: narrow histograms are where tables have their corners."""
    n, c, h, w = (
        draw(st.integers(1, most)),
        draw(st.sampled_from([1, 3])),
        draw(st.integers(1, 24)),
        draw(st.integers(1, 24)),
    )
    low = draw(st.integers(0, 255))
    high = draw(st.integers(low, 255))
    g = generator(draw(seeds))
    return torch.randint(low, high + 1, (n, c, h, w), dtype=torch.uint8, generator=g)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def to_pil(x: torch.Tensor) -> Image.Image:
    return Image.fromarray(x[0].numpy() if len(x) == 1 else x.permute(1, 2, 0).contiguous().numpy())


def from_pil(picture: Image.Image) -> torch.Tensor:
    x = torch.from_numpy(np.array(picture))
    return x[None] if x.ndim == 2 else x.permute(2, 0, 1)


def kind(name: str) -> int:
    return R.OPERATIONS.index(name)


def strength(name: str, magnitude: float, sign: float = 1.0, increasing: bool = True) -> float:
    return R.strengths_of(torch.tensor(magnitude), torch.tensor(sign), increasing)[kind(name)].item()


def apply(x: torch.Tensor, name: str, s: float) -> torch.Tensor:
    return R.operate(x, torch.full((1, len(x)), kind(name)), torch.full((1, len(x)), s))


def solarize_add(picture: Image.Image, s: float) -> Image.Image:
    return picture.point([min(255, v + int(s)) if v < 128 else v for v in range(256)] * len(picture.getbands()))


PIL_LEVELS = {
    "auto_contrast": lambda picture, s: ImageOps.autocontrast(picture),
    "equalize": lambda picture, s: ImageOps.equalize(picture),
    "invert": lambda picture, s: ImageOps.invert(picture),
    "posterize": lambda picture, s: ImageOps.posterize(picture, int(s)),
    "solarize": lambda picture, s: ImageOps.solarize(picture, int(s)),
    "solarize_add": solarize_add,
}
PIL_ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "color": ImageEnhance.Color,
    "sharpness": ImageEnhance.Sharpness,
}


def test_every_operation_is_compared_with_pil():
    assert {*PIL_LEVELS, *PIL_ENHANCERS, *R.GEOMETRIC} == set(R.OPERATIONS) and len(R.OPERATIONS) == 15


@pytest.mark.parametrize("name", PIL_LEVELS)
@given(x=batches(), magnitude=magnitudes, increasing=st.booleans())
def test_levels_equal_those_of_pil(name, x, magnitude, increasing):
    s = strength(name, magnitude, 1.0, increasing)
    for out, picture in zip(apply(x, name, s), x, strict=True):
        assert torch.equal(out, from_pil(PIL_LEVELS[name](to_pil(picture), s)))


@pytest.mark.parametrize("name", PIL_LEVELS)
@pytest.mark.parametrize("magnitude", range(11))
def test_levels_equal_those_of_pil_where_every_level_occurs_unevenly(name, magnitude):
    x = (torch.rand(1, 3, 64, 80) ** 2 * 256).to(torch.uint8)
    x[0, :, 0, :] = torch.arange(120, 200)
    s = strength(name, magnitude)
    assert torch.equal(apply(x, name, s)[0], from_pil(PIL_LEVELS[name](to_pil(x[0]), s)))


@pytest.mark.parametrize("name", PIL_ENHANCERS)
@given(x=batches(), magnitude=magnitudes, sign=signs, increasing=st.booleans())
def test_enhancers_equal_those_of_pil_to_one_level(name, x, magnitude, sign, increasing):
    s = strength(name, magnitude, sign, increasing)
    for out, picture in zip(apply(x, name, s), x, strict=True):
        expected = from_pil(PIL_ENHANCERS[name](to_pil(picture)).enhance(s))
        assert (out.int() - expected.int()).abs().max() <= 1


def matrix(name: str, s: float, h: int, w: int) -> tuple[float, ...]:
    """PIL's (a, b, c, d, e, f): the result at (u, v) is the picture at (a u + b v + c, d u + e v + f)."""
    if name == "rotate":
        cos, sin = math.cos(math.radians(s)), math.sin(math.radians(s))
        return cos, -sin, w / 2 - cos * w / 2 + sin * h / 2, sin, cos, h / 2 - sin * w / 2 - cos * h / 2
    return {
        "shear_x": (1, s, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, s, 1, 0),
        "translate_x": (1, 0, s * w, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, s * h),
    }[name]


@pytest.mark.parametrize("name", R.GEOMETRIC)
@given(x=batches(), magnitude=magnitudes, sign=signs)
def test_geometry_equals_that_of_pil_to_one_level(name, x, magnitude, sign):
    s, (h, w) = strength(name, magnitude, sign), x.shape[2:]
    a, b, c, d, e, f = matrix(name, s, h, w)
    v, u = torch.meshgrid(torch.arange(h).double() + 0.5, torch.arange(w).double() + 0.5, indexing="ij")
    across, down = a * u + b * v + c, d * u + e * v + f
    # Which side of the picture's edge a point exactly on it falls on is a matter of rounding.
    edges = [(across / w).abs(), (across / w - 1).abs(), (down / h).abs(), (down / h - 1).abs()]
    off_edge = torch.stack(edges).amin(0) > 1e-4
    for out, picture in zip(apply(x, name, s), x, strict=True):
        pil, fill = to_pil(picture), 128 if len(picture) == 1 else (128, 128, 128)
        if name == "rotate":
            moved = pil.rotate(s, BILINEAR, fillcolor=fill)
        else:
            moved = pil.transform(pil.size, Image.Transform.AFFINE, (a, b, c, d, e, f), BILINEAR, fillcolor=fill)
        difference = (out.int() - from_pil(moved).int()).abs()
        assert (difference * off_edge).max() <= 1


@pytest.mark.parametrize("name", R.GEOMETRIC)
def test_geometry_mostly_equals_that_of_pil_on_a_large_picture(name):
    x = torch.randint(0, 256, (1, 3, 224, 200), dtype=torch.uint8)
    s = strength(name, 7.3)
    pil = to_pil(x[0])
    if name == "rotate":
        moved = pil.rotate(s, BILINEAR, fillcolor=(128,) * 3)
    else:
        coefficients = matrix(name, s, 224, 200)
        moved = pil.transform(pil.size, Image.Transform.AFFINE, coefficients, BILINEAR, fillcolor=(128,) * 3)
    difference = (apply(x, name, s)[0].int() - from_pil(moved).int()).abs()
    assert difference.max() <= 1 and (difference == 0).float().mean() > 0.9


@given(x=batches())
def test_what_moves_in_has_the_fill_of_its_channel(x):
    fill = [0.1, 0.5, 0.9][: x.shape[1]]
    out = R.operate(x, torch.full((1, len(x)), kind("translate_x")), torch.ones(1, len(x)), fill)
    expected = torch.tensor([26, 128, 230][: x.shape[1]], dtype=torch.uint8).view(1, -1, 1, 1)
    assert torch.equal(out, expected.expand_as(x))


@pytest.mark.parametrize("name", R.OPERATIONS)
@given(x=batches(), sign=signs)
def test_magnitude_0_changes_nothing_but_where_it_has_no_meaning(name, x, sign):
    out = apply(x, name, strength(name, 0.0, sign))
    if name == "posterize":
        assert torch.equal(out, x & 0b11110000)
    elif name not in ("auto_contrast", "equalize", "invert"):
        assert torch.equal(out, x)


def test_strengths_at_9_and_10_are_the_published_ones():
    shared = {"rotate": 27, "shear_x": 0.27, "shear_y": 0.27, "translate_x": 0.405, "translate_y": 0.405}
    shared |= {"solarize_add": 99}
    grown = {"posterize": 1, "solarize": 26, "brightness": 1.81, "contrast": 1.81, "color": 1.81, "sharpness": 1.81}
    for name, s in (shared | grown).items():
        assert strength(name, 9.0) == pytest.approx(s)
    for name in R.GEOMETRIC:
        assert strength(name, 9.0, -1.0) == -strength(name, 9.0)
    assert strength("color", 9.0, -1.0) == pytest.approx(0.19)
    fixed = {"posterize": 3, "solarize": 230, "brightness": 1.72, "contrast": 1.72, "color": 1.72, "sharpness": 1.72}
    for name, s in (shared | fixed).items():
        assert strength(name, 9.0, 1.0, False) == pytest.approx(s)
    assert strength("posterize", 10.0) == 1 and strength("posterize", 0.0, 1.0, False) == 1


@st.composite
def drawn(draw):
    x = draw(batches(6))
    g, shape = generator(draw(seeds)), (draw(st.integers(0, 3)), len(x))
    kinds = torch.randint(len(R.OPERATIONS) + 1, shape, generator=g)
    sign = torch.where(torch.rand(shape, generator=g) < 0.5, -1.0, 1.0)
    table = R.strengths_of(10 * torch.rand(shape, generator=g), sign)
    return x, kinds, table.gather(-1, kinds.clamp(max=14)[..., None])[..., 0]


@given(drawn(), seeds)
def test_a_picture_depends_on_its_own_draws_alone(batch, seed):
    x, kinds, strengths = batch
    before, out = x.clone(), R.operate(x, kinds, strengths)
    assert torch.equal(x, before) and out.shape == x.shape and out.dtype == x.dtype
    order = torch.randperm(len(x), generator=generator(seed))
    assert torch.equal(R.operate(x[order], kinds[:, order], strengths[:, order]), out[order])
    for i in range(len(x)):
        alone = slice(i, i + 1)
        assert torch.equal(R.operate(x[alone], kinds[:, alone], strengths[:, alone]), out[alone])


@given(drawn())
def test_rounds_follow_one_another(batch):
    x, kinds, strengths = batch
    step = x
    for i in range(len(kinds)):
        step = R.operate(step, kinds[i : i + 1], strengths[i : i + 1])
    assert torch.equal(step, R.operate(x, kinds, strengths))


@given(batches(), seeds, magnitudes, st.booleans())
def test_a_seed_repeats_and_floats_follow_bytes(x, seed, magnitude, increasing):
    def run(pictures):
        return R.rand_augment(pictures, magnitude, 0.5, increasing=increasing, generator=generator(seed))

    out = run(x)
    assert torch.equal(out, run(x)) and out.shape == x.shape and out.dtype == torch.uint8
    for dtype in (torch.float32, torch.float64):
        floats = run(x.to(dtype) / 255)
        assert floats.dtype == dtype
        torch.testing.assert_close(floats, out.to(dtype) / 255)


@given(batches(), seeds)
def test_off_is_the_identity_to_the_bit(x, seed):
    for pictures in (x, torch.rand(x.shape, generator=generator(seed))):
        assert torch.equal(R.rand_augment(pictures, p=0.0, generator=generator(seed)), pictures)
        assert torch.equal(R.rand_augment(pictures, operations=0, generator=generator(seed)), pictures)
        g = generator(seed)
        assert torch.equal(R.color_jitter(pictures, 0.0, 0.0, 0.0, generator=g), pictures)
        assert torch.equal(g.get_state(), generator(seed).get_state())


def test_floats_that_no_operation_touches_stay_equal_to_the_bit():
    x = torch.rand(64, 1, 4, 4)
    out = R.rand_augment(x, operations=1, p=0.5)
    untouched = (out == x).all((1, 2, 3))
    assert 16 < untouched.sum() < 48
    assert torch.equal((out[~untouched] * 255).round() / 255, out[~untouched])


def test_draws_are_uniform_over_operations_independent_and_as_probable_as_asked(monkeypatch):
    seen = {}

    def keep(x, kinds, strengths, fill):
        seen.update(kinds=kinds, strengths=strengths)
        return x

    monkeypatch.setattr(R, "operate", keep)
    R.rand_augment(torch.zeros(20000, 1, 1, 1, dtype=torch.uint8), 9, 0.5, operations=2, p=0.6)
    kinds, strengths = seen["kinds"], seen["strengths"]
    shares = torch.stack([torch.bincount(row, minlength=16) for row in kinds]) / 20000
    assert shares.shape == (2, 16) and (shares[:, :15] - 0.6 / 15).abs().max() < 0.008
    assert (shares[:, 15] - 0.4).abs().max() < 0.015
    assert ((kinds[0] == 15) & (kinds[1] == 15)).float().mean() == pytest.approx(0.16, abs=0.015)
    degrees = strengths[kinds == kind("rotate")]
    assert (degrees > 0).float().mean() == pytest.approx(0.5, abs=0.06)
    assert degrees.abs().mean() == pytest.approx(27, abs=0.3) and degrees.abs().std() == pytest.approx(1.5, abs=0.2)
    assert degrees.abs().max() <= 30  # magnitudes are cut to 10


def test_without_a_generator_the_global_one_draws():
    x = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(R.color_jitter(R.rand_augment(x), 0.4, 0.4, 0.4))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


JITTERS = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "saturation": ImageEnhance.Color}


@pytest.mark.parametrize("names", [["brightness"], ["contrast"], ["saturation"], list(JITTERS)], ids="-".join)
@given(x=batches(), seed=seeds, span=st.floats(0.0625, 1, width=32))
def test_jitter_equals_that_of_pil(names, x, seed, span):
    out = R.color_jitter(x, **dict.fromkeys(names, span), generator=generator(seed))
    factors = 1 + span * (2 * torch.rand(3, len(x), generator=generator(seed)) - 1)
    # One level per step, which each later factor scales.
    allowed = 1 if len(names) == 1 else 1 + (1 + span) + (1 + span) ** 2
    for i, picture in enumerate(x):
        expected = to_pil(picture)
        for row, (name, enhancer) in enumerate(JITTERS.items()):
            if name in names:
                expected = enhancer(expected).enhance(factors[row, i].item())
        assert (out[i].int() - from_pil(expected).int()).abs().max() <= allowed


@given(batches(), seeds, st.floats(0.0625, 2, width=32))
def test_jitter_keeps_type_and_range_and_is_the_same_for_floats(x, seed, span):
    before = x.clone()
    out = R.color_jitter(x, span, span, span, generator=generator(seed))
    floats = R.color_jitter(x / 255, span, span, span, generator=generator(seed))
    assert torch.equal(x, before) and out.dtype == torch.uint8 and out.shape == x.shape
    assert floats.min() >= 0 and floats.max() <= 1
    assert (floats * 255 - out).abs().max() <= 0.51


def test_negative_jitter_factors_count_as_0():
    out = R.color_jitter(torch.rand(400, 1, 4, 4) / 2 + 0.25, contrast=100.0)
    even = out.amax((1, 2, 3)) - out.amin((1, 2, 3)) < 1e-6
    assert 150 < even.sum() < 250 and out[even].min() > 0.25


def test_jitter_factors_fill_their_range():
    x = torch.full((4000, 1, 1, 1), 0.5)
    out = R.color_jitter(x, brightness=0.4)
    assert 0.3 <= out.min() < 0.31 and 0.69 < out.max() <= 0.7 and abs(out.mean() - 0.5) < 0.01
    assert torch.equal(R.color_jitter(x, contrast=0.4, saturation=0.4), x)  # nothing to contrast, no colour


@given(batches(), seeds, st.booleans(), st.booleans())
def test_augment_chains_in_the_order_it_says_and_draws_nothing_where_off(x, seed, rand, jitter):
    mean, std = [0.1, 0.4, 0.6][: x.shape[1]], [0.5] * x.shape[1]
    y = torch.arange(len(x))
    given = {"rand_augment": 9, "rand_augment_std": 0.5} if rand else {}
    given |= {"color_jitter": 0.4} if jitter else {}
    augment = A.Augment(crop=1, flip=0.5, erase=0.5, mixup=0.8, **given, seed=seed)
    g = generator(seed)
    expected = A.random_flip(A.random_crop(x, 1, generator=g), 0.5, generator=g)
    if rand:
        expected = R.rand_augment(expected, 9, 0.5, 2, 0.5, True, fill=mean, generator=g)
    if jitter:
        expected = R.color_jitter(expected, 0.4, 0.4, 0.4, generator=g)
    expected = A.random_erasing(A.normalize(expected, mean, std), 0.5, generator=g)
    expected = A.mixup(expected, y, 0.8, 10, generator=g)
    out = augment(x, y, mean, std, 10)
    assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"rand_augment": 11},
        {"rand_augment": -1},
        {"rand_augment_std": -0.5, "rand_augment": 9},
        {"rand_augment_std": 0.5},
        {"color_jitter": -0.4},
        {"resized_crop": 8.0},
        {"resized_crop": -0.5},
        *(
            {name: math.nan}
            for name in ("crop", "flip", "resized_crop", "rand_augment", "color_jitter", "mixup", "cutmix")
        ),
        {"rand_augment_std": math.nan, "rand_augment": 9},
        {"mixup": math.inf},
    ],
)
def test_augment_refuses_figures_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        A.Augment(**wrong)


@pytest.mark.parametrize("wrong", [{"magnitude": 10.5}, {"std": -1}, {"p": 1.5}, {"operations": -1}])
def test_rand_augment_refuses_figures_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        R.rand_augment(torch.zeros(1, 1, 2, 2), **wrong)
    with pytest.raises(ValueError, match="contrast"):
        R.color_jitter(torch.zeros(1, 1, 2, 2), contrast=-0.1)
