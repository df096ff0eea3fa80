"""HO-ResNet: the depths of the paper under schemes of order 1 to 8, and our readings of what it leaves open."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .data import CIFAR10, CIFAR100, IMAGENET, SVHN, Data
from .recipe import Paper, Recipe, Row
from .training import MODERN, SHIFTED, Settings, adamw, cosine, large, sgd, training

PAPER = Paper(
    "Rethinking ResNets: Improved Stacking Strategies With High Order Schemes",
    "Luo et al. 2021",
    "2103.15244",
    {
        "abstract": "what high-order steps gain on CIFAR-10",
        "depths": "26 to 170 layers on CIFAR-10, CIFAR-100 and SVHN, and 50 and 170 on ImageNet",
        "scaling factor": "RK-8 with a decaying scaling factor: three readings",
        "section 2.5": "high-order steps of high-order steps, over convolutions, and over attention and perceptrons",
        "robustness": "accuracy on pictures that are noisy or changed on purpose",
    },
    (
        Row("robustness", "any of the nets above", needs="a trained net, and pictures with noise"),
        Row(
            "depths",
            "small nets of 26 layers under four schemes, ten seeds each: the page [Which scheme helps](campaign.md)",
            command="odenets compare experiments/cifar10_ho_resnet.yaml --over model.net.scheme=euler,midpoint,rk4",
        ),
    ),
    "The abstract's two gains are the only numbers of this paper that are known here. Its tables and figures are not, "
    "so rows are named by what its text describes. Depths are one, two or three levels of as many "
    "residual functions as the schemes need.",
)
OWN = "epochs, rate and pictures per step are not known of the paper; these are ours."
WHOLE = (
    "single precision: verner8 weighs its stages by up to 2,307, and in bfloat16 nothing of the stream survives that."
)
NESTED = "nested(midpoint, midpoint)"
# Steps of 4 functions do not divide 14; a mix does.
MIX = "3*rk4 + midpoint"

DEPTHS: dict[int, tuple[str, dict[str, str]]] = {
    26: ("ho_resnet26", {"euler": "euler", "midpoint": "midpoint", "rk4": "rk4", "nested": NESTED}),
    30: ("ho_resnet30", {"euler": "euler", "midpoint": "midpoint", "mix": MIX, "verner8": "verner8"}),
    58: ("ho_resnet58", {"euler": "euler", "midpoint": "midpoint", "mix": MIX, "verner8": "verner8"}),
    74: ("ho_resnet74", {"euler": "euler", "midpoint": "midpoint", "rk4": "rk4", "nested": NESTED}),
    86: ("ho_resnet86", {"euler": "euler", "midpoint": "midpoint", "mix": MIX, "verner8": "verner8"}),
    170: (
        "ho_resnet170_cifar",
        {"euler": "euler", "midpoint": "midpoint", "rk4": "rk4", "verner8": "verner8"}
        | {"nested": NESTED, "nested_verner8": "nested(midpoint, verner8)"},
    ),
}
# Of the released code's networks, with ten classes; equal under every scheme.
PARAMETERS = {26: 366_842, 86: 1_339_002, 170: 2_700_026}
GAINS = {30: "2.15 points above ResNet-30", 58: "2.35 points above ResNet-58"}


def small(data: Data, **more: Any) -> Settings:
    """Returns the training on pictures of 32 pixels."""
    augment = SHIFTED if data is not SVHN else {"crop": 4}  # a mirrored digit is not a digit
    length: dict[str, Any] = {"epochs": 164 if data is not SVHN else 40, "batch": 128, "channels_last": True}
    return training(data, sgd(), cosine(2), augment=augment, **length, **more)


def _on(data: Data) -> Iterator[Recipe]:
    prefix = data.name.lower().replace("-", "")
    for layers, (model, schemes) in DEPTHS.items():
        for tag, scheme in schemes.items():
            nested = tag.startswith("nested")
            if nested and data is not CIFAR10:
                continue
            where = "section 2.5" if nested else "depths"
            published = [(where, "")]
            if data is CIFAR10 and tag == "verner8" and layers in GAINS:
                published = [("abstract", GAINS[layers]), (where, "")]
            yield Recipe(
                f"{prefix}_ho_resnet{layers}_{tag}",
                PAPER,
                *("HO-ResNet", f"{layers} layers, {tag}", data, "train", model),
                small(data, half="verner8" not in scheme),
                {"scheme": scheme, "placement": "public"},
                tuple(published),
                differs=(
                    OWN,
                    *(("the abstract does not say by which scheme.",) if len(published) > 1 else ()),
                    *((WHOLE,) if "verner8" in scheme else ()),
                ),
                parameters=PARAMETERS.get(layers) if data is CIFAR10 else None,
                file=FILES.get((prefix, layers, tag), ""),
            )


FILES = {
    ("cifar10", 170, "rk4"): "cifar10_ho_resnet.yaml",
    ("cifar100", 170, "rk4"): "cifar100_ho_resnet.yaml",
}


def _decays() -> Iterator[Recipe]:
    """The three readings of a scaling factor that decays: over the depth, learned, over the epochs."""
    halving = {"class_path": "odenets.training.StepSchedule", "init_args": {"start": 1.0, "stop": 0.5}}
    readings: dict[str, tuple[dict[str, str], Settings, str]] = {
        "decay": (
            {"step": "decay(9/10)"},
            small(CIFAR10, half=False),
            "the scaling factor of step n is 0.9^n over the whole net",
        ),
        "learned": (
            {"step": "learned"},
            small(CIFAR10, half=False, step_weight_decay=1e-4),
            "the scaling factor is learned, one for each step, under a weight decay of its own",
        ),
        "scheduled": (
            {},
            small(CIFAR10, half=False, callbacks=(halving,)),
            "the scaling factor falls from 1 to 1/2 over the epochs",
        ),
    }
    for layers in (30, 58, 86, 170):
        for tag, (options, settings, reading) in readings.items():
            # The 30-layer net is a single step, so a decay from step to step has no effect.
            if (layers, tag) == (30, "decay"):
                continue
            yield Recipe(
                f"cifar10_ho_resnet{layers}_verner8_{tag}",
                PAPER,
                *("HO-ResNet", f"{layers} layers, verner8, {tag}", CIFAR10, "train", DEPTHS[layers][0]),
                settings,
                {"scheme": "verner8", "placement": "public", **options},
                (("scaling factor", ""),),
                differs=(OWN, f"the paper gives no formula; in this reading {reading}.", WHOLE),
            )


def _imagenet() -> Iterator[Recipe]:
    how: dict[str, Any] = {"augment": {"flip": 0.5}, "pictures": large("bilinear"), "smoothing": 0.1}
    how |= {"epochs": 100, "batch": 256, "at_once": 64, "channels_last": True}
    nets = {
        50: ("ho_resnet50", {"euler": "euler", "midpoint": "midpoint", "rk4": "rk4", "nested": NESTED}, 27_855_656),
        170: ("ho_resnet170", {"euler": "euler", "midpoint": "midpoint", "mix": MIX, "verner8": "verner8"}, None),
    }
    for layers, (model, schemes, parameters) in nets.items():
        for tag, scheme in schemes.items():
            recipe = Recipe(
                f"imagenet_ho_resnet{layers}_{tag}",
                PAPER,
                *("HO-ResNet", f"{layers} layers, {tag}", IMAGENET, "train", model),
                training(IMAGENET, sgd(), cosine(5), half="verner8" not in scheme, **how),
                {"scheme": scheme},
                (("section 2.5" if tag == "nested" else "depths", ""),),
                differs=(OWN, *((WHOLE,) if "verner8" in scheme else ())),
                parameters=parameters,
                needs="ImageNet and GPUs",
            )
            yield replace(recipe, file="ho_resnet50.yaml") if (layers, tag) == (50, "rk4") else recipe


def _transformers() -> Iterator[Recipe]:
    """Attention and perceptron alternate; the paper's proposal treats a pair of them as one function."""
    settings = training(
        *(IMAGENET, adamw(1e-3), cosine(20, 1e-3)),
        epochs=300,
        batch=1024,
        at_once=128,
        augment=MODERN,
        pictures=large(),
        smoothing=0.1,
    )
    schemes = {"euler": "euler", "midpoint": "midpoint", "nested": "nested(midpoint, repeat(euler, 2))"}
    for size, letter in (("tiny", "Ti"), ("small", "S")):
        for tag, scheme in schemes.items():
            yield Recipe(
                f"vit_{size}_{tag}",
                PAPER,
                *("HO-Net ViT", f"{letter}, {tag}", IMAGENET, "train", f"vit_{size}_patch16"),
                settings,
                {"scheme": scheme, "drop_path_rate": 0.1},
                (("section 2.5", ""),),
                differs=("the paper motivates it and trains none; the recipe is ours, after DeiT's.",),
                needs="ImageNet and GPUs",
            )


RECIPES = (*_on(CIFAR10), *_on(CIFAR100), *_on(SVHN), *_decays(), *_imagenet(), *_transformers())
