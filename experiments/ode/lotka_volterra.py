"""Estimates the parameters of a predator-prey model from noisy, irregularly sampled data.

    python experiments/ode/lotka_volterra.py               # a minute on one CPU core
    python experiments/ode/lotka_volterra.py --steps 3     # a few steps, to see that it runs

Expect: all four rates within 5 % of the true ones, from 60 observations with 5 % noise at random times.

The Lotka-Volterra equations x' = a x - b x y, y' = c x y - d y are solved for a guess of (a, b, c, d), at the times of
the data, by tsit5 with gradients through the accepted steps. The logarithms of the rates and of the initial state are
fitted to the logarithms of the observations by L-BFGS. The standard errors are those of least squares, from the
Jacobian at the end.
"""

import argparse

import torch
from torch import Tensor

import schemes

TRUE = torch.tensor([1.1, 0.4, 0.1, 0.4], dtype=torch.float64)
START = torch.tensor([8.0, 5.0], dtype=torch.float64)
NAMES = ("prey's growth a", "predation b", "conversion c", "predators' death d")


def solve(rates: Tensor, start: Tensor, t: Tensor, rtol: float = 1e-7) -> Tensor:
    """Returns both populations at all times."""
    a, b, c, d = rates

    def field(t: Tensor, state: Tensor) -> Tensor:
        x, y = state
        return torch.stack((a * x - b * x * y, c * x * y - d * y))

    return schemes.odeint(field, start, t, method="tsit5", rtol=rtol, atol=rtol)


def observations(n: int, noise: float, end: float = 20.0) -> tuple[Tensor, Tensor]:
    """Returns times, the first of which is the initial one, and noisy populations at them."""
    t = torch.cat((torch.zeros(1, dtype=torch.float64), (end * torch.rand(n, dtype=torch.float64)).sort().values))
    exact = solve(TRUE, START, t, 1e-9)
    return t, exact * torch.exp(noise * torch.randn(exact.shape, dtype=torch.float64))


def fit(t: Tensor, seen: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Returns the best-fitting rates and the standard errors of their logarithms."""
    guess = torch.tensor([0.8, 0.3, 0.08, 0.5], dtype=torch.float64)
    theta = torch.cat((guess.log(), seen[0].log())).requires_grad_()
    optimiser = torch.optim.LBFGS([theta], lr=0.5, max_iter=steps, line_search_fn="strong_wolfe")

    def residual(theta: Tensor, upto: int) -> Tensor:
        values = solve(theta[:4].exp(), theta[4:].exp(), t[:upto])
        return (values.clamp_min(1e-6).log() - seen[:upto].log()).reshape(-1)

    # First the beginning, then the whole series: a wrong guess is out of phase with the data after two periods.
    for upto in (len(t) // 3, 2 * len(t) // 3, len(t)):

        def closure(upto: int = upto) -> Tensor:
            optimiser.zero_grad()
            loss = residual(theta, upto).square().mean()
            loss.backward()
            return loss

        loss = optimiser.step(closure)
        print(f"{upto - 1:3d} observations: root mean square of the residual {closure().item() ** 0.5:.4f}", flush=True)
        assert loss is not None
    found = theta.detach()
    jacobian = torch.autograd.functional.jacobian(lambda x: residual(x, len(t)), found)
    variance = residual(found, len(t)).square().sum() / (2 * len(t) - len(found))
    errors = torch.linalg.inv(jacobian.T @ jacobian).diagonal().mul(variance).sqrt()
    return found[:4].exp(), errors[:4]


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="iterations of L-BFGS in each of the three stages")
    parser.add_argument("--observations", type=int, default=60)
    parser.add_argument("--noise", type=float, default=0.05)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    t, seen = observations(options.observations, options.noise)
    rates, errors = fit(t, seen, options.steps)
    for name, true, rate, error in zip(NAMES, TRUE, rates, errors, strict=True):
        print(f"{name:20s} true {true:.3f}  found {rate:.3f} +- {rate * error:.3f}")
    worst = ((rates - TRUE) / TRUE).abs().max().item()
    print(f"largest relative error {worst:.3f}")
    return worst


if __name__ == "__main__":
    main()
