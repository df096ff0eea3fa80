"""A container of a model's blocks that runs them as a stack: the same module, children and state-dict keys."""

import functools
import threading
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from schemes import registry
from schemes.bdia import Bdia
from schemes.errors import SchemeError
from schemes.scheme import Scheme

from .. import build
from ..backprop.modes import Mode, Offload, Store
from ..backprop.surroundings import nothing_changed
from ..stack import Stack, StackHolder
from ..tracing import is_traced
from .arguments import (
    Arguments,
    caches,
    changed,
    common,
    contents,
    leave_empty,
    was_left_empty,
    without_caches,
)
from .blocks import BlockFunction, Form
from .collected import collecting
from .passes import Call, Closed, Run, View


class RestackWarning(UserWarning):
    """Warns that a restacked model behaves differently from the original model."""


class Restacking:
    """How the blocks of one container are run: the options of their stack, and the stack.

    It is not a module and is not registered with the container, so that no block is counted twice.

    Args:
        path: path of the container in its model.
        container: the container.
        scheme: as in Stack.
        backprop: as in Stack.
        step: as in Stack.
        seed: as in Stack.
        outside: how many of the first blocks stay outside the stack; None leaves that to the first call where the first
            block is built differently from the second.

    Attributes:
        stack: the stack.
        blocks: the container's blocks, those outside first.
        outside: how many of them are outside; None until it is known.
    """

    def __init__(
        self,
        path: str,
        container: nn.Module,
        scheme: str | Scheme,
        backprop: str | Mode,
        step: float | str,
        seed: int | None,
        outside: int | None,
    ):
        if outside is not None and (isinstance(outside, bool) or not isinstance(outside, int) or outside < 0):
            raise SchemeError(
                f"restack: outside is {outside!r}, want how many of the first blocks stay outside the stack.\n"
                "  Give a whole number from 0, or None, which finds it out."
            )
        self.path, self.asked = path, outside
        self.options: dict[str, Any] = {"scheme": scheme, "backprop": backprop, "step": step, "seed": seed}
        self.form = Form()
        self.reached: set[int] = set()  # threads in which the stack has run since the model's pass began
        self.warned = False
        self._take(container)

    def _take(self, container: nn.Module) -> None:
        """Builds the stack from the container's current blocks."""
        self.names, self.blocks = list(container._modules), blocks_of(container)
        self.outside = self.asked
        if self.outside is None and (len(self.blocks) < 2 or _made(self.blocks[0]) == _made(self.blocks[1])):
            self.outside = 0
        if self.outside is not None:
            self._build(self.outside)
            return
        try:  # the first call decides; a first block that is built differently usually changes the shape
            self._build(1)
        except SchemeError:
            self._build(0)

    def _build(self, first: int) -> None:
        inside = self.blocks[first:]
        if not inside:
            raise SchemeError(f"restack: {self.path!r} holds {len(self.blocks)} blocks, {first} of them outside.")
        self.functions = [BlockFunction(block, place, self.form) for place, block in enumerate(inside)]
        before: Stack | None = getattr(self, "stack", None)
        # What was set on the stack since outlives it.
        options = self.options if before is None else {**self.options, "backprop": before.backprop}
        try:
            self.stack = Stack(self.functions, **options)
        except SchemeError as error:
            raise SchemeError(f"restack, {self.path!r}: {error}") from None
        if before is not None:
            self.stack.into = before.into
            if before.steps[0].scheduled is not None:
                self.stack.set_step(float(before.steps[0].h))
        if self.stack.rule.learned:
            raise SchemeError("restack: step='learned' would add parameters to the model's; want a number or a decay.")
        # Only the modules that the stack has added: the model sets the training mode of its blocks.
        below = {id(m) for block in inside for m in block.modules()}
        self.own = [m for m in self.stack.modules() if id(m) not in below]
        self.first = first

    @property
    def faithful(self) -> bool:
        """Whether the model's outputs in evaluation are the same as before restacking."""
        euler = registry.get("euler")
        steps = self.stack.steps
        return all((s.scheme == euler or isinstance(s.scheme, Bdia)) and s.h == 1 for s in steps)

    def fit(self, container: nn.Module) -> None:
        """Brings the stack up to date with the container: its blocks and its training mode."""
        if self.names != list(container._modules):
            self._take(container)
        self.blocks = blocks_of(container)
        for function, block in zip(self.functions, self.blocks[self.first :], strict=True):
            if function._modules["block"] is not block:
                function.block = block  # type: ignore[assignment]
                self.stack._revision.stale = True  # a new block needs the checks of a first call
        # Not ``stack.train()``, which would reach the blocks: some may be frozen in evaluation mode.
        for m in self.own:
            if m.training is not container.training:
                m.training = container.training

    def decide(self, block: nn.Module, x: Any, given: Arguments) -> int:
        """Finds by a trial call how many blocks stay outside: one if the first changes the shape, else none."""
        if is_traced(x) or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise SchemeError(
                f"restack: whether the first block of {self.path!r} changes the shape shows at a first call, which "
                "comes before a trace.\n  Call the model once, or say it: restack(..., outside=1)."
            )
        # The trial must have no side effects, such as updated statistics or an advanced random state.
        with torch.no_grad(), nothing_changed([block], always=True):
            y = self.form.take(block, given.call(block, x))
        self.outside = int(y.shape != x.shape)
        if self.outside != self.first:
            training = self.stack.training
            self._build(self.outside)
            for m in self.own:
                m.training = training
        return self.outside

    def finish(self, run: Run, x: Any, given: list[Arguments]) -> Any:
        """Runs the stack on a hidden state, with its blocks' arguments, and returns what the last block would."""
        given = self._without_caches(given)
        context = common(given)
        if is_traced(x):
            y = self._record(x, context)
        else:
            # A block that runs again would write to its argument a second time.
            watched = contents(context) if context is not None and self._runs_again() else None
            y = self._output(x, context)
            if watched is not None and changed(watched, contents(context)):
                raise SchemeError(
                    f"restack: a block of {self.path!r} writes to an argument that the model hands it, and "
                    f"backprop='{self.stack.backprop}' runs blocks again.\n  Use backprop='store', or leave that "
                    "argument away."
                )
        if not torch.compiler.is_compiling():
            self.reached.add(threading.get_ident())
        return run.give(y, self.form)

    def _output(self, x: Any, context: Any) -> Any:
        """Returns the output of the stack; transformers collects the hidden states after its steps."""
        with collecting(self.path, self.blocks[self.first :]) as collection:
            if collection is None:
                return self.stack(x, context=context)
            states = self.stack.trajectory(x, context=context)
        # After the context, within which the hooks' list discards what they append.
        collection.take(x, states, str(self.stack.scheme))
        return states[-1]

    def _record(self, x: Any, context: Any) -> Any:
        """Returns the output by plain operations on the registered blocks, which a trace can follow."""
        stack = self.stack
        build.check_traced("restack", stack.scheme, stack.backprop.keeps_all, stack.training)
        state, functions = None, iter(self.functions)
        for step in stack.steps:
            # Not the functions themselves: a trace refuses modules that are not registered.
            fs = [partial(next(functions).forward, context=context) for _ in range(step.scheme.stages)]
            state = stack.scheme.init(fs, x, step.h) if state is None else state
            state = step.scheme._step(fs, state, step.h)
        return stack.scheme.readout(state)  # type: ignore[arg-type]

    def _runs_again(self) -> bool:
        """Whether the backward pass of this pass runs blocks again."""
        return torch.is_grad_enabled() and not isinstance(self.stack.backprop, Store | Offload)

    def _without_caches(self, given: list[Arguments]) -> list[Arguments]:
        """Returns the arguments that blocks may have: a cache that they would extend twice is dropped, or refused."""
        found = caches(given)
        if not found:
            return given
        if any(was_left_empty(cache) for cache in found):
            raise SchemeError(
                f"restack: the cache given to {self.path!r} was kept from its blocks by an earlier pass with "
                "gradients, and holds nothing of it.\n  Generate under torch.no_grad(), with a new cache."
            )
        remedy = self._against_caches()
        if remedy is None:
            return given
        what, do = remedy
        if self._runs_again() and all(int(cache.get_seq_length()) == 0 for cache in found):
            for cache in found:
                leave_empty(cache)
            if not self.warned:
                self.warned = True
                text = f"restack: {what}, so the cache of {self.path!r} is dropped. use_cache=False makes none."
                warnings.warn(text, RestackWarning, stacklevel=2)
            return [without_caches(a) for a in given]
        raise SchemeError(f"restack: {what}, and a cache of {self.path!r} would be extended wrongly.\n  {do}")

    def _against_caches(self) -> tuple[str, str] | None:
        """Returns why blocks must not extend a cache in this pass, and the remedy; None where they may."""
        for step in self.stack.steps:
            calls = step.scheme.evaluations
            if calls is None or calls > step.scheme.stages:
                return f"{step.scheme} evaluates a block more than once a pass", "Give none: use_cache=False."
        if self._runs_again():
            mode = self.stack.backprop
            return f"backprop='{mode}' runs blocks again", "Give none, use_cache=False, or work under torch.no_grad()."
        if self.stack.training and any(step.scheme.training_differs for step in self.stack.steps):
            return f"{self.stack.scheme} draws in training", "Call model.eval()."
        return None


def blocks_of(container: nn.Module) -> list[nn.Module]:
    """Returns the children of a container; a block that it holds twice is listed twice."""
    return [m for m in container._modules.values() if m is not None]


def _made(block: nn.Module) -> tuple[Any, ...]:
    """What distinguishes blocks that keep the shape from one that does not: class, shapes of parameters, strides."""
    shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
    strides = tuple((name, stride) for name, m in block.named_modules() if (stride := getattr(m, "stride", None)))
    return type(block), shapes, strides


class Restacked(StackHolder):
    """The class that a container of blocks takes on: iterating over it runs its stack.

    Its children, keys and length are unchanged, and ``container[3]`` is the block itself. Iteration, also over a slice
    of all blocks, yields ``View``s: they behave as the blocks do, except that their calls, in order, are one pass.
    """

    __slots__ = ()

    _base: type[nn.Module]
    _restacking: Restacking

    @property
    def stack(self) -> Stack:
        """The stack, with the container's current blocks."""
        self._restacking.fit(self)  # type: ignore[arg-type]
        return self._restacking.stack

    def __iter__(self) -> Iterator[Any]:
        # A replica would run the stack of the original, whose blocks are on another device.
        if getattr(self, "_is_replica", False):
            raise SchemeError("restack: DataParallel copies a model for each device; use DistributedDataParallel.")
        restacking = self._restacking
        restacking.fit(self)  # type: ignore[arg-type]
        run = Run(restacking)
        seen = Call if torch.compiler.is_compiling() else View
        return iter([seen(block, place, run) for place, block in enumerate(restacking.blocks)])

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, slice):
            return self._base.__getitem__(self, key)  # type: ignore[attr-defined]
        blocks = blocks_of(self)  # type: ignore[arg-type]
        if range(len(blocks))[key] == range(len(blocks)):
            return self
        # In that case each block is a step of the original model, and some of them may run without the others.
        if self._restacking.faithful:
            return self._base(blocks[key]) if issubclass(self._base, nn.ModuleList) else self._base(*blocks[key])
        closed = Closed(self._restacking.path, str(self._restacking.stack.scheme))
        return [View(block, place, closed) for place, block in enumerate(blocks[key])]

    def _get_name(self) -> str:
        return f"Restacked{self._base.__name__}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is created at run time, and pickle needs one that it can import.
        return _empty, (self._base,), self.__getstate__()


@functools.cache
def restacked(base: type[nn.Module]) -> type[nn.Module]:
    """Returns the class that a container of class ``base`` takes on when it is restacked."""
    # The base comes first: with another layout no object could be assigned this class. So methods that differ from the
    # base's have to be in the class itself.
    own = {name: vars(Restacked)[name] for name in ("stack", "__iter__", "__getitem__", "_get_name", "__reduce_ex__")}
    return type(f"Restacked{base.__name__}", (base, Restacked), {"_base": base, "__module__": __name__, **own})


def _empty(base: type[nn.Module]) -> nn.Module:
    kind = restacked(base)
    return kind.__new__(kind)
