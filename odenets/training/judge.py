"""Predictions of a trained network for pictures, with names, and their accuracy."""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from . import layout as layouts
from .labelled import Below, Labelled, Viewed, real_number
from .ranking import best_of
from .sources import DataError, FolderSource, Joined, Source
from .splits import open_splits
from .trained import Trained


class Prediction(NamedTuple):
    """A network's prediction for one picture.

    Attributes:
        name: The picture's file, or file and row.
        classes: The most likely classes, most likely first.
        probabilities: Of each of them.
        error: Why the picture could not be read; "" if it could.
    """

    name: str
    classes: list[str]
    probabilities: list[float]
    error: str = ""


def pictures_at(paths: Sequence[str | Path]) -> tuple[Source, list[str]]:
    """Finds all pictures, labelled or not, in files and below folders, in the order given; and notes on omissions.

    Args:
        paths: Pictures, folders of them, parquet files, tar shards.

    Raises:
        DataError: A path does not exist, or holds no pictures.
    """
    parts: list[Source] = []
    notes: list[str] = []
    for given in paths:
        path = Path(given)
        found = layouts.find(path) if path.exists() else None
        if found is None:
            problem = "there is no picture in it" if path.exists() else "there is no such file or folder"
            raise DataError(f"{given}: {problem}\n  Give pictures, folders of them, parquet files or tar shards")
        if found.kind == "pictures":
            files = sorted(file for group in (found.splits, found.others) for some in group.values() for file in some)
            parts.append(Below(found.root, FolderSource(found.root, files, None)))
        else:
            splits = open_splits(path)
            opened = [*splits.values(), *(splits.open(name) for name in list(splits.others))]
            parts += [Below(found.root, source) for source in opened]
        notes += [f"{given}: {note}" for note in found.notes if "name no split" not in note]
    return (parts[0] if len(parts) == 1 else Joined(parts)), notes


def judge(
    trained: Trained, source: Source, batch_size: int = 64, num_workers: int = 0
) -> Iterator[tuple[int, Tensor | None, str]]:
    """Yields the number of each picture with its probabilities (classes,), or with None and why it cannot be read.

    Args:
        trained: the network, with its classes and its view of pictures.
        source: the pictures.
        batch_size: of the forward passes.
        num_workers: processes that load; 0: none.
    """
    # Collated as a list, since a picture that cannot be read cannot be stacked.
    loader = DataLoader(Viewed(source, trained.view), batch_size, num_workers=num_workers, collate_fn=list)
    for batch in loader:
        pictures = [levels for _, levels, _ in batch if levels is not None]
        # Only pictures that were read go through the network, and their rows are taken in the same order.
        rows = iter(trained.probabilities(torch.stack(pictures)) if pictures else ())
        for i, levels, why in batch:
            yield i, None if levels is None else next(rows), why


def predict(
    trained: Trained, source: Source, top: int = 5, batch_size: int = 64, num_workers: int = 0
) -> Iterator[Prediction]:
    """Yields the prediction for each picture, in order; one that cannot be read has an error and no classes.

    Args:
        trained: The network.
        source: The pictures.
        top: Number of most likely classes to name.
        batch_size: Pictures that go through the network together.
        num_workers: Processes that decode; 0 decodes in this one.
    """
    for i, row, why in judge(trained, source, batch_size, num_workers):
        if row is None:
            yield Prediction(source.name(i), [], [], why)
        else:
            values, numbers = (found[0].tolist() for found in best_of(row[None], top))
            yield Prediction(source.name(i), [trained.classes[k] for k in numbers], values)


def wilson(right: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's confidence interval of a share, given `right` of `count`; it also holds near 0 and 1.

    (p + z^2 / 2n ± z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), p = right / n

    Args:
        right: number of samples that were right.
        count: number of samples.
        confidence: of the interval, below 1.

    Source: Wilson 1927, "Probable inference", J. Am. Stat. Assoc. 22.

    Example:
        >>> [round(edge, 4) for edge in wilson(9, 10)]
        [0.5958, 0.9821]
    """
    if not count:
        return 0.0, 1.0
    z, p = NormalDist().inv_cdf((1 + confidence) / 2), right / count
    middle, half = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    # Exact at 0 and 1, which rounding would miss slightly.
    return (0.0 if right == 0 else (middle - half) / scale), (1.0 if right == count else (middle + half) / scale)


class Figures:
    """Counts over labelled pictures, and the figures that follow from them.

    Args:
        classes: Their names.
        confidence: Of the intervals.
    """

    def __init__(self, classes: Sequence[str], confidence: float = 0.95) -> None:
        self.classes, self.confidence = list(classes), confidence
        self.confusion = torch.zeros(len(classes), len(classes), dtype=torch.long)  # [label, predicted]
        self.among_five = 0
        self.log_likelihood = 0.0

    def add(self, probabilities: Tensor, labels: Tensor) -> None:
        """Counts some pictures: probabilities (n, classes), labels (n,).

        Args:
            probabilities: (n, classes).
            labels: (n,).
        """
        best = best_of(probabilities, 5)[1]
        # Label and prediction as one number, so that one call counts all pairs.
        pairs = labels * len(self.classes) + best[:, 0]
        self.confusion += torch.bincount(pairs, minlength=self.confusion.numel()).view_as(self.confusion)
        self.among_five += int((best == labels[:, None]).sum())
        # In double precision: there may be a million pictures to sum over.
        own = probabilities.double()[torch.arange(len(labels)), labels]
        # Clamped, since one probability of 0 would make the loss of the whole set infinite.
        self.log_likelihood += float(own.clamp_min(torch.finfo(torch.float32).tiny).log().sum())

    def share(self, right: int, count: int) -> dict[str, Any]:
        """A share with its interval; the value is None if `count` is 0.

        Args:
            right: number of pictures that were right.
            count: number of pictures.
        """
        return {"value": right / count if count else None, "interval": list(wilson(right, count, self.confidence))}

    def summary(self) -> dict[str, Any]:
        """All figures as plain values: of all pictures, then of each class that occurs or is predicted."""
        count, right = int(self.confusion.sum()), int(self.confusion.diagonal().sum())
        found: dict[str, Any] = {"pictures": count, "confidence": self.confidence, "accuracy": self.share(right, count)}
        # With five classes or fewer, all are among the best five.
        if len(self.classes) > 5:
            found["top5"] = self.share(self.among_five, count)
        found["loss"] = -self.log_likelihood / count if count else None
        rows = [self._class(k) for k in range(len(self.classes))]
        seen = [row["accuracy"]["value"] for row in rows if row["pictures"]]
        found["mean_class_accuracy"] = sum(seen) / len(seen) if seen else None
        found["classes"] = [row for row in rows if row["pictures"] or row["predicted"]]
        return found

    def checked(self, where: str) -> dict[str, Any]:
        """Returns the summary, of at least one picture.

        Args:
            where: a description of the data, for the message.

        Raises:
            DataError: There were no pictures.
        """
        if not int(self.confusion.sum()):
            raise DataError(f"{where}: none of its pictures can be read\n  Replace the files")
        return self.summary()

    def _class(self, k: int) -> dict[str, Any]:
        row, right = self.confusion[k], int(self.confusion[k, k])
        count, predicted = int(row.sum()), int(self.confusion[:, k].sum())
        others = row.clone()
        others[k] = 0
        wrong = int(others.argmax())
        return {
            "class": self.classes[k],
            "pictures": count,
            "accuracy": self.share(right, count),
            "predicted": predicted,
            "precision": right / predicted if predicted else None,
            "taken_for": self.classes[wrong] if int(others[wrong]) else None,
        }


class RealFigures:
    """Accuracy on ImageNet-Real: how often a network names one of the classes that a validation picture shows.

    Pictures without any label are left out, as published.

    Args:
        real: Class numbers of each picture, see ``read_real``.
        classes: Of the network: 1,000; numbers count synsets in alphabetical order, whatever the network's own order.
        confidence: Of the interval.

    Raises:
        DataError: Another number of classes.

    Source:
        Beyer et al. 2020, Are we done with ImageNet?, arXiv 2006.07159.
    """

    def __init__(self, real: Sequence[Sequence[int]], classes: Sequence[str], confidence: float = 0.95) -> None:
        if len(classes) != 1000:
            raise DataError(
                f"--real: the labels are of ImageNet's 1,000 classes, and the network has {len(classes):,}\n"
                "  Take a network that was trained, or fine-tuned, on them"
            )
        self.real, self.confidence = real, confidence
        self.number = list(range(1000))
        if all(re.fullmatch(r"n\d{8}", name) for name in classes):
            place = {name: number for number, name in enumerate(sorted(classes))}
            self.number = [place[name] for name in classes]
        self.right = self.count = 0

    def add(self, probabilities: Tensor, names: Sequence[str]) -> None:
        """Counts some pictures: probabilities (n, classes), and the names of their files.

        Args:
            probabilities: (n, classes).
            names: of the files, one per picture.

        Raises:
            DataError: A picture that is not one of ImageNet's validation pictures.
        """
        for best, name in zip(probabilities.argmax(1).tolist(), names, strict=True):
            number = real_number(name)
            if number is None or not 1 <= number <= len(self.real):
                raise DataError(
                    f"--real: {name} is none of the {len(self.real):,} pictures of the labels\n"
                    "  Give ImageNet's validation pictures, called ILSVRC2012_val_00000001.JPEG and so on"
                )
            if labels := self.real[number - 1]:
                self.count, self.right = self.count + 1, self.right + (self.number[best] in labels)

    def summary(self) -> dict[str, Any]:
        """The number of pictures with labels, and the accuracy on them with its interval."""
        value = self.right / self.count if self.count else None
        interval = list(wilson(self.right, self.count, self.confidence))
        return {"pictures": self.count, "accuracy": {"value": value, "interval": interval}}


def evaluate(
    trained: Trained,
    root: str | Path | None = None,
    split: str | None = None,
    confidence: float = 0.95,
    batch_size: int = 64,
    num_workers: int = 0,
) -> tuple[dict[str, Any], list[Prediction]]:
    """Evaluates a network on labelled pictures.

    Args:
        trained: The network.
        root: Folder or file of labelled pictures; None takes the data that it was trained on, from its checkpoint.
        split: Of them; None takes the test split, else the validation split, else the only one.
        confidence: Of the intervals.
        batch_size: Pictures that go through the network together.
        num_workers: Processes that decode; 0 decodes in this one.

    Returns:
        The figures of ``Figures.summary`` with a description of the data, and the pictures that could not be read.

    Raises:
        DataError: No such pictures, no labels, or classes that the network does not have.
    """
    figures, pictures = Figures(trained.classes, confidence), Labelled(trained, root, split)
    for _, x, labels in pictures.batches(batch_size, num_workers):
        figures.add(trained.probabilities(x), labels)
    return {"data": pictures.where, **figures.checked(pictures.where)}, unread_of(pictures)


def unread_of(pictures: Labelled) -> list[Prediction]:
    """Returns the pictures that could not be read, in order.

    Args:
        pictures: after they were read.
    """
    return [Prediction(name, [], [], why) for _, (name, why) in sorted(pictures.unread.items())]
