"""Stack with recomputation: bit-equal to storing, statistics moved once, less kept."""

import copy

import pytest
import torch
from stacks import Block, data, linears, picture_stack
from torch import nn

from odenets import SchemeError, Stack
from schemes.testing import check_stack


@pytest.mark.cases(8)
@pytest.mark.parametrize("scheme", ["euler", "rk4", "nested(midpoint, repeat(euler, 2))", "2*euler + midpoint"])
@pytest.mark.parametrize("mode", ["checkpoint", "checkpoint(2)", "checkpoint(3)", "checkpoint(99)"])
def test_checkpointing_is_bit_equal_to_storing(scheme, mode):
    options = {"after": nn.BatchNorm2d(3), "step": "learned"}
    check_stack(
        lambda m: picture_stack(scheme, 3, m, **{k: copy.deepcopy(v) for k, v in options.items()}),
        torch.randn(4, 3, 6, 6),
        mode=mode,
    )


def test_checkpointing_a_shared_block_with_a_shortcut():
    def make(mode):
        torch.manual_seed(0)
        shared = nn.Sequential(Block(), nn.Dropout(0.3))
        return Stack(shared, "rk4", 3, shortcut=Block(), backprop=mode)

    check_stack(make, torch.randn(4, 3, 6, 6), mode="checkpoint(2)")


def test_statistics_move_once():
    stacks = [picture_stack("midpoint", 2, mode) for mode in ("store", "checkpoint")]
    for n in range(1, 4):
        for stack in stacks:
            torch.manual_seed(n)
            stack(torch.randn(4, 3, 6, 6)).sum().backward()
            counts = [int(b) for name, b in stack.named_buffers() if name.endswith("num_batches_tracked")]
            assert counts == [n] * 4
        for (name, one), other in zip(stacks[0].named_buffers(), stacks[1].buffers(), strict=True):
            assert torch.equal(one, other), name


def test_checkpointing_in_eval_mode():
    stacks = [picture_stack("midpoint", 3, mode).eval() for mode in ("store", "checkpoint", "checkpoint(2)")]
    x = torch.randn(4, 3, 6, 6)
    for stack in stacks:
        stack(x)
        stack(x).square().sum().backward()
    for other in stacks[1:]:
        for one, two in zip(stacks[0].parameters(), other.parameters(), strict=True):
            assert torch.equal(one.grad, two.grad)


def test_putting_buffers_back_is_no_write_for_graphs_outside():
    block = Block().eval()
    stack, x = Stack(block, "midpoint", backprop="checkpoint"), torch.randn(4, 3, 6, 6, requires_grad=True)
    stack(x * block[1].running_var.view(3, 1, 1)).sum().backward()
    assert x.grad is not None


def test_checkpointing_runs_the_functions_again_and_keeps_less():
    def kept(mode):
        sizes = []

        def pack(x):
            sizes.append(x.numel())
            return x

        net = nn.ModuleList(linears(16))
        stack = Stack(net, "rk4", backprop=mode)
        stack(data(64, 4))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            stack(data(64, 4).requires_grad_())
        return sum(s for s in sizes if s >= 256)

    assert kept("checkpoint(2)") < kept("checkpoint") < kept("store") / 2


def test_no_gradients_no_recomputation():
    calls = []

    def f(x):
        calls.append(1)
        return torch.tanh(x)

    stack, x = Stack([f] * 4, "midpoint", backprop="checkpoint"), torch.ones(2, requires_grad=True)
    with torch.no_grad():
        stack(x)
    assert len(calls) == 4
    stack(x).sum().backward()
    assert len(calls) == 12


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("chekpoint", "backprop mode 'chekpoint', position 1: .* closest are checkpoint"),
        ("checkpoint(0)", "is 0, want a whole number, at least 1"),
        ("checkpoint(rk4)", "there is no 'rk4'"),
        ("5", "want 'store', 'checkpoint'"),
        (5, "want 'store', 'checkpoint', 'checkpoint.k.', 'reverse' or 'exact'"),
    ],
)
def test_bad_modes(mode, message):
    with pytest.raises(SchemeError, match=message):
        Stack(nn.Linear(2, 2), backprop=mode)
