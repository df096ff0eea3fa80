"""`odenets convert`: files from published keys to ours and back, or nothing is written."""

from pathlib import Path

import pytest
import torch

from cli.lines import answer, fails
from odenets import checkpoints, create_model


def published() -> dict[str, torch.Tensor]:
    """A ResNet-18 of 7 classes under torchvision's names, with random numbers."""
    net = create_model("resnet18", num_classes=7)
    names = {}
    for level in range(4):
        for block in range(2):
            for part in (1, 2):
                for ours, theirs in (("conv", "conv"), ("norm", "bn")):
                    here = f"levels.{level}.steps.{block}.fs.0.{ours}{part}"
                    names[here] = f"layer{level + 1}.{block}.{theirs}{part}"
        names |= {f"levels.{level}.steps.0.gs.0.conv": f"layer{level + 1}.0.downsample.0"}
        names |= {f"levels.{level}.steps.0.gs.0.norm": f"layer{level + 1}.0.downsample.1"}
    names |= {"stem.conv": "conv1", "stem.norm": "bn1", "head": "fc"}
    state = {}
    for key, value in net.state_dict().items():
        module, _, part = key.rpartition(".")
        state[f"{names[module]}.{part}"] = torch.rand(value.shape) if value.is_floating_point() else value + 7
    return state


@pytest.mark.cases(1)
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_files_there_and_back(capsys, tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    state = published()
    torch.save({"model": state, "epoch": 3}, "published.pth")
    out, _ = answer(capsys, "convert", "published.pth", "--model", "resnet18", "--output", f"new/own.{suffix}")
    assert "our own keys" in out and "122 tensors" in out
    net = create_model("resnet18", num_classes=7)
    assert checkpoints.load(net, f"new/own.{suffix}").layout == "own"
    answer(
        capsys, "convert", f"new/own.{suffix}", "--model", "resnet18", "--like", "published.pth", "--output", "b.pth"
    )
    back = torch.load("b.pth", weights_only=True)
    assert back.keys() == state.keys() and all(map(torch.equal, back.values(), (state[key] for key in back)))
    assert sorted(p.name for p in Path("new").iterdir()) == [f"own.{suffix}"]


@pytest.mark.parametrize(
    ("kinds", "wanted"),
    [
        (["float32"], "float32"),
        (["float64"], "float64"),
        (["bfloat16"], "bfloat16"),
        (["float16"], "float16"),
        (["bfloat16", "float16"], "float32"),
        (["bfloat16", "float64"], "float64"),
    ],
    ids=str,
)
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_numbers_keep_their_type(capsys, tmp_path, kinds, wanted, suffix):
    """Of several types, all have the one that holds them: no number is rounded."""
    state, n = create_model("resnet20").state_dict(), 0
    for key, value in state.items():
        if value.is_floating_point():
            state[key] = torch.rand(value.shape, dtype=torch.float64).to(getattr(torch, kinds[n % len(kinds)]))
            n += 1
    torch.save(state, tmp_path / "held.pth")
    path = tmp_path / f"out.{suffix}"
    answer(capsys, "convert", str(tmp_path / "held.pth"), "--model", "resnet20", "--output", str(path))
    found = checkpoints.read(path)
    for key, value in state.items():
        assert found[key].dtype == (getattr(torch, wanted) if value.is_floating_point() else value.dtype)
        assert torch.equal(found[key].double(), value.double())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["x.pth", "--model", "resnet20"], "--output"),
        (["x.pth", "--model", "resnet20", "--output", "y.bin"], ".safetensors, .pth"),
        (["nowhere.pth", "--model", "resnet20", "--output", "y.pth"], "no weight file"),
        (["x.pth", "--model", "resnt20", "--output", "y.pth"], "resnet20"),
        (["x.pth", "--model", "resnet32", "--output", "y.pth"], "does not fit ResNet"),
        (["x.pth", "--model", "resnet20", "--output", "y.pth", "--like", "x.pth"], "the keys of ResNet itself"),
        (["x.pth", "--model", "resnet20", "--output", "x.pth/y.pth"], "cannot be written"),
    ],
    ids=lambda v: v[-1] if isinstance(v, list) else "",
)
def test_what_does_not_fit_writes_nothing(capsys, tmp_path, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    torch.save(create_model("resnet20").state_dict(), "x.pth")
    assert said in fails(capsys, "convert", *args)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]
