"""Convolutions that are faster on a CPU: the same values and gradients as nn.Conv2d's, in every case that they take."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from odenets.layers import DepthwiseConv2d, PatchConv2d, conv

FORMATS = [torch.contiguous_format, torch.channels_last]

needs_the_fast_path = pytest.mark.skipif(not conv._VECTORS, reason="this CPU takes torch's own depthwise gradient")


def plain(module):
    """torch's own convolution with the same parameters, in double precision."""
    twin = nn.Conv2d(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        module.padding,
        groups=module.groups,
        bias=module.bias is not None,
    )
    twin.load_state_dict(module.state_dict())
    return twin.double()


def results(module, xs, dtype, call=None):
    """The value, and the gradients by the arguments and the parameters of a sum with fixed weights."""
    xs = [x.detach().to(dtype).requires_grad_() for x in xs]
    y = module(*xs) if call is None else call(module, xs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad((y * weights).sum(), [*xs, *module.parameters()])]


def assert_same(found, wanted, tolerance=2e-5):
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        scale = 1 + b.abs().max() if b.numel() else 1
        assert ((a.double() - b).abs() <= tolerance * scale).all()


@given(
    n=st.integers(1, 3),
    channels=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    sides=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    kernel=st.sampled_from([3, 5, 7, 11]),
    memory=st.sampled_from(FORMATS),
    recompute=st.booleans(),
)
@example(n=2, channels=[16, 8], sides=(3, 3), kernel=7, memory=torch.channels_last, recompute=True)
@example(n=2, channels=[16], sides=(1, 9), kernel=11, memory=torch.channels_last, recompute=False)
def test_a_depthwise_convolution_and_its_gradients_are_torchs(n, channels, sides, kernel, memory, recompute):
    module = DepthwiseConv2d(sum(channels), kernel)
    xs = [torch.randn(n, c, *sides).to(memory_format=memory) for c in channels]
    found = results(module, xs, torch.float32, lambda m, given: m(*given, recompute=recompute))
    wanted = results(plain(module), xs, torch.float64, lambda m, given: m(torch.cat(given, 1)))
    assert_same(found, wanted)


@given(
    sides=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    data=st.data(),
)
def test_the_weight_gradient_holds_for_every_kernel_and_padding(sides, kernel, data):
    padding = tuple(data.draw(st.integers(max(0, (k - s + 1) // 2), 7)) for s, k in zip(sides, kernel, strict=True))
    x = torch.randn(2, 3, *sides)
    w = torch.zeros(3, 1, *kernel, dtype=torch.float64, requires_grad=True)
    y = torch.nn.functional.conv2d(x.double(), w, padding=padding, groups=3)
    g = torch.randn(y.shape)
    (wanted,) = torch.autograd.grad(y, w, g.double())
    assert_same([conv.weight_gradient(x, g, kernel, padding)], [wanted])


@pytest.mark.parametrize("at_a_time", [1, 100, 10_000])
def test_the_weight_gradient_is_the_same_in_parts(monkeypatch, at_a_time):
    x, g = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    wanted = conv.weight_gradient(x.double(), g.double(), (5, 5), (2, 2))
    monkeypatch.setattr(conv, "_AT_A_TIME", at_a_time)
    assert_same([conv.weight_gradient(x, g, (5, 5), (2, 2))], [wanted])


def test_an_even_kernel_is_refused():
    with pytest.raises(ValueError, match="the kernel is 4, want an odd size"):
        DepthwiseConv2d(8, 4)


@needs_the_fast_path
@pytest.mark.parametrize("recompute", [False, True])
def test_the_own_path_is_taken_and_keeps_the_joined_map_unless_told_not_to(recompute):
    module = DepthwiseConv2d(12, 7)
    xs = [torch.randn(2, 4, 6, 6, requires_grad=True) for _ in range(3)]
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = module(*xs, recompute=recompute)
    assert "Depthwise" in type(y.grad_fn).__name__
    own = {x.data_ptr() for x in xs} | {module.weight.data_ptr()}
    new = sum(t.numel() for t in kept if t.data_ptr() not in own)
    assert new == (0 if recompute else 2 * 12 * 6 * 6)


@pytest.mark.parametrize("frozen", ["weight", "input"])
def test_a_part_that_needs_no_gradient_gets_none(frozen):
    module, x = DepthwiseConv2d(4, 5), torch.randn(2, 4, 6, 6, requires_grad=frozen == "weight")
    module.weight.requires_grad_(frozen == "input")
    module(x).sum().backward()
    assert (x.grad is None) == (frozen == "input")
    assert (module.weight.grad is None) == (frozen == "weight")
    assert module.bias.grad is not None


def test_gradients_have_gradients():
    module = DepthwiseConv2d(4, 5)
    x = torch.randn(2, 4, 6, 6)

    def penalties(m, dtype):
        (given,) = xs = [x.to(dtype).requires_grad_()]
        first = torch.autograd.grad(m(given).square().sum(), [given, m.weight], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [*xs, m.weight])

    assert_same(penalties(module, torch.float32), penalties(plain(module), torch.float64), 1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own rules for forward mode use it
def test_transforms_and_forward_mode_pass():
    module, x = DepthwiseConv2d(4, 5), torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(torch.func.vmap(module)(x.unsqueeze(1)), module(x).unsqueeze(1))
    y, tangent = torch.func.jvp(module, (x,), (x,))
    torch.testing.assert_close(tangent, y - module.bias[:, None, None])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        _, tangent = torch.autograd.forward_ad.unpack_dual(module(dual))
    torch.testing.assert_close(tangent, y - module.bias[:, None, None])


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("build", [lambda: DepthwiseConv2d(8, 7), lambda: PatchConv2d(8, 4, 2)])
def test_autocast_rounds_the_value_and_leaves_gradients_in_their_types(build, inside):
    module, x = build(), torch.randn(2, 8, 12, 12)

    def call(m, xs):
        with torch.autocast("cpu", torch.bfloat16):
            y = m(*xs)
            assert y.dtype == torch.bfloat16
        return y

    with torch.autocast("cpu", torch.bfloat16, enabled=inside):  # a backward pass in a region of its own
        y, *grads = results(module, [x], torch.float32, call)
    assert all(g.dtype == torch.float32 for g in grads)
    assert_same([y, *grads], results(plain(module), [x], torch.float64), 2e-2)


@pytest.mark.parametrize("build", [lambda: DepthwiseConv2d(8, 7), lambda: PatchConv2d(8, 4, 2)])
def test_half_and_double_modules(build):
    for dtype, tolerance in ((torch.bfloat16, 3e-2), (torch.float64, 1e-12)):
        module, x = build().to(dtype), torch.randn(2, 8, 12, 12).to(dtype)
        found = results(module, [x], dtype)
        assert all(t.dtype == dtype for t in found)
        assert_same(found, results(plain(module), [x], torch.float64), tolerance)


@pytest.mark.parametrize("build", [lambda: DepthwiseConv2d(8, 7), lambda: PatchConv2d(8, 4, 2)])
def test_an_empty_batch_passes(build):
    module, x = build(), torch.empty(0, 8, 6, 6)
    assert_same(results(module, [x], torch.float32), results(plain(module), [x], torch.float64))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean:torch.jit.TracerWarning")
@pytest.mark.parametrize("build", [lambda: DepthwiseConv2d(8, 7), lambda: PatchConv2d(8, 4, 2)])
def test_exports_and_traces_are_of_torchs_operations(build):
    module, x = build().eval(), torch.randn(2, 8, 6, 6)
    for made in (torch.export.export(module, (x,)).module(), torch.jit.trace(module, x)):
        torch.testing.assert_close(made(x), module(x))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own doing
@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize(
    "build",
    [
        lambda: DepthwiseConv2d(8, 7),
        lambda: PatchConv2d(8, 4, 1),
        lambda: PatchConv2d(8, 4, 1, bias=False),
        lambda: PatchConv2d(8, 4, 2),
    ],
)
def test_a_compiler_takes_them_whole(build, memory):
    torch._dynamo.reset()
    module = build()
    x = torch.randn(2, 8, 6, 6).to(memory_format=memory)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_same(results(compiled, [x], torch.float32), results(plain(module), [x], torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiler_gets_products_of_pixels_where_channels_come_first_and_an_export_never():
    torch._dynamo.reset()
    module, x = PatchConv2d(8, 4, 1), torch.randn(2, 8, 6, 6)
    traced = []

    def backend(graph, _):
        traced.append([node.target for node in graph.graph.nodes])
        return graph.forward

    compiled = torch.compile(module, backend=backend)
    compiled(x)
    compiled(x.to(memory_format=torch.channels_last))
    assert [torch.conv2d in graph for graph in traced] == [False, True]
    exported = [node.target for node in torch.export.export(module, (x,)).graph.nodes]
    assert torch.ops.aten.conv2d.default in exported


@given(
    patch=st.integers(1, 4),
    sides=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    widths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    bias=st.booleans(),
    memory=st.sampled_from(FORMATS),
)
def test_a_convolution_of_patches_and_its_gradients_are_torchs(patch, sides, widths, bias, memory):
    sides = tuple(max(s, patch) for s in sides)
    module = PatchConv2d(*widths, patch, bias=bias)
    x = torch.randn(2, widths[0], *sides).to(memory_format=memory)
    assert_same(results(module, [x], torch.float32), results(plain(module), [x], torch.float64))


def test_a_convolution_of_patches_leaves_channels_last_memory():
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    for patch in (1, 2):
        assert conv.is_product(x, patch)
        assert PatchConv2d(8, 4, patch)(x).is_contiguous(memory_format=torch.channels_last)
    # One pixel a patch and channels first would take a transposed copy; and here a row fills no patch.
    assert not conv.is_product(x.contiguous())
    assert not conv.is_product(x, 4)
