"""Folders of pictures with masks, small networks, and a configuration of them, as tests of segmentation need them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from odenets.segmentation import SegmentationNet, UPerNet

REVCOL = {"channels": [8, 16, 32], "blocks": [1, 1, 1], "columns": 2, "patch": 2}


def revcol(**options: Any) -> UPerNet:
    given: dict[str, Any] = {"model": "revcol_tiny", "num_classes": 5, "options": REVCOL, "width": 16, "dropout": 0}
    return UPerNet(**{**given, **options})


class Returning(torch.nn.Module):
    """A residual function that returns a value beside its own."""

    def __init__(self, f: torch.nn.Module, name: str = "size") -> None:
        super().__init__()
        self.f, self.name, self.seen = f, name, []

    def forward(self, *args):
        y = self.f(*args)
        value = y.square().mean()
        self.seen.append(value)
        return y, {self.name: value}


def returning(net: Any, name: str = "size") -> list[Returning]:
    """Has all residual functions of a RevCol return a value; gives them."""
    for step in net.columns.steps:
        for i, f in enumerate(step.fs):
            step.fs[i] = Returning(f, name)
    return [f for step in net.columns.steps for f in step.fs]


class PerPixel(SegmentationNet):
    """Scores that depend on the pixel alone: what surrounds it, and how it is shown, does not matter."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.map = torch.nn.Conv2d(3, num_classes, 1)

    def forward(self, x, y=None):
        return self.map(x)

    def probabilities(self, scores):
        return scores.softmax(1)


def quadrants(size: tuple[int, int], values: tuple[int, int, int, int]) -> np.ndarray:
    """Four values, in the four quarters of a mask of this width and height."""
    width, height = size
    mask = np.zeros((height, width), dtype=np.int64)
    mask[: height // 2, : width // 2], mask[: height // 2, width // 2 :] = values[:2]
    mask[height // 2 :, : width // 2], mask[height // 2 :, width // 2 :] = values[2:]
    return mask


def save(path: Path, levels: np.ndarray, kind: Any = np.uint8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels.astype(kind)).save(path)


def pair(root: Path, split: str, name: str, mask: np.ndarray, suffix: str = ".png") -> None:
    """A picture whose red level is 50 times the class, beside its mask."""
    red = np.minimum(mask * 50, 255)
    save(root / "images" / split / f"{name}{suffix}", np.stack([red, red * 0 + 30, red * 0], 2))
    save(root / "masks" / split / f"{name}.png", mask)


def config(folder: Path, data: dict[str, Any], trainer: dict[str, Any], **model: Any) -> Path:
    """A configuration of a small network under UPerNet."""
    two = {"channels": [8, 16], "blocks": [1, 1], "columns": 2, "patch": 2}
    net = {"model": "revcol_tiny", "options": two, "width": 16, "auxiliary_width": 8, "backprop": "reverse"}
    text = {
        "seed_everything": 0,
        "run_dir": str(folder / "run"),
        "model": {
            "class_path": "odenets.training.Segmenter",
            "init_args": {
                "net": {"class_path": "odenets.segmentation.UPerNet", "init_args": net},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 2e-3}},
                **model,
            },
        },
        "data": data,
        "trainer": {"accelerator": "cpu", "enable_model_summary": False, "num_sanity_val_steps": 0, **trainer},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(text, sort_keys=False))
    return folder / "c.yaml"
