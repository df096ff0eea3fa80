"""Augmentation of whole batches on the device they are on, in plain torch.

Each function takes a batch `x: (n, c, h, w)` and draws once per picture (mixup and CutMix: once per batch), from
`generator` or from torch's global one. Geometric operations take uint8 and floats; those that blend colours, floats.

    x = random_flip(random_crop(x, padding=4))
    x = normalize(x, mean, std)
    x, y = cutmix(x, y, alpha=1.0, num_classes=10)      # y becomes (n, 10), each row sums to 1

`rand_augment` and `color_jitter`, in `odenets.training.rand_augment`, come between crop and normalisation. `Augment`
chains all of them in this order; it is what the data modules take.
"""

import math
import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .errors import DataError
from .rand_augment import color_jitter, rand_augment


def _rand(x: Tensor, *shape: int, generator: Generator | None) -> Tensor:
    return torch.rand(shape, device=x.device, generator=generator)


def _randint(x: Tensor, high: int, generator: Generator | None) -> Tensor:
    return torch.randint(high, (len(x),), device=x.device, generator=generator)


def _beta(alpha: float, generator: Generator | None) -> float:
    # torch's Beta takes no generator; one draw of the given generator seeds Python's.
    device = generator.device if generator is not None else "cpu"
    seed = int(torch.randint(2**62, (), device=device, generator=generator))
    return random.Random(seed).betavariate(alpha, alpha)


def random_crop(x: Tensor, padding: int, *, generator: Generator | None = None) -> Tensor:
    """Shift each picture by up to `padding` pixels, filling with zeros: (n, c, h, w) -> (n, c, h, w).

    Args:
        x: (n, c, h, w).
        padding: the largest shift, in pixels.
        generator: source of the draws; None is torch's own.

    >>> import torch
    >>> random_crop(torch.ones(2, 3, 8, 8), 0).sum().item()
    384.0
    """
    if padding == 0:
        return x
    n, _, h, w = x.shape
    padded = F.pad(x, (padding,) * 4)
    top, left = (_randint(x, 2 * padding + 1, generator) for _ in range(2))
    # All windows as a view (n, c, 2p+1, 2p+1, h, w); the index copies one window per picture.
    windows = padded.unfold(2, h, 1).unfold(3, w, 1)
    return windows[torch.arange(n, device=x.device), :, top, left]


def random_flip(x: Tensor, p: float = 0.5, *, generator: Generator | None = None) -> Tensor:
    """Mirror each picture left to right with probability p: (n, c, h, w) -> (n, c, h, w).

    Args:
        x: (n, c, h, w).
        p: the probability.
        generator: source of the draws; None is torch's own.
    """
    if p == 0:
        return x
    mirror = _rand(x, len(x), 1, 1, 1, generator=generator) < p
    return torch.where(mirror, x.flip(3), x)


def random_resized_crop(
    x: Tensor,
    size: int,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    *,
    generator: Generator | None = None,
) -> Tensor:
    """Crop a random box from each picture and resample it bilinearly: (n, c, h, w) -> (n, c, size, size).

    The box has a share of the area drawn from `scale` and an aspect (width / height) drawn log-uniformly from `ratio`.
    Up to ten boxes are tried until one fits; if none does, the box is the largest centred one with an aspect in
    `ratio`. uint8 pictures stay uint8. Shrinking by more than two causes aliasing: `Images` crops pictures when they
    are decoded instead.

    Args:
        x: (n, c, h, w).
        size: side of the result.
        scale: least and largest share of the area.
        ratio: least and largest aspect.
        generator: source of the draws; None is torch's own.

    Source: Szegedy et al. 2015, "Going deeper with convolutions", section 6; sampled as in torchvision and timm.
    """
    n, _, h, w = x.shape
    low, high = torch.tensor(ratio).log().tolist()
    area = scale[0] + (scale[1] - scale[0]) * _rand(x, 10, n, generator=generator)
    # Ten tries for all pictures at once: a loop over pictures would wait for the device at each.
    aspect = (low + (high - low) * _rand(x, 10, n, generator=generator)).exp() * (h / w)
    width, height = (area * aspect).sqrt(), (area / aspect).sqrt()  # in units of the picture's own width and height
    fits = (width <= 1) & (height <= 1)
    tried = fits.int().argmax(0), torch.arange(n, device=x.device)  # the first that fits
    some = fits.any(0)
    width = torch.where(some, width[tried], min(1.0, ratio[1] * h / w))
    height = torch.where(some, height[tried], min(1.0, w / h / ratio[0]))
    # The centre of the box and not its corner, in affine_grid's coordinates from -1 to 1.
    left, top = (torch.where(some, 2 * _rand(x, n, generator=generator) - 1, 0.0) * (1 - s) for s in (width, height))
    zero = torch.zeros_like(width)
    theta = torch.stack([torch.stack([width, zero, left], 1), torch.stack([zero, height, top], 1)], 1)
    pictures = x if x.is_floating_point() else x.float()
    grid = F.affine_grid(theta.to(pictures.dtype), [n, 1, size, size], align_corners=False)
    out = F.grid_sample(pictures, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return out if x.is_floating_point() else out.round().clamp(0, 255).to(x.dtype)


def normalize(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x / 255 - mean) / std for uint8, (x - mean) / std for floats in [0, 1]; one figure per channel.

    Args:
        x: (n, c, h, w), uint8 or floats in [0, 1].
        mean: one figure per channel.
        std: one figure per channel.

    >>> import torch
    >>> normalize(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), [0.5], [0.25]).item()
    2.0
    """
    full = 1.0 if x.is_floating_point() else 255.0
    shape = (1, -1, 1, 1)
    dtype = torch.get_default_dtype() if full != 1.0 else x.dtype
    # At least in 32 bits, and in 64 where the pictures are.
    exact = torch.promote_types(dtype, torch.get_default_dtype())
    m, s = (torch.tensor(figures, dtype=exact, device=x.device).view(shape) for figures in (mean, std))
    # Decoders return pictures with the channels as the fastest axis; the result has the standard layout.
    return x.to(dtype, memory_format=torch.contiguous_format, copy=True).mul_(1 / (full * s)).sub_(m / s)


def _boxes(x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Masks (n, 1, h, w) that are true inside [top, top + height) x [left, left + width)."""
    rows = torch.arange(x.shape[2], device=x.device)
    cols = torch.arange(x.shape[3], device=x.device)
    inside_rows = (rows >= top[:, None]) & (rows < (top + height)[:, None])
    inside_cols = (cols >= left[:, None]) & (cols < (left + width)[:, None])
    return (inside_rows[:, :, None] & inside_cols[:, None, :])[:, None]


def random_erasing(
    x: Tensor,
    p: float = 0.25,
    scale: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
    *,
    generator: Generator | None = None,
) -> Tensor:
    """Fill a random box of each picture with normal noise, with probability p. For normalised floats.

    Up to ten boxes are tried until one fits; if none does, the picture stays as it is.

    Args:
        x: (n, c, h, w).
        p: Probability for each picture.
        scale: Range of the box's share of the picture.
        ratio: Range of its aspect, height / width, which is drawn log-uniformly.
        generator: Source of the draws; None is torch's own on the device of x.

    Source: Zhong et al. 2020, "Random erasing data augmentation", algorithm 1.
    """
    if p == 0:
        return x
    n, _, h, w = x.shape
    area = (scale[0] + (scale[1] - scale[0]) * _rand(x, 10, n, generator=generator)) * h * w
    low, high = torch.tensor(ratio).log().tolist()
    aspect = (low + (high - low) * _rand(x, 10, n, generator=generator)).exp()
    height, width = (area * aspect).sqrt().round().clamp(min=1), (area / aspect).sqrt().round().clamp(min=1)
    fits = (height < h) & (width < w)
    tried = fits.int().argmax(0), torch.arange(n, device=x.device)  # the first that fits
    height, width = height[tried], width[tried]
    top = (_rand(x, n, generator=generator) * (h - height + 1)).floor()
    left = (_rand(x, n, generator=generator) * (w - width + 1)).floor()
    chosen = (_rand(x, n, generator=generator) < p) & fits.any(0)
    # Drawn for all pictures: which ones are chosen is known only on the device, and the host does not wait for it.
    noise = torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=generator)
    return torch.where(chosen[:, None, None, None] & _boxes(x, top, left, height, width), noise, x)


def soft_labels(y: Tensor, num_classes: int) -> Tensor:
    """Converts class numbers (n,) to rows of weights (n, num_classes); rows of weights stay as they are.

    Args:
        y: (n,), or (n, num_classes).
        num_classes: columns of the result.
    """
    return F.one_hot(y, num_classes).float() if y.ndim == 1 else y


def mixup(
    x: Tensor, y: Tensor, alpha: float, num_classes: int, *, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Blend each picture and its label with another of the batch, by lam ~ Beta(alpha, alpha); alpha = 0 is off.

    Returns both, labels as rows of weights that sum to 1.

    Args:
        x: floats (n, c, h, w).
        y: (n,), or (n, num_classes).
        alpha: of the Beta distribution.
        num_classes: columns of the labels.
        generator: source of the draws; None is torch's own.

    Source: Zhang et al. 2018, "mixup: beyond empirical risk minimization", equation 1.
    """
    y = soft_labels(y, num_classes)
    if alpha == 0:
        return x, y
    # One lam for the batch, as published; a permutation of the batch gives the partners.
    lam = _beta(alpha, generator)
    other = torch.randperm(len(x), device=x.device, generator=generator)
    return torch.lerp(x[other], x, lam), torch.lerp(y[other], y, lam)


def cutmix(
    x: Tensor, y: Tensor, alpha: float, num_classes: int, *, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Paste a box of another picture of the batch into each, and weight the labels by the pasted area.

    The box covers a share 1 - lam, lam ~ Beta(alpha, alpha), clipped at the border; the labels use the clipped area.
    The position is drawn per picture, the size per batch; alpha = 0 pastes nothing.

    Returns both, labels as rows of weights that sum to 1.

    Args:
        x: floats (n, c, h, w).
        y: (n,), or (n, num_classes).
        alpha: of the Beta distribution.
        num_classes: columns of the labels.
        generator: source of the draws; None is torch's own.

    Source: Yun et al. 2019, "CutMix", equations 1 and 2.
    """
    y = soft_labels(y, num_classes)
    if alpha == 0:
        return x, y
    # The box has the picture's proportions, so each side is scaled by the square root of the share.
    side = (1 - _beta(alpha, generator)) ** 0.5
    n, _, h, w = x.shape
    height, width = round(h * side), round(w * side)
    top = _randint(x, h, generator) - height // 2
    left = _randint(x, w, generator) - width // 2
    mask = _boxes(x, top, left, torch.full_like(top, height), torch.full_like(left, width))
    other = torch.randperm(n, device=x.device, generator=generator)
    # The area actually pasted: a box that is clipped at the border is smaller than drawn.
    pasted = mask.float().mean((1, 2, 3))[:, None].to(y.dtype)
    return torch.where(mask, x[other], x), y * (1 - pasted) + y[other] * pasted


class Augment:
    """Augments a training batch: crop, flip, RandAugment, colour jitter, normalise, erase, mixup or CutMix.

    Everything is off by default except the normalisation, whose figures the data module passes in.

    Args:
        crop: Largest shift of a picture, in pixels.
        flip: Probability of a left-right mirror image.
        resized_crop: Smallest share of the area of a random resized crop of square pictures, e.g. 0.08; None or 0 for
            no such crop. `Images` adopts it as its `smallest_crop`, and crops pictures when it decodes them.
        rand_augment: Magnitude of RandAugment, up to 10; 0 is off. Two operations per picture, each applied with
            probability 1/2; vacated pixels get the mean's colour. Recipes with "rand-m9-mstd0.5-inc1" mean 9 here.
        rand_augment_std: Standard deviation of a jitter of the magnitude, 0.5 for "mstd0.5".
        color_jitter: Brightness, contrast and saturation are scaled by factors from [1 - s, 1 + s]; 0 is off.
        erase: Probability of random erasing.
        mixup: Alpha of mixup's Beta distribution; 0 is off.
        cutmix: Alpha of CutMix's; where both are on, each batch draws one of the two.
        seed: Seed of a separate generator; None uses torch's global generator, which `seed_everything` seeds.
    """

    def __init__(
        self,
        crop: int = 0,
        flip: float = 0.0,
        resized_crop: float | None = None,
        rand_augment: float = 0.0,
        rand_augment_std: float = 0.0,
        color_jitter: float = 0.0,
        erase: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        seed: int | None = None,
    ) -> None:
        for name, value in (("flip", flip), ("erase", erase)):
            if not 0 <= value <= 1:
                raise ValueError(f"Augment: {name}={value} is a probability; it wants a figure between 0 and 1")
        if resized_crop is not None and not 0 <= resized_crop <= 1:
            raise DataError(
                f"Augment: resized_crop={resized_crop} is the smallest share of the picture's area in a random crop\n"
                "  Give a share up to 1, such as 0.08, or 0 (off)"
            )
        # Also false of NaN, which `min` may pass by.
        if not all(0 <= value < math.inf for value in (crop, mixup, cutmix, color_jitter)):
            figures = f"crop={crop}, mixup={mixup}, cutmix={cutmix}, color_jitter={color_jitter}"
            raise ValueError(f"Augment: {figures} want 0 (off) or more")
        if not 0 <= rand_augment <= 10:
            raise ValueError(f"Augment: rand_augment={rand_augment} is a magnitude; it wants 0 (off) to 10, such as 9")
        if not 0 <= rand_augment_std < math.inf or (rand_augment_std and not rand_augment):
            raise ValueError(
                f"Augment: rand_augment_std={rand_augment_std} wants 0 or more, and a rand_augment above 0 to jitter"
            )
        self.rand_augment, self.rand_augment_std, self.color_jitter = rand_augment, rand_augment_std, color_jitter
        self.crop, self.flip, self.resized_crop, self.erase = crop, flip, resized_crop, erase
        self.mixup, self.cutmix, self.seed = mixup, cutmix, seed
        self._generators: dict[torch.device, Generator] = {}

    def _generator(self, device: torch.device) -> Generator | None:
        if self.seed is None:
            return None
        if device not in self._generators:
            self._generators[device] = Generator(device).manual_seed(self.seed)
        return self._generators[device]

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        num_classes: int,
        generator: Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x: (n, c, h, w), uint8 or floats in [0, 1]; y: (n,). Labels become (n, num_classes) only where they mix."""
        generator = generator or self._generator(x.device)
        if self.resized_crop:
            if x.shape[-2] != x.shape[-1]:
                raise DataError(
                    f"Augment: resized_crop makes squares, and the pictures are {x.shape[-1]}x{x.shape[-2]}\n"
                    "  Leave it out, or give square pictures: data.size"
                )
            x = random_resized_crop(x, x.shape[-1], (self.resized_crop, 1.0), generator=generator)
        x = random_flip(random_crop(x, self.crop, generator=generator), self.flip, generator=generator)
        if self.rand_augment:
            x = rand_augment(x, self.rand_augment, self.rand_augment_std, fill=mean, generator=generator)
        x = color_jitter(x, *(self.color_jitter,) * 3, generator=generator)
        # After normalisation, where noise of standard deviation 1 is as strong as the picture.
        x = random_erasing(normalize(x, mean, std), self.erase, generator=generator)
        if not self.mixup and not self.cutmix:
            return x, y
        blend = bool(self.mixup)
        if self.mixup and self.cutmix:
            blend = bool(torch.rand((), device=generator.device if generator else "cpu", generator=generator) < 0.5)
        if blend:
            return mixup(x, y, self.mixup, num_classes, generator=generator)
        return cutmix(x, y, self.cutmix, num_classes, generator=generator)
