"""`--weights` and `--ckpt_path`: the source that a command starts from, identified, read and checked before any change.

A source may be one of three things: a checkpoint of a run, which holds its configuration and is resumed exactly; a file
or folder of weights, a published tag or a Hub repository, of which the network takes what fits; or neither, which is an
error of two lines.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from .. import checkpoints
from ..continuous import expected_shapes
from ..start import Adapt, Started, find, is_remote, prepared
from .files import CheckpointError, is_checkpoint, open_checkpoint
from .resume import KEY
from .trained import foreign_class

# Evaluation builds an optimiser but never uses it, so the checkpoint's own is not needed.
UNUSED = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.0}}


class Source(NamedTuple):
    """Weights that were read but not yet loaded into a network.

    Attributes:
        name: as the user typed it.
        held: the contents of the file.
    """

    name: str
    held: Mapping[str, Any]


def read_source(given: str) -> Source:
    """Reads a file, a published tag or a Hub repository.

    Raises:
        SchemeError: the source does not exist, or cannot be read.
    """
    return Source(given, checkpoints.read(find(given)))


def start_from(net: nn.Module, source: Source, adapt: Adapt, training: bool) -> Started:
    """Loads weights into a network, all that fit or nothing, and prints what was not loaded.

    Args:
        net: of the run.
        source: the weights.
        adapt: what may be adapted to fit.
        training: whether a new head will be trained; in evaluation it would guess.
    """
    done = prepared(net, source.held, source.name, adapt if training else replace(adapt, new_head=False)).write()
    if getattr(rank_zero_only, "rank", 0) in (0, None):
        print("\n".join(done.lines()), flush=True)
    return done


def check_fits(model: nn.Module, path: Path, held: Mapping[str, Any]) -> None:
    """Refuses a checkpoint whose tensors are not those of the model, before Lightning loads them one by one.

    Raises:
        CheckpointError: names missing and unexpected tensors, and those of another shape.
    """
    state = {key: value for key, value in held["state_dict"].items() if isinstance(value, Tensor)}
    own = model.state_dict()
    shapes = expected_shapes(model, state, own)
    kinds = {
        "missing": [key for key in own if key not in state],
        "without a place": [key for key in state if key not in own],
        "of another shape": [
            f"{key} is {tuple(value.shape)}, want {tuple(shapes[key])}"
            for key, value in state.items()
            if key in own and value.shape != shapes[key]
        ],
    }
    parts = [f"{len(found)} {what}: {', '.join(found[:3])}" for what, found in kinds.items() if found]
    if parts:
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: {'; '.join(parts)}\n"
            "  Give the configuration that it was trained with, or leave -c out in evaluation; to fine-tune: --weights"
        )


def configuration(given: str, run_dir: str | None) -> str:
    """Returns the part of a checkpoint's configuration that evaluation needs, as YAML: seed, network and data.

    Args:
        given: of ``--ckpt_path``.
        run_dir: of ``--run_dir``, the folder of ``best`` and ``last``.

    Raises:
        CheckpointError: it holds no configuration, or one that would import code of another package.
    """
    folder = Path(run_dir or "runs/default") / "checkpoints"
    path = folder / f"{given}.ckpt" if given in ("best", "last") else Path(given)
    if not path.is_file() or not is_checkpoint(path):
        raise CheckpointError(
            f"{path} {'holds weights alone' if path.is_file() else 'is not there'}, which say nothing of data\n"
            "  Give the network and the data: -c FILE.yaml"
        )
    config = open_checkpoint(path, resume=False).held.get(KEY, {}).get("config")
    if not isinstance(config, Mapping) or not {"model", "data"} <= config.keys():
        raise CheckpointError(
            f"{path} does not hold its configuration: it was trained from Python, or by release 0.1\n"
            "  Give the network and the data: -c FILE.yaml"
        )
    # Results go beside the run's own files, as with its configuration; those of a moved file go where the file is.
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    kept = {"run_dir": str(folder), **_for_evaluation(path, config)}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def _for_evaluation(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a configuration that evaluation needs, without anything that runs foreign code or goes online."""
    kept = {key: config[key] for key in ("seed_everything", "threads", "model", "data") if key in config}
    model, data = (dict(kept[part].get("init_args") or {}) for part in ("model", "data"))
    # Evaluation takes no optimiser steps, and a custom schedule would have its code imported.
    model.pop("schedule", None)
    if "optimizer" in model:
        # Removed before the check: an optimiser of another package is not used, and so not a reason to refuse.
        model["optimizer"] = None
    kept |= {part: {**kept[part], "init_args": options} for part, options in (("model", model), ("data", data))}
    if foreign := foreign_class(kept):
        raise CheckpointError(
            f"{path} is configured with {foreign}, and a file does not decide what code is imported\n"
            "  Give the configuration that it was trained with: -c RUN/config.yaml"
        )
    if "optimizer" in model:
        model["optimizer"] = UNUSED
    if "download" in data:
        data["download"] = False
    return kept


def loads_weights(given: str | None) -> bool:
    """Whether a `--ckpt_path` of evaluation means weights rather than a checkpoint of a run."""
    if given is None or given in ("best", "last"):
        return False
    return not is_checkpoint(Path(given)) if Path(given).is_file() else Path(given).is_dir() or is_remote(given)
