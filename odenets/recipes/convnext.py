"""ConvNeXt: T to XL and isotropic, on ImageNet-1K and 22K, fine-tuned, and every step from ResNet-50 and ResNet-200."""

from collections.abc import Iterator
from typing import Any

from ..models import roadmap
from .data import IMAGENET, IMAGENET22K
from .recipe import Paper, Recipe, Row
from .training import MODERN, UNMIXED, Settings, adamw, cosine, large, training

_UNKNOWN = "its figures, which are not known here"
PAPER = Paper(
    "A ConvNet for the 2020s",
    "Liu et al. 2022",
    "2201.03545",
    {
        "table 1": "ImageNet-1K: trained on it, or on ImageNet-22K and fine-tuned",
        "table 2": "isotropic nets",
        "table 3": "COCO",
        "table 4": "ADE20K",
        "table 5": "hyper-parameters of training",
        "table 6": "hyper-parameters of fine-tuning",
        "table 9": "architectures",
        "table 10": "from ResNet-50 to ConvNeXt-T, step by step, three seeds",
        "table 11": "from ResNet-200 to ConvNeXt-B",
        "throughput": "pictures per second on an A100",
        "robustness": "accuracy on changed pictures",
        "figure 1": "accuracy against multiply-adds",
        "figure 2": "the figures of tables 10 and 11, drawn",
        "figures 3 and 4": "blocks: drawings",
    },
    (
        Row("table 3", "all", needs=f"a detector, COCO, and {_UNKNOWN}"),
        Row("table 4", "all", needs=f"a segmenter, ADE20K, and {_UNKNOWN}"),
        Row("table 5", "all", command="odenets recipe convnext_tiny"),
        Row("table 6", "all", command="odenets recipe convnext_tiny_22k_ft384"),
        Row("robustness", "all", needs=f"trained nets, the sets of changed pictures, and {_UNKNOWN}"),
        Row("table 9", "all: the page [ConvNeXt](models/convnext.md)", command="odenets recipe convnext_tiny"),
        Row(
            "throughput",
            "ConvNeXt-T / S / B / L / XL, pictures per second",
            "1943.5 / 1275.3 / 969.0 / 611.5 / 424.4",
            command="python experiments/benchmarks/models.py",
            needs="an A100",
        ),
        Row("table 10", "Swin-T, 4.50 GFLOPs", "81.30 % top-1", needs="a network that is not here"),
        Row("figure 1", "all", needs="the nets of table 1, trained"),
        Row("figure 2", "all", needs="the nets of tables 10 and 11, trained"),
        Row("figures 3 and 4", "all", needs="nothing: they show no figures"),
    ),
    "The tables that are named by what they show have numbers that are not known here. Tables 10 and 11 are the "
    "roadmaps of odenets.models.roadmap.",
)
SMALLER = "the paper's GPUs and how its 4,096 pictures per step are shared among them are not known here."
RATES = {"tiny": 0.1, "small": 0.4, "base": 0.5, "large": 0.5}
LETTERS = {"tiny": "T", "small": "S", "base": "B", "large": "L", "xlarge": "XL"}
PARAMETERS = {
    "tiny": 28_589_128,
    "small": 50_223_688,
    "base": 88_591_464,
    "large": 197_767_336,
    "xlarge": 350_196_968,
}
SCRATCH = {"tiny": "82.1", "small": "83.1", "base": "83.8", "large": "84.3"}


def _settings(ema: float = 0.9999) -> Settings:
    return training(
        *(IMAGENET, adamw(4e-3), cosine(20, 2.5e-4)),
        epochs=300,
        batch=4096,
        at_once=128,
        augment=MODERN,
        pictures=large(),
        smoothing=0.1,
        channels_last=True,
        ema=ema,
    )


def _recipe(
    name: str,
    size: str,
    model: str,
    where: str,
    top1: str,
    settings: Settings,
    options: dict[str, Any],
    *differs: str,
    stage: Any = "train",
    needs: str = "ImageNet and GPUs",
    parameters: int | None = None,
    family: str = "ConvNeXt",
    file: str = "",
) -> Recipe:
    data = IMAGENET22K if stage == "pretrain" else IMAGENET
    figures = ((where, f"{top1} % top-1" if top1 else ""),)
    start = (name, PAPER, family, size, data, stage, model, settings, options, figures)
    return Recipe(*start, differs=differs, needs=needs, parameters=parameters, file=file)


def _scratch() -> Iterator[Recipe]:
    for name, top1 in SCRATCH.items():
        yield _recipe(
            *(f"convnext_{name}", LETTERS[name], f"convnext_{name}", "table 1", top1, _settings()),
            {"drop_path_rate": RATES[name]},
            SMALLER,
            parameters=PARAMETERS[name],
            file="convnext_tiny.yaml" if name == "tiny" else "",
        )
    sizes = {"small": ("S", "79.7"), "base": ("B", "82.0"), "large": ("L", "82.6")}
    own = "the stochastic depth of the isotropic nets is not known here; it is that of ConvNeXt of the letter."
    for name, (letter, top1) in sizes.items():
        model = f"convnext_isotropic_{name}"
        other = "the authors' repository prints 78.7 for this net."
        more = (own, other) if name == "small" else (own,)
        options = {"drop_path_rate": RATES[name]}
        yield _recipe(model, f"isotropic {letter}", model, "table 2", top1, _settings(), options, SMALLER, *more)


# ImageNet-22K: stochastic depth there and after it, accuracy at 224 and at 384 pixels.
LARGER = {
    "tiny": (0.0, 0.1, "82.9", "84.1"),
    "small": (0.0, 0.1, "84.6", "85.8"),
    "base": (0.1, 0.2, "85.8", "86.8"),
    "large": (0.1, 0.3, "86.6", "87.5"),
    "xlarge": (0.2, 0.4, "87.0", "87.8"),
}
NEW = "it starts from the weights after {}: --weights FILE; without them from new ones."
# As published, though the classes are the same.
NEW_HEAD: Settings = {"adapt": {"new_head": True}}


def _tuned(side: int, decay: float) -> Settings:
    return training(
        *(IMAGENET, adamw(5e-5, 1e-8), cosine(0, 0.02)),
        epochs=30,
        batch=512,
        # Pictures of 384 pixels a side have three times the pixels of those of 224.
        at_once=64 if side == 224 else 32,
        augment=UNMIXED,
        pictures=large(size=side, **(dict[str, Any](inner=1.0) if side > 224 else {})),
        smoothing=0.1,
        channels_last=True,
        layer_decay=decay,
    )


def _larger() -> Iterator[Recipe]:
    """On ImageNet-22K, and after it."""
    pretraining = training(
        *(IMAGENET22K, adamw(4e-3), cosine(5)),
        epochs=90,
        batch=4096,
        at_once=128,
        augment=MODERN,
        pictures=large(),
        smoothing=0.1,
        channels_last=True,
    )
    for name, (rate, after, *accuracies) in LARGER.items():
        model, letter = f"convnext_{name}", LETTERS[name]
        yield _recipe(
            *(f"{model}_22k", letter, model, "table 1", "", pretraining, {"drop_path_rate": rate}, SMALLER),
            stage="pretrain",
            needs="ImageNet-22K and many GPUs",
        )
        for side, top1 in zip((224, 384), accuracies, strict=True):
            yield _recipe(
                *(
                    f"{model}_22k_ft{side}",
                    f"{letter}, {side} pixels, after 22K",
                    model,
                    "table 1",
                    top1,
                    _tuned(side, 0.8),
                ),
                # A new head begins near zero, so that its gradients do not disturb the trained layers at first.
                {"drop_path_rate": after, "head_init_scale": 0.001},
                "the stochastic depth and the least rate of this stage are not known here; these are ours.",
                NEW.format("ImageNet-22K"),
                stage="fine-tune",
                file="convnext_base_from_22k.yaml" if (name, side) == ("base", 224) else "",
                needs="weights after ImageNet-22K and GPUs",
                parameters=PARAMETERS[name],
            )


def _fine_tuned() -> Iterator[Recipe]:
    """At more pixels, after ImageNet-1K."""
    for name, rate, top1 in (("base", 0.8, "85.1"), ("large", 0.95, "85.5")):
        model, letter = f"convnext_{name}", LETTERS[name]
        yield _recipe(
            *(f"{model}_ft384", f"{letter}, 384 pixels", model, "table 1", top1, NEW_HEAD | _tuned(384, 0.7)),
            {"drop_path_rate": rate, "head_init_scale": 0.001},
            NEW.format("ImageNet-1K"),
            stage="fine-tune",
            needs="weights after ImageNet-1K and GPUs",
            parameters=PARAMETERS[name],
        )


def _roadmaps() -> Iterator[Recipe]:
    """Every step by the recipe of the last; the first is the ResNet of torchvision, by a recipe of its own."""
    for base, rows in roadmap.CONVNEXT.items():
        layers = base.removeprefix("resnet")
        where, rate = ("table 10", 0.1) if layers == "50" else ("table 11", 0.5)
        for number, row in enumerate(rows[1:], 2):
            end = "ConvNeXt-T" if layers == "50" else "ConvNeXt-B"
            yield _recipe(
                *(
                    f"resnet{layers}_to_convnext_{row.name}",
                    f"step {number}, {row.name}",
                    "odenets.models.roadmap.convnext",
                ),
                *(where, f"{row.top1:.2f}", _settings(ema=0.0)),
                {"step": row.name, "base": base, "drop_path_rate": rate, "layer_scale": 1e-6},
                SMALLER,
                f"the stochastic depth of the steps is not known here; it is that of {end}.",
                family=f"ResNet-{layers} to {end}",
            )
        first = rows[0]
        yield _recipe(
            *(f"resnet{layers}_to_convnext_{first.name}", "step 1, the old recipe", "odenets.models.roadmap.convnext"),
            *(where, f"{first.top1:.2f}", OLD),
            {"step": first.name, "base": base},
            "the published figure is that of a library's weights; the recipe is He et al.'s, whose details are ours.",
            family=f"ResNet-{layers}",
        )


OLD = training(
    *(IMAGENET, {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}}),
    {"class_path": "odenets.training.Milestones", "init_args": {}},
    epochs=90,
    batch=256,
    at_once=64,
    augment={"flip": 0.5},
    pictures=large("bilinear"),
    channels_last=True,
)

RECIPES = (*_scratch(), *_larger(), *_fine_tuned(), *_roadmaps())
