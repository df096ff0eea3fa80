"""What the commands beside Lightning's share: options whose errors are two lines, and output as table, CSV or JSON."""

import argparse
import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from schemes import SchemeError

from ..messages import explain, fail


class Parser(argparse.ArgumentParser):
    """A parser that ends in two lines where argparse prints its usage."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.given: Sequence[str] = ()

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """The options of a command line; options and names may be mixed."""
        self.given = words
        return self.parse_intermixed_args(list(words))

    def error(self, message: str) -> NoReturn:
        options = [option.lstrip("-") for action in self._actions for option in action.option_strings]
        first, second = explain(message, self.given, options)
        fail(first, second if second.startswith("Closest") else f"{self.prog} --help shows how it is used")


def positive(text: str) -> int:
    """A whole number from 1 on, as the type of an option."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def count(text: str) -> int:
    """A whole number from 0 on, as the type of an option."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def share(text: str) -> float:
    """A number between 0 and 1, as the type of an option."""
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def output_file(text: str) -> Path:
    """A file that ends in .csv or .json, as the type of an option."""
    if Path(text).suffix.lower() not in (".csv", ".json"):
        raise argparse.ArgumentTypeError(f"{text} ends neither in .csv nor in .json")
    return Path(text)


def as_json(value: Any) -> str:
    """JSON for other programs: numbers that are not finite are refused, since JSON has none."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_csv(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """CSV with a header; what a row lacks is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(text: str, path: Path | None) -> None:
    """Writes to a file, whose folder is made where there is none, or to the standard output."""
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
    """A table on the standard output, as wide as the terminal; off a terminal as wide as it needs."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, title_justify="left")
    numbers = set(numbers)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        # Text, not markup: a class may be called [b].
        table.add_row(*(_plain(cell) for cell in row))
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=10_000)  # measured without the limit of a terminal
        console.width = console.measure(table).maximum
    console.print(table)


def _plain(cell: Any) -> Any:
    from rich.text import Text

    return Text("" if cell is None else str(cell))


def closed_output() -> None:
    """Who reads has seen enough, as in `| head`; what is left to flush goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
