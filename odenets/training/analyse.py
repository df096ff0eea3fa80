"""The command `odenets analyse CKPT KIND`: a figure of what the network of a checkpoint has learned."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import lightning as L
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from schemes import SchemeError
from schemes.runge_kutta import RungeKutta

from .. import checkpoints, plots
from ..analysis import Features, alignment, class_alignment, evaluating, feature_rank, layer_cam, places, weight_maps
from ..messages import TIP, explain, fail
from ..stack import Stack
from ..step import Step
from .data import Pictures
from .files import open_checkpoint
from .resume import KEY
from .sources import DataError
from .steps import as_trained

HELP = "odenets analyse --help lists every option"
ENDINGS = (".png", ".svg", ".pdf")


class AnalyseParser(ArgumentParser):
    """A parser whose errors are two lines."""

    # On the class, since jsonargparse builds further parsers of this kind for the parts.
    command_line: Sequence[str] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        first, second = explain(message, self.command_line, [action.dest for action in self._actions])
        fail(first, HELP if second == TIP else second)


class Job(NamedTuple):
    """The inputs of a figure.

    Attributes:
        net: the network with its weights, in evaluation mode.
        held: the contents of the checkpoint.
        options: of the command line.
        out: the figure's file.
    """

    net: nn.Module
    held: Mapping[str, Any]
    options: Any
    out: Path

    def places(self, found: Sequence[str]) -> list[str]:
        """The places given on the command line, else those found."""
        given = self.options.places
        return [name.strip() for name in given.split(",")] if given else list(found)


def _weights(job: Job) -> Path:
    return plots.weight_maps(weight_maps(job.net), job.out, type(job.net).__name__)


def _stability(job: Job) -> Path:
    steps = [step for stack in job.net.modules() if isinstance(stack, Stack) for step in stack.steps]
    schemes = {str(step.scheme): step.scheme for step in steps if isinstance(step, Step)}
    tableaux = {name: scheme.tableau for name, scheme in schemes.items() if isinstance(scheme, RungeKutta)}
    if not tableaux:
        raise SchemeError(
            f"stability: {', '.join(schemes) or 'a net without stacks'} has no stability function.\n"
            "  Regions are those of Runge-Kutta methods: train with --model.net.scheme rk4, or another of them."
        )
    return plots.stability_regions(tableaux, job.out, type(job.net).__name__)


def _alignment(job: Job) -> Path:
    data = _data(job)
    batches = islice(_batches(data), job.options.batches)
    matrix, names = alignment(job.net, batches, job.places(places(job.net)), classes=data.num_classes)
    # The last two names are the input and the label, which belong to no column.
    if len(names) > 2 and all(":" in name and name.startswith("columns.") for name in names[:-2]):
        return plots.alignment_by_column(matrix, names, job.out)
    return plots.alignment_matrix(matrix, names, job.out, type(job.net).__name__)


def _class_alignment(job: Job) -> Path:
    data = _data(job)
    names = job.places(places(job.net))
    called = [str(name) for name in getattr(data, "classes", range(data.num_classes))]
    wanted = job.options.of
    if wanted is not None and wanted not in called:
        raise DataError(f"--of {wanted}: no class of the data\n  There are {', '.join(called[:12])}.")
    batches = islice(_batches(data), job.options.batches)
    found = class_alignment(job.net, batches, names, classes=data.num_classes)
    k = found.best() if wanted is None else called.index(wanted)
    title = f"{type(job.net).__name__}, class {called[k]}, {int(found.counts[k])} of {int(found.counts.sum())} pictures"
    return plots.class_alignment(found.label[:, k].tolist(), found.picture[:, k].tolist(), names, job.out, title)


def _layercam(job: Job) -> Path:
    data = _data(job)
    x, _ = next(_batches(data))
    x = x[: job.options.pictures]
    names = job.places(_with_maps(job.net))
    heats = layer_cam(job.net, x, names)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (data.mean, data.std))
    # Scaled back to [0, 1] for display.
    return plots.heat_maps_by_column(x * std + mean, heats, names, job.out)


def _ranks(job: Job) -> Path:
    x, _ = next(_batches(_data(job)))
    names = job.places(places(job.net))
    with evaluating(job.net), torch.no_grad(), Features(job.net, names) as found:
        job.net(x)
    profile = {name: feature_rank(value) for name, value in found.items()}
    return plots.ranks(profile, job.out, f"{type(job.net).__name__}, {len(x)} pictures")


KINDS: dict[str, tuple[str, Callable[[Job], Path]]] = {
    "weights": ("mean absolute weights: by source (joined streams), alphas by level and column, by stage", _weights),
    "alignment": ("centered kernel alignment of places with each other, the input and the label", _alignment),
    "class_alignment": ("the same with one class's label and pictures, a line per level", _class_alignment),
    "layercam": ("which pixels the best class rests on", _layercam),
    "ranks": ("numerical and effective rank of features by depth", _ranks),
    "stability": ("stability regions of the net's Runge-Kutta methods", _stability),
}


def _with_maps(net: nn.Module) -> list[str]:
    """The places whose maps are shown: the output of each stack, or some steps of a single stack."""
    steps = places(net)
    found = _of_each(steps)
    if len(found) > 1 or len(steps) < 2:
        return found
    if getattr(net, "global_pool", None) == "token":
        steps = steps[:-2] or steps  # after the last attention the class token no longer depends on the patches
    count = min(6, len(steps))
    return [steps[(i + 1) * len(steps) // count - 1] for i in range(count)]


def _of_each(found: Sequence[str]) -> list[str]:
    """The output of each stack; all places of columns, as the figure has a row and a column for them."""
    if any(not name.endswith((":0", ":readout")) for name in found):
        return list(found)
    return list(dict.fromkeys(name.rpartition(".steps.")[0] or name for name in found))


def _net(path: Path, held: Mapping[str, Any]) -> nn.Module:
    """The network of a checkpoint, built from the parts that it names."""
    parts = held.get("hyper_parameters", {}).get("net")
    if not isinstance(parts, Mapping) or "class_path" not in parts:
        raise DataError(
            f"{path} does not say how its net is built\n"
            "  Train by odenets fit -c FILE.yaml; nets of your own: odenets.analysis and odenets.plots from Python."
        )
    parser = AnalyseParser()
    parser.add_subclass_arguments(nn.Module, "net")
    net = parser.instantiate_classes(parser.parse_object({"net": dict(parts)}))["net"]
    checkpoints.load(net, path)
    return as_trained(net, held).eval()


def _data(job: Job) -> Pictures:
    """The data that the network was trained on, opened for validation."""
    settings = job.held.get(KEY, {}).get("config", {}).get("data")
    if not isinstance(settings, Mapping) or "class_path" not in settings:
        raise DataError("the checkpoint does not say which data it saw\n  Train by odenets fit -c FILE.yaml.")
    given = dict(settings.get("init_args") or {})
    if job.options.root is not None:
        if "root" not in given:
            raise DataError(f"--root: {settings['class_path']} has no folder\n  Leave --root out.")
        # The hub is unset: only one of the two may be given.
        given |= {"root": job.options.root, "hub": None}
    parser = AnalyseParser()
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    data = parser.instantiate_classes(parser.parse_object({"data": {**settings, "init_args": given}}))["data"]
    if not isinstance(data, Pictures):
        raise DataError(f"{settings['class_path']} gives no pictures\n  For its nets, ask for weights or stability.")
    data.batch_size = job.options.batch_size
    data.prepare_data()
    data.setup("validate")
    return data


def _batches(data: Pictures) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised validation pictures and their labels."""
    for batch in data.val_dataloader():
        # Lightning would call this after moving the batch; pictures are only normalised there.
        yield data.on_after_batch_transfer(batch, 0)


def parser() -> AnalyseParser:
    """Builds the parser of the command."""
    kinds = "; ".join(f"{name}: {text}" for name, (text, _) in KINDS.items())
    text = "A figure of what the network of a checkpoint learned. Of files of results: odenets analyse cost --help."
    found = AnalyseParser(prog="odenets analyse", description=text)
    found.add_argument("ckpt", type=str, help="A checkpoint that `odenets fit` wrote.")
    found.add_argument("kind", type=str, choices=list(KINDS), help=f"The figure. {kinds}.")
    found.add_argument("--out", type=str | None, default=None, help="FILE.png, .svg or .pdf; default: beside CKPT.")
    found.add_argument("--places", type=str | None, default=None, help="Names of modules, separated by commas.")
    found.add_argument("--root", type=str | None, default=None, help="Folder of the data, if they lie elsewhere now.")
    found.add_argument("--batches", type=int, default=8, help="Batches of validation pictures, for alignments.")
    found.add_argument("--batch_size", type=int, default=64, help="Pictures per batch.")
    found.add_argument(
        "--of", type=str | None, default=None, help="Class for class_alignment; default: the best aligned."
    )
    found.add_argument("--pictures", type=int, default=2, help="Pictures for layercam.")
    return found


def run(args: Sequence[str]) -> None:
    """Runs one command line; errors that the user can fix end in two lines and exit status 2."""
    AnalyseParser.command_line = args
    try:
        options = parser().parse_args(list(args))
        path = Path(options.ckpt)
        out = path.parent / f"{options.kind}.png" if options.out is None else Path(options.out)
        for name in ("batches", "batch_size", "pictures"):
            if options[name] < 1:
                raise DataError(f"--{name} {options[name]}: want at least 1")
        if out.suffix.lower() not in ENDINGS:
            raise DataError(f"--out {out}: want a name that ends in {', '.join(ENDINGS)}")
        if not path.is_file():
            raise DataError(f"there is no file {str(path)!r}\n  Train first: odenets fit -c FILE.yaml.")
        held = open_checkpoint(path, resume=False).held
        print(KINDS[options.kind][1](Job(_net(path, held), held, options, out)))
    except (SchemeError, DataError, ImportError) as error:
        fail(str(error), HELP)
