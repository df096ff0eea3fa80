"""The engine of reversible backpropagation: every behaviour, for every invertible scheme."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from invertible import CHANNELS, SCHEMES, Function, Timed, batch, build, distance, gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import schemes
from odenets import Stack
from odenets.layers.scale import ChannelScale
from odenets.modes import Reverse
from schemes.errors import SchemeError
from schemes.multistep import Momentum

EACH = pytest.mark.parametrize("name", SCHEMES)
FEW = pytest.mark.parametrize("name", ["revnet", "momentum(0.9)", "reversible_heun", "revcol", "dense(2)"])
EXACT = 1e-12  # relative, double precision, a few steps


def both(name: str, depth: int = 4, **options: Any) -> tuple[Stack, Stack]:
    """The same stack, reversed and stored."""
    return build(name, depth, **options), build(name, depth, **{**options, "backprop": "store"})


def deep(name: str, depth: int = 64) -> dict[str, Any]:
    # Concatenation grows by a stream each step, so that a deep one costs the square.
    return {"depth": 16 if name.startswith("dense") else depth, "step": 1 / 8}


# Gradients --------------------------------------------------------------------------------------------------------


@EACH
def test_gradients_in_double_precision_at_depth_64(name: str) -> None:
    reverse, store = both(name, **deep(name))
    assert distance(gradients(reverse, batch()), gradients(store, batch())) <= 1e-10


@EACH
def test_gradients_in_single_precision(name: str) -> None:
    options = {**deep(name, 32), "dtype": torch.float32}
    reverse, store = both(name, **options, backprop=Reverse(bound=1e-6))
    exact = copy.deepcopy(store).double()
    want = gradients(exact, batch(dtype=torch.float32).detach().double().requires_grad_())
    error = distance(gradients(reverse, batch(dtype=torch.float32)), want)
    stored = distance(gradients(store, batch(dtype=torch.float32)), want)
    assert error <= 3 * stored, (error, stored, reverse.monitor)


@EACH
def test_calls_are_two_per_evaluation(name: str) -> None:
    stack, x = build(name), batch()
    gradients(stack, x)  # the first pass also measures
    functions = [f for f in stack.modules() if isinstance(f, Function)]
    for f in functions:
        f.calls = 0
    stack(x)
    forward = [f.calls for f in functions]
    assert sum(forward) >= stack.evaluations
    for f in functions:
        f.calls = 0
    gradients(stack, x)
    start = sum(f.calls for f in functions) - 2 * sum(forward)
    # The evaluation that makes the streams is stored, not repeated.
    assert start == -(sum(forward) - stack.evaluations)


@EACH
def test_batchnorm_statistics_move_once(name: str) -> None:
    reverse, store = both(name, norm=True)
    for _ in range(2):
        assert distance(gradients(reverse, batch(8)), gradients(store, batch(8))) <= EXACT
    theirs = dict(store.named_buffers())
    assert len(theirs) >= 3 * 4
    for key, buffer in reverse.named_buffers():
        assert torch.equal(buffer, theirs[key]), key


@EACH
def test_dropout_is_replayed_and_the_generator_left_alone(name: str) -> None:
    reverse, store = both(name, dropout=0.4)
    gradients(reverse, batch()), gradients(store, batch())
    torch.manual_seed(7)
    x = batch()
    loss = reverse(x).square().mean()
    torch.rand(3)
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)
    found = {**{k: p.grad - 0 for k, p in reverse.named_parameters() if p.grad is not None}, "input": x.grad}
    reverse.zero_grad()
    torch.manual_seed(7)
    again = gradients(reverse, batch())
    torch.manual_seed(7)
    want = gradients(store, batch())
    assert distance(again, want) <= EXACT
    assert found.keys() <= again.keys()


def test_generator_states_are_kept_for_updates_that_drew() -> None:
    torch.manual_seed(0)
    fs = [nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5 if i % 2 else 0.0)) for i in range(4)]
    stack = Stack(fs, "revnet", backprop="reverse").double()
    calls: list[Any] = []
    y = stack(batch())
    calls = y.grad_fn.next_functions[0][0].tape.calls  # type: ignore[union-attr]
    assert [[g is not None for g in call.generators] for call in calls] == [[False, True], [False, True]]
    stack.eval()
    calls = stack(batch()).grad_fn.next_functions[0][0].tape.calls  # type: ignore[union-attr]
    assert [[g is not None for g in call.generators] for call in calls] == [[False, False], [False, False]]


@EACH
@pytest.mark.parametrize("inside", [False, True])
def test_autocast_is_the_same_in_the_backward_pass(name: str, inside: bool) -> None:
    """Whether the backward pass runs inside an autocast region or outside."""
    reverse, store = both(name, dtype=torch.float32)
    x = batch(dtype=torch.float32)
    reverse(x)

    def run(stack: Stack, forward: bool, backward: bool) -> dict[str, Tensor | None]:
        stack.zero_grad()
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=forward):
            loss = stack(x).float().square().mean()
        for f in stack.modules():
            if isinstance(f, Function):
                f.dtypes.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=backward):
            loss.backward()
        return {**{k: p.grad for k, p in stack.named_parameters()}, "input": x.grad}

    for forward in (True, False):
        got = run(reverse, forward, inside)
        seen = {d for f in reverse.modules() if isinstance(f, Function) for d in f.dtypes}
        assert seen == {torch.bfloat16 if forward else torch.float32}
        want = run(store, forward, False)
        # One bfloat16 rounding that falls the other way shows in the third digit.
        # The evaluation that makes the first streams is stored, and PyTorch's to differentiate.
        plain = not name.startswith(("alf", "reversible_heun"))
        assert distance(got, want) <= (1e-5 if not forward and (plain or not inside) else 3e-2)


def test_autocast_keeps_no_casts_without_a_graph() -> None:
    """A layer used in the stack and after it, in one autocast region, gets both gradients."""
    found = []
    for mode in ("reverse", "store"):
        torch.manual_seed(0)
        layer = nn.Linear(3, 3)
        stack = Stack([layer, nn.Linear(3, 3)], "revnet", backprop=mode)
        x = batch(dtype=torch.float32)
        stack(x)
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(stack(x)[:, :3]).float().square().mean()
        stack.zero_grad()
        loss.backward()
        found.append({k: p.grad for k, p in stack.named_parameters()})
    assert distance(*found) <= 1e-2


# What needs a gradient --------------------------------------------------------------------------------------------


@EACH
def test_input_without_gradient(name: str) -> None:
    reverse, store = both(name)
    got = gradients(reverse, batch(grad=False))
    assert distance(got, gradients(store, batch(grad=False))) <= EXACT
    assert sum(g is not None for g in got.values()) > len(got) - 4


@EACH
def test_autograd_grad_on_some_parameters(name: str) -> None:
    reverse, store = both(name)
    found = []
    for stack in (reverse, store):
        x = batch()
        chosen = [stack.steps[1].fs[0].inner.weight, stack.steps[2].fs[-1].outer.bias]  # type: ignore[index]
        found.append(torch.autograd.grad(stack(x).square().mean(), chosen))
        assert x.grad is None and all(p.grad is None for p in stack.parameters())
    for got, want in zip(*found, strict=True):
        assert torch.allclose(got, want, rtol=1e-10)


@EACH
def test_functional_call(name: str) -> None:
    """Gradients land on the tensors that replace the parameters, leaves or not, after the call is over."""
    reverse, store = both(name)
    found = []
    for stack in (reverse, store):
        scale = torch.tensor(1.1, dtype=torch.float64, requires_grad=True)
        leaves = {k: (p.detach() * 0.9).requires_grad_() for k, p in stack.named_parameters()}
        given = {k: p * scale if "weight" in k else p for k, p in leaves.items()}
        torch.func.functional_call(stack, given, (batch(),)).square().mean().backward()
        assert all(p.grad is None for p in stack.parameters())
        found.append({**{k: p.grad for k, p in leaves.items()}, "scale": scale.grad})
    assert distance(*found) <= EXACT


@EACH
def test_partly_frozen(name: str) -> None:
    found = []
    for stack in both(name):
        stack.steps[0].requires_grad_(False)
        stack.steps[1].fs[0].inner.requires_grad_(False)  # type: ignore[index]
        stack.steps[3].requires_grad_(False)
        found.append(gradients(stack, batch()))
        assert stack.steps[1].fs[0].inner.weight.grad is None  # type: ignore[index]
    assert distance(*found) <= EXACT


@EACH
def test_parameter_hooks_fire_once(name: str) -> None:
    found = []
    for stack in both(name):
        fired: dict[str, int] = {}

        def hook(key: str, fired: dict[str, int] = fired) -> Any:
            def run(p: Tensor) -> None:
                fired[key] = fired.get(key, 0) + 1

            return run

        for key, p in stack.named_parameters():
            p.register_post_accumulate_grad_hook(hook("after " + key))
        weight = stack.steps[1].fs[0].inner.weight  # type: ignore[index]
        weight.register_hook(hook("before"))
        weight.register_hook(lambda g: 2 * g)
        found.append((gradients(stack, batch()), fired))
    assert distance(found[0][0], found[1][0]) <= EXACT
    assert found[0][1] == found[1][1]
    assert set(found[0][1].values()) == {1}


# Graphs -----------------------------------------------------------------------------------------------------------


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


@EACH
def test_loss_on_middle_outputs_only(name: str) -> None:
    """The last output is not used, the graph not kept."""
    found = []
    for stack in both(name):
        x = batch()
        outputs = stack.trajectory(x)
        (outputs[1].square().mean() + outputs[2].sin().mean()).backward()
        found.append({**{k: p.grad for k, p in stack.named_parameters()}, "input": x.grad})
        if stack.backprop is not None:
            assert all(g is None for k, g in found[-1].items() if k.startswith("steps.3"))
    assert distance(*found) <= EXACT


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


@EACH
def test_weights_shared_by_all_steps(name: str) -> None:
    if name == "dense(2)" or "revcol" in name or "learned" in name or "affine" in name:
        pytest.skip("its functions differ in shape")
    found = []
    for mode in ("reverse", "store"):
        torch.manual_seed(3)
        scheme = SCHEMES[name]
        stack = Stack(Shared().double(), scheme, 5, step=0.3, backprop=mode)
        found.append(gradients(stack, batch()))
    assert distance(*found) <= EXACT


class Shared(nn.Module):
    """A function of as many arguments as there are, of any width that divides."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))
        self.norm = nn.Parameter(torch.randn(1))

    def forward(self, *args: Tensor) -> Tensor:
        x = args[0] if len(args) == 1 else args[0] + args[1]
        y = torch.sin(x * self.weight[: x.shape[1]]) * self.norm
        return y[:, ::2] if y.shape[1] == 4 else y


@EACH
def test_learned_step_sizes(name: str) -> None:
    reverse, store = both(name, step="learned")
    got = gradients(reverse, batch())
    assert distance(got, gradients(store, batch())) <= EXACT
    sizes = [g for k, g in got.items() if k.endswith(".h")]
    assert len(sizes) == 4 and all(g is not None and bool(g != 0) for g in sizes)


@EACH
@pytest.mark.parametrize("step", [0.5, "learned"])
def test_time_and_context(name: str, step: Any) -> None:
    """Functions of time; the context and the time at the start get gradients, wherever they are in the context."""
    found = []
    for stack in both(name, make=Timed, step=step):
        torch.manual_seed(5)
        source = torch.randn(4, dtype=torch.float64, requires_grad=True)
        t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        got = gradients(stack, batch(), t=t, context=source.exp())
        found.append({**got, "context": source.grad, "t": t.grad})
    assert distance(*found) <= EXACT
    assert found[0]["context"].abs().min() > 0


class Attends(nn.Module):
    """Reads a dictionary of tensors, or a closure's."""

    def __init__(self, memory: Tensor | None = None):
        super().__init__()
        self.inner = nn.Linear(3, 3).double()
        self.seen = [memory]

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        memory = context["memory"][0] if self.seen[0] is None else self.seen[0]
        return torch.tanh(self.inner(x)) * memory


@pytest.mark.parametrize("given", ["leaf", "computed"])
def test_captured_tensors_are_refused(given: str) -> None:
    """In whichever function of a step they are, and if they need a gradient only."""
    for place in (0, 1, 3):
        leaf = torch.ones(3, dtype=torch.float64, requires_grad=True)
        memory = leaf if given == "leaf" else nn.functional.linear(leaf, torch.eye(3, dtype=torch.float64))
        stack = Stack(
            [Attends(memory if i == place else memory.detach()) for i in range(4)], "revnet", backprop="reverse"
        )
        y = stack(batch())
        with pytest.raises(SchemeError, match=rf"step {place // 2}.*shape \(3,\)[\s\S]*context"):
            y.sum().backward()
        stack.eval()
    frozen = Stack([Attends(torch.ones(3, dtype=torch.float64))] * 2, "revnet", backprop="reverse")
    frozen(batch()).sum().backward()


def test_unregistered_modules_are_refused() -> None:
    hidden = nn.Linear(3, 3).double()
    stack = Stack([lambda x: hidden(x), lambda x: x.sin()], "revnet", backprop="reverse")
    with pytest.raises(SchemeError, match="neither its parameter nor its argument"):
        stack(batch()).sum().backward()


def test_context_in_a_tree() -> None:
    found = []
    for mode in ("reverse", "store"):
        torch.manual_seed(0)
        leaf = torch.randn(3, dtype=torch.float64, requires_grad=True)
        stack = Stack([Attends() for _ in range(4)], "revnet", backprop=mode)
        context = {"memory": [leaf * 2, torch.ones(2)], "name": "encoder"}
        found.append({**gradients(stack, batch(), context=context), "memory": leaf.grad})
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
        Stack(nn.Linear(3, 3), "revnet", 1, after=nn.ReLU(), backprop="reverse")


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


@EACH
def test_checkpoint_inside_a_residual_function(name: str) -> None:
    reverse, store = both(name, make=Checkpointed, dropout=0.2)
    gradients(reverse, batch())
    torch.manual_seed(2)
    got = gradients(reverse, batch())
    torch.manual_seed(2)
    assert distance(got, gradients(store, batch())) <= EXACT


# Failures ---------------------------------------------------------------------------------------------------------


class Fails(Function):
    broken = False

    def forward(self, *args: Tensor) -> Tensor:
        y = super().forward(*args)
        if self.broken:
            raise ValueError("out of luck")
        return y


@EACH
@pytest.mark.parametrize("shared", [False, True])
def test_a_residual_function_that_raises(name: str, shared: bool) -> None:
    """It is named; statistics and generators are as before its step."""
    if shared:
        if name not in ("leapfrog", "momentum(0.9)", "alf"):
            pytest.skip("one of each kind is enough")
        slot = schemes.get(SCHEMES[name]).slots(0, (CHANNELS,) * 2)[0]
        part = Fails(slot, norm=True, dropout=0.2).double()
        stack = Stack(part, SCHEMES[name], 4, backprop="reverse")
    else:
        stack = build(name, make=Fails, norm=True, dropout=0.2)
        part = stack.steps[2].fs[-1]  # type: ignore[index,assignment]
    gradients(stack, batch())
    seen: list[Any] = []
    for step in stack.steps:
        step.register_forward_pre_hook(
            lambda *_: seen.append((torch.get_rng_state(), {k: b.clone() for k, b in stack.named_buffers()}))
        )
    stack.steps[2].register_forward_pre_hook(lambda *_: setattr(part, "broken", True))
    with pytest.raises(ValueError, match="out of luck") as caught:
        stack(batch())
    notes = "".join(caught.value.__notes__)
    assert "step 2" in notes and str(stack.steps[2].scheme) in notes and "update" in notes
    assert len(seen) == 3 and torch.equal(torch.get_rng_state(), seen[-1][0])
    assert all(torch.equal(b, seen[-1][1][k]) for k, b in stack.named_buffers())
    assert not torch.equal(seen[-1][0], seen[0][0])


class Breaks(Function):
    factor: float = 1.0

    def forward(self, *args: Tensor) -> Tensor:
        return super().forward(*args) * self.factor


@EACH
def test_nan_is_reported_and_diagnosed(name: str) -> None:
    stack = build(name, make=Breaks, norm=True)
    gradients(stack, batch())
    stack.steps[2].fs[0].factor = math.nan  # type: ignore[index]
    gradients(stack, batch())
    buffers = {k: b.clone() for k, b in stack.named_buffers()}
    if not name.startswith("dense"):  # which compares nothing: its inverse drops streams
        with pytest.warns(UserWarning, match="nan off.*diagnose"):
            stack(batch())
    else:
        stack(batch())
    for key, b in stack.named_buffers():
        b.copy_(buffers[key])
    state = torch.get_rng_state()
    report = stack.diagnose(batch())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, buffers[k]) or b.isnan().any() for k, b in stack.named_buffers())
    assert len(report.steps) == 4
    assert [r.finite for r in report.steps] == [True, True, False, False]
    assert report.guilty is report.steps[2] and report.guilty.step == 2
    assert "step 2" in str(report)


def test_diagnose_finds_the_step_that_amplifies() -> None:
    torch.manual_seed(0)
    gs = [[ChannelScale(CHANNELS, 1e-3 if n == 3 else 1.0, ndim=2)] for n in range(6)]
    stack = Stack([nn.Linear(CHANNELS, CHANNELS) for _ in range(6)], "momentum(0.5)", shortcut=gs, backprop="reverse")
    report = stack.diagnose(torch.randn(4, CHANNELS))
    assert report.guilty is not None and report.guilty.step == 3
    assert report.guilty.growth > 100 and report.guilty.finite
    assert all(r.drift < 1e-3 for r in report.steps)
    fine = build("revnet", 6).diagnose(batch())
    assert fine.guilty is None and all(r.finite and r.drift < 1e-12 and 0.1 < r.growth < 10 for r in fine.steps)


@FEW
def test_check_finite(name: str) -> None:
    stack = build(name, make=Breaks, backprop=Reverse(check_finite=True))
    gradients(stack, batch())
    stack.steps[1].fs[0].factor = math.inf  # type: ignore[index]
    with pytest.raises(SchemeError, match=r"step 1: stream \d is not finite"):
        stack(batch())


def test_drift_is_reported_once_with_the_remedy() -> None:
    torch.manual_seed(0)
    fs = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(40)]
    stack = Stack(fs, Momentum(0.5), backprop=Reverse(every=0))
    gradients(stack, batch(dtype=torch.float32))
    with pytest.warns(UserWarning, match=r"e[+-]\d+ off.*diagnose.*every=k"):
        gradients(stack, batch(dtype=torch.float32))
    assert stack.monitor.drift is not None and stack.monitor.drift > 1e-3
    gradients(stack, batch(dtype=torch.float32))  # warnings are errors: this one is silent
    silent = Stack(fs, Momentum(0.5), backprop=Reverse(every=0, drift=False))
    for _ in range(2):
        gradients(silent, batch(dtype=torch.float32))
    kept = Stack(fs, Momentum(0.5), backprop=Reverse(every=4))
    for _ in range(2):
        gradients(kept, batch(dtype=torch.float32))
    assert kept.monitor.drift is not None and kept.monitor.drift < 1e-3


def test_drift_that_grows_in_training_brings_anchors() -> None:
    torch.manual_seed(0)
    fs = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(32)]
    gs = [[ChannelScale(6, 1.0, ndim=2)] for _ in fs]
    stack = Stack(fs, Momentum(0.5), shortcut=gs, backprop="reverse")
    gradients(stack, batch(dtype=torch.float32))
    before = stack.monitor.every or 32
    with torch.no_grad():
        for m in stack.modules():
            if isinstance(m, ChannelScale):
                m.alpha.fill_(0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(6):
            gradients(stack, batch(dtype=torch.float32))
    assert stack.monitor.every is not None and stack.monitor.every < before
    assert stack.monitor.drift is not None and stack.monitor.drift <= 3e-5


# Anchors ----------------------------------------------------------------------------------------------------------


def kept(stack: Stack) -> list[int]:
    return sorted(stack(batch()).grad_fn.tape.kept)  # type: ignore[union-attr]


def test_anchors_by_number_by_memory_and_by_measurement() -> None:
    def stack(mode: Any, beta: float = 0.5) -> Stack:
        torch.manual_seed(0)
        fs = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double() for _ in range(24)]
        return Stack(fs, Momentum(beta), backprop=mode)

    def places(mode: Any, beta: float = 0.5) -> list[int]:
        s = stack(mode, beta)
        tape = s._reversed(s.backprop, s._start(batch(), 0.0, None), None, None)[0].grad_fn.tape  # type: ignore
        return sorted(tape.kept)

    assert places("reverse(every=8)") == [0, 8, 16, 24]
    assert places("reverse(every=0)") == [0, 24]
    assert places("reverse(every=0, drift=false)") == [24]
    state = 2 * 5 * 6 * 8 / 2**20
    assert len(places(Reverse(memory=2.5 * state))) - 2 <= 2
    assert places(Reverse(memory=2.5 * state)) == [0, 12, 24]
    assert places("reverse", 0.99) == [0, 24]
    auto = places("reverse(bound=1e-13)")
    assert len(auto) > 3
    assert len(places("reverse(bound=1e-10)")) < len(auto)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.9])
def test_revcol_with_automatic_anchors(alpha: float) -> None:
    found = []
    for mode in ("reverse", "store"):
        torch.manual_seed(0)
        widths = [CHANNELS * 2**level for level in range(4)]
        gs = [[]] + [[ChannelScale(w, alpha, ndim=2) for w in widths] for _ in range(15)]
        stack = Stack.from_factory(
            lambda slot: Function(slot, size=1.0), "revcol", 16, channels=CHANNELS, shortcut=gs, backprop=mode
        )
        found.append(gradients(stack, batch(dtype=torch.float32)))
    assert distance(*found) <= 1e-5


# Memory -----------------------------------------------------------------------------------------------------------


def peak(stack: Stack, x: Tensor) -> int:
    """Largest number of bytes that a training step holds above what was there before, gradients preallocated."""
    from torch.profiler import ProfilerActivity, profile

    for p in stack.parameters():
        p.grad = torch.zeros_like(p)
    x.grad = torch.zeros_like(x)
    stack(x).square().mean().backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=False) as prof:
        stack(x).square().mean().backward()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    total = most = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        total += e.nbytes()
        most = max(most, total)
    return most


@EACH
def test_peak_memory_does_not_grow_with_depth(name: str) -> None:
    rows, made = 512, {"dense(2)": 2}.get(name, 0)
    peaks = []
    for depth in (6, 14):
        stack = build(name, depth, step=1 / 8, hidden=4, backprop=Reverse(every=0), dtype=torch.float32)
        peaks.append(peak(stack, batch(rows, dtype=torch.float32)))
    slope = (peaks[1] - peaks[0]) / 8
    state = rows * 4 * sum(s.shape[1] for s in build(name, 1).final_state(batch(2)))
    parameters = sum(p.numel() for p in stack.steps[-1].parameters()) * 4
    # What one more step may add: its gradients on their way, and the streams that it makes, six times: in the output,
    # the state, a joined input, and their gradients.
    assert slope <= parameters + 6 * made * rows * 4 + 0.02 * state, (peaks, slope, state)


# Inverse ----------------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("timed", [False, True])
def test_inverse_of_a_stack(name: str, timed: bool) -> None:
    make: Any = Timed if timed else Function
    extra: dict[str, Any] = {"t": 0.4, "context": torch.ones(2, dtype=torch.float64)} if timed else {}
    stack, x = build(name, make=make, step=0.5).eval(), batch(grad=False)
    with torch.no_grad():
        state = stack.final_state(x, **extra)
        assert torch.equal(stack.scheme.readout(state), stack(x, **extra))
        assert torch.allclose(stack.inverse(state, **extra), x, rtol=1e-9, atol=1e-11)
        y = stack(x, **extra)
        if name.startswith(("revnet", "additive", "affine", "multilevel", "nested", "repeat")):
            assert torch.allclose(stack.inverse(y, **extra), x, rtol=1e-9, atol=1e-11)
        else:
            with pytest.raises(SchemeError, match="final_state"):
                stack.inverse(y, **extra)
