"""The random network is the loop that one would write by hand: a sum, or a concatenation."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from odenets.layers import DropPath, LayerNorm2d
from odenets.study import SPACES, Candidate, RandomNet, sample
from odenets.study.space import ACTIVATIONS, NORMS, ORDERS
from schemes import SchemeError

BASE = Candidate(0, "euler", "pre", 4, 3, 5, 3, "silu", "batch")
ACTS = {"relu": F.relu, "silu": F.silu, "mish": F.mish, "gelu": F.gelu, "leaky_relu": F.leaky_relu}


def functions(net):
    return [f for step in net.levels[0].steps for f in step.fs]


def by_hand(f, x, candidate, act):
    """A residual function from its convolutions and norms alone."""
    convs = [m for m in f if isinstance(m, nn.Conv2d)]
    norms = [m for m in f if isinstance(m, (nn.BatchNorm2d, LayerNorm2d))]
    for i, (conv, norm) in enumerate(zip(convs, norms, strict=True)):
        if candidate.order == "pre":
            x = conv(act(norm(x)))
        else:
            x = norm(conv(x))
            x = act(x) if i < 2 else x
    return x


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scheme", ["euler", "dense", "midpoint"])
@pytest.mark.parametrize(("activation", "norm"), [("gelu", "layer"), ("leaky_relu", "batch")])
def test_equals_the_hand_written_loop(scheme, order, activation, norm):
    c = dataclasses.replace(BASE, scheme=scheme, order=order, activation=activation, norm=norm)
    act = ACTS[activation]
    net = RandomNet(c, 7).double()
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    fs = functions(net)
    assert len(fs) == c.depth

    stem = next(m for m in net.stem.modules() if isinstance(m, nn.Conv2d))
    y = stem(x) if order == "pre" else act(net.stem[1](stem(x)))
    if scheme == "midpoint":
        for a, b in zip(fs[::2], fs[1::2], strict=True):
            y = y + by_hand(b, y + by_hand(a, y, c, act) / 2, c, act)
            y = act(y) if order == "post" else y
    else:
        for f in fs:
            new = by_hand(f, y, c, act)
            if scheme == "euler":
                y = act(y + new) if order == "post" else y + new
            else:
                y = torch.cat([y, act(new) if order == "post" else new], 1)
    torch.testing.assert_close(net.trajectory(x)[-1], y)
    if order == "pre":
        y = act(next(m for m in net.norm.modules() if isinstance(m, (nn.BatchNorm2d, LayerNorm2d)))(y))
    torch.testing.assert_close(net(x), net.head(y.mean((2, 3))))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_every_choice_trains(activation, norm):
    net = RandomNet(dataclasses.replace(BASE, scheme="dense", activation=activation, norm=norm), 3)
    net(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_one_place_more_than_functions_in_the_trajectory():
    found = RandomNet(dataclasses.replace(BASE, scheme="dense"), 3).trajectory(torch.randn(1, 3, 8, 8))
    assert [x.shape[1] for x in found] == [5, 10, 15, 20, 25]


def test_drop_path_grows_with_the_depth():
    net = RandomNet(dataclasses.replace(BASE, augment="drop_path", strength=0.3), 3)
    rates = [m.p for m in net.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.1, 0.2, 0.3])  # the first function, whose rate is 0, has none


@pytest.mark.parametrize("scheme", ["revnet", "adaptive(dopri5)", "dense(5)"])
def test_schemes_that_a_study_does_not_compare_are_refused(scheme):
    with pytest.raises(SchemeError, match="fixed-step schemes of one stream"):
        RandomNet(dataclasses.replace(BASE, scheme=scheme), 3)
    with pytest.raises(SchemeError, match="fixed-step schemes of one stream"):
        sample(SPACES["A"], ("euler", scheme), 1)  # before anything is trained
