"""Weights from published keys to ours and back: bit by bit, or refused whole."""

import copy

import pytest
import torch
from published_nets import ConvNeXt, DenseNet, Isotropic, RDNet, fill

from odenets import checkpoints, layouts, models
from odenets.checkpoints import KeyMap
from odenets.models import ResNet
from schemes import SchemeError


def torchvision_keys(functions=(3, 3, 3), widths=(16, 32, 64), classes=10):
    """A ResNet of basic blocks under torchvision's names, with random numbers."""
    state = {"conv1.weight": torch.randn(widths[0], 3, 3, 3)}

    def norm(name, width):
        for part in ("weight", "bias", "running_mean"):
            state[f"{name}.{part}"] = torch.randn(width)
        state[f"{name}.running_var"] = torch.rand(width) + 0.5
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    norm("bn1", widths[0])
    before = widths[0]
    for level, (count, width) in enumerate(zip(functions, widths, strict=True), 1):
        for block in range(count):
            name = f"layer{level}.{block}"
            state[f"{name}.conv1.weight"] = torch.randn(width, before, 3, 3)
            state[f"{name}.conv2.weight"] = torch.randn(width, width, 3, 3)
            norm(f"{name}.bn1", width)
            norm(f"{name}.bn2", width)
            if before != width:
                state[f"{name}.downsample.0.weight"] = torch.randn(width, before, 1, 1)
                norm(f"{name}.downsample.1", width)
            before = width
    state |= {"fc.weight": torch.randn(classes, before), "fc.bias": torch.randn(classes)}
    return state


def resnet(classes=10):
    return ResNet((3, 3, 3), (16, 32, 64), num_classes=classes, stem="conv3", shortcut="projection")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_there_and_back_again_bit_by_bit():
    state = torchvision_keys()
    own = layouts.to_own(resnet(), state)
    assert own.layout == "own" and own.tensors.keys() == resnet().state_dict().keys()
    other = resnet()
    checkpoints.load(other, own.tensors)
    back = layouts.to_layout(other, torchvision_keys())
    assert back.layout == "torchvision" and back.left == () and equal(back.tensors, state)
    # From under wrappers too: what is written is the layout, not what was about it.
    wrapped = {"state_dict": {f"module.{k}": v for k, v in torchvision_keys().items()}}
    assert equal(layouts.to_layout(other, wrapped).tensors, state)


def test_another_number_of_classes_goes_back():
    other = resnet(4)
    back = layouts.to_layout(other, torchvision_keys(classes=10))
    assert back.tensors["fc.weight"].shape == (4, 64)
    assert equal(back.tensors, layouts.to_layout(other, torchvision_keys(classes=4)).tensors)


def test_a_model_without_a_head_leaves_the_head_out():
    back = layouts.to_layout(resnet(0), torchvision_keys())
    assert set(back.left) == {"fc.weight", "fc.bias"} and not set(back.left) & set(back.tensors)


TINY_DENSE = {"functions": (2, 3), "growth": 4, "num_classes": 5, "stem": "conv3"}
TINY_RD = {"growths": (8, 16, 8, 8), "downsample": (False, True, True, False), "init_channels": 16, "num_classes": 5}
FAMILIES = {
    **{
        layout: (
            lambda layout=layout: ConvNeXt(layout, (1, 2, 1, 1), (8, 16, 24, 32), 5),
            lambda: models.ConvNeXt((1, 2, 1, 1), (8, 16, 24, 32), num_classes=5),
        )
        for layout in ("facebookresearch", "timm", "torchvision")
    },
    "facebookresearch isotropic": (
        lambda: Isotropic(3, 16, 5, True),
        lambda: models.ConvNeXt((3,), (16,), patch=16, stem_norm=False, layer_scale=1e-6, num_classes=5),
    ),
    "gpleiss": (
        lambda: DenseNet("gpleiss", (2, 3), 4, 8, 5, True, 0.5),
        lambda: models.DenseNet(**TINY_DENSE),
    ),
    "andreasveit": (
        lambda: DenseNet("andreasveit", (2, 3), 4, 8, 5, True, 0.5),
        lambda: models.DenseNet(**TINY_DENSE),
    ),
    "rdnet of timm": (
        lambda: RDNet(False, 16, (8, 16, 8, 8), (0, 1, 1, 0), 5),
        lambda: models.RDNet(**TINY_RD),
    ),
    "naver-ai": (
        lambda: RDNet(True, 16, (8, 16, 8, 8), (0, 1, 1, 0), 5),
        lambda: models.RDNet(**TINY_RD),
    ),
}


# RDNet's two layouts differ in an epsilon: that of the one which is not the model's own would be forgotten.
REFUSED = "naver-ai"


@pytest.mark.parametrize("layout", FAMILIES)
def test_every_family_goes_there_and_back_or_is_refused(layout):
    published, build = FAMILIES[layout]
    state = fill(published()).state_dict()
    if layout == REFUSED:
        for convert in (layouts.to_own, layouts.to_layout):
            with pytest.raises(SchemeError, match=r"head_norm\.eps"):
                convert(build(), state)
        return
    own = layouts.to_own(build(), state)
    net = build()
    assert checkpoints.load(net, own.tensors).layout == "own"
    back = layouts.to_layout(net, fill(published()).state_dict())
    assert back.layout == layout.removeprefix("rdnet of ") and back.left == () and equal(back.tensors, state)


def test_a_learned_step_size_is_not_dropped():
    net = ResNet((3, 3, 3), (16, 32, 64), num_classes=10, stem="conv3", step="learned")
    with pytest.raises(SchemeError, match=r"levels\.0\.steps\.0\.h is not in it"):
        layouts.to_layout(net, torchvision_keys())


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda s: s.pop("layer1.1.bn2.weight"), "levels.0.steps.1.fs.0.norm2.weight is not in it"),
        (lambda s: s.update(more=torch.zeros(1)), "more has no place"),
        (
            lambda s: s.update({"layer1.0.conv2.weight": torch.zeros(16, 16, 5, 5)}),
            "(16, 16, 5, 5), here (16, 16, 3, 3)",
        ),
        (lambda s: s.update({"fc.weight": torch.zeros(10, 63)}), "(10, 63), here (10, 64)"),
    ],
)
def test_a_file_of_another_model_is_refused(spoil, said):
    like = torchvision_keys()
    spoil(like)
    with pytest.raises(SchemeError) as e:
        layouts.to_layout(resnet(), like)
    assert said in str(e.value)


def test_a_number_that_no_tensor_holds_is_not_lost():
    """A layout may imply an epsilon: a file of weights under other keys would forget it."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(2)

        def key_map(self, keys):
            return KeyMap("other", {"n.weight": "norm.weight", "n.bias": "norm.bias"}, {"norm.eps": 1e-6})

    like = {"n.weight": torch.ones(2), "n.bias": torch.zeros(2)}
    for convert in (layouts.to_own, layouts.to_layout):
        with pytest.raises(SchemeError, match=r"implies norm\.eps = 1e-06"):
            convert(Net(), like)
    net = Net()
    for _ in range(2):
        with pytest.raises(SchemeError, match=r"implies norm\.eps = 1e-06"):
            layouts.to_own(net, {**like, "n.weight": torch.full((2,), 3.0)})
        assert net.norm.eps == 1e-5 and equal(net.state_dict(), Net().state_dict())
    # Nor does an earlier load make the layout's number the model's own.
    checkpoints.load(net, like)
    assert net.norm.eps == 1e-6
    with pytest.raises(SchemeError, match=r"implies norm\.eps = 1e-06"):
        layouts.to_own(net, like)
    net = Net()
    net.norm.eps = 1e-6
    assert layouts.to_layout(net, like).tensors.keys() == like.keys()


@pytest.mark.parametrize(
    "wrap", [lambda net: net, torch.nn.Sequential, copy.deepcopy], ids=["bare", "inside", "copied"]
)
def test_a_number_of_earlier_weights_neither_stays_nor_is_lost_in_a_file(tmp_path, wrap):
    published, build = FAMILIES["naver-ai"]
    state, timm = fill(published()).state_dict(), fill(FAMILIES["rdnet of timm"][0]()).state_dict()
    net, x = build().eval(), torch.randn(2, 3, 64, 64)
    checkpoints.load(net, state)
    assert net.head_norm.eps == 1e-5
    with pytest.raises(SchemeError, match=r"head_norm\.eps = 1e-05.* was built with 1e-06.*\n.*head_norm_eps=1e-05"):
        checkpoints.save(wrap(net), tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())
    # The remedy: built with it, the network goes out and in.
    again, other = (models.RDNet(**TINY_RD, head_norm_eps=1e-5).eval() for _ in range(2))
    checkpoints.load(again, state)
    checkpoints.save(wrap(again), tmp_path / "net.safetensors")
    if wrap is not torch.nn.Sequential:
        checkpoints.load(other, tmp_path / "net.safetensors")
        assert torch.equal(other(x), net(x))
    # Other weights: the number is the one with which the network was built, or that of their layout.
    for given, eps in ((build().state_dict(), 1e-6), (timm, 1e-6), (state, 1e-5), (build().state_dict(), 1e-6)):
        checkpoints.load(net, given)
        assert net.head_norm.eps == eps
    checkpoints.save(wrap(net), tmp_path / "net.safetensors")
    checkpoints.load(again, timm)
    assert again.head_norm.eps == 1e-6
    with pytest.raises(SchemeError, match="was built with 1e-05"):
        checkpoints.save(wrap(again), tmp_path / "net.safetensors")
    net.head_norm.eps = 1e-3  # changed by hand, it stays
    checkpoints.load(net, build().state_dict())
    assert net.head_norm.eps == 1e-3
