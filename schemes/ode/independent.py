"""A step size per sample: samples are accepted and rejected apart, and rest when they are done.

The field is called with all rows and times of shape (batch, 1, ...); where the data of the samples travels in a
context, rows that are done are left out, and the context is sliced with them. Iterations are those of the slowest
sample, so this pays where the field is dear: see the pages.

Gradients come from a second pass along the recorded steps, in which every row takes its own accepted steps and nothing
else; so what a rejected step did, infinities included, leaves no trace in them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from ..errors import SchemeError
from ..runge_kutta import Terms
from .control import Control
from .events import Event, Place
from .field import fitted, time_dtype
from .pairs import Pair

RUNNING, FINISHED, EVENT, MAX_STEPS, UNDERFLOW, NOT_FINITE = range(6)
NAMES = ("running", "finished", "event", "max_steps", "underflow", "not_finite")


@dataclass
class Batch:
    """What a solve with a step size per sample found; tensors have one entry per sample."""

    ys: Tensor
    t: Tensor
    y: Tensor
    status: Tensor
    accepted: Tensor
    rejected: Tensor
    iterations: int
    evaluations: int
    rows: int  # rows of all evaluations together
    steps: tuple[Tensor, Tensor]  # starts and sizes, (steps, batch); a sample that is done has size 0
    events: list[Place]
    samples: list[int]


class Rows:
    """Calls the field on some rows, at times of their own.

    Args:
        func: the field of packed states, ``func(t, y)`` or with a context ``func(t, y, context)``.
        context: tensors whose first dimension counts the samples, or None.
    """

    def __init__(self, func: Callable[..., Tensor], context: Any, batch: int):
        self.func, self.context = func, context
        self.count = self.rows = 0
        if context is not None:
            for x in pytree.tree_leaves(context):
                if isinstance(x, Tensor) and (not x.ndim or x.shape[0] != batch):
                    raise SchemeError(
                        f"odeint: the context holds a tensor of shape {tuple(x.shape)} for {batch} samples; "
                        "its first dimension counts them."
                    )

    def at(self, rows: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """The field of these rows; None stands for all."""
        context = self.context
        if context is not None and rows is not None:
            context = pytree.tree_map(lambda x: x[rows] if isinstance(x, Tensor) else x, context)

        def call(t: Tensor, y: Tensor) -> Tensor:
            self.count += 1
            self.rows += y.shape[0]
            time = t.to(time_dtype(y)).reshape(-1, *(1,) * (y.ndim - 1))
            k = self.func(time, y) if self.context is None else self.func(time, y, context)
            return k if isinstance(k, Tensor) and k.shape == y.shape and k.dtype == y.dtype else fitted(k, y)

        return call


def wide(h: Tensor, y: Tensor) -> Tensor:
    """One number per row, to be multiplied with a state."""
    return h.to(y.real.dtype if y.is_complex() else y.dtype).reshape(-1, *(1,) * (y.ndim - 1))


def gathered(ks: Sequence[Tensor], row: Terms) -> Tensor:
    """sum_j row[j] k_j in a new tensor."""
    j, a = row[0]
    out = ks[j] * a
    for j, a in row[1:]:
        out.add_(ks[j], alpha=a)
    return out


def shifted(y: Tensor, ks: Sequence[Tensor], row: Terms, step: Tensor) -> Tensor:
    """y + step sum_j row[j] k_j."""
    return torch.addcmul(y, gathered(ks, row), step) if row else y


def attempt(pair: Pair, f: Callable[..., Tensor], t: Tensor, h: Tensor, y: Tensor, k: Tensor, side: Any = None) -> Any:
    """The state after a step of every row, and the slopes of the stages; ``side`` corrects times at jumps."""
    step = wide(h, y)
    ks, x = [k], y
    for c, row in pair.tail:
        x = shifted(y, ks, row, step)
        time = t + c * h
        ks.append(f(side(time) if side is not None and c == 1 else time, x))
    if not pair.reuses:
        x = shifted(y, ks, pair.weights, step)
    return x, ks


def within(pair: Pair, f: Callable[..., Tensor], t: Tensor, h: Tensor, y: Tensor, ks: list[Tensor], end: Any) -> Any:
    """The continuous extension of a step of every row, as a function of one theta per row."""
    rows, nodes, polynomials, _ = pair.dense
    slopes = ks if pair.reuses else [*ks, end]
    step = wide(h, y)
    slopes = [*slopes]
    for c, row in zip(nodes, rows, strict=True):
        slopes.append(f(t + c * h, shifted(y, slopes, row, step)))

    def at(theta: Tensor) -> Tensor:
        total = torch.zeros_like(y)
        for k, p in zip(slopes, polynomials, strict=True):
            if any(p):
                b = torch.zeros_like(theta)
                for c in reversed(p):
                    b = (b + c) * theta
                total = total + wide(b, y) * k
        return torch.addcmul(y, total, step)

    return at


def norms(control: Control, weighted: Tensor) -> Tensor:
    """The norm of every row."""
    if control.norm is not None:
        return torch.func.vmap(control.norm)(weighted)
    flat = weighted.reshape(weighted.shape[0], -1)
    return torch.linalg.vector_norm(flat, dim=1) / max(flat.shape[1], 1) ** 0.5


def first_steps(f: Callable[..., Tensor], t: Tensor, y: Tensor, k: Tensor, span: Tensor, order: int, c: Control):
    """`control.first_step` for every row."""
    scale = c.scale(y.abs())
    d0, d1 = norms(c, y / scale).double(), norms(c, k / scale).double()
    h = torch.where((d0 < 1e-5) | (d1 < 1e-5), torch.full_like(d0, 1e-6), 0.01 * d0 / d1)
    h = torch.minimum(h, span.abs())
    signed = torch.copysign(h, span)
    slope = f(t + signed, torch.addcmul(y, k, wide(signed, y)))
    d2 = norms(c, (slope - k) / scale).double() / h
    top = torch.maximum(d1, d2)
    h1 = torch.where(top <= 1e-15, torch.clamp(h * 1e-3, min=1e-6), (0.01 / top) ** (1 / (order + 1)))
    found = torch.minimum(torch.minimum(100 * h, h1), span.abs())
    return torch.where(torch.isfinite(found), found, h * 1e-3)


class Solve:
    """A solve with a step size per sample.

    Args:
        rows: the field.
        pair: the method.
        control: tolerances and limits, of each sample.
        times: (batch, times) in double precision, strictly monotone along the second dimension, all in one direction.
        land: whether steps end on every time; else values within steps are interpolated.
        events: what to look for; functions of (t, y) with one or several values per sample.
        unpack: makes the user's state of a packed one.
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

    def _beside(self, time: Tensor, y: Tensor, before: bool) -> Tensor:
        """Times at jumps as the numbers just before or after them."""
        near = time.to(time_dtype(y))
        aim = -math.inf if before == (self.sign > 0) else math.inf
        other = torch.nextafter(near, torch.full_like(near, aim)).to(time.dtype)
        jumps = torch.tensor(self.control.jump_t, dtype=time.dtype, device=time.device)
        return torch.where((time[:, None] == jumps).any(1), other, time)

    # long: the loop of a solve, whose state per sample is local; in parts it would pass a dozen tensors around
    @torch.no_grad()
    def run(self, y: Tensor) -> Batch:
        """The solve, without a graph."""
        pair, control, sign, times = self.pair, self.control, self.sign, self.times
        device, n, width = y.device, len(y), times.shape[1]
        order, k1 = pair.order, 1 / (pair.order + 1)
        jumps = bool(control.jump_t)
        everyone = torch.arange(n, device=device)
        rows: Tensor | None = None  # of those that are worked on; None stands for all
        out = y.new_full((width, *y.shape), math.nan)
        out[0] = y
        self.places = torch.full((width, n), -1, device=device)  # after which of its steps a row has its value
        self.thetas = torch.ones((width, n), dtype=torch.float64, device=device)
        status = torch.zeros(n, dtype=torch.long, device=device)
        accepted, rejected = torch.zeros_like(status), torch.zeros_like(status)
        reached, last = times[:, 0].clone(), y.clone()
        stops, starts, sizes, kept = self._stops(), [], [], []

        t = times[:, 0].clone()
        f = self.rows.at(None)
        k = f(self._beside(t, y, False) if jumps else t, y)
        fine = torch.isfinite(y).reshape(n, -1).all(1) & torch.isfinite(k).reshape(n, -1).all(1)
        status[~fine] = NOT_FINITE
        if control.first_step is not None:
            h = torch.full_like(t, abs(control.first_step))
        else:
            h = first_steps(f, t, y, k, times[:, -1] - t, order, control)
        h = h.clamp(control.min_step, control.max_step)  # sizes are positive here
        before, before2 = torch.ones_like(t), torch.ones_like(t)
        again = torch.zeros(n, dtype=torch.bool, device=device)
        broken = torch.zeros_like(again)  # whether the last step that was tried in vain was not finite
        stop = torch.zeros_like(status)
        place = torch.ones_like(status)
        tries = torch.zeros_like(status)
        ratio = torch.zeros_like(t)
        active = status == RUNNING
        size = y.abs()
        watch = _Signs(self, t, y) if self.events else None
        found: list[Place] = []
        samples: list[int] = []
        if watch is not None:
            for event in watch.start():
                found.append(event[0])
                samples.append(event[1])
                if self.events[event[0].number].terminal:
                    status[event[1]], active[event[1]] = EVENT, False
        iterations = 0
        while bool(active.any()) and not (self.early and bool((status > EVENT).any())):
            iterations += 1
            if self.rows.context is not None and not bool(active.all()):  # rows that are done are left out
                keep = active.nonzero()[:, 0]
                rows = keep if rows is None else rows[keep]
                t, h, y, k, size, before, before2 = (x[keep] for x in (t, h, y, k, size, before, before2))
                again, broken, stop, place = (x[keep] for x in (again, broken, stop, place))
                tries, ratio, active = (x[keep] for x in (tries, ratio, active))
                stops, f = stops[keep], self.rows.at(rows)
                if watch is not None:
                    watch.keep(keep)
            own = everyone if rows is None else rows
            target = stops.gather(1, stop[:, None])[:, 0]
            rest = (target - t).abs()
            lands = h * 1.01 >= rest
            step = torch.where(lands, rest, torch.where(h * 2 > rest, rest / 2, h))
            stuck = active & ((t + sign * step == t) | (again & (h <= control.min_step) & ~lands & (ratio > 1)))
            ended = active & (tries >= control.max_steps)
            why = torch.where(broken, NOT_FINITE, UNDERFLOW)
            status[own] = torch.where(stuck, why, torch.where(ended, MAX_STEPS, status[own]))
            active = active & ~stuck & ~ended
            step = torch.where(active, step, torch.zeros_like(step)) * sign
            t1 = torch.where(lands & active, target, t + step)
            side = (lambda time: self._beside(time, out, True)) if jumps else None
            y1, ks = attempt(pair, f, t, step, y, k, side)
            size1 = y1.abs()
            error = gathered(ks, pair.errors) * wide(step, y)
            ratio = norms(control, error / control.scale(torch.maximum(size, size1))).double()
            least = torch.minimum(step.abs(), h) <= control.min_step  # it cannot shrink
            good = (ratio <= 1) | (least & torch.isfinite(ratio))
            good = good & active
            bad = active & ~good
            accepted[own] += good.long()
            rejected[own] += bad.long()
            tries += active.long()
            starts.append(torch.zeros(n, dtype=t.dtype, device=device).index_copy(0, own, t))
            sizes.append(torch.zeros(n, dtype=t.dtype, device=device).index_copy(0, own, step))
            kept.append(torch.zeros(n, dtype=torch.bool, device=device).index_copy(0, own, good))
            end = ks[-1] if pair.reuses else None
            at: Any = None
            stopped = torch.zeros_like(good)
            if watch is not None:
                end = f(t1, y1) if end is None else end
                at = within(pair, f, t, step, y, ks, end)
                for event, sample, row, theta in watch.step(at, t, step, t1, good):
                    found.append(event)
                    samples.append(int(own[sample]))
                    if self.events[event.number].terminal:
                        stopped[sample] = True
                        status[own[sample]] = EVENT
                        t1[sample], y1 = event.t, y1.index_copy(0, row, event.y[None])
                        watch.ends[int(own[sample])] = (int(accepted[own[sample]]) - 1, theta, event.number)
            while True:
                due = times[own].gather(1, place.clamp(max=width - 1)[:, None])[:, 0]
                ready = good & (place < width) & ((t1 - due) * sign >= 0)
                if not bool(ready.any()):
                    break
                value, theta = y1, torch.ones_like(t)
                if not self.land or watch is not None:
                    inside = ready & (due != t1)
                    if bool(inside.any()):
                        if at is None:
                            end = f(t1, y1) if end is None else end
                            at = within(pair, f, t, step, y, ks, end)
                        theta = torch.where(
                            inside, (due - t) / torch.where(step == 0, torch.ones_like(step), step), 1.0
                        )
                        value = torch.where(wide(inside, y).bool(), at(theta), y1)
                who, column = own[ready], place[ready]
                out[column, who] = value[ready]
                self.places[column, who] = accepted[who] - 1
                self.thetas[column, who] = theta[ready]
                place = place + ready.long()
            gone = wide(good, y).bool()
            y = torch.where(gone, y1, y)
            size = torch.where(gone, size1, size)
            t = torch.where(good, t1, t)
            stop = torch.where(good & lands, stop + 1, stop)
            done = good & ((stop >= stops.shape[1]) | stopped)
            # Padded and repeated stops are passed over.
            while True:
                passed = (stop < stops.shape[1]) & active
                passed &= stops.gather(1, stop.clamp(max=stops.shape[1] - 1)[:, None])[:, 0] == t
                if not bool(passed.any()):
                    break
                stop = stop + passed.long()
                done = done | (passed & (stop >= stops.shape[1]))
            status[own] = torch.where(done & ~stopped, FINISHED, status[own])
            active = active & ~done
            reached[own], last[own] = t, y
            stop = stop.clamp(max=stops.shape[1] - 1)
            if end is None or jumps:
                k = f(self._beside(t, y, False) if jumps else t, y)
            else:
                k = torch.where(gone, end, k)
            p, i, d = control.proportional, control.integral, control.derivative
            r, r1, r2 = (x.clamp(min=1e-10) for x in (ratio, before, before2))
            change = control.safety * r ** (-(p + i + d) * k1) * r1 ** ((p + 2 * d) * k1) * r2 ** (-d * k1)
            change = change.clamp(control.smallest, control.largest)
            change = torch.where(again, change.clamp(max=1.0), change)
            shrink = (control.safety * r ** (-k1)).clamp(control.smallest, control.safety)
            shrink = torch.where(torch.isfinite(ratio), shrink, torch.full_like(shrink, control.smallest))
            grown = step.abs() * change
            grown = torch.where(lands & (h > grown) & ~again, h, grown)
            h1 = torch.where(good, grown, torch.where(bad, step.abs() * shrink, h))
            broken = torch.where(bad, ~torch.isfinite(ratio), broken)
            again = torch.where(active, bad, again)
            h = h1.clamp(control.min_step, control.max_step)
            before2, before = torch.where(good, before, before2), torch.where(good, ratio, before)
        self.ends = {} if watch is None else watch.ends
        steps = self._compact(starts, sizes, kept, accepted)
        return Batch(
            out,
            reached,
            last,
            status,
            accepted,
            rejected,
            iterations,
            self.rows.count,
            self.rows.rows,
            steps,
            found,
            samples,
        )

    def _compact(
        self, starts: list[Tensor], sizes: list[Tensor], kept: list[Tensor], n: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The accepted steps of each row, one below the other."""
        most = int(n.max()) if len(n) else 0
        shape = (most + 1, len(n))
        t, h = (torch.zeros(shape, dtype=torch.float64, device=n.device) for _ in range(2))
        if starts:
            good = torch.stack(kept)
            index = torch.where(good, good.long().cumsum(0) - 1, most)
            t.scatter_(0, index, torch.stack(starts))
            h.scatter_(0, index, torch.stack(sizes))
        t, h = t[:most], h[:most]
        rest = torch.arange(most, device=n.device)[:, None] >= n
        ends = (t + h).gather(0, (n - 1).clamp(min=0)[None]) if most else t
        return torch.where(rest, ends if most else t, t), torch.where(rest, torch.zeros_like(h), h)

    # long: the same loop along recorded steps, with gradients
    def again(self, y: Tensor, batch: Batch, recompute: bool) -> tuple[Tensor, dict[int, Tensor]]:
        """The values along the recorded steps, with a graph, and the states at the events that ended samples."""
        f, pair = self.rows.at(None), self.pair
        starts, sizes = batch.steps
        jumps = bool(self.control.jump_t)
        places, width = self.places.tolist(), len(self.places)
        ends: dict[int, list[int]] = {}
        for sample, (step, _, _) in self.ends.items():
            ends.setdefault(step, []).append(sample)
        wanted: dict[int, list[int]] = {}
        for m in range(1, width):
            for j in {p for p in places[m] if p >= 0}:
                wanted.setdefault(j, []).append(m)
        values = [y, *[torch.full_like(y, math.nan) for _ in range(width - 1)]]
        states: dict[int, Tensor] = {}
        like = y
        side = (lambda time: self._beside(time, like, True)) if jumps else None
        k = f(self._beside(starts[0], y, False) if jumps else starts[0], y) if len(starts) else None
        for j, (t, h) in enumerate(zip(starts, sizes, strict=True)):
            if recompute:

                def run(x: Tensor, k: Tensor, t: Tensor = t, h: Tensor = h) -> tuple[Tensor, ...]:
                    x1, ks = attempt(pair, f, t, h, x, k, side)
                    return (x1, *ks[1:])

                y1, *ks = checkpoint(run, y, k, use_reentrant=False)  # type: ignore[misc]
                ks = [k, *ks]
            else:
                y1, ks = attempt(pair, f, t, h, y, k, side)
            end = ks[-1] if pair.reuses else None
            at: Any = None
            here = wanted.get(j, [])
            stepped = y1
            if j in ends or any(bool(((self.places[m] == j) & (self.thetas[m] != 1)).any()) for m in here):
                end = f(t + h, y1) if end is None else end
                at = within(pair, f, t, h, y, ks, end)
            if j in ends:
                theta = torch.ones_like(t)
                for sample in ends[j]:
                    theta[sample] = self.ends[sample][1]
                inside = at(theta)
                for sample in ends[j]:
                    states[sample] = inside[sample]
                chosen = torch.zeros(len(t), dtype=torch.bool, device=t.device)
                chosen[ends[j]] = True
                stepped = torch.where(wide(chosen, y).bool(), inside, y1)
            for m in here:
                mask = self.places[m] == j
                value = y1
                if at is not None and bool((self.thetas[m][mask] != 1).any()):
                    value = at(torch.where(mask, self.thetas[m], 1.0))
                values[m] = torch.where(wide(mask, y).bool(), value, values[m])
            y = stepped
            if end is None or jumps or j in ends:
                following = t + h
                k = f(self._beside(following, y, False) if jumps else following, y)
            else:
                k = end
        return torch.stack(values), states


class _Signs:
    """The signs of event functions, sample by sample."""

    samples = (0.25, 0.5, 0.75, 1.0)

    def __init__(self, solve: Solve, t: Tensor, y: Tensor):
        self.solve, self.t, self.y = solve, t, y
        self.ends: dict[int, tuple[int, float, int]] = {}
        self.values = self._evaluate(t, y)
        self.owners = [(n, c) for n, v in enumerate(self.values) for c in range(v.shape[1])]
        self.signs = torch.cat(self.values, 1).sign()

    def _evaluate(self, t: Tensor, y: Tensor) -> list[Tensor]:
        state = self.solve.unpack(y)
        time = t.to(time_dtype(y)).reshape(-1, *(1,) * (y.ndim - 1))
        found = []
        for event in self.solve.events:
            value = event.fn(time, state)
            if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != len(y):
                raise SchemeError(
                    "odeint: under batch='independent' an event function returns one value per sample, (batch,) or "
                    f"(batch, values); this one returned {tuple(torch.as_tensor(value).shape)} for {len(y)} samples."
                )
            found.append(value.reshape(len(y), -1).double())
        return found

    def keep(self, rows: Tensor) -> None:
        self.signs = self.signs[rows]

    def start(self) -> list[tuple[Place, int]]:
        zero = (torch.cat(self.values, 1) == 0).nonzero().tolist()
        found = []
        for sample, m in zero:
            n, c = self.owners[m]
            if self.solve.events[n].at_start:
                self.ends[sample] = (-1, 0.0, n)
                found.append((Place(n, c, float(self.t[sample]), self.y[sample]), sample))
        return found

    def step(self, at: Any, t: Tensor, h: Tensor, t1: Tensor, good: Tensor) -> list[tuple[Place, int, Tensor, float]]:
        """The events of this step, in the order of time within each sample, up to the first that ends it."""
        hits: list[tuple[int, float, int]] = []
        low = torch.zeros_like(t)
        for x in self.samples:
            theta = torch.full_like(t, x)
            new = torch.cat(self._evaluate(t + theta * h, at(theta)), 1).sign()
            crossed = (self.signs != 0) & (new != self.signs) & good[:, None]
            for sample, m in crossed.nonzero().tolist():
                event = self.solve.events[self.owners[m][0]]
                if event.direction not in (0, -int(self.signs[sample, m])):
                    continue
                place = x if new[sample, m] == 0 else self._locate(at, t, h, low, theta, sample, m)
                hits.append((sample, place, m))
            change = good[:, None] & ((new != 0) | crossed)
            self.signs = torch.where(change, new, self.signs)
            low = theta
        found = []
        over: set[int] = set()
        for sample, theta, m in sorted(hits):
            if sample in over:
                continue
            n, c = self.owners[m]
            row = torch.tensor([sample], device=t.device)
            y = at(torch.full_like(t, theta))[sample]
            found.append((Place(n, c, float(t[sample] + theta * h[sample]), y), sample, row, theta))
            if self.solve.events[n].terminal:
                over.add(sample)
        return found

    def _locate(self, at: Any, t: Tensor, h: Tensor, low: Tensor, high: Tensor, sample: int, m: int) -> float:
        """The zero within a step, by bisection."""
        a, b = float(low[sample]), float(high[sample])
        sign = float(self.signs[sample, m])
        for _ in range(52):
            x = (a + b) / 2
            theta = torch.full_like(t, x)
            value = float(torch.cat(self._evaluate(t + theta * h, at(theta)), 1)[sample, m].sign())
            if value == sign:
                a = x
            else:
                b = x
        return b
