"""The folder of a run: its lock, and checkpoints that are written atomically.

Three guarantees. A checkpoint is written to a temporary file beside its place and renamed, so that however the process
ends, every existing file can be read. A folder belongs to one run at a time, by a lock that the kernel releases when
the process dies. And the files of an earlier run are set aside, never overwritten.
"""

import contextlib
import csv
import errno
import fcntl
import io
import os
import re
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from schemes import SchemeError

from .sources import DataError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# The error numbers of a place that a run cannot write to; any other is a fault of the program.
UNWRITABLE = FULL | {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EIO}
UNWRITABLE |= {errno.ENAMETOOLONG, errno.EINVAL, errno.EBUSY}
OTHER = "is no checkpoint of a training run"
PART = ".part"  # the suffix of a file that is being written


class CheckpointError(SchemeError):
    """A checkpoint that cannot be written or read; one or two lines with the remedy."""


def write_whole(path: Path, data: Any) -> None:
    """Writes a file atomically, bytes or whatever ``torch.save`` takes: beside `path` first, and then renamed.

    Args:
        path: the file.
        data: its contents.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, as a rename is only atomic within one file system; hidden, so that no glob pattern matches it.
    number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-{os.getpid()}-", suffix=PART)
    try:
        with os.fdopen(number, "wb") as file:
            if isinstance(data, bytes):
                file.write(data)
            else:
                # torch would report a full disk as an error of its zip writer, so it writes to memory, and we to disk.
                torch.save(data, buffer := io.BytesIO())
                file.write(buffer.getbuffer())
            file.flush()
            # Before the rename: otherwise, after a power cut, the name could refer to a file without its contents.
            os.fsync(file.fileno())
        # The mask can only be read by setting it.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # a temporary file is private to its owner
        os.replace(name, path)
    # Also on Ctrl-C: a half-written file of several GB must not remain.
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems do not sync folders
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints as local files, written atomically."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        try:
            write_whole(Path(path), checkpoint)
        except OSError as e:
            raise CheckpointError(
                f"{path} cannot be written: {e.strerror or e}\n"
                "  The checkpoint before is as it was. Make room, or the folder writable, and resume: --ckpt_path last"
            ) from None


class FolderInUse(DataError):
    """Another run is training in the folder."""


class Found(NamedTuple):
    """A checkpoint that can be read.

    Attributes:
        path: the file.
        step: its optimiser steps.
        held: its contents; tensors are read when they are used.
    """

    path: Path
    step: int
    held: dict[str, Any]


def open_checkpoint(path: Path, resume: bool) -> Found:
    """Opens a training checkpoint without reading its tensors.

    Args:
        path: the file.
        resume: whether training resumes from it, which needs more than weights.

    Raises:
        CheckpointError: a file that is cut off, empty, of another kind, or without the state that resuming needs; the
            second line names another checkpoint beside it that is whole.
    """
    problem, held = _examine(path, resume)
    if problem is None:
        return Found(path, int(held["global_step"]), held)
    others = []
    for other in sorted(path.parent.glob("*.ckpt")) if path.parent.is_dir() else []:
        if other != path and (found := _examine(other, resume))[0] is None:
            others.append((int(found[1]["global_step"]), other))
    remedy = "Give another checkpoint: --ckpt_path FILE"
    if others:
        step, other = max(others)
        remedy = f"{other} is whole, of step {step}: --ckpt_path {other}"
    raise CheckpointError(f"{path} {problem}\n  {remedy}")


def is_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint of a run, or was one before it was damaged; if not, it may still hold weights.

    Args:
        path: the file.
    """
    problem, _ = _examine(path, resume=False)
    return problem is None or (path.suffix == ".ckpt" and not problem.startswith(OTHER))


def _examine(path: Path, resume: bool) -> tuple[str | None, dict[str, Any]]:
    """Returns the problem with a checkpoint, if any, and its contents."""
    size, zipped = 0, False
    try:
        size = path.stat().st_size
        if size == 0:
            return "is empty", {}
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"
        # Memory-mapped: only the tensors that are used are read. ``weights_only`` runs no code from the file.
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except PermissionError:
        return "cannot be read: permission denied", {}
    except Exception as e:  # a damaged file may raise anything
        # A zip file has its directory at its end, so a file without one was cut off.
        cut = zipped and "central directory" in str(e)
        why = "cut off" if cut else f"damaged, or no checkpoint ({type(e).__name__})"
        return f"is {why}: {size:,} bytes", {}
    if not isinstance(held, dict) or not isinstance(held.get("state_dict"), dict) or "global_step" not in held:
        return f"{OTHER}: it holds no state_dict with the step it was saved at", {}
    lacking = [key for key in ("loops", "optimizer_states", "lr_schedulers") if key not in held]
    if resume and lacking:
        return f"holds weights only, without {', '.join(lacking)}, and cannot be resumed", {}
    # Checked here, since later code relies on the types of these parts.
    for name, holds in _PARTS.items():
        *above, last = name.split(".")
        part = held.get(above[0], {}) if above else held
        if last in part and not holds(part[last]):
            return f"is damaged, or of another program: its {name} is {str(part[last])[:60]}", {}
    return None, held


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value >= 0


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(isinstance(one, kind) for one in value)


def _is_place(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 4 and all(map(_is_count, value))


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _is_written(value: Any) -> bool:
    return value is None or (_is_mapping(value) and _is_count(value.get("part")) and _is_count(value.get("rows")))


# Parts of a checkpoint, with a check of each; this package's own come after the mapping that holds them.
_PARTS: dict[str, Callable[[Any], bool]] = {
    "global_step": _is_count,
    "callbacks": _is_mapping,
    "loops": lambda value: _is_mapping(value) and _is_mapping(value.get("fit_loop")),
    "optimizer_states": _is_list_of(dict),
    "lr_schedulers": _is_list_of(dict),
    "odenets": _is_mapping,
    "odenets.place": _is_place,
    "odenets.config": _is_mapping,
    "odenets.sums": _is_list_of(dict),
    "odenets.groups": _is_list_of(list),
    "odenets.optimizers": _is_list_of(str),
    "odenets.data": lambda value: value is None or _is_mapping(value),
    "odenets.metrics": _is_written,
}


class FolderLock:
    """Locks a run's folder for this process; the kernel releases it when the process ends, however it ends.

    It is a record lock, which forked workers do not inherit. The file ``.lock`` names its holder.

    Args:
        folder: the run's folder; created if it does not exist.

    Raises:
        FolderInUse: another process holds it.
        DataError: it cannot be written.
    """

    NAME = ".lock"

    def __init__(self, folder: Path) -> None:
        self.folder, self._number = folder, -1
        self._made: list[Path] = []

    def acquire(self) -> None:
        """Takes the lock, or raises."""
        if "\0" in str(self.folder):
            raise DataError(f"run_dir: {str(self.folder)!r} is no path\n  Give another: --run_dir FOLDER")
        try:
            # Folders that are created here are removed again if they stay empty.
            missing = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            self._made = missing
            # The file may be renamed, with the folder, between open and lock; the lock would then be on another run.
            while True:
                number = os.open(self.folder / self.NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                try:
                    fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as e:
                    holder = os.read(number, 200).decode(errors="replace").strip() or "another process"
                    os.close(number)
                    # These two mean "held by another process"; any other, a file system without locks.
                    if e.errno not in (errno.EACCES, errno.EAGAIN):
                        raise
                    raise FolderInUse(
                        f"{self.folder} is in use: {holder} trains there\n"
                        "  Wait for it, or give this run a folder of its own: --run_dir FOLDER"
                    ) from None
                if self._is_there(number):
                    break
                os.close(number)  # it was set aside between the two calls
            os.truncate(number, 0)
            # Only for the message to the next process; the lock itself is the kernel's.
            os.pwrite(number, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            self._number = number
            self._check_inside()
        except OSError as e:
            self.release()
            raise unwritable(self.folder, e) from None

    def _check_inside(self) -> None:
        """Refuses at once a run that could not write its checkpoints at the end of the first epoch."""
        inside = self.folder / "checkpoints"
        for folder in (self.folder, inside) if inside.exists() else (self.folder,):
            for stale in folder.glob(f".*{PART}"):
                stale.unlink()
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=PART) as file:
                # A full disk allows files to be created, but refuses their first bytes.
                file.write(b"0" * 4096)
                file.flush()

    def _is_there(self, number: int) -> bool:
        try:
            return os.path.samestat(os.fstat(number), os.stat(self.folder / self.NAME))
        except FileNotFoundError:
            return False

    def set_aside(self) -> None:
        """Renames the folder of an earlier run, and locks a new folder in its place."""
        if not (self.folder / "config.yaml").exists():
            return
        if Path.cwd().is_relative_to(self.folder.resolve()):
            # The folder may hold all of the user's work.
            raise DataError(
                f"run_dir: {self.folder} holds a run, or another config.yaml, and the command runs in this folder: it "
                "is not set aside\n  Give a folder of its own: --run_dir FOLDER"
            )
        # The lock moves with the renamed folder, and is held until the new folder has one.
        old, aside = self._number, self.folder.rename(free_name(self.folder))
        (aside / self.NAME).unlink()
        self._number = -1
        self.acquire()
        os.close(old)
        rank_zero_info(f"{self.folder} held an earlier run: it is now {aside}")

    def release(self) -> None:
        """Releases the folder, and removes the folders that this lock created if they are empty."""
        if self._number >= 0:
            if self._is_there(self._number):
                with contextlib.suppress(OSError):
                    os.unlink(self.folder / self.NAME)
            os.close(self._number)
            self._number = -1
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        self._made = []


def unwritable(folder: Path, e: OSError) -> DataError:
    """Returns the error, of two lines, for a folder that cannot be written.

    Args:
        folder: the folder.
        e: the system's error.
    """
    if e.errno in FULL:
        return DataError(f"run_dir: no room to write to {folder} ({e.strerror})\n  Make room, or give --run_dir FOLDER")
    return DataError(
        f"run_dir: {folder} cannot be written: {e.strerror or e}\n"
        "  Give a folder where this user has the permission to write: --run_dir FOLDER"
    )


def first_process() -> bool:
    """Whether this process, of all that train together, is the one that writes to the folder."""
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    rank = getattr(rank_zero_only, "rank", 0)
    return rank in (0, None) and node == "0" and os.environ.get("LOCAL_RANK", "0") == "0"


def free_name(path: Path) -> Path:
    """Returns the first free numbered name: `runs/x` -> `runs/x-1`, `metrics.csv` -> `metrics-1.csv`.

    Args:
        path: a file or a folder.
    """
    number = 1
    while (free := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    return free


def parts_of(folder: Path) -> list[Path]:
    """The files of metrics that were written before the run was last resumed, `metrics-1.csv` first.

    Args:
        folder: of the run.
    """
    numbered = [(int(m[1]), p) for p in folder.glob("metrics-*.csv") if (m := re.fullmatch(r"metrics-(\d+)", p.stem))]
    return [path for _, path in sorted(numbered)]


def close_part(folder: Path, written: dict[str, int] | None) -> None:
    """Sets the metrics of a run aside before it is resumed, so that all parts together hold each of its rows once.

    Rows of steps that the checkpoint lacks, and that are therefore repeated, go to a file `...-superseded.csv`.

    Args:
        folder: of the run.
        written: the part, and its number of rows, at the time of the checkpoint; None if the checkpoint lacks them.
    """
    metrics, parts = folder / "metrics.csv", parts_of(folder)
    if written is None:
        if metrics.exists():
            metrics.rename(free_name(metrics))
        return
    now = [*parts, *([metrics] if metrics.exists() else [])]
    for number, path in enumerate(now):
        if number < written["part"]:
            continue
        rows = written["rows"] if number == written["part"] else 0
        name = folder / f"metrics-{number + 1}.csv"
        head, body = _lines(path)
        # Kept although their steps are repeated: they are results, and deleting them was not requested.
        if len(body) > rows:
            write_whole(free_name(name.with_stem(f"{name.stem}-superseded")), "".join([head, *body[rows:]]).encode())
        if rows:
            write_whole(name, "".join([head, *body[:rows]]).encode())
        if path != name or not rows:
            path.unlink()


def _lines(path: Path) -> tuple[str, list[str]]:
    """The header of a CSV file and its rows, as text."""
    with path.open(newline="") as file:
        rows = list(csv.reader(file))

    def text(row: list[str]) -> str:
        csv.writer(out := io.StringIO()).writerow(row)
        return out.getvalue()

    return (text(rows[0]), [text(row) for row in rows[1:]]) if rows else ("", [])
