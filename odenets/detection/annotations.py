"""Reads a COCO file into arrays and checks it: pictures, boxes, classes, crowds, areas and masks.

Faulty entries are found when the file is opened, reported with their id and picture, and counted. They are left out;
beyond a limit the run ends with the list. Faults are a missing picture, an unknown picture or category, a box that is
empty or lies outside its picture, or a mask whose size differs from its picture's. A box that exceeds its picture by
more than a pixel is counted too, but stays: training clips it, evaluation takes it as the file has it.

A missing or null area defaults to that of the box, a missing or null ``iscrowd`` to 0. Annotations that share an id are
counted but stay: pycocotools would read the second of them twice.

Annotations go into arrays, and masks into one array of bytes, since worker processes copy Python objects page by page.
"""

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..extras import install
from ..training.errors import DataError

SLACK = 1.0  # pixels by which a rounded box may exceed its picture
LONGEST = 1 << 63  # integers from here on do not fit into arrays


def coco_tools() -> Any:
    """Imports the package ``pycocotools``.

    Raises:
        DataError: it is not installed.
    """
    try:
        import pycocotools.mask
    except ImportError:
        raise DataError(f"masks and average precision need pycocotools\n  {install('detect')}") from None
    return pycocotools


class Objects(NamedTuple):
    """The objects of one picture, in pixels of the picture as annotated.

    Attributes:
        boxes: float64 (k, 4), left, top, width, height as in the file.
        labels: int64 (k,), from 0 on.
        crowd: bool (k,), whether it is a region of many objects, for which no box is expected.
        area: float64 (k,), in pixels; evaluation classifies objects by it as small, medium or large.
        masks: bool (k, h, w); None if they are not read.
    """

    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    area: Tensor
    masks: Tensor | None


class Faults:
    """Collects the faulty entries of a file; ends the run with a list of them beyond `limit`.

    Args:
        path: the file that holds the entries.
        limit: how many entries may be faulty.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit = path, limit
        self.found: list[str] = []

    def add(self, what: str) -> None:
        """Records one.

        Args:
            what: the entry and its fault.
        """
        self.found.append(what)

    def settle(self) -> None:
        """Warns of the faults, or raises if there are too many.

        Raises:
            DataError: there are more than the limit.
        """
        if not self.found:
            return
        count, named = len(self.found), "; ".join(self.found[:20])
        more = f"; and {count - 20:,} more" if count > 20 else ""
        if count > self.limit:
            raise DataError(
                f"{self.path}: {count:,} entries are wrong: {named}{more}\n"
                f"  Mend them, or allow more than data.max_faults={self.limit}"
            )
        warnings.warn(
            f"{self.path}: {count:,} entries are wrong, data.max_faults={self.limit}: {named}{more}", stacklevel=3
        )


class Annotations:
    """The pictures of a COCO file and their objects.

    Args:
        path: the file.
        pictures: the folder that its file names are relative to.
        masks: whether masks are read; each annotation must then have one.
        max_faults: entries that may be faulty.

    Attributes:
        classes: names of the categories, in the order of their ids.
        category_ids: their ids.
        ids: ids of the pictures.

    Raises:
        DataError: the file is not a COCO file, or has more faulty entries than the limit.
    """

    def __init__(self, path: Path, pictures: Path, masks: bool = False, max_faults: int = 10) -> None:
        self.path, self.root, self.with_masks = path, pictures, masks
        held = _read(path)
        # Fails now, rather than when a worker reaches the first mask in the middle of an epoch.
        if masks:
            coco_tools()
        faults = Faults(path, max_faults)
        self.category_ids, self.classes = _categories(path, held["categories"])
        kept = self._pictures(held["images"], faults)
        self._annotations(held["annotations"], kept, faults)
        faults.settle()

    def _pictures(self, entries: Sequence[Any], faults: Faults) -> dict[int, int]:
        """Keeps the pictures whose files exist, and returns the place of each by its id."""
        listed: dict[str, set[str]] = {}
        kept: dict[int, int] = {}
        names, sizes = [], []
        self.missing: set[int] = set()
        for entry in entries:
            number, name, width, height = _picture(self.path, entry)
            if number in kept or number in self.missing:
                raise DataError(f"{self.path}: two pictures have the id {number}\n  Give each its own")
            folder, _, file = name.rpartition("/")
            if folder not in listed:  # one listing instead of a query for each of a hundred thousand files
                there = self.root / folder
                listed[folder] = set(os.listdir(there)) if there.is_dir() else set()
            if file not in listed[folder]:
                faults.add(f"picture {number}, {self.root / name}, is not there")
                self.missing.add(number)
                continue
            kept[number] = len(names)
            # numpy stores a character of a string in four bytes, and one of a bytes object in one.
            names.append(name.encode())
            sizes.append((height, width))
        if not names:
            faults.settle()
            raise DataError(f"{self.path}: it lists no pictures\n  Give another file, or data.root")
        self.ids = torch.tensor(list(kept), dtype=torch.long)
        self.files, self.sizes = np.array(names), torch.tensor(sizes, dtype=torch.long)
        return kept

    def _annotations(self, entries: Sequence[Any], kept: Mapping[int, int], faults: Faults) -> None:
        place = {number: label for label, number in enumerate(self.category_ids)}
        rows: list[tuple[int, int, bool, float, list[float]]] = []
        segments: list[bytes] = []
        seen: set[int | str] = set()
        for entry in entries:
            if not isinstance(entry, dict):
                faults.add(f"{str(entry)[:50]} is no annotation")
                continue
            picture: Any = entry.get("image_id")
            if isinstance(picture, int) and picture in self.missing:
                continue  # reported already, with its picture
            why = self._wrong(entry, kept, place)
            where = f" ({self.name(kept[picture])})" if isinstance(picture, int) and picture in kept else ""
            if why:
                faults.add(f"annotation {entry.get('id')}{where}: {why[0]}")
                # Faults of entries that stay count towards the limit as well.
                if why[1]:
                    continue
            number = entry.get("id")
            if isinstance(number, int | str):
                if number in seen:
                    faults.add(f"annotation {number}{where}: another one has this id")
                seen.add(number)
            box = [float(value) for value in entry["bbox"]]
            area = entry.get("area")
            crowd = bool(entry.get("iscrowd", 0))
            rows.append(
                (
                    kept[picture],
                    place[entry["category_id"]],
                    crowd,
                    box[2] * box[3] if area is None else float(area),
                    box,
                )
            )
            if self.with_masks:
                # As bytes: lists of coordinates would be millions of Python objects.
                segments.append(json.dumps(entry["segmentation"]).encode())
        self._arrange(rows, segments)

    def _arrange(self, rows: Sequence[tuple[int, int, bool, float, list[float]]], segments: list[bytes]) -> None:
        """Puts the annotations into arrays, in the order of the pictures."""
        order = sorted(range(len(rows)), key=lambda i: rows[i][0])  # stable: keeps the file's order within a picture
        at = np.array([rows[i][0] for i in order], dtype=np.int64)
        # For a picture without objects start and end coincide, so it needs no special case.
        edges = np.searchsorted(at, np.arange(len(self.ids) + 1))
        self.starts, self.ends = edges[:-1], edges[1:]
        self.labels = np.array([rows[i][1] for i in order], dtype=np.int64)
        self.crowd = np.array([rows[i][2] for i in order], dtype=bool)
        self.areas = np.array([rows[i][3] for i in order], dtype=np.float64)
        self.boxes = np.array([rows[i][4] for i in order], dtype=np.float64).reshape(-1, 4)
        segments = [segments[i] for i in order] if self.with_masks else []
        self.segments = np.frombuffer(b"".join(segments), dtype=np.uint8)
        self.segment_ends = np.cumsum([0, *map(len, segments)])

    def _wrong(
        self, entry: Mapping[str, Any], kept: Mapping[int, int], place: Mapping[int, int]
    ) -> tuple[str, bool] | None:
        """The fault of an annotation and whether it is left out because of it; None if there is none."""
        picture, category, box = (entry.get(key) for key in ("image_id", "category_id", "bbox"))
        # A bool would pass for an id, since true equals 1; a string such as "0" would pass for a true iscrowd.
        if isinstance(picture, bool) or not isinstance(picture, int) or picture not in kept:
            return f"no picture has the id {picture}", True
        if isinstance(category, bool) or not isinstance(category, int) or category not in place:
            return f"no category has the id {category}", True
        area, crowd = entry.get("area"), entry.get("iscrowd")
        # A negative area lies in none of the size ranges, and evaluation would silently skip the object.
        if area is not None and (not _number(area) or area < 0):
            kind = " (a text)" if isinstance(area, str) else ""
            return f"its area is {area}{kind}, want a number, 0 or more", True
        if crowd not in (0, 1, None):
            return f"its iscrowd is {crowd!r}, want 0 or 1", True
        height, width = self.sizes[kept[picture]].tolist()
        if not isinstance(box, list) or len(box) != 4 or not all(_number(value) for value in box):
            return f"its box is {box}", True
        left, top, wide, high = box
        if wide <= 0 or high <= 0:
            return f"its box {box} is empty", True
        if left >= width or top >= height or left + wide <= 0 or top + high <= 0:
            return f"its box {box} lies outside the {width}x{height} pixels", True
        if self.with_masks and (why := _wrong_mask(entry.get("segmentation"), height, width)):
            return why, True
        if min(left, top) < -SLACK or left + wide > width + SLACK or top + high > height + SLACK:
            return f"its box {box} sticks out of the {width}x{height} pixels", False
        return None

    def __len__(self) -> int:
        return len(self.ids)

    def name(self, i: int) -> str:
        """The file of picture i.

        Args:
            i: the number of the picture, from 0.
        """
        return self.files[i].decode()

    def encoded(self, i: int) -> str:
        """The path of picture i.

        Args:
            i: the number of the picture, from 0.
        """
        return str(self.root / self.name(i))

    def objects(self, i: int) -> Objects:
        """The objects on picture i.

        Args:
            i: the number of the picture, from 0.
        """
        rows = slice(int(self.starts[i]), int(self.ends[i]))
        arrays = (self.boxes[rows], self.labels[rows], self.crowd[rows], self.areas[rows])
        # Copies: an in-place write to a target must not change what the next epoch reads.
        boxes, labels, crowd, area = (torch.from_numpy(array.copy()) for array in arrays)
        masks = self._masks(i, rows) if self.with_masks else None
        return Objects(boxes, labels, crowd, area, masks)

    def _masks(self, i: int, rows: slice) -> Tensor:
        height, width = self.sizes[i].tolist()
        masks = torch.zeros(rows.stop - rows.start, height, width, dtype=torch.bool)
        for k, row in enumerate(range(rows.start, rows.stop)):
            stored = self.segments[self.segment_ends[row] : self.segment_ends[row + 1]].tobytes()
            masks[k] = torch.from_numpy(decoded(json.loads(stored), height, width))
        return masks

    def with_boxes(self) -> "Annotations":
        """Returns only the pictures with objects besides crowds; the arrays of objects are shared."""
        # Cumulative counts of objects avoid a loop over the pictures.
        single = np.concatenate([[0], np.cumsum(~self.crowd)])
        kept = np.flatnonzero(single[self.ends] > single[self.starts])
        # Bypasses the constructor, which would read the file again.
        part = object.__new__(Annotations)
        part.__dict__.update(self.__dict__)
        part.ids, part.files, part.sizes = self.ids[kept], self.files[kept], self.sizes[kept]
        part.starts, part.ends = self.starts[kept], self.ends[kept]
        return part


def decoded(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """Decodes a mask stored in COCO's format into pixels (h, w): polygons, run lengths, or packed run lengths.

    Args:
        segmentation: a list of polygons, or a mapping with ``size`` and ``counts``.
        height: height of the picture.
        width: width of the picture.

    Example:
        >>> decoded({"size": [2, 2], "counts": [1, 3]}, 2, 2).tolist()
        [[False, True], [True, True]]
    """
    if isinstance(segmentation, Mapping):
        given = segmentation["counts"]
        counts = np.asarray(unpacked(given) if isinstance(given, str) else given, dtype=np.int64)
        # The first run is always background, possibly of length 0.
        values = np.arange(len(counts)) % 2 == 1
        # COCO's runs go down the columns, not along the rows.
        return np.repeat(values, counts).reshape(width, height).T
    tools = coco_tools().mask
    code = tools.merge(tools.frPyObjects(segmentation, height, width))
    with warnings.catch_warnings():
        # Its arrays lack the `copy` argument of NumPy 2, about which NumPy warns at each mask.
        warnings.simplefilter("ignore", DeprecationWarning)
        return tools.decode(code).astype(bool)


def unpacked(text: str) -> list[int]:
    """Decodes the run lengths that COCO packs into a string.

    A letter holds five bits and a flag whether more follow. From the fourth on, a length is stored as its difference
    from the last but one.

    Args:
        text: the packed run lengths.

    Raises:
        ValueError: the string is not a valid encoding.

    Example:
        >>> unpacked("13")
        [1, 3]
    """
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        code = ord(letter) - 48
        # No picture has runs of more letters; a damaged string could make the number grow without bound.
        if not 0 <= code < 64 or shift > 35:
            raise ValueError(text)
        value |= (code & 31) << shift
        shift += 5
        if code & 32:  # more letters follow
            continue
        if code & 16:  # a negative number
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError(text)
    return counts


def _wrong_mask(segmentation: Any, height: int, width: int) -> str:
    if isinstance(segmentation, Mapping) and "counts" in segmentation:
        counts, size = segmentation["counts"], segmentation.get("size")
        if size != [height, width]:
            return f"its mask is of size {size}, the picture's height and width are {[height, width]}"
        if isinstance(counts, str):
            try:
                counts = unpacked(counts)
            except ValueError:
                return "the text of its mask is no run lengths"
        whole = isinstance(counts, list) and all(isinstance(n, int) and n >= 0 for n in counts)
        return "" if whole and sum(counts) == height * width else "the run lengths of its mask do not add up"
    polygons = segmentation if isinstance(segmentation, list) else []
    # Three corners or more: pycocotools takes four numbers for a box.
    good = all(
        isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and all(_number(value) for value in p) for p in polygons
    )
    if not polygons or not good:
        return "it has no mask"
    # pycocotools walks along each edge, however long it is.
    far = max(abs(value) for p in polygons for value in p) > 4 * max(height, width)
    return f"its mask reaches far beyond the {width}x{height} pixels" if far else ""


def _number(value: Any) -> bool:
    # Python reads NaN, Infinity and integers of any length from JSON, and true is an int.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < LONGEST


def _read(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_bytes())
    except OSError as e:
        raise DataError(
            f"{path} cannot be read ({e.strerror})\n  Give another file: --data.train_annotations"
        ) from None
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path} is no JSON ({str(e)[:100]})\n  Copy or download it again") from None
    missing = [
        key
        for key in ("images", "annotations", "categories")
        if not isinstance(held, dict) or not isinstance(held.get(key), list)
    ]
    if missing:
        raise DataError(
            f"{path}: it has no list of {' or '.join(missing)}, so it is no file of objects in COCO's format\n"
            "  Give one such as instances_train2017.json"
        )
    return held


def _categories(path: Path, entries: Sequence[Any]) -> tuple[list[int], list[str]]:
    found: list[tuple[int, str]] = []
    for entry in entries:
        try:
            number, name = entry["id"], entry["name"]
        except (KeyError, TypeError):
            raise DataError(f"{path}: category {str(entry)[:100]} lacks its id or its name\n  Give each both") from None
        # An id that was rounded, or parsed from a string, would match no annotation.
        if isinstance(number, bool) or not isinstance(number, int) or not isinstance(name, str):
            raise DataError(
                f"{path}: a category has the id {number!r} and the name {name!r}\n"
                "  Ids are whole numbers, names are texts"
            )
        found.append((number, name))
    found.sort()
    ids, names = [number for number, _ in found], [name for _, name in found]
    columns: dict[str, list[Any]] = {"id": ids, "name": names}
    for what, values in columns.items():
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise DataError(f"{path}: two categories have the {what} {twice!r}\n  Give each its own")
    if not ids:
        raise DataError(f"{path}: it has no categories\n  Give a file that names what its boxes hold")
    return ids, names


def _picture(path: Path, entry: Any) -> tuple[int, str, int, int]:
    try:
        number, name, width, height = entry["id"], entry["file_name"], entry["width"], entry["height"]
    except (KeyError, TypeError):
        raise DataError(
            f"{path}: picture {str(entry)[:100]} lacks an entry\n  Each has id, file_name, width and height"
        ) from None
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (number, width, height))
    fits = whole and min(width, height) > 0 and max(abs(number), width, height) < LONGEST
    if not fits or not isinstance(name, str):
        raise DataError(
            f"{path}: picture {number!r} has the name {name!r} and {width!r} x {height!r} pixels\n"
            "  Ids and sizes are whole numbers of 64 bits, names are texts"
        )
    # An annotation file must not decide which files of the machine are read.
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise DataError(f"{path}: picture {number} lies at {name!r}\n  Names are relative to the folder of pictures")
    return number, name, width, height
