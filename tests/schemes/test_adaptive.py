"""Continuous depth: exact solutions, the adjoint against plain gradients, counts, limits."""

import builtins
import functools
import math

import pytest
import torch
from torch import nn

import schemes
from odenets import Stack
from schemes import SchemeError, get, solve, tableaux

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
    assert float(y) == pytest.approx(1 / (2 - math.sin(1)), rel=2e-6)  # the solver steps right onto the end


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
        solve(get("adaptive(dopri5, backend=torchdiffeq)"), torch.neg, torch.ones(2), steps=1)
    solve(get("adaptive(dopri5)"), torch.neg, torch.ones(2), steps=1)  # our own solver needs nothing


@pytest.mark.parametrize("mode", ["store", "checkpoint"])
def test_checkpointing_gives_the_same(mode):
    torch.manual_seed(0)
    stack = Stack([nn.Linear(3, 3), nn.Linear(3, 3)], "adaptive(bosh3)", backprop=mode)
    x = torch.ones(2, 3, requires_grad=True)
    stack(x).sum().backward()
    assert stack.evaluations > 0 and float(x.grad.abs().min()) > 0


PAIRS = [name for name, tableau in tableaux.METHODS.items() if tableau.b_hat is not None]


@pytest.mark.parametrize("name", PAIRS)
def test_every_pair_is_a_method(name):
    scheme = get(f"adaptive({name}, rtol=1e-6, atol=1e-6)")
    assert get(str(scheme)) == scheme
    y = solve(scheme, lambda t, y: y * y * torch.cos(torch.as_tensor(t)), torch.tensor([0.5], dtype=F64), steps=1)
    assert float(y) == pytest.approx(1 / (2 - math.sin(1)), rel=2e-5)
    assert name in schemes.adaptive.PAIRS


@pytest.mark.long
@pytest.mark.parametrize("adjoint", ["true", "false"])
@pytest.mark.parametrize("method", ["bosh3", "dopri5", "dopri8", "heun2"])
def test_torchdiffeq_finds_the_same(method, adjoint):
    """Two solvers, one equation: values and all gradients, those of a closure and of the step size too."""
    pytest.importorskip("torchdiffeq")
    tol = 1e-6 if method == "heun2" else 1e-9
    found = []
    for backend in ("schemes", "torchdiffeq"):
        torch.manual_seed(0)
        weight = torch.randn(3, 3, dtype=F64, requires_grad=True)
        stack = Stack(
            lambda t, x, w=weight: torch.tanh(x @ w) * torch.cos(t),
            f"adaptive({method}, rtol={tol}, atol={tol}, adjoint={adjoint}, backend={backend})",
            step="learned",
        ).double()
        x = torch.randn(2, 3, dtype=F64, requires_grad=True)
        y = stack(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, weight, stack.steps[0].h])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e3 * tol, atol=1e3 * tol)


@pytest.mark.parametrize("adjoint", ["true", "false"])
def test_complex_streams(adjoint):
    a = torch.tensor([[0.1 + 1j, 0.3], [0.2j, -0.5]], dtype=torch.complex128, requires_grad=True)
    x = torch.randn(3, 2, dtype=torch.complex128, requires_grad=True)
    stack = Stack(lambda x: x @ a, f"adaptive(dopri8, rtol=1e-10, atol=1e-12, adjoint={adjoint})")
    got = stack(x)
    want = x @ torch.linalg.matrix_exp(a)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    for u, v in zip(*(torch.autograd.grad(y.abs().square().sum(), [x, a]) for y in (got, want)), strict=True):
        torch.testing.assert_close(u, v, rtol=1e-8, atol=1e-8)


class Reader:
    """A callable object that reads what it holds."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, x):
        return torch.tanh(x @ self.weight)


def reads(kind, weight):
    if kind == "closure":
        return lambda x: torch.tanh(x @ weight), {}
    if kind == "partial":
        return functools.partial(lambda w, x: torch.tanh(x @ w), weight), {}
    if kind == "object":
        return Reader(weight), {}
    field = lambda x, context: torch.tanh(x @ (context["w"][0] if kind == "nested" else context))  # noqa: E731
    return field, {"context": {"w": [weight]} if kind == "nested" else weight}


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("kind", ["closure", "partial", "object", "nested", "tensor"])
def test_the_adjoint_sees_whatever_the_field_reads(kind, computed):
    """Weights themselves, and weights that were computed before the solve."""
    found = []
    for adjoint in ("true", "false"):
        torch.manual_seed(0)
        leaf = torch.randn(3, 3, dtype=F64, requires_grad=True)
        x = torch.randn(2, 3, dtype=F64)
        f, options = reads(kind, leaf * 2 + leaf.T if computed else leaf)
        y = Stack(f, f"adaptive(dopri5, rtol=1e-9, atol=1e-9, adjoint={adjoint})")(x, **options)
        found.append(torch.autograd.grad(y.square().sum(), leaf)[0])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_a_time_that_needs_a_gradient():
    for adjoint in ("true", "false"):
        t = torch.tensor(0.3, dtype=F64, requires_grad=True)
        stack = Stack(lambda t, x: torch.cos(t) * x, f"adaptive(dopri5, rtol=1e-9, atol=1e-9, adjoint={adjoint})")
        y = stack(torch.ones((), dtype=F64), t=t)
        y.backward()
        want = y.detach() * (math.cos(1.3) - math.cos(0.3))
        torch.testing.assert_close(t.grad, want, rtol=1e-6, atol=1e-8)


def test_what_only_the_backward_pass_reads_is_refused():
    late = torch.ones((), dtype=F64, requires_grad=True)
    stack = Stack(lambda t, x: -x if t < 0.5 else -late * x, "adaptive(dopri5, adjoint=true)")
    y = stack(torch.ones(1, dtype=F64, requires_grad=True))
    with pytest.raises(SchemeError, match="closure"):
        y.backward()


def test_what_custom_functions_read_is_seen():
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx, grad):
            x, w = ctx.saved_tensors
            return grad * w, (grad * x).sum()

    for computed in (False, True):
        leaf = torch.tensor(-0.5, dtype=F64, requires_grad=True)
        weight = leaf * 1.0 if computed else leaf
        stack = Stack(lambda x, w=weight: Scaled.apply(x, w), "adaptive(dopri5, rtol=1e-9, atol=1e-9, adjoint=true)")
        try:
            y = stack(torch.ones((), dtype=F64))
        except SchemeError as error:
            assert computed and "closure" in str(error)
            continue
        y.backward()
        assert float(leaf.grad) == pytest.approx(math.exp(-0.5), rel=1e-6)


@pytest.mark.parametrize("adjoint", ["true", "false"])
def test_equal_ends_and_no_samples(adjoint):
    stack = Stack(nn.Linear(3, 3), f"adaptive(dopri5, adjoint={adjoint})", step=0.0)
    x = torch.randn(2, 3, requires_grad=True)
    assert torch.equal(stack(x), x)
    full = Stack(nn.Linear(3, 3), f"adaptive(dopri5, adjoint={adjoint})")
    y = full(torch.empty(0, 3, requires_grad=True))
    y.sum().backward()
    assert y.shape == (0, 3) and all(p.grad is not None and not p.grad.any() for p in full.parameters())


def test_a_step_of_zero_that_is_learned_has_a_gradient():
    stack = Stack(lambda x: -2 * x, "adaptive(dopri5)", step="learned")
    with torch.no_grad():
        stack.steps[0].h.zero_()
    y = stack(torch.ones(()))
    y.backward()
    assert float(y.detach()) == 1 and float(stack.steps[0].h.grad) == -2


@pytest.mark.parametrize("adjoint", ["true", "false"])
def test_messages_say_what_it_is(adjoint):
    scheme = f"adaptive(dopri5, adjoint={adjoint})"
    x = torch.ones(4, 3)
    x[2, 1] = float("nan")
    with pytest.raises(SchemeError, match=r"not finite at the start, t=0, sample 2; look at the input"):
        Stack(nn.Linear(3, 3), scheme)(x)
    with pytest.raises(SchemeError, match=r"not finite at the start, t=0, sample 0"):
        Stack(lambda x: x / 0, scheme)(torch.ones(4, 3))

    def field(x):
        assert x.shape[-1] == 5, "expects 5 features"
        return x

    with pytest.raises(AssertionError, match=r"^expects 5 features"):
        Stack(field, scheme)(torch.ones(1, 1))

    def breaks(t, x):
        return torch.where(t < 0.5, x, x * float("inf"))

    with pytest.raises(SchemeError, match=r"stopped being finite after t=0.[45]\d*, sample 0"):
        Stack(breaks, scheme)(torch.ones(2, 3))
    with pytest.raises(SchemeError, match=r"returned \(4, 2\) for a state of \(4, 3\)"):
        solve(get(scheme), lambda x: x[:, :2], torch.ones(4, 3), steps=1)


def test_values_at_given_times_and_what_the_run_was():
    scheme = get("adaptive(tsit5, rtol=1e-8, atol=1e-8)")
    x = torch.ones(2, dtype=F64, requires_grad=True)
    found = scheme.solve([lambda x, since: torch.cos(since) * x], (x,), 2.0, at=[0.5, 1.5, 2.0])
    assert found.run.status == "finished" and found.run.accepted > 3
    for t, y in zip((0.5, 1.5, 2.0), found.values, strict=True):
        torch.testing.assert_close(y, x * math.exp(math.sin(t)), rtol=1e-6, atol=0)
    with pytest.raises(SchemeError, match="want the end of the step"):
        scheme.solve([lambda x, since: x], (x,), 2.0, at=[0.5])


@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("at", [[0.9, 0.2, 1.0], [2.0, 1.0], [-0.5, 1.0], [0.5, 0.5, 1.0], [1.0, 1.0], [math.nan, 1.0]])
def test_times_that_are_no_way_to_the_end_of_a_step_are_refused(at, sign):
    calls = []
    at = [sign * x for x in at] if sign else [*at[:-1], 0.0]
    with pytest.raises(SchemeError, match=r"the times asked for, .*, are not in order from 0 to"):
        get("adaptive(tsit5)").solve([lambda x: calls.append(1) or -x], (torch.ones(1),), sign, at=at)
    assert not calls


@pytest.mark.parametrize("adjoint", ["true", "false"])
@pytest.mark.parametrize("way", ["grad", "jvp"])
def test_times_given_as_tensors_have_their_derivatives(adjoint, way):
    scheme = get(f"adaptive(tsit5, rtol=1e-8, atol=1e-8, adjoint={adjoint})")
    t = torch.tensor([0.5, 1.5, 2.0], dtype=F64)

    def solve(t):
        f = [lambda x, since: torch.cos(since) * x]
        return torch.stack(scheme.solve(f, (torch.ones(1, dtype=F64),), t[2], at=list(t)).values)[:, 0]

    want = torch.diag(torch.cos(t) * torch.exp(torch.sin(t)))
    if way == "grad":
        got = torch.autograd.functional.jacobian(solve, t)
    else:
        with torch.autograd.forward_ad.dual_level():
            columns = [torch.autograd.forward_ad.make_dual(t, e) for e in torch.eye(3, dtype=F64)]
            got = torch.stack([torch.autograd.forward_ad.unpack_dual(solve(x)).tangent for x in columns], 1)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_autocast_reaches_the_adjoint():
    torch.manual_seed(0)
    field = nn.Linear(3, 3)
    seen = []
    stack = Stack(lambda x: seen.append(field(x).dtype) or torch.tanh(field(x)), "adaptive(bosh3, adjoint=true)")
    with torch.autocast("cpu", torch.bfloat16):
        y = stack(torch.ones(2, 3, requires_grad=True))
    assert y.dtype == torch.float32
    count = len(seen)
    y.sum().backward()
    assert len(seen) > count and set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("adjoint", ["true", "false"])
def test_a_field_that_stops_being_finite_is_named_with_its_time_and_no_tolerance(adjoint):
    def field(x, t):
        return x if float(t) < 0.5 else x * math.nan

    with pytest.raises(
        SchemeError, match=r"stopped being finite after t=0\.[45]\d*, sample 0; no shorter step"
    ) as caught:
        Stack(field, f"adaptive(dopri5, adjoint={adjoint})")(torch.ones(2, 4, requires_grad=True))
    text = str(caught.value)
    assert "rtol" not in text and "Look at what the function gives there" in text and len(text.splitlines()) == 2


def test_an_adjoint_that_stops_being_finite_backwards():
    class Field(torch.nn.Module):
        broken = False

        def forward(self, x, t):
            return x * (math.nan if self.broken and float(t) < 0.5 else 1.0)

    field = Field()
    y = Stack(field, "adaptive(dopri5, adjoint=true)")(torch.ones(2, 4, dtype=F64, requires_grad=True))
    Field.broken = True  # of the class, as attributes of the module are read as at the call
    with pytest.raises(SchemeError, match=r"adjoint equation.*after t=0\.[45]\d*.*; no shorter step helps\.\n  Look"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_integers_are_not_solved(dtype):
    for scheme in ("adaptive(dopri5)", "adaptive(bosh3, adjoint=true)"):
        with pytest.raises(
            SchemeError, match=rf"of type {str(dtype)[6:]}, .*floating-point or complex.*\n  Convert it"
        ):
            Stack(lambda x: x, scheme)(torch.ones(2, 4).to(dtype))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
def test_no_recorded_graph_chooses_its_steps_and_fixed_ones_are_recorded():
    torch.manual_seed(0)
    field = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    stack, x, other = Stack(field, "adaptive(dopri5)"), torch.randn(2, 4), torch.randn(2, 4)
    for record in (torch.export.export, torch.jit.trace):
        for used in (False, True):
            fresh = Stack(field, "adaptive(dopri5)")
            if used:
                fresh(x)
            with pytest.raises(
                SchemeError, match=r"adaptive\(dopri5\): .*no recorded graph can\.\n.*rebuilt"
            ) as caught:
                record(fresh, (x,))
            assert len(str(caught.value).splitlines()) == 2
    with pytest.raises(SchemeError, match="no recorded graph can"):
        torch.fx.symbolic_trace(nn.Sequential(stack))
    # The remedy that the message names.
    fixed, same = stack.rebuilt("rk4", depth=4), Stack(field, "rk4", 4, step="1/depth")
    torch.testing.assert_close(fixed(other), stack(other), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(fixed(other), same(other), rtol=0, atol=0)
    torch.testing.assert_close(torch.export.export(fixed, (x,)).module()(other), fixed(other))
    torch.testing.assert_close(torch.jit.trace(same, x)(other), fixed(other))
