"""Seeds as functions of a place: of an epoch, a sample, a picture."""

import hashlib


def seed_of(*place: int | str) -> int:
    """A seed for each place, without patterns: those of (0, 1) and (1, 0) have nothing in common.

    Example:
        >>> seed_of(1, "order", 2) == seed_of(1, "order", 2) != seed_of(1, "order", 3)
        True
    """
    # A hash and not a sum, which would give (0, 1) and (1, 0) one seed. Shifted, to be positive in any 64 bits.
    return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=8).digest(), "little") >> 1
