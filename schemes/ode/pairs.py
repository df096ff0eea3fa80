"""The step of an embedded pair: the stages from the first slope on, the error, the continuous extension."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import SchemeError
from ..interpolants import first_same_as_last, interpolant
from ..runge_kutta import RungeKutta, Terms, combine, terms
from ..scheme import Scheme

Field = Callable[[float, Tensor], Tensor]


class Attempt(NamedTuple):
    """A step that has been tried: the state at its end, and the slopes of its stages."""

    y: Tensor
    slopes: list[Tensor]


def total(ks: Sequence[Tensor], row: Terms, h: float, like: Tensor) -> Tensor:
    """h sum_j row[j] k_j as a new tensor of the dtype of ``like``."""
    j, a = row[0]
    # A new tensor first: the slopes belong to a graph, or to the next step.
    out = ks[j].mul(h * a)
    if out.dtype != like.dtype:
        out = out.to(like.dtype)
    for j, a in row[1:]:
        out.add_(ks[j], alpha=h * a)
    return out


class Pair:
    """A Runge-Kutta method with a companion, ready to be stepped with step sizes that are Python numbers.

    Raises:
        SchemeError: the scheme is not an embedded pair.
    """

    def __init__(self, scheme: Scheme):
        tableau = scheme.tableau if isinstance(scheme, RungeKutta) else None
        if tableau is None or tableau.b_hat is None:
            raise SchemeError(
                f"{scheme} has no embedded companion to estimate its error; take dopri5, tsit5 or verner89, "
                "or give a step_size."
            )
        a, b, c, b_hat = tableau.floats()
        self.scheme, self.name = scheme, str(scheme)
        self.reuses = first_same_as_last(tableau)
        self.stages = tableau.stages
        self.order = min(p for p in (tableau.order, tableau.order_hat, 99) if p)  # of the error estimate
        self.order = 1 if self.order == 99 else self.order
        self.tail = tuple((x, terms(row)) for x, row in zip(c[1:], a[1:], strict=True))
        self.weights = terms(b)
        self.errors = terms([v - u for u, v in zip(b, b_hat, strict=True)])  # type: ignore[arg-type]
        # It would accept every step.
        if not self.errors:
            raise SchemeError(f"{scheme}: its companion is the method itself, which estimates no error.")
        self.tableau = tableau
        self._dense: tuple[Any, ...] | None = None

    def attempt(self, f: Field, t: float, h: float, y: Tensor, k: Tensor) -> Attempt:
        """The state after a step, and the slopes of its stages; k is the slope at its start."""
        ks = [k]
        x = y
        for c, row in self.tail:
            x = y
            for n, (j, a) in enumerate(row):
                x = x.add_(ks[j], alpha=h * a) if n else torch.add(y, ks[j], alpha=h * a)
            ks.append(f(t + c * h, x))
        if self.reuses:  # the last stage was the slope at the end of the step
            return Attempt(x, ks)
        return Attempt(combine(y, ks, tuple((j, h * b) for j, b in self.weights)), ks)

    def error(self, attempt: Attempt, h: float) -> Tensor:
        """The error estimate of a step, as a new tensor without a graph."""
        with torch.no_grad():
            return total(attempt.slopes, self.errors, h, attempt.y)

    @property
    def dense(self) -> tuple[tuple[Terms, ...], tuple[float, ...], tuple[tuple[float, ...], ...], int]:
        """The continuous extension in floats: rows and nodes of its extra stages, polynomials, proved order."""
        if self._dense is None:
            found = interpolant(self.tableau)
            n = len(found.a) - found.extra
            # Built on first use: exact polynomials take a while, and most solves land on their times.
            self._dense = (
                tuple(terms(tuple(map(float, row))) for row in found.a[n:]),
                tuple(float(c) for c in found.nodes[n:]),
                tuple(tuple(map(float, p)) for p in found.weights),
                found.order(self.order),
            )
        return self._dense

    def extended(self, f: Field, t: float, h: float, y: Tensor, attempt: Attempt, end: Tensor) -> list[Tensor]:
        """The slopes that the continuous extension reads: the stages', the one at the end, the extra ones."""
        rows, nodes, *_ = self.dense
        # In the order of the interpolant's rows: the stages, then the slope at the end, unless a stage is that slope.
        ks = attempt.slopes if self.reuses else [*attempt.slopes, end]
        if not rows:
            return ks
        ks = [*ks]
        for c, row in zip(nodes, rows, strict=True):
            ks.append(f(t + c * h, combine(y, ks, tuple((j, h * a) for j, a in row))))
        return ks
