"""Measures the cost of a training step of each scheme, relative to euler, for the page "Choose a scheme".

    python experiments/benchmarks/choices.py                      # about a minute on one core; prints a table
    python experiments/benchmarks/choices.py --out experiments/results/choices.json
    python docs/tables.py                                         # copies the figures into the page

The network has twelve residual functions GroupNorm-SiLU-convolution. All schemes have the same parameters, except the
couplings that split the channels. Each round takes one training step of every scheme in every mode, in a new random
order, on one thread. A figure is the median over the rounds of (processor time / that of euler, stored, in the same
round).
"""

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path

import torch
from torch import nn

import schemes
from odenets import Stack

FUNCTIONS, CHANNELS = 12, 16
BASE = ("euler", "store")


def chosen() -> list[str]:
    """The schemes of the page: those whose stages divide twelve, with a mixing figure of at most 30."""
    named = [e for e in schemes.catalogue() if FUNCTIONS % e.stages == 0 and (e.mixing is None or e.mixing <= 30)]
    found = [e.name for e in sorted(named, key=lambda e: (e.order or 0, e.stages, e.name))]
    # A companion needs functions that only it reads; ab2 does not differ from its neighbours in any column.
    tableaus = {text: schemes.get(text).tableau for text in found}
    pairs = {text for text, t in tableaus.items() if t is not None and t.b_hat is not None} - {"heun2"}
    kept = [text for text in found if text not in pairs | {"ab2"}]
    return [*kept, "alf", "momentum(9/10)", "revnet", "reversible(rk4)"]


def least(scheme: str) -> str:
    """The mode that stores least, among those without options."""
    return "reverse" if schemes.get(scheme).invertible else "checkpoint"


def network(scheme: str, backprop: str) -> Stack:
    """Twelve residual functions under a scheme."""
    torch.manual_seed(0)

    def function(slot: schemes.Slot) -> nn.Module:
        return nn.Sequential(
            nn.GroupNorm(1, slot.in_channels[0]),
            nn.SiLU(),
            nn.Conv2d(slot.in_channels[0], slot.out_channels, 3, padding=1),
        )

    depth = FUNCTIONS // schemes.get(scheme).stages
    return Stack.from_factory(function, scheme, depth, channels=CHANNELS, backprop=backprop)


def step(net: Stack, x: torch.Tensor) -> float:
    """Returns the processor seconds of a forward and a backward pass."""
    begin = time.process_time()
    net(x).square().mean().backward()
    return time.process_time() - begin


def measure(names: list[str], rounds: int, x: torch.Tensor) -> dict[str, dict[str, float]]:
    """Returns, for each scheme, the relative time of each of its modes."""
    nets = {(name, mode): network(name, mode) for name in names for mode in ("store", least(name))}
    for net in nets.values():
        for _ in range(2):  # the first measures growth, the second does all one-time allocations
            step(net, x)
    ratios: dict[tuple[str, str], list[float]] = {key: [] for key in nets}
    order = list(nets)
    for _ in range(rounds):
        random.shuffle(order)
        times = {key: step(nets[key], x) for key in order}
        for key, seconds in times.items():
            ratios[key].append(seconds / times[BASE])
    found: dict[str, dict[str, float]] = {}
    for (name, mode), each in ratios.items():
        found.setdefault(name, {})[mode] = round(statistics.median(each), 3)
    return found


def main() -> None:
    """Measures, prints, and writes a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    x = torch.randn(options.batch, CHANNELS, options.size, options.size)
    rows = measure(chosen(), options.rounds, x)
    for name, modes in rows.items():
        print(f"{name:18}", "  ".join(f"{mode} {ratio:.2f}" for mode, ratio in modes.items()))
    if options.out:
        # One line per scheme, so that versions of the file can be compared.
        lines = ",\n".join(f'    "{name}": {json.dumps(modes)}' for name, modes in rows.items())
        head = {"torch": torch.__version__, "machine": platform.machine(), "rounds": options.rounds}
        head |= {"batch": options.batch, "channels": CHANNELS, "size": options.size}
        entries = "".join(f'  "{key}": {json.dumps(value)},\n' for key, value in head.items())
        options.out.write_text(f'{{\n{entries}  "times": {{\n{lines}\n  }}\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
