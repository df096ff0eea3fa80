"""The assignment of the files below a folder to splits, and of pictures to the classes that their folders name.

The rules are those of `datasets.load_dataset(folder)`, without reading a file. Folders, or else file names, that
contain `train`, `training`; `validation`, `valid`, `val`, `dev`; `test`, `testing`, `eval`, `evaluation` as a word are
splits; `data/NAME-00000-of-00005.parquet` names its split itself; if nothing names a split, all files are for training.
A picture's class is the name of its folder. Hidden files, and folders that begin with two underscores, are left out.
Two rules differ: case does not matter, and the uppermost folder that names a split decides, so that `val/train/1.png`
is a picture of the class `train`; beside other class folders, a folder `train` of pictures is a class.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path, PurePosixPath

from .errors import DataError

# Formats that Pillow reads itself: PostScript, for one, would be passed to another program.
PICTURES = frozenset(
    ".apng .avif .bmp .dib .gif .ico .j2k .jfif .jp2 .jpe .jpeg .jpf .jpg .jpx .pbm .pcx .pgm .png .pnm .ppm .rgb "
    ".rgba .sgi .tga .tif .tiff .webp".split()
)
KINDS = {**dict.fromkeys(PICTURES, "pictures"), ".parquet": "parquet", ".tar": "tar"}
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_WORDS = {
    split: re.compile(rf"(?:.*[-._ 0-9])?(?:{'|'.join(words)})(?:[-._ 0-9].*)?", re.IGNORECASE | re.DOTALL)
    for split, words in SPLITS.items()
}
_SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d+)-of-(?P<total>\d+)(?P<rest>\.[^/]*)?")


@dataclass
class Layout:
    """Files by split, relative to `root`, sorted.

    Args:
        root: The folder.
        kind: pictures, parquet or tar.
        splits: Files of each split.
        others: Files that name no split where others do, by their own name: `extra`. Opened only by that name.
        by: What named the splits: "folder", "file" or "" for nothing.
        labels: Of pictures: the class name of each file by split; a split that is missing here has none.
        why: Of pictures: why a split has no class names.
        notes: What was left out, for the log.
    """

    root: Path
    kind: str
    splits: dict[str, list[str]]
    others: dict[str, list[str]] = field(default_factory=dict)
    by: str = ""
    labels: dict[str, list[str]] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@lru_cache(maxsize=4096)
def splits_named(name: str) -> list[str]:
    """The splits that the name of a folder, or of a file without its suffix, contains as a word.

    >>> splits_named("cifar_train"), splits_named("Val"), splits_named("trainer"), splits_named("train_val")
    (['train'], ['validation'], [], ['train', 'validation'])
    """
    return [split for split, words in _WORDS.items() if words.fullmatch(name)]


def printable(name: str) -> str:
    r"""Returns a file's name as text that can be written, with bytes that are not UTF-8 as escapes.

    Args:
        name: as ``os.listdir`` returns it.

    >>> printable("caf\udce9.png"), printable("café.png")
    ('caf\\udce9.png', 'café.png')
    """
    return name.encode(errors="backslashreplace").decode()


def walk(root: Path) -> Iterator[str]:
    """Yields the files below `root` as relative POSIX paths; hidden ones and `__special__` folders are left out.

    Args:
        root: the folder.
    """
    stack, seen = [""], set()
    while stack:
        folder = stack.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path = f"{folder}{entry.name}"
                if not entry.is_dir():
                    yield path
                elif not entry.name.startswith("__"):
                    if entry.is_symlink():  # a link may lead back up
                        real = os.path.realpath(entry.path)
                        if real in seen or Path(root).resolve().is_relative_to(real):
                            continue
                        seen.add(real)
                    stack.append(f"{path}/")


def find(root: Path) -> Layout | None:
    """Finds the layout of a folder, or of one file; None if it holds no pictures, parquet files or tar shards.

    Args:
        root: the folder, or the file.

    Raises:
        DataError: The folder can be read in two ways, or a shard is missing; the message names the files.
    """
    # A single file is used as a whole, whatever its name.
    if root.is_file():
        kind = KINDS.get(root.suffix.lower())
        named = splits_named(root.stem) if kind in ("parquet", "tar") else []
        split = named[0] if len(named) == 1 else "train"
        why = {split: "it is one picture"}
        return None if kind is None else Layout(root.parent, kind, {split: [root.name]}, why=why)
    files: dict[str, list[str]] = {}
    for path in sorted(walk(root)):
        kind = KINDS.get(os.path.splitext(path)[1].lower())
        # Tables that describe pictures are not data themselves.
        if kind is not None and path.rpartition("/")[2] not in METADATA:
            files.setdefault(kind, []).append(path)
    if not files:
        return None
    layouts = {kind: _layout(root, kind, paths) for kind, paths in files.items()}
    # As in `datasets`: a folder that names a split comes before files that do, and those before files that name none;
    # then the kind with the most files wins.
    ranks = {kind: (("", "file", "folder").index(layout.by), len(files[kind])) for kind, layout in layouts.items()}
    best = max(layouts, key=lambda kind: (*ranks[kind], kind == "parquet"))
    for kind in layouts.keys() - {best}:
        what = f"{len(files[kind]):,} {kind if kind == 'pictures' else kind + ' files'}, such as {files[kind][0]}"
        # Class folders are not leftovers: guessing which of the two was meant would be unsafe.
        if kind == "pictures" and layouts[kind].labels:
            raise DataError(
                f"data.root: {str(root)!r} holds {best} files, {files[best][0]} first, and class folders with {what}\n"
                "  Give the folder, or the file, of those that are meant"
            )
        layouts[best].notes.append(f"left out are {what}")
    if best != "pictures":
        for paths in layouts[best].splits.values():
            check_shards(paths)
    return layouts[best]


def _layout(root: Path, kind: str, paths: list[str]) -> Layout:
    if kind != "pictures":
        splits: dict[str, list[str]] = {}
        for path in paths:
            # The hub's own naming of data files, which overrides every other rule.
            match = re.fullmatch(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*", path)
            if match:
                splits.setdefault(match[1], []).append(path)
        if splits:
            return Layout(root, kind, {name: splits[name] for name in _in_order(splits)}, by="folder")
    layout, folders = Layout(root, kind, {}, by="folder"), _split_folders(root, paths, kind)
    # One level for all: below `train`, a folder called `test` is a class, not a split.
    level = min((depth for depth in folders.values() if depth is not None), default=-1)
    above = {path: level if depth is None else depth for path, depth in folders.items()}
    if level < 0:
        layout.by, folders = "file", {path: None for path in paths}
    for path in paths:
        parts, depth = path.split("/"), folders[path]
        if level < 0:
            named = splits_named(PurePosixPath(path).stem)
        else:
            named = [] if depth is None else splits_named(parts[depth])
        if len(named) > 1:
            raise DataError(
                f"data.root: the file {path!r} in {str(root)!r} names two splits at once\n  Rename it after one of them"
            )
        if named:
            layout.splits.setdefault(named[0], []).append(path)
        else:
            part = parts[min(max(level, 0), len(parts) - 1)] if level >= 0 else parts[-1]
            match = _SHARD.fullmatch(part)
            layout.others.setdefault(match["name"] if match else PurePosixPath(part).stem, []).append(path)
    if not layout.splits:
        layout.splits, layout.others, layout.by = {"train": paths}, {}, ""
    layout.splits = {name: layout.splits[name] for name in _in_order(layout.splits)}
    rest = sorted(path for paths in layout.others.values() for path in paths)
    if rest:
        layout.notes.append(f"{len(rest):,} of {len(paths):,} files name no split and are left out, {rest[0]} first")
    if kind == "pictures":
        _label(layout, above)
    return layout


def _in_order(splits: Iterable[str]) -> list[str]:
    return [name for name in SPLITS if name in splits] + sorted(set(splits) - SPLITS.keys())


def _split_folders(root: Path, paths: list[str], kind: str) -> dict[str, int | None]:
    """The depth of the uppermost folder that names the split of each file; None if none does."""
    folders = {path.rpartition("/")[0] for path in paths}
    children: dict[str, dict[str, bool]] = {}  # the folders in each folder, and whether they hold only files
    for folder in folders:
        parts = folder.split("/") if folder else []
        for depth, part in enumerate(parts):
            inside = children.setdefault("/".join(parts[:depth]), {})
            inside[part] = inside.get(part, True) and depth == len(parts) - 1
    # Evaluated once per folder instead of once per picture.
    classes = cache(lambda parent: _are_classes(root, parent, children[parent], kind))
    depths = {folder: _split_depth(root, folder.split("/") if folder else [], classes) for folder in sorted(folders)}
    return {path: depths[path.rpartition("/")[0]] for path in paths}


def _split_depth(root: Path, parts: list[str], classes: Callable[[str], bool]) -> int | None:
    unclear = ""
    for depth, part in enumerate(parts):
        named = splits_named(part)
        if named and not classes("/".join(parts[:depth])):
            if len(named) == 1:
                return depth
            unclear = part
    if unclear:
        raise DataError(
            f"data.root: the folder {unclear!r} in {str(root)!r} names two splits at once\n"
            "  Name it after one of them, or after none"
        )
    return None


def _are_classes(root: Path, parent: str, inside: dict[str, bool], kind: str) -> bool:
    """Whether the folders in `parent` are classes, though some have the names of splits."""
    called = {name: splits_named(name) for name in inside}
    rest = [name for name in inside if not called[name]]
    # Class folders hold pictures and nothing else, and at least one of their names must not be that of a split.
    if kind != "pictures" or not rest or len(rest) == len(inside) or not all(inside.values()):
        return False
    if len({split for splits in called.values() for split in splits}) > 1:
        names = ", ".join(repr(name) for name in sorted(inside) if called[name])
        raise DataError(
            f"data.root: in {str(root / parent)!r} the folders {names} could be splits, or classes as {rest[0]!r}\n"
            "  Put class folders below train/ and val/, or move the other folders elsewhere"
        )
    return True


def _label(layout: Layout, above: Mapping[str, int]) -> None:
    """Takes class names from the pictures' folders, if all pictures of a split have the same depth, in several folders.

    above: the depth of the folder that names each file's split, -1 where there is none.
    """
    groups = {**layout.splits, **layout.others}
    for split, paths in groups.items():
        depths = {path: path.count("/") - 1 - above[path] for path in paths}
        shallow, deep = min(paths, key=depths.__getitem__), max(paths, key=depths.__getitem__)
        # A picture beside the class folders has no class, so none of the folders is taken for one.
        if depths[shallow] <= 0:
            layout.why[split] = f"{shallow} lies in no class folder"
        elif depths[shallow] < depths[deep]:
            layout.why[split] = f"pictures lie at different depths, {shallow} and {deep}"
        else:
            layout.labels[split] = [printable(path.split("/")[-2]) for path in paths]
    classes = {name for names in layout.labels.values() for name in names}
    # A single folder only stores pictures; it does not distinguish a class from others.
    if len(classes) == 1:
        layout.why |= dict.fromkeys(layout.labels, f"there is one class folder only, {next(iter(classes))}")
        layout.labels = {}


def check_shards(paths: Iterable[str]) -> None:
    """Refuses an incomplete set of `name-00000-of-00005` files.

    Args:
        paths: of the files.

    Raises:
        DataError: Some are missing; the message names them.
    """
    found: dict[tuple[str, str, str], set[int]] = {}
    for path in paths:
        match = _SHARD.fullmatch(path)
        if match:
            found.setdefault((match["name"], match["total"], match["rest"] or ""), set()).add(int(match["number"]))
    for (name, total, rest), numbers in found.items():
        missing = sorted(set(range(int(total))) - numbers)
        if missing:
            width = len(total)
            names = [f"{PurePosixPath(name).name}-{number:0{width}}-of-{total}{rest}" for number in missing[:3]]
            raise DataError(
                f"data.root: {len(missing):,} of {int(total):,} shards are missing: {', '.join(names)}\n"
                "  Add them, or rename the files that are there"
            )
