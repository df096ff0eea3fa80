"""Schemes in sequence as one scheme: the base of repeat, substeps and mixes."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .errors import SchemeError
from .parts import Once, as_argument, share_of, uses_of
from .scheme import Function, Scheme, Slot, State, StepSize, limit_functions
from .tableau import Tableau, compose


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
            # ``Steps`` come from a composition that was checked when it was made.
            if p != first and type(self) is not Steps and not (p.one_stream and first.one_stream):
                where = " in training" if p.training_differs or first.training_differs else ""
                raise SchemeError(
                    f"{self}: {p} and {first} keep different streams{where}; mix one-stream schemes only.\n"
                    "  Or make two stacks, one after the other."
                )
        self.parts = parts
        self.stages = stages
        # After the first part the streams have their new shape, so the other parts need no shortcuts.
        self.streams, self.shortcuts = first.streams, first.shortcuts  # shortcuts are the first part's
        self.invertible, self.exact = all(p.invertible for p in parts), all(p.exact for p in parts)
        self.training_differs = any(p.training_differs for p in parts)
        self.streams_added, self.byproducts = sum(p.streams_added for p in parts), last.byproducts
        # Undoing the last part grows an error, which undoing the part before it grows again.
        self.amplification = math.prod(p.amplification for p in parts)
        mixings, gains = [p.mixing for p in parts], [p.gain for p in parts]
        if None not in mixings and None not in gains:
            # Each part starts anew from its own input, so the figure of the composition is the largest of a part.
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
        for u in range(max(map(uses_of, parts))):
            for p, start in zip(parts, starts, strict=False):
                own = min(u, uses_of(p) - 1) * p.stages  # a part of fewer uses repeats its last; nothing reads it
                nodes += [start + self.scale * c for c in (p.nodes or ())[own : own + p.stages]]
        return tuple(nodes), round(starts[-1])

    def _shares(self, fs: Sequence[Function]) -> list[tuple[Function, ...]]:
        """The residual functions of each part."""
        found, start = [], 0
        for p in self.parts:
            found.append(share_of(fs, self.stages, start, p.stages, uses_of(p)))
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
        count, drawing = len(self.parts), as_argument(generator)
        parts = tuple(p.training_scheme(n * count + i, x, *drawing) for i, p in enumerate(self.parts))
        # Drawn part by part: each step of a repeated bdia has its own sign.
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
                # Only the first part receives the step's input before the shortcut.
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
        i %= self.stages  # a function that is evaluated several times appears once per evaluation
        for p in self.parts:
            # Streams are followed through the parts, since a part may append some, or rotate them.
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
        gs = tuple(Once(g) for g in gs)
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
        parts: the schemes of the parts, in order.
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
