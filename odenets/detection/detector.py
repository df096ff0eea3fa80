"""The LightningModule that trains a detector on any network with maps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from torch import Tensor, nn
from torch.optim import Optimizer

from schemes import SchemeError

from ..analysis.features import evaluating
from ..models.conventions import Conventions
from ..models.depth import depths_around
from ..training.groups import check_optimizer, make_optimizer, parameter_groups
from ..training.module import NetModule
from ..training.schedules import Schedule, WarmupCosine, scheduled
from .data import Target
from .drawing import in_file
from .heads import Head, Maps, Output
from .precision import MASKS, AveragePrecision, Found
from .writer import DetectionFiles

Batch = tuple[Tensor, list[Target]]


class Detector(NetModule):
    """Trains a network and a head to detect objects, and measures average precision.

    Logs train/loss with its parts, val/AP, val/AP50, val/AP75, the AP of small, medium and large objects, val/AR1,
    val/AR10 and val/AR100; the same for masks, as val/mask_AP and so on, if the head predicts them; val/loss if the
    head computes one in evaluation; and the same for the test set. For the layout of a batch see
    ``odenets.detection.data``.

    Args:
        net: the network that gives the maps, under any scheme and backpropagation mode; its head and last norm are
            removed.
        head: such as ``DeformableDETR``; built here, for the widths of the maps.
        optimizer: called with parameter groups, e.g. `partial(torch.optim.AdamW, lr=1e-4)`.
        schedule: stepped after each optimiser step.
        levels: indices of the maps that the head takes, fine to coarse; None takes the coarsest ones, as many as the
            head wants.
        net_lr: learning rate of the net, as a fraction of the head's.
        freeze_norms: whether norms keep their running statistics, as is usual for pretrained nets with small batches.
        step_weight_decay: weight decay of learned step sizes (parameters named `h` or `step_size`).
        channels_last: whether pictures and weights are stored with the channels as the fastest axis.
        layer_decay: factor of the learning rate from a layer to the one before it; the head has the full rate, and the
            net's last layer that rate times the factor. ``odenets.models.depth`` defines layers.
        frozen: names of the parts of the net that are not trained, as in ["stem", "levels.[01]"]; ["*"] trains only
            the head. See ``odenets.training.Classifier``.
        aux: auxiliary values of the net's residual functions that are added to the loss, with their weights; see
            ``odenets.training.Classifier``.

    Raises:
        SchemeError: the net gives no maps, lacks a level, part or auxiliary value that is named, or a decay lies
            outside (0, 1].

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from odenets import create_model
        >>> from odenets.detection import DeformableDETR
        >>> head = DeformableDETR(num_classes=3, queries=10, width=32, heads=4, encoder_layers=1, decoder_layers=2)
        >>> detector = Detector(create_model("resnet20"), head, partial(torch.optim.AdamW, lr=1e-4)).eval()
        >>> found = detector.detect(torch.rand(1, 3, 32, 32))
        >>> found[0].boxes.shape
        torch.Size([30, 4])
    """

    monitor = "val/AP"  # the figure by which the best checkpoint is chosen

    def __init__(
        self,
        net: nn.Module,
        head: Head,
        optimizer: OptimizerCallable,
        schedule: Schedule | None = None,
        levels: list[int] | None = None,
        net_lr: float = 1.0,
        freeze_norms: bool = False,
        step_weight_decay: float = 0.0,
        channels_last: bool = False,
        layer_decay: float = 1.0,
        frozen: Sequence[str] = (),
        aux: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        # As in Classifier: class paths and arguments go into checkpoints, objects do not.
        built_from_config = _given_hyperparameters.get() is not None
        self.save_hyperparameters(ignore=[] if built_from_config else ["net", "head", "optimizer", "schedule"])
        if not isinstance(net, Conventions):
            raise SchemeError(f"a {type(net).__name__} gives no maps\n  Take one of odenets.list_models().")
        if net_lr < 0:
            raise SchemeError(f"model.net_lr is {net_lr}; wanted a share of the learning rate, 0 or more")
        chosen = _levels(levels, head.levels, len(net.feature_info))
        # Before the head is built, whose last layers have as many outputs.
        if head.num_classes is None:
            head.num_classes = int(net.num_classes)  # type: ignore[arg-type]
        # Layers beyond the last map would get no gradient, which DistributedDataParallel refuses.
        self.rows = net.prune_intermediate_layers(chosen, prune_norm=True)
        info = net.feature_info
        head.build(Maps(info.channels(self.rows), info.reduction(self.rows)))
        self.net, self.head = net, head
        self.optimizer, self.schedule = optimizer, schedule or WarmupCosine()
        self.net_lr, self.freeze_norms = net_lr, freeze_norms
        self.step_weight_decay, self.channels_last = step_weight_decay, channels_last
        self.layer_decay = layer_decay
        self.take_auxiliary(aux)
        self.take_frozen(frozen)
        check_optimizer(optimizer, self._groups())  # refused here, before any data are read
        self.precision = AveragePrecision(head.masks)
        self._sums = [0.0, 0.0]  # of losses, and of boxes
        self.train()  # as in Classifier: puts frozen norms into evaluation mode

    def setup(self, stage: str) -> None:
        super().setup(stage)
        # Before the first batch; predictions compare nothing. Data without the word may have masks nevertheless.
        masks = getattr(getattr(self._trainer, "datamodule", None), "masks", None)
        if self.head.masks and stage != "predict" and masks is False:
            raise SchemeError("the head predicts masks, and the data have none\n  " + MASKS)

    def train(self, mode: bool = True) -> "Detector":
        super().train(mode)
        # On every call: a later train() would otherwise set the running statistics moving again.
        if self.freeze_norms:
            for m in self.net.modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):
                    m.eval()
        return self

    @property
    def backbone(self) -> nn.Module:
        """The net, for Lightning's ``BackboneFinetuning``."""
        return self.net

    def forward(self, x: Tensor, targets: Sequence[Target] | None = None, boxes: float = 1.0) -> Output:
        """Returns the losses and detections of a batch.

        Args:
            x: normalised pictures (n, 3, h, w).
            targets: one per picture; None if nothing is known of them.
            boxes: the number of boxes that losses are divided by.
        """
        x = self.laid_out(x)
        maps: Any = self.net.forward_intermediates(x, self.rows, intermediates_only=True)
        return self.head(x, maps, targets, boxes)

    @torch.no_grad()
    def detect(self, x: Tensor) -> list[Found]:
        """Detects objects in normalised pictures, in their pixels, in evaluation mode; the module is left as it was.

        Args:
            x: the pictures (n, 3, h, w).
        """
        with evaluating(self):
            return self(x).found

    def _boxes(self, targets: Sequence[Target]) -> float:
        """The number of boxes in a batch, at least 1: its mean over the processes, as their gradients are averaged."""
        own = float(sum(len(target["labels"]) for target in targets))
        if self._trainer is not None and self.trainer.world_size > 1:
            own = float(self.trainer.strategy.reduce(torch.tensor(own, device=self.device), reduce_op="mean"))
        return max(1.0, own)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        x, targets = batch
        with self.auxiliary_loss(len(x)) as terms:
            losses = self(x, targets, self._boxes(targets)).losses
            self.name_parts(losses)
        # Summed in single precision: in half precision a large term would absorb the small ones.
        loss = torch.stack([term.float() for term in losses.values()]).sum()
        self.log("loss", loss, on_step=True, on_epoch=False, prog_bar=True, logger=False)
        parts = {f"train/{name}": term for name, term in losses.items() if name != "loss"}
        for name, figure in {"train/loss": loss, **parts}.items():
            self.log(name, figure, on_step=False, on_epoch=True, batch_size=len(x), sync_dist=True)
        return sum(terms, loss)

    def _evaluate(self, batch: Batch) -> None:
        x, targets = batch
        counted = [n for n, target in enumerate(targets) if not target["ignored"]]
        # If none counts, all are still run: processes may synchronise in the forward pass.
        if counted:
            x, targets = x[counted], [targets[n] for n in counted]
        out = self(x, targets)
        if not counted:
            return
        for target, found in zip(targets, out.found, strict=True):
            self.precision.add(int(target["picture"]), target, in_file(found, target["size"], target["stored"]))
        if out.losses:
            # Sums over boxes: their ratio at the end does not depend on how pictures were batched.
            self._sums[0] += float(torch.stack([term.float() for term in out.losses.values()]).sum())
            self._sums[1] += sum(len(target["labels"]) for target in targets)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_start(self) -> None:
        self.precision.reset()
        self._sums = [0.0, 0.0]

    on_test_epoch_start = on_validation_epoch_start

    def _log_precision(self, stage: str) -> None:
        for name, figure in self.precision.compute().items():
            # Every process computes it over all pictures, so there is nothing to reduce.
            self.log(f"{stage}/{name}", figure, prog_bar=name in ("AP", "AP50"), sync_dist=False, rank_zero_only=False)
        self.precision.reset()
        sums = torch.tensor(self._sums, device=self.device, dtype=torch.float32)
        loss, boxes = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        # A head without a loss in evaluation has summed none, and logging 0 would look like a perfect loss.
        if loss:
            self.log(f"{stage}/loss", loss / max(1.0, boxes), prog_bar=True, sync_dist=False)

    def on_validation_epoch_end(self) -> None:
        self._log_precision("val")

    def on_test_epoch_end(self) -> None:
        self._log_precision("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Found]:
        """Returns the detections of each picture, in pixels of its file."""
        x, targets = batch
        # Only sizes: given boxes, the head would compute a loss as well.
        asked = [{"size": target["size"], "stored": target["stored"]} for target in targets]
        found = self(x, asked).found
        return [
            in_file(one.best(), target["size"].cpu(), target["stored"].cpu())
            for one, target in zip(found, targets, strict=True)
        ]

    def prediction_writer(self, folder: Path) -> BasePredictionWriter:
        """Returns the writer for ``lightning predict``: results in COCO's format, and pictures with boxes.

        Args:
            folder: where predictions are written.
        """
        return DetectionFiles(folder)

    def configure_optimizers(self) -> Any:
        return scheduled(self.trainer, self.make_optimizer(), self.schedule)

    def make_optimizer(self) -> Optimizer:
        """Builds the optimiser with the parameter groups of net and head and their learning rates."""
        return make_optimizer(self.optimizer, self._groups())

    def _groups(self) -> list[dict[str, Any]]:
        if self.layer_decay == 1:
            # A fully frozen net has no groups: only the head learns.
            learns = any(p.requires_grad for p in self.net.parameters())
            net = parameter_groups(self.net, self.step_weight_decay) if learns else []
            groups = [*net, *parameter_groups(self.head, self.step_weight_decay)]
        else:
            groups = parameter_groups(self, self.step_weight_decay, self.layer_decay)
            # The head alone has the greatest depth, so no group holds parameters of both.
            deepest = max(group["depth"] for group in groups)
            net = [group for group in groups if group["depth"] < deepest]
        for group in net:
            group["lr_scale"] = self.net_lr * group.get("lr_scale", 1.0)
        return groups

    def parameter_depths(self) -> dict[str, int]:
        """The depth of each parameter: the net's own depths, and one more than the deepest for all of the head."""
        return depths_around(self, self.net)

    @property
    def grouped(self) -> nn.Module:
        return self


def _levels(given: list[int] | None, wanted: int, count: int) -> list[int]:
    """Returns the indices of the maps that a head takes, after checking them."""
    chosen = given if given is not None else list(range(max(0, count - wanted), count))
    if not chosen or sorted(set(chosen)) != chosen or not 0 <= chosen[0] <= chosen[-1] < count:
        raise SchemeError(f"model.levels is {given}; wanted numbers of maps that rise, from 0 to {count - 1}")
    return chosen
