"""A multi-column network without a reversible connection, for comparison with RevCol: every level reads every level.

This is a configuration of our own, after the fusion of HRNet: the comparison in RevCol's paper gives no details.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from schemes import SchemeError

from ..layers import ConvNeXtFunction, LayerNorm2d, PatchConv2d, init_truncated, linear_rates
from ..layers.column import Down, Up
from .catalogue import register_variants
from .level_net import LevelNet


class FusedColumn(nn.Module):
    """A column: each level is the sum of all levels of the previous column, resized to it, then ConvNeXt blocks.

    Args:
        channels: width per level.
        blocks: blocks per level.
        first: whether this is the first column, which gets only the stem's output and goes down level by level.
        kernel_size: side of the depthwise convolutions.
        drop_path: stochastic depth, growing over the blocks of the column.

    Shape:
        maps: one per level, (n, channels[l], h / 2^l, w / 2^l), or the stem's map alone; the result is one per level.
    """

    def __init__(self, channels: Sequence[int], blocks: Sequence[int], first: bool, kernel_size: int, drop_path: float):
        super().__init__()
        rates = iter(linear_rates(drop_path, sum(blocks)))
        self.first = first
        self.links = nn.ModuleList()
        self.blocks = nn.ModuleList()
        for level, (c, count) in enumerate(zip(channels, blocks, strict=True)):
            links = nn.ModuleList()
            for source in range(len(channels)):
                if first and source != level - 1:
                    continue
                links.append(_link(channels, source, level))
            self.links.append(links)
            self.blocks.append(
                nn.ModuleList(ConvNeXtFunction(c, kernel=kernel_size, drop_path=next(rates)) for _ in range(count))
            )

    def keep_last(self) -> None:
        """Keeps only what computes the last level; in a classifier's last column the rest would be unused."""
        # A first column goes down level by level, and needs all of them for the last.
        if not self.first:
            self.links, self.blocks = self.links[-1:], self.blocks[-1:]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        found: list[Tensor] = []
        levels: Any = zip(self.links, self.blocks, strict=True)
        for level, (links, blocks) in enumerate(levels):
            if self.first:
                x = links[0](found[-1]) if level else maps[0]
            else:
                # Not by sum(), which starts with 0 + x: a copy of a whole map.
                x, *others = (link(y) for link, y in zip(links, maps, strict=True))
                for y in others:
                    x = x + y
            for f in blocks:
                x = x + f(x)
            found.append(x)
        return found


def _link(channels: Sequence[int], source: int, level: int) -> nn.Module:
    """Maps one level to another: strided convolutions down, a linear layer and repeated pixels up, or the identity."""
    if source < level:
        return nn.Sequential(*(Down(channels[i], channels[i + 1]) for i in range(source, level)))
    return Up(channels[source], channels[level], 2 ** (source - level)) if source > level else nn.Identity()


class MultiColumn(LevelNet):
    """Columns of a pyramid without a reversible connection: a column's levels are plain sums over the previous one's.

    Stored tensors grow with the columns, and no scheme applies: a column replaces its input, and does not add to it.

    State-dict keys: ``stem.{0,1}``, ``levels.{n}.{links,blocks}.{l}.*``, ``head_norm``, ``head``.

    Args:
        channels: width per level.
        blocks: ConvNeXt blocks per level.
        columns: number of columns.
        kernel_size: side of the blocks' depthwise convolutions.
        patch: side and stride of the stem's convolution.
        head: as in ``HeadNet``.

    Shapes:
        x: (n, in_chans, h, w), h and w multiples of ``patch * 2^(levels - 1)``; the result is (n, num_classes).

    Raises:
        SchemeError: a wrong option.

    Source:
        After Wang et al. 2020, Deep High-Resolution Representation Learning, arXiv 1908.07919, figure 3.

    Example:
        >>> import torch
        >>> net = MultiColumn(channels=(8, 16), blocks=(1, 1), columns=3, num_classes=10)
        >>> net(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """

    first_conv = "stem.0"
    whole = True

    def __init__(
        self,
        channels: Sequence[int] = (64, 128, 256, 512),
        blocks: Sequence[int] = (2, 2, 4, 2),
        columns: int = 4,
        kernel_size: int = 3,
        patch: int = 4,
        **head: Any,
    ):
        super().__init__(**head)
        if not channels or len(channels) != len(blocks) or min(blocks) < 1 or columns < 1:
            raise SchemeError(
                f"MultiColumn: channels {tuple(channels)}, blocks {tuple(blocks)}, columns {columns}; "
                "want a column, and one width and at least one block per level."
            )
        self.stem = nn.Sequential(PatchConv2d(self.in_chans, channels[0], patch), LayerNorm2d(channels[0]))
        self.levels = nn.ModuleList(
            FusedColumn(channels, blocks, n == 0, kernel_size, self.drop_path_rate) for n in range(columns)
        )
        # The finer levels of the last column reach no output: their parameters would get no gradient.
        self.levels[-1].keep_last()  # type: ignore[operator]
        self.head_norm = nn.LayerNorm(channels[-1], eps=1e-6)
        init_truncated(self)
        row = {"num_chs": channels[-1], "reduction": patch * 2 ** (len(channels) - 1), "map": 0}
        self.finish([{**row, "module": f"levels.{columns - 1}"}])

    def forward_features(self, x: Tensor) -> Tensor:
        """The last level of the last column: (n, num_features, h / reduction, w / reduction)."""
        return self.maps(x)[-1]

    def cut_levels(self, last: int) -> None:
        """Does nothing: its levels are columns, and the only map is that of the last."""

    def maps(self, x: Tensor, last: int | None = None) -> list[Tensor]:
        """The last level of the last column, in a list."""
        found = [self.stem(self.picture(x))]
        for column in self.levels:
            found = column(found)
        return found[-1:]


# The pyramid of RevCol-T: the paper gives no details of its baseline, so this is a configuration of our own.
MULTI_COLUMNS: dict[str, dict[str, Any]] = {
    "multicolumn_tiny": {"channels": (64, 128, 256, 512), "blocks": (2, 2, 4, 2), "columns": 4},
}

register_variants(MultiColumn, MULTI_COLUMNS)
