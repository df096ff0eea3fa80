"""The models for transformers: a configuration, a backbone, an image classifier and an image processor.

``import odenets.hf`` registers them, so that ``AutoConfig``, ``AutoBackbone``, ``AutoModelForImageClassification``,
``AutoImageProcessor`` and ``pipeline("image-classification")`` load folders written by ``save_pretrained``. A folder
holds config.json, model.safetensors, preprocessor_config.json and README.md, a model card.

Raises:
    ImportError: transformers is not installed.
"""

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from schemes.errors import MixingWarning, SchemeError

from . import checkpoints
from .continuous import ContinuousWeights, expected_shapes
from .knots import KNOTS, alike, read_knots
from .models.catalogue import IMAGENET_MEAN, IMAGENET_STD, create_model, model_options
from .models.conventions import Conventions
from .models.keys.layout import places_of, twin

try:
    import numpy as np
    from PIL import Image
    from safetensors import safe_open
    from transformers import (
        AutoBackbone,
        AutoConfig,
        AutoImageProcessor,
        AutoModelForImageClassification,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
    from transformers.image_processing_backends import PilBackend
    from transformers.image_utils import PILImageResampling
    from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutputWithNoAttention
except ImportError as error:
    raise ImportError(f'odenets.hf needs transformers 5 ({error}): pip install "odenets[hf]"') from None

NETWORK = ("name", "options", "scheme", "num_channels")  # values of a configuration that determine its maps
NET = "net."  # of the keys of the network, in a file of a model
CARD = """---
library_name: transformers
pipeline_tag: image-classification
tags: [odenets]
---

# {name}

A network of the library odenets: `{name}`{under}, {parameters:,} parameters, {labels} classes, pictures of
{size} x {size} pixels.

```python
import odenets.hf  # registers the model
from transformers import pipeline

classify = pipeline("image-classification", model="path or name of this repository")
```
"""


class OdenetsConfig(BackboneConfigMixin, PreTrainedConfig):
    """The settings that rebuild a model, and the images that it expects.

    Args:
        name: one of ``odenets.list_models()``.
        options: keyword arguments of ``create_model`` that differ from its own, such as widths; plain values; those
            that have names of their own here are refused.
        scheme: a scheme for all levels, or one per level; None takes the model's own.
        backprop: as in ``Stack``; None takes the model's own.
        num_channels: channels of the images.
        image_size: side of the images in evaluation; None is the model's ``size``, else 224, or 32 for models of small
            images.
        crop_pct: side of the centre crop, over the shorter side of the resized image.
        image_mean: per channel, subtracted from images in [0, 1]; None is ImageNet's, or for other numbers of channels
            the mean of its three.
        image_std: per channel, by which images are then divided; None as for the mean.
        channels_of_maps: widths of the feature maps; computed if None, and saved.
        kwargs: as in transformers' ``PreTrainedConfig``: ``num_labels``, ``id2label``, ``out_features``,
            ``out_indices``. The number of labels is the model's own unless it is given.

    Raises:
        SchemeError: options that have another name here, or two values of one.

    Example:
        >>> config = OdenetsConfig(name="resnet20", backprop="checkpoint", out_features=["stage1", "stage3"])
        >>> config.num_labels, config.stage_names, config.out_indices
        (10, ['stem', 'stage1', 'stage2', 'stage3'], [1, 3])
    """

    model_type = "odenets"

    name: str = "convnext_tiny"
    options: dict[str, Any] | None = None
    scheme: str | list[str] | None = None
    backprop: str | None = None
    num_channels: int = 3
    image_size: int | None = None
    crop_pct: float = 0.875
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    channels_of_maps: list[int] | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.options = dict(self.options or {})
        own = {**model_options(self.name), **self.options}
        self._check()
        if kwargs.get("num_labels") is None:
            # transformers creates names for the labels right away, and None is not a number of them.
            kwargs.pop("num_labels", None)
            if self.id2label is None:
                kwargs["num_labels"] = own.get("num_classes", 1000)
        if self.image_size is None:
            self.image_size = _side(self.name, self.options)
        if self.channels_of_maps is None:
            # On the meta device no weights are drawn. The widths are saved, so that this happens only once.
            with torch.device("meta"), _no_mixing():
                self.channels_of_maps = self.build(0).feature_info.channels()
        count = len(self.channels_of_maps or ())
        self.stage_names = ["stem", *(f"stage{i + 1}" for i in range(count))]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', where given values replace those of the dictionary, and so does what follows from them.

        Args:
            config_dict: the configuration, as ``to_dict`` returns it.
            kwargs: values that replace those of the dictionary.
        """
        beside = ("backprop", "image_size", "channels_of_maps", *NETWORK)
        given = {key: kwargs.pop(key) for key in beside if key in kwargs}
        held = {**config_dict, **given}
        if "options" not in given and held.get("options"):
            # What is asked for replaces what the options hold, which would be a second source.
            asked = {key for key in ("scheme", "backprop") if given.get(key) is not None}
            held["options"] = {key: value for key, value in held["options"].items() if key not in asked}
        name = config_dict.get("name", cls.name)
        if any(held.get(key) != config_dict.get(key) for key in NETWORK):
            # transformers would set them after these numbers, of the network that was saved, were taken over.
            if held.get("channels_of_maps") == config_dict.get("channels_of_maps"):
                held.pop("channels_of_maps", None)
            if "image_size" not in given and held.get("image_size") == _side(name, config_dict.get("options")):
                held.pop("image_size", None)
        return super().from_dict(held, **kwargs)

    def _check(self) -> None:
        """Refuses options that have names of their own here, and two values of one."""
        options = self.options or {}
        for key, own in (("num_classes", "num_labels"), ("in_chans", "num_channels")):
            if key in options:
                raise SchemeError(
                    f"OdenetsConfig: options hold {key}={options[key]!r}, which is {own} here.\n"
                    f"  Give {own}={options[key]!r} beside the options."
                )
        for key, own in (("scheme", "scheme"), ("backprop", "backprop"), ("size", "image_size")):
            value = getattr(self, own)
            if key in options and value is not None and value != options[key]:
                raise SchemeError(
                    f"OdenetsConfig: {own} is {value!r}, and options hold {key}={options[key]!r}.\n"
                    "  Give one of the two."
                )

    def build(self, num_classes: int) -> Any:
        """Builds the model.

        Args:
            num_classes: outputs of the head; 0: no head.
        """
        self._check()
        given = {"scheme": self.scheme, "backprop": self.backprop}
        given = {k: v for k, v in given.items() if v is not None}
        net = create_model(
            self.name, num_classes=num_classes, in_chans=self.num_channels, **{**(self.options or {}), **given}
        )
        if not isinstance(net, Conventions):
            raise SchemeError(f"{self.name}: a {type(net).__name__} has no maps and features; want a HeadNet.")
        return net


def _side(name: str, options: dict[str, Any] | None) -> int:
    """Returns the side of the pictures that a model is made for."""
    own = {**model_options(name), **(options or {})}
    return own.get("size", 224 if own.get("num_classes", 1000) >= 1000 else 32)


@contextmanager
def _no_mixing() -> Iterator[None]:
    """Within it, schemes of high mixing cause no warning, since the build of the model itself gives one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MixingWarning)
        yield


def _tensors(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the parameters and the buffers of a network, by name."""
    yield from net.named_parameters()
    yield from net.named_buffers()


def _names(net: nn.Module, keys: Collection[str]) -> dict[str, str]:
    """Returns the names in this network of a file's keys, which differ where its scheme makes other steps.

    Raises:
        SchemeError: a level has other functions than the file's, in other steps: none would be in its place.
    """
    bare = {key: key.removeprefix(NET) for key in keys}
    own = net.state_dict().keys()
    places, given = places_of(own), places_of(bare.values())
    for level in places.keys() & given.keys():
        here, there = places[level], given[level]
        if len(here) != len(there) and any(a != b for a, b in zip(here, there, strict=False)):
            raise SchemeError(
                f"level {level + 1} of the file has {len(there)} residual functions, here {len(here)} in other steps; "
                "nothing was loaded.\n  Build it with as many functions, or under the scheme of the file."
            )
    known = twin(own, list(bare.values()))
    # A head that this network does not have keeps its name, under which transformers leaves it out.
    renamed = {} if known is None else {key: known.names[b] or b for key, b in bare.items()}
    return {key: NET + name if key.startswith(NET) else name for key, name in renamed.items()}


def _take_knots(net: nn.Module, held: dict[str, Tensor]) -> None:
    """Moves the knots of fields out of a state dict into the fields, which get as many coefficients as it holds.

    Raises:
        SchemeError: they are functions on another span.
    """
    bare = {key.removeprefix(NET): value for key, value in held.items()}
    expected_shapes(net, bare, net.state_dict())
    for name, field in net.named_modules():
        if isinstance(field, ContinuousWeights) and (given := bare.get(f"{name}.{KNOTS}")) is not None:
            _, space = read_knots(given, field.span)
            if not alike(space, field.space):
                # Only the shapes: the values are those of the file.
                field.change(space, torch.zeros(space.count, field.space.count))
            held.pop(f"{NET}{name}.{KNOTS}", None)
            held.pop(f"{name}.{KNOTS}", None)


def _keys(files: Sequence[str]) -> list[str]:
    """Returns the keys in weight files, without reading the tensors of a safetensors file."""
    found: list[str] = []
    for file in files:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as held:
                found += held.keys()
        else:
            found += checkpoints.read(file)
    return found


class OdenetsPreTrainedModel(PreTrainedModel):
    """Base of the backbone and the classifier: one network, ``net``, whose keys are those of the library.

    Args:
        config: the model's configuration.
        num_classes: outputs of the head; 0: no head.
    """

    config_class = OdenetsConfig
    base_model_prefix = "net"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    input_modalities = ["image"]  # noqa: RUF012

    def __init__(self, config: OdenetsConfig, num_classes: int):
        super().__init__(config)
        self.net = config.build(num_classes)
        self._new: dict[str, Tensor] = {}
        for _, t in _tensors(self.net):
            if not t.is_meta:  # it has its value, which transformers must not draw again
                t._is_hf_initialized = True  # type: ignore[attr-defined]

    def _init_weights(self, module: nn.Module) -> None:
        """Initialises weights and buffers that no file held, as the library does in a new network."""
        held = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        own = {id(t) for t in held if not getattr(t, "_is_hf_initialized", False)}
        places = {key: t for key, t in _tensors(self.net) if id(t) in own}
        if not places:
            return
        if not self._new:  # once for all modules with missing weights
            # transformers may have set the meta device, on which no numbers can be drawn.
            with _no_mixing(), torch.device("cpu"):
                self._new.update(_tensors(self.config.build(self.net.num_classes)))  # type: ignore[union-attr]
        with torch.no_grad():
            for key, t in places.items():
                t.copy_(self._new[key])

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: dict[str, Tensor] | None, checkpoint_files: list[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Loads as transformers does; each residual function to its place under the scheme of this network.

        Raises:
            SchemeError: functions or learned step sizes that have no place here, or fields on another span.
        """
        files = checkpoint_files or [] if state_dict is None else []
        names = _names(model.net, _keys(files) if state_dict is None else state_dict)
        # Knots are neither parameters nor buffers, which is all that transformers looks for.
        knots = {f"{NET}{name}.{KNOTS}" for name, m in model.net.named_modules() if isinstance(m, ContinuousWeights)}
        if knots or any(key != name for key, name in names.items()):
            held = (
                state_dict if state_dict is not None else {k: v for f in files for k, v in checkpoints.read(f).items()}
            )
            state_dict = {names.get(key, key): value for key, value in held.items()}
            _take_knots(model.net, state_dict)
        info, *rest = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)
        info.missing_keys -= knots
        return info, *rest

    def _initialize_missing_keys(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._initialize_missing_keys(*args, **kwargs)
        finally:
            # The spare network is as large as the model, and no longer needed.
            self._new.clear()

    def _asked(self, output_hidden_states: bool | None, return_dict: bool | None) -> tuple[bool, bool]:
        """Returns what a call asks for, and where it says nothing, the configuration."""
        given = ((output_hidden_states, "output_hidden_states", False), (return_dict, "return_dict", True))
        hidden, whole = (getattr(self.config, key, usual) if asked is None else asked for asked, key, usual in given)
        return bool(hidden), bool(whole)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None, **kwargs: Any) -> None:
        """Makes the stacks that store keep one state per step instead."""
        self.net.set_grad_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Makes these stacks store again."""
        self.net.set_grad_checkpointing(False)

    activation_checkpointing_enable = gradient_checkpointing_enable  # type: ignore[assignment]
    activation_checkpointing_disable = gradient_checkpointing_disable

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Saves as transformers does, and adds a model card and the image processor's configuration if missing.

        Args:
            save_directory: the folder.
            args: as in transformers.
            kwargs: as in transformers.

        Raises:
            SchemeError: a number that the weights imply would be lost, as in ``odenets.checkpoints.save``.
        """
        checkpoints.check_saved(self)
        super().save_pretrained(save_directory, *args, **kwargs)
        folder, config = Path(save_directory), self.config
        if not (folder / "preprocessor_config.json").exists():
            OdenetsImageProcessor.of(config).save_pretrained(folder)  # type: ignore[arg-type]
        # A Trainer saves many times, and must not overwrite an edited card.
        if not (folder / "README.md").exists():
            (folder / "README.md").write_text(
                CARD.format(
                    name=config.name,
                    under=f" under the scheme `{config.scheme}`" if config.scheme else "",
                    parameters=sum(p.numel() for p in self.parameters()),
                    labels=config.num_labels,
                    size=config.image_size,
                ),
                encoding="utf-8",
            )


class OdenetsForImageClassification(OdenetsPreTrainedModel):
    """A network with its head.

    Args:
        config: the model's configuration; ``num_labels`` is the number of its classes.

    Shapes:
        pixel_values: (n, c, h, w); labels: (n,); logits: (n, num_labels).

    Example:
        >>> import torch
        >>> net = OdenetsForImageClassification(OdenetsConfig(name="resnet20"))
        >>> out = net(torch.randn(2, 3, 32, 32), labels=torch.tensor([0, 1]))
        >>> out.logits.shape, out.loss.shape
        (torch.Size([2, 10]), torch.Size([]))
    """

    # forward takes any keyword, from which the Trainer would infer that the loss divides by its count of items; it
    # would then not average over accumulated batches.
    accepts_loss_kwargs = False

    def __init__(self, config: OdenetsConfig):
        super().__init__(config, config.num_labels or 0)
        self.num_labels = config.num_labels
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Returns logits, the loss if there are labels, and the maps if hidden states are requested.

        Args:
            pixel_values: the images.
            labels: their classes.
            output_hidden_states: whether to return the maps too; None takes the configuration's.
            return_dict: False returns a tuple; None takes the configuration's.
            kwargs: arguments that transformers adds and an image network does not use.
        """
        output_hidden_states, return_dict = self._asked(output_hidden_states, return_dict)
        maps = None
        if output_hidden_states:
            features, maps = self.net.forward_intermediates(pixel_values)
        else:
            features = self.net.forward_features(pixel_values)
        logits = self.net.forward_head(features)
        loss = None if labels is None else self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        found = ImageClassifierOutputWithNoAttention(
            loss=loss, logits=logits, hidden_states=None if maps is None else tuple(maps)
        )
        return found if return_dict else found.to_tuple()


class OdenetsBackbone(BackboneMixin, OdenetsPreTrainedModel):  # type: ignore[misc]
    """A network that returns feature maps: ``stage1`` is the finest. "stem" names what comes before, and has no map.

    Detectors and segmenters of transformers take it by ``backbone_config=OdenetsConfig(...)``.

    Args:
        config: the model's configuration.

    Shapes:
        pixel_values: (n, c, h, w); feature_maps: (n, channels[i], h / reduction, w / reduction) each.

    Raises:
        SchemeError: the stem is requested.

    Example:
        >>> import torch
        >>> net = OdenetsBackbone(OdenetsConfig(name="resnet20", out_features=["stage1", "stage3"]))
        >>> net.channels, [tuple(m.shape[1:]) for m in net(torch.randn(1, 3, 32, 32)).feature_maps]
        ([16, 64], [(16, 32, 32), (64, 8, 8)])
    """

    has_attentions = False
    # A classifier's file holds its head, which a backbone does not use.
    _keys_to_ignore_on_load_unexpected = [r"^net\.head"]  # noqa: RUF012

    def __init__(self, config: OdenetsConfig):
        super().__init__(config, 0)
        # transformers counts the stem as stage 0, and numbers below 0 from the end.
        rows = [config.stage_names.index(name) - 1 for name in config.out_features or ()]
        if min(rows) < 0:
            raise SchemeError(f"{config.name}: the stem gives no map; want of {', '.join(config.stage_names[1:])}.")
        # One width per stage name; that of the stem, which has no map, is never read.
        self.num_features = [config.channels_of_maps[0], *config.channels_of_maps]  # type: ignore[index, misc]
        # Levels after the last requested map would be computed in vain, and get no gradient.
        self.rows = self.net.prune_intermediate_layers(rows, prune_norm=True)
        self.post_init()

    def forward(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Returns the maps of the requested stages.

        Args:
            pixel_values: the images.
            output_hidden_states: whether to return the maps of all stages up to the last requested one too; None
                takes the configuration's.
            return_dict: False returns a tuple; None takes the configuration's.
            kwargs: arguments that transformers adds and an image network does not use.
        """
        output_hidden_states, return_dict = self._asked(output_hidden_states, return_dict)
        every = self.net.forward_intermediates(pixel_values, intermediates_only=True)
        hidden = tuple(every) if output_hidden_states else None
        found = BackboneOutput(feature_maps=tuple(every[i] for i in self.rows), hidden_states=hidden)
        return found if return_dict else found.to_tuple()


def _per_channel(name: str, given: list[float] | None, usual: Sequence[float], channels: int) -> list[float]:
    """Returns one number per channel: those given, else ImageNet's, or their mean for other numbers of channels."""
    if given is None:
        return list(usual) if channels == len(usual) else [sum(usual) / len(usual)] * channels
    if len(given) != channels:
        raise SchemeError(
            f"OdenetsConfig: {name} has {len(given)} numbers for {channels} channels.\n  Give one per channel."
        )
    return list(given)


class OdenetsImageProcessor(PilBackend):
    """Preprocesses images for evaluation: colours of the model, shorter side, middle, then mean and deviation.

    Example:
        >>> from PIL import Image
        >>> processor = OdenetsImageProcessor.of(OdenetsConfig(name="resnet20"))
        >>> processor(Image.new("RGB", (50, 40)), return_tensors="pt")["pixel_values"].shape
        torch.Size([1, 3, 32, 32])
    """

    resample = PILImageResampling.BICUBIC
    image_mean = list(IMAGENET_MEAN)  # noqa: RUF012
    image_std = list(IMAGENET_STD)  # noqa: RUF012
    size = {"shortest_edge": 256}  # noqa: RUF012  transformers reads the class
    default_to_square = False
    crop_size = {"height": 224, "width": 224}  # noqa: RUF012
    do_resize = do_center_crop = do_rescale = do_normalize = do_convert_rgb = True

    @classmethod
    def of(cls, config: OdenetsConfig) -> "OdenetsImageProcessor":
        """Returns the processor of a model's images.

        Args:
            config: the model's configuration.

        Raises:
            SchemeError: a mean or a standard deviation of another number of channels.
        """
        side = int(config.image_size or 224)
        return cls(
            size={"shortest_edge": round(side / config.crop_pct)},
            crop_size={"height": side, "width": side},
            image_mean=_per_channel("image_mean", config.image_mean, IMAGENET_MEAN, config.num_channels),
            image_std=_per_channel("image_std", config.image_std, IMAGENET_STD, config.num_channels),
            do_convert_rgb=config.num_channels in (1, 3),
        )

    def convert_to_rgb(self, image: Any, input_data_format: Any = None) -> Any:
        """Converts an image to the colours of the model: RGB, or grey if it has one channel.

        Args:
            image: the image; arrays are grey already.
            input_data_format: as in transformers.
        """
        if len(self.image_mean) != 1:
            return super().convert_to_rgb(image, input_data_format=input_data_format)
        if not isinstance(image, Image.Image):
            return image
        # By way of RGB, where transparency becomes white; grey stays the same number.
        rgb = super().convert_to_rgb(image)  # type: ignore[arg-type]
        return np.asarray(Image.fromarray(rgb).convert("L"))


_from_hub = AutoBackbone.from_pretrained


def _backbone_of(name: Any, *args: Any, **kwargs: Any) -> Any:
    """As transformers' own, which queries the Hub before it looks for a folder; our folders need no network access."""
    folder = Path(str(name))
    if (folder / "config.json").is_file():
        config = PreTrainedConfig.get_config_dict(folder)[0]
        if config.get("model_type") == OdenetsConfig.model_type:
            # Meant for AutoBackbone, which removes it too: it is not an option of a model.
            kwargs.pop("use_timm_backbone", None)
            return OdenetsBackbone.from_pretrained(name, *args, **kwargs)
    return _from_hub(name, *args, **kwargs)


# Only for folders of these models; all other calls of AutoBackbone go to the original.
AutoBackbone.from_pretrained = _backbone_of  # type: ignore[method-assign]
AutoConfig.register("odenets", OdenetsConfig)
AutoBackbone.register(OdenetsConfig, OdenetsBackbone)
AutoModelForImageClassification.register(OdenetsConfig, OdenetsForImageClassification)
AutoImageProcessor.register(OdenetsConfig, image_processor_classes={"pil": OdenetsImageProcessor})
