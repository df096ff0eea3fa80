"""What the maps of a network are: a row each of width, reduction and the module that gives it."""

from collections.abc import Sequence
from typing import Any

from schemes import SchemeError


class FeatureInfo(list[dict[str, Any]]):
    """Rows ``{"num_chs", "reduction", "module"}``, fine to coarse; a list that is asked as timm's is.

    Example:
        >>> info = FeatureInfo([{"num_chs": 8, "reduction": 4, "module": "levels.0"}])
        >>> info.channels(), info.reduction(), info.module_name()
        ([8], [4], ['levels.0'])
    """

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        """The widths of the maps: of all, of some, or of one.

        Args:
            idx: numbers of maps, or one; None: all.
        """
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        """Pixels of the picture per pixel of each map.

        Args:
            idx: numbers of maps, or one; None: all.
        """
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        """The modules that give the maps.

        Args:
            idx: numbers of maps, or one; None: all.
        """
        return self.get("module", idx)

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """One entry of all rows (None), of some, or of one.

        Args:
            key: such as ``"num_chs"``.
            idx: numbers of maps, or one; None: all.
        """
        if isinstance(idx, int):
            return self[idx][key]
        return [self[i][key] for i in (range(len(self)) if idx is None else idx)]


def place(row: dict[str, Any]) -> int:
    """Which of a network's maps a row is of: the level's number in its list, unless the row says otherwise."""
    return int(row.get("map", row["module"].rpartition(".")[2]))


def chosen(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Numbers of maps: None is all, a number the last so many, negative ones count from the end.

    Raises:
        SchemeError: one that is out of range.

    Example:
        >>> chosen(2, 4), chosen((0, -1), 4), chosen(None, 2)
        ([2, 3], [0, 3], [0, 1])
    """
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        given, found = indices, list(range(count - indices, count))
    else:
        given, found = tuple(indices), [i + count if i < 0 else i for i in indices]
    if not found or min(found) < 0 or max(found) >= count:
        raise SchemeError(f"indices is {given}, of {count} maps; want numbers from 0 to {count - 1}, or how many.")
    return found
