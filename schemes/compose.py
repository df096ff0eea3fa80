"""Schemes made of schemes: nested(outer, inner), repeat, substeps and mixes.

A wrapper around one scheme is that scheme: ``repeat(s, 1)``, ``substeps(s, 1)``, ``1*s``, ``nested(s, euler)`` and, for
one stream, ``nested(euler, s)`` give the same values and have the same attributes, first steps, inverse and training.
`schemes.testing.check_wrapper` is this law, and goes through every attribute that `Scheme` declares.

Where a step evaluates its residual functions several times over (reversible), ``nodes`` and the functions that are
given with their times stand use by use: all functions of the first use, then all of the second. A part of a
composition takes its own share out of each.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .errors import SchemeError
from .linear import probe
from .scheme import MAX_FUNCTIONS, Function, Scheme, Slot, State, StepSize, limit_functions
from .tableau import Tableau, compose, nest


def _drawing(generator: torch.Generator | None) -> tuple[torch.Generator, ...]:
    """A generator as a last argument, where there is one: schemes of a user's own need not take it."""
    return () if generator is None else (generator,)


class _Once:
    """A shortcut evaluated once a step, however many inner schemes ask for it (its BatchNorm must move once)."""

    __slots__ = ("g", "seen", "value")

    def __init__(self, g: Function):
        self.g, self.seen, self.value = g, None, None

    def __call__(self, x: Tensor) -> Tensor:
        # By identity: inner schemes hand on the very tensor, and comparing values would cost as much as the shortcut.
        if self.seen is not x:
            self.seen, self.value = x, self.g(x)
        return self.value  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.g, name)  # the inverse and the scale of an invertible one


def _uses(scheme: Scheme) -> int:
    """How often a step evaluates its residual functions."""
    return len(scheme.nodes or ()) // scheme.stages


def _share(items: Sequence[Any], stages: int, start: int, part: int, uses: int) -> tuple[Any, ...]:
    """What ``part`` functions from ``start`` on have of items that stand use by use, ``stages`` in each.

    Items that stand once, as functions without times do, serve for every use.
    """
    # Functions come once, or with their times filled in once per use: only their number tells which.
    given = len(items) // stages
    if given == 1:
        return tuple(items[start : start + part])
    first = (u * stages + start for u in range(uses))
    return tuple(x for i in first for x in items[i : i + part])


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
        SchemeError: the inner scheme has several streams (in training too) or no fixed number of evaluations, or the
            outer's functions are given several streams or another shape than they return.

    Example:
        >>> import schemes
        >>> schemes.get("nested(midpoint, repeat(euler, 2))").stages
        4
    """

    examples = (
        "nested(midpoint, rk4)",
        "nested(rk4, euler)",
        "nested(midpoint, repeat(euler, 2))",
        "nested(revnet, midpoint)",
        "nested(leapfrog, midpoint)",
        "nested(bdia, midpoint)",
        "nested(2*leapfrog, euler)",
        "nested(reversible(midpoint, 0.9), heun2)",
    )

    def __init__(self, outer: Scheme, inner: Scheme):
        outer, inner = _scheme("nested", outer), _scheme("nested", inner)
        if outer.nodes is None:
            raise SchemeError(f"nested: the outer scheme {outer} chooses its own steps; nest fixed-step schemes.")
        if inner.nodes is None or not inner.one_stream:
            remedy = "rk4" if inner.nodes is None else f"rk4, and {inner} outside"
            raise SchemeError(
                f"nested: the inner scheme {inner} cannot act as a residual function; want one stream, fixed steps.\n"
                f"  In training too: take a scheme such as {remedy}."
            )
        limit_functions("nested", outer.stages * inner.stages)
        _check_outer(outer)
        self.outer, self.inner = outer, inner
        self.stages = outer.stages * inner.stages
        self.span = outer.span * inner.span
        self.nodes = self._times(outer.nodes, inner.nodes)
        # What a step does to the streams is the outer scheme's; the inner one only stands in for functions.
        for name in ("streams", "invertible", "shortcuts", "training_differs", "streams_added", "byproducts"):
            setattr(self, name, getattr(outer, name))
        self.amplification, self.exact = outer.amplification, outer.exact
        if outer.evaluations is not None and inner.evaluations is not None:
            self.evaluations = outer.evaluations * inner.evaluations
        if outer.mixing is not None and inner.mixing is not None and outer.gain and inner.gain:
            # A stage strays by what the outer sums of whole inner increments, and by the inner's own stage on top.
            self.mixing, self.gain = outer.mixing * inner.gain + inner.mixing, outer.gain * inner.gain
        if outer.order and inner.order:
            self.order = self._order()

    def _times(self, outer: tuple[float, ...], inner: tuple[float, ...]) -> tuple[float, ...]:
        """The times of all evaluations, use by use; each use of the outer has all of the inner's."""
        s, r = self.outer.stages, self.inner.stages
        return tuple(
            self.inner.span * c + d
            for u in range(len(outer) // s)
            for v in range(len(inner) // r)
            for c in outer[u * s : (u + 1) * s]
            for d in inner[v * r : (v + 1) * r]
        )

    def _order(self) -> int | None:
        outer, inner = self.outer, self.inner
        if _is_euler(inner):
            return outer.order
        if _is_euler(outer):
            return inner.order
        if isinstance(outer, Composition) and outer.scale == 1.0:  # full steps: each part is nested by itself
            # Nesting inside each part, and then one after the other, is the same network; each part has an order of its
            # own.
            orders = [Nested(p, inner).order for p in set(outer.parts)]
            return None if None in orders else min(o for o in orders if o)
        if isinstance(outer, Nested):  # nesting is associative
            return Nested(outer.outer, Nested(outer.inner, inner)).order
        # The slope of an inner step of size h is off by O(h), whatever the order; of Runge-Kutta methods:
        # sum_ij B_i b_j (C_i + c_j) is 1/2 + 1/2 and not 1/2 when both have order 2 or more.
        return 1

    @property
    def tableau(self) -> Tableau | None:
        outer, inner = self.outer.tableau, self.inner.tableau
        if outer is None or inner is None:
            return None
        if self.outer.span > 1:
            # An inner step of size h is the part 1 / span of the whole.
            # Rows only: the weights make the increment, which the slope divides by h again.
            rows = [[x / self.outer.span for x in row] for row in inner.a]
            inner = Tableau.from_rows(rows, inner.b, name=inner.name, order=inner.order, digits=inner.digits)
        # Its order is ours: `nest` does not know of full steps, whose order may be higher.
        return replace(nest(outer, inner), order=self.order)

    @property
    def raw(self) -> tuple[bool, ...]:
        return tuple(o and i for o in self.outer.raw for i in self.inner.raw)

    def slots(self, n: int, streams: tuple[int, ...], out_channels: int | None = None) -> tuple[Slot, ...]:
        found = []
        for i, slot in enumerate(self.outer.slots(n, streams, out_channels)):
            # Found here for schemes whose widths depend on the input; the others were refused when they were made.
            if out_channels is None and slot.in_channels != (slot.out_channels,):
                raise SchemeError(self._uneven(streams))
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

    def shapes_after(self, streams: tuple[torch.Size | None, ...]) -> tuple[torch.Size | None, ...]:
        return self.outer.shapes_after(streams)

    @property
    def unused(self) -> tuple[int, ...]:
        s, idle = self.inner.stages, set(self.outer.unused)
        return tuple(
            i * s + j for i in range(self.outer.stages) for j in (range(s) if i in idle else self.inner.unused)
        )

    @property
    def reversible_in_training(self) -> bool:
        return self.outer.reversible_in_training

    def training_scheme(self, n: int, x: Tensor, generator: torch.Generator | None = None) -> Scheme:
        outer = self.outer.training_scheme(n, x, *_drawing(generator))
        return self if outer is self.outer else Nested(outer, self.inner)

    def _functions(self, fs: Sequence[Function], h: StepSize, gs: Sequence[Function]) -> tuple[Function, ...]:
        """The outer's residual functions: slopes of the inner, with the shortcut where they see the raw input."""
        s, slope, inner_uses = self.inner.stages, self.inner.slope, _uses(self.inner)
        bound = len(fs) > self.stages  # with times: every use has its own functions
        raws = self.outer.raw

        def function(u: int, i: int) -> Function:
            of_use = fs[u * inner_uses * self.stages : (u + 1) * inner_uses * self.stages] if bound else fs
            part = _share(of_use, self.stages, i * s, s, inner_uses)
            shortcut = gs if raws[i] else ()
            return lambda x: slope(part, x, h, shortcut)

        # A reversible outer scheme evaluates everything twice, and its inner steps each have as many uses of their own.
        uses = len(fs) // (self.stages * inner_uses) if bound else 1
        return tuple(function(u, i) for u in range(uses) for i in range(self.outer.stages))

    def decompose(self, fs: Sequence[Function], h: StepSize, gs: Sequence[Function] = ()) -> list:
        gs = tuple(_Once(g) for g in gs)
        return self.outer.decompose(self._functions(fs, h, gs), h, gs)

    def state_from_output(self, y: Tensor) -> State:
        return self.outer.state_from_output(y)

    def input_from_state(self, state: State) -> Tensor:
        return self.outer.input_from_state(state)

    def at(self, n: int) -> Scheme:
        part = self.outer.whole(n)  # a mix is nested whole
        return self if part is self.outer else Nested(part, self.inner)

    def init(self, fs: Sequence[Function], x: Tensor, h: StepSize = 1.0) -> State:
        state = self.outer.init(self._functions(fs, h, ()), x, h)
        if len({s.shape for s in state}) > 1:
            raise SchemeError(self._uneven(tuple(tuple(s.shape) for s in state)))
        return state

    def _uneven(self, streams: tuple) -> str:
        return (
            f"{self}: the streams are {streams}, and a step in place of a function keeps one width.\n"
            "  Give an input that splits evenly."
        )

    def readout(self, state: State) -> Tensor:
        return self.outer.readout(state)

    def _step(self, fs: Sequence[Function], state: State, h: StepSize = 1.0, gs: Sequence[Function] = ()) -> State:
        # Each inner stage that sees the raw input asks for the shortcut again.
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
        limit_functions(str(self), stages)
        first, last = parts[0], parts[-1]
        for p in parts:
            if p.nodes is None:
                raise SchemeError(f"{self}: {p} chooses its own steps; only fixed-step schemes follow each other.")
            # ``Steps`` are parts of one composition that was checked when it was made.
            if p != first and type(self) is not Steps and not (p.one_stream and first.one_stream):
                where = " in training" if p.training_differs or first.training_differs else ""
                raise SchemeError(
                    f"{self}: {p} and {first} keep different streams{where}; mix one-stream schemes only.\n"
                    "  Or make two stacks, one after the other."
                )
        self.parts = parts
        self.stages = stages
        # After the first part the streams have their new shape, and need none.
        self.streams, self.shortcuts = first.streams, first.shortcuts  # shortcuts are the first part's
        self.invertible, self.exact = all(p.invertible for p in parts), all(p.exact for p in parts)
        self.training_differs = any(p.training_differs for p in parts)
        self.streams_added, self.byproducts = sum(p.streams_added for p in parts), last.byproducts
        # Undoing the last part grows an error that the part before grows again.
        self.amplification = math.prod(p.amplification for p in parts)
        mixings, gains = [p.mixing for p in parts], [p.gain for p in parts]
        if None not in mixings and None not in gains:
            # Each part starts anew from its own input, so the largest figure of a part is the figure of all.
            self.mixing = self.scale * max(m for m in mixings if m is not None)
            self.gain = self.scale * sum(g for g in gains if g)
        self.nodes, self.span = self._times(parts)
        orders = [p.order for p in parts]
        self.order = None if None in orders else min(o for o in orders if o)
        counts = [p.evaluations for p in parts]
        self.evaluations = None if None in counts else sum(c for c in counts if c)

    def _times(self, parts: tuple[Scheme, ...]) -> tuple[tuple[float, ...], int]:
        """The times of all evaluations, use by use, and the span of all parts."""
        starts = [0.0]
        for p in parts:
            starts.append(starts[-1] + self.scale * p.span)
        nodes = []
        for u in range(max(map(_uses, parts))):
            for p, start in zip(parts, starts, strict=False):
                own = min(u, _uses(p) - 1) * p.stages  # a part of fewer uses repeats its last; nothing reads it
                nodes += [start + self.scale * c for c in (p.nodes or ())[own : own + p.stages]]
        return tuple(nodes), round(starts[-1])

    def _shares(self, fs: Sequence[Function]) -> list[tuple[Function, ...]]:
        """The residual functions of each part."""
        found, start = [], 0
        for p in self.parts:
            found.append(_share(fs, self.stages, start, p.stages, _uses(p)))
            start += p.stages
        return found

    def whole(self, n: int) -> Scheme:
        count = len(self.parts)
        # Part i of use n is step n * count + i of its scheme, whose first steps may differ.
        parts = tuple(p.whole(n * count + i) for i, p in enumerate(self.parts))
        if all(new is old for new, old in zip(parts, self.parts, strict=True)):
            return self
        return Steps(parts, self.scale, f"{self}, step {n}")

    def at(self, n: int) -> Scheme:
        return self.whole(n)

    @property
    def reversible_in_training(self) -> bool:
        return all(p.reversible_in_training for p in self.parts)

    def training_scheme(self, n: int, x: Tensor, generator: torch.Generator | None = None) -> Scheme:
        if not self.training_differs:
            return self
        count, drawing = len(self.parts), _drawing(generator)
        parts = tuple(p.training_scheme(n * count + i, x, *drawing) for i, p in enumerate(self.parts))
        # Drawn part by part: each step of a repeated bdia has a sign of its own.
        return Steps(parts, self.scale, f"{self} in training, step {n}")

    @property
    def unused(self) -> tuple[int, ...]:
        found, start = [], 0
        for p in self.parts:
            found += [start + i for i in p.unused]
            start += p.stages
        return tuple(found)

    @property
    def tableau(self) -> Tableau | None:
        tableaus = [t for p in self.parts if (t := p.tableau)]
        if len(tableaus) < len(self.parts):
            return None
        # Scaled to a total step of 1, as every tableau is; ``scale`` drops out.
        return compose(tableaus, [p.span for p in self.parts])

    @property
    def raw(self) -> tuple[bool, ...]:
        first, *others = self.parts
        return first.raw + (False,) * sum(p.stages for p in others)

    def slots(self, n: int, streams: tuple[int, ...], out_channels: int | None = None) -> tuple[Slot, ...]:
        found: list[Slot] = []
        for p in self.parts:
            base = len(found)
            found += [
                # Only the first part sees the step's input before the shortcut.
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
        i %= self.stages  # functions that are evaluated several times over come as often
        for p in self.parts:
            # Streams are followed through the parts, as a part may append some, or rotate them.
            if i < p.stages:
                return p.shape_of(i, streams)
            i, streams = i - p.stages, p.shapes_after(streams)  # type: ignore[assignment]
        raise IndexError(i)

    def shapes_after(self, streams: tuple[torch.Size | None, ...]) -> tuple[torch.Size | None, ...]:
        for p in self.parts:
            streams = p.shapes_after(streams)
        return streams

    def state_from_output(self, y: Tensor) -> State:
        return self.parts[-1].state_from_output(y)

    def input_from_state(self, state: State) -> Tensor:
        return self.parts[0].input_from_state(state)

    def init(self, fs: Sequence[Function], x: Tensor, h: StepSize = 1.0) -> State:
        return self.parts[0].init(fs[: self.parts[0].stages], x, self.scale * h)  # at the start of the step in time

    def readout(self, state: State) -> Tensor:
        return self.parts[-1].readout(state)

    def decompose(self, fs: Sequence[Function], h: StepSize, gs: Sequence[Function] = ()) -> list:
        h, found = self.scale * h, []
        for p, part in zip(self.parts, self._shares(fs), strict=True):
            found += p.decompose(part, h, gs)
            gs = ()
        return found

    def _step(self, fs: Sequence[Function], state: State, h: StepSize = 1.0, gs: Sequence[Function] = ()) -> State:
        h = self.scale * h
        for p, part in zip(self.parts, self._shares(fs), strict=True):
            state = p._step(part, state, h, gs)
            gs = ()
        return state

    def slope(self, fs: Sequence[Function], x: Tensor, h: StepSize = 1.0, gs: Sequence[Function] = ()) -> Tensor:
        # The sum of the parts' slopes: no difference is divided by h, which may be small, or 0 in a warm-up.
        gs = tuple(_Once(g) for g in gs)
        base = gs[0](x) if gs else x
        shares = self._shares(fs)
        total = self.parts[0].slope(shares[0], x, self.scale * h, gs)
        for p, part in zip(self.parts[1:], shares[1:], strict=True):
            y = base + self.scale * h * total
            total = total + p.slope(part, y, self.scale * h)
        return total if self.scale == 1.0 else self.scale * total

    def _inverse(self, fs: Sequence[Function], state: State, h: StepSize = 1.0, gs: Sequence[Function] = ()) -> State:
        h, shares = self.scale * h, self._shares(fs)
        for n in range(len(self.parts) - 1, -1, -1):
            state = self.parts[n]._inverse(shares[n], state, h, gs if n == 0 else ())
        return state


class Steps(Composition):
    """The parts of one step of a composition whose steps differ: its first one, or any one in training.

    Args:
        parts: what follows each other, in order.
        scale: each part makes a step of ``scale * h``.
        name: the text that it prints as; no expression reads it.
    """

    def __init__(self, parts: tuple[Scheme, ...], scale: float, name: str):
        self.name, self.scale = name, scale
        self._set(parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Steps) and (self.parts, self.scale) == (other.parts, other.scale)

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name


def _is_euler(scheme: Scheme) -> bool:
    """Whether a step is x + h F(x), under whatever name."""
    if scheme.stages != 1 or not scheme.streams == 1:
        return False
    try:
        # By what it does and not by its name: repeat(euler, 1) and a user's own scheme are Euler's too.
        m = probe(scheme)
    except SchemeError:
        return False
    return [x.flatten().tolist() for x in (m.a, m.u, m.b, m.v)] == [[0.0], [1.0], [1.0], [1.0]]


def _check_outer(outer: Scheme) -> None:
    """Refuses an outer scheme whose residual functions no step can be: they take several streams, or change width."""
    # A width that divides evenly, so that what differs is the scheme's doing and not the input's.
    widths = outer.stream_widths(12 * outer.streams)
    for n in (0, 1):
        part = outer.whole(n)
        try:
            slots = part.slots(n, widths)
        except ValueError:  # a scheme that says nothing of its slots
            return
        for slot in slots:
            if slot.in_channels != (slot.out_channels,):
                raise SchemeError(
                    f"nested: function {slot.index} of the outer scheme {outer} is given widths {slot.in_channels} and "
                    f"returns {slot.out_channels}; a step keeps one width.\n"
                    "  Nest inside of a scheme such as rk4, revnet or leapfrog."
                )
        widths = part.widths(n, widths)


def _scheme(name: str, scheme: object) -> Scheme:
    if not isinstance(scheme, Scheme):
        raise SchemeError(f"{name}: {scheme!r} is no scheme; write a name such as rk4.")
    return scheme


def _count(name: str, n: object) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_FUNCTIONS:
        raise SchemeError(f"{name}: the count is {n}, want a whole number from 1 to {MAX_FUNCTIONS}.")
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

    examples = (
        "repeat(rk4, 3)",
        "repeat(leapfrog, 2)",
        "repeat(bdia, 2)",
        "repeat(revcol, 2)",
        "repeat(dense(3), 2)",
        "repeat(multilevel(2), 3)",
        "repeat(reversible(rk4, 0.9), 2)",
        "repeat(momentum(0.5), 2)",
    )

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

    examples = ("substeps(midpoint, 2)", "substeps(heun2, 3)", "substeps(reversible_heun, 2)", "substeps(bdia, 2)")

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

    examples = ("2*rk4 + midpoint", "2*(euler + midpoint)", "1*rk4", "2*leapfrog", "2*revcol", "2*bdia")

    def __init__(self, *parts: tuple[int, Scheme]):
        self.counts = tuple((_count("mix", n), _scheme("mix", s)) for n, s in parts)
        # Before the period is written out: 4096*(4096*rk4) is short to type.
        if sum(n * s.stages for n, s in self.counts) > MAX_FUNCTIONS:
            raise SchemeError(f"{self}: more than {MAX_FUNCTIONS} residual functions in one period.")
        flat: list[Scheme] = []
        for n, s in self.counts:
            # A mix within a mix becomes part of its period: a Stack makes one step of each.
            flat += s.plan * n
        self._set(tuple(flat))

    @property
    def plan(self) -> tuple[Scheme, ...]:
        return self.parts

    def at(self, n: int) -> Scheme:
        return self.parts[n % len(self.parts)].at(n)

    def __str__(self) -> str:
        only = len(self.counts) == 1  # 1*rk4 is a mix and rk4 is not

        def term(n: int, s: Scheme) -> str:
            if isinstance(s, Mix):
                return f"{n}*({s})"
            return f"{n}*{s}" if n > 1 or only else str(s)

        return " + ".join(term(n, s) for n, s in self.counts)
