"""RandAugment and colour jitter of whole batches, on the device they are on, in plain torch.

    x = rand_augment(x, magnitude=9, std=0.5)       # "rand-m9-mstd0.5-inc1" in ImageNet recipes
    x = color_jitter(x, 0.4, 0.4, 0.4)

Everything is drawn first and then applied by `operate`, so a picture's result depends on its own draws alone. Pictures
are sorted by their draws, so that each round costs at most one table look-up (all maps from grey level to grey level),
one `grid_sample` (all moves of pixels) and two blends, however many pictures there are.

The operations are those of the Python Imaging Library (PIL) on 8-bit pictures, rounding included.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

POINTWISE = ("auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add", "brightness", "contrast")
GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
OPERATIONS = (*POINTWISE, *GEOMETRIC, "color", "sharpness")


def _grey(x: Tensor) -> Tensor:
    """Luma of RGB (ITU-R 601, in PIL's 16-bit fixed point), else the mean of the channels: int32 (n, 1, h, w)."""
    if x.shape[1] == 3:
        r, g, b = x.int().unbind(1)
        return (r.mul_(19595).add_(g.mul_(38470)).add_(b.mul_(7471)).add_(32768) >> 16)[:, None]
    return x.float().mean(1, keepdim=True).round().int()


def _blend(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """base + factor (x - base), clipped to [0, 255], fractions dropped."""
    return (x - base).mul_(factor).add_(base).clamp_(0, 255).to(torch.uint8)


# Each of the following returns a table from old to new grey levels, (k, 1 or c, 256), for pictures x: (k, c, h, w) and
# strengths s: (k, 1, 1).


def _levels(x: Tensor) -> Tensor:
    return torch.arange(256, device=x.device)


def _auto_contrast(x: Tensor, s: Tensor) -> Tensor:
    low, high = (level[..., None].double() for level in torch.aminmax(x.flatten(2), dim=2))
    # In double precision and rounded as PIL does; 255 / tensor would multiply by the reciprocal, which rounds twice.
    scale = torch.full_like(low, 255).div_(high - low)
    return torch.where(high > low, _levels(x) * scale + -low * scale, _levels(x))


def _equalize(x: Tensor, s: Tensor) -> Tensor:
    k, c = x.shape[:2]
    rows = torch.arange(0, k * c * 256, 256, device=x.device).view(k, c, 1)
    histogram = torch.bincount((x.flatten(2) + rows).flatten(), minlength=k * c * 256).view(k, c, 256)
    upto = histogram.cumsum(2)
    below = upto - histogram
    # Pixels below the brightest level that occurs, per output level; the table starts half a step in.
    step = below.gather(2, x.flatten(2).amax(2, keepdim=True).long()) // 255
    return torch.where(step > 0, (below + step // 2) // step.clamp(min=1), _levels(x))


def _invert(x: Tensor, s: Tensor) -> Tensor:
    return (255 - _levels(x)).expand(len(x), 1, 256)


def _posterize(x: Tensor, s: Tensor) -> Tensor:
    dropped = 8 - s.int()
    return _levels(x) >> dropped << dropped


def _solarize(x: Tensor, s: Tensor) -> Tensor:
    return torch.where(_levels(x) < s, _levels(x), 255 - _levels(x))


def _solarize_add(x: Tensor, s: Tensor) -> Tensor:
    return torch.where(_levels(x) < 128, _levels(x) + s, _levels(x))


def _brightness(x: Tensor, s: Tensor) -> Tensor:
    return _levels(x) * s


def _contrast(x: Tensor, s: Tensor) -> Tensor:
    grey = _grey(x).flatten(1)
    mean = (2 * grey.sum(1) + grey.shape[1]) // (2 * grey.shape[1])  # rounded, halves up
    return _blend(mean[:, None, None], _levels(x).float(), s)


_TABLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": _invert,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "brightness": _brightness,
    "contrast": _contrast,
}


def _pointwise(x: Tensor, counts: list[int], s: Tensor) -> Tensor:
    """x: (m, c, h, w), first counts[0] pictures for POINTWISE[0], and so on; s: (m,)."""
    parts = zip(POINTWISE, x.split(counts), s[:, None, None].split(counts), strict=True)
    tables = [
        _TABLES[name](part, strength).clamp(0, 255).to(torch.uint8).expand(len(part), x.shape[1], 256)
        for name, part, strength in parts
        if len(part)
    ]
    return torch.cat(tables).gather(2, x.flatten(2).long()).view_as(x)


def _geometric(x: Tensor, kinds: Tensor, s: Tensor, fill: Tensor) -> Tensor:
    """Pixel (u, v) of the result is x at (a u + b v + c, d u + e v + f), bilinear; `fill` where that lies outside."""
    h, w = x.shape[2:]
    angle, shear_x, shear_y, shift_x, shift_y = (
        torch.where(kinds == OPERATIONS.index(name), s, 0)[:, None, None] for name in GEOMETRIC
    )
    cos, sin = (angle * math.pi / 180).cos(), (angle * math.pi / 180).sin()
    # Pixel centres; rotation is about the picture's centre, shear from its first row or column.
    u, v = (torch.arange(size, device=x.device) + 0.5 for size in (w, h))
    dx, dy = u[None, None, :] - w / 2, v[None, :, None] - h / 2
    across = cos * dx + (-sin * dy + shear_x * v[None, :, None] + shift_x * w)  # from the centre
    down = cos * dy + (sin * dx + shear_y * u[None, None, :] + shift_y * h)
    grid = torch.stack([across * (2 / w), down * (2 / h)], -1)  # in [-1, 1)
    moved = F.grid_sample(x.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    inside = ((grid >= -1) & (grid < 1)).all(-1)[:, None]
    # PIL drops fractions. Up to 1/32 below a level is rounding of the grid: an unmoved picture must stay equal.
    return torch.where(inside, moved.add_(1 / 32).to(torch.uint8), fill)


def _color(x: Tensor, s: Tensor) -> Tensor:
    return x if x.shape[1] != 3 else _blend(_grey(x), x.float(), s)


def _sharpness(x: Tensor, s: Tensor) -> Tensor:
    """Blends away from the mean of 3x3 pixels, whose centre has the weight 5/13; the border stays."""
    if min(x.shape[2:]) < 3:
        return x
    # The sum of nine pixels overflows 8 bits.
    wide = x.short()
    rows = wide[..., :-2, :] + wide[..., 1:-1, :] + wide[..., 2:, :]
    inner = wide[..., 1:-1, 1:-1]
    smooth = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner).float().div_(13).round_()
    out = x.clone()
    out[..., 1:-1, 1:-1] = _blend(smooth, inner.float(), s)
    return out


def operate(x: Tensor, kinds: Tensor, strengths: Tensor, fill: float | Sequence[float] = 0.5) -> Tensor:
    """Apply the given operations to each picture, one after the other: uint8 (n, c, h, w) -> uint8 (n, c, h, w).

    Args:
        x: Pictures, which are not modified.
        kinds: Indices into `OPERATIONS`, int64 (rounds, n); len(OPERATIONS) leaves a picture alone.
        strengths: Floats (rounds, n): degrees counter-clockwise of a rotation, columns per row or rows per column of a
            shear, share of the width or height of a translation, bits kept by a posterisation, smallest level that a
            solarisation inverts, levels that solarise-add adds, and factor of brightness, contrast, color and
            sharpness. The other three have none.
        fill: Grey level of vacated pixels, one or one per channel, in [0, 1].

    >>> import torch
    >>> x = torch.tensor([0, 100, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    >>> kinds = torch.tensor([[OPERATIONS.index("invert")], [OPERATIONS.index("solarize")]])
    >>> operate(x, kinds, torch.tensor([[0.0], [200.0]])).flatten().tolist()
    [0, 155, 0]
    """
    levels = [fill] if isinstance(fill, (int, float)) else fill
    outside = torch.tensor([round(255 * level) for level in levels], dtype=torch.uint8, device=x.device).view(
        1, -1, 1, 1
    )
    # Pictures that drew the same operation are adjacent, so that each operation runs once per round.
    order = kinds.argsort(1)
    # The number of pictures per kind and round: the only figures that the host must wait for.
    counts = (kinds[..., None] == torch.arange(len(OPERATIONS), device=x.device)).sum(1).tolist()
    first, last = len(POINTWISE), len(POINTWISE) + len(GEOMETRIC)
    x = x.clone()
    for kind, strength, indices, count in zip(kinds, strengths, order, counts, strict=True):
        sizes = [sum(count[:first]), sum(count[first:last]), *count[last:]]
        pointwise, geometric, color, sharpness = indices[: sum(sizes)].split(sizes)
        if sizes[0]:
            x[pointwise] = _pointwise(x[pointwise], count[:first], strength[pointwise])
        if sizes[1]:
            x[geometric] = _geometric(x[geometric], kind[geometric], strength[geometric], outside)
        if sizes[2]:
            x[color] = _color(x[color], strength[color].view(-1, 1, 1, 1))
        if sizes[3]:
            x[sharpness] = _sharpness(x[sharpness], strength[sharpness].view(-1, 1, 1, 1))
    return x


def strengths_of(magnitude: Tensor, sign: Tensor, increasing: bool = True) -> Tensor:
    """Strength of each of `OPERATIONS` at magnitudes in [0, 10] and signs -1 or 1, both (...): floats (..., 15).

    Args:
        magnitude: from 0 to 10.
        sign: -1 or 1.
        increasing: whether every operation grows stronger with the magnitude.
    """
    bits = (magnitude * 4 / 10).floor()
    threshold = (magnitude * 256 / 10).floor()
    if increasing:
        factor = 1 + sign * magnitude * 0.9 / 10
        bits, threshold = 4 - bits, 256 - threshold
    else:
        factor = 0.1 + magnitude * 1.8 / 10
    shear, shift = sign * magnitude * 0.3 / 10, sign * magnitude * 0.45 / 10
    strengths = {
        "rotate": sign * magnitude * 30 / 10,
        "shear_x": shear,
        "shear_y": shear,
        "translate_x": shift,
        "translate_y": shift,
        "posterize": bits.clamp(min=1),
        "solarize": threshold,
        "solarize_add": (magnitude * 110 / 10).floor(),
        **dict.fromkeys(("brightness", "contrast", "color", "sharpness"), factor),
    }
    return torch.stack([strengths.get(name, magnitude) for name in OPERATIONS], -1)


def rand_augment(
    x: Tensor,
    magnitude: float = 9.0,
    std: float = 0.0,
    operations: int = 2,
    p: float = 0.5,
    increasing: bool = True,
    *,
    fill: float | Sequence[float] = 0.5,
    generator: Generator | None = None,
) -> Tensor:
    """Apply `operations` operations, drawn from `OPERATIONS` with replacement, to each picture: same shape and type.

    With m the magnitude / 10, and a random sign for +-:

    | operation | strength |
    |---|---|
    | auto_contrast, equalize, invert | has none |
    | rotate, about the centre | +- 30 m degrees |
    | shear_x, shear_y, from the first row or column | +- 0.3 m |
    | translate_x, translate_y | +- 0.45 m of the width or height |
    | posterize | 4 - floor(4 m) bits stay, at least 1 |
    | solarize | levels from 256 - floor(256 m) on are inverted |
    | solarize_add | levels below 128 get floor(110 m) added |
    | brightness, contrast, color, sharpness | factor 1 +- 0.9 m |

    Without `increasing`: floor(4 m) bits, at least 1; levels from floor(256 m) on; factor 0.1 + 1.8 m.

    On uint8 the results equal those of PIL's `ImageOps` and `ImageEnhance`; rotation, shear and translation equal those
    of its bilinear `transform` to one grey level, except for points that fall exactly on the picture's edge. Public
    recipes on PIL differ in two ways: they resample bicubically or draw the kernel, and at m = 1 they keep 0 bits,
    which gives a black picture.

    Args:
        x: uint8, or floats in [0, 1], which are rounded to 256 levels where an operation touches the picture.
        magnitude: From 0 to 10.
        std: Standard deviation of a normal jitter of the magnitude, drawn per picture and operation; the jittered
            magnitude is clipped to [0, 10].
        operations: Number of operations, applied one after the other.
        p: Probability with which a drawn operation is applied; the paper has 1 and the identity among its operations.
        increasing: Whether posterize, solarize and the four enhancements grow stronger with the magnitude.
        fill: Grey level of vacated pixels, one or one per channel, in [0, 1].
        generator: Source of the draws; None is torch's own on the device of x.

    Raises:
        ValueError: A figure is out of its range.

    Source: Cubuk et al. 2020, "RandAugment", arXiv 1909.13719, section 3; ranges, p and the increasing set as in
    Wightman's pytorch-image-models ("rand-m9-mstd0.5-inc1").

    >>> import torch
    >>> rand_augment(torch.rand(2, 3, 8, 8), magnitude=9, std=0.5).shape
    torch.Size([2, 3, 8, 8])
    """
    if not 0 <= magnitude <= 10 or std < 0:
        raise ValueError(f"rand_augment: magnitude={magnitude} wants a figure from 0 to 10, std={std} 0 or more")
    if not 0 <= p <= 1 or operations < 0:
        raise ValueError(f"rand_augment: p={p} wants a figure from 0 to 1, operations={operations} 0 or more")
    shape, device = (operations, len(x)), x.device
    kinds = torch.randint(len(OPERATIONS), shape, device=device, generator=generator)
    skipped = torch.rand(shape, device=device, generator=generator) >= p
    sign = torch.where(torch.rand(shape, device=device, generator=generator) < 0.5, -1.0, 1.0)
    magnitudes = torch.full(shape, float(magnitude), device=device)
    if std:
        magnitudes = (magnitudes + std * torch.randn(shape, device=device, generator=generator)).clamp_(0, 10)
    strengths = strengths_of(magnitudes, sign, increasing).gather(-1, kinds[..., None])[..., 0]
    kinds = kinds.masked_fill(skipped, len(OPERATIONS))
    if not x.is_floating_point():
        return operate(x, kinds, strengths, fill)
    out = operate((x * 255).round_().clamp_(0, 255).to(torch.uint8), kinds, strengths, fill)
    # A picture to which nothing was applied keeps its levels, also those between the 256.
    return torch.where(skipped.all(0).view(-1, 1, 1, 1), x, out.to(x.dtype) / 255)


def color_jitter(
    x: Tensor,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    *,
    generator: Generator | None = None,
) -> Tensor:
    """Change brightness, then contrast, then saturation of each picture, by factors from [1 - s, 1 + s]: same shape.

    Factors are drawn uniformly; negative ones count as 0. The three scale the picture's difference from black, from the
    mean of its grey picture, and from that grey picture, and clip to the range. The order is fixed; other libraries
    often draw it. Saturation does not change pictures that are not RGB.

    Args:
        x: uint8 (rounded once, at the end) or floats in [0, 1].
        brightness: s of the brightness; 0 is off.
        contrast: s of the contrast.
        saturation: s of the saturation.
        generator: Source of the draws; None is torch's own on the device of x.

    Raises:
        ValueError: One of the three is negative.
    """
    spans = (brightness, contrast, saturation)
    if min(spans) < 0:
        raise ValueError(f"color_jitter: brightness, contrast, saturation = {spans} want 0 (off) or more")
    if not any(spans):
        return x
    full = 1.0 if x.is_floating_point() else 255.0
    # All three are drawn, whichever are on, so that turning one off does not change the others' draws.
    draws = 2 * torch.rand((3, len(x), 1, 1, 1), device=x.device, generator=generator) - 1
    out = x if x.is_floating_point() else x.float()
    for name, span, draw in zip(("brightness", "contrast", "saturation"), spans, draws, strict=True):
        if span == 0 or (name == "saturation" and x.shape[1] != 3):
            continue
        factor = (1 + span * draw).clamp_(min=0).to(out.dtype)
        if name == "brightness":
            out = (out * factor).clamp_(0, full)
            continue
        if x.shape[1] == 3:
            red, green, blue = out.split(1, 1)
            base = (0.299 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)
        else:
            base = out.mean(1, keepdim=True)
        if name == "contrast":
            base = base.mean((2, 3), keepdim=True)
        out = torch.lerp(base, out, factor).clamp_(0, full)
    return out if x.is_floating_point() else out.round_().to(x.dtype)
