"""A step size per sample: each sample is solved as if it were alone."""

import pytest
import torch

from schemes import SchemeError, integrate, odeint, tableaux

F64 = torch.float64
PAIRS = [name for name, tableau in tableaux.METHODS.items() if tableau.b_hat is not None]


def oscillators(mu):
    """Van der Pol's, of one stiffness per sample."""

    def f(t, y):
        x, v = y[:, :1], y[:, 1:]
        return torch.cat((v, mu * (1 - x * x) * v - x + 0.1 * torch.cos(t)), 1)

    return f


MU = torch.tensor([[0.1], [1.0], [5.0], [12.0]], dtype=F64)
Y0 = torch.tensor([[2.0, 0.0]], dtype=F64).repeat(4, 1)
T = torch.tensor([0.0, 0.7, 2.0, 3.0], dtype=F64)


@pytest.mark.cases(4)
@pytest.mark.parametrize("method", PAIRS)
def test_independent_is_joint_for_one_sample(method):
    """The same steps to the last, and so the same values, for every sample of a batch at once."""
    tol = 1e-3 if method == "heun2" else 1e-6
    both = integrate(oscillators(MU), Y0, T, method=method, batch="independent", rtol=tol, atol=tol)
    for n in range(len(MU)):
        one = integrate(oscillators(MU[n : n + 1]), Y0[n : n + 1], T, method=method, rtol=tol, atol=tol)
        assert int(both.accepted[n]) == one.accepted and int(both.rejected[n]) == one.rejected
        torch.testing.assert_close(both.y[:, n], one.y[:, 0], rtol=1e-9, atol=1e-9)
        starts = both.steps[0][: one.accepted, n].tolist()
        assert starts == pytest.approx([t for t, _ in one.steps], rel=1e-6)  # rounding, in the error estimate
    assert len(set(both.accepted.tolist())) > 1


def test_samples_do_not_see_each_other():
    """Whatever the others are, a sample is solved alike, backwards too; a NaN among them stays where it is."""
    f = lambda t, y: -y * torch.cos(t)  # noqa: E731
    y0 = torch.tensor([[1.0], [2.0], [3.0]], dtype=F64)
    t = torch.tensor([2.0, 0.5, -1.0], dtype=F64)
    want = odeint(f, y0, t, batch="independent")
    broken = y0.clone()
    broken[1] = float("nan")
    found = integrate(f, broken, t, batch="independent", check=False)
    assert found.status == ["finished", "not_finite", "finished"]
    assert torch.equal(found.y[:, [0, 2]], want[:, [0, 2]])
    torch.testing.assert_close(want, y0 * torch.exp(torch.sin(t[0]) - torch.sin(t))[:, None, None], rtol=1e-6, atol=0)


def test_a_broken_sample_spoils_no_gradient():
    linear = torch.nn.Linear(2, 2, dtype=F64)
    f = lambda t, y: torch.tanh(linear(y)) / y[:, :1].square()  # noqa: E731
    y0 = torch.tensor([[1.0, 0.5], [float("nan"), 1.0], [0.0, 1.0], [2.0, 1.0]], dtype=F64)
    t = torch.tensor([0.0, 0.5], dtype=F64, requires_grad=True)
    found = integrate(f, y0, t, batch="independent", check=False)
    assert found.status == ["finished", "not_finite", "not_finite", "finished"]
    assert found.y[1, [1, 2]].isnan().all()
    want = odeint(f, y0[[0, 3]], t, batch="independent")
    inputs = [linear.weight, t]
    for a, b in zip(
        torch.autograd.grad(found.y[:, [0, 3]].square().sum(), inputs),
        torch.autograd.grad(want.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_times_of_its_own_for_every_sample():
    t = torch.stack((T, T * 2, T * 0.5, T + 1)).requires_grad_()
    f = lambda t, y: -y * torch.cos(t)  # noqa: E731
    y0 = Y0[:, :1] + torch.arange(4, dtype=F64)[:, None]
    y = odeint(f, y0, t, batch="independent", method="dopri8", rtol=1e-10, atol=1e-10)
    exact = y0 * torch.exp(torch.sin(t[:, :1]) - torch.sin(t)).T[..., None]
    torch.testing.assert_close(y, exact, rtol=1e-8, atol=1e-8)
    weights = torch.linspace(-1, 1, y.numel(), dtype=F64).reshape(y.shape)
    torch.testing.assert_close(
        *(torch.autograd.grad((x * weights).sum(), t)[0] for x in (y, exact)), rtol=1e-7, atol=1e-7
    )
    with pytest.raises(SchemeError, match="t has 3 rows of times for 4 samples"):
        odeint(f, y0, t[:3], batch="independent")


def test_shapes_of_the_times_that_the_field_gets():
    seen = set()

    def f(t, y):
        seen.add(tuple(t.shape))
        return -y

    odeint(f, torch.ones(3, 2, 5), torch.tensor([0.0, 1.0]), batch="independent", rtol=1e-3, atol=1e-3)
    assert seen == {(3, 1, 1)}


def test_a_context_is_sliced_and_rows_that_are_done_are_left_out():
    rows = []

    def f(t, y, mu):
        rows.append(len(y))
        assert len(y) == len(t) == len(mu["mu"])
        return oscillators(mu["mu"])(t, y)

    mu = MU.clone().requires_grad_()
    options = {"rtol": 1e-6, "atol": 1e-6, "batch": "independent"}
    with torch.no_grad():
        found = integrate(f, Y0, T, options={"context": {"mu": mu, "name": "kept"}}, **options)
    whole = integrate(oscillators(MU), Y0, T, **options)
    torch.testing.assert_close(found.y, whole.y, rtol=1e-9, atol=1e-9)
    assert found.rows == sum(rows) < 0.75 * whole.rows and min(rows) == 1
    gradients = []
    for solve in (
        lambda: odeint(f, Y0, T, options={"context": {"mu": mu}}, **options),
        lambda: odeint(oscillators(mu), Y0, T, **options),
    ):
        gradients.append(torch.autograd.grad(solve().square().sum(), mu)[0])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    with pytest.raises(SchemeError, match=r"context holds a tensor of shape \(3, 1\) for 4 samples"):
        odeint(f, Y0, T, options={"context": {"mu": mu[:3]}}, **options)


def test_trees_and_norms_per_sample():
    f = lambda t, y: {"a": -y["a"], "b": (y["a"].sum(1),)}  # noqa: E731
    y0 = {"a": torch.tensor([[1.0, 2.0], [3.0, 0.1]], dtype=F64), "b": (torch.zeros(2, dtype=F64),)}
    y = odeint(f, y0, T, batch="independent")
    torch.testing.assert_close(y["a"][-1], y0["a"] * torch.exp(-T[-1]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(y["b"][0][-1], y0["a"].sum(1) * (1 - torch.exp(-T[-1])), rtol=1e-6, atol=1e-6)
    free = integrate(
        oscillators(MU), Y0, T, batch="independent", options={"norm": lambda x: x.abs().max() * 100}, rtol=1e-4
    )
    assert (free.accepted > integrate(oscillators(MU), Y0, T, batch="independent", rtol=1e-4).accepted).all()


def test_jumps_and_steps_of_a_batch():
    seen = []

    def f(t, y):
        seen.append(t.reshape(-1).clone())
        return torch.where(t < 0.5, 1.0, -1.0) * y * torch.tensor([[1.0], [3.0]], dtype=F64)

    y0 = torch.ones(2, 1, dtype=F64)
    t = torch.tensor([0.0, 1.0], dtype=F64)
    found = integrate(f, y0, t, batch="independent", options={"jump_t": [0.5], "step_t": [0.21]})
    torch.testing.assert_close(found.y[-1], y0, rtol=1e-7, atol=1e-7)
    assert not (torch.cat(seen) == 0.5).any()
    starts, sizes = found.steps
    assert ((starts == 0.21) & (sizes > 0)).any(0).all() and ((starts == 0.5) & (sizes > 0)).any(0).all()


@pytest.mark.parametrize("gradient", ["store", "checkpoint"])
@pytest.mark.parametrize("batch", ["joint", "independent"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dopri8"])
def test_a_step_that_ends_on_a_jump_reads_what_comes_before_it(method, batch, gradient):
    """Also where start and size together are the next number after the jump."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(2000, 2, dtype=F64, generator=generator).tolist()
    start, jump = next((a, 2 + b) for a, b in draws if a + (2 + b - a) > 2 + b)
    y0, t = torch.zeros(1, 1, dtype=F64).requires_grad_(), torch.tensor([start, jump, jump + 1], dtype=F64)
    options = {"jump_t": [jump], "first_step": jump - start}
    f = lambda t, y: torch.where(t < jump, 0.0, 1.0) + 0 * y  # noqa: E731
    found = integrate(f, y0, t, method=method, batch=batch, gradient=gradient, options=options)
    assert int(found.rejected) == 0
    torch.testing.assert_close(found.y[:, 0, 0].detach(), torch.tensor([0.0, 0.0, 1.0], dtype=F64))


def test_easy_samples_are_cheaper():
    """What this is for: evaluations that count, were finished rows dropped, against one step size for all."""
    mu = torch.logspace(-1, 1.3, 20, dtype=F64)[:, None]
    y0 = torch.tensor([[2.0, 0.0]], dtype=F64).repeat(20, 1)
    t = torch.tensor([0.0, 6.0], dtype=F64)

    def f(t, y, mu):
        return oscillators(mu)(t, y)

    apart = integrate(f, y0, t, batch="independent", options={"context": mu}, rtol=1e-5, atol=1e-5)
    joint = integrate(oscillators(mu), y0, t, rtol=1e-5, atol=1e-5)
    assert apart.rows / 20 < 0.6 * joint.evaluations


def test_tolerances_of_their_own_for_every_sample():
    """As many steps as the sample takes alone with its tolerance; with a context, and in trees, too."""
    tol = torch.tensor([[1e-2], [1e-5], [1e-8], [1e-3]], dtype=F64)
    alone = [
        integrate(oscillators(MU[n : n + 1]), Y0[n : n + 1], T, rtol=float(x), atol=float(x)).accepted
        for n, x in enumerate(tol)
    ]
    ways = [
        integrate(oscillators(MU), Y0, T, rtol=tol, atol=tol, batch="independent"),
        integrate(
            lambda t, y, mu: oscillators(mu)(t, y),
            Y0,
            T,
            rtol=tol,
            atol=tol,
            batch="independent",
            options={"context": MU},
        ),
        integrate(lambda t, y: (oscillators(MU)(t, y[0]),), (Y0,), T, rtol=(tol,), atol=[tol], batch="independent"),
    ]
    for found in ways:
        assert found.accepted.tolist() == alone


def test_a_norm_of_a_tree_is_one_of_a_sample():
    shapes = set()

    def norm(y):
        shapes.add(tuple(tuple(x.shape) for x in y))
        return y[0].abs().max()

    f = lambda t, y: (-y[0], torch.cos(50 * t).reshape(-1))  # noqa: E731
    y0 = (Y0, torch.zeros(4, dtype=F64))
    found = integrate(f, y0, T, batch="independent", options={"norm": norm}, rtol=1e-5, atol=1e-5)
    assert shapes == {((2,), ())}
    assert (found.accepted < integrate(f, y0, T, batch="independent", rtol=1e-5, atol=1e-5).accepted / 2).all()


def test_what_is_read_at_late_times_alone_has_its_gradient():
    p = torch.tensor(0.7, dtype=F64, requires_grad=True)

    def f(t, y):
        return p * y if float(t.max()) > 0.5 else 0 * y

    y = odeint(f, torch.ones(1, 1, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64), batch="independent", rtol=1e-6)
    assert y.requires_grad and float(torch.autograd.grad(y[-1].sum(), p)[0]) == pytest.approx(
        0.5 * float(y[-1].detach()), rel=1e-2
    )
    with pytest.raises(SchemeError, match="did not read at the start of the solve"):
        odeint(f, torch.ones(1, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64), gradient="reverse", rtol=1e-4)


def test_the_last_states_have_the_gradients_of_the_values():
    y0 = Y0.clone().requires_grad_()
    found = integrate(oscillators(MU), y0, T, batch="independent", rtol=1e-6, atol=1e-6)
    assert torch.equal(found.last, found.y[-1])
    values = (found.last, found.y[-1])
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), y0, retain_graph=True)[0] for x in values))


def test_forward_mode_goes_through_the_second_pass():
    f = lambda t, y: -y * y  # noqa: E731
    y0, t = torch.tensor([[1.0], [2.0]], dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    for batch in ("joint", "independent"):
        solve = lambda y, batch=batch: odeint(f, y, t, batch=batch)[-1]  # noqa: E731
        _, tangent = torch.func.jvp(solve, (y0,), (torch.ones_like(y0),))
        torch.testing.assert_close(tangent, 1 / (1 + y0) ** 2, rtol=1e-6, atol=1e-6)
        (found,) = torch.func.vjp(solve, y0)[1](torch.ones_like(y0))
        torch.testing.assert_close(found, tangent, rtol=1e-6, atol=1e-6)
