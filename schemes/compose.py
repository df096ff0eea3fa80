"""Schemes made of schemes: nested(outer, inner), repeat, substeps and mixes."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import tableau as exact
from .errors import SchemeError
from .scheme import Function, Scheme, Slot, State, StepSize
from .tableau import Tableau

MAX_STAGES = 4096


class _Once:
    """A shortcut evaluated once a step, however many inner schemes ask for it (its BatchNorm must move once)."""

    __slots__ = ("g", "seen", "value")

    def __init__(self, g: Function):
        self.g, self.seen, self.value = g, None, None

    def __call__(self, x: Tensor) -> Tensor:
        if self.seen is not x:
            self.seen, self.value = x, self.g(x)
        return self.value  # type: ignore[return-value]


class Nested(Scheme):
    r"""A scheme whose residual functions are steps of another: F_i(x) = (inner(x; h) - x) / h.

    For two Runge-Kutta methods with coefficients (A, b) outside and (a, w) inside this is the method
    A (x) 1 w^T + I (x) a with weights b (x) w (Nested HO-Net, arXiv 2103.15244, section 2.5, in the reading that a
    high-order block's function is itself a high-order block).

    Cost: outer stages x inner stages residual functions a step; streams and inverse are the outer's.

    Args:
        outer: any scheme.
        inner: a scheme of one stream.

    Raises:
        SchemeError: the inner scheme has several streams or no fixed number of evaluations.

    Example:
        >>> import schemes
        >>> schemes.get("nested(midpoint, repeat(euler, 2))").stages
        4
    """

    def __init__(self, outer: Scheme, inner: Scheme):
        outer, inner = _scheme("nested", outer), _scheme("nested", inner)
        if inner.streams != 1 or inner.nodes is None:
            raise SchemeError(
                f"nested: the inner scheme {inner} cannot act as a residual function; want one stream, fixed steps."
            )
        if outer.nodes is None:
            raise SchemeError(f"nested: the outer scheme {outer} chooses its own steps; nest fixed-step schemes.")
        if outer.stages * inner.stages > MAX_STAGES:
            raise SchemeError(f"nested: {outer.stages * inner.stages} residual functions a step; at most {MAX_STAGES}.")
        self.outer, self.inner = outer, inner
        self.stages = outer.stages * inner.stages
        self.span = outer.span * inner.span
        self.streams, self.invertible = outer.streams, outer.invertible
        self.nodes = tuple(inner.span * c + d for c in outer.nodes for d in inner.nodes)
        if outer.evaluations is not None and inner.evaluations is not None:
            self.evaluations = outer.evaluations * inner.evaluations
        if outer.mixing is not None and inner.mixing is not None and outer.gain and inner.gain:
            self.mixing, self.gain = outer.mixing * inner.gain + inner.mixing, outer.gain * inner.gain
        if self.mixing is not None and outer.order and inner.order:
            self.order = self._order()

    def _order(self) -> int | None:
        outer, inner = self.outer, self.inner
        if 1 in (outer.stages, inner.stages):
            return max(o for o in (outer.order, inner.order) if o)
        if isinstance(outer, Composition) and outer.scale == 1.0:  # full steps: each part is nested by itself
            return min(o for p in set(outer.parts) if (o := Nested(p, inner).order))
        if isinstance(outer, Nested):  # nesting is associative
            return Nested(outer.outer, Nested(outer.inner, inner)).order
        # sum_ij B_i b_j (C_i + c_j) is 1/2 + 1/2 and not 1/2 when both have order 2 or more.
        return 1

    @property
    def tableau(self) -> Tableau | None:
        outer, inner = self.outer.tableau, self.inner.tableau
        if outer is None or inner is None:
            return None
        if self.outer.span > 1:
            # An inner step of size h is the part 1 / span of the whole.
            rows = [[x / self.outer.span for x in row] for row in inner.a]
            inner = Tableau.from_rows(rows, inner.b, name=inner.name, order=inner.order, digits=inner.digits)
        # Its order is ours: `nest` does not know of full steps, whose order may be higher.
        return replace(exact.nest(outer, inner), order=self.order)

    @property
    def raw(self) -> tuple[bool, ...]:
        return tuple(o and i for o in self.outer.raw for i in self.inner.raw)

    def slots(self, n: int, streams: tuple[int, ...], out_channels: int | None = None) -> tuple[Slot, ...]:
        found = []
        for i, slot in enumerate(self.outer.slots(n, streams, out_channels)):
            if len(slot.in_channels) != 1:
                raise SchemeError(f"{self}: the outer's functions take {len(slot.in_channels)} arguments, want one.")
            for j, raw in enumerate(self.inner.raw):
                width = slot.in_channels[0] if raw else slot.out_channels
                index = i * self.inner.stages + j
                found.append(Slot(n, index, (width,), slot.out_channels, slot.raw and raw))
        return tuple(found)

    def widths(self, n: int, streams: tuple[int, ...], out_channels: int | None = None) -> tuple[int, ...]:
        return self.outer.widths(n, streams, out_channels)

    def stream_widths(self, channels: int) -> tuple[int, ...]:
        return self.outer.stream_widths(channels)

    def shape_of(self, i: int, streams: tuple[torch.Size, ...]) -> torch.Size | None:
        return self.outer.shape_of(i // self.inner.stages, streams)

    def _functions(self, fs: Sequence[Function], h: StepSize, gs: Sequence[Function]) -> tuple[Function, ...]:
        """The outer's residual functions: slopes of the inner, with the shortcut where they see the raw input."""
        s, slope = self.inner.stages, self.inner.slope

        def function(i: int, raw: bool) -> Function:
            part, shortcut = fs[i * s : (i + 1) * s], gs if raw else ()
            return lambda x: slope(part, x, h, shortcut)

        uses = len(fs) // self.stages  # more than one where the outer evaluates its functions several times over
        return tuple(function(i, raw) for i, raw in enumerate(self.outer.raw * uses))

    def decompose(self, fs: Sequence[Function], h: StepSize, gs: Sequence[Function] = ()) -> list:
        gs = tuple(_Once(g) for g in gs)
        return self.outer.decompose(self._functions(fs, h, gs), h, gs)

    def state_from_output(self, y: Tensor) -> State:
        return self.outer.state_from_output(y)

    def input_from_state(self, state: State) -> Tensor:
        return self.outer.input_from_state(state)

    def at(self, n: int) -> Scheme:
        part = self.outer if len(self.outer.plan) > 1 else self.outer.at(n)  # a mix is nested whole
        return self if part is self.outer else Nested(part, self.inner)

    def init(self, fs: Sequence[Function], x: Tensor, h: StepSize = 1.0) -> State:
        return self.outer.init(self._functions(fs, h, ()), x, h)

    def readout(self, state: State) -> Tensor:
        return self.outer.readout(state)

    def _step(self, fs: Sequence[Function], state: State, h: StepSize = 1.0, gs: Sequence[Function] = ()) -> State:
        gs = tuple(_Once(g) for g in gs)
        return self.outer._step(self._functions(fs, h, gs), state, h, gs)

    def _inverse(self, fs: Sequence[Function], state: State, h: StepSize = 1.0, gs: Sequence[Function] = ()) -> State:
        gs = tuple(_Once(g) for g in gs)
        return self.outer._inverse(self._functions(fs, h, gs), state, h, gs)

    def slope(self, fs: Sequence[Function], x: Tensor, h: StepSize = 1.0, gs: Sequence[Function] = ()) -> Tensor:
        gs = tuple(_Once(g) for g in gs)
        return self.outer.slope(self._functions(fs, h, gs), x, h, gs)

    def __str__(self) -> str:
        return f"nested({self.outer}, {self.inner})"


class Composition(Scheme):
    """Schemes one after another; the base of Repeat, Substeps and Mix."""

    scale: float = 1.0  # each part makes a step of scale * h

    def _set(self, parts: tuple[Scheme, ...]) -> None:
        stages = sum(p.stages for p in parts)
        if stages > MAX_STAGES:
            raise SchemeError(f"{self}: {stages} residual functions a step; at most {MAX_STAGES}.")
        first = parts[0]
        for p in parts:
            if p.nodes is None:
                raise SchemeError(f"{self}: {p} chooses its own steps; only fixed-step schemes follow each other.")
            if p != first and (p.streams != 1 or first.streams != 1):
                raise SchemeError(f"{self}: {p} and {first} keep different streams; mix one-stream schemes only.")
        self.parts = parts
        self.stages = stages
        self.streams = first.streams
        self.invertible = all(p.invertible for p in parts)
        mixings, gains = [p.mixing for p in parts], [p.gain for p in parts]
        if None not in mixings and None not in gains:
            # Each part starts anew from its own input, so the largest figure of a part is the figure of all.
            self.mixing = self.scale * max(m for m in mixings if m is not None)
            self.gain = self.scale * sum(g for g in gains if g)
        nodes, start = [], 0.0
        for p in parts:
            nodes += [start + self.scale * c for c in p.nodes or ()]
            start += self.scale * p.span
        self.nodes, self.span = tuple(nodes), round(start)
        orders = [p.order for p in parts]
        self.order = None if None in orders else min(o for o in orders if o)
        counts = [p.evaluations for p in parts]
        self.evaluations = None if None in counts else sum(c for c in counts if c)

    @property
    def tableau(self) -> Tableau | None:
        tableaus = [t for p in self.parts if (t := p.tableau)]
        if len(tableaus) < len(self.parts):
            return None
        return exact.compose(tableaus, [p.span for p in self.parts])

    @property
    def raw(self) -> tuple[bool, ...]:
        first, *others = self.parts
        return first.raw + (False,) * sum(p.stages for p in others)

    def slots(self, n: int, streams: tuple[int, ...], out_channels: int | None = None) -> tuple[Slot, ...]:
        found: list[Slot] = []
        for p in self.parts:
            base = len(found)
            found += [
                replace(slot, index=base + slot.index, raw=slot.raw and base == 0)
                for slot in p.slots(n, streams, out_channels)
            ]
            streams, out_channels = p.widths(n, streams, out_channels), None
        return tuple(found)

    def widths(self, n: int, streams: tuple[int, ...], out_channels: int | None = None) -> tuple[int, ...]:
        for p in self.parts:
            streams, out_channels = p.widths(n, streams, out_channels), None
        return streams

    def stream_widths(self, channels: int) -> tuple[int, ...]:
        return self.parts[0].stream_widths(channels)

    def shape_of(self, i: int, streams: tuple[torch.Size, ...]) -> torch.Size | None:
        for p in self.parts:
            if i < p.stages:
                return p.shape_of(i, streams)
            i -= p.stages
        raise IndexError(i)

    def state_from_output(self, y: Tensor) -> State:
        return self.parts[-1].state_from_output(y)

    def input_from_state(self, state: State) -> Tensor:
        return self.parts[0].input_from_state(state)

    def init(self, fs: Sequence[Function], x: Tensor, h: StepSize = 1.0) -> State:
        return self.parts[0].init(fs[: self.parts[0].stages], x, self.scale * h)

    def readout(self, state: State) -> Tensor:
        return self.parts[-1].readout(state)

    def decompose(self, fs: Sequence[Function], h: StepSize, gs: Sequence[Function] = ()) -> list:
        h, start, found = self.scale * h, 0, []
        for p in self.parts:
            found += p.decompose(fs[start : start + p.stages], h, gs)
            start, gs = start + p.stages, ()
        return found

    def _step(self, fs: Sequence[Function], state: State, h: StepSize = 1.0, gs: Sequence[Function] = ()) -> State:
        h, start = self.scale * h, 0
        for p in self.parts:
            state = p._step(fs[start : start + p.stages], state, h, gs)
            start, gs = start + p.stages, ()
        return state

    def slope(self, fs: Sequence[Function], x: Tensor, h: StepSize = 1.0, gs: Sequence[Function] = ()) -> Tensor:
        # The sum of the parts' slopes: no difference is divided by h, which may be small, or 0 in a warm-up.
        gs = tuple(_Once(g) for g in gs)
        first, *others = self.parts
        base = gs[0](x) if gs else x
        total, start = first.slope(fs[: first.stages], x, self.scale * h, gs), first.stages
        for p in others:
            y = base + self.scale * h * total
            total = total + p.slope(fs[start : start + p.stages], y, self.scale * h)
            start += p.stages
        return total if self.scale == 1.0 else self.scale * total

    def _inverse(self, fs: Sequence[Function], state: State, h: StepSize = 1.0, gs: Sequence[Function] = ()) -> State:
        h, end = self.scale * h, self.stages
        for n in range(len(self.parts) - 1, -1, -1):
            p = self.parts[n]
            state = p._inverse(fs[end - p.stages : end], state, h, gs if n == 0 else ())
            end -= p.stages
        return state


def _scheme(name: str, scheme: object) -> Scheme:
    if not isinstance(scheme, Scheme):
        raise SchemeError(f"{name}: {scheme!r} is no scheme; write a name such as rk4.")
    return scheme


def _count(name: str, n: object) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_STAGES:
        raise SchemeError(f"{name}: the count is {n}, want a whole number from 1 to {MAX_STAGES}.")
    return n


class Repeat(Composition):
    """n full steps of a scheme as one: time moves on by n h; as a residual function it is a block of n.

    Cost: n times the scheme's.

    Args:
        scheme: any fixed-step scheme.
        n: number of steps, at least 1.

    Raises:
        SchemeError: n is no count, or the scheme chooses its own steps.

    Example:
        >>> import schemes
        >>> schemes.get("repeat(rk4, 3)").span
        3
    """

    def __init__(self, scheme: Scheme, n: int):
        self.scheme, self.n = _scheme("repeat", scheme), _count("repeat", n)
        self._set((scheme,) * self.n)

    def __str__(self) -> str:
        return f"repeat({self.scheme}, {self.n})"


class Substeps(Composition):
    """n steps of size h / n as one: time moves on by h; with separate weights there are n times as many functions.

    Cost: n times the scheme's.

    Args:
        scheme: any fixed-step scheme.
        n: number of steps, at least 1.

    Raises:
        SchemeError: n is no count, or the scheme chooses its own steps.

    Example:
        >>> import schemes
        >>> schemes.get("substeps(midpoint, 2)").stages
        4
    """

    def __init__(self, scheme: Scheme, n: int):
        self.scheme, self.n = _scheme("substeps", scheme), _count("substeps", n)
        self.scale = 1.0 / self.n
        self._set((scheme,) * self.n)

    def __str__(self) -> str:
        return f"substeps({self.scheme}, {self.n})"


class Mix(Composition):
    """Schemes in turn, written ``3*rk4 + midpoint``; a Stack makes one step of each part and begins again.

    Cost: the sum of the parts'.

    Args:
        parts: (count, scheme) pairs; one-stream schemes, or several times the same one.

    Raises:
        SchemeError: a count is no count, or parts of different streams are mixed.

    Example:
        >>> import schemes
        >>> [str(s) for s in schemes.get("2*rk4 + midpoint").plan]
        ['rk4', 'rk4', 'midpoint']
    """

    def __init__(self, *parts: tuple[int, Scheme]):
        self.counts = tuple((_count("mix", n), _scheme("mix", s)) for n, s in parts)
        if sum(n * s.stages for n, s in self.counts) > MAX_STAGES:
            raise SchemeError(f"{self}: more than {MAX_STAGES} residual functions in one period.")
        flat: list[Scheme] = []
        for n, s in self.counts:
            flat += s.plan * n
        self._set(tuple(flat))

    @property
    def plan(self) -> tuple[Scheme, ...]:
        return self.parts

    def __str__(self) -> str:
        only = len(self.counts) == 1  # 1*rk4 is a mix and rk4 is not

        def term(n: int, s: Scheme) -> str:
            if isinstance(s, Mix):
                return f"{n}*({s})"
            return f"{n}*{s}" if n > 1 or only else str(s)

        return " + ".join(term(n, s) for n, s in self.counts)
