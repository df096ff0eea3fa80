"""Published key layouts of ResNet and HO-ResNet."""

import re
from collections.abc import Collection

from ...checkpoints import KeyMap
from .layout import Rule, function_key, places_of, renamed

_CONVOLUTION = re.compile(r"layer\d+\.\d+\.conv(\d+)\..+")
_PARTS = {"conv": "conv", "bn": "norm", "0": "conv", "1": "norm"}


def published(own: Collection[str], keys: Collection[str], per_function: int) -> KeyMap | None:
    """Maps torchvision's keys, and those of the CIFAR and HO-ResNet releases, whose blocks hold one or more functions.

    Convolution j of a block belongs to the block's function (j - 1) // c, where a function has c convolutions.
    """
    if "conv1.weight" not in keys or not any(key.startswith("layer1.0.conv1") for key in keys):
        return None
    places = places_of(own)
    # Counted from the keys: HO-ResNet's blocks hold as many functions as their scheme has stages.
    per_block = max((int(m[1]) for key in keys if (m := _CONVOLUTION.fullmatch(key))), default=0) // per_function

    def part(m: re.Match[str]) -> str | None:
        inside, j = divmod(int(m[4]) - 1, per_function)
        rest = f"{_PARTS[m[3]]}{j + 1}.{m[5]}"
        return function_key(places, int(m[1]) - 1, int(m[2]) * per_block + inside, rest)

    rules: dict[str, Rule] = {
        r"conv1\.(.+)": r"stem.conv.\1",
        r"bn1\.(.+)": r"stem.norm.\1",
        r"(?:fc|linear)\.(.+)": r"head.\1",
        r"layer(\d+)\.0\.(?:downsample|shortcut)\.([01])\.(.+)": lambda m: (
            f"levels.{int(m[1]) - 1}.steps.0.gs.0.{_PARTS[m[2]]}.{m[3]}"
        ),
        r"layer(\d+)\.(\d+)\.(conv|bn)(\d+)\.(.+)": part,
    }
    return renamed("torchvision" if per_block == 1 and "fc.weight" in keys else "layers", rules, keys, own)
