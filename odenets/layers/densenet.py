"""The residual functions of DenseNet, which read a concatenation and return a few new channels, and its transition."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv import PatchConv2d, joined
from .drop_path import DropPath
from .norm_relu_conv import norm_relu_conv


class DenseFunction(nn.Module):
    """BN-ReLU-conv3x3, or with a bottleneck BN-ReLU-conv1x1-BN-ReLU-conv3x3.

    Args:
        in_channels: width of the concatenation that it reads.
        out_channels: number of new channels, the growth rate.
        bottleneck: width of the 1x1 convolution over that of the result; 0 leaves the convolution out.
        drop_rate: dropout rate after every convolution.
        drop_path: probability that a sample's new channels are all zero while training; the concatenation is unchanged.
        layer_scale: initial value of a factor gamma per new channel; None leaves gamma out.
        recompute: whether the joined argument and the results of norms and ReLUs are recomputed in the backward pass
            instead of kept; convolutions are not run again.

    Shape:
        xs: one map (n, in_channels, h, w), or several with that total width, which are joined; the result is
            (n, out_channels, h, w).

    Source:
        Huang et al. 2017, Densely Connected Convolutional Networks, arXiv 1608.06993, section 3.

    Example:
        >>> import torch
        >>> DenseFunction(24, 12, bottleneck=4)(torch.randn(2, 24, 8, 8)).shape
        torch.Size([2, 12, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck: int = 4,
        drop_rate: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        recompute: bool = False,
    ):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        width = bottleneck * out_channels
        if bottleneck:
            self.conv1: nn.Conv2d = PatchConv2d(in_channels, width, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, out_channels, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        scale = None if layer_scale is None else torch.full((out_channels, 1, 1), float(layer_scale))
        self.gamma = None if scale is None else nn.Parameter(scale)
        self.drop_path = DropPath(drop_path) if drop_path else None
        self.bottleneck, self.drop_rate, self.recompute = bottleneck, drop_rate, recompute

    def _part(self, norm: nn.BatchNorm2d, conv: nn.Conv2d, *xs: Tensor) -> Tensor:
        if self.recompute:
            return norm_relu_conv(norm, conv, *xs)
        return conv(F.relu(norm(joined(xs)), inplace=True))

    def forward(self, *xs: Tensor) -> Tensor:
        x = self._part(self.norm1, self.conv1, *xs)
        if self.bottleneck:
            # Published ports of the bottleneck apply dropout before and after the 3x3 convolution, or only after it;
            # this is the paper's rule: after every convolution.
            x = F.dropout(x, self.drop_rate, self.training) if self.drop_rate else x
            x = self._part(self.norm2, self.conv2, x)
        x = F.dropout(x, self.drop_rate, self.training) if self.drop_rate else x
        x = x if self.gamma is None else x * self.gamma
        return x if self.drop_path is None else self.drop_path(x)


class DenseTransition(nn.Module):
    """BN-ReLU-conv1x1, then the mean of 2x2 pixels.

    The convolution and the mean are linear and commute, so in training without dropout the mean comes first, and the
    convolution sees a quarter of the pixels. Otherwise the order, and the number of multiply-adds, are the paper's.

    Args:
        in_channels: width before.
        out_channels: width after.
        drop_rate: dropout rate after the convolution.

    Shape:
        x: (n, in_channels, h, w); the result is (n, out_channels, h // 2, w // 2).

    Source:
        Huang et al. 2017, Densely Connected Convolutional Networks, arXiv 1608.06993, section 3.
    """

    def __init__(self, in_channels: int, out_channels: int, *, drop_rate: float = 0.0):
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = PatchConv2d(in_channels, out_channels, 1, bias=False)
        self.drop_rate = drop_rate

    def forward(self, x: Tensor) -> Tensor:
        # In place is safe: the norm's backward pass needs its argument, not its result.
        x = F.relu(self.norm(x), inplace=True)
        if self.training and torch.is_grad_enabled() and not self.drop_rate:
            return self.conv(F.avg_pool2d(x, 2))
        x = self.conv(x)
        x = F.dropout(x, self.drop_rate, self.training) if self.drop_rate else x
        return F.avg_pool2d(x, 2)
