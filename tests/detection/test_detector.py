"""Detectors train on drawn shapes; reverse is store; what the command writes is what it measured."""

import contextlib
import io
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import nn

from odenets import create_model, shapes
from odenets.checkpoints import save
from odenets.cli import main
from odenets.detection import (
    RTDETR,
    CascadeMaskRCNN,
    DeformableDETR,
    DetectionData,
    Found,
    MaskRCNN,
    draw_detections,
)
from odenets.detection.drawing import color, in_file
from odenets.detection.heads import Head, Maps, Output
from odenets.detection.precision import rows
from odenets.detection.writer import DetectionFiles
from odenets.models import RevCol
from odenets.models.depth import parameter_depths
from odenets.training import Constant, Detector, WarmupCosine
from odenets.training.command import run
from odenets.training.order import PADDING, Numbered
from schemes import SchemeError

SMALL = {"queries": 12, "width": 32, "heads": 4, "decoder_layers": 2, "feedforward": 32, "points": 2}
HEADS = {
    "deformable": partial(DeformableDETR, 4, encoder_layers=1, feature_levels=3, **SMALL),
    "rt": partial(RTDETR, 4, denoising=8, **SMALL),
}
every_head = pytest.mark.parametrize("head", list(HEADS))


def net(**options) -> RevCol:
    return RevCol(channels=(8, 16, 32), blocks=(1, 1, 1), columns=2, backprop="reverse", **options)


def detector(head: str, given: nn.Module | None = None, **options) -> Detector:
    torch.manual_seed(1)
    found = Detector(given or net(), HEADS[head](), partial(torch.optim.AdamW, lr=1e-3), **options)
    found.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return found


@pytest.fixture(scope="module")
def batch(drawn):
    """Four pictures, one of which is empty, that fill different parts of the batch."""
    data = DetectionData(str(drawn), size=48, batch_size=4, num_workers=0, jitter=(0.7, 1.2), multiple=16)
    data.setup("fit")
    data.sets["train"].seed = 0
    samples = [data.sets["train"][0, i] for i in (0, 1, 2, 3)]
    found = data.on_after_batch_transfer(data._loader("val").collate_fn(samples), 0)
    assert 0 in [len(target["labels"]) for target in found[1]]
    assert len({tuple(target["size"].tolist()) for target in found[1]}) > 1
    return found


@pytest.mark.long
@every_head
def test_trains_until_its_loss_has_halved(head, batch):
    found = detector(head)
    optimizer = torch.optim.AdamW(found.parameters(), lr=4e-3)
    losses = []
    for _ in range(25):
        torch.manual_seed(2)  # equal noise in each step
        loss = found.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if losses[-1] < losses[0] / 2:
            return
    raise AssertionError(losses)


@every_head
def test_reverse_is_store(head, batch):
    """In loss and gradients, in double precision; every parameter has one."""
    found = detector(head).double()
    x, targets = batch[0].double(), batch[1]
    results = []
    for mode in ("store", "reverse"):
        found.net.columns.backprop = mode
        found.zero_grad()
        torch.manual_seed(0)
        loss = found.training_step((x, targets), 0)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in found.parameters())])
        assert all(p.grad is not None for p in found.parameters())
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(*results, strict=True))


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", ["convnext_tiny", "rdnet_tiny", "resnet20"])
@every_head
def test_any_network_with_maps(head, name, batch):
    small = {
        "convnext_tiny": {"widths": (4, 8, 16, 32), "functions": (1, 1, 1, 1)},
        "rdnet_tiny": {"growths": (4,) * 7, "init_channels": 16},
        "resnet20": {},
    }
    found = detector(head, create_model(name, **small[name]), levels=[0, 1, 2])
    found.training_step(batch, 0).backward()
    assert [n for n, p in found.named_parameters() if p.grad is None] == []


@every_head
def test_processes_that_share_a_batch_have_its_gradient(head, batch):
    """Losses are divided by the mean number of boxes: the mean of the parts is then the loss of the whole."""
    found = detector(head)
    found.head.eval(), found.net.eval()  # no dropout, no noise and no statistics of a batch
    x, targets = batch
    boxes = float(sum(len(target["labels"]) for target in targets))
    whole = found(x, targets, boxes).losses["loss"]
    parts = [found(x[at], targets[at], boxes / 2).losses["loss"] for at in (slice(0, 1), slice(1, 4))]
    assert len({len(target["labels"]) for target in targets}) > 1
    assert torch.allclose(whole, sum(parts) / 2, rtol=1e-5)


@every_head
def test_boxes_come_back_from_shares(head, batch):
    """What a head is trained to give for a box is what it reads as this box."""
    from odenets.detection.heads import _shares

    found = detector(head)
    x, targets = batch
    sizes = torch.stack([target["size"] for target in targets]).flip(1)
    edges = found.head.edges(x, sizes)
    for n, target in enumerate(targets):
        if not len(target["boxes"]):
            continue
        shares = _shares(target, edges[n])
        assert (shares["boxes"] >= 0).all() and (shares["boxes"] <= 1).all()
        logits = torch.full((1, len(target["boxes"]), 4), -9.0)
        for k, label in enumerate(target["labels"].tolist()):
            logits[0, k, label] = 9.0 - k
        (one,) = found.head.found(logits, shares["boxes"][None], edges[n : n + 1])
        count = len(target["boxes"])
        assert torch.allclose(one.boxes[:count], target["boxes"], atol=1e-4)
        assert one.labels[:count].tolist() == target["labels"].tolist()


def test_shares_are_of_width_and_height():
    from odenets.detection.heads import _shares

    target = {"boxes": torch.tensor([[0.0, 0, 64, 16]]), "labels": torch.tensor([1])}
    assert _shares(target, torch.tensor([64.0, 32.0]))["boxes"].tolist() == [[0.5, 0.25, 1.0, 0.5]]


def test_results_are_written_with_the_ids_of_the_file(drawn, tmp_path):
    """Pictures 5, 6, ... and categories 7, 11, 18, 90: a number of a class or a row is no id."""
    held = json.loads((drawn / "annotations/val.json").read_text())
    places = dict(zip((1, 2, 3, 4), (90, 7, 18, 11), strict=True))
    held["categories"] = [{**c, "id": places[c["id"]]} for c in held["categories"]]
    held["annotations"] = [
        {**a, "category_id": places[a["category_id"]], "image_id": a["image_id"] + 4} for a in held["annotations"]
    ]
    held["images"] = [{**image, "id": image["id"] + 4} for image in held["images"]]
    (tmp_path / "val.json").write_text(json.dumps(held))
    (tmp_path / "pictures").symlink_to(drawn / "images/val")
    data = DetectionData(str(tmp_path), size=48, val_annotations="val.json", val_pictures="pictures")
    data.setup("predict")
    one = Found(torch.tensor([[1.0, 2, 5, 8]] * 2), torch.tensor([0.75, 0.25]), torch.tensor([0, 3]))
    DetectionFiles(tmp_path / "out")._write(data, {2: rows(one)})
    found = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [row["category_id"] for row in found] == [7, 90] and {row["image_id"] for row in found} == {7}
    assert [row["bbox"] for row in found] == [[1, 2, 4, 6]] * 2


def colored(folder: Path, colors: list[tuple[int, int, int]]) -> DetectionData:
    """Pictures of one colour each, without boxes."""
    (folder / "train").mkdir(parents=True)
    for i, color_ in enumerate(colors):
        Image.new("RGB", (16, 16), color_).save(folder / "train" / f"{i:02d}_of_{len(colors)}.png")
    listed = [{"id": 1, "file_name": f"00_of_{len(colors)}.png", "width": 16, "height": 16}]
    held = {"images": listed, "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (folder / "train.json").write_text(json.dumps(held))
    data = DetectionData(str(folder), predict_root=str(folder / "train"))
    data.setup("predict")
    return data


def write(data: DetectionData, folder: Path, found: list[Found], **options) -> None:
    trainer = SimpleNamespace(datamodule=data, world_size=1, is_global_zero=True)
    DetectionFiles(folder, **options).write_on_epoch_end(trainer, None, [found], [[list(range(len(found)))]])  # type: ignore


NOTHING = Found(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))


@pytest.mark.parametrize("pictures", [0, 1, 3, 64])
@pytest.mark.parametrize("count", [1, 3, 14])
def test_the_files_are_those_of_this_call_whatever_lay_there(tmp_path, count, pictures):
    earlier, now = colored(tmp_path / "a", [(255, 0, 0)] * 13), colored(tmp_path / "b", [(0, 0, 255)] * count)
    masked = Found(
        torch.tensor([[1.0, 2, 5, 8]]), torch.tensor([0.75]), torch.tensor([0]), torch.ones(1, 16, 16).bool()
    )
    write(earlier, tmp_path / "out", [masked] * 13)
    own = tmp_path / "out" / "pictures" / "my own.png"
    Image.new("RGB", (4, 4)).save(own)
    write(now, tmp_path / "out", [NOTHING] * count, pictures=pictures)
    write(now, tmp_path / "fresh", [NOTHING] * count, pictures=pictures)
    own.unlink()
    found, wanted = (
        {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("out", "fresh")
    )
    assert found == wanted and len([name for name in found if "pictures/" in name]) == min(count, pictures)


@pytest.mark.filterwarnings("ignore:.*cannot be read")
@pytest.mark.parametrize("pictures", [0, 64])
def test_a_picture_that_cannot_be_read_has_no_detections(tmp_path, pictures):
    data = colored(tmp_path / "a", [(0, 0, 255)] * 4)
    (tmp_path / "a" / "train" / "02_of_4.png").write_bytes(b"no picture")
    assert [int(data.sets["predict"][i][1]["picture"]) for i in range(4)] == [1, 2, 4, 4]
    one = Found(torch.tensor([[1.0, 2, 5, 8]]), torch.tensor([0.75]), torch.tensor([0]))
    write(data, tmp_path / "out", [one] * 4, pictures=pictures)
    ids = [row["image_id"] for row in json.loads((tmp_path / "out/predictions.json").read_text())]
    assert ids == [1, 2, 4] and list(json.loads((tmp_path / "out/pictures.json").read_text())) == ["1", "2", "4"]


def test_each_layer_has_outputs_of_its_own_that_begin_as_published():
    detr = detector("deformable").head.detr
    outputs = [*detr.class_embed, *detr.bbox_embed]
    assert len({id(p) for layer in outputs for p in layer.parameters()}) == sum(
        len(list(layer.parameters())) for layer in outputs
    )
    assert [layer.layers[-1].bias.tolist() for layer in detr.bbox_embed] == [[0, 0, -2, -2], [0, 0, 0, 0]]
    assert torch.allclose(detr.class_embed[0].bias.sigmoid(), torch.tensor(0.01))
    assert all(a is b for a, b in zip(detr.bbox_embed, detr.model.decoder.bbox_embed, strict=True))
    norms = [m for m in detector("rt").head.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all((m.weight == 1).all() for m in norms)


def test_what_fills_a_batch_up_is_not_looked_at(batch):
    """Deformable DETR sees what a picture fills: it gives equal boxes in a larger batch, in pixels."""
    found = detector("deformable").eval()
    x = torch.zeros(1, 3, 64, 64)
    x[:, :, :32, :32] = batch[0][:1, :, :32, :32]
    asked = [{"size": torch.tensor([32, 32])}]
    with torch.no_grad():
        narrow, wide = (found(x[:, :, :side, :side], asked).found[0] for side in (32, 64))
    # Convolutions look over the edge; the middle of the boxes stays within a pixel of 32.
    assert (narrow.boxes.max() <= 40) and (wide.boxes.max() <= 40)


def test_channels_last_is_for_net_and_head():
    found = detector("rt", channels_last=True)
    found.setup("validate")
    for part in (found.net, found.head):
        weights = [p for p in part.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2:].numel() > 1]
        assert weights and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


def test_in_pixels_of_the_file():
    one = Found(torch.tensor([[8.0, 4.0, 32.0, 40.0]]), torch.tensor([1.0]), torch.tensor([0]))
    moved = in_file(one, torch.tensor([24, 32]), torch.tensor([48, 128]))
    assert moved.boxes.tolist() == [[32, 8, 128, 48]], "four times as wide, twice as high, cut at the edge"


def test_the_net_learns_at_its_own_rate():
    found = detector("deformable", net_lr=0.125)
    rates = {id(p): group["lr"] for group in found.make_optimizer().param_groups for p in group["params"]}
    assert {rates[id(p)] for p in found.net.parameters()} == {1e-3 / 8}
    assert {rates[id(p)] for p in found.head.parameters()} == {1e-3}


@every_head
def test_rates_decay_from_the_head_to_the_stem(head):
    """A layer has the rate of its depth in the classifier, times that of the net; all of the head has the whole."""
    depths = parameter_depths(net())
    found = detector(head, layer_decay=0.5, net_lr=0.25, step_weight_decay=0.1)
    names = {id(p): name for name, p in found.named_parameters()}
    groups = found.make_optimizer().param_groups
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert rates.keys() == dict(found.named_parameters()).keys()
    deepest = max(depths.values())
    for name, rate in rates.items():
        own = depths.get(name.removeprefix("net.")) if name.startswith("net.") else None
        want = 1e-3 if own is None else 0.25e-3 * 0.5 ** (deepest - own)
        assert rate == pytest.approx(want), name
    assert {group["lr"] for group in detector(head, layer_decay=1.0).make_optimizer().param_groups} == {1e-3}


@pytest.mark.long
def test_a_classifier_below_the_head(drawn, tmp_path, capsys):
    classifier = RevCol(channels=(8, 16), blocks=(1, 1), columns=2, num_classes=7)
    save(classifier, tmp_path / "w.safetensors")
    where = ["-c", str(configuration(drawn, tmp_path)), "--weights", str(tmp_path / "w.safetensors")]
    quick = ["--trainer.fast_dev_run", "true", "--trainer.callbacks", "[]"]
    still = ["--model.optimizer.lr", "0", "--model.net.kernel_size", "7", "--adapt.pad_kernels", "true"]
    own = run(["fit", *where, *quick, *still]).model.body.state_dict()
    assert "kernels from 3x3 to 7x7" in capsys.readouterr().out
    for name, value in own.items():
        old = classifier.state_dict()[name]
        assert torch.equal(value if value.shape == old.shape else value[..., 2:5, 2:5], old), name
    with pytest.raises(SystemExit):
        main(["test", *where])
    assert "Detector would guess with the rest" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["fit", "-c", str(tmp_path / "c.yaml"), "--model.layer_decay", "0.5", "--print_groups"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert float(rows[0][1]) == 1 and float(rows[-1][1]) == 0.5**4


@pytest.mark.parametrize("train", [False, True])
def test_frozen_norms_stay_frozen(train, batch):
    """Whether or not somebody calls train(), which Lightning does not before a run."""
    found = detector("deformable", create_model("resnet20"), freeze_norms=True)
    found = found.train() if train else found
    before = {name: buffer.clone() for name, buffer in found.net.named_buffers()}
    found.training_step(batch, 0)
    assert before and all(torch.equal(before[name], buffer) for name, buffer in found.net.named_buffers())


def test_frozen_parts_of_the_net_stay_as_they_are(batch):
    found = detector("deformable", create_model("resnet20"), frozen=["stem", "levels.[01]"], layer_decay=0.9)
    optimizer, before = found.make_optimizer(), {key: value.clone() for key, value in found.state_dict().items()}
    for _ in range(2):
        optimizer.zero_grad()
        found.training_step(batch, 0).backward()
        optimizer.step()
        found.eval().train()
    held = ("net.stem.", "net.levels.0.", "net.levels.1.")
    for key, value in found.state_dict().items():
        if key.startswith("net."):
            assert torch.equal(value, before[key]) == key.startswith(held), key
    with pytest.raises(SchemeError, match=r"'head\.detr' is no part of ResNet"):
        detector("rt", create_model("resnet20"), frozen=["head.detr"])


@every_head
def test_all_of_the_net_may_be_frozen(head, batch):
    found = detector(head, frozen=["*"])
    trained = {id(p) for group in found.make_optimizer().param_groups for p in group["params"]}
    assert trained == {id(p) for p in found.head.parameters()}
    found.training_step(batch, 0).backward()
    assert all((p.grad is not None) == (id(p) in trained) for p in found.parameters())


class Returning(nn.Module):
    """A residual function that returns a value beside its own."""

    def __init__(self, f: nn.Module, seen: list) -> None:
        super().__init__()
        self.f, self.seen = f, seen

    def forward(self, *args):
        y = self.f(*args)
        value = y.square().mean()
        self.seen.append(value.detach())
        return y, {"size": value}


def test_auxiliary_values_are_added_to_the_loss_in_every_mode(batch):
    results = []
    for mode in ("store", "reverse"):
        torch.manual_seed(3)
        given = net()
        given.columns.backprop = mode
        seen, logged = [], {}
        for step in given.columns.steps:
            for i, f in enumerate(step.fs):
                step.fs[i] = Returning(f, seen)
        found = detector("deformable", given, aux={"size": 0.5}).double()
        found.log = lambda name, value, logged=logged, **_: logged.__setitem__(name, value.item())
        torch.manual_seed(0)
        loss = found.training_step((batch[0].double(), batch[1]), 0)
        if mode == "store":
            size = float(sum(seen))
            assert logged["train/size"] == pytest.approx(size, rel=1e-5) and size > 0
            assert float(loss.detach()) == pytest.approx(logged["train/loss"] + 0.5 * size, rel=1e-5)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in found.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    found = detector("deformable", aux={"box": 1.0})
    found.head.forward = lambda *args: Output({"box": torch.zeros(()), "class": torch.zeros(())}, [])
    with pytest.raises(SchemeError, match="would be logged as train/box, which is a part of the loss"):
        found.training_step(batch, 0)


def test_padding_is_marked(drawn):
    data = DetectionData(str(drawn), size=48, num_workers=0)
    data.setup("validate")
    _, target = Numbered(data.sets["val"], 0)[PADDING, 8]
    assert target["ignored"] and not Numbered(data.sets["val"], 0)[8][1]["ignored"]


REFUSED = {
    "no maps": (lambda: Detector(nn.Linear(2, 2), HEADS["rt"](), torch.optim.AdamW), "gives no maps"),
    "levels": (lambda: detector("rt", levels=[2, 1]), "model.levels is [2, 1]"),
    "level": (lambda: detector("rt", levels=[3]), "numbers of maps that rise, from 0 to 2"),
    "rate": (lambda: detector("rt", net_lr=-1.0), "model.net_lr is -1.0"),
    "decay": (lambda: detector("rt", layer_decay=1.5), "layer_decay is 1.5"),
    "layers": (lambda: DeformableDETR(4, decoder_layers=1), "head.decoder_layers is 1"),
    "width": (lambda: RTDETR(4, width=48, heads=8), "head.width is 48 with 8 heads"),
    "heads": (lambda: RTDETR(4, width=32, heads=0), "head.width is 32 with 0 heads"),
    "points": (lambda: RTDETR(4, **{**SMALL, "points": 0}), "head.points is 0"),
    "feedforward": (lambda: DeformableDETR(4, **{**SMALL, "feedforward": 0}), "head.feedforward is 0"),
    "width of a pyramid": (lambda: MaskRCNN(4, width=0), "head.width is 0"),
    "hidden": (lambda: CascadeMaskRCNN(4, hidden=-1), "head.hidden is -1"),
    "fewer levels": (
        lambda: DeformableDETR(4, feature_levels=2, **SMALL).build(Maps([8, 8, 8], [4, 8, 16])),
        "head.feature_levels is 2, and there are 3 maps\n  Choose fewer by model.levels",
    ),
    "gap in a pyramid": (lambda: MaskRCNN(4).build(Maps([8, 8], [4, 16])), "MaskRCNN: maps of reductions [4, 16]"),
    "uneven pyramid": (lambda: CascadeMaskRCNN(4).build(Maps([8, 8, 8], [4, 8, 8])), "[4, 8, 8]; wanted each twice"),
    "gap": (lambda: RTDETR(4, **SMALL).build(Maps([8, 8], [4, 16])), "reductions [4, 16]"),
    "queries": (lambda: detector("rt", levels=[2]).detect(torch.zeros(1, 3, 32, 32)), "12 queries"),
    "odd": (lambda: detector("rt", net(pad=True)).detect(torch.zeros(1, 3, 40, 48)), "wanted multiples of 16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    made, said = REFUSED[case]
    with pytest.raises(SchemeError) as stop:
        made()
    assert said in str(stop.value) and len(str(stop.value).splitlines()) <= 2


@every_head
@pytest.mark.parametrize("freeze_norms", [False, True])
def test_detects_in_evaluation_mode_and_is_left_as_it_was(head, freeze_norms, batch):
    found = detector(head, freeze_norms=freeze_norms)
    before = [m.training for m in found.modules()]
    assert found.training
    one = found.detect(batch[0])
    assert [m.training for m in found.modules()] == before
    two = found.eval().detect(batch[0])
    assert len(one) == len(batch[0])
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.boxes, b.boxes) and torch.equal(a.scores, b.scores) and torch.equal(a.labels, b.labels)


class Masking(Head):
    """Says that it predicts masks."""

    levels, masks = 1, True

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = 4
        self.layer = nn.Linear(1, 1)

    def build(self, maps):
        pass

    def forward(self, x, maps, targets, boxes):
        one = torch.tensor([[1.0, 1, 5, 5]]), torch.tensor([0.5]), torch.tensor([0])
        return Output({"loss": self.layer.weight.sum()}, [Found(*one, torch.ones(1, 48, 48) > 0) for _ in x])


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_masks_that_the_data_lack_are_missed_before_the_first_batch(stage, drawn, tmp_path):
    data = DetectionData(str(drawn), size=48, num_workers=0, multiple=16)
    module = Detector(net(), Masking(), partial(torch.optim.SGD, lr=0.1))
    plain = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_steps=1, enable_checkpointing=False, default_root_dir=tmp_path, **plain)
    with pytest.raises(SchemeError, match=r"the head predicts masks, and the data have none\n  Give data.masks true"):
        getattr(trainer, stage)(module, data)
    module.setup("predict")  # compares nothing


def test_pictures_with_boxes():
    one = Found(
        torch.tensor([[4.0, 4, 20, 12], [0.0, 0, 31, 31]]), torch.tensor([0.9, 0.4]), torch.tensor([2, 1]), None
    )
    image = Image.new("RGB", (32, 32), "black")
    shown = np.array(draw_detections(image, one, ["a", "b", "c"]))
    assert shown.shape == (256, 256, 3)
    assert tuple(shown[12 * 8, 12 * 8]) == color(2) and tuple(shown[4 * 8 + 20, 20 * 8]) == color(2)
    assert not (shown == color(1)).all(-1).any(), "the unsure one is left out"
    masks = torch.zeros(2, 32, 32, dtype=torch.bool)
    masks[0, 4:12, 4:20] = True
    shown = np.array(draw_detections(image, one._replace(masks=masks), ["a", "b", "c"]))
    assert tuple(shown[10 * 8, 18 * 8]) == tuple(c // 2 for c in color(2))


def configuration(drawn: Path, folder: Path) -> Path:
    small = {k: v for k, v in SMALL.items() if k != "points"}
    config = {
        "seed_everything": 3,
        "run_dir": str(folder / "run"),
        "model": {
            "class_path": "odenets.training.Detector",
            "init_args": {
                "net": {
                    "class_path": "odenets.models.RevCol",
                    "init_args": {"channels": [8, 16], "blocks": [1, 1], "columns": 2, "backprop": "reverse"},
                },
                "head": {
                    "class_path": "odenets.detection.RTDETR",
                    "init_args": {**small, "denoising": 8, "dropout": 0.1},
                },
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
                "schedule": {"class_path": "odenets.training.Constant"},
            },
        },
        "data": {
            "class_path": "odenets.detection.DetectionData",
            "init_args": {"root": str(drawn), "size": 48, "batch_size": 3, "num_workers": 0, "multiple": 16},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 5,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "odenets.training.MovingAverage", "init_args": {"decay": 0.5}}],
        },
    }
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")  # stopped before the first validation
@pytest.mark.filterwarnings("ignore:.*loading a checkpoint outside the 'fit' stage")  # averaged weights are its weights
def test_the_command_trains_resumes_measures_and_predicts(drawn, tmp_path):
    """Stopped after three of five steps, inside an epoch, it ends as if it had not been; AP is that of its files."""
    path = str(configuration(drawn, tmp_path))
    run(["fit", "-c", path])
    run(["fit", "-c", path, "--run_dir", str(tmp_path / "part"), "--trainer.max_steps", "3"])
    again = ["--ckpt_path", "last", "--trainer.max_steps", "5"]
    run(["fit", "-c", path, "--run_dir", str(tmp_path / "part"), *again])
    files = [tmp_path / name / "checkpoints/last.ckpt" for name in ("run", "part")]
    whole, part = (torch.load(file, weights_only=True) for file in files)
    assert whole["global_step"] == part["global_step"] == 5
    for key in ("state_dict", "current_model_state"):
        assert whole[key].keys() == part[key].keys()
        assert all(torch.equal(value, part[key][name]) for name, value in whole[key].items())
    assert any(
        not torch.equal(value, whole["current_model_state"][name]) for name, value in whole["state_dict"].items()
    )
    command = run(["validate", "-c", path, "--ckpt_path", "last"])
    figures = {name: float(value) for name, value in command.trainer.callback_metrics.items()}
    with contextlib.redirect_stdout(io.StringIO()):
        run(["predict", "-c", path, "--ckpt_path", "last"])
    folder = tmp_path / "run/predict"
    assert len(list((folder / "pictures").iterdir())) == 9
    with Image.open(folder / "sheet.png") as shown:
        assert shown.size == (4 * 292 - 4, 3 * 292 - 4), "nine pictures, enlarged sixfold"
    assert json.loads((folder / "pictures.json").read_text())["1"] == "000000.png"
    assert figures["val/AP"] >= 0 and {f"val/{name}": value for name, value in counted(drawn, folder).items()} == {
        name: figures[name] for name in ("val/AP", "val/AP50", "val/AR100")
    }


class Keeps(Callback):
    """Writes weights and figures of a run into its folder."""

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            held = {"weights": pl_module.state_dict(), "figures": dict(trainer.callback_metrics)}
            torch.save(held, Path(trainer.default_root_dir, f"{trainer.world_size}.pt"))


class Oracle(DeformableDETR):
    """A head that trains, and in evaluation gives the boxes that are there, some pixels away."""

    def forward(self, x, maps, targets, boxes):
        out = super().forward(x, maps, targets, boxes)
        if self.training:
            return out
        away = [float(target["picture"]) % 4 for target in targets]
        scores = [torch.linspace(0.9, 0.5, len(target["boxes"])) for target in targets]
        found = [
            Found(target["boxes"] + off, score, target["labels"])
            for target, off, score in zip(targets, away, scores, strict=True)
        ]
        return out._replace(found=found)


def trained(drawn: Path, folder: Path, devices: int) -> dict:
    torch.manual_seed(2)
    data = DetectionData(str(drawn), size=48, batch_size=4 // devices, num_workers=0, multiple=16)
    net = RevCol(channels=(8, 16), blocks=(1, 1), columns=2, backprop="reverse")
    head = Oracle(4, encoder_layers=1, feature_levels=3, dropout=0.0, **SMALL)
    module = Detector(net, head, partial(torch.optim.SGD, lr=1e-3), Constant())
    options = {"devices": devices, "strategy": "ddp_fork"} if devices > 1 else {"devices": 1}
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=1,
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[Keeps()],
        **options,
    )
    trainer.fit(module, data)
    return torch.load(folder / f"{devices}.pt", weights_only=True)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # of Lightning: workers, forks of a process with threads
def test_two_processes_train_and_measure_as_one(drawn, tmp_path):
    """Of nine pictures to validate on, one comes twice, and counts once."""
    one, two = (trained(drawn, tmp_path, devices) for devices in (1, 2))
    start = RevCol(channels=(8, 16), blocks=(1, 1), columns=2).state_dict()
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, atol=1e-9, rtol=1e-7)
    assert not torch.equal(one["weights"]["net.stem.conv.weight"], start["stem.conv.weight"])
    names = [name for name in one["figures"] if name.startswith("val/")]
    assert 0.3 < one["figures"]["val/AP"] < 0.9 and one["figures"]["val/loss"] > 1
    for name in [*names, "train/loss"]:
        value = one["figures"][name]
        torch.testing.assert_close(two["figures"][name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_the_experiment_on_shapes_reaches_an_ap50_of_three_tenths(tmp_path):
    shapes.write(tmp_path / "shapes", {"train": 2000, "val": 200}, size=64)
    file = Path(__file__).parents[2] / "experiments/shapes_rtdetr.yaml"
    command = run(["fit", "-c", str(file), "--run_dir", str(tmp_path / "run"), "--data.root", str(tmp_path / "shapes")])
    assert command.trainer.callback_metrics["val/AP50"] > 0.3


def counted(drawn: Path, folder: Path) -> dict[str, float]:
    """What pycocotools says of the file of results."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(drawn / "annotations/val.json")
        found = COCOeval(truth, truth.loadRes(str(folder / "predictions.json")), "bbox")
        found.evaluate()
        found.accumulate()
        found.summarize()
    stats = np.float32(found.stats).tolist()  # as Lightning keeps figures
    return {"AP": stats[0], "AP50": stats[1], "AR100": stats[8]}


def test_a_detector_without_a_schedule_warms_up_and_anneals():
    assert type(detector("deformable").schedule) is WarmupCosine
