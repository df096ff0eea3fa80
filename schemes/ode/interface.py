"""odeint: initial value problems by any scheme, with torchdiffeq's signature and shapes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import SchemeError
from ..runge_kutta import RungeKutta
from ..scheme import Scheme
from . import fixed as fixed_steps
from . import options as reading
from . import reverse
from .events import Event, Found, Place, Watch, attach
from .field import clock
from .gradients import known_gradient, solved
from .independent import NAMES, Batch, Rows, Solve
from .pairs import Pair
from .run import Run
from .solution import Solution
from .trees import Packing

# torchdiffeq's names of methods that the language calls otherwise, and of those that it has not.
ALIASES = {"adaptive_heun": "heun2"}
ABSENT = {
    "fehlberg2": "heun2 or bosh3",
    "explicit_adams": "ab2",
    "implicit_adams": "dopri8, as implicit methods are not there yet",
    "fixed_adams": "ab2",
    "scipy_solver": "dopri8",
}
CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


def odeint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    method: str | Scheme | None = "dopri5",
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    options: dict[str, Any] | None = None,
    gradient: str = "store",
    batch: str = "joint",
    event_fn: Any = None,
) -> Any:
    r"""Solves y' = func(t, y), y(t[0]) = y0, for the values at all times t.

    Cost: an embedded pair evaluates its stages once per step that is tried, less one where its last stage is the next
    step's first; two more choose the first step. Memory by ``gradient``, see there.

    Args:
        func: the vector field; t is a tensor without dimensions, or (batch, 1, ...) under control per sample.
        y0: a tensor, or a tuple, dict or other tree of tensors.
        t: strictly monotone times, either way; may need a gradient.
        method: any expression of the language of schemes. An embedded pair (bosh3, dopri5, dopri8, fehlberg45, heun2,
            tsit5, verner89) chooses its steps, unless options give them; all others take fixed steps.
        rtol: relative tolerance, a number, a tensor, or one for each tensor of y0.
        atol: absolute tolerance, likewise.
        options: of adaptive solves: first_step, min_step, max_step, max_steps, safety, smallest, largest, proportional,
            integral, derivative, norm, step_t, jump_t, outputs ("step" or "interpolate"), context (see ``batch``). Of
            fixed steps: one of step_size, steps (per interval), grid, grid_constructor; interp ("linear", "cubic"; None
            steps onto every time), perturb. torchdiffeq's names stand for ours. Of the adjoint: adjoint_rtol,
            adjoint_atol, adjoint_method, adjoint_options, adjoint_params.
        gradient: "store" keeps the graph of the accepted steps; "checkpoint" keeps a state per step and makes the rest
            again; "reverse" keeps step sizes alone, by reversible(method), reversible_heun or alf; "adjoint" solves the
            adjoint equation, right to the tolerances.
        batch: "joint" takes one step size for all, "independent" one for each sample along the first dimension. With
            ``options["context"]``, a tree of tensors with that first dimension, func is called as func(t, y, context)
            and sees the samples alone that are not done.
        event_fn: a function of (t, y), an `Event`, or several; the solve then goes on from t[0] in the direction of
            t[1] until one of its values crosses zero.

    Returns:
        The values at all times, stacked along the first dimension, in the structure of y0. With an event the pair
        (time of the event, values at the start and there).

    Raises:
        SchemeError: arguments that do not fit, or a solve that cannot go on, with its time and sample.

    Example:
        >>> import torch, schemes
        >>> t = torch.linspace(0, 1, 3, dtype=torch.float64)
        >>> y = schemes.odeint(lambda t, y: -y, torch.ones((), dtype=torch.float64), t)
        >>> [round(float(x), 6) for x in y]
        [1.0, 0.606531, 0.367879]
    """
    events = () if event_fn is None else event_fn if isinstance(event_fn, (list, tuple)) else (event_fn,)
    events = [e if isinstance(e, Event) else Event(e, at_start=True) for e in events]
    if events and not any(e.terminal for e in events):
        raise SchemeError("odeint: no event of event_fn is terminal, so the solve would not end; use integrate.")
    found = integrate(
        func,
        y0,
        t,
        method=method,
        rtol=rtol,
        atol=atol,
        options=options,
        gradient=gradient,
        batch=batch,
        events=events,
        _endless=bool(events),
    )
    if not events:
        return found.y
    if batch == "independent":
        ends = {e.sample: e for e in found.events if events[e.number].terminal}
        times = torch.stack([ends[n].t for n in range(len(ends))])
    else:
        times = found.events[-1].t
    return times, found.y


def integrate(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    method: str | Scheme | None = "dopri5",
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    options: dict[str, Any] | None = None,
    gradient: str = "store",
    batch: str = "joint",
    events: Sequence[Event] = (),
    dense: bool = False,
    check: bool = True,
    _endless: bool = False,
) -> Solution:
    """What `odeint` does, with everything that it found: status, counts, events, the continuous solution.

    Args:
        func: as in `odeint`, and so are the others.
        y0: the state at the start.
        t: the times; of shape (batch, times) too, under ``batch="independent"``.
        method: a scheme.
        rtol: relative tolerance.
        atol: absolute tolerance.
        options: as in `odeint`.
        gradient: how to differentiate.
        batch: one step size, or one per sample.
        events: what to look for on the way; a terminal one ends the solve.
        dense: whether the continuous solution is kept, which ``solution(t)`` evaluates (gradients "store" and
            "checkpoint", one step size).
        check: whether a solve that cannot go on raises; else its ``status`` says so, and what was found is returned.

    Returns:
        The solution.

    Example:
        >>> import torch, schemes
        >>> t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        >>> found = schemes.integrate(lambda t, y: -y, torch.ones((), dtype=torch.float64), t, dense=True)
        >>> found.status, round(float(found(0.5)), 6), round(float(found.derivative(0.5)), 6)
        ('finished', 0.606531, -0.606531)
    """
    return _Problem(
        func, y0, t, method, rtol, atol, options, gradient, batch, list(events), dense, check, _endless
    ).solve()


class _Problem:
    """The arguments of a solve, checked and packed."""

    # long: reads and checks each option in the order in which messages should come
    def __init__(
        self,
        func: Any,
        y0: Any,
        t: Any,
        method: Any,
        rtol: Any,
        atol: Any,
        options: Any,
        gradient: str,
        batch: str,
        events: list[Event],
        dense: bool,
        check: bool,
        endless: bool,
    ):
        if not callable(func):
            raise SchemeError(f"odeint: func is a {type(func).__name__}, want a function of (t, y).")
        if batch not in ("joint", "independent"):
            raise SchemeError(f"odeint: batch is {batch!r}, want 'joint' or 'independent'.")
        self.gradient, self.apart = known_gradient(gradient), batch == "independent"
        self.user, self.events, self.dense, self.check, self.endless = func, events, dense, check, endless
        self.packing = Packing(y0, self.apart)
        self.options = dict(options or {})
        self.back = {k: self.options.pop(k) for k in list(self.options) if k.startswith("adjoint_")}
        self.scheme = _scheme(method)
        self.rtol, self.atol = rtol, atol
        if self.scheme.nodes is None:  # adaptive(...) brings its own tolerances
            own: Any = self.scheme
            if reading.is_fixed(self.options) or own.backend != "schemes":
                raise SchemeError(f"odeint: {own} chooses its steps by itself; for fixed ones take {own.method}.")
            self.rtol, self.atol, self.scheme = own.rtol, own.atol, own.pair.scheme
            self.options.setdefault("max_steps", own.max_steps)
            self.gradient = "adjoint" if own.adjoint else self.gradient
        self.times = self._times(t)
        self.y0 = self.packing.pack(y0, "y0")
        self.func = func if self.packing.alone else self._packed
        fixed = reading.is_fixed(self.options)
        paired = isinstance(self.scheme, RungeKutta) and self.scheme.tableau.b_hat is not None
        self.rule = reverse.rule_for(self.scheme) if self.gradient == "reverse" else reverse.rule(self.scheme)
        self.adaptive = (paired if self.rule is None else self.rule.estimates) and not fixed
        if self.apart and not (paired and self.adaptive):
            raise SchemeError(
                f"odeint: batch='independent' wants an embedded pair that chooses its steps, not {self.scheme} with "
                "fixed ones; take dopri5 or tsit5."
            )
        if self.gradient not in ("store", "checkpoint") and (self.apart or dense):
            what = "batch='independent'" if self.apart else "dense=True"
            raise SchemeError(f"odeint: {what} takes gradient='store' or 'checkpoint', not {self.gradient!r}.")
        if self.apart and dense:
            raise SchemeError("odeint: dense=True wants batch='joint'; ask for more times instead.")
        if "context" in self.options and not self.apart:
            raise SchemeError(
                "odeint: the option context belongs to batch='independent'; else func reads it by itself."
            )

    # --- arguments

    def _times(self, t: Any) -> Tensor:
        if not isinstance(t, Tensor):
            t = torch.as_tensor(t, dtype=torch.float64)
        if not t.is_floating_point():
            raise SchemeError(f"odeint: t is of {t.dtype}, want floating-point numbers.")
        if t.ndim != 1 and not (self.apart and t.ndim == 2):
            raise SchemeError(f"odeint: t is of shape {tuple(t.shape)}, want a row of times.")
        if self.endless and t.shape[-1] != 2:
            raise SchemeError(f"odeint: an event takes two times (start and direction), got {t.shape[-1]}.")
        if not t.numel():
            raise SchemeError("odeint: t is empty, want the time of y0 at least.")
        steps = t.detach().diff()
        if not (bool((steps > 0).all()) or bool((steps < 0).all())) or not bool(torch.isfinite(t.detach()).all()):
            raise SchemeError("odeint: t must be finite and strictly increasing or decreasing.")
        return t

    def _packed(self, t: Any, y: Tensor, *rest: Any) -> Tensor:
        return self.packing.pack(self.user(t, self.packing.unpack(y), *rest))

    def _check(self, run: Run) -> None:
        if run.failed and self.check:
            raise SchemeError(f"odeint: {run.reason()}; {self._advice(run.status, bool(run.accepted))}.")

    def _advice(self, status: str, began: bool) -> str:
        if status == "not_finite" and not began:
            return "look at y0 and at what func makes of it"
        if status == "unstable":
            return "take gradient='checkpoint' with a pair such as tsit5, or smaller steps"
        more = " (no event was found on the way)" if self.endless else ""
        return f"raise rtol and atol, or max_steps{more}, or ask for what was found: integrate(..., check=False)"

    # --- the ways to solve

    def solve(self) -> Solution:
        if self.apart:
            return self._independent()
        numbers: list[float] = self.times.detach().tolist()
        if len(numbers) == 1 or self.y0.numel() == 0:
            return self._trivial(numbers)
        if self.gradient in ("adjoint", "reverse") and self.events:
            return self._event_again(numbers)
        return self._joint(numbers)

    def _moved(self) -> Tensor:
        """y0, from which a gradient of the first time flows along the field."""
        if not (self.adaptive and self.times.requires_grad and torch.is_grad_enabled()):
            return self.y0
        return self.y0 - self._shift(0) * self.func(clock(float(self.times[0].detach()), self.y0), self.y0)  # type: ignore

    def _shift(self, i: int) -> Tensor:
        """Zero, with the gradient of a time."""
        t = self.times[..., i]
        shift = (t - t.detach()).to(self.y0.device, self.y0.real.dtype if self.y0.is_complex() else self.y0.dtype)
        return shift.reshape(-1, *(1,) * (self.y0.ndim - 1)) if shift.ndim else shift

    def _with_times(self, ys: Tensor, numbers: Sequence[float]) -> Tensor:
        """Values whose times carry a gradient, along the field."""
        if not (self.adaptive and self.times.requires_grad and torch.is_grad_enabled()):
            return ys
        rows = [ys[0] + self._shift(0) * self.func(clock(numbers[0], ys[0]), ys[0])]  # type: ignore
        for i in range(1, len(ys)):
            rows.append(ys[i] + self._shift(i) * self.func(clock(numbers[i], ys[i]), ys[i]))  # type: ignore
        return torch.stack(rows)

    def _callbacks(self) -> Any:
        given = [getattr(self.user, name, None) for name in CALLBACKS]
        if not any(given):
            return None

        def wrapped(call: Any) -> Any:
            return call and (lambda t, y, h: call(clock(t, y), self.packing.unpack(y), clock(abs(h), y)))

        return [wrapped(call) for call in given]

    # long: one way to differentiate after the other, a branch each
    def _joint(self, numbers: list[float]) -> Solution:
        y, watch = self._moved(), Watch(self.events, self.packing.unpack) if self.events else None
        times = [numbers[0], float("inf") if numbers[1] > numbers[0] else float("-inf")] if self.endless else numbers
        known = self.back.get("adjoint_params") or ()
        if self.adaptive:
            control = reading.control(self.options, self.rtol, self.atol, self.packing, self.y0)
            if self.rule is not None:
                if self.gradient == "adjoint":
                    raise SchemeError(f"odeint: gradient='adjoint' wants an embedded pair, not {self.scheme}.")
                ys, run = reverse.solved(
                    self.rule,
                    self.func,  # type: ignore
                    y,
                    times,
                    control,
                    self._check,
                    gradient=self.gradient,
                    known=tuple(known),
                    dense=self.dense,
                    events=watch,
                    callbacks=self._callbacks(),
                )
                return self._solution(ys, run, numbers)
            pair = Pair(self.scheme)
            ys, run = solved(
                self.func,  # type: ignore
                y,
                times,
                pair,
                control,
                gradient=self.gradient,
                land=reading.lands(self.options, pair),
                known=tuple(known),
                check=self._check,
                back=self._adjoint(control, pair),
                dense=self.dense,
                events=watch,
                callbacks=self._callbacks(),
            )
            return self._solution(ys, run, numbers)
        return self._fixed(y, times, numbers, watch, known)

    def _adjoint(self, control: Any, pair: Pair) -> dict[str, Any]:
        """How the adjoint equation is solved."""
        if self.gradient != "adjoint":
            return {}
        given = dict(self.back)
        given.pop("adjoint_params", None)
        options = dict(given.pop("adjoint_options", None) or {})
        norm = options.pop("norm", None)
        if norm not in (None, "seminorm"):
            raise SchemeError(f"odeint: the adjoint's norm is {norm!r}, want 'seminorm' or None.")
        scheme = _scheme(given.pop("adjoint_method", None) or self.scheme)
        number = {k: given.pop(f"adjoint_{k}", None) for k in ("rtol", "atol")}
        if given:
            raise SchemeError(
                f"odeint: unknown {', '.join(given)}; the adjoint has adjoint_rtol, adjoint_atol, "
                "adjoint_method, adjoint_options and adjoint_params."
            )
        own = {k: getattr(control, k) if v is None else v for k, v in number.items()}
        flat = {k: float(v.min()) if isinstance(v, Tensor) else float(v) for k, v in own.items()}
        inner = {k: v for k, v in self.options.items() if k not in ("norm", "first_step", "outputs")} | options
        alone = Packing(torch.zeros(1, dtype=self.y0.real.dtype if self.y0.is_complex() else self.y0.dtype))
        return {
            "method": Pair(scheme),
            "control": reading.control(inner, flat["rtol"], flat["atol"], alone, self.y0),
            "norm": norm,
        }

    # long: one way to differentiate after the other, a branch each
    def _fixed(self, y: Tensor, times: list[float], numbers: list[float], watch: Any, known: Any) -> Solution:
        given = reading.fixed(self.options)
        size = given.step_size
        grid: list[list[float]] | None
        if self.endless:
            if size is None:
                raise SchemeError(f"odeint: an event under {self.scheme}, which takes fixed steps, wants a step_size.")
            grid = None
        elif given.grid is not None or given.constructor is not None:
            points = given.grid
            if points is None:
                points = given.constructor(self.user, self.packing.unpack(self.y0), self.times.detach())
            row: list[float] = points.detach().reshape(-1).tolist()
            if row[0] != numbers[0] or row[-1] != numbers[-1]:
                raise SchemeError(
                    f"odeint: the grid goes from {row[0]:g} to {row[-1]:g}, "
                    f"want from {numbers[0]:g} to {numbers[-1]:g}."
                )
            grid = [row]
        elif given.interp is not None and size is not None:
            grid = [_torchdiffeq_grid(numbers, size)]
        else:
            grid = fixed_steps.grids(numbers, size, given.steps)
        if self.gradient == "adjoint":
            raise SchemeError(
                f"odeint: gradient='adjoint' wants an embedded pair that chooses its steps, not {self.scheme} with "
                "fixed ones; take dopri5, or gradient='checkpoint' for the gradient of this very solve."
            )
        if self.gradient == "reverse":
            if self.times.requires_grad:
                raise SchemeError(
                    "odeint: gradient='reverse' with fixed steps has no gradient of t; take 'checkpoint'."
                )
            if grid is None or len(grid) != len(times) - 1:
                raise SchemeError(
                    "odeint: gradient='reverse' steps onto every time; want step_size or steps, no interp."
                )
            assert self.rule is not None
            ys, run = reverse.solved(self.rule, self.func, y, times, None, self._check, grid, known=tuple(known))  # type: ignore
            return self._solution(ys, run, numbers)
        moving = None
        if self.times.requires_grad and torch.is_grad_enabled():
            if grid is None or len(grid) != len(times) - 1:
                raise SchemeError(
                    "odeint: t needs a gradient; fixed steps have it where they end on every time "
                    "(step_size or steps, no interp, no grid, no event)."
                )
            moving = self.times
        again = self.gradient == "checkpoint" and torch.is_grad_enabled()
        stepper = fixed_steps.Stepper(self.scheme, self.func, y, again, given.perturb)  # type: ignore
        run = fixed_steps.solve(
            stepper,
            times,
            grid,
            moving=moving,
            size=size,
            interp=given.interp or ("cubic" if grid is not None and len(grid) != len(times) - 1 else None),
            max_steps=given.max_steps,
            dense=self.dense,
            events=watch,
            callbacks=self._callbacks(),
        )
        self._check(run)
        return self._solution(torch.stack(run.ys), run, numbers)

    def _event_again(self, numbers: list[float]) -> Solution:
        """An event under a gradient that makes states again: found first, then solved up to."""
        gradient = self.gradient
        self.gradient = "store"
        with torch.no_grad():
            first = self._joint(numbers)
        self.gradient = gradient
        if first.status != "event":
            self.events = []
            return self._joint(numbers)
        event = first.events[-1]
        whole, self.times, end = self.times, self.times, float(first.reached)
        sign = 1.0 if end >= numbers[0] else -1.0
        inner = [] if self.endless else [x for x in numbers[1:] if (end - x) * sign > 0]
        if end == numbers[0]:
            self.gradient = "store"
            return self._joint(numbers)
        row = [numbers[0], *inner, end]
        events, endless = self.events, self.endless
        # The first time alone moves with the user's.
        head = whole[: len(row) - 1]
        self.times = torch.cat((head, torch.tensor([end], dtype=head.dtype, device=head.device)))
        if self.endless and whole.requires_grad:
            self.times = torch.cat((whole[:1], self.times[-1:].detach()))
        self.events, self.endless = [], False
        found = self._joint(row)
        self.events, self.endless, self.times = events, endless, whole
        flat = self.packing.pack(found.last) if not self.packing.alone else found.last
        placed = self._attached(Place(event.number, event.component, end, flat))
        ys = torch.cat([self.packing.pack(_row(found.y, slice(0, -1))) if not self.packing.alone else found.y[:-1]])
        if self.endless:
            ys = torch.stack((ys[0], placed[1]))
        found.y = self.packing.unpack(ys, (len(ys),)) if not self.packing.alone else ys
        found.status, found.events = "event", [placed[0]]
        found.t = self.times[: len(ys)] if not self.endless else torch.stack((self.times[0], placed[0].t))
        found.last = placed[0].y
        return found

    def _attached(self, place: Place, sample: int | None = None) -> tuple[Found, Tensor]:
        """An event with its gradients, and its packed state."""
        event = self.events[place.number]
        t, y, grazing = attach(
            event.fn,
            place.component,
            self.func,  # type: ignore
            self.packing.unpack,
            place.t,
            place.y,
            self.times.dtype,  # type: ignore
        )
        return Found(place.number, place.component, t, self.packing.unpack(y), grazing, sample), y

    def _solution(self, ys: Tensor, run: Run, numbers: list[float]) -> Solution:
        t, last = self.times[: len(ys)], run.y
        found: list[Found] = []
        if not self.endless:
            ys = self._with_times(ys, numbers)
        for n, place in enumerate(run.events):
            event, y = self._attached(place)
            found.append(event)
            if n == len(run.events) - 1 and run.status == "event":
                last = y
                if self.endless:
                    ys = torch.stack((ys[0], y))
                    t = torch.stack((self.times[0].detach(), event.t.to(self.times)))
        if run.status == "finished":
            last = ys[-1]
        return Solution(
            t,
            self.packing.unpack(ys, (len(ys),)),
            run.status,
            run.t,
            self.packing.unpack(last),
            run.accepted,
            run.rejected,
            run.evaluations,
            events=found,
            steps=run.steps,
            _segments=run.segments,
            _packing=self.packing,
        )

    def _trivial(self, numbers: list[float]) -> Solution:
        """One time, or no entries: a step of Euler's shows what a gradient depends on."""
        y, ys = self.y0, [self.y0]
        if len(numbers) > 1:
            k = self.func(clock(numbers[0], y), y)
            ys += [y + (b - numbers[0]) * k for b in numbers[1:]]  # type: ignore
        run = Run(ys, numbers[-1], ys[-1])
        stacked = torch.stack(ys)
        return Solution(
            self.times,
            self.packing.unpack(stacked, (len(ys),)),
            "finished",
            run.t,
            self.packing.unpack(ys[-1]),
            0,
            0,
            int(len(numbers) > 1),
            _packing=self.packing,
        )

    # --- a step size per sample

    # long: one way to differentiate after the other, a branch each
    def _independent(self) -> Solution:
        n = len(self.y0)
        times = self.times.detach().to(self.y0.device, torch.float64)
        times = times.expand(n, -1) if times.ndim == 1 else times
        if times.shape[0] != n:
            raise SchemeError(f"odeint: t has {times.shape[0]} rows of times for {n} samples.")
        if times.shape[1] == 1 or self.y0.numel() == 0:
            return self._trivial(times[0].tolist() if n else [0.0] * times.shape[1])
        if self.endless:
            sign = torch.sign(times[:, 1:] - times[:, :1])
            times = torch.cat((times[:, :1], times[:, :1] + sign * torch.inf), 1)
        context = self.options.pop("context", None)
        control = reading.control(self.options, self.rtol, self.atol, self.packing, self.y0)
        pair = Pair(self.scheme)
        y = self.y0
        grad = torch.is_grad_enabled()
        rows = Rows(self.func, context, n)  # type: ignore
        if grad and self.times.requires_grad:
            y = y - self._shift(0) * rows.at(None)(times[:, 0], y)
        solve = Solve(
            rows,
            pair,
            control,
            times,
            land=reading.lands(self.options, pair),
            events=self.events,
            unpack=self.packing.unpack,
            early=self.check,
        )
        batch = solve.run(y.detach())
        self._check_batch(batch)
        ys, states = batch.ys, {}
        if grad:
            probe = rows.at(None)(times[:, 0], y)
            grad = y.requires_grad or probe.requires_grad
        if grad:
            ys, states = solve.again(y, batch, self.gradient == "checkpoint")
        if grad and self.times.requires_grad and not self.endless:
            f = rows.at(None)
            ys = torch.stack([ys[i] + self._shift(i) * f(times[:, i], ys[i]) for i in range(len(ys))])
        found = self._sample_events(batch, states, y, rows)
        if self.endless:
            ends = {e.sample: e for e in found if self.events[e.number].terminal}
            last = torch.stack([ends[s].y if self.packing.alone else self.packing.pack(_lead(ends[s].y))[0]
                                for s in range(n)]) if len(ends) == n else batch.y  # fmt: skip
            ys = torch.stack((ys[0], last))
        return Solution(
            self.times,
            self.packing.unpack(ys, (len(ys),)),
            [NAMES[int(s)] for s in batch.status],
            batch.t,
            self.packing.unpack(batch.y),
            batch.accepted,
            batch.rejected,
            batch.evaluations,
            batch.rows,
            events=found,
            steps=batch.steps,
        )

    def _check_batch(self, batch: Batch) -> None:
        failed = (batch.status > 2).nonzero()[:, 0].tolist()
        if not self.check:
            return
        if failed:
            n = failed[0]
            run = Run([], float(batch.t[n]), batch.y[n], NAMES[int(batch.status[n])], n)
            run.accepted, run.rejected = int(batch.accepted[n]), int(batch.rejected[n])
            others = f" ({len(failed)} samples failed)" if len(failed) > 1 else ""
            raise SchemeError(f"odeint: {run.reason()}{others}; {self._advice(run.status, bool(run.accepted))}.")

    def _sample_events(self, batch: Batch, states: dict[int, Tensor], y0: Tensor, rows: Rows) -> list[Found]:
        """The events of all samples, those that ended one with their gradient."""
        found = []
        for place, sample in zip(batch.events, batch.samples, strict=True):
            event = self.events[place.number]
            state = place.y
            if event.terminal:
                state = states.get(sample, y0[sample] if place.t == batch.t[sample] and not states else place.y)
            one = torch.tensor([sample], device=y0.device)
            call = rows.at(one)

            def func(t: Any, y: Tensor, call: Any = call) -> Tensor:
                return call(t.reshape(1), y[None])[0]

            def fn(t: Any, y: Any, event: Event = event) -> Tensor:
                return event.fn(t.reshape(1, *(1,) * (y0.ndim - 1)), y)[0]

            def unpack(y: Tensor) -> Any:
                return self.packing.unpack(y[None])

            # An event that did not end its sample is found, but its time carries no gradient.
            with torch.set_grad_enabled(torch.is_grad_enabled() and event.terminal):
                t, y, grazing = attach(fn, place.component, func, unpack, place.t, state, self.times.dtype)
            state = self.packing.unpack(y[None])
            state = state[0] if self.packing.alone else _row(state, 0)
            found.append(Found(place.number, place.component, t, state, grazing, sample))
        sign = 1.0 if bool((self.times[..., -1] >= self.times[..., 0]).all()) else -1.0
        return sorted(found, key=lambda e: (e.sample or 0, sign * float(e.t.detach())))


def _row(tree: Any, at: Any) -> Any:
    return pytree.tree_map(lambda x: x[at], tree)


def _lead(tree: Any) -> Any:
    return pytree.tree_map(lambda x: x[None], tree)


def _torchdiffeq_grid(times: list[float], size: float) -> list[float]:
    """Steps of one size from the start on, the last one shorter."""
    start, end = times[0], times[-1]
    n = max(1, -int(-(abs(end - start) / size - 1e-9) // 1))
    sign = 1.0 if end > start else -1.0
    return [start + sign * size * i for i in range(n)] + [end]


def _scheme(method: Any) -> Scheme:
    from ..registry import get  # which knows adaptive(...), that stands on this package

    if method is None:
        method = "dopri5"
    if isinstance(method, str):
        if method in ABSENT:
            raise SchemeError(f"odeint: there is no {method}; take {ABSENT[method]}.")
        method = ALIASES.get(method, method)
    return get(method)


def odeint_adjoint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | Scheme | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Any = None,
    adjoint_rtol: float | None = None,
    adjoint_atol: float | None = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Sequence[Tensor] | None = None,
) -> Any:
    """`odeint` with ``gradient="adjoint"``, called as torchdiffeq's function of that name.

    What func reads is found by itself, whether func is a module or not; ``adjoint_params`` adds to it.

    Args:
        func: the vector field.
        y0: the state at the start.
        t: the times.
        rtol: relative tolerance.
        atol: absolute tolerance.
        method: an embedded pair.
        options: as in `odeint`.
        event_fn: as in `odeint`.
        adjoint_rtol: of the adjoint equation; else rtol.
        adjoint_atol: likewise.
        adjoint_method: likewise.
        adjoint_options: added to the options; ``{"norm": "seminorm"}`` leaves gradients out of the error.
        adjoint_params: tensors that func reads.
    """
    back = {
        "adjoint_rtol": adjoint_rtol,
        "adjoint_atol": adjoint_atol,
        "adjoint_method": adjoint_method,
        "adjoint_options": adjoint_options,
        "adjoint_params": None if adjoint_params is None else tuple(adjoint_params),
    }
    given = {**(options or {}), **{k: v for k, v in back.items() if v is not None}}
    return odeint(
        func, y0, t, rtol=rtol, atol=atol, method=method, options=given, gradient="adjoint", event_fn=event_fn
    )


def odeint_event(
    func: Callable[..., Any],
    y0: Any,
    t0: Tensor,
    *,
    event_fn: Any,
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> Any:
    """The time of the first event after t0 and the values there, called as torchdiffeq's function of that name.

    Args:
        func: the vector field.
        y0: the state at the start.
        t0: the start.
        event_fn: as in `odeint`.
        reverse_time: whether to go back in time.
        odeint_interface: `odeint` or `odeint_adjoint`.
        kwargs: passed on.
    """
    start = torch.as_tensor(t0).reshape(-1)
    t = torch.cat((start, start.detach() + (-1.0 if reverse_time else 1.0)))
    return (odeint_interface or odeint)(func, y0, t, event_fn=event_fn, **kwargs)


def odeint_dense(
    func: Callable[..., Any],
    y0: Any,
    t0: Tensor,
    t1: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | Scheme | None = None,
    options: dict[str, Any] | None = None,
) -> Solution:
    """The continuous solution from t0 to t1, called as torchdiffeq's function of that name.

    Args:
        func: the vector field.
        y0: the state at t0.
        t0: the start.
        t1: the end.
        rtol: relative tolerance.
        atol: absolute tolerance.
        method: an embedded pair, or a scheme with fixed steps.
        options: as in `odeint`.
    """
    t = torch.stack((torch.as_tensor(t0), torch.as_tensor(t1)))
    return integrate(func, y0, t, method=method, rtol=rtol, atol=atol, options=options, dense=True)
