"""Pictures and labels for Lightning: the built-in digits, and any parquet file, image folder, shards or hub dataset.

Small pictures are decoded once into one uint8 tensor that is indexed a batch at a time; large ones are decoded and
cropped in worker processes. Crop, flip, normalisation and blending then run on the batch, on its device.
"""

import copy
import math
import os
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..models.catalogue import IMAGENET_MEAN as IMAGENET_MEAN
from ..models.catalogue import IMAGENET_STD as IMAGENET_STD
from .augment import Augment, normalize
from .decode import Interpolation, Picture, Unreadable
from .decode import middle_box as middle_box
from .decode import random_box as random_box
from .labels import NONE, unify
from .order import batch_generator, loader
from .sets import Cached, Decoded, Kept, Tally, decode_all
from .sets import shard_order as shard_order
from .sources import TEST, TRAIN, VALIDATION, DataError, Joined, Source
from .splits import kept_apart, open_all, open_splits
from .view import View

SMALL = 96  # pixels a side; up to here, pictures are kept in memory and by default not cropped at random


class Pictures(L.LightningDataModule):
    """The base of all picture data modules: loaders, normalisation and augmentation of the batch on its device.

    A subclass sets `num_classes` and `in_chans`, and in `setup` the datasets `self.sets["train" | "val" | "test"]`. If
    it also sets `classes` and `view` (how evaluation shows a picture), its checkpoints can predict without it.

    Args:
        batch_size: samples of one process in a batch.
        num_workers: processes that load; None: one per core, at most 8.
        mean: one figure per channel, of pictures in [0, 1]; a single one is that of all channels;
            None: ImageNet's.
        std: likewise.
        augment: of the batch in training; None: nothing.

    Attributes:
        on_device: Whether all pictures are kept on the training device; for sets that are kept in memory.
    """

    num_classes: int
    in_chans: int
    on_device: bool = False

    def __init__(
        self,
        batch_size: int,
        num_workers: int | None,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        augment: Augment | None,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.mean = self._per_channel("mean", IMAGENET_MEAN if mean is None else mean)
        self.std = self._per_channel("std", IMAGENET_STD if std is None else std)
        self.num_workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
        self.augment = augment or Augment()
        self.sets: dict[str, Dataset] = {}
        self.view: View | None = None

    def _per_channel(self, name: str, figures: Sequence[float]) -> list[float]:
        """One figure for each channel; a single one is that of all of them."""
        channels = getattr(self, "in_chans", len(figures))
        found = list(figures) * (channels if len(figures) == 1 else 1)
        least = 0.0 if name == "mean" else math.ulp(0.0)
        if len(found) != channels or not found or not all(least <= figure <= 1 for figure in found):
            raise DataError(
                f"data.{name}={list(figures)}: wants {channels or 'some'} figures, of pictures in [0, 1]"
                f"{'' if name == 'mean' else ', above 0'}\n  Divide figures of pictures in [0, 255] by 255"
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        return {} if self.view is None else {"picture": self.view.state()}

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        x, y = batch
        if x.dtype in (torch.float16, torch.bfloat16):  # --trainer.precision bf16-true; augmentation needs more digits
            x = x.float()
        if self.trainer is not None and self.trainer.training:
            generator = batch_generator(self.trainer, x.device, self.augment.seed)
            x, y = self.augment(x, y, self.mean, self.std, self.num_classes, generator)
        else:
            x = normalize(x, self.mean, self.std)
        precision = getattr(self.trainer, "precision_plugin", None)
        return (x if precision is None else precision.convert_input(x)), y

    def _loader(self, name: str) -> DataLoader:
        data = self.sets[name]
        # A batch from memory is one index operation; sending it between processes would take longer.
        workers = 0 if isinstance(data, Cached) else self.num_workers
        if self.on_device and isinstance(data, Cached) and self.trainer is not None:
            data.move(self.trainer.strategy.root_device)
        return loader(
            self,
            data,
            self.batch_size,
            train=name == "train",
            num_workers=workers,
            # Such a dataset returns whole batches.
            collate_fn=_as_is if hasattr(data, "__getitems__") else None,
            pin_memory=torch.cuda.is_available() and not self.on_device,
            persistent_workers=workers > 0,
        )

    def train_dataloader(self) -> DataLoader:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader:
        return self._loader(self._predicted)

    @property
    def _predicted(self) -> str:
        return "predict" if "predict" in self.sets else "test"

    def predicted_name(self, i: int) -> str:
        """The file, or file and row, of picture i among those that `predict` runs over.

        Args:
            i: the number of the picture, from 0.
        """
        name = getattr(self.sets[self._predicted], "name", str)
        return name(i)


def _as_is(batch: Any) -> Any:
    return batch


def hold_out(n: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Draws the indices of (training, held-out) pictures by a separate generator; at least one of each."""
    # A separate generator, so that the same pictures are held out whatever the run's seed.
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    held = min(max(1, round(n * share)), n - 1)
    return order[held:].sort().values, order[:held].sort().values


class Digits(Pictures):
    """The 1,797 handwritten digits of scikit-learn, 8x8 grey: nothing to download.

    One fifth (359 pictures) is held out, by a fixed seed, for validation; the test uses the same pictures, or its own.

    Args:
        batch_size: Pictures per batch and process.
        split_seed: Seed of the held-out split.
        test_share: Share of the digits that only the test sees; 0 tests on the validation digits.
        augment: Default: none.
        on_device: Keep all digits on the training device.
    """

    num_classes = 10
    in_chans = 1
    classes = tuple("0123456789")

    def __init__(
        self,
        batch_size: int = 64,
        split_seed: int = 0,
        test_share: float = 0.0,
        augment: Augment | None = None,
        on_device: bool = False,
    ) -> None:
        super().__init__(batch_size, 0, [0.3], [0.375], augment)
        self.on_device = on_device
        if not 0 <= test_share <= 0.5:
            raise DataError(f"data.test_share={test_share}: wants a share between 0 and 0.5")
        self.split_seed, self.test_share = split_seed, test_share
        self.view = View(1, 8, 8, 1.0, "bilinear", self.mean, self.std)

    def state_dict(self) -> dict[str, Any]:
        return {"classes": list(self.classes), **super().state_dict()}

    def setup(self, stage: str) -> None:
        if self.sets:
            return
        from sklearn.datasets import load_digits

        pictures, labels = load_digits(return_X_y=True)
        x = torch.tensor(pictures, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        y = torch.tensor(labels, dtype=torch.long)
        train, held = hold_out(len(y), 0.2, self.split_seed)
        parts = {"train": train, "val": held, "test": held}
        if self.test_share:
            rest, test = hold_out(len(train), self.test_share * len(y) / len(train), self.split_seed)
            parts |= {"train": train[rest], "test": train[test]}
        self.sets.update({name: Cached(x[rows], y[rows]) for name, rows in parts.items()})


class Images(Pictures):
    """Labelled pictures from local parquet files, tar shards, an image folder with a folder per class, or the hub.

    Columns and splits are found by their usual names (img, image; label, fine_label; validation, valid, val, else test)
    unless they are given; `odenets.training.layout` has the rules for folders, and `odenets.training.decode` those for
    each kind of picture. Classes are matched by name across all splits. Where only training pictures exist, a seeded
    share is held out, and a log line says so.

    Every picture is processed the same way, whether it is kept in memory or not: training crops a random box where
    `smallest_crop` asks for one; otherwise the shorter side is resized to size / `inner`, and the centre is cropped.
    Pictures are upright and in RGB.

    Args:
        root: Folder or file on this machine.
        hub: Dataset on the hub, e.g. uoft-cs/cifar10.
        download: Allows the network for `hub`; without it only an earlier download is used.
        size: Side of the square pictures; None keeps the stored size, which must then be the same for all.
        batch_size: Pictures per batch and process.
        image_key: Column of the pictures.
        label_key: Column of the labels; of tar shards, the suffix.
        train_split: Split to train on; several are joined by a plus sign: train+extra.
        val_split: Split to validate on; none that is trained on.
        test_split: Split to test on, none that is trained on; default: test, else the validation split.
        holdout: Share that is held out where there is no validation split.
        split_seed: Seed of the held-out share.
        cache: Decode once and keep all pictures in memory; None does so up to 96 pixels a side and 4 GiB in all.
        smallest_crop: Smallest share of the area in the random resized crop; 0 is off. None: 0.08 for pictures of more
            than 96 pixels a side, else off. An `augment.resized_crop` is applied here instead of to the batch.
        inner: Share of the shorter side that evaluation sees. None: 0.875 for pictures of more than 96 pixels a side,
            else 1.
        num_workers: Processes that decode; None takes the cores, at most 8. Cached pictures need none.
        mean: Per channel, of pictures in [0, 1].
        std: Per channel.
        augment: Augmentation of training batches; default: only the normalisation.
        subset: Of a dataset that has several, e.g. cropped_digits of SVHN: its configuration, or the folder in `root`.
        streaming: Read parquet files in place, shard by shard, without a copy in the cache of `datasets`; from the hub,
            as they are needed.
        interpolation: How pictures are resized; random draws one of the two for each training picture.
        max_unreadable: Pictures that may be left out or replaced because they cannot be read, per split.
        classes: Names of the classes in order; None takes those given by the data.
        predict_root: Folder or file of pictures for `predict`, which need no labels: all of them are taken, whatever
            split they are in; default: the test split.
        on_device: Keep all pictures on the training device, one copy per process, so that no batch is copied there; for
            small pictures, which are decoded once. The order and the augmentation are the same as without it.
    """

    in_chans = 3

    # long: half of it is its parameters, a line each
    def __init__(
        self,
        root: str | None = None,
        hub: str | None = None,
        download: bool = False,
        size: int | None = None,
        batch_size: int = 128,
        image_key: str | None = None,
        label_key: str | None = None,
        train_split: str | None = None,
        val_split: str | None = None,
        test_split: str | None = None,
        holdout: float = 0.1,
        split_seed: int = 0,
        cache: bool | None = None,
        smallest_crop: float | None = None,
        inner: float | None = None,
        num_workers: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        augment: Augment | None = None,
        subset: str | None = None,
        streaming: bool = False,
        interpolation: Interpolation = "bilinear",
        max_unreadable: int = 10,
        classes: list[str] | None = None,
        predict_root: str | None = None,
        on_device: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, mean, std, augment)
        self.size, self.holdout, self.split_seed, self.cache = size, holdout, split_seed, cache
        self.smallest_crop, self.inner, self.interpolation = smallest_crop, inner, interpolation
        self.max_unreadable, self.on_device = max_unreadable, on_device
        self._own_the_crop()
        self._check()
        # Opened here, so that missing data is reported before any model is built, and its class count can be linked.
        if root is None and hub is None and predict_root is not None and classes is not None:
            root = predict_root  # the splits and their labels, if it has any; all of it is predicted
        self.where = str(root or hub)
        keys = image_key, label_key, subset, streaming
        self.splits = open_splits(root, hub, download, *keys)
        for note in self.splits.notes:
            rank_zero_info(f"{self.where}: {note}")
        # After all splits are known by name, and before labels are unified: a split that is opened on request has
        # labels too.
        self.names = self._name_splits(train_split, val_split, test_split)
        self.classes: list[str] = unify(self.splits, classes, self.where)
        self._say_what_differs()
        self.predicted = None if predict_root is None else open_all(predict_root, *keys)

    def _check(self) -> None:
        """Refuses options that are out of their range."""
        if not 0 < self.holdout < 1:
            raise DataError(f"data.holdout={self.holdout}: wants a share between 0 and 1")
        for name, share in (("smallest_crop", self.smallest_crop), ("inner", self.inner)):
            if share is not None and not (0 < share <= 1 or (share == 0 and name == "smallest_crop")):
                raise DataError(f"data.{name}={share}: wants a share of the picture, up to 1")
        if self.interpolation not in ("bilinear", "bicubic", "random"):
            raise DataError(f"data.interpolation={self.interpolation!r}: wants bilinear, bicubic or random")
        if self.size is not None and self.size < 1:
            raise DataError(f"data.size={self.size}: wants pixels, 1 or more")

    def _own_the_crop(self) -> None:
        """Takes the random crop from the augmentation: pictures are cropped when decoded, and not again as a batch."""
        if self.augment.resized_crop is None:
            return
        if self.smallest_crop not in (None, self.augment.resized_crop):
            raise DataError(
                f"data.smallest_crop={self.smallest_crop} and data.augment.resized_crop={self.augment.resized_crop} "
                "are two figures for one crop\n  Give one of them"
            )
        self.smallest_crop = self.augment.resized_crop
        # A copy: the object may be shared with another data module.
        self.augment = copy.copy(self.augment)
        self.augment.resized_crop = None

    def _name_splits(self, train: str | None, val: str | None, test: str | None) -> dict[str, str | None]:
        """The split, or splits joined by a plus sign, that each part of a run uses."""
        # The numbers of the classes follow the order in which splits are opened.
        usual = {"test": (test, TEST), "train": (train, TRAIN), "val": (val, VALIDATION)}
        found = {use: self._split(f"{use}_split", *words) for use, words in usual.items()}
        named = kept_apart(found, [use for use, (name, _) in usual.items() if name is not None], self.where)
        trained, checked, tested = (named[use] for use in ("train", "val", "test"))
        # Better to validate on the test split than on a part of the training pictures; both then use the same split.
        if checked is None and tested is not None and not self._unlabelled(tested):
            checked = tested
        return {"train": trained, "val": checked, "test": tested or checked}

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """The number of classes of all splits together."""
        if not self.classes:
            raise DataError(
                f"{self.where}: no labels, so the classes are not known: {self._why()}\n"
                "  To predict, give the training data as data.root and this as data.predict_root, or data.classes"
            )
        return len(self.classes)

    def _why(self) -> str:
        return next(iter(self.splits.values())).why

    def _split(self, option: str, given: str | None, names: Sequence[str]) -> str | None:
        """Opens the split, or splits joined by a plus sign, that an option means, and returns their names."""
        if given is None:
            return next((name for name in names if name in self.splits), None)
        found = []
        for part in given.split("+"):
            name = self.splits.find(part.strip())
            if name is None:
                there = ", ".join([*self.splits, *sorted(self.splits.others)])
                raise DataError(
                    f"data.{option}: no split {part.strip()!r} in {self.where}; it has {there}\n"
                    "  Name one of them, or several: train+extra"
                )
            self.splits.open(name)
            found.append(name)
        return "+".join(found)

    def _source(self, name: str) -> Source:
        parts = [self.splits[part] for part in name.split("+")]
        return parts[0] if len(parts) == 1 else Joined(parts)

    def _unlabelled(self, name: str) -> bool:
        return any(bool((self.splits[part].labels == NONE).any()) for part in name.split("+"))

    def _say_what_differs(self) -> None:
        train, val = (self.names[name] for name in ("train", "val"))
        if train is None or val is None or not self.classes:
            return
        seen, needed = (set(self._source(name).labels.unique().tolist()) - {NONE} for name in (train, val))
        for extra, there, away in ((needed - seen, val, train), (seen - needed, train, val)):
            if extra and seen:
                names = ", ".join(self.classes[number] for number in sorted(extra)[:5])
                rank_zero_info(f"{self.where}: {len(extra):,} classes of {there} are not in {away}: {names}")

    def _labelled(self, option: str, name: str) -> Source:
        """A split to train or measure on; raises an error if one of its pictures has no label."""
        source = self._source(name)
        missing = (source.labels == NONE).nonzero()[:, 0]
        if len(missing):
            first = source.name(int(missing[0]))
            how_many = (
                "no labels" if len(missing) == len(source) else f"no label for {len(missing):,} of {len(source):,}"
            )
            why = source.why if len(missing) == len(source) else f"{first} first"
            raise DataError(
                f"{self.where}: split {name!r} has {how_many}: {why}\n"
                f"  Name classes by folders, or the column by data.label_key, or give data.{option}"
            )
        if not len(source):
            raise DataError(f"{self.where}: split {name!r} is empty\n  Give data.{option}")
        return source

    def setup(self, stage: str) -> None:
        train_name, val_name, test_name = (self.names[k] for k in ("train", "val", "test"))
        if stage == "predict" and self.predicted is not None:
            self.sets.setdefault("predict", self._dataset(self.predicted, None, train=False))
            return
        if stage == "predict" and (test_name is not None or not self._trainable()):
            source = self._source(test_name or train_name or next(iter(self.splits)))
            if "predict" not in self.sets:
                self.sets["predict"] = self._dataset(source, None, train=False)
            return
        if train_name is None and (stage == "fit" or val_name is None):
            there = ", ".join(f"{name} ({len(source):,} pictures)" for name, source in self.splits.items())
            raise DataError(f"{self.where}: no split to train on; it has {there}\n  Name it: --data.train_split NAME")
        rest = held = None
        train = self._labelled("train_split", train_name) if train_name and (stage == "fit" or not val_name) else None
        if val_name is None:
            assert train is not None
            if len(train) < 2:
                raise DataError(f"{self.where}: {len(train)} picture is not enough to hold one out")
            rest, held = hold_out(len(train), self.holdout, self.split_seed)
            if not self.sets:
                rank_zero_info(
                    f"{self.where} has no validation split beside {train_name}: {len(held):,} of {len(train):,} "
                    f"training pictures are held out (data.holdout={self.holdout}, data.split_seed={self.split_seed})"
                )
        if stage == "fit" and "train" not in self.sets:
            assert train is not None
            self.sets["train"] = self._dataset(train, rest, train=True)
        own = test_name is not None and test_name != val_name
        if "val" not in self.sets and not (own and stage in ("test", "predict")):
            val = train if val_name is None else self._labelled("val_split", val_name)
            assert val is not None
            self.sets["val"] = self._dataset(val, held, train=False)
        if stage in ("test", "predict") and "test" not in self.sets:
            test = self._labelled("test_split", str(test_name)) if own else None
            self.sets["test"] = self.sets["val"] if test is None else self._dataset(test, None, False)

    def _trainable(self) -> bool:
        return self.names["train"] is not None and not self._unlabelled(self.names["train"])

    def _dataset(self, source: Source, indices: Tensor | None, train: bool) -> Dataset:
        indices = torch.arange(len(source)) if indices is None else indices
        tally = Tally(source, self.max_unreadable)
        width, height = self._first_size(source, indices, tally)
        size = self.size or (width if width == height else None)
        large = max(width, height) > SMALL
        smallest = (0.08 if large else 0.0) if self.smallest_crop is None else self.smallest_crop
        inner = (0.875 if large else 1.0) if self.inner is None else self.inner
        # Counted as decoded pixels, one byte per channel, whatever the size of the files.
        fits = not large and len(indices) * 3 * (size or SMALL) ** 2 <= 4 << 30
        cache = fits if self.cache is None else self.cache
        if self.size is None and (large or size is None) and (smallest or not cache):
            raise DataError(f"{self.where}: pictures of {width}x{height} need one size; give --data.size 224")
        if not train:
            self._note_view(size, (height, width), inner, cache)
        # A random box differs in each epoch, so then the file can be kept, but not the picture.
        if cache and not (train and smallest):
            if self.size is None:
                return decode_all(source, indices, (width, height), tally)
            view = Decoded(source, indices, self.size, False, 0.0, inner, self.interpolation, tally)
            return decode_all(source, indices, view, tally)
        if self.on_device:
            why = "training cuts a new box of each in every epoch" if cache else "they are not kept in memory"
            raise DataError(
                f"data.on_device: these pictures are decoded when they are asked for, since {why}\n"
                f"  Leave it out, or give --data.{'smallest_crop 0' if cache else 'cache true'}"
            )
        assert size is not None
        if cache:
            source = Kept(source, indices, tally)
        return Decoded(source, indices, size, train, smallest, inner, self.interpolation, tally)

    def _note_view(self, size: int | None, stored: tuple[int, int], inner: float, cache: bool) -> None:
        """Records how evaluation shows a picture: as stored, if no size is given and all pictures are kept."""
        how = "bicubic" if self.interpolation == "random" else self.interpolation
        as_stored = cache and self.size is None
        height, width = stored if as_stored or size is None else (size, size)
        self.view = View(3, height, width, 1.0 if as_stored else inner, how, self.mean, self.std)

    def _first_size(self, source: Source, indices: Tensor, tally: Tally) -> tuple[int, int]:
        """Width and height of the first picture that can be opened."""
        for index in indices.tolist():
            try:
                return Picture(source.encoded(index)).size
            except Unreadable as e:
                tally.add(index, e, "it is left out")
        raise DataError(f"{self.where}: none of {len(indices):,} pictures can be read\n  Replace the files")

    def state_dict(self) -> dict[str, Any]:
        return {"classes": list(self.classes), **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses a checkpoint that was trained on other classes: its class numbers would mean something else."""
        theirs = state_dict.get("classes")
        if theirs is None or not self.classes or theirs == self.classes:
            # Without labels in the data, the class names are the checkpoint's.
            self.classes = self.classes or theirs or []
            return
        # Both are padded, so that the first difference is found even where one list is a prefix of the other.
        pairs = zip([*theirs, *[None] * len(self.classes)], [*self.classes, *[None] * len(theirs)], strict=False)
        number, (a, b) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
        raise DataError(
            f"{self.where}: class {number} is {b!r}, and {a!r} in the checkpoint, of {len(self.classes)} and "
            f"{len(theirs)} classes\n  Give the data that it was trained on, or its class names in data.classes"
        )
