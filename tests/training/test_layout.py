"""Which files are of which split and class: as `datasets.load_dataset` says, for any layout; and where we differ."""

import gc
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

from odenets.training import DataError, Images
from odenets.training import layout as L
from odenets.training.splits import open_splits

from .pictures import encoded, picture

EXAMPLES = int(os.environ.get("ODENETS_LAYOUTS", 12))
# Which of Arrow's view types this `datasets` knows.
DATASETS = Version(datasets.__version__)
STRING_VIEW, BINARY_VIEW = DATASETS >= Version("4.1"), DATASETS >= Version("4.3")
TEXTS_OF_PANDAS = DATASETS >= Version("3.6") or Version(pandas.__version__) < Version("3")
PNG = encoded(picture(0, (4, 4)))["bytes"]
# Names of splits, as a word of a longer name too; and names that only look like them.
train = st.sampled_from(["train", "training", "my_train", "train-2", "old train.1", "set1-training_a"])
validation = st.sampled_from(["val", "valid", "validation", "dev", "x.val", "valid-2"])
test = st.sampled_from(["test", "testing", "eval", "evaluation", "my_test", "test_0"])
plain = st.sampled_from(["cat", "dog", "tube", "trainer", "contest", "evaluated", "valley", "01", "a b"])
noise = st.sampled_from(
    [".hidden/9.png", "__MACOSX/cat/9.png", "__MACOSX/train/9.png", ".git/train/cat/9.png", "notes.dat", "._9.png"]
)


def write(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(PNG)
    return root


def table(file: Path, labels, n: int | None = None, column: str = "label") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": PNG, "path": None}] * (len(labels) if n is None else n)
    held = {"image": cells} | ({} if n is not None else {column: labels})
    pq.write_table(pa.table(held), file)


@st.composite
def picture_layouts(draw):
    """Files of pictures: with or without folders of splits, and class folders at one depth; or flat ones."""
    inside = draw(st.sampled_from(["", "set/", "a/b/"]))
    middle = draw(st.sampled_from(["", "images/"]))
    shape = draw(st.sampled_from(["splits", "classes", "flat", "files", "uneven"]))
    classes = draw(st.lists(plain, min_size=1, max_size=3, unique=True))
    if shape == "flat":
        return [f"{inside}{i}.png" for i in range(draw(st.integers(1, 3)))]
    if shape == "classes":
        return [f"{inside}{middle}{name}/{i}.png" for name in classes for i in range(draw(st.integers(1, 2)))]
    if shape == "uneven":
        return [f"{inside}{name}/{'deep/' * (i % 2)}{i}.png" for name in classes for i in range(2)]
    if shape == "files":
        names = draw(st.lists(st.one_of(train, validation, test, plain), min_size=1, max_size=4, unique=True))
        return [f"{inside}{name}/{file}.png" for name in classes for file in names]
    splits = draw(st.lists(st.one_of(train, validation, test, plain), min_size=1, max_size=4, unique=True))
    # Two classes in each split: load_dataset gives no labels to a first split of one class, whatever the others hold.
    held = st.lists(st.sampled_from(classes), min_size=min(2, len(classes)), unique=True)
    return [f"{inside}{split}/{middle}{name}/{i}.png" for split in splits for name in draw(held) for i in range(2)]


def ours(root: Path) -> dict:
    splits = open_splits(root)
    images = Images(str(root))
    found = {}
    for name, source in splits.items():
        numbers = images.splits[name].labels.tolist()
        found[name] = sorted((source.name(i), images.classes[n] if n >= 0 else None) for i, n in enumerate(numbers))
    return found


def theirs(root: Path) -> dict:
    found = {}
    for name, split in datasets.load_dataset(str(root), streaming=True).items():
        names = getattr(split.features.get("label") if split.features else None, "names", None)
        rows = split.cast_column("image", datasets.Image(decode=False))
        found[str(name)] = sorted(
            (str(Path(row["image"]["path"]).relative_to(root.resolve())), names and names[row["label"]]) for row in rows
        )
    return found


@settings(max_examples=EXAMPLES)
@given(paths=picture_layouts(), extra=st.lists(noise, max_size=2, unique=True))
def test_pictures_are_in_the_splits_and_classes_of_load_dataset(paths, extra):
    with TemporaryDirectory() as folder:
        root = write(Path(folder).resolve(), *paths, *extra)
        assert ours(root) == theirs(root)


@st.composite
def parquet_layouts(draw):
    inside = draw(st.sampled_from(["", "data/", "x/"]))
    if draw(st.booleans()):
        names = draw(st.lists(st.sampled_from(["train", "test", "validation", "extra"]), min_size=1, unique=True))
        return [f"{inside}{name}-{i:05}-of-00002.parquet" for name in names for i in range(2)]
    names = draw(st.lists(st.one_of(train, validation, test, plain), min_size=1, max_size=4, unique=True))
    if draw(st.booleans()):
        return [f"{inside}{name}/0.parquet" for name in names]
    return [f"{inside}{name}.parquet" for name in names]


@settings(max_examples=EXAMPLES)
@given(parquet_layouts())
def test_parquet_files_are_in_the_splits_of_load_dataset(paths):
    with TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        for number, path in enumerate(paths):
            table(root / path, [number, number])
        expected = {
            str(name): sorted(row["label"] for row in split.select_columns("label"))
            for name, split in datasets.load_dataset(str(root), streaming=True).items()
        }
        assert {name: sorted(source.labels.tolist()) for name, source in open_splits(root).items()} == expected


@given(st.sampled_from(list(L.SPLITS)), st.data())
def test_capitals_do_not_matter(split, data):
    word = data.draw(st.sampled_from(L.SPLITS[split]))
    name = "".join(c.upper() if data.draw(st.booleans()) else c for c in word)
    with TemporaryDirectory() as folder:
        root = write(Path(folder), f"{name}/a/1.png", f"{name}/b/1.png")
        found = L.find(root)
        assert list(found.splits) == [split] and found.labels == {split: ["a", "b"]}


@pytest.mark.parametrize("called", ["train", "test", "val", "Test", "bullet train"])
def test_a_class_may_be_called_as_a_split_is(tmp_path, called):
    beside = write(tmp_path / "a", f"{called}/1.png", "bus/1.png", "car/1.png")
    assert Images(str(beside)).classes == sorted([called, "bus", "car"]) and list(L.find(beside).splits) == ["train"]
    below = write(tmp_path / "b", *(f"{s}/{c}/1.png" for s in ("train", "val") for c in (called, "bus")))
    data = Images(str(below))
    assert data.classes == sorted([called, "bus"]) and {k: len(v) for k, v in data.splits.items()} == {
        "train": 2,
        "validation": 2,
    }


def refused(root: Path, *patterns: str, **options) -> None:
    with pytest.raises(DataError) as e:
        Images(str(root), **options).setup("fit")
    text = str(e.value)
    assert len(text.splitlines()) == 2 and all(pattern in text for pattern in patterns), text


def test_what_could_be_read_in_two_ways_is_refused(tmp_path):
    refused(write(tmp_path / "a", "train/1.png", "test/1.png", "bus/1.png"), "'test', 'train'", "'bus'")
    refused(write(tmp_path / "b", "train_val/a/1.png", "test/b/1.png"), "'train_val'")
    root = write(tmp_path / "c", "a/1.png", "b/1.png")
    table(root / "train.parquet", [0, 1])
    refused(root, "train.parquet", "a/1.png")
    table(write(tmp_path / "d", "a/1.png", "b/1.png") / "stray.parquet", [0])
    data = Images(str(tmp_path / "d"))
    assert data.classes == ["a", "b"] and "stray.parquet" in data.splits.notes[0]


def test_pictures_without_class_folders_are_not_trained_on(tmp_path):
    labelled = [f"train/{c}/{i}.png" for c in "ab" for i in "12"]
    refused(write(tmp_path / "a", *labelled, "val/1.png", "val/2.png"), "'validation'", "val/1.png")
    refused(write(tmp_path / "b", "1.png", "2.png"), "1.png lies in no class folder")
    refused(write(tmp_path / "c", "a/1.png", "b/c/1.png"), "different depths", "b/c/1.png")
    refused(write(tmp_path / "d", "a/1.png", "a/2.png"), "one class folder only")
    root = write(tmp_path / "e", *labelled, "test/1.png")  # a test split without labels is common
    data = Images(str(root))
    data.setup("fit")
    assert data.names["val"] is None and len(data.sets["val"]) == 1
    with pytest.raises(DataError, match="'test' has no labels"):
        data.setup("test")


def test_the_test_split_is_never_trained_on(tmp_path):
    refused(write(tmp_path / "a", "test/a/1.png", "test/b/1.png"), "no split to train on", "test (2 pictures)")
    root = write(tmp_path / "b", *(f"{s}/{c}/{i}.png" for s in ("train", "test") for c in "ab" for i in "12"))
    assert Images(str(root), train_split="test").names == {"train": "test", "val": None, "test": None}


def test_a_link_that_leads_back_is_followed_once(tmp_path):
    root = write(tmp_path / "d", "a/1.png", "b/1.png")
    (root / "a" / "up").symlink_to(root)
    (root / "b" / "2.png").symlink_to(root / "a" / "1.png")
    assert L.find(root).splits == {"train": ["a/1.png", "b/1.png", "b/2.png"]}


def test_missing_shards_are_named(tmp_path):
    for number in (0, 2):
        table(tmp_path / f"data/train-{number:05}-of-00004.parquet", [0, 1])
    refused(tmp_path, "2 of 4", "train-00001-of-00004.parquet, train-00003-of-00004.parquet")


def test_a_subset_is_a_folder_and_splits_are_joined(tmp_path):
    for subset, n in (("cropped", 4), ("full", 6)):
        for split in ("train", "extra", "test"):
            table(tmp_path / subset / f"{split}-00000-of-00001.parquet", [0, 1] * n)
    data = Images(str(tmp_path), subset="cropped", train_split="train+extra")
    data.setup("fit")
    assert data.names == {"train": "train+extra", "val": "test", "test": "test"}
    assert len(data.sets["train"]) == 16 and data.sets["train"].name(9) == "extra-00000-of-00001.parquet row 1"
    refused(tmp_path, "no folder 'half'", "cropped, full", subset="half")
    refused(tmp_path / "cropped", "no split 'more'", "extra", train_split="train+more")
    whole = Images(str(tmp_path / "cropped"), train_split="train+test")
    assert whole.names == {"train": "train+test", "val": None, "test": None}  # test is no measure any more


@pytest.mark.parametrize(
    ("there", "trained"),
    [
        ("train", None),
        ("train val test", None),
        ("train val", "train+val"),
        ("train test", "train+test"),
        ("train val test", "train+val"),
        ("train val test", "train+test"),
        ("train val test", "train+val+test"),
        ("train val test", "val"),
    ],
)
def test_no_picture_is_both_trained_on_and_evaluated_on(tmp_path, there, trained):
    root = write(tmp_path, *(f"{s}/{c}/{s}{i}.png" for s in there.split() for c in "ab" for i in "1234"))
    data = Images(str(root), train_split=trained, size=4, num_workers=0)
    data.setup("fit"), data.setup("test")
    names = {use: {part.name(i) for i in range(len(part))} for use, part in data.sets.items()}
    assert names["train"] and names["val"] and not names["train"] & (names["val"] | names["test"])


@pytest.mark.parametrize("use", ["val", "test"])
@pytest.mark.parametrize(
    ("trained", "given", "part"),
    [
        (None, "train", "train"),
        (None, "training", "train"),
        (None, "test+train", "train"),
        ("train+extra", "extra", "extra"),
        ("train+validation", "val", "validation"),
    ],
)
def test_a_split_to_evaluate_on_that_is_trained_on_is_refused(tmp_path, use, trained, given, part):
    for split in ("train", "validation", "test", "extra"):
        table(tmp_path / f"{split}-00000-of-00001.parquet", [0, 1])
    says = f"data.{use}_split: '{part}' of {tmp_path} is trained on"
    refused(tmp_path, says, train_split=trained, **{f"{use}_split": given})


@pytest.mark.parametrize("use", ["train", "val", "test"])
@pytest.mark.parametrize("given", ["{}+{}", "{}+ {}", "train+test+train"])
def test_a_split_that_is_named_twice_is_refused(tmp_path, use, given):
    root = write(tmp_path, *(f"{s}/{c}/1.png" for s in ("train", "val", "test") for c in "ab"))
    refused(root, f"data.{use}_split: ", "twice", **{f"{use}_split": given.format(use, use)})


@pytest.mark.long
@pytest.mark.skipif(not TEXTS_OF_PANDAS, reason="texts of pandas 3 are no file names to this datasets")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves metadata.csv open
def test_readme_and_metadata_are_followed(tmp_path):
    for name in ("one", "two"):
        table(tmp_path / "a" / name / "x.parquet", [0, 1, 2][: 2 + (name == "two")] * 2)
    configs = "".join(f"- config_name: {n}\n  data_files:\n  - {{split: train, path: {n}/*}}\n" for n in ("one", "two"))
    (tmp_path / "a/README.md").write_text(f"---\nconfigs:\n{configs}---\n# text\n")
    assert Images(str(tmp_path / "a"), subset="two").num_classes == 3
    refused(tmp_path / "a", "README.md", "two")
    (tmp_path / "a/README.md").write_text(f"---\nconfigs:\n{configs.replace('one/*', 'https://x/y')}---\n")
    refused(tmp_path / "a", "elsewhere", subset="one")
    root = write(tmp_path / "b", "train/1.png", "train/2.png")
    (root / "train/metadata.csv").write_text("file_name,label\n1.png,cat\n2.png,dog\n")
    data = Images(str(root))
    assert data.classes == ["cat", "dog"] and len(data.splits["train"]) == 2
    gc.collect()


# --- labels -----------------------------------------------------------------------------------------------------------


def test_names_mean_the_same_class_in_all_splits(tmp_path):
    table(tmp_path / "train.parquet", ["cat", "dog", "emu", None][:3] * 2)
    table(tmp_path / "validation.parquet", ["emu", "dog", "yak"])
    data = Images(str(tmp_path))
    assert data.classes == ["cat", "dog", "emu", "yak"]
    assert data.splits["validation"].labels.tolist() == [2, 1, 3] and data.splits["train"].labels.tolist()[:3] == [
        0,
        1,
        2,
    ]


def test_class_labels_that_differ_between_splits_are_matched_by_name(tmp_path):
    for split, names in (("train", ["dog", "cat"]), ("validation", ["emu", "cat"])):
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=names)})
        rows = {"img": [{"bytes": PNG, "path": None}] * 2, "label": [0, 1]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"{split}.parquet"))
    data = Images(str(tmp_path))
    assert data.classes == ["dog", "cat", "emu"]
    assert data.splits["train"].labels.tolist() == [0, 1] and data.splits["validation"].labels.tolist() == [2, 1]


@pytest.mark.parametrize(
    "labels, said",
    [
        ([0, 1, None, 1], "no label for 1 of 4: train.parquet row 2 first"),
        (["a", None, "b", None], "no label for 2 of 4: train.parquet row 1 first"),
        ([0, -1, 1, 1], "no label for 1 of 4"),
        ([0, -2, 1, 1], "-2 in row 1"),
        ([0.0, 0.7, 1.0, 1.0], "double, 0.0 in row 0"),
        ([[0, 1], [1], [0], [1]], "list"),
        ([0, 10**9, 1, 0], "1,000,000,000"),
        ([0, 5000, 1, 0], "5,000, and only 3 different ones"),
        (pa.array([0, 2**64 - 1, 1, 0], pa.uint64()), "18446744073709551615"),
        ([None] * 4, "no labels"),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path, labels, said):
    table(tmp_path / "train.parquet", labels)
    refused(tmp_path, said)


def test_labels_of_other_types_that_are_some(tmp_path):
    for number, (labels, classes) in enumerate(
        [
            ([True, False], ["False", "True"]),
            (pa.array([3, 1], pa.uint8()), ["0", "1", "2", "3"]),
            ([0, 999], [str(number) for number in range(1000)]),
            (pa.array(["b", "a"]).dictionary_encode(), ["a", "b"]),
            *([(pa.array(["b", "a"], pa.string_view()), ["a", "b"])] if STRING_VIEW else []),
        ]
    ):
        table(tmp_path / f"{number}/train.parquet", labels)
        assert Images(str(tmp_path / str(number))).classes == classes


def test_names_and_numbers_do_not_mix(tmp_path):
    table(tmp_path / "train.parquet", ["a", "b"])
    table(tmp_path / "validation.parquet", [0, 1])
    refused(tmp_path, "names as labels", "'validation' numbers")


KINDS = {
    "names": [
        *(pa.array(["b", "a"]), pa.array(["b", "c"], pa.large_string()), pa.array(["c", "a"]).dictionary_encode()),
        *([pa.array(["d", "a"], pa.string_view())] if STRING_VIEW else []),
    ],
    "numbers": [pa.array([1, 0]), pa.array([2, None], pa.int8()), pa.array([3, 300], pa.uint16())],
    "others": [pa.array([True, False]), pa.array([1.0, 0.0])],
}


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_whose_labels_are_of_two_kinds_are_refused_and_others_are_joined(tmp_path, streaming):
    """Joined by a cast, as `load_dataset` does, "0" would be a class beside "cat", and 1.0 be class 1."""
    shards = [(family, labels) for family, some in KINDS.items() for labels in some]
    for n, (family, first) in enumerate(shards):
        for m, (other, second) in enumerate(shards):
            if n == m or ((n + m) % 2 == streaming and other != family):  # half of the refused ones, in either way
                continue
            root = tmp_path / f"{n}-{m}"
            table(root / "train-0.parquet", first)
            table(root / "train-1.parquet", second)
            if family != other or family == "others":
                refused(root, "the labels of", "train-0.parquet", "train-1.parquet", streaming=streaming)
                continue
            try:
                data = Images(str(root), streaming=streaming)
            except DataError as e:
                # As `load_dataset`: the first file's type has to hold all, and Arrow has to know the cast to it; a
                # stream takes one that does.
                assert not streaming and re.search("not in range|cast_string_view", str(e)), (first, second)
                continue
            want = [*first.to_pylist(), *second.to_pylist()]
            named = [None if k < 0 else data.classes[k] for k in data.splits["train"].labels.tolist()]
            assert named == [x if x is None else str(x) for x in want]


def test_a_column_of_a_type_that_datasets_does_not_know_is_named(tmp_path):
    cells = {"image": [{"bytes": PNG, "path": None}], "label": [0], "tags": pa.array([[1]], pa.list_view(pa.int8()))}
    pq.write_table(pa.table(cells), tmp_path / "train.parquet")
    refused(tmp_path, "train.parquet: Arrow type list_view", "pip install -U datasets")


def test_a_torn_file_and_columns_that_differ_are_named(tmp_path):
    table(tmp_path / "a/train-0.parquet", [0, 1])
    (tmp_path / "a/train-1.parquet").write_bytes((tmp_path / "a/train-0.parquet").read_bytes()[:-9])
    refused(tmp_path / "a", "train-1.parquet is no whole parquet file")
    table(tmp_path / "b/train-0.parquet", [0, 1])
    table(tmp_path / "b/train-1.parquet", [0, 1], column="kind")
    refused(tmp_path / "b", "train-0.parquet and train-1.parquet differ in column 'kind'")


def test_given_classes_number_the_labels(tmp_path):
    root = write(tmp_path / "d", *(f"{c}/{i}.png" for c in "ab" for i in "12"))
    assert Images(str(root), classes=["x", "b", "a"]).splits["train"].labels.tolist() == [2, 2, 1, 1]
    refused(root, "'b', none of the 1 classes", classes=["a"])
    for twice in (["a", "b", "a"], ["a", "b", "c", "c"]):
        refused(root, f"data.classes has '{twice[-1]}' more than once", "Give each", classes=twice)


def test_a_checkpoint_of_other_classes_is_refused(tmp_path):
    data = Images(str(write(tmp_path / "d", "a/1.png", "b/1.png")))
    data.load_state_dict(Images(str(tmp_path / "d")).state_dict())
    with pytest.raises(DataError, match="class 1 is 'b', and 'c' in the checkpoint"):
        data.load_state_dict({"classes": ["a", "c"]})


def test_predict_takes_pictures_without_labels(tmp_path):
    known = write(tmp_path / "d", *(f"{s}/{c}/1.png" for s in ("train", "val") for c in "ab"))
    new = write(tmp_path / "new", "z.png", "y/x.png")
    for options in ({"root": str(known), "predict_root": str(new)}, {"root": str(new), "classes": ["a", "b"]}):
        data = Images(**options)
        data.setup("predict")
        batch = next(iter(data.predict_dataloader()))
        assert data.num_classes == 2 and batch[0].shape == (2, 3, 4, 4)
        assert sorted(data.predicted_name(i) for i in range(2)) == ["y/x.png", "z.png"]
    with pytest.raises(DataError, match="predict_root"):
        _ = Images(str(new)).num_classes


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), *([pa.binary_view()] if BINARY_VIEW else [])], ids=str
)
def test_pictures_of_every_binary_type_are_read(tmp_path, kind, streaming):
    cells = pa.StructArray.from_arrays([pa.array([PNG, PNG], kind), pa.array(["a", "b"])], ["bytes", "path"])
    pq.write_table(pa.table({"image": cells, "label": ["x", "y"]}), tmp_path / "train.parquet")
    data = Images(str(tmp_path), batch_size=1, holdout=0.5, streaming=streaming)
    data.prepare_data()
    data.setup("fit")
    batches = [*data.train_dataloader(), *data.val_dataloader()]
    assert [x.shape for x, _ in batches] == [(1, 3, 4, 4)] * 2 and sorted(int(y) for _, y in batches) == [0, 1]
