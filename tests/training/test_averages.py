"""Averaged weights beside the same average by hand, in double precision, and beside timm's where timm imports."""

from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from odenets.training import Classifier, Constant, MovingAverage
from schemes import SchemeError

from .test_classifier import Random, pytestmark, trainer  # noqa: F401


class Net(nn.Module):
    """With all that a state holds: weights that learn or not, statistics, whole numbers, truth values, infinities."""

    def __init__(self, table=True):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.frozen = nn.Parameter(torch.tensor([0.1, 1 / 3]), requires_grad=False)
        if table:
            self.register_buffer("table", torch.tensor([0, 1, 7, 100, 1000]))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("bias", torch.tensor([0.0, float("-inf")]))

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


class Seen(L.Callback):
    """The state after each optimiser step, and that of each validation with the number of steps before it."""

    def __init__(self):
        self.steps, self.validated = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step > len(self.steps):
            self.steps.append(state(pl_module))

    def on_validation_batch_start(self, trainer, pl_module, *args):
        self.validated.append((len(self.steps), state(pl_module)))


def state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def ran(folder, *callbacks, net=None, **options):
    torch.manual_seed(0)
    seen, module = Seen(), Classifier(net or Net(), partial(torch.optim.SGD, lr=0.05), Constant())
    torch.manual_seed(1)
    options = {
        "max_epochs": 3,
        "precision": "64-true",
        "num_sanity_val_steps": 0,
        "accumulate_grad_batches": 2,
    } | options
    run = trainer(folder, callbacks=[seen, *callbacks], **options)
    run.fit(module, Random())
    return run, module, seen


def by_hand(steps, decay, every=1, start=0):
    average = None
    for i, now in enumerate(steps):
        if i <= start or average is None:
            average = now
        elif (i - start) % every == 0:
            average = {
                k: average[k] + (1 - decay) * (v - average[k]) if v.is_floating_point() and v.isfinite().all() else v
                for k, v in now.items()
            }
    return average


def check(got, want, **tolerances):
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, **tolerances, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    "options",
    [
        {"decay": 0.9, "start": 2},
        {"decay": 0.7, "every": 2, "start": 1},
        {"decay": 0.9, "start": 50},
        {"decay": 0.9},
        {"decay": 0.0},
        {"decay": 0.9999},
    ],
)
def test_what_is_validated_and_saved_is_the_average_and_training_does_not_feel_it(tmp_path, options):
    run, module, seen = ran(tmp_path, MovingAverage(**options))
    _, _, alone = ran(tmp_path / "alone")
    assert len(seen.steps) == 6 and len(seen.validated) == 9
    for with_it, without in zip(seen.steps, alone.steps, strict=True):
        check(with_it, without, rtol=0, atol=0)
    for steps, validated in seen.validated:
        check(validated, by_hand(seen.steps[:steps], **options), rtol=1e-12, atol=1e-14)
    check(state(module), by_hand(seen.steps, **options), rtol=1e-12, atol=1e-14)
    held = torch.load(run.checkpoint_callback.best_model_path, weights_only=True)
    check(held["state_dict"], state(module), rtol=0, atol=0)
    check(held["current_model_state"], seen.steps[-1], rtol=0, atol=0)


@pytest.mark.torchvision
def test_the_average_is_timms(tmp_path):
    timm = pytest.importorskip("timm.utils.model_ema")
    _, module, seen = ran(tmp_path, MovingAverage(0.9, start=2))
    theirs = timm.ModelEmaV3(Net().double(), decay=0.9, update_after_step=1)  # steps 0 to 2 are copies there
    for number, now in enumerate(seen.steps):
        net = Net().double()
        net.load_state_dict({key.removeprefix("net."): value for key, value in now.items()})
        theirs.update(net, step=number)
    got = {key.removeprefix("net."): value for key, value in state(module).items()}
    want = theirs.module.state_dict()
    # There, the difference of two infinities makes no number.
    check({k: got[k] for k in got if k != "bias"}, {k: want[k] for k in want if k != "bias"}, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_weights_of_16_bits_are_averaged_in_32(tmp_path, precision):
    average = MovingAverage(0.9)
    _, _, seen = ran(tmp_path, average, precision=precision)
    want = by_hand([{k: v.float() for k, v in s.items() if v.is_floating_point()} for s in seen.steps], 0.9)
    got = {k: v for k, v in average._average_model.module.state_dict().items() if k in want}
    check(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "net", "run", "words"),
    [
        ({"update_starting_at_step": 2}, Net(False), {}, "update_starting_at_step: until then"),
        ({"update_starting_at_epoch": 1}, Net(False), {}, "update_starting_at_epoch: until then"),
        ({}, Net(), {}, "whole numbers in net.table"),
        ({}, Net(False), {"precision": "64-true"}, "64-true to 32 bits"),
    ],
)
def test_averages_of_others_that_would_be_other_weights_are_refused(tmp_path, options, net, run, words):
    with pytest.raises(SchemeError, match=words) as e:
        ran(tmp_path, EMAWeightAveraging(decay=0.9, **options), net=net, **{"precision": "32-true"} | run)
    assert len(str(e.value).splitlines()) == 2


def test_lightnings_own_average_passes_where_it_is_one(tmp_path):
    _, module, seen = ran(tmp_path, EMAWeightAveraging(decay=0.9), net=Net(False), precision="32-true")
    want, got = by_hand(seen.steps, 0.9), state(module)
    check(
        {k: got[k] for k in ("net.head.weight", "net.norm.running_var")},
        {k: want[k] for k in ("net.head.weight", "net.norm.running_var")},
    )


@pytest.mark.parametrize(
    "wrong", [{"decay": 1.0}, {"decay": -0.1}, {"decay": float("nan")}, {"every": 0}, {"start": -1}]
)
def test_figures_out_of_range_are_refused(wrong):
    with pytest.raises(SchemeError, match="MovingAverage: decay="):
        MovingAverage(**wrong)
