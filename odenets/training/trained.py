"""A trained network from a checkpoint, with all that it needs to classify pictures: its classes, and its view of them.

Three kinds of checkpoints are distinguished. One that was trained from a configuration describes its net, and is
opened. One whose net was built in Python does not, and is refused with that reason. One whose net is from another
package would import code that is named by a file, and is refused too: only the user's configuration may do that.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor, nn

from schemes import SchemeError

from .. import checkpoints
from .data import Pictures
from .files import CheckpointError, open_checkpoint
from .resume import KEY
from .sources import DataError
from .steps import as_trained
from .steps import move_steps as move_steps
from .view import View

OURS = ("odenets.", "torch.nn.")


@dataclass
class Trained:
    """A network in evaluation mode, on its device.

    Attributes:
        path: The checkpoint.
        net: Maps pictures (n, c, h, w) to logits (n, classes).
        classes: The names of the classes, in order.
        view: How a picture is presented to it.
        data: Configuration of the data that it was trained on: class_path, init_args; None if it is not known.
        step: Optimiser steps that it was trained for.
        others: Mask (classes,) of the classes that it never predicts; None: it chooses among all.
    """

    path: Path
    net: nn.Module
    classes: list[str]
    view: View
    data: Mapping[str, Any] | None
    step: int
    others: Tensor | None = None

    @torch.inference_mode()
    def probabilities(self, x: Tensor) -> Tensor:
        """Returns the probability of each class (n, classes), in float32, on the CPU.

        Args:
            x: Pictures (n, channels, height, width), uint8, or floats in [0, 1].

        Raises:
            SchemeError: The network returns numbers that are not finite.
        """
        return self.logits(x.to(next(self.net.parameters()).device)).softmax(1).cpu()

    def logits(self, x: Tensor) -> Tensor:
        """Returns the logits (n, classes), in float32, with a graph if one is being recorded; -inf for ``others``.

        Args:
            x: Pictures on the network's device, as ``probabilities`` takes them.

        Raises:
            SchemeError: They are not finite.
        """
        logits = self.net(self.view.normalize(x)).float()
        if not bool(logits.isfinite().all()):
            raise SchemeError(
                f"{self.path} gives logits that are not finite\n  Its training diverged: take an earlier checkpoint."
            )
        # Before any softmax: the other classes may have so much of it that nothing is left to share out.
        return logits if self.others is None else logits.masked_fill(self.others.to(logits.device), -torch.inf)


def open_trained(path: str | PathLike[str], device: str | torch.device = "cpu") -> Trained:
    """Opens a checkpoint of `lightning fit` as a network that classifies pictures.

    Averaged weights are used if Lightning's callbacks saved them in place of the raw ones. Steps and schemes that
    callbacks have changed in training are those of the time when the checkpoint was written.

    Args:
        path: The file.
        device: Of the network.

    Raises:
        CheckpointError: The checkpoint is damaged, or lacks what predicting needs.
        SchemeError: Weights that do not fit the network.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: there is no such file\n  Give a checkpoint of a run: --ckpt_path RUN/checkpoints/best.ckpt"
        )
    found = open_checkpoint(path, resume=False)
    held = found.held
    net = build_net(path, held)
    picture = _of_data(path, held)
    view, classes = View(**picture["picture"]), [str(name) for name in picture["classes"]]
    weights = {k.removeprefix("net."): v for k, v in held["state_dict"].items() if k.startswith("net.")}
    checkpoints.load(net, weights)
    net = as_trained(net, held)
    config = held.get(KEY, {}).get("config") or {}
    return Trained(path, net.eval().to(device), classes, view, config.get("data"), found.step)


def build_net(path: Path, held: Mapping[str, Any]) -> nn.Module:
    """Builds the untrained network of a checkpoint, from the class and the arguments that it holds.

    Args:
        path: of the checkpoint, for messages.
        held: its contents.

    Raises:
        CheckpointError: It holds no class, or one of another package.
    """
    spec = dict(held.get("hyper_parameters", {})).get("net")
    if not isinstance(spec, Mapping) or "class_path" not in spec:
        raise CheckpointError(
            f"{path} was written by a module that was built in Python, and does not hold its net\n"
            "  Load it in Python: Classifier.load_from_checkpoint(path, net=..., optimizer=...)"
        )
    return _built(path, "net", nn.Module, spec)


def build_data(trained: Trained, change: Mapping[str, Any] = {}) -> Pictures:
    """Builds the data that a network was trained on, from the configuration in its checkpoint, without downloading.

    Args:
        trained: The network.
        change: Options that differ from the configuration.

    Raises:
        CheckpointError: The checkpoint does not describe its data, or they cannot be built here, or are not pictures.
        DataError: The data no longer exist, or have no such option.
    """
    if not trained.data:
        raise CheckpointError(f"{trained.path} does not say what it was trained on\n  Name a folder of pictures")
    spec = {**trained.data, "init_args": {**trained.data.get("init_args", {}), **change}}
    # Evaluating a checkpoint does not permit a download.
    if "download" in spec["init_args"]:
        spec["init_args"]["download"] = False
    try:
        data = _built(trained.path, "data", L.LightningDataModule, spec)
    except CheckpointError as e:
        refused = next((option for option in change if f"Option '{option}' is not accepted" in str(e)), None)
        if refused is None:
            raise
        raise DataError(f"{spec['class_path']} has one {refused}\n  Name a FOLDER of pictures") from None
    if not isinstance(data, Pictures):
        raise CheckpointError(f"{trained.path} was trained on {spec['class_path']}, which has no labelled pictures")
    return data


def foreign_class(spec: Any) -> str | None:
    """Returns a class of another package that a configuration names, which a file must not cause to be imported.

    Args:
        spec: a part of a configuration.
    """
    return next((name for name in _class_paths(spec) if not name.startswith(OURS)), None)


def _built(path: Path, what: str, kind: type, spec: Mapping[str, Any]) -> Any:
    if foreign := foreign_class(spec):
        raise CheckpointError(
            f"{path}: its {what} is built by {foreign}, and a file does not decide what code is imported\n"
            "  Give the configuration that it was trained with: -c RUN/config.yaml"
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, what)
    try:
        return parser.instantiate_classes(parser.parse_object({what: dict(spec)}))[what]
    except (ArgumentError, TypeError, ValueError) as e:
        # jsonargparse wraps errors in its own; the first of ours contains the remedy.
        cause: BaseException | None = e
        while cause is not None and not isinstance(cause, SchemeError | DataError):
            cause = cause.__cause__ or cause.__context__
        said = " ".join(str(cause or e).split())[:300]
        raise CheckpointError(f"{path}: its {what} cannot be built here: {said}") from None


def _class_paths(spec: Any) -> Iterator[str]:
    if isinstance(spec, Mapping):
        if isinstance(spec.get("class_path"), str):
            yield spec["class_path"]
        for value in spec.values():
            yield from _class_paths(value)
    elif isinstance(spec, list | tuple):
        for value in spec:
            yield from _class_paths(value)


def _of_data(path: Path, held: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entry of the data module in a checkpoint."""
    for value in held.values():
        if isinstance(value, Mapping) and {"picture", "classes"} <= value.keys():
            return value
    raise CheckpointError(
        f"{path} does not say how pictures were brought to its net: it is no picture classifier, or of release 0.1\n"
        "  Give the configuration that it was trained with: -c RUN/config.yaml"
    )
