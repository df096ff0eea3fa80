"""The models in transformers: saved, loaded, fed and cut as transformers does with its own."""

import functools
import json
import warnings

import pytest
import torch
from test_every_model import families, shared, shrunk

from odenets import checkpoints
from odenets.continuous import fields_of
from schemes import MixingWarning, SchemeError

transformers = pytest.importorskip("transformers", reason='needs transformers: pip install "odenets[hf]"')
hf = pytest.importorskip("odenets.hf")
pytestmark = pytest.mark.cases(3)
every_family = pytest.mark.parametrize("name", list(families().values()), ids=list(families()))


@functools.cache
def options(name):
    given = {k: v for k, v in shrunk(name).items() if k not in ("num_classes", "in_chans", "global_pool", "backprop")}
    return json.loads(json.dumps(given))  # as a file holds them: lists, no tuples


def config(name, **more):
    side = 2 * shared(name).feature_info[-1]["reduction"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MixingWarning)
        given = {key: value for key, value in options(name).items() if key not in more}
        size = {} if "size" in given else {"image_size": side}
        return hf.OdenetsConfig(name=name, options=given, **size, **{"num_labels": 5, **more})


def classifier(name, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MixingWarning)
        torch.manual_seed(0)
        return hf.OdenetsForImageClassification(config(name, **more)).eval()


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def pictures(net, n=2):
    side = net.config.image_size
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


@every_family
def test_a_classifier_goes_out_and_in(name, tmp_path):
    net = classifier(name)
    net.net.load_state_dict(shared(name).state_dict())
    x = pictures(net)
    net.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= {
        p.name for p in tmp_path.iterdir()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MixingWarning)
        loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        want = net(x)
        assert torch.equal(want.logits, shared(name)(x)) and torch.equal(loaded(x).logits, want.logits)
        assert all(
            map(
                torch.equal,
                loaded(x, output_hidden_states=True).hidden_states,
                shared(name).forward_intermediates(x)[1],
            )
        )
        assert torch.equal(net(x, return_dict=False)[0], want.logits)
    # The keys are those of the library, after a prefix that it knows.
    checkpoints.load(classifier(name).net, {k.removeprefix("net."): v for k, v in net.state_dict().items()})


@every_family
def test_a_backbone_reads_what_a_classifier_wrote(name, tmp_path):
    net = classifier(name)
    x = pictures(net)
    net.save_pretrained(tmp_path)
    stages = net.config.stage_names[1:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MixingWarning)
        backbone, report = transformers.AutoBackbone.from_pretrained(
            tmp_path, out_features=stages, output_loading_info=True
        )
        backbone.eval()
        assert not report["missing_keys"] and not any("head." in key for key in report["unexpected_keys"])
        assert type(backbone) is hf.OdenetsBackbone
        first = hf.OdenetsBackbone.from_pretrained(tmp_path, out_features=stages[:1]).eval()
        given = transformers.AutoConfig.from_pretrained(tmp_path)
        assert type(transformers.AutoBackbone.from_config(given)) is hf.OdenetsBackbone
    with torch.no_grad():
        want = net.net.forward_intermediates(x, intermediates_only=True)
        for got, maps in ((backbone(x).feature_maps, want), (first(x).feature_maps, want[:1])):
            assert len(got) == len(maps) and all(map(torch.equal, got, maps))
    assert backbone.channels == [m.shape[1] for m in want]
    backbone.train()
    sum(m.square().mean() for m in backbone(x).feature_maps).backward()
    with pytest.raises(SchemeError, match="the stem gives no map; want of stage1"):
        hf.OdenetsBackbone(config(name, out_features=["stem"]))


def test_stages_are_numbered_from_the_end_too():
    for numbers, maps in (([-1], [2]), ([1, -1], [0, 2]), ([-3, -2], [0, 1])):
        net = hf.OdenetsBackbone(config("resnet20", out_indices=numbers)).eval()
        assert list(net.rows) == maps and len(net(torch.randn(1, 3, 16, 16)).feature_maps) == len(maps)


def test_other_backbones_are_asked_for_as_before(tmp_path, monkeypatch):
    """A folder of another model, and a name: what transformers would have done with them is done."""
    asked = []
    monkeypatch.setattr(hf, "_from_hub", lambda *args, **kwargs: asked.append((args, kwargs)))
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    transformers.AutoBackbone.from_pretrained(tmp_path, out_indices=[1])
    transformers.AutoBackbone.from_pretrained("owner/name")
    assert asked == [((tmp_path,), {"out_indices": [1]}), (("owner/name",), {})]


def test_weights_that_no_file_holds_are_drawn_as_the_library_draws(tmp_path):
    net = classifier("resnet20")
    net.save_pretrained(tmp_path)
    loaded = hf.OdenetsForImageClassification.from_pretrained(
        tmp_path, id2label={i: str(i) for i in range(7)}, ignore_mismatched_sizes=True
    )
    assert loaded.net.head.weight.shape == (7, net.net.num_features) and loaded.net.num_classes == 7
    like = net.net.head.weight.std()
    assert 0.7 * like < loaded.net.head.weight.std() < 1.4 * like
    other = {k: v for k, v in loaded.state_dict().items() if "head" not in k}
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in other.items())


def loaded(folder, **given):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MixingWarning)
        return hf.OdenetsForImageClassification.from_pretrained(folder, output_loading_info=True, **given)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("source", "target"), [("euler", "midpoint"), ("rk4", "euler"), ("euler", "2*euler + midpoint")]
)
def test_another_scheme_gets_the_functions_in_their_order(source, target, suffix, tmp_path):
    given = {"functions": [4, 4, 4], "widths": [4, 8, 8]}
    net = hf.OdenetsForImageClassification(hf.OdenetsConfig(name="resnet20", options=given, scheme=source))
    net.save_pretrained(tmp_path)
    if suffix == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    found, report = loaded(tmp_path, scheme=target)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    want = hf.OdenetsConfig(name="resnet20", options=given, scheme=target).build(10)
    checkpoints.load(want, net.net.state_dict())
    assert same(found.net, want)
    maps, report = hf.OdenetsBackbone.from_pretrained(
        tmp_path, scheme=target, out_features=["stage1"], output_loading_info=True
    )
    assert not report["missing_keys"]
    assert all(torch.equal(v, want.state_dict()[k]) for k, v in maps.net.state_dict().items())


def test_functions_without_a_place_are_refused(tmp_path):
    given = {"functions": [4, 4, 4], "widths": [4, 8, 8]}
    net = hf.OdenetsForImageClassification(hf.OdenetsConfig(name="resnet20", options={**given, "step": "learned"}))
    net.save_pretrained(tmp_path)
    with pytest.raises(SchemeError, match=r"level 1 of the file has 4 residual functions, here 6 in other steps"):
        loaded(tmp_path, scheme="midpoint", options={**given, "functions": [6, 6, 6]})
    with pytest.raises(SchemeError, match=r"learned size of one of 4 steps"):
        loaded(tmp_path, scheme="midpoint")
    # Under the same scheme the first functions are the file's, and the others new.
    found, report = loaded(tmp_path, options={**given, "functions": [6, 6, 6], "step": "learned"})
    assert {key.split(".")[4] for key in report["missing_keys"]} == {"4", "5"}
    ours = found.net.state_dict()
    assert all(torch.equal(v, ours[k]) for k, v in net.net.state_dict().items())


@pytest.mark.parametrize("scheme", ["euler", "midpoint", "revnet"])
def test_weights_that_are_functions_of_depth_go_out_and_in(scheme, tmp_path):
    given = {"functions": [4, 4, 4], "widths": [4, 8, 8], "continuous": 2}
    net = hf.OdenetsForImageClassification(hf.OdenetsConfig(name="resnet20", options=given, scheme=scheme)).eval()
    fields = fields_of(net)
    with torch.no_grad():
        for field in fields:
            for c in field.coefficients().values():
                c.normal_()
    for knots in (2, 4):  # also of a field that was refined in training
        for field in fields:
            field.change(field.space.refined(knots))
        net.save_pretrained(tmp_path)
        found, report = loaded(tmp_path)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert same(found.net, net.net) and [f.space for f in fields_of(found)] == [f.space for f in fields]
        x = pictures(net)
        with torch.no_grad():
            assert torch.equal(found(x).logits, net(x).logits)
    with pytest.raises(SchemeError, match=r"weights are functions on .*, and those of the file on"):
        loaded(tmp_path, options={**given, "functions": [6, 6, 6]})


def test_a_number_that_the_weights_imply_is_not_lost(tmp_path):
    name = families()["RDNet"]
    net = classifier(name)
    checkpoints.set_implied(net.net, {"head_norm.eps": 1e-5})
    with pytest.raises(SchemeError, match=r"head_norm\.eps = 1e-05.*\n.*head_norm_eps=1e-05"):
        net.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    net = hf.OdenetsForImageClassification(
        hf.OdenetsConfig(name=name, options={**options(name), "head_norm_eps": 1e-5}, image_size=64)
    )
    checkpoints.set_implied(net.net, {"head_norm.eps": 1e-5})
    net.save_pretrained(tmp_path)
    assert loaded(tmp_path)[0].net.head_norm.eps == 1e-5


@pytest.mark.parametrize("family", ["DenseNet", "ResNet", "RevNet"])
def test_buffers_that_no_file_holds_are_those_of_a_new_network(family, tmp_path, monkeypatch):
    """A file of the weights alone: running statistics are those before any training, not whatever memory holds."""
    net = classifier(families()[family])
    new = {key: b.clone() for key, b in net.net.named_buffers()}
    for b in net.net.buffers():
        b.fill_(3)
    kept = {key for key, _ in net.named_parameters()}
    net.save_pretrained(tmp_path, state_dict={k: v for k, v in net.state_dict().items() if k in kept})
    # What an allocator may return, made certain.
    monkeypatch.setattr(torch, "empty_like", lambda x, **kwargs: torch.full_like(x, 7, **kwargs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MixingWarning)
        loaded = hf.OdenetsForImageClassification.from_pretrained(tmp_path)
    found = dict(loaded.net.named_buffers())
    assert found.keys() == new.keys() and all(torch.equal(b, new[key]) for key, b in found.items())
    weights = dict(net.net.named_parameters())
    assert all(torch.equal(p, weights[key]) for key, p in loaded.net.named_parameters())


def test_scheme_and_mode_are_part_of_the_configuration(tmp_path):
    net = classifier("convnext_base", scheme="bdia", backprop="exact", id2label={0: "cat", 1: "dog"}, num_labels=None)
    assert {str(level.backprop) for level in net.net.levels} == {"exact"} and net.config.num_labels == 2
    net.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert {str(level.scheme) for level in loaded.net.levels} == {"bdia"} and loaded.config.id2label[1] == "dog"
    assert "`bdia`" in (tmp_path / "README.md").read_text()
    other = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path, scheme="euler", backprop="checkpoint"
    )
    assert {str(level.backprop) for level in other.net.levels} == {"checkpoint"}
    # What is asked for when a file is loaded replaces what its options hold.
    given = hf.OdenetsConfig(name="resnet20", options={"scheme": "euler", "backprop": "store"})
    again = hf.OdenetsConfig.from_dict(given.to_dict(), scheme="leapfrog", backprop="checkpoint")
    assert (again.scheme, again.backprop, again.options) == ("leapfrog", "checkpoint", {})
    with pytest.raises(SchemeError, match="there is no model named 'resnet21'"):
        hf.OdenetsConfig(name="resnet21")


def test_the_default_number_of_labels_is_the_models():
    assert hf.OdenetsConfig(name="resnet20").num_labels == 10
    assert hf.OdenetsConfig(name="resnet20", num_labels=3).num_labels == 3


SMALL_VIT = {"depth": 1, "dim": 16, "heads": 2, "patch": 8}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"options": {"num_classes": 5}}, r"num_classes=5, which is num_labels here\.\n  Give num_labels=5"),
        ({"options": {"in_chans": 1}}, r"in_chans=1, which is num_channels here\.\n  Give num_channels=1"),
        ({"options": {"scheme": "leapfrog"}, "scheme": "euler"}, r"scheme is 'euler', and options hold scheme='leap"),
        ({"options": {"backprop": "store"}, "backprop": "checkpoint"}, r"backprop is 'checkpoint', and options hold"),
        ({"options": {"size": 32}, "image_size": 64}, r"image_size is 64, and options hold size=32\.\n  Give one of"),
    ],
)
def test_one_setting_has_one_source(given, said, tmp_path):
    name = "vit_tiny_patch16" if "size" in given["options"] else "resnet20"
    with pytest.raises(SchemeError, match=said):
        hf.OdenetsConfig(name=name, **given)
    # Nor do two sources come together when a file is loaded, or later.
    first = hf.OdenetsConfig(name=name, **{k: v for k, v in given.items() if k != "options"})
    hf.OdenetsForImageClassification(first).save_pretrained(tmp_path)
    with pytest.raises(SchemeError, match=said):
        loaded(tmp_path, options=given["options"])
    first.options = given["options"]
    with pytest.raises(SchemeError, match=said):
        first.build(3)


def test_the_side_of_the_pictures_is_that_of_the_network(tmp_path):
    from PIL import Image

    for size in (32, 48):
        config = hf.OdenetsConfig(name="vit_tiny_patch16", options={**SMALL_VIT, "size": size})
        net = hf.OdenetsForImageClassification(config)
        pixels = hf.OdenetsImageProcessor.of(config)(Image.new("RGB", (80, 60)), return_tensors="pt")["pixel_values"]
        assert config.image_size == size == net.net.stem.grid * 8 and pixels.shape[2:] == (size, size)
    net.save_pretrained(tmp_path)
    smaller = transformers.AutoConfig.from_pretrained(tmp_path, options={**SMALL_VIT, "size": 32})
    assert smaller.image_size == 32
    assert transformers.AutoConfig.from_pretrained(tmp_path, image_size=48).image_size == 48


def test_options_that_are_replaced_take_with_them_what_follows(tmp_path):
    hf.OdenetsForImageClassification(hf.OdenetsConfig(name="resnet20", image_size=40)).save_pretrained(tmp_path)
    given = {"widths": [4, 8, 12], "functions": [1, 1, 1]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = hf.OdenetsBackbone.from_pretrained(
            tmp_path, options=given, out_features=["stage1", "stage3"], ignore_mismatched_sizes=True
        )
    assert net.config.channels_of_maps == [4, 8, 12] and net.channels == [4, 12] and net.config.image_size == 40
    assert [m.shape[1] for m in net(torch.randn(1, 3, 32, 32)).feature_maps] == net.channels


@pytest.mark.parametrize("kind", ["OdenetsForImageClassification", "OdenetsBackbone"])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_what_a_call_does_not_say_the_configuration_says(kind, hidden, whole):
    given = {"output_hidden_states": hidden, "return_dict": whole}
    x = torch.randn(1, 3, 16, 16)
    outputs = []
    for config, call in ((given, {}), ({k: not v for k, v in given.items()}, given)):
        net = getattr(hf, kind)(hf.OdenetsConfig(name="resnet20", options=options("resnet20"), **config)).eval()
        outputs.append(net(x, **call))
    for out in outputs:
        assert isinstance(out, tuple) is not whole
        assert len(out) == 1 + hidden if not whole else (out.hidden_states is not None) is hidden


def test_checkpointing_reaches_the_stacks():
    net = classifier("resnet20")
    net.gradient_checkpointing_enable()
    assert {str(level.backprop) for level in net.net.levels} == {"checkpoint"}
    net.gradient_checkpointing_disable()
    assert {str(level.backprop) for level in net.net.levels} == {"store"}


def test_a_picture_goes_through_the_pipeline_of_a_folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    net = classifier("resnet20", id2label={i: f"class {i}" for i in range(5)}, num_labels=None)
    net.save_pretrained(tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor) is hf.OdenetsImageProcessor
    picture = image.effect_noise((50, 40), 80).convert("RGB")
    side = net.config.image_size
    x = processor(picture, return_tensors="pt")["pixel_values"]
    # By hand: the shorter side to side / 0.875, the middle, [0, 1], mean and deviation.
    short = round(side / 0.875)
    resized = picture.resize((int(short * 50 / 40), short), image.Resampling.BICUBIC)
    left, top = (resized.width - side) // 2, (resized.height - side) // 2
    cut = resized.crop((left, top, left + side, top + side))
    want = torch.tensor(list(cut.tobytes())).view(side, side, 3).permute(2, 0, 1) / 255
    want = (want - torch.tensor(hf.IMAGENET_MEAN)[:, None, None]) / torch.tensor(hf.IMAGENET_STD)[:, None, None]
    assert (x[0] - want).abs().max() < 1e-5
    classify = transformers.pipeline("image-classification", model=str(tmp_path), image_processor=processor, top_k=5)
    found = {row["label"]: row["score"] for row in classify(picture)}
    with torch.no_grad():
        scores = net(x).logits.softmax(-1)[0]
    assert all(abs(found[f"class {i}"] - float(p)) < 1e-4 for i, p in enumerate(scores))
    folder = transformers.pipeline("image-classification", model=str(tmp_path))
    assert [row["label"] for row in folder(picture)] == sorted(found, key=found.get, reverse=True)[:5]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_processor_gives_the_channels_of_the_model(channels, mode, tmp_path):
    from PIL import Image

    net = hf.OdenetsForImageClassification(hf.OdenetsConfig(name="resnet20", num_channels=channels)).eval()
    net.save_pretrained(tmp_path)
    grey = Image.effect_noise((50, 50), 80)
    for processor in (
        hf.OdenetsImageProcessor.of(net.config),
        transformers.AutoImageProcessor.from_pretrained(tmp_path),
    ):
        x = processor(grey.convert(mode), return_tensors="pt")["pixel_values"]
        assert x.shape == (1, channels, 32, 32) and net(x).logits.shape == (1, 10)
        # The same picture, whatever its mode: grey, with a mean for each channel.
        want = processor(grey, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(x, want)
        mean, std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
        assert (x * std + mean - (x * std + mean)[:, :1]).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["image_mean", "image_std"])
@pytest.mark.parametrize(("channels", "given"), [(1, [0.5, 0.5, 0.5]), (3, [0.5]), (4, [0.5, 0.5, 0.5])])
def test_a_mean_of_other_channels_is_refused(name, channels, given):
    config = hf.OdenetsConfig(name="resnet20", num_channels=channels, **{name: given})
    with pytest.raises(SchemeError, match=rf"{name} has \d numbers for {channels} channels\.\n  Give one per channel"):
        hf.OdenetsImageProcessor.of(config)


@pytest.mark.parametrize("name", ["convnext_base", "revcol_1column"])
def test_a_segmenter_trains_on_a_backbone(name):
    backbone = config(
        name, backprop="reverse" if "revcol" in name else None, out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    upernet = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=8, num_labels=3, auxiliary_in_channels=backbone.channels_of_maps[2],
        auxiliary_channels=8, pool_scales=[1, 2],
    )  # fmt: skip
    net = transformers.UperNetForSemanticSegmentation(upernet).train()
    side = 64
    out = net(torch.randn(2, 3, side, side), labels=torch.randint(0, 3, (2, side, side)))
    out.loss.backward()
    named = dict(net.backbone.named_parameters())
    assert named and all(p.grad is not None for p in named.values())
