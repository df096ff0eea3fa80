"""Backpropagation that keeps one state instead of all: the states before are made again by the scheme's inverse.

One autograd node per step, chained. A node's backward pass takes the state after its step, undoes the step's elementary
updates from the last to the first, and differentiates each on the way: every residual function runs once forward and
once backward, one function's graph is alive at a time, and no scheme carries backward code of its own. Parameters are
inputs of the nodes, so their gradients leave as soon as they exist.

The nodes share a tape that knows the state before one step. A node that finds it elsewhere (a loss on a middle output,
a second backward pass) moves it there first; nothing depends on the order in which autograd runs the nodes.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from schemes.coupling import Coupling, Update, rotated, shortcut_of
from schemes.errors import SchemeError
from schemes.scheme import Function, State

from .exact import Grid, Lost
from .recompute import Generators, statistics_kept
from .undo import Call, as_found, autocast_as, call_of, check_parameters, done, elementary, held, made, replayed, undone

if TYPE_CHECKING:
    from .step import Step


class Runner(Protocol):
    """What runs the steps of a pass in their stead."""

    def advance(self, step: "Step", state: State, shared: nn.Module | None, t: Any, context: Any) -> State: ...


class Figure(NamedTuple):
    """A figure on its way from the device, the event that tells its arrival, and whether it must be zero."""

    value: Tensor
    event: Any
    exact: bool

    @classmethod
    def of(cls, value: Tensor, exact: bool = False) -> "Figure":
        """Sends a figure on its way, without waiting for it."""
        if not value.is_cuda:
            return cls(value, None, exact)
        value, event = value.to("cpu", non_blocking=True), torch.cuda.Event()
        event.record()
        return cls(value, event, exact)

    def ready(self) -> bool:
        """Whether it has arrived."""
        return self.event is None or self.event.query()


class Tape:
    """The states of one forward pass: the last one, some anchors, and the one where the backward pass stands."""

    def __init__(self, every: int | None, keep_first: bool, grid: Grid | None = None):
        self.every = every
        self.keep_first = keep_first
        self.grid = grid
        self.calls: list[Call] = []
        self.kept: dict[int, State] = {}  # n: the state before step n, as it was
        self.versions: list[int] = []
        self.position: int | None = None
        self.state: State = ()
        self.drift: Tensor | None = None
        self.report: list[Figure] | None = None  # where the drift goes when the pass is over

    def advance(self, step: "Step", state: State, shared: nn.Module | None, t: Any, context: Any) -> State:
        """One step as a node on this tape."""
        n = len(self.calls)
        # A step that makes streams drops them when it is undone, and their errors with them: look before that too.
        first = n == 0 or (n == 1 and made(self.calls[0].step) > 0 == made(step))
        if (first and self.keep_first) or (n > 0 and self.every is not None and n % self.every == 0):
            self.kept[n] = tuple(x.detach() for x in state)
        call = call_of(step, state, shared, t, context, self.grid)
        self.calls.append(call)
        inputs = [o.tensor for o in call.owners]
        if t is not None or context is not None:
            inputs += [x for x in pytree.tree_leaves((t, context)) if isinstance(x, Tensor) and x.requires_grad]
        return _Node.apply(self, n, len(state), *state, *inputs)  # type: ignore[return-value]

    def close(self, state: State) -> None:
        """Keeps the last state, from which the backward pass starts."""
        final = tuple(x.detach() for x in state)
        self.kept[len(self.calls)] = final
        self.versions = [x._version for x in final]

    def over(self, state: State) -> Tensor:
        """Whether any stream left the grid's range in this pass."""
        assert self.grid is not None
        flags = [self.grid.over(x) for x in state]
        return torch.stack([f for call in self.calls for f in call.over] + flags).any()

    def before(self, n: int) -> State:
        """The state before step n, made again from the nearest one above it."""
        places = [p for p in self.kept if p >= n]
        if self.position is not None and self.position >= n:
            places.append(self.position)
        if not places:
            raise RuntimeError(
                "Trying to backward through a stack a second time: its states are freed. "
                "Specify retain_graph=True if you need to backward through it again."
            )
        start = min(places)
        last = len(self.calls)
        if start == last and [x._version for x in self.kept[last]] != self.versions:
            raise RuntimeError("Stack: its output was changed in place; reverse backprop starts from it. Clone it.")
        state = self.state if start == self.position else self.kept[start]
        while start > n:
            start -= 1
            state = undone(self.calls[start], state)
        return state

    def take(self, n: int, free: bool) -> State:
        """The state before step n; with ``free`` the tape lets go of it, and of all that lies above."""
        state = self.before(n)
        if free:
            self.position, self.state = None, ()
            for p in [p for p in self.kept if p >= n]:
                del self.kept[p]
        return state

    def move(self, n: int, state: State) -> None:
        """Sets the tape to the state before step n, and compares with what was kept there."""
        kept = self.kept.get(n)
        if kept is not None:
            drift = distance(state, kept)
            self.drift = drift if self.drift is None else torch.maximum(self.drift, drift)
            state = kept
        self.position, self.state = n, state
        if n == 0 and self.report is not None and self.drift is not None:
            self.report.append(Figure.of(self.drift, self.grid is not None))
            del self.report[:-4]


def _keep_graph() -> bool:
    """Whether the backward pass that runs now was asked to keep its graph."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]


def distance(a: State, b: State) -> Tensor:
    """|a - b| / |b| over all streams together, on their device; streams that an inverse leaves empty do not count."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x.shape == y.shape]
    error = torch.stack([torch.linalg.vector_norm((x - y).float()) for x, y in pairs])
    size = torch.stack([torch.linalg.vector_norm(y.float()) for _, y in pairs])
    return torch.linalg.vector_norm(error) / torch.linalg.vector_norm(size).clamp_min(1e-30)


class _Node(torch.autograd.Function):
    """One step: forward without a graph, backward by the inverse."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, n: int, streams: int, *tensors: Tensor) -> State:
        call = tape.calls[n]
        ctx.tape, ctx.n, ctx.extras = tape, n, tensors[streams:]
        ctx.set_materialize_grads(False)
        state = tensors[:streams]
        # Weights that autocast casts here, without a graph, must not be found by a later pass that needs one.
        with autocast_as(call.autocast):
            return done(call, state)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        twice = torch.is_grad_enabled()  # the pass was asked for a graph of itself
        with torch.no_grad():
            found = _Node.once(ctx, grads)
        if not twice:
            return found
        # Always, not only where the incoming gradients need one: the graph through the states would be missing.
        leaves = [None if g is None else g.detach().requires_grad_() for g in found]
        message = (
            f"Stack: backprop='reverse' cannot be differentiated twice ({ctx.tape.calls[ctx.n].step.scheme}); "
            "use backprop='store' or 'checkpoint' for gradients of gradients."
        )
        return tuple(torch._C._functions.DelayedError(message, len(leaves))(*leaves))  # type: ignore[attr-defined]

    @staticmethod
    def once(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """The gradients of one step's inputs."""
        tape, n, extras = ctx.tape, ctx.n, ctx.extras
        none = (None, None, None)
        if all(g is None for g in grads):
            return (*none, *(None for _ in ctx.needs_input_grad[3:]))
        call: Call = tape.calls[n]
        wanted = ctx.needs_input_grad[len(ctx.needs_input_grad) - len(extras) :]
        streams = list(tape.take(n + 1, free=not _keep_graph()))
        found, extra = _backward(call, streams, list(grads), extras, wanted)
        tape.move(n, tuple(streams))
        return (*none, *found, *extra)


def _backward(
    call: Call, streams: list[Tensor], grads: list[Tensor | None], extras: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Undoes a step and differentiates it: returns the gradients of its streams and of the extra inputs.

    ``streams``, the state after the step, becomes the state before it, one stream after the other, so that no stream
    outlives its use.
    """
    check_parameters(call)
    count = len(call.owners)
    direct = all(as_found(o) for o in call.owners)
    leaves = list(extras) if direct else [x.detach().requires_grad_(w) for x, w in zip(extras, wanted, strict=True)]
    t, context = call.t, call.context
    if len(extras) > count:
        leaves[count:] = [x.detach().requires_grad_() for x in extras[count:]]
        t, context = _replaced((t, context), leaves[count:])
    work = Work(call, [x for x, w in zip(leaves, wanted, strict=True) if w], {id(x) for x in leaves})
    with (
        nullcontext() if direct else held(call.owners, leaves[:count]),
        statistics_kept(call.norms, call.holders),
        autocast_as(call.autocast),
    ):
        drawn, lost = list(call.generators), list(call.lost)

        def parts() -> list[tuple[Any, Sequence[Function], Any, Any]]:
            with torch.enable_grad():  # a learned step size enters the functions and the updates here
                return elementary(call, None, t, context)

        fixed = None if _learned(call) else parts()
        for k in reversed(range(len(parts() if fixed is None else fixed))):
            # Each graph is gone once it was used, and what is computed from a learned step size is part of one.
            scheme, fs, h, gs = (fixed or parts())[k]
            if not isinstance(scheme, Coupling):
                _differentiate_whole(work, scheme, fs, h, gs, streams, grads, drawn.pop())
                continue
            streams[:], grads = rotated(tuple(streams), -scheme.rotate), list(rotated(tuple(grads), -scheme.rotate))  # type: ignore
            count = len(streams) - scheme.streams_added
            with torch.enable_grad():
                updates = scheme.updates(fs, h, count)
            for i in reversed(range(len(updates))):
                if fixed is None:
                    _, fs, h, gs = parts()[k]
                    with torch.enable_grad():
                        updates = scheme.updates(fs, h, count)
                with replayed(drawn.pop()):
                    beside = lost.pop() if lost else None
                    _differentiate(work, len(drawn), updates[i], streams, grads, gs, beside)
    found = iter(work.sums)
    return grads, [next(found) if w else None for w in wanted]


def _learned(call: Call) -> bool:
    """Whether the step size or the time needs a gradient."""
    return any(isinstance(x, Tensor) and x.requires_grad for x in (call.step.h, call.t))


def _replaced(tree: Any, leaves: Sequence[Tensor]) -> Any:
    """The tree with its tensors that need a gradient replaced, in order."""
    rest = iter(leaves)
    return pytree.tree_map(lambda x: next(rest) if isinstance(x, Tensor) and x.requires_grad else x, tree)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class Work:
    """What the backward pass of one step collects: gradients of its parameters and other extra inputs."""

    def __init__(self, call: Call, ask: list[Tensor], known: set[int]):
        self.call, self.ask, self.known = call, ask, known
        self.sums: list[Tensor | None] = [None] * len(ask)

    def gradients(self, place: int, pairs: list[tuple[Any, Tensor]], inputs: list[Tensor]) -> list[Tensor | None]:
        """Gradients of (edge, gradient) pairs at the inputs; empties ``pairs``."""
        if not pairs:
            return [None] * len(inputs)
        searched = self.call.step.searched
        if place not in searched:
            _refuse_captured(self.call, [edge.node for edge, _ in pairs], self.known | {id(x) for x in inputs})
            searched.add(place)
        edges, grads = zip(*pairs, strict=True)
        pairs.clear()
        found = torch.autograd.grad(edges, [*inputs, *self.ask], grads, allow_unused=True)
        for i, g in enumerate(found[len(inputs) :]):
            self.sums[i] = _add(self.sums[i], g)
        return list(found[: len(inputs)])


def _differentiate_whole(
    work: Work,
    scheme: Any,
    fs: Sequence[Function],
    h: Any,
    gs: Sequence[Function],
    streams: list[Tensor],
    grads: list[Tensor | None],
    generators: "Generators | None",
) -> None:
    """Undoes and differentiates a scheme that is no list of updates: its whole graph is alive."""
    with replayed(generators), torch.no_grad():
        streams[:] = scheme._inverse(fs, tuple(streams), h, gs)
    with replayed(generators), torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in streams]
        outputs = scheme._step(fs, tuple(inputs), h, gs)
    pairs = [
        (get_gradient_edge(o), g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad
    ]
    del outputs
    grads[:] = work.gradients(-1, pairs, inputs)


def _differentiate(
    work: Work,
    place: int,
    update: Update,
    streams: list[Tensor],
    grads: list[Tensor | None],
    gs: Sequence[Any],
    beside: Lost | None,
) -> None:
    """Undoes one elementary update, x_d' = scale * x_d + shift, and sends its gradients on; changes both lists."""
    d, e = update.dst, update.byproduct
    grad, emitted_grad = grads[d], None
    if e is not None:
        emitted_grad, grads[e] = grads[e], None
    live = grad is not None or emitted_grad is not None
    if update.appends and not live:
        del streams[d:], grads[d:]
        return
    places = [i for i, x in enumerate(streams) if live and i != d and x.is_floating_point() and x.numel()]
    others = [x.detach() if i != d else x for i, x in enumerate(streams[:d] if update.appends else streams)]
    inputs = [others[i].requires_grad_() for i in places]
    with torch.set_grad_enabled(live):
        scale, shift, *emitted = update.terms(tuple(others))
    del others
    # An edge, not the tensor: the value can then go before the gradient is computed.
    pairs: list[tuple[Any, Tensor]] = []
    if emitted_grad is not None and emitted[0].requires_grad:
        pairs.append((get_gradient_edge(emitted[0]), emitted_grad.to(emitted[0].dtype)))
    if grad is not None and shift.requires_grad:
        pairs.append((get_gradient_edge(shift), grad.to(shift.dtype)))
    shift = shift.detach()
    emitted.clear()
    if update.appends:
        del streams[d:], grads[d:]
        del scale, shift, grad, emitted_grad
    else:
        plain, g = isinstance(scale, float) and scale == 1.0, shortcut_of(update, gs)
        with torch.no_grad():
            if work.call.grid is not None:
                streams[d] = x = work.call.grid.restored(update, scale, shift, streams[d], g, beside)
            else:
                x = streams[d] - shift
                streams[d] = x
                if g is not None:
                    streams[d] = x = g.inverse(x)
                elif not plain:
                    streams[d] = x = x.div_(scale)
        if e is not None:  # what stood there before is lost, and read by no step
            streams[e] = x.new_empty(0)
        if grad is not None:
            if g is not None:
                inputs.append(x.detach().requires_grad_())
                with torch.enable_grad():
                    pairs.append((get_gradient_edge(g(inputs[-1])), grad))
            else:
                if isinstance(scale, Tensor) and scale.requires_grad:
                    pairs.append((get_gradient_edge(scale), (grad * x).sum_to_size(scale.shape).to(scale.dtype)))
                grads[d] = grad if plain else grad * (scale.detach() if isinstance(scale, Tensor) else scale)
        del scale, shift, x, grad, emitted_grad
    # On a grid, what the streams have of later updates goes in first: sums come out bit by bit as autograd's own.
    for i, x in zip(places, inputs, strict=False) if work.call.grid is not None and pairs else ():
        before = grads[i]
        if before is not None:
            pairs.append((get_gradient_edge(x), before))
            grads[i] = None
            del before
    found = work.gradients(place, pairs, inputs)
    if len(found) > len(places):
        grads[d] = found.pop()
    for i, g in zip(places, found, strict=True):
        grads[i] = _add(grads[i], g)


def _refuse_captured(call: Call, nodes: list[Any], known: set[int]) -> None:
    """Finds tensors that need a gradient and that a residual function reads without being given them."""
    seen, queue = set(), list(nodes)
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            raise SchemeError(
                f"{call.step.scheme}, step {call.step.index}: a residual function reads a tensor of shape "
                f"{tuple(variable.shape)} that needs a gradient and is neither its parameter nor its argument.\n"
                "  Register it in the residual function's module, or pass it as context: stack(x, context=...)."
            )
        queue += [following for following, _ in node.next_functions]
