"""Peak memory of one step, measured the same way in all benchmarks here."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_mib(step: Callable[[], object], device: str = "cpu") -> float:
    """Returns the peak in MiB above the level before the step: the highest sum of allocations less releases.

    Taken from the allocator's events as recorded by the profiler; on a GPU from the allocator's own counters.

    Args:
        step: the code that is measured; the parameters whose gradients it writes should have gradients already.
        device: the device of its tensors.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most / 2**20
