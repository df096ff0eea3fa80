"""The fifteen common corruptions of pictures at five strengths, as CIFAR-C and ImageNet-C were made.

A corruption is a function of a batch in double precision, its constants at a strength, and random numbers per picture;
``CONSTANTS`` is the published table. Where the published code calls another library (scikit-image, SciPy, OpenCV,
ImageMagick, Pillow), the operation is written out here by that library's definition. Three examples:

* contrast draws nothing: (x - mean) c + mean;
* fog draws a texture of the picture's size, and adds it;
* jpeg_compression is Pillow's own, picture by picture: a codec is not a filter.

Source:
    Hendrycks and Dietterich 2019, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations, ICLR,
    arXiv 1903.12261; constants and order of operations: github.com/hendrycks/robustness, make_cifar_c.py and
    imagenet_c/corruptions.py.
"""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from schemes import SchemeError

from ..seeds import plain, seed_of
from . import filters as f
from .textures import Draws, clouds, frosting

Protocol = Literal["cifar", "imagenet"]
SIDES: dict[Protocol, int] = {"cifar": 32, "imagenet": 224}  # in pixels, for which the constants were published
STRENGTHS = (1, 2, 3, 4, 5)
SMALL = 96  # pixels a side: up to here the constants are those of CIFAR-C


class Setting(NamedTuple):
    """What a corruption reads besides the pictures.

    Attributes:
        c: Its constants at a strength.
        draws: Random numbers, one generator per picture.
        scale: The picture's shorter side over that of the published constants.
        shrink: Scale factor for photographs of frost.
        frost: Photographs, uint8 (3, h, w); if there are none, a texture is used.
    """

    c: tuple[float, ...]
    draws: Draws
    scale: float
    shrink: float
    frost: Sequence[Tensor]


def _gaussian_noise(x: Tensor, s: Setting) -> Tensor:
    return x + s.draws.normal(0, s.c[0], x.shape[1:]).to(x)


def _shot_noise(x: Tensor, s: Setting) -> Tensor:
    return s.draws.poisson(x * s.c[0]).to(x) / s.c[0]


def _impulse_noise(x: Tensor, s: Setting) -> Tensor:
    hit = s.draws.uniform(0, 1, x.shape[1:]).to(x) <= s.c[0]
    salt = s.draws.uniform(0, 1, x.shape[1:]).to(x) <= 0.5
    return torch.where(hit, salt.to(x), x)


def _defocus_blur(x: Tensor, s: Setting) -> Tensor:
    return f.correlate(x, f.disk(*s.c))


def _glass_blur(x: Tensor, s: Setting) -> Tensor:
    sigma, reach, times = s.c[0], int(s.c[1]), int(s.c[2])
    # The published code casts to 8 bits here, which drops fractions.
    levels = (f.gaussian(x, sigma) * 255).floor()
    for _ in range(times):
        levels = _shuffled(levels, reach, s.draws)
    return f.gaussian(levels / 255, sigma)


def _shuffled(x: Tensor, reach: int, draws: Draws) -> Tensor:
    """Each pixel takes the value of a random one up to ``reach`` away, from the last pixel to the first.

    A later pixel reads the values that earlier ones have taken; chains of such reads are resolved by pointer doubling.
    The published loop is meant to swap two pixels. Since NumPy returns views, the second pixel keeps its value, and the
    published pictures were made this way.
    """
    n, _, height, width = x.shape
    # None on a side of at most twice the reach.
    down, across = (torch.arange(size - reach, min(reach, size - reach), -1) for size in (height, width))
    if not len(down) or not len(across):
        return x
    moves = draws.integers(-reach, reach, (len(down), len(across), 2))  # (columns, rows), as they are drawn there
    rows, columns = down[:, None] + moves[..., 1], across + moves[..., 0]
    here, there = (down[:, None] * width + across).expand(n, -1, -1).flatten(1), (rows * width + columns).flatten(1)
    size = height * width
    turn = torch.full((size,), -1)
    turn[here[0]] = torch.arange(here.shape[1])
    # Indices 0 ... size - 1 are pixels after the loop, those from size on are pixels before it.
    source = torch.arange(2 * size).expand(n, -1).clone()
    source[:, :size] += size
    # A pixel whose turn came before has its new value already; all others have the old one.
    taken = (turn[there] >= 0) & (turn[there] < turn[here])
    source.scatter_(1, here, torch.where(taken, there, there + size))
    while True:
        further = source.gather(1, source)
        if torch.equal(further, source):
            break
        source = further
    index = (source[:, :size] - size).to(x.device)[:, None].expand(-1, x.shape[1], -1)
    return x.flatten(2).gather(2, index).view_as(x)


def _motion_blur(x: Tensor, s: Setting) -> Tensor:
    # ImageMagick rounds to whole levels; some builds of it drop fractions.
    return _rounded(f.motion(x, int(s.c[0]), s.c[1], s.draws.uniform(-45, 45)))


def _rounded(x: Tensor) -> Tensor:
    """Rounds to whole levels, plus a tiny margin, so that truncation to integers keeps them."""
    return ((x * 255).round() + 1e-6) / 255


def _zoom_blur(x: Tensor, s: Setting) -> Tensor:
    stop, step = s.c
    # As numpy.arange computes them, to the last bit: sizes are rounded from them.
    factors = [1 + i * ((1 + step) - 1) for i in range(math.ceil((stop - 1) / step))]
    total = sum((f.clipped_zoom(x, factor) for factor in factors), x)
    return total / (len(factors) + 1)


def _snow(x: Tensor, s: Setting) -> Tensor:
    mean, std, zoom, least, radius, sigma, keep = s.c
    flakes = f.clipped_zoom(s.draws.normal(mean, std, (1, *x.shape[2:])), zoom)
    # To 8 bits and back, since the published code passes the flakes to ImageMagick as a picture.
    flakes = (torch.where(flakes < least, 0, flakes).clamp(0, 1) * 255).floor() / 255
    angles = s.draws.uniform(-135, -45)
    flakes = ((f.motion(flakes, int(radius), sigma, angles) * 255).round() / 255).to(x)
    pale = torch.maximum(x, _grey(x) * 1.5 + 0.5)
    return keep * x + (1 - keep) * pale + flakes + flakes.flip(2, 3)


def _grey(x: Tensor) -> Tensor:
    if x.shape[1] == 1:
        return x
    return (x * torch.tensor([0.299, 0.587, 0.114]).to(x)[:, None, None]).sum(1, keepdim=True)


def _frost(x: Tensor, s: Setting) -> Tensor:
    height, width = x.shape[2:]
    if s.frost:
        layer = torch.stack([_photograph(s, i, height, width) for i in range(len(x))])
    else:
        layer = frosting(s.draws, height, width)
    layer = layer.to(x)
    return s.c[0] * x + s.c[1] * (_grey(layer) if x.shape[1] == 1 else layer)


def _photograph(s: Setting, i: int, height: int, width: int) -> Tensor:
    """Returns a random crop of a random photograph, in [0, 1]."""
    # From the picture's own generator, so that its crop does not depend on the batch.
    own = Draws(())
    own.generators = [s.draws.generators[i]]
    # Six were published; the index is drawn from the first five.
    picture = s.frost[int(own.integers(0, min(5, len(s.frost))))]
    high, wide = (round(n * s.shrink) for n in picture.shape[1:])
    if high <= height or wide <= width:
        raise SchemeError(
            f"frost: a photograph of {tuple(picture.shape[1:])} pixels is not larger than {height}x{width} after "
            f"scaling by {s.shrink:g}\n  Give larger ones, or none: a texture stands in."
        )
    levels = picture.double()[None]
    if s.shrink != 1:
        # OpenCV steps by 1 / shrink, even if this is not the ratio of the rounded sizes.
        rows, columns = ((torch.arange(n, dtype=torch.float64) + 0.5) / s.shrink - 0.5 for n in (high, wide))
        grid = torch.meshgrid(rows, columns, indexing="ij")
        levels = f.sample(levels, grid[0][None], grid[1][None], f.nearest).round()
    top, left = int(own.integers(0, high - height)), int(own.integers(0, wide - width))
    return levels[0, :, top : top + height, left : left + width] / 255


def _fog(x: Tensor, s: Setting) -> Tensor:
    most = x.amax((1, 2, 3), keepdim=True)
    fog = s.c[0] * clouds(s.draws, x.shape[2], x.shape[3], s.c[1]).to(x)[:, None]
    return (x + fog) * most / (most + s.c[0])


def _brightness(x: Tensor, s: Setting) -> Tensor:
    # The value of HSV is the largest channel; with hue and saturation kept, all channels scale alike. Black stays grey.
    value = x.amax(1, keepdim=True)
    more = (value + s.c[0]).clamp(0, 1)
    return torch.where(value > 0, x * (more / torch.where(value > 0, value, 1)), more)


def _contrast(x: Tensor, s: Setting) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * s.c[0] + mean


def _elastic_transform(x: Tensor, s: Setting) -> Tensor:
    n, _, height, width = x.shape
    amplitude, sigma, jitter = (s.scale * c for c in s.c)
    middle, arm = torch.tensor([height // 2, width // 2]).double(), min(height, width) // 3
    signs = torch.tensor([[1, 1], [1, -1], [-1, -1]]).double()
    given = middle + arm * signs  # three points, which an affine map takes to others
    moved = given + s.draws.uniform(-jitter, jitter, (3, 2))
    ones = torch.ones(n, 3, 1, dtype=torch.float64)
    back = torch.linalg.solve(torch.cat([moved, ones], 2), given.expand(n, -1, -1))  # from new positions to old ones
    rows, columns = torch.meshgrid(*(torch.arange(m).double() for m in (height, width)), indexing="ij")
    grid = torch.stack([columns, rows, torch.ones_like(rows)], -1)  # (h, w, 3)
    old = grid @ back[:, None]
    # First the affine map, where OpenCV mirrors about the last pixel; then the waves, where SciPy repeats it.
    x = f.sample(x, old[..., 1].to(x), old[..., 0].to(x), f.mirror)
    across, down = (
        f.gaussian(s.draws.uniform(-1, 1, (height, width)), sigma, f.reflect, 3.0) * amplitude for _ in range(2)
    )
    return f.sample(x, (rows + down).to(x), (columns + across).to(x), f.reflect)


def _pixelate(x: Tensor, s: Setting) -> Tensor:
    size = x.shape[-2:]
    small = [max(1, int(n * s.c[0])) for n in size]
    return _rounded(f.box_resize(f.box_resize((x * 255).round(), small), size) / 255)


def _jpeg_compression(x: Tensor, s: Setting) -> Tensor:
    from PIL import Image

    levels = (x * 255).round().to("cpu", torch.uint8)
    found = []
    for picture in levels.permute(0, 2, 3, 1):
        buffer, grey = io.BytesIO(), picture.shape[2] == 1
        image = Image.frombytes("L" if grey else "RGB", (picture.shape[1], picture.shape[0]), picture.numpy().tobytes())
        image.save(buffer, "JPEG", quality=int(s.c[0]))
        read = Image.open(buffer)
        found.append(torch.frombuffer(bytearray(read.tobytes()), dtype=torch.uint8).view_as(picture))
    return _rounded(torch.stack(found).permute(0, 3, 1, 2).to(x) / 255)


KINDS: dict[str, Callable[[Tensor, Setting], Tensor]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}


def _scalars(*values: float) -> tuple[tuple[float], ...]:
    return tuple((value,) for value in values)


# A column per data set, a row per strength; the meaning of each is in the function.
CONSTANTS: dict[str, dict[Protocol, Any]] = {
    "gaussian_noise": {
        "cifar": _scalars(0.04, 0.06, 0.08, 0.09, 0.10),
        "imagenet": _scalars(0.08, 0.12, 0.18, 0.26, 0.38),
    },
    "shot_noise": {"cifar": _scalars(500, 250, 100, 75, 50), "imagenet": _scalars(60, 25, 12, 5, 3)},
    "impulse_noise": {
        "cifar": _scalars(0.01, 0.02, 0.03, 0.05, 0.07),
        "imagenet": _scalars(0.03, 0.06, 0.09, 0.17, 0.27),
    },
    "defocus_blur": {
        "cifar": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        "imagenet": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    },
    "glass_blur": {
        "cifar": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        "imagenet": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    },
    "motion_blur": {
        "cifar": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        "imagenet": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    },
    "zoom_blur": {
        "cifar": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        "imagenet": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    },
    "snow": {
        "cifar": (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        "imagenet": (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    },
    "frost": {
        "cifar": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        "imagenet": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    },
    "fog": {
        "cifar": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        "imagenet": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    },
    "brightness": {
        "cifar": _scalars(0.05, 0.1, 0.15, 0.2, 0.3),
        "imagenet": _scalars(0.1, 0.2, 0.3, 0.4, 0.5),
    },
    "contrast": {
        "cifar": _scalars(0.75, 0.5, 0.4, 0.3, 0.15),
        "imagenet": _scalars(0.4, 0.3, 0.2, 0.1, 0.05),
    },
    # In pixels of pictures of 32 and 224 pixels. The published code writes 244 where 224 is meant, and says so.
    "elastic_transform": {
        "cifar": tuple(
            (32 * a, 32 * b, 32 * c)
            for a, b, c in ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))
        ),
        "imagenet": tuple(
            (244 * a, 244 * b, 244 * c)
            for a, b, c in (
                (2, 0.7, 0.1),
                (2, 0.08, 0.2),
                (0.05, 0.01, 0.02),
                (0.07, 0.01, 0.02),
                (0.12, 0.01, 0.02),
            )
        ),
    },
    "pixelate": {
        "cifar": _scalars(0.95, 0.9, 0.85, 0.75, 0.65),
        "imagenet": _scalars(0.6, 0.5, 0.4, 0.3, 0.25),
    },
    "jpeg_compression": {"cifar": _scalars(80, 65, 58, 50, 40), "imagenet": _scalars(25, 18, 15, 10, 7)},
}


def protocol_of(height: int, width: int) -> Protocol:
    """Returns whose constants apply to pictures of a size: CIFAR-C's up to 96 pixels, ImageNet-C's above.

    Args:
        height: height of the pictures.
        width: width of the pictures.
    """
    return "cifar" if min(height, width) <= SMALL else "imagenet"


def corrupt(
    x: Tensor,
    name: str,
    strength: int,
    indices: Sequence[int] | None = None,
    seed: int = 0,
    protocol: Protocol | None = None,
    frost: Sequence[Tensor] = (),
) -> Tensor:
    """Applies a common corruption to a batch of pictures.

    Random numbers come from one generator per picture, seeded by ``seed``, the corruption, the strength and the
    picture's index: the result is the same in any batch. Levels are truncated to whole ones, as published. The
    constants are in pixels, for pictures of 32 and 224; only those of elastic_transform grow with the picture.

    Args:
        x: Levels, uint8 (n, c, h, w), 1 or 3 channels.
        name: One of ``KINDS``.
        strength: From 1 to 5.
        indices: Indices of the pictures in their data set; 0 to n - 1 if left out.
        seed: Seed of all random numbers.
        protocol: "cifar" or "imagenet", whose constants are used; chosen by the size if left out.
        frost: Photographs of frost, uint8 (3, h, w), as the benchmark's authors publish them. Without them a texture is
            used, and the figure is not that of the benchmark.

    Returns:
        Levels, uint8 (n, c, h, w).

    Raises:
        SchemeError: Pictures of another kind, or no such corruption, strength or protocol.

    Source:
        Hendrycks and Dietterich 2019, arXiv 1903.12261.

    Example:
        >>> import torch
        >>> x = torch.full((2, 3, 32, 32), 100, dtype=torch.uint8)
        >>> corrupt(x, "brightness", 3)[0, 0, 0, 0].item()
        138
        >>> torch.equal(corrupt(x, "snow", 1)[1:], corrupt(x[1:], "snow", 1, indices=[1]))
        True
    """
    if x.dtype != torch.uint8 or x.dim() != 4 or x.shape[1] not in (1, 3) or not x.numel():
        raise SchemeError(
            f"corrupt: pictures {tuple(x.shape)} of {x.dtype}; want uint8 (n, 1 or 3, h, w)\n"
            "  Levels before normalisation: (255 * x).round().to(torch.uint8) of pictures in [0, 1]."
        )
    if name not in KINDS:
        raise SchemeError(f"corrupt: there is no corruption {name!r}\n  There are {', '.join(KINDS)}.")
    try:
        level = plain(strength)
    except SchemeError:
        level = 0  # True and 2.0 equal strengths, and are none
    if level not in STRENGTHS:
        raise SchemeError(f"corrupt: strength {strength!r}\n  Want a whole number from 1 to 5.")
    height, width = x.shape[2:]
    protocol = protocol_of(height, width) if protocol is None else protocol
    if protocol not in SIDES:
        raise SchemeError(f"corrupt: protocol {protocol!r}\n  Want one of {', '.join(SIDES)}.")
    places = range(len(x)) if indices is None else indices
    if len(places) != len(x):
        raise SchemeError(f"corrupt: {len(places)} indices for {len(x)} pictures\n  Give one each.")
    draws = Draws([seed_of(seed, name, level, i) for i in places])
    scale, shrink = min(height, width) / SIDES[protocol], 0.2 if protocol == "cifar" else 1.0
    setting = Setting(CONSTANTS[name][protocol][int(level) - 1], draws, scale, shrink, frost)
    # In double precision, as NumPy made the published pictures: fractions are dropped, and a value slightly too small
    # costs a level.
    return _cut(KINDS[name](x.double() / 255, setting))


def _cut(x: Tensor) -> Tensor:
    """Truncates to whole levels, as NumPy's uint8 does, without rounding."""
    return (x.clamp(0, 1) * 255).to(torch.uint8)
