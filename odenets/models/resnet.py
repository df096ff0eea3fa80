"""ResNet and HO-ResNet: one network of levels, whose residual functions any one-stream scheme puts together.

A level is a ``Stack``; its first step downsamples. Three placements of activation and norm around the same scheme:

* ``post``: F = conv-BN-ReLU-...-BN, ReLU on the sum. With euler this is the ResNet of torchvision, key for key.
* ``public``: F = BN-ReLU-conv-BN-ReLU-conv, ReLU on the sum, no norm before the head: HO-ResNet as it was released.
* ``preact``: the same F, nothing on the sum, one BN-ReLU before the head: the stream is a plain sum of functions.

Sources: He et al., arXiv 1512.03385 and 1603.05027; Luo et al., HO-ResNet, arXiv 2103.15244.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from typing import Literal, get_args

from torch import Tensor, nn

from schemes import Scheme, SchemeError, Slot

from ..checkpoints import KeyMap
from ..layers import BasicFunction, BottleneckFunction, PadShortcut, Projection, init_kaiming, linear_rates
from ..stack import Stack
from . import resnet_keys
from .head import HeadNet, Pool
from .keys import twin
from .levels import schemes_of_levels, steps_that_fit, warned_once

Block = Literal["basic", "bottleneck"]
Placement = Literal["post", "public", "preact"]
Shortcut = Literal["projection", "pad"]
Stem = Literal["conv3", "conv3_s2", "conv7_pool"]

FUNCTIONS = {"basic": BasicFunction, "bottleneck": BottleneckFunction}
REDUCTION = {"conv3": 1, "conv3_s2": 2, "conv7_pool": 4}


class ResidualNet(HeadNet):
    """The network behind ``ResNet`` and ``HOResNet``, which differ in their defaults alone: stem, levels, norm, head.

    State-dict keys: ``stem.{conv,norm}``, ``levels.{l}.steps.{n}.fs.{i}.{conv,norm}{1..3}``,
    ``levels.{l}.steps.0.gs.0.{conv,norm}``, ``norm`` (preact), ``head``.

    Args:
        functions: residual functions per level; a multiple of the level's scheme's stages.
        widths: width per level, before the block's expansion.
        block: "basic" (two 3x3 convolutions) or "bottleneck" (1x1, 3x3, 1x1, four times wider).
        scheme: one scheme for all levels, or a list with one per level.
        placement: "post", "public" or "preact"; see the module's head.
        shortcut: "projection" (1x1 convolution) or "pad" (zeros, no parameters), where stride or width change.
        stem: "conv3", "conv3_s2" (stride 2) or "conv7_pool" (stride 2, then a max pool of stride 2).
        step: step size, as in Stack; a decay counts over the whole network.
        backprop: as in Stack.
        num_classes: width of the head; 0 gives features.
        in_chans: channels of the picture.
        global_pool: "avg", "max", or "" for the feature map (without a head).
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth at the last residual function, growing from 0 over the depth.

    Shapes:
        x: (n, in_chans, h, w); the result is (n, num_classes), without a head (n, c), without pooling (n, c, h', w').

    Raises:
        SchemeError: a level's count does not fit its scheme (the nearest that fit are named), or a wrong option.
    """

    def __init__(
        self,
        functions: Sequence[int],
        widths: Sequence[int],
        block: Block,
        scheme: str | Sequence[str],
        placement: Placement,
        shortcut: Shortcut,
        stem: Stem,
        step: float | str,
        backprop: str,
        num_classes: int,
        in_chans: int,
        global_pool: Pool,
        drop_rate: float,
        drop_path_rate: float,
    ):
        super().__init__()
        for what, value, known in (
            ("block", block, Block),
            ("placement", placement, Placement),
            ("shortcut", shortcut, Shortcut),
            ("stem", stem, Stem),
        ):
            if value not in get_args(known):
                raise SchemeError(f"{what} is {value!r}, want {' or '.join(get_args(known))}.")
        if not functions or len(functions) != len(widths):
            raise SchemeError(
                f"{len(functions)} counts of residual functions, {len(widths)} widths: want one per level."
            )
        if not 0 <= drop_rate < 1 or not 0 <= drop_path_rate < 1:
            raise SchemeError(f"drop_rate is {drop_rate}, drop_path_rate {drop_path_rate}: want 0 <= rate < 1.")
        found = schemes_of_levels(scheme, len(functions))
        depths = [
            steps_that_fit(s, count, level) for level, (s, count) in enumerate(zip(found, functions, strict=True), 1)
        ]

        self.block, self.placement, self.shortcut = block, placement, shortcut
        self.stem = _stem(stem, in_chans, widths[0], norm=placement != "preact" or stem == "conv7_pool")
        rates = iter(linear_rates(drop_path_rate, sum(functions)))
        channels = [widths[0], *(w * FUNCTIONS[block].expansion for w in widths)]
        self.levels = nn.Sequential()
        with warned_once():
            before = 0
            for level, (scheme_, depth, (width, out)) in enumerate(zip(found, depths, pairwise(channels), strict=True)):
                stride = 1 if level == 0 else 2
                self.levels.append(self._level(scheme_, depth, width, out, stride, rates, step, before, backprop))
                before += depth
        last = channels[-1]
        preact = placement == "preact"
        self.norm = nn.Sequential(nn.BatchNorm2d(last), nn.ReLU(inplace=True)) if preact else nn.Identity()
        self.num_features = self.head_hidden_size = last
        self.drop_rate = drop_rate
        self.feature_info = [
            {"num_chs": c, "reduction": REDUCTION[stem] * 2**level, "module": f"levels.{level}"}
            for level, c in enumerate(channels[1:])
        ]
        self.reset_classifier(num_classes, global_pool)
        published = stem == "conv7_pool"
        init_kaiming(self, "fan_out" if published else "fan_in", linear=not published)

    def _level(
        self,
        scheme: Scheme,
        depth: int,
        width: int,
        out: int,
        stride: int,
        rates: Iterator[float],
        step: float | str,
        before: int,
        backprop: str,
    ) -> Stack:
        order = "post" if self.placement == "post" else "pre"

        def make(slot: Slot) -> nn.Module:
            if len(slot.in_channels) != 1:
                raise SchemeError(
                    f"{scheme} gives a residual function {len(slot.in_channels)} arguments; those of a ResNet take one."
                )
            # Only a function that sees the step's input itself has the stride to make; the others come after it.
            own = stride if slot.step == 0 and slot.raw else 1
            build = FUNCTIONS[self.block]
            return build(slot.in_channels[0], slot.out_channels, own, order=order, drop_path=next(rates))

        shortcut = None
        if stride > 1 or width != out:
            if self.shortcut == "pad":
                shortcut = PadShortcut(width, out, stride)
            else:
                shortcut = Projection(width, out, stride, norm=self.placement != "preact")
        # A step of one stream ends in a new sum, which its ReLU may overwrite; several streams may share tensors.
        after = None if self.placement == "preact" else nn.ReLU(inplace=scheme.streams == 1)
        return Stack.from_factory(
            make,
            scheme,
            depth,
            channels=width,
            out_channels=None if width == out else out,
            shortcut=shortcut,
            step=step,
            step_offset=before,
            post_step=after,
            backprop=backprop,
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """The last level's map, normalised where the placement asks for it: (n, num_features, h', w')."""
        return self.norm(self.levels(self.stem(x)))

    def maps(self, x: Tensor) -> list[Tensor]:
        """The map after each level."""
        x = self.stem(x)
        found = []
        for level in self.levels:
            x = level(x)
            found.append(x)
        return found

    def key_map(self, keys: Collection[str]) -> KeyMap | None:
        """Names of published keys here: torchvision's, the CIFAR and HO-ResNet releases', or a twin's.

        A twin is this network under another scheme: the same residual functions, grouped into other steps.
        """
        own = self.state_dict().keys()
        return resnet_keys.published(own, keys, FUNCTIONS[self.block].convolutions) or twin(own, keys)


class ResNet(ResidualNet):
    """ResNet: post-activated, euler and projections by default; every level takes any one-stream scheme.

    The defaults are ResNet-18 for ImageNet: 11,689,512 parameters, 1.814 GMACs at 224 x 224.

    Args:
        functions: residual functions per level; a multiple of the level's scheme's stages.
        widths: width per level, before the block's expansion.
        block: "basic" (two 3x3 convolutions) or "bottleneck" (1x1, 3x3, 1x1, four times wider).
        scheme: one scheme for all levels, or a list with one per level.
        placement: "post" (ReLU on the sum), "public" (pre-activated functions and ReLU on the sum), "preact".
        shortcut: "projection" or "pad", where stride or width change.
        stem: "conv3", "conv3_s2" or "conv7_pool".
        step: step size, as in Stack; a decay counts over the whole network.
        backprop: as in Stack.
        num_classes: width of the head; 0 gives features.
        in_chans: channels of the picture.
        global_pool: "avg", "max", or "" for the feature map (without a head).
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth at the last residual function, growing from 0 over the depth.

    Shapes:
        x: (n, in_chans, h, w); the result is (n, num_classes).

    Raises:
        SchemeError: a level's count does not fit its scheme (the nearest that fit are named), or a wrong option.

    Source:
        He et al. 2016, Deep Residual Learning for Image Recognition, arXiv 1512.03385, table 1 and section 4.2.

    Example:
        >>> import torch
        >>> net = ResNet([4, 4], [8, 16], scheme=["rk4", "midpoint"], stem="conv3", num_classes=10)
        >>> net(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        functions: Sequence[int] = (2, 2, 2, 2),
        widths: Sequence[int] = (64, 128, 256, 512),
        block: Block = "basic",
        scheme: list[str] | str = "euler",
        placement: Placement = "post",
        shortcut: Shortcut = "projection",
        stem: Stem = "conv7_pool",
        step: float | str = 1.0,
        backprop: str = "store",
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: Pool = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__(
            functions, widths, block, scheme, placement, shortcut, stem, step, backprop, num_classes, in_chans,
            global_pool, drop_rate, drop_path_rate,
        )  # fmt: skip


class HOResNet(ResidualNet):
    """HO-ResNet: the residual functions of a ResNet under a high-order scheme, as it was released for CIFAR.

    The defaults are the 26-layer net: four functions per level, 366,842 parameters under euler, midpoint and rk4 alike.
    With 12 per level it has 74 layers, with 14 (verner8) 86, with 28 170.

    Args:
        functions: residual functions per level; a multiple of the level's scheme's stages.
        widths: width per level, before the block's expansion.
        block: "basic" (two 3x3 convolutions) or "bottleneck" (1x1, 3x3, 1x1, four times wider).
        scheme: one scheme for all levels, or a list with one per level.
        placement: "public" (pre-activated functions and ReLU on the sum), "preact" (nothing on the sum), "post".
        shortcut: "pad" or "projection", where stride or width change.
        stem: "conv3_s2" (as released), "conv3" (four times the pixels) or "conv7_pool".
        step: step size, as in Stack; a decay counts over the whole network.
        backprop: as in Stack.
        num_classes: width of the head; 0 gives features.
        in_chans: channels of the picture.
        global_pool: "avg", "max", or "" for the feature map (without a head).
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth at the last residual function, growing from 0 over the depth.

    Shapes:
        x: (n, in_chans, h, w); the result is (n, num_classes).

    Raises:
        SchemeError: a level's count does not fit its scheme (the nearest that fit are named), or a wrong option.

    Source:
        Luo et al. 2021, Rethinking ResNets: Improved Stacking Strategies With High Order Schemes, arXiv 2103.15244.

    Example:
        >>> import torch
        >>> HOResNet(scheme="midpoint")(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        functions: Sequence[int] = (4, 4, 4),
        widths: Sequence[int] = (16, 32, 64),
        block: Block = "basic",
        scheme: list[str] | str = "rk4",
        placement: Placement = "public",
        shortcut: Shortcut = "pad",
        stem: Stem = "conv3_s2",
        step: float | str = 1.0,
        backprop: str = "store",
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: Pool = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__(
            functions, widths, block, scheme, placement, shortcut, stem, step, backprop, num_classes, in_chans,
            global_pool, drop_rate, drop_path_rate,
        )  # fmt: skip


def _stem(kind: Stem, in_chans: int, width: int, norm: bool) -> nn.Sequential:
    stem = nn.Sequential()
    if kind == "conv7_pool":
        stem.add_module("conv", nn.Conv2d(in_chans, width, 7, 2, 3, bias=False))
    else:
        stem.add_module("conv", nn.Conv2d(in_chans, width, 3, REDUCTION[kind], 1, bias=False))
    if norm:
        stem.add_module("norm", nn.BatchNorm2d(width))
        stem.add_module("act", nn.ReLU(inplace=True))
    if kind == "conv7_pool":
        stem.add_module("pool", nn.MaxPool2d(3, 2, 1))
    return stem
