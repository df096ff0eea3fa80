"""Finds the tensors that a vector field reads besides its arguments: parameters, closure variables, contexts.

A backward pass that recomputes the states must send gradients to all of them, or raise. The autograd graph of one
evaluation contains them: its leaves, and the edges to what was computed before the evaluation. For the latter the graph
does not hold the tensors; a second evaluation, in which the arguments of every torch function are recorded, finds them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import SchemeError

# Set by the code that manages the modules behind a field. Its ``evaluated()`` is called after an evaluation with a
# graph, and the backward pass of an adjoint equation runs inside of it.
AROUND: ContextVar[Any] = ContextVar("around", default=None)


class Autocast:
    """The autocast of the forward pass, under which a backward pass, which runs outside of it, evaluates functions."""

    def __init__(self):
        self.on = {
            device: torch.get_autocast_dtype(device) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
        }

    def again(self, device: str) -> AbstractContextManager[Any]:
        """The context in which to evaluate a function."""
        if device not in self.on:
            return nullcontext()
        # No cache: a cast cached by an earlier evaluation would tie this one to the graph of that one.
        return torch.autocast(device, self.on[device], cache_enabled=False)


class _Arguments(TorchFunctionMode):
    """Collects the tensors that torch functions are given and that no function in this mode has made."""

    def __init__(self, *own: Tensor):
        super().__init__()
        self.made: dict[int, Tensor] = {id(x): x for x in own}
        self.found: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for x in pytree.tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and id(x) not in self.made and id(x) not in self.found:
                self.found[id(x)] = x
        result = func(*args, **kwargs)
        for x in pytree.tree_leaves(result):
            if isinstance(x, Tensor) and id(x) not in self.found:
                self.made[id(x)] = x
        return result


class Reads:
    """The tensors with a gradient that ``f(t, y)`` reads besides its arguments.

    Args:
        f: the field.
        t: a time at which it may be evaluated.
        y: a state.
        given: tensors that are known to be read.

    Raises:
        SchemeError: f reads a tensor that cannot be identified.
    """

    def __init__(self, f: Callable[[Any, Tensor], Tensor], t: Any, y: Tensor, given: Sequence[Tensor] = ()):
        self.tensors: list[Tensor] = []
        self._leaves: set[int] = set()
        self._edges: set[tuple[int, int]] = set()
        self._alive: list[Any] = []  # graph nodes are identified by their address, as long as they live
        for x in given:
            self._add(x)
        with torch.enable_grad(), Autocast().again(y.device.type):
            k, since, y1 = self._evaluate(f, t, y)
            unknown = self._walk(k, since, y1)
            if unknown:
                with _Arguments(y1) as seen:
                    f(t, y1)
                for x in seen.found.values():
                    if x.requires_grad and not x.is_leaf:
                        self._add(x)
                k, since, y1 = self._evaluate(f, t, y)
                if self._walk(k, since, y1):
                    raise SchemeError(
                        "odeint: func reads, through a closure, a tensor that was computed before the solve and cannot "
                        "be told; give it as part of y0 (with slope 0), or take gradient='store' or 'checkpoint'."
                    )

    def _evaluate(self, f: Any, t: Any, y: Tensor) -> tuple[Tensor, int, Tensor]:
        y1 = y.detach().requires_grad_()
        # Nodes are numbered as they are created, so those created before this moment have smaller numbers.
        since = y1.view_as(y1).grad_fn._sequence_nr()  # type: ignore[union-attr]
        return f(t, y1), since, y1

    def _add(self, x: Tensor) -> None:
        if not x.requires_grad:
            return
        # A leaf is identified by itself, a result by the node that made it: two views of one result are two edges.
        if x.is_leaf:
            if id(x) in self._leaves:
                return
            self._leaves.add(id(x))
        else:
            edge = (id(x.grad_fn), x.output_nr)
            if edge in self._edges:
                return
            self._edges.add(edge)
            self._alive.append(x.grad_fn)
        self.tensors.append(x)

    def _walk(self, k: Tensor, since: int, y: Tensor, add: bool = True) -> bool:
        """Adds the leaves under k; returns whether an edge leads to an unknown tensor of an earlier graph.

        With ``add=False`` nothing is added, and any unknown tensor counts, leaves included.
        """
        if k.grad_fn is None:
            if k.requires_grad and k is not y and id(k) not in self._leaves:  # func returns what it read
                if not add:
                    return True
                self._add(k)
            return False
        if (id(k.grad_fn), k.output_nr) in self._edges:
            return False
        # A loop, not a recursion: graphs of deep fields are deeper than Python's stack.
        queue, visited = [k.grad_fn], {k.grad_fn}
        while queue:
            node = queue.pop()
            # Leaf nodes are outside of this numbering.
            if type(node).__name__ == "AccumulateGrad":
                variable = node.variable  # type: ignore[attr-defined]
                if variable is not y and id(variable) not in self._leaves:
                    if not add:
                        return True
                    self._add(variable)
                continue
            # Computed before the evaluation: a gradient would have to continue from here, to a tensor that the node
            # does not name.
            if node._sequence_nr() < since:
                return True
            for following, number in node.next_functions:
                if following is None or following in visited or (id(following), number) in self._edges:
                    continue
                visited.add(following)
                queue.append(following)
        return False

    def evaluate(self, f: Callable[[Any, Tensor], Tensor], t: Any, y: Tensor) -> Tensor:
        """``f(t, y)`` with a graph, for a leaf y; refuses tensors that earlier evaluations did not read."""
        since = y.view_as(y).grad_fn._sequence_nr()  # type: ignore[union-attr]
        k = f(t, y)
        # Walked again at every evaluation: a field may read different tensors at different times.
        if k.requires_grad and self._walk(k, since, y, add=False):
            raise SchemeError(
                "odeint: func reads a tensor in the backward pass (through a closure) that it did not read at the "
                "start of the solve; read all at every time, or take gradient='store' or 'checkpoint'."
            )
        return k

    def __len__(self) -> int:
        return len(self.tensors)

    @contextmanager
    def unhooked(self) -> Iterator[None]:
        """Disables hooks on the tensors read: they are to run once, for the gradient of the whole solve."""
        hooks = [(x, x._backward_hooks) for x in self.tensors if x._backward_hooks]
        try:
            for x, _ in hooks:
                x._backward_hooks = None
            yield
        finally:
            for x, own in hooks:
                x._backward_hooks = own


def vjp(k: Tensor, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
    """grad^H dk/dinputs, None where k does not read an input."""
    if not k.requires_grad:
        return [None] * len(inputs)
    return list(torch.autograd.grad(k, tuple(inputs), grad, allow_unused=True, retain_graph=True))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, way: str, handle: Tensor, *grads: Tensor):
        ctx.way = way
        return tuple(g.view_as(g) for g in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):  # type: ignore[override]
        raise SchemeError(
            f"odeint: gradient={ctx.way!r} has no second derivatives; take gradient='store' or 'checkpoint' "
            "(adjoint=false)."
        )


def once(way: str, ys: Tensor, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients; where a graph of them is requested, behind a node that refuses to be differentiated again.

    Args:
        way: the name of the gradient option, for the message.
        ys: the values of the solve, whose graph leads to all that the gradients depend on.
        grads: the gradients.
    """
    if not torch.is_grad_enabled():
        return list(grads)
    # Attached to the values: a request for a single gradient of gradients would otherwise silently return none.
    marked = iter(_Once.apply(way, ys, *(g.detach() for g in grads if g is not None)))  # type: ignore[arg-type]
    return [None if g is None else next(marked) for g in grads]


def refuse_tangents(way: str) -> None:
    """Raises a SchemeError in forward mode, whose tangents a backward pass of its own would lose."""
    if forward_ad._current_level >= 0:
        raise SchemeError(
            f"odeint: gradient={way!r} has no tangents of forward mode (torch.autograd.forward_ad).\n"
            "  Take gradient='store' or 'checkpoint' (adjoint=false), or solve without a graph: torch.no_grad()."
        )


def refuse_transforms(way: str, grad: Tensor | None = None) -> None:
    """Raises a SchemeError inside of torch.func, or where ``grad`` is one of torch's batched gradients."""
    batched = grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)  # type: ignore[attr-defined]
    if batched or torch._C._are_functorch_transforms_active():
        raise SchemeError(
            f"odeint: gradient={way!r} passes neither torch.func nor batches of gradients (is_grads_batched=True, "
            "vectorize=True).\n  Ask for the gradients one by one, or take gradient='store' (adjoint=false)."
        )
