"""Exact mode: bit-equal states and gradients, lost bits, ranges, and what it refuses."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from invertible import CHANNELS, build
from torch import nn

from odenets import PerSlot, Stack
from odenets.backprop.grid import Grid
from odenets.layers.scale import ChannelScale
from schemes import SchemeError
from schemes.coupling import rotated

SCHEMES = [
    "revnet",
    "additive(3)",
    "multilevel(3, 1/2)",
    "leapfrog",
    "momentum(0.9)",
    "momentum(0.5)",
    "alf",
    "alf(0.9)",
    "reversible_heun",
    "lm_resnet(-1/2)",
    "reversible(midpoint, 0.9)",
    "dense(growth=2)",
    "bdia",
    "nested(revnet, midpoint)",
    "repeat(revnet, 2)",
]


class Body(nn.Module):
    def __init__(self, slot, kind=nn.Linear):
        super().__init__()
        width = sum(slot.in_channels)
        if kind is nn.Linear:
            self.net = nn.Sequential(nn.Linear(width, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Dropout(0.1))
            self.out = nn.Linear(16, slot.out_channels)
        else:
            self.net = nn.Sequential(nn.Conv2d(width, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
            self.out = nn.Conv2d(8, slot.out_channels, 3, padding=1)

    def forward(self, *xs):
        return 0.5 * self.out(self.net(torch.cat(xs, 1)))


def stack(scheme, depth, kind=nn.Linear, channels=12, backprop="exact"):
    torch.manual_seed(0)
    return Stack.from_factory(lambda slot: Body(slot, kind), scheme, depth, channels=channels, backprop=backprop)


def stored(net, x):
    """The same arithmetic on the same grid, all states kept by autograd: no tape, no inverse."""
    grid = Grid(None, torch.float32)
    state = tuple(grid.round(s.float()) for s in net._start(x, net._pass(0.0, None)))
    for step in net.steps:
        fs, gs = step.functions(None, None, None, step.h)
        for scheme, f, h, g in step.scheme_on(state).decompose(fs, step.h, gs):
            for update in scheme.updates(f, h, len(state)):
                state = grid.apply(update, state, g, [])
            state = rotated(state, scheme.rotate)
    return net.scheme.readout(state)


def run(net, forward, x, amp=False):
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        y = forward(x)
    (y.float().square().mean() + 0.01 * y.float().sum()).backward()
    return [y.detach(), x.grad, *(p.grad for p in net.parameters()), *net.buffers()]


@pytest.mark.cases(6)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_those_of_the_stored_run_bit_by_bit(scheme):
    exact = stack(scheme, 6 if scheme.startswith("dense") else 12)
    twin = copy.deepcopy(exact)
    x = torch.randn(6, 12)
    found, want = run(exact, exact, x), run(twin, lambda z: stored(twin, z), x)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    exact(x)  # reads the drift of the first pass
    assert exact.monitor.drift == 0.0


@pytest.mark.long
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("scheme", ["revnet", "momentum(0.5)", "bdia"])
def test_depth_128_with_convolutions(scheme, amp):
    exact = stack(scheme, 128, nn.Conv2d, channels=8)
    twin = copy.deepcopy(exact)
    x = torch.randn(2, 8, 6, 6)
    found, want = run(exact, exact, x, amp), run(twin, lambda z: stored(twin, z), x, amp)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_storing_twin_mode_equals_exact():
    exact, twin = stack("momentum(0.5)", 8), stack("momentum(0.5)", 8, backprop="exact(store=true)")
    x = torch.randn(6, 12)
    assert all(torch.equal(a, b) for a, b in zip(run(exact, exact, x), run(twin, twin, x), strict=True))


def test_bdia_is_euler_at_inference_and_drawn_in_training():
    net, euler = stack("bdia", 6).eval(), stack("euler", 6, backprop="store").eval()
    x = torch.randn(4, 12)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.equal(net(x), euler(x))
    net.train()
    for dropout in (m for m in net.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    first, second = net(x), net(x)
    assert not torch.allclose(first, second, atol=1e-3)


@given(
    scale=st.one_of(st.floats(0.002, 3.0), st.sampled_from([0.5, 0.25, 0.125, 2.0])).flatmap(
        lambda a: st.sampled_from([a, -a])
    ),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    size=st.sampled_from([0.01, 0.3, 1.0]),
)
def test_scaling_on_the_grid_loses_nothing(scale, seed, dtype, size):
    grid = Grid(None, dtype)
    share = 2 * torch.rand(64, dtype=dtype, generator=torch.Generator().manual_seed(seed)) - 1
    x = grid.round(0.999 * size * grid.limit / max(1.0, abs(scale)) * share)  # the product stays within the grid too
    factor = torch.tensor(scale, dtype=torch.float32)
    kept, beside = grid._shrink(x, factor)
    assert torch.equal(grid._grow(kept, factor, beside), x)
    assert float((kept.double() - x.double() * factor.double()).abs().max()) <= 1.01 * grid.unit
    assert (beside is None) == (abs(float(factor)) >= 1)


@pytest.mark.parametrize("offset", [-300.0, 300.0])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_exact_far_from_zero(scheme, offset):
    # Large values have few digits below the unit; those of one sign once fell between the points of the grid.
    depth = 2 if scheme.startswith("dense") else 4
    nets = [stack(scheme, depth, backprop=mode) for mode in ("exact", "exact(store=true)")]
    x = torch.randn(64, 12) + offset
    try:
        want = run(nets[1], nets[1], x)
    except SchemeError as error:  # some schemes double the streams on the way
        assert "left the range" in str(error)
        return
    assert all(torch.equal(a, b) for a, b in zip(run(nets[0], nets[0], x), want, strict=True))


def test_half_costs_one_bit():
    grid = Grid(None, torch.float32)
    _, beside = grid._shrink(grid.round(torch.randn(80)), torch.tensor(0.5))
    assert [p.numel() for p in beside.planes] == [10]


def test_overflow_is_an_error():
    net = stack("revnet", 2)
    with pytest.raises(SchemeError, match="left the range"):
        net(torch.full((6, 12), 600.0))


def test_not_finite_is_an_error():
    net = stack("revnet", 2)
    with pytest.raises(SchemeError, match="left the range"):
        net(torch.full((6, 12), float("nan")))


def test_a_function_that_changes_is_an_error():
    class Odd(nn.Module):
        calls = 0

        def forward(self, x):
            Odd.calls += 1
            return x.tanh() * (1 + Odd.calls % 2)

    net = Stack([Odd() for _ in range(4)], "revnet", backprop="exact")
    net(torch.randn(2, 4))  # the first call, under the checks
    x = torch.randn(2, 4, requires_grad=True)
    Odd.calls = 0
    net(x).sum().backward()
    with pytest.raises(SchemeError, match="other values the second time"):
        for _ in range(2):
            net(x)


@pytest.mark.parametrize("scheme", ["affine", "repeat(affine, 2)", "rk4"])
def test_refused(scheme):
    with pytest.raises(SchemeError, match=r"cannot be undone bit by bit|has no inverse"):
        stack(scheme, 2)


@pytest.mark.parametrize("way", [lambda f: f.compile(backend="eager"), lambda f: torch.compile(f, backend="eager")])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("slots", [False, True])
def test_compiled_functions_that_are_shared_are_refused(slots, inside, way):
    parts = [nn.Linear(6, 6), nn.Linear(6, 6)]
    made = way(parts[-1])
    parts[-1] = parts[-1] if made is None else made
    block = nn.Sequential(*parts) if inside else parts[-1]
    net = Stack(PerSlot([nn.Linear(6, 6), block]) if slots else block, "revnet", depth=3, backprop="exact")
    name = "block" + ".1" * slots + ".1" * inside
    with pytest.raises(SchemeError, match=f"Stack: {name}[^.0-9]* is compiled") as caught:
        net(torch.randn(4, 12, requires_grad=True))
    assert len(str(caught.value).splitlines()) <= 2


def test_compiled_functions_are_refused():
    net = stack("revnet", 2)
    net.steps[0].fs[0].compile(backend="eager")
    with pytest.raises(SchemeError, match="is compiled"):
        net(torch.randn(6, 12))


def test_places_of_the_grid():
    with pytest.raises(SchemeError, match="binary places"):
        Grid(22, torch.float32)
    with pytest.raises(SchemeError, match="float32 or float64"):
        Grid(None, torch.bfloat16)
    with pytest.raises(SchemeError, match="at least 1"):
        stack("revnet", 2, backprop="exact(bits=0)")


@pytest.mark.parametrize("name", ["revcol", "revcol, learned", "momentum, learned"])
def test_learned_scales_and_columns(name):
    nets = [build(name, 6, backprop=mode, dtype=torch.float32) for mode in ("exact", "exact(store=true)")]
    x = torch.randn(4, CHANNELS)
    found = [run(net, net, x) for net in nets]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True) if a is not None and b is not None)
    nets[0](x)
    assert nets[0].monitor.drift == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_to_the_grid_in_all_of_the_range_and_the_limit_is_outside(dtype):
    grid = Grid(None, dtype)
    sizes = torch.tensor([1e-3, 0.26, 0.4, 0.499, 0.501, 0.75, 0.999], dtype=torch.float64)
    shares = torch.cat([-sizes, sizes.new_zeros(1), sizes])
    for part in (0.25, 0.5, 0.75):  # below half of the limit a number has two places below the unit, above it one
        x = (shares * grid.limit).to(dtype).floor() + part * grid.unit
        units = grid.round(x).double() / grid.unit
        assert torch.equal(units, units.round()) and ((units - x.double() / grid.unit).abs() <= 0.5).all()
    below = torch.nextafter(torch.tensor(grid.limit, dtype=dtype), torch.zeros((), dtype=dtype))
    assert [bool(grid.over(v)) for v in (below, -below, below * 0 + grid.limit, below * 0 - grid.limit)] == [
        *(False, False, True, True)
    ]


@pytest.mark.parametrize(
    "gamma", [2.0**-31, 1e-9, -(2.0**-31), 2.0**-20, -(2.0**-21), 2.0**-25, 2.0**-32, -(2.0**-33), 1e-12, 0.0]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_too_small_for_their_bits_are_refused(gamma, dtype):
    """Those that are not leave what they should."""
    gs = [[ChannelScale(2, 1.0, ndim=2).to(dtype)] for _ in range(2)]
    for (g,) in gs:
        g.smallest = 0.0
        g.alpha.data.fill_(gamma)
    net = Stack([nn.Linear(2, 2, dtype=dtype) for _ in range(2)], "multilevel(2)", shortcut=gs, backprop="exact")
    x = 0.1 * torch.randn(4, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    if abs(gamma) >= 2.0**-31:
        net(x).sum().backward()
        net(x)
        assert net.monitor.drift == 0.0
        return
    with pytest.raises(SchemeError, match="31 bits of each element") as caught:
        net(x)
    assert len(str(caught.value).splitlines()) == 2
