"""A forward pass without a graph leaves no gradient behind silently: what escapes from a residual function is watched.

An auxiliary loss kept as an attribute, or an activation that a hook collects, has no graph in a reversed pass, and its
gradient would be missing without a word. So an update runs with a graph, whose saved tensors are dropped as soon as the
update is over, and its streams enter through a delayed error: whoever differentiates a leftover gets that error.
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
    """Applies updates such that nothing they leave behind can be differentiated without an error.

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
        """What ``run``, an update, makes of the state, without a graph."""
        with torch.enable_grad():
            behind = self.behind(state)
        return self._apply(run, behind, state)

    def alone(self, run: Callable[[State], State], state: State, refuse: Callable[[Sequence[Tensor]], None]) -> State:
        """As ``apply`` where neither a stream nor a parameter needs a gradient: no backward pass will come here.

        Args:
            run: an update.
            state: the streams.
            refuse: is given the streams after it, to raise where a captured tensor has made them need a gradient.
        """
        return self._apply(run, tuple(x.detach() for x in state), state, refuse)

    def _apply(
        self,
        run: Callable[[State], State],
        state: State,
        given: State,
        look: Callable[[Sequence[Tensor]], None] | None = None,
    ) -> State:
        # A graph is made after all, for the leftovers to hang on; boxes let go of what it saved, so memory stays flat.
        # The boxes are all that the graph holds of its saved tensors, so emptying them frees the memory at once.
        with torch.enable_grad(), saved_tensors_hooks(self._pack, self._unpack):
            new = run(state)
        for x in state:
            if x._backward_hooks:
                refuse_hook(self.where)
        if look is not None:
            look(new)
        for box in self.boxes:
            box.tensor = None
        self.boxes.clear()
        # The streams go on without the graph; only what a function put aside still holds it. Those that are handed on
        # are the very tensors that came in: a write to one must be counted in all states that it belongs to.
        came = {_place(x): x for x in given if x.numel()}
        return tuple(same if (same := came.get(_place(x))) is not None else x.detach() for x in new)

    def behind(self, state: State) -> State:
        """The streams, behind an error that is raised where a gradient arrives."""
        # One error a stream, as several in one call come back in another form than one.
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
    """What two tensors have in common that are one: a view of another shape, or a conjugate, is another tensor."""
    return x.data_ptr(), x.dtype, x.shape, x.stride(), x.is_conj(), x.is_neg()


def needed(members: Members, held: Held) -> bool:
    """Whether something could escape from the functions of a step.

    Before a first run anything could; later only hooks, closures, and attributes that were seen to be left behind.
    """
    # A guarded update costs time, so a function that was seen to leave nothing is trusted until it is exchanged.
    # Hooks and closures are not: what they hold cannot be looked at.
    # Those that ask for a graph are given one in every pass, as they are in the backward pass.
    return members.leaves_behind or members.asks or held.hooked


def left_behind(members: Members) -> bool:
    """Whether an attribute holds a tensor with a graph, by itself or in a list or dictionary."""
    return any(True for _ in leftovers(members))


def leftovers(members: Members) -> Iterator[Tensor]:
    """The tensors with a graph that attributes hold: a loss may differentiate them later."""
    held = pytree.tree_leaves([vars(m) for m in members.modules])
    return (v for v in held if isinstance(v, Tensor) and v.grad_fn is not None)


def refuse_hook(where: str) -> None:
    """Refuses hooks on streams: they are for the gradient of all that is made of a stream, and here it comes in parts.

    Raises:
        SchemeError: always.
    """
    raise SchemeError(
        f"Stack: a residual function of {where} hangs a hook on its argument, whose gradient backprop='reverse' and "
        "'exact' do not know as a whole there.\n"
        "  Hang it on the stream that visit_states(x, visitor) shows, or use backprop='store' or 'checkpoint'."
    )


def refuse_retained(left: Sequence[Tensor]) -> None:
    """Refuses leftovers that a gradient is to be kept at, as none arrives there.

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
        tensor: it, as long as anybody holds it.
        hooks: how many hooks it had when the call was over; those come from the function, which hangs them again.
    """

    tensor: ref[Tensor]
    hooks: int

    @classmethod
    def of(cls, x: Tensor) -> "Leftover":
        """It, as it is now."""
        return cls(ref(x), len(x._backward_hooks or ()))


def refuse_awaited(left: Sequence[Leftover], where: str) -> None:
    """Refuses leftovers that depend on a stream and that somebody awaits the gradient of since the call.

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
    """Whether a tensor was made of a stream, and not of parameters alone, whose graph is whole."""
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
    """Notes whether a guarded run has left something behind, or holds closures, which cannot be looked into.

    Args:
        members: the modules that ran.
        elsewhere: whether it has left something in what it was given.

    Returns:
        What it has left in attributes.
    """
    closures = any(isinstance(m, FunctionModule) for m in members.modules)
    left = [*leftovers(members)]
    members.leaves_behind = elsewhere or closures or bool(left)
    return left
