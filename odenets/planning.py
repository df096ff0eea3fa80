"""Plans of whole models: how each step of each stack is run in training, and what that takes."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from schemes.errors import SchemeError
from schemes.step_size import FromError

from .backprop.choice import Report
from .backprop.planning import Planning
from .stack import Stack, named_stacks


def plan(model: nn.Module, *args: Any, memory: float | str | None = None, **kwargs: Any) -> Report:
    """Returns a report on the cost of training by segment of a model's stacks; with ``memory``, the fastest plan's.

    Memory is the peak of one forward and backward pass, above parameters, their gradients, and the input. Modules
    outside stacks are stored, and the tensors that they keep count. Memory that their operations take while they run,
    such as the gradient of a large weight, is not predicted, but the report's ``measured`` includes it. A stack within
    a stack keeps its mode. Nothing is changed except that "auto" makes its choice; the report's ``apply()`` sets the
    plans.

    Args:
        model: a model with stacks in it, or a stack.
        args: the model's input, of the size used in training.
        memory: the memory that all of it may take, such as "2GB", or a number of MiB, which the fastest plan must fit;
            None keeps the modes that the stacks have.
        kwargs: further arguments of the model.

    Raises:
        SchemeError: no plan fits (the message says what is missing); there is no stack; a stack is called twice.

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
    """Returns ``Stack.plan_state`` of all stacks in a model, by name."""
    return {name: found for name, stack in named_stacks(model) if (found := stack.plan_state())}


def load_plan_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Restores what ``plan_state`` returned.

    Raises:
        SchemeError: it is not such a state, or a stack that it names does not exist; nothing is changed then.
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
    # Read for all stacks before any is changed.
    for load in [stacks[name]._read_plan_state(found) for name, found in state.items()]:
        load()


def outermost(model: nn.Module) -> dict[str, Stack]:
    """Returns the stacks that are not inside another, by name; omits those whose step sizes follow from errors."""
    found: dict[str, Stack] = {}
    for name, stack in named_stacks(model):
        inside = any(name.startswith(outer + "." if outer else "") for outer in found)
        if not inside and not isinstance(stack.rule, FromError):
            found[name] = stack
    return found
