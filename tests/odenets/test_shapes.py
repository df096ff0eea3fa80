"""Drawn pictures: masks, boxes and annotations agree, and each is a function of its number and the seed."""

import json

import numpy as np
import pytest
from PIL import Image

from odenets.shapes import CLASSES, draw, main, run_lengths, write

DRAWINGS = [draw(i, 32, seed=3) for i in range(60)]


def test_the_mask_is_the_union_of_the_shapes_which_do_not_overlap():
    for drawing in DRAWINGS:
        assert drawing.picture.dtype == np.uint8 and drawing.picture.shape == (32, 32, 3)
        seen = sum((shape.mask.astype(int) for shape in drawing.shapes), np.zeros((32, 32), int))
        assert seen.max() <= 1
        assert np.array_equal(drawing.mask, sum((s.mask * s.label for s in drawing.shapes), np.zeros((32, 32), int)))


def test_boxes_are_tight():
    for shape in (shape for drawing in DRAWINGS for shape in drawing.shapes):
        left, top, right, bottom = map(int, shape.box)
        inner = shape.mask[top:bottom, left:right]
        assert inner.sum() == shape.mask.sum() > 0
        assert inner[0].any() and inner[-1].any() and inner[:, 0].any() and inner[:, -1].any()


def test_every_class_occurs_and_some_pictures_are_empty():
    labels = {shape.label for drawing in DRAWINGS for shape in drawing.shapes}
    assert labels == set(range(1, len(CLASSES))) and any(not drawing.shapes for drawing in DRAWINGS)


def test_a_picture_depends_on_its_number_and_the_seed_alone():
    assert np.array_equal(draw(5, 32, 3).picture, DRAWINGS[5].picture)
    assert not np.array_equal(draw(5, 32, 4).picture, DRAWINGS[5].picture)
    assert not np.array_equal(DRAWINGS[4].picture, DRAWINGS[5].picture)


def test_a_weaker_texture_changes_what_is_behind_the_shapes_alone():
    strong, weak, grey = (draw(1, 32, 3, texture) for texture in (1.0, 0.4, 0.0))
    assert np.array_equal(strong.mask, grey.mask) and np.array_equal(weak.mask, grey.mask)
    behind = strong.mask == 0
    spread = [float(d.picture[behind].std()) for d in (strong, weak, grey)]
    assert spread[0] > 1.5 * spread[1] > spread[2]
    assert np.abs(strong.picture[~behind].astype(int) - grey.picture[~behind]).max() <= 1


def test_run_lengths_give_the_mask_back():
    for mask in [s.mask for s in DRAWINGS[0].shapes] + [np.ones((2, 3), bool), np.zeros((2, 3), bool)]:
        counts = run_lengths(mask)
        flat = np.concatenate([np.full(n, i % 2 == 1) for i, n in enumerate(counts)])
        assert np.array_equal(flat.reshape(mask.shape, order="F"), mask)


def test_a_folder_holds_pictures_masks_and_annotations(tmp_path):
    main([str(tmp_path / "out"), "--train", "3", "--val", "2", "--size", "32", "--seed", "3"])
    for split, numbers in (("train", (0, 1, 2)), ("val", (3, 4))):
        held = json.loads((tmp_path / "out" / "annotations" / f"{split}.json").read_text())
        for image, number in zip(held["images"], numbers, strict=True):
            for kind, want in (("images", DRAWINGS[number].picture), ("masks", DRAWINGS[number].mask)):
                path = tmp_path / "out" / kind / split / image["file_name"]
                assert np.array_equal(np.asarray(Image.open(path)), want)
            own = [a for a in held["annotations"] if a["image_id"] == image["id"]]
            assert [a["category_id"] for a in own] == [s.label for s in DRAWINGS[number].shapes]
            for annotation, shape in zip(own, DRAWINGS[number].shapes, strict=True):
                left, top, width, height = annotation["bbox"]
                assert (left, top, left + width, top + height) == shape.box
                assert annotation["area"] == shape.mask.sum() == sum(annotation["segmentation"]["counts"][1::2])
    with pytest.raises(ValueError, match="not empty"):
        write(tmp_path / "out", {"train": 1})


@pytest.mark.parametrize(
    "given", [{"size": 8}, {"size": 15}, {"seed": -1}, {"splits": {"train": -3}}, {"splits": {"train": 1, "val": -1}}]
)
def test_nothing_is_written_of_what_is_refused(given, tmp_path):
    with pytest.raises(ValueError, match="Give 16 pixels or more"):
        write(tmp_path / "out", **{"splits": {"train": 1}, "size": 16, **given})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("texture", [-0.1, float("nan"), float("inf")])
def test_a_texture_has_a_finite_strength(texture):
    with pytest.raises(ValueError, match="a strength of 0 or more"):
        draw(3, 16, texture=texture)
