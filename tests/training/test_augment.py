"""Laws of the augmentation, for any batch: nothing at p = 0, involutions, label mass 1, shapes and types kept."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odenets.training import DataError
from odenets.training import augment as A

seeds = st.integers(0, 2**31 - 1)


@st.composite
def batches(draw, floats: bool | None = None):
    n, c, size = draw(st.integers(1, 6)), draw(st.sampled_from([1, 3])), draw(st.integers(4, 12))
    generator = torch.Generator().manual_seed(draw(seeds))
    x = torch.randint(0, 256, (n, c, size, size), dtype=torch.uint8, generator=generator)
    return x / 255 if (draw(st.booleans()) if floats is None else floats) else x


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(batches(), seeds)
def test_off_is_the_identity(x, seed):
    g = generator(seed)
    assert torch.equal(A.random_crop(x, 0, generator=g), x)
    assert torch.equal(A.random_flip(x, 0.0, generator=g), x)
    assert torch.equal(A.random_erasing(x, 0.0, generator=g), x)
    y = torch.zeros(len(x), dtype=torch.long)
    assert torch.equal(A.mixup(x, y, 0.0, 3, generator=g)[0], x)
    assert torch.equal(A.cutmix(x, y, 0.0, 3, generator=g)[0], x)


@pytest.mark.parametrize("share", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(8, 8), (8, 16), (16, 8)])
def test_a_resized_crop_keeps_the_shape_or_is_refused(shape, share):
    x, y = torch.rand(3, 2, *shape, generator=generator(0)), torch.zeros(3, dtype=torch.long)
    made = A.Augment(resized_crop=share)
    if share and shape != (8, 8):
        with pytest.raises(DataError, match=f"the pictures are {shape[1]}x{shape[0]}\n  Leave it out"):
            made(x, y, [0.0, 0.0], [1.0, 1.0], 2)
        return
    found = made(x, y, [0.0, 0.0], [1.0, 1.0], 2)[0]
    assert found.shape == x.shape and torch.equal(found, x) == (share in (None, 0.0, 1.0))


@given(batches(), seeds)
def test_flip_twice_is_the_identity_and_once_mirrors(x, seed):
    once = A.random_flip(x, 1.0, generator=generator(seed))
    assert torch.equal(once, x.flip(3))
    half = A.random_flip(x, 0.5, generator=generator(seed))
    assert torch.equal(A.random_flip(half, 0.5, generator=generator(seed)), x)


@given(batches(), seeds, st.integers(0, 4))
def test_each_crop_is_a_window_of_the_padded_picture(x, seed, padding):
    out = A.random_crop(x, padding, generator=generator(seed))
    assert out.shape == x.shape and out.dtype == x.dtype
    h, w = x.shape[2:]
    padded = torch.nn.functional.pad(x, (padding,) * 4)
    for picture, cropped in zip(padded, out, strict=True):
        windows = [picture[:, i : i + h, j : j + w] for i in range(2 * padding + 1) for j in range(2 * padding + 1)]
        assert any(torch.equal(cropped, window) for window in windows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
def test_normalize_is_as_exact_as_its_pictures(dtype):
    mean, std = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.201]
    x = torch.randint(0, 256, (2, 3, 4, 4), generator=generator(0)).to(dtype)
    x = x if dtype == torch.uint8 else x / 256
    m, s = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (mean, std))
    out = A.normalize(x, mean, std)
    assert out.dtype == (torch.float32 if dtype == torch.uint8 else dtype)
    want = (x.double() / (255 if dtype == torch.uint8 else 1) - m) / s
    assert float((out.double() - want).abs().max()) < 16 * torch.finfo(out.dtype).eps


def test_crops_differ_within_a_batch_and_reach_every_offset():
    x = torch.arange(64.0).view(1, 1, 8, 8).expand(400, 1, 8, 8)
    corners = A.random_crop(x + 1, 1)[:, 0, 3, 3]
    assert len(corners.unique()) == 9


@given(batches(), seeds, st.integers(1, 12))
def test_resized_crop_keeps_type_and_range(x, seed, size):
    out = A.random_resized_crop(x, size, generator=generator(seed))
    assert out.shape == (*x.shape[:2], size, size) and out.dtype == x.dtype
    assert out.float().min() >= x.float().min() - 1e-4 and out.float().max() <= x.float().max() + 1e-4


@given(batches(floats=True), seeds)
def test_resized_crop_of_everything_is_the_identity(x, seed):
    out = A.random_resized_crop(x, x.shape[-1], (1.0, 1.0), (1.0, 1.0), generator=generator(seed))
    torch.testing.assert_close(out, x, atol=1e-5, rtol=0)


@given(batches(floats=False))
def test_normalize_of_bytes_equals_that_of_floats(x):
    mean, std = [0.5] * x.shape[1], [0.25] * x.shape[1]
    expected = (x.double() / 255 - 0.5) / 0.25
    torch.testing.assert_close(A.normalize(x, mean, std).double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(A.normalize(x / 255, mean, std).double(), expected, atol=1e-5, rtol=0)
    assert x.dtype == torch.uint8


@given(batches(floats=True), seeds)
def test_erasing_changes_one_box_and_no_argument(x, seed):
    before = x.clone()
    out = A.random_erasing(x, 1.0, generator=generator(seed))
    assert torch.equal(x, before) and out.shape == x.shape
    for changed in (out != x).any(1):
        rows, cols = changed.any(1).nonzero(), changed.any(0).nonzero()
        assert 0 < changed.sum() == (rows.max() - rows.min() + 1) * (cols.max() - cols.min() + 1)


def test_boxes_are_as_high_and_wide_as_they_are_drawn():
    top, left, height, width = (torch.tensor(v) for v in ((0.0, 2.0, 5.0), (1.0, 0.0, 3.0), (3.0, 1.0, 2.0), (2, 4, 1)))
    masks = A._boxes(torch.zeros(3, 1, 7, 5), top, left, height, width)[:, 0]
    for n, mask in enumerate(masks):
        want = torch.zeros(7, 5, dtype=torch.bool)
        t, ll, h, w = (int(v[n]) for v in (top, left, height, width))
        want[t : t + h, ll : ll + w] = True
        assert torch.equal(mask, want)


alphas, names = st.sampled_from([0.2, 1.0, 3.0]), st.sampled_from(["mixup", "cutmix"])


@given(batches(floats=True), seeds, alphas, st.integers(2, 7), names)
def test_label_mass_is_one_and_pixels_come_from_the_batch(x, seed, alpha, classes, name):
    y = torch.arange(len(x)) % classes
    mixed, soft = getattr(A, name)(x, y, alpha, classes, generator=generator(seed))
    assert mixed.shape == x.shape and soft.shape == (len(x), classes) and soft.min() >= 0
    torch.testing.assert_close(soft.sum(1), torch.ones(len(x)))
    assert mixed.min() >= x.min() - 1e-6 and mixed.max() <= x.max() + 1e-6


def test_cutmix_weighs_labels_by_the_pixels_pasted():
    n = 16
    x = torch.arange(n).float().view(n, 1, 1, 1).expand(n, 1, 8, 8)
    mixed, soft = A.cutmix(x, torch.arange(n), 1.0, n, generator=generator(3))
    shares = torch.stack([(mixed == k).float().mean((1, 2, 3)) for k in range(n)], 1)
    torch.testing.assert_close(shares, soft)
    assert (soft.max(1).values < 1).any()


@given(st.integers(2, 9), seeds, alphas, st.integers(2, 7), names, st.booleans())
def test_labels_are_weighed_as_the_pictures_are(n, seed, alpha, classes, name, rows):
    """Of pictures whose channels say what class they are of: their means are the labels, however they were mixed."""
    y = torch.arange(n) % classes
    own = A.soft_labels(y, classes) * 0.7 + 0.3 / classes if rows else y
    x = A.soft_labels(own, classes)[:, :, None, None].expand(n, classes, 8, 6)
    mixed, soft = getattr(A, name)(x, own, alpha, classes, generator=generator(seed))
    torch.testing.assert_close(mixed.mean((2, 3)), soft)


@pytest.mark.cases(2)
@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_shares_are_those_of_a_beta_distribution(alpha, name):
    """Of mixup as they are; of CutMix those of a box of that area whose middle is anywhere, cut off at the border."""
    size, draws, numbers = 64, 1500, random.Random(1)
    x, y, draw = torch.zeros(2, 1, size, size), torch.tensor([0, 1]), generator(0)
    theirs = (getattr(A, name)(x, y, alpha, 2, generator=draw)[1] for _ in range(draws))
    # With two pictures, the partner is the picture itself in half of the draws, whose label stays whole.
    got = torch.stack([soft for soft in theirs if soft[0, 1] > 1e-4])[:, 0, 1].double().numpy()
    want = np.array([1 - numbers.betavariate(alpha, alpha) for _ in range(20_000)])
    if name == "cutmix":
        half = want**0.5 / 2
        middles = np.random.default_rng(0).random((2, len(want)))
        sides = [np.minimum(middle + half, 1) - np.maximum(middle - half, 0) for middle in middles]
        want = sides[0] * sides[1]
    want = want[want > 1e-4]
    for moment in (1, 2, 3):
        error = np.std(got**moment) / len(got) ** 0.5
        assert abs((got**moment).mean() - (want**moment).mean()) < 4 * error + 0.01, moment


def test_a_seed_repeats_and_another_one_does_not():
    x, y = torch.rand(32, 3, 8, 8), torch.arange(32) % 10
    chain = dict(crop=2, flip=0.5, erase=0.5, mixup=0.2, cutmix=1.0)
    first, same, other = (A.Augment(**chain, seed=s)(x, y, [0.5] * 3, [0.5] * 3, 10) for s in (1, 1, 2))
    assert torch.equal(first[0], same[0]) and torch.equal(first[1], same[1])
    assert not torch.equal(first[0], other[0])


def test_half_of_the_batches_are_blended_and_half_have_boxes_pasted():
    x, y = (torch.arange(16) % 2).float().view(16, 1, 1, 1).expand(16, 3, 8, 8), torch.arange(16)
    augment = A.Augment(mixup=1.0, cutmix=1.0, seed=0)
    blended = sum(bool((augment(x, y, [0.0] * 3, [1.0] * 3, 16)[0] % 1).any()) for _ in range(400))
    assert abs(blended - 200) < 5 * 10  # five standard deviations


def test_augment_without_options_only_normalises():
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    out, labels = A.Augment()(x, y, [0.5] * 3, [0.5] * 3, 10)
    assert torch.equal(labels, y) and torch.equal(out, A.normalize(x, [0.5] * 3, [0.5] * 3))


@pytest.mark.parametrize("wrong", [{"flip": 1.5}, {"erase": -0.1}, {"mixup": -1}, {"crop": -1}])
def test_figures_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        A.Augment(**wrong)
