"""Heat maps in every precision and at every scale, against the formula in double precision; and what is refused."""

import pytest
import torch
from torch import nn

from odenets.analysis import layer_cam
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
