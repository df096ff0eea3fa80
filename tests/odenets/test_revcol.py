"""RevCol: published sizes and weights, against a plain re-implementation on the published keys."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from odenets import checkpoints
from odenets.models import RevCol, create_model, pad_kernels
from odenets.models.revcol import supervised_columns
from odenets.models.zoo_reversible import COLUMNS, KERNELS, REVCOLS
from schemes import SchemeError

# Parameters: the backbone, with a head for 1,000 classes, with supervision for 1,000 and for 21,841 classes;
# tensors without and with supervision; 10^9 multiply-adds at given sides. Counted from the released code.
SIZES = {
    "revcol_tiny": (29_942_144, 30_456_168, 33_063_984, 79_494_852, (468, 603), {224: 4.517}),
    "revcol_small": (60_054_400, 60_568_424, 63_176_240, 109_607_108, (940, 1075), {224: 9.044}),
    "revcol_base": (138_038_256, 138_616_408, 141_694_960, 193_772_980, (1452, 1587), {224: 16.585, 384: 48.740}),
    "revcol_large": (272_068_352, 273_095_400, 280_372_272, 371_077_188, (1012, 1147), {224: 39.306, 384: 115.510}),
    "revcol_xlarge": (
        832_010_816, 833_807_400, 851_958_576, 1_005_203_844, (1012, 1147), {224: 120.206, 384: 353.255},
    ),
    "revcol_huge": (
        2_154_713_400, 2_157_600_160, 2_199_107_704, 2_433_000_700, (1040, 1175), {224: 310.617, 640: 2535.629},
    ),
}  # fmt: skip
SMALL = {"channels": (4, 8, 12, 16), "blocks": (1, 2, 1, 1), "num_classes": 5}


def meta(name, **kwargs):
    with torch.device("meta"):
        return create_model(name, **kwargs)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def multiply_adds(net, side):
    """Those of convolutions and linear layers, all that this network has."""
    total = 0

    def count(module, args, y):
        nonlocal total
        each = module.weight[0].numel() if isinstance(module, nn.Conv2d) else module.in_features
        total += y.numel() * each

    handles = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        net(torch.empty(1, 3, side, side, device="meta"))
    for handle in handles:
        handle.remove()
    return total


# --- the published network, written down plainly on its own keys --------------------------------------------------


def block_shapes(prefix, c, hidden, kernel):
    return {
        f"{prefix}.gamma": (c,),
        f"{prefix}.dwconv.weight": (c, 1, kernel, kernel),
        f"{prefix}.dwconv.bias": (c,),
        f"{prefix}.norm.weight": (c,),
        f"{prefix}.norm.bias": (c,),
        f"{prefix}.pwconv1.weight": (hidden, c),
        f"{prefix}.pwconv1.bias": (hidden,),
        f"{prefix}.pwconv2.weight": (c, hidden),
        f"{prefix}.pwconv2.bias": (c,),
    }


def pair_shapes(prefix, weight):
    """A layer, then a norm of its width."""
    c = weight[0]
    return {
        f"{prefix}.0.weight": weight,
        f"{prefix}.0.bias": (c,),
        f"{prefix}.1.weight": (c,),
        f"{prefix}.1.bias": (c,),
    }


def public_shapes(channels, blocks, columns, kernel_size=3, num_classes=1000, supervision=False, huge=False):
    shapes = pair_shapes("stem", (channels[0], 3, 4, 4))
    for i in range(columns):
        for level, (c, count) in enumerate(zip(channels, blocks, strict=True)):
            at = f"subnet{i}.level{level}"
            shapes[f"subnet{i}.alpha{level}"] = (1, c, 1, 1)
            if level:
                shapes |= pair_shapes(f"{at}.fusion.down", (c, channels[level - 1], 2, 2))
            if i and level < 3:
                shapes |= pair_shapes(f"{at}.fusion.up.channel_reschedule", (c, channels[level + 1]))
            if i and huge and not level:
                shapes |= pair_shapes(f"{at}.fusion.up2.channel_reschedule", (c, channels[3]))
            for j in range(count):
                shapes |= block_shapes(f"{at}.blocks.{j}", c, 4 * c, kernel_size)
    c = channels[-1]
    for head in [f"cls_blocks.{k}" for k in range(4)] if supervision else ["cls"]:
        at = f"{head}.classifier"
        shapes |= {f"{at}.0.weight": (c,), f"{at}.0.bias": (c,)}
        shapes |= {f"{at}.1.weight": (num_classes, c), f"{at}.1.bias": (num_classes,)}
    for k in range(3) if supervision else ():
        at = f"decoder_blocks.{k}"
        if num_classes > 1000:
            shapes |= {f"{at}.projback.0.weight": (c,), f"{at}.projback.0.bias": (c,)}
            shapes |= {f"{at}.projback.1.weight": (3072, c, 1, 1), f"{at}.projback.1.bias": (3072,)}
            continue
        for s, (a, b) in enumerate([(channels[3 - s], channels[2 - s]) for s in range(3)]):
            shapes |= pair_shapes(f"{at}.proj_layers.{s}", (b, a, 1, 1))
            shapes |= block_shapes(f"{at}.normal_layers.{s}.0", b, b, 3)
        shapes |= {f"{at}.projback.0.weight": (48, channels[0], 1, 1), f"{at}.projback.0.bias": (48,)}
    return shapes


def random_weights(shapes, dtype=torch.float64):
    """Weights under which every part matters: norms and gammas about 1, alphas of both signs."""
    state = {}
    for key, shape in shapes.items():
        fan = max(1, torch.Size(shape[1:]).numel())
        value = torch.randn(shape, dtype=dtype) / fan**0.5
        if "alpha" in key:
            value = torch.randn(shape, dtype=dtype).sign() * (0.3 + 0.6 * torch.rand(shape, dtype=dtype))
        elif key.endswith("gamma") or (len(shape) == 1 and key.endswith("weight")):
            value = 0.5 + 0.2 * torch.randn(shape, dtype=dtype)
        state[key] = value
    return state


def norm_of_pixels(x, state, key):
    mean = x.mean(1, keepdim=True)
    var = (x - mean).square().mean(1, keepdim=True)
    c = x.shape[1]
    x = (x - mean) / torch.sqrt(var + 1e-6)
    return x * state[f"{key}.weight"].view(1, c, 1, 1) + state[f"{key}.bias"].view(1, c, 1, 1)


def pixelwise(x, state, key):
    weight = state[f"{key}.weight"]
    return F.conv2d(x, weight.view(*weight.shape[:2], 1, 1), state[f"{key}.bias"])


def public_block(x, state, key):
    w = state[f"{key}.dwconv.weight"]
    y = F.conv2d(x, w, state[f"{key}.dwconv.bias"], padding=w.shape[-1] // 2, groups=x.shape[1])
    y = pixelwise(norm_of_pixels(y, state, f"{key}.norm"), state, f"{key}.pwconv1")
    y = pixelwise(0.5 * y * (1 + torch.erf(y / 2**0.5)), state, f"{key}.pwconv2")
    return x + state[f"{key}.gamma"].view(1, -1, 1, 1) * y


def public_forward(state, x, columns, blocks):
    """The last level after every column, from the published keys: plain sums and products, no reversibility."""
    stem = norm_of_pixels(F.conv2d(x, state["stem.0.weight"], state["stem.0.bias"], stride=4), state, "stem.1")
    old, lasts = [None] * 4, []
    for i in range(columns):
        new = []
        for level in range(4):
            at = f"subnet{i}.level{level}"
            y = stem
            if level:
                w, b = state[f"{at}.fusion.down.0.weight"], state[f"{at}.fusion.down.0.bias"]
                y = norm_of_pixels(F.conv2d(new[-1], w, b, stride=2), state, f"{at}.fusion.down.1")
            for up, source, factor in (("up", level + 1, 2), ("up2", 3, 8)):
                key = f"{at}.fusion.{up}.channel_reschedule"
                if f"{key}.0.weight" in state:
                    z = norm_of_pixels(pixelwise(old[source], state, f"{key}.0"), state, f"{key}.1")
                    y = y + z.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
            for j in range(blocks[level]):
                y = public_block(y, state, f"{at}.blocks.{j}")
            alpha = state[f"subnet{i}.alpha{level}"]
            new.append(y + alpha * (torch.zeros_like(y) if old[level] is None else old[level]))
        old = new
        lasts.append(new[-1])
    return old, lasts


def public_head(c3, state, key):
    x = c3.mean((2, 3), keepdim=True)
    return pixelwise(norm_of_pixels(x, state, f"{key}.classifier.0"), state, f"{key}.classifier.1").flatten(1)


def public_decoder(x, state, key):
    if f"{key}.proj_layers.0.0.weight" not in state:
        y = norm_of_pixels(x, state, f"{key}.projback.0")
        return F.pixel_shuffle(pixelwise(y, state, f"{key}.projback.1"), 32)
    for s in range(3):
        y = norm_of_pixels(pixelwise(x, state, f"{key}.proj_layers.{s}.0"), state, f"{key}.proj_layers.{s}.1")
        y = F.interpolate(F.gelu(y), scale_factor=2, mode="bilinear", align_corners=True)
        x = public_block(y, state, f"{key}.normal_layers.{s}.0")
    return F.pixel_shuffle(pixelwise(x, state, f"{key}.projback.0"), 4)


def pair(columns=4, dtype=torch.float64, **kwargs):
    """A network and the published weights that it holds."""
    config = {**SMALL, "columns": columns, **kwargs}
    public = {k: v for k, v in config.items() if k != "backprop"}
    state = random_weights(public_shapes(**public), dtype)
    net = RevCol(**config).to(dtype)
    report = checkpoints.load(net, state)
    assert report.loaded == len(state) and report.layout == "published RevCol" and not report.dropped
    return net, state


# --- sizes --------------------------------------------------------------------------------------------------------


def test_every_named_revcol_stands_in_the_table():
    assert set(SIZES) == set(REVCOLS)


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_the_published_ones(name):
    backbone, head, supervised, many, tensors, _ = SIZES[name]
    assert parameters(meta(name, num_classes=0)) == backbone
    assert parameters(meta(name, features_only=True)) == backbone
    plain, full = meta(name), meta(name, supervision=True)
    assert (parameters(plain), parameters(full)) == (head, supervised)
    assert (len(plain.state_dict()), len(full.state_dict())) == tensors
    assert parameters(meta(name, supervision=True, num_classes=21_841)) == many


@pytest.mark.parametrize("name", SIZES)
def test_multiply_adds_are_the_published_ones(name):
    net = meta(name).eval()
    for side, published in SIZES[name][-1].items():
        assert round(multiply_adds(net, side) / 1e9, 3) == published


def test_the_count_of_multiply_adds_is_torchs():
    net = RevCol(**SMALL, columns=2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.empty(1, 3, 32, 32))
    assert counter.get_total_flops() == 2 * multiply_adds(net.to("meta"), 32)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("supervision", [False, True])
def test_published_keys_all_have_a_place(name, supervision):
    net = meta(name, supervision=supervision)
    shapes = public_shapes(**{"huge": False, **REVCOLS[name]}, supervision=supervision)
    own, names = net.state_dict(), net.key_map(shapes).names
    assert {key: own[names[key]].shape for key in shapes} == {k: torch.Size(s) for k, s in shapes.items()}
    assert len(set(names.values())) == len(own)


# --- against the plain re-implementation ----------------------------------------------------------------------------


CASES = [(4, {}), (4, {"supervision": True}), (8, {"kernel_size": 5}), (4, {"huge": True}), (1, {}), (3, {})]


@pytest.mark.parametrize("backprop", ["store", "reverse", "checkpoint"])
@pytest.mark.parametrize(
    ("columns", "options", "dtype", "bound"),
    [(*case, torch.float64, 1e-10) for case in CASES] + [(*case, torch.float32, 2e-5) for case in CASES[1:4]],
    ids=str,
)
def test_logits_features_and_gradients_are_the_published_ones(columns, options, dtype, bound, backprop):
    net, state = pair(columns, dtype, **options, backprop=backprop)
    state = {k: v.requires_grad_() for k, v in state.items()}
    x = torch.rand(2, 3, 64, 32, dtype=dtype)
    levels, lasts = public_forward(state, x, columns, SMALL["blocks"])
    if "supervision" in options:
        want = [public_head(lasts[k], state, f"cls_blocks.{k}") for k in range(4)]
        want += [public_decoder(lasts[k], state, f"decoder_blocks.{k}") for k in range(3)]
        found = net.forward_supervised(x)
        assert [a.shape for a in found.images] == [x.shape] * 3
        found = [*found.logits, *found.images]
        assert close(net(x), want[3], bound)
    else:
        want, found = [public_head(lasts[-1], state, "cls")], [net(x)]
    for a, b in zip(found, want, strict=True):
        assert close(a, b, bound)
    for a, b in zip(net.maps(x), levels, strict=True):
        assert close(a, b, bound)
    sum(y.square().mean() for y in want).backward()
    sum(y.square().mean() for y in found).backward()
    names = net.key_map(state).names
    own = dict(net.named_parameters())
    for key in state:
        assert own[names[key]].grad is not None, key
    ours = torch.cat([own[names[key]].grad.flatten() for key in state])
    theirs = torch.cat([value.grad.flatten() for value in state.values()])
    assert close(ours, theirs, bound)
    assert all(bool((own[f"idle.{level}"].grad == 0).all()) for level in range(4))


def close(a, b, bound):
    """Relative difference in the Euclidean norm."""
    return bool((a - b).norm() <= bound * b.norm())


def test_the_decoder_for_many_classes_is_the_published_one():
    net, state = pair(4, supervision=True, num_classes=1001)
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    _, lasts = public_forward(state, x, 4, SMALL["blocks"])
    for k, image in enumerate(net.forward_supervised(x).images):
        assert close(image, public_decoder(lasts[k], state, f"decoder_blocks.{k}"), 1e-10)


# --- published weights --------------------------------------------------------------------------------------------


def test_a_training_checkpoint_loads():
    state = random_weights(public_shapes(**SMALL, columns=4, supervision=True), torch.float32)
    held = {"model": state, "state_dict_ema": state, "optimizer": {"state": {}}, "epoch": 3, "max_accuracy": 82.2}
    net = RevCol(**SMALL, columns=4, supervision=True)
    assert checkpoints.load(net, held).loaded == len(state)
    torch.testing.assert_close(net.head.fc.weight, state["cls_blocks.3.classifier.1.weight"])


def test_the_last_of_several_heads_becomes_the_only_one():
    state = random_weights(public_shapes(**SMALL, columns=4, supervision=True), torch.float32)
    net = RevCol(**SMALL, columns=4)
    report = checkpoints.load(net, state)
    assert len(report.dropped) == 3 * 4 + 3 * (3 * 13 + 2)
    assert {k.split(".")[0] for k in report.dropped} == {"cls_blocks", "decoder_blocks"}
    assert not any(k.startswith("cls_blocks.3") for k in report.dropped)
    x = torch.rand(2, 3, 32, 32)
    _, lasts = public_forward(state, x, 4, SMALL["blocks"])
    torch.testing.assert_close(net(x), public_head(lasts[-1], state, "cls_blocks.3"), rtol=2e-5, atol=2e-5)


def test_a_backbone_drops_every_head_and_lists_it():
    state = random_weights(public_shapes(**SMALL, columns=4), torch.float32)
    report = checkpoints.load(RevCol(**{**SMALL, "num_classes": 0}, columns=4), state)
    assert sorted(report.dropped) == sorted(k for k in state if k.startswith("cls."))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"subnet0.level0.blocks.7.gamma": torch.ones(4)}, r"1 without a place: subnet0\.level0"),
        (lambda s: s | {"subnet1.level0.gate": torch.ones(4)}, r"1 without a place: subnet1\.level0\.gate"),
        (lambda s: s | {"subnet2.alpha1": torch.ones(9)}, r"1 of another shape: subnet2\.alpha1"),
        (
            lambda s: {k: v for k, v in s.items() if k != "subnet2.alpha1"},
            r"1 missing: columns\.steps\.2\.gs\.1",
        ),
    ],
)
def test_what_does_not_fit_is_listed_and_refused(change, message):
    state = random_weights(public_shapes(**SMALL, columns=4), torch.float32)
    net = RevCol(**SMALL, columns=4)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(SchemeError, match=message):
        checkpoints.load(net, change(state))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_own_weights_come_back(tmp_path):
    net, _ = pair(3, torch.float32)
    checkpoints.save(net, tmp_path / "net.safetensors")
    again = RevCol(**SMALL, columns=3)
    assert checkpoints.load(again, tmp_path / "net.safetensors").layout == "own"
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(again(x), net(x))


def test_kernels_are_set_into_larger_ones():
    state = random_weights(public_shapes(**SMALL, columns=2), torch.float32)
    small, large = RevCol(**SMALL, columns=2), RevCol(**SMALL, columns=2, kernel_size=7)
    checkpoints.load(small, state)
    wide = pad_kernels(state, 7)
    checkpoints.load(large, wide)
    kernels = [v.clone() for k, v in wide.items() if k.endswith("dwconv.weight")]
    for kernel in kernels:
        kernel[..., 2:5, 2:5] = torch.nan
    new = torch.cat([kernel[~kernel.isnan()] for kernel in kernels])
    assert 0.9e-7 < new.std() < 1.1e-7
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(large(x), small(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(SchemeError, match="want an odd side, at least as large"):
        pad_kernels(wide, 5)
    with pytest.raises(SchemeError, match="want an odd side"):
        pad_kernels(wide, 8)


# --- behaviour ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", range(1, 12))
def test_supervision_stands_after_every_quarter(columns):
    at = supervised_columns(columns)
    assert at[-1] == columns and len(at) == min(columns, 4) and list(at) == sorted(set(at)) and at[0] >= 1
    if columns % 4 == 0:
        assert at == tuple(columns * k // 4 for k in (1, 2, 3, 4))


@pytest.mark.parametrize("columns", [1, 2, 5, 6])
def test_supervision_works_for_any_number_of_columns(columns):
    net = RevCol((4, 8), (1, 1), columns=columns, num_classes=3, supervision=True)
    x = torch.rand(2, 3, 16, 24)
    logits, images = net.forward_supervised(x)
    assert len(logits) == len(images) + 1 == len(supervised_columns(columns))
    assert all(y.shape == (2, 3) for y in logits) and all(y.shape == x.shape for y in images)
    assert torch.equal(net(x), logits[-1])


def test_every_parameter_gets_a_gradient_and_only_the_idle_ones_a_zero():
    net = RevCol((4, 8), (1, 1), columns=3, num_classes=3, supervision=True)
    checkpoints_gamma(net)
    sum(y.square().sum() for part in net.forward_supervised(torch.rand(2, 3, 16, 16)) for y in part).backward()
    for key, p in net.named_parameters():
        assert p.grad is not None, key
        assert bool(p.grad.abs().sum() > 0) != key.startswith("idle."), key


def checkpoints_gamma(net):
    with torch.no_grad():
        for key, p in net.named_parameters():
            if key.endswith("gamma"):
                p.fill_(1.0)


def test_nothing_writes_to_the_callers_list_or_to_the_parameters():
    channels = [4, 8]
    net = RevCol(channels, [1, 1], columns=3, num_classes=3, supervision=True)
    with torch.no_grad():
        net.columns.steps[1].gs[0].alpha.zero_()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.forward_supervised(torch.rand(2, 3, 16, 16)).logits[-1].sum().backward()
    assert channels == [4, 8] and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


def test_drop_path_grows_over_the_blocks_and_is_the_same_in_every_column():
    net = meta("revcol_tiny", drop_path_rate=0.1)
    rates = [[b.drop_path.p if b.drop_path else 0.0 for f in step.fs for b in f.blocks] for step in net.columns.steps]
    assert rates == [pytest.approx([0.1 * i / 9 for i in range(10)])] * 4


def test_sides_that_do_not_fit_are_refused_or_padded():
    options = {"channels": (4, 8, 8, 8), "blocks": (1, 1, 1, 1), "columns": 2, "num_classes": 3, "supervision": True}
    net = RevCol(**options)
    x = torch.rand(1, 3, 48, 100)
    with pytest.raises(SchemeError, match=r"48 x 100; want multiples of 32\.\n.*pad=True"):
        net(x)
    padding = RevCol(**options, pad=True)
    padding.load_state_dict(net.state_dict())
    torch.testing.assert_close(padding(x), net(F.pad(x, (0, 28, 0, 16))))
    assert all(y.shape == x.shape for y in padding.forward_supervised(x).images)


def test_a_backbone_gives_the_pyramid_that_it_announces():
    net = create_model("revcol_tiny", channels=(4, 8, 12, 16), features_only=True)
    maps = net(torch.rand(1, 3, 64, 96))
    assert [m.shape for m in maps] == [
        (1, row["num_chs"], 64 // row["reduction"], 96 // row["reduction"]) for row in net.feature_info
    ]
    with torch.device("meta"):
        coarse = create_model("revcol_tiny", features_only=True, out_indices=(-2, -1))
    assert [row["num_chs"] for row in coarse.feature_info] == [256, 512]
    net.train()
    sum(m.square().sum() for m in net(torch.rand(1, 3, 32, 32))).backward()
    assert all(p.grad is not None for p in net.parameters())
    state = random_weights(public_shapes((4, 8, 12, 16), (2, 2, 4, 2), 4), torch.float32)
    assert len(checkpoints.load(net, state).dropped) == 4


def test_heads_are_exchanged():
    net = RevCol((4, 8), (1, 1), columns=2, num_classes=3, supervision=True).double()
    net.reset_classifier(7)
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    assert [y.shape for y in net.forward_supervised(x).logits] == [(1, 7)] * 2
    features = net.forward_features(x)
    torch.testing.assert_close(net.forward_head(features, pre_logits=True), features.mean((2, 3)))
    net.reset_classifier(0)
    assert net.supervision is None and net(x).shape == (1, 8)
    net.reset_classifier(0, "")
    assert net(x).shape == (1, 8, 1, 1)
    with pytest.raises(SchemeError, match="supervision=True"):
        net.forward_supervised(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": (1,)}, "one width and at least one block per level"),
        ({"blocks": (1, 0)}, "at least one block per level"),
        ({"columns": 0}, "columns is 0, want a whole number"),
        ({"drop_path_rate": 1.0}, "want 0 <= rate < 1"),
        ({"num_classes": 0, "supervision": True}, "supervision needs a head"),
        ({"huge": True}, "levels is 2, want .* at least 3"),
        ({"global_pool": "max"}, "global_pool is 'max'"),
        ({"global_pool": ""}, "need a pooled one"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(SchemeError, match=message):
        RevCol(**{"channels": (4, 8), "blocks": (1, 1), **options})


@pytest.mark.parametrize("name", COLUMNS)
def test_other_numbers_of_columns_cost_about_as_much(name):
    assert 4.4 < multiply_adds(meta(name), 224) / 1e9 < 4.6


def test_comparison_models_train():
    small = {"channels": (4, 8, 12, 16), "blocks": (1, 1, 1, 1), "num_classes": 3}
    convnext = {"functions": (2, 2, 2, 2), "widths": (8, 8, 16, 16), "num_classes": 3, "backprop": "reverse"}
    for name, options in [("multicolumn_tiny", small), ("revconvnext_tiny", convnext), *((k, small) for k in KERNELS)]:
        net = create_model(name, **options)
        net(torch.rand(2, 3, 32, 32)).square().sum().backward()
        assert all(p.grad is not None for p in net.parameters()), name
    assert create_model("revcol_tiny_k7", **small).columns.steps[0].fs[0].blocks[0].dwconv.kernel_size == (7, 7)


def test_a_multi_column_net_reads_every_level_of_the_last_column():
    net = create_model("multicolumn_tiny", channels=(4, 8), blocks=(1, 1), columns=3, num_classes=3)
    x = torch.rand(2, 3, 16, 16)
    first, second, last = net.levels
    stem = net.stem(x)

    def block(column, level, y):
        return y + column.blocks[level][0](y)

    a = block(first, 0, stem)
    b = block(first, 1, first.links[1][0](a))
    c = block(second, 0, a + second.links[0][1](b))
    d = block(second, 1, second.links[1][0](a) + b)
    e = block(last, 0, last.links[0][0](c) + d)
    torch.testing.assert_close(net.forward_features(x), e)
    with pytest.raises(SchemeError, match="multiples of 8"):
        net(torch.rand(1, 3, 12, 16))


@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")  # of a depthwise kernel
@pytest.mark.parametrize("backprop", ["store", "reverse"])
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_the_idle_factors_do_not_trouble_ddp(backprop, tmp_path):
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = RevCol((4, 8), (1, 1), columns=3, num_classes=3, backprop=backprop)
        ddp = DistributedDataParallel(net)
        for _ in range(3):  # a parameter without a gradient is an error in the second pass
            ddp(torch.rand(2, 3, 16, 16)).sum().backward()
        assert all(p.grad is not None for p in net.parameters())
    finally:
        torch.distributed.destroy_process_group()
