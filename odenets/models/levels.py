"""What every model of levels shares: one scheme per level, and counts of residual functions that fit it."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import schemes
from schemes import Scheme, SchemeError

from ..build import fitting_counts


def schemes_of_levels(scheme: str | Scheme | Sequence[str | Scheme], levels: int) -> list[Scheme]:
    """One scheme per level, from one for all or one each.

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
    """Which levels recompute: all, none, or the first so many, whose maps are the largest.

    Raises:
        SchemeError: a number outside 0 to ``levels``.

    Example:
        >>> recomputing(True, 3), recomputing(1, 3)
        ([True, True, True], [True, False, False])
    """
    if isinstance(recompute, bool):
        return [recompute] * levels
    if not isinstance(recompute, int) or not 0 <= recompute <= levels:
        raise SchemeError(f"recompute is {recompute!r}, want true, false, or how many of the {levels} levels.")
    return [level < recompute for level in range(levels)]


def steps_that_fit(scheme: Scheme, functions: int, level: int) -> int:
    """Number of steps that use up a level's residual functions.

    Args:
        scheme: the level's scheme; a mix counts with its whole period.
        functions: the level's number of residual functions.
        level: number of the level from 1, for the message.

    Raises:
        SchemeError: the count is no multiple of the scheme's stages; names the nearest counts that are.

    Example:
        >>> import schemes
        >>> steps_that_fit(schemes.get("rk4"), 12, level=1)
        3
    """
    period, plan = scheme.stages, scheme.plan
    if isinstance(functions, bool) or not isinstance(functions, int) or functions < 1:
        raise SchemeError(f"level {level} has {functions!r} residual functions, want a whole number, at least 1.")
    whole, rest = divmod(functions, period)
    if not rest:
        return whole * len(plan)
    counts = " or ".join(map(str, fitting_counts(scheme, functions)))
    text = f"level {level} has {functions} residual functions, and {scheme} takes {period} a step: use {counts}"
    if whole and len(plan) == 1:
        last = {1: "euler", 2: "midpoint"}.get(rest, f"{rest}*euler")
        text += f", or a mix that fits, such as '{whole}*{scheme} + {last}'"
    raise SchemeError(text + ".")


@contextlib.contextmanager
def warned_once(stacklevel: int = 5) -> Iterator[None]:
    """Repeats each different warning that was raised inside once, as of the caller: not once per level."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for text, category in dict.fromkeys((str(w.message), w.category) for w in caught):
        warnings.warn(text, category, stacklevel=stacklevel)
