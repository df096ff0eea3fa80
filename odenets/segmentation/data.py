"""Pictures and masks for Lightning: ADE20K, Cityscapes, folders, tables, the hub; and drawn shapes, without a download.

When a training picture is decoded, it is resized by a random factor and a random box is cropped from it; the random
numbers depend only on the seed, the epoch and its place in the data set. Flips and colour distortion follow on the
batch, on its device. In evaluation a picture is resized once and its mask stays as stored: figures count the pixels of
the stored masks.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from ..shapes import CLASSES, draw
from ..training.augment import normalize
from ..training.data import Pictures, hold_out
from ..training.decode import Picture, Unreadable
from ..training.errors import DataError
from ..training.order import IGNORED, batch_generator, loader, seed_of
from ..training.sets import Tally
from ..training.sources import TEST, TRAIN, VALIDATION
from ..training.splits import kept_apart
from .augment import SegmentationAugment
from .masks import Labels, colors
from .pairs import JoinedPairs, Named, Pairs, open_pairs, open_pictures
from .presets import PRESETS

Request = int | tuple[int, int]  # an index, or (epoch, index)
_TRIES = 10  # attempts to find a box that no class fills nearly alone


class Framing(NamedTuple):
    """The sizes to which pictures are resized and cropped.

    Attributes:
        short: length to which the shorter side is resized; None leaves a picture as it is.
        longest: upper limit of the longer side after that.
        crop: height and width of training pictures.
        scales: range of the factor by which training pictures are resized further.
        most: share of a training picture that one class may fill; if it fills more, another box is tried.
    """

    short: int | None
    longest: int | None
    crop: tuple[int, int]
    scales: tuple[float, float]
    most: float

    def size(self, width: int, height: int, factor: float = 1.0) -> tuple[int, int]:
        """Returns the width and height to which a picture of this size is resized.

        Example:
            >>> Framing(512, 2048, (512, 512), (0.5, 2.0), 0.75).size(683, 512, 0.5)
            (342, 256)
        """
        base = 1.0 if self.short is None else self.short / min(width, height)
        if self.longest is not None:
            base = min(base, self.longest / max(width, height))
        return max(1, round(width * base * factor)), max(1, round(height * base * factor))


class Segments(Dataset):
    """Pictures with masks, decoded on access.

    In training, uint8 (3, *crop) and int16 (*crop); in evaluation, uint8 (3, h, w) at the resized size and int16 (H, W)
    as stored. The next picture replaces one that cannot be read; in evaluation it has no classes then, so that it is
    not counted twice.

    Attributes:
        seed: seed of the random numbers for requests (epoch, index).
        takes_pairs: marks a data set that takes such requests and draws on its own.
    """

    takes_pairs = True

    def __init__(
        self,
        pairs: Pairs,
        indices: Tensor,
        labels: Labels | None,
        framing: Framing,
        train: bool,
        fill: Sequence[int],
        tally: Tally,
    ) -> None:
        """labels: None reads no masks. fill: the colour beside pictures that are smaller than the crop."""
        self.pairs, self.indices, self.labels, self.framing, self.train = pairs, indices, labels, framing, train
        # The seed is read in the main process: each worker has a different one.
        self.fill, self.tally, self.seed = torch.tensor(fill, dtype=torch.uint8), tally, torch.initial_seed()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, request: Request) -> tuple[Tensor, Tensor]:
        epoch, position = request if isinstance(request, tuple) else (None, request)
        for at, index in self.tally.places(position, self.indices):
            # Seeded by the requested place: a picture that replaces another gets a different crop.
            generator = None if epoch is None else Generator().manual_seed(seed_of(self.seed, epoch, position))
            try:
                picture, classes = self._read(index)
                x, y = self._cut(picture, classes, generator) if self.train else self._whole(picture, classes)
            except Unreadable as e:
                self.tally.add(index, e, "the next picture takes its place" if self.train else "it is not counted")
                continue
            return x, y if self.train or at == position % len(self) else torch.full_like(y, IGNORED)
        raise DataError(f"none of {len(self):,} pictures can be read, {self.name(0)} first\n  Replace the files")

    def _read(self, index: int) -> tuple[Image.Image, Tensor]:
        picture = Picture(self.pairs.picture(index))
        wide, high = picture.size
        if self.labels is None:
            return picture.rgb(), torch.full((high, wide), IGNORED, dtype=torch.int16)
        stored = self.pairs.mask(index)
        if stored is None:
            raise Unreadable("it has no mask")
        # Before the picture, which takes longer to decode.
        classes = self.labels.read(stored, picture.size)
        return picture.rgb(), torch.from_numpy(classes)

    def _whole(self, picture: Image.Image, classes: Tensor) -> tuple[Tensor, Tensor]:
        size = self.framing.size(*picture.size)
        seen = picture if size == picture.size else picture.resize(size, Image.Resampling.BILINEAR)
        return _levels(seen).permute(2, 0, 1).contiguous(), classes

    def _cut(self, picture: Image.Image, classes: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        low, high = self.framing.scales
        factor = low + (high - low) * float(torch.rand((), generator=generator))
        wide, tall = self.framing.size(*picture.size, factor)
        rows, columns = self.framing.crop
        height, width = min(rows, tall), min(columns, wide)
        # Stored pixels per pixel of the resized picture.
        x, y = picture.width / wide, picture.height / tall
        top = left = 0
        part = classes
        for _ in range(_TRIES):
            place = torch.rand(2, generator=generator).tolist()
            top, left = int(place[0] * (tall - height + 1)), int(place[1] * (wide - width + 1))
            # The stored pixel under the centre of each pixel, where the filter of the picture is centred too.
            down = ((torch.arange(height) + top + 0.5) * y).long().clamp(max=picture.height - 1)
            across = ((torch.arange(width) + left + 0.5) * x).long().clamp(max=picture.width - 1)
            part = classes[down][:, across]
            # After the last attempt the box stays, whatever fills it.
            if not filled_by_one(part, self.framing.most):
                break
        box = (left * x, top * y, min((left + width) * x, picture.width), min((top + height) * y, picture.height))
        # The mean colour, which normalisation maps to 0, the value of the network's own padding.
        levels = self.fill.expand(rows, columns, 3).clone()
        levels[:height, :width] = _levels(picture.resize((width, height), Image.Resampling.BILINEAR, box=box))
        mask = torch.full((rows, columns), IGNORED, dtype=torch.int16)
        mask[:height, :width] = part
        return levels.permute(2, 0, 1).contiguous(), mask

    def name(self, i: int) -> str:
        """The file, or file and row, of picture i, marked if it could not be read."""
        index = int(self.indices[i])
        return self.pairs.name(index) + (" (unreadable)" if index in self.tally else "")


def _levels(picture: Image.Image) -> Tensor:
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)  # torch warns about read-only memory
    return flat.view(picture.height, picture.width, 3)


def filled_by_one(classes: Tensor, most: float) -> bool:
    """Whether one class has at least this share of the pixels that have a class; true too if it is the only class.

    Example:
        >>> import torch
        >>> filled_by_one(torch.tensor([[0, 0, 0, 1, -100]]), 0.75), filled_by_one(torch.tensor([[0, 0, 1]]), 0.75)
        (True, False)
    """
    if most >= 1:
        return False
    counts = torch.bincount(classes[classes != IGNORED].long())
    counts = counts[counts > 0]
    return len(counts) < 2 or float(counts.max()) >= most * float(counts.sum())


class Scenes(Pictures):
    """Base class of data modules with masks: batches in training, and lists of single pictures in evaluation.

    An evaluation batch is a list of pictures (c, h, w) and a list of masks (H, W), of any sizes.

    Attributes:
        classes: names of the classes.
        colors: the colour in which each is drawn.
    """

    in_chans = 3
    classes: list[str]
    colors: list[list[int]]

    def __init__(
        self,
        batch_size: int,
        val_batch_size: int,
        num_workers: int | None,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        augment: SegmentationAugment | None,
    ) -> None:
        super().__init__(batch_size, num_workers, mean, std, None)
        self.val_batch_size = val_batch_size
        self.augment: SegmentationAugment = augment or SegmentationAugment()  # type: ignore[assignment]

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """The number of classes."""
        return len(self.classes)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        precision = getattr(self.trainer, "precision_plugin", None)
        convert = (lambda t: t) if precision is None else precision.convert_input
        if self.trainer is not None and self.trainer.training:
            # In half precision the hues of dark pixels would be noise.
            x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
            generator = batch_generator(self.trainer, x.device, self.augment.seed)
            x, y = self.augment(x, y, self.mean, self.std, generator)
            return convert(x), y
        return [convert(normalize(p[None], self.mean, self.std)[0]) for p in x], list(y)

    def _loader(self, name: str) -> DataLoader:
        data, train = self.sets[name], name == "train"
        # Workers would only copy a data set that is in memory already.
        workers = 0 if isinstance(data, DrawnSet) else self.num_workers
        return loader(
            self,
            data,
            self.batch_size if train else self.val_batch_size,
            train=train,
            num_workers=workers,
            collate_fn=_stacked if train else _listed,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"classes": list(self.classes)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Rejects a checkpoint trained on other classes, whose class numbers would have other meanings."""
        theirs = state_dict.get("classes")
        if theirs is not None and theirs != self.classes:
            pairs = zip([*theirs, *[None] * len(self.classes)], [*self.classes, *[None] * len(theirs)], strict=False)
            number, (a, b) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
            raise DataError(
                f"class {number} is {b!r}, and {a!r} in the checkpoint, of {len(self.classes)} and {len(theirs)} "
                "classes\n  Give the data that it was trained on, or its class names in data.classes"
            )


def _stacked(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])


def _listed(samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    # In evaluation each picture has its own size, so they cannot be stacked.
    return [x for x, _ in samples], [y for _, y in samples]


class DrawnSet(Dataset):
    """Drawn pictures and their masks, held in memory."""

    def __init__(self, numbers: Sequence[int], size: int, seed: int, texture: float) -> None:
        drawings = [draw(number, size, seed, texture) for number in numbers]
        self.pictures = torch.stack([torch.from_numpy(d.picture).permute(2, 0, 1) for d in drawings]).contiguous()
        self.masks = torch.stack([torch.from_numpy(d.mask).to(torch.int16) for d in drawings])

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.pictures[i], self.masks[i]

    def name(self, i: int) -> str:
        """The name of picture i, made from its number."""
        return f"{i:06d}.png"


class DrawnShapes(Scenes):
    """Coloured shapes on texture, drawn when training begins, without any download; see ``odenets.shapes``.

    Args:
        train: number of training pictures.
        val: number of validation pictures, distinct from those.
        size: side in pixels.
        batch_size: pictures per step.
        val_batch_size: pictures per evaluation batch.
        seed: seed of the pictures.
        texture: strength of the background's colours, 0 for grey.
        augment: augmentation of training batches; default: flips and colour distortion.
    """

    def __init__(
        self,
        train: int = 2000,
        val: int = 200,
        size: int = 64,
        batch_size: int = 16,
        val_batch_size: int = 16,
        seed: int = 0,
        texture: float = 1.0,
        augment: SegmentationAugment | None = None,
    ) -> None:
        super().__init__(batch_size, val_batch_size, 0, None, None, augment)
        if min(train, val) < 1 or size < 16 or not 0 <= texture < math.inf:
            figures = f"train={train}, val={val}, size={size}, texture={texture}"
            raise DataError(
                f"DrawnShapes: {figures}; wants pictures, of 16 pixels or more, and a strength of 0 or more"
            )
        self.train, self.val, self.size, self.seed, self.texture = train, val, size, seed, texture
        self.classes, self.colors = list(CLASSES), colors(len(CLASSES))

    def setup(self, stage: str) -> None:
        if stage == "fit" and "train" not in self.sets:
            self.sets["train"] = DrawnSet(range(self.train), self.size, self.seed, self.texture)
        if "val" not in self.sets:
            numbers = range(self.train, self.train + self.val)  # none of the training pictures
            self.sets["val"] = DrawnSet(numbers, self.size, self.seed, self.texture)
        self.sets["test"] = self.sets["val"]


class SegmentationData(Scenes):
    """Pictures with masks of ADE20K, Cityscapes, any folder, parquet files or a data set of the hub.

    See ``odenets.segmentation.pairs`` for how pictures and masks are found, and ``odenets.segmentation.masks`` for what
    the values of masks mean. A picture whose mask is missing, has another size, or holds a value that is not a class is
    reported and counted like one that cannot be read; more than ``max_unreadable`` of them end the run.

    Args:
        root: Folder on this machine.
        hub: Data set on the hub.
        download: Allows network access for ``hub``; without it only an earlier download is used.
        kind: A data set whose labels, folders and usual sizes are known; other arguments override these, and a palette,
            ``ids`` or ``reduce_labels`` all that is known of how its classes are stored.
        classes: Names of the classes in order, or their number.
        crop: Side, or height and width, of training pictures. None: 512.
        short: Length to which the shorter side is resized, before the random factor in training; None leaves pictures
            as they are.
        longest: Upper limit of the longer side after that.
        scales: Range of the random factor.
        most: Share of a training picture that one class may fill; if it fills more, another box is tried, up to ten.
        batch_size: Pictures per step.
        val_batch_size: Pictures per evaluation batch; consecutive ones of one size go through the network together.
        image_key: Column of the pictures.
        mask_key: Column of the masks.
        images: Folder of the pictures; None takes the usual names.
        masks: Folder of the masks; None takes the usual names.
        image_suffix: Ending of the names of pictures, before the dot.
        mask_suffix: Ending of the names of masks, before the dot.
        ignore: Values of masks that do not count; None: 255, unless that is a class.
        reduce_labels: Whether 0 does not count and class c is stored as c + 1.
        ids: The value of each class in order; all others do not count.
        palette: The colour of each class in order, for masks in colour; the options above are for masks of numbers.
        ignore_colors: Colours that do not count, beside a palette.
        train_split: Split to train on; several are joined by a plus sign: train+extra.
        val_split: Split to validate on; none that is trained on.
        test_split: Split to test on, which must have masks, none that is trained on; default: test if it has masks,
            else the validation split.
        holdout: Share of the training pictures that is held out if there is no validation split.
        split_seed: Seed of the choice of held-out pictures.
        num_workers: Processes that decode; None takes the cores, at most 8.
        mean: Per channel, of pictures in [0, 1].
        std: Per channel.
        augment: Augmentation of training batches; default: flips and colour distortion.
        subset: Configuration of a data set on the hub that has several.
        max_unreadable: Pictures per split that may be left out or replaced because they or their masks are unusable.
        predict_root: Folder or file of pictures for ``predict``, which need no masks; default: the test split.
    """

    # long: half of it is its parameters, a line each
    def __init__(
        self,
        root: str | None = None,
        hub: str | None = None,
        download: bool = False,
        kind: Literal["ade20k", "cityscapes"] | None = None,
        classes: list[str] | int | None = None,
        crop: int | list[int] | None = None,
        short: int | None = None,
        longest: int | None = None,
        scales: tuple[float, float] = (0.5, 2.0),
        most: float = 0.75,
        batch_size: int = 16,
        val_batch_size: int = 1,
        image_key: str | None = None,
        mask_key: str | None = None,
        images: str | None = None,
        masks: str | None = None,
        image_suffix: str | None = None,
        mask_suffix: str | None = None,
        ignore: list[int] | None = None,
        reduce_labels: bool | None = None,
        ids: list[int] | None = None,
        palette: list[list[int]] | None = None,
        ignore_colors: list[list[int]] | None = None,
        train_split: str | None = None,
        val_split: str | None = None,
        test_split: str | None = None,
        holdout: float = 0.1,
        split_seed: int = 0,
        num_workers: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        augment: SegmentationAugment | None = None,
        subset: str | None = None,
        max_unreadable: int = 10,
        predict_root: str | None = None,
    ) -> None:
        super().__init__(batch_size, val_batch_size, num_workers, mean, std, augment)
        preset = None if kind is None else PRESETS[kind]
        known = {} if preset is None else preset.options
        if preset is not None and classes is None:
            classes = preset.classes if isinstance(preset.classes, int) else list(preset.classes)
        if classes is None and palette is not None:
            classes = len(palette)
        if classes is None:
            raise DataError(
                "data.classes: how many classes the masks tell apart is not known\n"
                "  Give their names in order, or their number: --data.classes 21"
            )
        self.classes = [str(n) for n in range(classes)] if isinstance(classes, int) else list(classes)
        twice = next((name for i, name in enumerate(self.classes) if name in self.classes[:i]), None)
        if twice is not None:
            raise DataError(f"data.classes: {twice!r} names two classes\n  Give each class its own name")
        # Three ways to say how classes are stored: one that is given replaces the preset's, whichever that is.
        if reduce_labels or ids is not None or palette is not None:
            known = {option: value for option, value in known.items() if option not in ("reduce_labels", "ids")}

        def given(option: str, value: Any, otherwise: Any = None) -> Any:
            return known.get(option, otherwise) if value is None else value

        self.framing = _framing(
            given("short", short), given("longest", longest), given("crop", crop, 512), tuple(scales), most
        )
        self.labels = Labels(
            len(self.classes),
            ignore,
            given("reduce_labels", reduce_labels, False),
            given("ids", ids),
            palette,
            ignore_colors,
        )
        self.colors = [list(color) for color in palette] if palette else colors(len(self.classes))
        if not 0 < holdout < 1:
            raise DataError(f"data.holdout={holdout}: wants a share between 0 and 1")
        self.holdout, self.split_seed, self.max_unreadable = holdout, split_seed, max_unreadable
        # Opened at once, so that missing data are reported before any model is built.
        self.predicted = None if predict_root is None else open_pictures(predict_root)
        self.where, self.splits = str(root or hub or predict_root), {}
        if root is not None or hub is not None or predict_root is None:
            named = Named(
                given("images", images),
                given("masks", masks),
                given("image_suffix", image_suffix, ""),
                given("mask_suffix", mask_suffix, ""),
                image_key,
                mask_key,
            )
            self.splits = open_pairs(root, hub, download, subset, named, rank_zero_warn)
        self.tests = test_split is not None  # on that split, and on no other in its place
        usual = {"train": (train_split, TRAIN), "val": (val_split, VALIDATION), "test": (test_split, TEST)}
        found = {use: self._split(f"{use}_split", *words) for use, words in usual.items()}
        self.names = kept_apart(found, [use for use, (name, _) in usual.items() if name is not None], self.where)

    def _split(self, option: str, given: str | None, names: Sequence[str]) -> str | None:
        """Returns the split, or splits joined by a plus sign, that an option selects."""
        if given is None:
            return next((name for name in names if name in self.splits), None)
        parts = [part.strip() for part in given.split("+")]
        for part in parts:
            if part not in self.splits:
                raise DataError(
                    f"data.{option}: no split {part!r} in {self.where}; it has {', '.join(self.splits)}\n"
                    "  Name one of them, or several: train+extra"
                )
        return "+".join(parts)

    def _pairs(self, name: str) -> Pairs:
        parts = [self.splits[part] for part in name.split("+")]
        return parts[0] if len(parts) == 1 else JoinedPairs(parts, name.split("+"))

    def setup(self, stage: str) -> None:
        train, val, test = (self.names[name] for name in ("train", "val", "test"))
        if stage == "predict" and "predict" not in self.sets:
            pairs = self.predicted or self._pairs(test or val or train or next(iter(self.splits)))
            self.sets["predict"] = self._dataset(pairs, None, train=False, masked=False)
        if stage == "predict":
            return
        if not self.splits:
            raise DataError(f"data.predict_root alone is for predict\n  To {stage}, give data.root or data.hub")
        if stage == "test" and "test" not in self.sets and test is not None and self._tested(test):
            self.sets["test"] = self._dataset(self._pairs(test), None, train=False)
        if stage == "test" and "test" in self.sets:
            return  # a run that only tests needs no other split
        if train is None and (stage == "fit" or val is None):
            there = ", ".join(f"{name} ({len(pairs):,} pictures)" for name, pairs in self.splits.items())
            raise DataError(f"{self.where}: no split to train on; it has {there}\n  Name it: --data.train_split NAME")
        rest = held = None
        if val is None:
            assert train is not None
            count = len(self._pairs(train))
            if count < 2:
                raise DataError(
                    f"{self.where}: {count} picture cannot be split in two\n  Name a split: --data.val_split NAME"
                )
            rest, held = hold_out(count, self.holdout, self.split_seed)
            # Reported once, not at each stage of a run.
            if not self.sets:
                rank_zero_info(
                    f"{self.where} has no validation split beside {train}: {len(held):,} of {count:,} training "
                    f"pictures are held out (data.holdout={self.holdout}, data.split_seed={self.split_seed})"
                )
        if stage == "fit" and "train" not in self.sets:
            self.sets["train"] = self._dataset(self._pairs(str(train)), rest, train=True)
        if "val" not in self.sets:
            self.sets["val"] = self._dataset(self._pairs(str(val or train)), held, train=False)
        if stage == "test":
            self.sets["test"] = self.sets["val"]

    def _tested(self, test: str) -> bool:
        """Whether this split is tested on: many data sets publish their test pictures without masks."""
        pairs = self._pairs(test)
        if self.tests or len(pairs.lacking()) < len(pairs):
            return True
        rank_zero_info(f"{self.where}: the split {test} has no masks; the test runs on the validation split")
        return False

    def _dataset(self, pairs: Pairs, indices: Tensor | None, train: bool, masked: bool = True) -> Segments:
        indices = torch.arange(len(pairs)) if indices is None else indices
        tally = Tally(pairs, self.max_unreadable)  # type: ignore[arg-type]
        if masked:
            # Known from names alone, without opening a file.
            lacking = set(pairs.lacking()) & set(indices.tolist())
            if len(lacking) == len(indices):
                raise DataError(
                    f"{self.where}: none of {len(indices):,} pictures has a mask, {pairs.name(int(indices[0]))} first\n"
                    "  Name the folder of the masks, --data.masks FOLDER, or their column, --data.mask_key COLUMN"
                )
            for index in sorted(lacking):
                tally.add(index, Unreadable("it has no mask"), "it is left out")
            indices = indices[torch.tensor([int(i) not in lacking for i in indices])]
        fill = [round(255 * level) for level in self.mean]
        return Segments(pairs, indices, self.labels if masked else None, self.framing, train, fill, tally)


def _framing(
    short: int | None, longest: int | None, crop: int | list[int], scales: tuple[float, ...], most: float
) -> Framing:
    """Checks sizes and returns them as a ``Framing``."""
    pair = (crop, crop) if isinstance(crop, int) else tuple(crop)
    if len(pair) != 2 or min(pair) < 1:
        raise DataError(f"data.crop={crop}: wants pixels, or height and width")
    for option, side in (("short", short), ("longest", longest)):
        if side is not None and side < 1:
            raise DataError(f"data.{option}={side}: wants pixels, 1 or more")
    if len(scales) != 2 or not 0 < scales[0] <= scales[1]:
        raise DataError(f"data.scales={list(scales)}: wants the least factor and the largest: [0.5, 2]")
    if not 0 < most <= 1:
        raise DataError(f"data.most={most}: wants a share of the picture, up to 1")
    return Framing(short, longest, (pair[0], pair[1]), (scales[0], scales[1]), most)
