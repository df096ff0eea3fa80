"""Linear filters and resampling of batches of pictures (n, c, h, w), with the boundaries of the published code.

The pixels beyond the edges of a line a b c d: ``nearest`` a a | a b c d | d d, ``reflect`` b a | a b c d | d c,
``mirror`` c b | a b c d | c b.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def nearest(i: Tensor, size: int) -> Tensor:
    """Maps index i to one in 0 ... size - 1, repeating the edge.

    Args:
        i: indices, also beyond the edges.
        size: pixels of the line.
    """
    return i.clamp(0, size - 1)


def reflect(i: Tensor, size: int) -> Tensor:
    """The same, mirrored at the outer edge of the last pixel, which therefore appears twice.

    Args:
        i: indices, also beyond the edges.
        size: pixels of the line.
    """
    i = i.remainder(2 * size)
    return torch.minimum(i, 2 * size - 1 - i)


def mirror(i: Tensor, size: int) -> Tensor:
    """The same, mirrored at the centre of the last pixel.

    Args:
        i: indices, also beyond the edges.
        size: pixels of the line.
    """
    i = i.remainder(max(1, 2 * size - 2))
    return torch.minimum(i, 2 * size - 2 - i)


Fold = Callable[[Tensor, int], Tensor]


def gaussian_matrix(size: int, sigma: float, fold: Fold, truncate: float) -> Tensor:
    """Returns the Gaussian filter of a line of ``size`` pixels as a matrix (size, size), in double precision.

    Row i holds exp(-k^2 / 2 sigma^2) / Z at fold(i + k), |k| up to round(truncate sigma); the identity for sigma 0.

    Args:
        size: pixels of the line.
        sigma: standard deviation in pixels.
        fold: maps indices beyond the edges to pixels.
        truncate: radius of the filter, in standard deviations.

    Example:
        >>> gaussian_matrix(3, 1.0, nearest, 4.0).sum(1).round(decimals=9).tolist()
        [1.0, 1.0, 1.0]
    """
    # SciPy's own limit; at 0 the weights would be 0/0.
    if sigma <= 1e-15:
        return torch.eye(size, dtype=torch.float64)
    reach = int(truncate * sigma + 0.5)
    k = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (k.double() / sigma) ** 2)
    weights = (weights / weights.sum()).expand(size, -1)
    places = fold(torch.arange(size)[:, None] + k, size)
    # Added, since at the edges several weights fold onto one pixel.
    return torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, places, weights)


def gaussian(x: Tensor, sigma: float, fold: Fold = nearest, truncate: float = 4.0) -> Tensor:
    """Gaussian blur of the last two dimensions.

    Args:
        x: (..., h, w).
        sigma: standard deviation in pixels.
        fold: maps indices beyond the edges to pixels.
        truncate: radius of the filter, in standard deviations.
    """
    down, across = (gaussian_matrix(n, sigma, fold, truncate).to(x) for n in x.shape[-2:])
    # Two matrix products: the edges need no padding, and a filter as wide as the picture costs no more.
    return down @ x @ across.T


def disk(radius: float, alias_blur: float) -> Tensor:
    """Returns the kernel of an out-of-focus lens: a disk on whole pixels, blurred slightly, with sum 1.

    Pixels (i, j) with i^2 + j^2 <= radius^2, filtered by a Gaussian of 3 x 3 pixels, 5 x 5 for a radius above 8.

    Args:
        radius: in pixels.
        alias_blur: standard deviation of the Gaussian, in pixels.
    """
    # As published: small disks use a grid of 17 pixels a side, larger ones the smallest grid that holds them.
    half = 8 if radius <= 8 else int(radius)
    i = torch.arange(-half, half + 1, dtype=torch.float64)
    inside = (i[:, None] ** 2 + i**2 <= radius**2).double()
    reach = 1 if radius <= 8 else 2
    k = torch.arange(-reach, reach + 1, dtype=torch.float64)
    tap = torch.exp(-(k**2) / (2 * alias_blur**2))
    tap = tap / tap.sum()
    size = 2 * half + 1
    places = mirror(torch.arange(size)[:, None] + k.long(), size)
    smooth = torch.zeros(size, size, dtype=torch.float64).scatter_add_(1, places, tap.expand(size, -1))
    return smooth @ (inside / inside.sum()) @ smooth.T


def correlate(x: Tensor, kernel: Tensor) -> Tensor:
    """Correlates each channel with one odd, square kernel, mirrored at the edges; leaves out the zeros around its core.

    Args:
        x: (n, c, h, w).
        kernel: (2 r + 1, 2 r + 1), not all zeros.
    """
    half = len(kernel) // 2
    used = (kernel != 0).nonzero() - half
    reach = int(used.abs().max())
    inner = kernel[half - reach : half + reach + 1, half - reach : half + reach + 1]
    height, width = x.shape[-2:]
    rows, columns = (mirror(torch.arange(-reach, n + reach), n) for n in (height, width))
    padded = x[..., rows, :][..., columns]
    # In single precision: torch has no fast convolution in double, and levels are whole.
    flat = padded.flatten(0, 1)[:, None].float()
    return F.conv2d(flat, inner.to(flat)[None, None]).to(x).view_as(x)


def motion(x: Tensor, radius: int, sigma: float, angles: Tensor) -> Tensor:
    """Motion blur: the weighted mean of each pixel and those ahead of it on a line, as ImageMagick defines it.

    y(p) = sum_i w_i x(p + d_i), w_i ~ exp(-i^2 / 2 sigma^2), i = 0 ... 2 radius; d_i is i steps in the direction of the
    angle, each coordinate rounded, halves downwards. Edge pixels are repeated.

    Args:
        x: (n, c, h, w).
        radius: In pixels.
        sigma: Standard deviation of the weights, in pixels.
        angles: In degrees (n,); 0 points to the right, 90 downwards.

    Source:
        ImageMagick, MagickCore/effect.c, MotionBlurImage and GetMotionBlurKernel.
    """
    count = 2 * radius + 1
    weights = [math.exp(-i * i / (2 * sigma * sigma)) for i in range(count)]
    total = sum(weights)
    height, width = x.shape[-2:]
    padded = F.pad(x, (count,) * 4, mode="replicate")
    out = torch.zeros_like(x)
    for picture, wide, angle in zip(out, padded, angles.tolist(), strict=True):
        down, across = math.sin(math.radians(angle)), math.cos(math.radians(angle))
        for i, weight in enumerate(weights):
            top, left = count + math.ceil(i * down - 0.5), count + math.ceil(i * across - 0.5)
            picture.add_(wide[:, top : top + height, left : left + width], alpha=weight / total)
    return out


def clipped_zoom(x: Tensor, factor: float) -> Tensor:
    """Enlarges the middle of a picture to the picture's own size (bilinear, corners aligned).

    Args:
        x: (n, c, h, w).
        factor: at least 1.
    """
    height, width = x.shape[-2:]
    inner = [math.ceil(n / factor) for n in (height, width)]
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    x = x[..., top : top + inner[0], left : left + inner[1]]
    x = F.interpolate(x, [round(n * factor) for n in inner], mode="bilinear", align_corners=True)
    # The crop was rounded up, so the enlarged picture may be slightly too large.
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]


def box_matrix(given: int, wanted: int) -> Tensor:
    """Returns Pillow's BOX filter of a line as a matrix (wanted, given): the mean of the whole pixels of each box.

    Args:
        given: pixels of the line.
        wanted: pixels of the result.
    """
    scale = given / wanted
    support = 0.5 * max(scale, 1.0)
    found = torch.zeros(wanted, given, dtype=torch.float64)
    for i in range(wanted):
        centre = (i + 0.5) * scale
        low, high = max(0, int(centre - support + 0.5)), min(given, int(centre + support + 0.5))
        for j in range(low, high):
            at = (j - centre + 0.5) / max(scale, 1.0)
            # Half-open, as in Pillow: a pixel on the border of two boxes counts in one of them.
            found[i, j] = float(-0.5 < at <= 0.5)
    return found / found.sum(1, keepdim=True)


def box_resize(levels: Tensor, size: Sequence[int]) -> Tensor:
    """Resizes whole levels (n, c, h, w) by Pillow's BOX filter: horizontally, then vertically, rounding after each.

    Args:
        levels: (n, c, h, w), whole numbers from 0 to 255.
        size: height and width of the result.
    """
    down, across = box_matrix(levels.shape[-2], size[0]).to(levels), box_matrix(levels.shape[-1], size[1]).to(levels)
    return (down @ (levels @ across.T + 0.5).floor() + 0.5).floor()


def sample(x: Tensor, rows: Tensor, columns: Tensor, fold: Fold) -> Tensor:
    """Samples pictures (n, c, h, w) bilinearly at positions (n, h', w') in pixels.

    Args:
        x: (n, c, h, w).
        rows: (n, h', w'), from the centre of the first pixel.
        columns: the same.
        fold: maps indices beyond the edges to pixels.
    """
    height, width = x.shape[-2:]
    top, left = rows.floor(), columns.floor()
    down, across = (rows - top)[:, None], (columns - left)[:, None]
    flat = x.flatten(2)

    def at(dy: int, dx: int) -> Tensor:
        place = fold(top.long() + dy, height) * width + fold(left.long() + dx, width)
        index = place.flatten(1)[:, None].expand(-1, x.shape[1], -1)
        return flat.gather(2, index).view(*x.shape[:2], *rows.shape[1:])

    upper = at(0, 0) * (1 - across) + at(0, 1) * across
    lower = at(1, 0) * (1 - across) + at(1, 1) * across
    return upper * (1 - down) + lower * down
