"""Stacks under adaptive schemes: values at times, and what the solves tell of themselves."""

import math

import pytest
import torch
from torch import nn

from odenets import SchemeError, Stack
from schemes.scheme import Scheme

F64 = torch.float64


def spinning(t, x):
    """A turn whose speed is 1 + cos t."""
    return torch.stack((x[:, 1], -x[:, 0]), 1) * (1 + torch.cos(torch.as_tensor(t)))


def spun(x, t):
    a = torch.tensor(t + math.sin(t), dtype=F64)
    return torch.stack((a.cos() * x[:, 0] + a.sin() * x[:, 1], a.cos() * x[:, 1] - a.sin() * x[:, 0]), 1)


X = torch.tensor([[1.0, 0.5], [0.2, -1.0]], dtype=F64)
AT = [0.0, 0.3, 1.0, 1.7, 2.0]
SCHEMES = ["adaptive(tsit5, rtol=1e-8, atol=1e-8)", "adaptive(dopri8, rtol=1e-8, atol=1e-8)"]


@pytest.mark.parametrize("mode", ["store", "checkpoint"])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_at_times(scheme, separate, mode):
    """The exact solution there, in value and gradient, also where every unit of depth has a solve of its own."""
    x = X.clone().requires_grad_()
    stack = Stack([spinning] * 2 if separate else spinning, scheme, depth=2, backprop=mode)
    values = stack.trajectory(x, at=AT)
    exact = [spun(x, t) for t in AT]
    assert values[0] is x and len(stack.solves) == 1 + separate
    for got, want in zip(values, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    losses = [sum((n * y**3).sum() for n, y in enumerate(ys, 1)) for ys in (values, exact)]
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in losses), rtol=1e-5, atol=1e-5)


def test_values_within_change_no_step_where_the_solution_is_continuous():
    stack = Stack(spinning, SCHEMES[0], depth=2)
    y = stack(X)
    before = stack.solves
    values = stack.trajectory(X, at=[0.1 * n for n in range(1, 21)])
    assert torch.equal(values[-1], y) and stack.solves == before


@pytest.mark.parametrize("schedule", [None, 0.4])
@pytest.mark.parametrize("offset", [0, 2])
@pytest.mark.parametrize("step", [0.5, -0.5, 0.0, "decay(0.5)", "decay(1.5, h0=0.2)", "learned(h0=0.3)", "1.2/depth"])
def test_one_solve_covers_the_steps_that_the_rule_gives(step, offset, schedule):
    """A shared function is solved once, over the length that separate solves of the same steps have together."""
    one = Stack(spinning, SCHEMES[0], depth=3, step=step, step_offset=offset)
    each = Stack([spinning] * 3, SCHEMES[0], step=step, step_offset=offset)
    if schedule is not None:
        if one.rule.learned:
            return
        one.set_step(schedule)
        each.set_step(schedule)
    assert len(one.steps) == 1 and len(each.steps) == 3
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(one(X), each(X), **close)
    for got, want in zip(one.trajectory(X), each.trajectory(X), strict=True):
        torch.testing.assert_close(got, want, **close)
    ends = (
        torch.tensor([float(torch.as_tensor(s.h, dtype=F64).detach()) for s in each.steps], dtype=F64)
        .cumsum(0)
        .tolist()
    )
    if ends[0]:
        for got, want in zip(one.trajectory(X, at=ends), each.trajectory(X, at=ends), strict=True):
            torch.testing.assert_close(got, want, **close)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("adjoint", ["false", "true"])
@pytest.mark.parametrize("pair", ["tsit5", "dopri8"])
def test_times_within_steps_stay_where_sizes_are_learned(pair, adjoint, sign):
    """The gradient by each size, of functions that differ and read the time, against the exact solution."""
    rates = (1.0, 2.0, 0.5)
    functions = [lambda t, x, n=n: n * spinning(t, x) for n in rates]
    stack = Stack(functions, f"adaptive({pair}, rtol=1e-9, atol=1e-9, adjoint={adjoint})", step="learned").double()
    h = [step.h for step in stack.steps]
    for x in h:
        x.data.fill_(0.5 * sign)
    at = [0.2 * sign, 0.8 * sign, 0.9 * sign, 1.3 * sign]  # in the first step, twice in the second, in the third
    angle = lambda t: t + torch.sin(torch.as_tensor(t))  # noqa: E731
    ends = [0.0, h[0], h[0] + h[1]]
    for step, t, got in zip((0, 1, 1, 2), at, stack.trajectory(X, at=at), strict=True):
        parts = [rates[n] * (angle(ends[n + 1]) - angle(ends[n])) for n in range(step)]
        a = sum(parts) + rates[step] * (angle(t) - angle(ends[step]))
        exact = torch.stack((a.cos() * X[:, 0] + a.sin() * X[:, 1], a.cos() * X[:, 1] - a.sin() * X[:, 0]), 1)
        torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-6)
        # With zero added, which has a graph where a value in the first step has none.
        found, want = (torch.autograd.grad(y.sum() + 0 * sum(h), h, retain_graph=True) for y in (got, exact))
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", [SCHEMES[0], "rk4"])
@pytest.mark.parametrize("sizes", [(0.0, -0.5), (-0.5, 0.0), (0.0, 0.0, 0.5), (0.3, 0.0, 0.2), (0.2, 0.5)])
def test_steps_of_no_length_pass_no_time(scheme, sizes):
    functions = [spinning] * (len(sizes) * (4 if scheme == "rk4" else 1))
    stack = Stack(functions, scheme, step="learned(h0=0.5)").double()
    for step, h in zip(stack.steps, sizes, strict=True):
        step.h.data.fill_(h)
    end = sum(sizes)
    at = [0.3 * end, end] if scheme != "rk4" else [0.0, end]
    for got, t in zip(stack.trajectory(X, at=at), at, strict=True):
        torch.testing.assert_close(got, spun(X, t), rtol=0, atol=0.02)


@pytest.mark.parametrize("scheme", [SCHEMES[0], "rk4"])
@pytest.mark.parametrize("sizes", [(-0.5, 1.0), (1.0, -0.5), (0.0, 1.0, -1.0)])
def test_steps_forwards_and_backwards_have_no_times(scheme, sizes):
    calls = []
    functions = [lambda x: calls.append(1) or -x] * (len(sizes) * (4 if scheme == "rk4" else 1))
    stack = Stack(functions, scheme, step="learned(h0=0.5)").double()
    for step, h in zip(stack.steps, sizes, strict=True):
        step.h.data.fill_(h)
    with pytest.raises(SchemeError, match="wants steps in one direction"):
        stack.trajectory(X, at=[sum(sizes)])
    assert not calls and len(stack.trajectory(X)) == len(sizes)


def test_steps_without_a_finite_length_together_are_refused():
    with pytest.raises(SchemeError, match="no finite length together"):
        Stack(spinning, SCHEMES[0], depth=3, step=1e308)


def test_times_that_run_backwards():
    stack = Stack(spinning, SCHEMES[0], depth=2, step=-0.5)
    for got, t in zip(stack.trajectory(X, at=[-0.2, -1.0]), (-0.2, -1.0), strict=True):
        torch.testing.assert_close(got, spun(X, t), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("step", [0.1, "learned(h0=0.1)", "0.7/depth"])
@pytest.mark.parametrize("scheme", ["rk4", SCHEMES[0]])
def test_times_are_those_of_the_steps_whatever_their_digits(scheme, step):
    stack = Stack([spinning] * 7, scheme, step=step) if "ad" in scheme else Stack(spinning, scheme, depth=7, step=step)
    path = stack.trajectory(X)
    for n in range(1, 8):
        torch.testing.assert_close(stack.trajectory(X, at=[n / 10])[0], path[n - 1], rtol=1e-9, atol=1e-9)
        for dtype in (torch.float32, torch.float16):
            at = torch.tensor([n / 10], dtype=dtype)
            torch.testing.assert_close(stack.trajectory(X, at=at)[0], path[n - 1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scheme", ["rk4", "leapfrog", "ab2"])
def test_fixed_steps_have_values_at_their_ends(scheme):
    stack = Stack(nn.Linear(2, 2), scheme, depth=4, step=0.25).double()
    path = stack.trajectory(X)
    start, middle, end = stack.trajectory(X, at=[0.0, 0.5, 1.0])
    assert torch.equal(start, X) and torch.equal(middle, path[1]) and torch.equal(end, path[-1])
    with pytest.raises(SchemeError, match=r"0\.3 is none; take 0\.25 or 0\.5, or an adaptive scheme"):
        stack.trajectory(X, at=[0.3])
    assert stack.solves == ()


@pytest.mark.parametrize(
    "at, message", [([0.5, 0.5], "in order, each once"), ([2.5], "no value at 2.5; the steps go from 0 to 2"),
                    ([math.nan], "no value at nan"), ([-0.1], "no value at -0.1")]
)  # fmt: skip
def test_times_that_do_not_fit_are_refused_before_anything_is_computed(at, message):
    calls = []
    stack = Stack(lambda x: calls.append(1) or x, "adaptive(dopri5)", depth=2)
    with pytest.raises(SchemeError, match=message):
        stack.trajectory(X, at=at)
    assert not calls
    with pytest.raises(SchemeError, match="sets the times of its steps on the way"):
        Stack([nn.Linear(2, 2)] * 14, "dopri5", step="error(0.1)").trajectory(X.float(), at=[1.0])


def test_solves_tell_their_counts_and_why_they_ended():
    calls = []
    stack = Stack(lambda x: calls.append(1) or x * x, "adaptive(dopri5, max_steps=40)", depth=2)
    stack(-torch.ones(3, dtype=F64))
    calls.clear()
    stack(-torch.ones(3, dtype=F64))
    (solve,) = stack.solves
    assert solve.status == "finished" and solve.evaluations == stack.evaluations == len(calls)
    assert solve.evaluations == 2 + 6 * (solve.accepted + solve.rejected) and solve.accepted > 1
    with pytest.raises(SchemeError, match="40 steps were used up"):
        stack(torch.ones(3, dtype=F64))  # 1 / (1 - t) breaks off at t = 1
    (solve,) = stack.solves
    assert solve.status == "max_steps" and solve.accepted + solve.rejected == 40


@pytest.mark.parametrize("separate", [False, True])
def test_every_call_tells_its_own_counts(separate):
    calls = []
    f = lambda x: calls.append(1) or -x * x  # noqa: E731
    stack = Stack([f] * 2 if separate else f, "adaptive(dopri5)", depth=2)
    found = []
    for scale in (1.0, 1.0, 30.0):
        calls.clear()
        stack(scale * torch.ones(3, dtype=F64))
        assert stack.evaluations == sum(s.evaluations for s in stack.solves) == len(calls)
        found.append(stack.solves)
    assert found[0] == found[1] != found[2]


class Continuous(Scheme):
    """A user's scheme that calls its function at times of its own."""

    stages, nodes, evaluations = 1, None, None

    def _step(self, fs, state, h=1.0, gs=()):
        (x,) = state
        for n in range(400):
            x = x + h / 400 * fs[0](x, (n + 0.5) * h / 400)
        return (x,)

    def __str__(self):
        return "continuous"


@pytest.mark.parametrize("step", [0.5, "learned(h0=0.3)", "decay(0.5)", "1.2/depth", 0.0])
def test_another_scheme_over_the_whole_depth_has_values_at_the_ends_of_steps(step):
    """Those that it shows after each step, and none in between."""
    one, each = (Stack(f, Continuous(), depth=3, step=step) for f in (spinning, [spinning] * 3))
    assert len(one.steps) == 1 and len(each.steps) == 3
    ends = torch.tensor([float(torch.as_tensor(s.h, dtype=F64).detach()) for s in each.steps], dtype=F64).cumsum(0)
    if not ends[-1]:
        return
    at = [0.0, *ends.tolist()]
    want = [X, *one.trajectory(X)]
    for got, a, b in zip(one.trajectory(X, at=at), want, each.trajectory(X, at=at), strict=True):
        assert torch.equal(got, a)
        torch.testing.assert_close(got, b, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one.trajectory(X, at=at[-1:])[0], one(X), rtol=1e-2, atol=1e-2)
    with pytest.raises(SchemeError, match="values at the ends of its steps"):
        one.trajectory(X, at=[float(ends[0]) / 2])
