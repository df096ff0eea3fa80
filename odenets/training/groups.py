"""The parameters that an optimiser is given: groups with rates that decay from layer to layer, and frozen parts."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from schemes import SchemeError

from ..continuous import dimensions
from ..models.depth import parameter_depths
from ..names import closest

KINDS = ("weights", "vectors", "steps")


def parameter_groups(net: nn.Module, step_weight_decay: float = 0.0, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Parameters in up to three groups: decayed, not decayed, and learned step sizes with a decay of their own.

    Norms, biases and other vectors get no weight decay; nor do the parameters that the network names in
    ``no_weight_decay``, such as positions and class tokens. A step size is a parameter named `h` or `step_size`. A
    group of weights carries no `weight_decay` entry, so it takes the optimiser's. With a decay from layer to layer,
    there are up to three groups per depth, from the head to the stem, with an `lr_scale` of
    layer_decay^(deepest - depth).

    Args:
        net: the network; frozen parameters are left out.
        step_weight_decay: of learned step sizes.
        layer_decay: factor of the learning rate from a depth to the one before; see ``odenets.models.depth``.

    Raises:
        SchemeError: a decay outside (0, 1], a network that does not give the depths of its parameters, or one that is
            entirely frozen.

    Source:
        Clark et al. 2020, ELECTRA, arXiv 2003.10555; Bao et al. 2021, BEiT, arXiv 2106.08254.
    """
    if not 0 < layer_decay <= 1:
        raise SchemeError(f"layer_decay is {layer_decay}; want more than 0, and 1 at most\n  1 is one rate for all.")
    depths = parameter_depths(net) if layer_decay < 1 else {}
    deepest = max(depths.values(), default=0)
    options = {"vectors": {"weight_decay": 0.0}, "steps": {"weight_decay": step_weight_decay}}
    found: dict[tuple[int, int], dict[str, Any]] = {}
    for name, p, kind in _kinds(net):
        depth = depths.get(name, 0)
        # Sorted at the end, since checkpoints identify groups by their index, which must be the same in every run.
        key = -depth, KINDS.index(kind)
        if key not in found:
            found[key] = {"params": [], **options.get(kind, {})}
            if depths:
                found[key] |= {"lr_scale": layer_decay ** (deepest - depth), "depth": depth}
        found[key]["params"].append(p)
    if not found:
        raise SchemeError("all of the network is frozen, and there is nothing to train\n  Leave a part out of frozen.")
    return [found[key] for key in sorted(found)]


def _kinds(net: nn.Module) -> Iterator[tuple[str, Tensor, str]]:
    """Yields the trained parameters, and how weight decay treats them."""
    dims = dimensions(net)  # a bias that is a function of depth is not a matrix
    named = _named_undecayed(net)
    for name, p in net.named_parameters():
        if p.requires_grad:
            step = name.rpartition(".")[2] in ("h", "step_size")
            yield name, p, "steps" if step else "weights" if dims[id(p)] > 1 and name not in named else "vectors"


# Decayed in the published training of RevCol, though timm's convention would exempt them.
_PUBLISHED_DECAYED = re.compile(r"(?:^|\.)(?:gs\.\d+\.alpha|idle\.\d+)$")


def _named_undecayed(net: nn.Module) -> set[str]:
    """The names that networks, or parts of them, list in timm's ``no_weight_decay``: positions, class tokens."""
    found = set()
    for prefix, part in net.named_modules():
        own = getattr(part, "no_weight_decay", None)
        if callable(own):
            found |= {f"{prefix}.{name}" if prefix else name for name in cast(Iterable[str], own())}
    return {name for name in found if not _PUBLISHED_DECAYED.search(name)}


def make_optimizer(
    optimizer: Callable[..., Optimizer], groups: Sequence[Mapping[str, Any]], lr: float | None = None
) -> Optimizer:
    """Builds the optimiser of some groups, each with its share of the learning rate.

    Args:
        optimizer: called with the groups.
        groups: as ``parameter_groups`` returns them.
        lr: another learning rate; None takes the optimiser's.

    Raises:
        SchemeError: the optimiser refuses an option or the parameters, for example because they are in groups.
    """
    try:
        made = optimizer(groups)
    except (ValueError, TypeError) as e:
        raise SchemeError(f"model.optimizer: {' '.join(str(e).split())}\n  Change its options, or its class") from e
    return set_rates(made, lr)


def check_optimizer(optimizer: Callable[..., Optimizer], groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuses what ``make_optimizer`` would refuse, before any data are read.

    Args:
        optimizer: called with the groups.
        groups: as ``parameter_groups`` returns them.

    Raises:
        SchemeError: see ``make_optimizer``.
    """
    # Built from uninitialised copies: an optimiser may register hooks on the parameters it is given.
    stand_ins = [{**group, "params": [nn.Parameter(torch.empty_like(p)) for p in group["params"]]} for group in groups]
    make_optimizer(optimizer, stand_ins)


def set_rates(optimizer: Optimizer, lr: float | None = None) -> Optimizer:
    """Gives each group its share of the learning rate.

    Args:
        optimizer: just built, all groups at its learning rate.
        lr: another learning rate; None takes the optimiser's.
    """
    for group in optimizer.param_groups:
        group["lr"] = (group["lr"] if lr is None else lr) * group.get("lr_scale", 1.0)
    return optimizer


def group_rows(net: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """Returns a row per group of an optimiser: depth, rates, number of parameters, and the modules that hold them.

    Args:
        net: the network.
        optimizer: of its parameters.
    """
    names = {id(p): name for name, p in net.named_parameters()}
    rows = []
    for group in optimizer.param_groups:
        parts = dict.fromkeys(_part(names[id(p)]) for p in group["params"] if id(p) in names)
        rows.append(
            {
                "depth": group.get("depth"),
                "scale": group.get("lr_scale", 1.0),
                "lr": float(group["lr"]),
                "weight_decay": group.get("weight_decay", 0.0),
                "tensors": len(group["params"]),
                "parameters": sum(p.numel() for p in group["params"]),
                "parts": list(parts),
            }
        )
    return rows


def table_of_groups(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats the rows of ``group_rows`` as a table, one line each.

    Args:
        rows: as ``group_rows`` returns them.
    """
    titles = ("depth", "scale", "lr", "weight decay", "tensors", "parameters", "parts")
    lines: list[tuple[str, ...]] = [titles]
    for row in rows:
        parts = row["parts"]
        shown = ", ".join(parts if len(parts) < 4 else [*parts[:2], "...", parts[-1]])
        depth = "" if row["depth"] is None else str(row["depth"])
        figures = (f"{row['scale']:.4g}", f"{row['lr']:.4g}", f"{row['weight_decay']:.4g}")
        lines.append((depth, *figures, str(row["tensors"]), f"{row['parameters']:,}", shown))
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles) - 1)]
    return "\n".join("  ".join([*map(str.rjust, line, widths), line[-1]]) for line in lines)


def _part(name: str) -> str:
    """The module of a parameter, at a readable granularity: `levels.0.steps.1`, `columns.steps.2.fs.0.blocks.1`."""
    words = name.split(".")
    if words[0] == "levels":
        return ".".join(words[:4])
    last = max((i for i, word in enumerate(words) if word.isdigit()), default=0)
    return ".".join(words[: last + 1])


class Frozen:
    """The parts of a network that are not trained, by patterns of their names.

    Args:
        net: the network.
        patterns: names of modules or parameters, with shell wildcards; one that begins with `!` exempts parts again.

    Raises:
        SchemeError: a pattern that matches no part; the message gives the closest names.

    Example:
        >>> from odenets import create_model
        >>> net = create_model("resnet20")
        >>> frozen = Frozen(net, ["*", "!head"])
        >>> frozen("stem.conv.weight"), frozen("head.bias")
        (True, False)
    """

    def __init__(self, net: nn.Module, patterns: Sequence[str]) -> None:
        self.patterns = tuple(patterns)
        names = [name for name, _ in net.named_parameters()]
        for pattern in self.patterns:
            if not any(_fits(name, pattern.removeprefix("!")) for name in names):
                parts = [name for name, _ in net.named_modules() if name] + names
                near = closest(pattern.removeprefix("!"), parts)
                hint = f"Closest: {', '.join(near)}" if near else f"Its parts: {', '.join(dict(net.named_children()))}"
                raise SchemeError(f"frozen: {pattern!r} is no part of {type(net).__name__}\n  {hint}")

    def __call__(self, name: str) -> bool:
        frozen = False
        for pattern in self.patterns:
            if _fits(name, pattern.removeprefix("!")):
                # The last matching pattern decides, as in a .gitignore.
                frozen = not pattern.startswith("!")
        return frozen

    def apply(self, net: nn.Module) -> None:
        """Excludes the frozen parameters from training.

        Args:
            net: the network.
        """
        for name, p in net.named_parameters():
            if self(name):
                p.requires_grad_(False)

    def hold(self, net: nn.Module) -> None:
        """Sets norms with running statistics in frozen parts to evaluation mode, so that the statistics do not move.

        Args:
            net: the network.
        """
        for name, m in net.named_modules():
            # Tested by a name below the norm's, which patterns of the norm and of any enclosing module match.
            if isinstance(getattr(m, "running_mean", None), Tensor) and self(f"{name}.running_mean"):
                m.eval()


def _fits(name: str, pattern: str) -> bool:
    """Whether a pattern matches a name, or a module that contains it."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")
