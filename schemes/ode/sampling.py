"""Solves with a step size per sample: the loop, its second pass for gradients, and the solution."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from ..errors import SchemeError
from . import options as reading
from .events import Found, Place
from .field import moved, tracked
from .independent import FINISHED, NAMES, NOT_FINITE, Batch, Solve
from .moving import shift
from .pairs import Pair
from .problem import Problem
from .retrace import retrace
from .row_events import Samples, attach_rows
from .rows import Rows, wide
from .run import Run
from .solution import Solution


def solve_samples(problem: Problem) -> Solution:
    """The solution, with a separate step size for every sample."""
    n, times = len(problem.y0), _times(problem)
    if times.shape[1] == 1 or problem.y0.numel() == 0:
        return _trivial(problem, times)
    if problem.endless:
        sign = torch.sign(times[:, 1:] - times[:, :1])
        # Each sample in its own direction, until its own event.
        times = torch.cat((times[:, :1], times[:, :1] + sign * torch.inf), 1)
    solve = _solve(problem, times)
    # A function may read a tensor with a gradient only at late times, so every call is checked.
    solve.rows.looking = torch.is_grad_enabled()
    batch = solve.run(problem.y0.detach())
    solve.rows.looking = False
    _fail_beyond_numbers(batch, times)
    _raise_if_failed(problem, batch)
    bad = (batch.status == NOT_FINITE) & (batch.accepted == 0)
    y = _standing_in(bad, problem.y0)
    if tracked(problem.times):
        d = _each(shift(problem, 0), n)
        y = moved(solve.rows.at(None), times[:, 0] + d, y, -d)
    ys, states, last = _with_graph(problem, solve, batch, y, ~bad)
    found, ends = _events(problem, solve, batch, states, y)
    if ends:
        rows = torch.tensor(list(ends), device=last.device)
        last = last.index_copy(0, rows, torch.stack(list(ends.values())))
    if problem.endless:
        ys = torch.stack((problem.y0, last))  # as it was given: y moves with the time of the start
    unpack = problem.packing.unpack
    return Solution(
        problem.times,
        unpack(ys, (len(ys),)),
        [NAMES[int(s)] for s in batch.status],
        batch.t,
        unpack(last),
        batch.accepted,
        batch.rejected,
        batch.evaluations,
        batch.rows,
        events=found,
        steps=batch.steps,
    )


def _trivial(problem: Problem, times: Tensor) -> Solution:
    """No samples, no entries, or one time: a solve that takes no step, with the fields of each sample."""
    n, width = times.shape
    field = Rows(problem.func, problem.options.get("context"), n).at(None)
    ys = [problem.y0]
    if width > 1:
        # An Euler step, so that the graph has all that a gradient depends on.
        k = field(times[:, 0], problem.y0)
        ys += [problem.y0 + wide(times[:, i] - times[:, 0], k) * k for i in range(1, width)]
    stacked, count = torch.stack(ys), torch.zeros(n, dtype=torch.long, device=times.device)
    unpack = problem.packing.unpack
    return Solution(
        problem.times,
        unpack(stacked, (width,)),
        ["finished"] * n,
        times[:, -1],
        unpack(ys[-1]),
        count,
        count.clone(),
        int(width > 1),
        n * int(width > 1),
        steps=(times.new_zeros(0, n), times.new_zeros(0, n)),
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


def _fail_beyond_numbers(batch: Batch, times: Tensor) -> None:
    """Marks samples that ended beyond the largest number: such a state has an infinite allowance for its error."""
    beyond = ~torch.isfinite(batch.y).reshape(len(batch.y), -1).all(1).to(batch.status.device)
    beyond &= batch.status == FINISHED
    batch.status[beyond], batch.t[beyond] = NOT_FINITE, times[beyond, 0]


def _raise_if_failed(problem: Problem, batch: Batch) -> None:
    failed = (batch.status > 2).nonzero()[:, 0].tolist()
    if failed:
        n = failed[0]
        run = Run([], float(batch.t[n]), batch.y[n], NAMES[int(batch.status[n])], n)
        run.accepted, run.rejected = int(batch.accepted[n]), int(batch.rejected[n])
        problem.raise_if_failed(run, f" ({len(failed)} samples failed)" if len(failed) > 1 else "")


def _each(d: Tensor, n: int) -> Tensor:
    """A number for each of n samples."""
    return d if d.ndim else d.expand(n)


def _with_graph(
    problem: Problem, solve: Solve, batch: Batch, y: Tensor, fine: Tensor
) -> tuple[Tensor, dict[int, Tensor], Tensor]:
    """The values, the states at events that ended samples, and the last states.

    From a second pass where there is a gradient, or a tangent of forward mode.
    """
    ys, last = batch.ys, batch.y
    states: dict[int, Tensor] = {}
    if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and (y.requires_grad or solve.rows.reads)):
        ys, states, last = retrace(solve, batch, y, problem.gradient == "checkpoint")
        if not bool(fine.all()):
            whole = wide(fine, y).bool()
            ys, last = torch.where(whole, ys, batch.ys), torch.where(whole, last, batch.y)
    if tracked(problem.times) and not problem.endless:
        # A sample that did not get that far has neither a value nor a derivative.
        there = [fine if i == 0 else batch.places[i] >= 0 for i in range(len(ys))]
        ys = torch.stack([_moved(problem, solve, i, x, y, there[i]) for i, x in enumerate(ys)])
        # Samples that have finished end at the requested time, so their last state has the gradient of that time.
        whole = wide(batch.status == FINISHED, y).bool()
        last = torch.where(whole, ys[-1], last)
    return ys, states, last


def _standing_in(bad: Tensor, y: Tensor) -> Tensor:
    """The states at the start, with another sample's for those that are broken from the start.

    The function receives all rows, and a NaN in one would spoil the gradients of the tensors that all of them read.
    """
    if not bool(bad.any()) or bool(bad.all()):
        return y
    return torch.where(wide(bad, y).bool(), y[int((~bad).nonzero()[0])].detach(), y)


def _moved(problem: Problem, solve: Solve, i: int, x: Tensor, y: Tensor, there: Tensor) -> Tensor:
    """The values x at time i, with a gradient of that time for samples that are there; others are evaluated at y."""
    mask = wide(there, y).bool()
    # Where a field is given NaN, the gradients of the tensors that it reads are lost.
    whole = torch.where(mask, x, y)
    found = moved(solve.rows.at(None), solve.times[:, i], whole, _each(shift(problem, i), len(y)))
    return torch.where(mask, found, x)


def _events(
    problem: Problem, solve: Solve, batch: Batch, states: dict[int, Tensor], y: Tensor
) -> tuple[list[Found], dict[int, Tensor]]:
    """The events of all samples in order of time, and by sample the packed states at those that ended one."""
    whole = Samples(problem.packing.unpack, solve.times[:, 0], y)
    found: list[Found] = []
    ends: dict[int, Tensor] = {}
    for places, samples in _rounds(batch):
        event = problem.events[places[0].number]
        at = []
        for place, sample in zip(places, samples, strict=True):
            # A sample that ended where it began was not retraced: y itself has the gradient.
            began = event.terminal and place.t == float(solve.times[sample, 0])
            at.append(states.get(sample, y[sample] if began else place.y) if event.terminal else place.y)
        t = torch.tensor([place.t for place in places], dtype=torch.float64, device=y.device)
        components = [place.component for place in places]
        # An event that did not end its sample is found, but its time carries no gradient.
        with torch.set_grad_enabled(torch.is_grad_enabled() and event.terminal):
            got = attach_rows(
                places[0].number, event, whole, solve.rows.at(None), samples, components, t, torch.stack(at)
            )
        states_there = problem.packing.unpack(got.y)
        for i, (place, sample) in enumerate(zip(places, samples, strict=True)):
            one = pytree.tree_map(lambda x, i=i: x[i], states_there)
            when = got.t[i].to(problem.times.dtype)
            found.append(Found(place.number, place.component, when, one, bool(got.grazing[i]), sample))
            if event.terminal:
                ends[sample] = got.y[i]
    sign = 1.0 if bool((problem.times[..., -1] >= problem.times[..., 0]).all()) else -1.0
    return sorted(found, key=lambda e: (e.sample or 0, sign * float(e.t.detach()))), ends


def _rounds(batch: Batch) -> list[tuple[list[Place], list[int]]]:
    """The events found, in groups of one function in which every sample appears at most once."""
    groups: dict[tuple[int, int], tuple[list[Place], list[int]]] = {}
    seen: dict[tuple[int, int], int] = {}
    for place, sample in zip(batch.events, batch.samples, strict=True):
        nth = seen[place.number, sample] = seen.get((place.number, sample), -1) + 1
        places, samples = groups.setdefault((place.number, nth), ([], []))
        places.append(place)
        samples.append(sample)
    return list(groups.values())
