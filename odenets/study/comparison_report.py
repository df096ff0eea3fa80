"""The report of a comparison, at any time: one table of cells, the runs that did not end well, and figures.

Cells are compared with a baseline by pairs of runs with the same seed. Runs that ended in any other way than trained
are left out of means and differences, and are counted and named separately.
"""

import json
import math
import statistics as medians
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from schemes import SchemeError

from ..training.files import write_whole
from .comparison import FILE, folder_of
from .runs import RUNS, Outcome, Run, outcome_of
from .statistics import Paired, in_cell, interval_text, markdown, mean, paired, spread
from .store import TRAINED, read

Line = dict[str, Any]
EXPORT = "runs.json"
# What a file holds of each run; which machine did the work is not a result.
FIELDS = {f.name for kind in (Run, Outcome) for f in fields(kind)} - {"worker"}
STATUSES = (TRAINED, "diverged", "failed", "unfinished", "missing")


class Found(NamedTuple):
    """The contents of a comparison.

    Attributes:
        settings: what all runs have in common, and "plan".
        lines: a mapping for each run of the plan, in order: the fields of Run and Outcome except the worker. For a run
            that has not ended, "status" is "unfinished", with the epochs so far, or "missing".
    """

    settings: dict[str, Any]
    lines: list[Line]

    @property
    def cells(self) -> list[str]:
        """Names of the cells, in the order of the plan."""
        return list(self.settings["plan"])

    def of(self, cell: str, *statuses: str) -> list[Line]:
        """Returns the runs of a cell, or those of them with one of the given statuses.

        Args:
            cell: the name of the cell.
            *statuses: such as ``failed``; all runs if none is given.
        """
        return [line for line in self.lines if line["cell"] == cell and (not statuses or line["status"] in statuses)]


def find(path: str | Path) -> Found:
    """Reads the folder of a comparison, or a file that a report has written.

    Args:
        path: the folder, during the runs or after them; or ``runs.json``.

    Raises:
        SchemeError: the path is neither of them.
    """
    path = Path(path)
    if path.is_dir():
        return _of_folder(path)
    problem = "it is not whole"
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        found = Found(held["settings"], held["runs"])
        whole = found.cells and isinstance(found.settings["experiment"], str)
        whole = whole and all(FIELDS <= line.keys() and isinstance(line["epochs"], list) for line in found.lines)
        if whole and {line["cell"] for line in found.lines} <= {*found.cells}:
            return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = type(error).__name__
    raise SchemeError(
        f"{path} is neither the folder of a comparison nor a file that its report wrote ({problem})\n"
        f"  Give what --dir was, or its report/{EXPORT}."
    )


def _of_folder(folder: Path) -> Found:
    if not (folder / FILE).is_file():
        raise SchemeError(f"{folder} holds no comparison: there is no {FILE} in it\n  Give what --dir was.")
    settings, found = read(folder / FILE, RUNS)
    recorded = {line["name"]: line for line in found}
    lines = []
    # By the plan, not by the rows of the file: a run that has not begun must show as missing.
    for cell, about in settings["plan"].items():
        for seed in about["seeds"]:
            run = Run(f"{cell}, seed {seed}", cell, seed, about["options"])
            line = recorded.get(run.name)
            if line is None:
                outcome = outcome_of(folder_of(folder, run), "unfinished")
                line = {**asdict(run), **asdict(outcome), "status": "unfinished" if outcome.epochs else "missing"}
            lines.append({name: value for name, value in line.items() if name in FIELDS})
    return Found(settings, lines)


def export(found: Found, path: Path) -> None:
    """Writes all that is known as JSON, one line per run, so that versions of the file differ where runs do.

    Args:
        found: the runs of a comparison.
        path: the JSON file.
    """
    runs = ",\n".join(json.dumps(line) for line in found.lines)
    text = f'{{"settings": {json.dumps(found.settings, indent=1)},\n"runs": [\n{runs}\n]}}\n'
    write_whole(path, text.encode())


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        cell: its name.
        counts: runs by status, in the order of STATUSES.
        figures: the metric after the last epoch that has it, by seed, of runs that were trained.
        pairs: differences from the baseline; None for the baseline itself, and if no seed is in both.
        reached: the number of epochs until the target was reached, by seed; None if it never was.
    """

    cell: str
    counts: tuple[int, ...]
    figures: dict[int, float]
    pairs: Paired | None
    reached: dict[int, int | None]


def better(metric: str, value: float, target: float) -> bool:
    """Whether a value is as good as a target: at least as high, or at least as low if the metric is a loss.

    Args:
        metric: its name; a lower loss is better.
        value: the value that a run reached.
        target: the value to reach.
    """
    return value <= target if metric.endswith("loss") else value >= target


def rows_of(
    found: Found, metric: str = "val/acc", baseline: str | None = None, target: float = 0.5, confidence: float = 0.95
) -> list[Row]:
    """Returns the lines of the table.

    Args:
        found: the result of ``find``.
        metric: a figure that is logged after each epoch.
        baseline: the cell that the others are compared with; None takes the first.
        target: target for ``reached``.
        confidence: level of the intervals.

    Raises:
        SchemeError: the baseline is not a cell.
    """
    baseline = found.cells[0] if baseline is None else baseline
    if baseline not in found.cells:
        raise SchemeError(f"there is no cell {baseline!r} to be the baseline\n  Cells: {'; '.join(found.cells)}")
    figures = {cell: _figures(found, cell, metric) for cell in found.cells}
    rows = []
    for cell in found.cells:
        counts = tuple(len(found.of(cell, status)) for status in STATUSES)
        pairs = None
        if cell != baseline:
            pairs = paired(figures[baseline], figures[cell], confidence, len(found.cells) - 1)
        # With runs that diverged: they may have reached the target before, and omitting them would flatter their cell.
        reached = {line["seed"]: _reached(line, metric, target) for line in found.of(cell, TRAINED, "diverged")}
        rows.append(Row(cell, counts, figures[cell], pairs, reached))
    return rows


def _figures(found: Found, cell: str, metric: str) -> dict[int, float]:
    # Not every epoch is validated: --trainer.check_val_every_n_epoch.
    judged = {line["seed"]: [e[metric] for e in line["epochs"] if metric in e] for line in found.of(cell, TRAINED)}
    return {seed: values[-1] for seed, values in judged.items() if values}


def _reached(line: Line, metric: str, target: float) -> int | None:
    at = (n for n, epoch in enumerate(line["epochs"], 1) if metric in epoch and better(metric, epoch[metric], target))
    return next(at, None)


def usual_target(found: Found, metric: str, baseline: str | None = None) -> float | None:
    """Returns the most demanding multiple of 0.05 that every trained run of the baseline reached.

    None if there is no target: without runs, or if it would be an accuracy of zero, which all reach.

    The baseline alone decides, so that the target favours none of the other cells.

    Args:
        found: the runs of a comparison.
        metric: the figure that is compared.
        baseline: the cell that decides; None: the first.
    """
    ended = found.of(baseline or found.cells[0], TRAINED)
    reached = [[epoch[metric] for epoch in line["epochs"] if metric in epoch] for line in ended]
    if not reached or not all(reached):
        return None
    # The billionth absorbs the rounding of the product, so that a multiple of 0.05 is its own target.
    if metric.endswith("loss"):
        return round(math.ceil(max(map(min, reached)) * 20 - 1e-9) / 20, 2)
    target = round(math.floor(min(map(max, reached)) * 20 + 1e-9) / 20, 2)
    return None if target == 0 else target


def table_of(found: Found, metric: str = "val/acc", baseline: str | None = None, target: float | None = None) -> str:
    """Returns the report's table, with 95 % intervals, and below it the runs that did not end well.

    Args:
        found: the runs of a comparison.
        metric: the figure that is compared.
        baseline: the cell to compare with; None: the first.
        target: target of the column of epochs; None: the usual one.
    """
    target = usual_target(found, metric, baseline) if target is None else target
    base, others = baseline or found.cells[0], len(found.cells) - 1
    share = metric.endswith(("acc", "acc5"))
    factor, digits = (100, 2) if share else (1, 4)
    lines = []
    for row in rows_of(found, metric, baseline, 0.0 if target is None else target):
        ended, values = found.of(row.cell, TRAINED), list(row.figures.values())
        text = f"{factor * mean(values):.{digits}f}" if values else "–"
        text += f" ± {factor * spread(values):.{digits}f}" if len(values) > 1 else ""
        pairs, alone, together, visible = _paired_cells(row.pairs, factor, digits)
        line = [row.cell, _counts(row.counts), text, pairs, alone, *([together] if others > 1 else []), visible]
        line += [_one_of({run[name] for run in ended}) for name in ("parameters", "evaluations")]
        line.append(" / ".join(_minutes([run[name] for run in ended]) for name in ("cpu_s", "wall_s")))
        lines.append(line if target is None else [*line, _epochs(row.reached)])
    points = ", points" if share else ""
    head = f"cell | runs | {metric}{', %' if share else ''} | pairs | less {in_cell(base)}{points} [95 %]"
    head += f" | [all {others} at once] | visible" if others > 1 else " | visible"
    head += " | parameters | evaluations | minutes, CPU / clock"
    return markdown(head + ("" if target is None else f" | epochs to {target:g}"), lines) + _ends(found)


def _counts(counts: Sequence[int]) -> str:
    """The number of runs that were trained, and of all others by status."""
    others = [f"{n} {status}" for n, status in zip(counts[1:], STATUSES[1:], strict=True) if n]
    return ", ".join([str(counts[0]), *others])


def _paired_cells(pairs: Paired | None, factor: float, digits: int) -> list[str]:
    if pairs is None:
        return ["–"] * 4
    if pairs.interval is None or pairs.together is None or pairs.visible is None:
        return [str(pairs.pairs), f"{factor * pairs.mean:+.{digits}f}", "–", "–"]
    together = interval_text(pairs.together, factor, digits).partition(" ")[2]
    return [
        str(pairs.pairs),
        interval_text(pairs.interval, factor, digits),
        together,
        f"{factor * pairs.visible:.{digits}f}",
    ]


def _one_of(values: set[Any]) -> str:
    """A figure that all runs of a cell share; the ends of its range if they do not."""
    known = sorted(value for value in values if value is not None)
    return "–" if not known else " to ".join(f"{value:,.0f}" for value in sorted({known[0], known[-1]}))


def _minutes(seconds: Sequence[float | None]) -> str:
    known = [s for s in seconds if s is not None]
    return f"{mean(known) / 60:.1f}" if known else "–"


def _epochs(reached: Mapping[int, int | None]) -> str:
    """The median number of epochs, runs that never reached the target counted as slowest, and how many reached it."""
    if not reached:
        return "–"
    # The higher of the two in the middle: their mean would be infinite if one of them never reached the target.
    middle = medians.median_high([float("inf") if n is None else n for n in reached.values()])
    there = sum(n is not None for n in reached.values())
    text = "never" if middle == float("inf") else f"{middle:g}"
    return text if there == len(reached) else f"{text} ({there} of {len(reached)})"


def _ends(found: Found) -> str:
    """The runs that failed or diverged, with their errors."""
    bad = [line for line in found.lines if line["status"] in ("diverged", "failed")]
    said = (f"- {line['name']}: {line['status']} after {len(line['epochs'])} epochs; {line['error']}\n" for line in bad)
    return "".join(["\n", *said]) if bad else ""


def hours(found: Found) -> tuple[float, float]:
    """Returns the hours of processor time and of wall-clock time that all runs took, including unfinished ones.

    Args:
        found: the runs of a comparison.
    """
    cpu, wall = (sum(line[name] or 0.0 for line in found.lines) for name in ("cpu_s", "wall_s"))
    return cpu / 3600, wall / 3600


def heading(found: Found) -> str:
    """Returns one line: the experiment, how many cells and runs, how many runs have ended, and the time they took.

    Args:
        found: the runs of a comparison.
    """
    ended = sum(line["status"] in ("trained", "diverged", "failed") for line in found.lines)
    cpu, wall = hours(found)
    return (
        f"{found.settings['experiment']}: {len(found.cells)} cells, {ended} of {len(found.lines)} runs have ended; "
        f"{cpu:.2f} hours of processor time, {wall:.2f} of the clock"
    )


def print_report(
    path: str | Path,
    out: str | Path | None = None,
    metric: str = "val/acc",
    baseline: str | None = None,
    target: float | None = None,
) -> None:
    """Prints the table, and writes it with all figures.

    Args:
        path: as in ``find``.
        out: folder for ``table.md``, ``runs.json`` and the pictures; None takes ``report`` inside a comparison's
            folder, and writes nothing for a file.
        metric: a figure that is logged after each epoch.
        baseline: the cell that the others are compared with; None takes the first.
        target: target of the column of epochs; None takes one that the baseline's runs reach.

    Raises:
        SchemeError: no such folder or file, or no such cell.
    """
    found = find(path)
    out = Path(path) / "report" if out is None and Path(path).is_dir() else out
    if out is not None:
        try:
            Path(out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SchemeError(
                f"{out} cannot be written to: {error.strerror or error}\n  Give a folder: --out FOLDER"
            ) from None
    # The slash distinguishes measured figures from "epoch" and "evaluations".
    logged = sorted({name for line in found.lines for epoch in line["epochs"] for name in epoch if "/" in name})
    if logged and metric not in logged:
        raise SchemeError(f"no run has logged {metric!r}\n  Logged are {', '.join(logged)}.")
    text = f"# {heading(found)}\n\n{table_of(found, metric, baseline, target)}"
    print(text)
    if out is None:
        return
    write_whole(Path(out) / "table.md", text.encode())
    export(found, Path(out) / EXPORT)
    target = usual_target(found, metric, baseline) if target is None else target
    for picture in draw(found, Path(out), metric, target):
        print(picture)


def draw(found: Found, out: Path, metric: str, target: float | None) -> list[Path]:
    """Writes the figures of a comparison; returns their paths.

    Args:
        found: the result of ``find``.
        out: the folder.
        metric: a figure that is logged after each epoch.
        target: target of the third figure; None leaves that figure out.
    """
    from .. import plots

    epochs, costs, ends = {}, {}, {}
    for cell in found.cells:
        curves = [_curve(line, metric) for line in found.of(cell, TRAINED, "diverged", "unfinished")]
        curves = [curve for curve in curves if curve]
        if curves:
            epochs[cell] = [[(epoch, value) for epoch, _, value in curve] for curve in curves]
            costs[cell] = [[(cost, value) for _, cost, value in curve if cost is not None] for curve in curves]
            bad = [_curve(line, metric) for line in found.of(cell, "diverged")]
            ends[cell] = [(curve[-1][0], curve[-1][2]) for curve in bad if curve]
    if not epochs:
        return []
    paths = [plots.bands(epochs, out / "curves.png", "epochs", metric, ends)]
    if any(curve for curves in costs.values() for curve in curves):
        label = "evaluations of residual functions in training, 10⁶"
        paths.append(plots.bands(costs, out / "evaluations.png", label, metric))
    if target is not None:
        reached = {row.cell: list(row.reached.values()) for row in rows_of(found, metric, target=target)}
        reached = {cell: values for cell, values in reached.items() if values}
        paths.append(plots.strips(reached, out / "epochs.png", f"epochs until {metric} is {target:g}"))
    return paths


def _curve(line: Line, metric: str) -> list[tuple[int, float | None, float]]:
    """(epochs, millions of evaluations so far, value) after each epoch that has the metric."""
    found = []
    spent = before = 0.0
    for n, epoch in enumerate(line["epochs"], 1):
        calls, samples = epoch.get("evaluations"), epoch.get("cost/samples")
        cost = None
        if calls is not None and samples is not None:
            # By epoch, since a net that is refined, or chooses its own steps, evaluates more in some than in others.
            spent, before = spent + calls * (samples - before), samples
            cost = spent / 1e6
        if metric in epoch:
            found.append((n, cost, epoch[metric]))
    return found
