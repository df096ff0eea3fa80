"""DenseNet: published sizes, published weights, the scheme behind it, dropout, recomputation."""

import inspect
import json

import pytest
import torch
import torch.nn.functional as F
from counting import gmacs, meta, parameters
from published_nets import DenseNet as Published
from published_nets import fill, kept_bytes, relative
from stacks import check_gradients
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from odenets import Stack, checkpoints
from odenets.layers import DenseFunction, DenseTransition, norm_relu_conv
from odenets.models import DenseNet, create_model, densenet, list_models
from schemes import SchemeError

# Parameters (table 2 of the paper rounds them; 1,059,298 and so on with the official code's 2 k initial channels),
# input size, 10^9 multiply-adds (None: not published), counted from the released code.
SIZES = {
    "densenet40_k12": (1_059_298, 32, None),
    "densenet100_k12": (7_083_538, 32, None),
    "densenet100_k24": (28_071_706, 32, None),
    "densenet_bc100_k12": (769_162, 32, None),
    "densenet_bc250_k24": (15_324_406, 32, None),
    "densenet_bc190_k40": (25_624_430, 32, None),
    "densenet_bc40_k36": (1_542_682, 32, None),
    "densenet_bc40_k48": (2_733_130, 32, None),
    "densenet_bc40_k60": (4_261_690, 32, None),
    "densenet121": (7_978_856, 224, 2.834),
    "densenet161": (28_681_000, 224, 7.728),
    "densenet169": (14_149_480, 224, 3.360),
    "densenet201": (20_013_928, 224, 4.291),
    "densenet264": (33_337_704, 224, 5.752),
}
# The paper's own initial width, 16, for the plain ones.
PAPER = {"densenet40_k12": 1_019_722, "densenet100_k12": 6_979_642, "densenet100_k24": 27_249_082}
TINY = {"functions": (2, 3), "growth": 4, "num_classes": 5, "stem": "conv3"}


def test_every_name_stands_in_the_table_of_sizes():
    assert set(SIZES) == set(densenet.DENSENETS) == set(list_models("densenet*"))


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_published_ones(name):
    count, size, published = SIZES[name]
    model = meta(name)
    assert parameters(model) == count
    if published:
        assert gmacs(model, size) == pytest.approx(published, abs=5e-4)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_initial_width_gives_the_papers_size(name):
    assert parameters(meta(name, init_channels=16)) == PAPER[name]


@pytest.mark.parametrize("name", ["densenet40_k12", "densenet_bc100_k12", "densenet121"])
def test_depth_is_the_number_of_weighted_layers(name):
    model = meta(name)
    weighted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weighted) == int("".join(c for c in name.split("_k")[0] if c.isdigit()))


LAYOUTS = [
    ("torchvision", "torchvision", {"stem": "conv7_pool"}),
    ("torchvision", "torchvision, old", {"stem": "conv7_pool"}),
    ("gpleiss", "gpleiss", {}),
    ("andreasveit", "andreasveit", {}),
    ("andreasveit", "andreasveit", {"bottleneck": 0, "compression": 1.0}),
]


@pytest.mark.parametrize(("layout", "found", "kwargs"), LAYOUTS)
def test_published_weights_give_the_same_logits(layout, found, kwargs):
    plain = "bottleneck" in kwargs
    source = fill(
        Published(layout, (2, 3), 4, 8, 5, not plain, kwargs.get("compression", 0.5), old=found.endswith("old"))
    )
    model = DenseNet(**{**TINY, **kwargs}).eval()
    state = source.state_dict()
    if found.endswith("old"):
        state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    report = checkpoints.load(model, state)
    assert (report.loaded, report.layout, report.dropped) == (len(state), found, ())
    x = torch.randn(2, 3, 64, 64)
    assert relative(model(x), source(x)) < 2e-5


@pytest.mark.parametrize(
    ("name", "source", "keys"),
    [
        ("densenet121", ("torchvision", (6, 12, 24, 16), 32, 64, 1000), 727),
        ("densenet40_k12", ("andreasveit", (12,) * 3, 12, 24, 10, False, 1.0), 236),
        ("densenet_bc100_k12", ("gpleiss", (16,) * 3, 12, 24, 10), 596),
        ("densenet_bc100_k12", ("andreasveit", (16,) * 3, 12, 24, 10), 596),
    ],
)
def test_every_published_key_of_the_named_models_has_its_place(name, source, keys):
    with torch.device("meta"):
        state, model = Published(*source).state_dict(), create_model(name)
    names = model.key_map(state.keys()).names
    assert len(state) == keys
    assert {names[k]: v.shape for k, v in state.items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_misfits_carry_the_published_names():
    state = fill(Published("gpleiss", (2, 3), 4, 8, 5)).state_dict()
    model = DenseNet(**TINY)
    extra = "features.denseblock1.denselayer3.conv1.weight"
    with pytest.raises(SchemeError, match=r"without a place: features\.denseblock1\.denselayer3\.conv1"):
        checkpoints.load(model, state | {extra: torch.ones(16, 16, 1, 1)})
    assert checkpoints.load(DenseNet(**{**TINY, "num_classes": 0}), state).dropped == (
        "classifier.weight",
        "classifier.bias",
    )


def test_a_level_is_the_written_out_scheme_and_runs_under_others():
    net = fill(DenseNet(**TINY))
    x = torch.randn(2, 3, 8, 8)
    y = net.stem(x)
    for step in net.levels[0].steps:
        y = torch.cat([y, step.fs[0](y)], 1)  # joined or not, the function reads the same
    for _ in range(2):  # the first call goes another way than those after it
        torch.testing.assert_close(net.maps(x)[0], y)
    assert str(net.levels[0].scheme) == "dense(4, join=false)"
    add = DenseNet(**{**TINY, "functions": (2, 4), "scheme": ["euler", "rk4"]})
    assert add(x).shape == (2, 5)
    assert [row["num_chs"] for row in add.feature_info] == [8, 8]
    f1, f2 = (step.fs[0] for step in add.eval().levels[0].steps)
    y = add.stem(x)
    y = y + f1(y)
    torch.testing.assert_close(add.maps(x)[0], y + f2(y))


@pytest.mark.long
def test_levels_start_as_wide_under_any_scheme():
    """Transitions narrow from the concatenation's width, or a stream that does not grow would end at nothing."""
    join, add = (DenseNet((6, 12, 24, 16), scheme=s) for s in ("dense", "euler"))
    starts = [[level.steps[0].fs[0].conv1.in_channels for level in net.levels] for net in (join, add)]
    assert starts[0] == starts[1] == [64, 128, 256, 512]
    assert [row["num_chs"] for row in add.feature_info] == starts[1]


def test_functions_are_the_written_out_formulas():
    x = torch.randn(2, 8, 6, 6)
    kept = x.clone()
    f = fill(DenseFunction(8, 4, bottleneck=4))
    torch.testing.assert_close(f(x), f.conv2(F.relu(f.norm2(f.conv1(F.relu(f.norm1(x)))))))
    plain = fill(DenseFunction(8, 4, bottleneck=0))
    torch.testing.assert_close(plain(x), plain.conv1(F.relu(plain.norm1(x))))
    g = fill(DenseTransition(8, 4))
    torch.testing.assert_close(g(x), F.avg_pool2d(g.conv(F.relu(g.norm(x))), 2))
    assert torch.equal(x, kept)


def test_in_training_a_transition_convolves_a_quarter_of_the_pixels_with_the_same_gradients():
    t = fill(DenseTransition(8, 4)).double().train()
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *t.parameters()]
    flops = []
    for make in (lambda: t(x), lambda: F.avg_pool2d(t.conv(F.relu(t.norm(x))), 2)):
        with FlopCounterMode(display=False) as counter:
            y = make()
        flops.append((y, torch.autograd.grad(y.square().sum(), leaves), counter.get_total_flops()))
    (y, grads, few), (wanted, wanted_grads, many) = flops
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(grads, wanted_grads)
    assert many == 42 / 9 * few  # of 7 x 6 pixels, 3 x 3 blocks
    with FlopCounterMode(display=False) as counter:
        t.eval()(x)
    assert counter.get_total_flops() == many


def test_the_stem_takes_the_greatest_first_with_the_values_and_gradients_of_the_published_order():
    stem = fill(DenseNet([1], growth=4, num_classes=2)).stem.train()
    x = torch.randn(2, 3, 19, 18)
    y = stem(x)
    wanted = stem.pool(F.relu(stem.norm(stem.conv(stem.layout(x)))))
    assert torch.equal(y, wanted) and (y == 0).any()
    parameters = list(stem.parameters())
    for a, b in zip(*(torch.autograd.grad(z.square().sum(), parameters) for z in (y, wanted)), strict=True):
        assert torch.equal(a, b)


def test_dropout_stands_after_every_convolution_but_the_first():
    net = DenseNet(**TINY, drop_rate=0.2)
    rates = [m.drop_rate for m in net.modules() if isinstance(m, (DenseFunction, DenseTransition))]
    assert rates == [0.2] * 6 and net.drop_rate == 0
    f = DenseFunction(8, 4, drop_rate=0.5)
    x = torch.randn(4, 8, 6, 6)
    assert 0.3 < (f(x) == 0).float().mean().item() < 0.7
    assert (f.eval()(x) != 0).all()
    t = DenseTransition(8, 4, drop_rate=0.99)(x)
    assert (t == 0).float().mean().item() > 0.8


def test_recomputation_gives_the_same_gradients_and_moves_statistics_once():
    a = DenseNet(**TINY, drop_rate=0.2)
    b = DenseNet(**TINY, drop_rate=0.2, backprop="checkpoint")
    check_gradients(a, b, torch.randn(4, 3, 16, 16))
    for (key, p), q in zip(a.named_buffers(), b.named_buffers(), strict=True):
        torch.testing.assert_close(p, q[1], msg=key)
    assert int(b.norm[0].num_batches_tracked) == int(b.levels[0].steps[0].fs[0].norm1.num_batches_tracked) == 1


def both(recompute=True, **kwargs):
    """The same network twice, the second with recomputation."""
    a, b = DenseNet(**TINY, **kwargs), DenseNet(**TINY, recompute=recompute, **kwargs)
    b.load_state_dict(a.state_dict())
    return a, b


@pytest.mark.parametrize(("recompute", "drop_rate"), [(True, 0.0), (True, 0.2), (1, 0.0)])
def test_cheap_recomputation_changes_no_gradient_moves_statistics_once_and_runs_no_convolution_again(
    recompute, drop_rate
):
    x = torch.randn(4, 3, 16, 16)
    counts = []
    a, b = both(recompute, drop_rate=drop_rate)
    for net in (a, b):
        torch.manual_seed(1)
        with FlopCounterMode(display=False) as counter:
            net(x).square().sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    for (key, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=key, rtol=1e-4, atol=1e-5)
    for (key, p), q in zip(a.named_buffers(), b.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=key)


def test_cheap_recomputation_keeps_less():
    net = {"functions": (8,), "growth": 8, "stem": "conv3", "num_classes": 5}
    x = torch.randn(4, 3, 16, 16)
    plain, _ = kept_bytes(lambda: DenseNet(**net)(x))
    small, _ = kept_bytes(lambda: DenseNet(**net, recompute=True)(x))
    assert small < 0.4 * plain


def test_one_node_is_norm_relu_and_convolution():
    norm, conv = nn.BatchNorm2d(6), nn.Conv2d(6, 3, 3, padding=1, bias=False)
    fill(nn.Sequential(norm, conv))
    for p in (*norm.parameters(), *norm.buffers(), *conv.parameters()):
        p.data = p.data.double() if p.is_floating_point() else p.data
    xs = [torch.randn(2, c, 5, 5, dtype=torch.float64, requires_grad=True) for c in (4, 2)]
    g = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    leaves = [*xs, norm.weight, norm.bias, conv.weight]
    norm.train()
    want = torch.autograd.grad(conv(norm(torch.cat(xs, 1)).relu()), leaves, g)
    out = norm_relu_conv.norm_relu_conv(norm, conv, *xs)
    assert type(out.grad_fn).__name__ == "_NormReluConvBackward"
    for a, b in zip(torch.autograd.grad(out, leaves, g), want, strict=True):
        torch.testing.assert_close(a, b)
    norm.eval()
    torch.testing.assert_close(norm_relu_conv.norm_relu_conv(norm, conv, *xs), conv(norm(torch.cat(xs, 1)).relu()))


def outcome(run, norm, conv, *shape):
    """Everything that a pass in training leaves behind, or the error's kind; from the same numbers each time."""
    torch.manual_seed(0)
    for module in (norm, conv):
        module.reset_parameters()
    x = torch.randn(shape, requires_grad=True)
    try:
        y = run(norm, conv, x)
        y.square().sum().backward()
    except Exception as error:
        return [str(type(error)), *(b.clone() for b in norm.buffers())]
    grads = [p.grad for m in (norm, conv) for p in m.parameters()]
    norm.zero_grad(), conv.zero_grad()
    return [y.detach(), x.grad, *grads, *(b.clone() for b in norm.buffers())]


@pytest.mark.parametrize("shape", [(3, 4, 5, 5), (1, 4, 1, 2), (1, 4, 1, 1), (4, 5, 5)], ids=str)
@pytest.mark.parametrize("norm", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize(
    "conv",
    [{}, {"bias": True}, {"stride": 2}, {"groups": 2}, {"dilation": 2}, {"padding": "same"}, {"padding": (1, 0)}],
    ids=str,
)
def test_every_norm_convolution_and_picture_gives_what_the_plain_operations_give(conv, norm, shape):
    norm, conv = nn.BatchNorm2d(4, **norm), nn.Conv2d(4, 2, 3, **{"padding": 1, "bias": False, **conv})
    want = outcome(lambda norm, conv, x: conv(norm(x).relu()), norm, conv, *shape)
    found = outcome(norm_relu_conv.norm_relu_conv, norm, conv, *shape)
    torch.testing.assert_close(found[1:], want[1:])
    assert found[0] == want[0] if isinstance(want[0], str) else torch.allclose(found[0], want[0], atol=1e-5)


def test_one_node_runs_under_autocast():
    a, b = both()
    x = torch.randn(8, 3, 16, 16)
    for net in (a, b):
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
    found, want = (torch.cat([p.grad.flatten() for p in net.parameters()]) for net in (b, a))
    assert ((found - want).norm() / want.norm()).item() < 0.05


def test_joined_or_not_the_functions_read_the_same():
    fs = [DenseFunction(8 + 4 * i, 4).eval() for i in range(3)]
    x = torch.randn(2, 8, 6, 6)
    assert torch.equal(Stack(fs, "dense(4)")(x), Stack(fs, "dense(4, join=false)")(x))


@pytest.mark.parametrize("mode", [{"backprop": "checkpoint"}, {"recompute": True}])
def test_drop_path_and_gamma_give_the_same_gradients_in_every_mode(mode):
    torch.manual_seed(0)
    options = {**TINY, "drop_path_rate": 0.5, "layer_scale": 0.3}
    check_gradients(DenseNet(**options), DenseNet(**options, **mode), torch.randn(16, 3, 16, 16))


def test_drop_path_leaves_out_new_channels_alone_and_grows_over_the_depth():
    net = DenseNet(**TINY, drop_path_rate=0.8)
    rates = [f.drop_path.p if f.drop_path else 0.0 for level in net.levels for step in level.steps for f in step.fs]
    assert rates == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])
    level, x = net.levels[-1].train(), torch.randn(64, net.transitions[-1].conv.out_channels, 4, 4)
    y = level(x)
    assert torch.equal(y[:, : x.shape[1]], x)
    last = y[:, -4:].abs().amax((1, 2, 3))
    assert 0.6 < (last == 0).float().mean() < 0.95
    assert (net.eval()(torch.randn(2, 3, 16, 16)) != 0).all()


def test_gamma_multiplies_the_new_channels():
    f = DenseFunction(8, 4, layer_scale=0.25)
    plain = DenseFunction(8, 4)
    plain.load_state_dict({k: v for k, v in f.state_dict().items() if k != "gamma"})
    x = torch.randn(3, 8, 5, 5)
    torch.testing.assert_close(f(x), 0.25 * plain(x))
    assert f.gamma.numel() == 4


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"stem": "patch"}, "want conv3 or conv7_pool"),
        ({"functions": ()}, "want one per level"),
        ({"compression": 0}, "compression is 0"),
        ({"drop_rate": 1}, "drop_rate is 1"),
        ({"drop_path_rate": 1}, "drop_path_rate is 1"),
        ({"scheme": ["dense"]}, "1 schemes for 2 levels"),
        ({"scheme": "rk4"}, "level 1 has 2 residual functions"),
        ({"global_pool": "sum"}, "global_pool is 'sum'"),
    ],
)
def test_wrong_options_are_named(kwargs, message):
    with pytest.raises(SchemeError, match=message):
        DenseNet(**{**TINY, **kwargs})


def test_defaults_are_what_json_keeps():
    defaults = {k: p.default for k, p in inspect.signature(DenseNet).parameters.items()}
    with torch.device("meta"):
        assert DenseNet(**json.loads(json.dumps(defaults))).state_dict().keys() == DenseNet().state_dict().keys()


@pytest.mark.parametrize("layers", [40, 100])
def test_plain_networks_have_the_layers_of_their_name(layers):
    """Convolutions of 3x3 in three equal levels, the stem, two transitions, the classifier."""
    (name,) = list_models(f"densenet{layers}_k12")
    net = meta(name)
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) + 1 == layers
