"""Calibration of a network's confidence: expected calibration error, and the bins of a reliability diagram."""

from typing import Any

import torch
from torch import Tensor


class Calibration:
    """Accumulates confidences, and whether the predictions were right.

    ECE = sum over bins of (pictures in the bin / all) |accuracy - mean confidence|, over bins [0, 1/n), ...,
    [1 - 1/n, 1] of the confidence.

    Args:
        bins: Number of bins.

    Source:
        Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv 1706.04599, equation 3; by torchmetrics.

    Example:
        >>> import torch
        >>> found = Calibration(2)
        >>> found.add(torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([0, 0]))
        >>> round(found.summary()["ece"], 3)
        0.3
    """

    def __init__(self, bins: int = 15) -> None:
        from torchmetrics.classification import BinaryCalibrationError

        self.bins = bins
        # The most likely class against all others is a binary problem: only its confidence is needed.
        self.metric = BinaryCalibrationError(n_bins=bins, norm="l1")
        self._edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
        self._counts, self._right, self._sure = (torch.zeros(bins, dtype=torch.float64) for _ in range(3))

    def add(self, probabilities: Tensor, labels: Tensor) -> None:
        """Counts some pictures: probabilities (n, classes), labels (n,).

        Args:
            probabilities: (n, classes).
            labels: (n,).
        """
        sure, best = probabilities.double().max(1)
        right = best == labels
        # torchmetrics would put a confidence of 1 in a separate bin.
        self.metric.update(sure.clamp(max=1 - 2**-53), right.long())
        bin_of = (torch.bucketize(sure, self._edges, right=True) - 1).clamp(max=self.bins - 1)
        for total, values in ((self._counts, torch.ones_like(sure)), (self._right, right), (self._sure, sure)):
            total.scatter_add_(0, bin_of, values.double())

    def summary(self) -> dict[str, Any]:
        """The error "ece", and "bins": edges, number, accuracy and mean confidence of each bin that holds pictures."""
        rows = []
        for k in range(self.bins):
            count = int(self._counts[k])
            if count:
                rows.append(
                    {
                        "from": float(self._edges[k]),
                        "to": float(self._edges[k + 1]),
                        "pictures": count,
                        "accuracy": float(self._right[k]) / count,
                        "confidence": float(self._sure[k]) / count,
                    }
                )
        return {"ece": float(self.metric.compute()), "bins": rows}
