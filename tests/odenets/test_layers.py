"""Layers: shapes, what they leave alone, and stochastic depth per sample."""

import pytest
import torch
from torch import nn

from odenets.layers import (
    BasicFunction,
    BottleneckFunction,
    ConvNeXtFunction,
    DropPath,
    PadShortcut,
    Projection,
    init_kaiming,
    linear_rates,
    scaled_width,
)
from odenets.layers.attention import PerceptronFunction


@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("build", [BasicFunction, BottleneckFunction])
@pytest.mark.parametrize(("out", "stride"), [(8, 1), (16, 2)])
def test_a_residual_function_makes_its_width_and_stride_and_leaves_its_argument_alone(build, order, out, stride):
    x = torch.randn(2, 8, 9, 9)
    kept = x.clone()
    y = build(8, out, stride, order=order)(x)
    assert y.shape == (2, out, 9 if stride == 1 else 5, 9 if stride == 1 else 5)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("build", [BasicFunction, BottleneckFunction])
def test_orders_are_the_written_out_formulas(build):
    x = torch.randn(2, 8, 6, 6)
    for order in ("post", "pre"):
        f = build(8, 8, order=order).train()
        y = x
        for j in range(1, f.convolutions + 1):
            conv, norm = getattr(f, f"conv{j}"), getattr(f, f"norm{j}")
            y = conv(norm(y).relu()) if order == "pre" else norm(conv(y if j == 1 else y.relu()))
        torch.testing.assert_close(f(x), y)


def test_a_bottleneck_refuses_a_width_that_it_cannot_quarter():
    with pytest.raises(ValueError, match="10 output channels, want a multiple of 4"):
        BottleneckFunction(8, 10)


def test_pad_shortcut_subsamples_and_pads_on_both_sides():
    x = torch.randn(1, 16, 5, 5)
    y = PadShortcut(16, 32, 2)(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any()
    assert PadShortcut(3, 6)(x[:, :3]).shape == (1, 6, 5, 5)
    with pytest.raises(ValueError, match="use Projection"):
        PadShortcut(32, 16)


def test_projection_has_a_norm_unless_told_otherwise():
    x = torch.randn(2, 4, 5, 5)
    assert Projection(4, 6, 2)(x).shape == (2, 6, 3, 3)
    plain = Projection(4, 6, norm=False)
    assert torch.equal(plain(x), plain.conv(x)) and len(list(plain.parameters())) == 1


def test_drop_path_drops_whole_samples_keeps_the_mean_and_does_nothing_in_eval():
    x = torch.ones(4000, 2, 3)
    y = DropPath(0.25)(x)
    first = y[:, :1, :1]
    assert torch.equal(y, first.expand_as(y))
    assert set(first.flatten().tolist()) == {0.0, torch.tensor(4 / 3).item()}
    assert abs(first.mean().item() - 1) < 0.04  # 4.4 standard deviations
    assert torch.equal(DropPath(0.25).eval()(x), x)
    assert not DropPath(1.0)(x).any()
    with pytest.raises(ValueError, match=r"1\.5, want a number from 0 to 1"):
        DropPath(1.5)


def test_drop_rates_grow_evenly():
    assert linear_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert linear_rates(0.3, 1) == [0.0]


def test_kaiming_has_the_stated_spread():
    net = nn.Sequential(nn.Conv2d(64, 256, 3), nn.Linear(256, 64))
    before = net[1].weight.clone()
    init_kaiming(net, "fan_out")
    assert net[0].weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.02)
    assert torch.equal(net[1].weight, before)
    init_kaiming(net, "fan_in", linear=True)
    assert net[0].weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert net[1].weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)


@pytest.mark.parametrize("percent", [7, 14, 28, 29, 55, 57, 58, 115, 435])
def test_a_width_is_the_exact_product_of_the_factor_as_written(percent):
    factor, dim = percent / 100, 100
    assert [scaled_width(width, factor) for width in range(1, 2000)] == [w * percent // 100 for w in range(1, 2000)]
    assert ConvNeXtFunction(dim, expansion=factor).fc1.out_features == percent
    assert PerceptronFunction(dim, factor).fc1.out_features == percent
    assert ConvNeXtFunction(dim, expansion=factor, divisor=4).fc1.out_features == percent // 4 * 4


@pytest.mark.parametrize("factor", [0.25, 0.5, 1, 1.5, 3, 4.0, 1 / 3, 8 / 3, 2 / 3])
@pytest.mark.parametrize("divisor", [1, 8])
def test_simple_fractions_of_a_width_are_those_fractions(factor, divisor):
    sixths = round(6 * factor) if factor != 0.25 else None
    for width in range(12, 4000, 12):
        want = width // 4 if sixths is None else width * sixths // 6
        assert scaled_width(width, factor, divisor) == want // divisor * divisor
