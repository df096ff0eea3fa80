"""One step as it ran: run, undone, and run again with what its functions saw the first time.

What a residual function saw is seen again: random states and buffers (noted per update, where they moved), autocast,
parameters, training flags, context. Running statistics are left alone the second time.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from schemes.coupling import Coupling, apply_update, invert_update, rotated
from schemes.errors import SchemeError
from schemes.scheme import Function, Scheme, State

from ..step import Step, Wrap
from .grid import Grid, Spilled
from .surroundings import Flags, Slot, Surroundings, buffer_slots, swapped

Part = tuple[Any, Sequence[Function], Any, Any]  # an elementary scheme, its residual functions, step size, shortcuts


class Members(NamedTuple):
    """The parameters and buffers of a step, collected once per pass because module traversal dominates the cost."""

    modules: list[nn.Module]
    parameters: list[Slot]  # those that need a gradient, each tensor once
    norms: list[nn.Module]  # BatchNorm layers with running statistics
    buffers: list[Slot]  # all others' buffers


def members_of(step: Step, shared: nn.Module | None) -> Members:
    """What a step and a shared residual function hold.

    Raises:
        SchemeError: a module inside the step is sharded by itself.
    """
    parameters: dict[int, Slot] = {}
    modules, norms, others, seen = [], [], [], set()
    queue: list[nn.Module | None] = [shared, step]
    while queue:
        m = queue.pop()
        if m is None or id(m) in seen:
            continue
        seen.add(id(m))
        modules.append(m)
        if m is not step and m is not shared and type(m).__name__.startswith("FSDP"):
            name = next(name for name, inner in step.named_modules() if inner is m)
            raise SchemeError(
                f"Stack: steps.{step.index}.{name} is sharded inside a step, which backprop='reverse' cannot undo: "
                "shard whole steps, fully_shard(stack.steps[n]), or the root."
            )
        for name, p in m._parameters.items():
            if p is not None and p.requires_grad:
                parameters.setdefault(id(p), Slot(m._parameters, name, p))
        if m._buffers:
            (norms if isinstance(m, _BatchNorm) and m.track_running_stats else others).append(m)
        queue.extend(reversed(m._modules.values()))
    return Members(modules, list(parameters.values()), norms, buffer_slots(others))


class StepRecord(NamedTuple):
    """All that a step's recomputation needs besides the state."""

    step: Step
    shared: nn.Module | None
    t: Any
    context: Any
    scheme: Scheme  # the step's, or what stands for it in training
    members: Members
    flags: Flags
    autocast: list[tuple[str, bool, torch.dtype]]
    grid: Grid | None  # exact arithmetic
    notes: list[Surroundings | None]  # one per elementary update, None where nothing was drawn or written
    spills: list[Spilled | None]  # one per elementary update on the grid: the bits that it did not keep
    overflow: list[Tensor]  # whether a stream left the range of the grid, per elementary update

    @property
    def where(self) -> str:
        """The step, for messages."""
        return f"step {self.step.index}"


def record_of(
    step: Step, state: State, shared: nn.Module | None, t: Any, context: Any, grid: Grid | None = None
) -> StepRecord:
    """What a step is about to run with."""
    members = members_of(step, shared)
    flags = Flags(members.modules, (t, context))
    return StepRecord(
        step, shared, t, context, step.scheme_on(state), members, flags, autocast_now(state), grid, [], [], []
    )


def parts_of(record: StepRecord, t: Any, context: Any, wrap: Wrap | None = None, state: State = ()) -> list[Part]:
    """The step as elementary schemes."""
    h = record.step.h
    fs, gs = record.step.functions(record.shared, t, context, h)
    if wrap is not None:
        fs, gs = wrap(record.step, state, fs, gs)
    return record.scheme.decompose(fs, h, gs)


def autocast_now(state: State) -> list[tuple[str, bool, torch.dtype]]:
    """Device, whether autocast is on there, and its precision: for the processor and the state's device."""
    return [
        (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in dict.fromkeys(("cpu", state[0].device.type))
    ]


@contextmanager
def autocast_as(states: list[tuple[str, bool, torch.dtype]]) -> Iterator[None]:
    """Inside, autocast is as it was when ``autocast_now`` gave these states."""
    with ExitStack() as contexts:
        for device, enabled, dtype in states:
            if enabled or torch.is_autocast_enabled(device):
                contexts.enter_context(torch.autocast(device, dtype, enabled=enabled, cache_enabled=False))
        yield


def in_single_precision(state: State) -> State:
    """Streams in half precision as float32: an inverse subtracts what was added, so sums must not be rounded more."""
    return tuple(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in state)


def replayed(note: Surroundings | None) -> Any:
    """Inside, an update draws and reads what it did; nothing where it did neither."""
    return nullcontext() if note is None else note.replayed()


@contextmanager
def statistics_kept(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, BatchNorm layers in training leave their statistics alone, which they do not read there."""
    told = [m for m in norms if m.training and m.track_running_stats]
    for m in told:
        m.track_running_stats = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for m in told:
            m.track_running_stats = True  # type: ignore[assignment]


@contextmanager
def as_it_ran(record: StepRecord) -> Iterator[None]:
    """Inside, flags, autocast, statistics and buffers are those of the step's run, or copies of them.

    Raises:
        RuntimeError: a parameter or the context was written to since.
        SchemeError: the parameters are not there (sharded away).
    """
    record.flags.check(record.where)
    for slot in record.members.parameters:
        if slot.tensor.untyped_storage().size() == 0 and slot.tensor.numel():
            raise SchemeError(
                f"Stack: the parameters of {record.where} are sharded away when the backward pass needs them; "
                "shard whole steps or the root, or fully_shard(..., reshard_after_forward=False)."
            )
    buffers = record.members.buffers
    with (
        record.flags.restored(),
        statistics_kept(record.members.norms),
        autocast_as(record.autocast),
        swapped(buffers, [b.tensor.detach().clone() for b in buffers]),
    ):
        yield


def run_step(record: StepRecord, state: State, wrap: Wrap | None = None) -> State:
    """The state after the step; notes the surroundings of each elementary update that moved them."""
    for noted in (record.notes, record.spills, record.overflow):
        noted.clear()
    before = start = Surroundings.now(state[0].device, record.members.buffers)
    statistics = [(b, b.clone()) for m in record.members.norms if m.training for b in m.buffers(recurse=False)]
    try:
        for scheme, fs, h, gs in parts_of(record, record.t, record.context, wrap, state):
            if not isinstance(scheme, Coupling):
                state = scheme._step(fs, state, h, gs)
                before = before.moved(record.notes)
                continue
            for update in scheme.updates(fs, h, len(state)):
                if record.grid is None:
                    state = apply_update(update, state, gs)
                else:
                    state = record.grid.apply(update, state, gs, record.spills)
                    record.overflow.append(record.grid.over(state[update.dst]))
                if update.appends and any(enabled for _, enabled, _ in record.autocast):
                    state = in_single_precision(state)
                before = before.moved(record.notes)
            state = rotated(state, scheme.rotate)
    except Exception as error:
        start.set_generators()
        for b, value in [*statistics, *((slot.tensor, value) for slot, value in start.buffers)]:
            b.data.copy_(value)
        error.add_note(
            f"{record.step.scheme}, {record.where}, update {len(record.notes)}: a residual function raised; "
            "statistics and generators are as before the step"
        )
        raise
    return state


def invert_step(record: StepRecord, state: State) -> State:
    """The state before the step, without gradients."""
    slots = record.members.parameters
    with torch.no_grad(), as_it_ran(record), swapped(slots, [slot.tensor for slot in slots]):
        notes, spills = list(record.notes), list(record.spills)
        for scheme, fs, h, gs in reversed(parts_of(record, record.t, record.context)):
            if not isinstance(scheme, Coupling):
                with replayed(notes.pop()):
                    state = scheme._inverse(fs, state, h, gs)
                continue
            state = rotated(state, -scheme.rotate)
            for update in reversed(scheme.updates(fs, h, len(state) - scheme.streams_added)):
                with replayed(notes.pop()):
                    if record.grid is None:
                        state = invert_update(update, state, gs)
                    else:
                        state = record.grid.invert(update, state, gs, spills)
                if update.byproduct is not None:  # what stood there before is lost, and read by no step
                    state = (*state[: update.byproduct], state[0].new_empty(0), *state[update.byproduct + 1 :])
    return state
