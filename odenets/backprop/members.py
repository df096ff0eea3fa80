"""Records what the modules of a step hold and what a call reads of it, so that a replay reads the same values."""

import dis
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import chain
from operator import is_, itemgetter
from types import CodeType, FunctionType, MethodType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _disable_current_modes

from ..step import FunctionModule
from .contents import cells_of, holds, is_generator
from .given import tensors_in

# Hooks are part of what a module computes; global ones are in tables of torch.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_OPTIONS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
_GLOBAL_HOOKS = [
    v for name in (*_HOOKS, *_HOOK_OPTIONS) if (v := getattr(torch_modules, "_global" + name, None)) is not None
]
# Modules from these packages keep no tensors as plain attributes, so there is no need to search them.
_OURS = ("torch.nn.modules", "odenets.stack", "odenets.step", "odenets.continuous")
_EVERY_MODULE = frozenset(vars(nn.Module()))  # attributes that all modules have
# Values of these types may be exchanged for equal ones, as nothing reaches or changes another object through them.
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)
# Names by which a function finds out whether it runs with a graph, or requires one.
_ASKED = {"is_grad_enabled", "requires_grad", "grad_fn", "register_hook", "retain_grad", "retains_grad"}


class Slot(NamedTuple):
    """A place where a module holds a value: a dictionary of parameters, buffers or attributes, the name, the value."""

    holder: dict[str, Any]
    name: str
    value: Any


@contextmanager
def swapped(slots: Sequence[Slot], values: Sequence[Any]) -> Iterator[None]:
    """Inside, the modules hold ``values`` in these places; afterwards the same objects as before."""
    # Through the dictionaries, since setattr of a module registers and checks, which costs far more.
    before = [s.holder.get(s.name) for s in slots]
    try:
        for slot, value in zip(slots, values, strict=True):
            slot.holder[slot.name] = value
        yield
    finally:
        for slot, value in zip(slots, before, strict=True):
            slot.holder[slot.name] = value


def _is_own(hook: Any) -> bool:
    """Whether a hook is the user's, rather than one with which torch computes weights or gathers their shards."""
    function = getattr(hook, "func", hook)  # behind a partial
    return not (getattr(function, "__module__", None) or type(function).__module__).startswith("torch.")


@contextmanager
def hooks_set_aside(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, a user's hooks do not run, since a measurement is not a pass that they should observe.

    Dispatch modes do not see its operations either, such as that of a counter, or of a selective checkpoint around the
    stack, which would take them for part of what it has to recompute.
    """
    with _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext():
        yield from _hooks_set_aside(modules)


def _hooks_set_aside(modules: Iterable[nn.Module]) -> Iterator[None]:
    own_tables = (m.__dict__[n] for m in modules for n in (*_HOOKS, *_HOOK_OPTIONS))
    tables = [(d, dict(d)) for d in (*own_tables, *_GLOBAL_HOOKS)]
    own = {k for d, hooks in tables for k, hook in hooks.items() if callable(hook) and _is_own(hook)}
    if not own:
        yield
        return
    try:
        for d, _ in tables:
            for k in own & d.keys():
                del d[k]
        yield
    finally:
        for d, hooks in tables:
            _put(d, hooks)


class Namespace:
    """A snapshot of some dictionaries of modules: attributes, buffers, parameters, children.

    Args:
        dicts: the dictionaries.
        beside: further dictionaries, which change only where one of ``dicts`` does.

    Attributes:
        tensors: the tensors among the values.
        containers: lists, objects, closures and the like among a user's attributes, which may be changed in place.
        generators: random number generators among them.
    """

    __slots__ = (
        *("_dicts", "_empty", "_full", "_pick", "_picked", "_values"),
        *("containers", "contents", "generators", "tensors"),
    )

    def __init__(self, dicts: Sequence[dict[str, Any]], beside: Sequence[dict[str, Any]] = ()):
        self._dicts, self.contents = [*dicts, *beside], [dict(d) for d in (*dicts, *beside)]
        # Most dictionaries are empty, above all those of hooks, and their lengths tell whether they still are.
        self._full, self._empty = [d for d in dicts if d], [d for d in dicts if not d]
        self._values = self._now()
        # Those that may equal another object; most values are modules, functions and what every module has.
        keys = chain.from_iterable(self._full)
        places = [
            i
            for i, (k, v) in enumerate(zip(keys, self._values, strict=True))
            if k not in _EVERY_MODULE and type(v).__eq__ is not object.__eq__
        ]
        self._pick = itemgetter(*places, *places[:1]) if places else None  # a tuple also for a single place
        self._picked = () if self._pick is None else self._pick(self._values)
        self.tensors = [v for v in self._values if isinstance(v, Tensor) and not is_lazy(v)]
        own = [v for d in self.contents for k, v in d.items() if k not in _EVERY_MODULE]
        self.containers = [v for v in own if holds(v, True)]
        self.generators = [v for v in own if is_generator(v)]

    def _now(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, self._full))]

    def same(self) -> bool:
        """Whether the dictionaries still hold the same objects; for numbers and strings equal values suffice."""
        if any(map(len, self._empty)):
            return False
        try:
            now = self._now()
            if now != self._values:  # list equality compares by identity first
                return False
        except (RuntimeError, ValueError, TypeError):  # arrays and tensors do not compare to a single truth value
            return False
        # A tensor of one element equals another of the same value, and a number, which are not the same for autograd.
        return self._pick is None or (
            all(map(is_, picked := self._pick(now), self._picked)) or all(map(_alike, picked, self._picked))
        )

    def put(self) -> None:
        """Restores the contents of the dictionaries."""
        for d, content in zip(self._dicts, self.contents, strict=True):
            _put(d, content)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the dictionaries hold the contents of the snapshot; afterwards those from before."""
        unchanged = self.same()
        before = self.contents if unchanged else [dict(d) for d in self._dicts]
        if not unchanged:
            self.put()
        try:
            yield
        finally:
            # Including changes made inside, such as counts of calls: "reverse" must leave behind what "store" does.
            if not (unchanged and self.same()):
                for d, now in zip(self._dicts, before, strict=True):
                    _put(d, now)


def _alike(a: Any, b: Any) -> bool:
    """Whether two equal values are the same object, or plain values of one type, as are tuples of such."""
    if a is b or type(a) is not type(b):
        return a is b
    return isinstance(a, _PLAIN) or (isinstance(a, tuple) and all(map(_alike, a, b)))


@cache
def asks_for_a_graph(kind: type) -> bool:
    """Whether the forward pass of this class of modules asks whether gradients are on."""
    return _asks(kind.forward, kind)  # type: ignore[attr-defined]


def _asks(function: Any, kind: type | None = None) -> bool:
    """Whether a function, or one that it calls from its class, its module or its closure, asks if gradients are on."""
    seen, queue = set[Any](), [function]
    while queue:
        f = queue.pop()
        f = getattr(f, "func", getattr(f, "__func__", f))  # behind a partial, or a method
        f = f.fget if isinstance(f, property) else f
        if not isinstance(f, FunctionType) or f in seen or (f.__module__ or "").startswith("torch."):
            continue
        seen.add(f)
        names = {*_names(f.__code__)}
        if names & _ASKED:
            return True
        around = f.__globals__
        queue += [around[n] for n in names if isinstance(around.get(n), FunctionType)]
        queue += [v for v in cells_of(f) if isinstance(v, (FunctionType, MethodType))]
        if kind is not None:
            # From all base classes, since super().forward(x) calls one of those.
            queue += [vars(base)[n] for base in kind.__mro__ for n in names & vars(base).keys()]
    return False


def _names(code: CodeType) -> Iterator[str]:
    """The names that a function's code, and the functions defined in it, read; not those that are only assigned to."""
    read = {*code.co_names}
    if read & _ASKED:  # rare, and then inspected closely: p.requires_grad = False does not ask
        read = {i.argval for i in dis.get_instructions(code) if not i.opname.startswith("STORE")} & read
    yield from read
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def _put(d: dict[str, Any], content: dict[str, Any]) -> None:
    if [*d] != [*content]:  # including the order, which is that of parameters()
        d.clear()
        d.update(content)
        return
    for k, v in content.items():
        if d[k] is not v:
            d[k] = v


class Held(Namespace):
    """A snapshot of everything that the modules of a step hold.

    Attributes:
        slots: the parameters, in their places.
        hooked: whether there are forward hooks on what is called inside the step.
    """

    __slots__ = ("_wanted", "_wanting", "hooked", "slots")

    def __init__(
        self, dicts: Sequence[dict[str, Any]], beside: Sequence[dict[str, Any]], slots: list[Slot], hooked: bool
    ):
        super().__init__(dicts, beside)
        self.slots, self.hooked = slots, hooked
        self._wanted: list[bool] | None = None
        self._wanting: tuple[list[Slot], list[Tensor]] = ([], [])

    def wanting(self, wanted: list[bool]) -> tuple[list[Slot], list[Tensor]]:
        """The places of the parameters that need a gradient, and those parameters, each once.

        Args:
            wanted: for each place, whether its parameter needs a gradient.
        """
        if wanted != self._wanted:
            # By place, not by parameter: a leaf has to replace a tied parameter in every place where it is read.
            slots = [slot for slot, need in zip(self.slots, wanted, strict=True) if need]
            self._wanting = slots, [*{id(slot.value): slot.value for slot in slots}.values()]
            self._wanted = wanted
        return self._wanting


class Members:
    """The modules below some roots, found once, since traversal dominates the cost of using them.

    Attributes:
        modules: all of the modules, each once.
        norms: BatchNorm layers with running statistics.
        leaves_behind: whether their forward pass may leave something behind that could be differentiated.
        draws: whether their forward pass draws from the generators of Python or NumPy, by training flag, if known.
        may_capture: whether a function may read tensors besides its parameters, which torch's own modules do not.
        asks: whether a function asks if gradients are on, or registers hooks on tensors, judging by its code.
    """

    def __init__(self, roots: Iterable[nn.Module | None]):
        self.roots = tuple(roots)
        self.modules: list[nn.Module] = []
        self.leaves_behind = True
        self.draws: dict[bool, bool] = {}
        seen, queue = set(), [m for m in self.roots if m is not None]
        while queue:
            m = queue.pop()
            if id(m) not in seen:
                seen.add(id(m))
                self.modules.append(m)
                # Pushed in reverse, so that the order is that of ``nn.Module.modules()``.
                queue.extend(reversed([child for child in m._modules.values() if child is not None]))
        self._children = [*self._now()]
        # A subclass with its own forward may read its statistics in training, so it does not count here.
        self.norms = [
            m
            for m in self.modules
            if isinstance(m, _BatchNorm)
            and m.track_running_stats
            and type(m).forward.__module__ == _BatchNorm.__module__
        ]
        self._holders = [m for m in self.modules if m._buffers and m not in self.norms]
        # User-defined modules may keep tensors as plain attributes: potentials, auxiliary losses.
        self._own = [m for m in self.modules if not type(m).__module__.startswith(_OURS)]
        self._dicts = [d for m in self.modules for d in (m.__dict__, m._parameters, m._buffers, m._modules)]
        self._dicts += [*(m.__dict__[name] for m in self.modules for name in _HOOKS), *_GLOBAL_HOOKS]
        self._beside = [m.__dict__[name] for m in self.modules for name in _HOOK_OPTIONS]
        # Lazy modules are initialised in their first call, which must not be undone.
        own = set(self._own)
        self._moving = [m.__dict__ for m in self._own if not isinstance(m, LazyModuleMixin)]
        # Torch's own modules register nothing while they run: without buffers there is nothing to watch.
        self._moving += [m._buffers for m in self.modules if m not in self.norms and (m._buffers or m in own)]
        # Of plain callables, what they have captured.
        self._moving += [
            m.__dict__ for m in self.modules if isinstance(m, FunctionModule) and holds(m.function, attribute=True)
        ]
        self.may_capture = bool(self._own) or any(isinstance(m, FunctionModule) for m in self.modules)
        self.asks = any(asks_for_a_graph(type(m)) for m in self._own)
        self.asks = self.asks or any(_asks(m.function) for m in self.modules if isinstance(m, FunctionModule))
        self._ids = {id(m) for m in self.modules}
        self._kinds = self._kinds_now()
        self._looks_after: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
        self._everything: Held | None = None
        self._names: Namespace | None = None

    def _now(self) -> Iterator[Any]:
        return chain.from_iterable(m._modules.values() for m in self.modules)

    def _kinds_now(self) -> list[Any]:
        """What determines where the values of modules are found: their classes, which lazy ones change, and buffers."""
        return [(type(m), *m._buffers, getattr(m, "track_running_stats", None)) for m in self.modules]

    def held_by(self, *roots: nn.Module | None) -> Held | None:
        """The present contents; None if these are not the roots, or a module was added, removed or moved."""
        if len(roots) != len(self.roots) or not all(map(is_, roots, self.roots)):
            return None
        if self._everything is not None and self._everything.same():  # the children are part of everything
            return self._everything
        # By identity of the children, since surgery on modules calls no hook that could be relied upon.
        now = [*self._now()]
        if (
            len(now) != len(self._children)
            or not all(map(is_, now, self._children))
            or self._kinds != self._kinds_now()
        ):
            return None
        return self.everything()

    def everything(self) -> Held:
        """Everything that the modules hold now; the same object as long as nothing changes."""
        if self._everything is None or not self._everything.same():
            hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in self.modules if m is not self.roots[-1]]
            hooked = any(d for pair in hooks for d in pair) or any(_GLOBAL_HOOKS)
            self._everything = Held(self._dicts, self._beside, self.parameters(), hooked)
        return self._everything

    def names(self) -> Namespace:
        """What functions may change: attributes of a user's modules, and buffers; the same object until one changes."""
        if self._names is None or not self._names.same():
            self._names = Namespace(self._moving)
            # Forward methods of a user's classes capture variables, too.
            forwards = {f: None for m in self._own if isinstance(f := type(m).forward, FunctionType) and holds(f)}
            self._names.containers += forwards
        return self._names

    def looks_after(self, module: nn.Module) -> bool:
        """Whether a module is one of these, or contains a root: the rest of an enclosing network is not theirs."""
        if id(module) in self._ids:
            return True
        if module not in self._looks_after:
            roots = [r for r in self.roots if r is not None]
            self._looks_after[module] = any(m is r for m in module.modules() for r in roots)
        return self._looks_after[module]

    def forget(self) -> None:
        """Drops the snapshots."""
        self._everything = self._names = None

    def parameters(self) -> list[Slot]:
        """All places that hold a parameter now, several for a tied one; replicas of DataParallel hold plain tensors."""
        own = [Slot(m._parameters, k, p) for m in self.modules for k, p in m._parameters.items() if p is not None]
        # DataParallel puts its copies for a device into plain attributes of the replica.
        for m in self.modules:
            own += [Slot(m.__dict__, k, m.__dict__[k]) for k in m.__dict__.get("_former_parameters", ())]
        return own

    def buffers(self) -> Sequence[Slot]:
        """All places that hold a buffer now, except running statistics, which training does not read."""
        if not self._holders:
            return ()
        found = (Slot(m._buffers, k, b) for m in self._holders for k, b in m._buffers.items())
        return [slot for slot in found if slot.value is not None and not is_lazy(slot.value)]

    def statistics(self) -> list[Slot]:
        """All places that hold a running statistic now."""
        return [slot for _, slot in self.statistics_of()]

    def statistics_of(self) -> list[tuple[nn.Module, Slot]]:
        """All places that hold a running statistic now, with their modules."""
        found = ((m, Slot(m._buffers, k, b)) for m in self.norms for k, b in m._buffers.items())
        return [(m, slot) for m, slot in found if slot.value is not None and not is_lazy(slot.value)]


def remembered(
    known: dict[int, Members],
    first: int,
    roots: Sequence[nn.Module | None],
    make: Callable[[Sequence[nn.Module | None]], Members] = Members,
) -> tuple[Members, Held]:
    """The modules below some roots, from an earlier pass if they are still the same, and what they hold.

    Args:
        known: what earlier passes have found.
        first: the key in ``known``.
        roots: the roots.
        make: finds the modules.
    """
    found = known.get(first)
    held = None if found is None else found.held_by(*roots)
    if found is None or held is None:
        found = known[first] = make(roots)
        held = found.everything()
    return found, held


class Flags:
    """Records what modules held, which parameters needed a gradient, and the versions of all tensors that were read."""

    __slots__ = ("names", "read", "storages", "tensors", "versions", "wanted")

    def __init__(self, members: Members, given: tuple[Any, ...], held: Held):
        self.names = held
        self.read = held.slots
        self.tensors = [slot.value for slot in held.slots if not slot.value.is_inference()]
        self.wanted = [p.requires_grad for p in self.tensors]
        if any(x is not None for x in given):
            self.tensors += [x for x in tensors_in(given) if not x.is_inference()]
        if members.norms:  # in evaluation mode their statistics are read
            self.tensors += [
                slot.value for m, slot in members.statistics_of() if not m.training and not slot.value.is_inference()
            ]
        self.versions = [x._version for x in self.tensors]
        # ``p.data = other`` does not change the version. The storage object, not its address, which FSDP2 changes.
        self.storages = [x.untyped_storage()._cdata for x in self.tensors]

    def check(self, where: str) -> None:
        """Raises where a tensor is no longer what the call read.

        Raises:
            RuntimeError: a parameter, a running statistic, or a tensor of the time or context was written to since.
        """
        # The usual case takes one comparison; the tensor is searched for only if one was written to.
        storages = [x.untyped_storage()._cdata for x in self.tensors]
        if self.versions == [x._version for x in self.tensors] and self.storages == storages:
            return
        for tensor, version, was, now in zip(self.tensors, self.versions, self.storages, storages, strict=True):
            if tensor._version != version or was != now:
                names = [f"parameter {s.name}" for s in self.read if s.value is tensor]
                raise changed((names or ["the context, the time or a running statistic"])[0], where, tensor)

    def changed(self) -> bool:
        """Whether a module holds something else now than at the call, or ``requires_grad`` of a parameter differs."""
        return not self.names.same() or [p.requires_grad for p in self.tensors[: len(self.wanted)]] != self.wanted

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the modules hold what they held at the call, and their parameters need a gradient or not, as then."""
        parameters = zip(self.tensors, self.wanted, strict=False)
        # By identity, since a tied parameter is listed once for each of its places.
        grads = {id(p): p for p, was in parameters if p.requires_grad != was and p.is_leaf}.values()
        for p in grads:
            p.requires_grad_(not p.requires_grad)
        try:
            with self.names.restored():
                yield
        finally:
            for p in grads:
                p.requires_grad_(not p.requires_grad)


def changed(what: str, where: str, tensor: Tensor) -> RuntimeError:
    """The error for a tensor that is no longer what the call read."""
    return RuntimeError(
        f"Stack: {what} of {where}, {tuple(tensor.shape)}, was changed in place between the forward and the backward "
        "pass, which runs the step again.\n"
        "  Change it, or step the optimiser, after the last backward pass."
    )
