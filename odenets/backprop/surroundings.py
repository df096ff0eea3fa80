"""Records what an update reads besides arguments and parameters, if it changes it: random states, held tensors."""

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from ctypes import string_at
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from schemes.errors import SchemeError

from .contents import Contents, generator_state, holds, same_state, set_generator
from .members import Members, Namespace, Slot, changed, swapped


def python_generators() -> tuple[Any, ...]:
    """The states of Python's generator, and of NumPy's if it is imported."""
    # Unless NumPy is imported already, nothing has drawn from it; importing it here would take longer than the step.
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state(legacy=True)


def set_python_generators(state: tuple[Any, ...]) -> None:
    """Sets the generators of Python and NumPy."""
    random.setstate(state[0])
    if state[1] is not None:
        sys.modules["numpy"].random.set_state(state[1])


def same_python(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two states of ``python_generators`` are equal."""
    if a[0] != b[0]:
        return False
    # NumPy's state is a name, an array of keys, and scalars; the scalars usually differ, and are cheap to compare.
    return a[1] is None or (a[1][2:] == b[1][2:] and bool((a[1][1] == b[1][1]).all()))


def _digest(state: Tensor) -> bytes:
    """The parts of the 5 kB state of torch's CPU generator of which every draw changes some.

    The head counts the numbers that are left of a block of 624, and holds the first of them, which change with the
    block; the tail holds normal numbers, which are drawn in pairs and returned one by one.
    """
    place = state.data_ptr()  # raw memory, since slicing the tensor would cost more than the draw to be detected
    return string_at(place, 64) + string_at(place + state.numel() - 64, 64)


_NOTHING = nullcontext()
_latest: list[tuple[bytes, Tensor]] = []  # the last state of torch's generator, shared until it changes


def _generator_state() -> tuple[bytes, Tensor]:
    now = torch.get_rng_state()
    digest = _digest(now)
    if not _latest or _latest[0][0] != digest:
        _latest[:] = [(digest, now)]
    return _latest[0]


def torch_functions() -> Any:
    """Inside, tensor subclasses behave as such, since a backward pass called on one of them treats them as plain.

    Switches __torch_function__ on only where it is off; also for a user who had it off in the forward pass.
    """
    return _NOTHING if torch._C._is_torch_function_enabled() else torch._C._EnableTorchFunction()


def name_of(names: Namespace | None, x: Tensor) -> str:
    """The name under which a module holds a tensor, for messages."""
    held = ((k, v) for d in (names.contents if names else ()) for k, v in d.items())
    return next((f"the buffer or attribute {k}" for k, v in held if v is x), "a tensor in an attribute")


class Read(NamedTuple):
    """The tensors that modules held when they ran, and their versions."""

    names: Namespace | None
    tensors: list[Tensor]
    versions: list[int]
    contents: Contents | None

    def check(self, where: str) -> None:
        """Raises where a tensor was written to since.

        Raises:
            RuntimeError: with the name of the tensor.
        """
        if self.versions == [_version(x) for x in self.tensors]:
            return
        for x, version in zip(self.tensors, self.versions, strict=True):
            if _version(x) != version:
                raise changed(name_of(self.names, x), where, x)

    def restored(self) -> Any:
        """Inside, containers hold what they held."""
        return nullcontext() if self.contents is None else self.contents.restored()


class Surroundings:
    """The random states of the CPU and of one CUDA device, and what a user's modules hold.

    The random states of Python and NumPy are included unless ``members.draws`` says that they are not used. So are the
    contents of containers among the functions' arguments, such as a context.
    """

    __slots__ = (
        *(
            "apart",
            "buffers",
            "contents",
            "cuda",
            "device",
            "digest",
            "end",
            "generator",
            "given",
            "members",
            "names",
            "own",
        ),
        *("python", "tensors", "values", "versions"),
    )

    def __init__(self, device: torch.device, members: Members | None, given: tuple[Any, ...] = ()):
        self.device, self.members, self.given = device, members, given
        # 5 kB on the CPU: kept only where an update drew, see ``moved``.
        self.digest, self.generator = _generator_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self.end: Surroundings | None = None
        self.apart = False  # whether modules held something else earlier in the same step
        self.python: tuple[Any, ...] | None = None
        self.names: Namespace | None = None
        self.contents: Contents | None = None
        self.own: list[tuple[Any, Any]] = []
        self.buffers: Sequence[Slot] = ()
        self.values: list[Tensor] = []
        self.tensors: list[Tensor] = []
        self.versions: list[int] = []
        if members is None:
            return
        # The states of Python and NumPy take microseconds to copy, so they are left out once a pass did not use them.
        if members.draws.get(members.modules[0].training, True):
            self.python = python_generators()
        self.names, self.buffers = members.names(), members.buffers()
        given = tuple(x for x in given if holds(x))
        if given or self.names.containers:
            self.contents = Contents(self.names.containers, given, members.looks_after)
        generators = self.names.generators + (self.contents.generators if self.contents else [])
        self.own = [(g, generator_state(g)) for g in generators]
        # Copies, since functions write to buffers in place. Attributes are mostly replaced and may be large: no copies.
        self.values = [slot.value.detach().clone() for slot in self.buffers]
        self.tensors = [*self.names.tensors, *(self.contents.tensors if self.contents else ())]
        self.versions = [_version(x) for x in self.tensors]

    def drew(self, now: "Surroundings") -> bool:
        """Whether random numbers were drawn between these surroundings and later ones."""
        return self.digest != now.digest or (self.cuda is not None and not torch.equal(self.cuda, now.cuda))  # type: ignore[arg-type]

    def _kept(self) -> bool:
        """Whether the modules still hold the same values."""
        return (
            (self.names is None or self.names.same())
            and self.versions == [_version(x) for x in self.tensors]
            and (self.contents is None or self.contents.same())
        )

    def _drawn(self) -> bool:
        """Whether numbers were drawn since, from any generator."""
        cuda = None if self.cuda is None else torch.cuda.get_rng_state(self.device)
        return not (
            _digest(torch.get_rng_state()) == self.digest
            and (cuda is None or torch.equal(cuda, self.cuda))  # type: ignore[arg-type]
            and all(same_state(generator_state(g), state) for g, state in self.own)
            and (self.python is None or same_python(self.python, python_generators()))
        )

    def moved(self, notes: "list[Surroundings | None]") -> "Surroundings":
        """Appends these surroundings to ``notes`` if they have changed since, else None; returns the present ones."""
        kept = self._kept()
        if kept and not self._drawn():
            # This update may have read what an earlier update of the step changed.
            notes.append(self if self.apart else None)
            return self
        if self.contents is not None:
            self.contents.refuse_advanced()
        notes.append(self)
        self.end = Surroundings(self.device, self.members, self.given)
        # Draws do not count: an update that draws has a note of its own.
        self.end.apart = self.apart or not kept
        return self.end

    def learn(self, start: "Surroundings") -> None:
        """Records for later passes whether functions drew from the generators of Python and NumPy since ``start``."""
        if self.members is not None and start.python is not None and self.python is not None:
            self.members.draws[self.members.modules[0].training] = not same_python(start.python, self.python)

    def read(self) -> "Read":
        """The part that is needed to tell whether a tensor was written to since."""
        return Read(self.names, self.tensors, self.versions, self.contents)

    def set_generators(self) -> None:
        """Sets all generators to these states."""
        torch.set_rng_state(self.generator)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
        for g, state in self.own:
            set_generator(g, state)
        if self.python is not None:
            set_python_generators(self.python)

    def restore(self) -> None:
        """Restores generators, buffers and attributes."""
        self.set_generators()
        for slot, value in zip(self.buffers, self.values, strict=True):
            if slot.value.shape == value.shape:
                slot.value.data.copy_(value)  # in place, and hidden from autograd, which may have saved the buffer
            else:
                slot.value.data = value.clone()  # an observer has changed its shape
        if self.names is not None:
            self.names.put()
        if self.contents is not None:
            self.contents.put()

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, functions draw and read what they did at that moment; afterwards no side effect remains.

        Raises:
            RuntimeError: what they read is gone, or they drew other numbers than the first time.
        """
        # Buffers may have been written to since, because the function will read their copies.
        copied = {id(slot.value) for slot in self.buffers}
        for x, version in zip(self.tensors, self.versions, strict=True):
            if _version(x) != version and id(x) not in copied:
                raise RuntimeError(
                    f"Stack: {name_of(self.names, x)} was written to in place by a residual function that reads it, "
                    "so that the step cannot be run again.\n  Make it a buffer: self.register_buffer(...)."
                )
        # The caller of ``backward`` may draw afterwards, so the replay must not advance its generators.
        before = Surroundings(self.device, None)
        before.own = [(g, generator_state(g)) for g, _ in self.own]
        before.python = None if self.python is None else python_generators()
        self.set_generators()
        try:
            with ExitStack() as stack:
                if self.names is not None:
                    stack.enter_context(self.names.restored())
                if self.contents is not None:
                    stack.enter_context(self.contents.restored())
                # Copies of the copies, since a second replay must read the same values.
                stack.enter_context(swapped(self.buffers, [v.clone() for v in self.values]))
                yield
            end = Surroundings(self.device, None)
        finally:
            before.set_generators()
        # Only if the replay drew at all and ended elsewhere than the first run: not drawing is not an error.
        if self.end is not None and self.drew(end) and self.end.drew(end):
            raise RuntimeError(
                "Stack: a residual function drew other random numbers when it was run again: another thread drew from "
                "torch's generator in the forward pass.\n  Let it draw from a generator of its own."
            )


@contextmanager
def nothing_changed(modules: Iterable[nn.Module], always: bool = False, given: tuple[Any, ...] = ()) -> Iterator[None]:
    """Restores buffers, attributes and random number generators if the body raises, or always.

    Args:
        modules: the modules that hold them.
        always: also restore them if the body does not raise.
        given: the arguments of the modules; the contents of containers in it are restored, too.
    """
    modules = [*modules]
    members = Members(modules)
    buffers = [*members.buffers(), *members.statistics()]
    saved = [slot.value.clone() for slot in buffers]
    held = [slot.value for slot in (*buffers, *members.parameters())]
    # The devices of parameters too, since a module without buffers may also draw on a device.
    # All of them, since a model in parts may draw on several; ``Surroundings`` covers only one.
    devices = sorted({x.device.index for x in held if x.device.type == "cuda"})
    before = Surroundings(torch.device("cpu"), members, given)
    written = _Written(
        [*before.tensors, *(slot.value for slot in members.parameters())], {id(s.value) for s in buffers}
    )
    states = [torch.cuda.get_rng_state(d) for d in devices]
    undo = True
    try:
        yield
        undo = always
    finally:
        if undo:
            with torch.no_grad():
                for slot, value in zip(buffers, saved, strict=True):
                    if slot.value.shape == value.shape:
                        slot.value.data.copy_(value)
                    slot.holder[slot.name] = slot.value
                before.restore()
                written.restore()
                # Layers that the body has created stay; their running statistics are reset.
                for m in {*Members(modules).norms} - {*members.norms}:
                    m.reset_running_stats()
            for d, state in zip(devices, states, strict=True):
                torch.cuda.set_rng_state(state, d)


class _Written:
    """A snapshot of tensors that are not buffers, to restore those that a function writes to in place.

    Args:
        tensors: attributes and parameters.
        others: ids of those that are restored elsewhere.
    """

    LARGEST = 2**18  # elements of a tensor that is copied: running quantities are small, weights must not be doubled

    def __init__(self, tensors: Iterable[Tensor], others: set[int]):
        found = {id(x): x for x in tensors if id(x) not in others and not is_lazy(x) and not x.is_inference()}
        self.versions = [(x, x._version) for x in found.values()]
        self.copies = {
            id(x): x.detach().clone() for x in found.values() if x.numel() <= self.LARGEST and not x.requires_grad
        }

    def restore(self) -> None:
        """Restores the tensors.

        Raises:
            SchemeError: a tensor was written to that was too large to be copied, or is a trained parameter.
        """
        lost = None
        for x, version in self.versions:
            if x._version == version:
                continue
            if id(x) in self.copies and x.shape == self.copies[id(x)].shape:
                x.data.copy_(self.copies[id(x)])
            else:
                lost = x
        if lost is not None:
            raise SchemeError(
                f"Stack: a residual function writes in place to a tensor of shape {tuple(lost.shape)} that is no "
                "buffer, and measuring the stack has done so once.\n"
                "  Make it a buffer, self.register_buffer(...), and build the network again."
            )


def initialise(module: nn.Module, run: Callable[[], Any]) -> None:
    """Gives lazy parameters their shapes by one run without gradients; statistics and generators stay as they are."""
    lazy = [m for m in module.modules() if any(is_lazy(p) for p in (*m._parameters.values(), *m._buffers.values()))]  # type: ignore
    if not lazy:
        return
    with torch.no_grad(), nothing_changed([module], always=True):
        run()
    for m in lazy:
        # The run was undone for existing buffers only; a lazy BatchNorm has created its own in it, and updated them.
        if hasattr(m, "reset_running_stats"):
            m.reset_running_stats()  # type: ignore


def _version(value: Tensor | None) -> int:
    return -1 if value is None or value.is_inference() else value._version
