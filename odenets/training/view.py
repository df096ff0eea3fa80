"""How a picture is presented to a network: its size, the visible part, its channels, and the scale of its levels."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .augment import normalize
from .decode import Picture, Unreadable


class View(NamedTuple):
    """How evaluation presents a picture; stored in the checkpoint, so that predicting needs no configuration.

    Attributes:
        channels: 3 for RGB, or 1 for grey.
        height: Of the network's input, in pixels.
        width: Likewise; if it differs from the height, pictures must have exactly this size.
        inner: Share of the shorter side that is seen, in the middle of the picture.
        interpolation: How pictures are resized.
        mean: Per channel, of pictures in [0, 1].
        std: Per channel.

    Example:
        >>> import torch
        >>> view = View(1, 1, 1, 1.0, "bilinear", [0.5], [0.25])
        >>> view.normalize(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8)).item()
        2.0
    """

    channels: int
    height: int
    width: int
    inner: float
    interpolation: str
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, picture: Picture) -> Tensor:
        """The levels that the network sees: uint8 (channels, height, width).

        Raises:
            Unreadable: The picture cannot be decoded, or has another size where the size is fixed.
        """
        if self.height == self.width:
            levels = picture.middle(self.height, self.inner, self.interpolation)
        elif picture.size == (self.width, self.height):
            levels = picture.whole()
        else:
            wide, high = picture.size
            raise Unreadable(f"it is {wide}x{high}, and the network was trained on {self.width}x{self.height}")
        return (levels if self.channels == 3 else grey(levels)).permute(2, 0, 1)

    def normalize(self, x: Tensor) -> Tensor:
        """Scales pictures (n, channels, h, w) as the network was trained.

        Args:
            x: uint8 pictures.
        """
        return normalize(x, self.mean, self.std)

    def state(self) -> dict[str, Any]:
        """The view as plain values, for a checkpoint."""
        return {**self._asdict(), "mean": list(self.mean), "std": list(self.std)}


def grey(levels: Tensor) -> Tensor:
    """uint8 (h, w, 3) -> (h, w, 1): 0.299 R + 0.587 G + 0.114 B in integers, as PIL's mode L has it.

    Args:
        levels: (h, w, 3), red, green and blue.

    >>> import torch
    >>> grey(torch.tensor([[[255, 255, 255], [255, 0, 0]]], dtype=torch.uint8)).flatten().tolist()
    [255, 76]
    """
    weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32)  # of 65536
    return (((levels.int() * weights).sum(2, keepdim=True) + (1 << 15)) >> 16).to(torch.uint8)
