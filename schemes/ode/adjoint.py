"""The continuous adjoint: gradients by an equation that is solved backwards in time, in memory that does not grow.

With a = dL/dy it reads a' = -(df/dy)^H a, and the gradient of what f reads is the integral of (df/dtheta)^H a. The
state is solved backwards along with it, from the values that the forward solve gave out. Gradients are right to the
tolerances only (Chen et al. 2018, Neural ordinary differential equations).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SchemeError
from .control import Control
from .field import Field
from .joint import solve
from .reads import Autocast, Reads, once, vjp
from .trees import rms


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, back: "Backward", forward: Callable[[Tensor], list[Tensor]], y0: Tensor, *reads: Tensor):
        ys = torch.stack(forward(y0.detach()))
        ctx.back = back
        ctx.save_for_backward(ys, *reads)
        return ys

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        ys, *_ = ctx.saved_tensors  # reading them refuses what was changed in place
        with torch.no_grad():
            gradients = ctx.back(ys.detach(), grad)
        return None, None, *once("adjoint", gradients)


class Backward:
    """The solve of the adjoint equation.

    Args:
        func: the field of packed states, ``func(time tensor, y)``.
        reads: what it reads.
        times: of the values that were given out.
        method: the pair that solves the adjoint equation.
        control: its tolerances and limits.
        norm: None measures the error by the largest of those of state, adjoint and gradients; "seminorm" leaves the
            gradients out, which only integrate (Kidger et al. 2021, Hey, that's not an ODE).
    """

    def __init__(
        self,
        func: Callable[[Any, Tensor], Tensor],
        reads: Reads,
        times: Sequence[float],
        method: Any,
        control: Control,
        norm: str | None = None,
    ):
        self.func, self.reads, self.times = func, reads, times
        self.method, self.control, self.norm = method, control, norm
        self.precision = Autocast()

    def __call__(self, ys: Tensor, grad: Tensor) -> list[Tensor | None]:
        with self.precision.again(ys.device.type):
            return self._solve(ys, grad)

    # long: one solve backwards; its parts share the augmented state
    def _solve(self, ys: Tensor, grad: Tensor) -> list[Tensor | None]:
        y = ys[-1]
        inputs = self.reads.tensors
        dtype = y.dtype
        for x in inputs:
            dtype = torch.promote_types(dtype, x.dtype)
        n, sizes = y.numel(), [x.numel() for x in inputs]
        parts = [n, n, *sizes]
        flat = torch.zeros(sum(parts), dtype=dtype, device=y.device)
        flat[n : 2 * n] = grad[-1].reshape(-1)

        def augmented(t: Any, state: Tensor) -> Tensor:
            at, adjoint, *_ = state.split(parts)
            at = _as(at, y.dtype).reshape(y.shape).detach().requires_grad_()
            with torch.enable_grad():
                k = self.reads.evaluate(self.func, t, at)
                found = vjp(k, [at, *inputs], -_as(adjoint, y.dtype).reshape(y.shape))
            slopes = [k.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip([at, *inputs], found))]  # noqa: B905
            return torch.cat([s.reshape(-1).to(y.device, dtype) for s in slopes])

        measured = parts[:2] if self.norm == "seminorm" else parts

        def norm(x: Tensor) -> Tensor:
            pieces = x[: sum(measured)].split(measured)
            return torch.stack([rms(p) for p in pieces if p.numel()]).amax()

        control = Control(**{**vars(self.control), "norm": norm})
        for i in range(len(ys) - 1, 0, -1):
            flat[:n] = ys[i].reshape(-1)
            with torch.no_grad():
                run = solve(
                    Field(augmented, flat), flat, (self.times[i], self.times[i - 1]), self.method, control, land=True
                )
            if run.status != "finished":
                raise SchemeError(
                    f"the adjoint equation, backwards in time: {run.reason()}; "
                    "raise rtol and atol, or max_steps, or take gradient='checkpoint'."
                )
            flat = run.y.clone()
            flat[n : 2 * n] += grad[i - 1].reshape(-1)
        _, adjoint, *found = flat.split(parts)
        return [
            _as(adjoint, y.dtype).reshape(y.shape),
            *(_as(g, x.dtype).reshape(x.shape).to(x.device) for g, x in zip(found, inputs, strict=True)),
        ]


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in that dtype; the real part where it is real."""
    return (x.real if x.is_complex() and not dtype.is_complex else x).to(dtype)


def adjoint(back: Backward, forward: Callable[[Tensor], list[Tensor]], y0: Tensor) -> Tensor:
    """The stacked values of a solve whose gradients are those of the adjoint equation."""
    return _Adjoint.apply(back, forward, y0, *back.reads.tensors)  # type: ignore[return-value]
