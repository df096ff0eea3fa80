"""Augmentation of a batch of training pictures and masks, on its device.

Scaling and cropping come earlier, where pictures are decoded, and make all pictures of a batch equally large.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from ..training.augment import normalize

# Ranges of the photometric distortion: as a share of 255 levels, as factors, and as a share of the hue circle.
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32 / 255, (0.5, 1.5), (0.5, 1.5), 0.1


class SegmentationAugment:
    """Flips pictures and masks, distorts colours, then normalises by mean and standard deviation.

    Args:
        flip: probability of a left-right flip, applied to picture and mask together.
        distort: whether brightness, contrast, saturation and hue are distorted, each with probability 1/2.
        seed: seed of a separate generator; None takes the run's.

    Example:
        >>> import torch
        >>> x, y = torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.tensor([[[0, 1], [2, 3]]])
        >>> augment = SegmentationAugment(flip=1.0, distort=False)
        >>> augment(x, y, [0.5] * 3, [0.25] * 3)[1]
        tensor([[[1, 0],
                 [3, 2]]])
    """

    def __init__(self, flip: float = 0.5, distort: bool = True, seed: int | None = None) -> None:
        if not 0 <= flip <= 1:
            raise ValueError(f"SegmentationAugment: flip={flip} is a probability; it wants a figure between 0 and 1")
        self.flip, self.distort, self.seed = flip, distort, seed

    def __call__(
        self, x: Tensor, y: Tensor, mean: Sequence[float], std: Sequence[float], generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the batch as the network receives it.

        Args:
            x: (n, 3, h, w), uint8 or floats in [0, 1].
            y: (n, h, w).
            mean: per channel, of pictures in [0, 1].
            std: per channel.
            generator: source of the random numbers.
        """
        if self.flip:
            mirror = torch.rand(len(x), device=x.device, generator=generator) < self.flip
            x = torch.where(mirror[:, None, None, None], x.flip(-1), x)
            y = torch.where(mirror[:, None, None], y.flip(-1), y)
        if self.distort:
            x = x if x.is_floating_point() else x.to(torch.get_default_dtype()) / 255
            x = photometric_distortion(x, generator=generator)
        return normalize(x, mean, std), y


def photometric_distortion(x: Tensor, *, generator: Generator | None = None) -> Tensor:
    """Distorts the colours of each picture in four ways, each with probability 1/2.

    Brightness: up to 32 of 255 levels are added or subtracted. Contrast: levels are multiplied by a factor from
    [1/2, 3/2], before saturation and hue or after them, either with probability 1/2. Saturation: multiplied by a factor
    from [1/2, 3/2]. Hue: rotated by up to a tenth of the circle. After each step levels are clamped to [0, 1].

    Args:
        x: floats in [0, 1], (n, 3, h, w).
        generator: source of the random numbers; None is torch's global one on the device of x.

    Source:
        Liu et al. 2016, SSD: Single Shot MultiBox Detector, arXiv 1512.02325, in the form used for segmentation since.
    """
    if x.shape[1] != 3:
        raise ValueError(f"photometric_distortion: {x.shape[1]} channels; wants red, green and blue")

    def drawn(low: float, high: float, nothing: float) -> Tensor:
        """Draws a number for each picture; with probability 1/2 it is `nothing`."""
        # Both numbers are drawn for every picture, so that its draws do not depend on those of the others.
        use, figure = torch.rand(2, len(x), device=x.device, generator=generator)
        return torch.where(use < 0.5, low + (high - low) * figure, nothing)[:, None, None, None].to(x.dtype)

    first = (torch.rand(len(x), device=x.device, generator=generator) < 0.5)[:, None, None, None]
    x = (x + drawn(-BRIGHTNESS, BRIGHTNESS, 0.0)).clamp(0, 1)
    contrast = drawn(*CONTRAST, 1.0)
    x = torch.where(first, (x * contrast).clamp(0, 1), x)
    x = turned_colors(x, drawn(*SATURATION, 1.0), drawn(-HUE, HUE, 0.0))
    return torch.where(first, x, (x * contrast).clamp(0, 1))


def turned_colors(x: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Multiplies the saturation of RGB pictures and rotates their hue.

    Args:
        x: floats in [0, 1], (n, 3, h, w).
        saturation: factors, (n, 1, 1, 1); the product is clamped to [0, 1].
        hue: shares of the circle, (n, 1, 1, 1).

    Example:
        >>> import torch
        >>> red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1)
        >>> turned_colors(red, torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 1 / 3)).flatten().tolist()
        [0.0, 1.0, 0.0]
    """
    value, which = x.max(1, keepdim=True)
    span = value - x.min(1, keepdim=True).values
    red, green, blue = x.split(1, 1)
    safe = torch.where(span > 0, span, 1)  # grey has no hue: any will do
    sixths = torch.stack([(green - blue) / safe, (blue - red) / safe + 2, (red - green) / safe + 4], 0)
    angle = sixths.gather(0, which[None])[0] + 6 * hue
    chroma = value * (span / torch.where(value > 0, value, 1) * saturation).clamp(0, 1)
    # Each channel is at its full value within a sixth of the circle of its own hue, and falls off over the next sixth.
    place = torch.tensor([5.0, 3.0, 1.0], dtype=x.dtype, device=x.device).view(1, 3, 1, 1)
    k = (place + angle) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)
