"""Exact numbers: a rational, or p + q sqrt(d)."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, total_ordering
from math import isqrt, lcm
from operator import add, mul, sub, truediv
from typing import TypeAlias

from .errors import SchemeError


@total_ordering
@dataclass(frozen=True, slots=True)
class Surd:
    """An irrational number p + q sqrt(d), exact: q is not 0 and d is square-free.

    Made by `sqrt` and arithmetic; a result whose root cancels is a `Fraction` again.

    Raises:
        SchemeError: q is 0, d has a square factor, or two different roots are combined.

    Example:
        >>> x = (2 - sqrt(2)) / 2
        >>> print(x, x * (2 + sqrt(2)), float(x))
        (2-sqrt(2))/2 1 0.2928932188134525
    """

    p: Fraction
    q: Fraction
    d: int

    def __post_init__(self):
        if not self.q or _square_part(self.d) != 1 or self.d < 2:
            raise SchemeError(
                f"{self.p} + {self.q}*sqrt({self.d}) is no surd: use Fraction, or schemes.exact_numbers.sqrt(n)."
            )

    def __add__(self, other: int | Fraction | Surd) -> Number:
        p, q = self._parts(other)
        return _number(self.p + p, self.q + q, self.d)

    def __mul__(self, other: int | Fraction | Surd) -> Number:
        p, q = self._parts(other)
        return _number(self.p * p + self.q * q * self.d, self.p * q + self.q * p, self.d)

    def __truediv__(self, other: int | Fraction | Surd) -> Number:
        p, q = self._parts(other)
        norm = p * p - q * q * self.d  # zero only for p = q = 0, since sqrt(d) is irrational
        return self * _number(p / norm, -q / norm, self.d)

    def __rtruediv__(self, other: int | Fraction) -> Number:
        norm = self.p * self.p - self.q * self.q * self.d
        return Surd(self.p / norm, -self.q / norm, self.d) * other

    def __sub__(self, other: int | Fraction | Surd) -> Number:
        return self + -other

    def __rsub__(self, other: int | Fraction) -> Number:
        return -self + other

    __radd__ = __add__
    __rmul__ = __mul__

    def __neg__(self) -> Surd:
        return Surd(-self.p, -self.q, self.d)

    def __pos__(self) -> Surd:
        return self

    def __abs__(self) -> Surd:
        return self if self.sign > 0 else -self

    @property
    def sign(self) -> int:
        """1 or -1, found without rounding."""
        # The larger of p and q sqrt(d) in magnitude decides; magnitudes are compared by their squares.
        larger = self.p if self.p * self.p > self.q * self.q * self.d else self.q
        return 1 if larger > 0 else -1

    def __lt__(self, other: int | Fraction | Surd) -> bool:
        difference = self - other
        return difference.sign < 0 if isinstance(difference, Surd) else difference < 0

    def __float__(self) -> float:
        # In integers: float(p) + float(q) * sqrt(d) would lose digits where the two nearly cancel.
        n = lcm(self.p.denominator, self.q.denominator)
        p, square = int(self.p * n), int(self.q * n) ** 2 * self.d
        bits = 64
        while True:  # p / n and the root may cancel: narrow the bracket until both of its ends round to one float
            root = isqrt(square << 2 * bits)
            low = (p << bits) + (root if self.q > 0 else -root - 1)
            if low / (n << bits) == (low + 1) / (n << bits):
                return low / (n << bits)
            bits *= 2

    def __str__(self) -> str:
        n = lcm(self.p.denominator, self.q.denominator)
        p, q = int(self.p * n), int(self.q * n)
        root = f"sqrt({self.d})" if abs(q) == 1 else f"{abs(q)}*sqrt({self.d})"
        text = f"{p or ''}{'-' if q < 0 else '+' if p else ''}{root}"
        return text if n == 1 else f"({text})/{n}" if p else f"{text}/{n}"

    def _parts(self, other: int | Fraction | Surd) -> tuple[Fraction, Fraction]:
        if isinstance(other, Surd):
            # A field with one root is closed under division; two roots would need four rationals, and no method here
            # needs them.
            if other.d != self.d:
                raise SchemeError(f"sqrt({self.d}) and sqrt({other.d}) meet: an expression can hold only one root.")
            return other.p, other.q
        if isinstance(other, (int, Fraction)):
            return Fraction(other), Fraction(0)
        raise SchemeError(f"{self} and {other!r}: exact numbers combine with int, Fraction and Surd only.")


Number: TypeAlias = Fraction | Surd


def _number(p: Fraction, q: Fraction, d: int) -> Number:
    return Surd(p, q, d) if q else p


@lru_cache
def _square_part(n: int) -> int:
    """The largest k whose square divides n."""
    return max((k for k in range(1, isqrt(max(n, 1)) + 1) if n % (k * k) == 0), default=1)


def sqrt(n: int) -> Number:
    """The square root of a whole number up to a million, exact.

    Example:
        >>> print(sqrt(8), sqrt(9))
        2*sqrt(2) 3
    """
    if not 0 <= n <= 10**6:
        raise SchemeError(f"sqrt({n}): exact roots are kept for whole numbers from 0 to 1000000.")
    k = _square_part(n) if n else 0
    return Fraction(k) if k * k == n else Surd(Fraction(0), Fraction(k), n // (k * k))


_OPERATORS: dict[type, Callable] = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv}


def number(text: str) -> Number:
    """The exact number that a text writes with digits, ``+ - * /``, brackets and ``sqrt(n)``; decimals are exact too.

    The text is parsed, never evaluated.

    Raises:
        SchemeError: anything else, a division by zero, more than 500 characters.

    Example:
        >>> print(number("1/2"), number("-0.25"), number("(2-sqrt(2))/2"))
        1/2 -1/4 (2-sqrt(2))/2
    """

    def value(node: ast.expr) -> Number:
        match node:
            case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value(left), value(right))
            case ast.UnaryOp(ast.USub(), operand):
                return -value(operand)
            case ast.UnaryOp(ast.UAdd(), operand):
                return value(operand)
            case ast.Call(ast.Name("sqrt"), [ast.Constant(int(n))], []):
                return sqrt(n)
            case ast.Constant():
                digits = ast.get_source_segment(source, node) or ""  # the node itself holds a rounded float
                # Exponents are bounded: 1e999999999 is short to write, but would fill the memory as a fraction.
                if re.fullmatch(r"\d*\.?\d*(e[+-]?\d\d?)?", digits, re.IGNORECASE):
                    return Fraction(digits)
        raise ValueError

    source = text.strip()
    try:
        if len(source) > 500:
            raise ValueError
        return value(ast.parse(source, mode="eval").body)
    except SchemeError:
        raise
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        shown = source if len(source) <= 60 else source[:57] + "..."
        raise SchemeError(f"{shown!r} is no exact number; write 1/2, -0.25 or (2-sqrt(2))/2.") from None


NumberLike: TypeAlias = int | Fraction | Surd | str


def exact(x: NumberLike) -> Number:
    """A number as it is, a text as `number` reads it; floats are refused, since they are already rounded."""
    if isinstance(x, str):
        return number(x)
    if isinstance(x, (Fraction, Surd)):
        return x
    # Not floats: 0.1 is not 1/10, and an order condition would fail by 1e-17 for no visible reason.
    if isinstance(x, int) and not isinstance(x, bool):
        return Fraction(x)
    raise SchemeError(f"{x!r} is not exact; write it as text or as Fraction, such as '1/3' or Fraction(1, 3).")


def show(x: Number) -> str:
    """The text that `number` reads: a fraction, a decimal where the denominator is a large power of ten, or a surd."""
    if isinstance(x, Fraction) and x.denominator > 10**4:
        for places in range(5, 41):
            if (10**places) % x.denominator == 0:
                digits = f"{abs(x.numerator) * (10**places // x.denominator):0{places + 1}d}"
                return f"{'-' if x < 0 else ''}{digits[:-places]}.{digits[-places:]}"
    return str(x)
