"""RevNet and i-RevNet: residual networks of two streams, each updated by a function of the other.

A RevNet's level begins with a unit that changes stride and width and cannot be undone; the units after it are one
``Stack`` over the reversible coupling. An i-RevNet downsamples by moving pixels into channels: all of it is reversible.
"""

from collections.abc import Callable, Sequence
from itertools import islice, pairwise
from typing import Any, Literal

from torch import Tensor, nn

from schemes import SchemeError

from ..backprop.modes import Exact, parse_mode
from ..layers import (
    Act,
    BasicFunction,
    BottleneckFunction,
    Norm,
    PoolPadShortcut,
    Projection,
    SpaceToDepth,
    init_kaiming,
    linear_rates,
)
from ..stack import Stack
from ..step import PerSlot
from .catalogue import register_variants
from .head import check_choices
from .level_net import LevelNet
from .levels import check_continuous

Block = Literal["basic", "bottleneck"]
Stem = Literal["conv3", "conv7_pool"]

FUNCTIONS = {"basic": BasicFunction, "bottleneck": BottleneckFunction}
EPS = 1e-3  # of the norms, as released


class _Reversible(LevelNet):
    """The base of RevNet and i-RevNet: the checks of their options, BN-ReLU at the end, the weights' distribution.

    Args:
        head: as in ``HeadNet``.
    """

    whole = True

    def _check(self, block: str, units: Sequence[int]) -> None:
        check_choices(block=(block, Block))
        if not units or min(units) < 1:
            raise SchemeError(f"units are {tuple(units)}; want at least one per level.")

    def _finish(self, channels: list[int], reduction: int, continuous: int | None = None, degree: int = 1) -> None:
        self.norm = nn.Sequential(nn.BatchNorm2d(channels[-1]), nn.ReLU(inplace=True))
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eps = EPS
        init_kaiming(self, "fan_out")
        reductions = [reduction * 2**level for level in range(len(channels))]
        self.finish_levels(channels, reductions, None, continuous, degree)


class RevNet(_Reversible):
    """RevNet; the defaults are RevNet-38 for CIFAR: 464,890 parameters.

    A level's first unit is y_1 = g_1(x_1) + F(x_2), y_2 = g_2(x_2) + G(y_1), where F changes stride and width and the
    shortcuts g average and pad (basic) or are 1x1 convolutions (bottleneck). The others have no shortcuts to undo.

    State-dict keys: ``stem.{conv,norm}``, ``transitions.{l}.steps.0.{fs,gs}.{i}`` for first units,
    ``levels.{l}.steps.{n}.fs.{i}``, ``norm.0``, ``head``; with ``continuous``, ``levels.{l}.block.{i}.block``.

    Args:
        units: number of units per level, each of two residual functions.
        widths: widths of the stem and of each level, both streams together, before the block's expansion.
        block: "basic" (two 3x3 convolutions) or "bottleneck" (1x1, 3x3, 1x1, four times wider).
        stem: "conv3", or "conv7_pool" (stride 2, then a max pool of stride 2).
        backprop: for the units after the first of each level, as in Stack; the first ones store their tensors.
        num_classes: width of the head; 0 returns features.
        norm: "batch" or "group", in the residual functions; None means "group" with ``continuous``, else "batch".
        act: "relu" or "silu", in the residual functions; with a smooth one, schemes attain their order.
        continuous: number of knots of weights that are functions of depth: two fields per level, F and G, for the units
            after its first, over a span of their number; None means separate weights.
        degree: degree of their splines.
        head: as in ``HeadNet``.

    Shapes:
        x: (n, in_chans, h, w); the result is (n, num_classes).

    Raises:
        SchemeError: a wrong option.

    Source:
        Gomez et al. 2017, The Reversible Residual Network, arXiv 1707.04585, tables 1 and 2.

    Example:
        >>> import torch
        >>> RevNet(units=(2, 2), widths=(8, 8, 16))(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 10])
    """

    # long: options, checks and levels of one network
    def __init__(
        self,
        units: Sequence[int] = (3, 3, 3),
        widths: Sequence[int] = (32, 32, 64, 112),
        block: Block = "basic",
        stem: Stem = "conv3",
        backprop: str = "store",
        num_classes: int = 10,
        norm: Norm | None = None,
        act: Act = "relu",
        continuous: int | None = None,
        degree: int = 1,
        **head: Any,
    ):
        super().__init__(num_classes=num_classes, **head)
        self._check(block, units)
        norm = norm or ("batch" if continuous is None else "group")
        check_choices(stem=(stem, Stem), norm=(norm, Norm), act=(act, Act))
        check_continuous(continuous, degree, 1.0)
        if len(widths) != len(units) + 1 or any(w % 2 for w in widths):
            raise SchemeError(f"RevNet: widths {tuple(widths)}, want an even one for the stem and for each level.")
        self.stem = _stem(stem, self.in_chans, widths[0])
        expansion = FUNCTIONS[block].expansion
        channels = [widths[0], *(w * expansion for w in widths[1:])]
        rates = iter(_rates(self.drop_path_rate, units, continuous is not None))
        make = _maker(block, lambda: next(rates), norm, act)
        for level, (count, (width, out)) in enumerate(zip(units, pairwise(channels), strict=True)):
            stride = 1 if level == 0 else 2
            first = Stack(
                [make(width // 2, out // 2, stride), make(out // 2, out // 2)],
                "revnet",
                shortcut=[_shortcut(block, width // 2, out // 2, stride) for _ in range(2)],
            )
            rest = [make(out // 2, out // 2) for _ in range(2 * count - 2)]
            self.transitions.append(first)
            if rest and continuous is not None:
                self.levels.append(Stack(PerSlot(rest[:2]), "revnet", count - 1, backprop=backprop))
            else:
                self.levels.append(Stack(rest, "revnet", backprop=backprop) if rest else nn.Identity())
        # The stem has already normalised and rectified the input of the very first function.
        function = self.transitions[0].steps[0].fs[0]  # type: ignore[union-attr,index]
        # Not in place, since no norm precedes it: a residual function must not write to its argument.
        function.norm1, function.relu = nn.Identity(), nn.ReLU() if act == "relu" else nn.SiLU()
        self._finish(channels[1:], 1 if stem == "conv3" else 4, continuous, degree)

    def _fits(self, height: int, width: int) -> bool:
        # The stem rounds up; only what comes after it must be even.
        first = self.feature_info[0]["reduction"]
        return all(-(-side // first) % (self.reduction // first) == 0 for side in (height, width))


def _rates(rate: float, units: Sequence[int], continuous: bool) -> list[float]:
    """Returns the rates of stochastic depth, one per function; those after a level's first unit have a field's mean."""
    rates, found = iter(linear_rates(rate, 2 * sum(units))), []
    for count in units:
        found += islice(rates, 2)
        rest = list(islice(rates, 2 * count - 2))
        found += [sum(rest) / len(rest)] * len(rest) if continuous and rest else rest
    return found


class IRevNet(_Reversible):
    """Fully invertible RevNet: the picture is not lost on the way to the last map, and ``inverse`` recovers it.

    The stem repeats the picture's channels up to the width; every later level begins by moving squares of four pixels
    into the channels of both streams, a shortcut with an exact inverse. So the network trains with one state per level.

    Args:
        units: number of units per level, each of two residual functions.
        width: width of the first level, both streams together; every further level multiplies it by four.
        block: "bottleneck" (1x1, 3x3, 1x1 with a quarter of the width inside) or "basic".
        patch: side of the squares that the stem moves into the channels; 1 leaves the picture's resolution.
        backprop: as in Stack; with several levels not "exact": moving pixels into channels can be undone, but not on
            the grid.
        num_classes: width of the head; 0 returns features.
        head: as in ``HeadNet``.

    Shapes:
        x: (n, in_chans, h, w), h and w multiples of patch 2^(levels - 1); the result is (n, num_classes).

    Raises:
        SchemeError: a wrong option.

    Source:
        Jacobsen et al. 2018, i-RevNet: Deep Invertible Networks, arXiv 1802.07088; there the
        channels are padded with zeros. The residual functions are those of RevNet.

    Example:
        >>> import torch
        >>> net, x = IRevNet(units=(1, 1), width=8).eval(), torch.randn(1, 3, 8, 8)
        >>> torch.allclose(net.inverse(net.maps(x)[-1]), x, atol=1e-5)
        True
    """

    first_conv = None  # pixels are gathered, and the first level reads them

    def __init__(
        self,
        units: Sequence[int] = (18, 18, 18),
        width: int = 32,
        block: Block = "bottleneck",
        patch: int = 1,
        backprop: str = "store",
        num_classes: int = 10,
        **head: Any,
    ):
        super().__init__(num_classes=num_classes, **head)
        self._check(block, units)
        # With one level there is no shortcut.
        if len(units) > 1 and isinstance(parse_mode(backprop), Exact):
            raise SchemeError(
                "IRevNet: exact arithmetic cannot undo the shortcuts that move pixels into channels: use "
                "backprop='reverse'."
            )
        self.patch, least = patch, self.in_chans * patch**2
        if width % 8 or width < least:
            raise SchemeError(
                f"IRevNet: width is {width}, want a multiple of 8, at least {least} (the picture's "
                f"{self.in_chans} channels times {patch} x {patch} pixels)."
            )
        self.stem = WidenedPicture(self.in_chans, width, patch)
        channels = [width * 4**level for level in range(len(units))]
        rates = iter(linear_rates(self.drop_path_rate, 2 * sum(units)))
        make = _maker(block, lambda: next(rates))
        for level, (count, out) in enumerate(zip(units, channels, strict=True)):
            half, shortcut, fs = out // 2, None, []
            if level:
                shortcut = [SpaceToDepth(), SpaceToDepth()]
                # Function 0 reads the stream as it was before the pixels moved, function 1 the one that has been moved.
                fs = [make(half // 4, half, 2), make(half, half)]
            fs += [make(half, half) for _ in range(2 * count - len(fs))]
            self.transitions.append(nn.Identity())
            self.levels.append(Stack(fs, "revnet", shortcut=shortcut, backprop=backprop))
        self._finish(channels, patch)

    def inverse(self, y: Tensor) -> Tensor:
        """Returns the picture whose last map, ``maps(x)[-1]``, is y; in evaluation mode, where BatchNorm is fixed.

        Args:
            y: (n, num_features, h', w').
        """
        if self.training:
            raise SchemeError("IRevNet: inverse needs evaluation mode, where norms are fixed: net.eval().")
        for level in reversed(self.levels):
            y = level.inverse(y)  # type: ignore[operator]
        return self.stem.inverse(y)  # type: ignore[operator]


class WidenedPicture(nn.Module):
    """Moves squares of pixels into the channels and repeats these until there are ``width``; nothing is lost.

    Zeros in place of the repetitions would leave one stream empty, and its BatchNorm would amplify the rounding errors
    of a reconstruction to the size of a signal.
    """

    def __init__(self, in_chans: int, width: int, patch: int):
        super().__init__()
        self.squares = SpaceToDepth(patch)
        self.kept = in_chans * patch**2
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        x = self.squares(x)
        return x.repeat(1, -(-self.width // self.kept), 1, 1)[:, : self.width]

    def inverse(self, y: Tensor) -> Tensor:
        """Returns the picture whose widened form is y."""
        # The first copy; the others are repetitions of it.
        return self.squares.inverse(y[:, : self.kept])


def _maker(
    block: Block, rate: Callable[[], float], norm: Norm = "batch", act: Act = "relu"
) -> Callable[..., nn.Module]:
    def make(width: int, out: int, stride: int = 1) -> nn.Module:
        function = FUNCTIONS[block](width, out, stride, order="pre", drop_path=rate(), norm=norm, act=act)
        if block == "bottleneck" and stride > 1:
            # As released: the stride is in the first 1x1 convolution.
            function.conv1.stride, function.conv2.stride = function.conv2.stride, function.conv1.stride
        return function

    return make


def _shortcut(block: Block, width: int, out: int, stride: int) -> nn.Module:
    if block == "bottleneck":
        return Projection(width, out, stride, norm=False)
    return PoolPadShortcut(width, out, stride)


def _stem(kind: Stem, in_chans: int, width: int) -> nn.Sequential:
    stem = nn.Sequential()
    side, stride = (7, 2) if kind == "conv7_pool" else (3, 1)
    stem.add_module("conv", nn.Conv2d(in_chans, width, side, stride, side // 2, bias=False))
    stem.add_module("norm", nn.BatchNorm2d(width))
    stem.add_module("act", nn.ReLU(inplace=True))
    if kind == "conv7_pool":
        stem.add_module("pool", nn.MaxPool2d(3, 2, 1))
    return stem


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

register_variants(RevNet, REVNETS)
register_variants(IRevNet, IREVNETS)
