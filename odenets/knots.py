"""Knots and coefficients of fields: read from arguments and state dicts, mapped, and compared."""

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from schemes.errors import SchemeError
from schemes.splines import SplineSpace

KNOTS = "knots"  # the key of the knots in a state dict


def space_of(knots: int | Sequence[float] | SplineSpace, degree: int, span: float) -> SplineSpace:
    """Returns the spline space on [0, 1] that the knots describe."""
    if isinstance(knots, SplineSpace):
        return knots
    if isinstance(knots, Integral):
        return SplineSpace.uniform(knots if isinstance(knots, bool) else int(knots), degree)
    try:
        ends = [float(k) for k in knots]  # type: ignore[union-attr]
    except (TypeError, ValueError):
        raise SchemeError(
            f"ContinuousWeights: knots are {knots!r}; want a whole number of intervals, or their ends from 0 to "
            f"{span:g}."
        ) from None
    if len(ends) < 2 or abs(ends[0]) > 1e-9 * span or abs(ends[-1] - span) > 1e-9 * span:
        raise SchemeError(
            f"ContinuousWeights: knots are {ends}; want a number of intervals, or their ends from 0 to {span:g}."
        )
    return SplineSpace(degree, tuple(k / span for k in ends[1:-1]))


def read_knots(given: Tensor, count: int) -> tuple[float, SplineSpace]:
    """Returns the span and the spline space of a knot vector in a state dict, for so many coefficients.

    Raises:
        SchemeError: it is not a knot vector of so many coefficients.
    """
    knots = [float(k) for k in given.double().cpu()] if given.dim() == 1 else []
    # A knot vector has one knot per coefficient, and degree + 1 more.
    degree = len(knots) - count - 1
    if not 0 <= degree <= 3 or not knots or knots[0] != 0 or not knots[-1] > 0:
        raise SchemeError(f"{len(knots)} knots are no knot vector of {count} coefficients.")
    end = degree + 1
    return knots[-1], SplineSpace(degree, tuple(k / knots[-1] for k in knots[end:-end]))


def count_of(state: Mapping[str, Any], prefix: str, otherwise: int) -> int:
    """Returns the number of coefficients of a field in a state dict; ``otherwise`` if it holds none."""
    counts = [len(v) for k, v in state.items() if k.startswith(f"{prefix}block.") and isinstance(v, Tensor) and v.dim()]
    return counts[0] if counts else otherwise


def mapped(matrix: Tensor, coefficients: Tensor) -> Tensor:
    """Applies a map to coefficients, (new, old) times (old, ...), computed in float64."""
    wide = torch.complex128 if coefficients.is_complex() else torch.float64
    found = torch.tensordot(matrix.to(coefficients.device, wide), coefficients.to(wide), 1)
    return found.to(coefficients.dtype)


def relative_errors(pairs: Mapping[str, tuple[Tensor, Tensor]], weights: Tensor) -> tuple[float, dict[str, float]]:
    """Returns weighted RMS differences over places, relative to the first of each pair: of all pairs, and of each."""

    def square(x: Tensor) -> float:
        return float((weights * x.abs().square().flatten(1).sum(1)).sum())

    parts = {name: (square(a - b), square(a)) for name, (a, b) in pairs.items()}
    errors = {name: (d / max(s, 1e-300)) ** 0.5 for name, (d, s) in parts.items()}
    return (sum(d for d, _ in parts.values()) / max(sum(s for _, s in parts.values()), 1e-300)) ** 0.5, errors
