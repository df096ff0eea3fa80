"""ConvNeXt: depthwise convolutions and perceptrons, under any one-stream scheme; under euler it is the published net.

A level is a ``Stack`` of ``ConvNeXtFunction``s; downsampling is a transition of its own before the level, so that a
level of four functions runs under rk4, of two under midpoint, with the same weights.

Source: Liu et al. 2022, A ConvNet for the 2020s, arXiv 2201.03545.
"""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from functools import partial

from torch import nn

from schemes import SchemeError, Slot

from ..checkpoints import KeyMap
from ..layers import ConvNeXtFunction, LayerNorm2d, PatchConv2d, init_truncated, linear_rates
from ..stack import Stack
from . import convnext_keys
from .keys import twin
from .level_net import LevelNet, Pool, check_rates
from .levels import recomputing, schemes_of_levels, steps_that_fit, warned_once


class ConvNeXt(LevelNet):
    """ConvNeXt; the defaults are ConvNeXt-T: 28,589,128 parameters, 4.456 GMACs at 224 x 224.

    One level alone is the isotropic form, with ``patch=16`` and ``stem_norm=False``.

    Args:
        functions: residual functions per level; a multiple of the level's scheme's stages.
        widths: width per level.
        scheme: one scheme for all levels, or a list with one per level.
        kernel: size of the depthwise convolutions.
        expansion: hidden width of a residual function over its width.
        patch: size and stride of the stem's convolution.
        stem_norm: whether LayerNorm follows it.
        layer_scale: initial value of gamma; None leaves gamma out.
        step: step size, as in Stack; a decay counts over the whole network.
        backprop: as in Stack.
        recompute: keep the results of depthwise convolutions alone, and make norms, first products and GELUs again in
            the backward pass; a number: in the first so many levels only.
        num_classes: width of the head; 0 gives features.
        in_chans: channels of the picture.
        global_pool: "avg", "max", or "" for the feature map (without norm and head).
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth at the last residual function, growing from 0 over the depth.
        head_init_scale: factor on a new head; 0.001 for fine-tuning.

    Shapes:
        x: (n, in_chans, h, w); the result is (n, num_classes).

    Raises:
        SchemeError: a level's count does not fit its scheme (the nearest that fit are named), or a wrong option.

    Source:
        Liu et al. 2022, A ConvNet for the 2020s, arXiv 2201.03545, section 2 and table 9; isotropic: section 3.3.

    Example:
        >>> import torch
        >>> net = ConvNeXt([4, 2], [8, 16], scheme=["rk4", "midpoint"], num_classes=10)
        >>> net(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        functions: Sequence[int] = (3, 3, 9, 3),
        widths: Sequence[int] = (96, 192, 384, 768),
        scheme: list[str] | str = "euler",
        kernel: int = 7,
        expansion: float = 4,
        patch: int = 4,
        stem_norm: bool = True,
        layer_scale: float | None = 1e-6,
        step: float | str = 1.0,
        backprop: str = "store",
        recompute: bool | int = False,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: Pool = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        head_init_scale: float = 1.0,
    ):
        super().__init__(drop_rate, head_init_scale)
        if not functions or len(functions) != len(widths):
            raise SchemeError(
                f"{len(functions)} counts of residual functions, {len(widths)} widths: want one per level."
            )
        if kernel % 2 == 0:
            raise SchemeError(f"kernel is {kernel}, want an odd size.")
        check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        found = schemes_of_levels(scheme, len(functions))
        depths = [
            steps_that_fit(s, count, level) for level, (s, count) in enumerate(zip(found, functions, strict=True), 1)
        ]
        rates = iter(linear_rates(drop_path_rate, sum(functions)))
        again = recomputing(recompute, len(functions))

        def make(slot: Slot, again: bool) -> nn.Module:
            if len(slot.in_channels) != 1:
                raise SchemeError(
                    f"a residual function is given {len(slot.in_channels)} arguments; those of ConvNeXt take one."
                )
            return ConvNeXtFunction(
                slot.in_channels[0],
                slot.out_channels,
                kernel=kernel,
                expansion=expansion,
                layer_scale=layer_scale,
                drop_path=next(rates),
                recompute=again,
            )

        self.stem = nn.Sequential(OrderedDict(conv=PatchConv2d(in_chans, widths[0], patch)))
        if stem_norm:
            self.stem.add_module("norm", LayerNorm2d(widths[0]))
        before = 0
        with warned_once():
            for level, (scheme_, depth, width) in enumerate(zip(found, depths, widths, strict=True)):
                transition: nn.Module = nn.Identity()
                if level:
                    last = widths[level - 1]
                    transition = nn.Sequential(
                        OrderedDict(norm=LayerNorm2d(last), conv=PatchConv2d(last, width, 2)),
                    )
                self.transitions.append(transition)
                self.levels.append(
                    Stack.from_factory(
                        partial(make, again=again[level]),
                        scheme_,
                        depth,
                        channels=width,
                        step=step,
                        step_offset=before,
                        backprop=backprop,
                    )
                )
                before += depth
        self.head_norm = nn.LayerNorm(widths[-1], eps=1e-6)
        init_truncated(self)
        self.finish(list(widths), [patch * 2**level for level in range(len(widths))], num_classes, global_pool)

    def init_head(self, head: nn.Linear) -> None:
        init_truncated(head)

    def key_map(self, keys: Collection[str]) -> KeyMap | None:
        """Names of published keys here: facebookresearch's, timm's, torchvision's, or a twin's under another scheme."""
        own = self.state_dict().keys()
        return convnext_keys.published(own, keys) or twin(own, keys)
