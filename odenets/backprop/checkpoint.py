"""Checkpointed steps: torch's checkpoint, run again under what the call read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from schemes.errors import SchemeError
from schemes.ode.reads import AROUND
from schemes.scheme import State

from ..auxiliary import Sink
from .guard import Guard, leftovers
from .limits import in_our_words, raise_in_our_words
from .members import Flags, Held, Members, swapped
from .surroundings import Read, Surroundings, torch_functions


class _Saved(saved_tensors_hooks):
    """Inside, what autograd saves is checked for later writes, which torch's checkpoint keeps without a look.

    Args:
        where: name of the steps, for messages.
        keep: what the checkpoint does with a saved tensor.
        unpack: how it gives it back.
    """

    def __init__(self, where: str, keep: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]):
        self.where, self.keep, self.seen = where, keep, list[tuple[Tensor, int]]()
        super().__init__(self._pack, unpack)

    def _pack(self, x: Tensor) -> Any:
        if not x.is_inference():
            self.seen.append((x, x._version))
        return self.keep(x)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        seen, self.seen = self.seen, []
        for x, version in seen:
            if x._version != version:
                raise RuntimeError(
                    f"Stack: a residual function of {self.where} has changed in place a tensor of shape "
                    f"{tuple(x.shape)} that autograd had saved for the backward pass.\n"
                    "  Use operations that are not in place."
                )


class Rerun:
    """The context of a recomputation; entered once for each, and again while one is under way."""

    def __init__(
        self,
        members: Members,
        held: Held,
        state: State,
        given: Any,
        where: str,
        sink: Sink | None = None,
        lock: AbstractContextManager[Any] | None = None,
    ):
        self.members, self.where, self.sink = members, where, sink
        self.lock = lock or nullcontext()
        self.flags = Flags(self.members, given, held)
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
        else:
            self.members.forget()  # for the next pass, which begins with other values

    def __enter__(self) -> None:
        with ExitStack() as stack:
            # Another thread's pass must not meet what is put back here.
            stack.enter_context(self.lock)
            # Before anything is put back: a parameter that was written to cannot be made as it was.
            self.flags.check(self.where)
            if not torch._C._is_torch_function_enabled():
                stack.enter_context(torch_functions())
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
            if (hooks := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:  # type: ignore[attr-defined]
                stack.enter_context(_Saved(self.where, *hooks))
            # A stack of contexts, since a recomputation may set off another of the same steps (a graph of gradients).
            self.entered.append(stack.pop_all())

    def __exit__(self, *error: Any) -> None:
        self.entered.pop().__exit__(*error)
        raise_in_our_words(error[1])


class Solve(Rerun):
    """What the adjoint equation of a solve is solved under, backwards in time; as ``schemes.ode.reads.AROUND``."""

    def __init__(self, modules: Sequence[nn.Module], state: State, given: Any, where: str):
        members = Members(modules)
        super().__init__(members, members.everything(), state, given, where)
        self.known = {id(x) for x in leftovers(self.members)}
        self.left: list[tuple[dict[str, Any], str]] = []

    def evaluated(self) -> None:
        """Looks at what the field has left behind, after an evaluation with a graph.

        Raises:
            SchemeError: a tensor in a list or dictionary that could be differentiated.
        """
        new = {id(x) for x in leftovers(self.members)} - self.known
        self.left = [(vars(m), k) for m in self.members.modules for k, v in vars(m).items() if id(v) in new]
        if len(self.left) < len(new):
            raise SchemeError(
                "Stack: a residual function leaves a tensor with a graph behind in a list or dictionary, and an "
                "adjoint keeps no gradient of it.\n  Detach it there, or use adjoint=false."
            )

    def over(self) -> None:
        """The solve is over.

        Raises:
            SchemeError: the field has drawn random numbers.
        """
        guard = Guard(self.where, "an adjoint keeps no graph of it.\n  Use adjoint=false, or detach it")
        for attributes, name in self.left:
            # To be read, and logged; whoever differentiates it is told.
            if isinstance(x := attributes.get(name), Tensor) and x.grad_fn is None:
                with torch.enable_grad():
                    (attributes[name],) = guard.behind((x,))
        super().over()
        before = self.before
        if isinstance(before, Surroundings) and before.end is not None and before.drew(before.end):
            raise SchemeError(
                "Stack: a residual function draws random numbers, and an adjoint, which calls it at other times than "
                "the solve did, cannot draw the same.\n  Draw before, and give it as context; or use adjoint=false."
            )


@contextmanager
def as_called(modules: Sequence[nn.Module], state: State, given: Any, where: str, sink: Sink | None) -> Iterator[None]:
    """Inside, solves note what their adjoint equations are to be solved under; other arguments as in ``checkpointed``.

    Args:
        modules: all modules that the solves use.
        state: the streams.
        given: a tree of tensors that are read besides the streams.
        where: name of the steps, for messages.
        sink: takes auxiliary values, which are refused.

    Raises:
        SchemeError: a residual function draws, or returns auxiliary values, of which an adjoint has no gradient.
    """
    solve = Solve(modules, state, given, where)
    token = AROUND.set(solve)
    try:
        yield
    finally:
        AROUND.reset(token)
    if sink is not None and sink.values:
        raise SchemeError("Stack: an adjoint has no gradient of auxiliary values; use adjoint=false.")
    solve.over()


@in_our_words
def checkpointed(
    run: Callable[..., State],
    state: State,
    members: Callable[[], tuple[Members, Held]],
    given: Any,
    where: str,
    sink: Sink | None = None,
    lock: AbstractContextManager[Any] | None = None,
) -> State:
    """``run(*state)``, whose inner tensors are dropped, and made again in the backward pass.

    Args:
        run: what is computed; a function of the streams alone.
        state: the streams.
        members: gives all modules that ``run`` uses, and what they hold: buffers, flags and parameters are as at the
            call the second time. Not asked where a compiler records the run.
        given: a tree of tensors that they read besides the streams.
        where: name of the steps, for messages.
        sink: takes the auxiliary values of the first run, and none of a second.
        lock: held while it runs.
    """
    if torch.compiler.is_compiling():  # which refuses a context made here, and has recomputation rules of its own
        return checkpoint(run, *state, use_reentrant=False)  # type: ignore[return-value]
    # One object instead of a generator: torch enters the context once per backward pass, as often as there are any.
    rerun = Rerun(*members(), state, given, where, sink, lock)

    def steps(*streams: Tensor) -> State:
        if not rerun.entered:
            return run(*streams)
        hooks = [{*(x._backward_hooks or ())} for x in streams]
        try:
            return run(*streams)
        finally:
            # What a function hangs on its argument hangs there since the first run.
            for x, before in zip(streams, hooks, strict=True):
                for key in {*(x._backward_hooks or ())} - before:
                    del x._backward_hooks[key]  # type: ignore[index]

    # ``rerun`` puts back the generators of the processor and of one device, and does so under the lock; torch would set
    # them before it comes there, while another thread draws.
    devices = {x.device for x in state}
    others = len(devices) > 1 or devices.pop().type not in ("cpu", "cuda")
    contexts = nullcontext(), rerun
    with rerun.lock:
        result = checkpoint(steps, *state, use_reentrant=False, context_fn=lambda: contexts, preserve_rng_state=others)
        rerun.over()
    return result  # type: ignore[return-value]
