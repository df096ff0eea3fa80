"""Callbacks: throughput, a step size that moves over the epochs, the closing summary, predictions as a file."""

import csv
import io
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, Callback, ModelCheckpoint, ModelSummary
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_summary.model_summary import _format_summary_table
from torch import Tensor, nn

from schemes import SchemeError

from .files import write_whole
from .order import run_seed
from .ranking import best_of


class Throughput(Callback):
    """Logs train/images_per_s, once per epoch and for all processes together: loading, forward, backward and update.

    The first batch of an epoch, which waits for workers and compilation, is left out.
    """

    def __init__(self) -> None:
        self._images, self._start, self._stop = -1, 0.0, 0.0  # as at an epoch's start; a resumed epoch lacks that hook

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._images, self._start = -1, 0.0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._images < 0:
            self._images, self._start = 0, time.perf_counter()
        else:
            self._images += len(batch[0])
            self._stop = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Validation runs before this hook: the clock stopped with the last batch.
        if self._images > 0:
            rate = self._images / max(self._stop - self._start, 1e-9)
            # Times the number of processes, since synchronised figures are averaged over them.
            pl_module.log("train/images_per_s", rate * trainer.world_size, sync_dist=True)


class StepSchedule(Callback):
    """Moves the step size h of every `Stack` in the net from `start` to `stop` over the run, once per epoch.

    With u from 0 (first epoch) to 1 (last): linear start + u (stop - start); cosine the same with (1 - cos(pi u)) / 2
    for u; geometric start * (stop / start)^u.

    Args:
        start: h of the first epoch.
        stop: h of the last.
        shape: The shape of the path between them.

    Raises:
        SchemeError: A geometric path through zero, or a net without a stack to set.
    """

    def __init__(
        self, start: float = 1.0, stop: float = 0.5, shape: Literal["linear", "cosine", "geometric"] = "linear"
    ) -> None:
        if shape == "geometric" and not start * stop > 0:
            raise SchemeError(f"StepSchedule: a geometric path from {start} to {stop} wants two figures of one sign")
        self.start, self.stop, self.shape = start, stop, shape
        self.h = start

    def at(self, u: float) -> float:
        """The step size h at share u of the run.

        Args:
            u: from 0 to 1.
        """
        if self.shape == "geometric":
            return self.start * (self.stop / self.start) ** u
        if self.shape == "cosine":
            u = (1 - math.cos(math.pi * u)) / 2
        return self.start + u * (self.stop - self.start)

    def apply(self, net: nn.Module, h: float) -> None:
        """Sets h in every part of the net that has `set_step`.

        Args:
            net: any module.
            h: the step size.
        """
        # Found by the method rather than the class, so that a custom net can provide it.
        stacks = [part for part in net.modules() if callable(getattr(part, "set_step", None))]
        if not stacks:
            raise SchemeError("StepSchedule: the net has no Stack whose step size could be set\n  Drop the callback.")
        for stack in stacks:
            stack.set_step(h)  # type: ignore[operator]
        self.h = h

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.apply(pl_module, self.at(min(self._share(trainer), 1.0)))

    @staticmethod
    def _share(trainer: L.Trainer) -> float:
        """The share u of the run at this epoch, which is 1 in the last one that begins, whatever ends the run."""
        limits = [trainer.max_epochs] if trainer.max_epochs and trainer.max_epochs > 0 else []
        batches = trainer.num_training_batches
        if trainer.max_steps >= 0 and not math.isinf(batches):
            steps = max(1, math.ceil(batches / trainer.accumulate_grad_batches))
            limits.append(math.ceil(trainer.max_steps / steps))
        if limits:
            return trainer.current_epoch / max(1, min(limits) - 1)
        # The length of an epoch is not known, or nothing limits the run.
        return trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("step_size", self.h)

    def state_dict(self) -> dict[str, Any]:
        return {"h": self.h}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # Evaluation must use the step size that the weights were trained with.
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None:
            self.apply(pl_module, state["h"])


class RunSummary(Callback):
    """Ends a training run by printing where its checkpoints, its resolved configuration and its metrics are.

    Args:
        folder: of the run.
        last: of the last checkpoint.
    """

    def __init__(self, folder: str | Path, last: Path | None = None) -> None:
        self.folder, self.last = Path(folder), last

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        checkpoint = trainer.checkpoint_callback
        lines: list[tuple[str, Path, str]] = []
        if isinstance(checkpoint, ModelCheckpoint):
            score = checkpoint.best_model_score
            note = "" if score is None else f"  ({checkpoint.monitor} {float(score):.4f})"
            lines += [("best", Path(p), note) for p in [checkpoint.best_model_path] if p]
        lines += [("last", self.last, "")] if self.last is not None else []
        lines += [("config", self.folder / "config.yaml", ""), ("metrics", self.folder / "metrics.csv", "")]
        for name, path, note in lines:
            if path.exists():
                print(f"{name:>8}: {relative(path)}{note}")


class EpochLines(Callback):
    """Prints one line per epoch, for output that is not a terminal, where a redrawn progress bar is noise."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        figures = trainer.callback_metrics  # computed by all processes together
        if trainer.is_global_zero and not trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            of = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
            shown = [f"{k} {float(v):.4g}" for k, v in figures.items() if k.startswith(("train/", "val/"))]
            print(f"epoch {trainer.current_epoch + 1}{of}, step {trainer.global_step}: {', '.join(shown)}", flush=True)


class Summary(ModelSummary):
    """Lightning's table of the module's parts, without counts that it does not know."""

    @staticmethod
    def summarize(*args: Any, **kwargs: Any) -> None:
        """Prints the table, without lines that count nothing."""
        columns = [column for column in args[0] if column[0] not in ("Mode", "FLOPs")]
        table = _format_summary_table(*args[1:5], kwargs.get("total_flops", 0), *columns)
        lines = [line for line in table.splitlines() if " mode" not in line and not _NO_FLOPS.match(line)]
        rank_zero_info("\n".join(lines))


_NO_FLOPS = re.compile(r"0\s+Total F")


class Agreement(Callback):
    """Stops at once if the processes of a run do not have the same seed, classes, samples or net.

    Each would otherwise train a net of its own, or wait for the others forever.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        seed = run_seed(trainer)
        if trainer.world_size == 1:
            return
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        own: dict[str, Any] = {"the seed": seed, "the number of classes": getattr(data, "num_classes", None)}
        own |= {f"the number of {k} samples": len(v) for k, v in getattr(data, "sets", {}).items()}
        own["the number of parameters"] = sum(p.numel() for p in pl_module.parameters())
        found: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(found, own)
        for name in own:
            values = [other.get(name) for other in found]
            if any(value != values[0] for value in values):
                listed = ", ".join(f"{value} in process {rank}" for rank, value in enumerate(values[:8]))
                raise SchemeError(
                    f"{name} differs between the processes: {listed}\n"
                    "  Give each the same configuration and the same data; seed_everything is one number for all."
                )


def relative(path: Path) -> Path:
    """Returns the path relative to the working directory if it lies below that, else the path unchanged.

    Args:
        path: the path.
    """
    try:
        return path.resolve().relative_to(Path.cwd())
    except ValueError:
        return path


class Predictions(BasePredictionWriter):
    """Writes one row per picture to a CSV file: its file or row, and its five most likely classes with probabilities.

    Rows are in the order of the pictures, whichever process predicted them.

    Args:
        path: the CSV file.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__("epoch")
        self.path = Path(path)

    def write_on_epoch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, predictions: Sequence[Tensor], batch_indices: Any
    ) -> None:
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        name = getattr(data, "predicted_name", str)
        own: dict[int, tuple[str, list[float], list[int]]] = {}
        indices = [i for batch in batch_indices[0] for i in batch]
        best = [best_of(batch, 5) for batch in predictions]
        rows = (row for values, numbers in best for row in zip(values.tolist(), numbers.tolist(), strict=True))
        for index, (probabilities, numbers) in zip(indices, rows, strict=True):
            if not isinstance(index, tuple):  # else it is padding, which gives every process the same number
                own[index] = name(index), probabilities, numbers
        found: list[Any] = [own]
        if trainer.world_size > 1:
            found = [None] * trainer.world_size
            torch.distributed.all_gather_object(found, own)
        if trainer.is_global_zero:
            everything = {index: row for part in found for index, row in part.items()}
            self._write(everything, getattr(data, "classes", None))

    def _write(self, rows: dict[int, tuple[str, list[float], list[int]]], classes: Sequence[str] | None) -> None:
        most = max((len(numbers) for _, _, numbers in rows.values()), default=1)
        writer = csv.writer(file := io.StringIO())
        titles = [("class", "probability"), *((f"class_{n}", f"probability_{n}") for n in range(2, most + 1))]
        writer.writerow(["index", "name", *(title for pair in titles for title in pair)])
        for index, (name, probabilities, numbers) in sorted(rows.items()):
            called = [classes[number] if classes else number for number in numbers]
            figures = [f"{probability:.6f}" for probability in probabilities]
            writer.writerow([index, name, *(x for pair in zip(called, figures, strict=True) for x in pair)])
        # In UTF-8 whatever the locale, and atomically, so that a full disk does not destroy an earlier file.
        write_whole(self.path, file.getvalue().encode())
        print(f"predictions: {relative(self.path)}")
