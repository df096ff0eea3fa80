"""Solves that choose their steps, with one size for the whole state: by an embedded pair, or a reversible rule."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import SchemeError
from . import options as reading
from . import reverse
from .control import Control
from .events import Watch
from .gradients import solved
from .methods import scheme_of
from .pairs import Pair
from .problem import Problem
from .run import Run
from .trees import Packing


def chosen(problem: Problem, y: Tensor, times: list[float], watch: Watch | None) -> tuple[Tensor, Run]:
    """The values at all times, stacked, and the run."""
    control, gradient = problem.control(), problem.gradient
    beside: dict[str, Any] = {"dense": problem.dense, "events": watch, "callbacks": problem.callbacks()}
    check, known = problem.raise_if_failed, problem.known
    if problem.rule is not None:
        if gradient == "adjoint":
            raise SchemeError(f"odeint: gradient='adjoint' wants an embedded pair, not {problem.scheme}.")
        if problem.options.get("outputs") is not None and not reading.lands(problem.options, None):
            raise SchemeError(
                "odeint: outputs='interpolate' wants an embedded pair and gradient 'store', 'checkpoint' or 'adjoint'; "
                "other solves step onto every time."
            )
        return reverse.solved(
            problem.rule, problem.func, y, times, control, check, gradient=gradient, known=known, **beside
        )
    pair = Pair(problem.scheme)
    return solved(
        problem.func,
        y,
        times,
        pair,
        control,
        gradient=gradient,
        land=reading.lands(problem.options, pair),
        known=known,
        check=check,
        back=_adjoint(problem, control),
        **beside,
    )


def _tolerance(name: str, value: Any) -> float | Tensor:
    # Of a tolerance with several entries the strictest counts.
    if isinstance(value, Tensor) and not (value.is_complex() or value.requires_grad) and value.numel():
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SchemeError(f"odeint: {name} is {value!r}, want a number.")
    return value


def _adjoint(problem: Problem, control: Control) -> dict[str, Any]:
    """The pair, control and norm of the adjoint equation's solve."""
    if problem.gradient != "adjoint":
        return {}
    given = dict(problem.back)
    given.pop("adjoint_params", None)
    options = given.pop("adjoint_options", None) or {}
    if not isinstance(options, Mapping):
        raise SchemeError(f"odeint: adjoint_options is a {type(options).__name__}, want a dict.")
    options = dict(options)
    for name in ("outputs", "context"):
        if name in options:
            raise SchemeError(f"odeint: adjoint_options have no {name!r}; it speaks of the values of the solve.")
    norm = options.pop("norm", None)
    if norm not in (None, "seminorm"):
        raise SchemeError(f"odeint: the adjoint's norm is {norm!r}, want 'seminorm' or None.")
    scheme = scheme_of(given.pop("adjoint_method", None) or problem.scheme)
    number = {k: given.pop(f"adjoint_{k}", None) for k in ("rtol", "atol")}
    if given:
        raise SchemeError(
            f"odeint: unknown {', '.join(given)}; the adjoint has adjoint_rtol, adjoint_atol, "
            "adjoint_method, adjoint_options and adjoint_params."
        )
    own = {k: getattr(control, k) if v is None else _tolerance(f"adjoint_{k}", v) for k, v in number.items()}
    # The adjoint's state includes parameters, so tolerances of single entries do not fit: the strictest is used.
    flat = {k: float(v.min()) if isinstance(v, Tensor) else float(v) for k, v in own.items()}
    # Options about the forward solve's state or its start are not passed on, nor those that are given for the adjoint
    # too, under any of their names.
    instead = {"norm", "first_step", "outputs", *(reading.ADAPTIVE.get(k, k) for k in options)}
    inner = {k: v for k, v in problem.options.items() if reading.ADAPTIVE.get(k, k) not in instead} | options
    y0 = problem.y0
    alone = Packing(torch.zeros(1, dtype=y0.real.dtype if y0.is_complex() else y0.dtype))
    return {
        "method": Pair(scheme),
        "control": reading.control(inner, flat["rtol"], flat["atol"], alone, y0),
        "norm": norm,
    }
