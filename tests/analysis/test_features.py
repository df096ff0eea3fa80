"""What is kept is what a module returned, whatever comes after it; and looking changes nothing."""

import copy

import pytest
import torch
from torch import nn

from odenets import Stack, create_model
from odenets.analysis import Features, alignment, layer_cam, places
from odenets.models import DenseNet, RevCol
from schemes import SchemeError

NETS = {
    "resnet": lambda: create_model("resnet18", widths=(4, 8, 8, 8), num_classes=3),
    "densenet": lambda: create_model("densenet_bc40_k36", growth=4, num_classes=3),
    "revcol": lambda: RevCol((4, 8), (1, 1), columns=2, num_classes=3),
}


def single(net, x):
    """Names of the modules that give one tensor, once, with a clone of it; and what the net gives."""
    seen, handles = {}, []
    for name, module in net.named_modules():
        keep = lambda m, a, y, name=name: seen.setdefault(name, []).append(  # noqa: E731
            y.detach().clone() if isinstance(y, torch.Tensor) else None
        )
        handles.append(module.register_forward_hook(keep))
    result = net(x)
    for handle in handles:
        handle.remove()
    return {name: ys[0] for name, ys in seen.items() if len(ys) == 1 and ys[0] is not None}, result


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_every_place_keeps_what_its_module_returned(name, grad):
    net, x = NETS[name]().eval(), torch.randn(2, 3, 32, 32)
    with torch.set_grad_enabled(grad):
        want, plain = single(net, x)
        with Features(net, list(want)) as found:
            result = net(x)
    assert torch.equal(result, plain)
    for place, value in found.items():
        assert torch.equal(value, want[place]), place
    if grad:  # The net and its gradients are those of a run without.
        for one, other in zip(
            torch.autograd.grad(result.sum(), list(net.parameters()), allow_unused=True),
            torch.autograd.grad(plain.sum(), list(net.parameters()), allow_unused=True),
            strict=True,
        ):
            assert one is other is None or torch.equal(one, other)


def test_the_gradient_of_a_place_is_that_before_it_was_written_into():
    net, x = NETS["resnet"]().eval(), torch.randn(2, 3, 32, 32)
    names = list(single(net, x)[0])
    with Features(net, names) as found:
        score = net(x)[:, 0].sum()
    edges = {name: found.edge(name) for name in names}
    grads = torch.autograd.grad(score, list(edges.values()), allow_unused=True)
    for name, grad in list(zip(names, grads, strict=True))[::12]:
        # Plainly: the derivative by a zero that is added to what the module returns.
        zero = torch.zeros_like(found[name], requires_grad=True)
        handle = net.get_submodule(name).register_forward_hook(lambda m, a, y, zero=zero: y + zero)
        (want,) = torch.autograd.grad(net(x)[:, 0].sum(), zero)
        handle.remove()
        torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-6, msg=name)


def test_writes_past_autograd_are_seen_as_well():
    class Net(nn.Sequential):
        def forward(self, x):
            y = self[0](x)
            y.data.mul_(2)
            return self[1](y)

    net, x = Net(nn.Linear(2, 2), nn.Linear(2, 2)), torch.randn(3, 2)
    with Features(net, ["0", "1"]) as found:
        net(x)
    torch.testing.assert_close(found["0"], net[0](x))
    torch.testing.assert_close(found["1"], net[1](2 * net[0](x)))


def test_a_tensor_that_was_written_into_is_not_taken_for_what_was_returned():
    """Zeros stay zeros under a ReLU in place; their gradient does not."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(inplace=True), nn.Linear(2, 1))
    nn.init.zeros_(net[0].weight)
    with Features(net, ["0"]) as found:
        score = net(torch.ones(1, 2)).sum()
    assert torch.autograd.grad(score, found["0"], allow_unused=True, retain_graph=True) == (None,)
    assert not torch.autograd.grad(score, found.edge("0"))[0].any()


def test_a_module_that_runs_several_times_has_a_place_per_call():
    f = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    stack, x = Stack(f, "heun2", depth=2), torch.randn(3, 4)
    name = next(n for n, m in stack.named_modules(remove_duplicate=False) if m is f)
    want = []
    handle = f.register_forward_hook(lambda m, a, y: want.append(y.clone()))
    stack(x)
    handle.remove()
    with Features(stack, [f"{name}@{k}" for k in range(4)]) as found:
        stack(x)
    assert all(torch.equal(found[f"{name}@{k}"], want[k]) for k in range(4))
    with Features(stack, [name]), pytest.raises(SchemeError, match=r"more than once.*\n.*@0, .*@1"):
        stack(x)
    with Features(stack, [f"{name}@4"]) as found:
        stack(x)
    with pytest.raises(SchemeError, match="no call 4; the module ran 4 times"):
        found[f"{name}@4"]
    # Both names of a shared module answer; items and calls go together.
    both = nn.ModuleDict({"a": f, "b": f})
    with Features(both, ["a", "b@0"]) as found:
        f(x)
    assert torch.equal(found["a"], found["b@0"])
    net = RevCol((4, 8), (1, 1), columns=2, num_classes=3).eval()
    with Features(net, ["columns.steps.1@0:2", "columns.steps.1:2"]) as found:
        net(torch.rand(1, 3, 16, 16))
    assert torch.equal(found["columns.steps.1@0:2"], found["columns.steps.1:2"])


@pytest.mark.parametrize("backprop", ["store", "checkpoint", "reverse"])
def test_each_pass_begins_anew_and_a_backward_pass_is_none(backprop):
    stack = Stack([nn.Linear(2, 2) for _ in range(4)], "revnet", backprop=backprop)
    with Features(stack, ["steps.0.fs.0"]) as found:
        for _ in range(2):
            x, seen = torch.randn(3, 4, requires_grad=True), []
            handle = stack.steps[0].fs[0].register_forward_hook(lambda m, a, y: seen.append(y.detach().clone()))  # noqa: B023
            stack(x).sum().backward()
            handle.remove()
            torch.testing.assert_close(found["steps.0.fs.0"], seen[0])
        assert len(seen) == (1 if backprop == "store" else 2)


def test_places_that_say_nothing_are_refused():
    net = nn.Sequential(nn.Linear(2, 2), nn.Identity())
    for name in ("0:x", "0:-1", "0@x", "0@", "0:"):
        with pytest.raises(SchemeError, match="no count from 0; write 0"):
            Features(net, [name])
    with pytest.raises(SchemeError, match=r"no module '7'.*0, 1"):
        Features(net, ["7"])
    with Features(net, ["0"]) as found:
        net(torch.ones(1, 2))
    with pytest.raises(SchemeError, match="1: not among the places"):
        found["1"]

    class Gives(nn.Module):
        def forward(self, x):
            return {"y": x}

    with Features(Gives(), [""]) as found, pytest.raises(SchemeError, match="returns a dict"):
        found.model(torch.ones(1))


class Guarded(nn.BatchNorm2d):
    """A norm that stays asleep, as detectors write it."""

    def train(self, mode=True):
        return super().train(False)


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_keeps_its_mode_and_its_statistics(fails):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Guarded(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.append(nn.Sequential(nn.Dropout(), nn.Linear(4, 2)))
    net.train()
    net[1].eval(), net[5][0].eval()
    net[2].training = True
    before, state = [m.training for m in net.modules()], copy.deepcopy(net.state_dict())
    x, y = torch.randn(6, 3, 4, 4), torch.arange(6) % 2
    for tool in (
        lambda: layer_cam(net, x, ["9" if fails else "1"]),
        lambda: alignment(net, [(x, y - int(fails))], ["1"]),
    ):
        if fails:
            with pytest.raises(SchemeError):
                tool()
        else:
            tool()
        assert [m.training for m in net.modules()] == before
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


STACKS = {
    "euler": [6] * 4,
    "rk4": [6] * 4,
    "revnet": [3] * 4,
    "dense(6)": [6, 12, 18],
    "leapfrog": [6] * 4,
    "bdia": [6] * 4,
}


@pytest.mark.parametrize("scheme", STACKS)
def test_the_places_of_steps_are_their_readouts(scheme):
    """All that a step's streams make together: not one half of a coupling, nor the input of joined streams."""
    widths = STACKS[scheme]
    stack = Stack([nn.Linear(width, min(6, widths[0])) for width in widths], scheme).eval()
    x = torch.randn(5, 6)
    with torch.no_grad(), Features(stack, places(stack)) as found:
        stack(x)
    with torch.no_grad():
        trajectory = stack.trajectory(x)
    assert len(found.items()) == len(trajectory) == stack.depth
    for (_, value), wanted in zip(found.items(), trajectory, strict=True):
        torch.testing.assert_close(value, wanted)


def test_the_readout_of_joined_streams_grows():
    net = DenseNet([2, 3], growth=4, stem="conv3", num_classes=3).eval()
    with torch.no_grad(), Features(net, places(net)) as found:
        net(torch.randn(2, 3, 16, 16))
    assert [value.shape[1] for _, value in found.items()] == [12, 16, 12, 16, 20]
    with pytest.raises(SchemeError, match="only the step of a stack"):
        Features(net, ["levels.0:readout"])
