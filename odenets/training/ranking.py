"""The most likely classes, first the likeliest: what every figure and every table of predictions goes by."""

from torch import Tensor


def best_of(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k greatest scores of each row, and where they are: (n, classes) -> (n, min(k, classes)) twice.

    Of equal scores, which are common in 16 bits, the first class comes first, as in ``argmax``: ``topk`` picks another
    one, which depends on the number of classes and on the device.

    Args:
        scores: logits or probabilities.
        k: how many.

    Example:
        >>> import torch
        >>> best_of(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 3)[1].tolist()
        [[1, 2, 3]]
    """
    values, places = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], places[:, :k]
