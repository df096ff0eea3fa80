"""Events under control per sample: the signs of event functions, row by row, and where within a step they change."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import SchemeError
from .events import Event, Place, newton, refuse_nan
from .field import moved, recorded, time_dtype, tracked
from .rows import RowField

At = Callable[[Tensor], Tensor]  # the state within a step, at one theta per row


class Hit(NamedTuple):
    """An event of one row.

    Attributes:
        place: the event, its time and the state there.
        row: the row.
        theta: its place within the step, 0 to 1.
    """

    place: Place
    row: int
    theta: float


class Samples:
    """The states of a whole batch, of which only some rows are stepped: event functions receive all of it.

    They may thus read data of the samples through a closure, whichever rows are left. The other rows stay as at the
    start.

    Args:
        unpack: turns a packed state into the user's.
        t: the times of all samples.
        y: their states.
    """

    def __init__(self, unpack: Callable[[Tensor], Any], t: Tensor, y: Tensor):
        self.unpack, self.t, self.y = unpack, t, y.detach()

    def put(self, rows: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The times and states of all samples, with those of some rows replaced."""
        return self.t.index_copy(0, rows, t.to(self.t.dtype)), self.y.index_copy(0, rows, y)

    def value(self, number: int, event: Event, t: Tensor, y: Tensor) -> Tensor:
        """The values of an event function, (batch, values)."""
        time = t.to(time_dtype(y)).reshape(-1, *(1,) * (y.ndim - 1))
        before = None if y.is_inference() else y._version
        value = event.value(number, time, self.unpack(y))
        if before is not None and y._version != before:
            raise SchemeError(f"odeint: event {number} changes its argument y in place; write to a copy, y.clone().")
        if not value.ndim or value.shape[0] != len(y):
            raise SchemeError(
                "odeint: under batch='independent' an event function returns one value per sample, (batch,) or "
                f"(batch, values); this one returned {tuple(value.shape)} for {len(y)} samples."
            )
        return value.reshape(len(y), -1)


class Signs:
    """The signs of event functions, row by row.

    Args:
        events: the events to detect.
        unpack: turns a packed state into the user's.
        t: the times of the rows at the start.
        y: their states.
    """

    samples = (0.25, 0.5, 0.75, 1.0)

    def __init__(self, events: Sequence[Event], unpack: Callable[[Tensor], Any], t: Tensor, y: Tensor):
        self.events, self.t, self.y = events, t, y
        self.batch, self.rows = Samples(unpack, t, y), None
        self.sizes: list[int] | None = None
        self.values = self._evaluate(t, y)
        self.owners = [(n, c) for n, v in enumerate(self.values) for c in range(v.shape[1])]
        self.signs = torch.cat(self.values, 1).sign()

    def _evaluate(self, t: Tensor, y: Tensor) -> list[Tensor]:
        if self.rows is not None:
            t, y = self.batch.put(self.rows, t, y)
        values = [self.batch.value(n, event, t, y).double() for n, event in enumerate(self.events)]
        sizes = [v.shape[1] for v in values]
        if self.sizes is not None and sizes != self.sizes:
            raise SchemeError(f"odeint: the events had {self.sizes} values per sample at the start, {sizes} later.")
        self.sizes = sizes
        return values if self.rows is None else [v[self.rows] for v in values]

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these."""
        self.signs = self.signs[rows]
        self.rows = rows if self.rows is None else self.rows[rows]

    def _refuse_nan(self, values: Tensor, t: Tensor, rows: Tensor) -> None:
        for row, m in (values.isnan() & rows[:, None]).nonzero().tolist():
            refuse_nan(self.owners[m][0], math.nan, float(t[row]), self._sample(row))

    def _sample(self, row: int) -> int:
        return row if self.rows is None else int(self.rows[row])

    def start(self, active: Tensor) -> list[Hit]:
        """The events at the start, where a zero there counts; ``active`` are the rows that start at all."""
        values = torch.cat(self.values, 1)
        self._refuse_nan(values, self.t, active)
        zero = (values == 0).nonzero().tolist()
        found = []
        for row, m in zero:
            n, c = self.owners[m]
            if self.events[n].at_start:
                found.append(Hit(Place(n, c, float(self.t[row]), self.y[row]), row, 0.0))
        return found

    def step(self, at: At, t: Tensor, h: Tensor, until: Tensor, good: Tensor) -> list[Hit]:
        """The events of this step, in the order of time within each row, up to the first that ends it.

        Args:
            at: the state within the step.
            t: the times at its start.
            h: its sizes.
            until: the times at its end, which are not quite t + h.
            good: the rows whose step is kept.
        """
        hits: list[tuple[int, float, int]] = []
        low = torch.zeros_like(t)
        for x in self.samples:
            theta = torch.full_like(t, x)
            time = until if x == 1 else t + theta * h
            values = torch.cat(self._evaluate(time, at(theta)), 1)
            self._refuse_nan(values, time, good)
            new = values.sign()
            crossed = (self.signs != 0) & (new != self.signs) & good[:, None]
            for row, m in crossed.nonzero().tolist():
                event = self.events[self.owners[m][0]]
                if event.direction not in (0, -int(self.signs[row, m])):
                    continue
                place = x if new[row, m] == 0 else self._locate(at, t, h, float(low[row]), x, row, m)
                hits.append((row, place, m))
            # A sign of 0 at the start of a step is ignored until the function has left zero.
            change = good[:, None] & ((new != 0) | crossed)
            self.signs = torch.where(change, new, self.signs)
            low = theta
        found: list[Hit] = []
        over: set[int] = set()
        for row, theta, m in sorted(hits):
            if row in over:
                continue
            n, c = self.owners[m]
            # The extension is one of the whole batch: all rows are evaluated there, but only one is needed.
            y = at(torch.full_like(t, theta))[row]
            time = float(until[row] if theta == 1 else t[row] + theta * h[row])
            found.append(Hit(Place(n, c, time, y), row, theta))
            if self.events[n].terminal:
                over.add(row)
        return found

    def _locate(self, at: At, t: Tensor, h: Tensor, a: float, b: float, row: int, m: int) -> float:
        """The zero between two places of a step, by bisection."""
        sign = float(self.signs[row, m])
        # As many halvings as a double has digits: theta is then exact to rounding.
        for _ in range(52):
            x = (a + b) / 2
            theta = torch.full_like(t, x)
            value = float(torch.cat(self._evaluate(t + theta * h, at(theta)), 1)[row, m].sign())
            refuse_nan(self.owners[m][0], value, float(t[row] + x * h[row]), self._sample(row))
            if value == sign:
                a = x
            else:
                b = x
        return b


class Attached(NamedTuple):
    """Events of several samples with their gradients; each field has one entry per event.

    Attributes:
        t: the times, in double precision.
        y: the packed states.
        grazing: whether the function has slope zero there.
    """

    t: Tensor
    y: Tensor
    grazing: Tensor


# long: one step of Newton's method, whose parts share everything
def attach_rows(
    number: int,
    event: Event,
    batch: Samples,
    field: RowField,
    samples: list[int],
    components: list[int],
    t: Tensor,
    y: Tensor,
) -> Attached:
    """The times and states of one event in several samples with their gradients: `events.attach`, all at once.

    Args:
        number: the event's place in the list of events.
        event: the event.
        batch: the states of all samples.
        field: the field of all samples.
        samples: the samples, each once.
        components: the numbers of their values that are zero.
        t: the times of the events, in double precision, without a graph.
        y: the states there.

    Raises:
        SchemeError: a gradient is requested of an event at which the function has slope zero.
    """
    rows = torch.tensor(samples, device=y.device)
    which = torch.tensor(components, device=y.device)

    def g(t: Tensor, y: Tensor) -> Tensor:
        return batch.value(number, event, *batch.put(rows, t, y))[rows, which]

    def f(t: Tensor, y: Tensor) -> Tensor:
        return field(*batch.put(rows, t, y))[rows]

    with torch.enable_grad():
        time, at = t.detach().requires_grad_(), y.detach().requires_grad_()
        value = g(time, at)
        # Of their sum, since a sample's value depends on nothing but the sample.
        parts = torch.autograd.grad(value.sum(), [time, at], allow_unused=True) if value.requires_grad else (None, None)
    with torch.no_grad():
        slope = torch.zeros_like(t) if parts[0] is None else parts[0].double()
        size = slope.abs()
        if parts[1] is not None:
            k = f(t, y.detach())
            slope = slope + (parts[1].conj() * k).real.reshape(len(y), -1).sum(1)
            size = size + (parts[1].abs() * k.abs()).reshape(len(y), -1).sum(1)
        grazing = (slope.abs() <= 1e-6 * size) | (size == 0)
    if not (event.terminal and recorded()):
        return Attached(t, y, grazing)
    value = g(t, y)
    if not tracked(value):
        return Attached(t, y, grazing)
    if bool(grazing.any()):
        n = int(grazing.nonzero()[0])
        raise SchemeError(
            f"odeint: at the event at t={float(t[n]):.6g} in sample {samples[n]} the event function has slope zero (it "
            "grazes), so its time has no gradient; solve under torch.no_grad(), or move the event."
        )
    shift = newton(value, slope, y)
    there = moved(f, t, y, shift)
    shift = shift + newton(g(t + shift.to(t.dtype), there), slope, y)
    return Attached(t + shift.to(t.dtype), moved(f, t, y, shift), grazing)
