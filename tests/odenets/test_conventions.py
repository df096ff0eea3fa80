"""What users of timm call on any network works on every family, without timm."""

import copy
import math
import re

import pytest
import torch
from test_every_model import build, families, pictures, shared, step

from odenets import Stack
from odenets.models import DenseNet, create_model, roadmap
from odenets.models.feature_info import FeatureInfo, chosen
from odenets.training.groups import parameter_groups
from schemes import SchemeError

pytestmark = pytest.mark.cases(4)
every_family = pytest.mark.parametrize("name", list(families().values()), ids=list(families()))


@every_family
def test_the_first_convolution_and_the_classifier_have_names(name):
    net = shared(name)
    head = net.get_submodule(net.classifier)
    assert isinstance(head, torch.nn.Linear) and head.out_features == net.num_classes
    others = [key for key, m in net.named_modules() if isinstance(m, torch.nn.Conv2d) and m.in_channels == net.in_chans]
    assert net.first_conv in others if net.first_conv else not others


@every_family
def test_feature_info_is_asked_as_timms(name):
    info = shared(name).feature_info
    assert info.channels() == [row["num_chs"] for row in info] and info.channels(-1) == shared(name).num_features
    assert info.reduction([0]) == [info[0]["reduction"]] and info.module_name(0) == info[0]["module"]


@every_family
def test_intermediates_are_the_maps_and_the_features(name):
    net, x = shared(name), pictures(name, 2, 2, 3)
    with torch.no_grad():
        features, maps = net.forward_features(x), net.maps(x)
        y, found = net.forward_intermediates(x)
        assert torch.equal(y, features) and len(found) == len(net.feature_info)
        wanted = [maps[int(row.get("map", row["module"].rpartition(".")[2]))] for row in net.feature_info]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        for indices, rows in ((1, [-1]), ([0], [0]), ((0, -1), [0, -1])):
            for early in (False, True):
                some = net.forward_intermediates(x, indices, stop_early=early, intermediates_only=True)
                assert [torch.equal(a, wanted[i]) for a, i in zip(some, rows, strict=True)] == [True] * len(rows)
        z, (first,) = net.forward_intermediates(x, [0], stop_early=True)
        assert torch.equal(first, wanted[0]) and (torch.equal(z, first) or len(wanted) == 1)
        flat = net.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
        assert all(torch.equal(a, b.flatten(2).mT) for a, b in zip(flat, wanted, strict=True))
        *others, last = net.forward_intermediates(x, norm=True, intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(others, wanted, strict=False))
        tokens = last.flatten(2).mT if features.dim() == 3 else last
        assert torch.equal(tokens, features[:, -tokens.shape[1] :] if features.dim() == 3 else features)
    for wrong in ([7], 0, [-9], 9):
        with pytest.raises(SchemeError, match="want numbers from 0 to"):
            net.forward_intermediates(x, wrong)
    with pytest.raises(SchemeError, match="output_fmt"):
        net.forward_intermediates(x, output_fmt="NHWC")


@every_family
@pytest.mark.parametrize("indices", [[0], 1, (0, -1)])
def test_a_pruned_network_gives_the_same_maps(name, indices):
    net, x = copy.deepcopy(shared(name)), pictures(name)
    with torch.no_grad():
        want = net.forward_intermediates(x, indices, intermediates_only=True)
        rows = net.prune_intermediate_layers(indices, prune_norm=True)
        assert rows == chosen(indices, len(shared(name).feature_info))
        got = net.forward_intermediates(x, rows, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert net.num_classes == 0 and got[-1].shape[1] == net.feature_info.channels(-1)
    sum(m.square().mean() for m in net.train().forward_intermediates(x, rows, intermediates_only=True)).backward()


@every_family
@pytest.mark.parametrize("indices", [[0], 1])
def test_a_pruned_network_takes_pictures_and_a_head_that_fit_its_features(name, indices):
    net = build(name, pad=True).eval()
    net.prune_intermediate_layers(indices, prune_norm=True)
    x = pictures(name)[:, :, 1:, 2:]
    with torch.no_grad():
        y = net.forward_features(x)
        assert (y.shape[1] if y.dim() == 4 else y.shape[2]) == net.num_features == net.head_hidden_size
        if y.dim() == 4:
            assert y.shape[2:] == tuple(-(-side // net.reduction) for side in x.shape[2:])
        net.reset_classifier(3)
        assert net(x).shape == (2, 3)


@every_family
def test_checkpointing_is_switched_and_changes_no_gradient(name):
    def run(enable):
        net = build(name)
        net.load_state_dict(shared(name).state_dict())
        if enable:
            net.set_grad_checkpointing()
        modes = {str(m.backprop) for m in net.modules() if isinstance(m, Stack)}
        y = step(net, pictures(name, 2))
        net.set_grad_checkpointing(False)
        assert {str(m.backprop) for m in net.modules() if isinstance(m, Stack)} <= {"store"}
        return modes, y, torch.cat([p.grad.flatten() for p in net.parameters()])

    (plain, y, want), (modes, z, got) = run(False), run(True)
    assert modes == ({"checkpoint"} if plain else set())
    torch.testing.assert_close(z, y)
    assert (got - want).norm() <= 1e-5 * want.norm()


def test_checkpointing_leaves_modes_that_keep_less():
    net = build(families()["RevCol"], backprop="reverse")
    net.set_grad_checkpointing()
    assert str(net.columns.backprop) == "reverse"


def depths(net, coarse):
    """The place of each parameter in depth, read from the patterns as timm reads them."""
    found = {}
    for name, _ in net.named_parameters():
        for place, (_, spec) in enumerate(net.group_matcher(coarse).items()):
            for pattern, suffix in [(spec, None)] if isinstance(spec, str) else spec:
                if name not in found and (match := re.match(pattern, name)):
                    found[name] = tuple(float(v) for v in (place, *match.groups(), *(suffix or ())))
        found.setdefault(name, (math.inf,))
    return found


@every_family
def test_groups_of_parameters_follow_the_depth(name):
    net = shared(name)
    for coarse in (True, False):
        found = depths(net, coarse)
        for key, at in found.items():
            if key.startswith("head."):
                assert at == (math.inf,), key
            elif key.startswith(("stem.", "idle.")):
                assert at == (0.0,), key
            else:
                assert at[0] == 1.0, key
        order = sorted(set(found.values()))
        # A level, a step: what is run later stands in a later group. Transitions are registered after levels.
        steps = [at for key, at in found.items() if key.startswith(("levels.", "columns."))]
        assert len(set(steps)) == len({s[:2] for s in steps}) if coarse else len(set(steps)) >= len(net.feature_info)
        for key, at in found.items():
            if key.startswith("transitions."):
                level = float(key.split(".")[1])
                inside = [s for s in steps if s[1] == level]
                assert all(at <= s for s in inside) and all(at > s for s in steps if s[1] < level), key
        assert len(order) > 2


@every_family
def test_parameters_without_weight_decay_exist_and_are_no_weights(name):
    net = shared(name)
    names, parameters = net.no_weight_decay(), dict(net.named_parameters())
    assert names <= parameters.keys()
    assert not any(key.endswith(("weight", "bias")) for key in names)
    # All that is neither a vector nor named a weight.
    assert {k for k, p in parameters.items() if p.ndim > 1 and not k.endswith("weight")} <= names


@pytest.mark.parametrize(
    "build",
    [
        lambda: DenseNet((2, 2), 4, num_classes=3, stem="conv3", layer_scale=0.1),
        lambda: roadmap.convnext("separate", layer_scale=1e-6),
        lambda: create_model("convnext_tiny", functions=(1, 1), widths=(8, 16)),
        lambda: create_model("convnext_tiny", functions=(2, 2), widths=(8, 16), continuous=2, layer_scale=1e-6),
        lambda: create_model("rdnet_tiny", growths=(8, 16), downsample=(False, True), init_channels=16),
        lambda: create_model("revcol_tiny", channels=(8, 16), blocks=(1, 1), columns=2),
    ],
)
def test_factors_of_channels_do_not_decay_whatever_their_shape(build):
    with torch.device("meta"):
        net = build()
    found = {k for k, p in net.named_parameters() if k.endswith((".gamma", ".alpha"))}
    assert found and found <= net.no_weight_decay()
    decay = {id(p): group.get("weight_decay") for group in parameter_groups(net) for p in group["params"]}
    # RevCol's alpha decays, as in its published training.
    assert {decay[id(p)] for k, p in net.named_parameters() if k.endswith(".gamma")} == {0.0}


def test_a_list_of_rows():
    info = FeatureInfo([{"num_chs": 1, "reduction": 2, "module": "a"}, {"num_chs": 3, "reduction": 4, "module": "b"}])
    assert info.channels((1, 0)) == [3, 1] and copy.deepcopy(info) == info and isinstance(info, list)
