"""Heads on our models: gradients by inversion, sizes that do not divide, and losses of what has no class."""

import pytest
import torch
import torch.nn.functional as F

from odenets import create_model
from odenets.checkpoints import save
from odenets.segmentation import Mask2Former, UPerNet
from odenets.segmentation.nets import pixel_cross_entropy
from schemes import SchemeError

from .scenes import REVCOL, revcol

X = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 5, (2, 16, 24), generator=torch.Generator().manual_seed(1))
Y[:, :3] = -100


def mask2former(**options):
    torch.manual_seed(0)
    small = {"queries": 6, "decoder_layers": 2, "encoder_layers": 1, "heads": 2, "feedforward": 32, "points": 64}
    return Mask2Former(**{"model": "revcol_tiny", "num_classes": 5, "options": REVCOL, "width": 32, **small, **options})


def losses_and_gradients(net, x=X, y=Y):
    torch.manual_seed(7)  # the points at which Mask2Former measures
    parts = net(x, y)
    torch.stack(list(parts.values())).sum().backward()
    return parts, {name: p.grad for name, p in net.named_parameters()}


# Mask2Former's positions are in single precision whatever its weights are.
@pytest.mark.cases(1)
@pytest.mark.parametrize(("build", "dtype"), [(revcol, torch.float64), (mask2former, torch.float32)])
def test_reverse_equals_store_in_loss_and_gradients(build, dtype):
    stored, reversed_ = (build(backprop=mode).to(dtype) for mode in ("store", "reverse"))
    reversed_.load_state_dict(stored.state_dict())
    assert {str(m.backprop) for m in reversed_.modules() if hasattr(m, "backprop")} == {"reverse"}
    (want, grads), (got, own) = (losses_and_gradients(net, X.to(dtype)) for net in (stored, reversed_))
    close = 1e-10 if dtype == torch.float64 else 1e-4
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=close, atol=0)
    flat, other = (torch.cat([grad.flatten() for grad in every.values()]) for every in (grads, own))
    assert grads.keys() == dict(stored.named_parameters()).keys()
    assert (flat - other).norm() < close * flat.norm()


def test_the_loss_is_that_of_transformers():
    net = revcol(auxiliary_width=8)
    parts = net(X, Y)
    want = net.net(X, labels=Y).loss
    torch.testing.assert_close(torch.stack(list(parts.values())).sum(), want)
    assert set(parts) == {"loss", "auxiliary"} and set(revcol(auxiliary=0)(X, Y)) == {"loss"}


def test_scores_are_those_of_transformers_where_sizes_divide():
    net = revcol().eval()
    with torch.no_grad():
        torch.testing.assert_close(net(X), net.net(X).logits)


def test_pictures_of_any_size_are_filled_up_at_the_right_and_below():
    net = revcol().eval()
    x, y = X[..., :13, :21], Y[:, :13, :21]
    with torch.no_grad():
        filled = net(F.pad(x, (0, 3, 0, 3)))
        assert net(x).shape == (2, 5, 13, 21)
        torch.testing.assert_close(net(x), filled[..., :13, :21])
        want = F.cross_entropy(filled[..., :13, :21], y, ignore_index=-100)  # what was filled up does not count
        torch.testing.assert_close(net(x, y)["loss"], want)


def test_dropout_takes_channels_of_both_heads_in_training_alone():
    net = revcol(dropout=0.5, auxiliary_width=8)
    seen = {}
    for name, head in (("main", net.net.decode_head), ("auxiliary", net.net.auxiliary_head)):
        head.classifier.register_forward_hook(lambda m, args, out, name=name: seen.update({name: args[0]}))
    net(X, Y)
    for name, maps in seen.items():
        empty = (maps == 0).flatten(2).all(2).float().mean()
        assert 0.2 < empty < 0.9, name
    with torch.no_grad():
        net.eval()(X)
        before = seen["main"]
        net(X)
    assert torch.equal(seen["main"], before)


@pytest.mark.parametrize("build", [revcol, mask2former])
def test_pictures_without_any_class_have_a_finite_loss(build):
    for y in (torch.full_like(Y, -100), torch.where(torch.tensor([True, False])[:, None, None], Y, -100)):
        parts, grads = losses_and_gradients(build(), y=y)
        assert all(bool(part.isfinite()) for part in parts.values())
        assert all(bool(grad.isfinite().all()) for grad in grads.values() if grad is not None)


@pytest.mark.parametrize("build", ["upernet", "mask2former"])
@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_type_have_the_same_loss(build, kind):
    """Also where pictures are filled up: in 8 bits without a sign -100 would be 156."""
    torch.manual_seed(0)
    made = {"upernet": revcol, "mask2former": mask2former}[build](num_classes=160).eval()
    x, y = X[..., :13, :21], Y[:, :13, :21].clamp(min=0)
    y[0, 0, :9] = 156
    found = []
    for labels in (y, y.to(kind)):
        torch.manual_seed(1)
        found.append({name: part.item() for name, part in made(x, labels).items()})
    assert found[0] == found[1]
    logits = torch.randn(2, 160, 4, 6, generator=torch.Generator().manual_seed(2))
    assert torch.equal(pixel_cross_entropy(logits, y), pixel_cross_entropy(logits, y.to(kind)))


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("option", ["queries", "decoder_layers", "heads", "feedforward", "points", "width"])
def test_numbers_of_mask2former_are_1_or_more(option, number):
    with pytest.raises(SchemeError, match=f"Mask2Former: .*{option}={number}"):
        mask2former(**{option: number})


def test_mask2former_may_have_no_encoder():
    assert bool(mask2former(encoder_layers=0)(X, Y)["loss"].isfinite())
    with pytest.raises(SchemeError, match="Mask2Former: encoder_layers=-1; wants 0 or more"):
        mask2former(encoder_layers=-1)


@pytest.mark.parametrize("label", [5, 6, -1, 255])
def test_labels_that_are_no_class_are_refused_by_mask2former(label):
    y = Y.clone()
    y[0, 0, 0] = label
    with pytest.raises(SchemeError, match=r"Mask2Former: labels of .*; wants 0 to 4\n  Give -100"):
        mask2former()(X, y)


def test_scores_of_mask2former_are_sums_over_the_queries():
    net = mask2former().eval()
    with torch.no_grad():
        found = net.net(X)
        masks = F.interpolate(found.masks_queries_logits, (16, 24), mode="bilinear", align_corners=False).sigmoid()
        classes = found.class_queries_logits.softmax(-1)
        want = sum(classes[:, q, :5, None, None] * masks[:, q, None] for q in range(6))
        torch.testing.assert_close(net(X), want)


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    "model", ["resnet20", "densenet40_k12", "vit_tiny_patch16", "revnet38", "resnet18", "convnext_tiny"]
)
def test_any_model_has_a_gradient_at_every_parameter(model):
    options = {"size": 32, "depth": 2} if model.startswith("vit") else None
    net = UPerNet(model, 3, width=8, auxiliary_width=8, options=options)
    _, grads = losses_and_gradients(net, torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32)))
    assert [name for name, grad in grads.items() if grad is None] == []
    assert net.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 3, 32, 32)


def test_weights_of_a_classifier(tmp_path):
    classifier = create_model("revcol_tiny", num_classes=7, **REVCOL)
    save(classifier, tmp_path / "w.safetensors")
    net = revcol(weights=str(tmp_path / "w.safetensors"), weights_classes=7)
    own = classifier.state_dict()
    for key, value in net.net.backbone.net.state_dict().items():
        assert torch.equal(value, own[key]), key
    with pytest.raises(SchemeError, match="number of classes"):
        revcol(weights=str(tmp_path / "w.safetensors"), weights_classes=8)


def test_refuses():
    with pytest.raises(SchemeError, match="num_classes=1"):
        revcol(num_classes=1)
    with pytest.raises(SchemeError, match="that 32 and the heads divide"):
        Mask2Former("revcol_tiny", 5, options=REVCOL, width=40)
    with pytest.raises(SchemeError, match=r"maps of vit_tiny_patch16 are 1/16"):
        Mask2Former("vit_tiny_patch16", 5)
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(SchemeError, match=f"auxiliary={weight}"):
            revcol(auxiliary=weight)
    with pytest.raises(SchemeError, match="batch of one picture"):
        revcol()(X[:1], Y[:1])
    with pytest.raises(SchemeError, match="no option 'chanels'"):
        UPerNet("revcol_tiny", 5, options={"chanels": [8]})
