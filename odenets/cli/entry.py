"""The console scripts `lightning` and `odenets`: `lightning fit|validate|test|predict -c FILE.yaml [--KEY VALUE ...]`.

This file imports nothing heavy: `--help` and `--version` answer at once, and a torchvision that does not fit the
installed torch is repaired before Lightning imports it.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence

from odenets import __version__

from ..extras import explained
from ..messages import fail
from ..names import closest
from ..run_words import is_over_data

HELP = """usage: {prog} fit|validate|test|predict -c FILE.yaml [-c MORE.yaml] [--KEY VALUE ...]

  fit        train; checkpoints, config.yaml and metrics.csv go to the run's folder (--run_dir)
  validate   evaluate a checkpoint on the validation pictures: --ckpt_path best|last|FILE
  test       evaluate it on the test pictures
  predict    write the class of each test picture to predictions.csv

  {prog} fit -c quickstart                                               the handwritten digits, nothing to download
  {prog} fit -c cifar10_ho_resnet --data.root FOLDER --model.net.scheme midpoint
  {prog} fit -c FILE.yaml --ckpt_path last                               continue where the last run stopped
  {prog} fit -c FILE.yaml --weights SOURCE                               start from a file, a tag, hf:OWNER/NAME
  {prog} fit -c FILE.yaml --print_config                                 the resolved configuration
  {prog} fit --help                                                      every option

what there is
  odenets experiments [NAME]                                             the experiments that -c knows by name, or one
  odenets recipe --list [PATTERN]                                        rows of the papers' tables, one per line
  odenets recipe NAME                                                    one as a configuration; -c recipe:NAME runs it
  odenets schemes [PATTERN]                                              the schemes: order, cost, inverse, source
  odenets show SCHEME [--plot FILE]                                      one of them: its array or updates, stability
  odenets models [PATTERN] [--costs]                                     the models; what they cost

with a trained network
  odenets predict FILE PICTURE|FOLDER...                                 the classes of any pictures; no -c needed
  odenets evaluate FILE [FOLDER] [--corruptions] [--attack "pgd(8/255)"] accuracy with intervals, of all and by class;
                                                                         under corruptions and attacks
  odenets export FILE --output net.onnx|net.pt2                          the network as a file that runs elsewhere
  odenets convert WEIGHTS --model NAME --output FILE                     published weights to our keys, or back
  odenets analyse CKPT KIND                                              a figure: weights, alignment, class_alignment,
                                                                         layercam, ranks, stability
  odenets analyse RESULTS... cost                                        a figure: error against parameters and MACs
  odenets convergence runs/NAME/checkpoints/best.ckpt                    one network under many schemes and depths

many networks
  odenets compare FILE.yaml --over KEY=V1,V2 --seeds 0..4 --dir DIR      one experiment over some values and seeds
  odenets study run -c studies/pilot_mini                                many random networks, to compare schemes

  odenets completion bash|zsh|fish|tcsh                                  a script that completes these in a shell
  --version  the version of odenets
"""

LIGHTNING = ("fit", "validate", "test", "predict")
# The module of each command of our own, and its function, which takes the words after the command's name.
COMMANDS = {
    "analyse": "odenets.cli.analyse:run",
    "compare": "odenets.study.compare_command:run",
    "completion": "odenets.cli.completion:run",
    "convergence": "odenets.training.convergence:run",
    "convert": "odenets.cli.convert:run",
    "evaluate": "odenets.cli.evaluate:run",
    "experiments": "odenets.cli.experiments:run",
    "export": "odenets.cli.export:run",
    "models": "odenets.cli.models:run",
    "predict": "odenets.cli.pictures:run",
    "recipe": "odenets.cli.recipe:run",
    "schemes": "odenets.cli.schemes:run",
    "show": "odenets.cli.show:run",
    "study": "odenets.study.subcommands:run",
}

_torchvision_ops = []  # keeps each torch.library.Library alive: its operators vanish when it is collected


def repair_torchvision() -> None:
    """Makes a torchvision built for another torch importable, without its compiled operators.

    Lightning imports torchmetrics, which imports any torchvision it finds; a mismatched one fails with "operator
    torchvision::nms does not exist" and takes Lightning down. Declaring the two operators lets the import through.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass  # there is none, or one that cannot be imported: torchmetrics copes with that
    except RuntimeError as e:
        import torch

        # The failed import has left submodules behind, which the next import would take for complete.
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _torchvision_ops.append(library)
        importlib.import_module("torchvision")
        warnings.warn(f"torchvision does not fit this torch ({e}); it is used without its operators", stacklevel=2)


def main(args: list[str] | None = None) -> None:
    """Runs the command line; returns None, since a script's return value becomes its exit status."""
    words = sys.argv[1:] if args is None else args
    # One command under two names; help and errors use the one that was typed.
    prog = "odenets" if sys.argv[0].endswith(("odenets", "__main__.py")) else "lightning"
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP.format(prog=prog), end="")
        return
    if words[0] == "--version":
        print(f"odenets {__version__}")
        return
    try:
        _run(words, prog)
    except KeyboardInterrupt:
        # Raised while modules are imported, or in a command that has nothing to save.
        fail("interrupted", "What was written before is whole; nothing else is changed", 130)
    except ImportError as e:
        lines = explained(e)
        if lines is None:
            raise
        fail(*lines)


def _run(words: Sequence[str], prog: str) -> None:
    name, own = words[0], words[0] in COMMANDS
    # Lightning takes options before its subcommand, too.
    if not own and name not in LIGHTNING and not name.startswith("-"):
        known = sorted({*LIGHTNING, *COMMANDS}, key=[*LIGHTNING, *COMMANDS].index)
        near = closest(name, known, cutoff=0.5)
        remedy = f"Closest: {', '.join(near)}" if near else f"{prog} --help says what each of them does"
        fail(f"there is no {name!r}; wanted one of {', '.join(known)}", remedy)
    if own and not (name == "predict" and is_over_data(words)):
        module, _, function = COMMANDS[name].partition(":")
        if module not in LIGHT:
            repair_torchvision()
        getattr(importlib.import_module(module), function)(words[1:])
        return
    repair_torchvision()
    from odenets.training.command import run

    run(list(words), prog)


# These do not import Lightning, so there is nothing to repair.
LIGHT = {f"odenets.cli.{name}" for name in ("convert", "experiments", "models", "recipe", "schemes", "show")}
