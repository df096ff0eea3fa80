"""The checks of a first call: what they refuse, when, and that a failure leaves everything as it was."""

import numpy as np
import pytest
import torch
from stacks import quiet
from torch import nn

import schemes
from odenets import SchemeError, Stack, as_residual
from odenets.layers.scale import ChannelScale
from schemes.errors import SchemeError as SameError


class Stat(nn.Module):
    """Moves a buffer and the generator, then does what it is told."""

    def __init__(self, then=lambda x: x):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.then = then

    def forward(self, x):
        return self.then(nn.functional.dropout(self.norm(x), 0.5, self.training))


def boom(x):
    raise RuntimeError("inside")


BAD = {
    "shape": (lambda x: x[:1], r"midpoint, steps.0.fs.1: returned \(1, 4\), the stream that it updates is \(3, 4\)"),
    "width": (lambda x: x[:, :2], r"returned \(3, 2\), the stream that it updates is \(3, 4\).\n  It keeps that shape"),
    "rank": (lambda x: x.sum(), r"returned \(\), the stream"),
    "tuple": (lambda x: (x, x), r"steps.0.fs.1: returned a tuple, want a tensor"),
    "none": (lambda x: None, r"returned a NoneType, want a tensor"),
    "error": (boom, "inside"),
}


@pytest.mark.parametrize("mode", ["store", "checkpoint"])
@pytest.mark.parametrize(("then", "message"), BAD.values(), ids=BAD)
def test_a_bad_function_is_named_and_nothing_has_changed(then, message, mode):
    stack = Stack([Stat(), Stat(then)], "midpoint", backprop=mode)
    before = {k: v.clone() for k, v in stack.state_dict().items()}
    generator = torch.get_rng_state()
    for _ in range(2):  # the checks stay on until a call succeeds
        with pytest.raises((SchemeError, RuntimeError), match=message) as caught:
            stack(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
        for key, value in stack.state_dict().items():
            assert torch.equal(value, before[key]), key
        assert torch.equal(torch.get_rng_state(), generator)
    if then is boom:
        assert "midpoint, steps.0.fs.1: residual function was given [(3, 4)]" in caught.value.__notes__
    else:
        assert len(str(caught.value).splitlines()) <= 2


def write(x):
    x += 1
    return x.clone()


@pytest.mark.parametrize(
    "f", [write, nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)), lambda x: x.mul_(2), lambda x: torch.neg_(x)]
)
@pytest.mark.parametrize("place", [0, 1])
def test_a_write_to_an_argument_is_refused(f, place):
    fs = [nn.Linear(4, 4), nn.Linear(4, 4)]
    fs[place] = f
    with pytest.raises(SchemeError, match=rf"midpoint, steps.0.fs.{place}: writes to its argument; .*inplace=False"):
        Stack(fs, "midpoint")(torch.randn(2, 4))


@pytest.mark.parametrize("scheme", ["euler", "revnet", "adaptive(dopri5)", "adaptive(dopri5, adjoint=true)"])
def test_a_write_to_an_argument_that_needs_a_gradient_is_refused(scheme):
    x = torch.ones(2, 4, requires_grad=True)
    for mode in ("store", "reverse" if scheme == "revnet" else "checkpoint"):
        # A leaf, a view of one (the halves of a pair of streams), and neither.
        for given in (x, x * 1):
            with pytest.raises(SchemeError, match=r"steps.0.fs.0: writes to its argument; .*inplace=False"):
                Stack(lambda x: x.mul_(-1), scheme, backprop=mode)(given)
    weight = nn.Parameter(torch.ones(4))
    with pytest.raises(RuntimeError, match="leaf Variable") as caught:  # its own, which is another fault
        Stack(lambda x: x * weight.mul_(2))(x)
    assert not isinstance(caught.value, SchemeError)


FIRST = {
    "forward": ("heun2", lambda net, x: net(x)),
    "errors": ("bosh3", lambda net, x: net.forward_with_errors(x)),
    "errors, rule": ("bosh3", lambda net, x: net.forward_with_errors(x)),
    "trajectory": ("rk4", lambda net, x: net.trajectory(x)),
    "state": ("leapfrog", lambda net, x: net.final_state(x)),
    "inverse": ("revnet", lambda net, x: net.inverse(x)),
    "inverse, streams": ("leapfrog", lambda net, x: net.inverse((x, x))),
    "inverse, mix": ("repeat(revnet, 2)", lambda net, x: net.inverse(x)),
    "diagnose": ("revnet", lambda net, x: net.diagnose(x)),
    "plan": ("revnet", lambda net, x: net.plan(x)),
}
FAULTS = {
    "write": (lambda x: x.relu_() * 0.5, "writes to its argument"),
    "module": (nn.Sequential(nn.ReLU(inplace=True)), "writes to its argument"),
    "broadcast": (lambda x: x.mean(1, keepdim=True), r"returned \(3, 1\), the stream that it updates is \(3, "),
}


def first_net(kind, make, mode="store", **options):
    scheme, call = FIRST[kind]
    step = "error(1e-3)" if "rule" in kind else 1.0
    fs = [make() for _ in range(2 * schemes.get(scheme).stages)]
    return quiet(fs, scheme, step=step, backprop=mode, **options), call


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", FIRST)
def test_a_first_use_of_every_kind_is_checked(kind, fault, grad):
    (f, message), x = FAULTS[fault], torch.linspace(-1, 1, 12).view(3, 4)
    for mode in ("store", "reverse") if "inverse" in kind else ("store",):
        net, call = first_net(kind, lambda: f, mode)
        with torch.set_grad_enabled(grad), pytest.raises(SchemeError, match=message):
            call(net, x.clone().requires_grad_())


@pytest.mark.parametrize("kind", FIRST)
def test_a_first_use_of_every_kind_makes_lazy_layers(kind):
    width = 4 if kind in ("inverse, streams", "state") or FIRST[kind][0] in ("heun2", "bosh3", "rk4") else 2
    net, call = first_net(kind, lambda: nn.Sequential(nn.LazyBatchNorm1d(), nn.LazyLinear(width)))
    net.eval()
    generator, x = torch.get_rng_state(), torch.linspace(-1, 1, 12).view(3, 4)
    call(net, x)
    assert all(b.any() == ("var" in name) for name, b in net.named_buffers())
    assert torch.equal(generator, torch.get_rng_state())


def test_shapes_that_an_inverse_meets_are_those_of_the_forward_pass():
    """Also where a shortcut or a rotation gives a stream another shape."""
    gs = [[ChannelScale(4, 0.5, ndim=2)], [ChannelScale(3, 0.5, ndim=2)]]
    fs = [nn.Linear(3, 4), nn.Linear(4, 3)]
    net = Stack(fs, "multilevel(2)", shortcut=gs).double()
    x, y = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    with torch.no_grad():
        a, b = Stack(fs, "multilevel(2)", shortcut=gs).double().inverse(net((x, y)), streams=True)
    torch.testing.assert_close((a, b), (x, y))
    fs[0] = nn.Linear(3, 1)
    with pytest.raises(SchemeError, match=r"steps.0.fs.0: returned \(2, 1\), the stream that it updates is \(2, 4\)"):
        Stack(fs, "multilevel(2)", shortcut=gs).double().inverse((x, y))


@pytest.mark.parametrize("scheme", ["revnet", "additive(3)", "leapfrog", "dense(2)", "momentum(0.5)", "bdia"])
def test_an_inverse_takes_the_streams_that_there_are(scheme):
    torch.manual_seed(0)
    net = quiet([lambda *xs: 0.1 * xs[0][:, :2]] * (3 * schemes.get(scheme).stages), scheme)
    width = 2 * schemes.get(scheme).streams if scheme in ("revnet", "additive(3)") else 2
    state = net.final_state(torch.randn(3, width))
    for wrong in (state[:-1], (*state, state[0]), (), state[0].tolist(), [1] * len(state), 3):
        with pytest.raises(SchemeError, match=r"Stack: .*\n?") as caught:
            net.inverse(wrong)
        assert len(str(caught.value).splitlines()) <= 2
    if net.scheme.invertible:
        assert net.inverse(list(state), streams=True)[0].shape[0] == 3


def test_in_place_inside_a_function_is_fine():
    Stack(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), "rk4")(torch.randn(2, 4))


def test_checks_run_at_the_first_call_only():
    calls = []

    def f(x):
        calls.append(x)
        return x if len(calls) == 1 else x[:, :1]

    stack = Stack(f)
    stack(torch.ones(2, 4))
    assert stack(torch.ones(2, 4)).shape == (2, 4)  # broadcast, unseen: checking each call would cost time
    assert len(calls) == 2


def test_the_first_call_counts_as_a_call():
    stack = Stack([Stat(), Stat()], "midpoint")
    stack(torch.randn(3, 4))
    assert [int(f.norm.num_batches_tracked) for f in stack.steps[0].fs] == [1, 1]


def test_functions_without_a_shortcut_must_not_stride():
    with pytest.raises(SchemeError, match=r"also needs a shortcut: Stack\(..., shortcut=projection\)"):
        Stack(nn.Conv2d(3, 3, 3, 2, 1))(torch.randn(1, 3, 8, 8))
    # The shortcut gives the shape that the functions must return.
    stack = Stack(nn.Conv2d(3, 5, 3, 1, 1), shortcut=nn.Conv2d(3, 5, 1, 2))
    with pytest.raises(SchemeError, match=r"returned \(1, 5, 8, 8\), the stream that it updates is \(1, 5, 4, 4\)"):
        stack(torch.randn(1, 3, 8, 8))


def test_the_step_and_the_function_are_named():
    fs = [nn.Linear(4, 4) for _ in range(8)]
    fs[6] = nn.Linear(4, 3)
    with pytest.raises(SchemeError, match=r"rk4, steps.1.fs.2: returned \(2, 3\)"):
        Stack(fs, "rk4")(torch.randn(2, 4))


@pytest.mark.parametrize("x", [[1.0, 2.0], None, 3])
def test_the_input_is_a_tensor(x):
    with pytest.raises(SchemeError, match=r"the input is a .*, want a tensor"):
        Stack(nn.Identity())(x)


@pytest.mark.parametrize("example", [(3, 4), [3, 4], torch.ones(3, 4)])
def test_an_example_checks_in_the_constructor(example):
    with pytest.raises(SchemeError, match=r"steps.0.fs.1: returned \(3, 5\)"):
        Stack([nn.Linear(4, 4), nn.Linear(4, 5)], "midpoint", example=example)
    generator = torch.get_rng_state()
    stack = Stack([Stat(), Stat()], "midpoint", example=example)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [int(f.norm.num_batches_tracked) for f in stack.steps[0].fs] == [0, 0]
    assert all(torch.equal(f.norm.running_var, torch.ones(4)) for f in stack.steps[0].fs)


def test_lazy_modules_are_made_at_the_first_call():
    stack = Stack([nn.LazyLinear(4), nn.Sequential(nn.LazyBatchNorm1d(), nn.LazyLinear(4))], "midpoint")
    stack(torch.randn(3, 4))
    assert stack.steps[0].fs[0].weight.shape == (4, 4)
    assert sum(p.numel() for p in stack.parameters()) == 2 * 20 + 8


def test_a_block_with_a_skip_of_its_own_gets_a_warning():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    with pytest.warns(UserWarning, match=r"TransformerEncoderLayer adds its input itself.*as_residual.block."):
        Stack([nn.Linear(8, 8), layer])
    with pytest.warns(UserWarning, match="adds its input itself"):
        Stack(layer)
    stack = Stack(as_residual(layer))  # warnings are errors
    x = torch.randn(1, 3, 8)
    torch.testing.assert_close(stack(x), layer(x))

    class BasicBlock(nn.Linear):
        """A user's class of that name is the user's affair."""

    Stack(BasicBlock(2, 2))


@pytest.mark.parametrize("module", ["torchvision.models.resnet", "timm.models.resnet"])
def test_known_blocks_of_other_libraries(module):
    block = type("BasicBlock", (nn.Linear,), {"__module__": module})(2, 2)
    with pytest.warns(UserWarning, match="BasicBlock adds its input itself"):
        Stack(block)


def test_one_public_error():
    assert SchemeError is SameError and issubclass(SchemeError, ValueError)


class Clocked(nn.Module):
    """Cannot be called without the time."""

    def forward(self, x, t):
        return 0.1 * x * t


WAYS = {
    "forward": ("midpoint", lambda net, x, **given: net(x, **given)),
    "aux": ("midpoint", lambda net, x, **given: net(x, aux=True, **given)[0]),
    "trajectory": ("midpoint", lambda net, x, **given: net.trajectory(x, **given)[-1]),
    "trajectory(at)": ("midpoint", lambda net, x, **given: net.trajectory(x, at=[0.0, 2.0], **given)[-1]),
    "visit_states": ("midpoint", lambda net, x, **given: net.visit_states(x, **given)[0]),
    "final_state": ("midpoint", lambda net, x, **given: net.final_state(x, **given)[0]),
    "forward_with_errors": ("dopri5", lambda net, x, **given: net.forward_with_errors(x, **given)[0]),
    "inverse": ("revnet", lambda net, x, **given: net.inverse(x, **given)),
    "diagnose": ("revnet", lambda net, x, **given: torch.tensor([r.drift for r in net.diagnose(x, **given).steps])),
}


@pytest.mark.filterwarnings("ignore:dopri5")  # of functions that only the estimate reads
@pytest.mark.parametrize(("scheme", "way"), WAYS.values(), ids=WAYS)
def test_every_way_reads_signatures_anew_and_refuses_a_context_that_nobody_reads(scheme, way):
    count = 2 * schemes.get(scheme).stages
    net, new = Stack([nn.Identity() for _ in range(count)], scheme), Stack([Clocked() for _ in range(count)], scheme)
    for step in net.steps:
        for i in range(len(step.fs)):
            step.fs[i] = Clocked()
    x = torch.linspace(1, 2, 8).view(2, 4)
    torch.testing.assert_close(way(net, x, t=2.0), way(new, x, t=2.0))
    with pytest.raises(SchemeError, match="no residual function has a parameter named context"):
        way(net, x, context=x)


class Opaque(nn.Module):
    def forward(self, *args, **kwargs):
        return -args[0]


@pytest.mark.parametrize("given", [{"t": 1.0}, {"t": torch.zeros(())}, {"context": 1}, {"t": 0.5, "context": 1}])
def test_what_may_not_arrive_is_refused(given):
    """A signature of stars alone does not say whether a time or a context is taken."""
    net, x = Stack([Opaque(), Opaque()]), torch.ones(1, 2)
    torch.testing.assert_close(net(x), net(x, t=0.0))
    with pytest.raises(SchemeError, match=r"does not tell\n? ?whether it takes them"):
        net(x, **given)


@pytest.mark.parametrize("way", ["forward", "trajectory", "final_state", "aux"])
def test_a_time_that_is_none_is_refused_where_it_is_read(way):
    net, x = Stack([Clocked() for _ in range(4)], "midpoint"), torch.ones(1, 2)
    for _ in range(2):
        with pytest.raises(SchemeError, match="leave t= out") as caught:
            WAYS[way][1](net, x, t=None)
        assert len(str(caught.value).splitlines()) == 2
        net(x)
    Stack([nn.Identity()])(x, t=None)


def test_every_call_takes_a_tensor():
    net, x = Stack([nn.Linear(2, 2), nn.Linear(2, 2)]), torch.ones(1, 2)
    for _ in range(2):
        with pytest.raises(SchemeError, match="want a tensor"):
            net((x,))
        net(x)


@pytest.mark.parametrize("h", ["0.25", 0.25, torch.tensor(0.25), np.float32(0.25)])
def test_a_schedule_sets_the_number_that_it_is_given(h):
    x = torch.ones(1, 2)
    net, want = (Stack([nn.Tanh()] * 4, "midpoint", step=step) for step in (1.0, 0.25))
    net.set_step(h)
    assert torch.equal(net(x), want(x)) and type(net.steps[0].h) is float
    for wrong in ("half", None, torch.ones(2), torch.tensor(0.1, requires_grad=True), float("nan"), True):
        with pytest.raises(SchemeError):
            net.set_step(wrong)
    assert net.steps[0].h == 0.25
