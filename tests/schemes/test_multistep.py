"""Multistep schemes: published formulas, orders, starts; BDIA."""

import functools
import math
from itertools import pairwise

import pytest
import torch

import schemes
from schemes.bdia import Bidirectional
from schemes.scheme import bind, signature
from schemes.testing.reversible import check_inverse, observed_amplification, run, smooth_functions


def field(t, x):
    """A pendulum with a clock: nonlinear, and wrong times lower the order."""
    return torch.stack([x[1] + 0.3 * t, -torch.sin(x[0]) * (1 + 0.2 * t)])


START = torch.tensor([1.0, 0.3], dtype=torch.float64)


@functools.cache
def exact():
    return schemes.solve(schemes.get("verner8"), field, START, steps=40)


def errors(scheme, counts=(20, 40, 80)):
    return [float((schemes.solve(scheme, field, START, steps=n) - exact()).norm()) for n in counts]


WITHOUT_TABLEAU = [
    text for text in schemes.examples() if schemes.get(text).order is not None and schemes.get(text).tableau is None
]


@pytest.mark.cases(14)
@pytest.mark.parametrize("name", WITHOUT_TABLEAU)
def test_order_by_the_slope_of_the_error(name):
    scheme = schemes.get(name)
    counts = (160, 320, 640) if scheme.order == 1 else (20, 40, 80)
    slopes = [math.log2(a / b) for a, b in pairwise(errors(scheme, counts))]
    assert slopes == pytest.approx([scheme.order] * 2, abs=0.06)


def test_leapfrog_keeps_its_order_by_its_first_step():
    """With the first step like the others, from (x, x), the order falls to 1."""
    scheme = schemes.get("leapfrog")
    wrong = []
    for n in (20, 40, 80):
        h, state = 1 / n, (START, START)
        for i in range(n):
            fs = bind((field,), [signature(field)], scheme.nodes, i * h, h, None)
            state = scheme._step(fs, state, h)
        wrong.append(float((state[1] - exact()).norm()))
    assert math.log2(wrong[1] / wrong[2]) == pytest.approx(1, abs=0.1)
    assert errors(scheme)[2] < wrong[2] / 20


def test_reversible_heun_is_the_published_scheme():
    """Kidger et al., algorithm 1, with its three variables, from the same start, time included."""
    n, h = 16, 1 / 16
    y = z = START
    f = field(0.0, START)
    for i in range(n):
        z = 2 * y - z + h * f
        new = field((i + 1) * h, z)
        y, f = y + h * (f + new) / 2, new
    got = schemes.solve(schemes.get("reversible_heun"), field, START, steps=n)
    assert torch.allclose(got, y, rtol=1e-14)


def test_reversible_heun_evaluates_once_a_step_and_once_to_start():
    scheme = schemes.get("reversible_heun")
    fs = smooth_functions(scheme, 4, 3)
    found = run(scheme, fs, torch.randn(1, 4, dtype=torch.float64), h=0.3)
    assert [f.calls for (f,) in fs] == [2, 1, 1]
    (f,) = fs[2]
    assert torch.allclose(found[3][2], 0.15 * f(found[3][1]))  # e = h/2 F(z), the by-product of the last step


@pytest.mark.parametrize("eta", [1.0, 0.8])
def test_alf_is_the_published_scheme(eta):
    n, h = 8, 1 / 8
    x, v = START, field(0.0, START)
    for i in range(n):
        m = x + h / 2 * v
        v = v + 2 * eta * (field((i + 0.5) * h, m) - v)
        x = m + h / 2 * v
    got = schemes.solve(schemes.get(f"alf({eta})"), field, START, steps=n)
    assert torch.allclose(got, x, rtol=1e-13)


def recursion(name, fs, x, h):
    """The scheme of that name as a recursion of its solution alone."""
    xs = [x]
    for n, (f,) in enumerate(fs):
        k, old = f(xs[-1]), xs[-2] if n else x
        if name == "leapfrog":
            xs.append(old + 2 * h * k if n else x + h * k)
        elif name == "lm_resnet":
            xs.append(0.7 * xs[-1] + 0.3 * old + h * k)
        elif name == "ab2":
            xs.append(xs[-1] + h * (1.5 * k - 0.5 * fs[n - 1][0](old) if n else k))
        elif name == "momentum":  # x_{n+1} - x_n = beta (x_n - x_{n-1}) + h (1 - beta) F
            xs.append(xs[-1] + 0.3 * (xs[-1] - old) + h * 0.7 * k)
        elif name == "bidirectional":
            xs.append(0.3 * old + 0.7 * xs[-1] + 1.3 * h * k if n else x + h * k)
    return xs


@pytest.mark.parametrize("name", ["leapfrog", "lm_resnet", "ab2", "momentum", "bidirectional"])
def test_recursions_of_the_solution(name):
    arguments = "" if name in ("leapfrog", "ab2") else "(0.3)"
    scheme = Bidirectional(0.3) if name == "bidirectional" else schemes.get(name + arguments)
    x = torch.randn(2, 3, dtype=torch.float64)
    fs = smooth_functions(scheme, 3, 6)
    got = [scheme.readout(state) for state in run(scheme, fs, x, h=0.4)]
    assert all(torch.allclose(a, b, atol=1e-13) for a, b in zip(got, recursion(name, fs, x, 0.4), strict=True))


def test_ab2_has_no_inverse():
    scheme = schemes.get("ab2")
    assert not scheme.invertible
    with pytest.raises(schemes.SchemeError, match="no inverse"):
        scheme.inverse((torch.sin,), (START, START))


@pytest.mark.parametrize(
    "name, amplification",
    [
        ("leapfrog", 1),
        ("momentum(0.5)", 2),
        ("lm_resnet(3)", 1),
        ("alf", 1),
        ("alf(0.9)", 1.25),
        ("reversible_heun", 1),
    ],
)
def test_published_amplifications(name, amplification):
    scheme = schemes.get(name)
    assert observed_amplification(scheme) == pytest.approx(amplification, rel=0.03)
    assert scheme.amplification == pytest.approx(amplification)


# BDIA


def test_bdia_is_euler_at_inference():
    x, bdia = torch.randn(2, 3, dtype=torch.float64), schemes.get("bdia")
    assert torch.equal(bdia.step((torch.sin,), (x,), h=0.5)[0], schemes.get("euler").step((torch.sin,), (x,), h=0.5)[0])
    assert not bdia.invertible and bdia.at_random(1, 0.5).invertible


def test_gamma_is_drawn_for_each_sample_with_mean_zero():
    bdia, x = schemes.get("bdia(1/4)"), torch.zeros(4000, 2, 3)
    gamma = bdia.draw(x, torch.Generator().manual_seed(0))
    assert gamma.shape == (4000, 1, 1) and gamma.dtype == x.dtype
    assert gamma.abs().eq(0.25).all() and abs(float(gamma.mean())) < 0.02
    assert torch.equal(gamma, bdia.draw(x, torch.Generator().manual_seed(0)))
    assert bdia.at_random(1, gamma).amplification == 4.0


def test_a_step_with_a_gamma_for_each_sample_has_its_inverse():
    gamma = schemes.get("bdia").draw(torch.zeros(5, 4, 2, dtype=torch.float64))
    scheme = Bidirectional(gamma)
    check_inverse(scheme, torch.randn(5, 4, 2, dtype=torch.float64))
    x, (f,) = torch.randn(5, 4, 2, dtype=torch.float64), smooth_functions(scheme, 4, 2)[1]
    old = torch.randn_like(x)
    _, new = scheme._step((f,), (old, x))
    for i, g in enumerate(gamma.flatten()):
        (_, alone) = Bidirectional(float(g))._step((f,), (old[i : i + 1], x[i : i + 1]))
        assert torch.allclose(new[i], alone[0], atol=1e-14)
