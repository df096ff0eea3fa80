"""Two processes train as one does with the same batches, evaluate every sample once, and do not outlive each other."""

import os
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException
from torch.utils.data import DataLoader

from odenets import Stack
from odenets.training import Classifier, Constant, DataError, module
from odenets.training.callbacks import Agreement, Predictions
from odenets.training.data import Cached
from odenets.training.order import IGNORED, EvaluationOrder, Numbered, TrainingOrder
from odenets.training.translation import TARGET_WORDS, WORDS, Grammar, Translator

from .runs import kills
from .test_classifier import Random, trainer

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning: workers, intervals, forks of a process with threads


@pytest.mark.parametrize("samples", [16, 17, 40, 3])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_processes_share_each_batch_of_one(samples, replicas):
    """The union of the processes' batches is the batch of one process with the same number of samples in a step."""
    parts = [TrainingOrder(range(samples), 2, 5, replicas, rank) for rank in range(replicas)]
    alone = TrainingOrder(range(samples), 2 * replicas, 5)
    assert len({len(part) for part in parts}) == 1
    for number in range(len(parts[0]) // 2 if samples >= 2 * replicas else 0):
        together = [i for part in parts for i in part.batch(1, number)]
        assert sorted(together) == sorted(alone.batch(1, number))
    for part in parts:
        part.set_epoch(1)
        listed = list(part)
        assert [i for _, i in listed] == part.permutation(1)[part.rank :: replicas] and {e for e, _ in listed} == {1}
        part.skip = 1
        assert list(part) == listed[2:] and list(part) == listed, "skipping is for one iteration"
    assert parts[0].permutation(0) != parts[0].permutation(1) or samples < 4


@pytest.mark.parametrize("samples", [1, 5, 6])
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_evaluation_sees_every_sample_once(samples, replicas):
    parts = [list(EvaluationOrder(range(samples), replicas, rank)) for rank in range(replicas)]
    assert len({len(part) for part in parts}) == 1
    assert sorted(i for part in parts for i in part if isinstance(i, int)) == list(range(samples))


class Sample(NamedTuple):
    x: torch.Tensor
    y: int


LABELS = {
    "a number": lambda i: (torch.zeros(2) + i, i % 2),
    "a list": lambda i: [torch.zeros(2) + i, i % 2],
    "a list of tensors": lambda i: [torch.zeros(2) + i, torch.tensor(i % 2)],
    "a named tuple": lambda i: Sample(torch.zeros(2) + i, i % 2),
    "a tensor": lambda i: (torch.zeros(2) + i, torch.tensor(i % 2)),
    "of numpy": lambda i: (torch.zeros(2) + i, numpy.int64(i % 2)),
    "a real number": lambda i: (torch.zeros(2) + i, float(i % 2)),
    "a list of two": lambda i: [torch.zeros(2) + i, torch.tensor([i % 2, 0])],
    "with more": lambda i: (torch.zeros(2) + i, i % 2, i),
}
BAD = {
    "a bool": lambda i: (torch.zeros(2), bool(i % 2)),
    "a tensor of bytes": lambda i: (torch.zeros(2), torch.tensor(i, dtype=torch.uint8)),
    "a tensor of bools": lambda i: (torch.zeros(2), torch.tensor(i > 1)),
    "a mapping": lambda i: {"x": torch.zeros(2), "y": i},
    "a mapping beside": lambda i: (torch.zeros(2), {"y": i}),
    "several": lambda i: (torch.zeros(2), (i, i)),
}
UNLABELLED = {
    "a picture": lambda i: torch.zeros(2) + i,
    "in a tuple": lambda i: (torch.zeros(2) + i,),
    "a name": lambda i: (torch.zeros(2) + i, f"{i}.png"),
}


class Made(torch.utils.data.Dataset):
    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 5

    def __getitem__(self, i):
        return self.make(i)


class AtOnce(Made):
    def __getitems__(self, indices):
        return [self.make(i) for i in indices]


@pytest.mark.parametrize("data", [Made, AtOnce])
@pytest.mark.parametrize("kind", [*LABELS, *BAD, *UNLABELLED])
def test_padding_is_not_counted_whatever_the_label(kind, data):
    made = data({**LABELS, **BAD, **UNLABELLED}[kind])
    orders = [EvaluationOrder(made, replicas, rank) for replicas in (1, 2, 3) for rank in range(replicas)]
    loaders = [DataLoader(Numbered(made, 0), batch_size=2, sampler=order) for order in orders]
    if kind in BAD:
        with pytest.raises(DataError, match="cannot be marked as not counted\n  Let the data set"):
            list(loaders[2])
        list(loaders[0])
        return
    for replicas, shares in ((1, loaders[:1]), (2, loaders[1:3]), (3, loaders[3:])):
        batches = [batch for share in shares for batch in share]
        if kind in UNLABELLED:
            assert sum(len(b if isinstance(b, torch.Tensor) else b[0]) for b in batches) == -(-5 // replicas) * replicas
            continue
        rows = [(x[n, 0], y[n].flatten()) for x, y, *_ in batches for n in range(len(y))]
        assert sorted((int(i), int(k[0])) for i, k in rows if (k != IGNORED).all()) == [(i, i % 2) for i in range(5)]


@pytest.mark.parametrize("counts", [(1, 0), (0, 0), (3, 1), (1, 0, 0), (7, 7)])
def test_each_word_has_the_same_weight_whichever_process_has_it(counts):
    """The mean over the processes of share times mean is the mean over all words, also if some have none."""
    reduce = lambda own, reduce_op: torch.tensor(sum(counts) / len(counts))  # noqa: E731
    run = SimpleNamespace(strategy=SimpleNamespace(reduce=reduce))
    shares = [module.share_of(run, torch.tensor(count)) for count in counts]
    assert sum(float(share) for share in shares) == pytest.approx(len(counts) if any(counts) else 0)
    for share, count in zip(shares, counts, strict=True):
        assert float(share) == pytest.approx(count * len(counts) / max(1, sum(counts)))


class Reversible(nn.Module):
    """Two streams of a coupling without norms, so that a batch can be cut in two."""

    def __init__(self, backprop: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.head = nn.Linear(36, 8), nn.Linear(8, 3)
        functions = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)]
        self.stack = Stack(functions, "revnet", backprop=backprop)

    def forward(self, x):
        return self.head(self.stack(self.stem(x.flatten(1))))


class Keeps(Callback):
    def __init__(self, steps: int = 102) -> None:
        self.steps = steps

    def on_train_end(self, trainer, pl_module):
        assert trainer.global_step == self.steps
        if trainer.is_global_zero:
            torch.save(pl_module.state_dict(), Path(trainer.default_root_dir, f"{trainer.world_size}.pt"))


def trained(tmp_path: Path, net: nn.Module, devices: int, **options: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    data = Random(n=48)
    data.batch_size = 8 // devices
    model = Classifier(net, partial(torch.optim.SGD, lr=0.1, momentum=0.9), Constant())
    options |= {"devices": devices, "strategy": "ddp_fork"} if devices > 1 else {}
    options |= {"callbacks": [Keeps()], "limit_val_batches": 0, "num_sanity_val_steps": 0}
    trainer(tmp_path, max_epochs=17, precision="64-true", **options).fit(model, data)
    return torch.load(tmp_path / f"{devices}.pt")


@pytest.mark.cases(1)
@pytest.mark.parametrize("backprop", ["store", "reverse"])
def test_two_processes_train_as_one(tmp_path, backprop):
    one, two = (trained(tmp_path, Reversible(backprop), devices) for devices in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-10, rtol=1e-10)
    assert not torch.equal(one["net.stem.weight"], Reversible(backprop).stem.weight.double())


class Normed(nn.Module):
    """Convolutions with batch norms, in the stack and before it."""

    def __init__(self, backprop: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.norm, self.head = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 3)
        functions = [nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)) for _ in range(4)]
        self.stack = Stack(functions, "revnet", backprop=backprop)

    def forward(self, x):
        return self.head(self.stack(self.norm(self.stem(x))).mean((2, 3)))


def synced(self: nn.SyncBatchNorm, x: torch.Tensor) -> torch.Tensor:
    """What a SyncBatchNorm computes, in plain torch: its own kernels are for accelerators alone."""
    channels = (1, -1, 1, 1)
    if self.training:
        sums = torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3)), x.new_full(x.shape[1:2], x[:, 0].numel())])
        mean, square, count = all_reduce(sums).unbind()
        mean, square = mean / count, square / count
        var, count = square - mean.square(), count[0].detach()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
    else:
        mean, var = self.running_mean, self.running_var
    scale = self.weight / (var + self.eps).sqrt()
    return x * scale.view(channels) + (self.bias - mean * scale).view(channels)


@pytest.mark.long
@pytest.mark.parametrize("backprop", ["store", "checkpoint", "reverse"])
def test_two_processes_with_synchronised_norms_train_as_one(tmp_path, monkeypatch, backprop):
    """Of the norms themselves only torch's kernel is not run: their place in nets, steps and passes is."""
    one = trained(tmp_path, Normed(backprop), 1)
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", synced)
    # Both refuse them on a CPU, where the kernels of torch's would be missing.
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "_passing_sync_batchnorm_handle", lambda *args: None)
    monkeypatch.setattr(module, "check_synchronised", lambda *args: None)
    two = trained(tmp_path, Normed(backprop), 2, sync_batchnorm=True)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-10, rtol=1e-10)
    assert int(two["net.norm.num_batches_tracked"]) == 102


def test_synchronised_norms_on_a_cpu_are_refused(tmp_path):
    run = trainer(tmp_path, devices=2, strategy="ddp_fork", sync_batchnorm=True)
    with pytest.raises(ProcessRaisedException, match=r"sync_batchnorm.*no kernels for a CPU\n.*sync_batchnorm false"):
        run.fit(Classifier(Normed("store"), partial(torch.optim.SGD, lr=0.1)), Random())


class Words(nn.Module):
    """Each next word from the word before and the mean of the source."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.source, self.target = nn.Embedding(WORDS, 8), nn.Embedding(TARGET_WORDS, 8)
        self.head = nn.Linear(8, TARGET_WORDS)

    def forward(self, source, target):
        return self.head(torch.tanh(self.source(source).mean(1, keepdim=True) + self.target(target)))

    def translate(self, source, length):
        return source[:, 1:2]


@pytest.mark.long
def test_two_processes_count_words_as_one(tmp_path):
    """Sentences are of unequal length: the mean over words is not the mean of the processes' means."""
    found = []
    for devices in (1, 2):
        torch.manual_seed(2)
        model = Translator(Words(), partial(torch.optim.SGD, lr=1.0), Constant(), label_smoothing=0.1)
        options = {"devices": devices, "strategy": "ddp_fork"} if devices > 1 else {}
        options |= {"callbacks": [Keeps(30)], "limit_val_batches": 0, "num_sanity_val_steps": 0}
        run = trainer(tmp_path, max_epochs=10, precision="64-true", **options)
        run.fit(model, Grammar(24, 8 // devices, 16))
        found.append(torch.load(tmp_path / f"{devices}.pt"))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-10, rtol=1e-10)


def test_words_are_counted_however_they_fall_into_batches(tmp_path):
    """Figures of 3 sentences, by ones and all at once: of a word each, and of a sentence each."""
    figures = []
    for size in (1, 2, 3):
        torch.manual_seed(3)
        model = Translator(Words(), partial(torch.optim.SGD, lr=1.0))
        figures.append(trainer(tmp_path).validate(model, Grammar(24, size, 16), verbose=False)[0])
    assert figures[0] == pytest.approx(figures[1], rel=1e-5) and figures[0] == pytest.approx(figures[2], rel=1e-5)
    assert set(figures[0]) == {"val/loss", "val/acc", "val/sentences"}


class DiesInProcess1(Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_rank == 1 and trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_ends_the_other(tmp_path):
    run = trainer(tmp_path, max_epochs=1000, devices=2, strategy="ddp_fork", callbacks=[DiesInProcess1()])
    with pytest.raises((ProcessExitedException, ProcessRaisedException), match=r"SIGKILL|Connection"):
        run.fit(Classifier(Reversible("store"), partial(torch.optim.SGD, lr=0.1), Constant()), Random())


class Lopsided(Random):
    """Each process finds another number of samples, as in a folder that one machine has in part."""

    def setup(self, stage):
        super().setup(stage)
        count = 24 - self.trainer.global_rank
        self.sets["train"] = Cached(torch.rand(count, 1, 6, 6), torch.arange(count) % 3)


def test_processes_that_disagree_stop(tmp_path):
    run = trainer(tmp_path, devices=2, strategy="ddp_fork", callbacks=[Agreement()])
    model = Classifier(Reversible("store"), partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(ProcessRaisedException, match=r"train samples differs.*24 in process 0, 23 in process 1"):
        run.fit(model, Lopsided())


def test_two_processes_evaluate_as_one(tmp_path):
    """17 samples: one more for one of the processes. Figures count each once, predictions stand in its order."""
    figures, rows = [], []
    for devices in (1, 2):
        torch.manual_seed(3)
        data, model = Random(n=17), Classifier(Reversible("store"), partial(torch.optim.SGD, lr=0.1))
        data.batch_size = 4
        path = tmp_path / f"{devices}.csv"
        options = {"devices": devices, "strategy": "ddp_fork"} if devices > 1 else {}
        torch.manual_seed(4)
        run = trainer(tmp_path, callbacks=[Predictions(path)], **options)
        figures.append(run.validate(model, data, verbose=False)[0])
        torch.manual_seed(4)
        data.sets = {}
        trainer(tmp_path, callbacks=[Predictions(path)], **options).predict(model, data, return_predictions=False)
        rows.append(path.read_text().splitlines())
    assert figures[0] == pytest.approx(figures[1], rel=1e-6) and set(figures[0]) == {"val/loss", "val/acc"}
    assert rows[0] == rows[1] and [row.split(",")[0] for row in rows[0][1:]] == [str(i) for i in range(17)]


@pytest.mark.long
def test_two_processes_on_the_command_line(tmp_path):
    kills.write_config(tmp_path, max_epochs=1, limit_train_batches=3, limit_val_batches=2, callbacks=[])
    assert kills.wait(kills.start(tmp_path, "--trainer.devices", "2", "--trainer.strategy", "ddp_fork")) == 0
    held = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert held["odenets"]["data"]["processes"] == 2 and len(held["odenets"]["sums"]) == 2
    assert "metrics: run/metrics.csv" in (tmp_path / "out").read_text()
