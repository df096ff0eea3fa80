"""Results of the adaptive solves of a pass: how each ended, its steps, and the values at requested times."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from schemes.adaptive import Adaptive
from schemes.ode.field import number, tracked
from schemes.ode.run import Run
from schemes.scheme import Function, State


class Solve(NamedTuple):
    """How one adaptive solve went.

    Attributes:
        status: "finished", or what stopped it: "max_steps", "underflow", "not_finite".
        accepted: number of steps that were kept.
        rejected: number of steps that were retried.
        evaluations: calls of the residual function.
    """

    status: str
    accepted: int
    rejected: int
    evaluations: int


class Solves:
    """The solves of one pass, in order, and the values at given times since its start.

    Args:
        at: the times, in the direction of the steps; none by default.
    """

    def __init__(self, at: Sequence[float] = ()):
        self.found: list[Solve] = []
        self.at = [*at]
        self.values: list[Tensor] = []
        self._start = 0.0
        # Zero, with the derivatives of the start by the sizes of the steps before it; None where they have none.
        self._shift: Tensor | None = None

    def step(self, scheme: Adaptive, fs: Sequence[Function], state: State, h: Any, gs: Sequence[Function]) -> State:
        """Takes one step, which is one solve."""
        length = number(h)
        start, end = self._start, self._start + length
        # Selected by count: the times are in order, and those before this step already have their values.
        due = [x for x in self.at[len(self.values) :] if min(start, end) <= x <= max(start, end)]
        # The times asked for stay where they are; where the start moves, so does the time since then.
        inner = [x - start if self._shift is None else x - start - self._shift for x in due if x not in (start, end)]
        solved = scheme.solve(fs, state, h, [*inner, length] if inner else None, gs, self._note)
        known = {start: state[0], end: solved.values[-1]}
        inside = iter(solved.values)
        self.values += [known[x] if x in known else next(inside) for x in due]
        if self.at and tracked(h):
            # In double, which keeps the digits of the times that it is subtracted from.
            shift = (h - h.detach()).to("cpu", torch.float64)
            self._shift = shift if self._shift is None else self._shift + shift
        self._start = end
        return (solved.values[-1],)

    def _note(self, run: Run) -> None:
        self.found.append(Solve(run.status, run.accepted, run.rejected, run.evaluations))
