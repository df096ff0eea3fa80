"""Laws and strategies for invertible schemes: what every coupling must do, as functions that users can call.

Example:
    >>> import torch, schemes
    >>> check_inverse(schemes.get("revnet"), torch.randn(2, 4, 3, dtype=torch.float64))
"""

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from ..bdia import Bidirectional
from ..columns import RevColCoupling
from ..coupling import Additive, Affine, Coupling, MultiLevel, apply_update, rotated
from ..dense import Dense
from ..errors import SchemeError
from ..linear import probe
from ..multistep import Alf, LmResNet, Momentum
from ..registry import examples, get
from ..reversible import Reversible
from ..scheme import Function, Scheme, Slot, State

ROUND_TRIP = 1e-9


def _invertible_examples() -> list[Scheme]:
    """The examples with an inverse that run on any number of channels from 4 on."""
    found = []
    # Some need a width that is divisible by three or four; the strategies draw any from 4 on.
    for scheme in map(get, examples()):
        if scheme.invertible:
            try:
                scheme.at(0).slots(0, scheme.stream_widths(5))
            except SchemeError:
                continue
            found.append(scheme)
    return found


def couplings() -> st.SearchStrategy[Scheme]:
    """Invertible schemes, of moderate amplification, on inputs of at least 4 channels.

    They are the examples of every family, and for some families members with drawn parameters.
    """
    # Rounded, so that a failing example prints as a text that can be typed.
    shares = st.floats(0.5, 0.95).map(lambda x: round(x, 3))
    signed = st.builds(lambda x, s: x * s, shares, st.sampled_from([1, -1]))
    bases = st.sampled_from(["euler", "midpoint", "rk4", "substeps(heun2, 2)"]).map(get)
    drawn = st.one_of(
        st.builds(Additive, st.integers(2, 4)),
        st.builds(Affine, bound=st.floats(0.1, 1.0).map(lambda x: round(x, 3))),
        st.builds(MultiLevel, st.integers(2, 4), signed),
        st.builds(RevColCoupling, st.integers(1, 4), st.integers(1, 2)),
        st.builds(RevColCoupling, st.integers(3, 4), huge=st.just(True)),
        st.builds(Momentum, signed),
        st.builds(LmResNet, signed),
        st.builds(Alf, st.floats(0.75, 1.0).map(lambda x: round(x, 3))),
        st.builds(Bidirectional, signed),
        st.builds(Dense, st.integers(1, 3)),
        st.builds(Reversible, bases, st.floats(0.7, 0.999).map(lambda x: round(x, 4))),
    )
    return st.one_of(st.deferred(lambda: st.sampled_from(_invertible_examples())), drawn)


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

    It raises AssertionError where its arguments do not have the widths that its slot declares.
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


def parts_of(scheme: Scheme, steps: int, x: Tensor | None = None) -> list[Scheme]:
    """The scheme of each step; in training where ``x``, a stream, is given."""
    found = [scheme.at(n) for n in range(steps)]
    return found if x is None else [part.training_scheme(n, x) for n, part in enumerate(found)]


def smooth_functions(
    scheme: Scheme, channels: int, steps: int, seed: int = 0, parts: Sequence[Scheme] | None = None
) -> list[list[SmoothFunction]]:
    """Residual functions for every step of a scheme, made from its slots; ``parts`` as of `parts_of`."""
    generator = torch.Generator().manual_seed(seed)
    streams, found = scheme.stream_widths(channels), []
    for n, part in enumerate(parts_of(scheme, steps) if parts is None else parts):
        found.append([SmoothFunction(slot, generator) for slot in part.slots(n, streams)])
        streams = part.widths(n, streams)
    return found


def affordable_steps(amplification: float, tolerance: float = ROUND_TRIP, most: int = 16) -> int:
    """How many steps an inverse of that amplification can undo in double precision within a tolerance."""
    if amplification <= 1.0:
        return most
    # Rounding of about 2e-14 grows by the amplification at each step undone.
    return max(1, min(most, int(math.log(tolerance / 2e-14) / math.log(amplification))))


def run(
    scheme: Scheme,
    fs: Sequence[Sequence[Function]],
    x: Tensor,
    h: float = 1.0,
    gs: Sequence = (),
    parts: Sequence[Scheme] | None = None,
) -> list[State]:
    """The states of a scheme from its start on, one more than there are steps.

    ``gs`` are the shortcuts of every step that takes any; ``parts`` as of `parts_of`.
    """
    found = [scheme.init(fs[0], x, h)]
    for part, own in zip(parts_of(scheme, len(fs)) if parts is None else parts, fs, strict=True):
        found.append(part._step(own, found[-1], h, _shortcuts(part, gs)))
    return found


def _shortcuts(part: Scheme, gs: Sequence) -> Sequence:
    return gs if part.shortcuts == len(gs) else ()


def check_inverse(
    scheme: Scheme,
    x: Tensor,
    *,
    steps: int = 16,
    h: float = 1.0,
    seed: int = 0,
    gs: Sequence = (),
    training: bool = False,
) -> None:
    """Each step's inverse restores the streams before it, from the state that the inverses after it restored.

    Checked with smooth nonlinear residual functions in double precision, to 1e-9 of the largest number in any state,
    over as many steps as the declared amplification allows. Slots, widths, shapes and evaluations must also be as
    declared.

    Args:
        scheme: an invertible scheme.
        x: the input, (n, c, ...), double precision.
        steps: number of steps, at most.
        h: step size.
        seed: of the residual functions.
        gs: shortcuts for every step that takes that many.
        training: whether the scheme's form in training is checked (bdia).

    Raises:
        AssertionError: the scheme breaks the law; the message names the step.
    """
    able = scheme.reversible_in_training if training else scheme.invertible
    assert able, f"{scheme} is not invertible{' in training' if training else ''}"
    amplification = max(part.amplification for part in parts_of(scheme, 2, x if training else None))
    steps = affordable_steps(amplification, most=steps)
    parts = parts_of(scheme, steps, x if training else None)
    fs = smooth_functions(scheme, x.shape[1], steps, seed, parts)
    found = check_declared(scheme, fs, x, h, gs, parts)
    # Over all states: an error made where the streams were large is still there where they are small.
    scale = max(float(s.abs().max()) for state in found for s in state)
    state = found[-1]
    for n in reversed(range(steps)):
        part = parts[n]
        state = part.inverse(fs[n], state, gs=_shortcuts(part, gs), h=h)
        assert len(state) == len(found[n]), f"{scheme}: inverse of step {n} has {len(state)} streams"
        for i, (got, want) in enumerate(zip(state, found[n], strict=True)):
            if i not in part.byproducts:
                error = float((got - want).abs().max()) / scale
                assert error <= ROUND_TRIP, f"{scheme}: inverse of step {n}, stream {i}, is off by {error:.1e}"


def check_declared(
    scheme: Scheme,
    fs: Sequence[Sequence[SmoothFunction]],
    x: Tensor,
    h: float = 1.0,
    gs: Sequence = (),
    parts: Sequence[Scheme] | None = None,
) -> list[State]:
    """Widths, shapes, new streams, byproducts and numbers of evaluations are as the scheme declares them.

    Args:
        scheme: any scheme with fixed steps.
        fs: residual functions of every step, from `smooth_functions`.
        x: the input, (n, c, ...), double precision.
        h: step size.
        gs: shortcuts for every step that takes that many.
        parts: the scheme of each step, from `parts_of`; None means outside of training.

    Returns:
        The states, one more than there are steps.

    Raises:
        AssertionError: something is not as declared; the message says what it is.
    """
    parts = parts_of(scheme, len(fs)) if parts is None else parts
    made = tuple(s.shape[1] for s in scheme.init(fs[0], x, h))
    want = scheme.stream_widths(x.shape[1])
    # Before the functions are run, since their slots follow from these widths.
    assert made == want, f"{scheme}: init makes streams of widths {made}, stream_widths says {want}"
    for own in fs:  # what init evaluates is not the step's
        for f in own:
            # Negated: the run below repeats init, so that only the calls of the step are left.
            f.calls = -f.calls
    found = run(scheme, fs, x, h, gs, parts)
    widths = scheme.stream_widths(x.shape[1])
    assert len(found[0]) == scheme.streams, f"{scheme}: makes {len(found[0])} streams, declared are {scheme.streams}"
    for n, (part, before, after) in enumerate(zip(parts, found, found[1:], strict=False)):
        times = 0 if part.nodes is None else len(part.nodes)
        assert times and times % part.stages == 0, f"{scheme}: {times} nodes for {part.stages} residual functions"
        assert tuple(s.shape[1] for s in before) == widths, f"{scheme}: widths before step {n} are not {widths}"
        for i, slot in enumerate(part.slots(n, widths)):
            shape = part.shape_of(i, tuple(s.shape for s in before))
            assert shape is None or shape[1] == slot.out_channels, f"{scheme}: shape_of({i}) in step {n} is {shape}"
        widths = part.widths(n, widths)
        assert tuple(s.shape[1] for s in after) == widths, f"{scheme}: widths after step {n} are not {widths}"
        added = len(after) - len(before)
        assert added == part.streams_added, f"{scheme}: appends {added} streams, declared are {part.streams_added}"
        for i, (got, shape) in enumerate(zip(after, part.shapes_after(tuple(s.shape for s in before)), strict=True)):
            assert shape in (None, got.shape), f"{scheme}: stream {i} after step {n} is {got.shape}, not {shape}"
        if isinstance(part, Coupling):
            updates = part.updates(fs[n], 1.0, len(before))
            byproducts = {(u.byproduct - part.rotate) % len(before) for u in updates if u.byproduct is not None}
            assert byproducts == set(part.byproducts), (
                f"{scheme}: has by-products {byproducts}, declared are {part.byproducts}"
            )
        calls = sum(f.calls for f in fs[n])
        assert calls == part.evaluations, f"{scheme}: {calls} evaluations in step {n}, not {part.evaluations}"
    return found


class _Constant:
    """A residual function of a slot that returns one number everywhere."""

    def __init__(self, slot: Slot, value: float):
        self.slot, self.value = slot, value

    def __call__(self, *args: Tensor) -> Tensor:
        return args[0].new_full((args[0].shape[0], self.slot.out_channels, *args[0].shape[2:]), self.value)


_BATCH = 32  # samples with separate draws in training: the largest of so many errors hardly depends on the draw


def observed_amplification(scheme: Scheme, *, channels: int = 8, steps: int = 24, training: bool = False) -> float:
    """The factor by which a step's inverse grows an error, in the long run, where residual functions are constants.

    Two states a distance apart are taken back ``2 * steps`` steps; the growth of their distance in the second half
    counts. The result is the largest over three constants: 0, and a large one of either sign, which an affine
    coupling's scale reads.
    """
    x = torch.zeros(_BATCH, channels, dtype=torch.float64)
    parts = parts_of(scheme, 2 * steps + 1, x if training else None)
    slots, streams = [], scheme.stream_widths(channels)
    for n, part in enumerate(parts):
        slots.append(part.slots(n, streams))
        streams = part.widths(n, streams)

    def size(pair: tuple[State, State], left: tuple[int, ...]) -> float:
        return max(float((a - b).abs().max()) for i, (a, b) in enumerate(zip(*pair, strict=True)) if i not in left)

    rates = []
    for value in (0.0, 1e3, -1e3):
        generator = torch.Generator().manual_seed(1)
        state = tuple(torch.randn(_BATCH, c, dtype=torch.float64, generator=generator) for c in streams)
        # A whole unit apart: the inverse is linear here, so the distance need not be small, and rounding stays far
        # below.
        pair = (state, tuple(s + torch.randn(s.shape, dtype=s.dtype, generator=generator).sign() for s in state))
        sizes = []
        for n in range(2 * steps, 0, -1):
            fs = [_Constant(slot, value) for slot in slots[n]]
            pair = (parts[n]._inverse(fs, pair[0]), parts[n]._inverse(fs, pair[1]))
            sizes.append(size(pair, parts[n].byproducts))
        # The first half turns the error into the direction that grows most; the second half measures.
        rates.append((sizes[-1] / sizes[steps - 1]) ** (1 / steps))
    return max(rates)


def check_amplification(scheme: Scheme, *, training: bool = False) -> None:
    """The inverse grows errors as ``amplification`` declares: measured, and from the step's matrices where it has some.

    Args:
        scheme: an invertible scheme.
        training: whether the scheme's form in training is checked (bdia).

    Raises:
        AssertionError: the growth differs by more than 3 % a step.

    Example:
        >>> import schemes
        >>> check_amplification(schemes.get("momentum(0.5)"))
    """
    x = torch.zeros(2, 8, dtype=torch.float64)
    declared = parts_of(scheme, 2, x if training else None)[1].amplification
    got = observed_amplification(scheme, training=training)
    assert math.isclose(got, declared, rel_tol=0.03), (
        f"{scheme}: a step amplifies by {got:.3f}, declared is {declared:.3f}"
    )
    try:
        # From step 1: a first step may append streams, and has no matrix of one size.
        derived = declared if training else probe(scheme.at(1)).amplification
    except SchemeError:  # its streams differ in shape, or a step is not linear in them
        return
    assert math.isclose(derived, declared, rel_tol=1e-6), (
        f"{scheme}: its matrices amplify by {derived:.6f}, declared is {declared:.6f}"
    )


def check_updates(scheme: Scheme, *, channels: int = 8, training: bool = False) -> None:
    """The couplings of ``decompose`` make the step, and ``exact`` says whether all their scales are constants.

    An update whose scale is a constant can be undone bit for bit on a grid; one whose scale is computed from the
    streams cannot.

    Args:
        scheme: an invertible scheme.
        channels: width of the input.
        training: whether the scheme's form in training is checked (bdia).

    Raises:
        AssertionError: the pieces make another step, or ``exact`` is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    x, other = torch.randn(2, 2, channels, dtype=torch.float64, generator=generator)
    parts = parts_of(scheme, 3, x if training else None)
    fs = smooth_functions(scheme, channels, 3, parts=parts)
    constant = True
    for before, second, after, part, own in zip(
        run(scheme, fs, x, parts=parts), run(scheme, fs, other, parts=parts), run(scheme, fs, x, parts=parts)[1:],
        parts, fs, strict=False,
    ):  # fmt: skip
        for piece, functions, h, gs in part.decompose(own, 1.0):
            assert isinstance(piece, Coupling), (
                f"{scheme}: {piece} is no coupling, so that no list of updates undoes it"
            )
            for update in piece.updates(functions, h, len(before)):
                if not update.appends:
                    # From two states: a scale that is computed from the streams differs between them.
                    scale, again = (torch.as_tensor(update.terms(s)[0]) for s in (before, second))
                    constant = constant and torch.equal(scale, again)
                before, second = apply_update(update, before, gs), apply_update(update, second, gs)
            before, second = rotated(before, piece.rotate), rotated(second, piece.rotate)
        for i, (a, b) in enumerate(zip(before, after, strict=True)):
            assert torch.allclose(a, b, atol=1e-11), f"{scheme}: the updates of a step make another stream {i}"
        assert part.exact == constant, (
            f"{scheme}: exact is {part.exact}, but the scales of its updates are {'' if constant else 'not '}constant"
        )
