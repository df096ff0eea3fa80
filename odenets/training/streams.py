"""Splits that are read in place, shard by shard: WebDataset tar files, and parquet files, also on the hub.

Such a source still supports any index, so that everything else works as for files: validation, held-out shares, names
of pictures, and resuming to the sample. It becomes a stream by the order of requests from `Decoded.order`: shard after
shard, with the row groups that are in use kept in memory. An order is a list of numbers; the part of it that is already
done is skipped without opening its shards.
"""

import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from ..messages import first_line
from . import layout as layouts
from .errors import DataError
from .labels import NONE, REMEDY, check_kinds, is_text, join_columns, read_column
from .sources import Source, Splits, folder, image_column, label_column, open_files

LABEL_SUFFIXES = ("cls", "label", "index", "json")
_KEPT = 16  # row groups that a process keeps in memory


class TarSource(Source):
    """Pictures in tar files in the layout of WebDataset: `0001.jpg` beside `0001.cls` is one sample.

    The label is a number or a name in the member with suffix `cls`, `label` or `index`, or `"label"` in that with
    suffix `json`; `label_key` names another suffix. All headers are read once, and the members' offsets are kept.

    Args:
        root: the folder that names are relative to.
        files: their paths below it.
        image_key: suffix of the pictures; None: any suffix of a picture, of which a sample then has one.
        label_key: suffix of the labels; None: the usual ones. Capital letters do not matter in either.
        where: a description of the data, for messages.
    """

    def __init__(
        self, root: Path, files: Sequence[str], image_key: str | None, label_key: str | None, where: str
    ) -> None:
        self.root, self.files = root, list(files)
        suffixes = (label_key.lower(),) if label_key else LABEL_SUFFIXES
        places: list[tuple[int, int, int]] = []  # file, offset, length
        names: list[str] = []
        labels: list[Any] = []
        self.shards = []
        # Only headers are read here, in one pass over each file; later, a picture takes one seek.
        for number, file in enumerate(files):
            before = len(places)
            for sample, members in _samples(root / file):
                shown = [s for s in members if (s == image_key.lower() if image_key else _shows(s))]
                if len(shown) > 1:
                    raise DataError(
                        f"{where}: sample {sample!r} of {file} has several pictures: {', '.join(sorted(shown))}\n"
                        "  Name the suffix of those that are meant: --data.image_key SUFFIX"
                    )
                if not shown:
                    continue
                picture = members[shown[0]]
                places.append((number, picture.offset_data, picture.size))
                names.append(f"{file}/{sample}")
                suffix = next((s for s in suffixes if s in members), None)
                labels.append(None if suffix is None else _label(root / file, members[suffix], suffix))
            self.shards.append(len(places) - before)
        if not places:
            raise DataError(f"{where}: {files[0]} holds no pictures\n  Name their suffix: --data.image_key SUFFIX")
        self.places, self._names = np.array(places, dtype=np.int64), np.array([name.encode() for name in names])
        self.why = f"{names[0]} has no member {' or '.join(suffixes)}"
        self.labels, self.names = _column(labels, f"{where}: label")

    def encoded(self, i: int) -> bytes:
        number, offset, length = self.places[i].tolist()
        # Opened each time: forked workers would share the position of a file that was opened before the fork.
        with open(self.root / self.files[number], "rb") as file:
            file.seek(offset)
            return file.read(length)

    def name(self, i: int) -> str:
        return self._names[i].decode()


def _shows(suffix: str) -> bool:
    return f".{suffix.rsplit('.', 1)[-1]}" in layouts.PICTURES


def _samples(path: Path) -> Any:
    """Yields (name, {suffix: member}) of each sample, whose members are adjacent in the file."""
    sample, members = "", {}
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # otherwise it keeps every member seen
                # As WebDataset splits names: at the first dot of the last part, so that `a.seg.png` belongs to the
                # sample `a`.
                head, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if not member.isfile() or not stem or not suffix:
                    continue
                name = f"{head}/{stem}" if head else stem
                if name != sample and members:
                    yield sample, members
                    members = {}
                sample, suffix = name, suffix.lower()
                # Whichever came last would be used, as it is of two members of one name, where it is an update.
                if suffix in members and members[suffix].name != member.name:
                    raise DataError(
                        f"{path}: {members[suffix].name} and {member.name} differ in capital letters alone\n"
                        "  Rename one of them"
                    )
                members[suffix] = member
    except tarfile.TarError as e:
        raise DataError(
            f"{path} is no whole tar file ({e})\n  Copy or download it again; compressed ones must be unpacked"
        ) from None
    if members:
        yield sample, members


def _label(path: Path, member: tarfile.TarInfo, suffix: str) -> Any:
    with open(path, "rb") as file:
        file.seek(member.offset_data)
        # A label is short; a member mistaken for one may be a video.
        text = file.read(min(member.size, 1 << 20)).decode(errors="replace").strip()
    if suffix != "json":
        return text or None
    try:
        held = json.loads(text)
    except ValueError:
        raise DataError(
            f"{path}: {member.name} is no JSON\n  Name the member of the labels: --data.label_key"
        ) from None
    return held.get("label") if isinstance(held, dict) else held


def _column(labels: list[Any], where: str) -> tuple[torch.Tensor, list[str] | None]:
    """Converts labels that were read as text: to numbers if all of them are numbers, else to names."""
    import pyarrow as pa

    texts = [None if label is None else str(label) for label in labels]
    # Not isdigit, which accepts a superscript 2, as int does not.
    numbers = all(text is None or text.removeprefix("-").isdecimal() for text in texts)
    plain = numbers or {type(label) for label in labels if label is not None} <= {str}
    try:
        if numbers:
            column = pa.array([None if text is None else int(text) for text in texts], pa.int64())
        else:
            column = pa.array(texts if plain else labels)
    # Numbers of more than 64 bits, and JSON values of different kinds.
    except (pa.ArrowException, OverflowError, ValueError) as e:
        raise DataError(f"{where}: {first_line(e, 120)}\n  {REMEDY}") from None
    return read_column(column, None, where)


class ParquetSource(Source):
    """Pictures in parquet files that are read a row group at a time, locally or, as `hf://` paths, on the hub.

    Args:
        files: their paths.
        image_key: the column of pictures; None: it is found.
        label_key: the column of labels; None: it is found.
        where: a description of the data, for messages.
    """

    def __init__(self, files: Sequence[str], image_key: str | None, label_key: str | None, where: str) -> None:
        import datasets

        self.files = list(files)
        self.groups: list[tuple[int, int, int]] = []  # file, row group, rows
        labels: list[Any] = []
        label: str | None = None
        first: Any = None
        for number, file in enumerate(files):
            opened = self._parquet(number)
            features = datasets.Features.from_arrow_schema(opened.schema_arrow)
            if first is None:
                first = features
                self.image_key = image_column(image_key, features, where)
                label, self.why = label_column(label_key, features)
            # The class numbers of two files have the same meaning only if their class names agree.
            known = [(key in f, getattr(f.get(key), "names", None)) for f in (features, first) for key in (label,)]
            if self.image_key not in features or known[0] != known[1]:
                raise DataError(
                    f"{where}: {files[0]} and {file} differ in columns or class names\n  Take one kind of file"
                )
            _check_pictures(opened.schema_arrow.field(self.image_key).type, self.image_key, where)
            rows = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
            self.groups += [(number, group, count) for group, count in enumerate(rows)]
            if label is not None:
                labels.append(opened.read(columns=[label], use_threads=False).column(label))
        self.shards = [rows for _, _, rows in self.groups]
        self.ends = np.cumsum(self.shards)
        total = int(self.ends[-1]) if len(self.ends) else 0
        if not labels:
            self.labels, self.names = torch.full((total,), NONE), []
        else:
            check_kinds([(file, column.type) for file, column in zip(files, labels, strict=True)], where)
            said = f"{where}: column {label!r}"
            self.labels, self.names = read_column(join_columns(labels, said), first[label], said)
        self._forget()

    def _forget(self) -> None:
        self._process, self._open, self._kept = os.getpid(), OrderedDict(), OrderedDict()
        self.reads = 0

    def __getstate__(self) -> dict[str, Any]:
        # Open files cannot be pickled for a worker; an impossible process number makes each worker open its own.
        return {k: v for k, v in self.__dict__.items() if k not in ("_open", "_kept")} | {"_process": -1}

    def _parquet(self, number: int) -> Any:
        import pyarrow.parquet as pq

        file = self.files[number]
        try:
            return pq.ParquetFile(open_files(file))
        except Exception as e:
            said = (str(e).splitlines() or [type(e).__name__])[0][:120]
            raise DataError(f"{file} is no whole parquet file ({said})\n  Copy or download it again") from None

    def encoded(self, i: int) -> bytes | str:
        place = int(np.searchsorted(self.ends, i, side="right"))
        cell = self._group(place)[i - int(self.ends[place]) + self.shards[place]].as_py()  # type: ignore[index]
        if isinstance(cell, dict):
            stored, path = cell.get("bytes"), cell.get("path")
            return path if stored is None and path else stored or b""
        return cell or b""

    def _group(self, place: int) -> Any:
        if self._process != os.getpid():  # an inherited handle shares its position with the parent
            self._forget()
        if place not in self._kept:
            number, group, _ = self.groups[place]
            if number not in self._open:
                self._open[number] = self._parquet(number)
            # Without threads: every worker is a process of its own, and their threads would compete.
            column = self._open[number].read_row_group(group, columns=[self.image_key], use_threads=False)
            self._kept[place] = column.column(self.image_key)
            self.reads += 1
            self._open.move_to_end(number)
            for held in (self._kept, self._open):
                # The one used longest ago: an order reads shards in turn, so it will not be requested again soon.
                if len(held) > _KEPT:
                    held.popitem(last=False)
        self._kept.move_to_end(place)
        return self._kept[place]

    def name(self, i: int) -> str:
        place = int(np.searchsorted(self.ends, i, side="right"))
        number, _, rows = self.groups[place]
        before = sum(count for n, _, count in self.groups[:place] if n == number)
        return f"{PurePosixPath(self.files[number]).name} row {before + i - int(self.ends[place]) + rows}"


def _check_pictures(kind: Any, key: str, where: str) -> None:
    """Refuses a column whose cells are neither encoded pictures nor paths."""
    import pyarrow as pa

    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, is_text)
    if not any(test(kind) for test in tests):
        raise DataError(
            f"{where}: column {key!r} holds no pictures but {kind}\n  Name another one: --data.image_key COLUMN"
        )


def parquet_files(
    root: str | Path | None, hub: str | None, download: bool, subset: str | None, ways: str
) -> Callable[..., Splits] | None:
    """Opens the splits of parquet files in a folder, or on the hub; None where a folder holds something else.

    Args:
        root: a folder; None: there is none.
        hub: ``OWNER/NAME`` of a dataset; None: there is none.
        download: whether the hub may be accessed.
        subset: a configuration of the dataset; None: the default.
        ways: the ways to provide data, for messages.

    Raises:
        DataError: There are no data, or the hub may not be accessed.
    """
    if root is not None:
        path = folder(root, subset)
        found = layouts.find(path)
        if found is None or found.kind != "parquet":
            return None
        splits = {name: [str(found.root / file) for file in files] for name, files in found.splits.items()}
        others = {name: [str(found.root / file) for file in files] for name, files in found.others.items()}
        notes = found.notes
    elif hub is None:
        raise DataError(f"no data: neither data.root nor data.hub is set\n  {ways}")
    elif not download:
        raise DataError(f"data.hub: streaming {hub!r} asks the network, which was not allowed\n  {ways}")
    else:
        splits, others, notes = hub_files(hub, subset, ways), {}, []
    for files in splits.values():
        layouts.check_shards(files)
    strange = next((file for files in splits.values() for file in files if not file.endswith(".parquet")), None)
    if strange is not None:
        raise DataError(
            f"data.streaming: {hub!r} stores {strange}, and only parquet files are streamed\n  Leave it out"
        )
    return lambda *keys: Splits(
        {name: ParquetSource(files, *keys) for name, files in splits.items()},
        {name: lambda files=files: ParquetSource(files, *keys) for name, files in others.items()},
        notes,
    )


def hub_files(hub: str, subset: str | None, ways: str) -> dict[str, list[str]]:
    """Returns the paths of a hub dataset's files by split.

    Args:
        hub: ``OWNER/NAME`` of the dataset.
        subset: one of its configurations; None: the default.
        ways: the ways to provide data, for messages.
    """
    import datasets

    try:
        builder = datasets.load_dataset_builder(hub, subset)
    except Exception as e:
        said = " ".join(str(e).split())[:200]
        raise DataError(f"data.hub: {hub!r} cannot be reached ({type(e).__name__}: {said})\n  {ways}") from None
    return {str(name): list(files) for name, files in (builder.config.data_files or {}).items()}
