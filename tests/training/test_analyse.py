"""`odenets analyse`: every figure of a run's checkpoint, as PNG and SVG, and two lines for what does not go."""

import pytest
import torch

from odenets import checkpoints
from odenets.models import RevCol
from odenets.training import Digits, analyse
from odenets.training.command import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints of one step on the digits: columns, and a Runge-Kutta net."""
    found = {}
    for name, options in {
        "revcol": "RevCol --model.net.channels [4,8] --model.net.blocks [1,1] --model.net.columns 3"
        " --model.net.patch 2",
        "resnet": "HOResNet --model.net.functions [4,4] --model.net.widths [4,8] --model.net.scheme rk4"
        " --model.net.placement preact --model.net.stem conv3",
    }.items():
        folder = tmp_path_factory.mktemp(name)
        run(
            [
                *f"fit --model odenets.training.Classifier --model.net odenets.models.{options}".split(),
                *"--model.optimizer torch.optim.SGD --model.optimizer.lr 0.1 --data odenets.training.Digits".split(),
                *"--data.split_seed 5 --trainer.max_epochs 1 --trainer.limit_train_batches 1".split(),
                *f"--trainer.accelerator cpu --trainer.enable_model_summary false --run_dir {folder}".split(),
            ]
        )
        found[name] = folder / "checkpoints" / "last.ckpt"
    return found


def refused(capsys, *words):
    with pytest.raises(SystemExit) as left:
        analyse.run([str(word) for word in words])
    lines = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("  ")
    return lines


@pytest.mark.cases(1)
@pytest.mark.parametrize("kind", analyse.KINDS)
@pytest.mark.parametrize("net", ["revcol", "resnet"])
def test_every_figure(trained, net, kind, tmp_path, capsys):
    out = tmp_path / "a" / f"figure.{'svg' if net == 'resnet' else 'png'}"
    words = [trained[net], kind, "--out", out, "--batches", "1", "--batch_size", "16"]
    if (net, kind) == ("revcol", "stability"):
        assert "no stability function" in refused(capsys, *words)[0] and not out.exists()
        return
    analyse.run([str(word) for word in words])
    assert capsys.readouterr().out.strip() == str(out)
    head = out.read_bytes()[:200]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" if net == "revcol" else b"<?xml" in head


def test_the_figure_shows_the_checkpoint_s_own_weights_and_pictures(trained, monkeypatch):
    path, seen = trained["revcol"], {}
    net = RevCol((4, 8), (1, 1), columns=3, patch=2, in_chans=1, num_classes=10)
    checkpoints.load(net, path)
    monkeypatch.setattr(analyse.plots, "weight_maps", lambda maps, *others: seen.update(maps=maps))
    monkeypatch.setattr(analyse.plots, "heat_maps_by_column", lambda *args: seen.update(heat=args))
    analyse.run([str(path), "weights"])
    analyse.run([str(path), "layercam", "--pictures", "3", "--places", "columns.steps.2:2, columns.steps.0:1"])
    [found] = seen["maps"]
    [want] = analyse.weight_maps(net)
    torch.testing.assert_close(found.values, want.values, equal_nan=True)
    pictures, heats, names, out = seen["heat"]
    assert names == ["columns.steps.2:2", "columns.steps.0:1"] and out == path.parent / "layercam.png"
    data = analyse.Pictures.__subclasses__()
    digits = next(kind for kind in data if kind.__name__ == "Digits")(split_seed=5)
    digits.setup("validate")
    x = torch.stack([digits.sets["val"][i][0] for i in range(3)])
    torch.testing.assert_close(pictures, x)
    want = analyse.layer_cam(net.eval(), (x - 0.3) / 0.375, names)
    for one, other in zip(heats, want, strict=True):
        torch.testing.assert_close(one, other)


def test_class_alignment_draws_the_class_that_was_asked_for(trained, monkeypatch, capsys):
    path, seen = trained["revcol"], {}
    monkeypatch.setattr(analyse.plots, "class_alignment", lambda *args: seen.update(args=args))
    analyse.run([str(path), "class_alignment", "--of", "7", "--batches", "2", "--batch_size", "40"])
    label, picture, names, out, title = seen["args"]
    net = RevCol((4, 8), (1, 1), columns=3, patch=2, in_chans=1, num_classes=10)
    checkpoints.load(net, path)
    digits = Digits(batch_size=40, split_seed=5)
    digits.setup("validate")
    batches = [digits.on_after_batch_transfer(b, 0) for b, _ in zip(digits.val_dataloader(), range(2), strict=False)]
    want = analyse.class_alignment(net, batches, names, classes=10)
    assert torch.allclose(torch.tensor(label), want.label[:, 7].float(), equal_nan=True, atol=1e-6)
    assert torch.allclose(torch.tensor(picture), want.picture[:, 7].float(), equal_nan=True, atol=1e-6)
    assert f"class 7, {int(want.counts[7])} of 80 pictures" in title and out.name == "class_alignment.png"
    assert "no class of the data" in refused(capsys, path, "class_alignment", "--of", "zebra")[0]


def test_what_does_not_go_is_said_in_two_lines(trained, tmp_path, capsys):
    path = trained["resnet"]
    assert "'weight'; wanted one of weights" in refused(capsys, path, "weight")[0]
    assert "no file" in refused(capsys, tmp_path / "no.ckpt", "weights")[0]
    assert ".svg" in refused(capsys, path, "weights", "--out", tmp_path / "x.bmp")[0]
    assert "--batches 0" in refused(capsys, path, "weights", "--batches", "0")[0]
    assert "has no folder" in refused(capsys, path, "ranks", "--root", tmp_path)[0]
    assert "no module 'nowhere'" in refused(capsys, path, "ranks", "--places", "nowhere")[0]
    held = torch.load(path, weights_only=True)
    for change, kind, message in (
        ({"hyper_parameters": {}}, "weights", "does not say how its net is built"),
        ({analyse.KEY: {}}, "ranks", "does not say which data it saw"),
    ):
        torch.save({**held, **change}, tmp_path / "other.ckpt")
        assert message in refused(capsys, tmp_path / "other.ckpt", kind)[0]
    (tmp_path / "cut.ckpt").write_bytes(path.read_bytes()[:1000])
    assert "cut off" in refused(capsys, tmp_path / "cut.ckpt", "weights")[0]
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("scheme", ["euler", "midpoint"])
def test_places_of_heat_maps_are_those_whose_patches_count(scheme):
    """After the last attention a class token no longer depends on the patches: their map would be empty."""
    from odenets.analysis import Features
    from odenets.models import ViT

    net = ViT(depth=6, dim=8, heads=2, scheme=scheme, patch=4, size=16, num_classes=3).eval()
    names = analyse._with_maps(net)
    assert 2 <= len(names) <= 6 and len(set(names)) == len(names)
    with Features(net, names) as found:
        score = net(torch.randn(2, 3, 16, 16))[:, 0].sum()
    for grad in torch.autograd.grad(score, [found.edge(name) for name in names]):
        assert grad[:, 1:].any()
