"""Boxes, masks and pixels go the same way, and what is drawn is a function of the seed, the epoch and the picture."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.plugins.precision import HalfPrecision
from PIL import Image

from odenets import shapes
from odenets.detection import DetectionData
from odenets.detection.annotations import Objects
from odenets.detection.data import Collate, _inside, _unpacked
from odenets.detection.transforms import Placement, Resize, bounds, fit, shorter
from odenets.training.errors import DataError
from odenets.training.order import seed_of


def objects_of(drawing: shapes.Drawing) -> Objects:
    boxes = torch.tensor([[s.box[0], s.box[1], s.box[2] - s.box[0], s.box[3] - s.box[1]] for s in drawing.shapes])
    masks = torch.from_numpy(np.array([s.mask for s in drawing.shapes]))
    labels = torch.tensor([s.label - 1 for s in drawing.shapes])
    return Objects(
        boxes.double(), labels, torch.zeros(len(labels), dtype=torch.bool), masks.sum((1, 2)).double(), masks
    )


def drawings() -> st.SearchStrategy[shapes.Drawing]:
    return st.integers(0, 50).map(lambda n: shapes.draw(n, 64)).filter(lambda drawing: bool(drawing.shapes))


@given(drawings(), st.integers(0, 10**6), st.sampled_from([(1.0, 1.0), (0.5, 1.0), (0.4, 2.0), (1.5, 2.0)]))
def test_a_box_stays_around_its_mask(drawing, seed, jitter):
    """Of the mask that went the same way, to the rounding of its pixels; where a window cuts, of what it shows."""
    objects = objects_of(drawing)
    placed = Resize(64, jitter, (), 0, 0.5).draw(64, 64, torch.Generator().manual_seed(seed))
    scale = placed.resized[0] / 64
    corners = torch.cat([objects.boxes[:, :2], objects.boxes[:, :2] + objects.boxes[:, 2:]], 1)
    assert objects.masks is not None
    masks, boxes = placed.masks(objects.masks), placed.boxes(corners, (64, 64))
    around = bounds(masks).double()
    there = masks.flatten(1).any(1)
    slack = max(1.0, 0.75 * scale)  # a mask that grows by interpolation loses up to half a pixel of the old grid
    beyond = torch.cat([boxes[:, :2] - around[:, :2], around[:, 2:] - boxes[:, 2:]], 1)
    assert (beyond[there] <= slack).all(), "the mask lies inside the box"
    if not placed.cuts:
        # A part that is narrower than half a pixel of a smaller picture is lost: a tip, or what shows behind a shape.
        assert scale < 1 or (there.all() and beyond.min() >= -slack), "and touches its sides"
    found = _inside(objects, placed, (64, 64))
    if placed.cuts:
        assert torch.equal(found["boxes"], bounds(found["masks"]))
    plain = _inside(objects._replace(masks=None), placed, (64, 64))["boxes"]
    assert (plain[:, 2:] - plain[:, :2] >= 1).all()
    assert (plain >= 0).all() and (plain <= torch.tensor([placed.width, placed.height] * 2)).all()


@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 10**6))
def test_a_window_lies_in_the_resized_picture(width, height, seed):
    placed = Resize(32, (0.1, 2.0), (), 0, 0.5).draw(width, height, torch.Generator().manual_seed(seed))
    assert 0 <= placed.left and placed.left + placed.width <= placed.resized[0]
    assert 0 <= placed.top and placed.top + placed.height <= placed.resized[1]
    assert 1 <= placed.width <= 32 and 1 <= placed.height <= 32
    image = placed.picture(Image.new("RGB", (width, height)))
    assert image.size == (placed.width, placed.height)


def test_a_window_shows_the_pixels_that_it_names():
    """At scale 1 each pixel is one of the picture; at scale 2 a box of four."""
    levels = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    image = Image.fromarray(levels)
    plain = Placement((12, 10), 3, 2, 6, 5, False)
    assert np.array_equal(np.array(plain.picture(image)), levels[2:7, 3:9])
    assert np.array_equal(np.array(plain._replace(flip=True).picture(image)), levels[2:7, 3:9][:, ::-1])
    boxes = torch.tensor([[4.0, 3.0, 6.0, 20.0]])
    assert plain.boxes(boxes, (12, 10)).tolist() == [[1, 1, 3, 5]]
    assert plain._replace(flip=True).boxes(boxes, (12, 10)).tolist() == [[3, 1, 5, 5]]
    double = Placement((24, 20), 6, 4, 12, 10, False)
    assert double.boxes(boxes, (12, 10)).tolist() == [[2, 2, 6, 10]]
    mask = torch.zeros(1, 10, 12, dtype=torch.bool)
    mask[0, 3:6, 4:7] = True
    assert bounds(plain.masks(mask)).tolist() == [[1, 1, 4, 4]] and plain.masks(mask).sum() == 9
    assert bounds(double.masks(mask)).tolist() == [[2, 2, 8, 8]] and double.masks(mask).sum() == 36


def test_sizes():
    assert fit(640, 480, 320) == (320, 240) and fit(1, 1000, 32) == (1, 32)
    assert shorter(640, 480, 800, 1333) == (1067, 800) and shorter(1000, 200, 800, 1333) == (1333, 267)
    resize = Resize(64, None, (32, 48), 100, 0.0)
    drawn = {resize.draw(60, 40, torch.Generator().manual_seed(n)).resized for n in range(20)}
    assert drawn == {(48, 32), (72, 48)} and resize.fixed(60, 40).resized == (96, 64)


def data(root, **options) -> DetectionData:
    found = DetectionData(str(root), **{"size": 48, "batch_size": 4, "num_workers": 0, "multiple": 16, **options})
    found.setup("fit")
    return found


def test_a_sample_is_a_function_of_seed_epoch_and_picture(drawn):
    one, two = (data(drawn, masks=True).sets["train"] for _ in range(2))
    for found in (one, two):
        found.seed = 3
    torch.manual_seed(7)  # nothing is drawn from the generator of the process
    first = {key: one[key] for key in ((0, 2), (1, 2), (0, 3))}
    again = {key: two[key] for key in ((0, 3), (1, 2), (0, 2))}
    for key, (x, target) in first.items():
        assert torch.equal(x, again[key][0])
        assert all(torch.equal(value, again[key][1][name]) for name, value in target.items())
    assert first[0, 2][0].shape != first[1, 2][0].shape or not torch.equal(first[0, 2][0], first[1, 2][0])
    placed = one.resize.draw(48, 48, torch.Generator().manual_seed(seed_of(3, 0, 2)))
    assert first[0, 2][1]["size"].tolist() == [placed.height, placed.width]


def test_a_batch_is_filled_up_with_zeros(drawn):
    found = data(drawn, jitter=(0.3, 1.2), masks=True)
    x, targets = found.on_after_batch_transfer(next(iter(found.train_dataloader())), 0)
    assert x.shape == (4, 3, 48, 48) and x.dtype == torch.float32
    assert any(target["size"].tolist() != [48, 48] for target in targets)
    for row, target in zip(x, targets, strict=True):
        height, width = target["size"].tolist()
        assert not row[:, height:].any() and not row[:, :, width:].any() and row[:, :height, :width].any()
        assert target["masks"].shape[1:] == (48, 48) and not target["masks"][:, height:].any()


def test_multiscale_batches_have_one_size(drawn):
    found = data(drawn, resize="multiscale", scales=[20, 40], size=40)
    x, _ = next(iter(found.train_dataloader()))
    assert x.shape[2] in (32, 48) and x.shape[2] == x.shape[3]
    x, targets = next(iter(found.val_dataloader()))
    assert x.shape == (4, 3, 48, 48) and all(target["size"].tolist() == [40, 40] for target in targets)


def test_boxes_keep_their_digits_in_any_precision():
    """Lightning rounds the floats of a batch; a box of 640 pixels would be off by two of them."""
    boxes, truth = torch.tensor([[0.123456, 100.6, 639.37, 201.3]]), torch.tensor([[1 / 3, 2.0, 3.0, 4.0]]).double()
    sample = {"boxes": boxes, "truth_boxes": truth, "truth_area": truth[0], "labels": torch.tensor([1])}
    batch = Collate(1)([(torch.zeros(3, 2, 2, dtype=torch.uint8), sample)])
    _, (target,) = HalfPrecision("bf16-true").convert_input(batch)
    target = {name: _unpacked(name, value) for name, value in target.items()}
    assert all(torch.equal(target[name], value) and target[name].dtype == value.dtype for name, value in sample.items())


def test_crowds_are_judged_and_not_trained_on(drawn, tmp_path):
    import json
    import shutil

    shutil.copytree(drawn, tmp_path / "set")
    for split in ("train", "val"):
        path = tmp_path / "set/annotations" / f"{split}.json"
        held = json.loads(path.read_text())
        for entry in held["annotations"]:
            entry["iscrowd"] = 1
        path.write_text(json.dumps(held))
    found = data(tmp_path / "set")
    assert all(len(found.sets["train"][i][1]["boxes"]) == 0 for i in range(12))
    targets = [found.sets["val"][i][1] for i in range(9)]
    assert sum(len(target["truth_boxes"]) for target in targets) > 5
    with pytest.raises(DataError, match=r"none of 12 pictures has a box besides crowds\n  Give data.empty true"):
        data(tmp_path / "set", empty=False)
    assert all(target["truth_crowd"].all() and not len(target["boxes"]) for target in targets)


@pytest.mark.parametrize("empty", [True, False])
def test_empty_pictures(drawn, empty):
    found = data(drawn, empty=empty).sets["train"]
    counts = [len(found.shown.objects(i).boxes) for i in range(len(found))]
    assert (0 in counts) == empty and (len(found) == 12) == empty
