"""Orders and tolerances: what the solver promises of its values, within steps and at their ends."""

import math
from itertools import pairwise

import detest
import pytest
import torch

from schemes import integrate, odeint, tableaux
from schemes.interpolants import first_same_as_last, hermite, interpolant
from schemes.runge_kutta import RungeKutta
from schemes.testing import tableaux as drawn

F64 = torch.float64
PAIRS = {name: tableau for name, tableau in tableaux.METHODS.items() if tableau.b_hat is not None}
# The order of each continuous extension, by its order conditions.
DENSE = {"heun2": 2, "bosh3": 3, "fehlberg45": 5, "dopri5": 4, "tsit5": 4, "dopri8": 5, "verner89": 5}


@pytest.mark.parametrize("name", PAIRS)
def test_order_conditions_of_the_continuous_extension(name):
    found = interpolant(PAIRS[name])
    assert found.order() == DENSE[name]
    # It joins the ends with their slopes: no jump from step to step, neither of the value nor of the slope.
    tableau, tolerance = PAIRS[name], 0.0 if found.digits is None else 1e-10
    end = tableau.stages - 1 if first_same_as_last(tableau) else tableau.stages
    for i, p in enumerate(found.weights):
        b = tableau.b[i] if i < tableau.stages else 0
        value, start, slope = sum(p), p[0] if p else 0, sum((m + 1) * c for m, c in enumerate(p))
        for got, want in ((value, b), (start, int(i == 0)), (slope, int(i == end))):
            assert abs(float(got - want)) <= tolerance, (name, i)


def test_a_wrong_digit_costs_the_order():
    found = interpolant(PAIRS["dopri5"])
    weights = [list(p) for p in found.weights]
    weights[2][1] += weights[2][1] / 10**6
    weights[2][2] -= weights[2][1] / 10**6
    broken = type(found)(found.a, tuple(map(tuple, weights)), found.extra)
    assert broken.order() < 4


@pytest.mark.parametrize("name", ["euler", "midpoint", "kutta3", "rk4", "kutta_nystrom5", "huta6", "verner8"])
def test_hermite_keeps_the_order_that_its_degree_allows(name):
    tableau = tableaux.METHODS[name]
    for degree in (3, 4, 5):
        assert hermite(tableau, degree).order() == min(degree, tableau.order)


@pytest.mark.cases(4)
@pytest.mark.parametrize("name", PAIRS)
def test_slopes_of_the_error_within_a_step(name):
    """The same in numbers: one step of y' = A y + sin t, halved and halved again, looked at within."""
    a = torch.tensor([[0.1, -1.0], [2.0, 0.3]], dtype=F64)
    f = lambda t, y: y @ a.T + torch.sin(t)  # noqa: E731
    y0 = torch.tensor([1.0, 0.5], dtype=F64)
    errors = []
    sizes = (0.4, 0.2, 0.1)
    for h in sizes:
        t = torch.tensor([0.0, h], dtype=F64)
        options = {"first_step": h, "min_step": h, "outputs": "interpolate"}
        found = integrate(f, y0, t, method=name, options=options, dense=True)
        assert found.accepted == 1
        inside = torch.tensor([0.3 * h, 0.8 * h], dtype=F64)
        exact = odeint(f, y0, torch.cat((t[:1], inside)), method="dopri8", rtol=1e-13, atol=1e-14)[1:]
        errors.append(float((found(inside) - exact).abs().max()))
    slopes = [math.log2(e / f) for e, f in pairwise(errors) if f > 1e-14]
    assert slopes and min(slopes) > DENSE[name] + 1 - 0.6


@pytest.mark.parametrize("name", PAIRS)
def test_the_derivative_is_the_slope_of_the_solution(name):
    f = lambda t, y: -y * torch.cos(t)  # noqa: E731
    y0 = torch.ones(2, dtype=F64)
    found = integrate(f, y0, torch.tensor([0.0, 2.0], dtype=F64), method=name, rtol=1e-5, atol=1e-5, dense=True)
    t = torch.linspace(0.01, 1.99, 7, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(found(t)[:, 0].sum(), t)
    torch.testing.assert_close(found.derivative(t.detach())[:, 0], slope, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(slope, f(t, found(t)[:, 0]).detach(), rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match=r"t=2.5 lies outside of the solve, from 0 to 2"):
        found(2.5)
    with pytest.raises(ValueError, match="solve with dense=True"):
        integrate(f, y0, torch.tensor([0.0, 2.0], dtype=F64))(1.0)


# --- tolerances, on DETEST


def flow(f, t, h, y, steps=6):
    """An independent solution of many short intervals at once: Cooper and Verner's method, which is no pair."""
    a, b, c, _ = tableaux.cooper_verner8.floats()
    t, h = t[:, None], h[:, None] / steps
    for _ in range(steps):
        ks = []
        for node, row in zip(c, a, strict=True):
            x = y + h * sum((w * k for w, k in zip(row, ks, strict=True)), torch.zeros_like(y))
            ks.append(f(t + node * h, x))
        y = y + h * sum(w * k for w, k in zip(b, ks, strict=True))
        t = t + h
    return y


def local_errors(problem, method, tol):
    """The error that each step adds, in units of what is allowed: sqrt(mean((e / (tol + tol max|y|))^2)).

    Against the solution through the numerical one, as DETEST measures: what the problem makes of earlier errors does
    not count.
    """
    f, y0 = detest.problem(problem)
    t = torch.tensor([0.0, detest.END], dtype=F64)
    found = integrate(f, y0, t, method=method, rtol=tol, atol=tol, dense=True, options={"max_steps": 10**6})
    pieces = found._segments
    start, size = (torch.tensor([getattr(p, x) for p in pieces], dtype=F64) for x in ("t0", "h"))
    y = torch.stack([p.y for p in pieces])
    end = torch.cat((y[1:], found.last[None]))
    field = f if problem[0] == "A" else lambda t, y: f(t[:, 0], y)
    exact = flow(field, start, size, y)
    scale = tol * (1 + torch.maximum(y.abs(), end.abs()))
    return ((end - exact) / scale).square().mean(1).sqrt()


def bound(method, tol):
    """Of a single step. The estimate of dopri5 is blind to a few long steps of B1 and E3 at 1e-3 and 1e-4 (21)."""
    return 25 if method == "dopri5" and tol >= 1e-4 else 10


def rms(x):
    return float(x.square().mean().sqrt())


QUICK = {"heun2": 1e-3, "bosh3": 1e-4, "verner89": 1e-9}


@pytest.mark.cases(1)
@pytest.mark.parametrize("method", PAIRS)
def test_steps_err_by_what_is_allowed(method):
    """Tolerance proportionality: at most ten tolerances, as root mean square over the steps, and in each of them."""
    tol = QUICK.get(method, 1e-6)
    found = [local_errors(p, method, tol) for p in detest.PROBLEMS if p not in ("C4", "C5")]
    assert max(map(rms, found)) < 10 and max(float(e.max()) for e in found) < bound(method, tol)


def exactly(problem):
    """The solution at 0, 1, ..., 20 by scipy's DOP853 at 1e-13."""
    integrate_scipy = pytest.importorskip("scipy.integrate")
    f, y0 = detest.problem(problem)

    def g(time, y):
        return f(torch.tensor(time, dtype=F64), torch.from_numpy(y.copy())).numpy()

    t = torch.linspace(0, detest.END, 21, dtype=F64)
    found = integrate_scipy.solve_ivp(g, (0, 20), y0.numpy(), "DOP853", t.numpy(), rtol=1e-13, atol=1e-14)
    return t, torch.from_numpy(found.y.T.copy())


def global_errors(problem, method, tols, exact=None):
    """Errors over [0, 20], max over 20 times of rms(e / (1 + |y|)), in units of tol."""
    f, y0 = detest.problem(problem)
    t, y = exact or exactly(problem)
    found = (odeint(f, y0, t, method=method, rtol=tol, atol=tol) for tol in tols)
    return [float(((x - y) / (1 + y.abs())).square().mean(1).sqrt().max()) / tol for x, tol in zip(found, tols)]  # noqa: B905


def proportional(errors):
    """No error stands out by more than ten from the others of its problem, where they exceed the tolerance at all."""
    logs = [math.log10(max(e, 1.0)) for e in errors]
    return max(logs) - sum(logs) / len(logs) <= 1


def slope(errors, tols):
    """Of the logarithm of the error over that of the tolerance, by least squares.

    An error below the tolerance counts as the tolerance: where a step between two times of the output errs by less
    than is allowed, as one of a pair of order 8 does at loose tolerances, it cannot go down with it.
    """
    errors = [max(e, 1.0) for e in errors]
    x = torch.tensor([math.log10(tol) for tol in tols], dtype=F64)
    y = torch.tensor([math.log10(e * tol) for e, tol in zip(errors, tols, strict=True)], dtype=F64)
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())


def test_errors_go_with_the_tolerance():
    tols = (1e-3, 1e-6, 1e-9)
    for problem, method in (("A3", "tsit5"), ("B5", "dopri5"), ("D1", "tsit5"), ("E2", "dopri8")):
        errors = global_errors(problem, method, tols)
        assert proportional(errors) and max(errors) < 1000, (problem, method, errors)
        assert 0.7 < slope(errors, tols) < 1.4, (problem, method, errors)


TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10)
# Pairs of low order take more than a minute below.
LEAST = {"heun2": 1e-5, "bosh3": 1e-7}


@pytest.fixture(scope="module")
def references():
    return {problem: exactly(problem) for problem in detest.PROBLEMS}


@pytest.mark.slow
@pytest.mark.parametrize("method", PAIRS)
def test_tolerance_proportionality_on_detest(method, references):
    """All problems at all tolerances: what steps add, and how the error at the times goes with the tolerance.

    The size of the latter is the problem's, whose orbits amplify what is added; its slope is the solver's.
    """
    tols = [tol for tol in TOLERANCES if tol >= LEAST.get(method, 0)]
    steps = {(p, tol): local_errors(p, method, tol) for p in detest.PROBLEMS for tol in tols}
    ends = {p: global_errors(p, method, tols, references[p]) for p in detest.PROBLEMS}
    slopes = {p: slope(errors, tols) for p, errors in ends.items()}
    worst = max(steps, key=lambda key: float(steps[key].max()))
    most = max(e for p, errors in ends.items() if p[0] != "D" for e in errors)
    orbits = max(e for p, errors in ends.items() if p[0] == "D" for e in errors)
    print(
        f"| {method} | {tols[-1]:.0e} | {max(map(rms, steps.values())):.1f} "
        f"| {float(steps[worst].max()):.1f} ({worst[0]}, {worst[1]:.0e}) "
        f"| {min(slopes.values()):.2f} to {max(slopes.values()):.2f} | {most:.0f} | {orbits:.0f} |"
    )
    assert max(map(rms, steps.values())) < 10
    assert all(float(e.max()) < bound(method, tol) for (_, tol), e in steps.items())
    assert all(0.7 < x < 1.4 for x in slopes.values()), slopes


def test_any_pair_of_ones_own_solves():
    from hypothesis import assume, given, settings

    @settings(max_examples=10, database=None)
    @given(drawn(companion=True, max_stages=4))
    def law(tableau):
        assume(tableau.b != tableau.b_hat)
        h = interpolant(tableau)
        assert h.order(2) >= 1 and len(h.weights) == len(h.a)
        found = integrate(
            lambda t, y: -y,
            torch.ones(1, dtype=F64),
            torch.tensor([0.0, 0.1], dtype=F64),
            method=RungeKutta(tableau),
            options={"min_step": 0.01},
            rtol=1e-3,
            atol=1e-3,
        )
        assert found.status == "finished"

    law()
