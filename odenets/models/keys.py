"""Helpers for published key layouts: rules that rename, and where a level's residual functions stand."""

import re
from collections.abc import Callable, Collection, Mapping

from ..checkpoints import KeyMap
from . import resnet_keys

Rule = str | Callable[[re.Match[str]], str | None]
Places = Mapping[int, list[tuple[int, int]]]


def renamed(layout: str, rules: Mapping[str, Rule], keys: Collection[str], own: Collection[str]) -> KeyMap:
    """A key map from rules: pattern of a whole key -> template, or a function of the match.

    Keys that no rule knows have no entry, so that ``load`` refuses them under their published names. A published head
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
            if m := pattern.fullmatch(key):
                target = m.expand(rule) if isinstance(rule, str) else rule(m)
                if target is None:
                    break
                names[key] = None if target.startswith("head.") and target not in own else target
                break
    return KeyMap(layout, names)


def function_key(places: Places, level: int, position: int, rest: str) -> str | None:
    """The key of a tensor of a level's residual function, counted through the level; None where there is none."""
    inside = places.get(level, [])
    if position >= len(inside):
        return None
    n, i = inside[position]
    return f"levels.{level}.steps.{n}.fs.{i}.{rest}"


places_of = resnet_keys.places_of
