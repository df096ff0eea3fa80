"""odeint: shapes and calls of torchdiffeq's interface, trees, directions, options, limits, statuses."""

import math

import pytest
import torch
from torch import nn

import schemes
from schemes import SchemeError, integrate, odeint, tableaux
from schemes.ode import odeint_adjoint, odeint_dense, odeint_event
from schemes.ode.control import Control, first_step
from schemes.ode.dense import Hermite

F64 = torch.float64
PAIRS = [name for name, tableau in tableaux.METHODS.items() if tableau.b_hat is not None]


def turning(t, y):
    """A turn whose speed depends on time; y of shape (..., 2)."""
    return torch.stack((y[..., 1], -y[..., 0]), -1) * (1 + torch.sin(t))


def turned(y0, t, t0=0.0):
    """Its solution."""
    angle = (t - t0) + (math.cos(t0) - torch.cos(t))
    c, s = torch.cos(angle), torch.sin(angle)
    return torch.stack((c * y0[..., 0] + s * y0[..., 1], c * y0[..., 1] - s * y0[..., 0]), -1)


def times(*values):
    return torch.tensor(values, dtype=F64)


# --- the interface of torchdiffeq

START = torch.tensor([[1.0, 0.5], [0.2, -1.0], [0.0, 2.0]], dtype=F64)


class Turning(nn.Module):
    def __init__(self):
        super().__init__()
        self.speed = nn.Parameter(torch.tensor(1.3, dtype=F64))

    def forward(self, t, y):
        return self.speed * turning(t, y)


def pair_field(t, y):
    a, b = y
    return -a * torch.cos(t), a.sum() * torch.ones_like(b)


TIGHT = {"rtol": 1e-9, "atol": 1e-9}
CALLS = {
    "default": lambda m: m.odeint(turning, START, times(0, 0.4, 1.7)),
    "no method": lambda m: m.odeint(turning, START, times(0, 1.0), method=None),
    "backwards": lambda m: m.odeint(turning, START, times(1, 0.3, -0.5), **TIGHT),
    "one time": lambda m: m.odeint(turning, START, times(2.0)),
    "scalar": lambda m: m.odeint(lambda t, y: -y, torch.ones((), dtype=F64), times(0, 1)),
    "float32": lambda m: m.odeint(turning, START.float(), times(0, 1).float(), rtol=1e-5, atol=1e-6),
    "complex": lambda m: m.odeint(lambda t, y: 1j * y * t, START + 1j, times(0, 1), **TIGHT),
    "tuple": lambda m: m.odeint(pair_field, (START, torch.zeros(4, dtype=F64)), times(0, 1, 2), **TIGHT),
    "tuple of tolerances": lambda m: m.odeint(
        pair_field, (START, torch.zeros(4, dtype=F64)), times(0, 1), rtol=(1e-9, 1e-9), atol=(1e-9, 1e-9)
    ),
    "tensor tolerances": lambda m: m.odeint(
        turning, START, times(0, 1), rtol=torch.tensor(1e-9), atol=torch.full((3, 2), 1e-9, dtype=F64)
    ),
    "dopri8": lambda m: m.odeint(turning, START, times(0, 1), method="dopri8", **TIGHT),
    "bosh3": lambda m: m.odeint(turning, START, times(0, 1), method="bosh3", **TIGHT),
    "adaptive_heun": lambda m: m.odeint(turning, START, times(0, 1), method="adaptive_heun", rtol=1e-7, atol=1e-7),
    "limits": lambda m: m.odeint(
        turning,
        START,
        times(0, 1),
        method="dopri5",
        options={"first_step": 0.01, "max_num_steps": 500, "min_step": 1e-9, "max_step": 0.2, "safety": 0.8}
        | {"ifactor": 5.0, "dfactor": 0.3, "dtype": torch.float64},
        **TIGHT,
    ),
    "step_t": lambda m: m.odeint(
        turning, START, times(0, 1), method="dopri5", options={"step_t": times(0.2, 0.7)}, **TIGHT
    ),
    "jump_t": lambda m: m.odeint(
        lambda t, y: torch.where(t < 0.5, y, -2 * y),
        START,
        times(0, 1),
        method="dopri5",
        options={"jump_t": times(0.5)},
        **TIGHT,
    ),
    "norm": lambda m: m.odeint(
        turning, START, times(0, 1), method="dopri5", options={"norm": lambda x: x.abs().max()}, **TIGHT
    ),
    "euler": lambda m: m.odeint(turning, START, times(0, 0.4, 1.0), method="euler"),
    "midpoint": lambda m: m.odeint(turning, START, times(0, 0.5, 1), method="midpoint", options={"step_size": 0.1}),
    "heun3": lambda m: m.odeint(turning, START, times(1, 0.5, 0), method="heun3", options={"step_size": 0.125}),
    "linear": lambda m: m.odeint(
        turning, START, times(0, 0.33, 1), method="euler", options={"step_size": 0.1, "interp": "linear"}
    ),
    "cubic": lambda m: m.odeint(
        turning, START, times(0, 0.33, 1), method="midpoint", options={"step_size": 0.1, "interp": "cubic"}
    ),
    "grid": lambda m: m.odeint(
        turning,
        START,
        times(0, 0.5, 1),
        method="midpoint",
        options={"grid_constructor": lambda f, y, t: torch.linspace(float(t[0]), float(t[-1]), 9, dtype=F64)},
    ),
    "perturb": lambda m: m.odeint(
        lambda t, y: torch.where(t < 0.5, 1.0, -1.0) * y,
        START,
        times(0, 0.5, 1),
        method="midpoint",
        options={"step_size": 0.25, "perturb": True},
    ),
    "event": lambda m: m.odeint(turning, START[0], times(0, 1), event_fn=lambda t, y: y[1], **TIGHT),
    "event at the start": lambda m: m.odeint(turning, START[2], times(0, 1), event_fn=lambda t, y: y[0], **TIGHT),
    "several values": lambda m: m.odeint(turning, START[0], times(0, 1), event_fn=lambda t, y: y + 0.3, **TIGHT),
    "event of a tuple": lambda m: m.odeint(
        pair_field, (START, torch.zeros(4, dtype=F64)), times(0, 1), event_fn=lambda t, y: y[1][0] - 0.2, **TIGHT
    ),
    "event of fixed steps": lambda m: m.odeint(
        turning,
        START[0],
        times(0, 1),
        method="midpoint",
        options={"step_size": 0.01, "interp": "cubic"},
        event_fn=lambda t, y: y[1],
        atol=1e-10,
    ),
}


class Ours:
    odeint, odeint_adjoint, odeint_event = map(staticmethod, (odeint, odeint_adjoint, odeint_event))


def flattened(x):
    return [y for part in x for y in flattened(part)] if isinstance(x, tuple) else [x]


def same(ours, theirs, tol):
    assert type(ours) is type(theirs)
    for a, b in zip(flattened(ours), flattened(theirs), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.cases(5)
@pytest.mark.parametrize("call", CALLS)
def test_the_same_call_gives_the_same(call):
    theirs = pytest.importorskip("torchdiffeq")
    tol = {"float32": 1e-4, "adaptive_heun": 1e-5, "default": 1e-5, "no method": 1e-5, "scalar": 1e-6}.get(call, 1e-7)
    # The last value of theirs is interpolated, by an extension of lower order.
    tol = {"event of fixed steps": 1e-6, "dopri8": 2e-6, "bosh3": 2e-6}.get(call, tol)
    same(CALLS[call](Ours), CALLS[call](theirs), tol)


@pytest.mark.cases(2)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("adjoint", [False, True])
def test_odeint_event_and_odeint_adjoint_give_the_same_gradients(adjoint, reverse):
    theirs = pytest.importorskip("torchdiffeq")
    found = []
    for m in (Ours, theirs):
        field = Turning()
        y0 = START[0].clone().requires_grad_()
        t0 = torch.tensor(0.2, dtype=F64, requires_grad=not adjoint)  # of which torchdiffeq loses the sign
        t, y = m.odeint_event(
            field,
            y0,
            t0,
            event_fn=lambda t, y: y[1] - 0.1 * t,
            reverse_time=reverse,
            odeint_interface=m.odeint_adjoint if adjoint else m.odeint,
            rtol=1e-9,
            atol=1e-9,
        )
        loss = t * 2 + (y[-1] * times(1.0, 3.0)).sum()
        found.append([t, y, *torch.autograd.grad(loss, [y0, field.speed])])
    same(tuple(found[0]), tuple(found[1]), 1e-6)


def test_the_adjoint_gives_the_same():
    theirs = pytest.importorskip("torchdiffeq")
    found = []
    for m in (Ours, theirs):
        field, t = Turning(), times(0, 0.5, 1.5).requires_grad_()
        y0 = START.clone().requires_grad_()
        y = m.odeint_adjoint(
            field, y0, t, adjoint_rtol=1e-10, adjoint_atol=1e-10, adjoint_options={"norm": "seminorm"}, **TIGHT
        )
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=F64).reshape(y.shape)).sum()
        found.append([y, *torch.autograd.grad(loss, [y0, t, field.speed])])
    same(tuple(found[0]), tuple(found[1]), 1e-6)


def test_callbacks_are_called():
    calls = {}

    class Watched(Turning):
        def callback_step(self, t0, y0, dt):
            calls.setdefault("step", []).append((float(t0), tuple(y0.shape), float(dt)))

        def callback_accept_step(self, t0, y0, dt):
            calls.setdefault("accept", []).append(float(t0))

        def callback_reject_step(self, t0, y0, dt):
            calls.setdefault("reject", []).append(float(t0))

    with torch.no_grad():
        found = integrate(Watched(), START, times(0, 2), options={"first_step": 1.0}, **TIGHT)
    assert len(calls["step"]) == found.accepted + found.rejected and found.rejected
    assert len(calls["accept"]) == found.accepted and len(calls["reject"]) == found.rejected
    assert calls["step"][0] == (0.0, (3, 2), 1.0)


def test_dense_output_as_torchdiffeq_calls_it():
    solution = odeint_dense(turning, START, torch.tensor(0.0, dtype=F64), torch.tensor(2.0, dtype=F64), **TIGHT)
    t = torch.linspace(0, 2, 9, dtype=F64)
    want = torch.stack([turned(START, x) for x in t])
    torch.testing.assert_close(solution(t), want, rtol=1e-7, atol=1e-7)


# --- states, times, directions


@pytest.mark.cases(7)
@pytest.mark.parametrize("method", [*PAIRS, "rk4", "substeps(heun3, 2)", "rkc2(9)", "alf", "ab2", "revnet + rk4"])
def test_every_kind_of_method_solves(method):
    if "revnet" in method:
        with pytest.raises(SchemeError):
            odeint(turning, START, times(0, 1), method=method, options={"steps": 4})
        return
    options = {} if method in PAIRS else {"options": {"steps": 400}}
    y = odeint(turning, START, times(0, 0.5, 2), method=method, rtol=1e-6, atol=1e-6, **options)
    want = torch.stack([turned(START, x) for x in times(0, 0.5, 2)])
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(y[0], START)


@pytest.mark.cases(1)
@pytest.mark.parametrize("method", PAIRS)
def test_backwards_is_forwards_of_the_reflected_field(method):
    """Bit by bit: no part of the solver knows which way time goes."""
    t = times(1.0, 0.3, -0.6)
    back = odeint(turning, START, t, method=method, rtol=1e-5, atol=1e-5)
    forth = odeint(lambda t, y: -turning(-t, y), START, -t, method=method, rtol=1e-5, atol=1e-5)
    assert torch.equal(back, forth)
    there = odeint(turning, START, times(0, 1), method=method, **TIGHT if method != "heun2" else {})[-1]
    again = odeint(turning, there, times(1, 0), method=method, **TIGHT if method != "heun2" else {})[-1]
    torch.testing.assert_close(again, START, rtol=1e-6, atol=1e-6)


def test_trees_of_any_kind_come_back_as_they_were():
    y0 = {"a": START, "b": (torch.zeros((), dtype=torch.float32), [torch.ones(2, dtype=torch.complex64)])}

    def f(t, y):
        return {"a": -y["a"], "b": (y["a"].sum().float(), [1j * y["b"][1][0]])}

    y = odeint(f, y0, times(0, 1), rtol=1e-6, atol=1e-6)
    assert y["a"].shape == (2, 3, 2) and y["a"].dtype == F64
    assert y["b"][0].dtype == torch.float32 and y["b"][1][0].dtype == torch.complex64
    torch.testing.assert_close(y["a"][1], START * math.exp(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y["b"][1][0][1], torch.exp(1j * torch.ones(2)).to(torch.complex64), rtol=1e-4, atol=1e-4)
    same_as_alone = odeint(lambda t, y: (turning(t, y[0]),), (START,), times(0, 1))[0]
    assert torch.equal(same_as_alone, odeint(turning, START, times(0, 1)))


def test_the_keys_of_a_dict_have_no_order():
    """Neither in what func returns, nor in tolerances: each finds its own."""
    y0 = {"a": START, "b": {"c": START[0], "d": START[1]}}

    def f(t, y):
        return {"b": {"d": -2 * y["b"]["d"], "c": y["b"]["c"]}, "a": -y["a"]}

    y = odeint(f, y0, times(0, 1))
    assert list(y) == ["a", "b"] and list(y["b"]) == ["c", "d"]
    torch.testing.assert_close(y["a"][1], START * math.exp(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y["b"]["d"][1], START[1] * math.exp(-2), rtol=1e-6, atol=1e-6)
    y0, f = {"a": START, "b": START}, lambda t, y: {"b": -y["b"], "a": turning(9 * t, y["a"])}
    one, other = ({"a": 1e9, "b": 1e-9}, {"b": 1e-9, "a": 1e9}), ({"a": 1e-9, "b": 1e9}, {"b": 1e9, "a": 1e-9})
    counts = [[integrate(f, y0, times(0, 3), rtol=tol, atol=tol).accepted for tol in pair] for pair in (one, other)]
    assert counts[0][0] == counts[0][1] < counts[1][0] / 2 and counts[1][0] == counts[1][1]
    with pytest.raises(SchemeError, match="rtol is a dict with 'a', 'c', want the structure of y0"):
        odeint(f, y0, times(0, 1), rtol={"a": 1e-3, "c": 1e-3})


@pytest.mark.parametrize("batch", ["joint", "independent"])
@pytest.mark.parametrize("y0", [(1.0, 0.0), (0.0, 0.0)])
def test_without_an_absolute_tolerance_zero_may_stay_zero(y0, batch):
    """0 / 0 of error and allowance is no error; and a start at zero finds a first step."""
    f = lambda t, y: torch.stack((torch.cos(t).squeeze() + 0 * y[..., 0], 0 * y[..., 1]), -1)  # noqa: E731
    found = integrate(f, times(*y0)[None], times(0, 1), atol=0.0, batch=batch, rtol=1e-6)
    torch.testing.assert_close(found.y[-1, 0], times(y0[0] + math.sin(1), 0.0), rtol=1e-5, atol=0)
    assert int(found.accepted) < 60


@pytest.mark.parametrize("batch", ["joint", "independent"])
@pytest.mark.parametrize("graph", [False, True])
def test_fields_that_write_in_place_are_refused(batch, graph):
    kept = torch.empty_like(START)

    def argument(t, y):
        return y.neg_()

    def result(t, y):
        return torch.neg(y.detach(), out=kept)

    with torch.set_grad_enabled(graph):
        with pytest.raises(SchemeError, match=r"changes its argument y in place; write to a copy"):
            odeint(argument, START.clone(), times(0, 1), batch=batch)
        with pytest.raises(SchemeError, match=r"has returned before.*return a new one"):
            odeint(result, START, times(0, 1), batch=batch)
        same = odeint(lambda t, y: y, START, times(0, 1), batch=batch)  # what is only handed on is in order
    torch.testing.assert_close(same[1], START * math.e, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batch", ["joint", "independent"])
@pytest.mark.parametrize("method, options", [("dopri5", {}), ("verner89", {}), ("bosh3", {}), ("rk4", {"steps": 20})])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("part", [False, True])
def test_tensors_used_in_turn_are_refused(part, count, method, options, batch):
    """Whichever of the earlier results is written to, as a whole or through a view."""
    if batch == "independent" and options:
        return
    kept = [torch.empty(2, *START.shape, dtype=F64) for _ in range(count)]
    calls = []

    def in_turn(t, y):
        one = kept[len(calls) % count]
        calls.append(t)
        one = one[0] if part else one.unbind()[1]
        return one.copy_(-y)

    with torch.no_grad(), pytest.raises(SchemeError, match=r"has returned before.*return a new one"):
        odeint(in_turn, START, times(0, 1), method=method, options=options, batch=batch)
    assert len(calls) == count + 1


@pytest.mark.parametrize("batch", ["joint", "independent"])
def test_tensors_that_are_new_in_each_call_may_be_written_to(batch):
    def f(t, y):
        k = torch.empty_like(y)
        return k.copy_(y).neg_()

    for graph in (False, True):
        y0 = START.clone().requires_grad_(graph)
        y = odeint(f, y0, times(0, 1), batch=batch)
        torch.testing.assert_close(y[1].detach(), START / math.e, rtol=1e-6, atol=1e-6)


def test_slopes_are_broadcast_and_checked():
    y = odeint(lambda t, y: torch.cos(t), START, times(0, 2))
    torch.testing.assert_close(y[1], START + math.sin(2), rtol=1e-6, atol=1e-6)
    with pytest.raises(SchemeError, match=r"returned \(7,\) for a state of \(3, 2\)"):
        odeint(lambda t, y: torch.zeros(7), START, times(0, 2))
    with pytest.raises(SchemeError, match=r"returned torch.float64 for a state of torch.float32"):
        odeint(lambda t, y: y.double(), START.float(), times(0, 2))
    with pytest.raises(SchemeError, match="returned a float"):
        odeint(lambda t, y: 0.0, START, times(0, 2))


def test_times_are_as_the_state_and_never_half():
    seen = []

    def f(t, y):
        seen.append((t.dtype, t.ndim))
        return -y

    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        seen.clear()
        odeint(f, torch.ones(2, dtype=dtype), torch.tensor([0.0, 1.0]), rtol=1e-2, atol=1e-2)
        assert set(seen) == {(torch.float32, 0)}


# --- options and limits


def test_fixed_steps_end_on_every_time():
    seen = []

    def f(t, y):
        seen.append(float(t))
        return -y

    odeint(f, START, times(0, 0.25, 1.0), method="euler", options={"step_size": 0.1})
    assert seen == pytest.approx([*[0.25 * k / 3 for k in range(3)], *[0.25 + 0.75 * k / 8 for k in range(8)]])
    seen.clear()
    odeint(f, START, times(0, 1, 3), method="euler", options={"steps": 2})
    assert seen == pytest.approx([0, 0.5, 1, 2])
    seen.clear()
    odeint(f, START, times(0, 1), method="euler", options={"grid": times(0, 0.1, 0.7, 1)})
    assert seen == pytest.approx([0, 0.1, 0.7])


def test_a_pair_with_fixed_steps_is_the_plain_method():
    y = odeint(turning, START, times(0, 1), method="dopri5", options={"steps": 5})
    x = START
    for n in range(5):
        (x,) = schemes.get("dopri5").step([turning] * 7, (x,), t=torch.tensor(n / 5, dtype=F64), h=0.2)
    torch.testing.assert_close(y[1], x, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("method", ["alf", "leapfrog", "reversible(rk4)", "ab2", "reversible_heun"])
def test_schemes_of_several_streams_start_anew_where_the_step_changes(method):
    y = odeint(turning, START, times(0, 1, 1.5), method=method, options={"step_size": 0.02})
    one = odeint(turning, START, times(0, 1), method=method, options={"step_size": 0.02})[1]
    torch.testing.assert_close(y[1], one, rtol=1e-12, atol=1e-12)
    y = odeint(turning, START, times(0, 1, 1.005), method=method, options={"step_size": 0.02})
    torch.testing.assert_close(y[2], turned(START, times(1.005)[0]), rtol=1e-2, atol=1e-2)


def test_steps_stay_within_their_limits():
    found = integrate(turning, START, times(0, 3), options={"max_step": 0.1, "first_step": 0.02}, rtol=1e-3, atol=1e-3)
    sizes = [h for _, h in found.steps]
    assert sizes[0] == 0.02 and max(sizes) <= 0.1 and sum(sizes) == pytest.approx(3)
    loose = integrate(turning, START, times(0, 3), options={"min_step": 0.2}, rtol=1e-12, atol=1e-12)
    assert min(h for _, h in loose.steps[:-1]) >= 0.2 * 0.5 and loose.accepted < 40


def test_steps_end_where_they_are_told_to_and_jumps_are_seen_from_both_sides():
    seen = []

    def f(t, y):
        seen.append(float(t))
        return torch.where(t < 0.5, 1.0, -1.0) * y

    found = integrate(f, START, times(0, 1), options={"step_t": [0.21], "jump_t": [0.5]}, **TIGHT)
    starts = [t for t, _ in found.steps]
    assert 0.21 in starts and 0.5 in starts
    assert 0.5 not in seen and min(abs(t - 0.5) for t in seen) < 1e-15
    torch.testing.assert_close(found.y[-1], START, rtol=1e-9, atol=1e-9)
    assert found.rejected <= 2  # none at the jump
    blind = integrate(f, START, times(0, 1), **TIGHT)
    assert blind.rejected > found.rejected
    back = integrate(f, START, times(1, 0), options={"jump_t": [0.5]}, **TIGHT)
    torch.testing.assert_close(back.y[-1], START, rtol=1e-9, atol=1e-9)


def test_a_norm_of_trees_sees_the_tree():
    shapes = []

    def norm(y):
        shapes.append(tuple(x.shape for x in y))
        return y[0].abs().max()

    y0 = (START, torch.zeros(2, dtype=F64))
    wild = lambda t, y: (turning(t, y[0]), 100 * torch.cos(50 * t) * torch.ones_like(y[1]))  # noqa: E731
    free = integrate(wild, y0, times(0, 1), options={"norm": norm}, rtol=1e-5, atol=1e-5)
    bound = integrate(wild, y0, times(0, 1), rtol=1e-5, atol=1e-5)
    assert set(shapes) == {((3, 2), (2,))} and free.accepted < bound.accepted / 2


@pytest.mark.parametrize("batch", ["joint", "independent"])
def test_times_far_from_zero_are_stepped_through(batch):
    """There neighbouring numbers are further apart than the first step would be."""
    y = odeint(lambda t, y: torch.ones_like(y), START, times(1e15, 1e15 + 1), batch=batch)
    torch.testing.assert_close(y[1], START + 1)


def test_controllers_differ_and_all_of_them_solve():
    counts = set()
    for p, i, d in ((0.0, 1.0, 0.0), (0.2, 0.65, 0.0), (0.4, 0.3, 0.0), (0.2, 0.4, 0.1)):
        found = integrate(
            turning, START, times(0, 9), options={"proportional": p, "integral": i, "derivative": d}, rtol=1e-6
        )
        torch.testing.assert_close(found.y[-1], turned(START, times(9)[0]), rtol=1e-4, atol=1e-4)
        counts.add(found.accepted)
    assert len(counts) > 1


@pytest.mark.parametrize("outputs", ["step", "interpolate"])
@pytest.mark.parametrize("method", PAIRS)
def test_values_within_steps_are_as_right_as_those_at_their_ends(method, outputs):
    t = torch.linspace(0, 3, 40, dtype=F64)
    found = integrate(turning, START, t, method=method, options={"outputs": outputs}, rtol=1e-5, atol=1e-5)
    error = max(float((y - turned(START, x)).abs().max()) for x, y in zip(t, found.y, strict=True))
    assert error < (1e-3 if outputs == "step" or method != "verner89" else 1e-1)
    assert (found.accepted >= 39) == (outputs == "step" or found.accepted >= 39)


def blows_up(t, y):
    return y * y


@pytest.mark.parametrize("batch", ["joint", "independent"])
def test_what_stops_a_solve_is_said_with_time_and_sample(batch):
    y0 = torch.tensor([[0.1], [1.0], [0.2]], dtype=F64)
    with pytest.raises(SchemeError, match=r"odeint: the step size fell below .* t=1(\.0+\d*)?.*check=False"):
        odeint(blows_up, y0, times(0, 2), batch=batch)
    found = integrate(blows_up, y0, times(0, 0.5, 2), batch=batch, check=False)
    if batch == "joint":
        assert found.status == "underflow" and len(found.y) == 2 and found.reached == pytest.approx(1, abs=1e-6)
        torch.testing.assert_close(found.y[1], y0 / (1 - 0.5 * y0), rtol=1e-6, atol=1e-6)
    else:
        assert found.status == ["finished", "underflow", "finished"]
        torch.testing.assert_close(found.y[2, [0, 2]], (y0 / (1 - 2 * y0))[[0, 2]], rtol=1e-6, atol=1e-6)
        assert bool(found.y[2, 1].isnan()) and float(found.reached[1]) == pytest.approx(1, abs=1e-6)
    with pytest.raises(SchemeError, match=r"3 steps were used up at t=.*raise rtol and atol, or max_steps"):
        odeint(turning, START, times(0, 9), options={"max_steps": 3}, batch=batch)
    bad = y0.clone()
    bad[2] = math.nan
    with pytest.raises(SchemeError, match=r"not finite at the start, t=0, sample 2; look at y0"):
        odeint(blows_up, bad, times(0, 2), batch=batch)

    def breaks(t, y):
        return torch.where((t > 0.5) & (torch.arange(3)[:, None] == 1), math.inf, 1.0) * y

    with pytest.raises(SchemeError, match=r"stopped being finite after t=0\.[45]\d*, sample 1"):
        odeint(breaks, y0, times(0, 2), batch=batch)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"method": "nope"}, "there is no 'nope'"),
        ({"method": "scipy_solver"}, "take dopri8"),
        ({"method": "implicit_adams"}, "implicit methods are not there yet"),
        ({"gradient": "magic"}, "gradient is 'magic', want one of store, checkpoint, reverse, adjoint"),
        ({"batch": "both"}, "batch is 'both'"),
        ({"options": {"fist_step": 1.0}}, "no option 'fist_step'; the closest are first_step"),
        ({"options": {"step_size": 0.1, "safety": 1.0}}, "fixed steps have no option 'safety'"),
        ({"options": {"step_size": 0.1, "steps": 2}}, "exclude each other"),
        ({"options": {"step_size": -0.0}}, "want a positive number"),
        ({"options": {"steps": 2.5}}, "whole number"),
        ({"options": {"max_steps": 3, "max_num_steps": 4}}, "given twice"),
        ({"options": {"min_step": 2.0, "max_step": 1.0}}, "want 0 <= min_step <= max_step"),
        ({"options": {"step_t": [0.5], "jump_t": [0.5]}}, "repeat a time"),
        ({"options": {"outputs": "all"}}, "want 'step' or 'interpolate'"),
        ({"options": {"norm": lambda x: x.abs()}}, r"norm returned a torch.float64 of shape \(3, 2\), want one real"),
        ({"options": {"norm": lambda x: x.abs()}, "batch": "independent"}, r"norm returned .* shape \(2,\), want one"),
        ({"options": {"context": START}}, "belongs to batch='independent'"),
        ({"options": {"grid": times(0, 0.5)}, "method": "rk4"}, "the grid goes from 0 to 0.5, want from 0 to 1"),
        ({"options": {"interp": "odd", "step_size": 0.1}, "method": "rk4"}, "want 'linear', 'cubic' or None"),
        ({"rtol": -1.0}, "rtol is -1"),
        ({"rtol": 0.0, "atol": 0.0}, "both 0"),
        ({"rtol": torch.tensor(1e-3, requires_grad=True)}, "rtol requires a gradient"),
        ({"rtol": (1e-3, 1e-3)}, "rtol has 2 parts, y0 1"),
        ({"rtol": torch.ones(5)}, r"rtol is of shape \(5,\) for a state of \(3, 2\)"),
        ({"atol": torch.ones(3, 1), "y0": (START,)}, "atol is one tensor for a y0 of 1"),
        ({"options": {"max_steps": 2.5}}, "max_steps is 2.5, want a whole number"),
        ({"options": {"max_steps": 0}}, "max_steps is 0, want a whole number"),
        ({"options": {"step_size": 0.1, "max_steps": 3}}, "the grid has 10 steps, more than the 3 of max_steps"),
        ({"options": {"grid": times(0, 0.7, 0.3, 1)}, "method": "rk4"}, "grid must be strictly monotone"),
        ({"options": {"grid": []}, "method": "rk4"}, "grid has 0 times"),
        ({"options": {"grid": times(0, 1).requires_grad_()}, "method": "rk4"}, "grid requires a gradient"),
        ({"y0": START[:0], "event_fn": lambda t, y: y[:, 0], "batch": "independent"}, "no entries"),
        ({"y0": START[:0], "event_fn": lambda t, y: y.sum()}, "no entries, and so no event would end the solve"),
        ({"method": "rk4", "batch": "independent"}, "wants an embedded pair"),
        ({"batch": "independent", "gradient": "adjoint"}, "takes gradient='store' or 'checkpoint'"),
        ({"method": "rk4", "gradient": "adjoint"}, "wants an embedded pair"),
        ({"method": "revcol(2)", "gradient": "reverse"}, "no rule for"),
        ({"method": "adaptive(tsit5)", "options": {"steps": 2}}, "chooses its steps by itself; for fixed ones"),
        ({"t": times(0, 1, 1)}, "strictly increasing or decreasing"),
        ({"t": times(0, math.nan)}, "strictly increasing or decreasing"),
        ({"t": torch.tensor([0, 1])}, "want floating-point"),
        ({"t": times(0, 1)[None]}, "want a row of times"),
        ({"t": times()}, "t is empty"),
        ({"y0": torch.tensor([1, 2])}, "want real or complex"),
        ({"y0": (START, "a")}, "holds a str"),
        ({"y0": ()}, "holds no tensor"),
        ({"y0": START[0, 0], "batch": "independent"}, "samples along the first dimension"),
        ({"func": 3}, "func is a int"),
        ({"func": lambda t, y: (y, y), "y0": (START,)}, "func returned 2 tensors, want the structure of y0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, message):
    given = {"func": turning, "y0": START, "t": times(0, 1), **arguments}
    with pytest.raises(SchemeError, match=message):
        odeint(given.pop("func"), given.pop("y0"), given.pop("t"), **given)


def test_adaptive_brings_its_own_tolerances():
    loose = integrate(turning, START, times(0, 3), method="adaptive(tsit5, rtol=1e-2, atol=1e-2)")
    tight = integrate(turning, START, times(0, 3), method="tsit5")
    assert loose.accepted < tight.accepted / 3


@pytest.mark.parametrize("given", [{"rtol": 1e-9}, {"atol": 1e-9}, {"rtol": 1e-7, "atol": 1e-9}, {"rtol": 1e-3}])
def test_what_the_call_gives_takes_precedence_over_adaptive(given):
    want = odeint(turning, START, times(0, 3), method="tsit5", **{"rtol": 1e-2, "atol": 1e-4, **given})
    method = "adaptive(tsit5, rtol=1e-2, atol=1e-4)"
    assert torch.equal(odeint(turning, START, times(0, 3), method=method, **given), want)
    dense = odeint_dense(turning, START, times(0)[0], times(3)[0], method=method, **given)
    torch.testing.assert_close(dense(times(0, 3)), want, rtol=1e-12, atol=1e-12)


def test_a_gradient_that_the_call_names_takes_precedence_over_adaptive():
    y = START.clone().requires_grad_()
    found = []
    for method, gradient in (("adaptive(tsit5, adjoint=true)", "checkpoint"), ("adaptive(tsit5)", "checkpoint")):
        found += torch.autograd.grad(odeint(turning, y, times(0, 3), method=method, gradient=gradient)[-1].sum(), y)
    adjoint = torch.autograd.grad(odeint(turning, y, times(0, 3), method="adaptive(tsit5, adjoint=true)")[-1].sum(), y)
    assert torch.equal(*found) and not torch.equal(found[0], adjoint[0])


def test_no_entries_and_one_time():
    empty = torch.empty(0, 2, dtype=F64, requires_grad=True)
    for batch in ("joint", "independent"):
        y = odeint(turning, empty, times(0, 1), batch=batch)
        assert y.shape == (2, 0, 2)
        y.sum().backward()
        assert odeint(turning, START, times(0.5), batch=batch).shape == (1, 3, 2)


def test_counts_are_the_calls():
    calls = []
    f = lambda t, y: calls.append(1) or turning(t, y)  # noqa: E731
    for options in ({}, {"method": "dopri8"}, {"method": "rk4", "options": {"steps": 7}}):
        calls.clear()
        found = integrate(f, START, times(0, 1), **options)
        assert found.evaluations == len(calls) > 0
    calls.clear()
    with torch.no_grad():
        found = integrate(f, START, times(0, 1), batch="independent")
    assert found.evaluations == len(calls)


@pytest.mark.long
def test_compiled_fields_compile_once():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    f = torch.compile(turning, backend=counter)
    y = odeint(f, START, times(0, 0.7, 2), method="tsit5")
    torch.testing.assert_close(y, odeint(turning, START, times(0, 0.7, 2), method="tsit5"), rtol=1e-9, atol=1e-9)
    odeint(f, START, times(0, 1), method="rk4", options={"step_size": 0.03})
    assert counter.frame_count == 1


@pytest.mark.parametrize("rates", [(1.0, 0.1), (0.1, 30.0), (1e-9, 1e-9)])
@pytest.mark.parametrize("span", [2.0, -2.0])
def test_the_first_step_is_hairers(rates, span):
    """Of y' = -rate y: slopes and their change in units of what is allowed, here in plain numbers."""
    rate, y = torch.tensor(rates, dtype=torch.float64), torch.tensor([1.0, -3.0], dtype=torch.float64)
    order, control = 4, Control(rtol=1e-6, atol=1e-8)
    found = first_step(lambda t, y: -rate * y, 0.0, y, -rate * y, span, order, control)

    scale = [1e-8 + 1e-6 * abs(v) for v in y.tolist()]
    size = [abs(v) / s for v, s in zip(y.tolist(), scale, strict=True)]
    rms = [math.sqrt(sum((v * r**power) ** 2 for v, r in zip(size, rates, strict=True)) / 2) for power in (0, 1, 2)]
    h = min(1e-6 if min(rms[:2]) < 1e-5 else 0.01 * rms[0] / rms[1], 2.0)
    largest = max(rms[1], rms[2])  # the second derivative is what a small step of Euler's shows
    h1 = max(1e-6, 1e-3 * h) if largest <= 1e-15 else (0.01 / largest) ** (1 / (order + 1))
    assert found == pytest.approx(math.copysign(min(100 * h, h1, 2.0), span), rel=1e-6)


def test_the_slope_of_a_hermite_cubic_is_its_derivative():
    ends = torch.randn(4, 3, dtype=torch.float64).unbind()
    for slopes in (ends[2:], (None, None)):
        step = Hermite(0.5, 1.25, *ends[:2], *slopes)
        t = torch.tensor(0.8, dtype=torch.float64)
        want = torch.func.jvp(step.at, (t,), (torch.ones_like(t),))[1]
        torch.testing.assert_close(step.derivative(t), want)
        torch.testing.assert_close(step.derivative(0.8), want)
