"""Feature pyramids: the maps of chosen levels instead of logits, as detectors and segmenters expect them."""

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from schemes import SchemeError

from ..checkpoints import KeyMap, Renames
from .conventions import Conventions, without_norms
from .feature_info import FeatureInfo, place


class FeatureNet(nn.Module):
    """A model of levels that returns the maps of chosen levels; everything after the last of them is removed.

    The maps are the levels' outputs, one per resolution, before any final norm.

    Args:
        model: a model with ``levels``, ``maps(x)`` and ``feature_info``; it is changed, not copied.
        out_indices: which rows of ``feature_info`` to return, negative ones from the end; None means all.

    Attributes:
        feature_info: channels, reduction and module of each returned map.

    Shapes:
        x: (n, in_chans, h, w); the result is a list of maps (n, num_chs, h / reduction, w / reduction).

    Raises:
        SchemeError: a model without levels, or indices that are out of range, unsorted or repeated.

    Example:
        >>> import torch
        >>> from odenets import create_model
        >>> net = create_model("convnext_tiny", features_only=True, out_indices=(0, 1), widths=(8, 16, 32, 64))
        >>> [tuple(m.shape) for m in net(torch.randn(1, 3, 32, 32))], [r["reduction"] for r in net.feature_info]
        ([(1, 8, 8, 8), (1, 16, 4, 4)], [4, 8])
    """

    def __init__(self, model: nn.Module, out_indices: Sequence[int] | None = None):
        super().__init__()
        info: Any = getattr(model, "feature_info", None)
        if info is None or not callable(getattr(model, "maps", None)):
            raise SchemeError(f"features_only: {type(model).__name__} has no pyramid of levels.")
        count = len(info)
        chosen = list(range(count)) if out_indices is None else [i + count if i < 0 else i for i in out_indices]
        if not chosen or chosen != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] < count:
            raise SchemeError(f"out_indices is {out_indices}, want rising numbers from 0 to {count - 1}.")
        # A file of the whole model has keys of what is removed below: these must be told from unknown keys.
        before = set(model.state_dict())
        self.feature_info = FeatureInfo(info[i] for i in chosen)
        self.wanted = [place(row) for row in self.feature_info]
        # Parameters that no map needs would be unused, and DDP would wait for their gradients.
        model.reset_classifier(0)  # type: ignore[operator]
        without_norms(model)
        if isinstance(model, Conventions):
            model.cut_levels(self.wanted[-1])
        self.net: Any = model
        self.left_out = frozenset(before - set(model.state_dict()))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Returns the maps of the chosen levels, from fine to coarse."""
        maps = self.net.maps(x)
        return [maps[i] for i in self.wanted]

    def key_map(self, keys: Collection[str]) -> KeyMap | None:
        """Returns the model's own key map; keys of removed parts are dropped.

        Args:
            keys: all keys of a file.
        """
        known: KeyMap | None = self.net.key_map(keys) if isinstance(self.net, Renames) else None
        if known is None:
            if not self.left_out & set(keys) and not any(f"net.{key}" in self.state_dict() for key in keys):
                return None
            known = KeyMap("own", {key: key for key in keys})
        names = {}
        for key in keys:
            target = known.names.get(key, key)
            names[key] = None if target is None or target in self.left_out else f"net.{target}"
        # Settings of the head's norm no longer apply.
        settings = {k: v for k, v in known.settings.items() if not k.startswith("head")}
        return KeyMap(known.layout, names, settings)
