"""Strategies that build valid values: nothing is drawn and discarded."""

import functools
from collections.abc import Callable
from fractions import Fraction

from hypothesis import strategies as st

from .. import tableaux as methods
from ..registry import examples, get
from ..runge_kutta import RungeKutta
from ..scheme import Scheme
from ..tableau import Tableau

Draw = Callable[[st.SearchStrategy], "int | Fraction | str | Tableau | bool"]


@functools.cache
def _leaves() -> list[tuple[int, str]]:
    """Number of residual functions and text of the expressions that need no other: single Runge-Kutta methods.

    They are the examples of the language, and the pruned form of every embedded pair.
    """
    texts = [*examples(), *(f"pruned({name})" for name, t in methods.METHODS.items() if t.b_hat is not None)]
    # Sorted by size, so that examples shrink towards small schemes.
    return sorted((s.stages, text) for text in dict.fromkeys(texts) if isinstance(s := get(text), RungeKutta))


def _continuous() -> list[str]:
    """The examples that choose their own steps."""
    return [text for text in examples() if get(text).nodes is None]


def _entries() -> st.SearchStrategy[Fraction]:
    return st.fractions(-2, 2, max_denominator=6)


@st.composite
def tableaux(draw, *, min_stages: int = 1, max_stages: int = 5, companion: bool | None = None) -> Tableau:
    """Explicit tableaux with small rational entries: nodes are the row sums, the last weight is 1 less the others.

    Their order is at least 1, and otherwise unknown.

    Args:
        min_stages: smallest number of stages, at least 1.
        max_stages: largest number of stages.
        companion: whether there are second weights; None draws that too.

    Example:
        >>> from hypothesis import given, settings
        >>> @settings(max_examples=5, database=None)
        ... @given(tableaux(max_stages=3))
        ... def law(t):
        ...     assert sum(t.b) == 1
        >>> law()
    """
    if not 1 <= min_stages <= max_stages:
        raise ValueError(f"tableaux(): min_stages={min_stages}, max_stages={max_stages}; want 1 <= min <= max.")
    s = draw(st.integers(min_stages, max_stages))

    def weights() -> list[Fraction]:
        first = draw(st.lists(_entries(), min_size=s - 1, max_size=s - 1))
        # Built, not filtered: hardly any freely drawn weights sum to 1.
        return [*first, 1 - sum(first, Fraction(0))]

    rows = [draw(st.lists(_entries(), min_size=i, max_size=i)) for i in range(s)]
    b = weights()
    second = draw(st.booleans()) if companion is None else companion
    return Tableau.from_rows(rows, b, b_hat=weights() if second else None, name="drawn", cite="drawn")


@st.composite
def scheme_expressions(draw, *, max_stages: int = 24, max_depth: int = 3, adaptive: bool = False) -> str:
    """Valid texts of the language of schemes: names, families, nested, repeat, substeps, pruned, mixes of all.

    Args:
        max_stages: maximum number of residual functions that one step (of a mix: one period) may consume.
        max_depth: how deep expressions are nested, at most 5 (the language allows 8 levels).
        adaptive: whether continuous schemes are drawn too, as the whole expression.

    Example:
        >>> from hypothesis import given, settings
        >>> import schemes
        >>> @settings(max_examples=5, database=None)
        ... @given(scheme_expressions(max_stages=8))
        ... def law(text):
        ...     assert schemes.get(text).stages <= 8
        >>> law()
    """
    if max_stages < 1 or not 0 <= max_depth <= 5:
        raise ValueError(f"scheme_expressions(): max_stages={max_stages}, max_depth={max_depth}; want >= 1, 0 to 5.")
    if adaptive and draw(st.booleans()):
        return draw(st.sampled_from(_continuous()))
    return _expression(draw, max_stages, max_depth)[0]


def _expression(draw, budget: int, depth: int) -> tuple[str, int]:
    """An expression with at most ``budget`` stages, and how many it has."""
    # The budget goes down with every level, so that every drawn text is one that the language accepts.
    kind = draw(st.sampled_from(("name", "nested", "repeat", "substeps", "mix"))) if depth and budget > 1 else "name"
    if kind == "nested":
        outer, s = _expression(draw, budget, depth - 1)
        inner, r = _expression(draw, budget // s, depth - 1)
        return f"nested({outer}, {inner})", s * r
    if kind in ("repeat", "substeps"):
        n = draw(st.integers(1, min(4, budget)))
        text, s = _expression(draw, budget // n, depth - 1)
        return f"{kind}({text}, {draw(st.sampled_from(('', 'n=')))}{n})", n * s
    if kind == "mix":
        found, total = [], 0
        for _ in range(draw(st.integers(1, 3))):
            if total == budget:
                break
            n = draw(st.integers(1, min(3, budget - total)))
            text, s = _expression(draw, (budget - total) // n, depth - 1)
            # A product binds more tightly than a sum, and n*m*scheme is not an expression.
            bracketed = f"({text})" if " + " in text or "*" in text else text
            found.append(f"{n}*{bracketed}" if n > 1 else draw(st.sampled_from((text, f"1*{bracketed}"))))
            total += n * s
        return " + ".join(found), total
    fitting = [leaf for leaf in _leaves() if leaf[0] <= budget]
    s, text = draw(st.sampled_from(fitting))
    return text, s


def schemes(*, max_stages: int = 24) -> st.SearchStrategy[Scheme]:
    """Fixed-step schemes of one stream: everything that `scheme_expressions` and `tableaux` can produce.

    Args:
        max_stages: maximum number of residual functions that one step may consume.
    """
    drawn = tableaux(max_stages=min(5, max_stages)).map(RungeKutta)
    return st.one_of(scheme_expressions(max_stages=max_stages).map(get), drawn)
