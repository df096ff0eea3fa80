"""What residual functions reach besides their parameters: closures, globals, objects, arrays, generators.

A gradient that would be lost is refused, a write in between raises, and what a function counts is counted once.
"""

import itertools
import random
import threading

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from odenets import Stack
from schemes import SchemeError

REVERSED = ["reverse", "reverse(every=0)", "exact", "reverse + store"]
AGAIN = ["checkpoint", "reverse", "exact", "auto(memory=1GB)"]
WEIGHT: Tensor  # what a function reads as a global


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(4, 4, bias=False).double()


class Box:
    """A plain object that holds something."""

    def __init__(self, held):
        self.held = held

    def __call__(self, x):
        return torch.tanh(x @ self.held)


class Slots:
    __slots__ = ("n",)

    def __init__(self):
        self.n = 0


class Through(nn.Module):
    """A layer of its own, and whatever ``read`` gives it."""

    def __init__(self, read, held=None):
        super().__init__()
        self.layer, self.read, self.held = linear(1), read, held

    def forward(self, x):
        return torch.tanh(self.layer(x)) + self.read(self, x)


def by_global(x):
    return torch.tanh(x @ WEIGHT)


def readers(layer):
    """Functions that read a layer's weight without holding it as a parameter."""
    global WEIGHT
    w = WEIGHT = layer.weight
    return {
        "closure": lambda x: torch.tanh(x @ w),
        "global": by_global,
        "callable object": Box(w),
        "bound method": Box(w).__call__,
        "plain object": Through(lambda own, x: x @ own.held.held, Box(w)),
        "list of layers": Through(lambda own, x: own.held[0](x), [layer]),
        "dictionary": Through(lambda own, x: x @ own.held["w"], {"w": w}),
    }


NAMES = list(readers(linear()))


@pytest.mark.parametrize("mode", REVERSED)
@pytest.mark.parametrize("name", NAMES)
def test_a_captured_weight_is_refused_also_where_nothing_else_is_trained(name, mode):
    """Then no backward pass comes to the step, and its gradient would be missing without a word."""
    f = readers(linear())[name]
    if isinstance(f, nn.Module):
        f.layer.requires_grad_(False)
    stack, head, x = Stack([f] * 4, "revnet", backprop=mode), nn.Linear(8, 1).double(), torch.randn(5, 8).double()
    with pytest.raises(SchemeError, match="neither its parameter nor its argument"):
        head(stack(x)).sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_give_a_captured_weight_its_gradient(name):
    x, found = torch.randn(5, 8).double(), []
    for mode in ("store", "checkpoint", "auto(memory=1GB)"):
        layer = linear()
        Stack([readers(layer)[name]] * 4, "revnet", backprop=mode)(x).square().sum().backward()
        found.append(layer.weight.grad)
    assert all(torch.allclose(g, found[0], rtol=1e-10) for g in found)


def test_a_weight_that_is_trained_later_is_noticed():
    layer, x = linear().requires_grad_(False), torch.randn(5, 8, requires_grad=True, dtype=torch.float64)
    stack = Stack([readers(layer)["closure"]] * 4, "revnet", backprop="reverse")
    stack(x).sum().backward()
    layer.requires_grad_(True)
    with pytest.raises(SchemeError, match="neither its parameter nor its argument"):
        stack(x).sum().backward()


@pytest.mark.parametrize("mode", AGAIN)
@pytest.mark.parametrize("name", NAMES)
def test_a_captured_tensor_that_is_written_to_before_the_backward_pass_is_an_error(name, mode):
    layer = linear().requires_grad_(False)
    stack = Stack([readers(layer)[name]] * 4, "revnet", backprop=mode)
    x = torch.randn(5, 8, requires_grad=True, dtype=torch.float64)
    y = stack(x)
    with torch.no_grad():
        layer.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match=r"in place|inplace"):
        y.sum().backward()


class Given(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = linear(1)

    def forward(self, x, context):
        return torch.tanh(self.layer(x)) + 0.3 * (context["f"] if isinstance(context, dict) else context)(x)


@pytest.mark.parametrize("mode", AGAIN)
@pytest.mark.parametrize("kind", ["module", "dictionary", "object", "closure"])
def test_a_context_that_computes(kind, mode):
    """Its weights get their gradient or are refused, and a write to a frozen one raises."""

    def given(layer):
        w = layer.weight
        return {"module": layer, "dictionary": {"f": layer}, "object": Box(w), "closure": lambda x: x @ w}[kind]

    x, layer = torch.randn(5, 8).double(), linear()
    stack = Stack([Given() for _ in range(4)], "revnet", backprop=mode).requires_grad_(False)
    if mode in ("reverse", "exact"):
        with pytest.raises(SchemeError, match="neither its parameter nor its argument"):
            stack(x, context=given(layer))
    else:
        want = linear()
        stack(x, context=given(layer)).square().sum().backward()
        stack.backprop = "store"
        stack(x, context=given(want)).square().sum().backward()
        assert torch.allclose(layer.weight.grad, want.weight.grad, rtol=1e-10)
        stack.backprop = mode
    y = stack(x.requires_grad_(), context=given(layer.requires_grad_(False)))
    with torch.no_grad():
        layer.weight.mul_(3)
    with pytest.raises(RuntimeError, match=r"in place|inplace"):
        y.sum().backward()


class Counted(nn.Module):
    """Divides by what it counts or draws."""

    def __init__(self, kind):
        super().__init__()
        self.layer, self.kind = linear(1), kind
        self.state = {
            **{"object": Box(0), "slots": Slots(), "numpy": np.random.default_rng(0), "python": random.Random(0)},
            **{"older numpy": np.random.RandomState(0), "array": np.zeros(2), "bytes": bytearray(1)},
            **{"object in a list": [Box(0)], "generator in an object": Box(random.Random(0))},
        }[kind]

    def next(self):
        s = self.state
        if self.kind in ("numpy", "python"):
            return 1 + s.random()
        if self.kind == "older numpy":
            return 1 + s.rand()
        if self.kind == "generator in an object":
            return 1 + s.held.random()
        if self.kind in ("array", "bytes"):
            s[0] += 1
            return float(s[0])
        if self.kind == "slots":
            s.n += 1
            return s.n
        box = s[0] if self.kind == "object in a list" else s
        box.held += 1
        return box.held

    def forward(self, x):
        return torch.tanh(self.layer(x)) / self.next()


COUNTED = ["object", "slots", "numpy", "python", "older numpy", "array", "bytes", "object in a list"]


@pytest.mark.cases(20)
@pytest.mark.parametrize("mode", AGAIN)
@pytest.mark.parametrize("kind", [*COUNTED, "generator in an object"])
def test_what_a_function_counts_or_draws_is_counted_and_drawn_once(kind, mode):
    found = []
    for m in ("store", mode):
        torch.manual_seed(0)
        stack = Stack([Counted(kind) for _ in range(4)], "revnet", backprop=m)
        x = torch.randn(5, 8, requires_grad=True, dtype=torch.float64)
        found.append([torch.autograd.grad(stack(x).square().sum(), x)[0] for _ in range(3)])
    bound = 1e-3 if mode == "exact" else 1e-9  # its streams lie on a grid
    assert all(torch.allclose(a, b, rtol=bound, atol=bound) for a, b in zip(*found, strict=True))


def test_a_list_in_which_a_closure_counts_is_left_to_it():
    """Whoever counts evaluations wants those of the backward pass too."""
    made = []
    x, layer = torch.randn(5, 8, requires_grad=True, dtype=torch.float64), linear()

    def f(x):
        made.append(1)
        return torch.tanh(x @ layer.weight.detach())

    for mode in ("checkpoint", "reverse(every=0)"):
        stack = Stack([f] * 4, "revnet", backprop=mode)
        stack(x).sum().backward()
        made.clear()
        stack(x).sum().backward()
        assert len(made) == 8, mode


@pytest.mark.parametrize("mode", ["checkpoint", "reverse", "exact"])
@pytest.mark.parametrize("held", [itertools.count(1), iter(range(1, 99))], ids=["count", "iterator"])
def test_an_iterator_that_moves_on_is_refused(held, mode):
    f = Through(lambda own, x: x / next(own.held), held)
    with pytest.raises(SchemeError, match=r"advances a .* that it holds.*\n.*backprop='store'"):
        Stack([f] * 4, "revnet", backprop=mode)(torch.randn(5, 8, requires_grad=True, dtype=torch.float64))


class Running(nn.Module):
    """Writes in place to a tensor that is no buffer."""

    def __init__(self, frozen):
        super().__init__()
        self.layer = linear(1)
        start = torch.zeros(4, dtype=torch.float64)
        self.mean = nn.Parameter(start, requires_grad=False) if frozen else start

    def forward(self, x):
        y = torch.tanh(self.layer(x))
        with torch.no_grad():
            self.mean.mul_(0.5).add_(y.mean(0))
        return y - self.mean.clone()


@pytest.mark.parametrize("frozen", [False, True])
def test_measuring_leaves_no_trace(frozen):
    x, found = torch.randn(5, 8, dtype=torch.float64), []
    for measured in (False, True):
        torch.manual_seed(0)
        stack = Stack([Running(frozen) for _ in range(4)], "revnet", backprop="store")
        if measured:
            stack.plan(x)
        found.append(stack(x))
    assert torch.equal(*found)


def test_a_large_tensor_that_measuring_would_write_to_is_refused():
    class Large(Running):
        def forward(self, x):
            with torch.no_grad():
                self.table.add_(1)
            return torch.tanh(self.layer(x))

    functions = [Large(False) for _ in range(4)]
    for f in functions:
        f.table = nn.Parameter(torch.zeros(2**19), requires_grad=False)
    with pytest.raises(SchemeError, match=r"writes in place.*\n.*register_buffer"):
        Stack(functions, "revnet").plan(torch.randn(5, 8, dtype=torch.float64))


@pytest.mark.parametrize("mode", ["reverse", "reverse(every=0)", "exact"])
def test_a_misfit_is_said_before_growth_is_measured(mode):
    with pytest.raises(SchemeError, match=r"returned .*the stream that it updates is"):
        Stack([nn.Linear(4, 3) for _ in range(4)], "revnet", backprop=mode)(torch.randn(5, 8))


def test_threads_that_begin_together_train_batchnorm():
    functions = [nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Tanh()) for _ in range(6)]
    stack = Stack(functions, "revnet", backprop="reverse").double()
    plain = Stack(functions, "revnet", backprop="store").double()
    xs = [torch.randn(6, 8, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    want = [torch.autograd.grad(plain(x).square().sum(), x)[0] for x in xs]
    found: dict[int, object] = {}

    def run(i):
        try:
            found[i] = torch.autograd.grad(stack(xs[i]).square().sum(), xs[i])[0]
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(found[i], want[i], rtol=1e-8) for i in range(4)), found
