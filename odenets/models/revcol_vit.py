"""RevCol-ViT: reversible columns of transformer blocks, all levels of one resolution and width."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from schemes import SchemeError
from schemes.columns import RevColCoupling
from schemes.scheme import State

from ..layers import ChannelScale, linear_rates
from ..layers.attention import AttentionFunction, PatchTokens
from ..layers.column import LevelFunction
from ..stack import Stack
from .catalogue import register_variants
from .depth import grid_depths
from .head import ColumnNet
from .vit import alternating, init_tokens, scale_by_depth


class Linked(nn.Module):
    """Maps from a neighbouring level of the same size: a linear layer, then LayerNorm. x: (n, t, dim)."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


class TokenLevel(LevelFunction):
    """A level of tokens, as ``LevelFunction``; the context is the mask (n, t) of tokens that may be attended to."""

    def forward(self, lower: Tensor, *upper: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.down(lower)
        for up, y in zip(self.up, upper, strict=True):
            x = up(y) + x
        for f in self.blocks:
            x = x + (f(x, context) if isinstance(f, AttentionFunction) else f(x))
        return x


def columns_of_tokens(
    columns: int,
    dim: int,
    heads: int,
    blocks: Sequence[int],
    *,
    drop: float = 0.0,
    drop_path: float = 0.0,
    backprop: str = "store",
) -> Stack:
    """Builds a ``Stack`` over the multi-level coupling whose streams are tokens (n, t, dim), all of one shape.

    Args:
        columns: number of columns.
        dim: width of a token.
        heads: heads of attention.
        blocks: transformer blocks per level.
        drop: dropout rate of each residual function's result.
        drop_path: stochastic depth, growing over the blocks of one column.
        backprop: as in Stack.
    """
    top = len(blocks) - 1
    fs: list[nn.Module] = []
    for n in range(columns):
        rates = linear_rates(drop_path, sum(blocks))
        for level, count in enumerate(blocks):
            below = Linked(dim) if level else nn.Identity()
            above = [Linked(dim)] if n and level < top else []
            # One list per column, of which each level takes its share.
            own, rates = rates[:count], rates[count:]
            fs.append(TokenLevel(below, above, alternating(dim, heads, count, own, drop=drop)))
    # The first column creates the levels and has nothing to scale.
    scales = [[ChannelScale(dim, dim=2, ndim=3) for _ in blocks] if n else [] for n in range(columns)]
    # A growth of 1, since all levels have the same width here.
    return Stack(fs, RevColCoupling(len(blocks), growth=1), shortcut=scales, backprop=backprop)


class RevColViT(ColumnNet):
    """Isotropic RevCol of transformer blocks; the defaults are the small model.

    A level reads its neighbours through a linear layer and LayerNorm, where RevCol merges patches and upsamples; its
    blocks normalise after each function, and attention compares normalised queries and keys.

    State-dict keys: ``stem.*``, ``columns.steps.{n}.{fs,gs}.{l}.*``, ``head.{norm,fc}``.

    Args:
        dim: width of a token, on every level.
        blocks: transformer blocks per level.
        heads: heads of attention.
        columns: number of columns.
        patch: side of a patch.
        size: side of the pictures that the positions are made for; for others they are interpolated.
        backprop: as in Stack; "reverse" trains in memory that hardly grows with the columns.
        depth_init: whether block k = 1, 2 ... of each column starts with its outputs divided by sqrt(2 k), as in BEiT,
            through the gains of the norms at their ends.
        head: as in ``ColumnNet``.

    Shapes:
        x: (n, in_chans, h, w), h and w multiples of ``patch``; the result is (n, num_classes).

    Raises:
        SchemeError: a wrong option, or a picture that the patches do not fill.

    Source:
        Cai et al. 2023, Reversible Column Networks, arXiv 2212.11696, appendix A.

    Example:
        >>> import torch
        >>> net = RevColViT(16, (1, 1), 2, 3, patch=4, size=16, num_classes=10)
        >>> net(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """

    first_conv = "stem.proj"
    unpooled = ("tokens", "one vector")

    def __init__(
        self,
        dim: int = 224,
        blocks: Sequence[int] = (2, 2, 2, 2),
        heads: int = 4,
        columns: int = 4,
        patch: int = 16,
        size: int = 224,
        backprop: str = "store",
        depth_init: bool = False,
        **head: Any,
    ):
        super().__init__(**head)
        if not blocks or min(blocks) < 1 or columns < 1:
            raise SchemeError(f"RevColViT: blocks {tuple(blocks)}, columns {columns}; want at least one of each.")
        self.patch, self.blocks = patch, tuple(blocks)
        features = [
            {"num_chs": dim, "reduction": patch, "module": f"columns.steps.{columns - 1}:{level + 1}", "map": level}
            for level in range(len(blocks))
        ]
        self.stem = PatchTokens(dim, patch, size, self.in_chans, class_token=False, norm=True)
        self.columns = columns_of_tokens(columns, dim, heads, blocks, drop_path=self.drop_path_rate, backprop=backprop)
        self.finish(features, init_tokens)
        # After `finish`, which draws the weights anew.
        if depth_init:
            for column in self.columns.steps:
                scale_by_depth([f for level in column.fs or () for f in level.blocks])  # type: ignore[attr-defined]

    def forward_features(self, x: Tensor) -> Tensor:
        """The last level's tokens in the last column: (n, h w / patch^2, dim)."""
        return self.columns(self.stem(self.picture(x)))

    def maps(self, x: Tensor, last: int | None = None) -> list[Tensor]:
        """The levels of the last column, (n, dim, h / patch, w / patch) each."""
        x = self.picture(x)
        state: State = self.columns.final_state(self.stem(x))
        rows = x.shape[2] // self.patch
        # Stream 0 is the stem's output, which no column changes.
        return [tokens.transpose(1, 2).unflatten(2, (rows, -1)) for tokens in state[1:]]

    def pool(self, x: Tensor) -> Tensor:
        """The mean of the last level's tokens."""
        return x.mean(1)

    def features_and_maps(self, x: Tensor, norm: bool = False) -> tuple[Tensor, list[Tensor]]:
        found = self.maps(x)
        return found[-1].flatten(2).transpose(1, 2), found

    def parameter_depths(self) -> dict[str, int]:
        return grid_depths(self, self.blocks, 2)

    def init_head(self, head: nn.Module) -> None:
        init_tokens(head)


_BASE = {"dim": 384, "heads": 6}

REVCOL_VITS: dict[str, dict[str, Any]] = {
    # Cai et al. 2023, arXiv 2212.11696, appendix. The base one also in other numbers of columns, of 48 blocks in all.
    "revcol_vit_small": {"dim": 224, "heads": 4, "blocks": (2, 2, 2, 2), "columns": 4},
    "revcol_vit_base": {**_BASE, "blocks": (3, 3, 3, 3), "columns": 4},
    "revcol_vit_base_1column": {**_BASE, "blocks": (12, 12, 12, 12), "columns": 1},
    "revcol_vit_base_2columns": {**_BASE, "blocks": (6, 6, 6, 6), "columns": 2},
    "revcol_vit_base_8columns": {**_BASE, "blocks": (1, 2, 2, 1), "columns": 8},
}

register_variants(RevColViT, REVCOL_VITS)
