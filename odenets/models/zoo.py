"""The named ResNets and HO-ResNets: configurations of one network, as a table.

An HO-ResNet's default scheme is the one of highest order among euler, midpoint, rk4 and verner8 whose stages divide its
levels; any of the others that fit is one word away, at equal parameters.
"""

from collections.abc import Callable, Mapping
from typing import Any

from .registry import Weights, register_model
from .resnet import HOResNet, ResidualNet, ResNet

_CIFAR = {"widths": (16, 32, 64), "shortcut": "pad", "stem": "conv3", "num_classes": 10}
_BOTTLENECK = {"block": "bottleneck"}
_IMAGENET_HO = {
    "widths": (64, 128, 256, 512),
    "block": "bottleneck",
    "placement": "post",
    "shortcut": "projection",
    "stem": "conv7_pool",
    "num_classes": 1000,
}

RESNETS: dict[str, dict[str, Any]] = {
    # He et al. 2016, section 4.2: 6 n + 2 layers, zero-padded shortcuts.
    "resnet20": {"functions": (3, 3, 3), **_CIFAR},
    "resnet32": {"functions": (5, 5, 5), **_CIFAR},
    "resnet44": {"functions": (7, 7, 7), **_CIFAR},
    "resnet56": {"functions": (9, 9, 9), **_CIFAR},
    "resnet110": {"functions": (18, 18, 18), **_CIFAR},
    # He et al. 2016, arXiv 1603.05027: 9 n + 2 layers.
    "resnet164_preact": {
        **_CIFAR,
        **_BOTTLENECK,
        "functions": (18, 18, 18),
        "placement": "preact",
        "shortcut": "projection",
    },
    "resnet18": {"functions": (2, 2, 2, 2)},
    "resnet34": {"functions": (3, 4, 6, 3)},
    "resnet50": {"functions": (3, 4, 6, 3), **_BOTTLENECK},
    "resnet101": {"functions": (3, 4, 23, 3), **_BOTTLENECK},
    "resnet152": {"functions": (3, 8, 36, 3), **_BOTTLENECK},
}

HO_RESNETS: dict[str, dict[str, Any]] = {
    # CIFAR. The paper's 30 and 58 layers are read as one and two levels of 14 functions.
    "ho_resnet26": {"functions": (4, 4, 4), "scheme": "rk4"},
    "ho_resnet30": {"functions": (14,), "widths": (16,), "scheme": "verner8"},
    "ho_resnet58": {"functions": (14, 14), "widths": (16, 32), "scheme": "verner8"},
    "ho_resnet74": {"functions": (12, 12, 12), "scheme": "rk4"},
    "ho_resnet86": {"functions": (14, 14, 14), "scheme": "verner8"},
    "ho_resnet170_cifar": {"functions": (28, 28, 28), "scheme": "verner8"},
    # ImageNet: bottlenecks, so three layers per function.
    "ho_resnet50": {**_IMAGENET_HO, "functions": (4, 4, 4, 4), "scheme": "rk4"},
    "ho_resnet170": {**_IMAGENET_HO, "functions": (14, 14, 14, 14), "scheme": "verner8"},
}

_URL = "https://download.pytorch.org/models/"
# The name of a file ends in the first eight digits of its SHA-256. Accuracies: torchvision's model page.
_PUBLISHED: dict[str, tuple[tuple[str, str, float], ...]] = {
    "resnet18": (("v1", "f37072fd", 69.758),),
    "resnet34": (("v1", "b627a593", 73.314),),
    "resnet50": (("v2", "11ad3fa6", 80.858), ("v1", "0676ba61", 76.130)),
    "resnet101": (("v2", "cd907fc2", 81.886), ("v1", "63fe2227", 77.374)),
    "resnet152": (("v2", "f82ba261", 82.284), ("v1", "394f9c45", 78.312)),
}


def _register(kind: type[ResidualNet], name: str, config: Mapping[str, Any]) -> Callable[..., ResidualNet]:
    def build(**kwargs: Any) -> ResidualNet:
        return kind(**{**config, **kwargs})

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{kind.__name__} with {dict(config)}; keyword arguments override."
    weights = [Weights(tag, f"{_URL}{name}-{sha}.pth", sha, top1) for tag, sha, top1 in _PUBLISHED.get(name, ())]
    register_model(name=name, weights=weights)(build)
    return build


for _name, _config in RESNETS.items():
    _register(ResNet, _name, _config)
for _name, _config in HO_RESNETS.items():
    _register(HOResNet, _name, _config)
