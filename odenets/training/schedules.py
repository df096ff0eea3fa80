"""Learning-rate schedules, per optimiser step, that plug into `Classifier`.

A schedule is called with the optimiser and the number of optimiser steps of the whole run and of one epoch; it returns
a torch scheduler that is stepped after every optimiser step. A custom schedule subclasses `Schedule`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import lightning as L
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from schemes import SchemeError

KEY = "odenets"  # the entry of a checkpoint with this package's additions to Lightning's


def scheduled(trainer: L.Trainer, optimizer: Optimizer, schedule: "Schedule") -> dict[str, Any]:
    """Builds the value of ``configure_optimizers``: the optimiser, and the schedule over this run's optimiser steps.

    The steps are those that the run will take, given `max_steps`, accumulation, limits and several processes.

    Args:
        trainer: of the run.
        optimizer: at its peak learning rate.
        schedule: stepped after each optimiser step.

    Raises:
        SchemeError: a schedule that depends on the length of the run, which is not known.
    """
    # Lightning builds the optimiser before the loader, and can only count batches once the loader exists.
    trainer.fit_loop.setup_data()
    batches, steps = trainer.num_training_batches, trainer.estimated_stepping_batches
    epoch = None if math.isinf(batches) else max(1, math.ceil(batches / trainer.accumulate_grad_batches))
    if math.isinf(steps) and not isinstance(schedule, Constant):
        raise SchemeError(
            f"{type(schedule).__name__} needs to know the run's length, but trainer.max_epochs is -1.\n"
            "  Give trainer.max_epochs or max_steps, or take schedule Constant."
        )
    if epoch is None and getattr(schedule, "warmup", 0):
        raise SchemeError(
            f"{type(schedule).__name__} warms up for {schedule.warmup} epochs, but how long one is, is not known.\n"  # type: ignore
            "  Give trainer.limit_train_batches, or warmup: 0."
        )
    total = 1 if math.isinf(steps) else int(steps)
    scheduler = schedule(optimizer, total, total if epoch is None else epoch)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def restart(trainer: L.Trainer, schedule: "Schedule", lr: float | None) -> None:
    """Rebuilds the schedule of a run that has not taken a step, for another learning rate or number of steps.

    Args:
        trainer: of the run, whose optimiser exists.
        schedule: as configured.
        lr: the learning rate, of which each group gets its share; None keeps the optimiser's.
    """
    for config in trainer.lr_scheduler_configs:
        optimizer = config.scheduler.optimizer
        for group in optimizer.param_groups:
            # The peak, under the name that the previous schedule gave it.
            peak = group["max_lr"] if "max_lr" in group else group["initial_lr"]
            for name in ("initial_lr", "max_lr", "min_lr"):
                group.pop(name, None)
            group["lr"] = peak if lr is None else lr * group.get("lr_scale", 1.0)
        config.scheduler = scheduled(trainer, optimizer, schedule)["lr_scheduler"]["scheduler"]


class Factors(LambdaLR):
    """A ``LambdaLR`` that leaves alone the groups that a callback adds later, with rates of their own."""

    def get_lr(self) -> list[Any]:
        known = super().get_lr()
        return known + [group["lr"] for group in self.optimizer.param_groups[len(known) :]]


class Cycle(OneCycleLR):
    """A ``OneCycleLR`` that leaves alone the groups that a callback adds later, which have no peak."""

    def get_lr(self) -> list[Any]:
        groups = self.optimizer.param_groups
        later = groups[len(self.base_lrs) :]
        # Torch reads the peak of every group of the optimiser here, and sets its momentum as well.
        del groups[len(self.base_lrs) :]
        try:
            known = super().get_lr()
        finally:
            groups += later
        return known + [group["lr"] for group in later]


class Schedule(ABC):
    """How the learning rate moves over a run."""

    @abstractmethod
    def __call__(self, optimizer: Optimizer, steps: int, steps_per_epoch: int) -> LRScheduler:
        """Returns a scheduler that is stepped `steps` times."""


class WarmupCosine(Schedule):
    """Linear rise over `warmup` epochs, then half a cosine down to `final` times the peak.

    lr(i) = peak * (i + 1) / w for i < w, else peak * (final + (1 - final) * (1 + cos(pi * (i - w) / (n - w))) / 2)

    Args:
        warmup: Epochs, possibly a fraction; at most half of the run is used.
        final: Share of the peak that is left at the end.

    Source: Loshchilov and Hutter 2017, "SGDR", equation 5; Goyal et al. 2017 for the warm-up.
    """

    def __init__(self, warmup: float = 1.0, final: float = 0.0) -> None:
        if not (warmup >= 0 and math.isfinite(warmup) and 0 <= final <= 1):
            raise SchemeError(f"WarmupCosine: warmup={warmup}, final={final}; want epochs from 0 on, and a share")
        self.warmup, self.final = warmup, final

    def factor(self, i: int, steps: int, steps_per_epoch: int) -> float:
        """Share of the peak at optimiser step i of `steps`.

        Args:
            i: the step, from 0.
            steps: of the whole run.
            steps_per_epoch: of one epoch.
        """
        # Otherwise a short run would end before it reached its learning rate.
        warm = min(round(self.warmup * steps_per_epoch), steps // 2)
        if i < warm:
            # Counted from 1: a first step of size 0 would waste its batch.
            return (i + 1) / warm
        done = min((i - warm) / max(1, steps - warm), 1.0)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2

    def __call__(self, optimizer: Optimizer, steps: int, steps_per_epoch: int) -> LRScheduler:
        return Factors(optimizer, lambda i: self.factor(i, steps, steps_per_epoch))


class Constant(Schedule):
    """The optimiser's own learning rate throughout."""

    def __call__(self, optimizer: Optimizer, steps: int, steps_per_epoch: int) -> LRScheduler:
        return Factors(optimizer, lambda i: 1.0)


class OneCycle(Schedule):
    """Rises to the optimiser's learning rate over a share `up` of the run, then falls to nearly zero.

    Args:
        up: Share of the steps that rise.
        momentum: Also move the momentum, or Adam's first beta, opposite to the learning rate: from 0.95 to 0.85 and
            back, as published, in place of the optimiser's own.

    Source: Smith and Topin 2018, "Super-convergence".
    """

    def __init__(self, up: float = 0.3, momentum: bool = True) -> None:
        if not 0 < up < 1:
            raise SchemeError(f"OneCycle: up={up}; wants a share of the run, between 0 and 1")
        self.up, self.momentum = up, momentum

    def __call__(self, optimizer: Optimizer, steps: int, steps_per_epoch: int) -> LRScheduler:
        peaks = [group["lr"] for group in optimizer.param_groups]
        if self.momentum and not {"momentum", "betas"} & optimizer.defaults.keys():
            raise SchemeError(
                f"OneCycle moves the momentum, and {type(optimizer).__name__} has none\n"
                "  Give --model.schedule.momentum false, or another optimiser"
            )
        for group in optimizer.param_groups if self.momentum else ():
            if not (group["betas"][0] if "betas" in group else group["momentum"]):
                raise SchemeError(
                    f"OneCycle moves the momentum between 0.95 and 0.85, and that of {type(optimizer).__name__} is 0\n"
                    "  Give --model.schedule.momentum false, or a momentum"
                )
        # One more than are taken: the scheduler is also stepped after the last step, which would be past its end.
        total = steps + 1
        # Torch divides by the length of the rise, up * total - 1, which must not be zero.
        up = self.up + 1e-9 if self.up * total == 1 else self.up
        return Cycle(optimizer, peaks, total_steps=total, pct_start=up, cycle_momentum=self.momentum)


class Poly(Schedule):
    """A power of the rest of the run, with a linear rise: lr(i) = peak * min(1, (i + 1) / w) * (1 - i / n)^power.

    The rise takes w steps, and n is the length of the run.

    Args:
        power: 1 is a linear decay.
        warmup_steps: Optimiser steps of the rise; at most half of the run is used.

    Source: Chen et al. 2018, "DeepLab", section 4.1.2; with the rise, the usual schedule of segmentation since then.

    Example:
        >>> p = Poly(warmup_steps=2)
        >>> [round(p.factor(i, 5), 2) for i in range(5)]
        [0.5, 0.8, 0.6, 0.4, 0.2]
    """

    def __init__(self, power: float = 1.0, warmup_steps: int = 0) -> None:
        if not (power > 0 and math.isfinite(power) and warmup_steps >= 0):
            raise SchemeError(f"Poly: power={power}, warmup_steps={warmup_steps}; want a power above 0, and steps")
        self.power, self.warmup_steps = power, warmup_steps

    def factor(self, i: int, steps: int) -> float:
        """Share of the peak at optimiser step i of `steps`.

        Args:
            i: the step, from 0.
            steps: of the whole run.
        """
        warm = min(self.warmup_steps, steps // 2)
        rise = min(1.0, (i + 1) / warm) if warm else 1.0
        return rise * max(0.0, 1 - i / steps) ** self.power

    def __call__(self, optimizer: Optimizer, steps: int, steps_per_epoch: int) -> LRScheduler:
        return Factors(optimizer, lambda i: self.factor(i, steps))


class Milestones(Schedule):
    """The optimiser's learning rate, times `factor` at each of the milestones, after a linear rise of w steps.

    lr(i) = peak * min(1, (i + 1) / w) * factor^#{m: i >= m * n}.

    Args:
        at: Shares of the run; the default is He et al.'s for ImageNet, DenseNet's on CIFAR is (0.5, 0.75).
        factor: The factor at each of them.
        warmup_steps: Optimiser steps of the rise; at most half of the run is used.

    Source: He et al. 2016, "Deep residual learning", section 3.4; Huang et al. 2017, "Densely connected convolutional
    networks", section 4.2.

    Example:
        >>> m = Milestones((0.5, 0.75))
        >>> [round(m.factor_at(i, 8), 3) for i in range(8)]
        [1.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    """

    def __init__(self, at: Sequence[float] = (1 / 3, 2 / 3), factor: float = 0.1, warmup_steps: int = 0) -> None:
        if not all(0 < share < 1 for share in at):
            raise SchemeError(f"Milestones: at is {list(at)}; wants shares of the run, between 0 and 1")
        if warmup_steps < 0:
            raise SchemeError(f"Milestones: warmup_steps is {warmup_steps}; wants steps, 0 or more")
        self.at, self.factor, self.warmup_steps = tuple(at), factor, warmup_steps

    def factor_at(self, i: int, steps: int) -> float:
        """Share of the peak at optimiser step i of `steps`.

        Args:
            i: the step, from 0.
            steps: of the whole run.
        """
        warm = min(self.warmup_steps, steps // 2)
        rise = min(1.0, (i + 1) / warm) if warm else 1.0
        # A share such as 0.55 has no exact float: of 100 steps it is slightly more than 55.
        return rise * self.factor ** sum(i >= share * steps - 1e-9 * steps for share in self.at)

    def __call__(self, optimizer: Optimizer, steps: int, steps_per_epoch: int) -> LRScheduler:
        return Factors(optimizer, lambda i: self.factor_at(i, steps))
