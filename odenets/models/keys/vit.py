"""The published key layout of vision transformers."""

import re
from collections.abc import Collection

from ...checkpoints import KeyMap
from .layout import Rule, function_key, places_of, renamed


def published(own: Collection[str], keys: Collection[str]) -> KeyMap | None:
    """Returns the key map of the public ViT layout, whose blocks hold attention and perceptron, or None."""
    if "patch_embed.proj.weight" not in keys:
        return None
    places = places_of(own)

    def part(m: re.Match[str]) -> str | None:
        norm = "norm." if m[2].startswith("norm") else ""
        # A published block is two residual functions here, attention and perceptron, each including its norm.
        return function_key(places, 0, 2 * int(m[1]) + (m[2] in ("norm2", "mlp")), norm + m[3])

    rules: dict[str, Rule] = {
        "cls_token": "stem.class_token",
        "pos_embed": "stem.positions",
        r"patch_embed\.(.+)": r"stem.\1",
        r"blocks\.(\d+)\.(norm1|attn|norm2|mlp)\.(.+)": part,
        # The rest, the last norm and the head, has the same names here.
        r"(.+)": r"\1",
    }
    return renamed("public ViT", rules, keys, own)
