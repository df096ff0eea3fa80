"""The LightningModule that trains any net on labelled pictures."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from ..continuous import dimensions
from .order import IGNORED
from .schedules import Schedule, WarmupCosine, scheduled


def parameter_groups(net: nn.Module, step_weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Parameters in up to three groups: decayed, not decayed, and learned step sizes with a decay of their own.

    Norms, biases and other vectors get no weight decay. A step size is a parameter named `h` or `step_size`. The first
    group carries no `weight_decay` entry, so it takes the optimiser's.
    """
    weights, vectors, steps = [], [], []
    dims = dimensions(net)  # a bias that is a function of depth is no matrix
    for name, p in net.named_parameters():
        if not p.requires_grad:
            continue
        if name.rpartition(".")[2] in ("h", "step_size"):
            steps.append(p)
        else:
            (weights if dims[id(p)] > 1 else vectors).append(p)
    groups = [
        {"params": weights},
        {"params": vectors, "weight_decay": 0.0},
        {"params": steps, "weight_decay": step_weight_decay},
    ]
    return [group for group in groups if group["params"]]


def evaluations(net: nn.Module) -> int:
    """Residual-function evaluations of one forward, over the outermost parts of the net that count them."""
    own = getattr(net, "evaluations", None)
    return own if own is not None else sum(evaluations(part) for part in net.children())


def cross_entropy(logits: Tensor, y: Tensor, **options: Any) -> Tensor:
    """torch's, in at least 32 bits, whatever precision the net has; labels (n,) or rows of weights (n, classes)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, y if y.ndim == 1 else y.to(logits.dtype), **options)


class Classifier(L.LightningModule):
    """Cross-entropy training of `net`, with the optimiser and its schedule as parts.

    Logs train/loss, train/acc, val/loss, val/acc, test/loss, test/acc, from 100 classes on also val/acc5 and test/acc5,
    and `evaluations`, the residual-function evaluations of one forward, where the net counts them.
    A batch is (pictures (n, c, h, w), labels (n,) or rows of weights (n, classes)).

    Args:
        net: Maps pictures to logits (n, classes).
        optimizer: Called with parameter groups, e.g. `partial(torch.optim.SGD, lr=0.1)`.
        schedule: Stepped after each optimiser step.
        label_smoothing: Share of each label's weight that is spread over all classes, in training.
        step_weight_decay: Weight decay of learned step sizes (parameters named `h` or `step_size`).
        channels_last: Keep pictures and weights with the channels as the fastest axis.
        compile: Compile the net in place, so that the names in checkpoints stay the same.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable,
        schedule: Schedule | None = None,
        label_smoothing: float = 0.0,
        step_weight_decay: float = 0.0,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        # From a configuration the parts are stored as class paths and arguments, from which load_from_checkpoint builds
        # them again. From Python they are objects, which would be pickled into the checkpoint: they stay out.
        built_from_config = _given_hyperparameters.get() is not None
        self.save_hyperparameters(ignore=[] if built_from_config else ["net", "optimizer", "schedule"])
        self.net = net
        self.optimizer = optimizer
        self.schedule = schedule or WarmupCosine()
        self.label_smoothing = label_smoothing
        self.step_weight_decay = step_weight_decay
        self.channels_last = channels_last
        self.compile_net = compile
        self._compiled = False

    def setup(self, stage: str) -> None:
        if self.channels_last:
            self.net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if self.compile_net and not self._compiled:
            self.net.compile()
            self._compiled = True

    def forward(self, x: Tensor) -> Tensor:
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        loss = cross_entropy(logits, y, label_smoothing=self.label_smoothing)
        self.log_training(loss, logits, y)
        return loss

    def log_training(self, loss: Tensor, logits: Tensor, y: Tensor) -> None:
        """Logs the loss of a training batch, and the share of pictures whose class came first.

        Args:
            loss: of the batch.
            logits: of the head that counts.
            y: labels (n,) or rows of weights (n, classes).
        """
        hits = logits.detach().argmax(1) == (y if y.ndim == 1 else y.argmax(1))
        self.log("loss", loss, on_step=True, on_epoch=False, prog_bar=True, logger=False)
        for name, figure in (("train/loss", loss), ("train/acc", hits.float().mean())):
            self.log(name, figure, on_step=False, on_epoch=True, batch_size=len(y), sync_dist=True)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        x, y = batch
        logits = self(x)
        counted = y != IGNORED
        count = int(counted.sum()) if self.trainer.world_size > 1 else len(x)
        best = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
        figures = {f"{stage}/loss": cross_entropy(logits, y, reduction="none"), f"{stage}/acc": best[:, 0]}
        if logits.shape[1] >= 100:
            figures[f"{stage}/acc5"] = best.any(1)
        for name, figure in figures.items():
            mean = figure.sum(dtype=torch.promote_types(torch.float32, figure.dtype)) / max(1, count)
            # Times the processes, since Lightning averages the counts over them and drops the fraction.
            weight = count * self.trainer.world_size
            self.log(name, mean, prog_bar=True, on_epoch=True, batch_size=weight, sync_dist=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor] | Tensor, batch_idx: int) -> Tensor:
        """Class probabilities (n, classes)."""
        x = batch if isinstance(batch, Tensor) else batch[0]
        return self(x).float().softmax(1)

    def on_train_epoch_end(self) -> None:
        # Read after the forwards: a continuous-depth net only knows its count once it has run.
        count = evaluations(self.net)
        if count:
            self.log("evaluations", float(count), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(parameter_groups(self.net, self.step_weight_decay))  # type: ignore[arg-type]
        return scheduled(self.trainer, optimizer, self.schedule)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Equal parameter counts make it easy to load the weights of one scheme into another without noticing.
        theirs, ours = (dict(h).get("net") for h in (checkpoint.get("hyper_parameters", {}), self.hparams))
        if theirs is not None and ours is not None and theirs != ours:
            rank_zero_warn(f"the checkpoint's net differs from the configured one: {_differences(theirs, ours)}")

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> "Classifier":  # type: ignore
        """The model of a checkpoint; one that was built in Python needs its parts: `net=...`, `optimizer=...`."""
        kwargs.setdefault("weights_only", True)
        try:
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        except TypeError as e:
            if "'net'" not in str(e) and "'optimizer'" not in str(e):
                raise
            raise TypeError(
                f"{checkpoint_path} was written by a Classifier that was built in Python and does not hold its net.\n"
                f"  Pass the parts: {cls.__name__}.load_from_checkpoint(path, net=..., optimizer=...)"
            ) from None


def _differences(theirs: Any, ours: Any) -> str:
    a, b = ({**d.get("init_args", {}), "class": d.get("class_path")} for d in (theirs, ours))
    return ", ".join(f"{k}={a.get(k)} against {b.get(k)}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k))
