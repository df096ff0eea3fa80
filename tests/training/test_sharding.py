"""FSDP2 in training: two processes that hold half of each weight train as one does, and go on from one's checkpoint."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from odenets.gather import outermost
from odenets.training import Classifier, Constant
from odenets.training.finite import FiniteLoss, NotFinite, repeat
from odenets.training.resume import Resume
from odenets.training.sharding import shard_module
from schemes import SchemeError

from .runs import run_as_two
from .test_classifier import Random, trainer
from .test_processes import Reversible

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning: workers, intervals, forks of a process with threads


class Doubled(Reversible):
    """In double precision by itself, since Lightning's strategy has none."""

    def __init__(self, backprop: str) -> None:
        super().__init__(backprop)
        self.double()

    def forward(self, x):
        return super().forward(x.double())


class Divided(Callback):
    """Sees that each process holds its half, a step of the stack being a unit of its own."""

    def on_train_start(self, trainer, pl_module):
        if trainer.world_size > 1:
            from torch.distributed.fsdp import FSDPModule

            assert all(isinstance(step, FSDPModule) for stack in outermost(pl_module.net) for step in stack.steps)
            held = sum(p.to_local().numel() for p in pl_module.parameters())
            assert held < 0.6 * sum(p.numel() for p in pl_module.parameters())


def fit(folder: Path, backprop: str, devices: int, epochs: int, path: Path | None = None) -> None:
    torch.manual_seed(2)
    data = Random(n=48)
    data.batch_size = 8 // devices
    model = Classifier(Doubled(backprop), partial(torch.optim.AdamW, lr=0.01), Constant())
    options = {"callbacks": [Resume(), Divided()], "limit_val_batches": 0, "num_sanity_val_steps": 0}
    if devices > 1:
        options |= {"devices": 2, "strategy": ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)}
    run = trainer(folder, max_epochs=epochs, **options)
    run.fit(model, data, ckpt_path=path)
    run.save_checkpoint(folder / f"{devices}-{epochs}.ckpt")


@pytest.mark.long
@pytest.mark.parametrize("backprop", ["store", "reverse"])
def test_two_processes_that_divide_the_weights_train_as_one(tmp_path, backprop):
    fit(tmp_path, backprop, 1, 17)
    run_as_two(fit, tmp_path, backprop, 2, 8)
    run_as_two(fit, tmp_path, backprop, 2, 17, tmp_path / "2-8.ckpt")
    one, two = (torch.load(tmp_path / f"{n}-17.ckpt", weights_only=True) for n in (1, 2))
    assert one["global_step"] == two["global_step"] == 102
    for name, value in one["state_dict"].items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(two["state_dict"][name], value, atol=1e-10, rtol=1e-10)


class Plain(nn.Module):
    """Without a stack, so that it is divided as a whole, and is whole between its passes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Linear(36, 3).double()

    def forward(self, x):
        return self.stem(x.flatten(1).double())


class Spoils(Callback):
    """Makes the pictures of one process infinite, in the fourth step; or its weights, after the step before.

    Keeps the weights that the fourth step begins with, as one process has them.
    """

    def __init__(self, rank: int, weights: bool = False) -> None:
        self.rank, self.weights = rank, weights

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3 and trainer.world_size == 1:
            torch.save(pl_module.state_dict(), Path(trainer.default_root_dir, "third.pt"))
        if trainer.global_step == 3 and trainer.global_rank == self.rank and not self.weights:
            batch[0][1] = torch.inf

    def on_train_batch_end(self, trainer, pl_module, *args):
        if self.weights and trainer.global_step == 3:
            if trainer.global_rank == self.rank:
                next(pl_module.parameters()).data.to_local()[0] = torch.nan
            trainer.save_checkpoint(Path(trainer.default_root_dir, "bad.ckpt"))


def spoiled(folder: Path, net: nn.Module, bad: int, weights: bool, devices: int) -> None:
    """A run that ends with the error of its fourth step, which goes to ``error-RANK``."""
    torch.manual_seed(2)
    data = Random(n=48)
    data.batch_size = 8 // devices
    model = Classifier(net, partial(torch.optim.AdamW, lr=0.01), Constant())
    # As the command has it: what spoils a batch comes first, as whatever made it is no part of training.
    options = {
        "callbacks": [Spoils(bad, weights), FiniteLoss(folder)],
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
    }
    if devices > 1:
        options |= {"devices": 2, "strategy": ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)}
    run = trainer(folder, max_steps=5, **options)
    with pytest.raises(NotFinite) as caught:
        run.fit(model, data)
    (folder / f"error-{run.global_rank}").write_text(str(caught.value))


@pytest.mark.long
@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("kind", ["store", "reverse", "plain"])
def test_a_loss_that_is_not_finite_stops_both_and_the_file_holds_all_weights(tmp_path, kind, bad):
    """Whoever had the bad batch writes it, with the weights of all: those of one process at the same step."""

    def net() -> nn.Module:
        return Plain() if kind == "plain" else Doubled(kind)

    spoiled(tmp_path, net(), 0, False, 1)
    (tmp_path / "not_finite.pt").unlink()
    run_as_two(spoiled, tmp_path, net(), bad, False, 2)
    errors = [(tmp_path / f"error-{rank}").read_text() for rank in (0, 1)]
    assert all(error.count("\n") == 1 and "step 3" in error for error in errors)
    assert "the loss is nan" in errors[bad] and "another process" in errors[1 - bad]
    (path,) = tmp_path.glob("not_finite*.pt")
    assert path.name == ("not_finite-1.pt" if bad else "not_finite.pt")
    held, alone = torch.load(path), torch.load(tmp_path / "third.pt")
    assert held["batch"][0][1].isinf().all() and len(held["batch"][0]) == 4 and held["step"] == 3
    for name, value in alone.items():
        torch.testing.assert_close(held["state_dict"][name], value, atol=1e-10, rtol=1e-10)
    module = Classifier(net(), partial(torch.optim.AdamW, lr=0.01), Constant())
    assert not repeat(module, path).isfinite()


@pytest.mark.long
@pytest.mark.parametrize("bad", [0, 1])
def test_a_divided_weight_that_is_no_number_is_not_saved(tmp_path, bad):
    run_as_two(spoiled, tmp_path, Doubled("store"), bad, True, 2)
    errors = [(tmp_path / f"error-{rank}").read_text() for rank in (0, 1)]
    assert all("not finite at step 3" in error for error in errors) and "stem.weight is" in errors[0]
    assert not (tmp_path / "bad.ckpt").exists()


def attached(module: Classifier, tensor_parallel: int = 1, whole: bool = True) -> Classifier:
    """The module as a trainer with the strategy holds it, before any process group exists."""
    strategy = ModelParallelStrategy(2, tensor_parallel, save_distributed_checkpoint=not whole)
    sizes = {"data_parallel": 2, "tensor_parallel": tensor_parallel}
    strategy._device_mesh = {name: SimpleNamespace(size=lambda n=n: n) for name, n in sizes.items()}  # type: ignore
    module._trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
    return module


class Margin(Classifier):
    """Has a weight of its own beside the net."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.margin = nn.Parameter(torch.zeros(()))


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (Classifier, {"tensor_parallel": 2}, r"no layer is cut\n.*tensor_parallel_size 1"),
        (Classifier, {"whole": False}, r"in parts.*\n.*save_distributed_checkpoint: false"),
        (Margin, {}, r"margin is no part of the net.*\n.*ddp"),
    ],
)
def test_what_would_train_wrongly_or_lose_a_checkpoint_is_refused(kind, options, words):
    module = kind(Reversible("store"), partial(torch.optim.SGD, lr=0.1), Constant())
    with pytest.raises(SchemeError, match=words):
        shard_module(attached(module, **options), module.net)
