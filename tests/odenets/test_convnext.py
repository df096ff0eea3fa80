"""ConvNeXt: published sizes, published weights, other schemes, pyramids."""

import inspect
import json

import pytest
import torch
from counting import gmacs, meta, parameters
from published_nets import ConvNeXt as Published
from published_nets import Isotropic, fill, relative
from stacks import check_gradients
from torch import nn

from odenets import checkpoints
from odenets.layers import ChannelGate, ConvNeXtFunction, LayerNorm2d
from odenets.models import ConvNeXt, convnext, create_model, feature_net, list_models
from schemes import SchemeError

# Parameters and 10^9 multiply-adds at 224 x 224, counted from the released code; the paper rounds them the same way.
SIZES = {
    "convnext_tiny": (28_589_128, 4.4555),
    "convnext_small": (50_223_688, 8.6837),
    "convnext_base": (88_591_464, 15.3547),
    "convnext_large": (197_767_336, 34.3614),
    "convnext_xlarge": (350_196_968, 60.9210),
    # The paper's table 2 rounds: 22 M, 4.3 G; 87 M, 16.9 G; 306 M, 59.7 G.
    "convnext_isotropic_small": (22_308_712, 4.2864),
    "convnext_isotropic_base": (87_083_752, 16.8963),
    "convnext_isotropic_large": (305_942_504, 59.6992),
}
TINY = {"functions": (2, 4), "widths": (8, 16), "num_classes": 5}


@pytest.mark.cases(3)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_published_ones(name):
    model = meta(name)
    assert parameters(model) == SIZES[name][0]
    assert gmacs(model, 224) == pytest.approx(SIZES[name][1], abs=5e-5)


def test_every_name_stands_in_the_table_of_sizes():
    assert set(SIZES) == set(convnext.CONVNEXTS) == set(list_models("convnext_*"))


@pytest.mark.parametrize("layout", ["facebookresearch", "timm", "torchvision"])
def test_published_weights_give_the_same_logits(layout):
    source = fill(Published(layout, (1, 2, 3, 1), (8, 16, 24, 32), 5))
    model = ConvNeXt((1, 2, 3, 1), (8, 16, 24, 32), num_classes=5).eval()
    assert checkpoints.load(model, {"model": source.state_dict()}) == (len(source.state_dict()), layout, (), ())
    x = torch.randn(2, 3, 64, 64)
    assert relative(model(x), source(x)) < 2e-5


@pytest.mark.parametrize("gamma", [True, False])
def test_published_isotropic_weights_give_the_same_logits(gamma):
    source = fill(Isotropic(3, 16, 5, gamma))
    kwargs = {"patch": 16, "stem_norm": False, "layer_scale": 1e-6 if gamma else None, "num_classes": 5}
    model = ConvNeXt((3,), (16,), **kwargs).eval()
    assert checkpoints.load(model, source.state_dict()).layout == "facebookresearch isotropic"
    x = torch.randn(2, 3, 64, 64)
    assert relative(model(x), source(x)) < 2e-5


@pytest.mark.parametrize("layout", ["facebookresearch", "timm", "torchvision"])
def test_every_published_key_of_the_tiny_model_has_its_place(layout):
    model = meta("convnext_tiny")
    with torch.device("meta"):
        keys = Published(layout, (3, 3, 9, 3), (96, 192, 384, 768), 1000).state_dict().keys()
    names = model.key_map(keys).names
    assert len(keys) == 182 and set(names.values()) == set(model.state_dict())


def test_misfits_carry_the_published_names():
    source = fill(Published("timm", (2, 4), (8, 16), 5)).state_dict()
    model = ConvNeXt(**TINY)
    with pytest.raises(SchemeError, match=r"without a place: stages\.0\.blocks\.2\.gamma"):
        checkpoints.load(model, source | {"stages.0.blocks.2.gamma": torch.ones(8)})
    with pytest.raises(SchemeError, match=r"is \(7,\), want \(8,\)"):
        checkpoints.load(model, source | {"stages.0.blocks.1.gamma": torch.ones(7)})
    headless = ConvNeXt(**{**TINY, "num_classes": 0})
    assert checkpoints.load(headless, source).dropped == ("head.fc.weight", "head.fc.bias")


def test_a_level_is_the_written_out_scheme():
    net = fill(ConvNeXt((4,), (8,), scheme="rk4", patch=2))
    x = torch.randn(2, 3, 8, 8)
    y = net.stem(x)
    f1, f2, f3, f4 = net.levels[0].steps[0].fs
    k1 = f1(y)
    k2 = f2(y + k1 / 2)
    k3 = f3(y + k2 / 2)
    k4 = f4(y + k3)
    want = net.head(net.head_norm((y + (k1 + 2 * k2 + 2 * k3 + k4) / 6).mean((2, 3))))
    torch.testing.assert_close(net(x), want)


def test_the_residual_function_is_the_written_out_formula():
    f = fill(ConvNeXtFunction(8, 6, kernel=5, expansion=2.5, divisor=8, gate=True))
    assert f.fc1.out_features == 16
    x = torch.randn(2, 8, 6, 6)
    kept = x.clone()
    y = f.fc2(nn.functional.gelu(f.fc1(f.norm(f.dwconv(x).movedim(1, -1)))))
    s = (f.gate.fc(y.mean((1, 2))) + 3).clamp(0, 6) / 6
    torch.testing.assert_close(f(x), (y * s[:, None, None] * f.gamma).movedim(-1, 1))
    assert torch.equal(x, kept)
    with pytest.raises(ValueError, match="the kernel is 4"):
        ConvNeXtFunction(8, kernel=4)


def test_layer_norm_normalises_every_pixel_and_keeps_channels_last_memory():
    x = torch.randn(2, 8, 5, 5)
    f = fill(LayerNorm2d(8))
    mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
    want = (x - mean) / (var + 1e-6).sqrt() * f.weight.view(-1, 1, 1) + f.bias.view(-1, 1, 1)
    torch.testing.assert_close(f(x), want)
    assert f(x).is_contiguous(memory_format=torch.channels_last)
    assert ChannelGate(4)(x[:, :4].movedim(1, -1)).shape == (2, 1, 1, 4)


@pytest.mark.parametrize("scheme", ["midpoint", ["midpoint", "rk4"], "2*euler"])
def test_other_schemes_have_equal_parameters_and_cost_and_take_the_weights(scheme):
    with torch.device("meta"):
        euler, other = ConvNeXt(**TINY), ConvNeXt(**TINY, scheme=scheme)
    assert parameters(euler) == parameters(other) and gmacs(euler, 32) == gmacs(other, 32)
    source, model = fill(ConvNeXt(**TINY)), ConvNeXt(**TINY, scheme=scheme)
    assert checkpoints.load(model, source.state_dict()).layout.startswith("own")
    first = [f.fc1.weight for level in model.levels for s in level.steps for f in s.fs]
    again = [f.fc1.weight for level in source.levels for s in level.steps for f in s.fs]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_what_does_not_fit_is_refused():
    with pytest.raises(SchemeError, match=r"level 1 has 3 residual functions, and rk4 takes 4"):
        create_model("convnext_tiny", scheme="rk4")
    with pytest.raises(SchemeError, match="want one per level"):
        ConvNeXt((2,), (8, 16))
    with pytest.raises(SchemeError, match="kernel is 6"):
        ConvNeXt(**TINY, kernel=6)
    with pytest.raises(SchemeError, match=r"drop_path_rate is 1\.5"):
        ConvNeXt(**TINY, drop_path_rate=1.5)
    with pytest.raises(SchemeError, match="recompute is 3, want true, false, or how many of the 2 levels"):
        ConvNeXt(**TINY, recompute=3)
    with pytest.raises(SchemeError, match="recompute is 'all', want"):
        ConvNeXt(**TINY, recompute="all")
    with pytest.raises(SchemeError, match="2 arguments; those of ConvNeXt take one"):
        ConvNeXt(**TINY, scheme="multilevel(3)")


@pytest.mark.parametrize("mode", [{"backprop": "checkpoint"}, {"recompute": True}, {"recompute": 1}])
def test_every_parameter_gets_a_gradient_and_recomputation_changes_none(mode):
    a = ConvNeXt(**TINY, drop_path_rate=0.3)
    b = ConvNeXt(**TINY, drop_path_rate=0.3, **mode)
    check_gradients(a, b, torch.randn(4, 3, 32, 32))
    rates = [0.0 if f.drop_path is None else f.drop_path.p for s in a.levels for step in s.steps for f in step.fs]
    assert rates == pytest.approx([0.3 * i / 5 for i in range(6)])


def test_heads():
    x = torch.randn(2, 3, 32, 32)
    net = fill(ConvNeXt(**TINY))
    maps = net.forward_features(x)
    assert torch.equal(net.forward_head(maps), net(x))
    torch.testing.assert_close(net.forward_head(maps, pre_logits=True), net.head_norm(maps.mean((2, 3))))
    net.reset_classifier(7, "max")
    torch.testing.assert_close(net(x), net.head(net.head_norm(maps.amax((2, 3)))))
    net.reset_classifier(0, "")
    assert torch.equal(net(x), maps) and isinstance(net.get_classifier(), nn.Identity)
    with pytest.raises(SchemeError, match="num_classes=0"):
        net.reset_classifier(5)
    with pytest.raises(SchemeError, match="global_pool is 'sum'"):
        net.reset_classifier(5, "sum")
    torch.manual_seed(3)
    plain = ConvNeXt(**TINY)
    torch.manual_seed(3)
    scaled = ConvNeXt(**TINY, head_init_scale=1e-3)
    torch.testing.assert_close(scaled.head.weight, plain.head.weight * 1e-3)
    assert not ConvNeXt(**TINY).double().head_norm.weight.dtype.is_complex
    net = ConvNeXt(**TINY).double()
    net.reset_classifier(3)
    assert net.head.weight.dtype == torch.float64
    assert ConvNeXt(**TINY, drop_rate=0.5).train()(x).shape == (2, 5)


def test_weights_start_from_a_cut_normal_distribution():
    net = ConvNeXt((1,), (64,))
    assert net.levels[0].steps[0].fs[0].fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not net.head.bias.any() and net.levels[0].steps[0].fs[0].gamma.unique().item() == pytest.approx(1e-6)


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", ["convnext_tiny", "rdnet_tiny", "densenet121", "densenet_bc100_k12", "resnet18"])
def test_pyramids(name):
    whole = meta(name)
    net = meta(name, features_only=True, out_indices=(0, -1))
    size = 64
    maps = net.eval()(torch.empty(1, 3, size, size, device="meta"))
    assert len(maps) == len(net.feature_info) == 2
    for y, row in zip(maps, net.feature_info, strict=True):
        assert y.shape == (1, row["num_chs"], size // row["reduction"], size // row["reduction"])
    assert net.feature_info == [whole.feature_info[0], whole.feature_info[-1]]
    head = {"head.weight", "head.bias"}
    assert head <= net.left_out and not any(".head" in key for key in net.state_dict())


def test_a_pyramid_gives_the_levels_maps_ends_with_the_last_of_them_and_takes_weights():
    source = fill(ConvNeXt(**TINY))
    x = torch.randn(2, 3, 32, 32)
    net = feature_net.FeatureNet(ConvNeXt(**TINY), (0,)).eval()
    report = checkpoints.load(net, source.state_dict())
    assert len(net.net.levels) == len(net.net.transitions) == 1
    assert all(key.startswith(("levels.1", "transitions.1", "head")) for key in report.dropped)
    (found,) = net(x)
    assert torch.equal(found, source.maps(x)[0])
    published = fill(Published("timm", (2, 4), (8, 16), 5))
    both = feature_net.FeatureNet(ConvNeXt(**TINY)).eval()
    assert checkpoints.load(both, published.state_dict()).layout == "timm"
    both.train()(x)[-1].sum().backward()
    assert all(p.grad is not None for p in both.parameters())
    with pytest.raises(SchemeError, match="without a place: a"):
        checkpoints.load(both, published.state_dict() | {"a": torch.ones(1)})
    with pytest.raises(SchemeError, match="nothing was loaded"):
        checkpoints.load(both, {"a": torch.ones(1)})


def test_pyramids_refuse_what_they_cannot_give():
    for wrong in ((4,), (1, 0), (), (0, 0), (-5,)):
        with pytest.raises(SchemeError, match="want rising numbers from 0 to 3"):
            meta("convnext_tiny", features_only=True, out_indices=wrong)
    with pytest.raises(SchemeError, match="set both"):
        meta("convnext_tiny", out_indices=(0,))
    with pytest.raises(SchemeError, match="Linear has no pyramid"):
        feature_net.FeatureNet(nn.Linear(1, 1))


def test_defaults_are_what_json_keeps():
    defaults = {k: p.default for k, p in inspect.signature(ConvNeXt).parameters.items()}
    again = json.loads(json.dumps(defaults))
    with torch.device("meta"):
        assert ConvNeXt(**again).state_dict().keys() == ConvNeXt().state_dict().keys()
