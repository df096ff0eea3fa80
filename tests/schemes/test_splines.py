"""Splines: the basis against the definition by divided differences, and the maps between spaces."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schemes import SchemeError
from schemes.splines import SplineSpace, distance, fit, gram, projection, transfer

F64 = torch.float64


@st.composite
def spaces(draw, least=0, most=3):
    """Spaces of any degree, whose inner knots are sixteenths and may stand several times."""
    degree = draw(st.integers(least, most))
    places = draw(st.lists(st.integers(1, 15), unique=True, max_size=5))
    return SplineSpace(degree, tuple(k / 16 for k in sorted(places) for _ in range(draw(st.integers(1, degree + 1)))))


def by_definition(space, j, u):
    """B_j(u) = (t_{j+d+1} - t_j) [t_j, ..., t_{j+d+1}] (t - u)_+^d, in exact arithmetic, for u inside an interval."""
    ts = [Fraction(t) for t in space.knots[j : j + space.degree + 2]]
    u, d = Fraction(u), space.degree

    def derivative(t, order):  # of (t - u)_+^d by t, over the factorial of the order
        if t <= u:
            return Fraction(0)
        c = Fraction(1)
        for k in range(order):
            c = c * (d - k) / (k + 1)
        return c * (t - u) ** (d - order) if order <= d else Fraction(0)

    def divided(knots):
        if knots[0] == knots[-1]:
            return derivative(knots[0], len(knots) - 1)
        return (divided(knots[1:]) - divided(knots[:-1])) / (knots[-1] - knots[0])

    return (ts[-1] - ts[0]) * divided(ts)


@given(spaces(), st.integers(0, 16 * 7 - 1))
def test_basis_functions_are_divided_differences(space, k):
    u = (k + 0.5) / (16 * 7)
    row = space.rows([u])[0]
    want = [float(by_definition(space, j, u)) for j in range(space.count)]
    torch.testing.assert_close(row, torch.tensor(want, dtype=F64), atol=1e-13, rtol=0)
    torch.testing.assert_close(space.basis(torch.tensor(u, dtype=F64)), row, atol=1e-13, rtol=0)


@given(spaces())
def test_values_at_knots_are_those_from_the_right_and_at_the_end_from_the_left(space):
    for a, b in pairwise(space.breaks):
        near = space.rows([a, a + (b - a) * 1e-7])
        torch.testing.assert_close(*near, atol=1e-4, rtol=0)
        # Sums of step sizes miss a knot by rounding: the piece to the right counts all the same.
        torch.testing.assert_close(space.rows([a - 1e-15])[0], near[0], atol=1e-12, rtol=0)
    assert space.rows([1.0])[0].tolist() == [0.0] * (space.count - 1) + [1.0]
    for u in (0.0, 0.3, 1.0):
        torch.testing.assert_close(space.basis(torch.tensor(u, dtype=F64)), space.rows([u])[0], atol=1e-13, rtol=0)


@given(spaces(least=1), st.floats(0.01, 0.99))
def test_the_basis_is_differentiable_in_time(space, u):
    if min(abs(u - knot) for knot in space.breaks) < 1e-3:
        return
    t = torch.tensor(u, dtype=F64, requires_grad=True)
    coefficients = torch.linspace(-1, 1, space.count, dtype=F64).sin()
    (slope,) = torch.autograd.grad((space.basis(t) * coefficients).sum(), t)
    a, b = space.rows([u - 1e-6, u + 1e-6]) @ coefficients
    assert abs(float(slope) - float(b - a) / 2e-6) < 1e-5 * (1 + abs(float(slope)))


@given(spaces(), st.integers(0, 2), st.sampled_from([16, 32]))
def test_refinement_and_elevation_leave_the_function(space, more, intervals):
    for target in (space.refined(intervals), space.elevated(min(3, space.degree + more))):
        places = [(k + 0.37) / 97 for k in range(97)]
        c = torch.randn(space.count, dtype=F64, generator=torch.Generator().manual_seed(0))
        old, new = space.rows(places) @ c, target.rows(places) @ (transfer(space, target) @ c)
        torch.testing.assert_close(new, old, atol=1e-12, rtol=0)
        # The nearest spline of a space that holds the function is the function.
        torch.testing.assert_close(projection(space, target), transfer(space, target), atol=1e-9, rtol=0)


@given(spaces(), spaces())
def test_a_projection_is_the_nearest_spline(source, target):
    """Its error is orthogonal to the space, and a second projection changes nothing."""
    p = projection(source, target)
    a, b, weights = distance(source, target)
    error = a - b @ p
    assert float((b.T @ (weights[:, None] * error)).abs().max()) < 1e-9
    torch.testing.assert_close(projection(target, target) @ p, p, atol=1e-9, rtol=0)
    assert torch.linalg.eigvalsh(gram(target)).min() > 0


@given(spaces(), st.integers(1, 12))
def test_a_fit_is_least_squares_and_keeps_constants(space, n):
    us = [(i + 0.25) / n for i in range(n)]
    found, rows = fit(space, us), space.rows(us)
    torch.testing.assert_close(found.sum(1), torch.ones(space.count, dtype=F64), atol=1e-9, rtol=0)
    residual = torch.eye(n, dtype=F64) - rows @ found
    assert float((rows.T @ residual).abs().max()) < 1e-9


MAPS = {
    "rows": lambda a, b: a.rows([0.1, 0.7]),
    "gram": lambda a, b: gram(a),
    "transfer": transfer,
    "projection": projection,
    "fit": lambda a, b: fit(a, [0.1, 0.4, 0.5]),
    "distance": lambda a, b: torch.cat([x.flatten() for x in distance(a, b)]),
}


@pytest.mark.parametrize("kind", MAPS)
def test_maps_are_on_the_host_and_belong_to_the_caller(kind):
    spaces = SplineSpace.uniform(7, 2), SplineSpace.uniform(14, 2)
    with torch.device("meta"):
        found = MAPS[kind](*spaces)
    want = MAPS[kind](*spaces).clone()
    torch.testing.assert_close(found, want)
    found.zero_()
    torch.testing.assert_close(MAPS[kind](*spaces), want)


def test_where_a_spline_goes_on_outside_of_its_interval():
    space = SplineSpace.uniform(4, 2)
    c = torch.randn(space.count, dtype=F64)
    inside, beyond = space.rows([0.8, 0.9, 1.0]) @ c, space.rows([1.1]) @ c
    torch.testing.assert_close(beyond[0], inside[0] - 3 * inside[1] + 3 * inside[2])  # a parabola


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SplineSpace(4), "the degree is 4, want 0, 1, 2 or 3"),
        (lambda: SplineSpace.uniform(0, 1), "0 intervals, want a whole number, at least 1"),
        (lambda: SplineSpace(1, (0.5, 0.25)), "0.25 follows 0.5; want rising"),
        (lambda: SplineSpace(1, (1.0,)), "want numbers between the two ends"),
        (lambda: SplineSpace(1, (0.5, 0.5, 0.5)), "0.5 stands more than 2 times"),
        (lambda: SplineSpace.uniform(4, 1).refined(6), r"0\.25 .* the nearest that do: 4 or 8"),
        (lambda: SplineSpace.uniform(4, 1).refined(3), "the nearest that do: 4"),
        (lambda: SplineSpace(1, (0.123456789012,)).refined(8), "its knots fit no uniform grid: project instead"),
        (lambda: SplineSpace.uniform(4, 2).elevated(1), "degree 1 cannot hold every spline of degree 2"),
        (lambda: transfer(SplineSpace.uniform(4, 1), SplineSpace.uniform(4, 2)), "does not hold every spline"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(SchemeError, match=message):
        make()
