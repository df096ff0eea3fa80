"""The closest of known names, for the remedy of an error: one way for schemes, models, options, commands and files."""

import difflib
from collections.abc import Iterable


def closest(name: str, names: Iterable[str], most: int = 3, cutoff: float = 0.4) -> list[str]:
    """The names that resemble one, the best first; capitals do not matter.

    Args:
        name: as it was given.
        names: those that there are.
        most: how many at most.
        cutoff: how much they must resemble it, from 0 to 1.

    Example:
        >>> closest("ResNet50", ["rk4", "resnet50"])
        ['resnet50']
    """
    folded: dict[str, str] = {}
    for known in names:
        folded.setdefault(known.casefold(), known)
    return [folded[near] for near in difflib.get_close_matches(name.casefold(), folded, n=most, cutoff=cutoff)]
