"""Steps and schemes that callbacks change in training: no tensors, so that a checkpoint states them beside its weights.

Whatever reads a checkpoint calls ``as_trained`` on the network that it has built from it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from torch import nn

from ..rebuild import continuous_stacks
from .callbacks import StepSchedule
from .schedules import KEY

# Lightning keeps a callback's state under the name of its class.
REFINEMENT = "Refinement"


def as_trained(net: nn.Module, held: Mapping[str, Any]) -> nn.Module:
    """Gives a network the steps and schemes that it had when a checkpoint was written; the knots come with the weights.

    Args:
        net: as it is configured, or at any place of that training; changed in place.
        held: the contents of the checkpoint.

    Returns:
        The net, or what has taken its place if it is itself a stack that was refined.
    """
    holder = nn.ModuleDict({"net": net})
    as_refined(holder, refinements(held) or ())
    move_steps(holder, held)
    return holder["net"]


def keep_states(trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
    """Adds the states that ``as_trained`` reads to a checkpoint of weights alone, which holds none of any callback.

    Args:
        trainer: of the run.
        checkpoint: that is about to be written.
    """
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if callback.state_key in (REFINEMENT, StepSchedule.__qualname__):
            checkpoint.setdefault("callbacks", {}).setdefault(callback.state_key, callback.state_dict())


def move_steps(net: nn.Module, held: Mapping[str, Any]) -> None:
    """Sets the step size of a network to the one that `StepSchedule` had reached in a checkpoint, if it was in use.

    Args:
        net: the network, changed in place.
        held: the contents of the checkpoint.
    """
    moved = held.get("callbacks", {}).get(StepSchedule.__qualname__)
    if moved is not None:
        StepSchedule().apply(net, moved["h"])


def refinements(held: Mapping[str, Any]) -> list[tuple[str, int]] | None:
    """Returns the refinements before a checkpoint, in order: the scheme, "" for no other, and the factor of steps.

    Args:
        held: the contents of the checkpoint.

    Returns:
        None if it does not say: older ones leave it to the configuration, which a run from Python does not have.
    """
    state = held.get("callbacks", {}).get(REFINEMENT, {"done": 0})
    if "steps" in state:
        return [(scheme, factor) for scheme, factor in state["steps"]]
    given = (held.get(KEY, {}).get("config") or {}).get("trainer", {}).get("callbacks") or []
    for callback in given if isinstance(given, list) else [given]:
        if str(callback.get("class_path", "")).rpartition(".")[2] == REFINEMENT:
            options = callback.get("init_args") or {}
            schemes = options.get("schemes") or [""] * state["done"]
            return [(scheme, options.get("depth", 2)) for scheme in schemes[: state["done"]]]
    return None if state["done"] else []


def as_refined(net: nn.Module, done: Sequence[tuple[str, int]]) -> None:
    """Gives the continuous stacks below a module the steps and scheme that they have after some refinements.

    Args:
        net: whose stacks were never refined, or refined by ``refine``: more or fewer times, or otherwise.
        done: the refinements, see ``refinements``.
    """
    for name, stack in continuous_stacks(net).items():
        scheme, depth = first = getattr(stack, "unrefined", (stack.scheme, stack.depth))
        for other, factor in done:
            scheme, depth = other or scheme, depth * factor
        # Compared, since a stack that stays keeps its state: the same checkpoint may be read by several.
        if str(scheme) != str(stack.scheme) or depth != stack.depth:
            _replace(net, name, scheme, depth, first)


def refine(net: nn.Module, scheme: str, factor: int) -> None:
    """Replaces the continuous stacks below a module by ones with finer steps, and the given scheme.

    Args:
        net: the module.
        scheme: "" keeps theirs.
        factor: of the number of steps.
    """
    for name, stack in continuous_stacks(net).items():
        first = getattr(stack, "unrefined", (stack.scheme, stack.depth))
        _replace(net, name, scheme or stack.scheme, stack.depth * factor, first)


def _replace(net: nn.Module, name: str, scheme: Any, depth: int, first: tuple[Any, int]) -> None:
    parent, _, last = name.rpartition(".")
    # The new stack shares the parameters of the old one, so that an optimiser still holds them.
    new = net.get_submodule(name).rebuilt(scheme, depth)  # type: ignore[operator]
    new.unrefined = first
    setattr(net.get_submodule(parent), last, new)
