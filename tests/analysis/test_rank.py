"""The rank of matrices whose rank is known, and the bound that a sum keeps and a concatenation lifts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odenets import Stack
from odenets.analysis import feature_rank, rank_profile


@given(rank=st.integers(1, 6), columns=st.integers(6, 9), seed=st.integers(0, 1000))
def test_products_have_the_rank_of_their_middle(rank, columns, seed):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(50, rank, generator=g), torch.randn(rank, columns, generator=g)
    found = feature_rank((a @ b).double(), tolerance=1e-6)
    assert found.width == columns and found.numerical == rank and 1 <= found.effective <= rank + 1e-4


@given(n=st.integers(1, 8), scale=st.floats(1e-3, 1e3))
def test_equal_directions_count_whole_whatever_the_scale(n, scale):
    found = feature_rank(scale * torch.eye(n, dtype=torch.float64).repeat(3, 1))
    assert found.numerical == n and found.effective == pytest.approx(n)


def test_the_tolerance_is_relative_to_the_largest():
    x = torch.diag(torch.tensor([1.0, 1e-2, 1e-4]))
    for scale in (1e-6, 1.0, 1e6):
        assert [feature_rank(scale * x, t).numerical for t in (1e-1, 1e-3, 1e-5)] == [1, 2, 3]


def test_the_effective_rank_is_the_exponent_of_the_entropy():
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert feature_rank(torch.diag(torch.tensor([3.0, 1.0]))).effective == pytest.approx(math.exp(entropy))


def test_maps_are_rows_of_pixels_and_zeros_have_no_rank():
    x = torch.randn(2, 3, 4, 5)
    assert feature_rank(x) == feature_rank(x.permute(0, 2, 3, 1).reshape(-1, 3))
    assert feature_rank(torch.zeros(4, 3)) == (3, 0, 0.0)


def test_rows_beyond_the_limit_are_spread_evenly():
    x = torch.zeros(100, 2)
    x[:, 0], x[50:, 1] = 1, torch.arange(50.0)
    assert feature_rank(x, rows=10).numerical == 2  # the first ten rows alone would have rank 1
    assert feature_rank(x[:50], rows=10).numerical == 1


def test_a_sum_keeps_its_width_and_a_concatenation_lifts_the_bound():
    """rank(x + f(x)) <= width; rank([x, f(x)]) <= rank(x) + rank(f(x))."""
    x = torch.randn(256, 6, dtype=torch.float64)
    sums = Stack([torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.SiLU()) for _ in range(4)]).double()
    joined = Stack([torch.nn.Sequential(torch.nn.Linear(6 * n, 6), torch.nn.SiLU()) for n in range(1, 5)], "dense(6)")
    assert [r.numerical for r in rank_profile(sums.trajectory(x), 1e-9)] == [6, 6, 6, 6]
    assert [r.numerical for r in rank_profile(joined.double().trajectory(x), 1e-9)] == [12, 18, 24, 30]
    # Functions without a nonlinearity add no direction, however many are joined.
    linear = Stack([torch.nn.Linear(6 * n, 6, bias=False) for n in range(1, 5)], "dense(6)").double()
    assert [r.numerical for r in rank_profile(linear.trajectory(x), 1e-9)] == [6, 6, 6, 6]
