"""Depthwise and patch convolutions that run faster on a CPU than torch's own.

Keys, parameters and results are those of ``nn.Conv2d``; on other devices, so is the code.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from ..tracing import is_traced

Pair = Sequence[int]  # vertical and horizontal

# oneDNN has depthwise kernels for x86 only; elsewhere torch loops over the groups.
_VECTORS = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and torch.backends.mkldnn.is_available()

# Up to this padding oneDNN's depthwise kernel pads on its own; above it oneDNN uses another, many times slower.
_OWN_PADDING = 4

# Elements of a map in one chunk of the weight gradient: 4 MiB.
_AT_A_TIME = 2**20


class _Depthwise(torch.autograd.Function):
    """conv(join(xs)) with one kernel per channel; it saves no map but xs, and its gradients are differentiable."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, padding: Pair, *xs: Tensor) -> Tensor:
        x = joined(xs)
        ctx.save_for_backward(weight, *xs)
        ctx.padding = padding
        return F.conv2d(x, weight, bias, padding=padding, groups=x.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad,) = grads
        weight, *xs = ctx.saved_tensors
        parts: Any = [None] * len(xs)
        grad_weight = grad_bias = None
        # A backward pass inside an autocast region would round the operands again.
        with torch.autocast("cpu", enabled=False):
            if any(ctx.needs_input_grad[3:]):
                # The padding that keeps the size is the same forward and backward.
                turned = weight.to(grad.dtype).flip(2, 3)
                grad_x = F.conv2d(grad, turned, padding=ctx.padding, groups=len(weight))
                parts = grad_x.to(xs[0].dtype).split([x.shape[1] for x in xs], 1)
            if ctx.needs_input_grad[0]:
                grad_weight = weight_gradient(joined(xs), grad, weight.shape[2:], ctx.padding).to(weight.dtype)
            if ctx.needs_input_grad[1]:
                grad_bias = grad.sum((0, 2, 3), dtype=torch.float32).to(weight.dtype)
        return grad_weight, grad_bias, None, *parts


def joined(xs: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """Joins the maps along the channels; a single map is returned as it is, not copied."""
    return xs[0] if len(xs) == 1 else torch.cat(xs, 1)


def weight_gradient(x: Tensor, grad: Tensor, kernel: Pair, padding: Pair) -> Tensor:
    """The weight gradient of a depthwise convolution of stride 1, written as a depthwise convolution.

        dL/dw[c, i, j] = sum over n, y, x of g[n, c, y, x] * X[n, c, y + i - p, x + j - p]

    For every sample and channel this is the map X correlated with g as the kernel, so together they are one convolution
    with n c groups. It runs in single precision even for half-precision maps. oneDNN's own weight gradient spends
    16 x 16 products where a channel needs one, unless the kernel is at most 3 wide.

    Args:
        x: the convolution's argument.
        grad: the gradient with respect to its result.
        kernel: size (i, j) of the kernel.
        padding: p, vertical and horizontal.

    Shapes:
        x: (n, c, h, w); grad: (n, c, h + 2 p - i + 1, w + 2 p - j + 1); the result is (c, 1, i, j).

    Example:
        >>> import torch
        >>> x, grad = torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
        >>> weight_gradient(x, grad, (3, 3), (1, 1))[0, 0]
        tensor([[18., 24., 18.],
                [24., 32., 24.],
                [18., 24., 18.]])
    """
    # A few samples at a time, so that the copies stay small and reuse memory; a compiler plans its memory itself.
    parts = 1 if torch.compiler.is_compiling() else min(len(x), 1 + x.numel() // _AT_A_TIME)
    pairs = zip(x.chunk(parts), grad.chunk(parts), strict=True)
    found = [_correlation(a.float(), b.float(), padding) for a, b in pairs]
    return torch.cat(found).view(len(x), x.shape[1], 1, *kernel).sum(0)


def _correlation(x: Tensor, g: Tensor, padding: Pair) -> Tensor:
    """Correlates every map of x with the map of g for the same sample and channel."""
    # For a kernel no wider than the padding oneDNN has only slow code, so both maps are extended by zeros.
    more = [max(0, p + 1 - size) for p, size in zip(padding, g.shape[2:], strict=True)]
    if any(more):
        x, g = (F.pad(t, (0, more[1], 0, more[0])) for t in (x, g))
    if max(padding) > _OWN_PADDING:
        ph, pw = padding
        x, padding = F.pad(x, (pw, pw, ph, ph)), (0, 0)
    x, g = x.contiguous().flatten(0, 1), g.contiguous().flatten(0, 1)
    return F.conv2d(x[None], g[:, None], padding=padding, groups=len(g))[0]


class DepthwiseConv2d(nn.Conv2d):
    """A convolution with one kernel per channel, and zero padding that keeps the size of the map.

    On a CPU with AVX2 or AVX-512 the weight gradient of a kernel wider than 3 is computed by ``weight_gradient``, with
    the same result up to rounding: forward and backward at 7x7 take 0.2 to 0.6 of torch's time, a quarter in bfloat16.
    Elsewhere (other devices, double precision, forward mode, functorch transforms, traces) this is ``nn.Conv2d``.

    Args:
        channels: width of the map.
        kernel: size of the kernel, odd.

    Shape:
        xs: one map (n, channels, h, w), or several with that total width, which are joined; the result is
            (n, channels, h, w).

    Raises:
        ValueError: an even kernel, which cannot keep the size of the map.

    Example:
        >>> import torch
        >>> DepthwiseConv2d(8, 7)(torch.randn(2, 8, 6, 6)).shape
        torch.Size([2, 8, 6, 6])
    """

    def __init__(self, channels: int, kernel: int):
        if kernel % 2 == 0:
            raise ValueError(f"DepthwiseConv2d: the kernel is {kernel}, want an odd size.")
        super().__init__(channels, channels, kernel, padding=kernel // 2, groups=channels)

    def forward(self, *xs: Tensor, recompute: bool = False) -> Tensor:  # type: ignore[override]
        """The convolution of the joined maps; with ``recompute`` the joined map is not kept for the backward pass."""
        if self._fast(xs[0]):
            padding: Any = self.padding
            given = xs if recompute else (joined(xs),)
            return _Depthwise.apply(self.weight, self.bias, padding, *given)  # type: ignore[return-value]
        if recompute and torch.is_grad_enabled() and not is_traced(xs[0]):
            return checkpoint(self._plain, *xs, use_reentrant=False, preserve_rng_state=False)  # type: ignore
        return self._plain(*xs)

    def _plain(self, *xs: Tensor) -> Tensor:
        return super().forward(joined(xs))

    def _fast(self, x: Tensor) -> bool:
        return (
            not is_traced(x)
            and x.device.type == "cpu"
            and x.dim() == 4
            and x.numel() > 0
            and self.kernel_size[1] > 3
            and self.weight.requires_grad
            and torch.is_grad_enabled()
            and x.dtype in (torch.float32, torch.bfloat16)
            and self.weight.dtype in (torch.float32, torch.bfloat16)
            and torch.backends.mkldnn.enabled  # type: ignore[attr-defined]
            and _VECTORS
            and not torch.jit.is_tracing()  # type: ignore[attr-defined]
            and not torch._C._are_functorch_transforms_active()
            and forward_ad._current_level < 0
        )


class PatchConv2d(nn.Conv2d):
    """A convolution of non-overlapping patches (kernel = stride); with patches of one pixel it is pointwise.

    On a CPU it is one matrix product over all patches, where that needs no copy of the whole map into another layout.
    A compiler chooses its own layouts, so there only one-pixel patches of channels-first maps are a matrix product.
    torch's own code takes one or more products per sample, and is up to twice as slow on small maps.

    Args:
        in_channels: width of the map.
        out_channels: width of the result.
        patch: side of a patch in pixels; rows and columns that do not fill a patch are left out.
        bias: whether a bias is added.

    Shape:
        x: (n, in_channels, h, w); the result is (n, out_channels, h // patch, w // patch).

    Example:
        >>> import torch
        >>> x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
        >>> PatchConv2d(8, 4, 2)(x).shape
        torch.Size([2, 4, 3, 3])
    """

    def __init__(self, in_channels: int, out_channels: int, patch: int, bias: bool = True):
        super().__init__(in_channels, out_channels, patch, patch, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        side = self.kernel_size[0]
        if side == 1 and _is_compiled_product(input):
            # Not the form below: for permuted maps inductor generates code that is slower than the convolution.
            x = (self.weight.flatten(1) @ input.flatten(2)).unflatten(2, input.shape[2:])
            return x if self.bias is None else x + self.bias.to(x.dtype)[:, None, None]
        if not is_product(input, side):
            return super().forward(input)
        x, weight = input.permute(0, 2, 3, 1), self.weight
        if side > 1:
            x = rearrange(x, "n (h i) (w j) c -> n h w (i j c)", i=side, j=side)
            weight = weight.permute(0, 2, 3, 1)
        return F.linear(x, weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def is_product(x: Tensor, patch: int = 1) -> bool:
    """Whether a convolution of patches is computed as one matrix product, since that is faster."""
    return (
        not is_traced(x)
        and x.device.type == "cpu"
        and x.dim() == 4
        and (patch > 1 or x.is_contiguous(memory_format=torch.channels_last))
        and x.shape[2] % patch == x.shape[3] % patch == 0
        and not torch.compiler.is_compiling()
    )


def _is_compiled_product(x: Tensor) -> bool:
    """Whether dynamo traces a map on whose pixels a matrix product is faster; an exported graph keeps convolutions."""
    return (
        torch.compiler.is_dynamo_compiling()
        and x.device.type == "cpu"
        and x.dim() == 4
        # From a channels-last map, inductor would write the product's argument pixel by pixel.
        and x.is_contiguous()
    )
