"""The residual function of ConvNeXt, which RDNet's feature mixers and RevCol's blocks share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .conv import DepthwiseConv2d
from .drop_path import DropPath
from .width import scaled_width


class ChannelGate(nn.Module):
    """A factor per sample and channel from the map's mean: hard_sigmoid(W mean(x) + b), "effective squeeze-excitation".

    Returns the factor, not the product, so that a caller can combine it with its own scale.

    Args:
        channels: width of the map.

    Shape:
        x: (n, h, w, channels), channels last; the result is (n, 1, 1, channels), from 0 to 1.

    Source:
        Lee and Park 2020, CenterMask, arXiv 1911.06667, section 3.4.

    Example:
        >>> import torch
        >>> ChannelGate(8)(torch.randn(2, 4, 4, 8)).shape
        torch.Size([2, 1, 1, 8])
    """

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.hardsigmoid(self.fc(x.mean((1, 2), keepdim=True)))


class ConvNeXtFunction(nn.Module):
    r"""Depthwise convolution, LayerNorm, and a perceptron of one hidden layer at each pixel; no skip of its own.

    .. math:: F(x) = \gamma \, W_2 \, \mathrm{GELU}(W_1 \, \mathrm{LN}(\mathrm{dwconv}(x)))

    The hidden layer is ``expansion`` times as wide as the argument; the result may be narrower (RDNet). From the norm
    onwards the channels come last, so that the two linear layers are plain matrix products without copies.

    Args:
        in_channels: width of the argument.
        out_channels: width of the result; None means the argument's.
        kernel: size of the depthwise convolution, odd.
        expansion: hidden width over the argument's width, rounded down to a multiple of ``divisor``.
        divisor: see ``expansion``.
        hidden: the hidden width itself, in place of ``expansion``.
        layer_scale: initial value of gamma, one number per channel; None leaves gamma out.
        gate: whether the result is multiplied by a ``ChannelGate``.
        drop_path: probability that a sample's result is zero while training.
        recompute: whether only the depthwise convolution's result is kept for the backward pass; the joined argument,
            the norm, the first product and the GELU are recomputed, the convolution and the second product are not.

    Shape:
        xs: one map (n, in_channels, h, w), or several with that total width, which are joined; the result is
            (n, out_channels, h, w), channels-last in memory.

    Raises:
        ValueError: an even kernel, which cannot keep the size of the map.

    Source:
        Liu et al. 2022, A ConvNet for the 2020s, arXiv 2201.03545, figure 4; as a feature mixer: Kim et al. 2024,
        DenseNets Reloaded, arXiv 2403.19588, section 3.

    Example:
        >>> import torch
        >>> ConvNeXtFunction(8, 4, gate=True)(torch.randn(2, 8, 6, 6)).shape
        torch.Size([2, 4, 6, 6])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        kernel: int = 7,
        expansion: float = 4,
        divisor: int = 1,
        hidden: int | None = None,
        layer_scale: float | None = 1e-6,
        gate: bool = False,
        drop_path: float = 0.0,
        recompute: bool = False,
    ):
        super().__init__()
        out = in_channels if out_channels is None else out_channels
        hidden = scaled_width(in_channels, expansion, divisor) if hidden is None else hidden
        self.dwconv = DepthwiseConv2d(in_channels, kernel)
        self.norm = nn.LayerNorm(in_channels, eps=1e-6)
        self.fc1 = nn.Linear(in_channels, hidden)
        self.fc2 = nn.Linear(hidden, out)
        self.gate = ChannelGate(out) if gate else None
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((out,), float(layer_scale)))
        self.drop_path = DropPath(drop_path) if drop_path else None
        self.recompute = recompute

    def _perceive(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x.permute(0, 2, 3, 1)))))

    def forward(self, *xs: Tensor) -> Tensor:
        x = self.dwconv(*xs, recompute=self.recompute)
        if self.recompute and torch.is_grad_enabled():
            # The recomputation stops once the last saved tensor is restored: before the second product.
            x = checkpoint(self._perceive, x, use_reentrant=False, preserve_rng_state=False)  # type: ignore[assignment]
        else:
            x = self._perceive(x)
        scale = self.gamma
        if self.gate is not None:
            # The small factors are combined first, so that the map is multiplied only once.
            scale = self.gate(x) if scale is None else self.gate(x) * scale
        if scale is not None:
            x = x * scale
        x = x.permute(0, 3, 1, 2)
        return x if self.drop_path is None else self.drop_path(x)
