"""ResNet and HO-ResNet: one network of levels, whose residual functions any scheme can combine.

A level is a ``Stack``. Three placements of activation and norm around the same scheme:

* ``post``: F = conv-BN-ReLU-...-BN, ReLU on the sum. With euler this is the ResNet of torchvision, key for key.
* ``public``: F = BN-ReLU-conv-BN-ReLU-conv, ReLU on the sum, no norm before the head: HO-ResNet as it was released.
* ``preact``: the same F, nothing on the sum, one BN-ReLU before the head: the stream is a plain sum of functions.

The first step of a level changes stride and width where the scheme has one stream whose identity a shortcut can
replace. Otherwise (several streams, adaptive solvers) a strided 3x3 convolution precedes the level.

Sources: He et al., arXiv 1512.03385 and 1603.05027; Luo et al., HO-ResNet, arXiv 2103.15244.
"""

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

from torch import nn

from schemes import Scheme, SchemeError, Slot

from ..checkpoints import KeyMap
from ..layers import Act, BasicFunction, BottleneckFunction, Norm, PadShortcut, Projection, init_kaiming
from ..stack import Stack
from .catalogue import register_variants, torchvision_weights
from .head import check_choices
from .keys import resnet as keys_of_resnet
from .keys.layout import twin
from .level_net import LevelNet
from .levels import (
    check_continuous,
    check_streams,
    rates_of_levels,
    schemes_of_levels,
    shared_level,
    steps_of_levels,
    takes_shortcut,
    warned_once,
)

Block = Literal["basic", "bottleneck"]
Placement = Literal["post", "public", "preact"]
Shortcut = Literal["projection", "pad"]
Stem = Literal["conv3", "conv3_s2", "conv7_pool"]

FUNCTIONS = {"basic": BasicFunction, "bottleneck": BottleneckFunction}
REDUCTION = {"conv3": 1, "conv3_s2": 2, "conv7_pool": 4}


class ResidualNet(LevelNet):
    """The network behind ``ResNet`` and ``HOResNet``, which differ only in their defaults: stem, levels, norm, head.

    State-dict keys: ``stem.{conv,norm}``, ``levels.{l}.steps.{n}.fs.{i}.{conv,norm}{1..3}``,
    ``levels.{l}.steps.0.gs.0.{conv,norm}`` or, where the scheme takes no shortcut, ``transitions.{l}.{conv,norm}``,
    ``norm`` (preact), ``head``; with ``continuous``, ``levels.{l}.block.block.{conv,norm}{1..3}``.

    Args:
        functions: residual functions per level, a multiple of the stages of the level's scheme.
        widths: width per level, before the block's expansion.
        block: "basic" (two 3x3 convolutions) or "bottleneck" (1x1, 3x3, 1x1, four times wider).
        scheme: one scheme for all levels, or a list with one per level.
        placement: "post" (ReLU on the sum), "public" (pre-activation functions and ReLU on the sum) or "preact"
            (nothing on the sum); with several streams the ReLU acts on each. None means the class's own, or "preact"
            with ``continuous``, since a ReLU between the steps is not part of a field.
        shortcut: "projection" (1x1 convolution) or "pad" (zeros, no parameters), where stride or width change.
        stem: "conv3", "conv3_s2" (stride 2) or "conv7_pool" (stride 2, then a max pool of stride 2).
        step: step size, as in Stack; a decay counts over the whole network.
        backprop: as in Stack.
        norm: "batch" or "group", in the residual functions; None means "group" with ``continuous``, else "batch".
        act: "relu" or "silu", in the residual functions; with a smooth one, schemes attain their order.
        continuous: number of knots of weights that are functions of depth, one field per level, over a span of the
            level's number of steps; stride and width then change before the level. None means separate weights.
        degree: degree of their splines.
        head: as in ``HeadNet``.

    Shapes:
        x: (n, in_chans, h, w); the result is (n, num_classes), without a head (n, c), without pooling (n, c, h', w').

    Raises:
        SchemeError: a level's count does not fit its scheme (the nearest that fit are named), a scheme whose functions
            take several arguments, or a wrong option.
    """

    # long: options, checks and levels of one network
    def __init__(
        self,
        functions: Sequence[int] = (2, 2, 2, 2),
        widths: Sequence[int] = (64, 128, 256, 512),
        block: Block = "basic",
        scheme: list[str] | str = "euler",
        placement: Placement | None = None,
        shortcut: Shortcut = "projection",
        stem: Stem = "conv7_pool",
        step: float | str = 1.0,
        backprop: str = "store",
        norm: Norm | None = None,
        act: Act = "relu",
        continuous: int | None = None,
        degree: int = 1,
        **head: Any,
    ):
        super().__init__(**head)
        placement = placement or ("post" if continuous is None else "preact")
        norm = norm or ("batch" if continuous is None else "group")
        check_choices(block=(block, Block), placement=(placement, Placement), shortcut=(shortcut, Shortcut))
        check_choices(stem=(stem, Stem), norm=(norm, Norm), act=(act, Act))
        check_continuous(continuous, degree, step, **{f"placement={placement!r}": placement != "preact"})
        if not functions or len(functions) != len(widths):
            raise SchemeError(
                f"{len(functions)} counts of residual functions, {len(widths)} widths: want one per level."
            )
        found = schemes_of_levels(scheme, len(functions))
        depths = steps_of_levels(found, functions)
        self.block, self.placement, self.shortcut = block, placement, shortcut
        self.norm_of_functions, self.act, self.continuous = norm, act, continuous
        self.stem = _stem(stem, self.in_chans, widths[0], norm=placement != "preact" or stem == "conv7_pool")
        rates = rates_of_levels(self.drop_path_rate, functions, continuous is not None)
        channels = [widths[0], *(w * FUNCTIONS[block].expansion for w in widths)]
        before = 0
        with warned_once():
            for level, (scheme_, depth, (width, out)) in enumerate(zip(found, depths, pairwise(channels), strict=True)):
                # A decay counts the steps of all levels before this one.
                options = {"step": step, "step_offset": before, "backprop": backprop}
                self._add_level(scheme_, depth, width, out, 1 if level == 0 else 2, rates[level], options)
                before += depth
        last = channels[-1]
        if placement == "preact":
            self.norm = nn.Sequential(nn.BatchNorm2d(last), nn.ReLU(inplace=True))
        published = stem == "conv7_pool"
        init = partial(init_kaiming, mode="fan_out" if published else "fan_in", linear=not published)
        reductions = [REDUCTION[stem] * 2**level for level in range(len(widths))]
        self.finish_levels(channels[1:], reductions, init, continuous, degree)

    def _add_level(
        self,
        scheme: Scheme,
        depth: int,
        width: int,
        out: int,
        stride: int,
        rates: Iterator[float],
        options: dict[str, Any],
    ) -> None:
        shortcut, transition, norm = None, nn.Identity(), self.placement != "preact"
        if stride > 1 or width != out:
            if self.continuous is not None or not takes_shortcut(scheme):
                transition = Projection(width, out, stride, norm=norm, kernel=3)
                width, stride = out, 1
            elif self.shortcut == "pad":
                shortcut = PadShortcut(width, out, stride)
            else:
                shortcut = Projection(width, out, stride, norm=norm)
        check_streams(scheme, depth, width, type(self).__name__)
        if self.continuous is not None:
            make = partial(self._function, scheme, stride, rates)
            self.transitions.append(transition)
            self.levels.append(shared_level(make, scheme, depth, width=width, backprop=options["backprop"]))
            return
        # A one-stream step ends in a new sum, which its ReLU may overwrite; a stream that is kept must not change.
        after = None if self.placement == "preact" else nn.ReLU(inplace=takes_shortcut(scheme))
        stack = Stack.from_factory(
            partial(self._function, scheme, stride, rates),
            scheme,
            depth,
            channels=width,
            out_channels=None if width == out else out,
            shortcut=shortcut,
            post_step=after,
            **options,
        )
        self.transitions.append(transition)
        self.levels.append(stack)

    def _function(self, scheme: Scheme, stride: int, rates: Iterator[float], slot: Slot) -> nn.Module:
        kind = FUNCTIONS[self.block]
        if slot.out_channels % kind.expansion:
            raise SchemeError(
                f"{scheme} asks for bottlenecks of {slot.out_channels} channels, no multiple of 4: choose other "
                "widths, or block='basic'."
            )
        # Only a function that reads the step's input itself carries the stride; the others come after it.
        own = stride if slot.step == 0 and slot.raw else 1
        order = "post" if self.placement == "post" else "pre"
        like: dict[str, Any] = {"order": order, "norm": self.norm_of_functions, "act": self.act}
        return kind(slot.in_channels[0], slot.out_channels, own, drop_path=next(rates), **like)

    def init_head(self, head: nn.Linear) -> None:
        """Does nothing: a new head keeps torch's weights and biases."""

    def key_map(self, keys: Collection[str]) -> KeyMap | None:
        """Maps published keys to ours: torchvision's, the CIFAR and HO-ResNet releases', or a twin's.

        A twin is this network under another scheme: the same residual functions, grouped into other steps.
        """
        own = self.state_dict().keys()
        return keys_of_resnet.published(own, keys, FUNCTIONS[self.block].convolutions) or twin(own, keys)


class ResNet(ResidualNet):
    """ResNet: post-activation, euler and projections by default; the options are those of ``ResidualNet``.

    The defaults are ResNet-18 for ImageNet: 11,689,512 parameters, 1.814 GMACs at 224 x 224.

    Source:
        He et al. 2016, Deep Residual Learning for Image Recognition, arXiv 1512.03385, table 1 and section 4.2.

    Example:
        >>> import torch
        >>> net = ResNet([4, 4], [8, 16], scheme=["rk4", "midpoint"], stem="conv3", num_classes=10)
        >>> net(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """


class HOResNet(ResidualNet):
    """HO-ResNet: the residual functions of a ResNet under a high-order scheme, as it was released for CIFAR.

    The defaults are the 26-layer net: four functions per level, 366,842 parameters under euler, midpoint and rk4 alike.
    With 12 per level it has 74 layers, with 14 (verner8) 86, with 28 170.

    Args:
        functions: residual functions per level, a multiple of the stages of the level's scheme.
        widths: width per level, before the block's expansion.
        block: "basic" or "bottleneck".
        scheme: one scheme for all levels, or a list with one per level.
        placement: "public" (as released), "preact" or "post"; None means "public", or "preact" with ``continuous``.
        shortcut: "pad" (as released) or "projection".
        stem: "conv3_s2" (as released), "conv3" (four times the pixels) or "conv7_pool".
        num_classes: width of the head; 0 returns features.
        options: as in ``ResidualNet``.

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
        placement: Placement | None = None,
        shortcut: Shortcut = "pad",
        stem: Stem = "conv3_s2",
        num_classes: int = 10,
        **options: Any,
    ):
        placement = placement or ("public" if options.get("continuous") is None else "preact")
        super().__init__(
            functions, widths, block, scheme, placement, shortcut, stem, num_classes=num_classes, **options
        )


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

# The default scheme is the one of highest order among euler, midpoint, rk4 and verner8 whose stages divide the levels;
# any of the others that fit is one word away, at equal parameters.
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

_PUBLISHED: dict[str, tuple[tuple[str, str, float], ...]] = {
    "resnet18": (("v1", "f37072fd", 69.758),),
    "resnet34": (("v1", "b627a593", 73.314),),
    "resnet50": (("v2", "11ad3fa6", 80.858), ("v1", "0676ba61", 76.130)),
    "resnet101": (("v2", "cd907fc2", 81.886), ("v1", "63fe2227", 77.374)),
    "resnet152": (("v2", "f82ba261", 82.284), ("v1", "394f9c45", 78.312)),
}
_WEIGHTS = {name: [torchvision_weights(name, *row) for row in rows] for name, rows in _PUBLISHED.items()}

register_variants(ResNet, RESNETS, _WEIGHTS)
register_variants(HOResNet, HO_RESNETS)
