"""Gradients of times: where a time moves, the value there moves along the field.

A solve with chosen steps works with times as Python numbers, without a graph. Their gradients are added afterwards: by
a term that is zero, and whose derivative with respect to the time is the slope there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .field import clock, moved, tracked
from .problem import Problem


def shift(problem: Problem, i: int) -> Tensor:
    """Zero, with the gradient of time i; under control per sample one per sample, where each has its own times."""
    t, y0 = problem.times[..., i], problem.y0
    return (t - t.detach()).to(y0.device, y0.real.dtype if y0.is_complex() else y0.dtype)


def moves(problem: Problem) -> bool:
    """Whether times need derivatives that the steps do not give them; fixed steps are differences of times."""
    return problem.adaptive and tracked(problem.times)


def moved_start(problem: Problem) -> Tensor:
    """y0, through which a gradient of the first time flows along the field: a later start is a start further back."""
    if not moves(problem):
        return problem.y0
    d, t = shift(problem, 0), clock(float(problem.times[0].detach()), problem.y0)
    return moved(problem.func, t + d.to(t.dtype), problem.y0, -d)


def with_times(problem: Problem, ys: Tensor, numbers: Sequence[float]) -> Tensor:
    """Values at all times, through which gradients of their times flow along the field."""
    if not moves(problem):
        return ys
    # Two evaluations for each time, paid only where a gradient of the times is needed.
    return torch.stack([moved(problem.func, clock(numbers[i], y), y, shift(problem, i)) for i, y in enumerate(ys)])
