"""Intermediate supervision: heads and decoders in the middle of a network add to the loss."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemes import SchemeError

from ..models.catalogue import IMAGENET_MEAN, IMAGENET_STD
from ..models.revcol import Supervised
from .classifier import Classifier, cross_entropy


class SupervisionLoss(nn.Module):
    """Cross entropy of every head, and binary cross entropy between the decoders' pictures and the input.

    With m heads and m - 1 decoders, head k = 1 .. m - 1 has the weight ``labels * k / m`` and the last one 1, decoder
    k = 1 .. m - 1 has ``pictures * (m - k) / (m - 1)``: the later a head, the more it should know of the label and the
    less of the picture. With four heads the published weights are 0.175, 0.35, 0.525, 1 and 3, 2, 1.

    Args:
        pictures: the first decoder's weight, or one weight per decoder.
        labels: the scale of the weights of the heads before the last, or one weight per head, including the last.
        mean: the value that was subtracted from each channel of pictures in [0, 1].
        std: the value that each channel was divided by.
        label_smoothing: share of each label's weight that is spread over all classes.

    Shapes:
        out: ``Supervised``; x: (n, c, h, w), normalised; y: labels (n,) or rows of weights (n, classes). The result is
        a scalar.

    Raises:
        SchemeError: lists of weights whose lengths are not the numbers of heads and decoders.

    Source:
        Cai et al. 2023, Reversible Column Networks, arXiv 2212.11696, section 2.3 and appendix D.1.

    Example:
        >>> import torch
        >>> from odenets.models import RevCol
        >>> net = RevCol(channels=(4, 8), blocks=(1, 1), columns=2, num_classes=3, supervision=True)
        >>> x, y = torch.randn(2, 3, 16, 16), torch.tensor([0, 2])
        >>> SupervisionLoss()(net.forward_supervised(x), x, y).shape
        torch.Size([])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        pictures: float | Sequence[float] = 3.0,
        labels: float | Sequence[float] = 0.7,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        self.pictures, self.labels, self.label_smoothing = pictures, labels, label_smoothing
        # Buffers, so that they move with the module; as settings, they are not part of a checkpoint.
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)).view(-1, 1, 1), persistent=False)

    def weights(self, heads: int) -> tuple[list[float], list[float]]:
        """The weights of the decoders and of the heads, for a network with a given number of heads.

        Args:
            heads: the number of heads of the network.

        Example:
            >>> SupervisionLoss().weights(4)
            ([3.0, 2.0, 1.0], [0.175, 0.35, 0.525, 1.0])
        """
        before = heads - 1
        pictures, labels = self.pictures, self.labels
        if isinstance(pictures, (int, float)):
            pictures = [pictures * (heads - k) / before for k in range(1, heads)]
        if isinstance(labels, (int, float)):
            # Rounded, so that the published 0.525 is that float and not its neighbour.
            labels = [*(round(labels * k / heads, 12) for k in range(1, heads)), 1.0]
        if len(pictures) != before or len(labels) != heads:
            raise SchemeError(
                f"SupervisionLoss: {len(pictures)} weights of pictures and {len(labels)} of labels for {before} "
                f"decoders and {heads} heads; give one each, or single numbers."
            )
        return list(pictures), list(labels)

    def forward(self, out: Supervised, x: Tensor, y: Tensor) -> Tensor:
        pictures, labels = self.weights(len(out.logits))
        # Clamped away from 0 and 1, so that no logit has to grow without bound.
        target = (x.detach().to(torch.promote_types(x.dtype, torch.float32)) * self.std + self.mean).clamp(0.01, 0.99)
        wide = torch.promote_types(x.dtype, torch.float32)
        loss = x.new_zeros((), dtype=wide)
        for weight, logits in zip(labels, out.logits, strict=True):
            loss = loss + weight * cross_entropy(logits, y, label_smoothing=self.label_smoothing)
        for weight, image in zip(pictures, out.images, strict=True):
            loss = loss + weight * F.binary_cross_entropy_with_logits(image.to(wide), target.to(wide))
        return loss


class SupervisedClassifier(Classifier):
    """A ``Classifier`` that trains a network with intermediate heads and decoders, and evaluates the final head alone.

    A network that can have them but was built without (``supervision=False``) is trained on its only head, as by
    ``Classifier``; so a single configuration measures the effect of supervision.

    Args:
        pictures: see ``SupervisionLoss``.
        labels: see ``SupervisionLoss``.
        mean: the value that the data module subtracts from each channel of pictures in [0, 1].
        std: the value that it divides each channel by.
        kwargs: as in ``Classifier``.

    Raises:
        SchemeError: a network that cannot have intermediate heads.
    """

    def __init__(
        self,
        pictures: float | list[float] = 3.0,
        labels: float | list[float] = 0.7,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not callable(getattr(self.net, "forward_supervised", None)):
            raise SchemeError(
                f"SupervisedClassifier: {type(self.net).__name__} has no heads in its middle: no forward_supervised.\n"
                "  Train it by odenets.training.Classifier."
            )
        self.supervision_loss = SupervisionLoss(pictures, labels, mean, std, self.label_smoothing)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        # A custom network may lack the attribute; ours have None if they were built without intermediate heads.
        if getattr(self.net, "supervision", True) is None:
            return super().training_step(batch, batch_idx)
        x, y = batch
        x = self.laid_out(x)
        with self.auxiliary_loss(len(y)) as terms:
            out = self.net.forward_supervised(x)  # type: ignore[operator]
        loss = self.supervision_loss(out, x, y)
        self.log_training(loss, out.logits[-1], y)
        return sum(terms, loss)
