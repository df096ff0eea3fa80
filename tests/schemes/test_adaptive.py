"""Continuous depth: exact solutions, the adjoint against plain gradients, counts, limits."""

import builtins
import math

import pytest
import torch
from torch import nn

from odenets import Stack
from schemes import SchemeError, get, solve

F64 = torch.float64


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=F64)
        self.calls = 0

    def forward(self, t, x, context):
        self.calls += 1
        return torch.tanh(self.linear(x)) * torch.cos(t) + 0.1 * context


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "heun2"])
@pytest.mark.parametrize("adjoint", ["true", "false"])
def test_exact_solution(method, adjoint):
    scheme = get(f"adaptive({method}, rtol=1e-7, atol=1e-7, adjoint={adjoint})")
    y = solve(scheme, lambda t, y: y * y * torch.cos(torch.as_tensor(t)), torch.tensor([0.5], dtype=F64), steps=1)
    assert float(y) == pytest.approx(1 / (2 - math.sin(1)), rel=2e-5)  # the end is interpolated


@pytest.mark.parametrize("depth", [1, 3])
def test_a_stack_with_one_function_solves_the_whole_depth(depth):
    stack = Stack(lambda t, x: torch.cos(t) * x, "adaptive(dopri5, rtol=1e-8, atol=1e-8)", depth)
    assert (stack.depth, len(stack.steps)) == (depth, 1)
    x = torch.ones(2, dtype=F64)
    torch.testing.assert_close(stack(x), x * math.exp(math.sin(depth)), rtol=1e-6, atol=0)
    torch.testing.assert_close(stack(x, t=1.0), x * math.exp(math.sin(1 + depth) - math.sin(1)), rtol=1e-6, atol=0)
    path = stack.trajectory(x)
    for n, y in enumerate(path, 1):
        torch.testing.assert_close(y, x * math.exp(math.sin(n)), rtol=1e-6, atol=0)
    assert len(path) == depth


def test_a_stack_with_many_functions_solves_unit_intervals():
    fs = [lambda t, x: t * x, lambda x: 2 * x, lambda x, t: -t * x]
    stack = Stack(fs, "adaptive(dopri5, rtol=1e-8, atol=1e-8)")
    want = math.exp(0.5 + 2 - (9 - 4) / 2)  # over [0, 1], [1, 2] and [2, 3]
    assert float(stack(torch.ones((), dtype=F64))) == pytest.approx(want, rel=1e-6)


def gradients(adjoint):
    torch.manual_seed(0)
    field = Field()
    stack = Stack(field, f"adaptive(dopri5, rtol=1e-8, atol=1e-8, adjoint={adjoint})", 2)
    x = torch.randn(4, 3, dtype=F64, requires_grad=True)
    context = torch.randn(3, dtype=F64, requires_grad=True)
    stack(x, context=context).square().sum().backward()
    return [x.grad, context.grad, *(p.grad for p in stack.parameters())]


def test_the_adjoint_gives_the_gradients_of_backpropagation():
    for got, want in zip(gradients("true"), gradients("false"), strict=True):
        assert float(want.abs().max()) > 1e-3
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_learned_step_gets_a_gradient():
    for adjoint in ("true", "false"):
        stack = Stack(lambda x: -x, f"adaptive(dopri5, rtol=1e-8, atol=1e-8, adjoint={adjoint})", step="learned")
        stack(torch.ones(())).backward()
        assert float(stack.steps[0].h.grad) == pytest.approx(-math.exp(-1), rel=1e-3)


@pytest.mark.parametrize("adjoint", ["true", "false"])
def test_evaluations_are_counted(adjoint):
    field = Field()
    stack = Stack(field, f"adaptive(dopri5, rtol=1e-6, adjoint={adjoint})", 2)
    x = torch.randn(4, 3, dtype=F64)
    for _ in range(2):
        field.calls = 0
        y = stack(x, context=torch.ones(3, dtype=F64))
        forward = field.calls
        assert stack.evaluations == forward > 6
        y.sum().backward()
        assert stack.evaluations == forward
    assert "evaluations=adaptive" in repr(stack)


def test_tighter_tolerances_need_more_evaluations():
    counts = []
    for rtol in ("1e-3", "1e-6", "1e-9"):
        stack = Stack(lambda x: torch.sin(3 * x), f"adaptive(dopri5, rtol={rtol}, atol={rtol})", 4)
        stack(torch.ones(3, dtype=F64))
        counts.append(stack.evaluations)
    assert counts[0] < counts[1] < counts[2]


def test_max_steps():
    stack = Stack(lambda x: -1e6 * x, "adaptive(dopri5, max_steps=20)")
    with pytest.raises(SchemeError, match=r"adaptive\(dopri5, max_steps=20\): .*; raise rtol and atol, or max_steps"):
        stack(torch.ones(2))


def test_a_field_that_blows_up():
    with pytest.raises(SchemeError, match="raise rtol and atol, or max_steps"):
        Stack(lambda x: x * x, "adaptive(dopri5, max_steps=500)", 3)(torch.ones(2))


def test_no_shortcut():
    with pytest.raises(SchemeError, match=r"1 shortcuts for step 0 of adaptive\(dopri5\), want none"):
        Stack(nn.Linear(2, 2), "adaptive(dopri5)", shortcut=nn.Linear(2, 2))


def test_without_torchdiffeq(monkeypatch):
    original = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "torchdiffeq":
            raise ModuleNotFoundError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(SchemeError, match=r'pip install "odenets\[ode\]"'):
        solve(get("adaptive(dopri5)"), torch.neg, torch.ones(2), steps=1)


@pytest.mark.parametrize("mode", ["store", "checkpoint"])
def test_checkpointing_gives_the_same(mode):
    torch.manual_seed(0)
    stack = Stack([nn.Linear(3, 3), nn.Linear(3, 3)], "adaptive(bosh3)", backprop=mode)
    x = torch.ones(2, 3, requires_grad=True)
    stack(x).sum().backward()
    assert stack.evaluations > 0 and float(x.grad.abs().min()) > 0
