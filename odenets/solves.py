"""Results of the adaptive solves of a pass: how each ended, its steps, and the values at requested times."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from schemes.adaptive import Adaptive
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

    def step(self, scheme: Adaptive, fs: Sequence[Function], state: State, h: Any, gs: Sequence[Function]) -> State:
        """Takes one step, which is one solve."""
        length = float(h.detach()) if isinstance(h, Tensor) else float(h)
        start, end = self._start, self._start + length
        # Selected by count: the times are in order, and those before this step already have their values.
        due = [x for x in self.at[len(self.values) :] if (end - x) * math.copysign(1.0, length) >= 0]
        inner = [x - start for x in due if x != start and x != end]
        solved = scheme.solve(fs, state, h, [*inner, length] if inner else None, gs, self._note)
        known = {start: state[0], end: solved.values[-1]}
        inside = iter(solved.values)
        self.values += [known[x] if x in known else next(inside) for x in due]
        self._start = end
        return (solved.values[-1],)

    def _note(self, run: Run) -> None:
        self.found.append(Solve(run.status, run.accepted, run.rejected, run.evaluations))
