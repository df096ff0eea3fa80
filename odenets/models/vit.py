"""Vision transformers: the encoder is a ``Stack`` of attention and perceptron functions, under any scheme.

Under euler it is the published ViT. The functions alternate, so that a scheme of two stages pairs attention with a
perceptron, and ``nested(midpoint, repeat(euler, 2))`` makes midpoint steps of whole transformer blocks.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn

import schemes
from schemes import Slot

from ..checkpoints import KeyMap
from ..layers.attention import AttentionFunction, PatchTokens, PerceptronFunction, TransformerFunction
from ..layers.drop_path import linear_rates
from ..stack import Stack
from .catalogue import register_variants
from .depth import level_depths
from .head import HeadNet
from .keys import vit as keys_of_vit
from .keys.layout import twin
from .levels import check_continuous, check_streams, made_continuous, shared_level, steps_that_fit

Pool = Literal["token", "avg", ""]


class ViT(HeadNet):
    """Vision transformer; the defaults are ViT-Ti/16: 5,717,416 parameters.

    State-dict keys: ``stem.{proj,class_token,positions}``, ``levels.0.steps.{n}.fs.{i}.*``, ``norm``, ``head``. The
    layout of the public ViT weights (``blocks.{i}.attn.qkv.weight``) loads through ``odenets.checkpoints.load``.

    Args:
        depth: transformer blocks, of two residual functions each.
        dim: width of a token.
        heads: heads of attention.
        scheme: a scheme whose functions take one argument; its stages must divide ``2 * depth``, or ``depth`` with
            ``continuous``.
        patch: side of a patch.
        size: side of the pictures that the positions are made for; for others they are interpolated.
        ratio: hidden width of the perceptrons over ``dim``.
        step: step size, as in Stack.
        backprop: as in Stack.
        global_pool: "token" (the class token), "avg" (the mean of the picture's tokens) or "" (all tokens, no head).
        continuous: number of knots of weights that are functions of depth: one field for all steps, which is a whole
            transformer block, over a span of the number of steps; None means separate weights.
        degree: degree of their splines.
        depth_init: whether block k = 1, 2 ... starts with its outputs divided by sqrt(2 k), as in BEiT.
        head: as in ``HeadNet``.

    Shapes:
        x: (n, in_chans, h, w), h and w multiples of ``patch``; the result is (n, num_classes).

    Raises:
        SchemeError: the scheme does not fit the number of functions (the nearest that do are named), or a wrong option.

    Source:
        Dosovitskiy et al. 2021, arXiv 2010.11929; sizes: Touvron et al. 2021, DeiT, arXiv 2012.12877, table 1.

    Example:
        >>> import torch
        >>> net = ViT(2, 16, 2, "nested(midpoint, repeat(euler, 2))", patch=4, size=16, num_classes=10)
        >>> net(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """

    first_conv = "stem.proj"
    pools = get_args(Pool)
    unpooled = ("tokens", "one vector")
    whole = True

    def __init__(
        self,
        depth: int = 12,
        dim: int = 192,
        heads: int = 3,
        scheme: str = "euler",
        patch: int = 16,
        size: int = 224,
        ratio: float = 4,
        step: float | str = 1.0,
        backprop: str = "store",
        global_pool: Pool = "token",
        continuous: int | None = None,
        degree: int = 1,
        depth_init: bool = False,
        **head: Any,
    ):
        super().__init__(global_pool=global_pool, **head)  # type: ignore[arg-type]
        check_continuous(continuous, degree, step, depth_init=depth_init)
        found = schemes.get(scheme)
        steps = steps_that_fit(found, (2 if continuous is None else 1) * depth, 1)
        self.patch = patch
        self.stem = PatchTokens(dim, patch, size, self.in_chans)
        check_streams(found, steps, dim, "a ViT", dim=2, ndim=3, heads=heads)
        if continuous is None:
            make = _alternating(heads, ratio, linear_rates(self.drop_path_rate, depth))
            stack = Stack.from_factory(make, found, steps, channels=dim, step=step, backprop=backprop)
        else:
            # One block serves all depths, so it has the mean of the rates that would grow from 0.
            make = _whole_block(heads, ratio, self.drop_path_rate / 2)
            stack = shared_level(make, found, steps, width=dim, backprop=backprop)
        # A list of one level, so that keys and depths are as in the other networks.
        self.levels = nn.Sequential(stack)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.finish([{"num_chs": dim, "reduction": patch, "module": "levels.0"}], init_tokens)
        # After `finish`, which draws the weights.
        if depth_init:
            scale_by_depth([f for part in stack.steps for f in part.fs or ()])
        self.levels[0] = made_continuous(stack, continuous, degree)

    def forward_features(self, x: Tensor) -> Tensor:
        """All tokens, normalised, the class token first: (n, 1 + h w / patch^2, dim)."""
        return self.norm(self.levels(self.stem(self.picture(x))))

    def maps(self, x: Tensor, last: int | None = None) -> list[Tensor]:
        """The picture's tokens as a map, before the last norm: [(n, dim, h / patch, w / patch)]."""
        return self.features_and_maps(x)[1]

    def features_and_maps(self, x: Tensor, norm: bool = False) -> tuple[Tensor, list[Tensor]]:
        x = self.picture(x)
        tokens = self.levels(self.stem(x))
        y = self.norm(tokens)
        # Without the class token, which has no position in the picture.
        of_picture = (y if norm else tokens)[:, 1:]
        return y, [of_picture.transpose(1, 2).unflatten(2, (x.shape[2] // self.patch, -1))]

    def pool(self, x: Tensor) -> Tensor:
        """The class token, or the mean of the picture's tokens: (n, dim)."""
        return x[:, 0] if self.global_pool == "token" else x[:, 1:].mean(1)

    def init_head(self, head: nn.Module) -> None:
        init_tokens(head)

    def parameter_depths(self) -> dict[str, int]:
        # Attention and perceptron of a block share a depth.
        return level_depths(self, 2)

    def key_map(self, keys: Collection[str]) -> KeyMap | None:
        """Maps the keys of the public ViT layout to ours, or those of a twin under another scheme.

        Args:
            keys: all keys of a file.
        """
        own = self.state_dict().keys()
        return keys_of_vit.published(own, keys) or twin(own, keys)


def _alternating(heads: int, ratio: float, rates: Sequence[float]) -> Callable[[Slot], nn.Module]:
    """Returns a factory of attention and perceptron in turn, whatever the scheme; both of a block share a drop rate."""
    left = iter([(kind, rate) for rate in rates for kind in ("attention", "perceptron")])

    def make(slot: Slot) -> nn.Module:
        (kind, rate), width = next(left), slot.out_channels
        if kind == "attention":
            return AttentionFunction(width, heads, drop_path=rate)
        return PerceptronFunction(width, ratio, drop_path=rate)

    return make


def _whole_block(heads: int, ratio: float, rate: float) -> Callable[[Slot], nn.Module]:
    """Returns a factory of whole blocks, the field of a network whose weights are functions of depth."""

    def make(slot: Slot) -> nn.Module:
        width = slot.out_channels
        attention = AttentionFunction(width, heads, drop_path=rate)
        return TransformerFunction(attention, PerceptronFunction(width, ratio, drop_path=rate))

    return make


def init_tokens(module: nn.Module) -> None:
    """Draws linear and patch weights from a normal distribution of standard deviation 0.02; biases become zero."""
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d, nn.Embedding)):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if getattr(m, "bias", None) is not None:
                nn.init.zeros_(m.bias)  # type: ignore[arg-type]


def scale_by_depth(functions: Sequence[nn.Module]) -> None:
    """Divides the outputs of block k = 1, 2 ... of attention and perceptron by sqrt(2 k).

    Args:
        functions: attention and perceptron in turn.

    Source:
        Bao et al. 2022, BEiT, arXiv 2106.08254.
    """
    for i, f in enumerate(functions):
        f.scale_output((2 * (i // 2 + 1)) ** -0.5)  # type: ignore[operator]


def alternating(
    dim: int, heads: int, blocks: int, rates: Sequence[float], ratio: float = 4, drop: float = 0.0
) -> list[nn.Module]:
    """Returns blocks of post-norm cosine attention and perceptron, as one list of residual functions."""
    found: list[nn.Module] = []
    for _, rate in zip(range(blocks), rates, strict=True):
        found.append(AttentionFunction(dim, heads, norm="post", cosine=True, drop=drop, drop_path=rate))
        found.append(PerceptronFunction(dim, ratio, norm="post", drop=drop, drop_path=rate))
    return found


VITS: dict[str, dict[str, Any]] = {
    # Touvron et al. 2021, arXiv 2012.12877, table 1. ``scheme`` makes high-order twins of equal parameters.
    "vit_tiny_patch16": {"depth": 12, "dim": 192, "heads": 3},
    "vit_small_patch16": {"depth": 12, "dim": 384, "heads": 6},
    "vit_base_patch16": {"depth": 12, "dim": 768, "heads": 12},
}

register_variants(ViT, VITS)
