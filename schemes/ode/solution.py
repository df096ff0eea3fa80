"""The result of a solve."""

import bisect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import SchemeError
from .field import number
from .options import row
from .trees import Packing


@dataclass
class Solution:
    """The solution of an initial value problem.

    Called with a time, it returns the value there, if it was solved with ``dense=True``.

    Attributes:
        t: the requested times, as far as the solve got.
        y: the values there, stacked along the first dimension, in the structure of y0.
        status: "finished", "event", "max_steps", "underflow" (the step size fell below rounding), "not_finite" or
            "unstable" (the streams of a reversible scheme drifted apart); one per sample under ``batch="independent"``.
        reached: the time that the solve reached, one per sample likewise.
        last: the state there.
        accepted: number of steps that were kept, per sample likewise.
        rejected: number of steps that were rejected and retried, likewise.
        evaluations: calls of func in the forward pass.
        rows: total number of samples over all calls; None unless steps are chosen per sample.
        events: what was found, in order of time.
        steps: start and size of each step that was kept; per sample as two tensors.
    """

    t: Tensor
    y: Any
    status: Any
    reached: Any
    last: Any
    accepted: Any
    rejected: Any
    evaluations: int
    rows: int | None = None
    events: list[Any] = field(default_factory=list)
    steps: Any = None
    _segments: list[Any] = field(default_factory=list, repr=False)
    _packing: Packing | None = field(default=None, repr=False)

    def __call__(self, t: float | Tensor) -> Any:
        """The value at a time, or at each of several; differentiable, in t too.

        Raises:
            SchemeError: the solve kept no continuous solution, or the time lies outside the solve.
        """
        return self._evaluated(t, "at")

    def derivative(self, t: float | Tensor) -> Any:
        """The slope of the continuous solution at a time, or at each of several.

        Args:
            t: a time between the ends of the solve, or several.
        """
        return self._evaluated(t, "derivative")

    def _evaluated(self, t: float | Tensor, what: str) -> Any:
        if not self._segments or self._packing is None:
            raise SchemeError("Solution: no continuous solution was kept; solve with dense=True.")
        if isinstance(t, Tensor) and not (t.is_floating_point() or t.is_complex() or t.is_meta):
            t = t.double()  # whole numbers are times too
        if not isinstance(t, (int, float)):
            t = row("t", t, "Solution")
        several = isinstance(t, Tensor) and t.ndim > 0
        if several and t.ndim > 1:  # type: ignore[union-attr]
            raise SchemeError(f"Solution: the times are of shape {tuple(t.shape)}, want one or a row of them.")  # type: ignore
        times: list[Any] = list(t.unbind()) if several else [t]  # type: ignore[union-attr]
        values = [getattr(self._segment(number(x)), what)(x) for x in times]
        if not values:
            return self._packing.unpack(self._segments[0].y.new_empty((0, *self._segments[0].y.shape)), (0,))
        stacked = torch.stack(values) if several else values[0]
        return self._packing.unpack(stacked, (len(times),) if several else ())

    def _segment(self, t: float) -> Any:
        pieces = self._segments
        sign = 1.0 if pieces[-1].t1 > pieces[0].t0 else -1.0
        # The last piece extends beyond an event that ended the solve, and is not valid there.
        start, end = pieces[0].t0, float(self.reached)
        if not start * sign <= t * sign <= end * sign:
            raise SchemeError(f"Solution: t={t:.10g} lies outside of the solve, from {start:.10g} to {end:.10g}.")
        return pieces[min(bisect.bisect_left(pieces, t * sign, key=lambda p: p.t1 * sign), len(pieces) - 1)]
