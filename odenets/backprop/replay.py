"""One step: run, undone, and replayed under the conditions of its first run.

A replayed residual function reads what it read before: random states and buffers (recorded per update, where they
changed), autocast, parameters, training flags, context. Running statistics are not updated in a replay.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from schemes.coupling import Coupling, Update, apply_update, invert_update, rotated
from schemes.errors import SchemeError
from schemes.scheme import Function, State

from ..auxiliary import Sink, measured
from ..step import Step, Wrap
from .given import tensors_in
from .grid import Grid, Spilled
from .guard import Leftover
from .inverted import Inverted
from .members import Flags, Held, Members, swapped
from .surroundings import Read, Surroundings

Around = Callable[[Callable[[State], State], State], State]
Autocast = list[tuple[str, bool, torch.dtype | None]]
NOTHING = nullcontext()  # shared, since creating a context costs more than entering one
Part = tuple[Any, Sequence[Function], Any, Any]  # an elementary scheme, its residual functions, step size, shortcuts


class StepRecord:
    """Everything that the recomputation of a step needs besides the state.

    Attributes:
        step: the step.
        shared: the residual function of all steps, if there is only one.
        t: time at the start.
        context: the context that its functions read.
        scheme: the scheme of the step, its training scheme, or its inverse.
        members: its modules.
        slots: the places of parameters that need a gradient; a tied parameter has several.
        parameters: those parameters, each once.
        flags: what else of its modules must be as it was.
        autocast: device, whether autocast was on there, and its precision.
        grid: exact arithmetic, or None.
        notes: one per elementary update, None where nothing was drawn or written.
        read: buffers and attributes that the step read and left unchanged, or None where it changed some.
        spills: one per elementary update on the grid: the bits that it did not keep.
        overflow: whether a stream left the range of the grid, per elementary update.
        sink: takes the auxiliary values of the step, or None.
        counts: the number of auxiliary values of each elementary update.
        alone: whether neither a stream nor anything that the step is given needs a gradient.
        left: what its functions have left behind.
    """

    __slots__ = (
        *(
            "alone",
            "autocast",
            "context",
            "counts",
            "flags",
            "grid",
            "left",
            "members",
            "notes",
            "overflow",
            "parameters",
            "read",
        ),
        *("scheme", "shared", "sink", "slots", "spills", "step", "t"),
    )

    def __init__(
        self,
        step: Step,
        state: State,
        shared: nn.Module | None,
        t: Any,
        context: Any,
        members: Members,
        grid: Grid | None = None,
        sink: Sink | None = None,
        inverted: bool = False,
        held: Held | None = None,
    ):
        self.step, self.shared, self.t, self.context = step, shared, t, context
        # A random training scheme is drawn here, once: run, inverse and gradient must use the same draw.
        self.scheme: Any = Inverted(step.scheme) if inverted else step.scheme_on(state)
        self.members, self.grid = members, grid
        held = members.everything() if held is None else held
        self.slots, self.parameters = held.wanting([slot.value.requires_grad for slot in held.slots])
        self.flags = Flags(members, (t, context), held)
        self.autocast = autocast_now(state)
        self.read: Read | None = None
        self.notes: list[Surroundings | None] = []
        self.spills: list[Spilled | None] = []
        self.overflow: list[Tensor] = []
        # The record has its own sink, since the values leave through the step's node and not through the function.
        self.sink = None if sink is None else Sink(sink.log_det)
        self.counts: list[int] = []
        self.alone = False
        self.left: list[Leftover] = []

    def left_in_context(self) -> bool:
        """Whether the step has put a tensor with a graph into the context, such as a cache of keys."""
        if self.context is None or isinstance(self.context, Tensor):
            return False
        there = {id(x) for x in self.flags.tensors}
        return any(x.grad_fn is not None and id(x) not in there for x in tensors_in(self.context))

    @property
    def where(self) -> str:
        """The step, for messages."""
        return f"step {self.step.index}"


def members_of(step: Step, shared: nn.Module | None, mode: str = "reverse") -> Members:
    """The members of a step and a shared residual function.

    Raises:
        SchemeError: a module inside the step is sharded on its own.
    """
    members = Members((shared, step))
    for m in members.modules:
        # By name: FSDP creates its classes at run time, and importing its module would load torch.distributed.
        if m is not step and m is not shared and type(m).__name__.startswith("FSDP"):
            name = next(name for name, inner in step.named_modules() if inner is m)
            raise SchemeError(
                f"Stack: steps.{step.index}.{name} is sharded inside a step, which backprop='{mode}' cannot undo: "
                "shard whole steps, fully_shard(stack.steps[n]), or the root."
            )
    return members


def parts_of(record: StepRecord, t: Any, context: Any, wrap: Wrap | None = None, state: State = ()) -> list[Part]:
    """The step as elementary schemes."""
    # A step size from outside never arrives here: rules that use errors need embedded pairs, which have no inverse.
    h = record.step.h
    fs, gs = record.step.functions(record.shared, t, context, h, sink=record.sink)
    if wrap is not None:
        fs, gs = wrap(record.step, state, fs, gs)
    return record.scheme.decompose(fs, h, gs)


def updates_of(record: StepRecord, scheme: Coupling, fs: Any, h: Any, streams: int, gs: Any) -> list[Update]:
    """The elementary updates of a part of the step; they record their log-determinants where these are wanted."""
    if record.sink is not None and record.sink.log_det:
        return measured(scheme, fs, h, streams, gs, record.sink)
    return scheme.updates(fs, h, streams)


def autocast_now(state: State) -> Autocast:
    """Device, whether autocast is on there, and its precision: for the CPU and the state's device."""
    device = state[0].device.type
    found = []
    # A plain loop, since compilers do not trace an assignment within a list. The meta device has no autocast.
    for d in ("cpu",) if device in ("cpu", "meta") else ("cpu", device):
        enabled = torch.is_autocast_enabled(d)
        found.append((d, enabled, torch.get_autocast_dtype(d) if enabled else None))
    return found


def autocast_as(states: Autocast) -> AbstractContextManager[None]:
    """Inside, autocast is as it was when ``autocast_now`` returned these states."""
    if not any(enabled or torch.is_autocast_enabled(device) for device, enabled, _ in states):
        return NOTHING
    return _autocast_as(states)


@contextmanager
def _autocast_as(states: Autocast) -> Iterator[None]:
    with ExitStack() as contexts:
        for device, enabled, dtype in states:
            if enabled or torch.is_autocast_enabled(device):
                # Without the cache, which would pass weights that were cast without a graph to a pass that needs one.
                contexts.enter_context(torch.autocast(device, dtype, enabled=enabled, cache_enabled=False))
        yield


def in_single_precision(state: State) -> State:
    """The streams, with half precision cast to float32: an inverse subtracts what was added, so sums need precision."""
    return tuple(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in state)


def stream_precision(state: State) -> State:
    """The streams in the precision in which they are summed, at least float32 under autocast."""
    return in_single_precision(state) if any(enabled for _, enabled, _ in autocast_now(state)) else state


def replayed(note: Surroundings | None) -> Any:
    """Inside, an update draws and reads what it did before; does nothing where there is no note."""
    return NOTHING if note is None else note.replayed()


def lost(x: Tensor) -> Tensor:
    """A placeholder for a byproduct that an inverse does not recover; its shape is one that no stream has."""
    # A tensor rather than None, so that code over all streams, such as a detach, needs no special case.
    return x.new_empty((0,) * 12)


def is_lost(x: Tensor) -> bool:
    """Whether x is the placeholder of a lost byproduct."""
    return x.dim() == 12 and x.numel() == 0


@contextmanager
def statistics_kept(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, BatchNorm layers in training do not update their statistics, which they do not read there either."""
    told = [m for m in norms if m.training and m.track_running_stats]
    # A flag, not a copy of the statistics: the layer normalises by the batch as before, and updates nothing.
    for m in told:
        m.track_running_stats = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for m in told:
            m.track_running_stats = True  # type: ignore[assignment]


def as_it_ran(record: StepRecord) -> AbstractContextManager[Any]:
    """Inside, flags, autocast, statistics and buffers are those of the step's run, or copies of them.

    Raises:
        RuntimeError: a parameter or the context was written to since.
        SchemeError: the parameters are not available (sharded away).
    """
    record.flags.check(record.where)
    if record.read is not None:
        record.read.check(record.where)
    if _sharded():
        _check_there(record)
    # A context that has nothing to do is not entered: they would add up over the steps, most of which need none.
    contexts: list[AbstractContextManager[Any]] = []
    if record.flags.changed():
        contexts.append(record.flags.restored())
    if record.read is not None and record.read.contents is not None:
        contexts.append(record.read.restored())
    if record.members.norms:  # reads ``training`` when it is entered, after the flags of the call are restored
        contexts.append(statistics_kept(record.members.norms))
    autocast = autocast_as(record.autocast)
    if autocast is not NOTHING:
        contexts.append(autocast)
    if record.members.buffers():
        contexts.append(_copied_buffers(record.members))
    return _together(contexts) if contexts else NOTHING


@contextmanager
def _together(contexts: Sequence[AbstractContextManager[Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@contextmanager
def _copied_buffers(members: Members) -> Iterator[None]:
    """Inside, buffers are replaced by copies of their values at entry, and may be written to."""
    buffers = members.buffers()
    with swapped(buffers, [slot.value.detach().clone() for slot in buffers]):
        yield


def _sharded() -> bool:
    """Whether parameters may be sharded at all: torch.distributed is initialised."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _check_there(record: StepRecord) -> None:
    for p in record.parameters:
        # FSDP2 frees the storage and keeps the tensor; reading it would give zeros or a crash in a kernel.
        if p.untyped_storage().size() == 0 and p.numel():
            raise SchemeError(
                f"Stack: the parameters of {record.where} are sharded away when the backward pass needs them; "
                "shard whole steps or the root, or fully_shard(..., reshard_after_forward=False)."
            )


def run_step(record: StepRecord, state: State, wrap: Wrap | None = None, around: Around | None = None) -> State:
    """The state after the step; records the surroundings of each elementary update that changed them.

    Args:
        record: the record of the step, which is filled.
        state: the streams before it.
        wrap: wraps its functions.
        around: runs each update, where something could escape from it.
    """
    # A record that is run again starts empty.
    for noted in (record.notes, record.spills, record.overflow, record.counts):
        noted.clear()
    around = around or _as_it_is
    before = start = Surroundings(state[0].device, record.members, (record.t, record.context))
    # The surroundings leave statistics out, but a function that raises must not have moved them either.
    statistics = [(b.value, b.value.clone()) for b in record.members.statistics()] if record.members.norms else ()
    half = any(enabled for _, enabled, _ in record.autocast)
    try:
        # A part that is not a list of updates, such as a step inside a wrapper, is run and undone in one piece.
        for scheme, fs, h, gs in parts_of(record, record.t, record.context, wrap, state):
            if not isinstance(scheme, Coupling):
                state = around(partial(scheme._step, fs, h=h, gs=gs), state)
                before = _note(record, before)
                continue
            for update in updates_of(record, scheme, fs, h, len(state), gs):
                if record.grid is None:
                    state = around(partial(apply_update, update, gs=gs), state)
                else:
                    state = around(partial(record.grid.apply, update, gs=gs, spills=record.spills), state)
                    # The flag stays on the device: reading it here would synchronise at every update.
                    record.overflow.append(record.grid.over(state[update.dst]))
                # A new stream comes from a function in half precision, and would be the only one summed in it.
                if half and update.appends:
                    state = in_single_precision(state)
                before = _note(record, before)
            # The streams are rotated once, after all updates, whose indices refer to the order before the rotation.
            state = rotated(state, scheme.rotate)
    except Exception as error:
        start.restore()
        for b, value in statistics:
            # Through ``data``: a write that bumps the version would make autograd refuse a graph that saved the buffer.
            b.data.copy_(value)
        error.add_note(
            f"{record.step.scheme}, {record.where}, update {len(record.notes)}: a residual function raised; "
            "statistics and generators are as before the step"
        )
        raise
    before.learn(start)
    record.read = None if before.apart else start.read()
    if before.apart:
        record.members.forget()
        # Updates before the first change may have read what changed, so they are replayed from the start of the step.
        record.notes[:] = [start if note is None else note for note in record.notes]
    return state


def _as_it_is(run: Callable[[State], State], state: State) -> State:
    return run(state)


def _note(record: StepRecord, before: Surroundings) -> Surroundings:
    """Records what an update that has just run changed, and the number of its auxiliary values."""
    if record.sink is not None:
        # Counted per update, since the backward pass takes their gradients from the end, update by update.
        record.counts.append(len(record.sink.values) - sum(record.counts))
    return before.moved(record.notes)


def as_leaves(state: State) -> State:
    """The streams as leaves that need a gradient, where their dtype allows one."""
    return tuple(x.detach().requires_grad_(x.is_floating_point() or x.is_complex()) for x in state)


def invert_step(record: StepRecord, state: State) -> State:
    """The state before the step, without gradients."""
    # A function that asks for a graph had one in the forward pass, and must take the same branch here.
    if record.members.asks:
        state = as_leaves(state)
    # With the parameters of the run, whatever the modules hold by now (``functional_call`` and FSDP replace them).
    with (
        torch.set_grad_enabled(record.members.asks),
        as_it_ran(record),
        swapped(record.slots, [slot.value for slot in record.slots]),
    ):
        # Copies to pop from, since a second backward pass needs the full lists again.
        notes, spills = list(record.notes), list(record.spills)
        for scheme, fs, h, gs in reversed(parts_of(record, record.t, record.context)):
            if not isinstance(scheme, Coupling):
                with replayed(notes.pop()):
                    state = scheme._inverse(fs, state, h, gs)
                continue
            state = rotated(state, -scheme.rotate)
            # The updates are those of the forward step, which began with fewer streams.
            for update in reversed(scheme.updates(fs, h, len(state) - scheme.streams_added)):
                with replayed(notes.pop()):
                    if record.grid is None:
                        state = invert_update(update, state, gs)
                    else:
                        state = record.grid.invert(update, state, gs, spills)
                if update.byproduct is not None:  # what the byproduct overwrote is lost, and no step reads it
                    state = (*state[: update.byproduct], lost(state[0]), *state[update.byproduct + 1 :])
    if record.sink is not None:
        # Undoing calls the functions again, which return their auxiliary values again; they are dropped.
        record.sink.take()
    return tuple(x.detach() for x in state) if record.members.asks else state
