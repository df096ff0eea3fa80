"""The named reversible networks: configurations of RevNet, i-RevNet, RevCol and the transformers, as tables.

Stochastic depth is off unless asked for; the published rates stand in ``PUBLISHED_DROP_PATH``.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .convnext import ConvNeXt
from .multi_column import MultiColumn
from .registry import register_model
from .revcol import RevCol
from .revcol_vit import RevColViT
from .revnet import IRevNet, RevNet
from .vit import ViT

# Cai et al. 2023, arXiv 2212.11696, table 1 and the released code.
REVCOLS: dict[str, dict[str, Any]] = {
    "revcol_tiny": {"channels": (64, 128, 256, 512), "blocks": (2, 2, 4, 2), "columns": 4},
    "revcol_small": {"channels": (64, 128, 256, 512), "blocks": (2, 2, 4, 2), "columns": 8},
    "revcol_base": {"channels": (72, 144, 288, 576), "blocks": (1, 1, 3, 2), "columns": 16},
    "revcol_large": {"channels": (128, 256, 512, 1024), "blocks": (1, 2, 6, 2), "columns": 8},
    "revcol_xlarge": {"channels": (224, 448, 896, 1792), "blocks": (1, 2, 6, 2), "columns": 8},
    "revcol_huge": {"channels": (360, 720, 1440, 2880), "blocks": (1, 2, 6, 2), "columns": 8, "huge": True},
}

_IMAGENET = {"widths": (128, 128, 256, 512, 832), "block": "bottleneck", "stem": "conv7_pool", "num_classes": 1000}

REVNETS: dict[str, dict[str, Any]] = {
    # Gomez et al. 2017, arXiv 1707.04585, table 2 and the released configurations.
    "revnet38": {"units": (3, 3, 3), "widths": (32, 32, 64, 112)},
    "revnet110": {"units": (9, 9, 9), "widths": (32, 32, 64, 128)},
    "revnet164": {"units": (9, 9, 9), "widths": (32, 32, 64, 128), "block": "bottleneck"},
    "revnet56_imagenet": {"units": (2, 2, 3, 2), **_IMAGENET},
    "revnet104_imagenet": {"units": (2, 2, 11, 2), **_IMAGENET},
}

IREVNETS: dict[str, dict[str, Any]] = {
    # Units and widths as published for CIFAR (Jacobsen et al. 2018, arXiv 1802.07088); see IRevNet.
    "irevnet_cifar": {"units": (18, 18, 18), "width": 32},
}

VITS: dict[str, dict[str, Any]] = {
    # Touvron et al. 2021, arXiv 2012.12877, table 1. ``scheme`` makes high-order twins of equal parameters.
    "vit_tiny_patch16": {"depth": 12, "dim": 192, "heads": 3},
    "vit_small_patch16": {"depth": 12, "dim": 384, "heads": 6},
}

_BASE = {"dim": 384, "heads": 6}

REVCOL_VITS: dict[str, dict[str, Any]] = {
    # Cai et al. 2023, arXiv 2212.11696, appendix. The base one also in other numbers of columns, of 48 blocks in all.
    "revcol_vit_small": {"dim": 224, "heads": 4, "blocks": (2, 2, 2, 2), "columns": 4},
    "revcol_vit_base": {**_BASE, "blocks": (3, 3, 3, 3), "columns": 4},
    "revcol_vit_base_1column": {**_BASE, "blocks": (12, 12, 12, 12), "columns": 1},
    "revcol_vit_base_2columns": {**_BASE, "blocks": (6, 6, 6, 6), "columns": 2},
    "revcol_vit_base_8columns": {**_BASE, "blocks": (1, 2, 2, 1), "columns": 8},
}

# What RevCol's paper compares with, where it gives no details in configurations of our own.
_PYRAMID = {"channels": (64, 128, 256, 512), "blocks": (2, 2, 4, 2), "columns": 4}


def _columns(columns: int, width: int, blocks: tuple[int, ...]) -> dict[str, Any]:
    return {"channels": tuple(width * 2**level for level in range(4)), "blocks": blocks, "columns": columns}


# At about 4.5 GMACs (224 x 224) with 1 to 20 columns; 4 columns are RevCol-T.
COLUMNS: dict[str, dict[str, Any]] = {
    "revcol_1column": _columns(1, 64, (8, 8, 18, 8)),
    "revcol_2columns": _columns(2, 64, (4, 4, 9, 4)),
    "revcol_8columns": _columns(8, 61, (1, 1, 2, 1)),
    "revcol_12columns": _columns(12, 50, (1, 1, 2, 1)),
    "revcol_20columns": _columns(20, 39, (1, 1, 2, 1)),
}
# RevCol-T with larger depthwise kernels; 3 is its own. create_model("revcol_tiny", supervision=True) is the last pair.
KERNELS: dict[str, dict[str, Any]] = {f"revcol_tiny_k{k}": {**_PYRAMID, "kernel_size": k} for k in (5, 7, 11)}

MULTI_COLUMNS: dict[str, dict[str, Any]] = {"multicolumn_tiny": _PYRAMID}
# One column, reversible inside of its levels: ConvNeXt's functions under the scheme of RevNet, two streams wide.
REVERSIBLE_CONVNEXTS: dict[str, dict[str, Any]] = {
    "revconvnext_tiny": {"functions": (6, 6, 18, 6), "widths": (128, 256, 512, 1024), "scheme": "revnet"},
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


_TABLES = (
    (RevNet, REVNETS),
    (IRevNet, IREVNETS),
    (RevCol, REVCOLS),
    (RevCol, COLUMNS),
    (RevCol, KERNELS),
    (MultiColumn, MULTI_COLUMNS),
    (ConvNeXt, REVERSIBLE_CONVNEXTS),
    (ViT, VITS),
    (RevColViT, REVCOL_VITS),
)
for _kind, _table in _TABLES:
    for _name, _config in _table.items():
        _register(_kind, _name, _config)
