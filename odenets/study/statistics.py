"""Means, spreads, and differences with confidence intervals: of two groups within strata, and of pairs by seed."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

from schemes import SchemeError

from ..extras import MissingExtra, install


class Difference(NamedTuple):
    """The mean of one group of networks less that of another.

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
    """Returns the difference of means, b - a, averaged over equally weighted strata, with a confidence interval.

    Variances may be unequal: in each stratum that of the difference is s_a^2 / n_a + s_b^2 / n_b. The interval is
    Student's, with Welch-Satterthwaite degrees of freedom; a single stratum gives Welch's interval.

    Args:
        strata: pairs (a, b) of groups, of at least two figures each.
        confidence: level of the interval.

    Raises:
        SchemeError: a group of fewer than two figures.

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
        # The variance of each group's mean, and its degrees of freedom.
        parts += [(variance(x) / len(x), len(x) - 1) for x in pair]
    total = sum(v for v, _ in parts)
    centre = mean(means)
    # Every group is constant: an interval of width zero, and no division by zero.
    if total == 0:
        return Difference(centre, centre, centre)
    freedom = total**2 / sum(v**2 / n for v, n in parts)
    # The variance of the mean over strata is the sum of theirs, divided by the square of their number.
    half = _student((1 + confidence) / 2, freedom) * total**0.5 / len(means)
    return Difference(centre, centre - half, centre + half)


class Paired(NamedTuple):
    """The differences between two groups of runs, paired by seed.

    Attributes:
        pairs: number of seeds that both groups have.
        mean: mean of the differences.
        spread: their standard deviation; None for fewer than two pairs, like all that follows.
        interval: mean and confidence interval.
        together: the same with a Bonferroni correction for all comparisons of a table, so that all of its intervals
            hold at once with the confidence that each has alone.
        visible: the true difference that this many pairs would show with probability 0.8, by an interval that excludes
            zero, if their standard deviation were that of the differences.
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
    """Returns the mean difference, second - first, over the seeds in both, with Student's interval.

    The half-width is t s / sqrt(n) for n differences with standard deviation s, where t is the quantile for n - 1
    degrees of freedom. What the runs of a seed share, such as the order of the samples, does not widen it.

    Args:
        first: figures by seed.
        second: figures by seed.
        confidence: level of the interval.
        comparisons: number of intervals in the table.

    Returns:
        The statistics; None if no seed is in both.

    Source:
        Student 1908, The probable error of a mean, for the interval; the visible difference is Bloom's minimum
        detectable effect (1995), here by the noncentral t distribution, since his (t_{confidence} + t_{0.8}) s /
        sqrt(n) is too small for few pairs.

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
    # Bonferroni divides the error probability, not the confidence.
    shared = 1 - (1 - confidence) / max(1, comparisons)
    return Paired(n, centre, spread(differences), interval(confidence), interval(shared), visible)


def _student(level: float, freedom: float) -> float:
    try:
        # Imported here: a report over one seed has no intervals, and does not need scipy.
        from scipy.stats import t
    except ImportError:
        raise MissingExtra(f"intervals need scipy: {install('study')}", name="scipy") from None
    return float(t.ppf(level, freedom))


@cache
def _detected(confidence: float, freedom: int, power: float = 0.8) -> float:
    """The true mean, in units of its standard error, for which Student's interval excludes zero with a given power."""
    bound = _student((1 + confidence) / 2, freedom)
    # Given an estimated deviation of w times the true one, the probability of detection is that of a normal variable.
    # It is integrated over w by Simpson's rule, since scipy's noncentral t is NaN for one degree of freedom.
    step = (1 + 10 / freedom**0.5) / 1000
    scale = math.log(2) + freedom / 2 * math.log(freedom / 2) - math.lgamma(freedom / 2)
    weights = []
    for k in range(1, 1001):
        w = k * step
        density = math.exp(scale + (freedom - 1) * math.log(w) - freedom * w * w / 2)
        weights.append((bound * w, density * step / 3 * (1 if k == 1000 else 4 if k % 2 else 2)))
    if freedom == 1:
        weights.append((0.0, math.exp(scale) * step / 3))  # otherwise the density is zero at w = 0

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
    r"""Returns a text in the form of one cell of a Markdown table: on one line, with bars escaped.

    Args:
        text: any text.

    Example:
        >>> in_cell("compose(a | b)")
        'compose(a \\| b)'
    """
    return " ".join(text.replace("|", "\\|").split())


def markdown(head: str, rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table, with all columns but the first aligned right.

    Args:
        head: names of the columns, separated by " | ".
        rows: a cell of any text for each column.
    """
    names = head.split(" | ")
    cells = [[in_cell(text) for text in row] for row in rows]
    lines = [names, ["---", *["--:"] * (len(names) - 1)], *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def interval_text(d: Difference, factor: float, digits: int) -> str:
    """Formats a difference and its interval: "+1.48 [+0.54, +2.43]".

    Args:
        d: the difference.
        factor: multiplies the figures, such as 100.
        digits: number of digits after the point.
    """
    return f"{factor * d.mean:+.{digits}f} [{factor * d.low:+.{digits}f}, {factor * d.high:+.{digits}f}]"
