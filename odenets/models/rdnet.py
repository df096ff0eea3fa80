"""RDNet: DenseNet with ConvNeXt's residual functions, and a transition after every few of them.

A mixing level is a ``Stack`` of feature mixers over ``dense(growth)``; transitions, most of stride 1, lie between.
Under a one-stream scheme the same mixers add instead of concatenating.

Source: Kim et al. 2024, DenseNets Reloaded: Paradigm Shift Beyond ResNets and ViTs, arXiv 2403.19588.
"""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from torch import nn

from schemes import SchemeError

from ..checkpoints import KeyMap
from ..layers import LayerNorm2d, PatchConv2d, init_kaiming, linear_rates, scaled_width
from ..stack import Stack
from .catalogue import register_variants
from .dense_levels import Widths, schemes_with_growth
from .keys import rdnet as keys_of_rdnet
from .keys.layout import twin
from .level_net import LevelNet
from .levels import mixer, patch_transition, recomputing, steps_that_fit, warned_once


class RDNet(LevelNet):
    """RDNet; the defaults are RDNet-T: 23,863,008 parameters, 5.033 GMACs at 224 x 224.

    Args:
        growths: channels that each mixer of a level adds, per mixing level.
        functions: mixers per level, one number for all or one each.
        downsample: whether the transition before a level halves the resolution, per level; the first has none.
        init_channels: width of the stem.
        kernel: size of the depthwise convolutions.
        expansion: hidden width of a mixer over its input's.
        compression: fraction of the channels that a transition keeps, rounded down to a multiple of 8.
        gate_from: the mixers of this level and all later ones have a channel gate.
        layer_scale: initial value of gamma; None leaves gamma out.
        head_norm_eps: epsilon of the norm before the head, 1e-6 in timm, 1e-5 in the original code.
        scheme: one scheme for all levels, or a list with one per level; "dense" takes the level's growth. Under a
            one-stream scheme a level keeps the width that it starts with under "dense".
        backprop: as in Stack; "checkpoint" recomputes each mixer.
        recompute: keep only the results of depthwise convolutions, and recompute norms, first products and GELUs in the
            backward pass; an integer n restricts this to the first n levels, whose maps take most of the memory.
        head: as in ``HeadNet``; a dropped mixer adds channels of zeros.

    Shapes:
        x: (n, in_chans, h, w); the result is (n, num_classes).

    Raises:
        SchemeError: lists of unequal length, a count that does not fit its scheme, or a wrong option.

    Source:
        Kim et al. 2024, DenseNets Reloaded, arXiv 2403.19588, section 3 and table B; growth rates as released.

    Example:
        >>> import torch
        >>> net = RDNet([8, 16], functions=2, downsample=[False, True], init_channels=16, num_classes=10)
        >>> net(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    depth_group = 3  # as published: a level of three mixers

    # long: an argument per line, of which there are many; the network itself is built in parts
    def __init__(
        self,
        growths: Sequence[int] = (64, 104, 128, 128, 128, 128, 224),
        functions: int | list[int] = 3,
        downsample: Sequence[bool] = (False, True, True, False, False, False, True),
        init_channels: int = 64,
        kernel: int = 7,
        expansion: float = 4,
        compression: float = 0.5,
        gate_from: int = 2,
        layer_scale: float | None = 1e-6,
        head_norm_eps: float = 1e-6,
        scheme: list[str] | str = "dense",
        backprop: str = "store",
        recompute: bool | int = False,
        **head: Any,
    ):
        super().__init__(**head)
        counts = [functions] * len(growths) if isinstance(functions, int) else list(functions)
        if not growths or not len(growths) == len(counts) == len(downsample):
            raise SchemeError(
                f"{len(growths)} growths, {len(counts)} counts of mixers, {len(downsample)} entries of downsample: "
                "want one per level."
            )
        found = schemes_with_growth(scheme, growths)
        rates = iter(linear_rates(self.drop_path_rate, sum(counts)))
        make = partial(mixer, rates=rates, kernel=kernel, expansion=expansion, divisor=8, layer_scale=layer_scale)
        again = recomputing(recompute, len(counts))
        self.stem = nn.Sequential(
            OrderedDict(conv=PatchConv2d(self.in_chans, init_channels, 4), norm=LayerNorm2d(init_channels))
        )
        at, reductions = Widths(init_channels), [4]
        with warned_once():
            for level, (scheme_, count, halve) in enumerate(zip(found, counts, downsample, strict=True)):
                transition: nn.Module = nn.Identity()
                if level:
                    stride = 2 if halve else 1
                    transition = patch_transition(*at.narrowed(scaled_width(at.grown, compression, 8)), stride)
                    reductions.append(reductions[-1] * stride)
                self.transitions.append(transition)
                depth = steps_that_fit(scheme_, count, level + 1)
                of_level = partial(make, gate=level >= gate_from, recompute=again[level])
                self.levels.append(
                    Stack.from_factory(of_level, scheme_, depth, channels=at.width, backprop=backprop),
                )
                at.level(scheme_, count, growths[level], depth)
        self.head_norm = nn.LayerNorm(at.width, eps=head_norm_eps)
        init_kaiming(self, "fan_in", linear=True)
        self.least = reductions[-1]
        self.finish_levels(at.channels, reductions)

    def key_map(self, keys: Collection[str]) -> KeyMap | None:
        """Maps published keys to ours: naver-ai's and timm's, which differ in the head norm's epsilon, or a twin's."""
        own = self.state_dict().keys()
        return keys_of_rdnet.published(own, keys) or twin(own, keys)


def _levels(first: int, second: int, middle: int, count: int, last: int, lasts: int) -> dict[str, Any]:
    """Growth per mixing level, and where the resolution halves: before levels 1 and 2, and before the last ones."""
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

register_variants(RDNet, RDNETS)
