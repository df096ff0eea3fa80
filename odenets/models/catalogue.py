"""Models by name: ``create_model("resnet50", num_classes=10)``, ``list_models("ho_*")``, and published weights."""

import fnmatch
import hashlib
import inspect
import re
import urllib.error
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, overload

import torch
from torch import nn

from schemes import SchemeError

from .. import checkpoints
from ..names import closest
from .conventions import Conventions
from .feature_net import FeatureNet

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Builder = Callable[..., nn.Module]


class OptionError(SchemeError, TypeError):
    """Raised for an option that a model does not have; also a TypeError, as for any wrong keyword in Python."""


class Weights(NamedTuple):
    """Published weights of a model: where to download them, how the file is verified, which pictures they expect.

    Attributes:
        tag: short name, as in ``pretrained="v1"``.
        url: address of the file.
        sha256: the first digits of the file's SHA-256, at least eight.
        top1: published accuracy in per cent.
        num_classes: width of the published head.
        mean: per channel, subtracted from pictures in [0, 1].
        std: per channel, by which they are then divided.
    """

    tag: str
    url: str
    sha256: str
    top1: float | None = None
    num_classes: int = 1000
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


class Registered(NamedTuple):
    """One registered model.

    Attributes:
        build: takes keyword arguments, returns the model.
        weights: published weights, the default first.
        kind: the class that a variant configures; None where a function builds the model.
        options: the options that the variant passes to the class.
    """

    build: Builder
    weights: tuple[Weights, ...]
    kind: type[nn.Module] | None = None
    options: Mapping[str, Any] = MappingProxyType({})


_MODELS: dict[str, Registered] = {}


@overload
def register_model(build: Builder, /) -> Builder: ...
@overload
def register_model(*, name: str | None = None, weights: Sequence[Weights] = ()) -> Callable[[Builder], Builder]: ...
def register_model(
    build: Builder | None = None, /, *, name: str | None = None, weights: Sequence[Weights] = ()
) -> Builder | Callable[[Builder], Builder]:
    """Registers a function that builds a model, for ``create_model``; a decorator, with or without options.

    Args:
        build: takes keyword arguments, returns the model.
        name: the model's name; defaults to the function's name.
        weights: published weights, the default first.

    Raises:
        SchemeError: the name is taken.

    Example:
        >>> from odenets.models import ResNet
        >>> @register_model
        ... def resnet_of_my_own(**kwargs):
        ...     return ResNet(**{"functions": (1, 1), "widths": (8, 16), "stem": "conv3", **kwargs})
        >>> create_model("resnet_of_my_own", num_classes=0).num_features
        16
    """

    def register(build: Builder) -> Builder:
        key = name or getattr(build, "__name__", "")
        if key in _MODELS:
            raise SchemeError(f"a model named {key!r} is registered already; choose another name.")
        _MODELS[key] = Registered(build, tuple(weights))
        return build

    return register if build is None else register(build)


def register_variants(
    kind: type[nn.Module],
    variants: Mapping[str, Mapping[str, Any]],
    weights: Mapping[str, Sequence[Weights]] | None = None,
) -> None:
    """Registers the named configurations of a class; keyword arguments of ``create_model`` override them.

    Args:
        kind: the class.
        variants: options by name.
        weights: published weights by name.

    Raises:
        SchemeError: a name is taken.
    """
    for name, config in variants.items():
        # Bound now, since the loop moves on to the next variant.
        def build(*, _config: Mapping[str, Any] = config, **kwargs: Any) -> nn.Module:
            return kind(**{**_config, **kwargs})

        build.__name__ = build.__qualname__ = name
        build.__module__ = kind.__module__
        build.__doc__ = f"{kind.__name__} with {dict(config)}; keyword arguments override."
        register_model(name=name, weights=(weights or {}).get(name, ()))(build)
        _MODELS[name] = _MODELS[name]._replace(kind=kind, options=config)


def torchvision_weights(name: str, tag: str, sha256: str, top1: float) -> Weights:
    """Returns weights that torchvision publishes: the file's name ends in the first eight digits of its SHA-256.

    Accuracies are those of torchvision's model page.

    Example:
        >>> torchvision_weights("resnet18", "v1", "f37072fd", 69.758).url
        'https://download.pytorch.org/models/resnet18-f37072fd.pth'
    """
    return Weights(tag, f"https://download.pytorch.org/models/{name}-{sha256}.pth", sha256, top1)


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """Returns the names of the registered models, numbers in their natural order.

    Args:
        pattern: a pattern with shell wildcards.
        pretrained: only those with published weights.

    Example:
        >>> list_models("resnet?4*")
        ['resnet34', 'resnet44']
    """
    found = [n for n, e in _MODELS.items() if fnmatch.fnmatchcase(n, pattern) and (e.weights or not pretrained)]
    # Numbers as numbers: resnet18 before resnet152.
    return sorted(found, key=lambda n: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", n)])


def published_weights(name: str) -> tuple[Weights, ...]:
    """Returns the published weights of a registered model, the default first; empty where none are known.

    Args:
        name: the model's name.

    Example:
        >>> [w.tag for w in published_weights("resnet50")]
        ['v2', 'v1']
    """
    return _registered(name).weights


def weights_file(name: str, tag: bool | str = True) -> Path:
    """Returns the file of published weights, downloaded once into torch.hub's folder and checked by hash.

    Args:
        name: the model's name.
        tag: the weights' tag; True takes the default.

    Raises:
        SchemeError: an unknown name or tag, or a file that cannot be downloaded, or has another hash.
    """
    return _download(name, _choose(name, _registered(name), tag))


def model_kind(name: str) -> type[Conventions] | None:
    """Returns the class of a registered model; None where a function builds it, or the class is not ours.

    Raises:
        SchemeError: an unknown name.
    """
    kind = _registered(name).kind
    return kind if kind is not None and issubclass(kind, Conventions) else None


def variant(name: str) -> dict[str, Any]:
    """Returns the options that a registered model passes to its class; empty where a function builds it.

    Raises:
        SchemeError: an unknown name.

    Example:
        >>> variant("vit_tiny_patch16")
        {'depth': 12, 'dim': 192, 'heads': 3}
    """
    return dict(_registered(name).options)


def model_options(name: str) -> dict[str, Any]:
    """Returns the options of a registered model and their values; empty where a function builds it.

    Raises:
        SchemeError: an unknown name.

    Example:
        >>> model_options("resnet20")["num_classes"], model_options("vit_tiny_patch16")["size"]
        (10, 224)
    """
    entry = _registered(name)
    if entry.kind is None:
        return {}
    defaults = {k: p.default for k, p in inspect.signature(entry.kind).parameters.items()}
    return {**defaults, **entry.options}


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    scheme: str | Sequence[str] | None = None,
    drop_rate: float | None = None,
    drop_path_rate: float | None = None,
    global_pool: str | None = None,
    pretrained: bool | str = False,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Builds a registered model; options that are left out keep the model's defaults.

    Args:
        name: one of ``list_models()``.
        num_classes: width of the head; 0 returns pooled features, or with ``global_pool=""`` the map.
        in_chans: channels of the picture.
        scheme: a scheme for all levels, or one per level.
        drop_rate: dropout rate before the head.
        drop_path_rate: stochastic depth, growing over the depth to this rate.
        global_pool: "avg", "max" or "".
        pretrained: True or a tag such as "v1" loads published weights, downloaded once into torch.hub's folder and
            checked by hash; the head is replaced where ``num_classes`` is another width.
        features_only: returns a ``FeatureNet``, whose output is the list of the levels' maps.
        out_indices: which maps; None means one per resolution.
        kwargs: passed to the model.

    Raises:
        OptionError: an option that the model does not have; the closest are named.
        SchemeError: an unknown name (the closest are named), a wrong value, or weights that are not published, cannot
            be downloaded, or have another hash.

    Example:
        >>> import torch
        >>> net = create_model("ho_resnet26", scheme="midpoint", num_classes=100)
        >>> net(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 100])
    """
    entry = _registered(name)
    options = {
        "num_classes": num_classes,
        "in_chans": in_chans,
        "scheme": scheme,
        "drop_rate": drop_rate,
        "drop_path_rate": drop_path_rate,
        "global_pool": global_pool,
    }
    # Options that were left out are not passed on, so that each model keeps its own default.
    kwargs |= {key: value for key, value in options.items() if value is not None}
    _check_options(name, entry, kwargs)
    if not features_only:
        if out_indices is not None:
            raise SchemeError("out_indices chooses among the maps of features_only=True; set both.")
        return _build(name, entry, pretrained, kwargs)
    return FeatureNet(_build(name, entry, pretrained, kwargs), out_indices)


def _build(name: str, entry: Registered, pretrained: bool | str, kwargs: dict[str, Any]) -> nn.Module:
    if not pretrained:
        return entry.build(**kwargs)
    weights = _choose(name, entry, pretrained)
    # Before anything is downloaded.
    if kwargs.get("in_chans", 3) != len(weights.mean):
        raise SchemeError(
            f"the published weights of {name} take {len(weights.mean)} channels, not {kwargs['in_chans']}; "
            "repeat or mix the picture's channels."
        )
    classes, pool = kwargs.pop("num_classes", weights.num_classes), kwargs.get("global_pool")
    if pool == "":
        # The published head needs a pooling, which leaves with it.
        kwargs.pop("global_pool")
    # Built with the published head, so that every key matches; the requested head replaces it afterwards.
    model = entry.build(**kwargs, num_classes=weights.num_classes)
    checkpoints.load(model, _download(name, weights))
    if classes != weights.num_classes or pool == "":
        model.reset_classifier(classes, pool)  # type: ignore[operator]
    return model


def _check_options(name: str, entry: Registered, given: Mapping[str, Any]) -> None:
    """Rejects options that the model does not have, where its signature lists them."""
    parameters = inspect.signature(entry.kind or entry.build).parameters
    # A function that takes any keyword may pass it on to anything; the call itself will reject a wrong one.
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    wrong = [key for key in given if key not in parameters]
    if not wrong:
        return
    known = [*parameters, "pretrained", "features_only", "out_indices"]  # the last three are create_model's own
    close = closest(wrong[0], known)
    hint = f"Closest: {', '.join(close)}." if close else f"It has {', '.join(known)}."
    raise OptionError(f"{name} has no option {wrong[0]!r}\n  {hint}")


def _registered(name: str) -> Registered:
    if name not in _MODELS:
        close = closest(name, _MODELS)
        hint = f"; closest: {', '.join(close)}" if close else ""
        raise SchemeError(
            f"there is no model named {name!r}{hint}.\n"
            "  See all names: list_models() in Python, odenets models on a command line."
        )
    return _MODELS[name]


def _choose(name: str, entry: Registered, pretrained: bool | str) -> Weights:
    if not entry.weights:
        raise SchemeError(
            f"no published weights are known for {name}; those of {', '.join(list_models(pretrained=True))} are.\n"
            "  Weights of your own: odenets.checkpoints.load(model, path)."
        )
    if pretrained is True:
        return entry.weights[0]
    for weights in entry.weights:
        if weights.tag == pretrained:
            return weights
    tags = ", ".join(repr(w.tag) for w in entry.weights)
    raise SchemeError(f"{name} has no weights tagged {pretrained!r}; want True or one of {tags}.")


def _download(name: str, weights: Weights) -> Path:
    """Returns the file of published weights in torch.hub's folder, downloaded if missing, and checked."""
    # torchvision keeps the same files there under the same names, so none is downloaded twice.
    path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    by_hand = f"fetch it by hand and use odenets.checkpoints.load(create_model({name!r}), path)"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(weights.url, str(path), hash_prefix=weights.sha256)
        except (urllib.error.URLError, OSError) as error:
            raise SchemeError(
                f"the weights of {name} cannot be had from {weights.url} ({error});\n  {by_hand}."
            ) from None
        except RuntimeError as error:  # the hash differs; torch.hub has removed what it got
            raise SchemeError(f"{weights.url} is not the published file: {error}.") from None
    with path.open("rb") as file:
        # Also of a file that was already there: it may have been replaced by another.
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(weights.sha256):
        raise SchemeError(
            f"{path} is not the published file: its SHA-256 begins with {digest[: len(weights.sha256)]}, want "
            f"{weights.sha256}.\n  Delete it, and it will be fetched again."
        )
    return path
