"""A study's settings (the networks drawn, their pictures and recipe), and the training of one of its networks."""

import math
import os
import platform
import time
import warnings
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from typing import Any, Literal

from ..training import needed as needed

# isort: split
import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from schemes import SchemeError

from ..analysis.rank import rank_profile
from ..training import Augment, Classifier, Images, Milestones, WarmupCosine
from ..training.sets import Cached
from .net import RandomNet
from .space import SPACES, Candidate, Space, sample
from .store import TRAINED, Result

# May differ between two runs of one study: where the pictures are, how many networks are trained, on what hardware.
_FREE = ("root", "per_kind", "threads", "gpus")
_SEEDS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")  # what Lightning's seeding leaves in the environment
# The least and the greatest value of each number. A network's seed is 1,000,003 times the study's plus its number, and
# generators take 32 bits.
_RANGES: dict[str, tuple[int, float]] = {
    **dict.fromkeys(("per_kind", "size", "epochs", "batch_size", "threads"), (1, math.inf)),
    **dict.fromkeys(("lr", "weight_decay", "crop", "rank_pictures", "gpus"), (0, math.inf)),
    "seed": (0, 4294),
    "flip": (0, 1),
}
_WORDS: dict[str, tuple[str | None, ...]] = {
    "optimizer": ("sgd", "adamw", None),
    "schedule": ("steps", "cosine"),
    "precision": ("32-true", "bf16-mixed", "16-mixed"),
}


@dataclass(frozen=True)
class Study:
    """A comparison of schemes over random networks, trained alike.

    Args:
        space: design space: A to E of the RDNet paper, or mini.
        schemes: the schemes to compare; the first is the baseline. "euler" adds, "dense" concatenates.
        per_kind: number of networks for each combination of scheme, block order and augmentation.
        seed: seed of the draws and, with a network's number, of its weights and pictures.
        root: folder of the pictures, as in odenets.training.Images.
        size: side of the pictures.
        classes: number of classes to use, from the first on; null for all.
        epochs: training epochs; null takes the space's.
        optimizer: sgd (momentum 0.9, Nesterov) or adamw; null takes the space's.
        lr: peak learning rate; null takes 0.1 for sgd and 0.001 for adamw.
        weight_decay: null takes 0.0001 for sgd and 0.05 for adamw.
        schedule: steps (to a tenth after each third) or cosine (after half an epoch of warm-up).
        batch_size: pictures per step.
        crop: largest shift of a training picture, in pixels.
        flip: probability of a left-right flip.
        precision: precision of training.
        rank_pictures: number of validation pictures for the feature ranks after training; 0 for none.
        threads: CPU threads per network, and the cores that Ray reserves for it.
        gpus: GPUs per network; a fraction lets several networks share one.
    """

    space: str = "mini"
    schemes: tuple[str, ...] = ("euler", "dense")
    per_kind: int = 20
    seed: int = 0
    root: str | None = None
    size: int = 64
    classes: int | None = None
    epochs: int | None = None
    optimizer: Literal["sgd", "adamw"] | None = None
    lr: float | None = None
    weight_decay: float | None = None
    schedule: Literal["steps", "cosine"] = "steps"
    batch_size: int = 256
    crop: int = 4
    flip: float = 0.5
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    rank_pictures: int = 64
    threads: int = 1
    gpus: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "schemes", tuple(self.schemes))  # a list could not be hashed
        if self.space not in SPACES:
            raise SchemeError(f"space is {self.space!r}, want one of {', '.join(SPACES)}.")
        if len(set(self.schemes)) < max(2, len(self.schemes)):
            raise SchemeError(f"schemes are {', '.join(self.schemes)}: want two or more, each once.")
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            # Written so that NaN is refused too.
            if value is not None and not (least <= value <= most and value < math.inf):
                want = f"{least} or more" if most == math.inf else f"{least} to {most}"
                raise SchemeError(f"{name} is {value}, want {want}.")
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                known = ", ".join(filter(None, words))
                raise SchemeError(f"{name} is {getattr(self, name)!r}, want one of {known}.")

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the results; two runs of one study agree in them."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _FREE}

    @property
    def ranges(self) -> Space:
        """The design space."""
        return SPACES[self.space]

    def candidates(self, classes: int) -> list[Candidate]:
        """Returns the study's networks, for pictures of a number of classes.

        Args:
            classes: number of classes of the pictures; the study's own ``classes`` takes precedence.
        """
        return sample(
            self.ranges, self.schemes, self.per_kind, seed=self.seed, size=self.size, classes=self.classes or classes
        )

    def data(self) -> Images:
        """Opens the pictures, anew at each call."""
        images = Images(root=self.root, size=self.size, batch_size=self.batch_size, cache=True, smallest_crop=0)
        if self.classes is not None and not 2 <= self.classes <= images.num_classes:
            raise SchemeError(f"classes is {self.classes}, want 2 to {images.num_classes}, as the pictures have.")
        return images


@lru_cache(maxsize=1)  # a worker decodes the pictures once, for all networks that it trains
def _pictures(study: Study) -> Images:
    images = study.data()
    images.setup("fit")
    if study.classes is not None:
        images.classes = list(images.classes)[: study.classes]
        for name, data in images.sets.items():
            assert isinstance(data, Cached)
            chosen = data.labels < study.classes
            images.sets[name] = Cached(data.pictures[chosen], data.labels[chosen])
    return images


def train(study: Study, candidate: Candidate) -> Result:
    """Trains one network of a study; an exception on the way becomes its result and is not raised.

    The same study and candidate give the same result on the same kind of machine, whatever was trained before. The
    random state of the process is left as it was, the seeds in its environment included.

    Args:
        study: the settings that all networks share.
        candidate: the network.
    """
    worker = f"{platform.node()}:{os.getpid()}"
    threads = torch.get_num_threads()
    seeds = {name: os.environ.get(name) for name in _SEEDS}
    start = time.perf_counter()
    try:
        torch.set_num_threads(study.threads)
        # Training one network in a notebook must not advance the random state of the process.
        with isolate_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _train(study, candidate, worker)
    except Exception as error:  # e.g. out of memory; an interrupt is not an Exception, and propagates
        text = (str(error).strip() or type(error).__name__).splitlines()[-1]
        return Result("failed", seconds=time.perf_counter() - start, error=text[:500], worker=worker)
    finally:
        torch.set_num_threads(threads)
        for name, value in seeds.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _train(study: Study, candidate: Candidate, worker: str) -> Result:
    # The weights depend on the network's number alone, not on the order of training or the machine.
    L.seed_everything(study.seed * 1_000_003 + candidate.number, verbose=False)
    data = _pictures(study)
    data.augment = Augment(crop=study.crop, flip=study.flip, **_augmentation(candidate))
    net = RandomNet(candidate, data.num_classes)
    schedule = Milestones() if study.schedule == "steps" else WarmupCosine(0.5)
    module, trainer = Classifier(net, _optimizer(study), schedule), _trainer(study)
    start = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - start
    # Lightning may end a fit at Ctrl-C without raising it, and a half-trained network must not be recorded.
    if trainer.interrupted:
        raise KeyboardInterrupt
    figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
    # Judged by the losses: an accuracy is finite even where the loss is not, and would enter the means.
    finite = all(math.isfinite(figures[name]) for name in ("val/loss", "train/loss"))
    x = data.on_after_batch_transfer(_batch(data, "val", study.rank_pictures or 1), 0)[0].to(module.device)
    net.to(module.device).eval()
    ranks = []
    if study.rank_pictures and finite:
        with torch.no_grad():
            ranks = [(r.width, r.numerical, round(r.effective, 4)) for r in rank_profile(net.trajectory(x))]
    # Kept bytes are measured last: they take a pass in training mode, which updates the norms' statistics; and in the
    # precision of training, which decides what is kept.
    with trainer.precision_plugin.forward_context():
        kept = kept_bytes(net.train(), *_batch(data, "train", study.batch_size))
    return Result(
        TRAINED if finite else "diverged",
        figures["val/acc"] if finite else None,
        figures["val/loss"] if finite else None,
        figures["train/loss"] if finite else None,
        round(seconds, 2),
        round(kept / 2**20, 3),
        ranks,
        "" if finite else "the loss is no finite number",
        worker,
    )


def _trainer(study: Study) -> L.Trainer:
    epochs = study.epochs or study.ranges.epochs
    return L.Trainer(
        max_epochs=epochs,
        devices=1,
        # Not "auto": a study that asks for no GPU gives the same result on a machine that has one.
        accelerator="gpu" if study.gpus else "cpu",
        precision=study.precision,
        # Once, at the end: a study compares fully trained networks.
        check_val_every_n_epoch=epochs,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _augmentation(candidate: Candidate) -> dict[str, Any]:
    inside_the_net = candidate.augment in ("", "drop_path")
    return {} if inside_the_net else {candidate.augment: candidate.strength}


def _optimizer(study: Study) -> Any:
    if (study.optimizer or study.ranges.optimizer) == "adamw":
        decay = 0.05 if study.weight_decay is None else study.weight_decay
        return partial(torch.optim.AdamW, lr=1e-3 if study.lr is None else study.lr, weight_decay=decay)
    decay, lr = 1e-4 if study.weight_decay is None else study.weight_decay, 0.1 if study.lr is None else study.lr
    return partial(torch.optim.SGD, lr=lr, momentum=0.9, nesterov=True, weight_decay=decay)


def _batch(data: Images, name: str, count: int) -> tuple[Tensor, Tensor]:
    """The first pictures and labels of a set."""
    cached = data.sets[name]
    assert isinstance(cached, Cached)
    return cached.pictures[:count], cached.labels[:count]


def kept_bytes(net: nn.Module, x: Tensor, y: Tensor) -> int:
    """Returns the bytes that one training step keeps for its backward pass, without parameters; on any device.

    Args:
        net: the classifier, in training mode.
        x: pictures (n, c, h, w), uint8 or floats.
        y: labels (n,).
    """
    # Counted by storage, not by tensor: several views of one storage keep it once.
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, int] = {}
    held = []  # keeps storages alive: one freed meanwhile could come back at the same address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(storage)
        return tensor

    device = next(net.parameters()).device
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F.cross_entropy(net(x.to(device).float()), y.to(device))
    return sum(kept.values())
