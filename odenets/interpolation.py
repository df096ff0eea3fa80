"""One evaluation of a field: where the weights stand in its block, how they are interpolated, what autograd keeps.

The interpolated weights exist for one call alone. Autograd keeps how they are made and not the weights, which would
otherwise be kept once per evaluation: depth times the size of the block.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from schemes.splines import Row


class Place(NamedTuple):
    """Where a module keeps a parameter: the module, the name there, the name in the block, the parameter once found."""

    module: nn.Module
    name: str
    key: str
    value: nn.Parameter

    @property
    def holder(self) -> dict[str, Any]:
        """The dictionary that holds it; replicas of DataParallel keep plain tensors as attributes."""
        own = self.module._parameters
        return own if self.name in own else self.module.__dict__

    def now(self) -> Any:
        """What stands there now: in a reversed pass a leaf in the parameter's stead."""
        return self.holder[self.name]


def places_of(block: nn.Module) -> list[list[Place]]:
    """The places of each parameter that is a number to be interpolated; a tied one has several."""
    found: dict[int, list[Place]] = {}
    for prefix, module in block.named_modules():
        names = [k for k, p in module._parameters.items() if p is not None]
        for name in [*names, *module.__dict__.get("_former_parameters", ())]:
            p = getattr(module, name)
            if p.is_floating_point() or p.is_complex():
                found.setdefault(id(p), []).append(Place(module, name, f"{prefix}.{name}".lstrip("."), p))
    return list(found.values())


def blend(coefficients: Tensor, row: Row) -> Tensor:
    """The sum of coefficients with the values of a row; a single one of value 1 is a view."""
    used = [(row.first + k, w) for k, w in enumerate(row.values) if w != 0.0]
    if len(used) == 1:
        return coefficients[used[0][0]]
    return _sum([coefficients[k] for k, _ in used], [w for _, w in used])


def _sum(rows: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_k weights[k] rows[k], of two or more."""
    if len(rows) == 2:
        return torch.lerp(rows[0], rows[1], weights[1])  # weights of a partition of unity
    # Summed in place: one tensor of the weights' size, and not one per term.
    found = rows[0] * weights[0]
    for r, w in zip(rows[1:], weights[1:], strict=True):
        found.add_(r, alpha=w)
    return found


class Interpolation(torch.autograd.Function):
    """All weights of a block at one time, as one node of the graph; twice differentiable, forwards too.

    Takes the values of the basis functions, and for each parameter as many coefficients.
    """

    @staticmethod
    def forward(ctx: Any, weights: tuple[float, ...], *rows: Tensor) -> tuple[Tensor, ...]:
        # Numbers alone are kept: the sum is linear, and its gradients need no coefficients.
        ctx.weights = weights
        n = len(weights)
        return tuple(_sum(rows[k : k + n], weights) for k in range(0, len(rows), n))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, *(None if g is None else g * w for g in grads for w in ctx.weights))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        found, n = [], len(ctx.weights)
        for k in range(1, len(tangents), n):
            part = [t for t in tangents[k : k + n] if t is not None]
            found.append(_sum(part, ctx.weights) if len(part) == n else None)
        return tuple(found)


@contextmanager
def standing(places: Sequence[Sequence[Place]], weights: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the block holds these weights."""
    before = []
    try:
        for same, w in zip(places, weights, strict=True):
            for place in same:
                holder = place.holder
                before.append((holder, place.name, holder[place.name]))
                holder[place.name] = w
        yield
    finally:
        # Also after an error: the block would go on with the weights of one time.
        for holder, name, value in before:
            holder[name] = value


def kept_out(
    row: Row | None, places: Sequence[Sequence[Place]], weights: Sequence[Tensor]
) -> AbstractContextManager[Any]:
    """Inside, autograd keeps how the weights are made and not the weights: else they would be kept per evaluation."""
    if row is None or not torch.is_grad_enabled():
        return nullcontext()
    # A checkpoint, or what moves tensors to the host, looks after all tensors itself: hooks of ours would come first.
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # type: ignore[attr-defined]
        return nullcontext()
    made: dict[int, Tensor] = {}
    for same, w in zip(places, weights, strict=True):
        # Empty tensors share the address 0, and would be taken for each other.
        if w.requires_grad and w.numel():
            made[w.untyped_storage().data_ptr()] = same[0].now()

    def pack(x: Tensor) -> Any:
        source = made.get(x.untyped_storage().data_ptr()) if x.layout is torch.strided else None
        # Detached, since an output that holds itself would never be freed; and with its version, which torch checks
        # only where there are no hooks.
        return (x.detach(), x._version) if source is None else _Recipe(source, row, x)

    return torch.autograd.graph.saved_tensors_hooks(pack, _unpack)


class _Recipe:
    """How a weight that autograd asked to keep is made again: the coefficients, the row, the view that was kept."""

    __slots__ = ("row", "source", "version", "view")

    def __init__(self, source: Tensor, row: Row, kept: Tensor):
        self.source, self.row, self.version = source, row, source._version
        self.view = kept.shape, kept.stride(), kept.storage_offset()


def _unpack(held: Any) -> Tensor:
    if not isinstance(held, _Recipe):
        x, version = held
        if x._version != version:
            raise RuntimeError(
                f"ContinuousWeights: a tensor of shape {tuple(x.shape)} inside of the block, needed for its gradient, "
                "has been modified by an inplace operation."
            )
        return x
    if held.source._version != held.version:
        raise RuntimeError(
            f"ContinuousWeights: coefficients of shape {tuple(held.source.shape)} were changed in place between the "
            "forward and the backward pass, which makes the weights again.\n"
            "  Change them, or step the optimiser, after the last backward pass."
        )
    with torch.no_grad():
        # Layers keep a weight transposed or reshaped: the same view of what was made again.
        return blend(held.source, held.row).as_strided(*held.view)
