"""`odenets evaluate` beyond clean pictures: corruptions, attacks, sizes, calibration, and folders of other origins."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training.pictures import picture

from odenets.evaluation import ALEXNET, KINDS, CorruptionErrors, corrupt, corruption_error, read_attack
from odenets.training.calibration import Calibration
from odenets.training.judge import RealFigures
from odenets.training.labelled import Labelled, levels_of, read_classes, read_real, real_number
from odenets.training.robustness import corruption_figures, read_baseline, read_frost, size_figures
from odenets.training.sources import DataError
from odenets.training.trained import Trained, open_trained
from odenets.training.view import View
from schemes import SchemeError

from .test_pictures import answer, fails


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The pictures of `folder` that can be read."""
    root = tmp_path_factory.mktemp("whole")
    for path in folder.rglob("*.png"):
        if path.name != "broken.png":
            (root / path.parent.name).mkdir(exist_ok=True)
            (root / path.parent.name / path.name).write_bytes(path.read_bytes())
    return root


@pytest.mark.long
def test_errors_under_corruptions_are_those_of_the_corrupted_pictures(capsys, digits):
    out, _ = answer(capsys, "evaluate", str(digits), *"--corruptions fog,contrast --strengths 1,5 --json".split())
    found = json.loads(out)["corruptions"]
    trained = open_trained(digits)
    pictures = Labelled(trained)
    x, y = pictures._set.__getitems__(list(range(len(pictures))))
    levels = (x * 255).round().to(torch.uint8)
    for name in ("fog", "contrast"):
        for strength, error in zip((1, 5), found["errors"][name], strict=True):
            wrong = trained.probabilities(corrupt(levels, name, strength)).argmax(1) != y
            assert error == pytest.approx(float(wrong.float().mean()))
    assert found["pictures"] == 359
    assert found["protocol"] == "cifar" and found["frost"] == "texture"
    assert found["mean"] == pytest.approx(sum(sum(row) for row in found["errors"].values()) / 4)
    other = corruption_figures(trained, pictures, ("fog", "contrast"), (1, 5), batch_size=37)
    assert other["errors"] == found["errors"]


@pytest.mark.long
def test_a_baseline_is_a_file_that_evaluate_wrote(capsys, digits, tmp_path):
    words = ["evaluate", str(digits), *"--corruptions snow,frost --strengths 2 --limit 60".split()]
    file = tmp_path / "base.json"
    answer(capsys, *words, "--output", str(file))
    found = json.loads(answer(capsys, *words, "--baseline", str(file), "--json")[0])["corruptions"]
    assert found["mce"] == 1.0 and found["pictures"] == 60 and found["baseline"] == str(file)
    rows = list(csv.DictReader(io.StringIO(answer(capsys, *words, "--baseline", str(file), "--csv")[0])))
    assert [row["corruption"] for row in rows] == ["snow", "frost (texture)"] and rows[0]["ce"] == "1.0"
    table = answer(capsys, *words, "--baseline", str(file))[0]
    assert "mCE over" in table and "frost (texture)" in table and "snow" in table
    said = fails(capsys, *words[:3], "fog", "--strengths", "2", "--baseline", str(file))
    assert "has no fog" in said
    assert "cifar" in fails(capsys, "evaluate", str(digits), "--corruptions", "--baseline", "alexnet")
    (tmp_path / "other.json").write_text('{"errors": {"fog": [0.1]}, "strengths": [1, 2]}')
    for text in ("other.json", "none.json"):
        with pytest.raises(DataError, match="no errors under corruptions"):
            read_baseline(str(tmp_path / text))


@pytest.mark.parametrize("row", [[], [0.2], [0.2, 0.3, 0.9]])
def test_errors_are_one_per_strength_or_their_mean(row):
    mine = CorruptionErrors(0.1, {"snow": np.float32(0.5), "fog": row}, (1, 2))
    with pytest.raises(SchemeError, match=rf"fog has {len(row)} errors, for strengths 1, 2\n  Give one for each"):
        corruption_error(mine)
    with pytest.raises(SchemeError, match="there is no corruption"):
        corruption_error(mine._replace(errors={}))
    known = mine._replace(errors={"snow": np.float32(0.5), "fog": np.array([0.2, 0.4]), "frost": 0})
    mean = corruption_error(known)["mean"]
    assert mean == pytest.approx(0.8 / 3) and type(mean) is float  # not NumPy's, which JSON refuses
    assert corruption_error(known, known)["mce"] is None  # of frost without an error


def test_corruption_errors_by_hand():
    """The formulas, and frost left out where one had photographs and the other none."""
    mine = CorruptionErrors(0.1, {"fog": [0.2, 0.3], "frost": [0.4, 0.6]}, (1, 2), "texture")
    base = CorruptionErrors(0.2, {"fog": [0.5, 0.5], "frost": [0.5, 0.5]}, (1, 2), "texture")
    found = corruption_error(mine, base)
    assert found["ce"] == pytest.approx({"fog": 0.5, "frost": 1.0}) and found["mce"] == pytest.approx(0.75)
    assert found["relative"] == pytest.approx({"fog": (0.1 + 0.2) / 0.6, "frost": (0.3 + 0.5) / 0.6})
    found = corruption_error(mine, base._replace(frost="photographs"))
    assert (
        found["left_out"] == ["frost"] and found["mce"] == pytest.approx(0.5) and found["mean"] == pytest.approx(0.375)
    )
    found = corruption_error(mine, base._replace(errors={"fog": [0, 0], "frost": [0.1, 0.1]}))
    assert found["ce"]["fog"] is None and found["mce"] is None and found["relative_mce"] is None
    with pytest.raises(SchemeError, match="alike"):
        corruption_error(mine, base._replace(strengths=(1, 3)))


def test_a_baseline_serves_for_some_of_its_strengths():
    """Its mean over all of them would be another figure."""
    base = CorruptionErrors(0.2, {"fog": [0.3, 0.5, 0.9], "snow": [0.4, 0.4, 0.4]}, (1, 2, 5))
    mine = CorruptionErrors(0.1, {"fog": [0.45, 0.3]}, (5, 1))
    found = corruption_error(mine, base)
    assert found["mce"] == pytest.approx(0.75 / 1.2)
    assert found["relative_mce"] == pytest.approx((0.35 + 0.2) / (0.7 + 0.1))
    with pytest.raises(SchemeError, match="alike"):
        corruption_error(mine._replace(strengths=(5, 3)), base)
    with pytest.raises(SchemeError, match="alike"):  # a mean over three strengths says nothing of two
        corruption_error(mine, base._replace(errors={"fog": 0.5}))


def test_alexnet_has_its_published_means():
    """In per cent, over the five strengths and in the order of the table in the paper (arXiv 1903.12261)."""
    published = [89, 89, 92, 82, 83, 79, 80, 87, 83, 82, 56, 85, 65, 72, 61]
    assert [round(100 * ALEXNET.mean(name)) for name in KINDS] == published
    assert corruption_error(ALEXNET, ALEXNET)["relative_mce"] == 1.0
    for row in ALEXNET.errors.values():
        assert len(row) == 5 and all(ALEXNET.clean < error < 1 for error in row)


def test_photographs_of_frost_are_taken_from_a_folder(capsys, digits, tmp_path):
    with pytest.raises(DataError, match="no photograph"):
        read_frost(tmp_path)
    for i in range(3):
        Image.new("RGB", (100, 90), (40 * i, 10, 20)).save(tmp_path / f"frost{i}.png")
    assert [int(p[0, 0, 0]) for p in read_frost(tmp_path)] == [0, 40, 80]
    words = ["evaluate", str(digits), *"--corruptions frost --strengths 3 --limit 20 --json --frost".split()]
    assert json.loads(answer(capsys, *words, str(tmp_path))[0])["corruptions"]["frost"] == "photographs"


def test_accuracy_under_attack_is_that_of_the_attacked_pictures(capsys, digits):
    words = ["--attack", "fgsm(0.1)", "--attack", "pgd(0.1, steps=3, norm=l2)", "--limit", "50", "--seed", "3"]
    out, _ = answer(capsys, "evaluate", "--ckpt_path", str(digits), *words, "--json", "--batch_size", "17")
    found = json.loads(out)["attacks"]
    trained = open_trained(digits)
    pictures = Labelled(trained, limit=50)
    x, y = pictures._set.__getitems__(pictures.indices)
    assert pictures.indices == [i * 359 // 50 for i in range(50)]
    for row, text in zip(found, words[1:4:2], strict=True):
        moved = read_attack(text)(trained.logits, x, y, [3 * 2**32 + i for i in pictures.indices])
        right = trained.probabilities(moved).argmax(1) == y
        assert row["accuracy"]["value"] == pytest.approx(float(right.float().mean())) and row["pictures"] == 50
        assert 0 < row["farthest"] <= 0.1 + 1e-6


@pytest.mark.long
def test_sizes_show_the_same_share_of_larger_pictures(capsys, photos, whole, digits):
    out, _ = answer(capsys, "evaluate", str(photos), str(whole), "--sizes", "16,24,40", "--json")
    found = json.loads(out)
    assert [row["size"] for row in found["sizes"]] == [16, 24, 40]
    assert found["sizes"][1]["accuracy"] == found["accuracy"]
    trained = open_trained(photos)
    for row in (found["sizes"][0], found["sizes"][2]):
        view = trained.view._replace(height=row["size"], width=row["size"])
        assert view.inner == 0.75
        pictures = Labelled(trained, whole, size=row["size"])
        (_, x, y), *rest = pictures.batches(64)
        assert x.shape[-2:] == (row["size"],) * 2 and not rest
        assert row["accuracy"]["value"] == pytest.approx(
            float((trained.probabilities(x).argmax(1) == y).float().mean())
        )
    # The run's own data, decoded at another size.
    own = json.loads(answer(capsys, "evaluate", str(photos), "--sizes", "32", "--json")[0])
    assert own["sizes"][0]["pictures"] == own["pictures"] == 20
    assert "has one size" in fails(capsys, "evaluate", str(digits), "--sizes", "16")


def test_a_size_that_the_network_refuses_is_named_before_a_picture_is_read(photos, tmp_path):
    class Strict(torch.nn.Linear):
        def forward(self, x):
            raise SchemeError(f"pictures of {x.shape[-1]}: want a multiple of 32")

    trained = replace(open_trained(photos), net=Strict(1, 1))
    with pytest.raises(SchemeError, match="--sizes 24: the network does not take it: pictures of 24"):
        size_figures(trained, [24], tmp_path / "nowhere")


def test_calibration_is_the_mean_gap_of_the_bins():
    torch.manual_seed(0)
    probabilities = (2 * torch.randn(400, 4)).softmax(1)
    probabilities[:3] = torch.tensor([1.0, 0, 0, 0])  # sure to the last digit: in the last bin
    labels = torch.randint(0, 4, (400,))
    found = Calibration(10)
    for part in range(0, 400, 130):
        found.add(probabilities[part : part + 130], labels[part : part + 130])
    summary = found.summary()
    sure, best = probabilities.double().max(1)
    error, rows = 0.0, iter(summary["bins"])
    for k in range(10):
        inside = (sure >= k / 10) & ((sure < (k + 1) / 10) if k < 9 else (sure <= 1))
        if not bool(inside.any()):
            continue
        right, row = (best == labels)[inside].double().mean(), next(rows)
        error += float(inside.double().mean() * (right - sure[inside].mean()).abs())
        assert (row["from"], row["pictures"]) == (pytest.approx(k / 10), int(inside.sum()))
        assert row["accuracy"] == pytest.approx(float(right)) and row["confidence"] == pytest.approx(
            float(sure[inside].mean())
        )
    assert next(rows, None) is None and summary["ece"] == pytest.approx(error, abs=1e-12)


def test_calibration_and_its_diagram(capsys, digits, tmp_path):
    file = tmp_path / "reliability.svg"
    out, _ = answer(capsys, "evaluate", str(digits), "--calibration", "5", "--diagram", str(file))
    assert "expected calibration error" in out and str(file) in out.replace("\n", "") and "<svg" in file.read_text()
    assert ".svg" in fails(capsys, "evaluate", str(digits), "--diagram", "x.bmp")


@pytest.mark.parametrize("form", ["--json", "--csv"])
def test_what_a_program_reads_is_the_same_with_a_diagram(capsys, digits, tmp_path, form):
    words = ["evaluate", str(digits), "--limit", "30", form, *(["--calibration"] if form == "--json" else [])]
    file = tmp_path / "reliability.svg"
    alone, drawn = (answer(capsys, *words, *more)[0] for more in ([], ["--diagram", str(file)]))
    assert drawn == alone and "<svg" in file.read_text()


def test_classes_that_the_network_does_not_know_are_all_named(capsys, photos, whole, tmp_path):
    for name in ("c1", "zebra", "yak"):
        (tmp_path / name).mkdir()
        picture(3, (32, 32)).save(tmp_path / name / "0.png")
    said = fails(capsys, "evaluate", str(photos), str(tmp_path))
    assert "yak, zebra of its 3 classes" in said and "--classes" in said
    names = tmp_path / "names.txt"
    names.write_text("\n".join(["c0", "zebra", "yak", "c1", *"efghij"]))
    out, _ = answer(capsys, "evaluate", str(photos), "--data.root", str(tmp_path), "--classes", str(names), "--json")
    found = json.loads(out)
    assert {row["class"] for row in found["classes"] if row["pictures"]} == {"c1", "zebra", "yak"}
    names.write_text("\n".join(["c0", "zebra"]))
    assert "2 names, and the network 10" in fails(
        capsys, "evaluate", str(photos), str(tmp_path), "--classes", str(names)
    )


def test_lists_of_names(tmp_path):
    synsets = tmp_path / "synsets.txt"
    synsets.write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    assert read_classes(synsets, 2) == ["n01440764", "n01443537"]
    synsets.write_text("great white shark\ngreat grey owl\n")
    assert read_classes(synsets, 2) == ["great white shark", "great grey owl"]
    synsets.write_text('["b", "a"]')
    assert read_classes(synsets, 2) == ["b", "a"]
    synsets.write_text("a\na\n")
    with pytest.raises(DataError, match="'a' more than once"):
        read_classes(synsets, 2)
    with pytest.raises(DataError, match="cannot be read"):
        read_classes(tmp_path / "no.txt", 2)


def test_a_subset_is_chosen_among_alone(capsys, photos, tmp_path):
    for c in (1, 2):
        (tmp_path / f"c{c}").mkdir()
        for i in range(5):
            picture(10 * c + i, (32, 32)).save(tmp_path / f"c{c}" / f"{i}.png")
    out, _ = answer(capsys, "evaluate", str(photos), str(tmp_path), "--subset", "--json", "--calibration")
    found = json.loads(out)
    trained = open_trained(photos)
    (_, x, y), *_ = Labelled(trained, tmp_path).batches(64)
    with torch.no_grad():
        logits = trained.logits(x)[:, [1, 2]]
    right = logits.argmax(1) + 1 == y
    assert found["subset"] == 2 and found["accuracy"]["value"] == pytest.approx(float(right.float().mean()))
    assert found["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, y - 1)), abs=1e-5)
    assert {row["class"] for row in found["classes"]} <= {"c1", "c2"}


class Colours(torch.nn.Module):
    """Scores that are linear in the mean levels of a picture, times a factor, and moved by an offset per class."""

    def __init__(self, factor, offset):
        super().__init__()
        mix = torch.randn(len(offset), 3, generator=torch.Generator().manual_seed(0))
        self.mix, self.offset = torch.nn.Parameter(factor * mix), torch.nn.Parameter(torch.tensor(offset))

    def forward(self, x):
        return x.mean((2, 3)) @ self.mix.T + self.offset


@pytest.mark.parametrize("factor", [1.0, 300.0])
@pytest.mark.parametrize("offset", [0.0, 1e3], ids=["near", "far"])  # at 1e3 the others take all of the softmax
@pytest.mark.parametrize("words", ["", "--sizes 8,12", "--attack fgsm(0.1)", "--corruptions fog --strengths 1,5"])
def test_among_a_subset_a_network_is_the_one_that_has_no_other_outputs(
    factor, offset, words, capsys, tmp_path, monkeypatch
):
    kept = [0, 2, 3, 5, 6, 7]
    for c in kept:
        (tmp_path / f"c{c}").mkdir()
        for i in range(3):
            Image.new("RGB", (12, 12), (40 * i, 30 * c, 255 - 80 * i)).save(tmp_path / f"c{c}" / f"{i}.png")
    view = View(3, 8, 8, 1.0, "bilinear", [0.5] * 3, [0.5] * 3)
    net = Colours(factor, [0.0 if c in kept else offset for c in range(8)]).eval()
    whole = Trained(Path("x.ckpt"), net, [f"c{c}" for c in range(8)], view, None, 0)
    cut = Colours(factor, [0.0] * 8).eval()
    cut.mix, cut.offset = (torch.nn.Parameter(p.detach()[kept]) for p in (cut.mix, cut.offset))
    found = []
    for trained, subset in ((whole, ["--subset"]), (replace(whole, net=cut, classes=[f"c{c}" for c in kept]), [])):
        monkeypatch.setattr("odenets.cli.evaluate.open_network", lambda options, trained=trained: trained)
        out, _ = answer(capsys, "evaluate", "x.ckpt", str(tmp_path), "--json", "--calibration", *words.split(), *subset)
        found.append(json.loads(out))
    assert found[0].pop("subset") == 6
    assert found[0].pop("loss") == pytest.approx(found[1].pop("loss"), rel=1e-5)
    assert found[0] == found[1]


def test_real_labels_know_several_right_answers(tmp_path):
    file = tmp_path / "real.json"
    real = [[1, 7], [], [999], [3]]
    file.write_text(json.dumps(real))
    assert read_real(file) == real
    names = [f"n{number:08d}" for number in range(1000)]
    for order in (list(range(1000)), list(range(999, -1, -1))):  # a network may number the synsets in another order
        figures = RealFigures(real, [names[k] for k in order])
        p = torch.zeros(4, 1000)
        for row, synset in enumerate((7, 0, 999, 4)):
            p[row, order.index(synset)] = 1
        figures.add(p[:2], ["a/ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG"])
        figures.add(p[2:], ["ILSVRC2012_val_00000003_n01440764.JPEG", "ILSVRC2012_val_00000004.JPEG"])
        found = figures.summary()
        assert found["pictures"] == 3 and found["accuracy"]["value"] == pytest.approx(2 / 3)
    for name in ("x.png", "ILSVRC2012_val_00000005.JPEG", "ILSVRC2012_val_00000000.JPEG"):
        with pytest.raises(DataError, match="is none of the 4"):
            figures.add(p[:1], [name])
    with pytest.raises(DataError, match="1,000 classes"):
        RealFigures(real, names[:10])
    for text in ("{}", "[[1.5]]", "[[1000]]", "[1]", "nothing", "[]", "[[true]]"):
        file.write_text(text)
        with pytest.raises(DataError, match=r"real\.json"):
            read_real(file)
    assert real_number("ILSVRC2012_val_1.JPEG") is None


def test_levels_are_whole():
    x = torch.tensor([0.0, 0.5, 1.0])
    assert levels_of(x).tolist() == [0, 128, 255] and levels_of(levels_of(x)).tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no checkpoint"),
        (["{ckpt}", "a", "b"], "one folder"),
        (["{ckpt}", "a", "--data.root", "b"], "one folder"),
        (["{ckpt}", "--corruptions", "spatter"], "no corruption 'spatter'"),
        (["{ckpt}", "--corruptions", "fog,fog"], "twice"),
        (["{ckpt}", "--corruptions", "--strengths", "0"], "1 to 5"),
        (["{ckpt}", "--baseline", "alexnet"], "for --corruptions"),
        (["{ckpt}", "--classes", "a.txt"], "for a FOLDER"),
        (["{ckpt}", "--frost", "a"], "for --corruptions"),
        (["{ckpt}", "--attack", "cw(1)"], "no 'cw'"),
        (["{ckpt}", "--attack", "fgsm", "--corruptions", "--csv"], "one table"),
        (["{ckpt}", "--csv", "--calibration"], "the figure of --calibration"),
        (["{ckpt}", "--csv", "--real", "real.json"], "the figure of --real"),
        (["{ckpt}", "--output", "x.csv", "--calibration"], "the figure of --calibration"),
        (["{ckpt}", "--csv", "--output", "x.json"], "--csv and --output x.json exclude"),
        (["{ckpt}", "--json", "--output", "x.csv"], "--json and --output x.csv exclude"),
        (["{ckpt}", "--sizes", "0"], "below 1"),
        (["{ckpt}", "--real", "nowhere.json"], "real.json"),
    ],
    ids=lambda v: "-".join(v)[:60] if isinstance(v, list) else "",
)
def test_wrong_commands_end_in_two_lines(capsys, digits, words, said):
    assert said in fails(capsys, "evaluate", *(word.format(ckpt=digits) for word in words))


@pytest.mark.parametrize("option", ["--sizes", "--strengths"])
def test_lists_of_numbers_are_read_by_name(option, capsys):
    for text in ("a", "8,,9", "1.5", ""):
        assert "want whole numbers with commas between them" in fails(capsys, "evaluate", "x.ckpt", option, text)
