"""Weights as functions of depth: values, gradients, modes, the law of convergence, changes of basis, state."""

import copy
import gc
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrizations

from odenets import ContinuousWeights, PerSlot, Stack, checkpoints
from odenets.interpolation import Place
from odenets.knots import relative_errors
from odenets.layers import BasicFunction
from odenets.layers.attention import AttentionFunction
from schemes import SchemeError
from schemes.splines import SplineSpace

F64 = torch.float64


def scattered(field, scale=0.3):
    """The field in float64, with coefficients that differ."""
    generator = torch.Generator().manual_seed(1)
    for p in field.double().parameters():
        p.data += scale * torch.randn(p.shape, dtype=F64, generator=generator)
    return field


class Several(nn.Module):
    """Two arguments, a context, a time, and one parameter in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("mask", torch.rand(4).double())

    def forward(self, x, y, context, t):
        return (
            self.gain * torch.tanh(self.first(x) + self.second(y) * self.mask)
            + context
            + float(t.detach() if isinstance(t, torch.Tensor) else t)
        )


def perceptron(width=4, act=nn.Tanh):
    return nn.Sequential(nn.Linear(width, width), act(), nn.Linear(width, width, bias=False))


def batch(*shape):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(2))


BLOCKS = {
    "perceptron": lambda: (perceptron(), (batch(3, 4),), {}),
    "convolutions": lambda: (BasicFunction(8, 8, order="pre", norm="group", act="silu"), (batch(2, 8, 4, 4),), {}),
    "attention": lambda: (
        AttentionFunction(8, 2, cosine=True),
        (batch(2, 3, 8),),
        {"context": torch.tensor([[True] * 3, [True, True, False]])},
    ),
    "several": lambda: (Several(), (batch(3, 4), batch(3, 4)), {"context": batch(4)}),
}


def plain(field, t, args, kwargs):
    """The block with the weights that the spline has at t, summed term by term."""
    row = field.space.rows([t / field.span])[0]
    weights = {k: sum(w * c for w, c in zip(row, p, strict=True)) for k, p in field.block.named_parameters()}
    if isinstance(field.block, Several):
        kwargs = {**kwargs, "t": t}
    return functional_call(field.block, weights, args, kwargs)


# One evaluation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_field_is_its_block_with_the_weights_of_the_spline(kind, degree):
    block, args, kwargs = BLOCKS[kind]()
    field = scattered(ContinuousWeights(block, 4, degree, span=2.0))
    for t in (0.0, 0.31, 0.5, 1.0, 1.77, 2.0):
        found = []
        for run in (lambda t=t: field(t, *args, **kwargs), lambda t=t: plain(field, t, args, kwargs)):
            y = run()
            grads = torch.autograd.grad(y.square().sum(), list(field.parameters()))
            found.append((y, *grads))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(field(torch.tensor(t, dtype=F64), *args, **kwargs), found[0][0])
        # A time that has a gradient takes another way through the basis.
        moving = torch.tensor(t, dtype=F64, requires_grad=True)
        torch.testing.assert_close(field(moving, *args, **kwargs), found[0][0])
        if degree > 0:
            assert torch.autograd.grad(field(moving, *args, **kwargs).sum(), moving)[0].isfinite()


def test_a_field_starts_as_its_block():
    block = perceptron()
    twin, x = copy.deepcopy(block), torch.randn(3, 4)
    field = ContinuousWeights(block, 5, degree=2)
    for t in (0.0, 0.123, 1.0):
        torch.testing.assert_close(field(t, x), twin(x))
    assert set(field.state_dict()) == {"block.0.weight", "block.0.bias", "block.2.weight", "knots"}
    assert field.block[0].weight.shape == (7, 4, 4) and field.knots == 5


def test_gradients_of_gradients_and_forward_mode():
    field = scattered(ContinuousWeights(perceptron(2), 3))
    names = [name for name, _ in field.named_parameters()]
    x = batch(2, 2)

    def f(*coefficients):
        return functional_call(field, dict(zip(names, coefficients, strict=True)), (0.4, x))

    inputs = tuple(p.detach().requires_grad_() for p in field.parameters())
    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_transforms_of_functions_go_through():
    torch.manual_seed(0)
    stack, x = net("rk4", 2, knots=3, degree=2), batch(5, 6)
    own = {k: p.detach() for k, p in stack.named_parameters()}

    def loss(parameters, z):
        return functional_call(stack, parameters, (z[None],)).square().sum()

    each = vmap(grad(loss), (None, 0))(own, x)  # gradients sample by sample
    for n, z in enumerate(x):
        stack.zero_grad()
        stack(z[None]).square().sum().backward()
        for k, p in stack.named_parameters():
            torch.testing.assert_close(each[k][n], p.grad)
    torch.testing.assert_close(vmap(stack)(x), stack(x))
    # An ensemble: two sets of coefficients at once.
    other = {k: 1.1 * p for k, p in own.items()}
    both = vmap(lambda p: functional_call(stack, p, (x,)))({k: torch.stack([own[k], other[k]]) for k in own})
    torch.testing.assert_close(both[1], functional_call(stack, other, (x,)))


def test_weights_are_made_again_and_not_kept():
    """In store mode autograd would keep the weights of every evaluation."""
    refs = []

    class Watched(nn.Linear):
        def forward(self, x):
            refs.append(StorageWeakRef(self.weight.untyped_storage()))
            return torch.tanh(super().forward(x))

    field = scattered(ContinuousWeights(Watched(4, 4), 3))
    net, x = Stack(field, "rk4", depth=4, step="span/depth"), batch(2, 4).requires_grad_()
    y = net(x)
    held = field.block.weight.untyped_storage()._cdata
    assert len(refs) == 16 and all(ref.expired() or ref.cdata == held for ref in refs)
    grads = torch.autograd.grad(y.sum(), [x, *field.parameters()], retain_graph=True)
    for p, g in zip(field.parameters(), grads[1:], strict=True):
        assert p.shape == g.shape
    with torch.no_grad():
        field.block.weight.add_(1.0)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace|changed in place"):
        y.sum().backward()


def test_parts_of_a_weight_are_made_again_where_they_lie():
    """An attention keeps a third of its one weight: a view that begins in the middle."""

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 12))

        def forward(self, x):
            a, b, c = self.weight.chunk(3, 1)
            return x @ a @ b.T @ c

    field, x = scattered(ContinuousWeights(Parts(), 3)), batch(2, 4).requires_grad_()
    plain = field.module_at(0.4)
    (got,), (want,) = (torch.autograd.grad(f.sum(), x) for f in (field(0.4, x), plain(x)))
    torch.testing.assert_close(got, want)


class Reads(nn.Module):
    """A product with a complex weight, read through some view of it."""

    def __init__(self, view):
        super().__init__()
        self.weight, self.view = nn.Parameter(torch.randn(4, 4, dtype=torch.complex128)), view

    def forward(self, x):
        w = self.view(self.weight)
        return (torch.tanh(x * w) * w).sum(-1)


VIEWS = {
    "itself": lambda w: w,
    "conjugate": lambda w: w.conj(),
    "adjoint": lambda w: w.mH,
    "real": lambda w: w.real,
    "imaginary": lambda w: w.imag,
    "negative": lambda w: w.conj().imag,
    "as real": lambda w: torch.view_as_real(w)[..., 1].T,
    "conjugate of the real": lambda w: torch.view_as_complex(torch.view_as_real(w)).conj(),
}


def agree_with_a_plain_module(field, x, t=0.3):
    """The value and the gradients by the input and the weights are those of a module with the weights of the time."""
    plain, found = field.module_at(t), []
    own = [places[0].now() for places in field._places()]
    for f, parameters in ((lambda x: field(t, x), own), (plain, list(plain.parameters()))):
        z = x.clone().requires_grad_()
        y = f(z)
        found.append((y, *torch.autograd.grad(y.abs().square().sum(), [z, *parameters])))
    (y, gx, *rows), (want, wx, *weights) = found
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(gx, wx)
    for row, w in zip(rows, weights, strict=True):  # the basis functions sum to one, and so do their shares
        torch.testing.assert_close(row.sum(0), w)


@pytest.mark.parametrize("kind", VIEWS)
def test_views_of_complex_weights_have_their_gradients(kind):
    field = ContinuousWeights(Reads(VIEWS[kind]), 4)
    with torch.no_grad():
        field.block.weight.copy_(torch.randn_like(field.block.weight))
    agree_with_a_plain_module(field, batch(3, 4, 4))


class Writes(nn.Module):
    """Bounds its weight in place, before or after a use of it, as EEGNet does."""

    def __init__(self, write, late=False):
        super().__init__()
        self.weight, self.write, self.late = nn.Parameter(torch.randn(4, 4, dtype=F64)), write, late

    def forward(self, x):
        if self.late:
            x = x + torch.tanh(self.weight.exp().sum())
        with torch.no_grad():
            self.write(self.weight)
        for _ in range(3):  # tensors that may lie where the weight lay
            h = torch.tanh(x * 2)
            x = torch.tanh(x @ self.weight.T) @ self.weight + h * h
        return x


class Bounded(nn.Module):
    """An embedding, which bounds its rows in place, tied to a projection."""

    def __init__(self):
        super().__init__()
        self.rows = nn.Embedding(5, 4, max_norm=1.0)

    def forward(self, x):
        e = self.rows(torch.arange(5)).sum(0)
        return torch.tanh(nn.functional.linear(x, self.rows.weight)) @ self.rows.weight + e


def replaced(w):
    w.data = torch.renorm(w.data, 2, 0, 0.5)


WRITES = {
    "norm": lambda: Writes(lambda w: w.renorm_(2, 0, 0.5)),
    "norm, late": lambda: Writes(lambda w: w.renorm_(2, 0, 0.5), True),
    "clamp": lambda: Writes(lambda w: w.clamp_(-0.1, 0.1)),
    "diagonal": lambda: Writes(lambda w: w.diagonal().zero_()),
    "row": lambda: Writes(lambda w: w[1].mul_(3.0)),
    "detached": lambda: Writes(lambda w: w.detach().mul_(0.5)),
    "data": lambda: Writes(replaced),
    "embedding": Bounded,
}


@pytest.mark.parametrize("kind", WRITES)
def test_a_block_that_writes_to_its_weight_has_its_gradients(kind):
    agree_with_a_plain_module(scattered(ContinuousWeights(WRITES[kind](), 4), 1.0), batch(4, 4))


HIDDEN = [lambda w: w.data.mul_(0.5), lambda w: w.data.clamp_(-0.1, 0.1), lambda w: w.data[0].zero_()]


@pytest.mark.parametrize("write", HIDDEN)
@pytest.mark.parametrize("late", [False, True])
def test_writes_that_autograd_does_not_see_are_refused(write, late):
    field = scattered(ContinuousWeights(Writes(write, late), 4), 1.0)
    for _ in range(2):  # a call that was refused is not a look
        with pytest.raises(
            SchemeError, match=r"writes to its weight through \.data.*\n  Write to the parameter itself"
        ):
            field(0.3, batch(4, 4))


def test_coefficients_that_are_written_to_between_the_passes_are_found():
    field = scattered(ContinuousWeights(perceptron(), 3))
    y = field(0.4, batch(2, 4))  # between two knots
    with torch.no_grad():
        field.block[2].weight.mul_(2.0)
    with pytest.raises(RuntimeError, match=r"coefficients of shape \(4, 4, 4\) were changed in place"):
        y.sum().backward()


def test_writes_between_the_passes_are_found_beside_the_weights_too():
    class Leaves(nn.Linear):
        def forward(self, x):
            self.kept = torch.tanh(super().forward(x))
            return self.kept * 2

    field = scattered(ContinuousWeights(Leaves(4, 4), 3))
    y = field(0.4, batch(2, 4))
    field.block.kept.detach().mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|changed in place"):
        y.sum().backward()


# Stacks -------------------------------------------------------------------------------------------------------------


def net(scheme, depth, act=nn.SiLU, knots=4, degree=1, width=6, scale=0.4):
    torch.manual_seed(0)
    field = scattered(ContinuousWeights(perceptron(width, act), knots, degree), scale)
    return Stack(field, scheme, depth, step="span/depth")


def slope(stack, scheme, depths, reference):
    """The rate at which the error falls, by least squares over the halvings of the step."""
    x = batch(8, 6)
    with torch.no_grad():
        want = stack.rebuilt("dopri5", reference)(x)
        errors = [float((stack.rebuilt(scheme, n)(x) - want).norm()) for n in depths]
    xs, ys = torch.tensor(depths, dtype=F64).log(), torch.tensor(errors, dtype=F64).log()
    return -float(((xs - xs.mean()) * (ys - ys.mean())).sum() / (xs - xs.mean()).square().sum())


ORDERS = {"euler": 1, "midpoint": 2, "kutta3": 3, "rk4": 4, "dopri5": 5}


@pytest.mark.parametrize("degree", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scheme", ORDERS)
def test_the_law_of_convergence(scheme, degree):
    """A smooth activation, and knots where steps begin: the error falls with the order of the scheme."""
    depths = (4, 8, 16) if ORDERS[scheme] > 3 else (16, 32, 64)
    assert slope(net("rk4", 4, degree=degree), scheme, depths, 64) >= ORDERS[scheme] - 0.3


# Not a third of a step after a knot: there the errors of Simpson's rule at a corner cancel.
CORNERS = {"of ReLU": (nn.ReLU, 4, (16, 32, 64), 320), "of knots inside of steps": (nn.SiLU, 5, (8, 16, 32), 40)}


@pytest.mark.cases(2)
@pytest.mark.parametrize("corners", CORNERS)
@pytest.mark.parametrize("scheme", ["kutta3", "rk4"])
def test_the_order_stops_at_two_where_the_field_has_corners(scheme, corners):
    act, knots, depths, reference = CORNERS[corners]
    assert 1.5 <= slope(net("rk4", knots, act, knots, scale=1.0), scheme, depths, reference) <= 2.7


def test_corners_are_harmless_where_no_step_crosses_them():
    """The same knots, on the grid: the test above would see this if its depths were multiples of five."""
    assert slope(net("rk4", 5, knots=5, scale=1.0), "rk4", (20, 40, 80), 160) >= 3.7


COUPLED = [
    "store",
    "checkpoint",
    "checkpoint(2)",
    "reverse",
    "reverse(every=2)",
    "exact",
    "2*store + 4*reverse",
    "offload",
]


def gradients(stack, x):
    x = x.clone().requires_grad_()
    y = stack(x)
    grads = torch.autograd.grad(y.square().sum(), [x, *stack.parameters()])
    return [y, *grads]


@pytest.mark.parametrize("mode", [*COUPLED, "auto(memory=1GB)"])
@pytest.mark.parametrize("shared", [1, 2])
def test_modes_agree_on_reversible_fields(mode, shared):
    torch.manual_seed(0)
    fields = [scattered(ContinuousWeights(perceptron(3), 4)) for _ in range(shared)]
    block, x = fields[0] if shared == 1 else PerSlot(fields), batch(5, 6)
    want = gradients(Stack(block, "revnet", depth=6, step="span/depth"), x)
    found = gradients(Stack(block, "revnet", depth=6, step="span/depth", backprop=mode), x)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("mode", ["checkpoint", "checkpoint(2)", "offload", "auto(memory=1GB)", "store + 3*checkpoint"])
@pytest.mark.parametrize("scheme", ["euler", "rk4", "nested(midpoint, repeat(euler, 2))"])
def test_modes_agree_on_one_stream(mode, scheme):
    stack = net(scheme, 4)
    want = gradients(stack, batch(5, 6))
    for a, b in zip(gradients(stack.rebuilt(backprop=mode), batch(5, 6)), want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


def test_an_adaptive_solver_integrates_the_same_field():
    stack, x = net("rk4", 64), batch(5, 6)
    tight = stack.rebuilt("adaptive(dopri5, rtol=1e-9, atol=1e-9)")
    torch.testing.assert_close(tight(x), stack(x), atol=1e-6, rtol=1e-6)
    for a, b in zip(gradients(tight, x), gradients(stack, x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert tight.rebuilt("rk4", 64).steps[0].h == 1 / 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_a_time_has_the_same_weights_with_a_gradient_and_without(degree, dtype):
    field = scattered(ContinuousWeights(nn.Linear(2, 2), 64, degree, span=0.7), 1.0)
    for t in torch.linspace(0, 0.7, 97, dtype=dtype):
        want = field.weights(t)
        for name, w in field.weights(t.clone().requires_grad_()).items():
            torch.testing.assert_close(w, want[name], atol=1e-4, rtol=0)


class Normed(nn.Module):
    """A parameter beside a matrix, and a norm, which autocast does not cast."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.gain = nn.Linear(8, 8), nn.LayerNorm(8), nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.linear(torch.tanh(self.norm(x))) * self.gain


@pytest.mark.parametrize("run", ["a time with a gradient", "compiled"])
def test_autocast_gives_the_weights_their_precision(run):
    torch.manual_seed(0)
    field, x = scattered(ContinuousWeights(Normed(), 8)).float(), torch.randn(3, 8)
    other, t = copy.deepcopy(field), torch.tensor(0.3, requires_grad=run != "compiled")
    if run == "compiled":
        other.compile(backend="eager")
    with torch.autocast("cpu", torch.bfloat16):
        given, want = other.weights(t) if run != "compiled" else {}, field.weights(0.3)
        for name, w in given.items():
            torch.testing.assert_close(w, want[name])
        torch.testing.assert_close(other(t, x), field(0.3, x), atol=1e-6, rtol=1e-6)


def test_learned_steps_get_their_gradient_through_the_weights():
    stack = Stack(scattered(ContinuousWeights(perceptron(), 3)), "rk4", depth=4, step="learned(h0=1/4)").double()
    x = batch(3, 4)

    def f(*sizes):
        named = {f"steps.{n}.h": h for n, h in enumerate(sizes)}
        return functional_call(stack, named, (x,))

    assert torch.autograd.gradcheck(f, tuple(step.h.detach().requires_grad_() for step in stack.steps))


def test_a_field_has_its_context_in_every_mode():
    context = torch.tensor([[True, True, False]])
    field = scattered(ContinuousWeights(AttentionFunction(4, 2), 4))
    x = batch(1, 3, 4)
    nets = [Stack(field, "rk4", 2, step="span/depth", backprop=mode) for mode in ("store", "checkpoint")]
    torch.testing.assert_close(nets[0](x, context=context), nets[1](x, context=context))
    assert (nets[0](x, context=context) - nets[0](x)).abs().max() > 1e-3


@pytest.mark.parametrize("training", [True, False])
def test_rebuilt_changes_no_flag_of_the_modules_that_it_shares(training):
    block, post_step = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5)), nn.Sequential(nn.BatchNorm1d(4))
    stack = Stack(block, "euler", depth=2, post_step=post_step).train(training)
    for m in (block[1], post_step[0], block[0]):  # one after another differs from the stack
        m.train(not training)
        flags = [(m, m.training) for m in stack.modules()]
        other = stack.rebuilt("rk4", 3)
        assert all(m.training == flag for m, flag in flags)
        assert all(m.training == training for m in (other, other.steps, *other.steps))


def test_rebuilt_shares_the_weights_and_ends_at_the_same_time():
    stack = net("euler", 8)
    twin = stack.rebuilt("midpoint", 4, backprop="checkpoint")
    assert twin.block is stack.block and str(twin.scheme) == "midpoint" and twin.steps[0].h == 1 / 4
    assert str(twin.rule) == "span/depth" and str(twin.backprop) == "checkpoint"
    assert not stack.eval().rebuilt().training
    numbers = Stack(torch.tanh, "euler", depth=4, step=0.5).rebuilt("substeps(midpoint, 2)", 8)
    assert numbers.steps[0].h * 8 == 2
    drawing = Stack(torch.tanh, "bdia", depth=4, seed=3)
    assert drawing.rebuilt(depth=8)._draws.generator.initial_seed() == 3 and drawing.rebuilt("rk4")._draws is None
    repeated = net("repeat(euler, 2)", 4)
    torch.testing.assert_close(repeated(batch(2, 6)), repeated.rebuilt("euler", 8)(batch(2, 6)))
    scheduled = Stack(torch.neg, "euler", depth=4, step="2/depth")
    scheduled.set_step(0.25)  # its steps end at 1 now
    torch.testing.assert_close(scheduled.rebuilt()(batch(2, 6)), scheduled(batch(2, 6)))
    assert scheduled.rebuilt(depth=8).steps[0].h == 1 / 8


def of_span_2(f):
    """A stack whose field has another span."""
    return Stack(ContinuousWeights(nn.Linear(4, 4), 4, span=2.0), depth=4, step="span/depth")


def loaded(stack, f):
    """The stack with the state of a field of another span."""
    stack.block.load_state_dict(f.state_dict())
    return stack


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: Stack(f, "rk4", depth=8), r"8 steps of rk4 end at t = 8, .* \[0, 1\].\n  Write step='span/depth'"),
        (lambda f: Stack(f, "dopri5", depth=8, step="error(1e-3)"), "does not end at the span of the weights"),
        (lambda f: Stack(f, depth=2, step="decay(0.5, h0=2/3)", step_offset=1), r"end at t = 0\.5, .* \[0, 1\]"),
        (lambda f: Stack(torch.tanh, "rk4", depth=8, step="span/depth"), "asks for the span of a shared Continuous"),
        (lambda f: Stack(torch.tanh, "rk4", depth=8, step="-1/depth"), "length is -1, want a positive number"),
        (lambda f: Stack(PerSlot([f]), "revnet", depth=8, step="span/depth"), "1 shared .* revnet has 2"),
        (lambda f: Stack(f, "rk4", depth=8, step="span/depth").set_step(0.1), "end at the span of its weights"),
        (lambda f: Stack([nn.Linear(4, 4)], "euler").rebuilt("rk4"), "separate weights are no function of depth"),
        (lambda f: Stack(torch.tanh, "euler", 4, step="decay(1/2)").rebuilt(), r"what step='decay\(0.5\)' would be"),
        (lambda f: f(2.0, torch.zeros(1, 4)), r"asked for the weights at t = 2, .* \[0, 1\]"),
        (lambda f: f(math.nan, torch.zeros(1, 4)), "asked for the weights at t = nan"),
        (lambda f: f(torch.tensor(-1.0), torch.zeros(1, 4)), "asked for the weights at t = -1"),
        (lambda f: f.refined(6), "4 intervals do not|the nearest that do: 4 or 8"),
        (lambda f: f.elevated(0), "degree 0 cannot hold"),
        (lambda f: ContinuousWeights(nn.BatchNorm1d(4)), "the block is a BatchNorm1d, whose running statistics"),
        (lambda f: ContinuousWeights(nn.Sequential(nn.InstanceNorm1d(4, track_running_stats=True))), "0 is a Instance"),
        (lambda f: ContinuousWeights(nn.Sequential(f)), "functions of depth already"),
        (lambda f: ContinuousWeights(nn.LazyLinear(4)), "weight is lazy; call the block once"),
        (lambda f: ContinuousWeights(torch.tanh), "want a module"),
        (lambda f: ContinuousWeights(nn.Linear(4, 4), span=0), "span is 0, want a positive number"),
        (lambda f: ContinuousWeights(nn.Linear(4, 4), knots=[0, 0.5]), "their ends from 0 to 1"),
        (lambda f: ContinuousWeights(nn.Linear(4, 4), knots=True), "True intervals, want a whole number"),
        (lambda f: ContinuousWeights.from_modules([]), "no modules"),
        (lambda f: ContinuousWeights.from_modules([nn.Linear(4, 4), nn.Linear(4, 5)]), "module 1 has other parameters"),
        (lambda f: ContinuousWeights.from_modules([nn.Linear(4, 4)], times=[0, 1]), "2 times for 1 modules"),
        (lambda f: ContinuousWeights.from_modules([nn.Linear(4, 4)], times=[5]), r"at t = 5, outside of \[0, 1\]"),
        (lambda f: ContinuousWeights.from_modules([nn.Linear(4, 4)], times=[math.nan]), "at t = nan, outside"),
        (lambda f: ContinuousWeights.from_modules([torch.tanh]), "want a module"),
        (
            lambda f: ContinuousWeights(nn.Linear(4, 4), SplineSpace.uniform(4, 3), degree=2),
            "degree is 2, and the splines that are given as knots are of degree 3",
        ),
        (
            lambda f: ContinuousWeights.from_modules([nn.Linear(4, 4)], SplineSpace.uniform(1, 1), degree=0),
            "degree is 0, and the splines that are given as knots are of degree 1",
        ),
        (
            lambda f: ContinuousWeights(nn.Linear(4, 4), knots=torch.tensor([0, 0.1234, 0.5771, 1])),
            r"rounded to torch.float32, and a time .* miss it.\n  Give them in float64",
        ),
        (lambda f: ContinuousWeights(nn.Linear(4, 4), knots=4.0), "knots are 4.0; want a whole number"),
        (lambda f: ContinuousWeights(nn.Linear(4, 4), knots=[0, "a", 1]), "want a whole number of intervals, or"),
        (lambda f: ContinuousWeights(nn.Linear(4, 4), degree=1.0), "the degree is 1.0, want"),
        (lambda f: f.elevated(2.0), "the degree is 2.0, want"),
        (lambda f: ContinuousWeights(parametrizations.spectral_norm(nn.Linear(4, 4))), "has a spectral norm"),
        (lambda f: ContinuousWeights(nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)))), "0 has a spectral norm"),
        (lambda f: f(torch.tensor(3.0, requires_grad=True), torch.zeros(1, 4)), "the weights at t = 3"),
        (lambda f: setattr(s := of_span_2(f), "block", f) or s(torch.zeros(1, 4)), r"end at t = 2, .* \[0, 1\]"),
        (lambda f: loaded(of_span_2(f), f)(torch.zeros(1, 4)), r"end at t = 2, .* \[0, 1\]"),
        (
            lambda f: checkpoints.load(of_span_2(f), Stack(f, depth=4, step="span/depth").state_dict()),
            r"on \[0, 2\], and those of the file on \[0, 1\].\n  Build the network with the steps of the file",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(SchemeError, match=message):
        make(ContinuousWeights(nn.Linear(4, 4), 4))


def test_norms_without_running_statistics_are_taken():
    ContinuousWeights(nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.GroupNorm(2, 4), nn.LayerNorm(4)))


# Compilers ----------------------------------------------------------------------------------------------------------


def graphs():
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    return made, backend


@pytest.mark.long
def test_a_field_compiles_to_one_graph_for_all_times():
    field, x = scattered(ContinuousWeights(perceptron(), 4, degree=2)), batch(3, 4)
    stack = Stack(field, "rk4", depth=8, step="span/depth")
    want = gradients(stack, x)
    made, backend = graphs()
    field.compile(backend=backend, fullgraph=True)
    for a, b in zip(gradients(stack, x), want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)
    assert len(made) == 1
    # A copy runs its own weights.
    other = copy.deepcopy(field)
    other.block[0].weight.data.zero_()
    assert not torch.allclose(other(0.3, x), field(0.3, x))


@pytest.mark.long
def test_a_whole_stack_compiles_without_a_break():
    stack, x = net("midpoint", 2), batch(3, 6)
    want = gradients(stack, x)
    made, backend = graphs()
    compiled = torch.compile(stack, backend=backend, fullgraph=True)
    y = compiled(x)
    grads = torch.autograd.grad(y.square().sum(), list(stack.parameters()))
    for a, b in zip([y, *grads], [want[0], *want[2:]], strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)
    assert len(made) == 1


@pytest.mark.slow
def test_a_stack_is_exported():
    stack, x = net("midpoint", 2), batch(3, 6)
    torch.testing.assert_close(torch.export.export(stack.eval(), (x,)).module()(x), stack(x))


# Changes of basis ---------------------------------------------------------------------------------------------------


ROUNDED = {
    "float32": lambda n, span: torch.linspace(0, span, n + 1),
    "float16": lambda n, span: torch.linspace(0, span, n + 1).half(),
    "numpy": lambda n, span: torch.linspace(0, span, n + 1).numpy(),
    "a list of float32": lambda n, span: torch.linspace(0, span, n + 1).tolist(),
    "float64": lambda n, span: torch.linspace(0, span, n + 1, dtype=F64),
}


def same_function(a, b, atol):
    for k in range(13):
        t = a.span * (k + 0.3) / 13.3
        for x, y in zip(a.weights(t).values(), b.weights(t).values(), strict=True):
            torch.testing.assert_close(x, y, atol=atol, rtol=0)


@given(st.integers(0, 3), st.integers(1, 6), st.integers(1, 3), st.floats(0.5, 8))
@settings(max_examples=8)
def test_refined_and_elevated_are_the_same_function(degree, knots, times, span):
    field = scattered(ContinuousWeights(perceptron(2), knots, degree, span))
    fine = field.refined(knots * times)
    assert fine.knots == knots * times and fine.block[0].bias.shape == (knots * times + degree, 2)
    same_function(field, fine, 1e-12)
    for more in range(degree, 4):
        high = fine.elevated(more)
        assert high.degree == more
        same_function(field, high, 1e-12)
        same_function(field, high.refined(2 * knots * times), 1e-12)


@given(st.integers(0, 3), st.integers(1, 8), st.integers(0, 3), st.integers(1, 8))
@settings(max_examples=8)
def test_projected_is_the_nearest_and_says_how_far(degree, knots, other, fewer):
    field = scattered(ContinuousWeights(perceptron(2), knots, degree))
    found = field.projected(fewer, other)
    # The error by a plain sum over many places.
    square = norm = 0.0
    worse, far = copy.deepcopy(found.field), 0.0
    for p in worse.parameters():
        p.data += 1e-2 * torch.randn_like(p)
    for k in range(280):
        u = (k + 0.5) / 280
        a, b, c = (f.space.rows([u])[0] @ f.block[0].weight.detach().flatten(1) for f in (field, found.field, worse))
        square, norm = square + float((a - b).square().sum()), norm + float(a.square().sum())
        far += float((a - c).square().sum())
    assert abs(found.errors["0.weight"] - (square / norm) ** 0.5) < 5e-3
    assert far > square  # whatever else is in the space is farther


@given(st.integers(1, 6), st.integers(0, 3), st.integers(1, 6))
@settings(max_examples=6)
def test_from_modules_goes_through_the_weights_that_it_can(count, degree, knots):
    torch.manual_seed(count)
    modules = [perceptron(2).double() for _ in range(count)]
    found = ContinuousWeights.from_modules(modules, knots, degree, span=count)
    square = norm = 0.0
    for i, module in enumerate(modules):
        for name, w in found.field.weights(i).items():
            square += float((w - module.get_parameter(name)).detach().square().sum())
            norm += float(module.get_parameter(name).detach().square().sum())
    assert abs(found.error - (square / norm) ** 0.5) < 1e-9
    if knots >= count and (knots % count == 0 or degree == 1):
        assert found.error < 1e-9


def test_from_modules_is_the_network_under_its_own_steps():
    modules = [perceptron(4).double() for _ in range(6)]
    x = batch(3, 4)
    for degree in (0, 1, 2, 3):
        found = ContinuousWeights.from_modules(modules, degree=degree, span=6)
        torch.testing.assert_close(
            Stack(found.field, "euler", 6, step="span/depth")(x), Stack(modules, "euler")(x), atol=1e-10, rtol=0
        )
    assert modules[0][0].weight.shape == (4, 4)  # left alone


def test_changes_of_basis_do_not_depend_on_what_others_did():
    space, field = SplineSpace.uniform(11, 1), scattered(ContinuousWeights(perceptron(2), 11))
    with torch.device("meta"):
        empty = ContinuousWeights(perceptron(2), space).refined(22)
        assert empty.block[0].weight.is_meta and empty.state_dict()["knots"].device.type == "cpu"
        same_function(field, field.refined(22), 1e-12)
    copy.deepcopy(field).change(space.refined(22)).zero_()  # the map is the caller's
    same_function(field, field.refined(22), 1e-12)
    assert field.projected(22).error < 1e-12


@pytest.mark.parametrize("kind", ROUNDED)
def test_rounded_times_of_modules_are_where_they_are_meant_to_be(kind):
    layers = [nn.Linear(2, 2) for _ in range(10)]
    found = ContinuousWeights.from_modules(layers, degree=0, span=0.7, times=ROUNDED[kind](10, 0.7)[:-1])
    assert found.error < 1e-7
    for k, layer in enumerate(layers):
        torch.testing.assert_close(found.field.weights(0.7 * k / 10)["bias"], layer.bias)


def test_module_at_is_what_a_plain_network_has_there():
    block, args, kwargs = BLOCKS["several"]()
    field = scattered(ContinuousWeights(block, 4))
    alone = field.module_at(0.37)
    torch.testing.assert_close(alone(*args, **kwargs, t=0.37), field(0.37, *args, **kwargs))
    assert alone.first.weight is alone.second.weight and alone.first.weight.shape == (4, 4)


# State --------------------------------------------------------------------------------------------------------------


def test_state_dicts_hold_the_function():
    field, x = scattered(ContinuousWeights(perceptron(), 4, 2)), batch(3, 4)
    for other in (
        ContinuousWeights(perceptron(), 4, 2),
        ContinuousWeights(perceptron(), 8, 1),
        ContinuousWeights(perceptron(), 5, 1),  # as many coefficients
        ContinuousWeights(perceptron(), 4, 2, span=3.0),
    ):
        other.double()
        before = list(other.parameters())
        other.load_state_dict(field.state_dict())
        assert all(a is b for a, b in zip(before, other.parameters(), strict=True))
        torch.testing.assert_close(other(0.37, x), field(0.37, x))
        assert other.span == 1.0 and (other.knots, other.degree) == (4, 2)
    state = field.state_dict()
    # What a file leaves out stays the function that it is.
    other, part = scattered(ContinuousWeights(perceptron(), 2, 2)), dict(state)
    del part["block.0.bias"]
    bias = other.weights(0.37)["0.bias"].detach().clone()
    assert other.load_state_dict(part, strict=False).missing_keys == ["block.0.bias"] and other.knots == 4
    torch.testing.assert_close(other.weights(0.37)["0.bias"], bias)
    with pytest.raises(RuntimeError, match="knots"):
        field.load_state_dict({k: v for k, v in state.items() if k != "knots"})
    with pytest.raises(RuntimeError, match="no knot vector"):
        field.load_state_dict({**state, "knots": torch.zeros(2)})


def test_load_takes_the_knots_of_a_file_and_refuses_whole():
    stack = Stack(scattered(ContinuousWeights(perceptron(), 8)), "rk4", depth=4, step="span/depth")
    other = Stack(ContinuousWeights(perceptron(), 4).double(), "euler", depth=8, step="span/depth")
    state = stack.state_dict()
    with pytest.raises(SchemeError, match=r"block\.block\.0\.weight is"):
        checkpoints.load(other, {**state, "block.block.0.weight": torch.zeros(9, 4, 5)})
    assert other.block.knots == 4 and other.block.block[0].weight.shape[0] == 5
    checkpoints.load(other, state)
    torch.testing.assert_close(other.rebuilt("rk4", 4)(batch(2, 4)), stack(batch(2, 4)))


class Masked(nn.Module):
    """Buffers before and after its parameters, of whatever length."""

    def __init__(self, n):
        super().__init__()
        self.register_buffer("mask", torch.ones(n))
        self.linear = nn.Linear(4, 4)
        self.register_buffer("zeros", torch.zeros(n, 2))

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("order", [list, sorted, lambda items: sorted(items, reverse=True)])
@pytest.mark.parametrize("wrap", [lambda block: block, nn.Sequential])
@pytest.mark.parametrize("n", [3, 7, 8, 10])
def test_a_state_dict_is_read_whatever_stands_beside_the_coefficients(n, wrap, order):
    field, x = scattered(ContinuousWeights(wrap(Masked(n)), 8, 2)), batch(3, 4)
    state = dict(order(field.state_dict().items()))
    for load in (nn.Module.load_state_dict, checkpoints.load):
        for other in (ContinuousWeights(wrap(Masked(n)), 8, 2).double(), ContinuousWeights(wrap(Masked(n))).double()):
            load(other, state)
            assert (other.knots, other.degree) == (8, 2)
            torch.testing.assert_close(other(0.37, x), field(0.37, x))


@pytest.mark.parametrize(
    "wrong",
    [{"block.linear.weight": (9, 4, 4)}, {"block.linear.weight": (8, 4, 5)}, {"block.linear.bias": (9, 4)}],
)
def test_a_state_dict_that_is_refused_leaves_the_shapes(wrong):
    state = ContinuousWeights(Masked(8), 7).state_dict() | {k: torch.zeros(shape) for k, shape in wrong.items()}
    other = ContinuousWeights(Masked(8), 4)
    with pytest.raises(
        RuntimeError, match=r"block\.linear\.\w+ is \([\d, ]+\), and its knots and the block make it \(8"
    ):
        other.load_state_dict(state)
    assert other.knots == 4 and other.block.linear.weight.shape == (5, 4, 4)


@pytest.mark.parametrize("span", [0.7, 1.0, 3.0])
def test_a_state_dict_with_the_same_knots_leaves_the_gradients(span):
    field, other = (ContinuousWeights(nn.Linear(4, 4), 10, 3, span=span) for _ in range(2))
    other(0.1, torch.ones(1, 4)).sum().backward()
    for state in (field.state_dict(), {k: v.half() for k, v in field.state_dict().items()}):
        other.load_state_dict(state)
        assert other.block.weight.grad is not None and other.space == field.space and other.span == span


@pytest.mark.parametrize("span", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("kind", ROUNDED)
def test_rounded_knots_stand_where_they_are_meant_to(kind, span):
    for n in (3, 8, 10, 49):
        field = ContinuousWeights(nn.Linear(2, 2), ROUNDED[kind](n, span), 0, span)
        with torch.no_grad():
            field.block.bias.copy_(torch.arange(n)[:, None].expand(n, 2))
        assert [float(field.weights(span * k / n)["bias"].detach()[0]) for k in range(n)] == [*range(n)]


def test_formats_and_precisions():
    field = ContinuousWeights(BasicFunction(8, 8, order="pre", norm="group"), 3).to(memory_format=torch.channels_last)
    weight = field.block.conv1.weight
    assert weight.shape == (4, 8, 8, 3, 3) and weight[1].is_contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    field(0.4, x).sum().backward()
    half = copy.deepcopy(field).bfloat16()
    assert half(0.4, x.bfloat16()).dtype is torch.bfloat16 and half.state_dict()["knots"].dtype is F64
    with torch.autocast("cpu", torch.bfloat16):
        assert half.float()(0.4, x).dtype is torch.bfloat16


def test_replicas_and_exchanged_blocks():
    field, x = scattered(ContinuousWeights(perceptron(), 4)), batch(3, 4)
    field(0.3, x)
    field.block = scattered(ContinuousWeights(perceptron(), 4)).block
    torch.testing.assert_close(field(0.3, x), plain(field, 0.3, (x,), {}))
    assert isinstance(field._places()[0][0], Place)


def test_functions_per_slot_are_shared_by_all_steps():
    pair = PerSlot([nn.Linear(3, 3).double(), nn.Linear(3, 3).double()])
    net, x = Stack(pair, "revnet", depth=3), batch(2, 6)
    torch.testing.assert_close(net(x), Stack([*pair] * 3, "revnet")(x))
    assert set(net.state_dict()) == {f"block.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")}
    torch.testing.assert_close(net.inverse(net(x)), x)

    class Reads(nn.Module):
        def forward(self, x, context):
            return x * context

    with pytest.raises(SchemeError, match="no residual function has a parameter named context"):
        net(x, context=batch(1))
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    pair[1] = Reads()
    assert net(x, context=batch(1)).isfinite().all()
    for twin in copies:
        twin.block[1] = Reads()
        assert twin(x, context=batch(1)).isfinite().all(), "a copy notices its own exchange"


def test_functions_per_slot_forget_stacks_that_are_gone():
    pair = PerSlot([nn.Linear(3, 3).double(), nn.Linear(3, 3).double()])
    net = Stack(pair, "revnet", depth=3, step="1/depth")
    for depth in range(2, 6):  # as a regulariser does in every step
        net.rebuilt(depth=depth)
    gc.collect()
    assert len(pair.revisions) == 1


def test_a_degree_is_that_of_the_splines():
    for degree in range(4):
        space, layers = SplineSpace.uniform(4, degree), [nn.Linear(4, 4) for _ in range(4)]
        for same in (None, degree):
            assert ContinuousWeights(nn.Linear(4, 4), space, same).space == space
            assert ContinuousWeights.from_modules(layers, space, same).field.space == space
    assert ContinuousWeights(nn.Linear(4, 4), 4).degree == ContinuousWeights.from_modules(layers).field.degree == 1


def test_uneven_and_repeated_knots():
    field = scattered(ContinuousWeights(perceptron(), knots=[0, 0.5, 0.5, 1.5, 2.0], degree=1, span=2.0))
    assert field.space == SplineSpace(1, (0.25, 0.25, 0.75)) and field.knots == 3
    jump = [field.weights(t)["0.bias"] for t in (0.5 - 1e-6, 0.5)]
    assert (jump[0] - jump[1]).abs().max() > 1e-2
    assert "not uniform" in repr(field)


def real_parts(module):
    """A real module of the same numbers: those of its parameters, real parts and imaginary parts."""
    parts = nn.Module()
    for name, p in module.named_parameters():
        setattr(parts, name, nn.Parameter(torch.view_as_real(p.detach()).clone()))
    return parts


@torch.no_grad()
def test_errors_of_complex_weights_are_those_of_both_their_parts():
    layers = [nn.Linear(2, 2, dtype=torch.complex64) for _ in range(4)]
    for layer in layers:
        for p in layer.parameters():
            p.copy_(1 + 1j * torch.randn(p.shape))
    found, want = (ContinuousWeights.from_modules(ms, 2) for ms in (layers, [real_parts(layer) for layer in layers]))
    near, far = (each.field.projected(1) for each in (found, want))
    for a, b in ((found, want), (near, far)):
        assert a.error == pytest.approx(b.error, rel=1e-5) and a.error > 0.1
        assert a.errors == pytest.approx(b.errors, rel=1e-5)


def test_errors_are_computed_where_the_weights_lie():
    held = torch.empty(4, 2, device="meta", dtype=F64)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta tensor"):  # where the number would be read
        relative_errors({"w": (held, held)}, torch.ones(4, dtype=F64))


@torch.no_grad()
def test_errors_of_an_approximation_are_relative_root_mean_squares():
    layers = [nn.Linear(3, 2).double() for _ in range(6)]
    found = ContinuousWeights.from_modules(layers, knots=2)
    places = [n / 6 for n in range(6)]
    gone, was = 0.0, 0.0
    for t, layer in zip(places, layers, strict=True):
        bias = found.field(t, torch.zeros(3, dtype=torch.float64))
        weight = torch.stack([found.field(t, row) - bias for row in torch.eye(3, dtype=torch.float64)], 1)
        gone += float((weight - layer.weight).square().sum() + (bias - layer.bias).square().sum())
        was += float(layer.weight.square().sum() + layer.bias.square().sum())
    assert found.error == pytest.approx((gone / was) ** 0.5, rel=1e-6)
