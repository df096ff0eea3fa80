"""The residual functions between ResNet's and ConvNeXt's: one class with a switch for each change on the way."""

from typing import Literal

import torch
from torch import Tensor, nn

from .drop_path import DropPath
from .norm import LayerNorm2d

Norm = Literal["batch", "layer"]
Act = Literal["relu", "gelu"]


def make_norm(kind: Norm, channels: int) -> nn.Module:
    """Returns a BatchNorm, or a LayerNorm over the channels of a map."""
    return nn.BatchNorm2d(channels) if kind == "batch" else LayerNorm2d(channels)


def make_act(kind: Act, inplace: bool = True) -> nn.Module:
    """Returns a ReLU or a GELU; ``inplace``: whether the ReLU may overwrite its argument."""
    return nn.ReLU(inplace=inplace) if kind == "relu" else nn.GELU()


class ModernFunction(nn.Module):
    """Two pointwise convolutions and one k x k convolution between them, or before them.

    In order: a narrow or a wide middle (``inverted``), a depthwise middle convolution (``depthwise``), moved to the
    front (``dw_first``), with a norm after each convolution and an activation after all but the last, or with one norm
    (after the k x k convolution) and one activation (between the pointwise ones) in all.

    Args:
        in_channels: width of the argument.
        out_channels: width of the result.
        stride: stride of the k x k convolution.
        kernel: size k of that convolution.
        depthwise: whether that convolution has one group per channel.
        inverted: whether the middle is four times as wide as the result; otherwise it is a quarter as wide.
        dw_first: whether the k x k convolution comes first; it then has the argument's width.
        one_act: whether there is one activation in all, with none on the result.
        one_norm: whether there is one norm in all.
        norm: "batch" or "layer".
        act: "relu" or "gelu".
        layer_scale: initial value of a factor gamma per channel of the result; None leaves gamma out.
        drop_path: probability that a sample's result is zero while training.

    Shape:
        x: (n, in_channels, h, w); the result is (n, out_channels, ceil(h / stride), ceil(w / stride)).

    Source:
        Liu et al. 2022, A ConvNet for the 2020s, arXiv 2201.03545, figures 3 and 4, sections 2.3 to 2.6.
    """

    # long: an argument a line
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        kernel: int = 3,
        depthwise: bool = False,
        inverted: bool = False,
        dw_first: bool = False,
        one_act: bool = False,
        one_norm: bool = False,
        norm: Norm = "batch",
        act: Act = "relu",
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ):
        super().__init__()
        middle = out_channels * 4 if inverted else out_channels // 4
        wide = in_channels if dw_first else middle
        parts = [
            ("narrow" if not inverted else "widen", in_channels, middle, 1),
            ("dwconv" if depthwise else "conv", wide, wide, kernel),
            ("widen" if not inverted else "narrow", middle, out_channels, 1),
        ]
        if dw_first:
            parts = [parts[1], parts[0], parts[2]]
        self.layers = nn.Sequential()
        for i, (name, before, after, size) in enumerate(parts):
            spatial = i == (0 if dw_first else 1)
            has_norm = spatial if one_norm else True
            # One activation between the pointwise convolutions, or one after each convolution but the last.
            has_act = i == 1 if one_act else i < 2
            groups, own = (after if depthwise else 1, stride) if spatial else (1, 1)
            # BatchNorm would cancel a bias, channel by channel; LayerNorm, over the channels, does not.
            bias = not has_norm or norm == "layer"
            self.layers.add_module(name, nn.Conv2d(before, after, size, own, size // 2, groups=groups, bias=bias))
            if has_norm:
                self.layers.add_module(f"norm{i}", make_norm(norm, after))
            if has_act:
                self.layers.add_module(f"act{i}", make_act(act))
        if drop_path:
            self.layers.add_module("drop_path", DropPath(drop_path))
        scale = None if layer_scale is None else torch.full((out_channels, 1, 1), float(layer_scale))
        self.gamma = None if scale is None else nn.Parameter(scale)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return y if self.gamma is None else y * self.gamma
