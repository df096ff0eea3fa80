"""COCO files as arrays: what is read is what was drawn, and what is wrong is named, counted and limited."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from odenets import shapes
from odenets.detection import Annotations, DetectionData
from odenets.detection.annotations import decoded, unpacked
from odenets.training import DataError


def test_what_is_read_is_what_was_drawn(drawn):
    found = Annotations(drawn / "annotations/val.json", drawn / "images/val", masks=True)
    assert found.classes == list(shapes.CLASSES[1:]) and found.category_ids == [1, 2, 3, 4] and len(found) == 9
    counts = []
    for i in range(len(found)):
        drawing = shapes.draw(12 + i, 48, seed=9)
        objects = found.objects(i)
        corners = torch.cat([objects.boxes[:, :2], objects.boxes[:, :2] + objects.boxes[:, 2:]], 1)
        assert corners.tolist() == [list(shape.box) for shape in drawing.shapes]
        assert objects.labels.tolist() == [shape.label - 1 for shape in drawing.shapes]
        assert objects.masks is not None and objects.masks.shape == (len(drawing.shapes), 48, 48)
        assert all(
            np.array_equal(a, shape.mask) for a, shape in zip(objects.masks.numpy(), drawing.shapes, strict=True)
        )
        assert objects.area.tolist() == [shape.mask.sum() for shape in drawing.shapes]
        counts.append(len(drawing.shapes))
    assert 0 in counts and max(counts) > 1
    part = found.with_boxes()
    assert len(part) == sum(count > 0 for count in counts) and all(len(part.objects(i).boxes) for i in range(len(part)))


def small(folder: Path) -> dict:
    """Two pictures of 20 x 10 pixels with one box each, as a file that a test may spoil."""
    (folder / "train").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 10), "gray").save(folder / "train" / name)
    box = {"bbox": [2, 3, 8, 5], "category_id": 7, "iscrowd": 0, "area": 40}
    polygon = {"segmentation": [[2, 3, 10, 3, 10, 8, 2, 8]]}
    return {
        "images": [
            {"id": n, "file_name": name, "width": 20, "height": 10} for n, name in ((11, "a.png"), (12, "b.png"))
        ],
        "annotations": [{"id": 100 + n, "image_id": n, **box, **polygon} for n in (11, 12)],
        "categories": [{"id": 7, "name": "thing"}],
    }


def opened(folder: Path, held: dict, **options) -> Annotations:
    (folder / "train.json").write_text(json.dumps(held))
    return Annotations(folder / "train.json", folder / "train", masks=True, **options)


# What is changed in the first annotation, what is said of it, and how many objects are left.
FAULTS = {
    "outside": ({"bbox": [20, 0, 5, 5]}, "its box [20, 0, 5, 5] lies outside the 20x10 pixels", 1),
    "beyond": ({"bbox": [-9, 0, 9, 5]}, "its box [-9, 0, 9, 5] lies outside the 20x10 pixels", 1),
    "sticks out": ({"bbox": [15, 2, 8, 5]}, "its box [15, 2, 8, 5] sticks out of the 20x10 pixels", 2),
    "empty": ({"bbox": [2, 3, 0, 5]}, "its box [2, 3, 0, 5] is empty", 1),
    "no box": ({"bbox": [2, 3, 8]}, "its box is [2, 3, 8]", 1),
    "no number": ({"bbox": [2, 3, 8, float("nan")]}, "its box is [2, 3, 8, nan]", 1),
    "category": ({"category_id": 8}, "no category has the id 8", 1),
    "picture": ({"image_id": 99}, "no picture has the id 99", 1),
    "mask": (
        {"segmentation": {"size": [10, 21], "counts": [210]}},
        "its mask is of size [10, 21], the picture's height and width are [10, 20]",
        1,
    ),
    "runs": ({"segmentation": {"size": [10, 20], "counts": [3, 4]}}, "the run lengths of its mask do not add up", 1),
    "no mask": ({"segmentation": []}, "it has no mask", 1),
    "text": ({"segmentation": {"size": [10, 20], "counts": "1\n"}}, "the text of its mask is no run lengths", 1),
    "far": ({"segmentation": [[0, 0, 9e9, 0, 5, 5]]}, "its mask reaches far beyond the 20x10 pixels", 1),
    "area": ({"area": "large"}, "its area is large", 1),
    "area below 0": ({"area": -40}, "its area is -40", 1),
    "crowd": ({"iscrowd": "no"}, "its iscrowd is 'no', want 0 or 1", 1),
    "list for a number": ({"image_id": [11]}, "no picture has the id [11]", 1),
    "line": ({"segmentation": [[1, 1, 2, 2]]}, "it has no mask", 1),
    "mask of null": ({"segmentation": None}, "it has no mask", 1),
    "box of null": ({"bbox": None}, "its box is None", 1),
    "box of texts": ({"bbox": ["2", "3", "8", "5"]}, "its box is ['2', '3', '8', '5']", 1),
    "endless": ({"bbox": [2, 3, 8, 10**400]}, "its box is [2, 3, 8, 1000", 1),
    "area as a text": ({"area": "40"}, "its area is 40 (a text), want a number", 1),
    "crowd as no number": ({"iscrowd": float("nan")}, "its iscrowd is nan, want 0 or 1", 1),
    "same id": ({}, "annotation 111 (b.png): another one has this id", 2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_annotations_are_named_counted_and_left_out(fault, tmp_path):
    change, said, left = FAULTS[fault]
    held = small(tmp_path)
    held["annotations"][0] |= change
    if fault == "same id":
        held["annotations"][1]["id"] = 111
    with pytest.warns(UserWarning, match=re.escape(said)) as seen:
        found = opened(tmp_path, held)
    assert "1 entries are wrong, data.max_faults=10" in str(seen[0].message)
    assert "annotation 111" in str(seen[0].message)
    assert sum(len(found.objects(i).boxes) for i in range(2)) == left
    with pytest.raises(DataError, match=re.escape(said)) as stop:
        opened(tmp_path, held, max_faults=0)
    assert "data.max_faults=0" in str(stop.value)


@pytest.mark.parametrize("key", ["image_id", "category_id"])
def test_true_is_no_id_although_it_equals_one(key, tmp_path):
    text = json.dumps(small(tmp_path)).replace('"id": 11', '"id": 1').replace('"id": 7', '"id": 1')
    held = json.loads(text)
    for entry in held["annotations"]:
        entry.update(image_id=1, category_id=1)
    held["annotations"][0][key] = True
    with pytest.warns(UserWarning, match="has the id True"):
        found = opened(tmp_path, held)
    assert len(found.objects(0).boxes) == 1


def test_a_missing_picture_is_named_with_what_it_shows_left_out(tmp_path):
    held = small(tmp_path)
    (tmp_path / "train/a.png").unlink()
    with pytest.warns(UserWarning, match=r"1 entries are wrong.*picture 11, .*a\.png, is not there"):
        found = opened(tmp_path, held)
    assert found.ids.tolist() == [12] and len(found.objects(0).boxes) == 1


def test_a_rounded_edge_is_no_fault(tmp_path):
    held = small(tmp_path)
    held["annotations"][0]["bbox"] = [11.5, 2.5, 9, 8]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert opened(tmp_path, held).objects(0).boxes.tolist() == [[11.5, 2.5, 9, 8]]


def test_null_is_as_left_out(tmp_path):
    """An area is then that of the box, no object is a crowd, and masks that nobody asked for may be missing."""
    held = small(tmp_path)
    held["annotations"][0] |= {"area": None, "iscrowd": None, "bbox": [2, 3, 8.5, 4]}
    for key in ("area", "iscrowd", "id"):
        del held["annotations"][1][key]
    held["annotations"].append({**held["annotations"][0], "id": 7, "area": 3.5, "segmentation": None})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tmp_path / "train.json").write_text(json.dumps(held))
        found = Annotations(tmp_path / "train.json", tmp_path / "train")
    first, second = found.objects(0), found.objects(1)
    assert first.area.tolist() == [34, 3.5] and second.area.tolist() == [40]
    assert not first.crowd.any() and not second.crowd.any()


def test_classes_are_the_categories_in_the_order_of_their_ids_whatever_gaps_there_are(tmp_path):
    held = small(tmp_path)
    held["categories"] = [{"id": n, "name": f"thing {n}"} for n in (90, 7, 18)]
    held["annotations"][1]["category_id"] = 90
    found = opened(tmp_path, held)
    assert found.category_ids == [7, 18, 90] and found.classes == ["thing 7", "thing 18", "thing 90"]
    assert [found.objects(i).labels.tolist() for i in range(2)] == [[0], [2]]


SPOILT = {
    "same id": (lambda h: h["images"][1].update(id=11), "two pictures have the id 11"),
    "elsewhere": (lambda h: h["images"][0].update(file_name="../a.png"), "lies at '../a.png'"),
    "absolute": (lambda h: h["images"][0].update(file_name="/a.png"), "lies at '/a.png'"),
    "no size": (lambda h: h["images"][0].pop("width"), "lacks an entry"),
    "size": (lambda h: h["images"][0].update(width=0), "has the name 'a.png' and 0 x 10 pixels"),
    "categories": (lambda h: h.pop("categories"), "no list of categories"),
    "category": (lambda h: h["categories"].append({"id": 7, "name": "other"}), "two categories have the id 7"),
    "id as a text": (lambda h: h["categories"][0].update(id="7"), "a category has the id '7' and the name 'thing'"),
    "id and a half": (lambda h: h["categories"][0].update(id=7.5), "a category has the id 7.5"),
    "no name": (lambda h: h["categories"][0].update(name=None), "a category has the id 7 and the name None"),
    "nameless": (lambda h: h["categories"][0].pop("name"), "lacks its id or its name"),
    "no entry": (lambda h: h["categories"].append(7), "category 7 lacks its id or its name"),
    "long id": (lambda h: h["images"][0].update(id=1 << 63), "picture 9223372036854775808 has the name 'a.png'"),
    "no file": (lambda h: h["images"][0].update(file_name=None), "picture 11 has the name None"),
    "no category": (lambda h: h["categories"].clear(), "it has no categories"),
    "no pictures": (lambda h: h["images"].clear(), "it lists no pictures"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_files_that_mean_nothing_are_refused(fault, tmp_path):
    held = small(tmp_path)
    SPOILT[fault][0](held)
    with pytest.raises(DataError, match=re.escape(SPOILT[fault][1])) as stop:
        opened(tmp_path, held)
    assert len(str(stop.value).splitlines()) == 2


def test_masks_are_those_of_pycocotools(tmp_path):
    held = small(tmp_path)
    corners = [[3.2, 1.1, 15.9, 2.0, 9.4, 8.7], [1, 7, 4, 7, 4, 9]]
    held["annotations"][0]["segmentation"] = corners
    held["annotations"][1]["segmentation"] = {"size": [10, 20], "counts": [13, 4, 150, 20, 13]}
    held["annotations"][1]["iscrowd"] = 1
    found = opened(tmp_path, held)
    theirs = COCO(tmp_path / "train.json")
    for i, number in enumerate((111, 112)):
        masks = found.objects(i).masks
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of pycocotools under NumPy 2
            want = theirs.annToMask(theirs.anns[number]) > 0
        assert masks is not None and np.array_equal(masks[0].numpy(), want)
    packed = theirs.annToRLE(theirs.anns[112])
    text = {**packed, "counts": packed["counts"].decode()}
    assert unpacked(text["counts"]) == [13, 4, 150, 20, 13]
    assert np.array_equal(decoded(text, 10, 20), decoded(held["annotations"][1]["segmentation"], 10, 20))


def test_a_picture_of_another_size_is_replaced_and_named(tmp_path):
    held = small(tmp_path)
    held["images"][0].update(width=10, height=20)
    held["annotations"][0]["bbox"] = [1, 1, 5, 5]
    held["annotations"][0]["segmentation"] = [[1, 1, 6, 1, 6, 6]]
    (tmp_path / "train.json").write_text(json.dumps(held))
    (tmp_path / "val.json").write_text(json.dumps(held))
    data = DetectionData(str(tmp_path), size=20, train_pictures="train", val_pictures="train", multiple=4)
    data.setup("fit")
    with pytest.warns(UserWarning, match=r"a\.png cannot be read \(it has 20x10 pixels, its annotations say 10x20\)"):
        _, target = data.sets["train"][0]
    assert int(target["picture"]) == 12
    data = DetectionData(str(tmp_path), size=20, train_pictures="train", val_pictures="train", max_unreadable=0)
    data.setup("fit")
    with pytest.raises(DataError, match=r"1 pictures cannot be read: a\.png"):
        data.sets["train"][0]


def test_files_are_found_by_their_names(tmp_path):
    held = small(tmp_path)
    (tmp_path / "train").rename(tmp_path / "train2017")
    (tmp_path / "annotations").mkdir()
    for name in ("instances_train2017", "captions_train2017", "person_keypoints_train2017", "instances_val2017"):
        (tmp_path / "annotations" / f"{name}.json").write_text(json.dumps(held))
    data = DetectionData(str(tmp_path), val_pictures="train2017")
    train, val = (data.places[name] for name in ("train", "val"))
    assert train == (tmp_path / "annotations/instances_train2017.json", tmp_path / "train2017")
    assert val is not None and val[0].name == "instances_val2017.json" and data.places["test"] is None
    assert data.num_classes == 1
    (tmp_path / "annotations/train_b.json").write_text(json.dumps(held))
    with pytest.raises(DataError, match="several files name train"):
        DetectionData(str(tmp_path), val_pictures="train2017")


OTHER = {"annotations": "train.json", "pictures": "other"}


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("given", [("annotations", "pictures"), ("pictures",)])
def test_splits_that_share_a_file_have_their_own_pictures(tmp_path, split, given):
    (tmp_path / "train.json").write_text(json.dumps(small(tmp_path)))
    (tmp_path / "val.json").write_text((tmp_path / "train.json").read_text())
    (tmp_path / "other").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 10), "white").save(tmp_path / "other" / name)
    options = {f"{split}_{kind}": OTHER[kind] for kind in given}
    data = DetectionData(str(tmp_path), size=20, **{"val_pictures": "train", "train_pictures": "train", **options})
    data.setup("fit"), data.setup("test"), data.setup("predict")
    mean = {name: float(data.sets[name].picture(0).getpixel((0, 0))[0]) for name in data.sets}
    white = {"val": {"val", "test", "predict"}, "test": {"test", "predict"}}[split]
    assert mean == {name: 255 if name in white else 128 for name in ("train", "val", "test", "predict")}
    with pytest.raises(DataError, match=f"data.{split}_pictures: no folder"):
        DetectionData(str(tmp_path), **{**options, f"{split}_pictures": "nowhere"})


def test_splits_that_share_a_file_and_its_pictures_read_it_once(tmp_path):
    held = json.dumps(small(tmp_path))
    for name in ("train.json", "val.json"):
        (tmp_path / name).write_text(held)
    data = DetectionData(str(tmp_path), test_annotations="val.json", test_pictures="train", val_pictures="train")
    data.setup("fit"), data.setup("test")
    assert data.sets["val"].shown is data.sets["test"].shown is not data.sets["train"].shown


def test_splits_name_the_same_categories(tmp_path):
    held = small(tmp_path)
    (tmp_path / "train.json").write_text(json.dumps(held))
    other = {**held, "categories": [{"id": 7, "name": "animal"}]}
    (tmp_path / "val.json").write_text(json.dumps(other))
    data = DetectionData(str(tmp_path), val_pictures="train")
    with pytest.raises(DataError, match=r"category 7 is 'thing' in .*train.json, and 'animal' in .*val.json"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"root": "nowhere"}, "no folder"),
        ({"jitter": (2.0, 1.0)}, "data.jitter"),
        ({"resize": "crop"}, "data.resize"),
        ({"flip": 2.0}, "data.flip"),
        ({"scales": [0]}, "data.scales"),
        ({"scales": []}, "data.scales=[]"),
        ({"longest": 0}, "data.longest=0"),
        ({"longest": -5}, "data.longest=-5"),
        ({"mean": []}, "data.mean=[]"),
        ({"std": []}, "data.std=[]"),
        ({"std": [0.2, 0.2, 0.0]}, "data.std=[0.2, 0.2, 0.0]"),
        ({"mean": [0.5, 0.5, float("nan")]}, "data.mean"),
        ({"test_pictures": "none"}, "data.test_pictures: no folder"),
        ({"train_annotations": "none.json"}, "data.train_annotations: no file"),
        ({"val_pictures": "none"}, "data.val_pictures: no folder"),
    ],
)
def test_options_out_of_range_are_refused(option, said, drawn):
    with pytest.raises(DataError, match=re.escape(said)):
        DetectionData(**{"root": str(drawn), **option})


@pytest.mark.parametrize("use", ["val", "test"])
@pytest.mark.parametrize("trained", [None, "train.json", "a/../train.json"])
def test_a_file_to_evaluate_on_that_is_trained_on_is_refused(tmp_path, use, trained):
    (tmp_path / "train.json").write_text(json.dumps(small(tmp_path)))
    (tmp_path / "a").mkdir()
    says = rf"data.{use}_annotations: .*train.json is trained on, .*\n  Name a file"
    with pytest.raises(DataError, match=says):
        DetectionData(str(tmp_path), train_annotations=trained, **{f"{use}_annotations": "train.json"})


@pytest.mark.parametrize("use", ["val", "test"])
def test_a_file_that_is_trained_on_by_name_is_not_evaluated_on_by_its_own(tmp_path, use):
    held = small(tmp_path)
    (tmp_path / "val").symlink_to(tmp_path / "train")
    for name in ("train.json", "val.json", *["test.json"] * (use == "test")):
        (tmp_path / name).write_text(json.dumps(held))
    data = DetectionData(str(tmp_path), train_annotations=f"{use}.json", train_pictures="train", test_pictures="val")
    # Pictures to test on, without a file of their own, have that of validation.
    assert data.places[use] == (None if use == "val" else (tmp_path / "val.json", tmp_path / "val"))
    if use == "val":
        with pytest.raises(DataError, match=r"no annotations of val beside val.json\n"):
            data.setup("fit")
    else:
        data.setup("fit"), data.setup("test")
        assert data.sets["test"].shown.path.name == "val.json"
