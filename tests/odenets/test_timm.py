"""The models under timm's registry: built, cut, fed and loaded as timm does with its own."""

import functools
import warnings

import pytest
import torch
from test_every_model import families, shrunk
from vision import vision

from odenets import create_model, list_models
from odenets.models import catalogue
from schemes import MixingWarning, SchemeError

pytestmark = pytest.mark.torchvision
every_family = pytest.mark.parametrize("name", list(families().values()), ids=list(families()))


@functools.cache
def timm():
    found = vision("timm")
    __import__("odenets.timm")
    return found


def small(name, **options):
    """A small network of a family, built by timm."""
    given = {k: v for k, v in shrunk(name).items() if k not in ("num_classes", "in_chans", "global_pool")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MixingWarning)
        return timm().create_model(f"odenets_{name}", **{"num_classes": 5, **given, **options})


def pictures(net, n=2, chans=3):
    side = 2 * max(net.feature_info[i]["reduction"] for i in range(len(net.feature_info)))
    return torch.randn(n, chans, side, side, generator=torch.Generator().manual_seed(1))


def test_every_model_has_a_name_there():
    assert sorted(timm().list_models("odenets_*")) == sorted(f"odenets_{n}" for n in list_models())
    tags = {f"odenets_{n}.{w.tag}" for n in list_models() for w in catalogue.published_weights(n)}
    assert set(timm().list_pretrained("odenets_*")) == tags


@every_family
def test_a_network_is_what_its_configuration_says(name):
    net = small(name).eval()
    config = net.default_cfg
    assert config["architecture"] == f"odenets_{name}" and len(config["mean"]) == len(config["std"]) == 3
    assert net.get_submodule(config["classifier"]) is net.get_classifier() or config["classifier"] == "head.fc"
    if config["first_conv"]:
        assert net.get_submodule(config["first_conv"]).in_channels == 3
    x = pictures(net)
    with torch.no_grad():
        assert net(x).shape == (2, 5)
        features = net.forward_features(x)
        torch.testing.assert_close(net.forward_head(features), net(x))
        assert net.forward_head(features, pre_logits=True).shape == (2, net.head_hidden_size)
        net.reset_classifier(0)
        assert net(x).shape == (2, net.num_features)
        net.reset_classifier(0, "")
        torch.testing.assert_close(net(x), features)
    torch.nn.Module.load_state_dict(small(name), small(name).state_dict())


@every_family
def test_other_channels(name):
    net = small(name, in_chans=1).eval()
    with torch.no_grad():
        assert net(pictures(net, chans=1)).shape == (2, 5)


@every_family
def test_features_only(name):
    net = small(name, features_only=True).eval()
    x = pictures(net)
    with torch.no_grad():
        maps = net(x)
    assert [m.shape[1] for m in maps] == net.feature_info.channels()
    assert [x.shape[2] // m.shape[2] for m in maps] == net.feature_info.reduction()
    last = small(name, features_only=True, out_indices=(-1,)).eval()
    assert last.feature_info.channels() == net.feature_info.channels()[-1:] and len(last(x)) == 1


@every_family
def test_gradients_reach_every_parameter_with_checkpointing_too(name):
    net = small(name).train()
    net.set_grad_checkpointing()
    net(pictures(net)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@every_family
def test_layers_are_grouped_by_depth(name):
    net = small(name)
    layers = __import__("timm.models", fromlist=["x"]).group_parameters(net, net.group_matcher())
    assert sorted(key for group in layers.values() for key in group) == sorted(k for k, _ in net.named_parameters())
    assert len(layers) >= 3 and all(key.startswith("head") for key in layers[len(layers) - 1])
    optim = __import__("timm.optim", fromlist=["x"])
    groups = optim.param_groups_layer_decay(net, 0.05, net.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    undecayed = {id(p) for g in groups if not g["weight_decay"] for p in g["params"]}
    named = dict(net.named_parameters())
    assert scale[id(named[f"{net.classifier}.weight"])] == 1.0 == max(scale.values())
    assert {id(named[key]) for key in net.no_weight_decay()} <= undecayed


def test_published_weights_are_placed_under_our_names(tmp_path):
    models = vision("torchvision").models
    there = models.resnet18(num_classes=1000).eval()
    file = tmp_path / "resnet18.pth"
    torch.save(there.state_dict(), file)
    net = timm().create_model("odenets_resnet18", pretrained=True, pretrained_cfg_overlay={"file": str(file)}).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(net(x), there(x), rtol=1e-4, atol=1e-5)
        ten = timm().create_model(
            "odenets_resnet18", pretrained=True, num_classes=10, pretrained_cfg_overlay={"file": str(file)}
        )
        assert ten.eval()(x).shape == (1, 10)
        torch.testing.assert_close(ten.forward_features(x), net.forward_features(x))


@pytest.mark.parametrize("name", ["resnet18", "revcol_tiny"])
def test_encoders_of_segmentation_models(name):
    smp = vision("segmentation_models_pytorch")
    timm()
    net = smp.Unet(f"tu-odenets_{name}", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8), classes=2)
    with torch.no_grad():
        assert net.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 2, 64, 64)


def test_torchvisions_feature_extractor_traces_a_network_at_its_first_call():
    extract = vision("torchvision").models.feature_extraction.create_feature_extractor
    net = create_model("resnet20").eval()
    names = {f"levels.{i}.steps.2.fs.0.norm2": str(i) for i in range(3)}
    with torch.no_grad():
        found = extract(net, names)(torch.randn(1, 3, 32, 32))
    assert [found[str(i)].shape[1:] for i in range(3)] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_tensors_are_reshaped_as_load_reshapes_them():
    """Only where axes of length 1 are all that differs; any other shape is left to timm, which refuses it."""
    timm()
    from odenets.timm import renamed

    net = create_model("convnext_tiny", functions=(1,), widths=(8,), num_classes=0)
    key = "downsample_layers.0.0.weight"
    for shape in ((8, 12, 2, 2), (3, 8, 4, 4), (8, 3, 16)):
        assert [v.shape for v in renamed({key: torch.zeros(shape)}, net).values()] == [shape]
    assert renamed({key: torch.zeros(8, 3, 4, 4, 1)}, net)["stem.conv.weight"].shape == (8, 3, 4, 4)


def test_pictures_that_are_no_squares_are_refused():
    with pytest.raises(SchemeError, match=r"img_size is \(32, 48\).*\n.*Give one side"):
        timm().create_model("odenets_vit_tiny_patch16", img_size=(32, 48), depth=1, dim=12, heads=3)
    net = timm().create_model("odenets_vit_tiny_patch16", img_size=(32, 32), depth=1, dim=12, heads=3)
    assert net.stem.grid == 2
