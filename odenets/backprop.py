"""Backpropagation that keeps one state instead of all: the states before are made again by the scheme's inverse.

One autograd node per step, chained. A node's backward pass takes the state after its step, undoes the step's elementary
updates from the last to the first, and differentiates each on the way: every residual function runs once forward and
once backward, one function's graph is alive at a time, and no scheme carries backward code of its own. Parameters are
inputs of the nodes, so their gradients leave as soon as they exist.

The nodes share a tape that knows the state before one step. A node that finds it elsewhere (a loss on a middle output,
a second backward pass) moves it there first; nothing depends on the order in which autograd runs the nodes.

What a residual function saw is seen again: generators (only for updates that drew), autocast, parameters and context.
Running statistics are left alone the second time.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from schemes.coupling import Coupling, Update, do, shortcut_of, turned, undo
from schemes.errors import SchemeError
from schemes.scheme import Function, Scheme, State

from . import checks
from .exact import Grid, Lost
from .modes import Exact, Reverse
from .recompute import Generators, statistics_kept

if TYPE_CHECKING:
    from .stack import Stack
    from .step import Step

# Relative gradient error that automatic anchors keep to.
BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-5}
DRIFT_LIMIT = 1e-3
WINDOW = 8  # steps that the measurement of growth runs forward and back


class Owner(NamedTuple):
    """A parameter as a forward pass found it: the dictionary that holds it, its name there, and the tensor."""

    holder: dict[str, Any]
    name: str
    tensor: Tensor


class Call(NamedTuple):
    """All that a step's recomputation needs besides the state."""

    step: "Step"
    shared: nn.Module | None
    t: Any
    context: Any
    owners: list[Owner]
    generators: "list[Generators | None]"  # one per elementary update, None where nothing was drawn
    autocast: list[tuple[str, torch.dtype]]
    scheme: Scheme  # the step's, or what stands for it in training
    grid: Grid | None  # exact arithmetic
    lost: list[Lost | None]  # one per elementary update on the grid: what it did not keep
    over: list[Tensor]  # whether a stream left the range of the grid, per elementary update
    left: set[int]  # by-products among the streams, which the inverse does not make again


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
        self.report: list[tuple[Tensor, Any, bool]] | None = None  # where the drift goes when the pass is over

    def anchor(self, n: int, state: State) -> None:
        """Keeps the state before step n, if an anchor is due there."""
        if (n == 0 and self.keep_first) or (n > 0 and self.every is not None and n % self.every == 0):
            self.kept[n] = tuple(x.detach() for x in state)

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
            state = _undone(self.calls[start], state)
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
            drift = _distance(state, kept, self.calls[n])
            self.drift = drift if self.drift is None else torch.maximum(self.drift, drift)
            state = kept
        self.position, self.state = n, state
        if n == 0 and self.report is not None and self.drift is not None:
            self.report.append(_ready(self.drift, self.grid is not None))
            del self.report[:-4]


def _keep_graph() -> bool:
    """Whether the backward pass that runs now was asked to keep its graph."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]


def _distance(a: State, b: State, call: Call) -> Tensor:
    """|a - b| / |b| over all streams together but those that the inverse leaves, on their device."""
    pairs = [(x, y) for i, (x, y) in enumerate(zip(a, b, strict=True)) if i not in call.left]
    a, b = zip(*pairs, strict=True)
    error = torch.stack([torch.linalg.vector_norm((x - y).float()) for x, y in zip(a, b, strict=True)])
    size = torch.stack([torch.linalg.vector_norm(y.float()) for y in b])
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
        with _autocast(call.autocast):
            return _done(call, state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        tape, n, extras = ctx.tape, ctx.n, ctx.extras
        none = (None, None, None)
        if all(g is None for g in grads):
            return (*none, *(None for _ in ctx.needs_input_grad[3:]))
        call: Call = tape.calls[n]
        wanted = ctx.needs_input_grad[len(ctx.needs_input_grad) - len(extras) :]
        state = tape.take(n + 1, free=not _keep_graph())
        state, found, extra = _backward(call, state, list(grads), extras, wanted)
        tape.move(n, state)
        return (*none, *found, *extra)


def _call(step: "Step", state: State, shared: nn.Module | None, t: Any, context: Any, grid: Grid | None = None) -> Call:
    owners = parameters(step, shared)
    scheme = step.scheme.in_training(step.index, state[-1])
    return Call(step, shared, t, context, owners, [], _autocast_now(state), scheme, grid, [], [], set())


def advance(tape: Tape, step: "Step", state: State, shared: nn.Module | None, t: Any, context: Any) -> State:
    """One step as a node on the tape."""
    n = len(tape.calls)
    tape.anchor(n, state)
    tape.calls.append(_call(step, state, shared, t, context, tape.grid))
    owners = tape.calls[n].owners
    inputs = [o.tensor for o in owners]
    inputs += [x for x in pytree.tree_leaves((t, context)) if isinstance(x, Tensor) and x.requires_grad]
    return _Node.apply(tape, n, len(state), *state, *inputs)  # type: ignore[return-value]


class Monitor:
    """What a stack learns of its own reconstruction: how often it needs anchors, and how far it drifts.

    Attributes:
        every: the spacing of anchors that was chosen, None for no anchors.
        growth: factor by which a rounding error grows per step undone, as measured.
        drift: relative error of made-again states in the last backward pass whose figure has arrived.
    """

    def __init__(self) -> None:
        self.every: int | None = None
        self.growth: float | None = None
        self.drift: float | None = None
        self._pending: list[tuple[Tensor, Any, bool]] = []
        self._over: list[tuple[Tensor, Any, bool]] = []
        self._warned = False

    def __deepcopy__(self, memo: Any) -> "Monitor":
        return Monitor()

    def __reduce__(self) -> Any:
        return Monitor, ()

    def run(
        self,
        stack: "Stack",
        how: Reverse | Exact,
        state: State,
        time: Any,
        context: Any,
        states: list[State] | None = None,
    ) -> State:
        """The steps of a stack on a new tape; ``states`` collects the state after each."""
        if torch._C._are_functorch_transforms_active():
            raise SchemeError("Stack: torch.func transforms cannot pass backprop='reverse'; use backprop='store'.")
        _refuse_inner_shards(stack)
        self._read()
        if _autocast_now(state):  # the inverse subtracts what was added, so the sums stay in single precision
            state = tuple(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in state)
        if isinstance(how, Exact):
            _refuse_compiled(stack)
            grid = Grid(how.bits, state[0].dtype)
            state = tuple(grid.round(x) for x in state)
            tape = Tape(1 if how.store else None, True, grid)
        else:
            tape = Tape(self._anchors(stack, how, state, time, context), how.drift)
        for step in stack.steps:
            state = step(state, stack.block, time, context, None, tape)
            if states is not None:
                states.append(state)
            if isinstance(how, Reverse) and how.check_finite:
                _check_finite(step, state)
            if time is not None:
                time = time + step.scheme.span * step.h
        tape.close(state)
        tape.report = self._pending if tape.keep_first else None
        if tape.grid is not None:
            self._over.append(_ready(tape.over(state)))
            if not state[0].is_cuda:
                self._read()
        return state

    def _anchors(self, stack: "Stack", how: Reverse, state: State, time: Any, context: Any) -> int | None:
        """The spacing of anchors, given or chosen."""
        steps = len(stack.steps)
        if how.memory is not None:
            size = sum(x.numel() * x.element_size() for x in state) / 2**20
            return max(1, -(-steps // max(1, int(float(how.memory) / size))))
        if how.every is not None:
            return how.every or None
        if self.growth is None:
            bound = float(how.bound or BOUNDS.get(state[0].dtype, 1e-5))
            self._measure(stack, state, time, context, bound)
        return self.every

    def _measure(self, stack: "Stack", state: State, time: Any, context: Any, bound: float) -> None:
        """Runs the first steps forward and back, and chooses the spacing of anchors from the growth of the error."""
        window = min(len(stack.steps), WINDOW)
        states = [tuple(x.detach() for x in state)]
        calls: list[Call] = []
        with torch.no_grad(), checks.nothing_changed(stack, always=True):
            for step in stack.steps[:window]:
                calls.append(_call(step, states[-1], stack.block, time, context))
                with _autocast(calls[-1].autocast):
                    states.append(_done(calls[-1], states[-1]))
                if time is not None:
                    time = time + step.scheme.span * step.h
            errors, back = [], states[-1]
            for n in reversed(range(window)):
                back = _undone(calls[n], back)
                errors.append(float(_distance(back, states[n], calls[n])))
        self.growth = _growth(errors)
        self.every = _spacing(errors[0], self.growth, bound, len(stack.steps))

    def _read(self) -> None:
        """Reads what earlier passes found, where the device has it ready: overflow, drift. Warns of drift once."""
        while self._over and _is_ready(self._over[0]):
            if bool(self._over.pop(0)[0]):
                self._over.clear()
                raise SchemeError(
                    "Stack: a stream left the range in which backprop='exact' adds without rounding; "
                    "use fewer binary places, such as backprop='exact(bits=10)', or normalise the streams."
                )
        while self._pending and _is_ready(self._pending[0]):
            value, _, exact = self._pending.pop(0)
            self.drift = float(value)
            if exact and self.drift != 0.0:
                raise SchemeError(
                    f"Stack: backprop='exact' made a state again that is {self.drift:.1e} off: a function gives "
                    "other values the second time. Make it deterministic, or use backprop='reverse'."
                )
            if self.drift <= DRIFT_LIMIT:
                continue
            self.growth = None  # measure anew: learned scales move during training
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"Stack: states made again by the inverse are {self.drift:.1e} off (relative), so gradients are "
                    "too; run Stack.diagnose(x) to see where, and keep more states: backprop='reverse(every=k)'.",
                    stacklevel=5,
                )


def _ready(value: Tensor, exact: bool = False) -> tuple[Tensor, Any, bool]:
    """A figure on its way from the device, and the event that tells its arrival."""
    if not value.is_cuda:
        return value, None, exact
    value, event = value.to("cpu", non_blocking=True), torch.cuda.Event()
    event.record()
    return value, event, exact


def _is_ready(item: tuple[Tensor, Any, bool]) -> bool:
    return item[1] is None or item[1].query()


def _refuse_compiled(stack: "Stack") -> None:
    for step in stack.steps:
        for name, m in step.named_modules():
            if m._compiled_call_impl is not None or type(m).__name__ == "OptimizedModule":
                raise SchemeError(
                    f"Stack: steps.{step.index}.{name} is compiled, and compiled code rounds differently with and "
                    "without gradients; backprop='exact' needs it eager, or use backprop='reverse'."
                )


def _growth(errors: list[float]) -> float:
    """g for which errors[k] = errors[0] * (1 + g + ... + g^k): 1 where each step adds its own rounding only."""
    n = len(errors)
    if n < 2 or not 0 < errors[0] < math.inf or not errors[-1] < math.inf:
        return 1.0 if all(e < math.inf for e in errors) else math.inf
    ratio = errors[-1] / errors[0]
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**k for k in range(n)) < ratio else (low, middle)
    return max(1.0, low)


def _spacing(first: float, growth: float, bound: float, depth: int) -> int | None:
    """The largest number of steps between anchors that keeps the predicted error below the bound."""
    error, added = 0.0, first
    for k in range(1, depth):
        error, added = error + added, added * growth
        if not error + added <= bound:
            return k
    return None


def _check_finite(step: "Step", state: State) -> None:
    for i, x in enumerate(state):
        if not torch.isfinite(x).all():
            raise SchemeError(f"{step.scheme}, step {step.index}: stream {i} is not finite after this step.")


def _refuse_inner_shards(stack: "Stack") -> None:
    for step in stack.steps:
        for name, module in step.named_modules():
            if name and type(module).__name__.startswith("FSDP"):
                raise SchemeError(
                    f"Stack: steps.{step.index}.{name} is sharded inside a step, which backprop='reverse' cannot undo: "
                    "shard whole steps, fully_shard(stack.steps[n]), or the root."
                )


def parameters(*modules: nn.Module | None) -> list[Owner]:
    """The parameters of some modules that need a gradient, each once, and where they are held."""
    found: dict[int, Owner] = {}
    for module in modules:
        for m in module.modules() if module is not None else ():
            for name, p in m._parameters.items():
                if p is not None and p.requires_grad:
                    found.setdefault(id(p), Owner(m._parameters, name, p))
    return list(found.values())


# Recomputation ----------------------------------------------------------------------------------------------------


@contextmanager
def _autocast(states: list[tuple[str, torch.dtype]]) -> Iterator[None]:
    with ExitStack() as contexts:
        for device, dtype in states:
            contexts.enter_context(torch.autocast(device, dtype, cache_enabled=False))
        yield


@contextmanager
def _held(owners: list[Owner], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the modules hold ``tensors`` where the forward pass found ``owners``."""
    before = [o.holder.get(o.name) for o in owners]
    try:
        for owner, tensor in zip(owners, tensors, strict=True):
            owner.holder[owner.name] = tensor
        yield
    finally:
        for owner, tensor in zip(owners, before, strict=True):
            owner.holder[owner.name] = tensor


def _as_found(owner: Owner) -> bool:
    """Whether the module still holds the very tensor, and a gradient can be asked of it without side effects."""
    return owner.holder.get(owner.name) is owner.tensor and owner.tensor.is_leaf and not owner.tensor._backward_hooks


def _check_storage(call: Call) -> None:
    for owner in call.owners:
        if owner.tensor.untyped_storage().size() == 0:
            raise SchemeError(
                f"Stack: the parameters of step {call.step.index} are sharded away when the backward pass needs them; "
                "shard whole steps or the root, or fully_shard(..., reshard_after_forward=False)."
            )


def _elementary(call: Call, state: State, t: Any, context: Any) -> list[tuple[Any, Sequence[Function], Any, Any]]:
    step = call.step
    h = step.h
    fs, gs = step.functions(state, call.shared, t, context, h)
    return call.scheme.elementary(fs, h, gs)


def _done(call: Call, state: State) -> State:
    """The step; notes the generators of each elementary update that drew from them."""
    call.generators.clear()
    call.lost.clear()
    before = Generators.now(state[0].device)
    buffers = list(call.step.buffers()) if call.step.training else []
    saved = [b.clone() for b in buffers]
    start = before
    try:
        for scheme, fs, h, gs in _elementary(call, state, call.t, call.context):
            if not isinstance(scheme, Coupling):
                state = scheme.advance(fs, state, h, gs)
                before = before.drawn(call.generators)
                continue
            for update in scheme.updates(fs, h, len(state)):
                state = do(update, state, gs) if call.grid is None else call.grid.do(update, state, gs, call.lost)
                if call.grid is not None:
                    call.over.append(call.grid.over(state[update.dst]))
                if update.emit is not None:
                    call.left.add(update.emit)
                before = before.drawn(call.generators)
            state = turned(state, scheme.turn)
    except Exception as error:
        start.set()
        for b, value in zip(buffers, saved, strict=True):
            b.data.copy_(value)
        error.add_note(f"{call.step.scheme}, step {call.step.index}: statistics and generators are as before the step")
        raise
    return state


def _autocast_now(state: State) -> list[tuple[str, torch.dtype]]:
    return [
        (device, torch.get_autocast_dtype(device))
        for device in dict.fromkeys(("cpu", state[0].device.type))
        if torch.is_autocast_enabled(device)
    ]


def _replayed(generators: "Generators | None") -> Any:
    return nullcontext() if generators is None else generators.replayed()


def _undone(call: Call, state: State) -> State:
    """The state before the step, without gradients."""
    _check_storage(call)
    with (
        torch.no_grad(),
        _held(call.owners, [o.tensor for o in call.owners]),
        statistics_kept([call.step, *([call.shared] if call.shared is not None else [])]),
        _autocast(call.autocast),
    ):
        drawn, lost = list(call.generators), list(call.lost)
        for scheme, fs, h, gs in reversed(_elementary(call, state, call.t, call.context)):
            if not isinstance(scheme, Coupling):
                with _replayed(drawn.pop()):
                    state = scheme.retreat(fs, state, h, gs)
                continue
            state = turned(state, -scheme.turn)
            for update in reversed(scheme.updates(fs, h, len(state) - scheme.made)):
                with _replayed(drawn.pop()):
                    state = undo(update, state, gs) if call.grid is None else call.grid.undo(update, state, gs, lost)
    return state


def _backward(
    call: Call, state: State, grads: list[Tensor | None], extras: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[State, list[Tensor | None], list[Tensor | None]]:
    """Undoes and differentiates a step: the state before it, the gradients of its streams and of the extra inputs."""
    _check_storage(call)
    count = len(call.owners)
    direct = all(_as_found(o) for o in call.owners)
    leaves = list(extras) if direct else [x.detach().requires_grad_(w) for x, w in zip(extras, wanted, strict=True)]
    leaves[count:] = [x.detach().requires_grad_() for x in extras[count:]]
    t, context = _replaced((call.t, call.context), leaves[count:])
    ask = [x for x, w in zip(leaves, wanted, strict=True) if w]
    sums: list[Tensor | None] = [None] * len(ask)
    with (
        nullcontext() if direct else _held(call.owners, leaves[:count]),
        statistics_kept([call.step, *([call.shared] if call.shared is not None else [])]),
        _autocast(call.autocast),
    ):
        drawn, lost = list(call.generators), list(call.lost)
        known = {id(x) for x in leaves}
        with torch.enable_grad():  # a learned step size enters the updates' closures here
            parts = _elementary(call, state, t, context)
        for scheme, fs, h, gs in reversed(parts):
            if not isinstance(scheme, Coupling):
                with _replayed(drawn[-1]), torch.no_grad():
                    state = scheme.retreat(fs, state, h, gs)
                with _replayed(drawn.pop()), torch.enable_grad():
                    inputs = [x.detach().requires_grad_() for x in state]
                    outputs = scheme.advance(fs, tuple(inputs), h, gs)
                pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
                grads = list(_gradients(pairs, inputs, ask, sums))
                continue
            state, grads = turned(state, -scheme.turn), list(turned(tuple(grads), -scheme.turn))  # type: ignore
            with torch.enable_grad():
                updates = scheme.updates(fs, h, len(state) - scheme.made)
            for update in reversed(updates):
                with _replayed(drawn.pop()):
                    state = _differentiate(call, update, state, grads, gs, ask, sums, known, lost)
    found = iter(sums)
    return state, grads, [next(found) if w else None for w in wanted]


def _replaced(tree: Any, leaves: Sequence[Tensor]) -> Any:
    """The tree with its tensors that need a gradient replaced, in order."""
    rest = iter(leaves)
    return pytree.tree_map(lambda x: next(rest) if isinstance(x, Tensor) and x.requires_grad else x, tree)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _gradients(
    pairs: list[tuple[Any, Tensor]],
    inputs: Sequence[Tensor],
    ask: list[Tensor],
    sums: list[Tensor | None],
    keep: bool = False,
) -> Sequence[Tensor | None]:
    """Gradients of (output, gradient) pairs at the inputs; those at ``ask`` are added to ``sums``."""
    if not pairs:
        return [None] * len(inputs)
    outputs, grads = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, [*inputs, *ask], grads, retain_graph=keep, allow_unused=True)
    for i, g in enumerate(found[len(inputs) :]):
        sums[i] = _add(sums[i], g)
    return found[: len(inputs)]


def _differentiate(
    call: Call,
    update: Update,
    state: State,
    grads: list[Tensor | None],
    gs: Sequence[Any],
    ask: list[Tensor],
    sums: list[Tensor | None],
    known: set[int],
    lost: list[Lost | None],
) -> State:
    """Undoes one elementary update, x_d' = scale * x_d + shift, and sends its gradients on; changes ``grads``."""
    d = update.dst
    grad = grads[d]
    emitted_grad = None
    if update.emit is not None:
        emitted_grad, grads[update.emit] = grads[update.emit], None
    live = grad is not None or emitted_grad is not None
    beside = lost.pop() if call.grid is not None else None
    if update.makes:
        state, made = state[:d], grads[d:]
        del grads[d:]
        if not live:
            return state
        grad = made[0]
    others = [x.detach() if i != d else x for i, x in enumerate(state)]
    inputs = [x.requires_grad_() for i, x in enumerate(others) if live and i != d and x.is_floating_point()]
    with torch.set_grad_enabled(live):
        scale, shift, *emitted = update.terms(tuple(others))
    pairs: list[tuple[Any, Tensor]] = []
    if emitted_grad is not None and emitted[0].requires_grad:
        pairs.append((get_gradient_edge(emitted[0]), emitted_grad.to(emitted[0].dtype)))
    if grad is not None and shift.requires_grad:
        # An edge, not the tensor: the value can then go before the gradient is computed.
        pairs.append((get_gradient_edge(shift), grad.to(shift.dtype)))
    if pairs and not call.step.searched:
        _refuse_captured(call, [edge.node for edge, _ in pairs], known | {id(x) for x in inputs})
        call.step.searched = True
    shift, emitted = shift.detach(), []
    places = [i for i, x in enumerate(others) if live and i != d and x.is_floating_point()]
    del others

    own: Tensor | None = None  # the gradient of x_d itself
    g = shortcut_of(update, gs)
    if not update.makes:
        with torch.no_grad():
            if call.grid is not None:
                x = call.grid.restored(update, scale, shift, state[d], g, beside)
            else:
                x = state[d] - shift
                if g is not None:
                    x = g.inverse(x)
                elif not (isinstance(scale, float) and scale == 1.0):
                    x = x / scale.detach() if isinstance(scale, Tensor) else x / scale
        state = (*state[:d], x, *state[d + 1 :])
        if grad is not None:
            if g is not None:
                leaf = x.detach().requires_grad_()
                with torch.enable_grad():
                    scaled = g(leaf)
                pairs.append((scaled, grad))
                inputs.append(leaf)
            else:
                if isinstance(scale, Tensor) and scale.requires_grad:
                    pairs.append((scale, (grad * x).sum_to_size(scale.shape).to(scale.dtype)))
                    own = grad * scale.detach()
                else:
                    own = grad if isinstance(scale, float) and scale == 1.0 else grad * scale
    del shift, scale
    # What the streams have of later updates goes in first, so that sums come out bit by bit as autograd's own.
    if pairs:
        for i, x in zip(places, inputs, strict=False):
            before = grads[i]
            if before is not None:
                pairs.append((x, before))
                grads[i] = None
    # A learned step size that a scheme multiplies once is one graph under all updates: it must survive each of them.
    found = list(_gradients(pairs, inputs, ask, sums, keep=isinstance(call.step.h, Tensor)))
    if not update.makes:
        grads[d] = found.pop() if g is not None and grad is not None else own
    for i, more in zip(places, found, strict=True):
        grads[i] = _add(grads[i], more)
    return state


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
