"""Tensors in the time and the context that a pass is given, in any nesting of containers and plain objects."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


def tensors_in(given: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors in a nesting of containers, dataclasses and plain objects, in their order.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> [x.numel() for x in tensors_in((torch.ones(1), {"a": SimpleNamespace(b=[torch.ones(2)])}, None, 3))]
        [1, 2]
    """
    seen = set() if seen is None else seen  # objects may refer back to themselves
    for leaf in pytree.tree_leaves(given):
        if isinstance(leaf, Tensor):
            yield leaf
        elif id(leaf) not in seen and (content := attributes_of(leaf)) is not None:
            seen.add(id(leaf))
            yield from tensors_in(content, seen)


def with_tensors(given: Any, make: Callable[[Tensor], Tensor], copies: dict[int, Any] | None = None) -> Any:
    """The same nesting with ``make(x)`` in place of each tensor x; objects that hold no tensor are not copied."""
    copies = {} if copies is None else copies

    def replaced(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return make(leaf)
        if id(leaf) in copies:
            return copies[id(leaf)]
        content = attributes_of(leaf)
        if content is None or next(tensors_in(content), None) is None:
            return leaf
        # Noted before its content is replaced, since the content may refer back to it.
        new = copies[id(leaf)] = copy.copy(leaf)
        for name, value in with_tensors(content, make, copies).items():
            if isinstance(new, Mapping):
                new[name] = value  # type: ignore[index]
            else:
                object.__setattr__(new, name, value)  # frozen dataclasses too: the copy is ours
        return new

    return pytree.tree_map(replaced, given)


def attributes_of(x: Any) -> dict[Any, Any] | None:
    """The attributes of an object that is a mere container: not a tensor, module, class or function; else None."""
    if isinstance(x, Mapping):  # of a type that pytree does not know
        return dict(x)
    if is_dataclass(x) and not isinstance(x, type):
        return {f.name: getattr(x, f.name) for f in fields(x)}
    # An object that computes has state of its own, which is handled elsewhere; only mere containers are searched.
    if isinstance(x, (Tensor, nn.Module, type)) or callable(x):
        return None
    return dict(vars(x)) if hasattr(x, "__dict__") else None
