"""RevCol's coupling: a column is a step, its levels are streams of different shapes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .coupling import Coupling, Update, scaled
from .deprecation import renamed_names
from .errors import SchemeError
from .scheme import Function, Scheme, Slot, State, StepSize, limit_functions

__getattr__ = renamed_names(__name__, globals(), {"RevCol": "RevColCoupling"})


class _Column(Coupling):
    """The common base of the first column and the later ones."""

    streams = 1  # init makes the stem; the first column makes the levels

    def __init__(self, levels: int, growth: int, huge: bool):
        self.levels, self.growth, self.huge = levels, growth, huge
        self.stages = self.evaluations = levels
        # A column is one point in time: its levels are resolutions, not times.
        self.nodes = (0.0,) * levels

    def readout(self, state: State) -> Tensor:
        """The last level."""
        return state[-1]

    def state_from_output(self, y: Tensor) -> State:
        raise SchemeError(f"{self}: its output does not determine its streams; invert from Stack.final_state(x).")

    def _widths(self, stem: int) -> tuple[int, ...]:
        return tuple(stem * self.growth**level for level in range(self.levels))

    def __str__(self) -> str:
        given = [str(self.levels)] if self.levels != 4 else []
        given += [f"growth={self.growth}"] if self.growth != 2 else []
        given += ["huge=true"] if self.huge else []
        return f"revcol({', '.join(given)})" if given else "revcol"


class FirstColumn(_Column):
    """The first column: it makes the levels one from the other, x_l = h F_l(x_{l-1}), x_{-1} being the stem.

    There is no column before it, so nothing comes from above and nothing is scaled; its inverse drops the levels.

    Args:
        levels: number of levels that it makes.
        growth: as in ``RevColCoupling``.
        huge: as in ``RevColCoupling``.
    """

    def __init__(self, levels: int, growth: int, huge: bool):
        super().__init__(levels, growth, huge)
        self.streams_added = levels

    def updates(self, fs: Sequence[Function], h: StepSize, streams: int) -> list[Update]:
        def update(level: int) -> Update:
            # Its source is the stream that the previous update has just appended.
            return Update(level + 1, lambda s: (1.0, scaled(h, fs[level](s[level]))), appends=True)

        return [update(level) for level in range(self.levels)]

    def shape_of(self, i: int, streams: tuple[torch.Size, ...]) -> torch.Size | None:
        return None

    def slots(self, n: int, streams: tuple[int, ...], out_channels: int | None = None) -> tuple[Slot, ...]:
        after = self.widths(n, streams)
        return tuple(Slot(n, i, (after[i],), after[i + 1]) for i in range(self.levels))

    def widths(self, n: int, streams: tuple[int, ...], out_channels: int | None = None) -> tuple[int, ...]:
        return (streams[0], *self._widths(streams[0]))


class RevColCoupling(_Column):
    """RevCol's coupling: x_l <- alpha_l x_l + h F_l(x_{l-1} of this column, x_{l+1} of the last column).

    Streams: the stem's output x_{-1}, which no column changes, then one per level, from fine to coarse. A step is a
    column. Function l is given the new level below and the old level above as separate arguments; the last level has
    none above, and the first column (``at(0)``) has none at all, since it makes the levels. The alphas are shortcuts,
    one per level and later column: invertible modules such as a learned scale per channel; without them alpha is 1.
    ``readout`` is the last level.

    Cost: one residual function per level and column, 1 + ``levels`` streams. Inverse: closed form, from the last level
    to the first; it amplifies by 1/|alpha| a column, and more where the functions are steep (two- to fourfold a column
    at alpha = 0.5), so that many columns need anchors.

    Args:
        levels: number of levels.
        growth: ``slots`` requires widths of stem * growth^level; hand-written functions may have any.
        huge: whether function 0 is also given the previous column's last level, as its third argument (RevCol-H); from
            3 levels on.

    Raises:
        SchemeError: no level, or too few of them for ``huge``.

    Source:
        Cai et al. 2023, Reversible Column Networks, arXiv 2212.11696, equation 2 and section 2.2.

    Example:
        >>> import schemes
        >>> revcol = schemes.get("revcol")
        >>> [slot.in_channels for slot in revcol.at(1).slots(1, (64, 64, 128, 256, 512))]
        [(64, 128), (64, 256), (128, 512), (256,)]
    """

    examples = ("revcol", "revcol(1)", "revcol(3, growth=1)", "revcol(3, huge=true)")

    def __init__(self, levels: int = 4, growth: int = 2, huge: bool = False):
        if not isinstance(huge, bool):
            raise SchemeError(f"revcol: huge is {huge!r}, want true or false.")
        least = 3 if huge else 1
        for name, number, low in (("levels", levels, least), ("growth", growth, 1)):
            if isinstance(number, bool) or not isinstance(number, int) or number < low:
                raise SchemeError(f"revcol: {name} is {number}, want a whole number of at least {low}.")
        limit_functions("revcol", levels)
        super().__init__(levels, growth, huge)
        self.shortcuts = levels
        self.first = FirstColumn(levels, growth, huge)

    def at(self, n: int) -> Scheme:
        return self if n else self.first

    def _sources(self, level: int) -> tuple[int, ...]:
        """The streams that the function of a level is given."""
        # Streams are counted from the stem, so that the level below is stream ``level`` and the one above ``level +
        # 2``.
        sources = (level,) if level == self.levels - 1 else (level, level + 2)
        return (*sources, self.levels) if self.huge and level == 0 else sources

    def updates(self, fs: Sequence[Function], h: StepSize, streams: int) -> list[Update]:
        if streams != self.levels + 1:
            raise SchemeError(f"{self}: {streams} streams, want the stem and {self.levels} levels; begin with at(0).")

        def update(level: int) -> Update:
            f, sources = fs[level], self._sources(level)
            return Update(level + 1, lambda s: (1.0, scaled(h, f(*(s[i] for i in sources)))), shortcut=level)

        return [update(level) for level in range(self.levels)]

    def shape_of(self, i: int, streams: tuple[torch.Size, ...]) -> torch.Size | None:
        return streams[i + 1]

    def slots(self, n: int, streams: tuple[int, ...], out_channels: int | None = None) -> tuple[Slot, ...]:
        return tuple(
            Slot(n, i, tuple(streams[j] for j in self._sources(i)), streams[i + 1]) for i in range(self.levels)
        )
