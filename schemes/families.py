"""Families of Runge-Kutta methods: functions that derive exact coefficients from parameters.

All of them stay in the field of their parameters: rational parameters give rational methods, since the Chebyshev and
Legendre recursions only add, multiply and divide.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import TypeAlias

from .errors import SchemeError
from .exact_numbers import Number, NumberLike, exact
from .language import sampled
from .tableau import Tableau

Numbers: TypeAlias = Sequence[Number]


@sampled("ees25", "ees25(1/4)", "ees25(x=-0.3)")
def ees25(x: NumberLike = "1/10") -> Tableau:
    """Order 2 and antisymmetric order 5 in three stages, for any x but 1 and +-1/2.

    Args:
        x: the free parameter of the family.

    Example:
        >>> print(ees25("1/4"))
        0   |
        1/2 | 1/2
        1   | 0   1
            | 1/4 1/2 1/4
    """
    x = exact(x)
    if x == 1 or 4 * x * x == 1:
        raise SchemeError(f"ees25: x = {x} divides by zero; any number but 1, 1/2 and -1/2 will do.")
    p, q = 4 * (1 - x), 1 - 4 * x * x
    # The rows sum to the nodes by construction, so the nodes are not written out again.
    return Tableau.from_rows(
        [[], [(1 + 2 * x) / p], [-(4 * x - 1) * (4 * x - 1) / (p * q), (1 - x) / q]],
        [x, Fraction(1, 2), Fraction(1, 2) - x],
        name="ees25" if x == Fraction(1, 10) else f"ees25({x})",
        order=2,
        cite="Shmelev et al. 2025, arXiv 2507.21006, EES(2,5;x)",
    )


def _recursion(
    mu: Numbers, nu: Numbers, mu_t: Numbers, gamma_t: Numbers, *, name: str, order: int, cite: str
) -> Tableau:
    """Y_j = (1 - mu_j - nu_j) Y_0 + mu_j Y_{j-1} + nu_j Y_{j-2} + mu~_j h F_{j-1} + gamma~_j h F_0, for j = 1..s."""
    alpha: list[list[Number]] = []
    beta: list[list[Number]] = []
    for j, (m, n, m_t, g_t) in enumerate(zip(mu, nu, mu_t, gamma_t, strict=True), start=1):
        a: list[Number] = [Fraction(0)] * j
        b = list(a)
        a[0] += 1 - m - n
        a[j - 1] += m
        # At the first stage there is no Y_{j-2}; its factor is 0 there.
        a[max(j - 2, 0)] += n
        b[0] += g_t
        b[j - 1] += m_t
        alpha.append(a)
        beta.append(b)
    return Tableau.shu_osher(alpha, beta, name=name, order=order, cite=cite)


def _chebyshev(s: int, w: Fraction) -> tuple[list[Fraction], list[Fraction], list[Fraction]]:
    """The Chebyshev polynomials T_0 .. T_s, their first and their second derivatives, at w."""
    t, d, e = [Fraction(1), w], [Fraction(0), Fraction(1)], [Fraction(0), Fraction(0)]
    # The recursion T_j = 2 w T_{j-1} - T_{j-2}, differentiated once and twice. Higher derivatives are appended first,
    # since they read index j - 1 of the lower ones.
    for _ in range(2, s + 1):
        e.append(4 * d[-1] + 2 * w * e[-1] - e[-2])
        d.append(2 * t[-1] + 2 * w * d[-1] - d[-2])
        t.append(2 * w * t[-1] - t[-2])
    return t, d, e


def _stages(name: str, s: int, least: int) -> int:
    if (
        isinstance(s, bool) or not isinstance(s, int) or not least <= s <= 64
    ):  # exact coefficients grow with s, and so does the time
        raise SchemeError(f"{name}({s}): want a whole number of stages from {least} to 64.")
    return s


def _damping(name: str, damping: NumberLike) -> Fraction:
    value = exact(damping)
    if not isinstance(value, Fraction) or value < 0:
        raise SchemeError(f"{name}: damping {damping} is no rational number >= 0, such as '1/20'.")
    return value


@sampled("rkc1(5)", "rkc1(1)", "rkc1(2)", "rkc1(3)")
def rkc1(s: int, damping: NumberLike = "1/20") -> Tableau:
    """First-order Chebyshev method: R(z) = T_s(w0 + w1 z) / T_s(w0); stable to about (2 - 4/3 damping) s^2.

    Args:
        s: number of stages.
        damping: by how much R(z) stays below 1 inside the stability interval.

    Example:
        >>> rkc1(1).b, rkc1(5).stages
        ((Fraction(1, 1),), 5)
    """
    s, eps = _stages("rkc1", s, 1), _damping("rkc1", damping)
    w0 = 1 + eps / (s * s)
    t, d, _ = _chebyshev(s, w0)
    # So that R'(0) = 1, which is the condition of order 1.
    w1 = t[s] / d[s]
    return _recursion(
        mu=[Fraction(1)] + [2 * w0 * t[j - 1] / t[j] for j in range(2, s + 1)],
        nu=[Fraction(0)] + [-t[j - 2] / t[j] for j in range(2, s + 1)],
        mu_t=[w1 / w0] + [2 * w1 * t[j - 1] / t[j] for j in range(2, s + 1)],
        gamma_t=[Fraction(0)] * s,
        name=f"rkc1({s})" if eps == Fraction(1, 20) else f"rkc1({s}, {eps})",
        order=1,
        cite="van der Houwen, Sommeijer, Z. Angew. Math. Mech. 60 (1980) 479-485",
    )


@sampled("rkc2(5)", "rkc2(2)", "rkc2(s=5, damping=1/10)")
def rkc2(s: int, damping: NumberLike = "2/13") -> Tableau:
    """Second-order Chebyshev method; stable to about 2/3 (s^2 - 1) (1 - 2/15 damping).

    Args:
        s: number of stages.
        damping: by how much R(z) stays below 1 inside the stability interval.

    Example:
        >>> rkc2(2).order
        2
    """
    s, eps = _stages("rkc2", s, 2), _damping("rkc2", damping)
    w0 = 1 + eps / (s * s)
    t, d, e = _chebyshev(s, w0)
    # So that R''(0) = 1 too, once the weights below have made R'(0) = 1.
    w1 = d[s] / e[s]
    b = [e[j] / (d[j] * d[j]) for j in range(2, s + 1)]
    # b_0 and b_1 are free, and taken equal to b_2, as published.
    b = [b[0], b[0], *b]
    a = [1 - b_j * t_j for b_j, t_j in zip(b, t, strict=True)]
    return _recursion(
        mu=[Fraction(1)] + [2 * w0 * b[j] / b[j - 1] for j in range(2, s + 1)],
        nu=[Fraction(0)] + [-b[j] / b[j - 2] for j in range(2, s + 1)],
        mu_t=[w1 * b[1]] + [2 * w1 * b[j] / b[j - 1] for j in range(2, s + 1)],
        gamma_t=[Fraction(0)] + [-a[j - 1] * 2 * w1 * b[j] / b[j - 1] for j in range(2, s + 1)],
        name=f"rkc2({s})" if eps == Fraction(2, 13) else f"rkc2({s}, {eps})",
        order=2,
        cite="Sommeijer, Shampine, Verwer, J. Comput. Appl. Math. 88 (1997) 315-326",
    )


@sampled("rkl1(5)", "rkl1(1)", "rkl1(2)", "rkl1(3)")
def rkl1(s: int) -> Tableau:
    """First-order Legendre method, R(z) = P_s(1 + 2 z / (s^2 + s)); stable to s^2 + s.

    Args:
        s: number of stages.
    """
    s = _stages("rkl1", s, 1)
    # P_s'(1) = (s^2 + s) / 2, so that R'(0) = 1; there is no damping.
    w1 = Fraction(2, s * s + s)
    mu = [Fraction(2 * j - 1, j) for j in range(1, s + 1)]
    return _recursion(
        mu=mu,
        nu=[Fraction(1 - j, j) for j in range(1, s + 1)],
        mu_t=[m * w1 for m in mu],
        gamma_t=[Fraction(0)] * s,
        name=f"rkl1({s})",
        order=1,
        cite="Meyer, Balsara, Aslam, J. Comput. Phys. 257 (2014) 594-626",
    )


@sampled("rkl2(5)", "rkl2(2)")
def rkl2(s: int) -> Tableau:
    """Second-order Legendre method; stable to (s^2 + s - 2) / 2 at least.

    Args:
        s: number of stages.
    """
    s = _stages("rkl2", s, 2)
    w1 = Fraction(4, s * s + s - 2)
    b = [Fraction(1, 3)] * 2 + [Fraction(j * j + j - 2, 2 * j * (j + 1)) for j in range(2, s + 1)]
    mu = [Fraction(1)] + [Fraction(2 * j - 1, j) * b[j] / b[j - 1] for j in range(2, s + 1)]
    return _recursion(
        mu=mu,
        nu=[Fraction(0)] + [Fraction(1 - j, j) * b[j] / b[j - 2] for j in range(2, s + 1)],
        mu_t=[b[1] * w1] + [m * w1 for m in mu[1:]],
        gamma_t=[Fraction(0)] + [-(1 - b[j - 1]) * mu[j - 1] * w1 for j in range(2, s + 1)],
        name=f"rkl2({s})",
        order=2,
        cite="Meyer, Balsara, Aslam, J. Comput. Phys. 257 (2014) 594-626",
    )
