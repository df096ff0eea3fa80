"""RevCol-ViT: reversible columns of transformer blocks, all levels of one resolution and width."""

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from schemes import SchemeError
from schemes.columns import RevCol as Coupling
from schemes.scheme import State

from ..layers import ChannelScale, linear_rates
from ..layers.attention import AttentionFunction, PatchTokens
from ..layers.column import Classifier, LevelFunction, pooled
from ..stack import Stack
from .level_net import check_rates
from .vit import alternating, check_sides, init_tokens

Pool = Literal["avg", ""]


class Linked(nn.Module):
    """From a neighbouring level of the same size: a linear layer, then LayerNorm. x: (n, t, dim)."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


class TokenLevel(LevelFunction):
    """A level of tokens: as ``LevelFunction``; the context is the mask (n, t) of tokens that attention may read."""

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
    """A ``Stack`` over the multi-level coupling whose streams are tokens (n, t, dim), all of one shape.

    Args:
        columns: number of columns.
        dim: width of a token.
        heads: heads of attention.
        blocks: transformer blocks per level.
        drop: dropout of each residual function's result.
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
            own, rates = rates[:count], rates[count:]
            fs.append(TokenLevel(below, above, alternating(dim, heads, count, own, drop=drop)))
    scales = [[ChannelScale(dim, dim=2, ndim=3) for _ in blocks] if n else [] for n in range(columns)]
    return Stack(fs, Coupling(len(blocks), growth=1), shortcut=scales, backprop=backprop)


class RevColViT(nn.Module):
    """Isotropic RevCol of transformer blocks; the defaults are the small one.

    A level reads its neighbours through a linear layer and LayerNorm, where RevCol merges patches and upsamples; its
    blocks normalise after each function, and attention compares normalised queries and keys.

    State-dict keys: ``stem.*``, ``columns.steps.{n}.{fs,gs}.{l}.*``, ``head.{norm,fc}``.

    Args:
        dim: width of a token, on every level.
        blocks: transformer blocks per level.
        heads: heads of attention.
        columns: number of columns.
        patch: side of a patch.
        size: side of the pictures that the positions are made for; others are interpolated.
        backprop: as in Stack; "reverse" trains in memory that hardly grows with the columns.
        num_classes: width of the head; 0 gives features.
        in_chans: channels of the picture.
        global_pool: "avg", or "" for the last level's tokens (without a head).
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth, growing over the blocks of one column; every column alike.

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

    def __init__(
        self,
        dim: int = 224,
        blocks: Sequence[int] = (2, 2, 2, 2),
        heads: int = 4,
        columns: int = 4,
        patch: int = 16,
        size: int = 224,
        backprop: str = "store",
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: Pool = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        if not blocks or min(blocks) < 1 or columns < 1:
            raise SchemeError(f"RevColViT: blocks {tuple(blocks)}, columns {columns}; want at least one of each.")
        self.patch, self.drop_rate = patch, drop_rate
        self.num_features = self.head_hidden_size = dim
        self.feature_info = [
            {"num_chs": dim, "reduction": patch, "module": f"columns.steps.{columns - 1}:{level + 1}", "map": level}
            for level in range(len(blocks))
        ]
        self.stem = PatchTokens(dim, patch, size, in_chans, class_token=False, norm=True)
        self.columns = columns_of_tokens(columns, dim, heads, blocks, drop_path=drop_path_rate, backprop=backprop)
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes, global_pool)
        init_tokens(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, num_classes), or features where there is no head. x: (n, in_chans, h, w)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last level's tokens in the last column: (n, h w / patch^2, dim)."""
        check_sides(x, self.patch)
        return self.columns(self.stem(x))

    def maps(self, x: Tensor) -> list[Tensor]:
        """The levels of the last column, (n, dim, h / patch, w / patch) each."""
        check_sides(x, self.patch)
        state: State = self.columns.visit(self.stem(x))
        rows = x.shape[2] // self.patch
        return [tokens.transpose(1, 2).unflatten(2, (rows, -1)) for tokens in state[1:]]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools and classifies tokens; ``pre_logits`` stops before the head."""
        if not self.global_pool:
            return x
        x = pooled(x)
        return self.head.from_pooled(x) if isinstance(self.head, Classifier) and not pre_logits else x

    def get_classifier(self) -> nn.Module:
        """The head: mean, norm and linear layer, or the identity."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Pool | None = None) -> None:
        """Puts a new head in, on the device and in the dtype of the old one.

        Args:
            num_classes: its width; 0 leaves features.
            global_pool: "avg" or "", None keeps it.

        Raises:
            SchemeError: an unknown pooling, or a head over unpooled tokens.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in get_args(Pool):
            raise SchemeError(f"global_pool is {pool!r}, want 'avg' or ''.")
        if num_classes and not pool:
            raise SchemeError(f"global_pool='' gives tokens, and {num_classes} classes need one vector: num_classes=0.")
        self.global_pool: Pool = pool
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            self.head = Classifier(self.num_features, num_classes, self.drop_rate).to(next(self.stem.parameters()))
            init_tokens(self.head)
