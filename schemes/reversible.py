"""The McCallum-Foster construction: any one-stream scheme, made invertible by a second stream."""

import cmath
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .coupling import Coupling, Update
from .errors import SchemeError
from .language import finite, written
from .scheme import Function, Scheme, Slot, State, StepSize
from .stability import polynomial


class Intervals(NamedTuple):
    """Lengths of the stability intervals [-real, 0] and [-imaginary i, imaginary i]."""

    real: float
    imaginary: float


class Reversible(Coupling):
    """An invertible scheme of the base's order: y' = c y + (1 - c) z + Psi_h(t, z), z' = z - Psi_{-h}(t + h, y').

    Psi_h is the increment of the base over a step h, Psi_{-h} the same backwards from the end of the step; c is the
    coupling. Streams (y, z), at first (x, x); the readout is y.

    Cost: **2 s evaluations a step** (each residual function twice), 2 streams; at most the graph of one increment is
    alive. **Danger**: it is stable only on a short interval, about 1 - c on the negative real axis, whatever the base
    (c = 0.99: 0.01; y' = -y with h = 1 explodes), and its inverse **amplifies by 1/c a step** (c = 0.8: 1.6 million
    times over 64 steps). A coupling near 1 reconstructs well but is unstable sooner; ``stability_interval`` computes
    the limits. The base's order holds for one vector field; with separate weights there is none, but the inverse
    remains.

    Args:
        base: a scheme of one stream with fixed steps, such as rk4.
        coupling: c, between 0 and 1, both excluded.

    Raises:
        SchemeError: the base has several streams or chooses its own steps, or c is not between 0 and 1.

    Source:
        McCallum and Foster 2024, Efficient, Accurate and Stable Gradients for Neural ODEs, arXiv 2410.11648,
        definition 2.1 and section 3 (the stability condition there is for the Euler base).

    Example:
        >>> import schemes
        >>> scheme = schemes.get("reversible(rk4, coupling=0.99)")
        >>> scheme.evaluations, scheme.order, round(scheme.stability_interval().real, 3)
        (8, 4, 0.01)
    """

    examples = (
        "reversible(rk4)",
        "reversible(midpoint, 0.9)",
        "reversible(euler, 0.5)",
        "reversible(repeat(heun2, 2))",
    )
    streams = 2

    def __init__(self, base: Scheme, coupling: float = 0.999):
        if not isinstance(base, Scheme) or base.nodes is None or base.invertible or not base.one_stream:
            raise SchemeError(
                f"reversible: the base {base} must have one stream and fixed steps, such as rk4, in training too."
            )
        self.base, self.coupling = base, finite("reversible: the coupling", coupling)
        if not 0 < self.coupling < 1:
            raise SchemeError(f"reversible: the coupling is {self.coupling:g}, want 0 < coupling < 1.")
        self.stages, self.order, self.span = base.stages, base.order, base.span
        self.evaluations = None if base.evaluations is None else 2 * base.evaluations
        # The backward increment starts at the end of the step, and runs through the same times in reverse.
        self.nodes = (*base.nodes, *(base.span - c for c in base.nodes))
        self.amplification = 1 / self.coupling

    def init(self, fs: Sequence[Function], x: Tensor, h: StepSize = 1.0) -> State:
        return x, x

    def updates(self, fs: Sequence[Function], h: StepSize, streams: int) -> list[Update]:
        # With times, each function comes twice, bound to the times of each half; without times both halves share it.
        half = max(len(fs) // 2, self.stages)
        forth, back = fs[:half], fs[-half:]
        c, slope = self.coupling, self.base.slope

        def first(s: State) -> tuple[float, Tensor]:
            # z is another stream and so belongs to the shift; y is scaled by c alone.
            return c, torch.add(h * slope(forth, s[1], h), s[1], alpha=1 - c)

        return [Update(0, first), Update(1, lambda s: (1.0, h * slope(back, s[0], -h)))]

    def stability_interval(self, tolerance: float = 1e-9, imaginary_tolerance: float = 1e-4) -> Intervals:
        """How far along either axis, in z = h lambda, a step of y' = lambda y does not grow.

        With P = R(z) - 1 and Q = R(-z) - 1, R being the base's stability polynomial, a step is stable where both roots
        of x^2 - (1 + c - (1 - c) Q - P Q) x + c lie in the unit disc.

        Args:
            tolerance: the growth per step that still counts as none on the real axis.
            imaginary_tolerance: the same on the imaginary axis, where most bases grow a little everywhere.

        Raises:
            SchemeError: the base has no tableau.
        """
        tableau = self.base.tableau
        if tableau is None:
            raise SchemeError(f"{self}: the base has no tableau to compute a stability interval from.")
        span, c = self.span, self.coupling
        increment = [float(x) for x in polynomial(tableau)[:0:-1]]  # (R(z) - 1) / z, highest power first

        def psi(z: complex) -> complex:
            value = 0j
            for x in increment:
                value = (value + x) * z
            return value

        def growth(z: complex) -> float:
            p, q = psi(z), psi(-z)
            # The step is a 2 x 2 matrix of determinant c; its larger eigenvalue is the growth.
            trace = 1 + c - (1 - c) * q - p * q
            root = cmath.sqrt(trace * trace - 4 * c)
            return max(abs(trace + root), abs(trace - root)) / 2 - 1

        return Intervals(
            _first(lambda r: growth(complex(-span * r)) > tolerance),
            _first(lambda r: growth(1j * span * r) > imaginary_tolerance),
        )

    def at(self, n: int) -> Scheme:
        base = self.base.whole(n)
        return self if base is self.base else Reversible(base, self.coupling)

    @property
    def raw(self) -> tuple[bool, ...]:
        return self.base.raw

    @property
    def unused(self) -> tuple[int, ...]:
        return self.base.unused

    def slots(self, n: int, streams: tuple[int, ...], out_channels: int | None = None) -> tuple[Slot, ...]:
        return self.base.slots(n, streams[:1])

    def _parts_compared(self) -> tuple[Scheme, ...]:
        return (self.base,)

    def __str__(self) -> str:
        return f"reversible({self.base}, coupling={written(self.coupling)})"


def _first(unstable: Callable[[float], bool], fine: float = 1 / 4096, end: float = 64.0) -> float:
    """The end of the first stable interval, by a scan and bisection."""
    low, high = 0.0, fine
    while not unstable(high):
        if high > end:
            return high
        # Steps that grow with the distance: an interval may end at 0.001 or at 60.
        low, high = high, high + max(fine, high / 256)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if unstable(middle) else (middle, high)
    return low
