"""Measures latency and memory of models against the size of the picture: a table, and a plot of each.

    python experiments/benchmarks/input_size.py [--sizes 160 224 288 384] [--save FILE] [--plots FOLDER]
    python experiments/benchmarks/input_size.py --read experiments/results/input_size.json --plots docs/pages/pictures
    python experiments/benchmarks/input_size.py --device cuda --batch 32 --amp

Latency is the least time of a forward pass in evaluation mode over rounds in which all models take turns (CPU time; on
a GPU wall-clock time). Memory is the peak of live tensors during one training step, beyond parameters and gradients.
Both are per picture. The work of a convolutional network grows with the number of pixels: "per pixel" is relative to
the first size, and stays at 1 if time or memory grow no faster than that.
"""

import argparse
import json
import time
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from memory import peak_mib
from torch import nn

from odenets import create_model, plots

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "RDNet-T": ("rdnet_tiny", {}),
    "RDNet-T, recompute": ("rdnet_tiny", {"recompute": True}),
    "ConvNeXt-T": ("convnext_tiny", {}),
    "ConvNeXt-T, recompute": ("convnext_tiny", {"recompute": True}),
    "RevCol-T": ("revcol_tiny", {}),
    "RevCol-T, reverse": ("revcol_tiny", {"backprop": "reverse"}),
    "DenseNet-121": ("densenet121", {}),
    "DenseNet-121, recompute": ("densenet121", {"recompute": True}),
}


class Measured:
    """A model at all sizes.

    Variants that differ only in training run the same code in a forward pass, so they share the least time ``best``:
    the placement in memory affects a model's time, and two instances give a better minimum than one.
    """

    def __init__(self, name: str, options: dict[str, Any], args: argparse.Namespace, best: dict[int, float]):
        torch.manual_seed(0)
        self.args, self.device = args, args.device
        self.net: nn.Module = create_model(name, **options).to(args.device)
        self.pictures = {s: torch.randn(args.batch, 3, s, s, device=args.device) for s in args.sizes}
        self.labels = torch.arange(args.batch, device=args.device)
        self.best = best

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.args.amp)

    def time(self, size: int) -> None:
        """Times one forward pass, and keeps the least time."""
        cuda = self.device.startswith("cuda")
        clock = time.perf_counter if cuda else time.process_time
        self.net.eval()
        with torch.no_grad(), self._autocast():
            if cuda:
                torch.cuda.synchronize()
            start = clock()
            self.net(self.pictures[size])
            if cuda:
                torch.cuda.synchronize()
        self.best[size] = min(self.best.get(size, float("inf")), clock() - start)

    def memory(self, size: int) -> float:
        """Returns the peak MiB of one training step, with gradients allocated before."""
        self.net.train()

        def step() -> None:
            with self._autocast():
                loss = F.cross_entropy(self.net(self.pictures[size]), self.labels)
            loss.backward()

        for p in self.net.parameters():
            p.grad = torch.zeros_like(p)
        return peak_mib(step, self.device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    parser.add_argument("--sizes", type=int, nargs="+", default=[160, 192, 224, 256, 288, 320, 352, 384])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--plots", type=Path, help="folder for input_size_latency.png and input_size_memory.png")
    parser.add_argument("--save", type=Path, help="file for what was measured")
    parser.add_argument("--read", type=Path, help="such a file, to draw instead of measuring")
    args = parser.parse_args()
    if args.read is not None:
        draw(json.loads(args.read.read_text()), args.plots)
        return
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    print(f"# batch {args.batch}, {args.device}, torch {torch.__version__}, {args.threads} threads, amp {args.amp}")
    best: defaultdict[str, dict[int, float]] = defaultdict(dict)  # by the registered name
    models = {name: Measured(*MODELS[name], args, best[MODELS[name][0]]) for name in args.models}
    for _ in range(args.rounds + 1):  # the first round acts as a warm-up, since the least time counts
        for size in args.sizes:
            for model in models.values():
                model.time(size)
    first = args.sizes[0]
    print("| model | pictures of | ms per picture | per pixel | MiB per picture in training | per pixel |")
    print("|---|--:|--:|--:|--:|--:|")
    latency, memory = {}, {}
    for name, model in models.items():
        ms = [1e3 * model.best[size] / args.batch for size in args.sizes]
        mib = [model.memory(size) / args.batch for size in args.sizes]
        latency[name], memory[name] = (args.sizes, ms), (args.sizes, mib)
        for size, t, m in zip(args.sizes, ms, mib, strict=True):
            pixels = (size / first) ** 2
            row = f"| {name} | {size} | {t:.1f} | {t / ms[0] / pixels:.2f} | {m:.1f} | {m / mib[0] / pixels:.2f} |"
            print(row, flush=True)
    rows = {name: {"ms": latency[name][1], "MiB": memory[name][1]} for name in models}
    found = {
        "torch": torch.__version__,
        "device": args.device,
        "batch": args.batch,
        "sizes": args.sizes,
        "models": rows,
    }
    if args.save is not None:
        args.save.write_text(json.dumps(found, indent=2) + "\n")
    if args.plots is not None:
        draw(found, args.plots)


def draw(found: Mapping[str, Any], folder: Path) -> None:
    """Draws both plots: a colour for each model, dashes for variants that save memory in training."""
    sizes, rows = found["sizes"], found["models"]
    latency = {name: (sizes, row["ms"]) for name, row in rows.items() if "," not in name}  # the same in all modes
    memory = {}
    for name, row in rows.items():
        model, _, mode = name.partition(", ")
        memory[f"{model}: {mode or 'stored'}"] = (sizes, row["MiB"])
    low = [name for name in memory if not name.endswith("stored")]
    print(plots.lines(latency, folder / "input_size_latency.png", "side in pixels", "ms per picture"))
    path = folder / "input_size_memory.png"
    print(plots.lines(memory, path, "side in pixels", "MiB per picture in training", apart=low))


if __name__ == "__main__":
    main()
