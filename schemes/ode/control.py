r"""Step-size control: how an error is measured, and the step size that follows from it.

The error estimate e of a step from x to y is measured as ``norm(e / (atol + rtol max(|x|, |y|)))``, entry by entry, by
default in the root mean square; a step is accepted where this ratio is at most 1. The next step size is

    h * clip(safety * r_n^(-(p + i + d) / k) * r_{n-1}^((p + 2 d) / k) * r_{n-2}^(-d / k), smallest, largest),

with k one more than the lower order of the pair: a PID controller on the logarithm of the ratio (Gustafsson 1991,
ACM TOMS 17, 533-554; Soderlind 2003, ACM TOMS 29, 1-26). After a rejection the step shrinks by the proportion of the
last ratio alone.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import SchemeError
from .trees import rms


@dataclass
class Control:
    """Tolerances, limits and the controller of one solve.

    Args:
        rtol: relative tolerance, a number or a tensor that broadcasts against the state.
        atol: absolute tolerance, likewise.
        norm: maps the weighted error of a state to a number; None takes the root mean square.
        first_step: size of the first step; None finds one.
        min_step: steps of this size are accepted whatever their error.
        max_step: upper bound on a step.
        max_steps: upper bound on attempted steps of a solve.
        safety: factor below 1 that keeps the error clear of the tolerance.
        smallest: smallest change from one step to the next.
        largest: largest change.
        proportional: the controller's p; the default, with the default integral part, is Hairer's damped choice.
        integral: its i.
        derivative: its d.
        step_t: times onto which the solver steps.
        jump_t: times at which func jumps: it is evaluated on either side of them.
    """

    rtol: float | Tensor = 1e-7
    atol: float | Tensor = 1e-9
    norm: Callable[[Tensor], Tensor] | None = None
    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = math.inf
    max_steps: int = 100_000
    safety: float = 0.9
    smallest: float = 0.2
    largest: float = 10.0
    proportional: float = 0.2
    integral: float = 0.65
    derivative: float = 0.0
    step_t: list[float] = field(default_factory=list)
    jump_t: list[float] = field(default_factory=list)
    exacting: bool = field(init=False, default=False)  # whether no error is allowed where the state is zero

    def __post_init__(self):
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            low = float(value.min()) if isinstance(value, Tensor) else value
            # Written so that NaN is refused too.
            if not 0 <= low < math.inf:
                raise SchemeError(f"odeint: {name} is {low:g}, want a number that is not negative.")
            self.exacting = self.exacting or (name == "atol" and low == 0)
        # Entry by entry, where they have several.
        if bool(((torch.as_tensor(self.rtol) == 0) & (torch.as_tensor(self.atol) == 0)).any()):
            raise SchemeError("odeint: rtol and atol are both 0; no step meets that.")
        for name in ("max_step", "safety", "smallest", "largest", "max_steps"):
            if not getattr(self, name) > 0:
                raise SchemeError(f"odeint: {name} is {getattr(self, name)}, want a positive number.")
        if self.first_step is not None and not 0 < abs(self.first_step) < math.inf:
            raise SchemeError(f"odeint: first_step is {self.first_step:g}, want a positive number.")
        for name in ("proportional", "integral", "derivative"):
            if not math.isfinite(getattr(self, name)):
                raise SchemeError(f"odeint: {name} is {getattr(self, name):g}, want a finite number.")
        if not self.integral > 0:
            # With a constant error, steps would shrink by the safety factor, one after another, down to nothing.
            raise SchemeError(f"odeint: integral is {self.integral:g}, want a positive number: it holds the step size.")
        if not 0 <= self.min_step <= self.max_step or self.min_step == math.inf:
            raise SchemeError(
                f"odeint: min_step is {self.min_step:g} and max_step {self.max_step:g}, want 0 <= min_step <= max_step."
            )
        if not (self.smallest < 1 <= self.largest and self.safety <= 1):
            raise SchemeError(
                f"odeint: smallest, largest and safety are {self.smallest:g}, {self.largest:g} and {self.safety:g}; "
                "want smallest < 1 <= largest and safety <= 1."
            )

    def scale(self, size: Tensor, rows: Tensor | None = None) -> Tensor:
        """atol + rtol size; ``size`` is overwritten.

        Args:
            size: absolute values of a state.
            rows: the samples that it holds, where some of the batch have been dropped.
        """
        # In place: states are large, and no caller needs the sizes afterwards.
        scale = size.mul_(_of(self.rtol, rows, size)).add_(_of(self.atol, rows, size))
        # An error of 0 is allowed even where no other is; 0 / 0 would be NaN.
        return scale.clamp_(min=torch.finfo(scale.dtype).tiny) if self.exacting else scale

    def measure(self, weighted: Tensor) -> Tensor:
        """The norm of a weighted error, still on the device."""
        return rms(weighted) if self.norm is None else self.norm(weighted)

    def ratio(self, error: Tensor, size0: Tensor, size1: Tensor) -> float:
        """The error of a step in units of the allowed error, from the absolute values at its ends; overwrites error."""
        weighted = error.div_(self.scale(torch.maximum(size0, size1)))
        # The one place in a step that waits for the device: the host has to know whether to go on.
        ratio = float(self.measure(weighted))
        if ratio < 0:  # every step would be kept
            raise SchemeError(f"odeint: norm returned {ratio:g}, want a number that is not negative.")
        return ratio

    def factor(self, ratios: list[float], order: int) -> float:
        """The factor of the step size after an accepted step; the last ratio comes first."""
        # A missing ratio counts as 1, which changes nothing; the floor avoids dividing by an error of 0.
        r, r1, r2 = (max(x, 1e-10) for x in (*ratios, 1.0, 1.0, 1.0)[:3])
        k = order + 1
        p, i, d = self.proportional, self.integral, self.derivative
        change = r ** (-(p + i + d) / k) * r1 ** ((p + 2 * d) / k)
        if d:
            change *= r2 ** (-d / k)
        return min(self.largest, max(self.smallest, self.safety * change))

    def shrink(self, ratio: float, order: int) -> float:
        """The factor of the step size after a rejected step."""
        # How far it was from being finite is not known, so it shrinks as far as is allowed.
        if not ratio < math.inf:  # inf or nan
            return self.smallest
        return min(self.safety, max(self.smallest, self.safety * ratio ** (-1 / (order + 1))))


def _of(tolerance: float | Tensor, rows: Tensor | None, size: Tensor) -> float | Tensor:
    """The tolerance of these samples, where it has one for each."""
    each = rows is not None and isinstance(tolerance, Tensor) and tolerance.ndim == size.ndim
    return tolerance[rows] if each and len(tolerance) > 1 else tolerance  # type: ignore[index, arg-type]


class Pace:
    """The step size of one solve, as it evolves.

    Args:
        control: tolerances and limits.
        order: the lower order of the pair.
        h: the first step size, with the sign of the direction.
        sign: the direction.
    """

    def __init__(self, control: Control, order: int, h: float, sign: float):
        self.control, self.order, self.sign = control, order, sign
        self.ratios: list[float] = []
        self.rejected = self.lands = self.stuck = False
        self.broken = False  # whether the last rejected step was not finite
        self.h = self._within(h)

    def _within(self, h: float) -> float:
        return self.sign * min(max(abs(h), self.control.min_step), self.control.max_step)

    def propose(self, t: float, target: float) -> tuple[float, float]:
        """The size and the end of the next step, no further than the target; sets ``lands``, whether it reaches it."""
        rest = target - t
        size, length = abs(self.h), abs(rest)
        # A step that is a hundredth longer, rather than one of a hundredth after it; a limit is kept to rounding.
        self.lands = min(size * 1.01, max(size, self.control.max_step * (1 + 1e-12))) >= length
        if self.lands:
            return rest, target
        h = rest / 2 if size * 2 > length else self.h  # halves, so that no tiny step is left over
        return h, t + h

    def accepts(self, h: float, ratio: float) -> bool:
        """Whether a step of that size and error is kept; sets the size of the next."""
        control = self.control
        least = min(abs(h), abs(self.h)) <= control.min_step  # it cannot shrink
        if ratio <= 1 or (least and ratio < math.inf):
            self.ratios = [ratio, *self.ratios[:2]]
            factor = control.factor(self.ratios, self.order)
            # Not larger right after a rejection, or the same step would be tried and rejected again.
            h1 = h * (min(factor, 1.0) if self.rejected else factor)
            if self.lands and abs(self.h) > abs(h1) and not self.rejected:
                h1 = self.h  # a step cut short says little about the next
            self.h, self.rejected = self._within(h1), False
            return True
        # Rejected twice at the least size: a further attempt would be the same.
        self.stuck = self.rejected and least
        self.rejected, self.broken = True, not ratio < math.inf
        self.h = self._within(h * control.shrink(ratio, self.order))
        # At t = 0 no step is too short for the number format, down to those that cannot shrink any more.
        self.stuck = self.stuck or abs(self.h) < sys.float_info.min
        return False


def first_step(f: Callable[[float, Tensor], Any], t: float, y: Tensor, k: Tensor, span: float, order: int, c: Control):
    """A first step size whose error is likely to be allowed, with one more evaluation; carries the sign of ``span``.

    Source: Hairer, Norsett, Wanner 1993, Solving Ordinary Differential Equations I, II.4.
    """
    scale = c.scale(y.abs())
    # One transfer for both.
    d0, d1 = torch.stack((c.measure(y / scale), c.measure(k / scale))).tolist()
    # A start at zero, or at rest, gives no scale of time; nor does a slope of which no error is allowed.
    h = 1e-6 if d0 < 1e-5 or d1 < 1e-5 or not 0 < d0 / d1 < math.inf else 0.01 * d0 / d1
    h = min(h, abs(span))
    # With a graph where the steps have one: a compiled field is then compiled only once.
    slope = f(t + math.copysign(h, span), y + math.copysign(h, span) * k).detach()
    d2 = float(c.measure((slope - k).div_(scale))) / h if h else 0.0
    if not math.isfinite(d2):
        return math.copysign(h * 1e-3, span)
    top = max(d1, d2)
    h1 = max(1e-6, h * 1e-3) if top <= 1e-15 else (0.01 / top) ** (1 / (order + 1))
    return math.copysign(min(100 * h, h1, abs(span)), span)
