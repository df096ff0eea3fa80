"""Writes the tables of the pages from the code: ``python docs/tables.py`` (``--check``: only says which are old).

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``.
"""

import re
import sys
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import nn

import schemes
from odenets import create_model, list_models
from odenets.models import HOResNet, ResNet
from schemes import MixingWarning

PAGES = Path(__file__).parent / "pages"
MARKS = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.S)


def table(head: str, rows: list[list[str]]) -> str:
    """A table in Markdown; a column whose name ends in ``#`` is set flush right."""
    names = head.split(" | ")
    lines = [[n.rstrip("#") for n in names], ["--:" if n.endswith("#") else "---" for n in names], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def figure(x: float | None) -> str:
    """Two decimals below 100, none above; a dash for what there is not."""
    return "–" if x is None else f"{x:,.0f}" if abs(x) >= 100 else f"{x + 0.0:.2f}"


def named_schemes() -> str:
    """The catalogue, in order of accuracy and cost."""
    entries = sorted(schemes.catalogue(), key=lambda e: (e.order or 0, e.stages, e.name))
    return table(
        "Scheme | Stages# | Order# | Companion# | Mixing# | Real# | Imaginary# | Data | Source",
        [
            [
                f"`{e.name}`",
                str(e.stages),
                str(e.order or "–"),
                str(e.companion or "–"),
                figure(e.mixing),
                figure(e.real),
                figure(e.imaginary),
                "exact" if e.exact else "rounded",
                e.cite,
            ]
            for e in entries
            if e.real is not None
        ],
    )


# Schemes of several streams, and others without a tableau; those with parameters by a usual member.
OTHERS = """leapfrog momentum(9/10) alf reversible_heun ab2 lm_resnet(1/2) revnet additive(3) affine multilevel(3)
    revcol bdia reversible(rk4) dense(12) adaptive(dopri5)"""


def other_schemes() -> str:
    """What is no Runge-Kutta method, with the first line of its documentation."""
    rows = []
    for text in OTHERS.split():
        scheme = schemes.get(text)
        what = (type(scheme).__doc__ or "").split("\n")[0].rstrip(".").replace("|", "&#124;").replace("*", "\\*")
        inverse = "yes" if scheme.invertible else "–"
        rows.append([f"`{text}`", str(scheme.stages), str(scheme.streams), str(scheme.order or "–"), inverse, what])
    return table("Scheme | Stages# | Streams# | Order# | Inverse | It is", rows)


@cache
def built() -> dict[str, nn.Module]:
    """The registered models, without memory or time for weights."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", MixingWarning)
        return {name: create_model(name) for name in list_models()}


def parameters(net: nn.Module) -> str:
    """Their number."""
    return f"{sum(p.numel() for p in net.parameters()):,}"


def residual_nets(kind: type[ResNet] | type[HOResNet]) -> str:
    """The registered ResNets or HO-ResNets."""
    rows = []
    for name, net in built().items():
        if not isinstance(net, kind):
            continue
        per_level = [sum(len(step.fs or ()) for step in stack.steps) for stack in net.levels]  # type: ignore
        row = [
            f"`{name}`",
            str((2 if net.block == "basic" else 3) * sum(per_level) + 2),
            ", ".join(map(str, per_level)),
            net.block,
            net.placement,
            f"`{net.levels[0].scheme}`",
            str(net.num_classes),
            parameters(net),
        ]
        rows.append(row)
    head = "Model | Layers# | Functions per level | Block | Placement | Scheme | Classes# | Parameters#"
    return table(head, rows)


def other_models() -> str:
    """The registered models of other kinds, by class."""
    others = {n: net for n, net in built().items() if not isinstance(net, ResNet | HOResNet)}
    others = dict(sorted(others.items(), key=lambda item: type(item[1]).__name__))
    rows = [[f"`{n}`", type(m).__name__, str(getattr(m, "num_classes", "–")), parameters(m)] for n, m in others.items()]
    return table("Model | Class | Classes# | Parameters#", rows)


TABLES = {
    "schemes": named_schemes,
    "others": other_schemes,
    "resnet": lambda: residual_nets(ResNet),
    "ho_resnet": lambda: residual_nets(HOResNet),
    "models": other_models,
}


def filled(text: str) -> str:
    """The page with its tables made anew."""
    return MARKS.sub(lambda m: f"{m[1]}\n{TABLES[m[2]]()}\n{m[3]}", text)


def main(check: bool) -> int:
    """Writes the pages whose tables changed, or only names them; the number of these pages."""
    stale = 0
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            stale += 1
            print(f"{page.name}: {'out of date' if check else 'written'}")
            if not check:
                page.write_text(new, encoding="utf-8")
    return stale


if __name__ == "__main__":
    checking = "--check" in sys.argv[1:]
    number = main(checking)
    sys.exit(1 if checking and number else 0)
