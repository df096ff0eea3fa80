"""Mask R-CNN and its cascade on any network, built from torchvision's parts.

Pictures arrive resized and padded, so torchvision's own transform is left out. A feature pyramid (FPN) is built over
the network's maps; proposals, boxes and masks are torchvision's. torchvision is imported when a head is built.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from schemes import SchemeError

from ..messages import first_line
from .data import Target
from .heads import Head, Maps, Output, check_counts, check_doubling
from .precision import MASKS, MOST, Found


def vision() -> Any:
    """Imports torchvision with its operators.

    Raises:
        SchemeError: torchvision is not installed, or was built for another torch.
    """
    try:
        import torchvision
        import torchvision.models.detection as detection
    except (ImportError, RuntimeError) as e:
        raise SchemeError(
            f"MaskRCNN needs a torchvision that fits torch {torch.__version__} ({first_line(e)})\n"
            "  pip install torchvision, of the release that goes with torch; or take DeformableDETR or RTDETR"
        ) from None
    return torchvision, detection


class MaskRCNN(Head):
    """Mask R-CNN; without masks it is Faster R-CNN.

    In training it returns the losses ``objectness`` and ``proposals`` of the first stage, and ``class``, ``box`` and
    ``mask`` of the second. In evaluation it has no loss, since the loss is computed on boxes that training samples.

    Args:
        num_classes: number of classes, without the background; None takes that of the net.
        masks: whether masks are predicted; the data must then have masks.
        width: channels of the pyramid.
        hidden: width of the perceptron applied to each box.
        proposals: boxes per picture that the first stage passes on.
        least: lowest score of a detection that is kept.

    Source:
        He et al. 2017, Mask R-CNN, arXiv 1703.06870; Lin et al. 2017, Feature Pyramid Networks, arXiv 1612.03144.
    """

    levels = 4
    overlaps: Sequence[float] = (0.5,)  # IoU with an object from which a box is a positive sample, by stage
    weights: Sequence[float] = (1.0,)  # of the losses, by stage

    def __init__(
        self,
        num_classes: int | None = None,
        masks: bool = True,
        width: int = 256,
        hidden: int = 1024,
        proposals: int = 1000,
        least: float = 0.05,
    ) -> None:
        super().__init__()
        if (num_classes is not None and num_classes < 1) or proposals < 1:
            raise SchemeError(f"{num_classes} classes and {proposals} proposals; wanted 1 or more of each")
        check_counts(width=width, hidden=hidden)
        self.num_classes, self.masks, self.width, self.hidden = num_classes, masks, width, hidden
        self.proposals, self.least = proposals, least

    def build(self, maps: Maps) -> None:
        # A box goes to the map whose number is the logarithm of its size: with gaps some boxes would find none.
        check_doubling(type(self).__name__, maps, "DeformableDETR")
        torchvision, detection = vision()
        # A coarser map for the largest anchors; boxes are never pooled from it, so it has no name below.
        pool = torchvision.ops.feature_pyramid_network.LastLevelMaxPool()
        self.pyramid = torchvision.ops.FeaturePyramidNetwork(list(maps.channels), self.width, pool)
        self.names = [str(n) for n in range(len(maps.channels))]
        # An anchor is eight times as large as the stride of its map.
        steps = [*maps.reductions, 2 * maps.reductions[-1]]
        rpn = detection.rpn
        anchors = rpn.AnchorGenerator(tuple((8 * step,) for step in steps), ((0.5, 1.0, 2.0),) * len(steps))
        first = rpn.RPNHead(self.width, anchors.num_anchors_per_location()[0])
        # `most` is per level, before non-maximum suppression; `kept` is per picture, after it.
        most = {"training": 2 * self.proposals, "testing": self.proposals}
        kept = dict.fromkeys(("training", "testing"), self.proposals)
        # In order: IoU of an object, IoU of background, samples, share of objects among them, and the IoU above which
        # one of two proposals is dropped. All are torchvision's defaults.
        self.rpn = rpn.RegionProposalNetwork(anchors, first, 0.7, 0.3, 256, 0.5, most, kept, 0.7)
        self.stages = nn.ModuleList(self._stage(n, maps.reductions) for n in range(len(self.overlaps)))

    def _stage(self, n: int, reductions: Sequence[int]) -> nn.Module:
        _, detection = vision()
        faster, masked = detection.faster_rcnn, detection.mask_rcnn
        predictor = faster.FastRCNNPredictor(self.hidden, int(self.num_classes or 0) + 1)
        if self.agnostic:  # one box correction for all classes, as in a cascade
            predictor.bbox_pred = nn.Linear(self.hidden, 4)
        parts: dict[str, Any] = {}
        if self.masks:
            parts = {
                "mask_roi_pool": self._pool(14, reductions),
                "mask_head": masked.MaskRCNNHeads(self.width, [self.width] * 4, 1),
                "mask_predictor": masked.MaskRCNNPredictor(self.width, self.width, int(self.num_classes or 0) + 1),
            }
        scale = (10.0, 10.0, 5.0, 5.0)  # of the corrections, which are finer in later stages
        return detection.roi_heads.RoIHeads(
            self._pool(7, reductions),
            faster.TwoMLPHead(self.width * 49, self.hidden),
            predictor,
            self.overlaps[n],
            self.overlaps[n],
            # Boxes per picture that a stage is trained on, and the share of objects among them.
            512,
            0.25,
            tuple(value * (n + 1) for value in scale),
            self.least,
            0.5,
            MOST,
            **parts,
        )

    def _pool(self, side: int, reductions: Sequence[int]) -> nn.Module:
        """Returns a layer that pools boxes from the pyramid, each from the map that fits its size."""
        torchvision, _ = vision()
        pool = torchvision.ops.MultiScaleRoIAlign(self.names, side, 2)
        # Otherwise torchvision infers the scales from the picture sizes, which may be any part of the padded batch.
        pool.scales = [1 / reduction for reduction in reductions]
        lowest, highest = (reductions[at].bit_length() - 1 for at in (0, -1))
        pool.map_levels = torchvision.ops.poolers.initLevelMapper(lowest, highest)
        return pool

    @property
    def agnostic(self) -> bool:
        """Whether one box correction serves all classes."""
        return len(self.overlaps) > 1

    def forward(self, x: Tensor, maps: Sequence[Tensor], targets: Sequence[Target] | None, boxes: float) -> Output:
        _, detection = vision()
        sizes = [tuple(x.shape[2:])] * len(x)
        if targets is not None:
            sizes = [tuple(target["size"].tolist()) for target in targets]
        features = self.pyramid(dict(zip(self.names, maps, strict=True)))
        images = detection.image_list.ImageList(x, sizes)
        if not self.training:
            proposals, _ = self.rpn(images, features)
            return Output({}, self._found(features, proposals, sizes, targets))
        if targets is None or (self.masks and any("masks" not in target for target in targets)):
            raise SchemeError(f"MaskRCNN trains on masks, and the batch has none\n  {MASKS}")
        theirs = [self._theirs(target) for target in targets]
        proposals, first = self.rpn(images, features, theirs)
        losses = {"objectness": first["loss_objectness"], "proposals": first["loss_rpn_box_reg"]}
        for n, (stage, weight) in enumerate(zip(self.stages, self.weights, strict=True)):
            suffix = f"_{n + 1}" if self.agnostic else ""
            terms, proposals = self._train_stage(stage, features, proposals, sizes, theirs)
            losses |= {f"{name}{suffix}": weight * term for name, term in terms.items()}
        return Output(losses, [])

    def _theirs(self, target: Target) -> dict[str, Tensor]:
        """A target as torchvision expects it, with class 0 as the background."""
        found = {"boxes": target["boxes"].float(), "labels": target["labels"] + 1}
        return {**found, "masks": target["masks"]} if self.masks else found

    def _corrections(self, stage: Any, features: Any, proposals: Any, sizes: Any) -> tuple[Tensor, Tensor]:
        """Returns the logits (k, classes + 1) and corrections (k, 4 * (classes + 1)) of boxes."""
        logits, deltas = stage.box_predictor(stage.box_head(stage.box_roi_pool(features, proposals, sizes)))
        # Under autocast they are in half precision, too coarse for boxes of hundreds of pixels.
        logits, deltas = logits.float(), deltas.float()
        # torchvision picks the correction of each class; repeated, it is the same for all.
        return logits, deltas.repeat(1, int(self.num_classes or 0) + 1) if self.agnostic else deltas

    def _moved(self, stage: Any, deltas: Tensor, proposals: Sequence[Tensor], sizes: Any) -> list[Tensor]:
        """Applies the correction that serves all classes, and clips the boxes to their pictures."""
        torchvision, _ = vision()
        # All classes have the same correction, so the first will do. Detached: no gradient flows through a stage's
        # proposals into the stage before.
        moved = stage.box_coder.decode(deltas.detach(), list(proposals))[:, 0]
        parts = moved.split([len(part) for part in proposals])
        cut = torchvision.ops.clip_boxes_to_image
        return [cut(part, size) for part, size in zip(parts, sizes, strict=True)]

    def _train_stage(
        self, stage: Any, features: Any, proposals: Any, sizes: Any, targets: Any
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        _, detection = vision()
        heads = detection.roi_heads
        proposals, matched, labels, wanted = stage.select_training_samples(proposals, targets)
        logits, deltas = self._corrections(stage, features, proposals, sizes)
        classes, boxes = heads.fastrcnn_loss(logits, deltas, labels, wanted)
        terms = {"class": classes, "box": boxes}
        if self.masks:
            # Masks are trained only on boxes with an object; background has no mask to compare with.
            positive = [(label > 0).nonzero()[:, 0] for label in labels]
            asked = [part[at] for part, at in zip(proposals, positive, strict=True)]
            theirs = [part[at] for part, at in zip(matched, positive, strict=True)]
            drawn = self._mask_logits(stage, features, asked, sizes)
            masks, names = ([target[key] for target in targets] for key in ("masks", "labels"))
            terms["mask"] = heads.maskrcnn_loss(drawn, asked, masks, names, theirs)
        return terms, self._moved(stage, deltas, proposals, sizes) if self.agnostic else proposals

    def _mask_logits(self, stage: Any, features: Any, boxes: Sequence[Tensor], sizes: Any) -> Tensor:
        return stage.mask_predictor(stage.mask_head(stage.mask_roi_pool(features, list(boxes), sizes))).float()

    def _found(self, features: Any, proposals: Any, sizes: Any, targets: Sequence[Target] | None) -> list[Found]:
        """Returns detections whose scores are means over the stages and whose boxes come from the last one."""
        last: Any = self.stages[-1]
        scores: list[Tensor] = []
        deltas = torch.zeros(0)
        for stage in self.stages:
            logits, deltas = self._corrections(stage, features, proposals, sizes)
            scores.append(logits.softmax(1))
            if stage is not last:
                proposals = self._moved(stage, deltas, proposals, sizes)
        # torchvision applies a softmax, which turns log probabilities back into probabilities.
        mean = torch.stack(scores).mean(0).log()
        boxes, sure, labels = last.postprocess_detections(mean, deltas, proposals, sizes)
        masks: Sequence[Tensor | None] = [None] * len(boxes)
        if self.masks:
            masks = self._masks(features, boxes, labels, sizes, targets)
        return [
            Found(box, score, label - 1, mask)
            for box, score, label, mask in zip(boxes, sure, labels, masks, strict=True)
        ]

    def _masks(
        self, features: Any, boxes: Sequence[Tensor], labels: Any, sizes: Any, targets: Sequence[Target] | None
    ) -> list[Tensor]:
        """Returns the masks of each picture, at the size of its file if that is known."""
        _, detection = vision()
        drawn = [self._mask_logits(stage, features, boxes, sizes).sigmoid() for stage in self.stages]
        # The inverse of the sigmoid in maskrcnn_inference: the mean is over probabilities.
        mean = torch.logit(torch.stack(drawn).mean(0), eps=1e-6)
        shares = detection.roi_heads.maskrcnn_inference(mean, list(labels))
        found = []
        for n, (share, box, size) in enumerate(zip(shares, boxes, sizes, strict=True)):
            known = targets is not None and "stored" in targets[n]
            stored = tuple(targets[n]["stored"].tolist()) if known else size  # type: ignore[index]
            # Pasted directly at the size of the file: resizing a mask later would blur its edge.
            scale = box.new_tensor([stored[1] / size[1], stored[0] / size[0]] * 2)
            pasted = detection.roi_heads.paste_masks_in_image(share, box * scale, stored)
            found.append(pasted[:, 0] >= 0.5)
        return found


class CascadeMaskRCNN(MaskRCNN):
    """Mask R-CNN with three box corrections in sequence, each trained on better-fitting boxes than the last.

    The losses of the stages have weights 1, 1/2 and 1/4, and their names end in the number of the stage.

    Args:
        num_classes: see ``MaskRCNN``.
        masks: see ``MaskRCNN``.
        width: see ``MaskRCNN``.
        hidden: see ``MaskRCNN``.
        proposals: see ``MaskRCNN``.
        least: see ``MaskRCNN``.

    Source:
        Cai and Vasconcelos 2018, Cascade R-CNN, arXiv 1712.00726.
    """

    overlaps = (0.5, 0.6, 0.7)
    weights = (1.0, 0.5, 0.25)
