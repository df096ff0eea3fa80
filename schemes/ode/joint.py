"""One step size for the whole state: the loop that chooses it, steps, and gives values at the requested times."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .control import Control, Pace, first_step
from .dense import Segment
from .field import Field, first_bad
from .run import Run

Attempts = Callable[..., Any]


def stops(times: Sequence[float], control: Control, land: bool) -> tuple[list[float], set[float]]:
    """The times onto which the solver steps, in the direction of the solve, and those of them at which func jumps."""
    start, end = times[0], times[-1]
    low, high = min(start, end), max(start, end)
    jumps = {t for t in control.jump_t if low <= t <= high}
    given = {t for t in control.step_t if low < t < high}
    # A jump at the very start is not one to step onto: the field is read after it from the beginning.
    found = ({*times[1:]} if land else {end}) | given | (jumps - {start})
    return sorted(found, reverse=end < start), jumps


def begin(run: Run, f: Field, y: Tensor, t: float, end: float, order: int, control: Control) -> tuple[Tensor, Pace]:
    """The slope at the start, and the first step size; the run fails where either state or slope is not finite."""
    sign = 1.0 if end > t else -1.0
    k = f(t, y)
    bad = first_bad(y, k)
    if bad is not None:
        run.status, run.sample = "not_finite", bad
        # Any size will do: the run has failed.
        return k, Pace(control, order, sign, sign)
    if control.first_step is not None:
        h = sign * min(abs(control.first_step), abs(end - t))
    else:
        h = first_step(f, t, y.detach(), k.detach(), end - t, order, control)
        # Far from zero, neighbouring floating-point times are further apart than a cautious step.
        h = sign * min(max(abs(h), 4 * math.ulp(t)), abs(end - t))
    return k, Pace(control, order, h, sign)


def stalled(run: Run, pace: Pace, t: float, t1: float, control: Control) -> bool:
    """Whether the solve cannot go on; the run's status then says why."""
    # The step is below what numbers of this size resolve, or cannot shrink and is not accepted.
    if t1 == t or pace.stuck:
        run.status = "not_finite" if pace.broken else "underflow"
    elif run.accepted + run.rejected >= control.max_steps:
        run.status = "max_steps"
    return run.status != "finished"


# long: the loop of a solve, whose state is local because attribute look-ups dominate small systems
def solve(
    f: Field,
    y: Tensor,
    times: Sequence[float],
    method: Any,
    control: Control,
    *,
    land: bool = True,
    attempt: Attempts | None = None,
    dense: bool = False,
    events: Any = None,
    callbacks: Any = None,
) -> Run:
    """Solves from ``times[0]`` through all times with one step size, adapted to the error of the whole state.

    Args:
        f: the field.
        y: the state at the first time.
        times: strictly monotone, at least two.
        method: the embedded pair.
        control: tolerances and limits.
        land: whether steps end on every time; else values within steps are interpolated.
        attempt: tries a step in place of ``method.attempt`` (recomputation).
        dense: whether the pieces of the continuous solution are kept.
        events: watches for events (`schemes.ode.events.Watch`).
        callbacks: functions of (t, y, h) called before a step, when it is accepted, when it is rejected; or None each.
    """
    attempt = attempt or method.attempt
    reuses = method.reuses
    t, end = times[0], times[-1]
    forward = end > t
    ahead, jumps = stops(times, control, land)
    # ``near`` is the field as steps that begin here read it.
    near = f.beside(t, False, forward) if t in jumps else f
    run = Run([y], t, y)
    found, pace = begin(run, near, y, t, end, method.order, control)
    k: Tensor | None = found
    if run.failed or (events is not None and events.start(run, y)):
        return run
    before, after, instead = callbacks or (None, None, None)
    sign, size = pace.sign, y.detach().abs()
    i, stop = 1, 0
    tried: Any = None
    while True:
        target = ahead[stop]
        h, t1 = pace.propose(t, target)
        if stalled(run, pace, t, t1, control):
            break
        if before is not None:
            before(t, y, h)
        g = near
        if pace.lands and target in jumps:
            g = f.beside(target, True, forward)
            # The last stage reads t + h, which may differ from the target by rounding, and would be beyond the jump.
            g.at[t + h] = g.at[target]  # type: ignore[index]
            if near.at is not None and g.at is not None:
                # A step may begin at one jump and end at the next.
                g.at.update(near.at)
        if k is None:
            k = g(t, y)
        # The first slope is the last one of the step before (or its end's), so an accepted step costs one evaluation
        # less.
        tried = attempt(g, t, h, y, k)  # type: ignore
        y1 = tried.y
        with torch.no_grad():
            size1 = y1.abs()
            ratio = control.ratio(method.error(tried, h), size, size1)
        if not pace.accepts(h, ratio):
            run.rejected += 1
            if instead is not None:
                instead(t, y, h)
            continue
        run.accepted += 1
        run.steps.append((t, h))
        if after is not None:
            after(t, y, h)
        # Where no stage is the slope at the end, it is evaluated where it is needed first: by this piece or the next
        # step.
        last: Tensor | None = tried.slopes[-1] if reuses else None
        piece: Segment | None = None
        ended = False
        if dense or events is not None or (i < len(times) and (times[i] - t1) * sign < 0):
            if last is None:
                last = g(t1, y1)
            piece = Segment(t, t1, h, y, method, tried, g, last)
            if dense:
                run.segments.append(piece)
            ended = events is not None and events.step(run, piece)
        # An event inside of the step ends the solve there: times after it have no values.
        upto = run.t if ended else t1
        while i < len(times) and (times[i] - upto) * sign <= 0:
            run.ys.append(y1 if times[i] == t1 else piece.at(times[i]))  # type: ignore[union-attr]
            i += 1
        if ended:
            return run
        t, y, k, size = t1, y1, last, size1
        near = f
        if pace.lands:
            # The slope at the end was that before the jump.
            if target in jumps:
                # None: evaluated at the next step's start, once it is known that there is one.
                near, k = f.beside(t, False, forward), None
            stop += 1
            if stop == len(ahead):
                break
    run.t, run.y = t, y
    # Of a finite field too: a state beyond the largest number has an infinite allowance for its error.
    if run.status == "finished" and not bool(torch.isfinite(y.detach()).all()):
        run.status = "not_finite"
        run.t = max((t for t, y in zip(times, run.ys, strict=False) if first_bad(y) is None), key=lambda t: sign * t)
    if run.status == "not_finite":
        run.sample = first_bad(tried.y, *tried.slopes)
    return run
