"""Schemes made of schemes: steps of the whole are steps of the parts, at the right times, with the right order."""

from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import schemes
from odenets import Stack
from schemes import SchemeError, get, order, solve, stability
from schemes.scheme import Takes, signature
from schemes.testing import check_formula, check_order, check_slots, residual_functions, scheme_expressions
from schemes.testing import schemes as drawn_schemes

F64 = torch.float64


@given(drawn_schemes(max_stages=16))
def test_a_step_is_the_formula(scheme):
    check_formula(scheme)
    check_slots(scheme)


ORDERS = {
    "nested(euler, rk4)": 4,
    "nested(rk4, euler)": 4,
    "nested(midpoint, midpoint)": 1,
    "nested(rk4, heun3)": 1,
    "nested(midpoint, repeat(euler, 2))": 1,
    "nested(repeat(euler, 2), midpoint)": 2,
    "nested(2*euler, rk4)": 4,
    "nested(nested(repeat(euler, 2), euler), heun3)": 3,
    "repeat(rk4, 3)": 4,
    "repeat(nested(midpoint, midpoint), 2)": 1,
    "substeps(rk4, 3)": 4,
    "substeps(repeat(heun3, 2), 2)": 3,
    "2*rk4 + midpoint": 2,
    "rk4 + ssprk33": 3,
    "nested(rk4 + midpoint, euler)": 2,
    "pruned(dopri5)": 5,
    "repeat(tsit5, 2)": 5,
}


@pytest.mark.cases(9)
@pytest.mark.parametrize(("text", "declared"), ORDERS.items())
def test_order(text, declared):
    scheme = get(text)
    assert scheme.order == declared == order.order(scheme.tableau, limit=6)
    check_order(scheme)


@given(scheme_expressions(max_stages=8))
def test_declared_orders_hold(text):
    scheme = get(text)
    assert scheme.order is not None and order.order(scheme.tableau, limit=scheme.order) == scheme.order


def written(scheme, fs, x, h):
    """Nesting as it is said: the inner's whole step is the outer's residual function."""
    if not isinstance(scheme, schemes.Nested):
        return scheme.step(fs, (x,), h=h)[0]
    s = scheme.inner.stages
    parts = [fs[i * s : (i + 1) * s] for i in range(scheme.outer.stages)]
    outer = [lambda y, part=part: (written(scheme.inner, part, y, h) - y) / h for part in parts]
    return written(scheme.outer, outer, x, h)


@pytest.mark.parametrize(
    "text",
    [
        "nested(midpoint, repeat(euler, 2))",
        "nested(rk4, heun3)",
        "nested(nested(midpoint, heun2), repeat(rk4, 2))",
        "nested(repeat(midpoint, 2), rk38)",
        "nested(substeps(heun2, 2), substeps(rk4, 2))",
        "nested(2*euler + midpoint, heun2)",
    ],
)
@pytest.mark.parametrize("tensor", [False, True])
def test_nested_is_nested_stepping(text, tensor):
    scheme, x = get(text), torch.randn(2, 3, dtype=F64)
    fs = residual_functions(scheme)
    h = torch.tensor(0.3, dtype=F64) if tensor else 0.3
    torch.testing.assert_close(scheme.step(fs, (x,), h=h)[0], written(scheme, fs, x, h), rtol=1e-11, atol=1e-12)


@given(scheme_expressions(max_stages=12), st.floats(-2, 2))
@example("nested(ees25, 3*euler)", 0.0)  # a warm-up may start at step size 0: nothing may be divided by it
def test_a_linear_field_gives_the_stability_polynomial(text, z):
    scheme = get(text)
    h = z / scheme.span  # the tableau is scaled to a whole step of 1
    (y,) = scheme.step([lambda x: x] * scheme.stages, (torch.ones((), dtype=F64),), h=h)
    want = sum(float(c) * z**k for k, c in enumerate(stability.polynomial(scheme.tableau)))
    assert float(y) == pytest.approx(want, rel=1e-9, abs=1e-9)


def times(scheme, f, h=0.5, t=1.0):
    seen = []

    def wrapped():
        return f(seen)

    fs = [wrapped() for _ in range(scheme.stages)]
    scheme.step(fs, (torch.zeros(1),), t=t, h=h)
    return seen


def first(seen):
    def f(t, y):
        seen.append(float(t))
        return y

    return f


def second(seen):
    def f(y, t):
        seen.append(float(t))
        return y

    return f


def keyword(seen):
    def f(y, *, t):
        seen.append(float(t))
        return y

    return f


@pytest.mark.parametrize("kind", [first, second, keyword])
@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("rk4", [1, 1.25, 1.25, 1.5]),
        ("repeat(midpoint, 2)", [1, 1.25, 1.5, 1.75]),
        ("substeps(midpoint, 2)", [1, 1.125, 1.25, 1.375]),
        ("2*euler + midpoint", [1, 1.5, 2, 2.25]),
        ("nested(midpoint, repeat(euler, 2))", [1, 1.5, 1.5, 2]),
        ("nested(repeat(euler, 2), midpoint)", [1, 1.25, 1.5, 1.75]),
    ],
)
def test_time_nodes(kind, text, nodes):
    assert times(get(text), kind) == pytest.approx(nodes)


@pytest.mark.parametrize("text", ["rk4", "repeat(rk4, 3)", "substeps(rk4, 2)", "2*rk4 + rk38"])
def test_solve_reaches_the_end_at_the_right_time(text):
    scheme = get(text)
    got = solve(scheme, lambda t, y: 4 * t**3 + 0 * y, torch.zeros((), dtype=F64), t=(1.0, 3.0), steps=2)
    assert float(got) == pytest.approx(3**4 - 1, rel=1e-12)  # Simpson's rule is right for cubics


def timed(x, t=5.0, context=None):
    return x * t


def by_keyword(x, *, context, t=5.0):
    return x * t


class Timed(torch.nn.Module):
    def forward(self, x, t=5.0, context=None):
        return x * t


@pytest.mark.parametrize("f", [timed, by_keyword, Timed(), partial(timed, t=5.0), partial(Timed(), t=5.0)])
def test_a_step_without_a_time_leaves_it_to_the_default(f):
    x = torch.ones(2, dtype=F64)
    assert torch.equal(get("euler").step([f], (x,), context=1)[0], 6 * x)
    state = get("leapfrog").step([f], (x, x), context=1)
    assert torch.equal(state[1], 11 * x)
    assert torch.equal(get("leapfrog").inverse([f], state, context=1)[0], x)


@pytest.mark.parametrize("way", ["step", "inverse"])
def test_a_step_without_a_time_that_has_no_default_is_refused(way):
    for f in (lambda t, x, context: x, lambda x, t, context: x, lambda x, context, *, t: x):
        with pytest.raises(SchemeError, match=r"without a default.\n  Give the time"):
            getattr(get("leapfrog"), way)([f], (torch.ones(2),) * 2, context=1)


@pytest.mark.parametrize("name", [text for text in schemes.examples() if get(text).invertible])
@pytest.mark.parametrize("way", ["step", "inverse"])
@pytest.mark.parametrize("more", [-1, 1])
def test_functions_are_counted(name, way, more):
    scheme = get(name)
    with pytest.raises(SchemeError, match=f"{scheme.stages + more} residual functions, want {scheme.stages} a step"):
        getattr(scheme, way)([torch.sin] * (scheme.stages + more), (torch.ones(2, 8),) * scheme.streams)


FIXED = {
    "a function": lambda: partial(timed, t=10.0),
    "a module": lambda: partial(Timed(), t=10.0),
    "a partial function": lambda: partial(partial(timed, t=10.0), context=None),
    "by position": lambda: partial(lambda t, x: x * t, 10.0),
    "a module by position": lambda: partial(First(), 10.0),
}


class First(torch.nn.Module):
    def forward(self, t, x):
        return x * t


@pytest.mark.parametrize("kind", FIXED)
def test_a_time_that_is_fixed_stays(kind):
    f, x = FIXED[kind](), torch.ones((), dtype=F64)
    want = schemes.solve(get("rk4"), lambda x: x * 10.0, x, steps=8)
    assert torch.equal(schemes.solve(get("rk4"), f, x, steps=8), want)
    assert torch.equal(Stack(f, "rk4", depth=8, step="1/depth")(x), want)
    assert not signature(f).time and not signature(f).first


def test_a_context_that_is_fixed_stays():
    f = partial(lambda x, context: x * context, context=2.0)
    assert signature(f) == Takes() and signature(partial(Timed(), context=1)) == Takes(time=True)


def test_context_reaches_the_functions_that_take_one_and_gets_a_gradient():
    context = torch.ones(3, dtype=F64, requires_grad=True)
    fs = [lambda y, context: y * context, lambda y: -y, lambda t, y, *, context: t * context + y, torch.sin]
    x = torch.randn(3, dtype=F64, requires_grad=True)
    (y,) = get("rk4").step(fs, (x,), context=context, t=0.0)
    for grad in torch.autograd.grad(y.square().sum(), (x, context)):
        assert float(grad.abs().min()) > 0
    k1 = x * context
    k2 = -(x + k1 / 2)
    k3 = 0.5 * context + x + k2 / 2
    k4 = torch.sin(x + k3)
    torch.testing.assert_close(y, x + (k1 + 2 * k2 + 2 * k3 + k4) / 6)


def test_a_function_without_signature_gets_no_time():
    (y,) = get("euler").step([torch.neg], (torch.ones(1),), t=0.0)
    assert float(y) == 0.0


def test_mix_makes_one_step_of_each_part_in_turn():
    mix = get("2*rk4 + midpoint")
    assert [str(mix.at(n)) for n in range(5)] == ["rk4", "rk4", "midpoint", "rk4", "rk4"]
    assert [str(s) for s in get("2*(euler + midpoint)").plan] == ["euler", "midpoint"] * 2
    assert (
        mix.span,
        get("repeat(2*rk4 + midpoint, 2)").span,
        get("substeps(mix, 2)".replace("mix", "2*rk4")).span,
    ) == (
        3,
        6,
        2,
    )


def test_a_shortcut_of_nested_schemes_runs_once():
    calls = []

    def shortcut(x):
        calls.append(1)
        return x

    for text in ("nested(rk4, heun3)", "nested(heun2, nested(heun2, heun2))", "repeat(nested(rk4, rk4), 2)"):
        scheme = get(text)
        calls.clear()
        scheme.step([torch.neg] * scheme.stages, (torch.ones(2),), gs=(shortcut,), h=0.1)
        assert len(calls) == 1, text


def test_mixing_is_the_figure_of_the_tableau():
    for text in ("rk4", "nested(midpoint, heun2)", "substeps(rk4, 2)", "nested(rk4, nested(midpoint, kutta3))"):
        scheme = get(text)
        if isinstance(scheme, schemes.Substeps):
            assert scheme.mixing == scheme.parts[0].mixing / 2  # each substep starts from its own input
        elif "nested" in text:
            assert scheme.mixing == pytest.approx(scheme.tableau.mixing)
