"""Generates the pages of scheme families: Butcher arrays, figures and stability regions, from exact coefficients.

``tables.py`` writes them. The page of a scheme follows from its data, except for those in ``LISTED``.
"""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from html import escape

import contourpy
from typeset import typeset

import schemes
from schemes import registry, stability
from schemes.exact_numbers import Number, Surd
from schemes.registry import CatalogueEntry
from schemes.tableau import Tableau

# Properties that the data do not contain: how a method was derived, and the purpose of a scheme with several streams.
LISTED = {
    "strong_stability": (
        "ssprk33",
        "ssprk54",
        "ssprk104",
        "williamson3",
        "carpenter_kennedy4",
        "rk46nl",
    ),
    "symmetric": ("ees25", "ees27"),
    "stabilised": ("rkc1", "rkc2", "rkl1", "rkl2"),
    "multistep": ("ab2", "alf", "leapfrog", "lm_resnet", "momentum", "reversible_heun"),
    "composed": ("adaptive", "nested", "pruned", "repeat", "substeps"),
}
FAMILIES = ("low_order", "order_4", "high_order", "pairs", *LISTED, "couplings")


def base(name: str) -> str:
    """Returns the name of a scheme without its arguments."""
    return name.partition("(")[0]


def family(name: str) -> str:
    """Returns the page of a registered name."""
    for page, names in LISTED.items():
        if name in names:
            return page
    tableau = schemes.get(schemes.examples(name)[0]).tableau
    if tableau is None:
        return "couplings"
    if tableau.b_hat is not None:
        return "pairs"
    order = tableau.order or 0
    return "low_order" if order < 4 else "order_4" if order == 4 else "high_order"


@cache
def entries() -> dict[str, CatalogueEntry]:
    """Returns the catalogue keyed by names without arguments."""
    return {base(e.name): e for e in schemes.catalogue()}


def fraction(x: Fraction) -> str:
    """Formats a rational number in LaTeX."""
    sign = "-" if x < 0 else ""
    return f"{x}" if x.denominator == 1 else rf"{sign}\tfrac{{{abs(x.numerator)}}}{{{x.denominator}}}"


def exact(x: Number) -> str:
    """Formats an exact number in LaTeX, with one fraction bar."""
    if isinstance(x, Fraction):
        return fraction(x)
    assert isinstance(x, Surd)
    n = math.lcm(x.p.denominator, x.q.denominator)
    p, q = int(x.p * n), int(x.q * n)
    root = ("" if abs(q) == 1 else str(abs(q))) + rf"\sqrt{{{x.d}}}"
    if n > 1 and not p:
        return rf"{'-' if q < 0 else ''}\tfrac{{{root}}}{{{n}}}"
    whole = f"{p or ''}{'-' if q < 0 else '+' if p else ''}{root}"
    return whole if n == 1 else rf"\tfrac{{{whole}}}{{{n}}}"


def array(t: Tableau) -> str:
    """Formats the Butcher array: in LaTeX if it fits on a page, otherwise folded, as ``print`` shows it."""
    if t.digits is not None or t.stages > 8:
        lines = "\n".join(f"    {line}" for line in str(t).splitlines())
        return f'??? note "The Butcher array: {t.stages} stages"\n\n    ```text\n{lines}\n    ```\n'
    rows = [
        " & ".join([exact(c), *map(exact, row), *[""] * (t.stages - len(row))]) for c, row in zip(t.c, t.a, strict=True)
    ]
    weights = [" & ".join(["", *map(exact, w)]) for w in (t.b, t.b_hat) if w is not None]
    body = " \\\\\n".join(rows) + " \\\\ \\hline\n" + " \\\\\n".join(weights)
    columns = f"\\def\\arraystretch{{1.5}}\n\\begin{{array}}{{c|{'c' * t.stages}}}"
    return f"$$\n{columns}\n{body}\n\\end{{array}}\n$$\n"


def shown(x: float | None) -> str:
    """Formats a number with two decimals below 100 and none above; None gives a dash."""
    return "–" if x is None else f"{x:,.0f}" if abs(x) >= 100 else f"{x + 0.0:.2f}"


def _box(t: Tableau) -> tuple[float, float, float]:
    """Returns the left, right and upper end of the stability region, the points where a step does not grow."""
    reach = 1.3 * max(6.0, stability.real_interval(t))
    tall = max(8.0, 0.3 * reach)
    # An odd number of points, so that the grid contains the real axis.
    grid = stability.region(t, (-reach, tall / 2), (-tall, tall), (161, 161))
    inside = [
        (x, y) for y, row in zip(grid.im, grid.size, strict=True) for x, r in zip(grid.re, row, strict=True) if r <= 1
    ]
    return min(x for x, _ in inside), max(x for x, _ in inside), max(y for _, y in inside)


def _ticks(low: float, high: float) -> list[int]:
    step = next(s for s in (1, 2, 5, 10, 20, 50) if (high - low) / s <= 6)
    return [n for n in range(math.ceil(low / step) * step, math.floor(high) + 1, step) if n]


def region(name: str, t: Tableau, entry: CatalogueEntry) -> str:
    """Draws the stability region as an SVG on one line, which takes its colours from the page."""
    left, right, high = _box(t)
    margin = 0.08 * max(right - left, 2 * high)
    left, right, high = left - margin, max(right, 0.0) + margin, high + margin
    scale = min(300 / (right - left), 220 / (2 * high))
    width, height = scale * (right - left), scale * 2 * high

    def place(x: float, y: float) -> str:
        return f"{(x - left) * scale:.1f} {(high - y) * scale:.1f}"

    grid = stability.region(t, (left, right), (-high, high), (97, 97))
    rings = []
    for points, offsets in zip(
        *contourpy.contour_generator(grid.re, grid.im, grid.size, fill_type="OuterOffset").filled(-1.0, 1.0),
        strict=True,
    ):
        for a, b in itertools.pairwise(offsets):
            # Neighbours that coincide to a tenth of a pixel are merged.
            places = list(dict.fromkeys(place(x, y) for x, y in points[a:b]))
            rings.append(f"M{'L'.join(places)}Z")
    at_x, at_y = place(0, 0).split()
    axes = f'<path class="axis" d="M0 {at_y}H{width:.1f}M{at_x} 0V{height:.1f}"/>'
    low = float(at_y) + 13 if float(at_y) + 13 < height else float(at_y) - 4
    marks = "".join(
        f'<path class="axis" d="M{place(n, 0)}v4"/><text x="{place(n, 0).split()[0]}" y="{low:.1f}" '
        f'text-anchor="middle">{n}</text>'.replace(">-", ">−")
        for n in _ticks(left, right)
    )
    said = f"Stability region of {name}: real interval {shown(entry.real)}, imaginary interval {shown(entry.imaginary)}"
    return (
        f'<svg class="region" role="img" aria-label="{escape(said)}" viewBox="-2 -2 {width + 4:.1f} {height + 12:.1f}" '
        f'width="{width + 4:.0f}" height="{height + 12:.0f}"><path class="inside" fill-rule="evenodd" '
        f'd="{"".join(rings)}"/>{axes}{marks}</svg>'
    )


def facts(rows: list[tuple[str, str]]) -> str:
    """Formats a table of two columns, which fits on a phone."""
    return "| Property | Value |\n| --- | --- |\n" + "".join(f"| {a} | {b} |\n" for a, b in rows)


def runge_kutta(name: str) -> str:
    """The section of a Runge-Kutta method, or of the usual member of a family."""
    e = entries()[name]
    scheme = schemes.get(e.name)
    t = scheme.tableau
    assert t is not None
    rows = [("Stages", str(e.stages)), ("Order", str(e.order or "–"))]
    if e.companion:
        rows.append(("Companion's order", str(e.companion)))
    rows += [
        ("Mixing figure", shown(e.mixing)),
        ("Stable on", f"[−{shown(e.real)}, 0], ±{shown(e.imaginary)} i"),
        ("Coefficients", "exact" if e.exact else f"published to {t.digits} digits"),
        ("Source", e.cite or "–"),
    ]
    what = "" if e.name == name else f"The member shown is `{e.name}`.\n\n"
    return (
        f"## `{name}` {{#{name}}}\n\n{what}{array(t)}\n"
        f'<div class="scheme" markdown>\n\n{facts(rows)}\n{region(e.name, t, e)}\n\n</div>\n'
    )


def other(name: str) -> str:
    """The section of a scheme that is not a Runge-Kutta method, by its usual member."""
    text = schemes.examples(name)[0]
    scheme = schemes.get(text)
    # The function of a family has its own documentation (pruned returns a RungeKutta).
    make: Callable = registry._FAMILIES.get(name, type(scheme))
    inverse = "yes" if scheme.invertible else "in training" if scheme.reversible_in_training else "no"
    rows = [
        ("Written", f"`{text}`"),
        ("Residual functions a step", str(scheme.stages)),
        ("Streams", str(scheme.streams)),
        ("Order", str(scheme.order or "–")),
        ("Inverse", inverse),
    ]
    if scheme.invertible:
        rows.append(("A step's inverse grows errors by", shown(scheme.amplification)))
    what = typeset((make.__doc__ or "").split("\n\n")[0].strip().replace("\n    ", " "))
    where = make.__module__.removeprefix("schemes.")
    return (
        f"## `{name}` {{#{name}}}\n\n{what}\n\n{facts(rows)}\n"
        f"[`schemes.{where}.{make.__name__}`](../reference/schemes/{where}.md)\n"
    )


def page(which: str) -> str:
    """Returns the page of one family, sorted by order and cost."""
    names = [n for n in schemes.names() if family(n) == which]
    methods = sorted(
        (n for n in names if n in entries() and entries()[n].real is not None),
        key=lambda n: (entries()[n].order or 0, entries()[n].stages, n),
    )
    return "\n".join([*map(runge_kutta, methods), *(other(n) for n in names if n not in methods)])
