"""`odenets evaluate`: the accuracy of a trained network, also on corrupted and attacked pictures."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from schemes import SchemeError

from ..evaluation.attacks import read_attack
from ..evaluation.corruptions import KINDS, STRENGTHS
from ..training.calibration import Calibration
from ..training.judge import Figures, Prediction, RealFigures, unread_of
from ..training.labelled import Labelled, read_classes, read_real
from ..training.robustness import attack_figures, corruption_figures, read_baseline, read_frost, size_figures
from ..training.trained import Trained
from . import words as w
from .network import common_parser, form_of, open_network, run_over

EVALUATE = """Says how often a network is right about labelled pictures, with Wilson's intervals, in all and by class.
Without FOLDER it takes the test pictures of the data that the network was trained on, as the checkpoint's configuration
says. Folders of some of its classes, such as ImageNet-A, -R and -Sketch, are matched by name; with --subset the network
chooses among these classes only.

Exit status: 0; 1 if a picture could not be read (the others are counted); 2 if nothing was evaluated."""


def run(args: Sequence[str]) -> None:
    """Runs one command line; errors that the user can fix end in two lines and exit status 2."""
    run_over("evaluate", run_evaluate, args)


def parser() -> w.Parser:
    """The options of `odenets evaluate`."""
    found = common_parser("odenets evaluate", EVALUATE, required=False)
    found.add_argument("paths", nargs="*", metavar="CKPT [FOLDER]", help="checkpoint (or --ckpt_path); class folders")
    add = found.add_argument
    add("--data.root", dest="root", default=None, metavar="FOLDER", help="the same as FOLDER")
    add("--split", default=None, help="test, val, ... (the test split, or else the validation split)")
    add("--confidence", type=w.share, default=0.95, help="level of the intervals (0.95)")
    add("--limit", type=w.positive, default=None, help="use this many pictures, evenly spread (all)")
    add("--seed", type=w.count, default=0, help="seed of corruptions and of attacks' random starts (0)")
    add("--classes", default=None, metavar="FILE", help="what the network's outputs are called, one name per line")
    add("--subset", action="store_true", help="choose among the classes that the pictures have")
    add("--real", default=None, metavar="FILE", help="ImageNet-Real's real.json: several right answers a picture")
    add("--calibration", nargs="?", type=w.positive, const=15, default=None, metavar="BINS", help="ECE, over 15 bins")
    add("--diagram", default=None, metavar="FILE", help="the reliability diagram, as FILE.png or .svg")
    add("--sizes", type=_sizes, default=None, metavar="160,192", help="accuracy at each of these sizes of the pictures")
    every = tuple(KINDS)
    add("--corruptions", nargs="?", type=_names, const=every, default=None, metavar="NAMES", help="all 15, or some")
    add("--strengths", type=_strengths, default=STRENGTHS, metavar="1,3,5", help="of the corruptions (all five)")
    add("--frost", default=None, metavar="FOLDER", help="photographs for frost; without them a texture is used")
    add("--baseline", default=None, metavar="FILE|alexnet", help="errors of another network, for the mCE")
    add("--attack", action="append", default=[], help='"fgsm(eps=8/255)", "pgd(8/255, steps=20, norm=l2)"; repeatable')
    return found


def _whole(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.removeprefix("-").isdecimal() for part in parts):
        raise w.argparse.ArgumentTypeError(f"{text}: want whole numbers with commas between them")
    return parts


def _sizes(text: str) -> list[int]:
    return [w.positive(part) for part in _whole(text)]


def _strengths(text: str) -> tuple[int, ...]:
    found = tuple(map(int, _whole(text)))
    if len(set(found)) < len(found) or not set(found) <= set(STRENGTHS):
        raise w.argparse.ArgumentTypeError(f"{text}: want some of 1 to 5, each once")
    return found


def _names(text: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in text.split(","))
    unknown = [name for name in found if name not in KINDS]
    if unknown or len(set(found)) < len(found):
        said = f"there is no corruption {unknown[0]!r}" if unknown else "one stands twice"
        raise w.argparse.ArgumentTypeError(f"{said}; there are {', '.join(KINDS)}")
    return found


def _options(args: Sequence[str]) -> Any:
    """The options, with `ckpt_path` and `folder` taken from the positional arguments; refuses what does not fit."""
    found = parser().parse(args)
    given = list(found.paths)
    if found.ckpt_path is None:
        if not given:
            raise SchemeError("no checkpoint given\n  odenets evaluate RUN/checkpoints/best.ckpt [FOLDER]")
        found.ckpt_path = given.pop(0)
    folders = [*given, *([found.root] if found.root else [])]
    if len(folders) > 1:
        raise SchemeError(f"one folder of pictures at a time, not {', '.join(folders)}\n  Call it for each.")
    found.folder = folders[0] if folders else None
    if found.classes is not None and found.folder is None:
        raise SchemeError("--classes is for a FOLDER of pictures\n  The run's own data know what they are called.")
    if found.corruptions is None:
        for name in ("frost", "baseline"):
            if getattr(found, name) is not None:
                raise SchemeError(f"--{name} is for --corruptions\n  Give both.")
    tables = [name for name in ("sizes", "corruptions", "attack") if getattr(found, name)]
    if form_of(found) == "csv":
        if len(tables) > 1:
            said = " and ".join(tables)
            raise SchemeError(f"CSV holds one table, not those of {said}\n  Give --json, or one of them.")
        for name in ("real", "calibration"):
            if getattr(found, name) is not None:
                raise SchemeError(f"CSV holds a table, and not the figure of --{name}\n  Give --json, or leave it out.")
    if found.diagram is not None:
        # The diagram is drawn from the bins, so it implies --calibration.
        found.calibration = found.calibration or 15
        if not found.diagram.lower().endswith((".png", ".svg", ".pdf")):
            raise SchemeError(f"--diagram {found.diagram}\n  Want a name that ends in .png, .svg or .pdf.")
    return found


def run_evaluate(args: Sequence[str]) -> list[Prediction]:
    """Runs `odenets evaluate`; returns the pictures that could not be read."""
    options = _options(args)
    form = form_of(options)
    # Everything that can be refused is refused before a picture is read.
    options.attacks = [read_attack(text) for text in options.attack]
    options.photographs = read_frost(options.frost) if options.frost else []
    options.base = read_baseline(options.baseline) if options.baseline else None
    trained = open_network(options)
    if options.classes:
        trained = replace(trained, classes=read_classes(options.classes, len(trained.classes)))
    pictures = Labelled(trained, options.folder, options.split, None, options.limit)
    figures = _figures(trained, pictures, options)
    if form == "json":
        w.write(w.as_json(figures), options.output)
    elif form == "csv":
        rows = _rows(figures)
        w.write(w.as_csv(rows, list(rows[0])), options.output)
    else:
        _show(figures)
    if options.diagram:
        from .. import plots

        path = plots.reliability(figures["calibration"]["bins"], options.diagram, figures["data"])
        # Not behind JSON or CSV, which another program reads.
        if form == "table" or options.output is not None:
            print(path)
    return unread_of(pictures)


def _figures(trained: Trained, pictures: Labelled, options: Any) -> dict[str, Any]:
    """All requested figures, as plain values."""
    counts, real = Figures(trained.classes, options.confidence), None
    if options.real:
        real = RealFigures(read_real(options.real), trained.classes, options.confidence)
    calibration = None if options.calibration is None else Calibration(options.calibration)
    others = _others(trained, pictures) if options.subset else None
    # In the network itself, so that the passes below choose among the subset too, and attacks are on that choice.
    trained = replace(trained, others=others)
    work = {"batch_size": options.batch_size, "num_workers": options.num_workers}
    # One pass serves all of these; sizes, corruptions and attacks change the pictures, and take passes of their own.
    for numbers, x, labels in pictures.batches(**work):
        probabilities = trained.probabilities(x)
        # Below 0, so that none of them is among the best five in place of one whose probability underflows to 0.
        counts.add(probabilities if others is None else probabilities.masked_fill(others, -1.0), labels)
        if real is not None:
            real.add(probabilities, [pictures.name(i) for i in numbers])
        if calibration is not None:
            calibration.add(probabilities, labels)
    found: dict[str, Any] = {"data": pictures.where, **counts.checked(pictures.where)}
    if others is not None:
        found["subset"] = len(trained.classes) - int(others.sum())
    if real is not None:
        found["real"] = real.summary()
    if calibration is not None:
        found["calibration"] = calibration.summary()
    if options.sizes:
        where = options.folder, options.split, options.confidence, options.limit
        found["sizes"] = size_figures(trained, options.sizes, *where, **work)
    if options.corruptions:
        chosen = options.corruptions, options.strengths, options.seed, options.photographs, options.base
        work["progress"] = _progress("corruptions", len(pictures))
        found["corruptions"] = corruption_figures(trained, pictures, *chosen, **work)
    if options.attacks:
        work["progress"] = _progress("attacks", len(pictures))
        found["attacks"] = attack_figures(trained, pictures, options.attacks, options.confidence, options.seed, **work)
    return found


def _others(trained: Trained, pictures: Labelled) -> torch.Tensor:
    """The mask of the classes that the pictures do not have."""
    others = torch.ones(len(trained.classes), dtype=torch.bool)
    others[pictures.labels.unique()] = False
    return others


def _progress(what: str, count: int) -> Callable[[int], None] | None:
    """Returns a callback that shows on a terminal how far the slow parts are."""
    # In a log file, a line that is overwritten again and again becomes endlessly long.
    if not sys.stderr.isatty():
        return None

    def say(done: int) -> None:
        # chr(10), since before Python 3.12 an expression in an f-string cannot contain a backslash.
        sys.stderr.write(f"\r{what}: {done:,} of {count:,} pictures{chr(10) if done >= count else ''}")
        sys.stderr.flush()

    return say


class _Part(NamedTuple):
    """A table of some figures.

    Attributes:
        title: Text above the table.
        rows: Its rows, as shown and as written to CSV.
    """

    title: str
    rows: list[dict[str, Any]]


def _parts(figures: Mapping[str, Any]) -> list[_Part]:
    """Tables of what was requested besides the classes."""
    found = []
    if "sizes" in figures:
        found.append(_Part("by size of the pictures", [_flat(row) for row in figures["sizes"]]))
    if "corruptions" in figures:
        held = figures["corruptions"]
        rows: list[dict[str, Any]] = []
        for name, errors in held["errors"].items():
            mark = " (texture)" if name == "frost" and held["frost"] == "texture" else ""
            row: dict[str, Any] = {"corruption": f"{name}{mark}"}
            row |= {f"error_{s}": e for s, e in zip(held["strengths"], errors, strict=True)}
            row["mean"] = sum(errors) / len(errors)
            if "ce" in held:
                row |= {"ce": held["ce"].get(name), "relative_ce": held["relative"].get(name)}
            rows.append(row)
        found.append(_Part(f"errors under corruptions, constants of {held['protocol']}-c", rows))
    if "attacks" in figures:
        found.append(_Part("attacked pictures", [_flat(row) for row in figures["attacks"]]))
    return found


def _rows(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows for CSV: of the one table that was requested besides the classes, else of the classes."""
    parts = _parts(figures)
    return parts[0].rows if parts else [_flat(row) for row in figures["classes"]]


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    low, high = row["accuracy"]["interval"]
    return {**row, "accuracy": row["accuracy"]["value"], "accuracy_low": low, "accuracy_high": high}


def _show(figures: Mapping[str, Any]) -> None:
    rows = [(name, _shown(figures[name])) for name in ("accuracy", "top5") if name in figures]
    rows += [(name, f"{figures[name]:.4f}") for name in ("mean_class_accuracy", "loss")]
    if "real" in figures:
        rows.append((f"real accuracy, {figures['real']['pictures']:,} pictures", _shown(figures["real"]["accuracy"])))
    if "calibration" in figures:
        rows.append(("expected calibration error", f"{figures['calibration']['ece']:.4f}"))
    if "corruptions" in figures:
        rows += _corruption_rows(figures["corruptions"])
    among = f", among {figures['subset']} classes" if "subset" in figures else ""
    level = f"{100 * figures['confidence']:g} %"
    w.show(
        f"{figures['data']}: {figures['pictures']:,} pictures{among}, intervals of {level}", ["figure", "value"], rows
    )
    parts = _parts(figures)
    for part in parts:
        columns = list(part.rows[0])
        shown = [[f"{v:.4f}" if isinstance(v, float) else v for v in row.values()] for row in part.rows]
        w.show(part.title, [c.replace("_", " ") for c in columns], shown, [c.replace("_", " ") for c in columns[1:]])
    if not parts:
        _show_classes(figures["classes"])


def _corruption_rows(held: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("mean error under corruptions", f"{held['mean']:.4f}")]
    if "mce" in held:
        without = f", without {held['left_out'][0]}" if held["left_out"] else ""
        for key, name in (("mce", "mCE"), ("relative_mce", "relative mCE")):
            value = "" if held[key] is None else f"{100 * held[key]:.2f} %"
            rows.append((f"{name} over {held['baseline']}{without}", value))
    return rows


def _show_classes(classes: Sequence[Mapping[str, Any]]) -> None:
    columns = ["class", "pictures", "accuracy", "predicted", "precision", "taken for"]
    shown = [
        (
            *(row["class"], row["pictures"], _shown(row["accuracy"]), row["predicted"]),
            *("" if row["precision"] is None else f"{row['precision']:.4f}", row["taken_for"]),
        )
        for row in classes
    ]
    w.show("", columns, shown, ("pictures", "predicted", "precision"))


def _shown(figure: Mapping[str, Any]) -> str:
    low, high = figure["interval"]
    return "" if figure["value"] is None else f"{figure['value']:.4f}  [{low:.4f}, {high:.4f}]"
