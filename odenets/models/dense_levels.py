"""Levels of concatenating networks: the scheme ``dense`` with each level's growth, or any other scheme in its place."""

from collections.abc import Sequence

import schemes
from schemes import Scheme, SchemeError
from schemes.dense import Dense


def schemes_with_growth(scheme: str | Scheme | Sequence[str | Scheme], growths: Sequence[int]) -> list[Scheme]:
    """One scheme per level, where the word "dense" takes the level's growth, and hands the streams over unjoined.

    Args:
        scheme: a scheme for all levels, or one per level.
        growths: new channels per residual function, for each level.

    Raises:
        SchemeError: a list of another length, or an unknown scheme.

    Example:
        >>> [str(s) for s in schemes_with_growth(["dense", "euler"], [12, 24])]
        ['dense(12, join=false)', 'euler']
    """
    each = [scheme] * len(growths) if isinstance(scheme, (str, Scheme)) else list(scheme)
    if len(each) != len(growths):
        raise SchemeError(f"{len(each)} schemes for {len(growths)} levels; give one scheme for all, or one per level.")
    return [Dense(g, join=False) if s == "dense" else schemes.get(s) for s, g in zip(each, growths, strict=True)]


def width_after(scheme: Scheme, width: int, depth: int) -> int:
    """Width of the readout after so many steps: a dense scheme widens the stream, any other keeps it."""
    return width + depth * scheme.growth if isinstance(scheme, Dense) else width
