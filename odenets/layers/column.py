"""The residual function of a level in a multi-column network: it fuses the neighbours, then applies residual blocks."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from .convnext import ConvNeXtFunction
from .norm import LayerNorm2d


class Down(nn.Module):
    """Maps from the finer level below: a 2x2 convolution of stride 2, then LayerNorm over the channels.

    Shape:
        x: (n, in_channels, h, w) with even h and w; the result is (n, out_channels, h / 2, w / 2).
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 2, 2)
        self.norm = LayerNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Up(nn.Module):
    """Maps from a coarser level: a linear layer and LayerNorm at each pixel, then nearest-neighbour upsampling.

    Shape:
        x: (n, in_channels, h, w); the result is (n, out_channels, factor h, factor w).
    """

    def __init__(self, in_channels: int, out_channels: int, factor: int = 2):
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels)
        self.norm = nn.LayerNorm(out_channels, eps=1e-6)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        # With channels last the linear layer needs no copy, and the norm is over the last axis.
        x = self.norm(self.linear(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return F.interpolate(x, scale_factor=float(self.factor), mode="nearest")


class LevelFunction(nn.Module):
    """The change that one level adds: F(lower, upper...) = blocks(down(lower) + sum of up(upper)).

    Args:
        below: the map from the level below: a ``Down``, or the identity at the first level.
        above: one map for each further argument, from coarser levels.
        blocks: residual functions that follow, each added to its own argument.

    Shape:
        lower: the level below, as ``below`` takes it; upper: as ``above`` take them; the result has the level's shape.

    Source:
        Cai et al. 2023, Reversible Column Networks, arXiv 2212.11696, section 2.3 and figure 2 (c).
    """

    def __init__(self, below: nn.Module, above: Sequence[nn.Module], blocks: Sequence[nn.Module]):
        super().__init__()
        self.down = below
        self.up = nn.ModuleList(above)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, lower: Tensor, *upper: Tensor) -> Tensor:
        x = self.down(lower)
        for up, y in zip(self.up, upper, strict=True):
            x = up(y) + x
        for f in self.blocks:
            x = x + f(x)
        return x


class NormedHead(nn.Module):
    """Mean over the pixels, LayerNorm, dropout, linear layer.

    Shape:
        x: (n, channels, h, w), or tokens (n, t, channels); the result is (n, num_classes).
    """

    def __init__(self, channels: int, num_classes: int, drop_rate: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.from_pooled(pooled(x))

    def from_pooled(self, x: Tensor) -> Tensor:
        """Returns logits from the pooled features (n, channels)."""
        return self.fc(self.drop(self.norm(x)))


def pooled(x: Tensor) -> Tensor:
    """The mean of a map (n, c, h, w) over its pixels, or of tokens (n, t, c): (n, c)."""
    return x.mean((2, 3)) if x.dim() == 4 else x.mean(1)


class PictureDecoder(nn.Module):
    """Decodes the last level to the picture: per level a 1x1 convolution, LayerNorm, GELU, 2x upsampling and a block.

    Returns logits of the pixels, for binary cross-entropy against the picture in [0, 1].

    Args:
        channels: widths of the levels, fine to coarse.
        patch: picture pixels per side of one pixel of the finest level.
        colours: channels of the picture.

    Shape:
        x: (n, channels[-1], h, w); the result is (n, colours, h k, w k) with k = patch 2^(levels - 1).

    Source:
        Cai et al. 2023, Reversible Column Networks, arXiv 2212.11696, section 2.3 and appendix D.1.
    """

    def __init__(self, channels: Sequence[int], patch: int = 4, colours: int = 3):
        super().__init__()
        widths = list(reversed(channels))
        self.proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 1), LayerNorm2d(b), nn.GELU()) for a, b in pairwise(widths)
        )
        self.blocks = nn.ModuleList(ConvNeXtFunction(b, kernel=3, expansion=1) for b in widths[1:])
        self.pixels = nn.Conv2d(widths[-1], colours * patch**2, 1)
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        for proj, block in zip(self.proj, self.blocks, strict=True):
            # Corners aligned, as in the released code, with which the published weights were trained.
            x = F.interpolate(proj(x), scale_factor=2.0, mode="bilinear", align_corners=True)
            x = x + block(x)
        return F.pixel_shuffle(self.pixels(x), self.patch)


class PatchDecoder(nn.Module):
    """Decodes the last level to the picture with one linear layer; for large numbers of classes.

    Args:
        channels: width of the last level.
        patch: picture pixels per side of one pixel of the last level.
        colours: channels of the picture.

    Shape:
        x: (n, channels, h, w); the result is (n, colours, h patch, w patch).
    """

    def __init__(self, channels: int, patch: int = 32, colours: int = 3):
        super().__init__()
        self.norm = LayerNorm2d(channels)
        self.pixels = nn.Conv2d(channels, colours * patch**2, 1)
        self.patch = patch

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.pixels(self.norm(x)), self.patch)
