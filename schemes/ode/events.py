"""Events: where a function of time and state crosses zero, located within a step, with the gradient of its time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import SchemeError
from .field import clock, moved, recorded, tracked
from .functions import callable_as
from .run import Run


@dataclass(frozen=True)
class Event:
    """A function of (t, y) whose zeros are to be found; several values are several events of one kind.

    Each step is sampled at four places, so a function that crosses zero and returns within a quarter of a step is
    missed; ``max_step`` bounds that. A function that touches zero without crossing it is found only where it is exactly
    zero at one of these places.

    Args:
        fn: a function of (t, y) with one or several values; under control per sample it receives the whole batch, with
            t of shape (batch, 1, ...), and returns (batch,) or (batch, values).
        direction: 1 for crossings from below, -1 from above, in the direction of the solve; 0 for both.
        terminal: whether the solve ends there.
        at_start: whether a zero at the start counts; otherwise the solve leaves it first.

    Example:
        >>> import torch, schemes
        >>> fall = lambda t, y: torch.stack((y[1], -torch.ones_like(y[0])))
        >>> ground = schemes.Event(lambda t, y: y[0], direction=-1)
        >>> y0, t = torch.tensor([2.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 9.0], dtype=torch.float64)
        >>> found = schemes.integrate(fall, y0, t, events=[ground])
        >>> found.status, round(float(found.events[0].t), 6)
        ('event', 2.0)
    """

    fn: Callable[[Any, Any], Tensor]
    direction: int = 0
    terminal: bool = True
    at_start: bool = False

    def __post_init__(self):
        callable_as("Event: fn", self.fn, "t", "y")
        for name in ("terminal", "at_start"):
            if not isinstance(getattr(self, name), bool):
                raise SchemeError(f"Event: {name} is {getattr(self, name)!r}, want True or False.")
        if self.direction not in (-1, 0, 1):
            raise SchemeError(f"Event: direction is {self.direction!r}, want -1, 0 or 1.")

    def value(self, number: int, t: Tensor, y: Any) -> Tensor:
        """The value of the function, checked.

        Args:
            number: the event's place in the list of events, for messages.
            t: the time.
            y: the state.

        Raises:
            SchemeError: it is not a tensor of real numbers.
        """
        value = self.fn(t, y)
        if not isinstance(value, Tensor):
            # A number read from a tensor has lost its gradient, and a list of them too.
            raise SchemeError(
                f"odeint: event {number} returned a {type(value).__name__}, want a tensor (of several: torch.stack), "
                "whose gradient that of the time is made of."
            )
        if not value.is_floating_point():
            raise SchemeError(
                f"odeint: event {number} returned {value.dtype}, want real floating-point numbers that cross zero: "
                "y[0] - 1, not y[0] < 1."
            )
        if not value.numel():
            raise SchemeError(f"odeint: event {number} returned no value, and so nothing would cross zero.")
        return value


def listed(events: Any) -> list[Event]:
    """Events as a list.

    Raises:
        SchemeError: they are not events.
    """
    if events is None or isinstance(events, Event):
        return [] if events is None else [events]
    for event in events if isinstance(events, (list, tuple)) else [events]:
        if not isinstance(event, Event):
            raise SchemeError(f"odeint: events holds a {type(event).__name__}, want events: [schemes.Event(f), ...].")
    return [*events]


def refuse_nan(number: int, value: float, t: float, sample: int | None = None) -> None:
    """Raises a SchemeError where the value of an event function is NaN, which has no sign."""
    if value != value:
        where = f"t={t:.6g}" + ("" if sample is None else f", sample {sample}")
        raise SchemeError(
            f"odeint: event {number} is NaN at {where}; it wants a value on both sides of its zero, "
            "such as y - 1 in place of log(y)."
        )


class Place(NamedTuple):
    """Where an event function was found to be zero, before its gradient is attached."""

    number: int
    component: int
    t: float
    y: Tensor


class Found(NamedTuple):
    """An event.

    Attributes:
        number: number of the event in the list of events.
        component: number of the value of its function.
        t: its time, a tensor that carries the gradient.
        y: the state there.
        grazing: whether the function has slope zero there, so that the time has no derivative.
        sample: the sample, under control per sample.
    """

    number: int
    component: int
    t: Tensor
    y: Any
    grazing: bool
    sample: int | None = None


class Watch:
    """Detects events step by step.

    Args:
        events: the events to detect.
        unpack: turns a packed state into the user's.
    """

    samples = (0.25, 0.5, 0.75, 1.0)

    def __init__(self, events: Sequence[Event], unpack: Callable[[Tensor], Any]):
        self.events, self.unpack = events, unpack
        self.signs: list[float] = []
        self.owners: list[tuple[int, int]] = []
        self.places: list[Place] = []
        self.sizes: list[int] | None = None

    def _values(self, t: float, y: Tensor) -> list[Tensor]:
        state = self.unpack(y)
        found = []
        before = None if y.is_inference() else y._version
        for n, event in enumerate(self.events):
            # In double for the secants, which take differences of nearly equal values.
            found.append(event.value(n, clock(t, y), state).detach().reshape(-1).to(y.device, torch.float64))
            if before is not None and y._version != before:
                raise SchemeError(f"odeint: event {n} changes its argument y in place; write to a copy, y.clone().")
        sizes = [len(part) for part in found]
        if self.sizes is not None and sizes != self.sizes:
            raise SchemeError(f"odeint: the events had {self.sizes} values at the start, {sizes} at t={t:.6g}.")
        self.sizes = sizes
        return found

    def _known(self, values: list[float], t: float) -> list[float]:
        for (n, _), value in zip(self.owners, values, strict=True):
            refuse_nan(n, value, t)
        return values

    def values(self, t: float, y: Tensor) -> list[float]:
        """The values of all event functions, one after another."""
        with torch.no_grad():
            return self._known(torch.cat(self._values(t, y)).tolist(), t)

    def start(self, run: Run, y: Tensor) -> bool:
        """Detects events at the start; returns whether the solve ends there."""
        with torch.no_grad():
            parts = self._values(run.t, y)
        self.owners = [(n, c) for n, part in enumerate(parts) for c in range(len(part))]
        values = self._known(torch.cat(parts).tolist(), run.t)
        self.signs = [(v > 0) - (v < 0) for v in values]
        for (n, c), v in zip(self.owners, values, strict=True):
            # Otherwise the solve leaves zero first, so a bouncing ball is not caught on the ground that it starts from.
            if v == 0 and self.events[n].at_start:
                run.events.append(Place(n, c, run.t, y))
                if self.events[n].terminal:
                    run.status = "event"
                    return True
        return False

    def step(self, run: Run, piece: Any) -> bool:
        """Detects events in a step; returns whether the solve ends within it."""
        with torch.no_grad():
            rows = []
            # The end itself, not t0 + h, which may differ from it by rounding.
            times = [piece.t0 + x * piece.h if x < 1 else piece.t1 for x in self.samples]
            for t in times:
                rows.append(torch.cat(self._values(t, piece.at(t))))
            table = torch.stack(rows).tolist()
        hits: list[tuple[float, int]] = []
        before = piece.t0
        for t, row in zip(times, table, strict=True):
            for m, value in enumerate(self._known(row, t)):
                old, new = self.signs[m], (value > 0) - (value < 0)
                event = self.events[self.owners[m][0]]
                # A function that starts at zero has no sign yet; taking its first sign is not a crossing.
                if old and new != old and event.direction in (0, -old):
                    hits.append((t if new == 0 else self._locate(piece, before, t, m), m))
                if new or (old and new != old):
                    self.signs[m] = new
            before = t
        # By time, not by the order of the functions: a terminal event hides events after it, but none before it.
        hits.sort(key=lambda hit: hit[0] * (1 if piece.h > 0 else -1))
        for t, m in hits:
            n, c = self.owners[m]
            run.events.append(Place(n, c, t, piece.at(t)))
            if self.events[n].terminal:
                run.status = "event"
                run.t, run.y = t, run.events[-1].y
                return True
        return False

    def _locate(self, piece: Any, a: float, b: float, m: int) -> float:
        """The zero of value m between two times of a step: secants that keep the bracket, with bisections between."""

        def value(t: float) -> float:
            return self.values(t, piece.at(t))[m]

        with torch.no_grad():
            fa, fb = value(a), value(b)
            side = 0
            for n in range(100):
                if abs(b - a) <= 4e-16 * max(abs(a), abs(b)) or fb == fa:
                    break
                # Every third iteration is a bisection, so that no function can slow the secants down to a crawl.
                t = (a + b) / 2 if n % 3 == 2 else b - fb * (b - a) / (fb - fa)
                if not min(a, b) < t < max(a, b):
                    t = (a + b) / 2
                    if t in (a, b):
                        break
                ft = value(t)
                if ft == 0:
                    return t
                if (ft > 0) == (fb > 0):
                    b, fb = t, ft
                    # The Illinois rule: an end that stays twice has its value halved, which pulls the next secant
                    # towards it.
                    fa, side = (fa / 2 if side == 1 else fa), 1
                else:
                    a, fa = t, ft
                    fb, side = (fb / 2 if side == -1 else fb), -1
        # The end behind the crossing, so that the function has its new sign there.
        return b


def attach(
    fn: Callable[[Any, Any], Tensor],
    component: int,
    func: Callable[[Any, Tensor], Tensor],
    unpack: Callable[[Tensor], Any],
    t: float,
    y: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, bool]:
    """The time and the state of an event with their gradients, and whether it grazes.

    With g(t, y(t)) = 0 a change of y moves the time by -dg / (dg/dt + dg/dy f): a step of Newton's method whose
    denominator carries no gradient, and whose value is zero. The first such step is right to first order, a second one
    from there to second order. The state moves with the time along the flow.

    Raises:
        SchemeError: a gradient is requested of an event at which the function has slope zero.
    """
    with torch.enable_grad():
        # Separate leaves: only the slopes at the event are needed, not the graph behind it.
        time = clock(t, y).requires_grad_()
        at = y.detach().requires_grad_()
        g = fn(time, unpack(at)).reshape(-1)[component]
        parts = torch.autograd.grad(g, [time, at], allow_unused=True) if g.requires_grad else (None, None)
    with torch.no_grad():
        f = func(clock(t, y), y.detach())
        own = float(parts[0]) if parts[0] is not None else 0.0
        along = 0.0 if parts[1] is None else float((parts[1].conj() * f).real.sum())
        # A measure of what the slope would be if its terms did not cancel.
        size = abs(own) + (0.0 if parts[1] is None else float((parts[1].abs() * f.abs()).sum()))
    slope = own + along
    # Far above rounding: locating the event leaves that much of a slope of zero.
    grazing = abs(slope) <= 1e-6 * size or size == 0
    found = torch.tensor(t, dtype=dtype, device=y.device)
    if not recorded():
        return found, y, grazing
    at_event = clock(t, y)
    g = fn(at_event, unpack(y)).reshape(-1)[component]
    if not tracked(g):
        return found, y, grazing
    if grazing:
        raise SchemeError(
            f"odeint: at the event at t={t:.6g} the event function has slope zero (it grazes), so its time has no "
            "gradient; solve under torch.no_grad(), or move the event."
        )
    # Zero in value: the time stays as located, and only its derivatives are new.
    shift = newton(g, slope, y)
    there = moved(func, at_event, y, shift)
    g = fn(at_event + shift.to(at_event.dtype), unpack(there)).reshape(-1)[component]
    shift = shift + newton(g, slope, y)
    return found + shift.to(dtype), moved(func, at_event, y, shift), grazing


def newton(g: Tensor, slope: Any, y: Tensor) -> Tensor:
    """-dg / slope: zero, with the derivatives of a step of Newton's method; in the real dtype of a state."""
    return (-(g - g.detach()) / slope).to(y.device, y.real.dtype if y.is_complex() else y.dtype)
