"""A generator of a stack's own, from which its scheme draws in training."""

import torch
from torch import nn


class Draws(nn.Module):
    """Holds a generator on the processor; a module, so that runs of a step find it and draw the same again.

    Args:
        seed: what it begins with.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def extra_repr(self) -> str:
        """The seed."""
        return f"seed={self.generator.initial_seed()}"
