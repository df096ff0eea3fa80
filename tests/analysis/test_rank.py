"""The rank of matrices whose rank is known, and the bound that a sum keeps and a concatenation lifts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from odenets import Stack
from odenets.analysis import Features, feature_rank, places, rank, rank_profile
from odenets.models import ViT
from schemes import SchemeError


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


@pytest.mark.parametrize("dims", ["n", "h", "w", "hw", "nhw"])
@pytest.mark.parametrize("shape", [(64, 32, 32), (4096, 2, 2), (3, 96, 96), (130, 8, 16), (2, 4096, 1)])
def test_sampled_rows_see_all_places(shape, dims):
    """The rank of features that depend on some of picture, row and column is that of all vectors."""
    g = torch.Generator().manual_seed(0)
    size = [n if d in dims else 1 for d, n in zip("nhw", shape, strict=True)]
    x = torch.randn(16, *size, generator=g).movedim(0, 1).expand(shape[0], 16, *shape[1:])
    values = torch.linalg.svdvals(torch.randn(16, math.prod(size), generator=torch.Generator().manual_seed(0)))
    want = int((values > 1e-3 * values[0]).sum())
    state = torch.get_rng_state()
    found = feature_rank(x)
    assert found.numerical == want == min(16, math.prod(size)) and found == feature_rank(x)
    assert found.effective == pytest.approx(feature_rank(x, rows=10**9).effective, rel=0.05)
    assert torch.equal(state, torch.get_rng_state())


@given(count=st.integers(2, 300), rows=st.integers(1, 300))
def test_no_row_is_drawn_twice_and_each_part_gives_one(count, rows):
    rows = min(rows, count - 1)
    x = torch.arange(count, dtype=torch.float64)
    drawn = rank._spread(count, rows)
    assert drawn.tolist() == sorted(set(drawn.tolist())) and 0 <= int(drawn[0]) and int(drawn[-1]) < count
    assert torch.equal((x[drawn] * rows // count).long(), torch.arange(rows)) or count % rows


def test_tokens_hold_their_channels_last():
    tokens = torch.randn(8, 5, 3) @ torch.randn(3, 12)  # 12 channels of rank 3, at 5 places
    assert feature_rank(tokens)[:2] == (12, 3) == feature_rank(tokens.flatten(0, 1))[:2]
    assert feature_rank(tokens, dim=1)[:2] == (5, 5)
    assert feature_rank(tokens.movedim(2, 1), dim=1) == feature_rank(tokens)
    net = ViT(2, 12, 2, patch=8, size=16, num_classes=3).eval()
    with Features(net, places(net)) as found:
        net(torch.randn(8, 3, 16, 16))
    assert [r.width for r in rank_profile([x for _, x in found.items()])] == [12] * 4


def test_features_without_channels_or_with_nan_are_refused():
    with pytest.raises(SchemeError, match=r"\(4,\), channels in dimension 1"):
        feature_rank(torch.ones(4))
    with pytest.raises(SchemeError, match="not finite"):
        feature_rank(torch.full((4, 2), torch.nan))
    with pytest.raises(SchemeError, match="rows=0"):
        feature_rank(torch.ones(4, 2), rows=0)
    for tolerance in (-1e-3, 1.0, math.nan):
        with pytest.raises(SchemeError, match="tolerance="):
            feature_rank(torch.ones(4, 2), tolerance)


def test_complex_features_have_their_own_rank():
    """1 and i times one row are one direction; their real parts are two."""
    row = torch.randn(1, 6, dtype=torch.complex64)
    x = torch.cat([row, 1j * row, 3 * row])
    assert feature_rank(x)[:2] == (6, 1) and feature_rank(x.real)[1] == 2
