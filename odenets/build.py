"""Construction of a Stack: residual functions, steps and shortcuts, and checks that they fit together."""

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from schemes import registry
from schemes.adaptive import NO_GRAPH
from schemes.errors import MixingWarning, SchemeError
from schemes.language import shorten
from schemes.runge_kutta import RungeKutta
from schemes.scheme import Scheme, State, signature
from schemes.step_size import Fixed, FromError, PerDepth, StepSize

from .checks import warn_of_own_skip
from .continuous import ContinuousWeights
from .draws import Draws
from .layers.scale import Unchanged
from .step import FunctionModule, PerSlot, Revision, Step

# Above this mixing figure, stage inputs keep little of the stream if the weights are separate.
MIXING_LIMIT = 30.0
MAX_DEPTH = 1_000_000  # steps are modules, of a few kB each
SEEDS = -(2**63), 2**64 - 1  # the range that torch's generators accept


def read(scheme: str | Scheme, block: Any) -> tuple[Scheme, list[nn.Module], nn.Module | None]:
    """Returns the scheme, the residual functions as modules, and the shared module, if any.

    Raises:
        SchemeError: an unknown scheme, or functions that cannot be called as it calls them.
    """
    found, (functions, shared) = registry.get(scheme), functions_of(block)
    check_arguments(functions, found)
    return found, functions, shared


def functions_of(block: Any) -> tuple[list[nn.Module], nn.Module | None]:
    """Returns the residual functions as modules, and the shared module: the only function, or the ``PerSlot``.

    Raises:
        SchemeError: something that cannot be called, or a collection without an order.
    """
    if isinstance(block, PerSlot):
        return [called(f, f"residual function {i}") for i, f in enumerate(block)], block
    if callable(block) and not isinstance(block, nn.ModuleList):  # a module list is callable, but its call raises
        call = called(block, "block")
        return [call], call
    # Both can be iterated over, but in a meaningless order, or over names.
    if isinstance(block, (Set, Mapping)):
        raise SchemeError(f"Stack: block is a {type(block).__name__}, want a sequence, in the order of the stages.")
    try:
        fs = list(block)
    except TypeError:
        raise SchemeError(
            f"Stack: block is a {type(block).__name__}, want a module, a callable, or a sequence of them."
        ) from None
    return [called(f, f"residual function {i}") for i, f in enumerate(fs)], None


def called(f: Any, what: str) -> nn.Module:
    """Returns a module or a callable as a module that can be called.

    Args:
        f: the module or callable.
        what: its name, for messages.

    Raises:
        SchemeError: it is neither, or it cannot be called: a class, or a mere container.
    """
    if not callable(f):
        raise SchemeError(f"Stack: {what} is a {type(f).__name__}, want a module or a callable.")
    # A class is callable too, but returns a module instead of a tensor.
    if isinstance(f, type):
        raise SchemeError(
            f"Stack: {what} is the class {f.__name__}, want a module or a callable.\n"
            f"  Make one of it: {f.__name__}(...)."
        )
    if not isinstance(f, nn.Module):
        return FunctionModule(f)  # type: ignore[arg-type]
    # Looked up statically: a scripted module creates its forward on attribute access.
    if inspect.getattr_static(f, "forward", None) is inspect.getattr_static(nn.Module, "forward"):
        raise SchemeError(
            f"Stack: {what} is a {type(f).__name__}, which has no forward.\n"
            "  Give the modules in it, in their order, in a list."
        )
    return f


def whole(what: str, value: Any, least: int, most: int | None = None) -> int:
    """Returns a value that is a whole number within its range.

    Raises:
        SchemeError: it is not a whole number, or out of range.
    """
    # ``True`` is an int in Python, but not a count.
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limit = f"at least {least}" if most is None else f"from {least} to {most}"
        raise SchemeError(f"Stack: {what} is {shorten(repr(value), 60)}, want a whole number, {limit}.")
    return value


def sizes_of(rule: StepSize, offset: int, depth: int) -> list[float]:
    """Returns the size of each step, after ``offset`` others.

    Raises:
        SchemeError: a size that is not finite.
    """
    whole("step_offset", offset, 0)
    found = []
    for n in range(offset, offset + depth):
        try:
            found.append(float(rule(n)))
        except (OverflowError, SchemeError):
            # A power raises on overflow, where a product would be infinite; the message below says which step.
            found.append(float("inf"))
        if not math.isfinite(found[-1]):
            raise SchemeError(
                f"Stack: step='{rule}' has no finite size at step {n - offset} after "
                f"step_offset={shorten(str(offset), 30)}."
            )
    return found


def newer(given: Mapping[str, Any], step_offset: Any, post_step: Any) -> tuple[Any, Any]:
    """Returns ``step_offset`` and ``post_step``, by whichever name they are given.

    Args:
        given: those that are given by their old names.
        step_offset: as given by its name.
        post_step: the same.

    Raises:
        SchemeError: one is given by both.
    """
    own = {"step_offset": step_offset, "post_step": post_step}
    for name in given:
        if own[name] not in (0, None):
            raise SchemeError(
                f"Stack: {name}= is given twice, by this name and by its old one.\n  Leave out the old one."
            )
    return given.get("step_offset", step_offset), given.get("post_step", post_step)


def sum_of(sizes: Sequence[float], rule: StepSize) -> float:
    """Returns the length of one solve over all steps.

    Raises:
        SchemeError: it is not finite.
    """
    try:
        return math.fsum(sizes)
    except OverflowError:
        raise SchemeError(f"Stack: the {len(sizes)} steps of step='{rule}' have no finite length together.") from None


def example_of(given: Any) -> Any:
    """Returns the input that an example stands for: the example itself, or zeros of that shape.

    Raises:
        SchemeError: neither a tensor nor a shape.
    """
    if isinstance(given, Tensor) or (isinstance(given, tuple) and given and isinstance(given[0], Tensor)):
        return given
    # Anything but a list or tuple becomes [None], which is refused below.
    sizes: list[Any] = list(given) if isinstance(given, (list, tuple)) else [None]
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in sizes):
        raise SchemeError(
            f"Stack: example is {shorten(repr(given), 60)}, want a tensor or the shape of one, such as (8, 3, 32, 32)."
        )
    try:
        return torch.zeros(tuple(sizes))
    except (RuntimeError, TypeError):  # torch reports sizes beyond memory in several ways
        raise SchemeError(
            f"Stack: example is {shorten(repr(given), 60)}, and a tensor of that shape cannot be made here."
        ) from None


def check_arguments(functions: Sequence[nn.Module], scheme: Scheme) -> None:
    """Refuses functions whose signature does not accept one stream, under schemes that call them with one.

    Raises:
        SchemeError: with the signature.
    """
    if type(scheme).slots is not Scheme.slots:  # functions of several streams
        return
    for i, f in enumerate(functions):
        own = f.function if isinstance(f, FunctionModule) else f
        try:
            form = inspect.signature(own.forward if isinstance(own, nn.Module) else own)
        except (TypeError, ValueError):  # some builtins have none
            continue
        takes = signature(own)
        named = {name: None for name in ("t", "context") if name in form.parameters}
        given = ("t", "x") if takes.first else ("x",)
        if takes.first:
            named.pop("t")
        try:
            form.bind(*given, **named)
        except TypeError:
            raise SchemeError(
                f"Stack: residual function {i} takes {form}, and is called with x, and with t and context where it "
                "names them.\n  Wrap it: lambda x: ..."
            ) from None


def check_slots(shared: nn.Module | None, scheme: Scheme) -> None:
    """Raises a SchemeError if the number of functions in a ``PerSlot`` differs from the stages of a step."""
    for part in dict.fromkeys(scheme.plan) if isinstance(shared, PerSlot) else ():
        if part.stages != len(shared):  # type: ignore[arg-type]
            raise SchemeError(
                f"Stack: {len(shared)} shared residual functions, one per slot, and a step of {part} has "  # type: ignore
                f"{part.stages}.\n  Give as many, or a single one for all slots."
            )


def fields_shared(shared: nn.Module | None) -> list[ContinuousWeights]:
    """The shared functions whose weights are functions of depth."""
    given = list(shared) if isinstance(shared, PerSlot) else [shared]
    return [f for f in given if isinstance(f, ContinuousWeights)]


def resolved(rule: StepSize, shared: nn.Module | None, scheme: Scheme, depth: int) -> StepSize:
    """Returns the rule, bound to the depth if it depends on it.

    Raises:
        SchemeError: no span is known, or none is reached by design.
    """
    check_slots(shared, scheme)
    fields, units = fields_shared(shared), sum(scheme.at(n).span for n in range(depth))
    if isinstance(rule, PerDepth):
        length = rule.length
        if length is None:
            if not fields:
                raise SchemeError(
                    "Stack: step='span/depth' asks for the span of a shared ContinuousWeights; for another function "
                    "write the length of time itself, step='1/depth'."
                )
            # If the fields differ in span, ``check_end`` refuses the others.
            length = fields[0].span
        rule = rule.of(length, units)
    for field in fields:
        if isinstance(rule, FromError):
            raise SchemeError(
                f"Stack: step='{rule}' does not end at the span of the weights, {field.span:g}; want 'span/depth', or "
                "the scheme adaptive(dopri5)."
            )
    return rule


def check_end(fields: Sequence[ContinuousWeights], sizes: Sequence[float], scheme: Scheme) -> None:
    """Refuses steps that do not end where the functions of depth end.

    Args:
        fields: the functions of depth.
        sizes: the size of each step.
        scheme: the scheme of the steps.

    Raises:
        SchemeError: they end elsewhere.
    """
    end = sum(h * scheme.at(n).span for n, h in enumerate(sizes)) if fields else 0.0
    for field in fields:
        # Up to rounding, since the end is a sum of floats.
        if abs(end - field.span) > 1e-6 * field.span:
            raise SchemeError(
                f"Stack: {len(sizes)} steps of {scheme} end at t = {end:g}, and the weights are functions on "
                f"[0, {field.span:g}].\n  Write step='span/depth', or ContinuousWeights(..., span={end:g})."
            )


def streams_of(given: Any, scheme: Scheme) -> State:
    """Returns streams that are given as a tuple instead of an input from which the scheme makes them; checks them."""
    # The streams of the first step's scheme, since they are passed to that step.
    count = scheme.at(0).streams
    if count == 1:
        raise SchemeError(f"Stack: the input is a {type(given).__name__}, want a tensor; {scheme} has one stream.")
    return _streams(
        given,
        count,
        f"{scheme} starts from {count}",
        f"Give a tuple of {count} tensors, or the tensor that they are made of.",
    )


def streams_after(given: Any, parts: Sequence[Scheme]) -> State:
    """Returns the streams after the last of some steps, given as a tuple; checks them."""
    count = parts[0].streams + sum(part.streams_added for part in parts)
    return _streams(given, count, f"the steps end with {count}", "Give those of final_state(x), in their order.")


def _streams(given: Any, count: int, want: str, remedy: str) -> State:
    if not isinstance(given, (tuple, list)) or len(given) != count:
        what = f"{len(given)} streams are given" if isinstance(given, (tuple, list)) else f"a {type(given).__name__}"
        raise SchemeError(f"Stack: {what}, {want}.\n  {remedy}")
    for x in given:
        if not isinstance(x, Tensor):
            raise SchemeError(f"Stack: one of the streams is a {type(x).__name__}, want a tensor.")
    return tuple(given)


def shortcuts_of(given: Any, scheme: Scheme, depth: int) -> dict[int, tuple[nn.Module, ...]]:
    """Returns the shortcuts of each step that has any."""
    found: dict[int, tuple[nn.Module, ...]]
    if given is None:
        return {}
    if isinstance(given, nn.Module) and not isinstance(given, nn.ModuleList):
        given = [given]
    if not isinstance(given, (list, tuple, nn.ModuleList)):
        raise SchemeError(f"Stack: shortcut is a {type(given).__name__}, want a module, or a list of modules.")
    given = list(given)
    # A list of lists has one per step; a plain list is for the first step, where stride and width change.
    if given and all(isinstance(g, (list, tuple, nn.ModuleList)) for g in given):
        if len(given) != depth:
            raise SchemeError(f"Stack: shortcuts for {len(given)} steps, want {depth}, one list per step.")
        found = {n: tuple(Unchanged() if g is None else g for g in gs) for n, gs in enumerate(given)}
    else:
        found = {0: tuple(given)}
    for n, gs in found.items():
        if scheme.reversible_in_training:  # the same with an inverse, unless it is more than that, such as by a hook
            found[n] = tuple(Unchanged() if _is_identity(g) else g for g in gs)
    for n, gs in found.items():
        want = scheme.at(n).shortcuts
        if len(gs) != want:
            raise SchemeError(
                f"Stack: {len(gs)} shortcuts for step {n} of {scheme}, want {want or 'none'}; "
                "a stride or projection can also go before the stack."
            )
        for g in gs:
            if not isinstance(g, nn.Module):
                raise SchemeError(f"Stack: the shortcut of step {n} is a {type(g).__name__}, want a module.")
            called(g, f"the shortcut of step {n}")
    return found


def _is_identity(g: Any) -> bool:
    return type(g) is nn.Identity and vars(g) == vars(nn.Identity())


def fitting_counts(scheme: Scheme, n: int) -> tuple[int, ...]:
    """Returns the counts of residual functions nearest to n that a scheme can use: n, or one below and one above."""
    period = scheme.stages
    if n > 0 and n % period == 0:
        return (n,)
    below = n // period * period
    return (below, below + period) if below else (period,)


def fitting_mix(scheme: Scheme, n: int) -> str | None:
    """Returns a mix that uses up n residual functions, as many as possible in steps of the scheme, or None.

    None for a scheme that is itself a mix, and for one of several streams, which do not become one in between.
    """
    if n < 1 or len(scheme.plan) > 1 or scheme.streams > 1:
        return None
    whole, rest = divmod(n, scheme.stages)
    parts = (whole, scheme), (rest // 2, "midpoint"), (rest % 2, "euler")
    return " + ".join(str(part) if times == 1 else f"{times}*{part}" for times, part in parts if times)


def depth_of(scheme: Scheme, functions: int | None, depth: int | None) -> int:
    """Returns the number of steps: from the count of residual functions, or as given for a shared one (None)."""
    if functions is None:
        # One period by default, so that each part of a mix is used.
        return _depth(len(scheme.plan) if depth is None else depth)
    if depth is not None:
        _depth(depth)
    fits = fitting_counts(scheme, functions)
    if fits != (functions,):
        mix = fitting_mix(scheme, functions)
        advice = f" Or write a mix such as '{mix}'." if mix else ""
        raise SchemeError(
            f"Stack: {functions} residual functions for {scheme}, which uses {scheme.stages} at a time; "
            f"the nearest that fit: {' or '.join(map(str, fits))}.{advice}"
        )
    made = functions // scheme.stages * len(scheme.plan)
    if depth is not None and depth != made:
        raise SchemeError(
            f"Stack: {functions} residual functions make {made} steps of {scheme}, not depth={depth}; drop depth."
        )
    return made


def _depth(depth: Any) -> int:
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise SchemeError(f"Stack: depth is {shorten(repr(depth), 60)}, want a whole number of steps, at least 1.")
    if depth > MAX_DEPTH:
        raise SchemeError(f"Stack: depth is {shorten(str(depth), 60)}, and at most {MAX_DEPTH:,} steps are made.")
    return depth


def draws_of(scheme: Scheme, seed: int | None) -> Draws | None:
    """Returns the generator of a stack whose scheme draws in training, if a seed is given.

    Raises:
        SchemeError: not a seed, or a scheme that draws nothing.
    """
    if seed is None:
        return None
    whole("seed", seed, *SEEDS)
    if not any(part.training_differs for part in scheme.plan):
        raise SchemeError(f"Stack: seed={seed} is given, and {scheme} draws nothing in training; bdia does.")
    return Draws(seed)


def check_draws(state: Any, draws: Draws | None) -> None:
    """Raises a SchemeError if a saved generator state does not fit the stack's generator."""
    if draws is None:
        raise SchemeError(
            "Stack: this plan state is that of a stack with a seed, and there is none here.\n"
            "  Build it as it was: Stack(..., seed=...)."
        )
    try:
        # Tried on a new generator, so that a state that does not fit leaves the stack's own unchanged.
        torch.Generator().set_state(state)
    except (RuntimeError, TypeError):
        raise SchemeError(
            f"Stack: 'draws' in this plan state is a {type(state).__name__}, and no state of a generator.\n"
            "  Pass what plan_state() gave."
        ) from None


def functions_made(make: Any, scheme: Scheme, depth: Any, channels: Any, out_channels: Any = None) -> list[nn.Module]:
    """Makes residual functions, each to the requirements of its slot.

    Raises:
        SchemeError: ``make`` cannot be called, or a width or depth that is not a whole number in its range.
    """
    if not callable(make):
        raise SchemeError(f"Stack: make is a {type(make).__name__}, want a function of a Slot that gives a module.")
    whole("channels", channels, 1)
    if out_channels is not None:
        whole("out_channels", out_channels, 1)
    # Widths are tracked from step to step: those of a dense scheme grow.
    streams = scheme.stream_widths(channels)
    found: list[Any] = []
    for n in range(depth_of(scheme, None, depth)):
        part, out = scheme.at(n), out_channels if n == 0 else None
        found += [make(slot) for slot in part.slots(n, streams, out)]
        streams = part.widths(n, streams, out)
    return found


def rule_kept(rule: StepSize, shared: nn.Module | None, steps: Sequence[Step]) -> StepSize:
    """Returns the rule under which other steps of the same shared functions end where these do.

    Raises:
        SchemeError: separate weights, shortcuts, or step sizes that are not plain numbers.
    """
    if shared is None:
        raise SchemeError(
            "Stack: rebuilt takes a shared residual function; separate weights are no function of depth.\n"
            "  ContinuousWeights.from_modules makes one of them, to be fine-tuned."
        )
    if not isinstance(rule, Fixed | PerDepth) or steps[0].gs is not None:
        what = "shortcuts" if steps[0].gs is not None else f"step='{rule}'"
        raise SchemeError(f"Stack: rebuilt cannot say what {what} would be in other steps; want a plain step size.")
    if isinstance(rule, PerDepth) and steps[0].scheduled is None:
        return PerDepth(rule.length)  # not the rule itself, which is bound to the depth of these steps
    return PerDepth(sum(step.h * step.scheme.span for step in steps))


def check_traced(who: str, scheme: Scheme, keeps_all: bool, training: bool) -> None:
    """Refuses torch.fx traces that would lose how a stack is differentiated or what its scheme draws.

    Raises:
        SchemeError: a mode that does not store, or a scheme that draws in training or chooses its own steps.
    """
    if not keeps_all:
        raise SchemeError(
            f"{who}: torch.fx records operations and not how they are differentiated, so that backprop= would be lost."
            "\n  Trace with backprop='store'."
        )
    if scheme.evaluations is None:
        raise SchemeError(f"{who}: {scheme}: {NO_GRAPH}")
    if training and any(part.training_differs for part in scheme.plan):
        raise SchemeError(f"{who}: {scheme} draws in training, which no trace records; call model.eval().")


def steps_of(
    scheme: Scheme,
    functions: Sequence[nn.Module],
    shared: nn.Module | None,
    shortcuts: Mapping[int, Sequence[nn.Module]],
    sizes: Sequence[float],
    learned: bool,
    revision: Revision,
    draws: Draws | None = None,
) -> list[Step]:
    """Builds the steps, one for each size, each with its share of the residual functions."""
    if isinstance(shared, PerSlot):
        shared.revisions.add(revision)
    steps, start = [], 0
    for n, h in enumerate(sizes):
        part = scheme.at(n)
        fs = (shared,) * part.stages if shared is not None else functions[start : start + part.stages]
        start += part.stages
        steps.append(Step(part, fs, shortcuts.get(n, ()), h, learned, n, shared, revision, draws))
    return steps


def warn(scheme: Scheme, rule: StepSize, functions: Sequence[nn.Module], shared: bool) -> None:
    """Warns of settings that run but probably mean something other than intended."""
    for f in functions:
        warn_of_own_skip(f)
    # The stages of a shared function are values of one field: large coefficients, and stages used for the error alone,
    # are then as the method intends.
    if not shared:
        warn_of_mixing(scheme)
        warn_of_unused(scheme, rule)


def warn_of_mixing(scheme: Scheme) -> None:
    """Warns of a scheme whose mixing figure is above the limit."""
    mixing = scheme.mixing
    if mixing is not None and mixing > MIXING_LIMIT:
        # Level 4 is the line that builds the stack, above this function, `warn` and the constructor.
        warnings.warn(
            f"{scheme} sums residual functions with weights of up to {mixing:,.0f} in all (max_i sum_j |a_ij|): with "
            "separate weights its stage inputs keep little of the stream, in half precision nothing.",
            MixingWarning,
            stacklevel=4,
        )


def warn_of_unused(scheme: Scheme, rule: StepSize) -> None:
    """Warns of residual functions that only an error estimate uses, if step sizes do not depend on errors."""
    for part in dict.fromkeys(scheme.plan):
        if part.unused and not isinstance(rule, FromError):
            # A wrapper around an embedded pair has the pair's unused functions, and no error estimate.
            paired = part.tableau is not None and part.tableau.b_hat is not None
            remedy = f"use pruned({part}), or forward_with_errors in the loss" if paired else "prune the pair inside it"
            warnings.warn(
                f"{part}: of its {part.stages} residual functions a step, {len(part.unused)} enter the error estimate "
                f"only and not the output; {remedy}.",
                stacklevel=4,
            )


def check_companion(scheme: Scheme) -> None:
    """Raises a SchemeError if a part of the scheme has no embedded companion."""
    for part in scheme.plan:
        if not isinstance(part, RungeKutta) or part.tableau.b_hat is None:
            raise SchemeError(
                f"Stack: {part} has no embedded companion to estimate errors; dopri5, tsit5 and verner89 have one."
            )
