"""Every way through a stack is the same walk, in values and gradients, whatever scheme, mode and step sizes."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from stacks import factory
from torch import nn

import schemes
from odenets import SchemeError
from schemes.step_size import FromError, step_size

F64 = torch.float64
WIDTH = 6

FIXED = ["euler", "rk4", "nested(midpoint, euler)", "2*euler + midpoint", "dopri5", "ab2", "adaptive(dopri5)"]
REVERSIBLE = ["revnet", "leapfrog", "momentum(0.9)", "reversible_heun", "alf", "revcol(2)", "dense(2)", "bdia"]
MODES = ["store", "checkpoint", "checkpoint(2)", "reverse", "exact"]
RULES = ["1", "decay(0.8)", "learned(h0=0.5)", "error(1e-3)"]


class Body(nn.Module):
    """Reads all that a residual function may: its streams, a dropout mask, batch statistics, the time."""

    def __init__(self, slot, timed):
        super().__init__()
        width = sum(slot.in_channels)
        self.net = nn.Sequential(nn.Linear(width, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2))
        self.out = nn.Linear(5, slot.out_channels)
        self.timed = timed

    def forward(self, *xs, t):
        y = self.out(self.net(torch.cat(xs, 1)))
        return 0.3 * (y * (1 + torch.sin(torch.as_tensor(t, dtype=y.dtype))) if self.timed else y)


class Untimed(Body):
    def forward(self, *xs):
        return super().forward(*xs, t=0.0)


def stack(scheme, mode, rule, timed, post_step):
    """The drawn stack, or None where it is refused when it is built."""
    torch.manual_seed(0)
    try:
        return factory(
            lambda slot: (Body if timed else Untimed)(slot, timed),
            scheme,
            3 * len(schemes.get(scheme).plan),
            channels=WIDTH,
            step=float(rule) if rule == "1" else rule,
            backprop=mode,
            post_step=nn.Softsign() if post_step else None,
        ).to(torch.float32 if mode == "exact" else F64)
    except SchemeError:
        return None


WALKS = {
    "forward": lambda net, x: net(x),
    "final_state": lambda net, x: net.scheme.readout(net.final_state(x)),
    "visit_states": lambda net, x: net.scheme.readout(net.visit_states(x, lambda n, state: None)),
    "the last state visited": lambda net, x: last_visited(net, x),
    "trajectory": lambda net, x: net.trajectory(x)[-1],
    "forward_with_errors": lambda net, x: net.forward_with_errors(x).output,
}


def last_visited(net, x):
    seen = []
    net.visit_states(x, lambda n, state: seen.append((n, state)))
    assert [n for n, _ in seen] == list(range(net.depth))
    return net.scheme.readout(seen[-1][1])


def run(walk, net, x):
    """Output, gradients, buffers and generator after a walk from one seed and one state."""
    net.load_state_dict(net.saved)
    net.zero_grad()
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    y = walk(net, x)
    y.square().sum().backward()
    grads = [x.grad, *(p.grad for p in net.parameters())]
    return [y.detach(), *grads, *(b.clone() for b in net.buffers()), torch.get_rng_state()]


def same(got, want, tolerance, what):
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert (a is None) == (b is None), (what, i)
        if a is not None and not torch.equal(a, b):
            assert tolerance and a.is_floating_point(), (what, i)
            error = float((a - b).abs().max()) / max(1.0, float(b.abs().max()))
            assert error <= tolerance, (what, i, error)


@given(
    scheme=st.sampled_from(FIXED + REVERSIBLE),
    mode=st.sampled_from(MODES),
    rule=st.sampled_from(RULES),
    timed=st.booleans(),
    post_step=st.booleans(),
    training=st.booleans(),
)
def test_every_walk_is_the_same_walk(scheme, mode, rule, timed, post_step, training):
    """forward = readout of final_state = the last state visited = the end of the trajectory.

    Exactly; within tolerances for an adaptive solver, which a visitor makes stop at each whole time.
    """
    net = stack(scheme, mode, rule, timed, post_step)
    if net is None:
        return
    net.train(training)
    net.saved = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.randn(4, WIDTH, dtype=next(net.parameters()).dtype, generator=torch.Generator().manual_seed(1))
    want = run(WALKS["forward"], net, x)
    adaptive = schemes.get(scheme).evaluations is None
    for name, walk in WALKS.items():
        if name == "forward_with_errors" and not schemes.get(scheme).tableau:
            continue
        try:
            got = run(walk, net, x)
        except SchemeError as error:
            assert name == "forward_with_errors" and "no embedded companion" in str(error), name
            continue
        if name == "forward_with_errors" and not isinstance(net.rule, FromError):
            # The companion's stages run too, and draw and move statistics after those of the method.
            count = len(list(net.parameters())) + 2
            got, plain = (got[:1], want[:1]) if training else (got[:count], want[:count])
            got = [g if w is not None else None for g, w in zip(got, plain, strict=True)]
            same(got, plain, 1e-12, name) if not training else None
            continue
        # Steps that are checkpointed together add up the gradient of a shared step size among themselves first; under
        # an observer each is by itself.
        rounds = name == "forward_with_errors" or (mode == "checkpoint(2)" and str(rule).startswith("learned"))
        same(got, want, 1e-4 if adaptive else 1e-12 if rounds else 0.0, name)


@given(
    scheme=st.sampled_from(FIXED + REVERSIBLE),
    rule=st.sampled_from(RULES),
    timed=st.booleans(),
    mode=st.sampled_from([m for m in MODES if m != "store"]),
)
def test_every_mode_gives_what_store_gives(scheme, rule, timed, mode):
    """Outputs, gradients, buffers and generators; exact arithmetic within what its grid rounds."""
    found = {}
    for each in ("store", mode):
        net = stack(scheme, each, rule, timed, False)
        if net is None:
            return
        net.saved = {k: v.clone() for k, v in net.state_dict().items()}
        x = torch.randn(4, WIDTH, dtype=F64, generator=torch.Generator().manual_seed(1))
        found[each] = run(WALKS["forward"], net, x.to(next(net.parameters()).dtype))
    tolerance = {"exact": 3e-2, "reverse": 1e-9}.get(mode, 1e-12)  # a checkpoint sums gradients of h in another order
    got = [g if g is None else g.to(w.dtype) for g, w in zip(found[mode], found["store"], strict=True)]
    same(got, found["store"], tolerance, mode)


def test_without_gradients_exact_arithmetic_is_plain():
    net, plain = stack("revnet", "exact", "1", False, False).eval(), stack("revnet", "store", "1", False, False).eval()
    plain.float().load_state_dict(net.state_dict())
    x = torch.randn(4, WIDTH)
    with torch.no_grad():
        for name in ("forward", "final_state", "visit_states", "trajectory"):
            assert torch.equal(WALKS[name](net, x), plain(x)), name
    assert not torch.equal(net(x), plain(x))


def test_a_rule_is_read():
    assert step_size(RULES[2]).learned
