"""The similarity of features to each class's label and to its pictures, place by place."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from schemes import SchemeError

from .alignment import Alignment, _kernel, unbiased_hsic
from .features import Features, evaluating, places

GROUP = 16  # pictures of one class that are compared with each other


class ClassAlignment(NamedTuple):
    """Alignments of places with each class.

    Attributes:
        names: names of the places.
        label: (places, classes), with the indicator of the class, over all pictures.
        picture: (places, classes), with the pictures themselves, among those of the class. Both are NaN if undefined
            (too few pictures, a label that one or all but one have, or features that are the same for all).
        counts: number of pictures of each class (classes,).
    """

    names: list[str]
    label: Tensor
    picture: Tensor
    counts: Tensor

    def best(self) -> int:
        """Returns the class whose label has the highest alignment with any place.

        Raises:
            SchemeError: no class has an alignment.
        """
        # A maximum propagates NaN, which a class without pictures has in every place.
        most = self.label.nan_to_num(-1).amax(0)
        if not int(self.counts.sum()):
            raise SchemeError(
                "class_alignment: no class has enough pictures: no batch has the 4 samples that an estimate takes.\n"
                "  Give larger ones: --batch_size 64."
            )
        if float(most.max()) < 0:
            raise SchemeError("class_alignment: no class has enough pictures.\n  Give more: --batches 16.")
        return int(most.argmax())


@torch.no_grad()
def class_alignment(
    model: nn.Module,
    batches: Iterable[Any],
    names: Sequence[str] | None = None,
    *,
    classes: int,
    progress: Callable[[int], None] | None = None,
) -> ClassAlignment:
    r"""Centered kernel alignment of places with the label and with the pictures of each class.

    With the label of class k: CKA of the features with the indicator :math:`[y = k]`, over all pictures of a batch.
    With its pictures: CKA of the features with the pixels, over groups of 16 pictures of that class. Both use unbiased
    estimates, summed with their numbers of samples as weights, as in ``alignment``. The paper compares with the images
    and labels of each category and gives no formula; this is our reading.

    Args:
        model: any network; runs in evaluation mode, and is left as it was.
        batches: batches of (pictures, classes (n,)); those of fewer than 4 samples are left out. Pictures are kept
            until there are 16 of their class.
        names: places, see ``Features``; ``places(model)`` if left out.
        classes: number of classes.
        progress: called with the number of batches done.

    Raises:
        SchemeError: a label that is not a class, or features that are not finite.

    Source:
        Cai et al. 2023, Reversible Column Networks, arXiv 2212.11696, appendix E.

    Example:
        >>> import torch
        >>> from odenets import create_model
        >>> net = create_model("ho_resnet26", num_classes=3)
        >>> found = class_alignment(net, [(torch.randn(24, 3, 16, 16), torch.arange(24) % 3)], ["stem"], classes=3)
        >>> found.label.shape, found.counts.tolist()
        (torch.Size([1, 3]), [8, 8, 8])
    """
    names = places(model) if names is None else list(names)
    label, counts = _WithLabel(len(names), classes), torch.zeros(classes, dtype=torch.long)
    pictures = [Alignment([*names, "input"]) for _ in range(classes)]
    waiting: list[list[Tensor]] = [[] for _ in range(classes)]
    device = next((p.device for p in model.parameters()), None)

    def close(k: int, features: Features) -> None:
        x = torch.stack(waiting[k])
        waiting[k] = []
        # Run again on their own: keeping pictures instead of features takes the memory of a few pictures per class.
        # A copy: a network may write into its input.
        model(x.to(device, copy=True))
        pictures[k].update({**dict(features.items()), "input": x})

    with evaluating(model), Features(model, names) as features:
        for done, (x, y) in enumerate(batches, 1):
            if len(x) < 4:
                continue
            y = _classes_of(y, classes)
            model(x.to(device, copy=True))
            # Before any group is closed: its pass through the network replaces these features.
            label.update([value for _, value in features.items()], y)
            counts += torch.bincount(y, minlength=classes)
            for picture, k in zip(x, y.tolist(), strict=True):
                waiting[k].append(picture)
                if len(waiting[k]) == GROUP:
                    close(k, features)
            if progress is not None:
                progress(done)
        for k in range(classes):
            # The unbiased estimate needs at least four samples.
            if len(waiting[k]) >= 4:
                close(k, features)
    # Each place against "input", which is the last row and the last column.
    rows = [a.compute()[:-1, -1] if a.batches else torch.full((len(names),), torch.nan).double() for a in pictures]
    return ClassAlignment(names, label.compute(), torch.stack(rows, 1), counts)


def _classes_of(y: Tensor, classes: int) -> Tensor:
    if y.dim() != 1 or y.is_floating_point() or bool(((y < 0) | (y >= classes)).any()):
        raise SchemeError(
            f"class_alignment: labels {tuple(y.shape)} of {y.dtype}; want classes (n,) of 0 to {classes - 1}.\n"
            "  Leave out pictures without a label: labelled = y >= 0; x[labelled], y[labelled]."
        )
    return y.long().cpu()


class _WithLabel:
    """Sums of unbiased estimates of features with the indicator of each class."""

    def __init__(self, count: int, classes: int) -> None:
        self.cross = torch.zeros(count, classes, dtype=torch.float64)
        self.own, self.size = torch.zeros(2, count, dtype=torch.float64)
        self.labels, self.size_of_labels = torch.zeros(2, classes, dtype=torch.float64)
        self.units: dict[int, float] = {}

    def update(self, features: Sequence[Tensor], y: Tensor) -> None:
        n = len(y)
        indicator = (y[None] == torch.arange(len(self.labels))[:, None]).double()
        indicator -= indicator.mean(1, keepdim=True)
        of_labels = indicator[:, :, None] * indicator[:, None]  # (classes, n, n)
        self.labels += n * unbiased_hsic(of_labels, of_labels)
        self.size_of_labels += n * of_labels.square().sum((1, 2)) / (n * (n - 3))
        for i, x in enumerate(features):
            if not bool(x.isfinite().all()):
                raise SchemeError("class_alignment: features hold values that are not finite.\n  Try model.float().")
            most = float(x.abs().amax())
            # The first unit stays, since the sums of all batches must be in the same unit; a batch of zeros does not
            # set one.
            unit = self.units.setdefault(i, most) if most else self.units.get(i, 1.0)
            k = _kernel(x, unit)
            self.cross[i] += n * unbiased_hsic(k, of_labels)
            self.own[i] += n * unbiased_hsic(k, k)
            self.size[i] += n * k.square().sum() / (n * (n - 3))

    def compute(self) -> Tensor:
        # Anything smaller is rounding: of features that are the same for all samples, or of a class that has only one
        # sample, or all but one.
        own = torch.where(self.own > 1e-12 * self.size, self.own, torch.nan).sqrt()
        labels = torch.where(self.labels > 1e-12 * self.size_of_labels, self.labels, torch.nan).sqrt()
        return self.cross / (own[:, None] * labels)
