"""RDNet: published sizes and channels, published weights, the scheme behind it, recomputation."""

import inspect
import json

import pytest
import torch
from counting import gmacs, meta, parameters
from published_nets import RDNet as Published
from published_nets import fill, kept_bytes, relative
from stacks import check_gradients

from odenets import checkpoints
from odenets.models import RDNet, create_model, list_models, rdnet
from schemes import SchemeError

# Parameters, 10^9 multiply-adds at 224 x 224, parameter tensors, channels of the pyramid; from the released code.
SIZES = {
    "rdnet_tiny": (23_863_008, 5.0327, 251, [256, 440, 744, 1040]),
    "rdnet_small": (50_436_448, 8.7062, 399, [264, 512, 760, 1264]),
    "rdnet_base": (87_451_096, 15.3582, 399, [408, 584, 1000, 1760]),
    "rdnet_large": (186_269_632, 34.6753, 436, [528, 840, 1528, 2000]),
}
TINY = {
    "growths": (8, 16, 8, 8),
    "downsample": (False, True, True, False),
    "init_channels": 16,
    "num_classes": 5,
}
TINY_SOURCE = (16, (8, 16, 8, 8), (0, 1, 1, 0), 5)


def test_every_name_stands_in_the_table_of_sizes():
    assert set(SIZES) == set(rdnet.RDNETS) == set(list_models("rdnet*"))


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_the_published_ones(name):
    count, cost, tensors, channels = SIZES[name]
    model = meta(name)
    assert parameters(model) == count
    assert gmacs(model, 224) == pytest.approx(cost, abs=5e-5)
    assert len(list(model.parameters())) == tensors
    assert [row["num_chs"] for row in model.feature_info] == channels
    assert [row["reduction"] for row in model.feature_info] == [4, 8, 16, 32]


@pytest.mark.long
def test_384_pixels_cost_what_was_published():
    assert gmacs(meta("rdnet_large"), 384) == pytest.approx(101.8945, abs=5e-5)


def test_channels_of_the_tiny_model_are_the_papers():
    net = meta("rdnet_tiny")
    found = [[step.fs[0].dwconv.in_channels for step in level.steps] for level in net.levels]
    assert found == [
        [64, 128, 192],
        [128, 232, 336],
        [216, 344, 472],
        [296, 424, 552],
        [336, 464, 592],
        [360, 488, 616],
        [368, 592, 816],
    ]
    gates = [level.steps[0].fs[0].gate is not None for level in net.levels]
    assert gates == [False, False, True, True, True, True, True]


@pytest.mark.parametrize(("original", "layout", "eps"), [(True, "naver-ai", 1e-5), (False, "timm", 1e-6)])
def test_published_weights_give_the_same_logits(original, layout, eps):
    source = fill(Published(original, *TINY_SOURCE))
    # A head norm whose variance is near its epsilon, so that the wrong one cannot pass.
    with torch.no_grad():
        for j in range(3):
            source.parts[f"dense_stages.3.2.dense_block{j}.gamma"].gamma.mul_(1e-2)
        source.parts["dense_stages.3.1"].weight.mul_(1e-3)
        source.parts["dense_stages.3.1"].bias.mul_(1e-3)
    model = RDNet(**TINY).eval()
    model.head_norm.eps = 1.0
    report = checkpoints.load(model, source.state_dict())
    assert report == (len(source.state_dict()), layout, (), ())
    assert model.head_norm.eps == eps
    x = torch.randn(2, 3, 64, 64)
    assert relative(model(x), source(x)) < 2e-5
    model.head_norm.eps = 1.1e-5 - eps
    assert relative(model(x), source(x)) > 1e-4


@pytest.mark.parametrize("original", [True, False])
def test_every_published_key_of_the_tiny_model_has_its_place(original):
    with torch.device("meta"):
        model = create_model("rdnet_tiny")
        state = Published(original, 64, (64, 104, 128, 128, 128, 128, 224), (0, 1, 1, 0, 0, 0, 1), 1000).state_dict()
    names = model.key_map(state.keys()).names
    assert len(state) == 251 and set(names.values()) == set(model.state_dict())


def test_misfits_carry_the_published_names():
    state = fill(Published(False, *TINY_SOURCE)).state_dict()
    key = "dense_stages.0.0.dense_block3.gamma"
    with pytest.raises(SchemeError, match=r"without a place: dense_stages\.0\.0\.dense_block3\.gamma"):
        checkpoints.load(RDNet(**TINY), state | {key: torch.ones(8)})
    features = create_model("rdnet_tiny", features_only=True, **TINY)
    report = checkpoints.load(features, state)
    assert set(report.dropped) == {f"head.{p}.{e}" for p in ("norm", "fc") for e in ("weight", "bias")}


def test_a_level_is_the_written_out_scheme_and_runs_under_others():
    net = fill(RDNet(**TINY))
    x = torch.randn(2, 3, 64, 64)
    y = net.stem(x)
    for step in net.levels[0].steps:
        y = torch.cat([y, step.fs[0](y)], 1)  # joined or not, the function reads the same
    for _ in range(2):  # the first call goes another way than those after it
        torch.testing.assert_close(net.maps(x)[0], y)
    add = RDNet(**{**TINY, "init_channels": 64}, functions=4, scheme=["dense", "rk4", "midpoint", "euler"])
    assert add(x).shape == (2, 5)
    assert [str(level.scheme) for level in add.levels] == ["dense(8, join=false)", "rk4", "midpoint", "euler"]


def test_levels_start_as_wide_under_any_scheme():
    with torch.device("meta"):
        join, add = RDNet(), RDNet(scheme="euler")
    starts = [[level.steps[0].fs[0].dwconv.in_channels for level in net.levels] for net in (join, add)]
    assert starts[0] == starts[1] == [64, 128, 216, 296, 336, 360, 368]
    assert add.num_features == 368


@pytest.mark.parametrize("mode", [{"backprop": "checkpoint"}, {"recompute": True}, {"recompute": 1}])
def test_recomputation_gives_the_same_gradients(mode):
    a = RDNet(**TINY, drop_path_rate=0.3)
    b = RDNet(**TINY, drop_path_rate=0.3, **mode)
    check_gradients(a, b, torch.randn(16, 3, 32, 32))


def test_recomputation_keeps_less():
    x = torch.randn(4, 3, 64, 64)
    plain, _ = kept_bytes(lambda: RDNet(**TINY)(x))
    small, _ = kept_bytes(lambda: RDNet(**TINY, recompute=True)(x))
    first, _ = kept_bytes(lambda: RDNet(**TINY, recompute=1)(x))
    smaller, _ = kept_bytes(lambda: RDNet(**TINY, backprop="checkpoint")(x))
    assert smaller < small < 0.5 * plain
    assert small < first < 0.8 * plain


def test_drop_path_leaves_out_new_channels_alone():
    net = RDNet(**TINY, drop_path_rate=0.99)
    level = net.levels[-1].train()
    x = torch.randn(16, net.transitions[-1].conv.out_channels, 2, 2)
    y = level(x)
    assert torch.equal(y[:, : x.shape[1]], x)
    assert (y[:, -8:].abs().sum((1, 2, 3)) == 0).float().mean() > 0.8
    rates = [f.drop_path.p if f.drop_path else 0.0 for lv in net.levels for step in lv.steps for f in step.fs]
    assert rates == pytest.approx([0.99 * i / 11 for i in range(12)])


def test_heads_and_starting_weights():
    net = RDNet(**TINY)
    assert not net.head.bias.any()
    torch.manual_seed(2)
    plain = RDNet(**TINY)
    torch.manual_seed(2)
    scaled = RDNet(**TINY, head_init_scale=1e-3)
    torch.testing.assert_close(scaled.head.weight, plain.head.weight * 1e-3)
    wide = RDNet((64,), downsample=(False,), init_channels=256)
    assert wide.levels[0].steps[0].fs[0].fc1.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"downsample": (False,)}, "4 growths, 4 counts of mixers, 1 entries of downsample"),
        ({"functions": [3, 3]}, "4 growths, 2 counts"),
        ({"drop_path_rate": -1}, "drop_path_rate is -1"),
        ({"scheme": "midpoint"}, "level 1 has 3 residual functions"),
        ({"scheme": ["dense"] * 3}, "3 schemes for 4 levels"),
    ],
)
def test_wrong_options_are_named(kwargs, message):
    with pytest.raises(SchemeError, match=message):
        RDNet(**{**TINY, **kwargs})


def test_defaults_are_what_json_keeps():
    defaults = {k: p.default for k, p in inspect.signature(RDNet).parameters.items()}
    with torch.device("meta"):
        assert RDNet(**json.loads(json.dumps(defaults))).state_dict().keys() == RDNet().state_dict().keys()
