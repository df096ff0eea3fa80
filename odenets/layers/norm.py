"""Layer normalisation over the channels of a map, without copies where the memory is channels-last."""

import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm2d(nn.LayerNorm):
    """Normalises every pixel over its channels: y = (x - mean) / sqrt(var + eps) * weight + bias.

    torch's kernel expects the channels last, so the map is viewed that way: a channels-last map is normalised without a
    copy, any other is copied once, and the result is channels-last in memory either way.

    Args:
        channels: width of the map.
        eps: added to the variance; ConvNeXt and RDNet use 1e-6.

    Shape:
        x: (n, channels, h, w); the result has the same shape.

    Source:
        Ba et al. 2016, Layer Normalization, arXiv 1607.06450; over the channels of a pixel as in Liu et al. 2022, A
        ConvNet for the 2020s, arXiv 2201.03545.

    Example:
        >>> import torch
        >>> y = LayerNorm2d(8)(torch.randn(2, 8, 4, 4))
        >>> y.shape, y.is_contiguous(memory_format=torch.channels_last)
        (torch.Size([2, 8, 4, 4]), True)
    """

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__(channels, eps)

    def forward(self, input: Tensor) -> Tensor:
        y = F.layer_norm(input.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)
