"""The interpreter: every method is the formula of its tableau, of its declared order, and what torchdiffeq computes."""

import math
import sys
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
import torchdiffeq
from hypothesis import given

import schemes
from schemes import RungeKutta, SchemeError, Tableau, get, solve
from schemes.testing import (
    check_formula,
    check_order,
    check_scheme,
    check_slots,
    observed_order,
    residual_functions,
    tableaux,
)

METHODS = [*schemes.tableaux.METHODS, "ees25", "ees25(1/4)", "rkc1(5)", "rkc2(5)", "rkl1(4)", "rkl2(5)"]
PAIRS = [name for name, t in schemes.tableaux.METHODS.items() if t.b_hat is not None]
F64 = torch.float64


@pytest.mark.cases(10)
@pytest.mark.parametrize("name", [*METHODS, *(f"pruned({name})" for name in PAIRS)])
def test_order_by_the_slope_of_the_error(name):
    check_order(get(name))


@pytest.mark.parametrize("name", PAIRS)
def test_order_of_the_companion(name):
    t = get(name).tableau
    companion = replace(t, name=f"companion of {name}", b=t.b_hat, b_hat=None, order=t.order_hat, order_hat=None)
    # Not equal: dopri8's companion looks like 7.7 as far as fp64 sees. test_order.py has the exact figures.
    assert observed_order(RungeKutta(companion)) > t.order_hat - 0.5


def test_a_method_of_ones_own_need_not_declare_its_order():
    text = "0 |\n 1/2 | 1/2\n | 0 1"
    check_scheme(RungeKutta(Tableau.parse(text, order=None, name="mine")))
    with pytest.raises(AssertionError, match="order 1 is declared, 2 computed"):
        check_scheme(RungeKutta(Tableau.parse(text, order=1, name="mine")))


@pytest.mark.parametrize(
    ("text", "unused"),
    [
        ("0 |\n 1/2 | 1/2\n 1/3 | 1/3 0\n | 0 1 0", (2,)),
        ("0 |\n 1/3 | 1/3\n 1/2 | 1/2 0\n | 0 0 1", (1,)),
        ("0 |\n 1/3 | 1/3\n 1/2 | 0 1/2\n 1 | 1 0 0\n | 1 0 0 0", (1, 2, 3)),
        ("0 |\n 1/3 | 1/3\n 1/2 | 0 1/2\n 1 | 1 0 0\n | 1/2 0 0 1/2", (1, 2)),
    ],
)
def test_functions_without_a_gradient_are_unused(text, unused):
    scheme, x = RungeKutta(Tableau.parse(text, order=None, name="mine")), torch.ones(2, dtype=F64)
    gains = [torch.ones((), dtype=F64, requires_grad=True) for _ in range(scheme.stages)]
    (y,) = scheme.step([lambda x, g=g: torch.sin(g * x) for g in gains], (x,), h=0.5)
    grads = torch.autograd.grad(y.sum(), gains, allow_unused=True)
    assert scheme.unused == unused == tuple(i for i, g in enumerate(grads) if g is None)
    assert scheme.stages - len(unused) == schemes.runge_kutta.pruned(scheme).stages


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "4", None])
def test_steps_of_a_solve_are_counted(steps):
    with pytest.raises(SchemeError, match=r"steps is .*, want a whole number of at least 1"):
        solve(get("rk4"), torch.neg, torch.ones(1), steps=steps)


@pytest.mark.parametrize("name", ["rk4", "euler", "midpoint", "leapfrog", "momentum"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_whole_numbers_are_no_initial_values(name, dtype):
    with pytest.raises(SchemeError, match=r"of torch\.\w+, which cannot hold steps.\n  Give x.double"):
        solve(get(name), torch.neg, torch.ones(1, dtype=dtype), steps=4)


@pytest.mark.parametrize("degree", [0, 2, 6, 9, True, 3.5, 4.0, None])
def test_degrees_of_hermite_are_three(degree):
    with pytest.raises(SchemeError, match=r"the degree is .*, want 3, 4 or 5"):
        schemes.interpolants.hermite(schemes.tableaux.rk4, degree)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, np.array, Fraction, Decimal])
@pytest.mark.parametrize("name", ["rk4", "kutta3", "repeat(kutta3, 2)", "leapfrog", "momentum", "reversible(rk4)"])
def test_numbers_of_any_type_are_step_sizes_and_leave_nothing_behind(name, kind):
    h, x = kind("0.3") if kind in (Fraction, Decimal) else kind(0.3), torch.ones(1, dtype=F64)
    scheme = get(name)
    fs = [torch.sin] * scheme.stages
    state = scheme.init(fs, x)
    (RungeKutta(scheme.tableau) if isinstance(scheme, RungeKutta) else scheme)._step(fs, state, float(h))
    for size in (h, float(h)):  # the second reads what the first has left
        got = scheme.step(fs, state, h=size)
        fresh = RungeKutta(scheme.tableau) if isinstance(scheme, RungeKutta) else scheme
        want = fresh._step(fs, state, float(h))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_sizes_of_other_types_do_not_pass_their_precision_on():
    scheme, x = RungeKutta(schemes.tableaux.kutta3), torch.ones(1, dtype=F64)
    scheme._step([torch.sin] * 3, (x,), np.float32(0.25))
    assert {type(a) for rows, weights in scheme._scaled.values() for row in (*rows, weights) for _, a in row} == {float}


@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_the_formula(name):
    check_formula(get(name))
    check_slots(get(name))


@given(tableaux())
def test_a_step_is_the_formula_of_any_tableau(tableau):
    check_formula(RungeKutta(tableau))
    check_slots(RungeKutta(tableau))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("euler", "euler"), ("midpoint", "midpoint"), ("heun2", "heun2"), ("heun3", "heun3"), ("rk38", "rk4")],
)
def test_torchdiffeq_computes_the_same(ours, theirs):
    if theirs not in sys.modules["torchdiffeq._impl.odeint"].SOLVERS:
        pytest.skip(f"this torchdiffeq has no {theirs}")

    def f(t, y):
        return torch.stack((y[..., 1] * torch.cos(t), -y[..., 0] * y[..., 1] + t), -1)

    x = torch.randn(5, 2, dtype=F64)
    grid = torch.linspace(0.0, 2.0, 9, dtype=F64)
    want = torchdiffeq.odeint(f, x, grid, method=theirs)[-1]
    got = solve(get(ours), lambda t, y: f(torch.as_tensor(t, dtype=F64), y), x, t=(0.0, 2.0), steps=8)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_rk4_by_hand():
    fs = residual_functions(get("rk4"))
    f1, f2, f3, f4 = fs
    x, h = torch.randn(2, 3, dtype=F64), 0.3
    k1 = f1(x)
    k2 = f2(x + h / 2 * k1)
    k3 = f3(x + h / 2 * k2)
    k4 = f4(x + h * k3)
    (got,) = get("rk4").step(fs, (x,), h=h)
    torch.testing.assert_close(got, x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", ["euler", "rk4", "dopri5", "verner89", "gill4"])
def test_a_tensor_as_step_size_gives_the_same_and_a_gradient(name):
    scheme, x = get(name), torch.randn(2, 3, dtype=F64)
    fs = residual_functions(scheme)
    h = torch.tensor(0.2, dtype=F64, requires_grad=True)
    (got,) = scheme.step(fs, (x,), h=h)
    (want,) = scheme.step(fs, (x,), h=0.2)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(got.sum(), h)
    up, down = (scheme.step(fs, (x,), h=0.2 + d)[0].sum() for d in (1e-5, -1e-5))
    assert float(grad) == pytest.approx(float(up - down) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("tensor", [False, True])
def test_step_with_error(name, tensor):
    scheme, x = get(name), torch.randn(2, 3, dtype=F64, requires_grad=True)
    fs = residual_functions(scheme)
    h = torch.tensor(0.4, dtype=F64, requires_grad=True) if tensor else 0.4
    (y,), error = scheme.step_with_error(fs, (x,), h)
    torch.testing.assert_close(y, scheme.step(fs, (x,), h=h)[0], rtol=1e-12, atol=1e-12)
    t = scheme.tableau
    other = RungeKutta(replace(t, b=t.b_hat, b_hat=None))
    (companion,) = other.step(fs, (x,), h=h)
    torch.testing.assert_close(error, companion - y, rtol=1e-9, atol=1e-11)
    for grad in torch.autograd.grad(error.square().sum(), [x, h] if tensor else [x]):
        assert bool(torch.isfinite(grad).all()) and float(grad.abs().max()) > 0


def test_no_companion():
    with pytest.raises(SchemeError, match=r"rk4 has no embedded companion; dopri5"):
        get("rk4").step_with_error([torch.neg] * 4, (torch.ones(1),))


@pytest.mark.parametrize(
    ("name", "stages", "live"), [("dopri5", 7, 6), ("bosh3", 4, 3), ("verner89", 16, 14), ("rk4", 4, 4)]
)
def test_stages_that_only_the_companion_reads_are_not_evaluated(name, stages, live):
    scheme = get(name)
    fs = residual_functions(scheme)
    scheme.step(fs, (torch.randn(2, 3, dtype=F64),))
    assert (scheme.stages, scheme.evaluations, sum(len(f.seen) for f in fs)) == (stages, live, live)
    assert scheme.unused == tuple(range(live, stages))
    pruned = get(f"pruned({name})")
    assert (pruned.stages, pruned.evaluations, pruned.unused) == (live, live, ())


def test_a_wrong_number_of_functions():
    with pytest.raises(SchemeError, match="rk4: 3 residual functions, want 4 a step"):
        get("rk4").step([torch.neg] * 3, (torch.ones(1),))


def test_no_inverse():
    with pytest.raises(SchemeError, match="rk4 has no inverse; choose an invertible scheme"):
        get("rk4").inverse([torch.neg] * 4, (torch.ones(1),))


def test_steps_write_to_nothing_that_they_were_given():
    """Residual functions may return their argument, or the same tensor each time: no in-place sum may reach it."""
    for name in ("rk4", "dopri5", "nested(rk4, heun3)", "substeps(rk38, 2)"):
        scheme = get(name)
        for h in (1.0, 0.5, torch.tensor(0.5)):
            k, x = torch.ones(3), torch.arange(3.0)
            constant = scheme.step([lambda _, k=k: k] * scheme.stages, (x,), h=h)[0]
            assert torch.equal(k, torch.ones(3)) and torch.equal(x, torch.arange(3.0)), name
            torch.testing.assert_close(constant, x + h * scheme.span)
            identity = scheme.step([lambda x: x] * scheme.stages, (x,), h=h)[0]
            assert torch.equal(x, torch.arange(3.0)), name
            # y' = y: the step multiplies by R(h).
            assert torch.allclose(identity, x * (identity[1] / x[1]), rtol=1e-5)


def test_many_step_sizes_do_not_pile_up():
    scheme = RungeKutta(schemes.tableaux.rk4)
    for n in range(200):
        scheme._step([torch.neg] * 4, (torch.ones(()),), 1 / (n + 1))
    assert len(scheme._scaled) <= 64
    (y,) = scheme._step([torch.neg] * 4, (torch.ones((), dtype=F64),), 1e-2)
    assert float(y) == pytest.approx(math.exp(-0.01), abs=1e-11)


def test_schemes_of_different_coefficients_are_different():
    one = Tableau.parse("0 |\n 1 | 1\n | 1/2 1/2", order=2)
    other = Tableau.parse("0 |\n 1/2 | 1/2\n | 0 1", order=2)
    assert RungeKutta(one) == RungeKutta(one) != RungeKutta(other)


def test_half_precision_functions_under_a_single_precision_stream():
    fs = [lambda x: torch.tanh(x).bfloat16()] * 4
    (y,) = get("rk4").step(fs, (torch.ones(3),), h=0.5)
    assert y.dtype == torch.float32
