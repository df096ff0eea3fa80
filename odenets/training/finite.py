"""Stops a run at once when its loss is not finite, and writes a file that repeats the step."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from schemes import SchemeError

from .files import write_whole
from .order import batch_seed, run_seed, seed_generators
from .resume import order_of
from .sharding import divided, whole_state
from .steps import as_trained, keep_states

# Lightning's precisions that convert the weights, and those that compute some operations in 16 bits.
TRUE = {"64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16}
MIXED = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
REMEDY = "Lower the learning rate or clip: --trainer.gradient_clip_val 1"


class NotFinite(SchemeError):
    """The loss, or a figure of the validation, is NaN or infinite; two lines say where, and how to proceed."""


class FiniteLoss(Callback):
    """Stops training when the loss is NaN or infinite, before it reaches a weight.

    The file that it writes holds the batch as the net saw it, the weights, the precision, the seed of the step and the
    numbers of its samples: ``repeat`` reproduces the loss from it. The check reads one figure per step from the device.

    Args:
        folder: for ``not_finite.pt``; None writes none.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._batch: Any = None
        self._never: set[str] = set()  # buffers that are infinite by design, such as masks

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._never = set(_not_finite(dict(pl_module.named_buffers())))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuses to write a checkpoint that holds NaN or infinity."""
        held = {k: v for k, v in checkpoint["state_dict"].items() if isinstance(v, Tensor) and k not in self._never}
        bad = _not_finite(held)
        # All processes decide together: one that raised alone would leave the others waiting.
        if trainer.strategy.reduce_boolean_decision(not bad):
            return
        names = f"{bad[0]} and {len(bad) - 1} more tensors are" if len(bad) > 1 else f"{(bad or ['a tensor'])[0]} is"
        raise NotFinite(
            f"{names} not finite at step {trainer.global_step}, learning rate {_learning_rates(trainer)}\n  {REMEDY}"
        )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        finite, sharded = bool(loss.detach().isfinite().all()), divided(pl_module)
        # Sharded weights are gathered by all processes together, so none of them may proceed alone.
        if trainer.strategy.reduce_boolean_decision(finite) if sharded else finite:
            return
        state = whole_state(pl_module)
        if finite:
            raise NotFinite(f"the loss of another process is not finite at step {trainer.global_step}\n  {REMEDY}")
        step, lr = trainer.global_step, _learning_rates(trainer)
        loop = trainer.fit_loop.epoch_loop
        epoch, number = trainer.current_epoch, loop.batch_progress.current.ready - 1
        order = order_of(trainer)
        samples = [] if order is None else order.batch(epoch, number)
        text = f"the loss is {float(loss.detach().float().sum())} at step {step}, learning rate {lr}: epoch {epoch}, "
        text += f"batch {number}"
        if samples:
            text += f", samples {', '.join(map(str, samples[:8]))}{' ...' if len(samples) > 8 else ''}"
        remedy = REMEDY
        if self.folder is not None:
            path = self.folder / f"not_finite{f'-{trainer.global_rank}' if trainer.global_rank else ''}.pt"
            held = {"batch": self._batch, "state_dict": state, "step": step, "lr": lr}
            held |= {"epoch": epoch, "batch_number": number, "samples": samples}
            held["training"] = [name for name, module in pl_module.named_modules() if module.training]
            held["seed"] = batch_seed(trainer, run_seed(trainer), "net")
            held["precision"] = str(trainer.precision)
            keep_states(trainer, held)
            # Before the error is raised, and atomically: the file is all that is left of the step.
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
                f"{figures} after step {trainer.global_step}, learning rate {_learning_rates(trainer)}\n  {REMEDY}"
            )


def _learning_rates(trainer: L.Trainer) -> str:
    rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return ", ".join(f"{float(rate):g}" for rate in dict.fromkeys(rates))


def _not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """The names of the tensors that hold NaN or infinity; if none does, only one figure is read from the device."""
    floats = {name: t for name, t in tensors.items() if t.is_floating_point() or t.is_complex()}
    if not floats or bool(torch.stack([t.isfinite().all() for t in floats.values()]).all()):
        return []
    return [name for name, t in floats.items() if not bool(t.isfinite().all())]


def repeat(module: L.LightningModule, path: str | Path) -> Tensor:
    """Recomputes the loss of the step that a file of ``FiniteLoss`` holds.

    Args:
        module: built as the run's was; its weights, precision, steps, and the training mode of each part, become those
            of that step.
        path: the file.
    """
    held = torch.load(path, map_location="cpu", weights_only=True)
    precision = held.get("precision", "")
    # Converted first: double weights would be rounded as they are read.
    if precision in TRUE:
        module.to(TRUE[precision])
    as_trained(module, held)
    module.load_state_dict(held["state_dict"])
    trained = set(held["training"])
    for name, part in module.named_modules():
        # Not by ``train``, which is recursive and would set norms that the run had frozen to training mode.
        part.training = name in trained
    seed_generators(held["seed"])
    module.__dict__["log"] = lambda *args, **kwargs: None  # there is no run to log to
    try:
        with _computing_in(precision, module.device.type):
            return module.training_step(held["batch"], held["batch_number"])  # type: ignore[return-value]
    finally:
        del module.__dict__["log"]


@contextmanager
def _computing_in(precision: str, device: str) -> Iterator[None]:
    """What Lightning's precisions set around a training step."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(TRUE.get(precision, usual))
    try:
        with torch.autocast(device, MIXED[precision]) if precision in MIXED else nullcontext():
            yield
    finally:
        torch.set_default_dtype(usual)
