"""The parts of recipes that many rows share: optimisers, schedules, augmentation, pictures per step."""

from typing import Any

from .data import Data

Settings = dict[str, Any]
# As in most published recipes of this decade; 9 and 0.5 are what they write as rand-m9-mstd0.5-inc1.
MODERN = {"flip": 0.5, "rand_augment": 9, "rand_augment_std": 0.5, "erase": 0.25, "mixup": 0.8, "cutmix": 1.0}
UNMIXED = {key: value for key, value in MODERN.items() if key not in ("mixup", "cutmix")}
# For released code that evaluates larger pictures in this way.
SQUEEZED = (
    "above 224 pixels the released code squeezes the whole picture into a square to evaluate it; here the square in "
    "its middle is seen."
)
SHIFTED = {"crop": 4, "flip": 0.5}  # for pictures with sides of 32 pixels


def sgd(lr: float = 0.1, decay: float = 1e-4, nesterov: bool = True) -> Settings:
    """Stochastic gradient descent with a momentum of 0.9."""
    args = {"lr": lr, "momentum": 0.9, **({"nesterov": True} if nesterov else {}), "weight_decay": decay}
    return {"class_path": "torch.optim.SGD", "init_args": args}


def adamw(lr: float, decay: float = 0.05) -> Settings:
    """AdamW with torch's betas, 0.9 and 0.999, which all of the papers use."""
    return {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr, "weight_decay": decay}}


def cosine(warmup: float, final: float = 0.0) -> Settings:
    """Linear warm-up over ``warmup`` epochs, then half a cosine down to ``final`` times the peak."""
    args = {"warmup": warmup, **({"final": final} if final else {})}
    return {"class_path": "odenets.training.WarmupCosine", "init_args": args}


def milestones(*at: float) -> Settings:
    """Divides the rate by ten at each of these fractions of the run; at thirds where none are given."""
    return {"class_path": "odenets.training.Milestones", "init_args": {"at": list(at)} if at else {}}


def training(
    data: Data,
    optimizer: Settings,
    schedule: Settings,
    *,
    epochs: int,
    batch: int,
    at_once: int | None = None,
    augment: Settings | None = None,
    pictures: Settings | None = None,
    kind: str = "Classifier",
    smoothing: float = 0.0,
    channels_last: bool = False,
    clip: float = 0.0,
    ema: float = 0.0,
    half: bool = True,
    callbacks: tuple[Settings, ...] = (),
    **more: Any,
) -> Settings:
    """Returns a configuration without its network.

    Args:
        data: the data set.
        optimizer: as a class and its arguments.
        schedule: likewise.
        epochs: number of epochs.
        batch: pictures per step.
        at_once: pictures in memory at a time; None means all of a step.
        augment: augmentation of training pictures; None means none.
        pictures: further options of the data: size, crop, interpolation.
        kind: the class in ``odenets.training`` that trains.
        smoothing: label smoothing.
        channels_last: the memory format.
        clip: greatest norm of a step's gradient; 0 leaves it as it is.
        ema: decay of averaged weights; 0 averages none.
        half: whether to use bfloat16 autocast.
        callbacks: callbacks of the trainer, after that of averaged weights.
        more: further options of the class that trains.
    """
    given: Settings = {"optimizer": optimizer, "schedule": schedule}
    given |= {"label_smoothing": smoothing} if smoothing else {}
    given |= {"channels_last": True} if channels_last else {}
    # The data's own options come last, so that they take precedence.
    shown: Settings = {"batch_size": at_once or batch, **(pictures or {}), **data.settings}
    if augment:
        shown["augment"] = {"class_path": "odenets.training.Augment", "init_args": dict(augment)}
    trainer: Settings = {"max_epochs": epochs}
    trainer |= {"accumulate_grad_batches": batch // at_once} if at_once and at_once < batch else {}
    trainer |= {"precision": "bf16-mixed"} if half else {}
    trainer |= {"gradient_clip_val": clip} if clip else {}
    average = {"class_path": "odenets.training.MovingAverage", "init_args": {"decay": ema}}
    called = [*([average] if ema else []), *callbacks]
    trainer |= {"callbacks": called} if called else {}
    return {
        "model": {"class_path": f"odenets.training.{kind}", "init_args": given | more},
        "data": {"class_path": "odenets.training.Images", "init_args": shown},
        "trainer": trainer,
    }


def large(interpolation: str = "bicubic", size: int = 224, **more: Any) -> Settings:
    """Options of the data for pictures that are cropped at random in training."""
    how = {} if interpolation == "bilinear" else {"interpolation": interpolation}
    return {"size": size, "smallest_crop": 0.08, **how, **more}
