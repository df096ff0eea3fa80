"""Draws detections over pictures."""

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw

from .precision import Found


def color(label: int) -> tuple[int, int, int]:
    """Returns the colour of a class; neighbouring numbers lie far apart on the hue circle.

    Example:
        >>> color(0)
        (255, 51, 51)
    """
    red, green, blue = colorsys.hsv_to_rgb(label * 0.381966 % 1, 0.8, 1.0)  # the golden section of the circle
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(image: Image.Image, found: Found, names: Sequence[str], least: float = 0.5) -> Image.Image:
    """Draws boxes, classes, scores and masks of the detections with a high enough score over a picture.

    A small picture is enlarged, by a whole factor, to at least 256 pixels on its shorter side, so that the text is
    legible.

    Args:
        image: in RGB; it is not changed.
        found: detections, in pixels of the picture.
        names: names of the classes.
        least: lowest score of a detection that is drawn.

    Example:
        >>> import torch
        >>> from PIL import Image
        >>> from odenets.detection import Found
        >>> box = Found(torch.tensor([[2.0, 2, 12, 9]]), torch.tensor([0.9]), torch.tensor([0]))
        >>> draw_detections(Image.new("RGB", (16, 16)), box, ["disc"]).size
        (256, 256)
    """
    factor = max(1, -(-256 // min(image.size)))
    # Without smoothing, so that the pixels of a small picture stay visible as they are.
    shown = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    kept = (found.scores >= least).nonzero()[:, 0].tolist()
    if found.masks is not None and kept:
        levels = np.array(shown, dtype=np.float32)
        for k in reversed(kept):
            mask = np.kron(found.masks[k].numpy(), np.ones((factor, factor), dtype=bool))
            levels[mask] = (levels[mask] + color(int(found.labels[k]))) / 2
        shown = Image.fromarray(levels.astype(np.uint8))
    pen = ImageDraw.Draw(shown)
    for k in reversed(kept):  # the highest score on top
        label, score = int(found.labels[k]), float(found.scores[k])
        left, top, right, bottom = (found.boxes[k].clamp(min=0) * factor).tolist()
        # A line along the edge of the picture would be drawn outside it.
        right, bottom = (min(edge, side - 1) for edge, side in zip((right, bottom), shown.size, strict=True))
        ink = color(label)
        # Pillow rejects corners in the wrong order, which an empty box may have.
        pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=ink, width=2)
        text = f"{names[label]} {score:.2f}"
        room = pen.textbbox((left, top), text)
        pen.rectangle((left, top, room[2] + 2, room[3] + 2), fill=ink)
        pen.text((left + 1, top), text, fill=(0, 0, 0))
    return shown


def sheet(pictures: Sequence[Image.Image], columns: int = 4, gap: int = 4) -> Image.Image:
    """Arranges pictures in rows on white, each in a cell as large as the largest picture.

    Args:
        pictures: at least one.
        columns: pictures per row.
        gap: pixels between them.
    """
    wide, high = (max(picture.size[axis] for picture in pictures) for axis in (0, 1))
    columns = min(columns, len(pictures))
    count = -(-len(pictures) // columns)
    whole = Image.new("RGB", (columns * (wide + gap) - gap, count * (high + gap) - gap), "white")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        whole.paste(picture, (column * (wide + gap), row * (high + gap)))
    return whole


def in_file(found: Found, size: torch.Tensor, stored: torch.Tensor) -> Found:
    """Converts detections from pixels of the batch to pixels of the picture's file.

    Args:
        found: the detections; their masks, if any, are in pixels of the file already.
        size: (2,), height and width that the picture fills in the batch.
        stored: (2,), height and width of the file.
    """
    scale = (stored.double() / size.double()).flip(0).repeat(2).to(found.boxes)
    edges = stored.flip(0).repeat(2).to(found.boxes)
    return found._replace(boxes=torch.minimum((found.boxes * scale).clamp(min=0), edges))
