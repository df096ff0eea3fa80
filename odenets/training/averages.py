"""Weights averaged over the steps of a run; the averages are validated and saved."""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch import Tensor, nn

from schemes import SchemeError

INSTEAD = "Take odenets.training.MovingAverage(decay) in its place"


class MovingAverage(WeightAveraging):
    """Validates and saves a moving average of the weights and of the norms' statistics; training does not use it.

    After optimiser step i > start: average <- decay * average + (1 - decay) * weights; until then, average <- weights.

    So the first average equals the weights after step `start`. Integers and booleans, such as counters and tables of
    indices, are copied. 16-bit weights are averaged in 32 bits.

    Args:
        decay: from 0, which averages nothing, to less than 1.
        every: optimiser steps from one update to the next.
        start: the optimiser step, from 0, at which averaging begins.
        device: of the averages; None is that of the weights.

    Raises:
        SchemeError: a decay or a number of steps out of its range.

    Source:
        Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging"; with a decay as in Szegedy
        et al. 2016, "Rethinking the inception architecture for computer vision", section 8.

    Example:
        >>> import torch
        >>> moved(torch.tensor(1.0), torch.tensor(2.0), 1, decay=0.9)
        tensor(1.1000)
    """

    def __init__(self, decay: float = 0.9999, every: int = 1, start: int = 0, device: str | None = None) -> None:
        if not (0 <= decay < 1 and every >= 1 and start >= 0):
            raise SchemeError(
                f"MovingAverage: decay={decay}, every={every}, start={start}; want a decay from 0 to less than 1, an "
                "update every 1 or more steps, and a first step from 0 on"
            )
        super().__init__(device=device, use_buffers=True, avg_fn=partial(moved, decay=decay))
        self.decay, self.every, self.start = decay, every, start
        self._aside: list[Tensor] = []  # the weights, while the module holds their average

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        # Until averaging begins, the average follows the weights: otherwise it would stay at the initial ones.
        return step_idx is not None and (step_idx < self.start or (step_idx - self.start) % self.every == 0)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self._average_model is not None:
            # The strategy converts the weights only later, and this is a copy of them.
            least = torch.float64 if trainer.precision == "64-true" else torch.float32
            self._average_model.module._apply(
                lambda t: t.to(torch.promote_types(t.dtype, least)) if t.is_floating_point() else t
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step <= self.start and self._average_model is not None:
            self._average_model.n_averaged.zero_()  # the next update is a copy, too

    def _pairs(self, pl_module: L.LightningModule) -> Iterator[tuple[Tensor, Tensor]]:
        assert self._average_model is not None
        average = self._average_model.module
        return zip(
            itertools.chain(average.parameters(), average.buffers()),
            itertools.chain(pl_module.parameters(), pl_module.buffers()),
            strict=True,
        )

    def _swap_models(self, pl_module: L.LightningModule) -> None:
        # Lightning's own exchange would round each of the two to the precision of the other.
        if self._aside:
            for (_, current), weight in zip(self._pairs(pl_module), self._aside, strict=True):
                current.data.copy_(weight)
            self._aside = []
        else:
            self._aside = [current.data.clone() for _, current in self._pairs(pl_module)]
            self._copy_average_to_current(pl_module)


def moved(average: Tensor, current: Tensor, count: Tensor | int, decay: float) -> Tensor:
    """Returns the average after one more value.

    Args:
        average: so far.
        current: the value.
        count: the number of values so far; the average does not depend on it.
        decay: the weight of the average so far.
    """
    if not (average.is_floating_point() or average.is_complex()):
        return current
    current = current.to(average.dtype)
    # Equal values stay equal to the bit: frozen weights, and infinities in masks, whose difference is NaN.
    return torch.where(average == current, average, torch.lerp(average, current, 1 - decay))


def check_averages(trainer: L.Trainer, module: nn.Module) -> None:
    """Refuses Lightning's own averages where they would not be averages of the run's weights.

    Args:
        trainer: of the run.
        module: the trained module.

    Raises:
        SchemeError: names the option, or the buffer.
    """
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if not isinstance(callback, WeightAveraging) or isinstance(callback, MovingAverage):
            continue
        name = type(callback).__name__
        if isinstance(callback, EMAWeightAveraging):
            for option in ("update_starting_at_step", "update_starting_at_epoch"):
                if getattr(callback, option, None):
                    raise SchemeError(
                        f"{name} with {option}: until then it would validate and save the weights that the run began "
                        f"with\n  {INSTEAD}: MovingAverage(decay, start=STEP)"
                    )
        if trainer.precision == "64-true":
            raise SchemeError(f"{name} rounds the weights of precision 64-true to 32 bits\n  {INSTEAD}")
        for key, buffer in module.named_buffers():
            # Nothing reads a norm's counter of batches if the norm has a momentum.
            if (
                not buffer.is_floating_point()
                and buffer.dtype != torch.bool
                and not key.endswith("num_batches_tracked")
            ):
                raise SchemeError(
                    f"{name} would average the whole numbers in {key}, and drop the fractions\n  {INSTEAD}"
                )
