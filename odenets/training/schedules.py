"""Learning-rate schedules by step, as parts that one plugs into `Classifier`.

A schedule is called with the optimiser, the number of optimiser steps of the whole run and of one epoch; it returns a
torch scheduler that is stepped after every optimiser step. A schedule of your own subclasses `Schedule`.
"""

import math
from abc import ABC, abstractmethod

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR


class Schedule(ABC):
    """How the learning rate moves over a run."""

    @abstractmethod
    def __call__(self, optimizer: Optimizer, steps: int, steps_per_epoch: int) -> LRScheduler:
        """A scheduler that is stepped `steps` times."""


class WarmupCosine(Schedule):
    """Linear rise over `warmup` epochs, then half a cosine down to `final` times the peak.

    lr(i) = peak * (i + 1) / w for i < w, else peak * (final + (1 - final) * (1 + cos(pi * (i - w) / (n - w))) / 2)

    Args:
        warmup: Epochs, may be a fraction; at most half of the run is used.
        final: Share of the peak that is left at the end.

    Source: Loshchilov and Hutter 2017, "SGDR", equation 5; Goyal et al. 2017 for the warm-up.
    """

    def __init__(self, warmup: float = 1.0, final: float = 0.0) -> None:
        self.warmup, self.final = warmup, final

    def factor(self, i: int, steps: int, steps_per_epoch: int) -> float:
        """Share of the peak at optimiser step i of `steps`."""
        warm = min(round(self.warmup * steps_per_epoch), steps // 2)
        if i < warm:
            return (i + 1) / warm
        done = min((i - warm) / max(1, steps - warm), 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2

    def __call__(self, optimizer: Optimizer, steps: int, steps_per_epoch: int) -> LRScheduler:
        return LambdaLR(optimizer, lambda i: self.factor(i, steps, steps_per_epoch))


class Constant(Schedule):
    """The optimiser's own learning rate throughout."""

    def __call__(self, optimizer: Optimizer, steps: int, steps_per_epoch: int) -> LRScheduler:
        return LambdaLR(optimizer, lambda i: 1.0)


class OneCycle(Schedule):
    """Up to the optimiser's learning rate over a share `up` of the run, then down to nearly nothing.

    Args:
        up: Share of the steps that rise.
        momentum: Also move the momentum, against the learning rate.

    Source: Smith and Topin 2018, "Super-convergence".
    """

    def __init__(self, up: float = 0.3, momentum: bool = True) -> None:
        self.up, self.momentum = up, momentum

    def __call__(self, optimizer: Optimizer, steps: int, steps_per_epoch: int) -> LRScheduler:
        peaks = [group["lr"] for group in optimizer.param_groups]
        # One step more than are taken: torch refuses to be stepped once after the last.
        return OneCycleLR(optimizer, peaks, total_steps=steps + 1, pct_start=self.up, cycle_momentum=self.momentum)
