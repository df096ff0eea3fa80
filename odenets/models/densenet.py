"""DenseNet: every residual function reads all earlier outputs of its level; under ``dense`` it is the published net.

A level is a ``Stack`` over the scheme ``dense(growth)``, whose state grows by one stream per step. Under a one-stream
scheme the same functions add to one stream of constant width: concatenation versus addition, one word apart.

Source: Huang et al. 2017, Densely Connected Convolutional Networks, arXiv 1608.06993.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from schemes import SchemeError, Slot

from ..checkpoints import KeyMap
from ..layers import DenseFunction, DenseTransition, init_kaiming, linear_rates, scaled_width
from ..stack import Stack
from ..tracing import is_traced
from .catalogue import register_variants, torchvision_weights
from .dense_levels import Widths, schemes_with_growth
from .head import check_choices, check_rates
from .keys import densenet as keys_of_densenet
from .keys.layout import twin
from .level_net import LevelNet
from .levels import recomputing, steps_that_fit, warned_once

Stem = Literal["conv3", "conv7_pool"]


class DenseNet(LevelNet):
    """DenseNet and DenseNet-BC; the defaults are DenseNet-121: 7,978,856 parameters, 2.834 GMACs at 224 x 224.

    Args:
        functions: residual functions per level.
        growth: channels that each of them adds.
        init_channels: width of the stem; None means twice the growth.
        bottleneck: width of the 1x1 convolution over the growth; 0 leaves the convolution out.
        compression: fraction of the channels that a transition keeps.
        scheme: one scheme for all levels, or a list with one per level; "dense" takes the growth. Under a one-stream
            scheme a level keeps the width that it starts with under "dense".
        stem: "conv3" (CIFAR) or "conv7_pool" (ImageNet).
        backprop: as in Stack; "checkpoint" keeps only the streams, and recomputes each function.
        recompute: keep only the results of convolutions, and recompute joined streams, norms and ReLUs in the backward
            pass; an integer n restricts this to the first n levels.
        drop_rate: dropout after every convolution but the stem's; the paper's 0.2 is for training without augmentation.
        drop_path_rate: stochastic depth, growing over the depth to this rate: a dropped sample's new channels are zero,
            and the channels before them are unchanged.
        layer_scale: initial value of gamma, a factor per new channel; None leaves gamma out.
        head: as in ``HeadNet``.

    Shapes:
        x: (n, in_chans, h, w); the result is (n, num_classes).

    Raises:
        SchemeError: a level's count does not fit its scheme, or a wrong option.

    Source:
        Huang et al. 2017, Densely Connected Convolutional Networks, arXiv 1608.06993, table 1 and section 4.2.

    Example:
        >>> import torch
        >>> net = DenseNet([2, 2], growth=4, stem="conv3", num_classes=10)
        >>> net(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """

    # long: an argument a line
    def __init__(
        self,
        functions: Sequence[int] = (6, 12, 24, 16),
        growth: int = 32,
        init_channels: int | None = None,
        bottleneck: int = 4,
        compression: float = 0.5,
        scheme: list[str] | str = "dense",
        stem: Stem = "conv7_pool",
        backprop: str = "store",
        recompute: bool | int = False,
        drop_rate: float = 0.0,
        layer_scale: float | None = None,
        **head: Any,
    ):
        # The paper's dropout follows the convolutions; the head has none.
        super().__init__(**head)
        _check(functions, compression, stem, drop_rate)
        found = schemes_with_growth(scheme, [growth] * len(functions))
        again = recomputing(recompute, len(functions))
        rates = iter(linear_rates(self.drop_path_rate, sum(functions)))
        make = partial(_function, rates, bottleneck=bottleneck, drop_rate=drop_rate, layer_scale=layer_scale)
        at = Widths(2 * growth if init_channels is None else init_channels)
        self.stem = _stem(stem, self.in_chans, at.width)
        with warned_once():
            for level, (scheme_, count) in enumerate(zip(found, functions, strict=True)):
                transition: nn.Module = nn.Identity()
                if level:
                    # Rounded down, as published: compression 1/2 of an odd width.
                    transition = DenseTransition(*at.narrowed(scaled_width(at.grown, compression)), drop_rate=drop_rate)
                self.transitions.append(transition)
                depth = steps_that_fit(scheme_, count, level + 1)
                of_level = partial(make, recompute=again[level])
                self.levels.append(
                    Stack.from_factory(of_level, scheme_, depth, channels=at.width, backprop=backprop),
                )
                at.level(scheme_, count, growth, depth)
        self.norm = nn.Sequential(nn.BatchNorm2d(at.width), nn.ReLU(inplace=True))
        # The official code initialises by fan-out, torchvision's ImageNet models by fan-in.
        init_kaiming(self, "fan_in" if stem == "conv7_pool" else "fan_out")
        reduction = 4 if stem == "conv7_pool" else 1
        reductions = [reduction * 2**level for level in range(len(functions))]
        # The stem of stride 4 rounds up, the transitions round down.
        self.least = reductions[-1] - reduction + 1
        self.finish_levels(at.channels, reductions)

    def key_map(self, keys: Collection[str]) -> KeyMap | None:
        """Maps published keys to ours: torchvision's (old and new), gpleiss's, andreasveit's, or a twin's."""
        own = self.state_dict().keys()
        return keys_of_densenet.published(own, keys) or twin(own, keys)


def _check(functions: Sequence[int], compression: float, stem: str, drop_rate: float) -> None:
    check_choices(stem=(stem, Stem))
    if not functions:
        raise SchemeError("no counts of residual functions: want one per level.")
    if not 0 < compression <= 1:
        raise SchemeError(f"compression is {compression}, want 0 < compression <= 1.")
    check_rates(drop_rate=drop_rate)


def _function(rates: Iterator[float], slot: Slot, **options: Any) -> nn.Module:
    return DenseFunction(sum(slot.in_channels), slot.out_channels, drop_path=next(rates), **options)


class _ChannelsLast(nn.Module):
    """Switches to channels-last memory on a CPU, which makes a training step faster.

    Not under a compiler, which generates slower code for it.
    """

    def forward(self, x: Tensor) -> Tensor:
        if is_traced(x) or x.device.type != "cpu" or torch.compiler.is_compiling():
            return x
        return x.contiguous(memory_format=torch.channels_last)


def _stem(kind: Stem, in_chans: int, width: int) -> nn.Sequential:
    if kind == "conv3":
        conv = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        return nn.Sequential(OrderedDict(layout=_ChannelsLast(), conv=conv))
    return nn.Sequential(
        OrderedDict(
            layout=_ChannelsLast(),
            conv=nn.Conv2d(in_chans, width, 7, 2, 3, bias=False),
            norm=nn.BatchNorm2d(width),
            # Max pooling and ReLU commute, in values and in gradients.
            pool=nn.MaxPool2d(3, 2, 1),
            act=nn.ReLU(inplace=True),
        )
    )


_CIFAR = {"stem": "conv3", "num_classes": 10}


def _plain(layers: int, growth: int) -> dict[str, Any]:
    return {"functions": ((layers - 4) // 3,) * 3, "growth": growth, "bottleneck": 0, "compression": 1.0, **_CIFAR}


def _bc(layers: int, growth: int) -> dict[str, Any]:
    return {"functions": ((layers - 4) // 6,) * 3, "growth": growth, **_CIFAR}


DENSENETS: dict[str, dict[str, Any]] = {
    # Huang et al. 2017, table 2. 24 initial channels, as in the official code and its ports; the paper's 16 is
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

_PUBLISHED: dict[str, tuple[str, float]] = {
    "densenet121": ("a639ec97", 74.434),
    "densenet161": ("8d451a50", 77.138),
    "densenet169": ("b2777c0a", 75.600),
    "densenet201": ("c1103571", 76.896),
}
_WEIGHTS = {name: [torchvision_weights(name, "v1", *row)] for name, row in _PUBLISHED.items()}

register_variants(DenseNet, DENSENETS, _WEIGHTS)
