"""Writes the tables of the pages from the code: ``python docs/tables.py`` (``--check`` only lists stale pages).

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``.
"""

import ast
import importlib.util
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import catalogue
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from typeset import typeset

import schemes
from odenets import Stack, create_model, list_models, recipes
from odenets.config_files import flat
from odenets.models import (
    ConvNeXt,
    DenseNet,
    HOResNet,
    IRevNet,
    MultiColumn,
    RDNet,
    ResNet,
    RevCol,
    RevColViT,
    RevNet,
    ViT,
    roadmap,
)
from odenets.recipes.table import FILES
from odenets.study.space import ORDERS, SPACES, shapes
from schemes import MixingWarning

# Tables of measurements use the networks of the script that measured them.
sys.path.insert(0, str(Path(__file__).parents[1] / "experiments/benchmarks"))
import choices as bench

PAGES = Path(__file__).parent / "pages"
RESULTS = PAGES.parents[1] / "experiments/results"
MARKS = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.S)


def table(head: str, rows: list[list[str]]) -> str:
    """Formats a table in Markdown; a column whose name ends in ``#`` is aligned right."""
    names = head.split(" | ")
    lines = [[n.rstrip("#") for n in names], ["--:" if n.endswith("#") else "---" for n in names], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def figure(x: float | None) -> str:
    """Formats a number with two decimals below 100 and none above; None gives a dash."""
    return "–" if x is None else f"{x:,.0f}" if abs(x) >= 100 else f"{x + 0.0:.2f}"


def named_schemes() -> str:
    """The table of the catalogue, sorted by order and cost."""
    entries = sorted(schemes.catalogue(), key=lambda e: (e.order or 0, e.stages, e.name))
    return table(
        "Scheme | Stages# | Order# | Companion# | Mixing# | Real# | Imaginary# | Data | Source",
        [
            [
                f"[`{e.name}`](schemes/{catalogue.family(catalogue.base(e.name))}.md#{catalogue.base(e.name)})",
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


def modules(package: str) -> str:
    """The modules of a package that have a page, each with the first line of its docstring."""
    folder, root = PAGES / "reference" / package.replace(".", "/"), PAGES.parents[1]
    # The packages inside of odenets have tables of their own; schemes has one for all.
    pages = sorted(folder.glob("*.md") if package == "odenets" else folder.rglob("*.md"))
    rows = []
    for page in pages:
        place = page.relative_to(PAGES / "reference")
        text = ast.get_docstring(ast.parse((root / place.with_suffix(".py")).read_text(encoding="utf-8")))
        name = ".".join(page.relative_to(folder).with_suffix("").parts)
        rows.append([f"[{name}]({place.as_posix()})", str(text).split("\n")[0].replace("|", "&#124;")])
    return table("Module | is", rows)


# Short descriptions of each family's page, for the README.
KINDS = {
    "low_order": "Runge-Kutta methods of order 1 to 3",
    "order_4": "Runge-Kutta methods of order 4",
    "high_order": "order 5 to 8, with the figure that says how they mix separate weights",
    "pairs": "embedded pairs, whose companion estimates the error of a step",
    "strong_stability": "strong-stability-preserving and low-storage methods",
    "stabilised": "stabilised methods, for stiff and diffusive fields",
    "symmetric": "effectively symmetric methods",
    "multistep": "schemes that look back on the step before; most can be inverted",
    "couplings": 'streams that move one another, for `backprop="reverse"`',
    "composed": "schemes made of schemes, and continuous depth",
}


def families() -> str:
    """The table of the families of schemes, each with the names on its page."""
    rows = []
    for page in catalogue.FAMILIES:
        shown = [schemes.examples(n)[0] for n in schemes.names() if catalogue.family(n) == page]
        rows.append([f"[{KINDS[page]}](docs/pages/schemes/{page}.md)", ", ".join(f"`{text}`" for text in shown)])
    rows.append(["a mix: one step of each in turn", "`3*rk4 + midpoint`"])
    rows.append(["[your own](docs/pages/add_a_scheme.md): a few lines of data, or one class", "`Tableau`, `Scheme`"])
    return table("Schemes | write", rows)


def other_schemes() -> str:
    """The table of schemes other than Runge-Kutta methods: the usual member, and the first line of documentation."""
    rows = []
    for text in (schemes.examples(name)[0] for name in schemes.names()):
        scheme = schemes.get(text)
        if scheme.tableau is not None:
            continue
        what = (type(scheme).__doc__ or "").split("\n")[0].rstrip(".").replace("|", "&#124;")
        what = typeset(what)
        inverse = "yes" if scheme.invertible else "in training" if scheme.reversible_in_training else "–"
        where = f"schemes/{catalogue.family(catalogue.base(text))}.md#{catalogue.base(text)}"
        rows.append(
            [f"[`{text}`]({where})", str(scheme.stages), str(scheme.streams), str(scheme.order or "–"), inverse, what]
        )
    return table("Scheme | Stages# | Streams# | Order# | Inverse | It is", rows)


def _states(scheme: str, backprop: str) -> str:
    """Peak memory of a training pass of twelve functions, in network states, as measured by the plan of the stack."""
    x = torch.randn(2, bench.CHANNELS, 16, 16, generator=torch.Generator().manual_seed(0))
    return f"{bench.network(scheme, backprop).plan(x).measured / (x.numel() * 4):.0f}"


def choices() -> str:
    """The table of schemes for twelve residual functions: cost, memory and mixing figure of each."""
    times = json.loads((RESULTS / "choices.json").read_text(encoding="utf-8"))["times"]
    rows = []
    for text in bench.chosen():
        scheme, least = schemes.get(text), bench.least(text)
        sums = "–"
        if (t := scheme.tableau) is not None:
            sums = figure(sum(x != 0 for row in (*t.a, t.b) for x in row) / t.stages)
        page = f"schemes/{catalogue.family(catalogue.base(text))}.md#{catalogue.base(text)}"
        rows.append(
            [
                f"[`{text}`]({page})",
                str(scheme.order or "–"),
                str(bench.FUNCTIONS // scheme.stages),
                sums,
                "–" if scheme.tableau is None else figure(scheme.mixing),
                _states(text, "store"),
                f"{_states(text, least)} ({least})",
                figure(times[text]["store"]),
                figure(times[text][least]),
            ]
        )
    head = "Scheme | Order# | Steps# | Sums per function# | Mixing# | Stored# | Least# | Time# | Time, least#"
    return table(head, rows)


class Passed(TorchFunctionMode):
    """Replaces some functions by their first argument: on the meta device unused values need not be computed.

    Args:
        functions: the functions to skip; each returns a tensor with the shape and dtype of its first argument.
    """

    def __init__(self, functions: Iterable[Callable]):
        super().__init__()
        self.functions = frozenset(functions)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        return (args[0] if args else kwargs["tensor"]) if func in self.functions else func(*args, **kwargs)


# Both groups take most of the time on the meta device, and neither affects the tables.
INITIALISERS = [f for n, f in vars(nn.init).items() if n.endswith("_") and callable(f)]
INITIALISERS += [getattr(torch.Tensor, n) for n in ("normal_", "uniform_", "fill_", "zero_")]
NO_PRODUCTS = (F.layer_norm, F.batch_norm, F.gelu, F.relu)


@cache
def built() -> dict[str, nn.Module]:
    """Builds the registered models on the meta device, without memory or time for weights."""
    with torch.device("meta"), Passed(INITIALISERS), warnings.catch_warnings():
        warnings.simplefilter("ignore", MixingWarning)
        return {name: create_model(name) for name in list_models()}


def parameters(net: nn.Module) -> str:
    """Formats the number of parameters."""
    return f"{sum(p.numel() for p in net.parameters()):,}"


def residual_nets(kind: type[ResNet] | type[HOResNet]) -> str:
    """The table of the registered ResNets or HO-ResNets."""
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


def gmacs(net: nn.Module, size: int) -> str:
    """Multiply-adds of convolutions and matrix products for one picture, in units of 10^9."""
    with Passed(NO_PRODUCTS), FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.empty(1, 3, size, size, device="meta"))
    return f"{counter.get_total_flops() / 2e9:.3f}"


def family(what: str, row: Callable[[Any], list[str]], *kinds: type[nn.Module]) -> str:
    """The table of the registered models of some classes: name, the cells of ``row``, parameters and multiply-adds."""
    rows = []
    for name, net in built().items():
        if type(net) in kinds:
            size = 32 if net.num_classes == 10 else 224  # CIFAR-10 or ImageNet
            rows.append([f"`{name}`", *row(net), str(net.num_classes), parameters(net), str(size), gmacs(net, size)])
    return table(f"Model | {what} | Classes# | Parameters# | Size# | GMACs#", rows)


def listed(numbers: Iterable[int]) -> str:
    """Joins numbers with commas."""
    return ", ".join(map(str, numbers))


def column_net(net: Any) -> list[str]:
    """Columns, blocks and channels per level of a RevCol or a RevColViT, and the kernel of a RevCol."""
    first = net.columns.steps[0].fs
    # A transformer block is two residual functions.
    blocks = [len(f.blocks) // (2 if isinstance(net, RevColViT) else 1) for f in first]
    kernel = [] if isinstance(net, RevColViT) else [str(first[0].blocks[0].dwconv.kernel_size[0])]
    return [str(len(net.columns.steps)), listed(blocks), listed(row["num_chs"] for row in net.feature_info), *kernel]


def level_net(net: Any) -> list[str]:
    """Residual functions per level and channels per resolution."""
    counts = [sum(len(step.fs) for step in level.steps) for level in net.levels]
    return [listed(counts), listed(row["num_chs"] for row in net.feature_info)]


def revnet(net: Any) -> list[str]:
    """Class, units and channels per level."""
    heads = [isinstance(t, Stack) for t in net.transitions]  # a RevNet's first units precede the stacks
    counts = [head + len(level.steps) for head, level in zip(heads, net.levels, strict=True)]
    return [type(net).__name__, listed(counts), listed(row["num_chs"] for row in net.feature_info)]


def steps_of(*bases: tuple[roadmap.RoadmapStep, ...]) -> str:
    """The table of a roadmap, with the published figures of each step."""
    rows = []
    for i, steps in enumerate(zip(*bases, strict=True), 1):
        published = [text for s in steps for text in (figure(s.gflops), figure(s.top1))]
        rows.append([str(i), f"`{steps[0].name}`", *published])
    names = ["GMACs# | Top-1#"] if len(bases) == 1 else ["50: GMACs# | 50: top-1#", "200: GMACs# | 200: top-1#"]
    return table(f"Step# | Name | {' | '.join(names)}", rows)


PYRAMID = "Columns# | Blocks per level | Channels per level"
FUNCTIONS = "Functions per level | Channels"


def spaces() -> str:
    """The table of design spaces of random networks, with the numbers of networks within the budget."""
    rows = []
    for name, space in SPACES.items():
        size, classes = (32, 50) if name == "mini" else (64, 200)
        parts = len(space.activations) * len(space.norms)
        inside = [
            min(len(shapes(space, s, o, size, classes)) * parts for o in space.orders) for s in ("euler", "dense")
        ]
        params, macs = (" to ".join(f"{x / unit:g}" for x in b) for b, unit in ((space.params, 1e6), (space.macs, 1e9)))
        widths, depths, kernels = (f"{x[0]} to {x[-1]}" for x in (space.widths, space.depths, space.kernels))
        orders = "all" if len(space.orders) == len(ORDERS) else ", ".join(space.orders)
        augments = f"one of {len(space.augments)}" if space.augments else "–"
        recipe = f"{space.epochs}, {space.optimizer}"
        counts = [f"{n:,}" for n in inside]
        rows.append([name, params, macs, depths, widths, kernels, orders, augments, recipe, *counts])
    head = "Space | M parameters | GMACs | Depth | Channels | Kernel | Orders | Augmentation | Epochs"
    return table(f"{head} | Add# | Concat#", rows)


def comparison(name: str) -> str:
    """The table of a comparison whose runs are committed, with the time that they took."""
    from odenets.study.comparison_report import find, heading, table_of  # needs the extras train and study

    found = find(RESULTS / f"{name}.json")
    return f"{heading(found)}.\n\n{table_of(found)}"


def learned_steps() -> str:
    """The sums of the step sizes that the networks of a comparison have learned."""
    import learned_steps as script  # needs the extras train and study

    return script.table(json.loads((RESULTS / "learned_steps.json").read_text(encoding="utf-8")))


def depth_is_time(name: str) -> str:
    """A table of the experiment with weights as functions of depth, from its committed runs."""
    script = RESULTS.parent / "benchmarks/depth_is_time.py"
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found.TABLES[name](found.lines(RESULTS / "depth_is_time.jsonl"))


# Settings in which runs of the same experiment may differ.
FREE = ("seed_everything", "run_dir", "data.root", "data.num_workers", "threads")


@cache
def results(folder: Path) -> list[dict[str, Any]]:
    """Reads the committed comparisons, each with its settings and its runs."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def measured(recipe: recipes.Recipe, folder: Path = RESULTS) -> str:
    """The mean accuracy of the committed runs of a recipe; empty if there are none.

    Only completed runs of one cell count, whose settings are all those of the recipe, defaults included, but the seed.
    """
    from odenets.training.options import HARMLESS  # needs the extra train

    wanted = {k: v for k, v in _short(recipe.settings).items() if k not in FREE}
    for found in results(folder):
        cells: dict[Any, list[dict[str, Any]]] = {}
        for run in found.get("runs", []):
            judged = [epoch["val/acc"] for epoch in run["epochs"] if "val/acc" in epoch]
            if run["status"] == "trained" and judged:
                cells.setdefault(str(run.get("cell", run["options"])), []).append({**run, "last": judged[-1]})
        for runs in cells.values():
            held = {k: v for k, v in found.get("settings", {}).items() if k not in ("experiment", "over", "plan")}
            held |= runs[0]["options"]
            if not all(k in held and _same(held[k], v) for k, v in wanted.items()):
                continue
            # Resolved last, which takes a while: what the recipe does not write out has its default there.
            whole = _resolved(recipe)
            if all(k in FREE or HARMLESS.fullmatch(k) or (k in whole and _same(held[k], whole[k])) for k in held):
                mean = 100 * sum(run["last"] for run in runs) / len(runs)
                return f"{mean:.2f} % top-1, {100 - mean:.2f} % error ({len(runs)} seed{'s' * (len(runs) > 1)})"
    return ""


def _short(config: Any) -> dict[str, Any]:
    return {name.replace("init_args.", ""): value for name, value in flat(config).items()}


def _resolved(recipe: recipes.Recipe) -> dict[str, Any]:
    from odenets.training.command import resolve  # needs the extra train

    return _short(resolve(["fit", "-c", f"recipe:{recipe.name}"]))


def _same(a: Any, b: Any) -> bool:
    """Whether two values mean the same: options of a comparison are texts, and 1 stands for 1.0."""
    try:
        return str(a) == str(b) or float(a) == float(b)
    except (TypeError, ValueError):
        return False


def paper(file: Any) -> str:
    """The tables and figures of a paper, row by row: the command, the published figure and the one measured here."""
    parts = [f"{file.PAPER.note}\n"] if file.PAPER.note else []
    for shown, what in file.PAPER.shown.items():
        lines = []
        for recipe in file.RECIPES:
            for where, figure_ in recipe.published:
                if where == shown:
                    ours = measured(recipe) or f"not measured: needs {recipe.needs}"
                    name = f"{recipe.family} {recipe.size}, {recipe.data.name}"
                    name += "" if recipe.stage == "train" else f", {recipe.stage}"
                    lines.append([name, f"`recipe:{recipe.name}`", figure_ or "not known here", ours])
        for row in (row for row in file.PAPER.rows if row.shown == shown):
            ours = f"not measured: needs {row.needs}" if row.needs else "the command shows it" if row.command else "–"
            command = f"`{row.command}`" if row.command else "–"
            # Rows that a command shows directly (architectures, hyper-parameters) have no published figure to know.
            lines.append([row.what, command, row.published or ("not known here" if row.needs else "–"), ours])
        title = f"### {shown[0].upper()}{shown[1:]}{f': {what}' if what else ''}"
        parts.append(f"{title}\n\n{table('Row | Recipe or command | Published | Ours', lines)}")
    return "\n".join(parts)


def numbers_of_recipes() -> str:
    """The table of the numbers of recipes, by paper and stage."""
    rows = []
    for file in FILES:
        stages = [r.stage for r in file.RECIPES]
        of = [str(stages.count(stage)) for stage in ("train", "pretrain", "fine-tune")]
        rows.append([file.PAPER.source, file.PAPER.title, *of, str(len(stages))])
    head = "Paper | Title | Train# | Pretrain# | Fine-tune# | Recipes#"
    return table(head, [*rows, ["all", "", *(str(sum(int(r[i]) for r in rows)) for i in range(2, 6))]])


# Tables of experiments/benchmarks/depth_is_time.py, which is loaded only when a page needs one.
DEPTH_TABLES = ("arms", "otherwise", "distances", "fits", "projected", "fitted")
# The packages whose modules have pages.
NESTED = sorted(folder.name for folder in (PAGES / "reference/odenets").iterdir() if folder.is_dir())
PACKAGES = ("schemes", "odenets", *(f"odenets.{name}" for name in NESTED))
TABLES = {
    **{f"modules_{name.replace('.', '_')}": partial(modules, name) for name in PACKAGES},
    **{f"family_{name}": lambda name=name: catalogue.page(name) for name in catalogue.FAMILIES},
    "recipes": numbers_of_recipes,
    **{f"paper_{file.__name__.rpartition('.')[2]}": partial(paper, file) for file in FILES},
    "campaign_digits": lambda: comparison("campaign_digits"),
    "campaign_small": lambda: comparison("campaign_small"),
    "campaign_twelve": lambda: comparison("campaign_twelve"),
    "learned_steps": learned_steps,
    **{f"depth_{name}": partial(depth_is_time, name) for name in DEPTH_TABLES},
    "spaces": spaces,
    "choices": choices,
    "readme_schemes": families,
    "schemes": named_schemes,
    "others": other_schemes,
    "resnet": lambda: residual_nets(ResNet),
    "ho_resnet": lambda: residual_nets(HOResNet),
    "revcol": lambda: family(f"{PYRAMID} | Kernel#", column_net, RevCol),
    "revcol_vit": lambda: family(PYRAMID, column_net, RevColViT),
    "multi_column": lambda: family("Channels", lambda net: [str(net.num_features)], MultiColumn),
    "revnet": lambda: family("Class | Units per level | Channels", revnet, RevNet, IRevNet),
    "vit": lambda: family("Blocks# | Channels", lambda n: [str(len(n.levels[0].steps) // 2), str(n.num_features)], ViT),
    "convnext": lambda: family(FUNCTIONS, level_net, ConvNeXt),
    "densenet": lambda: family(FUNCTIONS, level_net, DenseNet),
    "rdnet": lambda: family(FUNCTIONS, level_net, RDNet),
    "convnext_steps": lambda: steps_of(*roadmap.CONVNEXT.values()),
    "rdnet_steps": lambda: steps_of(roadmap.RDNET),
}


def filled(text: str) -> str:
    """Returns the page with its tables regenerated."""
    return MARKS.sub(lambda m: f"{m[1]}\n{TABLES[m[2]]()}\n{m[3]}", text)


def main(check: bool) -> int:
    """Writes the pages whose tables changed, or only lists them; returns their number."""
    stale = 0
    for page in [PAGES.parents[1] / "README.md", *sorted(PAGES.rglob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            stale += 1
            print(f"{page.name}: {'out of date' if check else 'written'}")
            if not check:
                page.write_text(new, encoding="utf-8")
    return stale


if __name__ == "__main__":
    torch.set_num_threads(1)  # as in the tests: the scratch memory of convolutions grows with the threads
    checking = "--check" in sys.argv[1:]
    number = main(checking)
    sys.exit(1 if checking and number else 0)
