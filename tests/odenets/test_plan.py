"""Plans: segments are stored runs, predictions hold, the choice is the fastest that fits, and the same for all."""

import copy
import itertools
import json
import random
import warnings
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from invertible import Timed, batch, build, distance, gradients, peak
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import odenets
from odenets import SchemeError, Stack
from odenets.backprop import agreement, choice, offload, parse_mode
from odenets.backprop.auto import Auto
from odenets.backprop.meter import meter_on
from odenets.backprop.modes import Checkpoint, Exact, Offload, Plan, Reverse, Store
from odenets.backprop.plan import Chain, Cost, Piece, Profile
from odenets.backprop.sizes import format_size, mebibytes
from odenets.planning import load_plan_state, plan_state
from odenets.stack import keeping_all

DEPTH = 6
MODES = ["store", "offload", "checkpoint", "checkpoint(2)", "reverse", "reverse(every=0)", "reverse(every=2)"]


def plans(modes: list[str], depth: int = DEPTH) -> st.SearchStrategy[Plan]:
    """Plans of so many steps."""

    def cut(places: set[int], drawn: list[str]) -> Plan:
        ends = [0, *sorted(places), depth]
        return Plan(tuple((b - a, parse_mode(m)) for (a, b), m in zip(itertools.pairwise(ends), drawn, strict=False)))

    places = st.sets(st.integers(1, depth - 1))
    return st.builds(cut, places, st.lists(st.sampled_from(modes), min_size=depth, max_size=depth))


def passes(stack: Stack, x: Tensor, **kwargs: object) -> tuple[dict[str, Tensor], Tensor, list[Tensor], Tensor]:
    """Gradients, output, buffers and generator after two training passes."""
    torch.manual_seed(3)
    gradients(stack, x, **kwargs)
    found = gradients(stack, x, **kwargs)
    state = torch.get_rng_state()
    with torch.no_grad():
        y = stack.eval()(x, **kwargs)
    stack.train()
    return found, y, [b.clone() for b in stack.buffers()], state


def wide(backprop: object = "store", depth: int = 8, scheme: str = "revnet", act: type[nn.Module] = nn.SiLU) -> Stack:
    """A stack whose memory is in its states."""
    torch.manual_seed(0)
    count = depth * (2 if scheme == "revnet" else 1)
    width = 32 if scheme == "revnet" else 64

    def f() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), act(), nn.Linear(width, width))

    return Stack([f() for _ in range(count)], scheme, backprop=backprop)


def wide_input() -> Tensor:
    return torch.randn(256, 64, generator=torch.Generator().manual_seed(1))


# The mode is a stored run


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", ["revnet", "momentum(0.9)", "leapfrog", "revcol", "dense(2)", "reversible_heun"])
@settings(max_examples=12)
@given(plan=plans(MODES))
def test_a_plan_is_the_stored_run(name: str, plan: Plan):
    options = {"norm": True, "dropout": 0.2}
    planned = passes(build(name, DEPTH, backprop=plan, **options), batch())
    stored = passes(build(name, DEPTH, backprop="store", **options), batch())
    assert distance(planned[0], stored[0]) < 1e-9
    assert torch.equal(planned[1], stored[1])
    assert all(torch.equal(a, b) for a, b in zip(planned[2], stored[2], strict=True))
    assert torch.equal(planned[3], stored[3])


@pytest.mark.long
@settings(max_examples=20)
@given(plan=plans(MODES[:4]))
def test_a_plan_that_keeps_states_is_equal_to_the_last_bit(plan: Plan):
    plain = Stack([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(DEPTH)], "euler")
    for stack in (plain, build("revnet", DEPTH, backprop="store", dropout=0.2)):
        other = copy.deepcopy(stack)
        other.backprop = plan
        x = batch(dtype=next(stack.parameters()).dtype)
        a, b = passes(stack, x), passes(other, x)
        assert all(torch.equal(g, b[0][k]) for k, g in a[0].items())
        assert torch.equal(a[3], b[3])


def test_time_context_and_observers_go_through_segments():
    plan = "2*store + reverse + 2*checkpoint(2) + offload"
    results = []
    for mode in ("store", plan):
        stack = build("revnet", DEPTH, backprop=mode, make=Timed)
        context = torch.linspace(0, 1, 5, dtype=torch.float64).requires_grad_()
        seen: list[int] = []
        state = stack.visit_states(batch(), lambda n, state, seen=seen: seen.append(n), t=0.3, context=context)
        sum(x.square().sum() for x in state).backward()
        assert seen == [*range(DEPTH)]
        grads = {k: p.grad for k, p in stack.named_parameters()}
        results.append({**grads, "context": context.grad})
    assert distance(results[1], results[0]) < 1e-9


def test_exact_segments_are_the_run_on_the_grid():
    options = {"dtype": torch.float32, "dropout": 0.1}
    x = batch(dtype=torch.float32)
    planned = passes(build("revnet", 6, backprop="3*exact + 3*exact(store=true)", **options), x)
    stored = passes(build("revnet", 6, backprop="exact(store=true)", **options), x)
    assert all(torch.equal(g, stored[0][k]) for k, g in planned[0].items())


def test_a_captured_tensor_is_refused_in_every_segment():
    # Noted per step of the stack: the tape of the last segment, which comes first, has a first step too.
    leak = torch.ones(3, requires_grad=True)
    fs = [nn.Linear(3, 3) for _ in range(7)]
    stack = Stack([lambda x: x * leak, *fs], "revnet", backprop="2*reverse(every=0) + 2*reverse(every=0)")
    with pytest.raises(SchemeError, match="needs a gradient"):
        stack(torch.randn(2, 6)).sum().backward()


def test_offloaded_tensors_that_were_changed_are_noticed():
    stack = Stack([nn.Linear(4, 4)], "euler", backprop="offload")
    x = torch.randn(2, 4)
    y = stack(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("scheme", "mode", "message"),
    [
        ("revnet", "3*store", "plan 3\\*store is one for 3 steps, and the stack has 4"),
        ("euler", "2*store + 6*reverse", "has no inverse"),
        ("revnet", "2*auto + 2*store", "made of plain modes"),
        ("revnet", "auto(memory=2XB)", "no unit 'XB'"),
        ("revnet", "auto(memory=0)", "want a size"),
        ("revnet", "auto(share=3)", "share"),
        ("rk4", "auto(exact=true)", "inverse|undone"),
    ],
)
def test_plans_that_cannot_be_are_refused_when_a_stack_is_built(scheme: str, mode: str, message: str):
    with pytest.raises(SchemeError, match=message):
        Stack([nn.Linear(4, 4) for _ in range(8)], scheme, backprop=mode)


@given(plan=plans([*MODES, "exact", "reverse(memory=3MiB)"]), memory=st.integers(1, 10**15), share=st.integers(1, 8))
def test_texts_are_read_back(plan: Plan, memory: int, share: int):
    assert parse_mode(str(plan)) == plan
    size = mebibytes(memory / 2**20, "memory")
    assert mebibytes(format_size(size), "memory") == size
    for mode in (Reverse(memory=1 / share), Reverse(bound=1 / memory), Reverse(bound=10.0**-share)):
        assert parse_mode(str(mode)) == mode
    for auto in (
        Auto(bound=10.0**-share),
        Auto(bound=Fraction(1, memory)),
        Auto(),
        Auto(memory=size),
        Auto(memory=size, share=1 / share, offload=False),
    ):
        assert parse_mode(str(auto)) == auto


def test_sizes():
    assert Auto(memory="2GB").memory == pytest.approx(2e9 / 2**20)
    assert parse_mode("auto(memory=2GiB)").memory == 2048
    assert parse_mode("auto(memory=64)") == Auto(memory=64) == parse_mode("auto(memory=64MiB)")


# The choice


def random_chain(r: random.Random, n: int) -> Chain:
    """Steps with streams that pass through, what neighbours share, and all costs drawn."""
    names = itertools.count()
    sizes: dict[int, int] = {}

    def fresh() -> int:
        name = next(names)
        sizes[name] = r.randint(1, 20)
        return name

    streams, profiles = [fresh(), fresh()], []
    for _ in range(n):
        following = [streams[1], fresh()] if r.random() < 0.5 else [fresh(), fresh()]
        inner = [fresh() for _ in range(r.randint(0, 2))]
        saved = [x for x in (*streams, *following, *inner) if r.random() < 0.6]

        def cost(factor: int) -> Cost:
            return Cost(r.randint(1, 5), factor * r.randint(1, 9), r.randint(1, 40), r.randint(1, 40), r.randint(0, 3))

        costs = {"store": cost(1), "checkpoint": cost(2), "reverse": cost(2)}
        before, after, kept = ({x: sizes[x] for x in some} for some in (streams, following, saved))
        profiles.append(Profile(before, after, kept, costs, r.random() * 0.1, 1 + r.random(), r.random() < 0.2))
        streams = following
    return Chain(profiles, r.randint(0, 30), [0] if r.random() < 0.5 else [])


def all_plans(chain: Chain) -> Iterator[list[Piece]]:
    n = len(chain.profiles)
    for cuts in itertools.product((False, True), repeat=n - 1):
        ends = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), n]
        for ways in itertools.product(("store", "checkpoint", "reverse"), repeat=len(ends) - 1):
            parts = [*zip(itertools.pairwise(ends), ways, strict=True)]
            if not any(chain.profiles[i].ends for (a, b), _ in parts for i in range(a, b - 1)):
                yield [chain.piece(a, b, way) for (a, b), way in parts]


@pytest.mark.parametrize("seed", range(30))
def test_the_fastest_plan_is_that_of_trying_all(seed: int):
    r = random.Random(seed)
    chain, bound = random_chain(r, r.randint(1, 4)), r.choice([0.05, 0.2, 1.0])
    right = (p for p in all_plans(chain) if max(q.error for q in p) <= bound)
    tried = [(chain.outcomes(p)[1], sum(q.time for q in p)) for p in right]
    ways = ("store", "checkpoint", "reverse")
    least = chain.least(ways, bound)
    assert least == min(peak for peak, _ in tried)
    for memory in (least - 1, least, 1.2 * least, 1.5 * least, 2 * least, 1e9):
        fits = [time for peak, time in tried if peak <= memory]
        found = chain.fastest(ways, memory, bound)
        assert (found is None) == (not fits)
        if found is not None:
            assert found[1] == min(fits)
            assert chain.outcomes(found[0])[1] <= memory


@pytest.mark.long
def test_many_steps_are_planned_in_time():
    cost = {way: Cost(1.0, t, 60, 30, 0) for way, t in (("store", 2.0), ("checkpoint", 3.0), ("reverse", 3.2))}
    steps = [Profile({k: 10}, {k + 1: 10}, {k: 10, 5000 + k: 50}, cost, 1e-7, 1.1) for k in range(300)]
    chain = Chain(steps)
    found = chain.fastest(("store", "checkpoint", "reverse"), 9_000, 1e-5)
    assert found is not None
    assert chain.outcomes(found[0])[1] <= 9_000
    assert 900 < found[1] < 1200


# Prediction


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    "mode",
    [*("store", "checkpoint", "checkpoint(3)", "reverse"), "exact", "3*store + 3*checkpoint(3) + 2*reverse(every=1)"],
)
def test_the_peak_is_as_predicted(mode: str):
    stack, x = wide(mode), wide_input().requires_grad_()
    report = stack.plan(x)
    assert report.predicted == pytest.approx(peak(stack, x), rel=0.1)
    assert report.measured == pytest.approx(peak(stack, x), rel=0.1)


@pytest.mark.cases(2)
@pytest.mark.parametrize("scheme", ["euler", "rk4", "leapfrog", "momentum(0.9)"])
def test_the_peak_is_as_predicted_for_each_scheme(scheme: str):
    stack = wide("store", 8, scheme)
    for mode in ("store", "checkpoint(2)", *(["reverse"] if stack.scheme.invertible else [])):
        stack.backprop = mode
        x = wide_input()
        assert stack.plan(x).predicted == pytest.approx(peak(stack, x.requires_grad_()), rel=0.1)


def test_a_reversed_segment_keeps_nothing_once_it_is_over():
    stack, x = wide("4*checkpoint(4) + 4*reverse(every=0)"), wide_input().requires_grad_()
    assert peak(stack, x) <= 1.01 * stack.plan(x).predicted


@pytest.mark.long
def test_auto_keeps_to_its_memory_and_takes_what_is_fastest():
    x = wide_input().requires_grad_()
    most = peak(wide("store"), x)
    least = peak(wide("reverse"), x)
    for share in (1.2, 0.8, 0.5, least / most * 1.15):
        stack = wide(Auto(memory=share * most / 2**20))
        grads = gradients(stack, x)
        assert distance(grads, gradients(wide("store"), x)) < 1e-4
        assert peak(stack, x) <= 1.02 * share * most
        report = stack.plan(x)
        assert report.plan == stack.monitor.plan.plan
        assert report.predicted == pytest.approx(peak(stack, x), rel=0.1)
        assert (report.plan == Plan(((8, Store()),))) == (share > 1)
        assert report.error < 1e-5


def test_where_nothing_fits_the_message_says_what_is_missing():
    stack = wide(Auto(memory=0.05))
    with pytest.raises(SchemeError, match=r"no plan fits into 51\.20 KiB; the least .* is .*, .* more"):
        stack(wide_input())
    assert stack.monitor.plan is None


def test_a_choice_by_memory_leaves_the_mode_until_it_is_applied():
    stack, x = wide(), wide_input()
    report = stack.plan(x, memory="400KiB")
    assert stack.backprop == Store()
    assert report.predicted <= 400 * 2**10
    assert "allowed 400.00 KiB" in str(report)
    report.apply()
    assert stack.backprop == report.plan
    assert len(str(report).splitlines()) == len(report.plan.segments) + 2


def test_a_shared_function_and_a_projection_are_planned():
    f = nn.Sequential(nn.Linear(64, 64), nn.Tanh())
    for options in ({}, {"post_step": nn.ReLU()}):
        stack = Stack(f, "midpoint", depth=12, backprop="auto(memory=900KiB)", **options)
        x = wide_input()
        torch.testing.assert_close(stack(x), Stack(f, "midpoint", depth=12, **options)(x))
        assert stack.monitor.plan.plan != Plan(((12, Store()),))
        assert peak(stack, x.requires_grad_()) <= 1.05 * 900 * 2**10


def test_a_contracting_scheme_gets_anchors_or_none():
    stack = build("momentum(0.9)", 24, backprop="auto(memory=1MB)", dtype=torch.float32)
    report = stack.plan(batch(dtype=torch.float32))
    assert report.error <= 1e-5


# Measuring leaves no trace


class Noisy(nn.Module):
    """Draws, counts its calls in a buffer, and leaves a value behind."""

    def __init__(self):
        super().__init__()
        self.inner = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(()))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.detach().mean()
        return nn.functional.dropout(self.norm(self.inner(x)), 0.2, self.training)


@pytest.mark.parametrize("memory", ["1GB", "2kB"])
def test_measuring_changes_nothing(memory: str):
    torch.manual_seed(0)
    stack = Stack([Noisy() for _ in range(8)], "revnet", backprop=Auto(memory="1GB"))
    for p in stack.parameters():
        p.grad = torch.ones_like(p)
        p.register_hook(lambda g: pytest.fail("a gradient arrived"))
    before = {k: v.clone() for k, v in stack.state_dict().items()}
    values = [f.last for s in stack.steps for f in s.fs]
    state = torch.get_rng_state()
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    try:
        stack.plan(x, memory=memory)
    except SchemeError as error:
        assert memory == "2kB", error
    assert all(torch.equal(v, before[k]) for k, v in stack.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(bool((p.grad == 1).all()) for p in stack.parameters())
    assert x.grad is None
    assert [f.last for s in stack.steps for f in s.fs] == values
    assert isinstance(stack.backprop, Auto)


@pytest.mark.parametrize(("memory", "calls"), [("1GB", 1), ("300KiB", 3)])
def test_functions_are_called_no_more_than_the_measurement_needs(memory: str, calls: int):
    # Once for what they save, twice more where inverses are looked at; two of one kind serve for times and transients.
    stack = wide(f"auto(memory={memory})", 12)
    count = [0] * 12
    for n, step in enumerate(stack.steps):
        forward = step.fs[0].forward
        step.fs[0].forward = lambda x, n=n, forward=forward: count.__setitem__(n, count[n] + 1) or forward(x)
        # Those who hang hooks on functions want to hear of passes.
        step.fs[0].register_forward_hook(lambda *_: pytest.fail("measuring called a hook"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, given = wide_input().requires_grad_(), stack._pass(0.0, None)
        choice.measure(stack.backprop, given, stack._start(x, given))
    assert sorted(count)[:10] == [calls] * 10


def test_wrong_shapes_are_named_as_in_a_stored_run():
    messages = []
    for mode in ("store", "auto(memory=1GB)"):
        stack = Stack([nn.Linear(4, 4), nn.Linear(4, 5)], "euler", backprop=mode)
        with pytest.raises(SchemeError) as error:
            stack(torch.randn(2, 4))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_auto_within_a_checkpoint_and_within_a_stack():
    x = wide_input().requires_grad_()
    want = gradients(wide(), x)
    stack = wide("auto(memory=400KiB)")
    x.grad = None
    checkpoint(stack, x, use_reentrant=False).square().mean().backward()
    assert distance({k: p.grad for k, p in stack.named_parameters()}, {k: want[k] for k in want if k != "input"}) < 1e-4

    def outer(inner_mode: str, mode: str) -> Stack:
        return Stack([odenets.as_residual(wide(inner_mode, 4, "euler")) for _ in range(3)], "euler", backprop=mode)

    nested = outer("auto(memory=700KiB)", "auto(memory=1.2MB)")
    assert distance(gradients(nested, x), gradients(outer("store", "store"), x)) < 1e-4
    assert peak(nested, x) <= 1.25e6
    inner = nested.steps[0].fs[0].module
    assert inner.monitor.plan is not None


def test_a_side_product_keeps_auto_from_reverse():
    class Aux(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.loss = y.square().mean()
            return y

    stack = Stack([Aux(32, 32) for _ in range(16)], "revnet", backprop="auto(memory=600KiB)")
    x = wide_input()
    y = stack(x).mean() + sum(f.loss for s in stack.steps for f in s.fs)
    y.backward()
    assert not stack.monitor.plan.plan.by_inverse
    assert all(p.grad is not None for p in stack.parameters())


# What is remembered


@pytest.mark.filterwarnings("ignore:Stack. states made again")
def test_a_first_batch_that_is_not_finite_decides_nothing():
    stack, x = wide("auto(memory=400KiB)"), wide_input()
    stack(x * float("nan")).sum().backward()
    assert not stack.monitor.plan.final
    stack(x).sum().backward()
    chosen = stack.monitor.plan
    assert chosen.final
    stack(x).sum().backward()
    assert stack.monitor.plan is chosen


def test_a_larger_input_is_measured_again_and_a_smaller_is_not():
    stack, x = wide("auto(memory=2MiB)"), wide_input()
    stack(x[:128])
    first = stack.monitor.plan
    stack(x[:64])
    assert stack.monitor.plan is first
    stack(x)
    assert stack.monitor.plan is not first


def planned(stack: Stack) -> tuple[Plan, float]:
    """The plan that a pass has chosen, and its predicted peak in MiB."""
    stack(wide_input()).sum().backward()
    return stack.monitor.plan.plan, stack.plan(wide_input()).predicted / 2**20


@pytest.mark.parametrize("first", ["1GB", "1500KiB", "700KiB"])
@pytest.mark.parametrize("second", ["1GB", "1500KiB", "700KiB"])
def test_limits_that_are_changed_later_are_kept_as_those_given_at_first(first: str, second: str):
    stack = wide(f"auto(memory={first})")
    planned(stack)
    before = stack.monitor.plan
    stack.backprop = f"auto(memory={second})"
    _, peak = planned(stack)
    assert peak <= mebibytes(second, "memory") and (stack.monitor.plan is before) == (first == second)
    with keeping_all(stack):
        stack(wide_input())
    stack.plan(wide_input(), memory="2GB")
    chosen = stack.monitor.plan
    stack.backprop = "store"
    stack(wide_input())
    stack.backprop = f"auto(memory={second})"
    stack(wide_input())
    assert stack.monitor.plan is chosen  # what was set meanwhile has not lost it
    other = wide(f"auto(memory={second})")
    other.load_plan_state(json.loads(json.dumps(stack.plan_state())))
    planned(other)
    assert other.monitor.plan == chosen
    stack.backprop = "auto(memory=1kB)"
    with pytest.raises(SchemeError, match="no plan fits"):
        stack(wide_input())


def test_a_choice_of_an_older_version_is_kept():
    stack = wide("auto(memory=1GB)")
    stack.load_plan_state({"auto": {"plan": [[8, "checkpoint(2)"]], "size": 10**9, "final": True}})
    assert str(planned(stack)[0]) == "8*checkpoint(2)"
    with pytest.raises(SchemeError, match="no choice of a plan"):
        stack.load_plan_state({"auto": {"plan": [[8, "store"]], "size": 1, "final": True, "limits": 3}})


def test_a_report_for_a_memory_keeps_the_other_limits():
    """A plan for a given memory reconstructs nothing that the stack's limits forbid, and is exact if they say so."""
    memory, inexact = "600KiB", {"bound": 1e-20}
    assert Reverse in {type(m) for _, m in wide("auto").plan(wide_input(), memory=memory).plan.segments}
    with pytest.raises(SchemeError, match="no plan fits"):
        wide(Auto(memory="1GB", **inexact)).plan(wide_input(), memory=memory)
    stack = wide(Auto(memory="1GB", exact=True, **inexact))
    report = stack.plan(wide_input(), memory=memory)
    assert report.plan.segments == ((8, Exact()),) and report.predicted <= 600 * 2**10
    # Each stack of a model by its own limits.
    net = nn.Sequential(wide("auto"), wide(Auto(memory="1GB", **inexact)))
    plans = odenets.plan(net, wide_input(), memory="1MiB").plans
    assert not any(m.by_inverse for _, m in plans["1"].segments)


def test_views_of_one_memory_with_other_values_are_copied_apart():
    """Offloading copies a tensor once, however often it is saved, and what it is copied as is told by its key."""
    z = torch.randn(8, dtype=torch.complex64)
    views = [z, z.conj(), z.imag, z.conj().imag, z.real, z[1:], z.view(2, 4), z.view(2, 4).mT, torch.view_as_real(z)]
    for a, b in itertools.combinations(views, 2):
        assert offload._key(a) != offload._key(b)
    for x in views:
        assert offload._key(x) == offload._key(x.detach()) == offload._key(x.view_as(x))
        assert torch.equal(offload._OnHost(x).back(), x)
    before = offload._key(z)
    z += 1
    assert offload._key(z) != before


@pytest.mark.parametrize("uses", [("trajectory", "forward"), ("forward", "trajectory"), ("trajectory", "trajectory")])
@pytest.mark.parametrize("memory", ["1GB", "90KiB"])
def test_one_solve_over_the_depth_has_one_plan(uses: tuple[str, str], memory: str):
    """Shown step by step or not: what is saved is a plan of the stack's own steps."""
    f = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    stack = Stack(f, "adaptive(dopri5)", depth=4, backprop=f"auto(memory={memory})")
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    chosen = []
    for use in uses:
        ys = stack.trajectory(x) if use == "trajectory" else [stack(x)]
        torch.autograd.grad(ys[-1].sum(), [*f.parameters()])
        chosen.append(stack.monitor.plan)
    assert chosen[0] is chosen[1] and chosen[0].plan.steps == 1
    other = Stack(f, "adaptive(dopri5)", depth=4, backprop="auto")
    other.load_plan_state(stack.plan_state())
    stack.plan(x)


def test_changes_are_logged(caplog: pytest.LogCaptureFixture):
    stack = wide("auto(memory=1GiB)")
    with caplog.at_level("INFO", "odenets.backprop"):
        stack(wide_input())
        stack(wide_input())
    assert [r.getMessage() for r in caplog.records] == [
        "backprop: auto(memory=1GiB) chose 8*store for 64.00 KiB of streams"
    ]


def test_a_plan_is_saved_beside_the_state_dict():
    net = nn.Sequential(wide("auto(memory=400KiB)"), wide("reverse"), nn.Linear(64, 64))
    keys = set(net.state_dict())
    assert plan_state(net) == {}
    net(wide_input()).sum().backward()
    assert set(net.state_dict()) == keys
    state = plan_state(net)
    assert set(state) == {"0", "1"}
    other = nn.Sequential(wide("auto(memory=400KiB)"), wide("reverse"), nn.Linear(64, 64))
    other.load_state_dict(net.state_dict())
    load_plan_state(other, state)
    assert plan_state(other) == state
    for copied in (net, other):
        copied.zero_grad()
        copied(wide_input()).sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), other.parameters(), strict=True))
    with pytest.raises(SchemeError, match="no stack 'x'"):
        load_plan_state(net, {"x": {}})


def test_all_processes_take_the_choice_of_the_first(monkeypatch: pytest.MonkeyPatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(agreement, "shared_store", lambda: store)
    found = []
    for memory in ("1GB", "1GB", "300KiB"):
        monkeypatch.setattr(agreement, "_counts", {})
        stack = wide(Auto(memory="300KiB"))
        monkeypatch.setattr(choice, "budget", lambda auto, device, memory=memory: mebibytes(memory, "") * 2**20)
        stack(wide_input())
        found.append(stack.monitor.plan)
    assert found[0] == found[1] == found[2]


def test_no_process_goes_on_where_the_first_found_no_plan(monkeypatch: pytest.MonkeyPatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(agreement, "shared_store", lambda: store)
    for memory in (1e3, 1e9):
        monkeypatch.setattr(agreement, "_counts", {})
        monkeypatch.setattr(choice, "budget", lambda auto, device, memory=memory: memory)
        with pytest.raises(SchemeError, match="no plan fits"):
            wide("auto(memory=1GB)")(wide_input())


# Whole models


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), wide(), nn.Tanh(), wide("store", 4, "euler"), nn.Linear(64, 10))


@pytest.mark.cases(1)
@pytest.mark.parametrize("memory", [None, "1MiB", "750KiB"])
def test_whole_models_keep_to_their_memory(memory: str | None):
    model, x = net(), wide_input()
    report = odenets.plan(model, x, memory=memory)
    assert set(report.plans) == {"2", "4"}
    report.apply()
    found = peak(model, x.requires_grad_())
    assert report.predicted == pytest.approx(found, rel=0.1)
    if memory is not None:
        assert found <= 1.02 * mebibytes(memory, "") * 2**20
    assert distance(gradients(model, x), gradients(net(), x)) < 1e-4


@pytest.mark.long
@pytest.mark.parametrize("name", ["revcol_tiny", "ho_resnet26"])
def test_models_of_the_library_are_predicted(name: str):
    torch.manual_seed(0)
    model = odenets.create_model(name)
    x = torch.randn(1, 3, 64, 64)
    for mode in ["reverse"] if name.startswith("revcol") else ["store", "checkpoint"]:
        for m in model.modules():
            if isinstance(m, Stack):
                m.backprop = mode
        report = odenets.plan(model, x)
        assert report.predicted == pytest.approx(peak(model, x.clone().requires_grad_()), rel=0.1)


def test_models_that_cannot_be_planned_say_so():
    with pytest.raises(SchemeError, match="no Stack"):
        odenets.plan(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(SchemeError, match="no tensor"):
        odenets.plan(net())
    stack = wide()
    with pytest.raises(SchemeError, match="called twice"):
        odenets.plan(nn.Sequential(stack, nn.Tanh(), stack), wide_input())


def test_modes_are_values():
    assert Plan(((2, Store()), (1, Reverse(every=0)))) == parse_mode("2*store + reverse(every=0)")
    assert hash(parse_mode("3*offload")) == hash(Plan(((3, Offload()),)))
    assert Plan(((1, Checkpoint(2)), (1, Exact()))).by_inverse


def test_memory_that_was_there_before_the_first_mark_is_in_no_interval():
    meter = meter_on(torch.device("cpu"))
    with meter:
        before = torch.empty(1000)
        meter.mark()
        during = torch.empty(500)
        meter.mark()
    del before, during
    assert [(i.start, i.most) for i in meter.intervals] == [(0, 2000), (2000, 2000)]
