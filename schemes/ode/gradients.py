"""Ways to differentiate a solve: keep its graph, recompute it step by step, or solve the adjoint equation."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import SchemeError
from . import joint
from .adjoint import Backward, adjoint
from .control import Control
from .field import Field, clock, fitting
from .pairs import Attempt, Pair
from .reads import AROUND, Reads, refuse_tangents, refuse_transforms
from .run import Run

GRADIENTS = ("store", "checkpoint", "reverse", "adjoint")


def recomputed(method: Any) -> Callable[..., Attempt]:
    """``method.attempt`` with a graph that keeps only the state and the slope at the start and recomputes the rest."""

    def attempt(f: Field, t: float, h: float, y: Tensor, k: Tensor) -> Attempt:
        def run(y: Tensor, k: Tensor) -> tuple[Tensor, ...]:
            tried = method.attempt(f, t, h, y, k)
            # The first slope is an input, and is returned as it is.
            return (tried.y, *tried.slopes[1:])

        # Slopes are returned, since dense output and the next step read them; tensors inside the field are not kept.
        y1, *slopes = checkpoint(run, y, k, use_reentrant=False)  # type: ignore[misc]
        return Attempt(y1, [k, *slopes])

    return attempt


def solved(
    func: Callable[[Any, Tensor], Tensor],
    y0: Tensor,
    times: Sequence[float],
    method: Pair,
    control: Control,
    *,
    gradient: str = "store",
    land: bool = True,
    known: Sequence[Tensor] = (),
    check: Callable[[Run], None],
    back: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Tensor, Run]:
    """The values at all times, stacked, and the run; differentiable in the requested way.

    Args:
        func: the field of packed states, ``func(time tensor, y)``.
        y0: the packed state.
        times: strictly monotone.
        method: the pair.
        control: tolerances and limits.
        gradient: "store", "checkpoint" or "adjoint".
        land: whether steps end on every time.
        known: tensors that func is known to read.
        check: raises where a run failed.
        back: the adjoint's own method, control and norm.
        options: passed to the loop.
    """
    f = Field(func, y0)
    if gradient == "adjoint" and torch.is_grad_enabled():
        refuse_transforms("adjoint")
        y0 = y0.clone() if y0.is_inference() else y0  # which could not be a leaf
        same = fitting(func)
        reads = Reads(same, clock(times[0], y0), y0, known)
        if (around := AROUND.get()) is not None:
            around.evaluated()
        # Otherwise there is nothing to differentiate, and a plain solve will do.
        if y0.requires_grad or len(reads):
            refuse_tangents("adjoint")
            found: list[Run] = []

            def forward(y: Tensor) -> list[Tensor]:
                found.append(joint.solve(f, y, times, method, control, land=land, **options))
                found[0].evaluations = f.count[0]
                check(found[0])
                return found[0].ys

            how = {"method": method, "control": control, "norm": None, **(back or {})}
            ys = adjoint(Backward(same, reads, times, **how), forward, y0)
            return ys, found[0]
    attempt = recomputed(method) if gradient == "checkpoint" and torch.is_grad_enabled() else None
    run = joint.solve(f, y0, times, method, control, land=land, attempt=attempt, **options)
    run.evaluations = f.count[0]
    check(run)
    return torch.stack(run.ys), run


def known_gradient(gradient: str) -> str:
    """The name of a way to differentiate.

    Raises:
        SchemeError: there is no such way.
    """
    if gradient not in GRADIENTS:
        raise SchemeError(f"odeint: gradient is {gradient!r}, want one of {', '.join(GRADIENTS)}.")
    return gradient
