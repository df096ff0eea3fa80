"""The engine of reversible backpropagation: gradients, and what gets one, for every invertible scheme."""

import copy
from typing import Any

import pytest
import torch
from invertible import EACH, EXACT, SCHEMES, Function, Timed, batch, both, build, deep, distance, gradients
from torch import Tensor, nn

import schemes
from odenets import Stack
from odenets.backprop import Reverse
from schemes.errors import SchemeError

# Gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.cases(2)
@EACH
def test_gradients_in_double_precision_at_depth_64(name: str) -> None:
    reverse, store = both(name, **deep(name))
    assert distance(gradients(reverse, batch()), gradients(store, batch())) <= 1e-10


@pytest.mark.cases(3)
@EACH
def test_gradients_in_single_precision(name: str) -> None:
    options = {**deep(name, 32), "dtype": torch.float32}
    reverse, store = both(name, **options, backprop=Reverse(bound=1e-6))
    exact = copy.deepcopy(store).double()
    want = gradients(exact, batch(dtype=torch.float32).detach().double().requires_grad_())
    error = distance(gradients(reverse, batch(dtype=torch.float32)), want)
    stored = distance(gradients(store, batch(dtype=torch.float32)), want)
    assert error <= 3 * stored, (error, stored, reverse.monitor)


@pytest.mark.cases(10)
@EACH
def test_calls_are_two_per_evaluation(name: str) -> None:
    stack, x = build(name), batch()
    gradients(stack, x)  # the first pass also measures
    functions = [f for f in stack.modules() if isinstance(f, Function)]
    for f in functions:
        f.noted.calls = 0
    stack(x)
    forward = [f.noted.calls for f in functions]
    assert sum(forward) >= stack.evaluations
    for f in functions:
        f.noted.calls = 0
    gradients(stack, x)
    start = sum(f.noted.calls for f in functions) - 2 * sum(forward)
    # The evaluation that makes the streams is stored, not repeated.
    assert start == -(sum(forward) - stack.evaluations)


@pytest.mark.cases(8)
@EACH
def test_batchnorm_statistics_move_once(name: str) -> None:
    reverse, store = both(name, norm=True)
    for _ in range(2):
        assert distance(gradients(reverse, batch(8)), gradients(store, batch(8))) <= EXACT
    theirs = dict(store.named_buffers())
    assert len(theirs) >= 3 * 4
    for key, buffer in reverse.named_buffers():
        assert torch.equal(buffer, theirs[key]), key


@pytest.mark.cases(8)
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
    calls = y.grad_fn.next_functions[0][0].tape.records  # type: ignore[union-attr]
    assert [[g is not None for g in call.notes] for call in calls] == [[False, True], [False, True]]
    stack.eval()
    calls = stack(batch()).grad_fn.next_functions[0][0].tape.records  # type: ignore[union-attr]
    assert [[g is not None for g in call.notes] for call in calls] == [[False, False], [False, False]]


@pytest.mark.cases(5)
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
                f.noted.dtypes.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=backward):
            loss.backward()
        return {**{k: p.grad for k, p in stack.named_parameters()}, "input": x.grad}

    for forward in (True, False):
        got = run(reverse, forward, inside)
        seen = {d for f in reverse.modules() if isinstance(f, Function) for d in f.noted.dtypes}
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


@pytest.mark.cases(10)
@EACH
def test_input_without_gradient(name: str) -> None:
    reverse, store = both(name)
    got = gradients(reverse, batch(grad=False))
    assert distance(got, gradients(store, batch(grad=False))) <= EXACT
    assert sum(g is not None for g in got.values()) > len(got) - 4


@pytest.mark.cases(10)
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


@pytest.mark.cases(10)
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


@pytest.mark.cases(10)
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


@pytest.mark.cases(10)
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


@pytest.mark.cases(10)
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


@pytest.mark.cases(8)
@EACH
def test_learned_step_sizes(name: str) -> None:
    reverse, store = both(name, step="learned")
    got = gradients(reverse, batch())
    assert distance(got, gradients(store, batch())) <= EXACT
    sizes = [g for k, g in got.items() if k.endswith(".h")]
    assert len(sizes) == 4 and all(g is not None and bool(g != 0) for g in sizes)


@pytest.mark.cases(10)
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


# Inverse ----------------------------------------------------------------------------------------------------------


@pytest.mark.cases(10)
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


HALF = {"bf16": torch.bfloat16, "fp16": torch.float16, "autocast": torch.bfloat16}


@pytest.mark.cases(5)
@EACH
@pytest.mark.parametrize("kind", HALF)
def test_gradients_in_half_precision_are_as_good_as_those_of_storing(name: str, kind: str) -> None:
    """Against single precision, reverse errs at most twice as much."""
    reverse, store = both(name, depth=12, dtype=torch.float32)
    x = batch(dtype=torch.float32)
    want = gradients(copy.deepcopy(store), batch(dtype=torch.float32))
    if kind == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            got = [gradients(net, batch(dtype=torch.float32)) for net in (reverse, store)]
    else:
        got = [gradients(net.to(HALF[kind]), x.detach().to(HALF[kind]).requires_grad_()) for net in (reverse, store)]
    errors = [distance({k: None if g is None else g.float() for k, g in found.items()}, want) for found in got]
    assert errors[0] <= 2 * errors[1], errors


# Shortcuts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["store", "checkpoint", "reverse", "reverse(every=0)", "exact", "auto(memory=1GB)"])
@pytest.mark.parametrize("scheme", ["revnet", "additive(3)", "multilevel(2)", "revcol(2, growth=1)"])
@pytest.mark.parametrize("none", [lambda: None, nn.Identity])
def test_places_without_a_shortcut_are_as_without_any(scheme: str, mode: str, none: Any) -> None:
    """In value, gradient, inverse and log-determinant."""
    found, log_dets = [], []
    for given in (False, True):
        part = schemes.get(scheme)
        gs = [[none() for _ in range(part.at(n).shortcuts)] for n in range(3)] if given else None
        torch.manual_seed(0)
        width = {"additive(3)": 9, "revcol(2, growth=1)": 3}.get(scheme, 6)
        stack = Stack.from_factory(Function, scheme, 3, channels=width, shortcut=gs, backprop=mode).double()
        assert not given or not any("gs" in key for key in stack.state_dict())
        x = torch.randn(5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        found.append(gradients(stack, x.requires_grad_()))
        with torch.no_grad():
            state = stack.final_state(x)
            assert torch.allclose(stack.inverse(state), x, atol=1e-9)
        stack.diagnose(x)
        if "revcol" not in scheme:
            torch.autograd.grad(stack.inverse(state).sum(), [*stack.parameters()])
            log_dets.append(stack(x, aux="log_det")[1]["log_det"])
    assert distance(*found) <= EXACT
    assert not log_dets or torch.equal(*log_dets)


@pytest.mark.parametrize("mode", ["reverse", "reverse(every=0)", "exact", "1*store + 1*reverse(every=0)"])
def test_a_shortcut_without_an_inverse_is_refused_by_its_class(mode: str) -> None:
    """Before a function runs, in the passes that need the inverse alone."""
    calls: list[int] = []
    gs = [[None, None], [nn.Linear(2, 2), None]]
    stack = Stack([lambda x: calls.append(1) or x for _ in range(4)], "revnet", shortcut=gs, backprop=mode)
    uses: list[Any] = [stack.inverse, stack.diagnose]
    if "store" not in mode:
        uses.append(stack)
        uses.append(lambda x: stack(x, aux="log_det"))
    for use in uses:
        with pytest.raises(SchemeError, match=r"the shortcut Linear of step 1 has no inverse\(y\)") as caught:
            use(torch.randn(3, 4, requires_grad=True))
        assert not calls and len(str(caught.value).splitlines()) == 2
    stack.backprop = "2*store" if "store" in mode else "checkpoint"
    stack(torch.randn(3, 4))
    with pytest.raises(SchemeError, match="the shortcut Linear has no scale"):
        stack(torch.randn(3, 4), aux="log_det")
