"""Measures time and memory of steps, solvers and models on a device; writes a line of JSON after each case.

    python experiments/gpu/measure.py OUT --seconds 240 [--tiny]

Lines go to OUT/measured.jsonl. A case found there is not measured again; one that ended the process (a device error, a
kill) is left as "crashed". Times are medians, on a GPU between synchronisations. Memory is the allocator's peak during
one step, above the level before it.
"""

import argparse
import json
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn

import schemes
from odenets import create_model
from odenets.models import ResNet
from odenets.training import Augment, Classifier
from odenets.training.data import Cached, Pictures

sys.path += [str(Path(__file__).parents[1] / "benchmarks"), str(Path(__file__).parent)]
import models as peers_of_models
import revcol_columns
import rk_step
from memory import peak_mib
from tables import measured


class Case(NamedTuple):
    """One line of a table.

    Attributes:
        table: name of the table.
        name: name of the line in that table.
        run: measures the case and returns figures by name.
    """

    table: str
    name: str
    run: Callable[[], dict[str, Any]]


def median_s(step: Callable[[], Any], device: str, seconds: float) -> float:
    """Returns the median seconds of a call over as many as fit, at least three, after two warm-up calls."""
    if device == "cpu":  # on a CPU the only aim is to see that all of this runs
        seconds = 0.0
    times: list[float] = []
    begun = time.monotonic()
    while len(times) < 5 or (time.monotonic() - begun < seconds and len(times) < 200):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def training_step(net: nn.Module, x: torch.Tensor, y: torch.Tensor, device: str) -> None:
    """Runs forward pass and loss under bfloat16 autocast, then the backward pass."""
    with torch.autocast(device, torch.bfloat16):
        loss = F.cross_entropy(net(x).float(), y)
    loss.backward()


def prepared(build: Callable[[], nn.Module], batch: int, size: int, device: str) -> tuple[nn.Module, Callable]:
    """Returns a net with allocated gradients, and a training step on random pictures."""
    torch.manual_seed(0)
    net = build().to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    y = torch.randint(10, (batch,), device=device)
    training_step(net, x, y, device)
    return net, lambda net=net: training_step(net, x, y, device)


def model_case(build: Callable[[], nn.Module], compiled: bool, batch: int, size: int, device: str) -> dict[str, Any]:
    """Images per second and peak memory of a training step."""
    net, _ = prepared(build, batch, size, device)
    if compiled:
        net.compile()
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    y = torch.randint(10, (batch,), device=device)
    step = partial(training_step, net, x, y, device)
    step()
    s = median_s(step, device, 2.0)
    return {"batch": batch, "size": size, "images_per_s": batch / s, "ms": 1e3 * s, "peak_mib": peak_mib(step, device)}


def largest_batch(build: Callable[[], nn.Module], size: int, device: str, most: int) -> dict[str, Any]:
    """The largest power of two, as a batch size, for which a training step fits into memory; 0 if none does."""
    batch, found, bound = 1, 0, f"not above {most}"
    while batch <= most:
        try:
            prepared(build, batch, size, device)
        except torch.OutOfMemoryError:
            bound = "memory"
            break
        found, batch = batch, 2 * batch
        if device == "cuda":
            torch.cuda.empty_cache()
    return {"size": size, "batch": found, "bound": bound}


def columns_case(columns: int, mode: str, batch: int, side: int, device: str) -> dict[str, Any]:
    """Peak memory, time and gradient error of a RevCol; the reference is float64 with all states stored."""
    torch.manual_seed(0)
    source = revcol_columns.network(columns, "store")
    x, y = torch.randn(batch, 3, side, side).to(device), (torch.arange(batch) % 10).to(device)
    exact, net = revcol_columns.network(columns, "store"), revcol_columns.network(columns, mode).to(device)
    exact.load_state_dict(source.state_dict())
    net.load_state_dict(source.state_dict())
    want = revcol_columns.gradients(exact.to(device).double(), x.double(), y)
    error = float((revcol_columns.gradients(net, x, y) - want).norm() / want.norm())
    step = partial(revcol_columns.train, net, x, y)
    return {"peak_mib": peak_mib(step, device), "ms": 1e3 * median_s(step, device, 1.0), "error": error}


def rk_case(case: str, implementation: str, device: str) -> dict[str, Any]:
    """One step of rk4, forward and backward."""
    torch.manual_seed(0)
    make, x = rk_step.cases()[case]
    found = rk_step.implementations("rk4", make, False)
    if implementation not in found:
        raise ImportError(f"{implementation} does not import")
    net = found[implementation].to(device)
    x = x.to(device).requires_grad_()
    return {"us": 1e6 * median_s(lambda: net(x).sum().backward(), device, 1.0)}


def odeint_case(package: str, tolerance: float, rows: int, device: str) -> dict[str, Any]:
    """Solves the flow of a perceptron by dopri5, without gradients."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).to(device)
    y, t = torch.randn(rows, 64).to(device), torch.tensor([0.0, 4.0], device=device)
    if package == "torchdiffeq":
        from torchdiffeq import odeint
    else:
        odeint = schemes.odeint
    calls = [0]

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return net(y) * torch.cos(t)

    def solve() -> Any:
        calls[0] = 0
        with torch.no_grad():
            return odeint(field, y, t, method="dopri5", rtol=tolerance, atol=tolerance)

    s = median_s(solve, device, 1.0)
    return {"ms": 1e3 * s, "evaluations": calls[0]}


class Drawn(Pictures):
    """Random pictures in the format of CIFAR, kept in memory."""

    num_classes, in_chans = 10, 3

    def __init__(self, count: int, batch_size: int, on_device: bool) -> None:
        augment = Augment(crop=4, flip=0.5)
        super().__init__(batch_size, 0, [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616], augment)
        self.count, self.on_device = count, on_device

    def setup(self, stage: str) -> None:
        pictures = torch.randint(256, (self.count, 3, 32, 32), dtype=torch.uint8)
        self.sets["train"] = self.sets["val"] = Cached(pictures, torch.arange(self.count) % 10)


class Epochs(L.Callback):
    """Records the seconds of each epoch, from the first to the last step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begun = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.begun)


def training_case(depth: int, count: int, batch: int, compiled: bool, on_device: bool, device: str) -> dict[str, Any]:
    """Images per second of full training (augmentation, optimizer, schedule), in the best epoch after the first."""
    torch.manual_seed(0)
    net = ResNet([depth] * 3, [16, 32, 64], num_classes=10, shortcut="pad", stem="conv3")
    sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    model = Classifier(net, sgd, channels_last=True, compile=compiled)
    epochs = Epochs()
    trainer = L.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_epochs=3,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        precision="bf16-mixed",
        logger=False,
        callbacks=[epochs],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=Drawn(count, batch, on_device))
    best = min(epochs.seconds[1:])
    return {"batch": batch, "images_per_s": count // batch * batch / best, "epoch_s": best}


def cases(device: str, tiny: bool) -> Iterator[Case]:
    """Yields all cases, the most important first."""
    for case in ("cheap f 4x4",) if tiny else rk_step.cases():
        for name in ("hand: written out", "schemes", "Stack", "torchdiffeq"):
            yield Case("rk4", f"{case}, {name}", partial(rk_case, case, name, device))
    batch, side = (2, 32) if tiny else (64, 64)
    for columns in (2,) if tiny else (4, 8, 16):
        for mode in revcol_columns.MODES:
            yield Case(
                "columns", f"{columns} columns, {mode}", partial(columns_case, columns, mode, batch, side, device)
            )
    for package in ("schemes", "torchdiffeq"):
        for tolerance in (1e-3,) if tiny else (1e-3, 1e-5):
            name = f"{package}, {tolerance:g}"
            yield Case("odeint", name, partial(odeint_case, package, tolerance, 8 if tiny else 1024, device))
    for compiled, on_device in ((False, True),) if tiny else ((False, False), (False, True), (True, True)):
        run = partial(training_case, *((1, 64, 32) if tiny else (9, 50_000, 512)), compiled, on_device, device)
        how = f"pictures {'on the device' if on_device else 'in host memory'}{', compiled' if compiled else ''}"
        yield Case("training", f"ResNet-{8 if tiny else 56}, {how}", run)
    yield from model_cases(device, tiny)


def model_cases(device: str, tiny: bool) -> Iterator[Case]:
    """Yields models beside their peers, and the largest batches."""
    size, batch = (32, 2) if tiny else (224, 64)
    names = ("rdnet_small", "convnext_small", "resnet50", "ho_resnet50", "revcol_small", "revcol_base")
    names = ("resnet20",) if tiny else (*names, "vit_small_patch16")
    packages = {} if tiny else {**peers_of_models.PEERS, "convnext_small": "timm"}
    peers = peers_of_models.import_peers() if packages else {}
    for name in names:
        builds = {"odenets": partial(create_model, name)}
        if name == "vit_small_patch16":
            builds["odenets, midpoint"] = partial(create_model, name, scheme="midpoint")
        if packages.get(name) in peers:
            builds[packages[name]] = partial(peers[packages[name]], name)
        for package, build in builds.items():
            for compiled in (False,) if tiny else (False, True):
                label = f"{name}, {package}{', compiled' if compiled else ''}"
                yield Case("models", label, partial(model_case, build, compiled, batch, size, device))
    large = {"revcol_small": ("store", "checkpoint", "reverse"), "ho_resnet50": ("store", "checkpoint")}
    for name, modes in ({"revnet38": ("store", "reverse")} if tiny else large).items():
        for mode in modes:
            build = partial(create_model, name, backprop=mode)
            run = partial(largest_batch, build, size, device, 2 if tiny else 4096)
            yield Case("batch", f"{name}, {mode}", run)


def measure(all_cases: Iterator[Case], path: Path, seconds: float) -> None:
    """Measures the cases that the file lacks, as long as the longest case so far would still fit."""
    done, end, longest = measured(path), time.monotonic() + seconds, 0.0
    with path.open("a") as file:

        def say(case: Case, status: str, **figures: Any) -> None:
            text = json.dumps({"table": case.table, "name": case.name, "status": status, **figures})
            file.write(text + "\n")
            file.flush()
            print(text, flush=True)

        for case in all_cases:
            if (case.table, case.name) in done:
                continue
            begun = time.monotonic()
            if begun + longest > end:
                return
            say(case, "begun")
            try:
                figures = case.run()
            except torch.OutOfMemoryError:
                say(case, "out of memory")
            except ImportError as error:
                say(case, "not installed", error=str(error)[:200])
            except KeyboardInterrupt:
                say(case, "stopped")
                return
            except Exception as error:
                say(case, "failed", error=f"{type(error).__name__}: {error}".splitlines()[0][:300])
            else:
                say(case, "measured", **figures)
            longest = max(longest, time.monotonic() - begun)


def stop(signum: int, frame: Any) -> None:
    """Makes SIGTERM end a case as Ctrl-C does."""
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not args.tiny else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, stop)
    warnings.simplefilter("ignore")
    measure(cases(device, args.tiny), args.out / "measured.jsonl", args.seconds)


if __name__ == "__main__":
    main()
