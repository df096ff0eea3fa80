"""A step that can be undone: what it ran with, and the same step forward and back, without gradients.

What a residual function saw is seen again: generators (only for updates that drew), autocast, parameters and context.
Running statistics are left alone the second time.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from schemes.coupling import Coupling, apply_update, invert_update, rotated
from schemes.errors import SchemeError
from schemes.scheme import Function, Scheme, State

from .exact import Grid, Lost
from .recompute import Generators, statistics_kept

if TYPE_CHECKING:
    from .step import Step


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
    autocast: list[tuple[str, bool, torch.dtype]]
    versions: list[int]  # of the owners' tensors
    norms: list[nn.Module]
    holders: list[nn.Module]
    scheme: Scheme  # the step's, or what stands for it in training
    grid: Grid | None  # exact arithmetic
    lost: list[Lost | None]  # one per elementary update on the grid: what it did not keep
    over: list[Tensor]  # whether a stream left the range of the grid, per elementary update


def made(step: "Step") -> int:
    """How many streams the step adds."""
    return getattr(step.scheme, "streams_added", 0)


class Parts(NamedTuple):
    """What a step's modules hold: one walk a pass, as walks cost more than the engine's algebra."""

    owners: list[Owner]
    norms: list[nn.Module]  # BatchNorm layers with running statistics
    holders: list[nn.Module]  # modules with buffers


def parts_of(step: "Step", shared: nn.Module | None) -> Parts:
    """The parameters that need a gradient, each once, and the modules with buffers, of a step and a shared function.

    Raises:
        SchemeError: a module inside the step is sharded by itself.
    """
    owners: dict[int, Owner] = {}
    norms, holders, seen = [], [], set()
    queue: list[nn.Module | None] = [shared, step]
    while queue:
        m = queue.pop()
        if m is None or id(m) in seen:
            continue
        seen.add(id(m))
        if m is not step and m is not shared and type(m).__name__.startswith("FSDP"):
            name = next(name for name, inner in step.named_modules() if inner is m)
            raise SchemeError(
                f"Stack: steps.{step.index}.{name} is sharded inside a step, which backprop='reverse' cannot undo: "
                "shard whole steps, fully_shard(stack.steps[n]), or the root."
            )
        for name, p in m._parameters.items():
            if p is not None and p.requires_grad:
                owners.setdefault(id(p), Owner(m._parameters, name, p))
        if m._buffers:
            holders.append(m)
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats:
                norms.append(m)
        queue.extend(reversed(m._modules.values()))
    return Parts(list(owners.values()), norms, holders)


@contextmanager
def autocast_as(states: list[tuple[str, bool, torch.dtype]]) -> Iterator[None]:
    """Inside, autocast is as it was when ``autocast_now`` gave these states."""
    with ExitStack() as contexts:
        for device, enabled, dtype in states:
            if enabled or torch.is_autocast_enabled(device):
                contexts.enter_context(torch.autocast(device, dtype, enabled=enabled, cache_enabled=False))
        yield


@contextmanager
def held(owners: list[Owner], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the modules hold ``tensors`` where the forward pass found ``owners``."""
    before = [o.holder.get(o.name) for o in owners]
    try:
        for owner, tensor in zip(owners, tensors, strict=True):
            owner.holder[owner.name] = tensor
        yield
    finally:
        for owner, tensor in zip(owners, before, strict=True):
            owner.holder[owner.name] = tensor


def as_found(owner: Owner) -> bool:
    """Whether the module still holds the very tensor, and a gradient can be asked of it without side effects."""
    return owner.holder.get(owner.name) is owner.tensor and owner.tensor.is_leaf and not owner.tensor._backward_hooks


def check_parameters(call: Call) -> None:
    """Raises where a parameter is no longer what the forward pass found."""
    for owner, version in zip(call.owners, call.versions, strict=True):
        if owner.tensor._version != version:
            raise RuntimeError(
                f"Stack: parameter {owner.name} of step {call.step.index}, {tuple(owner.tensor.shape)}, was changed in "
                "place between the forward and the backward pass, which reverse backprop runs again."
            )
        if owner.tensor.untyped_storage().size() == 0:
            raise SchemeError(
                f"Stack: the parameters of step {call.step.index} are sharded away when the backward pass needs them; "
                "shard whole steps or the root, or fully_shard(..., reshard_after_forward=False)."
            )


def elementary(call: Call, state: State | None, t: Any, context: Any) -> list[tuple[Any, Sequence[Function], Any, Any]]:
    """The step as elementary schemes, each with its residual functions, step size and shortcuts."""
    # A first call checks shapes against the state before the step: on the way back there is none yet, and no check.
    step = call.step
    h = step.h
    fs, gs = step.functions(state, call.shared, t, context, h)
    return call.scheme.decompose(fs, h, gs)


def in_single_precision(state: State) -> State:
    """Streams in half precision as float32: an inverse subtracts what was added, so sums must not be rounded more."""
    return tuple(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in state)


def autocast_now(state: State) -> list[tuple[str, bool, torch.dtype]]:
    """Device, whether autocast is on there, and its precision: for the processor and the state's device."""
    return [
        (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in dict.fromkeys(("cpu", state[0].device.type))
    ]


def call_of(
    step: "Step", state: State, shared: nn.Module | None, t: Any, context: Any, grid: Grid | None = None
) -> Call:
    """What a step is about to run with."""
    owners, norms, holders = parts_of(step, shared)
    versions = [o.tensor._version for o in owners]
    scheme, autocast = step.scheme.training_scheme(step.index, state[-1]), autocast_now(state)
    return Call(step, shared, t, context, owners, [], autocast, versions, norms, holders, scheme, grid, [], [])


def replayed(generators: "Generators | None") -> Any:
    """Inside, the noted generators draw again what they drew; nothing where none were noted."""
    return nullcontext() if generators is None else generators.replayed()


def done(call: Call, state: State) -> State:
    """The step; notes the generators of each elementary update that drew from them."""
    call.generators.clear()
    call.lost.clear()
    call.over.clear()
    before = Generators.now(state[0].device)
    buffers = [b for m in call.holders if m.training for b in m._buffers.values() if b is not None]
    saved = [b.clone() for b in buffers]
    start = before
    try:
        for scheme, fs, h, gs in elementary(call, state, call.t, call.context):
            if not isinstance(scheme, Coupling):
                state = scheme._step(fs, state, h, gs)
                before = before.drawn(call.generators)
                continue
            for update in scheme.updates(fs, h, len(state)):
                if call.grid is None:
                    state = apply_update(update, state, gs)
                else:
                    state = call.grid.do(update, state, gs, call.lost)
                    call.over.append(call.grid.over(state[update.dst]))
                if update.appends and any(enabled for _, enabled, _ in call.autocast):
                    state = in_single_precision(state)
                before = before.drawn(call.generators)
            state = rotated(state, scheme.rotate)
    except Exception as error:
        start.set()
        for b, value in zip(buffers, saved, strict=True):
            b.data.copy_(value)
        error.add_note(
            f"{call.step.scheme}, step {call.step.index}, update {len(call.generators)}: a residual function raised; "
            "statistics and generators are as before the step"
        )
        raise
    return state


def undone(call: Call, state: State) -> State:
    """The state before the step, without gradients."""
    check_parameters(call)
    with (
        torch.no_grad(),
        held(call.owners, [o.tensor for o in call.owners]),
        statistics_kept(call.norms, call.holders),
        autocast_as(call.autocast),
    ):
        drawn, lost = list(call.generators), list(call.lost)
        for scheme, fs, h, gs in reversed(elementary(call, None, call.t, call.context)):
            if not isinstance(scheme, Coupling):
                with replayed(drawn.pop()):
                    state = scheme._inverse(fs, state, h, gs)
                continue
            state = rotated(state, -scheme.rotate)
            for update in reversed(scheme.updates(fs, h, len(state) - scheme.streams_added)):
                with replayed(drawn.pop()):
                    state = (
                        invert_update(update, state, gs)
                        if call.grid is None
                        else call.grid.undo(update, state, gs, lost)
                    )
                if update.byproduct is not None:  # what stood there before is lost, and read by no step
                    state = (*state[: update.byproduct], state[0].new_empty(0), *state[update.byproduct + 1 :])
    return state
