"""Compares ODE solvers at equal error: `schemes.odeint` against torchdiffeq (and torchode).

    nice python experiments/benchmarks/odeint.py               # all tables, about 5 minutes, one thread
    pip install torchode torchtyping "typeguard<3"             # to compare with torchode too
    nice python experiments/benchmarks/odeint.py speed         # time at equal error
    nice python experiments/benchmarks/odeint.py gradients     # memory, time and error of each way to differentiate
    nice python experiments/benchmarks/odeint.py batch         # a step size per sample
    python experiments/benchmarks/odeint.py --quick            # fewer rounds

Every round runs every solver at every tolerance once, in a new random order. Times are medians over the rounds of
processor time (one thread), so that other load on the machine matters little. Errors are those at the end, against
dopri8 at 1e-12 (in single precision 1e-7). A ratio compares times at equal error: the time of our solver is read from
its curve of time over error, linear in the logarithms, at the errors of the other that lie on it; the table shows the
geometric mean. The overhead is the time per attempted step minus that of its evaluations of the field, which are timed
separately.
"""

import argparse
import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

import schemes

try:
    import torchdiffeq
except ModuleNotFoundError:
    torchdiffeq = None
try:
    import torchode
except ModuleNotFoundError:
    torchode = None

F64 = torch.float64


class Counted(nn.Module):
    """A field that counts its calls."""

    def __init__(self, f: Callable):
        super().__init__()
        self.f, self.calls = f, 0

    def forward(self, t, y):
        self.calls += 1
        return self.f(t, y)


def spiral():
    a = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=F64)
    return lambda t, y: y**3 @ a, torch.tensor([2.0, 0.0], dtype=F64), 10.0


def mlp():
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).double()
    for p in net.parameters():
        p.requires_grad_(False)
        p.mul_(2.0)
    return lambda t, y: net(y) * torch.cos(t), torch.randn(64, 64, dtype=F64), 4.0


def conv():
    net = nn.Sequential(
        nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 16, 3, padding=1)
    )
    for p in net.parameters():
        p.requires_grad_(False)
    return lambda t, y: net(y) * (1 + t), torch.randn(32, 16, 16, 16), 1.0


def timed(run: Callable) -> tuple[float, torch.Tensor]:
    gc.disable()
    start = time.process_time()
    y = run()
    took = time.process_time() - start
    gc.enable()
    return took, y


def solvers(f, y0, end, tol):
    t = torch.tensor([0.0, end], dtype=F64 if y0.dtype == F64 else torch.float32)
    found = {
        f"schemes {m}": lambda m=m: schemes.odeint(f, y0, t, method=m, rtol=tol, atol=tol)[-1]
        for m in ("dopri5", "tsit5")
    }
    if torchdiffeq is not None:
        found["torchdiffeq dopri5"] = lambda: torchdiffeq.odeint(f, y0, t, method="dopri5", rtol=tol, atol=tol)[-1]
    if torchode is not None and y0.ndim == 2:
        # torchode takes one time per sample, and flat states.
        term = torchode.ODETerm(lambda t, y: f(t[:, None], y))
        adjoint = torchode.AutoDiffAdjoint(
            torchode.Dopri5(term=term), torchode.IntegralController(atol=tol, rtol=tol, term=term)
        )
        span = t.expand(len(y0), -1)
        problem = torchode.InitialValueProblem(y0=y0, t_start=span[:, 0], t_end=span[:, 1])
        found["torchode dopri5"] = lambda: adjoint.solve(problem).ys[:, -1]
    return found


def at_error(curve: list[tuple[float, float]], error: float) -> float | None:
    """Returns the time at an error, interpolated on a curve of (error, time); None outside it."""
    points = sorted((math.log(e), math.log(t)) for e, t in curve)
    x = math.log(error)
    for (a, s), (b, u) in pairwise(points):
        if a <= x <= b:
            return math.exp(s + (u - s) * (x - a) / max(b - a, 1e-12))
    return None


def reference(f, y0, t):
    """Returns the final state to the full precision of the dtype."""
    tol = 1e-12 if y0.dtype == F64 else 1e-7
    return schemes.odeint(f, y0, t, method="dopri8", rtol=tol, atol=tol)[-1].double()


def cost(f, y0, rounds: int) -> float:
    """Returns the time of one evaluation."""
    t = torch.zeros((), dtype=y0.dtype)
    return statistics.median(timed(lambda: [f(t, y0) for _ in range(50)])[0] / 50 for _ in range(max(rounds, 5)))


@torch.no_grad()
def speed(rounds: int) -> None:
    print("| Field | Solver | Tolerance | Error | Steps tried | Time, ms | Overhead per step, us |")
    print("|---|---|--:|--:|--:|--:|--:|")
    ratios = []
    for make in (spiral, mlp, conv):
        torch.manual_seed(0)
        f, y0, end = make()
        wide = y0.dtype == F64
        tolerances = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8) if wide else (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
        t = torch.tensor([0.0, end], dtype=F64)
        exact = reference(f, y0, t)
        runs = {(name, tol): run for tol in tolerances for name, run in solvers(f, y0, end, tol).items()}
        times: dict = {key: [] for key in runs}
        errors: dict = {}
        calls: dict = {}
        for key, run in runs.items():
            counted = Counted(f)
            errors[key] = float((solvers(counted, y0, end, key[1])[key[0]]().double() - exact).abs().max())
            calls[key] = counted.calls
            run()
        for _ in range(rounds):
            order = list(runs)
            random.shuffle(order)
            for key in order:
                times[key].append(timed(runs[key])[0])
        field = cost(f, y0, rounds)
        curves: dict = {}
        for (name, tol), found in times.items():
            took = statistics.median(found)
            curves.setdefault(name, []).append((errors[name, tol], took))
            tries = (calls[name, tol] - 2) / 6
            own = (took - calls[name, tol] * field) / tries
            print(
                f"| {make.__name__} | {name} | {tol:.0e} | {errors[name, tol]:.1e} | {tries:.0f} | {1e3 * took:.1f} "
                f"| {1e6 * own:.0f} |"
            )
        for name, curve in curves.items():
            for other in curves:
                if name.startswith("schemes") and not other.startswith("schemes"):
                    logs = [math.log(s / took) for e, took in curves[other] if (s := at_error(curve, e)) is not None]
                    if logs:
                        ratios.append((make.__name__, name, other, math.exp(sum(logs) / len(logs)), len(logs)))
    print("\n| Field | Solver | Against | Time at equal error | Errors compared |\n|---|---|---|--:|--:|")
    for field_name, name, other, ratio, n in ratios:
        print(f"| {field_name} | {name} | {other} | {ratio:.2f} | {n} |")


@torch.no_grad()
def batch(rounds: int) -> None:
    """Solves 1,000 Van der Pol oscillators with mu from 0.1 to 100, until time 10."""
    mu = torch.logspace(-1, 2, 1000, dtype=F64)[:, None]
    y0 = torch.tensor([[2.0, 0.0]], dtype=F64).repeat(1000, 1)
    t = torch.tensor([0.0, 10.0], dtype=F64)

    def f(t, y, mu=mu):
        x, v = y[:, :1], y[:, 1:]
        return torch.cat((v, mu * (1 - x * x) * v - x), 1)

    tight = {"rtol": 1e-5, "atol": 1e-6}
    runs = {
        "schemes, joint": lambda: schemes.integrate(f, y0, t, **tight),
        "schemes, independent": lambda: schemes.integrate(f, y0, t, batch="independent", **tight),
        "schemes, independent, with a context": lambda: schemes.integrate(
            lambda t, y, mu: f(t, y, mu), y0, t, batch="independent", options={"context": mu}, **tight
        ),
    }
    exact = schemes.integrate(
        lambda t, y, mu: f(t, y, mu), y0, t, batch="independent", options={"context": mu}, rtol=1e-10, atol=1e-11
    ).y[-1]
    print("| Control | Evaluations per sample | Time, s | Largest error |\n|---|--:|--:|--:|")
    for name, run in runs.items():
        took = statistics.median(timed(run)[0] for _ in range(max(1, rounds // 3)))
        found = run()
        per = found.evaluations if found.rows is None or "context" not in name else found.rows / 1000
        if name == "schemes, independent":  # every call evaluates all rows; count what the samples need
            per = float((found.accepted + found.rejected).double().mean()) * 6
        print(f"| {name} | {per:,.0f} | {took:.2f} | {float((found.y[-1] - exact).abs().max()):.0e} |")
    if torchdiffeq is not None:
        counted = Counted(f)
        took, y = timed(lambda: torchdiffeq.odeint(counted, y0, t, **tight))
        print(f"| torchdiffeq | {counted.calls:,} | {took:.2f} | {float((y[-1] - exact).abs().max()):.0e} |")


def gradients(rounds: int) -> None:
    """Compares memory, time and error of each way to differentiate, on a smooth and on a stiff field."""
    print("| Field | Gradient | Saved, states | Time, ms | Gradient's error |\n|---|---|--:|--:|--:|")
    for name, stiff in (("smooth", 1.0), ("stiff", 40.0)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)).double()
        y0 = torch.randn(32, 16, dtype=F64, requires_grad=True)
        t = torch.tensor([0.0, 1.0], dtype=F64)

        def f(t, y, net=net, stiff=stiff):
            return net(y) - stiff * (y - torch.cos(t))

        inputs = [y0, *net.parameters()]

        def solve(gradient, rtol=1e-6, method="tsit5", f=f, y0=y0, t=t):
            return schemes.odeint(f, y0, t, method=method, rtol=rtol, atol=rtol, gradient=gradient)[-1].square().sum()

        exact = torch.cat([g.reshape(-1) for g in torch.autograd.grad(solve("store", 1e-12, "dopri8"), inputs)])
        for gradient in ("store", "checkpoint", "reverse", "adjoint"):
            kept: list[int] = []

            def keep(x, kept=kept):
                kept.append(x.numel())
                return x

            try:
                with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                    solve(gradient)
            except schemes.SchemeError as error:
                print(f"| {name} | {gradient} | refused: {str(error).split(';')[0].removeprefix('odeint: ')} | | |")
                continue
            took = []
            for _ in range(rounds):
                took.append(timed(lambda g=gradient, i=inputs, s=solve: torch.autograd.grad(s(g), i))[0])
            found = torch.cat([g.reshape(-1) for g in torch.autograd.grad(solve(gradient), inputs)])
            error = float((found - exact).norm() / exact.norm())
            states = sum(n for n in kept if n >= y0.numel()) / y0.numel()
            print(f"| {name} | {gradient} | {states:.0f} | {1e3 * statistics.median(took):.0f} | {error:.0e} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=["speed", "gradients", "batch"])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 3 if options.quick else 9
    for name, table in (("speed", speed), ("gradients", gradients), ("batch", batch)):
        if options.table in (None, name):
            print(f"\n{name}\n")
            table(rounds)


if __name__ == "__main__":
    main()
