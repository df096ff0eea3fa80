"""Helpers for key layouts: renaming rules, the places of a level's residual functions, and the keys of a twin."""

import re
from collections.abc import Callable, Collection, Mapping

from schemes import SchemeError

from ...checkpoints import KeyMap

_SIZE = re.compile(r"levels\.(\d+)\.steps\.\d+\.h")
_OWN = re.compile(r"levels\.(\d+)\.steps\.(\d+)\.fs\.(\d+)\.(.+)")

Rule = str | Callable[[re.Match[str]], str | None]
Places = Mapping[int, list[tuple[int, int]]]


def renamed(layout: str, rules: Mapping[str, Rule], keys: Collection[str], own: Collection[str]) -> KeyMap:
    """Builds a key map from rules: pattern of a whole key -> template, or a function of the match.

    Keys that match no rule have no entry, so that ``load`` rejects them under their published names. A published head
    that the model does not have is dropped.

    Args:
        layout: name of the layout.
        rules: the first pattern that matches a whole key counts.
        keys: the published keys.
        own: the model's keys.
    """
    compiled = [(re.compile(pattern), rule) for pattern, rule in rules.items()]
    names: dict[str, str | None] = {}
    for key in keys:
        for pattern, rule in compiled:
            # The whole key: a pattern that matches the beginning of another key must not rename it.
            if m := pattern.fullmatch(key):
                target = m.expand(rule) if isinstance(rule, str) else rule(m)
                if target is None:
                    break
                # A head that the network does not have is left out on purpose, and reported; any other unknown key is
                # an error.
                names[key] = None if target.startswith("head.") and target not in own else target
                break
    return KeyMap(layout, names)


def places_of(keys: Collection[str]) -> dict[int, list[tuple[int, int]]]:
    """Returns, for each level, the (step, index) of its residual functions, in order."""
    found: dict[int, set[tuple[int, int]]] = {}
    for key in keys:
        if m := _OWN.fullmatch(key):
            found.setdefault(int(m[1]), set()).add((int(m[2]), int(m[3])))
    return {level: sorted(places) for level, places in found.items()}


def function_key(places: Places, level: int, position: int, rest: str) -> str | None:
    """Returns the key of a tensor of a level's residual function, counted through the level, or None."""
    inside = places.get(level, [])
    if position >= len(inside):
        return None
    n, i = inside[position]
    return f"levels.{level}.steps.{n}.fs.{i}.{rest}"


def twin(own: Collection[str], keys: Collection[str]) -> KeyMap | None:
    """Maps the keys of this network under any scheme, with or without a head.

    Raises:
        SchemeError: learned step sizes of other steps than the network's.
    """
    places, given = places_of(own), places_of(keys)
    if not given:
        return None
    _check_sizes(own, keys, places, given)
    names: dict[str, str | None] = {}
    for key in keys:
        names[key] = None if key in ("head.weight", "head.bias") and key not in own else key
        # The n-th function of a level is the same function under any scheme; only its place among steps differs.
        if (m := _OWN.fullmatch(key)) and len(given[int(m[1])]) == len(places.get(int(m[1]), ())):
            level = int(m[1])
            n, i = places[level][given[level].index((int(m[2]), int(m[3])))]
            names[key] = f"levels.{level}.steps.{n}.fs.{i}.{m[4]}"
    return KeyMap("own" if places == given else "own, under another scheme", names)


def _check_sizes(own: Collection[str], keys: Collection[str], places: Places, given: Places) -> None:
    """Refuses learned step sizes where the same functions are grouped into other steps: none is that of a step here."""
    learned = {int(m[1]) for key in own if (m := _SIZE.fullmatch(key))}
    for key in keys:
        if (m := _SIZE.fullmatch(key)) and (level := int(m[1])) in learned:
            a, b = given.get(level, []), places.get(level, [])
            if len(a) == len(b) and a != b:
                raise SchemeError(
                    f"{key} is the learned size of one of {len({n for n, _ in a})} steps, and here the functions of "
                    f"this level make {len({n for n, _ in b})}.\n"
                    "  Build the network with the scheme of the file, or leave all steps.*.h out of what is loaded."
                )
