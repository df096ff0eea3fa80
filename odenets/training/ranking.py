"""The most likely classes, most likely first: the ranking behind every figure and every table of predictions."""

from torch import Tensor


def best_of(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k greatest scores of each row, and their indices: (n, classes) -> (n, min(k, classes)) twice.

    Ties, which are common in 16 bits, are broken in favour of the first class, as in ``argmax``: ``topk`` picks another
    one, depending on the number of classes and on the device.

    Args:
        scores: logits or probabilities.
        k: number of classes.

    Example:
        >>> import torch
        >>> best_of(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 3)[1].tolist()
        [[1, 2, 3]]
    """
    values, places = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], places[:, :k]
