"""Average precision as COCO defines it, computed by pycocotools.

torchmetrics' ``MeanAveragePrecision`` relies on pycocotools too, but requires torchvision and numbers the pictures in
order of arrival, which breaks ties between equal scores. Here pictures keep the ids of their file, so the figures are
those that pycocotools computes from the file and the results.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from schemes import SchemeError

from .annotations import coco_tools

MOST = 100  # detections of a picture that count
MASKS = "Give data.masks true, or head.masks false"
FIGURES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR1", "AR10", "AR100")


class Found(NamedTuple):
    """The detections of a picture.

    Attributes:
        boxes: (k, 4) left, top, right, bottom, in pixels of the batch as a head returns them, else of the file.
        scores: (k,), from 0 to 1.
        labels: (k,), from 0 on.
        masks: bool (k, h, w), at the size of the file where it is known, or None.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def best(self, count: int = MOST) -> "Found":
        """Returns the detections with the highest scores, on the CPU.

        Args:
            count: how many are kept at most.
        """
        # A stable sort, so that equal scores have the same order on every device.
        order = self.scores.argsort(descending=True, stable=True)[:count]
        return Found(*(None if part is None else part[order].cpu() for part in self))  # type: ignore[arg-type]


def rows(found: Found) -> list[dict[str, Any]]:
    """Detections as in COCO's result files: label, left, top, width and height, score, and the packed mask.

    Example:
        >>> import torch
        >>> rows(Found(torch.tensor([[1.0, 2, 4, 6]]), torch.tensor([0.5]), torch.tensor([3])))
        [{'label': 3, 'bbox': [1.0, 2.0, 3.0, 4.0], 'score': 0.5}]
    """
    boxes = found.boxes.double()
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
    parts = zip(found.labels.tolist(), boxes, found.scores.tolist(), strict=True)
    listed = [{"label": label, "bbox": box, "score": score} for label, box, score in parts]
    if found.masks is not None:
        for row, mask in zip(listed, found.masks, strict=True):
            row["segmentation"] = packed(mask)
    return listed


def packed(mask: Tensor) -> dict[str, Any]:
    """A mask (h, w) as COCO's packed run lengths."""
    code = coco_tools().mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": list(code["size"]), "counts": code["counts"].decode("ascii")}


class AveragePrecision:
    """Collects annotations and detections by picture, and evaluates them once all pictures are there.

    A picture that comes twice counts once: a run of several processes repeats some to give every process equally many.

    Args:
        masks: whether masks are compared too.

    Example:
        >>> import torch
        >>> boxes, one = torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([1])
        >>> truth = {"truth_boxes": boxes.double(), "truth_labels": one, "truth_crowd": torch.tensor([False]),
        ...          "truth_area": torch.tensor([64.0]), "stored": torch.tensor([16, 16])}
        >>> precision = AveragePrecision()
        >>> precision.add(1, truth, Found(boxes, torch.tensor([0.9]), one))
        >>> round(precision.compute()["AP"], 9)
        1.0
    """

    def __init__(self, masks: bool = False) -> None:
        self.masks = masks
        self.held: dict[int, tuple[list[dict[str, Any]], list[dict[str, Any]], list[int]]] = {}

    def add(self, picture: int, truth: Mapping[str, Tensor], found: Found) -> None:
        """Adds one picture.

        Args:
            picture: its id.
            truth: the ``truth_`` entries of a target, and ``stored``, the height and width of its file.
            found: the detections, in pixels of the file.

        Raises:
            SchemeError: masks are compared, and the annotations or the detections have none.
        """
        sides = (
            ("annotations", truth["truth_labels"], truth.get("truth_masks")),
            ("detections", found.labels, found.masks),
        )
        for what, labels, masks in sides:
            if self.masks and len(labels) and masks is None:
                raise SchemeError(f"picture {picture}: masks are compared, and its {what} have none\n  {MASKS}")
        columns = [truth[f"truth_{name}"].tolist() for name in ("labels", "boxes", "crowd", "area")]
        names = ("label", "bbox", "iscrowd", "area")
        there: list[dict[str, Any]] = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        for k, row in enumerate(there):
            row["iscrowd"] = int(row["iscrowd"])
            if self.masks:
                row["segmentation"] = packed(truth["truth_masks"][k].cpu())
        # Keyed by id: a picture that was given to two processes, to make their numbers equal, counts once.
        self.held[picture] = there, rows(found.best()), truth["stored"].tolist()

    def reset(self) -> None:
        """Discards all pictures."""
        self.held = {}

    def compute(self) -> dict[str, float]:
        """Returns the figures over the pictures of all processes: of boxes, and of masks as ``mask_AP`` and so on.

        A figure without objects of its kind, such as small ones, is -1, as in pycocotools.
        """
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts: list[Any] = [None] * torch.distributed.get_world_size()
            # Detections, not figures: precision over parts does not average to that over the whole.
            torch.distributed.all_gather_object(parts, self.held)
            held = {picture: entry for part in parts for picture, entry in part.items()}
        else:
            held = self.held
        kinds = ("bbox", "segm") if self.masks else ("bbox",)
        return {
            ("" if kind == "bbox" else "mask_") + name: figure
            for kind in kinds
            for name, figure in zip(FIGURES, _counted(held, kind), strict=True)
        }


def _counted(held: Mapping[int, tuple[Sequence[Any], Sequence[Any], Sequence[int]]], kind: str) -> list[float]:
    coco_tools()
    from pycocotools import mask as tools
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    sides: list[Any] = []
    # pycocotools breaks ties between equal scores by this order, which must not depend on the processes.
    pictures = sorted(held)
    labels = sorted({row["label"] for there, found, _ in held.values() for row in (*there, *found)})
    for side in (0, 1):
        annotations = []
        for picture in pictures:
            there, found, _ = held[picture]
            for row in (there, found)[side]:
                # Ids start at 1, since pycocotools treats a match with id 0 as no match.
                entry = {**row, "image_id": picture, "category_id": row["label"], "id": len(annotations) + 1}
                if side == 1:  # as pycocotools prepares results: area of the box, or of the mask alone
                    mask = row.get("segmentation") if kind == "segm" else None
                    entry["area"] = row["bbox"][2] * row["bbox"][3] if mask is None else float(tools.area(mask))
                    entry["iscrowd"] = 0
                annotations.append(entry)
        images = [{"id": picture, "height": held[picture][2][0], "width": held[picture][2][1]} for picture in pictures]
        coco: Any = COCO()
        coco.dataset = {"images": images, "annotations": annotations, "categories": [{"id": n} for n in labels]}
        sides.append(coco)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress, and a table
        for coco in sides:
            coco.createIndex()
        counted = COCOeval(sides[0], sides[1], kind)  # type: ignore[arg-type]
        counted.evaluate()
        counted.accumulate()
        if not pictures or not labels:  # pycocotools fails on a set without any object
            return [-1.0] * len(FIGURES)
        counted.summarize()
    return [float(figure) for figure in counted.stats[: len(FIGURES)]]
