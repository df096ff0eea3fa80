"""The learned scale per channel: bound, gradient, inverse."""

import pytest
import torch

from odenets.layers import ChannelScale


def test_it_scales_each_channel_and_undoes_it():
    scale = ChannelScale(3, init=0.5).double()
    with torch.no_grad():
        scale.alpha.copy_(torch.tensor([0.5, -2.0, 0.1]).view(1, 3, 1, 1))
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    y = scale(x)
    assert torch.equal(y[:, 1], -2 * x[:, 1]) and scale.alpha.shape == (1, 3, 1, 1)
    assert torch.allclose(scale.inverse(y), x, rtol=1e-15)


@pytest.mark.parametrize(
    "alpha, want",
    [(0.0, 1e-3), (-0.0, 1e-3), (1e-5, 1e-3), (-1e-5, -1e-3), (1e-3, 1e-3), (-0.2, -0.2), (0.7, 0.7)],
)
def test_it_keeps_away_from_zero_with_a_straight_through_gradient(alpha, want):
    scale = ChannelScale(1, init=alpha)
    x = torch.full((1, 1, 1, 1), 3.0)
    y = scale(x)
    assert torch.equal(scale.scale.detach(), torch.full((1, 1, 1, 1), want))
    y.backward()
    assert scale.alpha.grad is not None and float(scale.alpha.grad) == 3.0
    assert torch.equal(scale.alpha.detach(), torch.full((1, 1, 1, 1), alpha))
    assert torch.allclose(scale.inverse(y), x)


def test_gradients_of_both_directions():
    scale = ChannelScale(2, init=-0.3).double()
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(scale, (x,))
    assert torch.autograd.gradcheck(scale.inverse, (x,))


def test_tokens_have_their_channels_last():
    scale = ChannelScale(6, dim=-1, ndim=3)
    assert scale.alpha.shape == (1, 1, 6)
    assert torch.equal(scale(torch.ones(2, 5, 6)), torch.full((2, 5, 6), 0.5))
