"""Models whose weights are functions of depth: how they start, run otherwise, train in every mode."""

import copy
import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from odenets import ContinuousWeights, PerSlot, Stack, checkpoints, create_model, list_models
from odenets.analysis.convergence import convergence
from odenets.continuous import fields_of
from odenets.rebuild import Regularised, continuous_stacks, rebuilt, scheme_distance, separated, share_of
from schemes import SchemeError

SMALL = {
    "ho_resnet26": {"functions": (4, 4), "widths": (8, 16), "scheme": "midpoint", "act": "silu", "stem": "conv3"},
    "convnext_tiny": {"functions": (4, 2), "widths": (8, 16), "scheme": "midpoint", "patch": 2, "layer_scale": 0.5},
    "vit_tiny_patch16": {"depth": 4, "dim": 16, "heads": 2, "patch": 4, "size": 16, "scheme": "midpoint"},
    "revnet38": {"units": (3, 3), "widths": (8, 8, 16), "act": "silu"},
}
F64 = torch.float64
EACH = pytest.mark.parametrize("name", SMALL)


def small(name, **options):
    torch.manual_seed(0)
    return create_model(name, **{"num_classes": 5, "continuous": 4, **SMALL[name], **options})


def pictures(dtype=torch.float32, n=3):
    return torch.randn(n, 3, 16, 16, dtype=dtype, generator=torch.Generator().manual_seed(1))


def scattered(net):
    generator = torch.Generator().manual_seed(2)
    for field in fields_of(net):
        for p in field.parameters():
            p.data += 0.1 * torch.randn(p.shape, dtype=p.dtype, generator=generator) / max(1, p[0].numel()) ** 0.5
    return net


@EACH
def test_each_level_starts_as_its_twin(name):
    """The same steps over separate functions, all with the weights that the field starts with."""
    net, x = small(name).eval(), pictures()
    stacks = continuous_stacks(net)
    assert len(stacks) == (1 if name.startswith("vit") else 2)
    for stack in stacks.values():
        assert {step.h for step in stack.steps} == {1.0} and str(stack.rule) == "span/depth"
    twin = copy.deepcopy(net)
    for key, stack in continuous_stacks(twin).items():
        parent, _, last = key.rpartition(".")
        alone = separated(stack)
        assert not fields_of(alone) and len({tuple(p.flatten().tolist()) for p in alone.parameters()}) > 1
        setattr(twin.get_submodule(parent), last, alone)
    torch.testing.assert_close(twin(x), net(x), atol=1e-5, rtol=1e-4)
    # And so at any weights, the whole network at once.
    apart = separated(scattered(net))
    assert not fields_of(apart) and not apart.training
    assert not {id(p) for p in apart.parameters()} & {id(p) for p in net.parameters()}
    torch.testing.assert_close(apart(x), net(x), atol=1e-5, rtol=1e-4)


def test_weights_are_drawn_for_the_block_and_not_for_its_coefficients():
    net = create_model("ho_resnet26", functions=(4,), widths=(64,), continuous=4)
    (field,) = fields_of(net)
    w = field.block.conv1.weight
    assert w.shape == (5, 64, 64, 3, 3) and all(torch.equal(c, w[0]) for c in w)
    assert abs(float(w[0].std().detach()) - math.sqrt(2 / (9 * 64))) < 2e-3
    vit = small("vit_tiny_patch16", dim=64)
    assert abs(float(fields_of(vit)[0].block.attention.qkv.weight[0].std().detach()) - 0.02) < 1e-3


@EACH
def test_all_parameters_learn_and_the_state_comes_back(name):
    net, x = small(name), pictures()
    net(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    scattered(net).eval()
    other = small(name, continuous=2).eval()
    checkpoints.load(other, net.state_dict())
    torch.testing.assert_close(other(x), net(x))
    maps = create_model(name, continuous=4, features_only=True, **SMALL[name])(x)
    assert all(m.isfinite().all() for m in maps)


@EACH
@pytest.mark.parametrize(
    "mode", ["checkpoint", "reverse", "exact", pytest.param("auto(memory=1GB)", marks=pytest.mark.slow)]
)
def test_modes_agree(name, mode):
    if mode in ("reverse", "exact") and name != "revnet38":
        with pytest.raises(SchemeError, match=r"has no inverse|cannot be undone bit by bit"):
            small(name, backprop=mode)
        return
    found = []
    for each in ("store", mode):
        net, x = scattered(small(name, backprop=each).double()), pictures(torch.float64).requires_grad_()
        y = net(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in net.parameters())])
    for a, b in zip(*found, strict=True):
        # Exact arithmetic rounds to its own grid.
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-6 if mode == "exact" else 1e-8)


@pytest.mark.cases(1)
@pytest.mark.parametrize(("scheme", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_the_law_of_convergence_holds_for_logits(scheme, order):
    """A network of several levels, smooth, its knots where steps begin."""
    net = scattered(small("ho_resnet26", scheme="euler").double()).eval()
    batch = pictures(torch.float64), torch.tensor([0, 1, 2])
    found = convergence(net, lambda: [batch], [scheme], [2, 4, 8] if order < 4 else [1, 2, 4])
    assert found.slopes[scheme] >= order - 0.3
    assert [p.evaluations for p in found.points] == [
        2 * 4 * n * {"euler": 1, "midpoint": 2, "rk4": 4}[scheme] for n in ((2, 4, 8) if order < 4 else (1, 2, 4))
    ]


# What a loader gives at its second call, of inputs and labels.
LATER = {
    "another order": lambda x, y: [(x.roll(1, 0), y.roll(1))],
    "another order within a label": lambda x, y: [(x[[3, 1, 2, 0, 4, 5]], y)],
    "other labels": lambda x, y: [(x, y.roll(1))],
    "other inputs": lambda x, y: [(x + 1e-3, y)],
    "fewer": lambda x, y: [(x[:5], y[:5])],
    "the same": lambda x, y: [(x, y)],
    "other batches": lambda x, y: [(x[:2], y[:2]), (x[2:], y[2:])],
}


@pytest.mark.parametrize("later", LATER)
def test_convergence_wants_the_same_samples_at_each_call(later):
    net, x, y = scattered(small("ho_resnet26", scheme="euler")), pictures(n=6), torch.tensor([0, 1, 2, 0, 1, 1])
    calls = iter([LATER["the same"], LATER[later]])
    if later in ("the same", "other batches"):
        [point] = convergence(net, lambda: next(calls)(x, y), ["rk4"], [1]).points
        assert point.distance < 0.01
    else:
        with pytest.raises(SchemeError, match=r"gave other samples, or another order, than before\n  Give a loader"):
            convergence(net, lambda: next(calls)(x, y), ["rk4"], [1])


def test_convergence_of_a_network_that_writes_into_its_input():
    net, x, y = scattered(small("ho_resnet26", scheme="euler")), pictures(n=3), torch.tensor([0, 1, 2])
    before = x.clone()
    one, two = (
        convergence(nn.Sequential(nn.SiLU(inplace=own), net), lambda: [(x, y)], ["euler"], [1]).points[0]
        for own in (False, True)
    )
    assert one == two and torch.equal(x, before)


@pytest.mark.long
@torch.no_grad()
def test_convergence_reads_off_what_it_says():
    net = scattered(small("ho_resnet26", scheme="euler")).eval()
    x = pictures(n=8)
    labels = rebuilt(net, "rk4", scale=16)(x).argmax(1)
    found = convergence(
        net.train(), lambda: [(x[:5], labels[:5]), (x[5:], labels[5:])], ["rk4"], [1, 2, 4, "1/3", "13/3"], [1e-3]
    )
    assert net.training and found.accuracy == 1.0 and found.samples == 8
    # A third of 4 steps is none; and one multiple tells no order.
    assert math.isnan(convergence(net, lambda: [(x[:2], labels[:2])], ["euler"], [1, 1]).slopes["euler"])
    assert [p.scheme.partition("(")[0] for p in found.points] == ["rk4", "rk4", "rk4", "adaptive"]
    for p in found.points[:3]:
        run = rebuilt(net.eval(), "rk4", depth=p.steps[0])(x)
        want = rebuilt(net, "rk4", scale=16)(x)
        assert abs(p.distance - float((run - want).norm() / want.norm())) < 1e-6
        assert p.accuracy == float((run.argmax(1) == labels).double().mean())
    cheap = found.fewest()
    assert cheap.accuracy >= max(p.accuracy for p in found.points) - 0.001
    assert not [p for p in found.points if p.evaluations < cheap.evaluations and p.accuracy >= cheap.accuracy]
    assert "fewest evaluations" in str(found)


def test_rebuilt_models_share_their_weights():
    net = small("ho_resnet26").eval()
    fine = rebuilt(net, "rk4", scale=2, backprop="checkpoint")
    assert [p is q for p, q in zip(net.parameters(), fine.parameters(), strict=True)].count(False) == 0
    assert [s.depth for s in continuous_stacks(fine).values()] == [4, 4]
    assert [s.depth for s in continuous_stacks(net).values()] == [2, 2] and not fine.training
    assert [s.depth for s in continuous_stacks(rebuilt(net, depth=(3, 5))).values()] == [3, 5]
    stack = next(iter(continuous_stacks(net).values()))
    assert rebuilt(stack, "euler", depth=7).depth == 7


class Named(nn.Module):
    """One stack under two names, and again in a part that itself has two names."""

    def __init__(self):
        super().__init__()
        self.a = self.b = Stack(scattered(ContinuousWeights(nn.Linear(4, 4))), "euler", 4, step="span/depth")
        self.part = self.twin = nn.Sequential(self.a, nn.Tanh(), self.a)
        self.other = Stack(scattered(ContinuousWeights(nn.Linear(4, 4))), "euler", 4, step="span/depth")

    def forward(self, x):
        return self.twin(torch.tanh(self.b(torch.tanh(self.other(self.a(x))))))


def test_a_stack_of_several_names_is_replaced_under_all():
    net, x = Named(), torch.randn(2, 4)
    fine, apart = rebuilt(net, "rk4", scale=2), separated(net)
    for found in (fine, apart):
        assert found.a is found.b is found.part[0] is found.twin[2] and found.other is not found.a
    assert fine.b.depth == 8 and str(fine.part[2].scheme) == "rk4"
    torch.testing.assert_close(apart(x), net(x))
    names = dict(fine.named_modules(remove_duplicate=False)).items()
    stacks = {id(m): m for _, m in names if isinstance(m, Stack)}
    assert len(stacks) == 2 and {m.depth for m in stacks.values()} == {8}


class Reads(nn.Module):
    """A block that reads what its signature names."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def of(self, x, t=0.0, context=None):
        return torch.tanh(self.linear(x)) * (1.0 if context is None else context) + t


class OfTime(Reads):
    def forward(self, t, x):
        return self.of(x, t)


class OfContext(Reads):
    def forward(self, x, context=None):
        return self.of(x, 0.0, context)


class OfBoth(Reads):
    def forward(self, t, x, context=None):
        return self.of(x, t, context)


class ByKeyword(Reads):
    def forward(self, x, *, t, context):
        return self.of(x, t, context)


READS = {
    "time": lambda: ContinuousWeights(OfTime(), 4),
    "context": lambda: ContinuousWeights(OfContext(), 4),
    "both": lambda: ContinuousWeights(OfBoth(), 4),
    "by keyword": lambda: ContinuousWeights(ByKeyword(), 4),
    "a slot each": lambda: PerSlot([ContinuousWeights(OfBoth(), 4), ContinuousWeights(OfContext(), 4)]),
    "a slot and a plain one": lambda: PerSlot([OfContext(), ContinuousWeights(OfBoth(), 4)]),
}


@pytest.mark.parametrize("kind", READS)
def test_separate_functions_read_what_their_blocks_read(kind):
    torch.manual_seed(0)
    net, x = Stack(scattered(READS[kind]()), "midpoint", depth=4, step="span/depth"), torch.randn(2, 4)
    given = [None, torch.tensor(3.0)] if net.takes.context else [None]
    for context in given:
        torch.testing.assert_close(separated(net)(x, context=context), net(x, context=context))


def test_separate_functions_keep_shortcuts_and_draws():
    field, x = scattered(ContinuousWeights(nn.Linear(4, 4), 4)), torch.randn(6, 4)
    for shortcut in (nn.Linear(4, 4), [[nn.Linear(4, 4)] for _ in range(3)], [[None], [nn.Tanh()], [None]]):
        net = Stack(field, "euler", 3, shortcut=shortcut, step="span/depth")
        torch.testing.assert_close(separated(net)(x), net(x))
    net = Stack(field, "bdia", 4, step="span/depth", seed=3)
    net(x)
    apart = separated(net)
    torch.testing.assert_close(apart(x), net(x))
    torch.testing.assert_close(apart(x), net(x))


def test_a_refinement_is_one_of_all_that_share_the_weights():
    net = scattered(small("ho_resnet26", continuous=2).double()).eval()
    coarse = rebuilt(net, "euler", scale=0.5)
    x, fields = pictures(F64), fields_of(net)
    want, before = coarse(x), net(x)
    want.square().sum().backward()  # leaves nodes of the old shapes behind
    for field in fields:
        field.change(field.space.refined(4))
    assert [f.knots for f in fields_of(coarse)] == [4] * len(fields)
    torch.testing.assert_close(net(x), before)
    torch.testing.assert_close(coarse(x), want)
    for each in (coarse, net):
        each.zero_grad()
        each(x).square().sum().backward()
        assert all(p.grad.shape == p.shape for p in each.parameters())
    # A copy with weights of its own stays what it is.
    alone = copy.deepcopy(net)
    fields[0].change(fields[0].space.refined(8))
    torch.testing.assert_close(alone(x), before)


def test_auxiliary_values_of_a_field():
    torch.manual_seed(0)
    linear = nn.Linear(4, 4, bias=False).double()
    stack = Stack(ContinuousWeights(Regularised(linear), 2).double(), "euler", depth=2, step="span/depth")
    x = torch.randn(5, 4, dtype=torch.float64)
    _, aux = stack(x, aux=True)
    w = stack.block.block.block.weight[0]
    y = x + 0.5 * x @ w.T
    want = sum((z @ w.T).square().mean() for z in (x, y))
    torch.testing.assert_close(aux["kinetic"], want)
    # In the mean over signs the squared Frobenius norm per element; of one draw a multiple of it that is near 1.
    draws = torch.stack([stack(x, aux=True)[1]["jacobian"] for _ in range(200)])
    torch.testing.assert_close(draws.mean(), 2 * w.square().sum() / 4, rtol=0.05, atol=0)
    draws.mean().backward()
    assert stack.block.block.block.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", ["checkpoint", "reverse"])
def test_auxiliary_values_have_their_gradients_in_every_mode(mode):
    found = []
    for each in ("store", mode):
        torch.manual_seed(0)
        field = ContinuousWeights(Regularised(nn.Sequential(nn.Linear(3, 3), nn.Tanh())), 4).double()
        stack = Stack(field, "revnet", depth=4, step="span/depth", backprop=each)
        x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(3)
        y, aux = stack(x, aux=True)
        (y.sum() + aux["kinetic"] + aux["jacobian"]).backward()
        found.append([y, aux["jacobian"], x.grad, *(p.grad for p in stack.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(
    ("part", "share"),
    [(lambda x: x, 1), (torch.conj_physical, 1), (lambda x: torch.complex(x.real, torch.zeros_like(x.real)), 0.5)],
)
def test_auxiliary_values_of_complex_fields_are_squared_moduli(part, share):
    w = torch.randn(6, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, 6, dtype=torch.complex128)
    _, aux = Stack(Regularised(Multiplied(w, part)), "euler")(x, aux=True)
    y = w * part(x)
    torch.testing.assert_close(aux["kinetic"], (y.real.square() + y.imag.square()).mean())
    # |df/dx|^2 + |df/dx*|^2: multiplications turn the random signs and keep their moduli, so that all draws are equal.
    if share == 1:
        torch.testing.assert_close(aux["jacobian"], (w.real.square() + w.imag.square()).mean())
    draws = [Stack(Regularised(Multiplied(w, part)), "euler")(x, aux=True)[1]["jacobian"] for _ in range(200)]
    torch.testing.assert_close(
        torch.stack(draws).mean(), share * (w.real.square() + w.imag.square()).mean(), rtol=0.05, atol=0
    )


class Multiplied(nn.Module):
    def __init__(self, w, part):
        super().__init__()
        self.w, self.part = w, part

    def forward(self, x):
        return self.w * self.part(x)


def test_distance_of_complex_stacks_is_a_real_number():
    net, x = Stack(lambda x: 1j * x, "euler", depth=4, step="1/depth"), torch.ones(3, dtype=torch.complex128)
    found = scheme_distance(net, x, "rk4")
    difference = net(x) - net.rebuilt("rk4")(x)
    torch.testing.assert_close(found, (difference.real.square() + difference.imag.square()).mean())


def test_distance_between_schemes_has_gradients():
    stack = continuous_stacks(scattered(small("ho_resnet26")))["levels.0"]
    scheme_distance(stack, torch.randn(2, 8, 4, 4)).backward()
    assert all(p.grad.isfinite().all() for p in stack.parameters())


@pytest.mark.parametrize("scale", [1.0001, "1.0001", 1 / 3 + 1, 0.1, 12.34567])
def test_a_scale_is_the_fraction_that_it_is_nearest_to(scale):
    assert float(share_of(scale)) == float(scale) and share_of(scale) in (Fraction(str(scale)), Fraction(4, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small("ho_resnet26", placement="public"), "placement='public' does not go with weights"),
        (lambda: small("ho_resnet26", norm="batch"), "running statistics"),
        (lambda: small("ho_resnet26", step=0.5), "each level ends at its depth in time, so step=0.5"),
        (lambda: small("convnext_tiny", recompute=True), "recompute does not go with weights"),
        (lambda: small("ho_resnet26", continuous=0), "0 intervals"),
        (lambda: small("ho_resnet26", degree=5), "the degree is 5"),
        (lambda: small("vit_tiny_patch16", scheme="rk4", depth=6), "level 1 has 6 residual functions, and rk4"),
        (lambda: rebuilt(create_model("ho_resnet26")), "HOResNet has no weights that are functions of depth"),
        (lambda: rebuilt(small("ho_resnet26"), scale=0.25), "1/4 times the 2 steps of levels.0 is 0.5"),
        (lambda: rebuilt(small("ho_resnet26"), scale=math.nan), "scale is nan, want a number"),
        (lambda: convergence(small("ho_resnet26"), list, scales=["x"]), "scale is 'x', want a number"),
        (lambda: convergence(small("ho_resnet26"), list, scales=[]), r"none of the multiples \[\] is a whole number"),
        (lambda: rebuilt(small("ho_resnet26"), scale=math.pi), "which is no short fraction.\n  Give a text"),
        (lambda: rebuilt(small("ho_resnet26"), scale=2, depth=5), "scale is 2 and depth is 5; both .*\n  Give one"),
        (lambda: rebuilt(small("ho_resnet26"), scale="x"), "scale is 'x', want a number"),
        (lambda: rebuilt(small("ho_resnet26"), depth=2.0), "depth is 2.0, want a whole number"),
        (lambda: rebuilt(small("ho_resnet26"), depth=[1]), "1 depths for 2 continuous stacks"),
        (lambda: separated(create_model("ho_resnet26")), "the HOResNet has no weights that are functions of depth"),
        (lambda: separated(Stack(nn.Linear(2, 2), depth=2)), "no weights that are functions of depth"),
        (
            lambda: separated(rebuilt(small("ho_resnet26"), "adaptive(dopri5)", depth=1).levels[0]),
            "calls a residual function at several times, or at any",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(SchemeError, match=message):
        make()


@pytest.mark.parametrize("degree", [0, 2, 3])
def test_a_degree_without_knots_is_refused_by_every_model(degree):
    for name in list_models():
        with pytest.raises(SchemeError, match=rf"degree={degree} is that of .*\n.*continuous=8|no option 'degree'\n"):
            create_model(name, degree=degree)
    assert create_model("ho_resnet26", degree=1).continuous is None


def test_a_coupling_gets_a_field_for_each_slot():
    net = create_model(
        "ho_resnet26", functions=(4, 4), widths=(8, 16), scheme="revnet", continuous=4, backprop="reverse"
    )
    assert len(fields_of(net)) == 4 and [len(s.block) for s in continuous_stacks(net).values()] == [2, 2]
    net(pictures()).sum().backward()
