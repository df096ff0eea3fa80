"""A stack's own random number generator, from which its scheme draws in training."""

import torch
from torch import nn


class Draws(nn.Module):
    """Holds a generator on the CPU; a module, so that a step that is run again finds it and draws the same numbers.

    Args:
        seed: the generator's seed.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def extra_repr(self) -> str:
        """The seed."""
        return f"seed={self.generator.initial_seed()}"
