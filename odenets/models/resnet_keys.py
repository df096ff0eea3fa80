"""Published key layouts of ResNet and HO-ResNet, and the keys of the same network under another scheme."""

import re
from collections.abc import Collection

from ..checkpoints import KeyMap

_OWN = re.compile(r"levels\.(\d+)\.steps\.(\d+)\.fs\.(\d+)\.(.+)")
_FUNCTION = re.compile(r"layer(\d+)\.(\d+)\.(conv|bn)(\d+)\.(.+)")
_SHORTCUT = re.compile(r"layer(\d+)\.0\.(?:downsample|shortcut)\.([01])\.(.+)")
_WHOLE = {"conv1": "stem.conv", "bn1": "stem.norm", "fc": "head", "linear": "head"}
_PARTS = {"conv": "conv", "bn": "norm", "0": "conv", "1": "norm"}


def places_of(keys: Collection[str]) -> dict[int, list[tuple[int, int]]]:
    """For each level the (step, index) of its residual functions, in order."""
    found: dict[int, set[tuple[int, int]]] = {}
    for key in keys:
        if m := _OWN.fullmatch(key):
            found.setdefault(int(m[1]), set()).add((int(m[2]), int(m[3])))
    return {level: sorted(places) for level, places in found.items()}


def published(own: Collection[str], keys: Collection[str], per_function: int) -> KeyMap | None:
    """torchvision's keys, and those of the CIFAR and HO-ResNet releases, whose blocks hold one function or several.

    Convolution j of a block belongs to the block's function (j - 1) // c, where a function has c convolutions.
    """
    if "conv1.weight" not in keys or not any(key.startswith("layer1.0.conv1") for key in keys):
        return None
    places = places_of(own)
    convolutions = [int(m[4]) for key in keys if (m := _FUNCTION.fullmatch(key)) and m[3] == "conv"]
    per_block = max(convolutions, default=0) // per_function
    names: dict[str, str | None] = {}
    for key in keys:
        head, _, rest = key.partition(".")
        if head in _WHOLE:
            target = f"{_WHOLE[head]}.{rest}"
            # A model without a head leaves the published one out.
            names[key] = None if _WHOLE[head] == "head" and target not in own else target
        elif m := _SHORTCUT.fullmatch(key):
            names[key] = f"levels.{int(m[1]) - 1}.steps.0.gs.0.{_PARTS[m[2]]}.{m[3]}"
        elif m := _FUNCTION.fullmatch(key):
            level, (inside, j) = int(m[1]) - 1, divmod(int(m[4]) - 1, per_function)
            place = int(m[2]) * per_block + inside
            if place < len(places.get(level, ())):
                n, i = places[level][place]
                names[key] = f"levels.{level}.steps.{n}.fs.{i}.{_PARTS[m[3]]}{j + 1}.{m[5]}"
    return KeyMap("torchvision" if per_block == 1 and "fc.weight" in keys else "layers", names)


def twin(own: Collection[str], keys: Collection[str]) -> KeyMap | None:
    """The keys of this network under any scheme, with or without a head."""
    places, given = places_of(own), places_of(keys)
    if not given:
        return None
    names: dict[str, str | None] = {}
    for key in keys:
        names[key] = None if key in ("head.weight", "head.bias") and key not in own else key
        if (m := _OWN.fullmatch(key)) and len(given[int(m[1])]) == len(places.get(int(m[1]), ())):
            level = int(m[1])
            n, i = places[level][given[level].index((int(m[2]), int(m[3])))]
            names[key] = f"levels.{level}.steps.{n}.fs.{i}.{m[4]}"
    return KeyMap("own" if places == given else "own, under another scheme", names)
