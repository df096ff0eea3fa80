"""Mean absolute weights against slices written out by hand, in every family."""

import pytest
import torch
from torch import nn

from odenets import Stack, create_model
from odenets.analysis import places, weight_maps
from odenets.models import DenseNet, RevCol
from schemes import SchemeError


@pytest.mark.parametrize("bottleneck", [0, 4])
def test_sources_of_densenet_are_slices_of_its_convolutions(bottleneck):
    net = DenseNet([2, 3], growth=4, init_channels=6, bottleneck=bottleneck, stem="conv3", num_classes=5)
    first, last = weight_maps(net)
    assert (first.name, last.name) == ("levels.0", "levels.1")
    assert first.columns == ("1", "2", "transition") and last.columns == ("1", "2", "3", "head")
    for level, found, begin, reader in (
        (0, first, 6, net.transitions[1].conv.weight),
        (1, last, 7, net.head.weight),
    ):
        convs = [step.fs[0].conv1.weight for step in net.levels[level].steps]
        for column, weight in enumerate([w.detach() for w in (*convs, reader)]):
            assert weight.shape[1] == begin + 4 * column
            for row in range(len(convs) + 1):
                low, high = (0, begin) if row == 0 else (begin + 4 * (row - 1), begin + 4 * row)
                value = found.values[row, column]
                if row <= column:
                    assert float(value) == pytest.approx(float(weight[:, low:high].abs().mean()), rel=1e-6)
                else:
                    assert value.isnan()


def test_sources_of_rdnet_are_read_by_the_pointwise_layer():
    net = create_model("rdnet_tiny", init_channels=8, growths=(8,) * 7, num_classes=3)
    maps = weight_maps(net)
    assert [m.name for m in maps] == [f"levels.{level}" for level in range(7)]
    weight = net.levels[1].steps[2].fs[0].fc1.weight.detach()
    width = weight.shape[1] - 16
    want = [weight[:, :width], weight[:, width : width + 8], weight[:, width + 8 :]]
    found = maps[1].values[:, 2]
    assert found[:3].tolist() == pytest.approx([float(w.abs().mean()) for w in want], rel=1e-6) and found[3].isnan()
    nn.init.zeros_(net.levels[1].steps[2].fs[0].dwconv.weight)
    torch.testing.assert_close(weight_maps(net)[1].values[:, 2], found, equal_nan=True)


def test_columns_show_their_alphas_and_the_first_has_none():
    net = RevCol((4, 8), (1, 1), columns=3, num_classes=3)
    for n in (1, 2):
        for level in (0, 1):
            net.columns.steps[n].gs[level].alpha.data.fill_(-(n + level / 4))
    net.columns.steps[1].gs[0].alpha.data.zero_()  # what is applied is 1e-3
    [found] = weight_maps(net)
    assert found.values[:, 0].isnan().all() and (found.row, found.column) == ("level", "column")
    torch.testing.assert_close(found.values[:, 1:], torch.tensor([[1e-3, 2], [1.25, 2.25]], dtype=torch.float64))


def test_stages_and_steps_of_other_schemes():
    fs = [nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3, bias=False)) for _ in range(5)]
    for i, f in enumerate(fs):
        nn.init.constant_(f[0].weight, -float(i))
        nn.init.constant_(f[2].weight, i + 1.0)
    [found] = weight_maps(Stack(fs, "midpoint + heun3"))
    want = torch.tensor([[0.5, 2.5], [1.5, 3.5], [torch.nan, 4.5]], dtype=torch.float64)
    torch.testing.assert_close(found.values, want, equal_nan=True)
    assert (found.row, found.column, found.columns) == ("stage", "step", ("1", "2"))
    [shared] = weight_maps(Stack(fs[1], "rk4", depth=3))
    assert torch.equal(shared.values, torch.full((1, 3), 1.5, dtype=torch.float64))


def test_stacks_inside_functions_are_part_of_them_wherever_the_outer_one_is():
    outer = Stack([Stack([nn.Linear(4, 4), nn.Linear(4, 4)], "euler"), nn.Linear(4, 4)], "euler")
    for net, prefix in ((outer, ""), (nn.Sequential(outer), "0."), (nn.ModuleDict({"a": outer, "ab": outer}), "a.")):
        [found] = weight_maps(net)
        assert found.name == prefix.removesuffix(".") and torch.equal(found.values, weight_maps(outer)[0].values)
        assert places(net) == [f"{prefix}steps.0:0", f"{prefix}steps.1:0"]
    two = nn.ModuleDict({"a": outer, "ab": Stack([nn.Linear(4, 4)], "euler")})
    assert [found.name for found in weight_maps(two)] == ["a", "ab"] and len(places(two)) == 3


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_convolutions_of_any_number_of_dimensions(kind):
    fs = [nn.Sequential(kind(2, 2, 3, padding=1), nn.Tanh()) for _ in range(3)]
    for i, f in enumerate(fs):
        nn.init.constant_(f[0].weight, -1.0 - i)
    [found] = weight_maps(Stack(fs, "euler"))
    assert found.values.tolist() == [[1.0, 2.0, 3.0]]
    joined = [kind(2 + 3 * i, 3, 3, padding=1) for i in range(2)]
    for f in joined:
        nn.init.constant_(f.weight, 0.5)
    [found] = weight_maps(Stack(joined, "dense(3)"))
    want = torch.tensor([[0.5, 0.5], [torch.nan, 0.5], [torch.nan, torch.nan]], dtype=torch.float64)
    torch.testing.assert_close(found.values, want, equal_nan=True)


def test_what_cannot_be_read_is_refused():
    with pytest.raises(SchemeError, match="Linear has no stack"):
        weight_maps(nn.Linear(2, 2))
    with pytest.raises(SchemeError, match=r"steps\.1: no layer reads all 8 channels.*reads 0"):
        weight_maps(Stack([nn.Linear(4, 4), nn.Identity()], "dense(4)"))


@pytest.mark.parametrize("name", ["ho_resnet26", "densenet_bc40_k36", "revnet38", "resnet20"])
def test_every_stack_of_a_model_has_a_map(name):
    maps = weight_maps(create_model(name, num_classes=3))
    assert maps and all(m.values.shape == (len(m.rows), len(m.columns)) for m in maps)
    assert all((m.values[m.values.isfinite()] > 0).all() and m.values.isfinite().any() for m in maps)
