"""One evaluation of a field: placing weights in its block, interpolating them, and what autograd keeps of them.

The interpolated weights exist for one call alone. Autograd saves how to recompute them instead of the weights, which
would otherwise be saved once per evaluation: depth times the size of the block.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from schemes.errors import SchemeError
from schemes.splines import Row


class Place(NamedTuple):
    """Where a module keeps a parameter: the module, the name there, the name in the block, the parameter once found."""

    module: nn.Module
    name: str
    key: str
    value: nn.Parameter

    @property
    def holder(self) -> dict[str, Any]:
        """The dictionary that holds the parameter; replicas of DataParallel keep plain tensors as attributes."""
        own = self.module._parameters
        return own if self.name in own else self.module.__dict__

    def now(self) -> Any:
        """Returns the current value: in a reversed pass, a leaf that replaces the parameter."""
        return self.holder[self.name]


def places_of(block: nn.Module) -> list[list[Place]]:
    """Returns the places of each parameter that can be interpolated (real or complex); a tied one has several."""
    found: dict[int, list[Place]] = {}
    for prefix, module in block.named_modules():
        names = [k for k, p in module._parameters.items() if p is not None]
        for name in [*names, *module.__dict__.get("_former_parameters", ())]:
            p = getattr(module, name)
            if p.is_floating_point() or p.is_complex():
                found.setdefault(id(p), []).append(Place(module, name, f"{prefix}.{name}".lstrip("."), p))
    return list(found.values())


def blend(coefficients: Tensor, row: Row) -> Tensor:
    """Returns the sum of coefficients weighted by the values of a row; a single one, of value 1, is a view."""
    used = [(row.first + k, w) for k, w in enumerate(row.values) if w != 0.0]
    if len(used) == 1:
        return coefficients[used[0][0]]
    return _sum([coefficients[k] for k, _ in used], [w for _, w in used])


def _sum(rows: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Returns sum_k weights[k] rows[k] of two or more rows."""
    if len(rows) == 2:
        return torch.lerp(rows[0], rows[1], weights[1])  # the weights are a partition of unity
    # Summed in place: one tensor of the weights' size instead of one per term.
    found = rows[0] * weights[0]
    for r, w in zip(rows[1:], weights[1:], strict=True):
        found.add_(r, alpha=w)
    return found


def product(basis: Tensor, coefficients: Tensor) -> Tensor:
    """Returns the sum of coefficients weighted by all basis functions, a tensor of them."""
    kind = coefficients.device.type
    # To autocast this is a matrix product, but the weights of a norm or a gain keep their precision.
    quiet = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    with quiet:
        return torch.tensordot(basis.to(coefficients), coefficients, 1)


class Interpolation(torch.autograd.Function):
    """All weights of a block at one time, as one node of the graph; twice differentiable, also in forward mode.

    Takes the values of the basis functions, and as many coefficients for each parameter.
    """

    @staticmethod
    def forward(ctx: Any, weights: tuple[float, ...], *rows: Tensor) -> tuple[Tensor, ...]:
        # Only the numbers are saved: the sum is linear, so its gradients do not need the coefficients.
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
    """Within it, the block holds these weights."""
    before = []
    try:
        for same, w in zip(places, weights, strict=True):
            for place in same:
                holder = place.holder
                before.append((holder, place.name, holder[place.name]))
                holder[place.name] = w
        yield
    finally:
        # Also after an error, or the block would keep the weights of one time.
        for holder, name, value in before:
            holder[name] = value


def kept_out(
    row: Row | None, places: Sequence[Sequence[Place]], weights: Sequence[Tensor], look: bool
) -> AbstractContextManager[Any]:
    """Within it, autograd saves how to recompute the weights, which would otherwise be saved in every evaluation.

    With ``look``, weights that were written to past autograd's notice are refused at the end.
    """
    if row is None or not torch.is_grad_enabled():
        return nullcontext()
    # A checkpoint or an offload to the host handles all saved tensors itself, and hooks of ours would come first.
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # type: ignore[attr-defined]
        return nullcontext()
    made: dict[int, _Made] = {}
    for same, w in zip(places, weights, strict=True):
        # Empty tensors share the address 0, and would be mistaken for each other.
        if w.requires_grad and w.numel():
            storage = w.untyped_storage()
            made[storage.data_ptr()] = _Made(same[0].now(), w.dtype, w._version, storage, w, same[0].key)

    def pack(x: Tensor) -> Any:
        found = made.get(x.untyped_storage().data_ptr()) if x.layout is torch.strided else None
        # A weight that the block has written to is no longer that of the spline, and a view that conjugates, negates
        # or reads complex numbers as real ones is more than strides.
        if found is not None and x._version == found.version and x.dtype == found.dtype:
            if not (x.is_conj() or x.is_neg()):
                return _Recipe(found.source, row, x)
        # Detached, since an output that its own node saves would never be freed; and with its version, which torch
        # checks only without hooks.
        return x.detach(), x._version

    return _KeptOut(made, pack, row, look)


class _KeptOut(torch.autograd.graph.saved_tensors_hooks):
    """The hooks of one evaluation, at whose end the weights that it was given are released."""

    def __init__(self, made: dict[int, "_Made"], pack: Callable[[Tensor], Any], row: Row, look: bool):
        super().__init__(pack, _unpack)
        self.made, self.row, self.look = made, row, look

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        # Saved tensors keep their hooks, and these would keep the weights.
        found = [*self.made.items()]
        self.made.clear()
        if self.look and args[0] is None:
            for address, each in found:
                each.check(address, self.row)


class _Made(NamedTuple):
    """An interpolated weight as the block was given it: its coefficients, dtype, version, storage, itself, its name."""

    source: Tensor
    dtype: torch.dtype
    version: int
    storage: Any  # held, so that a block that replaces a weight's data does not free the address for another tensor
    weight: Tensor
    name: str

    def check(self, address: int, row: Row) -> None:
        """Refuses a weight that is no longer that of the spline, although its version says that nobody wrote to it."""
        w = self.weight
        # What other kinds of tensors hold, and what a recorded graph will hold, is not known here.
        if type(w) is not Tensor or w.is_meta or (w.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        # One whose data was replaced lies elsewhere, and is saved as it is.
        if w._version != self.version or w.untyped_storage().data_ptr() != address:
            return
        with torch.no_grad():
            same = torch.allclose(w.detach(), blend(self.source, row), rtol=0.0, atol=0.0, equal_nan=True)
        if not same:
            raise SchemeError(
                f"ContinuousWeights: the block writes to its {self.name} through .data, which autograd does not see; "
                "the backward pass makes the weight again.\n"
                "  Write to the parameter itself within torch.no_grad()."
            )


class _Recipe:
    """How to recompute a weight that autograd wanted to save: the coefficients, the row, and the saved view."""

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
        # Layers save weights transposed or reshaped: this is the same view of the recomputed weight.
        return blend(held.source, held.row).as_strided(*held.view)
