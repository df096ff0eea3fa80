"""Laws and strategies for invertible schemes: what every coupling must do, as functions that users can call.

Example:
    >>> import torch, schemes
    >>> check_inverse(schemes.get("revnet"), torch.randn(2, 4, 3, dtype=torch.float64))
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..bdia import Bidirectional
from ..columns import RevCol
from ..coupling import Additive, Affine, Coupling, MultiLevel, RevNet
from ..dense import Dense
from ..multistep import Alf, Leapfrog, LmResNet, Momentum, ReversibleHeun
from ..registry import get
from ..reversible import Reversible
from ..scheme import Function, Scheme, Slot, State

ROUND_TRIP = 1e-9


def couplings() -> st.SearchStrategy[Coupling]:
    """Invertible schemes of every family, of moderate amplification, on inputs of at least 4 channels."""
    shares = st.floats(0.5, 0.95).map(lambda x: round(x, 3))
    signed = st.builds(lambda x, s: x * s, shares, st.sampled_from([1, -1]))
    bases = st.sampled_from(["euler", "midpoint", "rk4", "substeps(heun2, 2)"]).map(get)
    return st.one_of(
        st.builds(RevNet),
        st.builds(Additive, st.integers(2, 4)),
        st.builds(Affine, bound=st.floats(0.1, 1.0).map(lambda x: round(x, 3))),
        st.builds(MultiLevel, st.integers(2, 4), signed),
        st.builds(RevCol, st.integers(1, 4), st.integers(1, 2)),
        st.builds(RevCol, st.integers(3, 4), huge=st.just(True)),
        st.just(Leapfrog()),
        st.builds(Momentum, signed),
        st.builds(LmResNet, signed),
        st.builds(Alf, st.floats(0.75, 1.0).map(lambda x: round(x, 3))),
        st.just(ReversibleHeun()),
        st.builds(Bidirectional, signed),
        st.builds(Dense, st.integers(1, 3)),
        st.builds(Reversible, bases, st.floats(0.7, 0.999).map(lambda x: round(x, 4))),
    )


def states() -> st.SearchStrategy[Tensor]:
    """Inputs (n, c, ...) in double precision, c from 4 to 8, with up to two more dimensions."""

    def make(shape: tuple[int, ...], seed: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    shapes = st.tuples(
        st.tuples(st.integers(1, 2), st.integers(4, 8)), st.lists(st.integers(1, 3), max_size=2).map(tuple)
    ).map(lambda parts: parts[0] + parts[1])
    return st.builds(make, shapes, st.integers(0, 2**16))


class SmoothFunction:
    """A residual function of a slot: size * tanh(W [arguments] + bias), W random, on dimension 1; it counts its calls.

    It raises AssertionError where its arguments are not those that its slot announced.
    """

    def __init__(self, slot: Slot, generator: torch.Generator, size: float = 0.5):
        self.slot, self.size, self.calls = slot, size, 0
        width = sum(slot.in_channels)
        self.weight = torch.randn(slot.out_channels, width, dtype=torch.float64, generator=generator) / width**0.5
        self.bias = torch.randn(slot.out_channels, 1, dtype=torch.float64, generator=generator)

    def __call__(self, *args: Tensor) -> Tensor:
        got = tuple(a.shape[1] for a in args)
        assert got == self.slot.in_channels, f"{self.slot} is given {got}"
        self.calls += 1
        x = torch.cat(args, 1)
        y = self.size * torch.tanh(self.weight @ x.flatten(2) + self.bias) if x.dim() > 2 else None
        if y is None:
            return self.size * torch.tanh(x @ self.weight.T + self.bias.T)
        return y.unflatten(2, x.shape[2:])


def smooth_functions(scheme: Scheme, channels: int, steps: int, seed: int = 0) -> list[list[SmoothFunction]]:
    """Residual functions for every step of a scheme, made from its slots."""
    generator = torch.Generator().manual_seed(seed)
    streams, found = scheme.stream_widths(channels), []
    for n in range(steps):
        part = scheme.at(n)
        found.append([SmoothFunction(slot, generator) for slot in part.slots(n, streams)])
        streams = part.widths(n, streams)
    return found


def affordable_steps(amplification: float, tolerance: float = ROUND_TRIP, most: int = 16) -> int:
    """How many steps an inverse of that amplification can undo in double precision within a tolerance."""
    if amplification <= 1.0:
        return most
    return max(1, min(most, int(math.log(tolerance / 2e-14) / math.log(amplification))))


def run(scheme: Scheme, fs: Sequence[Sequence[Function]], x: Tensor, h: float = 1.0, gs: Sequence = ()) -> list[State]:
    """The states of a scheme from its start on, one more than there are steps.

    ``gs`` are the shortcuts of every step that takes any.
    """
    found = [scheme.init(fs[0], x, h)]
    for n, part in enumerate(fs):
        found.append(scheme.at(n)._step(part, found[-1], h, _shortcuts(scheme, n, gs)))
    return found


def _shortcuts(scheme: Scheme, n: int, gs: Sequence) -> Sequence:
    part = scheme.at(n)
    return gs if isinstance(part, Coupling) and part.shortcuts == len(gs) else ()


def check_inverse(
    scheme: Scheme, x: Tensor, *, steps: int = 16, h: float = 1.0, seed: int = 0, gs: Sequence = ()
) -> None:
    """Each step's inverse gives the streams before it, from the state that the inverses after it gave.

    With smooth nonlinear residual functions in double precision, to 1e-9 of the largest number in any state; as many
    steps as the declared amplification allows. It also checks that slots, widths, shapes and evaluations are as
    declared.

    Args:
        scheme: an invertible scheme.
        x: the input, (n, c, ...), double precision.
        steps: number of steps, at most.
        h: step size.
        seed: of the residual functions.
        gs: shortcuts for every step that takes that many.

    Raises:
        AssertionError: the scheme breaks the law; the message names the step.
    """
    assert scheme.invertible, f"{scheme} is not invertible"
    amplification = max(getattr(scheme.at(n), "amplification", 1.0) for n in (0, 1))
    steps = affordable_steps(amplification, most=steps)
    fs = smooth_functions(scheme, x.shape[1], steps, seed)
    scheme.init(fs[0], x, h)
    started = sum(f.calls for f in fs[0])  # evaluations that init made; run makes them again
    found = run(scheme, fs, x, h, gs)
    check_declared(scheme, fs, found, 2 * started)
    scale = max(float(s.abs().max()) for state in found for s in state)
    state = found[-1]
    for n in reversed(range(steps)):
        part = scheme.at(n)
        state = part.inverse(fs[n], state, gs=_shortcuts(scheme, n, gs), h=h)
        assert len(state) == len(found[n]), f"{scheme}: inverse of step {n} has {len(state)} streams"
        for i, (got, want) in enumerate(zip(state, found[n], strict=True)):
            if not isinstance(part, Coupling) or i not in part.byproducts:
                error = float((got - want).abs().max()) / scale
                assert error <= ROUND_TRIP, f"{scheme}: inverse of step {n}, stream {i}, is off by {error:.1e}"


def check_declared(scheme: Scheme, fs: Sequence[Sequence[SmoothFunction]], found: list[State], started: int) -> None:
    """Widths, shapes of results and numbers of evaluations are as the scheme declares them."""
    widths = scheme.stream_widths(scheme.readout(found[0]).shape[1])
    for n, (before, after) in enumerate(pairwise(found)):
        part = scheme.at(n)
        assert tuple(s.shape[1] for s in before) == widths, f"{scheme}: widths before step {n} are not {widths}"
        widths = part.widths(n, widths)
        assert tuple(s.shape[1] for s in after) == widths, f"{scheme}: widths after step {n} are not {widths}"
        if isinstance(part, Coupling):
            updates = part.updates(fs[n], 1.0, len(before))
            byproducts = {(u.byproduct - part.rotate) % len(before) for u in updates if u.byproduct is not None}
            assert byproducts == set(part.byproducts), (
                f"{scheme}: has by-products {byproducts}, declared are {part.byproducts}"
            )
            assert sum(u.appends for u in updates) == part.streams_added, (
                f"{scheme}: appends other than {part.streams_added} streams"
            )
        calls = sum(f.calls for f in fs[n]) - (started if n == 0 else 0)
        assert calls == part.evaluations, f"{scheme}: {calls} evaluations in step {n}, not {part.evaluations}"
        for i, slot in enumerate(part.slots(n, tuple(s.shape[1] for s in before))):
            shape = part.shape_of(i, tuple(s.shape for s in before))
            assert shape is None or shape[1] == slot.out_channels, f"{scheme}: shape_of({i}) in step {n} is {shape}"
