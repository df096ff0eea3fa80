"""What a detector's head is, and two of transformers' on any network: Deformable DETR and RT-DETR.

A head is configured first and built when the network is known: ``build`` is given the widths of its maps. It takes the
pictures, their maps and the targets, and gives losses by name and what it found.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from schemes import SchemeError

from .data import Target
from .precision import MOST, Found


class Maps(NamedTuple):
    """What a head knows of the network's maps, fine to coarse.

    Attributes:
        channels: their widths.
        reductions: pixels of the picture per pixel of each.
    """

    channels: list[int]
    reductions: list[int]


class Output(NamedTuple):
    """What a head gives.

    Attributes:
        losses: terms by name, of which the loss is the sum; empty where they are not known.
        found: detections of each picture in pixels of the batch; empty in training.
    """

    losses: dict[str, Tensor]
    found: list[Found]


class Head(nn.Module, ABC):
    """Detects objects from the maps of a network.

    Attributes:
        levels: how many maps it takes, the coarsest ones, unless the detector names them.
        masks: whether it finds masks.
        num_classes: number of classes; None until the detector sets that of its net.
    """

    levels: int = 3
    masks: bool = False
    num_classes: int | None

    @abstractmethod
    def build(self, maps: Maps) -> None:
        """Makes the layers, once the network is known.

        Args:
            maps: of the network.
        """

    @abstractmethod
    def forward(self, x: Tensor, maps: Sequence[Tensor], targets: Sequence[Target] | None, boxes: float) -> Output:
        """Losses where there are targets, and detections in evaluation.

        Args:
            x: pictures (n, 3, h, w).
            maps: of the network, fine to coarse.
            targets: see ``odenets.detection.data``; in evaluation ``size`` alone is needed.
            boxes: boxes of a batch by which losses are divided, the mean over the processes of a run.
        """


class DETR(Head):
    """What the heads of transformers share.

    Its detector is built around a stand-in for the backbone, which hands over the maps that it is given: the network
    stays where it is, under its own names, and keeps its norms.
    """

    def __init__(self, num_classes: int | None, queries: int, width: int, heads: int, decoder_layers: int) -> None:
        super().__init__()
        if decoder_layers < 2:
            raise SchemeError(f"head.decoder_layers is {decoder_layers}; wanted 2 or more\n  Give another number")
        if (num_classes is not None and num_classes < 1) or queries < 1:
            raise SchemeError(f"{num_classes} classes and {queries} queries; wanted 1 or more of each")
        if width % heads or width % 32:
            raise SchemeError(
                f"head.width is {width} with {heads} heads; wanted a multiple of 32 and of head.heads\n"
                "  Give another width, such as 256"
            )
        self.num_classes, self.queries, self.width = num_classes, queries, width
        self.detr: Any = None

    @abstractmethod
    def configured(self, maps: Maps, backbone: Any) -> nn.Module:
        """transformers' detector.

        Args:
            maps: of the network.
            backbone: configuration of the stand-in.
        """

    @abstractmethod
    def edges(self, x: Tensor, sizes: Tensor) -> Tensor:
        """Width and height (n, 2) that boxes from 0 to 1 are shares of.

        Args:
            x: pictures of the batch.
            sizes: (n, 2) width and height that each picture fills.
        """

    def build(self, maps: Maps) -> None:
        try:
            from .stand_in import MapsConfig
        except ImportError as e:
            raise SchemeError(str(e)) from None
        self.detr = self.configured(maps, MapsConfig(channels=list(maps.channels)))
        self.detr.config._attn_implementation = "sdpa"
        # In single precision, and apart from autocast: costs and losses are differences of small numbers.
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
            # In single precision at least: bfloat16 tells edges of a large picture apart to a few pixels only.
            wide = torch.promote_types(x.dtype, torch.float32)
            labels = [_shares(target, edge, wide) for target, edge in zip(targets, edges, strict=True)]
        stand_in = self.detr.model.backbone.model
        # transformers calls its backbone with the pictures alone: the maps reach it through this attribute.
        stand_in.held = tuple(maps)
        try:
            out = self.detr(pixel_values=x, pixel_mask=inside.long(), labels=labels)
        finally:
            # Else the maps, and their graph with them, would live until the next batch.
            stand_in.held = ()
        losses = {}
        if labels is not None:
            # transformers divides by the boxes of this process alone.
            own = max(1, sum(len(label["class_labels"]) for label in labels))
            losses = {"loss": out.loss * (own / boxes)}
        found = [] if self.training else self.found(out.logits, out.pred_boxes, edges)
        return Output(losses, found)

    def found(self, logits: Tensor, boxes: Tensor, edges: Tensor) -> list[Found]:
        """The best pairs of a query and a class, at most 100 a picture.

        Args:
            logits: (n, queries, classes).
            boxes: (n, queries, 4), middle, width and height as shares.
            edges: (n, 2), what they are shares of.
        """
        # Over queries and classes together, as sigmoids do not compete: one query may give two classes.
        scores = logits.float().sigmoid().flatten(1)
        best, places = scores.topk(min(MOST, scores.shape[1]))
        middle, extent = boxes.float().chunk(2, -1)
        corners = torch.cat([middle - extent / 2, middle + extent / 2], -1) * edges.repeat(1, 2)[:, None].float()
        count = logits.shape[-1]
        return [
            Found(corner[place // count], score, place % count)
            for corner, score, place in zip(corners, best, places, strict=True)
        ]


class _Single:
    """A loss of transformers in single precision."""

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
    """A target as transformers wants it: middle, width and height, as shares."""
    low, high = target["boxes"].to(dtype).chunk(2, 1)
    boxes = torch.cat([(low + high) / 2, high - low], 1) / edges.repeat(2)
    return {"class_labels": target["labels"], "boxes": boxes}


class DeformableDETR(DETR):
    """Deformable DETR, with boxes that are refined from layer to layer.

    Not its two-stage form, whose first stage transformers gives no loss: it would stay as it was drawn.

    Args:
        num_classes: number of classes; None is as many as the net was built for, which on a command line follow from
            the data.
        queries: detections of a picture at most.
        width: of the transformer.
        heads: of its attention.
        encoder_layers: of the transformer.
        decoder_layers: of the transformer, 2 or more.
        feedforward: width of its perceptrons.
        points: places that a head looks at, on each map.
        feature_levels: maps that it looks at; beyond the network's, coarser ones are made.
        dropout: of the transformer.

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

        count = max(self.feature_levels, len(maps.channels))
        config = DeformableDetrConfig(
            backbone_config=backbone,
            num_feature_levels=count,
            num_labels=self.num_classes,  # type: ignore[call-arg]
            with_box_refine=True,
            auxiliary_loss=True,
            # The custom kernel is for CUDA alone, and is built or brought when first used; plain torch gives the same.
            disable_custom_kernels=True,
            **self.options,
        )
        detr = DeformableDetrForObjectDetection(config)
        self._separate(detr)
        return detr

    def _separate(self, detr: Any) -> None:
        """Gives each layer of the decoder its own outputs, begun as published; transformers ties them when new."""
        kept = [len(detr.class_embed), detr.class_embed[0].in_features]
        classes = nn.ModuleList(nn.Linear(kept[1], int(self.num_classes or 0)) for _ in range(kept[0]))
        boxes = nn.ModuleList(type(detr.bbox_embed[0])(kept[1], kept[1], 4, 3) for _ in range(kept[0]))
        for layer in classes:
            # Each class begins at a probability of 0.01: nearly all queries show none, and their loss would drown the
            # rest.
            nn.init.constant_(layer.bias, math.log(0.01 / 0.99))  # type: ignore[arg-type]
        for n, layer in enumerate(boxes):
            last = layer.layers[-1]  # type: ignore[union-attr, index]
            # No correction at first: every layer begins with the box of the one before.
            nn.init.zeros_(last.weight)  # type: ignore[arg-type, union-attr]
            nn.init.zeros_(last.bias)  # type: ignore[arg-type, union-attr]
            if n == 0:  # the first box of a query is small; later ones are corrections
                nn.init.constant_(last.bias[2:], -2.0)  # type: ignore[index, union-attr]
        detr.class_embed, detr.bbox_embed = classes, boxes
        # The decoder refines boxes by the very layers that give them: one list under two names.
        detr.model.decoder.bbox_embed = boxes
        # By these names transformers ties weights, and would join the layers again.
        detr._tied_weights_keys = {}

    def edges(self, x: Tensor, sizes: Tensor) -> Tensor:
        return sizes  # its attention knows what of the batch a picture fills


class RTDETR(DETR):
    """RT-DETR: a convolutional encoder, queries from its best places, and denoising in training.

    Its encoder takes what a picture does not fill for a part of it, so that boxes are shares of the whole batch.

    Args:
        num_classes: number of classes; None is as many as the net was built for, which on a command line follow from
            the data.
        queries: detections of a picture at most.
        width: of encoder and decoder.
        heads: of the attention.
        encoder_layers: attention layers on the coarsest map.
        decoder_layers: 2 or more.
        feedforward: width of the perceptrons.
        points: places that a head looks at, on each map.
        denoising: noised boxes that a picture gets in training.
        label_noise: share of noised boxes whose class is another.
        box_noise: how far boxes are moved.
        dropout: of the transformer.

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
        if any(b != 2 * a for a, b in zip(maps.reductions, maps.reductions[1:], strict=False)):
            raise SchemeError(
                f"RTDETR: maps of reductions {maps.reductions}; wanted each twice the one before\n"
                "  Choose others by model.levels, or take DeformableDETR"
            )
        config = RTDetrConfig(
            backbone_config=backbone,
            encoder_in_channels=list(maps.channels),
            feat_strides=list(maps.reductions),
            # Attention within the coarsest map alone, as published: finer ones have too many places.
            encode_proj_layers=[count - 1],
            decoder_in_channels=[self.width] * count,
            num_feature_levels=count,
            num_labels=self.num_classes,  # type: ignore[call-arg]
            **self.options,
        )
        detr = RTDetrForObjectDetection(config)
        for m in detr.modules():
            if isinstance(m, nn.BatchNorm2d):  # transformers draws their scales around zero, which stops the maps
                m.reset_parameters()
        self.reductions = maps.reductions
        return detr

    def edges(self, x: Tensor, sizes: Tensor) -> Tensor:
        return sizes.new_tensor([x.shape[3], x.shape[2]]).expand(len(x), 2)

    def forward(self, x: Tensor, maps: Sequence[Tensor], targets: Sequence[Target] | None, boxes: float) -> Output:
        places = sum(math.prod(m.shape[2:]) for m in maps)
        # The queries are the best places of the maps; where there are fewer, topk fails without saying why.
        if places < self.queries:
            raise SchemeError(
                f"RTDETR: {self.queries} queries, and maps of {x.shape[2]}x{x.shape[3]} pixels have {places} places\n"
                f"  Give head.queries of up to {places}, larger pictures or finer maps"
            )
        # The encoder joins maps after doubling their sides, which fits only where no side was rounded.
        coarsest = self.reductions[-1]
        if x.shape[2] % coarsest or x.shape[3] % coarsest:
            raise SchemeError(
                f"RTDETR: a batch of {x.shape[2]}x{x.shape[3]} pixels; wanted multiples of {coarsest}\n"
                f"  Give data.multiple {coarsest}"
            )
        return super().forward(x, maps, targets, boxes)
