"""RevNet on CIFAR: 38, 110 and 164 layers, trained in memory that does not grow with the units of a level."""

from collections.abc import Iterator

from .data import CIFAR10, CIFAR100
from .recipe import Paper, Recipe
from .training import SHIFTED, cosine, sgd, training

PAPER = Paper(
    "The Reversible Residual Network",
    "Gomez et al. 2017",
    "1707.04585",
    {"table 3": "error on CIFAR-10 and CIFAR-100"},
    note="The paper's errors are not confirmed here, so their cells are empty.",
)
COSINE = "half a cosine in place of the two steps of the rate; 160 epochs of 100 pictures a step are its 80,000 steps."
PARAMETERS = {38: 464_890, 110: 1_729_194, 164: 1_748_778}


def _recipes() -> Iterator[Recipe]:
    for data in (CIFAR10, CIFAR100):
        prefix = data.name.lower().replace("-", "")
        for layers, parameters in PARAMETERS.items():
            yield Recipe(
                f"{prefix}_revnet{layers}",
                PAPER,
                *("RevNet", str(layers), data, "train", f"revnet{layers}"),
                training(
                    *(data, sgd(decay=2e-4, nesterov=False), cosine(1)),
                    epochs=160,
                    batch=100,
                    augment=SHIFTED,
                    half=False,
                ),
                {"backprop": "reverse"},
                (("table 3", ""),),
                differs=(COSINE,),
                parameters=parameters if data is CIFAR10 else None,
                file="cifar10_revnet110.yaml" if (prefix, layers) == ("cifar10", 110) else "",
            )


RECIPES = tuple(_recipes())
