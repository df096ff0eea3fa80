"""What an update reads besides arguments and parameters: random states, kept tensors; noted where it moves them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .members import Members, Slot, swapped


class Surroundings:
    """The random states of the processor and of one CUDA device, and the buffers and attributes of some modules."""

    __slots__ = ("attributes", "buffers", "cuda", "device", "end", "generator", "members", "values", "versions")

    def __init__(self, device: torch.device, members: Members | None):
        self.device, self.members = device, members
        # 5 kB on the processor: kept only where an update drew, see ``moved``.
        self.generator = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self.end: Surroundings | None = None
        self.buffers: Sequence[Slot] = () if members is None else members.buffers()
        self.attributes: Sequence[Slot] = () if members is None else members.attributes()
        # Copies, as functions write to buffers in place. An attribute is mostly replaced, and may be large: no copy.
        self.values = [slot.value.detach().clone() for slot in self.buffers]
        self.values += [slot.value if slot.value is None else slot.value.detach() for slot in self.attributes]
        self.versions = [_version(slot.value) for slot in (*self.buffers, *self.attributes)]

    def drew(self, now: "Surroundings") -> bool:
        """Whether random numbers were drawn between these surroundings and later ones."""
        same = torch.equal(self.generator, now.generator)
        return not same or (self.cuda is not None and not torch.equal(self.cuda, now.cuda))  # type: ignore[arg-type]

    def _kept(self) -> bool:
        """Whether the modules still hold the very same values."""
        # Identity and version instead of values: no tensor is compared, so nothing waits for the device.
        slots = zip((*self.buffers, *self.attributes), self.versions, strict=True)
        return all(s.holder.get(s.name) is s.value and _version(s.value) == v for s, v in slots)

    def moved(self, notes: "list[Surroundings | None]") -> "Surroundings":
        """Notes these surroundings if they have changed since, else None; returns those of now."""
        if self._kept():
            state = torch.get_rng_state()
            cuda = None if self.cuda is None else torch.cuda.get_rng_state(self.device)
            if torch.equal(state, self.generator) and (cuda is None or torch.equal(cuda, self.cuda)):  # type: ignore
                notes.append(None)
                return self
        # The end of one update is the beginning of the next: one snapshot a move, not two.
        notes.append(self)
        self.end = Surroundings(self.device, self.members)
        return self.end

    def set_generators(self) -> None:
        """Sets torch's global generators to these states."""
        torch.set_rng_state(self.generator)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    def restore(self) -> None:
        """Puts generators, buffers and attributes back."""
        self.set_generators()
        for slot, value in zip(self.buffers, self.values, strict=False):
            slot.value.data.copy_(value)  # in place, and unseen by autograd, which may have saved it
            slot.holder[slot.name] = slot.value
        for slot in self.attributes:
            slot.holder[slot.name] = slot.value

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, functions draw and read as they did at that moment; outside nobody sees that they did.

        Raises:
            RuntimeError: what they read is gone, or they drew other numbers than the first time.
        """
        # An attribute is not copied: what one held that was written to in place is gone.
        for slot, version in zip(self.attributes, self.versions[len(self.buffers) :], strict=True):
            if _version(slot.value) != version:
                raise RuntimeError(
                    f"Stack: the attribute {slot.name} was written to in place by a residual function that reads it, "
                    "so that the step cannot be run again.\n  Make it a buffer: self.register_buffer(...)."
                )
        before = Surroundings(self.device, None)
        self.set_generators()
        count = len(self.buffers)
        # Copies of the copies: a second replay must read the same.
        values = [*(v.clone() for v in self.values[:count]), *self.values[count:]]
        try:
            with swapped([*self.buffers, *self.attributes], values):
                yield
            end = Surroundings(self.device, None)
        finally:
            before.set_generators()
        if self.end is not None and self.drew(end) and self.end.drew(end):
            raise RuntimeError(
                "Stack: a residual function drew other random numbers when it was run again: another thread drew from "
                "torch's generator in the forward pass.\n  Let it draw from a generator of its own."
            )


@contextmanager
def nothing_changed(modules: Iterable[nn.Module], always: bool = False) -> Iterator[None]:
    """Puts buffers, attributes and random number generators back if the body raises, or always."""
    members = Members(modules)
    buffers = [*members.buffers(), *members.statistics()]
    saved, attributes = [slot.value.clone() for slot in buffers], members.attributes()
    held = (slot.value for slot in (*buffers, *members.parameters()))
    # Of parameters too: a module without buffers may draw on a device all the same.
    devices = sorted({x.device.index for x in held if x.device.type == "cuda"})
    states = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in devices]
    # Set first: whatever ends the body early, an interrupt too, finds everything put back.
    undo = True
    try:
        yield
        undo = always
    finally:
        if undo:
            with torch.no_grad():
                for slot, value in zip(buffers, saved, strict=True):
                    slot.value.data.copy_(value)
            for slot in (*buffers, *attributes):
                slot.holder[slot.name] = slot.value
            torch.set_rng_state(states[0])
            for d, state in zip(devices, states[1], strict=True):
                torch.cuda.set_rng_state(state, d)


def initialise(module: nn.Module, run: Callable[[], Any]) -> None:
    """Gives lazy parameters their shapes by one run without gradients; statistics and generators stay as they are."""
    lazy = [m for m in module.modules() if any(is_lazy(p) for p in (*m._parameters.values(), *m._buffers.values()))]
    if not lazy:
        return
    with torch.no_grad(), nothing_changed([module], always=True):
        run()
    for m in lazy:
        if hasattr(m, "reset_running_stats"):
            m.reset_running_stats()


def _version(value: Tensor | None) -> int:
    return -1 if value is None or value.is_inference() else value._version
