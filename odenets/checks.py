"""Checks that a Stack runs once, at its first call or on an example: shapes, writes to arguments, known blocks."""

import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from schemes.coupling import Coupling, rotated
from schemes.errors import SchemeError
from schemes.scheme import Function, State, Takes

from .step import Functions, Step

# Blocks of well-known libraries that add their input themselves.
OWN_SKIP = {
    "torch.nn": {"TransformerEncoderLayer", "TransformerDecoderLayer"},
    "torchvision.models": {"BasicBlock", "Bottleneck", "InvertedResidual", "CNBlock", "EncoderBlock", "MBConv"},
    "timm.models": {"BasicBlock", "Bottleneck", "ConvNeXtBlock", "Block", "InvertedResidual", "MBConvBlock"},
    "transformers.models": {"BertLayer", "ViTLayer", "GPT2Block", "LlamaDecoderLayer"},
}

_WRITES = "{}: writes to its argument; use out-of-place operations (inplace=False)."


def warn_of_own_skip(f: object) -> None:
    """Warns if f is a block of a well-known library with a skip connection of its own."""
    for module, names in OWN_SKIP.items():
        if type(f).__module__.startswith(module) and type(f).__name__ in names:
            warnings.warn(
                f"Stack: {type(f).__name__} adds its input itself, so the stack adds it twice; "
                "wrap it: odenets.as_residual(block).",
                stacklevel=4,
            )


def check_given(takes: Takes, t: Any, context: Any) -> None:
    """Refuses a time or a context that may not reach any residual function.

    Raises:
        SchemeError: no residual function reads it, or a signature does not tell; or a time that is None.
    """
    if t is None and takes.time:
        raise SchemeError(
            "Stack: the time at the start is None, and a residual function reads the time.\n"
            "  Give a number or a tensor, or leave t= out, which starts at 0."
        )
    if context is not None and not takes.context and not takes.opaque:
        raise SchemeError(
            "Stack: a context is given, and no residual function has a parameter named context to read it.\n"
            "  Name a parameter context, as in forward(self, x, context), or leave the context out."
        )
    if takes.opaque and (context is not None or isinstance(t, Tensor) or t != 0):
        raise SchemeError(
            "Stack: a time or a context is given, and a residual function of signature (**kwargs) does not tell "
            "whether it takes them.\n  Name them in its signature: forward(self, x, t, context)."
        )


class Watched:
    """A residual function under the checks of a first call."""

    def __init__(
        self, function: Function, step: Step, i: int, shapes: list[torch.Size], due: dict[int, torch.Size] | None
    ):
        self.function, self.step, self.i, self.shapes, self.due = function, step, i, shapes, due

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        tensors = [a for a in args if isinstance(a, Tensor)]
        counted = [a for a in tensors if not a.is_inference()]  # inference mode keeps no version counters
        # torch counts a write even if it leaves the values unchanged, which a comparison of values would miss.
        versions = [a._version for a in counted]
        where = f"{self.step.scheme}, steps.{self.step.index}.fs.{self.i}"
        try:
            out = self.function(*args, **kwargs)
        except Exception as error:
            # torch itself refuses an in-place write to a leaf, so that the version counter of such an argument stays.
            if isinstance(error, RuntimeError) and "leaf Variable that requires grad" in str(error):
                self._check_leaves(where, args, kwargs)
            # A note instead of an error of ours: the user's exception keeps its type and its traceback.
            error.add_note(f"{where}: residual function was given {[tuple(a.shape) for a in tensors]}")
            raise
        if not isinstance(out, Tensor):
            raise SchemeError(f"{where}: returned a {type(out).__name__}, want a tensor.")
        if any(a._version != v for a, v in zip(counted, versions, strict=True)):
            raise SchemeError(_WRITES.format(where))
        want = self.step.scheme.shape_of(self.i, tuple(self.shapes)) if self.shapes else None
        if want is not None and out.shape != want:
            if self.due is None or self.i in self.due:
                raise SchemeError(_misfit(where, out.shape, want))
            self.due[self.i] = out.shape  # a coupling's shortcut runs after the function, and may produce this shape
        return out

    def _check_leaves(self, where: str, args: Any, kwargs: Any) -> None:
        """Raises a SchemeError if the function writes to an argument, and not to a leaf of its own."""
        # Clones are neither leaves nor views of one, so that torch permits the write, and counts it. Side effects of
        # this second call are undone together with those of the first.
        copies = [a.clone() if isinstance(a, Tensor) and a.requires_grad else a for a in args]
        with suppress(Exception):
            self.function(*copies, **kwargs)
        if any(a is not b and a._version for a, b in zip(copies, args, strict=True)):
            raise SchemeError(_WRITES.format(where)) from None


class WatchedShortcut:
    """A shortcut under the checks: it must give its stream the shape that the residual function returned."""

    def __init__(self, shortcut: Function, step: Step, i: int, shapes: list[torch.Size], due: dict[int, torch.Size]):
        self.shortcut, self.step, self.i, self.shapes, self.due = shortcut, step, i, shapes, due

    def __call__(self, x: Tensor) -> Tensor:
        y = self.shortcut(x)
        if self.i in self.due and self.due[self.i] != y.shape:
            where = f"{self.step.scheme}, steps.{self.step.index}.fs.{self.i}"
            raise SchemeError(_misfit(where, self.due[self.i], y.shape))
        # A column's shortcuts are counted from its first level, which is stream 1; they keep shapes.
        if y.shape != x.shape:
            self.shapes[self.i] = y.shape
        return y

    def __getattr__(self, name: str) -> Any:
        return getattr(self.shortcut, name)

    def inverse(self, y: Tensor) -> Tensor:
        """Applies the shortcut's inverse, and records shapes as in the forward pass."""
        x = self.shortcut.inverse(y)  # type: ignore[attr-defined]
        if self.shapes and y.shape != x.shape:
            self.shapes[self.i] = x.shape
        return x


def _misfit(where: str, given: torch.Size, want: torch.Size) -> str:
    return (
        f"{where}: returned {tuple(given)}, the stream that it updates is {tuple(want)}.\n"
        "  It keeps that shape; a stride or a new width also needs a shortcut: Stack(..., shortcut=projection)."
    )


def watch(step: Step, state: State, fs: Sequence[Function], gs: Sequence[Function]) -> Functions:
    """Returns the residual functions and shortcuts of a step, wrapped in the checks."""
    shapes = [x.shape for x in state]
    due: dict[int, torch.Size] = {}
    several = len(state) > 1 and len(gs) == len(state)
    watched = [Watched(f, step, i, shapes, due if several else None) for i, f in enumerate(fs)]
    return watched, [WatchedShortcut(g, step, i, shapes, due) for i, g in enumerate(gs)]


def watch_inverse(step: Step, state: State, fs: Sequence[Function], gs: Sequence[Function]) -> Functions:
    """As ``watch``, for a step that is undone from the state after it."""
    if isinstance(step.scheme, Coupling):
        state = rotated(state, -step.scheme.rotate)
    shapes = [x.shape for x in state]
    # A composition rotates in its midst, after which streams of several shapes have other places.
    if not isinstance(step.scheme, Coupling) and len({*shapes}) > 1:
        shapes = []
    # What the functions return has the shapes of these streams, since shortcuts come before it in the forward step.
    watched = [Watched(f, step, i, shapes, None) for i, f in enumerate(fs)]
    return watched, [WatchedShortcut(g, step, i, shapes, {}) for i, g in enumerate(gs)]
