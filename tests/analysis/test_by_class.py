"""Alignment with single classes, against the definition with every class by itself."""

import pytest
import torch
from torch import nn

from odenets.analysis import Alignment, class_alignment
from schemes import SchemeError


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def data(*sizes):
    g = torch.Generator().manual_seed(1)
    found = []
    for n in sizes:
        y = torch.randint(0, 3, (n,), generator=g)
        found.append((torch.rand(n, 3, 2, 2, generator=g).double() + 0.5 * y.view(-1, 1, 1, 1), y))
    return found


def test_each_class_is_the_alignment_of_its_own():
    model, batches = net(), data(20, 13, 3)
    found = class_alignment(model, batches, ["1", "2"], classes=4)
    assert (
        found.names == ["1", "2"]
        and found.counts.tolist() == torch.cat([y for _, y in batches[:2]]).bincount(minlength=4).tolist()
    )
    x, y = (torch.cat([b[i] for b in batches[:2]]) for i in (0, 1))
    with torch.no_grad():
        for row, part in enumerate((model[:2], model[:3])):
            for k in range(3):
                label, picture = Alignment(["f", "label"]), Alignment(["f", "input"])
                for a, b in batches[:2]:
                    label.update({"f": part(a), "label": (b == k).double()[:, None]})
                for group in x[y == k].split(16):
                    if len(group) >= 4:
                        picture.update({"f": part(group), "input": group})
                assert float(found.label[row, k]) == pytest.approx(float(label.compute()[0, 1]), rel=1e-9)
                assert float(found.picture[row, k]) == pytest.approx(float(picture.compute()[0, 1]), rel=1e-9)
    assert bool(found.label[:, 3].isnan().all()) and bool(found.picture[:, 3].isnan().all())
    assert found.best() == int(found.label[:, :3].amax(0).argmax())


def test_the_network_is_left_as_it_was():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(16, 3)
    ).double()
    model[1].eval()
    flags, before = [m.training for m in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    class_alignment(model, data(12), ["0"], classes=3)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", [nn.ReLU, nn.SiLU, nn.Hardtanh])
def test_a_network_may_write_into_its_input(kind):
    model, batches = net(), [(x - 0.7, y) for x, y in data(20, 13)]
    found = [class_alignment(nn.Sequential(kind(inplace=own), *model), batches, ["2"], classes=3) for own in (0, 1)]
    assert torch.equal(found[0].picture, found[1].picture) and torch.equal(found[0].label, found[1].label)
    assert bool(found[0].picture.isfinite().all())


@pytest.mark.parametrize("n", [4, 5, 6, 7, 8, 11, 16, 33])
@pytest.mark.parametrize("members", [0, 1, "all but one", "all"])
def test_a_label_without_an_alignment_is_undefined(n, members):
    """The estimate for the indicator of none, of one or of all is 0, and their alignment no number."""
    batches = []
    for size in (n, n + 2):
        x = data(size)[0][0]
        many = {"all but one": size - 1, "all": size}.get(members, members)
        batches.append((x, (torch.arange(size) < many).long()))
    assert bool(class_alignment(net(), batches, ["1", "2"], classes=2).label.isnan().all())


def test_what_does_not_go_is_refused():
    with pytest.raises(SchemeError, match="0 to 1"):
        class_alignment(net(), data(12), ["1"], classes=2)
    x, y = data(12)[0]
    with pytest.raises(SchemeError, match="y >= 0"):
        class_alignment(net(), [(x, y - 1)], ["1"], classes=3)
    with pytest.raises(SchemeError, match="not finite"):
        class_alignment(net(), [(x / 0, y)], ["1"], classes=3)
    with pytest.raises(SchemeError, match="enough pictures"):
        class_alignment(net(), data(3), ["1"], classes=3).best()
