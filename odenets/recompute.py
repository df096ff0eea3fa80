"""Running a step again in the backward pass: the same random numbers, and statistics that do not move twice."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def buffers_kept(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Puts every buffer that the body wrote back: running statistics, their counters, moving averages.

    In training mode BatchNorm normalises with the batch, so outputs and gradients inside are those of the first run.
    For ``torch.utils.checkpoint``, which counts saved tensors: BatchNorm saves the same ones here as outside.
    """
    buffers = list({id(b): b for module in modules for b in module.buffers()}.values())
    saved = [b.clone() for b in buffers]
    try:
        yield
    finally:
        # BatchNorm's kernels write without raising the version counter, so all are put back; and through .data, which
        # leaves the counter alone, since autograd may have saved a buffer.
        for b, value in zip(buffers, saved, strict=True):
            b.data.copy_(value)


@contextmanager
def statistics_kept(norms: Sequence[nn.Module], holders: Sequence[nn.Module]) -> Iterator[None]:
    """As ``buffers_kept``, quicker: BatchNorm layers in training mode are told to leave their statistics alone.

    Args:
        norms: the BatchNorm layers that track statistics.
        holders: all modules that have buffers.
    """
    told = [m for m in norms if m.training and m.track_running_stats]
    others = [b for m in holders if m not in norms for b in m._buffers.values() if b is not None]
    kept = [(b, b.clone()) for b in others]
    for m in told:
        m.track_running_stats = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for m in told:
            m.track_running_stats = True  # type: ignore[assignment]
        for b, value in kept:
            b.data.copy_(value)


class Generators:
    """The states of torch's global generators: the processor's, and that of one CUDA device."""

    __slots__ = ("cpu", "cuda", "device")

    def __init__(self, device: torch.device, cpu: Tensor, cuda: Tensor | None):
        self.device, self.cpu, self.cuda = device, cpu, cuda

    @classmethod
    def now(cls, device: torch.device) -> "Generators":
        """The states at this moment."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, torch.get_rng_state(), cuda)

    def set(self) -> None:
        """Sets the global generators to these states."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    def drawn(self, notes: "list[Generators | None]") -> "Generators":
        """Notes these states if the generators have moved since, else None; returns the states of now."""
        now = Generators.now(self.device)
        same = torch.equal(self.cpu, now.cpu) and (self.cuda is None or torch.equal(self.cuda, now.cuda))  # type: ignore
        notes.append(None if same else self)
        return self if same else now

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, the generators draw from these states; outside nobody sees that they did."""
        before = Generators.now(self.device)
        self.set()
        try:
            yield
        finally:
            before.set()
