"""DenseNet: 40 to 250 layers on CIFAR and SVHN, 121 to 264 on ImageNet."""

from collections.abc import Iterator

from .data import CIFAR10, CIFAR100, IMAGENET, SVHN, Data
from .recipe import Paper, Recipe, Row
from .training import SHIFTED, large, milestones, sgd, training

PAPER = Paper(
    "Densely Connected Convolutional Networks",
    "Huang et al. 2017",
    "1608.06993",
    {
        "table 1": "architectures for ImageNet",
        "table 2": "error on CIFAR-10, CIFAR-100 (with augmentation: +) and SVHN",
        "table 3": "error on ImageNet",
        "repository": "shallow and wide nets, and others of the authors' repository",
        "figures 1 and 2": "the idea: drawings",
        "figure 3": "error on ImageNet against parameters and multiply-adds",
        "figure 4": "error on CIFAR-10+ against parameters; curves of training",
        "figure 5": "mean absolute weights by source layer, of a DenseNet of 40 layers on CIFAR-10+",
    },
    (
        Row(
            "table 1",
            "DenseNet-121 to 264: the page [DenseNet](models/densenet.md)",
            command="odenets recipe densenet121",
        ),
        Row("figures 1 and 2", "all", "no figures", needs="no measurement: they are drawings"),
        Row(
            "table 3",
            "ten crops, DenseNet-121 / 169 / 201 / 264",
            "23.61 / 22.08 / 21.46 / 20.80 % error",
            needs="the nets, trained, and predictions of ten crops",
        ),
        Row("figure 3", "DenseNets and ResNets", needs="the nets of table 3, trained"),
        Row("figure 4", "DenseNets and pre-activated ResNets", needs="the nets of table 2, trained"),
        Row(
            "figure 5",
            "DenseNet of 40 layers, growth 12",
            command="odenets analyse CKPT weights",
            needs="the net, trained",
        ),
        Row(
            "repository",
            "DenseNet-232, growth 48, ImageNet",
            "21.2 % error",
            needs="its layers, which are not known here",
        ),
        Row(
            "repository", "DenseNet-cosine-264, growth 32", "21.6 % error", needs="more epochs' recipe, not known here"
        ),
        Row(
            "repository", "DenseNet-cosine-264, growth 48", "20.4 % error", needs="more epochs' recipe, not known here"
        ),
    ),
    "Recipes of table 3 have the errors of one crop, by which networks are judged here. Table 2 also has networks of "
    "other papers, which are not listed.",
)
HELD_OUT = (
    "the paper holds out 6,000 training pictures and takes the epoch that is best on them; here all are trained on, "
    "and the last epoch counts."
)
SPARED = "weight decay spares norms and biases here; the released code's takes all parameters."
LIGHT = "the paper's recipe, that of its ResNets, also adds noise along the principal components of the colours."
AGAIN = "recompute: true is ours: less memory, the same results."
# layers, growth, whether BC; model; parameters with ten classes; errors on C10, C10+, C100, C100+, SVHN
NETS = (
    ("densenet40_k12", "L 40, k 12", 1_019_722, ("7.00", "5.24", "27.55", "24.42", "1.79")),
    ("densenet100_k12", "L 100, k 12", 6_979_642, ("5.77", "4.10", "23.79", "20.20", "1.67")),
    ("densenet100_k24", "L 100, k 24", 27_249_082, ("5.83", "3.74", "23.42", "19.25", "1.59")),
    ("densenet_bc100_k12", "BC, L 100, k 12", 769_162, ("5.92", "4.51", "24.15", "22.27", "1.76")),
    ("densenet_bc250_k24", "BC, L 250, k 24", 15_324_406, ("5.19", "3.62", "19.64", "17.60", "1.74")),
    ("densenet_bc190_k40", "BC, L 190, k 40", 25_624_430, ("", "3.46", "", "17.18", "")),
)
WIDE = (
    ("densenet_bc40_k36", "BC, L 40, k 36", 1_542_682, ("", "4.58", "", "22.30", "")),
    ("densenet_bc40_k48", "BC, L 40, k 48", 2_733_130, ("", "3.99", "", "20.29", "")),
    ("densenet_bc40_k60", "BC, L 40, k 60", 4_261_690, ("", "4.01", "", "19.99", "")),
)
COLUMNS: tuple[tuple[Data, bool], ...] = (
    *((CIFAR10, False), (CIFAR10, True), (CIFAR100, False), (CIFAR100, True)),
    (SVHN, False),
)


def _small() -> Iterator[Recipe]:
    for model, size, parameters, errors in (*NETS, *WIDE):
        for (data, augmented), error in zip(COLUMNS, errors, strict=True):
            if not error:
                continue
            prefix, plain = data.name.lower().replace("-", ""), data is not SVHN and not augmented
            options: dict[str, object] = {"recompute": True}
            # As in the paper, and confirmed by its parameter counts; the released code has twice the growth.
            if "_bc" not in model:
                options["init_channels"] = 16
            # Published with dropout exactly where pictures are not augmented.
            if not augmented:
                options["drop_rate"] = 0.2
            yield Recipe(
                f"{prefix}_{model}{'_plain' if plain else ''}",
                PAPER,
                *("DenseNet", f"{size}{' without augmentation' if plain else ''}", data, "train", model),
                training(
                    *(data, sgd(), milestones(0.5, 0.75)),
                    epochs=40 if data is SVHN else 300,
                    batch=64,
                    augment=SHIFTED if augmented else None,
                    half=False,
                ),
                options,
                (("table 2" if (model, size, parameters, errors) in NETS else "repository", f"{error} % error"),),
                differs=(AGAIN, SPARED, *((HELD_OUT,) if data is SVHN else ())),
                # Counted with ten classes; a head for a hundred has more.
                parameters=parameters if data.classes == 10 else None,
                file="cifar10_densenet_bc100.yaml"
                if (prefix, model) == ("cifar10", "densenet_bc100_k12") and augmented
                else "",
            )


def _large() -> Iterator[Recipe]:
    nets = {
        "121": ("25.02 % error", "table 3", 7_978_856),
        "169": ("23.80 % error", "table 3", 14_149_480),
        "201": ("22.58 % error", "table 3", 20_013_928),
        "264": ("22.15 % error", "table 3", 33_337_704),
        "161": ("22.2 % error", "repository", 28_681_000),
    }
    settings = training(
        *(IMAGENET, sgd(), milestones()),
        epochs=90,
        batch=256,
        at_once=64,
        augment={"flip": 0.5, "color_jitter": 0.4},
        pictures=large("bilinear"),
    )
    for layers, (error, where, parameters) in nets.items():
        yield Recipe(
            f"densenet{layers}",
            PAPER,
            *("DenseNet", layers, IMAGENET, "train", f"densenet{layers}"),
            settings,
            {"recompute": True},
            ((where, error),),
            differs=(AGAIN, SPARED, LIGHT, "bfloat16 autocast is ours."),
            needs="ImageNet and GPUs",
            parameters=parameters,
        )


RECIPES = (*_small(), *_large())
