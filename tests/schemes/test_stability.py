"""R(z) is what one step does to y' = lambda y; the intervals are the published ones."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import schemes
from schemes import tableaux
from schemes.errors import SchemeError
from schemes.stability import R, imaginary_interval, polynomial, real_interval, region
from schemes.tableau import compose

M = tableaux.METHODS


@pytest.mark.cases(3)
@pytest.mark.parametrize("name", ["euler", "rk4", "gill4", "cooper_verner8", "verner8", "ssprk104"])
@given(z=st.fractions(-5, 5, max_denominator=20))
def test_the_polynomial_is_one_step_of_the_linear_equation(name, z):
    t, ks = M[name], []
    for row in t.a:
        ks.append(z * (1 + sum((a * k for a, k in zip(row, ks, strict=True)), Fraction(0))))
    step = 1 + sum((b * k for b, k in zip(t.b, ks, strict=True)), Fraction(0))
    assert sum((x * z**k for k, x in enumerate(polynomial(t))), Fraction(0)) == step
    assert R(t, float(z)) == pytest.approx(float(step), rel=1e-9, abs=1e-9)


def test_polynomials_agree_with_exp_up_to_the_order():
    for t in M.values():
        for k, x in enumerate(polynomial(t)[: t.order + 1]):
            assert float(x) * float(np.prod(range(1, k + 1))) == pytest.approx(1, rel=1e-9)
    assert [str(x) for x in polynomial(tableaux.ees25())] == ["1", "1", "1/2", "1/8"]


def test_repeating_a_method_takes_the_power_of_its_polynomial():
    z = -0.7 + 1.3j
    assert R(compose([M["rk4"]] * 3), z) == pytest.approx(R(M["rk4"], z / 3) ** 3, rel=1e-12)


def test_R_takes_arrays_and_tensors():
    z = np.linspace(-2, 0, 12).reshape(3, 4) + 0.5j
    want = np.array([[R(M["rk4"], complex(x)) for x in row] for row in z])
    np.testing.assert_allclose(R(M["rk4"], z), want, rtol=1e-14)
    torch.testing.assert_close(R(M["rk4"], torch.from_numpy(z)), torch.from_numpy(want))
    assert R(M["euler"], torch.tensor([[1.0, 2.0]])).shape == (1, 2)


INTERVALS = [
    ("euler", 2.0, 0.0),
    ("midpoint", 2.0, 0.0),
    ("kutta3", 2.5127, 3**0.5),
    ("rk4", 2.7853, 8**0.5),
    ("dopri5", 3.3066, 0.9972),
    ("cooper_verner8", 3.715, 3.002),
    ("williamson3", 2.513, 1.732),
    ("carpenter_kennedy4", 4.657, 3.341),
    ("rk46nl", 4.071, 3.816),
    ("ssprk33", 2.513, 1.732),
    ("ssprk54", 5.331, 3.278),
    ("ssprk104", 13.917, 4.921),
    ("ees27", 3.916, 0.0),
    ("dopri8", 5.1666, 0.0),
]


@pytest.mark.parametrize(("name", "real", "imaginary"), INTERVALS)
def test_intervals(name, real, imaginary):
    assert real_interval(M[name]) == pytest.approx(real, abs=6e-4)
    assert imaginary_interval(M[name]) == pytest.approx(imaginary, abs=6e-4)


FAMILIES = [
    ("ees25", (), 3.087),
    ("rkc2", (3,), 6.18),
    ("rkc2", (5,), 16.603),
    ("rkc2", (10,), 64.74),
    ("rkc2", (16,), 166.67),
    ("rkl2", (3,), 5.81),
    ("rkl2", (5,), 14.75),
    ("rkl2", (9,), 44.72),
    ("rkc1", (3,), 17.49),
    ("rkc1", (5,), 48.46),
    ("rkc1", (10,), 193.65),
]


@pytest.mark.parametrize(("name", "args", "real"), FAMILIES)
def test_stabilised_families_reach_far_along_the_negative_axis(name, args, real):
    t = tableaux.FAMILIES[name](*args)
    assert real_interval(t) == pytest.approx(real, abs=6e-3) and imaginary_interval(t) == 0.0


@pytest.mark.parametrize("s", [1, 2, 5, 9])
def test_undamped_methods_are_stable_to_their_exact_bound(s):
    assert real_interval(tableaux.rkl1(s)) == pytest.approx(s * s + s, rel=1e-9)
    assert real_interval(tableaux.rkc1(s, 0)) == pytest.approx(2 * s * s, rel=1e-9)


def test_an_interval_ends_where_the_step_starts_to_grow():
    for t in (M["rk4"], M["dopri5"], M["verner8"], tableaux.rkc2(7)):
        r = real_interval(t)
        assert abs(R(t, -r * (1 - 1e-6))) <= 1 < abs(R(t, -r * (1 + 1e-6)))
    for name in ("rk4", "dopri5", "huta6", "cooper_verner8"):
        i = imaginary_interval(M[name])
        assert abs(R(M[name], 1j * i * (1 - 1e-4))) <= 1 < abs(R(M[name], 1j * i * (1 + 1e-4)))


def test_growth_that_is_allowed_lengthens_the_interval():
    # |R(iy)|^2 = 1 + y^4 / 4 for midpoint
    assert imaginary_interval(M["midpoint"], tolerance=1e-4) == pytest.approx((4 * 2.0001e-4) ** 0.25, rel=1e-3)
    assert real_interval(M["euler"], tolerance=0.5) == pytest.approx(2.5)
    assert imaginary_interval(M["dopri8"], tolerance=1e-9) > 0.7


def test_region_samples_the_plane():
    grid = region(M["rk4"], re=(-3, 1), im=(-3, 3), n=(5, 7))
    assert grid.re == [-3, -2, -1, 0, 1] and grid.im == [-3, -2, -1, 0, 1, 2, 3]
    assert len(grid.size) == 7 and all(len(row) == 5 for row in grid.size)
    for i, y in enumerate(grid.im):
        for j, x in enumerate(grid.re):
            assert grid.size[i][j] == pytest.approx(abs(R(M["rk4"], complex(x, y))), rel=1e-12)
    assert grid.size[3][3] == 1.0 and grid.size[0] == pytest.approx(grid.size[6])
    with pytest.raises(SchemeError, match="at least 2"):
        region(M["rk4"], n=1)


@pytest.mark.parametrize("text", ["rkc1(5)", "rkc1(5, 1/10)", "rkc2(5)", "rkc2(5, 1/10)"])
def test_a_stabilised_method_is_named_with_its_damping(text):
    method = schemes.get(text)
    assert schemes.get(method.tableau.name).tableau.floats() == method.tableau.floats()
