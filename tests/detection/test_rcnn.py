"""Mask R-CNN and its cascade over torchvision's parts: equal to torchvision's own where it has them."""

import contextlib
import importlib.util
import io
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from odenets.detection import CascadeMaskRCNN, DetectionData, MaskRCNN, rcnn
from odenets.models import RevCol
from odenets.training import Detector
from odenets.training.command import run
from schemes import SchemeError

HEADS = {"one": MaskRCNN, "cascade": CascadeMaskRCNN}
every_head = pytest.mark.parametrize("head", list(HEADS))


def test_without_torchvision_it_is_refused(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    with pytest.raises(SchemeError, match="needs a torchvision that fits torch") as stop:
        rcnn.vision()
    assert "DeformableDETR" in str(stop.value).splitlines()[1]


@pytest.fixture
def vision():
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision: docs/pages/contributing.md")
    try:
        return rcnn.vision()[1]
    except SchemeError as e:
        pytest.skip(str(e))


def detector(head: str, **options) -> Detector:
    torch.manual_seed(1)
    net = RevCol(channels=(8, 16, 32), blocks=(1, 1, 1), columns=2, backprop="reverse")
    built = HEADS[head](4, width=16, hidden=32, proposals=40, **options)
    found = Detector(net, built, partial(torch.optim.AdamW, lr=1e-3))
    found.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return found


@pytest.fixture(scope="module")
def batch(drawn):
    data = DetectionData(str(drawn), size=48, batch_size=4, num_workers=0, jitter=(0.7, 1.2), multiple=16, masks=True)
    data.setup("fit")
    data.sets["train"].seed = 0
    samples = [data.sets["train"][0, i] for i in (0, 1, 2, 3)]
    found = data.on_after_batch_transfer(data._loader("val").collate_fn(samples), 0)
    assert 0 in [len(target["labels"]) for target in found[1]]
    return found


@pytest.mark.torchvision
@every_head
def test_trains_until_its_loss_has_halved(vision, head, batch):
    found = detector(head)
    optimizer = torch.optim.AdamW(found.parameters(), lr=4e-3)
    losses = []
    for _ in range(40):
        torch.manual_seed(2)  # equal draws in each step
        loss = found.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in found.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
        if losses[-1] < losses[0] / 2:
            return
    raise AssertionError(losses)


@pytest.mark.torchvision
def test_one_stage_is_torchvisions(vision, batch):
    """Losses and detections are those of its own heads, on the same pyramid and proposals."""
    found = detector("one", least=0.0)
    x, targets = batch
    head, sizes = found.head, [tuple(target["size"].tolist()) for target in targets]
    maps = found.net.forward_intermediates(x, found.rows, intermediates_only=True)
    features = head.pyramid(dict(zip(head.names, maps, strict=True)))
    images = vision.image_list.ImageList(x, sizes)
    theirs = [head._theirs(target) for target in targets]
    torch.manual_seed(5)
    ours = head(x, maps, targets, 1.0).losses
    torch.manual_seed(5)
    proposals, first = head.rpn(images, features, theirs)
    _, second = head.stages[0](features, proposals, sizes, theirs)
    want = [first["loss_objectness"], first["loss_rpn_box_reg"], *second.values()]
    assert torch.allclose(torch.stack([*ours.values()]), torch.stack(want), rtol=1e-5)
    found.eval()
    with torch.no_grad():
        ours = head(x, maps, targets, 1.0).found
        proposals, _ = head.rpn(images, features)
        results, _ = head.stages[0](features, proposals, sizes)
    assert any(len(one.boxes) for one in ours)
    for one, result, target in zip(ours, results, targets, strict=True):
        assert torch.allclose(one.boxes, result["boxes"], atol=1e-3) and torch.equal(one.labels + 1, result["labels"])
        assert torch.allclose(one.scores, result["scores"], atol=1e-5)
        assert one.masks is not None and one.masks.shape[1:] == tuple(target["stored"].tolist())


@pytest.mark.torchvision
def test_masks_are_pasted_where_their_boxes_are_in_the_file(vision, batch):
    """A picture that was halved on its way has masks of its own size, inside their boxes."""
    found = detector("cascade", least=0.0).eval()
    target = {"size": torch.tensor([48, 48]), "stored": torch.tensor([96, 72])}
    with torch.no_grad():
        (one,) = found(batch[0][:1], [target]).found
    assert one.masks is not None and one.masks.shape[1:] == (96, 72)
    from odenets.detection.drawing import in_file
    from odenets.detection.transforms import bounds

    moved = in_file(one, target["size"], target["stored"])
    around = bounds(one.masks)
    there = one.masks.flatten(1).any(1)
    assert there.any()
    assert (around[there, :2] >= moved.boxes[there, :2].floor() - 3).all()
    assert (around[there, 2:] <= moved.boxes[there, 2:].ceil() + 3).all()


@pytest.mark.torchvision
def test_boxes_are_cut_out_of_the_map_that_fits_whatever_a_picture_fills(vision):
    """torchvision guesses scales from the part of a batch that pictures fill; here the network says them."""
    pool = detector("one").head.stages[0].box_roi_pool
    assert pool.scales == [1 / 4, 1 / 8, 1 / 16]
    features = {str(n): torch.full((1, 2, 16 >> n, 16 >> n), float(n)) for n in range(3)}
    boxes = [torch.tensor([[0.0, 0, 20, 20], [0.0, 0, 60, 60]])]
    before = pool(features, boxes, [(64, 64)])
    assert torch.equal(pool(features, boxes, [(20, 20)]), before)


@pytest.mark.long
@pytest.mark.torchvision
def test_the_command_measures_and_writes_masks(vision, drawn, tmp_path):
    """What pycocotools says of the file of masks is what validation has measured."""
    widths = {"channels": [16, 32, 64], "blocks": [1, 1, 1], "columns": 2}
    net = {"class_path": "odenets.models.RevCol", "init_args": widths}
    sizes = {"width": 32, "hidden": 64, "proposals": 40, "least": 0.0}
    data = {"root": str(drawn), "size": 48, "batch_size": 9, "num_workers": 0, "masks": True, "multiple": 16}
    # On what is judged, so that something is found soon.
    data |= {"train_annotations": "annotations/val.json", "train_pictures": "images/val", "jitter": [1, 1], "flip": 0}
    config = {
        "seed_everything": 3,
        "run_dir": str(tmp_path / "run"),
        "model": {
            "class_path": "odenets.training.Detector",
            "init_args": {
                "net": net,
                "head": {"class_path": "odenets.detection.MaskRCNN", "init_args": sizes},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-3}},
                "schedule": {"class_path": "odenets.training.Constant"},
            },
        },
        "data": {"class_path": "odenets.detection.DetectionData", "init_args": data},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 30,
            "check_val_every_n_epoch": 30,
            "enable_progress_bar": False,
        },
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    run(["fit", "-c", str(tmp_path / "c.yaml")])
    command = run(["validate", "-c", str(tmp_path / "c.yaml"), "--ckpt_path", "last"])
    figures = {name: float(value) for name, value in command.trainer.callback_metrics.items()}
    run(["predict", "-c", str(tmp_path / "c.yaml"), "--ckpt_path", "last"])
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(drawn / "annotations/val.json")
        found = COCOeval(truth, truth.loadRes(str(tmp_path / "run/predict/predictions_masks.json")), "segm")
        found.evaluate()
        found.accumulate()
        found.summarize()
    ours = [figures[f"val/mask_{name}"] for name in ("AP", "AP50", "AR100")]
    assert ours == np.float32(found.stats)[[0, 1, 8]].tolist() and ours[2] > 0
    assert "val/loss" not in figures and (tmp_path / "run/predict/sheet.png").is_file()


@pytest.mark.torchvision
def test_it_says_that_it_wants_masks(vision, batch):
    targets = [{name: value for name, value in target.items() if name != "masks"} for target in batch[1]]
    with pytest.raises(SchemeError, match=r"data\.masks true"):
        detector("one")(batch[0], targets)
    losses = detector("one", masks=False)(batch[0], targets).losses
    assert set(losses) == {"objectness", "proposals", "class", "box"}
