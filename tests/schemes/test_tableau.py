"""Laws of exact numbers and Butcher arrays: field laws, refusals with the figure, forms that describe one method."""

from dataclasses import FrozenInstanceError, replace
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from schemes import tableaux
from schemes.errors import SchemeError
from schemes.tableau import Surd, Tableau, compose, nest, number, sqrt

fractions = st.fractions(-1000, 1000, max_denominator=1000)


def surds(d=6):
    return st.builds(lambda p, q: p + q * sqrt(d), fractions, fractions)


@st.composite
def explicit(draw, most=4):
    """Tableaux whose last weight is 1 minus the others, so that each of them is valid by construction."""
    s = draw(st.integers(1, most))
    small = st.fractions(-2, 2, max_denominator=6)
    rows = [draw(st.lists(small, min_size=i, max_size=i)) for i in range(s)]
    b = draw(st.lists(small, min_size=s - 1, max_size=s - 1))
    return Tableau.from_rows(rows, [*b, 1 - sum(b)], name="drawn", order=None)


def decimal(x):
    if isinstance(x, Surd):
        return decimal(x.p) + decimal(x.q) * Decimal(x.d).sqrt()
    return Decimal(x.numerator) / Decimal(x.denominator)


def run(t, f, x, h=Fraction(1)):
    """One step in exact arithmetic, written out."""
    ks = []
    for row in t.a:
        ks.append(f(x + h * sum(a * k for a, k in zip(row, ks, strict=True))))
    return x + h * sum(b * k for b, k in zip(t.b, ks, strict=True))


def field(x):
    """A polynomial that tells the stages apart: no linear map would see what nesting and storage forms do to them."""
    return Fraction(1, 2) + x - Fraction(1, 3) * x * x


# --- numbers ----------------------------------------------------------------------------------------------------------


@given(surds(), surds(), surds())
def test_surds_are_a_field(x, y, z):
    assert x + y == y + x and x * y == y * x
    assert (x + y) + z == x + (y + z) and (x * y) * z == x * (y * z)
    assert x * (y + z) == x * y + x * z
    assert (x - y) + y == x and x - x == 0 and -x + x == 0
    if y != 0:
        assert x / y * y == x and 1 / y * y == 1


@given(surds(), surds())
def test_surds_are_the_numbers_they_stand_for(x, y):
    with localcontext() as context:
        context.prec = 60
        u, v = decimal(x), decimal(y)
        for exactly, roughly in ((x + y, u + v), (x - y, u - v), (x * y, u * v), (abs(x), abs(u))):
            assert abs(decimal(exactly) - roughly) < Decimal(10) ** -45
        assert (x < y, x <= y, x > y, x >= y) == (u < v, u <= v, u > v, u >= v)
        assert float(x) == float(u)


def test_a_surd_whose_root_cancels_is_a_fraction_again():
    x = 1 - sqrt(2) / 2
    assert isinstance(x, Surd) and type(x * (1 + sqrt(2) / 2)) is Fraction
    assert x * (1 + sqrt(2) / 2) == Fraction(1, 2)
    assert sqrt(2) * sqrt(2) == 2 and type(sqrt(2) - sqrt(2)) is Fraction
    assert hash(sqrt(8)) == hash(2 * sqrt(2)) and sqrt(0) == 0


def test_floats_of_surds_survive_cancellation():
    # A convergent of sqrt(2): subtracted in floats, five digits of the difference are left.
    x, naive = sqrt(2) - Fraction(275807, 195025), 2**0.5 - 275807 / 195025
    with localcontext() as context:
        context.prec = 60
        assert float(x) == float(Decimal(2).sqrt() - Decimal(275807) / 195025) == pytest.approx(9.2955e-12, abs=1e-15)
    assert naive != pytest.approx(float(x), rel=1e-6, abs=0)


def test_floats_of_surds_are_the_nearest_ones():
    with localcontext() as context:
        context.prec = 60
        for k in range(2, 900):  # k^2 + 1 has no square root, and k - sqrt(k^2 + 1) cancels more with every k
            root = sqrt(k * k + 1)
            for x in (k - root, root - k):
                assert float(x) == float(decimal(x))


@pytest.mark.parametrize(
    "bad",
    [
        lambda: sqrt(2) + sqrt(3),
        lambda: sqrt(2) * 0.5,
        lambda: sqrt(-1),
        lambda: sqrt(10**6 + 1),
        lambda: Surd(Fraction(1), Fraction(0), 2),
        lambda: Surd(Fraction(1), Fraction(1), 12),
    ],
)
def test_what_is_not_exact_is_refused(bad):
    with pytest.raises(SchemeError):
        bad()


def test_surds_with_different_roots_differ():
    assert sqrt(2) != sqrt(3) and sqrt(2) != Fraction(3, 2) and len({sqrt(2), sqrt(3), sqrt(8) / 2}) == 2


@given(st.one_of(fractions, surds(), surds(21)))
def test_the_printed_number_reads_back(x):
    assert number(str(x)) == x


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1/2", Fraction(1, 2)),
        (" -0.25 ", Fraction(-1, 4)),
        ("0.1234567890123456789012345", Fraction(1234567890123456789012345, 10**25)),
        (".5e-3", Fraction(1, 2000)),
        ("-(3 + 1)*2/-4", Fraction(2)),
        ("(2-sqrt(2))/2", 1 - sqrt(2) / 2),
        ("sqrt(9)", Fraction(3)),
    ],
)
def test_numbers_are_read_exactly(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "1/0",
        "1 2",
        "1j",
        "0x10",
        "True",
        "2**9",
        "1e999999999",
        "sqrt(2.0)",
        "sqrt(x=2)",
        "sqrt(-2)",
        "sqrt(2)+sqrt(3)",
        "__import__('os')",
        "(1).real",
        "1" * 501,
        "(" * 240 + "1" + ")" * 240,
        "1\0",
    ],
)
def test_other_texts_are_refused_in_one_line(text):
    with pytest.raises(SchemeError) as error:
        number(text)
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


# --- the checks of an array -------------------------------------------------------------------------------------------


def changed(t, **rows):
    """`t` with some of its fields changed, through the same constructor."""
    return replace(t, **rows)


def test_hutas_misprinted_weight_is_refused_with_the_figure():
    b = list(tableaux.huta6.b)
    b[3] = Fraction(24, 840)
    with pytest.raises(SchemeError, match="huta6: weights sum to 279/280, want 1"):
        changed(tableaux.huta6, b=b)


def test_verners_lost_sign_is_refused_with_the_figure():
    b = [abs(x) if i == 7 else x for i, x in enumerate(tableaux.verner8.b)]
    with pytest.raises(SchemeError, match="weights sum to 97/70, want 1"):
        changed(tableaux.verner8, b=b)


def test_verners_lost_root_is_refused_by_its_node():
    a = [list(row) for row in tableaux.verner8.a]
    a[5][0] = Fraction(8, 150)  # (9 - sqrt(6)) / 150 with the root read as 1
    with pytest.raises(SchemeError, match=r"row 6 sums to .*sqrt\(6\).*want its node c6 = \(6\+sqrt\(6\)\)/15"):
        changed(tableaux.verner8, a=a)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("0 |\n 1 | 1/2\n | 1/2 1/2", "row 2 sums to 1/2, want its node c2 = 1"),
        ("0 |\n 1 | 1 0\n | 1/2 1/2", "row 2 has 2 entries, want 1"),
        ("0 |\n 1 |\n | 1/2 1/2", "row 2 has 0 entries, want 1"),
        ("0 |\n 1 | 1\n | 1/2 1/3", "weights sum to 5/6, want 1"),
        ("0 |\n 1 | 1\n | 1/2 1/2\n | 1", "1 second weights, want 2"),
        ("0 |\n 1 | 1\n | 1/2 1/2\n | 1 1", "second weights sum to 2, want 1"),
        ("0 |\n 1 | 1\n | 1", "2 rows, 2 nodes, 1 weights"),
        ("0 |\n 1 | 1", "2 with a node and 0 without"),
        ("0 |\n | 1\n | 1\n | 1", "1 with a node and 3 without"),
        ("| 1\n 0 |", "want lines"),
        ("1 1\n | 1", "has no '|'"),
        ("", "want lines"),
        ("0 |\n | one", "'one' is no exact number"),
    ],
)
def test_bad_arrays_are_refused_with_the_figure(rows, message):
    with pytest.raises(SchemeError) as error:
        Tableau.parse(rows, order=1, name="mine")
    assert message in str(error.value)


def test_rounded_data_must_say_so_and_the_checks_say_so_too():
    rounded = "0 |\n 0.333333 | 0.333333\n 0.666667 | 0 0.666667\n | 0.25 0 0.749999"
    with pytest.raises(SchemeError, match=r"weights sum to 0\.999999, want 1"):
        Tableau.parse(rounded, order=3)
    assert not Tableau.parse(rounded, order=3, digits=6).exact
    with pytest.raises(SchemeError, match=r"sum to 0\.9999989.*, want 1 within 5e-10 \(declared to 10 digits\)"):
        Tableau.parse(rounded, order=3, digits=10)


def test_floats_are_refused_as_coefficients():
    with pytest.raises(SchemeError, match=r"0\.5 is not exact"):
        Tableau("mine", a=((), (0.5,)), b=(0, 1), c=(0, 0.5))  # type: ignore[arg-type]


def test_tableaux_are_values():
    assert hash(tableaux.rk4) == hash(replace(tableaux.rk4)) and tableaux.rk4 == replace(tableaux.rk4)
    with pytest.raises(FrozenInstanceError):
        tableaux.rk4.order = 5  # type: ignore[misc]


# --- printing and reading ---------------------------------------------------------------------------------------------


@given(explicit())
def test_the_printed_array_reads_back(t):
    assert Tableau.parse(str(t), order=None, name="drawn") == t


def test_a_line_without_a_bar_continues_the_line_above():
    assert Tableau.parse("0 |\n 1 | 1\n | 1/2\n 1/2", order=2, name="heun2").b == tableaux.heun2.b


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mixing"), [("euler", 0), ("rk4", 1), ("cooper_verner8", 21), ("dopri8", 74), ("verner8", 2307)]
)
def test_mixing(name, mixing):
    assert tableaux.METHODS[name].mixing == pytest.approx(mixing, abs=0.5)


def test_floats_are_the_nearest_ones():
    a, b, c, b_hat = tableaux.gill4.floats()
    assert a[2] == (0.20710678118654752, 0.2928932188134525) and c == (0.0, 0.5, 0.5, 1.0) and b_hat is None
    assert b[0] == 1 / 6
    assert tableaux.dopri5.floats()[3] == tuple(float(x) for x in tableaux.dopri5.b_hat)  # type: ignore[union-attr]


def test_pruning_drops_what_only_the_companion_needs():
    assert tableaux.dopri5.pruned().stages == 6 and tableaux.verner89.pruned().stages == 14
    third = tableaux.bosh3.pruned()
    assert (third.a, third.b) == (tableaux.ralston3.a, tableaux.ralston3.b) and third.b_hat is None
    assert tableaux.rk4.pruned() == tableaux.rk4


# --- other forms, and arrays made of arrays ---------------------------------------------------------------------------


@given(st.lists(st.tuples(fractions, fractions), min_size=1, max_size=4))
def test_low_storage_is_the_two_register_loop(pairs):
    A = [Fraction(0), *(x for x, _ in pairs[1:])]
    B = [y for _, y in pairs]
    total, slope = Fraction(0), Fraction(0)  # the sum of b: the loop on f = 1
    for x, y in zip(A, B, strict=True):
        slope = x * slope + 1
        total += y * slope
    assume(total != 0)
    B = [y / total for y in B]
    t = Tableau.low_storage(A, B, order=None)
    u, register = Fraction(1, 3), Fraction(0)
    for x, y in zip(A, B, strict=True):
        register = x * register + field(u)
        u = u + y * register
    assert run(t, field, Fraction(1, 3)) == u


@given(st.data())
def test_shu_osher_is_the_convex_loop(data):
    small = st.fractions(0, 1, max_denominator=5)
    alpha, beta = [], []
    for i in range(1, data.draw(st.integers(1, 4)) + 1):
        row = data.draw(st.lists(small, min_size=i - 1, max_size=i - 1))
        alpha.append([*row, 1 - sum(row)])
        beta.append(data.draw(st.lists(small, min_size=i, max_size=i)))
    ones = [Fraction(0)]  # what the loop does to f = 1: the sum of b
    for x, y in zip(alpha, beta, strict=True):
        ones.append(sum(p * q for p, q in zip(x, ones, strict=True)) + sum(y))
    assume(ones[-1] != 0)
    beta = [[y / ones[-1] for y in row] for row in beta]
    us = [Fraction(1, 3)]
    for x, y in zip(alpha, beta, strict=True):
        us.append(sum(p * u + q * field(u) for p, q, u in zip(x, y, us, strict=True)))
    assert run(Tableau.shu_osher(alpha, beta, order=None), field, Fraction(1, 3)) == us[-1]


def test_shu_osher_and_low_storage_check_their_form():
    with pytest.raises(SchemeError, match="row 2 sum to 5/6"):
        Tableau.shu_osher([[1], ["1/2", "1/3"]], [[1], [0, "1/2"]], order=2)
    with pytest.raises(SchemeError, match="row 2 has 1 alphas"):
        Tableau.shu_osher([[1], [1]], [[1], [0, "1/2"]], order=2)
    with pytest.raises(SchemeError, match="A_1 = 0"):
        Tableau.low_storage([1, 0], ["1/2", "1/2"], order=1)


@given(explicit(3), explicit(3), fractions)
def test_nesting_runs_the_outer_method_on_increments_of_the_inner(outer, inner, x):
    assert run(nest(outer, inner), field, x) == run(outer, lambda u: run(inner, field, u) - u, x)


@given(st.lists(st.tuples(explicit(3), st.fractions(Fraction(1, 4), 2, max_denominator=5)), min_size=1, max_size=3))
def test_composition_takes_one_step_after_another(parts):
    total = sum(h for _, h in parts)
    x = Fraction(1, 3)
    for t, h in parts:
        x = run(t, field, x, h / total)
    assert run(compose([t for t, _ in parts], [h for _, h in parts]), field, Fraction(1, 3)) == x


def test_composition_checks_its_steps():
    for steps in ([1], [1, -1]):
        with pytest.raises(SchemeError, match="want one step each"):
            compose([tableaux.rk4, tableaux.euler], steps)


def test_made_tableaux_keep_the_fewest_digits():
    assert nest(tableaux.rk4, tableaux.rk46nl).digits == 12
    assert compose([tableaux.tsit5, tableaux.rk46nl, tableaux.rk4]).digits == 12
    assert compose([tableaux.rk4, tableaux.midpoint]).exact
