"""Random textures for corruptions: random numbers per picture, the clouds of fog, and a substitute for frost."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Draws:
    """Random numbers for a batch, each picture's from its own generator, so that they do not depend on the batch.

    Args:
        seeds: Seeds of the pictures.

    Example:
        >>> bool((Draws([3, 7]).uniform(0, 1, (2,))[1] == Draws([7]).uniform(0, 1, (2,))[0]).all())
        True
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        # On the CPU, where a seed gives the same numbers whatever device the pictures are on.
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def uniform(self, low: float, high: float, shape: Sequence[int] = ()) -> Tensor:
        """Draws (n, *shape) from [low, high), in double precision.

        Args:
            low: the lower end.
            high: the upper end.
            shape: shape of what is drawn for each picture.
        """
        drawn = [torch.rand(tuple(shape), generator=g, dtype=torch.float64) for g in self.generators]
        return low + (high - low) * torch.stack(drawn)

    def normal(self, mean: float, std: float, shape: Sequence[int]) -> Tensor:
        """Draws (n, *shape) from a normal distribution, in double precision.

        Args:
            mean: mean of the distribution.
            std: its standard deviation.
            shape: shape of what is drawn for each picture.
        """
        drawn = [torch.randn(tuple(shape), generator=g, dtype=torch.float64) for g in self.generators]
        return mean + std * torch.stack(drawn)

    def integers(self, low: int, high: int, shape: Sequence[int] = ()) -> Tensor:
        """Draws (n, *shape), whole numbers from low to high - 1.

        Args:
            low: the smallest.
            high: the one after the largest.
            shape: shape of what is drawn for each picture.
        """
        return torch.stack([torch.randint(low, high, tuple(shape), generator=g) for g in self.generators])

    def poisson(self, rates: Tensor) -> Tensor:
        """Draws Poisson counts for the rates (n, ...).

        Args:
            rates: (n, ...), the expected counts.
        """
        pairs = zip(rates.cpu(), self.generators, strict=True)
        return torch.stack([torch.poisson(rate, generator=g) for rate, g in pairs])


def plasma(draws: Draws, size: int, decay: float) -> Tensor:
    """Returns plasma fractals (n, size, size) from 0 to 1, by the diamond-square algorithm on a torus.

    A new point is the mean of its four neighbours at the distance of the step plus, in round k, 100 decay^-k times a
    uniform number from [-100 decay^-k, 100 decay^-k); the step is halved from round to round.

    Args:
        draws: Random numbers, one generator per picture.
        size: A power of 2.
        decay: Decay of the amplitude; larger is smoother.

    Source:
        Fournier, Fussell and Carpenter 1982, Computer Rendering of Stochastic Models, CACM 25; as Hendrycks and
        Dietterich 2019 use it.
    """
    if size & (size - 1):
        raise ValueError(f"size {size} is no power of 2")
    z = torch.zeros(len(draws.generators), size, size, dtype=torch.float64)
    step, amplitude = size, 100.0
    while step >= 2:
        half = step // 2

        # Bound as a default: the amplitude changes in the next round.
        def drawn(total: Tensor, a: float = amplitude) -> Tensor:
            return total / 4 + a * draws.uniform(-a, a, total.shape[1:])

        corners = z[:, ::step, ::step]
        total = corners + corners.roll(-1, 1)
        z[:, half::step, half::step] = drawn(total + total.roll(-1, 2))
        centres = z[:, half::step, half::step]
        z[:, ::step, half::step] = drawn(centres + centres.roll(1, 1) + corners + corners.roll(-1, 2))
        z[:, half::step, ::step] = drawn(centres + centres.roll(1, 2) + corners + corners.roll(-1, 1))
        step, amplitude = half, amplitude / decay
    z -= z.amin((1, 2), keepdim=True)
    return z / z.amax((1, 2), keepdim=True)


def clouds(draws: Draws, height: int, width: int, decay: float) -> Tensor:
    """Returns a corner (n, height, width) of plasma fractals whose side is the next power of 2.

    Args:
        draws: the random numbers, one generator per picture.
        height: height of the corner.
        width: width of the corner.
        decay: factor by which the roughness falls from one scale to the next.
    """
    return plasma(draws, 1 << (max(height, width, 2) - 1).bit_length(), decay)[:, :height, :width]


def frosting(draws: Draws, height: int, width: int) -> Tensor:
    """Returns a substitute for frost, (n, 3, height, width): bright ridges of a plasma fractal on patches of another.

    ridge = (1 - |2 p - 1|)^3, light = 0.25 + 0.45 ridge + 0.3 q, tinted 0.9, 0.97, 1; from 0 to 1.

    Args:
        draws: the random numbers, one generator per picture.
        height: height of the pictures.
        width: width of the pictures.
    """
    ridge = (1 - (2 * clouds(draws, height, width, 1.45) - 1).abs()) ** 3
    light = 0.25 + 0.45 * ridge + 0.3 * clouds(draws, height, width, 2.5)
    return light[:, None] * torch.tensor([0.9, 0.97, 1.0], dtype=torch.float64)[:, None, None]
