"""RDNet: T to L, the roadmap from DenseNet-201, and the ablations of its table 8."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..models import roadmap
from . import downstream
from .data import IMAGENET
from .recipe import Paper, Recipe, Row
from .training import MODERN, UNMIXED, Settings, adamw, cosine, large, training

_PILOT = "odenets study run -c experiments/studies/pilot.yaml"
_TRANSFER = {
    "T": "98.9 / 90.4 / 98.6 / 93.9 / 77.0 / 81.2",
    "S": "99.0 / 91.1 / 98.4 / 94.2 / 79.1 / 82.4",
    "B": "99.3 / 91.4 / 98.6 / 94.1 / 80.5 / 83.5",
    "L": "99.3 / 91.5 / 98.6 / 94.2 / 81.5 / 83.7",
}
_ROADMAP = "table 1"


def _rows(shown: str, lines: Mapping[str, str], **more: str) -> tuple[Row, ...]:
    return tuple(Row(shown, what, published, **more) for what, published in lines.items())


PAPER = Paper(
    "DenseNets Reloaded: Paradigm Shift Beyond ResNets and ViTs",
    "Kim et al. 2024",
    "2403.19588",
    {
        _ROADMAP: "from DenseNet-201 to RDNet-T, step by step",
        "table 2": "RDNet on ImageNet-1K: accuracy, latency, memory of training",
        "table 3": "",
        "table 4": "peers on ImageNet-1K",
        "table 5": "ADE20K: UperNet",
        "table 6": "",
        "table 7": "",
        "table 8 (a)": "mixers in the third stage",
        "table 8 (b)": "the residual function",
        "table 8 (c)": "hidden width over the input's",
        "table 8 (d)": "growth rates",
        "table 8 (e)": "mixers between two transitions",
        "table 8 (f)": "what a transition keeps",
        "table 9": "stochastic depth",
        "table A": "hyper-parameters",
        "table B": "channels of RDNet-T",
        "table C": "latency on other hardware",
        "table D": "depths of ResNet and ConvNeXt",
        "table G": "transfer: CIFAR-10, CIFAR-100, Flowers, Cars, iNat-18, iNat-19",
        "table H": "generators of a GAN",
        "tables J to L": "the pilot study of random networks, on Tiny-ImageNet and ImageNet",
        "COCO": "Mask R-CNN and Cascade, 3x",
        "CLIP": "zero-shot accuracy",
    },
    (
        Row("table 3", "all", needs="its figures, which are not known here"),
        Row("table 6", "all", needs="its figures, which are not known here"),
        Row("table 7", "all", needs="its figures, which are not known here"),
        *_rows(
            "table 4",
            {
                "RSB-ResNet-50: ms for 128 pictures / GB / top-1": "115 / 2.1 / 80.4",
                "DeiT-S": "128 / 1.9 / 79.8",
                "Swin-T": "173 / 2.6 / 81.3",
                "DeiT-III-S": "128 / 2.0 / 81.4",
                "InceptionNeXt-T": "132 / 3.3 / 82.3",
                "Swin-S": "293 / 3.9 / 83.0",
                "Swin-B": "445 / 5.4 / 83.5",
            },
            needs="networks that are not here",
        ),
        *_rows(
            "table 4",
            {
                "ConvNeXt-T": "150 / 2.7 / 82.1",
                "RevCol-T": "189 / 2.0 / 82.2",
                "ConvNeXt-S": "266 / 4.0 / 83.1",
                "ConvNeXt-B": "417 / 5.4 / 83.8",
                "ConvNeXt-L": "857 / 8.6 / 84.3",
                "ConvNeXt-L, 384 pixels": "2550 / 19.0 / 85.5",
            },
            command="python experiments/benchmarks/models.py",
            needs="the paper's GPU, a V100",
        ),
        *_rows(
            "table 8 (b)",
            {
                "more activations": "81.9 % top-1",
                "depthwise convolution last": "82.3 % top-1",
                "depthwise convolution last, more activations and norms": "81.1 % top-1",
                "depthwise convolution last, BatchNorm": "82.2 % top-1",
            },
            needs="residual functions in this order, which the paper does not write out",
        ),
        Row("table A", "all", command="odenets recipe rdnet_tiny"),
        Row("table B", "all", command="odenets recipe rdnet_tiny"),
        Row("table C", "RDNet-T to L", command="python experiments/benchmarks/models.py", needs="an A100 and a Xeon"),
        *_rows(
            "table D",
            {
                "depths of ResNet-50, 25.5 M, 4.1 GFLOPs": "82.1 % top-1",
                "depths of ResNet-152, 59.7 M, 11.5 GFLOPs": "83.7 % top-1",
                "depths of ConvNeXt-T, 27.1 M, 4.5 GFLOPs": "82.4 % top-1",
                "depths of ConvNeXt-B, 88.3 M, 15.3 GFLOPs": "84.1 % top-1",
            },
            needs="the growth rates of these nets, which are not known here",
        ),
        *_rows(
            "table G",
            {f"RDNet-{size}": figures for size, figures in _TRANSFER.items()},
            needs="weights after ImageNet, and hyper-parameters that are not known here",
        ),
        *_rows(
            "table H",
            {
                "residual blocks, 5.4 M: IS / FID on CIFAR-10": "7.27 / 27.79",
                "concatenation, 5.6 M": "7.52 / 25.37",
            },
            needs="the training of a GAN",
        ),
        *_rows(
            "tables J to L",
            {
                "A, sum / concatenation": "45.8 / 47.5 % top-1",
                "B": "50.1 / 51.2 % top-1",
                "C": "53.2 / 54.3 % top-1",
                "D": "57.4 / 58.1 % top-1",
                "E": "58.2 / 58.9 % top-1",
            },
            command=_PILOT,
            needs="thousands of GPU hours; the page [Studies](study.md) has a small one",
        ),
        *_rows(
            "tables J to L",
            {"ImageNet, C / D / E": "54.9 to 55.1 / 54.7 to 55.1 / 55.8 to 56.7 % top-1"},
            needs="ImageNet and thousands of GPU hours",
        ),
        *_rows(
            "CLIP",
            {"RDNet-B, ConvNeXt-B": "54.1, 51.2 % top-1"},
            needs="pictures with texts, and training on them",
        ),
    ),
    "Tables E, F and I and the paper's figures are not known here, nor are the numbers of tables named by their data.",
)
HARDWARE = "4 GPUs of 64 pictures each, two such batches per step; V100 for the latencies"
JITTER = (
    "the recipe's colour jitter of 0.4 is skipped by its library where RandAugment is on; --data.augment.color_jitter "
    "0.4 turns it on here."
)
AGAIN = "recompute: true is ours: less memory, the same results."
SETTINGS: Settings = training(
    *(IMAGENET, adamw(1e-3), cosine(20, 1e-3)),
    epochs=300,
    batch=512,
    at_once=128,
    augment=MODERN,
    pictures=large("random", inner=0.9),
    smoothing=0.1,
    channels_last=True,
)
SIZES = {
    "tiny": ("T", 0.15, "82.8 % top-1", 23_863_008),
    "small": ("S", 0.35, "83.7 % top-1", 50_436_448),
    "base": ("B", 0.4, "84.4 % top-1", 87_451_096),
    "large": ("L", 0.5, "84.8 % top-1", 186_269_632),
}


def _recipe(
    name: str,
    size: str,
    model: str,
    published: tuple[tuple[str, str], ...],
    *differs: str,
    settings: Settings = SETTINGS,
    stage: Any = "train",
    parameters: int | None = None,
    file: str = "",
    **options: Any,
) -> Recipe:
    start = (name, PAPER, "RDNet", size, IMAGENET, stage, model, settings, options, published)
    needs = "weights after ImageNet-1K and GPUs" if stage == "fine-tune" else "ImageNet and GPUs"
    return Recipe(*start, HARDWARE, (JITTER, *differs), needs, parameters, file)


def _published() -> Iterator[Recipe]:
    for name, (size, rate, top1, parameters) in SIZES.items():
        where = [("table 2", top1), ("table 4", top1)]
        if name == "tiny":
            ablations = [f"table 8 ({letter})" for letter in "abcdef"]
            where = [(_ROADMAP, top1), *where, *((label, top1) for label in [*ablations, "table 9"])]
        elif name in ("small", "base"):
            where.append(("table 8 (a)", top1))
        file = "rdnet_tiny.yaml" if name == "tiny" else ""
        more: dict[str, Any] = {"recompute": True, "drop_path_rate": rate, "parameters": parameters, "file": file}
        yield _recipe(f"rdnet_{name}", size, f"rdnet_{name}", tuple(where), AGAIN, **more)
    tuned = {"adapt": {"new_head": True}} | training(
        *(IMAGENET, adamw(2e-5, 1e-8), cosine(5, 0.05)),
        epochs=30,
        batch=512,
        at_once=16,
        augment=UNMIXED,
        pictures=large("random", 384, inner=1.0),
        smoothing=0.1,
        channels_last=True,
        layer_decay=0.7,
    )
    yield _recipe(
        *("rdnet_large_ft384", "L, 384 pixels", "rdnet_large", (("table 2", "85.8 % top-1"),), AGAIN),
        "it starts from the weights after ImageNet-1K at 224 pixels: --weights FILE; without them from new ones.",
        settings=tuned,
        stage="fine-tune",
        file="rdnet_large_384.yaml",
        parameters=186_269_632,
        recompute=True,
        drop_path_rate=0.6,
        head_init_scale=0.001,
    )


def _roadmap() -> Iterator[Recipe]:
    says = {
        "a": "DenseNet-201",
        "b": "wider and shallower",
        "c": "ConvNeXt's residual functions",
        "d": "a middle that grows with the input",
        "e": "a transition after every three",
        "f": "a stem of patches",
        "g": "strided transitions",
    }
    # The last step is RDNet-T, which has its own recipe.
    for row in roadmap.RDNET[:-1]:
        yield _recipe(
            f"rdnet_roadmap_{row.name}",
            f"roadmap ({row.name}) {says[row.name]}",
            "odenets.models.roadmap.rdnet",
            ((_ROADMAP, f"{row.top1:g} % top-1"),),
            "the stochastic depth of the steps is not known here; it is that of RDNet-T.",
            step=row.name,
            drop_path_rate=0.15,
        )


def _grown(counts: Sequence[tuple[int, int]], most: int) -> dict[str, Any]:
    """Returns levels of at most ``most`` mixers, from the number of mixers and the growth of each resolution."""
    growths, functions, halves = [], [], []
    for place, (count, growth) in enumerate(counts):
        for done in range(0, count, most):
            growths.append(growth)
            functions.append(min(most, count - done))
            # The stem already produces the first resolution, and within a resolution transitions keep the size.
            halves.append(place > 0 and not done)
    return {"growths": growths, "functions": functions, "downsample": halves}


TINY = ((3, 64), (3, 104), (12, 128), (3, 224))
KEPT = "the growth rates of this net are not known here; they are those of {}, and its size is another."


def _ablations() -> Iterator[Recipe]:
    def ablation(name: str, size: str, letter: str, top1: str, *differs: str, **options: Any) -> Recipe:
        kind = next((k for k in ("small", "base") if name.startswith(f"rdnet_{k}")), "tiny")
        options = {"recompute": True, "drop_path_rate": SIZES[kind][1], **options}
        label = f"table 8 ({letter})" if letter else "table 9"
        where = ((label, f"{top1} % top-1"),)
        return _recipe(name, size, f"rdnet_{kind}", where, AGAIN, *differs, **options)

    for third, top1 in ((9, "82.5"), (15, "82.8")):
        levels = _grown((*TINY[:2], (third, 128), TINY[3]), 3)
        size = f"T, 3, 3, {third}, 3 mixers"
        yield ablation(f"rdnet_tiny_depth{third}", size, "a", top1, KEPT.format("RDNet-T"), **levels)
    stages = {"small": ("S", (64, 128, 128, 240)), "base": ("B", (96, 128, 168, 336))}
    accuracies = {"small": {18: "83.5", 24: "83.6"}, "base": {18: "84.2", 24: "84.2"}}
    for kind, (letter, growths) in stages.items():
        for third, top1 in accuracies[kind].items():
            levels = _grown(tuple(zip((3, 3, third, 6), growths, strict=True)), 3)
            size = f"{letter}, 3, 3, {third}, 6 mixers"
            yield ablation(f"rdnet_{kind}_depth{third}", size, "a", top1, KEPT.format(f"RDNet-{letter}"), **levels)
    for kernel, top1 in ((3, "82.4"), (5, "82.5"), (9, "82.8"), (11, "82.7"), (13, "82.7")):
        yield ablation(f"rdnet_tiny_k{kernel}", f"T, kernel {kernel}", "b", top1, kernel=kernel)
    for times, top1 in ((1, "82.1"), (2, "82.6"), (3, "82.7"), (6, "82.6")):
        size = f"T, hidden width {times} times the input's"
        yield ablation(f"rdnet_tiny_expansion{times}", size, "c", top1, KEPT.format("RDNet-T"), expansion=times)
    for growth, top1 in ((90, "81.6"), (120, "83.0")):
        # With a stem as wide as the growth, the sizes match the published ones: 13.2 M and 5.0 G, 23.9 M and 8.9 G.
        options = {"growths": [growth] * 7, "init_channels": growth}
        yield ablation(f"rdnet_tiny_growth{growth}", f"T, growth {growth} throughout", "d", top1, **options)
    for most, top1 in ((2, "82.7"), (4, "82.6"), (6, "82.1")):
        levels = _grown(TINY, most)
        reading = "a resolution of fewer mixers has one level, and what is left over makes a shorter one."
        size = f"T, a transition after {most} mixers"
        yield ablation(f"rdnet_tiny_every{most}", size, "e", top1, reading, KEPT.format("RDNet-T"), **levels)
    for kept, top1 in ((0.3, "82.6"), (0.4, "82.6"), (0.6, "82.5"), (0.7, "82.3")):
        size = f"T, transitions keep {kept:g}"
        name = f"rdnet_tiny_compression{kept * 10:.0f}"
        yield ablation(name, size, "f", top1, KEPT.format("RDNet-T"), compression=kept)
    for rate, top1 in ((0.0, "81.6"), (0.05, "82.5"), (0.1, "82.6"), (0.2, "82.6")):
        name = f"rdnet_tiny_drop_path{rate * 100:02.0f}"
        yield ablation(name, f"T, stochastic depth {rate:g}", "", top1, drop_path_rate=rate)


RECIPES = (*_published(), *_roadmap(), *_ablations(), *downstream.rdnet(PAPER, "table 5", "COCO"))
