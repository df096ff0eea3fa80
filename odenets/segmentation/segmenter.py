"""The LightningModule that trains a segmentation network and evaluates it over whole data sets."""

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
    """Trains a network that gives each pixel a class.

    Logs train/loss, its parts if there are several, val/mIoU, val/mAcc, val/aAcc and the same for the test set. These
    count every pixel of the stored masks that has a class, in one table over the whole set and all processes; see
    ``Overlap``.

    A training batch is (pictures (n, c, h, w), classes (n, h, w)); an evaluation batch is two lists of length n, or the
    same as in training. A pixel that does not count has class -100.

    Args:
        net: The network.
        optimizer: Called with parameter groups, e.g. ``partial(torch.optim.AdamW, lr=1e-4)``.
        schedule: Stepped after each optimiser step.
        inference: How the network is applied to a picture in evaluation; None is one pass over the whole picture.
        step_weight_decay: Weight decay of learned step sizes (parameters named ``h`` or ``step_size``).
        per_class: Also logs the IoU of each class that occurs, val/IoU/NAME.
        channels_last: Whether pictures and weights are stored with the channels as the fastest axis.
        compile: Whether the network is compiled, in place, so that the names in checkpoints stay the same.
        layer_decay: Factor of the learning rate from a layer to the one before it; the head has the full rate, and 1 is
            one rate for all. ``odenets.models.depth`` defines layers.
        frozen: Parts of the model below the head that are not trained, by their names in a classifier, as in
            ["stem", "levels.[01]"]; ["*"] trains only the head. See ``odenets.training.Classifier``.
        aux: Auxiliary values of residual functions that are added to the loss, with their weights; see
            ``odenets.training.Classifier``.

    Raises:
        SchemeError: ``layer_decay`` is given, but the network does not define the depths of its parameters; or a part
            or auxiliary value does not exist.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from odenets.segmentation import UPerNet
        >>> net = UPerNet("resnet20", num_classes=5, width=16, auxiliary_width=16)
        >>> module = Segmenter(net, partial(torch.optim.AdamW, lr=1e-3)).eval()
        >>> module.predict_step(([torch.zeros(3, 20, 30)], [torch.zeros(40, 60)]), 0)[0].shape
        torch.Size([40, 60])
    """

    monitor = "val/mIoU"  # the figure by which the best checkpoint is chosen

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
        # As in Classifier: settings from a configuration are stored, and objects built in Python are not pickled.
        parts = [] if _given_hyperparameters.get() is not None else ["net", "optimizer", "schedule", "inference"]
        self.save_hyperparameters(ignore=parts)
        self.net, self.optimizer = net, optimizer
        self.schedule, self.inference = schedule or WarmupCosine(), inference or Inference()
        self.step_weight_decay, self.per_class, self.channels_last = step_weight_decay, per_class, channels_last
        self.compile_net, self.layer_decay = compile, layer_decay
        self.take_auxiliary(aux)
        self.take_frozen(frozen)
        # Rejected here, before any data are read.
        check_optimizer(optimizer, parameter_groups(net, step_weight_decay, layer_decay))
        self.overlap = Overlap(net.num_classes)
        self.train()  # as in Classifier: puts norms in frozen parts into evaluation mode

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
        if self.net.mean_over_pixels and self._trainer is not None and self.trainer.world_size > 1:
            share = share_of(self.trainer, (y.long() != IGNORED).sum())
            parts = {name: share * part for name, part in parts.items()}
        loss = torch.stack(list(parts.values())).sum()
        self.log("loss", loss, on_step=True, on_epoch=False, prog_bar=True, logger=False)
        figures = {"loss": loss, **({name: part for name, part in parts.items() if name != "loss"})}
        for name, figure in figures.items():
            self.log(f"train/{name}", figure, on_step=False, on_epoch=True, batch_size=len(x), sync_dist=True)
        return sum(terms, loss)

    def predicted(self, x: Sequence[Tensor] | Tensor, y: Sequence[Tensor] | Tensor) -> list[Tensor]:
        """Returns the predicted class of each pixel, (H, W) per picture.

        Args:
            x: pictures (c, h, w), normalised.
            y: masks (H, W), used only for their sizes.
        """
        found: list[Tensor] = []
        while len(found) < len(x):
            # Consecutive pictures of one size form a batch.
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
        # In Lightning's sanity check of a few batches before training, it may well happen that no pixel has a class.
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
        """Returns the class of each pixel, (H, W) per picture, on the CPU; in 8 bits if all classes fit."""
        kind = torch.uint8 if self.net.num_classes <= 256 else torch.int16
        return [mask.to("cpu", kind) for mask in self.predicted(*batch)]

    def prediction_writer(self, folder: Path) -> Callback:
        """Returns the callback that writes the predictions of ``lightning predict``.

        Args:
            folder: where they are written.
        """
        return PredictedMasks(folder / "predictions")

    def configure_optimizers(self) -> Any:
        return scheduled(self.trainer, self.make_optimizer(), self.schedule)

    def make_optimizer(self) -> Optimizer:
        """Builds the optimiser with the parameter groups of the network and their learning rates."""
        groups = parameter_groups(self.net, self.step_weight_decay, self.layer_decay)
        return make_optimizer(self.optimizer, groups)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        # As in Classifier: networks of two schemes may have parameters of the same names and shapes.
        theirs, ours = (dict(h).get("net") for h in (checkpoint.get("hyper_parameters", {}), self.hparams))
        if theirs is not None and ours is not None and theirs != ours:
            rank_zero_warn(f"the checkpoint's net differs from the configured one: {_differences(theirs, ours)}")
