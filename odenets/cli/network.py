"""Shared by the commands that open a trained network and judge pictures."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from schemes import SchemeError

from ..messages import closed_output, fail, first_line
from ..training.judge import Prediction
from ..training.sources import DataError
from ..training.trained import Trained, open_trained
from . import words as w


def common_parser(prog: str, text: str, required: bool = True) -> w.Parser:
    """Returns a parser with the options of every such command.

    Args:
        prog: Name of the command.
        text: What the command does.
        required: Whether --ckpt_path must be given.
    """
    found = w.Parser(prog=prog, description=text)
    found.add_argument("--ckpt_path", required=required, metavar="FILE", help="checkpoint of a run")
    found.add_argument("--json", action="store_true", help="print JSON")
    found.add_argument("--csv", action="store_true", help="print CSV")
    found.add_argument("--output", type=w.output_file, metavar="FILE", help="write FILE.csv or FILE.json instead")
    found.add_argument("--batch_size", type=w.positive, default=64, help="pictures at a time (64)")
    found.add_argument("--num_workers", type=w.count, default=0, help="processes that decode (0: this one)")
    found.add_argument("--device", default=None, help="cpu, cuda, ... (a GPU if there is one)")
    return found


def open_network(options: Any) -> Trained:
    """Opens the network of --ckpt_path on --device."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # A missing device fails at the first tensor, not when it is named.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise SchemeError(f"--device {device}: {first_line(e, 150)}\n  Give another: --device cpu") from None
    return open_trained(Path(options.ckpt_path), device)


def form_of(options: Any) -> str:
    """The form of the output: "json", "csv" or "table"."""
    if options.json and options.csv:
        raise SchemeError("--json and --csv exclude each other\n  Give one of them.")
    if options.output is not None:
        form = options.output.suffix.lower()[1:]
        other = "csv" if form == "json" else "json"
        if getattr(options, other):
            raise SchemeError(f"--{other} and --output {options.output} exclude each other\n  Give one of them.")
        return form
    return "json" if options.json else "csv" if options.csv else "table"


def run_over(name: str, command: Callable[[Sequence[str]], list[Prediction]], args: Sequence[str]) -> None:
    """Runs one command line; errors that the user can fix end in two lines and exit status 2.

    Args:
        name: Name of the command.
        command: Takes the words after the name, and returns the pictures that could not be read.
        args: These words.
    """
    try:
        unread = command(args)
    except ModuleNotFoundError:
        raise  # of an extra, which `main` names
    except (SchemeError, DataError, ImportError) as e:
        fail(str(e), f"odenets {name} --help shows how it is used")
    except BrokenPipeError:
        closed_output()
        return
    for prediction in unread:
        sys.stderr.write(f"{prediction.name} cannot be read: {prediction.error}\n")
    if unread:
        sys.exit(1)
