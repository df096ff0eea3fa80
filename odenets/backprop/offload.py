"""Offloading: tensors that autograd saves go to the host in the forward pass, and return when they are used."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .limits import in_our_words

SMALLEST = 4096  # bytes; smaller tensors are not worth a copy


class _Kept:
    """A saved tensor that stays where it is; like any saved tensor it must not be written to."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor):
        self.tensor, self.version = tensor, -1 if tensor.is_inference() else tensor._version

    def back(self) -> Tensor:
        if self.version >= 0 and self.tensor._version != self.version:
            raise RuntimeError(
                f"Stack: a tensor of shape {tuple(self.tensor.shape)} that the backward pass needs was changed in "
                f"place: it is at version {self.tensor._version}, expected {self.version}."
            )
        return self.tensor


class _OnHost:
    """A saved tensor's copy on the host."""

    __slots__ = ("copy", "device")

    def __init__(self, tensor: Tensor):
        self.device = tensor.device
        # Pinned, so that the transfer back can overlap with work of the device.
        self.copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        # A blocking copy: afterwards the device memory may be reused at once.
        self.copy.copy_(tensor)

    def back(self) -> Tensor:
        return self.copy.to(self.device, non_blocking=self.copy.is_pinned())


class Offloading(saved_tensors_hooks):
    """Inside, tensors that autograd saves are kept on the host; parameters and small tensors stay where they are.

    A tensor that several operations save is copied once.
    """

    def __init__(self) -> None:
        self.copies: dict[tuple[Any, ...], tuple[Any, _OnHost]] = {}
        super().__init__(self._pack, _back)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        # The graph holds the copies that it needs; this table would keep the others alive.
        self.copies.clear()

    def _pack(self, x: Tensor) -> Any:
        # A leaf is a parameter or an input, which exists all the time. A tensor on the host has nowhere else to go.
        stays = x.device.type == "cpu" or x.layout != torch.strided or x.nbytes < SMALLEST or x.is_inference()
        if (
            stays
            or (x.is_leaf and x.requires_grad)
            or (x._base is not None and x._base.is_leaf and x._base.requires_grad)
        ):
            return _Kept(x)
        storage, key = x.untyped_storage(), _key(x)
        known = self.copies.get(key)
        # An address may be reused; the weak reference tells whether it is still the same storage.
        if known is not None and known[0]() is storage:
            return known[1]
        copy = _OnHost(x)
        self.copies[key] = (weakref.ref(storage), copy)
        return copy


def _key(x: Tensor) -> tuple[Any, ...]:
    """A key that is equal for two saved tensors of the same values in the same memory."""
    # The version is part of it: after an in-place write, the same memory holds other values. A conjugate, or the
    # imaginary part of one, is a view of the same memory, which a bit on the tensor turns into other values.
    place = x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape), x.stride()
    return *place, x.dtype, x._version, x.is_conj(), x.is_neg()


def _back(kept: Any) -> Tensor:
    return kept.back()


@in_our_words
def offloaded(run: Callable[[], Any]) -> Any:
    """Returns ``run()``, with everything that autograd saves in it kept on the host."""
    with Offloading():
        return run()
