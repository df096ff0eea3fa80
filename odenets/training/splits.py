"""The splits of a data set, opened: class folders, tables, tar shards, or a data set of the hub."""

import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from . import layout as layouts
from .errors import DataError
from .layout import Layout
from .sources import (
    THREE_WAYS,
    FolderSource,
    Joined,
    Source,
    Splits,
    TableSource,
    check_one,
    check_parquet,
    configured,
    folder,
    load_parquet,
    open_tables,
)
from .streams import TarSource, parquet_files


def open_splits(
    root: str | Path | None,
    hub: str | None = None,
    download: bool = False,
    image_key: str | None = None,
    label_key: str | None = None,
    subset: str | None = None,
    streaming: bool = False,
) -> Splits:
    """Opens the splits found under `root` or on the hub, by name; a folder without split names is one split `train`.

    Raises:
        DataError: There are no data, two sources of them, or no column fits. The network is only used with `download`.
    """
    check_one(root, hub)
    where = str(root or hub)
    keys = image_key, label_key, where
    # Tried first: a folder of anything but parquet files is then opened as without the option.
    if streaming:
        found = parquet_files(root, hub, download, subset, THREE_WAYS)
        if found is not None:
            return found(*keys)
    # The hub has only tables, whose files name the splits.
    if root is None:
        tables = open_tables(root, hub, download, subset)
        return Splits({name: TableSource(table, *keys) for name, table in tables.items()}, {}, [])
    path = folder(root, subset)
    # A folder's own description of its contents takes precedence over file names.
    tables = configured(path, subset)
    if tables:
        return Splits({name: TableSource(table, *keys) for name, table in tables.items()}, {}, [])
    found = layouts.find(path)
    if found is None:
        raise DataError(f"data.root: {str(path)!r} holds neither parquet files nor class folders\n  {THREE_WAYS}")
    # Files that name no split are opened only on request.
    opened = partial(_open, found, keys)
    return Splits(
        {name: opened(name, files) for name, files in found.splits.items()},
        {name: partial(opened, name, files) for name, files in found.others.items()},
        found.notes,
    )


def kept_apart(names: Mapping[str, str | None], given: Collection[str], where: str) -> dict[str, str | None]:
    """Returns the splits of a run, without those that were not asked for and share pictures with the training data.

    Args:
        names: The split, or splits joined by a plus sign, of `train`, `val` and `test`; None where there is none.
        given: Those of the three that were asked for by name.
        where: The data, for messages.

    Raises:
        DataError: A split that was asked for shares pictures with the training data, or one is named twice.

    Example:
        >>> kept_apart({"train": "train+test", "val": "validation", "test": "test"}, ["train"], "pets")
        {'train': 'train+test', 'val': 'validation', 'test': None}
    """
    parts = {use: name.split("+") if name else [] for use, name in names.items()}
    for use, listed in parts.items():
        # Pictures that are listed twice would also be held out and trained on.
        if len(set(listed)) < len(listed):
            raise DataError(f"data.{use}_split: {names[use]} names a split of {where} twice\n  Name each of them once")
    shared = {use: [part for part in parts[use] if part in parts["train"]] for use in ("val", "test")}
    for use, common in shared.items():
        if common and use in given:
            raise DataError(
                f"data.{use}_split: {common[0]!r} of {where} is trained on, so that it measures nothing\n"
                f"  Name a split that data.train_split does not, or leave data.{use}_split out"
            )
    return {use: None if shared.get(use) else name for use, name in names.items()}


def open_all(root: str | Path, *options: Any) -> Source:
    """Opens all pictures below a folder, or in a file, as one source: those of each split, and those of none.

    Args:
        root: the folder, or the file.
        options: the further ones of ``open_splits``, from ``image_key`` on.

    Raises:
        DataError: see ``open_splits``.
    """
    splits = open_splits(root, None, False, *options)
    opened = [*splits.values(), *(splits.open(name) for name in list(splits.others))]
    files = [os.fsdecode(file) for source in opened if isinstance(source, FolderSource) for file in source.files]
    if files:
        # In the order of their names, whichever folders name splits.
        return FolderSource(Path(opened[0].root), sorted(files), None)  # type: ignore[attr-defined]
    return opened[0] if len(opened) == 1 else Joined(opened)


def _open(found: Layout, keys: tuple[str | None, str | None, str], split: str, files: Sequence[str]) -> Source:
    if found.kind == "pictures":
        return FolderSource(found.root, files, found.labels.get(split), found.why.get(split, ""))
    layouts.check_shards(files)
    if found.kind == "tar":
        return TarSource(found.root, files, *keys)
    rows = check_parquet(found.root, files, keys[1])
    return TableSource(load_parquet(found.root, [file for file, _ in rows]), *keys, files=rows)
