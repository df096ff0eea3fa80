"""Data sets whose layout and labels are known by name."""

from collections.abc import Sequence
from typing import Any, NamedTuple

CITYSCAPES = (
    "road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, person, "
    "rider, car, truck, bus, train, motorcycle, bicycle"
).split(", ")


class Preset(NamedTuple):
    """The known properties of a data set; options that are given override them.

    Attributes:
        classes: names of the classes, or their number.
        options: arguments of ``SegmentationData``.
    """

    classes: Sequence[str] | int
    options: dict[str, Any]


PRESETS = {
    # ADEChallengeData2016: images/training/*.jpg and annotations/training/*.png; 0 means none of the 150 classes.
    "ade20k": Preset(150, {"reduce_labels": True, "short": 512, "longest": 2048, "crop": 512}),
    # leftImg8bit/train/aachen/*_leftImg8bit.png and gtFine/train/aachen/*_gtFine_labelIds.png; 19 of 34 kinds count.
    "cityscapes": Preset(
        CITYSCAPES,
        {
            "ids": [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33],
            "images": "leftImg8bit",
            "masks": "gtFine",
            "image_suffix": "_leftImg8bit",
            "mask_suffix": "_gtFine_labelIds",
            "short": 1024,
            "longest": 2048,
            "crop": [512, 1024],
        },
    ),
}
