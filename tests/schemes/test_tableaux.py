"""Every method in the catalogue has the order that it declares; the published arrays agree with an independent copy."""

from fractions import Fraction

import pytest

from schemes import tableaux
from schemes.errors import SchemeError
from schemes.order import antisymmetric_order, order
from schemes.tableau import Tableau

SAMPLES = {
    "ees25": [(), ("1/4",), ("-2",), ("sqrt(2)",)],
    "rkc1": [(1,), (2,), (5,), (10, "1/10"), (4, 0)],
    "rkc2": [(2,), (3,), (5,), (10,), (16, 0)],
    "rkl1": [(1,), (3,), (9,)],
    "rkl2": [(2,), (3,), (9,), (16,)],
}
MADE = [tableaux.FAMILIES[name](*args) for name, samples in SAMPLES.items() for args in samples]
ALL = [*tableaux.METHODS.values(), *MADE]
PAIRS = {"heun2", "bosh3", "fehlberg45", "dopri5", "tsit5", "dopri8", "verner89"}


@pytest.mark.parametrize("t", ALL, ids=lambda t: t.name)
def test_the_order_is_the_declared_one(t):
    assert order(t) == t.order


@pytest.mark.parametrize("t", [t for t in ALL if t.b_hat is not None], ids=lambda t: t.name)
def test_the_companion_has_its_declared_order(t):
    assert order(t, weights="b_hat") == t.order_hat


def test_embedded_pairs_carry_their_second_weights():
    assert {t.name for t in ALL if t.b_hat is not None} == PAIRS
    assert all((t.b_hat is None) == (t.order_hat is None) for t in ALL)


def test_names_find_the_methods():
    for name, t in tableaux.METHODS.items():
        assert t.name == name and getattr(tableaux, name) is t
    assert set(tableaux.FAMILIES) == set(SAMPLES)
    named = "euler midpoint heun2 ralston2 kutta3 heun3 ralston3 rk4 rk38 gill4 kutta_nystrom5 huta6 fehlberg45 bosh3 "
    named += "dopri5 tsit5 dopri8 cooper_verner8 verner8 verner89 ssprk33 ssprk54 ssprk104 williamson3 "
    named += "carpenter_kennedy4 rk46nl ees27"
    assert set(named.split()) <= set(tableaux.METHODS)


def test_every_method_is_cited_and_prints_itself():
    for t in ALL:
        assert t.cite
        fields = {"order": t.order, "order_hat": t.order_hat, "digits": t.digits, "name": t.name, "cite": t.cite}
        assert Tableau.parse(str(t), **fields) == t


def test_only_methods_that_were_published_rounded_declare_digits():
    rounded = {"tsit5", "dopri8", "ssprk54", "carpenter_kennedy4", "rk46nl"}
    assert {t.name for t in ALL if not t.exact} == rounded


def test_verner8_is_the_part_of_verner89_that_advances():
    assert tableaux.verner8.stages == 14 and tableaux.verner89.stages == 16
    assert tableaux.verner8.a == tableaux.verner89.a[:14] and tableaux.verner8.b == tableaux.verner89.b[:14]


@pytest.mark.parametrize("name", ["bosh3", "dopri5", "dopri8"])
def test_pairs_agree_with_torchdiffeq(name):
    solver = pytest.importorskip("torchdiffeq._impl.odeint").SOLVERS[name]
    theirs, t = solver.tableau, tableaux.METHODS[name]
    a, b, c, b_hat = t.floats()
    s = t.stages
    rows = [[float(x) for x in row] for row in theirs.beta]
    for i in range(1, s):
        assert rows[i - 1] == pytest.approx(a[i], rel=1e-15, abs=0) and float(theirs.alpha[i - 1]) == c[i]
    assert b_hat is not None
    assert [float(x) for x in theirs.c_sol][:s] == pytest.approx(b, rel=1e-15, abs=0)
    gap = [float(x) for x in theirs.c_error][:s]
    if name == "dopri5":  # torchdiffeq carries another fourth-order companion (Shampine 1986) of the same method
        gap, b_hat = [0.0] * s, b
    assert gap == pytest.approx([x - y for x, y in zip(b, b_hat, strict=True)], abs=1e-15)


def test_torchdiffeqs_rk4_is_the_three_eighths_rule():
    rk_common = pytest.importorskip("torchdiffeq._impl.rk_common")

    def field(t, x, perturb=None):
        return x * x - t

    got = rk_common.rk4_alt_step_func(field, 0.0, 0.5, 0.5, 0.25)
    a, b, c, _ = tableaux.rk38.floats()
    ks = []
    for row, node in zip(a, c, strict=True):
        ks.append(field(node / 2, 0.25 + sum(x * k for x, k in zip(row, ks, strict=True)) / 2))
    assert got == pytest.approx(sum(x * k for x, k in zip(b, ks, strict=True)) / 2, rel=1e-14)


def test_effectively_symmetric_methods():
    assert [antisymmetric_order(tableaux.ees25(x)) for x in ("1/10", "1/4")] == [5, 5]
    assert antisymmetric_order(tableaux.ees27) == 7 and antisymmetric_order(tableaux.rk4) == 5
    t = tableaux.ees25()
    assert t.a == ((), (Fraction(1, 3),), (Fraction(-5, 48), Fraction(15, 16)))
    assert t == Tableau.low_storage(
        [0, "-7/15", "-35/32"], ["1/3", "15/16", "2/5"], name=t.name, order=t.order, cite=t.cite
    )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: tableaux.ees25(1), "x = 1 divides by zero"),
        (lambda: tableaux.ees25("-1/2"), "x = -1/2 divides by zero"),
        (lambda: tableaux.ees25(0.1), "0.1 is not exact"),
        (lambda: tableaux.rkc1(0), "from 1 to 64"),
        (lambda: tableaux.rkc2(1), "from 2 to 64"),
        (lambda: tableaux.rkl2(1), "from 2 to 64"),
        (lambda: tableaux.rkl1(2.0), "whole number"),
        (lambda: tableaux.rkc2(10**6), "from 2 to 64"),
        (lambda: tableaux.rkc1(3, "-1"), "no rational number >= 0"),
        (lambda: tableaux.rkc2(3, "sqrt(2)"), "no rational number >= 0"),
    ],
)
def test_parameters_out_of_range_are_refused(bad, message):
    with pytest.raises(SchemeError) as error:
        bad()
    assert message in str(error.value)
