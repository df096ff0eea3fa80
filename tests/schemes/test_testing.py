"""The laws must be able to fail: each one refuses a scheme that breaks it."""

import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import find, given, settings
from torch import nn

from odenets import Stack
from schemes import Nested, RungeKutta, Slot, get, testing
from schemes.compose import Composition
from schemes.coupling import Coupling, Update, invert_update
from schemes.language import Reader

RK4 = get("rk4").tableau


class Rev(Coupling):
    """x_0 <- x_0 + h F_0(x_1), x_1 <- x_1 + h F_1(x_0)."""

    stages, streams, nodes, evaluations = 2, 2, (0.0, 0.5), 2

    def init(self, fs, x):
        return x, 2 * x

    def shape_of(self, i, streams):
        return streams[i]

    def slots(self, n, streams, out_channels=None):
        return Slot(n, 0, streams[1:], streams[0]), Slot(n, 1, streams[:1], streams[1])

    def updates(self, fs, h, streams):
        return [Update(0, lambda s: (1.0, h * fs[0](s[1]))), Update(1, lambda s: (1.0, h * fs[1](s[0])))]

    def __str__(self):
        return "rev"


class Forgetful(Rev):
    """Its inverse goes through the updates in the wrong order."""

    def _inverse(self, fs, state, h=1.0, gs=()):
        for update in self.updates(fs, h, 2):
            state = invert_update(update, state)
        return state


class Timeless(Rev):
    """Its inverse evaluates the residual functions at another time."""

    def inverse(self, fs, state, *, gs=(), t=None, h=1.0, context=None):
        return super().inverse(fs, state, gs=gs, t=None if t is None else t + h, h=h)


class Swapped(Rev):
    def slots(self, n, streams, out_channels=None):
        return tuple(replace(s, in_channels=(7,)) for s in super().slots(n, streams))


class Still(Rev):
    def _step(self, fs, state, h=1.0, gs=()):
        return state

    _inverse = _step


def test_round_trip():
    testing.check_round_trip(Rev())
    testing.check_slots(Rev())


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (Forgetful(), "inverse.step.x.. is not x, stream 0"),
        (Timeless(), "inverse.step.x.. is not x"),
        (Still(), "steps change nothing"),
        (get("rk4"), "not invertible"),
    ],
)
def test_round_trip_refuses(scheme, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_round_trip(scheme)


def with_row(a, c):
    return RungeKutta(replace(RK4, a=(*RK4.a[:2], a, *RK4.a[3:]), c=(*RK4.c[:2], c, *RK4.c[3:])))


def test_order_refuses():
    wrong = with_row((Fraction(1, 4), Fraction(1, 4)), Fraction(1, 2))  # rk4 with one row of another method
    with pytest.raises(AssertionError, match=r"rk4: the error falls with order [23]"):
        testing.check_order(wrong)
    with pytest.raises(AssertionError, match="want 5"):
        testing.check_order(get("rk4"), 5)
    with pytest.raises(AssertionError, match="want 3"):
        testing.check_order(get("rk4"), 3)
    undeclared = RungeKutta(replace(RK4, order=None))
    with pytest.raises(AssertionError, match="declares no order"):
        testing.check_order(undeclared)
    testing.check_order(undeclared, 4)


class Altered(RungeKutta):
    """Interprets its tableau wrongly in a way chosen by ``how``."""

    def __init__(self, how):
        super().__init__(RK4)
        self.how = how
        if how == "times":
            self.nodes = (0.0, 0.5, 0.5, 0.5)

    def _step(self, fs, state, h=1.0, gs=()):
        if self.how == "twice":
            fs[0](state[0])
        if self.how == "order":
            fs = [fs[0], fs[2], fs[1], fs[3]]
        if self.how == "size":
            h = h * (1 + 1e-8)
        if self.how == "after" and gs:  # every residual function sees what comes after the shortcut
            return super()._step(fs, (gs[0](state[0]),), h)
        if self.how == "before" and gs:  # the sum lacks the shortcut for one stage
            return super()._step(fs, state, h, (lambda x: gs[0](x) * (1 + 1e-6),))
        return super()._step(fs, state, h, gs)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("order", "a step is not the formula"),
        ("size", "a step is not the formula"),
        ("before", "with a shortcut: a step is not the formula"),
        ("twice", "function 0 is called 2 times"),
        ("times", "function 3 is evaluated at time 0.85, its node says 1|not the formula"),
    ],
)
def test_formula_refuses(how, message):
    with pytest.raises(AssertionError, match=message):
        testing.check_formula(Altered(how))
    testing.check_formula(Altered(""))


def test_slots_refuse():
    with pytest.raises(AssertionError, match=r"rev, step 0, residual function 0: given \(4,\), its slot says \(7,\)"):
        testing.check_slots(Swapped())
    with pytest.raises(AssertionError, match=r"given \(6,\), its slot says \(4,\)"):
        testing.check_slots(Altered("after"))


class Misprinted(Composition):
    def __init__(self, scheme):
        self._set((scheme, scheme))

    def __str__(self):
        return "midpoint"


def test_expression_refuses(monkeypatch):
    original = Reader.read
    monkeypatch.setattr(
        Reader, "read", lambda self, text: Misprinted(original(self, text)) if "+" in text else original(self, text)
    )
    testing.check_expression("rk4")
    with pytest.raises(AssertionError, match=r"'euler . rk4' prints as 'midpoint', which is read as another scheme"):
        testing.check_expression("euler + rk4")


class Noisy(nn.Module):
    """Has everything that a careless recomputation gets wrong: dropout and running statistics."""

    def __init__(self, unused=False):
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Dropout(0.5), nn.Tanh())
        if unused:
            self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.body(x)


def make(mode, **options):
    torch.manual_seed(1)
    return Stack([Noisy(**options) for _ in range(4)], "midpoint", backprop=mode)


def test_stack_law():
    testing.check_stack(make, torch.randn(8, 3))
    with pytest.raises(AssertionError, match=r"parameter steps.0.fs.0.unused gets no gradient"):
        testing.check_stack(lambda mode: make(mode, unused=True), torch.randn(8, 3))


def test_stack_law_sees_statistics_that_move_twice(monkeypatch):
    monkeypatch.setattr("odenets.backprop.members.Members.statistics", lambda self: [])
    with pytest.raises(AssertionError, match=r"checkpoint: steps.0.fs.0.body.0.(running|num)\w+ differs from store"):
        testing.check_stack(make, torch.randn(8, 3))


def test_stack_law_sees_other_dropout(monkeypatch):
    monkeypatch.setattr("odenets.backprop.surroundings.Surroundings.set_generators", lambda self: None)
    with pytest.raises(AssertionError, match="differs from store"):
        testing.check_stack(make, torch.randn(8, 3))


@given(testing.tableaux(min_stages=2, max_stages=3, companion=True))
def test_tableaux_are_as_asked(t):
    assert 2 <= t.stages <= 3 and sum(t.b) == sum(t.b_hat) == 1
    assert all(c == sum(row) for c, row in zip(t.c, t.a, strict=True))


@given(testing.scheme_expressions(max_stages=10, max_depth=5))
def test_expressions_are_as_asked(text):
    assert len(text) <= 500 and 1 <= get(text).stages <= 10


@pytest.mark.cases(4)
@pytest.mark.parametrize(
    "word", ["nested(", "repeat(", "substeps(", "pruned(", "rkc1(", "rkl2(", " + ", "*", "verner8"]
)
def test_expressions_say_everything(word):
    find(testing.scheme_expressions(), lambda text: word in text, settings=settings(max_examples=3000, database=None))


def test_adaptive_ones_are_drawn_when_asked_for():
    found = find(testing.scheme_expressions(adaptive=True), lambda text: text.startswith("adaptive"))
    assert get(found).nodes is None


@pytest.mark.parametrize("bad", [{"min_stages": 0}, {"min_stages": 3, "max_stages": 2}])
def test_arguments_of_tableaux(bad):
    with pytest.raises(ValueError, match="want 1 <= min <= max"):
        find(testing.tableaux(**bad), lambda _: True)


def test_arguments_of_expressions():
    with pytest.raises(ValueError, match="want >= 1, 0 to 5"):
        find(testing.scheme_expressions(max_depth=9), lambda _: True)


@pytest.mark.long
@pytest.mark.parametrize("first", ["hypothesis", "schemes.testing"])
def test_the_entry_point_works_whichever_is_imported_first(first, tmp_path):
    """Hypothesis calls ``register`` in the middle of its own import, and we may be what imports it."""
    info = tmp_path / "plugin-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[hypothesis]\n_ = schemes.testing:register\n")
    code = f"""
import {first}, schemes
from hypothesis import Phase, given, settings, strategies as st
@settings(max_examples=1, phases=[Phase.generate], database=None, deadline=None)
@given(st.from_type(schemes.Scheme), st.from_type(schemes.Tableau))
def law(scheme, tableau):
    assert isinstance(scheme, schemes.Scheme) and isinstance(tableau, schemes.Tableau)
law()
"""
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    path = os.pathsep.join((str(tmp_path), root))
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr


def test_nested_shows_up_in_drawn_schemes():
    assert isinstance(find(testing.schemes(), lambda s: isinstance(s, Nested)), Nested)


class Mixed(nn.Module):
    """The same for any number of arguments of any width."""

    def __init__(self, slot):
        super().__init__()
        self.inner, self.norm = nn.Linear(sum(slot.in_channels), 5), nn.BatchNorm1d(5)
        self.outer, self.dropout = nn.Linear(5, slot.out_channels), nn.Dropout(0.3)

    def forward(self, *xs):
        return 0.2 * self.outer(self.dropout(torch.tanh(self.norm(self.inner(torch.cat(xs, 1))))))


def coupled(scheme, mode):
    torch.manual_seed(1)
    depth = 3 * len(get(scheme).plan)  # a mix comes in whole
    return Stack.from_factory(Mixed, scheme, depth, channels=6, backprop=mode).double()


@settings(max_examples=15)
@given(scheme=testing.couplings())
def test_stack_law_of_reverse_mode(scheme):
    x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    testing.check_stack(lambda mode: coupled(scheme, mode), x, mode="reverse", tolerance=1e-9)


def test_stack_law_sees_other_dropout_in_reverse_mode(monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr("odenets.backprop.tape.replayed", lambda generators: nullcontext())
    with pytest.raises(AssertionError, match=r"reverse: .* differs from store"):
        testing.check_stack(
            lambda mode: coupled("revnet", mode), torch.randn(8, 6).double(), mode="reverse", tolerance=1e-9
        )
