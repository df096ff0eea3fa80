"""Segmentation networks: any model of the library under the heads of transformers.

A network takes pictures of any size. They are padded on the right and at the bottom to a multiple of the coarsest map's
reduction, with zeros, the mean colour of a normalised picture; the padding is cropped from the result::

    net = UPerNet("revcol_tiny", num_classes=150, backprop="reverse")
    scores = net(x)                  # (n, 150, h, w)
    losses = net(x, y)               # {"loss": ..., "auxiliary": ...}, to be summed
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemes import SchemeError

from ..checkpoints import load
from ..models.catalogue import create_model
from ..models.depth import depths_around
from ..training.order import IGNORED


class SegmentationNet(nn.Module, ABC):
    """A network that gives each pixel a class.

    Attributes:
        num_classes: the number of classes.
        mean_over_pixels: whether each part of the loss is a mean over the pixels that have a class. Several processes
            then weight their losses by their numbers of such pixels, and take the step that a single process with the
            whole batch would take.
    """

    num_classes: int
    mean_over_pixels: bool = False

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        """Returns the scores of the classes at each pixel, or, given the true classes, the parts of the loss.

        Args:
            x: (n, c, h, w), normalised.
            y: (n, h, w), the classes; -100 for a pixel that has none or does not count.

        Returns:
            (n, num_classes, h, w), whose argmax is the prediction; or scalars by name, whose sum is the loss.
        """

    @abstractmethod
    def probabilities(self, scores: Tensor) -> Tensor:
        """Converts scores (n, num_classes, h, w) to the quantity that is averaged over views of a picture."""


def pixel_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Returns the mean of -log softmax(logits)[class] over the pixels that have a class; 0 if none has.

    Args:
        logits: (n, classes, h', w'), resized bilinearly to the size of y.
        y: (n, h, w); -100 is ignored.

    Example:
        >>> import torch
        >>> y = torch.tensor([[[0, -100]]])
        >>> round(float(pixel_cross_entropy(torch.zeros(1, 4, 1, 1), y)), 4)  # log 4
        1.3863
    """
    y = y.long()  # in 8 bits without a sign, -100 would be 156
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = F.interpolate(logits, y.shape[-2:], mode="bilinear", align_corners=False)
    # Summed and divided here: torch's own mean is NaN if no pixel counts.
    total = F.cross_entropy(logits, y, ignore_index=IGNORED, reduction="sum")
    return total / (y != IGNORED).sum().clamp(min=1)


def filled_up(x: Tensor, multiple: int) -> Tensor:
    """Pads pictures (n, c, h, w) with zeros on the right and at the bottom, to multiples of a number."""
    bottom, right = (-side % multiple for side in x.shape[-2:])
    return F.pad(x, (0, right, 0, bottom)) if bottom or right else x


def _backbone(
    model: str,
    in_chans: int,
    scheme: str | Sequence[str] | None,
    backprop: str | None,
    options: dict[str, Any] | None,
) -> Any:
    """Returns the configuration of a model that outputs all its maps."""
    try:
        from ..hf import OdenetsConfig
    except ImportError as error:
        raise SchemeError(f'segmentation needs transformers ({error})\n  pip install "odenets[segment]"') from None
    listed = scheme if scheme is None or isinstance(scheme, str) else list(scheme)
    config = OdenetsConfig(name=model, options=options, scheme=listed, backprop=backprop, num_channels=in_chans)
    # The maps of the model are known only now; the stem has none.
    config.set_output_features_output_indices(out_features=config.stage_names[1:], out_indices=None)
    return config


class _OnMaps(SegmentationNet):
    """Base class of networks of a model and a head: handles the model's weights and the sizes of its maps."""

    net: Any

    def _begin(self, config: Any, num_classes: int, weights: str | None, weights_classes: int | None) -> None:
        """Reads and checks the model's weights before any head is initialised, so that errors come early."""
        if num_classes < 2:
            raise SchemeError(f"num_classes={num_classes}: wants 2 or more, the background counted")
        self.num_classes = num_classes
        self._weights: dict[str, Tensor] = {}
        options = {**(config.options or {}), "in_chans": config.num_channels}
        if config.scheme is not None:
            options["scheme"] = config.scheme
        if weights is not None:
            # Loaded into a whole classifier, so that all weights, the head's too, are renamed and checked as usual.
            whole = create_model(config.name, num_classes=weights_classes, **options)
            load(whole, weights)
            self._weights = whole.state_dict()

    def _take(self, backbone: Any) -> None:
        """Loads the weights into the model, except those of the classification head."""
        self.reductions: list[int] = [row["reduction"] for row in backbone.net.feature_info]
        self.widths: list[int] = list(backbone.channels)
        if self._weights:
            own = backbone.net.state_dict()
            backbone.net.load_state_dict({key: self._weights[key] for key in own})
        # The network holds them now; otherwise they would stay in memory twice.
        del self._weights

    @property
    @abstractmethod
    def body(self) -> nn.Module:
        """The model, without its head."""

    def parameter_depths(self) -> dict[str, int]:
        """The depth of each parameter: the model's own depths, and one more than the deepest for all of the head."""
        return depths_around(self, self.body)

    @property
    def multiple(self) -> int:
        """Pictures are padded to multiples of this."""
        return max(self.reductions)


class UPerNet(_OnMaps):
    """A model under a pyramid of its maps, with an auxiliary head on the third map.

    The last map is concatenated with its poolings to 1, 2, 3 and 6 cells a side, all maps are summed from coarse to
    fine, and the scores are computed from all levels together. The loss is that of the head, plus ``auxiliary`` times
    that of the auxiliary head, a convolution on the third map, or on the last if there are fewer.

    Args:
        model: one of ``odenets.list_models()``.
        num_classes: the number of classes, including the background.
        in_chans: channels of the pictures.
        scheme: a scheme for all levels of the model, or one per level; None is the model's own.
        backprop: as in ``Stack``; None is the model's own.
        options: further options of the model, such as ``drop_path_rate``.
        width: channels of the head.
        auxiliary: weight of the auxiliary head's loss; 0 omits that head.
        auxiliary_width: channels of the auxiliary head.
        dropout: share of the channels that each head drops before its classifier, in training.
        weights: a file with the weights of the model, trained as a classifier.
        weights_classes: the number of classes of that classifier; None is the model's own number.

    Shapes:
        x: (n, in_chans, h, w); y: (n, h, w); the result is (n, num_classes, h, w), or a dictionary of scalars.

    Raises:
        SchemeError: a model, option or file is not valid; there is only one class; or transformers is not installed.

    Source:
        Xiao et al. 2018, Unified Perceptual Parsing for Scene Understanding, arXiv 1807.10221.

    Example:
        >>> import torch
        >>> net = UPerNet("resnet20", num_classes=5, width=16, auxiliary_width=16)
        >>> net(torch.randn(2, 3, 30, 34)).shape
        torch.Size([2, 5, 30, 34])
        >>> sorted(net(torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32).long()))
        ['auxiliary', 'loss']
    """

    mean_over_pixels = True

    # long: half of it is its parameters, a line each
    def __init__(
        self,
        model: str = "convnext_tiny",
        num_classes: int = 150,
        in_chans: int = 3,
        scheme: str | list[str] | None = None,
        backprop: str | None = None,
        options: dict[str, Any] | None = None,
        width: int = 512,
        auxiliary: float = 0.4,
        auxiliary_width: int = 256,
        dropout: float = 0.1,
        weights: str | None = None,
        weights_classes: int | None = None,
    ):
        super().__init__()
        if min(width, auxiliary_width) < 1 or not 0 <= auxiliary < math.inf or not 0 <= dropout < 1:
            figures = f"width={width}, auxiliary_width={auxiliary_width}, auxiliary={auxiliary}, dropout={dropout}"
            raise SchemeError(f"UPerNet: {figures}; want channels, a weight of 0 or more, and a share below 1")
        config = _backbone(model, in_chans, scheme, backprop, options)
        self._begin(config, num_classes, weights, weights_classes)
        from transformers import UperNetConfig, UperNetForSemanticSegmentation

        widths = config.channels_of_maps
        third = min(2, len(widths) - 1)
        self.auxiliary = auxiliary
        self.net = UperNetForSemanticSegmentation(
            UperNetConfig(
                backbone_config=config,
                num_labels=num_classes,  # type: ignore[call-arg]
                hidden_size=width,
                use_auxiliary_head=auxiliary > 0,
                auxiliary_loss_weight=float(auxiliary),  # transformers rejects an int
                auxiliary_in_channels=widths[third],
                auxiliary_channels=auxiliary_width,
                loss_ignore_index=IGNORED,
            )
        )
        self.dropout = dropout
        if self.net.auxiliary_head is not None:
            self.net.auxiliary_head.in_index = third  # transformers always takes 2
        for head in (self.net.decode_head, self.net.auxiliary_head):
            if head is None:
                continue
            _draw(head)
            if dropout:  # heads of transformers have none; a hook leaves the keys of the state dict unchanged
                head.classifier.register_forward_pre_hook(self._drop)
        self._take(self.net.backbone)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        size, x = x.shape[-2:], filled_up(x, self.multiple)
        maps = self.net.backbone(x).feature_maps
        if y is not None:
            below, right = (b - a for a, b in zip(size, x.shape[-2:], strict=True))
            # Padding has no class and does not count in the loss.
            y = F.pad(y.long(), (0, right, 0, below), value=IGNORED)
            # One picture pooled to one cell has no variance for the batch norm that follows.
            if self.training and len(x) == 1:
                raise SchemeError("UPerNet: a batch of one picture has no statistics\n  Give data.batch_size 2 or more")
        logits = self.net.decode_head(maps)
        if y is None:
            logits = F.interpolate(logits, x.shape[-2:], mode="bilinear", align_corners=False)
            return logits[..., : size[0], : size[1]]
        losses = {"loss": pixel_cross_entropy(logits, y)}
        if self.net.auxiliary_head is not None:
            losses["auxiliary"] = self.auxiliary * pixel_cross_entropy(self.net.auxiliary_head(maps), y)
        return losses

    @property
    def body(self) -> nn.Module:
        return self.net.backbone.net

    def _drop(self, classifier: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (F.dropout2d(args[0], self.dropout, self.training),)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Returns the softmax of the scores."""
        return scores.softmax(1)


def _draw(head: nn.Module) -> None:
    """Initialises a head's convolutions before norms by He's rule, as in published heads, for any width.

    The standard deviation of 0.02 in transformers is what this rule gives for the published 512 channels. In a narrow
    head it is so small that, with a norm after it, each step of the optimiser turns the weights by a large angle.
    """
    for m in head.modules():
        if isinstance(getattr(m, "batch_norm", None), nn.BatchNorm2d):
            nn.init.kaiming_normal_(m.conv.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[union-attr]


class Mask2Former(_OnMaps):
    """A model under queries, each of which predicts a mask and its class.

    The score of a class at a pixel is the sum over the queries of the probability of the class times the probability
    that the pixel lies in the mask. In training each class of a picture is one mask. Queries are assigned to masks at
    the least cost; like the losses, it is evaluated at random points, drawn from torch's global generator. Pixels
    without a class are in no mask.

    Args:
        model: one of ``odenets.list_models()`` with three maps or more, each half the size of the one before.
        num_classes: the number of classes, including the background.
        in_chans: channels of the pictures.
        scheme: a scheme for all levels of the model, or one per level; None is the model's own.
        backprop: as in ``Stack``; None is the model's own.
        options: further options of the model.
        width: channels of the pixel decoder, the masks and the queries; a multiple of 32 and of ``heads``.
        queries: the number of queries.
        decoder_layers: predictions that the loss counts: one before the first layer of the decoder and one after each,
            so the decoder has one layer fewer.
        encoder_layers: layers of the pixel decoder.
        heads: heads of each attention.
        feedforward: width inside the decoder's layers; None is eight times ``width``. The pixel decoder has half of it.
        points: number of points at which costs and losses are evaluated.
        weights: a file with the weights of the model, trained as a classifier.
        weights_classes: the number of classes of that classifier; None is the model's own number.

    Shapes:
        x: (n, in_chans, h, w); y: (n, h, w); the result is (n, num_classes, h, w), or a dictionary of scalars.

    Raises:
        SchemeError: the model has no such maps, the width is not a multiple of 32 and of ``heads``, another number is
            below 1, there is only one class, a label is none, or transformers or scipy is not installed.

    Source:
        Cheng et al. 2022, Masked-attention Mask Transformer for Universal Image Segmentation, arXiv 2112.01527.
    """

    # long: half of it is its parameters, a line each
    def __init__(
        self,
        model: str = "convnext_tiny",
        num_classes: int = 150,
        in_chans: int = 3,
        scheme: str | list[str] | None = None,
        backprop: str | None = None,
        options: dict[str, Any] | None = None,
        width: int = 256,
        queries: int = 100,
        decoder_layers: int = 10,
        encoder_layers: int = 6,
        heads: int = 8,
        feedforward: int | None = None,
        points: int = 12544,
        weights: str | None = None,
        weights_classes: int | None = None,
    ):
        super().__init__()
        config = _backbone(model, in_chans, scheme, backprop, options)
        reductions = _reductions(config)
        steps = [b / a for a, b in pairwise(reductions)]
        if len(reductions) < 3 or any(step != 2 for step in steps):
            raise SchemeError(
                f"Mask2Former: the maps of {model} are 1/{', 1/'.join(map(str, reductions))} of the picture; wants "
                "three or more, each half of the one before\n  UPerNet takes any"
            )
        if width < 1 or heads < 1 or width % 32 or width % heads:
            raise SchemeError(f"Mask2Former: width={width}, heads={heads}; wants a width that 32 and the heads divide")
        feedforward = 8 * width if feedforward is None else feedforward
        counts = {"queries": queries, "decoder_layers": decoder_layers, "feedforward": feedforward, "points": points}
        for option, count, least in (*((*pair, 1) for pair in counts.items()), ("encoder_layers", encoder_layers, 0)):
            if count < least:
                raise SchemeError(f"Mask2Former: {option}={count}; wants {least} or more")
        self._begin(config, num_classes, weights, weights_classes)
        try:
            import scipy  # noqa: F401
        except ImportError:
            raise SchemeError('Mask2Former assigns queries by scipy\n  pip install "odenets[segment]"') from None
        self.net = _mask2former(
            backbone_config=config,
            num_labels=num_classes,
            feature_strides=reductions,
            common_stride=reductions[0],
            feature_size=width,
            mask_feature_size=width,
            hidden_dim=width,
            num_queries=queries,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers,
            num_attention_heads=heads,
            dim_feedforward=feedforward,
            encoder_feedforward_dim=max(1, feedforward // 2),
            train_num_points=points,
        )
        self._take(self.net.model.pixel_level_module.encoder)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        size, x = x.shape[-2:], filled_up(x, self.multiple)
        if y is not None:
            below, right = (b - a for a, b in zip(size, x.shape[-2:], strict=True))
            y = F.pad(y.long(), (0, right, 0, below), value=IGNORED)
            classes = [picture[picture != IGNORED].unique() for picture in y]
            _check_classes(torch.cat(classes), self.num_classes)
            masks = [(p == c[:, None, None]).to(x.dtype) for p, c in zip(y, classes, strict=True)]
            return {"loss": self.net(x, mask_labels=masks, class_labels=classes).loss}
        found = self.net(x)
        classes = found.class_queries_logits.softmax(-1)[..., :-1]  # the last class is "no object"
        masks = F.interpolate(found.masks_queries_logits, x.shape[-2:], mode="bilinear", align_corners=False)
        return torch.einsum("nqc,nqhw->nchw", classes, masks.sigmoid())[..., : size[0], : size[1]]

    @property
    def body(self) -> nn.Module:
        return self.net.model.pixel_level_module.encoder.net

    def probabilities(self, scores: Tensor) -> Tensor:
        """Returns the scores themselves, which are sums of products of probabilities."""
        return scores


def _check_classes(classes: Tensor, count: int) -> None:
    """Rejects labels beyond the classes: the next one would be taken for "no object"."""
    if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < count:
        held = f"{int(classes.min())} to {int(classes.max())}"
        raise SchemeError(
            f"Mask2Former: labels of {held}; wants 0 to {count - 1}\n  Give -100 where a pixel has no class"
        )


def _reductions(config: Any) -> list[int]:
    """Returns the reduction of each map of a model relative to the picture."""
    from ..hf import _no_mixing

    with torch.device("meta"), _no_mixing():
        return [row["reduction"] for row in config.build(0).feature_info]


def _mask2former(**options: Any) -> Any:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
    from transformers.utils import logging

    # It would warn that it was not tested with our models; whether one fits is checked before.
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**options))
    finally:
        logging.set_verbosity(level)
