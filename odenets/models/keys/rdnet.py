"""Published key layouts of RDNet: naver-ai, timm."""

from collections.abc import Collection

from ...checkpoints import KeyMap
from .layout import Rule, function_key, places_of, renamed

_MIXER = {"0": "dwconv", "1": "norm", "2": "fc1", "4": "fc2", "5.fc": "gate.fc"}
_TRANSITION = {"0": "norm", "1": "conv"}


def published(own: Collection[str], keys: Collection[str]) -> KeyMap | None:
    """Returns the map of naver-ai's or timm's RDNet layout, or None; sets the head norm's epsilon, which differs."""
    places = places_of(own)
    if not any(key.startswith("dense_stages.0.0.dense_block0.") for key in keys):
        return None
    stem = {"0": "conv", "1": "norm"}
    # The mixers are module 0 of the first stage, and module 2 of the others, after a norm and a convolution.
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
    # naver-ai's stem is nested in another module; otherwise the keys are the same.
    original = "stem.stem.0.weight" in keys
    found = renamed("naver-ai" if original else "timm", rules, keys, own)
    return found._replace(settings={"head_norm.eps": 1e-5 if original else 1e-6})
