"""RevCol: a few columns of a pyramid network, whose levels read their neighbours and are added reversibly.

A column is one step of the multi-level coupling, and the whole network one ``Stack``: its streams are the stem's output
and the levels, its residual functions the levels' fusion and blocks, its shortcuts a learned factor per channel.

Source: Cai et al. 2023, Reversible Column Networks, arXiv 2212.11696.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from schemes import SchemeError
from schemes.columns import RevColCoupling
from schemes.scheme import State

from ..checkpoints import KeyMap
from ..layers import ChannelScale, ConvNeXtFunction, LayerNorm2d, PatchConv2d, init_truncated, linear_rates
from ..layers.column import Down, LevelFunction, NormedHead, PatchDecoder, PictureDecoder, Up
from ..stack import Stack
from .catalogue import register_variants
from .depth import grid_depths
from .head import ColumnNet
from .keys import revcol as keys_of_revcol


class Supervised(NamedTuple):
    """The result of ``forward_supervised``.

    Attributes:
        logits: the logits of every head, (n, num_classes) each, the final one last.
        images: the decoders' logits of the picture, (n, in_chans, h, w) each; one fewer than ``logits``.
    """

    logits: tuple[Tensor, ...]
    images: tuple[Tensor, ...]


def supervised_columns(columns: int) -> tuple[int, ...]:
    """Returns the columns, counted from 1, that a head follows: round(k n / 4) for k = 1 .. 4, without repetitions.

    Example:
        >>> [supervised_columns(n) for n in (1, 2, 5, 8)]
        [(1,), (1, 2), (1, 2, 4, 5), (2, 4, 6, 8)]
    """
    return tuple(sorted({round(k * columns / 4) for k in range(1, 5)} - {0}))


class Supervision(nn.Module):
    """The heads and decoders that follow columns other than the last."""

    def __init__(self, columns: Sequence[int], channels: Sequence[int], classes: int, patch: int, colours: int):
        super().__init__()
        self.columns = tuple(columns)
        self.heads = nn.ModuleList(NormedHead(channels[-1], classes) for _ in columns)
        coarse = patch * 2 ** (len(channels) - 1)
        # With many classes the heads are large, and the published decoder is a single layer.
        self.decoders = nn.ModuleList(
            PictureDecoder(channels, patch, colours) if classes <= 1000 else PatchDecoder(channels[-1], coarse, colours)
            for _ in columns
        )


class RevCol(ColumnNet):
    """Reversible column network; the defaults are RevCol-T: 30,456,168 parameters, 4.517 GMACs at 224 x 224.

    State-dict keys: ``stem.{conv,norm}``, ``columns.steps.{n}.fs.{l}.{down,up.{i},blocks.{j}}`` for level l of column
    n, ``columns.steps.{n}.gs.{l}.alpha``, ``idle.{l}``, ``head.{norm,fc}``, ``supervision.{heads,decoders}.{k}``.
    Published state dicts load through ``odenets.checkpoints.load``.

    Args:
        channels: width per level.
        blocks: ConvNeXt blocks per level.
        columns: number of columns, the steps of the scheme.
        kernel_size: side of the blocks' depthwise convolutions.
        supervision: heads and decoders also after about a quarter, a half and three quarters of the columns; see
            ``supervised_columns``. Training then calls ``forward_supervised``.
        huge: the first level also reads the last one of the previous column (RevCol-H).
        backprop: as in Stack; "reverse" trains in memory that hardly grows with the columns.
        patch: side and stride of the stem's convolution.
        head: as in ``ColumnNet``.

    Shapes:
        x: (n, in_chans, h, w), h and w multiples of ``patch * 2^(levels - 1)``; the result is (n, num_classes).

    Raises:
        SchemeError: a wrong option, or a picture whose sides do not fit.

    Example:
        >>> import torch
        >>> net = RevCol(channels=(8, 16), blocks=(1, 1), columns=3, num_classes=10)
        >>> net(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 10])
        >>> [tuple(y.shape[1:]) for y in net.maps(torch.randn(2, 3, 16, 16))]
        [(8, 4, 4), (16, 2, 2)]
    """

    def __init__(
        self,
        channels: Sequence[int] = (64, 128, 256, 512),
        blocks: Sequence[int] = (2, 2, 4, 2),
        columns: int = 4,
        kernel_size: int = 3,
        supervision: bool = False,
        huge: bool = False,
        backprop: str = "store",
        patch: int = 4,
        **head: Any,
    ):
        super().__init__(**head)
        channels, blocks = tuple(channels), tuple(blocks)
        _check(channels, blocks, columns)
        if supervision and not self.num_classes:
            raise SchemeError("RevCol: supervision needs a head; give num_classes, or leave supervision out.")
        self.patch, self.blocks = patch, blocks
        # Named one by one: the names are keys of checkpoints.
        self.stem = nn.Sequential()
        self.stem.add_module("conv", PatchConv2d(self.in_chans, channels[0], patch))
        self.stem.add_module("norm", LayerNorm2d(channels[0]))
        scheme = RevColCoupling(len(channels), huge=huge)
        fs = [f for n in range(columns) for f in _column(n, channels, blocks, kernel_size, huge, self.drop_path_rate)]
        # The first column creates the levels and has nothing to scale.
        scales = [() if n == 0 else tuple(ChannelScale(c) for c in channels) for n in range(columns)]
        self.columns = Stack(fs, scheme, shortcut=scales, backprop=backprop)
        # Published checkpoints hold factors of the first column too, though they multiply nothing.
        self.idle = nn.ParameterList(torch.full((1, c, 1, 1), 0.5) for c in channels)
        self.head = nn.Identity()
        self.supervision: Supervision | None = None
        if supervision:
            before_last = supervised_columns(columns)[:-1]
            self.supervision = Supervision(before_last, channels, self.num_classes, patch, self.in_chans)
        module = f"columns.steps.{columns - 1}"
        rows = [
            {"num_chs": c, "reduction": patch * 2**level, "module": f"{module}:{level + 1}", "map": level}
            for level, c in enumerate(channels)
        ]
        self.finish(rows, init_truncated)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last level of the last column: (n, num_features, h / reduction, w / reduction)."""
        return self.columns(self._stem(x))

    def forward_supervised(self, x: Tensor) -> Supervised:
        """Returns the logits of every head, the final one last, and the decoders' logits of the picture.

        Args:
            x: (n, c, h, w).

        Raises:
            SchemeError: the network has no supervision.
        """
        s = self.supervision
        if s is None:
            raise SchemeError("RevCol: no heads between the columns; build it with supervision=True.")
        height, width = x.shape[-2:]
        logits, images = [], []

        def heads(n: int, state: State) -> None:
            if n + 1 in s.columns:
                k = s.columns.index(n + 1)
                logits.append(s.heads[k](state[-1]))
                # A padded picture is decoded whole, and cropped to the part that was given.
                images.append(s.decoders[k](state[-1])[..., :height, :width])

        # Heads read each column while it exists, so that reversed training need not keep any of them for the heads.
        state = self.columns.visit_states(self._stem(x), heads)
        return Supervised((*logits, self.forward_head(state[-1])), tuple(images))

    def maps(self, x: Tensor, last: int | None = None) -> list[Tensor]:
        """The levels of the last column, fine to coarse: (n, channels[l], h', w') with h' = h / (patch 2^l)."""
        return list(self.columns.final_state(self._stem(x))[1:])

    def _stem(self, x: Tensor) -> Tensor:
        return with_zero_gradients(self.stem(self.picture(x)), self.idle)

    def _put_head(self, num_classes: int, pool: str) -> None:
        """Replaces the heads; without classes the supervision is removed too."""
        super()._put_head(num_classes, pool)
        if self.supervision is not None:
            if num_classes:
                heads = (self.make_head(num_classes, drop_rate=0.0) for _ in self.supervision.columns)
                self.supervision.heads = nn.ModuleList(heads).train(self.training)
            else:
                self.supervision = None

    def _heads(self) -> Sequence[nn.Module]:
        return [*super()._heads(), *(self.supervision.heads if self.supervision is not None else ())]

    def init_head(self, head: nn.Module) -> None:
        init_truncated(head)

    def parameter_depths(self) -> dict[str, int]:
        return grid_depths(self, self.blocks)

    def key_map(self, keys: Collection[str]) -> KeyMap | None:
        """Maps published keys to this network's; a supervised checkpoint's last head may be its only one.

        Args:
            keys: all keys of a file.
        """
        return keys_of_revcol.published(self.state_dict().keys(), keys)


def with_zero_gradients(x: Tensor, idle: Iterable[Tensor]) -> Tensor:
    """Returns x unchanged; parameters that multiply nothing get a zero gradient, since DDP waits for every gradient."""
    if torch.is_grad_enabled():
        x = x + 0 * torch.stack([alpha.sum() for alpha in idle]).sum()
    return x


def _check(channels: Sequence[int], blocks: Sequence[int], columns: int) -> None:
    if not channels or len(channels) != len(blocks) or min(blocks) < 1:
        raise SchemeError(
            f"RevCol: channels {channels}, blocks {blocks}; want one width and at least one block per level."
        )
    if isinstance(columns, bool) or not isinstance(columns, int) or columns < 1:
        raise SchemeError(f"RevCol: columns is {columns!r}, want a whole number, at least 1.")


def _column(
    n: int, channels: Sequence[int], blocks: Sequence[int], kernel_size: int, huge: bool, drop_path: float
) -> Iterator[LevelFunction]:
    """Yields the residual functions of column n, level by level; the first column has nothing above."""
    # The rates restart in each column: columns are alike, and the last must not be dropped more often than the first.
    rates = iter(linear_rates(drop_path, sum(blocks)))
    top = len(channels) - 1
    for level, (c, count) in enumerate(zip(channels, blocks, strict=True)):
        below = Down(channels[level - 1], c) if level else nn.Identity()
        above = [Up(channels[level + 1], c)] if n and level < top else []
        if n and huge and not level:
            above.append(Up(channels[top], c, 2**top))
        functions = [ConvNeXtFunction(c, kernel=kernel_size, drop_path=next(rates)) for _ in range(count)]
        yield LevelFunction(below, above, functions)


# Cai et al. 2023, arXiv 2212.11696, table 1 and the released code.
REVCOLS: dict[str, dict[str, Any]] = {
    "revcol_tiny": {"channels": (64, 128, 256, 512), "blocks": (2, 2, 4, 2), "columns": 4},
    "revcol_small": {"channels": (64, 128, 256, 512), "blocks": (2, 2, 4, 2), "columns": 8},
    "revcol_base": {"channels": (72, 144, 288, 576), "blocks": (1, 1, 3, 2), "columns": 16},
    "revcol_large": {"channels": (128, 256, 512, 1024), "blocks": (1, 2, 6, 2), "columns": 8},
    "revcol_xlarge": {"channels": (224, 448, 896, 1792), "blocks": (1, 2, 6, 2), "columns": 8},
    "revcol_huge": {"channels": (360, 720, 1440, 2880), "blocks": (1, 2, 6, 2), "columns": 8, "huge": True},
}

_PYRAMID = {"channels": (64, 128, 256, 512), "blocks": (2, 2, 4, 2), "columns": 4}


def _columns(columns: int, width: int, blocks: tuple[int, ...]) -> dict[str, Any]:
    return {"channels": tuple(width * 2**level for level in range(4)), "blocks": blocks, "columns": columns}


# At about 4.5 GMACs (224 x 224) with 1 to 20 columns; 4 columns are RevCol-T.
COLUMNS: dict[str, dict[str, Any]] = {
    "revcol_1column": _columns(1, 64, (8, 8, 18, 8)),
    "revcol_2columns": _columns(2, 64, (4, 4, 9, 4)),
    "revcol_8columns": _columns(8, 61, (1, 1, 2, 1)),
    "revcol_12columns": _columns(12, 50, (1, 1, 2, 1)),
    "revcol_20columns": _columns(20, 39, (1, 1, 2, 1)),
}
# RevCol-T with larger depthwise kernels; 3 is its own. create_model("revcol_tiny", supervision=True) is the last pair.
KERNELS: dict[str, dict[str, Any]] = {f"revcol_tiny_k{k}": {**_PYRAMID, "kernel_size": k} for k in (5, 7, 11)}
# Stochastic depth is off unless asked for; these are the published rates.
PUBLISHED_DROP_PATH = {
    "revcol_tiny": 0.1,
    "revcol_small": 0.3,
    "revcol_base": 0.4,
    "revcol_large": 0.5,
    "revcol_xlarge": 0.5,
    "revcol_huge": 0.5,
}

for _variants in (REVCOLS, COLUMNS, KERNELS):
    register_variants(RevCol, _variants)
