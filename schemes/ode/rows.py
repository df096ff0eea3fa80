"""The field on the rows of a batch, each at its own time, and numbers that differ from row to row."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import SchemeError
from .control import Control
from .field import WATCHED, Writes, fitted, time_dtype

RowField = Callable[[Tensor, Tensor], Tensor]  # (times of the rows, states of the rows)


class Rows:
    """Calls the field on some rows, each at its own time.

    Args:
        func: the field of packed states, ``func(t, y)`` or with a context ``func(t, y, context)``.
        context: tensors whose first dimension counts the samples, or None.
        batch: number of samples.
    """

    def __init__(self, func: Callable[..., Tensor], context: Any, batch: int):
        self.func, self.context = func, context
        self.count = self.rows = 0
        self.writes = Writes()
        # Whether a solve without a graph checks for results that would have one, and whether it has found any.
        self.looking = self.reads = False
        if context is not None:
            for x in pytree.tree_leaves(context):
                if isinstance(x, Tensor) and (not x.ndim or x.shape[0] != batch):
                    raise SchemeError(
                        f"odeint: the context holds a tensor of shape {tuple(x.shape)} for {batch} samples; "
                        "its first dimension counts them."
                    )

    def at(self, rows: Tensor | None) -> RowField:
        """The field of these rows; None means all."""
        context = self.context
        if context is not None and rows is not None:
            context = pytree.tree_map(lambda x: x[rows] if isinstance(x, Tensor) else x, context)

        def call(t: Tensor, y: Tensor) -> Tensor:
            self.count += 1
            self.rows += y.shape[0]
            # So that a field may write t * y, whatever the shape of a sample.
            time = t.to(time_dtype(y)).reshape(-1, *(1,) * (y.ndim - 1))
            given = (time, y) if self.context is None else (time, y, context)
            with torch.enable_grad() if self.looking else nullcontext():
                k = self.writes.call(self.func, y, *given) if self.count <= WATCHED else self.func(*given)
            if self.looking and isinstance(k, Tensor):
                self.reads = self.reads or k.requires_grad
                k = k.detach()
            return k if isinstance(k, Tensor) and k.shape == y.shape and k.dtype == y.dtype else fitted(k, y)

        return call


def wide(h: Tensor, y: Tensor) -> Tensor:
    """One number per row, shaped to multiply a state."""
    return h.to(y.real.dtype if y.is_complex() else y.dtype).reshape(-1, *(1,) * (y.ndim - 1))


def norms(control: Control, weighted: Tensor) -> Tensor:
    """The norm of every row."""
    if control.norm is not None:
        # The user's norm takes a single state.
        found = torch.func.vmap(control.norm)(weighted)
        if bool((found < 0).any()):
            raise SchemeError(f"odeint: norm returned {float(found.min()):g}, want a number that is not negative.")
        return found
    flat = weighted.reshape(weighted.shape[0], -1)
    return torch.linalg.vector_norm(flat, dim=1) / max(flat.shape[1], 1) ** 0.5


def first_steps(f: RowField, t: Tensor, y: Tensor, k: Tensor, span: Tensor, order: int, c: Control) -> Tensor:
    """`control.first_step` for every row; the sizes are unsigned."""
    scale = c.scale(y.abs())
    d0, d1 = norms(c, y / scale).double(), norms(c, k / scale).double()
    unknown = (d0 < 1e-5) | (d1 < 1e-5) | ~((d0 / d1 > 0) & (d0 / d1 < torch.inf))
    h = torch.where(unknown, torch.full_like(d0, 1e-6), 0.01 * d0 / d1)
    h = torch.minimum(h, span.abs())
    signed = torch.copysign(h, span)
    slope = f(t + signed, torch.addcmul(y, k, wide(signed, y)))
    d2 = norms(c, (slope - k) / scale).double() / h
    top = torch.maximum(d1, d2)
    h1 = torch.where(top <= 1e-15, torch.clamp(h * 1e-3, min=1e-6), (0.01 / top) ** (1 / (order + 1)))
    found = torch.minimum(torch.minimum(100 * h, h1), span.abs())
    # A trial step that overflowed tells only that it was too long.
    return torch.where(torch.isfinite(d2), found, h * 1e-3)
