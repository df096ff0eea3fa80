"""Centered kernel alignment: the similarity of two representations, up to rotation and scale, batch by batch."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from schemes import SchemeError

from .features import Features, evaluating, places


def unbiased_hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """Returns the unbiased estimate of the Hilbert-Schmidt independence criterion of two kernels over n samples.

    With k~ and l~ the matrices with their diagonals set to zero:
    (tr(k~ l~) + sum(k~) sum(l~) / ((n-1)(n-2)) - 2 / (n-2) sum(k~ l~)) / (n (n-3)).

    Args:
        k: (..., n, n), symmetric, n at least 4.
        l: the same shape.

    Raises:
        SchemeError: fewer than 4 samples, or different numbers of them.

    Source:
        Song et al. 2012, Feature Selection via Dependence Maximization, JMLR 13, equation 5.

    Example:
        >>> import torch
        >>> k = torch.eye(6)
        >>> float(unbiased_hsic(k, k))
        0.0
    """
    n = k.shape[-1]
    if n < 4 or k.shape[-2:] != l.shape[-2:]:
        raise SchemeError(f"unbiased_hsic: kernels {tuple(k.shape)}, {tuple(l.shape)}; want at least 4 samples each.")
    k, l = (_off_diagonal(m) for m in (k, l))  # noqa: E741
    rows_k, rows_l = k.sum(-1), l.sum(-1)
    trace = (k * l).sum((-2, -1))
    both = (rows_k * rows_l).sum(-1)
    return (trace + rows_k.sum(-1) * rows_l.sum(-1) / ((n - 1) * (n - 2)) - 2 * both / (n - 2)) / (n * (n - 3))


def _off_diagonal(k: Tensor) -> Tensor:
    return k - torch.diag_embed(torch.diagonal(k, dim1=-2, dim2=-1))


class Alignment:
    r"""Linear centered kernel alignment of several representations, streamed.

    .. math:: CKA(X, Y) = HSIC(X X^T, Y Y^T) / \sqrt{HSIC(X X^T, X X^T) \, HSIC(Y Y^T, Y Y^T)}

    Each HSIC is the mean over batches of its unbiased estimate, whose expectation does not depend on the batch size;
    the weight of a batch is its number of samples. Memory is one batch x batch matrix per representation, whatever the
    size of the data set and of the features. Sums are in double precision and in units of the first batch, so that no
    scale of the features over- or underflows.

    Args:
        names: names of the representations, in order.

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
        # What rounding leaves of a sum of this size is not similarity.
        self.sizes = torch.zeros(len(self.names), dtype=torch.float64)
        self.units: dict[int, float] = {}
        self.batches = 0

    def update(self, features: Mapping[str, Tensor]) -> None:
        """Adds a batch: one tensor (n, ...) per name, n at least 4.

        Raises:
            SchemeError: too few samples, batches of different sizes, or values that are not finite; nothing is added.
        """
        rows = [features[name].detach() for name in self.names]
        for name, x in zip(self.names, rows, strict=True):
            if x.is_complex():
                raise SchemeError(f"Alignment: {name} is of {x.dtype}, want real features.\n  Try torch.view_as_real.")
        rows = [x if x.is_floating_point() else x.double() for x in rows]
        counts = [len(x) if x.dim() else 0 for x in rows]
        n = counts[0] if counts else 0
        if n < 4 or any(count != n for count in counts):
            raise SchemeError(f"Alignment: batches of {counts}; want at least 4 samples, equally many.")
        sizes = [float(x.abs().amax()) if x.numel() else 0.0 for x in rows]
        for name, size in zip(self.names, sizes, strict=True):
            if not math.isfinite(size):
                raise SchemeError(f"Alignment: {name} holds values that are not finite.\n  Try model.float().")
        for i, size in enumerate(sizes):
            # A batch of zeros does not set a unit.
            if size and i not in self.units:
                self.units[i] = size
        kernels = [_kernel(x, self.units.get(i, 1.0)) for i, x in enumerate(rows)]
        for i, k in enumerate(kernels):
            self.sizes[i] += n * _off_diagonal(k).square().sum() / (n * (n - 3))
            # Half of the pairs: the measure is symmetric.
            for j, other in enumerate(kernels[: i + 1]):
                value = n * unbiased_hsic(k, other)
                self.sums[i, j] += value
                if i != j:
                    self.sums[j, i] += value
        self.batches += 1

    def compute(self) -> Tensor:
        """Returns the alignments (names, names), with 1 on the diagonal.

        NaN in the row and column of a representation without alignments: it is the same for all samples, or the
        estimate of its HSIC with itself is not above 0, which can happen with few samples.

        Raises:
            SchemeError: no batch was given.
        """
        if not self.batches:
            raise SchemeError("Alignment: no batch was given; call update first.")
        own = self.sums.diagonal()
        size = torch.where(own > 1e-12 * self.sizes, own, torch.nan).sqrt()
        return self.sums / (size[:, None] * size[None, :])


def _kernel(x: Tensor, unit: float) -> Tensor:
    """The products of all pairs of centred rows, (n, n) in double precision, of features measured in a unit."""
    flat = x.reshape(len(x), -1)
    k = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
    # In blocks of columns: a double-precision copy of large features would take twice their memory.
    for part in flat.split(max(1, 2**22 // len(x)), dim=1):
        # Minus the first row, which makes a constant column exactly 0. Centering does not change the estimate, and
        # keeps the products free of a large common part.
        rows = part.double() / unit
        rows = rows - rows[:1]
        rows = rows - rows.mean(0)
        k += rows @ rows.T
    return k.cpu()


@torch.no_grad()
def alignment(
    model: nn.Module,
    batches: Iterable[Any],
    names: Sequence[str] | None = None,
    *,
    classes: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, list[str]]:
    """Returns the alignment of a network's features with each other, with the pictures and with the labels.

    Args:
        model: any network; runs in evaluation mode, and is left as it was.
        batches: batches of (pictures, labels), such as a data loader; those of fewer than 4 samples are left out.
            Labels are classes (n,), or a value per class (n, classes).
        names: places, see ``Features``; ``places(model)`` if left out.
        classes: number of classes, against which labels are checked; if left out, there is no upper limit.
        progress: called with the number of batches done.

    Returns:
        The matrix of alignments, and the names of its rows: the places, then "input" and "label".

    Raises:
        SchemeError: a place that does not run, a label that is not a class, or features that are not finite.

    Example:
        >>> import torch
        >>> from odenets import create_model
        >>> net = create_model("ho_resnet26", num_classes=3)
        >>> matrix, rows = alignment(net, [(torch.randn(8, 3, 16, 16), torch.arange(8) % 3)], ["stem", "levels.2"])
        >>> matrix.shape, rows
        (torch.Size([4, 4]), ['stem', 'levels.2', 'input', 'label'])
    """
    names = places(model) if names is None else list(names)
    if taken := {"input", "label"} & set(names):
        name = min(taken)
        raise SchemeError(f"alignment: {name!r} is the row of the {name}s.\n  Write {name}@0 for the module.")
    found = Alignment([*names, "input", "label"])
    device = next((p.device for p in model.parameters()), None)
    with evaluating(model), Features(model, names) as features:
        for x, y in batches:
            if len(x) < 4:
                continue
            label = _one_hot(y, classes)
            # A copy: a network may write into its input.
            model(x.to(device, copy=True))
            found.update({**dict(features.items()), "input": x, "label": label})
            if progress is not None:
                progress(found.batches)
    if not found.batches:
        raise SchemeError(
            "alignment: no batch has the 4 samples that an estimate takes.\n  Give larger ones: --batch_size 64."
        )
    return found.compute(), list(found.names)


def _one_hot(y: Tensor, classes: int | None) -> Tensor:
    """Labels (n, classes), from classes (n,) or as they are."""
    if y.dim() == 2:
        return y
    if y.dim() != 1 or y.is_floating_point() or y.is_complex():
        raise SchemeError(f"alignment: labels {tuple(y.shape)} of {y.dtype}; want classes (n,) or values (n, classes).")
    y = y.long()
    wrong = y[(y < 0) | (y >= classes)] if classes else y[y < 0]
    if len(wrong):
        upto = "more" if classes is None else f"{classes - 1}"
        raise SchemeError(
            f"alignment: label {int(wrong[0])} is no class of 0 to {upto}.\n"
            "  Leave out pictures without a label: labelled = y >= 0; x[labelled], y[labelled]."
        )
    # Only the classes in this batch: the column of any other is zero, and adds nothing to the products.
    return (y[:, None] == y.unique()).double()
