"""`odenets predict`: classifies pictures with a trained network, from its checkpoint alone."""

import sys
from collections.abc import Sequence
from itertools import islice
from typing import Any

from schemes import SchemeError

from ..training.judge import Prediction, pictures_at, predict
from . import words as w
from .network import common_parser, form_of, open_network, run_over

PREDICT = """Names the most likely classes of pictures. The checkpoint holds the network, its classes, and how pictures
are prepared; no configuration is needed. (With --ckpt_path alone, or with options of a run such as -c and --data.*, it
is Lightning's predict: over the test pictures of the run's data, or those of the configuration.)

Exit status: 0; 1 if a picture could not be read (the others are written); 2 if nothing was predicted."""


def run(args: Sequence[str]) -> None:
    """Runs one command line; errors that the user can fix end in two lines and exit status 2."""
    run_over("predict", run_predict, args)


def parser() -> w.Parser:
    """The options of `odenets predict`, over pictures."""
    found = common_parser("odenets predict", PREDICT, required=False)
    what = "checkpoint (or --ckpt_path); pictures, folders of them, parquet, tar"
    found.add_argument("paths", nargs="*", metavar="CKPT FILE|FOLDER", help=what)
    found.add_argument("--top", type=w.positive, default=5, help="classes per picture (5)")
    return found


def run_predict(args: Sequence[str]) -> list[Prediction]:
    """Runs `odenets predict`; returns the pictures that could not be read."""
    options = _options(args)
    form = form_of(options)
    # Before the network is opened, which takes longer than reporting a missing path.
    source, notes = pictures_at(options.paths)
    trained = open_network(options)
    for note in notes:
        sys.stderr.write(f"{note}\n")
    # All of them before the first is written: a file of predictions is complete, or does not exist.
    found = list(predict(trained, source, options.top, options.batch_size, options.num_workers))
    most = min(options.top, len(trained.classes))
    if form == "json":
        w.write(w.as_json([_entry(p) for p in found]), options.output)
    elif form == "csv":
        w.write(w.as_csv([_row(p) for p in found], _columns(most)), options.output)
    else:
        lines = [[p.name, *(f"{c} {100 * v:.1f} %" for c, v in islice(_pairs(p), most))] for p in found if not p.error]
        w.show("", ["picture", *(f"{n}." for n in range(1, most + 1))], lines)
    return [p for p in found if p.error]


def _options(args: Sequence[str]) -> Any:
    """The options, with `ckpt_path` taken from the positional arguments, as `odenets evaluate` reads them."""
    found = parser().parse(args)
    if found.ckpt_path is None and found.paths:
        found.ckpt_path = found.paths.pop(0)
    if not found.paths:
        lacking = "pictures" if found.ckpt_path else "checkpoint"
        usage = "odenets predict CKPT FILE|FOLDER..., or --ckpt_path CKPT FILE|FOLDER..."
        raise SchemeError(f"no {lacking} given\n  {usage}")
    return found


def _pairs(p: Prediction) -> list[tuple[str, float]]:
    return list(zip(p.classes, p.probabilities, strict=True))


def _entry(p: Prediction) -> dict[str, Any]:
    ranked = [{"class": name, "probability": value} for name, value in _pairs(p)]
    return {"name": p.name, "predictions": ranked, **({"error": p.error} if p.error else {})}


def _columns(most: int) -> list[str]:
    """As in the `predictions.csv` of Lightning's predict."""
    titles = [("class", "probability"), *((f"class_{n}", f"probability_{n}") for n in range(2, most + 1))]
    return ["name", *(title for pair in titles for title in pair), "error"]


def _row(p: Prediction) -> dict[str, Any]:
    cells = [cell for name, value in _pairs(p) for cell in (name, f"{value:.6f}")]
    # Not strict: a picture that could not be read has no cells.
    return {**dict(zip(_columns(len(p.classes) or 1)[:-1], [p.name, *cells], strict=False)), "error": p.error}
