"""Shortcuts that change the resolution and the width of a stream; the first step of a level uses one."""

import torch.nn.functional as F
from torch import Tensor, nn


class PadShortcut(nn.Module):
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

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        more = out_channels - in_channels
        if more < 0:
            raise ValueError(f"PadShortcut cannot go from {in_channels} to {out_channels} channels; use Projection.")
        self.before, self.after, self.stride = more // 2, more - more // 2, stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        return f"before={self.before}, after={self.after}, stride={self.stride}"


class Projection(nn.Module):
    """A 1x1 convolution with a stride, then BatchNorm unless told otherwise ("option B").

    Args:
        in_channels: width of the stream before.
        out_channels: width after.
        stride: step in height and width.
        norm: whether BatchNorm follows; fully pre-activated networks have none.

    Shape:
        x: (n, in_channels, h, w); the result is (n, out_channels, ceil(h / stride), ceil(w / stride)).

    Source:
        He et al. 2016, Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 3.3.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *, norm: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.norm = nn.BatchNorm2d(out_channels) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))
