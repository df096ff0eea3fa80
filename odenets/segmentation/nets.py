"""Networks that give each pixel a class: any model of the library under the heads of transformers.

A network takes pictures of any size. They are filled up at the right and below to a multiple of the coarsest map's
reduction, with zeros, which is the mean colour of a normalised picture, and what was filled up is cut off the result::

    net = UPerNet("revcol_tiny", num_classes=150, backprop="reverse")
    scores = net(x)                  # (n, 150, h, w)
    losses = net(x, y)               # {"loss": ..., "auxiliary": ...}, to be summed
"""

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
            then weigh theirs by the pixels that they have, and take the step that one with the whole batch takes.
    """

    num_classes: int
    mean_over_pixels: bool = False

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        """The scores of the classes at each pixel, or, where the classes are given, the parts of the loss.

        Args:
            x: (n, c, h, w), normalised.
            y: (n, h, w), the classes; -100 where a pixel has none, or it does not count.

        Returns:
            (n, num_classes, h, w), of which the largest is the prediction; or scalars by name, whose sum is the loss.
        """

    @abstractmethod
    def probabilities(self, scores: Tensor) -> Tensor:
        """What several views of a picture are averaged as, from their scores (n, num_classes, h, w)."""


def pixel_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean over the pixels that have a class of -log softmax(logits)[class]; 0 where no pixel has one.

    Args:
        logits: (n, classes, h', w'), resized bilinearly to the size of y.
        y: (n, h, w); -100 does not count.

    Example:
        >>> import torch
        >>> y = torch.tensor([[[0, -100]]])
        >>> round(float(pixel_cross_entropy(torch.zeros(1, 4, 1, 1), y)), 4)  # log 4
        1.3863
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = F.interpolate(logits, y.shape[-2:], mode="bilinear", align_corners=False)
    # Summed and divided here: torch's mean over no pixel is NaN.
    total = F.cross_entropy(logits, y.long(), ignore_index=IGNORED, reduction="sum")
    return total / (y != IGNORED).sum().clamp(min=1)


def filled_up(x: Tensor, multiple: int) -> Tensor:
    """Pictures (n, c, h, w) with zeros at the right and below, so that both sides are multiples of a number."""
    bottom, right = (-side % multiple for side in x.shape[-2:])
    return F.pad(x, (0, right, 0, bottom)) if bottom or right else x


def _backbone(
    model: str,
    in_chans: int,
    scheme: str | Sequence[str] | None,
    backprop: str | None,
    options: dict[str, Any] | None,
) -> Any:
    """The configuration of a model whose maps are all given."""
    try:
        from ..hf import OdenetsConfig
    except ImportError as error:
        raise SchemeError(f'segmentation needs transformers ({error})\n  pip install "odenets[segment]"') from None
    listed = scheme if scheme is None or isinstance(scheme, str) else list(scheme)
    config = OdenetsConfig(name=model, options=options, scheme=listed, backprop=backprop, num_channels=in_chans)
    # Which maps there are is only known now; the stem has none.
    config.set_output_features_output_indices(out_features=config.stage_names[1:], out_indices=None)
    return config


class _OnMaps(SegmentationNet):
    """What networks of a model and a head share: weights of the model, and the sizes of its maps."""

    net: Any

    def _begin(self, config: Any, num_classes: int, weights: str | None, weights_classes: int | None) -> None:
        """Notes what the maps are; reads the model's weights, which may be wrong, before any head is drawn."""
        if num_classes < 2:
            raise SchemeError(f"num_classes={num_classes}: wants 2 or more, the background counted")
        self.num_classes = num_classes
        self._weights: dict[str, Tensor] = {}
        options = {**(config.options or {}), "in_chans": config.num_channels}
        if config.scheme is not None:
            options["scheme"] = config.scheme
        if weights is not None:
            # A whole classifier first, so that weights are renamed and checked as anywhere else, those of its head too.
            whole = create_model(config.name, num_classes=weights_classes, **options)
            load(whole, weights)
            self._weights = whole.state_dict()

    def _take(self, backbone: Any) -> None:
        """Gives the model its weights, of which those of the classification head are left over."""
        self.reductions: list[int] = [row["reduction"] for row in backbone.net.feature_info]
        self.widths: list[int] = list(backbone.channels)
        if self._weights:
            own = backbone.net.state_dict()
            backbone.net.load_state_dict({key: self._weights[key] for key in own})
        # They are in the network now, and would be held twice.
        del self._weights

    @property
    @abstractmethod
    def body(self) -> nn.Module:
        """The model, without its head."""

    def parameter_depths(self) -> dict[str, int]:
        """How deep each parameter lies: those of the model as it says, and all of the head one deeper."""
        return depths_around(self, self.body)

    @property
    def multiple(self) -> int:
        """Pictures are filled up to multiples of this."""
        return max(self.reductions)


class UPerNet(_OnMaps):
    """A model under a pyramid of its maps, with an auxiliary head on the third map.

    The last map is pooled to 1, 2, 3 and 6 cells a side and joined with itself, all maps are added up from coarse to
    fine, and the scores come from all levels together. The loss is that of the head, plus ``auxiliary`` times that of
    the auxiliary head, a convolution on the third map, or on the last where there are fewer.

    Args:
        model: one of ``odenets.list_models()``.
        num_classes: the number of classes, that of the background included.
        in_chans: channels of the pictures.
        scheme: a scheme for all levels of the model, or one per level; None is the model's own.
        backprop: as in ``Stack``; None is the model's own.
        options: further options of the model, such as ``drop_path_rate``.
        width: channels of the head.
        auxiliary: what the auxiliary head weighs in the loss; 0 leaves it out.
        auxiliary_width: its channels.
        dropout: share of the channels that either head loses before its scores, in training.
        weights: a file with the weights of the model, trained as a classifier.
        weights_classes: how many classes that classifier told apart; None is the model's own number.

    Shapes:
        x: (n, in_chans, h, w); y: (n, h, w); the result is (n, num_classes, h, w), or a dictionary of scalars.

    Raises:
        SchemeError: a model, option or file that is none; one class; transformers is not installed.

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
        if min(width, auxiliary_width) < 1 or auxiliary < 0 or not 0 <= dropout < 1:
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
                auxiliary_loss_weight=float(auxiliary),  # transformers wants the very type
                auxiliary_in_channels=widths[third],
                auxiliary_channels=auxiliary_width,
                loss_ignore_index=IGNORED,
            )
        )
        self.dropout = dropout
        if self.net.auxiliary_head is not None:
            self.net.auxiliary_head.in_index = third  # 2 whatever there is, in transformers
        for head in (self.net.decode_head, self.net.auxiliary_head):
            if head is None:
                continue
            _draw(head)
            if dropout:  # transformers' heads have none; a hook leaves their keys as they are
                head.classifier.register_forward_pre_hook(self._drop)
        self._take(self.net.backbone)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        size, x = x.shape[-2:], filled_up(x, self.multiple)
        maps = self.net.backbone(x).feature_maps
        if y is not None:
            below, right = (b - a for a, b in zip(size, x.shape[-2:], strict=True))
            # What is filled up has no class, and no part in the loss.
            y = F.pad(y, (0, right, 0, below), value=IGNORED)
            # A map of one cell for one picture: nothing varies that the norm behind the pooling could divide by.
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
        """Their softmax."""
        return scores.softmax(1)


def _draw(head: nn.Module) -> None:
    """Draws a head's convolutions before norms by He's rule, as published heads are, whatever their width.

    The deviation of 0.02 that transformers takes is this rule's for the published 512 channels. In a narrow head it is
    so small that, with a norm behind it, each step of the optimiser turns the weights by a large angle.
    """
    for m in head.modules():
        if isinstance(getattr(m, "batch_norm", None), nn.BatchNorm2d):
            nn.init.kaiming_normal_(m.conv.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[union-attr]


class Mask2Former(_OnMaps):
    """A model under queries, each of which gives a mask and its class.

    The score of a class at a pixel is the sum over the queries of their probability of the class times that of the
    pixel in their mask. In training each class that a picture has is one mask; queries are assigned to them by the
    least cost, which, like the losses, is measured at points that are drawn (from torch's global generator). Pixels
    without a class are in no mask.

    Args:
        model: one of ``odenets.list_models()`` with three maps or more, each half the size of the one before.
        num_classes: the number of classes, that of the background included.
        in_chans: channels of the pictures.
        scheme: a scheme for all levels of the model, or one per level; None is the model's own.
        backprop: as in ``Stack``; None is the model's own.
        options: further options of the model.
        width: channels of the pixel decoder, the masks and the queries; a multiple of 32.
        queries: their number.
        decoder_layers: layers of the decoder; the losses of the scores before each of them count too.
        encoder_layers: layers of the pixel decoder.
        heads: of each attention.
        feedforward: width inside the layers; None is eight times ``width``, and half of it in the pixel decoder.
        points: at which costs and losses are measured.
        weights: a file with the weights of the model, trained as a classifier.
        weights_classes: how many classes that classifier told apart; None is the model's own number.

    Shapes:
        x: (n, in_chans, h, w); y: (n, h, w); the result is (n, num_classes, h, w), or a dictionary of scalars.

    Raises:
        SchemeError: a model that has no such maps, a width that is no multiple of 32; or transformers, or scipy, is not
            installed.

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
        if width < 1 or width % 32 or width % heads:
            raise SchemeError(f"Mask2Former: width={width}, heads={heads}; wants a width that 32 and the heads divide")
        self._begin(config, num_classes, weights, weights_classes)
        try:
            import scipy  # noqa: F401
        except ImportError:
            raise SchemeError('Mask2Former assigns queries by scipy\n  pip install "odenets[segment]"') from None
        feedforward = 8 * width if feedforward is None else feedforward
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
            y = F.pad(y, (0, right, 0, below), value=IGNORED)
            classes = [picture[picture != IGNORED].unique().long() for picture in y]
            masks = [(p == c[:, None, None]).to(x.dtype) for p, c in zip(y, classes, strict=True)]
            return {"loss": self.net(x, mask_labels=masks, class_labels=classes).loss}
        found = self.net(x)
        classes = found.class_queries_logits.softmax(-1)[..., :-1]  # the last is that of no object
        masks = F.interpolate(found.masks_queries_logits, x.shape[-2:], mode="bilinear", align_corners=False)
        return torch.einsum("nqc,nqhw->nchw", classes, masks.sigmoid())[..., : size[0], : size[1]]

    @property
    def body(self) -> nn.Module:
        return self.net.model.pixel_level_module.encoder.net

    def probabilities(self, scores: Tensor) -> Tensor:
        """The scores themselves, which are sums of products of probabilities."""
        return scores


def _reductions(config: Any) -> list[int]:
    """By how much smaller than the picture each map of a model is."""
    from ..hf import _no_mixing

    with torch.device("meta"), _no_mixing():
        return [row["reduction"] for row in config.build(0).feature_info]


def _mask2former(**options: Any) -> Any:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
    from transformers.utils import logging

    # It would print that it has not seen our models; which ones fit is checked before.
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**options))
    finally:
        logging.set_verbosity(level)
