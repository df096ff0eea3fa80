"""Checkpointed steps: torch's checkpoint, with a recomputation that reads the same values as the call."""

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
    """Inside, tensors that autograd saves are checked for later in-place writes, which torch's checkpoint does not do.

    Args:
        where: name of the steps, for messages.
        keep: the pack hook of the checkpoint.
        unpack: its unpack hook.
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
    """The context of a recomputation; entered once for each, possibly while another is under way."""

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
        # Statistics too, although a training pass does not read them: they must not be updated twice.
        self.statistics = self.members.statistics()
        self.before: Surroundings | Read = Surroundings(state[0].device, self.members, given)
        self.entered: list[ExitStack] = []

    def over(self) -> None:
        """Ends the call: what it left unchanged need not be kept."""
        notes: list[Surroundings | None] = []
        assert isinstance(self.before, Surroundings)
        self.before.moved(notes)
        if notes[0] is None:
            self.before = self.before.read()
        else:
            self.members.forget()  # the next pass begins with other values

    def __enter__(self) -> None:
        with ExitStack() as stack:
            # A pass of another thread must not see what is restored here.
            stack.enter_context(self.lock)
            # Checked before anything is restored: a parameter that was written to cannot be restored.
            self.flags.check(self.where)
            if not torch._C._is_torch_function_enabled():
                stack.enter_context(torch_functions())
            stack.enter_context(self.flags.restored())
            if isinstance(self.before, Surroundings):
                stack.enter_context(self.before.replayed())
            else:
                self.before.check(self.where)
                stack.enter_context(self.before.restored())
            # The recomputation updates copies of the statistics, which are then dropped.
            stack.enter_context(swapped(self.statistics, [slot.value.clone() for slot in self.statistics]))
            if self.sink is not None:
                # A function that differentiates inside itself is run again while the sink still takes values.
                stack.enter_context(self.sink.closed())
            # The hooks of torch's recomputation are on top here; a check for in-place writes is added to them.
            if (hooks := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:  # type: ignore[attr-defined]
                stack.enter_context(_Saved(self.where, *hooks))
            # A stack of contexts, since one recomputation may trigger another of the same steps (a graph of gradients).
            self.entered.append(stack.pop_all())

    def __exit__(self, *error: Any) -> None:
        self.entered.pop().__exit__(*error)
        raise_in_our_words(error[1])


class Solve(Rerun):
    """The context of solving an adjoint equation, backwards in time; set as ``schemes.ode.reads.AROUND``."""

    def __init__(self, modules: Sequence[nn.Module], state: State, given: Any, where: str):
        members = Members(modules)
        super().__init__(members, members.everything(), state, given, where)
        self.known = {id(x) for x in leftovers(self.members)}
        self.left: list[tuple[dict[str, Any], str]] = []

    def evaluated(self) -> None:
        """Collects what the field has left behind, after an evaluation with a graph.

        Raises:
            SchemeError: a tensor in a list or dictionary could be differentiated.
        """
        new = {id(x) for x in leftovers(self.members)} - self.known
        self.left = [(vars(m), k) for m in self.members.modules for k, v in vars(m).items() if id(v) in new]
        if len(self.left) < len(new):
            raise SchemeError(
                "Stack: a residual function leaves a tensor with a graph behind in a list or dictionary, and an "
                "adjoint keeps no gradient of it.\n  Detach it there, or use adjoint=false."
            )

    def over(self) -> None:
        """Ends the solve.

        Raises:
            SchemeError: the field has drawn random numbers.
        """
        guard = Guard(self.where, "an adjoint keeps no graph of it.\n  Use adjoint=false, or detach it")
        for attributes, name in self.left:
            # It can be read and logged, but differentiating it raises an error.
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
    """Inside, solves record the context for their adjoint equations; other arguments as in ``checkpointed``.

    Args:
        modules: all modules that the solves use.
        state: the streams.
        given: a tree of tensors that are read besides the streams.
        where: name of the steps, for messages.
        sink: takes auxiliary values, which are refused.

    Raises:
        SchemeError: a residual function draws random numbers, or returns auxiliary values, for which an adjoint has no
            gradient.
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
    """``run(*state)``, whose inner tensors are dropped, and recomputed in the backward pass.

    Args:
        run: the function to be checkpointed, of the streams alone.
        state: the streams.
        members: returns all modules that ``run`` uses, and what they hold: in the recomputation, buffers, flags and
            parameters are as they were at the call. Not called where a compiler traces the run.
        given: a tree of tensors that they read besides the streams.
        where: name of the steps, for messages.
        sink: takes the auxiliary values of the first run, but none of a recomputation.
        lock: held while the function runs.
    """
    # A compiler refuses a context that is made here, and has its own rules of recomputation.
    if torch.compiler.is_compiling():
        return checkpoint(run, *state, use_reentrant=False)  # type: ignore[return-value]
    # An object instead of a generator: torch enters the context once per backward pass, of which there may be several.
    rerun = Rerun(*members(), state, given, where, sink, lock)

    def steps(*streams: Tensor) -> State:
        if not rerun.entered:
            return run(*streams)
        hooks = [{*(x._backward_hooks or ())} for x in streams]
        try:
            return run(*streams)
        finally:
            # Hooks that the function registers on its arguments are there already, from the first run.
            for x, before in zip(streams, hooks, strict=True):
                for key in {*(x._backward_hooks or ())} - before:
                    del x._backward_hooks[key]  # type: ignore[index]

    # ``rerun`` restores the generators of the CPU and of one device, and does so under the lock; torch would set them
    # before the lock is taken, while another thread may draw.
    devices = {x.device for x in state}
    others = len(devices) > 1 or devices.pop().type not in ("cpu", "cuda")
    contexts = nullcontext(), rerun
    with rerun.lock:
        result = checkpoint(steps, *state, use_reentrant=False, context_fn=lambda: contexts, preserve_rng_state=others)
        rerun.over()
    return result  # type: ignore[return-value]
