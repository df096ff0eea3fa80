"""Fixed steps: any scheme of the language along a grid of times."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..errors import SchemeError
from ..scheme import Scheme, State
from .dense import Hermite
from .field import Field, time_dtype
from .run import Run

Time = float | Tensor


class Grid(Sequence[float]):
    """The times of equal steps from a start to an end, computed on demand: there may be billions.

    Args:
        start: the first time.
        end: the last time, which is met exactly.
        n: number of steps.
        size: their size with its sign, the last one shorter; None divides the interval into equal ones.
    """

    def __init__(self, start: float, end: float, n: int, size: float | None = None):
        self.start, self.end, self.n, self.size = start, end, n, size

    def __len__(self) -> int:
        return self.n + 1

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = i + len(self) if i < 0 else i
        if not 0 <= i <= self.n:
            raise IndexError(i)
        if i == self.n:
            return self.end
        # Each is computed from the start, so that rounding does not accumulate.
        return self.start + ((self.end - self.start) * (i / self.n) if self.size is None else self.size * i)


def count(start: float, end: float, size: float) -> int:
    """How many steps of at most that size there are between two times.

    Raises:
        SchemeError: more than the number format can tell apart.
    """
    # Minus a slack for rounding: an interval of 0.3 in steps of 0.1 is three steps, not four.
    n = abs(end - start) / size - 1e-9
    if not n < 2.0**53:
        raise SchemeError(f"odeint: a step_size of {size:g} is lost against times from {start:g} to {end:g}.")
    return max(1, math.ceil(n))


def grids(times: Sequence[float], size: float | None, steps: int | None) -> list[Grid]:
    """The grid of each interval: ``steps`` equal steps, or as many as keep a step within ``size``; one if neither."""
    return [Grid(a, b, steps or (1 if size is None else count(a, b, size))) for a, b in pairwise(times)]


class Stepper:
    """Takes steps of a scheme one after another.

    A scheme of several streams starts anew where the step size changes, since its streams belong to one size.

    Args:
        scheme: a scheme with fixed steps.
        func: the field, ``func(time tensor, y)``.
        y: the state at the start.
        again: whether a step's graph is dropped and recomputed in the backward pass.
        perturb: whether the ends of a step are evaluated just within it.
    """

    def __init__(self, scheme: Scheme, func: Callable[[Any, Tensor], Tensor], y: Tensor, again: bool, perturb: bool):
        if scheme.nodes is None:
            raise SchemeError(f"odeint: {scheme} chooses its own steps; want a scheme with fixed ones, such as rk4.")
        self.scheme, self.field, self.y = scheme, Field(func, y), y
        self.again, self.perturb = again, perturb
        self.state: State = ()
        self.size, self.n = math.nan, 0
        self.dtype, self.device = time_dtype(y), y.device

    def _at(self, time: Time, place: float = 0.5) -> Callable[[Tensor], Tensor]:
        """The field at a time, as a residual function."""
        if isinstance(time, Tensor):
            time = time.to(self.device, self.dtype)
            if self.perturb and place in (0.0, 1.0):
                time = time + (self._beside(time.detach(), place) - time.detach())
            return lambda x: self.field.timed(time, x)
        if self.perturb and place in (0.0, 1.0):
            time = float(self._beside(torch.tensor(time, dtype=self.dtype), place))
        return lambda x: self.field(time, x)

    def _beside(self, near: Tensor, place: float) -> Tensor:
        """The number next to a time at an end of a step, towards the inside of the step."""
        forward = (self.size > 0) == (place == 0.0)
        return torch.nextafter(near, torch.full_like(near, math.inf if forward else -math.inf))

    def advance(self, t: Time, length: Time, size: float) -> Tensor:
        """The state after a step of that length from time t; ``size`` is the length as a number."""
        scheme = self.scheme
        h = length / scheme.span
        # Relative to the size, since equal steps of a grid differ by rounding.
        if not self.state or (scheme.streams > 1 and abs(size - self.size) > 1e-9 * abs(size)):
            self.size, self.n = size, 0
            self.state = scheme.init([self._at(t, 0.0)] * scheme.stages, self.y, h)
        self.size = size
        # For a mix the whole period is one step; for other schemes the first step may differ from the rest.
        part = scheme if len(scheme.plan) > 1 else scheme.at(self.n)
        nodes: tuple[float, ...] = part.nodes or ()
        fs = [self._at(t + c * h if c else t, c / scheme.span) for c in nodes]
        if self.again:
            # The streams are passed as arguments: tensors held by a closure would be kept, and their graph with them.
            self.state = checkpoint(lambda *s: part._step(fs, s, h), *self.state, use_reentrant=False)  # type: ignore
        else:
            self.state = part._step(fs, self.state, h)
        self.n += 1
        self.y = scheme.readout(self.state)
        return self.y


def endless(t: float, size: float) -> Iterator[tuple[float, float]]:
    """Steps of one size, without end."""
    n = 0
    while True:
        # Multiplied, not accumulated: ten thousand steps end where they should.
        yield t + n * size, t + (n + 1) * size
        n += 1


# long: the loop of a solve, whose state is local because attribute look-ups dominate small systems
def solve(
    stepper: Stepper,
    times: Sequence[float],
    grid: Sequence[Sequence[float]] | None,
    *,
    moving: Tensor | None = None,
    size: float | None = None,
    interp: str | None = None,
    max_steps: int = 100_000,
    dense: bool = False,
    events: Any = None,
    callbacks: Any = None,
) -> Run:
    """Values at all times along a grid.

    Args:
        stepper: the scheme and the field.
        times: strictly monotone.
        grid: one grid per interval, or a single one over all of them; None steps on by ``size`` until an event.
        moving: zeros in double precision that have the derivatives of the times; there is then one grid per interval,
            of equal steps, and neither events nor dense output.
        size: the step size of an endless solve.
        interp: "linear" interpolation where values lie within steps, or a cubic one.
        max_steps: upper bound on the steps of an endless solve.
        dense: whether cubic Hermite pieces are kept.
        events: watches for events.
        callbacks: the first one is called before each step.
    """
    f, y = stepper.field, stepper.y
    run = Run([y], times[0], y)
    if events is not None and events.start(run, y):
        return run
    sign = 1.0 if times[-1] > times[0] else -1.0
    pairs: Iterator[tuple[float, float, int, int]]
    if grid is None:
        assert size is not None
        pairs = ((a, b, 0, 0) for a, b in endless(times[0], sign * size))
    else:
        pairs = ((g[j], g[j + 1], i, j) for i, g in enumerate(grid) for j in range(len(g) - 1))
    place = 1
    k: Tensor | None = None
    for t0, t1, i, j in pairs:
        if grid is None and run.accepted >= max_steps:
            run.status = "max_steps"
            break
        if callbacks is not None and callbacks[0] is not None:
            callbacks[0](t0, y, t1 - t0)
        if moving is None:
            y1 = stepper.advance(t0, t1 - t0, t1 - t0)
        else:
            n = len(grid[i]) - 1  # type: ignore[index]
            longer = (moving[i + 1] - moving[i]) / n
            # Times and lengths as tensors, so that the step itself carries the gradient of the times at its ends.
            y1 = stepper.advance(t0 + moving[i] + longer * j, t1 - t0 + longer, t1 - t0)
        run.accepted += 1
        run.steps.append((t0, t1 - t0))
        inside = place < len(times) and (times[place] - t1) * sign < 0
        piece: Hermite | None = None
        ended = False
        if dense or events is not None or inside:
            if interp == "linear" and not dense and events is None:
                piece = Hermite(t0, t1, y, y1, None, None)
            else:
                # The slopes at both ends, one of which the neighbouring step shares: one evaluation a step, and only
                # where pieces are needed.
                k = f(t0, y) if k is None else k
                end = f(t1, y1)
                piece, k = Hermite(t0, t1, y, y1, k, end), end
            if dense:
                run.segments.append(piece)  # type: ignore
            ended = events is not None and events.step(run, piece)
        else:
            k = None
        upto = run.t if ended else t1
        while grid is not None and place < len(times) and (times[place] - upto) * sign <= 0:
            run.ys.append(y1 if times[place] == t1 else piece.at(times[place]))  # type: ignore[union-attr]
            place += 1
        if ended:
            break
        y = y1
        run.t, run.y = t1, y1
    run.evaluations = f.count[0]
    return run
