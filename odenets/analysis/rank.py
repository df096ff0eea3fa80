"""The rank of features: how many directions they span, after every step of a stack."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rank(NamedTuple):
    """How many directions features span.

    Attributes:
        width: number of channels, which bounds the rank.
        numerical: singular values above ``tolerance`` times the largest.
        effective: exp of the entropy of the singular values' shares; from 1 to the width.
    """

    width: int
    numerical: int
    effective: float


def feature_rank(x: Tensor, tolerance: float = 1e-3, rows: int = 4096) -> Rank:
    """Numerical and effective rank of the matrix whose rows are the feature vectors of all pictures and pixels.

    numerical = #{i: s_i > tolerance s_1}; effective = exp(-sum p_i log p_i), p_i = s_i / sum s. In double precision.

    Args:
        x: features (n, c) or (n, c, ...).
        tolerance: what counts as zero, relative to the largest singular value.
        rows: of more feature vectors than this, so many, evenly spaced, are taken.

    Source:
        Roy and Vetterli 2007, The effective rank: a measure of effective dimensionality.

    Example:
        >>> import torch
        >>> a = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        >>> feature_rank(torch.cat([a, a], 1))[:2]
        (6, 3)
    """
    flat = x.detach().movedim(1, -1).reshape(-1, x.shape[1])
    if len(flat) > rows:
        flat = flat[torch.arange(rows, device=flat.device) * len(flat) // rows]
    values = torch.linalg.svdvals(flat.double())
    if not values.numel() or not values[0] > 0:
        return Rank(x.shape[1], 0, 0.0)
    shares = values / values.sum()
    return Rank(x.shape[1], int((values > tolerance * values[0]).sum()), float(torch.special.entr(shares).sum().exp()))


def rank_profile(trajectory: Sequence[Tensor], tolerance: float = 1e-3) -> list[Rank]:
    """The rank of features at every place, e.g. of ``stack.trajectory(x)``: after every step.

    A sum of streams keeps its width, so that its rank cannot exceed it; joined streams grow, and with them the bound.

    Args:
        trajectory: features, one per place.
        tolerance: as in ``feature_rank``.

    Example:
        >>> import torch
        >>> from odenets import Stack
        >>> stack = Stack([torch.nn.Linear(4, 4), torch.nn.Linear(8, 4)], "dense(4)")
        >>> [r.width for r in rank_profile(stack.trajectory(torch.randn(32, 4)))]
        [8, 12]
    """
    return [feature_rank(x, tolerance) for x in trajectory]
