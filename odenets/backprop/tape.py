"""Backpropagation that keeps one state instead of all: earlier states are reconstructed by the scheme's inverse.

Each step is an autograd node; the nodes form a chain. A node's backward pass takes the state after its step, undoes the
elementary updates from the last to the first, and differentiates each on the way. Every residual function then runs
once forward and once backward, one function's graph is alive at a time, and no scheme needs backward code of its own.
Parameters are inputs of the nodes, so their gradients leave a node as soon as they exist.

The nodes share a tape that holds the state before one step. A node that finds the tape elsewhere (a loss on a middle
output, a second backward pass) moves it first; nothing depends on the order in which autograd runs the nodes.
"""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.module import _global_forward_hooks

from schemes.coupling import Coupling, Update, rotated, shortcut_of
from schemes.errors import SchemeError
from schemes.scheme import Function, State

from ..step import Step
from .given import tensors_in, with_tensors
from .grid import Grid, Spilled
from .guard import Guard, Leftover, learn, needed, refuse_awaited, refuse_hook, refuse_retained
from .limits import raise_in_our_words
from .members import Held, Members, Slot, remembered, swapped
from .monitor import PendingScalar, distance
from .replay import (
    NOTHING,
    StepRecord,
    as_it_ran,
    autocast_as,
    invert_step,
    is_lost,
    lost,
    members_of,
    parts_of,
    replayed,
    run_step,
    updates_of,
)
from .surroundings import Surroundings, torch_functions
from .walk import AGAIN, Pass

_ENGINE: Any = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]


class Tape:
    """The states of one forward pass: the last one, some anchors, and the one where the backward pass is.

    Args:
        every: keep a state every so many steps; None keeps none.
        keep_first: whether to keep the first state, to compare it with its reconstruction.
        grid: exact arithmetic, or None.
        given: the pass.
    """

    def __init__(self, every: int | None, keep_first: bool, grid: Grid | None, given: Pass):
        self.every, self.keep_first, self.grid = every, keep_first, grid
        self.mode = "reverse" if grid is None else "exact"  # for messages
        self.wrap, self.monitor, self.sink, self.inverted = given.wrap, given.monitor, given.sink, given.inverted
        self.records: list[StepRecord] = []
        self.left: list[tuple[int, int]] = []  # addresses and versions of the streams that the last node returned
        self.kept: dict[int, State] = {}  # n: the state before step n, as it was
        self.versions: dict[int, list[int]] = {}  # of the kept states, which others may hold and write to
        self.first: State = ()  # leads the graph to what the first state was computed from
        self.observed = given.on_step is not None
        self.shown: list[ref[Tensor]] = []  # the streams within the pass that a user may hold
        self.complex = False  # whether the first streams are complex
        # The state before step ``position`` is where the backward pass is; None where the tape holds no such state.
        self.position: int | None = None
        self.state: State = ()
        self.drift: Tensor | None = None
        self.report: list[PendingScalar] | None = None  # receives the drift at the end of the backward pass

    def run(self, step: Step, state: State, shared: nn.Module | None, t: Any, context: Any, h: Any) -> State:
        """Runs one step as a node on this tape."""
        # Nodes are numbered by the tape and not by the stack, since a plan may start a tape in the middle.
        n, added = len(self.records), step.scheme.streams_added
        self._same_streams(state)
        if n == 0:
            self.complex = all(x.is_complex() for x in state)
            # The graph before the first step contains no node of this tape. Leaves cost nothing where no state is kept.
            self.first = state if self.keep_first or all(x.is_leaf for x in state) else (_Way.apply(*state),)  # type: ignore
        # Undoing a step that appends streams drops them with their errors, so the state after it is kept, too.
        first = n == 0 or (n == 1 and self.records[0].step.scheme.streams_added > 0 == added)
        if (first and self.keep_first) or (n > 0 and self.every is not None and n % self.every == 0):
            self._keep(n, state)
        members, held = self._members(step, shared)
        record = StepRecord(step, state, shared, t, context, members, self.grid, self.sink, self.inverted, held)
        self.records.append(record)
        inputs = [*record.parameters]
        if t is not None or context is not None:
            # Only what needs a gradient: each input of a node costs an edge, and a context may hold many tensors.
            inputs += [x for x in tensors_in((t, context)) if x.requires_grad]
        # If so, no backward pass will come here and search for captured tensors: the forward pass must do it.
        record.alone = not inputs and not any(x.requires_grad for x in state)
        # Bypasses ``Function.apply``, which checks for torch.func transforms; these were refused when the pass began.
        state = super(torch.autograd.Function, _Node).apply(self, n, len(state), *state, *inputs)  # type: ignore
        self.left = _places(state)
        if self.observed or step._forward_hooks or _global_forward_hooks:
            self.shown += map(ref, state)
        if self.sink is None:
            return state
        # The node returns the step's auxiliary values after its streams.
        count = len(state) - len(record.sink.names)  # type: ignore[union-attr]
        self.left = self.left[:count]
        for name, value in zip(record.sink.names, state[count:], strict=True):  # type: ignore[union-attr]
            self.sink.add(name, value)
        return state[:count]

    def _members(self, step: Step, shared: nn.Module | None) -> tuple[Members, Held]:
        return remembered(
            self.monitor.members, step.index, (shared, step), lambda _: members_of(step, shared, self.mode)
        )

    def _same_streams(self, state: State) -> None:
        """Refuses streams other than those that the previous step returned, from which its inverse starts."""
        if self.records and self.left != _places(state):
            raise SchemeError(
                f"Stack: a hook on {self.records[-1].where} changes its streams, which backprop='{self.mode}' cannot "
                "undo.\n"
                "  Hang it on the residual functions, or use backprop='store' or 'checkpoint'."
            )

    def close(self, state: State) -> None:
        """Keeps the last state, from which the backward pass starts."""
        self._same_streams(state)
        if any(x.is_complex() for x in state) and not self.complex:
            raise SchemeError(
                f"Stack: a residual function makes real streams complex, which backprop='{self.mode}' cannot undo.\n"
                "  Give a complex input, x.to(torch.complex64), or use backprop='store' or 'checkpoint'."
            )
        # The output itself, not a copy: this costs nothing, and the version reveals a write to it.
        self._keep(len(self.records), state)

    def _keep(self, n: int, state: State) -> None:
        # Detached: with its graph, a state would keep its own node and all nodes before it alive.
        self.kept[n] = kept = tuple(x.detach() for x in state)
        self.versions[n] = [x._version for x in kept]

    def _unchanged(self, n: int) -> bool:
        return [x._version for x in self.kept[n]] == self.versions[n]

    def sources(self) -> list[Tensor]:
        """The tensors that gradients of this pass depend on: first state, states shown, parameters, time, context."""
        given = [x for record in self.records for x in (*record.parameters, *tensors_in((record.t, record.context)))]
        shown = [x for seen in self.shown if (x := seen()) is not None]
        return [x for x in {id(x): x for x in (*self.first, *shown, *given)}.values() if x.requires_grad]

    def over(self, state: State) -> Tensor:
        """Whether any stream left the grid's range in this pass."""
        assert self.grid is not None
        flags = [self.grid.over(x) for x in state]
        return torch.stack([f for record in self.records for f in record.overflow] + flags).any()

    def before(self, n: int) -> State:
        """The state before step n, reconstructed from the nearest known state at or after it."""
        # A state can be reconstructed from any later one: a kept state, or the one at the current position.
        places = [p for p in self.kept if p >= n]
        if self.position is not None and self.position >= n:
            places.append(self.position)
        if not places:
            raise RuntimeError(
                "Trying to backward through a stack a second time: its states are freed. "
                "Specify retain_graph=True if you need to backward through it again."
            )
        # The nearest one: each step in between costs an evaluation of its functions.
        start = min(places)
        last = len(self.records)
        given = self.kept.get(start)
        # A reconstruction at the position is valid even if the kept state there was written to.
        if given is not None and (start != self.position or self.state is given) and not self._unchanged(start):
            what = "output" if start == last else f"state before step {self.records[start].step.index}"
            raise RuntimeError(
                f"Stack: its {what} was changed in place; {self.mode} backprop starts from it. Clone it."
            )
        state = self.state if start == self.position else given
        assert state is not None
        while start > n:
            start -= 1
            # Undone for the state only; the step's own node will undo it again if a gradient arrives there.
            state = invert_step(self.records[start], state)
        return state

    def take(self, n: int, free: bool) -> State:
        """The state before step n; with ``free`` the tape releases it and all later states."""
        state = self.before(n)
        if free:
            # Released before the step is undone, so that later states do not add to the memory of its graphs.
            self.position, self.state = None, ()
            for p in [p for p in self.kept if p >= n]:
                del self.kept[p]
        return state

    def move(self, n: int, state: State) -> None:
        """Moves the tape to the state before step n, and compares it with the state that was kept there, if any."""
        kept = self.kept.get(n)
        # A kept state that was written to since says nothing about drift; the reconstruction is used instead.
        if kept is not None and self._unchanged(n):
            drift = distance(state, kept)
            # The maximum stays on the device: reading it here would wait for the backward pass.
            self.drift = drift if self.drift is None else torch.maximum(self.drift, drift)
            # The kept state replaces the reconstruction, so that errors do not grow past an anchor.
            state = kept
        # No state is reconstructed from the one before the first step; a retained graph would keep it alive.
        self.position, self.state = (n, state) if n else (None, ())
        if n == 0 and self.report is not None and self.drift is not None:
            self.report.append(PendingScalar.of(self.drift, self.grid is not None))
            # Bounded, since with many backward passes and few forward calls they may not be read for long.
            del self.report[:-4]


def _places(state: State) -> list[tuple[int, int]]:
    return [(x.data_ptr(), x._version) for x in state]


def _keep_graph() -> bool:
    """Whether the current backward pass retains its graph."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]


class _Way(torch.autograd.Function):
    """An empty tensor computed from others: it leads to them in the graph, but keeps none of them alive."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        return tensors[0].new_empty(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # pragma: no cover  an error is raised before it
        return tuple(None for _ in ctx.needs_input_grad)


class _Node(torch.autograd.Function):
    """One step: forward without a graph, backward by the inverse."""

    @staticmethod
    def forward(ctx: Any, tape: Tape, n: int, streams: int, *tensors: Tensor) -> State:
        record = tape.records[n]
        ctx.tape, ctx.n, ctx.extras = tape, n, tensors[streams:]
        # None must stay None: it distinguishes streams that no loss depends on from those with a gradient of zero.
        ctx.set_materialize_grads(False)
        watched = needed(record.members, record.flags.names)
        unseen = record.alone and record.members.may_capture
        guard = Guard(record.where) if watched or unseen else None
        around = None if guard is None else guard.apply
        if guard is not None and unseen:
            around = partial(guard.alone, refuse=partial(refuse_captured, record, tape.mode))
        # Forward mode is off inside an autograd function, which restores it itself; a residual function may use it.
        torch._C._set_fwd_grad_enabled(True)
        # Tells nested stacks that round that their sums must be those of the replay, see ``Mode.needed``.
        outer, AGAIN.inside = AGAIN.inside, True
        try:
            # Autocast without its cache: weights cast here, without a graph, must not reach a pass that needs one.
            with tape.monitor.lock, autocast_as(record.autocast):
                state = run_step(record, tensors[:streams], tape.wrap, around)
                if watched:
                    left = learn(record.members, record.left_in_context())
                    refuse_retained(left)
                    record.left = [Leftover.of(x) for x in left]
        finally:
            AGAIN.inside = outer
        ctx.streams = len(state)
        if record.sink is not None:
            names = record.sink.names
            # Taken out, so that the record keeps none of them alive; the names stay, since the tape reads them next.
            state = (*state, *(x.detach() for x in record.sink.take()))
            record.sink.names = names
        return state

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        twice = torch.is_grad_enabled()  # the backward pass was called with create_graph=True
        # The results must depend on all sources, or a second derivative with respect to one would be missing silently.
        # Collected now, since undoing a step releases them.
        ways = [*ctx.tape.sources(), *(g for g in grads if g is not None and g.requires_grad)] if twice else []
        # Under the lock, since a forward pass of another thread would see the leaves that replace parameters here.
        with torch.no_grad(), ctx.tape.monitor.lock, torch_functions():
            try:
                found = _Node.once(ctx, grads)
            except RuntimeError as error:
                raise_in_our_words(error)
                raise
        if not twice:
            return found
        # Always, even if the incoming gradients need no graph: the graph through the states would be missing.
        leaves = [None if g is None else g.detach().requires_grad_() for g in found]
        scheme = ctx.tape.records[ctx.n].step.scheme
        message = (
            f"Stack: backprop='{ctx.tape.mode}' cannot be differentiated twice ({scheme}); "
            "use backprop='store' or 'checkpoint' for gradients of gradients."
        )
        error = torch._C._functions.DelayedError(message, len(leaves) + len(ways))  # type: ignore[attr-defined]
        return tuple(error(*leaves, *ways)[: len(leaves)])

    @staticmethod
    def once(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """The gradients of the inputs of one step."""
        tape, n, extras = ctx.tape, ctx.n, ctx.extras
        none = (None, None, None)
        # No gradient arrives: nothing is undone, and the tape stays where it is.
        if all(g is None for g in grads):
            return (*none, *(None for _ in ctx.needs_input_grad[3:]))
        refuse_awaited(tape.records[n].left, tape.records[n].where)
        # Counted from the end, where the extra inputs are.
        wanted = ctx.needs_input_grad[len(ctx.needs_input_grad) - len(extras) :]
        # A list, whose streams are replaced one by one: a tuple would keep all of them alive to the end.
        streams = list(tape.take(n + 1, free=not _keep_graph()))
        step = _StepBackward(tape, n, extras, wanted, list(grads[ctx.streams :]))
        found, extra = step.run(streams, list(grads[: ctx.streams]))
        tape.move(n, tuple(streams))
        if n == 0 and not _keep_graph():
            # Only the first state is left: ``take`` has released the later ones.
            tape.kept.clear()
            tape.first = ()
        return (*none, *found, *extra)


class _StepBackward:
    """Undoes one step and differentiates it, update by update; collects the gradients of its extra inputs.

    Args:
        tape: the tape.
        n: number of the step.
        extras: the extra inputs: parameters, then tensors of the time and the context.
        wanted: which of the extra inputs need a gradient.
        auxiliary: the gradients of the step's auxiliary values.
    """

    def __init__(
        self,
        tape: Tape,
        n: int,
        extras: Sequence[Tensor],
        wanted: Sequence[bool],
        auxiliary: list[Tensor | None],
    ):
        self.auxiliary, self.counts = auxiliary, list(tape.records[n].counts)
        self.tape, self.n, self.record = tape, n, tape.records[n]
        record, count = self.record, len(self.record.parameters)
        # Parameters can serve as leaves themselves if this has no side effects: no hooks, nothing else in their place.
        self.direct = all(_untouched(slot) for slot in record.slots)
        # That saves a leaf and a swap for each, most of the cost of a step's bookkeeping.
        own = count if self.direct else 0
        leaves = [
            *extras[:own],
            *(x.detach().requires_grad_(w) for x, w in zip(extras[own:], wanted[own:], strict=True)),
        ]
        self.leaf_of = {id(x): leaf for x, leaf in zip(extras[count:], leaves[count:], strict=True)}
        self.leaves: list[Tensor] = []
        if not self.direct:
            # By identity: a tied parameter has several places and must be the same leaf in all of them.
            leaf_of = {id(p): leaf for p, leaf in zip(record.parameters, leaves, strict=False)}
            self.leaves = [leaf_of[id(slot.value)] for slot in record.slots]
        self.given, self.wanted = leaves, wanted
        self.ask = [x for x, w in zip(leaves, wanted, strict=True) if w]
        # What is computed from a step size or a time that needs a gradient has a graph, which a backward pass frees:
        # the parts are then rebuilt for each update.
        self.anew = any(isinstance(x, Tensor) and x.requires_grad for x in (record.step.h, record.t))
        # A context with leaves is a copy, of its contents at that moment: one per update if the step changes any.
        self.anew = self.anew or (bool(self.leaf_of) and record.read is None)
        self.sums: list[Tensor | None] = [None] * len(self.ask)
        self.asks = record.members.asks

    def parts(self) -> list[Any]:
        """The step's elementary schemes, with the leaves; a learned step size enters functions and updates here."""
        record = self.record
        # Substituted here, where a context holds what it held when the step, or one of its updates, ran.
        given = record.t, record.context
        if self.leaf_of:
            given = with_tensors(given, lambda x: self.leaf_of.get(id(x), x))
        with torch.enable_grad() if self.anew else NOTHING:
            return parts_of(record, *given)

    def run(self, streams: list[Tensor], grads: list[Tensor | None]) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """The gradients of the streams before the step, and of the extra inputs.

        ``streams``, the state after the step, becomes the state before it, one stream at a time, so that no stream
        outlives its use.
        """
        record = self.record
        notes, spills = list(record.notes), list(record.spills)
        anew = self.anew
        with as_it_ran(record), NOTHING if self.direct else swapped(record.slots, self.leaves):
            fixed = None if anew else self.parts()
            for k in reversed(range(len(fixed or self.parts()))):
                scheme, fs, h, gs = (fixed or self.parts())[k]
                if not isinstance(scheme, Coupling):
                    note = notes.pop()
                    if anew:
                        with replayed(note):
                            scheme, fs, h, gs = self.parts()[k]
                    grads = self._whole(scheme, fs, h, gs, streams, grads, note)
                    continue
                # The step ended with the rotation, so undoing begins with its inverse; gradients move with their
                # streams.
                streams[:], grads = rotated(tuple(streams), -scheme.rotate), [*rotated(tuple(grads), -scheme.rotate)]  # type: ignore
                count = len(streams) - scheme.streams_added
                with torch.enable_grad() if anew else NOTHING:
                    updates = updates_of(record, scheme, fs, h, count, gs)
                for i in reversed(range(len(updates))):
                    # One note per update, in order of the forward pass: the last one belongs to this update.
                    with replayed(notes.pop()):
                        if anew:
                            _, fs, h, gs = self.parts()[k]
                            with torch.enable_grad():
                                updates = updates_of(record, scheme, fs, h, count, gs)
                        spill = spills.pop() if spills else None
                        self._update(len(notes), updates[i], streams, grads, gs, spill)
        found = iter(self.sums)
        return grads, [next(found) if w else None for w in self.wanted]

    def _gradients(self, place: int, pairs: list[tuple[Any, Tensor]], inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of (edge, gradient) pairs at the inputs, those of the extra inputs summed; empties ``pairs``."""
        count = len(inputs)
        if not pairs:
            return [None] * count
        searched = (self.record.step.index, place)  # the index in the stack: a tape may begin at any of its steps
        # A user's own functions are searched every time, since what they capture may begin to need a gradient.
        if self.record.members.may_capture or searched not in self.tape.monitor.searched:
            known = {id(x) for x in (*self.given, *inputs)}
            refuse_captured(self.record, self.tape.mode, [edge.node for edge, _ in pairs], known)
            self.tape.monitor.searched.add(searched)
        for x in inputs:
            if x._backward_hooks:
                refuse_hook(self.record.where)
        edges, grads = zip(*pairs, strict=True)
        pairs.clear()
        # One call for streams and parameters together: the graph is traversed once, and freed on the way. This is the
        # last line of torch.autograd.grad, whose checks of shapes and dtypes cost as much as a small layer.
        inputs = (*inputs, *self.ask)
        # Unlike ``backward``, this accumulates nothing in ``grad``: the engine does so for the inputs of the node.
        found = _ENGINE.run_backward(edges, grads, False, False, inputs, True, accumulate_grad=False)
        self.sums = [
            b if a is None else a if b is None else a + b for a, b in zip(self.sums, found[count:], strict=True)
        ]
        return list(found[:count])

    def _whole(
        self,
        scheme: Any,
        fs: Sequence[Function],
        h: Any,
        gs: Sequence[Function],
        streams: list[Tensor],
        grads: list[Tensor | None],
        note: Surroundings | None,
    ) -> list[Tensor | None]:
        """Undoes and differentiates a scheme that is not a list of updates: its whole graph is alive."""
        # The note is replayed twice, so that the inverse and the step draw the same numbers.
        with replayed(note), torch.set_grad_enabled(self.asks):
            # Without elementary updates, the step is undone as a whole before it is run with a graph.
            streams[:] = [x.detach() for x in scheme._inverse(fs, tuple(streams), h, gs)]
        with replayed(note), torch.enable_grad():
            # New leaves: the step is replayed from the state that its inverse has just returned.
            inputs = [x.detach().requires_grad_() for x in streams]
            outputs = scheme._step(fs, tuple(inputs), h, gs)
        pairs = [
            (get_gradient_edge(o), g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad
        ]
        del outputs
        pairs += self._auxiliary_pairs(self._auxiliary_gradients())
        return self._gradients(-1, pairs, inputs)

    def _auxiliary_gradients(self) -> list[Tensor | None]:
        """Removes and returns the gradients of the auxiliary values of the next update on the way back."""
        count = self.counts.pop() if self.counts else 0
        found = self.auxiliary[len(self.auxiliary) - count :]
        del self.auxiliary[len(self.auxiliary) - count :]
        return found

    def _auxiliary_pairs(self, grads: list[Tensor | None]) -> list[tuple[Any, Tensor]]:
        """Edges of the auxiliary values that the functions have just returned, with their gradients."""
        sink = self.record.sink
        if sink is None:
            return []
        values = sink.take()
        pairs = zip(values[len(values) - len(grads) :], grads, strict=True)
        return [_pair(v, g) for v, g in pairs if g is not None and v.requires_grad]

    # long: the order in which tensors are made and dropped is the peak memory of the pass, to be read in one piece
    def _update(
        self,
        place: int,
        update: Update,
        streams: list[Tensor],
        grads: list[Tensor | None],
        gs: Sequence[Any],
        spill: Spilled | None,
    ) -> None:
        """Undoes one elementary update, x_d' = scale * x_d + shift, and propagates its gradients; changes both lists.

        The shift is computed once, with a graph: its value recovers x_d, its graph the gradients of what it read.
        """
        d, e = update.dst, update.byproduct
        grad, byproduct_grad = grads[d], None
        if e is not None:
            # The stream at e before the update was overwritten, so no gradient reaches it from later updates.
            byproduct_grad, grads[e] = grads[e], None
        auxiliary = self._auxiliary_gradients()
        live = any(g is not None for g in (grad, byproduct_grad, *auxiliary))
        if update.appends and not live:
            del streams[d:], grads[d:]
            return
        # Without a gradient the update is undone without a graph: for a loss on one output, most streams have none yet.
        graph = live or self.asks  # a function that asks for a graph has computed with one
        # Leaves for all streams but x_d, which no term reads: the update could not be undone otherwise.
        places = [i for i, x in enumerate(streams) if graph and i != d and _differentiable(x) and not is_lost(x)]
        others = [x.detach() if i != d else x for i, x in enumerate(streams[:d] if update.appends else streams)]
        inputs = [others[i].requires_grad_() for i in places]
        with torch.set_grad_enabled(graph):
            scale, shift, *byproducts = update.terms(tuple(others))
        del others  # it would keep x_d' alive after its replacement
        # Edges, not tensors, so that the values can be freed before the gradients are computed.
        pairs: list[tuple[Any, Tensor]] = []
        if byproduct_grad is not None and byproducts[0].requires_grad:
            pairs.append(_pair(byproducts[0], byproduct_grad))
        if grad is not None and shift.requires_grad:
            pairs.append(_pair(shift, grad))
        pairs += self._auxiliary_pairs(auxiliary)
        # The edges hold its graph from here on; undoing needs its value only.
        shift = shift.detach()
        byproducts.clear()
        if update.appends:
            del streams[d:], grads[d:]
        else:
            # Undone first: the gradients of the scale and the shortcut are taken at x_d, not at x_d'.
            x = self._undo(update, scale, shift, streams, gs, spill)
            if grad is not None:
                grads[d] = self._through_scale(update, scale, x, grad, gs, pairs, inputs)
            del x
        # Freed before the backward call, so that it can use their memory.
        del scale, shift, grad, byproduct_grad
        # On a grid, gradients from later updates enter the same backward call, so that sums match autograd's own bits.
        for i, x in zip(places, inputs, strict=False) if self.record.grid is not None and pairs else ():
            if grads[i] is not None:
                pairs.append((get_gradient_edge(x), grads[i]))  # type: ignore[arg-type]
                grads[i] = None
        found = self._gradients(place, pairs, inputs)
        # The leaf of a shortcut was appended last.
        if len(found) > len(places):
            grads[d] = found.pop()
        for i, g in zip(places, found, strict=True):
            # Out of place, since autograd may share an incoming gradient with other nodes.
            old = grads[i]
            grads[i] = g if old is None else old if g is None else old + g

    def _undo(
        self, update: Update, scale: Any, shift: Tensor, streams: list[Tensor], gs: Sequence[Any], spill: Spilled | None
    ) -> Tensor:
        """Replaces x_d' by x_d = (x_d' - shift) / scale, and returns it."""
        d, g = update.dst, shortcut_of(update, gs)
        if self.record.grid is not None:
            streams[d] = x = self.record.grid.before(update, scale, shift, streams[d], g, spill)
        else:
            streams[d] = x = streams[d] - shift
            if g is not None:
                streams[d] = x = g.inverse(x)
            elif not _is_one(scale):
                # In place: the difference is a new tensor.
                streams[d] = x = x.div_(scale)
        if update.byproduct is not None:  # what the byproduct overwrote is lost, and no step reads it
            streams[update.byproduct] = lost(x)
        return x

    def _through_scale(
        self,
        update: Update,
        scale: Any,
        x: Tensor,
        grad: Tensor,
        gs: Sequence[Any],
        pairs: list[tuple[Any, Tensor]],
        inputs: list[Tensor],
    ) -> Tensor | None:
        """The gradient of x_d where it is explicit; what needs the graph is added to ``pairs``."""
        g = shortcut_of(update, gs)
        if g is not None:
            inputs.append(x.detach().requires_grad_())
            with torch.enable_grad():
                pairs.append((get_gradient_edge(g(inputs[-1])), grad))
            return grad  # a placeholder: ``_update`` replaces it by the gradient through the shortcut's graph
        if isinstance(scale, Tensor) and scale.requires_grad:
            # The product rule by hand: x_d stays out of the graph. The conjugate is autograd's convention.
            pairs.append((get_gradient_edge(scale), (grad * x.conj()).sum_to_size(scale.shape).to(scale.dtype)))
        if _is_one(scale):
            return grad
        return grad * (scale.detach().conj() if isinstance(scale, Tensor) else scale)


def refuse_captured(record: StepRecord, mode: str, found: Sequence[Any], known: Collection[int] = ()) -> None:
    """Finds captured tensors: those that a residual function reads without being given them, and that need a gradient.

    Args:
        record: the step.
        mode: the mode of backpropagation, for messages.
        found: nodes of a graph, or tensors.
        known: ids of the tensors that the function is given.

    Raises:
        SchemeError: there is one.
    """
    seen, queue = set(), [x.grad_fn if isinstance(x, Tensor) else x for x in found]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            # The tensor is not an input of the node, so its gradient would be lost silently.
            if record.left_in_context():
                raise SchemeError(
                    f"{record.step.scheme}, {record.where}: a residual function reads a tensor of shape "
                    f"{tuple(variable.shape)} that another call has put into the context, and backprop='{mode}' keeps "
                    "no gradient of it.\n"
                    "  Detach it there, or use backprop='checkpoint' or 'store'."
                )
            raise SchemeError(
                f"{record.step.scheme}, {record.where}: a residual function reads a tensor of shape "
                f"{tuple(variable.shape)} that needs a gradient and is neither its parameter nor its argument.\n"
                "  Register it in the residual function's module, or pass it as context: stack(x, context=...)."
            )
        # A loop instead of a recursion, since graphs of deep functions exceed Python's recursion limit.
        queue += [following for following, _ in node.next_functions]


def _pair(x: Tensor, grad: Tensor) -> tuple[Any, Tensor]:
    """The gradient edge of a tensor, and its gradient in the dtype of the tensor."""
    node = x.grad_fn
    # A node written in Python does not keep its graph alive, which get_gradient_edge takes care of.
    plain = node is not None and not isinstance(node, torch._C._FunctionBase)
    edge = GradientEdge(node, x.output_nr) if plain else get_gradient_edge(x)  # type: ignore[arg-type]
    return edge, grad if grad.dtype is x.dtype else grad.to(x.dtype)


def _untouched(slot: Slot) -> bool:
    """Whether the module still holds the same tensor, and its gradient can be computed without side effects."""
    return slot.holder.get(slot.name) is slot.value and slot.value.is_leaf and not slot.value._backward_hooks


def _differentiable(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _is_one(scale: Any) -> bool:
    return isinstance(scale, float) and scale == 1.0
