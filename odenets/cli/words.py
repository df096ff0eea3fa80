"""Shared by the commands that are not Lightning's: options with errors of two lines; output as table, CSV or JSON."""

import argparse
import csv
import fnmatch
import io
import json
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from schemes import SchemeError

from ..messages import explain, fail
from ..names import closest


class Parser(argparse.ArgumentParser):
    """A parser whose errors are two lines, where argparse prints its usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # No abbreviations: a later option would make one ambiguous, and break the scripts that use it.
        super().__init__(*args, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.given: Sequence[str] = ()

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parses a command line, in which options and positional arguments may be mixed."""
        self.given = words
        return self.parse_intermixed_args(list(words))

    def error(self, message: str) -> NoReturn:
        options = [option.lstrip("-") for action in self._actions for option in action.option_strings]
        first, second = explain(message, self.given, options)
        fail(first, second if second.startswith("Closest") else f"{self.prog} --help shows how it is used")


def positive(text: str) -> int:
    """The type of an option: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def count(text: str) -> int:
    """The type of an option: a whole number of at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def share(text: str) -> float:
    """The type of an option: a number strictly between 0 and 1."""
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def output_file(text: str) -> Path:
    """The type of an option: a file that ends in .csv or .json."""
    if Path(text).suffix.lower() not in (".csv", ".json"):
        raise argparse.ArgumentTypeError(f"{text} ends neither in .csv nor in .json")
    return Path(text)


def as_json(value: Any) -> str:
    """Formats JSON for other programs; refuses numbers that are not finite, since JSON has none."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Formats CSV with a header; values that a row lacks are empty."""
    text = io.StringIO()
    # csv ends lines with \r\n by default, and other tools take the \r for a part of the last column.
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(text: str, path: Path | None) -> None:
    """Writes to a file, making its folder if there is none, or to standard output."""
    if path is None:
        sys.stdout.write(text)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise SchemeError(f"{path} cannot be written: {e.strerror or e}\n  Give another file.") from None
    print(path)


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Iterable[str] = ()) -> None:
    """Prints a table on standard output, as wide as the terminal; off a terminal, as wide as it needs to be.

    If the terminal is too narrow for the longest word of each column, a row becomes a paragraph: its first cell, and
    below it a line for each of the others.

    Args:
        title: text above the table; "" for none.
        columns: names of the columns.
        rows: cells, one per column; None is empty.
        numbers: the columns that are aligned right.
    """
    # Imported here: most commands print no table, and should not wait for this import.
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left")
    numbers = set(numbers)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    rows = [["" if cell is None else str(cell) for cell in row] for row in rows]
    for row in rows:
        # Text, not markup: a class may be called [b].
        table.add_row(*(_plain(cell) for cell in row))
    console = Console(markup=False, highlight=False)
    wide = Console(markup=False, highlight=False, width=10_000)  # measured without the limit of a terminal
    needs = wide.measure(table)
    if not console.is_terminal:
        console = wide
        console.width = needs.maximum
    if needs.minimum <= console.width:
        with console.capture() as text:
            console.print(table)
        # A title is padded to the width of its table.
        sys.stdout.write("".join(f"{line.rstrip()}\n" for line in text.get().splitlines()))
        return
    for line in _paragraphs(title, columns, rows):
        print(textwrap.fill(line, max(20, console.width), subsequent_indent="    ", break_long_words=False))


def _paragraphs(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Yields the rows as lines of text, without empty cells."""
    if title:
        yield title
    for first, *others in rows:
        yield first
        yield from (f"  {name.lower()}: {cell}" for name, cell in zip(columns[1:], others, strict=True) if cell)


def _plain(cell: str) -> Any:
    from rich.text import Text

    return Text(cell)


def width() -> int | None:
    """Columns of the terminal; None off a terminal, where there is no limit."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def facts(pairs: Iterable[tuple[str, str]]) -> None:
    """Prints names, each with its text, on standard output; long texts are wrapped in their own column."""
    pairs = list(pairs)
    left = 2 + max(len(name) for name, _ in pairs)
    for name, text in pairs:
        lines = textwrap.wrap(text, max(20, (width() or 120) - left), break_long_words=False)
        print(f"{name:<{left}}" + f"\n{'':<{left}}".join(lines))


def dash(value: Any) -> str:
    """The value as text, or a dash for None."""
    return "–" if value is None else str(value)


def matching(pattern: str, names: Iterable[str], what: str) -> list[str]:
    """Returns the names that a pattern matches by shell wildcards, or else those that contain it; ignores case.

    Args:
        pattern: as it was given.
        names: all names.
        what: what they name, for the message.

    Raises:
        Failed: no name matches; with exit status 1, and the closest names.
    """
    names = list(names)
    # Case is folded here, since fnmatch folds it on Windows alone.
    folded = pattern.casefold()
    wild = folded if any(c in folded for c in "*?[") else f"*{folded}*"
    found = [name for name in names if fnmatch.fnmatchcase(name.casefold(), wild)]
    if not found:
        near = closest(pattern.strip("*?"), names)
        remedy = f"Closest: {', '.join(near)}" if near else f"There are {len(names)}; without a pattern all are shown"
        fail(f"no {what} matches {pattern!r}", remedy, 1)
    return found
