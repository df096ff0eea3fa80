"""RevCol: supervision, options, heads, the networks it is compared with, DDP."""

import time

import pytest
import torch
import torch.nn.functional as F
from counting import meta, multiply_adds
from published_revcol import public_shapes, random_weights

from odenets import checkpoints
from odenets.models import RevCol, create_model
from odenets.models.revcol import COLUMNS, KERNELS, supervised_columns
from schemes import SchemeError


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


@pytest.mark.cases(1)
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
        # Torch ends a group while it holds Python's lock, for which Gloo's thread may still wait with the last of its
        # work: a deadlock, unless that thread comes first.
        time.sleep(0.2)
        torch.distributed.destroy_process_group()


def test_every_new_head_of_a_supervised_network_is_scaled_and_in_its_mode():
    small = {"channels": (8, 16), "blocks": (1, 1), "columns": 4, "num_classes": 5, "supervision": True}
    net = RevCol(**small, head_init_scale=0.001).eval()
    for classes in (5, 7):
        heads = [net.head, *net.supervision.heads]
        assert len(heads) == 4
        assert all(h.fc.out_features == classes and 0 < h.fc.weight.std() < 1e-4 and not h.training for h in heads)
        net.reset_classifier(7)
