"""Linear stability: what one step does to y' = lambda y, x' = R(z) x with z = h lambda.

For an explicit method R is the polynomial 1 + sum_k b^T a^k 1 z^(k+1), of degree at most the number of stages; its
coefficients are exact here. A step does not grow where |R(z)| <= 1. (Hairer, Wanner 1996, IV.2.)
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any, NamedTuple

from .errors import SchemeError
from .tableau import Number, Surd, Tableau

_SCAN = Decimal(1) / 64
_SLACK = Decimal(10) ** -12
_PRECISION = 60  # digits; a Chebyshev method of 64 stages loses some 45 of them where its interval ends


def polynomial(tableau: Tableau) -> tuple[Number, ...]:
    """Coefficients of R(z), constant term first, exact.

    Args:
        tableau: the method.

    Example:
        >>> from schemes import tableaux
        >>> [str(x) for x in polynomial(tableaux.rk4)]
        ['1', '1', '1/2', '1/6', '1/24']
    """
    zero: Number = Fraction(0)
    # At most as many powers as stages: a is strictly lower triangular, so its s-th power is zero.
    powers: list[Number] = [Fraction(1)] * tableau.stages  # a^k 1
    coefficients: list[Number] = [Fraction(1)]
    for _ in range(tableau.stages):
        coefficients.append(sum((b * x for b, x in zip(tableau.b, powers, strict=True)), zero))
        powers = [sum((a * x for a, x in zip(row, powers, strict=False) if a != 0), zero) for row in tableau.a]
    # Stages that do not reach the output leave zeros at the top; the degree must be the true one.
    while coefficients[-1] == 0:
        coefficients.pop()
    return tuple(coefficients)


def R(tableau: Tableau, z: Any) -> Any:
    """The stability function at z, in floats, by Horner's rule.

    Args:
        tableau: the method.
        z: a number, or anything with ``*`` and ``+``: a torch tensor or numpy array of any shape, real or complex.

    Example:
        >>> from schemes import tableaux
        >>> R(tableaux.rk4, -1.0), R(tableaux.midpoint, 1j)
        (0.375, (0.5+1j))
    """
    return _horner([float(x) for x in polynomial(tableau)], z)


def _horner(coefficients: list[float], z: Any) -> Any:
    # Plus 0 z, so that the value has the type and shape of z.
    value = coefficients[-1] + 0 * z
    for x in reversed(coefficients[:-1]):
        value = value * z + x
    return value


class Region(NamedTuple):
    """|R| on a grid: ``size[i][j]`` belongs to ``re[j] + 1j * im[i]``, as contour plots expect.

    Args:
        re: real parts, one per column.
        im: imaginary parts, one per row.
        size: |R| at each.
    """

    re: list[float]
    im: list[float]
    size: list[list[float]]


def region(
    tableau: Tableau,
    re: tuple[float, float] = (-5.0, 1.0),
    im: tuple[float, float] = (-4.0, 4.0),
    n: int | tuple[int, int] = 101,
) -> Region:
    """|R(z)| on a grid of the complex plane; the method is stable where it is at most 1.

    Args:
        tableau: the method.
        re: ends of the real axis.
        im: ends of the imaginary axis.
        n: points per axis, or (points along re, points along im); at least 2.

    Example:
        >>> from schemes import tableaux
        >>> grid = region(tableaux.euler, re=(-2, 0), im=(-1, 1), n=3)
        >>> grid.size[1]
        [1.0, 0.0, 1.0]
    """
    counts = (n, n) if isinstance(n, int) else n
    if min(counts) < 2:
        raise SchemeError(f"region: {n} points; want at least 2 per axis.")
    x, y = ([lo + (hi - lo) * k / (m - 1) for k in range(m)] for (lo, hi), m in zip((re, im), counts, strict=True))
    coefficients = [float(c) for c in polynomial(tableau)]
    return Region(x, y, [[abs(_horner(coefficients, complex(u, v))) for u in x] for v in y])


def real_interval(tableau: Tableau, tolerance: float = 0.0) -> float:
    """The largest r with |R(x)| <= 1 + tolerance for -r <= x <= 0, accurate to about 1e-11.

    |R| is evaluated in 60 digits on a grid of step 1/64 and the first crossing is bisected. A bump above 1 that is
    narrower than the grid is missed, and an excess of 1e-12 is ignored: undamped methods touch 1 inside the interval.

    Args:
        tableau: the method.
        tolerance: growth per step that still counts as stable.

    Example:
        >>> from schemes import tableaux
        >>> round(real_interval(tableaux.rk4), 6)
        2.785294
    """
    with localcontext() as context:
        context.prec = _PRECISION
        coefficients = [_decimal(x) for x in polynomial(tableau)]
        limit = 1 + max(_SLACK, Decimal(tolerance))

        def grows(x: Decimal) -> bool:
            value = coefficients[-1]
            for c in reversed(coefficients[:-1]):
                value = c - value * x
            return abs(value) > limit

        return _first(grows)


def imaginary_interval(tableau: Tableau, tolerance: float = 0.0) -> float:
    """The largest r with |R(iy)| <= 1 + tolerance for 0 <= y <= r; 0.0 if |R| rises at once and no growth is allowed.

    Whether |R(iy)|^2 = 1 + e_k y^k + ... rises or falls at 0 is read from the first coefficient e_k that is not zero
    (for rounded data: not within rounding), since near 0 the values barely differ from 1: dopri8 is unstable on the
    whole axis, but up to y = 0.7 it grows by less than 1e-9 per step. The rest is as in `real_interval`.

    Args:
        tableau: the method.
        tolerance: growth per step that still counts as stable.

    Example:
        >>> from schemes import tableaux
        >>> round(imaginary_interval(tableaux.rk4), 6), imaginary_interval(tableaux.midpoint)
        (2.828427, 0.0)
    """
    r = polynomial(tableau)
    # R(iy) = even(y^2) + iy odd(y^2), so |R(iy)|^2 = even^2 + y^2 odd^2 is a polynomial in y^2.
    even = [x if k % 2 == 0 else -x for k, x in enumerate(r[0::2])]
    odd = [x if k % 2 == 0 else -x for k, x in enumerate(r[1::2])]
    square: list[Number] = [Fraction(0)] * len(r)
    for part, shift in ((even, 0), (odd, 1)):
        for i, x in enumerate(part):
            for j, y in enumerate(part):
                square[i + j + shift] += x * y
    square[0] -= 1
    # How large a coefficient that is zero can become by the rounding of published decimals.
    noise = 10 * tableau.tolerance * tableau.stages * max(1.0, tableau.mixing)
    if tolerance == 0:  # divide by the lowest power present: the sign of its coefficient decides, however small
        while len(square) > 1 and (square[0] == 0 or abs(float(square[0])) <= noise):
            del square[0]
        if square[0] > 0:
            return 0.0
    with localcontext() as context:
        context.prec = _PRECISION
        coefficients = [_decimal(x) for x in square]
        # The limit of |R|^2 - 1, which is the polynomial here.
        limit = (1 + Decimal(tolerance)) ** 2 - 1

        def grows(y: Decimal) -> bool:
            value = Decimal(0)
            for c in reversed(coefficients):
                value = value * y * y + c
            return value > limit

        return _first(grows)


def _decimal(x: Number) -> Decimal:
    if isinstance(x, Surd):
        return _decimal(x.p) + _decimal(x.q) * Decimal(x.d).sqrt()
    return Decimal(x.numerator) / Decimal(x.denominator)


def _first(grows: Callable[[Decimal], bool]) -> float:
    """Where `grows` first turns true on the grid, bisected; |R| is unbounded, so it does."""
    low = Decimal(0)
    # A scan, since the set where |R| <= 1 may have gaps: bisection alone could land beyond the first.
    while not grows(low + _SCAN):
        low += _SCAN
    high = low + _SCAN
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if grows(middle) else (middle, high)
    return float(low)
