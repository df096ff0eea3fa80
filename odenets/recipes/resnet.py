"""ResNet on CIFAR-10: 20 to 110 layers, as baselines."""

from collections.abc import Iterator

from .data import CIFAR10
from .recipe import Paper, Recipe
from .training import SHIFTED, cosine, sgd, training

PAPER = Paper(
    "Deep Residual Learning for Image Recognition",
    "He et al. 2016",
    "1512.03385",
    {"table 6": "error on CIFAR-10"},
    note="The table's rows that are baselines here.",
)
COSINE = (
    "a warm-up, half a cosine and Nesterov's momentum in place of the two steps of the rate and plain momentum; 164 "
    "epochs are about its 64,000 steps."
)
# layers, parameters, error
NETS = (
    (20, 269_722, "8.75"),
    (32, 464_154, "7.51"),
    (44, 658_586, "7.17"),
    (56, 853_018, "6.97"),
    (110, 1_727_962, "6.43"),
)


def _recipes() -> Iterator[Recipe]:
    for layers, parameters, error in NETS:
        # The largest is the counterpart of RevNet-110, and trained like it.
        like_revnet = layers == 110
        settings = (
            training(
                *(CIFAR10, sgd(decay=2e-4, nesterov=False), cosine(1)),
                epochs=160,
                batch=100,
                augment=SHIFTED,
                half=False,
            )
            if like_revnet
            else training(*(CIFAR10, sgd(), cosine(1)), epochs=164, batch=128, augment=SHIFTED, channels_last=True)
        )
        yield Recipe(
            f"cifar10_resnet{layers}",
            PAPER,
            *("ResNet", str(layers), CIFAR10, "train", f"resnet{layers}", settings),
            published=(("table 6", f"{error} % error"),),
            differs=("the recipe is that of RevNet-110, to compare with it.",) if like_revnet else (COSINE,),
            parameters=parameters,
            file={20: "cifar10_resnet.yaml", 110: "cifar10_resnet110.yaml"}.get(layers, ""),
        )


RECIPES = tuple(_recipes())
