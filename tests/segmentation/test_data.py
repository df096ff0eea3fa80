"""Folders and tables of pictures with masks: what is found, what is cut, and what is said of what is no good."""

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from odenets.segmentation import DrawnShapes, SegmentationData
from odenets.segmentation.data import Framing, Segments, filled_by_one
from odenets.segmentation.masks import Labels
from odenets.segmentation.pairs import FolderPairs
from odenets.segmentation.pictures import placed
from odenets.shapes import draw
from odenets.training.data import Tally
from odenets.training.errors import DataError
from odenets.training.order import PADDING, Numbered

from .scenes import pair, quadrants, save

WHOLE = Framing(None, None, (16, 16), (1.0, 1.0), 1.0)


def data(where, **options):
    return SegmentationData(**{"root": str(where), "classes": 5, "crop": 16, "num_workers": 0, **options})


@pytest.fixture
def folder(tmp_path):
    """Six pictures to train on, two to validate on, of two sizes."""
    for split, count in (("train", 6), ("val", 2)):
        for i in range(count):
            size = (24, 20) if i % 2 else (30, 32)
            pair(tmp_path, split, f"{split}{i}", quadrants(size, (i % 5, 1, 2, 3)), ".jpg" if i == 3 else ".png")
    return tmp_path


def samples(module, name):
    return [module.sets[name][i] for i in range(len(module.sets[name]))]


def test_pictures_and_masks_of_a_folder(folder):
    module = data(folder)
    module.setup("fit")
    assert [len(module.sets[name]) for name in ("train", "val")] == [6, 2] and module.num_classes == 5
    for i, (x, y) in enumerate(samples(module, "val")):
        size = (24, 20) if i % 2 else (30, 32)
        assert x.shape == (3, size[1], size[0]) and np.array_equal(y, quadrants(size, (i % 5, 1, 2, 3)))
        assert torch.equal(x[0], (y * 50).to(torch.uint8))
    assert module.sets["train"].name(3) == "train3.jpg"


def test_splits_outside_or_inside(tmp_path):
    for split in ("training", "validation"):
        save(tmp_path / split / "img" / "a" / "1.png", np.zeros((4, 4, 3)))
        save(tmp_path / split / "gt" / "a" / "1.png", np.ones((4, 4)))
    module = data(tmp_path)
    assert module.names == {"train": "train", "val": "validation", "test": None}
    module.setup("validate")
    assert module.sets["val"][0][1].unique().tolist() == [1]


def test_ade20k_and_cityscapes_as_they_lie(tmp_path):
    ade, city = tmp_path / "ADEChallengeData2016", tmp_path / "cityscapes"
    for split in ("training", "validation"):
        save(ade / "images" / split / "ADE_1.jpg", np.zeros((20, 30, 3)))
        save(ade / "annotations" / split / "ADE_1.png", quadrants((30, 20), (0, 1, 150, 7)))
    for split in ("train", "val", "test"):
        save(city / "leftImg8bit" / split / "ulm" / "ulm_1_leftImg8bit.png", np.zeros((20, 40, 3)))
        for what, mask in (("labelIds", quadrants((40, 20), (7, 8, 0, 33))), ("color", np.zeros((20, 40)))):
            save(city / "gtFine" / split / "ulm" / f"ulm_1_gtFine_{what}.png", mask)
    one, two = SegmentationData(str(ade), kind="ade20k"), SegmentationData(str(city), kind="cityscapes", short=None)
    one.setup("validate")
    two.setup("validate")
    x, y = one.sets["val"][0]
    assert x.shape == (3, 512, 768) and y.shape == (20, 30)
    assert one.num_classes == 150 and np.array_equal(y, quadrants((30, 20), (-100, 0, 149, 6)))
    assert two.num_classes == 19 and two.classes[18] == "bicycle" and two.framing.crop == (512, 1024)
    assert np.array_equal(two.sets["val"][0][1], quadrants((40, 20), (0, 1, -100, 18)))
    assert two.sets["val"].name(0) == "ulm/ulm_1_leftImg8bit.png"


def test_tables(tmp_path):
    import datasets

    def encoded(levels):
        Image.fromarray(levels.astype(np.uint8)).save(out := io.BytesIO(), "PNG")
        return {"bytes": out.getvalue(), "path": None}

    mask = quadrants((8, 6), (0, 1, 2, 3))
    rows = {"image": [encoded(np.zeros((6, 8, 3)))] * 3, "annotation": [encoded(mask)] * 2 + [encoded(mask * 0 + 4)]}
    features = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image()})
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"{split}.parquet"))
    module = data(tmp_path, val_split="test")
    module.setup("fit")
    assert np.array_equal(module.sets["val"][1][1], mask) and module.sets["val"][2][1].unique().tolist() == [4]
    assert module.sets["val"].name(2) == "test row 2"
    with pytest.raises(DataError, match=r"no column nope; .*\n.*--data.mask_key"):
        data(tmp_path, mask_key="nope")


def test_what_is_cut_shows_the_same_in_picture_and_mask(tmp_path):
    """Red is 50 times the class: away from edges, where the filter mixes, one must give the other."""
    mask = np.kron(np.random.default_rng(0).integers(0, 5, (4, 5)), np.ones((16, 16), int))
    pair(tmp_path, "train", "a", mask)
    framing = Framing(32, None, (24, 40), (0.5, 2.0), 1.0)
    fill = [201, 202, 203]
    pairs = FolderPairs(tmp_path / "images/train", ["a.png"], tmp_path / "masks/train", ["a.png"])
    labels = Labels(5)
    cut = Segments(pairs, torch.arange(1), labels, framing, True, fill, Tally(pairs, 0))
    smaller = 0
    for epoch in range(30):
        x, y = cut[(epoch, 0)]
        assert x.shape == (3, 24, 40) and y.shape == (24, 40)
        beside = y == -100
        smaller += bool(beside.any())
        assert (x[:, beside] == torch.tensor(fill, dtype=torch.uint8)[:, None]).all()
        inner = y[1:-1, 1:-1]
        neighbours = [y[1 + i : 23 + i, 1 + j : 39 + j] for i in (-1, 0, 1) for j in (-1, 0, 1)]
        flat = torch.stack([n == inner for n in neighbours]).all(0) & (inner != -100)
        red = x[0, 1:-1, 1:-1].float() / 50
        assert flat.sum() > 100 and (red[flat] - inner[flat]).abs().max() < 0.3
    assert 0 < smaller < 30


def test_a_mask_is_resized_by_the_pixel_below_the_middle_of_each(tmp_path):
    """At a third of the size that is the middle one of three, in both directions."""
    mask = np.random.default_rng(0).integers(0, 5, (36, 48))
    pair(tmp_path, "train", "a", mask)
    pairs = FolderPairs(tmp_path / "images/train", ["a.png"], tmp_path / "masks/train", ["a.png"])
    framing = Framing(12, None, (12, 16), (1.0, 1.0), 1.0)
    cut = Segments(pairs, torch.arange(1), Labels(5), framing, True, [0, 0, 0], Tally(pairs, 0))
    assert np.array_equal(cut[(0, 0)][1], mask[1::3, 1::3])


def test_joined_splits_follow_each_other(tmp_path):
    for number, (split, count) in enumerate((("train", 2), ("test", 3))):
        for i in range(count):
            save(tmp_path / split / "images" / f"{split}{i}.png", np.zeros((4, 4, 3)))
            if (split, i) != ("test", 1):
                save(tmp_path / split / "masks" / f"{split}{i}.png", np.full((4, 4), number + i))
    module = data(tmp_path, train_split="train + test", holdout=0.2)
    with pytest.warns(UserWarning, match=r"test1\.png"):
        module.setup("fit")
    joined = module._pairs("train+test")
    assert [joined.name(i) for i in range(5)] == ["train0.png", "train1.png", "test0.png", "test1.png", "test2.png"]
    assert [str(joined.picture(i)).rpartition("/")[2] for i in range(5)] == [joined.name(i) for i in range(5)]
    assert joined.lacking() == [3]
    labels = [[int(c) for c in y.unique() if c >= 0] for use in ("train", "val") for _, y in samples(module, use)]
    assert sorted(labels) == [[0], [1], [1], [3]]


def test_what_is_drawn_follows_from_the_seed_the_epoch_and_the_place(folder):
    first, second = data(folder, scales=(0.5, 2.0)), data(folder, scales=(0.5, 2.0))
    for module in (first, second):
        module.setup("fit")
        module.sets["train"].seed = 5
    torch.rand(3)  # the global generator does not matter
    a, b = first.sets["train"], second.sets["train"]
    for request in ((0, 2), (1, 2), (1, 0), (0, 2)):
        assert all(torch.equal(p, q) for p, q in zip(a[request], b[request], strict=True))
    assert not torch.equal(a[(0, 2)][0], a[(1, 2)][0])
    b.seed = 6
    assert not torch.equal(a[(0, 2)][0], b[(0, 2)][0])


def test_a_box_that_one_class_fills_is_drawn_again(tmp_path):
    mask = np.zeros((64, 64), int)
    mask[24:40, 24:40] = 1
    pair(tmp_path, "train", "a", mask)
    pair(tmp_path, "val", "b", mask)
    shares = {}
    for most in (0.75, 1.0):
        module = data(tmp_path, scales=(1.0, 1.0), most=most, classes=2)
        module.setup("fit")
        parts = [module.sets["train"][(epoch, 0)][1] for epoch in range(40)]
        shares[most] = sum(filled_by_one(part, 0.75) for part in parts) / 40
    assert shares[0.75] < 0.5 * shares[1.0]


def test_sizes():
    assert WHOLE.size(30, 20) == (30, 20)
    assert Framing(512, 2048, (1, 1), (1, 1), 1).size(683, 512) == (683, 512)
    assert Framing(512, 2048, (1, 1), (1, 1), 1).size(400, 100, 2.0) == (4096, 1024)
    assert Framing(512, 1000, (1, 1), (1, 1), 1).size(400, 100) == (1000, 250)
    assert Framing(None, 100, (1, 1), (1, 1), 1).size(400, 200) == (100, 50)
    assert Framing(None, 100, (1, 1), (1, 1), 1).size(40, 20) == (40, 20)  # a limit enlarges nothing


def spoil(folder, kind):
    """A picture or a mask that is no good, of the first training and the first validation picture."""
    for split in ("train", "val"):
        mask, picture = folder / "masks" / split / f"{split}0.png", folder / "images" / split / f"{split}0.png"
        if kind == "missing":
            mask.unlink()
        elif kind == "size":
            save(mask, np.zeros((5, 5)))
        elif kind == "label":
            save(mask, np.full((32, 30), 9))
        elif kind == "mask":
            mask.write_bytes(b"nothing")
        else:
            picture.write_bytes(picture.read_bytes()[:50])


SAYS = {
    "missing": "it has no mask",
    "size": "its mask is 5x5, and the picture 30x32",
    "label": "its mask holds 9; classes are 0 to 4, beside 255",
    "mask": "its mask: it is no picture",
    "picture": "",
}


@pytest.mark.parametrize("kind", SAYS)
def test_what_is_no_good_is_named_counted_and_limited(folder, kind):
    spoil(folder, kind)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        module = data(folder)
        module.setup("fit")
        train, val = (samples(module, name) for name in ("train", "val"))
        samples(module, "val")  # said once
    texts = [str(w.message) for w in said if "cannot be read" in str(w.message)]
    assert [text.split()[0] for text in texts] == ["train0.png", "val0.png"]
    assert all(SAYS[kind] in text and "data.max_unreadable=10" in text for text in texts)
    # Nothing is counted twice: the good picture once, and what stands in for the bad one not at all.
    counted = [bool((y != -100).any()) for _, y in val]
    assert sum(counted) == 1 and len(train) == (5 if kind == "missing" else 6)
    assert all(bool((y != -100).any()) for _, y in train)
    module = data(folder, max_unreadable=0)
    with pytest.raises(DataError, match=r"1 pictures cannot be read: train0.png\n.*data.max_unreadable=0"):
        module.setup("fit")
        samples(module, "train")


def test_a_picture_that_is_repeated_for_another_process_is_not_counted(folder):
    module = data(folder)
    module.setup("validate")
    numbered = Numbered(module.sets["val"], 0)
    assert bool((numbered[1][1] != -100).all()) and bool((numbered[(PADDING, 1)][1] == -100).all())
    assert bool((module.sets["val"][1][1] != -100).all())  # the data set keeps its own


def test_a_split_without_masks_is_for_predictions_alone(folder):
    for i in range(2):
        save(folder / "images" / "test" / f"t{i}.png", np.zeros((7, 9, 3)))
    module = data(folder)
    module.setup("predict")
    x, y = module.sets["predict"][1]
    assert x.shape == (3, 7, 9) and y.shape == (7, 9) and module.predicted_name(1) == "t1.png"
    module.setup("test")
    assert module.sets["test"] is module.sets["val"]
    for asked, stage in (("val", "validate"), ("test", "test")):
        with pytest.raises(DataError, match=r"none of 2 pictures has a mask, t0.png first\n.*--data.masks"):
            data(folder, **{f"{asked}_split": "test"}).setup(stage)
    alone = SegmentationData(predict_root=str(folder / "images" / "test"), classes=5)
    alone.setup("predict")
    assert len(alone.sets["predict"]) == 2
    with pytest.raises(DataError, match="predict_root alone"):
        alone.setup("fit")


def test_a_run_that_only_tests_needs_no_other_split(tmp_path):
    for i in range(2):
        pair(tmp_path, "test", str(i), np.zeros((4, 4), int))
    module = data(tmp_path)
    module.setup("test")
    assert len(module.sets["test"]) == 2
    with pytest.raises(DataError, match="no split to train on"):
        module.setup("fit")


@pytest.mark.parametrize("names", [("train", "training"), ("val", "valid"), ("Test", "eval")])
@pytest.mark.parametrize("where", ["images/{}", "{}/images"])
def test_two_folders_of_one_split_are_refused(tmp_path, where, names):
    (tmp_path / "dev").mkdir()  # holds no pictures
    for name in names:
        save(tmp_path / where.format(name) / "1.png", np.zeros((4, 4, 3)))
    with pytest.raises(DataError, match=rf"holds {names[0]} and {names[1]}, which both name the split .*\n  Take one"):
        data(tmp_path)


def test_pictures_of_joined_splits_have_names_of_their_own(tmp_path):
    for split, ending in (("train", "png"), ("val", "jpg"), ("test", "png")):
        save(tmp_path / "images" / split / f"{'b' if split == 'test' else 'a'}.{ending}", np.zeros((4, 4, 3)))
    names = {}
    for joined in ("validation+train", "validation+test"):
        module = data(tmp_path, test_split=joined, train_split="test" if "train" in joined else None)
        module.setup("predict")
        names[joined] = [placed(module.predicted_name(i)).as_posix() for i in range(2)]
    assert names == {"validation+train": ["validation/a.png", "train/a.png"], "validation+test": ["a.png", "b.png"]}


@pytest.mark.parametrize("kind", ["ade20k", "cityscapes"])
@pytest.mark.parametrize(
    ("way", "want"),
    [({"ids": [3, 4]}, [0, 1, -100]), ({"reduce_labels": True, "classes": 4}, [2, 3, -100]), ({"palette": None}, [])],
)
def test_how_classes_are_stored_overrides_a_preset(tmp_path, kind, way, want):
    pair(tmp_path, "train", "1", quadrants((4, 4), (3, 4, 0, 1)))
    way = {name: [[0, 0, 0], [1, 1, 1]] if value is None else value for name, value in way.items()}
    named = {"images": "images", "masks": "masks", "image_suffix": "", "mask_suffix": ""}
    module = data(tmp_path, **{"kind": kind, "classes": 2, "short": None, **named, **way})
    assert module.framing.longest == 2048  # of the preset
    assert module.labels.classes_of(np.array([3, 4, 0]) if want else np.array([0, 1])).tolist() == (want or [0, 1])


def test_masks_without_pictures_are_said(folder):
    save(folder / "masks" / "val" / "extra.png", np.zeros((2, 2)))
    with pytest.warns(UserWarning, match=r"1 masks have no picture, extra.png first"):
        data(folder)


def test_held_out_where_there_is_no_validation_split(tmp_path):
    for i in range(10):
        pair(tmp_path, "train", str(i), np.zeros((4, 4), int))
    module = data(tmp_path)
    module.setup("fit")
    train, val = (set(module.sets[name].indices.tolist()) for name in ("train", "val"))
    assert len(val) == 1 and not train & val and train | val == set(range(10))


@pytest.mark.parametrize("trained", [None, "train+validation", "train+test", "train+validation+test", "test"])
def test_no_picture_is_both_trained_on_and_evaluated_on(folder, trained):
    for i in range(2):
        pair(folder, "test", f"t{i}", np.zeros((4, 4), int))
    module = data(folder, train_split=trained)
    module.setup("fit"), module.setup("test")
    names = {use: {part.name(i) for i in range(len(part))} for use, part in module.sets.items()}
    assert names["train"] and names["val"] and not names["train"] & (names["val"] | names["test"])


@pytest.mark.parametrize("use", ["val", "test"])
@pytest.mark.parametrize(
    ("trained", "given"), [(None, "train"), ("train+validation", "validation"), (None, "test+train")]
)
def test_a_split_to_evaluate_on_that_is_trained_on_is_refused(folder, use, trained, given):
    pair(folder, "test", "t", np.zeros((4, 4), int))
    with pytest.raises(DataError, match=rf"data.{use}_split: '\w+' of .* is trained on.*\n  Name a split"):
        data(folder, train_split=trained, **{f"{use}_split": given})
    with pytest.raises(DataError, match=rf"data.{use}_split: test\+test names a split of .* twice\n"):
        data(folder, **{f"{use}_split": "test + test"})


def test_drawn_shapes_are_those_of_their_numbers():
    module = DrawnShapes(train=3, val=2, size=16)
    module.setup("fit")
    want = [draw(number, 16) for number in range(5)]
    found = samples(module, "train") + samples(module, "val")
    for (x, y), drawing in zip(found, want, strict=True):
        assert np.array_equal(x.permute(1, 2, 0), drawing.picture) and np.array_equal(y, drawing.mask)


@pytest.mark.parametrize(
    ("option", "value"), [("train", 0), ("val", 0), ("size", 8), ("texture", -1.0), ("texture", float("nan"))]
)
def test_shapes_that_cannot_be_drawn_are_refused(option, value):
    with pytest.raises(DataError, match=f"DrawnShapes: .*{option}={value}"):
        DrawnShapes(**{option: value})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"classes": None}, "data.classes: how many"),
        ({"classes": ["sky", "sea", "sky"]}, "data.classes: 'sky' names two"),
        ({"crop": [3]}, "data.crop"),
        ({"short": 0}, "data.short=0"),
        ({"scales": (2.0, 1.0)}, "data.scales"),
        ({"most": 0}, "data.most"),
        ({"holdout": 1.0}, "data.holdout"),
        ({"train_split": "nope"}, "no split 'nope' in .*; it has train, validation"),
        ({"images": "nope"}, "neither a folder of pictures nor a table"),
        ({"root": "/nowhere"}, "no folder '/nowhere'"),
        ({"root": None, "hub": "a/b"}, "is not on this machine"),
        ({"hub": "a/b"}, "'a/b' are two sources, and one would be ignored"),
        ({"predict_root": "/nowhere"}, "no pictures in"),
        ({"reduce_labels": True, "ids": [1, 2, 3, 4, 5]}, "both say"),
    ],
)
def test_refuses(folder, options, says):
    with pytest.raises(DataError, match=says):
        data(folder, **options)


@pytest.mark.parametrize("kind", ["ade20k", "cityscapes"])
@pytest.mark.parametrize(
    ("options", "ids", "colored"),
    [
        ({"palette": [[0, 0, 0], [9, 0, 0]]}, [0, 1], True),
        ({"ids": [4, 5]}, [4, 5], False),
        ({"reduce_labels": True}, [1, 2], False),
    ],
)
def test_what_is_given_of_masks_takes_the_place_of_what_is_known(folder, kind, options, ids, colored):
    names = {"images": "images", "masks": "masks", "image_suffix": "", "mask_suffix": ""}
    labels = data(folder, kind=kind, classes=2, **names, **options).labels
    assert labels.ids == ids and (labels.colors is not None) == colored


def test_two_pictures_of_one_name_are_refused(folder):
    save(folder / "images" / "val" / "val0.jpg", np.zeros((2, 2, 3)))
    with pytest.raises(DataError, match=r"val0.jpg and val0.png, which would have one mask"):
        data(folder)


def test_a_checkpoint_of_other_classes_is_refused(folder):
    module = data(folder, classes=["sky", "sea", "sand", "ship", "sun"])
    module.load_state_dict(module.state_dict())
    with pytest.raises(DataError, match="class 3 is 'ship', and 'gull' in the checkpoint"):
        module.load_state_dict({"classes": ["sky", "sea", "sand", "gull", "sun"]})
