"""The data sets that recipes train on, by name, with the settings and notes that a recipe has for each."""

from typing import Any, NamedTuple

FOLDERS = "FOLDER holds train/ and val/ with one folder per class, or parquet files as the hub's {}."
PARQUET = "FOLDER holds the parquet files of the hub's {0}; without one, the hub serves them: --data.hub {0} {1}"


class Data(NamedTuple):
    """A data set.

    Attributes:
        name: its common name.
        classes: the number of classes.
        size: side of the pictures that a network is built for.
        settings: options of ``odenets.training.Images``.
        how: a sentence on where the pictures are.
        option: what a command line has to add.
    """

    name: str
    classes: int
    size: int
    settings: dict[str, Any]
    how: str
    option: str = " --data.root FOLDER"


def _small(name: str, classes: int, hub: str, mean: list[float], std: list[float], subset: str = "") -> Data:
    part = f"--data.subset {subset} " if subset else ""
    return Data(name, classes, 32, {"mean": mean, "std": std}, PARQUET.format(hub, f"{part}--data.download true"))


CIFAR10 = _small("CIFAR-10", 10, "uoft-cs/cifar10", [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])
CIFAR100 = _small("CIFAR-100", 100, "uoft-cs/cifar100", [0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762])
SVHN = _small("SVHN", 10, "ufldl-stanford/svhn", [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], "cropped_digits")
SVHN.settings["train_split"] = "train+extra"
IMAGENET = Data("ImageNet-1K", 1000, 224, {}, FOLDERS.format("ILSVRC/imagenet-1k"))
IMAGENET22K = Data(
    *("ImageNet-22K", 21_841, 224, {}),
    "FOLDER holds one folder per class; a folder without a validation split holds out a tenth.",
)
