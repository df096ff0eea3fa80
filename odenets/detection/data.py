"""Pictures with boxes for Lightning, from files in COCO's format.

A batch is (pictures, targets). Pictures (n, 3, h, w) are padded on the right and at the bottom to one size, with zeros
after normalisation. A target is a dictionary of tensors:

* ``boxes`` (k, 4) left, top, right, bottom in pixels of the batch, ``labels`` (k,), ``masks`` (k, h, w) if wanted;
* ``size`` (2,) height and width that the picture fills, ``stored`` (2,) those of its file, ``picture`` its id,
  ``ignored`` whether it is there only to give every process equally many;
* in evaluation ``truth_boxes`` (m, 4) left, top, width, height in pixels of the file, ``truth_labels``,
  ``truth_crowd``, ``truth_area`` (m,), and ``truth_masks``.

As in classification, the random numbers for a picture depend only on the run's seed, the epoch and the picture's place.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from ..training.augment import normalize
from ..training.data import Pictures
from ..training.decode import Picture, Unreadable
from ..training.errors import DataError
from ..training.judge import pictures_at
from ..training.layout import splits_named
from ..training.order import loader, seed_of
from ..training.sets import Tally
from ..training.sources import Source
from .annotations import Annotations, Objects
from .transforms import Placement, Resize, bounds

Target = dict[str, Tensor]
Request = int | tuple[int, int]  # an index, or (epoch, index)
Place = tuple[Path, Path]  # a file of annotations, and the folder of its pictures
Named = dict[str, tuple[str | None, str | None]]  # the two, as options name them below the root, by split
OTHERS = re.compile(r"captions|keypoints|panoptic|stuff|image_info", re.IGNORECASE)  # files of COCO without objects
_PACKED = {torch.float32: torch.int32, torch.float64: torch.int64}


class Shown(Protocol):
    """The pictures of a data set, and the objects on them."""

    @property
    def ids(self) -> Tensor:
        """Their ids in the file."""
        ...

    @property
    def sizes(self) -> Tensor | None:
        """Their heights and widths, if the file states them."""
        ...

    def __len__(self) -> int: ...
    def encoded(self, i: int) -> bytes | str:
        """The path of picture i, or the bytes of its file.

        Args:
            i: the number of the picture, from 0.
        """
        ...

    def name(self, i: int) -> str:
        """The name of picture i.

        Args:
            i: the number of the picture, from 0.
        """
        ...

    def objects(self, i: int) -> Objects:
        """The objects on picture i.

        Args:
            i: the number of the picture, from 0.
        """
        ...


class Unannotated:
    """Pictures without annotations; their ids count from 1.

    Args:
        source: the pictures.
    """

    def __init__(self, source: Source) -> None:
        self.source, self.sizes = source, None
        self.ids = torch.arange(1, len(source) + 1)

    def __len__(self) -> int:
        return len(self.source)

    def encoded(self, i: int) -> bytes | str:
        """The path of picture i, or the bytes of its file.

        Args:
            i: the number of the picture, from 0.
        """
        return self.source.encoded(i)

    def name(self, i: int) -> str:
        """The file of picture i.

        Args:
            i: the number of the picture, from 0.
        """
        return self.source.name(i)

    def objects(self, i: int) -> Objects:
        """No objects.

        Args:
            i: the number of the picture, from 0.
        """
        whole = torch.zeros(0, dtype=torch.long)
        return Objects(torch.zeros(0, 4, dtype=torch.float64), whole, whole.bool(), whole.double(), None)


class Detections(Dataset):
    """Pictures and their targets; the next picture replaces one that cannot be read.

    Args:
        shown: the pictures.
        resize: how they are resized.
        train: whether placements are random; if not, targets also hold the annotations of the file (``truth_``).
        max_unreadable: pictures that may be unreadable.

    Attributes:
        seed: seed of the random numbers for a request (epoch, index).
        takes_pairs: marks a data set that takes such requests and draws on its own.
    """

    takes_pairs = True

    def __init__(self, shown: Shown, resize: Resize, train: bool, max_unreadable: int) -> None:
        self.shown, self.resize, self.train = shown, resize, train
        self.tally = Tally(shown, max_unreadable)  # type: ignore[arg-type]
        # Read here, in the main process: each worker has a different seed.
        self.seed = torch.initial_seed()

    def __len__(self) -> int:
        return len(self.shown)

    def name(self, i: int) -> str:
        """The file of picture i, marked if it was unreadable and another picture replaced it.

        Args:
            i: the number of the picture, from 0.
        """
        return self.shown.name(i) + (" (unreadable)" if i in self.tally else "")

    def picture(self, i: int) -> Image.Image:
        """Picture i in the orientation of its annotations: upright, unless only the size as stored agrees with them.

        Args:
            i: the number of the picture, from 0.

        Raises:
            Unreadable: the file is not a picture, or its size differs from that in the annotations.
        """
        picture = Picture(self.shown.encoded(i))
        if self.shown.sizes is not None:
            height, width = self.shown.sizes[i].tolist()
            # `size` is the upright size; some files are annotated as their pixels are stored, before EXIF rotation.
            if picture.size != (width, height) and picture.image.size == (width, height):
                picture.turn = None
            elif picture.size != (width, height):
                has = "x".join(map(str, picture.size))
                raise Unreadable(f"it has {has} pixels, its annotations say {width}x{height}")
        return picture.rgb()

    def __getitem__(self, request: Request) -> tuple[Tensor, Target]:
        epoch, position = request if isinstance(request, tuple) else (None, request)
        for at, _ in self.tally.places(position, range(len(self))):
            # Seeded by the requested place: a picture that replaces another gets other numbers than at its own place.
            generator = None if epoch is None else Generator().manual_seed(seed_of(self.seed, epoch, position))
            try:
                image = self.picture(at)
            except Unreadable as e:
                self.tally.add(at, e, "the next picture takes its place")
            else:
                return self._sample(at, image, generator)
        raise DataError(f"none of {len(self):,} pictures can be read, {self.name(0)} first\n  Replace the files")

    def _sample(self, i: int, image: Image.Image, generator: Generator | None) -> tuple[Tensor, Target]:
        objects, size = self.shown.objects(i), image.size
        placed = self.resize.draw(size[0], size[1], generator) if self.train else self.resize.fixed(*size)
        levels = np.array(placed.picture(image))
        target = {
            "picture": self.shown.ids[i],
            "size": torch.tensor([placed.height, placed.width]),
            "stored": torch.tensor([size[1], size[0]]),
            "ignored": torch.tensor(False),
            **_inside(objects, placed, size),
        }
        if not self.train:
            target |= {
                "truth_boxes": objects.boxes,
                "truth_labels": objects.labels,
                "truth_crowd": objects.crowd,
                "truth_area": objects.area,
            }
            if objects.masks is not None:
                target["truth_masks"] = objects.masks
        return torch.from_numpy(levels).permute(2, 0, 1), target


def _inside(objects: Objects, placed: Placement, size: tuple[int, int]) -> Target:
    """Returns the objects in the visible window, without crowds and remainders less than a pixel wide or high."""
    single = ~objects.crowd
    corners = torch.cat([objects.boxes[:, :2], objects.boxes[:, :2] + objects.boxes[:, 2:]], 1)
    # In 64 bits until here, so that the coordinates of the file are rounded only once.
    edges = corners.new_tensor([*size, *size])
    boxes = placed.boxes(torch.minimum(corners.clamp(min=0), edges)[single], size).float()
    found = {"boxes": boxes, "labels": objects.labels[single]}
    if objects.masks is not None:
        found["masks"] = placed.masks(objects.masks[single])
        if placed.cuts:
            # A box around the visible part of the object, which may fill only a corner of the clipped box.
            found["boxes"] = bounds(found["masks"])
    seen = (found["boxes"][:, 2:] - found["boxes"][:, :2] >= 1).all(1)
    if objects.masks is not None:
        seen &= found["masks"].flatten(1).any(1)
    return {name: value[seen] for name, value in found.items()}


class Collate:
    """Collates samples: pads pictures to one size, at least ``least`` and a multiple of ``multiple``.

    Args:
        multiple: both sides become multiples of this.
        least: lower limit of both sides.
    """

    def __init__(self, multiple: int, least: int = 0) -> None:
        self.multiple, self.least = multiple, least

    def __call__(self, samples: Sequence[tuple[Tensor, Target]]) -> tuple[Tensor, list[Target]]:
        """Joins samples into a batch."""
        most = (max(self.least, *(x.shape[axis] for x, _ in samples)) for axis in (1, 2))
        height, width = (-(-side // self.multiple) * self.multiple for side in most)
        # Black for now; set to 0 again after the batch is normalised.
        batch = torch.zeros(len(samples), 3, height, width, dtype=torch.uint8)
        targets = []
        for row, (x, target) in enumerate(samples):
            batch[row, :, : x.shape[1], : x.shape[2]] = x
            if "masks" in target:
                masks = torch.zeros(len(target["masks"]), height, width, dtype=torch.bool)
                masks[:, : x.shape[1], : x.shape[2]] = target["masks"]
                target = {**target, "masks": masks}
            targets.append({name: _packed(value) for name, value in target.items()})
        return batch, targets


def _packed(value: Tensor) -> Tensor:
    """Reinterprets floats as integers, since Lightning rounds all floats of a batch to a run's precision.

    Under ``--trainer.precision bf16-true`` a box of 640 pixels would be off by two of them.
    """
    return value.view(_PACKED[value.dtype]) if value.dtype in _PACKED else value


def _unpacked(name: str, value: Tensor) -> Tensor:
    if name in ("truth_boxes", "truth_area") and value.dtype == torch.int64:
        return value.cpu().view(torch.float64)  # some devices have no float64
    return value.view(torch.float32) if name == "boxes" and value.dtype == torch.int32 else value


class DetectionData(Pictures):
    """Data module of pictures with boxes, and optionally masks, from files in COCO's format.

    The files are found by their names: ``annotations/instances_train2017.json`` beside ``train2017/``,
    ``annotations/train.json`` beside ``images/train/``, or ``train/_annotations.coco.json`` beside the pictures.

    Args:
        root: folder of pictures and annotations.
        size: side of the square that pictures are fitted into; for "multiscale" the shorter side in evaluation.
        batch_size: pictures per step.
        resize: "jitter" is large-scale jitter; "multiscale" draws the shorter side from ``scales``.
        jitter: range of the factor of large-scale jitter; [1, 1] turns it off.
        scales: lengths of the shorter side in training; None is eleven lengths from size * 0.6 to size.
        longest: upper limit of the longer side for "multiscale"; None is size * 5 / 3.
        flip: probability that a picture is mirrored in training.
        masks: whether masks are read.
        multiple: height and width of a batch are multiples of it.
        empty: whether pictures without a box are trained on.
        train_annotations: annotation file for training, below root.
        val_annotations: annotation file for validation, below root; not that of training.
        test_annotations: annotation file for testing, below root, not that of training; default: that of validation,
            also for other ``test_pictures``.
        train_pictures: folder of the training pictures, below root.
        val_pictures: folder of the validation pictures, below root.
        test_pictures: folder of the test pictures, below root.
        predict_root: folder or file of pictures for ``predict``; default: the test pictures.
        max_faults: entries of a file that may be wrong; see ``odenets.detection.annotations``.
        max_unreadable: pictures that may be unreadable, per split.
        num_workers: processes that decode; None takes the cores, at most 8.
        mean: per channel, of pictures in [0, 1].
        std: per channel.

    Raises:
        DataError: a file is missing or wrong, or an option is out of range.
    """

    in_chans = 3

    # long: half of it is its parameters, a line each
    def __init__(
        self,
        root: str,
        size: int = 640,
        batch_size: int = 2,
        resize: Literal["jitter", "multiscale"] = "jitter",
        jitter: tuple[float, float] = (0.1, 2.0),
        scales: list[int] | None = None,
        longest: int | None = None,
        flip: float = 0.5,
        masks: bool = False,
        multiple: int = 32,
        empty: bool = True,
        train_annotations: str | None = None,
        val_annotations: str | None = None,
        test_annotations: str | None = None,
        train_pictures: str | None = None,
        val_pictures: str | None = None,
        test_pictures: str | None = None,
        predict_root: str | None = None,
        max_faults: int = 10,
        max_unreadable: int = 10,
        num_workers: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, mean, std, None)
        self.root, self.masks, self.multiple, self.empty = Path(root).expanduser(), masks, multiple, empty
        self.max_faults, self.max_unreadable = max_faults, max_unreadable
        _check(size, resize, jitter, scales, longest, flip, multiple)
        drawn = [round(size * (0.6 + 0.04 * i)) for i in range(11)] if scales is None else scales
        most = size * 5 // 3 if longest is None else longest
        self.resize = Resize(size, None if resize == "multiscale" else jitter, drawn, most, flip)
        if not self.root.is_dir():
            raise DataError(f"data.root: no folder {root!r}\n  Give the folder of pictures and annotations")
        given = {
            "train": (train_annotations, train_pictures),
            "val": (val_annotations, val_pictures),
            "test": (test_annotations, test_pictures),
        }
        self.places = self._kept_apart({name: self._place(name, *paths) for name, paths in given.items()}, given)
        val = self.places["val"]
        # Other pictures under the annotations of validation, such as distorted ones.
        if test_pictures is not None and self.places["test"] is None and val is not None:
            self.places["test"] = val[0], self.root / test_pictures
        # Two splits may share a file and its pictures, which are then read once.
        self.opened: dict[Place, Annotations] = {}
        self.unlabelled = None if predict_root is None else Unannotated(pictures_at([predict_root])[0])
        # The smaller file first: it names the classes too, and the training file may take a minute to read.
        names = [name for name in ("val", "test", "train") if self.places[name] is not None]
        if not names:
            raise DataError(
                f"{self.root}: no annotations of train, val or test; looked at *.json and */*.json\n"
                "  Name them: --data.train_annotations FILE --data.val_annotations FILE"
            )
        first = self._open(names[0])
        self.classes, self.category_ids = first.classes, first.category_ids

    @property
    def num_classes(self) -> int:  # type: ignore[override]
        """The number of categories."""
        return len(self.classes)

    def _kept_apart(self, places: dict[str, Place | None], given: Named) -> dict[str, Place | None]:
        """Returns the places without those that nobody named and that are trained on; raises for those named."""
        trained = places["train"] and [path.resolve() for path in places["train"]]
        for name in ("val", "test"):
            place = places[name]
            # One file may also stand for other pictures, such as distorted ones.
            if place is None or [path.resolve() for path in place] != trained:
                continue
            if given[name][0] is not None:
                raise DataError(
                    f"data.{name}_annotations: {place[0]} is trained on, so that it measures nothing\n"
                    "  Name a file that data.train_annotations does not"
                )
            places[name] = None
        return places

    def _place(self, split: str, given: str | None, folder: str | None) -> Place | None:
        """Returns the annotation file of a split and the folder of its pictures; None if there is no file."""
        if folder is not None and not (self.root / folder).is_dir():
            raise DataError(f"data.{split}_pictures: no folder {str(self.root / folder)!r}\n  Give one below data.root")
        path = self._named(split) if given is None else self.root / given
        if path is None:
            return None
        if not path.is_file():
            raise DataError(f"data.{split}_annotations: no file {str(path)!r}\n  Give one below data.root")
        return path, _pictures_of(self.root, path) if folder is None else self.root / folder

    def _named(self, split: str) -> Path | None:
        wanted = {"train": "train", "val": "validation", "test": "test"}[split]
        found = []
        for path in sorted({p for where in ("annotations", ".", "*") for p in self.root.glob(f"{where}/*.json")}):
            words = path.parent.name if path.name == "_annotations.coco.json" else path.stem
            # Letters next to digits, as in instances_val2017, count as separate words.
            if splits_named(re.sub(r"\d+", " ", words)) == [wanted] and not OTHERS.search(path.stem):
                found.append(path)
        if len(found) > 1:
            names = ", ".join(str(p.relative_to(self.root)) for p in found[:4])
            raise DataError(
                f"{self.root}: several files name {split}: {names}\n  Name one: --data.{split}_annotations FILE"
            )
        return found[0] if found else None

    def _open(self, name: str) -> Annotations:
        place = self.places[name]
        # COCO's test pictures are published without boxes.
        if place is None and name == "test":
            place = self.places["val"]
        if place is None:
            trained = self.places["train"]
            beside = "" if trained is None else f" beside {trained[0].name}"
            raise DataError(
                f"{self.root}: no annotations of {name}{beside}\n  Name them: --data.{name}_annotations FILE"
            )
        if place not in self.opened:
            found = self.opened[place] = Annotations(*place, self.masks, self.max_faults)
            self._compare(found)
        return self.opened[place]

    def _compare(self, found: Annotations) -> None:
        first = next(iter(self.opened.values()))
        pairs = zip(first.category_ids, first.classes, strict=True), zip(found.category_ids, found.classes, strict=True)
        ours, theirs = (dict(pair) for pair in pairs)
        differing = sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))
        if differing:
            n = differing[0]
            raise DataError(
                f"category {n} is {theirs.get(n)!r} in {found.path}, and {ours.get(n)!r} in {first.path}\n"
                "  All files name the same categories by the same ids"
            )

    def setup(self, stage: str) -> None:
        for name in {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ("predict",)):
            if name not in self.sets:
                self.sets[name] = self._set(name)

    def _set(self, name: str) -> Detections:
        if name == "predict" and self.unlabelled is not None:
            return Detections(self.unlabelled, self.resize, False, self.max_unreadable)
        shown = self._open("test" if name == "predict" else name)
        if name == "train" and not self.empty:
            before, shown = len(shown), shown.with_boxes()
            if not len(shown):
                raise DataError(
                    f"{shown.path}: none of {before:,} pictures has a box besides crowds\n"
                    "  Give data.empty true, or another file"
                )
            rank_zero_info(f"{shown.path}: {before - len(shown):,} of {before:,} pictures have no box and are left out")
        return Detections(shown, self.resize, name == "train", self.max_unreadable)

    def _loader(self, name: str) -> DataLoader:
        # Jittered pictures fit into one square, so all their batches are padded to its size.
        square = self.resize.size if self.resize.jitter is not None else 0
        return loader(
            self,
            self.sets[name],
            self.batch_size,
            train=name == "train",
            num_workers=self.num_workers,
            collate_fn=Collate(self.multiple, square),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    @property
    def _predicted(self) -> str:
        return "predict"

    def predicted_picture(self, i: int) -> Image.Image:
        """Picture i of those that ``predict`` runs over, in the orientation of its boxes.

        Args:
            i: the number of the picture, from 0.
        """
        return self.sets["predict"].picture(i)  # type: ignore[attr-defined]

    def on_after_batch_transfer(  # type: ignore[override]
        self, batch: tuple[Tensor, list[Target]], dataloader_idx: int
    ) -> tuple[Tensor, list[Target]]:
        x, targets = batch
        x = normalize(x, self.mean, self.std)
        for row, target in enumerate(targets):
            height, width = target["size"].tolist()
            # Normalised black is far from 0 and would form an edge that boxes could be fitted to.
            x[row, :, height:], x[row, :, :, width:] = 0, 0
        # Lightning converts floats when it moves a batch, but pictures were still integers then.
        precision = getattr(self.trainer, "precision_plugin", None)
        x = x if precision is None else precision.convert_input(x)
        return x, [{name: _unpacked(name, value) for name, value in target.items()} for target in targets]

    def state_dict(self) -> dict[str, Any]:
        return {"classes": list(self.classes), "category_ids": list(self.category_ids)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Rejects a checkpoint trained on other classes, whose label numbers would have other meanings."""
        theirs = state_dict.get("classes")
        if theirs is not None and theirs != self.classes:
            raise DataError(
                f"{self.root}: the {len(self.classes)} classes {', '.join(self.classes[:5])} ... are not the "
                f"{len(theirs)} of the checkpoint, {', '.join(theirs[:5])} ...\n  Give the data that it was trained on"
            )


def _check(
    size: int,
    resize: str,
    jitter: Sequence[float],
    scales: Sequence[int] | None,
    longest: int | None,
    flip: float,
    multiple: int,
) -> None:
    """Rejects options out of range."""
    if resize not in ("jitter", "multiscale"):
        raise DataError(f"data.resize={resize!r}: wants jitter or multiscale")
    if not (len(jitter) == 2 and 0 < jitter[0] <= jitter[1] <= 10):
        raise DataError(f"data.jitter={list(jitter)}: wants two factors, the smaller one first, above 0 and up to 10")
    if scales is not None and not len(scales):
        raise DataError("data.scales=[]: wants one length or more; null takes the usual ones")
    sides = (("size", size), ("longest", longest), ("multiple", multiple), *(("scales", s) for s in scales or ()))
    for name, value in sides:
        if value is not None and value < 1:
            raise DataError(f"data.{name}={value}: wants pixels, 1 or more")
    if not 0 <= flip <= 1:
        raise DataError(f"data.flip={flip}: wants a probability")


def _pictures_of(root: Path, path: Path) -> Path:
    """Finds the folder of the pictures that a file annotates, by the usual names."""
    word = re.sub(r"^instances_|\.json$", "", path.name)
    choices = [root / "images" / word, root / word, path.parent, root / "images", root]
    if path.name != "_annotations.coco.json":
        # Only exports of that name lie beside their pictures; other files lie in folders of annotations.
        choices[2:3] = []
    return next(folder for folder in choices if folder.is_dir())
