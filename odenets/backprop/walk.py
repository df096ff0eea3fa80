"""The walk through the steps of a stack: time advances, projections are applied, each state is shown to an observer."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import accumulate, repeat
from typing import Any, NamedTuple

import torch
from torch import nn

from schemes.scheme import State

from ..auxiliary import Sink
from ..solves import Solves
from ..step import Runner, Step, Wrap
from .checkpoint import as_called
from .monitor import Monitor

Observer = Callable[[int, State], None]


class Pass(NamedTuple):
    """One pass through some steps, and what it runs with; a mode of backpropagation decides how it is run.

    Attributes:
        steps: the steps, in order.
        monitor: what the stack knows of its own reconstruction.
        shared: the residual function of all steps, if there is only one.
        post_step: applied to each stream after each step, or None.
        time: time at the start, None if no function reads it.
        context: read by functions with a parameter ``context``.
        sizes: a step size for each step, in place of its own; read when the step begins.
        on_step: called with the number of a step and the state after it.
        runner: evaluates a step in place of the step itself, where its states are kept.
        wrap: wraps the functions of each step.
        calls: counts the evaluations of an adaptive solver.
        solves: takes the result of each adaptive solve.
        sink: takes auxiliary values; None drops them.
        first: number of the first step.
        extras: number of last entries of a state that are not streams, but are carried along.
        times: the start time of each step, if known; else time advances from ``time``.
        inverted: whether the steps are run backwards.
    """

    steps: Sequence[Step]
    monitor: Monitor
    shared: nn.Module | None = None
    post_step: nn.Module | None = None
    time: Any = None
    context: Any = None
    sizes: Iterable[Any] | None = None
    on_step: Observer | None = None
    runner: Runner | None = None
    wrap: Wrap | None = None
    calls: list[int] | None = None
    solves: Solves | None = None
    sink: Sink | None = None
    first: int = 0
    extras: int = 0
    times: Sequence[Any] | None = None
    inverted: bool = False

    def walk(self, state: State, runner: Runner | None = None) -> State:
        """The state after the last step; ``runner`` runs each step, by default the step itself."""
        time = self.time
        # Not strict, and read one by one: the sizes may be an endless iterator, whose next value depends on the error
        # of the step before and does not exist until that step is over.
        for n, (step, h) in enumerate(zip(self.steps, self.sizes or repeat(None)), self.first):  # noqa: B905
            # An inverted pass is given its times: subtracting step sizes would not reproduce those of the forward pass.
            time = time if self.times is None else self.times[n]
            state = step(state, self.shared, time, self.context, h, runner)
            if self.post_step is not None:
                # An error estimate that is carried along is not a stream, and a projection would spoil it.
                streams = len(state) - self.extras
                state = (*(self.post_step(x) for x in state[:streams]), *state[streams:])
            time = step.end(time, h)
            if self.on_step is not None:
                self.on_step(n, state)
        return state

    def keep(self, state: State) -> State:
        """The state after the last step, with autograd keeping of each state what it needs."""
        # The step itself is the path that a compiler traces into one graph; ``_evaluate`` is for what a pass collects.
        plain = self.wrap is None and self.calls is None and self.sink is None
        return self.walk(state, self.runner or (None if plain else self._evaluate))

    def keep_alone(self, state: State) -> State:
        """As ``keep``, under the lock: no other thread replays a step meanwhile, with old values in its modules."""
        if torch.compiler.is_compiling():  # a compiler cannot trace locks, and there are no threads in a graph
            return self.keep(state)
        with self.monitor.lock:
            return self.keep(state)

    def _evaluate(self, step: Step, state: State, shared: Any, t: Any, context: Any, h: Any) -> State:
        around = nullcontext()
        plain = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if getattr(step.scheme, "adjoint", False) and torch.is_grad_enabled() and not plain:
            modules = [step, *(() if shared is None else (shared,))]
            around = as_called(modules, state, (context, t), f"step {step.index}", self.sink)
        with around:
            return step.evaluate(state, shared, t, context, h, self.wrap, self.calls, self.sink, self.solves)

    def parts(self, every: int | Sequence[int]) -> "Iterator[Pass]":
        """Successive passes through ``every`` steps each, or through the numbers it lists, without the observer."""
        # Sizes that depend on errors are endless and must not come here: a stack refuses such a rule for modes that run
        # in parts.
        time, sizes = self.time, None if self.sizes is None else list(self.sizes)
        if isinstance(every, int):
            # The last part has the remaining steps: a slice may end beyond them.
            every = [every] * -(-len(self.steps) // every)
        for first, count in zip(accumulate((0, *every[:-1])), every, strict=True):
            steps = list(self.steps)[first : first + count]
            own = None if sizes is None else sizes[first : first + count]
            part = self._replace(steps=steps, time=time, sizes=own, on_step=None, first=self.first + first)
            yield part
            for step, h in zip(steps, own or repeat(None)):  # noqa: B905
                time = step.end(time, h)


class _Again(threading.local):
    """Whether this thread is running a step without a graph that will be run again with one."""

    inside = False


AGAIN = _Again()


def has_no_values(state: State) -> bool:
    """Whether the streams have shapes only, so that nothing can be measured or compared."""
    return state[0].is_meta or type(state[0]).__name__ == "FakeTensor"


def needs_graph() -> bool:
    """Whether this pass may be differentiated: gradients are on, and it is neither traced nor exported."""
    return torch.is_grad_enabled() and not torch.jit.is_tracing() and not torch.compiler.is_exporting()  # type: ignore
