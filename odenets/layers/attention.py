"""The residual functions of a transformer: attention between tokens, and a perceptron at each token."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tracing import is_traced
from .conv import PatchConv2d
from .drop_path import DropPath
from .width import scaled_width

NormPlace = Literal["pre", "post"]


class AttentionFunction(nn.Module):
    """Multi-head self-attention: F(x) = W softmax(Q K^T / sqrt(d)) V, with LayerNorm before or after it.

    Args:
        dim: width of a token.
        heads: number of heads, a divisor of ``dim``.
        norm: "pre" normalises the argument, "post" the result.
        cosine: whether queries and keys have unit length, with a learned factor per head in place of 1 / sqrt(d).
        drop: dropout rate of the result.
        drop_path: probability that a sample's result is zero while training.

    Shape:
        x: (n, t, dim); the result has the same shape.

    Raises:
        ValueError: the heads do not divide the width; in a call, a mask that is not of booleans.

    Source:
        Vaswani et al. 2017, arXiv 1706.03762; cosine and post-norm: Liu et al. 2022, Swin Transformer V2, arXiv
        2111.09883, section 3.2.

    Example:
        >>> import torch
        >>> AttentionFunction(8, 2)(torch.randn(1, 5, 8)).shape
        torch.Size([1, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        norm: NormPlace = "pre",
        cosine: bool = False,
        drop: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"AttentionFunction: {heads} heads for a width of {dim}, want a divisor.")
        self.heads, self.pre = heads, norm == "pre"
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        # Stored as a logarithm, so that the factor stays positive; it starts at 10, as published.
        self.log_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10))) if cosine else None
        self.drop = nn.Dropout(drop)
        self.drop_path = DropPath(drop_path) if drop_path else None

    def scale_output(self, factor: float) -> None:
        """Scales the function's output permanently: the last linear layer, or with "post" the norm after it."""
        _scale_output(self.proj if self.pre else self.norm, factor)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        n, t, dim = x.shape
        y = self.norm(x) if self.pre else x
        q, k, v = self.qkv(y).view(n, t, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        scale = None
        if self.log_scale is not None:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            # Bounded, as published: a larger factor makes the softmax one-hot, and its gradient zero.
            q, scale = q * self.log_scale.clamp(max=math.log(100)).exp(), 1.0
        # The context, where given, is a mask (n, t) of the tokens: true for those that may be attended to.
        mask = None if context is None else _checked(context)[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        y = self.proj(y.transpose(1, 2).reshape(n, t, dim))
        y = self.drop(y if self.pre else self.norm(y))
        return y if self.drop_path is None else self.drop_path(y)


def _checked(mask: Tensor) -> Tensor:
    """Refuses numbers, which attention would add to its logits: ones and zeros would hardly mask anything."""
    if mask.dtype != torch.bool:
        raise ValueError(
            f"AttentionFunction: the mask is {str(mask.dtype).removeprefix('torch.')}, want booleans, true for tokens "
            "that may be attended to.\n  Give mask.bool() if it has ones for these, and zeros."
        )
    return mask


class PerceptronFunction(nn.Module):
    """A one-hidden-layer perceptron at each token: F(x) = W2 GELU(W1 LN(x)), or the LN of W2 GELU(W1 x).

    Args:
        dim: width of a token.
        ratio: hidden width over ``dim``.
        norm: "pre" normalises the argument, "post" the result.
        drop: dropout rate of the result.
        drop_path: probability that a sample's result is zero while training.

    Shape:
        x: (n, t, dim); the result has the same shape.

    Source:
        Dosovitskiy et al. 2021, An Image is Worth 16x16 Words, arXiv 2010.11929, equation 3.

    Example:
        >>> import torch
        >>> PerceptronFunction(8)(torch.randn(1, 5, 8)).shape
        torch.Size([1, 5, 8])
    """

    def __init__(
        self, dim: int, ratio: float = 4, *, norm: NormPlace = "pre", drop: float = 0.0, drop_path: float = 0.0
    ):
        super().__init__()
        self.pre = norm == "pre"
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        hidden = scaled_width(dim, ratio)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)
        self.drop_path = DropPath(drop_path) if drop_path else None

    def scale_output(self, factor: float) -> None:
        """Scales the function's output permanently: the last linear layer, or with "post" the norm after it."""
        _scale_output(self.fc2 if self.pre else self.norm, factor)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(F.gelu(self.fc1(self.norm(x) if self.pre else x)))
        y = self.drop(y if self.pre else self.norm(y))
        return y if self.drop_path is None else self.drop_path(y)


def _scale_output(last: nn.Linear | nn.LayerNorm, factor: float) -> None:
    with torch.no_grad():
        last.weight.mul_(factor)
        if last.bias is not None:
            last.bias.mul_(factor)


class TransformerFunction(nn.Module):
    """A whole transformer block without its skip: F(x) = a + P(x + a) with a = A(x), attention and then a perceptron.

    Under euler with a step size of 1, x + F(x) is the block itself; as one function it is a vector field that any
    scheme can integrate.

    Args:
        attention: A.
        perceptron: P.

    Shape:
        x: (n, t, dim); the result has the same shape.

    Example:
        >>> import torch
        >>> TransformerFunction(AttentionFunction(8, 2), PerceptronFunction(8))(torch.randn(1, 5, 8)).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, attention: AttentionFunction, perceptron: PerceptronFunction):
        super().__init__()
        self.attention, self.perceptron = attention, perceptron

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        a = self.attention(x, context)
        return a + self.perceptron(x + a)


class PatchTokens(nn.Module):
    """Cuts a picture into patches, one token each, and adds learned positions.

    For picture sizes other than ``size`` the positions are interpolated (bicubic).

    Args:
        dim: width of a token.
        patch: side of a patch.
        size: side of the pictures that the positions are made for.
        in_chans: channels of the picture.
        class_token: whether a learned token precedes those of the picture.
        norm: whether LayerNorm follows the linear map of the patches, before the positions are added.

    Shape:
        x: (n, in_chans, h, w), h and w multiples of ``patch``; the result is (n, t, dim), row by row.
    """

    def __init__(
        self,
        dim: int,
        patch: int = 16,
        size: int = 224,
        in_chans: int = 3,
        *,
        class_token: bool = True,
        norm: bool = False,
    ):
        super().__init__()
        self.patch, self.grid = patch, size // patch
        self.proj = PatchConv2d(in_chans, dim, patch)
        self.norm = nn.LayerNorm(dim, eps=1e-6) if norm else nn.Identity()
        # Zero, since its learned position is random already.
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.grid**2 + int(class_token), dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        # Before the map is flattened, which loses its height and width.
        positions = self._positions(x.shape[2], x.shape[3])
        x = self.norm(x.flatten(2).transpose(1, 2))
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1)
        return x + positions

    def _positions(self, height: int, width: int) -> Tensor:
        # In a trace the size is unknown, so positions are always interpolated; at their own size that changes nothing.
        if not is_traced(height) and height == width == self.grid:
            return self.positions
        return interpolated(self.positions, self.grid, height, width)

    def fitted(self, positions: Tensor) -> Tensor:
        """Resizes the positions of another square picture to this grid; any others are returned unchanged.

        Args:
            positions: (1, t, dim), with as many tokens before those of the picture as here.
        """
        tokens = positions.shape[1] - (self.positions.shape[1] - self.grid**2) if positions.dim() == 3 else 0
        grid = math.isqrt(max(0, tokens))
        if grid == 0 or grid**2 != tokens:
            return positions
        return interpolated(positions, grid, self.grid, self.grid)


def interpolated(positions: Tensor, grid: int, height: int, width: int) -> Tensor:
    """Resizes positions (1, first + grid^2, dim) to height x width patches, bicubic; the first ones are unchanged."""
    first = positions.shape[1] - grid**2
    of_picture = positions[:, first:].transpose(1, 2).unflatten(2, (grid, grid))
    # Not every device has a half-precision kernel, and single precision rounds the positions only once.
    wide = of_picture if of_picture.dtype is torch.float64 else of_picture.float()
    wide = F.interpolate(wide, (height, width), mode="bicubic", antialias=True, align_corners=False)
    of_picture = wide.to(of_picture.dtype)
    return torch.cat([positions[:, :first], of_picture.flatten(2).transpose(1, 2)], 1)
