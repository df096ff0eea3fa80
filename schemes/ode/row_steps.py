"""A step of an embedded pair in which every row has its own size."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..runge_kutta import Terms
from .pairs import Pair
from .rows import RowField, wide


def gathered(ks: Sequence[Tensor], row: Terms) -> Tensor:
    """sum_j row[j] k_j in a new tensor."""
    j, a = row[0]
    out = ks[j] * a
    for j, a in row[1:]:
        out.add_(ks[j], alpha=a)
    return out


def shifted(y: Tensor, ks: Sequence[Tensor], row: Terms, step: Tensor) -> Tensor:
    """y + step sum_j row[j] k_j."""
    if not row:
        return y
    # Repeats the sum of ``gathered``: an extra call for each stage would be noticeable in a small batch.
    j, a = row[0]
    total = ks[j] * a
    for j, a in row[1:]:
        total.add_(ks[j], alpha=a)
    return torch.addcmul(y, total, step)


def attempt(
    pair: Pair, f: RowField, t: Tensor, h: Tensor, step: Tensor, y: Tensor, k: Tensor, end: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The state after a step of every row, and the slopes of its stages.

    Args:
        pair: the method.
        f: the field.
        t: times at the start.
        h: sizes.
        step: the same, shaped to multiply states.
        y: states at the start.
        k: slopes there.
        end: times at the end, where the field is not to read t + h: at jumps, it reads times just before them.
    """
    ks, x = [k], y
    for c, row in pair.tail:
        x = shifted(y, ks, row, step)
        ks.append(f(end if end is not None and c == 1 else t + c * h, x))
    if not pair.reuses:
        # Where the last stage is the slope at the end of the step, its input already is the result.
        x = shifted(y, ks, pair.weights, step)
    return x, ks


def within(
    pair: Pair, f: RowField, t: Tensor, h: Tensor, step: Tensor, y: Tensor, ks: Sequence[Tensor], end: Tensor
) -> Callable[[Tensor], Tensor]:
    """The continuous extension of a step of every row, as a function of one theta per row; ``end``: slopes there."""
    rows, nodes, polynomials, _ = pair.dense
    slopes = [*ks] if pair.reuses else [*ks, end]
    for c, row in zip(nodes, rows, strict=True):
        slopes.append(f(t + c * h, shifted(y, slopes, row, step)))

    def at(theta: Tensor) -> Tensor:
        total = torch.zeros_like(y)
        for k, p in zip(slopes, polynomials, strict=True):
            if any(p):
                b = torch.zeros_like(theta)
                for c in reversed(p):
                    b = (b + c) * theta
                total = total + wide(b, y) * k
        return torch.addcmul(y, total, step)

    return at
