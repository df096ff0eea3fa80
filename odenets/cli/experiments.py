"""`odenets experiments`: lists the experiments that `-c NAME` knows, or prints one of them."""

import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from schemes import SchemeError

from .. import packaged
from ..messages import closed_output, fail
from . import words as w

TEXT = """Lists the experiments that come with the package: `lightning fit -c NAME` trains one. Given the name of
one, it prints its file, to be saved and changed: `odenets experiments quickstart > mine.yaml`.

Exit status: 0; 1 if nothing matches; 2 if the command cannot be read."""


def parser() -> w.Parser:
    """The options."""
    found = w.Parser(prog="odenets experiments", description=TEXT)
    found.add_argument(
        "name", nargs="?", metavar="NAME|PATTERN", help="an experiment, or a part of the names of several"
    )
    found.add_argument("--json", action="store_true", help="print JSON: names, files, what each of them is")
    return found


def run(args: Sequence[str]) -> None:
    """Runs one command line; errors that the user can fix end in two lines."""
    options = parser().parse(args)
    known = packaged.experiments()
    if not known:
        fail("this installation came without its experiments", "Install the wheel anew, or give files: -c FILE.yaml")
    try:
        file = packaged.find(options.name) if options.name else None
        if file is not None and not options.json:
            # Written, not printed, which would add a line: the copy must equal the file.
            sys.stdout.write(file.read_text(encoding="utf-8"))
            return
        names = [options.name] if file else w.matching(options.name or "*", known, "experiment")
        rows = [(name, known.get(name, file), about(known.get(name) or file)) for name in names]  # type: ignore[arg-type]
        if options.json:
            w.write(w.as_json([{"name": n, "file": str(f), "about": text} for n, f, text in rows]), None)
        else:
            w.show(
                "",
                ["Experiment", "It is"],
                [(n, textwrap.shorten(text, 100, placeholder=" ...")) for n, _, text in rows],
            )
    except BrokenPipeError:
        closed_output()
    except (SchemeError, OSError) as e:
        fail(str(e), "odenets experiments --help shows how it is used")


def about(file: Path) -> str:
    """Returns the first sentence of a file's opening comment, after the command."""
    head: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        head.append(line.removeprefix("#").strip())
    paragraphs = "\n".join(head).split("\n\n")
    text = " ".join(paragraphs[1 if len(paragraphs) > 1 else 0].split())
    # "et al." does not end a sentence.
    return re.split(r"(?<=\.)(?<!al\.)\s+(?=[A-Z])", text)[0]
