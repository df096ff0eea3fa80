"""Gradients of a solve, in every way, against double precision and against each other."""

import math

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from schemes import Event, SchemeError, integrate, odeint
from schemes.ode.gradients import GRADIENTS

F64 = torch.float64
T = torch.tensor([0.0, 0.3, 1.0, 1.6], dtype=F64)


def weights(y):
    return torch.linspace(-1, 1, y.numel(), dtype=F64).reshape(y.shape)


class Case:
    """A field with parameters, a closure, a dict of tensors that were computed before; and times, with gradients."""

    def __init__(self, complex_=False):
        torch.manual_seed(0)
        kind = torch.complex128 if complex_ else F64
        self.linear = nn.Linear(3, 3, dtype=kind)
        self.shift = torch.randn(3, dtype=F64, requires_grad=True)
        self.leaf = torch.randn(3, dtype=F64, requires_grad=True)
        self.computed = {"a": [self.leaf.exp() * 0.1]}
        self.y0 = torch.randn(4, 3, dtype=kind, requires_grad=True)
        self.t = T.clone().requires_grad_()

    def __call__(self, t, y):
        return torch.tanh(self.linear(y)) * torch.cos(t) + self.shift * t - self.computed["a"][0] * y

    @property
    def inputs(self):
        return [self.y0, self.t, self.shift, self.leaf, *self.linear.parameters()]

    def gradients(self, times=True, **options):
        t = self.t if times else self.t.detach()
        y = odeint(self, self.y0, t, **options)
        inputs = self.inputs if times else [x for x in self.inputs if x is not self.t]
        loss = (y * weights(y)).real.square().sum() if y.is_complex() else (y * weights(y)).square().sum()
        return torch.autograd.grad(loss, inputs, retain_graph=True)


def close(got, want, tol):
    for a, b in zip(got, want, strict=True):
        scale = float(b.abs().max())
        assert scale > 1e-6
        torch.testing.assert_close(a, b, rtol=0, atol=tol * scale)


WAYS = [
    *[(g, "dopri5", "joint") for g in GRADIENTS],
    *[(g, "dopri8", "joint") for g in GRADIENTS],
    ("store", "tsit5", "independent"),
    ("checkpoint", "tsit5", "independent"),
    ("reverse", "reversible(tsit5, coupling=0.99)", "joint"),
]


@pytest.fixture(scope="module")
def reference():
    return {c: Case(c).gradients(method="dopri8", rtol=1e-13, atol=1e-13) for c in (False, True)}


@pytest.mark.cases(2)
@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("gradient, method, batch", WAYS)
def test_every_way_gives_the_gradients(gradient, method, batch, complex_, reference):
    """Of the state, the times, the parameters, a closure, and what was computed before the solve."""
    got = Case(complex_).gradients(gradient=gradient, method=method, batch=batch, rtol=1e-9, atol=1e-9)
    close(got, reference[complex_], 1e-6)


@pytest.mark.parametrize("method", ["alf", "reversible_heun"])
def test_reversible_schemes_of_order_two(method, reference):
    got = Case().gradients(gradient="reverse", method=method, rtol=1e-5, atol=1e-5)
    close(got, reference[False], 1e-3)


@pytest.mark.parametrize("outputs", ["step", "interpolate"])
@pytest.mark.parametrize("batch", ["joint", "independent"])
def test_recomputation_gives_the_very_gradients_of_the_stored_solve(batch, outputs):
    got, want = (
        Case().gradients(gradient=g, batch=batch, method="tsit5", options={"outputs": outputs}, rtol=1e-4, atol=1e-4)
        for g in ("checkpoint", "store")
    )
    close(got, want, 1e-13)


@pytest.mark.parametrize("method", ["rk4", "dopri5", "alf", "alf(9/10)", "reversible(rk4)", "reversible_heun"])
def test_reverse_along_fixed_steps_is_autograd_of_the_same_scheme(method):
    same = f"reversible({method}, coupling=0.999)" if method in ("rk4", "dopri5") else method
    got = Case().gradients(times=False, gradient="reverse", method=method, options={"steps": 12})
    want = Case().gradients(times=False, gradient="store", method=same, options={"steps": 12})
    close(got, want, 1e-9)


@pytest.mark.parametrize("gradient", ["store", "checkpoint"])
@pytest.mark.parametrize("method", ["euler", "rk4", "alf", "substeps(heun3, 2)"])
def test_fixed_steps_have_the_gradient_of_the_discrete_solution(method, gradient):
    """Finite differences in the times too, which move the steps."""
    case = Case()

    def f(y0, t):
        return odeint(case, y0, t, method=method, gradient=gradient, options={"steps": 3})

    assert torch.autograd.gradcheck(f, (case.y0[:1].detach().requires_grad_(), case.t), fast_mode=True)


UNEVEN = torch.tensor([0.0, 0.1, 1.0], dtype=F64)
GRIDS = [
    {"grid": UNEVEN},
    {"grid_constructor": lambda func, y0, t: UNEVEN},
    {"step_size": 0.3, "interp": "linear"},
    {"step_size": 0.3, "interp": "cubic"},
    {"step_size": 0.3},
    {"steps": 3},
    {"steps": 3, "interp": "linear"},
    {},
]


@pytest.mark.parametrize("options", GRIDS)
@pytest.mark.parametrize("gradient", ["store", "checkpoint"])
def test_times_with_a_gradient_are_solved_on_the_same_grid_or_not_at_all(options, gradient):
    t, y0 = torch.tensor([0.0, 1.0], dtype=F64), torch.ones(2, dtype=F64)
    calls = []

    def solve(t):
        return odeint(lambda t, y: calls.append(t) or t - y, y0, t, method="euler", gradient=gradient, options=options)

    want = solve(t)
    t.requires_grad_()
    if "grid" in options or "grid_constructor" in options or {"step_size", "interp"} <= options.keys():
        calls.clear()
        with pytest.raises(SchemeError, match="t needs a gradient; fixed steps have it where they end on every time"):
            solve(t)
        assert not calls
    else:
        torch.testing.assert_close(solve(t).detach(), want, rtol=1e-14, atol=0)


@pytest.mark.cases(16)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
@pytest.mark.parametrize("state", [torch.float32, F64, torch.complex128])
@pytest.mark.parametrize("method", ["rk4", "ab2", "alf", "substeps(heun3, 2)"])
def test_a_gradient_of_times_of_any_dtype_changes_no_value(method, state, dtype):
    t, y0 = torch.tensor([1000.1, 1000.2, 1003.7]).to(dtype).unique(), torch.ones(2, dtype=state)
    options = {"step_size": 0.3}
    f = lambda t, y: torch.cos(t) - y  # noqa: E731
    want = odeint(f, y0, t, method=method, options=options)
    got = odeint(f, y0, t.requires_grad_(), method=method, options=options)
    eps = torch.finfo(state).eps
    torch.testing.assert_close(got.detach(), want, rtol=8 * eps, atol=8 * eps)
    assert torch.autograd.grad(got.real.sum(), t)[0].dtype == dtype


@pytest.mark.parametrize("gradient", ["store", "checkpoint"])
@pytest.mark.parametrize("end", [1.0, -1.0])
@pytest.mark.parametrize("method", ["euler", "heun3", "rk4", "ab2", "substeps(euler, 2)"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_ends_of_steps_are_perturbed_whether_times_need_a_gradient_or_not(dtype, method, end, gradient):
    """Of a field that jumps at the end of a step, which is right with perturb and wrong without."""
    f = lambda t, y: torch.where(t * end > 0.5, 3.0, 1.0) * torch.ones_like(y)  # noqa: E731
    t, y0 = torch.tensor([0.0, end], dtype=dtype), torch.zeros(1, dtype=dtype)
    given = {"method": method, "gradient": gradient, "options": {"steps": 4, "perturb": True}}
    want = odeint(f, y0, t, **given)
    got = odeint(f, y0, t.requires_grad_(), **given).detach()
    torch.testing.assert_close(got, want, rtol=4 * torch.finfo(dtype).eps, atol=0)
    if method != "ab2":  # which reads the slope of the step before
        torch.testing.assert_close(want[-1], torch.tensor([2.0 * end], dtype=dtype))


@pytest.mark.parametrize("method", ["rk4", "alf", "reversible_heun", "reversible(rk4)"])
def test_a_reversible_solve_refuses_to_perturb(method):
    options = {"steps": 4, "perturb": True}
    with pytest.raises(SchemeError, match=r"gradient='reverse' has no perturb.*\n  Leave perturb out"):
        odeint(lambda t, y: 1 / 0, torch.ones(1), T, method=method, gradient="reverse", options=options)


@pytest.mark.parametrize("given", [{"dense": True}, {"events": [Event(lambda t, y: y[0] - 0.5, terminal=False)]}])
@pytest.mark.parametrize("gradient", ["store", "checkpoint"])
def test_what_lies_within_fixed_steps_has_no_gradient_of_the_times(given, gradient):
    call = {"method": "rk4", "gradient": gradient, "options": {"steps": 5}, **given}
    y0 = torch.ones(1, dtype=F64)
    assert integrate(lambda t, y: -y, y0, T, **call).status == "finished"
    with pytest.raises(SchemeError, match=r"t needs a gradient; fixed steps have it where .*\n  Detach t"):
        integrate(lambda t, y: 1 / 0, y0, T.clone().requires_grad_(), **call)


def decayed(y, t, a):
    return y * torch.exp(-a * (t[1:] - t[0]))


BY = {"y": torch.tensor(2.0, dtype=F64), "t": torch.tensor([0.2, 1.0], dtype=F64), "a": torch.tensor(0.7, dtype=F64)}
SOLVERS = [
    ("joint", "tsit5", None),
    ("independent", "tsit5", None),
    ("joint", "rk4", {"steps": 30}),
    ("joint", "ab2", {"steps": 100}),
]


@pytest.mark.parametrize("batch, method, options", SOLVERS)
@pytest.mark.parametrize("name", BY)
@pytest.mark.parametrize("way", ["forward_ad", "jvp", "jacfwd", "jacrev"])
def test_every_way_of_differentiation_sees_states_times_and_parameters(way, name, batch, method, options):
    """Each gives the derivative, or refuses; none gives zero."""
    given = {"batch": batch, "method": method, "options": options, "rtol": 1e-9, "atol": 1e-9}

    def solve(x, exact=False):
        y, t, a = ({**BY, name: x}[n] for n in BY)
        if exact:
            return decayed(y, t, a)
        return odeint(lambda t, y: -a * y, y[None, None], t, **given)[1:, 0, 0]

    x = BY[name]
    want = torch.autograd.functional.jacobian(lambda x: solve(x, True), x)
    axis = torch.ones_like(x) * torch.arange(1, x.numel() + 1).reshape(x.shape)
    if way in ("jacfwd", "jacrev"):
        try:
            got = getattr(torch.func, way)(solve)(x)
        except SchemeError as error:
            assert way == "jacfwd" and method == "tsit5" and "no step size can be chosen" in str(error)
            return
    else:
        want = (want * axis).sum(-1) if x.ndim else want * axis
        if way == "jvp":
            got = torch.func.jvp(solve, (x,), (axis,))[1]
        else:
            with forward_ad.dual_level():
                got = forward_ad.unpack_dual(solve(forward_ad.make_dual(x, axis))).tangent
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch, method, options", SOLVERS[:3])
@pytest.mark.cases(12)
@pytest.mark.parametrize("outer, inner", [(o, i) for o in BY for i in BY if o != i])
@pytest.mark.parametrize("way", ["grad", "jvp"])
def test_nested_transforms_see_what_the_outer_one_differentiates_by(way, outer, inner, batch, method, options):
    given = {"batch": batch, "method": method, "options": options, "rtol": 1e-9, "atol": 1e-9}

    def along(solve, x):
        """The sum of the inner derivative, along ones in the outer variable."""

        def first(x):
            rest = {**BY, outer: x}
            return (
                torch.func.grad(lambda z: solve(*({**rest, inner: z}[n] for n in BY)).sum())(rest[inner])[..., None]
                .sum(0)
                .sum()
            )

        if way == "grad":
            return torch.func.grad(first)(x).sum()
        return torch.func.jvp(first, (x,), (torch.ones_like(x),))[1]

    weights = torch.tensor([1.0, 3.0], dtype=F64)  # so that moving both times alike counts

    def weighted(y, t, a):
        return y, t * weights, a

    got = along(lambda *x: solve_by(weighted(*x), given), BY[outer])
    want = along(lambda *x: decayed(*weighted(*x)), BY[outer])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def solve_by(inputs, given):
    y, t, a = inputs
    return odeint(lambda t, y: -a * y, y[None, None], t, **given)[1:, 0, 0]


@pytest.mark.parametrize("gradient", ["reverse", "adjoint"])
@pytest.mark.parametrize("dual", ["y0", "parameter"])
def test_backward_passes_of_their_own_refuse_tangents(gradient, dual):
    with forward_ad.dual_level():
        a, y0 = (torch.ones(1, dtype=F64, requires_grad=True) for _ in range(2))
        two = forward_ad.make_dual(a if dual == "parameter" else y0, torch.ones(1, dtype=F64))
        a, y0 = (two, y0) if dual == "parameter" else (a, two)
        with pytest.raises(SchemeError, match=f"gradient='{gradient}' has no tangents of forward mode"):
            odeint(lambda t, y: -a * y, y0, T, gradient=gradient)
        with torch.no_grad():
            y = odeint(lambda t, y: -a * y, y0, T, gradient=gradient)
        tangent = forward_ad.unpack_dual(y[-1]).tangent
        want = math.exp(-1.6) * (-1.6 if dual == "parameter" else 1.0)
        torch.testing.assert_close(tangent, torch.tensor([want], dtype=F64), rtol=1e-5, atol=0)


SLOPES = {
    "without dimensions": lambda w, t, y: w[0] * torch.cos(t),
    "of one entry": lambda w, t, y: w[:1] * torch.cos(t).reshape(-1)[:1],
    "of one row": lambda w, t, y: w + 0 * y[:1],
    "narrower": lambda w, t, y: (w * y).float(),
    "narrower, of one row": lambda w, t, y: w.float(),
}


@pytest.mark.parametrize(
    "gradient, method", [*((g, "tsit5") for g in GRADIENTS), *(("reverse", m) for m in ("alf", "reversible_heun"))]
)
@pytest.mark.parametrize("times", [True, False])
@pytest.mark.parametrize("kind", SLOPES)
def test_slopes_that_are_broadcast_or_converted_have_the_gradients_of_whole_ones(kind, times, gradient, method):
    found = []
    rtol = 1e-7 if method == "tsit5" else 1e-3
    for whole in (False, True):
        w = torch.tensor([0.3, -0.2, 0.5], dtype=F64, requires_grad=True)
        y0 = torch.linspace(0.5, 1.5, 6, dtype=F64).reshape(2, 3).requires_grad_()
        t = T[:3].clone().requires_grad_(times)

        def f(t, y, w=w, whole=whole):
            k = SLOPES[kind](w, t, y)
            return k.expand(y.shape).to(F64) if whole else k

        y = odeint(f, y0, t, gradient=gradient, method=method, rtol=rtol, atol=rtol)
        assert y.shape == (3, 2, 3) and y.dtype == F64
        found.append([y, *torch.autograd.grad((y * weights(y)).sum(), [y0, w, t][: 2 + times])])
    for got, want in zip(*found, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("batch", ["joint", "independent"])
@pytest.mark.parametrize("times", [True, False])
@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda y: 1.0, "returned a float"),
        (lambda y: y.double(), r"returned torch.float64 for a state of torch.float32"),
        (lambda y: y[:, :2], r"returned \(2, 2\) for a state of \(2, 3\)"),
        (lambda y: y[None], r"returned \(1, 2, 3\) for a state of \(2, 3\)"),
    ],
)
def test_slopes_that_do_not_fit_are_named_under_every_gradient(wrong, message, times, batch, gradient):
    if batch == "independent" and gradient not in ("store", "checkpoint"):
        return
    y0, t = torch.ones(2, 3, requires_grad=True), T.clone().requires_grad_(times)
    with pytest.raises(SchemeError, match=message):
        odeint(lambda t, y: wrong(y), y0, t, gradient=gradient, batch=batch)


@pytest.mark.parametrize("gradient", ["store", "checkpoint"])
@pytest.mark.parametrize("batch", ["joint", "independent"])
def test_second_derivatives(gradient, batch):
    """y' = a y^2: y = y0 / (1 - a y0 t), twice by a and y0."""
    a = torch.tensor(0.4, dtype=F64, requires_grad=True)
    y0 = torch.tensor([0.7, 0.5], dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 1.0], dtype=F64)
    found = []
    for y in (
        odeint(lambda t, y: a * y * y, y0, t, gradient=gradient, batch=batch, rtol=1e-10, atol=1e-10)[-1],
        y0 / (1 - a * y0),
    ):
        (first,) = torch.autograd.grad(y.sum(), a, create_graph=True)
        found.append(torch.autograd.grad(first, [a, y0]))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("gradient", ["reverse", "adjoint"])
def test_second_derivatives_that_are_not_there_are_refused(gradient):
    y0 = torch.ones(2, dtype=F64, requires_grad=True)
    y = odeint(lambda t, y: -y * y, y0, T, gradient=gradient)
    (g,) = torch.autograd.grad(y.sum(), y0, create_graph=True)
    with pytest.raises(SchemeError, match=f"gradient='{gradient}' has no second derivatives"):
        (y0.sum() + g.square().sum()).backward()


def test_trees_get_their_gradients_in_every_way():
    found = []
    for gradient in GRADIENTS:
        a = torch.tensor([0.3, -0.2], dtype=F64, requires_grad=True)
        y0 = {"x": torch.ones(2, dtype=F64, requires_grad=True), "z": torch.zeros((), dtype=F64, requires_grad=True)}
        y = odeint(lambda t, y, a=a: {"x": a * y["x"] * y["z"].cos(), "z": y["x"].sum()}, y0, T, gradient=gradient)
        found.append(torch.autograd.grad(y["x"].square().sum() + y["z"].sum(), [a, y0["x"], y0["z"]]))
    for got in found[1:]:
        close(got, found[0], 1e-5)


def test_a_rejected_step_leaves_no_trace():
    """Steps that try where the field is not even finite: their slopes must not reach the gradient."""
    a = torch.tensor(1.0, dtype=F64, requires_grad=True)
    y0 = torch.tensor([[0.0], [0.5]], dtype=F64)
    f = lambda t, y: a * torch.sqrt(1 - y)  # y reaches 1 after the end; long steps go beyond  # noqa: E731
    t = torch.tensor([0.0, 1.3], dtype=F64)
    for batch, gradient in (("joint", "store"), ("joint", "checkpoint"), ("independent", "store")):
        options = {"first_step": 1.3, "outputs": "step"}
        found = integrate(f, y0, t, batch=batch, gradient=gradient, options=options, rtol=1e-8, atol=1e-8)
        assert int(torch.as_tensor(found.rejected).sum()) > 0
        (got,) = torch.autograd.grad(found.y[-1].sum(), a)
        root = torch.sqrt(1 - y0) - 0.5 * 1.3
        want = (1.3 * root).sum()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_memory_of_each_way():
    """Saved tensors of the forward pass, in states: all stages, one or two a step, or those given out."""
    saved = {}
    y0 = torch.ones(64, dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 4.0], dtype=F64)
    for gradient in GRADIENTS:
        kept = []
        pack = lambda x, kept=kept: kept.append(x.numel()) or x  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            found = integrate(lambda t, y: torch.sin(y) * torch.cos(y), y0, t, gradient=gradient, rtol=1e-6, atol=1e-6)
        saved[gradient] = sum(n for n in kept if n >= 64) / 64
        assert found.accepted > 5
    assert saved["reverse"] <= 8 and saved["adjoint"] <= 8
    assert saved["checkpoint"] <= 4 * found.accepted < saved["store"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_vmap_and_forward_mode_along_fixed_steps():
    t = torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    a = torch.tensor([0.3, -0.5, 1.0], dtype=F64)
    y0 = torch.tensor([1.0, 2.0], dtype=F64)

    def solve(a, y0):
        return odeint(lambda t, y: a * y * torch.cos(t), y0, t, method="rk4", options={"steps": 8})

    many = torch.func.vmap(solve, in_dims=(0, None))(a, y0)
    torch.testing.assert_close(many, torch.stack([solve(x, y0) for x in a]))
    _, tangent = torch.func.jvp(lambda a: solve(a, y0), (a[0],), (torch.ones((), dtype=F64),))
    want = torch.sin(t)[:, None] * y0 * torch.exp(a[0] * torch.sin(t))[:, None]
    torch.testing.assert_close(tangent, want, rtol=1e-5, atol=1e-5)
    jacobian = torch.func.jacrev(lambda a: solve(a, y0))(a[0])
    torch.testing.assert_close(jacobian, tangent, rtol=1e-10, atol=1e-10)


def test_transforms_that_do_not_go_with_a_solve_are_refused():
    t, y0 = torch.tensor([0.0, 1.0], dtype=F64), torch.ones(3, dtype=F64)
    f = lambda t, y: -y  # noqa: E731
    with pytest.raises(SchemeError, match=r"under torch.func.vmap no step size can be chosen; take fixed steps"):
        torch.func.vmap(lambda y: odeint(f, y, t))(y0)
    for gradient in ("checkpoint", "reverse", "adjoint"):
        with pytest.raises(SchemeError, match=r"does not go with torch.func; take gradient='store'"):
            torch.func.grad(lambda y, g=gradient: odeint(f, y, t, gradient=g)[-1].sum())(y0)
    assert torch.func.grad(lambda y: odeint(f, y, t)[-1].sum())(y0) == pytest.approx(math.exp(-1), rel=1e-6)


@pytest.mark.parametrize("gradient", ["reverse", "adjoint"])
def test_what_the_backward_pass_alone_reads_is_refused(gradient):
    late = torch.ones((), dtype=F64, requires_grad=True)
    y0 = torch.ones(1, dtype=F64, requires_grad=True)
    y = odeint(lambda t, y: -y if t < 0.5 else -late * y, y0, T, gradient=gradient)
    with pytest.raises(SchemeError, match="closure"):
        y.sum().backward()


@pytest.mark.parametrize("gradient", ["reverse", "adjoint"])
def test_what_changed_in_place_since_is_refused(gradient):
    w = nn.Parameter(torch.ones(2, dtype=F64))
    y = odeint(lambda t, y: -w * y, torch.ones(2, dtype=F64), T, gradient=gradient)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_dropout_is_drawn_again_as_it_was():
    torch.manual_seed(0)
    y0 = torch.ones(50, dtype=F64, requires_grad=True)
    grads = []
    for gradient in ("store", "checkpoint"):
        torch.manual_seed(1)
        y = odeint(
            lambda t, y: -nn.functional.dropout(y, 0.3), y0, T, method="rk4", options={"steps": 2}, gradient=gradient
        )
        grads.append(torch.autograd.grad(y.square().sum(), y0)[0])
    torch.testing.assert_close(*grads)


def test_gradients_of_a_failing_solve_reach_what_was_solved():
    y0 = torch.tensor([0.5], dtype=F64, requires_grad=True)
    found = integrate(lambda t, y: y * y, y0, torch.tensor([0.0, 1.0, 3.0], dtype=F64), check=False)
    assert found.status == "underflow" and len(found.y) == 2
    found.y[1].backward()
    assert float(y0.grad) == pytest.approx(1 / (1 - 0.5) ** 2, rel=1e-5)
    assert math.isfinite(found.reached)


@pytest.mark.parametrize("most", [1, 3, 20])
@pytest.mark.parametrize("method", ["reversible(tsit5)", "reversible_heun", "alf", "alf(9/10)"])
def test_a_reversible_solve_that_stops_early_has_the_gradients_of_the_stored_one(method, most):
    """Of every value that it got to, however far beyond the last of them it went."""
    field = lambda t, y: torch.sin(5 * t) - 0.3 * y * y  # noqa: E731
    t, found = torch.tensor([0.0, 0.01, 0.5, 50.0], dtype=F64), {}
    for gradient in ("store", "reverse"):
        y0 = torch.tensor([1.0, 0.4], dtype=F64, requires_grad=True)
        given = {"method": method, "gradient": gradient, "options": {"max_steps": most}, "rtol": 1e-5, "atol": 1e-5}
        run = integrate(field, y0, t, check=False, **given)
        assert run.status == "max_steps" and run.accepted == len(run.steps)
        found[gradient] = [len(run.y), *(torch.autograd.grad(y.sum(), y0, retain_graph=True)[0] for y in run.y)]
    assert found["store"][0] == found["reverse"][0]
    for got, want in zip(found["reverse"][1:], found["store"][1:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method, options", [("tsit5", {}), ("reversible_heun", {}), ("rk4", {"steps": 40})])
def test_gradients_of_streams_that_came_apart_are_those_of_the_values_before(method, options):
    y0 = torch.ones(3, dtype=F64, requires_grad=True)
    t, found = torch.tensor([0.0, 0.001, 0.01, 1.0], dtype=F64), []
    for gradient in ("store", "reverse"):
        same = f"reversible({method}, coupling=0.999)" if gradient == "store" and "rev" not in method else method
        f = lambda t, y: -40 * (y - torch.cos(t))  # noqa: E731
        given = {"gradient": gradient, "options": options, "rtol": 1e-3, "atol": 1e-3}
        run = integrate(f, y0, t, method=same, check=False, **given)
        found.append([torch.autograd.grad(y.sum(), y0, retain_graph=True)[0] for y in run.y[:3]])
    assert run.status == "unstable" and run.accepted == len(run.steps) > 0
    for got, want in zip(*reversed(found), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["reversible(tsit5)", "reversible_heun", "alf"])
def test_a_solve_that_fails_at_its_start_has_the_gradient_of_its_start(method):
    y0 = torch.tensor([1.0, math.nan], dtype=F64, requires_grad=True)
    run = integrate(lambda t, y: -y, y0, T, method=method, gradient="reverse", check=False)
    assert run.status == "not_finite"
    (got,) = torch.autograd.grad(run.y[0, 0], y0)
    assert got.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("method", ["tsit5", "reversible(tsit5, coupling=0.9)", "reversible_heun"])
def test_a_stiff_field_is_too_much_for_two_streams_and_that_is_said(method):
    """No step size keeps them together: the parasitic mode grows as exp(40 t)."""
    f = lambda t, y: -40 * (y - torch.cos(t))  # noqa: E731
    y0 = torch.ones(3, dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 1.0], dtype=F64)
    with pytest.raises(SchemeError, match=r"(have come apart at t=0\.\d+.*|steps were used up.*)"):
        odeint(f, y0, t, method=method, gradient="reverse", rtol=1e-5, atol=1e-5, options={"max_steps": 20000})
    with pytest.raises(SchemeError, match="have come apart"):
        odeint(f, y0, t, method="rk4", gradient="reverse", options={"steps": 40})


def test_states_that_cannot_be_made_again_are_refused():
    """An inverse that amplifies by 1/0.6 a step, over 80 steps."""
    y0 = torch.ones(3, dtype=F64, requires_grad=True)
    y = odeint(
        lambda t, y: torch.sin(y) * torch.cos(3 * t),
        y0,
        torch.tensor([0.0, 2.0], dtype=F64),
        method="reversible(rk4, coupling=0.6)",
        gradient="reverse",
        options={"steps": 80},
    )
    with pytest.raises(SchemeError, match=r"made the state at t=0 again with a relative error of"):
        y.sum().backward()
