"""A loss that is no number stops the run at once, and leaves a file that repeats the step."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from schemes import SchemeError

from .files import write_whole
from .order import batch_seed, run_seed
from .resume import order_of


class NotFinite(SchemeError):
    """The loss, or a figure of the validation, is NaN or infinite; two lines that say where, and how to go on."""


class FiniteLoss(Callback):
    """Stops training where the loss is NaN or infinite, before it reaches a weight.

    The file that it writes holds the batch as the net saw it, the weights, the seed of the step and the numbers of its
    samples: ``torch.load(file)``, ``seed_generators(held["seed"])`` and ``training_step`` give the loss again. One
    figure per step is read from the device for it.

    Args:
        folder: for ``not_finite.pt``; None writes none.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._batch: Any = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if bool(loss.detach().isfinite().all()):
            return
        step, lrs = trainer.global_step, [group["lr"] for o in trainer.optimizers for group in o.param_groups]
        lr = ", ".join(f"{rate:g}" for rate in dict.fromkeys(lrs))
        loop = trainer.fit_loop.epoch_loop
        epoch, number = trainer.fit_loop.epoch_progress.current.processed, loop.batch_progress.current.ready - 1
        order = order_of(trainer)
        samples = [] if order is None else order.batch(epoch, number)
        text = f"the loss is {float(loss.detach().float().sum())} at step {step}, learning rate {lr}: epoch {epoch}, "
        text += f"batch {number}"
        if samples:
            text += f", samples {', '.join(map(str, samples[:8]))}{' ...' if len(samples) > 8 else ''}"
        remedy = "Lower the learning rate or clip: --trainer.gradient_clip_val 1"
        if self.folder is not None:
            path = self.folder / f"not_finite{f'-{trainer.global_rank}' if trainer.global_rank else ''}.pt"
            held = {"batch": self._batch, "state_dict": pl_module.state_dict(), "step": step, "lr": lrs}
            held |= {"epoch": epoch, "batch_number": number, "samples": samples}
            held["seed"] = batch_seed(trainer, run_seed(trainer), "net")
            write_whole(path, held)
            remedy += f"; {path} repeats the step"
        raise NotFinite(f"{text}\n  {remedy}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Before `best` is written: callbacks that write checkpoints come after all others.
        if trainer.sanity_checking:
            return
        bad = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/") and not v.isfinite()}
        if bad:
            figures = ", ".join(f"{name} is {value}" for name, value in bad.items())
            raise NotFinite(
                f"{figures} after step {trainer.global_step}, learning rate "
                f"{trainer.optimizers[0].param_groups[0]['lr']:g}\n"
                "  The weights diverged: lower the learning rate, or clip: --trainer.gradient_clip_val 1"
            )


def repeat(module: L.LightningModule, path: str | Path) -> Tensor:
    """The loss of the step that a file of ``FiniteLoss`` holds.

    Args:
        module: built as the run's was; its weights are replaced.
        path: the file.
    """
    from .order import seed_generators

    held = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(held["state_dict"])
    module.train()
    seed_generators(held["seed"])
    return module.training_step(held["batch"], held["batch_number"])  # type: ignore[return-value]
