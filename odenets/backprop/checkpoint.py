"""Checkpointed steps: torch's checkpoint, run again under what the call read."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from schemes.scheme import State

from .surroundings import Flags, buffer_slots, swapped


class Rerun:
    """The context of a recomputation; entered as often as one is asked for, also within itself."""

    def __init__(self, modules: Sequence[nn.Module], given: Any, where: str):
        inner = list({id(m): m for module in modules for m in module.modules()}.values())
        self.flags, self.where = Flags(inner, given), where
        self.slots = buffer_slots(inner)
        self.values = [slot.tensor.detach().clone() for slot in self.slots]
        self.versions = [slot.tensor._version for slot in self.slots]
        self.entered: list[ExitStack] = []

    def over(self) -> None:
        """The call is over: copies of buffers that it left alone are dropped."""
        for i, (slot, version) in enumerate(zip(self.slots, self.versions, strict=True)):
            # BatchNorm's kernels write without raising the version counter; what they write is not read in training.
            if slot.holder.get(slot.name) is slot.tensor and slot.tensor._version == version:
                self.values[i] = slot.tensor

    def __enter__(self) -> None:
        self.flags.check(self.where)
        with ExitStack() as stack:
            stack.enter_context(self.flags.restored())
            # Copies, as the run writes to its buffers again: statistics must not move twice.
            stack.enter_context(swapped(self.slots, [value.detach().clone() for value in self.values]))
            self.entered.append(stack.pop_all())

    def __exit__(self, *error: Any) -> None:
        self.entered.pop().close()


def checkpointed(
    run: Callable[..., State], state: State, modules: Sequence[nn.Module], given: Any, where: str
) -> State:
    """``run(*state)``, whose inner tensors are dropped, and made again in the backward pass.

    Args:
        run: what is computed; a function of the streams alone.
        state: the streams.
        modules: all modules that ``run`` uses; their buffers, flags and parameters are as at the call the second time.
        given: a tree of tensors that they read besides the streams.
        where: name of the steps, for messages.
    """
    if torch.compiler.is_compiling():  # which refuses a context made here, and has recomputation rules of its own
        return checkpoint(run, *state, use_reentrant=False)  # type: ignore[return-value]
    rerun = Rerun(modules, given, where)
    result = checkpoint(run, *state, use_reentrant=False, context_fn=lambda: (nullcontext(), rerun))
    rerun.over()
    return result  # type: ignore[return-value]
