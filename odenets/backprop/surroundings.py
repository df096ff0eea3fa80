"""What a call reads besides its arguments: random states, buffers, flags; noted, so that it can be run again."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree


class Slot(NamedTuple):
    """A place where a module keeps a tensor: its dictionary of parameters or buffers, the name there, the tensor."""

    holder: dict[str, Any]
    name: str
    tensor: Tensor


def buffer_slots(modules: Iterable[nn.Module]) -> list[Slot]:
    """The buffers that the modules hold themselves."""
    return [
        Slot(m._buffers, name, b) for m in modules for name, b in m._buffers.items() if b is not None and not is_lazy(b)
    ]


@contextmanager
def swapped(slots: Sequence[Slot], tensors: Sequence[Any]) -> Iterator[None]:
    """Inside, the modules hold ``tensors`` in these places; what they held comes back, the very objects."""
    before = [s.holder.get(s.name) for s in slots]
    try:
        for slot, tensor in zip(slots, tensors, strict=True):
            slot.holder[slot.name] = tensor
        yield
    finally:
        for slot, tensor in zip(slots, before, strict=True):
            slot.holder[slot.name] = tensor


class Surroundings:
    """The random states of the processor and of one CUDA device, and some buffers, at one moment."""

    __slots__ = ("buffers", "cpu", "cuda", "device", "versions")

    def __init__(self, device: torch.device, cpu: Tensor, cuda: Tensor | None, buffers: list[Slot]):
        self.device, self.cpu, self.cuda = device, cpu, cuda
        self.versions = [b.tensor._version for b in buffers]
        # Copies, as most functions write to their buffers in place.
        self.buffers = [(b, b.tensor.detach().clone()) for b in buffers]

    @classmethod
    def now(cls, device: torch.device, buffers: list[Slot]) -> "Surroundings":
        """The surroundings of this moment."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, torch.get_rng_state(), cuda, buffers)

    def set_generators(self) -> None:
        """Sets torch's global generators to these states."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    def moved(self, notes: "list[Surroundings | None]") -> "Surroundings":
        """Notes these surroundings if they have changed since, else None; returns those of now."""
        cpu = torch.get_rng_state()
        cuda = None if self.cuda is None else torch.cuda.get_rng_state(self.device)
        same = torch.equal(self.cpu, cpu) and (cuda is None or torch.equal(self.cuda, cuda))  # type: ignore[arg-type]
        for (slot, _), version in zip(self.buffers, self.versions, strict=True):
            same = same and slot.holder.get(slot.name) is slot.tensor and slot.tensor._version == version
        notes.append(None if same else self)
        if same:
            return self
        held = [Slot(s.holder, s.name, s.holder[s.name]) for s, _ in self.buffers]
        return Surroundings(self.device, cpu, cuda, held)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, functions draw and read as they did at that moment; outside nobody sees that they did."""
        before = Surroundings.now(self.device, [])
        self.set_generators()
        try:
            # Copies of the copies: a second replay must read the same.
            with swapped([slot for slot, _ in self.buffers], [value.clone() for _, value in self.buffers]):
                yield
        finally:
            before.set_generators()


class Flags:
    """Which modules were in training, which parameters wanted a gradient, and the versions of all that was read."""

    __slots__ = ("frozen", "read", "training")

    def __init__(self, modules: Sequence[nn.Module], given: Any = None):
        self.training = [(m, m.training) for m in modules]
        parameters = [(name, p) for m in modules for name, p in m._parameters.items() if p is not None]
        self.frozen = [(p, p.requires_grad) for _, p in parameters if p.is_leaf]
        tensors = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
        self.read = [(f"parameter {name}", p, p._version) for name, p in parameters if not p.is_inference()]
        self.read += [("the context or the time", x, x._version) for x in tensors if not x.is_inference()]

    def check(self, where: str) -> None:
        """Raises where a tensor is no longer what the call read.

        Raises:
            RuntimeError: a parameter or a tensor of the context was written to since.
        """
        for what, tensor, version in self.read:
            if tensor._version != version:
                raise RuntimeError(
                    f"Stack: {what} of {where}, {tuple(tensor.shape)}, was changed in place between the forward and "
                    "the backward pass, which runs the step again.\n  Step the optimiser after the last backward pass."
                )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the modules train or not, and their parameters want a gradient or not, as at the call."""
        modes = [(m, m.training) for m, was in self.training if m.training != was]
        grads = [(p, p.requires_grad) for p, was in self.frozen if p.requires_grad != was]
        try:
            for m, now in modes:
                m.training = not now
            for p, now in grads:
                p.requires_grad_(not now)
            yield
        finally:
            for m, now in modes:
                m.training = now
            for p, now in grads:
                p.requires_grad_(now)
