"""Stack: the written-out formula per scheme, step sizes, times, gradients, checkpointing, keys, compilation."""

import copy
import math
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn

import schemes
from odenets import MixingWarning, SchemeError, Stack, as_residual
from schemes.testing import check_stack

F64 = torch.float64


class Block(nn.Sequential):
    """A smooth residual function on pictures."""

    def __init__(self, channels=3, out=None, stride=1):
        out = out or channels
        super().__init__(nn.Conv2d(channels, out, 3, stride, 1), nn.BatchNorm2d(out), nn.Tanh())


def linears(n, width=4):
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(width, width, dtype=F64), nn.Tanh()) for _ in range(n)]


def data(*shape):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(1))


def quiet(*args, **kwargs):
    """A Stack without the warnings that other tests are about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Stack(*args, **kwargs)


def formula(tableau, fs, x, g, h):
    """One step as a book writes it: x itself where a row is zero, the shortcut's x elsewhere."""
    a, b, _, _ = tableau.floats()
    y, ks = g(x), []
    for f, row in zip(fs, a, strict=True):
        argument = y + h * sum(w * k for w, k in zip(row, ks, strict=True)) if any(row) else x
        ks.append(f(argument))
    return y + h * sum(w * k for w, k in zip(b, ks, strict=True))


# --- the formula -----------------------------------------------------------------------------------------------------


def euler(f, x, h):
    return x + h * f[0](x)


def midpoint(f, x, h):
    return x + h * f[1](x + h / 2 * f[0](x))


def rk4(f, x, h):
    k1 = f[0](x)
    k2 = f[1](x + h / 2 * k1)
    k3 = f[2](x + h / 2 * k2)
    k4 = f[3](x + h * k3)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def verner8(f, x, h):
    return formula(schemes.tableaux.verner8, f, x, lambda x: x, h)


def nested(f, x, h):
    def inner(f, x):
        return euler(f[1:], euler(f[:1], x, h), h)

    k1 = (inner(f[:2], x) - x) / h
    y = x + h / 2 * k1
    return x + inner(f[2:], y) - y


def mixed(f, x, h):
    for _ in range(3):
        x, f = rk4(f, x, h), f[4:]
    return midpoint(f, x, h)


HAND = {
    "euler": (1, euler),
    "midpoint": (2, midpoint),
    "rk4": (4, rk4),
    "verner8": (14, verner8),
    "nested(midpoint, repeat(euler, 2))": (4, nested),
    "3*rk4 + midpoint": (14, mixed),
}


@pytest.mark.parametrize(("scheme", "hand"), HAND.items())
@pytest.mark.parametrize("h", [1.0, 0.25])
def test_separate_functions_are_the_written_out_formula(scheme, hand, h):
    stages, step = hand
    fs = linears(2 * stages)
    stack = quiet(fs, scheme, step=h)
    x = data(5, 4).requires_grad_()
    want = step(fs[stages:], step(fs[:stages], x, h), h)
    got = stack(x)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    parameters = [x, *stack.parameters()]
    ours = torch.autograd.grad(got.square().sum(), parameters)
    theirs = torch.autograd.grad(want.square().sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("scheme", "hand"), HAND.items())
def test_one_shared_function_is_the_formula_too(scheme, hand):
    stages, step = hand
    (f,) = linears(1)
    stack = Stack(f, scheme, 2 * len(schemes.get(scheme).plan))
    x = data(5, 4)
    torch.testing.assert_close(stack(x), step((f,) * stages, step((f,) * stages, x, 1.0), 1.0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scheme", ["euler", "midpoint", "rk4", "verner8", "nested(midpoint, heun2)"])
def test_the_shortcut_takes_the_place_of_the_identity_on_the_first_step(scheme):
    torch.manual_seed(0)
    tableau = schemes.get(scheme).tableau
    a, s = tableau.floats()[0], tableau.stages
    # Who sees the step's input makes the stride and the width.
    first = [Block(5) if any(row) else Block(3, 5, stride=2) for row in a]
    second = [Block(5) for _ in range(s)]
    shortcut = nn.Conv2d(3, 5, 1, 2)
    stack = quiet([*first, *second], scheme, shortcut=shortcut).double().eval()
    x = data(2, 3, 8, 8)
    want = formula(tableau, first, x, shortcut, 1.0)
    want = formula(tableau, second, want, lambda x: x, 1.0)
    torch.testing.assert_close(stack(x), want, rtol=1e-9, atol=1e-9)
    assert stack(x).shape == (2, 5, 4, 4)


def test_after_is_applied_to_the_stream_after_each_step():
    fs = linears(4)
    stack = Stack(fs, "midpoint", after=nn.ReLU())
    x = data(5, 4)
    first = torch.relu(midpoint(fs[:2], x, 1.0))
    second = torch.relu(midpoint(fs[2:], first, 1.0))
    torch.testing.assert_close(stack(x), second)
    for got, want in zip(stack.trajectory(x), (first, second), strict=True):
        torch.testing.assert_close(got, want)


def test_trajectory_is_the_readout_after_each_step():
    fs = linears(12)
    stack, x = Stack(fs, "rk4", step=0.5), data(5, 4).requires_grad_()
    path = stack.trajectory(x)
    assert len(path) == stack.depth == 3
    for n, y in enumerate(path):
        x2 = rk4(fs[4 * n : 4 * n + 4], path[n - 1] if n else x, 0.5)
        torch.testing.assert_close(y, x2)
    assert torch.equal(path[-1], stack(x))
    assert float(torch.autograd.grad(path[0].sum(), x)[0].abs().min()) > 0


def test_from_factory_asks_for_each_slot_once():
    slots = []

    def make(slot):
        slots.append(slot)
        return nn.Linear(slot.in_channels[0], slot.out_channels)

    stack = Stack.from_factory(make, "midpoint", 2, channels=3, out_channels=5, shortcut=nn.Linear(3, 5), step=0.5)
    assert [(s.step, s.index, s.in_channels, s.out_channels, s.raw) for s in slots] == [
        (0, 0, (3,), 5, True),
        (0, 1, (5,), 5, False),
        (1, 0, (5,), 5, True),
        (1, 1, (5,), 5, False),
    ]
    assert stack(torch.randn(2, 3)).shape == (2, 5)
    slots.clear()
    mix = Stack.from_factory(make, "2*euler + midpoint", 3, channels=3)
    assert [(s.step, s.index) for s in slots] == [(0, 0), (1, 0), (2, 0), (2, 1)]
    assert mix.depth == 3


# --- time and context ------------------------------------------------------------------------------------------------


def test_time_runs_over_the_steps_and_starts_where_it_is_told():
    seen = []

    def f(t, x):
        seen.append(float(t))
        return x

    stack = Stack(f, "midpoint", 3, step=0.5)
    stack(torch.ones(1), t=1.0)
    assert seen == pytest.approx([1, 1.25, 1.5, 1.75, 2, 2.25])
    seen.clear()
    Stack([f] * 6, "repeat(euler, 2)", step=0.5).trajectory(torch.ones(1), t=1.0)
    assert seen == pytest.approx([1, 1.5, 2, 2.5, 3, 3.5])
    seen.clear()
    Stack([f] * 6, "repeat(euler, 2)", step="decay(0.5)")(torch.ones(1))
    assert seen == pytest.approx([0, 1, 2, 2.5, 3, 3.25])
    seen.clear()
    Stack([f] * 6, "repeat(euler, 2)", step="decay(0.5)", backprop="checkpoint(2)")(torch.ones(1, requires_grad=True))
    assert seen == pytest.approx([0, 1, 2, 2.5, 3, 3.25])


@pytest.mark.parametrize("mode", ["store", "checkpoint", "checkpoint(2)"])
def test_context_reaches_whoever_takes_it_and_gets_gradients(mode):
    class Mixed(nn.Module):
        def forward(self, x, context, t=0.0):
            return torch.sin(x * context + t)

    stack = Stack([Mixed(), nn.Tanh(), Mixed(), nn.Tanh()], "midpoint", backprop=mode)
    x, context = data(5, 4).requires_grad_(), data(4).requires_grad_()

    def hand(x):
        for n in (0, 1):
            x = x + torch.tanh(x + torch.sin(x * context + n) / 2)
        return x

    grads = [torch.autograd.grad(y.square().sum(), (x, context)) for y in (stack(x, context=context), hand(x))]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


# --- step sizes ------------------------------------------------------------------------------------------------------


def test_learned_steps_are_parameters_and_get_gradients():
    fs = linears(4)
    stack = Stack(fs, "midpoint", step="learned(h0=0.5)")
    hs = [p for name, p in stack.named_parameters() if name in ("steps.0.h", "steps.1.h")]
    assert [h.item() for h in hs] == [0.5, 0.5]
    x = data(5, 4)
    torch.testing.assert_close(stack(x), midpoint(fs[2:], midpoint(fs[:2], x, 0.5), 0.5))
    stack(x).square().sum().backward()
    with torch.no_grad():
        values = [midpoint(fs[2:], midpoint(fs[:2], x, 0.5), 0.5 + d).square().sum() for d in (1e-5, -1e-5)]
    assert float(hs[1].grad) == pytest.approx(float(values[0] - values[1]) / 2e-5, rel=1e-5)
    assert float(hs[0].grad) != 0.0
    with pytest.raises(SchemeError, match="step sizes are learned; a schedule cannot set them too"):
        stack.set_step(0.5)


def test_decay_counts_over_the_whole_network():
    first = Stack([nn.Identity()] * 2, "euler", step="decay(0.5)")
    second = Stack([nn.Identity()] * 2, "euler", step="decay(0.5)", steps_before=2)
    assert [s.h for s in (*first.steps, *second.steps)] == [1, 0.5, 0.25, 0.125]
    one = torch.ones((), dtype=F64)
    assert float(second(first(one))) == pytest.approx(2 * 1.5 * 1.25 * 1.125)
    second.set_step(2.0)  # the ratios stay: step 0 of the network is 2
    assert [s.h for s in second.steps] == [0.5, 0.25]
    third = Stack([nn.Identity()] * 2, "euler", step="decay(0.5, h0=4)")
    third.set_step(2.0)
    assert [s.h for s in third.steps] == [2, 1]


def test_a_schedule_sets_the_steps():
    fs = linears(2)
    stack, x = Stack(fs, "midpoint"), data(5, 4)
    for h in (0.0, 0.1, 1.0):
        stack.set_step(h)
        torch.testing.assert_close(stack(x), midpoint(fs, x, h))
    with pytest.raises(SchemeError, match="want a finite number"):
        stack.set_step(float("nan"))


def test_a_schedule_of_a_nested_scheme_may_start_at_zero():
    stack = Stack(linears(4), "nested(midpoint, repeat(euler, 2))", step=0.0)
    x = data(5, 4)
    torch.testing.assert_close(stack(x), x)


def test_steps_from_errors():
    fs = linears(3 * 7)
    with torch.no_grad():
        for f in fs:
            f[0].weight.mul_(0.2)
    stack, x = Stack(fs, "dopri5", step="error(1e-4, h0=0.3)"), data(5, 4).requires_grad_()
    scheme = schemes.get("dopri5")
    y, h = x, 0.3
    errors = []
    for n in range(3):
        (y,), error = scheme.step_with_error(fs[7 * n : 7 * n + 7], (y,), h)
        errors.append(error)
        rms = error.detach().square().mean().sqrt().item()
        h = h * min(5.0, max(0.2, 0.9 * (1e-4 / rms) ** (1 / 5)))
    found = stack.forward_with_errors(x)
    torch.testing.assert_close(found.output, y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stack(x), found.output)
    for got, want in zip(found.errors, errors, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-7)
    stack(x).sum().backward()
    assert stack.evaluations == 21 and float(x.grad.abs().min()) > 0
    with pytest.raises(SchemeError, match="use forward_with_errors"):
        stack.trajectory(x)
    with pytest.raises(SchemeError, match="want backprop='store'"):
        Stack(fs, "dopri5", step="error(1e-4)", backprop="checkpoint")
    with pytest.raises(SchemeError, match="rk4 has no embedded companion"):
        Stack(linears(4), "rk4", step="error(1e-4)")


def test_error_estimates_are_the_companion_minus_the_method_and_train():
    fs = linears(2 * 4)
    stack, x = quiet(fs, "bosh3", step=0.5), data(5, 4).requires_grad_()
    output, errors = stack.forward_with_errors(x)
    torch.testing.assert_close(output, stack(x))
    t = schemes.tableaux.bosh3
    a, b, _, b_hat = t.floats()
    y = x
    for n, error in enumerate(errors):
        ks = []
        for f, row in zip(fs[4 * n : 4 * n + 4], a, strict=True):
            ks.append(f(y + 0.5 * sum(w * k for w, k in zip(row, ks, strict=True))))
        want = 0.5 * sum((v - u) * k for u, v, k in zip(b, b_hat, ks, strict=True))
        torch.testing.assert_close(error, want)
        y = y + 0.5 * sum(w * k for w, k in zip(b, ks, strict=True))
    sum(e.square().sum() for e in errors).backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in stack.parameters())
    with pytest.raises(SchemeError, match="rk4 has no embedded companion"):
        Stack(linears(4), "rk4").forward_with_errors(x)


# --- recomputation ---------------------------------------------------------------------------------------------------


def picture_stack(scheme, steps, mode, **options):
    torch.manual_seed(0)
    make = options.pop("make", lambda: nn.Sequential(Block(), nn.Dropout(0.3)))
    return quiet([make() for _ in range(steps * schemes.get(scheme).stages)], scheme, backprop=mode, **options)


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


# --- structure -------------------------------------------------------------------------------------------------------


def test_state_dict_keys_are_stable():
    stack = Stack(
        [nn.Linear(2, 2), nn.Linear(2, 2, bias=False)] * 1, "midpoint", shortcut=nn.Linear(2, 2), step="learned"
    )
    assert list(stack.state_dict()) == [
        "steps.0.h",
        "steps.0.fs.0.weight",
        "steps.0.fs.0.bias",
        "steps.0.fs.1.weight",
        "steps.0.gs.0.weight",
        "steps.0.gs.0.bias",
    ]
    shared = Stack(nn.Linear(2, 2), "rk4", 3, after=nn.BatchNorm1d(2))
    assert list(shared.state_dict()) == [
        "block.weight",
        "block.bias",
        "after.weight",
        "after.bias",
        "after.running_mean",
        "after.running_var",
        "after.num_batches_tracked",
    ]
    mix = Stack([nn.Linear(2, 2, bias=False) for _ in range(6)], "2*euler + rk4")
    assert list(mix.state_dict()) == [
        "steps.0.fs.0.weight",
        "steps.1.fs.0.weight",
        *(f"steps.2.fs.{i}.weight" for i in range(4)),
    ]


def test_a_shared_block_is_registered_once():
    f = nn.Linear(2, 2)
    stack = Stack(f, "rk4", 5)
    assert stack.depth == 5 and stack.evaluations == 20
    assert [m for m in stack.modules() if m is f] == [f]
    assert len(list(stack.named_parameters(remove_duplicate=False))) == 2


def test_defaults_of_depth():
    assert Stack(nn.Linear(2, 2)).depth == 1 and str(Stack(nn.Linear(2, 2)).scheme) == "euler"
    assert Stack(nn.Linear(2, 2), "3*rk4 + midpoint").depth == 4
    assert Stack([nn.Linear(2, 2)] * 14, "3*rk4 + midpoint").depth == 4
    assert Stack(nn.ModuleList([nn.Linear(2, 2)] * 8), "rk4").depth == 2
    assert Stack(torch.neg, "rk4", 2)(torch.ones(())).shape == ()


def test_every_function_may_be_a_plain_callable():
    stack = Stack([torch.neg, torch.tanh], "midpoint")
    torch.testing.assert_close(stack(torch.ones(2)), 1 + torch.tanh(torch.full((2,), 0.5)))


@pytest.mark.parametrize("scheme", ["rk4", "nested(midpoint, heun2)", "tsit5"])
def test_repr(scheme):
    text = repr(quiet([nn.Linear(100, 100) for _ in range(28)], scheme, backprop="checkpoint(2)", step="learned"))
    head = text.splitlines()
    assert any(scheme in line for line in head[:3])
    depth = 28 // schemes.get(scheme).stages
    evaluations = depth * schemes.get(scheme).evaluations
    assert f"depth={depth}" in text and f"evaluations={evaluations}" in text
    assert f"parameters={28 * 10100 + depth:,}" in text
    assert "step=learned" in text and "backprop=checkpoint(2)" in text


@pytest.mark.parametrize(
    ("n", "scheme", "depth", "message"),
    [
        (5, "rk4", None, "5 residual functions for rk4, which uses 4 at a time; the nearest that fit: 4 or 8"),
        (3, "rk4", None, "the nearest that fit: 4. "),
        (0, "rk4", None, "0 residual functions for rk4"),
        (15, "verner8", None, "the nearest that fit: 14 or 28"),
        (13, "3*rk4 + midpoint", None, "uses 14 at a time; the nearest that fit: 14"),
        (8, "rk4", 3, "8 residual functions make 2 steps of rk4, not depth=3; drop depth"),
    ],
)
def test_counts_that_do_not_fit(n, scheme, depth, message):
    with pytest.raises(SchemeError, match=message):
        Stack([nn.Linear(2, 2)] * n, scheme, depth)


@pytest.mark.parametrize("depth", [0, -1, 1.5, True, "2"])
def test_bad_depths(depth):
    with pytest.raises(SchemeError, match="want a whole number of steps, at least 1"):
        Stack(nn.Linear(2, 2), "rk4", depth)


@pytest.mark.parametrize(
    ("block", "options", "message"),
    [
        (4, {}, "block is a int, want a module, a callable, or a sequence"),
        ([nn.Linear(2, 2), 4], {}, "residual function 1 is a int, want a module or a callable"),
        (nn.Linear(2, 2), {"scheme": "rk5"}, "closest are"),
        (nn.Linear(2, 2), {"step": "decay"}, "decay"),
        (nn.Linear(2, 2), {"shortcut": [nn.Identity()] * 2}, "2 shortcuts for step 0 of euler, want 1"),
    ],
)
def test_bad_arguments(block, options, message):
    with pytest.raises(SchemeError, match=message):
        Stack(block, **options)


def test_mixing_warning_for_separate_weights_only():
    with pytest.warns(MixingWarning, match="verner8 sums residual functions with weights of up to 2,307"):
        Stack([nn.Linear(2, 2)] * 14, "verner8")
    Stack(nn.Linear(2, 2), "verner8")  # warnings are errors here
    Stack([nn.Linear(2, 2)] * 4, "rk4")


def test_warning_of_functions_that_no_output_reads():
    with pytest.warns(UserWarning, match=r"dopri5: of its 7 residual functions a step, 1 enter.*pruned.dopri5."):
        Stack([nn.Linear(2, 2)] * 7, "dopri5")
    Stack([nn.Linear(2, 2)] * 6, "pruned(dopri5)")
    Stack(nn.Linear(2, 2), "dopri5")
    Stack([nn.Linear(2, 2)] * 7, "dopri5", step="error(1e-3)")


def test_as_residual_gives_a_block_its_skip_back():
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    x = torch.randn(3, 4)
    torch.testing.assert_close(Stack([as_residual(block)] * 2)(x), block(block(x)))


# --- as a module -----------------------------------------------------------------------------------------------------


def test_deepcopy_and_state_dict(tmp_path):
    stack = picture_stack("midpoint", 2, "store", step="learned")
    stack(torch.randn(4, 3, 6, 6))
    twin = copy.deepcopy(stack)
    file = tmp_path / "stack.pt"
    torch.save(stack.state_dict(), file)
    fresh = picture_stack("midpoint", 2, "checkpoint", step="learned(h0=0.3)")
    fresh.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        wanted = stack.eval()(x)
        assert torch.equal(twin.eval()(x), wanted) and torch.equal(fresh.eval()(x), wanted)
        twin.steps[0].fs[0][0][0].weight.zero_()
        assert torch.equal(stack(x), wanted)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_first_call_may_come_without_gradients(mode):
    stack, x = Stack(linears(4), "rk4"), data(2, 4)
    with mode():
        first = stack(data(2, 4))
    torch.testing.assert_close(stack(x), first)


def test_vmap_and_functional_call():
    stack, x = Stack(linears(4), "rk4"), data(6, 2, 4)
    torch.testing.assert_close(torch.func.vmap(stack)(x), stack(x))
    values = {k: v.detach() for k, v in stack.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(stack, p, (x,)).square().sum())(values)
    stack(x).square().sum().backward()
    for name, p in stack.named_parameters():
        torch.testing.assert_close(grads[name], p.grad)


COMPILED = {
    "euler": {},
    "rk4": {"step": "learned"},
    "nested(midpoint, repeat(euler, 2))": {"step": "decay(0.5)"},
    "2*rk4 + midpoint": {"after": nn.Tanh()},
}


def compiled_equals_eager(scheme, options, backend):
    torch._dynamo.reset()
    block = lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh())  # noqa: E731
    torch.manual_seed(0)
    stack = Stack([block() for _ in range(schemes.get(scheme).stages)], scheme, **options)
    compiled = torch.compile(stack, fullgraph=True, backend=backend)
    results = []
    for net in (stack, compiled):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = net(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *stack.parameters()])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("scheme", "options"), COMPILED.items())
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_without_a_break_it_gives_the_same(scheme, options):
    compiled_equals_eager(scheme, options, "aot_eager")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_with_time_and_context():
    torch._dynamo.reset()
    stack = Stack([lambda t, x: torch.sin(x + t), lambda x, context: x * context], "midpoint", step=0.5)
    x, context = torch.randn(3), torch.randn(3)
    compiled = torch.compile(stack, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, context=context), stack(x, context=context))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_gives_the_same():
    compiled_equals_eager("rk4", {"step": "learned"}, "inductor")


def test_bfloat16_functions_under_a_float32_stream():
    stack = Stack([nn.Linear(4, 4) for _ in range(4)], "rk4")
    with torch.autocast("cpu", torch.bfloat16):
        y = stack(torch.randn(2, 4))
    assert y.dtype == torch.float32


def test_learned_steps_keep_the_precision_of_the_stream():
    for dtype in (torch.float32, F64, torch.bfloat16):
        for step in ("learned", 1.0, "decay(0.5)"):
            stack = Stack([nn.Tanh()] * 4, "rk4", step=step)
            assert stack(torch.ones(3, dtype=dtype)).dtype == dtype, (dtype, step)


def test_a_neural_ode_converges_with_its_depth():
    errors = []
    for depth in (4, 8, 16):
        stack = Stack(lambda t, x: x * torch.cos(torch.as_tensor(t, dtype=F64)), "rk4", depth, step=2 / depth)
        errors.append(abs(float(stack(torch.ones((), dtype=F64))) - math.exp(math.sin(2.0))))
    assert [math.log2(a / b) for a, b in pairwise(errors)] == pytest.approx([4, 4], abs=0.3)
