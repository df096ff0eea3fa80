"""Prints the tables of the measurements of ``run.sh``, and writes them to OUT/tables.md and as CSV.

python experiments/gpu/tables.py OUT
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

TITLES = {
    "rk4": "One step of rk4, forward and backward",
    "columns": "RevCol: memory against columns",
    "odeint": "A flow by dopri5",
    "training": "Training on pictures of 32x32 by Lightning, bfloat16, channels-last",
    "models": "A training step, bfloat16, channels-last",
    "batch": "The largest batch",
}


def measured(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Returns the last line of each case in a file, by (table, name); a case that only began has crashed."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for text in path.read_text().splitlines() if path.exists() else []:
        line = json.loads(text)
        if line["status"] == "stopped":
            found.pop((line["table"], line["name"]), None)
        else:
            found[line["table"], line["name"]] = line
    return {k: {**v, "status": "crashed"} if v["status"] == "begun" else v for k, v in found.items()}


def figure(value: object) -> str:
    """Formats a float with four significant digits; anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(lines: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Returns column names and rows; a case without figures states why."""
    names = list(dict.fromkeys(k for line in lines for k in line if k not in ("table", "name", "status", "error")))
    rows = []
    for line in lines:
        said = (
            ""
            if line["status"] == "measured"
            else f" ({line['status']}{': ' if 'error' in line else ''}{line.get('error', '')})"
        )
        rows.append([line["name"] + said, *(figure(line[n]) if n in line else "–" for n in names)])
    return ["case", *names], rows


def markdown(names: list[str], rows: list[list[str]]) -> str:
    """Formats a table in Markdown, with all columns but the first aligned right."""
    lines = [names, ["---", *["--:"] * (len(names) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def text_of(out: Path) -> str:
    """Returns the text of all tables, and writes a CSV file for each measured one."""
    machine = json.loads((out / "machine.json").read_text())
    parts = [", ".join(f"{k} {v}" for k, v in machine.items() if v) + "\n"]
    if (out / "tests.json").exists():
        tests = json.loads((out / "tests.json").read_text())
        counts = ", ".join(f"{n} {k}" for k, n in tests["counts"].items()) or "none ended"
        parts.append(f"Tests: {counts}{'' if tests['in_time'] else ', out of time'}.\n")
        parts += [f"- {kind}: {len(names)}\n" for kind, names in tests["failures"].items()]
    found = list(measured(out / "measured.jsonl").values())
    for name in dict.fromkeys(line["table"] for line in found):
        names, rows = table([line for line in found if line["table"] == name])
        parts.append(f"\n## {TITLES.get(name, name)}\n\n{markdown(names, rows)}")
        with (out / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([names, *rows])
    report = out / "campaign" / "report" / "table.md"
    if report.exists():
        parts.append(f"\n## Campaign\n\n{report.read_text()}")
    return "".join(parts)


def main() -> None:
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "machine.json").exists():
        sys.exit("usage: python experiments/gpu/tables.py OUT, a folder that run.sh has written to")
    out = Path(sys.argv[1])
    text = text_of(out)
    (out / "tables.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
