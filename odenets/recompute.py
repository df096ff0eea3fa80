"""Recomputing a step in the backward pass without moving its statistics a second time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def statistics_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Puts every buffer that the body wrote back: running statistics, their counters, moving averages.

    In training mode BatchNorm normalises with the batch, so outputs and gradients inside are those of the first run.
    (Turning ``track_running_stats`` off would be quicker, but changes how many tensors BatchNorm saves, which
    ``torch.utils.checkpoint`` counts.)
    """
    buffers = list({id(b): b for module in modules for b in module.buffers()}.values())
    saved = [(b, b._version, b.clone()) for b in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for b, version, value in saved:
                if b._version != version:
                    b.copy_(value)
