"""`odenets completion SHELL`: a script that completes the commands, their options, and the names that these take.

The script is written once and holds all words, so that pressing Tab starts no Python: importing torch and Lightning for
an answer would take seconds.
"""

import argparse
import importlib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import shtab

import schemes

from .. import packaged
from ..messages import closed_output
from ..models.catalogue import list_models
from ..training import command
from . import words as w
from .entry import COMMANDS, LIGHTNING

TEXT = """Writes a script that completes commands, options and names in a shell, to the standard output. Run it once,
and again after an update:

  odenets completion bash > ~/.local/share/bash-completion/completions/odenets
  odenets completion zsh > ~/.zfunc/_odenets                                      (a folder of fpath)
  odenets completion fish > ~/.config/fish/completions/odenets.fish

--prog lightning writes the script for this command's other name.

Exit status: 0; 2 for a shell that is not known."""

ABOUT = {
    "fit": "train",
    "validate": "evaluate a checkpoint on the validation pictures",
    "test": "the same on the test pictures",
    "predict": "the classes of pictures",
}
# Words in a metavar, or names of options, that mean a file.
FILES = set("CHECKPOINT CKPT CKPT_PATH DIR FILE FOLDER OUT OUTPUT PLOT PUBLISHED RUN_DIR STORE WEIGHTS".split())
BASH = """_odenets_config() {{ compgen -W "{names}" -- "$1"; compgen -f -- "$1"; }}"""
ZSH = """_odenets_config() {{ _alternative 'experiments:experiment:({names})' 'files:file:_files'; }}"""


def parser() -> w.Parser:
    """The options."""
    found = w.Parser(prog="odenets completion", description=TEXT)
    found.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="the shell that the script is for")
    found.add_argument("--prog", choices=("odenets", "lightning"), default="odenets", help="the command's name")
    return found


def run(args: Sequence[str]) -> None:
    """Runs one command line; errors that the user can fix end in two lines and exit status 2."""
    options = parser().parse(args)
    try:
        sys.stdout.write(script(options.shell, options.prog) + "\n")
    except BrokenPipeError:
        closed_output()


def script(shell: str, prog: str = "odenets") -> str:
    """Returns the completion script for a shell.

    Args:
        shell: one of ``shtab.SUPPORTED_SHELLS``.
        prog: the command that it completes.
    """
    names = " ".join(packaged.experiments())
    preamble = {"bash": BASH.format(names=names), "zsh": ZSH.format(names=names)}
    return shtab.complete(whole(prog), shell, preamble=preamble)  # type: ignore[arg-type]  # a text for each shell, too


def whole(prog: str) -> argparse.ArgumentParser:
    """Returns all commands with all of their options as one parser, which only describes them."""
    found = argparse.ArgumentParser(prog=prog)
    found.add_argument("--version", action="store_true", help="the version of odenets")
    commands = found.add_subparsers()
    own = {name: _parser(place) for name, place in COMMANDS.items()}
    trained = _lightning(prog)
    for name in dict.fromkeys((*LIGHTNING, *COMMANDS)):
        # `predict` is both: Lightning's over the data of a configuration, and our own over pictures.
        sources = [source for source in (trained.get(name), own.get(name)) if source is not None]
        about = ABOUT.get(name) or _plain(sources[-1].description)
        _copy(
            commands.add_parser(name, help=about, add_help=False),
            [action for source in sources for action in source._actions],
        )
    return found


def _parser(place: str) -> Any:
    """The parser of a command of our own: beside the function that runs it, with "parser" for "run" in its name."""
    module, _, function = place.partition(":")
    return getattr(importlib.import_module(module), re.sub("run|command", "parser", function))()


class _Found(Exception):
    """Carries the parser of Lightning's commands."""


class _Asked(command.Command):
    """A command that stops before it parses anything."""

    def parse_arguments(self, parser: Any, args: Any) -> NoReturn:
        raise _Found(parser)


def _lightning(prog: str) -> dict[str, Any]:
    """The parsers of Lightning's commands, by name."""
    try:
        command._command(_Asked, [], prog)
    except _Found as found:
        return next(a.choices for a in found.args[0]._actions if isinstance(a.choices, dict))
    raise AssertionError("a command went on without its parser")


def _copy(target: argparse.ArgumentParser, source: Iterable[Any]) -> None:
    """Adds options of the same names, words and choices to a parser; they do nothing."""
    taken: set[str] = set()
    for action in source:
        if isinstance(action.choices, dict) and not action.option_strings:  # subcommands
            inner = target.add_subparsers()
            for name, sub in action.choices.items():
                _copy(inner.add_parser(name, add_help=False, help=sub.description or ""), sub._actions)
            continue
        # jsonargparse adds --KEY.help to each class, which would double the list.
        names = [name for name in action.option_strings if name not in taken and not name.endswith(".help")]
        if action.option_strings and not names:
            continue
        taken.update(names)
        given: dict[str, Any] = {"help": _plain(action.help)}
        if action.nargs == 0:
            target.add_argument(*names, action="store_true", **given)
            continue
        added = target.add_argument(*names or [action.dest], nargs=action.nargs, choices=_choices(action), **given)
        if "--config" in names:
            added.complete = {"bash": "_odenets_config", "zsh": "_odenets_config"}  # type: ignore[attr-defined]
        elif _takes_file(action):
            added.complete = shtab.FILE  # type: ignore[attr-defined]


def _plain(text: str | None) -> str:
    """The first line of a help text, with the percent signs escaped that argparse would expand."""
    return "" if text in (None, argparse.SUPPRESS) else str(text).split("\n")[0].replace("%", "%%")


def _choices(action: Any) -> list[str] | None:
    if action.choices is not None:
        return [str(choice) for choice in action.choices]
    words = str(action.metavar)
    if words == "SCHEME" or action.dest in ("scheme", "schemes"):
        return list(schemes.names())
    if words == "NAME" and action.dest == "model":
        return list_models()
    if words == "NAME|PATTERN":
        return list(packaged.experiments())
    return None


def _takes_file(action: Any) -> bool:
    # A metavar may name several things, as FILE|FOLDER does.
    said = {*re.findall(r"[A-Z]+", str(action.metavar)), action.dest.upper()}
    return bool(said & FILES)
