"""Reversible solves: the backward pass makes the states again from the last one, along the recorded step sizes.

Three rules, each with its step, its inverse and the gradient of a step, which shares its evaluations with the inverse:

* McCallum and Foster over any Runge-Kutta method: y' = c y + (1 - c) z + Psi_h(t, z), z' = z - Psi_{-h}(t + h, y').
* reversible Heun: z' = 2 y - z + h F(t, z), y' = y + h/2 (F(t, z) + F(t + h, z')).
* the asynchronous leapfrog: m = x + h/2 v, u = F(t + h/2, m), v' = v + 2 eta (u - v), x' = m + h/2 v'.

Memory is the step sizes and the values given out. Gradients are those of the discrete solution, up to rounding that the
inverse amplifies (by 1/c a step in the first).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import SchemeError
from ..multistep import Alf, ReversibleHeun
from ..reversible import Reversible
from ..runge_kutta import RungeKutta, combine, terms
from ..scheme import Scheme
from .control import Control
from .field import Field, clock
from .joint import begin, stalled, stops
from .pairs import total
from .reads import Autocast, Reads, vjp
from .run import Run

State = tuple[Tensor, ...]


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
        found, *rest = vjp(k, [y, *self.reads.tensors], grad)
        for n, g in enumerate(rest):
            if g is not None:
                self.gradients[n] = g if self.gradients[n] is None else self.gradients[n] + g  # type: ignore[operator]
        return torch.zeros_like(y) if found is None else found


class Rule(ABC):
    """A reversible step of any size; the first stream is the value."""

    order: int

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


class McCallumFoster(Rule):
    """Any Runge-Kutta method, with the coupling c."""

    def __init__(self, base: RungeKutta, coupling: float):
        a, b, c, b_hat = base.tableau.floats()
        self.nodes, self.rows, self.weights = c, tuple(terms(row) for row in a), terms(b)
        self.live = base.live
        self.errors = terms([v - u for u, v in zip(b, b_hat, strict=True)]) if b_hat else ()
        self.order, self.c = base.pair_order, coupling

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


def rule(scheme: Scheme) -> Rule:
    """The reversible rule of a scheme; a Runge-Kutta method gets the construction of McCallum and Foster.

    Raises:
        SchemeError: there is none.
    """
    if isinstance(scheme, RungeKutta):
        return McCallumFoster(scheme, 0.999)
    if isinstance(scheme, Reversible) and isinstance(scheme.base, RungeKutta):
        return McCallumFoster(scheme.base, scheme.coupling)
    if isinstance(scheme, Alf):
        return Leapfrog(scheme.eta)
    if isinstance(scheme, ReversibleHeun):
        return Heun()
    raise SchemeError(
        f"odeint: gradient='reverse' has no rule for {scheme}; it takes a Runge-Kutta method, reversible(rk4), "
        "reversible_heun or alf."
    )


def march(
    r: Rule,
    f: Field,
    y: Tensor,
    times: Sequence[float],
    control: Control | None,
    grids: Sequence[Sequence[float]] | None,
) -> tuple[Run, State]:
    """A solve by a reversible rule, and its last streams; steps are chosen, or given as a grid per interval."""
    run = Run([y], times[0], y)
    t = times[0]
    if grids is not None:
        state = r.start(f, t, y)
        for grid in grids:
            for t0, t1 in pairwise(grid):
                run.steps.append((t0, t1 - t0))
                state, _ = r.step(f, t0, t1 - t0, state)
            run.ys.append(state[0])
        run.accepted = len(run.steps)
        run.t, run.y = times[-1], state[0]
        return run, state
    assert control is not None
    ahead, jumps = stops(times, control, True)
    if jumps:
        raise SchemeError("odeint: gradient='reverse' knows no jump_t; take gradient='checkpoint'.")
    _, pace = begin(run, f, y, t, times[-1], r.order, control)
    if run.failed:
        return run, (y,)
    state, stop, size = r.start(f, t, y), 0, y.abs()
    wanted = set(times)
    while stop < len(ahead):
        h, t1 = pace.propose(t, ahead[stop])
        if stalled(run, pace, t, t1, control):
            break
        state1, error = r.step(f, t, h, state)
        if error is None:
            raise SchemeError("odeint: this method has no error estimate; give a step_size, or take dopri5 or tsit5.")
        size1 = state1[0].abs()
        if not pace.accepts(h, control.ratio(error, size, size1)):
            run.rejected += 1
            continue
        run.accepted += 1
        run.steps.append((t, h))
        t, state, size = t1, state1, size1
        if pace.lands:
            if ahead[stop] in wanted:
                run.ys.append(state[0])
            stop += 1
    run.t, run.y = t, state[0]
    return run, state


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, back: "Backward", forward: Callable[..., tuple[Run, State]], y0: Tensor, *reads: Tensor):
        run, state = forward(y0.detach())
        ctx.back, ctx.steps, ctx.streams = back, run.steps, len(state)
        ys = torch.stack(run.ys)
        run.ys = []  # the stacked values are the only ones kept
        ctx.save_for_backward(*state, *reads)
        return ys

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        state = ctx.saved_tensors[: ctx.streams]
        return None, None, *ctx.back(ctx.steps, state, grad)


class Backward:
    """The backward pass of a reversible solve."""

    def __init__(self, r: Rule, func: Callable[[Any, Tensor], Tensor], reads: Reads, times: Sequence[float]):
        self.rule, self.func, self.reads, self.times = r, func, reads, times
        self.precision = Autocast()

    def __call__(self, steps: list[tuple[float, float]], state: State, grad: Tensor) -> list[Tensor | None]:
        with torch.no_grad(), self.precision.again(grad.device.type):
            tape = Tape(self.func, self.reads)
            s: State = tuple(state)
            g: State = (grad[-1], *(torch.zeros_like(x) for x in s[1:]))
            places = self._places(steps)
            for n in reversed(range(len(steps))):
                t, h = steps[n]
                s, g = self.rule.back(tape, t, h, s, g)
                for i in places.get(n, ()):
                    g = (g[0] + grad[i], *g[1:])
            found = self.rule.back_start(tape, self.times[0], s, g)
        return [found, *tape.gradients]

    def _places(self, steps: list[tuple[float, float]]) -> dict[int, list[int]]:
        """Which values stand at the start of which step."""
        starts = {t: n for n, (t, _) in enumerate(steps)}
        places: dict[int, list[int]] = {}
        for i, t in enumerate(self.times[:-1]):
            places.setdefault(starts[t], []).append(i)
        return places


def solved(
    scheme: Scheme,
    func: Callable[[Any, Tensor], Tensor],
    y0: Tensor,
    times: Sequence[float],
    control: Control | None,
    check: Callable[[Run], None],
    grids: Sequence[Sequence[float]] | None = None,
    known: Sequence[Tensor] = (),
) -> tuple[Tensor, Run]:
    """The values at all times, stacked, and the run; the backward pass makes the states again."""
    r, f = rule(scheme), Field(func, y0)
    reads = Reads(func, clock(times[0], y0), y0, known) if torch.is_grad_enabled() else None
    runs: list[Run] = []

    def forward(y: Tensor) -> tuple[Run, State]:
        with torch.no_grad():
            run, state = march(r, f, y, times, control, grids)
        check(run)
        run.evaluations = f.count[0]
        runs.append(run)
        return run, state

    if reads is None or not (y0.requires_grad or len(reads)):
        run, _ = forward(y0)
        return torch.stack(run.ys), run
    back = Backward(r, func, reads, times)
    ys = _Reverse.apply(back, forward, y0, *reads.tensors)
    return ys, runs[0]  # type: ignore[return-value]
