"""`odenets predict` and `odenets evaluate`: what a trained network says of pictures, by its checkpoint alone."""

import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from schemes import SchemeError

from ..messages import fail
from ..training.judge import Prediction, evaluate, pictures_at, predict
from ..training.sources import DataError
from ..training.trained import Trained, open_trained
from . import words as w

PREDICT = """Names the most likely classes of pictures. The checkpoint knows the network, its classes, and how pictures
are brought to it; no configuration is needed. (With -c FILE it is Lightning's predict, over the data of FILE.)

Exit status: 0; 1 where a picture could not be read (the others are written); 2 where nothing was predicted."""
EVALUATE = """How often a network is right about labelled pictures, with intervals (Wilson's), of all and of each class.
Without FOLDER, the test pictures of the data that it was trained on, by the checkpoint's own configuration.

Exit status: 0; 1 where a picture could not be read (the others are counted); 2 where nothing was evaluated."""


def _parser(prog: str, text: str) -> w.Parser:
    found = w.Parser(prog=prog, description=text)
    found.add_argument("--ckpt_path", required=True, metavar="FILE", help="checkpoint of a run")
    found.add_argument("--json", action="store_true", help="print JSON")
    found.add_argument("--csv", action="store_true", help="print CSV")
    found.add_argument("--output", type=w.output_file, metavar="FILE", help="write FILE.csv or FILE.json instead")
    found.add_argument("--batch_size", type=w.positive, default=64, help="pictures at a time (64)")
    found.add_argument("--num_workers", type=w.count, default=0, help="processes that decode (0: this one)")
    found.add_argument("--device", default=None, help="cpu, cuda, ...; a GPU where there is one")
    return found


def _open(options: Any) -> Trained:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise SchemeError(f"--device {device}: {str(e).splitlines()[0][:150]}\n  Give another: --device cpu") from None
    return open_trained(Path(options.ckpt_path), device)


def _form(options: Any) -> str:
    if options.json and options.csv:
        raise SchemeError("--json and --csv exclude each other\n  Give one of them.")
    if options.output is not None:
        return options.output.suffix.lower()[1:]
    return "json" if options.json else "csv" if options.csv else "table"


def run(name: str, args: Sequence[str]) -> None:
    """Runs one command line; errors that the user can mend end in two lines and exit status 2."""
    try:
        unread = {"predict": run_predict, "evaluate": run_evaluate}[name](args)
    except (SchemeError, DataError) as e:
        fail(str(e), f"odenets {name} --help shows how it is used")
    except BrokenPipeError:
        w.closed_output()
        return
    for prediction in unread:
        sys.stderr.write(f"{prediction.name} cannot be read: {prediction.error}\n")
    if unread:
        sys.exit(1)


def predict_command(args: Sequence[str]) -> None:
    """`odenets predict`, over pictures."""
    run("predict", args)


def evaluate_command(args: Sequence[str]) -> None:
    """`odenets evaluate`."""
    run("evaluate", args)


def predict_parser() -> w.Parser:
    """The options of `odenets predict`, over pictures."""
    parser = _parser("odenets predict", PREDICT)
    parser.add_argument("paths", nargs="+", metavar="FILE|FOLDER", help="pictures, folders of them, parquet, tar")
    parser.add_argument("--top", type=w.positive, default=5, help="classes per picture (5)")
    return parser


def run_predict(args: Sequence[str]) -> list[Prediction]:
    """`odenets predict`; the pictures that could not be read."""
    options = predict_parser().parse(args)
    form = _form(options)
    source, notes = pictures_at(options.paths)
    trained = _open(options)
    for note in notes:
        sys.stderr.write(f"{note}\n")
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
    return {**dict(zip(_columns(len(p.classes) or 1)[:-1], [p.name, *cells], strict=False)), "error": p.error}


def evaluate_parser() -> w.Parser:
    """The options of `odenets evaluate`."""
    parser = _parser("odenets evaluate", EVALUATE)
    parser.add_argument("folder", nargs="?", default=None, metavar="FOLDER", help="a folder per class, parquet, tar")
    parser.add_argument("--split", default=None, help="test, val, ...; the test split, else the validation split")
    parser.add_argument("--confidence", type=w.share, default=0.95, help="of the intervals (0.95)")
    return parser


def run_evaluate(args: Sequence[str]) -> list[Prediction]:
    """`odenets evaluate`; the pictures that could not be read."""
    options = evaluate_parser().parse(args)
    form = _form(options)
    trained = _open(options)
    chosen = options.folder, options.split, options.confidence, options.batch_size, options.num_workers
    figures, unread = evaluate(trained, *chosen)
    if form == "json":
        w.write(w.as_json(figures), options.output)
    elif form == "csv":
        rows = [_flat(row) for row in figures["classes"]]
        w.write(w.as_csv(rows, list(rows[0])), options.output)
    else:
        _show(figures)
    return unread


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    low, high = row["accuracy"]["interval"]
    return {**row, "accuracy": row["accuracy"]["value"], "accuracy_low": low, "accuracy_high": high}


def _show(figures: Mapping[str, Any]) -> None:
    rows = [(name, _shown(figures[name])) for name in ("accuracy", "top5") if name in figures]
    rows += [(name, f"{figures[name]:.4f}") for name in ("mean_class_accuracy", "loss")]
    level = f"{100 * figures['confidence']:g} %"
    w.show(f"{figures['data']}: {figures['pictures']:,} pictures, intervals of {level}", ["figure", "value"], rows)
    columns = ["class", "pictures", "accuracy", "predicted", "precision", "taken for"]
    shown = [
        (
            *(row["class"], row["pictures"], _shown(row["accuracy"]), row["predicted"]),
            *("" if row["precision"] is None else f"{row['precision']:.4f}", row["taken_for"]),
        )
        for row in figures["classes"]
    ]
    w.show("", columns, shown, ("pictures", "predicted", "precision"))


def _shown(figure: Mapping[str, Any]) -> str:
    low, high = figure["interval"]
    return "" if figure["value"] is None else f"{figure['value']:.4f}  [{low:.4f}, {high:.4f}]"
