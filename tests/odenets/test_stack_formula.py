"""Stack computes the written-out formula of its scheme: steps, shortcuts, times, context, step sizes, errors."""

import math
from itertools import pairwise

import pytest
import torch
from stacks import F64, Block, data, euler, formula, linears, midpoint, quiet, rk4
from torch import nn

import schemes
from odenets import SchemeError, Stack

# --- the formula -----------------------------------------------------------------------------------------------------


def verner8(f, x, h):
    return formula(schemes.tableaux.verner8, f, x, lambda x: x, h)


def nested(f, x, h):
    def inner(f, x):
        return euler(f[1:], euler(f[:1], x, h), h)

    k1 = (inner(f[:2], x) - x) / h
    y = x + h / 2 * k1
    return x + inner(f[2:], y) - y


def mixed(f, x, h):
    for _ in range(3):
        x, f = rk4(f, x, h), f[4:]
    return midpoint(f, x, h)


HAND = {
    "euler": (1, euler),
    "midpoint": (2, midpoint),
    "rk4": (4, rk4),
    "verner8": (14, verner8),
    "nested(midpoint, repeat(euler, 2))": (4, nested),
    "3*rk4 + midpoint": (14, mixed),
}


@pytest.mark.parametrize(("scheme", "hand"), HAND.items())
@pytest.mark.parametrize("h", [1.0, 0.25])
def test_separate_functions_are_the_written_out_formula(scheme, hand, h):
    stages, step = hand
    fs = linears(2 * stages)
    stack = quiet(fs, scheme, step=h)
    x = data(5, 4).requires_grad_()
    want = step(fs[stages:], step(fs[:stages], x, h), h)
    got = stack(x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    parameters = [x, *stack.parameters()]
    ours = torch.autograd.grad(got.square().sum(), parameters)
    theirs = torch.autograd.grad(want.square().sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("scheme", "hand"), HAND.items())
def test_one_shared_function_is_the_formula_too(scheme, hand):
    stages, step = hand
    (f,) = linears(1)
    stack = Stack(f, scheme, 2 * len(schemes.get(scheme).plan))
    x = data(5, 4)
    torch.testing.assert_close(stack(x), step((f,) * stages, step((f,) * stages, x, 1.0), 1.0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scheme", ["euler", "midpoint", "rk4", "verner8", "nested(midpoint, heun2)"])
def test_the_shortcut_takes_the_place_of_the_identity_on_the_first_step(scheme):
    torch.manual_seed(0)
    tableau = schemes.get(scheme).tableau
    a, s = tableau.floats()[0], tableau.stages
    # Who sees the step's input makes the stride and the width.
    first = [Block(5) if any(row) else Block(3, 5, stride=2) for row in a]
    second = [Block(5) for _ in range(s)]
    shortcut = nn.Conv2d(3, 5, 1, 2)
    stack = quiet([*first, *second], scheme, shortcut=shortcut).double().eval()
    x = data(2, 3, 8, 8)
    want = formula(tableau, first, x, shortcut, 1.0)
    want = formula(tableau, second, want, lambda x: x, 1.0)
    torch.testing.assert_close(stack(x), want, rtol=1e-9, atol=1e-9)
    assert stack(x).shape == (2, 5, 4, 4)


def test_after_is_applied_to_the_stream_after_each_step():
    fs = linears(4)
    stack = Stack(fs, "midpoint", post_step=nn.ReLU())
    x = data(5, 4)
    first = torch.relu(midpoint(fs[:2], x, 1.0))
    second = torch.relu(midpoint(fs[2:], first, 1.0))
    torch.testing.assert_close(stack(x), second)
    for got, want in zip(stack.trajectory(x), (first, second), strict=True):
        torch.testing.assert_close(got, want)


def test_after_is_applied_to_an_adaptive_solve_after_each_step():
    stack = Stack(torch.tanh, "adaptive(dopri5, rtol=1e-6, atol=1e-6)", 2, post_step=nn.ReLU())
    x = data(5, 4)
    once = torch.relu(Stack(torch.tanh, "adaptive(dopri5, rtol=1e-6, atol=1e-6)")(x))
    twice = torch.relu(Stack(torch.tanh, "adaptive(dopri5, rtol=1e-6, atol=1e-6)")(once))
    torch.testing.assert_close(stack(x), twice)
    for got, want in zip(stack.trajectory(x), (once, twice), strict=True):
        torch.testing.assert_close(got, want)


def test_trajectory_is_the_readout_after_each_step():
    fs = linears(12)
    stack, x = Stack(fs, "rk4", step=0.5), data(5, 4).requires_grad_()
    path = stack.trajectory(x)
    assert len(path) == stack.depth == 3
    for n, y in enumerate(path):
        x2 = rk4(fs[4 * n : 4 * n + 4], path[n - 1] if n else x, 0.5)
        torch.testing.assert_close(y, x2)
    assert torch.equal(path[-1], stack(x))
    assert float(torch.autograd.grad(path[0].sum(), x)[0].abs().min()) > 0


def test_from_factory_asks_for_each_slot_once():
    slots = []

    def make(slot):
        slots.append(slot)
        return nn.Linear(slot.in_channels[0], slot.out_channels)

    stack = Stack.from_factory(make, "midpoint", 2, channels=3, out_channels=5, shortcut=nn.Linear(3, 5), step=0.5)
    assert [(s.step, s.index, s.in_channels, s.out_channels, s.raw) for s in slots] == [
        (0, 0, (3,), 5, True),
        (0, 1, (5,), 5, False),
        (1, 0, (5,), 5, True),
        (1, 1, (5,), 5, False),
    ]
    assert stack(torch.randn(2, 3)).shape == (2, 5)
    slots.clear()
    mix = Stack.from_factory(make, "2*euler + midpoint", 3, channels=3)
    assert [(s.step, s.index) for s in slots] == [(0, 0), (1, 0), (2, 0), (2, 1)]
    assert mix.depth == 3


# --- time and context ------------------------------------------------------------------------------------------------


def test_time_runs_over_the_steps_and_starts_where_it_is_told():
    seen = []

    def f(t, x):
        seen.append(float(t))
        return x

    stack = Stack(f, "midpoint", 3, step=0.5)
    stack(torch.ones(1), t=1.0)
    assert seen == pytest.approx([1, 1.25, 1.5, 1.75, 2, 2.25])
    seen.clear()
    Stack([f] * 6, "repeat(euler, 2)", step=0.5).trajectory(torch.ones(1), t=1.0)
    assert seen == pytest.approx([1, 1.5, 2, 2.5, 3, 3.5])
    seen.clear()
    Stack([f] * 6, "repeat(euler, 2)", step="decay(0.5)")(torch.ones(1))
    assert seen == pytest.approx([0, 1, 2, 2.5, 3, 3.25])
    seen.clear()
    Stack([f] * 6, "repeat(euler, 2)", step="decay(0.5)", backprop="checkpoint(2)")(torch.ones(1, requires_grad=True))
    assert seen == pytest.approx([0, 1, 2, 2.5, 3, 3.25])


@pytest.mark.parametrize("mode", ["store", "checkpoint", "checkpoint(2)"])
def test_context_reaches_whoever_takes_it_and_gets_gradients(mode):
    class Mixed(nn.Module):
        def forward(self, x, context, t=0.0):
            return torch.sin(x * context + t)

    stack = Stack([Mixed(), nn.Tanh(), Mixed(), nn.Tanh()], "midpoint", backprop=mode)
    x, context = data(5, 4).requires_grad_(), data(4).requires_grad_()

    def hand(x):
        for n in (0, 1):
            x = x + torch.tanh(x + torch.sin(x * context + n) / 2)
        return x

    grads = [torch.autograd.grad(y.square().sum(), (x, context)) for y in (stack(x, context=context), hand(x))]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


# --- step sizes ------------------------------------------------------------------------------------------------------


def test_learned_steps_are_parameters_and_get_gradients():
    fs = linears(4)
    stack = Stack(fs, "midpoint", step="learned(h0=0.5)")
    hs = [p for name, p in stack.named_parameters() if name in ("steps.0.h", "steps.1.h")]
    assert [h.item() for h in hs] == [0.5, 0.5]
    x = data(5, 4)
    torch.testing.assert_close(stack(x), midpoint(fs[2:], midpoint(fs[:2], x, 0.5), 0.5))
    stack(x).square().sum().backward()
    with torch.no_grad():
        values = [midpoint(fs[2:], midpoint(fs[:2], x, 0.5), 0.5 + d).square().sum() for d in (1e-5, -1e-5)]
    assert float(hs[1].grad) == pytest.approx(float(values[0] - values[1]) / 2e-5, rel=1e-5)
    assert float(hs[0].grad) != 0.0
    with pytest.raises(SchemeError, match="step sizes are learned; a schedule cannot set them too"):
        stack.set_step(0.5)


def test_decay_counts_over_the_whole_network():
    first = Stack([nn.Identity()] * 2, "euler", step="decay(0.5)")
    second = Stack([nn.Identity()] * 2, "euler", step="decay(0.5)", step_offset=2)
    assert [s.h for s in (*first.steps, *second.steps)] == [1, 0.5, 0.25, 0.125]
    one = torch.ones((), dtype=F64)
    assert float(second(first(one))) == pytest.approx(2 * 1.5 * 1.25 * 1.125)
    second.set_step(2.0)  # the ratios stay: step 0 of the network is 2
    assert [s.h for s in second.steps] == [0.5, 0.25]
    third = Stack([nn.Identity()] * 2, "euler", step="decay(0.5, h0=4)")
    third.set_step(2.0)
    assert [s.h for s in third.steps] == [2, 1]


def test_a_schedule_sets_the_steps():
    fs = linears(2)
    stack, x = Stack(fs, "midpoint"), data(5, 4)
    for h in (0.0, 0.1, 1.0):
        stack.set_step(h)
        torch.testing.assert_close(stack(x), midpoint(fs, x, h))
    with pytest.raises(SchemeError, match="want a finite number"):
        stack.set_step(float("nan"))


def test_a_schedule_of_a_nested_scheme_may_start_at_zero():
    stack = Stack(linears(4), "nested(midpoint, repeat(euler, 2))", step=0.0)
    x = data(5, 4)
    torch.testing.assert_close(stack(x), x)


def test_steps_from_errors():
    fs = linears(3 * 7)
    with torch.no_grad():
        for f in fs:
            f[0].weight.mul_(0.2)
    stack, x = Stack(fs, "dopri5", step="error(1e-4, h0=0.3)"), data(5, 4).requires_grad_()
    scheme = schemes.get("dopri5")
    y, h = x, 0.3
    errors = []
    for n in range(3):
        (y,), error = scheme.step_with_error(fs[7 * n : 7 * n + 7], (y,), h)
        errors.append(error)
        rms = error.detach().square().mean().sqrt().item()
        h = h * min(5.0, max(0.2, 0.9 * (1e-4 / rms) ** (1 / 5)))
    found = stack.forward_with_errors(x)
    torch.testing.assert_close(found.output, y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stack(x), found.output)
    for got, want in zip(found.errors, errors, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-7)
    stack(x).sum().backward()
    assert stack.evaluations == 21 and float(x.grad.abs().min()) > 0
    assert torch.equal(stack.trajectory(x)[-1], found.output)
    with pytest.raises(SchemeError, match="want backprop='store'"):
        Stack(fs, "dopri5", step="error(1e-4)", backprop="checkpoint")
    with pytest.raises(SchemeError, match="rk4 has no embedded companion"):
        Stack(linears(4), "rk4", step="error(1e-4)")


def test_error_estimates_are_the_companion_minus_the_method_and_train():
    fs = linears(2 * 4)
    stack, x = quiet(fs, "bosh3", step=0.5), data(5, 4).requires_grad_()
    output, errors = stack.forward_with_errors(x)
    torch.testing.assert_close(output, stack(x))
    t = schemes.tableaux.bosh3
    a, b, _, b_hat = t.floats()
    y = x
    for n, error in enumerate(errors):
        ks = []
        for f, row in zip(fs[4 * n : 4 * n + 4], a, strict=True):
            ks.append(f(y + 0.5 * sum(w * k for w, k in zip(row, ks, strict=True))))
        want = 0.5 * sum((v - u) * k for u, v, k in zip(b, b_hat, ks, strict=True))
        torch.testing.assert_close(error, want)
        y = y + 0.5 * sum(w * k for w, k in zip(b, ks, strict=True))
    sum(e.square().sum() for e in errors).backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in stack.parameters())
    with pytest.raises(SchemeError, match="rk4 has no embedded companion"):
        Stack(linears(4), "rk4").forward_with_errors(x)


def test_a_neural_ode_converges_with_its_depth():
    errors = []
    for depth in (4, 8, 16):
        stack = Stack(lambda t, x: x * torch.cos(torch.as_tensor(t, dtype=F64)), "rk4", depth, step=2 / depth)
        errors.append(abs(float(stack(torch.ones((), dtype=F64))) - math.exp(math.sin(2.0))))
    assert [math.log2(a / b) for a, b in pairwise(errors)] == pytest.approx([4, 4], abs=0.3)
