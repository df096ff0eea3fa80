"""Stack: structure, keys, what it refuses, and life as a module: copies, transforms, compilation, precision."""

import copy
import re

import pytest
import torch
from stacks import F64, data, linears, picture_stack, quiet
from torch import nn

import schemes
from odenets import MixingWarning, SchemeError, Stack, as_residual
from odenets.tracing import is_traced

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
    shared = Stack(nn.Linear(2, 2), "rk4", 3, post_step=nn.BatchNorm1d(2))
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


@pytest.mark.parametrize("scheme", ["rk4", "kutta3", "midpoint", "kutta_nystrom5", "revnet", "3*rk4 + midpoint"])
def test_a_mix_that_is_suggested_uses_up_the_functions(scheme):
    for n in (1, 3, 7, 15):
        fs = [nn.Linear(2, 2)] * n
        try:
            Stack(fs, scheme)
        except SchemeError as e:
            mix = re.search(r"a mix such as '(.+)'\.", str(e))
            assert (mix is None) == (scheme in ("revnet", "3*rk4 + midpoint")), e
            assert mix is None or Stack(fs, mix[1]).evaluations == n


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "options", [{"step_offset": 1, "steps_before": 3}, {"post_step": nn.ReLU(), "after": nn.ReLU()},
                {"step_offset": 1, "steps_before": 1}, {"post_step": nn.Identity(), "after": None}]
)  # fmt: skip
def test_one_setting_by_two_names_is_refused(options):
    with pytest.raises(SchemeError, match="is given twice") as caught:
        Stack([nn.Linear(2, 2)], **options)
    assert len(str(caught.value).splitlines()) == 2
    old = {k: v for k, v in options.items() if k in ("steps_before", "after")}
    Stack([nn.Linear(2, 2)], **old)


@pytest.mark.parametrize("value", [nn.ReLU(), None, torch.relu])
def test_post_step_is_given_when_a_stack_is_built(value):
    stack = Stack([nn.Linear(2, 2)])
    with pytest.raises(SchemeError, match=r"Stack\(..., post_step=...\)"):
        stack.post_step = value
    assert [name for name, _ in stack.named_children()] == ["steps"] and stack.post_step is None


def test_mixing_warning_for_separate_weights_only():
    with pytest.warns(MixingWarning, match="verner8 sums residual functions with weights of up to 2,307"):
        Stack([nn.Linear(2, 2)] * 14, "verner8")
    Stack(nn.Linear(2, 2), "verner8")  # warnings are errors here
    Stack([nn.Linear(2, 2)] * 4, "rk4")


def test_warning_of_functions_that_no_output_reads():
    with pytest.warns(UserWarning, match=r"dopri5: of its 7 residual functions a step, 1 enter.*pruned.dopri5."):
        Stack([nn.Linear(2, 2)] * 7, "dopri5")
    with pytest.warns(UserWarning, match=r"bosh3.: of its 8 residual functions a step, 2 enter.*prune the pair inside"):
        Stack([nn.Linear(2, 2)] * 8, "nested(midpoint, bosh3)")
    Stack([nn.Linear(2, 2)] * 6, "pruned(dopri5)")
    Stack([nn.Linear(2, 2)] * 6, "nested(midpoint, pruned(bosh3))")
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


@pytest.mark.parametrize("mode", ["store", "checkpoint"])
def test_vmap_and_functional_call(mode):
    stack, x = Stack(linears(4), "rk4", backprop=mode), data(6, 2, 4)
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


@pytest.mark.cases(2)
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


def test_a_proxy_of_fx_is_known_from_a_tensor():
    proxy = torch.fx.Proxy(torch.fx.Node(torch.fx.Graph(), "x", "placeholder", "x", (), {}))
    assert is_traced(proxy) and not is_traced(torch.ones(1))
