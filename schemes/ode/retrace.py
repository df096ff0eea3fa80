"""The second pass of a solve with a step size per sample: along the recorded steps, with a graph.

For every row the j-th step of this pass is its j-th accepted step, so rows advance together here that did not when the
steps were found; a sample that has no more steps rests with size 0.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .independent import Batch, Solve
from .pairs import Pair
from .row_events import At
from .row_steps import attempt, within
from .rows import RowField, wide

Attempt = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, list[Tensor]]]


def _recomputed(pair: Pair, f: RowField) -> Attempt:
    """`attempt` with a graph that keeps only the state and the slope at the start and recomputes the rest."""

    def tried(
        t: Tensor, h: Tensor, step: Tensor, y: Tensor, k: Tensor, end: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        def run(y: Tensor, k: Tensor) -> tuple[Tensor, ...]:
            y1, slopes = attempt(pair, f, t, h, step, y, k, end)
            return (y1, *slopes[1:])

        # The first slope is an input, and is returned as it is: the checkpoint returns only what it computed.
        y1, *slopes = checkpoint(run, y, k, use_reentrant=False)  # type: ignore[misc]
        return y1, [k, *slopes]

    return tried


def retrace(solve: Solve, batch: Batch, y: Tensor, recompute: bool) -> tuple[Tensor, dict[int, Tensor], Tensor]:
    """The values along the recorded steps, with a graph, the states at the events that ended samples, the last states.

    Args:
        solve: the solve.
        batch: its result.
        y: the states at the start.
        recompute: whether each step's graph is dropped and recomputed in the backward pass.
    """
    f, pair = solve.rows.at(None), solve.pair
    plan = _Plan(batch)
    # Times that a sample did not reach stay NaN, as in the first pass.
    values = [y, *[torch.full_like(y, torch.nan) for _ in range(len(batch.places) - 1)]]
    states: dict[int, Tensor] = {}
    starts, sizes = batch.steps
    tried = _recomputed(pair, f) if recompute else partial(attempt, pair, f)
    k = solve.start(f, starts[0], y) if len(starts) else y
    for j, (t, h) in enumerate(zip(starts, sizes, strict=True)):
        step = wide(h, y)
        until = t + h if batch.until is None else batch.until[j]
        before = None if batch.until is None else solve.beside(until, y, True)
        y1, slopes = tried(t, h, step, y, k, before)
        end = slopes[-1] if pair.reuses else None
        at: At | None = None
        if plan.looks_within(j):
            end = f(until if before is None else before, y1) if end is None else end
            at = within(pair, f, t, h, step, y, slopes, end)
        plan.give(j, y1, at, values)
        stopped = j in plan.ends
        y = plan.stop(j, y1, at, states) if stopped and at is not None else y1
        k = solve.start(f, until, y) if end is None or solve.jumps or stopped else end
    return torch.stack(values), states, y


class _Plan:
    """Which step gives which values, and which samples end within it.

    Args:
        batch: the result of the pass without a graph.
    """

    def __init__(self, batch: Batch):
        self.batch = batch
        self.ends: dict[int, list[int]] = {}
        for sample, (step, _) in batch.ends.items():
            self.ends.setdefault(step, []).append(sample)
        self.wanted: dict[int, list[int]] = {}
        for m, row in enumerate(batch.places.tolist()):
            for j in {p for p in row if p >= 0} if m else ():
                self.wanted.setdefault(j, []).append(m)

    def looks_within(self, j: int) -> bool:
        """Whether any value is needed within step j, and not at its end."""
        places, thetas = self.batch.places, self.batch.thetas
        return j in self.ends or any(bool(((places[m] == j) & (thetas[m] != 1)).any()) for m in self.wanted.get(j, ()))

    def give(self, j: int, y: Tensor, at: At | None, values: list[Tensor]) -> None:
        """Stores the values that step j gives, for the samples whose value lies in it."""
        for m in self.wanted.get(j, ()):
            mask, theta = self.batch.places[m] == j, self.batch.thetas[m]
            value = y
            if at is not None and bool((theta[mask] != 1).any()):
                value = at(torch.where(mask, theta, 1.0))
            values[m] = torch.where(wide(mask, y).bool(), value, values[m])

    def stop(self, j: int, y: Tensor, at: At, states: dict[int, Tensor]) -> Tensor:
        """The states after step j; for samples that an event ends there, those at the event, which are recorded too."""
        theta = torch.ones(len(y), dtype=torch.float64, device=y.device)
        chosen = torch.zeros(len(y), dtype=torch.bool, device=y.device)
        for sample in self.ends[j]:
            theta[sample], chosen[sample] = self.batch.ends[sample][1], True
        inside = at(theta)
        for sample in self.ends[j]:
            states[sample] = inside[sample]
        # The sample rests at its event from here on, with size 0.
        return torch.where(wide(chosen, y).bool(), inside, y)
