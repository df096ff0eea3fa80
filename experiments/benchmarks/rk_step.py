"""Times one Runge-Kutta step: `schemes` and `Stack` against hand-written loops and torchdiffeq, in one process.

    python experiments/benchmarks/rk_step.py            # about 5 minutes, one thread
    python experiments/benchmarks/rk_step.py --quick    # about 1 minute, noisier
    python experiments/benchmarks/rk_step.py --compile  # hand loop and Stack under torch.compile

Every round runs every implementation once, in a new random order. Each figure is the median over the rounds, and the
ratio is the median over the rounds of (time / time of the best hand-written loop in the same round). The best loop is
the one with the smallest median. torchdiffeq is left out if it is not installed; its rk4 is the 3/8 rule.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import schemes
from odenets import Stack


class LinearCombination(torch.autograd.Function):
    """y + sum_j a_j k_j with one buffer and a hand-written gradient."""

    @staticmethod
    def forward(ctx, y, coefficients, *ks):
        ctx.coefficients = coefficients
        out = y.clone()
        for a, k in zip(coefficients, ks, strict=True):
            out.add_(k, alpha=a)
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad, None, *(grad * a for a in ctx.coefficients)


def add_chain(y, ks, row):
    for a, k in zip(row, ks, strict=True):
        if a:
            y = torch.add(y, k, alpha=a)
    return y


def fused(y, ks, row):
    pairs = [(a, k) for a, k in zip(row, ks, strict=True) if a]
    return LinearCombination.apply(y, tuple(a for a, _ in pairs), *(k for _, k in pairs)) if pairs else y


class Hand(nn.Module):
    """A hand-written loop over the rows of a tableau, as a module like the others."""

    def __init__(self, fs, name: str, combine: Callable):
        super().__init__()
        self.fs = nn.ModuleList(fs)
        a, b, _, _ = schemes.get(name).tableau.floats()
        self.a, self.b, self.combine = [list(r) for r in a], list(b), combine

    def forward(self, x):
        ks = []
        for f, row in zip(self.fs, self.a, strict=True):
            ks.append(f(self.combine(x, ks, row)))
        return self.combine(x, ks, self.b)


class HandRK4(nn.Module):
    """The classic method written out, as one would by hand."""

    def __init__(self, fs):
        super().__init__()
        self.f1, self.f2, self.f3, self.f4 = fs

    def forward(self, x):
        k1 = self.f1(x)
        k2 = self.f2(torch.add(x, k1, alpha=0.5))
        k3 = self.f3(torch.add(x, k2, alpha=0.5))
        k4 = self.f4(x + k3)
        y = torch.add(x, k1, alpha=1 / 6)
        y = torch.add(y, k2, alpha=1 / 3)
        y = torch.add(y, k3, alpha=1 / 3)
        return torch.add(y, k4, alpha=1 / 6)


class Cheap(nn.Module):
    """A residual function that costs one sweep over the state."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return x * self.w


class ByScheme(nn.Module):
    """`scheme.step` alone, without Stack."""

    def __init__(self, fs, name: str):
        super().__init__()
        self.fs, self.scheme = nn.ModuleList(fs), schemes.get(name)

    def forward(self, x):
        return self.scheme.step(tuple(self.fs), (x,))[0]


class ByTorchdiffeq(nn.Module):
    """One forced step of torchdiffeq."""

    def __init__(self, fs, name: str):
        super().__init__()
        from torchdiffeq import odeint

        self.f, self.odeint, self.name = fs[0], odeint, name
        options = {"first_step": 1.0, "min_step": 1.0, "max_step": 1.0} if name == "dopri8" else None
        self.options = {"options": options, "rtol": 1e9, "atol": 1e9} if options else {}
        self.register_buffer("t", torch.tensor([0.0, 1.0]))

    def forward(self, x):
        return self.odeint(lambda t, y: self.f(y), x, self.t, method=self.name, **self.options)[-1]


def cases() -> dict[str, tuple[Callable[[], nn.Module], torch.Tensor]]:
    return {
        "conv 64x32x8x8": (lambda: nn.Conv2d(32, 32, 3, padding=1), torch.randn(64, 32, 8, 8)),
        "mlp 64x64": (
            lambda: nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)),
            torch.randn(64, 64),
        ),
        "cheap f 64x32x8x8": (Cheap, torch.randn(64, 32, 8, 8)),
        "cheap f 4x4": (Cheap, torch.randn(4, 4)),
    }


def implementations(name: str, make: Callable[[], nn.Module], compiled: bool) -> dict[str, nn.Module]:
    fs = [make() for _ in range(schemes.get(name).stages)]
    found: dict[str, nn.Module] = {}
    if name == "rk4":
        found["hand: written out"] = HandRK4(fs)
    found["hand: add(alpha) chain"] = Hand(fs, name, add_chain)
    found["hand: fused autograd.Function"] = Hand(fs, name, fused)
    if compiled:
        found = {"hand: add(alpha) chain": found["hand: add(alpha) chain"]}
    found["schemes"] = ByScheme(fs, name)
    found["Stack"] = Stack(fs, name)
    if compiled:
        return {k: torch.compile(m, fullgraph=True) for k, m in found.items()}  # type: ignore[misc]
    try:
        found["torchdiffeq"] = ByTorchdiffeq(fs, name)
    except ModuleNotFoundError:
        print("torchdiffeq is not installed: left out")
    return found


def once(net: nn.Module, x: torch.Tensor, backward: bool, repeats: int) -> float:
    """Seconds per call."""
    start = time.perf_counter()
    for _ in range(repeats):
        if backward:
            net(x).sum().backward()
        else:
            with torch.no_grad():
                net(x)
    return (time.perf_counter() - start) / repeats


def measure(nets: dict[str, nn.Module], x: torch.Tensor, backward: bool, rounds: int, budget: float) -> None:
    x = x.clone().requires_grad_(backward)
    for net in nets.values():
        once(net, x, backward, 3)
    slowest = max(once(net, x, backward, 3) for net in nets.values())
    repeats = max(1, min(300, int(budget / (rounds * len(nets) * slowest))))
    times: dict[str, list[float]] = {name: [] for name in nets}
    for _ in range(rounds):
        for name in random.sample(list(nets), len(nets)):
            times[name].append(once(nets[name], x, backward, repeats))
    medians = {name: statistics.median(t) for name, t in times.items()}
    best = min((m, name) for name, m in medians.items() if name.startswith("hand"))[1]
    for name, series in times.items():
        ratio = statistics.median(t / b for t, b in zip(series, times[best], strict=True))
        excess = statistics.median(t - b for t, b in zip(series, times[best], strict=True))
        mark = " (best hand loop)" if name == best else ""
        print(f"  {name:32s} {1e6 * medians[name]:10.1f} us   x {ratio:5.3f}   {1e6 * excess:+9.2f} us{mark}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--schemes", nargs="+", default=["rk4", "dopri8"])
    parser.add_argument("--case", default="", help="run the cases whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    import warnings

    warnings.simplefilter("ignore", schemes.MixingWarning)
    rounds, budget = (31, 2.0) if options.quick else (101, 8.0)
    for name in options.schemes:
        for case, (make, x) in cases().items():
            if options.case not in case:
                continue
            nets = implementations(name, make, options.compile)
            for backward in (False, True):
                print(f"{name}, {case}, {'forward + backward' if backward else 'forward'}")
                measure(nets, x, backward, rounds, budget)


if __name__ == "__main__":
    main()
