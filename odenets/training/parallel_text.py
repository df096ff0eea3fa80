"""Sentences and their translations for Lightning, as bytes: parquet files, or a dataset of the Hugging Face hub.

A word is a byte of UTF-8, so that there is no vocabulary to learn, to store or to agree on. Sentences are longer than
in subwords, the units of published translation results, which are not comparable with figures per byte.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from ..models.revcol_seq import END, PAD, START
from .data import hold_out
from .order import loader
from .sources import TEST, TRAIN, VALIDATION, DataError, find_column, open_tables

FIRST = 3  # the word of byte 0, after those for padding, start and end
WORDS = FIRST + 256
WAYS = (
    "give --data.root FOLDER (parquet files), or --data.hub NAME --data.subset SUBSET --data.download true, "
    "or train on the built-in language: -c experiments/synthetic_translation.yaml"
)


def to_words(text: str) -> Tensor:
    """The words of a text, between start and end.

    Args:
        text: any text.

    >>> to_words("ab").tolist()
    [1, 100, 101, 2]
    """
    # Bytes, so that no vocabulary has to be learned, and none travels with a checkpoint.
    return torch.tensor([START, *(FIRST + byte for byte in text.encode()), END])


def to_text(words: Iterable[int]) -> str:
    """The text of words up to the first end; bytes that are not UTF-8 are marked.

    Args:
        words: numbers of words.

    >>> to_text(to_words("größer").tolist())
    'größer'
    """
    found = bytearray()
    for word in words:
        if word == END:
            break
        if word >= FIRST:
            found.append(word - FIRST)
    return found.decode(errors="replace")


class Pairs(Dataset):
    """Sentences and their translations, converted to words on request.

    Args:
        table: A Hugging Face dataset.
        keys: Its columns of the sentences and of the translations.
    """

    def __init__(self, table: Any, keys: tuple[str, str]) -> None:
        self.table, self.keys = table, keys

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        rows = self.table[indices]
        texts = zip(*(rows[key] for key in self.keys), strict=True)
        return [(to_words(source), to_words(target)) for source, target in texts]


def padded(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Collates a batch (n, s), (n, t), with sentences padded to the longest on each side.

    Args:
        pairs: source and target of each sample.
    """
    source, target = (pad_sequence(list(s), batch_first=True, padding_value=PAD) for s in zip(*pairs, strict=True))
    return source, target


def _fits(sources: list[str | None], targets: list[str | None], length: int) -> list[bool]:
    """Which pairs have both sides, neither longer than `length` words with start and end."""
    pairs = zip(sources, targets, strict=True)
    # Start and end count as words.
    return [bool(s and t) and max(len(str(s).encode()), len(str(t).encode())) + 2 <= length for s, t in pairs]


class ParallelText(L.LightningDataModule):
    """Sentences and their translations as bytes (259 words), from local parquet files or the Hugging Face hub.

    A split has a column per language, or, as WMT on the hub, a column `translation` of both. Pairs that are empty or
    too long are left out, and a log line says how many. Where there is no validation or test split, a seeded share is
    held out.

    Args:
        source: Language, or column, to translate from.
        target: To translate to.
        root: Folder or file on this machine.
        hub: Dataset on the hub, e.g. wmt/wmt14.
        subset: Of the hub's dataset, e.g. de-en.
        download: Allows the network for `hub`; without it only an earlier download is used.
        batch_size: Pairs per batch and process.
        length: Largest number of words of a sentence, including start and end.
        holdout: Share that is held out where there is no validation or test split.
        split_seed: Seed of that share.
        num_workers: Processes that read.
    """

    def __init__(
        self,
        source: str = "en",
        target: str = "de",
        root: str | None = None,
        hub: str | None = None,
        subset: str | None = None,
        download: bool = False,
        batch_size: int = 64,
        length: int = 256,
        holdout: float = 0.01,
        split_seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < holdout < 1:
            raise DataError(f"data.holdout={holdout}: wants a share between 0 and 1")
        self.batch_size, self.length, self.num_workers = batch_size, length, num_workers
        self.holdout, self.split_seed, self.where = holdout, split_seed, str(root or hub)
        # Opened at once: missing data is reported before any model is built.
        splits = open_tables(root, hub, download, subset, WAYS)
        if not splits:
            raise DataError(f"data.root: {root!r} holds no parquet files\n  {WAYS}")
        # Columns such as `translation.de`, where a data set nests its languages.
        self.splits = {name: table.flatten() for name, table in splits.items()}
        self.train_name = self._first(TRAIN) or next(iter(self.splits))
        # Not the split that is trained on, for want of one of that name.
        self.val_name = next((n for n in (*VALIDATION, *TEST) if n in self.splits and n != self.train_name), None)
        features = self.splits[self.train_name].features
        self.keys = tuple(
            find_column(None, [language, f"translation.{language}"], features, option, self.where)
            for option, language in (("source", source), ("target", target))
        )
        self.sets: dict[str, Pairs] = {}

    def _first(self, names: Sequence[str]) -> str | None:
        return next((name for name in names if name in self.splits), None)

    def setup(self, stage: str) -> None:
        if self.sets:
            return
        train = self._fitting(self.train_name)
        if self.val_name is None:
            rest, held = hold_out(len(train), self.holdout, self.split_seed)
            train, validation = train.select(rest.tolist()), train.select(held.tolist())
            rank_zero_info(f"{self.where} has no validation split: {len(held):,} pairs are held out (data.holdout)")
        else:
            validation = self._fitting(self.val_name)
        self.sets = {"train": Pairs(train, self.keys), "val": Pairs(validation, self.keys)}  # pyright: ignore[reportArgumentType]

    def _fitting(self, name: str) -> Any:
        """The pairs of a split that are not too long."""
        table = self.splits[name].select_columns(list(self.keys))
        fits = partial(_fits, length=self.length)
        found = table.filter(fits, batched=True, input_columns=list(self.keys))
        if len(found) < len(table):
            out = len(table) - len(found)
            rank_zero_info(f"{self.where}, {name}: {out:,} of {len(table):,} pairs are empty or too long (data.length)")
        if len(found) < (2 if self.val_name is None else 1):
            raise DataError(f"{self.where}, {name}: {len(found)} pairs fit {self.length} words; give --data.length")
        return found

    def _loader(self, name: str) -> DataLoader:
        return loader(
            self,
            self.sets[name],
            self.batch_size,
            train=name == "train",
            collate_fn=padded,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> DataLoader:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader:
        return self._loader("val")
