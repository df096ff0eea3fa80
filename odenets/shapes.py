"""Coloured shapes on texture, drawn with their masks and boxes: a synthetic data set for segmentation and detection.

Four kinds of shape, at random angles and sizes, which may partly occlude each other. Colour hints at the kind without
determining it, since the ranges of hue overlap. Each image of a size is a function of the seed and its number alone::

    python -m odenets.shapes FOLDER --train 2000 --val 200 --size 64

writes ``images/train/000000.png``, the class of each pixel as ``masks/train/000000.png``, and the boxes and masks of
the shapes as ``annotations/train.json`` in the format of COCO; the same for ``val``.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .extras import require

require("train", "odenets.shapes")

import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

CLASSES = ("background", "disc", "square", "triangle", "cross")
MOST = 4  # shapes in an image
_HIDDEN = 0.4  # fraction of a shape that others may occlude
_EMPTY = 1 / 16  # fraction of images without a shape


class Shape(NamedTuple):
    """One shape of an image.

    Attributes:
        label: its class, from 1 on; 0 is the background.
        box: left, top, right, bottom of its visible part, in edges of pixels: right - left is its width.
        mask: bool (h, w), the pixels where it is visible.
    """

    label: int
    box: tuple[float, float, float, float]
    mask: NDArray[np.bool_]


class Drawing(NamedTuple):
    """An image with its annotations.

    Attributes:
        picture: uint8 (h, w, 3).
        mask: uint8 (h, w), the class of each pixel.
        shapes: from back to front; none for some images.
    """

    picture: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    shapes: list[Shape]


def draw(index: int, size: int = 64, seed: int = 0, texture: float = 1.0) -> Drawing:
    """Draws an image.

    Args:
        index: its number.
        size: its side in pixels, 16 or more.
        seed: of all images in a set.
        texture: strength of the background's colours; 0 is grey, from which shapes are easy to distinguish.

    Raises:
        ValueError: a size that is too small for shapes, or a negative strength.

    Example:
        >>> drawing = draw(7, size=32)
        >>> drawing.picture.shape, drawing.mask.shape, [CLASSES[shape.label] for shape in drawing.shapes]
        ((32, 32, 3), (32, 32), ['square'])
    """
    if size < 16 or not 0 <= texture < np.inf:
        raise ValueError(f"draw: size={size}, texture={texture}; wants 16 pixels or more, and a strength of 0 or more")
    # Seeded by both, so that an image does not depend on the size of the set, nor on which others are drawn.
    random = np.random.default_rng([seed, index])
    levels = 0.5 + texture * (_texture(random, size) - 0.5)
    seen: list[NDArray[np.bool_]] = []
    whole: list[int] = []
    labels: list[int] = []
    for _ in range(0 if random.random() < _EMPTY else int(random.integers(1, MOST + 1))):
        label, inside, light = _shape(random, size)
        left = [mask & ~inside for mask in seen]
        # A shape that would occlude too much of another is left out; the first one never is.
        if any(mask.sum() < (1 - _HIDDEN) * pixels for mask, pixels in zip(left, whole, strict=True)):
            continue
        seen, whole, labels = [*left, inside], [*whole, int(inside.sum())], [*labels, label]
        levels[inside] = (_color(random, label) * light[..., None])[inside]
    levels += random.normal(0, 0.03, levels.shape)
    mask = np.zeros((size, size), dtype=np.uint8)
    for label, inside in zip(labels, seen, strict=True):
        mask[inside] = label
    picture = (levels.clip(0, 1) * 255).round().astype(np.uint8)
    shapes = [Shape(label, _box(inside), inside) for label, inside in zip(labels, seen, strict=True)]
    return Drawing(picture, mask, shapes)


def _texture(random: np.random.Generator, size: int) -> NDArray[np.float64]:
    """Draws smooth noise at three scales around a colour, (size, size, 3)."""
    levels = np.broadcast_to(random.uniform(0.25, 0.75, 3), (size, size, 3)).copy()
    for cells, strength in ((3, 0.15), (8, 0.12), (size // 2, 0.06)):
        # One point more than cells, so that the last cell has a corner on either side.
        grid = random.normal(0, strength, (cells + 1, cells + 1, 3))
        place = np.linspace(0, cells, size, endpoint=False)
        low = place.astype(int)
        share = place - low
        rows = grid[low] * (1 - share)[:, None, None] + grid[low + 1] * share[:, None, None]
        levels += rows[:, low] * (1 - share)[:, None] + rows[:, low + 1] * share[:, None]
    return levels


def _shape(random: np.random.Generator, size: int) -> tuple[int, NDArray[np.bool_], NDArray[np.float64]]:
    """Draws a class, the pixels inside a shape, and the shading of each, which varies across the shape."""
    label = int(random.integers(1, len(CLASSES)))
    radius = size * random.uniform(0.12, 0.28)
    x0, y0 = random.uniform(radius, size - radius, 2)
    turn = random.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:size, 0:size] + 0.5
    u = ((x - x0) * np.cos(turn) + (y - y0) * np.sin(turn)) / radius
    v = ((y - y0) * np.cos(turn) - (x - x0) * np.sin(turn)) / radius
    across, along = np.abs(u), np.abs(v)
    if label == 1:
        inside = u**2 + v**2 < 0.8
    elif label == 2:
        inside = np.maximum(across, along) < 0.72
    elif label == 3:
        # Inside three lines at distance 1/2 from the centre, at angles of 120 degrees.
        inside = np.maximum.reduce([-v, (v + np.sqrt(3) * u) / 2, (v - np.sqrt(3) * u) / 2]) < 0.5
    else:
        inside = (np.maximum(across, along) < 0.95) & (np.minimum(across, along) < 0.3)
    return label, inside, 0.85 + 0.15 * u


def _color(random: np.random.Generator, label: int) -> NDArray[np.float64]:
    """Draws a colour (3,) with a hue near that of the class; neighbouring classes share a sixth of their ranges."""
    hue = ((label - 1) / 4 + random.uniform(-0.15, 0.15)) % 1
    value, saturation = random.uniform(0.7, 1.0), random.uniform(0.5, 1.0)
    # Red saturates around 0, green and blue around 1/3 and 2/3 of the circle.
    away = np.abs((hue - np.array([0, 1 / 3, 2 / 3]) + 0.5) % 1 - 0.5) * 6
    ramp = np.clip(2 - away, 0, 1)
    return value * (1 - saturation * (1 - ramp))


def _box(inside: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    columns, rows = (np.flatnonzero(inside.any(axis)) for axis in (0, 1))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """Returns COCO's run lengths of a mask (h, w): pixels outside, inside, outside and so on, down the columns.

    Args:
        mask: (h, w), true inside.

    Example:
        >>> import numpy as np
        >>> run_lengths(np.array([[False, True], [True, True]]))
        [1, 3]
    """
    # Padded by an outside pixel, since COCO's first run is outside, and by a change at the end to end the last run.
    flat = np.concatenate([[False], mask.flatten(order="F"), [not mask[-1, -1]]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return [int(edge) for edge in np.diff(edges, prepend=0)]


def coco(drawings: Sequence[Drawing], names: Sequence[str]) -> dict[str, Any]:
    """Returns the annotations of some images in COCO's format; the ids of images and shapes count from 1.

    Args:
        drawings: the images with their shapes.
        names: file names of the images.
    """
    images, annotations = [], []
    for number, (drawing, name) in enumerate(zip(drawings, names, strict=True), 1):
        height, width = drawing.mask.shape
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for label, (left, top, right, bottom), mask in drawing.shapes:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": int(mask.sum()),
                    "segmentation": {"size": [height, width], "counts": run_lengths(mask)},
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES) if number]
    return {"images": images, "annotations": annotations, "categories": categories}


def write(folder: str | Path, splits: dict[str, int], size: int = 64, seed: int = 0) -> None:
    """Writes images, masks and annotations; see the module's docstring.

    Args:
        folder: the target, which must be empty or not exist.
        splits: number of images in each split. Numbering continues from split to split, so that no two are the same.
        size: side of the images.
        seed: of the images.

    Raises:
        ValueError: the folder is not empty, or a number, the size or the seed is too small. Nothing is written then.
    """
    from PIL import Image

    root = Path(folder)
    if root.exists() and any(root.iterdir()):
        raise ValueError(f"{root} is not empty\n  Give another folder, or empty this one")
    if size < 16 or seed < 0 or min(splits.values(), default=0) < 0:
        counts = ", ".join(f"{split}={count}" for split, count in splits.items())
        raise ValueError(f"write: {counts}, size={size}, seed={seed}\n  Give 16 pixels or more, and numbers from 0 on")
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    # One count for all splits, so that no validation image is also a training image.
    numbers = itertools.count()
    for split, count in splits.items():
        drawings = [draw(next(numbers), size, seed) for _ in range(count)]
        names = [f"{i:06d}.png" for i in range(count)]
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for drawing, name in zip(drawings, names, strict=True):
            Image.fromarray(drawing.picture).save(root / "images" / split / name)
            Image.fromarray(drawing.mask).save(root / "masks" / split / name)
        (root / "annotations" / f"{split}.json").write_text(json.dumps(coco(drawings, names)))


def main(words: Sequence[str] | None = None) -> None:
    """Runs the command; see the module's docstring.

    Args:
        words: the command line; None takes that of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m odenets.shapes", description="Draws coloured shapes on texture.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=2000, help="pictures to train on")
    parser.add_argument("--val", type=int, default=200, help="pictures to validate on")
    parser.add_argument("--size", type=int, default=64, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(words)
    try:
        write(given.folder, {"train": given.train, "val": given.val}, given.size, given.seed)
    except ValueError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
