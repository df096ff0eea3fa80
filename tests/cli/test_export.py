"""`odenets export` and `odenets.export`: every family, trained in any mode, in files that other programs run."""

import json
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import odenets.export as exporting
from odenets import create_model
from odenets.cli import main
from odenets.export import export
from odenets.models import RevNet, ViT
from odenets.training import Classifier
from schemes import SchemeError

# Torch 2.11 warns whoever loads a .pt2 file of how it reads it.
pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")

NOT_FINITE = (float("nan"), float("inf"), -float("inf"))


def small() -> nn.Module:
    return create_model("ho_resnet26", num_classes=3, widths=(4, 4), functions=(2, 2), scheme="midpoint")


@contextmanager
def quiet():
    """The exporter to ONNX warns of its own parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fails(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as e:
        main(list(args))
    lines = capsys.readouterr().err.splitlines()
    assert e.value.code == 2 and len(lines) == 2, lines
    return " ".join(lines)


def revnet(backprop: str) -> nn.Module:
    torch.manual_seed(1)
    net = RevNet(units=(1, 2), widths=(4, 4, 8), num_classes=3, backprop=backprop)
    net.train()(torch.randn(4, 3, 16, 16)).sum().backward()  # statistics, anchors and buffers of training
    return net


LONG = [pytest.param(mode, marks=pytest.mark.slow) for mode in ("store", "checkpoint", "reverse")]


@pytest.mark.parametrize("backprop", ["exact", *LONG])
def test_the_file_is_the_network_whichever_way_it_was_trained(tmp_path, backprop):
    net = revnet(backprop)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    done = export(net, tmp_path / "net.pt2", (3, 16, 16))
    assert net.training and all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    loaded = torch.export.load(done.path).module()
    for n in (1, 2, 7):
        x = torch.randn(n, 3, 16, 16)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), net.eval()(x), atol=1e-5, rtol=1e-5)
    assert (
        done.difference <= 1e-5
        and done.shape == ("n", 3, 16, 16)
        and [p.name for p in tmp_path.iterdir()] == ["net.pt2"]
    )


@pytest.mark.slow
def test_a_network_of_one_size_says_so(tmp_path):
    net = ViT(depth=1, dim=12, heads=3, patch=4, size=16, num_classes=3)
    with pytest.raises(SchemeError, match=r"takes no pictures \(1, 3, 20, 16\).*\n.*without dynamic_size"):
        export(net, tmp_path / "net.pt2", (3, 16, 16), dynamic_size=True)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_the_network_is_not_written(tmp_path, monkeypatch):
    net = create_model("ho_resnet26", num_classes=3, widths=(4, 4), functions=(2, 2), scheme="midpoint").eval()

    def write(program, path, notes):
        path.write_text("wrong")
        return lambda x: net(x) + 1e-3

    monkeypatch.setattr(exporting, "_traced", lambda *args: None)
    monkeypatch.setattr(exporting, "_pt2", write)
    (tmp_path / "net.pt2").write_text("an earlier file")
    with pytest.raises(SchemeError, match=r"differ by 0.00.*\n.*tolerance"):
        export(net, tmp_path / "net.pt2", (3, 16, 16))
    assert (tmp_path / "net.pt2").read_text() == "an earlier file" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        *((x, y, "other outputs are infinite or NaN") for x in NOT_FINITE for y in (*NOT_FINITE, 1.0) if x is not y),
        *((1.0, y, "other outputs are infinite or NaN") for y in NOT_FINITE),
        *((y, y, None) for y in (*NOT_FINITE, 1.0)),
    ],
)
def test_every_batch_counts_and_what_is_not_finite_hides_nothing(tmp_path, monkeypatch, batch, there, here, said):
    """One output of one batch is changed; beside it, a difference that is too large is found in any batch."""
    shift = 0.0

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(1))

        def forward(self, x, put=here):
            y = self.factor * x.mean((2, 3))
            y[0, 0] = put if len(x) == (exporting.TRACED, *exporting.CHECKED)[batch] else y[0, 0]
            return y

    net = Net()

    def write(program, path, notes):
        path.write_text("a file")
        return lambda x: net(x, there) + shift

    monkeypatch.setattr(exporting, "_traced", lambda *args: None)
    monkeypatch.setattr(exporting, "_pt2", write)
    if said:
        with pytest.raises(SchemeError, match=said + r".*\n"):
            export(net, tmp_path / "net.pt2", (3, 16, 16))
        assert not list(tmp_path.iterdir())
        return
    assert export(net, tmp_path / "net.pt2", (3, 16, 16)).difference == 0
    shift = 1e-3
    with pytest.raises(SchemeError, match=r"differ by 0.00.*\n"):
        export(net, tmp_path / "net.pt2", (3, 16, 16))


def test_outputs_of_another_shape_are_refused(tmp_path, monkeypatch):
    net = small().eval()
    monkeypatch.setattr(exporting, "_traced", lambda *args: None)
    monkeypatch.setattr(exporting, "_pt2", lambda program, path, notes: lambda x: net(x)[:1])
    with pytest.raises(SchemeError, match=r"its outputs are \(1, 3\), the network's \(2, 3\); nothing was written\n"):
        export(net, tmp_path / "net.pt2", (3, 16, 16))


def trained(path: Path) -> nn.Module:
    net = Classifier.load_from_checkpoint(path).net.eval()
    for level in net.levels:
        level.set_step(0.5)  # as the run's callback left it
    return net


@pytest.mark.long
def test_onnx_from_a_checkpoint(capsys, digits, tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    path = tmp_path / "new" / "net.onnx"
    with quiet():
        main(["export", str(digits), "--output", str(path)])
    assert "within" in capsys.readouterr().out and [p.name for p in path.parent.iterdir()] == ["net.onnx"]
    net = trained(digits)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for n in (1, 5):
        x = torch.randn(n, 1, 8, 8)
        (logits,) = session.run(["logits"], {"pictures": x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), net(x), atol=1e-5, rtol=1e-5)
    (notes,) = (json.loads(p.value) for p in onnx.load(path).metadata_props if p.key == "odenets")
    assert notes["classes"] == list("0123456789") and notes["picture"]["mean"] == [0.3]


@pytest.mark.long
def test_pt2_of_any_size_from_a_checkpoint_with_its_notes(capsys, digits, tmp_path):
    path = tmp_path / "net.pt2"
    main(["export", str(digits), "--output", str(path), "--format", "pt2", "--dynamic_size", "--json"])
    done = json.loads(capsys.readouterr().out)
    assert done["shape"] == ["n", 1, "h", "w"] and done["bytes"] == path.stat().st_size and done["difference"] <= 1e-5
    notes = {"odenets.json": ""}
    module = torch.export.load(path, extra_files=notes).module()
    x = torch.randn(2, 1, 12, 8)
    with torch.no_grad():
        torch.testing.assert_close(module(x), trained(digits)(x), atol=1e-5, rtol=1e-5)
    assert json.loads(notes["odenets.json"])["picture"]["channels"] == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["{ckpt}"], "--output"),
        (["{ckpt}", "--output", "net.bin"], "onnx or pt2"),
        (["{ckpt}", "--output", "net.pt2", "--format", "onnx"], "ends in .pt2"),
        (["{ckpt}", "--output", "net.pt2", "--format", "tflite"], "onnx, pt2"),
        (["nowhere.ckpt", "--output", "net.pt2"], "no such file"),
        (["{ckpt}", "--output", "{ckpt}/net.pt2"], "cannot be written"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, list) else "",
)
def test_wrong_commands_end_in_two_lines(capsys, digits, tmp_path, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    assert said in fails(capsys, "export", *(arg.format(ckpt=digits) for arg in args))
    assert not list(Path().iterdir())


def test_a_missing_extra_names_its_install_line(capsys, digits, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    said = fails(capsys, "export", str(digits), "--output", str(tmp_path / "net.onnx"))
    assert "onnxscript" in said and 'pip install "odenets[export]"' in said
