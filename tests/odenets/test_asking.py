"""Functions that ask what they run under, hang hooks on tensors, begin to do otherwise: right in each mode, or said."""

import threading
import time

import pytest
import torch
from stacks import F64, data, quiet
from torch import nn

from odenets import SchemeError

MODES = ["checkpoint", "reverse", "reverse(drift=false, every=0)", "reverse(every=1)", "2*store + 2*reverse"]
BY_INVERSE = [*MODES[1:], "exact"]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return 0.3 * torch.tanh(self.linear(x))


class AsksForTheMode(Layer):
    def forward(self, x):
        y = super().forward(x)
        return y if torch.is_grad_enabled() else 3 * y


def doubled(y):
    return 2 * y if y.requires_grad else y


class AsksElsewhere(Layer):
    """In a method, which asks a function, which asks the tensor."""

    def forward(self, x):
        return self.more(super().forward(x))

    def more(self, y):
        return doubled(y)


class Hooks(Layer):
    def forward(self, x):
        y = super().forward(x)
        y.register_hook(lambda g: 2 * g)
        return y


class Retains(Layer):
    def forward(self, x):
        y = super().forward(x)
        y.retain_grad()
        return y


class HooksItsArgument(Layer):
    def forward(self, x):
        x.register_hook(lambda g: 2 * g)
        return super().forward(x)


class LeavesARetainedOne(Retains):
    def forward(self, x):
        self.left = super().forward(x)
        return self.left


def net_of(make, mode, scheme="leapfrog"):
    torch.manual_seed(0)
    return quiet([make() for _ in range(4)], scheme, backprop=mode).double()


def trained(net, passes=3):
    """Outputs and gradients of some passes: what holds in the first one only shows in the second."""
    found = []
    for _ in range(passes):
        x = data(3, 4).requires_grad_()
        y = net(x)
        y.square().sum().backward()
        found += [y.detach(), x.grad]
    return [*found, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [AsksForTheMode, AsksElsewhere, Hooks, Retains])
def test_functions_that_ask_for_a_graph_have_one(make, mode):
    torch.testing.assert_close(trained(net_of(make, mode)), trained(net_of(make, "store")), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mode", ["exact"])
@pytest.mark.parametrize("make", [AsksForTheMode, AsksElsewhere, Hooks])
def test_functions_that_ask_for_a_graph_have_one_on_the_grid(make, mode):
    want = trained(net_of(make, "exact(store=true)"))
    torch.testing.assert_close(trained(net_of(make, mode)), want, rtol=0, atol=0)


def test_without_a_loss_on_a_stream_they_are_undone_with_a_graph():
    found = []
    for mode in ("store", "reverse"):
        net, x = net_of(AsksForTheMode, mode), data(3, 4).requires_grad_()
        for _ in range(2):
            net.final_state(x)[0].square().sum().backward()
        found.append([x.grad, *(p.grad for p in net.parameters() if p.grad is not None)])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("make", [HooksItsArgument, LeavesARetainedOne])
@pytest.mark.parametrize("mode", ["checkpoint", "checkpoint(2)", "checkpoint(4)", *BY_INVERSE])
def test_gradients_that_an_inverse_does_not_know_as_a_whole(make, mode):
    if mode in BY_INVERSE:
        with pytest.raises(SchemeError, match=r"argument, whose gradient|retains the gradient"):
            trained(net_of(make, mode))
        return
    torch.testing.assert_close(trained(net_of(make, mode)), trained(net_of(make, "store")), rtol=1e-9, atol=1e-10)


class Begins(Layer):
    """Returns auxiliary values once it is told to."""

    on = False

    def forward(self, x):
        y = super().forward(x)
        return (y, {"energy": y.square().sum()}) if self.on else y


@pytest.mark.parametrize("scheme", ["leapfrog", "rk4", "bdia"])
@pytest.mark.parametrize("mode", ["store", "offload", "checkpoint", "reverse", "exact"])
def test_auxiliary_values_that_begin_late_are_asked_for_once(scheme, mode):
    if scheme == "rk4" and mode in BY_INVERSE:
        return
    net = net_of(Begins, mode, scheme)
    trained(net)
    for m in net.modules():
        m.on = True
    with pytest.raises(SchemeError, match=r"returned a tuple.*\n  Call the stack again"):
        trained(net)
    trained(net)
    y, values = net(data(3, 4), aux=True)
    assert values["energy"].requires_grad
    (y.sum() + values["energy"]).backward()


@pytest.mark.parametrize("mode", ["store", "checkpoint", "reverse"])
def test_a_type_error_of_the_function_is_its_own(mode):
    class Mistaken(Layer):
        def forward(self, x):
            return super().forward(x) + ((1, 2) if not self.training else 0)

    net = net_of(Mistaken, mode)
    trained(net)
    net.steps[0].fs[0].training = False
    with pytest.raises(TypeError, match="tuple"):
        trained(net)


class Marked(torch.Tensor):
    """Tensors that say what they are."""


class ReadsTheMark(Layer):
    def forward(self, x):
        return super().forward(x) * (2 if isinstance(x, Marked) else 1)


@pytest.mark.parametrize("mode", [*MODES, "checkpoint(4)"])
def test_subclasses_stay_what_they_are(mode):
    found = []
    for m in ("store", mode):
        net, x = net_of(ReadsTheMark, m), data(3, 4).as_subclass(Marked).requires_grad_()
        net(x).square().sum().backward()
        found.append([g.as_subclass(torch.Tensor) for g in (x.grad, *(p.grad for p in net.parameters()))])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


class Scratch(Layer):
    """Writes down what it reads a moment later."""

    def forward(self, x):
        self.mean = x.detach().mean()
        time.sleep(0.0005)
        return super().forward(x) + self.mean


@pytest.mark.parametrize("mode", ["checkpoint", "checkpoint(2)", "reverse"])
def test_threads_do_not_meet_what_is_put_back(mode):
    net = net_of(Scratch, mode)
    inputs = [k * data(3, 4) for k in (1, 2, 3)]

    def gradients(x):
        return torch.autograd.grad(net(x).square().sum(), [*net.parameters()])

    want, found = [gradients(x) for x in inputs], [None] * 3

    def work(i):
        found[i] = [gradients(inputs[i]) for _ in range(3)][-1]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-10)


class Leaves(Layer):
    """Leaves behind its value, and what is made of its parameters alone."""

    def forward(self, x):
        self.value = super().forward(x)
        self.penalty = self.linear.weight.sum()  # whose graph saves nothing
        return self.value


def gradient_awaited(x):
    found = []
    x.register_hook(found.append)
    return found


@pytest.mark.parametrize("mode", BY_INVERSE)
@pytest.mark.parametrize("wait", [torch.Tensor.retain_grad, gradient_awaited])
def test_who_awaits_a_gradient_of_what_was_left_behind_is_told(mode, wait):
    net = net_of(Leaves, mode)
    left = [f for step in net.steps for f in step.modules() if isinstance(f, Leaves)]
    for _ in range(2):
        y = net(data(3, 4))
        wait(left[-1].value)
        with pytest.raises(SchemeError, match="retains its gradient or has a hook"):
            y.square().sum().backward()
        # What no stream enters has a whole graph.
        y = net(data(3, 4))
        wait(left[-1].penalty)
        (y.square().sum() + sum(f.penalty for f in left)).backward()


class Dense(Layer):
    def forward(self, x):
        return super().forward((x if x.layout is torch.strided else x.to_dense()).to(F64))


STREAMS = {
    "int64": lambda: torch.ones(3, 4, dtype=torch.int64),
    "bool": lambda: torch.ones(3, 4, dtype=torch.bool),
    "sparse": lambda: data(3, 4).to_sparse(),
}


@pytest.mark.parametrize("mode", ["store", "checkpoint", "auto(memory=1GB)", "reverse", "reverse(every=1)", "exact"])
@pytest.mark.parametrize("kind", STREAMS)
def test_streams_that_no_inverse_makes_again_are_refused(kind, mode):
    net = net_of(Dense, mode)
    if mode in BY_INVERSE:
        with pytest.raises(SchemeError, match=r"not made again as it was.*\n  Give"):
            net(STREAMS[kind]())
        return
    want = net_of(Dense, "store")
    for n in (net, want):
        n(STREAMS[kind]()).square().sum().backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], [p.grad for p in want.parameters()])


@pytest.mark.parametrize("mode", [*MODES, "exact", "auto(memory=1GB)"])
def test_shapes_without_values(mode):
    net = net_of(Layer, mode).to("meta")
    x = torch.empty(3, 4, dtype=F64, device="meta", requires_grad=True)
    net(x).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_plan_is_not_measured_by_dual_numbers():
    found = [
        torch.autograd.functional.jacobian(net_of(Layer, mode), data(3, 4), vectorize=True, strategy="forward-mode")
        for mode in ("store", "auto(memory=1GB)")
    ]
    torch.testing.assert_close(*found)
