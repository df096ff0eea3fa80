"""The closest known names, for the remedy in an error: shared by schemes, models, options, commands and files."""

import difflib
from collections.abc import Iterable


def closest(name: str, names: Iterable[str], most: int = 3, cutoff: float = 0.4) -> list[str]:
    """The names that resemble a given one, the best first; case is ignored.

    Args:
        name: the name as given.
        names: the known names.
        most: maximum number of results.
        cutoff: minimum similarity, from 0 to 1.

    Example:
        >>> closest("ResNet50", ["rk4", "resnet50"])
        ['resnet50']
    """
    folded: dict[str, str] = {}
    for known in names:
        folded.setdefault(known.casefold(), known)
    return [folded[near] for near in difflib.get_close_matches(name.casefold(), folded, n=most, cutoff=cutoff)]
