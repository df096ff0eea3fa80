"""Compares predicted and measured training memory under plans, and shows the plans found for a memory budget.

    python experiments/benchmarks/plan.py                    # about 5 minutes, one thread
    python experiments/benchmarks/plan.py --case revcol      # one network

Cases: "blocks", the stack of ``reversible.py`` at depth 16 (state 64x32x8x8); "revcol", RevCol-T at 96 pixels, batch 4;
"horesnet", HO-ResNet of 26 layers at 64 pixels, batch 8. Each runs in plain modes first, then under the plans that
``odenets.plan(model, x, memory=...)`` finds for shares of the stored run's memory, down to the smallest that any plan
can meet.

Predicted: the peak that the plan reports. Peak: the largest sum of the allocator's events in one forward and backward
pass, loss y.square().mean(), above the level before; gradients are preallocated, so neither they nor parameters count.
Time: processor time of one pass on one thread, the least of three, relative to the stored run. Error: relative error of
the gradients, in the global norm over all parameters, against the stored run.
"""

import argparse
import time
from collections.abc import Callable

import torch
from memory import peak_mib
from reversible import half
from torch import Tensor, nn

import odenets
from odenets import SchemeError, Stack

SHARES = (0.75, 0.5, 0.35, 0.25, 0.15, 0.1)


def blocks() -> tuple[nn.Module, Tensor]:
    return Stack([half(nn.SiLU) for _ in range(32)], "revnet"), torch.randn(64, 32, 8, 8)


def revcol() -> tuple[nn.Module, Tensor]:
    return odenets.create_model("revcol_tiny"), torch.randn(4, 3, 96, 96)


def horesnet() -> tuple[nn.Module, Tensor]:
    return odenets.create_model("ho_resnet26"), torch.randn(8, 3, 64, 64)


CASES: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], tuple[str, ...]]] = {
    "blocks": (blocks, ("store", "checkpoint", "checkpoint(4)", "reverse", "exact")),
    "revcol": (revcol, ("store", "checkpoint", "reverse", "exact")),
    "horesnet": (horesnet, ("store", "checkpoint")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, action="append")
    torch.set_num_threads(1)
    print("| network | memory | plan | predicted MiB | peak MiB | ratio | time | error |")
    print("|---|---|---|---|---|---|---|---|")
    for case in parser.parse_args().case or CASES:
        run(case)


def run(case: str) -> None:
    torch.manual_seed(0)
    make, modes = CASES[case]
    model, x = make()
    stacks = [m for m in model.modules() if isinstance(m, Stack)]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def step() -> None:
        model.zero_grad(set_to_none=False)
        model(x).square().mean().backward()

    def row(memory: str, plan: str, predicted: int) -> None:
        spent, grads = timed(step), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        stored.setdefault("time", spent)
        stored.setdefault("grads", grads.clone())
        peak = peak_mib(step)
        stored.setdefault("peak", peak)
        error = float((grads - stored["grads"]).norm() / stored["grads"].norm())
        figures = f"{predicted / 2**20:.2f} | {peak:.2f} | {predicted / 2**20 / peak:.3f}"
        print(f"| {case} | {memory} | {plan} | {figures} | {spent / stored['time']:.2f} | {error:.1e} |", flush=True)

    stored: dict = {}
    for mode in modes:
        for stack in stacks:
            stack.backprop = mode
        row("", f"`{mode}`", odenets.plan(model, x).predicted)
    for stack in stacks:
        stack.backprop = "store"
    for share in SHARES:
        memory = share * stored["peak"]
        try:
            report = odenets.plan(model, x, memory=memory)
        except SchemeError as error:
            print(f"| {case} | {memory:.1f} | {str(error).splitlines()[0]} | | | | | |", flush=True)
            break
        report.apply()
        row(f"{memory:.1f}", ", ".join(f"`{plan}`" for plan in report.plans.values()), report.predicted)
        for stack in stacks:
            stack.backprop = "store"


def timed(step: Callable[[], None]) -> float:
    step()
    found = []
    for _ in range(3):
        start = time.process_time()
        step()
        found.append(time.process_time() - start)
    return min(found)


if __name__ == "__main__":
    main()
