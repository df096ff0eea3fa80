"""Published key layouts of DenseNet (torchvision, gpleiss, andreasveit) and RDNet (naver-ai, timm)."""

import re
from collections.abc import Collection

from ..checkpoints import KeyMap
from .keys import Rule, function_key, places_of, renamed

_END = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_BN = {"norm": "norm", "bn": "norm", "conv": "conv"}
_MIXER = {"0": "dwconv", "1": "norm", "2": "fc1", "4": "fc2", "5.fc": "gate.fc"}
_TRANSITION = {"0": "norm", "1": "conv"}


def densenet(own: Collection[str], keys: Collection[str]) -> KeyMap | None:
    """The map of whichever published DenseNet layout these keys have, or None."""
    places = places_of(own)

    def part(level: str, position: int, kind: str, number: str, end: str) -> str | None:
        return function_key(places, int(level) - 1, position, f"{_BN[kind]}{number}.{end}")

    if "features.conv0.weight" in keys:
        rules: dict[str, Rule] = {
            rf"features\.(conv|norm)0\.{_END}": r"stem.\1.\2",
            # Files older than torchvision 0.2.1 say norm.1 for norm1.
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


def rdnet(own: Collection[str], keys: Collection[str]) -> KeyMap | None:
    """The map of naver-ai's or timm's RDNet layout, or None; sets the epsilon of the head's norm, which differs."""
    places = places_of(own)
    if not any(key.startswith("dense_stages.0.0.dense_block0.") for key in keys):
        return None
    stem = {"0": "conv", "1": "norm"}
    block = r"dense_stages\.(\d+)\.[02]\.dense_block(\d+)\."
    rules: dict[str, Rule] = {
        r"stem\.(?:stem\.)?([01])\.(weight|bias)": lambda m: f"stem.{stem[m[1]]}.{m[2]}",
        block + "gamma": lambda m: function_key(places, int(m[1]), int(m[2]), "gamma"),
        block + r"layers\.layers\.([0124]|5\.fc)\.(weight|bias)": lambda m: function_key(
            places, int(m[1]), int(m[2]), f"{_MIXER[m[3]]}.{m[4]}"
        ),
        r"dense_stages\.(\d+)\.([01])\.(weight|bias)": lambda m: f"transitions.{m[1]}.{_TRANSITION[m[2]]}.{m[3]}",
        r"head\.norm\.(weight|bias)": r"head_norm.\1",
        r"head\.fc\.(weight|bias)": r"head.\1",
    }
    original = "stem.stem.0.weight" in keys
    found = renamed("naver-ai" if original else "timm", rules, keys, own)
    return found._replace(settings={"head_norm.eps": 1e-5 if original else 1e-6})
