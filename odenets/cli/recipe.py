"""`odenets recipe`: the rows of the papers as configurations."""

from collections.abc import Sequence

from odenets import recipes
from schemes import SchemeError

from ..messages import fail
from .words import Parser, closed_output

HELP = """usage: odenets recipe NAME
       odenets recipe --list [PATTERN]

Prints a row of a paper's table as a complete configuration, whose opening comment says what was published of it.

  NAME              one of the list
  --list [PATTERN]  a line for each: name, network, data, stage, published figure; PATTERN has shell wildcards

  odenets recipe --list "cifar10_*"
  odenets recipe revcol_tiny > my_revcol.yaml
  lightning fit -c recipe:revcol_tiny --data.root FOLDER
"""


def run(words: Sequence[str]) -> None:
    """Runs one command line; errors that the user can mend end in two lines and exit status 2."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    parser = Parser(prog="odenets recipe", add_help=False)
    parser.add_argument("name", nargs="?")
    parser.add_argument("--list", nargs="?", const="*", metavar="PATTERN")
    options = parser.parse(words)
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
