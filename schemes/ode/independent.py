"""A step size per sample: steps are accepted and rejected sample by sample, and samples rest when they are done.

The field is called with all rows and times of shape (batch, 1, ...); where the data of the samples travels in a
context, rows that are done are dropped, and the context is sliced with them. The number of iterations is that of the
slowest sample, so this pays off where the field is expensive: see the pages.

Gradients come from a second pass along the recorded steps (`retrace`), in which every row takes its own accepted steps
and nothing else; so rejected steps, infinities included, leave no trace in the gradients.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .control import Control
from .events import Event, Place
from .field import time_dtype
from .pairs import Pair
from .row_events import At, Signs
from .row_steps import attempt, gathered, within
from .rows import RowField, Rows, first_steps, norms, wide

# Those from MAX_STEPS on are failures.
RUNNING, FINISHED, EVENT, MAX_STEPS, UNDERFLOW, NOT_FINITE = range(6)
NAMES = ("running", "finished", "event", "max_steps", "underflow", "not_finite")


@dataclass
class Batch:
    """The result of a solve with a step size per sample; tensors have one entry per sample.

    Attributes:
        ys: values at the requested times, (times, batch, ...).
        t: the time that was reached.
        y: the state there.
        status: one of the constants of this module.
        accepted: number of steps that were kept.
        rejected: number of steps that were not.
        iterations: steps of the loop.
        evaluations: calls of the field.
        rows: rows of all evaluations together.
        steps: starts and sizes of the accepted steps, (steps, batch); a sample that is done has size 0.
        until: their ends, which are not quite start plus size; None where func does not jump.
        events: the events that were found.
        samples: the samples of the events.
        places: (times, batch), the number of the step in which a sample has its value at a time; -1 at the start.
        thetas: (times, batch), where within that step.
        ends: by sample, the step and the place within it at which a terminal event ended it.
    """

    ys: Tensor
    t: Tensor
    y: Tensor
    status: Tensor
    accepted: Tensor
    rejected: Tensor
    iterations: int
    evaluations: int
    rows: int
    steps: tuple[Tensor, Tensor]
    until: Tensor | None
    events: list[Place]
    samples: list[int]
    places: Tensor
    thetas: Tensor
    ends: dict[int, tuple[int, float]]


class Log:
    """The results so far, with an entry per sample of the whole batch.

    Args:
        times: (batch, times).
        y: the states at the start.
    """

    def __init__(self, times: Tensor, y: Tensor):
        n, width = times.shape
        self.ys = y.new_full((width, *y.shape), math.nan)
        self.ys[0] = y
        self.places = torch.full((width, n), -1, device=y.device)
        self.thetas = torch.ones((width, n), dtype=torch.float64, device=y.device)
        self.status = torch.zeros(n, dtype=torch.long, device=y.device)
        self.accepted, self.rejected = torch.zeros_like(self.status), torch.zeros_like(self.status)
        self.t, self.y = times[:, 0].clone(), y.clone()
        # For each iteration: starts of the steps, their sizes, which of them were kept, and with jumps their ends.
        self.starts: list[Tensor] = []
        self.sizes: list[Tensor] = []
        self.kept: list[Tensor] = []
        self.until: list[Tensor] = []
        self.events: list[Place] = []
        self.samples: list[int] = []
        self.ends: dict[int, tuple[int, float]] = {}

    def batch(self, iterations: int, rows: Rows) -> Batch:
        """All results, when the solve is over."""
        starts, sizes, until = self._compacted()
        return Batch(
            self.ys,
            self.t,
            self.y,
            self.status,
            self.accepted,
            self.rejected,
            iterations,
            rows.count,
            rows.rows,
            (starts, sizes),
            until,
            self.events,
            self.samples,
            self.places,
            self.thetas,
            self.ends,
        )

    def _compacted(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The accepted steps of each sample, one below the other: starts, sizes, and ends where they were noted."""
        n = self.accepted
        most = int(n.max()) if len(n) else 0
        if not most:
            nothing = torch.zeros((0, len(n)), dtype=torch.float64, device=n.device)
            return nothing, nothing, nothing if self.until else None
        good = torch.stack(self.kept)
        # Rejected steps all go into one extra row at the end, which is then cut off.
        index = torch.where(good, good.long().cumsum(0) - 1, most)

        def column(values: list[Tensor]) -> Tensor:
            empty = torch.zeros((most + 1, len(n)), dtype=torch.float64, device=n.device)
            return empty.scatter_(0, index, torch.stack(values))[:most]

        t, h = column(self.starts), column(self.sizes)
        # A sample that is done rests at its end: the field is then evaluated at a time that it has seen before.
        rest = torch.arange(most, device=n.device)[:, None] >= n
        ends = (t + h).gather(0, (n - 1).clamp(min=0)[None])
        until = torch.where(rest, ends, column(self.until)) if self.until else None
        return torch.where(rest, ends, t), torch.where(rest, torch.zeros_like(h), h), until


class Front:
    """The rows that are still stepped; each tensor has one entry per row.

    Attributes:
        own: their samples' numbers in the batch.
        t: time.
        y: state.
        k: slope there.
        size: absolute value of the state.
        h: size of the next step, without a sign.
        stops: (rows, stops), the times onto which they step.
        stop: number of the stop ahead.
        place: number of the time whose value comes next.
        tries: steps tried.
        ratio: error of the last step tried, in units of the allowed error.
        before: ratio of the last accepted step.
        before2: ratio of the accepted step before that.
        again: whether the last step was rejected.
        broken: whether the last rejected step was not finite.
        active: whether the row goes on.
    """

    def __init__(self, t: Tensor, y: Tensor, k: Tensor, h: Tensor, stops: Tensor, active: Tensor):
        n, device = len(y), y.device
        self.own = torch.arange(n, device=device)
        self.t, self.y, self.k, self.h, self.stops, self.active = t, y, k, h, stops, active
        self.size = y.abs()
        self.before, self.before2, self.ratio = torch.ones_like(t), torch.ones_like(t), torch.zeros_like(t)
        self.again, self.broken = (torch.zeros(n, dtype=torch.bool, device=device) for _ in range(2))
        self.stop, self.tries = (torch.zeros(n, dtype=torch.long, device=device) for _ in range(2))
        self.place = torch.ones(n, dtype=torch.long, device=device)

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these."""
        for name, value in vars(self).items():
            setattr(self, name, value[rows])


@dataclass(slots=True)
class Tried:
    """An attempted step of all rows of a front.

    Attributes:
        h: sizes, with the sign of the direction; 0 for rows that do not go on.
        step: the same, shaped to multiply states.
        t: times at the end.
        lands: which rows end on a stop.
        y: states at the end.
        slopes: of the stages.
        size: absolute values of the states at the end.
        good: which are kept.
        end: the slopes at the end, where they are known.
        at: the continuous extension, where it was needed.
        stop: where within the step each row ends, 1 unless an event ends it; None where none does.
    """

    h: Tensor
    step: Tensor
    t: Tensor
    lands: Tensor
    y: Tensor
    slopes: list[Tensor]
    size: Tensor
    good: Tensor
    end: Tensor | None
    at: At | None = None
    stop: Tensor | None = None


class Solve:
    """A solve with a step size per sample.

    Args:
        rows: the field.
        pair: the method.
        control: tolerances and limits, of each sample.
        times: (batch, times) in double precision, strictly monotone along the second dimension, all in one direction.
        land: whether steps end on every time; else values within steps are interpolated.
        events: the events to detect; functions of (t, y) with one or several values per sample.
        unpack: turns a packed state into the user's.
        early: whether the first sample that fails ends the solve.
    """

    def __init__(
        self,
        rows: Rows,
        pair: Pair,
        control: Control,
        times: Tensor,
        *,
        land: bool = True,
        events: Sequence[Event] = (),
        unpack: Callable[[Tensor], Any] = lambda y: y,
        early: bool = False,
    ):
        self.rows, self.pair, self.control = rows, pair, control
        self.times, self.land, self.events, self.unpack, self.early = times, land, events, unpack, early
        self.sign = 1.0 if bool((times[:, -1] >= times[:, 0]).all()) else -1.0
        self.jumps = bool(control.jump_t)

    def _stops(self) -> Tensor:
        """The times onto which each row steps, in order, padded by its last."""
        times = self.times
        parts = [times[:, 1:] if self.land else times[:, -1:]]
        given = [*self.control.step_t, *self.control.jump_t]
        if given:
            more = torch.tensor(given, dtype=times.dtype, device=times.device).expand(len(times), -1)
            inside = ((more - times[:, :1]) * self.sign > 0) & ((times[:, -1:] - more) * self.sign > 0)
            parts.append(torch.where(inside, more, times[:, -1:]))
        found = torch.cat(parts, 1)
        return torch.sort(found, dim=1, descending=self.sign < 0).values

    def beside(self, time: Tensor, y: Tensor, before: bool) -> Tensor:
        """Replaces times at jumps by the numbers just before or after them."""
        near = time.to(time_dtype(y))
        aim = -math.inf if before == (self.sign > 0) else math.inf
        # The neighbour in the precision in which the field reads times; in double it would be rounded back to the jump.
        other = torch.nextafter(near, torch.full_like(near, aim)).to(time.dtype)
        jumps = torch.tensor(self.control.jump_t, dtype=time.dtype, device=time.device)
        return torch.where((time[:, None] == jumps).any(1), other, time)

    def start(self, f: RowField, t: Tensor, y: Tensor) -> Tensor:
        """The slopes at the start of steps, just after a jump there."""
        return f(self.beside(t, y, False) if self.jumps else t, y)

    @torch.no_grad()
    def run(self, y: Tensor) -> Batch:
        """The solve, without a graph."""
        f, log, iterations = self.rows.at(None), Log(self.times, y), 0
        front = self._front(f, log, y)
        real, column = front.size.dtype, (-1, *(1,) * (y.ndim - 1))
        watch = Signs(self.events, self.unpack, front.t, y) if self.events else None
        if watch is not None:
            self._events_at_start(watch, front, log)
        # The loop condition waits for the device: whether there is another iteration must be known before it begins.
        while bool(front.active.any()) and not (self.early and bool((log.status > EVENT).any())):
            iterations += 1
            if self.rows.context is not None and not bool(front.active.all()):
                # Rows that are done are dropped, which only a context allows: else the field knows rows by position.
                keep = front.active.nonzero()[:, 0]
                front.keep(keep)
                f = self.rows.at(front.own)
                if watch is not None:
                    watch.keep(keep)
            h, t, lands = self._propose(front, log)
            step = h.to(real).reshape(column)
            before = self.beside(t, y, True) if self.jumps else None
            y1, slopes = attempt(self.pair, f, front.t, h, step, front.y, front.k, before)
            size, end = y1.abs(), slopes[-1] if self.pair.reuses else None
            good = self._judge(front, log, h, t, lands, gathered(slopes, self.pair.errors) * step, size)
            tried = Tried(h, step, t, lands, y1, slopes, size, good, end)
            if watch is not None:
                self._look(f, watch, front, log, tried)
            self._give(f, front, log, tried)
            self._advance(f, front, log, tried)
        return log.batch(iterations, self.rows)

    def _front(self, f: RowField, log: Log, y: Tensor) -> Front:
        """All rows at their start, with the sizes of their first steps."""
        control, t = self.control, self.times[:, 0].clone()
        k = self.start(f, t, y)
        fine = torch.isfinite(y).reshape(len(y), -1).all(1) & torch.isfinite(k).reshape(len(y), -1).all(1)
        # Only for the samples concerned: one that is broken from the start does not stop the others.
        log.status[~fine] = NOT_FINITE
        if control.first_step is not None:
            h = torch.full_like(t, abs(control.first_step))
        else:
            span = self.times[:, -1] - t
            h = first_steps(f, t, y, k, span, self.pair.order, control)
            # Far from zero, neighbouring floating-point times are further apart than a cautious step.
            ulp = torch.nextafter(t.abs(), torch.full_like(t, math.inf)) - t.abs()
            h = torch.minimum(torch.maximum(h, 4 * ulp), span.abs())
        h = h.clamp(control.min_step, control.max_step)  # sizes are positive here
        return Front(t, y, k, h, self._stops(), log.status == RUNNING)

    def _events_at_start(self, watch: Signs, front: Front, log: Log) -> None:
        for place, row, theta in watch.start(front.active):
            log.events.append(place)
            log.samples.append(row)
            if self.events[place.number].terminal:
                log.ends[row] = (-1, theta)
                log.status[row], front.active[row] = EVENT, False

    def _propose(self, front: Front, log: Log) -> tuple[Tensor, Tensor, Tensor]:
        """The size and the end of each row's next step, and which of them end on a stop.

        Rows that cannot go on get their status, and a step of size 0.
        """
        control = self.control
        target = front.stops.gather(1, front.stop[:, None])[:, 0]
        rest = (target - front.t).abs()
        # As one step size for all: a hundredth longer, but within the limit.
        most = front.h.clamp(min=self.control.max_step * (1 + 1e-12))
        lands = torch.minimum(front.h * 1.01, most) >= rest
        # As in ``control.Pace``: two steps of half the rest, so that no tiny step is left over.
        h = torch.where(lands, rest, torch.where(front.h * 2 > rest, rest / 2, front.h))
        least = front.again & (front.h <= control.min_step) & ~lands & (front.ratio > 1)
        least |= front.again & (front.h < sys.float_info.min)  # as in ``control.Pace``
        stuck = front.active & ((front.t + self.sign * h == front.t) | least)
        ended = front.active & (front.tries >= control.max_steps)
        why = torch.where(front.broken, NOT_FINITE, UNDERFLOW)
        log.status[front.own] = torch.where(stuck, why, torch.where(ended, MAX_STEPS, log.status[front.own]))
        front.active = front.active & ~stuck & ~ended
        h = torch.where(front.active, h, torch.zeros_like(h)) * self.sign
        return h, torch.where(lands & front.active, target, front.t + h), lands

    def _judge(
        self, front: Front, log: Log, h: Tensor, t: Tensor, lands: Tensor, error: Tensor, size: Tensor
    ) -> Tensor:
        """Decides by their errors which steps are kept; sets the next sizes: `control.Control.factor` and `shrink`."""
        control, own, active = self.control, front.own, front.active
        allowed = control.scale(torch.maximum(front.size, size), None if len(own) == len(log.status) else own)
        front.ratio = ratio = norms(control, error / allowed).double()
        least = torch.minimum(h.abs(), front.h) <= control.min_step  # it cannot shrink
        good = ((ratio <= 1) | (least & torch.isfinite(ratio))) & active
        bad = active & ~good
        log.accepted[own] += good.long()
        log.rejected[own] += bad.long()
        front.tries += active.long()
        k, n = 1 / (self.pair.order + 1), len(log.status)
        recorded = [(log.starts, front.t), (log.sizes, h), (log.kept, good)]
        if self.jumps:
            recorded.append((log.until, t))
        for record, value in recorded:
            record.append(torch.zeros(n, dtype=value.dtype, device=value.device).index_copy(0, own, value))
        p, i, d = control.proportional, control.integral, control.derivative
        r, r1, r2 = ratio.clamp(min=1e-10), front.before.clamp(min=1e-10), front.before2.clamp(min=1e-10)
        change = control.safety * r ** (-(p + i + d) * k) * r1 ** ((p + 2 * d) * k) * r2 ** (-d * k)
        change = change.clamp(control.smallest, control.largest)
        change = torch.where(front.again, change.clamp(max=1.0), change)
        shrink = (control.safety * r ** (-k)).clamp(control.smallest, control.safety)
        shrink = torch.where(torch.isfinite(ratio), shrink, torch.full_like(shrink, control.smallest))
        grown = h.abs() * change
        # A step cut short by a stop says little about the next.
        grown = torch.where(lands & (front.h > grown) & ~front.again, front.h, grown)
        following = torch.where(good, grown, torch.where(bad, h.abs() * shrink, front.h))
        front.h = following.clamp(control.min_step, control.max_step)
        front.broken = torch.where(bad, ~torch.isfinite(ratio), front.broken)
        front.again = torch.where(active, bad, front.again)
        front.before2 = torch.where(good, front.before, front.before2)
        front.before = torch.where(good, ratio, front.before)
        return good

    def _extended(self, f: RowField, front: Front, tried: Tried) -> At:
        """The continuous extension of the step, built on first use."""
        if tried.at is None:
            if tried.end is None:
                tried.end = f(self.beside(tried.t, tried.y, True) if self.jumps else tried.t, tried.y)
            tried.at = within(self.pair, f, front.t, tried.h, tried.step, front.y, tried.slopes, tried.end)
        return tried.at

    def _look(self, f: RowField, watch: Signs, front: Front, log: Log, tried: Tried) -> None:
        """Detects events; a row that is ended by one stops there instead of at the end of the step."""
        at = self._extended(f, front, tried)
        for place, row, theta in watch.step(at, front.t, tried.h, tried.t, tried.good):
            sample = int(front.own[row])
            log.events.append(place)
            log.samples.append(sample)
            if self.events[place.number].terminal:
                log.status[sample] = EVENT
                if tried.stop is None:
                    tried.stop = torch.ones_like(front.t)
                tried.t[row], tried.stop[row] = place.t, theta
                tried.y = tried.y.index_copy(0, torch.tensor([row], device=tried.y.device), place.y[None])
                log.ends[sample] = (int(log.accepted[sample]) - 1, theta)

    def _give(self, f: RowField, front: Front, log: Log, tried: Tried) -> None:
        """Records the values at the times that the steps have reached, one time a round: a step may pass several."""
        times, width = self.times[front.own], self.times.shape[1]
        while True:
            due = times.gather(1, front.place.clamp(max=width - 1)[:, None])[:, 0]
            ready = tried.good & (front.place < width) & ((tried.t - due) * self.sign >= 0)
            if not bool(ready.any()):
                return
            value, theta = tried.y, torch.ones_like(front.t) if tried.stop is None else tried.stop
            # Where steps land on every time, a value within a step is needed only because an event has cut the step
            # short.
            if not self.land or self.events:
                inside = ready & (due != tried.t)
                if bool(inside.any()):
                    at = self._extended(f, front, tried)
                    # Rows that rest have size 0; the quotient for them is not used.
                    h = torch.where(tried.h == 0, torch.ones_like(tried.h), tried.h)
                    theta = torch.where(inside, (due - front.t) / h, theta)
                    value = torch.where(wide(inside, front.y).bool(), at(theta), tried.y)
            who, column = front.own[ready], front.place[ready]
            log.ys[column, who] = value[ready]
            log.places[column, who] = log.accepted[who] - 1
            log.thetas[column, who] = theta[ready]
            front.place = front.place + ready.long()

    def _advance(self, f: RowField, front: Front, log: Log, tried: Tried) -> None:
        """Moves the rows whose steps are kept to their ends, and lets rows that are done rest."""
        good, own, count = tried.good, front.own, front.stops.shape[1]
        gone = good.reshape(-1, *(1,) * (front.y.ndim - 1))
        front.y = torch.where(gone, tried.y, front.y)
        front.size = torch.where(gone, tried.size, front.size)
        front.t = torch.where(good, tried.t, front.t)
        front.stop = torch.where(good & tried.lands, front.stop + 1, front.stop)
        stopped = good & (log.status[own] == EVENT) if self.events else torch.zeros_like(good)
        done = good & ((front.stop >= count) | stopped)
        # Padded and repeated stops are skipped.
        while True:
            passed = (front.stop < count) & front.active
            passed &= front.stops.gather(1, front.stop.clamp(max=count - 1)[:, None])[:, 0] == front.t
            if not bool(passed.any()):
                break
            front.stop = front.stop + passed.long()
            done = done | (passed & (front.stop >= count))
        log.status[own] = torch.where(done & ~stopped, FINISHED, log.status[own])
        front.active = front.active & ~done
        # At every iteration, since a row may be dropped from the next.
        log.t[own], log.y[own] = front.t, front.y
        front.stop = front.stop.clamp(max=count - 1)
        if tried.end is None or self.jumps:
            front.k = f(self.beside(front.t, front.y, False) if self.jumps else front.t, front.y)
        else:
            front.k = torch.where(gone, tried.end, front.k)
