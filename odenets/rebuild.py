"""Trained networks with weights as functions of depth, run under other schemes or depths, or with separate weights."""

import copy
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, overload

from torch import Tensor, nn

from schemes import Scheme, SchemeError
from schemes.scheme import Takes

from .auxiliary import ENERGIES, with_energies
from .backprop.modes import Mode
from .build import fields_shared
from .continuous import fields_of
from .stack import Stack
from .step import in_each_slot


def continuous_stacks(model: nn.Module) -> dict[str, Stack]:
    """Returns the stacks of a model whose weights are functions of depth, by name.

    Args:
        model: any module.

    Example:
        >>> from odenets import create_model
        >>> [*continuous_stacks(create_model("ho_resnet26", scheme="euler", continuous=4))]
        ['levels.0', 'levels.1', 'levels.2']
    """
    return {k: m for k, m in model.named_modules() if isinstance(m, Stack) and fields_shared(m.block)}


def rebuilt(
    model: nn.Module,
    scheme: str | Scheme | None = None,
    *,
    scale: float | Fraction = 1,
    depth: int | Sequence[int] | None = None,
    backprop: str | Mode | None = None,
) -> nn.Module:
    """Returns a model that shares another's weights and runs its continuous stacks under another scheme, depth or mode.

    Args:
        model: stays as it is; it shares its parameters and buffers with the result.
        scheme: for all of its continuous stacks; None keeps theirs.
        scale: factor by which the number of steps of each stack is multiplied, where no depth is given.
        depth: the numbers of steps themselves, one for all stacks or one each.
        backprop: as in Stack; None keeps theirs.

    Raises:
        SchemeError: no weights are functions of depth, or a number of steps that is not whole.

    Example:
        >>> import torch
        >>> from odenets import create_model
        >>> net = create_model("ho_resnet26", scheme="euler", continuous=4)
        >>> fine, x = rebuilt(net, "rk4", scale=2), torch.randn(1, 3, 32, 32)
        >>> [stack.depth for stack in continuous_stacks(fine).values()], fine(x).shape
        ([8, 8, 8], torch.Size([1, 10]))
    """
    # deepcopy's memo: its entries count as copied already, so that the weights are shared.
    held: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    # Shares the bases too, so that refining one model refines the other.
    held |= {id(field.basis): field.basis for field in fields_of(model)}
    found = copy.deepcopy(model, held)
    stacks = continuous_stacks(found)
    if not stacks:
        raise SchemeError(
            f"rebuilt: {type(model).__name__} has no weights that are functions of depth, and separate ones belong to "
            "their scheme.\n  Build it with continuous=8, or make stacks of ContinuousWeights."
        )
    new = {}
    for stack, steps in zip(stacks.values(), _depths(stacks, scale, depth), strict=True):
        new[id(stack)] = stack.rebuilt(scheme, steps, backprop=backprop)
    return _replaced(found, new)


def _replaced(model: nn.Module, new: dict[int, Stack]) -> nn.Module:
    """Returns the model with other stacks, by the id of the old ones, under each name that they have."""
    if id(model) in new:  # the model is itself a stack, without a parent in which to replace it
        return new[id(model)]
    for parent in [*model.modules()]:
        for name, child in [*parent._modules.items()]:
            if id(child) in new:
                setattr(parent, name, new[id(child)])
    return model


def _depths(stacks: dict[str, Stack], scale: Any, depth: int | Sequence[int] | None) -> list[int]:
    if depth is not None:
        if scale != 1:
            raise SchemeError(
                f"rebuilt: scale is {scale} and depth is {depth}; both say the number of steps.\n  Give one of them."
            )
        given = list(depth) if isinstance(depth, Sequence) else [depth] * len(stacks)
        if len(given) != len(stacks):
            raise SchemeError(f"rebuilt: {len(given)} depths for {len(stacks)} continuous stacks, want one each.")
        return given
    share = share_of(scale)
    found = []
    for name, stack in stacks.items():
        steps = stack.depth * share
        if steps.denominator != 1 or steps < 1:
            raise SchemeError(
                f"rebuilt: {share} times the {stack.depth} steps of {name or 'the stack'} is {float(steps):g}; want a "
                "whole number, at least 1."
            )
        found.append(int(steps))
    return found


def share_of(scale: Any) -> Fraction:
    """Returns a factor for numbers of steps as the fraction that it means: 0.1 is a tenth.

    Args:
        scale: a number, or a text such as ``"1/3"``.

    Raises:
        SchemeError: no number.

    Example:
        >>> share_of(1 / 3), share_of("1/3")
        (Fraction(1, 3), Fraction(1, 3))
    """
    try:
        exact = Fraction(scale)
    except (TypeError, ValueError, ArithmeticError):
        raise SchemeError(f"rebuilt: scale is {scale!r}, want a number.") from None
    found = exact.limit_denominator(10**6)
    # A float stands for the fraction that it is the nearest float of.
    if abs(found - exact) > abs(exact) * Fraction(1, 10**14):
        raise SchemeError(
            f"rebuilt: scale is {scale!r}, which is no short fraction.\n  Give a text such as '1/3', or depth."
        )
    return found


@overload
def separated(model: Stack) -> Stack: ...


@overload
def separated(model: nn.Module) -> nn.Module: ...


def separated(model: nn.Module) -> nn.Module:
    """Returns a stack or model with plain stacks of separate weights in place of continuous ones, as for export.

    Each residual function has the weights of its time in a pass that starts at 0, the only start that the result knows.
    The result computes the same, shares nothing with the model, and returns no energies of ``gather.returning``.

    Args:
        model: a continuous stack, or a model that holds some; their schemes must call each function of a step once.

    Raises:
        SchemeError: no weights are functions of depth, or a scheme calls a function at several times.

    Example:
        >>> import torch
        >>> from odenets import ContinuousWeights, Stack
        >>> net = Stack(ContinuousWeights(torch.nn.Linear(4, 4)), "rk4", depth=2, step="span/depth")
        >>> alone, x = separated(net), torch.randn(1, 4)
        >>> torch.allclose(alone(x), net(x), atol=1e-6), [*alone.state_dict()][:2]
        (True, ['steps.0.fs.0.weight', 'steps.0.fs.0.bias'])
    """
    stacks = continuous_stacks(model)
    if not stacks:
        raise SchemeError(f"separated: the {type(model).__name__} has no weights that are functions of depth.")
    if "" in stacks:
        return _separated(stacks[""])
    plain = [_separated(stack) for stack in stacks.values()]
    found = copy.deepcopy(model)
    copies = continuous_stacks(found).values()
    return _replaced(found, {id(stack): new for stack, new in zip(copies, plain, strict=True)})


def _separated(stack: Stack) -> Stack:
    functions, time = [], 0.0
    block: Any = stack.block
    for step in stack.steps:
        part = step.scheme
        if part.nodes is None or len(part.nodes) != part.stages:
            raise SchemeError(
                f"separated: {part} calls a residual function at several times, or at any; each needs weights of its "
                "own.\n  Rebuild the stack under a plain scheme first: stack.rebuilt('rk4')."
            )
        h = float(step.h)
        for f, node in zip(in_each_slot(block, part.stages), part.nodes, strict=True):
            functions.append(_alone(f, time + node * h))
        time += part.span * h
    sizes = {float(step.h) for step in stack.steps}
    if len(sizes) > 1:
        raise SchemeError("separated: the steps are of several sizes; want equal ones.")
    given: Any = copy.deepcopy([[*(step.gs or ())] for step in stack.steps])
    found = Stack(
        functions,
        stack.scheme,
        # Shortcuts of the first step alone may change the width.
        shortcut=given if any(given[1:]) else given[0] or None,
        step=sizes.pop(),
        post_step=copy.deepcopy(stack.after),
        backprop=stack.backprop,
        seed=None if stack._draws is None else stack._draws.generator.initial_seed(),
    )
    if stack._draws is not None and found._draws is not None:
        found._draws.generator.set_state(stack._draws.generator.get_state())
    return found.train(stack.training)


def _alone(f: Any, t: float) -> nn.Module:
    found = f.module_at(t) if hasattr(f, "module_at") else copy.deepcopy(f)
    # A block that itself takes a time is bound to the time of its place.
    return _AtTime(found, t, f._inner) if hasattr(f, "_inner") and f._inner.time else found


class _AtTime(nn.Module):
    """A block that takes a time, bound to the time of its place."""

    def __init__(self, block: nn.Module, t: float, inner: Takes):
        super().__init__()
        self.block, self.t, self.first = block, t, inner.first
        # What the wrapper's own signature, which passes everything on, does not tell.
        self.takes = inner._replace(time=False, first=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.block(self.t, *args, **kwargs) if self.first else self.block(*args, t=self.t, **kwargs)


def scheme_distance(stack: Stack, x: Tensor, scheme: str | Scheme = "euler", depth: int | None = None) -> Tensor:
    """Returns the mean squared change of the output under another scheme: small where no step size was learned.

    A regulariser: added to the loss, it keeps a network from learning its step size. It costs one more pass.

    Args:
        stack: of shared residual functions.
        x: its input.
        scheme: the other scheme.
        depth: its number of steps; None keeps the stack's.

    Returns:
        A scalar with gradients.

    Example:
        >>> import torch
        >>> from odenets import Stack
        >>> net, x = Stack(torch.tanh, "rk4", depth=4, step="1/depth"), torch.ones(2)
        >>> bool(scheme_distance(net, x) > scheme_distance(net, x, depth=16))
        True
    """
    difference = stack(x) - stack.rebuilt(scheme, depth)(x)
    return (difference.abs() if difference.is_complex() else difference).square().mean()


class Regularised(nn.Module):
    r"""A residual function that also returns regularisers, which make a field easy to integrate.

    "kinetic" is the mean of |f|^2, "jacobian" that of |e^T df/dx|^2 for random signs e (Hutchinson: its expectation is
    the squared Frobenius norm of the Jacobian per element; of complex values, random signs of both parts over sqrt 2).
    Both are auxiliary values: ``stack(x, aux=True)`` returns their sums over all evaluations, with gradients in every
    mode. Weights that are functions of depth go outside, ``ContinuousWeights(Regularised(block))``, or return these
    values themselves: ``gather.returning``.

    Cost: "jacobian" takes one backward pass through the function in each evaluation.

    Args:
        block: the residual function.
        kinetic: whether to return "kinetic".
        jacobian: whether to return "jacobian".

    Source:
        Finlay et al. 2020, How to train your neural ODE, arXiv 2002.02798.

    Example:
        >>> import torch
        >>> from odenets import Stack
        >>> net = Stack(Regularised(torch.nn.Linear(4, 4)), "rk4", depth=2, step="1/depth")
        >>> y, aux = net(torch.randn(3, 4), aux=True)
        >>> sorted(aux)
        ['jacobian', 'kinetic']
    """

    def __init__(self, block: nn.Module, kinetic: bool = True, jacobian: bool = True):
        super().__init__()
        self.block, self.kinetic, self.jacobian = block, kinetic, jacobian

    @property
    def takes(self) -> Any:
        """The arguments that the block takes."""
        from schemes.scheme import signature

        return signature(self.block)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the block's value, and its auxiliary values."""
        names = [name for name in ENERGIES if getattr(self, name)]
        # A leading time argument moves x to second place.
        return with_energies(self.block, args, kwargs, 1 if self.takes.first else 0, names)
