"""What ConvNeXt, DenseNet and RDNet share: stem, levels with a transition before each, norms, pooling, head."""

from collections.abc import Collection

from torch import Tensor, nn

from schemes import SchemeError

from ..checkpoints import KeyMap
from .head import HeadNet, Pool


class LevelNet(HeadNet):
    """A network of levels: x -> stem -> (transition -> level) ... -> norm -> pooling -> head norm -> dropout -> head.

    A subclass makes ``stem``, ``transitions`` and ``levels`` (as many of each), may set ``norm`` (on the map) and
    ``head_norm`` (on what is pooled), and then calls ``finish``. State-dict keys: ``stem.*``, ``transitions.{l}.*``,
    ``levels.{l}.steps.{n}.fs.{i}.*``, ``norm.*``, ``head_norm.*``, ``head.*``.
    """

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

    def pool(self, x: Tensor) -> Tensor:
        """Pools and normalises a map: (n, num_features)."""
        return self.head_norm(super().pool(x))

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
