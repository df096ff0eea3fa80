"""Helpers for schemes composed of schemes: checks of parts, their shares of functions, shortcuts of several parts.

Where a step evaluates its residual functions several times over (reversible), ``nodes`` and the functions bound to
their times are ordered use by use: all functions of the first use, then all of the second. A part of a composition
takes its own share of each use.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import SchemeError
from .scheme import Function, Scheme, check_attributes


def check_part(name: str, scheme: object) -> Scheme:
    """Returns the part itself; raises a SchemeError that names the wrapper where the part is not a scheme."""
    if not isinstance(scheme, Scheme):
        raise SchemeError(f"{name}: {scheme!r} is no scheme; write a name such as rk4.")
    return check_attributes(scheme)


def as_argument(generator: torch.Generator | None) -> tuple[torch.Generator, ...]:
    """A generator as a last argument, if there is one: user-defined schemes need not accept it."""
    return () if generator is None else (generator,)


def uses_of(scheme: Scheme) -> int:
    """How often a step evaluates its residual functions."""
    return len(scheme.nodes or ()) // scheme.stages


def share_of(items: Sequence[Any], stages: int, start: int, part: int, uses: int) -> tuple[Any, ...]:
    """The items of ``part`` functions from ``start`` on, out of items ordered use by use, ``stages`` in each.

    Items given only once, as functions without times are, serve every use.
    """
    # Functions come once, or once per use where their times are filled in; only the number of items tells which.
    given = len(items) // stages
    if given == 1:
        return tuple(items[start : start + part])
    first = (u * stages + start for u in range(uses))
    return tuple(x for i in first for x in items[i : i + part])


class Once:
    """A shortcut evaluated once a step, however many inner schemes call it (its BatchNorm must update only once)."""

    __slots__ = ("g", "seen", "value")

    def __init__(self, g: Function):
        self.g, self.seen, self.value = g, None, None

    def __call__(self, x: Tensor) -> Tensor:
        # By identity: inner schemes pass on the same object, and comparing values would cost as much as the shortcut.
        if self.seen is not x:
            self.seen, self.value = x, self.g(x)
        return self.value  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.g, name)  # the inverse and the scale of an invertible one
