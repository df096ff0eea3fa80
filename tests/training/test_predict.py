"""The file of predictions: a row per picture, with its name, its five most likely classes and their probabilities."""

import csv
import os
from types import SimpleNamespace

import pytest
import torch

from odenets.training import Images
from odenets.training.callbacks import Predictions
from odenets.training.command import run
from odenets.training.splits import open_splits

from .pictures import picture, write_folder, write_parquet
from .test_streams import samples, write_tar


def rows(path) -> list[dict[str, str]]:
    with open(path) as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("classes", [3, 7])
def test_rows_are_in_order_with_the_best_classes_first(tmp_path, classes):
    shown = torch.rand(5, classes, generator=torch.Generator().manual_seed(0)).softmax(1)
    names = [f"c{number}" for number in range(classes)]
    data = SimpleNamespace(classes=names, predicted_name=lambda i: f"{i}.png")
    trainer = SimpleNamespace(datamodule=data, world_size=1, is_global_zero=True)
    batches, indices = [shown[[3, 0, 4]], shown[[1, 2]]], [[[3, 0, 4], [1, 2]]]
    Predictions(tmp_path / "p.csv").write_on_epoch_end(trainer, None, batches, indices)
    found = rows(tmp_path / "p.csv")
    assert [row["name"] for row in found] == [f"{i}.png" for i in range(5)]
    for row, p in zip(found, shown, strict=True):
        order = p.argsort(descending=True)[:5].tolist()
        keys = ["", *(f"_{n}" for n in range(2, len(order) + 1))]
        assert [row[f"class{key}"] for key in keys] == [names[k] for k in order]
        assert [float(row[f"probability{key}"]) for key in keys] == pytest.approx(p[order].tolist(), abs=1e-6)
        assert f"class_{len(order) + 1}" not in row


def test_names_that_are_no_utf_8_and_classes_too(tmp_path):
    """As old archives unpack them: read by their bytes, written with escapes."""
    write_folder(tmp_path / "data", 2, 2)
    one, *_ = sorted((tmp_path / "data").iterdir())
    picture = os.fsencode(next(one.iterdir()))
    try:
        os.rename(picture, os.fsencode(one) + b"/caf\xe9.png")
    except OSError:
        pytest.skip("a file system of UTF-8 alone")
    os.rename(one, os.fsencode(tmp_path / "data") + b"/\xe9")
    source = open_splits(tmp_path / "data")["train"]
    assert source.names == ["\\udce9", "n0001"]
    names = [source.name(i) for i in range(len(source))]
    at = names.index("\\udce9/caf\\udce9.png")
    assert source.picture(at).size[0] > 1
    Predictions(tmp_path / "p.csv")._write({0: (names[at], [1.0], [0])}, source.names)
    assert (tmp_path / "p.csv").read_text(encoding="utf-8").splitlines()[1] == f"0,{names[at]},\\udce9,1.000000"


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_any_folder_of_pictures_can_be_predicted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        write_folder(tmp_path / "d" / part, 2, 2, (32, 32))
    (tmp_path / "new").mkdir()
    for i in range(3):
        picture(i).save(tmp_path / "new" / f"{i}.png")
    (tmp_path / "new" / "3.png").write_bytes(b"")
    model = "--model odenets.training.Classifier --model.net odenets.models.HOResNet --model.net.functions [1]"
    model += (
        " --model.net.widths [4] --model.net.scheme euler --model.optimizer torch.optim.SGD --model.optimizer.lr 0.1"
    )
    quiet = "--trainer.enable_progress_bar false --trainer.enable_model_summary false --trainer.accelerator cpu"
    data = "--data odenets.training.Images --data.root d --data.num_workers 0 --data.batch_size 2"
    words = f"{model} {quiet} {data} --run_dir run".split()
    run(["fit", *words, "--trainer.max_epochs", "1"])
    for cache in ("true", "false"):
        options = ["--data.predict_root", "new", "--data.cache", cache]
        run(["predict", *words, *options, "--ckpt_path", "last"])
        found = {row["name"]: row for row in rows("run/predict/predictions.csv")}
        assert found.keys() - {"3.png (unreadable)"} == {"0.png", "1.png", "2.png"}
        assert ("3.png (unreadable)" in found) == (cache == "false")
        for row in found.values():
            assert {row["class"], row["class_2"]} == {"n0000", "n0001"}
            assert float(row["probability"]) + float(row["probability_2"]) == pytest.approx(1, abs=2e-6)
    assert Images("d", predict_root="new").classes == ["n0000", "n0001"]
    # The classes of the checkpoint are those of pictures that name none, and number those of a folder that lacks some.
    run(["predict", *words, "--data.root", "new", "--ckpt_path", "last"])
    assert [row["name"] for row in rows("run/predict/predictions.csv")] == ["0.png", "1.png", "2.png"]
    write_folder(tmp_path / "some/val", 2, 2, (32, 32))
    (tmp_path / "some/val/n0000").rename(tmp_path / "some/val/n0001-0")
    for path in list((tmp_path / "some/val/n0001-0").iterdir()):
        path.rename(tmp_path / "some/val/n0001" / f"other-{path.name}")
    (tmp_path / "some/val/n0001-0").rmdir()
    write_folder(tmp_path / "some/test", 1, 2, (32, 32))
    done = run(["validate", *words, "--data.root", "some", "--ckpt_path", "last"])
    assert done.datamodule.splits["validation"].labels.tolist() == [1] * 4


FOLDERS = {
    "classes": ["a/0.png", "a/1.png", "b/0.png"],
    "splits": ["train/a/0.png", "train/b/1.png", "val/a/0.png", "val/b/0.png", "test/a/0.png", "test/b/5.png"],
    "some": ["test/x/0.png", "test/x/1.png", "holiday/y/0.png"],
    "flat": ["0.png", "1.png", "test.png"],
    "tar": ["train.tar", "holiday.tar"],
    "parquet": ["train.parquet", "test.parquet", "holiday.parquet"],
}


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("kind", FOLDERS)
def test_all_pictures_below_a_folder_are_predicted_whatever_their_split(tmp_path, kind, alone):
    new, known = tmp_path / "new", tmp_path / "known"
    write_folder(known, 2, 2, (32, 32))
    want = []
    for n, name in enumerate(FOLDERS[kind]):
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        if kind == "tar":
            write_tar(new / name, samples(2 * n, 2))
        elif kind == "parquet":
            write_parquet(new / name, 2, 2)
        else:
            picture(n).save(new / name)
        want += [f"{name} row {i}" for i in range(2)] if kind == "parquet" else [name] * (2 if kind == "tar" else 1)
    given = {"classes": ["0", "1", "2", "a", "b", "c0", "c1", "x", "y"]} if alone else {"root": str(known)}
    data = Images(predict_root=str(new), num_workers=0, size=32, **given)
    data.setup("predict")
    count = len(data.sets["predict"])
    assert count == len(want) and sum(len(x) for x, _ in data.predict_dataloader()) == count
    found = [data.predicted_name(i) for i in range(count)]
    assert len(set(found)) == count and data.num_classes == (9 if alone else 2)
    if kind != "tar":
        assert sorted(found) == sorted(want)
