"""Start from weights: what differs is adapted by a stated rule, the rest is loaded as it is, or nothing is."""

import copy
import itertools
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_checkpoints import Published, fill
from test_every_model import build, families, pictures, shared
from torch import nn

from odenets import checkpoints, create_model, start
from odenets.models import catalogue
from odenets.start import Adapt, find, summed, with_channels
from schemes import SchemeError

every_family = pytest.mark.parametrize("name", list(families().values()), ids=list(families()))


def state(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def channels_by_hand(weight, channels):
    """timm's rule, written out: sum for grey, else the three in turn at 3 / channels of their size."""
    if channels == 1:
        return sum(weight[:, i : i + 1] for i in range(weight.shape[1]))
    return torch.stack([weight[:, i % weight.shape[1]] for i in range(channels)], 1) * (weight.shape[1] / channels)


@pytest.mark.cases(4)
@every_family
def test_another_head_is_new_and_all_else_is_the_files(name):
    source, net = shared(name), build(name, num_classes=3)
    before = state(net)
    done = start.start(net, source.state_dict())
    after, there = net.state_dict(), source.state_dict()
    assert set(done.new) == {f"{net.classifier}.weight", f"{net.classifier}.bias"}
    for key, value in after.items():
        assert torch.equal(value, before[key] if key in done.new else there[key]), key
    assert done.loaded == done.count - 2 == len(after) - 2 and not done.adapted and not done.dropped


@pytest.mark.cases(4)
@pytest.mark.parametrize("channels", [1, 2, 4, 7])
@every_family
def test_the_first_convolution_takes_other_channels_by_the_published_rule(name, channels):
    if not shared(name).first_conv:
        return
    net = build(name, in_chans=channels)
    key = f"{net.first_conv}.weight"
    there = shared(name).state_dict()
    done = start.start(net, there)
    expected = {**there, key: channels_by_hand(there[key], channels)}
    for other, value in net.state_dict().items():
        torch.testing.assert_close(value, expected[other], rtol=1e-6, atol=1e-7)
    assert done.adapted == (f"{net.first_conv} from 3 channels to {channels}",) and not done.new


def test_equal_channels_give_what_they_gave_whatever_their_number():
    weight, grey = torch.randn(5, 3, 3, 3, dtype=torch.float64), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    want = F.conv2d(grey.expand(-1, 3, -1, -1), weight)
    for channels in (1, 3, 6):
        got = F.conv2d(grey.expand(-1, channels, -1, -1), with_channels(weight, channels))
        torch.testing.assert_close(got, want)
    assert with_channels(weight.half(), 4).dtype is torch.float16


@pytest.mark.parametrize("family", ["ViT", "RevColViT"])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_positions_of_another_size_are_those_that_the_network_would_interpolate(family, size):
    """A network that is made for the size gives what the old one gives there, which resizes them at each call."""
    name = families()[family]
    old = shared(name)
    new = build(name, size=old.patch * size, num_classes=3).eval()
    done = start.start(new, old.state_dict())
    side = old.patch * size
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(new.forward_features(x), old.forward_features(x), rtol=1e-5, atol=1e-5)
    assert [text for text in done.adapted if "positions" in text] and len(done.new) == 2
    # By an interpolation of its own: bicubic, over the grid alone.
    positions = old.state_dict()["stem.positions"]
    first = positions.shape[1] - 4
    grid = positions[0, first:].reshape(2, 2, -1).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, (size, size), mode="bicubic", antialias=True)[0].permute(1, 2, 0).reshape(size**2, -1)
    got = new.state_dict()["stem.positions"][0]
    torch.testing.assert_close(got, torch.cat([positions[0, :first], grid]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "option"), [("convnext_tiny", "kernel"), ("revcol_tiny", "kernel_size")])
def test_padded_kernels_leave_the_function_as_it_is(name, option):
    small, large = (build(name, **{option: k}).eval() for k in (3, 7))
    fill(small)
    before = state(large)
    with pytest.raises(SchemeError, match="of another shape"):
        start.start(large, small.state_dict())
    assert equal(state(large), before)
    done = start.start(large, small.state_dict(), Adapt(pad_kernels=True))
    x = pictures(name)
    with torch.no_grad():
        torch.testing.assert_close(large(x), small(x), rtol=1e-4, atol=1e-5)
    assert done.adapted == (f"kernels from 3x3 to 7x7 ({sum(k.endswith('dwconv.weight') for k in before)})",)
    # There is no middle of a smaller kernel, and a stem that cuts patches would cut others.
    for net, other in ((small, large), (build(name, patch=8), shared(name))):
        with pytest.raises(SchemeError, match="of another shape"):
            start.start(net, other.state_dict(), Adapt(pad_kernels=True))


def test_a_head_of_the_same_width_is_kept_unless_a_new_one_is_asked_for():
    source = fill(create_model("resnet20"))
    kept, new, strict = (create_model("resnet20") for _ in range(3))
    drawn = state(new)
    assert not start.start(kept, source.state_dict()).new and equal(state(kept), state(source))
    done = start.start(new, source.state_dict(), Adapt(new_head=True))
    assert done.new == ("head.weight", "head.bias") and torch.equal(new.head.weight, drawn["head.weight"])
    assert torch.equal(new.stem.conv.weight, source.stem.conv.weight)
    start.start(strict, source.state_dict(), Adapt(new_head=False))
    with pytest.raises(SchemeError, match=r"head\.weight is \(10, 64\), want \(3, 64\)"):
        start.start(create_model("resnet20", num_classes=3), source.state_dict(), Adapt(new_head=False))


def test_a_head_is_never_half_the_files():
    """A bias that would fit does not come without its weight."""
    there = {**state(fill(create_model("resnet20"))), "head.weight": torch.zeros(10, 63)}
    net = create_model("resnet20")
    drawn = state(net)
    start.start(net, there)
    assert torch.equal(net.head.bias, drawn["head.bias"]) and torch.equal(net.head.weight, drawn["head.weight"])


def test_heads_between_columns_come_and_go():
    plain, supervised = build("revcol_tiny", columns=4), build("revcol_tiny", columns=4, supervision=True)
    done = start.start(supervised, state(plain))
    assert done.new and all(key.startswith("supervision.") for key in done.new) and not done.dropped
    done = start.start(plain, state(supervised))
    assert not done.new and all(key.startswith("supervision.") for key in done.dropped)
    assert done.lines()[-1] == f"  left out: supervision.* ({len(done.dropped)})"
    # Other classes: heads are new, their norms and the decoders are the file's.
    done = start.start(build("revcol_tiny", columns=4, supervision=True, num_classes=3), state(supervised))
    assert {key.rpartition(".fc.")[0].rstrip("0123456789.") for key in done.new} == {"head", "supervision.heads"}


def test_a_backbone_alone_leaves_the_head_new_with_its_norm():
    source = fill(build("convnext_tiny"))
    features = {"backbone." + k: v for k, v in state(source).items() if not k.startswith("head")}
    net = build("convnext_tiny")
    done = start.start(net, {"state_dict": features | {"decode_head.weight": torch.ones(1)}})
    assert set(done.new) == {"head.weight", "head.bias", "head_norm.weight", "head_norm.bias"}
    assert done.dropped == ("decode_head.weight",)
    assert torch.equal(net.stem.conv.weight, source.stem.conv.weight)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "backbone.", "net._orig_mod."])
def test_prefixes_are_taken_off(prefix):
    source, net = fill(create_model("resnet20")), create_model("resnet20")
    start.start(net, {"model": {prefix + key: value for key, value in state(source).items()}})
    assert equal(state(net), state(source))


@pytest.mark.parametrize(
    ("raw", "averaged"),
    [("state_dict", "state_dict_ema"), ("current_model_state", "state_dict"), ("model", "model_ema")],
)
def test_averaged_weights_come_first_and_raw_ones_where_they_are_asked_for(raw, averaged):
    a, b = fill(create_model("resnet20")), fill(create_model("resnet20"))
    held = {raw: state(a), averaged: state(b)}
    for adapt, want in ((None, b), (Adapt(averaged=False), a)):
        net = create_model("resnet20")
        start.start(net, held, adapt)
        assert equal(state(net), state(want))


def test_a_published_layout_gives_the_same_features_and_says_what_is_new():
    there = fill(Published((2, 3), (8, 16), True, 1000))
    net = create_model("resnet18", functions=(2, 3), widths=(8, 16), block="bottleneck", num_classes=4).eval()
    done = start.start(net, {"model": {"module." + k: v for k, v in there.state_dict().items()}})
    x = torch.randn(2, 3, 64, 64)
    there.fc = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(
            net.forward_head(net.forward_features(x), pre_logits=True), there(x), rtol=2e-5, atol=2e-5
        )
    assert done.layout == "torchvision" and done.lines()[1] == "  new: head.weight, head.bias"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: {k: v for k, v in s.items() if k != "levels.0.steps.0.fs.0.conv1.weight"},
        lambda s: {**s, "strange": torch.ones(1)},
        lambda s: {**s, "levels.1.steps.0.fs.0.conv1.weight": torch.ones(1)},
        lambda s: {**s, "stem.norm.weight": torch.ones(16, dtype=torch.complex64)},
        lambda s: {**s, "stem.conv.weight": s["stem.conv.weight"].repeat(1, 1, 2, 2)},
    ],
)
def test_all_that_fits_or_nothing(spoil):
    net = create_model("resnet20", num_classes=3, in_chans=1)
    before = state(net)
    with pytest.raises(SchemeError, match=r"nothing was loaded.*\n  Build the network") as e:
        start.start(net, spoil(state(create_model("resnet20"))))
    assert len(str(e.value).splitlines()) == 2 and equal(state(net), before)


def test_a_whole_network_without_a_place_is_two_short_lines():
    with pytest.raises(SchemeError, match=r"92 missing: .* and 89 more") as e:
        start.start(create_model("resnet20"), state(shared("convnext_tiny")))
    assert len(str(e.value)) < 700


def test_keys_are_summed_up_in_few_words():
    assert summed(["a", "b.c"]) == ["a", "b.c"]
    assert summed([*(f"decoders.{i}" for i in range(7)), "x"]) == ["decoders.* (7)", "x"]


def test_files_tags_and_repositories_are_told_apart(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(start, "weights_file", lambda name, tag: asked.append((name, tag)) or tmp_path / "tag.pth")
    assert find("resnet50") == find("resnet50.v1") == tmp_path / "tag.pth"
    assert asked == [("resnet50", True), ("resnet50", "v1")]
    file = tmp_path / "resnet50"
    file.write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert str(find("resnet50")) == "resnet50" and len(asked) == 2  # a file that is there is meant
    for wrong, hint in (
        ("resnet5.v1", "Closest: resnet50.v1"),
        ("runs/best.pth", "Give a file, a published tag"),
        ("owner/name", "hf:owner/name"),
        ("hf:name", "A Hub repository is hf:OWNER/NAME"),
    ):
        with pytest.raises(SchemeError, match="there is no file") as e:
            find(wrong)
        assert hint in str(e.value).splitlines()[1], wrong
    with pytest.raises(SchemeError, match="no published weights are known for revcol_tiny"):
        catalogue.weights_file("revcol_tiny")


class Hub:
    """A Hub that knows one repository; what is asked of it is noted."""

    def __init__(self, folder, *files):
        self.folder, self.files, self.asked = folder, files, []

    def download(self, repo, file, revision=None):
        from huggingface_hub.errors import EntryNotFoundError

        self.asked.append((repo, file, revision))
        if file not in self.files:
            raise EntryNotFoundError("404")
        return str(self.folder / file)


@pytest.mark.parametrize(
    ("source", "files", "found", "asked"),
    [
        ("hf:a/b", ["model.safetensors", "x.bin"], "model.safetensors", [("a/b", "model.safetensors", None)]),
        ("hf-hub:a/b@v1", ["model.safetensors"], "model.safetensors", [("a/b", "model.safetensors", "v1")]),
        ("hf:a/b.c/deep/w.pth", ["deep/w.pth"], "deep/w.pth", [("a/b.c", "deep/w.pth", None)]),
        ("hf:a/b", ["w.pth", "README.md"], "w.pth", None),
        ("hf:a/b", ["w.pth", "v.pth"], "several files of weights", None),
        ("hf:a/b", ["README.md"], "no file of weights", None),
        ("hf:a/b/no.pth", ["w.pth"], "has no file no.pth", None),
    ],
)
def test_a_repository_gives_its_file_of_weights(source, files, found, asked, tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    hub = Hub(tmp_path, *files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, repo, revision=None: files)
    if " " in found:
        with pytest.raises(SchemeError, match=found):
            find(source)
    else:
        assert find(source) == tmp_path / found
        assert asked is None or hub.asked == asked


def test_a_hub_that_is_not_reached_is_two_lines(monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SchemeError, match=r"hf:nobody/nothing cannot be had: .*\n  Fetch the file by hand"):
        find("hf:nobody/nothing")


def test_files_are_read_and_their_names_are_said(tmp_path):
    source = fill(create_model("resnet20"))
    for name in ("w.pth", "w.safetensors"):
        path = tmp_path / name
        checkpoints.save(source, path) if name.endswith("s") else torch.save({"state_dict": state(source)}, path)
        net = create_model("resnet20")
        assert start.start(net, path).lines() == [f"{path}: 116 of 116 tensors (layout: own)"]
        assert equal(state(net), state(source))


def test_a_folder_is_the_file_of_weights_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "config.json").write_text("{}")
    with pytest.raises(SchemeError, match=r"saved has no file of weights\n  Wanted is one that ends in"):
        find("saved")
    source = fill(create_model("resnet20"))
    for name in ("b.pth", "a.safetensors", "model.safetensors"):  # each comes before those that were there
        held = {f"net.{key}": value for key, value in state(source).items()}
        torch.save(held, f"saved/{name}") if name == "b.pth" else save_file(held, f"saved/{name}")
        assert find("saved") == Path("saved") / name
    net = create_model("resnet20")
    start.start(net, "saved")
    assert equal(state(net), state(source))
    shutil.copy("saved/a.safetensors", "saved/c.safetensors")
    os.remove("saved/model.safetensors")
    with pytest.raises(SchemeError, match=r"several files of weights\n  Give one of them: saved/a.safetensors, ..."):
        find("saved")
    # A published tag is meant whatever folder has its name.
    (tmp_path / "resnet50").mkdir()
    monkeypatch.setattr(start, "weights_file", lambda name, tag: Path(name + ".pth"))
    assert find("resnet50") == Path("resnet50.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_where_they_would_be_loaded(value):
    held, net = state(create_model("resnet20")), create_model("resnet20", num_classes=3)
    before = state(net)
    held["head.bias"][0] = value  # which a new head leaves out
    start.start(copy.deepcopy(net), held)
    held["stem.norm.weight"][2] = held["levels.0.steps.0.fs.0.norm1.bias"][0] = value
    with pytest.raises(SchemeError, match=r"not finite, in stem.norm.weight and 1 more; nothing .*\n  .*an earlier"):
        start.start(net, held)
    assert equal(state(net), before)


def test_copies_of_a_network_start_alike():
    nets = [copy.deepcopy(create_model("resnet20", num_classes=3)) for _ in range(2)]
    there = state(fill(create_model("resnet20")))
    for net in nets:
        start.start(net, there)
    for a, b in itertools.pairwise(nets):
        assert torch.equal(a.stem.conv.weight, b.stem.conv.weight)
