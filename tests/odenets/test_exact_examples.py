"""Every example of a scheme on the grid: what says ``exact`` is undone bit by bit, what does not is refused."""

import pytest
import torch
from torch import nn

import schemes
from odenets import Stack
from schemes import SchemeError

REVERSIBLE = [text for text in schemes.examples() if schemes.get(text).reversible_in_training]


class Body(nn.Module):
    def __init__(self, slot):
        super().__init__()
        self.inner = nn.Linear(sum(slot.in_channels), 6)
        self.norm, self.dropout = nn.BatchNorm1d(6), nn.Dropout(0.2)
        self.outer = nn.Linear(6, slot.out_channels)

    def forward(self, *xs):
        return 0.3 * self.outer(self.dropout(torch.tanh(self.norm(self.inner(torch.cat(xs, 1))))))


def stack(text, mode):
    torch.manual_seed(0)
    return Stack.from_factory(Body, text, 3 * len(schemes.get(text).plan), channels=12, backprop=mode)


def pass_of(net, x):
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    y = net(x)
    y.square().mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in net.parameters()), *net.buffers(), torch.get_rng_state()]


@pytest.mark.cases(10)
@pytest.mark.parametrize("text", REVERSIBLE)
def test_exact_is_what_it_says(text):
    scheme = schemes.get(text)
    exact = scheme.exact or scheme.training_scheme(0, torch.zeros(1, 12)).exact
    if not exact:
        with pytest.raises(SchemeError, match="cannot be undone bit by bit"):
            stack(text, "exact")
        return
    x = torch.randn(5, 12)
    undone, kept = (pass_of(stack(text, mode), x) for mode in ("exact", "exact(store=true)"))
    for a, b in zip(undone, kept, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.cases(9)
@pytest.mark.parametrize("text", [text for text in REVERSIBLE if not schemes.get(text).training_differs])
def test_reverse_trains_like_store(text):
    """In double precision."""
    x = torch.randn(5, 12, dtype=torch.float64)
    found, want = (pass_of(stack(text, mode).double(), x) for mode in ("reverse", "store"))
    scale = max(float(v.abs().max()) for v in want[1:-1] if v is not None and v.is_floating_point())
    for a, b in zip(found, want, strict=True):
        assert (a is None and b is None) or float((a.double() - b.double()).abs().max()) <= 1e-8 * max(scale, 1.0)
