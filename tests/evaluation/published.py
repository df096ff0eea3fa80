"""The fifteen corruptions once more, picture by picture in NumPy, SciPy and Pillow, by the text of the published code.

``c`` are constants as that code lists them; ``d`` draws for one picture, in the order in which that code draws.
"""

import colorsys
import io
import math

import numpy as np
from PIL import Image
from scipy import ndimage

LISTS = {
    "gaussian_noise": ([0.04, 0.06, 0.08, 0.09, 0.10], [0.08, 0.12, 0.18, 0.26, 0.38]),
    "shot_noise": ([500, 250, 100, 75, 50], [60, 25, 12, 5, 3]),
    "impulse_noise": ([0.01, 0.02, 0.03, 0.05, 0.07], [0.03, 0.06, 0.09, 0.17, 0.27]),
    "defocus_blur": (
        [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
        [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
    ),
    "glass_blur": (
        [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)],
        [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)],
    ),
    "motion_blur": ([(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)], [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)]),
    "zoom_blur": (
        [np.arange(1, stop, 0.01) for stop in (1.06, 1.11, 1.16, 1.21, 1.26)],
        [np.arange(1, *pair) for pair in ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))],
    ),
    "snow": (
        [
            *((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9)),
            *((0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)),
        ],
        [
            *((0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7)),
            *((0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55)),
        ],
    ),
    "frost": (
        [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)],
        [(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)],
    ),
    "fog": (
        [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
        [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],
    ),
    "brightness": ([0.05, 0.1, 0.15, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4, 0.5]),
    "contrast": ([0.75, 0.5, 0.4, 0.3, 0.15], [0.4, 0.3, 0.2, 0.1, 0.05]),
    "elastic_transform": (
        [
            *((32 * 0, 32 * 0, 32 * 0.08), (32 * 0.05, 32 * 0.2, 32 * 0.07), (32 * 0.08, 32 * 0.06, 32 * 0.06)),
            *((32 * 0.1, 32 * 0.04, 32 * 0.05), (32 * 0.1, 32 * 0.03, 32 * 0.03)),
        ],
        [
            *((244 * 2, 244 * 0.7, 244 * 0.1), (244 * 2, 244 * 0.08, 244 * 0.2), (244 * 0.05, 244 * 0.01, 244 * 0.02)),
            *((244 * 0.07, 244 * 0.01, 244 * 0.02), (244 * 0.12, 244 * 0.01, 244 * 0.02)),
        ],
    ),
    "pixelate": ([0.95, 0.9, 0.85, 0.75, 0.65], [0.6, 0.5, 0.4, 0.3, 0.25]),
    "jpeg_compression": ([80, 65, 58, 50, 40], [25, 18, 15, 10, 7]),
}


class One:
    """Draws for one picture as NumPy arrays, in the order of the calls."""

    def __init__(self, draws):
        self.draws = draws

    def __getattr__(self, name):
        return lambda *args: getattr(self.draws, name)(*args)[0].numpy()


def gaussian_noise(x, c, d):
    return x + d.normal(0, c, (3, *x.shape[:2])).transpose(1, 2, 0)


def shot_noise(x, c, d):
    import torch

    return d.poisson(torch.from_numpy(x.transpose(2, 0, 1) * c)[None]).transpose(1, 2, 0) / c


def impulse_noise(x, c, d):
    hit, salt = (d.uniform(0, 1, (3, *x.shape[:2])).transpose(1, 2, 0) for _ in range(2))
    out = x.copy()
    out[(hit <= c) & (salt <= 0.5)] = 1
    out[(hit <= c) & (salt > 0.5)] = 0
    return out


def defocus_blur(x, c, d):
    radius, alias = c
    line = range(-8, 9) if radius <= 8 else range(-radius, radius + 1)
    kernel = np.array([[float(i * i + j * j <= radius * radius) for j in line] for i in line])
    kernel /= kernel.sum()
    k = 3 if radius <= 8 else 5
    tap = np.array([math.exp(-((i - (k - 1) / 2) ** 2) / (2 * alias**2)) for i in range(k)])
    tap /= tap.sum()
    kernel = ndimage.correlate1d(ndimage.correlate1d(kernel, tap, 0, mode="mirror"), tap, 1, mode="mirror")
    return np.stack([ndimage.correlate(x[..., i], kernel, mode="mirror") for i in range(3)], -1)


def blurred(x, sigma):
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest", truncate=4.0)


def glass_blur(x, c, d):
    height, width = x.shape[:2]
    x = np.uint8(blurred(x, c[0]) * 255)
    for _ in range(c[2]):
        rows, columns = range(height - c[1], c[1], -1), range(width - c[1], c[1], -1)
        moves = d.integers(-c[1], c[1], (len(rows), len(columns), 2))
        for a, h in enumerate(rows):
            for b, w in enumerate(columns):
                dx, dy = moves[a, b]
                # As it stands there: an exchange of two views, of which the second takes what the first now holds.
                x[h, w], x[h + dy, w + dx] = x[h + dy, w + dx], x[h, w]
    return blurred(x / 255.0, c[0])


def moved(x, radius, sigma, angle):
    """ImageMagick's motion blur of whole levels (h, w, c), read pixel by pixel."""
    width = 2 * radius + 1
    weights = np.array([math.exp(-(i**2) / (2 * sigma**2)) for i in range(width)])
    weights /= weights.sum()
    px, py = width * math.sin(math.radians(angle)), width * math.cos(math.radians(angle))
    out = np.zeros(x.shape)
    for i in range(width):
        ox, oy = math.ceil(i * py / math.hypot(px, py) - 0.5), math.ceil(i * px / math.hypot(px, py) - 0.5)
        rows = np.clip(np.arange(x.shape[0]) + oy, 0, x.shape[0] - 1)
        columns = np.clip(np.arange(x.shape[1]) + ox, 0, x.shape[1] - 1)
        out += weights[i] * x[rows][:, columns]
    return np.round(out)


def motion_blur(x, c, d):
    return (moved(np.round(x * 255), *c, float(d.uniform(-45, 45))) + 1e-6) / 255


def zoomed(x, factor):
    out = x
    for axis in range(2):
        size = x.shape[axis]
        inner = math.ceil(size / factor)
        top = (size - inner) // 2
        out = np.take(out, range(top, top + inner), axis)
    out = ndimage.zoom(out, (factor, factor, 1), order=1)
    for axis in range(2):
        top = (out.shape[axis] - x.shape[axis]) // 2
        out = np.take(out, range(top, top + x.shape[axis]), axis)
    return out


def zoom_blur(x, c, d):
    return (x + sum(zoomed(x, factor) for factor in c)) / (len(c) + 1)


def snow(x, c, d):
    layer = zoomed(d.normal(c[0], c[1], (1, *x.shape[:2])).transpose(1, 2, 0), c[2])
    layer[layer < c[3]] = 0
    layer = (np.clip(layer, 0, 1) * 255).astype(np.uint8).astype(float)
    layer = moved(layer, c[4], c[5], float(d.uniform(-135, -45))) / 255
    grey = (x @ np.array([0.299, 0.587, 0.114]))[..., None]
    x = c[6] * x + (1 - c[6]) * np.maximum(x, grey * 1.5 + 0.5)
    return x + layer + np.rot90(layer, k=2)


def fractal(d, size, decay):
    """Diamonds and squares, point by point."""
    z, step, wibble = np.zeros((size, size)), size, 100.0
    while step >= 2:
        half, count = step // 2, size // step
        noise = [d.uniform(-wibble, wibble, (count, count)) for _ in range(3)]
        grid = [(a, b) for a in range(count) for b in range(count)]
        for a, b in grid:
            i, j = a * step, b * step
            corners = (
                z[i, j] + z[(i + step) % size, j] + z[i, (j + step) % size] + z[(i + step) % size, (j + step) % size]
            )
            z[i + half, j + half] = corners / 4 + wibble * noise[0][a, b]
        for a, b in grid:
            i, j = a * step, b * step + half
            four = z[i + half, j] + z[i - half, j] + z[i, j - half] + z[i, (j + half) % size]
            z[i, j] = four / 4 + wibble * noise[1][a, b]
        for a, b in grid:
            i, j = a * step + half, b * step
            four = z[i, j + half] + z[i, j - half] + z[i - half, j] + z[(i + half) % size, j]
            z[i, j] = four / 4 + wibble * noise[2][a, b]
        step, wibble = half, wibble / decay
    z -= z.min()
    return z / z.max()


def fog(x, c, d):
    height, width = x.shape[:2]
    size = 2 ** math.ceil(math.log2(max(height, width)))
    cloud = fractal(d, size, c[1])[:height, :width, None]
    return (x + c[0] * cloud) * x.max() / (x.max() + c[0])


def brightness(x, c, d):
    out = np.empty_like(x)
    for i, j in np.ndindex(x.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*x[i, j])
        out[i, j] = colorsys.hsv_to_rgb(h, s, min(1, v + c))
    return out


def contrast(x, c, d):
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * c + mean


def elastic_transform(x, c, d):
    height, width = x.shape[:2]
    middle, arm = np.array([height // 2, width // 2]), min(height, width) // 3
    one = np.array([middle + arm, [middle[0] + arm, middle[1] - arm], middle - arm], dtype=float)
    other = one + d.uniform(-c[2], c[2], (3, 2))
    forth = np.vstack([np.linalg.solve(np.c_[one, np.ones(3)], other).T, [0, 0, 1]])
    back = np.linalg.inv(forth)
    rows, columns = np.mgrid[:height, :width]
    old = np.einsum("ij,jhw->ihw", back, np.stack([columns, rows, np.ones_like(rows)]))
    x = np.stack([ndimage.map_coordinates(x[..., i], old[[1, 0]], order=1, mode="mirror") for i in range(3)], -1)
    across, down = (
        ndimage.gaussian_filter(d.uniform(-1, 1, (height, width)), c[1], mode="reflect", truncate=3) * c[0]
        for _ in range(2)
    )
    new = np.stack([rows + down, columns + across])
    return np.stack([ndimage.map_coordinates(x[..., i], new, order=1, mode="reflect") for i in range(3)], -1)


def _image(x):
    return Image.fromarray(np.round(x * 255).astype(np.uint8))


def pixelate(x, c, d):
    small = _image(x).resize((int(x.shape[1] * c), int(x.shape[0] * c)), Image.Resampling.BOX)
    return (np.asarray(small.resize((x.shape[1], x.shape[0]), Image.Resampling.BOX)) + 1e-6) / 255


def jpeg_compression(x, c, d):
    buffer = io.BytesIO()
    _image(x).save(buffer, "JPEG", quality=c)
    return (np.asarray(Image.open(buffer)) + 1e-6) / 255


def frost_photograph(x, c, d, photographs, shrink):
    """With photographs: a cut of one of the first five, scaled by OpenCV's bilinear resize in steps of 1 / shrink."""
    picture = photographs[int(d.integers(0, 5))]
    high, wide = (round(n * shrink) for n in picture.shape[:2])
    at = [(np.arange(m) + 0.5) / shrink - 0.5 for m in (high, wide)]
    grid = np.stack(np.meshgrid(*at, indexing="ij"))
    scaled = [ndimage.map_coordinates(picture[..., i].astype(float), grid, order=1, mode="nearest") for i in range(3)]
    top, left = int(d.integers(0, high - x.shape[0])), int(d.integers(0, wide - x.shape[1]))
    cut = np.round(np.stack(scaled, -1))[top : top + x.shape[0], left : left + x.shape[1]]
    return c[0] * x + c[1] * cut / 255
