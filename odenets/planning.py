"""Plans of whole models: how each step of each stack is to be run in training, and what that takes."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from schemes.errors import SchemeError
from schemes.step_size import FromError

from .backprop.choice import Report
from .backprop.planning import Planning
from .stack import Stack, named_stacks


def plan(model: nn.Module, *args: Any, memory: float | str | None = None, **kwargs: Any) -> Report:
    """What training a model takes, segment by segment of its stacks; with ``memory`` the fastest plan that fits.

    Memory is what one forward and backward pass takes at most, above parameters, their gradients, and the input. What
    is not in stacks is stored, and what it keeps counts; what its operations take while they run, such as the gradient
    of a large weight, is not foreseen, and ``measured`` of the report has it. A stack within a stack keeps its mode.
    Nothing is changed but that "auto" makes its choice: ``apply()`` of the report sets the plans.

    Args:
        model: a model with stacks in it, or a stack.
        args: its input, of the size that training has.
        memory: what all of it may take, such as "2GB", or a number of MiB; None keeps the modes that the stacks have.
        kwargs: further arguments of the model.

    Raises:
        SchemeError: no plan fits, with what is missing; there is no stack; a stack is called twice.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from odenets import Stack
        >>> net = nn.Sequential(nn.Linear(4, 8), Stack([nn.Linear(4, 4) for _ in range(8)], "revnet"))
        >>> report = plan(net, torch.randn(64, 4), memory="1MB")
        >>> report.plans
        {'1': Plan(segments=((4, Store()),))}
    """
    return Planning(model, outermost(model), args, kwargs).report(memory)


def plan_state(model: nn.Module) -> dict[str, Any]:
    """``Stack.plan_state`` of all stacks in a model, by their names."""
    return {name: found for name, stack in named_stacks(model) if (found := stack.plan_state())}


def load_plan_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Takes over what ``plan_state`` gave.

    Raises:
        SchemeError: it is no such state, or a stack that it names is not there; nothing has changed then.
    """
    if not isinstance(state, Mapping):
        raise SchemeError(
            f"load_plan_state: the state is a {type(state).__name__}, want a mapping.\n"
            "  Pass what plan_state(model) gave."
        )
    stacks = dict(named_stacks(model))
    missing = [name for name in state if name not in stacks]
    if missing:
        raise SchemeError(
            f"load_plan_state: the model has no stack {missing[0]!r}; it has {', '.join(stacks) or 'none'}."
        )
    # Read for all stacks before one is changed.
    for load in [stacks[name]._read_plan_state(found) for name, found in state.items()]:
        load()


def outermost(model: nn.Module) -> dict[str, Stack]:
    """The stacks that are in no other one, by their names; those whose steps follow from errors are left out."""
    found: dict[str, Stack] = {}
    for name, stack in named_stacks(model):
        inside = any(name.startswith(outer + "." if outer else "") for outer in found)
        if not inside and not isinstance(stack.rule, FromError):
            found[name] = stack
    return found
