"""The base of every network of levels: stem, levels with a transition before each, norms, pooling, head."""

from collections.abc import Callable, Collection
from typing import Any, ClassVar

from torch import Tensor, nn

from ..checkpoints import KeyMap
from .depth import level_depths
from .head import HeadNet
from .levels import made_continuous


class LevelNet(HeadNet):
    """A network of levels: x -> stem -> (transition -> level) ... -> norm -> pooling -> head norm -> dropout -> head.

    A subclass builds ``stem``, ``transitions`` and ``levels`` (as many of each), may set ``norm`` (on the map) and
    ``head_norm`` (on the pooled features), and then calls ``finish_levels``. State-dict keys: ``stem.*``,
    ``transitions.{l}.*``, ``levels.{l}.steps.{n}.fs.{i}.*``, ``norm.*``, ``head_norm.*``, ``head.*``.

    Args:
        head: as in ``HeadNet``.

    Attributes:
        depth_group: residual functions of a level that share a depth, in layer-wise learning-rate decay.
    """

    depth_group: ClassVar[int] = 1

    def __init__(self, **head: Any):
        super().__init__(**head)
        # Set in the order of the forward pass, before any layers exist: a name keeps the position at which it was first
        # set, so the order of parameters, on which optimiser states depend, is the same in all subclasses.
        self.stem: nn.Module = nn.Identity()
        self.transitions = nn.ModuleList()
        self.levels = nn.ModuleList()
        self.norm: nn.Module = nn.Identity()
        self.head_norm: nn.Module = nn.Identity()
        self.head: nn.Module = nn.Identity()

    def finish_levels(
        self,
        channels: list[int],
        reductions: list[int],
        init: Callable[[nn.Module], Any] | None = None,
        continuous: int | None = None,
        degree: int = 1,
    ) -> None:
        """Records the levels' maps and builds the head.

        Args:
            channels: width after each level.
            reductions: stride after each level.
            init: draws the weights of the whole network, including the head's.
            continuous: number of knots; the weights of shared levels, once they are drawn, become functions of depth.
            degree: degree of their splines.
        """
        rows = zip(channels, reductions, strict=True)
        info = [{"num_chs": c, "reduction": r, "module": f"levels.{i}"} for i, (c, r) in enumerate(rows)]
        # One map per resolution, the last: RDNet has several levels of one resolution.
        self.finish(list({row["reduction"]: row for row in info}.values()), init)
        # After the weights are drawn, since every knot starts as a copy of them.
        for level, stack in enumerate(self.levels):
            self.levels[level] = made_continuous(stack, continuous, degree)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last level's map, normalised where the model does so before pooling: (n, num_features, h', w')."""
        x = self.stem(self.picture(x))
        for transition, level in zip(self.transitions, self.levels, strict=True):
            x = level(transition(x))
        return self.norm(x)

    def maps(self, x: Tensor, last: int | None = None) -> list[Tensor]:
        """Returns the map after each level, up to level ``last``."""
        x = self.stem(self.picture(x))
        found = []
        for transition, level in zip(self.transitions, self.levels, strict=True):
            x = level(transition(x))
            found.append(x)
            if last is not None and len(found) > last:
                break
        return found

    def cut_levels(self, last: int) -> None:
        self.levels, self.transitions = self.levels[: last + 1], self.transitions[: last + 1]

    def features_and_maps(self, x: Tensor, norm: bool = False) -> tuple[Tensor, list[Tensor]]:
        found = self.maps(x)
        y = self.norm(found[-1])
        return y, [*found[:-1], y] if norm else found

    def pool(self, x: Tensor) -> Tensor:
        """Pools and normalises a map: (n, num_features)."""
        return self.head_norm(super().pool(x))

    def init_head(self, head: nn.Linear) -> None:
        """Initialises a new head: torch's weights and a bias of zero, unless a subclass overrides it."""
        nn.init.zeros_(head.bias)

    def parameter_depths(self) -> dict[str, int]:
        return level_depths(self, self.depth_group)

    def key_map(self, keys: Collection[str]) -> KeyMap | None:
        """Maps published keys to this network's; None for an unknown layout.

        Args:
            keys: all keys of a file.
        """
        return None
