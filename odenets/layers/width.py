"""Widths that are a factor of another, rounded down."""

from fractions import Fraction

# Factors are meant as decimals or as simple fractions: 0.29 is 29/100, 0.3333333333333333 is 1/3.
_DENOMINATOR = 10**6


def scaled_width(width: int, factor: float, divisor: int = 1) -> int:
    """Returns width times factor, rounded down to a multiple of ``divisor``, for the factor as it is written.

    A product of floats would round 0.29 times 100 down to 28.

    Args:
        width: the width.
        factor: the factor; the nearest fraction of a denominator up to a million counts.
        divisor: what the result is a multiple of.

    Example:
        >>> scaled_width(100, 0.29), scaled_width(300, 1 / 3), scaled_width(100, 0.5, 8)
        (29, 100, 48)
    """
    return int(Fraction(factor).limit_denominator(_DENOMINATOR) * width / divisor) * divisor
