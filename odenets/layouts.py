"""Conversion of weights between key layouts: writes the published layouts that ``checkpoints.load`` reads."""

from collections.abc import Mapping
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from schemes.errors import SchemeError

from . import checkpoints


class Converted(NamedTuple):
    """Weights under other keys.

    Attributes:
        tensors: by their keys.
        layout: the layout of these keys, "own" for those of the library.
        left: keys of the layout that are not written, since the model has no such part (a head, for example).
    """

    tensors: dict[str, Tensor]
    layout: str
    left: tuple[str, ...] = ()


def to_own(model: nn.Module, source: Mapping[str, Any] | str | PathLike[str]) -> Converted:
    """Returns weights of any known layout under the keys of the library; loads them into the model.

    Args:
        model: the model; written only if everything fits.
        source: as in ``checkpoints.load``.

    Raises:
        SchemeError: as in ``checkpoints.load``; a layout that implies a number that no tensor holds and that a new
            model would not have.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> to_own(nn.Linear(1, 1), {"module.weight": torch.ones(1, 1), "module.bias": torch.ones(1)}).tensors.keys()
        dict_keys(['weight', 'bias'])
    """
    name = "state dict" if isinstance(source, Mapping) else str(source)
    found = checkpoints.matched(model, source if isinstance(source, Mapping) else checkpoints.read(source), name)
    # Of a new model, whatever was loaded into this one before.
    changed = {path: n for path, n in found.settings.items() if checkpoints.built_with(model, path) != n}
    if changed:
        _refuse(found.report.layout, changed)
    report = found.write()
    return Converted(dict(model.state_dict()), "own", report.dropped)


def to_layout(model: nn.Module, like: Mapping[str, Any] | str | PathLike[str]) -> Converted:
    """Returns a model's weights under the keys, and in the shapes, of a published file of the same model.

    Args:
        model: the model.
        like: the file, or its state dict; the values of its tensors are not read. The head may have another width.

    Raises:
        SchemeError: a layout that the model does not know, that is of another model, or that lacks some weights.

    Example:
        >>> from odenets import create_model
        >>> net = create_model("resnet20")
        >>> to_layout(net, net.state_dict())
        Traceback (most recent call last):
        ...
        schemes.errors.SchemeError: the state dict has the keys of ResNet itself; want a published file of another.
    """
    name = "the state dict" if isinstance(like, Mapping) else str(like)
    own = model.state_dict()
    state, known = checkpoints.published_keys(model, like, name)
    if known is None:
        what = f"the keys of {type(model).__name__} itself" if state.keys() == own.keys() else "keys of no known layout"
        raise SchemeError(f"{name} has {what}; want a published file of another.")
    found: dict[str, Tensor] = {}
    left: list[str] = []
    wrong: list[str] = []
    for key, value in state.items():
        target = known.names.get(key, key)
        if target is None:
            left.append(key)
        elif target not in own:
            wrong.append(f"{key} has no place")
        elif (shape := _shape(own[target], value, head=target.startswith("head."))) is None:
            wrong.append(f"{key} is {tuple(value.shape)}, here {tuple(own[target].shape)}")
        else:
            found[key] = own[target].detach().cpu().reshape(shape)
    named = set(known.names.values())
    # Old files lack BatchNorm's counter, which is dispensable; nothing else may be lost.
    wrong += [f"{key} is not in it" for key in own if key not in named and not key.endswith("num_batches_tracked")]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise SchemeError(
            f"{name} is of another model than this {type(model).__name__}: {'; '.join(wrong[:5])}{more}.\n"
            "  Give a file of the same model, which any published weights of it are."
        )
    numbers = _numbers(model)
    changed = {path: value for path, value in known.settings.items() if numbers.get(path) != value}
    if changed:
        _refuse(known.layout, changed)
    return Converted(found, known.layout, tuple(left))


def _shape(own: Tensor, like: Tensor, head: bool) -> torch.Size | None:
    """Returns the shape to write: that of the layout, whose matrices may be 1x1 convolutions; None if they differ."""
    # A matrix and a 1x1 convolution differ only in axes of length 1, and hold their numbers in the same order.
    sizes = [[n for n in t.shape if n != 1] for t in (own, like)]
    if sizes[0] == sizes[1]:
        return like.shape
    # Equal in all axes but the number of classes.
    if head and own.shape[1:] == like.shape[1:]:
        return own.shape
    return None


def _numbers(model: nn.Module) -> dict[str, float]:
    """Returns the epsilons of a model by path: numbers in which layouts differ without a tensor that shows it."""
    found = {f"{path}.eps": getattr(m, "eps", None) for path, m in model.named_modules()}
    return {path: value for path, value in found.items() if isinstance(value, float)}


def _refuse(layout: str, numbers: Mapping[str, float]) -> None:
    said = ", ".join(f"{path} = {value:g}" for path, value in numbers.items())
    raise SchemeError(
        f"the layout {layout} implies {said}, which a model has not by itself and no file of weights can hold.\n"
        "  Load the published file by odenets.checkpoints.load, which sets it."
    )
