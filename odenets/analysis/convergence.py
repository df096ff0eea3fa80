"""A trained network under other schemes and depths: accuracy and distance of logits against evaluations."""

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor, nn

from schemes import SchemeError

from ..rebuild import continuous_stacks, rebuilt, share_of

SCHEMES = ("euler", "midpoint", "kutta3", "rk4", "dopri5")
SCALES = (Fraction(1, 4), Fraction(1, 2), Fraction(1), Fraction(2), Fraction(4))
FLOOR = 1e-5  # relative distances of single-precision logits below this are rounding


class Point(NamedTuple):
    """A network under one scheme with one number of steps.

    Attributes:
        scheme: scheme of all its continuous stacks.
        steps: number of steps of each stack; empty if a solver chooses them.
        evaluations: calls of residual functions in those stacks, in one forward pass (for an adaptive solver the mean).
        accuracy: share of samples whose label has the largest logit.
        distance: relative distance of the logits from the reference: |y - y*| / |y*| over all samples.
    """

    scheme: str
    steps: tuple[int, ...]
    evaluations: float
    accuracy: float
    distance: float


class Convergence(NamedTuple):
    """The result of ``convergence``.

    Attributes:
        points: one per scheme and number of steps that fits, in order.
        slopes: rate at which the distance falls with the steps, per scheme; nan if fewer than two points show it.
        reference: scheme and steps of the reference logits.
        accuracy: accuracy of the reference.
        samples: number of samples.
    """

    points: list[Point]
    slopes: dict[str, float]
    reference: str
    accuracy: float
    samples: int

    def fewest(self, within: float = 0.001) -> Point:
        """Returns the point of fewest evaluations whose accuracy is at most ``within`` below the best.

        Args:
            within: the accuracy that may be lost, as a share.
        """
        best = max(p.accuracy for p in self.points)
        # The 1e-12 absorbs rounding: accuracies are shares of one count, and their difference may be slightly off.
        return min((p for p in self.points if p.accuracy >= best - within - 1e-12), key=lambda p: p.evaluations)

    def __str__(self) -> str:
        rows = [f"{'scheme':28} {'steps':>12} {'evaluations':>11} {'accuracy':>9} {'distance':>10}"]
        for p in self.points:
            steps = "/".join(map(str, p.steps)) or "-"
            rows.append(f"{p.scheme:28} {steps:>12} {p.evaluations:11.6g} {p.accuracy:9.4f} {p.distance:10.2e}")
        rows.append(f"reference: {self.reference}, accuracy {self.accuracy:.4f}, {self.samples} samples")
        told = [f"{name} {rate:.2f}" for name, rate in self.slopes.items() if not math.isnan(rate)]
        rows.append(f"orders seen: {', '.join(told) or 'none'}")
        cheap = self.fewest()
        steps = f" with {'/'.join(map(str, cheap.steps))} steps" if cheap.steps else ""
        rows.append(f"fewest evaluations within 0.1 point of the best: {cheap.evaluations:g}, {cheap.scheme}{steps}")
        return "\n".join(rows)


def convergence(
    net: nn.Module,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    schemes: Sequence[str] = SCHEMES,
    scales: Sequence[float | str | Fraction] = SCALES,
    tolerances: Sequence[float] = (),
    reference: str = "rk4",
) -> Convergence:
    """Runs a network whose weights are functions of depth under several schemes and depths.

    Args:
        net: returns logits (n, classes); runs in evaluation mode, and is left as it was.
        batches: returns the samples anew at each call, in the same order, as pairs of an input and labels (n,).
        schemes: the schemes to run it under.
        scales: numbers of steps, as multiples of each stack's own; multiples that give no whole number are left out.
        tolerances: relative tolerances for the adaptive solver ``adaptive(dopri5)``.
        reference: the scheme of the reference logits, with four times the most steps.

    Raises:
        SchemeError: no weights are functions of depth, no number of steps fits, or the samples differ between calls.

    Example:
        >>> import torch
        >>> from odenets import create_model
        >>> net = create_model("ho_resnet26", functions=(4,), widths=(8,), scheme="euler", continuous=4, act="silu")
        >>> batch = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
        >>> found = convergence(net, lambda: [batch], ["euler", "rk4"], [1, 2, 4])
        >>> [p.evaluations for p in found.points], found.slopes["euler"] > 0.5
        ([4, 8, 16, 16, 32, 64], True)
    """
    depths = [stack.depth for stack in continuous_stacks(net).values()]
    if not depths:
        rebuilt(net)  # says what is missing
    shares = [s for s in map(share_of, scales) if s > 0 and all((n * s).denominator == 1 for n in depths)]
    if not shares:
        raise SchemeError(f"convergence: none of the multiples {[*map(str, scales)]} is a whole number of steps.")
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        # Four times as fine as the finest, so that the reference's own error is small compared with those measured.
        fine = rebuilt(net, reference, scale=4 * max(shares))
        want = _logits(fine, batches)
        runs = [(scheme, rebuilt(net, scheme, scale=share)) for scheme in schemes for share in shares]
        points = [_point(run, scheme, batches, want) for scheme, run in runs]
        for tolerance in tolerances:
            scheme = f"adaptive(dopri5, rtol={tolerance:g}, atol={tolerance / 10:g})"
            # One step over the whole span, which the solver divides as it needs.
            points.append(_point(rebuilt(net, scheme, depth=1), scheme, batches, want, adaptive=True))
    finally:
        for module, mode in modes:  # one by one: frozen norms stay in evaluation
            module.training = mode
    slopes = {scheme: _slope([p for p in points if p.scheme == scheme]) for scheme in schemes}
    steps = "/".join(str(s.depth) for s in continuous_stacks(fine).values())
    return Convergence(points, slopes, f"{reference} with {steps} steps", want.accuracy, len(want.labels))


class _Seen(NamedTuple):
    """What a network made of the samples.

    Attributes:
        logits: in double precision.
        labels: of the samples.
        sums: of each input, which tell samples of one label apart.
    """

    logits: Tensor
    labels: Tensor
    sums: Tensor

    @property
    def accuracy(self) -> float:
        return float((self.logits.argmax(1) == self.labels).double().mean())

    def same(self, other: "_Seen") -> bool:
        """Whether both are of the same samples, in the same order."""
        # The order of summation may differ, and with it the last digits.
        slack = 1e-9 * float(self.sums.abs().max())
        return torch.equal(self.labels, other.labels) and torch.allclose(self.sums, other.sums, 0, slack, True)


def _point(
    run: nn.Module,
    scheme: str,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    want: _Seen,
    adaptive: bool = False,
) -> Point:
    counts: list[int] = []
    stacks = continuous_stacks(run).values()
    got = _logits(run, batches, lambda: counts.append(sum(stack.evaluations for stack in stacks)))
    if not want.same(got):
        raise SchemeError(
            "convergence: batches() gave other samples, or another order, than before\n"
            "  Give a loader that neither shuffles nor augments."
        )
    distance = float((got.logits - want.logits).norm() / want.logits.norm())
    steps = () if adaptive else tuple(stack.depth for stack in stacks)
    return Point(scheme, steps, sum(counts) / len(counts) if adaptive else counts[0], got.accuracy, distance)


@torch.no_grad()
def _logits(
    net: nn.Module, batches: Callable[[], Iterable[tuple[Tensor, Tensor]]], after: Callable[[], None] | None = None
) -> _Seen:
    device = next(net.parameters()).device
    found, labels, sums = [], [], []
    for x, y in batches():
        kind = torch.complex128 if x.is_complex() else torch.float64
        sums.append(x.reshape(len(x), -1).sum(1, dtype=kind).cpu())
        # Widened before they are subtracted: a norm over many samples in single precision would add an error of its
        # own. A copy: a network may write into its input.
        found.append(net(x.to(device, copy=True)).double().cpu())
        labels.append(y.cpu())
        if after is not None:
            after()
    if not found:
        raise SchemeError("convergence: there are no samples.")
    return _Seen(torch.cat(found), torch.cat(labels), torch.cat(sums))


def _slope(points: Sequence[Point]) -> float:
    """The rate by least squares in log steps and log distances, over the points above rounding."""
    told = [(math.log(sum(p.steps)), math.log(p.distance)) for p in points if p.distance > FLOOR]
    if len({x for x, _ in told}) < 2:
        return math.nan
    x0, y0 = (sum(values) / len(told) for values in zip(*told, strict=True))
    return -sum((x - x0) * (y - y0) for x, y in told) / sum((x - x0) ** 2 for x, _ in told)
