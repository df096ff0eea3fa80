"""Decodes pictures to 8-bit RGB levels, and to the square that a net sees.

The rules for each kind of picture. Of an animation or of several pages, the first frame is used. 16-bit grey is scaled
by its range, 65535 to 255; 32-bit integers and floats are scaled by the first range that their largest value fits,
[0, 255], [0, 65535] and [0, 2^31 - 1], or [0, 2^32 - 1] without a sign, for integers, [0, 1], [0, 255] and [0, 65535]
for floats. Transparent pixels show white. CMYK and other colour spaces are converted by Pillow's plain formulas,
without colour profiles. Pictures are turned upright by their EXIF orientation.
"""

import io
import math
from collections.abc import Sequence
from functools import cache
from os import PathLike
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

Interpolation = Literal["bilinear", "bicubic", "random"]
Box = tuple[int, int, int, int]
_Edge = TypeVar("_Edge", int, float)

# The formats that Pillow reads itself; PostScript would be passed to another program.
FORMATS = "JPEG PNG WEBP GIF TIFF BMP AVIF DIB ICO JPEG2000 MPO PCX PPM SGI TGA".split()
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_T = Image.Transpose
_UPRIGHT = {
    2: _T.FLIP_LEFT_RIGHT,
    3: _T.ROTATE_180,
    4: _T.FLIP_TOP_BOTTOM,
    5: _T.TRANSPOSE,
    6: _T.ROTATE_270,
    7: _T.TRANSVERSE,
    8: _T.ROTATE_90,
}


# The places of a picture's orientation: EXIF, or XMP, which Pillow reads where EXIF has none.
_TOLD_IN = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}


@cache
def _formats() -> list[str]:
    # Loads all plugins: before this, Pillow knows only the commonest formats, and the list would lack the others.
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


class Unreadable(Exception):
    """A picture that cannot be decoded; the text says why."""


class Picture:
    """An encoded picture that is opened but not yet decoded.

    Args:
        encoded: the bytes of the file, or its path.

    Attributes:
        size: Width and height, upright.
        halved: Whether its channels have 16 bits, of which Pillow keeps the higher 8.

    Raises:
        Unreadable: It is not a picture, or so large that it may be a decompression bomb; decoding raises it too.
    """

    def __init__(self, encoded: bytes | str | PathLike[str]) -> None:
        try:
            if isinstance(encoded, bytes):
                data = encoded
            else:
                # Read at once: a picture that is opened lazily keeps its file open, and a batch has hundreds.
                with open(encoded, "rb") as file:
                    data = file.read()
            if not data:
                raise Unreadable("it is empty")
            self.image = Image.open(io.BytesIO(data), formats=_formats())
        except Image.DecompressionBombError as e:
            raise Unreadable(str(e)) from None
        except Image.UnidentifiedImageError:
            raise Unreadable("it is no picture of a known format") from None
        except Unreadable:
            raise
        except Exception as e:  # a format's reader may raise anything on bytes of another format
            raise Unreadable(f"{type(e).__name__}: {e}") from None
        # Read from the decoder's settings, which Pillow discards once the picture is decoded.
        deep = any(";16" in str(tile[3]) for tile in getattr(self.image, "tile", ()))
        self.halved = deep and not self.image.mode.startswith("I")
        pixels = self.image.width * self.image.height
        # Pillow itself only warns up to twice this size; a file of a few kilobytes can decode to gigabytes.
        if Image.MAX_IMAGE_PIXELS is not None and pixels > Image.MAX_IMAGE_PIXELS:
            raise Unreadable(f"{pixels:,} pixels are more than PIL.Image.MAX_IMAGE_PIXELS={Image.MAX_IMAGE_PIXELS:,}")
        # Stored, not applied: turning the small result is cheaper than turning the picture.
        self.turn = _UPRIGHT.get(self._orientation() or 1)
        width, height = self.image.size
        self.size = (
            (height, width)
            if self.turn in (_T.TRANSPOSE, _T.TRANSVERSE, _T.ROTATE_90, _T.ROTATE_270)
            else (width, height)
        )

    def _orientation(self) -> int | None:
        if self.image.format == "TIFF":
            self._decode()  # some versions of Pillow turn the picture here, and remove the tag
        # Parsing EXIF costs as much as opening, so it is only done where there is some.
        if self.image.format not in ("TIFF", "PNG") and not self.image.info.keys() & _TOLD_IN:
            return None
        try:
            return self.image.getexif().get(274)
        except Exception:
            return None

    def rgb(self) -> Image.Image:
        """The whole picture, upright, in RGB."""
        picture = self._load()
        return picture if self.turn is None else picture.transpose(self.turn)

    def whole(self) -> Tensor:
        """The whole picture, upright: uint8 (height, width, 3)."""
        return _levels(self.rgb())

    def cut(self, box: Box, size: int, interpolation: str, out: Tensor | None = None) -> Tensor:
        """The pixels in `box` (left, top, right, bottom), resized: uint8 (size, size, 3), written to `out` if given.

        A JPEG whose box is at least four times as large as `size` is decoded at a half, a quarter or an eighth of its
        resolution, so that at least twice `size` remains.

        Args:
            box: left, top, right and bottom, in pixels.
            size: side of the result.
            interpolation: ``bilinear`` or ``bicubic``.
            out: tensor to write to; None: a new tensor.
        """
        box = self._stored(box)
        shrink = self._shrink(min(box[2] - box[0], box[3] - box[1]) / (2 * size))
        picture = self._load()
        if shrink > 1:
            levels = _reduced(picture, box, shrink, size, interpolation)
        else:
            part = picture if box == (0, 0, *picture.size) else picture.crop(box)
            # A picture that has to be turned cannot be written in place: it is turned after resizing.
            levels = resize(_levels(part), (size, size), interpolation, out if self.turn is None else None)
        levels = levels if self.turn is None else _turned(levels, self.turn)
        return levels if out is None or out is levels else out.copy_(levels)

    def middle(self, size: int, inner: float, interpolation: str) -> Tensor:
        """Resizes the shorter side to size / `inner`, and crops the centred square: uint8 (size, size, 3).

        Args:
            size: side of the result.
            inner: the share of the shorter side that is shown.
            interpolation: ``bilinear`` or ``bicubic``.
        """
        width, height = self.size
        if width == height == size and inner == 1:
            return _levels(self.rgb())
        short = max(size, math.floor(size / inner))
        wide = short if width <= height else short * width // height
        high = short if height <= width else short * height // width
        left, top = round((wide - size) / 2), round((high - size) / 2)
        x, y = width / wide, height / high  # of a pixel of the resized picture
        box = self._stored((left * x, top * y, (left + size) * x, (top + size) * y))
        shrink = self._shrink(min(width, height) / (2 * short))
        if shrink > 1:
            levels = _reduced(self._load(), box, shrink, size, interpolation)
            return levels if self.turn is None else _turned(levels, self.turn)
        levels = resize(_levels(self.rgb()), (high, wide), interpolation)
        return levels[top : top + size, left : left + size]

    def _shrink(self, ratio: float) -> int:
        """Sets a JPEG to decode at down to 1 / ratio of its size; returns the factor by which it shrinks."""
        width, height = self.image.size
        scale = max((k for k in (2, 4, 8) if k <= ratio), default=1)
        if self.image.format not in ("JPEG", "MPO") or self.image.mode not in ("RGB", "L") or scale == 1:
            return 1
        # libjpeg leaves frequencies out, instead of decoding all of them and shrinking.
        self.image.draft(None, (width // scale, height // scale))
        # Pillow may decline, which shows in an unchanged size.
        return 1 if self.image.size == (width, height) else scale

    def _stored(self, box: tuple[_Edge, _Edge, _Edge, _Edge]) -> tuple[_Edge, _Edge, _Edge, _Edge]:
        """Maps a box of the upright picture to the picture as stored."""
        (width, height), (left, top, right, bottom) = self.image.size, box
        return {
            None: box,
            _T.FLIP_LEFT_RIGHT: (width - right, top, width - left, bottom),
            _T.ROTATE_180: (width - right, height - bottom, width - left, height - top),
            _T.FLIP_TOP_BOTTOM: (left, height - bottom, right, height - top),
            _T.TRANSPOSE: (top, left, bottom, right),
            _T.ROTATE_270: (top, height - right, bottom, height - left),
            _T.TRANSVERSE: (width - bottom, height - right, width - top, height - left),
            _T.ROTATE_90: (width - bottom, left, width - top, right),
        }[self.turn]

    def _load(self) -> Image.Image:
        return self._decode(convert=True)

    def _decode(self, convert: bool = False) -> Image.Image:
        """Pillow's picture, decoded, as stored or in RGB."""
        try:
            self.image.load()
            return _to_rgb(self.image) if convert else self.image
        except Unreadable:
            raise
        except Exception as e:  # truncated and damaged data end in OSError, SyntaxError, struct.error, ...
            raise Unreadable(f"{type(e).__name__}: {e}") from None


def _reduced(picture: Image.Image, box: Sequence[float], shrink: int, size: int, interpolation: str) -> Tensor:
    """Crops `box`, in pixels of the whole picture, from one decoded `shrink` times smaller: uint8 (size, size, 3)."""
    left, top, right, bottom = (edge / shrink for edge in box)
    # Cropped first: the filter of the resizing would read pixels beyond the box.
    corner = math.floor(left), math.floor(top)
    part = picture.crop((*corner, min(math.ceil(right), picture.width), min(math.ceil(bottom), picture.height)))
    edges = (
        left - corner[0],
        top - corner[1],
        min(right - corner[0], part.width),
        min(bottom - corner[1], part.height),
    )
    return _levels(part.resize((size, size), RESAMPLING[interpolation], box=edges))


def _turned(levels: Tensor, turn: int) -> Tensor:
    across, down, swap = {
        _T.FLIP_LEFT_RIGHT: (True, False, False),
        _T.ROTATE_180: (True, True, False),
        _T.FLIP_TOP_BOTTOM: (False, True, False),
        _T.TRANSPOSE: (False, False, True),
        _T.ROTATE_270: (True, False, True),
        _T.TRANSVERSE: (True, True, True),
        _T.ROTATE_90: (False, True, True),
    }[_T(turn)]
    levels = levels.transpose(0, 1) if swap else levels
    return levels.flip([axis for axis, there in ((0, down), (1, across)) if there])


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts to 8-bit RGB by the rules in this module's docstring."""
    # Most pictures: nothing to convert, and no copy.
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        if image.mode == "I" and image.format == "TIFF" and image.tag_v2.get(339, 1) in (1, (1,)):  # type: ignore
            values = values.view(np.uint32)  # unsigned samples, which Pillow holds as signed
        return Image.fromarray(_eight_bits(values, image.mode)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        # Premultiplied alpha has to be undone before Pillow can compose.
        if image.mode in ("La", "RGBa"):
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        shown = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    if values.size and (not np.isfinite(values).all() or values.min() < 0):
        raise Unreadable(f"levels from {values.min()} to {values.max()} are no grey levels")
    # From small to large: the first range that the largest value fits is the best guess at the intended one.
    ranges = [255.0, 65535.0, 2.0**32 - 1 if values.dtype == np.uint32 else 2.0**31 - 1]
    if mode == "F":
        ranges = [1.0, *ranges[:2]]
    elif mode != "I":
        ranges = [65535.0]
    # Resampled floats overshoot their range a little.
    spare = 1.5 if mode == "F" else 1.0
    full = next((full for full in ranges if values.max(initial=0) <= full * spare), None)
    if full is None:
        raise Unreadable(f"levels up to {values.max():g} fit no range that is known")
    return np.clip(np.rint(values * (255 / full)), 0, 255).astype(np.uint8)


def _levels(picture: Image.Image) -> Tensor:
    """Converts an RGB picture to uint8 (h, w, 3)."""
    # Through a bytearray, as torch warns about read-only memory.
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(picture.height, picture.width, 3)


def resize(levels: Tensor, size: tuple[int, int], interpolation: str, out: Tensor | None = None) -> Tensor:
    """uint8 (h, w, 3) -> (*size, 3), with a filter as wide as a pixel of the coarser grid; as PIL up to rounding.

    Args:
        levels: (h, w, 3), uint8.
        size: height and width of the result.
        interpolation: ``bilinear`` or ``bicubic``.
        out: tensor to write to; None: a new tensor.
    """
    if tuple(levels.shape[:2]) == size:
        return levels
    x = levels.permute(2, 0, 1)[None]
    if out is None:
        return F.interpolate(x, size, mode=interpolation, antialias=True)[0].permute(1, 2, 0)
    # The operator behind F.interpolate, which itself has no `out`: this saves a copy of the result.
    ops = {"bilinear": torch.ops.aten._upsample_bilinear2d_aa, "bicubic": torch.ops.aten._upsample_bicubic2d_aa}
    ops[interpolation].out(x, list(size), False, None, None, out=out.permute(2, 0, 1)[None])
    return out


def drawn(interpolation: str, generator: Generator | None) -> str:
    """Returns the interpolation itself, or for `random` draws one of the two.

    Args:
        interpolation: ``bilinear``, ``bicubic`` or ``random``.
        generator: source of the draw; None is torch's own.
    """
    if interpolation != "random":
        return interpolation
    return "bilinear" if float(torch.rand((), generator=generator)) < 0.5 else "bicubic"


def random_box(
    width: int,
    height: int,
    smallest: float = 0.08,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    generator: Generator | None = None,
) -> Box:
    """Draws left, top, right, bottom of a random box in whole pixels.

    Its share of the area is drawn from [`smallest`, 1] and its aspect (width / height) log-uniformly from `ratio`. Up
    to ten boxes are tried until one fits; if none does, the box is the largest centred one with an aspect in `ratio`.

    Args:
        width: of the picture.
        height: of the picture.
        smallest: least share of the area.
        ratio: least and largest aspect.
        generator: source of the draws; None is torch's own.

    Source: Szegedy et al. 2015, "Going deeper with convolutions", section 6; sampled as in torchvision and timm.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        # Four numbers whether the box fits or not, so that every try uses the same number of draws.
        area, aspect, x, y = torch.rand(4, generator=generator).tolist()
        area = (smallest + (1 - smallest) * area) * width * height
        # Log-uniform, so that 3:4 and 4:3 are equally likely.
        aspect = math.exp(low + (high - low) * aspect)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * ratio[1]))), min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def middle_box(width: int, height: int, inner: float) -> tuple[float, float, float, float]:
    """The centred square whose side is `inner` times the shorter side: the view of `Picture.middle`, up to rounding.

    Args:
        width: of the picture.
        height: of the picture.
        inner: side of the square as a share of the shorter side.
    """
    side = inner * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side
