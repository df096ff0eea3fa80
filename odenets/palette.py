"""One look for each scheme, model and mode in all figures: a colour, a marker, and dashes once colours run out."""

import re
from collections.abc import Sequence
from typing import NamedTuple

# Okabe and Ito 2008, Color Universal Design: distinct for colour-blind readers too; yellow is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*X"
DASHES = ("-", "--", ":", "-.")

# Names take looks in this order: colours first, then the same colours dashed. Appending a name changes no look.
SCHEMES = (
    *("euler", "midpoint", "rk4", "heun2", "dense", "revnet", "verner8"),
    *("leapfrog", "ssprk33", "kutta3", "dopri5", "kutta_nystrom5", "tsit5", "bdia"),
    *("adaptive", "heun3", "rk38", "bosh3", "revcol", "reversible", "dopri8"),
)
MODELS = ("resnet", "revnet", "ho_resnet", "convnext", "densenet", "revcol", "vit", "rdnet", "irevnet", "revcol_vit")
# For drawings in a light and a dark version, whose text has the colour of its line: contrast 4.5 to 1 with the ground.
MODES = {
    "store": ("#c44601", "#f2a15f"),
    "checkpoint": ("#5b6770", "#a9b2ba"),
    "reverse": ("#0072b2", "#56b4e9"),
    "exact": ("#00735a", "#2fbf9a"),
}
# The names by which a study calls the schemes that it compares.
ALIASES = {"add": "euler", "concat": "dense"}


class Look(NamedTuple):
    """How a name is drawn.

    Attributes:
        colour: as ``#rrggbb``.
        marker: matplotlib's letter.
        dash: matplotlib's line style.
    """

    colour: str
    marker: str
    dash: str


def look(place: int) -> Look:
    """Returns the look of a place: 28 differ in colour or dash, and with their markers looks repeat after 56.

    Args:
        place: from 0.
    """
    return Look(
        COLOURS[place % len(COLOURS)],
        MARKERS[place % len(MARKERS)],
        DASHES[place // len(COLOURS) % len(DASHES)],
    )


def looks(names: Sequence[str]) -> dict[str, Look]:
    """Returns the look of each name in a figure: its own if it has one, otherwise the first unused one.

    A name is a mode of backpropagation, a scheme or a model, or contains a scheme or a model: ``reverse``, ``rk4``,
    ``scheme=rk4, step=1.0``, ``ho_resnet26``, ``RevCol-T``. Where two names refer to the same, the first takes its
    look. ``rk4: width`` and ``rk4: rank`` are two quantities of one name: its colour, and a dash for each. So are
    ``scheme=rk4, step=1.0`` and ``scheme=rk4, step=learned``, if that tells all names apart.

    Args:
        names: in the order of the legend.

    Example:
        >>> looks(["rk4", "mine"])["rk4"] == looks(["scheme=euler", "scheme=rk4"])["scheme=rk4"]
        True
    """
    quantities = any(": " in name for name in names)
    split = {name: name.partition(": ")[::2] if quantities else _cell(name) for name in names}
    if quantities or len({subject for subject, _ in split.values()}) < len(split):
        base = looks(list(dict.fromkeys(subject for subject, _ in split.values())))
        order = list(dict.fromkeys(quantity for _, quantity in split.values()))
        both = {n: base[s]._replace(dash=DASHES[order.index(q) % len(DASHES)]) for n, (s, q) in split.items()}
        if quantities or len({(x.colour, x.dash) for x in both.values()}) == len(both):
            return both
    found: dict[str, Look] = {}
    for name in names:
        if name in MODES:
            number = list(MODES).index(name)
            found[name] = Look(MODES[name][0], MARKERS[number], "-")
            continue
        place = _place(name)
        if place is not None and look(place) not in found.values():
            found[name] = look(place)
    free = (look(n) for n in range(len(COLOURS) * len(DASHES)))
    left = [x for x in free if x not in found.values()]
    for i, name in enumerate(name for name in names if name not in found):
        found[name] = left[i % len(left)] if left else look(i)
    return {name: found[name] for name in names}


def _cell(name: str) -> tuple[str, str]:
    """The scheme of a comparison's cell, and what else it says; of other names the name itself."""
    said = re.search(r"scheme=\w+", name)
    return (name, "") if said is None else (said[0], name[: said.start()] + name[said.end() :])


def _place(name: str) -> int | None:
    said = re.search(r"scheme=(\w+)", name) or re.match(r"\w+", name)
    if said is None:
        return None
    word = said[1] if said.lastindex else said[0]
    word = ALIASES.get(word, word)
    # Case matters for schemes: RevCol and DenseNet are models.
    if word in SCHEMES:
        return SCHEMES.index(word)
    word = word.lower()
    model = next((m for m in sorted(MODELS, key=len, reverse=True) if word.startswith(m)), None)
    return None if model is None else MODELS.index(model)
