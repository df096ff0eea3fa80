"""The vector field as solvers call it: with a time that is a Python number, checked and counted."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import SchemeError


def clock(t: float, like: Tensor) -> Tensor:
    """A time as a tensor without dimensions, of the real dtype and the device of the state."""
    if like.device.type == "cpu":
        return torch.scalar_tensor(t, dtype=time_dtype(like))
    return torch.full((), t, dtype=time_dtype(like), device=like.device)  # a fill, where a copy would wait


def time_dtype(like: Tensor) -> torch.dtype:
    """The real dtype of a state, but never half precision, which would not tell neighbouring times apart."""
    return torch.promote_types(like.real.dtype if like.is_complex() else like.dtype, torch.float32)


def recorded() -> bool:
    """Whether derivatives may be recorded: a graph, or tangents of forward mode."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def number(x: Any) -> float:
    """A time or a step size, possibly a tensor, as a number without its graph."""
    return float(x.detach()) if isinstance(x, Tensor) else float(x)


def tracked(x: Any) -> bool:
    """Whether derivatives by x are recorded: in a graph, or as a tangent of forward mode."""
    if not isinstance(x, Tensor):
        return False
    if x.requires_grad and torch.is_grad_enabled():
        return True
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        return True
    return torch._C._are_functorch_transforms_active() and _transformed(x)


def _transformed(x: Tensor) -> bool:
    """Whether a transform of torch.func differentiates by x, seen from inside of other transforms too."""
    functorch: Any = torch._C._functorch  # type: ignore[attr-defined]
    while functorch.is_functorch_wrapped_tensor(x):
        # The inner transforms see neither a graph nor a tangent of the outer ones.
        if functorch.is_gradtrackingtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


# How many calls of a field are checked for in-place writes: several steps of any pair, and no cost after them.
WATCHED = 32


class Writes:
    """Detects a function that writes to its argument, or to a tensor that it has returned before.

    A solver without a graph would go on with the wrong numbers; with one, autograd detects it on its own.
    """

    def __init__(self):
        # Weak, so that neither states nor graphs live longer for it: what nobody holds may be written to.
        self.seen: list[tuple[weakref.ref[Tensor], int]] = []

    def call(self, func: Callable[..., Any], y: Tensor, *given: Any) -> Any:
        """``func(*given)``, where y is the state among the arguments."""
        if y.is_inference() or torch.compiler.is_compiling():  # such tensors count no writes
            return func(*given)
        before = y._version
        k = func(*given)
        if y._version != before:
            raise SchemeError("odeint: func changes its argument y in place; write to a copy, y.clone().")
        if isinstance(k, Tensor) and not k.is_inference():
            # A tensor that nothing was written to is no old one; the last one is looked at nevertheless.
            for one, version in self.seen if k._version else self.seen[-1:]:
                old = one()
                if old is not None and old._version != version:
                    raise SchemeError(
                        "odeint: func writes into a tensor that it has returned before, and that the solver still "
                        "needs; return a new one."
                    )
            self.seen.append((weakref.ref(k), k._version))
        return k


class Field:
    """Calls ``func(t, y)`` with t as a tensor, checks the result, and counts the calls.

    Args:
        func: the vector field of packed states.
        like: a state.
        at: times that are replaced by neighbouring ones.
    """

    def __init__(self, func: Callable[[Any, Tensor], Tensor], like: Tensor, at: dict[float, float] | None = None):
        self.func, self.count, self.at = func, [0], at
        self.dtype, self.device = like.dtype, like.device
        self.time_dtype = time_dtype(like)
        self.writes = Writes()
        self.cpu = like.device.type == "cpu"

    def __call__(self, t: float, y: Tensor) -> Tensor:
        self.count[0] += 1
        if self.at is not None:
            t = self.at.get(t, t)
        # A scalar made on the host costs a microsecond; on a device a copy would wait, but a fill does not.
        if self.cpu:
            time = torch.scalar_tensor(t, dtype=self.time_dtype)
        else:
            time = torch.full((), t, dtype=self.time_dtype, device=self.device)
        if self.count[0] <= WATCHED:
            k = self.writes.call(self.func, y, time, y)
        else:
            k = self.func(time, y)
        if not isinstance(k, Tensor) or k.shape != y.shape or k.dtype != self.dtype:
            k = fitted(k, y)
        return k

    def timed(self, time: Tensor, y: Tensor) -> Tensor:
        """The same at a time that is already a tensor."""
        self.count[0] += 1
        k = self.func(time, y)
        return k if isinstance(k, Tensor) and k.shape == y.shape and k.dtype == self.dtype else fitted(k, y)

    def beside(self, t: float, before: bool, forward: bool) -> "Field":
        """The field that reads the time t as the number just before, or just after it, in the direction of the solve.

        Where func jumps at t, a step that ends there and one that starts there see different functions.
        """
        near = torch.tensor(t, dtype=self.time_dtype)
        aim = float("-inf") if before == forward else float("inf")
        other = Field(self.func, torch.empty((), dtype=self.dtype, device=self.device))
        # One counter for both. The neighbour is that of the field's own precision: one in double would be rounded away.
        other.writes = self.writes
        other.count, other.at = self.count, {t: float(torch.nextafter(near, torch.full_like(near, aim)))}
        return other


def moved(func: Callable[[Any, Tensor], Tensor], t: Tensor, y: Tensor, d: Tensor) -> Tensor:
    """The state to which the flow takes y from t to t + d, for a d whose value is 0: y, with derivatives in d.

    By the midpoint rule, so that the first and the second derivatives are those of the flow.

    Args:
        func: the field.
        t: the time of y, without dimensions; or one per sample.
        y: the state.
        d: likewise, of the real dtype of the state.
    """
    wide = d.reshape(-1, *(1,) * (y.ndim - 1)) if d.ndim else d
    half = y + (wide / 2) * fitted(func(t, y), y)
    return y + wide * fitted(func(t + (d / 2).to(t.dtype), half), half)


def fitting(func: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Tensor]:
    """The field, whose results are in the shape and dtype of the state, as those of a `Field` are."""
    return lambda t, y: fitted(func(t, y), y)


def fitted(k: Any, y: Tensor) -> Tensor:
    """The result of the field, in the shape and dtype of the state."""
    if not isinstance(k, Tensor):
        raise SchemeError(f"odeint: func returned a {type(k).__name__}, want a tensor of shape {tuple(y.shape)}.")
    if k.shape != y.shape:
        try:
            k = k.expand(y.shape)
        except RuntimeError:
            raise SchemeError(
                f"odeint: func returned {tuple(k.shape)} for a state of {tuple(y.shape)}; a slope has its shape."
            ) from None
    if k.dtype != y.dtype:
        # A wider slope would be rounded silently, and the solve's error estimate with it.
        if torch.promote_types(k.dtype, y.dtype) != y.dtype:
            raise SchemeError(
                f"odeint: func returned {k.dtype} for a state of {y.dtype}; "
                f"convert y0 before the solve, or func's result: .to({y.dtype})."
            )
        k = k.to(y.dtype)
    return k


def first_bad(*xs: Tensor) -> int | None:
    """The first sample (along the first dimension) in which a tensor is not finite; None where all are."""
    for x in xs:
        bad = ~torch.isfinite(x.detach())
        if bool(bad.any()):
            return int(bad.reshape(bad.shape[0], -1).any(1).nonzero()[0]) if bad.ndim else 0
    return None
