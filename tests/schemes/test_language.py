"""The language: what it reads, what it refuses, and that nothing else than SchemeError ever comes out."""

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import schemes
from schemes import SchemeError
from schemes.step_size import step_size
from schemes.testing import check_expression, scheme_expressions

WORDS = (
    *schemes.names(),
    *(
        "(",
        ")",
        ", ",
        " + ",
        "*",
        "-",
        "/",
        "=",
        ".",
        "[",
        "]",
        "{",
        "}",
        "'",
        '"',
        ":",
        ":=",
        "**",
        "%",
        "@",
        "!",
        "#",
    ),
    *("0", "1", "2", "3.5", "1e9", "1e999999", "0x10", "1_0", "1j", "007", "9" * 40, "1/3", "-1", "1or 2"),
    *("true", "None", "lambda: 0", "lambda x: x", "rk4.stages", "__import__('os')", "eval", "n=", "s=5", "*a", "**k"),
    *("if", "else", "for", "in", "yield", "await", "f'{rk4}'", "b''", "\\", "\t", "\f", "\r", "\n", "\0", "é", "𝟙"),
)


@given(scheme_expressions(adaptive=True))
def test_what_is_read_prints_as_what_reads_the_same(text):
    check_expression(text)


@pytest.mark.parametrize(
    ("text", "printed", "stages"),
    [
        ("rk4", "rk4", 4),
        ("  rk4\t", "rk4", 4),
        ("3*rk4 + midpoint", "3*rk4 + midpoint", 14),
        ("2*(rk4 + midpoint)", "2*(rk4 + midpoint)", 12),
        ("2*(2*euler)", "2*(2*euler)", 4),
        ("1*rk4", "1*rk4", 4),
        ("euler + 1*(2*euler)", "euler + 1*(2*euler)", 3),
        ("(euler + rk4) + euler", "euler + rk4 + euler", 6),
        ("nested(outer=midpoint, inner=repeat(euler, n=2))", "nested(midpoint, repeat(euler, 2))", 4),
        ("ees25(x=0.1)", "ees25", 3),
        ("ees25(1/4)", "ees25(1/4)", 3),
        ("ees25(-0.25)", "ees25(-1/4)", 3),
        ("rkc2(5)", "rkc2(5)", 5),
        ("pruned(dopri5)", "pruned(dopri5)", 6),
        ("adaptive(dopri5, rtol=1e-4, adjoint=TRUE)", "adaptive(dopri5, rtol=0.0001, adjoint=true)", 1),
    ],
)
def test_expressions(text, printed, stages):
    scheme = schemes.get(text)
    assert (str(scheme), scheme.stages) == (printed, stages)
    check_expression(text)


NUMBERS = {
    "momentum": lambda x: schemes.Momentum(x),
    "lm_resnet": lambda x: schemes.LmResNet(-x),
    "alf": lambda x: schemes.Alf(x),
    "affine": lambda x: schemes.Affine(bound=x),
    "multilevel": lambda x: schemes.MultiLevel(3, x),
    "reversible": lambda x: schemes.Reversible(schemes.get("rk4"), x),
    "adaptive": lambda x: schemes.Adaptive("dopri5", rtol=x),
    "wrapped": lambda x: schemes.get("repeat(momentum(1/2), 2)").__class__(schemes.Momentum(x), 2),
}


@given(st.sampled_from(sorted(NUMBERS)), st.floats(1e-9, 1 - 1e-9))
@example("reversible", 0.9999999)
@example("momentum", 1 / 3)
def test_a_text_tells_every_number(family, x):
    assume(x != 0.5)
    scheme = NUMBERS[family](x)
    check_expression(str(scheme))
    assert schemes.get(str(scheme)) == scheme
    for near in (x * (1 + 1e-7), x * (1 + 1e-15)):
        if 0 < near < 1 and near not in (x, 0.5):
            assert NUMBERS[family](near) != scheme


@pytest.mark.parametrize("n", range(1, 11))
def test_powers_of_two_are_read_back(n):
    check_expression(f"bdia(1/{2**n})")


METHODS = [
    schemes.RungeKutta(schemes.Tableau.parse(text, order=2, name="m"))
    for text in ("0 |\n 1/2 | 1/2\n | 0 1", "0 |\n 1 | 1\n | 1/2 1/2")
]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: schemes.Repeat(s, 2),
        lambda s: schemes.Substeps(s, 2),
        lambda s: schemes.Mix((2, s)),
        lambda s: schemes.Mix((1, schemes.get("euler")), (2, s)),
        lambda s: schemes.Nested(s, schemes.get("euler")),
        lambda s: schemes.Nested(schemes.get("revnet"), s),
        lambda s: schemes.Reversible(s),
        lambda s: schemes.Repeat(schemes.Nested(schemes.get("rk4"), schemes.Repeat(s, 2)), 2),
    ],
)
def test_wrappers_are_equal_where_their_parts_are(wrap):
    one, other = METHODS
    again = schemes.RungeKutta(one.tableau)
    assert one != other and str(one) == str(other) and again == one
    assert wrap(one) != wrap(other) and str(wrap(one)) == str(wrap(other))
    assert wrap(again) == wrap(one) and hash(wrap(again)) == hash(wrap(one))


def test_schemes_and_tableaux_pass_through():
    rk4 = schemes.get("rk4")
    assert schemes.get(rk4) is rk4
    assert schemes.get(schemes.tableaux.rk4) == rk4


def refused(text, read=schemes.get):
    with pytest.raises(SchemeError) as caught:
        read(text)
    message = str(caught.value)
    assert message.count("\n") <= 1 and len(message) < 400, message
    return message


DIMS = ["revnet(", "additive(3, ", "affine(", "multilevel(3, ", "dense(3, "]
HALVES = {"3/2": "3/2", "1.9": "19/10", "-1/2": "-1/2", "true": "True", "none": "None", "rk4": "rk4"}
TRUTHS = ["momentum(true)", "lm_resnet(true)", "alf(true)", "affine(bound=true)", "multilevel(2, true)", "bdia(false)"]
TRUTHS += ["reversible(rk4, none)", "momentum(rk4)", "multilevel(3, none)"]
BAD = [
    ("rk5", ["position 1", "there is no 'rk5'", "closest are", "rk4", "See all names: schemes.names()"]),
    ("nested(midpiont, rk4)", ["position 8", "'midpiont'", "midpoint"]),
    ("Rk4", ["there is no 'Rk4'", "rk4"]),
    ("qqqqqq", ["there are ab2", " more.\n  See all names: schemes.names() in Python, odenets schemes"]),
    ("nan", ["there is no 'nan'"]),
    ("a" * 490, ["position 1", "there is no"]),
    ("", ["is empty", "write a name such as"]),
    ("   ", ["is empty"]),
    ("rk4.stages", ["position 1", "an attribute is not part"]),
    ("rk4.__class__.__mro__", ["an attribute is not part"]),
    ("nested(rk4.stages, rk4)", ["position 8", "an attribute"]),
    ("lambda: 0", ["a lambda is not part"]),
    ("(lambda: rk4)()", ["a call of anything but a name"]),
    ("rk4[0]", ["an index"]),
    ("rk4 if true else euler", ["a condition"]),
    ("[rk4]", ["List is not part"]),
    ("(rk4, euler)", ["Tuple"]),
    ("'rk4'", ["a str is not part"]),
    ("(a := rk4)", ["NamedExpr"]),
    ("f'{rk4}'", ["JoinedStr"]),
    ("await rk4", ["Await"]),
    ("1or 2", ["BoolOp"]),
    ("__import__('os').system('ls')", ["a call of anything but a name"]),
    ("__import__('os')", ["there is no '__import__'"]),
    ("eval(1)", ["there is no 'eval'"]),
    ("rk4\0", ["cannot be read"]),
    ("rk4\nrk4", ["one line of plain ASCII"]),
    ("rk④", ["plain ASCII"]),
    ("\ud800", ["plain ASCII"]),
    ("rk4 +", ["position", "cannot be read"]),
    ("rk4)", ["position 4", "cannot be read"]),
    ("import os", ["cannot be read"]),
    ("x" * 10_000, ["10000 characters", "at most 500"]),
    ("(" * 240 + "rk4" + ")" * 240, ["cannot be read"]),
    ("-" * 480 + "1", ["nested more than 8 deep"]),
    ("repeat(" * 9 + "euler" + ", 1)" * 9, ["nested more than 8 deep", "position 64"]),
    ("1e999999", ["out of range"]),
    ("ees25(1e-999999999)", ["out of range"]),  # as a float it is 0, and as a fraction it has a billion digits
    ("ees25(0.00e999999999 + 1)", ["+ joins schemes"]),
    ("repeat(rk4, 0e999999999)", ["the count is 0"]),
    ("repeat(rk4, 9999999999999)", ["position 13", "too large"]),
    ("repeat(rk4, 1e29)", ["the count is"]),
    ("repeat(rk4, 5000)", ["the count is 5000", "1 to 4096"]),
    ("repeat(rk4, 4000)", ["16000 residual functions", "at most 4096"]),
    ("repeat(rk4, 0)", ["the count is 0"]),
    ("repeat(rk4, -1)", ["the count is -1"]),
    ("repeat(rk4, true)", ["the count is True"]),
    ("repeat(rk4, 0." + "3" * 480 + ")", ["the count is"]),
    ("repeat(rk4)", ["missing a required argument: 'n'", "repeat(scheme, n)"]),
    ("repeat(rk4, 2, 3)", ["too many positional", "repeat(scheme, n)"]),
    ("repeat(rk4, 2, m=2)", ["'m'"]),
    ("repeat(rk4, " + "m" * 400 + "=2)", ["repeat"]),
    ("repeat(2, rk4)", ["repeat: 2 is no scheme"]),
    ("repeat(*rk4)", ["* and **"]),
    ("repeat(**rk4)", ["* and **"]),
    ("rk4(2)", ["rk4 takes no arguments"]),
    ("nested(rk4)", ["'inner'", "nested(outer, inner)"]),
    ("nested(rk4, none)", ["nested: None is no scheme"]),
    ("nested(adaptive(dopri5), rk4)", ["chooses its own steps"]),
    ("nested(rk4, adaptive(dopri5))", ["cannot act as a residual function"]),
    ("repeat(adaptive(dopri5), 2)", ["chooses its own steps"]),
    ("nested(repeat(euler, 100), repeat(euler, 100))", ["10000 residual functions"]),
    ("4000*rk4", ["more than 4096"]),
    ("pruned(nested(rk4, rk4))", ["no single Runge-Kutta method"]),
    ("2*3", ["n* must be followed by a scheme"]),
    ("2*3*rk4", ["n* must be followed by a scheme"]),
    ("rk4*2", ["whole number n of at least 1"]),
    ("0*rk4", ["whole number n of at least 1"]),
    ("-1*rk4", ["whole number n of at least 1"]),
    ("1.5*rk4", ["whole number n of at least 1"]),
    ("true*rk4", ["whole number n of at least 1"]),
    ("rk4 + 2", ["+ joins schemes only"]),
    ("rk4 + none", ["+ joins schemes only"]),
    ("rk4 - euler", ["BinOp"]),
    ("rk4/2", ["a division needs two numbers"]),
    ("ees25(1/0)", ["the second not zero"]),
    ("-rk4", ["minus stands before numbers only"]),
    ("rk4**2", ["BinOp"]),
    ("1j", ["a complex is not part"]),
    ("4", ["'4' is no scheme"]),
    ("1/" + "3" * 12, ["is no scheme"]),
    ("true", ["'true' is no scheme"]),
    ("rkc1(0)", ["rkc1(0)", "from 1 to 64"]),
    ("rkc2(s=5.0)", ["rkc2"]),
    ("rkl2(9999)", ["from 2 to 64"]),
    ("ees25(1/2)", ["divides by zero"]),
    ("ees25(rk4)", ["not exact"]),
    ("adaptive(rk4)", ["no adaptive method 'rk4'", "dopri5"]),
    ("adaptive(dopri5, rtol=0)", ["rtol is 0.0", "positive"]),
    ("adaptive(dopri5, rtol=none)", ["rtol is None", "positive number"]),
    *[
        (f"{name}dim={dim})", [f"dim is {shown}, want a whole number"])
        for name in DIMS
        for dim, shown in HALVES.items()
    ],
    *[(text, ["want a finite number"]) for text in TRUTHS],
    ("dense(2, join=none)", ["join is None, want true or false"]),
    ("dense(2, join=1)", ["join is 1, want true or false"]),
    ("revcol(3, huge=2)", ["huge is 2, want true or false"]),
    ("rkc1(true)", ["want a whole number of stages"]),
    ("rkc1(3, true)", ["True is not exact"]),
    ("ees25(true)", ["True is not exact"]),
    ("adaptive(repeat(" + "1*rk4 + " * 40 + "rk4, 1))", ["no adaptive method"]),
]


@pytest.mark.parametrize(("text", "parts"), BAD, ids=[repr(t)[:30] for t, _ in BAD])
def test_bad_expressions(text, parts):
    message = refused(text)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("value", [4, None, b"rk4", 1.5, ["rk4"], object()])
def test_what_is_no_text(value):
    assert "is a name or an expression" in refused(value)


def test_families_do_not_remember_other_kinds_of_number():
    # 5 == 5.0: the cache of made tableaux must not let the second pass after the first.
    schemes.get("rkc2(s=5)")
    assert "whole number" in refused("rkc2(s=5.0)")


def attempt(read, text):
    try:
        read(text)
    except SchemeError as error:
        assert str(error).count("\n") <= 1 and len(str(error)) < 400, str(error)


HUGE = "((1e29/1e-29)/(1e-29/1e29))/((1e-29/1e29)/(1e29/1e-29))"


@given(st.text() | st.lists(st.sampled_from(WORDS)).map("".join) | scheme_expressions())
@example(f"adaptive(dopri5, rtol=({HUGE})/(1/({HUGE})))")
@example("adaptive(dopri5, rtol=-1/1e-29)")
def test_nothing_but_scheme_errors(text):
    attempt(schemes.get, text)
    attempt(step_size, text)


@given(scheme_expressions(max_stages=8), st.data())
def test_nothing_but_scheme_errors_near_valid_texts(text, data):
    at = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(at, len(text)))
    attempt(schemes.get, text[:at] + data.draw(st.sampled_from(("", *WORDS))) + text[end:])
