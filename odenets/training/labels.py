"""Labels: from a column, or from the names of folders, to class numbers that mean the same in every split."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..messages import first_line
from .errors import DataError

NONE = -1  # of a picture without a label, as on the hub
REMEDY = "A label is one name or one whole number from 0 on; another column: --data.label_key COLUMN"


class Labelled(Protocol):
    """The required interface of a split: class numbers, and their names in it (None: they have none)."""

    labels: Tensor
    names: list[str] | None
    classes: Sequence[str]


def check_kinds(kinds: Sequence[tuple[str, Any]], where: str) -> None:
    """Refuses files of one split whose labels are names in one file and numbers in another.

    If they were joined by a cast, there would be a class "0" beside a class "cat", and 1.0 and true would both be
    class 1.

    Args:
        kinds: names of files, and the Arrow type of the labels in each.
        where: Begins the error.

    Raises:
        DataError: The kinds differ; the message names two of the files.
    """
    known = [(file, kind) for file, kind in kinds if _family(kind) is not None]
    for file, kind in known[1:]:
        if _family(kind) != _family(known[0][1]):
            raise DataError(
                f"{where}: the labels of {known[0][0]} are {known[0][1]}, those of {file} {kind}\n  {REMEDY}"
            )


def is_text(kind: Any) -> bool:
    """Whether an Arrow type is one of the three string types."""
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _family(kind: Any) -> str | None:
    """The family of an Arrow type of labels; None for nulls, which are compatible with all."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _family(kind.value_type)
    if is_text(kind):
        return "names"
    return None if pa.types.is_null(kind) else "numbers" if pa.types.is_integer(kind) else str(kind)


def join_columns(columns: Sequence[Any], where: str) -> Any:
    """Joins Arrow columns of one family of types, in a type that holds all of them.

    Args:
        columns: chunked arrays, at least one.
        where: Begins the error.

    Raises:
        DataError: A number exceeds 64 bits.
    """
    import pyarrow as pa

    wide = {"names": pa.large_string(), "numbers": pa.int64()}
    first = next((column.type for column in columns if _family(column.type) is not None), columns[0].type)
    kind = wide.get(_family(first) or "", first)
    try:
        return pa.chunked_array([chunk for column in columns for chunk in column.cast(kind).chunks], kind)
    except pa.ArrowInvalid as e:
        raise DataError(f"{where}: {first_line(e)}\n  {REMEDY}") from None


def read_column(column: Any, feature: Any, where: str) -> tuple[Tensor, list[str] | None]:
    """Reads the class numbers (n,) of an Arrow column, and their names; null and -1 are `NONE`.

    Args:
        column: pyarrow array, chunked or not.
        feature: Its `datasets` feature, or None; a ClassLabel has the names.
        where: Begins the errors.

    Raises:
        DataError: Floats, lists, or numbers below -1 or without a class; the message names the row.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    # Parquet stores repeated strings this way; the indices of its dictionary are not labels.
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)  # type: ignore[attr-defined]
    if pa.types.is_string_view(column.type):  # not supported by every function of Arrow
        column = pc.cast(column, pa.large_string())
    kind = column.type
    if is_text(kind):
        names = sorted(name.as_py() for name in pc.unique(column) if name.is_valid)  # type: ignore[attr-defined]
        numbers = pc.index_in(column, value_set=pa.array(names, kind))  # type: ignore[attr-defined]
    elif pa.types.is_boolean(kind):
        names, numbers = ["False", "True"], pc.cast(column, pa.int64())
    elif pa.types.is_integer(kind) or pa.types.is_null(kind):
        known = getattr(feature, "names", None)
        names, numbers = None if known is None else list(known), column
    else:
        # Only for the message: a column may be long, and may begin with nulls.
        rows = [i for i, value in enumerate(column.slice(0, 10_000)) if value.is_valid]
        shown = f", {column[rows[0]].as_py()!r} in row {rows[0]}" if rows else ""
        raise DataError(f"{where} holds {kind}{shown[:80]}\n  {REMEDY}")
    try:
        numbers = pc.fill_null(pc.cast(numbers, pa.int64()), NONE)
    except pa.ArrowInvalid as e:
        raise DataError(f"{where}: {first_line(e)}\n  {REMEDY}") from None
    labels = torch.from_numpy(
        numbers.to_numpy(zero_copy_only=False).copy() if isinstance(numbers, pa.Array) else numbers.to_numpy().copy()
    )
    wrong = (
        (labels < NONE).nonzero()[:, 0] if names is None else ((labels < NONE) | (labels >= len(names))).nonzero()[:, 0]
    )
    if len(wrong):
        row = int(wrong[0])
        most = "" if names is None else f"; there are {len(names)} classes"
        raise DataError(f"{where} holds {int(labels[row])} in row {row}{most}\n  {REMEDY}")
    return labels, names


def unify(splits: Mapping[str, Labelled], classes: Sequence[str] | None, where: str) -> list[str]:
    """Numbers the classes of all splits alike, by name: sets `labels` and `classes` of each, and returns the classes.

    Without `classes`, names are in alphabetical order, those of a ClassLabel in its own; numbers stay as they are.

    Args:
        splits: By name, at least one.
        classes: Names in order, if they are known beforehand.
        where: Begins the errors.

    Raises:
        DataError: Some splits have names and others numbers, a name is not in `classes` or there twice, or numbers are
            too sparse.
    """
    twice = sorted(name for name, count in Counter(classes or ()).items() if count > 1)
    if twice:
        raise DataError(f"{where}: data.classes has {twice[0]!r} more than once\n  Give each class a name of its own")
    labelled = {name: split for name, split in splits.items() if bool((split.labels != NONE).any())}
    named = [name for name, split in labelled.items() if split.names is not None]
    if named and len(named) < len(labelled):
        other = next(name for name in labelled if name not in named)
        raise DataError(f"{where}: split {named[0]!r} has names as labels, {other!r} numbers\n  {REMEDY}")
    if named:
        union = list(classes) if classes is not None else _union([labelled[name].names or [] for name in named])
        place = {name: number for number, name in enumerate(union)}
        for name in named:
            split = labelled[name]
            own = split.names or []
            used = sorted(set(split.labels.unique().tolist()) - {NONE})
            unknown = [own[number] for number in used if own[number] not in place]
            if unknown:
                raise DataError(
                    f"{where}: split {name!r} has pictures of {unknown[0]!r}, none of the {len(union)} classes\n"
                    "  Name all classes in data.classes, or none"
                )
            # The last entry is for NONE, which as an index is -1.
            table = torch.tensor([*(place.get(own_name, NONE) for own_name in own), NONE])
            split.labels, split.names = table[split.labels], union
    else:
        seen = torch.cat([split.labels.unique() for split in labelled.values()] or [torch.tensor([NONE])]).unique()
        count = int(seen.max()) + 1
        # The network would get that many outputs, for numbers that are most likely ids of something else.
        if count > max(1000, 100 * len(seen)):
            raise DataError(
                f"{where}: the largest label is {count - 1:,}, and only {len(seen):,} different ones occur\n"
                "  Class numbers begin at 0 and leave few out; names (strings) may be anything"
            )
        if classes is not None and count > len(classes):
            raise DataError(
                f"{where}: the largest label is {count - 1:,}, and data.classes names {len(classes)}\n  Name them all"
            )
        union = list(classes) if classes is not None else [str(number) for number in range(count)]
    for split in splits.values():
        split.classes = union
    return union


def _union(lists: list[list[str]]) -> list[str]:
    # Names in alphabetical order are merged in that order; the order of a ClassLabel has a meaning and is kept.
    if all(names == sorted(names) for names in lists):
        return sorted({name for names in lists for name in names})
    return list(dict.fromkeys(name for names in lists for name in names))
