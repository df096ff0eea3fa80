"""Throughput, the step-size schedule and the report."""

import pytest
import torch
from torch import nn

from odenets.training import Classifier, StepSchedule, Throughput
from schemes import SchemeError

from .test_classifier import Net, Random, pytestmark, sgd, trainer  # noqa: F401


class Stepped(Net):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[float] = []

    def set_step(self, h: float) -> None:
        self.steps.append(h)


@pytest.mark.parametrize(("shape", "middle"), [("linear", 2.5), ("cosine", 2.5), ("geometric", 2.0)])
def test_step_schedule_goes_from_start_to_stop(tmp_path, shape, middle):
    net = Stepped()
    trainer(tmp_path, max_epochs=3, callbacks=[StepSchedule(1.0, 4.0, shape)]).fit(Classifier(net, sgd), Random())
    assert net.steps == pytest.approx([1.0, middle, 4.0])


@pytest.mark.parametrize(
    ("limits", "epochs"),
    [
        ({"max_epochs": 3}, 3),
        ({"max_epochs": -1, "max_steps": 9}, 3),
        ({"max_epochs": -1, "max_steps": 7}, 3),  # ends within an epoch
        ({"max_epochs": 9, "max_steps": 6}, 2),
        ({"max_epochs": 2, "max_steps": 50}, 2),
        ({"max_epochs": -1, "max_steps": 5, "accumulate_grad_batches": 2}, 3),
        ({"max_epochs": -1, "max_steps": 4, "limit_train_batches": 1}, 4),
        ({"max_epochs": -1, "max_steps": 2}, 1),
    ],
)
def test_step_schedule_reaches_its_end_whatever_limits_the_run(tmp_path, limits, epochs):
    net = Stepped()
    trainer(tmp_path, **limits, callbacks=[StepSchedule(1.0, 0.25)]).fit(Classifier(net, sgd), Random())
    assert net.steps == pytest.approx([1 - 0.75 * i / max(1, epochs - 1) for i in range(epochs)])


def test_step_schedule_sets_real_stacks():
    from odenets import Stack

    stack = Stack([nn.Linear(2, 2) for _ in range(4)], "midpoint")
    x = torch.randn(3, 2)
    before = stack(x)
    schedule = StepSchedule()
    schedule.apply(nn.Sequential(stack), 0.0 + 1e-6)
    assert not torch.allclose(stack(x), before)
    torch.testing.assert_close(stack(x), x, atol=1e-4, rtol=0)


def test_evaluation_of_a_checkpoint_uses_its_step(tmp_path):
    run = trainer(tmp_path, max_epochs=2, callbacks=[StepSchedule(1.0, 0.5)])
    run.fit(Classifier(Stepped(), sgd), Random())
    run.save_checkpoint(path := tmp_path / "x.ckpt")
    net = Stepped()
    options = {"ckpt_path": path, "verbose": False, "weights_only": True}
    trainer(tmp_path, callbacks=[StepSchedule(1.0, 0.5)]).test(Classifier(net, sgd), Random(), **options)
    assert {*net.steps} == {0.5}  # by the module and by the callback


def test_step_schedule_refuses_what_cannot_work():
    with pytest.raises(SchemeError, match="geometric"):
        StepSchedule(1.0, 0.0, "geometric")
    with pytest.raises(SchemeError, match="no Stack"):
        StepSchedule().apply(Net(), 1.0)


def test_throughput_counts_images_per_second(tmp_path, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("odenets.training.callbacks.time.perf_counter", lambda: next(clock))
    run = trainer(tmp_path, max_epochs=1, callbacks=[Throughput()])
    run.fit(Classifier(Net(), sgd), Random())  # 3 batches of 8; the first starts the clock, which ticks once a batch
    assert run.callback_metrics["train/images_per_s"] == 8
