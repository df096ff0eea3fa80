"""Descriptions of a network's maps: for each a row of its width, its reduction and the module that returns it."""

from collections.abc import Sequence
from typing import Any

from schemes import SchemeError


class FeatureInfo(list[dict[str, Any]]):
    """Rows ``{"num_chs", "reduction", "module"}``, fine to coarse: a list with the methods of timm's.

    Example:
        >>> info = FeatureInfo([{"num_chs": 8, "reduction": 4, "module": "levels.0"}])
        >>> info.channels(), info.reduction(), info.module_name()
        ([8], [4], ['levels.0'])
    """

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        """Returns the widths of the maps: of all, of some, or of one.

        Args:
            idx: numbers of maps, or one; None means all.
        """
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        """Returns the pixels of the picture per pixel of each map, in height and width.

        Args:
            idx: numbers of maps, or one; None means all.
        """
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        """Returns the names of the modules that compute the maps.

        Args:
            idx: numbers of maps, or one; None means all.
        """
        return self.get("module", idx)

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """Returns one entry of all rows (None), of some, or of one.

        Args:
            key: such as ``"num_chs"``.
            idx: numbers of maps, or one; None means all.
        """
        if isinstance(idx, int):
            return self[idx][key]
        return [self[i][key] for i in (range(len(self)) if idx is None else idx)]


def place(row: dict[str, Any]) -> int:
    """Returns the number of the map that a row describes: the level's number in its list, unless it has its own."""
    return int(row.get("map", row["module"].rpartition(".")[2]))


def chosen(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """Returns the numbers of maps: None means all, an integer n the last n; negative numbers count from the end.

    Raises:
        SchemeError: a number that is out of range.

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
