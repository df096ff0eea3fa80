"""Function transforms, forward mode and checkpoints of torch inside of residual functions, and forward mode around."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from odenets import SchemeError, Stack

F64 = torch.float64
MODES = ["checkpoint", "offload", "reverse", "exact", "auto(memory=1GB)", "store + reverse"]


def gradient(f, x):
    return torch.func.grad(lambda z: f(z).square().sum())(x)


def by_autograd(f, x):
    with torch.enable_grad():
        z = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(f(z).square().sum(), z, create_graph=True)[0]


def dual(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


INSIDE = {
    "grad": gradient,
    "jacrev": lambda f, x: torch.func.vmap(torch.func.jacrev(f))(x).sum(1),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "dual": dual,
    "autograd.grad": by_autograd,
    "reentrant": lambda f, x: checkpoint(f, x, use_reentrant=True),
    "not reentrant": lambda f, x: checkpoint(f, x, use_reentrant=False),
}
SAVED = "torch.func.grad, vjp, jacrev and hessian inside of a residual function"
# What is refused, in which modes, in which words, and what runs in its stead there.
REFUSED = {
    "grad": (MODES, SAVED, ["autograd.grad"]),
    "jacrev": (MODES, SAVED, []),
    "reentrant": (
        ["reverse", "exact", "auto(memory=1GB)", "store + reverse"],
        r"torch.utils.checkpoint\(use_reentrant=True\) inside of a residual function",
        ["not reentrant"],
    ),
}


class Inside(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layers, self.kind = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), kind

    def forward(self, x):
        return 0.3 * INSIDE[self.kind](self.layers, x)


def run(kind, mode):
    torch.manual_seed(0)
    net = Stack([Inside(kind) for _ in range(4)], "revnet", backprop=mode).double()
    x = torch.randn(3, 8, dtype=F64, requires_grad=True)
    for _ in range(2):  # under the checks of a first pass, and without
        y = net(x)
        y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in net.parameters())]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind", INSIDE)
def test_what_runs_inside_of_a_residual_function_gives_what_the_stored_run_does(kind):
    want = run(kind, "store")
    modes, words, instead = REFUSED.get(kind, ([], "", []))
    for mode in MODES:
        if mode not in modes:
            # exact arithmetic rounds to a grid
            torch.testing.assert_close(run(kind, mode), want, rtol=1e-8, atol=1e-9 if mode == "exact" else 1e-12)
            continue
        with pytest.raises(SchemeError, match=words) as caught:
            run(kind, mode)
        assert len(str(caught.value).splitlines()) == 2 and "backprop='store'" in str(caught.value)
        assert isinstance(caught.value.__cause__, RuntimeError)  # whose traceback shows where
    for other in instead:  # which runs in every mode, as its own case shows
        torch.testing.assert_close(run(other, "store"), want)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind", ["grad", "reentrant"])
def test_a_plan_is_not_measured_where_a_step_cannot_be(kind):
    net = Stack([Inside(kind) for _ in range(4)], "revnet")
    with pytest.raises(SchemeError, match=REFUSED[kind][1]):
        net.plan(torch.ones(3, 8, requires_grad=True), memory="1GB")


def test_errors_of_users_stay_what_they_are():
    def fails(x):
        raise RuntimeError("saved by nobody")

    for mode in MODES:
        with pytest.raises(RuntimeError, match="saved by nobody") as caught:
            Stack([fails] * 4, "revnet", backprop=mode)(torch.ones(3, 8, requires_grad=True))
        assert not isinstance(caught.value, SchemeError)


@pytest.mark.parametrize("mode", ["store", *MODES])
def test_forward_mode_through_a_stack_has_its_tangent_or_is_refused(mode):
    torch.manual_seed(0)
    net = Stack([nn.Linear(4, 4) for _ in range(4)], "revnet", backprop=mode).double()
    x, v = torch.randn(3, 8, dtype=F64), torch.randn(3, 8, dtype=F64)
    net.backprop = "store"
    want = torch.autograd.functional.jvp(net, x, v)[1]
    net.backprop = mode
    for _ in range(2):
        with forward_ad.dual_level():
            given = forward_ad.make_dual(x, v)
            if "reverse" in mode or mode == "exact":
                with pytest.raises(
                    SchemeError, match=r"forward-mode .* cannot pass backprop='\w+'; use backprop='store'"
                ):
                    net(given)
                continue
            try:
                found = net(given)
            except SchemeError as error:  # as checkpoints of torch 2.11 do
                assert "Function without jvp" in str(error) and mode == "checkpoint"
                assert torch.__version__ < "2.13"  # compared as versions are
            else:
                torch.testing.assert_close(forward_ad.unpack_dual(found).tangent, want)
        net(x)  # as always, once the level is closed


@pytest.mark.parametrize("kind", ["grad", "jacrev", "jvp", "vmap"])
def test_a_transform_of_a_stack_that_offloads_is_that_of_a_stored_one_or_is_refused_by_name(kind):
    torch.manual_seed(0)
    net = Stack([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)], "revnet").double()
    x = torch.randn(3, 8, dtype=F64)
    f = net if kind in ("grad", "jvp") else lambda z: net(z[None])[0]  # the others map over the samples
    want = INSIDE[kind](f, x)
    net.backprop = "offload"
    if kind in ("jvp", "vmap"):
        torch.testing.assert_close(INSIDE[kind](f, x), want)
        return
    with pytest.raises(SchemeError, match=SAVED + r", or of a stack that offloads, .*\n.*backprop='store'"):
        INSIDE[kind](f, x)
