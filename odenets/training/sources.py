"""Where data come from: parquet files, image folders, the Hugging Face hub. One `Source` of pictures per split."""

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
TRAIN = ("train", "training")
VALIDATION = ("validation", "valid", "val", "dev")
TEST = ("test", "testing")
THREE_WAYS = (
    "give --data.root FOLDER (parquet files or class folders), or --data.hub NAME --data.download true, "
    "or train on the built-in pictures: --data odenets.training.Digits"
)


class DataError(ValueError):
    """Data that is missing or does not look as told; one or two lines with the remedy."""


class Source(ABC):
    """One split: class numbers and, by index, decoded RGB pictures."""

    labels: Tensor
    classes: list[str]

    @abstractmethod
    def picture(self, i: int) -> Image.Image:
        """Picture i in RGB (grey ones are converted)."""

    def __len__(self) -> int:
        return len(self.labels)


class FolderSource(Source):
    """A folder with one subfolder of pictures per class, as ImageNet is laid out; classes in alphabetical order."""

    def __init__(self, root: Path, classes: list[str] | None = None) -> None:
        self.classes = classes or sorted(d.name for d in root.iterdir() if d.is_dir())
        self.files: list[Path] = []
        labels: list[int] = []
        for number, name in enumerate(self.classes):
            if not (root / name).is_dir():
                continue
            files = sorted(f for f in (root / name).rglob("*") if f.suffix.lower() in SUFFIXES)
            self.files += files
            labels += [number] * len(files)
        self.labels = torch.tensor(labels, dtype=torch.long)

    def picture(self, i: int) -> Image.Image:
        with Image.open(self.files[i]) as picture:
            return picture.convert("RGB")


class TableSource(Source):
    """A split of a Hugging Face dataset whose pictures are stored as encoded files."""

    def __init__(self, table: Any, image_key: str | None, label_key: str | None, where: str) -> None:
        import datasets

        features = table.features
        images = [k for k, f in features.items() if isinstance(f, datasets.Image)]
        self.image_key = find_column(image_key, ["img", "image", *images], features, "image_key", where)
        classes = [k for k, f in features.items() if isinstance(f, datasets.ClassLabel)]
        self.label_key = find_column(
            label_key, ["label", "fine_label", "labels", *classes], features, "label_key", where
        )
        column = table.select_columns(self.label_key)[:][self.label_key]
        feature = features[self.label_key]
        if isinstance(feature, datasets.ClassLabel):
            self.classes = list(feature.names)
        elif column and isinstance(column[0], str):
            self.classes = sorted(set(column))
            column = [self.classes.index(name) for name in column]
        else:
            self.classes = [str(number) for number in range(max(column, default=-1) + 1)]
        self.labels = torch.tensor(column, dtype=torch.long)
        if len(self.labels) and not 0 <= int(self.labels.min()):
            raise DataError(f"{where}: column {self.label_key!r} holds negative labels (a split without labels?)")
        self.table = table.select_columns(self.image_key).cast_column(self.image_key, datasets.Image(decode=False))

    def picture(self, i: int) -> Image.Image:
        stored = self.table[i][self.image_key]
        with Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"]) as picture:
            return picture.convert("RGB")


def find_column(given: str | None, guesses: Sequence[str], features: Any, option: str, where: str) -> str:
    """The column that is given, or the first guess that is there."""
    for key in (given,) if given else guesses:
        if key in features:
            return key
    raise DataError(
        f"{where}: no column {given or ' or '.join(dict.fromkeys(guesses))}; it has {', '.join(features)}\n"
        f"  Name it: --data.{option} COLUMN"
    )


def open_splits(
    root: str | Path | None,
    hub: str | None = None,
    download: bool = False,
    image_key: str | None = None,
    label_key: str | None = None,
) -> dict[str, Source]:
    """The splits found under `root` or on the hub, by name; a folder without split names is one split `train`.

    Raises:
        DataError: There is nothing there, or no column fits. The network is only asked with `download`.
    """
    loaded = open_tables(root, hub, download)
    if root is not None and not loaded:
        return _folder_splits(Path(root).expanduser())
    where = str(root or hub)
    return {name: TableSource(table, image_key, label_key, where) for name, table in loaded.items()}


def open_tables(
    root: str | Path | None,
    hub: str | None = None,
    download: bool = False,
    subset: str | None = None,
    ways: str = THREE_WAYS,
) -> dict[str, Any]:
    """The splits of parquet files under `root`, or on the hub, as tables; none where `root` holds no such file.

    Args:
        root: Folder or file.
        hub: Dataset on the hub.
        download: Allows the network.
        subset: Configuration of the hub's dataset, where it has several.
        ways: Remedies that an error names.

    Raises:
        DataError: There is nothing there.
    """
    if root is not None:
        path = Path(root).expanduser()
        if not path.exists():
            raise DataError(f"data.root: no folder {str(root)!r}\n  {ways}")
        files = _parquet_splits(path)
        return _load_parquet(files) if files else {}
    if hub is not None:
        return _load_hub(hub, download, subset, ways)
    raise DataError(f"no data: neither data.root nor data.hub is set\n  {ways}")


def _parquet_splits(path: Path) -> dict[str, list[str]]:
    """Parquet files by split: `test.parquet`, `data/train-00000-of-00005.parquet`, `train/0000.parquet`."""
    files = [path] if path.is_file() else sorted([*path.glob("*.parquet"), *path.glob("*/*.parquet")])
    splits: dict[str, list[str]] = {}
    known = TRAIN + VALIDATION + TEST
    for file in files:
        stem = re.sub(r"-\d+(-of-\d+)?$", "", file.stem)
        name = stem if stem in known else file.parent.name if file.parent.name in known else stem
        splits.setdefault(name, []).append(str(file))
    if splits and not any(name in known for name in splits) and len(splits) > 1:
        return {"train": [f for files in splits.values() for f in files]}
    return splits if len(splits) != 1 or next(iter(splits)) in known else {"train": next(iter(splits.values()))}


def _load_parquet(splits: dict[str, list[str]]) -> dict[str, Any]:
    import datasets
    import datasets.config

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # opening local files would otherwise report to the hub
    return {str(name): table for name, table in datasets.load_dataset("parquet", data_files=splits).items()}


def _folder_splits(path: Path) -> dict[str, Source]:
    folders = sorted(d.name for d in path.iterdir() if d.is_dir()) if path.is_dir() else []
    known = [name for name in folders if name in TRAIN + VALIDATION + TEST]
    if known:
        first = next((name for name in known if name in TRAIN), known[0])
        classes = FolderSource(path / first).classes
        splits: dict[str, Source] = {name: FolderSource(path / name, classes) for name in known}
    else:
        splits = {"train": FolderSource(path)}
    splits = {name: split for name, split in splits.items() if len(split)}
    if not splits:
        raise DataError(f"data.root: {str(path)!r} holds neither parquet files nor class folders\n  {THREE_WAYS}")
    return splits


def _load_hub(hub: str, download: bool, subset: str | None, ways: str) -> dict[str, Any]:
    """A dataset of the hub; the network is asked once, with a short limit, and only if downloading is allowed."""
    import datasets
    import datasets.config
    import huggingface_hub
    import huggingface_hub.constants

    if download:
        try:
            huggingface_hub.HfApi().dataset_info(hub, timeout=10)
        except Exception as e:  # every failure (no network, offline mode, no such name) has the same remedies
            raise DataError(f"data.hub: {hub!r} cannot be reached ({type(e).__name__})\n  {ways}") from None
        return {str(name): table for name, table in datasets.load_dataset(hub, subset).items()}
    offline = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
        return {str(name): table for name, table in datasets.load_dataset(hub, subset).items()}
    except Exception:
        raise DataError(f"data.hub: {hub!r} is not on this machine and downloading was not allowed\n  {ways}") from None
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = offline
