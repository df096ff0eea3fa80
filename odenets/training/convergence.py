"""The command `odenets convergence CKPT`: a trained network under other schemes and depths."""

import argparse
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor, nn

from schemes import SchemeError

from .. import checkpoints
from ..analysis.convergence import SCALES, SCHEMES, Convergence, convergence
from ..messages import fail
from .command import TrainingParser
from .files import open_checkpoint
from .resume import KEY
from .sources import DataError
from .steps import as_trained

HELP = "odenets convergence --help lists every option"


def parser() -> argparse.ArgumentParser:
    """Builds the parser of the command; all other options are those of the data, as in training: --data.root FOLDER."""
    found = argparse.ArgumentParser(
        prog="odenets convergence",
        description="Run a checkpoint whose weights are functions of depth under schemes and depths; print accuracy "
        "and distance of the logits against evaluations. Options of the data are those of training: --data.root DIR.",
    )
    found.add_argument("checkpoint", type=Path, help="a checkpoint of `odenets fit`")
    found.add_argument("--schemes", nargs="+", default=[*SCHEMES], metavar="SCHEME")
    found.add_argument(
        "--scales", nargs="+", type=Fraction, default=[*SCALES], metavar="N", help="multiples of the number of steps"
    )
    found.add_argument(
        "--tolerances", nargs="*", type=float, default=[1e-2, 1e-4], help="tolerances of the adaptive solver"
    )
    found.add_argument("--reference", default="rk4", help="scheme whose logits distances are measured from")
    found.add_argument("--split", choices=["val", "test"], default="val")
    found.add_argument("--samples", type=int, default=2000, help="use at most this many pictures; 0 takes all")
    found.add_argument("--plot", type=Path, help="the PNG of the work-precision diagram")
    return found


def run(words: Sequence[str]) -> Convergence:
    """Runs one command line; errors that the user can fix end in two lines and exit status 2."""
    options, rest = parser().parse_known_args(list(words))
    try:
        pictures(None, options.split, options.samples)  # refuses a wrong number before anything is opened
        net, data = trained(options.checkpoint, rest)
        found = convergence(
            net,
            lambda: pictures(data, options.split, options.samples),
            options.schemes,
            options.scales,
            options.tolerances,
            options.reference,
        )
    except (SchemeError, DataError) as error:
        fail(str(error), HELP)
    print(found)
    if options.plot is not None:
        from ..plots import work_precision

        print(f"plot: {work_precision(found.points, options.plot)}")
    return found


def trained(path: Path, overrides: Sequence[str] = ()) -> tuple[nn.Module, L.LightningDataModule]:
    """Loads the network of a checkpoint with its weights, steps and scheme, and the data that it was trained on.

    Args:
        path: the checkpoint.
        overrides: options of the data, as on the command line.

    Raises:
        SchemeError: a checkpoint that does not hold its configuration.
    """
    held = open_checkpoint(path, resume=False).held
    config = held.get(KEY, {}).get("config")
    if not isinstance(config, dict) or "model" not in config:
        raise SchemeError(
            f"{path} does not hold the configuration of its run, so its net cannot be built.\n"
            "  In Python: odenets.analysis.convergence(net, batches)."
        )
    TrainingParser.command_line = [*overrides]
    parts: Any = TrainingParser(prog="odenets convergence")
    parts.add_lightning_class_args(L.LightningModule, "model", subclass_mode=True)
    parts.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True)
    for name in ("num_classes", "in_chans"):
        parts.link_arguments(f"data.{name}", f"model.init_args.net.init_args.{name}", apply_on="instantiate")
    given = {k: config[k] for k in ("model", "data")}
    # Options that the run computed from its data are recomputed from the data given here.
    net_options = given["model"].get("init_args", {}).get("net", {}).get("init_args", {})
    for name in ("num_classes", "in_chans"):
        net_options.pop(name, None)
    chosen = parts.parse_object(given)
    if overrides:
        chosen = parts.parse_args(list(overrides), namespace=chosen)
    built = parts.instantiate_classes(chosen)
    net = built.model.net
    checkpoints.load(net, path)
    return as_trained(net, held).eval(), built.data


def pictures(data: Any, split: str, samples: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Returns the batches of a split as evaluation sees them, at most `samples` pictures in all; 0 takes all.

    Raises:
        SchemeError: a negative number of them.
    """
    if samples < 0:
        raise SchemeError(f"--samples is {samples}, want a number of pictures\n  Give 1 or more, or 0 for all of them.")
    return _pictures(data, split, samples)


def _pictures(data: Any, split: str, samples: int) -> Iterator[tuple[Tensor, Tensor]]:
    data.setup("validate" if split == "val" else "test")
    left = samples or float("inf")
    for batch in data.val_dataloader() if split == "val" else data.test_dataloader():
        x, y = data.on_after_batch_transfer(batch, 0)[:2]
        n = int(min(left, len(x)))
        yield x[:n], y[:n]
        left -= n
        if left <= 0:
            return
