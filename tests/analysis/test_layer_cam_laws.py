"""Heat maps in every precision and at every scale, against the formula in double precision; and what is refused."""

import pytest
import torch
from torch import nn

from odenets import Stack
from odenets.analysis import layer_cam
from odenets.models import DenseNet, RevNet
from schemes import SchemeError


class Net(nn.Module):
    """A convolution, a ReLU that writes in place, and a head over the mean: all gradients can be written down."""

    def __init__(self, scale=1.0, sign=0.0):
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Linear(4, 2)
        self.conv.weight.data *= scale
        self.conv.bias.data *= scale
        if sign:
            nn.init.constant_(self.head.weight, sign)

    def forward(self, x):
        return self.head(self.act(self.conv(x)).mean((2, 3)))


def plain(net, x, target):
    """relu of the sum over channels of relu(d score / d feature) x feature, over its maximum, by hand."""
    net, x = net.double(), x.double()
    y, found = net.conv(x), []
    for place, through in (("conv", y > 0), ("act", torch.ones_like(y))):
        value = y if place == "conv" else y.relu()
        slope = through * net.head.weight[target].relu()[:, :, None, None]
        heat = (slope * value).sum(1).relu().detach()
        peak = heat.flatten(1).amax(1)[:, None, None]
        found.append(torch.where(peak > 0, heat / peak, 0))
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e-20, 1e4])
def test_maps_of_any_precision_and_scale(dtype, scale):
    torch.manual_seed(1)
    if dtype == torch.float16 and scale == 1e-20:
        scale = 1e-3  # what single precision holds at 1e-20, half precision does not
    net, x, target = Net(scale).to(dtype), torch.randn(3, 3, 48, 48).to(dtype), torch.tensor([0, 1, 1])
    heats = layer_cam(net, x, ["conv", "act"], target)
    want = plain(net, x, target)
    near = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}[dtype]
    for heat, expected in zip(heats, want, strict=True):
        assert heat.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(heat.double(), expected, rtol=0, atol=near)


@pytest.mark.parametrize(
    "dtype, features, head", [("float32", 1e-25, 1e-25), ("float16", 1, 1e-4), ("float16", 1e-2, 1e3)]
)
def test_no_product_and_no_gradient_leaves_the_range_of_its_precision(dtype, features, head):
    torch.manual_seed(1)
    net = Net(features)
    net.head.weight.data *= head
    net, x = net.to(getattr(torch, dtype)), torch.randn(3, 3, 48, 48).to(getattr(torch, dtype))
    for heat, want in zip(layer_cam(net, x, ["conv", "act"], 1), plain(net, x, torch.ones(3).long()), strict=True):
        torch.testing.assert_close(heat.double(), want, rtol=0, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_map_without_a_positive_value_is_zero(dtype):
    x = torch.randn(2, 3, 8, 8).to(dtype)
    for heat in layer_cam(Net(sign=-1.0).to(dtype), x, ["conv", "act"]):
        assert torch.equal(heat, torch.zeros_like(heat))
    # One picture without, one with.
    net = Net(sign=1.0).to(dtype)
    nn.init.zeros_(net.conv.bias)
    x[0] = 0
    [heat] = layer_cam(net, x, ["act"], 1)
    assert not heat[0].any() and float(heat[1].max()) == 1


def test_the_picture_stays_and_the_network_may_write_into_it():
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.requires_grad_(False)
    x = torch.randn(2, 3, 4, 4)
    before = x.clone()
    [heat] = layer_cam(net, x, ["1"], 0)
    assert torch.equal(x, before) and not x.requires_grad and heat.shape == (2, 4, 4)
    want = net[1](x.relu())[:, 0].relu()
    torch.testing.assert_close(heat, want / want.flatten(1).amax(1)[:, None, None])


@pytest.mark.parametrize(
    "target, message",
    [
        (-1, r"target -1 is no class of 0 to 1"),
        (torch.tensor([0, 2]), "target 2 is no class"),
        (torch.tensor([0, 1, 0]), r"target \(3,\) of torch.int64 for 2 pictures"),
        (0.0, "target"),
    ],
)
def test_targets_that_are_no_class_are_refused(target, message):
    with pytest.raises(SchemeError, match=message):
        layer_cam(Net(), torch.randn(2, 3, 8, 8), ["act"], target)


def test_what_has_no_gradient_or_is_not_finite_is_refused():
    net, x = Net(), torch.randn(2, 3, 8, 8)
    with pytest.raises(SchemeError, match="no scores"):
        layer_cam(net.conv, x, [""])
    with pytest.raises(SchemeError, match=r"pictures of torch\.uint8"):
        layer_cam(net, x.byte(), ["act"])
    with pytest.raises(SchemeError, match="act or its gradient is not finite"):
        layer_cam(net, x / 0, ["act"], 0)

    class Cut(Net):
        def forward(self, x):
            with torch.no_grad():
                y = self.conv(x)
            return self.head(self.act(y).mean((2, 3)))

    for place in ("conv", "act"):
        with pytest.raises(SchemeError, match=f"does not depend on {place}"):
            layer_cam(Cut(), x, [place], 0)


class Streams(nn.Module):
    """A stack under a scheme of several streams, and a head that sees pictures as maps."""

    def __init__(self, stack, width):
        super().__init__()
        self.stack, self.head = stack, nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.stack(x).square().mean((2, 3)))


def conv(width, out):
    return nn.Sequential(nn.Conv2d(width, out, 3, padding=1), nn.Tanh())


def joined(z, rest):
    """All that is left of a dense stack, of the joined streams."""
    for f in rest:
        z = torch.cat([z, f(z)], 1)
    return z


def coupled(z, rest):
    """All that is left of an additive coupling: y1 = x1 + f(x2), y2 = x2 + g(y1)."""
    a, b = z.chunk(2, 1)
    for f, g in zip(rest[::2], rest[1::2], strict=True):
        a = a + f(b)
        b = b + g(a)
    return torch.cat([a, b], 1)


def by_hand(score, z):
    """LayerCAM of a map z of which a score is a function."""
    z = z.detach().requires_grad_()
    [g] = torch.autograd.grad(score(z).sum(), z)
    heat = (g.relu() * z).sum(1).relu().detach()
    return heat / heat.flatten(1).amax(1)[:, None, None]


@pytest.mark.parametrize("kind", ["dense", "revnet"])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_the_map_of_a_readout_is_that_of_the_joined_streams(kind, step):
    """Of what comes after the step alone: the input of joined streams was read by each function before it, too."""
    torch.manual_seed(step)
    if kind == "dense":
        fs, rest, width, per_step = [conv(w, 2) for w in (3, 5, 7)], joined, 9, 1
        net = Streams(Stack(fs, "dense(2)"), width).double()
    else:
        fs, rest, width, per_step = [conv(2, 2) for _ in range(6)], coupled, 4, 2
        net = Streams(Stack(fs, "revnet"), width).double()
    x = torch.randn(2, 3 if kind == "dense" else 4, 6, 6, dtype=torch.float64)
    fs, done = list(fs), per_step * (step + 1)
    want = by_hand(lambda z: net.head(rest(z, fs[done:]).square().mean((2, 3)))[:, 1], rest(x, fs[:done]))
    # With a place of the same step, which is to see its own gradient, whatever the order.
    places = [f"stack.steps.{step}:0", f"stack.steps.{step}:readout"]
    first, heat = layer_cam(net, x, places, 1)
    torch.testing.assert_close(heat, want)
    assert torch.equal(first, layer_cam(net, x, places[:1], 1)[0])
    assert torch.equal(first, layer_cam(net, x, places[::-1], 1)[1])


@pytest.mark.parametrize(
    "net",
    [
        lambda: DenseNet([2, 3], growth=4, stem="conv3", num_classes=3),
        lambda: RevNet([2, 2], [4, 4, 8], num_classes=3),
    ],
)
@pytest.mark.parametrize("backprop", ["store", "checkpoint"])
def test_the_map_after_the_last_step_is_that_of_the_stack(net, backprop):
    net = net()
    for module in net.modules():
        if isinstance(module, Stack):
            module.backprop = backprop
    name, stack = next((n, m) for n, m in net.named_modules() if isinstance(m, Stack))
    x = torch.randn(2, 3, 16, 16)
    whole, last = layer_cam(net, x, [name, f"{name}.steps.{len(stack.steps) - 1}:readout"], 0)
    torch.testing.assert_close(last, whole)
    assert float(whole.max()) > 0


def test_inference_mode_is_named():
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.randn(2, 3, 4, 4)
    with torch.inference_mode(), pytest.raises(SchemeError, match="inference_mode"):
        layer_cam(net, x, ["0"])
    with torch.no_grad():
        assert layer_cam(net, x, ["0"])[0].shape == (2, 4, 4)
