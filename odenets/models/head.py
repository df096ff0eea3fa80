"""The base of every classifier: options of picture and head, pooling, a replaceable head, and dropout."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemes import SchemeError

from ..layers.column import NormedHead
from ..tracing import is_traced
from .conventions import Conventions
from .feature_info import FeatureInfo

Pool = Literal["avg", "max", ""]
ColumnPool = Literal["avg", ""]


def check_choices(**given: tuple[str, Any]) -> None:
    """Raises SchemeError for an option that is not one of its type's literals: name=(value, type)."""
    for what, (value, kind) in given.items():
        if value not in get_args(kind):
            raise SchemeError(f"{what} is {value!r}, want {' or '.join(get_args(kind))}.")


def check_rates(**rates: float) -> None:
    """Raises SchemeError unless every rate is in [0, 1)."""
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise SchemeError(f"{name} is {rate}: want 0 <= rate < 1.")


def _signature(kind: type) -> inspect.Signature:
    """Returns the options of a class: its constructor's, then those that the constructor passes on to the next one."""
    found: dict[str, inspect.Parameter] = {}
    # A class names its own options and passes on the others, so the source has no complete list.
    for k in kind.__mro__:
        if (init := k.__dict__.get("__init__")) is None:
            continue
        own = list(inspect.signature(init).parameters.values())[1:]
        handed_on = [p for p in own if p.kind is p.VAR_KEYWORD]
        rest = [p for p in own if p not in handed_on and p.name not in found]
        found |= {p.name: p.replace(kind=p.KEYWORD_ONLY) if found else p for p in rest}
        # This constructor passes nothing on, so options of its bases cannot be given.
        if not handed_on:
            break
    # After one keyword-only parameter, all that follow must be keyword-only.
    return inspect.Signature(sorted(found.values(), key=lambda p: p.kind))


class HeadNet(Conventions, ABC):
    """A network with a head: x -> ``forward_features`` -> pooling -> dropout -> head.

    The options that all these networks share are defined once, in this constructor: a subclass names its own options
    and those whose defaults differ, and passes on the others (``**head``). It builds its layers, then calls ``finish``.

    Args:
        num_classes: width of the head; 0 returns features.
        in_chans: channels of the picture.
        global_pool: "avg", "max", or "" for the unpooled ``forward_features`` (without a head).
        drop_rate: dropout rate before the head.
        drop_path_rate: stochastic depth at the last residual function, growing from 0 over the depth; in networks of
            columns it grows over the blocks of one column, alike in every column.
        head_init_scale: factor of a new head's weights; 0.001 for fine-tuning.
        pad: whether a picture whose sides are not multiples of ``reduction`` is padded with zeros, right and below;
            otherwise it is rejected where the network needs such sides, and taken as it is elsewhere.

    Attributes:
        pools: kinds of pooling; "" leaves the features as they are, and has no head.
        unpooled: what the features are without pooling, and what a head needs instead; for the error message.
        whole: whether the picture's sides must be multiples of ``reduction``.
        least: the smallest side that leaves a pixel of the last map.

    Raises:
        SchemeError: a rate outside [0, 1), an unknown pooling, or a head on unpooled features.
    """

    pools: ClassVar[tuple[str, ...]] = get_args(Pool)
    unpooled: ClassVar[tuple[str, str]] = ("a map", "a pooled one")
    whole: ClassVar[bool] = False

    head: nn.Module
    least: int = 1
    __signature__: ClassVar[inspect.Signature]

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: Pool = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        head_init_scale: float = 1.0,
        pad: bool = False,
    ):
        super().__init__()
        check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, str(global_pool)
        self.drop_rate, self.drop_path_rate = drop_rate, drop_path_rate
        self.head_init_scale, self.pad = head_init_scale, pad

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # So that ``help``, configuration files and their errors know all options of a model.
        cls.__signature__ = _signature(cls)

    def finish(self, features: list[dict[str, Any]], init: Callable[[nn.Module], Any] | None = None) -> None:
        """Records the network's maps and builds the head; every constructor ends with it.

        Args:
            features: ``feature_info``, a row of width, reduction and module for each map, fine to coarse.
            init: draws the weights of the whole network, including the head's.
        """
        self.feature_info = FeatureInfo(features)
        self._features_are(features[-1])
        # In this order: `init` draws the head's weights too, and would undo a scaling before it.
        self._put_head(self.num_classes, self.global_pool)
        if init is not None:
            init(self)
        self._scale_head()

    def _features_are(self, row: Mapping[str, Any]) -> None:
        super()._features_are(row)
        self._reduction: int = row["reduction"]

    @property
    def reduction(self) -> int:
        """Pixels of the picture per pixel of the features, in height and width."""
        return self._reduction

    def picture(self, x: Tensor) -> Tensor:
        """Returns the picture as the stem takes it: padded where the network pads, else checked.

        Args:
            x: (n, c, h, w).

        Raises:
            SchemeError: sides that the network cannot take.
        """
        height, width = x.shape[-2:]
        reduction = self.reduction
        if self.pad:
            # In a trace the padding is always recorded, even if empty: a branch would be right for one size only.
            below, right = -height % reduction, -width % reduction
            return F.pad(x, (0, right, 0, below)) if is_traced(x) or below or right else x
        if is_traced(x):
            return x
        if self.whole and not self._fits(height, width):
            raise SchemeError(
                f"{type(self).__name__}: the picture is {height} x {width}; want multiples of {reduction}.\n"
                "  Resize it, or let the network pad it with zeros: pad=True."
            )
        # Not under a compiler, where a comparison of sizes would be compiled in, once for each size.
        if self.least > 1 and not torch.compiler.is_compiling() and min(height, width) < self.least:
            raise SchemeError(
                f"{type(self).__name__}: the picture is {height} x {width}; want at least {self.least} x {self.least}."
                "\n  Resize it, or let the network pad it with zeros: pad=True."
            )
        return x

    def _fits(self, height: int, width: int) -> bool:
        return height % self.reduction == width % self.reduction == 0

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, num_classes), or features where there is no head. x: (n, in_chans, h, w)."""
        return self.forward_head(self.forward_features(x))

    @abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """Returns the features before pooling: a map (n, num_features, h', w'), or tokens (n, t, num_features).

        Args:
            x: (n, c, h, w).
        """

    @abstractmethod
    def maps(self, x: Tensor, last: int | None = None) -> list[Tensor]: ...

    def pool(self, x: Tensor) -> Tensor:
        """Pools the result of ``forward_features``: (n, num_features).

        Args:
            x: the result of ``forward_features``.
        """
        return x.mean((2, 3)) if self.global_pool == "avg" else x.amax((2, 3))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Applies pooling, dropout and head to the result of ``forward_features``.

        Without pooling it is returned unchanged.

        Args:
            x: the result of ``forward_features``.
            pre_logits: whether to stop before the head.
        """
        if not self.global_pool:
            return x
        x = self.pool(x)
        x = F.dropout(x, self.drop_rate, self.training) if self.drop_rate else x
        return x if pre_logits else self.head(x)

    def get_classifier(self) -> nn.Module:
        """Returns the head, or the identity where there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head, in the network's mode, dtype and on its device, scaled by ``head_init_scale``.

        Args:
            num_classes: the new head's width; 0 leaves features.
            global_pool: one of ``pools`` changes the pooling; None keeps it.

        Raises:
            SchemeError: an unknown pooling, or a head on unpooled features.
        """
        self._put_head(num_classes, self.global_pool if global_pool is None else global_pool)
        self._scale_head()

    def _put_head(self, num_classes: int, pool: str) -> None:
        if pool not in self.pools:
            *others, last = map(repr, self.pools)
            raise SchemeError(f"global_pool is {pool!r}, want {', '.join(others)} or {last}.")
        if num_classes and not pool:
            given, wanted = self.unpooled
            raise SchemeError(f"global_pool='' gives {given}, and {num_classes} classes need {wanted}: num_classes=0.")
        self.global_pool = pool
        self.num_classes = num_classes
        # In the network's mode: dropout of a new head must not act in a network in evaluation.
        self.head = (self.make_head(num_classes) if num_classes else nn.Identity()).train(self.training)

    def _scale_head(self) -> None:
        if self.head_init_scale != 1:
            with torch.no_grad():
                for m in (m for head in self._heads() for m in head.modules()):
                    if isinstance(m, nn.Linear):
                        m.weight.mul_(self.head_init_scale)
                        m.bias.mul_(self.head_init_scale)

    def _heads(self) -> Sequence[nn.Module]:
        """The heads that ``_put_head`` builds."""
        return [self.head]

    def make_head(self, num_classes: int) -> nn.Module:
        """Returns a linear layer with new weights.

        Args:
            num_classes: number of its outputs.
        """
        # A new head has the network's device and dtype.
        like = next(self.parameters())
        head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
        self.init_head(head)
        return head

    def init_head(self, head: Any) -> None:
        """Draws a new head's weights; keeps torch's unless a subclass overrides it.

        Args:
            head: the layer.
        """


class ColumnNet(HeadNet):
    """A network of columns, whose head is a ``NormedHead``: the mean, then norm, dropout and linear layer.

    Args:
        global_pool: "avg", or "" for the last level (without a head).
        head: as in ``HeadNet``.
    """

    classifier = "head.fc"
    pools = get_args(ColumnPool)
    whole = True

    def __init__(self, global_pool: ColumnPool = "avg", **head: Any):
        super().__init__(global_pool=global_pool, **head)

    def pool(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools and classifies the result of ``forward_features``; ``pre_logits`` stops before norm and head."""
        if not self.global_pool:
            return x
        x = self.pool(x)
        return self.head.from_pooled(x) if isinstance(self.head, NormedHead) and not pre_logits else x

    def make_head(self, num_classes: int, drop_rate: float | None = None) -> nn.Module:
        """Returns norm, dropout and linear layer with new weights; ``drop_rate`` defaults to the network's."""
        rate = self.drop_rate if drop_rate is None else drop_rate
        head = NormedHead(self.num_features, num_classes, rate).to(next(self.parameters()))
        self.init_head(head)
        return head
