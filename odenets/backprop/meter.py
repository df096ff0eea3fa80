"""Measures the memory that some code takes in the intervals between marks: live bytes, and their peak.

On a GPU it reads the allocator's own count, whose peak is reset. On the CPU it reads the allocator's events, as torch's
profiler records them in one thread. Where a profiler is running already, it counts the storages of all tensors that
operations return, which leaves out what a kernel allocates for itself.
"""

import weakref
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Interval(NamedTuple):
    """Bytes above the level before the first mark.

    Attributes:
        start: bytes live at the mark.
        most: the most bytes that were live from there to the next mark, or the end.
    """

    start: int
    most: int


class Meter(ABC):
    """A context that measures memory; ``mark`` begins an interval, and ``intervals`` holds them all after the exit."""

    def __init__(self) -> None:
        self.intervals: list[Interval] = []

    @abstractmethod
    def __enter__(self) -> "Meter": ...

    @abstractmethod
    def __exit__(self, *error: Any) -> None: ...

    @abstractmethod
    def mark(self) -> None:
        """Begins an interval."""

    @property
    def peak(self) -> int:
        """The most bytes that were live at once in any interval."""
        return max((i.most for i in self.intervals), default=0)


class _CudaMeter(Meter):
    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.base, self.start = device, 0, 0

    def __enter__(self) -> "Meter":
        self.base = torch.cuda.memory_allocated(self.device)
        return self

    def mark(self) -> None:
        self._close()
        self.start = torch.cuda.memory_allocated(self.device) - self.base
        # The allocator keeps a single peak, so it is reset for each interval.
        torch.cuda.reset_peak_memory_stats(self.device)
        self.open = True

    open = False

    def _close(self) -> None:
        if self.open:
            most = torch.cuda.max_memory_allocated(self.device) - self.base
            self.intervals.append(Interval(self.start, most))
        self.open = False

    def __exit__(self, *error: Any) -> None:
        self._close()


class _EventMeter(Meter):
    """Reads the allocator's events of this thread, in order."""

    MARK = "odenets::mark"

    def __enter__(self) -> "Meter":
        from torch.autograd import profiler_legacy as legacy

        experimental = torch._C._profiler._ExperimentalConfig()  # type: ignore[attr-defined]
        legacy._enable_profiler_legacy(  # type: ignore[attr-defined]
            legacy.ProfilerConfig(  # type: ignore[attr-defined]
                legacy.ProfilerState.CPU,  # type: ignore[attr-defined]
                *(False, True, False, False, False),
                experimental,
            )
        )
        return self

    def mark(self) -> None:
        # A mark is an event among the others: their order alone tells which interval an allocation belongs to.
        with torch.autograd.profiler.record_function(self.MARK):
            pass

    def __exit__(self, *error: Any) -> None:
        from torch.autograd.profiler_legacy import _disable_profiler_legacy  # type: ignore[attr-defined]

        # Events are differences; what was live at the first mark is subtracted at the end.
        live = 0
        found: list[list[int]] = []
        for event in (e for thread in _disable_profiler_legacy() for e in thread):
            if event.kind() == "memory_alloc":
                live += event.cpu_memory_usage()
                if found:
                    found[-1][1] = max(found[-1][1], live)
            elif event.kind() == "push" and event.name() == self.MARK:
                found.append([live, live])
        base = found[0][0] if found else 0
        self.intervals = [Interval(start - base, most - base) for start, most in found]


class _StorageMeter(TorchDispatchMode, Meter):
    """Counts the storages that operations create, until they are freed."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        Meter.__init__(self)
        self.seen: dict[int, Any] = {}
        self.live, self.found = 0, [[0, 0]]

    def mark(self) -> None:
        self.found.append([self.live, self.live])

    def __exit__(self, *error: Any) -> None:
        TorchDispatchMode.__exit__(self, *error)
        # The first entry is what came before the first mark.
        base = self.found[1][0] if len(self.found) > 1 else 0
        self.intervals = [Interval(start - base, most - base) for start, most in self.found[1:]]

    def _see(self, x: Any, new: bool) -> None:
        if not isinstance(x, Tensor) or x.layout != torch.strided:
            return
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.seen:
            return
        # A storage that is first seen as an argument existed before, so freeing it changes no count.
        size = storage.nbytes() if new else 0

        def gone(_: Any) -> None:
            self.seen.pop(key, None)
            self.live -= size

        # Called when the last tensor on it is gone, so that the count falls when the memory is freed, and not later.
        self.seen[key] = weakref.ref(storage, gone)
        self.live += size
        self.found[-1][1] = max(self.found[-1][1], self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Arguments first, since what an operation returns may be a view of them, which takes no memory.
        for x in pytree.tree_leaves((args, kwargs)):
            self._see(x, False)
        out = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(out):
            self._see(x, True)
        return out


def meter_on(device: torch.device) -> Meter:
    """The meter for the memory of a device.

    Example:
        >>> import torch
        >>> with meter_on(torch.device("cpu")) as meter:
        ...     meter.mark()
        ...     x = torch.zeros(256)
        ...     meter.mark()
        ...     del x
        >>> [interval.most for interval in meter.intervals]
        [1024, 1024]
    """
    if device.type == "cuda":
        return _CudaMeter(device)
    # There can be only one profiler, and the user's is running.
    if torch._C._autograd._profiler_enabled():  # type: ignore[attr-defined]
        return _StorageMeter()
    return _EventMeter()
