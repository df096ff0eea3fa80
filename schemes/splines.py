"""B-splines on [0, 1]: basis functions, and the exact and the best maps from one spline space to another.

A space is a degree d and inner knots, each repeated up to d + 1 times; the ends are repeated d + 1 times, so that the
first and the last coefficient are the values there. Three instances:

* degree 0, inner knots k / n: n constants, the weights of n separate layers;
* degree 1, inner knots k / n: n + 1 values, joined by straight lines;
* degree 2, each inner knot twice: straight lines after their degree is raised, still with corners.

Coefficients may be anything that can be added and scaled: here they are rows of tensors of weights. Maps between spaces
are small matrices on the host, whatever the default device is.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import SchemeError

DEGREES = (0, 1, 2, 3)
# Two knots, or a time and a knot, that differ by less count as equal: times are sums of step sizes.
SAME = 1e-9


class Row(NamedTuple):
    """The basis functions that do not vanish at one place: numbers ``first``, ``first + 1``, ..., and their values.

    Args:
        first: the number of the first of them.
        values: the value of each.
    """

    first: int
    values: tuple[float, ...]


@dataclass(frozen=True)
class SplineSpace:
    r"""The piecewise polynomials of one degree with given inner knots: s(u) = sum_k B_k(u) c_k on [0, 1].

    A knot of multiplicity m leaves d - m continuous derivatives. Outside of [0, 1] the first and the last polynomial
    continue.

    Args:
        degree: of the pieces, 0 to 3.
        inner: knots inside of (0, 1), rising; one that is repeated degree + 1 times is a jump.

    Raises:
        SchemeError: another degree, knots outside or falling, or one that is repeated too often.

    Source:
        de Boor 2001, A Practical Guide to Splines, revised edition, chapters IX and X.

    Example:
        >>> space = SplineSpace.uniform(4, degree=1)
        >>> space.count, space.row(0.375)
        (5, Row(first=1, values=(0.5, 0.5)))
    """

    degree: int
    inner: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.degree not in DEGREES or type(self.degree) is not int:
            raise SchemeError(f"splines: the degree is {self.degree!r}, want 0, 1, 2 or 3.")
        object.__setattr__(self, "inner", tuple(map(float, self.inner)))
        if not all(SAME < u < 1 - SAME for u in self.inner):
            raise SchemeError(f"splines: the inner knots are {self.inner}; want numbers between the two ends.")
        for a, b in pairwise(self.inner):
            if b < a or 0 < b - a < SAME:
                raise SchemeError(f"splines: the knot {b:g} follows {a:g}; want rising knots, equal or clearly apart.")
        most = self.degree + 1
        for a, b in zip(self.inner, self.inner[most:], strict=False):
            if a == b:
                raise SchemeError(f"splines: the knot {a:g} stands more than {most} times, for degree {self.degree}.")

    @classmethod
    def uniform(cls, intervals: int, degree: int) -> "SplineSpace":
        """The space with that many intervals of equal length, as smooth as its degree allows.

        Args:
            intervals: number of intervals.
            degree: of the polynomials.
        """
        if isinstance(intervals, bool) or not isinstance(intervals, int) or intervals < 1:
            raise SchemeError(f"splines: {intervals!r} intervals, want a whole number, at least 1.")
        return cls(degree, tuple(k / intervals for k in range(1, intervals)))

    @property
    def count(self) -> int:
        """The number of coefficients."""
        return len(self.inner) + self.degree + 1

    @property
    def breaks(self) -> tuple[float, ...]:
        """The ends of the intervals, each once, from 0 to 1."""
        return (0.0, *dict.fromkeys(self.inner), 1.0)

    @property
    def knots(self) -> tuple[float, ...]:
        """All knots, with the ends repeated degree + 1 times."""
        end = self.degree + 1
        return (*[0.0] * end, *self.inner, *[1.0] * end)

    @property
    def uniform_intervals(self) -> int | None:
        """The number of intervals where all are of equal length, else None."""
        n = len(self.breaks) - 1
        return n if all(abs(u - k / n) < SAME for k, u in enumerate(self.breaks)) else None

    def times(self, u: float) -> int:
        """The multiplicity of an inner knot.

        Args:
            u: the knot.
        """
        return sum(abs(v - u) < SAME for v in self.inner)

    def row(self, u: float, slack: float = SAME) -> Row:
        """The basis functions at u; right-continuous, and at 1 from the left.

        Args:
            u: a place in [0, 1].
            slack: a knot that is farther to the right by no more counts as reached.
        """
        i, u = _interval(self, u, slack)
        return Row(i - self.degree, tuple(_values(self.knots, self.degree, i, u)))

    def rows(self, us: Sequence[float]) -> Tensor:
        """The basis functions at several places: (places, count), float64.

        Args:
            us: places in [0, 1].
        """
        found = torch.zeros(len(us), self.count, dtype=torch.float64, device="cpu")
        for n, u in enumerate(us):
            first, values = self.row(float(u))
            found[n, first : first + len(values)] = torch.tensor(values, dtype=torch.float64, device="cpu")
        return found

    def basis(self, u: Tensor) -> Tensor:
        """The basis functions at a place that is a tensor, (count,); differentiable, the same operations at any place.

        Args:
            u: a place in [0, 1].
        """
        # Half precision does not tell apart the knots of a fine spline.
        u = u if u.dtype in (torch.float32, torch.float64) else u.float()
        knots = torch.tensor(self.knots, dtype=u.dtype, device=u.device)
        ends = torch.tensor(self.knots[self.degree + 1 : self.count], dtype=u.dtype, device=u.device)
        # The number of the interval is found by comparison: an index would have to be read by the host.
        i = self.degree + (u.detach() + slack_of(u) >= ends).sum()
        value = (torch.arange(len(self.knots) - 1, device=u.device) == i).to(u.dtype)
        for d in range(1, self.degree + 1):
            rise, fall = knots[d:-1] - knots[: -d - 1], knots[d + 1 :] - knots[1:-d]
            up = torch.where(rise > 0, (u - knots[: -d - 1]) / torch.where(rise > 0, rise, 1.0), 0.0)
            down = torch.where(fall > 0, (knots[d + 1 :] - u) / torch.where(fall > 0, fall, 1.0), 0.0)
            value = up * value[:-1] + down * value[1:]
        return value

    def refined(self, intervals: int) -> "SplineSpace":
        """The smallest space that holds this one and has these uniform intervals; knots keep their multiplicity.

        Args:
            intervals: number of intervals, of equal length.

        Raises:
            SchemeError: an old knot is not among the new ones; the message names the nearest numbers that hold it.
        """
        new = SplineSpace.uniform(intervals, 0).inner
        missing = [u for u in dict.fromkeys(self.inner) if not any(abs(u - v) < SAME for v in new)]
        if missing:
            raise SchemeError(
                f"splines: {intervals} intervals do not hold the knot {missing[0]:g} of the spline at hand, so the "
                f"function would change; {_nearest(self, intervals)}"
            )
        return SplineSpace(self.degree, tuple(u for v in new for u in [v] * max(1, self.times(v))))

    def elevated(self, degree: int) -> "SplineSpace":
        """The space of a higher degree that holds this one: each knot is repeated once more per degree.

        Args:
            degree: at least this one's.

        Raises:
            SchemeError: a lower degree; ``projection`` gives the best spline there.
        """
        if type(degree) is not int:
            raise SchemeError(f"splines: the degree is {degree!r}, want 0, 1, 2 or 3.")
        if degree < self.degree:
            raise SchemeError(
                f"splines: degree {degree} cannot hold every spline of degree {self.degree}; project instead."
            )
        more = degree - self.degree
        return SplineSpace(degree, tuple(u for v in dict.fromkeys(self.inner) for u in [v] * (self.times(v) + more)))

    def holds(self, other: "SplineSpace") -> bool:
        """Whether every spline of the other space lies in this one.

        Args:
            other: a space over the same interval.
        """
        more = self.degree - other.degree
        return more >= 0 and all(self.times(u) >= other.times(u) + more for u in other.inner)


def _nearest(space: SplineSpace, intervals: int) -> str:
    """The numbers of uniform intervals around the requested one that hold a space's knots, as the end of a sentence."""
    least = next((n for n in range(1, 4097) if all(abs(u * n - round(u * n)) < n * SAME for u in space.inner)), None)
    if least is None:
        return "its knots fit no uniform grid: project instead."
    below = intervals // least * least
    fits = [n for n in (below, below + least) if n >= least]
    return f"the nearest that do: {' or '.join(map(str, fits))}."


def slack_of(u: Tensor) -> float:
    """The rounding of a place that is a tensor: a knot so near counts as reached.

    Args:
        u: the place.
    """
    return max(SAME, 4 * torch.finfo(torch.float64 if u.dtype == torch.float64 else torch.float32).eps)


def _interval(space: SplineSpace, u: float, slack: float = SAME) -> tuple[int, float]:
    """The number of the interval of u among all knots, and u, moved onto a knot that counts as equal to it."""
    d, knots = space.degree, space.knots
    i = min(max(bisect_right(knots, u + slack) - 1, d), space.count - 1)
    for knot in (knots[i], knots[i + 1]):
        if abs(u - knot) < SAME:
            u = knot
    return i, u


def _values(knots: Sequence[float], degree: int, i: int, u: float) -> list[float]:
    """The degree + 1 basis functions that do not vanish on interval i, by the recursion of Cox and de Boor."""
    values = [1.0]
    for d in range(1, degree + 1):
        found = [0.0] * (d + 1)
        for k, value in enumerate(values):
            left, right = knots[i - d + 1 + k], knots[i + 1 + k]
            share = (u - left) / (right - left)
            found[k] += (1 - share) * value
            found[k + 1] += share * value
        values = found
    return values


def _blossom(space: SplineSpace, i: int, us: Sequence[float]) -> Tensor:
    """The polar form of the polynomial on interval i, as a row over the coefficients: de Boor's scheme."""
    d, knots = space.degree, space.knots
    rows = torch.eye(space.count, dtype=torch.float64, device="cpu")[i - d : i + 1]
    for level, u in enumerate(us, 1):
        lefts = [knots[i - d + level + k] for k in range(d - level + 1)]
        rights = [knots[i + 1 + k] for k in range(d - level + 1)]
        shares = [(u - a) / (b - a) for a, b in zip(lefts, rights, strict=True)]
        share = torch.tensor(shares, dtype=torch.float64, device="cpu")
        rows = rows[:-1] + share[:, None] * (rows[1:] - rows[:-1])
    return rows[0]


def transfer(source: SplineSpace, target: SplineSpace) -> Tensor:
    r"""The exact map of coefficients into a space that holds the source: c' = T c is the same function.

    Knot insertion and degree elevation in one: coefficient j is the polar form of a piece under it, of the target's
    degree, at the knots j + 1 to j + d'.

    Args:
        source: the space of the coefficients c.
        target: the space of c'.

    Returns:
        T, (target.count, source.count), float64.

    Raises:
        SchemeError: the target does not hold the source.

    Source:
        Ramshaw 1989, Blossoms are polar forms, CAGD 6, sections 5 and 7.

    Example:
        >>> transfer(SplineSpace.uniform(1, 1), SplineSpace.uniform(2, 1)).tolist()
        [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    """
    if not target.holds(source):
        raise SchemeError("splines: the new space does not hold every spline of the old one; project instead.")
    return torch.tensor(_transfer(source, target), dtype=torch.float64, device="cpu")


# Numbers and not a tensor, which a caller may write to, or may make where tensors hold no values.
@lru_cache(maxsize=64)
def _transfer(source: SplineSpace, target: SplineSpace) -> list[list[float]]:
    knots, found = target.knots, []
    for j in range(target.count):
        # An interval of the target under basis function j, and the source's piece there.
        k = next(k for k in range(j, j + target.degree + 1) if knots[k + 1] - knots[k] > SAME)
        i, _ = _interval(source, (knots[k] + knots[k + 1]) / 2)
        found.append(_raised(source, i, knots[j + 1 : j + 1 + target.degree]).tolist())
    return found


def _raised(space: SplineSpace, i: int, us: Sequence[float]) -> Tensor:
    """The polar form at any number of arguments: the mean over leaving out each of them in turn, recursively."""
    if len(us) == space.degree:
        return _blossom(space, i, us)
    return torch.stack([_raised(space, i, [*us[:k], *us[k + 1 :]]) for k in range(len(us))]).mean(0)


def _quadrature(a: SplineSpace, b: SplineSpace) -> tuple[list[float], Tensor]:
    """Places and weights that integrate products of two splines exactly: Gauss-Legendre on each interval."""
    # Four nodes are exact up to degree 7, and products of cubics have degree 6.
    outer, inner = (3 + 2 * (6 / 5) ** 0.5) / 7, (3 - 2 * (6 / 5) ** 0.5) / 7
    nodes = (-(outer**0.5), -(inner**0.5), inner**0.5, outer**0.5)
    less, more = (18 - 30**0.5) / 36, (18 + 30**0.5) / 36
    places, weights = [], []
    for left, right in pairwise(sorted({*a.breaks, *b.breaks})):
        if right - left > SAME:
            places += [(left + right) / 2 + (right - left) / 2 * node for node in nodes]
            weights += [(right - left) / 2 * w for w in (less, more, more, less)]
    return places, torch.tensor(weights, dtype=torch.float64, device="cpu")


def gram(space: SplineSpace) -> Tensor:
    """The integrals of products of basis functions: integral of |s|^2 = c^T G c; (count, count), float64.

    Args:
        space: the space.
    """
    places, weights = _quadrature(space, space)
    rows = space.rows(places)
    return rows.T @ (weights[:, None] * rows)


def projection(source: SplineSpace, target: SplineSpace) -> Tensor:
    r"""The map of coefficients to the nearest spline of another space: the least integral of |s - s'|^2 over [0, 1].

    Args:
        source: the space of the given spline.
        target: the space of the nearest one.

    Returns:
        (target.count, source.count), float64; where the target holds the source, the map of ``transfer``.

    Example:
        >>> projection(SplineSpace.uniform(2, 0), SplineSpace.uniform(1, 0)).tolist()
        [[0.5, 0.5]]
    """
    places, weights = _quadrature(source, target)
    to, of = target.rows(places), source.rows(places)
    weighted = (weights[:, None] * to).T
    return torch.linalg.solve(weighted @ to, weighted @ of)


def distance(a: SplineSpace, b: SplineSpace) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of both spaces, and quadrature weights, at places that integrate |a - b|^2 exactly.

    Args:
        a: a space.
        b: another.
    """
    places, weights = _quadrature(a, b)
    return a.rows(places), b.rows(places), weights


def fit(space: SplineSpace, us: Sequence[float]) -> Tensor:
    r"""The map from values at some places to the spline that is nearest to them; of several, the least rough.

    Least squares at the places; whatever these leave free (a spline of more coefficients than there are places) is
    decided by the smallest sum of squared differences of neighbouring coefficients, so that a constant stays constant.

    Args:
        space: the space.
        us: places in [0, 1].

    Returns:
        (count, places), float64.

    Example:
        >>> [[round(x, 9) for x in row] for row in fit(SplineSpace.uniform(2, 1), [0.0, 0.5]).tolist()]
        [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    """
    rows = space.rows(us)
    best = torch.linalg.pinv(rows)
    _, sizes, basis = torch.linalg.svd(rows)
    rank = int((sizes > 1e-12 * sizes.max()).sum())
    free = basis[rank:].T  # directions that do not change the values
    if not free.shape[1]:
        return best
    rough = torch.eye(space.count, dtype=torch.float64, device="cpu").diff(dim=0)
    return best - free @ torch.linalg.pinv(rough @ free) @ rough @ best
