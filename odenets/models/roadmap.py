"""Two published roadmaps, each step a network: from ResNet to ConvNeXt, and from DenseNet to RDNet.

``convnext("widen")`` builds the step at which the channels grow, ``rdnet("d")`` the one with the larger middle. Every
step is a configuration, and differs from the step before by what the paper changes there.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import nn

from schemes import SchemeError, Slot

from ..layers import LayerNorm2d, ModernFunction, Projection, init_kaiming, linear_rates, make_act, make_norm
from ..stack import Stack
from .dense_levels import Widths, schemes_with_growth
from .densenet import DenseNet
from .level_net import LevelNet
from .levels import mixer, schemes_of_levels, steps_that_fit, takes_shortcut
from .rdnet import RDNet


@dataclass(frozen=True)
class Design:
    """One step between ResNet and ConvNeXt; see ``ModernFunction`` for the switches of the residual function.

    Args:
        depthwise: whether the spatial convolution is depthwise.
        inverted: whether the middle of the residual function is its widest part.
        dw_first: whether the depthwise convolution comes first.
        kernel: size of the spatial convolution.
        act: the activation.
        one_act: whether there is a single activation.
        one_norm: whether there is a single norm.
        norm: the kind of norm.

    Attributes:
        functions: residual functions per level.
        width: width of the stem.
        patch: whether the stem is a 4 x 4 convolution of stride 4 rather than 7 x 7 of stride 2 with pooling.
        separate: whether a norm and a 2 x 2 convolution of stride 2 lie between the levels.
    """

    functions: tuple[int, ...]
    width: int = 64
    patch: bool = False
    depthwise: bool = False
    inverted: bool = False
    dw_first: bool = False
    kernel: int = 3
    act: Literal["relu", "gelu"] = "relu"
    one_act: bool = False
    one_norm: bool = False
    norm: Literal["batch", "layer"] = "batch"
    separate: bool = False


class RoadmapStep(NamedTuple):
    """A step of a roadmap: its name, its network, and its published figures.

    Attributes:
        name: short name.
        design: the configuration.
        gflops: published multiply-adds, in 10^9; None where none were published.
        top1: published accuracy on ImageNet, in per cent.
    """

    name: str
    design: Any
    gflops: float | None
    top1: float


# What each step changes, in order; the kernel sizes 9 and 11 are tried and abandoned.
_CHANGES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("patchify", {"patch": True}),
    ("depthwise", {"depthwise": True}),
    ("widen", {}),
    ("invert", {"inverted": True}),
    ("move_up", {"dw_first": True}),
    ("kernel5", {"kernel": 5}),
    ("kernel7", {"kernel": 7}),
    ("kernel9", {"kernel": 9}),
    ("kernel11", {"kernel": 11}),
    ("gelu", {"act": "gelu", "kernel": 7}),
    ("fewer_activations", {"one_act": True}),
    ("fewer_norms", {"one_norm": True}),
    ("layer_norm", {"norm": "layer"}),
    ("separate", {"separate": True}),
)
_RESNET50 = (
    (4.09, 4.09, 4.53, 4.42, 2.35, 5.27, 4.64, 4.07, 4.10, 4.15, 4.21, 4.29, 4.15, 4.15, 4.15, 4.46, 4.49),
    (76.13, 78.82, 79.36, 79.51, 78.28, 80.50, 80.64, 79.92, 80.35, 80.57, 80.57, 80.47, 80.62, 81.27, 81.41, 81.47,
     81.97),
)  # fmt: skip
_RESNET200 = (
    (15.01, 15.01, 14.52, 14.38, 7.23, 16.76, 15.68, 14.63, None, None, None, None, None, None, None, None, 15.35),
    (78.20, 81.14, 81.33, 81.59, 80.54, 81.85, 82.64, 82.04, 82.32, 82.30, 82.27, 82.18, 82.19, 82.71, 83.17, 83.35,
     83.60),
)  # fmt: skip


def _rows(base: tuple[int, ...], ratio: Design, width: int, published: tuple) -> tuple[RoadmapStep, ...]:
    designs = {"resnet": Design(base), "recipe": Design(base), "ratio": ratio}
    design = ratio
    for name, change in _CHANGES:
        design = replace(design, **change, **({"width": width} if name == "widen" else {}))
        designs[name] = design
    return tuple(
        RoadmapStep(name, d, gflops, top1) for (name, d), gflops, top1 in zip(designs.items(), *published, strict=True)
    )


CONVNEXT = {
    # Liu et al. 2022, table 10. "recipe" is the ResNet again, trained by the new recipe.
    "resnet50": _rows((3, 4, 6, 3), Design((3, 3, 9, 3)), 96, _RESNET50),
    # Table 11. The paper does not state the 84 channels in the stem of the third step; its multiply-adds imply them.
    "resnet200": _rows((3, 24, 36, 3), Design((3, 3, 27, 3), width=84), 128, _RESNET200),
}


class ModernNet(LevelNet):
    """Any network between ResNet and ConvNeXt, as a ``Stack`` per level.

    Args:
        design: the step.
        scheme: one scheme for all levels, or a list with one per level.
        layer_scale: initial value of gamma, a factor per channel of every residual function; None leaves gamma out.
        backprop: as in Stack.
        head: as in ``HeadNet``.

    Shapes:
        x: (n, in_chans, h, w); the result is (n, num_classes).
    """

    # long: arguments and levels of one network
    def __init__(
        self,
        design: Design,
        scheme: list[str] | str = "euler",
        layer_scale: float | None = None,
        backprop: str = "store",
        **head: Any,
    ):
        super().__init__(**head)
        d = design
        self.stem = _modern_stem(d, self.in_chans)
        rates = iter(linear_rates(self.drop_path_rate, sum(d.functions)))
        width, channels = d.width, []
        found = schemes_of_levels(scheme, len(d.functions))
        for level, (scheme_, count) in enumerate(zip(found, d.functions, strict=True)):
            out = d.width * 2**level * (1 if d.inverted else 4)
            stride = 1 if level == 0 or d.separate else 2
            transition: nn.Module = nn.Identity()
            # A layer between the levels, so that no residual function has to change the width.
            if level and d.separate:
                conv = nn.Conv2d(width, out, 2, 2)
                transition = nn.Sequential(OrderedDict(norm=make_norm(d.norm, width), conv=conv))
                width = out
            self.transitions.append(transition)
            # The first level changes its width too: bottlenecks are four times wider than the stem.
            changes = stride > 1 or width != out
            self.levels.append(
                Stack.from_factory(
                    partial(_function, d, stride, rates, layer_scale),
                    scheme_,
                    steps_that_fit(scheme_, count, level + 1),
                    channels=width,
                    out_channels=out if changes else None,
                    shortcut=_projection(width, out, stride, d.norm) if changes else None,
                    # In place only on a sum that nothing else keeps, as in ResidualNet.
                    post_step=None if d.one_act else make_act(d.act, takes_shortcut(scheme_)),
                    backprop=backprop,
                )
            )
            width = out
            channels.append(out)
        if d.separate:
            self.head_norm = nn.LayerNorm(width, eps=1e-6)
        init_kaiming(self, "fan_out")
        self.least = (32 if d.separate else 4) if d.patch else 1
        self.finish_levels(channels, [4 * 2**level for level in range(len(channels))])


def _modern_stem(d: Design, in_chans: int) -> nn.Sequential:
    stem = nn.Sequential()
    if d.patch:
        # BatchNorm would cancel a bias, channel by channel; LayerNorm, over the channels, does not.
        stem.add_module("conv", nn.Conv2d(in_chans, d.width, 4, 4, bias=d.norm == "layer"))
    else:
        stem.add_module("conv", nn.Conv2d(in_chans, d.width, 7, 2, 3, bias=False))
    stem.add_module("norm", make_norm(d.norm, d.width))
    if not d.one_act:
        stem.add_module("act", make_act(d.act))
    if not d.patch:
        stem.add_module("pool", nn.MaxPool2d(3, 2, 1))
    return stem


def _function(d: Design, stride: int, rates: Iterator[float], layer_scale: float | None, slot: Slot) -> nn.Module:
    return ModernFunction(
        slot.in_channels[0],
        slot.out_channels,
        # Only a function that reads the step's input carries the stride.
        stride if slot.step == 0 and slot.raw else 1,
        kernel=d.kernel,
        depthwise=d.depthwise,
        inverted=d.inverted,
        dw_first=d.dw_first,
        one_act=d.one_act,
        one_norm=d.one_norm,
        norm=d.norm,
        act=d.act,
        layer_scale=layer_scale,
        drop_path=next(rates),
    )


def _projection(width: int, out: int, stride: int, norm: Literal["batch", "layer"]) -> nn.Module:
    if norm == "batch":
        return Projection(width, out, stride)
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(width, out, 1, stride), norm=LayerNorm2d(out)))


def convnext(step: str | int, base: str = "resnet50", **kwargs: Any) -> ModernNet:
    """Builds the network at one step on the way from a ResNet to a ConvNeXt.

    The last step, "separate", has ConvNeXt-T's layers and multiply-adds; ``ConvNeXt`` adds gamma.

    Args:
        step: the step's name, or its number from 1 to 17.
        base: "resnet50" (to ConvNeXt-T) or "resnet200" (to ConvNeXt-B).
        kwargs: passed to ``ModernNet``.

    Raises:
        SchemeError: an unknown step or base; the known ones are named.

    Source:
        Liu et al. 2022, A ConvNet for the 2020s, arXiv 2201.03545, section 2, tables 10 and 11.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     net = convnext("invert", num_classes=0)
        >>> net.num_features
        768
    """
    if base not in CONVNEXT:
        raise SchemeError(f"base is {base!r}, want {' or '.join(CONVNEXT)}.")
    return ModernNet(_find(CONVNEXT[base], step).design, **kwargs)


def _find(rows: Sequence[RoadmapStep], step: str | int) -> RoadmapStep:
    names = [row.name for row in rows]
    if step in names:
        return rows[names.index(str(step))]
    if isinstance(step, int) and 1 <= step <= len(rows):
        return rows[step - 1]
    raise SchemeError(f"step is {step!r}, want a number from 1 to {len(rows)} or one of {', '.join(names)}.")


@dataclass(frozen=True)
class MixerDesign:
    """A step between DenseNet and RDNet that has ConvNeXt's residual functions.

    Attributes:
        growths: new channels per mixer, for each level.
        functions: mixers per level.
        downsample: whether the transition before a level halves the resolution.
        init: width of the stem.
        from_input: whether the hidden width is 4 times the input's rather than 4 times the growth.
        patch: whether the stem is a 4 x 4 convolution of stride 4.
        strided: whether a transition's convolution has the stride, rather than a pooling after it.
    """

    growths: tuple[int, ...]
    functions: tuple[int, ...]
    downsample: tuple[bool, ...]
    init: int
    from_input: bool = False
    patch: bool = False
    strided: bool = False


class MixerNet(LevelNet):
    """Any network between DenseNet and RDNet, as a ``Stack`` of mixers per level.

    Args:
        design: the step.
        scheme: one scheme for all levels, or a list with one per level; "dense" takes the level's growth.
        layer_scale: initial value of gamma, a factor per new channel; None leaves gamma out.
        backprop: as in Stack.
        head: as in ``HeadNet``.

    Shapes:
        x: (n, in_chans, h, w); the result is (n, num_classes).
    """

    def __init__(
        self,
        design: MixerDesign,
        scheme: list[str] | str = "dense",
        layer_scale: float | None = None,
        backprop: str = "store",
        **head: Any,
    ):
        super().__init__(**head)
        d = design
        self.stem = _mixer_stem(d, self.in_chans)
        rates = iter(linear_rates(self.drop_path_rate, sum(d.functions)))

        def make(slot: Slot) -> nn.Module:
            # None: four times the input's width, which grows from mixer to mixer.
            hidden = None if d.from_input else 4 * slot.out_channels
            return mixer(slot, rates, divisor=8, hidden=hidden, layer_scale=layer_scale)

        at, reductions = Widths(d.init), [4]
        found = schemes_with_growth(scheme, d.growths)
        for level, (scheme_, count, halve) in enumerate(zip(found, d.functions, d.downsample, strict=True)):
            transition: nn.Module = nn.Identity()
            if level:
                stride = 2 if halve else 1
                # Half of the width, in multiples of 8, as published.
                transition = _transition(*at.narrowed(at.grown // 16 * 8), stride, d.strided)
                reductions.append(reductions[-1] * stride)
            self.transitions.append(transition)
            depth = steps_that_fit(scheme_, count, level + 1)
            self.levels.append(Stack.from_factory(make, scheme_, depth, channels=at.width, backprop=backprop))
            at.level(scheme_, count, d.growths[level], depth)
        self.head_norm = nn.LayerNorm(at.width, eps=1e-6)
        init_kaiming(self, "fan_in", linear=True)
        # A stem of stride 4 by two strides of 2 rounds up, a patch rounds down.
        self.least = reductions[-1] if d.patch else reductions[-1] - 3
        self.finish_levels(at.channels, reductions)


def _mixer_stem(d: MixerDesign, in_chans: int) -> nn.Sequential:
    if d.patch:
        return nn.Sequential(OrderedDict(conv=nn.Conv2d(in_chans, d.init, 4, 4), norm=LayerNorm2d(d.init)))
    conv = nn.Conv2d(in_chans, d.init, 7, 2, 3, bias=False)
    layers: OrderedDict[str, nn.Module]
    layers = OrderedDict(conv=conv, norm=nn.BatchNorm2d(d.init), act=nn.ReLU(inplace=True), pool=nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(layers)


def _transition(width: int, narrow: int, stride: int, strided: bool) -> nn.Sequential:
    if strided:
        return nn.Sequential(OrderedDict(norm=LayerNorm2d(width), conv=nn.Conv2d(width, narrow, stride, stride)))
    layers: OrderedDict[str, nn.Module] = OrderedDict(norm=LayerNorm2d(width))
    layers["conv"] = nn.Conv2d(width, narrow, 1, bias=False)
    if stride > 1:
        layers["pool"] = nn.AvgPool2d(2)
    return nn.Sequential(layers)


_MIXERS = MixerDesign((120,) * 4, (3, 3, 12, 3), (False, True, True, True), 120)
_LARGE = replace(_MIXERS, growths=(60,) * 4, init=60, from_input=True)
_MORE = replace(
    _LARGE,
    growths=(64, 104, 128, 128, 128, 128, 192),
    functions=(3,) * 7,
    downsample=(False, True, True, False, False, False, True),
)
_PATCH = replace(_MORE, patch=True)

# Kim et al. 2024, table 1, followed by the published numbers of parameters, in 10^6.
RDNET = (
    RoadmapStep("a", {"functions": (6, 12, 48, 32)}, 4.3, 79.7),
    RoadmapStep("b", {"functions": (3, 3, 12, 3), "growth": 120, "init_channels": 120}, 11.1, 79.5),
    RoadmapStep("c", _MIXERS, 4.8, 80.4),
    RoadmapStep("d", _LARGE, 4.7, 80.8),
    RoadmapStep("e", _MORE, 5.0, 82.3),
    RoadmapStep("f", _PATCH, 4.9, 82.4),
    RoadmapStep("g", replace(_PATCH, strided=True), 4.9, 82.6),
    RoadmapStep("h", {}, 5.0, 82.8),
)
RDNET_PARAMETERS = (20.0, 21.8, 12.9, 19.9, 21.2, 21.2, 22.4, 23.9)


def rdnet(
    step: str | int, num_classes: int = 1000, in_chans: int = 3, drop_path_rate: float = 0.0, **kwargs: Any
) -> LevelNet:
    """Builds the network at one step on the way from DenseNet-201 to RDNet-T.

    (a) DenseNet-201, (b) wider and shallower, (c) ConvNeXt's residual functions, (d) a middle that grows with the
    input, (e) a transition after every three, (f) a patch stem, (g) strided transitions, (h) LayerScale and gates:
    RDNet-T. Steps (e) to (g) have 192 new channels in the last level and 60 in the stem, (h) has 224 and 64, according
    to the published sizes and the released code.

    Args:
        step: the step's letter, or its number from 1 to 8.
        num_classes: width of the head; 0 returns features.
        in_chans: channels of the picture.
        drop_path_rate: stochastic depth, growing over the depth to this rate.
        kwargs: passed to the network: ``scheme``, ``layer_scale``, ``backprop`` and the others of its class.

    Raises:
        SchemeError: an unknown step; the known ones are named.

    Source:
        Kim et al. 2024, DenseNets Reloaded, arXiv 2403.19588, section 3 and table 1.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     type(rdnet("b")).__name__, type(rdnet("e")).__name__, type(rdnet("h")).__name__
        ('DenseNet', 'MixerNet', 'RDNet')
    """
    row = _find(RDNET, step)
    kwargs |= {"num_classes": num_classes, "in_chans": in_chans, "drop_path_rate": drop_path_rate}
    if isinstance(row.design, MixerDesign):
        return MixerNet(row.design, **kwargs)
    return (RDNet if row.name == "h" else DenseNet)(**{**row.design, **kwargs})
