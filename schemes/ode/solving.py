"""Chooses how a problem is solved: one step size or one per sample, chosen or fixed; events first or on the way."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import SchemeError
from . import options as reading
from .answers import answer, attached, solution, trivial
from .choosing import chosen
from .events import Place, Watch
from .moving import moved_start, with_times
from .problem import Problem
from .run import Run
from .sampling import solve_samples
from .solution import Solution
from .stepping import stepped


def solve(problem: Problem) -> Solution:
    """The solution of a problem."""
    _refuse_transforms(problem)
    if problem.apart:
        return solve_samples(problem)
    numbers: list[float] = problem.times.detach().tolist()
    if len(numbers) == 1 or problem.y0.numel() == 0:
        # Before any method is called: its loop would look for a first step size.
        return _without_steps(problem, numbers)
    if problem.gradient in ("adjoint", "reverse") and problem.events:
        return _located_first(problem, numbers)
    return answer(problem, *_solved(problem, numbers), numbers)


def _without_steps(problem: Problem, numbers: list[float]) -> Solution:
    """The solution at one time, or of no entries; the options are read all the same."""
    _ = problem.control() if problem.adaptive else reading.fixed(problem.options)
    if not problem.events or len(numbers) > 1:
        return trivial(problem, numbers)
    y = moved_start(problem)
    run = Run([y], numbers[0], y)
    Watch(problem.events, problem.packing.unpack).start(run, y)
    return answer(problem, y[None], run, numbers)


def _refuse_transforms(problem: Problem) -> None:
    """Refuses torch.func where it would fail during the solve."""
    if not torch._C._are_functorch_transforms_active():
        return
    if problem.adaptive and any(kind.name == "Vmap" for kind in _transforms()):
        raise SchemeError(
            "odeint: under torch.func.vmap no step size can be chosen; take fixed steps (step_size or steps in the "
            "options), or a batch in y0 with batch='independent' in place of vmap."
        )
    if problem.events:
        raise SchemeError(
            "odeint: events do not go with torch.func, inside of which their times have no derivatives.\n"
            "  Take torch.autograd.grad or torch.autograd.forward_ad, or solve up to a known time without the event."
        )
    if problem.gradient != "store":
        raise SchemeError(f"odeint: gradient={problem.gradient!r} does not go with torch.func; take gradient='store'.")


def _transforms() -> list[Any]:
    """The kinds of the transforms of torch.func that are active."""
    stack = torch._C._functorch.get_interpreter_stack() or []  # type: ignore[attr-defined]
    return [interpreter.key() for interpreter in stack]


def _solved(problem: Problem, numbers: list[float]) -> tuple[Tensor, Run]:
    """The packed values at all times, stacked, and the run."""
    y = moved_start(problem)
    watch = Watch(problem.events, problem.packing.unpack) if problem.events else None
    times = [numbers[0], math.copysign(math.inf, numbers[1] - numbers[0])] if problem.endless else numbers
    return (chosen if problem.adaptive else stepped)(problem, y, times, watch)


def _located_first(problem: Problem, numbers: list[float]) -> Solution:
    """Events under a gradient that recomputes states: found without one, then a solve up to the terminal one.

    The terminal event has its gradients; those before it are found, but have none.
    """
    if problem.gradient == "reverse" and not problem.adaptive:
        # The last step would be cut at the event, where the first solve has a value within a step: two solutions.
        raise SchemeError(
            "odeint: gradient='reverse' with fixed steps knows no events.\n"
            "  Take gradient='store' or 'checkpoint', or steps that are chosen (no step_size, steps or grid)."
        )
    plain = problem.but(gradient="store")
    with torch.no_grad():
        first = answer(plain, *_solved(plain, numbers), numbers)
    if first.status != "event":
        whole = problem.but(events=[])
        return replace(answer(whole, *_solved(whole, numbers), numbers), events=first.events)
    event, end = first.events[-1], float(first.reached)
    if end == numbers[0]:  # no step, and nothing to recompute
        return answer(plain, *_solved(plain, numbers), numbers)
    sign = 1.0 if end >= numbers[0] else -1.0
    # Times after the event have no values.
    before = numbers[:1] if problem.endless else [x for x in numbers if (end - x) * sign >= 0]
    row = before if before[-1] == end else [*before, end]
    known = problem.but(events=[], endless=False)
    ys, run = _solved(known, row)
    # The time of the event gets its gradient from the event function alone; the times up to it have the user's.
    last = ys[-1] if run.status == "finished" else run.y
    found, y = attached(problem, Place(event.number, event.component, end, last))
    if problem.endless:
        ys, t = torch.stack((problem.y0, y)), torch.stack((problem.times[0], found.t))
    else:
        ys = with_times(known, ys[: len(before)], numbers)
        t = problem.times[: len(ys)]
    return solution(problem, t, ys, replace(run, status="event"), y, [*first.events[:-1], found])
