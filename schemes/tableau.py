"""Runge-Kutta methods as exact data: numbers, the Butcher array, and arrays made from other arrays.

A coefficient is a rational number or p + q sqrt(d). Nothing is rounded before `Tableau.floats`, so that the checks
below and the order conditions compare with ``==``. Methods that were published as rounded decimals (or as rational
approximations of unpublished numbers) declare ``digits``; every check then allows a few units in that digit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import fsum

from .errors import SchemeError
from .exact_numbers import Number as Number
from .exact_numbers import NumberLike, exact, show
from .exact_numbers import Surd as Surd
from .exact_numbers import number as number
from .exact_numbers import sqrt as sqrt


def _row(entries: Iterable[NumberLike]) -> tuple[Number, ...]:
    return tuple(exact(x) for x in entries)


def _sum(numbers: Iterable[Number]) -> Number:
    return sum(numbers, Fraction(0))


class _RowSums(tuple[Number, ...]):
    """Nodes that are row sums by construction, so that checking the sums would be redundant."""


@dataclass(frozen=True, repr=False)
class Tableau:
    """An explicit Runge-Kutta method: k_i = f(t + c_i h, x + h sum_j a_ij k_j), x' = x + h sum_i b_i k_i.

    Cost: `stages` residual functions per step, one stream; no inverse.

    Args:
        name: the name in error messages and in the catalogue.
        a: rows of the strictly lower triangle: row i (from 0) has i entries.
        b: the weights that advance the solution.
        c: the nodes.
        b_hat: second weights, whose result estimates the error of the first, or None.
        order: declared order of b; None where none is declared (`schemes.order.order` computes it).
        order_hat: declared order of b_hat.
        digits: None for exact data; else the number of decimals to which the published coefficients are correct.
        cite: where the coefficients are published.

    Raises:
        SchemeError: ragged rows, nodes that are not the row sums, weights that do not sum to 1.

    Example:
        >>> t = Tableau("midpoint", a=[[], ["1/2"]], b=[0, 1], c=[0, "1/2"], order=2)
        >>> t.stages, t.exact, t.mixing
        (2, True, 0.5)
        >>> print(t)
        0   |
        1/2 | 1/2
            | 0   1
    """

    name: str
    a: tuple[tuple[Number, ...], ...]
    b: tuple[Number, ...]
    c: tuple[Number, ...]
    b_hat: tuple[Number, ...] | None = None
    order: int | None = None
    order_hat: int | None = None
    digits: int | None = None
    cite: str = ""

    def __post_init__(self):
        summed = isinstance(self.c, _RowSums)
        for field in ("b", "c", "b_hat"):
            if (entries := getattr(self, field)) is not None:
                # The class is frozen, so that a checked array cannot be changed; strings among the entries become
                # numbers here.
                object.__setattr__(self, field, _row(entries))
        object.__setattr__(self, "a", tuple(_row(row) for row in self.a))
        self._check(summed)

    def _check(self, summed: bool):
        s, who = len(self.b), self.name or "tableau"
        if s == 0 or len(self.c) != s or len(self.a) != s:
            raise SchemeError(
                f"{who}: {len(self.a)} rows, {len(self.c)} nodes, {s} weights; want one of each per stage."
            )
        for i, row in enumerate(self.a):
            if len(row) != i:
                raise SchemeError(
                    f"{who}: row {i + 1} has {len(row)} entries, want {i}: explicit stages use the earlier ones only."
                )
            if summed:
                continue
            # The node is redundant, but printed in every paper: the row and the node each catch a typo in the other.
            self._close(f"{who}: row {i + 1} sums to", _sum(row), f"its node c{i + 1} = ", self.c[i], row)
        # The condition of order 1; it catches most single wrong weights before any tree is examined.
        self._close(f"{who}: weights sum to", _sum(self.b), "", Fraction(1), self.b)
        if self.b_hat is not None:
            if len(self.b_hat) != s:
                raise SchemeError(f"{who}: {len(self.b_hat)} second weights, want {s}, one per stage.")
            self._close(f"{who}: second weights sum to", _sum(self.b_hat), "", Fraction(1), self.b_hat)

    def _close(self, what: str, got: Number, of: str, want: Number, entries: Sequence[Number]):
        if self.digits is None:
            if got != want:
                raise SchemeError(f"{what} {show(got)}, want {of}{show(want)}.")
            return
        # Every entry may be off in its last digit, and a large one by more, since it was rounded relative to its size.
        tolerance = self.tolerance * max(1.0, sum(abs(float(x)) for x in entries))
        if abs(float(got - want)) > tolerance:
            raise SchemeError(
                f"{what} {float(got):.17g}, want {of}{float(want):.17g} within {tolerance:.1g} "
                f"(declared to {self.digits} digits)."
            )

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        order: int | None,
        name: str = "",
        cite: str = "",
        digits: int | None = None,
        order_hat: int | None = None,
    ) -> Tableau:
        """A tableau from the array as books print it.

        One line ``c | a_i1 a_i2 ...`` per stage, then ``| b``, then ``| b_hat`` if there is one; a line without ``|``
        continues the line above. Entries are separated by blanks and read by `number`.

        Args:
            text: the array.
            order: declared order of the weights; None declares none.
            name: the name in error messages.
            cite: where it is published.
            digits: decimals to which published coefficients are correct; None where they are exact.
            order_hat: declared order of the second weights.

        Example:
            >>> heun = Tableau.parse('''
            ...     0 |
            ...     1 | 1
            ...       | 1/2 1/2''', order=2)
            >>> heun.b
            (Fraction(1, 2), Fraction(1, 2))
        """
        lines: list[tuple[str, list[str]]] = []
        for line in filter(str.strip, text.splitlines()):
            head, bar, tail = line.partition("|")
            if bar:
                lines.append((head.strip(), tail.split()))
            elif lines:
                # Long rows are broken across lines in print, and in the source too.
                lines[-1][1].extend(line.split())
            else:
                raise SchemeError(f"{name or 'tableau'}: first line {line.strip()!r} has no '|'; write 'c | a ...'.")
        # Lines with a node are stages; the one or two without are weights, and come last.
        heads = [bool(head) for head, _ in lines]
        s = sum(heads)
        if not all(heads[:s]) or len(lines) - s not in (1, 2):
            raise SchemeError(
                f"{name or 'tableau'}: want lines 'c | a ...', then '| b' and at most one '| b_hat', "
                f"got {s} with a node and {len(lines) - s} without."
            )
        rows = [_row(entries) for _, entries in lines]
        return cls(
            name=name,
            a=tuple(rows[:s]),
            b=rows[s],
            c=_row(head for head, _ in lines[:s]),
            b_hat=rows[s + 1] if len(rows) > s + 1 else None,
            order=order,
            order_hat=order_hat,
            digits=digits,
            cite=cite,
        )

    @classmethod
    def from_rows(
        cls, a: Sequence[Sequence[NumberLike]], b: Sequence[NumberLike], *, name: str = "", **fields
    ) -> Tableau:
        """A tableau whose nodes are the row sums; `fields` are the other fields.

        Args:
            a: rows of the strictly lower triangle.
            b: the weights.
            name: the name in error messages.
            fields: the other fields of Tableau.
        """
        rows = tuple(_row(row) for row in a)
        return cls(name=name, a=rows, b=_row(b), c=_RowSums(_sum(row) for row in rows), **fields)

    @classmethod
    def low_storage(cls, A: Sequence[NumberLike], B: Sequence[NumberLike], **fields) -> Tableau:
        """Williamson's 2N form: S <- A_i S + h f(u), u <- u + B_i S, with A_1 = 0 (J. Comput. Phys. 35, 1980).

        Args:
            A: factors of the register that holds increments.
            B: factors by which it is added to the solution.
            fields: the other fields of Tableau.

        Example:
            >>> print(Tableau.low_storage(A=[0, "-1/2"], B=["1/2", 1], name="midpoint", order=2))
            0   |
            1/2 | 1/2
                | 0   1
        """
        # The register is empty at the first stage, so A_1 has nothing to scale.
        if len(A) != len(B) or (A and exact(A[0]) != 0):
            raise SchemeError(f"low_storage: {len(A)} A and {len(B)} B; want as many of each, and A_1 = 0.")
        s = len(B)
        rows: list[list[Number]] = []
        u: list[Number] = [Fraction(0)] * s
        register = list(u)
        for i, (a_i, b_i) in enumerate(zip(_row(A), _row(B), strict=True)):
            rows.append(u[:i])
            # Both registers hold coefficients instead of vectors: S and u in terms of the slopes so far.
            register = [a_i * x + int(i == j) for j, x in enumerate(register)]
            u = [x + b_i * y for x, y in zip(u, register, strict=True)]
        return cls.from_rows(rows, u, **fields)

    @classmethod
    def shu_osher(
        cls, alpha: Sequence[Sequence[NumberLike]], beta: Sequence[Sequence[NumberLike]], **fields
    ) -> Tableau:
        """Shu and Osher's form u_i = sum_{j<i} alpha_ij u_j + h beta_ij f(u_j), i = 1..s, u_0 = x, x' = u_s.

        Strong-stability-preserving methods are published in this form; the Chebyshev and Legendre recursions have it
        too, with three alphas and two betas per stage.

        Args:
            alpha: row i (from 1) has i entries that sum to 1.
            beta: of the same shape.
            **fields: the other fields of a tableau, such as its name and order.

        Example:
            >>> print(Tableau.shu_osher([[1], ["1/2", "1/2"]], [[1], [0, "1/2"]], name="ssprk22", order=2))
            0 |
            1 | 1
              | 1/2 1/2
        """
        s = len(alpha)
        rows: list[list[Number]] = [[Fraction(0)] * s]
        for i, (alphas, betas) in enumerate(zip(alpha, beta, strict=True), start=1):
            if len(alphas) != i or len(betas) != i:
                raise SchemeError(f"shu_osher: row {i} has {len(alphas)} alphas and {len(betas)} betas, want {i} each.")
            row: list[Number] = [Fraction(0)] * s
            weights = _row(alphas)
            total = _sum(weights)
            # Stages of this form average earlier states: with another sum even a constant solution would drift.
            if abs(float(total - 1)) > (0.0 if fields.get("digits") is None else 5 * 10.0 ** -fields["digits"]):
                raise SchemeError(f"shu_osher: the alphas of row {i} sum to {show(total)}, want 1.")
            for j, (x, y) in enumerate(zip(weights, _row(betas), strict=True)):
                # u_j is itself a combination of slopes; substituting it leaves the row of a Butcher array. Most alphas
                # of a recursion are 0, and exact numbers of many digits are slow to multiply.
                if x != 0:
                    row = [r + x * old for r, old in zip(row, rows[j], strict=True)]
                row[j] += y
            rows.append(row)
        # The last u is the step's result, so its row holds the weights.
        return cls.from_rows([row[:i] for i, row in enumerate(rows[:s])], rows[s], **fields)

    @property
    def stages(self) -> int:
        """Residual functions that one step consumes."""
        return len(self.b)

    @property
    def exact(self) -> bool:
        """Whether the coefficients are exact, not rounded."""
        return self.digits is None

    @property
    def tolerance(self) -> float:
        """Error allowed per unit of coefficient: 0 if exact, else five units in the last declared digit."""
        return 0.0 if self.digits is None else 5 * 10.0**-self.digits

    @property
    def mixing(self) -> float:
        """max_i sum_j |a_ij|: by how much a stage's input can outgrow x when the residual functions differ."""
        # Summed as floats: exact sums of numbers with a thousand digits take as long as everything else.
        return max(fsum(abs(float(x)) for x in row) for row in self.a)

    def floats(
        self,
    ) -> tuple[tuple[tuple[float, ...], ...], tuple[float, ...], tuple[float, ...], tuple[float, ...] | None]:
        """(a, b, c, b_hat), each exact number rounded once, to the nearest float."""
        b_hat = None if self.b_hat is None else tuple(map(float, self.b_hat))
        return (
            tuple(tuple(map(float, row)) for row in self.a),
            tuple(map(float, self.b)),
            tuple(map(float, self.c)),
            b_hat,
        )

    def pruned(self) -> Tableau:
        """The method without its second weights and without the stages that only those need.

        Example:
            >>> t = Tableau("pair", [[], [1]], b=[1, 0], c=[0, 1], b_hat=["1/2", "1/2"], order=1, order_hat=2)
            >>> t.pruned().stages
            1
        """
        needed = {i for i, x in enumerate(self.b) if x != 0}
        # From the last stage back, so that every stage that reads stage i is visited before it.
        for i in reversed(range(self.stages)):
            if i in needed:
                needed |= {j for j, x in enumerate(self.a[i]) if x != 0}
        keep = sorted(needed)
        return Tableau(
            name=self.name,
            a=tuple(tuple(self.a[i][j] for j in keep if j < i) for i in keep),
            b=tuple(self.b[i] for i in keep),
            c=tuple(self.c[i] for i in keep),
            order=self.order,
            digits=self.digits,
            cite=self.cite,
        )

    def __repr__(self) -> str:
        return f"<Tableau {self.name or 'unnamed'}: {self.stages} stages, order {self.order}>"

    def __str__(self) -> str:
        weights = [self.b] if self.b_hat is None else [self.b, self.b_hat]
        nodes = [show(x) for x in self.c] + [""] * len(weights)
        rows = [[show(x) for x in row] for row in (*self.a, *weights)]
        widths = [max(len(row[j]) for row in rows if j < len(row)) for j in range(self.stages)]
        left = max(map(len, nodes))
        return "\n".join(
            f"{node:<{left}} | {' '.join(f'{x:<{w}}' for x, w in zip(row, widths, strict=False))}".rstrip()
            for node, row in zip(nodes, rows, strict=True)
        )


def nest(outer: Tableau, inner: Tableau) -> Tableau:
    """A method whose residual functions are increments of another method: A (x) 1 b^T + I (x) a, weights B (x) b.

    Row (i, j) is the input of inner stage j within outer stage i; ``outer.stages * inner.stages`` residual functions.
    The condition of order 2 reads sum B C + sum b c = 1/2, so two methods of order 2 or more nest to order 1.

    Example:
        >>> euler = Tableau("euler", [[]], b=[1], c=[0], order=1)
        >>> midpoint = Tableau("midpoint", [[], ["1/2"]], b=[0, 1], c=[0, "1/2"], order=2)
        >>> nest(midpoint, euler).a == midpoint.a, nest(midpoint, midpoint).order
        (True, 1)
    """
    rows = [
        [x * y for x in outer.a[i] for y in inner.b] + list(inner.a[j])
        for i in range(outer.stages)
        for j in range(inner.stages)
    ]
    digits = min((t.digits for t in (outer, inner) if t.digits is not None), default=None)
    if outer.stages == 1 or inner.stages == 1:
        order = (inner if outer.stages == 1 else outer).order
    else:
        # Order 2 requires 1/2, up to a tolerance, since published decimals do not sum to it exactly.
        slope = _sum(b * c for t in (outer, inner) for b, c in zip(t.b, t.c, strict=True))
        order = 1 if abs(float(slope) - 0.5) > 1e-6 else None  # None: left to schemes.order
    return Tableau.from_rows(
        rows,
        [x * y for x in outer.b for y in inner.b],
        name=f"nested({outer.name}, {inner.name})",
        order=order,
        digits=digits,
    )


def compose(tableaux: Sequence[Tableau], steps: Sequence[NumberLike] | None = None, *, name: str = "") -> Tableau:
    """One method that takes steps of several methods one after another, scaled to a total step of 1.

    ``compose([t] * n)`` is n full steps of t (or n substeps: the two differ in the step size alone).

    Args:
        tableaux: the methods, first step first.
        steps: their step sizes, all 1 unless given.
        name: the name of the composed method.

    Example:
        >>> euler = Tableau("euler", [[]], b=[1], c=[0], order=1)
        >>> print(compose([euler, euler]))
        0   |
        1/2 | 1/2
            | 1/2 1/2
    """
    sizes = _row(steps) if steps is not None else _row([1] * len(tableaux))
    total = _sum(sizes)
    if not tableaux or len(sizes) != len(tableaux) or total == 0:
        raise SchemeError(
            f"compose: {len(tableaux)} tableaux, {len(sizes)} steps of total {total}; want one step each, total not 0."
        )
    rows: list[list[Number]] = []
    done: list[Number] = []
    for tableau, size in zip(tableaux, sizes, strict=True):
        h = size / total
        # Every row of this step starts with what the earlier steps have added: its stages start where those ended.
        rows += [done + [h * x for x in row] for row in tableau.a]
        done += [h * x for x in tableau.b]
    orders = [t.order for t in tableaux]
    return Tableau.from_rows(
        rows,
        done,
        name=name or " + ".join(t.name or "tableau" for t in tableaux),
        order=None if None in orders else min(p for p in orders if p is not None),
        digits=min((t.digits for t in tableaux if t.digits is not None), default=None),
    )
