"""The named ConvNeXts, DenseNets and RDNets, as tables, and where their published weights lie."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .convnext import ConvNeXt
from .densenet import DenseNet
from .rdnet import RDNet
from .registry import Weights, register_model

_SMALL = {"widths": (96, 192, 384, 768)}
_ISOTROPIC = {"patch": 16, "stem_norm": False}

CONVNEXTS: dict[str, dict[str, Any]] = {
    # Liu et al. 2022, table 9.
    "convnext_tiny": {"functions": (3, 3, 9, 3), **_SMALL},
    "convnext_small": {"functions": (3, 3, 27, 3), **_SMALL},
    "convnext_base": {"functions": (3, 3, 27, 3), "widths": (128, 256, 512, 1024)},
    "convnext_large": {"functions": (3, 3, 27, 3), "widths": (192, 384, 768, 1536)},
    "convnext_xlarge": {"functions": (3, 3, 27, 3), "widths": (256, 512, 1024, 2048)},
    # Section 3.3: one level at stride 16, as a vision transformer has; only the large one was trained with gamma.
    "convnext_isotropic_small": {"functions": (18,), "widths": (384,), "layer_scale": None, **_ISOTROPIC},
    "convnext_isotropic_base": {"functions": (18,), "widths": (768,), "layer_scale": None, **_ISOTROPIC},
    "convnext_isotropic_large": {"functions": (36,), "widths": (1024,), **_ISOTROPIC},
}

_CIFAR = {"stem": "conv3", "num_classes": 10}


def _plain(layers: int, growth: int) -> dict[str, Any]:
    return {"functions": ((layers - 4) // 3,) * 3, "growth": growth, "bottleneck": 0, "compression": 1.0, **_CIFAR}


def _bc(layers: int, growth: int) -> dict[str, Any]:
    return {"functions": ((layers - 4) // 6,) * 3, "growth": growth, **_CIFAR}


DENSENETS: dict[str, dict[str, Any]] = {
    # Huang et al. 2017, table 2. 24 initial channels, as the official code and its ports; the paper's 16 is
    # init_channels=16.
    "densenet40_k12": {**_plain(40, 12), "init_channels": 24},
    "densenet100_k12": {**_plain(100, 12), "init_channels": 24},
    "densenet100_k24": {**_plain(100, 24), "init_channels": 48},
    "densenet_bc100_k12": _bc(100, 12),
    "densenet_bc250_k24": _bc(250, 24),
    "densenet_bc190_k40": _bc(190, 40),
    # "Wide": the official repository's shallow ones.
    "densenet_bc40_k36": _bc(40, 36),
    "densenet_bc40_k48": _bc(40, 48),
    "densenet_bc40_k60": _bc(40, 60),
    # Table 1 (161: the official repository's; 264: table 3).
    "densenet121": {"functions": (6, 12, 24, 16)},
    "densenet161": {"functions": (6, 12, 36, 24), "growth": 48},
    "densenet169": {"functions": (6, 12, 32, 32)},
    "densenet201": {"functions": (6, 12, 48, 32)},
    "densenet264": {"functions": (6, 12, 64, 48)},
}


def _levels(first: int, second: int, middle: int, count: int, last: int, lasts: int) -> dict[str, Any]:
    """Growth per mixing level, and where the resolution is halved: before levels 1 and 2, and before the last ones."""
    growths = (first, second, *(middle,) * count, *(last,) * lasts)
    halves = (False, True, True, *(False,) * (count - 1), True, *(False,) * (lasts - 1))
    return {"growths": growths, "downsample": halves}


RDNETS: dict[str, dict[str, Any]] = {
    # Kim et al. 2024, table A and B, with the released code's growth rates.
    "rdnet_tiny": {"init_channels": 64, **_levels(64, 104, 128, 4, 224, 1)},
    "rdnet_small": {"init_channels": 72, **_levels(64, 128, 128, 7, 240, 2)},
    "rdnet_base": {"init_channels": 120, **_levels(96, 128, 168, 7, 336, 2)},
    "rdnet_large": {"init_channels": 144, **_levels(128, 192, 256, 8, 360, 2)},
}

_URL = "https://download.pytorch.org/models/"
# The name of a file ends in the first eight digits of its SHA-256. Accuracies: torchvision's model page.
_PUBLISHED: dict[str, tuple[str, float]] = {
    "convnext_tiny": ("983f1562", 82.520),
    "convnext_small": ("0c510722", 83.616),
    "convnext_base": ("6075fbad", 84.062),
    "convnext_large": ("ea097f82", 84.414),
    "densenet121": ("a639ec97", 74.434),
    "densenet161": ("8d451a50", 77.138),
    "densenet169": ("b2777c0a", 75.600),
    "densenet201": ("c1103571", 76.896),
}


def _register(kind: Callable[..., nn.Module], name: str, config: Mapping[str, Any]) -> None:
    def build(**kwargs: Any) -> nn.Module:
        return kind(**{**config, **kwargs})

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{kind.__name__} with {dict(config)}; keyword arguments override."
    weights = []
    if name in _PUBLISHED:
        sha, top1 = _PUBLISHED[name]
        weights = [Weights("v1", f"{_URL}{name}-{sha}.pth", sha, top1)]
    register_model(name=name, weights=weights)(build)


for _kind, _table in ((ConvNeXt, CONVNEXTS), (DenseNet, DENSENETS), (RDNet, RDNETS)):
    for _name, _config in _table.items():
        _register(_kind, _name, _config)
