"""Pictures and their masks, split by split: from folders, or from tables here or on the hub.

In a folder, pictures and masks lie in two folders beside each other, which hold the splits, or within each split::

    images/train/a/1.jpg   masks/train/a/1.png          train/images/1.jpg   train/masks/1.png

Both folders have a usual name (``images``, ``leftImg8bit``; ``masks``, ``annotations``, ``labels``, ``gtFine``) or a
given one. A mask belongs to the picture with the same path up to the ending: 1.jpg and 1.png, or, with
``image_suffix="_leftImg8bit"`` and ``mask_suffix="_gtFine_labelIds"``, 1_leftImg8bit.png and 1_gtFine_labelIds.png.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from os.path import splitext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..messages import first_line
from ..training.errors import DataError
from ..training.layout import PICTURES, SPLITS, walk
from ..training.sources import check_one, find_column, image_column, open_tables

IMAGES = ("images", "image", "img", "imgs", "JPEGImages", "leftImg8bit")
MASKS = ("masks", "mask", "annotations", "annotation", "labels", "label", "SegmentationClass", "gtFine", "gt")
MASK_KEYS = ("mask", "annotation", "label", "labels", "segmentation", "semantic", "gt", "labels_bitmap", "label_bitmap")
WAYS = (
    "give --data.root FOLDER with images/train/1.jpg and masks/train/1.png, or --data.hub NAME --data.download true, "
    "or train on drawn shapes: --data odenets.segmentation.DrawnShapes"
)


class Pairs(ABC):
    """The pictures of one split with their masks."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def picture(self, i: int) -> bytes | str:
        """The stored bytes of picture i, or its path."""

    @abstractmethod
    def mask(self, i: int) -> bytes | str | None:
        """The stored bytes of the mask of picture i, or its path; None if there is none."""

    @abstractmethod
    def name(self, i: int) -> str:
        """The file, or file and row, of picture i."""

    def lacking(self) -> list[int]:
        """The pictures known to have no mask before any file is read."""
        return []


class Named(NamedTuple):
    """The names that a data set uses.

    Attributes:
        images: the folder of the pictures; None takes the usual names.
        masks: the folder of the masks; None takes the usual names.
        image_suffix: ending of the names of pictures, before the dot.
        mask_suffix: ending of the names of masks, before the dot; files without it are not masks.
        image_key: the column of the pictures, in tables.
        mask_key: the column of the masks.
    """

    images: str | None = None
    masks: str | None = None
    image_suffix: str = ""
    mask_suffix: str = ""
    image_key: str | None = None
    mask_key: str | None = None


class FolderPairs(Pairs):
    """Files below two folders."""

    def __init__(self, images: Path, files: Sequence[str], masks: Path, of: Sequence[str]) -> None:
        """of: the mask of each picture, a path below `masks`; "" if there is none."""
        # Arrays of bytes: a list of Python strings would be copied into each worker, page by page.
        self.images, self.masks = str(images), str(masks)
        self.files, self.of = np.array([f.encode() for f in files]), np.array([f.encode() for f in of])

    def __len__(self) -> int:
        return len(self.files)

    def picture(self, i: int) -> str:
        return f"{self.images}/{self.name(i)}"

    def mask(self, i: int) -> str | None:
        file = self.of[i].decode()
        return f"{self.masks}/{file}" if file else None

    def name(self, i: int) -> str:
        return self.files[i].decode()

    def lacking(self) -> list[int]:
        return [i for i, file in enumerate(self.of) if not file]


class TablePairs(Pairs):
    """Rows of a `datasets` table with a column of pictures and one of masks, if it has any."""

    def __init__(self, table: Any, named: Named, where: str, split: str) -> None:
        import datasets

        self.split = split
        features = {k: f for k, f in table.features.items() if isinstance(f, datasets.Image)}
        self.image_key = image_column(named.image_key, table.features, where)
        rest = [key for key in features if key != self.image_key]
        self.mask_key = None
        if named.mask_key is not None or rest:
            known = [key for key in MASK_KEYS if key in rest]
            self.mask_key = find_column(named.mask_key, [*known, *rest], table.features, "mask_key", where)
        kept = [self.image_key, *([self.mask_key] if self.mask_key else [])]
        self.table = table.select_columns(kept)
        for key in kept:
            try:
                # Undecoded, so that a damaged file is found where it can be reported and counted.
                self.table = self.table.cast_column(key, datasets.Image(decode=False))
            except Exception as e:
                raise DataError(
                    f"{where}: column {key!r} holds no pictures ({first_line(e, 120)})\n"
                    "  Name others: --data.image_key COLUMN --data.mask_key COLUMN"
                ) from None

    def __len__(self) -> int:
        return len(self.table)

    def picture(self, i: int) -> bytes | str:
        # Empty bytes are not a picture, which is detected and counted where pictures are decoded.
        return self._stored(self.table[i][self.image_key]) or b""

    def mask(self, i: int) -> bytes | str | None:
        return self._stored(self.table[i][self.mask_key]) if self.mask_key else None

    @staticmethod
    def _stored(cell: Any) -> bytes | str | None:
        if cell is None:
            return None
        return cell["path"] if cell["bytes"] is None else cell["bytes"]

    def name(self, i: int) -> str:
        return f"{self.split} row {i}"

    def lacking(self) -> list[int]:
        return [] if self.mask_key else list(range(len(self)))


class JoinedPairs(Pairs):
    """Several splits, concatenated.

    Where two of them hold a file of the same name, names begin with the split, since predictions are stored under them.
    """

    def __init__(self, parts: Sequence[Pairs], splits: Sequence[str]) -> None:
        """splits: the name of each part."""
        self.parts, self.splits, self.ends = parts, splits, np.cumsum([len(part) for part in parts])
        # Without their endings, which predictions do not keep; rows of tables are named after their splits anyway.
        stems = [splitext(file)[0] for part in parts if isinstance(part, FolderPairs) for file in part.files.tolist()]
        self.alike = len(set(stems)) < len(stems)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _at(self, i: int) -> tuple[int, int]:
        # side="right", since the end of a part is the first row of the next.
        number = int(np.searchsorted(self.ends, i, side="right"))
        return number, i - int(self.ends[number - 1] if number else 0)

    def picture(self, i: int) -> bytes | str:
        number, row = self._at(i)
        return self.parts[number].picture(row)

    def mask(self, i: int) -> bytes | str | None:
        number, row = self._at(i)
        return self.parts[number].mask(row)

    def name(self, i: int) -> str:
        number, row = self._at(i)
        name = self.parts[number].name(row)
        return f"{self.splits[number]}/{name}" if self.alike else name

    def lacking(self) -> list[int]:
        starts = [0, *self.ends[:-1].tolist()]
        return [start + i for start, part in zip(starts, self.parts, strict=True) for i in part.lacking()]


def open_pairs(
    root: str | None, hub: str | None, download: bool, subset: str | None, named: Named, note: Callable[[str], None]
) -> dict[str, Pairs]:
    """Opens the splits of a data set, by name: train, validation, test, or others.

    Args:
        root: folder.
        hub: data set on the hub.
        download: allows network access.
        subset: configuration of a data set on the hub that has several.
        named: the names that the data set uses.
        note: called with a message about files that are left out.

    Raises:
        DataError: no data are found, or pictures and masks cannot be matched.
    """
    check_one(root, hub)
    if root is not None:
        path = Path(root).expanduser()
        if not path.is_dir():
            raise DataError(f"data.root: no folder {root!r}\n  {WAYS}")
        found = _folders(path, named, note)
        if found:
            return found
    tables = open_tables(root, hub, download, subset, WAYS)
    if not tables:
        raise DataError(f"data.root: {root!r} holds neither a folder of pictures nor a table of them\n  {WAYS}")
    return {name: TablePairs(table, named, str(root or hub), name) for name, table in tables.items()}


def open_pictures(root: str) -> Pairs:
    """Opens the pictures of a folder, or a single file, whose masks are to be predicted.

    Raises:
        DataError: there are no pictures, or two would have the same file of predictions.
    """
    path = Path(root).expanduser()
    files = [path.name] if path.is_file() else sorted(_pictures(path)) if path.is_dir() else []
    if not files:
        raise DataError(f"data.predict_root: no pictures in {root!r}\n  Give a folder of pictures, or one file")
    folder = path.parent if path.is_file() else path
    _stems(files, "", folder)  # two of the same name would share one file of predictions
    return FolderPairs(folder, files, folder, [""] * len(files))


def _folders(root: Path, named: Named, note: Callable[[str], None]) -> dict[str, Pairs]:
    """Returns the splits of a folder; none if it holds no folder of pictures."""
    images = _child(root, named.images, IMAGES)
    if images is not None:
        masks = _child(root, named.masks, MASKS)
        below = _by_split(_naming_splits(images))
        # No splits: all of it is training data, of which a share is held out later.
        if not below:
            return {"train": _matched(images, masks, named, note)}
        return {split: _matched(folder, masks and masks / folder.name, named, note) for split, folder in below.items()}
    inside = {p: images for p in _naming_splits(root) if (images := _child(p, named.images, IMAGES)) is not None}
    return {
        split: _matched(inside[folder], _child(folder, named.masks, MASKS), named, note)
        for split, folder in _by_split(inside).items()
    }


def _naming_splits(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and _split(p.name) in SPLITS)


def _by_split(folders: Iterable[Path]) -> dict[str, Path]:
    """Returns the folder of each split.

    Raises:
        DataError: two folders name one split.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        split = _split(folder.name)
        if split in found:
            raise DataError(
                f"{folder.parent} holds {found[split].name} and {folder.name}, which both name the split {split}\n"
                "  Take one of them away, or put their files into one"
            )
        found[split] = folder
    return found


def _split(name: str) -> str:
    """Maps usual names to those of the splits, as `training` to `train`; other names stay."""
    return next((split for split, words in SPLITS.items() if name.lower() in words), name)


def _child(root: Path, given: str | None, usual: Sequence[str]) -> Path | None:
    """Returns the given folder, or one with a usual name that holds pictures: ``annotations`` may hold other files."""
    if given is not None:
        return root / given if (root / given).is_dir() else None
    found = [root / name for name in usual if (root / name).is_dir() and _any_picture(root / name)]
    if len(found) > 1:
        raise DataError(
            f"{root} holds {found[0].name} and {found[1].name}\n  Say which: --data.images FOLDER --data.masks FOLDER"
        )
    return found[0] if found else None


def _any_picture(root: Path) -> bool:
    return any(Path(file).suffix.lower() in PICTURES for file in walk(root))


def _pictures(root: Path) -> list[str]:
    return [file for file in walk(root) if Path(file).suffix.lower() in PICTURES]


def _stems(files: Sequence[str], suffix: str, where: Path) -> dict[str, str]:
    """Returns the files whose names end in `suffix` (before the dot), keyed by the part before it.

    Raises:
        DataError: two files have the same stem.
    """
    found: dict[str, str] = {}
    for file in sorted(files):
        stem = file.rpartition(".")[0]
        if not stem.endswith(suffix):
            continue
        stem = stem[: len(stem) - len(suffix)]
        if stem in found:
            raise DataError(
                f"{where} holds {found[stem]} and {file}, which would have one mask\n  Take one of them away"
            )
        found[stem] = file
    return found


def _matched(images: Path, masks: Path | None, named: Named, note: Callable[[str], None]) -> Pairs:
    """Returns the pictures of a split, each with the mask of the same name."""
    pictures = _stems(_pictures(images), named.image_suffix, images)
    if not pictures:
        ending = f" whose names end in {named.image_suffix!r}" if named.image_suffix else ""
        raise DataError(f"{images} holds no pictures{ending}\n  {WAYS}")
    there = masks is not None and masks.is_dir()
    found = _stems(_pictures(masks), named.mask_suffix, masks) if there else {}  # type: ignore[arg-type]
    alone = sorted(found.keys() - pictures.keys())
    if alone:
        note(f"{masks}: {len(alone):,} masks have no picture, {found[alone[0]]} first; they are left out")
    of = [found.get(stem, "") for stem in pictures]
    return FolderPairs(images, list(pictures.values()), masks or images, of)
