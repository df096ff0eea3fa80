"""Reversible rules: steps of any size that can be undone, with the gradient of a step.

Three rules, each with its step, its inverse and the gradient of a step, which shares its evaluations with the inverse:

* McCallum and Foster over any Runge-Kutta method: y' = c y + (1 - c) z + Psi_h(t, z), z' = z - Psi_{-h}(t + h, y').
* reversible Heun: z' = 2 y - z + h F(t, z), y' = y + h/2 (F(t, z) + F(t + h, z')).
* the asynchronous leapfrog: m = x + h/2 v, u = F(t + h/2, m), v' = v + 2 eta (u - v), x' = m + h/2 v'.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import SchemeError
from ..multistep import Alf, ReversibleHeun
from ..reversible import Reversible
from ..runge_kutta import RungeKutta, combine, terms
from ..scheme import Scheme
from .field import Field, clock
from .pairs import total
from .reads import Reads, vjp

State = tuple[Tensor, ...]


class Tape:
    """Evaluates the field with a graph, and accumulates the gradients of the tensors that it reads."""

    def __init__(self, func: Callable[[Any, Tensor], Tensor], reads: Reads):
        self.func, self.reads = func, reads
        self.gradients: list[Tensor | None] = [None] * len(reads)

    def evaluate(self, t: float, y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The slope, and a function that propagates its gradient back to y (and to the tensors the field reads)."""
        # A leaf: the graph covers one evaluation only, and is freed with the function that is returned.
        y = y.detach().requires_grad_()
        with torch.enable_grad():
            k = self.reads.evaluate(self.func, clock(t, y), y)
        return k.detach(), lambda grad: self.back(k, y, grad)

    def back(self, k: Tensor, y: Tensor, grad: Tensor) -> Tensor:
        """The gradient of y from that of k = f(y); gradients of the other tensors that f reads are accumulated."""
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
        """The difference of two streams that follow one solution, or None."""
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
        # The base's own companion: its error is that of the increment, which is what a step adds.
        error = total(ks, self.errors, h, y) if self.errors else None
        z1 = z - total(self._slopes(f, t + h, -h, y1, self.live), self.weights, -h, z)
        return (y1, z1), error

    def _increment(self, tape: Tape, t: float, h: float, y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Psi_h(t, y), and a function that propagates its gradient back."""
        ks: list[Tensor] = []
        sends: list[Callable[[Tensor], Tensor]] = []
        for c, row in zip(self.nodes[: self.live], self.rows, strict=False):
            k, send = tape.evaluate(t + c * h, combine(y, ks, tuple((j, h * a) for j, a in row)))
            ks.append(k)
            sends.append(send)

        def back(grad: Tensor) -> Tensor:
            # Backwards through the stages by hand: from each slope to the stage's input, and from there to the slopes
            # that it is a sum of.
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
        # The last half of the step first: it reads y1, which is known.
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
        # The sum is a new tensor, so z is subtracted in place.
        z1 = torch.add(k * h, y, alpha=2).sub_(z)
        k1 = f(t + h, z1)
        return (y + (0.5 * h) * (k + k1), z1, k1), (0.5 * h) * (k1 - k)

    def back(self, tape: Tape, t: float, h: float, s: State, g: State) -> tuple[State, State]:
        (y1, z1, k1), (gy1, gz1, gk1) = s, g
        # The next step reads k1 too, and gk1 is the gradient from there: the graph is built here, once for both.
        k1, send = tape.evaluate(t + h, z1)
        gz1 = gz1 + send(gk1 + (0.5 * h) * gy1)
        z, gz = 2 * y1 - z1 - h * k1, -gz1
        with torch.no_grad():
            # Without a graph: its gradient is computed in the step before, whose last slope it was.
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
        # u again, from the same point: m is half a step back from x1, as it was half a step ahead of x.
        v = (v1 - 2 * eta * u) / (1 - 2 * eta)
        gv1 = gv1 + (0.5 * h) * gx
        gx = gx + send(2 * eta * gv1)
        return (torch.add(m, v, alpha=-0.5 * h), v), (gx, (1 - 2 * eta) * gv1 + (0.5 * h) * gx)

    def back_start(self, tape: Tape, t: float, s: State, g: State) -> Tensor:
        _, send = tape.evaluate(t, s[0])
        return g[0] + send(g[1])

    def spread(self, s: State) -> Tensor | None:
        return None  # a velocity that drifts shows in the error estimate


def rule(scheme: Scheme) -> Rule | None:
    """The reversible rule of a scheme; None where there is none."""
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
