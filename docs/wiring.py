"""Draws how schemes wire the same residual functions: ``python docs/wiring.py`` (``--check`` only lists stale files).

Nothing is drawn by hand. A step is run on unit vectors, so that the entries of the arguments of a function, and of the
results of the step, are their coefficients; see ``trace``. A value that is a stream of the next state is taken from
that line, after the node where the stream was updated. Any other value is taken from the old streams and from the
evaluations, with their coefficients.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

import schemes

PICTURES = Path(__file__).parent / "pages/pictures"
FUNCTIONS = 4
# A new stream of ``dense`` is as wide as the unit vectors of the trace.
WIDTH = 12
SCHEMES = ("euler", "midpoint", "rk4", "revnet", f"dense({WIDTH})")
# Colours of Okabe and Ito, which are safe for every colour vision; lighter ones on a dark background.
THEMES = {
    "wiring": {"ground": "#ffffff", "line": "#1f2933", "weak": "#5b6770", "box": "#0072b2", "on_box": "#ffffff"},
    "wiring_dark": {"ground": "#14151a", "line": "#e6e8eb", "weak": "#a9b2ba", "box": "#56b4e9", "on_box": "#0b1a24"},
}


@dataclass(frozen=True)
class Trace:
    """One step as coefficients over its initial streams and its evaluations.

    Attributes:
        streams: number of streams before the step.
        arguments: per evaluation, a row of coefficients for each argument, of length streams + evaluations.
        results: a row of coefficients for each stream after the step.
    """

    streams: int
    arguments: tuple[Tensor, ...]
    results: Tensor


def trace(scheme: schemes.Scheme, streams: int) -> Trace:
    """Runs the step of a scheme on unit vectors; a concatenated argument is split again."""
    units = torch.eye(WIDTH, dtype=torch.float64)
    given: list[Tensor] = []

    def f(*arguments: Tensor) -> Tensor:
        given.append(torch.cat([a.reshape(-1, WIDTH) for a in arguments]))
        return units[None, streams + len(given) - 1]

    results = scheme.step([f] * scheme.stages, tuple(units[None, i] for i in range(streams)))
    kept = streams + len(given)
    return Trace(streams, tuple(g[:, :kept] for g in given), torch.cat(results)[:, :kept])


def number(x: float) -> str:
    """Formats a coefficient as a fraction; 1 gives an empty string."""
    found = Fraction(x).limit_denominator(999)
    assert abs(found - x) < 1e-12, x
    return "" if found == 1 else str(found)


class Canvas:
    """The elements of an SVG; every method adds one."""

    def __init__(self, theme: dict[str, str]):
        self.theme = theme
        self.under: list[str] = []
        self.over: list[str] = []

    def line(self, *points: tuple[float, float], arrow: bool = False) -> None:
        """Adds a line through points, optionally with an arrow at its end."""
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        head = ' marker-end="url(#end)"' if arrow else ""
        self.under.append(f'<path d="{path}" fill="none" stroke="{self.theme["line"]}" stroke-width="1.8"{head}/>')

    def dot(self, x: float, y: float) -> None:
        """Marks where a value is read from a line."""
        self.over.append(f'<circle cx="{x:g}" cy="{y:g}" r="2.6" fill="{self.theme["line"]}"/>')

    def plus(self, x: float, y: float) -> None:
        """Marks where a value is added to a stream."""
        self.over.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="7" fill="{self.theme["ground"]}" stroke="{self.theme["line"]}" '
            f'stroke-width="1.6"/><path d="M{x - 4:g} {y:g} h8 M{x:g} {y - 4:g} v8" stroke="{self.theme["line"]}" '
            'stroke-width="1.6"/>'
        )

    def box(self, x: float, y: float, width: float, height: float, text: str) -> None:
        """Adds the box of a residual function."""
        self.over.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" fill="{self.theme["box"]}"/>'
        )
        self.text(x + width / 2, y + height / 2 + 5, text, "on_box", anchor="middle", weight=600)

    def text(
        self, x: float, y: float, text: str, colour: str, *, anchor: str = "start", weight: int = 400, size: int = 15
    ) -> None:
        """Adds a line of text."""
        if text:
            self.over.append(
                f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}" font-size="{size}" '
                f'fill="{self.theme[colour]}">{text}</text>'
            )

    def halo(self, x: float, y: float, text: str) -> None:
        """Adds a coefficient on a line, outlined in the background colour."""
        if text:
            self.over.append(
                f'<text x="{x:g}" y="{y:g}" text-anchor="middle" font-size="13" fill="{self.theme["line"]}" '
                f'stroke="{self.theme["ground"]}" stroke-width="4" paint-order="stroke">{text}</text>'
            )


# Dimensions of the drawing: a column per residual function, the box inside it, the rows of a panel.
LEFT, COLUMN, BOX, TALL = 26.0, 108.0, 46.0, 30.0
STREAM, GAP = 14.0, 26.0


class Panel:
    """One scheme over four residual functions.

    Args:
        canvas: the canvas to draw on.
        scheme: the scheme.
        top: upper end of the panel.
    """

    def __init__(self, canvas: Canvas, scheme: schemes.Scheme, top: float):
        self.canvas, self.scheme = canvas, scheme
        self.steps = FUNCTIONS // scheme.stages
        self.grown = scheme.streams + self.steps * scheme.streams_added
        # Input streams other than the first lie below the functions, streams that steps create above them.
        above = 1 + self.grown - scheme.streams
        self.top = top + 32
        self.box_top = self.top + STREAM * (above - 1) + GAP
        self.bus = self.box_top + TALL + 16
        self.below = self.box_top + TALL + GAP
        self.bottom = self.below + STREAM * (scheme.streams - 2) if scheme.streams > 1 else self.box_top + TALL

    def level(self, stream: int) -> float:
        """Returns the y coordinate of a stream's line."""
        if 0 < stream < self.scheme.streams:
            return self.below + STREAM * (stream - 1)
        made = stream - self.scheme.streams + 1 if stream else 0
        return self.box_top - GAP - STREAM * made

    def column(self, i: int) -> float:
        """Returns the left edge of a residual function's box."""
        return LEFT + COLUMN * i + 40

    def draw(self) -> float:
        """Draws all steps; returns the lower end of the panel."""
        c, scheme = self.canvas, self.scheme
        name = str(scheme).partition("(")[0]
        weak = f'<tspan dx="8" font-weight="400" font-size="13" fill="{c.theme["weak"]}">{self.caption()}</tspan>'
        c.text(LEFT - 20, self.top - 16, name + weak, "line", weight=700)
        end = LEFT + COLUMN * FUNCTIONS + 14
        for stream in range(scheme.streams):
            y = self.level(stream)
            c.line((LEFT - 18, y), (end, y), arrow=True)
        streams = scheme.streams
        for step in range(self.steps):
            found = trace(scheme, streams)
            self.step(found, step * scheme.stages, end)
            streams = len(found.results)
        return self.bottom

    def caption(self) -> str:
        """Describes steps, stages, order and invertibility, as the scheme declares them."""
        said = [f"{self.steps} step{'s' * (self.steps > 1)}"]
        if self.scheme.stages > 1:
            said[0] += f" of {self.scheme.stages} stages"
        if self.scheme.order:
            said.append(f"order {self.scheme.order}")
        if self.scheme.invertible:
            said.append("invertible")
        return ", ".join(said)

    def step(self, found: Trace, first: int, end: float) -> None:
        """Draws the evaluations of one step and where they go."""
        s, c = found.streams, self.canvas
        # Per stream that a step updates: the last evaluation that is added to it.
        done = {
            d: max(j for j in range(len(found.arguments)) if row[s + j])
            for d, row in enumerate(found.results)
            if row[s:].any()
        }
        for i, rows in enumerate(found.arguments):
            x, y = self.column(first + i), self.box_top
            c.box(x, y, BOX, TALL, f"F<tspan font-size='11' dy='3'>{first + i + 1}</tspan>")
            for k, row in enumerate(rows):
                self.argument(found, row, first, i, k, len(rows), done)
        for d, last in done.items():
            self.result(found, d, last, first, end)

    def argument(self, found: Trace, row: Tensor, first: int, i: int, k: int, of: int, done: dict[int, int]) -> None:
        """Draws an argument of an evaluation: read from an existing line, or a sum."""
        c, s, x = self.canvas, found.streams, self.column(first + i)
        padded = found.results[:, : len(row)]
        whole = [d for d in range(len(padded)) if done.get(d, i) < i and torch.equal(padded[d], row)]
        read = whole or [d for d in range(s) if row[d]]
        for d in read:
            y = self.level(d)
            # An argument of several streams has a tap for each, side by side.
            at = x + BOX / 2 + (k - (of - 1) / 2) * 10 if of > 1 or y > self.box_top else x + 12
            c.dot(at, y)
            c.line((at, y), (at, self.box_top - 3 if y < self.box_top else self.box_top + TALL + 3), arrow=True)
        for j in range(0 if whole else i):
            if row[s + j]:
                start, middle = self.column(first + j) + BOX, self.box_top + TALL / 2
                # Over the boxes in between, if any.
                over = [
                    (start + 6, middle),
                    (start + 6, self.box_top - 9),
                    (x - 12, self.box_top - 9),
                    (x - 12, middle),
                ]
                c.line((start, middle), *(over if j < i - 1 else ()), (x - 3, middle), arrow=True)
                at = (x - 26, middle + 14) if j < i - 1 else ((start + x) / 2 - 2, middle - 5)
                c.halo(*at, number(float(row[s + j])))

    def result(self, found: Trace, d: int, last: int, first: int, end: float) -> None:
        """Draws how a stream is updated: one evaluation goes straight to its node, several over a common line."""
        c, s, row = self.canvas, found.streams, found.results[d]
        used = [j for j in range(len(found.arguments)) if row[s + j]]
        node, y, middle = self.column(first + last) + BOX + 17, self.level(d), self.box_top + TALL / 2
        if not row[:s].any():  # a new stream
            right = self.column(first + last) + BOX
            c.line((right, middle), (node, middle), (node, y), (end, y), arrow=True)
            return
        c.plus(node, y)
        stop = y + 9 if y < middle else y - 9
        if used == [last]:
            c.line((self.column(first + last) + BOX, middle), (node, middle), (node, stop), arrow=True)
            c.halo(node + 14, (middle + y) / 2 + 4, number(float(row[s + last])))
            return
        self.bottom = max(self.bottom, self.bus + 8)
        for j in used:
            at = self.column(first + j) + BOX / 2
            c.line((at, self.box_top + TALL), (at, self.bus))
            c.halo(at + 16, self.bus - 4, number(float(row[s + j])))
        c.line((self.column(first + used[0]) + BOX / 2, self.bus), (node, self.bus), (node, stop), arrow=True)


def drawing(theme: dict[str, str], names: Sequence[str] = SCHEMES) -> str:
    """Returns the SVG of some schemes, one below the other."""
    canvas, top = Canvas(theme), 4.0
    for name in names:
        top = Panel(canvas, schemes.get(name), top).draw() + 26
    width = LEFT + COLUMN * FUNCTIONS + 24
    said = ", ".join(n.partition("(")[0] for n in names)
    body = "\n".join(canvas.under + canvas.over)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {top:g}" width="{width:g}" height="{top:g}" '
        f'role="img" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, DejaVu Sans, sans-serif">\n'
        f"<title>The same four residual functions under {said}</title>\n"
        '<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0.5 L8 4 L0 7.5 z" fill="{theme["line"]}"/>'
        f"</marker></defs>\n{body}\n</svg>\n"
    )


def written(files: dict[Path, str], check: bool) -> int:
    """Writes the files that changed, or only lists them; returns their number."""
    stale = {f: new for f, new in files.items() if not f.exists() or f.read_text(encoding="utf-8") != new}
    for file, new in stale.items():
        print(f"{file.name}: {'out of date' if check else 'written'}")
        if not check:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(new, encoding="utf-8")
    return len(stale)


def files() -> dict[Path, str]:
    """The drawings of this script, by file."""
    return {PICTURES / f"{name}.svg": drawing(theme) for name, theme in THEMES.items()}


if __name__ == "__main__":
    checking = "--check" in sys.argv[1:]
    sys.exit(1 if written(files(), checking) and checking else 0)
