"""Models of timm and torchvision, restacked, against themselves as they were."""

import copy
import functools
import warnings

import pytest
import torch
from torch import nn
from vision import vision

from odenets import RestackWarning, restack, unrestack
from schemes import SchemeError

pytestmark = pytest.mark.torchvision

D = torch.float64
VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 3}
CONVNEXT = {"depths": (2, 2, 3, 2), "dims": (8, 12, 16, 20), "num_classes": 3}


def timm_vit():
    return vision("timm").create_model("vit_tiny_patch16_224", **VIT)


def timm_convnext():
    return vision("timm").create_model("convnext_atto", **CONVNEXT)


def timm_resnet():
    return vision("timm").create_model("resnet26", layers=(2, 2, 3, 2), channels=(8, 12, 16, 20), num_classes=3)


def torchvision_resnet():
    models = vision("torchvision").models.resnet
    return models.ResNet(models.Bottleneck, [2, 2, 3, 2], num_classes=3, width_per_group=8)


def torchvision_vit():
    kind = vision("torchvision").models.VisionTransformer
    return kind(image_size=16, patch_size=4, num_layers=4, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=3)


def torchvision_convnext():
    models = vision("torchvision").models.convnext
    setting = models.CNBlockConfig
    return models.ConvNeXt([setting(8, 12, 2), setting(12, 16, 3), setting(16, None, 2)], num_classes=3)


# Where the blocks lie, and how many there are in each stack.
MODELS = {
    timm_vit: ("blocks", [4]),
    timm_convnext: ("stages.*.blocks", [2, 2, 3, 2]),
    timm_resnet: ("layer?", [1, 1, 2, 1]),
    torchvision_resnet: ("layer?", [1, 1, 2, 1]),
    torchvision_vit: ("encoder.layers", [4]),
    torchvision_convnext: (["features.1", "features.3", "features.5"], [2, 3, 2]),
}
every_model = pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)


@functools.cache
def made(kind):
    torch.manual_seed(0)
    net = kind()
    for name, p in net.named_parameters():
        if "layer_scale" in name or name.endswith("gamma"):
            nn.init.constant_(p, 0.5)
    return net.to(D)


def build(kind):
    return copy.deepcopy(made(kind)).eval()


def restacked(kind, scheme="euler", backprop="store", **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "restack: under", RestackWarning)
        return restack(build(kind), MODELS[kind][0], scheme, backprop, **options)


def pictures(kind, n=3):
    side = 16 if "vit" in kind.__name__ else 64
    return torch.randn(n, 3, side, side, dtype=D, generator=torch.Generator().manual_seed(1))


def step(model, x):
    torch.manual_seed(0)
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    return y.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@every_model
def test_logits_in_evaluation_are_those_of_the_model(kind):
    plain, x = build(kind), pictures(kind)
    with torch.no_grad():
        want = plain(x)
        for scheme, backprop in (("euler", "checkpoint"), ("bdia", "exact")):
            net = restacked(kind, scheme, backprop)
            assert list(net.state_dict()) == list(plain.state_dict())
            torch.testing.assert_close(net(x), want, rtol=0, atol=1e-10)
    assert [m.stack.depth for m in net.modules() if hasattr(m, "_restacking")] == MODELS[kind][1]
    with torch.no_grad():
        torch.testing.assert_close(unrestack(net)(x), want, rtol=0, atol=0)


@every_model
def test_gradients_are_those_of_the_model_and_of_the_stored_run(kind):
    x = pictures(kind)
    plain = build(kind).train()
    y, want = step(plain, x)
    net = restacked(kind, "euler", "checkpoint").train()
    z, got = step(net, x)
    torch.testing.assert_close(z, y, rtol=0, atol=1e-9)
    assert (got - want).norm() <= 1e-9 * want.norm()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], value, rtol=0, atol=1e-10, msg=key)
    (y, want), (z, got) = (step(restacked(kind, "bdia", m).train(), x) for m in ("exact(store=true)", "exact"))
    torch.testing.assert_close(z, y, rtol=0, atol=1e-9)
    assert (got - want).norm() <= 1e-8 * want.norm()


@every_model
def test_torch_fx_traces_a_model_whose_blocks_store(kind):
    net, x = restacked(kind, "bdia", "store"), pictures(kind)
    want = net(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(x), want, rtol=0, atol=1e-12)
    with pytest.raises(SchemeError, match="Trace with backprop='store'"):
        torch.fx.symbolic_trace(restacked(kind, "bdia", "exact", outside=1))


def test_intermediate_features_of_timm():
    plain, x = build(timm_vit), pictures(timm_vit)
    with torch.no_grad():
        want = plain.forward_intermediates(x, indices=[1, 2], stop_early=True, intermediates_only=True)
        got = restacked(timm_vit, "bdia").forward_intermediates(
            x, indices=[1, 2], stop_early=True, intermediates_only=True
        )
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        for net in (restacked(timm_vit, "midpoint"), restacked(timm_vit, "bdia")):
            with pytest.raises(SchemeError, match="reads the hidden state between two blocks"):
                net.forward_intermediates(x, indices=[1, 2])
        with pytest.raises(SchemeError, match="run without the others"):
            restacked(timm_vit, "midpoint").forward_intermediates(x, indices=[1, 2], stop_early=True)


def test_timms_own_checkpointing_goes_past_the_stack_and_is_refused():
    net = restacked(timm_vit, "bdia", "exact").train()
    net.set_grad_checkpointing()
    with pytest.raises(SchemeError, match="has not run the blocks of 'blocks'"):
        net(pictures(timm_vit))
