"""Mean absolute weights of a network, by the source that they read and the function that they belong to."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from schemes import SchemeError
from schemes.dense import Dense

from ..layers import ChannelScale
from ..stack import Stack
from ..step import Step
from .features import below

Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


class WeightMap(NamedTuple):
    """Means of absolute weights of one stack.

    Attributes:
        name: name of the stack, as ``named_modules`` gives it.
        values: (rows, columns), in double precision; NaN where nothing connects the two.
        rows: label of each row.
        columns: label of each column.
        row: what rows are, as the label of an axis.
        column: what columns are.
    """

    name: str
    values: Tensor
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row: str
    column: str


def weight_maps(model: nn.Module) -> list[WeightMap]:
    """Returns the mean absolute weights of each stack of a network.

    - Joined streams (DenseNet, RDNet): by the source whose channels the weights read, and the function that reads them.
      The weights are those of the first layer that mixes channels: if a function begins with a depthwise convolution,
      of the pointwise one after it. The last column is what reads the level's output: the transition, or the head.
    - Columns (RevCol): the learned scales alpha by level and column; the first column has none.
    - Anything else: the convolutions and linear layers of each residual function, by stage and step.

    Args:
        model: a network of stacks.

    Raises:
        SchemeError: a network without stacks, or a function of joined streams without a layer that mixes them.

    Source:
        Huang et al. 2017, Densely Connected Convolutional Networks, arXiv 1608.06993, section 5 and figure 5.

    Example:
        >>> from odenets.models import DenseNet
        >>> first, last = weight_maps(DenseNet([2, 3], growth=4, stem="conv3", num_classes=10))
        >>> last.name, tuple(last.values.shape), last.rows, last.columns
        ('levels.1', (4, 4), ('input', '1', '2', '3'), ('1', '2', '3', 'head'))
    """
    found: list[WeightMap] = []
    for name, module in model.named_modules():
        # Stacks inside residual functions are part of them.
        if isinstance(module, Stack) and not any(below(name, one.name) for one in found):
            found.append(_of_stack(model, name, module))
    if not found:
        raise SchemeError(f"{type(model).__name__} has no stack.\n  Give a network that holds a Stack.")
    return found


def _of_stack(model: nn.Module, name: str, stack: Stack) -> WeightMap:
    steps = [step for step in stack.steps if isinstance(step, Step)]
    scales = [[g for g in step.gs or () if isinstance(g, ChannelScale)] for step in steps]
    if isinstance(stack.scheme, Dense):
        # A step that appends channels has one function.
        prefix = f"{name}." if name else ""
        readers = [(f"{prefix}steps.{n}", _functions(stack, step)[0]) for n, step in enumerate(steps)]
        return _of_sources(model, name, readers, stack.scheme.growth)
    if any(scales):
        levels = max(map(len, scales))
        values = torch.full((levels, len(steps)), torch.nan, dtype=torch.float64)
        for n, of_step in enumerate(scales):
            for level, scale in enumerate(of_step):
                values[level, n] = _mean(scale.scale)
        return WeightMap(name, values, _counted(levels), _counted(len(steps)), "level", "column")
    stages = max((len(_functions(stack, step)) for step in steps), default=0)
    values = torch.full((stages, len(steps)), torch.nan, dtype=torch.float64)
    for n, step in enumerate(steps):
        for stage, f in enumerate(_functions(stack, step)):
            weights = [layer.weight.detach().flatten() for layer in _layers(f)]
            if weights:
                values[stage, n] = _mean(torch.cat(weights))
    return WeightMap(name, values, _counted(stages), _counted(len(steps)), "stage", "step")


def _functions(stack: Stack, step: Step) -> list[nn.Module]:
    shared = stack.block
    return list(step.fs) if step.fs is not None else [shared] if shared is not None else []


def _of_sources(model: nn.Module, name: str, readers: list[tuple[str, nn.Module]], growth: int) -> WeightMap:
    """Rows are sources, beginning with the level's input; columns are readers, the transition or the head last."""
    count, columns = len(readers), [*_counted(len(readers))]
    if follower := _follower(model, name):
        readers = [*readers, follower]
        columns.append("head" if follower[0] == "head" else "transition")
    values = torch.full((count + 1, len(readers)), torch.nan, dtype=torch.float64)
    first = 0
    for n, (reader, f) in enumerate(readers):
        layer = next(_mixing(f), None)
        width = 0 if layer is None else layer.weight.shape[1]
        first = width if n == 0 else first
        if layer is None or not first or width != first + n * growth:
            raise SchemeError(
                f"{reader}: no layer reads all {first + n * growth} channels that are joined there; "
                f"the first that mixes channels reads {width}.\n  Let a convolution or a linear layer read them."
            )
        # Each channel counts equally in its source, and each weight in its channel.
        of_channel = layer.weight.detach().double().abs().movedim(1, 0).flatten(1).mean(1)
        for source, part in enumerate(of_channel.split([first] + [growth] * n)):
            values[source, n] = part.mean()
    return WeightMap(name, values, ("input", *_counted(count)), tuple(columns), "source", "reader")


def _follower(model: nn.Module, name: str) -> tuple[str, nn.Module] | None:
    """The name and module of what reads a level: the transition after it, or the head."""
    outer, _, level = name.rpartition(".")
    modules = dict(model.named_modules())
    if not outer.endswith("levels") or not level.isdigit():
        return None
    prefix = outer.removesuffix("levels")
    for path in (f"{prefix}transitions.{int(level) + 1}", f"{prefix}head"):
        if path in modules:
            module = modules[path]
            return (path.removeprefix(prefix), module) if next(_mixing(module), None) is not None else None
    return None


def _layers(f: nn.Module) -> Iterator[Layer]:
    for module in f.modules():
        if isinstance(module, Layer):
            yield module


def _mixing(f: nn.Module) -> Iterator[Layer]:
    """Yields the layers that mix channels, in order, without grouped convolutions."""
    for layer in _layers(f):
        if isinstance(layer, nn.Linear) or layer.groups == 1:
            yield layer


def _mean(x: Tensor) -> Tensor:
    return x.detach().double().abs().mean().cpu()


def _counted(count: int) -> tuple[str, ...]:
    return tuple(str(i + 1) for i in range(count))
