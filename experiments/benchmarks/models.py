"""Prints a table of time and memory of the models beside those of timm and torchvision, if these can be imported.

    python experiments/benchmarks/models.py                              # 8 x 3 x 96 x 96, forward and backward, CPU
    python experiments/benchmarks/models.py --models rdnet_tiny --size 192 --batch 8 --memory
    python experiments/benchmarks/models.py --device cuda --batch 128 --size 224 --amp --channels-last --compile

Time is the least CPU time of a training step over rounds in which all variants take turns (on a GPU: wall-clock time
between synchronisations). Memory is the peak of live tensors during one step beyond parameters, gradients and input,
from the allocations that the profiler records (on a GPU: the allocator's peak).
"""

import argparse
import importlib
import time
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from memory import peak_mib
from torch import Tensor, nn

from odenets import create_model

PEERS = {
    "rdnet_tiny": "timm",
    "rdnet_small": "timm",
    "convnext_tiny": "timm",
    "densenet121": "torchvision",
    "densenet201": "torchvision",
    "resnet50": "torchvision",
}


class Variant(NamedTuple):
    """One line of the table."""

    model: str
    name: str
    build: Callable[[], nn.Module]


def import_peers() -> dict[str, Callable[[str], nn.Module]]:
    """Returns the model builders of timm and torchvision, if these can be imported.

    A torchvision built for CUDA lacks its operators under a CPU build of torch and then cannot be imported, unless the
    two operators that it decorates at import are declared first.
    """
    found: dict[str, Callable[[str], nn.Module]] = {}
    if not torch.cuda.is_available():
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            try:
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            except RuntimeError:  # declared already by a torchvision that fits
                pass
        globals()["_keep"] = library
    for package, build in (
        ("torchvision.models", lambda m: lambda name: m.get_model(name)),
        ("timm", lambda m: lambda name: m.create_model(name)),
    ):
        try:
            found[package.split(".")[0]] = build(importlib.import_module(package))
        except (ImportError, RuntimeError) as error:
            print(f"# {package} does not import: {str(error).splitlines()[0]}")
    return found


def variants(names: list[str], checkpoint: bool) -> Iterator[Variant]:
    """Yields, for every model, ours, ours with recomputation, and the peer's."""
    peers = import_peers()
    for name in names:
        yield Variant(name, "odenets", lambda name=name: create_model(name))
        if checkpoint:
            modes = [{"backprop": "checkpoint"}, {"recompute": True}, {"recompute": 4 if "rdnet" in name else 2}]
            for mode in modes if not name.startswith("resnet") else modes[:1]:
                yield Variant(name, f"odenets {dict(mode)}", lambda name=name, mode=mode: create_model(name, **mode))
        package = PEERS.get(name)
        if package in peers:
            build = peers[package]
            yield Variant(name, package, lambda name=name, build=build: build(name))
            if checkpoint and package == "timm":
                yield Variant(name, "timm checkpoint", lambda name=name, build=build: _timm_checkpoint(build(name)))
            if checkpoint and name.startswith("densenet"):
                yield Variant(name, "torchvision memory_efficient", lambda name=name: _memory_efficient(name))


def _timm_checkpoint(model: nn.Module) -> nn.Module:
    model.set_grad_checkpointing(True)  # type: ignore[operator]
    return model


def _memory_efficient(name: str) -> nn.Module:
    return importlib.import_module("torchvision.models").get_model(name, memory_efficient=True)


class Job:
    """A model and an input, with a training step to time."""

    def __init__(self, variant: Variant, args: argparse.Namespace):
        self.variant, self.cuda, self.amp = variant, args.device.startswith("cuda"), args.amp
        layout = torch.channels_last if args.channels_last else torch.contiguous_format
        torch.manual_seed(0)
        self.model = variant.build().to(args.device, memory_format=layout).train()  # type: ignore[call-overload]
        x = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
        self.x = x.to(memory_format=layout)
        self.y = torch.randint(1000, (args.batch,), device=args.device)
        self.device = args.device.split(":")[0]
        self.step()  # the first call of a Stack runs extra checks that the compiler need not see
        self.run: Callable[[Tensor], Tensor] = torch.compile(self.model) if args.compile else self.model
        self.step()
        self.best = float("inf")

    def step(self) -> None:
        """Runs one forward and backward pass."""
        run = getattr(self, "run", self.model)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.amp):
            loss = F.cross_entropy(run(self.x), self.y)
        loss.backward()

    def time(self) -> None:
        """Times one step and keeps the least time."""
        clock = time.perf_counter if self.cuda else time.process_time
        if self.cuda:
            torch.cuda.synchronize()
        start = clock()
        self.step()
        if self.cuda:
            torch.cuda.synchronize()
        self.best = min(self.best, clock() - start)

    def peak(self) -> float:
        """Returns the peak MiB of one step above the level before it, which includes gradients."""
        return peak_mib(self.step, self.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["rdnet_tiny", "convnext_tiny", "densenet121"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--memory", action="store_true", help="peak memory too, and variants that recompute")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    print(f"# {args.batch} x 3 x {args.size} x {args.size}, {args.device}, torch {torch.__version__}, {vars(args)}")
    jobs = [Job(v, args) for v in variants(args.models, args.memory)]
    for _ in range(args.rounds):
        for job in jobs:
            job.time()
    print("| model | variant | ms a step | of the peer | images / s |" + (" peak MiB |" if args.memory else ""))
    print("|---|---|---|---|---|" + ("---|" if args.memory else ""))
    for job in jobs:
        peer = next((j.best for j in jobs if j.variant[:2] == (job.variant.model, PEERS.get(job.variant.model))), None)
        ratio = f"{job.best / peer:.2f}" if peer else "-"
        model, name, _ = job.variant
        row = f"| {model} | {name} | {job.best * 1e3:.0f} | {ratio} | {args.batch / job.best:.1f} |"
        print(row + (f" {job.peak():.0f} |" if args.memory else ""))


if __name__ == "__main__":
    main()
