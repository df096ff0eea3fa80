"""`odenets recipe`: rows of the papers' tables as configurations."""

from collections.abc import Sequence

from odenets import recipes
from schemes import SchemeError

from ..messages import closed_output, fail
from . import words as w

TEXT = """Prints a row of a paper's table as a complete configuration, whose opening comment says what was published of
it; `lightning fit -c recipe:NAME` trains it without a file.

  odenets recipe --list "cifar10_*"
  odenets recipe revcol_tiny > my_revcol.yaml
  lightning fit -c recipe:revcol_tiny --data.root FOLDER

Exit status: 0; 2 if the command cannot be read, or nothing has that name."""


def parser() -> w.Parser:
    """The options."""
    found = w.Parser(prog="odenets recipe", description=TEXT)
    found.add_argument("name", nargs="?", metavar="NAME", help="a recipe from the list")
    found.add_argument(
        "--list", nargs="?", const="*", metavar="PATTERN", help="list them, one per line; PATTERN has shell wildcards"
    )
    return found


def run(words: Sequence[str]) -> None:
    """Runs one command line; errors that the user can fix end in two lines and exit status 2."""
    options = parser().parse(words)
    if (options.name is None) == (options.list is None):
        fail("wanted the name of one recipe, or --list", "odenets recipe --list names them all")
    try:
        print(recipes.find(options.name).text if options.list is None else _lines(options.list), end="", flush=True)
    except SchemeError as e:
        fail(str(e))
    except BrokenPipeError:
        closed_output()


def _lines(pattern: str) -> str:
    found = recipes.names(pattern)
    if not found:
        raise SchemeError(f"no recipe is named like {pattern!r}\n  odenets recipe --list names them all.")
    width = max(map(len, found))
    return "".join(f"{name:<{width}}  {recipes.find(name).line}\n" for name in found)
