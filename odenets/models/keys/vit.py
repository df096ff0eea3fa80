"""The published key layout of vision transformers."""

import re
from collections.abc import Collection

from ...checkpoints import KeyMap
from .layout import Rule, function_key, places_of, renamed


def published(own: Collection[str], keys: Collection[str]) -> KeyMap | None:
    """The map of the public ViT layout, whose blocks hold attention and perceptron, or None."""
    if "patch_embed.proj.weight" not in keys:
        return None
    places = places_of(own)

    def part(m: re.Match[str]) -> str | None:
        norm = "norm." if m[2].startswith("norm") else ""
        # A published block is two residual functions here, attention and perceptron, each with the norm before it.
        return function_key(places, 0, 2 * int(m[1]) + (m[2] in ("norm2", "mlp")), norm + m[3])

    rules: dict[str, Rule] = {
        "cls_token": "stem.class_token",
        "pos_embed": "stem.positions",
        r"patch_embed\.(.+)": r"stem.\1",
        r"blocks\.(\d+)\.(norm1|attn|norm2|mlp)\.(.+)": part,
        # What is left, the last norm and the head, is called the same here.
        r"(.+)": r"\1",
    }
    return renamed("public ViT", rules, keys, own)
