"""Auxiliary values of a whole network: those of all its stacks, whatever its own forward returns."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from schemes.errors import SchemeError

from .auxiliary import ENERGIES, LOG_DET, Sink, names_of
from .continuous import fields_of
from .stack import Stack, StackHolder


def outermost(net: nn.Module) -> list[Stack]:
    """Returns the stacks of a network, each once, without those inside the residual functions of another.

    Args:
        net: the network, or a stack.

    Example:
        >>> from odenets import create_model
        >>> len(outermost(create_model("ho_resnet26")))
        3
    """
    found: dict[int, Stack] = {}

    def visit(module: nn.Module) -> None:
        stack = module.stack if isinstance(module, StackHolder) else module
        if isinstance(stack, Stack):
            found[id(stack)] = stack
            return
        for child in module.children():
            visit(child)

    visit(net)
    return list(found.values())


@contextmanager
def gathered(net: nn.Module, aux: bool | str | Collection[str] = True) -> Iterator[dict[str, Tensor]]:
    """Collects the auxiliary values of a network's stacks: on exit, the yielded dictionary holds their sums.

    For models that call their stacks themselves and return only logits. The values have gradients in every mode of
    backpropagation, as those of ``stack(x, aux=True)`` do. A stack inside another's residual functions contributes
    none, since a reversed pass has no graph for its values.

    Args:
        net: a network with stacks in it, or a stack.
        aux: True for all values, False for none; a name, or a collection of names, for those.

    Raises:
        SchemeError: a network without stacks; at the end, a name that no residual function returned.

    Example:
        >>> import torch
        >>> from odenets import create_model
        >>> net = create_model("ho_resnet26", scheme="euler", continuous=4)
        >>> returning(net, ["kinetic"])
        >>> with gathered(net, "kinetic") as values:
        ...     logits = net(torch.randn(2, 3, 32, 32))
        >>> (logits.sum() + values["kinetic"]).backward()
    """
    names = names_of(aux)
    stacks = outermost(net)
    if not stacks:
        raise SchemeError(
            f"{type(net).__name__} has no Stack, whose residual functions would return auxiliary values.\n"
            "  Leave them out, or build it of stacks."
        )
    if not names:  # none are asked for
        yield {}
        return
    sink, found = Sink(not isinstance(names, bool) and LOG_DET in names), {}
    before = [stack.into for stack in stacks]
    for stack in stacks:
        stack.into = sink
    try:
        yield found
    finally:
        # Also after an error: the next pass would add to an abandoned sink, which would keep its graph alive.
        for stack, sinks in zip(stacks, before, strict=True):
            stack.into = sinks
    found.update(sink.sums(names))


def returning(net: nn.Module, names: Collection[str]) -> None:
    """Makes the fields of a network return their energies in training, as ``Regularised`` does for one function.

    State-dict keys do not change; nothing is computed in evaluation.

    Args:
        net: a network with weights that are functions of depth; parts without such weights stay as they are.
        names: "kinetic", the mean of |f|^2, and "jacobian", that of |e^T df/dx|^2; an empty collection turns both off.

    Raises:
        SchemeError: another name.

    Example:
        >>> import torch
        >>> from odenets import ContinuousWeights, Stack
        >>> net = Stack(ContinuousWeights(torch.nn.Linear(4, 4)), depth=8, step="span/depth")
        >>> returning(net, ["kinetic"])
        >>> sorted(net(torch.randn(2, 4), aux=True)[1]), sorted(net.eval()(torch.randn(2, 4), aux=True)[1])
        (['kinetic'], [])
    """
    for name in names:
        if name not in ENERGIES:
            raise SchemeError(f"a field returns no {name!r}; there are {' and '.join(ENERGIES)}.")
    fields = fields_of(net)
    for field in fields:
        field.energies = frozenset(names)
    held = {id(field) for field in fields}
    for stack in (m for m in net.modules() if isinstance(m, Stack)):
        if any(id(m) in held for m in stack.modules()):
            stack.look_again()
