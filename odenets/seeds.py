"""Seeds as functions of a place: of an epoch, a sample, an image."""

import hashlib
import operator
from typing import Any

from schemes import SchemeError


def plain(part: Any) -> int | str:
    """Returns a whole number or a text of any type, such as NumPy's, as one of Python's own.

    Args:
        part: the number, possibly as a tensor of one element, or the text.

    Raises:
        SchemeError: it is neither; a truth value is no number, nor is 2.0.
    """
    if type(part) is int or type(part) is str:
        return part
    if isinstance(part, str):
        return str.__str__(part)
    try:
        # A tensor of a truth value would pass for a number.
        if isinstance(part, bool) or "bool" in str(getattr(part, "dtype", "")):
            raise TypeError
        return operator.index(part)
    except TypeError:
        raise SchemeError(f"a seed follows from whole numbers and texts, not from {part!r}\n  Give int(...)") from None


def seed_of(*place: int | str) -> int:
    """Returns the seed of a place, without patterns: those of (0, 1) and (1, 0) have nothing in common.

    It does not depend on the types of the numbers, such as NumPy's.

    Raises:
        SchemeError: the place has a part that is neither a whole number nor a text.

    Example:
        >>> seed_of(1, "order", 2) == seed_of(1, "order", 2) != seed_of(1, "order", 3)
        True
    """
    # A hash, since a sum would give (0, 1) and (1, 0) the same seed. Shifted to be non-negative in signed 64 bits, too.
    text = repr(tuple(map(plain, place)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
