"""Reversible solves: the backward pass makes the states again from the last one, along the recorded step sizes.

Three rules, each with its step, its inverse and the gradient of a step, which shares its evaluations with the inverse:

* McCallum and Foster over any Runge-Kutta method: y' = c y + (1 - c) z + Psi_h(t, z), z' = z - Psi_{-h}(t + h, y').
* reversible Heun: z' = 2 y - z + h F(t, z), y' = y + h/2 (F(t, z) + F(t + h, z')).
* the asynchronous leapfrog: m = x + h/2 v, u = F(t + h/2, m), v' = v + 2 eta (u - v), x' = m + h/2 v'.

Memory is the step sizes and the values given out. Gradients are those of the discrete solution, up to rounding that the
inverse amplifies (by 1/c a step in the first). The same rules serve solves whose graph is stored, so that all ways to
differentiate see one solution.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import SchemeError
from ..multistep import Alf, ReversibleHeun
from ..reversible import Reversible
from ..runge_kutta import RungeKutta, combine, terms
from ..scheme import Scheme
from .control import Control
from .dense import Hermite
from .field import Field, clock, first_bad
from .joint import begin, stalled, stops
from .pairs import total
from .reads import Autocast, Reads, once, vjp
from .run import Run
from .trees import rms

State = tuple[Tensor, ...]

# Two streams that follow one solution differ by about its error. No step size keeps a stiff field from driving them
# apart; where they differ by so many tolerances (or, in fixed steps, by this part of their size) the solve is stopped.
PARTED, APART = 100.0, 0.1
# Relative error of a state made again at which the backward pass is stopped.
DRIFT = 1e-3


class Tape:
    """Evaluations of the field with a graph, and what they add to the gradients of what it reads."""

    def __init__(self, func: Callable[[Any, Tensor], Tensor], reads: Reads):
        self.func, self.reads = func, reads
        self.gradients: list[Tensor | None] = [None] * len(reads)

    def evaluate(self, t: float, y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The slope, and a function that sends a gradient of it back to y (and to what the field reads)."""
        y = y.detach().requires_grad_()
        with torch.enable_grad():
            k = self.reads.evaluate(self.func, clock(t, y), y)
        return k.detach(), lambda grad: self.back(k, y, grad)

    def back(self, k: Tensor, y: Tensor, grad: Tensor) -> Tensor:
        """The gradient of y from that of k = f(y); those of what else f reads are added up."""
        found, *rest = vjp(k, [y, *self.reads.tensors], grad)
        for n, g in enumerate(rest):
            if g is not None:
                self.gradients[n] = g if self.gradients[n] is None else self.gradients[n] + g  # type: ignore[operator]
        return torch.zeros_like(y) if found is None else found


class Rule(ABC):
    """A reversible step of any size; the first stream is the value."""

    order: int
    estimates = True  # whether a step comes with an error estimate

    @abstractmethod
    def start(self, f: Field, t: float, y: Tensor) -> State:
        """The streams at the start."""

    @abstractmethod
    def step(self, f: Field, t: float, h: float, s: State) -> tuple[State, Tensor | None]:
        """The streams after a step, and the error estimate (None where there is none)."""

    @abstractmethod
    def back(self, tape: Tape, t: float, h: float, s: State, g: State) -> tuple[State, State]:
        """The streams before a step and their gradients, from those after it."""

    def back_start(self, tape: Tape, t: float, s: State, g: State) -> Tensor:
        """The gradient of the value at the start."""
        return g[0]

    def spread(self, s: State) -> Tensor | None:
        """How far apart two streams are that follow one solution, or None."""
        return s[0] - s[1]


class McCallumFoster(Rule):
    """Any Runge-Kutta method, with the coupling c."""

    def __init__(self, base: RungeKutta, coupling: float):
        a, b, c, b_hat = base.tableau.floats()
        self.nodes, self.rows, self.weights = c, tuple(terms(row) for row in a), terms(b)
        self.live = base.live
        self.errors = terms([v - u for u, v in zip(b, b_hat, strict=True)]) if b_hat else ()
        self.order, self.c, self.estimates = base.pair_order, coupling, bool(self.errors)

    def start(self, f: Field, t: float, y: Tensor) -> State:
        return y, y

    def _slopes(self, f: Any, t: float, h: float, y: Tensor, stages: int) -> list[Tensor]:
        ks: list[Tensor] = []
        for c, row in zip(self.nodes[:stages], self.rows, strict=False):
            ks.append(f(t + c * h, combine(y, ks, tuple((j, h * a) for j, a in row))))
        return ks

    def step(self, f: Field, t: float, h: float, s: State) -> tuple[State, Tensor | None]:
        y, z = s
        ks = self._slopes(f, t, h, z, len(self.nodes) if self.errors else self.live)
        y1 = total(ks, self.weights, h, y).add_(y, alpha=self.c).add_(z, alpha=1 - self.c)
        error = total(ks, self.errors, h, y) if self.errors else None
        z1 = z - total(self._slopes(f, t + h, -h, y1, self.live), self.weights, -h, z)
        return (y1, z1), error

    def _increment(self, tape: Tape, t: float, h: float, y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Psi_h(t, y), and what sends its gradient back."""
        ks: list[Tensor] = []
        sends: list[Callable[[Tensor], Tensor]] = []
        for c, row in zip(self.nodes[: self.live], self.rows, strict=False):
            k, send = tape.evaluate(t + c * h, combine(y, ks, tuple((j, h * a) for j, a in row)))
            ks.append(k)
            sends.append(send)

        def back(grad: Tensor) -> Tensor:
            gradients: list[Tensor | None] = [None] * self.live
            for j, b in self.weights:
                gradients[j] = (h * b) * grad
            here = torch.zeros_like(grad)
            for i in reversed(range(self.live)):
                if (g := gradients[i]) is None:
                    continue
                at = sends[i](g)
                here = here + at
                for j, a in self.rows[i]:
                    more = (h * a) * at
                    gradients[j] = more if gradients[j] is None else gradients[j] + more  # type: ignore[operator]
            return here

        return total(ks, self.weights, h, y), back

    def back(self, tape: Tape, t: float, h: float, s: State, g: State) -> tuple[State, State]:
        (y1, z1), (gy1, gz1) = s, g
        increment, send = self._increment(tape, t + h, -h, y1)
        z = z1 + increment
        gy1 = gy1 + send(-gz1)
        increment, send = self._increment(tape, t, h, z)
        y = (y1 - (1 - self.c) * z - increment) / self.c
        gz = gz1 + (1 - self.c) * gy1 + send(gy1)
        return (y, z), (self.c * gy1, gz)

    def back_start(self, tape: Tape, t: float, s: State, g: State) -> Tensor:
        return g[0] + g[1]


class Heun(Rule):
    """Reversible Heun; streams (y, z, F(t, z)), the last of which the inverse evaluates again."""

    order = 1

    def start(self, f: Field, t: float, y: Tensor) -> State:
        return y, y, f(t, y)

    def step(self, f: Field, t: float, h: float, s: State) -> tuple[State, Tensor | None]:
        y, z, k = s
        z1 = torch.add(k * h, y, alpha=2).sub_(z)
        k1 = f(t + h, z1)
        return (y + (0.5 * h) * (k + k1), z1, k1), (0.5 * h) * (k1 - k)

    def back(self, tape: Tape, t: float, h: float, s: State, g: State) -> tuple[State, State]:
        (y1, z1, k1), (gy1, gz1, gk1) = s, g
        # k1 stands in the next step too, and gk1 is what that sends: its graph is made here, once for both.
        k1, send = tape.evaluate(t + h, z1)
        gz1 = gz1 + send(gk1 + (0.5 * h) * gy1)
        z, gz = 2 * y1 - z1 - h * k1, -gz1
        with torch.no_grad():
            k = tape.func(clock(t, z), z)
        y = y1 - (0.5 * h) * (k + k1)
        return (y, z, k), (gy1 + 2 * gz1, gz, (0.5 * h) * gy1 + h * gz1)

    def back_start(self, tape: Tape, t: float, s: State, g: State) -> Tensor:
        _, send = tape.evaluate(t, s[1])
        return g[0] + g[1] + send(g[2])


class Leapfrog(Rule):
    """The asynchronous leapfrog of MALI; streams (x, v)."""

    order = 1

    def __init__(self, eta: float):
        self.eta = eta

    def start(self, f: Field, t: float, y: Tensor) -> State:
        return y, f(t, y)

    def step(self, f: Field, t: float, h: float, s: State) -> tuple[State, Tensor | None]:
        x, v = s
        m = torch.add(x, v, alpha=0.5 * h)
        u = f(t + 0.5 * h, m)
        v1 = torch.add((2 * self.eta) * u, v, alpha=1 - 2 * self.eta)
        return (torch.add(m, v1, alpha=0.5 * h), v1), (0.5 * h) * (v1 - v)

    def back(self, tape: Tape, t: float, h: float, s: State, g: State) -> tuple[State, State]:
        (x1, v1), (gx, gv1) = s, g
        eta = self.eta
        m = torch.add(x1, v1, alpha=-0.5 * h)
        u, send = tape.evaluate(t + 0.5 * h, m)
        v = (v1 - 2 * eta * u) / (1 - 2 * eta)
        gv1 = gv1 + (0.5 * h) * gx
        gx = gx + send(2 * eta * gv1)
        return (torch.add(m, v, alpha=-0.5 * h), v), (gx, (1 - 2 * eta) * gv1 + (0.5 * h) * gx)

    def back_start(self, tape: Tape, t: float, s: State, g: State) -> Tensor:
        _, send = tape.evaluate(t, s[0])
        return g[0] + send(g[1])

    def spread(self, s: State) -> Tensor | None:
        return None  # a velocity that strays shows in the error estimate


def rule(scheme: Scheme) -> Rule | None:
    """The reversible rule that a scheme is; None where it is none."""
    if isinstance(scheme, Reversible) and isinstance(scheme.base, RungeKutta):
        return McCallumFoster(scheme.base, scheme.coupling)
    if isinstance(scheme, Alf):
        return Leapfrog(scheme.eta)
    if isinstance(scheme, ReversibleHeun):
        return Heun()
    return None


def rule_for(scheme: Scheme) -> Rule:
    """The rule that solves under gradient="reverse": a Runge-Kutta method gets McCallum and Foster's construction.

    Raises:
        SchemeError: there is none.
    """
    found = McCallumFoster(scheme, 0.999) if isinstance(scheme, RungeKutta) else rule(scheme)
    if found is None:
        raise SchemeError(
            f"odeint: gradient='reverse' has no rule for {scheme}; it takes a Runge-Kutta method, reversible(rk4), "
            "reversible_heun or alf."
        )
    return found


def steps(r: Rule, again: bool) -> Callable[..., tuple[State, Tensor | None]]:
    """The rule's step, or the same with a graph that is made again in the backward pass."""
    if not again:
        return r.step

    def step(f: Field, t: float, h: float, s: State) -> tuple[State, Tensor | None]:
        errors: list[Tensor | None] = []

        def run(*s: Tensor) -> State:
            found, error = r.step(f, t, h, s)
            errors.append(None if error is None else error.detach())
            return found

        return checkpoint(run, *s, use_reentrant=False), errors[0]  # type: ignore[return-value]

    return step


# long: the loop of a solve and of its undoing, which share the recorded steps
def march(
    r: Rule,
    f: Field,
    y: Tensor,
    times: Sequence[float],
    control: Control | None,
    grids: Sequence[Sequence[float]] | None = None,
    *,
    again: bool = False,
    dense: bool = False,
    events: Any = None,
    callbacks: Any = None,
) -> tuple[Run, State, dict[int, State]]:
    """A solve by a reversible rule; steps are chosen, or given as a grid per interval.

    As elsewhere with fixed steps, the streams start anew where the step size changes.

    Returns:
        The run, its last streams, and those that stood before the streams started anew, by the number of the step.
    """
    run, t, kept = Run([y], times[0], y), times[0], {}
    step = steps(r, again)
    if grids is not None:
        state, size = r.start(f, t, y), None
        for grid in grids:
            for t0, t1 in pairwise(grid):
                h = t1 - t0
                if size is not None and abs(h - size) > 1e-9 * abs(h):
                    kept[len(run.steps)] = state
                    state = r.start(f, t0, state[0])
                run.steps.append((t0, h))
                state, _ = step(f, t0, h, state)
                size = h
            run.ys.append(state[0])
            with torch.no_grad():
                apart, value = r.spread(state), rms(state[0].abs())
                if apart is not None and not float(rms(apart)) <= APART * float(value) + 1e-12:
                    run.status, run.t, run.y = "unstable", grid[-1], state[0]
                    return run, state, kept
        run.accepted = len(run.steps)
        run.t, run.y = times[-1], state[0]
        return run, state, kept
    assert control is not None
    ahead, jumps = stops(times, control, True)
    if jumps:
        raise SchemeError("odeint: reversible schemes know no jump_t; take step_t, or a pair such as tsit5.")
    k, pace = begin(run, f, y, t, times[-1], r.order, control)
    if run.failed or (events is not None and events.start(run, y)):
        return run, (y,), kept
    state, stop, size0 = r.start(f, t, y), 0, y.detach().abs()
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
            ratio = control.ratio(error.detach().clone(), size0, size1)
        if not pace.accepts(h, ratio):
            run.rejected += 1
            if instead is not None:
                instead(t, state[0], h)
            continue
        run.accepted += 1
        run.steps.append((t, h))
        if after is not None:
            after(t, state[0], h)
        with torch.no_grad():
            apart = r.spread(state1)
            if apart is not None:
                scale = control.scale(torch.maximum(size0, size1))
                if not float(control.measure(apart.div_(scale))) <= PARTED:
                    run.status = "unstable"
                    break
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
        run.sample = first_bad(*state1)  # type: ignore
    return run, state, kept


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, back: "Backward", forward: Callable[..., Any], y0: Tensor, *reads: Tensor):
        run, state, kept = forward(y0.detach())
        ctx.back, ctx.steps, ctx.streams = back, run.steps, len(state)
        ctx.kept = {n: i for i, n in enumerate(kept)}
        ys = torch.stack(run.ys)
        run.ys = []  # the stacked values are the only ones kept
        ctx.save_for_backward(ys, *state, *(x for s in kept.values() for x in s), *reads)
        return ys

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        (ys, *saved), n = ctx.saved_tensors, ctx.streams
        kept = {step: tuple(saved[n * (i + 1) : n * (i + 2)]) for step, i in ctx.kept.items()}
        return None, None, *once("reverse", ctx.back(ctx.steps, ys.detach(), tuple(saved[:n]), kept, grad))


class Backward:
    """The backward pass of a reversible solve."""

    def __init__(self, r: Rule, func: Callable[[Any, Tensor], Tensor], reads: Reads, times: Sequence[float]):
        self.rule, self.func, self.reads, self.times = r, func, reads, times
        self.precision = Autocast()

    def __call__(
        self, steps: list[tuple[float, float]], ys: Tensor, state: State, kept: dict[int, State], grad: Tensor
    ) -> list[Tensor | None]:
        with torch.no_grad(), self.precision.again(grad.device.type):
            tape = Tape(self.func, self.reads)
            s: State = tuple(state)
            g: State = (grad[-1], *(torch.zeros_like(x) for x in s[1:]))
            places = {t: i for i, t in enumerate(self.times[:-1])}
            for n in reversed(range(len(steps))):
                t, h = steps[n]
                s, g = self.rule.back(tape, t, h, s, g)
                if n in kept:  # the streams started anew from their value
                    first = self.rule.back_start(tape, t, s, g)
                    s = tuple(kept[n])
                    g = (first, *(torch.zeros_like(x) for x in s[1:]))
                if t in places:
                    i = places[t]
                    self._close(s[0], ys[i], t)
                    g = (g[0] + grad[i], *g[1:])
            found = self.rule.back_start(tape, self.times[0], s, g)
        return [found, *tape.gradients]

    def _close(self, again: Tensor, was: Tensor, t: float) -> None:
        """Refuses gradients of states that are not those of the forward pass."""
        drift, size = torch.stack((rms((again - was).abs()), rms(was.abs()))).tolist()
        if not drift <= DRIFT * max(size, 1e-30) + 1e-12:
            raise SchemeError(
                f"odeint: gradient='reverse' made the state at t={t:g} again with a relative error of "
                f"{drift / max(size, 1e-30):.1g}, want {DRIFT:g}; the field is too stiff or the solve too long for an "
                "inverse: take gradient='checkpoint', or more times in t."
            )


def solved(
    r: Rule,
    func: Callable[[Any, Tensor], Tensor],
    y0: Tensor,
    times: Sequence[float],
    control: Control | None,
    check: Callable[[Run], None],
    grids: Sequence[Sequence[float]] | None = None,
    *,
    gradient: str = "reverse",
    known: Sequence[Tensor] = (),
    **options: Any,
) -> tuple[Tensor, Run]:
    """The values at all times, stacked, and the run.

    Args:
        r: the rule.
        func: the field of packed states.
        y0: the packed state.
        times: strictly monotone.
        control: tolerances and limits; None where grids are given.
        check: raises where a run failed.
        grids: one grid per interval.
        gradient: "reverse" makes the states again; "store" and "checkpoint" as elsewhere.
        known: tensors that func is known to read.
        options: passed to `march`.
    """
    f = Field(func, y0)
    runs: list[Run] = []

    def forward(y: Tensor) -> tuple[Run, State, dict[int, State]]:
        found = march(r, f, y, times, control, grids, **options)
        found[0].evaluations = f.count[0]
        check(found[0])
        runs.append(found[0])
        return found

    if gradient != "reverse":
        options["again"] = gradient == "checkpoint" and torch.is_grad_enabled()
        return torch.stack(forward(y0)[0].ys), runs[0]
    reads = Reads(func, clock(times[0], y0), y0, known) if torch.is_grad_enabled() else None
    if reads is None or not (y0.requires_grad or len(reads)):
        with torch.no_grad():
            return torch.stack(forward(y0)[0].ys), runs[0]
    ys = _Reverse.apply(Backward(r, func, reads, times), forward, y0, *reads.tensors)
    return ys, runs[0]  # type: ignore[return-value]
