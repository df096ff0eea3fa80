"""ConvNeXt: T to XL and isotropic, on ImageNet-1K and 22K, fine-tuned, and every step from ResNet-50 and ResNet-200."""

from collections.abc import Iterator, Mapping
from typing import Any

from ..models import roadmap
from . import downstream
from .data import IMAGENET, IMAGENET22K
from .recipe import Paper, Recipe, Row
from .training import MODERN, SQUEEZED, UNMIXED, Settings, adamw, cosine, large, training

_EVALUATE = "odenets evaluate CKPT --corruptions --baseline alexnet --frost FOLDER"
_OTHERS = "networks that are not here"
_SPEED = "python experiments/benchmarks/models.py"


def _rows(shown: str, lines: Mapping[str, str], **more: str) -> tuple[Row, ...]:
    return tuple(Row(shown, what, published, **more) for what, published in lines.items())


PAPER = Paper(
    "A ConvNet for the 2020s",
    "Liu et al. 2022",
    "2201.03545",
    {
        "table 1": "ImageNet-1K: trained on it, or on ImageNet-22K and fine-tuned",
        "table 2": "isotropic nets",
        "table 3": "COCO: Mask R-CNN and Cascade, 3x",
        "table 4": "ADE20K: UperNet, several scales",
        "table 5": "hyper-parameters of training",
        "table 6": "hyper-parameters of fine-tuning",
        "table 7": "ADE20K: one scale",
        "table 8": "accuracy on changed pictures",
        "table 9": "architectures",
        "table 10": "from ResNet-50 to ConvNeXt-T, step by step, three seeds",
        "table 11": "from ResNet-200 to ConvNeXt-B",
        "table 12": "pictures per second on an A100",
        "figure 1": "accuracy against multiply-adds",
        "figure 2": "the figures of tables 10 and 11, drawn",
        "figures 3 and 4": "blocks: drawings",
    },
    (
        *_rows(
            "table 1",
            {
                "RegNetY-16G": "82.9 % top-1",
                "EfficientNet-B7, 600 pixels": "84.3 % top-1",
                "EfficientNetV2-L, 480 pixels; after 22K": "85.7; 86.8 % top-1",
                "EfficientNetV2-XL, 480 pixels, after 22K": "87.3 % top-1",
                "DeiT-S / DeiT-B": "79.8 / 81.8 % top-1",
                "Swin-T / S / B": "81.3 / 83.0 / 83.5 % top-1",
                "Swin-B, 384 pixels": "84.5 % top-1",
                "Swin-B / L, after 22K; 384 pixels": "85.2 / 86.3; 86.4 / 87.3 % top-1",
                "R-101x3 / R-152x4, after 22K": "84.4 / 85.4 % top-1",
                "ViT-B / L, 384 pixels, after 22K": "85.4 / 86.8 % top-1",
            },
            needs=_OTHERS,
        ),
        *_rows("table 2", {"ViT-S / B / L": "79.8 / 81.8 / 82.6 % top-1"}, needs="the training of other papers"),
        Row("table 5", "all", command="odenets recipe convnext_tiny"),
        Row("table 6", "all", command="odenets recipe convnext_tiny_22k_ft384"),
        *_rows(
            "table 8",
            {
                "ConvNeXt-T: mCE on C / top-1 on A / R / Sketch": "53.2 / 24.2 / 47.2 / 33.8 %",
                "ConvNeXt-B": "46.8 / 36.7 / 51.3 / 38.2 %",
                "ConvNeXt-B, 22K, 384 pixels": "43.1 / 62.3 / 64.9 / 51.6 %",
                "ConvNeXt-L, 22K, 384 pixels": "40.2 / 65.5 / 66.7 / 52.8 %",
                "ConvNeXt-XL, 22K, 384 pixels": "38.8 / 69.3 / 68.2 / 55.0 %",
            },
            command=_EVALUATE,
            needs="the nets of table 1, trained, and the sets of pictures",
        ),
        *_rows(
            "table 8",
            {
                "ResNet-50": "76.7 / 0.0 / 36.1 / 24.1 %",
                "Swin-T / B": "62.0 / 21.6 / 41.3 / 29.1; 54.4 / 35.8 / 46.6 / 32.4 %",
                "RVT-S / B": "49.4 / 25.7 / 47.7 / 34.7; 46.8 / 28.5 / 48.7 / 36.0 %",
            },
            needs="the training of other papers",
        ),
        Row("table 9", "all: the page [ConvNeXt](models/convnext.md)", command="odenets recipe convnext_tiny"),
        Row("table 10", "Swin-T, 4.50 GFLOPs", "81.30 % top-1", needs="a network that is not here"),
        Row("table 11", "Swin-B, 15.43 GFLOPs", "83.50 % top-1", needs="a network that is not here"),
        *_rows(
            "table 12",
            {
                "ConvNeXt-T / S / B / L / XL, pictures per second": "1943.5 / 1275.3 / 969.0 / 611.5 / 424.4",
                "ConvNeXt-B / L / XL, 384 pixels": "336.6 / 211.4 / 147.4",
            },
            command=_SPEED,
            needs="an A100",
        ),
        Row("table 12", "Swin-T / S / B / L", "1325.6 / 857.3 / 662.8 / 435.9", needs=_OTHERS),
        Row("table 12", "Swin-B / L, 384 pixels", "242.5 / 157.9", needs=_OTHERS),
        Row("figure 1", "all", needs="the nets of table 1, trained"),
        Row("figure 2", "all", needs="the nets of tables 10 and 11, trained"),
        Row("figures 3 and 4", "all", "no figures", needs="no measurement: they are drawings"),
    ),
    "Tables 10 and 11 are the roadmaps of odenets.models.roadmap. Where the paper leaves something open (least rate, "
    "GPUs), recipes follow the authors' repository.",
)
# Nodes of 8 GPUs, and pictures per GPU, as in the authors' commands.
CLUSTER = "{} nodes of 8 GPUs, {} pictures on each (released command)"
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


def _settings(ema: float = 0.9999, warmup: int = 20) -> Settings:
    return training(
        *(IMAGENET, adamw(4e-3), cosine(warmup, 2.5e-4)),
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
    hardware: str = "not known here",
) -> Recipe:
    data = IMAGENET22K if stage == "pretrain" else IMAGENET
    figures = ((where, f"{top1} % top-1" if top1 else ""),)
    start = (name, PAPER, family, size, data, stage, model, settings, options, figures)
    return Recipe(*start, hardware=hardware, differs=differs, needs=needs, parameters=parameters, file=file)


def _scratch() -> Iterator[Recipe]:
    for name, top1 in SCRATCH.items():
        yield _recipe(
            *(f"convnext_{name}", LETTERS[name], f"convnext_{name}", "table 1", top1, _settings()),
            {"drop_path_rate": RATES[name]},
            hardware=CLUSTER.format(*((8, 64) if name == "large" else (4, 128))),
            parameters=PARAMETERS[name],
            file="convnext_tiny.yaml" if name == "tiny" else "",
        )
    # Without gamma in S and B, as in the registered models.
    sizes = {"small": ("S", 0.1, "79.7"), "base": ("B", 0.2, "82.0"), "large": ("L", 0.5, "82.6")}
    for name, (letter, rate, top1) in sizes.items():
        model = f"convnext_isotropic_{name}"
        other = ("the authors' repository prints 78.7 for this net.",) if name == "small" else ()
        yield _recipe(
            *(model, f"isotropic {letter}", model, "table 2", top1, _settings(warmup=50)),
            {"drop_path_rate": rate},
            *other,
            hardware=CLUSTER.format(*((8, 64) if name == "large" else (4, 128))),
        )


# ImageNet-22K: stochastic depth in pretraining and in fine-tuning, accuracy at 224 and at 384 pixels.
LARGER = {
    "tiny": (0.0, 0.0, "82.9", "84.1"),
    "small": (0.0, 0.1, "84.6", "85.8"),
    "base": (0.1, 0.2, "85.8", "86.8"),
    "large": (0.1, 0.3, "86.6", "87.5"),
    "xlarge": (0.2, 0.4, "87.0", "87.8"),
}
NEW = "it starts from the weights after {}: --weights FILE; without them from new ones."
# As published, though the classes are the same.
NEW_HEAD: Settings = {"adapt": {"new_head": True}}


def _tuned(side: int, decay: float, ema: float = 0.0) -> Settings:
    return training(
        *(IMAGENET, adamw(5e-5, 1e-8), cosine(0, 0.02)),
        epochs=30,
        batch=512,
        # Pictures with sides of 384 pixels have three times as many pixels as those of 224.
        at_once=64 if side == 224 else 32,
        augment=UNMIXED,
        pictures=large(size=side, **(dict[str, Any](inner=1.0) if side > 224 else {})),
        smoothing=0.1,
        channels_last=True,
        ema=ema,
        layer_decay=decay,
    )


def _larger() -> Iterator[Recipe]:
    """On ImageNet-22K, and after it."""
    pretraining = training(
        *(IMAGENET22K, adamw(4e-3), cosine(5, 2.5e-4)),
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
            *(f"{model}_22k", letter, model, "table 1", "", pretraining, {"drop_path_rate": rate}),
            hardware=CLUSTER.format(16, 32),
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
                    _tuned(side, 0.8, 0.9999 if name == "xlarge" else 0.0),
                ),
                # A new head starts near zero, so that its gradients do not disturb the trained layers at first.
                {"drop_path_rate": after, "head_init_scale": 0.001},
                NEW.format("ImageNet-22K"),
                *((SQUEEZED,) if side > 224 else ()),
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
            NEW.format("ImageNet-1K" + (", averaged (EMA), as the paper says of L" if name == "large" else "")),
            SQUEEZED,
            stage="fine-tune",
            hardware=CLUSTER.format(2, 32),
            needs="weights after ImageNet-1K and GPUs",
            parameters=PARAMETERS[name],
        )


def _roadmaps() -> Iterator[Recipe]:
    """Every step with the recipe of the last one; the first is torchvision's ResNet, with its own recipe."""
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
                f"the paper says that all steps are trained like {end}; so they have its stochastic depth.",
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

_BELOW = downstream.convnext(PAPER, "table 7", "table 4", "table 3")
RECIPES = (*_scratch(), *_larger(), *_fine_tuned(), *_roadmaps(), *_BELOW)
