"""Compares weights that are functions of depth with separate ones on CIFAR-10, at equal parameters and evaluations.

    python experiments/benchmarks/depth_is_time.py train --root FOLDER --out depth_is_time.jsonl
    python experiments/benchmarks/depth_is_time.py report depth_is_time.jsonl [--pictures FOLDER]
    python experiments/benchmarks/depth_is_time.py law [--pictures FOLDER]
    python experiments/benchmarks/depth_is_time.py cost

FOLDER holds train.parquet and test.parquet in the layout of the hub's uoft-cs/cifar10. ``train`` trains each arm with
each seed, evaluates it under schemes and depths, and appends one line to the file. Runs in the file are not trained
again, so the same command resumes where it was stopped. ``report`` prints the tables from the file, means over seeds
with 95 % intervals of Student's t, and draws pictures. ``law`` measures in float64, without training, how the error of
the logits falls with the number of steps. ``cost`` times an evaluation of a block and of its field, the least of many.

The network has three levels of 4 evaluations, widths 8, 16, 32 (--width 8), GroupNorm, SiLU, a stem of stride 2, and
3x3 convolutions of stride 2 between the levels. Separate weights are 4 functions per level; a linear spline of 3
intervals over a span of 4 has as many parameters. The arms are: separate weights under euler; splines under euler (4
steps of size 1 per level), midpoint (2 of size 2) and rk4 (1 of size 4), which start from the same weights; multi-level
training under euler, with 2 steps and 1 interval per level for the first half of the epochs, then refined as by the
callback Refinement; and, with as many evaluations as the latter, a spline under euler for three quarters of the epochs.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odenets import ContinuousWeights, Stack, create_model
from odenets.continuous import fields_of
from odenets.rebuild import rebuilt, separated
from odenets.study.statistics import interval_text, markdown, paired
from odenets.training.classifier import parameter_groups
from odenets.training.refinement import follow, refine_knots
from schemes import SchemeError

ARMS = (
    "separate euler",
    "spline euler",
    "spline midpoint",
    "spline rk4",
    "spline euler multilevel",
    "spline euler short",
)
# Steps per level of each scheme in evaluation: 2 to 16 evaluations per level, of rk4 4 to 16.
GRID = {"euler": (2, 4, 8, 16), "midpoint": (1, 2, 4, 8), "rk4": (1, 2, 4)}
EVALUATIONS, KNOTS = 4, 3
RUN_OTHERWISE = ("spline euler", "spline midpoint", "spline rk4")
STAGES = {"euler": 1, "midpoint": 2, "rk4": 4}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def pictures(root: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns training and test pictures (n, 3, 32, 32), normalised, and labels."""
    from odenets.training import Images

    data = Images(root=root, val_split="test", mean=list(MEAN), std=list(STD))
    data.setup("fit")
    found = {}
    for name, split in (("train", "train"), ("test", "val")):
        held: Any = data.sets[split]
        x, y = held.pictures.float() / 255, held.labels
        found[name] = (x - torch.tensor(MEAN).view(-1, 1, 1)) / torch.tensor(STD).view(-1, 1, 1), y
    return found


def network(arm: str, seed: int, width: int) -> nn.Module:
    """Returns the network of an arm in its initial state."""
    torch.manual_seed(seed)
    kind, scheme, *_ = arm.split()
    net = create_model(
        "ho_resnet26",
        functions=(EVALUATIONS,) * 3,
        widths=(width, 2 * width, 4 * width),
        scheme="euler",
        continuous=1 if arm.endswith("multilevel") else KNOTS,
        act="silu",
        stem="conv3_s2",
        num_classes=10,
    )
    if kind == "separate":
        for level, stack in enumerate(net.levels):  # type: ignore[arg-type]
            plain = separated(stack)
            for m in plain.modules():  # as many functions, each initialised independently
                if isinstance(m, nn.Conv2d):
                    nn.init.kaiming_normal_(m.weight, mode="fan_in", nonlinearity="relu")
            net.levels[level] = plain  # type: ignore[index]
        return net
    return rebuilt(net, scheme, depth=EVALUATIONS // STAGES[scheme])


def batches(x: Tensor, y: Tensor, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields one epoch of batches in random order, with flips and shifts of up to 4 pixels."""
    for picked in torch.randperm(len(y), generator=generator, device=generator.device).split(size):
        batch = F.pad(x[picked], (4, 4, 4, 4))
        dx, dy = torch.randint(0, 9, (2,), generator=generator, device=generator.device).tolist()
        batch = batch[:, :, dy : dy + 32, dx : dx + 32]
        if torch.rand((), generator=generator, device=generator.device) < 0.5:
            batch = batch.flip(3)
        yield batch, y[picked]


def train(arm: str, seed: int, data: dict[str, tuple[Tensor, Tensor]], args: argparse.Namespace) -> dict[str, Any]:
    """Trains one network; returns it, the evaluations spent, in millions, and the seconds."""
    device = data["train"][0].device
    net = network(arm, seed, args.width).to(device)
    generator = torch.Generator(device=device).manual_seed(seed)
    groups: Any = parameter_groups(net)
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    per_epoch = -(-len(data["train"][1]) // args.batch)
    # Three quarters of the evaluations: half of the steps in half of the epochs, or a quarter fewer epochs.
    epochs = args.epochs * 3 // 4 if arm.endswith("short") else args.epochs
    total = per_epoch * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [args.lr] * len(groups), total, pct_start=0.2)
    coarse = arm.endswith("multilevel")
    run = rebuilt(net, scale=0.5) if coarse else net
    start, spent = time.process_time(), 0
    for epoch in range(epochs):
        if coarse and epoch == args.epochs // 2:
            follow(optimizer, refine_knots(net, KNOTS))
            run = net  # the same weights in twice the steps
        run.train()
        spent += len(data["train"][1]) * sum(s.evaluations for s in run.modules() if isinstance(s, Stack))
        for x, y in batches(*data["train"], args.batch, generator):
            loss = F.cross_entropy(run(x), y, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return {"net": net.eval(), "spent": spent / 1e6, "seconds": time.process_time() - start}


@torch.no_grad()
def accuracy(net: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[float, Tensor]:
    """Returns the share of correct predictions, and the logits."""
    logits = torch.cat([net(x) for x in data[0].split(500)]).double()
    return float((logits.argmax(1) == data[1]).double().mean()), logits


def evaluate(arm: str, net: nn.Module, data: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Returns accuracy and distance of the logits under schemes and depths, and after compression."""
    right, own = accuracy(net, data)
    found: dict[str, Any] = {"accuracy": right, "parameters": sum(p.numel() for p in net.parameters())}
    if arm.startswith("separate"):
        found["fitted"] = _fitted(net, data, own)
        return found
    if arm not in RUN_OTHERWISE:
        return found
    _, want = accuracy(rebuilt(net, "rk4", depth=12), data)
    grid = {}
    for scheme, depths in GRID.items():
        for depth in depths:
            share, logits = accuracy(rebuilt(net, scheme, depth=depth), data)
            grid[f"{scheme} {depth}"] = [share, float((logits - want).norm() / want.norm())]
    found["grid"] = grid
    found["projected"] = {str(knots): _projected(net, knots, data) for knots in (1, 2)}
    return found


def _projected(net: nn.Module, knots: int, data: tuple[Tensor, Tensor]) -> list[float]:
    """Returns the accuracy with fewer knots, the error in weights, and the share of parameters left."""
    small = copy.deepcopy(net)
    errors = []
    for field in fields_of(small):
        found = field.projected(knots)
        errors.append(found.error)
        field.change(found.field.space, torch.zeros(found.field.space.count, field.space.count, dtype=torch.float64))
        field.load_state_dict(found.field.state_dict())
    count = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in net.parameters())
    return [accuracy(small, data)[0], max(errors), count]


def _fitted(net: nn.Module, data: tuple[Tensor, Tensor], own: Tensor) -> dict[str, list[float]]:
    """Fits a spline through separate weights; returns accuracy and distance from the given logits, by scheme."""
    smooth = copy.deepcopy(net)
    for level, stack in enumerate(smooth.levels):  # type: ignore[arg-type]
        modules = [step.fs[0] for step in stack.steps]
        field = ContinuousWeights.from_modules(modules, KNOTS + 1, span=float(len(modules))).field
        smooth.levels[level] = Stack(field, "euler", len(modules), step="span/depth")  # type: ignore[index]
    smooth.eval()
    found = {}
    for scheme, depth in (("euler", 4), ("euler", 8), ("euler", 2), ("midpoint", 2), ("rk4", 4)):
        share, logits = accuracy(rebuilt(smooth, scheme, depth=depth), data)
        found[f"{scheme} {depth}"] = [share, float((logits - own).norm() / own.norm())]
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of the file; a truncated one is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    settings = {k: getattr(args, k) for k in ("width", "epochs", "train_pictures", "test_pictures", "batch", "lr")}
    done = {(r["arm"], r["seed"]) for r in lines(args.out) if r["settings"] == settings}
    data = pictures(args.root)
    for name, most in (("train", args.train_pictures), ("test", args.test_pictures)):
        data[name] = tuple(t[:most].to(args.device) for t in data[name])  # type: ignore[assignment]
    for seed in args.seeds:
        for arm in args.arms:
            if (arm, seed) in done:
                continue
            trained = train(arm, seed, data, args)
            row = {"arm": arm, "seed": seed, "settings": settings, "device": str(args.device)}
            row |= {k: trained[k] for k in ("spent", "seconds")} | evaluate(arm, trained["net"], data["test"])
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{arm}, seed {seed}: {row['accuracy']:.4f}, {row['seconds']:.0f} s", flush=True)


# The tables ---------------------------------------------------------------------------------------------------------

Rows = list[dict[str, Any]]
COLUMNS = [f"{scheme} {depth}" for scheme, depths in GRID.items() for depth in depths]


def calls(column: str) -> int:
    """Evaluations per level of a scheme and its steps."""
    scheme, depth = column.split()
    return STAGES[scheme] * int(depth)


def own(arm: str) -> str:
    """The scheme and steps that an arm is trained with."""
    scheme = arm.split()[1]
    return f"{scheme} {EVALUATIONS // STAGES[scheme]}"


def by_seed(rows: Rows, arm: str, figure: Callable[[dict[str, Any]], float]) -> dict[int, float]:
    """Returns a figure of each run of an arm, by seed."""
    return {r["seed"]: figure(r) for r in rows if r["arm"] == arm}


def shown(values: dict[int, float], digits: int = 1, sign: bool = False) -> str:
    """Formats the mean and half the 95 % interval of Student's t over seeds."""
    found = paired(dict.fromkeys(values, 0.0), values)
    if found is None:
        return "–"
    mean = f"{found.mean:{'+' if sign else ''}.{digits}f}"
    return mean if found.interval is None else f"{mean} ± {found.interval.high - found.mean:.{digits}f}"


def less(values: dict[int, float], baseline: dict[int, float]) -> list[str]:
    """The paired difference from a baseline with its interval, and the difference that would have been detected."""
    found = paired(baseline, values)
    if found is None or found.interval is None or found.visible is None or values == baseline:
        return ["–", "–"]
    return [interval_text(found.interval, 1, 1), f"{found.visible:.1f}"]


def arms_table(rows: Rows) -> str:
    """Accuracy of each arm under the scheme that it was trained with, and the evaluations that training took."""
    accuracies = {arm: by_seed(rows, arm, lambda r: 100 * r["accuracy"]) for arm in ARMS}
    lines = []
    for arm, values in accuracies.items():
        first = next((r for r in rows if r["arm"] == arm), None)
        if first is not None:
            seconds = sum(r["seconds"] for r in rows if r["arm"] == arm) / len(values)
            what = [arm, str(len(values)), f"{first['parameters']:,}", f"{first['spent']:.2f}", f"{seconds / 60:.1f}"]
            lines.append([*what, shown(values), *less(values, accuracies["spline euler"])])
    head = (
        "arm | seeds | parameters | evaluations spent, 10⁶ | minutes | accuracy, % | less spline euler, points [95 %]"
    )
    return markdown(f"{head} | visible", lines)


def otherwise_table(rows: Rows) -> str:
    """Change of accuracy, in points, when a trained network runs under another scheme or depth."""
    lines = [["evaluations per level", *(str(calls(c)) for c in COLUMNS)]]
    for arm in RUN_OTHERWISE:
        changes = [by_seed(rows, arm, lambda r, c=c: 100 * (r["grid"][c][0] - r["accuracy"])) for c in COLUMNS]
        cells = [shown(v, sign=True) for v in changes]
        lines.append([arm, *("trained" if c == own(arm) else cell for c, cell in zip(COLUMNS, cells, strict=True))])
    return markdown(f"trained as | {' | '.join(COLUMNS)}", lines)


def distances_table(rows: Rows) -> str:
    """Relative distance of the logits from those of 12 steps of rk4."""
    lines = [["evaluations per level", *(str(calls(c)) for c in COLUMNS)]]
    for arm in RUN_OTHERWISE:
        lines.append([arm, *(shown(by_seed(rows, arm, lambda r, c=c: r["grid"][c][1]), 3) for c in COLUMNS)])
    return markdown(f"trained as | {' | '.join(COLUMNS)}", lines)


def largest_loss(row: dict[str, Any]) -> float:
    """The most that a network loses, in points, under any scheme with at least as many evaluations as in training."""
    return 100 * (row["accuracy"] - min(row["grid"][c][0] for c in COLUMNS if calls(c) >= EVALUATIONS))


def fits_table(rows: Rows) -> str:
    """Whether a network is tuned to its own step: its largest loss elsewhere."""
    losses = {arm: by_seed(rows, arm, largest_loss) for arm in RUN_OTHERWISE}
    lines = [[arm, shown(v), *less(v, losses["spline euler"])] for arm, v in losses.items()]
    return markdown("trained as | largest loss, points | less spline euler, points [95 %] | visible", lines)


def projected_table(rows: Rows) -> str:
    """Compression after training: fewer knots, their parameters, the error in weights, the change of accuracy."""
    lines = []
    for arm in RUN_OTHERWISE:
        for knots in ("2", "1"):
            runs = [r for r in rows if r["arm"] == arm]
            if not runs:
                continue
            change = by_seed(rows, arm, lambda r, k=knots: 100 * (r["projected"][k][0] - r["accuracy"]))
            error = by_seed(rows, arm, lambda r, k=knots: r["projected"][k][1])
            share = f"{runs[0]['projected'][knots][2]:.0%}"
            lines.append([arm, knots, share, shown(error, 2), shown(change, sign=True)])
    return markdown("trained as | knots | parameters left | error in weights, worst level | accuracy, points", lines)


def fitted_table(rows: Rows) -> str:
    """A spline through the weights of a network trained with separate ones, under several schemes and steps."""
    first = next((r for r in rows if "fitted" in r), None)
    if first is None:
        return ""
    lines = []
    for column in first["fitted"]:
        accuracy_, apart = (by_seed(rows, first["arm"], lambda r, c=column, i=i: r["fitted"][c][i]) for i in (0, 1))
        accuracy_ = {seed: 100 * value for seed, value in accuracy_.items()}
        lines.append([column, str(calls(column)), shown(accuracy_), shown(apart, 2)])
    return markdown("run as | evaluations per level | accuracy, % | distance of the logits from the network's", lines)


def of_one_setting(make: Callable[[Rows], str]) -> Callable[[Rows], str]:
    """A table that refuses lines of several settings, whose runs it would take for seeds of one another."""

    @wraps(make)
    def made(rows: Rows) -> str:
        settings = {json.dumps(r["settings"], sort_keys=True) for r in rows}
        if len(settings) > 1:
            raise SchemeError(
                f"the lines are of {len(settings)} settings: {'; '.join(sorted(settings))}\n"
                "  Give those of one setting: a file of their own."
            )
        return make(rows)

    return made


TABLES: dict[str, Callable[[Rows], str]] = {
    "arms": of_one_setting(arms_table),
    "otherwise": of_one_setting(otherwise_table),
    "distances": of_one_setting(distances_table),
    "fits": of_one_setting(fits_table),
    "projected": of_one_setting(projected_table),
    "fitted": of_one_setting(fitted_table),
}


def report(args: argparse.Namespace) -> None:
    rows = lines(args.file)
    if not rows:
        raise SchemeError(f"{args.file} holds no line\n  Write some first: depth_is_time.py train --out {args.file}")
    print(f"settings: {rows[0]['settings']}, seeds {sorted({r['seed'] for r in rows})}")
    for name, make in TABLES.items():
        print(f"\n{name}: {(make.__doc__ or '').splitlines()[0]}\n\n{make(rows)}", end="")
    if args.pictures is not None:
        draw({arm: [r for r in rows if r["arm"] == arm] for arm in RUN_OTHERWISE}, args.pictures)


def draw(groups: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Draws one work-precision diagram per arm, of means over seeds."""
    from types import SimpleNamespace

    from odenets.plots import work_precision

    for arm, group in groups.items():
        points = []
        for scheme, depths in GRID.items():
            for depth in depths:
                values = [r["grid"][f"{scheme} {depth}"] for r in group]
                points.append(
                    SimpleNamespace(
                        scheme=scheme,
                        evaluations=3 * calls(f"{scheme} {depth}"),
                        accuracy=sum(v[0] for v in values) / len(values),
                        distance=sum(v[1] for v in values) / len(values),
                    )
                )
        name = f"depth_is_time_{arm.replace('spline ', '').replace(' ', '_')}.png"
        print(work_precision(points, folder / name, f"trained as: {arm}, {len(group)} seeds"))


# The law ------------------------------------------------------------------------------------------------------------

CASES = {
    "smooth, knots where steps begin": ("silu", 4),
    "ReLU": ("relu", 4),
    "smooth, knots inside of steps": ("silu", 5),
}


def law(args: argparse.Namespace) -> None:
    """Prints convergence rates of a network's logits in float64, with random weights, over halvings of the step."""
    from odenets.plots import lines as draw_lines

    x = torch.randn(8, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    print(f"| | {' | '.join(LAW)} |\n|---|{'--:|' * len(LAW)}")
    for case, (act, knots) in CASES.items():
        torch.manual_seed(0)
        options: Any = {"functions": (4, 4), "widths": (8, 16), "stem": "conv3", "act": act, "continuous": knots}
        net = create_model("ho_resnet26", scheme="euler", **options).double().eval()
        for field in fields_of(net):
            for p in field.parameters():
                p.data += 0.3 * torch.randn_like(p) * p.data.std().clamp_min(0.1)
        series: dict[str, Any] = {}
        slopes = []
        with torch.no_grad():
            fine = rebuilt(net, "dopri5", depth=80 if act == "silu" else 640)(x)
            for scheme, depths in LAW.items():
                depths = depths if case.startswith("smooth, knots where") else (16, 32, 64)
                errors = [float((rebuilt(net, scheme, depth=n)(x) - fine).norm() / fine.norm()) for n in depths]
                told = [(math.log(n), math.log(e)) for n, e in zip(depths, errors, strict=True) if e > 1e-11]
                xs, ys = zip(*told, strict=True)
                x0, y0 = sum(xs) / len(xs), sum(ys) / len(ys)
                rate = -sum((a - x0) * (b - y0) for a, b in told) / sum((a - x0) ** 2 for a in xs)
                slopes.append(f"{rate:.2f}")
                series[scheme] = (depths, errors)
        print(f"| {case} | {' | '.join(slopes)} |")
        if args.pictures is not None:
            name = f"depth_is_time_law_{act}_{knots}.png"
            print(draw_lines(series, args.pictures / name, "steps", "relative error of the logits", True, True))


LAW = {"euler": (16, 32, 64), "midpoint": (16, 32, 64), "kutta3": (8, 16, 32), "rk4": (8, 16, 32), "dopri5": (8, 16)}


def cost(args: argparse.Namespace) -> None:
    """Prints the microseconds of one of 16 evaluations in 4 steps of rk4, of a shared block and of its field."""
    from odenets.layers import BasicFunction
    from odenets.layers.attention import PerceptronFunction

    torch.set_num_threads(1)
    cases: Any = {
        "convolutions, 16 channels, 64 x 8 x 8": (
            BasicFunction(16, 16, order="pre", norm="group", act="silu"),
            torch.randn(64, 16, 8, 8),
        ),
        "convolutions, 32 channels, 64 x 16 x 16": (
            BasicFunction(32, 32, order="pre", norm="group", act="silu"),
            torch.randn(64, 32, 16, 16),
        ),
        "perceptron, 64 channels, 64 tokens": (PerceptronFunction(64), torch.randn(64, 1, 64)),
    }
    print("| block | forward | field | with backward | field |\n|---|--:|--:|--:|--:|")
    for name, (block, x) in cases.items():
        stacks = [
            Stack(block, "rk4", depth=4, step="1/depth"),
            Stack(ContinuousWeights(copy.deepcopy(block), 8), "rk4", depth=4, step="span/depth"),
        ]
        x.requires_grad_()
        best = [math.inf] * 4
        for _ in range(args.rounds):
            for i, stack in enumerate(stacks):
                start = time.process_time()
                with torch.no_grad():
                    stack(x)
                best[i] = min(best[i], time.process_time() - start)
                start = time.process_time()
                stack(x).sum().backward()
                best[2 + i] = min(best[2 + i], time.process_time() - start)
        print(f"| {name} | {' | '.join(f'{1e6 * t / 16:.0f} us' for t in best)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    of_train = commands.add_parser("train")
    of_train.add_argument("--root", required=True)
    of_train.add_argument("--out", type=Path, default=Path("depth_is_time.jsonl"))
    of_train.add_argument("--width", type=int, default=8)
    of_train.add_argument("--epochs", type=int, default=8)
    of_train.add_argument("--train-pictures", type=int, default=10000)
    of_train.add_argument("--test-pictures", type=int, default=2000)
    of_train.add_argument("--batch", type=int, default=64)
    of_train.add_argument("--lr", type=float, default=0.05)
    of_train.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    of_train.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    of_train.add_argument("--device", default="cpu")
    of_train.add_argument("--threads", type=int, default=1)
    of_report = commands.add_parser("report")
    of_report.add_argument("file", type=Path)
    of_report.add_argument("--pictures", type=Path)
    of_law = commands.add_parser("law")
    of_law.add_argument("--pictures", type=Path)
    of_cost = commands.add_parser("cost")
    of_cost.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    try:
        {"train": run, "report": report, "law": law, "cost": cost}[args.command](args)
    except SchemeError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
