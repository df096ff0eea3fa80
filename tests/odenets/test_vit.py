"""ViT and RevCol-ViT: published sizes, schemes as one word, the written-out encoder."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from odenets import checkpoints
from odenets.layers.attention import AttentionFunction, PerceptronFunction, TransformerFunction
from odenets.models import RevColViT, ViT, create_model
from odenets.models.revcol_vit import REVCOL_VITS, TokenLevel
from schemes import SchemeError

NESTED = "nested(midpoint, repeat(euler, 2))"
SMALL = {"depth": 4, "dim": 16, "heads": 2, "patch": 4, "size": 16, "num_classes": 3}


# DeiT's Ti, S and B; the last is ViT-B/16's too.
NUMBERS = [("vit_tiny_patch16", 5_717_416), ("vit_small_patch16", 22_050_664), ("vit_base_patch16", 86_567_656)]


def meta(name, **kwargs):
    with torch.device("meta"):
        return create_model(name, **kwargs)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("scheme", ["euler", "midpoint", "rk4", NESTED])
@pytest.mark.parametrize(("name", "count"), NUMBERS)
def test_parameters_are_the_published_ones_under_every_scheme(name, count, scheme):
    assert parameters(meta(name, scheme=scheme)) == count


def test_the_encoder_is_torchs():
    net = ViT(**SMALL).double().eval()
    x = torch.randn(2, 20, 16, dtype=torch.float64)
    want = x
    for attention, perceptron in (net.levels[0].steps[i : i + 2] for i in range(0, 8, 2)):
        a, p = attention.fs[0], perceptron.fs[0]
        layer = nn.TransformerEncoderLayer(16, 2, 64, 0.0, F.gelu, 1e-6, batch_first=True, norm_first=True).double()
        layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias = a.qkv.weight, a.qkv.bias
        layer.self_attn.out_proj, layer.linear1, layer.linear2 = a.proj, p.fc1, p.fc2
        layer.norm1, layer.norm2 = a.norm, p.norm
        want = layer(want)
    torch.testing.assert_close(net.levels[0](x), want)


def test_the_nested_scheme_makes_midpoint_steps_of_blocks():
    net = ViT(**{**SMALL, "depth": 2}, scheme=NESTED).double().eval()
    (step,) = net.levels[0].steps
    a1, p1, a2, p2 = step.fs
    assert [type(f) for f in step.fs] == [AttentionFunction, PerceptronFunction] * 2
    x = torch.randn(2, 5, 16, dtype=torch.float64)

    def block(x, a, p):
        y = x + a(x)
        return y + p(y) - x

    want = x + block(x + block(x, a1, p1) / 2, a2, p2)
    torch.testing.assert_close(net.levels[0](x), want)


@pytest.mark.parametrize("scheme", ["euler", "midpoint", NESTED])
def test_depth_init_divides_the_outputs_of_block_k_by_the_root_of_2_k(scheme):
    torch.manual_seed(0)
    plain = ViT(**SMALL, scheme=scheme)
    torch.manual_seed(0)
    net = ViT(**SMALL, scheme=scheme, depth_init=True)
    fs, gs = ([f for step in n.levels[0].steps for f in step.fs] for n in (net, plain))
    x = torch.randn(2, 5, 16)
    for i, (f, g) in enumerate(zip(fs, gs, strict=True)):
        torch.testing.assert_close(f(x), g(x) / (2 * (i // 2 + 1)) ** 0.5)
    with pytest.raises(SchemeError, match="depth_init"):
        ViT(**SMALL, continuous=2, depth_init=True)


def test_depth_init_counts_the_blocks_of_each_column():
    options = {"dim": 16, "blocks": (1, 2), "heads": 2, "columns": 2, "patch": 4, "size": 16, "num_classes": 3}
    torch.manual_seed(0)
    plain = RevColViT(**options)
    torch.manual_seed(0)
    net = RevColViT(**options, depth_init=True)
    assert net.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(2, 5, 16)
    for column, other in zip(net.columns.steps, plain.columns.steps, strict=True):
        fs, gs = ([f for level in c.fs for f in level.blocks] for c in (column, other))
        assert len(fs) == 6
        for i, (f, g) in enumerate(zip(fs, gs, strict=True)):
            torch.testing.assert_close(f(x), g(x) / (2 * (i // 2 + 1)) ** 0.5)


def test_public_weights_load_into_every_twin():
    source = ViT(**SMALL).eval()
    state = {}
    for key, value in source.state_dict().items():
        if key.startswith("levels"):
            _, _, _, n, _, _, *rest = key.split(".")
            block, second = divmod(int(n), 2)
            names = ("norm2", "mlp") if second else ("norm1", "attn")
            rest = rest[1:] if rest[0] == "norm" else rest
            part = names[0] if ".norm." in key else names[1]
            state[f"blocks.{block}.{part}.{'.'.join(rest)}"] = value
        else:
            key = key.replace("stem.proj", "patch_embed.proj").replace("stem.positions", "pos_embed")
            state[key.replace("stem.class_token", "cls_token")] = value
    x = torch.randn(2, 3, 16, 16)
    net = ViT(**SMALL).eval()
    assert checkpoints.load(net, state).layout == "public ViT"
    assert torch.equal(net(x), source(x))
    twin = ViT(**SMALL, scheme=NESTED)
    assert checkpoints.load(twin, state).loaded == len(state)
    again = ViT(**SMALL, scheme="midpoint").eval()
    checkpoints.load(again, twin.state_dict())
    checkpoints.load(net, again.state_dict())
    assert torch.equal(net(x), source(x))
    features = ViT(**{**SMALL, "num_classes": 0})
    assert set(checkpoints.load(features, state).dropped) == {"head.weight", "head.bias"}
    with pytest.raises(SchemeError, match=r"without a place: blocks\.4\.norm1"):
        checkpoints.load(net, state | {"blocks.4.norm1.weight": torch.ones(16)})


def test_other_sides_interpolate_the_positions_and_broken_patches_are_refused():
    net = ViT(**SMALL)
    assert net(torch.randn(1, 3, 24, 16)).shape == (1, 3)
    with torch.no_grad():
        net.stem.positions.fill_(0.7)
    torch.testing.assert_close(net.stem._positions(6, 4), torch.full((1, 25, 16), 0.7))
    with pytest.raises(SchemeError, match=r"the picture is 18 x 16; want multiples of 4"):
        net(torch.randn(1, 3, 18, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 3, "scheme": "rk4"}, "has 6 residual functions, and rk4 takes 4 a step: use 4 or 8"),
        ({"scheme": "revcol"}, "take one argument"),
        ({"global_pool": "max"}, "want 'token', 'avg' or ''"),
        ({"global_pool": ""}, "num_classes=0"),
        ({"drop_rate": -1}, "drop_rate is -1"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(SchemeError, match=message):
        ViT(**{**SMALL, **options})


def test_poolings():
    x = torch.randn(2, 3, 16, 16)
    net = ViT(**SMALL, global_pool="avg").eval()
    tokens = net.forward_features(x)
    assert tokens.shape == (2, 17, 16)
    torch.testing.assert_close(net(x), net.head(tokens[:, 1:].mean(1)))
    net.reset_classifier(0, "")
    assert torch.equal(net(x), tokens)
    net.reset_classifier(5, "token")
    torch.testing.assert_close(net(x), net.head(tokens[:, 0]))


def test_reversible_tokens_have_the_gradients_of_the_stored_run():
    for make in (
        lambda mode: ViT(**SMALL, scheme="revnet(dim=2)", drop_path_rate=0.3, backprop=mode),
        lambda mode: RevColViT(16, (1, 2), 2, 3, patch=4, size=16, num_classes=3, drop_path_rate=0.3, backprop=mode),
    ):
        a, b = make("store").double(), make("reverse").double()
        b.load_state_dict(a.state_dict())
        x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
        for net in (a, b):
            torch.manual_seed(1)
            net(x).square().sum().backward()
        ours, theirs = (torch.cat([p.grad.flatten() for p in net.parameters()]) for net in (b, a))
        assert (ours - theirs).norm() < 1e-10 * theirs.norm() and (theirs != 0).float().mean() > 0.5


def test_revcol_vits_have_equally_many_functions():
    def functions(name):
        kinds = (AttentionFunction, PerceptronFunction)
        return sum(isinstance(m, kinds) for m in meta(name).modules())

    assert {functions(name) for name in REVCOL_VITS if "base" in name} == {96}
    assert functions("revcol_vit_small") == 64


def test_revcol_vit_is_the_written_out_columns():
    net = RevColViT(16, (1, 1, 1), 2, 2, patch=4, size=16, num_classes=3).double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    stem = net.stem(x)
    first, second = (list(step.fs) for step in net.columns.steps)
    a, b, c = net.columns.steps[1].gs
    x0 = first[0](stem)
    x1 = first[1](x0)
    x2 = first[2](x1)
    y0 = second[0](stem, x1) + a(x0)
    y1 = second[1](y0, x2) + b(x1)
    y2 = second[2](y1) + c(x2)
    torch.testing.assert_close(net(x), net.head.fc(net.head.norm(y2.mean(1))))
    maps = net.maps(x)
    assert [m.shape for m in maps] == [(2, 16, 4, 4)] * 3
    torch.testing.assert_close(maps[0].flatten(2).transpose(1, 2), y0)


def test_a_level_of_tokens_adds_what_its_functions_give():
    attention, perceptron = AttentionFunction(8, 2).double().eval(), PerceptronFunction(8).double().eval()
    above = nn.Linear(8, 8).double()
    x, y = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    a = above(y) + x
    b = a + attention(a, mask)
    torch.testing.assert_close(
        TokenLevel(nn.Identity(), [above], [attention, perceptron])(x, y, context=mask), b + perceptron(b)
    )
    assert not torch.allclose(attention(a, mask), attention(a)), "the mask arrives"


def test_cosine_attention_is_the_written_out_sum():
    f = AttentionFunction(8, 2, norm="post", cosine=True).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    q, k, v = f.qkv(x).view(5, 3, 2, 4).permute(1, 2, 0, 3)
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    y = (10 * q @ k.transpose(1, 2)).softmax(-1) @ v
    torch.testing.assert_close(f(x)[0], f.norm(f.proj(y.transpose(0, 1).reshape(5, 8))))
    with pytest.raises(ValueError, match="3 heads for a width of 8"):
        AttentionFunction(8, 3)


def test_backbones():
    net = create_model("vit_tiny_patch16", features_only=True, **{k: v for k, v in SMALL.items() if k != "num_classes"})
    assert [m.shape for m in net(torch.randn(1, 3, 16, 24))] == [(1, 16, 4, 6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.uint8], ids=str)
def test_a_mask_of_numbers_is_refused(dtype):
    attention = AttentionFunction(8, 2).eval()
    x, mask = torch.randn(2, 3, 8), torch.tensor([[True, True, False]] * 2)
    others = torch.cat([x[:, :2], torch.randn(2, 1, 8)], 1)
    torch.testing.assert_close(attention(x, mask)[:, :2], attention(others, mask)[:, :2])
    for function in (attention, TransformerFunction(attention, PerceptronFunction(8))):
        with pytest.raises(ValueError, match=r"want booleans, true for tokens.*\n.*mask\.bool\(\)"):
            function(x, mask.to(dtype))
