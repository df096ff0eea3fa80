"""What every classifier shares: pooling, a head that can be replaced, and dropout between the two."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemes import SchemeError

from ..layers.column import Classifier, pooled

Pool = Literal["avg", "max", ""]
ColumnPool = Literal["avg", ""]


class HeadNet(nn.Module, ABC):
    """A network with a head: x -> ``forward_features`` -> pooling -> dropout -> head.

    A subclass sets ``num_features`` and ``drop_rate``, makes its layers, and then calls ``reset_classifier``.

    Attributes:
        pools: kinds of pooling; "" leaves the features as they are, and has no head.
        unpooled: what the features are without pooling, and what a head wants instead; for the message.
        head_init_scale: factor of a new head's weights.
    """

    pools: ClassVar[tuple[str, ...]] = get_args(Pool)
    unpooled: ClassVar[tuple[str, str]] = ("a map", "a pooled one")

    num_features: int
    num_classes: int
    global_pool: str
    drop_rate: float
    head_init_scale: float = 1.0
    feature_info: list[dict[str, Any]]
    head: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, num_classes), or features where there is no head. x: (n, in_chans, h, w)."""
        return self.forward_head(self.forward_features(x))

    @abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """What is pooled: a map (n, num_features, h', w'), or tokens (n, t, num_features)."""

    def pool(self, x: Tensor) -> Tensor:
        """Pools what ``forward_features`` gives: (n, num_features)."""
        return x.mean((2, 3)) if self.global_pool == "avg" else x.amax((2, 3))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools, drops out and classifies what ``forward_features`` gives; ``pre_logits`` stops before the head.

        Without pooling it comes back as it is.
        """
        if not self.global_pool:
            return x
        x = self.pool(x)
        x = F.dropout(x, self.drop_rate, self.training) if self.drop_rate else x
        return x if pre_logits else self.head(x)

    def get_classifier(self) -> nn.Module:
        """The head, or the identity."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Puts a new head in, on the device and in the dtype of the network, scaled by ``head_init_scale``.

        Args:
            num_classes: its width; 0 leaves features.
            global_pool: one of ``pools`` changes the pooling; None keeps it.

        Raises:
            SchemeError: an unknown pooling, or a head over what is not pooled.
        """
        pool = self.global_pool if global_pool is None else global_pool
        if pool not in self.pools:
            *others, last = map(repr, self.pools)
            raise SchemeError(f"global_pool is {pool!r}, want {', '.join(others)} or {last}.")
        if num_classes and not pool:
            given, wanted = self.unpooled
            raise SchemeError(f"global_pool='' gives {given}, and {num_classes} classes need {wanted}: num_classes=0.")
        self.global_pool = pool
        self.num_classes = num_classes
        self.head = self.make_head(num_classes) if num_classes else nn.Identity()

    def make_head(self, num_classes: int) -> nn.Module:
        """A linear layer with new weights."""
        like = next(self.parameters())
        head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
        self.init_head(head)
        with torch.no_grad():
            head.weight.mul_(self.head_init_scale)
            head.bias.mul_(self.head_init_scale)
        return head

    def init_head(self, head: Any) -> None:
        """Draws a new head's weights; torch's own unless a subclass says otherwise."""


class ColumnNet(HeadNet):
    """A network of columns, whose head is a ``Classifier``: the mean, then norm, dropout and linear layer."""

    pools = get_args(ColumnPool)

    def pool(self, x: Tensor) -> Tensor:
        return pooled(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools and classifies what ``forward_features`` gives; ``pre_logits`` stops before norm and head."""
        if not self.global_pool:
            return x
        x = self.pool(x)
        return self.head.from_pooled(x) if isinstance(self.head, Classifier) and not pre_logits else x

    def make_head(self, num_classes: int, drop_rate: float | None = None) -> nn.Module:
        """Norm, dropout and linear layer with new weights; ``drop_rate`` is the network's unless it is given."""
        rate = self.drop_rate if drop_rate is None else drop_rate
        head = Classifier(self.num_features, num_classes, rate).to(next(self.parameters()))
        self.init_head(head)
        return head
