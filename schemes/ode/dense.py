"""The solution within steps: pieces of the continuous extension."""

from typing import Any

import torch
from torch import Tensor

from ..runge_kutta import combine
from .field import clock


class Segment:
    """One step with its continuous extension; extra stages are evaluated when a value is first requested."""

    def __init__(self, t0: float, t1: float, h: float, y: Tensor, method: Any, tried: Any, f: Any, end: Tensor):
        self.t0, self.t1, self.h, self.y = t0, t1, h, y
        self._method, self._rest = method, (f, tried, end)
        self._slopes: list[Tensor] = []

    @property
    def slopes(self) -> list[Tensor]:
        """The slopes that the extension reads."""
        if not self._slopes:
            f, tried, end = self._rest
            self._slopes = self._method.extended(f, self.t0, self.h, self.y, tried, end)
            # From here on only the slopes hold the field's graph and the stages.
            self._rest = (None, None, None)
        return self._slopes

    def at(self, t: float | Tensor) -> Tensor:
        """The value at a time; a tensor without dimensions gets its gradient."""
        polynomials = self._method.dense[2]
        slopes = self.slopes
        if isinstance(t, Tensor):
            # In double, whatever the state: a difference of nearby times would lose its significant digits.
            theta = (t.to(torch.float64) - self.t0) / self.h
            y = self.y
            for k, p in zip(slopes, polynomials, strict=True):
                if p and any(p):
                    y = y + (self.h * _horner(p, theta)).to(k.real.dtype if k.is_complex() else k.dtype) * k
            return y
        theta = (t - self.t0) / self.h
        # The weights are numbers here, so that the value is one sum over the stages.
        row = tuple((j, self.h * _horner(p, theta)) for j, p in enumerate(polynomials) if any(p))
        return combine(self.y, slopes, row)

    def derivative(self, t: float | Tensor) -> Tensor:
        """The slope of the extension at a time."""
        theta: Any = ((t.to(torch.float64) if isinstance(t, Tensor) else t) - self.t0) / self.h
        total: Any = None
        for k, p in zip(self.slopes, self._method.dense[2], strict=True):
            if any(p):
                slope = _horner([(m + 1) * c for m, c in enumerate(p)], theta, 0)
                if isinstance(slope, Tensor):
                    slope = slope.to(k.real.dtype if k.is_complex() else k.dtype)
                total = slope * k if total is None else total + slope * k
        return total


class Point:
    """A solve that took no step: it ended where it started, or its state has no entries."""

    def __init__(self, t0: float, t1: float, y: Tensor, func: Any):
        self.t0, self.t1, self.y, self.func = t0, t1, y, func

    def at(self, t: float | Tensor) -> Tensor:
        """The value."""
        if not isinstance(t, Tensor):
            return self.y
        y = self.y
        return y + (t - self.t0).to(y.real.dtype if y.is_complex() else y.dtype) * self.derivative(t)

    def derivative(self, t: float | Tensor) -> Tensor:
        """The slope there."""
        k = self.func(clock(self.t0, self.y), self.y)
        return k if k.numel() else k.expand(self.y.shape)


class Hermite:
    """A step with the cubic through its values and slopes, or without slopes the line."""

    def __init__(self, t0: float, t1: float, y0: Tensor, y1: Tensor, k0: Tensor | None, k1: Tensor | None):
        self.t0, self.t1, self.h, self.y = t0, t1, t1 - t0, y0
        self.ends, self.slopes = (y0, y1), (k0, k1)

    def at(self, t: float | Tensor) -> Tensor:
        """The value at a time."""
        (y0, y1), (k0, k1) = self.ends, self.slopes
        x = self._theta(t)
        if k0 is None or k1 is None:
            return y0 + x * (y1 - y0)
        h = self.h
        # Written as a change from y0: where both ends agree, so does everything between, without rounding.
        rise = x * x * (3 - 2 * x)
        return y0 + rise * (y1 - y0) + (h * (x * (1 - x) * (1 - x))) * k0 + (h * (x * x * (x - 1))) * k1

    def derivative(self, t: float | Tensor) -> Tensor:
        """The slope at a time."""
        (y0, y1), (k0, k1) = self.ends, self.slopes
        x = self._theta(t)
        if k0 is None or k1 is None:
            return (y1 - y0) / self.h
        return (6 * x * (1 - x) / self.h) * (y1 - y0) + ((1 - x) * (1 - 3 * x)) * k0 + (x * (3 * x - 2)) * k1

    def _theta(self, t: float | Tensor) -> Any:
        if not isinstance(t, Tensor):
            return (t - self.t0) / self.h
        y = self.ends[0]
        return ((t.to(torch.float64) - self.t0) / self.h).to(y.real.dtype if y.is_complex() else y.dtype)


def _horner(coefficients: Any, x: Any, power: int = 1) -> Any:
    """sum_m coefficients[m] x^(m + power), power 0 or 1."""
    value: Any = 0.0
    for c in reversed(coefficients):
        value = value * x + c
    return value * x if power else value
