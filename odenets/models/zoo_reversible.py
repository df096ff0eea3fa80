"""The named reversible networks: configurations of RevCol, as a table.

Stochastic depth is off unless asked for; the published rates stand in ``PUBLISHED_DROP_PATH``.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .registry import register_model
from .revcol import RevCol

# Cai et al. 2023, arXiv 2212.11696, table 1 and the released code.
REVCOLS: dict[str, dict[str, Any]] = {
    "revcol_tiny": {"channels": (64, 128, 256, 512), "blocks": (2, 2, 4, 2), "columns": 4},
    "revcol_small": {"channels": (64, 128, 256, 512), "blocks": (2, 2, 4, 2), "columns": 8},
    "revcol_base": {"channels": (72, 144, 288, 576), "blocks": (1, 1, 3, 2), "columns": 16},
    "revcol_large": {"channels": (128, 256, 512, 1024), "blocks": (1, 2, 6, 2), "columns": 8},
    "revcol_xlarge": {"channels": (224, 448, 896, 1792), "blocks": (1, 2, 6, 2), "columns": 8},
    "revcol_huge": {"channels": (360, 720, 1440, 2880), "blocks": (1, 2, 6, 2), "columns": 8, "huge": True},
}

PUBLISHED_DROP_PATH = {
    "revcol_tiny": 0.1,
    "revcol_small": 0.3,
    "revcol_base": 0.4,
    "revcol_large": 0.5,
    "revcol_xlarge": 0.5,
    "revcol_huge": 0.5,
}


def _register(kind: type[nn.Module], name: str, config: Mapping[str, Any]) -> Callable[..., nn.Module]:
    def build(**kwargs: Any) -> nn.Module:
        return kind(**{**config, **kwargs})

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{kind.__name__} with {dict(config)}; keyword arguments override."
    register_model(name=name)(build)
    return build


for _name, _config in REVCOLS.items():
    _register(RevCol, _name, _config)
