"""Reversible backpropagation in two processes: one spawned pair runs every row, and each test reads its own."""

import os
import socket
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from invertible import batch, build, distance
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from odenets import Stack

NAMES = ["revnet", "momentum(0.9)", "revcol, learned"]
ROWS = [
    *(f"ddp {kind} {name}" for kind in ("plain", "unused", "static") for name in NAMES),
    *(f"ddp {kind} shared" for kind in ("plain", "unused", "static")),
    "ddp partly used",
    "ddp auto",
    *(f"fsdp steps {name}" for name in NAMES),
    *(f"fsdp steps and root {name}" for name in NAMES),
    *(f"fsdp root {name}" for name in NAMES),
    "fsdp shared",
    "fsdp inside a step",
    "fsdp middle output",
    "fsdp middle output, gathered",
]


class Shared(nn.Module):
    """One function for all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return 0.3 * self.outer(torch.tanh(self.inner(x)))


def shared(mode: str) -> Stack:
    torch.manual_seed(0)
    return Stack(Shared().double(), "revnet", 4, backprop=mode)


def make(name: str, mode: str) -> Stack:
    return shared(mode) if name == "shared" else build(name, 4, backprop=mode)


def loss_of(y: Tensor) -> Tensor:
    return y.square().sum()


def train(net: nn.Module, stack: nn.Module, x: Tensor, passes: int = 3) -> dict[str, Tensor | None]:
    """Gradients after some passes with steps of an optimiser between; parameters move, so each pass counts."""
    optimiser = torch.optim.SGD(stack.parameters(), lr=0.01)
    for n in range(passes):
        optimiser.zero_grad()
        loss_of(net(x)).backward()
        if n < passes - 1:
            optimiser.step()
    full = {k: getattr(p.grad, "full_tensor", lambda g=p.grad: g)() for k, p in stack.named_parameters()}
    return full


def expected(name: str, world: int) -> dict[str, Tensor | None]:
    """The mean over the ranks, in one process."""
    stack = make(name, "store")

    class Both(nn.Module):
        def forward(self, _: Tensor) -> Tensor:
            return torch.stack([loss_of(stack(batch(seed=10 + r))) for r in range(world)])

    both = Both()
    optimiser = torch.optim.SGD(stack.parameters(), lr=0.01)
    for n in range(3):
        optimiser.zero_grad()
        both(torch.empty(0)).mean().backward()
        if n < 2:
            optimiser.step()
    return {k: p.grad for k, p in stack.named_parameters()}


def ddp(rank: int, kind: str, name: str) -> float:
    stack = make(name, "reverse")
    options = {"unused": {"find_unused_parameters": True}, "static": {"static_graph": True}}.get(kind, {})
    net = DistributedDataParallel(stack, **options)  # type: ignore[arg-type]
    return distance(train(net, stack, batch(seed=10 + rank)), expected(name, 2))


class Early(nn.Module):
    """Uses a middle output only, so that the last steps get no gradient."""

    def __init__(self, stack: Stack):
        super().__init__()
        self.stack = stack

    def forward(self, x: Tensor) -> Tensor:
        return self.stack.trajectory(x)[1]


def ddp_partly(rank: int) -> float:
    stack = build("revnet", 4)
    net = DistributedDataParallel(Early(stack), find_unused_parameters=True)
    loss_of(net(batch(seed=10 + rank))).backward()
    want = build("revnet", 4, backprop="store")
    sum(loss_of(want.trajectory(batch(seed=10 + r))[1]) / 2 for r in range(2)).backward()  # type: ignore[union-attr]
    got = {k: p.grad for k, p in stack.named_parameters() if k < "steps.2"}
    return distance(got, {k: p.grad for k, p in want.named_parameters() if k < "steps.2"})


def ddp_auto(rank: int) -> Any:
    """Both take one choice, and one that measures by itself waits for nobody."""
    x = batch(64, seed=10 + rank)
    if rank == 0:
        build("leapfrog", 3, backprop="auto(memory=1GB)")(x).sum().backward()
    memory = 0.6 * build("revnet", 12, backprop="store").plan(x).predicted / 2**20
    stack = build("revnet", 12, backprop=f"auto(memory={memory})")
    got = train(DistributedDataParallel(stack), stack, x, 1)
    plans: list[Any] = [None, None]
    dist.all_gather_object(plans, str(stack.monitor.plan.plan))
    want = build("revnet", 12, backprop="store")
    sum(loss_of(want(batch(64, seed=10 + r))) / 2 for r in range(2)).backward()  # type: ignore[union-attr]
    error = distance(got, {k: p.grad for k, p in want.named_parameters()})
    return error if plans[0] == plans[1] != "12*store" else f"plans {plans}"


def fsdp(rank: int, kind: str, name: str) -> float:
    stack = make(name, "reverse")
    if "steps" in kind:
        for step in stack.steps:
            fully_shard(step)
    net: nn.Module = stack
    if "root" in kind:
        fully_shard(stack)
    return distance(train(net, stack, batch(seed=10 + rank)), expected(name, 2))


def fsdp_inside(rank: int) -> str:
    stack = build("revnet", 4)
    fully_shard(stack.steps[1].fs[0])  # type: ignore[index]
    try:
        stack(batch())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def fsdp_middle(rank: int, reshard: bool) -> Any:
    """A loss on a middle output: the steps above it are not gathered by the backward pass."""
    stack = build("revnet", 4)
    for step in stack.steps:
        fully_shard(step, reshard_after_forward=reshard)
    net = Early(stack)
    fully_shard(net)
    y = net(batch(seed=10 + rank))
    try:
        loss_of(y).backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    want = build("revnet", 4, backprop="store")
    sum(loss_of(want.trajectory(batch(seed=10 + r))[1]) / 2 for r in range(2)).backward()  # type: ignore[union-attr]
    got = {k: p.grad.full_tensor() for k, p in stack.named_parameters() if k < "steps.2"}  # type: ignore[union-attr]
    return distance(got, {k: p.grad for k, p in want.named_parameters() if k < "steps.2"})


def run_row(row: str, rank: int) -> Any:
    kind, _, rest = row.partition(" ")
    if row == "ddp partly used":
        return ddp_partly(rank)
    if row == "ddp auto":
        return ddp_auto(rank)
    if row == "fsdp inside a step":
        return fsdp_inside(rank)
    if row.startswith("fsdp middle output"):
        return fsdp_middle(rank, not row.endswith("gathered"))
    if row == "fsdp shared":
        return fsdp(rank, "root", "shared")
    if kind == "ddp":
        how, _, name = rest.partition(" ")
        return ddp(rank, how, name)
    for how in ("steps and root", "steps", "root"):
        if rest.startswith(how + " "):
            return fsdp(rank, how, rest.removeprefix(how + " "))
    raise ValueError(row)


def work(rank: int, port: int, folder: str, rows: list[str]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for row in rows:
        try:
            found[row] = run_row(row, rank)
        except Exception:
            found[row] = traceback.format_exc(limit=-4)
            break  # the other rank may wait for this one
        dist.barrier()
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    # Only what this session asks for: each row takes as long as a test.
    rows = [item.callspec.params["row"] for item in request.session.items if item.path == request.path]  # type: ignore
    folder = tmp_path_factory.mktemp("pair")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.spawn(work, (port, str(folder), rows), nprocs=2, join=False)
    assert context is not None
    try:
        while not context.join(timeout=90):
            pass
    finally:
        for process in context.processes:
            if process.is_alive():
                process.terminate()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.long
@pytest.mark.parametrize("row", ROWS)
def test_row(row: str, results: list[dict[str, Any]]) -> None:
    for found in results:
        assert row in found, f"not reached: {list(found.values())[-1]}"
        value = found[row]
        if row == "fsdp inside a step":
            assert value.startswith("SchemeError") and "steps.1.fs.0 is sharded inside a step" in value
            assert "fully_shard(stack.steps[n])" in value
        elif row == "fsdp middle output":
            assert value.startswith("SchemeError") and "reshard_after_forward=False" in value
        else:
            assert isinstance(value, float), value
            assert value <= 1e-12, value
