"""Solves with a step size per sample: the loop, its second pass for gradients, and what is given back."""

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import SchemeError
from . import options as reading
from .answers import trivial
from .events import Found, Place, attach
from .independent import NAMES, Batch, Solve
from .moving import shift
from .pairs import Pair
from .problem import Problem
from .retrace import retrace
from .rows import Rows
from .run import Run
from .solution import Solution


def solve_samples(problem: Problem) -> Solution:
    """The solution, every sample with a step size of its own."""
    n, times = len(problem.y0), _times(problem)
    if times.shape[1] == 1 or problem.y0.numel() == 0:
        return trivial(problem, times[0].tolist() if n else [0.0] * times.shape[1])
    if problem.endless:
        sign = torch.sign(times[:, 1:] - times[:, :1])
        # Each sample in its own direction, until its own event.
        times = torch.cat((times[:, :1], times[:, :1] + sign * torch.inf), 1)
    solve, y = _solve(problem, times), problem.y0
    if torch.is_grad_enabled() and problem.times.requires_grad:
        y = y - shift(problem, 0) * solve.rows.at(None)(times[:, 0], y)
    batch = solve.run(y.detach())
    _raise_if_failed(problem, batch)
    ys, states = _with_graph(problem, solve, batch, y)
    found = _events(problem, solve.rows, batch, states, y)
    if problem.endless:
        ys = torch.stack((ys[0], _last(problem, batch, found)))
    unpack = problem.packing.unpack
    return Solution(
        problem.times,
        unpack(ys, (len(ys),)),
        [NAMES[int(s)] for s in batch.status],
        batch.t,
        unpack(batch.y),
        batch.accepted,
        batch.rejected,
        batch.evaluations,
        batch.rows,
        events=found,
        steps=batch.steps,
    )


def _solve(problem: Problem, times: Tensor) -> Solve:
    pair = Pair(problem.scheme)
    return Solve(
        Rows(problem.func, problem.options.get("context"), len(problem.y0)),
        pair,
        problem.control(),
        times,
        land=reading.lands(problem.options, pair),
        events=problem.events,
        unpack=problem.packing.unpack,
        early=problem.check,
    )


def _times(problem: Problem) -> Tensor:
    """The times of each sample, in double precision: (batch, times)."""
    n = len(problem.y0)
    times = problem.times.detach().to(problem.y0.device, torch.float64)
    times = times.expand(n, -1) if times.ndim == 1 else times
    if times.shape[0] != n:
        raise SchemeError(f"odeint: t has {times.shape[0]} rows of times for {n} samples.")
    return times


def _raise_if_failed(problem: Problem, batch: Batch) -> None:
    failed = (batch.status > 2).nonzero()[:, 0].tolist()
    if failed:
        n = failed[0]
        run = Run([], float(batch.t[n]), batch.y[n], NAMES[int(batch.status[n])], n)
        run.accepted, run.rejected = int(batch.accepted[n]), int(batch.rejected[n])
        problem.raise_if_failed(run, f" ({len(failed)} samples failed)" if len(failed) > 1 else "")


def _with_graph(problem: Problem, solve: Solve, batch: Batch, y: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """The values, and the states at events that ended samples; from a second pass where there is a gradient."""
    ys: Tensor = batch.ys
    states: dict[int, Tensor] = {}
    if not torch.is_grad_enabled():
        return ys, states
    f, times = solve.rows.at(None), solve.times
    # One evaluation tells whether the field reads anything that needs a gradient; the second pass is not cheap.
    if y.requires_grad or f(times[:, 0], y).requires_grad:
        ys, states = retrace(solve, batch, y, problem.gradient == "checkpoint")
    if problem.times.requires_grad and not problem.endless:
        ys = torch.stack([x + shift(problem, i) * f(times[:, i], x) for i, x in enumerate(ys)])
    return ys, states


def _events(problem: Problem, rows: Rows, batch: Batch, states: dict[int, Tensor], y: Tensor) -> list[Found]:
    """The events of all samples in order of time, those that ended one with their gradient."""
    found = []
    for place, sample in zip(batch.events, batch.samples, strict=True):
        state = place.y
        if problem.events[place.number].terminal:
            # Where nothing was retraced, a sample may have ended where it began: y itself has the gradient.
            began = not states and place.t == float(batch.t[sample])
            state = states.get(sample, y[sample] if began else place.y)
        found.append(_attached(problem, rows, place, sample, state))
    sign = 1.0 if bool((problem.times[..., -1] >= problem.times[..., 0]).all()) else -1.0
    return sorted(found, key=lambda e: (e.sample or 0, sign * float(e.t.detach())))


def _attached(problem: Problem, rows: Rows, place: Place, sample: int, state: Tensor) -> Found:
    """An event of one sample with its gradients; functions of a batch are called on a batch of one."""
    event, packing = problem.events[place.number], problem.packing
    call = rows.at(torch.tensor([sample], device=state.device))

    def fn(t: Tensor, y: Tensor) -> Tensor:
        return event.fn(t.reshape(1, *(1,) * (problem.y0.ndim - 1)), y)[0]

    # An event that did not end its sample is found, but its time carries no gradient.
    with torch.set_grad_enabled(torch.is_grad_enabled() and event.terminal):
        t, y, grazing = attach(
            fn,
            place.component,
            lambda t, y: call(t.reshape(1), y[None])[0],
            lambda y: packing.unpack(y[None]),
            place.t,
            state,
            problem.times.dtype,
        )
    one = pytree.tree_map(lambda x: x[0], packing.unpack(y[None]))
    return Found(place.number, place.component, t, one, grazing, sample)


def _last(problem: Problem, batch: Batch, found: list[Found]) -> Tensor:
    """The states at the events that ended the samples; those reached, where one has met none."""
    ends = {e.sample: e.y for e in found if problem.events[e.number].terminal}
    if len(ends) < len(batch.y):
        return batch.y
    if problem.packing.alone:
        return torch.stack([ends[n] for n in range(len(batch.y))])
    whole = [pytree.tree_map(lambda x: x[None], ends[n]) for n in range(len(batch.y))]
    return torch.cat([problem.packing.pack(tree) for tree in whole])
