"""RevNet and i-RevNet: published sizes, the written-out unit, inverse and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from odenets.layers import DropPath, PoolPadShortcut, SpaceToDepth
from odenets.models import IRevNet, RevNet, create_model
from odenets.models.revnet import REVNETS
from schemes import SchemeError

# Parameters and 10^9 multiply-adds at the published side, counted from the released configurations.
SIZES = {
    "revnet38": (464_890, 32, 0.0772),
    "revnet110": (1_729_194, 32, 0.2533),
    "revnet164": (1_748_778, 32, 0.2502),
    "revnet56_imagenet": (27_553_128, 224, 4.451),
    "revnet104_imagenet": (45_428_072, 224, 7.945),
}


def test_every_named_revnet_stands_in_the_table():
    assert set(SIZES) == set(REVNETS)


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_multiply_adds_are_the_published_ones(name):
    count, side, macs = SIZES[name]
    with torch.device("meta"):
        net = create_model(name).eval()
    assert sum(p.numel() for p in net.parameters()) == count
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.empty(1, 3, side, side, device="meta"))
    digits = 4 if macs < 1 else 3
    assert round(counter.get_total_flops() / 2e9, digits) == macs


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_a_level_is_the_written_out_units(block):
    net = RevNet((2, 2), (8, 8, 16), block=block).eval()
    picture = torch.randn(2, 3, 8, 8)
    x = net.stem(picture)
    for stride, transition, level in zip((1, 2), net.transitions, net.levels, strict=True):
        x1, x2 = x.chunk(2, 1)
        (step,) = transition.steps
        f, g = step.fs
        if block == "basic":
            a, b = (F.avg_pool2d(z, stride) for z in (x1, x2))
            zeros = a.new_zeros(len(a), (f.conv1.out_channels - a.shape[1]) // 2, *a.shape[2:])
            a, b = (torch.cat([zeros, z, zeros], 1) for z in (a, b))
        else:
            a, b = (h.conv(z) for h, z in zip(step.gs, (x1, x2), strict=True))
        y1 = a + f(x2)
        y2 = b + g(y1)
        for f, g in (step.fs for step in level.steps):
            y1 = y1 + f(y2)
            y2 = y2 + g(y1)
        x = torch.cat([y1, y2], 1)
    torch.testing.assert_close(net(picture), net.head(net.norm(x).mean((2, 3))))


@pytest.mark.parametrize("kind", [RevNet, IRevNet])
def test_reverse_mode_gives_the_gradients_and_statistics_of_stored_mode(kind):
    options = {"units": (2, 3), "drop_path_rate": 0.3}
    options |= {"widths": (8, 8, 16)} if kind is RevNet else {"width": 16}
    a, b = (kind(**options, backprop=mode).double() for mode in ("store", "reverse"))
    b.load_state_dict(a.state_dict())
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for net in (a, b):
        torch.manual_seed(1)
        net(x).square().sum().backward()
    ours, theirs = (torch.cat([p.grad.flatten() for p in net.parameters()]) for net in (b, a))
    assert (ours - theirs).norm() < 1e-10 * theirs.norm()
    for (key, p), q in zip(a.named_buffers(), b.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=key)


def test_the_picture_comes_back():
    net = IRevNet((2, 2, 1), 16, num_classes=3).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    net(x)  # moves the statistics away from their start
    with pytest.raises(SchemeError, match=r"net\.eval"):
        net.inverse(net.maps(x)[-1])
    net.eval()
    y = net.maps(x)[-1]
    assert y.shape == (2, 256, 4, 4)
    torch.testing.assert_close(net.inverse(y), x, rtol=0, atol=1e-9)
    patched = IRevNet((1, 1), 16, patch=2).double().eval()
    torch.testing.assert_close(patched.inverse(patched.maps(x)[-1]), x, rtol=0, atol=1e-9)


def test_shortcuts():
    x = torch.arange(32.0).view(1, 2, 4, 4)
    y = SpaceToDepth()(x)
    assert y[0, :, 0, 0].tolist() == [0, 16, 1, 17, 4, 20, 5, 21]
    assert torch.equal(SpaceToDepth().inverse(y), x)
    z = PoolPadShortcut(2, 5, 2)(x)
    assert z.shape == (1, 5, 2, 2) and z[0, :, 0, 0].tolist() == [0, 2.5, 18.5, 0, 0]
    with pytest.raises(ValueError, match="from 4 to 2"):
        PoolPadShortcut(4, 2)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (RevNet, {"block": "fat"}, "block is 'fat', want basic or bottleneck"),
        (RevNet, {"stem": "conv5"}, "stem is 'conv5'"),
        (RevNet, {"widths": (32, 32, 64)}, "an even one for the stem and for each level"),
        (RevNet, {"widths": (32, 32, 64, 33)}, "an even one"),
        (RevNet, {"units": (3, 0, 3)}, "at least one per level"),
        (RevNet, {"drop_path_rate": 1.0}, "want 0 <= rate < 1"),
        (IRevNet, {"width": 12}, "want a multiple of 8, at least 3"),
        (IRevNet, {"width": 8, "patch": 2}, "at least 12"),
    ],
)
def test_wrong_options_are_named(kind, options, message):
    with pytest.raises(SchemeError, match=message):
        kind(**options)


def test_every_parameter_gets_a_gradient_and_feature_info_is_true():
    net = RevNet((2, 1), (8, 8, 16), block="bottleneck")
    x = torch.randn(4, 3, 16, 16)
    net(x).square().sum().backward()
    for key, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, key
    shapes = [(4, row["num_chs"], 16 // row["reduction"], 16 // row["reduction"]) for row in net.feature_info]
    assert [m.shape for m in net.maps(x)] == shapes


@pytest.mark.parametrize(("act", "kind"), [("relu", nn.ReLU), ("silu", nn.SiLU)])
def test_the_first_function_has_the_activation_of_the_others_and_writes_to_no_argument(act, kind):
    function = RevNet(act=act).transitions[0].steps[0].fs[0]
    assert type(function.relu) is kind and not function.relu.inplace


@pytest.mark.parametrize("units", [(9, 9, 9), (1, 4), (2, 3, 1)])
def test_fields_have_the_mean_rate_of_the_functions_that_they_stand_for(units):
    def rates(net, part):
        return [[m.p for m in level.modules() if isinstance(m, DropPath)] for level in getattr(net, part)]

    options = {"units": units, "widths": (8,) * (len(units) + 1), "drop_path_rate": 0.5}
    plain, fields = RevNet(**options), RevNet(**options, continuous=3)
    assert rates(fields, "transitions") == rates(plain, "transitions")
    for found, each in zip(rates(fields, "levels"), rates(plain, "levels"), strict=True):
        assert found == ([pytest.approx(sum(each) / len(each))] * 2 if each else [])
