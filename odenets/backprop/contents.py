"""Snapshots of what residual functions can reach and change besides parameters and buffers, to be restored later.

It comprises lists, dictionaries and plain objects among a module's attributes, what a closure has captured, arrays, and
random number generators. What a step did to them must not be done twice, and a replay must read what the step read.
"""

import itertools
import operator
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import partial
from operator import is_
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from schemes.errors import SchemeError

_LARGEST = 4096  # containers that are searched, and elements of one that is
_BYTES = 2**22  # of the largest array that is copied
_HOPS = 3  # nesting of plain objects and callables: a reference into a whole program is not followed through it
_EVERY_MODULE = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}
# Objects of these libraries manage their own state, or belong to the engine.
_LIBRARIES = ("torch", "odenets", "schemes", "lightning", "pytorch_lightning", "logging", "threading", "_thread")
# Objects of these libraries among the attributes of modules are configurations.
_CONSTANT = ("transformers", "timm", "torchvision", "peft", "accelerate")
_PLAIN = (str, bytes, int, float, complex, type(None), type, Tensor)


def is_container(value: Any) -> bool:
    """Whether the value is a collection, or a dataclass that may be changed."""
    return isinstance(value, (list, dict, set, deque, tuple, SimpleNamespace)) or (
        is_dataclass(value) and not isinstance(value, type) and hasattr(value, "__dict__")
    )


def is_generator(value: Any) -> bool:
    """Whether the value is a random number generator whose state can be read and set."""
    if isinstance(value, (torch.Generator, random.Random)):
        return True
    numpy = _numpy()
    return numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState))


def generator_state(generator: Any) -> Any:
    """The state of a generator of torch, Python or NumPy."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    # NumPy's older class has methods, the newer one an attribute.
    return generator.get_state(legacy=False) if hasattr(generator, "get_state") else generator.bit_generator.state


def set_generator(generator: Any, state: Any) -> None:
    """Sets a generator to a state that ``generator_state`` returned."""
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


def same_state(a: Any, b: Any) -> bool:
    """Whether two states of a generator are equal."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[k], b[k]) for k in a)
    return bool((a == b).all()) if hasattr(a, "all") else bool(a == b)


def holds(value: Any, attribute: bool = False) -> bool:
    """Whether a function that has access to a value may read or change other objects through it.

    Args:
        value: a context, or something in it.
        attribute: whether a module holds the value as an attribute.
    """
    if isinstance(value, _PLAIN) or is_generator(value):
        return False
    if is_container(value) or isinstance(value, (bytearray, partial, itertools.count)) or _is_array(value):
        return True
    if isinstance(value, FunctionType):
        return bool(_captured(value))
    if isinstance(value, MethodType):
        return holds(value.__self__, attribute)
    if isinstance(value, nn.Module):
        return not type(value).__module__.startswith(("odenets.stack", "odenets.step"))
    root = type(value).__module__.partition(".")[0]
    if root in _LIBRARIES or (attribute and root in _CONSTANT):
        return False
    if hasattr(value, "__length_hint__") and isinstance(value, Iterator):
        return True
    # Even an object that holds nothing yet: counters often start as an attribute of the class.
    return hasattr(value, "__dict__") or bool(_attributes(value))


class Contents:
    """A snapshot of containers and of those nested in them, such as key-value caches and lists of past states.

    Args:
        containers: attributes of modules.
        given: the arguments of the functions.
        known: tells whether a module is handled elsewhere.

    Attributes:
        tensors: the tensors in the containers.
        generators: the random number generators in them.
    """

    __slots__ = ("found", "generators", "tensors")

    def __init__(
        self, containers: Iterable[Any], given: Iterable[Any] = (), known: Callable[[nn.Module], bool] | None = None
    ):
        self.found: list[tuple[Any, Any]] = []
        self.tensors: list[Tensor] = []
        self.generators: list[Any] = []
        queue, seen = [*((c, True, 0, False) for c in containers), *((c, False, 0, False) for c in given)], set[int]()
        while queue and len(seen) < _LARGEST:
            c, attribute, hops, apart = queue.pop()
            # By identity: containers may contain themselves, and comparing their contents could raise.
            if id(c) in seen or (isinstance(c, nn.Module) and known is not None and known(c)):
                continue
            seen.add(id(c))
            content = _content(c)
            # Probably a data set among the attributes: searching all of it would cost more than the step.
            if isinstance(content, (dict, list)) and len(content) > _LARGEST:
                continue
            # Captured objects are searched, not restored: lists in which a function counts are mostly for inspection.
            apart = apart or isinstance(c, FunctionType)
            # A tuple cannot change, but the lists and tensors in it can.
            if not (apart or isinstance(c, (tuple, partial, MethodType))):
                self.found.append((c, content))
            hops += not (is_container(c) or isinstance(c, nn.Module))
            for v in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
                if isinstance(v, Tensor):
                    self.tensors.append(v)
                elif is_generator(v):
                    self.generators.append(v)
                elif hops <= _HOPS and holds(v, attribute):
                    queue.append((v, attribute, hops, apart))

    def same(self) -> bool:
        """Whether the containers still hold the same objects."""
        for c, content in self.found:
            now = _content(c)
            if not isinstance(content, (dict, list)):
                if not same_state(now, content):
                    return False
                continue
            if len(now) != len(content):
                return False
            # The keys too, in order: a later iteration over the dictionary must see the same sequence.
            if isinstance(content, dict) and [*now] != [*content]:
                return False
            values = (now.values(), content.values()) if isinstance(content, dict) else (now, content)
            if not all(map(is_, *values)):
                return False
        return True

    def refuse_advanced(self, where: str = "a residual function") -> None:
        """Refuses iterators that have advanced since the snapshot, since they cannot be set back.

        Raises:
            SchemeError: with the type of the iterator.
        """
        for c, content in self.found:
            if isinstance(c, Iterator) and _content(c) != content:
                raise SchemeError(
                    f"Stack: {where} advances a {type(c).__name__} that it holds, which cannot be set back to run "
                    "the step again.\n  Count in a number, self.n += 1, or use backprop='store'."
                )

    def put(self) -> None:
        """Restores the contents of the containers."""
        for c, content in self.found:
            _refill(c, content)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the containers hold the contents of the snapshot; afterwards those from before."""
        before = [(c, _content(c)) for c, _ in self.found]
        self.put()
        try:
            yield
        finally:
            for c, now in before:
                _refill(c, now)


def _numpy() -> Any:
    # Unless NumPy is imported already, there is no array; importing it here would take longer than the step.
    return sys.modules.get("numpy")


def _is_array(value: Any) -> bool:
    numpy = _numpy()
    return numpy is not None and isinstance(value, numpy.ndarray) and value.nbytes <= _BYTES


def _attributes(x: Any) -> dict[str, Any]:
    """The attributes of a plain object, from its dictionary or its slots."""
    if hasattr(x, "__dict__"):
        return dict(vars(x))
    names = [n for kind in type(x).__mro__ for n in _slots_of(kind)]
    return {n: getattr(x, n) for n in names if hasattr(x, n)}


def _slots_of(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _content(c: Any) -> Any:
    if isinstance(c, dict):
        return dict(c)
    if isinstance(c, (list, set, deque, tuple)):
        return list(c)
    if isinstance(c, bytearray):
        return bytes(c)
    if isinstance(c, FunctionType):
        return _captured(c)
    if isinstance(c, partial):
        return [c.func, c.args, c.keywords]
    if isinstance(c, MethodType):
        return [c.__self__]
    if isinstance(c, nn.Module):
        return {k: v for k, v in vars(c).items() if k not in _EVERY_MODULE}
    if isinstance(c, itertools.count):
        # Only the repr of a counter tells where it is.
        return repr(c)
    if isinstance(c, Iterator):
        # The remaining length tells whether the iterator has moved, and can be read without advancing it.
        return operator.length_hint(c, -1)
    if _is_array(c):
        return c.copy()
    return _attributes(c)


def cells_of(function: FunctionType) -> Iterator[Any]:
    """The contents of the cells of a closure."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a name that is not bound yet
            continue


def _captured(function: FunctionType) -> dict[Any, Any]:
    """The variables that a function captures: the cells of its closure, and those globals that could change."""
    if (function.__module__ or "").partition(".")[0] in (*_LIBRARIES, *_CONSTANT):
        return {}
    found: dict[Any, Any] = dict(enumerate(cells_of(function)))
    around = function.__globals__
    for name in function.__code__.co_names:
        value = around.get(name)
        # Most globals are modules, classes and functions, which no step changes.
        if isinstance(value, (Tensor, nn.Module)) or is_container(value) or is_generator(value):
            found[name] = value
    return found


def _refill(c: Any, content: Any) -> None:
    if isinstance(c, (list, bytearray)):
        c[:] = content
    elif isinstance(c, Iterator):
        return  # refused as soon as it has advanced, see ``refuse_advanced``
    elif isinstance(c, nn.Module):
        attributes = vars(c)
        for k in [k for k in attributes if k not in _EVERY_MODULE and k not in content]:
            del attributes[k]
        attributes.update(content)
    elif _is_array(c):
        if c.flags.writeable:
            c[...] = content
    elif not isinstance(c, (dict, set, deque)) and not hasattr(c, "__dict__"):  # a class with slots
        for name, value in content.items():
            # The only way that works for a frozen dataclass.
            object.__setattr__(c, name, value)
    else:
        _refill_collection(c if isinstance(c, (dict, set, deque)) else vars(c), content)


def _refill_collection(target: Any, content: Any) -> None:
    # Refilled and not replaced, since other objects may hold the same collection.
    target.clear()
    if isinstance(target, dict):
        for k, v in content.items():  # outputs of transformers refuse update()
            target[k] = v
    else:
        target.extend(content) if isinstance(target, deque) else target.update(content)
