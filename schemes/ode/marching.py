"""Forward solves by a reversible rule: along given grids, or with chosen steps."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import SchemeError
from .control import Control
from .dense import Hermite
from .field import Field, first_bad
from .joint import begin, stalled, stops
from .rules import Rule, State
from .run import Run
from .trees import rms

Step = Callable[[Field, float, float, State], tuple[State, Tensor | None]]
# The run, its last streams, and the streams just before they started anew, by the number of the step.
Marched = tuple[Run, State, dict[int, State]]

# Two streams that follow one solution differ by about its error. No step size keeps a stiff field from driving them
# apart; where they differ by this many tolerances (or, with fixed steps, by this part of their size) the solve stops.
PARTED, APART = 100.0, 0.1


def steps(r: Rule, again: bool) -> Step:
    """The rule's step, or the same with a graph that is recomputed in the backward pass."""
    if not again:
        return r.step

    def step(f: Field, t: float, h: float, s: State) -> tuple[State, Tensor | None]:
        errors: list[Tensor | None] = []

        def run(*s: Tensor) -> State:
            found, error = r.step(f, t, h, s)
            errors.append(None if error is None else error.detach())
            return found

        # The error is returned through the list: it carries no gradient, and would be kept as an output.
        return checkpoint(run, *s, use_reentrant=False), errors[0]  # type: ignore[return-value]

    return step


def along(r: Rule, f: Field, y: Tensor, grids: Sequence[Sequence[float]], again: bool = False) -> Marched:
    """A solve along a grid per interval.

    As elsewhere with fixed steps, the streams start anew where the step size changes.
    """
    times = [grids[0][0], *(grid[-1] for grid in grids)]
    run, kept = Run([y], times[0], y), {}
    step = steps(r, again)
    state, size = r.start(f, times[0], y), None
    for grid in grids:
        for t0, t1 in pairwise(grid):
            h = t1 - t0
            if size is not None and abs(h - size) > 1e-9 * abs(h):
                # The inverse cannot cross this restart: it needs the streams as they were.
                kept[len(run.steps)] = state
                state = r.start(f, t0, state[0])
            run.steps.append((t0, h))
            state, _ = step(f, t0, h, state)
            size = h
        run.ys.append(state[0])
        # Once an interval, not once a step, since it waits for the device.
        with torch.no_grad():
            apart, value = r.spread(state), rms(state[0].abs())
            if apart is not None and not float(rms(apart)) <= APART * float(value) + 1e-12:
                run.status, run.t, run.y, run.accepted = "unstable", grid[-1], state[0], len(run.steps)
                return run, state, kept
    run.accepted = len(run.steps)
    run.t, run.y = times[-1], state[0]
    return run, state, kept


# long: the loop of a solve, whose state is local because attribute look-ups dominate small systems
def march(
    r: Rule,
    f: Field,
    y: Tensor,
    times: Sequence[float],
    control: Control,
    *,
    again: bool = False,
    dense: bool = False,
    events: Any = None,
    callbacks: Any = None,
) -> Marched:
    """A solve whose steps are chosen; see `joint.solve`."""
    run, t, kept = Run([y], times[0], y), times[0], {}
    step = steps(r, again)
    # Steps end on every time: a reversible scheme has no continuous extension to read values from.
    ahead, jumps = stops(times, control, True)
    if jumps:
        raise SchemeError("odeint: reversible schemes know no jump_t; take step_t, or a pair such as tsit5.")
    k, pace = begin(run, f, y, t, times[-1], r.order, control)
    if run.failed or (events is not None and events.start(run, y)):
        return run, (y,), kept
    state, stop, size0 = r.start(f, t, y), 0, y.detach().abs()
    state1 = state
    wanted = set(times)
    before, after, instead = callbacks or (None, None, None)
    while stop < len(ahead):
        h, t1 = pace.propose(t, ahead[stop])
        if stalled(run, pace, t, t1, control):
            break
        if before is not None:
            before(t, state[0], h)
        state1, error = step(f, t, h, state)
        assert error is not None
        with torch.no_grad():
            size1 = state1[0].abs()
            # A copy, since the ratio is computed in place.
            ratio = control.ratio(error.detach().clone(), size0, size1)
        if not pace.accepts(h, ratio):
            run.rejected += 1
            if instead is not None:
                instead(t, state[0], h)
            continue
        if after is not None:
            after(t, state[0], h)
        with torch.no_grad():
            apart = r.spread(state1)
            if apart is not None:
                scale = control.scale(torch.maximum(size0, size1))
                # Written so that NaN stops the solve too.
                if not float(control.measure(apart.div_(scale))) <= PARTED:
                    run.status = "unstable"
                    break
        # Not before it is known that the solve goes on from here: the backward pass begins at the end of these.
        run.accepted += 1
        run.steps.append((t, h))
        if dense or events is not None:
            end = f(t1, state1[0])
            piece, k = Hermite(t, t1, state[0], state1[0], k, end), end
            if dense:
                run.segments.append(piece)  # type: ignore
            if events is not None and events.step(run, piece):
                return run, state1, kept
        t, state, size0 = t1, state1, size1
        if pace.lands:
            if ahead[stop] in wanted:
                run.ys.append(state[0])
            stop += 1
    run.t, run.y = t, state[0]
    if run.status == "not_finite":
        run.sample = first_bad(*state1)
    return run, state, kept
