"""One run of a comparison: a training run in a folder of its own, and its outcome."""

import contextlib
import math
import os
import platform
import re
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..training import needed as needed

# isort: split
import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from schemes import SchemeError

from ..messages import Failed
from ..training.command import resolve, run
from ..training.files import FolderInUse, FolderLock, open_checkpoint
from ..training.finite import NotFinite
from ..training.loggers import logged_rows
from ..training.options import HARMLESS, changes
from ..training.resume import KEY
from ..training.sources import DataError
from .store import TRAINED, Table

LOGGED = re.compile(r"evaluations|(train|val|cost)/.+")
ROOT = "data.root"  # the location of the pictures does not affect the results
STOPPED = (130, 143)  # exit statuses of a run that saved its progress when a signal came


@dataclass(frozen=True)
class Run:
    """One training run of a comparison.

    Attributes:
        name: the name, from the cell and the seed.
        cell: the name that all runs with the same options share.
        seed: seed of weights, order and augmentation.
        options: the options that distinguish this cell: option -> value, as they were written.
    """

    name: str
    cell: str
    seed: int
    options: dict[str, str]


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        status: "trained", "diverged" (a loss or a weight became non-finite), or "failed".
        parameters: number of parameters of the net.
        evaluations: evaluations of residual functions in one forward pass.
        samples: number of samples that were trained on, summed over epochs.
        wall_s: wall-clock seconds of training and validation, without what was lost to kills.
        cpu_s: the same in processor time, of all processes that train, but not of those that load for them.
        epochs: the figures logged after each epoch.
        error: what went wrong.
        worker: machine and process.
    """

    status: str
    parameters: int | None = None
    evaluations: float | None = None
    samples: float | None = None
    wall_s: float | None = None
    cpu_s: float | None = None
    epochs: list[dict[str, float]] = field(default_factory=list)
    error: str = ""
    worker: str = ""


RUNS = Table("runs", Run, Outcome, "name")


class Cost(Callback):
    """Logs cost/samples, cost/wall_s and cost/cpu_s once per epoch, counted from the run's beginning.

    Processor time is the sum over the processes that train, without those that load pictures for them. The counts are
    kept in checkpoints, so that a resumed run continues them.
    """

    def __init__(self) -> None:
        self.samples, self.wall, self.cpu = 0, 0.0, 0.0
        self._since: tuple[float, float] | None = None

    def _count(self) -> None:
        """Adds the time since the last call."""
        now = time.perf_counter(), time.process_time()
        if self._since is not None:
            self.wall, self.cpu = self.wall + now[0] - self._since[0], self.cpu + now[1] - self._since[1]
        self._since = now

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Time counts from here: what passed between two processes of a resumed run was not training.
        self._since = None
        self._count()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.samples += len(batch[0]) * trainer.world_size

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._count()
        # As double tensors: `log` converts plain numbers to single precision, which cannot count by ones above 2^24.
        for name, count in (("samples", self.samples), ("wall_s", self.wall), ("cpu_s", self.cpu)):
            how = "sum" if name == "cpu_s" else "mean"  # over processes: they train at the same time
            value = torch.tensor(float(count), dtype=torch.float64)
            pl_module.log(f"cost/{name}", value, sync_dist=True, reduce_fx=how)

    def state_dict(self) -> dict[str, Any]:
        if self._since is not None:
            self._count()
        return {"samples": self.samples, "wall": self.wall, "cpu": self.cpu}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.samples, self.wall, self.cpu = (state_dict[name] for name in ("samples", "wall", "cpu"))


def epochs_of(folder: Path) -> list[dict[str, float]]:
    """Returns the finite figures that a run has logged, one mapping per epoch, without learning rates.

    Args:
        folder: folder of the run.
    """
    found: dict[int, dict[str, float]] = {}
    for row in logged_rows(folder):
        figures = {k: float(v) for k, v in row.items() if v and LOGGED.fullmatch(k or "")}
        # Counts are exact; of measured figures, seven digits are more than single precision has.
        figures = {k: v if v.is_integer() else float(f"{v:.7g}") for k, v in figures.items() if math.isfinite(v)}
        if figures and row.get("epoch"):
            # Figures of training and of validation are logged in separate rows.
            found.setdefault(int(row["epoch"]), {}).update(figures)
    return [{"epoch": epoch, **found[epoch]} for epoch in sorted(found)]


def train(run_: Run, folder: str, words: list[str]) -> Outcome | None:
    """Trains one run, or resumes it where it stopped; its output goes to a file beside its folder.

    Args:
        run_: the run.
        folder: folder of the run.
        words: the command line that trains it from the beginning.

    Returns:
        The outcome; None if a signal stopped the run, whose progress is then saved.
    """
    _wait_for(Path(folder))
    last = Path(folder) / "checkpoints" / "last.ckpt"
    if last.exists():
        if other := _other_options(last, words):
            return outcome_of(Path(folder), "failed", error=f"{other}; remove its folder to train it anew")
        words = [*words, "--ckpt_path", "last"]
    parameters, status, error = None, TRAINED, ""
    with _output_to(Path(folder).with_name(f"{Path(folder).name}.log")):
        try:
            command = run(words, "odenets")
            assert command is not None
            parameters = sum(p.numel() for p in getattr(command.model, "net", command.model).parameters())
        except SystemExit as stop:
            # The command ends by SystemExit, as it does for a user; here that is an outcome, and the process continues.
            if stop.code in STOPPED:
                return None
            status = "diverged" if _not_finite(stop) else "failed"
            error = stop.message if isinstance(stop, Failed) else f"ended with status {stop.code}"
        except Exception as fault:  # e.g. out of memory
            traceback.print_exc()
            status, error = "failed", f"{type(fault).__name__}: {str(fault).strip() or 'no message'}".splitlines()[0]
    return outcome_of(Path(folder), status, parameters, error[:500])


def _other_options(checkpoint: Path, words: list[str]) -> str:
    """Names the options that a resumed run would change; empty if there are none.

    A command that is typed may change an option midway. In a comparison, the table would not show the change.
    """
    try:
        before = open_checkpoint(checkpoint, resume=True).held.get(KEY, {}).get("config")
    except SchemeError:
        return ""  # the run itself says what is wrong
    found = changes(before or {}, resolve(words, "odenets"), HARMLESS)
    return "; ".join(f"{name} was {a} when it began, and is {b} now" for name, (a, b) in found.items() if name != ROOT)


def _wait_for(folder: Path) -> None:
    """Waits, two minutes at most, for a run that a killed command has left behind and that is about to save."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        lock = FolderLock(folder)
        try:
            lock.acquire()
        except FolderInUse:
            time.sleep(0.1)
        except DataError:  # the run itself says what is wrong
            return
        else:
            lock.release()
            return


def outcome_of(folder: Path, status: str, parameters: int | None = None, error: str = "") -> Outcome:
    """Returns a run's outcome, with the figures that its folder holds.

    Args:
        folder: folder of the run.
        status: ``trained``, ``failed``, ``diverged`` or ``unfinished``.
        parameters: number of parameters of the net, if known.
        error: the error message.
    """
    epochs = epochs_of(folder)
    # The latest of each figure, since not every epoch logs all of them.
    last: dict[str, float] = {k: v for epoch in epochs for k, v in epoch.items()}
    return Outcome(
        status,
        parameters,
        last.get("evaluations"),
        *(last.get(f"cost/{name}") for name in ("samples", "wall_s", "cpu_s")),
        epochs=epochs,
        error=error,
        worker=f"{platform.node()}:{os.getpid()}",
    )


def _not_finite(error: BaseException | None) -> bool:
    """Whether ``NotFinite`` is among the causes of an error."""
    while error is not None and not isinstance(error, NotFinite):
        # If the command raised without `from`, the original error is the context of the new one.
        error = error.__cause__ or error.__context__
    return error is not None


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Appends the output of the process and its children to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Buffered output belongs to the previous destination.
    sys.stdout.flush()
    sys.stderr.flush()
    # The descriptors, since child processes and C libraries bypass `sys.stdout`; and, below, the Python streams, which
    # under pytest or in a notebook do not write to these descriptors.
    kept = [os.dup(1), os.dup(2)]
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    streams = sys.stdout, sys.stderr
    try:
        os.dup2(number, 1)
        os.dup2(number, 2)
        with os.fdopen(number, "w", buffering=1, closefd=True) as file:
            sys.stdout, sys.stderr = file, file
            try:
                yield
            finally:
                sys.stdout, sys.stderr = streams
    finally:
        for target, source in zip((1, 2), kept, strict=True):
            os.dup2(source, target)
            os.close(source)
