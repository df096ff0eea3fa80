"""Seeds as functions of a place: of an epoch, a sample, an image."""

import hashlib


def seed_of(*place: int | str) -> int:
    """Returns the seed of a place, without patterns: those of (0, 1) and (1, 0) have nothing in common.

    Example:
        >>> seed_of(1, "order", 2) == seed_of(1, "order", 2) != seed_of(1, "order", 3)
        True
    """
    # A hash, since a sum would give (0, 1) and (1, 0) the same seed. Shifted to be non-negative in signed 64 bits, too.
    return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=8).digest(), "little") >> 1
