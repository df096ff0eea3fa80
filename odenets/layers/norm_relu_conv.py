"""BatchNorm, ReLU and a convolution as one node of the graph, which saves neither the norm's nor the ReLU's result."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .conv import is_product, joined


class _NormReluConv(torch.autograd.Function):
    """conv(relu(norm([x_0, x_1, ...]))), saving only the maps x_j and the batch statistics."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor, kernel: Tensor, norm: nn.BatchNorm2d, conv: nn.Conv2d, *xs: Tensor
    ) -> Tensor:
        x = joined(xs)
        y, mean, rstd = torch.native_batch_norm(
            x, weight, bias, norm.running_mean, norm.running_var, True, norm.momentum or 0.0, norm.eps
        )
        # The maps as given: as streams they stay alive anyway, whereas x would be a copy of them all.
        ctx.save_for_backward(weight, bias, kernel, mean, rstd, *xs)
        ctx.eps, ctx.padding = norm.eps, conv.padding[0]
        # In place is safe: y is created here, and recomputed in the backward pass.
        out = conv(y.relu_())
        ctx.dtype = out.dtype  # under autocast that of the product, which may differ from the map's
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad,) = grads
        weight, bias, kernel, mean, rstd, *xs = ctx.saved_tensors
        x = joined(xs)
        # With known statistics the norm is one pass over the map; the variance follows from rstd.
        var = rstd.square().reciprocal_().sub_(ctx.eps)
        y = F.batch_norm(x, mean, var, weight, bias, False, 0.0, ctx.eps).relu_()
        # The maps come after five other arguments.
        need_x = any(ctx.needs_input_grad[5:])
        grad_y, grad_kernel = _convolve_backward(grad, y.to(ctx.dtype), kernel.to(ctx.dtype), ctx.padding)
        # The ReLU's result serves as its argument here: it is 0 wherever the argument was not positive.
        grad_y = torch.ops.aten.threshold_backward(grad_y.to(y.dtype), y, 0)
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad_y, x, weight, None, None, mean, rstd, True, ctx.eps, [need_x, True, True]
        )
        parts = grad_x.split([part.shape[1] for part in xs], 1) if need_x else [None] * len(xs)
        return grad_weight, grad_bias, grad_kernel.to(kernel.dtype), None, None, *parts


def _convolve_backward(grad: Tensor, y: Tensor, kernel: Tensor, padding: int) -> tuple[Tensor, Tensor]:
    """Returns the gradients with respect to the map and to the kernel."""
    if kernel.shape[2:] == (1, 1) and is_product(y):
        rows = grad.permute(0, 2, 3, 1)
        grad_y = (rows @ kernel.flatten(1)).permute(0, 3, 1, 2)
        rows = rows.reshape(-1, len(kernel))
        return grad_y, (rows.t() @ y.permute(0, 2, 3, 1).reshape(len(rows), -1))[:, :, None, None]
    options: Any = (None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, [True, True, False])
    return torch.ops.aten.convolution_backward(grad, y, kernel, *options)[:2]


def norm_relu_conv(norm: nn.BatchNorm2d, conv: nn.Conv2d, *xs: Tensor) -> Tensor:
    """conv(relu(norm(x))) of the joined maps x, keeping only the maps for the backward pass.

    Running statistics are updated once. Where the plain operations are needed (evaluation, synchronised or cumulative
    statistics, a norm without weights, a convolution with bias, stride or groups, a compiler, which itself chooses what
    to keep), those run, with the same value; so they do for one value per channel, which they refuse.

    Cost: one additional joined copy and one additional pass of the norm and the ReLU, in the backward pass; no
    convolution and no statistics are computed again. Second derivatives raise an error.

    Args:
        norm: the norm.
        conv: the convolution.
        xs: one map, or several that are joined along the channels.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> norm, conv, x = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False), torch.randn(2, 4, 3, 3)
        >>> torch.allclose(norm_relu_conv(norm, conv, *x.split(2, 1)), conv(norm(x).relu()), atol=1e-6)
        True
    """
    if _saves(norm, conv, xs[0]):
        # The kernel updates the running statistics but not the counter, which the norm's own forward increments.
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        return _NormReluConv.apply(norm.weight, norm.bias, conv.weight, norm, conv, *xs)  # type: ignore
    x = joined(xs)
    return conv(F.relu(norm(x), inplace=True))


def _saves(norm: nn.BatchNorm2d, conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether the node of its own has the value of the plain operations, and memory to save."""
    return (
        # Exactly this class: a subclass may compute its statistics differently.
        type(norm) is nn.BatchNorm2d
        and isinstance(conv, nn.Conv2d)
        and norm.training
        and norm.affine
        and norm.momentum is not None
        and norm.running_mean is not None
        and norm.track_running_stats
        # One value per channel has no variance, which the norm's own forward refuses, and the kernel does not.
        and x.dim() == 4
        and x.numel() > x.shape[1]
        and conv.bias is None
        and conv.stride == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and isinstance(conv.padding, tuple)
        and conv.padding[0] == conv.padding[1]
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )
