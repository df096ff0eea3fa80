"""Schemes composed of schemes in sequence: repeat, substeps and mixes.

A wrapper around one scheme is that scheme: ``repeat(s, 1)``, ``substeps(s, 1)``, ``1*s``, ``nested(s, euler)`` and, for
one stream, ``nested(euler, s)`` give the same values and have the same attributes, first steps, inverse and training.
`schemes.testing.check_wrapper` checks this law, for every attribute that `Scheme` declares.
"""

from .composition import Composition
from .composition import Steps as Steps
from .errors import SchemeError
from .nested import Nested as Nested
from .parts import check_part
from .scheme import MAX_FUNCTIONS, Scheme


def _count(name: str, n: object) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= MAX_FUNCTIONS:
        raise SchemeError(f"{name}: the count is {n}, want a whole number from 1 to {MAX_FUNCTIONS}.")
    return n


class Repeat(Composition):
    """n full steps of a scheme as one: time moves on by n h; as a residual function it is a block of n.

    Cost: n times the scheme's.

    Args:
        scheme: any fixed-step scheme.
        n: number of steps, at least 1.

    Raises:
        SchemeError: n is not a count, or the scheme chooses its own steps.

    Example:
        >>> import schemes
        >>> schemes.get("repeat(rk4, 3)").span
        3
    """

    examples = (
        "repeat(rk4, 3)",
        "repeat(leapfrog, 2)",
        "repeat(bdia, 2)",
        "repeat(revcol, 2)",
        "repeat(dense(3), 2)",
        "repeat(multilevel(2), 3)",
        "repeat(reversible(rk4, 0.9), 2)",
        "repeat(momentum(0.5), 2)",
    )

    def __init__(self, scheme: Scheme, n: int):
        self.scheme, self.n = check_part("repeat", scheme), _count("repeat", n)
        self._set((scheme,) * self.n)

    def _parts_compared(self) -> tuple[Scheme, ...]:
        return (self.scheme,)

    def __str__(self) -> str:
        return f"repeat({self.scheme}, {self.n})"


class Substeps(Composition):
    """n steps of size h / n as one: time moves on by h; with separate weights there are n times as many functions.

    Cost: n times the scheme's.

    Args:
        scheme: any fixed-step scheme.
        n: number of steps, at least 1.

    Raises:
        SchemeError: n is not a count, or the scheme chooses its own steps.

    Example:
        >>> import schemes
        >>> schemes.get("substeps(midpoint, 2)").stages
        4
    """

    examples = ("substeps(midpoint, 2)", "substeps(heun2, 3)", "substeps(reversible_heun, 2)", "substeps(bdia, 2)")

    def __init__(self, scheme: Scheme, n: int):
        self.scheme, self.n = check_part("substeps", scheme), _count("substeps", n)
        self.scale = 1.0 / self.n
        self._set((scheme,) * self.n)

    def _parts_compared(self) -> tuple[Scheme, ...]:
        return (self.scheme,)

    def __str__(self) -> str:
        return f"substeps({self.scheme}, {self.n})"


class Mix(Composition):
    """Schemes in turn, written ``3*rk4 + midpoint``; a Stack makes one step of each part and begins again.

    Cost: the sum of the parts'.

    Args:
        parts: (count, scheme) pairs; one-stream schemes, or the same scheme several times.

    Raises:
        SchemeError: a count is invalid, or parts of different streams are mixed.

    Example:
        >>> import schemes
        >>> [str(s) for s in schemes.get("2*rk4 + midpoint").plan]
        ['rk4', 'rk4', 'midpoint']
    """

    examples = ("2*rk4 + midpoint", "2*(euler + midpoint)", "1*rk4", "2*leapfrog", "2*revcol", "2*bdia")

    def __init__(self, *parts: tuple[int, Scheme]):
        self.counts = tuple((_count("mix", n), check_part("mix", s)) for n, s in parts)
        # Checked before the period is expanded: 4096*(4096*rk4) is short to type.
        if sum(n * s.stages for n, s in self.counts) > MAX_FUNCTIONS:
            raise SchemeError(f"{self}: more than {MAX_FUNCTIONS} residual functions in one period.")
        flat: list[Scheme] = []
        for n, s in self.counts:
            # A mix within a mix becomes part of its period: a Stack makes one step of each.
            flat += s.plan * n
        self._set(tuple(flat))

    @property
    def plan(self) -> tuple[Scheme, ...]:
        return self.parts

    def at(self, n: int) -> Scheme:
        return self.parts[n % len(self.parts)].at(n)

    def _parts_compared(self) -> tuple[Scheme, ...]:
        return tuple(s for _, s in self.counts)

    def __str__(self) -> str:
        only = len(self.counts) == 1  # 1*rk4 is a mix and rk4 is not

        def term(n: int, s: Scheme) -> str:
            if isinstance(s, Mix):
                return f"{n}*({s})"
            return f"{n}*{s}" if n > 1 or only else str(s)

        return " + ".join(term(n, s) for n, s in self.counts)
