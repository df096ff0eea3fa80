"""How well classes and pixels agree, from one table of counts over a whole data set."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_confusion_matrix

from ..training.order import IGNORED


class Overlap(Metric):
    """mIoU, mAcc and aAcc over a whole data set.

    With c[i, j] the number of pixels of class i that are said to be j, n_i the sum of row i and m_i that of column i:
    IoU_i = c[i, i] / (n_i + m_i - c[i, i]), Acc_i = c[i, i] / n_i; mIoU and mAcc are their means over the classes for
    which they are not 0/0, and aAcc is the sum of c[i, i] over that of all. So mIoU leaves out the classes that neither
    masks nor predictions have, and mAcc those that masks do not have.

    Args:
        num_classes: the number of classes.

    Example:
        >>> import torch
        >>> overlap = Overlap(3)
        >>> overlap.update(torch.tensor([[[0, 1], [1, 1]]]), torch.tensor([[[0, 0], [1, -100]]]))
        >>> {name: round(float(figure), 4) for name, figure in overlap.compute().items() if figure.ndim == 0}
        {'mIoU': 0.5, 'mAcc': 0.75, 'aAcc': 0.6667}
    """

    is_differentiable = False
    # Counts only add up, so that torchmetrics need not update twice for the figure of a batch.
    full_state_update = False
    counts: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.add_state("counts", torch.zeros(num_classes, num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, y: Tensor) -> None:
        """Counts some pixels.

        Args:
            predicted: classes, of any shape.
            y: the right ones; -100 where none counts.
        """
        if not bool((y != IGNORED).any()):
            return
        # Validation would look for the unique values of each picture, and wait for the device.
        self.counts += multiclass_confusion_matrix(
            predicted.long().flatten(), y.long().flatten(), self.num_classes, ignore_index=IGNORED, validate_args=False
        )

    def compute(self) -> dict[str, Tensor]:
        """mIoU, mAcc, aAcc, and the IoU of each class, NaN where it is left out."""
        # The pixels of a data set are more than single precision can count one by one.
        counts = self.counts.double()
        hits, labelled, said = counts.diagonal(), counts.sum(1), counts.sum(0)
        each = hits / (labelled + said - hits)
        figures = {"mIoU": each.nanmean(), "mAcc": (hits / labelled).nanmean(), "aAcc": hits.sum() / counts.sum()}
        return {name: figure.float() for name, figure in {**figures, "IoU": each}.items()}
