"""Reads the step sizes that the networks of a comparison have learned: their sum in each level, over the seeds.

    python experiments/benchmarks/learned_steps.py runs/campaign_small     # prints a table
    python experiments/benchmarks/learned_steps.py runs/campaign_small --out experiments/results/learned_steps.json
    python docs/tables.py                                                  # copies the figures into the page

A step of a consistent Runge-Kutta method adds h sum_i b_i k_i with sum_i b_i = 1, so the sum of a level's step sizes is
the time that the level covers, and the weight with which its residual functions are added altogether.
"""

import argparse
import json
import re
from pathlib import Path

from odenets import checkpoints
from odenets.study.comparison import folder_of
from odenets.study.comparison_report import find
from odenets.study.runs import Run
from odenets.study.statistics import markdown, mean, spread
from odenets.study.store import TRAINED

SIZE = re.compile(r"levels\.(\d+)\.steps\.(\d+)\.h$")
# cell -> seed -> level -> the sizes of its steps
Sizes = dict[str, dict[str, list[list[float]]]]


def sizes_of(folder: Path) -> Sizes:
    """The learned sizes of all runs of a comparison that have ended, from their last checkpoints."""
    found: Sizes = {}
    for line in find(folder).lines:
        if line["status"] != TRAINED:
            continue
        run = Run(line["name"], line["cell"], line["seed"], line["options"])
        held = checkpoints.read(folder_of(folder, run) / "checkpoints/last.ckpt")["state_dict"]
        sizes: dict[int, dict[int, float]] = {}
        for key, value in held.items():
            if m := SIZE.search(key):
                sizes.setdefault(int(m[1]), {})[int(m[2])] = round(float(value), 4)
        if sizes:
            levels = [[h for _, h in sorted(steps.items())] for _, steps in sorted(sizes.items())]
            found.setdefault(line["cell"], {})[str(line["seed"])] = levels
    return found


def table(cells: Sizes) -> str:
    """The sum of the sizes in each level: mean and standard deviation over the seeds."""
    count = max(len(levels) for seeds in cells.values() for levels in seeds.values())
    rows = []
    for cell, seeds in cells.items():
        first, *_ = seeds.values()
        sums = [[sum(levels[level]) for levels in seeds.values()] for level in range(count)]
        rows.append([cell, str(len(seeds)), "-".join(str(len(sizes)) for sizes in first), *map(_spread, sums)])
    return markdown(" | ".join(["cell", "runs", "steps", *(f"level {level + 1}" for level in range(count))]), rows)


def _spread(values: list[float]) -> str:
    text = f"{mean(values):.2f}"
    return f"{text} ± {spread(values):.2f}" if len(values) > 1 else text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a comparison")
    parser.add_argument("--out", type=Path, help="a JSON file for the sizes")
    args = parser.parse_args()
    sizes = sizes_of(args.folder)
    if not sizes:
        raise SystemExit(
            f"{args.folder} has no trained run with learned step sizes: compare --over model.net.step=learned"
        )
    print(table(sizes), end="")
    if args.out:
        lines = [f"{json.dumps(cell)}: {json.dumps(seeds)}" for cell, seeds in sizes.items()]
        args.out.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
