"""odeint: initial value problems by any scheme, with torchdiffeq's signature and shapes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SchemeError
from ..scheme import Scheme
from .events import Event
from .options import row
from .problem import Problem, Settings
from .solution import Solution
from .solving import solve


def odeint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    method: str | Scheme | None = "dopri5",
    rtol: Any = None,
    atol: Any = None,
    options: dict[str, Any] | None = None,
    gradient: str | None = None,
    batch: str = "joint",
    event_fn: Any = None,
) -> Any:
    r"""Solves y' = func(t, y), y(t[0]) = y0, for the values at all times t.

    Cost: an embedded pair evaluates its stages once per attempted step, less one where its last stage is the next
    step's first; two more evaluations choose the first step. Memory depends on ``gradient``, see there.

    Args:
        func: the vector field; t is a tensor without dimensions, or (batch, 1, ...) under control per sample.
        y0: a tensor, or a tuple, dict or other tree of tensors.
        t: strictly monotone times, increasing or decreasing; may require a gradient.
        method: any expression of the language of schemes. An embedded pair (bosh3, dopri5, dopri8, fehlberg45, heun2,
            tsit5, verner89) chooses its steps, unless options give them; all others take fixed steps.
        rtol: relative tolerance, a number, a tensor that broadcasts against y0 (with ``batch="independent"`` also one
            per sample), or a tree of them in the structure of y0. None is 1e-7, or that of ``method="adaptive(...)"``.
        atol: absolute tolerance, likewise; None is 1e-9.
        options: of adaptive solves: first_step, min_step, max_step, max_steps, safety, smallest, largest, proportional,
            integral, derivative, norm, step_t, jump_t, outputs ("step" or "interpolate"), context (see ``batch``). Of
            fixed steps: one of step_size, steps (per interval), grid, grid_constructor; interp ("linear", "cubic"; None
            steps onto every time), perturb, max_steps. torchdiffeq's names are accepted for ours. Of the adjoint:
            adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options, adjoint_params.
        gradient: "store" keeps the graph of the accepted steps; "checkpoint" keeps a state per step and recomputes the
            rest; "reverse" keeps only the step sizes, by reversible(method), reversible_heun or alf; "adjoint" solves
            the adjoint equation, accurate to the tolerances. None is "store", or "adjoint" under
            ``method="adaptive(..., adjoint=true)"``.
        batch: "joint" takes one step size for all, "independent" one for each sample along the first dimension. With
            ``options["context"]``, a tree of tensors with that first dimension, func is called as func(t, y, context)
            and receives only the samples that are not finished.
        event_fn: a function of (t, y), an `Event`, or several; the solve then runs from t[0] in the direction of
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
    # Counted at the start too, as torchdiffeq does; an `Event` of the user's own says that itself.
    events = () if event_fn is None else event_fn if isinstance(event_fn, (list, tuple)) else (event_fn,)
    if event_fn is not None and not events:
        raise SchemeError("odeint: event_fn is empty, and so no event would end the solve; leave it out.")
    events = [e if isinstance(e, Event) else Event(e, at_start=True) for e in events]
    if events and not any(e.terminal for e in events):
        raise SchemeError("odeint: no event of event_fn is terminal, so the solve would not end; use integrate.")
    # With an event the second time gives the direction, not an end, as torchdiffeq's callers expect.
    settings = Settings(method, rtol, atol, options, gradient, batch, events, endless=bool(events))
    found = solve(Problem(func, y0, t, settings))
    if not events:
        return found.y
    if batch == "independent":
        # One terminal event for each sample, since each continues until it has met one.
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
    rtol: Any = None,
    atol: Any = None,
    options: dict[str, Any] | None = None,
    gradient: str | None = None,
    batch: str = "joint",
    events: Sequence[Event] = (),
    dense: bool = False,
    check: bool = True,
) -> Solution:
    """Solves as `odeint` does, and returns all that was found: status, counts, events, the continuous solution.

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
        events: the events to detect on the way; a terminal one ends the solve.
        dense: whether the continuous solution is kept, which ``solution(t)`` evaluates (gradients "store" and
            "checkpoint", one step size).
        check: whether a solve that cannot go on raises; else its ``status`` says why, and what was found is returned.

    Returns:
        The solution.

    Example:
        >>> import torch, schemes
        >>> t = torch.tensor([0.0, 1.0], dtype=torch.float64)
        >>> found = schemes.integrate(lambda t, y: -y, torch.ones((), dtype=torch.float64), t, dense=True)
        >>> found.status, round(float(found(0.5)), 6), round(float(found.derivative(0.5)), 6)
        ('finished', 0.606531, -0.606531)
    """
    settings = Settings(method, rtol, atol, options, gradient, batch, events, dense, check)
    return solve(Problem(func, y0, t, settings))


def odeint_adjoint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = None,
    atol: Any = None,
    method: str | Scheme | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Any = None,
    adjoint_rtol: float | None = None,
    adjoint_atol: float | None = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Sequence[Tensor] | None = None,
) -> Any:
    """`odeint` with ``gradient="adjoint"``, called like torchdiffeq's function of that name.

    The tensors that func reads are found automatically, whether func is a module or not; ``adjoint_params`` adds more.

    Args:
        func: the vector field.
        y0: the state at the start.
        t: the times.
        rtol: relative tolerance.
        atol: absolute tolerance.
        method: an embedded pair.
        options: as in `odeint`.
        event_fn: as in `odeint`.
        adjoint_rtol: rtol of the adjoint equation; by default that of the solve.
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
        "adjoint_params": adjoint_params,
    }
    # None is torchdiffeq's way of saying "as in the forward solve", so it is left out.
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
    """The time of the first event after t0 and the values there, called like torchdiffeq's function of that name.

    Args:
        func: the vector field.
        y0: the state at the start.
        t0: the start.
        event_fn: as in `odeint`.
        reverse_time: whether to go back in time.
        odeint_interface: `odeint` or `odeint_adjoint`.
        kwargs: passed on.
    """
    if event_fn is None:
        raise SchemeError("odeint_event: event_fn is None, want a function of (t, y); without one call odeint.")
    if not isinstance(reverse_time, bool):
        raise SchemeError(f"odeint_event: reverse_time is {reverse_time!r}, want True or False.")
    start = _start("t0", t0)
    # Detached: the second time only gives a direction, and must not pass a gradient to the first. Scaled by t0, since
    # far from zero an added 1 is lost to rounding.
    step = 1 + start.detach().abs()
    t = torch.stack((start, start.detach() + (-step if reverse_time else step)))
    return (odeint_interface or odeint)(func, y0, t, event_fn=event_fn, **kwargs)


def _start(name: str, t: Any) -> Tensor:
    """One time as a tensor without dimensions."""
    found = row(name, t)
    if found.numel() != 1:
        raise SchemeError(f"odeint: {name} is of shape {tuple(found.shape)}, want one time.")
    return found.reshape(())


def odeint_dense(
    func: Callable[..., Any],
    y0: Any,
    t0: Tensor,
    t1: Tensor,
    *,
    rtol: Any = None,
    atol: Any = None,
    method: str | Scheme | None = None,
    options: dict[str, Any] | None = None,
) -> Solution:
    """The continuous solution from t0 to t1, called like torchdiffeq's function of that name.

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
    start, end = _start("t0", t0), _start("t1", t1)
    wide = torch.promote_types(start.dtype, end.dtype)
    t = torch.stack((start.to(wide), end.to(wide)))
    return integrate(func, y0, t, method=method, rtol=rtol, atol=atol, options=options, dense=True)
