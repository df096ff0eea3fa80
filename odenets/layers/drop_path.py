"""Stochastic depth: the result of a residual function is dropped for random samples."""

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    r"""Sets whole samples to zero with probability p while training, and scales the others: y_i = x_i m_i / (1 - p).

    It belongs at the end of a residual function, so that a dropped sample leaves its stream unchanged. At p = 1 the
    result is zero, and nothing is scaled.

    Args:
        p: probability of dropping a sample, in [0, 1].

    Shape:
        x: (n, ...) of any rank; the result has the same shape.

    Raises:
        ValueError: p is not a probability.

    Source:
        Huang et al. 2016, Deep Networks with Stochastic Depth, arXiv 1603.09382; per sample, as has become common.

    Example:
        >>> import torch
        >>> DropPath(0.5).eval()(torch.ones(2, 1)).tolist()
        [[1.0], [1.0]]
    """

    def __init__(self, p: float = 0.0):
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"DropPath: the probability is {p}, want a number from 0 to 1.")
        self.p = float(p)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        keep = 1.0 - self.p
        # In x's own dtype: a single-precision mask would promote a half-precision x.
        mask = torch.empty((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device).bernoulli_(keep)
        # At p = 1 the mask is zero everywhere, and 0 / 0 would be NaN.
        return x * (mask.div_(keep) if keep else mask)

    def extra_repr(self) -> str:
        return f"p={self.p:g}"


def linear_rates(rate: float, count: int) -> list[float]:
    """Drop rates that grow evenly over the depth of a network, from 0 at the first function to ``rate`` at the last.

    Args:
        rate: the last rate.
        count: number of residual functions in the whole network.

    Example:
        >>> linear_rates(0.2, 3)
        [0.0, 0.1, 0.2]
    """
    # A single function counts as the first, with a rate of 0.
    return [rate * i / max(count - 1, 1) for i in range(count)]
