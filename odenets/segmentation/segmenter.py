"""The LightningModule that trains a segmentation network, and measures it over whole data sets."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from ..training.classifier import _differences
from ..training.errors import DataError
from ..training.groups import check_optimizer, make_optimizer, parameter_groups
from ..training.module import NetModule, share_of
from ..training.order import IGNORED
from ..training.schedules import Schedule, WarmupCosine, scheduled
from .inference import Inference
from .metrics import Overlap
from .nets import SegmentationNet
from .pictures import PredictedMasks


class Segmenter(NetModule):
    """Training of a network that gives each pixel a class.

    Logs train/loss, its parts where it has several, val/mIoU, val/mAcc, val/aAcc and the same of the test, which count
    every pixel of the stored masks that has a class, in one table over the whole set and all processes; see
    ``Overlap``.

    A batch of training is (pictures (n, c, h, w), classes (n, h, w)), one of evaluation two lists of n, or the same;
    -100 is the class of a pixel that does not count.

    Args:
        net: The network.
        optimizer: Called with parameter groups, e.g. ``partial(torch.optim.AdamW, lr=1e-4)``.
        schedule: Stepped after each optimiser step.
        inference: How the network is asked about a picture in evaluation; None shows it once and whole.
        step_weight_decay: Weight decay of learned step sizes (parameters named ``h`` or ``step_size``).
        per_class: Also logs the IoU of each class that occurs, val/IoU/NAME.
        channels_last: Keep pictures and weights with the channels as the fastest axis.
        compile: Compile the network in place, so that the names in checkpoints stay the same.
        layer_decay: Factor of the learning rate from a layer to the one before it; the head has the whole, and 1 is one
            rate for all. See ``odenets.models.depth`` for what a layer is.
        frozen: Parts of the model below the head that are not trained, by their names in a classifier, as in
            ["stem", "levels.[01]"]; ["*"] trains the head alone. See ``odenets.training.Classifier``.
        aux: Auxiliary values of residual functions that are added to the loss, and their weights; see there.

    Raises:
        SchemeError: A network that does not say how deep its parameters lie, with a ``layer_decay``; a part or an
            auxiliary value that it does not have.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from odenets.segmentation import UPerNet
        >>> net = UPerNet("resnet20", num_classes=5, width=16, auxiliary_width=16)
        >>> module = Segmenter(net, partial(torch.optim.AdamW, lr=1e-3)).eval()
        >>> module.predict_step(([torch.zeros(3, 20, 30)], [torch.zeros(40, 60)]), 0)[0].shape
        torch.Size([40, 60])
    """

    monitor = "val/mIoU"  # what the best checkpoint is best in

    def __init__(
        self,
        net: SegmentationNet,
        optimizer: OptimizerCallable,
        schedule: Schedule | None = None,
        inference: Inference | None = None,
        step_weight_decay: float = 0.0,
        per_class: bool = False,
        channels_last: bool = False,
        compile: bool = False,
        layer_decay: float = 1.0,
        frozen: Sequence[str] = (),
        aux: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        # As in Classifier: what a configuration says is stored, and what was built in Python is not pickled.
        parts = [] if _given_hyperparameters.get() is not None else ["net", "optimizer", "schedule", "inference"]
        self.save_hyperparameters(ignore=parts)
        self.net, self.optimizer = net, optimizer
        self.schedule, self.inference = schedule or WarmupCosine(), inference or Inference()
        self.step_weight_decay, self.per_class, self.channels_last = step_weight_decay, per_class, channels_last
        self.compile_net, self.layer_decay = compile, layer_decay
        self.take_auxiliary(aux)
        self.take_frozen(frozen)
        # Refused here, before any data are read.
        check_optimizer(optimizer, parameter_groups(net, step_weight_decay, layer_decay))
        self.overlap = Overlap(net.num_classes)
        self.train()  # as in Classifier: norms in frozen parts go into evaluation

    @property
    def freezable(self) -> nn.Module:
        return self.body

    @property
    def backbone(self) -> nn.Module:
        """The model below the head, for Lightning's ``BackboneFinetuning``."""
        return self.body

    def forward(self, x: Tensor) -> Tensor:
        """The scores (n, classes, h, w)."""
        return self.net(self.laid_out(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        with self.auxiliary_loss(len(x)) as terms:
            parts: dict[str, Tensor] = self.net(self.laid_out(x), y)
            self.name_parts(parts)
        if self.net.mean_over_pixels and self.trainer.world_size > 1:
            share = share_of(self.trainer, (y != IGNORED).sum())
            parts = {name: share * part for name, part in parts.items()}
        loss = torch.stack(list(parts.values())).sum()
        self.log("loss", loss, on_step=True, on_epoch=False, prog_bar=True, logger=False)
        figures = {"loss": loss, **({name: part for name, part in parts.items() if name != "loss"})}
        for name, figure in figures.items():
            self.log(f"train/{name}", figure, on_step=False, on_epoch=True, batch_size=len(x), sync_dist=True)
        return sum(terms, loss)

    def predicted(self, x: Sequence[Tensor] | Tensor, y: Sequence[Tensor] | Tensor) -> list[Tensor]:
        """The class of each pixel of some pictures, (H, W) each.

        Args:
            x: pictures (c, h, w), normalised.
            y: masks (H, W), of which only the sizes matter here.
        """
        found: list[Tensor] = []
        while len(found) < len(x):
            # Neighbours of one size are seen together.
            first = len(found)
            kind = x[first].shape, y[first].shape
            last = next((i for i in range(first, len(x)) if (x[i].shape, y[i].shape) != kind), len(x))
            pictures = torch.stack([*x[first:last]]) if isinstance(x, Sequence) else x[first:last]
            scores = self.inference(self.net, self.laid_out(pictures), (y[first].shape[-2], y[first].shape[-1]))
            found += scores.argmax(1)
        return found

    def _count(self, batch: Any) -> None:
        x, y = batch
        for predicted, mask in zip(self.predicted(x, y), y, strict=True):
            self.overlap.update(predicted, mask)

    def _log_overlap(self, stage: str) -> None:
        figures = self.overlap.compute()
        self.overlap.reset()
        # While Lightning tries two batches before training, these may well have no class.
        if not bool(figures["aAcc"].isfinite()) and not self.trainer.sanity_checking:
            raise DataError(
                f"no pixel of the pictures that were seen for {stage} has a class\n"
                "  See what the values of the masks mean: data.classes, data.ignore, data.reduce_labels, data.ids"
            )
        each = figures.pop("IoU")
        if self.per_class:
            names = getattr(self.trainer.datamodule, "classes", None) or list(range(len(each)))  # type: ignore
            figures |= {f"IoU/{name}": iou for name, iou in zip(names, each, strict=True) if bool(iou.isfinite())}
        self.log_dict({f"{stage}/{k}": v for k, v in figures.items()}, prog_bar=not self.per_class, sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        self.overlap.reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._count(batch)

    def on_validation_epoch_end(self) -> None:
        self._log_overlap("val")

    def on_test_epoch_start(self) -> None:
        self.overlap.reset()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._count(batch)

    def on_test_epoch_end(self) -> None:
        self._log_overlap("test")

    def predict_step(self, batch: Any, batch_idx: int) -> list[Tensor]:
        """The class of each pixel, (H, W) each, on the CPU; in 8 bits where all classes fit."""
        kind = torch.uint8 if self.net.num_classes <= 256 else torch.int16
        return [mask.to("cpu", kind) for mask in self.predicted(*batch)]

    def prediction_writer(self, folder: Path) -> Callback:
        """What writes the predictions of ``lightning predict``.

        Args:
            folder: where they go.
        """
        return PredictedMasks(folder / "predictions")

    def configure_optimizers(self) -> Any:
        return scheduled(self.trainer, self.make_optimizer(), self.schedule)

    def make_optimizer(self) -> Optimizer:
        """The optimiser, with the groups of the network and their learning rates."""
        groups = parameter_groups(self.net, self.step_weight_decay, self.layer_decay)
        return make_optimizer(self.optimizer, groups)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # As in Classifier: networks of two schemes may have equal parameters.
        theirs, ours = (dict(h).get("net") for h in (checkpoint.get("hyper_parameters", {}), self.hparams))
        if theirs is not None and ours is not None and theirs != ours:
            rank_zero_warn(f"the checkpoint's net differs from the configured one: {_differences(theirs, ours)}")
