"""Detects tensors that escape from residual functions run without a graph, whose gradients would be lost silently.

An auxiliary loss kept as an attribute, or an activation that a hook collects, has no graph in a reversed pass, and its
gradient would be missing without a warning. So an update runs with a graph, whose saved tensors are dropped as soon as
the update is over, and its streams enter through a delayed error, which is raised when a leftover is differentiated.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from schemes.errors import SchemeError
from schemes.scheme import State

from ..step import FunctionModule
from .members import Held, Members


class _Box:
    """A saved tensor, while its update runs."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor):
        self.tensor: Tensor | None = tensor


_ERROR = "torch::autograd::Error"  # the name of a delayed error in a graph
_WHY = (
    "backprop='reverse' and 'exact' keep no graph of it.\n"
    "  Return it as an auxiliary value, stack(x, aux=True), or use backprop='checkpoint' or 'store'"
)


class Guard:
    """Applies updates so that differentiating anything they leave behind raises an error.

    Args:
        where: the step, for messages.
        why: what keeps no graph, and the remedy.
    """

    def __init__(self, where: str, why: str = _WHY):
        self.where = where
        self.message = (
            f"Stack: {where}: a side product of a residual function, an attribute or what a hook collected, is "
            f"differentiated, and {why}."
        )
        self.boxes: list[_Box] = []

    def apply(self, run: Callable[[State], State], state: State) -> State:
        """The state after ``run``, an update, without a graph."""
        with torch.enable_grad():
            behind = self.behind(state)
        return self._apply(run, behind, state)

    def alone(self, run: Callable[[State], State], state: State, refuse: Callable[[Sequence[Tensor]], None]) -> State:
        """As ``apply``, where neither a stream nor a parameter needs a gradient, so that no backward pass will come.

        Args:
            run: an update.
            state: the streams.
            refuse: called with the streams after it, to raise where a captured tensor makes them need a gradient.
        """
        return self._apply(run, tuple(x.detach() for x in state), state, refuse)

    def _apply(
        self,
        run: Callable[[State], State],
        state: State,
        given: State,
        look: Callable[[Sequence[Tensor]], None] | None = None,
    ) -> State:
        # A graph is built after all, so that leftovers lead to the error. It holds its saved tensors in boxes only, so
        # emptying these frees the memory at once.
        with torch.enable_grad(), saved_tensors_hooks(self._pack, self._unpack):
            new = run(state)
        # These tensors were created for this update, so a hook on one comes from the function.
        for x in state:
            if x._backward_hooks:
                refuse_hook(self.where)
        if look is not None:
            look(new)
        for box in self.boxes:
            box.tensor = None
        self.boxes.clear()
        # The streams leave without the graph, which only leftovers still hold. Streams that the update passes through
        # stay the same tensor objects: a write to one must be counted in all states that contain it.
        came = {_place(x): x for x in given if x.numel()}
        return tuple(same if (same := came.get(_place(x))) is not None else x.detach() for x in new)

    def behind(self, state: State) -> State:
        """The streams, behind an error that is raised when a gradient arrives."""
        # One error per stream, since a call with several returns another type than a call with one.
        error = torch._C._functions.DelayedError  # type: ignore[attr-defined]
        return tuple(
            error(self.message, 1)(x.detach().requires_grad_()).as_subclass(type(x))
            if x.is_floating_point() or x.is_complex()
            else x
            for x in state
        )

    def _pack(self, x: Tensor) -> _Box:
        self.boxes.append(_Box(x))
        return self.boxes[-1]

    def _unpack(self, box: _Box) -> Tensor:
        if box.tensor is None:
            raise SchemeError(self.message)
        return box.tensor


def _place(x: Tensor) -> tuple[Any, ...]:
    """A key that is equal for two tensors that are the same; a view of another shape, or a conjugate, is different."""
    return x.data_ptr(), x.dtype, x.shape, x.stride(), x.is_conj(), x.is_neg()


def needed(members: Members, held: Held) -> bool:
    """Whether something could escape from the functions of a step.

    Before the first run anything could; later only through hooks, closures, and functions that were seen to leave
    something behind.
    """
    # A guarded update costs time, so a function that was seen to leave nothing is trusted until it is replaced.
    # Hooks and closures are not trusted: what they hold cannot be inspected.
    # Functions that ask for a graph get one in every forward pass, as they do in the backward pass.
    return members.leaves_behind or members.asks or held.hooked


def left_behind(members: Members) -> bool:
    """Whether an attribute holds a tensor with a graph, directly or in a list or dictionary."""
    return any(True for _ in leftovers(members))


def leftovers(members: Members) -> Iterator[Tensor]:
    """The tensors with a graph that attributes hold, which a loss may differentiate later."""
    held = pytree.tree_leaves([vars(m) for m in members.modules])
    return (v for v in held if isinstance(v, Tensor) and v.grad_fn is not None)


def refuse_hook(where: str) -> None:
    """Refuses hooks on streams: they expect the whole gradient of a stream, which arrives in parts here.

    Raises:
        SchemeError: always.
    """
    raise SchemeError(
        f"Stack: a residual function of {where} hangs a hook on its argument, whose gradient backprop='reverse' and "
        "'exact' do not know as a whole there.\n"
        "  Hang it on the stream that visit_states(x, visitor) shows, or use backprop='store' or 'checkpoint'."
    )


def refuse_retained(left: Sequence[Tensor]) -> None:
    """Refuses leftovers that are to retain their gradient, since none arrives there.

    Raises:
        SchemeError: there is one.
    """
    if any(x.retains_grad for x in left):
        raise SchemeError(
            "Stack: a residual function retains the gradient of a tensor that it leaves behind, which no backward pass "
            "of backprop='reverse' and 'exact' gives it.\n"
            "  Take it in a hook, y.register_hook(...), or use backprop='store' or 'checkpoint'."
        )


class Leftover(NamedTuple):
    """A tensor that a residual function has left behind.

    Attributes:
        tensor: a weak reference to it.
        hooks: the number of its hooks at the end of the call; those come from the function, which registers them again.
    """

    tensor: ref[Tensor]
    hooks: int

    @classmethod
    def of(cls, x: Tensor) -> "Leftover":
        """The leftover, as it is now."""
        return cls(ref(x), len(x._backward_hooks or ()))


def refuse_awaited(left: Sequence[Leftover], where: str) -> None:
    """Refuses leftovers that depend on a stream and have been set to receive a gradient since the call.

    Raises:
        SchemeError: there is one.
    """
    for tensor, hooks in left:
        x = tensor()
        if x is None or not (x.retains_grad or len(x._backward_hooks or ()) > hooks) or not _behind_an_error(x):
            continue
        raise SchemeError(
            f"Stack: a tensor of shape {tuple(x.shape)} that a residual function of {where} has left behind retains "
            "its gradient or has a hook, and backprop='reverse' and 'exact' bring none there.\n"
            "  Hang the hook on it in the function, return it as an auxiliary value, or use backprop='store' or "
            "'checkpoint'."
        )


def _behind_an_error(x: Tensor) -> bool:
    """Whether a tensor depends on a stream, and not on parameters alone, whose graph is complete."""
    seen, queue = set(), [x.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        if node.name() == _ERROR:
            return True
        seen.add(node)
        queue += [before for before, _ in node.next_functions]
    return False


def learn(members: Members, elsewhere: bool = False) -> list[Tensor]:
    """Notes whether a guarded run has left something behind, or involves closures, which cannot be inspected.

    Args:
        members: the modules that ran.
        elsewhere: whether the run has left something in its arguments.

    Returns:
        The tensors that it has left in attributes.
    """
    closures = any(isinstance(m, FunctionModule) for m in members.modules)
    left = [*leftovers(members)]
    members.leaves_behind = elsewhere or closures or bool(left)
    return left
