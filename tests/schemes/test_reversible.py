"""McCallum-Foster: formula, times, order, cost, amplification and the short stability interval."""

import pytest
import torch

import schemes
from schemes.testing.reversible import run, smooth_functions


def test_a_step_is_its_formula_at_its_times():
    """y' = c y + (1 - c) z + Psi_h(t, z), z' = z - Psi_{-h}(t + h, y'), with the base's own step as Psi."""
    base, scheme = schemes.get("rk4"), schemes.get("reversible(rk4, coupling=0.8)")

    def f(t, x):
        return torch.sin(x) * (1 + t)

    y, z = torch.randn(2, 3, dtype=torch.float64)
    t, h, fs = 0.3, 0.25, (f,) * 4
    (forth,) = base.step(fs, (z,), t=t, h=h)
    y1 = 0.8 * y + 0.2 * z + forth - z
    (back,) = base.step(fs, (y1,), t=t + h, h=-h)
    got = scheme.step(fs, (y, z), t=t, h=h)
    assert torch.allclose(got[0], y1, atol=1e-14) and torch.allclose(got[1], z - (back - y1), atol=1e-14)
    before = scheme.inverse(fs, got, t=t, h=h)
    assert torch.allclose(before[0], y, atol=1e-13) and torch.allclose(before[1], z, atol=1e-13)


def test_each_residual_function_is_called_twice():
    scheme = schemes.get("reversible(rk4)")
    fs = smooth_functions(scheme, 4, 2)
    run(scheme, fs, torch.randn(1, 4, dtype=torch.float64))
    assert scheme.stages == 4 and scheme.evaluations == 8
    assert [f.calls for f in fs[1]] == [2] * 4
    assert schemes.get("reversible(dopri5)").evaluations == 12  # the seventh stage is the companion's


def test_nodes_hold_one_time_per_evaluation():
    assert schemes.get("reversible(rk4)").nodes == (0, 0.5, 0.5, 1, 1, 0.5, 0.5, 0)
    assert schemes.get("reversible(repeat(midpoint, 2))").nodes == (0, 0.5, 1, 1.5, 2, 1.5, 1, 0.5)


@pytest.mark.parametrize("base, order", [("midpoint", 2), ("rk4", 4), ("repeat(heun2, 2)", 2)])
@pytest.mark.parametrize("coupling", [0.9, 0.999])
def test_it_has_the_order_of_its_base(base, order, coupling):
    scheme = schemes.get(f"reversible({base}, coupling={coupling})")
    assert scheme.order == order

    def field(t, x):
        return torch.stack([x[1] + 0.3 * t, -torch.sin(x[0]) * (1 + 0.2 * t)])

    x = torch.tensor([1.0, 0.3], dtype=torch.float64)
    exact = schemes.solve(schemes.get("verner8"), field, x, steps=40)
    errors = [float((schemes.solve(scheme, field, x, steps=n) - exact).norm()) for n in (20, 40)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize(
    "base, coupling, real, imaginary",
    [
        ("euler", 0.5, 0.500, None),
        ("euler", 0.8, 0.200, None),
        ("euler", 0.99, 0.010, None),
        ("euler", 0.999, 0.001, None),
        ("midpoint", 0.5, 2.156, 0.69),
        ("midpoint", 0.8, 0.225, 0.50),
        ("midpoint", 0.99, 0.010, 0.74),
        ("midpoint", 0.999, 0.001, 1.20),
        ("rk4", 0.5, 0.695, 2.83),
        ("rk4", 0.8, 0.223, 2.83),
        ("rk4", 0.99, 0.010, 2.83),
    ],
)
def test_stability_intervals(base, coupling, real, imaginary):
    got = schemes.get(f"reversible({base}, coupling={coupling})").stability_interval()
    assert got.real == pytest.approx(real, abs=1e-3)
    assert imaginary is None or got.imaginary == pytest.approx(imaginary, abs=0.01)


@pytest.mark.parametrize("h, grows", [(0.195, False), (0.26, True)])
def test_the_interval_is_what_a_run_shows(h, grows):
    """On y' = -y, coupling 0.8 with rk4 ends at 0.223."""
    scheme, f = schemes.get("reversible(rk4, coupling=0.8)"), (torch.neg,) * 4
    state = (torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    for _ in range(2000):
        state = scheme._step(f, state, h)
    assert (float(state[1].abs()) > 1) == grows


def test_the_interval_counts_steps_of_h_and_not_of_the_base():
    one, two = (schemes.get(f"reversible({base}, 0.8)").stability_interval() for base in ("rk4", "repeat(rk4, 2)"))
    assert 0 < two.real < one.real


def test_its_inverse_amplifies_by_the_reciprocal_of_the_coupling():
    scheme = schemes.get("reversible(euler, coupling=0.5)")
    assert scheme.amplification == 2.0
    zero, state = (torch.zeros_like,), (torch.ones(1), torch.zeros(1))
    for _ in range(10):
        state = scheme._inverse(zero, state)
    assert float(state[0]) == 2.0**10
    assert str(scheme) == "reversible(euler, coupling=0.5)"


def test_an_adaptive_base_and_one_without_a_tableau():
    with pytest.raises(schemes.SchemeError, match="fixed steps"):
        schemes.get("reversible(adaptive(dopri5))")

    class Unknown(schemes.RungeKutta):
        tableau = None

    with pytest.raises(schemes.SchemeError, match="no tableau"):
        schemes.Reversible(Unknown(schemes.tableaux.rk4)).stability_interval()
