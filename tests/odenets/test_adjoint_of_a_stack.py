"""A stack whose solver takes the adjoint: what the backward pass calls again is called as it was, or refused."""

import pytest
import torch
from stacks import F64, data
from torch import nn

from odenets import SchemeError, Stack

SOLVER = "adaptive(dopri5, rtol=1e-7, atol=1e-9{})"


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 4, dtype=F64), 1.0

    def forward(self, x, context=None):
        y = torch.tanh(self.linear(x)) * self.scale * (1.0 if self.training else 2.0)
        return y if context is None else y * context["c"]


def net_of(adjoint, field=None, **options):
    torch.manual_seed(0)
    field = Field() if field is None else field()
    return Stack(field, SOLVER.format(", adjoint=true" if adjoint else ""), **options)


def grads(net, x):
    return [x.grad, *(p.grad for p in net.parameters())]


def swapped(net, context):
    net.block.linear = nn.Linear(4, 4, dtype=F64)


IN_BETWEEN = {
    "attribute": lambda net, context: setattr(net.block, "scale", 3.0),
    "eval": lambda net, context: net.eval(),
    "frozen": lambda net, context: net.requires_grad_(False),
    "context replaced": lambda net, context: context.update(c=torch.full((4,), 5.0, dtype=F64)),
    "module replaced": swapped,
}


@pytest.mark.parametrize("mode", ["store", "checkpoint"])
@pytest.mark.parametrize("what", IN_BETWEEN)
def test_what_is_changed_before_the_backward_pass_is_read_as_it_was(what, mode):
    found = []
    for adjoint in (False, True):
        net, x, context = net_of(adjoint, backprop=mode), data(3, 4).requires_grad_(), {"c": torch.ones(4, dtype=F64)}
        weights = [*net.parameters()]
        y = net(x, context=context)
        IN_BETWEEN[what](net, context)
        y.square().sum().backward()
        found.append([x.grad, *(p.grad for p in weights)])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_what_was_frozen_at_the_call_gets_no_gradient():
    net, x = net_of(True).requires_grad_(False), data(3, 4).requires_grad_()
    y = net(x)
    net.requires_grad_(True)
    y.sum().backward()
    assert x.grad is not None and all(p.grad is None for p in net.parameters())


WRITES = {
    "frozen weight": lambda net, context: net.block.linear.weight.mul_(0.5),
    "context": lambda net, context: context["c"].mul_(0.5),
    "data": lambda net, context: setattr(net.block.linear.weight, "data", torch.zeros(4, 4, dtype=F64)),
}


@pytest.mark.parametrize("what", WRITES)
def test_what_is_written_to_before_the_backward_pass_is_an_error(what):
    net, x, context = net_of(True).requires_grad_(False), data(3, 4).requires_grad_(), {"c": torch.ones(4, dtype=F64)}
    y = net(x, context=context)
    with torch.no_grad():
        WRITES[what](net, context)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


def test_functional_call():
    found = []
    for adjoint in (False, True):
        net, x = net_of(adjoint), data(3, 4).requires_grad_()
        given = {k: p.detach().clone().requires_grad_() for k, p in net.named_parameters()}
        torch.func.functional_call(net, given, (x,)).square().sum().backward()
        found.append([x.grad, *(p.grad for p in given.values())])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_hooks_of_parameters_run_once():
    found = []
    for adjoint in (False, True):
        net, x, calls = net_of(adjoint), data(3, 4).requires_grad_(), []
        net.block.linear.weight.register_hook(lambda g, calls=calls: calls.append(1) or 3 * g)
        for _ in range(2):
            net(x).sum().backward()
        assert len(calls) == 2
        found.append(grads(net, x))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_gradients_of_gradients_are_refused_whatever_is_asked_for():
    for way in ("input", "weights", "products"):
        net, x = net_of(True), data(3, 4).requires_grad_()
        with pytest.raises(SchemeError, match="no second derivatives"):
            if way == "products":
                torch.autograd.functional.hvp(lambda x, net=net: net(x).sum(), x.detach(), torch.ones_like(x))
            else:
                asked = [x] if way == "input" else [*net.parameters()]
                (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
                torch.autograd.grad(g.square().sum(), asked, allow_unused=True)


def test_batches_of_gradients_and_transforms_are_refused():
    net = net_of(True)
    with pytest.raises(SchemeError, match="vectorize=True"):
        torch.autograd.functional.jacobian(net, data(3, 4), vectorize=True)
    for given in (net, net_of(False)):
        with pytest.raises(SchemeError, match=r"torch\.func"):
            torch.func.vmap(given)(data(3, 4))
    with pytest.raises(SchemeError, match=r"torch\.func"):
        torch.func.grad(lambda x: net(x).sum())(data(3, 4))


class Normed(Field):
    """Depends on its training flag, and on numbers that a call moves."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4, dtype=F64)

    def forward(self, x, context=None):
        return self.norm(super().forward(x, context))


@pytest.mark.parametrize("separate", [False, True])
def test_every_call_is_guarded_as_the_first_one_is(separate):
    """In a later call the functions are run again as in the call, whether each step has a function of its own."""
    net = net_of(True, lambda: [Normed()] if separate else Normed())
    weights = [*net.parameters()]
    found = []
    for _ in range(3):
        x = data(8, 4).requires_grad_()
        y = net.train()(x)
        before = [b.clone() for b in net.eval().buffers()]
        found.append(torch.autograd.grad(y.square().sum(), [x, *weights]))
        assert all(map(torch.equal, before, net.buffers()))
    for later in found[1:]:
        torch.testing.assert_close(later, found[0])
    given = {k: 2 * p.detach().requires_grad_() for k, p in net.named_parameters()}
    y = torch.func.functional_call(net, given, (x,))
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(y.square().sum(), [*given.values()]))


class Leaves(Field):
    def forward(self, x):
        y = super().forward(x)
        self.aux = y.square().mean()
        return y


class Collects(Field):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        y = super().forward(x)
        self.seen.append(y)
        return y


class Returns(Field):
    def forward(self, x):
        y = super().forward(x)
        return y, {"energy": y.square().mean()}


class Draws(Field):
    def forward(self, x):
        return super().forward(x) * (1 + 1e-12 * torch.rand(()))


def test_what_an_adjoint_has_no_gradient_of_is_refused():
    net, x = net_of(True, Leaves), data(3, 4).requires_grad_()
    y = net(x)
    assert net.block.aux.detach() > 0  # to be logged
    with pytest.raises(RuntimeError, match="side product"):
        (y.sum() + net.block.aux).backward()
    with pytest.raises(SchemeError, match="list or dictionary"):
        net_of(True, Collects)(x)
    with pytest.raises(SchemeError, match="auxiliary values"):
        net_of(True, Returns)(x, aux=True)
    with pytest.raises(SchemeError, match="draws random numbers"):
        net_of(True, Draws)(x)
