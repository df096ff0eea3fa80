"""Reversible backpropagation in the user's graph: several passes and losses, checkpoints, and what cannot work."""

import pytest
import torch
from invertible import CHANNELS, EACH, EXACT, FEW, Function, batch, both, build, distance, gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from odenets import Stack
from odenets.backprop import Reverse
from schemes.errors import SchemeError

# Graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.cases(8)
@EACH
def test_backward_twice(name: str) -> None:
    found = []
    for stack in both(name, norm=True):
        x = batch()
        loss = stack(x).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        found.append({**{k: p.grad for k, p in stack.named_parameters()}, "input": x.grad})
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    assert distance(*found) <= EXACT


@pytest.mark.cases(10)
@EACH
@pytest.mark.parametrize("order", [(1, 3), (3, 1), (1, 2, 0, 3)])
def test_backward_from_middle_outputs_in_any_order(name: str, order: tuple[int, ...]) -> None:
    found = []
    for stack in both(name, backprop=Reverse(every=0)):
        x = batch()
        outputs = stack.trajectory(x)
        for i in order:
            outputs[i].square().mean().backward(retain_graph=True)
        found.append({**{k: p.grad for k, p in stack.named_parameters()}, "input": x.grad})
    assert distance(*found) <= EXACT


@pytest.mark.cases(10)
@EACH
def test_loss_on_middle_outputs_only(name: str) -> None:
    """The last output is not used, the graph not kept."""
    found = []
    for stack in both(name):
        x = batch()
        outputs = stack.trajectory(x)
        (outputs[1].square().mean() + outputs[2].sin().mean()).backward()
        found.append({**{k: p.grad for k, p in stack.named_parameters()}, "input": x.grad})
        if not stack.backprop.keeps_all:
            assert all(g is None for k, g in found[-1].items() if k.startswith("steps.3"))
    assert distance(*found) <= EXACT


@pytest.mark.cases(8)
@EACH
def test_loss_on_one_stream_only(name: str) -> None:
    count = len(build(name).final_state(batch()))
    for i in range(count):
        found = []
        for stack in both(name):
            x = batch()
            state = stack.final_state(x)
            if not state[i].requires_grad or state[i] is x:
                break
            state[i].square().mean().backward()
            found.append({**{k: p.grad for k, p in stack.named_parameters()}, "input": x.grad})
        if len(found) == 2:
            zero = [{k: torch.zeros(1) if g is None else g for k, g in f.items()} for f in found]
            flat = [{k: g.new_zeros(1) if not g.any() else g for k, g in f.items()} for f in zero]
            assert distance(*flat) <= EXACT, i


@pytest.mark.cases(8)
@EACH
def test_two_uses_in_one_graph(name: str) -> None:
    found = []
    for stack in both(name, norm=True):
        x = batch()
        y = stack(x)
        other = stack(torch.tanh(y[:, :CHANNELS] if y.shape[1] > CHANNELS else y.mean(1, keepdim=True) * x))
        (other.square().mean() + y.sin().mean()).backward()
        found.append({**{k: p.grad for k, p in stack.named_parameters()}, "input": x.grad})
    assert distance(*found) <= EXACT


# What cannot work -------------------------------------------------------------------------------------------------


@FEW
def test_double_backward_says_so(name: str) -> None:
    stack, x = build(name), batch()
    for loss in (lambda y: y.square().mean(), lambda y: y.sum()):  # the second needs no gradient of its gradient
        (g,) = torch.autograd.grad(loss(stack(x)), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"cannot be differentiated twice.*store"):
            g.square().sum().backward()
    torch.autograd.grad(stack(x).sum(), x, create_graph=True)  # alone it does no harm


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transforms_say_so() -> None:
    stack, x = build("revnet"), batch()
    stack(x)

    def loss(x: Tensor) -> Tensor:
        return stack(x).sum()

    for transform in (torch.func.grad, torch.func.vmap, torch.func.jacrev, torch.func.hessian):
        with pytest.raises(SchemeError, match=r"torch\.func"):
            transform(loss)(x.unsqueeze(1) if transform is torch.func.vmap else x)
    with pytest.raises(SchemeError, match=r"torch\.func"):
        torch.func.jvp(loss, (x,), (x,))
    with pytest.raises((SchemeError, RuntimeError), match=r"forward mode|forward-mode|jvp"):
        import torch.autograd.forward_ad as forward

        with forward.dual_level():
            forward.unpack_dual(stack(forward.make_dual(x.detach(), torch.ones_like(x))))
            raise RuntimeError("forward mode gave something")  # it must not get here


def test_output_changed_in_place() -> None:
    stack = build("leapfrog")
    y = stack(batch())
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match=r"changed in place"):
        y.sum().backward()


def test_parameter_changed_in_place() -> None:
    stack = build("revnet")
    y = stack(batch())
    with torch.no_grad():
        stack.steps[2].fs[0].inner.weight.mul_(2)  # type: ignore[index]
    with pytest.raises(RuntimeError, match=r"weight of step 2.*changed in place"):
        y.sum().backward()


def test_schemes_without_inverse_and_projections_are_refused() -> None:
    with pytest.raises(SchemeError, match="no inverse"):
        Stack(nn.Linear(3, 3), "rk4", 1, backprop="reverse")
    with pytest.raises(SchemeError, match="cannot be undone"):
        Stack(nn.Linear(3, 3), "revnet", 1, post_step=nn.ReLU(), backprop="reverse")


# Together with torch.utils.checkpoint -----------------------------------------------------------------------------


@FEW
@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_a_checkpoint(name: str, reentrant: bool) -> None:
    reverse, store = both(name, dropout=0.3)
    gradients(reverse, batch())
    found = []
    for stack, wrap in ((reverse, True), (store, False)):
        stack.zero_grad()
        torch.manual_seed(11)
        x = batch()
        y = checkpoint(stack, x, use_reentrant=reentrant) if wrap else stack(x)
        y.square().mean().backward()
        found.append({**{k: p.grad for k, p in stack.named_parameters()}, "input": x.grad})
    assert distance(*found) <= EXACT


class Checkpointed(Function):
    def forward(self, *args: Tensor) -> Tensor:
        return checkpoint(super().forward, *args, use_reentrant=False)  # type: ignore[return-value]


@pytest.mark.cases(8)
@EACH
def test_checkpoint_inside_a_residual_function(name: str) -> None:
    reverse, store = both(name, make=Checkpointed, dropout=0.2)
    gradients(reverse, batch())
    torch.manual_seed(2)
    got = gradients(reverse, batch())
    torch.manual_seed(2)
    assert distance(got, gradients(store, batch())) <= EXACT
