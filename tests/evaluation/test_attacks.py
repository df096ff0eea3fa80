"""FGSM and projected gradient descent against gradients by hand, and what they leave as it was."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from odenets import Stack
from odenets.evaluation import fgsm, pgd, read_attack
from schemes import SchemeError

MODES = ("checkpoint", "reverse", "exact", "offload", "reverse(every=1)", "store + reverse")


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5)).double()


def by_hand(net, x, labels):
    """The gradient of the cross-entropy of a linear network: (softmax - one-hot) W."""
    w, b = net[1].weight.detach(), net[1].bias.detach()
    p = (x.flatten(1) @ w.T + b).softmax(1)
    return ((p - F.one_hot(labels, 5)) @ w).view_as(x)


class Conv(nn.Module):
    """A small reversible network with a norm."""

    def __init__(self, backprop="store"):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        fs = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()) for _ in range(4)]
        self.stack, self.head = Stack(fs, "revnet", backprop=backprop), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.stack(self.norm(self.stem(x))).mean((2, 3)))


def conv(backprop="store", dtype=torch.float64):
    torch.manual_seed(1)
    net = Conv(backprop).to(dtype)
    net.norm.running_mean.uniform_(-0.1, 0.1)
    return net


PICTURES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


def test_fgsm_is_the_sign_of_the_gradient():
    net, x = linear(), torch.rand(6, 3, 4, 4, dtype=torch.float64)
    x[0] = 0  # at the edge: cut to [0, 1]
    wanted = (x + 0.03 * by_hand(net, x, LABELS).sign()).clamp(0, 1)
    torch.testing.assert_close(fgsm(0.03)(net, x, LABELS), wanted)


def test_a_step_in_l2_follows_the_direction_of_the_gradient():
    net, x = linear(), 0.5 + 0.1 * torch.rand(6, 3, 4, 4, dtype=torch.float64)
    g = by_hand(net, x, LABELS)
    wanted = x + 0.2 * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    found = pgd(0.25, steps=1, step_size=0.2, random=False, norm="l2")(net, x, LABELS)
    torch.testing.assert_close(found, wanted)
    tiny = net[1].weight.detach().clone()
    with torch.no_grad():
        net[1].weight.mul_(1e-200)  # squares of the gradient are 0
        net[1].bias.zero_()
    g = (torch.full((6, 5), 0.2, dtype=torch.float64) - F.one_hot(LABELS, 5)) @ tiny
    wanted = x + 0.2 * (g / g.norm(dim=1, keepdim=True)).view_as(x)
    found = pgd(0.25, steps=1, step_size=0.2, random=False, norm="l2")(net, x, LABELS)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_many_steps_are_those_of_a_plain_loop(norm):
    net, x = linear(), torch.rand(6, 3, 4, 4, dtype=torch.float64)
    eps, step_size = (0.05, 0.02) if norm == "linf" else (0.4, 0.15)
    wanted = x.clone()
    for _ in range(7):
        for i in range(len(x)):  # a picture at a time
            g = by_hand(net, wanted[i : i + 1], LABELS[i : i + 1])[0]
            change = wanted[i] + step_size * (g.sign() if norm == "linf" else g / g.norm()) - x[i]
            if norm == "linf":
                change = change.clamp(-eps, eps)
            elif change.norm() > eps:
                change *= eps / change.norm()
            wanted[i] = (x[i] + change).clamp(0, 1)
    assert (wanted != x).any() and ((wanted == 0) | (wanted == 1)).any()
    attack = pgd(eps, steps=7, step_size=step_size, random=False, norm=norm)
    torch.testing.assert_close(attack(net, x, LABELS), wanted)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("random", [True, False])
def test_pgd_stays_in_the_ball_and_raises_the_loss(norm, random):
    net, eps = conv(), {"linf": 0.03, "l2": 0.4}[norm]
    moved = pgd(eps, steps=12, random=random, norm=norm)(net, PICTURES, LABELS)
    far = torch.linalg.vector_norm((moved - PICTURES).flatten(1), float("inf") if norm == "linf" else 2, 1)
    assert float(far.max()) <= eps + 1e-12 and float(far.min()) > 0.5 * eps
    assert float(moved.min()) >= 0 and float(moved.max()) <= 1
    net.eval()
    with torch.no_grad():
        loss = [F.cross_entropy(net(x), LABELS, reduction="none") for x in (PICTURES, moved)]
    assert bool((loss[1] > loss[0]).all())
    if norm == "linf":
        once = F.cross_entropy(net(fgsm(eps)(net, PICTURES, LABELS)), LABELS)
        assert float(loss[1].mean()) >= float(once.detach()) - 1e-9


@pytest.mark.parametrize("backprop", MODES)
def test_every_mode_gives_the_same_attack(backprop):
    for attack in (fgsm(0.03), pgd(0.03, steps=3), pgd(0.4, steps=3, norm="l2")):
        wanted = attack(conv(), PICTURES, LABELS)
        torch.testing.assert_close(attack(conv(backprop), PICTURES, LABELS), wanted, atol=1e-8, rtol=0)


@pytest.mark.parametrize("backprop", ["store", "reverse"])
def test_an_attack_leaves_the_network_and_the_pictures_as_they_were(backprop):
    net, x = conv(backprop), PICTURES.clone()
    net.train()
    net.stack.eval()
    net.head.requires_grad_(False)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    flags = [m.training for m in net.modules()]
    state = torch.random.get_rng_state()
    attacked = pgd(0.03, steps=2)(net, x, LABELS)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert [m.training for m in net.modules()] == flags and torch.equal(x, PICTURES)
    assert all(p.grad is None for p in net.parameters()) and not attacked.requires_grad
    assert torch.equal(state, torch.random.get_rng_state())
    torch.testing.assert_close(attacked, pgd(0.03, steps=2)(conv(backprop).eval(), x, LABELS))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_random_start_is_the_picture_s_own(norm):
    """Of its seed alone; and in the ball, all over it."""
    attack = pgd(0.1, steps=2, norm=norm)
    whole = attack(conv(), PICTURES, LABELS, list(range(10, 16)))
    part = attack(conv(), PICTURES[[4, 1]], LABELS[[4, 1]], [14, 11])
    torch.testing.assert_close(whole[[4, 1]], part, atol=1e-12, rtol=0)
    assert not torch.allclose(whole, attack(conv(), PICTURES, LABELS))
    grey = torch.full((400, 1, 1, 2), 0.5, dtype=torch.float64)
    start = (attack._start(grey, range(400)) - grey).flatten(1)
    size = torch.linalg.vector_norm(start, float("inf") if norm == "linf" else 2, 1) / 0.1
    # Uniform in a ball of two dimensions: the square of the radius is uniform.
    assert float(size.max()) <= 1 + 1e-12 and abs(float((size**2).mean()) - 0.5) < 0.05


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_seeds_are_one_per_picture_and_of_any_kind(kind):
    attack, seeds = pgd(0.1, steps=1), [10, 11, 12, 13, 14, 15]
    assert torch.equal(attack(conv(), PICTURES, LABELS, kind(seeds)), attack(conv(), PICTURES, LABELS, seeds))
    for few in ([10], seeds[:5], [*seeds, 16], []):
        with pytest.raises(SchemeError, match=rf"{len(few)} seeds for 6 pictures\n  Give one for each"):
            attack(conv(), PICTURES, LABELS, kind(few))


def test_attacks_are_read_and_never_evaluated():
    assert read_attack("pgd(eps=8/255, steps=20, step_size=1/255, random=false, norm=l2)") == pgd(
        8 / 255, 20, 1 / 255, False, "l2"
    )
    assert read_attack("fgsm") == fgsm() and read_attack("pgd(4/255)").steps == 10
    for text, said in {
        "pgd(eps=0)": "above 0",
        "pgd(eps=-1/255)": "above 0",
        "pgd(steps=0)": "from 1 on",
        "pgd(steps=1/2)": "from 1 on",
        "pgd(norm=l1)": "l1",
        "pgd(random=3)": "true or false",
        "fgsm(steps=3)": "fgsm",
        "cw": "no 'cw'",
        "__import__('os')": "no '__import__'",
        "3": "want fgsm",
    }.items():
        with pytest.raises(SchemeError, match=said):
            read_attack(text)


def test_pictures_outside_of_0_to_1_and_broken_networks_are_refused():
    with pytest.raises(SchemeError, match=r"\[0, 1\]"):
        fgsm()(linear(), torch.full((1, 3, 4, 4), 1.5, dtype=torch.float64), LABELS[:1])
    with pytest.raises(SchemeError, match=r"\[0, 1\]"):
        fgsm()(linear(), torch.zeros(1, 3, 4, 4, dtype=torch.uint8), LABELS[:1])
    with pytest.raises(SchemeError, match=r"\[0, 1\]"):
        fgsm()(linear(), torch.full((1, 3, 4, 4), float("nan"), dtype=torch.float64), LABELS[:1])
    with pytest.raises(SchemeError, match="one for each of 2 pictures"):
        fgsm()(linear(), torch.rand(2, 3, 4, 4, dtype=torch.float64), LABELS[:1])
    assert pgd()(linear(), torch.rand(0, 3, 4, 4, dtype=torch.float64), LABELS[:0]).shape == (0, 3, 4, 4)
    net = linear()
    with torch.no_grad():
        net[1].weight[0, 0] = float("nan")
    with pytest.raises(SchemeError, match="not finite"):
        fgsm()(net, torch.rand(1, 3, 4, 4, dtype=torch.float64), LABELS[:1])
