"""The rank of features: how many directions they span, after every step of a stack."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from schemes import SchemeError


class Rank(NamedTuple):
    """The number of directions that features span.

    Attributes:
        width: number of channels, which bounds the rank.
        numerical: number of singular values above ``tolerance`` times the largest.
        effective: exp of the entropy of the singular values' shares; from 1 to the width.
    """

    width: int
    numerical: int
    effective: float


def feature_rank(x: Tensor, tolerance: float = 1e-3, rows: int = 4096, dim: int | None = None) -> Rank:
    """Returns the numerical and effective rank of the matrix of the feature vectors of all pictures and pixels.

    numerical = #{i: s_i > tolerance s_1}; effective = exp(-sum p_i log p_i), p_i = s_i / sum s. In double precision.

    Args:
        x: features (n, c), maps (n, c, h, w) and the like, or tokens (n, t, c).
        tolerance: what counts as zero, relative to the largest singular value.
        rows: the most feature vectors to use. Of more, this many are taken, one at random from each of as many equal
            parts. The choice is the same at every call, and leaves torch's random state alone.
        dim: the dimension of the channels; if left out, the last of three dimensions and otherwise the second.

    Raises:
        SchemeError: no channels, or values that are not finite.

    Source:
        Roy and Vetterli 2007, The effective rank: a measure of effective dimensionality.

    Example:
        >>> import torch
        >>> a = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        >>> feature_rank(torch.cat([a, a], 1))[:2]
        (6, 3)
    """
    at = (2 if x.dim() == 3 else 1) if dim is None else dim
    if x.dim() < 2 or not -x.dim() <= at < x.dim():
        raise SchemeError(f"feature_rank: features {tuple(x.shape)}, channels in dimension {at}; want (n, c) or more.")
    if rows < 1:
        raise SchemeError(f"feature_rank: rows={rows}; want at least 1.")
    if not 0 <= tolerance < 1:
        raise SchemeError(
            f"feature_rank: tolerance={tolerance}; want a number from 0 to 1, of the largest singular value."
        )
    width = x.shape[at]
    flat = x.detach().movedim(at, -1).reshape(-1, width)
    if len(flat) > rows:
        flat = flat[_spread(len(flat), rows).to(flat.device)]
    if not flat.isfinite().all():
        raise SchemeError("feature_rank: features hold values that are not finite.\n  Try model.float().")
    # In single precision the rounding errors of the large singular values swamp the small ones, and the rank comes out
    # full.
    values = torch.linalg.svdvals(flat.to(torch.complex128 if flat.is_complex() else torch.float64))
    # No channels, or nothing but zeros: the shares would be 0 / 0.
    if not values.numel() or not values[0] > 0:
        return Rank(width, 0, 0.0)
    shares = values / values.sum()
    # entr is 0 at 0, where p log p is NaN.
    return Rank(width, int((values > tolerance * values[0]).sum()), float(torch.special.entr(shares).sum().exp()))


def _spread(count: int, rows: int) -> Tensor:
    """One random index in each of ``rows`` equal parts: a fixed stride sees few columns of a map that it divides."""
    edges = torch.arange(rows + 1) * count // rows
    drawn = torch.rand(rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return edges[:-1] + (drawn * edges.diff()).long()


def rank_profile(trajectory: Sequence[Tensor], tolerance: float = 1e-3, dim: int | None = None) -> list[Rank]:
    """Returns the rank of features at every place, e.g. of ``stack.trajectory(x)``: after every step.

    A sum keeps its width, which its rank cannot exceed; joined streams grow, and the bound with them.

    Args:
        trajectory: features, one per place.
        tolerance: as in ``feature_rank``.
        dim: as there.

    Example:
        >>> import torch
        >>> from odenets import Stack
        >>> stack = Stack([torch.nn.Linear(4, 4), torch.nn.Linear(8, 4)], "dense(4)")
        >>> [r.width for r in rank_profile(stack.trajectory(torch.randn(32, 4)))]
        [8, 12]
    """
    return [feature_rank(x, tolerance, dim=dim) for x in trajectory]
