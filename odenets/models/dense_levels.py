"""Levels of concatenating networks: the scheme ``dense`` with each level's growth, or any other scheme in its place."""

from collections.abc import Sequence

import schemes
from schemes import Scheme, SchemeError
from schemes.dense import Dense


def schemes_with_growth(scheme: str | Scheme | Sequence[str | Scheme], growths: Sequence[int]) -> list[Scheme]:
    """Returns one scheme per level, where "dense" takes the level's growth and passes the streams on unjoined.

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
    # Unjoined, so that functions that recompute need not keep the joined copy.
    return [Dense(g, join=False) if s == "dense" else schemes.get(s) for s, g in zip(each, growths, strict=True)]


def grown_width(scheme: Scheme, width: int, count: int, growth: int) -> int:
    """Returns the width that a transition after a level narrows from: that of the concatenation.

    A one-stream scheme keeps its width, and transitions that count on growth would narrow it to nothing; so its next
    level gets the width that it has under ``dense``.

    Args:
        scheme: the level's scheme.
        width: width of the level's input.
        count: residual functions of the level.
        growth: channels that each would add.

    Example:
        >>> [grown_width(s, 64, 6, 32) for s in schemes_with_growth(["dense", "euler"], [32, 32])]
        [256, 256]
    """
    # A scheme such as dense(8) has its own growth, which takes precedence over the level's.
    return width + count * (scheme.growth if isinstance(scheme, Dense) else growth)


class Widths:
    """Tracks the width through the levels of a concatenating network.

    Args:
        width: width of the stem.

    Attributes:
        width: current width of the stream.
        grown: width of the concatenation that a transition narrows from.
        channels: width after each level.
    """

    def __init__(self, width: int):
        self.width = self.grown = width
        self.channels: list[int] = []

    def narrowed(self, out: int) -> tuple[int, int]:
        """Returns the widths before and after a transition to ``out`` channels, and makes ``out`` the current one."""
        before, self.width = self.width, out
        return before, out

    def level(self, scheme: Scheme, count: int, growth: int, depth: int) -> None:
        """Advances through a level of ``count`` functions in ``depth`` steps."""
        self.grown = grown_width(scheme, self.width, count, growth)
        self.width = width_after(scheme, self.width, depth)
        self.channels.append(self.width)


def width_after(scheme: Scheme, width: int, depth: int) -> int:
    """Returns the readout's width after ``depth`` steps: a dense scheme widens the stream, any other keeps it."""
    return width + depth * scheme.growth if isinstance(scheme, Dense) else width
