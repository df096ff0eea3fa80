"""The depth of each parameter of a network, for learning rates that decay from the head to the stem.

A network defines the depths itself (``parameter_depths``), or by patterns in the style of timm (``group_matcher``), so
that timm's networks have depths too. Three examples:

* a ResNet-20 has 11: the stem, nine steps, the head;
* a ConvNeXt-B has 14, since three steps share a depth: the stem, 1 + 1 + 9 + 1 groups, the head;
* a RevCol-T of four columns of ten blocks has 15: block b of column c is at 1 + b + c.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from schemes import SchemeError

from ..stack import Stack

_STEP = re.compile(r"levels\.(\d+)(?:\.steps\.(\d+))?\.")
_TRANSITION = re.compile(r"transitions\.(\d+)\.")
_GRID = re.compile(r"columns\.steps\.(\d+)\.([fg])s\.(\d+)\.(?:blocks\.(\d+)\.)?")
_STEM = ("stem.", "idle.")


def parameter_depths(net: nn.Module) -> dict[str, int]:
    """Returns the depth of each parameter: 0 is the stem, and the largest number the head.

    Args:
        net: one of ``odenets.models``, or any network with a method ``group_matcher``, as timm's have.

    Raises:
        SchemeError: it has neither method.

    Example:
        >>> from odenets import create_model
        >>> found = parameter_depths(create_model("resnet20"))
        >>> found["stem.conv.weight"], found["levels.2.steps.0.fs.0.conv1.weight"], found["head.weight"]
        (0, 7, 10)
    """
    own: Any = getattr(net, "parameter_depths", None)
    if callable(own):
        return own()  # type: ignore[return-value]
    matcher: Any = getattr(net, "group_matcher", None)
    if callable(matcher):
        return matched_depths(net, matcher(coarse=False))  # type: ignore[arg-type]
    raise SchemeError(
        f"{type(net).__name__} does not say how deep its parameters lie, which a decay from layer to layer needs\n"
        "  Give it a method group_matcher, as timm's networks have, or leave layer_decay out."
    )


def depths_around(whole: nn.Module, net: nn.Module) -> dict[str, int]:
    """Returns depths in a network that contains another one without a head: everything around that is one deeper.

    Args:
        whole: the outer network, whose parameter names the depths have.
        net: the inner network, which defines the depths of its parameters.

    Example:
        >>> from torch import nn
        >>> from odenets import create_model
        >>> net = create_model("resnet20")
        >>> _ = net.prune_intermediate_layers(3)
        >>> found = depths_around(nn.ModuleDict({"net": net, "head": nn.Linear(64, 2)}), net)
        >>> found["net.stem.conv.weight"], found["net.levels.2.steps.2.fs.0.conv2.weight"], found["head.weight"]
        (0, 9, 10)
    """
    own = parameter_depths(net)
    by_parameter = {id(p): own[name] for name, p in net.named_parameters()}
    head = max(own.values(), default=-1) + 1
    return {name: by_parameter.get(id(p), head) for name, p in whole.named_parameters()}


def matched_depths(net: nn.Module, matcher: Mapping[str, Any]) -> dict[str, int]:
    """Returns depths by patterns, as timm reads them: the first match gives the place, names without one come last.

    Args:
        net: the network.
        matcher: from ``group_matcher``: a pattern, or a list of patterns with suffixes, by name and in order.
    """
    rules = [
        (place, re.compile(pattern), suffix)
        for place, spec in enumerate(matcher.values())
        for pattern, suffix in ([(spec, None)] if isinstance(spec, str) else spec)
    ]
    # After all places, so that a head that no pattern matches is the deepest.
    last = (float("inf"),)
    at: dict[str, tuple[float, ...]] = {}
    into_before = set()
    for name, _ in net.named_parameters():
        for place, pattern, suffix in rules:
            if m := pattern.match(name):
                numbers = [float(v) for v in m.groups() if v is not None]
                at[name] = (place, *numbers, *(suffix or ()))
                if suffix == (99999,):  # timm's marker for parameters that join the preceding group
                    into_before.add(at[name])
                break
        else:
            at[name] = last
    depth, number = {}, -1
    for place in sorted(set(at.values())):
        # The first place has no preceding group to join, whatever its marker.
        number += place not in into_before or number < 0
        depth[place] = number
    return {name: depth[place] for name, place in at.items()}


def level_depths(net: nn.Module, group: int) -> dict[str, int]:
    """Returns depths in a network of levels: consecutive steps share one, up to ``group`` residual functions in all.

    A transition belongs to the first steps after it, norms after the last level to the head.

    Args:
        net: has ``levels``, and may have ``transitions``.
        group: residual functions that share a depth; steps stay whole, so at least one step's.
    """
    places: dict[tuple[int, int], int] = {}
    transitions = list(getattr(net, "transitions", ()))
    depth = 0
    # Step -1 of a level is the transition before it.
    for level, stack in enumerate(net.levels):  # type: ignore[arg-type]
        # A RevNet's transition is itself a step, the first of its level.
        before = transitions[level] if level < len(transitions) else nn.Identity()
        depth += (first := isinstance(before, Stack))
        places[level, -1] = depth if first else depth + 1
        # A RevNet's level of one unit is empty after it: without parameters there is no depth.
        if next(stack.parameters(), None) is None and (first or next(before.parameters(), None) is None):
            continue
        for steps in _together(stack, group):
            depth += 1
            places.update({(level, step): depth for step in steps})
    found = {}
    for name, _ in net.named_parameters():
        if m := _TRANSITION.match(name):
            found[name] = places[int(m[1]), -1]
        elif m := _STEP.match(name):
            found[name] = places[int(m[1]), int(m[2] or 0)]
        else:
            found[name] = 0 if name.startswith(_STEM) else depth + 1
    return found


def _together(stack: nn.Module, group: int) -> Iterator[list[int]]:
    """Yields steps of a level that share a depth; a level that is not a stack, is empty or shares weights, is one."""
    if not isinstance(stack, Stack) or any(step.fs is None for step in stack.steps):
        yield [0]
        return
    held, steps = 0, []
    for number, step in enumerate(stack.steps):
        count = len(step.fs)  # type: ignore[arg-type]
        # A step that holds more functions than a group stays whole, in a group of its own.
        if steps and held + count > group:
            yield steps
            held, steps = 0, []
        held += count
        steps.append(number)
    yield steps or [0]


def grid_depths(net: nn.Module, blocks: Sequence[int], per_block: int = 1) -> dict[str, int]:
    """Returns depths in a grid of columns and levels: 1 + b + c for block b of column c, counted over all its levels.

    This is the length of the shortest path through the grid to the block. The links between levels share the depth of
    the first block after them, a column's factors that of its first block; the stem has depth 0, and all else comes
    after the last block.

    Args:
        net: its ``columns`` are a ``Stack``.
        blocks: number of blocks per level.
        per_block: modules in the list ``blocks`` that make up a block.

    Source:
        Cai et al. 2023, arXiv 2212.11696: the optimiser of the released code, for fine-tuning.
    """
    before = [sum(blocks[:level]) for level in range(len(blocks))]
    columns = len(net.columns.steps)  # type: ignore[union-attr,arg-type]
    found = {}
    for name, _ in net.named_parameters():
        if m := _GRID.match(name):
            block = 0 if m[2] == "g" else before[int(m[3])] + int(m[4] or 0) // per_block
            found[name] = 1 + block + int(m[1])
        elif name.startswith("idle."):
            found[name] = 1  # factors of the first column
        else:
            found[name] = 0 if name.startswith("stem.") else sum(blocks) + columns
    return found
