"""`odenets analyse`: figures of a trained network, and of files of results."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from schemes import SchemeError

from .. import plots
from ..messages import fail
from ..training.analyse import ENDINGS
from ..training.analyse import parser as parser
from . import words as w

COST = """Draws error against parameters and multiply-adds, for the networks in files of results: the SQLite file of a
study, the runs.json of a comparison (the last val/acc), or CSV with a row per network: name, error or accuracy from 0
to 1, parameters, macs, group.

Exit status: 0; 2 if nothing was drawn."""


def run(args: Sequence[str]) -> None:
    """Runs one command line; errors that the user can fix end in two lines and exit status 2."""
    if "cost" not in args:
        from ..training.analyse import run as run_analyse

        return run_analyse(args)
    found = w.Parser(prog="odenets analyse FILE... cost", description=COST)
    found.add_argument("files", nargs="+", metavar="FILE", help="files of results, then the word cost")
    found.add_argument("--out", default="cost.png", metavar="FILE", help="the figure: .png, .svg or .pdf (cost.png)")
    # The word `cost` comes after the files, so the parser takes it for one of them.
    options = found.parse(args)
    try:
        print(draw([name for name in options.files if name != "cost"], options.out))
    except (SchemeError, ImportError) as error:
        fail(str(error), "odenets analyse cost --help shows how it is used")
    return None


def draw(files: Sequence[str], out: str) -> Path:
    """Draws the figure of some files of results.

    Raises:
        SchemeError: No file, one of unknown kind, or one without a trained network.
    """
    if not out.lower().endswith(ENDINGS):
        raise SchemeError(f"--out {out}: want a name that ends in {', '.join(ENDINGS)}")
    if not files:
        raise SchemeError("no file of results given\n  odenets analyse FILE.sqlite|runs.json|FILE.csv cost")
    points: list[dict[str, Any]] = []
    for name in files:
        found = read_points(Path(name))
        if not found:
            raise SchemeError(f"{name}: no trained network in it has an error and a cost\n  Give another file.")
        # Groups of different files may have the same name, such as a scheme's.
        points += [{**p, "group": f"{Path(name).stem}: {p['group']}"} for p in found] if len(files) > 1 else found
    return plots.cost(points, out, f"{len(points)} networks")


def read_points(path: Path) -> list[dict[str, Any]]:
    """Reads error, parameters, multiply-adds and group of each trained network in a file.

    Raises:
        SchemeError: The file cannot be read, or is of unknown kind.
    """
    if not path.is_file():
        raise SchemeError(f"there is no file {str(path)!r}\n  Give results: FILE.sqlite, runs.json or FILE.csv.")
    readers = {".sqlite": _of_study, ".json": _of_comparison, ".csv": _of_table}
    if path.suffix not in readers:
        raise SchemeError(f"{path}: results are read from {', '.join(readers)}\n  Give one of these.")
    return readers[path.suffix](path)


def _of_study(path: Path) -> list[dict[str, Any]]:
    # Imported here: the file of a study needs an extra, and CSV does not.
    from ..study.store import TRAINED, read

    _, lines = read(path)
    return [
        {"group": line["scheme"], "error": 1 - line["accuracy"], "parameters": line["params"], "macs": line["macs"]}
        for line in lines
        if line["status"] == TRAINED
    ]


def _of_comparison(path: Path) -> list[dict[str, Any]]:
    from ..study.comparison_report import find
    from ..study.store import TRAINED

    found = []
    for line in find(path).lines:
        # Not every epoch is validated: --trainer.check_val_every_n_epoch.
        judged = [epoch["val/acc"] for epoch in line["epochs"] if "val/acc" in epoch]
        if line["status"] == TRAINED and judged and line["parameters"]:
            # A comparison does not count multiply-adds.
            costs = {"parameters": line["parameters"], "macs": None}
            found.append({"group": line["cell"], "error": 1 - judged[-1], **costs})
    return found


def _of_table(path: Path) -> list[dict[str, Any]]:
    found = []
    try:
        # Spreadsheets begin UTF-8 with a mark, which would be a part of the first column's name.
        with path.open(encoding="utf-8-sig", newline="") as file:
            # From 2, since the header is line 1.
            for number, row in enumerate(csv.DictReader(file), 2):
                found.append(_point(row, number))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise SchemeError(f"{path} cannot be read: {e}\n  Give CSV with a header.") from None
    except (KeyError, ValueError, TypeError) as e:
        said = f"there is no column {e}" if isinstance(e, KeyError) else str(e)
        raise SchemeError(f"{path}: {said}\n  Columns: name, error or accuracy, parameters, macs, group.") from None
    return [p for p in found if p["parameters"] or p["macs"]]


def _point(row: dict[str, str], number: int) -> dict[str, Any]:
    error = float(row["error"]) if row.get("error") else 1 - float(row["accuracy"])
    if not 0 <= error <= 1:
        raise ValueError(f"line {number}: error {error:g} is not between 0 and 1; write 0.05 for 5 per cent")
    costs = {key: float(row[key]) if row.get(key) else None for key in ("parameters", "macs")}
    for key, cost in costs.items():
        # Written so that NaN is refused too.
        if cost is not None and not 0 < cost < math.inf:
            raise ValueError(f"line {number}: {key} {cost:g} is no finite number above 0")
    return {"group": row.get("group") or row.get("name") or "", "error": error, **costs}
