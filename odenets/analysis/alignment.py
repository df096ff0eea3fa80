"""Centered kernel alignment: how alike two representations are, up to rotation and scale, batch by batch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemes import SchemeError

from .features import Features, places


def unbiased_hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """The unbiased estimate of the Hilbert-Schmidt independence criterion, of two kernel matrices over n samples.

    With k~ and l~ the matrices without their diagonals:
    (tr(k~ l~) + sum(k~) sum(l~) / ((n-1)(n-2)) - 2 / (n-2) sum(k~ l~)) / (n (n-3)).

    Args:
        k: (..., n, n), symmetric, n at least 4.
        l: the same shape.

    Source:
        Song et al. 2012, Feature Selection via Dependence Maximization, JMLR 13, equation 5.

    Example:
        >>> import torch
        >>> k = torch.eye(6)
        >>> float(unbiased_hsic(k, k))
        0.0
    """
    n = k.shape[-1]
    k, l = (m - torch.diag_embed(torch.diagonal(m, dim1=-2, dim2=-1)) for m in (k, l))  # noqa: E741
    rows_k, rows_l = k.sum(-1), l.sum(-1)
    trace = (k * l).sum((-2, -1))
    both = (rows_k * rows_l).sum(-1)
    return (trace + rows_k.sum(-1) * rows_l.sum(-1) / ((n - 1) * (n - 2)) - 2 * both / (n - 2)) / (n * (n - 3))


class Alignment:
    r"""Linear centered kernel alignment of several representations, streamed.

    .. math:: CKA(X, Y) = HSIC(X X^T, Y Y^T) / \sqrt{HSIC(X X^T, X X^T) \, HSIC(Y Y^T, Y Y^T)}

    Each HSIC is the mean over batches of its unbiased estimate, which does not depend on the batch size; memory is one
    matrix of batch x batch per representation, whatever the size of the data set and of the features.

    Args:
        names: of the representations, in order.

    Source:
        Kornblith et al. 2019, Similarity of Neural Network Representations Revisited, arXiv 1905.00414; in minibatches:
        Nguyen et al. 2021, Do Wide and Deep Networks Learn the Same Things?, arXiv 2010.15327, equation 3.

    Example:
        >>> import torch
        >>> x = torch.randn(32, 5)
        >>> a = Alignment(["x", "turned"])
        >>> a.update({"x": x, "turned": 3 * x.flip(1)})
        >>> a.compute().round(decimals=4).tolist()
        [[1.0, 1.0], [1.0, 1.0]]
    """

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        self.sums = torch.zeros(len(self.names), len(self.names), dtype=torch.float64)
        self.batches = 0

    def update(self, features: Mapping[str, Tensor]) -> None:
        """Adds a batch: one tensor (n, ...) per name, n at least 4.

        Raises:
            SchemeError: too few samples, or batches of different sizes.
        """
        rows = [features[name].detach().flatten(1) for name in self.names]
        n = len(rows[0])
        if n < 4 or any(len(x) != n for x in rows):
            raise SchemeError(f"Alignment: batches of {[len(x) for x in rows]}; want at least 4 samples, equally many.")
        # Centering does not change the estimate, and keeps the products free of a large common part.
        kernels = []
        for x in rows:
            # In double where it is affordable; large maps would take more memory than the network.
            x = x.double() if x.numel() < 2**22 else x.float()
            x = x - x.mean(0)
            kernels.append((x @ x.T).double().cpu())
        for i, k in enumerate(kernels):
            # Half of the pairs: the measure is symmetric.
            for j, other in enumerate(kernels[: i + 1]):
                value = unbiased_hsic(k, other)
                self.sums[i, j] += value
                if i != j:
                    self.sums[j, i] += value
        self.batches += 1

    def compute(self) -> Tensor:
        """The alignments, (names, names), 1 on the diagonal.

        Raises:
            SchemeError: no batch was given.
        """
        if not self.batches:
            raise SchemeError("Alignment: no batch was given; call update first.")
        size = self.sums.diagonal().clamp_min(0).sqrt()
        return self.sums / (size[:, None] * size[None, :]).clamp_min(1e-30)


@torch.no_grad()
def alignment(
    model: nn.Module,
    batches: Iterable[Any],
    names: Sequence[str] | None = None,
    *,
    classes: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, list[str]]:
    """Alignment of a network's features with each other, with the pictures and with the labels.

    Args:
        model: any network; runs in evaluation mode, and is left as it was.
        batches: of (pictures, labels), such as a data loader; a last batch of fewer than 4 samples is left out.
        names: places, see ``Features``; ``places(model)`` where left out.
        classes: number of classes; the largest label of a batch decides where left out.
        progress: called with the number of batches done.

    Returns:
        The matrix of alignments, and the names of its rows: the places, then "input" and "label".

    Example:
        >>> import torch
        >>> from odenets import create_model
        >>> net = create_model("ho_resnet26", num_classes=3)
        >>> matrix, rows = alignment(net, [(torch.randn(8, 3, 16, 16), torch.arange(8) % 3)], ["stem", "levels.2"])
        >>> matrix.shape, rows
        (torch.Size([4, 4]), ['stem', 'levels.2', 'input', 'label'])
    """
    names = places(model) if names is None else list(names)
    found = Alignment([*names, "input", "label"])
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    try:
        with Features(model, names) as features:
            for x, y in batches:
                if len(x) < 4:
                    continue
                features.found.clear()
                model(x.to(device))
                label = F.one_hot(y, classes or -1) if y.ndim == 1 else y
                found.update({**dict(features.items()), "input": x, "label": label.float()})
                if progress is not None:
                    progress(found.batches)
    finally:
        # Also after an error: whoever trains goes on in the mode that they were in.
        model.train(training)
    return found.compute(), list(found.names)
