"""Sources of data: parquet files, image folders, tar shards, the Hugging Face hub. One `Source` per split."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..messages import first_line
from . import layout as layouts
from .decode import Picture
from .errors import DataError as DataError
from .labels import NONE, check_kinds, read_column

TRAIN, VALIDATION, TEST = (layouts.SPLITS[name] for name in ("train", "validation", "test"))
LABEL_KEYS = ("label", "fine_label", "labels")
# Whatever is missing, the message lists all ways to provide data.
THREE_WAYS = (
    "give --data.root FOLDER (parquet files or class folders), or --data.hub NAME --data.download true, "
    "or train on the built-in pictures: --data odenets.training.Digits"
)


class Source(ABC):
    """One split: class numbers and, by index, pictures as they are stored.

    Attributes:
        labels: Class numbers (n,), -1 where there is none.
        names: The names of the numbers; None where they have none.
        classes: Of all splits together, once `labels.unify` has run.
        why: Why there are no labels, where there are none.
        shards: The number of pictures in each file that is best read in one go; None where order does not matter.
    """

    labels: Tensor
    names: list[str] | None = None
    classes: Sequence[str] = ()
    why: str = "none of its pictures has one"
    shards: list[int] | None = None

    @abstractmethod
    def encoded(self, i: int) -> bytes | str:
        """The stored file of picture i, as its bytes or its path."""

    @abstractmethod
    def name(self, i: int) -> str:
        """The file name, or file and row, of picture i."""

    def picture(self, i: int) -> Image.Image:
        """Picture i, upright and in RGB.

        Raises:
            Unreadable: It cannot be decoded.
        """
        return Picture(self.encoded(i)).rgb()

    def __len__(self) -> int:
        return len(self.labels)


class FolderSource(Source):
    """Pictures that are files below a folder, with the class name of each; None for no labels."""

    def __init__(self, root: Path, files: Sequence[str], labels: Sequence[str] | None, why: str = "") -> None:
        # One array of bytes: a million Python strings would be copied into every forked worker, page by page.
        self.root, self.files, self.why = str(root), np.array([os.fsencode(file) for file in files]), why
        # Sorted, so that numbers do not depend on the order in which a file system lists folders.
        self.names = sorted(set(labels)) if labels else []
        place = {name: number for number, name in enumerate(self.names)}
        numbers = [place[name] for name in labels] if labels else [NONE] * len(files)
        self.labels = torch.tensor(numbers, dtype=torch.long)

    def encoded(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.files[i]))

    def name(self, i: int) -> str:
        return layouts.printable(os.fsdecode(self.files[i]))


class TableSource(Source):
    """A split of a Hugging Face dataset whose pictures are stored as encoded files."""

    def __init__(
        self,
        table: Any,
        image_key: str | None,
        label_key: str | None,
        where: str,
        files: Sequence[tuple[str, int]] = (),
    ) -> None:
        """files: names of the files that the table was read from, with the rows of each, in order."""
        import datasets

        features = table.features
        self.where, self.files = where, files
        self.image_key = image_column(image_key, features, where)
        self.label_key, self.why = label_column(label_key, features)
        if self.label_key is None:
            self.labels = torch.full((len(table),), NONE)
            self.names = []
        else:
            # Read as Arrow, since a million labels as Python objects would take minutes.
            rows = table.select_columns(self.label_key).with_format("arrow")[:]
            column = rows.column(self.label_key)
            self.labels, self.names = read_column(
                column, features[self.label_key], f"{where}: column {self.label_key!r}"
            )
        try:
            stored = table.select_columns(self.image_key)
            # Pictures are decoded by this package, not by `datasets`: at the required size, and by one set of rules.
            self.table = stored.cast_column(self.image_key, datasets.Image(decode=False))
        except Exception as e:
            raise DataError(
                f"{where}: column {self.image_key!r} holds no pictures ({first_line(e, 120)})\n"
                "  Name another one: --data.image_key COLUMN"
            ) from None

    def encoded(self, i: int) -> bytes | str:
        stored = self.table[i][self.image_key] or {"bytes": b"", "path": None}
        return stored["path"] if stored["bytes"] is None and stored["path"] else stored["bytes"] or b""

    def name(self, i: int) -> str:
        return row_name(self.files, i) or f"row {i}"


class Joined(Source):
    """Several splits, concatenated."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])
        self.labels = torch.cat([part.labels for part in parts])
        self.names, self.classes = parts[0].names, parts[0].classes
        self.why = next((part.why for part in parts if bool((part.labels == NONE).any())), "")
        if any(part.shards for part in parts):
            self.shards = [n for part in parts for n in part.shards or [len(part)]]

    def _at(self, i: int) -> tuple[Source, int]:
        # side="right", since the end of a part is the first index of the next.
        number = int(np.searchsorted(self.ends, i, side="right"))
        return self.parts[number], i - int(self.ends[number - 1] if number else 0)

    def encoded(self, i: int) -> bytes | str:
        part, row = self._at(i)
        return part.encoded(row)

    def name(self, i: int) -> str:
        part, row = self._at(i)
        return part.name(row)


class Splits(dict[str, Source]):
    """Splits by name, and others that are only opened when requested by name."""

    def __init__(self, splits: Mapping[str, Source], others: Mapping[str, Callable[[], Source]], notes: Sequence[str]):
        super().__init__(splits)
        self.others, self.notes = dict(others), list(notes)

    def find(self, given: str) -> str | None:
        """The name under which the split `given` is stored: `val` finds `validation`."""
        # An exact name comes first: a data set may have both a `val` and a `validation`.
        if given in self or given in self.others:
            return given
        return next((name for name, words in layouts.SPLITS.items() if given in words and name in self), None)

    def open(self, name: str) -> Source:
        """Returns the split, and opens it if necessary."""
        if name not in self:
            self[name] = self.others.pop(name)()
        return self[name]


def row_name(files: Sequence[tuple[str, int]], i: int) -> str:
    """`train.parquet row 17` of row i over all files, each given with its number of rows."""
    for file, rows in files:
        if i < rows:
            return f"{file} row {i}"
        i -= rows
    return ""


def image_column(given: str | None, features: Any, where: str) -> str:
    """The column of the pictures."""
    import datasets

    images = [k for k, f in features.items() if isinstance(f, datasets.Image)]
    return find_column(given, ["img", "image", *images], features, "image_key", where)


def label_column(given: str | None, features: Any) -> tuple[str | None, str]:
    """The column of the labels; or None, and why."""
    import datasets

    classes = [k for k, f in features.items() if isinstance(f, datasets.ClassLabel)]
    guesses = [given] if given else [*LABEL_KEYS, *classes]
    missing = f"no column {' or '.join(dict.fromkeys(guesses))}; it has {', '.join(features)}"
    return next((key for key in guesses if key in features), None), missing


def find_column(given: str | None, guesses: Sequence[str], features: Any, option: str, where: str) -> str:
    """The given column, or the first guess that exists."""
    for key in (given,) if given else guesses:
        if key in features:
            return key
    raise DataError(
        f"{where}: no column {given or ' or '.join(dict.fromkeys(guesses))}; it has {', '.join(features)}\n"
        f"  Name it: --data.{option} COLUMN"
    )


def folder(root: str | Path, subset: str | None = None) -> Path:
    """The folder or file of the data: `root`, or its folder named `subset` if `root` does not describe its subsets."""
    path = Path(root).expanduser()
    if not path.exists():
        raise DataError(f"data.root: no folder {str(root)!r}\n  {THREE_WAYS}")
    if subset is None or _card(path):
        return path
    if not (path / subset).is_dir():
        there = sorted(entry.name for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []
        raise DataError(
            f"data.subset: no folder {subset!r} in {str(root)!r}; there are {', '.join(there[:10]) or 'none'}\n"
            "  Name one of them, or leave data.subset out"
        )
    return path / subset


def check_parquet(root: Path, files: Sequence[str], label_key: str | None = None) -> list[tuple[str, int]]:
    """Returns the rows of each file; all must be parquet files with the same columns, class names and kinds of labels.

    Raises:
        DataError: They are not, or they hold no rows; the message names the files.
    """
    import datasets
    import pyarrow.parquet as pq

    rows: list[tuple[str, int]] = []
    first: tuple[str, Any] | None = None
    kinds: list[tuple[str, Any]] = []
    for file in files:
        try:
            # Only the footer of the file is read, which has its columns and its number of rows.
            with pq.ParquetFile(root / file) as opened:
                rows.append((file, opened.metadata.num_rows))
                schema = opened.schema_arrow
        except Exception as e:
            raise DataError(
                f"{root / file} is no whole parquet file ({first_line(e, 120)})\n  Copy or download it again"
            ) from None
        try:
            features = datasets.Features.from_arrow_schema(schema)
        except ValueError as e:  # an Arrow type that this `datasets` does not know
            raise DataError(
                f"{root / file}: {first_line(e, 120)}\n"
                "  Write the column in another type, or install a newer datasets: pip install -U datasets"
            ) from None
        columns = {k: getattr(f, "names", None) for k, f in features.items()}
        if first is None:
            first = file, columns
        elif columns != first[1]:
            differing = sorted(k for k in columns.keys() | first[1].keys() if columns.get(k, k) != first[1].get(k, k))
            raise DataError(
                f"{root}: {first[0]} and {file} differ in column {differing[0]!r} or its class names\n"
                "  One split wants one kind of file; a folder of several data sets: --data.subset FOLDER"
            )
        label, _ = label_column(label_key, features)
        kinds += [] if label is None else [(file, schema.field(label).type)]
    check_kinds(kinds, str(root))
    if not any(count for _, count in rows):
        raise DataError(f"{root}: {', '.join(files[:3])} hold no rows\n  Remove or replace them")
    return [(file, count) for file, count in rows if count]


def check_one(root: str | Path | None, hub: str | None) -> None:
    """Refuses a folder and a dataset of the hub together, of which one would be ignored.

    Raises:
        DataError: Both are given.
    """
    if root is not None and hub is not None:
        raise DataError(
            f"data.root: {str(root)!r} and data.hub: {hub!r} are two sources, and one would be ignored\n"
            "  Give one of them; to replace the one of a file: --data.hub null, or --data.root null"
        )


def open_tables(
    root: str | Path | None,
    hub: str | None = None,
    download: bool = False,
    subset: str | None = None,
    ways: str = THREE_WAYS,
) -> dict[str, Any]:
    """Opens the splits of parquet files under `root`, or on the hub, as tables; none if `root` holds no such file.

    Args:
        root: Folder or file.
        hub: Dataset on the hub.
        download: Allows the network.
        subset: Configuration of the dataset, where it has several.
        ways: Remedies that an error names.

    Raises:
        DataError: There are no data.
    """
    check_one(root, hub)
    if root is not None:
        if not Path(root).expanduser().exists():
            raise DataError(f"data.root: no folder {str(root)!r}\n  {ways}")
        path = folder(root, subset)
        tables = configured(path, subset)
        found = None if tables else layouts.find(path)
        if found is None or found.kind != "parquet":
            return tables
        rows = {name: check_parquet(found.root, files) for name, files in found.splits.items()}
        return {name: load_parquet(found.root, [file for file, _ in files]) for name, files in rows.items()}
    if hub is not None:
        return _load_hub(hub, download, subset, ways)
    raise DataError(f"no data: neither data.root nor data.hub is set\n  {ways}")


def _card(path: Path) -> dict[str, Any]:
    """The header of a dataset's README.md, if it assigns files to subsets and splits."""
    import yaml

    try:
        text = (path / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    head = text.split("---", 2)
    try:
        card = yaml.safe_load(head[1]) if text.startswith("---") and len(head) == 3 else None
    except yaml.YAMLError:
        card = None
    return card if isinstance(card, dict) and card.get("configs") else {}


def configured(path: Path, subset: str | None) -> dict[str, Any]:
    """The splits of a folder that describes its contents: by README.md as on the hub, or by metadata of pictures."""
    card = _card(path)
    described = (
        [] if card or not path.is_dir() else [f for f in layouts.walk(path) if f.split("/")[-1] in layouts.METADATA]
    )
    if not card and not described:
        return {}
    if "://" in str(card.get("configs")):
        raise DataError(
            f"data.root: README.md in {str(path)!r} names files elsewhere, and only those on this machine are read\n"
            "  Take them out of its `configs`, or give --data.hub NAME --data.download true"
        )
    import datasets
    import datasets.config

    # Opening a folder would otherwise report to the hub, over a network whose use was not allowed.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        return {str(name): table for name, table in datasets.load_dataset(str(path), subset).items()}
    except Exception as e:
        said = " ".join(str(e).split())[:200]
        raise DataError(
            f"data.root: {str(path)!r} is not as its {'README.md' if card else described[0]} says: {said}\n"
            "  Name one of its subsets by --data.subset, or mend that file"
        ) from None


def load_parquet(root: Path, files: Sequence[str]) -> Any:
    """Loads some parquet files as one table."""
    import datasets
    import datasets.config

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # opening local files would otherwise report to the hub
    # One split at a time: otherwise the class names of the first would be applied to the numbers of all.
    names = {"train": [str(root / file) for file in files]}
    try:
        return datasets.load_dataset("parquet", data_files=names, split="train")
    except Exception as e:
        said = " ".join(str(e.__cause__ or e).split())[:200]
        raise DataError(f"{root}: {', '.join(files[:3])} cannot be read: {said}\n  Replace the files") from None


def open_files(path: str) -> Any:
    """Returns what pyarrow reads `path` from: a local path itself, otherwise an open file of the hub."""
    if "://" not in path:
        return path
    import fsspec.core

    system, inside = fsspec.core.url_to_fs(path)
    # Blocks of 4 MiB: a row group is read in a few requests instead of hundreds.
    return system.open(inside, "rb", block_size=1 << 22)


def _load_hub(hub: str, download: bool, subset: str | None, ways: str) -> dict[str, Any]:
    """Loads a dataset of the hub; probes the network once, with a short timeout, and only if downloading is allowed."""
    import datasets
    import datasets.config
    import huggingface_hub
    import huggingface_hub.constants

    if download:
        try:
            # Probed once beforehand: without a network, `datasets` itself retries for a long time.
            huggingface_hub.HfApi().dataset_info(hub, timeout=10)
        except Exception as e:  # every failure (no network, offline mode, no such name) has the same remedies
            raise DataError(f"data.hub: {hub!r} cannot be reached ({type(e).__name__})\n  {ways}") from None
    offline = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        if not download:
            datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
        return {str(name): table for name, table in datasets.load_dataset(hub, subset).items()}
    except Exception as e:
        said = " ".join(str(e).split())
        if "onfig" in said and ("available" in said.lower() or "pick one" in said):  # the message lists the subsets
            raise DataError(f"data.subset: {said[:300]}\n  Name one: --data.subset NAME") from None
        if download:
            raise DataError(f"data.hub: {hub!r}: {said[:200]}\n  {ways}") from None
        raise DataError(f"data.hub: {hub!r} is not on this machine and downloading was not allowed\n  {ways}") from None
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = offline
