"""Gradients of times: where a time moves, the value there moves along the field.

A solve with chosen steps works with times as Python numbers, without a graph. Their gradients come in afterwards: a
term that is zero, and whose derivative by the time is the slope there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .field import clock
from .problem import Problem


def shift(problem: Problem, i: int) -> Tensor:
    """Zero, with the gradient of time i; under control per sample one for each, to be multiplied with a state."""
    t, y0 = problem.times[..., i], problem.y0
    zero = (t - t.detach()).to(y0.device, y0.real.dtype if y0.is_complex() else y0.dtype)
    return zero.reshape(-1, *(1,) * (y0.ndim - 1)) if zero.ndim else zero


def moves(problem: Problem) -> bool:
    """Whether times are to have a gradient that the steps do not give them; fixed steps are made of them."""
    return problem.adaptive and problem.times.requires_grad and torch.is_grad_enabled()


def moved_start(problem: Problem) -> Tensor:
    """y0, from which a gradient of the first time flows along the field: a later start is a start further back."""
    if not moves(problem):
        return problem.y0
    return problem.y0 - shift(problem, 0) * _slope(problem, float(problem.times[0].detach()), problem.y0)


def with_times(problem: Problem, ys: Tensor, numbers: Sequence[float]) -> Tensor:
    """Values at all times, to which a gradient of their times flows along the field."""
    if not moves(problem):
        return ys
    # An evaluation for each time, paid only where a gradient of the times is wanted.
    rows = [y + shift(problem, i) * _slope(problem, numbers[i], y) for i, y in enumerate(ys)]
    return torch.stack(rows)


def _slope(problem: Problem, t: float, y: Tensor) -> Tensor:
    return problem.func(clock(t, y), y)
