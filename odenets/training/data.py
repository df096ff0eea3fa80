"""Pictures and labels for Lightning: the built-in digits, and any parquet file, image folder or hub dataset.

Small pictures are decoded once into one uint8 tensor that is indexed a batch at a time; large ones are decoded and
cropped in worker processes. Crop, flip, normalisation and blending then run on the batch, on its device.
"""

import os
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .augment import Augment, normalize
from .order import batch_generator, evaluation_loader, training_loader
from .sources import TEST, TRAIN, VALIDATION, DataError, Source, open_splits

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Cached(Dataset):
    """Pictures (n, c, h, w) and labels (n,) in memory; a whole batch is one index operation.

    >>> import torch
    >>> data = Cached(torch.zeros(5, 1, 2, 2), torch.arange(5))
    >>> data.__getitems__([4, 2])[1]
    tensor([4, 2])
    """

    def __init__(self, pictures: Tensor, labels: Tensor) -> None:
        self.pictures, self.labels = pictures, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.pictures[i], self.labels[i]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        picked = torch.as_tensor(indices)
        return self.pictures[picked], self.labels[picked]


class Decoded(Dataset):
    """Pictures that are decoded and brought to (3, size, size) uint8 when asked for.

    Training cuts a random box (share of the area from [`smallest`, 1]) and resizes it; evaluation resizes the shorter
    side to size / `inner` and cuts the middle.
    """

    def __init__(self, source: Source, indices: Tensor, size: int, train: bool, smallest: float, inner: float) -> None:
        self.source, self.indices, self.size = source, indices, size
        self.train, self.smallest, self.inner = train, smallest, inner

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        index = int(self.indices[i])
        picture = self.source.picture(index)
        box = random_box(*picture.size, self.smallest) if self.train else middle_box(*picture.size, self.inner)
        picture = picture.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box)
        return to_tensor(picture), self.source.labels[index]


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture as uint8 (3, h, w)."""
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(picture.height, picture.width, 3).permute(2, 0, 1).contiguous()


def random_box(width: int, height: int, smallest: float) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a random box: area share in [smallest, 1], aspect in [3/4, 4/3], cut to fit."""
    area, aspect, x, y = torch.rand(4).tolist()
    area = (smallest + (1 - smallest) * area) * width * height
    aspect = (3 / 4) * (16 / 9) ** aspect
    w, h = min((area * aspect) ** 0.5, width), min((area / aspect) ** 0.5, height)
    left, top = x * (width - w), y * (height - h)
    return left, top, min(left + w, width), min(top + h, height)


def middle_box(width: int, height: int, inner: float) -> tuple[float, float, float, float]:
    """The centred square whose side is `inner` times the shorter side."""
    side = inner * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


class Pictures(L.LightningDataModule):
    """What all picture data modules share: loaders, normalisation and augmentation of the batch on its device.

    A subclass sets `num_classes` and `in_chans`, and in `setup` the datasets `self.sets["train" | "val" | "test"]`.
    """

    num_classes: int
    in_chans: int

    def __init__(
        self,
        batch_size: int,
        num_workers: int | None,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Augment | None,
    ) -> None:
        super().__init__()
        self.batch_size, self.mean, self.std = batch_size, list(mean), list(std)
        self.num_workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
        self.augment = augment or Augment()
        self.sets: dict[str, Dataset] = {}

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        x, y = batch
        if x.dtype in (torch.float16, torch.bfloat16):  # --trainer.precision bf16-true; augmentation wants more digits
            x = x.float()
        if self.trainer is not None and self.trainer.training:
            generator = batch_generator(self.trainer, x.device, self.augment.seed)
            x, y = self.augment(x, y, self.mean, self.std, self.num_classes, generator)
        else:
            x = normalize(x, self.mean, self.std)
        precision = getattr(self.trainer, "precision_plugin", None)
        return (x if precision is None else precision.convert_input(x)), y

    def _loader(self, name: str) -> DataLoader:
        data, train = self.sets[name], name == "train"
        cached = isinstance(data, Cached)
        workers = 0 if cached else self.num_workers
        loader = training_loader if train else evaluation_loader
        return loader(
            self,
            data,
            self.batch_size,
            num_workers=workers,
            collate_fn=_as_is if cached else None,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
        )

    def train_dataloader(self) -> DataLoader:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader:
        return self._loader("test")


def _as_is(batch: Any) -> Any:
    return batch


def hold_out(n: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of (training, held-out) pictures, shuffled by a generator of its own; at least one of each."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    held = min(max(1, round(n * share)), n - 1)
    return order[held:].sort().values, order[:held].sort().values


class Digits(Pictures):
    """The 1,797 handwritten digits of scikit-learn, 8x8 grey: nothing to download.

    One fifth (359 pictures) is held out, by a fixed seed, for validation; the test takes the same, or some of its own.

    Args:
        batch_size: Pictures per step.
        split_seed: Which digits are held out.
        test_share: Share of the digits that only the test sees; 0 tests on those of the validation.
        augment: Default: none.
    """

    num_classes = 10
    in_chans = 1

    def __init__(
        self, batch_size: int = 64, split_seed: int = 0, test_share: float = 0.0, augment: Augment | None = None
    ) -> None:
        super().__init__(batch_size, 0, [0.3], [0.375], augment)
        if not 0 <= test_share <= 0.5:
            raise DataError(f"data.test_share={test_share}: wants a share between 0 and 0.5")
        self.split_seed, self.test_share = split_seed, test_share

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
    """Labelled pictures from local parquet files, an image folder with a folder per class, or the Hugging Face hub.

    Columns and splits are found by their usual names (img, image; label, fine_label; validation, valid, val, else test)
    unless they are given. Where only training pictures exist, a seeded share is held out, and a log line says so.
    Grey pictures become RGB.

    Args:
        root: Folder or file on this machine.
        hub: Dataset on the hub, e.g. uoft-cs/cifar10.
        download: Allows the network for `hub`; without it only an earlier download is used.
        size: Side of the square pictures; None keeps the stored size, which must then be one for all.
        batch_size: Pictures per step.
        image_key: Column of the pictures.
        label_key: Column of the labels.
        train_split: Split to train on.
        val_split: Split to validate on.
        test_split: Split to test on; default: test, else the validation split.
        holdout: Share that is held out where there is no validation split.
        split_seed: Seed of the share that is held out.
        cache: Decode once and keep all pictures in memory; None does so up to 96 pixels a side and 4 GiB in all.
        smallest_crop: Smallest share of the area in the random resized crop of pictures that are not cached.
        inner: Share of the shorter side that evaluation sees of pictures that are not cached.
        num_workers: Processes that decode; None takes the cores, at most 8. Cached pictures need none.
        mean: Per channel, of pictures in [0, 1].
        std: Per channel.
        augment: What training batches go through; default: nothing but the normalisation.
    """

    in_chans = 3

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
        smallest_crop: float = 0.08,
        inner: float = 0.875,
        num_workers: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        augment: Augment | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, mean or IMAGENET_MEAN, std or IMAGENET_STD, augment)
        if not 0 < holdout < 1:
            raise DataError(f"data.holdout={holdout}: wants a share between 0 and 1")
        self.size, self.holdout, self.split_seed, self.cache = size, holdout, split_seed, cache
        self.smallest_crop, self.inner = smallest_crop, inner
        # Opened at once: missing data is reported before any model is built, and the class count can be linked to it.
        self.splits = open_splits(root, hub, download, image_key, label_key)
        self.where = str(root or hub)
        train = self._split("train_split", train_split, TRAIN)
        self.names = {
            "train": train or next(iter(self.splits)),
            "val": self._split("val_split", val_split, VALIDATION) or self._split("val_split", None, TEST),
        }
        self.names["test"] = self._split("test_split", test_split, TEST) or self.names["val"]
        self.classes = self.splits[self.names["train"]].classes  # type: ignore[index]

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """The number of classes of the training pictures."""
        return len(self.classes)

    def _split(self, option: str, given: str | None, names: Sequence[str]) -> str | None:
        if given is not None and given not in self.splits:
            raise DataError(f"data.{option}: no split {given!r} in {self.where}; it has {', '.join(self.splits)}")
        return given or next((name for name in names if name in self.splits), None)

    def setup(self, stage: str) -> None:
        train_name, val_name, test_name = (self.names[k] for k in ("train", "val", "test"))
        train = self.splits[train_name]  # type: ignore[index]
        rest = held = None
        if val_name is None:
            if len(train) < 2:
                raise DataError(f"{self.where}: {len(train)} picture is not enough to hold one out")
            rest, held = hold_out(len(train), self.holdout, self.split_seed)
            if not self.sets:
                rank_zero_info(
                    f"{self.where} has no validation split: {len(held):,} of {len(train):,} training pictures are held "
                    f"out (data.holdout={self.holdout}, data.split_seed={self.split_seed})"
                )
        if stage == "fit" and "train" not in self.sets:
            self.sets["train"] = self._dataset(train, rest, train=True)
        if "val" not in self.sets:
            self.sets["val"] = self._dataset(train if val_name is None else self.splits[val_name], held, train=False)
        if stage in ("test", "predict") and "test" not in self.sets:
            own = test_name is not None and test_name != val_name
            self.sets["test"] = self._dataset(self.splits[str(test_name)], None, False) if own else self.sets["val"]

    def _dataset(self, source: Source, indices: Tensor | None, train: bool) -> Dataset:
        indices = torch.arange(len(source)) if indices is None else indices
        first = source.picture(int(indices[0]))
        size = self.size or (first.width if first.width == first.height else None)
        fits = max(first.size) <= 96 and len(indices) * 3 * (size or 96) ** 2 <= 4 << 30
        if fits if self.cache is None else self.cache:
            return decode_all(
                source, indices, (self.size, self.size) if self.size else first.size, self.size is not None
            )
        if size is None or (self.size is None and max(first.size) > 96):
            raise DataError(
                f"{self.where}: pictures of {first.width}x{first.height} need one size; give --data.size 224"
            )
        return Decoded(source, indices, size, train, self.smallest_crop, self.inner)


def decode_all(source: Source, indices: Tensor, size: tuple[int, int], resize: bool) -> Cached:
    """All pictures as one uint8 tensor (n, 3, height, width)."""
    pictures = torch.empty(len(indices), 3, size[1], size[0], dtype=torch.uint8)
    for row, index in enumerate(indices.tolist()):
        picture = source.picture(index)
        if picture.size != size:
            if not resize:
                raise DataError(
                    f"picture {index} is {picture.size}, the first is {size}; give one size: --data.size 64"
                )
            picture = picture.resize(size, Image.Resampling.BILINEAR)
        pictures[row] = to_tensor(picture)
    return Cached(pictures, source.labels[indices])
