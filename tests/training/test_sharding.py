"""FSDP2 in training: two processes that hold half of each weight train as one does, and go on from one's checkpoint."""

import os
import socket
import sys
import traceback
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
from odenets.training.resume import Resume
from odenets.training.sharding import shard_module
from schemes import SchemeError

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


def fit_as_two(*args) -> None:
    """``fit`` in two processes, as torchrun starts them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    children = []
    for rank in range(2):
        if not (child := os.fork()):
            code = 1
            try:
                named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
                os.environ |= {name: str(value) for name, value in named.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
                os.environ["TORCHELASTIC_RUN_ID"] = "pair"
                fit(*args)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


@pytest.mark.long
@pytest.mark.parametrize("backprop", ["store", "reverse"])
def test_two_processes_that_divide_the_weights_train_as_one(tmp_path, backprop):
    fit(tmp_path, backprop, 1, 17)
    fit_as_two(tmp_path, backprop, 2, 8)
    fit_as_two(tmp_path, backprop, 2, 17, tmp_path / "2-8.ckpt")
    one, two = (torch.load(tmp_path / f"{n}-17.ckpt", weights_only=True) for n in (1, 2))
    assert one["global_step"] == two["global_step"] == 102
    for name, value in one["state_dict"].items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(two["state_dict"][name], value, atol=1e-10, rtol=1e-10)


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
