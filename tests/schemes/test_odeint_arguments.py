"""odeint: what it refuses before anything is computed; precisions, times and ends that are easily lost."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import schemes
from schemes import Event, RungeKutta, SchemeError, integrate, odeint
from schemes.adaptive import Adaptive
from schemes.ode import odeint_adjoint, odeint_dense, odeint_event
from schemes.ode.options import ADAPTIVE, FIXED, OTHERS
from schemes.tableaux import METHODS

F64 = torch.float64
START = torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=F64)
TIMES = torch.tensor([0.0, 1.0], dtype=F64)


def decay(t, y):
    return -y


class OneArgument(nn.Module):
    def forward(self, y):
        return -y


# --- functions

MISFITS = {
    "one": (lambda y: -y, r"takes \(y\), and is called as"),
    "none": (lambda: 0, r"takes \(\), and is called as"),
    "four": (lambda a, b, c, d: a, r"takes \(a, b, c, d\), and is called as"),
    "keyword": (lambda t, y, context=None, *, scale: y, r"takes \(t, y, context=None, \*, scale\)"),
    "module": (OneArgument(), r"takes \(y\), and is called as"),
    "partial": (partial(lambda a, b, c, d, e: a, 1), r"takes \(b, c, d, e\), and is called as"),
    "class": (OneArgument, r"is the class OneArgument, want a function of .*\n  Make one of it: OneArgument\(...\)"),
    "number": (3.0, "is a float, want a function of"),
    "text": ("sin", "is a str, want a function of"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_functions_that_cannot_be_called_as_they_will_be_are_refused_unasked(kind):
    f, message = MISFITS[kind]
    ways = {
        "joint": lambda: odeint(f, START, TIMES),
        "one time": lambda: odeint(f, START, TIMES[:1]),
        "fixed": lambda: odeint(f, START, TIMES, method="rk4"),
        "adjoint": lambda: odeint_adjoint(f, START, TIMES),
        "batch": lambda: odeint(f, START, TIMES, batch="independent"),
        "context": lambda: odeint(f, START, TIMES, batch="independent", options={"context": START}),
        "dense": lambda: odeint_dense(f, START, 0.0, 1.0),
        "event": lambda: Event(f),
        "event_fn": lambda: odeint(decay, START, TIMES, event_fn=f),
    }
    for way, call in ways.items():
        who = "Event: fn" if way.startswith("event") else "odeint: func"
        with pytest.raises(SchemeError, match=f"^{who} {message}"):
            call()
    if kind not in ("one", "module"):
        with pytest.raises(SchemeError, match=r"^odeint: the option norm "):
            odeint(decay, START, TIMES, options={"norm": f})
    with pytest.raises(SchemeError, match=r"^odeint: the option grid_constructor "):
        odeint(decay, START, TIMES, method="rk4", options={"grid_constructor": f})


def test_scipys_order_of_arguments_is_refused():
    """The time broadcasts against any state: it would be integrated instead, without a word."""
    for name in ("t", "time"):
        f = {"t": lambda y, t: -y, "time": lambda x, time: -x}[name]
        with pytest.raises(SchemeError, match=r"the time second, and is called as func\(t, y\)\.\n  Exchange them"):
            odeint(f, START, TIMES)
        with pytest.raises(SchemeError, match="the time second"):
            Event(f)
    # Other names, and more arguments that need not be given, are nobody's business.
    for f in (lambda *a: -a[1], lambda a, b, c=1.0: -b, lambda t, y, **more: -y, partial(lambda k, t, y: -k * y, 1.0)):
        torch.testing.assert_close(odeint(f, START, TIMES)[1], START * math.exp(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batch", ["joint", "independent"])
def test_events_that_return_no_values_are_refused(batch):
    wrong = {
        "NoneType": lambda t, y: None,
        "float": lambda t, y: float(y[0, 0]) - 0.5,  # its time would have lost its gradient
        "tuple": lambda t, y: (y[:, 0], y[:, 1]),
        "torch.bool": lambda t, y: y[:, 0] < 0.5,  # starts at zero, and never crosses it
        "torch.int64": lambda t, y: (y[:, 0] < 0.5).long(),
        "torch.complex128": lambda t, y: y[:, 0] + 0j,
        "no value": lambda t, y: y[:, :0],
    }
    for what, f in wrong.items():
        with pytest.raises(SchemeError, match=f"event 1 returned (a )?{what}"):
            integrate(decay, START, TIMES, events=[Event(lambda t, y: y[:, 0]), Event(f)], batch=batch)
    with pytest.raises(SchemeError, match=r"event 0 changes its argument y in place"), torch.no_grad():
        integrate(decay, START.clone(), TIMES, events=[Event(lambda t, y: y.mul_(2)[:, 0])], batch=batch)
    with pytest.raises(SchemeError, match=r"had \[.\] values .*at the start"):
        integrate(decay, START, TIMES, batch=batch, events=[Event(lambda t, y: y if (t > 0.1).any() else y[:, :1])])
    for given in ([decay], decay, [Event(lambda t, y: y[:, 0]), "no"]):
        with pytest.raises(SchemeError, match=r"events holds a \w+, want events: \[schemes.Event\(f\), ...\]"):
            integrate(decay, START, TIMES, events=given, batch=batch)
    for name in ("terminal", "at_start"):
        with pytest.raises(SchemeError, match=f"{name} is 'no', want True or False"):
            Event(decay, **{name: "no"})
    with pytest.raises(SchemeError, match="event_fn is empty"):
        odeint(decay, START, TIMES, event_fn=[])


@pytest.mark.parametrize("batch", ["joint", "independent"])
@pytest.mark.parametrize("place", ["start", "crossing"])
def test_an_event_function_without_a_value_is_no_crossing(batch, place):
    """What comes after a value that is none has another sign, and its place would be that of the next sample."""
    fs = {"start": lambda t, y: (y[:, 0] - 4).log(), "crossing": lambda t, y: 1 + (y[:, 0] - 0.4).log() * 0}
    with pytest.raises(SchemeError, match=r"event 0 is NaN at t=(?!1).*; it wants a value on both sides"):
        integrate(decay, START, TIMES, events=[Event(fs[place])], batch=batch)


@pytest.mark.parametrize("gradient", ["store", "checkpoint"])
def test_a_sample_whose_event_is_at_its_start_has_the_gradient_of_one_alone(gradient):
    y = torch.tensor([[1.0], [0.5]], dtype=F64, requires_grad=True)
    event = Event(lambda t, y: y[:, 0] - 1, at_start=True)
    found = integrate(lambda t, y: y, y, TIMES, batch="independent", events=[event], gradient=gradient)
    assert [float(e.t.detach()) for e in found.events] == pytest.approx([0.0, math.log(2)])
    for e, want in zip(found.events, (-1.0, -2.0), strict=True):  # t = -log y0
        got = torch.autograd.grad(e.t, y, retain_graph=True)[0].sum()
        assert float(got) == pytest.approx(want, rel=1e-6)


# --- options


def test_no_option_is_ignored():
    """Each belongs to solves of one kind, and the other names it."""
    chosen, fixed = {*ADAPTIVE, *OTHERS}, FIXED
    for name in sorted(chosen - fixed):
        with pytest.raises(SchemeError, match=rf"fixed steps have no option '{name}'|option context belongs"):
            odeint(decay, START, TIMES, method="rk4", options={name: 1.0})
    for name in sorted(fixed - chosen - {"step_size", "steps", "grid", "grid_constructor"}):  # these make them fixed
        with pytest.raises(SchemeError, match=f"adaptive solves have no option '{name}'"):
            odeint(decay, START, TIMES, options={name: "linear"})
    for gradient in ("store", "checkpoint", "reverse"):
        for name in ("adjoint_rtol", "adjoint_options", "adjoint_anything"):
            with pytest.raises(SchemeError, match=f"{name} belongs to gradient='adjoint', not '{gradient}'"):
                odeint(decay, START, TIMES, gradient=gradient, options={name: 1.0})
    for options, message in (([("safety", 0.5)], "options is a list"), ({1: 2}, "options has the key 1")):
        with pytest.raises(SchemeError, match=message):
            odeint(decay, START, TIMES, options=options)


WRONG = torch.tensor([1.0, 2.0])


@pytest.mark.parametrize("name", sorted({*ADAPTIVE}))
def test_limits_that_are_no_numbers_are_refused(name):
    for value in ("a", True, WRONG, 1j, math.nan, torch.tensor(1.0, requires_grad=True)):
        with pytest.raises(SchemeError, match=f"{name}|{ADAPTIVE[name]}"):
            odeint(decay, START, TIMES, options={name: value})
    if name in ("proportional", "integral", "derivative", "min_step"):
        with pytest.raises(SchemeError, match=name):
            odeint(decay, START, TIMES, options={name: math.inf})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"step_t": ["a"]}, "step_t is .'a'., want numbers"),
        ({"jump_t": [0.5, None]}, "jump_t is .0.5, None., want numbers"),
        ({"step_t": [math.nan]}, "step_t holds .nan., want finite times"),
        ({"jump_t": [torch.tensor(0.5, requires_grad=True)]}, "jump_t requires a gradient"),
        ({"integral": 0.0}, "integral is 0, want a positive number"),
        ({"dtype": torch.float32}, "times are kept in torch.float64 alone"),
        ({"norm": lambda e: -e.abs().max()}, "norm returned -.*, want a number that is not negative"),
        ({"norm": lambda e: None}, "norm returned a NoneType"),
    ],
)
@pytest.mark.parametrize("batch", ["joint", "independent"])
def test_options_of_chosen_steps_that_make_no_sense_are_named(options, message, batch):
    with pytest.raises(SchemeError, match=message):
        odeint(decay, START, TIMES, options=options, batch=batch)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"perturb": "no"}, "perturb is 'no', want True or False"),
        ({"grid": [0, None, 1]}, "the grid is .0, None, 1., want numbers"),
        ({"grid_constructor": lambda f, y, t: None}, "grid_constructor returned None"),
        ({"step_size": 1e-300}, "a step_size of 1e-300 is lost against times from 0 to 1"),
        # Counted before any grid is made, which would not fit into the memory.
        ({"step_size": 1e-12, "max_steps": 10}, "the grid has 1000000000000 steps, more than the 10 of max_steps"),
        ({"steps": 10**12, "max_steps": 10}, "the grid has 1000000000000 steps"),
        ({"step_size": 1e-12, "interp": "linear", "max_steps": 10}, "the grid has 1000000000000 steps"),
    ],
)
def test_options_of_fixed_steps_that_make_no_sense_are_named(options, message):
    with pytest.raises(SchemeError, match=message):
        odeint(decay, START, TIMES, method="rk4", options=options)


@pytest.mark.parametrize("value", ["a", True, 1j, torch.tensor(1j), torch.tensor(True), object()])
def test_tolerances_that_are_no_numbers_are_named(value):
    for name in ("rtol", "atol"):
        with pytest.raises(SchemeError, match=f"{name} is "):
            odeint(decay, START, TIMES, **{name: value})
        with pytest.raises(SchemeError, match=f"{name} (is|holds) "):
            odeint(lambda t, y: (-y[0], -y[1]), (START, START), TIMES, **{name: (1e-3, value)})
        if not isinstance(value, torch.Tensor):
            with pytest.raises(SchemeError, match=rf"adaptive: {name} is "):
                schemes.adaptive.Adaptive(**{name: value})
    with pytest.raises(SchemeError, match="both 0; no step meets that"):  # of one entry
        odeint(decay, START, TIMES, rtol=torch.tensor([0.0, 1e-3]), atol=torch.tensor([0.0, 1e-3]))


def test_arguments_of_the_adjoint_are_read_before_the_solve():
    y0 = START.clone().requires_grad_()
    refused = [
        ({"adjoint_params": y0}, "adjoint_params is a Tensor, want a tuple"),
        ({"adjoint_params": [1]}, "adjoint_params holds a int"),
        ({"adjoint_options": [1]}, "adjoint_options is a list"),
        ({"adjoint_options": {"outputs": "step"}}, "adjoint_options have no 'outputs'"),
        ({"adjoint_options": {"context": START}}, "adjoint_options have no 'context'"),
        ({"adjoint_options": {"norm": "largest"}}, "the adjoint's norm is 'largest', want 'seminorm'"),
        ({"adjoint_rtol": "a"}, "adjoint_rtol is 'a', want a number"),
        ({"adjoint_method": "rk4"}, "no embedded companion"),
    ]
    for given, message in refused:
        with pytest.raises(SchemeError, match=message):
            odeint_adjoint(lambda t, y: pytest.fail("it was called"), y0, TIMES, **given)
    # One limit by its two names: that of the adjoint takes the place of the solve's.
    y = odeint_adjoint(decay, y0, TIMES, options={"max_num_steps": 99}, adjoint_options={"max_steps": 1})
    with pytest.raises(SchemeError, match="backwards in time: 1 steps were used up"):
        y.sum().backward()


# --- states and times


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["joint", "independent", "tree", "rk4", "reverse", "Stack"])
def test_half_precision_is_that_of_the_field_and_the_result_alone(dtype, way):
    """A short step is lost on a state of half precision: it once came to a quarter of the solution."""
    y0 = torch.tensor([[1.0, 1.7], [0.3, -2.0]]).to(dtype).requires_grad_()
    seen = set()

    def f(t, y):
        x = y["a"] if isinstance(y, dict) else y
        seen.add(x.dtype)
        return {"a": -x} if isinstance(y, dict) else -x

    t = torch.tensor([0.0, 1.0])
    if way == "Stack":
        from odenets import Stack

        y = Stack(lambda y: f(0, y), "adaptive(dopri5, rtol=1e-5, atol=1e-7)", 1)(y0)
    elif way == "tree":
        y = odeint(f, {"a": y0}, t, rtol=1e-5, atol=1e-7)["a"][1]
    else:
        options = {
            "rk4": {"method": "rk4", "options": {"steps": 500}},
            "reverse": {"gradient": "reverse", "rtol": 1e-2},
        }
        kind = {"batch": "independent"} if way == "independent" else options.get(way, {})
        y = odeint(f, y0, t, **{"rtol": 1e-5, "atol": 1e-7, **kind})[1]
    assert y.dtype == dtype and seen == {dtype}
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), y0.double() * math.exp(-1), rtol=eps, atol=0)
    (grad,) = torch.autograd.grad(y.sum(), y0)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.double(), torch.full_like(grad, math.exp(-1)).double(), rtol=2 * eps, atol=0)


def test_states_that_no_solver_takes_are_named():
    for y0, message in (
        (torch.eye(2).to_sparse(), "sparse or nested"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "sparse or nested"),
        (torch.ones(2, device="meta"), "on the device meta"),
        (torch.ones(2).to(torch.float8_e4m3fn), "is of torch.float8_e4m3fn, want real or complex"),
        ([1.0, 2.0], "holds a float"),
    ):
        for given in (y0, [START, y0]):
            with pytest.raises(SchemeError, match=message):
                odeint(decay, given, TIMES)
    with pytest.raises(SchemeError, match=r"returned torch.float64 for a part of y0 that is torch.float32"):
        odeint(lambda t, y: (y[0].double(), y[1]), (START.float(), START.float()), TIMES)


def test_times_in_a_list_keep_gradient_and_digits():
    end = torch.tensor(1.0, dtype=F64, requires_grad=True)
    y = odeint(decay, START, [0, end])
    assert float(torch.autograd.grad(y[1, 0, 0], end)[0]) == pytest.approx(-math.exp(-1), rel=1e-6)
    # 0.1 as a number is the double, in every place that takes a time.
    want = torch.tensor(0.1, dtype=F64)
    t, _ = odeint_event(decay, START, 0.1, event_fn=lambda t, y: y[0, 0] - 0.5)
    assert t.dtype == F64
    assert torch.equal(t, odeint_event(decay, START, want, event_fn=lambda t, y: y[0, 0] - 0.5)[0])
    assert odeint_dense(decay, START, 0.1, 1).t[0] == want
    for bad in (None, "0", [0, None], torch.ones(2, device="meta"), torch.tensor([0, 1])):
        for call in (lambda t: odeint(decay, START, t), lambda t: odeint_dense(decay, START, 0.0, t)):
            with pytest.raises(SchemeError, match=r"odeint: (t|t1) is "):
                call(bad)


def test_an_event_far_from_zero_has_a_direction():
    t0 = torch.tensor(1e9)  # in single precision 1e9 + 1 is 1e9
    for reverse, target in ((False, 0.5), (True, 2.0)):
        event = lambda t, y, target=target: y[0, 0] - target  # noqa: E731
        _, y = odeint_event(decay, START, t0, event_fn=event, reverse_time=reverse, rtol=1e-5, atol=1e-6)
        assert float(y[1, 0, 0]) == pytest.approx(target, rel=1e-4)
    with pytest.raises(SchemeError, match="reverse_time is 'no'"):
        odeint_event(decay, START, t0, event_fn=decay, reverse_time="no")
    with pytest.raises(SchemeError, match="event_fn is None"):
        odeint_event(decay, START, t0, event_fn=None)


# --- ends


@pytest.mark.parametrize(
    "given",
    [
        {"t": TIMES[:1]},
        {"y0": START[:0]},
        {"events": [Event(lambda t, y: y[0, 0] - 1, at_start=True)]},
        {"func": lambda t, y: y * math.nan, "check": False},
        {"t": TIMES[:1], "method": "rk4"},
    ],
)
def test_a_solve_without_steps_has_a_continuous_solution_too(given):
    given = {"func": decay, "y0": START, "t": TIMES, **given}
    found = integrate(given.pop("func"), given.pop("y0"), given.pop("t"), dense=True, **given)
    assert torch.equal(found(0.0), found.last) and found([0.0]).shape == (1, *found.last.shape)
    assert found.derivative(0.0).shape == found.last.shape
    with pytest.raises(SchemeError, match="lies outside"):
        found(1e-9 if float(found.reached) == 0 else 2.0)


def test_times_of_the_continuous_solution_are_read_like_all_times():
    found = integrate(decay, START, TIMES, dense=True)
    row = found(torch.tensor([0.25, 0.5], dtype=F64))
    assert torch.equal(row, found([0.25, 0.5])) and torch.equal(row[0], found(0.25))
    assert found([]).shape == found.derivative([]).shape == (0, 2, 2)
    for bad in ("a", None, torch.tensor(0.5 + 0j), [None]):
        with pytest.raises(SchemeError, match="Solution: t is "):
            found(bad)
    with pytest.raises(SchemeError, match=r"t=1.000000001 lies outside of the solve, from 0 to 1"):
        found(1.000000001)


@pytest.mark.parametrize("batch", ["joint", "independent"])
def test_a_step_that_is_never_kept_ends_at_zero_too(batch):
    """Where t is 0 any number is a step, down to those that cannot be halved any more."""
    options = {"norm": lambda e: 3.0 + 0 * e.sum(), "first_step": 1e-300, "max_steps": 999}
    found = integrate(decay, START, TIMES, batch=batch, options=options, check=False)
    assert found.status in ("underflow", ["underflow"] * 2)


@pytest.mark.parametrize("batch", ["joint", "independent"])
def test_what_fails_in_the_first_step_is_not_said_of_the_start(batch):
    """Start and slope are finite; no step from there is."""
    f = lambda t, y: torch.where(t == 0, y, y * math.nan)  # noqa: E731
    with pytest.raises(SchemeError, match=r"stopped being finite after t=0.*\n  Look at what the function gives"):
        odeint(f, START, TIMES, batch=batch)


def test_a_batch_that_takes_no_step_has_the_fields_of_each_sample():
    y0 = START.clone().requires_grad_()
    found = integrate(decay, y0, torch.tensor([[0.0], [2.0]], dtype=F64), batch="independent")
    assert found.status == ["finished"] * 2 and found.reached.tolist() == [0.0, 2.0]
    assert found.accepted.tolist() == found.rejected.tolist() == [0, 0]
    for t in (TIMES, TIMES.expand(0, 2)):
        given = {"batch": "independent", "options": {"context": torch.ones(0, 1, dtype=F64)}}
        found = integrate(lambda t, y, c: -c * y, START[:0], t, **given)
        assert found.y.shape == (2, 0, 2) and found.status == []


# --- stacks


def test_a_stack_refuses_functions_that_cannot_be_called_with_a_stream():
    from odenets import Stack

    for f in (lambda a, b: b, lambda: 0, lambda x, t, other: x, lambda x, *, other: x):
        for scheme in ("adaptive(dopri5)", "rk4"):
            with pytest.raises(SchemeError, match=r"residual function 0 takes \(.*\n  Wrap it"):
                Stack(f, scheme, 2)
    for f in (lambda x: -x, lambda t, x: -x, lambda x, t, context: -x, lambda x, *, t: -x, torch.neg):
        assert Stack(f, "adaptive(dopri5)", 1)(START).shape == START.shape
    stack = Stack(lambda x: -x, "adaptive(dopri5)", 1)
    for at, message in (("a", "at is 'a'"), ([None], "at is .None."), (TIMES.requires_grad_(), "requires a gradient")):
        with pytest.raises(SchemeError, match=message):
            stack.trajectory(START, at=at)
    for given in ({"max_steps": 1.5}, {"max_steps": True}, {"adjoint": "no"}):
        with pytest.raises(SchemeError, match=f"adaptive: {next(iter(given))} is "):
            schemes.adaptive.Adaptive(**given)


@pytest.mark.parametrize("name", ["max_steps", "max_num_steps"])
def test_a_limit_of_the_call_takes_precedence_over_adaptive_by_either_name(name):
    t = torch.tensor([0.0, 30.0], dtype=F64)

    def taken(method, options):
        return integrate(decay, START, t, method=method, options=options, check=False).accepted

    assert taken("adaptive(dopri5)", {name: 5}) <= 5
    assert taken("adaptive(dopri5, max_steps=5)", {name: 100}) > 5
    assert taken("adaptive(dopri5, max_steps=5)", {name: None}) <= 5


def test_a_gradient_that_is_written_out_takes_precedence_over_adaptive():
    y = START.clone().requires_grad_()
    found = odeint(decay, y, TIMES, method="adaptive(tsit5, adjoint=true)", gradient="store")
    (first,) = torch.autograd.grad(found[-1].square().sum(), y, create_graph=True)
    torch.autograd.grad(first.sum(), y)  # the adjoint has no second derivative


@pytest.mark.parametrize("batch", ["joint", "independent"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dopri8"])
def test_a_state_beyond_the_largest_number_is_not_finite(batch, method):
    y0 = torch.zeros(2, 1)
    with pytest.raises(SchemeError, match="stopped being finite"):
        odeint(lambda t, y: torch.full_like(y, 1e38), y0, torch.tensor([0.0, 10.0]), method=method, batch=batch)
    found = integrate(lambda t, y: torch.full_like(y, 1e37), y0, torch.tensor([0.0, 10.0]), method=method, batch=batch)
    assert found.y.isfinite().all()


@pytest.mark.parametrize("batch", ["joint", "independent"])
@pytest.mark.parametrize("end", [1.005, -1.005, 3.02])
def test_no_step_is_longer_than_the_limit(batch, end):
    options = {"max_step": 1.0, "first_step": 1.0}
    t = torch.tensor([0.0, end], dtype=F64)
    found = integrate(lambda t, y: 0 * y, torch.ones(2, 1), t, batch=batch, options=options)
    steps = found.accepted.max() if batch == "independent" else found.accepted
    assert int(steps) == math.ceil(abs(end))


def test_a_packed_state_has_no_sample():
    y0 = (torch.ones(4, 3), torch.ones(4))
    y0[0][2] = float("nan")
    with pytest.raises(SchemeError) as error:
        odeint(lambda t, y: y, y0, TIMES)
    assert "sample" not in str(error.value)
    with pytest.raises(SchemeError, match="sample 2"):
        odeint(lambda t, y: y, y0[0], TIMES)


def test_pairs_of_one_name_are_told_apart_by_their_coefficients():
    other = RungeKutta(replace(METHODS["bosh3"], name="dopri5"))
    assert Adaptive(other) != schemes.get("adaptive(dopri5)")
    assert Adaptive("dopri5") == schemes.get("adaptive(dopri5)")
    with pytest.raises(SchemeError, match="torchdiffeq has"):
        Adaptive(other, backend="torchdiffeq")


@pytest.mark.parametrize("beside", [{"dense": True}, {"events": [Event(lambda t, y: y[0, 0] - 0.5, terminal=False)]}])
def test_lines_between_steps_do_not_go_with_cubics(beside):
    with pytest.raises(SchemeError, match="leave interp out"):
        integrate(decay, START, TIMES, method="rk4", options={"step_size": 0.5, "interp": "linear"}, **beside)


@pytest.mark.parametrize("given", [{"method": "alf"}, {"method": "tsit5", "gradient": "reverse"}])
def test_outputs_are_read_by_reversible_solves(given):
    for outputs, message in (("bogus", "outputs is 'bogus'"), ("interpolate", "other solves step onto every time")):
        with pytest.raises(SchemeError, match=message):
            odeint(decay, START, TIMES, **given, options={"outputs": outputs})
    want = odeint(decay, START, TIMES, **given)
    assert torch.equal(odeint(decay, START, TIMES, **given, options={"outputs": "step"}), want)


@pytest.mark.parametrize(
    "given", [{"batch": "independent"}, {"method": "reversible_heun", "options": {"steps": 3}, "gradient": "reverse"}]
)
def test_callbacks_that_are_not_called_are_refused(given):
    class Field(nn.Module):
        def forward(self, t, y):
            return -y

        def callback_step(self, t, y, h):
            pass

    with pytest.raises(SchemeError, match=r"func has a callback_step, which .* does not call"):
        odeint(Field(), START, TIMES, **given)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "alf"])
def test_one_time_reads_its_options_and_finds_events_at_the_start(method):
    with pytest.raises(SchemeError, match="bogus"):
        odeint(decay, START, TIMES[:1], method=method, options={"bogus": 1})
    for at_start in (True, False):
        event = Event(lambda t, y: y[0, 0] - START[0, 0], at_start=at_start)
        found = integrate(decay, START, TIMES[:1], method=method, events=[event])
        assert torch.equal(found.y, START[None]) and len(found.events) == at_start
        assert found.status == ("event" if at_start else "finished")
