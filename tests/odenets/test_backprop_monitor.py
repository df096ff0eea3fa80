"""What watches over reversible backpropagation: failures, drift, anchors, memory."""

import json
import math
import warnings
from typing import Any

import pytest
import torch
from invertible import CHANNELS, EACH, FEW, SCHEMES, Function, batch, build, distance, gradients, peak
from torch import Tensor, nn

import schemes
from odenets import Stack
from odenets.backprop import Reverse, agreement
from odenets.layers.scale import ChannelScale
from schemes.errors import SchemeError
from schemes.multistep import Momentum

# Failures ---------------------------------------------------------------------------------------------------------


class Fails(Function):
    broken = False

    def forward(self, *args: Tensor) -> Tensor:
        y = super().forward(*args)
        if self.broken:
            raise ValueError("out of luck")
        return y


@pytest.mark.cases(14)
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


@pytest.mark.cases(8)
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
        return sorted(s.final_state(batch())[0].grad_fn.tape.kept)  # type: ignore[union-attr]

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


@pytest.mark.cases(3)
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


def test_all_processes_keep_the_states_that_the_first_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the first has measured, also where the others would have measured otherwise."""
    store, chosen = torch.distributed.HashStore(), []
    monkeypatch.setattr(agreement, "shared_store", lambda: store)
    for size in (1.0, 1e-3):
        monkeypatch.setattr(agreement, "_counts", {})
        stack = build("momentum(0.9)", depth=16, dtype=torch.float32)
        stack(size * batch(dtype=torch.float32))
        chosen.append((stack.monitor.every, stack.monitor.growth))
    assert chosen[0] == chosen[1]
    monkeypatch.setattr(agreement, "shared_store", lambda: None)
    stack = build("momentum(0.9)", depth=16, dtype=torch.float32)
    stack(1e-3 * batch(dtype=torch.float32))
    assert (stack.monitor.every, stack.monitor.growth) != chosen[1]


def test_a_drift_that_nobody_has_read_is_saved() -> None:
    """A resumed run moves its anchors when the one that was never stopped does."""
    stack = build("momentum(0.9)", depth=16, dtype=torch.float32)
    gradients(stack, batch(dtype=torch.float32))
    stack.monitor.pending[-1] = stack.monitor.pending[-1]._replace(value=torch.tensor(0.5))
    state = stack.plan_state()
    other = build("momentum(0.9)", depth=16, dtype=torch.float32)
    other.load_plan_state(json.loads(json.dumps(state)))
    for s in (stack, other):
        with pytest.warns(UserWarning, match="off"):
            s(batch(dtype=torch.float32))
    assert other.monitor.every == stack.monitor.every != state["anchors"]["every"]


def contracting(mode: Any) -> Stack:
    torch.manual_seed(0)
    fs = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double() for _ in range(24)]
    return Stack(fs, Momentum(0.5), backprop=mode)


@pytest.mark.parametrize("modes", [("reverse(bound=1e-10)", "reverse(bound=1e-13)"),
                                   ("12*reverse(bound=1e-10) + 12*store", "20*reverse(bound=1e-13) + 4*store"),
                                   ("12*reverse + 12*store", "20*reverse + 4*store")])  # fmt: skip
@pytest.mark.parametrize("back", [False, True])
def test_another_bound_or_segment_has_a_spacing_of_its_own(modes: tuple[str, str], back: bool) -> None:
    """As if the stack had been built so; a mode that is set for a while in between changes nothing."""
    first, last = reversed(modes) if back else modes
    seen = []
    for stack in (contracting(first), contracting(last)):
        gradients(stack, batch())
        stack.backprop = last
        torch.manual_seed(1)  # the measurement draws
        stack(batch())
        monitor = stack.monitor if stack.monitor.growth is not None else stack.monitor.part(0)
        seen.append((monitor.every, monitor.asked))
        growth = monitor.growth
        stack.backprop = "store"
        stack(batch())
        stack.backprop = last
        stack(batch())
        assert monitor.growth == growth
    assert seen[0][1] == seen[1][1] and abs((seen[0][0] or 24) - (seen[1][0] or 24)) <= 1
    other = contracting(last)
    other.load_plan_state(json.loads(json.dumps(stack.plan_state())))
    assert other.plan_state() == stack.plan_state()
    other(batch())
    assert (other.monitor.growth or other.monitor.part(0).growth) == growth


@pytest.mark.parametrize(
    "mode", ["reverse", "reverse(memory=1)", "reverse(every=4)", "reverse(every=0)", "exact", "auto"]
)
def test_an_empty_batch_decides_nothing(mode: str) -> None:
    """It passes, and what comes after it is as if it had not been."""
    found = []
    for empty in (False, True):
        stack = build("momentum(0.9)", depth=16, backprop=mode)
        if empty:
            x = batch()[:0].detach().requires_grad_()
            for _ in range(2):
                y = stack(x)
                assert y.shape == x.shape and torch.autograd.grad(y.sum(), x)[0].shape == x.shape
            assert stack.monitor.growth is None
        torch.manual_seed(0)
        found.append(gradients(stack, batch()))
        every, growth = stack.monitor.every, stack.monitor.growth
        if empty and mode != "auto":
            stack(batch()[:0])
            assert (stack.monitor.every, stack.monitor.growth) == (every, growth)
    assert distance(*found) <= (1e-9 if mode == "auto" else 0.0)


class Arrives:
    """An event of a device that has not come to the transfer of a scalar yet."""

    def __init__(self, to: Tensor, value: float) -> None:
        self.to, self.value = to, value

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self.to.fill_(self.value)


def test_what_is_saved_has_arrived() -> None:
    stack = build("momentum(0.9)", depth=16)
    gradients(stack, batch())
    value = torch.zeros(())
    stack.monitor.pending[-1] = stack.monitor.pending[-1]._replace(value=value, event=Arrives(value, 0.25))
    assert stack.plan_state()["anchors"]["drifts"][-1] == 0.25


@pytest.mark.parametrize("spoiled", ["pending", "overflow"])
def test_what_exact_arithmetic_is_still_to_raise_is_saved(spoiled: str) -> None:
    stack = build("momentum(0.9)", depth=4, backprop="exact")
    gradients(stack, batch())
    assert "exact" not in stack.plan_state()
    scalar = stack.monitor.pending[-1]
    one = scalar._replace(value=torch.ones(()), must_be_zero=spoiled == "pending")
    setattr(stack.monitor, spoiled, [one])
    other = build("momentum(0.9)", depth=4, backprop="exact")
    other.load_plan_state(json.loads(json.dumps(stack.plan_state())))
    for s in (stack, other):
        with pytest.raises(
            SchemeError, match="made a state again that is" if spoiled == "pending" else "left the range"
        ):
            s(batch())
    with pytest.raises(SchemeError, match="no plan state: 'exact' in it"):
        other.load_plan_state({"exact": 3})


@pytest.mark.parametrize("mode", ["reverse", "auto(memory=1GB)", "4*store + 4*reverse", "exact"])
def test_a_state_is_taken_over_as_it_is(mode: str) -> None:
    """Also what it does not mention, which the stack may have decided meanwhile."""
    stack = build("momentum(0.9)", depth=8, backprop=mode)
    before = stack.plan_state()
    gradients(stack, batch())
    after = stack.plan_state()
    for state in (before, after, before):
        stack.load_plan_state(json.loads(json.dumps(state)))
        assert stack.plan_state() == state
