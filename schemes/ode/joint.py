"""One step size for the whole state: the loop that chooses it, steps, and gives values at the times asked for."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .control import Control, first_step
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
    found = ({*times[1:]} if land else {end}) | given | (jumps - {start})
    return sorted(found, reverse=end < start), jumps


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
    """
    attempt = attempt or method.attempt
    order, reuses = method.order, method.reuses
    t, end = times[0], times[-1]
    sign = 1.0 if end > t else -1.0
    ahead, jumps = stops(times, control, land)
    near = f.beside(t, False, sign > 0) if t in jumps else f
    run = Run([y], t, y)
    bad = first_bad(y)
    if bad is not None:
        run.status, run.sample = "not_finite", bad
        return run
    k: Tensor | None = near(t, y)
    bad = first_bad(k)
    if bad is not None:
        run.status, run.sample = "not_finite", bad
        return run
    if control.first_step is not None:
        h = sign * min(abs(control.first_step), abs(end - t))
    else:
        h = first_step(near, t, y.detach(), k.detach(), end - t, order, control)
    h = sign * min(max(abs(h), control.min_step), control.max_step)
    size = y.detach().abs()
    ratios: list[float] = []
    i, stop = 1, 0
    rejected = False
    ratio = 0.0
    if events is not None and events.start(run, f):
        return run
    while True:
        target = ahead[stop]
        rest = target - t
        planned, landing = h, abs(h) * 1.01 >= abs(rest)
        if landing:
            h, t1 = rest, target
        else:
            if abs(h) * 2 > abs(rest):
                h = rest / 2  # so that no sliver of a step is left
            t1 = t + h
        if t1 == t:
            run.status = "underflow" if math.isfinite(ratio) else "not_finite"
        elif run.accepted + run.rejected >= control.max_steps:
            run.status = "max_steps"
        if run.status != "finished":
            break
        g = near
        if landing and target in jumps:
            g = f.beside(target, True, sign > 0)
            if near is not f:
                g.at.update(near.at)  # type: ignore[union-attr]
        if k is None:
            k = g(t, y)
        tried = attempt(g, t, h, y, k)
        y1 = tried.y
        with torch.no_grad():
            size1 = y1.abs()
            ratio = control.ratio(method.error(tried, h), size, size1)
        if not (ratio <= 1 or (abs(h) <= control.min_step and ratio < math.inf)):
            run.rejected += 1
            if rejected and abs(h) <= control.min_step:
                run.status = "not_finite"
                break
            rejected = True
            h = sign * max(abs(h) * control.shrink(ratio, order), control.min_step)
            continue
        run.accepted += 1
        run.steps.append((t, h))
        last: Tensor | None = tried.slopes[-1] if reuses else None
        inside = i < len(times) and (times[i] - t1) * sign < 0
        piece: Segment | None = None
        if inside or dense or events is not None:
            if last is None:
                last = g(t1, y1)
            piece = Segment(t, t1, h, y, method, tried, g, last)
            if dense:
                run.segments.append(piece)
            if events is not None and events.step(run, piece, y1):
                break
        while i < len(times) and (times[i] - t1) * sign <= 0:
            run.ys.append(y1 if times[i] == t1 else piece.at(times[i]))  # type: ignore[union-attr]
            i += 1
        ratios = [ratio, *ratios[:2]]
        factor = control.factor(ratios, order)
        h1 = h * (min(factor, 1.0) if rejected else factor)
        if landing and abs(planned) > abs(h1):
            h1 = planned  # a step cut short says little about the next
        h = sign * min(max(abs(h1), control.min_step), control.max_step)
        rejected = False
        t, y, k, size = t1, y1, last, size1
        near = f
        if landing:
            if target in jumps:
                near, k = f.beside(t, False, sign > 0), None
            stop += 1
            if stop == len(ahead):
                break
    run.t, run.y = (t, y) if run.status != "event" else (run.t, run.y)
    if run.status == "not_finite":
        run.sample = first_bad(tried.y, *tried.slopes)
    return run
