"""Knots and coefficients of fields: read from arguments and state dicts, mapped, and compared."""

import struct
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from schemes.errors import SchemeError
from schemes.language import shorten
from schemes.splines import SAME, SplineSpace

KNOTS = "knots"  # the key of the knots in a state dict


def space_of(knots: int | Sequence[float] | SplineSpace, degree: int | None, span: float) -> SplineSpace:
    """Returns the spline space on [0, 1] that the knots describe; no degree is 1, or that of a space."""
    if isinstance(knots, SplineSpace):
        if degree not in (None, knots.degree):
            raise SchemeError(
                f"ContinuousWeights: degree is {degree}, and the splines that are given as knots are of degree "
                f"{knots.degree}.\n  Leave the degree out, or give knots as numbers."
            )
        return knots
    degree = 1 if degree is None else degree
    if isinstance(knots, Integral):
        return SplineSpace.uniform(knots if isinstance(knots, bool) else int(knots), degree)
    try:
        ends = [float(k) for k in knots]  # type: ignore[union-attr]
    except (TypeError, ValueError):
        raise SchemeError(
            f"ContinuousWeights: knots are {knots!r}; want a whole number of intervals, or their ends from 0 to "
            f"{span:g}."
        ) from None
    eps = rounding_of(knots, ends)
    slack = max(1e-9, eps) * span
    if len(ends) < 2 or not abs(ends[0]) <= slack or not abs(ends[-1] - span) <= slack:
        raise SchemeError(
            f"ContinuousWeights: knots are {ends}; want a number of intervals, or their ends from 0 to {span:g}."
        )
    inner = [k / span for k in ends[1:-1]]
    found = on_a_grid(inner, eps) if eps else inner
    kind = str(getattr(knots, "dtype", ""))
    if found is None and kind.endswith(("float32", "float16")):
        raise SchemeError(
            f"ContinuousWeights: the knots are rounded to {kind}, and a time that should meet one would miss it."
            "\n  Give them in float64, or as a list."
        )
    return SplineSpace(degree, tuple(found or inner))


def rounding_of(given: Any, values: Sequence[float]) -> float:
    """Returns the relative rounding error of numbers in less than double precision, 0 for others.

    A list counts as rounded to float32 where each number of it is, as those of ``tensor.tolist()``, and some are no
    short binary fractions.
    """
    kind = str(getattr(given, "dtype", "")).rpartition(".")[2]
    for name in ("float16", "bfloat16"):
        if kind == name:
            return torch.finfo(getattr(torch, name)).eps
    rounded = all(v == struct.unpack("f", struct.pack("f", v))[0] for v in values if abs(v) < 1e30)
    short = all((v * 2**16).is_integer() for v in values)
    return torch.finfo(torch.float32).eps if rounded and not short else 0.0


def on_a_grid(inner: Sequence[float], eps: float) -> list[float] | None:
    """Returns rounded numbers as the fractions k / n with the least n that they can mean; None where none fits."""
    for n in range(1, 4097):
        ks = [round(u * n) for u in inner]
        fits = all(abs(u * n - k) <= n * eps for u, k in zip(inner, ks, strict=True))
        if fits and len(set(ks)) == len(set(inner)):
            return [k / n for k in ks]
    return None


def alike(a: SplineSpace, b: SplineSpace) -> bool:
    """Whether two spaces are the same up to the rounding of their knots."""
    near = (abs(u - v) < SAME for u, v in zip(a.inner, b.inner, strict=False))
    return a.degree == b.degree and a.count == b.count and all(near)


def read_knots(given: Tensor, span: float) -> tuple[float, SplineSpace]:
    """Returns the span and the spline space of a knot vector in a state dict.

    Args:
        given: the knot vector.
        span: the span of the field at hand, which is returned where the knots end there up to their rounding.

    Raises:
        SchemeError: it is no knot vector.
    """
    knots = [float(k) for k in given.double().cpu()] if given.dim() == 1 else []
    # The ends are repeated degree + 1 times, and the inner knots lie between them.
    end = next((n for n, k in enumerate(knots) if k), 0)
    if not 1 <= end <= 4 or len(knots) < 2 * end or not 0 < knots[-1] < float("inf") or len({*knots[-end:]}) > 1:
        raise SchemeError(f"{len(knots)} numbers, {shorten(str(knots), 60)}, are no knot vector.")
    inner = [k / knots[-1] for k in knots[end:-end]]
    # A state dict whose tensors were all cast rounds the knots too.
    eps = rounding_of(given, knots)
    found = on_a_grid(inner, eps) if eps else inner
    own = abs(knots[-1] - span) <= max(SAME, eps) * span
    return span if own else knots[-1], SplineSpace(end - 1, tuple(found or inner))


def misshapen(space: SplineSpace, own: Mapping[str, torch.Size], state: Mapping[str, Any]) -> list[str]:
    """Returns what coefficients in a state dict contradict its knots, or the shapes of a block's own, as sentences."""
    found = []
    for key, shape in own.items():
        want = (space.count, *shape[1:])
        if isinstance(given := state.get(key), Tensor) and given.shape != want:
            found.append(f"{key} is {tuple(given.shape)}, and its knots and the block make it {want}.")
    return found


def widened(coefficients: Tensor) -> Tensor:
    """Returns coefficients in double precision, real or complex as they are."""
    return coefficients.to(torch.complex128 if coefficients.is_complex() else torch.float64)


def mapped(matrix: Tensor, coefficients: Tensor) -> Tensor:
    """Applies a map to coefficients, (new, old) times (old, ...), computed in float64."""
    wide = widened(coefficients)
    return torch.tensordot(matrix.to(wide), wide, 1).to(coefficients.dtype)


def relative_errors(pairs: Mapping[str, tuple[Tensor, Tensor]], weights: Tensor) -> tuple[float, dict[str, float]]:
    """Returns weighted RMS differences over places, relative to the first of each pair: of all pairs, and of each."""

    def square(x: Tensor) -> float:
        each = x.abs().square().flatten(1).sum(1)
        return float((weights.to(each.device) * each).sum())

    parts = {name: (square(a - b), square(a)) for name, (a, b) in pairs.items()}
    errors = {name: (d / max(s, 1e-300)) ** 0.5 for name, (d, s) in parts.items()}
    return (sum(d for d, _ in parts.values()) / max(sum(s for _, s in parts.values()), 1e-300)) ** 0.5, errors
