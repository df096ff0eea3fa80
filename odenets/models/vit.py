"""Vision transformers: the encoder is a ``Stack`` of attention and perceptron functions, under any scheme.

Under euler it is the published ViT. The functions alternate, so that a scheme of two stages pairs attention with a
perceptron, and ``nested(midpoint, repeat(euler, 2))`` makes midpoint steps of whole transformer blocks.
"""

import re
from collections.abc import Collection, Sequence
from typing import Literal, get_args

from torch import Tensor, nn

import schemes
from schemes import SchemeError, Slot

from ..checkpoints import KeyMap
from ..layers.attention import AttentionFunction, PatchTokens, PerceptronFunction
from ..layers.drop_path import linear_rates
from ..stack import Stack
from .head import HeadNet
from .keys import Rule, function_key, places_of, renamed, twin
from .level_net import check_rates
from .levels import steps_that_fit

Pool = Literal["token", "avg", ""]


class ViT(HeadNet):
    """Vision transformer; the defaults are ViT-Ti/16: 5,717,416 parameters.

    State-dict keys: ``stem.{proj,class_token,positions}``, ``levels.0.steps.{n}.fs.{i}.*``, ``norm``, ``head``. The
    layout of the public ViT weights (``blocks.{i}.attn.qkv.weight``) loads through ``odenets.checkpoints.load``.

    Args:
        depth: transformer blocks, of two residual functions each.
        dim: width of a token.
        heads: heads of attention.
        scheme: one that gives its functions one argument; its stages must divide ``2 * depth``.
        patch: side of a patch.
        size: side of the pictures that the positions are made for; others are interpolated.
        ratio: hidden width of the perceptrons over ``dim``.
        step: step size, as in Stack.
        backprop: as in Stack.
        num_classes: width of the head; 0 gives features.
        in_chans: channels of the picture.
        global_pool: "token" (the class token), "avg" (the mean of the picture's tokens) or "" (all tokens, no head).
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth, growing from 0 over the depth.

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

    pools = get_args(Pool)
    unpooled = ("tokens", "one vector")

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
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: Pool = "token",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        found = schemes.get(scheme)
        steps = steps_that_fit(found, 2 * depth, 1)
        self.patch, self.drop_rate = patch, drop_rate
        self.num_features = self.head_hidden_size = dim
        self.feature_info = [{"num_chs": dim, "reduction": patch, "module": "levels.0"}]
        self.stem = PatchTokens(dim, patch, size, in_chans)
        # Both functions of a block are dropped at one rate.
        rates = iter([rate for rate in linear_rates(drop_path_rate, depth) for _ in range(2)])
        kinds = iter([True, False] * depth)

        def make(slot: Slot) -> nn.Module:
            if len(slot.in_channels) != 1 or slot.in_channels[0] != slot.out_channels:
                raise SchemeError(f"{found}: the functions of a ViT take one argument, of the width that they return.")
            rate, width = next(rates), slot.out_channels
            if next(kinds):
                return AttentionFunction(width, heads, drop_path=rate)
            return PerceptronFunction(width, ratio, drop_path=rate)

        self.levels = nn.Sequential(Stack.from_factory(make, found, steps, channels=dim, step=step, backprop=backprop))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.reset_classifier(num_classes, global_pool)
        init_tokens(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """All tokens, normalised, the class token first: (n, 1 + h w / patch^2, dim)."""
        check_sides(x, self.patch)
        return self.norm(self.levels(self.stem(x)))

    def maps(self, x: Tensor) -> list[Tensor]:
        """The picture's tokens as a map, before the last norm: [(n, dim, h / patch, w / patch)]."""
        check_sides(x, self.patch)
        tokens = self.levels(self.stem(x))[:, 1:]
        return [tokens.transpose(1, 2).unflatten(2, (x.shape[2] // self.patch, -1))]

    def pool(self, x: Tensor) -> Tensor:
        """The class token, or the mean of the picture's tokens: (n, dim)."""
        return x[:, 0] if self.global_pool == "token" else x[:, 1:].mean(1)

    def init_head(self, head: nn.Module) -> None:
        init_tokens(head)

    def key_map(self, keys: Collection[str]) -> KeyMap | None:
        """Names of the public ViT layout's keys here, or of a twin's under another scheme."""
        own = self.state_dict().keys()
        if "patch_embed.proj.weight" not in keys:
            return twin(own, keys)
        places = places_of(own)

        def part(m: re.Match[str]) -> str | None:
            norm = "norm." if m[2].startswith("norm") else ""
            return function_key(places, 0, 2 * int(m[1]) + (m[2] in ("norm2", "mlp")), norm + m[3])

        rules: dict[str, Rule] = {
            "cls_token": "stem.class_token",
            "pos_embed": "stem.positions",
            r"patch_embed\.(.+)": r"stem.\1",
            r"blocks\.(\d+)\.(norm1|attn|norm2|mlp)\.(.+)": part,
            r"(.+)": r"\1",
        }
        return renamed("public ViT", rules, keys, own)


def check_sides(x: Tensor, patch: int) -> None:
    """Raises SchemeError for a picture that the patches do not fill."""
    height, width = x.shape[-2:]
    if height % patch or width % patch:
        raise SchemeError(f"the picture is {height} x {width}, the patches {patch} x {patch}; want whole patches.")


def init_tokens(module: nn.Module) -> None:
    """Weights of linear layers and patches from a normal distribution of standard deviation 0.02; biases zero."""
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d, nn.Embedding)):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if getattr(m, "bias", None) is not None:
                nn.init.zeros_(m.bias)  # type: ignore[arg-type]


def alternating(
    dim: int, heads: int, blocks: int, rates: Sequence[float], ratio: float = 4, drop: float = 0.0
) -> list[nn.Module]:
    """Blocks of post-normalised cosine attention and perceptron, as one list of residual functions."""
    found: list[nn.Module] = []
    for _, rate in zip(range(blocks), rates, strict=True):
        found.append(AttentionFunction(dim, heads, norm="post", cosine=True, drop=drop, drop_path=rate))
        found.append(PerceptronFunction(dim, ratio, norm="post", drop=drop, drop_path=rate))
    return found
