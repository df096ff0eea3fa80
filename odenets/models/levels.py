"""Helpers shared by all models of levels: one scheme per level, and counts of residual functions that fit it."""

import contextlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise, repeat
from typing import Any

import torch
from torch import Tensor, nn

import schemes
from schemes import Scheme, SchemeError, Slot

from ..build import fitting_counts, fitting_mix
from ..continuous import ContinuousWeights
from ..layers import ConvNeXtFunction, LayerNorm2d, PatchConv2d, linear_rates
from ..stack import Stack
from ..step import PerSlot


def schemes_of_levels(scheme: str | Scheme | Sequence[str | Scheme], levels: int) -> list[Scheme]:
    """Returns one scheme per level, from one for all or one for each.

    Args:
        scheme: a scheme, or a list with one per level.
        levels: number of levels.

    Raises:
        SchemeError: a list of another length, or an unknown scheme.

    Example:
        >>> [str(s) for s in schemes_of_levels(["rk4", "midpoint"], 2)]
        ['rk4', 'midpoint']
    """
    if isinstance(scheme, (str, Scheme)):
        return [schemes.get(scheme)] * levels
    if len(scheme) != levels:
        raise SchemeError(f"{len(scheme)} schemes for {levels} levels; give one scheme for all, or one per level.")
    return [schemes.get(s) for s in scheme]


def recomputing(recompute: bool | int, levels: int) -> list[bool]:
    """Returns which levels recompute: all, none, or the first ``recompute``, whose maps are the largest.

    Raises:
        SchemeError: a number outside 0 to ``levels``.

    Example:
        >>> recomputing(True, 3), recomputing(1, 3)
        ([True, True, True], [True, False, False])
    """
    # Checked first, since True is also the integer 1, but means all levels.
    if isinstance(recompute, bool):
        return [recompute] * levels
    if not isinstance(recompute, int) or not 0 <= recompute <= levels:
        raise SchemeError(f"recompute is {recompute!r}, want true, false, or how many of the {levels} levels.")
    return [level < recompute for level in range(levels)]


def steps_that_fit(scheme: Scheme, functions: int, level: int) -> int:
    """Returns the number of steps that consume a level's residual functions.

    Args:
        scheme: the level's scheme; a mix counts with its whole period.
        functions: the level's number of residual functions.
        level: number of the level from 1, for the message.

    Raises:
        SchemeError: the count is not a multiple of the scheme's stages; names the nearest counts that are.

    Example:
        >>> import schemes
        >>> steps_that_fit(schemes.get("rk4"), 12, level=1)
        3
    """
    # For a mix, the whole period: its parts consume different numbers of functions.
    period, plan = scheme.stages, scheme.plan
    if isinstance(functions, bool) or not isinstance(functions, int) or functions < 1:
        raise SchemeError(f"level {level} has {functions!r} residual functions, want a whole number, at least 1.")
    whole, rest = divmod(functions, period)
    if not rest:
        return whole * len(plan)
    counts = " or ".join(map(str, fitting_counts(scheme, functions)))
    text = f"level {level} has {functions} residual functions, and {scheme} takes {period} a step: use {counts}"
    # Below one step a mix would contain nothing of the requested scheme.
    if whole and (mix := fitting_mix(scheme, functions)):
        text += f", or a mix that fits, such as '{mix}'"
    raise SchemeError(text + ".")


def steps_of_levels(found: Sequence[Scheme], functions: Sequence[int]) -> list[int]:
    """Returns the number of steps of each level; see ``steps_that_fit``.

    Args:
        found: the levels' schemes.
        functions: the levels' numbers of residual functions.

    Raises:
        SchemeError: a count that does not fit.
    """
    return [steps_that_fit(s, count, level) for level, (s, count) in enumerate(zip(found, functions, strict=True), 1)]


def takes_shortcut(scheme: Scheme) -> bool:
    """Whether a level's first step can change stride and width: one stream, whose identity a shortcut replaces.

    Not under bdia, which keeps two states of one shape in training.

    Example:
        >>> import schemes
        >>> [takes_shortcut(schemes.get(s)) for s in ("rk4", "revnet", "leapfrog", "bdia")]
        [True, False, False, False]
    """
    one_stream = scheme.streams == 1 and not scheme.training_differs
    return scheme.nodes is not None and one_stream and scheme.at(0).shortcuts == 1


class _Misfit(Exception):
    """Why a scheme does not fit a network, as the end of a sentence."""


def check_streams(
    scheme: Scheme, depth: int, width: int, family: str, *, dim: int = 1, ndim: int = 4, heads: int = 0
) -> None:
    """Checks that a network's functions can take what a scheme gives them, by running it on shapes without values.

    Args:
        scheme: the level's scheme.
        depth: number of its steps.
        width: width of the level.
        family: name of the network, for the message.
        dim: the channel dimension of the stream.
        ndim: number of its dimensions.
        heads: if not 0, functions return the width that they take, and this number divides it.

    Raises:
        SchemeError: functions are given several arguments, slices of another dimension or widths that they cannot
            take, or the level's output is wider than its input; names schemes that fit.

    Example:
        >>> import schemes
        >>> check_streams(schemes.get("revnet"), 4, 64, "ConvNeXt")
    """
    if scheme.nodes is None or takes_shortcut(scheme):
        return
    # Large enough in every dimension for a scheme to split it, whichever it splits.
    shape = [2] + [64] * (ndim - 1)
    shape[dim] = width
    try:
        _probe(scheme, depth, torch.empty(shape, device="meta"), dim, heads)
    except _Misfit as misfit:
        raise SchemeError(
            f"{scheme} does not fit {family}, {str(misfit).replace('{family}', family)}.\n"
            f"  Use {_along(scheme, depth, width, dim, ndim, heads)}scheme='leapfrog' or scheme='euler'; DenseNet is "
            "made for dense, RevCol for revcol."
        ) from None


def _probe(scheme: Scheme, depth: int, x: Tensor, dim: int, heads: int) -> None:
    """Runs a few steps; raises ``_Misfit`` where the scheme does not fit."""

    def stand_in(slot: Slot) -> Callable[..., Tensor]:
        if len(slot.in_channels) != 1:
            raise _Misfit(f"as it gives a function {len(slot.in_channels)} arguments; those of {{family}} take one")
        (given,), wanted = slot.in_channels, slot.out_channels
        if heads and (given != wanted or wanted % heads):
            raise _Misfit(
                f"whose functions take one argument and keep its width, a multiple of {heads}: one goes {given} -> "
                f"{wanted}"
            )

        def f(x: Tensor) -> Tensor:
            if x.shape[dim] != given:
                raise _Misfit(f"whose channels are dimension {dim}: it splits another")
            return x.new_empty((*x.shape[:dim], wanted, *x.shape[dim + 1 :]))

        return f

    streams, state, y = scheme.stream_widths(x.shape[dim]), None, x
    try:
        # One period, and the first steps of the next: a misfit shows by then.
        for n in range(min(depth, len(scheme.plan) + 3)):
            part = scheme.at(n)
            fs = [stand_in(slot) for slot in part.slots(n, streams)]
            state = scheme.init(fs, x) if state is None else state
            state, streams = part._step(fs, state), part.widths(n, streams)
            y = scheme.readout(state)
    except RuntimeError:  # torch cannot join streams that differ in two dimensions
        raise _Misfit(f"whose channels are dimension {dim}: it joins another") from None
    if y.shape != x.shape:
        raise _Misfit(f"whose levels keep their width: it goes {x.shape[dim]} -> {y.shape[dim]}")


def _along(scheme: Scheme, depth: int, width: int, dim: int, ndim: int, heads: int) -> str:
    """Returns how to write the scheme so that it splits dimension ``dim``, or "" where that does not fit either."""
    name, _, rest = str(scheme).partition("(")
    given = [x for x in rest.removesuffix(")").split(", ") if x and not x.startswith("dim=")]
    shape = [2] + [64] * (ndim - 1)
    shape[dim] = width
    try:
        found = schemes.get(f"{name}({', '.join([*given, f'dim={dim}'])})")
        _probe(found, depth, torch.empty(shape, device="meta"), dim, heads)
    except (SchemeError, _Misfit):
        return ""
    return f"scheme='{found}', "


def mixer(slot: Slot, rates: Iterator[float], **options: Any) -> nn.Module:
    """Returns ConvNeXt's residual function for a slot of a stack, with the next rate of stochastic depth."""
    return ConvNeXtFunction(sum(slot.in_channels), slot.out_channels, drop_path=next(rates), **options)


def patch_transition(width: int, out: int, stride: int) -> nn.Module:
    """Returns LayerNorm and a convolution of patches, between two levels."""
    return nn.Sequential(OrderedDict(norm=LayerNorm2d(width), conv=PatchConv2d(width, out, stride)))


def rates_of_levels(rate: float, functions: Sequence[int], continuous: bool) -> list[Iterator[float]]:
    """Returns each level's rates of stochastic depth, one per function; a field has one rate, the level's mean.

    Example:
        >>> [next(rates) for rates in rates_of_levels(0.75, [2, 2], True)]
        [0.125, 0.625]
    """
    rates, ends = linear_rates(rate, sum(functions)), [0, *accumulate(functions)]
    parts = [rates[a:b] for a, b in pairwise(ends)]
    return [repeat(sum(part) / len(part)) if continuous else iter(part) for part in parts]


def shared_level(make: Callable[[Slot], nn.Module], scheme: Scheme, depth: int, *, width: int, backprop: str) -> Stack:
    """Builds a level with one residual function for all steps, or one per slot if the slots are not interchangeable.

    Its weights become functions of depth by ``made_continuous``, once they are drawn.

    Args:
        make: as in ``Stack.from_factory``.
        scheme: the level's scheme.
        depth: number of steps.
        width: width of the level.
        backprop: as in Stack.

    Raises:
        SchemeError: a scheme whose later steps need functions of other widths.
    """
    streams = scheme.stream_widths(width)
    slots = scheme.at(0).slots(0, streams)
    if scheme.one_stream or len(slots) == 1:
        kinds = {(slot.in_channels, slot.out_channels) for slot in slots}
        shared = make(slots[0])
    else:
        kinds = {None}
        shared = PerSlot([make(slot) for slot in slots])
    # Widths that change from step to step, as under dense, show at the second step.
    later = scheme.at(1).slots(1, scheme.at(0).widths(0, streams))
    if len(kinds) > 1 or [(s.in_channels, s.out_channels) for s in slots[: len(later)]] != [
        (s.in_channels, s.out_channels) for s in later[: len(slots)]
    ]:
        raise SchemeError(
            f"{scheme} gives the residual functions of a level arguments of different widths, and weights that are "
            "functions of depth have one shape.\n  Use a Runge-Kutta scheme, or revnet."
        )
    return Stack(shared, scheme, depth, backprop=backprop)


def made_continuous(stack: nn.Module, knots: int | None, degree: int) -> nn.Module:
    """Makes a stack's shared weights functions of depth, with its depth as the span: its output is at first the same.

    Anything else, or a stack without shared functions, is returned unchanged; so is everything if ``knots`` is None.
    """
    if knots is None or not isinstance(stack, Stack) or stack.block is None:
        return stack
    span = float(sum(stack.scheme.at(n).span for n in range(stack.depth)))
    given = stack.block
    if isinstance(given, PerSlot):
        field: nn.Module = PerSlot([ContinuousWeights(f, knots, degree, span) for f in given])
    else:
        field = ContinuousWeights(given, knots, degree, span)
    return Stack(field, stack.scheme, stack.depth, step="span/depth", backprop=stack.backprop)


def check_continuous(continuous: int | None, degree: int, step: float | str, **unfit: bool) -> None:
    """Rejects options that do not go with weights that are functions of depth, before anything is built.

    Args:
        continuous: number of knots, None for separate weights.
        degree: degree of the splines; 1 is the default, which goes with separate weights too.
        step: the network's step size.
        unfit: options, and whether they have a value that does not fit.

    Raises:
        SchemeError: an option does not fit; it is named.
    """
    if continuous is None:
        if degree != 1:
            raise SchemeError(
                f"degree={degree} is that of weights that are functions of depth, and these are separate ones.\n"
                "  Give the number of their knots too, as in continuous=8, or leave it out."
            )
        return
    if step != 1.0:
        raise SchemeError(f"continuous={continuous}: each level ends at its depth in time, so step={step!r} cannot be.")
    for name, is_set in unfit.items():
        if is_set:
            raise SchemeError(
                f"continuous={continuous}: {name} does not go with weights that are functions of depth; leave it out."
            )


@contextlib.contextmanager
def warned_once(stacklevel: int = 5) -> Iterator[None]:
    """Issues each distinct warning raised inside once, attributed to the caller, instead of once per level."""
    with warnings.catch_warnings(record=True) as caught:
        # No filter may drop a warning here: all are issued again below, where the caller's own filters decide.
        warnings.simplefilter("always")
        yield
    for text, category in dict.fromkeys((str(w.message), w.category) for w in caught):
        warnings.warn(text, category, stacklevel=stacklevel)
