"""Average precision is what pycocotools gives for the file and the results, and what one counts by hand."""

import contextlib
import io
import json

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from odenets.detection import Annotations, AveragePrecision, Found
from odenets.detection.precision import FIGURES, rows
from schemes import SchemeError


def planted(seed: int, masks: bool):
    """A file of pictures with objects of all sizes, crowds and none, and detections with equal scores among them."""
    random = np.random.default_rng(seed)
    images, annotations, found = [], [], {}
    for number in random.permutation(np.arange(3, 15)).tolist():
        height, width = 200, 240
        images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
        boxes = []
        for _ in range(random.integers(0, 9)):
            side = random.choice([15, 60, 160])
            x, y = random.uniform(0, width - side), random.uniform(0, height - side)
            box = [round(float(v), 2) for v in (x, y, side * random.uniform(0.8, 1), side * random.uniform(0.8, 1))]
            boxes.append(box)
            crowd = bool(random.random() < 0.25)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": int(random.integers(1, 4)) * 10,
                    "bbox": box,
                    "area": round(box[2] * box[3] * 0.8, 2),
                    "iscrowd": int(crowd),
                    "segmentation": filled(box, height, width),
                }
            )
        hits = [[v + random.normal(0, 3) for v in box] for box in boxes for _ in range(random.integers(0, 3))]
        stray = [[*random.uniform(0, 90, 2), *random.uniform(5, 70, 2)] for _ in range(random.integers(0, 4))]
        here = torch.tensor([*hits, *stray]).view(-1, 4).clamp(min=1).float()
        corners = torch.cat([here[:, :2], here[:, :2] + here[:, 2:]], 1)
        scores = torch.from_numpy(random.choice([0.25, 0.5, 0.5, 0.75, 0.9], len(here))).float()
        labels = torch.from_numpy(random.integers(0, 3, len(here)))
        drawn = None
        if masks:
            drawn = torch.zeros(len(here), height, width, dtype=torch.bool)
            for mask, box in zip(drawn, here.tolist(), strict=True):
                mask.copy_(torch.from_numpy(triangle(box, height, width)))
        found[number] = Found(corners, scores, labels, drawn)
    categories = [{"id": n, "name": str(n)} for n in (10, 20, 30)]
    return {"images": images, "annotations": annotations, "categories": categories}, found


def triangle(box, height, width):
    """Half of a box: a mask whose area is not the box's."""
    x, y, w, h = box
    down, across = np.mgrid[0:height, 0:width] + 0.5
    return (across > x) & (down < y + h) & ((across - x) / w < (down - y) / h)


def filled(box, height, width):
    """Its run lengths."""
    mask = triangle(box, height, width)
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [not flat[-1]]])))
    return {"size": [height, width], "counts": [int(n) for n in np.diff(edges, prepend=0)]}


def theirs(path, found, kind):
    """What pycocotools says of a file and of results as users hand them in."""
    results = [
        {"image_id": number, "category_id": 10 * (row["label"] + 1), "score": row["score"]}
        | ({"bbox": row["bbox"]} if kind == "bbox" else {"segmentation": row["segmentation"]})
        for number, one in found.items()
        for row in rows(one.best())
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(path)
        counted = COCOeval(truth, truth.loadRes(json.loads(json.dumps(results))), kind)
        counted.evaluate()
        counted.accumulate()
        counted.summarize()
    return counted.stats[: len(FIGURES)].tolist()


@pytest.mark.cases(2)
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_equals_pycocotools(tmp_path, seed, masks):
    held, found = planted(seed, masks)
    path = tmp_path / "val.json"
    path.write_text(json.dumps(held))
    for image in held["images"]:
        (tmp_path / image["file_name"]).touch()
    annotations = Annotations(path, tmp_path, masks=masks)
    precision = AveragePrecision(masks)
    for i in torch.randperm(len(annotations)).tolist():  # in any order
        objects, number = annotations.objects(i), int(annotations.ids[i])
        truth = {f"truth_{name}": value for name, value in objects._asdict().items() if value is not None}
        for _ in range(1 + i % 2):  # some twice, as processes may see them
            precision.add(number, {**truth, "stored": annotations.sizes[i]}, found[number])
    ours = precision.compute()
    assert [ours[name] for name in FIGURES] == theirs(path, found, "bbox")
    assert 0 < ours["AP"] < ours["AP50"] < 1 and -1 not in ours.values()
    if masks:
        assert [ours[f"mask_{name}"] for name in FIGURES] == theirs(path, found, "segm")
        assert ours["mask_AP"] != ours["AP"]
    precision.reset()
    assert set(precision.compute().values()) == {-1.0}


def truth_of(boxes, labels):
    boxes = torch.tensor(boxes).double().view(-1, 4)
    count = len(boxes)
    return {
        "truth_boxes": boxes,
        "truth_labels": torch.tensor(labels, dtype=torch.long),
        "truth_crowd": torch.zeros(count, dtype=torch.bool),
        "truth_area": boxes[:, 2] * boxes[:, 3],
        "stored": torch.tensor([100, 100]),
    }


def test_counted_by_hand():
    """A hit, a miss, a hit: precision 1 up to a recall of one half, 2/3 beyond, at 101 recalls."""
    precision = AveragePrecision()
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60], [20, 20, 30, 30]])
    found = Found(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3, dtype=torch.long))
    precision.add(1, truth_of([[0, 0, 10, 10], [20, 20, 10, 10]], [0, 0]), found)
    assert precision.compute()["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101)


@pytest.mark.parametrize("what", ["annotations", "detections"])
def test_masks_that_are_missing_are_refused(what):
    boxes, masks = torch.tensor([[0.0, 0, 8, 8]]), torch.ones(1, 16, 16, dtype=torch.bool)
    truth, found = truth_of(boxes.tolist(), [0]), Found(boxes, torch.tensor([0.9]), torch.tensor([0]), masks)
    both = {**truth, "truth_masks": masks}, found
    AveragePrecision(masks=True).add(1, *both)
    truth, found = (truth, found) if what == "annotations" else (both[0], found._replace(masks=None))
    with pytest.raises(SchemeError, match=rf"picture 1: .* its {what} have none\n  Give data.masks true"):
        AveragePrecision(masks=True).add(1, truth, found)


def test_sets_without_objects_or_detections():
    nothing = Found(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    precision = AveragePrecision()
    precision.add(1, truth_of([], []), nothing)
    assert precision.compute()["AP"] == -1
    precision.add(2, truth_of([[0, 0, 10, 10]], [1]), nothing)
    assert precision.compute()["AP"] == 0


def test_a_hundred_detections_count():
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(101, 1)
    scores = torch.linspace(0.9, 0.1, 101)
    one = Found(boxes, scores, torch.tensor([1] * 100 + [0])).best()
    assert len(one.scores) == 100 and set(one.labels.tolist()) == {1}
