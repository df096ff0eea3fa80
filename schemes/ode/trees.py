"""Packs states that are trees of tensors (tuples, dicts, and nestings of them) into one tensor, and unpacks them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import SchemeError

HALF = (torch.float16, torch.bfloat16)
STATES = (*HALF, torch.float32, torch.float64, torch.complex64, torch.complex128)


class Packing:
    """The layout of a tree of tensors in one tensor: flat, or for control per sample (batch, values of the sample).

    A tensor alone keeps its shape. Leaves of several dtypes are stored in the widest of them and returned in their own;
    those of half precision are stored in single, since a small step would be lost on them.

    Args:
        y0: the tree.
        samples: whether the first dimension of every leaf counts samples, which then stay apart.
    """

    def __init__(self, y0: Any, samples: bool = False):
        self.alone = isinstance(y0, Tensor)
        self.samples = samples
        leaves, self.spec = pytree.tree_flatten(y0)
        self._like = pytree.tree_unflatten(range(len(leaves)), self.spec)
        for leaf in leaves:
            _refuse_leaf(leaf)
        if not leaves:
            raise SchemeError("odeint: y0 holds no tensor, want a tensor, or a tuple or dict of tensors.")
        if samples:
            sizes = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
            if len(sizes) != 1 or None in sizes:
                raise SchemeError(
                    "odeint: batch='independent' wants the samples along the first dimension of every tensor of y0, "
                    f"got shapes {', '.join(str(tuple(leaf.shape)) for leaf in leaves)}."
                )
        # They become one tensor.
        if len({leaf.device for leaf in leaves}) > 1:
            raise SchemeError("odeint: the tensors of y0 are on several devices, want one.")
        self.shapes = [leaf.shape for leaf in leaves]
        self.dtypes = [leaf.dtype for leaf in leaves]
        kept = 1 if samples else 0
        self.sizes = [leaf.shape[kept:].numel() for leaf in leaves]
        self.dtype = torch.float32 if leaves[0].dtype in HALF else leaves[0].dtype
        for leaf in leaves[1:]:
            # The widest holds all of them; unpacking restores each leaf's own.
            self.dtype = torch.promote_types(self.dtype, leaf.dtype)
        # Whether packing changes nothing.
        self.plain = self.alone and self.dtype == leaves[0].dtype

    def pack(self, tree: Any, what: str = "func") -> Tensor:
        """Packs a tree into one tensor."""
        if self.alone:
            narrow = isinstance(tree, Tensor) and tree.dtype in HALF and not self.plain
            return tree.to(self.dtype) if narrow else tree
        leaves = self._leaves(tree)
        if leaves is None:
            raise SchemeError(f"odeint: {what} returned {_written(tree)}, want the structure of y0.")
        flat = []
        for leaf, shape, dtype in zip(leaves, self.shapes, self.dtypes, strict=True):
            if not isinstance(leaf, Tensor):
                raise SchemeError(f"odeint: {what} returned a {type(leaf).__name__} among its tensors.")
            # Packed with a complex neighbour it would fit, but its imaginary part would be lost when it is unpacked.
            if leaf.is_complex() and not dtype.is_complex:
                raise SchemeError(f"odeint: {what} returned {leaf.dtype} for a part of y0 that is {dtype}.")
            if torch.promote_types(leaf.dtype, self.dtype) != self.dtype:
                raise SchemeError(
                    f"odeint: {what} returned {leaf.dtype} for a part of y0 that is {dtype}; "
                    f"convert y0 before the solve, or what {what} returns: .to({dtype})."
                )
            if self.samples:  # rows may have been left out
                shape = (leaf.shape[0] if leaf.ndim else shape[0], *shape[1:])
            if leaf.shape != shape:
                try:
                    leaf = leaf.expand(shape)
                except RuntimeError:
                    raise SchemeError(
                        f"odeint: {what} returned {tuple(leaf.shape)} for a part of y0 of shape {tuple(shape)}."
                    ) from None
            flat.append(leaf.reshape(leaf.shape[0], -1) if self.samples else leaf.reshape(-1))
        return torch.cat([leaf.to(self.dtype) for leaf in flat], 1 if self.samples else 0)

    def _leaves(self, tree: Any) -> list[Any] | None:
        """The leaves of a tree in the order of y0's; None where it has another structure."""
        leaves, spec = pytree.tree_flatten(tree)
        if spec != self.spec:
            # The keys of a dict have an order, which is not part of its structure.
            leaves, spec = pytree.tree_flatten(_ordered(tree, self._like))
        return leaves if spec == self.spec else None

    def unpack(self, flat: Tensor, lead: tuple[int, ...] = ()) -> Any:
        """Unpacks a tensor into a tree; ``lead`` are dimensions in front of the state's, such as the times."""
        if self.alone:
            return flat if self.plain else flat.to(self.dtypes[0])
        leaves = []
        for part, shape, dtype in zip(flat.split(self.sizes, -1), self.shapes, self.dtypes, strict=True):
            if part.is_complex() and not dtype.is_complex:
                part = part.real
            rest = (flat.shape[-2], *shape[1:]) if self.samples else tuple(shape)
            leaves.append(part.reshape((*lead, *rest)).to(dtype))
        return pytree.tree_unflatten(leaves, self.spec)

    def tolerance(self, name: str, value: Any, like: Tensor) -> float | Tensor:
        """A tolerance as a number, or as a tensor that broadcasts against the packed state."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, Tensor):
            if value.requires_grad:
                raise SchemeError(f"odeint: {name} requires a gradient; a tolerance has none, detach it.")
            if value.is_complex() or value.dtype == torch.bool:
                raise SchemeError(f"odeint: {name} is of {value.dtype}, want real numbers.")
            if value.numel() == 1:
                return float(value)
            if not self.alone:
                raise SchemeError(f"odeint: {name} is one tensor for a y0 of {len(self.sizes)}; want one per tensor.")
            return _fitting(name, value.to(like.device, like.abs().dtype), like.shape)
        if not isinstance(value, (tuple, list, dict)) and pytree.tree_flatten(value)[1].is_leaf():
            raise SchemeError(f"odeint: {name} is {value!r}, want a number, a tensor, or a tree of them like y0.")
        # Matched by the keys of y0 where it has some; else by position, since torchdiffeq's callers give tuples.
        found = self._leaves(value)
        leaves = pytree.tree_leaves(value) if found is None else found
        if self.alone or len(leaves) != len(self.sizes):
            raise SchemeError(f"odeint: {name} has {len(leaves)} parts, y0 {len(self.sizes)}; want as many.")
        if found is None and not isinstance(value, (tuple, list)):
            raise SchemeError(f"odeint: {name} is {_written(value)}, want the structure of y0 or a tuple in its order.")
        # Tolerances are real, whatever the state.
        real = torch.empty((), dtype=self.dtype).real.dtype
        parts = []
        for leaf, shape, size in zip(leaves, self.shapes, self.sizes, strict=True):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                raise SchemeError(f"odeint: {name} requires a gradient; a tolerance has none, detach it.")
            if isinstance(leaf, Tensor) and (leaf.is_complex() or leaf.dtype == torch.bool):
                raise SchemeError(f"odeint: {name} holds a tensor of {leaf.dtype}, want real numbers.")
            if not isinstance(leaf, Tensor) and (isinstance(leaf, bool) or not isinstance(leaf, (int, float))):
                raise SchemeError(f"odeint: {name} holds {leaf!r}, want numbers or tensors.")
            part = torch.as_tensor(leaf, dtype=real, device=like.device)
            whole = _fitting(name, part, shape).expand(shape)
            parts.append(whole.reshape(shape[0], size) if self.samples else whole.reshape(-1))
        return torch.cat(parts, -1)

    def norm(self, given: Callable[[Any], Tensor] | None) -> Callable[[Tensor], Tensor] | None:
        """A norm of packed states: the user's norm of trees, or for several tensors the largest of their norms."""
        if given is not None:
            if self.samples and not self.alone:
                # The norm takes a single sample, which to ``unpack`` is a batch of one.
                return lambda flat: _number(given(pytree.tree_map(lambda x: x[0], self.unpack(flat[None]))))
            if self.alone:
                # In the solver's precision: a weighted error can be too large for half.
                return lambda flat: _number(given(flat))
            return lambda flat: _number(given(self.unpack(flat)))
        if self.alone or len(self.sizes) == 1:
            return None
        return lambda flat: torch.stack([rms(part) for part in flat.split(self.sizes, -1) if part.shape[-1]]).amax()


def _refuse_leaf(leaf: Any) -> None:
    """Refuses a leaf that cannot be part of a state."""
    if not isinstance(leaf, Tensor):
        raise SchemeError(
            f"odeint: y0 holds a {type(leaf).__name__}, want tensors alone; "
            "what the solver does not change is for func to read."
        )
    if leaf.dtype not in STATES:
        raise SchemeError(
            f"odeint: y0 is of {leaf.dtype}, want real or complex floating-point numbers; convert it, y0.float()."
        )
    if leaf.layout != torch.strided or leaf.is_nested:
        raise SchemeError("odeint: y0 is sparse or nested, want a dense tensor (y0.to_dense(), or a tuple of tensors).")
    if leaf.is_meta:
        raise SchemeError("odeint: y0 is on the device meta and has no values, by which steps are chosen.")


def rms(x: Tensor) -> Tensor:
    """The root mean square of all entries."""
    # One kernel instead of four, at every step.
    return torch.linalg.vector_norm(x) / max(x.numel(), 1) ** 0.5


def _number(norm: Any) -> Tensor:
    """The result of the user's norm, as a tensor without dimensions."""
    if not isinstance(norm, Tensor):
        if isinstance(norm, bool) or not isinstance(norm, (int, float)):
            raise SchemeError(f"odeint: norm returned a {type(norm).__name__}, want one real number.")
        norm = torch.as_tensor(norm)
    if norm.numel() != 1 or norm.is_complex():
        raise SchemeError(
            f"odeint: norm returned a {norm.dtype} of shape {tuple(norm.shape)}, want one real number, such as "
            "x.abs().max()."
        )
    return norm.reshape(())


def _fitting(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """A tolerance that broadcasts against a state of that shape."""
    if value.ndim > len(shape) or any(n not in (1, m) for n, m in zip(value.shape[::-1], shape[::-1], strict=False)):
        raise SchemeError(
            f"odeint: {name} is of shape {tuple(value.shape)} for a state of {tuple(shape)}; want one that broadcasts."
        )
    return value


def _ordered(tree: Any, like: Any) -> Any:
    """A tree whose dicts have their keys in the order of another tree's, as far as the keys are the same."""
    if type(tree) is not type(like):
        return tree
    if isinstance(like, dict) and tree.keys() == like.keys():
        return type(like)((k, _ordered(tree[k], v)) for k, v in like.items())
    if type(like) in (tuple, list) and len(tree) == len(like):
        return type(like)(_ordered(x, v) for x, v in zip(tree, like, strict=True))
    return tree


def _written(tree: Any) -> str:
    if isinstance(tree, dict):
        return f"a dict with {', '.join(map(repr, tree)) or 'no keys'}"
    return f"{len(tree)} tensors" if isinstance(tree, (tuple, list)) else f"a {type(tree).__name__}"
