"""The interface of a detector's head, and two heads from transformers for any network: Deformable DETR and RT-DETR.

A head is configured first and built once the network is known: ``build`` receives the widths of its maps. A head takes
the pictures, their maps and the targets, and returns losses by name and detections.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from schemes import SchemeError

from .data import Target
from .precision import MOST, Found


class Maps(NamedTuple):
    """Shapes of the network's maps, fine to coarse.

    Attributes:
        channels: their widths.
        reductions: pixels of the picture per pixel of each map.
    """

    channels: list[int]
    reductions: list[int]


def check_doubling(head: str, maps: Maps, otherwise: str) -> None:
    """Rejects maps that are not each half the size of the one before.

    Args:
        head: the head that wants them.
        maps: shapes of the network's maps.
        otherwise: what to take for other maps.
    """
    if any(b != 2 * a for a, b in pairwise(maps.reductions)):
        raise SchemeError(
            f"{head}: maps of reductions {maps.reductions}; wanted each twice the one before\n"
            f"  Choose others by model.levels, or take {otherwise}"
        )


class Output(NamedTuple):
    """The output of a head.

    Attributes:
        losses: terms by name, whose sum is the loss; empty if they are not computed.
        found: detections of each picture, in pixels of the batch; empty in training.
    """

    losses: dict[str, Tensor]
    found: list[Found]


class Head(nn.Module, ABC):
    """Detects objects from the maps of a network.

    Attributes:
        levels: how many of the coarsest maps it takes, unless the detector names them.
        masks: whether it predicts masks.
        num_classes: number of classes; None until the detector sets it to that of its net.
    """

    levels: int = 3
    masks: bool = False
    num_classes: int | None

    @abstractmethod
    def build(self, maps: Maps) -> None:
        """Creates the layers, once the network is known.

        Args:
            maps: shapes of the network's maps.
        """

    @abstractmethod
    def forward(self, x: Tensor, maps: Sequence[Tensor], targets: Sequence[Target] | None, boxes: float) -> Output:
        """Returns losses where there are targets, and detections in evaluation.

        Args:
            x: pictures (n, 3, h, w).
            maps: the network's maps, fine to coarse.
            targets: see ``odenets.detection.data``; evaluation needs only ``size``.
            boxes: the number of boxes that losses are divided by: that of a batch, averaged over the processes.
        """


class DETR(Head):
    """Base class of the heads that come from transformers.

    The detector of transformers is built around a placeholder backbone that returns the maps it is given. The network
    itself stays outside, under its own names, and keeps its norms.
    """

    def __init__(self, num_classes: int | None, queries: int, width: int, heads: int, decoder_layers: int) -> None:
        super().__init__()
        if decoder_layers < 2:
            raise SchemeError(f"head.decoder_layers is {decoder_layers}; wanted 2 or more\n  Give another number")
        if (num_classes is not None and num_classes < 1) or queries < 1:
            raise SchemeError(f"{num_classes} classes and {queries} queries; wanted 1 or more of each")
        if heads < 1 or width < 1 or width % heads or width % 32:
            raise SchemeError(
                f"head.width is {width} with {heads} heads; wanted a multiple of 32 and of head.heads\n"
                "  Give another width, such as 256"
            )
        self.num_classes, self.queries, self.width = num_classes, queries, width
        self.detr: Any = None

    @abstractmethod
    def configured(self, maps: Maps, backbone: Any) -> nn.Module:
        """Builds the detector of transformers.

        Args:
            maps: shapes of the network's maps.
            backbone: configuration of the placeholder backbone.
        """

    @abstractmethod
    def edges(self, x: Tensor, sizes: Tensor) -> Tensor:
        """The width and height (n, 2) to which boxes in [0, 1] are relative.

        Args:
            x: pictures of the batch.
            sizes: (n, 2), the width and height that each picture fills.
        """

    def build(self, maps: Maps) -> None:
        try:
            from .stand_in import MapsConfig
        except ImportError as e:
            raise SchemeError(str(e)) from None
        self.detr = self.configured(maps, MapsConfig(channels=list(maps.channels)))
        self.detr.config._attn_implementation = "sdpa"
        # In single precision and without autocast: costs and losses are differences of small numbers.
        own = self.detr.loss_function
        self.detr.loss_function = _Single(own)  # type: ignore[assignment]

    def forward(self, x: Tensor, maps: Sequence[Tensor], targets: Sequence[Target] | None, boxes: float) -> Output:
        assert self.detr is not None
        sizes = torch.tensor([[x.shape[3], x.shape[2]]] * len(x), device=x.device)
        if targets is not None:
            sizes = torch.stack([target["size"] for target in targets]).flip(1).to(x.device)
        edges = self.edges(x, sizes)
        columns, rows = torch.arange(x.shape[3], device=x.device), torch.arange(x.shape[2], device=x.device)
        inside = (rows[None, :, None] < sizes[:, 1, None, None]) & (columns[None, None] < sizes[:, 0, None, None])
        labels = None
        if targets is not None and all("boxes" in target for target in targets):
            # At least single precision: bfloat16 resolves the edges of a large picture only to a few pixels.
            wide = torch.promote_types(x.dtype, torch.float32)
            labels = [_shares(target, edge, wide) for target, edge in zip(targets, edges, strict=True)]
        stand_in = self.detr.model.backbone.model
        # transformers passes its backbone only the pictures: the maps reach it through this attribute.
        stand_in.held = tuple(maps)
        try:
            out = self.detr(pixel_values=x, pixel_mask=inside.long(), labels=labels)
        finally:
            # Otherwise the maps and their graph would stay alive until the next batch.
            stand_in.held = ()
        losses = {}
        if labels is not None:
            # transformers divides by the number of boxes of this process alone.
            own = max(1, sum(len(label["class_labels"]) for label in labels))
            losses = {"loss": out.loss * (own / boxes)}
        found = [] if self.training else self.found(out.logits, out.pred_boxes, edges)
        return Output(losses, found)

    def found(self, logits: Tensor, boxes: Tensor, edges: Tensor) -> list[Found]:
        """Returns the highest-scoring pairs of a query and a class, at most 100 per picture.

        Args:
            logits: (n, queries, classes).
            boxes: (n, queries, 4), centre, width and height, relative to ``edges``.
            edges: (n, 2), width and height.
        """
        # Over queries and classes jointly, since sigmoids do not compete: one query may yield two classes.
        scores = logits.float().sigmoid().flatten(1)
        best, places = scores.topk(min(MOST, scores.shape[1]))
        middle, extent = boxes.float().chunk(2, -1)
        corners = torch.cat([middle - extent / 2, middle + extent / 2], -1) * edges.repeat(1, 2)[:, None].float()
        count = logits.shape[-1]
        return [
            Found(corner[place // count], score, place % count)
            for corner, score, place in zip(corners, best, places, strict=True)
        ]


def check_counts(**counts: int) -> None:
    """Rejects options of a head below 1.

    Args:
        **counts: options by name.
    """
    for name, count in counts.items():
        if count < 1:
            raise SchemeError(f"head.{name} is {count}; wanted 1 or more\n  Give another number")


class _Single:
    """Evaluates a loss of transformers in single precision."""

    def __init__(self, loss: Any) -> None:
        self.loss = loss

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def wide(value: Any) -> Any:
            if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
                return value.float()
            return value

        device = next(value.device.type for value in args if isinstance(value, Tensor))
        with torch.autocast(device, enabled=False):
            return self.loss(*map(wide, args), **{name: wide(value) for name, value in kwargs.items()})


def _shares(target: Target, edges: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A target as transformers expects it: relative centre, width and height."""
    low, high = target["boxes"].to(dtype).chunk(2, 1)
    boxes = torch.cat([(low + high) / 2, high - low], 1) / edges.repeat(2)
    return {"class_labels": target["labels"], "boxes": boxes}


class DeformableDETR(DETR):
    """Deformable DETR with iterative box refinement from layer to layer.

    The two-stage variant is left out: transformers gives its first stage no loss, so it would stay as initialised.

    Args:
        num_classes: number of classes; None takes that of the net, which on the command line follows from the data.
        queries: number of queries; each gives one box, possibly with several classes.
        width: width of the transformer.
        heads: number of attention heads.
        encoder_layers: number of encoder layers.
        decoder_layers: number of decoder layers, 2 or more.
        feedforward: width of the feed-forward layers.
        points: sampling points of an attention head on each map.
        feature_levels: number of maps to attend to, at least as many as the network gives; if it gives fewer, coarser
            ones are added.
        dropout: dropout rate of the transformer.

    Source:
        Zhu et al. 2021, Deformable DETR, arXiv 2010.04159; the layers are transformers'.

    Example:
        >>> head = DeformableDETR(num_classes=3, queries=10, width=32, heads=4, encoder_layers=1, decoder_layers=2)
        >>> head.build(Maps([8, 16], [4, 8]))
    """

    def __init__(
        self,
        num_classes: int | None = None,
        queries: int = 300,
        width: int = 256,
        heads: int = 8,
        encoder_layers: int = 6,
        decoder_layers: int = 6,
        feedforward: int = 1024,
        points: int = 4,
        feature_levels: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(num_classes, queries, width, heads, decoder_layers)
        check_counts(points=points, feedforward=feedforward, feature_levels=feature_levels)
        self.feature_levels = feature_levels
        self.options = {
            "num_queries": queries,
            "d_model": width,
            "encoder_layers": encoder_layers,
            "decoder_layers": decoder_layers,
            "encoder_attention_heads": heads,
            "decoder_attention_heads": heads,
            "encoder_ffn_dim": feedforward,
            "decoder_ffn_dim": feedforward,
            "encoder_n_points": points,
            "decoder_n_points": points,
            "dropout": dropout,
        }

    def configured(self, maps: Maps, backbone: Any) -> nn.Module:
        from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

        if self.feature_levels < len(maps.channels):
            raise SchemeError(
                f"DeformableDETR: head.feature_levels is {self.feature_levels}, and there are {len(maps.channels)} "
                f"maps\n  Choose fewer by model.levels, or give head.feature_levels {len(maps.channels)}"
            )
        config = DeformableDetrConfig(
            backbone_config=backbone,
            num_feature_levels=self.feature_levels,
            num_labels=self.num_classes,  # type: ignore[call-arg]
            with_box_refine=True,
            auxiliary_loss=True,
            # The custom kernel is for CUDA alone and is built or downloaded on first use; plain torch gives the same.
            disable_custom_kernels=True,
            **self.options,
        )
        detr = DeformableDetrForObjectDetection(config)
        self._separate(detr)
        return detr

    def _separate(self, detr: Any) -> None:
        """Gives each decoder layer its own output heads, initialised as published; transformers ties new ones."""
        kept = [len(detr.class_embed), detr.class_embed[0].in_features]
        classes = nn.ModuleList(nn.Linear(kept[1], int(self.num_classes or 0)) for _ in range(kept[0]))
        boxes = nn.ModuleList(type(detr.bbox_embed[0])(kept[1], kept[1], 4, 3) for _ in range(kept[0]))
        for layer in classes:
            # Each class starts at a probability of 0.01: nearly all queries match no object, and their loss would
            # dominate otherwise.
            nn.init.constant_(layer.bias, math.log(0.01 / 0.99))  # type: ignore[arg-type]
        for n, layer in enumerate(boxes):
            last = layer.layers[-1]  # type: ignore[union-attr, index]
            # No correction at first: every layer starts from the box of the one before.
            nn.init.zeros_(last.weight)  # type: ignore[arg-type, union-attr]
            nn.init.zeros_(last.bias)  # type: ignore[arg-type, union-attr]
            if n == 0:  # the first box of a query is small; later ones are corrections
                nn.init.constant_(last.bias[2:], -2.0)  # type: ignore[index, union-attr]
        detr.class_embed, detr.bbox_embed = classes, boxes
        # The decoder refines boxes with the same layers that output them: one list under two names.
        detr.model.decoder.bbox_embed = boxes
        # transformers ties weights by these names and would share the layers again.
        detr._tied_weights_keys = {}

    def edges(self, x: Tensor, sizes: Tensor) -> Tensor:
        return sizes  # its attention uses the pixel mask, which tells a picture from its padding


class RTDETR(DETR):
    """RT-DETR: a convolutional encoder, queries from its best places, and denoising in training.

    Its encoder treats padding as part of the picture, so boxes are relative to the padded size.

    Args:
        num_classes: number of classes; None takes that of the net, which on the command line follows from the data.
        queries: number of queries; each gives one box, possibly with several classes.
        width: width of encoder and decoder.
        heads: number of attention heads.
        encoder_layers: attention layers on the coarsest map.
        decoder_layers: number of decoder layers, 2 or more.
        feedforward: width of the feed-forward layers.
        points: sampling points of an attention head on each map.
        denoising: noised copies of its boxes that a picture gets in training, at most; as many negatives are added.
        label_noise: twice the probability that a noised box is given a random class.
        box_noise: scale of the shifts of noised boxes.
        dropout: dropout rate of the transformer.

    Source:
        Zhao et al. 2024, DETRs Beat YOLOs on Real-time Object Detection, arXiv 2304.08069; the layers are
        transformers'.

    Example:
        >>> head = RTDETR(num_classes=3, queries=10, width=32, heads=4, decoder_layers=2)
        >>> head.build(Maps([8, 16], [4, 8]))
    """

    def __init__(
        self,
        num_classes: int | None = None,
        queries: int = 300,
        width: int = 256,
        heads: int = 8,
        encoder_layers: int = 1,
        decoder_layers: int = 6,
        feedforward: int = 1024,
        points: int = 4,
        denoising: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_classes, queries, width, heads, decoder_layers)
        check_counts(points=points, feedforward=feedforward)
        self.options = {
            "num_queries": queries,
            "d_model": width,
            "encoder_hidden_dim": width,
            "encoder_layers": encoder_layers,
            "decoder_layers": decoder_layers,
            "encoder_attention_heads": heads,
            "decoder_attention_heads": heads,
            "encoder_ffn_dim": feedforward,
            "decoder_ffn_dim": feedforward,
            "decoder_n_points": points,
            "num_denoising": denoising,
            "label_noise_ratio": label_noise,
            "box_noise_scale": box_noise,
            "dropout": dropout,
        }

    def configured(self, maps: Maps, backbone: Any) -> nn.Module:
        from transformers import RTDetrConfig, RTDetrForObjectDetection

        count = len(maps.channels)
        check_doubling("RTDETR", maps, "DeformableDETR")
        config = RTDetrConfig(
            backbone_config=backbone,
            encoder_in_channels=list(maps.channels),
            feat_strides=list(maps.reductions),
            # Attention on the coarsest map alone, as published: finer ones have too many places.
            encode_proj_layers=[count - 1],
            decoder_in_channels=[self.width] * count,
            num_feature_levels=count,
            num_labels=self.num_classes,  # type: ignore[call-arg]
            **self.options,
        )
        detr = RTDetrForObjectDetection(config)
        for m in detr.modules():
            if isinstance(m, nn.BatchNorm2d):  # transformers draws their scales around zero, which mutes the maps
                m.reset_parameters()
        self.reductions = maps.reductions
        return detr

    def edges(self, x: Tensor, sizes: Tensor) -> Tensor:
        return sizes.new_tensor([x.shape[3], x.shape[2]]).expand(len(x), 2)

    def forward(self, x: Tensor, maps: Sequence[Tensor], targets: Sequence[Target] | None, boxes: float) -> Output:
        places = sum(math.prod(m.shape[2:]) for m in maps)
        # Queries are the best places of the maps; with fewer places than queries, topk fails without saying why.
        if places < self.queries:
            raise SchemeError(
                f"RTDETR: {self.queries} queries, and maps of {x.shape[2]}x{x.shape[3]} pixels have {places} places\n"
                f"  Give head.queries of up to {places}, larger pictures or finer maps"
            )
        # The encoder upsamples maps by 2 and concatenates them, which fits only if no side was rounded.
        coarsest = self.reductions[-1]
        if x.shape[2] % coarsest or x.shape[3] % coarsest:
            raise SchemeError(
                f"RTDETR: a batch of {x.shape[2]}x{x.shape[3]} pixels; wanted multiples of {coarsest}\n"
                f"  Give data.multiple {coarsest}"
            )
        return super().forward(x, maps, targets, boxes)
