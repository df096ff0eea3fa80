"""Predictions as pictures: the class of each pixel as a file, and drawn over the picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BasePredictionWriter
from PIL import Image
from torch import Tensor

from ..training.layout import PICTURES


class PredictedMasks(BasePredictionWriter):
    """Writes two files per picture: ``masks/NAME.png`` and ``drawn/NAME.png``.

    The first holds the class of each pixel, as numbers from 0 on, with the colours of the classes as its palette. The
    second shows the picture with these colours over it. Each process writes the pictures that it predicted.

    Args:
        folder: where the files are written.
        strength: opacity of the colours, from 0 to 1.
    """

    def __init__(self, folder: str | Path, strength: float = 0.5) -> None:
        super().__init__("batch")
        self.folder, self.strength = Path(folder), strength
        self._written = 0

    def write_on_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        prediction: Sequence[Tensor],
        batch_indices: Sequence[Any] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        for index, mask, x in zip(batch_indices or (), prediction, batch[0], strict=True):
            if isinstance(index, tuple):  # a repeated picture, to give every process equally many
                continue
            name = data.predicted_name(index)
            if name.endswith(" (unreadable)"):  # another picture has replaced it
                continue
            place = placed(name)
            levels = shown(x.float().cpu(), data.mean, data.std, (mask.shape[0], mask.shape[1]))
            self._save(self.folder / "masks" / place, numbered(mask, data.colors))
            self._save(self.folder / "drawn" / place, drawn(levels, mask, data.colors, self.strength))
            self._written += 1

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            print(f"predictions: {self._written:,} pictures of this process in {self.folder}")

    @staticmethod
    def _save(path: Path, picture: Image.Image) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


def placed(name: str) -> Path:
    """The path of a picture's prediction: the path of the picture, below the folder of predictions.

    Example:
        >>> placed("ulm/1.jpg").as_posix(), placed("../v1.0 row 3").as_posix()
        ('ulm/1.png', 'v1.0 row 3.png')
    """
    # A picture may lie outside the data folder; predictions stay below their own.
    path = Path(*(part for part in Path(name).parts if part not in ("..", "/")))
    # Only a known suffix is replaced: the dot in "v1.0 row 3" does not start one.
    return path.with_suffix(".png") if path.suffix.lower() in PICTURES else path.with_name(f"{path.name}.png")


def shown(x: Tensor, mean: Sequence[float], std: Sequence[float], size: tuple[int, int]) -> Tensor:
    """Converts a normalised picture (3, h, w) to uint8 (H, W, 3) of the given size."""
    m, s = (torch.tensor(figures).view(3, 1, 1) for figures in (mean, std))
    levels = (x * s + m)[None]
    if levels.shape[-2:] != size:
        levels = F.interpolate(levels, size, mode="bilinear", align_corners=False, antialias=True)
    return (levels[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)


def numbered(mask: Tensor, colors: Sequence[Sequence[int]]) -> Image.Image:
    """Converts a mask (h, w) to a picture of its numbers, with a palette for up to 256 classes."""
    # A palette has at most 256 colours; 16 bits hold the number of any class.
    if len(colors) > 256:
        return Image.fromarray(mask.numpy().astype(np.uint16))
    picture = Image.fromarray(mask.numpy().astype(np.uint8))
    picture.putpalette([level for color in colors for level in color])
    return picture


def drawn(levels: Tensor, mask: Tensor, colors: Sequence[Sequence[int]], strength: float = 0.5) -> Image.Image:
    """Draws the colours of the classes over a picture, with lines where classes meet.

    Args:
        levels: the picture, uint8 (h, w, 3).
        mask: classes (h, w).
        colors: colours of the classes.
        strength: opacity of the colours.
    """
    painted = torch.tensor(colors, dtype=torch.float32)[mask.long()]
    mixed = (1 - strength) * levels.float() + strength * painted
    edge = torch.zeros_like(mask, dtype=torch.bool)
    edge[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    edge[1:] |= mask[1:] != mask[:-1]
    mixed[edge] = 255
    return Image.fromarray(mixed.round().to(torch.uint8).numpy())
