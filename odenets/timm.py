"""Registers every model with timm: ``import odenets.timm`` adds ``timm.create_model("odenets_resnet50")``.

Names are those of ``odenets.list_models()``, prefixed by ``odenets_``. All that timm does with a model by name works:
``pretrained`` with a tag, ``features_only``, ``num_classes``, ``in_chans``, and what builds on it, such as the encoders
of segmentation_models_pytorch ("tu-odenets_resnet50").

Raises:
    ImportError: timm is not installed, or torchvision, which it imports, was built for another torch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from schemes import SchemeError

from .checkpoints import Renames, same_numbers, set_implied
from .messages import first_line
from .models.catalogue import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Weights,
    create_model,
    list_models,
    model_kind,
    model_options,
    published_weights,
)
from .models.conventions import Conventions
from .models.feature_info import chosen
from .models.feature_net import FeatureNet

try:
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
except ImportError as error:
    raise ImportError(f'odenets.timm needs timm ({error}): pip install "odenets[timm]"') from None
except RuntimeError as error:  # torchvision needs operators that another build of torch does not have
    raise ImportError(
        f"odenets.timm: timm imports torchvision, which does not fit this torch ({first_line(error)}).\n"
        "  Install the torchvision of this torch's release and build."
    ) from None

PREFIX = "odenets_"


def config(name: str, weights: Weights | None = None) -> dict[str, Any]:
    """Returns timm's configuration of a model: the size of its images, its classes, first convolution and head."""
    given = model_options(name)
    classes = weights.num_classes if weights else given.get("num_classes", 1000)
    side = given.get("size", 224 if classes >= 1000 else 32)
    kind = model_kind(name) or Conventions
    found = {
        "num_classes": classes,
        "input_size": (given.get("in_chans", 3), side, side),
        "mean": weights.mean if weights else IMAGENET_MEAN,
        "std": weights.std if weights else IMAGENET_STD,
        "first_conv": kind.first_conv,
        "classifier": kind.classifier,
    }
    return {**found, **({"url": weights.url} if weights else {})}


def renamed(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Returns published weights in the names and shapes of the model, on which it sets what their layout implies."""
    own = model.state_dict()
    known = model.key_map(state.keys()) if isinstance(model, Renames) and state.keys() != own.keys() else None
    if known is None:
        return state
    set_implied(model, known.settings)
    placed = {known.names.get(key, key): value for key, value in state.items()}
    # Layouts write a vector as (c, 1, 1), and a matrix as a 1x1 convolution.
    return {
        key: value.reshape(own[key].shape) if key in own and same_numbers(value.shape, own[key].shape) else value
        for key, value in placed.items()
        if key is not None
    }


def _maps(model: Any, out_indices: Sequence[int] | int | None = None) -> FeatureNet:
    """Returns a network that outputs feature maps: all, those in ``out_indices``, or so many of the last."""
    return FeatureNet(model, chosen(out_indices, len(model.feature_info)))


def _entry(name: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        # timm's name for our `size`.
        if "img_size" in kwargs and "size" in model_options(name):
            size = kwargs.pop("img_size")
            sides = (size,) if isinstance(size, int) else tuple(size)
            if len(set(sides)) != 1:
                raise SchemeError(
                    f"{PREFIX}{name}: img_size is {sides}, and positions are made for squares.\n"
                    "  Give one side; for pictures of other sizes the positions are interpolated."
                )
            kwargs["size"] = sides[0]
        return build_model_with_cfg(
            *(partial(create_model, name), PREFIX + name, pretrained),
            feature_cfg={"out_indices": None, "feature_cls": _maps},
            pretrained_filter_fn=renamed,
            **kwargs,
        )

    # register_model takes the model's name from the function.
    build.__name__ = build.__qualname__ = PREFIX + name
    build.__doc__ = f"odenets' {name}."
    return build


def _configs() -> dict[str, Any]:
    found = {}
    for name in list_models():
        for weights in published_weights(name) or (None,):
            tag = f".{weights.tag}" if weights else ""
            found[PREFIX + name + tag] = config(name, weights)
    return found


# register_model looks up this name in the function's module, so it must be set before the loop.
default_cfgs = generate_default_cfgs(_configs())

for _name in list_models():
    register_model(_entry(_name))
