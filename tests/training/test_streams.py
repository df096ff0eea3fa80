"""Shards read where they lie: the samples as elsewhere, in an order that is resumed without reading what is done."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odenets.training import DataError, Images
from odenets.training.data import shard_order
from odenets.training.order import TrainingOrder
from odenets.training.splits import open_splits

from .pictures import encoded, picture


def write_tar(file: Path, samples: list[dict[str, bytes]], first: int = 0) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for number, sample in enumerate(samples, first):
            for suffix, held in sample.items():
                member = tarfile.TarInfo(f"s/{number:04}.{suffix}")
                member.size = len(held)
                tar.addfile(member, io.BytesIO(held))


def samples(first: int, n: int, suffix: str = "cls", label=lambda i: str(i % 3)) -> list[dict[str, bytes]]:
    return [{"png": encoded(picture(i))["bytes"], suffix: label(i).encode()} for i in range(first, first + n)]


def write_groups(file: Path, first: int, n: int, rows: int, labels=None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    held = {"img": [encoded(picture(i)) for i in range(first, first + n)]}
    held["label"] = labels or [i % 3 for i in range(first, first + n)]
    pq.write_table(pa.table(held), file, row_group_size=rows)


@pytest.fixture
def shards(tmp_path) -> dict[str, Path]:
    """The same 30 training and 6 validation pictures as tar shards and as parquet files in row groups."""
    for number in range(5):
        write_tar(tmp_path / f"tar/train-{number:03}.tar", samples(6 * number, 6), 6 * number)
    write_tar(tmp_path / "tar/val-000.tar", samples(30, 6), 30)
    for number in range(2):
        write_groups(tmp_path / f"parquet/train-{number:05}-of-00002.parquet", 15 * number, 15, 5)
    write_groups(tmp_path / "parquet/validation.parquet", 30, 6, 4)
    return {"tar": tmp_path / "tar", "parquet": tmp_path / "parquet"}


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_hold_what_was_written(shards, kind, workers):
    data = Images(str(shards[kind]), streaming=True, cache=False, batch_size=5, num_workers=workers)
    data.setup("fit")
    assert data.classes == ["0", "1", "2"] and data.names["val"] == "validation"
    for i in range(30):
        x, y = data.sets["train"][i]
        flat = torch.frombuffer(bytearray(picture(i).tobytes()), dtype=torch.uint8)
        assert torch.equal(x, flat.view(32, 32, 3).permute(2, 0, 1)) and y == i % 3
    seen = torch.cat([y for _, y in data.train_dataloader()])
    assert torch.bincount(seen).tolist() == [10, 10, 10]
    name = {"tar": "train-001.tar/s/0007", "parquet": "train-00000-of-00002.parquet row 7"}[kind]
    assert data.sets["train"].name(7) == name
    copy = pickle.loads(pickle.dumps(data.sets["train"].source))
    assert copy.encoded(7) == data.sets["train"].source.encoded(7)


def test_streamed_parquet_is_that_which_is_not(shards):
    plain, streamed = (Images(str(shards["parquet"]), streaming=s, cache=False) for s in (False, True))
    for data in (plain, streamed):
        data.setup("fit")
    for name in ("train", "val"):
        a, b = plain.sets[name], streamed.sets[name]
        assert len(a) == len(b) and [a.name(i) for i in range(len(a))] == [b.name(i) for i in range(len(b))]
        assert all(torch.equal(a[i][0], b[i][0]) and a[i][1] == b[i][1] for i in range(len(a)))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 99), st.data())
def test_an_order_is_a_permutation_that_reads_few_shards_at_a_time(shards, window, seed, data):
    indices = torch.tensor([i for i in range(sum(shards)) if data.draw(st.booleans())], dtype=torch.long)
    order = shard_order(shards, indices, torch.Generator().manual_seed(seed), window)
    assert sorted(order.tolist()) == list(range(len(indices)))
    assert torch.equal(order, shard_order(shards, indices, torch.Generator().manual_seed(seed), window))
    of = torch.searchsorted(torch.tensor(shards).cumsum(0), indices[order], right=True).tolist()
    ends = {shard: (of.index(shard), len(of) - of[::-1].index(shard)) for shard in of}
    for place in range(len(of)):  # those that are begun and not yet done
        assert sum(first <= place < last for first, last in ends.values()) <= window


def test_orders_differ_by_epoch_and_mix_within_a_window():
    orders = [shard_order([10] * 20, torch.arange(200), torch.Generator().manual_seed(s), 4) for s in range(2)]
    assert not torch.equal(*orders)
    shards = orders[0] // 10
    assert len(set(shards[:40].tolist())) == 4 and len(set(shards[:10].tolist())) > 1
    whole = shard_order(None, torch.arange(200), torch.Generator().manual_seed(0), 4)
    assert sorted(whole.tolist()) == list(range(200))


@pytest.mark.parametrize("crop", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("val", [None, "validation"])
def test_a_cache_changes_nothing_of_the_order(shards, kind, crop, val):
    found = []
    for cache in (True, False):
        if val is None:  # a share is held out
            (shards[kind] / {"tar": "val-000.tar", "parquet": "validation.parquet"}[kind]).unlink(missing_ok=True)
        data = Images(str(shards[kind]), streaming=True, cache=cache, size=32, smallest_crop=crop, num_workers=0)
        data.setup("fit")
        trained = data.sets["train"]
        orders = [TrainingOrder(trained, 4, 7).permutation(epoch) for epoch in range(3)]
        labels = [torch.as_tensor(trained.labels)[order].tolist() for order in orders]
        found.append((orders, labels, [trained.name(i) for i in orders[0]]))
    assert found[0] == found[1] and found[0][0][0] != found[0][0][1]
    assert data.sets["train"].source.shards is not None


def test_what_is_done_is_skipped_without_being_read(shards):
    def source():
        data = Images(str(shards["parquet"]), streaming=True, cache=False)
        data.setup("fit")
        return data.sets["train"]

    whole = source()
    order = whole.order(torch.Generator().manual_seed(3), window=2).tolist()
    expected = [whole[(4, i)][0] for i in order]
    resumed = source()
    resumed.seed, resumed.source = whole.seed, pickle.loads(pickle.dumps(resumed.source))  # with nothing read yet
    rest = [resumed[(4, i)][0] for i in order[20:]]
    assert all(torch.equal(a, b) for a, b in zip(rest, expected[20:], strict=True))
    assert resumed.source.reads == 2  # of six row groups, the two of the last window


def test_labels_of_tar_shards(tmp_path):
    texts = {"cls": lambda i: "cat dog emu".split()[i % 3], "json": lambda i: json.dumps({"label": i % 3})}
    for suffix, label in texts.items():
        write_tar(tmp_path / suffix / "train.tar", samples(0, 6, suffix, label))
    assert Images(str(tmp_path / "cls")).classes == ["cat", "dog", "emu"]
    assert open_splits(tmp_path / "json")["train"].labels.tolist() == [0, 1, 2, 0, 1, 2]
    write_tar(tmp_path / "named/train.tar", samples(0, 6, "kind.txt"))
    assert Images(str(tmp_path / "named"), label_key="kind.txt").classes == ["0", "1", "2"]
    with pytest.raises(DataError, match="has no member cls or label"):
        Images(str(tmp_path / "named")).setup("fit")


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("one", "other"), [("png", "depth.png"), ("jpg", "png"), ("input.png", "target.png")])
def test_of_several_pictures_in_a_sample_the_one_that_is_named_is_taken(tmp_path, one, other, first):
    held = [{one: encoded(picture(i))["bytes"], other: encoded(picture(9))["bytes"], "cls": b"1"} for i in range(3)]
    write_tar(tmp_path / "train.tar", held if first else [dict(reversed(sample.items())) for sample in held])
    with pytest.raises(DataError, match=f"several pictures: {', '.join(sorted((one, other)))}\n.*--data.image_key"):
        open_splits(tmp_path)
    for key, want in ((one, range(3)), (other, [9] * 3)):
        for written in (key, key.upper()):
            source = open_splits(tmp_path, image_key=written)["train"]
            assert [source.encoded(i) for i in range(3)] == [encoded(picture(i))["bytes"] for i in want]


@pytest.mark.parametrize("written", ["kind", "KIND", "Kind"])
@pytest.mark.parametrize("key", ["kind", "KIND"])
def test_capital_letters_of_suffixes_do_not_matter(tmp_path, written, key):
    held = [{"PNG": encoded(picture(i))["bytes"], written: str(i % 3).encode()} for i in range(6)]
    write_tar(tmp_path / "train.tar", held)
    source = open_splits(tmp_path, image_key="Png", label_key=key)["train"]
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2]
    write_tar(tmp_path / "train.tar", [{**sample, "png": sample["PNG"]} for sample in held])
    with pytest.raises(DataError, match=r"0000.PNG and s/0000.png differ in capital letters alone\n"):
        open_splits(tmp_path)


@pytest.mark.parametrize(
    ("suffix", "labels"),
    [
        ("cls", ["1", "9" * 30]),
        ("cls", ["1", "9" * 5000]),
        ("json", [3, "cat"]),
        ("json", [[1], 2]),
        ("json", [{"a": 1}, None]),
        ("json", [0.5, 1]),
    ],
)
def test_labels_of_tar_shards_that_are_none_are_two_lines(tmp_path, suffix, labels):
    write = json.dumps if suffix == "json" else str
    held = lambda label: write({"label": label}) if suffix == "json" else label  # noqa: E731
    write_tar(tmp_path / "train.tar", samples(0, 2, suffix, lambda i: held(labels[i])))
    with pytest.raises(DataError, match=r"label.*\n  A label is one name or one whole number"):
        open_splits(tmp_path)


def test_torn_and_empty_shards_are_named(tmp_path, shards):
    torn = shards["tar"] / "train-002.tar"
    torn.write_bytes(torn.read_bytes()[:700])
    with pytest.raises(DataError, match=r"train-002\.tar is no whole tar file"):
        Images(str(shards["tar"]))
    write_tar(tmp_path / "empty/train.tar", [{"txt": b"0"}])
    with pytest.raises(DataError, match="holds no pictures"):
        Images(str(tmp_path / "empty"))
    part = shards["parquet"] / "train-00001-of-00002.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet is no whole parquet file"):
        Images(str(shards["parquet"]), streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_that_hold_pictures_and_columns_that_do_not(tmp_path, streaming):
    data = [encoded(picture(i))["bytes"] for i in range(4)]
    for i, held in enumerate(data):
        (tmp_path / f"{i}.png").write_bytes(held)
    columns = {
        "binary": data,
        "paths": [str(tmp_path / f"{i}.png") for i in range(4)],
        "lists": [[held] for held in data],
        "numbers": [1, 2, 3, 4],
        "none": pa.array([], pa.binary()),
    }
    for name, cells in columns.items():
        (tmp_path / name).mkdir()
        table = pa.table({"image": cells, "label": pa.array([0, 1, 0, 1][: len(cells)], pa.int64())})
        pq.write_table(table, tmp_path / name / "train.parquet")
        if name in ("binary", "paths"):
            opened = Images(str(tmp_path / name), streaming=streaming)
            opened.setup("fit")
            assert len(opened.sets["train"]) == 3
            continue
        with pytest.raises(DataError) as e:
            Images(str(tmp_path / name), streaming=streaming).setup("fit")
        assert len(str(e.value).splitlines()) == 2 and ("'image'" in str(e.value)) == (name != "none")


def test_the_hub_is_streamed_only_with_permission(monkeypatch, shards):
    from odenets.training import streams

    with pytest.raises(DataError, match="was not allowed"):
        Images(hub="nobody/nothing", streaming=True)
    asked = []
    files = {"train": [f"file://{p}" for p in sorted(shards["parquet"].glob("train*"))]}
    monkeypatch.setattr(streams, "hub_files", lambda *a: asked.append(a[:2]) or files)
    data = Images(hub="nobody/nothing", subset="small", download=True, streaming=True, cache=False, num_workers=1)
    data.setup("fit")
    assert asked == [("nobody/nothing", "small")] and len(data.sets["train"]) == 27 and data.num_classes == 3
    assert sum(len(y) for _, y in data.val_dataloader()) == 3
    monkeypatch.setattr(streams, "hub_files", lambda *a: {"train": ["hf://datasets/x/y.zip"]})
    with pytest.raises(DataError, match="only parquet files are streamed"):
        Images(hub="nobody/nothing", download=True, streaming=True)
