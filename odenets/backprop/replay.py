"""One step as it ran: run, undone, and run again with what its functions saw the first time.

What a residual function saw is seen again: random states and buffers (noted per update, where they moved), autocast,
parameters, training flags, context. Running statistics are left alone the second time.
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
NOTHING = nullcontext()  # entered where there is nothing to do, as making one would cost more than entering it
Part = tuple[Any, Sequence[Function], Any, Any]  # an elementary scheme, its residual functions, step size, shortcuts


class StepRecord:
    """All that a step's recomputation needs besides the state.

    Attributes:
        step: the step.
        shared: the residual function of all steps, where there is only one.
        t: time at the start.
        context: what its functions read.
        scheme: the step's, or what stands for it in training.
        members: its modules.
        slots: the places of parameters that need a gradient; a tied one has several.
        parameters: those parameters, each once.
        flags: what else of its modules must be as it was.
        autocast: device, whether autocast was on there, and its precision.
        grid: exact arithmetic, or None.
        notes: one per elementary update, None where nothing was drawn or written.
        read: buffers and attributes that the step read and left alone, or None where it moved some.
        spills: one per elementary update on the grid: the bits that it did not keep.
        overflow: whether a stream left the range of the grid, per elementary update.
        sink: takes the auxiliary values of the step, or None.
        counts: how many of them each elementary update gave.
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
        # What trains by another scheme draws it here, once: run, inverse and gradient must be of the same draw.
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
        # A sink of its own, as the values leave through the step's node and not through the function.
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
    """What a step and a shared residual function hold.

    Raises:
        SchemeError: a module inside the step is sharded by itself.
    """
    members = Members((shared, step))
    for m in members.modules:
        # By name: FSDP's classes are made at run time, and importing its module would load distributed.
        if m is not step and m is not shared and type(m).__name__.startswith("FSDP"):
            name = next(name for name, inner in step.named_modules() if inner is m)
            raise SchemeError(
                f"Stack: steps.{step.index}.{name} is sharded inside a step, which backprop='{mode}' cannot undo: "
                "shard whole steps, fully_shard(stack.steps[n]), or the root."
            )
    return members


def parts_of(record: StepRecord, t: Any, context: Any, wrap: Wrap | None = None, state: State = ()) -> list[Part]:
    """The step as elementary schemes."""
    # A size from outside never comes here: rules by errors need embedded pairs, and those have no inverse.
    h = record.step.h
    fs, gs = record.step.functions(record.shared, t, context, h, sink=record.sink)
    if wrap is not None:
        fs, gs = wrap(record.step, state, fs, gs)
    return record.scheme.decompose(fs, h, gs)


def updates_of(record: StepRecord, scheme: Coupling, fs: Any, h: Any, streams: int, gs: Any) -> list[Update]:
    """The elementary updates of a part of the step; they tell their log-determinants where these are wanted."""
    if record.sink is not None and record.sink.log_det:
        return measured(scheme, fs, h, streams, gs, record.sink)
    return scheme.updates(fs, h, streams)


def autocast_now(state: State) -> Autocast:
    """Device, whether autocast is on there, and its precision: for the processor and the state's device."""
    device = state[0].device.type
    found = []
    # Plainly, as compilers trace no assignment within a list. What has no values has no autocast.
    for d in ("cpu",) if device in ("cpu", "meta") else ("cpu", device):
        enabled = torch.is_autocast_enabled(d)
        found.append((d, enabled, torch.get_autocast_dtype(d) if enabled else None))
    return found


def autocast_as(states: Autocast) -> AbstractContextManager[None]:
    """Inside, autocast is as it was when ``autocast_now`` gave these states."""
    if not any(enabled or torch.is_autocast_enabled(device) for device, enabled, _ in states):
        return NOTHING
    return _autocast_as(states)


@contextmanager
def _autocast_as(states: Autocast) -> Iterator[None]:
    with ExitStack() as contexts:
        for device, enabled, dtype in states:
            if enabled or torch.is_autocast_enabled(device):
                # Without the cache: it would keep weights cast without a graph, and hand them to a pass that needs one.
                contexts.enter_context(torch.autocast(device, dtype, enabled=enabled, cache_enabled=False))
        yield


def in_single_precision(state: State) -> State:
    """Streams in half precision as float32: an inverse subtracts what was added, so sums must not be rounded more."""
    return tuple(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in state)


def stream_precision(state: State) -> State:
    """The streams in the precision in which they are summed: under autocast at least float32."""
    return in_single_precision(state) if any(enabled for _, enabled, _ in autocast_now(state)) else state


def replayed(note: Surroundings | None) -> Any:
    """Inside, an update draws and reads what it did; nothing where it did neither."""
    return NOTHING if note is None else note.replayed()


def lost(x: Tensor) -> Tensor:
    """What stands for a by-product that an inverse does not bring back: of a shape that no stream has."""
    # A shape rather than None, so that it stays a tensor in every tuple and through every detach.
    return x.new_empty((0,) * 12)


def is_lost(x: Tensor) -> bool:
    """Whether x stands for a lost by-product."""
    return x.dim() == 12 and x.numel() == 0


@contextmanager
def statistics_kept(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, BatchNorm layers in training leave their statistics alone, which they do not read there."""
    told = [m for m in norms if m.training and m.track_running_stats]
    # A flag, not a copy of the statistics: the layer then normalises by the batch, as it did, and updates nothing.
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
        SchemeError: the parameters are not there (sharded away).
    """
    record.flags.check(record.where)
    if record.read is not None:
        record.read.check(record.where)
    if _sharded():
        _check_there(record)
    # A context that has nothing to do is not entered: there is one of each a step, and most steps need none.
    contexts: list[AbstractContextManager[Any]] = []
    if record.flags.changed():
        contexts.append(record.flags.restored())
    if record.read is not None and record.read.contents is not None:
        contexts.append(record.read.restored())
    if record.members.norms:  # which of them train is asked inside, where flags are those of the call
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
    """Inside, buffers are copies of what they are when this is entered, and may be written to."""
    buffers = members.buffers()
    with swapped(buffers, [slot.value.detach().clone() for slot in buffers]):
        yield


def _sharded() -> bool:
    """Whether parameters may be sharded at all."""
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
    """The state after the step; notes the surroundings of each elementary update that moved them.

    Args:
        record: what the step runs with.
        state: the streams before it.
        wrap: what its functions are wrapped in.
        around: runs each update, where something could escape from it.
    """
    # A record that is run again starts from nothing.
    for noted in (record.notes, record.spills, record.overflow, record.counts):
        noted.clear()
    around = around or _as_it_is
    before = start = Surroundings(state[0].device, record.members, (record.t, record.context))
    # Beside the surroundings, which leave statistics out: a function that raises must not have moved them.
    statistics = [(b.value, b.value.clone()) for b in record.members.statistics()] if record.members.norms else ()
    half = any(enabled for _, enabled, _ in record.autocast)
    try:
        # A part that is no list of updates, such as a step inside a wrapper, is run and undone in one piece.
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
                    # A flag on the device: asking for it here would wait for the device at every update.
                    record.overflow.append(record.grid.over(state[update.dst]))
                # A new stream comes from a function in half precision, and would be the only one that is summed so.
                if half and update.appends:
                    state = in_single_precision(state)
                before = _note(record, before)
            # Streams change places once, after all updates, which name their streams as they stood before.
            state = rotated(state, scheme.rotate)
    except Exception as error:
        start.restore()
        for b, value in statistics:
            # Through ``data``: a counted write would make autograd refuse a graph that saved this buffer.
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
        # What a later update has moved, an earlier one may have read as it was.
        record.notes[:] = [start if note is None else note for note in record.notes]
    return state


def _as_it_is(run: Callable[[State], State], state: State) -> State:
    return run(state)


def _note(record: StepRecord, before: Surroundings) -> Surroundings:
    """Notes what an update that has just run moved, and how many auxiliary values it gave."""
    if record.sink is not None:
        # Counted per update, since the backward pass takes their gradients off the end, update by update.
        record.counts.append(len(record.sink.values) - sum(record.counts))
    return before.moved(record.notes)


def as_leaves(state: State) -> State:
    """The streams as leaves that need a gradient, where they can have one."""
    return tuple(x.detach().requires_grad_(x.is_floating_point() or x.is_complex()) for x in state)


def invert_step(record: StepRecord, state: State) -> State:
    """The state before the step, without gradients."""
    if record.members.asks:
        state = as_leaves(state)
    # The parameters of the run, whatever the modules hold by now (``functional_call`` and FSDP exchange them).
    with (
        torch.set_grad_enabled(record.members.asks),
        as_it_ran(record),
        swapped(record.slots, [slot.value for slot in record.slots]),
    ):
        # Copies to pop from: a second backward pass starts from the full lists again.
        notes, spills = list(record.notes), list(record.spills)
        for scheme, fs, h, gs in reversed(parts_of(record, record.t, record.context)):
            if not isinstance(scheme, Coupling):
                with replayed(notes.pop()):
                    state = scheme._inverse(fs, state, h, gs)
                continue
            state = rotated(state, -scheme.rotate)
            # The list is that of the forward step, which began with fewer streams.
            for update in reversed(scheme.updates(fs, h, len(state) - scheme.streams_added)):
                with replayed(notes.pop()):
                    if record.grid is None:
                        state = invert_update(update, state, gs)
                    else:
                        state = record.grid.invert(update, state, gs, spills)
                if update.byproduct is not None:  # what stood there before is lost, and read by no step
                    state = (*state[: update.byproduct], lost(state[0]), *state[update.byproduct + 1 :])
    if record.sink is not None:
        # Undoing calls the functions again, and they return their auxiliary values again.
        record.sink.take()
    return tuple(x.detach() for x in state) if record.members.asks else state
