"""Events: where they lie, which way, which of them ends the solve, and how their times and states differentiate."""

import math

import pytest
import torch
from torch.autograd import forward_ad

from schemes import Event, SchemeError, integrate, odeint
from schemes.ode import odeint_event
from schemes.ode.gradients import GRADIENTS

F64 = torch.float64
G = 9.81


def times(*values):
    return torch.tensor(values, dtype=F64)


def falling(t, y):
    return torch.stack((y[..., 1], -G * torch.ones_like(y[..., 1])), -1)


def circling(t, y):
    return torch.stack((y[..., 1], -y[..., 0]), -1)


GROUND = Event(lambda t, y: y[0], direction=-1)


def bounce(inputs, **options):
    """The time of the third bounce, solved and in closed form."""
    height, speed, t, e = inputs
    y = torch.stack((height, speed))
    for _ in range(3):
        t, ys = odeint_event(falling, y, t, event_fn=GROUND, **options)
        y = torch.stack((torch.zeros((), dtype=F64), -e * ys[-1][1]))
    root = torch.sqrt(speed**2 + 2 * G * height)
    return t, inputs[2] + (speed + root) / G + 2 * root * (e + e * e) / G


WAYS = [(g, m) for g in GRADIENTS for m in ("tsit5", "dopri8", "alf") if (g, m) != ("adjoint", "alf")]


@pytest.mark.cases(4)
@pytest.mark.parametrize("gradient, method", WAYS)
def test_the_third_bounce_of_a_ball(gradient, method):
    """Its time in closed form, and the derivatives by height, speed, start and restitution."""
    rtol, tol = (1e-4, 1e-2) if method == "alf" else (1e-9, 1e-11)
    inputs = [torch.tensor(x, dtype=F64, requires_grad=True) for x in (2.0, 1.0, 0.5, 0.8)]
    t, exact = bounce(inputs, method=method, gradient=gradient, rtol=rtol, atol=rtol)
    torch.testing.assert_close(t, exact, rtol=tol, atol=tol)
    for a, b in zip(torch.autograd.grad(t, inputs), torch.autograd.grad(exact, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=10 * tol, atol=10 * tol)


def test_a_bounce_along_fixed_steps():
    inputs = [torch.tensor(x, dtype=F64) for x in (2.0, 1.0, 0.5, 0.8)]
    for method in ("rk4", "reversible_heun"):
        torch.testing.assert_close(*bounce(inputs, method=method, options={"step_size": 0.05}), rtol=1e-9, atol=1e-9)
    inputs[2].requires_grad_()
    with pytest.raises(SchemeError, match="t needs a gradient; fixed steps have it where they end on every time"):
        bounce(inputs, method="rk4", options={"step_size": 0.05})


@pytest.mark.long
def test_gradients_of_time_and_state_by_finite_differences():
    def f(a, y0, t0):
        t, y = odeint_event(
            lambda t, y: a * circling(t, y) + torch.cos(t),
            y0,
            t0,
            event_fn=lambda t, y: y[0] * a - 0.3 * t,
            method="dopri8",
            rtol=1e-12,
            atol=1e-12,
        )
        return t, y[-1]

    a, t0 = (torch.tensor(x, dtype=F64, requires_grad=True) for x in (1.3, 0.2))
    assert torch.autograd.gradcheck(f, (a, times(1.0, 0.5).requires_grad_(), t0), eps=1e-5, atol=1e-4)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("of", ["time", "state"])
def test_the_time_of_an_event_of_time_alone_and_of_the_state_alone(of, gradient):
    """Growth by e from 2: an event at time p, or where y is p."""
    p = torch.tensor(2.5, dtype=F64, requires_grad=True)
    y0 = torch.tensor([2.0], dtype=F64, requires_grad=True)
    given = {"method": "dopri8", "rtol": 1e-10, "atol": 1e-10, "gradient": gradient}
    at_time = of == "time"
    t, y = odeint_event(
        lambda t, y: y, y0, times(0.0)[0], event_fn=lambda t, y: t - p if at_time else y[0] - p, **given
    )
    found = torch.autograd.grad(t, [p, y0], retain_graph=True, materialize_grads=True)
    wanted = (1.0, 0.0) if at_time else (1 / 2.5, -1 / 2.0)
    torch.testing.assert_close(torch.stack([g.reshape(()) for g in found]), times(*wanted), rtol=1e-6, atol=1e-8)
    found = torch.autograd.grad(y[-1], [p, y0], materialize_grads=True)
    wanted = (2 * math.exp(2.5), math.exp(2.5)) if at_time else (1.0, 0.0)
    torch.testing.assert_close(torch.stack([g.reshape(()) for g in found]), times(*wanted), rtol=1e-6, atol=1e-8)


@pytest.mark.cases(1)
@pytest.mark.parametrize("batch", ["joint", "independent"])
@pytest.mark.parametrize("direction, want", [(1, [1.5, 3.5]), (-1, [0.5, 2.5]), (0, [0.5, 1.5, 2.5, 3.5])])
def test_directions(direction, want, batch):
    """cos(pi t) crosses zero downwards at 1/2, upwards at 3/2, and so on; back in time it is the other way round."""
    y0 = times(1.0, 0.0)[None]
    f = lambda t, y: math.pi * circling(t, y)  # noqa: E731
    event = Event(lambda t, y: y[:, 0], direction, terminal=False)
    for sign in (1, -1):
        found = integrate(f, y0, times(0, 4 * sign), events=[event], batch=batch, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(torch.stack([e.t for e in found.events]), sign * times(*want), rtol=1e-7, atol=1e-7)
        assert found.status in ("finished", ["finished"])
        for e in found.events:
            assert abs(float(torch.as_tensor(e.y).reshape(-1)[0])) < 1e-6 and not e.grazing


def test_several_events_in_order_and_the_first_terminal_one_ends_the_solve():
    height = Event(lambda t, y: y[0] - torch.tensor([1.5, 0.7], dtype=F64), terminal=False)
    fast = Event(lambda t, y: y[1] + 5.0)
    found = integrate(falling, times(2.0, 0.0), times(0, 0.2, 9), events=[height, fast, GROUND], dense=True)
    when = [math.sqrt(2 * 0.5 / G), 5 / G, math.sqrt(2 * 1.3 / G)]
    assert [(e.number, e.component) for e in found.events] == [(0, 0), (1, 0)]
    assert [float(e.t) for e in found.events] == pytest.approx(when[:2], rel=1e-9)
    assert found.status == "event" and found.reached == pytest.approx(5 / G) and len(found.y) == 2
    torch.testing.assert_close(found.last, times(2 - 25 / G / 2, -5), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batch", ["joint", "independent"])
def test_an_event_at_the_start(batch):
    """It counts where that is asked for; else the solve leaves it, whichever way it goes."""
    y0 = times(0.0, 3.0)[None]
    ground = lambda t, y: y[:, 0]  # noqa: E731
    t = times(0, 5)
    found = integrate(falling, y0, t, events=[Event(ground)], batch=batch)
    assert float(found.events[0].t) == pytest.approx(6 / G)
    found = integrate(falling, y0, t, events=[Event(ground, at_start=True)], batch=batch)
    assert float(found.events[0].t) == 0 and torch.equal(torch.as_tensor(found.events[0].y).reshape(-1), y0[0])


@pytest.mark.parametrize("batch", ["joint", "independent"])
def test_an_event_at_the_end(batch):
    y0 = times(1.0, 0.0)[None]
    end = math.pi / 2
    event = Event(lambda t, y: y[:, 0])
    found = integrate(circling, y0, times(0, end + 1e-9), events=[event], batch=batch, rtol=1e-12, atol=1e-12)
    assert float(found.events[0].t) == pytest.approx(end, abs=1e-9)
    exact = Event(lambda t, y: (t - 1.0) * torch.ones_like(y[:, 0]))
    found = integrate(circling, y0, times(0, 1.0), events=[exact], batch=batch)
    assert float(found.events[0].t) == 1.0 and len(found.events) == 1


@pytest.mark.parametrize("method, options", [("dopri5", {}), ("rk4", {"steps": 9}), ("reversible(tsit5)", {})])
def test_the_continuous_solution_ends_at_the_event(method, options):
    event = Event(lambda t, y: y[0])
    found = integrate(
        circling, times(1.0, 0.0), times(0, 3), method=method, options=options, events=[event], dense=True
    )
    assert found.status == "event" and abs(float(found(found.reached)[0])) < 1e-6
    with pytest.raises(SchemeError, match=r"t=1\.58 lies outside of the solve, from 0 to 1\.57"):
        found(1.58)


def test_a_grazing_event_is_named():
    """(t - 1)^3 crosses zero with slope zero, and so does the top of a throw that just reaches a bar."""
    event = Event(lambda t, y: (t - 1) ** 3)
    y0 = times(1.0, 0.0)
    found = integrate(circling, y0, times(0, 3), events=[event])
    assert found.events[0].grazing and float(found.events[0].t) == pytest.approx(1, abs=1e-4)
    a = torch.tensor(1.0, dtype=F64, requires_grad=True)
    moving = Event(lambda t, y: (t - a) ** 3)
    with pytest.raises(SchemeError, match=r"slope zero .*grazes.*no gradient"):
        integrate(circling, y0, times(0, 3), events=[moving])


def test_no_event_is_said():
    with pytest.raises(SchemeError, match=r"50 steps were used up .*no event was found"):
        odeint(circling, times(1.0, 0.0), times(0, 1), event_fn=lambda t, y: y[0] + 5, options={"max_steps": 50})
    found = integrate(circling, times(1.0, 0.0), times(0, 9), events=[Event(lambda t, y: y[0] + 5)])
    assert found.status == "finished" and not found.events
    with pytest.raises(SchemeError, match="wants a step_size"):
        odeint(circling, times(1.0, 0.0), times(0, 1), event_fn=lambda t, y: y[0], method="rk4")
    with pytest.raises(SchemeError, match="takes two times"):
        odeint(circling, times(1.0, 0.0), times(0, 1, 2), event_fn=lambda t, y: y[0])
    with pytest.raises(SchemeError, match="no event of event_fn is terminal"):
        odeint(circling, times(1.0, 0.0), times(0, 1), event_fn=Event(lambda t, y: y[0], terminal=False))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_events_that_do_not_end_a_solve_are_found_under_every_gradient(gradient):
    """A throw passes a height twice; whether the ground ends the solve or nothing does."""
    y0 = times(0.5, 6.0).requires_grad_()
    height = Event(lambda t, y: y[0] - 1.0, terminal=False)
    want = [(6.0 + side * math.sqrt(36 - 2 * G * 0.5)) / G for side in (-1, 1)]
    for events, status in (([height], "finished"), ([height, GROUND], "event")):
        t = times(0, 1.0, 1.2) if status == "finished" else times(0, 1.0, 9.0)
        found = integrate(falling, y0, t, events=events, gradient=gradient, rtol=1e-9, atol=1e-9)
        assert found.status == status and [e.number for e in found.events] == [0, 0, 1][: len(events) + 1]
        assert [float(e.t.detach()) for e in found.events[:2]] == pytest.approx(want)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("when", [0.5, 1.0, 2.0, 0.7])
def test_a_value_at_the_time_of_a_terminal_event_is_returned_under_every_gradient(when, sign, gradient):
    """With the derivatives of a value at that time, by the times and by the state at the start."""
    t, y0 = (sign * times(0.2, 0.5, 1.0, 2.0)).requires_grad_(), times(2.0).requires_grad_()
    event = Event(lambda t, y: t - sign * when)
    found = integrate(lambda t, y: -y, y0, t, events=[event], gradient=gradient, rtol=1e-9, atol=1e-9)
    n = sum(x <= when for x in (0.2, 0.5, 1.0, 2.0))
    assert found.status == "event" and len(found.y) == len(found.t) == n
    exact = y0 * torch.exp(t[0] - t[:n])
    torch.testing.assert_close(found.y[:, 0], exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.last, y0 * torch.exp(t[0] - sign * when), rtol=1e-6, atol=0)
    wanted = [(found.y[:, 0], exact), (found.last, y0 * torch.exp(t[0] - sign * when))]
    for got, want in wanted:
        weights = torch.arange(1.0, len(got) + 1, dtype=F64)
        got, want = (torch.autograd.grad((y * weights).sum(), [t, y0], retain_graph=True) for y in (got, want))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("method", ["rk4", "alf", "reversible_heun", "reversible(rk4)", "tsit5"])
@pytest.mark.parametrize("options", [{"steps": 3}, {"step_size": 0.5}, {"grid": [0, 1, 2.0]}])
def test_events_of_fixed_steps_that_are_reversed_are_refused(options, method, terminal):
    given = {"method": method, "options": options, "gradient": "reverse"}
    events = [Event(lambda t, y: y[0] - 1, terminal=terminal)]
    with pytest.raises(SchemeError, match=r"gradient='reverse' with fixed steps knows no events.\n  Take gradient="):
        integrate(lambda t, y: 1 / 0, times(2.0), times(0, 2.0), events=events, **given)
    if terminal:
        with pytest.raises(SchemeError, match="gradient='reverse' with fixed steps knows no events"):
            odeint(lambda t, y: 1 / 0, times(2.0), times(0, 2.0), event_fn=events, **given)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_events_of_trees(gradient):
    f = lambda t, y: {"x": y["v"], "v": -G * torch.ones_like(y["v"])}  # noqa: E731
    y0 = {"x": times(2.0), "v": times(1.0).requires_grad_()}
    t, y = odeint(f, y0, times(0, 1), event_fn=Event(lambda t, y: y["x"][0]), gradient=gradient)
    root = torch.sqrt(y0["v"] ** 2 + 4 * G)
    torch.testing.assert_close(t, ((y0["v"] + root) / G)[0])
    assert y["x"].shape == (2, 1) and abs(float(y["x"][1].detach())) < 1e-9
    got = torch.autograd.grad(t, y0["v"])[0]
    torch.testing.assert_close(got, torch.autograd.grad(((y0["v"] + root) / G).sum(), y0["v"])[0])


@pytest.mark.parametrize("gradient", ["store", "checkpoint"])
@pytest.mark.parametrize("method", ["tsit5", "dopri8"])
def test_every_sample_has_an_event_of_its_own(method, gradient):
    y0 = times(2.0, 1.0, 1.0, 0.0, 30.0, -1.0, 0.5, 20.0).reshape(4, 2).requires_grad_()
    e = Event(lambda t, y: y[..., 0], direction=-1)
    t, y = odeint(falling, y0, times(0, 1), event_fn=e, batch="independent", method=method, gradient=gradient)
    exact = (y0[:, 1] + torch.sqrt(y0[:, 1] ** 2 + 2 * G * y0[:, 0])) / G
    torch.testing.assert_close(t, exact)
    speed = -torch.sqrt(y0[:, 1] ** 2 + 2 * G * y0[:, 0])
    torch.testing.assert_close(y[1], torch.stack((torch.zeros_like(speed), speed), 1), rtol=1e-7, atol=1e-7)
    loss, want = (a.square().sum() + b.sum() for a, b in ((t, y[1, :, 1]), (exact, speed)))
    torch.testing.assert_close(torch.autograd.grad(loss, y0), torch.autograd.grad(want, y0), rtol=1e-7, atol=1e-7)


def test_values_before_the_event_of_a_sample_are_there_and_later_ones_are_not():
    y0 = times(1.0, 0.0, 9.0, 0.0).reshape(2, 2)
    e = Event(lambda t, y: y[:, 0])
    found = integrate(falling, y0, times(0, 0.4, 1.0, 3.0), events=[e], batch="independent")
    assert found.status == ["event", "event"] and [x.sample for x in found.events] == [0, 1]
    torch.testing.assert_close(found.y[1], torch.stack((y0[:, 0] - G * 0.08, y0[:, 1] - G * 0.4), 1))
    assert bool(found.y[2, 0].isnan().all()) and float(found.y[2, 1, 0]) == pytest.approx(9 - G / 2)
    rate, t = times(1.0).requires_grad_(), times(0, 0.4, 1.0, 3.0).requires_grad_()
    found = integrate(lambda t, y: rate * falling(t, y), y0, t, events=[e], batch="independent")
    loss = found.y[1].sum() + found.y[2, 1].sum()
    got, slopes = torch.autograd.grad(loss, [rate, t])
    assert bool(got.isfinite()) and slopes[1:3].ne(0).all() and slopes[3] == 0
    with pytest.raises(SchemeError, match=r"one value per sample"):
        integrate(falling, y0, times(0, 1.0), events=[Event(lambda t, y: y.sum())], batch="independent")


@pytest.mark.parametrize("gradient", ["store", "checkpoint"])
@pytest.mark.parametrize("when", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("method, outputs", [("dopri5", "interpolate"), ("dopri5", "step"), ("verner89", None)])
def test_a_value_at_the_time_of_the_event_of_a_sample_is_the_same_with_a_gradient(method, outputs, when, gradient):
    """Each sample ends at another time, which is a requested one, or at none; in long steps that events cut short."""
    ends = times(when, 1.3, 9.0)
    event = Event(lambda t, y: t.reshape(-1) - ends)
    given = {"method": method, "options": {"outputs": outputs}, "rtol": 1e-4, "atol": 1e-6, "gradient": gradient}
    found = []
    for graph in (False, True):
        y0, rate = times(1.0, 2.0, 3.0)[:, None], times(0.5).requires_grad_(graph)
        found.append(
            integrate(
                lambda t, y, rate=rate: -rate * y, y0, times(0, 0.7, 1, 1.3, 2, 3), events=[event], batch="independent",
                **given,
            )
        )  # fmt: skip
    plain, graph = found
    torch.testing.assert_close(graph.y.detach(), plain.y, rtol=1e-13, atol=0, equal_nan=True)
    torch.testing.assert_close(graph.last.detach(), plain.last, rtol=1e-13, atol=0)
    torch.testing.assert_close(graph.y[int((graph.t < when).sum()), 0], graph.last[0], rtol=1e-13, atol=0)


@pytest.mark.parametrize("context", [False, True])
def test_functions_of_samples_may_read_data_of_the_samples(context):
    """Field and event read one number per sample through closures, or the field through the context."""
    rate, level = times(1.0, 2.0, 3.0)[:, None].requires_grad_(), times(0.5, 0.25, 0.1).requires_grad_()
    event = Event(lambda t, y: y[:, 0] - level)
    f = (lambda t, y, k: -k * y) if context else (lambda t, y: -rate * y)
    options = {"context": rate} if context else {}
    t, y = odeint(f, torch.ones(3, 1, dtype=F64), times(0, 1), batch="independent", event_fn=event, options=options)
    exact = -torch.log(level) / rate[:, 0]
    torch.testing.assert_close(t, exact, rtol=1e-7, atol=1e-7)
    weights = times(1.0, -2.0, 0.5)
    for got, want in zip(
        torch.autograd.grad((t * weights).sum() + (y[1, :, 0] * weights).sum(), [rate, level]),
        torch.autograd.grad((exact * weights).sum() + (level * weights).sum(), [rate, level]),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batch", ["joint", "independent"])
@pytest.mark.parametrize("gradient", ["store", "checkpoint"])
def test_second_derivatives_of_times_and_events(gradient, batch):
    """Of a throw's end, in closed form."""
    height, speed = times(2.0)[0].requires_grad_(), times(1.0)[0].requires_grad_()
    start = times(0.3, 1.0).requires_grad_()
    y0 = torch.stack((height, speed))[None]
    t, y = odeint(falling, y0, start, event_fn=Event(lambda t, y: y[:, 0]), gradient=gradient, batch=batch)
    exact = start[0] + (speed + torch.sqrt(speed**2 + 2 * G * height)) / G
    inputs = [height, speed, start]
    for got, want in (((t.sum() ** 2), exact**2), (y[-1, 0, 1], speed - G * (exact - start[0]))):
        first = [torch.autograd.grad(x, inputs, create_graph=True, allow_unused=True) for x in (got, want)]
        for a, b in zip(*first, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-7, atol=1e-7)
        second = []
        for grads in first:
            total = sum((g * torch.arange(1, g.numel() + 1, dtype=F64)).sum() for g in grads if g is not None)
            second.append(torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=True))
        for a, b in zip(*second, strict=True):
            zero = torch.zeros((), dtype=F64)
            torch.testing.assert_close(
                zero if a is None else a, zero.expand_as(a) if b is None else b, rtol=1e-6, atol=1e-6
            )


@pytest.mark.parametrize(
    "batch, gradient", [*(("joint", g) for g in GRADIENTS), ("independent", "store"), ("independent", "checkpoint")]
)
def test_the_start_of_a_solve_up_to_an_event_is_y0_whenever_it_starts(batch, gradient):
    """The first value depends on y0 alone, the last one here on neither it nor the times."""
    y0, t = times(2.0)[None].requires_grad_(), times(0.5, 1.0).requires_grad_()
    when, y = odeint(
        lambda t, y: -y, y0, t, event_fn=lambda t, y: y[:, 0] - 1, batch=batch, gradient=gradient, rtol=1e-9, atol=1e-9
    )
    wanted = [(when, 0.5, [1, 0]), (y[0], 1.0, [0, 0]), (y[1], 0.0, [0, 0])]
    for value, by_state, by_times in wanted:
        got = torch.autograd.grad(value.sum(), [y0, t], retain_graph=True, materialize_grads=True)
        torch.testing.assert_close(got, (times(by_state)[None], times(*by_times)), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("batch, method", [("joint", "tsit5"), ("joint", "alf"), ("independent", "tsit5")])
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("by", ["height", "start", "level"])
def test_events_have_tangents_in_forward_mode(by, graph, batch, method):
    """A throw ends on a level: time and speed there, in closed form."""
    values = {"height": times(2.0)[0], "start": times(0.5)[0], "level": times(0.3)[0]}
    rtol = 1e-3 if method == "alf" else 1e-10

    def landing(height, start, level):
        event = Event(lambda t, y: y[:, 0] - level)
        y0 = torch.stack((height, torch.zeros_like(height)))[None]
        t = torch.stack((start, start.detach() + 9))
        found = integrate(falling, y0, t, events=[event], batch=batch, method=method, rtol=rtol, atol=rtol)
        return torch.stack((found.events[0].t, found.events[0].y.reshape(-1)[1], found.last[0, 1]))

    def exact(height, start, level):
        fall = torch.sqrt(2 * (height - level) / G)
        return torch.stack((start + fall, -G * fall, -G * fall))

    with forward_ad.dual_level(), torch.set_grad_enabled(graph):
        dual = {**values, by: forward_ad.make_dual(values[by], times(1.0)[0])}
        got, want = (forward_ad.unpack_dual(f(**dual)) for f in (landing, exact))
    torch.testing.assert_close(got.primal, want.primal, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got.tangent, want.tangent, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
@pytest.mark.parametrize(
    "batch, method, options", [("joint", "tsit5", {}), ("independent", "tsit5", {}), ("joint", "rk4", {"steps": 9})]
)
def test_events_are_refused_under_torch_func(transform, batch, method, options):
    def solve(y):
        t = times(0, 1.0)
        events = [Event(lambda t, y: y[:, 0] - 1)]
        return (
            integrate(lambda t, y: 1 / 0, y, t, events=events, batch=batch, method=method, options=options).events[0].t
        )

    y0 = times(2.0)[None]
    with pytest.raises(SchemeError, match=r"events do not go with torch.func|no step size can be chosen"):
        if transform == "jvp":
            torch.func.jvp(solve, (y0,), (y0,))
        else:
            getattr(torch.func, transform)(solve)(y0[None] if transform == "vmap" else y0)


@pytest.mark.parametrize("batch, gradient", [("joint", "checkpoint"), ("independent", "store")])
def test_second_derivatives_of_an_event_by_differences_of_first_ones(batch, gradient):
    """Of a field and an event function that read the time, along one direction of all inputs."""
    event = Event(lambda t, y: y[:, 0] - 0.3 * t.reshape(-1))
    tight = {"rtol": 1e-10, "atol": 1e-10, "method": "dopri8", "gradient": gradient, "batch": batch}
    direction = (times(1.0, -2.0)[None], times(0.5)[0])

    def along(size):
        """The derivative of a loss in that direction, so far along it."""
        y0, t0 = (
            (x + size * v).requires_grad_()
            for x, v in zip((times(1.0, 0.5)[None], times(0.2)[0]), direction, strict=True)
        )
        start = torch.stack((t0, t0.detach() + 1))
        t, y = odeint(lambda t, y: circling(t, y) + torch.cos(t), y0, start, event_fn=event, **tight)
        first = torch.autograd.grad(t.sum() ** 2 + (y[-1] * times(1.0, 3.0)).sum(), (y0, t0), create_graph=True)
        total = sum((g * v).sum() for g, v in zip(first, direction, strict=True))
        return total, (y0, t0)

    value, inputs = along(0.0)
    second = sum((g * v).sum() for g, v in zip(torch.autograd.grad(value, inputs), direction, strict=True))
    slope = (along(1e-4)[0] - along(-1e-4)[0]) / 2e-4
    torch.testing.assert_close(second, slope.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", ["joint", "independent"])
def test_second_derivatives_of_the_times_of_values(batch):
    t = times(0.1, 0.7, 1.5).requires_grad_()
    f = lambda t, y: -y * torch.cos(t)  # noqa: E731
    y = odeint(f, torch.ones(1, 1, dtype=F64), t, batch=batch, rtol=1e-9, atol=1e-9)[:, 0, 0]
    exact = torch.exp(torch.sin(t[0]) - torch.sin(t))
    hessians = []
    for x in (y, exact):
        (first,) = torch.autograd.grad((x * times(1.0, 2.0, 3.0)).sum(), t, create_graph=True)
        hessians.append(torch.stack([torch.autograd.grad(g, t, retain_graph=True)[0] for g in first]))
    torch.testing.assert_close(*hessians, rtol=1e-7, atol=1e-7)


def test_an_event_at_the_end_of_a_sample_whatever_the_rounding():
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(2000, 2, dtype=F64, generator=generator).tolist()
    start, end = next((a, 2 + b) for a, b in draws if a + (2 + b - a) < 2 + b)
    event = Event(lambda t, y: (t - end).reshape(-1) * torch.ones_like(y[:, 0]))
    y0, options = times(1.0)[None], {"first_step": end - start}
    for batch in ("joint", "independent"):
        found = integrate(lambda t, y: 0 * y, y0, times(start, end), events=[event], batch=batch, options=options)
        assert float(found.events[0].t) == end
