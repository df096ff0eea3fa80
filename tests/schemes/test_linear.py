"""The matrix form as an oracle: tableaux, declared inverses and amplifications, all read from a step alone."""

import pytest
import torch

import schemes
from schemes.bdia import Bidirectional
from schemes.linear import probe
from schemes.testing.reversible import smooth_functions


def derived(scheme):
    """The matrices of a later step, where it has some."""
    try:
        return probe(scheme)
    except schemes.SchemeError:
        return None


FIXED = {text: schemes.get(text) for text in schemes.examples() if schemes.get(text).nodes is not None}
LINEAR = {text: scheme for text, scheme in FIXED.items() if derived(scheme) is not None}
INVERTIBLE = [*(text for text, scheme in LINEAR.items() if scheme.invertible), "bidirectional"]


def get(name):
    return Bidirectional(-0.5) if name == "bidirectional" else schemes.get(name)


def streams(name):
    return 2 if name == "bidirectional" else None


def test_the_matrices_describe_most_schemes():
    assert {"revnet", "leapfrog", "momentum", "alf", "reversible_heun", "reversible(rk4)", "ab2", "rk4"} <= set(LINEAR)


@pytest.mark.parametrize("tableau", schemes.tableaux.METHODS.values(), ids=lambda t: t.name)
def test_a_runge_kutta_step_gives_its_tableau(tableau):
    scheme = schemes.RungeKutta(tableau)
    a, b, _, _ = tableau.floats()
    m, n = probe(scheme, h=0.5), scheme.live
    want = torch.zeros(n, n, dtype=torch.float64)
    for i, row in enumerate(a[:n]):
        want[i, : len(row)] = 0.5 * torch.tensor(row, dtype=torch.float64)
    assert torch.allclose(m.a, want, atol=1e-12, rtol=1e-12)
    assert torch.allclose(m.b, 0.5 * torch.tensor([b[:n]], dtype=torch.float64), atol=1e-12, rtol=1e-12)
    assert m.u.eq(1).all() and m.v.eq(1).all() and m.functions == tuple(range(n))
    assert not m.invertible


def test_nested_and_repeated_methods_give_their_tableaux():
    for name in ("nested(midpoint, repeat(euler, 2))", "repeat(rk4, 2)", "nested(rk4, midpoint)"):
        scheme = schemes.get(name)
        assert scheme.tableau is not None
        a, b, _, _ = scheme.tableau.floats()
        m = probe(scheme)
        want = torch.zeros_like(m.a)
        for i, row in enumerate(a):
            want[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
        assert torch.allclose(m.a, scheme.span * want) and torch.allclose(
            m.b[0], scheme.span * torch.tensor(b).double()
        )


@pytest.mark.parametrize("name", INVERTIBLE)
def test_the_derived_amplification_is_the_declared_one(name):
    assert get(name).amplification == pytest.approx(probe(get(name), streams(name)).amplification, rel=1e-6)


@pytest.mark.parametrize("name", INVERTIBLE)
def test_the_derived_step_and_inverse_are_the_written_ones(name):
    """On nonlinear functions: the matrices run forwards, and their inverse backwards."""
    torch.manual_seed(0)
    scheme, h = get(name), 0.7
    m = probe(scheme, streams(name), h)
    assert m.invertible and scheme.invertible
    fs = [f for (f,) in smooth_functions(schemes.get("euler"), 3, scheme.stages)]
    state = tuple(torch.randn(2, 3, dtype=torch.float64) for _ in range(m.v.shape[0]))
    after = scheme._step(fs, state, h)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(m.step(fs, state), after, strict=True))
    kept = m.read
    derived = m.inverse().step(fs, tuple(after[i] for i in kept))
    declared = scheme._inverse(fs, after, h)
    for i, got in zip(kept, derived, strict=True):
        assert torch.allclose(got, state[i], atol=1e-11)
        assert torch.allclose(got, declared[i], atol=1e-11)


def test_by_products_are_left_aside():
    m = probe(schemes.get("reversible_heun"))
    assert m.read == (0, 1)
    assert m.v.tolist() == [[1, 0, 0], [2, -1, 0], [0, 0, 0]]
    assert m.b.tolist() == [[1], [0], [0.5]]


@pytest.mark.parametrize("name", [text for text, scheme in LINEAR.items() if not scheme.invertible])
def test_what_has_no_explicit_inverse(name):
    m = probe(schemes.get(name))
    assert not m.invertible and not schemes.get(name).invertible
    with pytest.raises(schemes.SchemeError, match="V is singular" if name == "ab2" else "implicit"):
        m.inverse()
    assert m.amplification == (float("inf") if name == "ab2" else 1.0)


def test_an_inverse_that_nobody_wrote():
    """A scheme given by its step alone: Störmer-Verlet for x'' = F(x), streams (x, v)."""

    class Verlet(schemes.Scheme):
        stages, streams, evaluations, nodes = 2, 2, 2, (0.0, 1.0)

        def _step(self, fs, state, h=1.0, gs=()):
            x, v = state
            half = v + h / 2 * fs[0](x)
            x = x + h * half
            return x, half + h / 2 * fs[1](x)

        def __str__(self):
            return "verlet"

    m = probe(Verlet(), h=0.3)
    state = (torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64))
    fs = (torch.sin, torch.cos)
    back = m.inverse().step(fs, Verlet()._step(fs, state, 0.3))
    assert m.invertible and m.amplification == pytest.approx(1.0, abs=1e-6)
    assert all(torch.allclose(a, b, atol=1e-14) for a, b in zip(back, state, strict=True))


@pytest.mark.parametrize(
    "name, message",
    [
        ("affine", "no general linear method"),
        ("dense(1)", "makes 2 streams of 1"),
        ("additive(3)", "given several streams"),
        ("multilevel(3)", "given several streams"),
        ("revcol", "given several streams"),
    ],
)
def test_schemes_that_no_four_matrices_describe(name, message):
    with pytest.raises(schemes.SchemeError, match=message):
        probe(schemes.get(name), 5 if name == "revcol" else None)


def test_a_step_that_is_not_linear_is_refused():
    class Bent(schemes.Scheme):
        stages, evaluations = 1, 1

        def _step(self, fs, state, h=1.0, gs=()):
            return (state[0] * state[0] + fs[0](state[0]),)

        def __str__(self):
            return "bent"

    with pytest.raises(schemes.SchemeError, match="not linear"):
        probe(Bent())
