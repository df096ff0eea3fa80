"""Situations of users that once gave wrong gradients, or an unrelated error: each in several modes and schemes."""

import random

import pytest
import torch
from invertible import distance
from stacks import WIDTH, Body, factory
from torch import nn
from torch.nn.utils import parametrizations

from odenets import Stack
from schemes.errors import SchemeError

F64 = torch.float64
AGAIN = ["checkpoint", "checkpoint(3)", "reverse", "reverse(every=2)"]  # modes that run a function a second time
SCHEMES = ["revnet", "revcol(3)"]
EACH = pytest.mark.parametrize("mode", AGAIN)
ALL = pytest.mark.parametrize("scheme", SCHEMES)


def build(make, scheme, mode, **options):
    torch.manual_seed(0)
    options = {"step": 0.5, **options}
    return factory(make, scheme, 3, channels=WIDTH, backprop=mode, **options).double()


def batch(n=5):
    return torch.randn(n, WIDTH, dtype=F64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def functions(net):
    return [f for step in net.steps for f in step.fs]


def result(net, x, y):
    """The gradients of |y|^2, with the output."""
    y.square().sum().backward()
    return {**{k: p.grad for k, p in net.named_parameters()}, "input": x.grad, "output": y.detach()}


def once(net):
    x = batch()
    return result(net, x, net(x))


# What functions keep from call to call ----------------------------------------------------------------------------


class Remembers(Body):
    """Reads what its last call left behind: in a list, a dictionary, an attribute, a buffer that comes into being."""

    def __init__(self, slot, where):
        super().__init__(slot)
        self.where, self.states, self.caches = where, [], {"inner": {}}
        self.register_buffer("late", None)
        self.generator = torch.Generator().manual_seed(3)
        self.count = 0

    def forward(self, *xs):
        y = super().forward(*xs)
        before = getattr(self, f"_{self.where}")(y.detach())
        return y if before is None else y + 0.3 * y * before.mean()

    def _list(self, y):
        self.states.append(y)
        return self.states[-2] if len(self.states) > 1 else None

    def _dict(self, y):
        before, self.caches["inner"]["key"] = self.caches["inner"].get("key"), y
        return before

    def _attribute(self, y):
        before, self.memory = getattr(self, "memory", None), y
        return before

    def _buffer(self, y):
        before, self.late = self.late, y
        return before

    def _own_generator(self, y):
        return torch.rand(y.shape, dtype=y.dtype, generator=self.generator)

    def _python_generator(self, y):
        return torch.full_like(y, random.random())

    def _numpy_generator(self, y):
        np = pytest.importorskip("numpy")
        return torch.full_like(y, float(np.random.rand()))

    def _counter(self, y):
        self.count += 1
        return torch.full_like(y, self.count)


class Renormalised(nn.BatchNorm1d):
    """A norm that reads in training the statistics that it moves."""

    def forward(self, x):
        y = (x - self.running_mean) / (self.running_var + 1e-3).sqrt()
        with torch.no_grad():
            self.running_mean.lerp_(x.mean(0), 0.3)
            self.running_var.lerp_(x.var(0), 0.3)
        return y * self.weight + self.bias


KEPT = {
    **{
        kind: lambda slot, kind=kind: Remembers(slot, kind)
        for kind in (
            *("list", "dict", "attribute", "buffer"),
            *("own_generator", "python_generator", "numpy_generator", "counter"),
        )
    },
    "statistics that are read": lambda slot: Body(slot, Renormalised(WIDTH)),
    "statistics, mean of all": lambda slot: Body(slot, nn.BatchNorm1d(WIDTH, momentum=None)),
    "spectral norm": lambda slot: Body(slot, parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))),
}


def seeded(net):
    torch.manual_seed(5)
    random.seed(5)
    pytest.importorskip("numpy").random.seed(5)
    return once(net)


@pytest.mark.cases(4)
@ALL
@pytest.mark.parametrize("kind", KEPT)
def test_what_functions_keep_is_read_as_it_was(kind, scheme):
    nets = [build(KEPT[kind], scheme, mode) for mode in ("store", *AGAIN)]
    want = seeded(nets[0])
    for net, mode in zip(nets[1:], AGAIN, strict=True):
        assert distance(seeded(net), want) <= 1e-9, mode
    want = seeded(nets[0])
    for net, mode in zip(nets[1:], AGAIN, strict=True):
        assert distance(seeded(net), want) <= 1e-9, mode
        for a, b in zip(net.buffers(), nets[0].buffers(), strict=True):
            torch.testing.assert_close(a, b)
        for f, g in zip(functions(net), functions(nets[0]), strict=True):
            if isinstance(f, Remembers):
                assert (len(f.states), f.count) == (len(g.states), g.count), mode


class Begins(Body):
    """Draws from Python's generator in some calls."""

    drawing = False

    def forward(self, *xs):
        y = super().forward(*xs)
        return y * random.random() if self.drawing else y


@pytest.mark.parametrize("mode", ["reverse", "exact"])
def test_a_function_that_begins_to_draw_is_not_run_again_with_other_numbers(mode):
    net, stored = (
        build(Begins, "revnet", mode),
        build(Begins, "revnet", "exact(store=true)" if mode == "exact" else "store"),
    )
    for _ in range(2):
        once(net)
    for f in (*functions(net), *functions(stored)):
        f.drawing = True
    with pytest.raises(SchemeError, match="generator moved"):
        once(net)
    net.zero_grad()
    for _ in range(2):  # noted from now on
        assert distance(seeded(net), seeded(stored)) <= 1e-9


# What is changed between the two passes ---------------------------------------------------------------------------


class Reads(Body):
    """Reads all that a module can hold."""

    def __init__(self, slot):
        super().__init__(slot, nn.Dropout(0.0))
        self.register_buffer("mask", torch.rand(WIDTH) + 0.5)
        self.attribute = torch.rand(WIDTH).double() + 0.5
        self.number, self.options, self.states = 0.7, {"scale": 0.5}, [torch.rand(WIDTH).double() + 0.5]
        self.frozen = nn.Parameter(torch.rand(WIDTH) + 0.5, requires_grad=False)

    def forward(self, *xs):
        factor = self.mask * self.attribute * self.frozen * self.states[0] * self.number * self.options["scale"]
        return self.outer(torch.tanh(self.middle(self.inner(torch.cat(xs, 1)) * factor)))


def set_options(f):
    f.options["scale"] = 0.1


def set_state(f):
    f.states[0] = 0 * f.states[0]


REPLACED = {
    "a buffer": lambda f: setattr(f, "mask", torch.zeros_like(f.mask)),
    "an attribute": lambda f: setattr(f, "attribute", torch.zeros_like(f.attribute)),
    "a number": lambda f: setattr(f, "number", 0.1),
    "an entry of a dictionary": set_options,
    "an element of a list": set_state,
    "a frozen weight": lambda f: setattr(f, "frozen", nn.Parameter(torch.zeros_like(f.frozen), requires_grad=False)),
    "a weight": lambda f: setattr(f.outer, "weight", nn.Parameter(torch.zeros_like(f.outer.weight))),
    "a dropout rate": lambda f: setattr(f.middle, "p", 0.9),
    "a module": lambda f: setattr(f, "middle", nn.Tanh()),
    "a hook": lambda f: f.inner.register_forward_hook(lambda m, args, y: 2 * y),
    "a hook of the inputs": lambda f: f.inner.register_forward_pre_hook(
        lambda m, args, kwargs: ((2 * args[0],), kwargs), with_kwargs=True
    ),
}


@pytest.mark.cases(24)
@EACH
@pytest.mark.parametrize("what", REPLACED)
def test_what_is_replaced_before_the_backward_pass_is_read_as_it_was(what, mode):
    found = []
    for m in ("store", mode):
        net, x = build(Reads, "revnet", m), batch()
        once(net)
        net.zero_grad()
        parameters = dict(net.named_parameters())
        y = net(x)
        for f in functions(net):
            REPLACED[what](f)
        held = [*net.state_dict().items()]
        y.square().sum().backward()
        assert all(a[0] == b[0] and a[1] is not None for a, b in zip(held, net.state_dict().items(), strict=True))
        found.append({**{k: p.grad for k, p in parameters.items()}, "input": x.grad, "output": y.detach()})
    assert distance(*found) <= 1e-9


@ALL
@EACH
@pytest.mark.parametrize("what", ["step size", "function", "mode"])
def test_what_is_set_on_the_stack_before_the_backward_pass(what, mode, scheme):
    found = []
    for m in ("store", mode):
        net, x = build(Reads, scheme, m), batch()
        parameters = dict(net.named_parameters())
        y = net(x)
        if what == "step size":
            net.set_step(0.1)
        elif what == "mode":
            net.backprop = "store"
        else:
            net.steps[1].fs[0] = nn.Identity()
        y.square().sum().backward()
        found.append({**{k: p.grad for k, p in parameters.items()}, "input": x.grad})
        assert what != "step size" or net.steps[0].h == 0.1
    assert distance(*found) <= 1e-9


WRITTEN = {
    "buffer or attribute mask": lambda f: f.mask.zero_(),
    "buffer or attribute attribute": lambda f: f.attribute.zero_(),
    "attribute": lambda f: f.states[0].zero_(),
    "parameter frozen": lambda f: f.frozen.zero_(),
    "parameter weight": lambda f: f.outer.weight.zero_(),
    "parameter bias": lambda f: setattr(f.outer.bias, "data", torch.zeros_like(f.outer.bias)),
}


@pytest.mark.cases(24)
@ALL
@EACH
@pytest.mark.parametrize("what", WRITTEN)
def test_what_is_written_to_before_the_backward_pass_is_an_error(what, mode, scheme):
    net, x = build(Reads, scheme, mode), batch()
    once(net)
    y = net(x)
    with torch.no_grad():
        for f in functions(net):
            WRITTEN[what](f)
    with pytest.raises(RuntimeError, match=f"{what}.*changed in place"):
        y.square().sum().backward()


@EACH
def test_statistics_that_move_after_a_call_in_evaluation(mode):
    """A function in evaluation reads them."""
    net, x = build(lambda slot: Body(slot, nn.BatchNorm1d(WIDTH)), "revnet", mode), batch()
    y = net.eval()(x)
    net.train()(x)
    with pytest.raises(RuntimeError, match=r"statistic of step.*changed in place"):
        y.square().sum().backward()


@EACH
@pytest.mark.parametrize("frozen", [False, True])
def test_modes_set_before_the_backward_pass_leave_statistics_as_stored(mode, frozen):
    """Training or not is that of the call, for what moves too."""
    found, left = [], []
    for m in ("store", mode):
        net, x = build(lambda slot: Body(slot, nn.BatchNorm1d(WIDTH)), "revnet", m), batch()
        if frozen:
            for f in functions(net):
                f.middle.eval()
        y = net(x)
        net.train() if frozen else net.eval()
        found.append(result(net, x, y))
        left.append([b.clone() for b in net.buffers()])
    assert distance(*found) <= 1e-9
    assert all(torch.equal(a, b) or torch.allclose(a, b, rtol=1e-12) for a, b in zip(*left, strict=True))


@pytest.mark.parametrize("mode", ["store", "reverse", "exact"])
def test_building_a_stack_draws_no_random_numbers(mode):
    fs, before = [nn.Linear(WIDTH, WIDTH) for _ in range(4)], torch.get_rng_state()
    Stack(fs, "bdia", backprop=mode)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("place", [0, 2])
def test_hooks_that_change_the_streams_of_a_step(place):
    found = []
    for mode in ("store", "checkpoint"):
        net = build(Body, "revnet", mode)
        net.steps[place].register_forward_hook(lambda m, args, out: tuple(1.5 * x for x in out))
        found.append(once(net))
    assert distance(*found) <= 1e-12
    for change in (lambda x: 1.5 * x, lambda x: x.mul_(1.5)):
        net = build(Body, "revnet", "reverse")
        once(net)
        net.steps[place].register_forward_hook(lambda m, args, out, change=change: tuple(map(change, out)))
        with pytest.raises((SchemeError, RuntimeError), match=rf"hook on step {place} changes|modified inplace"):
            once(net)
    net = build(Body, "revnet", "reverse")
    net.steps[place].register_forward_hook(lambda m, args, out: None)
    net.steps[place].register_full_backward_hook(lambda m, grads, outs: None)
    assert distance(once(net), once(build(Body, "revnet", "store"))) <= 1e-12


# Replicas and side products ---------------------------------------------------------------------------------------


def replica(net):
    """A copy whose modules hold plain tensors, computed from the parameters, as ``DataParallel`` makes them."""
    twins = {m: m._replicate_for_data_parallel() for m in net.modules()}
    for module, twin in twins.items():
        twin._former_parameters = {}
        for name, child in module._modules.items():
            if child is not None:
                twin._modules[name] = twins[child]
        for name, p in module._parameters.items():
            if p is not None:
                twin._former_parameters[name] = p * 1.0
                setattr(twin, name, twin._former_parameters[name])
    return twins[net]


@pytest.mark.parametrize("mode", ["checkpoint", "reverse"])
def test_replicas_send_gradients_to_the_parameters(mode):
    found = []
    for which in ("store", mode):
        torch.manual_seed(0)
        net = Stack([nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(4)], "revnet", backprop=which).double()
        x = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        net(x)
        replica(net)(x).square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(*found, strict=True))


class LeavesBehind(nn.Module):
    def __init__(self, where):
        super().__init__()
        self.linear, self.where, self.kept = nn.Linear(3, 3), where, [] if where == "list" else {}

    def forward(self, x):
        h = self.linear(x)
        left = h.square().mean()
        if self.where == "list":
            self.kept.append(left)
        elif self.where == "dict":
            self.kept["loss"] = left
        else:
            self.loss = left
        return torch.tanh(h)

    def left(self):
        return {"list": lambda: self.kept.pop(), "dict": lambda: self.kept["loss"]}.get(self.where, lambda: self.loss)()


@pytest.mark.parametrize("mode", ["reverse", "exact"])
@pytest.mark.parametrize("where", ["attribute", "list", "dict"])
def test_side_products_are_refused_in_every_pass(where, mode):
    net = Stack([LeavesBehind(where) for _ in range(4)], "revnet", backprop=mode)
    functions = [m for m in net.modules() if isinstance(m, LeavesBehind)]
    for _ in range(3):
        y = net(torch.randn(2, 6))
        loss = y.sum() + sum(f.left() for f in functions)
        with pytest.raises((SchemeError, RuntimeError), match=r"side product[\s\S]*aux=True"):
            loss.backward()
        for f in functions:
            f.kept.clear()
