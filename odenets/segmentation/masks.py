"""Converts mask pictures to class numbers, by their values or their colours.

A mask is read as stored: palette (mode P), 16-bit and 32-bit pictures hold numbers, and an RGB picture holds colours
unless all its pixels are grey. Transparent pixels are rejected, and colours of more than 8 bits a channel too. The
values are then mapped to classes. Three examples:

* ADE20K stores 0 for pixels without a class, and class c as c + 1: ``Labels(150, reduce=True)``;
* Cityscapes stores 34 kinds, of which 19 count, class 0 as 7: ``Labels(19, ids=[7, 8, 11, ...])``;
* VOC's coloured masks: ``Labels(21, palette=[[0, 0, 0], [128, 0, 0], ...], ignore_colors=[[224, 224, 192]])``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..training.decode import Picture, Unreadable
from ..training.errors import DataError
from ..training.order import IGNORED

LARGEST = 1 << 15  # classes are stored as int16


class Labels:
    """The mapping from the values of masks to classes.

    Args:
        count: the number of classes.
        ignore: values of pixels that do not count; None: 255, unless that is a class.
        reduce: whether 0 does not count and class c is stored as c + 1.
        ids: the value of each class in order; all others do not count. None: class c is stored as c.
        palette: the colour of each class in order, for masks in colour; the options above are for masks of numbers.
        ignore_colors: colours of pixels that do not count, beside a palette.

    Raises:
        DataError: options are invalid or contradict each other.

    Example:
        >>> import numpy as np
        >>> labels = Labels(3, reduce=True)
        >>> labels.classes_of(np.array([[0, 1], [3, 255]]))
        array([[-100,    0],
               [   2, -100]], dtype=int16)
    """

    def __init__(
        self,
        count: int,
        ignore: Sequence[int] | None = None,
        reduce: bool = False,
        ids: Sequence[int] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        ignore_colors: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if not 2 <= count <= LARGEST:
            raise DataError(f"data.classes: {count} classes\n  Give 2 or more, and at most {LARGEST:,}")
        if reduce and ids is not None:
            raise DataError("data.reduce_labels and data.ids both say how classes are stored\n  Give one of them")
        _check_kind({"ids": ids is not None, "reduce_labels": reduce, "ignore": bool(ignore)}, palette, ignore_colors)
        for option, given in (("ids", ids), ("palette", palette)):
            if given is not None and len(given) != count:
                raise DataError(f"data.{option} has {len(given)} entries for {count} classes\n  Give one for each")
        if ids is not None and len(set(ids)) != len(ids):
            raise DataError("data.ids: two classes have one value\n  Give each class its own")
        self.count, self.others = count, ids is not None
        self.ids = list(ids) if ids is not None else list(range(int(reduce), count + int(reduce)))
        clash = set(self.ids) & set(ignore or ())
        if clash:
            raise DataError(f"data.ignore: {min(clash)} is the value of a class\n  Change data.ignore or data.ids")
        # Most data sets store 255 for pixels without a class, unless it is itself a class.
        given_up = (0,) * reduce + tuple((255,) if ignore is None else ignore)
        self.ignore = tuple(value for value in dict.fromkeys(given_up) if value not in self.ids)
        self.colors = None if palette is None else _keys(palette, "palette")
        self.ignore_colors = _keys(ignore_colors or [], "ignore_colors")
        if self.colors is not None and len(np.unique(self.colors)) != count:
            raise DataError("data.palette: two classes have one colour\n  Give each class its own")
        if self.colors is not None and (both := np.intersect1d(self.colors, self.ignore_colors)).size:
            raise DataError(
                f"data.ignore_colors: {_color(both[0])} is the colour of a class\n"
                "  Change data.ignore_colors or data.palette"
            )

    def read(self, encoded: bytes | str, size: tuple[int, int]) -> NDArray[np.int16]:
        """Returns the class of each pixel (h, w); -100 for a pixel that does not count.

        Args:
            encoded: the stored mask, or its path.
            size: width and height of the picture that it belongs to.

        Raises:
            Unreadable: the mask cannot be decoded, differs in size from the picture, or holds values that are no class.
        """
        try:
            picture = Picture(encoded)
            image = picture.image
            # Pillow decodes lazily; its errors are to be caught here.
            image.load()
            # Turned upright like its picture.
            image = image if picture.turn is None else image.transpose(picture.turn)
        except Unreadable as e:
            raise Unreadable(f"its mask: {e}") from None
        except Exception as e:  # truncated and damaged data may raise any exception
            raise Unreadable(f"its mask: {type(e).__name__}: {e}") from None
        if image.size != size:
            raise Unreadable(f"its mask is {image.size[0]}x{image.size[1]}, and the picture {size[0]}x{size[1]}")
        if picture.halved:  # from 16 to 8 bits, where all small numbers have become 0
            raise Unreadable("its mask is in colour of 16 bits a channel, want 8, or grey of 16")
        return self.classes_of(_numbers(image)) if self.colors is None else self._by_color(_levels(image))

    def classes_of(self, values: NDArray[Any]) -> NDArray[np.int16]:
        """Maps stored values to classes."""
        # Few values, many pixels: a lookup table of values avoids a loop over pixels.
        there = np.unique(values)
        known = {**dict.fromkeys(self.ignore, IGNORED), **{value: c for c, value in enumerate(self.ids)}}
        unknown = [int(value) for value in there if int(value) not in known]
        if unknown and not self.others:
            beside = f", beside {_some(self.ignore)}" if self.ignore else ""
            raise Unreadable(f"its mask holds {_some(unknown)}; classes are {self.ids[0]} to {self.ids[-1]}{beside}")
        classes = np.array([known.get(int(value), IGNORED) for value in there], dtype=np.int16)
        return classes[np.searchsorted(there, values)]

    def _by_color(self, levels: NDArray[np.uint8]) -> NDArray[np.int16]:
        assert self.colors is not None
        # Colours are compared as one number each; in 8 bits the product would overflow.
        keys = levels.astype(np.int32) @ _PLACES
        there = np.unique(keys)
        known = {
            **dict.fromkeys(self.ignore_colors.tolist(), IGNORED),
            **{key: c for c, key in enumerate(self.colors.tolist())},
        }
        unknown = [key for key in there.tolist() if key not in known]
        if unknown:
            named = _some([_color(key) for key in unknown])
            raise Unreadable(f"its mask holds the colour {named}, which is in no palette")
        return np.array([known[key] for key in there.tolist()], dtype=np.int16)[np.searchsorted(there, keys)]


def _check_kind(numbers: Mapping[str, bool], palette: Any, ignore_colors: Any) -> None:
    """Rejects options for masks of numbers, if they are given, beside a palette, and those of a palette without one."""
    for option, given in numbers.items():
        if given and palette is not None:
            raise DataError(
                f"data.palette is for masks in colour, data.{option} for masks of numbers\n"
                "  Give one of them; colours that do not count are data.ignore_colors"
            )
    if ignore_colors and palette is None:
        raise DataError("data.ignore_colors: masks are in colour only with data.palette\n  Give the palette too")


_PLACES = np.array([1 << 16, 1 << 8, 1], dtype=np.int32)


def _keys(colors: Sequence[Sequence[int]], option: str) -> NDArray[np.int32]:
    """Encodes each colour as one number."""
    for color in colors:
        if len(color) != 3 or not all(0 <= level <= 255 for level in color):
            raise DataError(f"data.{option}: {list(color)} is no colour\n  Give three levels, 0 to 255: [128, 0, 0]")
    return np.array(colors, dtype=np.int32).reshape(-1, 3) @ _PLACES


def _color(key: int) -> str:
    """Returns the colour that a number encodes, for messages."""
    return f"({key >> 16}, {key >> 8 & 255}, {key & 255})"


def _numbers(image: Image.Image) -> NDArray[Any]:
    """Returns the numbers that a mask stores; for a palette picture these are indices, not colours."""
    # The array of a palette picture holds its indices; converting it would give colours.
    if image.mode in ("1", "L", "P") or image.mode.startswith("I"):
        return np.asarray(image)
    if image.mode in ("LA", "RGB", "RGBA"):
        levels = _levels(image)
        # Many tools save numbers as RGB, with three equal channels.
        if (levels == levels[..., :1]).all():
            return levels[..., 0]
        raise Unreadable("its mask is in colour, and there is no data.palette")
    raise Unreadable(f"its mask is of mode {image.mode}, which stores no classes")


def _levels(image: Image.Image) -> NDArray[np.uint8]:
    """Returns the colours (h, w, 3) that a mask stores."""
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        raise Unreadable(f"its mask is of mode {image.mode}, which stores no colours")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        levels = np.asarray(image.convert("RGBA"))
        # A transparent black pixel may mean the first class or no class.
        if (levels[..., 3] < 255).any():
            raise Unreadable("its mask has transparent pixels, whose class is not known")
        return levels[..., :3]
    return np.asarray(image.convert("RGB"))


def _some(values: Sequence[Any]) -> str:
    """Abbreviates a list, as in `3, 4, 5 and 7 more`."""
    more = f" and {len(values) - 3} more" if len(values) > 3 else ""
    return ", ".join(map(str, values[:3])) + more


def colors(count: int) -> list[list[int]]:
    """Returns distinguishable colours, one for each class; the first is black.

    The bits of the class number, from the lowest, go to red, green and blue in turn, into their highest bits first, as
    in the colour map of VOC.

    Example:
        >>> colors(4)
        [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    """
    found = []
    for number in range(count):
        levels = [0, 0, 0]
        for place in range(8):
            for channel in range(3):
                levels[channel] |= (number >> (3 * place + channel) & 1) << (7 - place)
        found.append(levels)
    return found
