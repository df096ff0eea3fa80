"""One network is trained the same whatever came before it, and what goes wrong on the way is a result."""

import dataclasses
import math
import os

import pytest
import torch
from torch import nn

from odenets.study import RandomNet
from odenets.study import train as train_module
from odenets.study.train import Study, kept_bytes, train
from odenets.training import Milestones
from odenets.training.sources import DataError
from schemes import SchemeError


@pytest.fixture
def study(pictures):
    return Study(root=str(pictures), size=32, epochs=1, batch_size=16, crop=2, rank_pictures=4)


def measured(result):
    return dataclasses.replace(result, seconds=None, worker="")


@pytest.mark.long
def test_the_same_network_gives_the_same_line_whatever_was_trained_before(study):
    first, second = study.candidates(4)[:2]
    alone = measured(train(study, second))
    assert alone.status == "trained", alone.error
    train(study, first)
    torch.randn(7)
    assert measured(train(study, second)) == alone
    assert alone.loss is not None and alone.train_loss is not None and 0 <= alone.accuracy <= 1
    assert [r[0] for r in alone.ranks] == [second.width * (n + 1) for n in range(second.depth + 1)]
    assert all(0 < numerical <= width and 1 <= effective <= width for width, numerical, effective in alone.ranks)


@pytest.mark.long
def test_seed_and_number_decide_the_weights(study):
    c = study.candidates(4)[0]
    losses = [
        train(study, c).loss,
        train(study, dataclasses.replace(c, number=6)).loss,
        train(dataclasses.replace(study, seed=1), c).loss,
    ]
    assert len(set(losses)) == 3


@pytest.mark.long
def test_training_leaves_random_state_and_threads_alone(study):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    train(dataclasses.replace(study, threads=2), study.candidates(4)[0])
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


@pytest.mark.parametrize("value", [None, "5"])
def test_seeds_in_the_environment_are_left_alone(study, monkeypatch, value):
    """Lightning's seeding writes them, and its next call without a number would take them."""
    names = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
    for name in names:
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    train(study, dataclasses.replace(study.candidates(4)[0], scheme="midpoint", depth=3))
    assert [os.environ.get(name) for name in names] == [value, value]


def test_a_network_that_cannot_be_trained_is_a_failed_line(study):
    broken = dataclasses.replace(study.candidates(4)[0], scheme="midpoint", depth=3)
    result = train(study, broken)
    assert result.status == "failed" and "midpoint takes 2 a step" in result.error and result.accuracy is None


def test_a_loss_that_is_no_number_is_a_diverged_line(study):
    result = train(dataclasses.replace(study, lr=1e30, epochs=2), study.candidates(4)[2])
    assert result.status == "diverged" and result.loss is None and result.ranks == []


@pytest.mark.cases(2)
@pytest.mark.parametrize("augment", ["rand_augment", "mixup", "cutmix", "drop_path", "erase"])
def test_augmentations_change_the_result(study, augment):
    c = study.candidates(4)[0]
    strong = dataclasses.replace(c, augment=augment, strength=0.9)
    assert train(study, strong).loss != train(study, c).loss


@pytest.mark.long
def test_optimisers_and_schedules_train(study):
    for options in ({"optimizer": "adamw"}, {"schedule": "cosine"}, {"classes": 3}, {"rank_pictures": 0}):
        own = dataclasses.replace(study, **options)
        assert train(own, own.candidates(4)[0]).status == "trained", options


def test_classes_are_the_first_ones(study):
    from odenets.study.train import _pictures

    data = _pictures(dataclasses.replace(study, classes=3))
    assert data.num_classes == 3
    assert set(data.sets["train"].labels.tolist()) == set(data.sets["val"].labels.tolist()) == {0, 1, 2}
    assert len(data.sets["train"]) == 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": "F"}, "space is 'F', want one of A, B, C, D, E, mini"),
        ({"schemes": ("euler",)}, "two or more, each once"),
        ({"schemes": ("euler", "euler")}, "two or more, each once"),
        ({"per_kind": 0}, "per_kind is 0, want 1 or more"),
        ({"epochs": 0}, "epochs is 0"),
    ],
)
def test_wrong_options_are_refused_at_once(options, message):
    with pytest.raises(SchemeError, match=message):
        Study(**options)


COUNTS = ["per_kind", "size", "epochs", "batch_size", "threads"]
AMOUNTS = ["lr", "weight_decay", "crop", "rank_pictures", "gpus"]
ENDS = [*((n, 1, math.inf) for n in COUNTS), *((n, 0, math.inf) for n in AMOUNTS), ("seed", 0, 4294), ("flip", 0, 1)]


@pytest.mark.parametrize(("name", "least", "most"), ENDS)
def test_numbers_have_two_ends(name, least, most):
    for value in (least, least + 1 if most == math.inf else most):
        assert getattr(Study(**{name: value}), name) == value
    for value in (least - 1, -math.inf, math.nan, math.inf, *([] if most == math.inf else [most + 1])):
        with pytest.raises(SchemeError, match=rf"{name} is {value}, want {least} (or more|to {most})"):
            Study(**{name: value})


@pytest.mark.parametrize("name", ["optimizer", "schedule", "precision"])
def test_words_are_some_of_few(name):
    with pytest.raises(SchemeError, match=f"{name} is 'adam', want one of "):
        Study(**{name: "adam"})


@pytest.mark.parametrize(("optimizer", "usual"), [("sgd", 0.1), ("adamw", 1e-3)])
def test_the_rate_is_the_one_given(optimizer, usual):
    """A rate of 0 trains nothing, which a control may want; it is no missing rate."""
    for lr in (0.0, 1e-4, 0.5):
        assert train_module._optimizer(Study(optimizer=optimizer, lr=lr)).keywords["lr"] == lr
    assert train_module._optimizer(Study(optimizer=optimizer)).keywords["lr"] == usual


def test_the_greatest_seed_is_one_of_every_generator():
    assert 4294 * 1_000_003 + 900_000 < 2**32 <= 4295 * 1_000_003


def test_classes_and_pictures_that_are_not_there(study, tmp_path):
    with pytest.raises(SchemeError, match="classes is 9, want 2 to 4"):
        dataclasses.replace(study, classes=9).data()
    with pytest.raises(DataError, match="no folder"):
        dataclasses.replace(study, root=str(tmp_path / "none")).data()


def test_kept_bytes_of_a_net_counted_by_hand():
    """A linear layer keeps its argument, the cross-entropy its log-softmax, the labels and the weight of the mean."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    x, y = torch.randn(8, 3, 2, 2), torch.zeros(8, dtype=torch.long)
    arguments, outputs, labels = 8 * 12 * 4, 8 * 10 * 4, 8 * 8
    assert kept_bytes(net, x, y) == pytest.approx(arguments + outputs + labels, abs=8)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_line_says_what_its_own_precision_keeps(study, precision):
    own = dataclasses.replace(study, precision=precision, rank_pictures=0)
    candidate = own.candidates(4)[0]
    result = train(own, candidate)
    assert result.status == "trained", result.error
    x, y = torch.zeros(16, 3, 32, 32), torch.zeros(16, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
        kept = kept_bytes(RandomNet(candidate, 4).train(), x, y)
    assert result.kept_mib == round(kept / 2**20, 3)


def test_kept_bytes_counts_a_tensor_once_and_no_parameters():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.big = nn.Parameter(torch.randn(1000, 2))
            self.heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

        def forward(self, x):
            y = x * self.big  # keeps x, and the parameter, which is no memory of its own
            return sum(head(y) for head in self.heads)  # three times y, which is one tensor

    x, y = torch.randn(1000, 2), torch.zeros(1000, dtype=torch.long)
    # x, y, the log-softmax and the labels: 8000 bytes each
    assert kept_bytes(Twice(), x, y) == pytest.approx(4 * 8000, abs=8)


def test_milestones_divide_the_rate_at_shares_of_the_run():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler = Milestones()(optimizer, 9, 3)
    rates = []
    for _ in range(9):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.4] * 3 + [0.04] * 3 + [0.004] * 3)
    with pytest.raises(SchemeError, match="shares of the run"):
        Milestones([30, 60])
