"""Checkpointed steps: torch's checkpoint, run again under what the call read."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from schemes.scheme import State

from ..auxiliary import Sink
from .limits import in_our_words
from .members import Flags, Members, swapped
from .surroundings import Read, Surroundings


class Rerun:
    """The context of a recomputation; entered once for each, and again while one is under way."""

    def __init__(self, modules: Sequence[nn.Module], state: State, given: Any, where: str, sink: Sink | None = None):
        self.members, self.where, self.sink = Members(modules), where, sink
        self.flags = Flags(self.members, given)
        # Statistics too, though a training pass does not read what they are: they must not move twice.
        self.statistics = self.members.statistics()
        self.before: Surroundings | Read = Surroundings(state[0].device, self.members, given)
        self.entered: list[ExitStack] = []

    def over(self) -> None:
        """The call is over: what it left alone need not be kept."""
        notes: list[Surroundings | None] = []
        assert isinstance(self.before, Surroundings)
        self.before.moved(notes)
        if notes[0] is None:
            self.before = self.before.read()

    def __enter__(self) -> None:
        # Before anything is put back: a parameter that was written to cannot be made as it was.
        self.flags.check(self.where)
        with ExitStack() as stack:
            stack.enter_context(self.flags.restored())
            if isinstance(self.before, Surroundings):
                stack.enter_context(self.before.replayed())
            else:
                self.before.check(self.where)
                stack.enter_context(self.before.restored())
            # Written to by the second run, and then dropped with the copies.
            stack.enter_context(swapped(self.statistics, [slot.value.clone() for slot in self.statistics]))
            if self.sink is not None:
                # A function that differentiates within itself is run again while the sink still takes values.
                stack.enter_context(self.sink.closed())
            # A stack of contexts, since a recomputation may set off another of the same steps (a graph of gradients).
            self.entered.append(stack.pop_all())

    def __exit__(self, *error: Any) -> None:
        self.entered.pop().__exit__(*error)


@in_our_words
def checkpointed(
    run: Callable[..., State],
    state: State,
    modules: Sequence[nn.Module],
    given: Any,
    where: str,
    sink: Sink | None = None,
) -> State:
    """``run(*state)``, whose inner tensors are dropped, and made again in the backward pass.

    Args:
        run: what is computed; a function of the streams alone.
        state: the streams.
        modules: all modules that ``run`` uses; their buffers, flags and parameters are as at the call the second time.
        given: a tree of tensors that they read besides the streams.
        where: name of the steps, for messages.
        sink: takes the auxiliary values of the first run, and none of a second.
    """
    if torch.compiler.is_compiling():  # which refuses a context made here, and has recomputation rules of its own
        return checkpoint(run, *state, use_reentrant=False)  # type: ignore[return-value]
    # One object instead of a generator: torch enters the context once per backward pass, as often as there are any.
    rerun = Rerun(modules, state, given, where, sink)
    result = checkpoint(run, *state, use_reentrant=False, context_fn=lambda: (nullcontext(), rerun))
    rerun.over()
    return result  # type: ignore[return-value]
