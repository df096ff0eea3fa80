"""Draws memory against depth from the table in ``results.md``: ``python docs/memory_figure.py``.

With ``--check`` it only reports drawings that are out of date. The figures were printed by
``experiments/benchmarks/reversible.py``; this script reads them from the page.
"""

import math
import re
import sys
from pathlib import Path

from wiring import PICTURES, THEMES, Canvas, written

from odenets.palette import MODES

TABLE = PICTURES.parent / "results.md"
DEPTHS = (8, 16, 32, 64)
# Rows of the table, their names in the picture, a colour for each background, and a dash pattern.
ROWS = (
    ("stored", "stored, as PyTorch does", MODES["store"], ""),
    ("torch checkpoint, each block", "torch checkpoint, each block", MODES["checkpoint"], "6 4"),
    ("**reverse**", 'backprop="reverse"', MODES["reverse"], ""),
)
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 520, 300, 52, 34, 18, 44


def rows() -> dict[str, list[float]]:
    """Reads the peak MiB at each depth from the page."""
    section = TABLE.read_text(encoding="utf-8").partition("## Reversible backpropagation\n")[2]
    found = {}
    for name, *_ in ROWS:
        cell = re.search(rf"^\| {re.escape(name)} \| ([^|]+) \|", section, re.M)
        assert cell, f"{TABLE.name}: no row {name}"
        text = cell[1].replace("*", "").strip()
        numbers = [float(x) for x in re.findall(r"[\d.]+", text)]
        found[name] = numbers * len(DEPTHS) if text.endswith("at every depth") else numbers
        assert len(found[name]) == len(DEPTHS), (name, text)
    return found


def place(depth: float, mib: float) -> tuple[float, float]:
    """The position of a measurement; both axes are logarithmic."""
    x = LEFT + (math.log2(depth) - 3) / 3 * (WIDTH - LEFT - RIGHT)
    y = HEIGHT - BOTTOM - math.log2(mib / 2) / math.log2(256 / 2) * (HEIGHT - TOP - BOTTOM)
    return round(x, 1), round(y, 1)


def drawing(dark: bool) -> str:
    """Returns the SVG for a light or a dark background."""
    theme = THEMES["wiring_dark" if dark else "wiring"]
    c = Canvas(theme)
    c.text(8, 18, "MiB of one training step, beyond weights and gradients", "line", weight=600, size=14)
    for mib in (2, 8, 32, 128):
        x, y = place(8, mib)
        c.under.append(f'<path d="M{x} {y} H{WIDTH - RIGHT}" stroke="{theme["weak"]}" stroke-width="0.5"/>')
        c.text(x - 8, y + 4, str(mib), "weak", anchor="end", size=13)
    for depth in DEPTHS:
        c.text(place(depth, 2)[0], HEIGHT - 24, str(depth), "weak", anchor="middle", size=13)
    c.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "depth, in blocks", "weak", anchor="middle", size=13)
    for name, said, colours, dash in ROWS:
        colour = colours[dark]
        points = [place(d, m) for d, m in zip(DEPTHS, rows()[name], strict=True)]
        line = " L".join(f"{x} {y}" for x, y in points)
        c.over.append(
            f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dash or "none"}"/>'
        )
        c.over += [f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>' for x, y in points]
        (x, y), (u, v) = points[1], points[2]
        # Next to its own line, where no other line passes.
        at = (x + u) / 2, (y + v) / 2
        c.over.append(
            f'<text x="{at[0] - 8:g}" y="{at[1] - 12:g}" text-anchor="{"end" if y != v else "middle"}" font-size="14" '
            f'fill="{colour}">{said}</text>'
        )
    body = "\n".join(c.under + c.over)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, DejaVu Sans, sans-serif">\n'
        "<title>Memory against depth: it grows where states are stored, and stays where they are made again</title>\n"
        f"{body}\n</svg>\n"
    )


def files() -> dict[Path, str]:
    """The drawings of this script, by file."""
    return {PICTURES / "memory.svg": drawing(False), PICTURES / "memory_dark.svg": drawing(True)}


if __name__ == "__main__":
    checking = "--check" in sys.argv[1:]
    sys.exit(1 if written(files(), checking) and checking else 0)
