"""`odenets schemes`: lists the schemes, with the cost and the properties of each."""

import inspect
from collections.abc import Sequence
from typing import Any

import schemes
from schemes import SchemeError
from schemes.scheme import Scheme

from ..messages import closed_output, fail
from . import words as w

TEXT = """Lists the schemes: all names, or those that match a pattern (rk*, or a part of the name); a family is shown by
its usual member. Any of them, or an expression such as nested(midpoint, rk4) or 3*rk4 + midpoint, is what scheme= takes
in Python and --model.net.scheme on the command line.

  Order     of accuracy, for one vector field; – where no order holds
  Stages    residual functions that a step consumes
  Calls     of residual functions in a step; – where only a run can tell
  Inverse   yes: states can be recomputed instead of kept; training: only in the training pass
  Mixing    max_i sum_j |a_ij|, how far a stage's input strays from the step's

Exit status: 0; 1 if nothing matches; 2 if the command cannot be read."""
COLUMNS = ("Scheme", "Order", "Stages", "Calls", "Inverse", "Mixing", "Source")


def parser() -> w.Parser:
    """The options."""
    found = w.Parser(prog="odenets schemes", description=TEXT)
    found.add_argument(
        "pattern", nargs="?", default="*", metavar="PATTERN", help="a name with shell wildcards, or a part of one"
    )
    found.add_argument("--json", action="store_true", help="print JSON")
    return found


def run(args: Sequence[str]) -> None:
    """Runs one command line; errors that the user can fix end in two lines."""
    options = parser().parse(args)
    try:
        chosen = w.matching(options.pattern, schemes.names(), "scheme")
        # One example per name; a family that declares none and needs arguments has nothing to show.
        found = [known_of(text) for name in chosen for text in schemes.examples(name)[:1]]
        if options.json:
            w.write(w.as_json(found), None)
        else:
            w.show("", COLUMNS, map(_cells, found), ("Order", "Stages", "Calls", "Mixing"))
    except BrokenPipeError:
        closed_output()
    except SchemeError as e:
        fail(str(e), "odenets schemes --help shows how it is used")


def known_of(text: str) -> dict[str, Any]:
    """Returns what is known of a scheme as plain values, one for each column."""
    scheme = schemes.get(text)
    return {
        "scheme": text,
        "order": scheme.order,
        "stages": scheme.stages,
        "calls": scheme.evaluations,
        "inverse": "yes" if scheme.invertible else "training" if scheme.reversible_in_training else None,
        "mixing": scheme.mixing,
        "source": source(scheme),
    }


def source(scheme: Scheme) -> str:
    """Returns where a scheme was published, from its tableau or from the docstring of its class."""
    tableau = scheme.tableau
    if tableau is not None and tableau.cite:
        return tableau.cite
    # Under python -OO there is no docstring to read.
    lines = (inspect.getdoc(type(scheme)) or "").splitlines()
    at = next((i for i, line in enumerate(lines) if line.startswith("Source:")), None)
    if at is None:
        return ""
    found = [lines[at].removeprefix("Source:").strip()]
    for line in lines[at + 1 :]:
        if not line.strip():
            break
        found.append(line.strip())
    return " ".join(filter(None, found)).removesuffix(".")


def _cells(row: dict[str, Any]) -> list[str]:
    mixing = row["mixing"]
    calls, order = (w.dash(row[key]) for key in ("calls", "order"))
    cost = (order, str(row["stages"]), calls, w.dash(row["inverse"]))
    return [row["scheme"], *cost, "–" if mixing is None else f"{mixing:.2f}", row["source"]]
