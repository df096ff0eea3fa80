"""Published key layouts of ConvNeXt: facebookresearch (also isotropic), timm, torchvision."""

from collections.abc import Collection

from ...checkpoints import KeyMap
from .layout import function_key, places_of, renamed

# A residual function's parts in each layout.
OFFICIAL = {"dwconv": "dwconv", "norm": "norm", "pwconv1": "fc1", "pwconv2": "fc2"}
_TIMM = {"conv_dw": "dwconv", "norm": "norm", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}
_TORCHVISION = {"block.0": "dwconv", "block.2": "norm", "block.3": "fc1", "block.5": "fc2"}
_STEM = {"0": "conv", "1": "norm"}
_DOWN = {"0": "norm", "1": "conv"}


# long: a table of four layouts, line by line
def published(own: Collection[str], keys: Collection[str]) -> KeyMap | None:
    """Returns the key map of the published layout that these keys have, or None."""
    places = places_of(own)

    def part(level: int, position: int, name: str, end: str, parts: dict[str, str]) -> str | None:
        rest = f"{parts[name]}.{end}" if name in parts else "gamma"
        return function_key(places, level, position, rest)

    if "downsample_layers.0.0.weight" in keys:
        rules = {
            r"downsample_layers\.0\.([01])\.(weight|bias)": lambda m: f"stem.{_STEM[m[1]]}.{m[2]}",
            r"downsample_layers\.([123])\.([01])\.(weight|bias)": lambda m: f"transitions.{m[1]}.{_DOWN[m[2]]}.{m[3]}",
            r"stages\.(\d+)\.(\d+)\.(gamma|dwconv|norm|pwconv[12])(?:\.(weight|bias))?": lambda m: part(
                int(m[1]), int(m[2]), m[3], m[4], OFFICIAL
            ),
            r"norm\.(weight|bias)": r"head_norm.\1",
            r"head\.(weight|bias)": r"head.\1",
        }
        return renamed("facebookresearch", rules, keys, own)
    if "stages.0.blocks.0.conv_dw.weight" in keys:
        rules = {
            r"stem\.([01])\.(weight|bias)": lambda m: f"stem.{_STEM[m[1]]}.{m[2]}",
            r"stages\.(\d+)\.downsample\.([01])\.(weight|bias)": lambda m: f"transitions.{m[1]}.{_DOWN[m[2]]}.{m[3]}",
            r"stages\.(\d+)\.blocks\.(\d+)\.(gamma|conv_dw|norm|mlp\.fc[12])(?:\.(weight|bias))?": lambda m: part(
                int(m[1]), int(m[2]), m[3], m[4], _TIMM
            ),
            r"head\.norm\.(weight|bias)": r"head_norm.\1",
            r"head\.fc\.(weight|bias)": r"head.\1",
        }
        return renamed("timm", rules, keys, own)
    # torchvision numbers stages and downsampling in one list, by odd and by even numbers.
    if "features.1.0.layer_scale" in keys:
        rules = {
            r"features\.0\.([01])\.(weight|bias)": lambda m: f"stem.{_STEM[m[1]]}.{m[2]}",
            r"features\.([246])\.([01])\.(weight|bias)": lambda m: f"transitions.{int(m[1]) // 2}.{_DOWN[m[2]]}.{m[3]}",
            r"features\.([1357])\.(\d+)\.(layer_scale|block\.[0235])(?:\.(weight|bias))?": lambda m: part(
                int(m[1]) // 2, int(m[2]), m[3], m[4], _TORCHVISION
            ),
            r"classifier\.0\.(weight|bias)": r"head_norm.\1",
            r"classifier\.2\.(weight|bias)": r"head.\1",
        }
        return renamed("torchvision", rules, keys, own)
    if "blocks.0.dwconv.weight" in keys and "stem.weight" in keys:
        rules = {
            r"stem\.(weight|bias)": r"stem.conv.\1",
            r"blocks\.(\d+)\.(gamma|dwconv|norm|pwconv[12])(?:\.(weight|bias))?": lambda m: part(
                0, int(m[1]), m[2], m[3], OFFICIAL
            ),
            r"norm\.(weight|bias)": r"head_norm.\1",
            r"head\.(weight|bias)": r"head.\1",
        }
        return renamed("facebookresearch isotropic", rules, keys, own)
    return None
