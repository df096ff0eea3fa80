"""RevCol: published sizes and weights, against a plain re-implementation on the published keys."""

import pytest
import torch
from counting import meta, multiply_adds, parameters
from published_revcol import (
    SMALL,
    close,
    pair,
    public_decoder,
    public_forward,
    public_head,
    public_shapes,
    random_weights,
)
from torch.utils.flop_counter import FlopCounterMode

from odenets import checkpoints
from odenets.models import RevCol, pad_kernels
from odenets.models.revcol import REVCOLS
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


# --- sizes --------------------------------------------------------------------------------------------------------


def test_every_named_revcol_stands_in_the_table():
    assert set(SIZES) == set(REVCOLS)


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_the_published_ones(name):
    backbone, head, supervised, many, tensors, _ = SIZES[name]
    assert parameters(meta(name, num_classes=0)) == backbone
    assert parameters(meta(name, features_only=True)) == backbone
    plain, full = meta(name), meta(name, supervision=True)
    assert (parameters(plain), parameters(full)) == (head, supervised)
    assert (len(plain.state_dict()), len(full.state_dict())) == tensors
    assert parameters(meta(name, supervision=True, num_classes=21_841)) == many


@pytest.mark.long
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


@pytest.mark.cases(4)
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


@pytest.mark.cases(4)
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
