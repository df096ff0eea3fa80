"""The LightningModule that trains any net on labelled pictures."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from ..start import heads
from .groups import check_optimizer, make_optimizer
from .groups import parameter_groups as parameter_groups
from .module import NetModule
from .module import evaluations as evaluations
from .order import IGNORED
from .ranking import best_of
from .schedules import KEY, Schedule, WarmupCosine, restart, scheduled


def cross_entropy(logits: Tensor, y: Tensor, **options: Any) -> Tensor:
    """torch's cross-entropy in at least 32 bits, whatever the net's precision; labels (n,) or weights (n, classes)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, y if y.ndim == 1 else y.to(logits.dtype), **options)


class Classifier(NetModule):
    """Cross-entropy training of `net`, with the optimiser and its schedule as parts.

    Logs train/loss, train/acc, val/loss, val/acc, test/loss, test/acc, from 100 classes on also val/acc5 and test/acc5,
    and `evaluations`, the residual-function evaluations of one forward pass, where the net counts them.
    A batch is (pictures (n, c, h, w), labels (n,) or rows of weights (n, classes)).

    Args:
        net: Maps pictures to logits (n, classes).
        optimizer: Called with parameter groups, e.g. `partial(torch.optim.SGD, lr=0.1)`.
        schedule: Stepped after each optimiser step.
        label_smoothing: Share of each label's weight that is spread over all classes, in training.
        step_weight_decay: Weight decay of learned step sizes (parameters named `h` or `step_size`).
        channels_last: Keep pictures and weights with the channels as the fastest axis.
        compile: Compile the net in place, so that the names in checkpoints stay the same.
        layer_decay: Factor of the learning rate from a layer to the one before it, for fine-tuning; 1 is one rate for
            all. See ``odenets.models.depth`` for what a layer is.
        frozen: Parts of the net that are not trained: names of modules or parameters, with shell wildcards; a leading
            "!" exempts a name again, as in ["*", "!head"]. Norms in frozen parts keep their statistics.
        aux: Auxiliary values of the net's residual functions that are added to the loss, and their weights, as in
            {"balance": 0.01}. Fields, whose weights are functions of depth, return "kinetic" and "jacobian" if they are
            among them. Logged without the weights as train/NAME; train/loss remains the cross-entropy.

    Attributes:
        lr: A learning rate that overrides the optimiser's, such as the one that Lightning's LearningRateFinder sets.
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
        layer_decay: float = 1.0,
        frozen: Sequence[str] = (),
        aux: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        # Parts given by a configuration are stored as class paths and arguments, from which load_from_checkpoint
        # rebuilds them. Parts given as Python objects would be pickled into the checkpoint, and are left out.
        built_from_config = _given_hyperparameters.get() is not None
        self.save_hyperparameters(ignore=[] if built_from_config else ["net", "optimizer", "schedule"])
        self.net = net
        self.optimizer = optimizer
        self.schedule = schedule or WarmupCosine()
        self.label_smoothing = label_smoothing
        self.step_weight_decay = step_weight_decay
        self.channels_last = channels_last
        self.compile_net = compile
        self.layer_decay = layer_decay
        self.lr: float | None = None
        self._planned: tuple[Any, float] = None, 0.0  # the schedule, and the number of steps that it is for
        self.take_auxiliary(aux)
        self.take_frozen(frozen)
        # Refused here, before any data are read.
        check_optimizer(optimizer, parameter_groups(net, step_weight_decay, layer_decay))
        self.train()  # Lightning begins a run in the module's current mode, and never calls this itself

    @property
    def backbone(self) -> nn.ModuleList:
        """The net without its head, for Lightning's ``BackboneFinetuning``."""
        new = {name.partition(".")[0] for name in heads(self.net)}
        if not new:
            raise AttributeError(f"{type(self.net).__name__} does not say which part is its head")
        return nn.ModuleList(part for name, part in self.net.named_children() if name not in new)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.laid_out(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        with self.auxiliary_loss(len(y)) as terms:
            logits = self(x)
        loss = cross_entropy(logits, y, label_smoothing=self.label_smoothing)
        self.log_training(loss, logits, y)
        return sum(terms, loss)

    def log_training(self, loss: Tensor, logits: Tensor, y: Tensor) -> None:
        """Logs the loss of a training batch, and the share of pictures whose class has the largest logit.

        Args:
            loss: of the batch.
            logits: of the head whose accuracy is logged.
            y: labels (n,) or rows of weights (n, classes).
        """
        hits = logits.detach().argmax(1) == (y if y.ndim == 1 else y.argmax(1))
        self.log("loss", loss, on_step=True, on_epoch=False, prog_bar=True, logger=False)
        for name, figure in (("train/loss", loss), ("train/acc", hits.float().mean())):
            self.log(name, figure, on_step=False, on_epoch=True, batch_size=len(y), sync_dist=True)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        x, y = batch
        # Read before the forward pass, so that the host does not have to wait for the device after it.
        count = int((y != IGNORED).sum())
        logits = self(x)
        best = best_of(logits, 5)[1] == y[:, None]
        figures = {f"{stage}/loss": cross_entropy(logits, y, reduction="none"), f"{stage}/acc": best[:, 0]}
        if logits.shape[1] >= 100:
            figures[f"{stage}/acc5"] = best.any(1)
        for name, figure in figures.items():
            mean = figure.sum(dtype=torch.promote_types(torch.float32, figure.dtype)) / max(1, count)
            # Times the number of processes, since Lightning averages the counts over them and drops the fraction.
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

    def configure_optimizers(self) -> Any:
        found = scheduled(self.trainer, self.make_optimizer(), self.schedule)
        self._planned = found["lr_scheduler"]["scheduler"], self.trainer.estimated_stepping_batches
        return found

    def make_optimizer(self) -> Optimizer:
        """Builds the optimiser, with the groups of the net and their learning rates."""
        groups = parameter_groups(self.net, self.step_weight_decay, self.layer_decay)
        return make_optimizer(self.optimizer, groups, self.lr)

    def on_train_start(self) -> None:
        # A finder sets the learning rate, or the batch size and with it the run's length, when the schedule already
        # exists: the schedule would undo the former, and end too early or too late for the latter.
        configs, steps = self.trainer.lr_scheduler_configs, self.trainer.estimated_stepping_batches
        # A finder's trials begin training too: those of rates with a schedule of their own, those of sizes with ours.
        ours = bool(configs) and configs[0].scheduler is self._planned[0]
        if ours and self.trainer.global_step == 0 and (self.lr is not None or steps != self._planned[1]):
            restart(self.trainer, self.schedule, self.lr)
            self._planned = configs[0].scheduler, steps

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint.setdefault(KEY, {})["lr"] = self.lr

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.lr = checkpoint.get(KEY, {}).get("lr")
        # Equal parameter counts make it easy to load the weights of one scheme into another without noticing.
        theirs, ours = (dict(h).get("net") for h in (checkpoint.get("hyper_parameters", {}), self.hparams))
        if theirs is not None and ours is not None and theirs != ours:
            rank_zero_warn(f"the checkpoint's net differs from the configured one: {_differences(theirs, ours)}")

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> "Classifier":  # type: ignore
        """Loads the model of a checkpoint; one built in Python needs its parts: `net=...`, `optimizer=...`."""
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
