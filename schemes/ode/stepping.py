"""Solves with fixed steps: where the steps go, and which gradients they have."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import SchemeError
from . import fixed as fixed_steps
from . import options as reading
from . import reverse
from .events import Watch
from .field import tracked
from .problem import Problem
from .run import Run

Grid = Sequence[Sequence[float]] | None  # one per interval, or a single one over all; None goes on until an event


def stepped(problem: Problem, y: Tensor, times: list[float], watch: Watch | None) -> tuple[Tensor, Run]:
    """The values at all times, stacked, and the run."""
    given = reading.fixed(problem.options)
    grid, equal = _grid(problem, given, times)
    if problem.gradient == "adjoint":
        raise SchemeError(
            f"odeint: gradient='adjoint' wants an embedded pair that chooses its steps, not {problem.scheme} with "
            "fixed ones; take dopri5, or gradient='checkpoint' for the gradient of this very solve."
        )
    _count(grid, given)
    if problem.gradient == "reverse":
        onto = grid is not None and len(grid) == len(times) - 1  # whether steps end on every time
        return _reversed(problem, y, times, grid if onto else None, given)
    moving = None
    if tracked(problem.times):
        # What lies within a step is interpolated between ends that are numbers.
        if not equal or problem.dense or problem.events:
            raise SchemeError(
                "odeint: t needs a gradient; fixed steps have it where they end on every time "
                "(step_size or steps, no interp, no grid, no event, no dense=True).\n  Detach t, or take a pair that "
                "chooses its steps."
            )
        # Zero, with the derivatives of the times. Added to the numbers of the grid, so that no value changes.
        moving = problem.times.to(torch.float64) - problem.times.detach().to(torch.float64)
    again = problem.gradient == "checkpoint" and torch.is_grad_enabled()
    run = fixed_steps.solve(
        fixed_steps.Stepper(problem.scheme, problem.func, y, again, given.perturb),
        times,
        grid,
        moving=moving,
        size=given.step_size,
        interp=given.interp,
        max_steps=given.max_steps or 100_000,
        dense=problem.dense,
        events=watch,
        callbacks=problem.callbacks(),
    )
    problem.raise_if_failed(run)
    return torch.stack(run.ys), run


def _count(grid: Grid, given: reading.FixedOptions) -> None:
    """Refuses more steps than are allowed before the first one is taken; an endless solve counts on the way."""
    count = sum(len(part) - 1 for part in grid or ())
    if given.max_steps is not None and count > given.max_steps:
        raise SchemeError(
            f"odeint: the grid has {count} steps, more than the {given.max_steps} of max_steps; "
            "take longer steps, or raise max_steps."
        )


def _grid(problem: Problem, given: reading.FixedOptions, times: Sequence[float]) -> tuple[Grid, bool]:
    """Where the steps go, and whether they divide each interval of the times into equal ones."""
    if problem.endless:
        # The other options divide an interval, and there is none without an end.
        if given.step_size is None:
            raise SchemeError(f"odeint: an event under {problem.scheme}, which takes fixed steps, wants a step_size.")
        return None, False
    points = given.grid
    if points is None and given.constructor is not None:
        points = given.constructor(problem.user, problem.packing.unpack(problem.y0), problem.times.detach())
        if points is None:
            raise SchemeError("odeint: grid_constructor returned None, want the times of a grid.")
    if points is not None:
        return [reading.grid_times(points, times[0], times[-1])], False
    if given.interp is not None and given.step_size is not None:
        return [_from_the_start(times, given.step_size)], False
    return fixed_steps.grids(times, given.step_size, given.steps), True


def _from_the_start(times: Sequence[float], size: float) -> Sequence[float]:
    """Steps of one size from the start on, the last one shorter: torchdiffeq's grid, on which its interp is based."""
    start, end = times[0], times[-1]
    return fixed_steps.Grid(start, end, fixed_steps.count(start, end, size), math.copysign(size, end - start))


def _reversed(
    problem: Problem, y: Tensor, times: list[float], grid: Grid, given: reading.FixedOptions
) -> tuple[Tensor, Run]:
    """A solve whose states are reconstructed by the inverse of its rule."""
    if given.perturb:
        raise SchemeError(
            "odeint: gradient='reverse' has no perturb: its steps read the times at their ends.\n"
            "  Leave perturb out, or take gradient='checkpoint'."
        )
    if tracked(problem.times):
        raise SchemeError("odeint: gradient='reverse' with fixed steps has no gradient of t; take 'checkpoint'.")
    if grid is None:
        raise SchemeError("odeint: gradient='reverse' steps onto every time; want step_size or steps, no interp.")
    assert problem.rule is not None
    return reverse.solved(problem.rule, problem.func, y, times, grid, problem.raise_if_failed, known=problem.known)
