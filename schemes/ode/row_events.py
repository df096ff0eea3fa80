"""Events under control per sample: the signs of event functions, row by row, and where within a step they change."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import SchemeError
from .events import Event, Place
from .field import time_dtype

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


class Signs:
    """The signs of event functions, row by row.

    Args:
        events: what to look for.
        unpack: makes the user's state of a packed one.
        t: the times of the rows at the start.
        y: their states.
    """

    samples = (0.25, 0.5, 0.75, 1.0)

    def __init__(self, events: Sequence[Event], unpack: Callable[[Tensor], Any], t: Tensor, y: Tensor):
        self.events, self.unpack, self.t, self.y = events, unpack, t, y
        self.values = self._evaluate(t, y)
        self.owners = [(n, c) for n, v in enumerate(self.values) for c in range(v.shape[1])]
        self.signs = torch.cat(self.values, 1).sign()

    def _evaluate(self, t: Tensor, y: Tensor) -> list[Tensor]:
        state = self.unpack(y)
        time = t.to(time_dtype(y)).reshape(-1, *(1,) * (y.ndim - 1))
        found = []
        for event in self.events:
            value = event.fn(time, state)
            if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != len(y):
                raise SchemeError(
                    "odeint: under batch='independent' an event function returns one value per sample, (batch,) or "
                    f"(batch, values); this one returned {tuple(torch.as_tensor(value).shape)} for {len(y)} samples."
                )
            found.append(value.reshape(len(y), -1).double())
        return found

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows alone."""
        self.signs = self.signs[rows]

    def start(self) -> list[Hit]:
        """The events that a start at zero counts as."""
        zero = (torch.cat(self.values, 1) == 0).nonzero().tolist()
        found = []
        for row, m in zero:
            n, c = self.owners[m]
            if self.events[n].at_start:
                found.append(Hit(Place(n, c, float(self.t[row]), self.y[row]), row, 0.0))
        return found

    def step(self, at: At, t: Tensor, h: Tensor, good: Tensor) -> list[Hit]:
        """The events of this step, in the order of time within each row, up to the first that ends it."""
        hits: list[tuple[int, float, int]] = []
        low = torch.zeros_like(t)
        for x in self.samples:
            theta = torch.full_like(t, x)
            new = torch.cat(self._evaluate(t + theta * h, at(theta)), 1).sign()
            crossed = (self.signs != 0) & (new != self.signs) & good[:, None]
            for row, m in crossed.nonzero().tolist():
                event = self.events[self.owners[m][0]]
                if event.direction not in (0, -int(self.signs[row, m])):
                    continue
                place = x if new[row, m] == 0 else self._locate(at, t, h, float(low[row]), x, row, m)
                hits.append((row, place, m))
            # A sign of 0 at the start of a step is passed over until the function has left zero.
            change = good[:, None] & ((new != 0) | crossed)
            self.signs = torch.where(change, new, self.signs)
            low = theta
        found: list[Hit] = []
        over: set[int] = set()
        for row, theta, m in sorted(hits):
            if row in over:
                continue
            n, c = self.owners[m]
            # The extension is one of the whole batch: all rows are evaluated there, and one is wanted.
            y = at(torch.full_like(t, theta))[row]
            found.append(Hit(Place(n, c, float(t[row] + theta * h[row]), y), row, theta))
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
            if value == sign:
                a = x
            else:
                b = x
        return b
