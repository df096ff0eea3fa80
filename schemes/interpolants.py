"""Continuous extensions of Runge-Kutta methods: data and exact constructions, whose orders are proved, not assumed.

y(t + theta h) = x + h sum_i b_i(theta) k_i for 0 <= theta <= 1, with polynomials b_i without constant term, over the
stages of the method, the slope at the end of the step (which is the next step's first, so that it costs nothing), and
for some methods a few more stages. Order p means sum_i b_i(theta) Phi_i(tree) = theta^|tree| / gamma(tree), as
polynomials, for each tree with at most p vertices: ``Interpolant.order`` computes it in exact numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from .errors import SchemeError
from .exact_numbers import Number, NumberLike, exact
from .order import _ElementaryWeights, _Sensitivity, trees
from .tableau import Tableau

Polynomial = tuple[Number, ...]
ZERO = Fraction(0)


def first_same_as_last(tableau: Tableau) -> bool:
    """Whether the last stage is the slope at the end of the step, so that the next step need not evaluate it again.

    Args:
        tableau: the method.
    """
    # Compared exactly, by coefficients: a stage that is only nearly the slope at the end must be evaluated again.
    return tableau.stages > 1 and (*tableau.a[-1], ZERO) == tableau.b


def with_end(tableau: Tableau) -> tuple[tuple[Number, ...], ...]:
    """The rows of A, and after them the row of the slope at the end of the step, unless a stage already is that slope.

    Args:
        tableau: the method.
    """
    return tableau.a if first_same_as_last(tableau) else (*tableau.a, tableau.b)


@dataclass(frozen=True, repr=False)
class Interpolant:
    """A continuous extension of a Runge-Kutta method.

    Args:
        a: rows of the strictly lower triangle: the method's, the end's (`with_end`), and those of the extra stages.
        weights: one polynomial per stage: the coefficients of theta, theta^2, ...
        extra: number of extra stages, which are evaluated only where the solution is requested within a step.
        digits: None for exact data; else the number of decimals to which the coefficients are correct.
        cite: where they are published.

    Example:
        >>> from schemes import tableaux
        >>> hermite(tableaux.bosh3).order()
        3
    """

    a: tuple[tuple[Number, ...], ...]
    weights: tuple[Polynomial, ...]
    extra: int = 0
    digits: int | None = None
    cite: str = ""

    @property
    def nodes(self) -> tuple[Number, ...]:
        """The times of all stages, in units of the step."""
        return tuple(sum(row, ZERO) for row in self.a)

    @property
    def degree(self) -> int:
        """The degree in theta."""
        return max(len(p) for p in self.weights)

    def order(self, limit: int = 9) -> int:
        """The largest p, up to ``limit``, such that all order conditions up to p hold for every theta.

        Args:
            limit: conditions of higher order are not checked.
        """
        powers = range(1, max(self.degree, limit) + 1)
        columns = {m: [p[m - 1] if m <= len(p) else ZERO for p in self.weights] for m in powers}
        # A condition on polynomials is one on each power of theta: the weights of a power act as a separate method.
        tests = {m: (_ElementaryWeights(self.a, b), _Sensitivity(self.a, b)) for m, b in columns.items() if any(b)}
        tolerance = 0.0 if self.digits is None else 5 * 10.0**-self.digits
        for p in range(1, limit + 1):
            # There is no power p, so theta^p on the right-hand side cannot be matched.
            if p not in tests:
                return p - 1
            for tree in trees(p):
                for m, (elementary, sensitivity) in tests.items():
                    # All other powers of theta have to cancel.
                    target = Fraction(1, tree.density) if m == p else ZERO
                    residual = elementary.residual(tree, target)
                    if residual == 0:
                        continue
                    allowed = tolerance * sensitivity.of(tree)
                    if not abs(float(residual)) <= allowed < 1e-3 / tree.density:
                        return p - 1
        return limit


def _published(tableau: Tableau, weights: Sequence[Sequence[NumberLike]], digits: int | None, cite: str) -> Interpolant:
    rows = with_end(tableau)
    return Interpolant(rows, tuple(tuple(exact(x) for x in p) for p in weights), 0, digits, cite)


def _product(*factors: Sequence[NumberLike]) -> list[Number]:
    """The product of polynomials, each given from its constant term on, without its constant term."""
    result: list[Number] = [Fraction(1)]
    for factor in factors:
        terms = [exact(x) for x in factor]
        new: list[Number] = [ZERO] * (len(result) + len(terms) - 1)
        for i, x in enumerate(result):
            for j, y in enumerate(terms):
                new[i + j] = new[i + j] + x * y
        result = new
    return result[1:]


def dopri5(tableau: Tableau) -> Interpolant:
    """Shampine's quartic for the pair of Dormand and Prince, of order 4, from the method's own stages.

    Args:
        tableau: the pair.
    """
    weights = [
        ["1", "-8048581381/2820520608", "8663915743/2820520608", "-12715105075/11282082432"],
        [],
        ["0", "131558114200/32700410799", "-68118460800/10900136933", "87487479700/32700410799"],
        ["0", "-1754552775/470086768", "14199869525/1410260304", "-10690763975/1880347072"],
        ["0", "127303824393/49829197408", "-318862633887/49829197408", "701980252875/199316789632"],
        ["0", "-282668133/205662961", "2019193451/616988883", "-1453857185/822651844"],
        ["0", "40617522/29380423", "-110615467/29380423", "69997945/29380423"],
    ]
    return _published(tableau, weights, None, "Shampine, Math. Comp. 46 (1986) 135-150")


def tsit5(tableau: Tableau) -> Interpolant:
    """The quartic published with the pair of Tsitouras, of order 4, from the method's own stages.

    Args:
        tableau: the pair.
    """
    theta, square = [0, 1], [0, 0, 1]
    weights = [
        _product(
            ["-1.0530884977290216"],
            theta,
            ["-1.3299890189751412", 1],
            ["0.7139816917074209", "-1.4364028541716351", 1],
        ),
        _product(["0.1017"], square, ["1.2949852507374631", "-2.1966568338249754", 1]),
        _product(["2.490627285651252793"], square, ["1.57803468208092486", "-2.38535645472061657", 1]),
        _product(["-16.54810288924490272"], square, ["-1.21712927295533244", 1], ["-0.61620406037800089", 1]),
        _product(["47.37952196281928122"], square, ["-1.203071208372362603", 1], ["-0.658047292653547382", 1]),
        _product(["-34.87065786149660974"], square, ["-1.2", 1], ["-2/3", 1]),
        _product(["2.5"], square, ["-1", 1], ["-0.6", 1]),
    ]
    return _published(tableau, weights, 13, "Tsitouras, Comput. Math. Appl. 62 (2011) 770-775, section 4")


# long: a published table, line by line
def dopri8(tableau: Tableau) -> Interpolant:
    """A polynomial of degree 6 for the pair 8(7), of order 5, from its thirteen stages and the slope at the end.

    Args:
        tableau: the pair.
    """
    weights = [
        [
            "1",
            "-6.6910181737837595697",
            "19.9990069333683970610",
            "-30.0610568289666450593",
            "22.1396504998094068976",
            "-6.3448349392860401388",
        ],
        [],
        [],
        [],
        [],
        [
            "0",
            "-7.6142658045872677172",
            "52.2273532792945524050",
            "-121.4999627731334642623",
            "116.4422149550342161651",
            "-39.6107919852202505218",
        ],
        [
            "0",
            "10.7281392630428866124",
            "-46.8919164181093621583",
            "83.1721004639847717481",
            "-67.1451318825957197185",
            "20.3761213808791436958",
        ],
        [
            "0",
            "0.5526637063753648783",
            "-0.1890893225010595467",
            "9.5724507555993664382",
            "-16.5672243527496524646",
            "7.3347098826795362023",
        ],
        [
            "0",
            "4.2186562625665153803",
            "-35.7075975946222072821",
            "87.8406057677205645007",
            "-89.9916014847245016028",
            "32.8801774352459155182",
        ],
        [
            "0",
            "-0.6627209125361597559",
            "6.2736448083240352160",
            "-17.4152107770762969005",
            "22.6237489648532849093",
            "-10.1588990526426760954",
        ],
        [
            "0",
            "-1.2636789001135462218",
            "10.3160881272450748458",
            "-28.5903289514790976966",
            "32.2362340167355370113",
            "-12.5401268098782561200",
        ],
        [
            "0",
            "5.4106037898590422230",
            "-34.7650769866611817349",
            "81.6630950584341412934",
            "-82.1020315488359848644",
            "29.5553001484516038033",
        ],
        [
            "0",
            "-7.0321379067945741781",
            "47.7457971078225540396",
            "-114.9375291377009418170",
            "116.2662185791119533462",
            "-41.7923486424390588923",
        ],
        [
            "0",
            "2.3537586759714983486",
            "-19.0082099341608028453",
            "50.2558364226176017553",
            "-53.9020777466385396792",
            "20.3006925822100825485",
        ],
    ]
    return _published(tableau, weights, 16, "Bogacki, Shampine, Comput. Math. Appl. 20 (1990) 15-24")


# --- Hermite interpolation -------------------------------------------------------------------------------------------

Vector = list[Number]


def _at(polynomial: Sequence[Number], x: Fraction) -> Number:
    return sum((c * x ** (m + 1) for m, c in enumerate(polynomial)), ZERO)


def _slope(polynomial: Sequence[Number], x: Fraction) -> Number:
    return sum((c * (m + 1) * x**m for m, c in enumerate(polynomial)), ZERO)


def _corrected(weights: list[list[Number]], points: Sequence[tuple[int, Fraction]]) -> list[list[Number]]:
    """The polynomials plus theta^2 (1 - theta)^2 q(theta), so that the slope at each point is that of its stage."""
    # The addition and its slope vanish at both ends, so the values and slopes there stay right.
    square: tuple[int, ...] = (0, 1, -2, 1)  # theta^2 - 2 theta^3 + theta^4, from theta on
    basis = [[Fraction(x) for x in (0,) * n + square] for n in range(len(points))]
    matrix = [[_slope(b, x) for b in basis] for _, x in points]
    inverse = _inverse(matrix)
    result = []
    for i, polynomial in enumerate(weights):
        gaps = [Fraction(int(i == stage)) - _slope(polynomial, x) for stage, x in points]
        factors = [sum((m * g for m, g in zip(row, gaps, strict=True)), ZERO) for row in inverse]
        new = [*polynomial, *([ZERO] * (3 + len(points) - len(polynomial)))]
        for factor, b in zip(factors, basis, strict=True):
            new = [x + factor * y for x, y in zip(new, [*b, *([ZERO] * (len(new) - len(b)))], strict=True)]
        result.append(new)
    return result


def _inverse(matrix: list[list[Number]]) -> list[list[Number]]:
    if len(matrix) == 1:
        return [[1 / matrix[0][0]]]
    # Two points at most: Cramer's rule, in exact numbers.
    (a, b), (c, d) = matrix
    det = a * d - b * c
    return [[d / det, -b / det], [-c / det, a / det]]


def hermite(tableau: Tableau, degree: int = 3) -> Interpolant:
    """Hermite interpolation of the values and slopes at both ends, raised to degree 4 or 5 by more slopes.

    The cubic costs nothing. One more stage on it gives a slope that the quartic matches, and two stages on the quartic
    give those of the quintic (1 and 3 extra evaluations). The order is the degree, or the method's if that is lower.

    Args:
        tableau: any method.
        degree: 3, 4 or 5.

    Raises:
        SchemeError: another degree.

    Source: Enright, Jackson, Norsett, Thomsen 1986, Interpolants for Runge-Kutta formulas, ACM TOMS 12, 193-218.

    Example:
        >>> from schemes import tableaux
        >>> [hermite(tableaux.fehlberg45, degree).order() for degree in (3, 4, 5)]
        [3, 4, 5]
    """
    if type(degree) is not int or degree not in (3, 4, 5):
        raise SchemeError(f"hermite: the degree is {degree!r}, want 3, 4 or 5.")
    rows = list(with_end(tableau))
    end = len(rows) - 1
    weights: list[list[Number]] = []
    for i in range(end + 1):
        # Where the slope at the end is one stage more than the method has, its weight in the method itself is 0.
        b: Number = tableau.b[i] if i < tableau.stages else ZERO
        start, last = Fraction(int(i == 0)), Fraction(int(i == end))
        # b_i (3 - 2 theta) theta^2, plus theta (1 - theta)^2 at the start and theta^2 (theta - 1) at the end
        weights.append([start, 3 * b - 2 * start - last, -2 * b + start + last])
    for points in ((Fraction(2, 5),), (Fraction(1, 3), Fraction(3, 4)))[: degree - 3]:
        stages = []
        found = [[_at(p, x) for p in weights] for x in points]
        for row, x in zip(found, points, strict=True):
            stages.append((len(rows), x))
            # A stage at the point that the polynomial gives; it reads the stages before it, but not itself.
            rows.append((*row, *([ZERO] * (len(rows) - len(row)))))
        new: list[list[Number]] = [[ZERO, ZERO, ZERO] for _ in points]
        weights = _corrected([*weights, *new], stages)
    return Interpolant(
        tuple(tuple(row[:i]) for i, row in enumerate(rows)),
        tuple(map(tuple, weights)),
        len(rows) - end - 1,
        # A digit is lost: the extension's coefficients are sums and products of rounded ones.
        tableau.digits and tableau.digits - 1,
        "Enright et al., ACM Trans. Math. Softw. 12 (1986) 193-218" if degree > 3 else "",
    )


# By the name of the pair; every other method takes a cubic, or from order 4 on a quintic.
PUBLISHED = {f.__name__: f for f in (dopri5, dopri8, tsit5)}


@lru_cache(maxsize=64)
def interpolant(tableau: Tableau) -> Interpolant:
    """The continuous extension of a method: its own where one is published, else Hermite's.

    Example:
        >>> from schemes import tableaux
        >>> [(t.name, interpolant(t).order(), interpolant(t).extra) for t in (tableaux.dopri5, tableaux.heun2)]
        [('dopri5', 4, 0), ('heun2', 2, 0)]
    """
    from . import tableaux

    make = PUBLISHED.get(tableau.name)
    # A user's method may have that name; the published polynomials belong to the published coefficients alone.
    if make is not None and tableau == tableaux.METHODS[tableau.name]:
        return make(tableau)
    return hermite(tableau, 5 if (tableau.order or 1) > 3 else 3)
