"""What a Stack works out before it runs: its residual functions, steps and shortcuts, and what does not go together."""

import warnings
from typing import Any

import torch
from torch import nn

from schemes.coupling import Coupling
from schemes.errors import MixingWarning, SchemeError
from schemes.runge_kutta import RungeKutta
from schemes.scheme import Scheme
from schemes.step_size import FromError, StepSize

from .step import Call

# Above this mixing figure the stage inputs of separate weights keep little of the stream.
MIXING_LIMIT = 30.0


def functions_of(block: Any) -> tuple[list[nn.Module], nn.Module | None]:
    """The residual functions as modules, and the shared one where there is only one."""
    if isinstance(block, nn.Module) and not isinstance(block, nn.ModuleList):
        return [block], block
    if callable(block) and not isinstance(block, nn.ModuleList):  # a module list can be called, and raises then
        call = Call(block)  # type: ignore[arg-type]
        return [call], call
    try:
        fs = list(block)
    except TypeError:
        raise SchemeError(
            f"Stack: block is a {type(block).__name__}, want a module, a callable, or a sequence of them."
        ) from None
    for i, f in enumerate(fs):
        if not callable(f):
            raise SchemeError(f"Stack: residual function {i} is a {type(f).__name__}, want a module or a callable.")
    return [f if isinstance(f, nn.Module) else Call(f) for f in fs], None


def shortcuts_of(given: Any, scheme: Scheme, depth: int) -> dict[int, tuple[nn.Module, ...]]:
    """The shortcuts of each step that has some."""
    found: dict[int, tuple[nn.Module, ...]]
    if given is None:
        return {}
    if isinstance(given, nn.Module) and not isinstance(given, nn.ModuleList):
        given = [given]
    given = list(given)
    if given and all(isinstance(g, (list, tuple, nn.ModuleList)) for g in given):
        if len(given) != depth:
            raise SchemeError(f"Stack: shortcuts for {len(given)} steps, want {depth}, one list per step.")
        found = {n: tuple(nn.Identity() if g is None else g for g in gs) for n, gs in enumerate(given)}
    else:
        found = {0: tuple(given)}
    for n, gs in found.items():
        want = scheme.at(n).shortcuts
        if len(gs) != want:
            raise SchemeError(
                f"Stack: {len(gs)} shortcuts for step {n} of {scheme}, want {want or 'none'}; "
                "a stride or projection can also stand before the stack."
            )
        for g in gs:
            if not isinstance(g, nn.Module):
                raise SchemeError(f"Stack: the shortcut of step {n} is a {type(g).__name__}, want a module.")
    return found


def check_reverse(scheme: Scheme, after: nn.Module | None, exact: bool) -> None:
    if exact:
        for part in (scheme.at(0), scheme.at(1)):
            fs = [nn.Identity()] * part.stages
            for p, *_ in part.training_scheme(0, torch.zeros(1, 1)).decompose(fs, 1.0):
                if not isinstance(p, Coupling) or not p.exact:
                    raise SchemeError(
                        f"Stack: {p} cannot be undone bit by bit, which backprop='exact' needs: use backprop='reverse'."
                    )
    if not scheme.reversible_in_training:
        raise SchemeError(
            f"Stack: {scheme} has no inverse, which backprop='reverse' needs: use backprop='checkpoint', or an "
            f"invertible scheme such as revnet or reversible({scheme})."
        )
    if after is not None:
        raise SchemeError(
            "Stack: after= is a projection that cannot be undone, so backprop='reverse' refuses it: put it into the "
            "residual functions (pre-activation), or use backprop='checkpoint'."
        )


def fitting_counts(scheme: Scheme, n: int) -> tuple[int, ...]:
    """The counts of residual functions nearest to n that a scheme can use: n itself, or one below and one above."""
    period = scheme.stages
    if n > 0 and n % period == 0:
        return (n,)
    below = n // period * period
    return (below, below + period) if below else (period,)


def depth_of(scheme: Scheme, n: int, depth: int | None) -> int:
    """The number of steps that n residual functions make."""
    fits = fitting_counts(scheme, n)
    if fits != (n,):
        raise SchemeError(
            f"Stack: {n} residual functions for {scheme}, which uses {scheme.stages} at a time; "
            f"the nearest that fit: {' or '.join(map(str, fits))}. Or write a mix such as '3*rk4 + midpoint'."
        )
    made = n // scheme.stages * len(scheme.plan)
    if depth is not None and depth != made:
        raise SchemeError(
            f"Stack: {n} residual functions make {made} steps of {scheme}, not depth={depth}; drop depth."
        )
    return made


def warn_of_mixing(scheme: Scheme) -> None:
    mixing = scheme.mixing
    if mixing is not None and mixing > MIXING_LIMIT:
        warnings.warn(
            f"{scheme} sums residual functions with weights of up to {mixing:,.0f} in all (max_i sum_j |a_ij|): with "
            "separate weights its stage inputs keep little of the stream, in half precision nothing.",
            MixingWarning,
            stacklevel=3,
        )


def warn_of_unused(scheme: Scheme, rule: StepSize) -> None:
    for part in dict.fromkeys(scheme.plan):
        if isinstance(part, RungeKutta) and part.unused and not isinstance(rule, FromError):
            warnings.warn(
                f"{part}: of its {part.stages} residual functions a step, {len(part.unused)} enter the error estimate "
                f"only and not the output; use pruned({part}), or forward_with_errors in the loss.",
                stacklevel=3,
            )


def check_companion(scheme: Scheme) -> None:
    for part in scheme.plan:
        if not isinstance(part, RungeKutta) or part.tableau.b_hat is None:
            raise SchemeError(
                f"Stack: {part} has no embedded companion to estimate errors; dopri5, tsit5 and verner89 have one."
            )
