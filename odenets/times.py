"""Times since the start of a pass at which values are requested, and the steps that have them."""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from schemes.errors import SchemeError
from schemes.ode.field import number
from schemes.ode.options import row
from schemes.scheme import Scheme
from schemes.step_size import FromError, StepSize

from .step import Step


def lengths_of(steps: Sequence[Step], rule: StepSize) -> list[float]:
    """Returns the length of each step in time.

    Raises:
        SchemeError: the lengths are unknown before the steps are taken.
    """
    if isinstance(rule, FromError):
        raise SchemeError(
            f"Stack: step='{rule}' sets the times of its steps on the way, so trajectory(at=...) knows none; "
            "leave at= out, or take an adaptive scheme."
        )
    return [step.scheme.span * number(step.h) for step in steps]


def slack_of(steps: Sequence[Step], at: Any = None) -> float:
    """Returns the relative distance, of rounding, within which a time is taken for the end of a step."""
    # Of sizes that are learned, and of times in less than double precision.
    rounded = [x.dtype for x in (*(step.h for step in steps), at) if isinstance(x, Tensor) and x.is_floating_point()]
    return max(1e-9, 4 * max((torch.finfo(dtype).eps for dtype in rounded), default=0.0))


def times_within(at: Sequence[float], sizes: Sequence[float], slack: float) -> list[float]:
    """Returns times since the start, checked against steps of these sizes.

    Args:
        at: the times.
        sizes: of the steps.
        slack: of ``slack_of``.

    Raises:
        SchemeError: they are not in order, or lie beyond the steps; or the steps do not all go in one direction.
    """
    given = row("at", at, "trajectory").reshape(-1)
    if given.requires_grad:
        raise SchemeError("trajectory: at requires a gradient, which times have none of here; detach it.")
    times: list[float] = given.tolist()
    if min(sizes, default=0.0) < 0 < max(sizes, default=0.0):
        raise SchemeError(
            "Stack: trajectory(at=...) wants steps in one direction, and these go forwards and backwards, through some "
            "times twice;\n  leave at= out, which gives the values after each step."
        )
    end = math.fsum(sizes)
    sign = -1.0 if end < 0 else 1.0
    if not all((b - a) * sign > 0 for a, b in pairwise(times)):
        raise SchemeError("Stack: the times of trajectory(at=...) must be in order, each once, as the steps go.")
    for x in times:
        # Written so that NaN is refused too.
        if not -slack * abs(end) <= x * sign <= (1 + slack) * abs(end):
            raise SchemeError(
                f"Stack: there is no value at {x:g}; the steps go from 0 to {end:g}, counted from the start."
            )
    return times


def at_ends(times: Sequence[float], sizes: Sequence[float], slack: float) -> list[float]:
    """Returns the times; one that differs from the end of a step by rounding alone is replaced by that end."""
    ends = [*accumulate(sizes, initial=0.0)]
    return [next((e for e in ends if abs(e - x) <= slack * abs(ends[-1])), x) for x in times]


def ends_at(times: Sequence[float], sizes: Sequence[float], slack: float, scheme: Scheme) -> list[int]:
    """Returns the number of steps that end at each time; 0 is the start.

    Raises:
        SchemeError: a time lies within a step.
    """
    ends = [*accumulate(sizes, initial=0.0)]
    found = []
    for x in times:
        n = min(range(len(ends)), key=lambda i: abs(ends[i] - x))
        if abs(ends[n] - x) > slack * abs(ends[-1]):
            # The two nearest ends, in order.
            near = sorted(sorted(ends, key=lambda e: abs(e - x))[:2])
            raise SchemeError(
                f"Stack: {scheme} has values at the ends of its steps, and {x:g} is none; take {near[0]:g} or "
                f"{near[1]:g}, or an adaptive scheme, which has values at all times."
            )
        found.append(n)
    return found
