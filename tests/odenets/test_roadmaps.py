"""The roadmaps: every step has the published size, runs, and ends where the models begin."""

import copy
from itertools import pairwise

import pytest
import torch
from counting import gmacs, meta, parameters
from torch import nn

from odenets.layers import DropPath, LayerNorm2d, ModernFunction, linear_rates
from odenets.models import roadmap
from schemes import SchemeError

# 10^9 multiply-adds of every step as published, but for the last two, where the paper prints 4.46 and 4.49: the change
# from BatchNorm to LayerNorm moves no multiply-add, and the last step has those of ConvNeXt-T.
RESNET50 = [4.09, 4.09, 4.53, 4.42, 2.35, 5.27, 4.64, 4.07, 4.10, 4.15, 4.21, 4.29, 4.15, 4.15, 4.15, 4.15, 4.456]
RESNET200 = {1: 15.01, 2: 15.01, 3: 14.52, 4: 14.38, 5: 7.23, 6: 16.76, 7: 15.68, 8: 14.63, 17: 15.35}
# Parameters in 10^6 and 10^9 multiply-adds, to three digits; rounded, they are the paper's table 1.
RDNET = {
    "a": (20.014, 4.291),
    "b": (21.824, 11.057),
    "c": (12.897, 4.747),
    "d": (19.856, 4.721),
    "e": (21.283, 4.990),
    "f": (21.277, 4.888),
    "g": (22.471, 4.888),
    "h": (23.863, 5.033),
}


def on_meta(build, *args, **kwargs):
    with torch.device("meta"):
        return build(*args, **kwargs)


@pytest.mark.cases(2)
@pytest.mark.parametrize("number", range(1, 18))
def test_steps_from_resnet50_cost_what_was_published(number):
    row = roadmap.CONVNEXT["resnet50"][number - 1]
    found = gmacs(on_meta(roadmap.convnext, number), 224)
    assert found == pytest.approx(RESNET50[number - 1], abs=5e-3 if number < 17 else 5e-4)
    if number <= 15:
        assert row.gflops == RESNET50[number - 1]
    else:
        assert row.gflops == {16: 4.46, 17: 4.49}[number]


@pytest.mark.long
@pytest.mark.parametrize("number", RESNET200)
def test_steps_from_resnet200_cost_what_was_published(number):
    row = roadmap.CONVNEXT["resnet200"][number - 1]
    found = gmacs(on_meta(roadmap.convnext, number, "resnet200"), 224)
    assert row.gflops == RESNET200[number] == pytest.approx(found, abs=5.1e-3)


@pytest.mark.long
@pytest.mark.parametrize("step", RDNET)
def test_steps_from_densenet_have_the_published_sizes(step):
    net = on_meta(roadmap.rdnet, step)
    row = next(r for r in roadmap.RDNET if r.name == step)
    count, cost = parameters(net) / 1e6, gmacs(net, 224)
    assert (round(count, 3), round(cost, 3)) == RDNET[step]
    # The paper prints one digit, and cuts or rounds it by turns.
    assert count == pytest.approx(roadmap.RDNET_PARAMETERS["abcdefgh".index(step)], abs=0.1)
    assert cost == pytest.approx(row.gflops, abs=0.06)


@pytest.mark.cases(1)
@pytest.mark.parametrize(("base", "name"), [("resnet50", "convnext_tiny"), ("resnet200", "convnext_base")])
def test_the_last_step_is_convnext_but_for_gamma(base, name):
    net, whole = on_meta(roadmap.convnext, "separate", base), meta(name)
    gammas = sum(p.numel() for key, p in whole.named_parameters() if key.endswith("gamma"))
    assert parameters(net) == parameters(whole) - gammas
    assert gmacs(net, 224) == gmacs(whole, 224)


@pytest.mark.long
def test_the_first_step_is_resnet50_and_the_last_ones_are_densenet201_and_rdnet():
    assert parameters(on_meta(roadmap.convnext, "resnet")) == parameters(meta("resnet50"))
    assert parameters(on_meta(roadmap.rdnet, "a")) == parameters(meta("densenet201"))
    assert parameters(on_meta(roadmap.rdnet, 8)) == parameters(meta("rdnet_tiny"))


def test_neighbouring_steps_differ_by_one_change():
    rows = roadmap.CONVNEXT["resnet50"]
    for before, after in pairwise(rows[1:]):
        changed = {k for k, v in vars(after.design).items() if v != getattr(before.design, k)}
        assert len(changed) == 1 or (after.name == "gelu" and changed == {"act", "kernel"})
    assert len(rows) == 17 and len({row.name for row in rows}) == 17


SMALL = {"functions": (2, 2), "width": 8}


@pytest.mark.parametrize("number", range(3, 18))
def test_every_step_runs_under_euler_and_midpoint_and_trains(number):
    design = roadmap.CONVNEXT["resnet50"][number - 1].design
    small = roadmap.replace(design, **SMALL)
    for scheme in ("euler", "midpoint"):
        net = roadmap.ModernNet(small, scheme=scheme, num_classes=5)
        net(torch.randn(2, 3, 32, 32)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_what_the_steps_are_made_of():
    def kinds(name):
        net = on_meta(roadmap.convnext, name)
        f = net.levels[1].steps[1].fs[0]
        return [type(m) for m in f.layers], net.levels[0].after

    conv, bn, relu, gelu = nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.GELU
    assert kinds("move_up")[0] == [conv, bn, relu, conv, bn, relu, conv, bn]
    assert kinds("gelu")[0] == [conv, bn, gelu, conv, bn, gelu, conv, bn]
    assert kinds("fewer_activations")[0] == [conv, bn, conv, bn, gelu, conv, bn]
    assert kinds("fewer_norms")[0] == [conv, bn, conv, gelu, conv]
    assert kinds("layer_norm")[0] == [conv, LayerNorm2d, conv, gelu, conv]
    assert isinstance(kinds("gelu")[1], gelu) and kinds("fewer_activations")[1] is None
    net = on_meta(roadmap.convnext, "move_up")
    assert net.levels[1].steps[0].fs[0].layers[0].stride == (2, 2)
    assert ModernFunction(8, 16, 2)(torch.randn(1, 8, 8, 8)).shape == (1, 16, 4, 4)


def test_mixers_run_and_train():
    design = roadmap.RDNET[4].design
    small = roadmap.replace(design, growths=(8, 8), functions=(2, 2), downsample=(False, True), init=16)
    for changes in ({}, {"from_input": False}, {"patch": True}, {"patch": True, "strided": True}):
        net = roadmap.MixerNet(roadmap.replace(small, **changes), num_classes=5)
        net(torch.randn(2, 3, 32, 32)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.long
@pytest.mark.parametrize("build", [roadmap.convnext, roadmap.rdnet])
def test_every_step_takes_stochastic_depth_and_gamma(build):
    rows = roadmap.CONVNEXT["resnet50"] if build is roadmap.convnext else roadmap.RDNET
    for row in rows:
        net = on_meta(build, row.name, drop_path_rate=0.3, layer_scale=1e-6)
        fs = [f for level in net.levels for step in level.steps for f in step.fs]
        rates = [m.p for m in net.modules() if isinstance(m, DropPath)]
        # The first function is never dropped, and every function has a gamma of as many channels as it gives.
        assert rates == pytest.approx(linear_rates(0.3, len(fs))[1:])
        assert all(f.gamma is not None for f in fs)
        plain = {k for k in net.state_dict() if not k.endswith("gamma")}
        bare = on_meta(build, row.name, layer_scale=None)
        assert plain == bare.state_dict().keys()


def test_gamma_multiplies_what_a_modern_function_gives():
    f, plain = ModernFunction(8, 16, layer_scale=0.25).eval(), ModernFunction(8, 16).eval()
    plain.load_state_dict({k: v for k, v in f.state_dict().items() if k != "gamma"})
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(f(x), 0.25 * plain(x))


def test_unknown_steps_are_named():
    with pytest.raises(SchemeError, match=r"step is 'x', want a number from 1 to 8 or one of a, b"):
        roadmap.rdnet("x")
    with pytest.raises(SchemeError, match="number from 1 to 17"):
        roadmap.convnext(18)
    with pytest.raises(SchemeError, match="want resnet50 or resnet200"):
        roadmap.convnext(1, "resnet18")


@pytest.mark.parametrize("scheme", ["euler", "midpoint", "leapfrog", "ab2", "bdia", "momentum(9/10)", "lm_resnet(1/2)"])
@pytest.mark.parametrize("training", [True, False])
def test_the_relu_between_steps_overwrites_nothing_that_a_scheme_keeps(scheme, training):
    """The same values and gradients as with a ReLU that overwrites nothing."""
    net = roadmap.ModernNet(roadmap.Design((4,), width=8, inverted=True), scheme=scheme, num_classes=3).train(training)
    other = copy.deepcopy(net)
    for m in other.levels.modules():
        if isinstance(m, nn.ReLU):
            m.inplace = False
    x = torch.randn(2, 3, 32, 32)
    values = []
    for each in (net, other):
        torch.manual_seed(0)
        each(x).square().sum().backward()
        values.append([p.grad for p in each.parameters()])
    torch.testing.assert_close(*values)
