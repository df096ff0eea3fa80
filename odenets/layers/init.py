"""Initial weights."""

from typing import Literal

from torch import nn


def init_kaiming(module: nn.Module, mode: Literal["fan_in", "fan_out"] = "fan_out", linear: bool = False) -> None:
    """Draws every convolution's weights from He's normal distribution; biases and norms keep torch's defaults.

    Args:
        module: everything inside it is drawn anew.
        mode: the fan that sets the variance 2 / fan; published ImageNet ResNets use fan_out, the CIFAR ones fan_in.
        linear: whether linear layers are drawn too; otherwise they keep torch's default.

    Source:
        He et al. 2015, Delving Deep into Rectifiers, arXiv 1502.01852, equation 10 (fan_in) and 14 (fan_out).
    """
    for m in module.modules():
        if isinstance(m, nn.Conv2d) or (linear and isinstance(m, nn.Linear)):
            nn.init.kaiming_normal_(m.weight, mode=mode, nonlinearity="relu")
