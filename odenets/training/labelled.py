"""Labelled pictures as a trained network sees them, from a folder or from the data named in its checkpoint."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import layout as layouts
from .decode import Picture, Unreadable
from .labels import NONE, unify
from .sets import Decoded
from .sources import TEST, VALIDATION, DataError, Source
from .splits import open_splits
from .trained import Trained, build_data
from .view import View

Batch = tuple[list[int], Tensor, Tensor]


class Below(Source):
    """A source whose names include the path of its folder.

    Args:
        root: the folder that names are relative to.
        source: the pictures.
    """

    def __init__(self, root: Path, source: Source) -> None:
        self.root, self.source = root, source
        self.labels, self.names, self.why, self.shards = source.labels, source.names, source.why, source.shards
        self.classes = []

    def encoded(self, i: int) -> bytes | str:
        return self.source.encoded(i)

    def name(self, i: int) -> str:
        return str(self.root / self.source.name(i))


class Chosen(Source):
    """Some pictures of a source.

    Args:
        source: the pictures.
        rows: which of them (n,).
    """

    def __init__(self, source: Source, rows: Tensor) -> None:
        self.source, self.rows = source, rows
        self.labels, self.names, self.why, self.classes = source.labels[rows], source.names, source.why, []

    def encoded(self, i: int) -> bytes | str:
        return self.source.encoded(int(self.rows[i]))

    def name(self, i: int) -> str:
        return self.source.name(int(self.rows[i]))


class Viewed(Dataset):
    """Pictures as a network sees them: (i, uint8 (c, h, w), ""), or (i, None, why it cannot be read).

    Args:
        source: the pictures.
        view: how the network sees them.
    """

    def __init__(self, source: Source, view: View) -> None:
        self.source, self.view = source, view

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> tuple[int, Tensor | None, str]:
        try:
            return i, self.view(Picture(self.source.encoded(i))), ""
        except Unreadable as e:
            return i, None, str(e)


class Labelled:
    """Labelled pictures of a network's classes, which can be iterated several times.

    Args:
        trained: The network.
        root: Folder or file of pictures; None takes the data that it was trained on, from its checkpoint.
        split: Of them; None takes the test split, else the validation split, else the only one.
        size: Side of the pictures, if it is not that of training.
        limit: Largest number of pictures; of more, an evenly spread selection is taken. None takes all.

    Attributes:
        where: A description of the data, for messages.
        labels: Class numbers of all of them, in the network's numbering.
        unread: Names of those that could not be read, and why, by number; numbers of pictures that were left out when
            they were decoded follow those of the others.

    Raises:
        DataError: No such pictures, no labels, classes that the network does not have, or a size that is fixed.
    """

    def __init__(
        self,
        trained: Trained,
        root: str | Path | None = None,
        split: str | None = None,
        size: int | None = None,
        limit: int | None = None,
    ) -> None:
        self.unread: dict[int, tuple[str, str]] = {}
        self._set: Any
        self._source: Source | None = None
        view = trained.view if size is None else trained.view._replace(height=size, width=size)
        if root is None:
            self._set, self.where = _own(trained, split, size)
            self.labels = torch.as_tensor(self._set.labels)
            if isinstance(self._set, Decoded):
                # Read as below: the set itself would show another picture in place of one that cannot be read.
                self._source = Chosen(self._set.source, self._set.indices)
                self._set = Viewed(self._source, view)
            for name in getattr(self._set, "unread", ()):
                self.unread[len(self.labels) + len(self.unread)] = name
            if bool((self.labels == NONE).any()):
                raise DataError(f"{self.where}: some pictures have no label\n  odenets predict needs none")
        else:
            self._source, self.where = _of_folder(trained, Path(root), split)
            self._set, self.labels = Viewed(self._source, view), self._source.labels
        count = len(self.labels)
        wanted = count if limit is None else min(limit, count)
        # Evenly spread, since the first ones in a folder are all of one class.
        self.indices = [i * count // wanted for i in range(wanted)]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, i: int) -> str:
        """The file, or file and row, of picture i.

        Args:
            i: the number of the picture, from 0.
        """
        return self._source.name(i) if self._source is not None else self._set.name(i)

    def batches(self, batch_size: int = 64, num_workers: int = 0) -> Iterator[Batch]:
        """Yields numbers of pictures, the pictures (n, c, h, w), uint8 or floats in [0, 1], and their labels (n,).

        Args:
            batch_size: of the batches.
            num_workers: processes that load; 0: none.
        """
        if self._source is None:
            for start in range(0, len(self.indices), batch_size):
                chosen = self.indices[start : start + batch_size]
                yield chosen, *self._set.__getitems__(chosen)
            return
        chosen_set = torch.utils.data.Subset(self._set, self.indices)
        for batch in DataLoader(chosen_set, batch_size, num_workers=num_workers, collate_fn=list):
            for i, levels, why in batch:
                if levels is None:
                    self.unread[i] = (self._source.name(i), why)
            read = [(i, levels) for i, levels, _ in batch if levels is not None]
            if read:
                numbers = [i for i, _ in read]
                yield numbers, torch.stack([levels for _, levels in read]), self.labels[numbers]


def levels_of(x: Tensor) -> Tensor:
    """Returns pictures in either form as uint8 levels.

    Args:
        x: uint8, or floats in [0, 1].
    """
    return x if x.dtype == torch.uint8 else (x * 255).round().clamp(0, 255).to(torch.uint8)


def _own(trained: Trained, split: str | None, size: int | None) -> tuple[Any, str]:
    """The data in the checkpoint's configuration, and their description."""
    wanted = split or "test"
    if wanted not in ("test", "val"):
        raise DataError(f"split {wanted!r}: of the data in a checkpoint, it is test or val")
    data = build_data(trained, {} if size is None else {"size": size})
    data.setup("test" if wanted == "test" else "validate")
    names = getattr(data, "classes", None)
    if names is not None and list(names) != trained.classes:
        raise DataError(f"{trained.path} was trained on other classes than its data have now\n  Name a folder")
    return data.sets[wanted], f"{type(data).__name__}, {wanted}"


def _of_folder(trained: Trained, root: Path, split: str | None) -> tuple[Source, str]:
    """A split of labelled pictures whose class numbers are the network's, and its description."""
    if not root.exists() or layouts.find(root) is None:
        problem = "there is no picture in it" if root.exists() else "there is no such file or folder"
        raise DataError(f"{root}: {problem}\n  Give a folder with a folder per class, parquet files or tar shards")
    splits = open_splits(root)
    named = next((n for n in (*TEST, *VALIDATION) if n in splits), None)
    name = named or next(iter(splits))
    if split is not None:
        found = splits.find(split)
        if found is None:
            raise DataError(f"split {split!r}: {root} has {', '.join([*splits, *splits.others])}\n  Name one of them")
        name = found
    elif named is None and len(splits) > 1:
        raise DataError(f"{root} has the splits {', '.join(splits)}\n  Name one of them: --split NAME")
    source = splits.open(name)
    if bool((source.labels == NONE).any()):
        raise DataError(
            f"{root}: split {name!r} has no label for some pictures: {source.why}\n  odenets predict needs none"
        )
    _check_classes(trained.classes, source, root)
    unify({name: source}, trained.classes, str(root))
    return Below(root if root.is_dir() else root.parent, source), f"{root}, {name}"


def _check_classes(known: Sequence[str], source: Source, root: Path) -> None:
    """Refuses classes that the network does not have, and names all of them rather than the first."""
    if source.names is None:
        return
    place = set(known)
    used = [source.names[number] for number in source.labels.unique().tolist()]
    foreign = [name for name in used if name not in place]
    if foreign:
        more = f" and {len(foreign) - 10} more" if len(foreign) > 10 else ""
        raise DataError(
            f"{root}: {', '.join(foreign[:10])}{more} of its {len(used)} classes: none of the {len(known)} classes of "
            f"the network, which begin with {', '.join(known[:3])}\n"
            "  --classes FILE says what the network's outputs are called, one name per line, such as n01440764"
        )


def read_classes(path: str | Path, count: int) -> list[str]:
    """Reads the names of a network's outputs, in order: one per line, or a JSON list of them.

    Args:
        path: The file. If every line begins with a synset, n01440764, the rest of each line is ignored.
        count: The required number of names.

    Raises:
        DataError: There is no such file, it has another number of names, or a name occurs twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"--classes {path} cannot be read: {e}\n  Give a text file, one name per line") from None
    if text.lstrip().startswith("["):
        try:
            names = [str(name) for name in json.loads(text)]
        except ValueError as e:
            raise DataError(f"--classes {path} is no list: {e}\n  Give a text file, one name per line") from None
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
        if all(re.match(r"n\d{8}\b", name) for name in names):
            names = [name[:9] for name in names]
    if len(names) != count:
        raise DataError(
            f"--classes {path} has {len(names):,} names, and the network {count:,} outputs\n  Name them all"
        )
    # Only if there are duplicates: counting each name takes quadratic time.
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < count else []
    if twice:
        raise DataError(f"--classes {path} has {twice[0]!r} more than once\n  Give each output a name of its own")
    return names


def read_real(path: str | Path) -> list[list[int]]:
    """Reads ImageNet-Real labels as published: for each validation picture, the numbers of all classes that it shows.

    Args:
        path: ``real.json`` of github.com/google-research/reassessed-imagenet: a list of 50,000 lists; entry i - 1
            belongs to ``ILSVRC2012_val_{i:08d}``, and numbers count the synsets in alphabetical order.

    Raises:
        DataError: The file is missing, or of another form.

    Source:
        Beyer et al. 2020, Are we done with ImageNet?, arXiv 2006.07159.
    """
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise DataError(f"--real {path} cannot be read: {e}\n  Give real.json as it is published") from None
    # By `type`, since a bool is an instance of int.
    good = isinstance(held, list) and all(
        isinstance(row, list) and all(type(k) is int and 0 <= k < 1000 for k in row) for row in held
    )
    if not good or not held:
        raise DataError(f"--real {path} is no list of lists of class numbers\n  Give real.json as it is published")
    return held


def real_number(name: str) -> int | None:
    """The number of an ImageNet validation picture, from 1; None if the file is not one.

    Args:
        name: of the file.

    Example:
        >>> real_number("val/n01440764/ILSVRC2012_val_00000293.JPEG"), real_number("a.png")
        (293, None)
    """
    found = re.fullmatch(r"ILSVRC2012_val_(\d{8})(?:_n\d{8})?", Path(name).stem)
    return int(found[1]) if found else None
