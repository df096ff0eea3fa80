"""The solution from the result of a loop: packed values as the user's trees, events with their gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dense import Point
from .events import Found, Place, attach
from .field import clock
from .moving import with_times
from .problem import Problem
from .run import Run
from .solution import Solution


def attached(problem: Problem, place: Place) -> tuple[Found, Tensor]:
    """An event with its gradients, and its packed state."""
    fn, unpack = problem.events[place.number].fn, problem.packing.unpack
    t, y, grazing = attach(fn, place.component, problem.func, unpack, place.t, place.y, problem.times.dtype)
    return Found(place.number, place.component, t, unpack(y), grazing), y


def answer(problem: Problem, ys: Tensor, run: Run, numbers: Sequence[float]) -> Solution:
    """The solution of a run with one step size."""
    t, last = problem.times[: len(ys)], run.y
    found: list[Found] = []
    # Without an end the start is the only value, and is y0 itself, which does not move with its time.
    ys = problem.y0[None] if problem.endless else with_times(problem, ys, numbers)
    for n, place in enumerate(run.events):
        event, y = attached(problem, place)
        found.append(event)
        # A terminal event ends the run, so it is the last one that was found.
        if n == len(run.events) - 1 and run.status == "event":
            last = y
            if problem.endless:
                ys = torch.stack((problem.y0, y))
                t = torch.stack((problem.times[0].detach(), event.t.to(problem.times)))
    if run.status == "finished":
        last = ys[-1]  # not the run's own, which lacks the times' gradients
    return solution(problem, t, ys, run, last, found)


def solution(problem: Problem, t: Tensor, ys: Tensor, run: Run, last: Tensor, events: list[Found]) -> Solution:
    """A solution of packed values."""
    unpack = problem.packing.unpack
    pieces: list[Any] = [*run.segments]
    if problem.dense and not pieces:
        pieces = [Point(float(problem.times[0].detach()), float(run.t), run.ys[0], problem.func)]
    return Solution(
        t,
        unpack(ys, (len(ys),)),
        run.status,
        run.t,
        unpack(last),
        run.accepted,
        run.rejected,
        run.evaluations,
        events=events,
        steps=run.steps,
        _segments=pieces,
        _packing=problem.packing,
    )


def trivial(problem: Problem, numbers: Sequence[float]) -> Solution:
    """One time, or no entries: an Euler step, so that the graph has all that a gradient depends on."""
    y, ys = problem.y0, [problem.y0]
    if len(numbers) > 1:
        k = problem.func(clock(numbers[0], y), y)
        ys += [y + (b - numbers[0]) * k for b in numbers[1:]]
    run = Run(ys, numbers[-1], ys[-1], evaluations=int(len(numbers) > 1))
    return solution(problem, problem.times, torch.stack(ys), run, ys[-1], [])
