"""Methods that timm's users call on any network: intermediate maps, checkpointing, groups of parameters."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from schemes import SchemeError

from ..backprop.modes import Checkpoint, Store
from ..stack import Stack
from .depth import matched_depths
from .feature_info import FeatureInfo, chosen, place

LAST = (99999,)  # timm's marker for parameters that join the preceding group
# Parameters of two or more dimensions that are scales or positions, not weights of a linear map.
UNDECAYED = re.compile(r"(^|\.)(class_token|positions|alpha|gamma|log_scale)$|^idle\.")


class Conventions(nn.Module):
    """Methods of timm's models that work on every network with maps; none needs timm.

    Attributes:
        first_conv: name of the convolution that reads the picture; None where there is none.
        classifier: name of the linear layer that computes the logits.
    """

    first_conv: ClassVar[str | None] = "stem.conv"
    classifier: ClassVar[str] = "head"

    feature_info: FeatureInfo
    num_features: int
    head_hidden_size: int

    def maps(self, x: Tensor, last: int | None = None) -> list[Tensor]:
        """Returns the maps of the levels, fine to coarse; ``feature_info`` lists their widths and reductions.

        Args:
            x: (n, in_chans, h, w).
            last: number of the last map that is wanted; those after it may be left out.
        """
        raise NotImplementedError

    def features_and_maps(self, x: Tensor, norm: bool = False) -> tuple[Tensor, list[Tensor]]:
        """Returns the results of ``forward_features`` and ``maps`` from one pass.

        Args:
            x: (n, c, h, w).
            norm: whether the last map goes through the norm before the head.
        """
        found = self.maps(x)
        return found[-1], found

    def cut_levels(self, last: int) -> None:
        """Removes everything after map number ``last``; nothing, unless a subclass overrides it.

        Args:
            last: the number of the last map that stays, from 0.
        """

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head.

        Args:
            num_classes: number of its outputs; 0 means no head.
            global_pool: the new pooling; None keeps the present one.
        """
        raise NotImplementedError

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Returns the features, and the maps on the way to them, from one pass.

        Args:
            x: (n, in_chans, h, w).
            indices: which rows of ``feature_info``: None means all, an integer n the last n.
            norm: whether the last map is normalised, where the network does so before pooling.
            stop_early: whether levels after the last wanted one are left out; the features are then that map.
            output_fmt: "NCHW", or "NLC" for (n, h w, c).
            intermediates_only: whether to return the maps alone.

        Returns:
            A pair, ``(features, maps)``; or the maps.

        Raises:
            SchemeError: indices out of range, or an unknown format.

        Example:
            >>> import torch
            >>> from odenets import create_model
            >>> net = create_model("resnet20", num_classes=10)
            >>> y, maps = net.forward_intermediates(torch.randn(1, 3, 32, 32), indices=2)
            >>> tuple(y.shape), [tuple(m.shape) for m in maps]
            ((1, 64, 8, 8), [(1, 32, 16, 16), (1, 64, 8, 8)])
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise SchemeError(f"output_fmt is {output_fmt!r}, want 'NCHW' or 'NLC'.")
        rows = chosen(indices, len(self.feature_info))
        # If the last map is wanted, nothing can be left out, and a whole pass also yields the features.
        if stop_early and max(rows) < len(self.feature_info) - 1:
            last = place(self.feature_info[max(rows)])
            maps = self.maps(x, last)
            y = maps[last]
        else:
            y, maps = self.features_and_maps(x, norm)
        found = [maps[place(self.feature_info[i])] for i in rows]
        if output_fmt == "NLC":
            found = [m.flatten(2).transpose(1, 2) for m in found]
        return found if intermediates_only else (y, found)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes what the wanted maps do not need, and returns the maps' numbers in ``feature_info``.

        Args:
            indices: as in ``forward_intermediates``.
            prune_norm: whether the norm before the pooling is removed too.
            prune_head: whether the head is removed too; it always is where levels are removed.
        """
        rows = chosen(indices, len(self.feature_info))
        shorter = max(rows) < len(self.feature_info) - 1
        # The head, and the norms below, have the width of the map that they were built for.
        if prune_head or shorter:
            self.reset_classifier(0)
        self.cut_levels(place(self.feature_info[max(rows)]))
        if prune_norm or shorter:
            without_norms(self)
        self.feature_info = FeatureInfo(self.feature_info[: max(rows) + 1])
        # Columns stay whole, whichever of their maps are wanted: so do their features, and the pictures that they take.
        if type(self).cut_levels is not Conventions.cut_levels:
            self._features_are(self.feature_info[-1])
        return rows

    def _features_are(self, row: Mapping[str, Any]) -> None:
        """Takes the width of the features, and the pixels per pixel of theirs, from a row of ``feature_info``."""
        self.num_features = self.head_hidden_size = row["num_chs"]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switches stacks that store to keeping one state per step and recomputing the step, or back where disabled.

        Stacks under any other mode, such as "reverse", stay as they are. For measured plans, see ``odenets.plan``.

        Args:
            enable: whether it is on.

        Example:
            >>> from odenets import create_model
            >>> net = create_model("resnet20")
            >>> net.set_grad_checkpointing()
            >>> [str(level.backprop) for level in net.levels]
            ['checkpoint', 'checkpoint', 'checkpoint']
        """
        before, after = (Store, Checkpoint()) if enable else (Checkpoint, Store())
        for m in self.modules():
            if isinstance(m, Stack) and isinstance(m.backprop, before):
                m.backprop = after

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns patterns that order parameters by depth, in timm's format, for layer-wise learning-rate decay.

        Args:
            coarse: one group per level, or per column; otherwise one per step, or per level of a column.
        """
        if coarse:
            blocks: list[Any] = [(r"^columns\.steps\.(\d+)", None), (r"^(?:transitions|levels)\.(\d+)", None)]
        else:
            blocks = [
                (r"^columns\.steps\.(\d+)\.[fg]s\.(\d+)", None),
                (r"^transitions\.(\d+)", (-1,)),  # before the first step of its level
                (r"^levels\.(\d+)\.steps\.(\d+)", None),
                (r"^levels\.(\d+)", None),
            ]
        return {"stem": r"^(?:stem|idle)\.", "blocks": [*blocks, (r"^(?:norm|head_norm)\.", LAST)]}

    def parameter_depths(self) -> dict[str, int]:
        """Returns the depth of each parameter, from 0 for the stem up to the head; see ``odenets.models.depth``."""
        return matched_depths(self, self.group_matcher())

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides vectors: positions, class tokens, channel factors."""
        return {name for name, _ in self.named_parameters() if UNDECAYED.search(name)}


def without_norms(model: nn.Module) -> None:
    """Removes the norms of the last map and of the pooled features."""
    for name in ("norm", "head_norm"):
        if isinstance(getattr(model, name, None), nn.Module):
            setattr(model, name, nn.Identity())
