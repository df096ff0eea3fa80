"""Published key layouts of DenseNet: torchvision (old and new), gpleiss, andreasveit."""

import re
from collections.abc import Collection

from ...checkpoints import KeyMap
from .layout import Rule, function_key, places_of, renamed

_END = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_BN = {"norm": "norm", "bn": "norm", "conv": "conv"}


def published(own: Collection[str], keys: Collection[str]) -> KeyMap | None:
    """Returns the key map of the published DenseNet layout that these keys have, or None."""
    places = places_of(own)

    def part(level: str, position: int, kind: str, number: str, end: str) -> str | None:
        return function_key(places, int(level) - 1, position, f"{_BN[kind]}{number}.{end}")

    if "features.conv0.weight" in keys:
        rules: dict[str, Rule] = {
            rf"features\.(conv|norm)0\.{_END}": r"stem.\1.\2",
            # Files older than torchvision 0.2.1 have norm.1 for norm1.
            rf"features\.denseblock(\d+)\.denselayer(\d+)\.(norm|conv)\.?([12])\.{_END}": lambda m: part(
                m[1], int(m[2]) - 1, m[3], m[4], m[5]
            ),
            rf"features\.transition(\d+)\.(norm|conv)\.{_END}": r"transitions.\1.\2.\3",
            rf"features\.norm(?:5|_final)\.{_END}": r"norm.0.\1",
            r"classifier\.(weight|bias)": r"head.\1",
        }
        old = any(re.search(r"\.norm\.1\.", key) for key in keys)
        layout = "gpleiss" if "features.norm_final.weight" in keys else "torchvision"
        return renamed("torchvision, old" if old else layout, rules, keys, own)
    if "block1.layer.0.bn1.weight" in keys:
        rules = {
            r"conv1\.weight": "stem.conv.weight",
            rf"block(\d+)\.layer\.(\d+)\.(bn|conv)([12])\.{_END}": lambda m: part(m[1], int(m[2]), m[3], m[4], m[5]),
            rf"trans(\d+)\.(bn|conv)1\.{_END}": lambda m: f"transitions.{m[1]}.{_BN[m[2]]}.{m[3]}",
            rf"bn1\.{_END}": r"norm.0.\1",
            r"fc\.(weight|bias)": r"head.\1",
        }
        return renamed("andreasveit", rules, keys, own)
    return None
