"""RevCol: T to H, from scratch, on ImageNet-22K and fine-tuned; supervision, columns, kernels, transformers."""

from collections.abc import Iterator
from typing import Any

from . import downstream
from .data import IMAGENET, IMAGENET22K
from .recipe import Paper, Recipe, Row
from .training import MODERN, SQUEEZED, UNMIXED, Settings, adamw, cosine, large, training

PAPER = Paper(
    "Reversible Column Networks",
    "Cai et al. 2023",
    "2212.11696",
    {
        "ImageNet-1K": "T, S and B, trained on ImageNet-1K alone",
        "ImageNet-22K": "B, L, XL and H, trained on more pictures and fine-tuned",
        "COCO": "Cascade Mask R-CNN, 3x",
        "ADE20K": "UPerNet",
        "foundation models": "H after 168 million pictures",
        "supervision": "heads and decoders between the columns, against none",
        "columns": "1 to 20 columns at about 4.5 GFLOPs",
        "connections": "reversible connections against those of HRNet, and against one column",
        "kernels": "depthwise convolutions of 3, 5, 7 and 11",
        "memory": "memory of training against the number of columns",
        "appendix B": "transformers: RevCol-ViT and its baselines",
        "appendix D": "hyper-parameters",
        "appendix E": "alignment of each level with the label and the picture",
    },
    (
        Row(
            "memory",
            "peak memory against columns: the page [RevCol](models/revcol.md) has ours",
            command="python experiments/benchmarks/revcol_columns.py",
        ),
        Row("appendix D", "tables 11 to 14, as far as the released code has them", command="odenets recipe NAME"),
        Row("appendix E", "any RevCol", command="odenets analyse CKPT alignment"),
    ),
    "Figures are those of the authors' repository and of the abstract; where a table is known as a picture alone, its "
    "cells are empty. Their numbers are not known here, so tables are named by what they show; nor are the figures.",
)
PICTURES: dict[str, Any] = {"augment": MODERN, "smoothing": 0.1, "at_once": 128}
JITTER = (
    "the released configuration names a colour jitter of 0.4, which its library skips where RandAugment is on; it is "
    "off here."
)
RATE = (
    "the paper's pictures per step are not known here; the released code scales its rate by them: {} times pictures "
    "per step over 1,024."
)
EIGHT = "8 GPUs of 128 pictures each (released command)"
REVERSED = {"backprop": "reverse"}


def _scratch(clip: float = 0.0, final: float = 1e-3) -> Settings:
    more: dict[str, Any] = {"kind": "SupervisedClassifier", "ema": 0.9999, "clip": clip}
    return training(
        *(IMAGENET, adamw(1e-3), cosine(20, final)), epochs=300, batch=1024, pictures=large(), **PICTURES, **more
    )


# name, size, rate of stochastic depth, accuracy, parameters with heads and decoders and without
SIZES = (
    ("tiny", "T", 0.1, "82.2 % top-1", 33_063_984, 30_456_168),
    ("small", "S", 0.3, "83.5 % top-1", 63_176_240, 60_568_424),
    ("base", "B", 0.4, "84.1 % top-1", 141_694_960, 138_616_408),
)


def _published() -> Iterator[Recipe]:
    for name, size, rate, top1, supervised, plain in SIZES:
        settings = _scratch(5.0, 1e-5) if name == "base" else _scratch()
        for supervision in (True, False):
            where = (("ImageNet-1K", top1), ("supervision", "")) if supervision else (("supervision", ""),)
            if supervision and name == "tiny":
                where = (*where, ("columns", ""), ("connections", ""), ("kernels", ""))
            gain = "heads and decoders are said to be worth 0.5 to 0.9 points; of which net is not known here."
            yield Recipe(
                f"revcol_{name}" if supervision else f"revcol_{name}_unsupervised",
                PAPER,
                *("RevCol", size if supervision else f"{size} without supervision"),
                *(IMAGENET, "train", f"revcol_{name}", settings),
                {"supervision": supervision, **REVERSED, "drop_path_rate": rate},
                where,
                hardware=EIGHT,
                differs=((JITTER,) if name != "base" else ()) + (() if supervision else (gain,)),
                needs="ImageNet and GPUs",
                parameters=supervised if supervision else plain,
                file="revcol_tiny.yaml" if supervision and name == "tiny" else "",
            )


def _pretrained() -> Iterator[Recipe]:
    sizes = (
        ("base", "B", 0.3, 193_772_980),
        ("large", "L", 0.3, 371_077_188),
        ("xlarge", "XL", 0.4, 1_005_203_844),
        ("huge", "H", 0.4, 2_433_000_700),
    )
    for name, size, rate, parameters in sizes:
        huge = name == "huge"
        here = "the paper's 168 million pictures are not public; this is its recipe for ImageNet-22K."
        more: dict[str, Any] = {"kind": "SupervisedClassifier", "clip": 10.0}
        yield Recipe(
            f"revcol_{name}_22k",
            PAPER,
            *("RevCol", size, IMAGENET22K, "pretrain", f"revcol_{name}"),
            training(
                *(IMAGENET22K, adamw(1.25e-4, 0.1), cosine(5, 8e-4)),
                epochs=90,
                batch=1024,
                pictures=large(),
                **PICTURES,
                **more,
            ),
            {"supervision": True, **REVERSED, "drop_path_rate": rate},
            (("foundation models" if huge else "ImageNet-22K", ""),),
            differs=(RATE.format("1.25e-4"), *((here,) if huge else (JITTER,) if name != "xlarge" else ())),
            needs="ImageNet-22K and many GPUs",
            parameters=parameters,
        )


# name, size, side, epochs, rate, least rate, stochastic depth, layer decay, clip, averaged weights, accuracy
TUNED = (
    ("base", "B", 224, 30, 1e-4, 2e-7, 0.2, 0.9, 10.0, 0.0, "85.6 % top-1"),
    ("base", "B", 384, 30, 1e-4, 2e-7, 0.2, 0.9, 10.0, 0.0, "86.7 % top-1"),
    ("large", "L", 224, 30, 5e-5, 2e-7, 0.3, 0.8, 10.0, 0.0, "86.6 % top-1"),
    ("large", "L", 384, 30, 5e-5, 2e-7, 0.3, 0.8, 10.0, 0.0, "87.6 % top-1"),
    ("xlarge", "XL", 384, 30, 2e-5, 2e-7, 0.4, 0.8, 10.0, 0.9999, "88.2 % top-1"),
    ("huge", "H", 640, 20, 4e-5, 2e-8, 0.4, 0.8, 100.0, 0.9999, "90.0 % top-1"),
)
PLAIN = {"base": 138_616_408, "large": 273_095_400, "xlarge": 833_807_400, "huge": 2_157_600_160}


def _fine_tuned() -> Iterator[Recipe]:
    for name, size, side, epochs, lr, least, rate, decay, clip, ema, top1 in TUNED:
        settings = training(
            *(IMAGENET, adamw(lr, 1e-8), cosine(0, round(least / lr, 9))),
            epochs=epochs,
            batch=1024,
            at_once=128 if side == 224 else 32 if side == 384 else 8,
            augment=UNMIXED,
            pictures=large(size=side, **(dict[str, Any](inner=1.0) if side > 224 else {})),
            smoothing=0.1,
            clip=clip,
            ema=ema,
            layer_decay=decay,
        )
        before = "ImageNet-22K" if name != "huge" else "168 million pictures that are not public"
        yield Recipe(
            f"revcol_{name}_22k_ft{side}",
            PAPER,
            *("RevCol", f"{size}, {side} pixels", IMAGENET, "fine-tune", f"revcol_{name}"),
            settings,
            {**REVERSED, "drop_path_rate": rate, "head_init_scale": 0.001},
            (("ImageNet-22K" if name != "huge" else "foundation models", top1),),
            differs=(
                RATE.format(f"{lr:g}"),
                f"it starts from the weights after {before}: --weights FILE; without them from new ones.",
                *((SQUEEZED,) if side > 224 else ()),
            ),
            needs="weights after ImageNet-22K and GPUs" if name != "huge" else "pictures that are not public",
            parameters=PLAIN[name],
            file="revcol_base_from_22k.yaml" if (name, side) == ("base", 384) else "",
        )


def _ablations() -> Iterator[Recipe]:
    def recipe(name: str, size: str, model: str, where: str, *differs: str, figure: str = "", **options: Any) -> Recipe:
        supervised = {"supervision": True, **REVERSED} if model.startswith("revcol") else {}
        settings = _scratch()
        if not supervised:
            settings["model"]["class_path"] = "odenets.training.Classifier"
        options = {**supervised, "drop_path_rate": 0.1, **options}
        text = (JITTER, *differs)
        base = (name, PAPER, "RevCol" if supervised else "multi-column net", size, IMAGENET, "train", model)
        return Recipe(*base, settings, options, ((where, figure),), EIGHT, text, "ImageNet and GPUs")

    widths = "widths and blocks are not known of the paper; these have about the same multiply-adds."
    said = {8: "as good as 4 columns", 12: "as good as 4 columns", 20: "worse than 4 to 12 columns"}
    for columns in (1, 2, 8, 12, 20):
        name = f"revcol_{columns}column{'s' if columns > 1 else ''}"
        size = f"{columns} column{'s' if columns > 1 else ''}"
        yield recipe(name, size, name, "columns", widths, figure=said.get(columns, ""))
    for kernel in (5, 7, 11):
        name, figure = f"revcol_tiny_k{kernel}", "0.3 points above kernel 3" if kernel == 5 else ""
        yield recipe(name, f"T, kernel {kernel}", name, "kernels", figure=figure)
    own = "the paper gives no details of this net; it is ours, after HRNet's fusion, in the pyramid of RevCol-T."
    yield recipe("multicolumn_tiny", "T, every level reads every level", "multicolumn_tiny", "connections", own)
    one = "a single column of as many blocks, for the pyramid of RevCol-T."
    yield recipe(
        "revcol_single_unsupervised",
        "one column without supervision",
        "revcol_1column",
        "connections",
        one,
        supervision=False,
    )


def _transformers() -> Iterator[Recipe]:
    settings = training(
        *(IMAGENET, adamw(1e-3), cosine(20, 1e-3)), epochs=300, batch=1024, pictures=large(), **PICTURES, ema=0.9999
    )
    own = "the appendix's hyper-parameters are not known here; these are those of RevCol-T."

    def recipe(name: str, size: str, model: str, *differs: str, **options: Any) -> Recipe:
        family = "ViT" if model.startswith("vit") else "RevCol-ViT"
        own_options = {**({} if family == "ViT" else REVERSED), "drop_path_rate": 0.1, **options}
        base = (name, PAPER, family, size, IMAGENET, "train", model, settings, own_options)
        return Recipe(*base, (("appendix B", ""),), differs=(own, *differs), needs="ImageNet and GPUs")

    # Blocks per level by number of columns: 32 in all, as the text of B.3 says, or 48, as the base's FLOPs imply.
    blocks = {32: {1: 8, 2: 4, 4: 2, 8: 1}}
    for columns, count in blocks[32].items():
        size = f"S, {columns} columns, 32 blocks"
        yield recipe(f"revcol_vit_small_{columns}c", size, "revcol_vit_small", blocks=(count,) * 4, columns=columns)
        reading = "of the two readings of B.3 the one of its text, 32 blocks in all; its multiply-adds want 48."
        yield recipe(
            f"revcol_vit_base_{columns}c_32blocks",
            f"B, {columns} columns, 32 blocks",
            "revcol_vit_base",
            reading,
            blocks=(count,) * 4,
            columns=columns,
        )
    names = {1: "revcol_vit_base_1column", 2: "revcol_vit_base_2columns", 4: "revcol_vit_base"}
    for columns, model in (names | {8: "revcol_vit_base_8columns"}).items():
        reading = "of the two readings of B.3 the one of its multiply-adds, 48 blocks in all; its text says 32."
        yield recipe(f"revcol_vit_base_{columns}c", f"B, {columns} columns, 48 blocks", model, reading)
    scaled = "B.1's weights: the outputs of block k divided by the root of 2 k, as in BEiT."
    yield recipe("vit_base", "B (DeiT-B)", "vit_base_patch16")
    yield recipe("vit_base_depth_init", "B, scaled by depth", "vit_base_patch16", scaled, depth_init=True)
    yield recipe("revcol_vit_base_depth_init", "B, scaled by depth", "revcol_vit_base", scaled, depth_init=True)


_BELOW = downstream.revcol(PAPER, "ADE20K", "COCO", "foundation models")
RECIPES = (*_published(), *_pretrained(), *_fine_tuned(), *_ablations(), *_transformers(), *_BELOW)
