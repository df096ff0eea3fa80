"""Invertible shortcuts: a learned scale per channel, the alpha of reversible columns, and none at all."""

import torch
from torch import Tensor, nn


class ChannelScale(nn.Module):
    """A learned scale per channel, kept away from zero so that it has an inverse: x -> a x with |a| >= 1e-3.

    a = alpha where |alpha| is at least 1e-3, else 1e-3 with the sign of alpha (zero, of either sign, counts as
    positive). The gradient passes straight through to alpha, so a channel can leave the bound; alpha itself is never
    written to.

    Args:
        channels: number of channels.
        init: initial scale.
        dim: the channel dimension of the input.
        ndim: number of dimensions of the input; alpha has as many, all 1 but one.

    Shape:
        x: (n, channels, h, w), or as set by ``dim`` and ``ndim``; the result has the same shape.

    Source:
        Cai et al. 2023, Reversible Column Networks, arXiv 2212.11696, section 2.2.2. The public code clamps the
        parameter in place and leaves a zero at zero.

    Example:
        >>> import torch
        >>> scale, x = ChannelScale(3), torch.ones(1, 3, 2, 2)
        >>> scale(x)[0, 0, 0, 0].item(), torch.equal(scale.inverse(scale(x)), x)
        (0.5, True)
    """

    smallest = 1e-3

    def __init__(self, channels: int, init: float = 0.5, *, dim: int = 1, ndim: int = 4):
        super().__init__()
        shape = [1] * ndim
        shape[dim] = channels
        self.alpha = nn.Parameter(torch.full(shape, float(init)))

    @property
    def scale(self) -> Tensor:
        """The scale that is applied."""
        a = self.alpha
        # In alpha's dtype, since scalars in where() would be single precision; a - a.detach() is exactly 0 and has the
        # gradient of a.
        smallest = torch.full_like(a, self.smallest, requires_grad=False)
        bound = torch.where(a < 0, -smallest, smallest) + (a - a.detach())
        return torch.where(a.abs() < self.smallest, bound, a)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale

    def inverse(self, y: Tensor) -> Tensor:
        """Returns the x for which ``forward`` returns y."""
        return y / self.scale

    def extra_repr(self) -> str:
        return f"{self.alpha.numel()}"


class Unchanged(nn.Identity):
    """No shortcut, in a place where there may be one: x -> x, with the inverse and the scale that one needs."""

    @property
    def scale(self) -> Tensor:
        """The scale that is applied."""
        return torch.ones(())

    def inverse(self, y: Tensor) -> Tensor:
        """Returns y."""
        return y
