"""The arguments of a solve, read and checked before the field is called for the first time."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import SchemeError
from ..runge_kutta import RungeKutta
from ..scheme import Scheme
from . import options as reading
from .control import Control
from .events import Event, listed
from .field import clock
from .functions import callable_as
from .gradients import known_gradient
from .methods import scheme_of
from .rules import Rule, rule, rule_for
from .run import NOT_FINITE, Run
from .trees import Packing

CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")


@dataclass(frozen=True)
class Settings:
    """How a problem is to be solved; see `odeint` and `integrate` for all but the last.

    Attributes:
        method: a scheme, or its text.
        rtol: relative tolerance; None is that of the method, or 1e-7.
        atol: absolute tolerance; None is that of the method, or 1e-9.
        options: of the solve.
        gradient: how to differentiate; None is that of the method, or "store".
        batch: one step size for all samples, or one for each.
        events: the events to detect on the way.
        dense: whether the continuous solution is kept.
        check: whether a solve that cannot go on raises.
        endless: whether it goes on until an event ends it; the second of the two times then gives the direction.
    """

    method: str | Scheme | None = "dopri5"
    rtol: Any = None
    atol: Any = None
    options: Mapping[str, Any] | None = None
    gradient: str | None = None
    batch: str = "joint"
    events: Sequence[Event] = ()
    dense: bool = False
    check: bool = True
    endless: bool = False


def _tensors(params: Any) -> tuple[Tensor, ...]:
    """The tensors that the user declares the field to read."""
    if params is None:
        return ()
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise SchemeError(f"odeint: adjoint_params is a {type(params).__name__}, want a tuple of tensors.")
    found = tuple(params)
    for x in found:
        if not isinstance(x, Tensor):
            raise SchemeError(f"odeint: adjoint_params holds a {type(x).__name__}, want tensors alone.")
    return found


class Problem:
    """The arguments of a solve, checked and packed.

    Args:
        func: the field.
        y0: the state at the start.
        t: the times.
        settings: how to solve.

    Attributes:
        user: the field as given.
        func: the field of packed states.
        y0: the packed state.
        times: the times as a tensor.
        options: the options of the solve, without the adjoint's.
        back: the options of the adjoint.
        apart: whether each sample has its own step size.
        rule: the reversible rule, where the scheme is one or the gradient asks for one.
        adaptive: whether step sizes are chosen.
    """

    def __init__(self, func: Any, y0: Any, t: Any, settings: Settings):
        options = settings.options
        if options is not None and not isinstance(options, Mapping):
            raise SchemeError(f"odeint: options is a {type(options).__name__}, want a dict.")
        samples = settings.batch == "independent" and (options or {}).get("context") is not None
        callable_as("odeint: func", func, *(("t", "y", "context") if samples else ("t", "y")))
        if settings.batch not in ("joint", "independent"):
            raise SchemeError(f"odeint: batch is {settings.batch!r}, want 'joint' or 'independent'.")
        self.gradient = known_gradient("store" if settings.gradient is None else settings.gradient)
        self.apart = settings.batch == "independent"
        self.events: Sequence[Event] = listed(settings.events)
        for name in ("dense", "check"):
            if not isinstance(getattr(settings, name), bool):
                raise SchemeError(f"odeint: {name} is {getattr(settings, name)!r}, want True or False.")
        self.dense, self.check, self.endless = settings.dense, settings.check, settings.endless
        self.packing = Packing(y0, self.apart)
        # A copy: the adjoint's options are removed from it, and the user's dictionary stays whole.
        self.options = dict(options or {})
        for name in self.options:
            if not isinstance(name, str):
                raise SchemeError(f"odeint: options has the key {name!r}, want names of options.")
        self.back = {k: self.options.pop(k) for k in list(self.options) if k.startswith("adjoint_")}
        self.params = _tensors(self.back.get("adjoint_params"))
        self.tolerances = {"rtol": 1e-7, "atol": 1e-9}
        self.scheme = self._scheme(settings.method, settings.gradient)
        self.tolerances |= {k: v for k in self.tolerances if (v := getattr(settings, k)) is not None}
        self.times = self._times(t)
        self.y0 = self.packing.pack(y0, "y0")
        self.user: Callable[..., Any] = func
        self.func: Callable[..., Tensor] = self.user if self.packing.plain else self._packed
        paired = isinstance(self.scheme, RungeKutta) and self.scheme.tableau.b_hat is not None
        self.rule: Rule | None = rule_for(self.scheme) if self.gradient == "reverse" else rule(self.scheme)
        # A step size can be chosen only where a step comes with an error estimate.
        estimates = paired if self.rule is None else self.rule.estimates
        self.adaptive = estimates and not reading.is_fixed(self.options)
        self._refuse(paired)

    def but(self, **changes: Any) -> "Problem":
        """A copy of the problem with other attributes; what was checked is not checked again."""
        # A shallow copy: the field of packed states stays bound to the first problem, whose packing both share.
        found = copy.copy(self)
        for name, value in changes.items():
            setattr(found, name, value)
        return found

    def _scheme(self, method: Any, given: str | None) -> Scheme:
        """The scheme; adaptive(...) stands for its pair, and brings tolerances, limits and a gradient of its own."""
        scheme = scheme_of(method)
        if scheme.nodes is not None:
            return scheme
        own: Any = scheme
        if reading.is_fixed(self.options) or own.backend != "schemes":
            raise SchemeError(f"odeint: {own} chooses its steps by itself; for fixed ones take {own.method}.")
        # What the call gives takes precedence over the scheme's own.
        self.tolerances = {"rtol": own.rtol, "atol": own.atol}
        # None means that an option is not given, under whichever of its names.
        if all(self.options.get(name) is None for name, ours in reading.ADAPTIVE.items() if ours == "max_steps"):
            self.options["max_steps"] = own.max_steps
        if own.adjoint and given is None:
            self.gradient = "adjoint"
        return own.pair.scheme

    def _times(self, t: Any) -> Tensor:
        t = reading.row("t", t)
        if t.ndim != 1 and not (self.apart and t.ndim == 2):
            raise SchemeError(f"odeint: t is of shape {tuple(t.shape)}, want a row of times.")
        if self.endless and t.shape[-1] != 2:
            raise SchemeError(f"odeint: an event takes two times (start and direction), got {t.shape[-1]}.")
        if not t.shape[-1]:
            raise SchemeError("odeint: t is empty, want the time of y0 at least.")
        if self.endless and not any(shape.numel() for shape in self.packing.shapes):
            raise SchemeError("odeint: y0 has no entries, and so no event would end the solve; leave event_fn out.")
        steps = t.detach().diff()
        if not (bool((steps > 0).all()) or bool((steps < 0).all())) or not bool(torch.isfinite(t.detach()).all()):
            raise SchemeError("odeint: t must be finite and strictly increasing or decreasing.")
        return t

    def _refuse(self, paired: bool) -> None:
        """Refuses settings that do not go together."""
        if self.apart and not (paired and self.adaptive):
            raise SchemeError(
                f"odeint: batch='independent' wants an embedded pair that chooses its steps, not {self.scheme} with "
                "fixed ones; take dopri5 or tsit5."
            )
        if self.gradient not in ("store", "checkpoint") and (self.apart or self.dense):
            what = "batch='independent'" if self.apart else "dense=True"
            raise SchemeError(f"odeint: {what} takes gradient='store' or 'checkpoint', not {self.gradient!r}.")
        if self.apart and self.dense:
            raise SchemeError("odeint: dense=True wants batch='joint'; ask for more times instead.")
        if self.back and self.gradient != "adjoint" and [*self.back] != ["adjoint_params"]:
            names = ", ".join(name for name in self.back if name != "adjoint_params")
            raise SchemeError(f"odeint: {names} belongs to gradient='adjoint', not {self.gradient!r}; leave it out.")
        if self.options.get("interp") == "linear" and (self.dense or self.events):
            raise SchemeError(
                "odeint: interp='linear' gives values between fixed steps by lines, and the continuous solution of "
                "dense=True and events is one of cubics; leave interp out."
            )
        called = [name for name in CALLBACKS if getattr(self.user, name, None) is not None]
        if called and (self.apart or (self.gradient == "reverse" and not self.adaptive)):
            how = "batch='independent'" if self.apart else "gradient='reverse' with fixed steps"
            raise SchemeError(f"odeint: func has a {called[0]}, which {how} does not call; leave it out.")
        if "context" in self.options and not self.apart:
            raise SchemeError(
                "odeint: the option context belongs to batch='independent'; else func reads it by itself."
            )

    def _packed(self, t: Any, y: Tensor, *rest: Any) -> Tensor:
        return self.packing.pack(self.user(t, self.packing.unpack(y), *rest))

    @property
    def known(self) -> tuple[Tensor, ...]:
        """Tensors that the user declares the field to read."""
        return self.params

    def control(self) -> Control:
        """Tolerances, limits and the controller."""
        return reading.control(self.options, **self.tolerances, packing=self.packing, y=self.y0)

    def callbacks(self) -> Any:
        """The functions that torchdiffeq calls around steps, where the user's field has some."""
        given = [getattr(self.user, name, None) for name in CALLBACKS]
        if not any(given):
            return None

        def wrapped(call: Any) -> Any:
            # As torchdiffeq calls them: with tensors, the user's tree, and an unsigned step size.
            return call and (lambda t, y, h: call(clock(t, y), self.packing.unpack(y), clock(abs(h), y)))

        return [wrapped(call) for call in given]

    def raise_if_failed(self, run: Run, more: str = "") -> None:
        """Raises where a run stopped before its end, unless the user checks the status instead.

        Raises:
            SchemeError: with the time, the sample and a remedy.
        """
        if not (self.packing.plain or self.apart):
            run.sample = None  # a row of the packed state is none of the user's
        if run.failed and self.check:
            raise SchemeError(f"odeint: {run.reason()}{more}; {self._advice(run)}.")

    def _advice(self, run: Run) -> str:
        if run.status == "not_finite" and not run.accepted + run.rejected:
            return "look at y0 and at what func makes of it"
        if run.status == "not_finite":
            return f"{NOT_FINITE}, or ask for what was found: integrate(..., check=False)"
        if run.status == "unstable":
            return "take gradient='checkpoint' with a pair such as tsit5, or smaller steps"
        more = " (no event was found on the way)" if self.endless else ""
        return f"raise rtol and atol, or max_steps{more}, or ask for what was found: integrate(..., check=False)"
