"""Rates that decay from layer to layer, and parts that stay frozen: held against calculations of their own."""

from functools import partial

import pytest
import torch
from torch import nn

from odenets import create_model
from odenets.models.depth import parameter_depths
from odenets.training import Classifier, SupervisedClassifier
from odenets.training.groups import Frozen, group_rows, parameter_groups, table_of_groups
from odenets.training.schedules import OneCycle, Schedule, WarmupCosine
from schemes import SchemeError

SMALL = {"resnet20": {}, "convnext_tiny": {"functions": (1, 1, 5, 1), "widths": (4, 8, 8, 8), "kernel": 3}}
SMALL |= {"revcol_tiny": {"channels": (4, 8), "blocks": (1, 2), "columns": 3}}
adamw = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.3)


def small(name, **options):
    return create_model(name, num_classes=3, **SMALL[name], **options)


def rates(net, optimizer):
    """Learning rate and weight decay of each parameter by its name; none stands in two groups."""
    names = {id(p): name for name, p in net.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert names[id(p)] not in found
            found[names[id(p)]] = group["lr"], group["weight_decay"]
    return found


@pytest.mark.parametrize("name", SMALL)
def test_each_parameter_has_the_rate_of_its_depth(name):
    net = small(name)
    module = Classifier(net, adamw, layer_decay=0.7)
    found, depths = rates(net, module.make_optimizer()), parameter_depths(net)
    assert found.keys() == depths.keys()
    for key, p in net.named_parameters():
        lr, decay = found[key]
        assert lr == pytest.approx(0.1 * 0.7 ** (max(depths.values()) - depths[key])), key
        assert decay == (0.3 if p.ndim > 1 else 0.0), key


class Table(nn.Module):
    """A table of positions beside a weight, as timm's networks name them."""

    def __init__(self):
        super().__init__()
        self.pos_embed, self.head = nn.Parameter(torch.zeros(1, 4, 8)), nn.Linear(8, 2)

    def no_weight_decay(self):
        return {"pos_embed"}


@pytest.mark.parametrize(
    ("net", "named"),
    [
        (lambda: create_model("vit_small_patch16", depth=1, dim=8, heads=2), {"stem.positions", "stem.class_token"}),
        (Table, {"pos_embed"}),
        (lambda: nn.Sequential(Table()), {"0.pos_embed"}),
        (lambda: small("revcol_tiny"), set()),  # whose published training lets factors of channels decay
    ],
)
def test_what_a_network_names_does_not_decay(net, named):
    net = net()
    found = rates(net, adamw(parameter_groups(net)))
    undecayed = {name for name, (_, decay) in found.items() if not decay}
    assert undecayed == named | {name for name, p in net.named_parameters() if p.ndim <= 1}


def test_without_a_decay_the_groups_are_those_of_before():
    net = small("resnet20", step="learned")
    optimizer = Classifier(net, adamw, step_weight_decay=0.2).make_optimizer()
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0, 0.2]
    assert all(g["lr"] == 0.1 and "lr_scale" not in g for g in optimizer.param_groups)


@pytest.mark.parametrize("schedule", [WarmupCosine(warmup=2), OneCycle()])
def test_schedules_move_every_group_by_its_share(schedule):
    net = small("resnet20")
    optimizer = Classifier(net, partial(torch.optim.SGD, lr=0.1, momentum=0.9), layer_decay=0.5).make_optimizer()
    scheduler = schedule(optimizer, 10, 2)
    for _ in range(6):
        lr = optimizer.param_groups[0]["lr"]
        for group in optimizer.param_groups:
            # OneCycle begins and ends at fixed shares of each peak.
            assert group["lr"] == pytest.approx(lr * group["lr_scale"])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("kind", Schedule.__subclasses__())
@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, lr=0.1, momentum=0.9), adamw])
def test_schedules_leave_groups_alone_that_a_callback_adds(kind, optimizer):
    """As `BackboneFinetuning` adds one: the others move as they would without it, and so does one that goes on."""
    found = []
    for add in (False, True):
        made = optimizer([nn.Parameter(torch.ones(2))])
        scheduler, seen = kind()(made, 8, 2), []
        for i in range(8):
            if add and i == 3:
                made.add_param_group({"params": [nn.Parameter(torch.ones(3))], "lr": 0.7})
                own = dict(made.param_groups[1])
                # A resumed run makes its schedule before the callback adds its groups.
                again = kind()(optimizer([nn.Parameter(torch.ones(2))]), 8, 2)
                again.optimizer.add_param_group(dict(own))
                again.load_state_dict(scheduler.state_dict())
            seen.append({k: v for k, v in made.param_groups[0].items() if k != "params"})
            made.step()
            scheduler.step()
            if add and i >= 3:
                again.optimizer.step()
                again.step()
        found.append(seen)
    assert found[0] == found[1]
    for group in (made.param_groups[1], again.optimizer.param_groups[1]):
        assert group == own
    assert again.get_last_lr() == scheduler.get_last_lr()


@pytest.mark.parametrize("decay", [0.0, -1.0, 1.5, float("nan")])
def test_a_decay_that_is_none_is_refused_when_the_module_is_built(decay):
    with pytest.raises(SchemeError, match="layer_decay is"):
        Classifier(small("resnet20"), adamw, layer_decay=decay)


def test_a_net_without_depths_is_refused_when_the_module_is_built():
    with pytest.raises(SchemeError, match="does not say how deep"):
        Classifier(nn.Linear(2, 2), adamw, layer_decay=0.5)
    Classifier(nn.Linear(2, 2), adamw)


@pytest.mark.parametrize(
    ("patterns", "trained"),
    [
        ([], lambda key: True),
        (["stem"], lambda key: not key.startswith("stem.")),
        (["*", "!head"], lambda key: key.startswith("head.")),
        (["levels.[01]"], lambda key: not key.startswith(("levels.0.", "levels.1."))),
        (["*.bias"], lambda key: not key.endswith(".bias")),
        (["levels", "!levels.*.norm1"], lambda key: ".norm1." in key or not key.startswith("levels.")),
        (["!head", "*", "!head.bias"], lambda key: key == "head.bias"),
    ],
)
def test_patterns_freeze_parts_and_take_them_out_again(patterns, trained):
    net = small("resnet20")
    module = Classifier(net, adamw, frozen=patterns)
    assert {k for k, p in net.named_parameters() if p.requires_grad} == {
        k for k, _ in net.named_parameters() if trained(k)
    }
    assert rates(net, module.make_optimizer()).keys() == {k for k, _ in net.named_parameters() if trained(k)}


def test_a_pattern_of_nothing_and_a_frozen_whole_are_refused():
    with pytest.raises(SchemeError, match=r"'levls.0' is no part of ResNet\n  Closest: levels\.0"):
        Classifier(small("resnet20"), adamw, frozen=["levls.0"])
    with pytest.raises(SchemeError, match=r"'qqq' is no part.*\n  Its parts: stem, "):
        Frozen(small("resnet20"), ["qqq"])
    with pytest.raises(SchemeError, match="nothing to train"):
        Classifier(small("resnet20"), adamw, frozen=["*"])


@pytest.mark.parametrize("backprop", ["store", "checkpoint"])
def test_frozen_parts_neither_learn_nor_move_their_statistics(backprop):
    net = small("resnet20", backprop=backprop)
    module = Classifier(net, adamw, frozen=["stem", "levels.0", "levels.1"])
    frozen = ("stem.", "levels.0.", "levels.1.")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    optimizer = module.make_optimizer()
    for mode in (True, False, True):  # as an epoch is followed by validation, and by the next epoch
        module.train(mode)
        for _ in range(2 if mode else 0):
            optimizer.zero_grad()
            net(torch.randn(4, 3, 8, 8)).square().mean().backward()
            optimizer.step()
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith(frozen), key
    assert not net.stem.norm.training and net.levels[2].steps[0].fs[0].norm1.training
    # Frozen parts may end before the first that learns, or lie after it.
    assert Classifier(small("resnet20"), adamw, frozen=["levels.1"]).net.levels[0].steps[0].fs[0].norm1.training


@pytest.mark.parametrize("frozen", [["stem"], ["columns.steps.0"], ["columns.steps.1"], ["*", "!head"]])
def test_reversed_training_of_the_rest_has_the_stored_gradients(frozen):
    x, y = torch.randn(2, 3, 16, 16), torch.tensor([0, 2])
    found = []
    for backprop in ("store", "reverse"):
        torch.manual_seed(0)
        net = small("revcol_tiny", backprop=backprop)
        Classifier(net, adamw, frozen=frozen)
        nn.functional.cross_entropy(net(x), y).backward()
        found.append({k: p.grad for k, p in net.named_parameters()})
    stored, reverse = found
    assert {k for k, g in stored.items() if g is not None} == {k for k, g in reverse.items() if g is not None}
    for key, gradient in stored.items():
        if gradient is not None:
            torch.testing.assert_close(reverse[key], gradient, rtol=1e-3, atol=1e-5)


def test_the_backbone_is_all_but_the_head():
    for name, kind, options in (
        ("resnet20", Classifier, {}),
        ("revcol_tiny", SupervisedClassifier, {"supervision": True}),
    ):
        net = small(name, **options)
        backbone = kind(net=net, optimizer=adamw).backbone
        own = {id(p) for p in backbone.parameters()}
        head = {k for k, p in net.named_parameters() if id(p) not in own}
        assert head == {k for k, _ in net.named_parameters() if k.startswith(("head.", "supervision."))}
    assert not hasattr(Classifier(nn.Sequential(nn.Linear(2, 2)), adamw), "backbone")


def test_rows_say_what_each_group_is():
    net = small("resnet20")
    module = Classifier(net, adamw, layer_decay=0.5)
    rows = group_rows(net, module.make_optimizer())
    assert sum(row["parameters"] for row in rows) == sum(p.numel() for p in net.parameters())
    assert (rows[0]["parts"] == ["head"] and rows[-1]["parts"] == ["stem.conv"]) or rows[-1]["parts"][0].startswith(
        "stem"
    )
    assert len(rows) == len(parameter_groups(net, layer_decay=0.5))
    lines = table_of_groups(rows).splitlines()
    assert lines[0].split()[:3] == ["depth", "scale", "lr"] and len(lines) == len(rows) + 1
    assert lines[1].split()[:3] == ["10", "1", "0.1"] and lines[-1].split()[0] == "0"
