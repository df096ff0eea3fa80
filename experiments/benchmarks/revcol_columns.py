"""Measures memory and gradient error of RevCol against its number of columns: stored, checkpointed, exact, reverse.

    python experiments/benchmarks/revcol_columns.py [--columns 2 4 8 16] [--batch 4] [--side 64] [--save FILE]
    python experiments/benchmarks/revcol_columns.py --read experiments/results/revcol_columns.json --plot columns.png

The model is complete, with stem and head: widths 32 to 256, blocks 2, 2, 4, 2, alpha 0.5, float32. Memory is the
highest sum of allocations in one forward and backward pass, from the allocator's events, with gradients of parameters
allocated before; on a GPU (--device cuda) it is ``max_memory_allocated``. The error is that of all gradients together
against a stored run in float64, in the Euclidean norm, with that of the stored run in float32 beside it.
"""

import argparse
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from memory import peak_mib
from torch import Tensor, nn

from odenets import plots
from odenets.models import RevCol

MODES = ("store", "checkpoint", "exact", "reverse")


def network(columns: int, mode: str) -> RevCol:
    net = RevCol((32, 64, 128, 256), (2, 2, 4, 2), columns, num_classes=10, backprop=mode)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("gamma"):
                p.fill_(0.5)  # the initial value of 1e-6 would leave little of the blocks' gradients to compare
    return net


def train(net: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(net(x), y).backward()


def gradients(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    train(net, x, y)
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).double().cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--save", type=Path, help="file for what was measured")
    parser.add_argument("--read", type=Path, help="such a file, to draw instead of measuring")
    args = parser.parse_args()
    if args.read is not None:
        draw(json.loads(args.read.read_text()), args.plot)
        return
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    print(f"torch {torch.__version__}, {args.device}, batch {args.batch}, {args.side} x {args.side}")
    print(f"{'columns':>8}" + "".join(f"{mode + ' MiB':>16}{'error':>10}" for mode in MODES) + "  anchors every")
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    for columns in args.columns:
        torch.manual_seed(0)
        x = torch.randn(args.batch, 3, args.side, args.side, device=args.device)
        y = torch.arange(args.batch, device=args.device) % 10
        source = network(columns, "store").to(args.device)
        exact = network(columns, "store").to(args.device)
        exact.load_state_dict(source.state_dict())
        want = gradients(exact.double(), x.double(), y)
        line, every = f"{columns:>8}", None
        for mode in MODES:
            net = network(columns, mode).to(args.device)
            net.load_state_dict(source.state_dict())
            error = float((gradients(net, x, y) - want).norm() / want.norm())
            found[mode].append(peak_mib(partial(train, net, x, y), args.device))
            line += f"{found[mode][-1]:>16.2f}{error:>10.1e}"
            every = net.columns.monitor.every
        print(f"{line}  {every or 'none'}", flush=True)
    for mode, values in found.items():
        if len(values) > 1:
            slope = (values[-1] - values[0]) / (args.columns[-1] - args.columns[0]) * 2**20
            print(f"{mode}: {slope:,.0f} bytes per added column")
    held = {"torch": torch.__version__, "device": args.device, "columns": args.columns, "MiB": found}
    if args.save is not None:
        args.save.write_text(json.dumps(held, indent=2) + "\n")
    if args.plot is not None:
        draw(held, args.plot)


def draw(held: Mapping[str, Any], path: Path) -> None:
    series = {mode: (held["columns"], values) for mode, values in held["MiB"].items()}
    low = [mode for mode in series if mode != "store"]
    print(plots.lines(series, path, "columns", "MiB of one training step", apart=low))


if __name__ == "__main__":
    main()
