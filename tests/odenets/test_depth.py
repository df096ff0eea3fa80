"""How deep parameters lie: every one has a depth, in the order of the pass, and the published ones where there are."""

import functools
import re

import pytest
import torch
from test_every_model import build, families, pictures, shared
from torch import nn

from odenets import create_model
from odenets.models import RevNet
from odenets.models.depth import grid_depths, matched_depths, parameter_depths
from schemes import SchemeError

every_family = pytest.mark.parametrize("name", list(families().values()), ids=list(families()))


@functools.cache
def meta(name, **options):
    with torch.device("meta"):
        return create_model(name, **options)


@every_family
def test_every_parameter_has_one_depth_and_no_depth_is_empty(name):
    net = shared(name)
    found = parameter_depths(net)
    assert found.keys() == dict(net.named_parameters()).keys()
    depths = sorted(set(found.values()))
    # Without parameters in its stem a network begins at 1.
    assert depths == list(range(depths[0], depths[-1] + 1)) and depths[0] == (0 if "stem" in str(found) else 1)
    head = {at for key, at in found.items() if key.startswith("head")}
    assert head == {depths[-1]}
    assert {at for key, at in found.items() if key.startswith("stem.")} <= {0}


@every_family
def test_depths_rise_along_the_pass(name):
    """Parts are run in the order of their depths: the whole network's, or a column's where columns make a grid."""
    net = shared(name)
    found = parameter_depths(net)
    runs: dict[str, list[int]] = {}

    def note(key):
        column = m[0] if (m := re.match(r"columns\.steps\.\d+\.fs", key)) else ""
        # Factors of a column lie at its first block, and are used after each of them.
        own = [found[f"{key}.{p}"] for p, _ in net.get_submodule(key).named_parameters(recurse=False)]
        return lambda *_: runs.setdefault(column, []).extend(own)

    hooks = [
        m.register_forward_hook(note(key))
        for key, m in net.named_modules()
        if next(m.parameters(recurse=False), None) is not None and ".gs." not in key and not key.startswith("idle")
    ]
    with torch.no_grad():
        net(pictures(name))
    for hook in hooks:
        hook.remove()
    whole = [depth for key, run in runs.items() if key for depth in run] or runs[""]
    assert len(whole) > 4
    for key, run in runs.items():
        assert run == sorted(run), (key, run)


def recurrence(blocks, columns):
    """The published table: the shortest way from the first block of the first column, by recurrence."""
    table = [[0] * columns for _ in range(blocks)]
    for b in range(blocks):
        for c in range(columns):
            before = ([table[b - 1][c]] if b else []) + ([table[b][c - 1]] if c else [])
            table[b][c] = min(before) + 1 if before else 0
    return table


@pytest.mark.parametrize("name", ["revcol_tiny", "revcol_base", "revcol_huge", "revcol_vit_small"])
def test_revcol_has_the_published_depths(name):
    net = meta(name)
    blocks, columns = net.blocks, len(net.columns.steps)
    table, found = recurrence(sum(blocks), columns), parameter_depths(net)
    per_block = 2 if "vit" in name else 1
    for key, depth in found.items():
        if m := re.match(r"columns\.steps\.(\d+)\.fs\.(\d+)\.(down|up|blocks\.(\d+))", key):
            inside = int(m[4]) // per_block if m[4] else 0
            assert depth == table[sum(blocks[: int(m[2])]) + inside][int(m[1])] + 1, key
        elif m := re.match(r"columns\.steps\.(\d+)\.gs", key):
            assert depth == table[0][int(m[1])] + 1, key
        else:
            assert depth == {"stem": 0, "idle": 1, "head": table[-1][-1] + 2}[key.split(".")[0]], key


def test_convnext_base_has_the_published_groups():
    def published(key):
        if m := re.match(r"levels\.(\d)\.steps\.(\d+)", key):
            level, block = int(m[1]), int(m[2])
            return {0: 1, 1: 2, 2: 3 + block // 3, 3: 12}[level]
        if m := re.match(r"transitions\.(\d)", key):
            return {1: 2, 2: 3, 3: 12}[int(m[1])]
        return 0 if key.startswith("stem") else 13

    found = parameter_depths(meta("convnext_base"))
    assert found == {key: published(key) for key in found}


@pytest.mark.parametrize("scheme", ["euler", "midpoint", "nested(midpoint, repeat(euler, 2))", "rk4"])
def test_attention_and_perceptron_of_a_block_lie_together(scheme):
    net = meta("vit_tiny_patch16", scheme=scheme)
    stages = len(net.levels[0].steps[0].fs)
    for key, depth in parameter_depths(net).items():
        if m := re.match(r"levels\.0\.steps\.(\d+)", key):
            assert depth == 1 + int(m[1]) // max(1, 2 // stages), key


@pytest.mark.parametrize("units", [(1,), (1, 1), (2, 1), (1, 2, 1), (3, 1, 1, 2)])
def test_a_level_without_parameters_has_no_depth(units):
    found = parameter_depths(RevNet(units=units, widths=(8,) * (len(units) + 1)))
    assert sorted(set(found.values())) == list(range(sum(units) + 2))
    ends = [sum(units[:level]) for level in range(len(units))]
    assert [found[f"transitions.{level}.steps.0.fs.1.conv2.weight"] for level in range(len(units))] == [
        end + 1 for end in ends
    ]


def test_a_revnets_first_unit_is_a_step_of_its_own():
    found = parameter_depths(meta("revnet38"))
    assert max(found.values()) == 1 + 3 * 3
    assert [found[f"transitions.{level}.steps.0.fs.1.conv2.weight"] for level in range(3)] == [1, 4, 7]


@pytest.mark.parametrize("name", ["resnet20", "convnext_tiny", "revnet38"])
def test_weights_that_are_functions_of_depth_lie_together(name):
    found = parameter_depths(build(name, continuous=3) if name == "resnet20" else create_model(name, continuous=3))
    levels = {key.split(".")[1]: depth for key, depth in found.items() if key.startswith("levels.")}
    assert all(depth == levels[key.split(".")[1]] for key, depth in found.items() if key.startswith("levels."))
    assert list(levels.values()) == sorted(set(levels.values()))


class Foreign(nn.Module):
    """A network as timm writes them."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.fc = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
        self.blocks = nn.ModuleList(nn.Linear(1, 1) for _ in range(11))

    def group_matcher(self, coarse=False):
        return {"stem": r"^stem", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}


def test_networks_of_timm_say_it_by_patterns_and_others_are_refused():
    found = parameter_depths(Foreign())
    assert found["stem.bias"] == 0 and [found[f"blocks.{i}.weight"] for i in range(11)] == list(range(1, 12))
    assert found["norm.weight"] == 11 and found["fc.weight"] == 12
    with pytest.raises(SchemeError, match=r"Linear does not say how deep.*\n.*group_matcher"):
        parameter_depths(nn.Linear(1, 1))


def test_patterns_and_depths_of_ours_agree_on_the_order():
    net = meta("resnet20")
    assert matched_depths(net, net.group_matcher()).keys() == parameter_depths(net).keys()
    with pytest.raises(AttributeError):
        grid_depths(net, [1])
