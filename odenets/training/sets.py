"""Sets of pictures: kept in memory, or decoded and cropped on request; and the handling of unreadable pictures.

A data set takes indices, or pairs (epoch, index). For an index, a random box is drawn from torch's global generator;
for a pair, from one seeded by the data set's `seed`, the epoch and the index, so it is the same in every process.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.utils.data import Dataset

from .decode import Picture, Unreadable, drawn, random_box
from .order import seed_of
from .sources import DataError, Source

Request = int | tuple[int, int]  # an index, or (epoch, index)


class Cached(Dataset):
    """Pictures (n, c, h, w) and labels (n,) in memory; a whole batch is one index operation.

    >>> import torch
    >>> data = Cached(torch.zeros(5, 1, 2, 2), torch.arange(5))
    >>> data.__getitems__([4, (7, 2)])[1]
    tensor([4, 2])

    Attributes:
        unread: the pictures that were left out since they cannot be read: their names, and why.
    """

    def __init__(self, pictures: Tensor, labels: Tensor, name: Callable[[int], str] = str) -> None:
        self.pictures, self.labels, self._name = pictures, labels, name
        self.unread: list[tuple[str, str]] = []
        self._places: tuple[Sequence[int], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, request: Request) -> tuple[Tensor, Tensor]:
        i = request[1] if isinstance(request, tuple) else request
        return self.pictures[i], self.labels[i]

    def __getitems__(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
        # Nothing is drawn here, so the epoch of a request does not matter.
        wanted = [r[1] if isinstance(r, tuple) else r for r in requests]
        picked = torch.as_tensor(wanted, device=self.pictures.device)
        return self.pictures[picked], self.labels[picked]

    def move(self, device: torch.device) -> None:
        """Moves all pictures and labels to a device, where batches are then made."""
        self.pictures, self.labels = self.pictures.to(device), self.labels.to(device)

    def name(self, i: int) -> str:
        """The file, or file and row, of picture i."""
        return self._name(i)

    def order(self, generator: Generator, window: int = 16) -> Tensor:
        """Draws an order of the pictures for an epoch, the one that `Decoded.order` draws where none is kept."""
        if self._places is None:
            return torch.randperm(len(self), generator=generator)
        return shard_order(*self._places, generator, window)


class Tally:
    """The unreadable pictures of a source, over all processes; beyond `limit` of them, ends the run with the list."""

    def __init__(self, source: Source, limit: int) -> None:
        self.source, self.limit = source, limit
        # In shared memory, since the workers decode and one limit holds for all of them.
        self.seen = torch.zeros(len(source), dtype=torch.uint8).share_memory_()
        self.why: dict[int, str] = {}  # of those that this process has met

    def __contains__(self, i: int) -> bool:
        return bool(self.seen[i])

    def places(self, position: int, indices: Sequence[int] | Tensor) -> Iterator[tuple[int, int]]:
        """Yields the places from one on, cyclically, each with its picture, without those known to be unreadable.

        Args:
            position: the requested place.
            indices: the picture at each place.
        """
        for step in range(len(indices)):
            at = (position + step) % len(indices)
            index = int(indices[at])
            if index not in self:
                yield at, index

    def add(self, i: int, why: Unreadable, then: str) -> None:
        """Counts picture i, once, with a warning."""
        # An unreadable picture is requested again in every epoch.
        if i in self:
            return
        self.seen[i], self.why[i] = 1, str(why)
        count = int(self.seen.sum(dtype=torch.long))
        if count > self.limit:
            names = [self.source.name(int(j)) for j in self.seen.nonzero()[:20, 0]]
            more = f" and {count - len(names):,} more" if count > len(names) else ""
            raise DataError(
                f"{count:,} pictures cannot be read: {', '.join(names)}{more}\n"
                f"  Replace or remove them, or allow more than data.max_unreadable={self.limit}"
            )
        warnings.warn(
            f"{self.source.name(i)} cannot be read ({why}); {then}. So far {count:,}, data.max_unreadable={self.limit}",
            stacklevel=2,
        )


class Decoded(Dataset):
    """Pictures that are decoded and brought to (3, size, size) uint8 on request.

    Training crops a random box (share of the area from [`smallest`, 1]) and resizes it. Evaluation, and training where
    `smallest` is 0, resizes the shorter side to size / `inner` and crops the centre. A picture that cannot be read is
    replaced by the next one.

    Attributes:
        seed: Of the random boxes of requests (epoch, index).
        takes_pairs: It takes such requests, and seeds its draws by them.
    """

    takes_pairs = True

    def __init__(
        self,
        source: Source,
        indices: Tensor,
        size: int,
        train: bool,
        smallest: float,
        inner: float,
        interpolation: str = "bilinear",
        tally: Tally | None = None,
    ) -> None:
        self.source, self.indices, self.size, self.train = source, indices, size, train
        self.smallest, self.inner, self.interpolation = smallest if train else 0.0, inner, interpolation
        self.tally = tally or Tally(source, 0)
        self.labels = source.labels[indices]
        # Read here, in the main process: every worker has a different one.
        self.seed = torch.initial_seed()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, request: Request) -> tuple[Tensor, Tensor]:
        levels = torch.empty(self.size, self.size, 3, dtype=torch.uint8)
        label = self._decode(request, levels)
        return levels.permute(2, 0, 1).contiguous(), label

    def __getitems__(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
        # One tensor for the batch: pictures are resized directly into their rows, and nothing is stacked.
        batch = torch.empty(len(requests), self.size, self.size, 3, dtype=torch.uint8)
        labels = torch.empty(len(requests), dtype=torch.long)
        for row, request in enumerate(requests):
            labels[row] = self._decode(request, batch[row])
        return batch.permute(0, 3, 1, 2), labels  # with the channels as the fastest axis, as decoders write them

    def _decode(self, request: Request, out: Tensor) -> Tensor:
        """Writes the picture to `out` (size, size, 3); returns its label."""
        epoch, position = request if isinstance(request, tuple) else (None, request)
        for at, index in self.tally.places(position, self.indices):
            # Seeded by the requested place: a picture that replaces another gets another box than at its own place.
            generator = None if epoch is None else Generator().manual_seed(seed_of(self.seed, epoch, position))
            try:
                self._cut(Picture(self.source.encoded(index)), generator, out)
            except Unreadable as e:
                self.tally.add(index, e, "the next picture takes its place")
            else:
                return self.labels[at]
        raise DataError(f"none of {len(self):,} pictures can be read, {self.name(0)} first\n  Replace the files")

    def _cut(self, picture: Picture, generator: Generator | None, out: Tensor) -> None:
        if self.smallest:
            box = random_box(*picture.size, self.smallest, generator=generator)
            picture.cut(box, self.size, drawn(self.interpolation, generator), out)
        else:
            how = "bicubic" if self.interpolation == "random" else self.interpolation
            out.copy_(picture.middle(self.size, self.inner, how))

    def name(self, i: int) -> str:
        """The file, or file and row, of picture i, marked if the picture is unreadable and was replaced."""
        index = int(self.indices[i])
        return self.source.name(index) + (" (unreadable)" if index in self.tally else "")

    def order(self, generator: Generator, window: int = 16) -> Tensor:
        """Draws an order of the pictures for an epoch; pictures in shards are ordered so that shards are read in turn.

        The shards are shuffled, and then the pictures within each `window` of shards: so the first n of an order can be
        skipped without reading their shards.
        """
        return shard_order(self.source.shards, self.indices, generator, window)


def shard_order(shards: Sequence[int] | None, indices: Tensor, generator: Generator, window: int) -> Tensor:
    """Shuffles the positions in `indices` (n,); see `Decoded.order`."""
    # Separate files cost the same in any order.
    if shards is None:
        return torch.randperm(len(indices), generator=generator)
    ends = torch.tensor(shards).cumsum(0)
    place = torch.randperm(len(shards), generator=generator)  # of each shard, in the epoch
    # The shards of one turn are open together, so their pictures can be mixed.
    turn = place[torch.searchsorted(ends, indices, right=True)] // window
    shuffled = torch.randperm(len(indices), generator=generator)
    # Shuffled first, then sorted by turn: within a turn the order stays random.
    return shuffled[turn[shuffled].argsort(stable=True)]


class Kept(Source):
    """A source whose pictures are read once and kept in memory as stored."""

    def __init__(self, source: Source, indices: Tensor, tally: Tally) -> None:
        self.source, self.labels, self.names, self.classes = source, source.labels, source.names, source.classes
        self.shards = source.shards  # which give the order, though nothing is read from them again
        self.kept: dict[int, bytes] = {}
        for index in indices.tolist():
            stored = source.encoded(index)
            try:
                self.kept[index] = stored if isinstance(stored, bytes) else Path(stored).read_bytes()
            except OSError as e:
                tally.add(index, Unreadable(str(e)), "the next picture takes its place")

    def encoded(self, i: int) -> bytes:
        return self.kept[i]

    def name(self, i: int) -> str:
        return self.source.name(i)


def decode_all(source: Source, indices: Tensor, to: tuple[int, int] | Decoded, tally: Tally) -> Cached:
    """Decodes all pictures that can be read to one uint8 tensor (n, 3, height, width).

    to: the common size of all, (width, height), or the data set that decodes each.
    """
    pictures: list[Tensor] = []
    kept: list[int] = []
    for index in indices.tolist():
        if index in tally:
            continue
        try:
            picture = Picture(source.encoded(index))
            if isinstance(to, tuple):
                if picture.size != to:
                    raise DataError(
                        f"{source.name(index)} is {picture.size}, the first is {to}; give one size: --data.size 64"
                    )
                levels = picture.whole()
            else:
                levels = torch.empty(to.size, to.size, 3, dtype=torch.uint8)
                to._cut(picture, None, levels)
        except Unreadable as e:
            tally.add(index, e, "it is left out")
            continue
        pictures.append(levels.permute(2, 0, 1))
        kept.append(index)
    # Only the rows that could be read, so that labels and names stay aligned with the pictures.
    rows = torch.tensor(kept, dtype=torch.long)
    found = Cached(torch.stack(pictures).contiguous(), source.labels[rows], Names(source, rows))
    found._places = None if source.shards is None else (source.shards, rows)
    found.unread = [(source.name(i), tally.why[i]) for i in indices.tolist() if i in tally]
    return found


class Names:
    """Names of the pictures of a source by their position in `rows`; a class, so that it can be pickled for workers."""

    def __init__(self, source: Source, rows: Tensor) -> None:
        self.source, self.rows = source, rows

    def __call__(self, i: int) -> str:
        return self.source.name(int(self.rows[i]))
