"""Auxiliary values of residual functions and log-determinants of couplings, and what they train."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian

import schemes
import schemes.testing
from odenets import SchemeError, Stack
from odenets.auxiliary import log_det
from odenets.gather import gathered

F64 = torch.float64
MODES = ["store", "checkpoint", "checkpoint(2)", "reverse"]


class Gives(nn.Module):
    """A value, and two auxiliary ones: of the hidden layer, and of the value."""

    def __init__(self, slot):
        super().__init__()
        self.inner, self.outer = nn.Linear(sum(slot.in_channels), 5), nn.Linear(5, slot.out_channels)
        self.only_in_training = False

    def forward(self, *xs):
        h = torch.tanh(self.inner(torch.cat(xs, 1)))
        y = 0.3 * self.outer(h)
        if self.only_in_training and not self.training:
            return y
        return y, {"balance": h.mean(), "energy": y.square().sum()}


class Recorded(Gives):
    """The same without a second result: it keeps the values where a stored run can find them."""

    def forward(self, *xs):
        y, values = super().forward(*xs)
        self.kept.append(values)
        return y


def build(make, scheme, mode, depth=3):
    torch.manual_seed(0)
    return Stack.from_factory(make, scheme, depth, channels=6, backprop=mode).double()


def data():
    return torch.randn(4, 6, dtype=F64, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheme", ["rk4", "revnet", "leapfrog", "revcol(2)", "dense(2)", "repeat(revnet, 2)", "alf"])
def test_they_are_summed_over_the_steps_and_have_gradients_in_every_mode(scheme, mode):
    if mode == "reverse" and not schemes.get(scheme).invertible:
        pytest.skip("it has no inverse")
    plain, x = build(Recorded, scheme, "store"), data()
    for f in plain.modules():
        if isinstance(f, Recorded):
            f.kept = []
    plain(x.detach())  # the first call, under the checks
    for f in plain.modules():
        if isinstance(f, Recorded):
            f.kept.clear()
    y = plain(x)
    kept = [values for f in plain.modules() if isinstance(f, Recorded) for values in f.kept]
    if scheme == "alf":  # its start evaluates the first function once more, for no step
        kept = kept[1:]
    sums = {name: sum(values[name] for values in kept) for name in ("balance", "energy")}
    want = torch.autograd.grad(y.sum() + 3 * sums["balance"] - sums["energy"], [x, *plain.parameters()])
    net, z = build(Gives, scheme, mode), data()
    for _ in range(2):  # the second pass runs without the checks of the first
        got_y, got = net(z, aux=True)
        assert torch.allclose(got_y, y) and got.keys() == sums.keys()
        assert all(torch.allclose(got[name], sums[name]) for name in sums)
        loss = got_y.sum() + 3 * got["balance"] - got["energy"]
        grads = torch.autograd.grad(loss, [z, *net.parameters()])
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-11) for a, b in zip(grads, want, strict=True))


def test_who_does_not_ask_gets_the_value_alone():
    net = build(Gives, "revnet", "reverse")
    y, values = net(data(), aux=["energy"])
    assert values.keys() == {"energy"}
    assert torch.equal(net(data()), y) and torch.equal(net.trajectory(data())[-1], y)
    assert torch.allclose(net.inverse(y.detach()), data())
    with pytest.raises(
        SchemeError, match=r"no auxiliary|returned an auxiliary value 'z_loss'; there are balance, energy"
    ):
        net(data(), aux=["z_loss"])
    assert build(Cat, "rk4", "store")(data(), aux=True)[1] == {}


@pytest.mark.parametrize("mode", MODES)
def test_functions_that_give_them_in_training_only(mode):
    net = build(Gives, "revnet", mode)
    for f in net.modules():
        if isinstance(f, Gives):
            f.only_in_training = True
    net.eval()
    y, values = net(data(), aux=True)
    assert values == {}
    net.train()
    again, values = net(data(), aux=True)
    assert torch.equal(again, y) and values.keys() == {"balance", "energy"}


COUPLINGS = ["affine", "affine(split=(2, 4))", "revnet", "additive(3)", "momentum(0.9)", "multilevel(3, 0.5)"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheme", COUPLINGS)
def test_log_determinants_are_those_of_the_jacobian(scheme, mode):
    net, plain, x = build(Cat, scheme, mode), build(Cat, scheme, "store"), data()
    y, values = net(x, aux=["log_det"])
    widths = plain.scheme.stream_widths(6)
    start = plain.scheme.init((), x.detach())

    def step(flat):
        return torch.cat(plain(torch.split(flat[None], widths, 1)), 1)[0]

    for i in range(len(x)):
        determinant = torch.linalg.slogdet(jacobian(step, torch.cat([s[i] for s in start])))
        assert torch.allclose(values["log_det"][i], determinant.logabsdet)
    (values["log_det"].sum() + y.sum()).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_schemes_without_a_determinant_are_refused():
    for scheme in ("rk4", "dense(2)", "reversible_heun", "revcol(2)"):
        with pytest.raises(SchemeError, match="no log-determinant"):
            build(lambda slot: Cat(slot), scheme, "store")(data(), aux=["log_det"])


class Cat(nn.Module):
    def __init__(self, slot):
        super().__init__()
        self.linear = nn.Linear(sum(slot.in_channels), slot.out_channels)

    def forward(self, *xs):
        return 0.5 * torch.tanh(self.linear(torch.cat(xs, 1)))


@pytest.mark.long
def test_a_flow_learns_a_density_by_likelihood():
    """Two-dimensional data of known entropy: the likelihood under the flow comes near to it, far above a Gaussian's."""
    torch.manual_seed(0)
    n = 256
    first = torch.randn(n, 1)
    x = torch.cat((first, 0.3 * torch.randn(n, 1) + first.square() - 1), 1)
    entropy = math.log(2 * math.pi * math.e) + math.log(0.3)
    fs = []
    for _ in range(8):
        f = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 2))
        nn.init.zeros_(f[2].weight), nn.init.zeros_(f[2].bias)
        fs.append(f)
    net = Stack(fs, "affine(bound=2)", backprop="reverse")
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(160):
        z, values = net(x, aux=["log_det"])
        loss = (0.5 * z.square().sum(1) + math.log(2 * math.pi) - values["log_det"]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gaussian = 0.5 * torch.logdet(torch.cov(x.T)) + math.log(2 * math.pi * math.e)
    assert float(loss.detach()) < entropy + 0.15 < float(gaussian) - 0.5


INVERSES = [
    "revnet",
    "additive(3, split=(1, 2, 3))",
    "affine",
    "leapfrog",
    "momentum(0.9)",
    "alf",
    "multilevel(3, 0.9)",
    "repeat(leapfrog, 2)",
    "nested(revnet, midpoint)",
    "reversible(rk4, coupling=0.95)",
]


@pytest.mark.parametrize("scheme", INVERSES)
@pytest.mark.parametrize("step", [0.5, "learned"])
def test_the_inverse_trains_in_every_mode(scheme, step):
    """Values and gradients of a stored inverse; in flat memory, one node a step holds the graph."""
    found = {}
    for mode in ("store", "checkpoint", "reverse", "exact"):
        torch.manual_seed(0)
        try:
            net = Stack.from_factory(Cat, scheme, 3, channels=6, backprop=mode, step=step).double()
        except SchemeError:
            assert mode == "exact"
            continue
        with torch.no_grad():
            state = net.final_state(data())
        state = tuple(s.clone().requires_grad_() for s in state)
        x = net.inverse(state)
        assert torch.allclose(x, data(), atol=1e-8)
        start = net.inverse(state, streams=True)
        assert [s.shape for s in start] == [s.shape for s in state]
        loss = x.square().sum()
        grads = torch.autograd.grad(loss, [*state, *net.parameters()], allow_unused=True)
        found[mode] = [torch.zeros(()) if g is None or not g.any() else g for g in grads]
    for mode, grads in found.items():
        for a, b in zip(grads, found["store"], strict=True):
            assert torch.allclose(a, b, rtol=1e-8, atol=1e-10), mode


def test_an_inverse_that_cannot_be_trained_in_flat_memory_is_refused():
    net = Stack.from_factory(Cat, "dense(2)", 3, channels=6, backprop="reverse").double()
    state = net.final_state(data())
    with torch.no_grad():
        assert torch.allclose(net.inverse(state), data())
    with pytest.raises(SchemeError, match=r"cannot be trained with backprop='reverse'[\s\S]*store"):
        net.inverse(state)


def test_streams_may_be_given():
    net, x = build(Cat, "revnet", "reverse"), data()
    halves = x.chunk(2, 1)
    first, second = net(halves)
    assert torch.equal(torch.cat((first, second), 1), net(x))
    assert torch.allclose(torch.cat(net.inverse((first, second), streams=True), 1), x)
    y, values = net(halves, aux=["log_det"])
    assert isinstance(y, tuple) and not values["log_det"].any()
    for wrong, message in (
        ((x,), "1 streams are given, revnet starts from 2"),
        ((x, 1), "one of the streams is a int"),
    ):
        with pytest.raises(SchemeError, match=message):
            net(wrong)
    with pytest.raises(SchemeError, match="the input is a tuple, want a tensor; euler has one stream"):
        Stack([copy.deepcopy(nn.Linear(6, 6))], "euler")((x, x))


@pytest.mark.parametrize(
    "text", ["revnet(split=(2, 4))", "additive(3, split=(1, 3, 2))", "affine(bound=0.5, split=(4, 2))"]
)
def test_unequal_splits(text):
    scheme = schemes.get(text)
    assert str(scheme) == text and schemes.get(str(scheme)) == scheme
    schemes.testing.check_round_trip(scheme, channels=6)
    schemes.testing.check_inverse(scheme, torch.randn(2, 6, 3, dtype=F64))
    assert scheme.stream_widths(6) == scheme.split
    with pytest.raises(SchemeError, match="adds up to 6, the input has 7"):
        scheme.stream_widths(7)
    for wrong in ("revnet(split=3)", "revnet(split=(1, 2, 3))", "additive(3, split=(1, 2))", "affine(split=(0, 6))"):
        with pytest.raises(SchemeError, match="positive whole numbers"):
            schemes.get(wrong)


class Fixed(nn.Module):
    """Returns what it was given as its auxiliary values."""

    def __init__(self, values):
        super().__init__()
        self.linear, self.values = nn.Linear(4, 4), values

    def forward(self, x):
        return self.linear(x), self.values


@pytest.mark.cases(6)
@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize("mode", ["store", "checkpoint", "offload", "reverse", "exact", "auto(memory=1GB)"])
def test_auxiliary_values_are_tensors_by_their_names(mode, aux):
    good = {"energy": torch.ones(())}
    for i, bad in enumerate([{"energy": v} for v in (0.5, "a", None, True, [torch.ones(())])] + [{3: torch.ones(())}]):
        net = Stack([Fixed(good), Fixed(good), Fixed(good), Fixed(bad)], "revnet", backprop=mode)
        for _ in range(2):
            with pytest.raises(
                SchemeError, match=r"revnet, steps.1.fs.1: returned .*, want a (tensor|string)"
            ) as caught:
                net(torch.ones(2, 8, requires_grad=True), aux=aux)
            assert len(str(caught.value).splitlines()) == 2
            key, value = next(iter(bad.items()))
            assert repr(key) in str(caught.value) and (i == 5 or type(value).__name__ in str(caught.value))
        net.steps[1].fs[1].values = good
        net(torch.ones(2, 8, requires_grad=True), aux=aux)
        net.steps[1].fs[1].values = bad  # in a later call, too
        with pytest.raises(SchemeError, match=r"steps.1.fs.1: returned"):
            net(torch.ones(2, 8, requires_grad=True), aux=aux)


@pytest.mark.parametrize("mode", ["store", "reverse"])
def test_a_string_is_one_name(mode):
    net, x = build(Gives, "revnet", mode), data()
    for name in ("energy", "log_det"):
        assert torch.equal(net(x, aux=name)[1][name], net(x, aux=[name])[1][name])
    assert [*net(x, aux="energy")[1]] == ["energy"]
    for bad in (None, 1, 1.5, object(), b"energy", [1], ["energy", None], iter(["energy"])):
        with pytest.raises(SchemeError, match=r"aux is .*want True for all auxiliary values, or the names of some\.\n"):
            net(x, aux=bad)
    with pytest.raises(SchemeError, match=r"no residual function returned an auxiliary value 'energ'"):
        net(x, aux="energ")


def test_steps_from_errors_give_them_too():
    net = Stack([Fixed({"calls": torch.ones(())}) for _ in range(8)], "bosh3", step="error(0.1)")
    assert float(net(torch.ones(2, 4), aux=True)[1]["calls"]) == net.evaluations == 8


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        y = torch.tanh(self.linear(x))
        return y, {"calls": x.new_ones(()), "energy": y.square().mean()}


def test_error_estimates_have_the_auxiliary_values_of_their_calls():
    for mode in ("store", "checkpoint(2)", "1*store + 2*checkpoint"):
        net, x = Stack(Counts(), "bosh3", depth=3, backprop=mode), torch.randn(3, 2)
        for _ in range(2):
            with gathered(net) as values:
                net.forward_with_errors(x)
            assert values["calls"] == 12
        assert all(g.any() for g in torch.autograd.grad(values["energy"], [*net.parameters()]))


@pytest.mark.parametrize("mode", ["store", "checkpoint", "checkpoint(2)", "reverse", "2*checkpoint + reverse"])
def test_an_inverse_has_the_auxiliary_values_of_the_forward_pass(mode):
    """Its functions are called with the same arguments; a log-determinant is refused, and a diagnosis adds nothing."""
    net, x = Stack([Counts() for _ in range(6)], "revnet").double(), torch.randn(3, 4, dtype=F64)
    with gathered(net) as want:
        y = net(x).detach()
    found = []
    for net.backprop in ("store", mode):
        with gathered(net) as values:
            net.inverse(y)
        torch.testing.assert_close(values, want)
        found.append(torch.autograd.grad(values["energy"], [*net.parameters()]))
    torch.testing.assert_close(*found)
    with gathered(net) as values:
        net.diagnose(x)
    assert not values
    with pytest.raises(SchemeError, match="minus that of the forward pass"), gathered(net, "log_det"):
        net.inverse(x)


@pytest.mark.parametrize("mode", ["store", "checkpoint", "reverse"])
@pytest.mark.parametrize("scheme", ["affine", "revnet", "multilevel(2, 0.5)", "repeat(affine, 2)"])
def test_a_log_determinant_of_an_empty_batch_is_empty(scheme, mode):
    out = 4 if "affine" in scheme else 2
    net = Stack([nn.Linear(2, out) for _ in range(2 * schemes.get(scheme).stages)], scheme, backprop=mode)
    for x in (torch.randn(3, 4), torch.randn(0, 4), torch.randn(0, 4)):
        y, values = net(x, aux="log_det")
        assert y.shape == x.shape and values["log_det"].shape == x.shape[:1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_log_determinant_in_half_precision_is_summed_in_single(dtype):
    torch.manual_seed(0)
    net = Stack([nn.Linear(512, 1024) for _ in range(8)], "affine").to(dtype)
    x = torch.randn(2, 1024).to(dtype)
    got = net(x, aux="log_det")[1]["log_det"]
    want = copy.deepcopy(net).double()(x.double(), aux="log_det")[1]["log_det"]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0.02, atol=4.0)  # 4096 scales, each rounded
    scales = (1 + torch.rand(4, 4096)).to(dtype)
    torch.testing.assert_close(log_det(scales, scales).double(), scales.double().log().sum(1), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("mode", ["store", "checkpoint", "reverse"])
def test_a_value_by_the_name_of_the_log_determinant_is_refused_beside_it(mode):
    class Named(nn.Linear):
        def forward(self, x):
            return super().forward(x), {"log_det": x.sum(1)}

    net, x = Stack([Named(2, 4), Named(2, 4)], "affine", backprop=mode), torch.randn(2, 4)
    for _ in range(2):
        with pytest.raises(SchemeError, match="another name") as caught:
            net(x, aux="log_det")
        assert len(str(caught.value).splitlines()) == 2
        assert net(x, aux=True)[1]["log_det"].shape == (2,)


@pytest.mark.parametrize("aux", [False, (), [], True, "balance", ["energy"]], ids=str)
def test_gathered_gives_what_a_call_of_the_stack_gives(aux):
    stack = Stack.from_factory(Gives, "euler", 2, channels=3)
    x = torch.randn(2, 3)
    want = stack(x, aux=aux)[1] if aux not in (False, (), []) else {}
    with gathered(stack, aux) as values:
        y = stack(x)
    assert torch.equal(y, stack(x)) and values.keys() == want.keys()
    assert all(torch.equal(values[name], want[name]) for name in want)
