"""`odenets models`: lists the models, and what they cost."""

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from schemes import MixingWarning, SchemeError

from ..backprop.sizes import show
from ..messages import closed_output, fail, first_line
from ..models.catalogue import create_model, list_models, model_kind, model_options, published_weights
from ..planning import outermost, plan
from . import words as w

TEXT = """Lists the models: all names, or those that match a pattern (ho_*, or a part of the name). A single one is
shown with its costs, several with --costs; --memory runs them, which takes a few passes of each.

  Classes      width of the head; models with 10 take small pictures
  Weights      tags of published weights, as in create_model(NAME, pretrained=TAG)
  GMACs        10^9 multiply-adds of convolutions and matrix products, for one picture of the size
  Evaluations  calls of residual functions in a pass
  Stored       memory of a training step beyond parameters and their gradients, with every tensor kept
  Checkpoint   the same, with the state before each step kept
  Reverse      the same, with states recomputed by the inverse; – without one (for a single model, with the reason)

Exit status: 0; 1 if nothing matches; 2 if the command cannot be read, or a model cannot run at that size."""
MODES = {"stored": "store", "checkpoint": "checkpoint", "reverse": "reverse"}  # columns, and the backprop mode of each
SMALL, LARGE = 32, 224  # sides of pictures: for ten or a hundred classes, and for ImageNet's thousand


def parser() -> w.Parser:
    """The options."""
    found = w.Parser(prog="odenets models", description=TEXT)
    found.add_argument(
        "pattern", nargs="?", default="*", metavar="PATTERN", help="a name with shell wildcards, or a part of one"
    )
    found.add_argument("--costs", action="store_true", help="parameters, multiply-adds, evaluations")
    found.add_argument("--memory", action="store_true", help="what a training step takes, mode by mode")
    found.add_argument("--size", type=w.positive, help=f"side of the pictures ({SMALL}, or {LARGE} from 1000 classes)")
    found.add_argument("--batch_size", type=w.positive, default=2, help="pictures of a training step (2)")
    found.add_argument("--scheme", help="a scheme in place of each model's own")
    found.add_argument("--json", action="store_true", help="print JSON; sizes in bytes")
    return found


def run(args: Sequence[str]) -> None:
    """Runs one command line; errors that the user can fix end in two lines."""
    options = parser().parse(args)
    try:
        known = list_models()
        # A full name means only itself, although resnet50 is also a part of ho_resnet50.
        chosen = [options.pattern] if options.pattern in known else w.matching(options.pattern, known, "model")
        costs = options.costs or options.memory or len(chosen) == 1
        rows = []
        for name in chosen:
            row = listed(name)
            if costs:
                row |= cost(name, options.size or row["size"], options.scheme)
            if options.memory:
                row |= memory(name, row["size"], options.batch_size, options.scheme)
            rows.append(row)
        _write(rows, options)
    except BrokenPipeError:
        closed_output()
    except SchemeError as e:
        fail(str(e), "odenets models --help shows how it is used")


def listed(name: str) -> dict[str, Any]:
    """Returns what is known of a model without building it."""
    kind, given = model_kind(name), model_options(name)
    classes = given.get("num_classes")
    size = given.get("size") or (SMALL if classes is not None and classes < 1000 else LARGE)
    about = (inspect.getdoc(kind) or "").split("\n")[0] if kind else ""
    weights = [weights.tag for weights in published_weights(name)]
    return {
        "model": name,
        "class": kind.__name__ if kind else None,
        "classes": classes,
        "size": size,
        "weights": weights,
        "about": about,
    }


def cost(name: str, size: int, scheme: str | None = None) -> dict[str, Any]:
    """Returns parameters, multiply-adds for one picture and evaluations, computed on the meta device.

    Args:
        name: the model.
        size: side of the picture.
        scheme: a scheme in place of the model's own.

    Raises:
        SchemeError: the model does not run at that size.
    """
    with torch.device("meta"):
        # In evaluation mode: in training BatchNorm refuses a single value per channel, which one picture may leave.
        net = _build(name, scheme).eval()
        x = torch.empty(1, _channels(name), size, size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            _called(net, x, name, size)
    return {
        "size": size,
        "parameters": sum(p.numel() for p in net.parameters()),
        # torch counts a multiply-add as two operations.
        "macs": counter.get_total_flops() // 2,
        "evaluations": sum(stack.evaluations for stack in outermost(net).values()),
    }


def memory(name: str, size: int, batch: int, scheme: str | None = None) -> dict[str, Any]:
    """Measures the bytes that a training step takes: with all stored, with a state per step, and by the inverse.

    A mode that the model cannot train in is None, and the reason is given under ``without``.

    Args:
        name: the model.
        size: side of the pictures.
        batch: number of pictures.
        scheme: a scheme in place of the model's own.
    """
    x = torch.rand(batch, _channels(name), size, size)
    found: dict[str, Any] = {}
    without: dict[str, str] = {}
    for title, mode in MODES.items():
        try:
            net = _build(name, scheme, backprop=mode).train()
        except SchemeError as e:
            if mode == "store":
                raise
            # The scheme has no inverse, or the model does not have the option.
            found[title], without[title] = None, first_line(e)
            continue
        found[title] = plan(net, x).measured
    return {"batch_size": batch, **found, "without": without}


def _build(name: str, scheme: str | None, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MixingWarning)  # the list shows what exists, and recommends nothing
        return create_model(name, scheme=scheme, **options)


def _channels(name: str) -> int:
    return model_options(name).get("in_chans", 3)


def _called(net: nn.Module, x: torch.Tensor, name: str, size: int) -> None:
    try:
        net(x)
    except (RuntimeError, ValueError) as e:
        # A SchemeError is a ValueError too, and says more clearly what does not fit.
        if isinstance(e, SchemeError):
            raise
        cause = first_line(e, 150)
        raise SchemeError(f"{name} does not run on pictures of {size} x {size}: {cause}\n  Give --size.") from None


def _write(rows: list[dict[str, Any]], options: Any) -> None:
    if options.json:
        w.write(w.as_json(rows), None)
        return
    columns = ["Model", "Class", "Classes", "Weights"]
    if "macs" in rows[0]:
        columns += ["Size", "Parameters", "GMACs", "Evaluations"]
    if "stored" in rows[0]:
        columns += [title.capitalize() for title in MODES]
    title = f"a training step of {options.batch_size} pictures" if "stored" in rows[0] else ""
    w.show(title, columns, [_cells(row, columns) for row in rows], set(columns) - {"Model", "Class", "Weights"})
    if len(rows) == 1:
        for title, why in rows[0].get("without", {}).items():
            w.write(f"{title.capitalize()}: {why}\n", None)


def _cells(row: dict[str, Any], columns: Sequence[str]) -> list[str]:
    shown = {
        "Model": row["model"],
        "Class": row["class"] or "",
        "Classes": w.dash(row["classes"]),
        "Weights": ", ".join(row["weights"]),
        "Size": str(row["size"]),
    }
    if "macs" in row:
        shown |= {"Parameters": f"{row['parameters']:,}", "GMACs": f"{row['macs'] / 1e9:.3f}"}
        shown["Evaluations"] = str(row["evaluations"])
    if "stored" in row:
        shown |= {t.capitalize(): "–" if row[t] is None else show(row[t]) for t in MODES}
    return [shown[column] for column in columns]
