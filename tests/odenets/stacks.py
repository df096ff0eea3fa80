"""Small stacks and their written-out formulas, for the tests of Stack."""

import warnings

import torch
from torch import nn

import schemes
from odenets import Stack

F64 = torch.float64
WIDTH = 4  # of a Body


class Block(nn.Sequential):
    """A smooth residual function on pictures."""

    def __init__(self, channels=3, out=None, stride=1):
        out = out or channels
        super().__init__(nn.Conv2d(channels, out, 3, stride, 1), nn.BatchNorm2d(out), nn.Tanh())


class Body(nn.Module):
    """0.3 V tanh(middle(W [arguments])): the residual function of a slot, ``WIDTH`` wide inside."""

    def __init__(self, slot, middle=None):
        super().__init__()
        self.inner = nn.Linear(sum(slot.in_channels), WIDTH)
        self.middle = nn.Identity() if middle is None else middle
        self.outer = nn.Linear(WIDTH, slot.out_channels)

    def forward(self, *xs):
        return 0.3 * self.outer(torch.tanh(self.middle(self.inner(torch.cat(xs, 1)))))


def linears(n, width=4):
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(width, width, dtype=F64), nn.Tanh()) for _ in range(n)]


def data(*shape):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(1))


def quiet(*args, **kwargs):
    """A Stack without the warnings that other tests are about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Stack(*args, **kwargs)


def factory(*args, **kwargs):
    """A Stack made slot by slot, without the warnings that other tests are about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Stack.from_factory(*args, **kwargs)


def formula(tableau, fs, x, g, h):
    """One step as a book writes it: x itself where a row is zero, the shortcut's x elsewhere."""
    a, b, _, _ = tableau.floats()
    y, ks = g(x), []
    for f, row in zip(fs, a, strict=True):
        argument = y + h * sum(w * k for w, k in zip(row, ks, strict=True)) if any(row) else x
        ks.append(f(argument))
    return y + h * sum(w * k for w, k in zip(b, ks, strict=True))


def euler(f, x, h):
    return x + h * f[0](x)


def midpoint(f, x, h):
    return x + h * f[1](x + h / 2 * f[0](x))


def rk4(f, x, h):
    k1 = f[0](x)
    k2 = f[1](x + h / 2 * k1)
    k3 = f[2](x + h / 2 * k2)
    k4 = f[3](x + h * k3)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def picture_stack(scheme, steps, mode, **options):
    torch.manual_seed(0)
    make = options.pop("make", lambda: nn.Sequential(Block(), nn.Dropout(0.3)))
    return quiet([make() for _ in range(steps * schemes.get(scheme).stages)], scheme, backprop=mode, **options)


def check_gradients(a, b, x):
    """Two nets of equal weights and equal random numbers give every parameter the same gradient, and none is zero."""
    b.load_state_dict(a.state_dict())
    for net in (a, b):
        torch.manual_seed(1)
        net(x).square().sum().backward()
    for (key, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert p.grad is not None and p.grad.abs().sum() > 0, key
        torch.testing.assert_close(p.grad, q.grad, msg=key)
