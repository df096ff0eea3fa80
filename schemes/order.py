"""Order conditions on rooted trees, exact: the order of a Runge-Kutta method is computed, never trusted.

A method has order p when sum_i b_i Phi_i(t) = 1 / gamma(t) for each rooted tree t with at most p vertices, where
Phi_i(t) is the product over the children u of t of sum_j a_ij Phi_j(u), and the density gamma(t) is the number of
vertices of t times the densities of its children. Three instances, from the smallest tree on:

    one vertex                 sum b_i = 1
    a root with one child      sum b_i c_i = 1/2
    a root with two children   sum b_i c_i^2 = 1/3

There are 1, 1, 2, 4, 9, 20, 48, 115, 286, 719 trees of 1, 2, ..., 10 vertices. Sums are kept in integers over one
common denominator, and the vector of a subtree is computed once for all the trees that hold it, so the 719 conditions
of order 10 take well under a second for 16 stages. (Butcher 1963; Hairer, Nørsett, Wanner 1993, II.2.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import factorial, lcm, prod
from typing import Literal, TypeAlias

from .errors import SchemeError
from .tableau import Number, Surd, Tableau

Weights: TypeAlias = Literal["b", "b_hat"]


@dataclass(frozen=True, eq=False)
class Tree:
    """A rooted tree, equal only to itself: take trees from `trees`, which makes each of them once.

    Args:
        children: the subtrees under the root, largest first.
        order: number of vertices.
        density: gamma(t), the number of vertices times the densities of the children.
        symmetry: sigma(t), the number of ways to permute equal subtrees.
    """

    children: tuple[Tree, ...]
    order: int
    density: int
    symmetry: int

    def __str__(self) -> str:
        return f"[{''.join(map(str, self.children))}]"


@lru_cache
def trees(order: int) -> tuple[Tree, ...]:
    """All rooted trees with `order` vertices, each once.

    Example:
        >>> [len(trees(n)) for n in range(1, 11)]
        [1, 1, 2, 4, 9, 20, 48, 115, 286, 719]
        >>> for t in trees(4):
        ...     print(t, t.density, t.symmetry)
        [[[[]]]] 24 1
        [[[][]]] 12 2
        [[[]][]] 8 1
        [[][][]] 4 6
    """
    # Largest first, so that every multiset of children has one representation, and every tree is made once.
    smaller = [tree for n in range(order - 1, 0, -1) for tree in trees(n)]

    def forests(vertices: int, start: int) -> Iterator[tuple[Tree, ...]]:
        """Multisets of trees with that many vertices in all, as sequences in the order of `smaller`."""
        if vertices == 0:
            yield ()
        for k in range(start, len(smaller)):
            if smaller[k].order <= vertices:
                for rest in forests(vertices - smaller[k].order, k):
                    yield (smaller[k], *rest)

    def plant(children: tuple[Tree, ...]) -> Tree:
        # Equal subtrees are the same object, so counting by identity counts them right.
        repeats = prod(factorial(children.count(tree)) for tree in set(children))
        return Tree(
            children,
            order,
            density=order * prod(tree.density for tree in children),
            symmetry=repeats * prod(tree.symmetry for tree in children),
        )

    return tuple(plant(children) for children in forests(order - 1, 0))


_Row: TypeAlias = list[tuple[int, int, int]]


def _integers(rows: Sequence[Sequence[Number]]) -> tuple[list[_Row], int]:
    """The non-zero entries (j, p, q) of each row, times the common denominator that comes with them."""
    parts = [[(x.p, x.q) if isinstance(x, Surd) else (x, Fraction(0)) for x in row] for row in rows]
    # Sums of fractions take a gcd each; with one denominator for all, the inner loops are products of integers.
    n = lcm(*(part.denominator for row in parts for pair in row for part in pair))
    return [[(j, int(p * n), int(q * n)) for j, (p, q) in enumerate(row) if p or q] for row in parts], n


class _ElementaryWeights:
    """sum_i b_i Phi_i(t) for any number of trees; a number is a pair (p, q) of integers, p + q sqrt(d)."""

    def __init__(self, a: Sequence[Sequence[Number]], b: Sequence[Number]):
        roots = {x.d for row in (*a, b) for x in row if isinstance(x, Surd)}
        # The arithmetic is on pairs (p, q) of integers, which can represent one root only.
        if len(roots) > 1:
            raise SchemeError(
                f"order: the coefficients hold sqrt of {sorted(roots)}; one root per tableau is exact here."
            )
        self.d = roots.pop() if roots else 0
        self.rows, self.unit = _integers(a)
        (self.b,), self.unit_b = _integers([b])
        self.memory: dict[Tree, list[tuple[int, int]]] = {}

    def _dot(self, row: _Row, vector: Sequence[tuple[int, int]]) -> tuple[int, int]:
        p = sum(x * vector[j][0] + self.d * y * vector[j][1] for j, x, y in row)
        q = sum(x * vector[j][1] + y * vector[j][0] for j, x, y in row)
        return p, q

    def _stages(self, tree: Tree) -> list[tuple[int, int]]:
        """Phi_i(tree) for all i."""
        result = [(1, 0)] * len(self.rows)
        for child in tree.children:
            # A subtree occurs in many trees: recomputing its vector would take most of the time.
            if child not in self.memory:
                inner = self._stages(child)
                self.memory[child] = [self._dot(row, inner) for row in self.rows]
            factors = self.memory[child]
            result = [(p * x + self.d * q * y, p * y + q * x) for (p, q), (x, y) in zip(result, factors, strict=True)]
        return result

    def residual(self, tree: Tree, target: Fraction) -> Number:
        p, q = self._dot(self.b, self._stages(tree))
        # One factor of the denominator for each entry of A in the product: one for each vertex but the root.
        scale = self.unit_b * self.unit ** (tree.order - 1)
        if q == 0 and p * target.denominator == scale * target.numerator:  # without a gcd of very long integers
            return Fraction(0)
        rational = Fraction(p, scale) - target
        return Surd(rational, Fraction(q, scale), self.d) if q else rational


class _Sensitivity:
    """Bounds, to first order, how far an elementary weight moves per unit of error in every coefficient.

    An entry x that is not zero counts with max(1, |x|): errors are absolute below 1 and relative above. Floats suffice,
    since this is a bound.
    """

    def __init__(self, a: Sequence[Sequence[Number]], b: Sequence[Number]):
        self.rows = [[(j, float(x), max(1.0, abs(float(x)))) for j, x in enumerate(row) if x != 0] for row in a]
        self.b = [float(x) for x in b]
        self.memory: dict[Tree, tuple[list[float], list[float]]] = {}

    def _values(self, tree: Tree) -> tuple[list[float], list[float]]:
        """Phi(tree) and a Phi(tree)."""
        if tree not in self.memory:
            stages = [1.0] * len(self.rows)
            for child in tree.children:
                stages = [x * y for x, y in zip(stages, self._values(child)[1], strict=True)]
            self.memory[tree] = stages, [sum(a * stages[j] for j, a, _ in row) for row in self.rows]
        return self.memory[tree]

    def _below(self, tree: Tree, slopes: Sequence[float]) -> float:
        """Errors of the entries of a, when `slopes` are the derivatives of the weight by Phi_i(tree): chain rule."""
        total = 0.0
        for child in tree.children:
            siblings = list(tree.children)
            # Removes one only: where two children are equal, each is varied in turn while the other stays.
            siblings.remove(child)
            inner = slopes
            for sibling in siblings:
                # The product rule: one child varies, and its siblings are factors.
                inner = [x * y for x, y in zip(inner, self._values(sibling)[1], strict=True)]
            stages = self._values(child)[0]
            back = [0.0] * len(stages)
            for slope, row in zip(inner, self.rows, strict=True):
                for j, a, size in row:
                    total += abs(slope * stages[j]) * size
                    back[j] += slope * a
            total += self._below(child, back)
        return total

    def of(self, tree: Tree) -> float:
        sizes = [max(1.0, abs(x)) if x else 0.0 for x in self.b]
        own = sum(size * abs(x) for size, x in zip(sizes, self._values(tree)[0], strict=True))
        return own + self._below(tree, self.b)


def _chosen(tableau: Tableau, weights: Weights) -> tuple[Number, ...]:
    if weights not in ("b", "b_hat"):
        raise SchemeError(f"weights={weights!r}: want 'b' or 'b_hat'.")
    if (chosen := getattr(tableau, weights)) is None:
        raise SchemeError(f"{tableau.name or 'tableau'} has no second weights; ask for weights='b'.")
    return chosen


def conditions(tableau: Tableau, p: int, weights: Weights = "b") -> tuple[Number, ...]:
    """Residuals sum_i b_i Phi_i(t) - 1 / gamma(t) of the conditions of order p exactly, in the order of ``trees(p)``.

    Args:
        tableau: any tableau, a user's own included.
        p: number of vertices of the trees.
        weights: which weights, ``"b"`` or ``"b_hat"``.

    Raises:
        SchemeError: no such weights, or two different square roots in one tableau.

    Example:
        >>> from schemes import tableaux
        >>> [str(r) for r in conditions(tableaux.midpoint, 3)]
        ['-1/6', '-1/12']
    """
    elementary = _ElementaryWeights(tableau.a, _chosen(tableau, weights))
    return tuple(elementary.residual(tree, Fraction(1, tree.density)) for tree in trees(p))


def _agreement(
    a: Sequence[Sequence[Number]], b: Sequence[Number], limit: int, tolerance: float, identity: bool = False
) -> int:
    """The order up to which the map (a, b) agrees with the exact flow, or with the identity map."""
    elementary, sensitivity = _ElementaryWeights(a, b), _Sensitivity(a, b)

    def holds(tree: Tree) -> bool:
        exact = Fraction(1, tree.density)
        residual = elementary.residual(tree, Fraction(0) if identity else exact)
        # Exact data get no tolerance: a residual of 1e-30 means a wrong coefficient.
        if residual == 0 or not tolerance:
            return residual == 0
        allowed = tolerance * sensitivity.of(tree)
        return abs(float(residual)) <= allowed < 1e-3 * exact

    for p in range(1, limit + 1):
        if not all(map(holds, trees(p))):
            return p - 1
    return limit


def order(tableau: Tableau, weights: Weights = "b", limit: int = 12) -> int:
    """The largest p, up to `limit`, such that all order conditions up to p hold.

    Exact data must meet them exactly. Where the tableau declares ``digits``, a condition holds if its residual is no
    larger than what rounding can explain: the sum, over all coefficients, of the condition's derivative by the
    coefficient times five units in the last declared digit (absolute below 1, relative above). So that few digits
    cannot pass for a high order, a condition that rounding could move by more than a thousandth of 1 / gamma(t) is
    not counted as held.

    Cost: some 10 ms for 16 stages and order 9; each further order takes about three times longer.

    Args:
        tableau: any tableau, a user's own included.
        weights: ``"b"`` or ``"b_hat"``.
        limit: the highest order that is checked.

    Example:
        >>> from schemes import tableaux
        >>> order(tableaux.rk4), order(tableaux.dopri5), order(tableaux.dopri5, weights="b_hat")
        (4, 5, 4)
    """
    return _agreement(tableau.a, _chosen(tableau, weights), limit, tableau.tolerance)


def antisymmetric_order(tableau: Tableau, limit: int = 10) -> int:
    """The largest m, up to `limit`, with Phi_{-h} o Phi_h = identity + O(h^{m+1}): how nearly a step is undone.

    A method of even order p reaches p + 1, as the leading errors of h and -h cancel; "effectively symmetric" ones are
    built to reach more (Shmelev et al. 2025, arXiv 2507.21006). Only implicit methods can be symmetric altogether.

    Args:
        tableau: the method.
        limit: the highest order that is checked.

    Example:
        >>> from schemes import tableaux
        >>> antisymmetric_order(tableaux.euler), antisymmetric_order(tableaux.rk4)
        (1, 5)
    """
    # A step of h and a step of -h as one array of 2 s stages, to be compared with the identity map.
    back = [list(tableau.b) + [-x for x in row] for row in tableau.a]
    weights = [*tableau.b, *(-x for x in tableau.b)]
    return _agreement([*tableau.a, *back], weights, limit, tableau.tolerance, identity=True)
