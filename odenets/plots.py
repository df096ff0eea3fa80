"""Figures of analyses, as PNG, SVG or PDF by the file's suffix; matplotlib is imported only when one is drawn."""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from schemes import SchemeError

from .palette import COLOURS, MARKERS, looks

_CELL = re.compile(r"(?:(.*)\.)?(\d+):(\d+)", re.DOTALL)  # a place of a column: its stack, column and level

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from schemes.tableau import Tableau

    from .analysis.rank import Rank
    from .analysis.weights import WeightMap


def _figure(width: float, height: float) -> "Figure":
    try:
        # The class instead of pyplot: no window, no global state, no backend that a server lacks.
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('figures need matplotlib: pip install "odenets[analysis]"') from None
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def _write(figure: "Figure", path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def alignment_matrix(matrix: Tensor, names: Sequence[str], path: str | Path, title: str = "") -> Path:
    """Draws the alignments between all places as a square.

    Args:
        matrix: (n, n), from 0 to 1.
        names: of its rows.
        path: the PNG.
        title: above the figure.
    """
    side = max(3.5, 0.22 * len(names) + 2)
    figure = _figure(side + 0.8, side)
    axes = figure.add_subplot()
    # Unbiased estimates may lie slightly outside.
    image = axes.imshow(matrix.clamp(0, 1).cpu().numpy(), vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    figure.colorbar(image, ax=axes, label="CKA", shrink=0.8)
    axes.set_title(title, fontsize=9)
    return _write(figure, path)


def alignment_by_column(
    matrix: Tensor, names: Sequence[str], path: str | Path, references: Sequence[str] = ("input", "label")
) -> Path:
    """Draws the alignment of each level of each column with image and label: a panel each, columns from left to right.

    Args:
        matrix: (n, n), as returned by ``odenets.analysis.alignment``.
        names: of its rows; ``columns.steps.{n}:{l}`` are read as columns and levels, others as one row of places.
        path: the PNG.
        references: the rows of the matrix to draw, one panel each.
    """
    places = [name for name in names if name not in references]
    keys, levels, columns = _by_column(places)
    grid = len(levels) > 1
    figure = _figure(max(3.0, 0.45 * len(columns) + 1.6) * len(references), max(1.8, 0.4 * len(levels) + 1.4))
    image: Any = None
    for panel, reference in enumerate(references, 1):
        row = matrix[list(names).index(reference)].clamp(0, 1).cpu()
        # Cells that stay NaN are not places of the network, and are left blank.
        values = [[float("nan")] * len(columns) for _ in levels]
        for i, place in enumerate(places):
            values[levels.index(keys[i][0])][columns.index(keys[i][1])] = float(row[list(names).index(place)])
        axes = figure.add_subplot(1, len(references), panel)
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        _numbers(axes, values, 1.0, 2)
        ticks = [str(c + 1) for c in columns] if grid else places
        axes.set_xticks(range(len(columns)), ticks, fontsize=7, rotation=0 if grid else 90)
        axes.set_yticks(range(len(levels)), [str(level) for level in levels] if grid else [""], fontsize=7)
        if grid:
            axes.set_xlabel("column", fontsize=8)
            axes.set_ylabel("level", fontsize=8)
        axes.set_title(f"CKA with the {reference}", fontsize=9)
    figure.colorbar(image, ax=figure.axes, shrink=0.9)
    return _write(figure, path)


def _numbers(axes: Any, values: Sequence[Sequence[float]], most: float, digits: int | None = None) -> None:
    """Writes values into the cells of an image whose colours range from 0 to ``most``; leaves NaN cells empty."""
    for a, line in enumerate(values):
        for b, value in enumerate(line):
            # False only for NaN.
            if value == value:
                # Low values have dark cells.
                colour = "white" if value < 0.6 * most else "black"
                shown = f"{value:.2g}" if digits is None else f"{value:.{digits}f}"
                axes.text(b, a, shown, ha="center", va="center", fontsize=6, color=colour)


def _title(name: str, most: int = 18) -> str:
    """Returns a place's name as a title of a small panel: if long, in two lines, cut at the dot nearest its middle."""
    dots = [i for i, letter in enumerate(name) if letter == "."]
    if len(name) <= most or not dots:
        return name
    cut = min(dots, key=lambda i: abs(i - len(name) / 2))
    return f"{name[: cut + 1]}\n{name[cut + 1 :]}"


def _by_column(places: Sequence[str]) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Returns the (level, column) of each place, all levels, and all columns; one level if places are not columns."""
    # `columns.steps.3:1` is column 3, level 1.
    parts = [m.groups("") for name in places if (m := _CELL.fullmatch(name))]
    found = [(int(level), int(column)) for _, column, level in parts]
    # Not a grid: other places, those of several stacks or one place twice, which would share cells, and a single level,
    # as steps of an ordinary stack end in `1:0`, too.
    one = len({stack for stack, *_ in parts}) == 1 and len(set(found)) == len(places)
    if not one or len({level for level, _ in found}) == 1:
        found = [(0, i) for i in range(len(places))]
    return found, sorted({level for level, _ in found}), sorted({column for _, column in found})


def class_alignment(
    label: Sequence[float], picture: Sequence[float], names: Sequence[str], path: str | Path, title: str = ""
) -> Path:
    """Draws the alignment of places with one class's images and its label: a line per level, over the columns.

    Args:
        label: for each place, the alignment with the label.
        picture: the same for the images.
        names: of the places; ``columns.steps.{n}:{l}`` are read as columns and levels, others as one line.
        path: the file.
        title: above the figure.

    Source:
        Cai et al. 2023, Reversible Column Networks, arXiv 2212.11696, appendix E.
    """
    keys, levels, columns = _by_column(names)
    grid = len(levels) > 1
    figure = _figure(max(6.5, 0.5 * len(columns) * 2 + 2), 3.6 if grid else 4.4)
    panels: Any = figure.subplots(1, 2, sharey=True)
    for axes, values, what in zip(panels, (picture, label), ("picture", "label"), strict=True):
        for number, level in enumerate(levels):
            points = sorted((column, v) for (own, column), v in zip(keys, values, strict=True) if own == level)
            look: dict[str, Any] = {
                "color": COLOURS[number % len(COLOURS)],
                "marker": MARKERS[number % len(MARKERS)],
                "markersize": 5,
            }
            axes.plot([c for c, _ in points], [v for _, v in points], label=f"level {level}", **look)
        ticks = [str(c + 1) for c in columns] if grid else list(names)
        axes.set_xticks(columns, ticks, fontsize=8 if grid else 6, rotation=0 if grid else 90)
        if grid:
            axes.set_xlabel("column")
        axes.set_title(f"CKA with the {what}", fontsize=10)
        axes.grid(alpha=0.3)
    if grid:
        panels[1].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    return _write(figure, path)


def cost(points: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> Path:
    """Draws error against parameters and against multiply-adds, with a colour and a marker per group.

    Args:
        points: rows with "group", "error" from 0 to 1, and "parameters" or "macs"; a panel for which no row has a
            number is left out.
        path: the file.
        title: above the figure.

    Raises:
        SchemeError: no row has a number.
    """
    found = {"parameters": ("parameters", 1e6, "million parameters"), "macs": ("macs", 1e9, "GMACs")}
    panels = [spec for key, spec in found.items() if any(row.get(key) for row in points)]
    if not panels:
        raise SchemeError("cost: no row has a number of parameters or of multiply-adds\n  Give rows with one of them.")
    figure = _figure(0.6 + 3.7 * len(panels), 4.0)
    groups = list(dict.fromkeys(str(row["group"]) for row in points))
    drawn = looks(groups)
    for place, (key, unit, what) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), place)
        for group in groups:
            rows = [row for row in points if str(row["group"]) == group and row.get(key)]
            look: dict[str, Any] = {"color": drawn[group].colour, "marker": drawn[group].marker}
            axes.plot(
                [row[key] / unit for row in rows],
                [100 * row["error"] for row in rows],
                **look,
                linestyle="none",
                markersize=5,
                alpha=0.75,
                label=group,
            )
        values = [row[key] for row in points if row.get(key)]
        # Over a narrow range a logarithmic axis has hardly any ticks.
        if max(values) > 3 * min(values):
            axes.set_xscale("log")
        axes.set_xlabel(what)
        axes.grid(alpha=0.3)
        if place == 1:
            axes.set_ylabel("error, per cent")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), fontsize=7)
    figure.suptitle(title, fontsize=10)
    return _write(figure, path)


def heat_maps_by_column(pictures: Tensor, heats: Sequence[Tensor], names: Sequence[str], path: str | Path) -> Path:
    """Draws heat maps of each level of each column over each image: columns rightwards, levels downwards.

    Args:
        pictures: (n, c, h, w) in [0, 1], one or three channels.
        heats: one (n, h, w) per place, from 0 to 1.
        names: of the places; names other than ``columns.steps.{n}:{l}`` make one row.
        path: the file.
    """
    keys, levels, columns = _by_column(names)
    count, shown = len(pictures), cast(Any, None)
    figure = _figure(1.4 * (len(columns) + 1), 1.5 * len(levels) * count + 0.4)
    axes: Any = figure.subplots(count * len(levels), len(columns) + 1, squeeze=False)
    # For all panels, since the image itself fills only one in its column.
    for row in axes:
        for one in row:
            one.axis("off")
    for i in range(count):
        # Three channels, since a single one would be drawn with a colour map.
        picture = pictures[i].clamp(0, 1).permute(1, 2, 0).expand(-1, -1, 3).cpu().numpy()
        axes[i * len(levels)][0].imshow(picture)
        for heat, (level, column) in zip(heats, keys, strict=True):
            one = axes[i * len(levels) + levels.index(level)][columns.index(column) + 1]
            one.imshow(picture)
            shown = one.imshow(heat[i].cpu().numpy(), cmap="inferno", alpha=0.6, vmin=0, vmax=1)
            if len(levels) > 1:
                one.set_title(f"column {column + 1}, level {level}", fontsize=7)
            else:
                one.set_title(_title(names[columns.index(column)]), fontsize=7)
    bar = figure.colorbar(shown, ax=axes, shrink=0.3 if len(axes) > 2 else 0.8, aspect=30)
    bar.set_label("LayerCAM", fontsize=8)
    return _write(figure, path)


def heat_maps(pictures: Tensor, heats: Sequence[Tensor], names: Sequence[str], path: str | Path) -> Path:
    """Draws images, each followed by the heat maps of several places laid over it.

    Args:
        pictures: (n, c, h, w) in [0, 1], one or three channels.
        heats: one (n, h, w) per place, from 0 to 1.
        names: of the places.
        path: the PNG.
    """
    count = len(pictures)
    figure = _figure(1.6 * (len(heats) + 1), 1.6 * count + 0.3)
    axes: Any = figure.subplots(count, len(heats) + 1, squeeze=False)
    for i in range(count):
        picture = pictures[i].clamp(0, 1).permute(1, 2, 0).expand(-1, -1, 3).cpu().numpy()
        for j, heat in enumerate([None, *heats]):
            axes[i][j].imshow(picture)
            if heat is not None:
                axes[i][j].imshow(heat[i].cpu().numpy(), cmap="inferno", alpha=0.6, vmin=0, vmax=1)
            axes[i][j].axis("off")
            if i == 0:
                axes[i][j].set_title("picture" if heat is None else _title(names[j - 1]), fontsize=7)
    return _write(figure, path)


def _numbered(m: "WeightMap") -> bool:
    """Whether the values are written into their cells."""
    return m.values.numel() <= 64 and m.values.shape[1] <= 16


def weight_maps(maps: Sequence["WeightMap"], path: str | Path, title: str = "") -> Path:
    """Draws mean absolute weights, a panel per stack with its own scale; white where there is no connection.

    Args:
        maps: as returned by ``odenets.analysis.weight_maps``.
        path: the file.
        title: above the figure.

    Source:
        Huang et al. 2017, Densely Connected Convolutional Networks, arXiv 1608.06993, figure 5, for joined streams.
    """
    across = min(4, len(maps))
    down = -(-len(maps) // across)
    widest, tallest = (max(m.values.shape[i] for m in maps) for i in (1, 0))
    width, height = (min(4.5, max(2.4, 0.17 * n + 1.3)) for n in (widest, tallest))
    # Room for a number, as wide as four digits, in every cell that has one.
    width = max([width, *(0.34 * m.values.shape[1] + 1.3 for m in maps if _numbered(m))])
    figure = _figure(width * across + 0.3, height * down + 0.4)
    for place, m in enumerate(maps, 1):
        axes = figure.add_subplot(down, across, place)
        # From 0: a scale that begins at the smallest mean would turn noise into structure.
        image = axes.imshow(m.values.numpy(), vmin=0, cmap="viridis", aspect="auto", interpolation="nearest")
        for which, names in ((axes.xaxis, m.columns), (axes.yaxis, m.rows)):
            # First and last, and as many in between as are legible.
            every = max(1, -(-len(names) // 12))
            ticks = sorted({*range(0, len(names) - every, every), len(names) - 1})
            long = which is axes.xaxis and max(map(len, names)) > 3
            which.set_ticks(ticks, [names[i] for i in ticks], fontsize=6, rotation=90 if long else 0)
        if _numbered(m):
            # Values close to each other, such as alphas, have the same colour.
            _numbers(axes, m.values.tolist(), float(m.values.nan_to_num(0).max()))
        axes.set_xlabel(m.column, fontsize=7)
        axes.set_ylabel(m.row, fontsize=7)
        axes.set_title(m.name, fontsize=8)
        bar = figure.colorbar(image, ax=axes, shrink=0.8)
        bar.ax.tick_params(labelsize=6)
        bar.set_label("mean |alpha|" if m.row == "level" else "mean |weight|", fontsize=6)
    figure.suptitle(title, fontsize=9)
    return _write(figure, path)


def ranks(profile: Mapping[str, "Rank"], path: str | Path, title: str = "") -> Path:
    """Draws the width, numerical rank and effective rank of features by depth.

    Args:
        profile: place -> its rank, in the order of depth.
        path: the file.
        title: above the figure.
    """
    figure = _figure(max(4.5, 0.25 * len(profile) + 2), 3.6)
    from matplotlib.ticker import MaxNLocator  # after the figure, which says what to install if matplotlib is missing

    axes, at = figure.add_subplot(), range(len(profile))
    axes.step(at, [r.width for r in profile.values()], where="mid", color="gray", label="width")
    for number, (name, values) in enumerate(
        {
            "numerical rank": [r.numerical for r in profile.values()],
            "effective rank": [r.effective for r in profile.values()],
        }.items()
    ):
        axes.plot(at, values, marker=MARKERS[number], color=COLOURS[number], markersize=4, label=name)
    axes.set_xticks(at, list(profile), rotation=90, fontsize=6)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("dimensions", fontsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    # Outside, since the curves may occupy any corner.
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7)
    axes.set_title(title, fontsize=9)
    return _write(figure, path)


def stability_regions(tableaux: Mapping[str, "Tableau"], path: str | Path, title: str = "") -> Path:
    """Draws where |R(z)| is at most 1: one curve per method, around the points z = h λ at which it is stable.

    Args:
        tableaux: name -> method.
        path: the file.
        title: above the figure.
    """
    from schemes.stability import imaginary_interval, real_interval, region

    # At least 4, so that a small region does not fill the figure and look like a large one.
    left = max([4.0, *(1.15 * real_interval(t) for t in tableaux.values())])
    up = max([4.0, *(1.15 * imaginary_interval(t) for t in tableaux.values())])
    figure = _figure(5, 4)
    axes = figure.add_subplot()
    drawn = looks(list(tableaux))
    for name, tableau in tableaux.items():
        grid = region(tableau, (-left, 0.3 * left), (-up, up), 241)
        colour, line = drawn[name].colour, drawn[name].dash
        axes.contour(grid.re, grid.im, grid.size, levels=[1.0], colors=[colour], linestyles=[line])
        # A contour has no legend entry; a line without points provides one.
        axes.plot([], [], color=colour, linestyle=line, label=name)
    for line in (axes.axhline, axes.axvline):
        line(0, color="gray", linewidth=0.6)
    axes.set_xlabel("Re hλ")
    axes.set_ylabel("Im hλ")
    axes.set_aspect("equal")
    axes.legend(fontsize=8)
    axes.set_title(title, fontsize=9)
    return _write(figure, path)


def reliability(bins: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> Path:
    """Draws accuracy against confidence: a bar per bin, the diagonal where they are equal, and each bin's share.

    Args:
        bins: rows with "from", "to", "pictures", "accuracy" and "confidence", as returned by
            ``odenets.training.calibration.Calibration``.
        path: the file.
        title: above the figure.

    Raises:
        SchemeError: no bin holds a picture.

    Source:
        Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv 1706.04599, figure 1.
    """
    total = sum(row["pictures"] for row in bins)
    if not total:
        raise SchemeError("reliability: no bin holds a picture\n  Give the bins of some pictures.")
    figure = _figure(4.2, 4.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    ece = sum(row["pictures"] / total * abs(row["accuracy"] - row["confidence"]) for row in bins)
    edges = [row["from"] for row in bins], [row["to"] - row["from"] for row in bins]
    bar = {"align": "edge", "edgecolor": "white", "linewidth": 0.8}
    above.bar(edges[0], [row["accuracy"] for row in bins], edges[1], color=COLOURS[0], label="accuracy", **bar)
    sure = [row["confidence"] for row in bins]
    above.plot(sure, sure, "o", color=COLOURS[1], markersize=4, label="mean confidence")
    above.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=0.8)
    above.set_ylabel("accuracy")
    above.set_ylim(0, 1)
    above.legend(fontsize=8, loc="upper left")
    above.set_title(f"{title}\nECE {100 * ece:.2f} %".strip(), fontsize=9)
    below.bar(edges[0], [100 * row["pictures"] / total for row in bins], edges[1], color="gray", **bar)
    below.set_ylabel("pictures, %")
    below.set_xlabel("confidence")
    below.set_xlim(0, 1)
    return _write(figure, path)


def design_spaces(
    values: Mapping[str, Sequence[float]], differences: Mapping[str, tuple[float, float, float]], path: str | Path
) -> Path:
    """Draws distribution functions of the accuracies of groups of networks, and differences of means with intervals.

    Args:
        values: name of a group -> accuracies from 0 to 1.
        differences: name -> (difference, lower end, upper end), in the same unit.
        path: the PNG.

    Source:
        Radosavovic et al. 2019, On Network Design Spaces for Visual Recognition, arXiv 1905.13214, for the left panel.
    """
    figure = _figure(8, 3.4)
    left, right = figure.subplots(1, 2)
    drawn = looks(list(values))
    for name, group in values.items():
        ordered = sorted(100 * v for v in group)
        line: dict[str, Any] = {"color": drawn[name].colour, "linestyle": drawn[name].dash}
        # The empirical distribution itself: smoothing would invent networks that were never trained.
        left.step(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], where="post", label=name, **line)
    left.set_xlabel("validation accuracy, per cent")
    left.set_ylabel("share of networks up to it")
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    # The axis points upwards, and the first row belongs at the top.
    rows = list(differences.items())[::-1]
    for y, (_, (mean, low, high)) in enumerate(rows):
        right.plot([100 * low, 100 * high], [y, y], color="black", linewidth=1.5)
        right.plot([100 * mean], [y], "o", color="black")
    right.axvline(0, color="gray", linewidth=0.8)
    right.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    right.set_ylim(-0.6, len(rows) - 0.4)
    right.set_xlabel(" less ".join(list(values)[::-1]) + ", points, 95 % interval")
    right.grid(alpha=0.3, axis="x")
    return _write(figure, path)


def lines(
    series: dict[str, tuple[Sequence[float], Sequence[float]]],
    path: str | Path,
    x: str,
    y: str,
    log: bool = False,
    log_x: bool = False,
    apart: Sequence[str] = (),
) -> Path:
    """Draws several curves in one plot, such as memory against the number of columns.

    A curve covered by others is drawn wide and pale beneath them.

    Args:
        series: name -> (x values, y values).
        path: the PNG.
        x: label of the x axis.
        y: label of the y axis.
        log: whether the y axis is logarithmic.
        log_x: whether the x axis is logarithmic, in base 2.
        apart: names of curves that are close to each other; they are drawn again in a panel of their own.
    """
    many = len(series) > 5
    figure = _figure(8.4 if apart else 5, 4.2 if many else 3.4)
    panels = [list(series), list(apart)] if apart else [list(series)]
    for place, names in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), place)
        _curves(axes, series, names, log, set(apart) if place == 1 else set())
        axes.set_xlabel(x)
        if place == 1:
            axes.set_ylabel(y)
        else:
            axes.set_title("enlarged", fontsize=8)
        if log_x:
            axes.set_xscale("log", base=2)
        else:
            _whole(axes, [value for xs, _ in series.values() for value in xs])
        if log:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    handles, names = figure.axes[0].get_legend_handles_labels()
    # Inside the axes, even the best place covers a curve if no corner is free.
    figure.legend(handles, names, loc="outside lower center", ncols=2 if many and not apart else 3, fontsize=8)
    return _write(figure, path)


def _whole(axes: Any, values: Iterable[float]) -> None:
    """Counts, of steps, columns or epochs, have no tick at 2.5."""
    from matplotlib.ticker import MaxNLocator

    if all(float(value).is_integer() for value in values):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _curves(
    axes: Any,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    shown: Sequence[str],
    log: bool,
    elsewhere: Collection[str],
) -> None:
    """Draws some of the curves, with their looks among all curves; those shown elsewhere may be covered here."""
    drawn, above = looks(list(series)), covered([series[name] for name in shown], log)
    for name, count in zip(shown, above, strict=True):
        xs, ys = series[name]
        colour, marker, dash = drawn[name]
        count = 0 if name in elsewhere else count
        size: dict[str, Any] = {"linewidth": 1.5 + 2.5 * count, "markersize": 5 + 2 * count}
        alpha = 1.0 if count == 0 else 0.4
        axes.plot(list(xs), list(ys), color=colour, marker=marker, linestyle=dash, alpha=alpha, label=name, **size)


def covered(curves: Sequence[tuple[Sequence[float], Sequence[float]]], log: bool = False) -> list[int]:
    """Counts the later curves that lie on each: within 1/50 of the range at half or more of the places that both have.

    Args:
        curves: (x values, y values) each, in drawing order.
        log: whether the y axis is logarithmic.

    Example:
        >>> covered([([0, 1], [0, 100]), ([0, 1], [1, 99]), ([0, 1], [50, 20])])
        [1, 0, 0]
    """
    points = [
        {x: math.log(y) if log else y for x, y in zip(xs, ys, strict=True) if y > 0 or not log} for xs, ys in curves
    ]
    values = [y for curve in points for y in curve.values()]
    near = (max(values) - min(values)) / 50 if values else 0.0

    def on(a: Mapping[float, float], b: Mapping[float, float]) -> bool:
        shared = a.keys() & b.keys()
        return bool(shared) and 2 * sum(abs(a[x] - b[x]) <= near for x in shared) >= len(shared)

    return [sum(on(curve, later) for later in points[i + 1 :]) for i, curve in enumerate(points)]


def bands(
    curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    path: str | Path,
    x: str,
    y: str,
    ends: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Path:
    """Draws mean curves of groups of runs, with a band of one standard deviation.

    The mean at each place is over the runs of the group that have reached it. If all end within a tenth of the range,
    an inset shows the last quarter.

    Args:
        curves: name of a group -> for each of its runs (x, y).
        path: the PNG.
        x: label of the x axis.
        y: label of the y axis.
        ends: name of a group -> the places where its runs broke off; a cross each.
    """
    figure = _figure(6, 4)
    axes = figure.add_subplot()
    _draw_bands(axes, curves, ends or {})
    points = [point for runs in curves.values() for run in runs for point in run]
    left, right = min((p for p, _ in points), default=0.0), max((p for p, _ in points), default=0.0)
    left = right - (right - left) / 4
    late = [value for place, value in points if place >= left]
    values = [value for _, value in points]
    high, low = max(late, default=0.0), min(late, default=0.0)
    # Where all curves end nearly equal, the last quarter would be one thick line.
    if len(curves) > 1 and 0 < high - low < 0.1 * (max(values) - min(values)):
        part = axes.inset_axes((0.36, 0.42, 0.6, 0.34))
        _draw_bands(part, curves, {})
        part.set_xlim(left, right)
        part.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
        part.tick_params(labelsize=7)
        part.grid(alpha=0.3)
        axes.indicate_inset_zoom(part, edgecolor="gray")
    _whole(axes, [place for place, _ in points])
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="lower right")
    return _write(figure, path)


def _draw_bands(
    axes: Any,
    curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
    ends: Mapping[str, Sequence[tuple[float, float]]],
) -> None:
    drawn = looks(list(curves))
    for name, runs in curves.items():
        at: dict[float, list[float]] = {}
        for run in runs:
            for place, value in run:
                at.setdefault(place, []).append(value)
        places = sorted(at)
        means = [sum(at[p]) / len(at[p]) for p in places]
        # 0 / 1 for a single run, instead of 0 / 0.
        spreads = [
            (sum((v - m) ** 2 for v in at[p]) / max(1, len(at[p]) - 1)) ** 0.5
            for p, m in zip(places, means, strict=True)
        ]
        colour, _, dash = drawn[name]
        axes.plot(places, means, color=colour, linestyle=dash, linewidth=1.3, label=f"{name} ({len(runs)})")
        low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
        axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
        for place, value in ends.get(name, ()):
            axes.plot([place], [value], "x", color=colour, markersize=8)


def strips(values: Mapping[str, Sequence[float | None]], path: str | Path, x: str) -> Path:
    """Draws one number per run, a row for each group; a run without a number is hollow, at the right margin.

    Args:
        values: name of a group -> a number for each of its runs.
        path: the PNG.
        x: label of the x axis.
    """
    figure = _figure(6, 0.4 * len(values) + 1.2)
    axes = figure.add_subplot()
    known = [v for group in values.values() for v in group if v is not None]
    margin = max(known, default=0) + 1
    for row, group in enumerate(list(values.values())[::-1]):
        for number, value in enumerate(group):
            y = row + 0.5 * ((number + 0.5) / len(group) - 0.5)  # otherwise equal numbers hide each other
            fill = "black" if value is not None else "none"
            axes.plot([margin if value is None else value], [y], "o", color="black", markerfacecolor=fill, markersize=4)
    axes.set_yticks(range(len(values)), list(values)[::-1], fontsize=8)
    axes.set_ylim(-0.6, len(values) - 0.4)
    _whole(axes, known)
    axes.set_xlabel(x + ("; hollow: not reached" if any(v is None for g in values.values() for v in g) else ""))
    axes.grid(alpha=0.3, axis="x")
    return _write(figure, path)


def work_precision(points: Sequence[Any], path: str | Path, title: str = "") -> Path:
    """Draws accuracy, and the distance of the logits, against evaluations: two panels, a line per scheme.

    Args:
        points: rows with ``scheme``, ``evaluations``, ``accuracy`` and ``distance``, as in
            ``odenets.analysis.convergence``.
        path: the PNG.
        title: above the figure.
    """
    figure = _figure(8, 3.4)
    left, right = figure.subplots(1, 2)
    groups: dict[str, list[Any]] = {}
    for point in points:
        # All tolerances of a solver are points on one line, whose name omits them.
        groups.setdefault(point.scheme.partition(", rtol")[0].replace("adaptive(", "adaptive "), []).append(point)
    drawn = looks(list(groups))
    for name, group in groups.items():
        xs = [p.evaluations for p in group]
        colour, marker, dash = drawn[name]
        line: dict[str, Any] = {"color": colour, "marker": marker, "linestyle": dash, "markersize": 4, "label": name}
        left.plot(xs, [100 * p.accuracy for p in group], **line)
        right.plot(xs, [p.distance for p in group], **line)
    for axes, what in ((left, "accuracy, per cent"), (right, "relative distance of the logits")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("evaluations")
        axes.set_ylabel(what)
        axes.grid(alpha=0.3)
    right.set_yscale("log")
    right.legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    return _write(figure, path)
