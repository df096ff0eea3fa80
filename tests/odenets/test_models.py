"""ResNet and HO-ResNet: published sizes, equal twins, what fits a level, the registry, timm's conventions."""

import hashlib
import inspect
import json
import urllib.error

import pytest
import torch
from counting import gmacs, meta, parameters
from torch import nn

import schemes
from odenets.models import HOResNet, ResNet, catalogue, create_model, levels, list_models, register_model, resnet
from schemes import MixingWarning, SchemeError

# Parameters and multiply-adds at the published input size. Sources: torchvision's model page; He et al. 2016, table 6;
# the HO-ResNet release, counted from its code. None: no published count of multiply-adds.
SIZES = {
    "resnet20": (269_722, 32, None),
    "resnet32": (464_154, 32, None),
    "resnet44": (658_586, 32, None),
    "resnet56": (853_018, 32, None),
    "resnet110": (1_727_962, 32, None),
    "resnet164_preact": (1_703_258, 32, None),
    "resnet18": (11_689_512, 224, 1.814),
    "resnet34": (21_797_672, 224, 3.664),
    "resnet50": (25_557_032, 224, 4.089),
    "resnet101": (44_549_160, 224, 7.801),
    "resnet152": (60_192_808, 224, 11.514),
    "ho_resnet26": (366_842, 32, None),
    "ho_resnet30": (66_042, 32, None),
    "ho_resnet58": (321_402, 32, None),
    "ho_resnet74": (1_144_570, 32, None),
    "ho_resnet86": (1_339_002, 32, None),
    "ho_resnet170_cifar": (2_700_026, 32, None),
    "ho_resnet50": (27_855_656, 224, 4.089),
    "ho_resnet170": (87_158_056, 224, None),
}
# Weighted layers, as the names count them: convolutions and the head, without projections.
LAYERS = {name: int("".join(c for c in name.split("_cifar")[0].split("_preact")[0] if c.isdigit())) for name in SIZES}
TWINS = {
    "ho_resnet26": ["euler", "midpoint", "rk4"],
    "ho_resnet30": ["euler", "midpoint", "verner8"],
    "ho_resnet58": ["euler", "midpoint", "verner8"],
    "ho_resnet74": ["euler", "midpoint", "rk4", "3*rk4"],
    "ho_resnet86": ["euler", "midpoint", "verner8", "3*rk4 + midpoint"],
    "ho_resnet170_cifar": ["euler", "midpoint", "rk4", "verner8"],
    "ho_resnet50": ["euler", "midpoint", "rk4"],
    "ho_resnet170": ["euler", "midpoint", "verner8"],
}


def test_every_name_stands_in_the_table_of_sizes():
    built_in = {n for n in list_models() if inspect.getmodule(catalogue._MODELS[n].build) is resnet}
    assert built_in == set(SIZES)


@pytest.mark.cases(8)
@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_layers_are_the_published_ones(name):
    model = meta(name)
    assert parameters(model) == SIZES[name][0]
    weighted = [k for k, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and ".gs." not in k]
    assert len(weighted) == LAYERS[name]


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", [n for n, row in SIZES.items() if row[2]])
def test_multiply_adds_are_the_published_ones(name):
    _, size, published = SIZES[name]
    assert gmacs(meta(name), size) == pytest.approx(published, abs=5e-4)


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", TWINS)
def test_twins_have_equal_parameters_and_equal_cost(name):
    found = {(parameters(m), gmacs(m, SIZES[name][1])) for m in (meta(name, scheme=s) for s in TWINS[name])}
    assert len(found) == 1


def test_a_level_is_the_written_out_scheme():
    net = HOResNet((4,), (8,), scheme="rk4", stem="conv3").eval()
    x = torch.randn(2, 3, 8, 8)
    y = net.stem(x)
    f1, f2, f3, f4 = net.levels[0].steps[0].fs
    k1 = f1(y)
    k2 = f2(y + k1 / 2)
    k3 = f3(y + k2 / 2)
    k4 = f4(y + k3)
    want = net.head((y + (k1 + 2 * k2 + 2 * k3 + k4) / 6).relu().mean((2, 3)))
    torch.testing.assert_close(net(x), want)


def test_the_downsampling_step_is_the_written_out_scheme():
    net = HOResNet((2, 4), (8, 16), scheme=["midpoint", "rk4"], placement="preact", shortcut="projection").eval()
    y = torch.randn(2, 8, 8, 8)
    step = net.levels[1].steps[0]
    f1, f2, f3, f4 = step.fs
    (g,) = step.gs
    assert f1.conv1.stride == (2, 2) and {f.conv1.stride for f in (f2, f3, f4)} == {(1, 1)}
    k1, z = f1(y), g(y)
    k2 = f2(z + k1 / 2)
    k3 = f3(z + k2 / 2)
    k4 = f4(z + k3)
    torch.testing.assert_close(net.levels[1](y), z + (k1 + 2 * k2 + 2 * k3 + k4) / 6)
    assert isinstance(net.norm, nn.Sequential) and len(net.stem) == 1


def test_every_level_may_have_a_scheme_of_its_own():
    net = create_model("ho_resnet26", scheme=["rk4", "midpoint", "2*euler + midpoint"])
    assert [str(level.scheme) for level in net.levels] == ["rk4", "midpoint", "2*euler + midpoint"]
    assert [len(level.steps) for level in net.levels] == [1, 2, 3]
    assert parameters(net) == SIZES["ho_resnet26"][0]


def test_a_decay_counts_over_the_whole_network():
    net = create_model("ho_resnet26", scheme="midpoint", step="decay(1/2)")
    assert [float(s.h) for level in net.levels for s in level.steps] == [0.5**n for n in range(6)]


def test_a_learned_step_is_a_parameter_and_gets_a_gradient():
    net = create_model("ho_resnet26", step="learned")
    net(torch.randn(2, 3, 16, 16)).square().sum().backward()
    steps = {k: p for k, p in net.named_parameters() if k.endswith(".h")}
    assert sorted(steps) == [f"levels.{i}.steps.0.h" for i in range(3)]
    assert all(p.grad is not None and p.grad.abs() > 0 for p in steps.values())


def test_checkpointing_changes_neither_output_nor_gradients():
    a = HOResNet(widths=(8, 16, 32), drop_path_rate=0.3)
    b = HOResNet(widths=(8, 16, 32), drop_path_rate=0.3, backprop="checkpoint")
    b.load_state_dict(a.state_dict())
    x = torch.randn(4, 3, 16, 16)
    for net in (a, b):
        torch.manual_seed(1)
        net(x).square().sum().backward()
    for (key, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=key)
    for (key, p), q in zip(a.named_buffers(), b.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=key)


@pytest.mark.parametrize(
    ("functions", "scheme", "message"),
    [
        ((4, 14), "rk4", r"level 2 has 14 .* use 12 or 16, or a mix that fits, such as '3\*rk4 \+ midpoint'"),
        ((3, 4), "rk4", r"level 1 has 3 residual functions, and rk4 takes 4 a step: use 4\."),
        ((5,), "midpoint", r"use 4 or 6, .*'2\*midpoint \+ euler'"),
        ((14, 13), "3*rk4 + midpoint", r"level 2 has 13 .* takes 14 a step: use 14\."),
        ((4, 4), ["rk4"], r"1 schemes for 2 levels"),
        ((0,), "euler", r"level 1 has 0 residual functions, want a whole number"),
        ((2,), "rk5", "rk5"),
    ],
)
def test_counts_that_do_not_fit_are_refused_with_the_nearest_that_do(functions, scheme, message):
    with pytest.raises(SchemeError, match=message):
        HOResNet(functions, (8, 16)[: len(functions)], scheme=scheme)


@pytest.mark.parametrize(
    ("scheme", "functions"), [("rk4", 14), ("rk4", 15), ("rk4", 13), ("kutta3", 7), ("verner8", 17), ("midpoint", 3)]
)
def test_the_mix_that_the_error_suggests_fits(scheme, functions):
    with pytest.raises(SchemeError) as caught:
        levels.steps_that_fit(schemes.get(scheme), functions, 1)
    mix = schemes.get(str(caught.value).split("'")[1])
    assert levels.steps_that_fit(mix, functions, 1) == len(mix.plan)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"block": "fat"}, "block is 'fat', want basic or bottleneck"),
        ({"placement": "pre"}, "want post or public or preact"),
        ({"shortcut": "conv"}, "want projection or pad"),
        ({"stem": "patch"}, "want conv3 or conv3_s2 or conv7_pool"),
        ({"global_pool": "sum"}, "global_pool is 'sum'"),
        ({"global_pool": ""}, "num_classes=0"),
        ({"drop_path_rate": 1.5}, "drop_path_rate is 1.5: want 0 <= rate < 1"),
        ({"widths": (8,)}, "3 counts of residual functions, 1 widths"),
    ],
)
def test_wrong_options_are_named(kwargs, message):
    with pytest.raises(SchemeError, match=message):
        HOResNet(**kwargs)


def test_verners_scheme_warns_once_per_model():
    with pytest.warns(MixingWarning) as caught:
        HOResNet((14, 14, 14), scheme="verner8")
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("kind", [ResNet, HOResNet])
def test_classes_take_keyword_arguments_that_json_keeps(kind):
    defaults = {k: p.default for k, p in inspect.signature(kind).parameters.items()}
    assert inspect.Parameter.empty not in defaults.values()
    again = json.loads(json.dumps(defaults))
    with torch.device("meta"):
        assert {k: v.shape for k, v in kind(**again).state_dict().items()} == {
            k: v.shape for k, v in kind().state_dict().items()
        }


@pytest.mark.parametrize("placement", ["post", "public", "preact"])
def test_every_parameter_gets_a_finite_gradient(placement):
    net = HOResNet((4, 2), (8, 16), scheme=["rk4", "euler"], placement=placement, shortcut="projection")
    net(torch.randn(4, 3, 16, 16)).square().sum().backward()
    for key, p in net.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0, key


def test_create_model_passes_on_what_it_is_given():
    net = create_model("ho_resnet26", num_classes=7, in_chans=1, scheme="midpoint", drop_rate=0.1, drop_path_rate=0.2)
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    rates = [0.0 if f.drop_path is None else f.drop_path.p for s in net.levels for step in s.steps for f in step.fs]
    assert rates == pytest.approx([0.2 * i / 11 for i in range(12)])
    assert net.drop_rate == 0.1
    with pytest.raises(TypeError, match="sheme"):
        create_model("ho_resnet26", sheme="rk4")


@pytest.mark.parametrize(("wrong", "near"), [("sheme", "scheme"), ("Widths", "widths"), ("pretraind", "pretrained")])
def test_a_wrong_option_of_a_named_model_names_the_closest(wrong, near):
    with pytest.raises(SchemeError, match=rf"ho_resnet26 has no option '{wrong}'\n  Closest: {near}"):
        create_model("ho_resnet26", **{wrong: 1})


def test_a_model_refuses_options_of_others_before_it_is_built():
    with pytest.raises(SchemeError, match="revcol_tiny has no option 'scheme'"):
        create_model("revcol_tiny", scheme="rk4")


def test_capitals_do_not_hide_the_closest_name():
    with pytest.raises(SchemeError, match="closest: resnet50"):
        create_model("ResNet50")


def test_features_and_maps():
    x = torch.randn(2, 3, 32, 32)
    net = create_model("ho_resnet26", num_classes=0).eval()
    assert net(x).shape == (2, 64) and isinstance(net.get_classifier(), nn.Identity)
    assert create_model("ho_resnet26", num_classes=0, global_pool="")(x).shape == (2, 64, 4, 4)
    maps = net.forward_features(x)
    assert torch.equal(net.forward_head(maps), maps.mean((2, 3))) or torch.allclose(net(x), maps.mean((2, 3)))
    net.reset_classifier(5, "max")
    torch.testing.assert_close(net(x), net.head(maps.amax((2, 3))))
    torch.testing.assert_close(net.forward_head(maps, pre_logits=True), maps.amax((2, 3)))
    with pytest.raises(SchemeError, match="num_classes=0"):
        net.reset_classifier(5, "")


def test_a_new_head_has_the_old_dtype():
    net = create_model("ho_resnet26").double()
    net.reset_classifier(3)
    assert net(torch.randn(1, 3, 16, 16, dtype=torch.float64)).shape == (1, 3)


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "ho_resnet26", "ho_resnet50"])
def test_feature_info_says_what_the_levels_give(name):
    net = meta(name, num_classes=0)
    assert net.num_features == net.feature_info[-1]["num_chs"]
    seen = {}
    for row in net.feature_info:
        net.get_submodule(row["module"]).register_forward_hook(
            lambda m, args, y, key=row["module"]: seen.__setitem__(key, y.shape)
        )
    net.eval()(torch.empty(1, 3, 64, 64, device="meta"))
    for row in net.feature_info:
        side = 64 // row["reduction"]
        assert seen[row["module"]] == (1, row["num_chs"], side, side)


def test_names():
    assert list_models("ho_resnet[23]*") == ["ho_resnet26", "ho_resnet30"]
    assert list_models("resnet*", pretrained=True) == [f"resnet{n}" for n in (18, 34, 50, 101, 152)]
    with pytest.raises(SchemeError, match=r"no model named 'resnet5'; closest: .*resnet50"):
        create_model("resnet5")
    with pytest.raises(SchemeError, match="registered already"):
        register_model(name="resnet50")(ResNet)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A tiny registered model whose "published" weights lie on this disk."""
    source = HOResNet((1,), (4,), num_classes=6, scheme="euler")
    file = tmp_path / "tiny.pth"
    torch.save(source.state_dict(), file)
    sha = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(catalogue, "_MODELS", dict(catalogue._MODELS))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def add(**changes):
        weights = catalogue.Weights("v1", file.as_uri(), sha, num_classes=6)._replace(**changes)
        register_model(name="tiny", weights=[weights])(
            lambda **kw: HOResNet(**{"functions": (1,), "widths": (4,), "scheme": "euler", **kw})
        )
        return source

    return add


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_pretrained_downloads_checks_and_loads(published, capsys):
    source = published().eval()
    x = torch.randn(2, 3, 16, 16)
    for pretrained in (True, "v1"):
        net = create_model("tiny", pretrained=pretrained).eval()
        torch.testing.assert_close(net(x), source(x))
    features = create_model("tiny", pretrained=True, num_classes=0, global_pool="").eval()
    torch.testing.assert_close(features(x), source.forward_features(x))
    assert create_model("tiny", pretrained=True, num_classes=2)(x).shape == (2, 2)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("classes", [None, 6])
def test_a_pooling_that_is_asked_for_keeps_the_published_head(published, pool, classes):
    source = published().eval()
    x = torch.randn(2, 3, 16, 16)
    net = create_model("tiny", pretrained=True, global_pool=pool, num_classes=classes).eval()
    maps = source.forward_features(x)
    want = source.head(maps.mean((2, 3)) if pool == "avg" else maps.amax((2, 3)))
    torch.testing.assert_close(net(x), want)
    assert net.global_pool == pool
    with pytest.raises(SchemeError, match="num_classes=0"):
        create_model("tiny", pretrained=True, global_pool="")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_pretrained_says_where_it_cannot(published, monkeypatch, tmp_path):
    with pytest.raises(SchemeError, match=r"no published weights are known for ho_resnet50; .*resnet50.* are"):
        create_model("ho_resnet50", pretrained=True)
    with pytest.raises(SchemeError, match="no weights tagged 'v9'; want True or one of 'v2', 'v1'"):
        create_model("resnet50", pretrained="v9")
    with pytest.raises(SchemeError, match="take 3 channels, not 1"):
        create_model("resnet50", pretrained=True, in_chans=1)
    published(sha256="00000000")
    with pytest.raises(SchemeError, match="is not the published file"):
        create_model("tiny", pretrained=True)
    folder = tmp_path / "hub" / "checkpoints"
    assert not any(folder.iterdir())
    (folder / "tiny.pth").write_bytes(b"something else")
    with pytest.raises(SchemeError, match=r"SHA-256 begins with .* want 00000000.*\n.*Delete it"):
        create_model("tiny", pretrained=True)

    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(
        SchemeError, match=r"cannot be had from https://download\.pytorch\.org/models/resnet18-f37072fd"
    ):
        create_model("resnet18", pretrained=True)
