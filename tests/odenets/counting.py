"""Parameters and multiply-adds of a model, counted without memory or arithmetic."""

import warnings

import torch
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
