"""The report of a study: means, differences with confidence intervals, ranks by depth; as tables and as figures."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from schemes import SchemeError

from .statistics import Difference, difference, interval_text, markdown, mean, spread
from .store import read

Line = dict[str, Any]
NAMES = {"euler": "add", "dense": "concat"}
STRATA = ("order", "augment")  # what the sampler balances
# Norms are drawn, not balanced, and matter more than most: the second row removes chance imbalances in their shares.
OVERALL = {"all": STRATA, "all, norms apart": (*STRATA, "norm")}


class ComparisonRow(NamedTuple):
    """One row of a comparison: networks that share a value of one column.

    Attributes:
        name: that value, or "all".
        counts: number of networks with the first scheme and with the second.
        means: means of the metric.
        spreads: its standard deviations.
        difference: second minus first.
    """

    name: str
    counts: tuple[int, int]
    means: tuple[float, float]
    spreads: tuple[float, float]
    difference: Difference


def compare(
    lines: Sequence[Line],
    first: str,
    second: str,
    metric: str,
    by: str | None = None,
    within: Sequence[str] = STRATA,
) -> list[ComparisonRow]:
    """Compares two schemes on a metric, over all networks (the mean difference within strata) or by a column.

    Values of the column with fewer than two networks of either scheme are left out.

    Args:
        lines: rows from ``read``, of networks that were trained.
        first: the scheme to compare with.
        second: the scheme that is compared with it.
        metric: a column of figures, "accuracy" or "loss".
        by: a column such as "order" or "norm"; None for all networks in one row.
        within: columns that define the strata of that one row; the default is what the sampler balances.
    """

    def pair(of: Callable[[Line], bool]) -> tuple[list[float], list[float]]:
        a, b = ([line[metric] for line in lines if line["scheme"] == s and of(line)] for s in (first, second))
        return a, b

    if by is not None:
        column = by
        values = sorted({line[column] for line in lines})
        rows = [(str(v), [pair(lambda line, v=v: line[column] == v)]) for v in values]
    else:
        # Compared within each stratum, so that differences between strata do not enter.
        kinds = sorted({tuple(line[name] for name in within) for line in lines})
        rows = [("all", [pair(lambda line, k=k: tuple(line[name] for name in within) == k) for k in kinds])]
    found = []
    for name, strata in rows:
        # A variance takes two networks; one thin stratum leaves the whole row without an interval, so it is left out.
        if not strata or min(min(map(len, s)) for s in strata) < 2:
            continue
        a, b = (list(itertools.chain(*(s[i] for s in strata))) for i in (0, 1))
        found.append(
            ComparisonRow(name, (len(a), len(b)), (mean(a), mean(b)), (spread(a), spread(b)), difference(strata))
        )
    return found


class RankRow(NamedTuple):
    """The ranks of features after one step, as means over the networks of one depth.

    Attributes:
        scheme: scheme of the networks.
        step: 0 is the stem.
        networks: their number.
        width: channels.
        numerical: numerical rank.
        effective: effective rank.
    """

    scheme: str
    step: int
    networks: int
    width: float
    numerical: float
    effective: float


def ranks(lines: Sequence[Line], depth: int) -> list[RankRow]:
    """Returns the mean ranks after every step, over the networks of one depth, for every scheme.

    Args:
        lines: rows of the study's networks.
        depth: depth of the networks to average over.
    """
    found = []
    for scheme in dict.fromkeys(line["scheme"] for line in lines):
        chosen = [
            line["ranks"] for line in lines if line["scheme"] == scheme and line["depth"] == depth and line["ranks"]
        ]
        # One depth only: step n of a deeper network is another place, and a mean over both would mean nothing.
        for step, values in enumerate(zip(*chosen, strict=True)):
            found.append(RankRow(scheme, step, len(chosen), *(mean([v[i] for v in values]) for i in range(3))))
    return found


def print_report(store: str | Path, out: str | Path | None = None) -> None:
    """Prints the comparison as Markdown tables, and draws its figures.

    Networks that failed or diverged are left out of the means; they are counted for each scheme.

    Args:
        store: the file of a study.
        out: folder for ``accuracy.png`` and ``ranks.png``; None draws none.

    Raises:
        SchemeError: no such file, or too few networks yet.
    """
    settings, lines = read(store)
    trained = [line for line in lines if line["status"] == "trained"]
    first, *rest = settings["schemes"]
    # Checked before any table is made, since a report may be printed when the study has hardly begun.
    if not any(compare(trained, first, second, "accuracy") for second in rest):
        raise SchemeError(f"{store} holds too few networks to compare: want two of every scheme and block order.")
    text = [f"# space {settings['space']}, seed {settings['seed']}: {len(lines)} networks\n"]
    text += [_differences(trained, first, second) for second in rest]
    text += [_costs(lines, settings["schemes"]), _ranks(trained)]
    if out is not None:
        text += map(str, draw(settings["schemes"], trained, Path(out)))
    print("\n".join(text))


def _rows(lines: Sequence[Line], first: str, second: str, metric: str, columns: Sequence[str]) -> list[ComparisonRow]:
    """Rows for all networks, one per entry of OVERALL, then by each column; named by entry, or by column and value."""
    found = [
        row._replace(name=name)
        for name, within in OVERALL.items()
        for row in compare(lines, first, second, metric, within=within)
    ]
    for by in columns:
        found += [row._replace(name=f"{by} {row.name}") for row in compare(lines, first, second, metric, by)]
    return found


def _differences(lines: Sequence[Line], first: str, second: str) -> str:
    a, b = NAMES.get(first, first), NAMES.get(second, second)
    columns = ("order", "norm", "activation", "kernel")
    losses = {row.name: row.difference for row in _rows(lines, first, second, "loss", columns)}
    rows = []
    for row in _rows(lines, first, second, "accuracy", columns):
        means = [f"{100 * m:.1f} ± {100 * s:.1f} %" for m, s in zip(row.means, row.spreads, strict=True)]
        points, loss = interval_text(row.difference, 100, 2), interval_text(losses[row.name], 1, 3)
        rows.append([row.name, *map(str, row.counts), *means, points, loss])
    head = f"networks | {a} | {b} | accuracy {a} | accuracy {b} | {b} - {a}, 95 % interval | loss, {b} - {a}"
    return markdown(head, rows)


def _costs(lines: Sequence[Line], schemes: Sequence[str]) -> str:
    rows = []
    formats = {"params": ",.0f", "macs": ",.0f", "kept_mib": ".1f", "seconds": ".1f"}
    for scheme in schemes:
        own = [line for line in lines if line["scheme"] == scheme]
        counts = [sum(line["status"] == status for line in own) for status in ("trained", "diverged", "failed")]
        chosen = [line for line in own if line["status"] == "trained"]
        means = ["–"] * len(formats)
        if chosen:
            means = [f"{mean([line[name] for line in chosen]):{form}}" for name, form in formats.items()]
        rows.append([NAMES.get(scheme, scheme), *map(str, counts), *means])
    head = "scheme | trained | diverged | failed | parameters | multiply-adds | MiB kept per step | seconds"
    return markdown(head, rows)


def _ranks(lines: Sequence[Line]) -> str:
    depth = common_depth(lines)
    rows = []
    for r in ranks(lines, depth):
        row = [NAMES.get(r.scheme, r.scheme), str(r.networks), str(r.step), f"{r.width:.0f}"]
        rows.append([*row, f"{r.numerical:.1f}", f"{r.effective:.1f}"])
    head = "scheme | networks | step | width | numerical rank | effective rank"
    return f"Depth {depth}:\n\n{markdown(head, rows)}" if rows else ""


def common_depth(lines: Sequence[Line]) -> int:
    """Returns the largest depth that at least a tenth of every scheme's networks have; else the smallest depth.

    Args:
        lines: rows of the study's networks.
    """
    schemes = {line["scheme"] for line in lines}

    def shared(depth: int) -> bool:
        own = ([line["depth"] for line in lines if line["scheme"] == s] for s in schemes)
        return all(10 * depths.count(depth) >= len(depths) for depths in own)

    depths = sorted({line["depth"] for line in lines})
    return next((depth for depth in reversed(depths) if shared(depth)), depths[0])


def draw(schemes: Sequence[str], lines: Sequence[Line], out: Path) -> list[Path]:
    """Writes the two figures of a study; returns their paths.

    Args:
        schemes: the schemes that are compared.
        lines: rows of networks that were trained.
        out: the folder.
    """
    from .. import plots

    # A scheme of which no network was trained has no curves.
    first, schemes = schemes[0], [s for s in schemes if any(line["scheme"] == s for line in lines)]
    accuracies = {NAMES.get(s, s): [line["accuracy"] for line in lines if line["scheme"] == s] for s in schemes}
    intervals = {}
    for second in schemes[1:]:
        for row in _rows(lines, first, second, "accuracy", ("order", "norm")):
            # With two schemes the axis says which is subtracted from which; with more, each interval must name its own.
            name = row.name if len(schemes) == 2 else f"{NAMES.get(second, second)}: {row.name}"
            intervals[name] = row.difference
    paths = [plots.design_spaces(accuracies, intervals, out / "accuracy.png")]
    depth = common_depth(lines)
    rows = ranks(lines, depth)
    if rows:
        series = {}
        for scheme in schemes:
            own = [r for r in rows if r.scheme == scheme]
            steps, name = [r.step for r in own], NAMES.get(scheme, scheme)
            series[f"{name}: width"] = (steps, [r.width for r in own])
            series[f"{name}: numerical rank"] = (steps, [r.numerical for r in own])
            series[f"{name}: effective rank"] = (steps, [r.effective for r in own])
        # A sum fills its width: its curves coincide, below those of joined streams.
        close = [name for name in series if name.startswith("add: ")] if len(schemes) > 1 else []
        path, x = out / "ranks.png", f"step (networks of depth {depth})"
        paths.append(plots.lines(series, path, x, "directions", apart=close))
    return paths
