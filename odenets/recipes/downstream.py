"""ADE20K and COCO: the papers' networks as backbones of UPerNet and Mask2Former, and of detectors.

Rates, decays and stochastic depths are those of the released configurations; rows without one say so. The rows are
listed with their papers, which call ``revcol``, ``rdnet`` and ``convnext`` with the names of their tables.
"""

from collections.abc import Iterator
from typing import Any

from .data import Data
from .recipe import Paper, Recipe
from .training import Settings, adamw

ADE20K = Data(
    *("ADE20K", 150, 512, {}),
    "FOLDER is ADEChallengeData2016, with images/training and annotations/training.",
)
COCO = Data(
    *("COCO", 80, 800, {}),
    "FOLDER holds train2017/, val2017/ and annotations/instances_train2017.json and instances_val2017.json.",
)
WEIGHTS = "it starts from the weights after {}: --weights FILE; without them from new ones."
GRID = "the stage-wise decay of the released code is one from layer to layer here."
DIVISOR = "the loss is a mean over the pixels that have a class; the released code divides by all pixels."
CASCADE = (
    "behind each box there are two linear layers and losses of corrections; the released code has four normalised "
    "convolutions, one linear layer and the generalised overlap as a loss."
)
UNCUT = "pictures are resized and mirrored; in the released code half of them are cut before that."
SCALES = [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
PADDED: Settings = {"adapt": {"pad_kernels": True}}  # published kernels of 3, in the middle of larger ones
PICTURES = {"1k": "ImageNet-1K", "22k": "ImageNet-22K", "168m": "168 million pictures that are not public"}


def segmentation(
    lr: float,
    weight_decay: float,
    *,
    side: int = 512,
    stride: int | None = None,
    warmup: int = 1500,
    layer_decay: float = 1.0,
    power: float = 1.0,
    clip: float = 0.0,
) -> Settings:
    """Returns a configuration of 160,000 steps on ADE20K, 16 pictures each, without its network.

    Args:
        lr: the learning rate.
        weight_decay: weight decay of matrices.
        side: side of the crops, and of the windows of the evaluation.
        stride: stride of the windows; None means two thirds of their side.
        warmup: number of warm-up steps.
        layer_decay: decay of the learning rate from layer to layer.
        power: exponent, in the schedule, of the remaining share of the run.
        clip: greatest norm of a step's gradient; 0 leaves it as it is.
    """
    window = {"window": side, "stride": stride or 2 * side // 3}
    poly = {"power": power, "warmup_steps": warmup}
    given: Settings = {
        "inference": {"class_path": "odenets.segmentation.Inference", "init_args": window},
        "optimizer": adamw(lr, weight_decay),
        "schedule": {"class_path": "odenets.training.Poly", "init_args": poly},
    }
    given |= {"layer_decay": layer_decay} if layer_decay < 1 else {}
    # The data set's default sizes are for crops of 512 pixels.
    larger = {} if side == 512 else {"crop": side, "short": side, "longest": 4 * side}
    trainer: Settings = {"max_steps": 160_000, "precision": "16-mixed", "check_val_every_n_epoch": 12}
    return {
        "model": {"class_path": "odenets.training.Segmenter", "init_args": given},
        "data": {
            "class_path": "odenets.segmentation.SegmentationData",
            "init_args": {"kind": "ade20k", **larger, "batch_size": 16},
        },
        "trainer": trainer | ({"gradient_clip_val": clip} if clip else {}),
    }


def detection(
    head: str,
    lr: float,
    *,
    layer_decay: float = 1.0,
    weight_decay: float = 0.05,
    warmup: int = 500,
    masks: bool = True,
    **of_head: Any,
) -> Settings:
    """Returns a configuration of 36 epochs of COCO, 16 pictures per step, without its network.

    Args:
        head: the class in ``odenets.detection``.
        lr: the learning rate, divided by ten after 27 epochs and again after 33.
        layer_decay: decay of the learning rate from layer to layer.
        weight_decay: weight decay of matrices.
        warmup: number of warm-up steps.
        masks: whether masks are read.
        of_head: options of the head.
    """
    falls = {"at": [27 / 36, 33 / 36], "factor": 0.1, "warmup_steps": warmup}
    given: Settings = {
        "head": {"class_path": f"odenets.detection.{head}", "init_args": of_head},
        "optimizer": adamw(lr, weight_decay),
        "schedule": {"class_path": "odenets.training.Milestones", "init_args": falls},
    }
    given |= {"layer_decay": layer_decay} if layer_decay < 1 else {}
    shown: Settings = {"size": 800, "resize": "multiscale", "scales": SCALES, "longest": 1333, "batch_size": 16}
    return {
        "model": {"class_path": "odenets.training.Detector", "init_args": given},
        "data": {
            "class_path": "odenets.detection.DetectionData",
            "init_args": shown | ({"masks": True} if masks else {}),
        },
        "trainer": {"max_epochs": 36, "precision": "16-mixed"},
    }


def _below(
    name: str,
    paper: Paper,
    family: str,
    size: str,
    data: Data,
    model: str,
    settings: Settings,
    options: Settings,
    published: tuple[tuple[str, str], ...],
    *differs: str,
    after: str = "1k",
    file: str = "",
) -> Recipe:
    begins = WEIGHTS.format(PICTURES[after])
    needs = f"the weights, {data.name} and GPUs" if after != "168m" else "pictures that are not public"
    start = (name, paper, family, size, data, "fine-tune", model, settings, options, published)
    return Recipe(*start, differs=(*differs, begins), needs=needs, file=file)  # type: ignore[arg-type]


def _head(model: str, head: str, rate: float, width: int, **options: Any) -> tuple[str, Settings]:
    """Returns a segmentation head on a registered model, trained by "reverse" where the model is reversible."""
    reverse = {"backprop": "reverse"} if model.startswith("revcol") else {}
    given: Settings = {"model": model, **reverse, "options": {"drop_path_rate": rate, **options}, "width": width}
    return f"odenets.segmentation.{head}", given


# name, letter, pictures before, side, stride, rate, layer decay, warm-up, width of the head, mIoU of one / several
REVCOL_ADE20K = (
    ("tiny", "T", "1k", 512, 341, 6e-5, 1.0, 1500, 512, "47.4 / 47.6"),
    ("small", "S", "1k", 512, 341, 4e-5, 1.0, 1500, 512, "47.9 / 49.0"),
    ("base", "B", "1k", 512, 426, 4e-5, 1.0, 1500, 512, "49.0 / 50.1"),
    ("base", "B", "22k", 640, 426, 4e-5, 0.9, 1500, 512, "52.7 / 53.3"),
    ("large", "L", "22k", 640, 426, 4e-5, 0.9, 3000, 512, "53.4 / 53.7"),
    ("xlarge", "XL", "22k", 640, 426, 4e-5, 0.9, 3000, 512, ""),
    ("huge", "H", "168m", 640, 426, 4e-5, 0.9, 3000, 1440, "57.8 / 58.0"),
)
# name, letter, pictures before, stochastic depth, rate, layer decay, AP of boxes / masks
REVCOL_COCO = (
    ("tiny", "T", "1k", 0.3, 2e-4, 0.85, "50.8 / 44.0"),
    ("small", "S", "1k", 0.4, 2e-4, 0.85, "52.6 / 45.5"),
    ("base", "B", "1k", 0.4, 2e-4, 0.9, "53.0 / 45.9"),
    ("base", "B", "22k", 0.4, 1e-4, 0.9, "55.0 / 47.5"),
    ("large", "L", "22k", 0.5, 1e-4, 0.85, "55.9 / 48.4"),
)
NO_FILE = "no configuration of this row is published; {}"
GUESS = "a guess: no configuration of this row is published, and how it was trained is not known here; {}"


def _scales(figure: str) -> str:
    return f"{figure} mIoU (one scale / several)" if figure else ""


def _boxes(figure: str) -> str:
    return f"{figure} box / mask AP"


def revcol(paper: Paper, ade20k: str, coco: str, foundation: str) -> Iterator[Recipe]:
    """Yields the rows of RevCol.

    Args:
        paper: the paper that has them.
        ade20k: its table of ADE20K.
        coco: its table of COCO.
        foundation: its table of H with the best heads.
    """
    for name, letter, after, side, stride, lr, decay, warmup, width, figure in REVCOL_ADE20K:
        huge, own = name == "huge", {"kernel_size": 7} if name == "huge" else {}
        kind, options = _head(f"revcol_{name}", "UPerNet", 0.3, width, **own)
        settings = segmentation(lr, 0.01, side=side, stride=stride, warmup=warmup, layer_decay=decay)
        yield _below(
            f"ade20k_upernet_revcol_{name}{'' if after != '22k' else '_22k'}",
            *(
                paper,
                "RevCol",
                f"{letter}, UPerNet, {side} pixels{', kernel 7' if huge else ''}, after {after.upper()}",
            ),
            *(ADE20K, kind, (PADDED if huge else {}) | settings, options, ((ade20k, _scales(figure)),)),
            *((NO_FILE.format("it is that of L."),) if name == "xlarge" else ()),
            *(("the pictures per step of H are not known here: one on each of its GPUs.",) if huge else ()),
            DIVISOR,
            after=after,
            file="ade20k_upernet_revcol_tiny.yaml" if (name, after) == ("tiny", "1k") else "",
        )
    for name, letter, after, rate, lr, decay, figure in REVCOL_COCO:
        yield _below(
            f"coco_cascade_revcol_{name}{'' if after != '22k' else '_22k'}",
            *(paper, "RevCol", f"{letter}, Cascade Mask R-CNN 3x, after {after.upper()}", COCO, f"revcol_{name}"),
            *(detection("CascadeMaskRCNN", lr, layer_decay=decay), {"backprop": "reverse", "drop_path_rate": rate}),
            *(((coco, _boxes(figure)),), CASCADE, UNCUT),
            after=after,
        )
    yield from _revcol_best(paper, foundation)


def _revcol_best(paper: Paper, shown: str) -> Iterator[Recipe]:
    """Yields RevCol-H with the heads with which its best figures were measured."""
    kind, options = _head("revcol_huge", "Mask2Former", 0.3, 256, kernel_size=7)
    yield _below(
        *(
            "ade20k_mask2former_revcol_huge",
            paper,
            "RevCol",
            "H, Mask2Former, 640 pixels, kernel 7, after 168M",
            ADE20K,
        ),
        *(kind, PADDED | segmentation(1e-4, 0.05, side=640, warmup=0, layer_decay=0.9, power=0.9, clip=0.01)),
        *(options, ((shown, "61.0 mIoU"),)),
        GUESS.format(
            "optimiser and schedule are Mask2Former's own (Cheng et al. 2022), the layer decay is that of UPerNet."
        ),
        "queries are 100, of one picture's classes; whether more pictures were trained on before is not known here.",
        after="168m",
    )
    head: Settings = {"queries": 900, "feature_levels": 4}
    yield _below(
        *("coco_detr_revcol_huge", paper, "RevCol", "H, Deformable DETR, kernel 13, after 168M", COCO, "revcol_huge"),
        PADDED | detection("DeformableDETR", 1e-4, layer_decay=0.9, weight_decay=1e-4, masks=False, **head),
        {"backprop": "reverse", "drop_path_rate": 0.4, "kernel_size": 13},
        ((shown, "63.8 box AP (DINO)"),),
        "the paper's head is DINO; transformers has none, and Deformable DETR lacks its denoising, its queries that "
        "begin at the encoder's best places, and its look ahead twice.",
        GUESS.format("rates are Deformable DETR's own, epochs those of the cascade."),
        "further pictures with boxes, on which the published detector may have been trained first, are left out.",
        after="168m",
    )


def rdnet(paper: Paper, ade20k: str, coco: str) -> Iterator[Recipe]:
    """Yields the rows of RDNet.

    Args:
        paper: the paper that has them.
        ade20k: its table of ADE20K.
        coco: its table of COCO.
    """
    own = "released weight decay and stochastic depth; we have also read 0.03 and 0.3."
    rows = (
        ("tiny", "T", 0.03, 0.1, "47.6 / 48.6", ()),
        ("small", "S", 0.03, 0.2, "48.7 / 49.8", ()),
        ("base", "B", 0.01, 0.2, "49.6 / 50.5", (own,)),
        ("large", "L", 0.01, 0.2, "", (NO_FILE.format("it is that of B."),)),
    )
    for name, letter, weight_decay, rate, figure, differs in rows:
        kind, options = _head(f"rdnet_{name}", "UPerNet", rate, 512)
        yield _below(
            *(f"ade20k_upernet_rdnet_{name}", paper, "RDNet", f"{letter}, UPerNet", ADE20K, kind),
            *(segmentation(8e-5, weight_decay, layer_decay=0.9), options, ((ade20k, _scales(figure)),)),
            *(*differs, GRID, DIVISOR),
        )
    settings = detection("MaskRCNN", 3e-4, layer_decay=0.95, warmup=1500)
    yield _below(
        *("coco_mask_rdnet_tiny", paper, "RDNet", "T, Mask R-CNN 3x", COCO, "rdnet_tiny", settings),
        *({"drop_path_rate": 0.2}, ((coco, _boxes("47.5 / 42.4")),), GRID, UNCUT),
    )
    cascades = (
        ("tiny", "T", 0.05, 0.8, 0.4, "51.6 / 44.6"),
        ("small", "S", 0.1, 0.7, 0.4, "52.3 / 45.4"),
        ("base", "B", 0.05, 0.7, 0.6, "52.9 / 46.0"),
    )
    for name, letter, weight_decay, decay, rate, figure in cascades:
        settings = detection("CascadeMaskRCNN", 8e-5, layer_decay=decay, weight_decay=weight_decay, warmup=1000)
        yield _below(
            *(f"coco_cascade_rdnet_{name}", paper, "RDNet", f"{letter}, Cascade Mask R-CNN 3x", COCO, f"rdnet_{name}"),
            *(settings, {"drop_path_rate": rate}, ((coco, _boxes(figure)),), CASCADE, GRID, UNCUT),
        )


# name, letter, pictures before, side, rate, stochastic depth, mIoU of one scale, of several
CONVNEXT_ADE20K = (
    ("tiny", "T", "1k", 512, 1e-4, 0.4, "46.0", "46.7"),
    ("small", "S", "1k", 512, 1e-4, 0.3, "48.7", "49.6"),
    ("base", "B", "1k", 512, 1e-4, 0.4, "49.1", "49.9"),
    ("base", "B", "22k", 640, 1e-4, 0.4, "52.6", "53.1"),
    ("large", "L", "22k", 640, 1e-4, 0.4, "53.2", "53.7"),
    ("xlarge", "XL", "22k", 640, 8e-5, 0.4, "53.6", "54.0"),
)
CONVNEXT_COCO = (
    ("tiny", "T", "1k", 2e-4, 0.7, 0.4, "50.4 / 43.7"),
    ("small", "S", "1k", 2e-4, 0.7, 0.6, "51.9 / 45.0"),
    ("base", "B", "1k", 2e-4, 0.8, 0.7, "52.7 / 45.6"),
    ("base", "B", "22k", 1e-4, 0.8, 0.6, "54.0 / 46.9"),
    ("large", "L", "22k", 1e-4, 0.7, 0.7, "54.8 / 47.6"),
    ("xlarge", "XL", "22k", 1e-4, 0.7, 0.8, "55.2 / 47.7"),
)


def convnext(paper: Paper, one: str, several: str, coco: str) -> Iterator[Recipe]:
    """Yields the rows of ConvNeXt.

    Args:
        paper: the paper that has them.
        one: its table of ADE20K, one scale.
        several: its table of ADE20K, several scales.
        coco: its table of COCO.
    """
    for name, letter, after, side, lr, rate, single, multi in CONVNEXT_ADE20K:
        kind, options = _head(f"convnext_{name}", "UPerNet", rate, 512)
        figures = ((several, f"{multi} mIoU (several scales)"), (one, f"{single} mIoU (one scale)"))
        yield _below(
            f"ade20k_upernet_convnext_{name}{'' if after != '22k' else '_22k'}",
            *(paper, "ConvNeXt", f"{letter}, UPerNet, {side} pixels, after {after.upper()}", ADE20K, kind),
            *(segmentation(lr, 0.05, side=side, layer_decay=0.9), options, figures, GRID, DIVISOR),
            after=after,
        )
    settings = detection("MaskRCNN", 1e-4, layer_decay=0.95)
    yield _below(
        *("coco_mask_convnext_tiny", paper, "ConvNeXt", "T, Mask R-CNN 3x", COCO, "convnext_tiny", settings),
        *({"drop_path_rate": 0.4}, ((coco, _boxes("46.2 / 41.7")),), UNCUT),
    )
    for name, letter, after, lr, decay, rate, figure in CONVNEXT_COCO:
        size = f"{letter}, Cascade Mask R-CNN 3x, after {after.upper()}"
        yield _below(
            f"coco_cascade_convnext_{name}{'' if after != '22k' else '_22k'}",
            *(paper, "ConvNeXt", size, COCO, f"convnext_{name}", detection("CascadeMaskRCNN", lr, layer_decay=decay)),
            *({"drop_path_rate": rate}, ((coco, _boxes(figure)),), CASCADE, UNCUT),
            after=after,
        )
