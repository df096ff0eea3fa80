"""What the modules of a step hold, and what of it a call read: so that a second run reads the same."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

_EVERY_MODULE = frozenset(vars(nn.Module()))  # attributes that all modules have


class Slot(NamedTuple):
    """A place where a module keeps a value: a dictionary of parameters, buffers or attributes, the name, the value."""

    holder: dict[str, Any]
    name: str
    value: Any


@contextmanager
def swapped(slots: Sequence[Slot], values: Sequence[Any]) -> Iterator[None]:
    """Inside, the modules hold ``values`` in these places; what they held comes back, the very objects."""
    # Through the dictionaries: setattr of a module would register and check, and costs far more.
    before = [s.holder.get(s.name) for s in slots]
    try:
        for slot, value in zip(slots, values, strict=True):
            slot.holder[slot.name] = value
        yield
    finally:
        for slot, value in zip(slots, before, strict=True):
            slot.holder[slot.name] = value


class Members:
    """The modules below some roots, found once: traversal dominates the cost of what is done with them.

    Attributes:
        modules: all of them, each once.
        norms: BatchNorm layers with running statistics.
        leaves_behind: whether their forward pass may leave something behind that could be differentiated.
    """

    def __init__(self, roots: Iterable[nn.Module | None]):
        self.roots = tuple(roots)
        self.modules: list[nn.Module] = []
        self.leaves_behind = True
        # In the order of ``modules()``, which names things in messages; a queue, as recursion is slow and has a limit.
        seen, queue = set(), [m for m in self.roots if m is not None]
        while queue:
            m = queue.pop()
            if id(m) not in seen:
                seen.add(id(m))
                self.modules.append(m)
                queue.extend(reversed([child for child in m._modules.values() if child is not None]))
        self._children = [*self._now()]
        self.norms = [m for m in self.modules if isinstance(m, _BatchNorm) and m.track_running_stats]
        # Statistics of BatchNorm are apart: training reads none of them, so they need no copy, and must move once only.
        self._holders = [m for m in self.modules if m._buffers and m not in self.norms]
        # Modules of a user's own may keep tensors as plain attributes: potentials, auxiliary losses.
        self._own = [m for m in self.modules if not type(m).__module__.startswith("torch.nn.modules")]

    def _now(self) -> Iterator[Any]:
        return chain.from_iterable(m._modules.values() for m in self.modules)

    def fit(self, *roots: nn.Module | None) -> bool:
        """Whether these are the roots, and no module has come, gone or changed its place since."""
        if len(roots) != len(self.roots) or not all(map(is_, roots, self.roots)):
            return False
        # By identity of children: a surgery on modules calls no hook that could be relied upon.
        now = [*self._now()]
        return len(now) == len(self._children) and all(map(is_, now, self._children))

    def parameters(self) -> list[Slot]:
        """All places that hold a parameter now; a tied one has several. Replicas of DataParallel hold plain tensors."""
        own = [Slot(m._parameters, k, p) for m in self.modules for k, p in m._parameters.items() if p is not None]
        for m in self._own:
            own += [Slot(m.__dict__, k, m.__dict__[k]) for k in m.__dict__.get("_former_parameters", ())]
        return own

    def buffers(self) -> list[Slot]:
        """All places that hold a buffer now, but for running statistics, which training does not read."""
        found = (Slot(m._buffers, k, b) for m in self._holders for k, b in m._buffers.items())
        return [slot for slot in found if slot.value is not None and not is_lazy(slot.value)]

    def statistics(self) -> list[Slot]:
        """All places that hold a running statistic now."""
        found = (Slot(m._buffers, k, b) for m in self.norms for k, b in m._buffers.items())
        return [slot for slot in found if slot.value is not None and not is_lazy(slot.value)]

    def attributes(self) -> list[Slot]:
        """All places of the user's own modules that hold a tensor now, or might later."""
        return [
            Slot(m.__dict__, k, v)
            for m in self._own
            for k, v in m.__dict__.items()
            if (v is None or isinstance(v, Tensor))
            and k not in _EVERY_MODULE
            and k not in m.__dict__.get("_former_parameters", ())
        ]


class Flags:
    """Which modules were in training, which parameters wanted a gradient, and the versions of all that was read."""

    __slots__ = ("modules", "read", "tensors", "training", "versions", "wanted")

    def __init__(self, modules: Sequence[nn.Module], parameters: Sequence[Slot], given: tuple[Any, ...]):
        self.modules, self.training = modules, [m.training for m in modules]
        self.read = parameters
        # Inference tensors have no version; nothing can be differentiated through them either.
        self.tensors = [slot.value for slot in parameters if not slot.value.is_inference()]
        self.wanted = [p.requires_grad for p in self.tensors]
        if any(x is not None for x in given):
            leaves = pytree.tree_leaves(given)
            self.tensors += [x for x in leaves if isinstance(x, Tensor) and not x.is_inference()]
        # Versions, not copies: torch counts writes anyway, and parameters are what memory is short of.
        self.versions = [x._version for x in self.tensors]

    def check(self, where: str) -> None:
        """Raises where a tensor is no longer what the call read.

        Raises:
            RuntimeError: a parameter or a tensor of the context was written to since.
        """
        # The usual case in one comparison; which tensor it is, is looked for only when one was written to.
        if self.versions == [x._version for x in self.tensors]:
            return
        for tensor, version in zip(self.tensors, self.versions, strict=True):
            if tensor._version != version:
                names = [f"parameter {s.name}" for s in self.read if s.value is tensor]
                raise RuntimeError(
                    f"Stack: {(names or ['the context or the time'])[0]} of {where}, {tuple(tensor.shape)}, was "
                    "changed in place between the forward and the backward pass, which runs the step again.\n"
                    "  Change it, or step the optimiser, after the last backward pass."
                )

    def changed(self) -> bool:
        """Whether a module or a parameter has another flag now than at the call."""
        if self.training != [m.training for m in self.modules]:
            return True
        return any(p.requires_grad != was for p, was in zip(self.tensors, self.wanted, strict=False))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the modules train or not, and their parameters want a gradient or not, as at the call."""
        modes = [m for m, was in zip(self.modules, self.training, strict=True) if m.training != was]
        parameters = zip(self.tensors, self.wanted, strict=False)
        # A tied parameter is listed once for each of its places.
        grads = {id(p): p for p, was in parameters if p.requires_grad != was and p.is_leaf}.values()
        for m in modes:
            m.training = not m.training
        for p in grads:
            p.requires_grad_(not p.requires_grad)
        try:
            yield
        finally:
            for m in modes:
                m.training = not m.training
            for p in grads:
                p.requires_grad_(not p.requires_grad)
