"""Feature pyramids: the maps of chosen levels instead of logits, as detectors and segmenters want them."""

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from schemes import SchemeError

from ..checkpoints import KeyMap, Renames
from .conventions import Conventions, without_norms
from .feature_info import FeatureInfo, place


class FeatureNet(nn.Module):
    """A model of levels that returns the maps of chosen levels; what comes after the last of them is taken out.

    The maps are what the levels give, one per resolution, before any final norm.

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
        # A file of the whole model holds keys of what is cut off below; remembered, they can be told from strangers.
        before = set(model.state_dict())
        self.feature_info = FeatureInfo(info[i] for i in chosen)
        self.wanted = [place(row) for row in self.feature_info]
        # What no map needs would otherwise lie idle, and DDP would wait for its gradients.
        model.reset_classifier(0)  # type: ignore[operator]
        without_norms(model)
        if isinstance(model, Conventions):
            model.cut_levels(self.wanted[-1])
        self.net: Any = model
        self.left_out = frozenset(before - set(model.state_dict()))

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps of the chosen levels, from fine to coarse."""
        maps = self.net.maps(x)
        return [maps[i] for i in self.wanted]

    def key_map(self, keys: Collection[str]) -> KeyMap | None:
        """The model's own map; what was taken out is dropped.

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
        # A setting of the head's norm has nothing left to set.
        settings = {k: v for k, v in known.settings.items() if not k.startswith("head")}
        return KeyMap(known.layout, names, settings)
