"""Weights in and out: published layouts give the same logits; a misfit is listed and nothing is loaded."""

import builtins
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from odenets import Stack, checkpoints
from odenets.checkpoints import load, save
from odenets.models import HOResNet, ResNet, create_model
from schemes import MixingWarning, SchemeError

# A small ResNet of each block, with a projection at every change of width.
SMALL = {"functions": (2, 3), "widths": (8, 16), "num_classes": 5, "stem": "conv7_pool"}


class Block(nn.Module):
    """A published residual block under its published names, written out plainly."""

    def __init__(self, width, planes, stride, bottleneck, project):
        super().__init__()
        out = planes * (4 if bottleneck else 1)
        if bottleneck:
            self.conv1 = nn.Conv2d(width, planes, 1, bias=False)
            self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
            self.conv3 = nn.Conv2d(planes, out, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(out)
        else:
            self.conv1 = nn.Conv2d(width, planes, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.bn2 = nn.BatchNorm2d(planes)
        if project:
            self.downsample = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "bn3"):
            y = self.bn3(self.conv3(F.relu(y)))
        return F.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class Published(nn.Module):
    """An ImageNet ResNet under torchvision's names."""

    def __init__(self, functions, widths, bottleneck, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        width = widths[0]
        self.count = len(functions)
        for level, (n, planes) in enumerate(zip(functions, widths, strict=True)):
            out = planes * (4 if bottleneck else 1)
            blocks = nn.Sequential()
            for b in range(n):
                stride = 2 if level and not b else 1
                blocks.append(Block(width, planes, stride, bottleneck, project=stride > 1 or width != out))
                width = out
            self.add_module(f"layer{level + 1}", blocks)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for level in range(self.count):
            x = getattr(self, f"layer{level + 1}")(x)
        return self.fc(x.mean((2, 3)))


class ReleasedRK4(nn.Module):
    """A fourth-order block under the names of the HO-ResNet release: eight convolutions, numbered through."""

    def __init__(self, width, planes, stride):
        super().__init__()
        for j in range(1, 9):
            first = j == 1
            self.add_module(f"bn{j}", nn.BatchNorm2d(width if first else planes))
            conv = nn.Conv2d(width if first else planes, planes, 3, stride if first else 1, 1, bias=False)
            self.add_module(f"conv{j}", conv)
        self.stride, self.pad = stride, (planes - width) // 2

    def function(self, i, x):
        for j in (2 * i + 1, 2 * i + 2):
            x = getattr(self, f"conv{j}")(F.relu(getattr(self, f"bn{j}")(x)))
        return x

    def forward(self, x):
        g = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        k1 = self.function(0, x)
        k2 = self.function(1, g + 0.5 * k1)
        k3 = self.function(2, g + 0.5 * k2)
        k4 = self.function(3, g + k3)
        return F.relu(g + k1 / 6 + k2 / 3 + k3 / 3 + k4 / 6)


class Released(nn.Module):
    """HO-ResNet for CIFAR under the names of its release."""

    def __init__(self, steps):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        width = 16
        for level, planes in enumerate((16, 32, 64)):
            blocks = nn.Sequential()
            for n in range(steps):
                blocks.append(ReleasedRK4(width, planes, 2 if level and not n else 1))
                width = planes
            self.add_module(f"layer{level + 1}", blocks)
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def fill(model):
    """Random weights and statistics that keep the numbers in range; every tensor differs from its default."""
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith("num_batches_tracked"):
                value.fill_(7)
            elif key.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.ndim > 1:
                value.normal_(std=(1 / value[0].numel()) ** 0.5)
            else:
                value.normal_(1.0 if key.endswith("weight") else 0.0, 0.2)
    return model.eval()


def quiet(name, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MixingWarning)
        return create_model(name, **kwargs)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_torchvision_weights_give_the_same_logits(block):
    source = fill(Published(SMALL["functions"], SMALL["widths"], block == "bottleneck", SMALL["num_classes"]))
    model = ResNet(**SMALL, block=block).eval()
    report = checkpoints.load(model, source.state_dict())
    assert report == (len(source.state_dict()), "torchvision", (), ())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), source(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "functions", "bottleneck", "keys"),
    [("resnet18", (2, 2, 2, 2), False, 122), ("resnet50", (3, 4, 6, 3), True, 320)],
)
def test_every_torchvision_key_of_the_named_models_has_its_place(name, functions, bottleneck, keys):
    with torch.device("meta"):
        state = Published(functions, (64, 128, 256, 512), bottleneck, 1000).state_dict()
        model = create_model(name)
    names = model.key_map(state.keys()).names
    assert len(state) == keys
    assert {names[k]: v.shape for k, v in state.items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("steps", [1, 2])
def test_released_ho_resnet_weights_give_the_same_logits(steps):
    source = fill(Released(steps))
    model = HOResNet((4 * steps,) * 3, scheme="rk4").eval()
    assert checkpoints.load(model, source.state_dict()).loaded == len(source.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x), source(x), rtol=2e-5, atol=2e-5)


def test_weights_move_between_schemes_in_order():
    x = torch.randn(2, 3, 16, 16)
    euler, rk4 = fill(create_model("ho_resnet26", scheme="euler")), create_model("ho_resnet26", scheme="rk4").eval()
    assert checkpoints.load(rk4, euler.state_dict()).layout == "own, under another scheme"
    for level in range(3):
        there = [f.conv1.weight for step in rk4.levels[level].steps for f in step.fs]
        here = [f.conv1.weight for step in euler.levels[level].steps for f in step.fs]
        assert all(torch.equal(a, b) for a, b in zip(there, here, strict=True))
    back = create_model("ho_resnet26", scheme="euler").eval()
    assert checkpoints.load(back, rk4.state_dict()).layout == "own, under another scheme"
    torch.testing.assert_close(back(x), euler(x))


@pytest.mark.parametrize("source", ["euler", "midpoint", "rk4", "leapfrog", "2*euler + midpoint"])
@pytest.mark.parametrize("target", ["euler", "midpoint", "rk4", "leapfrog", "2*euler + midpoint"])
def test_learned_step_sizes_go_to_the_same_steps_or_nothing_is_loaded(source, target):
    def sizes(net):
        return [step.h.item() for step in net.levels[0].steps]

    a, b = (HOResNet((4,), (4,), scheme=scheme, step="learned") for scheme in (source, target))
    with torch.no_grad():
        for n, step in enumerate(a.levels[0].steps):
            step.h.fill_(0.25 * (n + 1))
    before = {k: v.clone() for k, v in b.state_dict().items()}
    if [len(step.fs) for step in a.levels[0].steps] == [len(step.fs) for step in b.levels[0].steps]:
        checkpoints.load(b, a.state_dict())
        assert sizes(a) == sizes(b)
        return
    for given in (a.state_dict(), {f"net.{k}": v for k, v in a.state_dict().items()}):
        with pytest.raises(SchemeError, match=r"learned size of one of \d steps.*\n.*scheme of the file, or leave"):
            checkpoints.load(b, given)
    assert all(torch.equal(v, before[k]) for k, v in b.state_dict().items())
    # The remedy: without them the sizes are the network's own.
    checkpoints.load(b, {k: v for k, v in a.state_dict().items() if not k.endswith(".h")})
    assert set(sizes(b)) == {1.0}


def small(**kwargs):
    return HOResNet((2,), (4,), scheme="midpoint", **kwargs)


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s, "epoch": 3},
        lambda s: {"state_dict": {"module." + k: v for k, v in s.items()}},
        lambda s: {"_orig_mod." + k: v for k, v in s.items()},
        lambda s: {"module._orig_mod." + k: v for k, v in s.items()},
        lambda s: {k.replace("levels.0.", "levels.0._orig_mod."): v for k, v in s.items()},
        lambda s: {"state_dict": {"net._orig_mod." + k: v for k, v in s.items()}, "hyper_parameters": {"lr": 0.1}},
    ],
)
def test_wrappers_are_taken_off(wrap):
    source, model = fill(small()), small()
    assert checkpoints.load(model, wrap(source.state_dict())) == (len(source.state_dict()), "own", (), ())
    assert same(model, source)


def test_what_lies_beside_the_net_in_a_checkpoint_is_reported():
    source, model = fill(small()), small()
    state = {"net." + k: v for k, v in source.state_dict().items()} | {"loss.weight": torch.ones(10)}
    assert checkpoints.load(model, {"state_dict": state}).dropped == ("loss.weight",)
    averaged = {"module." + k: v for k, v in source.state_dict().items()} | {"n_averaged": torch.tensor(3)}
    assert checkpoints.load(model, averaged).dropped == ("n_averaged",)
    assert same(model, source)


def test_a_model_without_a_head_drops_the_head():
    source = fill(Published(SMALL["functions"], SMALL["widths"], False, SMALL["num_classes"]))
    features = ResNet(**{**SMALL, "num_classes": 0})
    assert checkpoints.load(features, source.state_dict()).dropped == ("fc.weight", "fc.bias")
    model = small(num_classes=0)
    assert checkpoints.load(model, fill(small()).state_dict()).dropped == ("head.weight", "head.bias")


def test_files_older_than_the_batch_counter_load():
    source, model = fill(small()), small()
    old = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    report = checkpoints.load(model, old)
    assert report.loaded == len(old) and len(report.kept) == 5 and not report.dropped
    assert torch.equal(model.stem.norm.running_var, source.stem.norm.running_var)


def test_a_learned_step_keeps_its_value_where_the_file_has_none_and_is_refused_where_the_model_has_none():
    source, model = fill(small()), small(step="learned")
    assert checkpoints.load(model, source.state_dict()).kept == ("levels.0.steps.0.h",)
    with pytest.raises(SchemeError, match=r"without a place: levels\.0\.steps\.0\.h"):
        checkpoints.load(source, model.state_dict())


@pytest.mark.parametrize(
    ("one", "other"), [("rk4", "euler"), ("rk4", "midpoint"), ("midpoint", "euler"), ("euler", "rk4")]
)
def test_learned_steps_of_other_steps_are_refused(one, other):
    source, model = (HOResNet((4, 4), (4, 4), scheme=name, step="learned") for name in (one, other))
    before = [p.clone() for p in model.state_dict().values()]
    with pytest.raises(SchemeError, match=r"levels\.0\.steps\.\d\.h is the learned size of one of \d steps, and here"):
        checkpoints.load(model, source.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))


@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_file_that_lacks_one_of_the_learned_steps_of_a_stack_is_refused(step):
    stack = Stack([nn.Linear(2, 2) for _ in range(4)], step="learned")
    state = {key: value for key, value in stack.state_dict().items() if key != f"steps.{step}.h"}
    with pytest.raises(SchemeError, match=rf"1 missing: steps\.{step}\.h"):
        checkpoints.load(stack, state)


def change(state, **changes):
    return {k: v for k, v in {**state, **changes}.items() if v is not None}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: change(s, extra=torch.ones(1)), "1 without a place: extra"),
        (lambda s: change(s, **{"head.bias": None}), "1 missing: head.bias"),
        (lambda s: change(s, **{"head.bias": torch.ones(3)}), r"head\.bias is \(3,\), want \(10,\)\.\n.*reset_class"),
        (
            lambda s: change(s, **{"stem.conv.weight": torch.ones(4, 1, 3, 3)}),
            r"is \(4, 1, 3, 3\), want \(4, 3, 3, 3\)",
        ),
        (lambda s: {"a": torch.ones(1)}, r"1 without a place: a; 27 missing: .* and 17 more"),
        (lambda s: {}, "no tensors"),
        (lambda s: change(s, lr=0.1), "entries that are no tensors: lr"),
    ],
)
def test_misfits_are_listed_and_nothing_is_loaded(spoil, message):
    model = small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(SchemeError, match=message):
        checkpoints.load(model, spoil(fill(small()).state_dict()))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layer1.2.conv1.weight", torch.ones(8, 8, 3, 3), r"without a place: layer1\.2\.conv1\.weight"),
        ("layer2.0.downsample.0.weight", None, r"missing: levels\.1\.steps\.0\.gs\.0\.conv\.weight"),
        ("layer1.0.bn1.weight", torch.ones(9), r"layer1\.0\.bn1\.weight is \(9,\), want \(8,\)"),
        ("aux.weight", torch.ones(1), r"without a place: aux\.weight"),
    ],
)
def test_misfits_of_published_layouts_carry_the_published_names(key, value, message):
    source = Published(SMALL["functions"], SMALL["widths"], False, SMALL["num_classes"])
    with pytest.raises(SchemeError, match=message):
        checkpoints.load(ResNet(**SMALL), change(source.state_dict(), **{key: value}))


def test_weights_of_another_block_are_refused():
    basic = Published(SMALL["functions"], SMALL["widths"], False, SMALL["num_classes"])
    with pytest.raises(SchemeError, match="nothing was loaded"):
        checkpoints.load(ResNet(**SMALL, block="bottleneck"), basic.state_dict())


def test_a_deeper_twin_is_refused():
    with pytest.raises(SchemeError, match="without a place"):
        checkpoints.load(create_model("ho_resnet26"), quiet("ho_resnet74").state_dict())


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".safetensors"])
def test_files_round_trip(tmp_path, suffix):
    source, model = fill(small()).to(memory_format=torch.channels_last), small()
    path = tmp_path / f"new/weights{suffix}"
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
        checkpoints.save(source, path)
    else:
        path.parent.mkdir()
        torch.save({"state_dict": source.state_dict()}, path)
    assert checkpoints.load(model, str(path)).layout == "own"
    assert same(model, source)


def test_a_shared_function_is_saved_and_loaded(tmp_path):
    pytest.importorskip("safetensors")
    f = nn.Linear(3, 3)
    net = nn.ModuleList([f, f])
    checkpoints.save(net, tmp_path / "shared.safetensors")
    other = nn.ModuleList([nn.Linear(3, 3)] * 2)
    checkpoints.load(other, tmp_path / "shared.safetensors")
    assert torch.equal(other[1].weight, f.weight)


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemError('code of a weight file was run')",))


def test_unreadable_and_unsafe_files_are_refused(tmp_path):
    model = small()
    with pytest.raises(SchemeError, match="no weight file at"):
        checkpoints.load(model, tmp_path / "nothing.pt")
    torch.save({"state_dict": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(SchemeError, match=r"holds more than tensors .* is not opened"):
        checkpoints.load(model, tmp_path / "trap.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(SchemeError, match="holds a list"):
        checkpoints.load(model, tmp_path / "list.pt")
    for name in ("empty.pt", "broken.safetensors", "broken.pt"):
        (tmp_path / name).write_bytes(b"" if name == "empty.pt" else b"PK\x03\x04 broken off")
        with pytest.raises(SchemeError, match=r"cannot be read|not opened"):
            checkpoints.load(model, tmp_path / name)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(ImportError, match=r'pip install "odenets\[train\]"'):
        checkpoints.load(small(), tmp_path / "a.safetensors")
    with pytest.raises(ImportError, match=r'pip install "odenets\[train\]"'):
        checkpoints.save(small(), tmp_path / "b.safetensors")


# --- what a file may hold, and what it may not ------------------------------------------------------------------------


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda t: t.to_sparse(), "not dense (sparse_coo)"),
        (lambda t: t.to_sparse_csr(), "not dense (sparse_csr)"),
        (lambda t: t.to("meta"), "on the meta device"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "quantised"),
        (lambda t: t + 1j, "complex64, want float32"),
        (lambda t: t.double() * 1e39, "beyond the range of float32"),
    ],
    ids=["coo", "csr", "meta", "quantised", "complex", "large"],
)
@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|quantize_per_tensor|torch.ao.quantization|deprecated).*")
def test_tensors_that_cannot_be_copied_are_refused_by_name_and_nothing_changes(make, words):
    net = two_layers()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = {k: torch.ones_like(v) for k, v in before.items()}
    state["1.weight"] = make(state["1.weight"])
    with pytest.raises(SchemeError, match=re.escape(f"1.weight is {words}")):
        load(net, state)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_numbers_of_another_type_load_equal(kind):
    net = two_layers()
    state = {k: (torch.arange(v.numel()).view(v.shape) % 2).to(kind) for k, v in net.state_dict().items()}
    state["0.bias"] = torch.tensor([float("nan"), float("inf")])
    load(net, state)
    for k, v in net.state_dict().items():
        assert torch.equal(v.nan_to_num(7), state[k].float().nan_to_num(7))


def test_a_model_without_memory_is_refused():
    with torch.device("meta"):
        net = nn.Linear(2, 2)
    with pytest.raises(SchemeError, match="to_empty"):
        load(net, nn.Linear(2, 2).state_dict())


@pytest.mark.parametrize(
    ("raw", "averaged"), [("model", "model_ema"), ("state_dict", "state_dict_ema"), ("net", "ema")]
)
def test_averaged_weights_are_taken_and_it_is_said(tmp_path, raw, averaged):
    net = nn.Linear(2, 2)
    state = {k: torch.ones_like(v) for k, v in net.state_dict().items()}
    torch.save({raw: {k: 0 * v for k, v in state.items()}, averaged: state, "epoch": 3}, tmp_path / "w.pth")
    report = load(net, tmp_path / "w.pth")
    assert (net.weight == 1).all() and report.dropped == (f"{raw} (raw; the averaged {averaged} is loaded)",)
    assert load(net, {raw: state, averaged: {}}).dropped == ()


def test_harmless_types_of_published_files_load_and_code_does_not(tmp_path):
    import argparse
    from pathlib import Path, PurePosixPath
    from types import SimpleNamespace

    import numpy as np

    state = nn.Linear(2, 2).state_dict()
    beside = {
        "args": argparse.Namespace(lr=0.1, out=Path("x"), opts=[1]),
        "more": SimpleNamespace(a=PurePosixPath("y")),
        "best": np.float64(0.5),
        "epoch": np.int64(3),
    }
    torch.save({"model": state, **beside}, tmp_path / "w.pth")
    assert load(nn.Linear(2, 2), tmp_path / "w.pth").loaded == 2
    torch.save({"model": state, "code": print}, tmp_path / "w.pth")
    with pytest.raises(SchemeError, match="more than tensors"):
        load(nn.Linear(2, 2), tmp_path / "w.pth")


@pytest.mark.parametrize("kind", ["pth", "old.pth", "safetensors"])
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_an_error_of_ours_and_changes_nothing(tmp_path, kind):
    import random

    net, path = two_layers(), tmp_path / f"w.{kind}"
    before = {k: v.clone() for k, v in net.state_dict().items()}
    if kind == "safetensors":
        save(net, path)
    else:
        torch.save({"state_dict": before}, path, _use_new_zipfile_serialization=kind == "pth")
    whole, draw = path.read_bytes(), random.Random(0)
    refused = 0
    for trial in range(150):
        data = bytearray(whole)
        if trial % 3 == 0:
            del data[draw.randrange(len(data)) :]
        else:
            for _ in range(draw.choice((1, 4, 30))):
                data[draw.randrange(min(len(data), 900 if trial % 3 == 1 else len(data)))] = draw.randrange(256)
        path.write_bytes(bytes(data))
        target = two_layers()
        try:
            load(target, path)
        except SchemeError:
            refused += 1
            assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())
    assert refused > 60


@pytest.mark.parametrize("held", [{1: torch.zeros(2)}, {"a": [1]}, {"state_dict": {"a": "b"}}, {"model": {}}, {}])
def test_what_is_no_state_dict_is_refused(held):
    with pytest.raises(SchemeError, match="want a state dict"):
        load(nn.Linear(2, 2), held)


@pytest.mark.parametrize("first", ["state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("other", ["model", "net", "params"])
def test_weights_beside_those_that_are_loaded_are_reported(first, other):
    if first == other:
        return
    source, model = fill(small()), small()
    report = checkpoints.load(model, {first: source.state_dict(), other: {"inner": small().state_dict()}})
    assert report.dropped == (f"{other} (beside {first}, which is loaded)",) and same(model, source)
    # Options are no weights.
    assert not checkpoints.load(model, {first: source.state_dict(), other: {"lr": 0.1, "name": "small"}}).dropped
