"""Shortcuts that change the resolution and the width of a stream: pixels left out, averaged, moved, projected."""

from abc import ABC, abstractmethod

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class _Padded(nn.Module, ABC):
    """Fewer pixels, then channels padded with zeros on both sides; an odd difference puts the extra channel last."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        more = out_channels - in_channels
        if more < 0:
            raise ValueError(
                f"{type(self).__name__} cannot go from {in_channels} to {out_channels} channels; use Projection."
            )
        self.before, self.after, self.stride = more // 2, more - more // 2, stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = self._fewer(x)
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))

    @abstractmethod
    def _fewer(self, x: Tensor) -> Tensor:
        """Returns a map with ``stride`` times fewer rows and columns."""

    def extra_repr(self) -> str:
        return f"before={self.before}, after={self.after}, stride={self.stride}"


class PadShortcut(_Padded):
    """Takes every ``stride``-th pixel and pads the channels with zeros on both sides ("option A"; no parameters).

    Args:
        in_channels: width of the stream before.
        out_channels: width after, at least ``in_channels``; an odd difference puts the extra channel last.
        stride: step in height and width.

    Shape:
        x: (n, in_channels, h, w); the result is (n, out_channels, ceil(h / stride), ceil(w / stride)).

    Raises:
        ValueError: the stream would become narrower.

    Source:
        He et al. 2016, Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 3.3.

    Example:
        >>> import torch
        >>> PadShortcut(16, 32, 2)(torch.ones(1, 16, 8, 8)).shape
        torch.Size([1, 32, 4, 4])
    """

    def _fewer(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride]


class Projection(nn.Module):
    """A strided 1x1 convolution, then BatchNorm unless ``norm`` is false ("option B").

    Args:
        in_channels: width of the stream before.
        out_channels: width after.
        stride: step in height and width.
        norm: whether BatchNorm follows; fully pre-activated networks have none.
        kernel: size of the convolution, odd; 3 where no residual function sees the pixels that the stride skips.

    Shape:
        x: (n, in_channels, h, w); the result is (n, out_channels, ceil(h / stride), ceil(w / stride)).

    Source:
        He et al. 2016, Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 3.3.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *, norm: bool = True, kernel: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class SpaceToDepth(nn.Module):
    """Moves the pixels of every square into the channels: half the height and width, four times the channels.

    No value is changed or lost, so ``inverse`` is exact: the shortcut of a reversible step that downsamples.

    Args:
        factor: side of the squares.

    Shape:
        x: (n, c, h, w), h and w multiples of ``factor``; the result is (n, factor^2 c, h / factor, w / factor).

    Source:
        Jacobsen et al. 2018, i-RevNet: Deep Invertible Networks, arXiv 1802.07088, section 3.1.

    Example:
        >>> import torch
        >>> f, x = SpaceToDepth(), torch.randn(1, 3, 4, 4)
        >>> f(x).shape, torch.equal(f.inverse(f(x)), x)
        (torch.Size([1, 12, 2, 2]), True)
    """

    def __init__(self, factor: int = 2):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        # n c (h a) (w b) -> n (a b c) h w, by torch operations alone, which a trace can follow.
        x = x.unflatten(3, (-1, self.factor)).unflatten(2, (-1, self.factor))
        return x.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)

    def inverse(self, y: Tensor) -> Tensor:
        """Returns the x for which ``forward`` returns y.

        Args:
            y: (n, factor^2 c, h / factor, w / factor).
        """
        return rearrange(y, "n (a b c) h w -> n c (h a) (w b)", a=self.factor, b=self.factor)

    def extra_repr(self) -> str:
        return f"factor={self.factor}"


class PoolPadShortcut(_Padded):
    """Averages squares of ``stride`` x ``stride`` pixels and pads the channels with zeros on both sides.

    Args:
        in_channels: width of the stream before.
        out_channels: width after, at least ``in_channels``; an odd difference puts the extra channel last.
        stride: step in height and width.

    Shape:
        x: (n, in_channels, h, w); the result is (n, out_channels, h / stride, w / stride).

    Source:
        Gomez et al. 2017, The Reversible Residual Network, arXiv 1707.04585, as released.
    """

    def _fewer(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.stride)
