"""The console scripts `lightning` and `odenets`: `lightning fit|validate|test|predict -c FILE.yaml [--KEY VALUE ...]`.

This file imports nothing heavy: `--help` and `--version` answer at once, and a torchvision that does not fit the
installed torch is repaired before Lightning, which imports it, can trip over it.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence

from odenets import __version__

from ..messages import fail

HELP = """usage: {prog} fit|validate|test|predict -c FILE.yaml [-c MORE.yaml] [--KEY VALUE ...]

  fit        train; checkpoints, config.yaml and metrics.csv go to the run's folder (--run_dir)
  validate   evaluate a checkpoint on the validation pictures: --ckpt_path best|last|FILE
  test       the same on the test pictures
  predict    write the class of each test picture to predictions.csv
  odenets predict --ckpt_path FILE PICTURE|FOLDER...                     the classes of any pictures; no -c needed
  odenets evaluate --ckpt_path FILE [FOLDER]                             accuracy with intervals, of all and by class
  odenets export FILE --output net.onnx|net.pt2                          the network as a file that runs elsewhere

  {prog} fit -c experiments/quickstart.yaml                              the handwritten digits, nothing to download
  {prog} fit -c experiments/cifar10_ho_resnet.yaml --data.root FOLDER --model.net.scheme midpoint
  {prog} fit -c FILE.yaml --ckpt_path last                               go on where the last run stopped
  {prog} fit -c FILE.yaml --print_config                                 the resolved configuration
  {prog} fit --help                                                      every option

  odenets compare FILE.yaml --over KEY=V1,V2 --seeds 0..4 --dir DIR      one experiment over some values and seeds
  odenets study run -c experiments/studies/pilot_mini.yaml               many random networks, to compare schemes

  odenets analyse CKPT KIND                                              a figure: weights, alignment, layercam, ranks,
                                                                         stability
  odenets convergence runs/NAME/checkpoints/best.ckpt                    one network under many schemes and depths

  --version  the version of odenets
"""

# What the extra `train` brings, by the name of the module.
TRAIN_EXTRA = {
    "datasets",
    "huggingface_hub",
    "jsonargparse",
    "lightning",
    "numpy",
    "PIL",
    "rich",
    "sklearn",
    "tensorboard",
    "torchmetrics",
    "typeshed_client",
    "yaml",
}

STUDY_EXTRA = {"filelock", "matplotlib", "scipy"}  # and Ray, which says so itself

_torchvision_ops = []  # a torch.library.Library takes its operators with it when it is collected


def repair_torchvision() -> None:
    """Make a torchvision built for another torch importable, without its compiled operators.

    Lightning imports torchmetrics, which imports any torchvision it finds; a mismatched one fails with "operator
    torchvision::nms does not exist" and takes Lightning down. Declaring the two operators lets the import through.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass  # there is none, or one that cannot be imported: torchmetrics copes with that
    except RuntimeError as e:
        import torch

        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _torchvision_ops.append(library)
        importlib.import_module("torchvision")
        warnings.warn(f"torchvision does not fit this torch ({e}); it is used without its operators", stacklevel=2)


def _configured(words: Sequence[str]) -> bool:
    """Whether a command line configures a network and data itself, by a file or by options."""
    names = [word.partition("=")[0] for word in words]
    return any(name in ("-c", "--config") or name.startswith(("--model", "--data")) for name in names)


def main(args: list[str] | None = None) -> None:
    """Run the command line; returns None, since a script's return value becomes its exit status."""
    words = sys.argv[1:] if args is None else args
    prog = "odenets" if sys.argv[0].endswith(("odenets", "__main__.py")) else "lightning"
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP.format(prog=prog), end="")
        return
    if words[0] == "--version":
        print(f"odenets {__version__}")
        return
    try:
        repair_torchvision()
        if words[0] == "evaluate" or (words[0] == "predict" and not _configured(words)):
            from .pictures import run as run_pictures

            return run_pictures(words[0], words[1:])
        if words[0] == "export":
            from .export import run as run_export

            return run_export(words[1:])
        if words[0] == "study":
            from odenets.study.subcommands import run as run_study

            return run_study(words[1:])
        if words[0] == "compare":
            from odenets.study.compare_command import run as run_compare

            return run_compare(words[1:])
        if words[0] == "analyse":
            from odenets.training.analyse import run as run_analyse

            return run_analyse(words[1:])
        if words[0] == "convergence":
            from odenets.training.convergence import run as run_convergence

            run_convergence(words[1:])
            return None
        from odenets.training.command import run
    except ModuleNotFoundError as e:
        missing = (e.name or "").partition(".")[0]
        if missing in STUDY_EXTRA:
            fail(f"studies and comparisons need the package {missing}", 'pip install "odenets[study]"')
        if missing not in TRAIN_EXTRA:
            raise
        fail(f"training needs the package {missing}, which is not installed", 'pip install "odenets[train]"')
    run(args, prog)
