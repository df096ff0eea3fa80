"""Means, spreads, and differences with confidence intervals: of two groups within strata, and of pairs by seed."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

from schemes import SchemeError

from ..extras import MissingExtra, install


class Difference(NamedTuple):
    """Mean of one group of networks against that of another.

    Attributes:
        mean: the difference.
        low: lower end of its confidence interval.
        high: upper end.
    """

    mean: float
    low: float
    high: float


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean.

    Args:
        values: at least one.
    """
    return sum(values) / len(values)


def variance(values: Sequence[float]) -> float:
    """The sample variance, with n - 1 in its denominator.

    Args:
        values: at least two.
    """
    m = mean(values)
    return sum((v - m) ** 2 for v in values) / (len(values) - 1)


def spread(values: Sequence[float]) -> float:
    """The standard deviation of a sample.

    Args:
        values: at least two.
    """
    return variance(values) ** 0.5


def difference(strata: Sequence[tuple[Sequence[float], Sequence[float]]], confidence: float = 0.95) -> Difference:
    """Difference of means, b - a, averaged over strata that count alike, with a confidence interval.

    In each stratum the variance of the difference is s_a^2 / n_a + s_b^2 / n_b, with unequal variances; the interval is
    Student's, with the degrees of freedom of Welch and Satterthwaite. One stratum gives Welch's interval.

    Args:
        strata: pairs (a, b) of at least two figures each.
        confidence: of the interval.

    Raises:
        SchemeError: a group of fewer than two.

    Source:
        Welch 1947, The generalization of Student's problem when several different population variances are involved.

    Example:
        >>> difference([([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])]).mean
        1.0
    """
    means, parts = [], []
    for pair in strata:
        if min(map(len, pair)) < 2:
            raise SchemeError(
                f"an interval needs two networks in every group; here are {len(pair[0])} and {len(pair[1])}."
            )
        means.append(mean(pair[1]) - mean(pair[0]))
        # The variance of a mean and its degrees of freedom, of either group in each stratum.
        parts += [(variance(x) / len(x), len(x) - 1) for x in pair]
    total = sum(v for v, _ in parts)
    centre = mean(means)
    # Equal figures everywhere: no interval, and no division by zero.
    if total == 0:
        return Difference(centre, centre, centre)
    freedom = total**2 / sum(v**2 / n for v, n in parts)
    # The mean over strata has the sum of their variances, divided by the square of their number.
    half = _student((1 + confidence) / 2, freedom) * total**0.5 / len(means)
    return Difference(centre, centre - half, centre + half)


class Paired(NamedTuple):
    """The differences of two groups of runs whose seeds are the same.

    Attributes:
        pairs: seeds that both groups have.
        mean: of the differences.
        spread: their standard deviation; None of fewer than two pairs, as all that follows.
        interval: mean and confidence interval.
        together: the same with the confidence shared out over all comparisons of a table (Bonferroni), so that all of
            its intervals hold at once with the confidence that each has alone.
        visible: the true difference that so many pairs would show with probability 0.8, if their standard deviation is
            that of the differences: whose interval would leave zero out.
    """

    pairs: int
    mean: float
    spread: float | None = None
    interval: Difference | None = None
    together: Difference | None = None
    visible: float | None = None


def paired(
    first: Mapping[int, float],
    second: Mapping[int, float],
    confidence: float = 0.95,
    comparisons: int = 1,
) -> Paired | None:
    """The mean difference, second - first, of the figures of equal seeds, with Student's interval.

    The half-width is t s / sqrt(n), of n differences with standard deviation s, with t the quantile of n - 1 degrees of
    freedom. What the seeds have in common, such as the order of the samples, does not widen it.

    Args:
        first: figures by seed.
        second: figures by seed.
        confidence: of the interval.
        comparisons: intervals in the table.

    Returns:
        None where no seed is in both.

    Source:
        Student 1908, The probable error of a mean, for the interval; the visible difference is Bloom's minimum
        detectable effect (1995), here by the noncentral t distribution, as his (t_{confidence} + t_{0.8}) s / sqrt(n)
        is too small for few pairs.

    Example:
        >>> paired({0: 0.5, 1: 0.6, 2: 0.7}, {0: 0.6, 1: 0.7, 5: 0.1}).pairs
        2
    """
    seeds = [seed for seed in first if seed in second]
    if not seeds:
        return None
    differences = [second[seed] - first[seed] for seed in seeds]
    centre, n = mean(differences), len(differences)
    if n == 1:
        return Paired(1, centre)
    error = (variance(differences) / n) ** 0.5

    def interval(level: float) -> Difference:
        half = _student((1 + level) / 2, n - 1) * error
        return Difference(centre, centre - half, centre + half)

    visible = _detected(confidence, n - 1) * error
    # Bonferroni: the chance of an error is shared out, and not the confidence.
    shared = 1 - (1 - confidence) / max(1, comparisons)
    return Paired(n, centre, spread(differences), interval(confidence), interval(shared), visible)


def _student(level: float, freedom: float) -> float:
    try:
        # Imported where it is needed: a report over one seed has no intervals, and does without scipy.
        from scipy.stats import t
    except ImportError:
        raise MissingExtra(f"intervals need scipy: {install('study')}", name="scipy") from None
    return float(t.ppf(level, freedom))


@cache
def _detected(confidence: float, freedom: int, power: float = 0.8) -> float:
    """The true mean, in standard errors of it, for which Student's interval leaves zero out with some probability."""
    bound = _student((1 + confidence) / 2, freedom)
    # Given the estimated deviation, w times the true one, the mean is seen with a normal's probability. Simpson's rule
    # over w, since scipy's noncentral t is no number for one degree of freedom.
    step = (1 + 10 / freedom**0.5) / 1000
    scale = math.log(2) + freedom / 2 * math.log(freedom / 2) - math.lgamma(freedom / 2)
    weights = []
    for k in range(1, 1001):
        w = k * step
        density = math.exp(scale + (freedom - 1) * math.log(w) - freedom * w * w / 2)
        weights.append((bound * w, density * step / 3 * (1 if k == 1000 else 4 if k % 2 else 2)))
    if freedom == 1:
        weights.append((0.0, math.exp(scale) * step / 3))  # elsewhere the density begins at zero

    def seen(shift: float) -> float:
        return sum(weight * (_normal(shift - at) + _normal(-shift - at)) for at, weight in weights)

    low, high = 0.0, bound
    while seen(high) < power:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if seen(middle) < power else (low, middle)
    return high


def _normal(x: float) -> float:
    return math.erfc(-x / 2**0.5) / 2


def in_cell(text: str) -> str:
    r"""A text as it can stand in a table in Markdown, on one line and in one column.

    Args:
        text: any.

    Example:
        >>> in_cell("compose(a | b)")
        'compose(a \\| b)'
    """
    return " ".join(text.replace("|", "\\|").split())


def markdown(head: str, rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, all columns but the first flush right.

    Args:
        head: names of the columns, with " | " between them.
        rows: a cell for each column, of any text.
    """
    names = head.split(" | ")
    cells = [[in_cell(text) for text in row] for row in rows]
    lines = [names, ["---", *["--:"] * (len(names) - 1)], *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def interval_text(d: Difference, factor: float, digits: int) -> str:
    """A difference and its interval: "+1.48 [+0.54, +2.43]".

    Args:
        d: the difference.
        factor: by which the figures are multiplied, such as 100.
        digits: behind the point.
    """
    return f"{factor * d.mean:+.{digits}f} [{factor * d.low:+.{digits}f}, {factor * d.high:+.{digits}f}]"
