"""Initial weights."""

from typing import Literal

from torch import nn


def init_kaiming(module: nn.Module, mode: Literal["fan_in", "fan_out"] = "fan_out", linear: bool = False) -> None:
    """Draws every convolution's weights from He's normal distribution; biases and norms keep torch's defaults.

    Args:
        module: its convolutions, nested ones too, are drawn anew.
        mode: the fan that sets the variance 2 / fan; published ImageNet ResNets use fan_out, the CIFAR ones fan_in.
        linear: whether linear layers are drawn too; otherwise they keep torch's default.

    Source:
        He et al. 2015, Delving Deep into Rectifiers, arXiv 1502.01852, equation 10 (fan_in) and 14 (fan_out).
    """
    for m in module.modules():
        if isinstance(m, nn.Conv2d) or (linear and isinstance(m, nn.Linear)):
            nn.init.kaiming_normal_(m.weight, mode=mode, nonlinearity="relu")


def init_truncated(module: nn.Module, std: float = 0.02) -> None:
    """Draws every convolution's and linear layer's weights from a normal distribution truncated at 2; biases are zero.

    Args:
        module: its layers, nested ones too, are drawn anew.
        std: the standard deviation before truncation (which is at 2, a hundred standard deviations, not at 2 std).

    Source:
        Liu et al. 2022, A ConvNet for the 2020s, arXiv 2201.03545, as released; the paper's 0.2 is a misprint.
    """
    for m in module.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            nn.init.trunc_normal_(m.weight, std=std)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
