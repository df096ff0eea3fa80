"""ConvNeXt: depthwise convolutions and perceptrons, under any scheme; under euler it is the published network.

A level is a ``Stack`` of ``ConvNeXtFunction``s; downsampling is a separate transition before the level, so that a level
of four functions can run under rk4, and one of two under midpoint, with the same weights.

Source: Liu et al. 2022, A ConvNet for the 2020s, arXiv 2201.03545.
"""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from torch import nn

from schemes import SchemeError

from ..checkpoints import KeyMap
from ..layers import LayerNorm2d, PatchConv2d, init_truncated
from ..stack import Stack
from .catalogue import register_variants, torchvision_weights
from .keys import convnext as keys_of_convnext
from .keys.layout import twin
from .level_net import LevelNet
from .levels import (
    check_continuous,
    check_streams,
    mixer,
    patch_transition,
    rates_of_levels,
    recomputing,
    schemes_of_levels,
    shared_level,
    steps_of_levels,
    warned_once,
)


class ConvNeXt(LevelNet):
    """ConvNeXt; the defaults are ConvNeXt-T: 28,589,128 parameters, 4.456 GMACs at 224 x 224.

    With a single level, ``patch=16`` and ``stem_norm=False`` it is the isotropic form.

    Args:
        functions: residual functions per level, a multiple of the stages of the level's scheme.
        widths: width per level.
        scheme: one scheme for all levels, or a list with one per level.
        kernel: size of the depthwise convolutions.
        expansion: hidden width of a residual function over its width.
        patch: size and stride of the stem's convolution.
        stem_norm: whether LayerNorm follows it.
        layer_scale: initial value of gamma; None leaves gamma out.
        step: step size, as in Stack; a decay counts over the whole network.
        backprop: as in Stack.
        recompute: keep only the results of depthwise convolutions, and recompute norms, first products and GELUs in the
            backward pass; an integer n restricts this to the first n levels.
        continuous: number of knots of weights that are functions of depth, one field per level, over a span of the
            level's number of steps; None means separate weights.
        degree: degree of their splines.
        head: as in ``HeadNet``.

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

    depth_group = 3  # as published: the 27 blocks in ConvNeXt-B's third level make nine groups

    # long: options, checks and levels of one network
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
        continuous: int | None = None,
        degree: int = 1,
        **head: Any,
    ):
        super().__init__(**head)
        check_continuous(continuous, degree, step, recompute=bool(recompute))
        _check(functions, widths, kernel)
        found = schemes_of_levels(scheme, len(functions))
        depths = steps_of_levels(found, functions)
        rates = rates_of_levels(self.drop_path_rate, functions, continuous is not None)
        make = partial(mixer, kernel=kernel, expansion=expansion, layer_scale=layer_scale)
        again = recomputing(recompute, len(functions))
        self.stem = nn.Sequential(OrderedDict(conv=PatchConv2d(self.in_chans, widths[0], patch)))
        if stem_norm:
            self.stem.add_module("norm", LayerNorm2d(widths[0]))
        before = 0
        with warned_once():
            for level, (scheme_, depth, width) in enumerate(zip(found, depths, widths, strict=True)):
                check_streams(scheme_, depth, width, "ConvNeXt")
                # A decaying step size continues from level to level.
                options = {"step": step, "step_offset": before, "backprop": backprop}
                of_level = partial(make, rates=rates[level], recompute=again[level])
                self.transitions.append(patch_transition(widths[level - 1], width, 2) if level else nn.Identity())
                if continuous is None:
                    self.levels.append(Stack.from_factory(of_level, scheme_, depth, channels=width, **options))
                else:
                    self.levels.append(shared_level(of_level, scheme_, depth, width=width, backprop=backprop))
                before += depth
        self.head_norm = nn.LayerNorm(widths[-1], eps=1e-6)
        init_truncated(self)
        reductions = [patch * 2**level for level in range(len(widths))]
        self.least = reductions[-1]
        self.finish_levels(list(widths), reductions, None, continuous, degree)

    def init_head(self, head: nn.Linear) -> None:
        init_truncated(head)

    def key_map(self, keys: Collection[str]) -> KeyMap | None:
        """Maps published keys to ours: facebookresearch's, timm's, torchvision's, or a twin's under another scheme."""
        own = self.state_dict().keys()
        return keys_of_convnext.published(own, keys) or twin(own, keys)


def _check(functions: Sequence[int], widths: Sequence[int], kernel: int) -> None:
    if not functions or len(functions) != len(widths):
        raise SchemeError(f"{len(functions)} counts of residual functions, {len(widths)} widths: want one per level.")
    if kernel % 2 == 0:
        raise SchemeError(f"kernel is {kernel}, want an odd size.")


_SMALL = {"widths": (96, 192, 384, 768)}
_ISOTROPIC = {"patch": 16, "stem_norm": False}

CONVNEXTS: dict[str, dict[str, Any]] = {
    # Liu et al. 2022, table 9.
    "convnext_tiny": {"functions": (3, 3, 9, 3), **_SMALL},
    "convnext_small": {"functions": (3, 3, 27, 3), **_SMALL},
    "convnext_base": {"functions": (3, 3, 27, 3), "widths": (128, 256, 512, 1024)},
    "convnext_large": {"functions": (3, 3, 27, 3), "widths": (192, 384, 768, 1536)},
    "convnext_xlarge": {"functions": (3, 3, 27, 3), "widths": (256, 512, 1024, 2048)},
    # Section 3.3: one level at stride 16, as in a vision transformer; only the large one was trained with gamma.
    "convnext_isotropic_small": {"functions": (18,), "widths": (384,), "layer_scale": None, **_ISOTROPIC},
    "convnext_isotropic_base": {"functions": (18,), "widths": (768,), "layer_scale": None, **_ISOTROPIC},
    "convnext_isotropic_large": {"functions": (36,), "widths": (1024,), **_ISOTROPIC},
}

# One column, reversible inside its levels: the functions of a ConvNeXt under RevNet's scheme, two streams wide.
REVERSIBLE_CONVNEXTS: dict[str, dict[str, Any]] = {
    "revconvnext_tiny": {"functions": (6, 6, 18, 6), "widths": (128, 256, 512, 1024), "scheme": "revnet"},
}

_PUBLISHED: dict[str, tuple[str, float]] = {
    "convnext_tiny": ("983f1562", 82.520),
    "convnext_small": ("0c510722", 83.616),
    "convnext_base": ("6075fbad", 84.062),
    "convnext_large": ("ea097f82", 84.414),
}
_WEIGHTS = {name: [torchvision_weights(name, "v1", *row)] for name, row in _PUBLISHED.items()}

register_variants(ConvNeXt, CONVNEXTS, _WEIGHTS)
register_variants(ConvNeXt, REVERSIBLE_CONVNEXTS)
