"""The data modules: what they find in folders, how they split, and that each says what is missing."""

import logging
from functools import partial

import lightning as L
import pytest
import torch
from torch import nn

from odenets.detection import DetectionData
from odenets.segmentation import SegmentationData
from odenets.training import Augment, Classifier, DataError, Digits, Images
from odenets.training.data import IMAGENET_MEAN, IMAGENET_STD, Cached, Decoded, hold_out, middle_box, random_box

from .pictures import picture, write_folder, write_parquet


def test_digits_are_split_by_a_fixed_seed():
    a, b = Digits(), Digits()
    for data in (a, b):
        data.setup("fit")
    assert len(a.sets["train"]) == 1438 and len(a.sets["val"]) == 359
    assert torch.equal(a.sets["val"].pictures, b.sets["val"].pictures)
    x, _ = next(iter(a.train_dataloader()))
    assert x.shape == (64, 1, 8, 8) and 0 <= x.min() and x.max() == 1


@pytest.mark.parametrize("n", [2, 3, 10, 1000])
def test_held_out_and_rest_are_everything_once(n):
    train, held = hold_out(n, 0.1, seed=0)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(n)) and len(held) == max(1, round(n / 10))
    assert torch.equal(hold_out(n, 0.1, seed=0)[1], held)


def test_parquet_is_decoded_once_and_batched_by_index(cifar):
    data = Images(str(cifar), batch_size=16)
    data.setup("fit")
    assert data.num_classes == 10 and isinstance(data.sets["train"], Cached) and data.names["val"] == "test"
    assert data.sets["train"].pictures.dtype == torch.uint8
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == (16, 3, 32, 32) and y.shape == (16,)
    expected = torch.frombuffer(bytearray(picture(3).tobytes()), dtype=torch.uint8).view(32, 32, 3).permute(2, 0, 1)
    assert torch.equal(data.sets["train"].pictures[3], expected) and data.sets["train"].labels[3] == 3


def test_columns_and_splits_by_their_usual_names(tmp_path):
    write_parquet(tmp_path / "data/train-00000-of-00002.parquet", 6, 3, "image", "fine_label")
    write_parquet(tmp_path / "data/train-00001-of-00002.parquet", 6, 3, "image", "fine_label")
    write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", 3, 3, "image", "fine_label")
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", 4, 3, "image", "fine_label")
    data = Images(str(tmp_path))
    data.setup("fit"), data.setup("test")
    assert {k: len(v) for k, v in data.sets.items()} == {"train": 12, "val": 3, "test": 4}


def test_columns_and_splits_can_be_named(tmp_path):
    write_parquet(tmp_path / "train.parquet", 6, 3, "pixels", "kind")
    write_parquet(tmp_path / "extra.parquet", 5, 3, "pixels", "kind")
    data = Images(str(tmp_path), image_key="pixels", label_key="kind", val_split="extra")
    data.setup("fit")
    assert len(data.sets["val"]) == 5
    with pytest.raises(DataError, match="no column nope; it has pixels, kind"):
        Images(str(tmp_path), image_key="nope")
    with pytest.raises(DataError, match=r"no split 'nope'.*it has"):
        Images(str(tmp_path), val_split="nope")


def test_folder_without_validation_split_holds_out_and_says_so(imagenet, caplog):
    data = Images(str(imagenet), size=32, num_workers=0, batch_size=4)
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    try:
        data.setup("fit")
    finally:
        logger.removeHandler(caplog.handler)
    assert "1 of 12 training pictures are held out" in caplog.text
    assert data.num_classes == 6 and isinstance(data.sets["train"], Cached)
    x, _ = next(iter(data.train_dataloader()))
    assert x.shape == (4, 3, 32, 32) and x.dtype == torch.uint8


def test_large_pictures_are_cropped_when_decoded(tmp_path):
    write_folder(tmp_path / "train", 1, 4, size=(160, 120))
    write_folder(tmp_path / "val", 1, 3, size=(120, 160))
    data = Images(str(tmp_path), size=32, num_workers=0, batch_size=4)
    data.setup("fit")
    assert isinstance(data.sets["train"], Decoded) and len(data.sets["val"]) == 3 and data.num_classes == 4
    torch.manual_seed(0)
    first, again = data.sets["train"][0][0], data.sets["train"][0][0]
    assert first.shape == (3, 32, 32) and not torch.equal(first, again)
    assert torch.equal(data.sets["val"][0][0], data.sets["val"][0][0])
    with pytest.raises(DataError, match=r"160x120 need one size; give --data.size"):
        Images(str(tmp_path)).setup("fit")


def test_cached_pictures_of_unequal_size_want_one(tmp_path):
    write_folder(tmp_path, 1, 1, size=(32, 32))
    write_folder(tmp_path / "z", 1, 1, size=(48, 32))
    (tmp_path / "z" / "n0000").rename(tmp_path / "n0001")
    (tmp_path / "z").rmdir()
    write_folder(tmp_path / "val", 1, 1)
    (tmp_path / "train").mkdir()
    for name in ("n0000", "n0001"):
        (tmp_path / name).rename(tmp_path / "train" / name)
    with pytest.raises(DataError, match="give one size"):
        Images(str(tmp_path)).setup("fit")


def test_boxes_stay_inside():
    for _ in range(200):
        left, top, right, bottom = random_box(40, 30, 0.08)
        assert 0 <= left < right <= 40 and 0 <= top < bottom <= 30
    assert middle_box(40, 20, 1.0) == (10, 0, 30, 20)


def test_augmentation_is_for_training_only(cifar):
    class Trainer:
        training = True

    data = Images(str(cifar), augment=Augment(mixup=1.0))
    data.setup("fit")
    data.trainer = Trainer()
    batch = next(iter(data.val_dataloader()))
    assert data.on_after_batch_transfer(batch, 0)[1].shape == (20, 10)
    Trainer.training = False
    x, y = data.on_after_batch_transfer(batch, 0)
    assert torch.equal(y, batch[1]) and x.is_floating_point()


@pytest.mark.parametrize("arguments", [{}, {"root": "/no/such/folder"}, {"hub": "nobody/nothing"}])
def test_missing_data_names_the_three_ways(arguments):
    with pytest.raises(DataError) as e:
        Images(**arguments)
    text = str(e.value)
    assert len(text.splitlines()) == 2
    assert "--data.root" in text and "--data.hub" in text and "--data.download" in text and "Digits" in text


def test_hub_is_not_asked_without_permission_and_once_with_it(monkeypatch):
    import huggingface_hub

    asked = []

    def offline(self, name, **kwargs):
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", offline)
    with pytest.raises(DataError, match="downloading was not allowed"):
        Images(hub="nobody/nothing")
    assert not asked
    with pytest.raises(DataError, match="cannot be reached"):
        Images(hub="nobody/nothing", download=True)
    assert asked == ["nobody/nothing"]


def test_an_empty_folder_is_missing_data(tmp_path):
    with pytest.raises(DataError, match="neither parquet files nor class folders"):
        Images(str(tmp_path))


def test_real_cifar10(data_root):
    data = Images(str(data_root / "cifar10"))
    assert data.num_classes == 10 and data.names == {"train": "train", "val": "test", "test": "test"}
    assert len(data.splits["train"]) == 50_000 and len(data.splits["test"]) == 10_000


def test_real_folders(data_root):
    data = Images(str(data_root / "imagenet_sample"), size=64, num_workers=0, batch_size=8)
    data.setup("fit")
    assert data.num_classes == 200 and (len(data.sets["train"]), len(data.sets["val"])) == (180, 20)
    assert next(iter(data.val_dataloader()))[0].shape == (8, 3, 64, 64)
    assert Images(str(data_root / "cifar100")).num_classes == 100
    assert Images(str(data_root / "tiny_imagenet")).num_classes == 200


@pytest.mark.parametrize("share", [-0.1, 0.51, 1.0])
def test_more_than_half_of_the_digits_is_no_test_split(share):
    Digits(test_share=0.5)
    with pytest.raises(ValueError, match="test_share"):
        Digits(test_share=share)


def test_the_published_statistics_of_imagenet():
    """What torchvision and timm subtract and divide by."""
    assert IMAGENET_MEAN == (0.485, 0.456, 0.406) and IMAGENET_STD == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("module", [Images, SegmentationData, DetectionData])
@pytest.mark.parametrize(
    "option",
    [
        {"mean": []},
        {"mean": [0.5, 0.5]},
        {"mean": [123.675, 116.28, 103.53]},
        {"mean": [0.5, 0.5, float("nan")]},
        {"std": []},
        {"std": [0.2, 0.2, 0.0]},
        {"std": [58.395, 57.12, 57.375]},
    ],
)
def test_figures_that_are_not_those_of_pictures_in_0_to_1_are_refused(module, option):
    (name,) = option
    with pytest.raises(DataError, match=rf"data\.{name}=.*: wants 3 figures, of pictures in \[0, 1\].*\n  Divide"):
        module(root="nowhere", **option)


def test_a_single_figure_is_that_of_all_channels(cifar):
    data = Images(str(cifar), mean=[0.5], std=[0.25])
    assert data.mean == [0.5] * 3 and data.std == [0.25] * 3


def test_the_statistics_of_the_digits_are_those_of_their_pictures():
    data = Digits()
    data.setup("fit")
    levels = data.sets["train"].pictures.double()  # in [0, 1]
    assert data.mean == pytest.approx([float(levels.mean())], abs=0.01)
    assert data.std == pytest.approx([float(levels.std())], abs=0.01)


def test_an_error_that_a_worker_hands_over_says_what_it_said():
    handed = "Caught DataError in DataLoader worker process 0.\nTraceback: ...\nDataError: a.png cannot be read\n"
    assert str(DataError(handed)) == "a.png cannot be read"
    for text in ("a folder named DataError: x", "Caught nothing of it"):
        assert str(DataError(text)) == text


def test_a_column_that_is_missing_is_said_of_its_folder(tmp_path):
    write_parquet(tmp_path / "train.parquet", 4, 2)
    with pytest.raises(DataError, match=str(tmp_path)):
        Images(str(tmp_path), label_key="nothing").setup("fit")


@pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*", "ignore:.*many workers.*", "ignore:.*logging interval.*"
)  # Lightning
def test_pictures_on_the_device_are_trained_on_alike(cifar, tmp_path, monkeypatch):
    """Same order, same augmentation, same weights; and a batch is made where the pictures lie."""
    found, moved, move = [], [], Cached.move
    monkeypatch.setattr(Cached, "move", lambda data, device: (moved.append((data, device)), move(data, device)))
    for on_device in (False, True):
        L.seed_everything(0)
        data = Images(str(cifar), batch_size=16, augment=Augment(crop=4, flip=0.5), on_device=on_device)
        net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
        model = Classifier(net, partial(torch.optim.SGD, lr=0.01))
        trainer = L.Trainer(
            default_root_dir=tmp_path,
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            accelerator="cpu",
        )
        trainer.fit(model, datamodule=data)
        found.append(net[1].weight.detach().clone())
    assert torch.equal(*found)
    assert {data: device for data, device in moved} == dict.fromkeys(
        (data.sets["train"], data.sets["val"]), trainer.strategy.root_device
    )
    data.sets["train"].move(torch.device("meta"))
    x, y = data.sets["train"].__getitems__([(0, 3), 1])
    assert x.device.type == y.device.type == "meta" and x.shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("options", "remedy"), [({"smallest_crop": 0.5}, "smallest_crop 0"), ({"cache": False}, "cache true")]
)
def test_pictures_that_are_decoded_when_asked_for_cannot_lie_on_the_device(cifar, options, remedy):
    data = Images(str(cifar), size=32, on_device=True, **options)
    with pytest.raises(DataError, match=remedy):
        data.setup("fit")
