"""nested(outer, inner): the residual functions of one scheme are the steps of another."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .composition import Composition
from .errors import SchemeError
from .linear import probe
from .parts import Once, as_argument, check_part, share_of, uses_of
from .scheme import Function, Scheme, Slot, State, StepSize, limit_functions
from .tableau import Tableau, nest


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
        outer, inner = check_part("nested", outer), check_part("nested", inner)
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
        # The outer scheme determines what a step does to the streams; the inner one only replaces functions.
        for name in ("streams", "invertible", "shortcuts", "training_differs", "streams_added", "byproducts"):
            setattr(self, name, getattr(outer, name))
        self.amplification, self.exact = outer.amplification, outer.exact
        if outer.evaluations is not None and inner.evaluations is not None:
            self.evaluations = outer.evaluations * inner.evaluations
        if outer.mixing is not None and inner.mixing is not None and outer.gain and inner.gain:
            # A stage strays by the outer's sum of whole inner increments, plus the inner's own stage.
            self.mixing, self.gain = outer.mixing * inner.gain + inner.mixing, outer.gain * inner.gain
        if outer.order and inner.order:
            self.order = self._order()

    def _times(self, outer: tuple[float, ...], inner: tuple[float, ...]) -> tuple[float, ...]:
        """The times of all evaluations, use by use; each use of the outer scheme contains all uses of the inner."""
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
        if isinstance(outer, Composition) and outer.scale == 1.0:  # full steps: each part is nested on its own
            # Nesting inside each part and composing the results gives the same network; each part has its own order.
            orders = [Nested(p, inner).order for p in set(outer.parts)]
            return None if None in orders else min(o for o in orders if o)
        if isinstance(outer, Nested):  # nesting is associative
            return Nested(outer.outer, Nested(outer.inner, inner)).order
        # The slope of an inner step of size h is off by O(h), whatever the order. For Runge-Kutta methods:
        # sum_ij B_i b_j (C_i + c_j) is 1/2 + 1/2 instead of 1/2 when both have order 2 or more.
        return 1

    @property
    def tableau(self) -> Tableau | None:
        outer, inner = self.outer.tableau, self.inner.tableau
        if outer is None or inner is None:
            return None
        if self.outer.span > 1:
            # An inner step of size h is the part 1 / span of the whole.
            # Only the rows are scaled: the weights give the increment, which the slope divides by h again.
            rows = [[x / self.outer.span for x in row] for row in inner.a]
            inner = Tableau.from_rows(rows, inner.b, name=inner.name, order=inner.order, digits=inner.digits)
        # The order is set here: `nest` does not know about full steps, whose order may be higher.
        return replace(nest(outer, inner), order=self.order)

    @property
    def raw(self) -> tuple[bool, ...]:
        return tuple(o and i for o in self.outer.raw for i in self.inner.raw)

    def slots(self, n: int, streams: tuple[int, ...], out_channels: int | None = None) -> tuple[Slot, ...]:
        found = []
        for i, slot in enumerate(self.outer.slots(n, streams, out_channels)):
            # Raised only for schemes whose widths depend on the input; the others were refused at construction.
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
        outer = self.outer.training_scheme(n, x, *as_argument(generator))
        return self if outer is self.outer else Nested(outer, self.inner)

    def _functions(self, fs: Sequence[Function], h: StepSize, gs: Sequence[Function]) -> tuple[Function, ...]:
        """The outer's residual functions: slopes of the inner, with the shortcut where they receive the raw input."""
        s, slope, inner_uses = self.inner.stages, self.inner.slope, uses_of(self.inner)
        bound = len(fs) > self.stages  # with times: every use has its own functions
        raws = self.outer.raw

        def function(u: int, i: int) -> Function:
            of_use = fs[u * inner_uses * self.stages : (u + 1) * inner_uses * self.stages] if bound else fs
            part = share_of(of_use, self.stages, i * s, s, inner_uses)
            shortcut = gs if raws[i] else ()
            return lambda x: slope(part, x, h, shortcut)

        # A reversible outer scheme evaluates everything twice, and each of its inner steps has uses of its own.
        uses = len(fs) // (self.stages * inner_uses) if bound else 1
        return tuple(function(u, i) for u in range(uses) for i in range(self.outer.stages))

    def decompose(self, fs: Sequence[Function], h: StepSize, gs: Sequence[Function] = ()) -> list:
        gs = tuple(Once(g) for g in gs)
        return self.outer.decompose(self._functions(fs, h, gs), h, gs)

    def state_from_output(self, y: Tensor) -> State:
        return self.outer.state_from_output(y)

    def input_from_state(self, state: State) -> Tensor:
        return self.outer.input_from_state(state)

    def at(self, n: int) -> Scheme:
        part = self.outer.whole(n)  # a mix is nested as a whole
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
        # Each inner stage that receives the raw input would evaluate the shortcut again.
        gs = tuple(Once(g) for g in gs)
        return self.outer._step(self._functions(fs, h, gs), state, h, gs)

    def _inverse(self, fs: Sequence[Function], state: State, h: StepSize = 1.0, gs: Sequence[Function] = ()) -> State:
        gs = tuple(Once(g) for g in gs)
        return self.outer._inverse(self._functions(fs, h, gs), state, h, gs)

    def slope(self, fs: Sequence[Function], x: Tensor, h: StepSize = 1.0, gs: Sequence[Function] = ()) -> Tensor:
        gs = tuple(Once(g) for g in gs)
        return self.outer.slope(self._functions(fs, h, gs), x, h, gs)

    def _parts_compared(self) -> tuple[Scheme, ...]:
        return self.outer, self.inner

    def __str__(self) -> str:
        return f"nested({self.outer}, {self.inner})"


def _is_euler(scheme: Scheme) -> bool:
    """Whether a step is x + h F(x), under any name."""
    if scheme.stages != 1 or not scheme.streams == 1:
        return False
    try:
        # By behaviour, not by name: repeat(euler, 1) is Euler's scheme too, and a user's own scheme may be.
        m = probe(scheme)
    except SchemeError:
        return False
    return [x.flatten().tolist() for x in (m.a, m.u, m.b, m.v)] == [[0.0], [1.0], [1.0], [1.0]]


def _check_outer(outer: Scheme) -> None:
    """Refuses an outer scheme whose functions a step cannot replace: they take several streams, or change width."""
    # A width that divides evenly, so that any difference comes from the scheme and not from the input.
    widths = outer.stream_widths(12 * outer.streams)
    for n in (0, 1):
        part = outer.whole(n)
        try:
            slots = part.slots(n, widths)
        except ValueError:  # a scheme that does not describe its slots
            return
        for slot in slots:
            if slot.in_channels != (slot.out_channels,):
                raise SchemeError(
                    f"nested: function {slot.index} of the outer scheme {outer} is given widths {slot.in_channels} and "
                    f"returns {slot.out_channels}; a step keeps one width.\n"
                    "  Nest inside of a scheme such as rk4, revnet or leapfrog."
                )
        widths = part.widths(n, widths)
