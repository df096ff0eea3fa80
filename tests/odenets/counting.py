"""Parameters and multiply-adds of a model, counted without memory or arithmetic."""

import warnings

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from odenets.models import create_model
from schemes import MixingWarning


def meta(name, **kwargs):
    """The named model on the meta device."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore", MixingWarning)
        return create_model(name, **kwargs)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def gmacs(model, size):
    """Multiply-adds of convolutions and matrix products for one picture, in 10^9."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 2e9


def multiply_adds(net, side):
    """Multiply-adds of convolutions and linear layers for one picture, exactly; for networks that have no others."""
    total = 0

    def count(module, args, y):
        nonlocal total
        each = module.weight[0].numel() if isinstance(module, nn.Conv2d) else module.in_features
        total += y.numel() * each

    handles = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        net(torch.empty(1, 3, side, side, device="meta"))
    for handle in handles:
        handle.remove()
    return total
