"""The continuous adjoint: gradients by an equation that is solved backwards in time, in memory that does not grow.

With a = dL/dy it reads a' = -(df/dy)^H a, and the gradient of the tensors that f reads is the integral of
(df/dtheta)^H a. The state is solved backwards along with it, from the values that the forward solve returned. Gradients
are accurate only to the tolerances (Chen et al. 2018, Neural ordinary differential equations).
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import SchemeError
from .control import Control
from .field import Field
from .joint import solve
from .reads import AROUND, Autocast, Reads, once, refuse_transforms, vjp
from .run import NOT_FINITE
from .trees import rms


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, back: "Backward", forward: Callable[[Tensor], list[Tensor]], y0: Tensor, *reads: Tensor):
        ys = torch.stack(forward(y0.detach()))
        ctx.back = back
        # Only the values are saved: the solve's own states are gone, which is the point.
        ctx.save_for_backward(ys, *reads)
        return ys

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        refuse_transforms("adjoint", grad)
        ys, *_ = ctx.saved_tensors  # reading them raises if one was changed in place
        with torch.no_grad():
            gradients = ctx.back(ys.detach(), grad)
        return None, None, *once("adjoint", ys, gradients)


class Backward:
    """The solve of the adjoint equation.

    Args:
        func: the field of packed states, ``func(time tensor, y)``.
        reads: the tensors that it reads.
        times: the times of the returned values.
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
        self.precision, self.around = Autocast(), AROUND.get() or nullcontext()

    def __call__(self, ys: Tensor, grad: Tensor) -> list[Tensor | None]:
        with self.around, self.precision.again(ys.device.type), self.reads.unhooked():
            return self._solve(ys, grad)

    def _solve(self, ys: Tensor, grad: Tensor) -> list[Tensor | None]:
        whole = _Augmented(self.func, self.reads, ys[-1], self.norm)
        state = whole.start(grad[-1])
        control = replace(self.control, norm=whole.norm)
        for i in range(len(ys) - 1, 0, -1):
            # The returned value, not the one that the backward solve arrived at: errors do not accumulate.
            whole.put(state, ys[i])
            times = (self.times[i], self.times[i - 1])
            with torch.no_grad():
                run = solve(Field(whole.slope, state), state, times, self.method, control, land=True)
            if run.status == "not_finite":
                raise SchemeError(f"the adjoint equation, backwards in time: {run.reason()}; {NOT_FINITE}.")
            if run.status != "finished":
                raise SchemeError(
                    f"the adjoint equation, backwards in time: {run.reason()}; "
                    "raise rtol and atol, or max_steps, or take gradient='checkpoint'."
                )
            state = run.y.clone()
            whole.add(state, grad[i - 1])
        return whole.gradients(state)


class _Augmented:
    """The state, its adjoint and the gradients of the tensors that the field reads, joined in one flat tensor.

    Args:
        func: the field.
        reads: the tensors that it reads.
        y: a state.
        norm: see `Backward`.
    """

    def __init__(self, func: Callable[[Any, Tensor], Tensor], reads: Reads, y: Tensor, norm: str | None):
        self.func, self.reads, self.inputs, self.like = func, reads, reads.tensors, y
        # The widest dtype of all, so that no gradient is rounded on the way.
        self.dtype = y.dtype
        for x in self.inputs:
            self.dtype = torch.promote_types(self.dtype, x.dtype)
        self.n = y.numel()
        self.parts = [self.n, self.n, *(x.numel() for x in self.inputs)]
        self.measured = self.parts[:2] if norm == "seminorm" else self.parts

    def start(self, grad: Tensor) -> Tensor:
        """The augmented state at the end of the solve, without the state itself."""
        flat = torch.zeros(sum(self.parts), dtype=self.dtype, device=self.like.device)
        flat[self.n : 2 * self.n] = grad.reshape(-1)
        return flat

    def put(self, flat: Tensor, y: Tensor) -> None:
        """Sets the state."""
        flat[: self.n] = y.reshape(-1)

    def add(self, flat: Tensor, grad: Tensor) -> None:
        """Adds the gradient of a returned value to the adjoint."""
        flat[self.n : 2 * self.n] += grad.reshape(-1)

    def slope(self, t: Any, flat: Tensor) -> Tensor:
        """The right-hand side: f, and the products of its derivatives with the adjoint, from one evaluation."""
        at, adjoint, *_ = flat.split(self.parts)
        y = self.like
        # In the state's own dtype, which the field expects; the flat tensor may be wider.
        at = _as(at, y.dtype).reshape(y.shape).detach().requires_grad_()
        with torch.enable_grad():
            k = self.reads.evaluate(self.func, t, at)
            found = vjp(k, [at, *self.inputs], -_as(adjoint, y.dtype).reshape(y.shape))
        products = [torch.zeros_like(x) if g is None else g for x, g in zip([at, *self.inputs], found, strict=True)]
        return torch.cat([s.reshape(-1).to(y.device, self.dtype) for s in (k.detach(), *products)])

    def norm(self, flat: Tensor) -> Tensor:
        """The largest of the parts' norms: many parameters must not outweigh a small state."""
        pieces = flat[: sum(self.measured)].split(self.measured)
        return torch.stack([rms(p) for p in pieces if p.numel()]).amax()

    def gradients(self, flat: Tensor) -> list[Tensor | None]:
        """The gradient of the state at the start, and those of the tensors that the field reads."""
        _, adjoint, *found = flat.split(self.parts)
        return [
            _as(adjoint, self.like.dtype).reshape(self.like.shape),
            *(_as(g, x.dtype).reshape(x.shape).to(x.device) for g, x in zip(found, self.inputs, strict=True)),
        ]


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in that dtype; the real part where it is real."""
    # The gradient of a real tensor is real; what is imaginary is what it does not reach.
    return (x.real if x.is_complex() and not dtype.is_complex else x).to(dtype)


def adjoint(back: Backward, forward: Callable[[Tensor], list[Tensor]], y0: Tensor) -> Tensor:
    """The stacked values of a solve whose gradients are those of the adjoint equation."""
    return _Adjoint.apply(back, forward, y0, *back.reads.tensors)  # type: ignore[return-value]
