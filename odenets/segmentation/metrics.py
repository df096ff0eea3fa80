"""Segmentation metrics from one confusion matrix over a whole data set."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_confusion_matrix

from schemes import SchemeError

from ..training.order import IGNORED


class Overlap(Metric):
    """mIoU, mAcc and aAcc over a whole data set.

    Let c[i, j] be the number of pixels of class i predicted as class j, n_i the sum of row i and m_i that of column i.
    Then IoU_i = c[i, i] / (n_i + m_i - c[i, i]) and Acc_i = c[i, i] / n_i. mIoU and mAcc are their means over the
    classes for which they are not 0/0, and aAcc is the sum of c[i, i] over the sum of all entries. So mIoU leaves out
    classes that occur in neither masks nor predictions, and mAcc those that do not occur in masks.

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
    # Counts are additive, so torchmetrics need not update twice to get the figures of a batch.
    full_state_update = False
    counts: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.add_state("counts", torch.zeros(num_classes, num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, y: Tensor) -> None:
        """Counts some pixels.

        Args:
            predicted: predicted classes, of any shape.
            y: true classes, of the same shape; -100 for pixels that do not count.

        Raises:
            SchemeError: shapes differ, or a pixel that counts holds no class.
        """
        if predicted.shape != y.shape:
            raise SchemeError(
                f"Overlap: predictions {tuple(predicted.shape)} and masks {tuple(y.shape)}\n"
                "  Give the class of each pixel: scores.argmax(1)"
            )
        y = y.flatten().long()  # in 8 bits without a sign, -100 would be 156
        counted = y != IGNORED
        both = torch.stack([predicted.flatten().long()[counted], y[counted]])
        if not both.numel():
            return
        # Values beyond the classes would be counted in other cells of the matrix.
        low, high = torch.stack(both.aminmax()).tolist()
        if low < 0 or high >= self.num_classes:
            raise SchemeError(
                f"Overlap: classes of {low} to {high}; wants 0 to {self.num_classes - 1}\n"
                "  Give -100 where a pixel has no class, and Overlap the number of all classes"
            )
        # Its validation of the arguments would compute unique values at each call.
        self.counts += multiclass_confusion_matrix(both[0], both[1], self.num_classes, validate_args=False)

    def compute(self) -> dict[str, Tensor]:
        """Returns mIoU, mAcc, aAcc, and the IoU of each class, NaN for one that is left out."""
        # A data set has more pixels than single precision can count exactly.
        counts = self.counts.double()
        hits, labelled, said = counts.diagonal(), counts.sum(1), counts.sum(0)
        each = hits / (labelled + said - hits)
        figures = {"mIoU": each.nanmean(), "mAcc": (hits / labelled).nanmean(), "aAcc": hits.sum() / counts.sum()}
        return {name: figure.float() for name, figure in {**figures, "IoU": each}.items()}
