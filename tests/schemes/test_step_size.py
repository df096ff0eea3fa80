"""Rules of step sizes: what they say, and what they refuse."""

from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from schemes import SchemeError
from schemes.step_size import Decay, Fixed, FromError, Learned, PerDepth, step_size


@pytest.mark.parametrize(
    ("rule", "printed", "sizes"),
    [
        (1.0, "1", [1, 1, 1]),
        (2, "2", [2, 2, 2]),
        ("0.5", "0.5", [0.5, 0.5, 0.5]),
        ("-1/4", "-0.25", [-0.25, -0.25, -0.25]),
        ("decay(0.5)", "decay(0.5)", [1, 0.5, 0.25]),
        ("decay(1/2, h0=2)", "decay(0.5, h0=2)", [2, 1, 0.5]),
        ("learned", "learned", [1, 1, 1]),
        ("learned(h0=0.1)", "learned(h0=0.1)", [0.1, 0.1, 0.1]),
        ("error(1e-3)", "error(0.001)", [1, 1, 1]),
        ("error(1e-3, h0=0.1)", "error(0.001, h0=0.1)", [0.1, 0.1, 0.1]),
    ],
)
def test_rules(rule, printed, sizes):
    found = step_size(rule)
    assert str(found) == printed
    assert [found(n) for n in range(3)] == pytest.approx(sizes)
    assert str(step_size(printed)) == printed and step_size(found) is found
    assert (found.learned, found.from_error) == (isinstance(found, Learned), isinstance(found, FromError))


RULES = {
    "fixed": lambda x: Fixed(x),
    "decay": lambda x: Decay(x, 1 + x),
    "learned": lambda x: Learned(x),
    "error": lambda x: FromError(1e-3, x, 0.5, largest=3 + x),
    "bounds": lambda x: FromError(x, smallest=x / (1 + x), safety=1 / (1 + x)),
    "length": lambda x: PerDepth(x),
}


@given(st.sampled_from(sorted(RULES)), st.floats(1e-9, 1e9))
@example("fixed", 1.0000001)
def test_a_text_tells_every_number(kind, x):
    rule = RULES[kind](x)
    again = step_size(str(rule))
    assert type(again) is type(rule) and vars(again) == vars(rule) and str(again) == str(rule)


@given(st.floats(0.1, 2.0), st.floats(0.1, 2.0), st.integers(0, 30))
def test_decay_falls_by_its_rate(rate, h0, n):
    rule = Decay(rate, h0)
    assert rule(n + 1) == pytest.approx(rule(n) * rate)
    assert rule(0) == h0


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("decay(0)", "decay: the rate is 0, want a positive number"),
        ("decay(-1)", "decay: the rate is -1"),
        ("decay", "missing a required argument: 'rate'"),
        ("decay(none)", "decay: the rate is None, want a finite number"),
        ("decay(decay(1))", "decay: the rate is decay.1."),
        ("decay(true)", "decay: the rate is True"),
        ("learned(h0=0)", "learned: h0 is 0"),
        ("error(0)", "error: tol is 0"),
        ("error(1, safety=0)", "error: safety is 0"),
        ("lerned", "there is no 'lerned'; the closest are learned"),
        ("2*learned", "sums and products are not part"),
        ("learned + learned", "joins|sums and products"),
        ("none", "the step size is None, want a finite number"),
        ("true", "the step size is True, want a finite number"),
        ("", "the step size is empty"),
        (True, "the step size is True, want a number, 'learned'"),
        (None, "the step size is None, want a number"),
        (float("nan"), "the step size is nan, want a finite number"),
        (float("inf"), "the step size is inf"),
        ([1.0], "the step size is \\[1.0\\], want a number"),
    ],
)
def test_bad_rules(rule, message):
    with pytest.raises(SchemeError, match=message):
        step_size(rule)


@pytest.mark.parametrize(("rule", "n"), [("decay(2)", 2000), ("decay(1e20)", 16), (Decay(1.5, 1e308), 9)])
def test_a_decay_that_grows_too_large_is_refused(rule, n):
    with pytest.raises(SchemeError, match=rf"is too large for a number at step {n}.\n  Take a rate nearer to 1"):
        step_size(rule)(n)


def test_exact_numbers_are_numbers():
    assert Fixed(Fraction(1, 4))(3) == 0.25
    with pytest.raises(SchemeError, match="want a finite number"):
        Fixed(Fraction(10**400))


@pytest.mark.parametrize(("error", "factor"), [(1e-3, 0.9), (1e-3 * 2.0**5, 0.45), (0.0, 5.0), (1e9, 0.2)])
@pytest.mark.parametrize("h", [0.5, torch.tensor(0.5)])
def test_the_step_that_follows_an_error(error, factor, h):
    found = FromError(1e-3).following(h, torch.full((3, 2), error, requires_grad=True), 4)
    assert not found.requires_grad
    assert float(found) == pytest.approx(0.5 * factor, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("turn", [1.0, 1j, -1j, -1.0, 0.6 + 0.8j])
def test_a_complex_error_counts_by_its_size(turn, dtype):
    error = torch.tensor([3e-3, 1e-3, 0.0])
    want = FromError(1e-3).following(1.0, error, 2)
    torch.testing.assert_close(FromError(1e-3).following(1.0, (turn * error).to(dtype), 2), want)


@pytest.mark.parametrize(
    "bounds", [{"safety": 2}, {"safety": 1.01}, {"smallest": 5, "largest": 0.5}, {"smallest": 1}, {"largest": 0.9}]
)
def test_bounds_that_make_no_sense_are_refused(bounds):
    written = ", ".join(f"{k}={v}" for k, v in bounds.items())
    for make in (lambda: FromError(1e-3, **bounds), lambda: step_size(f"error(1e-3, {written})")):
        with pytest.raises(SchemeError, match="want smallest < 1 <= largest and safety <= 1"):
            make()


def test_bounds_of_the_change_can_be_set():
    rule = FromError(1e-3, smallest=0.5, largest=2)
    assert float(rule.following(1.0, torch.zeros(2), 4)) == 2
    assert float(rule.following(1.0, torch.full((2,), 1e9), 4)) == 0.5
