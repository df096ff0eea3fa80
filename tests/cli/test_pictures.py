"""`odenets predict` and `odenets evaluate`, against the network and the figures that are had without them."""

import csv
import io
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, log_loss, precision_score, recall_score, top_k_accuracy_score
from torch import nn
from training.pictures import picture

from cli.lines import answer, fails
from odenets.cli import main
from odenets.training import Classifier, Digits, Images
from odenets.training.judge import Figures, evaluate, pictures_at, predict, wilson
from odenets.training.labelled import Labelled
from odenets.training.trained import Trained, open_trained
from schemes import SchemeError


def test_predict_is_the_network_on_what_evaluation_shows(capsys, photos, folder):
    out, err = answer(capsys, "predict", "--ckpt_path", str(photos), str(folder / "c2"), "--json")
    found = json.loads(out)
    assert [row["name"] for row in found] == [str(folder / "c2" / f"{i}.png") for i in range(4)] and not err
    net = Classifier.load_from_checkpoint(photos).net.eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    for row in found:
        image = Image.open(row["name"])
        short = 24 / 0.75
        wide, high = (int(short * side // min(image.size)) for side in image.size)
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
        left, top = round((wide - 24) / 2), round((high - 24) / 2)
        x = torch.frombuffer(bytearray(image.crop((left, top, left + 24, top + 24)).tobytes()), dtype=torch.uint8)
        x = (x.view(24, 24, 3).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            wanted = net(x[None])[0].softmax(0)
        values = torch.tensor([p["probability"] for p in row["predictions"]])
        assert [p["class"] for p in row["predictions"]] == [f"c{k}" for k in wanted.topk(5).indices]
        torch.testing.assert_close(values, wanted.topk(5).values, atol=2e-3, rtol=0)  # levels are rounded otherwise


def test_grey_pictures_and_a_moved_step_size(digits, tmp_path):
    trained = open_trained(digits)
    data = Digits()
    data.setup("test")
    x, _ = data.sets["test"].__getitems__(list(range(3)))  # type: ignore[attr-defined]
    for i, levels in enumerate(x):
        Image.frombytes("L", (8, 8), bytes((levels[0] * 255).round().int().flatten().tolist())).convert("RGB").save(
            tmp_path / f"{i}.png"
        )
    net = Classifier.load_from_checkpoint(digits).net.eval()
    for level in net.levels:
        level.set_step(0.5)
    with torch.no_grad():
        wanted = net(((x * 255).round() / 255 - 0.3) / 0.375).softmax(1)
    source, _ = pictures_at([tmp_path])
    for row, p in zip(wanted, predict(trained, source, top=10, batch_size=2), strict=True):
        assert p.classes == [str(int(k)) for k in row.argsort(descending=True)]
        assert torch.allclose(torch.tensor(p.probabilities), row.sort(descending=True).values, atol=1e-6)


def test_an_unreadable_picture_is_named_and_takes_no_other_place(capsys, photos, folder, tmp_path):
    whole = [str(folder / "c1" / f"{i}.png") for i in range(4)]
    args = ["predict", "--ckpt_path", str(photos), "--top", "2", "--csv"]
    clean = list(csv.DictReader(io.StringIO(answer(capsys, *args, *whole)[0])))
    out, err = answer(capsys, *args, str(folder / "c1"), status=1)
    rows = list(csv.DictReader(io.StringIO(out)))
    broken = [row for row in rows if row["error"]]
    assert [row for row in rows if not row["error"]] == clean and len(broken) == 1
    assert broken[0]["name"].endswith("broken.png") and not broken[0]["class"] and "broken.png cannot be read" in err
    target = tmp_path / "new" / "found.csv"
    answer(capsys, *args[:-1], str(folder / "c1"), "--output", str(target), status=1)
    assert target.read_text() == out


class Sees(nn.Module):
    """Logits of three classes that depend on the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return torch.stack([x.mean((2, 3)), x.amax((2, 3)), x[:, :, 3, 5]]).mean(0) @ self.w


@pytest.mark.parametrize("options", [{}, {"cache": True}, {"size": 24, "cache": False}, {"smallest_crop": 0.5}])
@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize("side", [32, 120])
@pytest.mark.filterwarnings("ignore:.*cannot be read:UserWarning")
def test_data_of_a_checkpoint_are_evaluated_as_their_folder(tmp_path, side, limit, options):
    """Also where pictures cannot be read: these are named, and no other is counted in their place."""
    for part in ("train", "test"):
        for c in range(3):
            (tmp_path / part / f"c{c}").mkdir(parents=True)
            for i in range(4):
                picture(10 * c + i, (side, side)).save(tmp_path / part / f"c{c}" / f"{i}.png")
    for name in ("c0/0.png", "c1/2.png", "c2/3.png"):
        (tmp_path / "test" / name).write_bytes(b"no picture")
    data = Images(str(tmp_path), **{"size": 32, "num_workers": 0, **options})
    data.setup("test")
    given = {"class_path": "odenets.training.Images", "init_args": {"root": str(tmp_path), "size": 32, **options}}
    trained = Trained(tmp_path / "x.ckpt", Sees().eval(), ["c0", "c1", "c2"], data.view, given, 0)
    found = []
    for root in (None, tmp_path):
        pictures = Labelled(trained, root, None, None, limit)
        rows = [(trained.probabilities(x), y) for _, x, y in pictures.batches(2)]
        found.append([torch.cat(part) for part in zip(*rows, strict=True)])
        named = {Path(name).name: why for name, why in pictures.unread.values()}
        assert named.keys() <= {"0.png", "2.png", "3.png"} and (len(named) == 3 or limit is not None)
    if limit is None:
        assert len(found[0][1]) == 9 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        own, theirs = evaluate(trained), evaluate(trained, tmp_path)
        assert {**own[0], "data": ""} == {**theirs[0], "data": ""}
        assert [(Path(a.name).name, a.error) for a in own[1]] == [(Path(b.name).name, b.error) for b in theirs[1]]


def test_a_table_by_default_and_notes_beside_it(capsys, photos, folder):
    out, _ = answer(capsys, "predict", str(folder / "c0" / "0.png"), "--ckpt_path", str(photos))
    assert "0.png" in out and out.count(" %") == 5


def test_tables_of_pictures_are_named_by_row(capsys, photos, cifar):
    out, _ = answer(capsys, "predict", "--ckpt_path", str(photos), str(cifar / "test.parquet"), "--json")
    names = [row["name"] for row in json.loads(out)]
    assert names == [f"{cifar / 'test.parquet'} row {i}" for i in range(20)]


def test_figures_are_those_of_scikit_learn():
    torch.manual_seed(3)
    probabilities, labels = torch.randn(60, 7).softmax(1), torch.randint(0, 6, (60,))
    figures = Figures([f"c{k}" for k in range(7)], 0.9)
    for part in range(0, 60, 17):
        figures.add(probabilities[part : part + 17], labels[part : part + 17])
    found = figures.summary()
    best = probabilities.argmax(1)
    assert found["accuracy"]["value"] == pytest.approx(accuracy_score(labels, best))
    wanted = top_k_accuracy_score(labels, probabilities, k=5, labels=range(7))
    assert found["top5"]["value"] == pytest.approx(wanted)
    doubled = probabilities.double() / probabilities.double().sum(1, keepdim=True)
    assert found["loss"] == pytest.approx(log_loss(labels, doubled, labels=range(7)), rel=1e-6)
    recalls = recall_score(labels, best, labels=range(7), average=None, zero_division=0)
    precisions = precision_score(labels, best, labels=range(7), average=None, zero_division=0)
    for row in found["classes"]:
        k = int(row["class"][1:])
        assert (row["accuracy"]["value"] or 0) == pytest.approx(recalls[k])
        assert (row["precision"] or 0) == pytest.approx(precisions[k])
        wrong = best[(labels == k) & (best != k)]
        assert row["taken_for"] is None or (wrong == int(row["taken_for"][1:])).sum() == wrong.bincount().max()
    assert sum(row["pictures"] for row in found["classes"]) == 60
    assert found["mean_class_accuracy"] == pytest.approx(sum(recalls[:6]) / 6)


@pytest.mark.parametrize(("right", "count"), [(0, 1), (1, 1), (0, 40), (3, 7), (997, 1000)])
def test_intervals_are_wilsons(right, count):
    for level in (0.9, 0.95):
        wanted = binomtest(right, count).proportion_ci(level, method="wilson")
        assert wilson(right, count, level) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_evaluate_on_the_runs_own_data_is_lightnings_test(capsys, digits):
    from odenets.training.command import run

    folder = str(digits.parents[1])
    done = run(["test", "-c", f"{folder}/config.yaml", "--run_dir", folder, "--ckpt_path", "last"])
    assert done is not None
    capsys.readouterr()
    figures = json.loads(answer(capsys, "evaluate", "--ckpt_path", str(digits), "--json")[0])
    assert figures["pictures"] == 359
    assert figures["accuracy"]["value"] == pytest.approx(float(done.trainer.callback_metrics["test/acc"]), abs=1e-6)
    assert figures["loss"] == pytest.approx(float(done.trainer.callback_metrics["test/loss"]), abs=1e-5)
    assert figures["accuracy"]["interval"][0] < figures["accuracy"]["value"] < figures["accuracy"]["interval"][1]


def test_evaluate_numbers_the_classes_as_the_network_does(capsys, photos, folder, tmp_path):
    """c1 and c2 alone: their numbers are 1 and 2, not 0 and 1."""
    for c in (1, 2):
        (tmp_path / f"c{c}").mkdir()
        for i in range(4):
            picture(10 * c + i, (30 + 7 * i, 40)).save(tmp_path / f"c{c}" / f"{i}.png")
    figures, unread = evaluate(open_trained(photos), tmp_path)
    said = list(predict(open_trained(photos), pictures_at([tmp_path])[0], top=1))
    right = [p.name.split("/")[-2] == p.classes[0] for p in said]
    assert figures["accuracy"]["value"] == sum(right) / 8 and not unread
    assert {row["class"]: row["pictures"] for row in figures["classes"] if row["pictures"]} == {"c1": 4, "c2": 4}
    out, err = answer(capsys, "evaluate", "--ckpt_path", str(photos), str(folder), "--csv", status=1)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert sum(int(row["pictures"]) for row in rows) == 12 and "broken.png" in err
    # Lines are broken where the path of the folder leaves room.
    said = answer(capsys, "evaluate", "--ckpt_path", str(photos), str(tmp_path))[0]
    assert "intervals of 95 %" in " ".join(said.split())


def test_a_folder_of_unknown_classes_is_refused(capsys, digits, folder):
    assert "none of the 10 classes" in fails(capsys, "evaluate", "--ckpt_path", str(digits), str(folder))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["predict", "x.png"], "--ckpt_path"),
        (["predict", "--ckpt_path", "{ckpt}", "--top", "3"], "FILE|FOLDER"),
        (["predict", "--ckpt_path", "nowhere.ckpt"], "-c FILE.yaml"),
        (["predict", "--ckpt_path", "{ckpt}", "nowhere"], "no such file or folder"),
        (["predict", "--ckpt_path", "{ckpt}", "{ckpt}"], "no picture in it"),
        (["predict", "--ckpt_path", "nowhere.ckpt", "{folder}"], "best.ckpt"),
        (["predict", "--ckpt_path", "{folder}/c0/0.png", "{folder}"], "no checkpoint"),
        (["predict", "--ckpt_path", "{ckpt}", "{folder}", "--tpo", "3"], "Closest: top"),
        (["predict", "--ckpt_path", "{ckpt}", "{folder}", "--top", "0"], "below 1"),
        (["predict", "--ckpt_path", "{ckpt}", "{folder}", "--json", "--csv"], "exclude"),
        (["predict", "--ckpt_path", "{ckpt}", "{folder}", "--output", "x.txt"], ".csv"),
        (["predict", "--ckpt_path", "{ckpt}", "{folder}", "--device", "nope"], "--device cpu"),
        (["evaluate", "--ckpt_path", "{ckpt}", "{folder}", "--split", "val"], "has train"),
        (["evaluate", "--ckpt_path", "{ckpt}", "--split", "train"], "test or val"),
        (["evaluate", "--ckpt_path", "{ckpt}", "{folder}", "--confidence", "95"], "between 0 and 1"),
    ],
    ids=lambda v: "-".join(v)[:60] if isinstance(v, list) else "",
)
def test_wrong_commands_end_in_two_lines(capsys, digits, folder, args, said):
    assert said in fails(capsys, *(arg.format(ckpt=digits, folder=folder) for arg in args))


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    "words", [["--ckpt_path", "{}"], ["--ckpt_path={}"], ["--ckpt_path", "last", "--run_dir", "RUN"]]
)
def test_without_pictures_the_runs_own_are_predicted(digits, tmp_path, words):
    """By Lightning's predict, with the options of a run."""
    run = shutil.copytree(digits.parents[1], tmp_path / "run")
    path = str(run / "checkpoints" / "last.ckpt")
    args = [word.format(path) if word != "RUN" else str(run) for word in words]
    main(
        ["predict", *args]
        if len(words) < 3
        else ["predict", *args, "--data.batch_size", "7", "--trainer.limit_predict_batches", "2"]
    )
    title, *rows = (run / "predict" / "predictions.csv").read_text().splitlines()
    data = Digits(test_share=0.2)
    data.setup("test")
    count = len(data.sets["test"]) if len(words) < 3 else 14  # type: ignore[arg-type]
    assert title.startswith("index,name,class,probability") and len(rows) == count
    x, _ = data.sets["test"].__getitems__(list(range(7)))  # type: ignore[attr-defined]
    with torch.no_grad():
        # With the step size that a callback has moved, though no configuration names the callback here.
        wanted = open_trained(digits).net((x - 0.3) / 0.375).softmax(1)
    found = [row.split(",")[2:4] for row in rows[:7]]
    assert [int(name) for name, _ in found] == wanted.argmax(1).tolist()
    assert [float(value) for _, value in found] == pytest.approx(wanted.amax(1).tolist(), abs=1e-5)


def changed(path, target, change):
    held = torch.load(path, weights_only=True)
    change(held)
    torch.save(held, target)
    return target


def test_a_checkpoint_does_not_decide_what_is_imported(capsys, digits, folder, tmp_path):
    """Neither for its net nor, inside of its arguments, for a part of it."""

    def other_net(held):
        held["hyper_parameters"]["net"] = {"class_path": "antigravity.Net", "init_args": {}}

    def other_part(held):
        held["hyper_parameters"]["net"]["init_args"]["stem"] = {"class_path": "antigravity.Stem"}

    import sys

    for change in (other_net, other_part):
        path = changed(digits, tmp_path / "other.ckpt", change)
        assert "-c RUN/config.yaml" in fails(capsys, "predict", "--ckpt_path", str(path), str(folder))
    assert "antigravity" not in sys.modules


def test_checkpoints_that_lack_what_is_needed_say_so(digits, tmp_path):
    cases = {
        "built in Python": lambda held: held.pop("hyper_parameters"),
        "how pictures were brought": lambda held: held.pop("Digits"),
        "cannot be built": lambda held: held["hyper_parameters"]["net"]["init_args"].update(wdiths=[4]),
        "missing": lambda held: held["state_dict"].pop("net.head.bias"),
    }
    for said, change in cases.items():
        with pytest.raises(SchemeError, match=said):
            open_trained(changed(digits, tmp_path / "lacking.ckpt", change))


def test_logits_that_are_not_finite_are_refused(capsys, digits, folder, tmp_path):
    def spoil(held):
        held["state_dict"]["net.head.bias"][0] = math.nan

    path = changed(digits, tmp_path / "nan.ckpt", spoil)
    assert "not finite" in fails(capsys, "predict", "--ckpt_path", str(path), str(folder / "c0"))


@pytest.mark.parametrize("name", ["predict", "evaluate"])
def test_help_names_what_there_is(capsys, name):
    with pytest.raises(SystemExit) as e:
        main([name, "--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0 and "--ckpt_path" in out and "Exit status" in out
