"""Mirror images and colours: picture and mask move together, and colours change as standard formulas say."""

import colorsys

import pytest
import torch

from odenets.segmentation import SegmentationAugment
from odenets.segmentation.augment import photometric_distortion, turned_colors

MEAN, STD = [0.2, 0.4, 0.6], [0.5, 0.25, 0.125]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_picture_and_mask_are_mirrored_together_and_about_half_of_them():
    y = torch.arange(12).view(1, 3, 4).expand(40, 3, 4)
    x = y[:, None].expand(40, 3, 3, 4).to(torch.uint8)
    a, b = SegmentationAugment(distort=False)(x, y, [0.0] * 3, [1 / 255] * 3, generator())
    assert torch.equal(a[:, 0].round().long(), b)
    mirrored = [bool((row == y[0].flip(1)).all()) for row in b]
    assert all(bool((row == y[0]).all()) or flag for row, flag in zip(b, mirrored, strict=True))
    assert 10 < sum(mirrored) < 30


def test_nothing_is_left_but_mean_and_deviation():
    x = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8, generator=generator())
    a, _ = SegmentationAugment(flip=0, distort=False)(x, torch.zeros(2, 4, 5), MEAN, STD)
    m, s = (torch.tensor(figures).view(3, 1, 1) for figures in (MEAN, STD))
    torch.testing.assert_close(a, (x / 255 - m) / s)


def test_hue_and_saturation_are_those_of_colorsys():
    x = torch.rand(5, 3, 2, 3, dtype=torch.float64, generator=generator())
    x[0, :, 0, 0], x[1, :, 0, 0] = 0.3, 0.0  # grey and black have no hue
    factor = torch.tensor([0.5, 1.5, 1.0, 0.0, 3.0], dtype=torch.float64).view(5, 1, 1, 1)
    turn = torch.tensor([0.1, -0.1, 0.0, 0.3, -0.5], dtype=torch.float64).view(5, 1, 1, 1)
    found = turned_colors(x, factor, turn)
    for n in range(5):
        for i in range(2):
            for j in range(3):
                hue, saturation, value = colorsys.rgb_to_hsv(*x[n, :, i, j].tolist())
                want = colorsys.hsv_to_rgb((hue + float(turn[n])) % 1, min(1, saturation * float(factor[n])), value)
                assert found[n, :, i, j].tolist() == pytest.approx(want, abs=1e-12)
    torch.testing.assert_close(found[2], x[2])


def test_distorted_pictures_stay_in_range_differ_and_follow_the_generator():
    x = torch.rand(64, 3, 4, 4, generator=generator(3))
    a = photometric_distortion(x, generator=generator(1))
    assert torch.equal(a, photometric_distortion(x, generator=generator(1)))
    assert not torch.equal(a, photometric_distortion(x, generator=generator(2)))
    assert a.min() >= 0 and a.max() <= 1
    # A sixteenth of the pictures draws none of the four.
    untouched = [bool(torch.allclose(p, q, atol=1e-5)) for p, q in zip(a, x, strict=True)]
    assert 0 < sum(untouched) < 16


def test_contrast_and_brightness_of_grey_pictures_are_a_line():
    """A grey picture has no saturation: levels become clamp(c * clamp(level + b)), in whatever order."""
    grey = torch.linspace(0.3, 0.6, 4).view(1, 1, 1, 4).expand(50, 3, 1, 4)
    found = photometric_distortion(grey, generator=generator())
    slope = (found[:, 0, 0, 1:] - found[:, 0, 0, :-1]) / 0.1
    assert torch.allclose(found[:, 0], found[:, 1], atol=1e-6) and torch.allclose(found[:, 0], found[:, 2], atol=1e-6)
    inside = (found[:, 0, 0] < 1).all(1)
    factor = slope[inside]
    assert torch.allclose(factor, factor[:, :1].expand_as(factor), atol=1e-4)
    assert factor.min() >= 0.5 - 1e-4 and factor.max() <= 1.5 + 1e-4 and (factor - 1).abs().max() > 0.2
    shift = found[inside, 0, 0, 0] / factor[:, 0] - 0.3
    assert shift.abs().max() <= 32 / 255 + 1e-4 and shift.abs().max() > 0.05


def test_refuses():
    with pytest.raises(ValueError, match="flip=2"):
        SegmentationAugment(flip=2)
    with pytest.raises(ValueError, match="1 channels"):
        photometric_distortion(torch.zeros(1, 1, 2, 2))
