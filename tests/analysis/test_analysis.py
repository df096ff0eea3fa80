"""Centered kernel alignment against its definition, LayerCAM by hand, and figures that are pictures."""

import builtins
import sys

import pytest
import torch
from torch import nn

from odenets import create_model, plots
from odenets.analysis import Alignment, Features, alignment, layer_cam, places, unbiased_hsic
from odenets.models import RevCol, RevColViT, RevNet, ViT
from schemes import SchemeError


def revcol(**options):
    return RevCol((4, 8), (1, 1), columns=3, num_classes=3, **options)


ANY = {
    "ho_resnet26": lambda: create_model("ho_resnet26", num_classes=3),
    "resnet18": lambda: create_model("resnet18", widths=(4, 8, 8, 8), num_classes=3),
    "convnext": lambda: create_model("convnext_tiny", functions=(1, 1, 1, 1), widths=(4, 8, 8, 8), num_classes=3),
    "densenet": lambda: create_model("densenet_bc40_k36", growth=4, num_classes=3),
    "rdnet": lambda: create_model("rdnet_tiny", init_channels=8, growths=(8,) * 7, num_classes=3),
    "revnet": lambda: RevNet((2, 2), (8, 8, 16), num_classes=3),
    "revcol": revcol,
    "revcol, reverse": lambda: revcol(backprop="reverse"),
    "vit": lambda: ViT(4, 8, 2, "midpoint", patch=8, size=32, num_classes=3),
    "revcol-vit": lambda: RevColViT(8, (1, 1), 2, 2, patch=8, size=32, num_classes=3),
}


def test_the_estimate_is_the_sum_over_different_samples():
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    k, other = x @ x.T, y @ y.T
    total = {"kk": 0.0, "kl": 0.0, "k,l": 0.0}
    pairs = triples = quadruples = 0
    for a in range(6):
        for b in set(range(6)) - {a}:
            total["kk"] += float(k[a, b] * other[a, b])
            pairs += 1
            for c in set(range(6)) - {a, b}:
                total["kl"] += float(k[a, b] * other[a, c])
                triples += 1
                for d in set(range(6)) - {a, b, c}:
                    total["k,l"] += float(k[a, b] * other[c, d])
                    quadruples += 1
    want = total["kk"] / pairs - 2 * total["kl"] / triples + total["k,l"] / quadruples
    assert float(unbiased_hsic(k, other)) == pytest.approx(want, abs=1e-12)


def test_alignment_ignores_rotations_scales_and_shifts_and_sees_independence():
    x, other = torch.randn(4000, 6), torch.randn(4000, 6)
    turn = torch.linalg.qr(torch.randn(6, 6)).Q
    found = Alignment(["x", "turned", "other"])
    for i in range(0, 4000, 50):
        a, b = x[i : i + 50], other[i : i + 50]
        found.update({"x": a, "turned": 5 * a @ turn + 7, "other": b.view(50, 2, 3)})
    matrix = found.compute()
    torch.testing.assert_close(matrix[0, 1], torch.tensor(1.0, dtype=torch.float64), rtol=1e-5, atol=0)
    assert matrix[0, 2].abs() < 0.02 and torch.equal(matrix, matrix.T)
    # In the limit: |Y'X|^2 / (|X'X| |Y'Y|) of the centred features.
    mixed = Alignment(["x", "y"])
    y = x + 2 * other
    for i in range(0, 4000, 50):
        mixed.update({"x": x[i : i + 50], "y": y[i : i + 50]})
    a, b = x - x.mean(0), y - y.mean(0)
    limit = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert float(mixed.compute()[0, 1]) == pytest.approx(float(limit), abs=0.03)


def test_alignment_wants_enough_samples():
    with pytest.raises(SchemeError, match="want at least 4 samples"):
        Alignment(["x"]).update({"x": torch.randn(3, 2)})
    with pytest.raises(SchemeError, match="no batch"):
        Alignment(["x"]).compute()


@pytest.mark.parametrize("name", ANY)
def test_both_work_on_any_model(name):
    net = ANY[name]()
    net.train()
    x, y = torch.rand(6, 3, 32, 32), torch.arange(6) % 3
    before = {k: v.clone() for k, v in net.state_dict().items()}
    matrix, rows = alignment(net, [(x, y), (x.flip(0), y.flip(0)), (x[:2], y[:2])], classes=3)
    assert rows == [*places(net), "input", "label"] and len(rows) > 3
    assert matrix.isfinite().all() and (matrix.diagonal() - 1).abs().max() < 1e-6
    # What the next step reads are the streams, where there are several, and not what a reader would be given of them.
    at = [place.replace(":readout", ":0") for place in places(net)[-2:]]
    heats = layer_cam(net, x, at, target=1)
    assert all(h.shape == (6, 32, 32) and (h >= 0).all() and (h <= 1).all() for h in heats)
    assert any(h.max() > 0 for h in heats)
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_layer_cam_is_the_written_out_sum():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    x = torch.randn(2, 3, 4, 6)
    (heat,) = layer_cam(net, x, ["0"], target=torch.tensor([0, 1]))
    weight = net[3].weight.clamp(min=0)  # the gradient of a score at every pixel, but for 1 / (h w)
    want = (net[0](x) * weight[:, :, None, None]).sum(1).relu().detach()
    torch.testing.assert_close(heat, want / want.flatten(1).amax(1)[:, None, None])


def test_places_that_do_not_exist_are_named():
    net = revcol()
    with pytest.raises(SchemeError, match=r"no module 'columns\.steps\.9'.*columns\.steps\.0:1"):
        Features(net, ["columns.steps.9:1"])
    with Features(net, ["columns.steps.0:7"]), pytest.raises(SchemeError, match="no item 7"):
        net(torch.rand(1, 3, 8, 8))
    with Features(net, ["columns.steps.0"]), pytest.raises(SchemeError, match="returns 3 tensors; name one"):
        net(torch.rand(1, 3, 8, 8))
    with pytest.raises(SchemeError, match="neither a map nor the tokens"):
        layer_cam(net, torch.rand(1, 3, 8, 8), ["head.norm"])
    with pytest.raises(SchemeError, match="did not run"):
        layer_cam(net, torch.rand(1, 3, 8, 8), ["idle"])
    assert not net.columns.steps[0]._forward_hooks


def is_picture(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.long
def test_figures_are_pictures(tmp_path):
    net, x = revcol(), torch.rand(8, 3, 16, 16)
    matrix, rows = alignment(net, [(x, torch.arange(8) % 3)], classes=3)
    assert is_picture(plots.alignment_matrix(matrix, rows, tmp_path / "a" / "matrix.png", "RevCol"))
    assert is_picture(plots.alignment_by_column(matrix, rows, tmp_path / "columns.png"))
    matrix, rows = matrix[[0, 1, 2, -2, -1]][:, [0, 1, 2, -2, -1]], ["stem", "a.b", "c", "input", "label"]
    assert is_picture(plots.alignment_by_column(matrix, rows, tmp_path / "places.png"))
    heats = layer_cam(net, x[:2], places(net)[-2:])
    assert is_picture(plots.heat_maps(x[:2], heats, ["level 1", "level 2"], tmp_path / "heat.png"))
    series = {"store": ([2, 4], [1.0, 2.0]), "reverse": ([2, 4], [1.0, 1.1])}
    assert is_picture(plots.lines(series, tmp_path / "memory.png", "columns", "MiB"))


def test_a_missing_matplotlib_says_what_to_install(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    for name in [m for m in sys.modules if m.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"odenets\[analysis\]"):
        plots.lines({}, tmp_path / "x.png", "x", "y")
