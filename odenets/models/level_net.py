"""What ConvNeXt, DenseNet and RDNet share: stem, levels with a transition before each, norms, pooling, head."""

from collections.abc import Collection
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemes import SchemeError

from ..checkpoints import KeyMap

Pool = Literal["avg", "max", ""]


class LevelNet(nn.Module):
    """A network of levels: x -> stem -> (transition -> level) ... -> norm -> pooling -> head norm -> dropout -> head.

    A subclass makes ``stem``, ``transitions`` and ``levels`` (as many of each), may set ``norm`` (on the map) and
    ``head_norm`` (on what is pooled), and then calls ``finish``. State-dict keys: ``stem.*``, ``transitions.{l}.*``,
    ``levels.{l}.steps.{n}.fs.{i}.*``, ``norm.*``, ``head_norm.*``, ``head.*``.
    """

    num_features: int
    feature_info: list[dict[str, Any]]

    def __init__(self, drop_rate: float, head_init_scale: float = 1.0):
        super().__init__()
        self.drop_rate, self.head_init_scale = drop_rate, head_init_scale
        self.stem: nn.Module = nn.Identity()
        self.transitions = nn.ModuleList()
        self.levels = nn.ModuleList()
        self.norm: nn.Module = nn.Identity()
        self.head_norm: nn.Module = nn.Identity()
        self.head: nn.Module = nn.Identity()

    def finish(self, channels: list[int], reductions: list[int], num_classes: int, global_pool: Pool) -> None:
        """Notes what the levels give and makes the head.

        Args:
            channels: width after each level.
            reductions: stride after each level.
            num_classes: width of the head.
            global_pool: kind of pooling.
        """
        self.num_features = self.head_hidden_size = channels[-1]
        rows = zip(channels, reductions, strict=True)
        info = [{"num_chs": c, "reduction": r, "module": f"levels.{i}"} for i, (c, r) in enumerate(rows)]
        # One map per resolution, the last: RDNet has several levels of one resolution.
        last = {row["reduction"]: row for row in info}
        self.feature_info = list(last.values())
        self.reset_classifier(num_classes, global_pool)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, num_classes), or features where there is no head. x: (n, in_chans, h, w)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last level's map, normalised where the model does so before it pools: (n, num_features, h', w')."""
        x = self.stem(x)
        for transition, level in zip(self.transitions, self.levels, strict=True):
            x = level(transition(x))
        return self.norm(x)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The map after each level."""
        x = self.stem(x)
        found = []
        for transition, level in zip(self.transitions, self.levels, strict=True):
            x = level(transition(x))
            found.append(x)
        return found

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools, normalises, drops out and classifies a map; ``pre_logits`` stops before the head.

        Without pooling the map comes back as it is.
        """
        if not self.global_pool:
            return x
        x = x.mean((2, 3)) if self.global_pool == "avg" else x.amax((2, 3))
        x = self.head_norm(x)
        x = F.dropout(x, self.drop_rate, self.training) if self.drop_rate else x
        return x if pre_logits else self.head(x)

    def get_classifier(self) -> nn.Module:
        """The head: a linear layer, or the identity."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Pool | None = None) -> None:
        """Puts a new head in, on the device and in the dtype of the old one, scaled by ``head_init_scale``.

        Args:
            num_classes: its width; 0 leaves features.
            global_pool: changes the pooling; None keeps it.

        Raises:
            SchemeError: an unknown pooling, or a head over an unpooled map.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in get_args(Pool):
            raise SchemeError(f"global_pool is {pool!r}, want 'avg', 'max' or ''.")
        if num_classes and not pool:
            raise SchemeError(
                f"global_pool='' gives a map, and {num_classes} classes need a pooled one: num_classes=0."
            )
        self.global_pool: Pool = pool
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            like = next(self.parameters())
            self.head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            self.init_head(self.head)
            with torch.no_grad():
                self.head.weight.mul_(self.head_init_scale)
                self.head.bias.mul_(self.head_init_scale)

    def init_head(self, head: nn.Linear) -> None:
        """Draws a new head; torch's weights and a bias of zero unless a subclass says otherwise."""
        nn.init.zeros_(head.bias)

    def key_map(self, keys: Collection[str]) -> KeyMap | None:
        """Names of published keys here; None for an unknown layout."""
        return None


def check_rates(**rates: float) -> None:
    """Raises SchemeError unless every rate is in [0, 1)."""
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise SchemeError(f"{name} is {rate}: want 0 <= rate < 1.")
