"""The residual functions of ResNet: basic and bottleneck, post-activation or pre-activation, without their own skip.

None writes to its argument: the only in-place operations are ReLUs on the result of a norm computed here.
"""

import math
from typing import Literal

from torch import Tensor, nn

from .drop_path import DropPath

Order = Literal["post", "pre"]
Norm = Literal["batch", "group"]
Act = Literal["relu", "silu"]


def _norm(kind: Norm, channels: int) -> nn.Module:
    # The greatest common divisor of 8 and the width, so 8 groups for all usual widths.
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(math.gcd(8, channels), channels)


def _act(kind: Act) -> nn.Module:
    return nn.ReLU(inplace=True) if kind == "relu" else nn.SiLU()


class BasicFunction(nn.Module):
    """Two 3x3 convolutions.

    ``post``: conv-BN-ReLU-conv-BN (the stack applies ReLU to the sum); ``pre``: BN-ReLU-conv-BN-ReLU-conv.

    Args:
        in_channels: width of the argument.
        out_channels: width of the result.
        stride: stride of the first convolution.
        order: "post" or "pre".
        drop_path: probability that a sample's result is zero while training.
        norm: "batch", or "group", which uses no statistics but its argument's.
        act: "relu", or "silu", which is smooth.

    Shape:
        x: (n, in_channels, h, w); the result is (n, out_channels, ceil(h / stride), ceil(w / stride)).

    Source:
        He et al. 2016, arXiv 1512.03385 (post) and arXiv 1603.05027 (pre).
    """

    expansion = 1
    convolutions = 2

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        order: Order = "post",
        drop_path: float = 0.0,
        norm: Norm = "batch",
        act: Act = "relu",
    ):
        super().__init__()
        pre = order == "pre"
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = _norm(norm, in_channels if pre else out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = _norm(norm, out_channels)
        # One module for all places, since it has no parameters; the name is ResNet's whichever activation it is.
        self.relu = _act(act)
        self.drop_path = DropPath(drop_path) if drop_path else None
        self.pre = pre

    def forward(self, x: Tensor) -> Tensor:
        if self.pre:
            x = self.conv1(self.relu(self.norm1(x)))
            x = self.conv2(self.relu(self.norm2(x)))
        else:
            x = self.relu(self.norm1(self.conv1(x)))
            x = self.norm2(self.conv2(x))
        return x if self.drop_path is None else self.drop_path(x)


class BottleneckFunction(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; the middle is a quarter as wide as the result, and the 3x3 carries the stride.

    ``post``: conv-BN-ReLU-conv-BN-ReLU-conv-BN; ``pre``: three times BN-ReLU-conv.

    Args:
        in_channels: width of the argument.
        out_channels: width of the result, a multiple of 4.
        stride: stride of the 3x3 convolution.
        order: "post" or "pre".
        drop_path: probability that a sample's result is zero while training.
        norm: "batch", or "group", which uses no statistics but its argument's.
        act: "relu", or "silu", which is smooth.

    Shape:
        x: (n, in_channels, h, w); the result is (n, out_channels, ceil(h / stride), ceil(w / stride)).

    Raises:
        ValueError: the result's width is not a multiple of 4.

    Source:
        He et al. 2016, arXiv 1512.03385 (post) and arXiv 1603.05027 (pre); the stride is in the 3x3 convolution, as in
        the published weights, and not in the first 1x1, as in the paper.
    """

    expansion = 4
    convolutions = 3

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        order: Order = "post",
        drop_path: float = 0.0,
        norm: Norm = "batch",
        act: Act = "relu",
    ):
        super().__init__()
        if out_channels % self.expansion:
            raise ValueError(
                f"BottleneckFunction: {out_channels} output channels, want a multiple of {self.expansion}."
            )
        pre, width = order == "pre", out_channels // self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm1 = _norm(norm, in_channels if pre else width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.norm2 = _norm(norm, width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.norm3 = _norm(norm, width if pre else out_channels)
        self.relu = _act(act)
        self.drop_path = DropPath(drop_path) if drop_path else None
        self.pre = pre

    def forward(self, x: Tensor) -> Tensor:
        if self.pre:
            x = self.conv1(self.relu(self.norm1(x)))
            x = self.conv2(self.relu(self.norm2(x)))
            x = self.conv3(self.relu(self.norm3(x)))
        else:
            x = self.relu(self.norm1(self.conv1(x)))
            x = self.relu(self.norm2(self.conv2(x)))
            x = self.norm3(self.conv3(x))
        return x if self.drop_path is None else self.drop_path(x)
