"""Measures memory, time and gradient error of reversible stacks, against checkpointing and public reversible code.

    python experiments/benchmarks/reversible.py                  # about 10 minutes, one thread
    python experiments/benchmarks/reversible.py --quick          # depths 8 and 32, fewer rounds
    python experiments/benchmarks/reversible.py --case revcol    # columns of levels, alpha = 0.5
    python experiments/benchmarks/reversible.py --case steps     # cost of one of many cheap steps

Case "blocks": state 64x32x8x8; a block is two half blocks GroupNorm(4)-act-conv3x3-GroupNorm(4)-act-conv3x3 without
bias on 16 channels; the loss is y.square().mean(). Case "revcol": 2 to 16 columns, widths 32..256 at 64x64 input, batch
4, ConvNeXt blocks 2,2,4,2. Case "steps": 20 to 2,000 steps of Linear(64, 64)-Tanh halves on 32 rows.
revlib, revtorch and memcnn are included if they are installed.

Peak: the largest sum of the allocator's events in one forward and backward pass, above the level before; gradients are
preallocated, so neither they nor parameters count. Slope: peak per block, from the smallest to the largest depth. Times
are processor time of one thread. Every round times every implementation once, in a new random order, and a figure is
the median over the rounds of the ratio, in the same round, to the stored run, and to the stored run plus one forward
pass without gradients.
Gradient error: relative, in the global norm over all parameters, against the stored run of the same dtype (memcnn
leaves the gradient of a leaf input at zero, which is not counted); for exact and bdia, against the run on the same grid
and with the same draws that keeps all states. bdia runs one function of 32 channels per block, as "euler, stored" does.
"""

import argparse
import copy
import math
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from memory import peak_mib
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from odenets import Stack
from odenets.layers.scale import ChannelScale

# Reference of a row's gradients, if it is not the stored run: the same arithmetic with all states kept.
REFERENCES = {"exact": "exact, all states", "bdia": "bdia, all states"}


def half(act: type[nn.Module], channels: int = 16) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.GroupNorm(4, channels), act(), nn.Conv2d(channels, channels, 3, padding=1, bias=False)]
    return nn.Sequential(*layers)


class Pair(nn.Module):
    """One hand-written block: x_0 <- x_0 + F(x_1), x_1 <- x_1 + G(x_0)."""

    def __init__(self, f: nn.Module, g: nn.Module):
        super().__init__()
        self.f, self.g = f, g

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        a = a + self.f(b)
        return torch.cat((a, b + self.g(a)), 1)


class Checkpointed(nn.Module):
    """Blocks under torch.utils.checkpoint, one by one, or in about sqrt(depth) groups."""

    def __init__(self, blocks: list[nn.Module], groups: int | None = None):
        super().__init__()
        self.blocks, self.groups = nn.ModuleList(blocks), groups

    def forward(self, x: Tensor) -> Tensor:
        if self.groups is not None:
            return checkpoint_sequential(list(self.blocks), self.groups, x, use_reentrant=False)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)  # type: ignore[assignment]
        return x


def blocks_case(depth: int, act: type[nn.Module]) -> tuple[dict[str, nn.Module], Tensor]:
    torch.manual_seed(0)
    fs = [half(act) for _ in range(2 * depth)]

    def fresh() -> list[nn.Module]:
        return [copy.deepcopy(f) for f in fs]

    def pairs() -> list[nn.Module]:
        own = fresh()
        return [Pair(own[2 * n], own[2 * n + 1]) for n in range(depth)]

    nets: dict[str, nn.Module] = {
        "stored": Stack(fresh(), "revnet"),
        "reverse": Stack(fresh(), "revnet", backprop="reverse"),
        "reverse, no checks": Stack(fresh(), "revnet", backprop="reverse(every=0, drift=false)"),
        "exact": Stack(fresh(), "revnet", backprop="exact"),
        "exact, all states": Stack(fresh(), "revnet", backprop="exact(store=true)"),
        "checkpoint each": Checkpointed(pairs()),
        "checkpoint sqrt": Checkpointed(pairs(), max(1, round(math.sqrt(depth)))),
        **public(fresh, pairs, depth),
    }
    # The same network without a split: one function of full width per block, changed only in training.
    wide = [half(act, 32) for _ in range(depth)]
    nets["euler, stored"] = Stack(copy.deepcopy(wide), "euler")
    nets["bdia"] = Stack(copy.deepcopy(wide), "bdia", backprop="exact")
    nets["bdia, all states"] = Stack(copy.deepcopy(wide), "bdia", backprop="exact(store=true)")
    return nets, torch.randn(64, 32, 8, 8)


def public(fresh: Callable[[], list[nn.Module]], pairs: Callable, depth: int) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    try:
        import revlib

        found["revlib"] = revlib.ReversibleSequential(*fresh(), split_dim=1)
    except ImportError:
        print("revlib is not installed: left out")
    try:
        import revtorch

        own = fresh()
        steps = [revtorch.ReversibleBlock(own[2 * n], own[2 * n + 1], split_along_dim=1) for n in range(depth)]
        found["revtorch"] = revtorch.ReversibleSequence(nn.ModuleList(steps))
    except ImportError:
        print("revtorch is not installed: left out")
    try:
        import memcnn

        own = fresh()
        couplings = [memcnn.AdditiveCoupling(Fm=own[2 * n], Gm=own[2 * n + 1]) for n in range(depth)]
        wrapped = [
            memcnn.InvertibleModuleWrapper(fn=c, keep_input=n == 0, keep_input_inverse=True)
            for n, c in enumerate(couplings)
        ]
        found["memcnn"] = nn.Sequential(*wrapped)
    except ImportError:
        print("memcnn is not installed: left out")
    return found


class LayerNorm(nn.LayerNorm):
    """Layer norm over the channels of (n, c, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            LayerNorm(channels, eps=1e-6),
            nn.Conv2d(channels, 4 * channels, 1),
            nn.GELU(),
            nn.Conv2d(4 * channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Level(nn.Module):
    """The function of one level: fuses the streams below and above, then applies a few ConvNeXt blocks."""

    def __init__(self, down: int | None, up: int | None, channels: int, blocks: int):
        super().__init__()
        self.down = (
            nn.Identity() if down is None else nn.Sequential(nn.Conv2d(down, channels, 2, 2), LayerNorm(channels))
        )
        self.up = None
        if up is not None:
            self.up = nn.Sequential(nn.Conv2d(up, channels, 1), LayerNorm(channels), nn.Upsample(scale_factor=2))
        self.blocks = nn.Sequential(*(ConvNeXt(channels) for _ in range(blocks)))

    def forward(self, below: Tensor, above: Tensor | None = None) -> Tensor:
        x = self.down(below)
        return self.blocks(x if above is None or self.up is None else x + self.up(above))


def revcol_case(columns: int, act: type[nn.Module]) -> tuple[dict[str, nn.Module], Tensor]:
    widths, counts = [32, 64, 128, 256], [2, 2, 4, 2]
    torch.manual_seed(0)
    levels = [
        Level(widths[k - 1] if k else None, widths[k + 1] if k < 3 and n else None, widths[k], counts[k])
        for n in range(columns)
        for k in range(4)
    ]
    scales = [[]] + [[ChannelScale(w) for w in widths] for _ in range(columns - 1)]

    def stack(mode: str) -> nn.Module:
        fs, gs = copy.deepcopy((levels, scales))
        return Stack(fs, "revcol", shortcut=gs, backprop=mode)

    modes = {"stored": "store", "reverse": "reverse", "checkpoint each": "checkpoint"}
    modes |= {"exact": "exact", "exact, all states": "exact(store=true)"}
    nets = {name: stack(mode) for name, mode in modes.items()}
    return nets, torch.randn(4, 32, 16, 16)


def train(net: nn.Module, x: Tensor) -> None:
    net(x).square().mean().backward()


def flat(net: nn.Module, x: Tensor) -> Tensor:
    """Returns the gradients of all parameters, concatenated in the order in which the functions were created."""
    torch.manual_seed(0)  # bdia draws
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    x.grad = torch.zeros_like(x)
    train(net, x)
    # memcnn registers the second function of a coupling first.
    ordered = [*net.named_parameters()]
    if any(".Gm." in name for name, _ in ordered):
        ordered.sort(key=lambda pair: (int(pair[0].split(".")[0]), ".Gm." in pair[0]))
    return torch.cat([p.grad.flatten() for _, p in ordered]).clone()  # type: ignore[union-attr]


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(nets: dict[str, nn.Module], x: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    x.requires_grad_()
    found = {}
    gradients = {name: flat(net, x) for name, net in nets.items()}
    for name, net in nets.items():
        got, want = gradients[name], gradients[REFERENCES.get(name, "stored")]
        error = float((got - want).norm() / want.norm()) if got.shape == want.shape else math.nan
        found[name] = {"error": error, "peak": peak_mib(partial(train, net, x))}
    ratios: dict[str, list[tuple[float, float, float]]] = {name: [] for name in nets}
    with torch.no_grad():
        nets["stored"](x)
    for _ in range(rounds):
        times = {}
        for name in random.sample([*nets, "forward"], len(nets) + 1):
            if name == "forward":
                with torch.no_grad():
                    times[name] = seconds(lambda: nets["stored"](x))
            else:
                net = nets[name]
                times[name] = seconds(lambda net=net: train(net, x))
        base = times["stored"]
        for name in nets:
            ratios[name].append((times[name], times[name] / base, times[name] / (base + times["forward"])))
    for name, rows in ratios.items():
        for key, column in zip(("seconds", "stored", "floor"), zip(*rows, strict=True), strict=True):
            found[name][key] = statistics.median(column)
    return found


def table(case: Callable, depths: list[int], act: type[nn.Module], rounds: int, only: list[str] | None) -> None:
    columns: dict[str, list[dict[str, float]]] = {}
    for depth in depths:
        nets, x = case(depth, act)
        if only is not None:
            # Together with the references of their gradients.
            kept = {"stored", *only, *(REFERENCES[name] for name in only if name in REFERENCES)}
            nets = {name: net for name, net in nets.items() if name in kept}
        for name, row in measure(nets, x, rounds).items():
            columns.setdefault(name, []).append(row)
        every = getattr(getattr(nets["reverse"], "monitor", None), "every", None)
        print(f"  depth {depth}: anchors {'none' if every is None else f'every {every}'}", flush=True)
    print(
        f"  {'':20s} {'peak MiB at depth ' + '/'.join(map(str, depths)):36s} {'slope KiB':>10s}   gradient error"
        f"{'':24s} time/stored{'':14s} time/(stored + forward)"
    )
    for name, rows in columns.items():
        peaks = [r["peak"] for r in rows]
        slope = (peaks[-1] - peaks[0]) / (depths[-1] - depths[0]) * 1024 if len(depths) > 1 else math.nan
        errors, stored, floor = ([r[key] for r in rows] for key in ("error", "stored", "floor"))
        print(
            f"  {name:20s} {' '.join(f'{p:8.2f}' for p in peaks):36s} {slope:10.2f}   "
            f"{' '.join(f'{e:.1e}' for e in errors):38s} {' '.join(f'{r:.3f}' for r in stored):24s} "
            f"{' '.join(f'{r:.3f}' for r in floor)}"
        )


def steps_table(depths: list[int], rounds: int) -> None:
    """Prints microseconds per step, forward and backward, the least of the rounds: mostly overhead of the engine."""
    print(f"  {'us a step at depth':20s} {' '.join(f'{d:>7d}' for d in depths)}")
    columns: dict[str, list[float]] = {}
    for depth in depths:
        torch.manual_seed(0)
        fs = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(2 * depth)]

        def fresh(fs: list[nn.Module] = fs) -> list[nn.Module]:
            return [copy.deepcopy(f) for f in fs]

        def pairs(fresh: Callable = fresh) -> list[nn.Module]:
            own = fresh()
            return [Pair(f, g) for f, g in zip(own[::2], own[1::2], strict=True)]

        x = torch.randn(32, 128, requires_grad=True)
        nets: dict[str, nn.Module] = {
            mode: Stack(fresh(), "revnet", backprop=mode)
            for mode in ("store", "checkpoint", "checkpoint(4)", "reverse", "exact")
        }
        nets |= {"torch checkpoint": Checkpointed(pairs()), **public(fresh, pairs, depth)}
        times: dict[str, list[float]] = {mode: [] for mode in nets}
        for net in nets.values():
            train(net, x)  # measures the growth
        for _ in range(rounds):
            for mode in random.sample([*nets], len(nets)):
                times[mode].append(seconds(partial(train, nets[mode], x)))
        for mode, found in times.items():
            columns.setdefault(mode, []).append(1e6 * min(found) / depth)
    for mode, row in columns.items():
        print(f"  {mode:20s} {' '.join(f'{us:7.1f}' for us in row)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--case", choices=["blocks", "revcol", "steps"], default="blocks")
    parser.add_argument("--act", nargs="+", default=["ReLU", "SiLU"])
    parser.add_argument("--depths", nargs="+", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows of the table; fewer take turns faster")
    options = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    rounds = options.rounds or (5 if options.quick else 21)
    if options.case == "revcol":
        print("revcol, widths 32..256, batch 4, 64x64, alpha 0.5")
        table(
            revcol_case,
            options.depths or ([2, 4, 8] if options.quick else [2, 4, 8, 16]),
            nn.GELU,
            rounds,
            options.only,
        )
        return
    if options.case == "steps":
        steps_table(options.depths or [20, 200, 2000], options.rounds or 5)
        return
    for act in options.act:
        print(f"blocks, state 64x32x8x8, {act}")
        depths = options.depths or ([8, 32] if options.quick else [8, 16, 32, 64])
        table(blocks_case, depths, getattr(nn, act), rounds, options.only)


if __name__ == "__main__":
    main()
