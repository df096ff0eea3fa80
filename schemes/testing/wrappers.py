"""The law of wrappers: a wrapper around a scheme passes on everything that the scheme declares and does."""

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar, get_origin

import torch
from torch import Tensor

from ..errors import SchemeError
from ..scheme import Function, Scheme, State, Takes, bind
from .laws import DTYPE, residual_functions

# Every attribute and property that a scheme declares, so that a new one cannot be forgotten by a wrapper.
ATTRIBUTES = (
    *(name for name, kind in inspect.get_annotations(Scheme).items() if get_origin(kind) is not ClassVar),
    *(name for name, kind in vars(Scheme).items() if isinstance(kind, property) and name not in ("plan", "tableau")),
)


class _Scale:
    """A shortcut with an inverse: 0.9 x."""

    def __call__(self, x: Tensor) -> Tensor:
        return 0.9 * x

    def inverse(self, y: Tensor) -> Tensor:
        return y / 0.9


def _same(got: Any, want: Any) -> bool:
    """Whether two values are equal, numbers up to rounding."""
    # A wrapper may come to the same number by another sum.
    if isinstance(want, float) and isinstance(got, (int, float)):
        return got == want or abs(got - want) <= 1e-12 * max(1.0, abs(want))
    if isinstance(want, (tuple, list)) and isinstance(got, (tuple, list)):
        return len(got) == len(want) and all(map(_same, got, want))
    return got == want


def check_attributes(wrapper: Scheme, scheme: Scheme) -> None:
    """Everything that `Scheme` declares is the same for both, the tableau included.

    Args:
        wrapper: a wrapper around one scheme, one step of which is one step of it.
        scheme: that scheme.

    Raises:
        AssertionError: an attribute differs; the message names it.
    """
    for name in ATTRIBUTES:
        got, want = getattr(wrapper, name), getattr(scheme, name)
        assert _same(got, want), f"{wrapper}: {name} is {got!r}, of {scheme} it is {want!r}"
    assert wrapper.stream_widths(12) == scheme.stream_widths(12), f"{wrapper}: other stream widths than {scheme}"
    got, want = wrapper.tableau, scheme.tableau
    same = got is want or (got is not None and want is not None and _same(got.floats()[:3], want.floats()[:3]))
    assert same, f"{wrapper}: another tableau than {scheme}"


class _Walk:
    """Steps of a scheme from an input on, forwards and backwards."""

    def __init__(self, scheme: Scheme, fs: Sequence[Sequence[Function]], h: float, training: bool):
        self.scheme, self.fs, self.h, self.training = scheme, fs, h, training
        self.parts: list[Scheme] = []
        self.every: int | None = None  # shortcuts are given to one in this many steps

    def forth(self, x: Tensor, every: int | None) -> list[State]:
        """The states from the start on."""
        self.every = every
        torch.manual_seed(0)  # what training draws
        states = [self.scheme.init(self._bound(0, (0.0,) * len(self.fs[0])), x, self.h)]
        for n in range(len(self.fs)):
            part = self.scheme.whole(n)
            part = part.training_scheme(n, states[-1][-1]) if self.training else part
            self.parts.append(part)
            gs = self._shortcuts(n)
            fs = self._bound(n, part.nodes)
            states.append(part._step(fs, states[-1], self.h, gs))
            _check_states(f"{part}, decomposed", [_decomposed(part, fs, states[-2], self.h, gs)], states[-1:])
        return states

    def back(self, state: State) -> list[State]:
        """The states before, from the last one on."""
        states = [state]
        for n in reversed(range(len(self.fs))):
            gs = self._shortcuts(n)
            part = self.parts[n]
            states.append(part._inverse(self._bound(n, part.nodes), states[-1], self.h, gs))
        return states[::-1]

    def _bound(self, n: int, nodes: tuple[float, ...] | None) -> tuple[Function, ...]:
        """The functions of a step with their times; all of them take one, so that no signature is read."""
        fs, time = self.fs[n], 0.2 + n * self.scheme.span * self.h
        return bind(fs, (Takes(time=True),) * len(fs), nodes, time, self.h, None)

    def _shortcuts(self, n: int) -> tuple[_Scale, ...]:
        return (_Scale(),) * self.parts[n].shortcuts if self.every and n % self.every == 0 else ()


def _decomposed(part: Scheme, fs: Sequence[Function], state: State, h: float, gs: Sequence[Function]) -> State:
    """The state after a step, by the schemes that make it up."""
    for piece, own, size, shortcuts in part.decompose(fs, h, gs):
        state = piece._step(own, state, size, shortcuts)
    return state


def check_wrapper(wrapper: Scheme, scheme: Scheme, *, n: int = 1, h: float = 0.3, shorter: bool = False) -> None:
    """A step of the wrapper is n steps of the scheme: values, streams, inverse, shortcuts, slots and training.

    Checked with separate, time-dependent residual functions, over two steps of the wrapper, so that a first step that
    differs from the others occurs once. For n = 1 all attributes are compared too.

    Args:
        wrapper: such as ``repeat(scheme, n)``.
        scheme: the scheme that it wraps, with fixed steps.
        n: how many steps of the scheme make one of the wrapper.
        h: step size of the wrapper.
        shorter: whether the scheme's steps have the size ``h / n``, not h.

    Raises:
        AssertionError: something differs; the message says what.

    Example:
        >>> import schemes
        >>> check_wrapper(schemes.get("repeat(leapfrog, 3)"), schemes.get("leapfrog"), n=3)
        >>> check_wrapper(schemes.get("substeps(bdia, 2)"), schemes.get("bdia"), n=2, shorter=True)
    """
    if n == 1:
        check_attributes(wrapper, scheme)
        # The first step and a later one, since first steps may be of another kind.
        for k in range(2):
            if wrapper.whole(k) is not wrapper or scheme.whole(k) is not scheme:
                check_attributes(wrapper.whole(k), scheme.whole(k))
    for name in ("streams", "invertible", "reversible_in_training", "training_differs", "exact", "order"):
        got, want = getattr(wrapper, name), getattr(scheme, name)
        assert got == want, f"{wrapper}: {name} is {got!r}, of {scheme} it is {want!r}"
    grown = scheme.whole(1).amplification ** n
    assert _same(wrapper.whole(1).amplification, grown), f"{wrapper}: amplification is not {grown:g}"
    for training in (False, True) if scheme.training_differs else (False,):
        _check_walk(wrapper, scheme, n, h, h / n if shorter else h, training)


def _check_walk(wrapper: Scheme, scheme: Scheme, n: int, h: float, small: float, training: bool) -> None:
    channels = 4 * scheme.streams  # of one width each
    x = torch.randn(2, channels, dtype=DTYPE, generator=torch.Generator().manual_seed(0))
    widths, fs = scheme.stream_widths(channels), []
    for k in range(2 * n):
        part = scheme.whole(k)
        fs.append(residual_functions(part, k, widths))
        widths = part.widths(k, widths)
    shortcuts = any(scheme.whole(k).shortcuts for k in range(2))
    for every in (None, n) if shortcuts else (None,):
        where = f"{wrapper} {'in training ' if training else ''}{'with shortcuts ' if every else ''}".strip()
        long, short = _Walk(wrapper, _joined(fs, n), h, training), _Walk(scheme, fs, small, training)
        # The wrapper is given shortcuts at each step, the scheme at the first of each n: elsewhere streams keep their
        # shape.
        got, want = long.forth(x, None if every is None else 1), short.forth(x, every)
        _check_states(where, got, want[::n])
        for k, part in enumerate(long.parts):
            _check_slots(where, part, short.parts[k * n : (k + 1) * n], k, got[k])
        assert torch.equal(wrapper.readout(want[-1]), scheme.readout(want[-1])), f"{where}: another readout"
        assert _start_of_inverse(wrapper, x) == _start_of_inverse(scheme, x), f"{where}: its inverse starts elsewhere"
        if all(part.invertible for part in long.parts):
            back, before = long.back(got[-1]), short.back(want[-1])[::n]
            _check_states(f"{where}, inverse", back, before)
            a, b = wrapper.input_from_state(back[0]), scheme.input_from_state(before[0])
            assert torch.allclose(a, b, atol=1e-9), f"{where}: another input"
        assert all(p.invertible for p in long.parts) == all(p.invertible for p in short.parts), f"{where}: invertible"


def _joined(fs: list[list[Function]], n: int) -> list[list[Function]]:
    return [[f for own in fs[k : k + n] for f in own] for k in range(0, len(fs), n)]


def _check_states(where: str, got: list[State], want: list[State]) -> None:
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        assert len(a) == len(b), f"{where}: {len(a)} streams after step {k - 1}, want {len(b)}"
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert x.shape == y.shape, f"{where}: stream {i} of state {k} is {tuple(x.shape)}, want {tuple(y.shape)}"
            error = float((x - y).abs().max() / y.abs().max().clamp(min=1.0))
            assert error < 1e-9, f"{where}: stream {i} of state {k} is off by {error:.1e}"


def _check_slots(where: str, part: Scheme, others: list[Scheme], k: int, state: State) -> None:
    """Slots, shapes and widths of one step of the wrapper against those of the steps in it."""
    widths, shapes = tuple(s.shape[1] for s in state), tuple(s.shape for s in state)
    slots, shape_of = part.slots(k, widths), [part.shape_of(i, shapes) for i in range(part.stages)]
    assert [s.index for s in slots] == list(range(part.stages)), f"{where}: slots are not numbered in order"
    assert tuple(s.raw for s in slots) == part.raw, f"{where}: raw is {part.raw}, its slots say otherwise"
    want_slots, want_shapes, w, z = [], [], widths, shapes
    for other in others:
        want_slots += [(s.in_channels, s.out_channels) for s in other.slots(k, w)]
        want_shapes += [other.shape_of(i, z) for i in range(other.stages)]  # type: ignore[arg-type]
        w, z = other.widths(k, w), other.shapes_after(z)
    assert [(s.in_channels, s.out_channels) for s in slots] == want_slots, f"{where}: other slots in step {k}"
    assert shape_of == want_shapes, f"{where}: other shapes in step {k}"
    assert (part.widths(k, widths), part.shapes_after(shapes)) == (w, z), f"{where}: other streams after step {k}"


def _start_of_inverse(scheme: Scheme, y: Tensor) -> list[Any]:
    """Shapes and sums of the streams that an output determines; nothing where it does not determine them."""
    try:
        # Sums represent the values: equal sums of equal shapes are no accident here.
        return [(s.shape, float(s.sum())) for s in scheme.state_from_output(y)]
    except SchemeError:
        return []
