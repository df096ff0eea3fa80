"""What a second run, a measurement or a graph of gradients must not do in silence."""

import warnings
from functools import partial
from inspect import signature

import pytest
import torch
from stacks import F64, data, quiet
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from odenets import SchemeError, Stack
from odenets.backprop.members import Namespace

MODES = ["checkpoint", "reverse", "reverse(every=1)", "exact", "auto(memory=1GB)", "2*store + 2*reverse"]
REVERSED = ["reverse", "reverse(every=1)", "reverse(drift=false)", "exact", "2*store + 2*reverse"]


def net_of(make, mode, scheme="leapfrog"):
    torch.manual_seed(0)
    return quiet([make() for _ in range(4)], scheme, backprop=mode).double()


def layer():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh())


def grads(net, x):
    return [x.grad, *(p.grad for p in net.parameters())]


# Gradients of gradients: the stored ones, or a refusal, whoever asks and for what.
def of_the_input(net, x):
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return torch.autograd.grad(g.square().sum(), x, allow_unused=True)


def of_the_weights(net, x):
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return torch.autograd.grad(g.square().sum(), [*net.parameters()], allow_unused=True)


def of_weights_by_weights(net, x):
    weights = [*net.parameters()]
    found = torch.autograd.grad(net(x.detach()).sum(), weights, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in found), weights, allow_unused=True)


def of_an_input_that_was_made(net, x):
    made = 1.5 * x
    (g,) = torch.autograd.grad(net(made).square().sum(), made, create_graph=True)
    return torch.autograd.grad(g.square().sum(), made, allow_unused=True)


def of_a_middle_state(net, x):
    *_, middle, last = net.trajectory(x)
    (g,) = torch.autograd.grad(last.square().sum(), middle, create_graph=True)
    return torch.autograd.grad(g.square().sum(), middle, allow_unused=True)


def of_a_hooked_state(net, x):
    states = []
    net.steps[2].register_forward_hook(lambda step, given, out: states.append(out[0]))
    y = net(x)
    (g,) = torch.autograd.grad(y.square().sum(), states[0], create_graph=True)
    return torch.autograd.grad(g.square().sum(), states[0], allow_unused=True)


def of_what_comes_after(net, x):
    scale = torch.ones((), dtype=F64, requires_grad=True)
    (g,) = torch.autograd.grad((scale * net(x)).square().sum(), x, create_graph=True)
    return torch.autograd.grad(g.square().sum(), scale, allow_unused=True)


def forwards_by_going_backwards_twice(net, x):
    return torch.autograd.functional.jvp(net, x.detach(), torch.ones_like(x))


WAYS = [
    *(of_the_weights, of_weights_by_weights, of_the_input, of_an_input_that_was_made, of_a_middle_state),
    *(of_a_hooked_state, of_what_comes_after, forwards_by_going_backwards_twice),
]


def by_products(net, x):
    return torch.autograd.functional.hvp(lambda x: net(x).square().sum(), x.detach(), torch.ones_like(x))


@pytest.mark.cases(16)
@pytest.mark.parametrize("mode", [*MODES, "reverse(drift=false)"])
@pytest.mark.parametrize("way", [*WAYS, by_products])
def test_gradients_of_gradients_are_given_or_refused(way, mode):
    want = way(net_of(layer, "store"), data(3, 4).requires_grad_())
    net = net_of(layer, mode)
    if mode in REVERSED:
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            way(net, data(3, 4).requires_grad_())
        return
    torch.testing.assert_close(way(net, data(3, 4).requires_grad_()), want)


@pytest.mark.cases(18)
# Who holds a state may write to it.
@pytest.mark.parametrize("mode", REVERSED)
@pytest.mark.parametrize("scheme", ["leapfrog", "alf", "momentum"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_write_to_a_middle_state_changes_no_gradient(place, scheme, mode):
    found = []
    for write in (False, True):
        net, x = net_of(layer, mode, scheme), data(3, 4).requires_grad_()
        outputs = net.trajectory(x)
        if write:
            with torch.no_grad():
                outputs[place].mul_(2)
        try:
            outputs[-1].sum().backward()
        except RuntimeError as error:
            assert "changed in place" in str(error) or "modified by an inplace" in str(error)
            return
        found.append(grads(net, x))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("mode", REVERSED[:-1])  # the last stores its first steps, which want the input
def test_an_input_that_is_used_again_is_no_drift(mode):
    """A loader that fills one tensor anew for each batch."""
    net, x = net_of(layer, mode, "revnet"), data(3, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            y = net(x)
            x.mul_(3)
            y.sum().backward()


class WritesWhatWasSaved(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x).tanh()
        y.mul_(2)
        return y.sin()


@pytest.mark.parametrize("mode", ["store", "offload", *MODES, "checkpoint(4)"])
def test_a_write_to_what_autograd_has_saved_is_an_error(mode):
    net = net_of(WritesWhatWasSaved, mode)
    with pytest.raises(RuntimeError, match=r"in place|inplace"):
        net(data(3, 4)).sum().backward()


# Hooks and modes are of passes, not of measurements.
@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("mode", ["store", *MODES])
@pytest.mark.parametrize("removed", [False, True])
def test_backward_hooks_run_once_a_pass_as_at_the_call(removed, mode):
    found = []
    for m in ("store", mode):
        net, calls, x = net_of(layer, m), [], data(3, 4).requires_grad_()

        def double(module, given, out, calls=calls):
            calls.append(module)
            return tuple(None if g is None else 2 * g for g in given)

        handles = [step.fs[0][0].register_full_backward_hook(double) for step in net.steps]
        y = net(x)
        for handle in handles if removed else ():
            handle.remove()
        y.sum().backward()
        assert len(calls) == 4
        found.append(grads(net, x))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-9 if mode == "exact" else 1e-12)


# From 2.15 on torch asks whether what a selective checkpoint keeps passes the hooks on saved tensors around it.
HOOKED = [True, False] if "respect_saved_tensors_hooks" in signature(checkpoint).parameters else []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{"respect_saved_tensors_hooks": v} for v in HOOKED] or [{}])
def test_a_selective_checkpoint_around_the_stack(options, mode):
    context = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    found = []
    for m in ("store", mode):
        net, x = net_of(lambda: nn.Sequential(layer(), nn.Dropout(0.4)), m), data(3, 4).requires_grad_()
        torch.manual_seed(1)
        checkpoint(net, x, use_reentrant=False, context_fn=context, **options).square().sum().backward()
        found.append(grads(net, x))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-7 if mode == "exact" else 1e-12)


@pytest.mark.parametrize("mode", ["checkpoint", *REVERSED])
def test_batches_of_gradients_where_functions_draw(mode):
    net = net_of(lambda: nn.Sequential(layer(), nn.Dropout(0.4)), mode)
    with pytest.raises(SchemeError, match=r"batch of gradients .*\n.*model.eval"):
        torch.autograd.functional.jacobian(net, data(3, 4), vectorize=True)
    want = torch.autograd.functional.jacobian(net.eval(), data(3, 4))
    torch.testing.assert_close(torch.autograd.functional.jacobian(net, data(3, 4), vectorize=True), want)


# Types.
@pytest.mark.parametrize("mode", ["reverse", "reverse(every=1)", "exact"])
def test_real_streams_that_become_complex_are_refused(mode):
    class Turned(nn.Module):
        def forward(self, x):
            return torch.complex(x, x) if not x.is_complex() else 0.1 * x

    net = net_of(Turned, mode)
    with pytest.raises(SchemeError, match="complex"):
        net(data(3, 4).requires_grad_()).abs().sum().backward()


@pytest.mark.parametrize("mode", ["reverse", "reverse(every=1)", "exact"])
def test_an_inference_tensor_is_an_input_like_another(mode):
    found = []
    for again in (False, True):
        with torch.inference_mode(again):
            x = data(3, 4)
        net = net_of(layer, mode)
        net(x).sum().backward()
        found.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*found)


def test_outputs_are_of_the_subclass_that_came_in_every_pass():
    class Marked(torch.Tensor):
        pass

    net = net_of(layer, "reverse")
    for _ in range(3):
        assert isinstance(net(data(3, 4).as_subclass(Marked).requires_grad_()), Marked)


# Arithmetic that differs with and without a graph.
@pytest.mark.parametrize("inner", ["exact", "exact + exact"])
@pytest.mark.parametrize("outer", ["reverse(every=0)", "exact"])
def test_exact_stacks_inside_of_reversed_ones_round_both_times(inner, outer):
    def make():
        return nn.Sequential(Stack([nn.Linear(2, 2) for _ in range(4)], "revnet", backprop=inner), nn.Tanh())

    net = net_of(make, outer, "revnet")
    for _ in range(4):
        net(data(3, 8)).sum().backward()
    assert net.monitor.drift == 0.0 or net.monitor.drift < 1e-14


@pytest.mark.parametrize("chosen", [None, "exact", "store"])
@pytest.mark.parametrize("outer", ["reverse(every=0)", "exact"])
def test_a_choice_inside_of_a_reversed_step_is_that_of_both_runs(outer, chosen):
    """Also the first pass, and also where it is exact: as under a stored stack around it."""
    mode = "auto(exact=true, memory=1GB)"

    def make():
        inner = Stack([nn.Linear(2, 2) for _ in range(4)], "revnet", backprop=mode)
        if chosen:
            inner.load_plan_state({"auto": {"plan": [[2, chosen]], "size": 10**9, "final": True}})
        return nn.Sequential(inner, nn.Tanh())

    found = []
    for around in ("exact(store=true)" if outer == "exact" else "store", outer):
        net, x = net_of(make, around, "revnet"), data(3, 8).requires_grad_()
        for _ in range(2):
            y = net(x)
            found.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])])
        net(x)
        assert around == "store" or net.monitor.drift < 1e-14
        assert {str(m.monitor.plan.plan) for m in net.modules() if isinstance(m, Stack) and m is not net} == {
            f"2*{chosen}" if chosen else "2*store"
        }
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)


def test_a_batch_of_nan_leaves_the_one_warning_for_later():
    net = net_of(layer, "reverse(every=0)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x in (torch.full((3, 4), torch.nan, dtype=F64), data(3, 4)):
            net(x).sum().backward()
            net(data(3, 4))
    assert not net.monitor.warned


@pytest.mark.parametrize("mode", ["store", *MODES])
def test_functions_that_begin_to_return_auxiliary_values(mode):
    class Begins(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.on = nn.Linear(4, 4), False

        def forward(self, x):
            y = torch.tanh(self.linear(x))
            return (y, {"energy": y.square().mean()}) if self.on else y

    net = net_of(Begins, mode)
    net(data(3, 4)).sum().backward()
    for step in net.steps:
        step.fs[0].on = True
    net.zero_grad()
    _, values = net(data(3, 4), aux=True)
    values["energy"].backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


# What modules are is found once and remembered, until they are others.
PASS = [0]


class Late(nn.Module):
    """Makes a buffer, an attribute or a child in the first pass or in a later one, and changes it from then on."""

    def __init__(self, at, what):
        super().__init__()
        self.linear, self.at, self.what = nn.Linear(4, 4), at, what

    def forward(self, x):
        if PASS[0] >= self.at and not hasattr(self, "norm") and not hasattr(self, "mean"):
            if self.what == "buffer":
                self.register_buffer("mean", torch.zeros(4, dtype=x.dtype))
            elif self.what == "attribute":
                self.mean = torch.zeros(4, dtype=x.dtype)
            else:
                self.norm = nn.BatchNorm1d(4, dtype=x.dtype)
        if self.what == "norm" and hasattr(self, "norm"):
            x = self.norm(x)
        elif hasattr(self, "mean"):
            x = x - self.mean
            if self.what == "buffer":
                self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
            else:
                self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return torch.tanh(self.linear(x))


@pytest.mark.cases(10)
@pytest.mark.parametrize("mode", ["checkpoint", "checkpoint(2)", "reverse", "exact", "checkpoint + reverse"])
@pytest.mark.parametrize("what", ["buffer", "attribute", "norm"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_what_modules_come_to_hold_is_read_as_by_the_stored_run(mode, what, at):
    if what == "norm" and (mode == "exact" or (at and "reverse" in mode)):
        # Its parameters have come since the call took hold of those that there were.
        with pytest.raises(SchemeError, match="neither its parameter nor its argument"):
            net = net_of(partial(Late, at, what), mode, "revnet")
            for PASS[0] in range(at + 1):
                net(data(3, 8)).square().sum().backward()
        return
    found = []
    for way in ("exact(store=true)" if mode == "exact" else "store", mode):
        net, passes = net_of(partial(Late, at, what), way, "revnet"), []
        for PASS[0] in range(4):
            net.zero_grad()
            x = data(3, 8).requires_grad_()
            net(x).square().sum().backward()
            passes.append([x.grad, *(p.grad for p in net.parameters()), *net.buffers()])
        found.append(passes)
    for want, got in zip(*found, strict=True):
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["checkpoint", "checkpoint(2)", "reverse"])
def test_modules_that_are_exchanged_between_passes(mode):
    found = []
    for way in ("store", mode):
        net, passes = net_of(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()), way), []
        for change in (None, "child", "flag", "function"):
            inner = net.steps[1].fs[0]
            inner = next(m for m in inner.modules() if isinstance(m, nn.Sequential))
            if change == "child":
                inner[2] = nn.Dropout(0.5)
            elif change == "flag":
                inner[1].track_running_stats = False
            elif change == "function":
                inner[0] = nn.Linear(4, 4, bias=False, dtype=F64)
            torch.manual_seed(1)
            net.zero_grad()
            net(data(3, 4)).square().sum().backward()
            passes.append([*(p.grad for p in net.parameters()), *net.buffers()])
        found.append(passes)
    for want, got in zip(*found, strict=True):
        assert len(want) == len(got)
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-9)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return torch.tanh(self.gate * x)


def given_to_the_call(net, x):
    given = {k: p.detach().clone().requires_grad_() for k, p in net.named_parameters()}
    return torch.func.functional_call(net, given, (x,)), [*given.values()]


def loaded(net, x):
    net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)
    return net(x), [*net.parameters()]


def replaced(net, x):
    for step in net.steps:
        step.fs[0].gate = nn.Parameter(torch.ones(1, dtype=F64))
    return net(x), [step.fs[0].gate for step in net.steps]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", [given_to_the_call, loaded, replaced])
def test_parameters_exchanged_for_equal_ones_get_the_gradient(way, mode):
    """Also those of one element, which compare equal by their value."""
    found = []
    for each in ("exact(store=true)" if mode == "exact" else "store", mode):
        net, x = net_of(Gated, each), data(3, 4)
        for _ in range(2):
            net(x).sum().backward()
        y, weights = way(net, x)
        found.append(torch.autograd.grad(y.square().sum(), weights))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("mode", ["checkpoint", "reverse"])
@pytest.mark.parametrize("kind", ["attribute", "number", "list"])
def test_what_was_exchanged_for_an_equal_tensor_is_watched_like_it(kind, mode):
    class Gain(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.gain = {"attribute": torch.ones(()), "number": 1.0, "list": [torch.ones(())]}[kind]

        def forward(self, x):
            return torch.tanh(self.linear(x)) * (self.gain[0] if kind == "list" else self.gain)

    net = net_of(Gain, mode)
    net(data(3, 4)).sum().backward()
    for step in net.steps:
        step.fs[0].gain = [torch.ones(())] if kind == "list" else torch.ones(())
    y = net(data(3, 4)).square().sum()
    for step in net.steps:
        (step.fs[0].gain[0] if kind == "list" else step.fs[0].gain).mul_(3.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.backward()


@pytest.mark.parametrize(
    "value, other, same",
    [
        (torch.ones(1), torch.ones(1), False),
        (1.0, torch.ones(()), False),
        (torch.ones(()), 1.0, False),
        (nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1)), False),
        ([], [], False),
        ({"a": 1}, {"a": 1}, False),
        ((torch.ones(1), 2), (torch.ones(1), 2), False),
        ((1.0,), (torch.ones(1),), False),
        (0.1 + 0.2, 0.3 + 1e-17 + 4e-17, True),
        (1000, int("1000"), True),
        (torch.Size([2000, 3]), torch.Size([2000, 3]), True),
        ("".join(["a", "b"]), "ab", True),
        (1.0, 2.0, False),
    ],
)
def test_what_counts_as_the_same(value, other, same):
    """Values that may be exchanged unnoticed are plain; all else is the same by identity alone."""
    held = {"other": nn.Identity(), "value": value}
    space = Namespace([held])
    assert space.same()
    held["value"] = other
    assert space.same() == same
