"""Placement of a picture and its objects: a scale, a window and a flip, applied to pixels, boxes and masks alike.

Large-scale jitter draws a factor, fits the picture into a square of that factor times the size, and crops a random
window of the size from it, or pads it. Multi-scale resizing draws the length of the shorter side. In evaluation the
picture is fitted into the square, or its shorter side has a fixed length, and nothing is cropped.

Sources:
    Ghiasi et al. 2021, Simple Copy-Paste, arXiv 2012.07177, section 3 (large-scale jitter); Carion et al. 2020, DETR,
    arXiv 2005.12872, appendix A.4 (scales of the shorter side).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Generator, Tensor


class Placement(NamedTuple):
    """How a picture is presented to the network: resized, cropped to a window, and possibly mirrored.

    Attributes:
        resized: width and height after resizing.
        left: left edge of the window in the resized picture.
        top: top edge of the window.
        width: width of the window.
        height: height of the window.
        flip: whether the window is mirrored.
    """

    resized: tuple[int, int]
    left: int
    top: int
    width: int
    height: int
    flip: bool

    def picture(self, image: Image.Image) -> Image.Image:
        """Returns the window of the resized picture.

        Args:
            image: the picture as it was read.
        """
        x, y = image.width / self.resized[0], image.height / self.resized[1]
        box = (self.left * x, self.top * y, (self.left + self.width) * x, (self.top + self.height) * y)
        # Rounding may put the edge slightly beyond the picture, which Pillow rejects.
        box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
        found = image
        if (self.width, self.height) != image.size or box != (0, 0, *image.size):
            found = image.resize((self.width, self.height), Image.Resampling.BILINEAR, box=box)
        return found.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else found

    def boxes(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Maps boxes of the picture into the window: left, top, right, bottom, clipped to its edges.

        Args:
            boxes: (k, 4), in pixels of the picture.
            size: width and height of the picture.
        """
        x, y = self.resized[0] / size[0], self.resized[1] / size[1]
        found = boxes * boxes.new_tensor([x, y, x, y]) - boxes.new_tensor([self.left, self.top] * 2)
        if self.flip:
            found = torch.stack([self.width - found[:, 2], found[:, 1], self.width - found[:, 0], found[:, 3]], 1)
        edges = found.new_tensor([self.width, self.height] * 2)
        return torch.minimum(found.clamp(min=0), edges)

    def masks(self, masks: Tensor) -> Tensor:
        """Maps masks of the picture into the window: the pixels that are at least half inside.

        Args:
            masks: (k, h, w), at the size of the picture as it was read.
        """
        found = torch.zeros(len(masks), self.height, self.width, dtype=torch.bool)
        for k, mask in enumerate(masks):
            # Resampled by the filter of the picture, so that mask and pixels shift by the same fraction.
            levels = Image.fromarray(mask.to(torch.uint8).mul(255).numpy())
            seen = self.picture(levels)
            # A writable copy: torch warns about read-only memory.
            flat = torch.frombuffer(bytearray(seen.tobytes()), dtype=torch.uint8)
            found[k] = flat.view(self.height, self.width) >= 128
        return found

    @property
    def cuts(self) -> bool:
        """Whether a part of the picture lies outside the window."""
        return (self.width, self.height) != self.resized


def fit(width: int, height: int, side: float) -> tuple[int, int]:
    """Returns the width and height with a given longer side and the same aspect ratio.

    Args:
        width: width of the picture.
        height: height of the picture.
        side: length of the longer side.

    Example:
        >>> fit(640, 480, 320)
        (320, 240)
    """
    scale = side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def shorter(width: int, height: int, side: int, longest: int) -> tuple[int, int]:
    """Returns the width and height with a given shorter side, or less if the longer one would exceed `longest`.

    Args:
        width: width of the picture.
        height: height of the picture.
        side: length of the shorter side.
        longest: upper limit of the longer side.

    Example:
        >>> shorter(640, 480, 800, 1333), shorter(1000, 200, 800, 1333)
        ((1067, 800), (1333, 267))
    """
    scale = min(side / min(width, height), longest / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


class Resize(NamedTuple):
    """How pictures are resized, in training and in evaluation.

    Attributes:
        size: side of the square in large-scale jitter; in multi-scale resizing the shorter side in evaluation.
        jitter: range of the factor of large-scale jitter; None means multi-scale resizing.
        scales: in multi-scale resizing, lengths of the shorter side in training.
        longest: in multi-scale resizing, upper limit of the longer side.
        flip: probability that a picture is mirrored in training.
    """

    size: int
    jitter: tuple[float, float] | None
    scales: Sequence[int]
    longest: int
    flip: float

    def draw(self, width: int, height: int, generator: Generator | None) -> Placement:
        """Draws a placement for training; it always takes four numbers from the generator.

        Args:
            width: width of the picture.
            height: height of the picture.
            generator: source of the random numbers; None is torch's global generator.
        """
        scale, x, y, flip = torch.rand(4, generator=generator).tolist()
        mirrored = flip < self.flip
        if self.jitter is None:
            resized = shorter(width, height, self.scales[int(scale * len(self.scales))], self.longest)
            return Placement(resized, 0, 0, *resized, mirrored)
        low, high = self.jitter
        wide, high_ = resized = fit(width, height, self.size * (low + (high - low) * scale))
        w, h = min(wide, self.size), min(high_, self.size)
        # One more than the free space, so that the last position is as likely as the others.
        return Placement(resized, int(x * (wide - w + 1)), int(y * (high_ - h + 1)), w, h, mirrored)

    def fixed(self, width: int, height: int) -> Placement:
        """Returns the placement in evaluation: the whole picture.

        Args:
            width: width of the picture.
            height: height of the picture.
        """
        if self.jitter is None:
            resized = shorter(width, height, self.size, self.longest)
        else:
            resized = fit(width, height, self.size)
        return Placement(resized, 0, 0, *resized, False)


def bounds(masks: Tensor) -> Tensor:
    """Returns the bounding boxes of masks: left, top, right, bottom on pixel edges; zeros for an empty mask.

    Args:
        masks: (k, h, w), true inside.

    Example:
        >>> import torch
        >>> bounds(torch.tensor([[[False, True, True], [False, False, True]]])).tolist()
        [[1.0, 0.0, 3.0, 2.0]]
    """
    found = torch.zeros(len(masks), 4)
    for k, mask in enumerate(masks):
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        if len(rows):
            found[k] = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return found
