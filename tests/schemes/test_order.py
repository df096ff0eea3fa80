"""Orders are computed: trees are counted, conditions are exact, and what breaks an order is seen."""

from dataclasses import replace
from fractions import Fraction
from math import factorial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemes import order as module
from schemes import tableaux
from schemes.errors import SchemeError
from schemes.order import antisymmetric_order, conditions, order, trees
from schemes.stability import polynomial
from schemes.tableau import Surd, Tableau, compose, nest, sqrt

M = tableaux.METHODS


def test_trees_are_all_there_and_differ():
    assert [len(trees(n)) for n in range(1, 11)] == [1, 1, 2, 4, 9, 20, 48, 115, 286, 719]
    for n in range(1, 9):
        assert len({str(t) for t in trees(n)}) == len(trees(n)) and {t.order for t in trees(n)} == {n}


@pytest.mark.parametrize("n", range(1, 10))
def test_labellings_of_trees_add_up(n):
    """A tree has n! / (gamma sigma) monotone labellings, and (n - 1)! increasing trees exist (Butcher 2016, 2.5)."""
    assert sum(Fraction(factorial(n), t.density * t.symmetry) for t in trees(n)) == factorial(n - 1)


def test_residuals_are_the_sums_written_out():
    t = M["dopri5"]
    c, b, n = t.c, t.b, range(t.stages)

    def a(i, j):
        return t.a[i][j] if j < i else 0

    by_hand = {
        "[[[[]]]]": sum(b[i] * a(i, j) * a(j, k) * c[k] for i in n for j in n for k in n) - Fraction(1, 24),
        "[[[][]]]": sum(b[i] * a(i, j) * c[j] * c[j] for i in n for j in n) - Fraction(1, 12),
        "[[[]][]]": sum(b[i] * c[i] * a(i, j) * c[j] for i in n for j in n) - Fraction(1, 8),
        "[[][][]]": sum(b[i] * c[i] * c[i] * c[i] for i in n) - Fraction(1, 4),
    }
    assert dict(zip(map(str, trees(4)), conditions(t, 4), strict=True)) == by_hand
    t = Tableau.from_rows([[], [sqrt(2)], [1, sqrt(2)]], [sqrt(2), 1, -sqrt(2)], order=None)
    assert conditions(t, 2) == (sqrt(2) - (1 + sqrt(2)) * sqrt(2) - Fraction(1, 2),)
    assert conditions(t, 3)[0] == -sqrt(2) * sqrt(2) * sqrt(2) - Fraction(1, 6)


@pytest.mark.parametrize("name", ["rk4", "verner8", "cooper_verner8", "ees27"])
def test_tall_trees_are_the_coefficients_of_the_stability_polynomial(name):
    r = polynomial(M[name])
    for n in range(1, 8):
        tall = next(k for k, t in enumerate(trees(n)) if str(t) == "[" * n + "]" * n)
        want = r[n] if n < len(r) else Fraction(0)
        assert conditions(M[name], n)[tall] == want - Fraction(1, factorial(n))


def test_verner8_has_order_8_and_not_9():
    assert order(M["verner8"]) == order(M["verner89"]) == 8
    assert all(x == 0 for p in range(1, 9) for x in conditions(M["verner8"], p))
    assert sum(x != 0 for x in conditions(M["verner8"], 9)) == 286


def test_verners_companion_has_order_9_and_not_10():
    assert order(M["verner89"], weights="b_hat") == 9
    assert all(x == 0 for p in range(1, 10) for x in conditions(M["verner89"], p, weights="b_hat"))
    assert sum(x != 0 for x in conditions(M["verner89"], 10, weights="b_hat")) == 719


def test_a_verner_entry_with_a_lost_root_costs_the_order():
    a = [list(row) for row in M["verner8"].a]
    a[11][6] = Fraction(154922 - 40458, 135)  # sqrt(6) dropped, and the node moved with it so that the array passes
    broken = Tableau.from_rows(a, M["verner8"].b, order=None)
    assert order(broken) == 1
    assert isinstance(conditions(broken, 2)[0], Surd)


def test_kutta_nystrom_with_a_weight_on_the_wrong_stage_has_order_1():
    b = [Fraction(x, 192) for x in (23, 125, 0, 0, -81, 125)]
    assert order(replace(M["kutta_nystrom5"], b=b)) == 1


NESTED = [(B, A) for B in ("midpoint", "heun3", "rk4", "gill4", "verner8") for A in ("midpoint", "kutta3", "rk4")]


@pytest.mark.parametrize(("outer", "inner"), NESTED)
def test_nested_methods_have_order_1(outer, inner):
    t = nest(M[outer], M[inner])
    assert t.order == 1 == order(t)


@pytest.mark.parametrize("name", ["midpoint", "kutta3", "rk4", "dopri5"])
def test_nested_with_euler_is_the_other_method(name):
    for t in (nest(M[name], M["euler"]), nest(M["euler"], M[name])):
        assert (t.a, t.b, t.c) == (M[name].a, M[name].b, M[name].c)
        assert t.order == M[name].order == order(t)


def test_two_methods_of_order_1_can_nest_to_order_2():
    half = Tableau.from_rows([[], [1]], ["3/4", "1/4"], order=1)  # sum b c = 1/4
    assert order(half) == 1
    t = nest(half, half)
    assert t.order is None and order(t) == 2


@pytest.mark.parametrize("name", ["euler", "midpoint", "kutta3", "rk4", "gill4", "kutta_nystrom5", "rk46nl"])
@pytest.mark.parametrize("n", [2, 3])
def test_repeated_methods_keep_their_order(name, n):
    t = compose([M[name]] * n)
    assert t.stages == n * M[name].stages
    assert t.order == M[name].order == order(t)


def test_mixes_have_the_least_order():
    for names, want in ((("rk4", "rk4", "rk4", "midpoint"), 2), (("rk4", "dopri5"), 4), (("euler", "rk4"), 1)):
        t = compose([M[name] for name in names])
        assert t.order == want == order(t)
    assert compose([M["rk4"], nest(M["rk4"], replace(M["heun2"], order=None))]).order == 1
    assert compose([replace(M["rk4"], order=None), M["rk4"]]).order is None


@given(st.fractions(-2, 2, max_denominator=9).filter(lambda x: x not in (0, 1)))
def test_a_users_own_two_stage_family_has_order_2(c):
    """b2 = 1 / (2 c2) is the condition of order 2; two stages reach no more."""
    t = Tableau.from_rows([[], [c]], [1 - 1 / (2 * c), 1 / (2 * c)], order=None)
    assert order(t) == 2
    b2 = 1 / (2 * c) + Fraction(1, 10**30)
    assert order(Tableau.from_rows([[], [c]], [1 - b2, b2], order=None)) == 1


def test_rounding_hides_no_missing_order_and_fails_no_true_one():
    def rounded(t, digits, declared):
        def cut(row):
            return [Fraction(round(float(x) * 10**digits), 10**digits) for x in row]

        b = cut(t.b)
        b[-1] = 1 - sum(b[:-1])
        return Tableau.from_rows([cut(row) for row in t.a], b, order=None, digits=declared)

    for name in ("kutta3", "gill4", "fehlberg45", "huta6"):
        assert order(rounded(M[name], 13, 13)) == M[name].order
        assert order(rounded(M[name], 9, 13)) == 1 or name == "kutta3"  # claims digits that it does not have
    assert order(rounded(M["gill4"], 6, None)) == 1
    assert order(rounded(M["gill4"], 6, 6)) == 4
    # Three digits prove nothing about order 4: what they leave open is not counted as held.
    assert order(rounded(M["gill4"], 3, 3)) < 4


def test_sensitivity_is_the_sum_of_derivatives():
    t, step = M["kutta_nystrom5"], Fraction(1, 10**15)

    def weight(a, b, tree):
        return module._ElementaryWeights(a, b).residual(tree, Fraction(0))

    for tree in (*trees(3), *trees(4), *trees(5)):
        want = 0.0
        for row in range(t.stages + 1):
            for j, x in enumerate(t.b if row == t.stages else t.a[row]):
                rows = [list(r) for r in (*t.a, t.b)]
                rows[row][j] += step
                slope = (weight(rows[:-1], rows[-1], tree) - weight(t.a, t.b, tree)) / step
                want += max(1.0, abs(float(x))) * abs(float(slope)) if x else 0.0
        assert module._Sensitivity(t.a, t.b).of(tree) == pytest.approx(want, rel=1e-9)


def test_limit_is_where_looking_stops():
    assert order(M["verner89"], limit=3) == 3 and antisymmetric_order(M["ees27"], limit=4) == 4


@pytest.mark.parametrize(
    ("name", "m"),
    [("euler", 1), ("midpoint", 3), ("kutta3", 3), ("rk4", 5), ("dopri5", 5), ("ees27", 7), ("rk46nl", 5)],
)
def test_antisymmetric_order(name, m):
    assert antisymmetric_order(M[name]) == m


def test_antisymmetric_order_bounds_what_two_steps_leave_of_a_linear_problem():
    """R(z) R(-z) = 1 + O(z^(m+1)): for EES(2,7) exactly that power is left."""
    r = polynomial(M["ees27"])
    product = [
        sum((r[i] * r[k - i] * (-1) ** (k - i) for i in range(len(r)) if 0 <= k - i < len(r)), Fraction(0))
        for k in range(9)
    ]
    assert product[0] == 1 and not any(product[1:8]) and product[8] != 0


def test_requests_that_make_no_sense():
    with pytest.raises(SchemeError, match="rk4 has no second weights"):
        order(M["rk4"], weights="b_hat")
    with pytest.raises(SchemeError, match="want 'b' or 'b_hat'"):
        order(M["rk4"], weights="c")  # type: ignore[arg-type]
    mixed = Tableau.from_rows([[], [sqrt(2)], [0, sqrt(3)]], [0, 0, 1], order=None)
    with pytest.raises(SchemeError, match=r"sqrt of \[2, 3\]"):
        order(mixed)
