"""Blocks that add their input themselves, as residual functions."""

from torch import Tensor, nn


def as_residual(module: nn.Module) -> nn.Module:
    """Turns a module that has its own skip connection into a residual function: x -> module(x) - x.

    Args:
        module: a module that keeps the shape of its one argument, and adds it to its result.

    Example:
        >>> import torch
        >>> from odenets import Stack, as_residual
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        >>> x = torch.randn(1, 3, 8)
        >>> torch.allclose(Stack(as_residual(layer), "euler")(x), layer(x), atol=1e-6)
        True
    """
    return _AsResidual(module)


class _AsResidual(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) - x
