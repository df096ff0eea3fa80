"""Draws pictures, their masks and the predictions of a run on drawn shapes, in three rows.

lightning fit -c experiments/shapes_upernet.yaml
lightning predict -c experiments/shapes_upernet.yaml --ckpt_path best
python experiments/benchmarks/shapes_picture.py runs/shapes_upernet docs/pages/pictures/segmentation.png
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from odenets.segmentation.masks import colors
from odenets.segmentation.pictures import drawn
from odenets.shapes import CLASSES, draw

COLUMNS, ENLARGED, GAP = 10, 2, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    data = yaml.safe_load((given.run / "config.yaml").read_text())["data"]["init_args"]
    palette, side = colors(len(CLASSES)), data["size"] * ENLARGED
    sheet = Image.new("RGB", (COLUMNS * (side + GAP) - GAP, 3 * (side + GAP) - GAP), "white")
    for column in range(COLUMNS):
        drawing = draw(data["train"] + column, data["size"], data["seed"], data["texture"])
        levels = torch.from_numpy(drawing.picture)
        said = np.asarray(Image.open(given.run / f"predict/predictions/masks/{column:06d}.png"))
        masks = (np.array(mask) for mask in (drawing.mask, said))
        rows = [Image.fromarray(drawing.picture), *(drawn(levels, torch.from_numpy(mask), palette) for mask in masks)]
        for row, picture in enumerate(rows):
            sheet.paste(
                picture.resize((side, side), Image.Resampling.NEAREST), (column * (side + GAP), row * (side + GAP))
            )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(given.out)


if __name__ == "__main__":
    main()
