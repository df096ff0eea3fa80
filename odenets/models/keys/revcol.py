"""The published key layout of RevCol, and the embedding of depthwise kernels in larger ones."""

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from schemes import SchemeError

from ...checkpoints import KeyMap

_STEM = re.compile(r"stem\.([01])\.(.+)")
_ALPHA = re.compile(r"subnet(\d+)\.alpha(\d+)")
_FUSION = re.compile(r"subnet(\d+)\.level(\d+)\.fusion\.(down|up|up2)\.(?:channel_reschedule\.)?([01])\.(.+)")
_BLOCK = re.compile(r"subnet(\d+)\.level(\d+)\.blocks\.(\d+)\.(.+)")
_HEAD = re.compile(r"cls(?:_blocks\.(\d+))?\.classifier\.([01])\.(.+)")
_DECODER = re.compile(r"decoder_blocks\.(\d+)\.(normal_layers|proj_layers|projback)\.(\d+)\.(.+)")
_KERNEL = re.compile(r"(^|\.)dwconv\.weight$")


def published(own: Collection[str], keys: Collection[str]) -> KeyMap | None:
    """Maps the keys of the released code, with or without supervision heads, of every size; None for other layouts."""
    if "subnet0.alpha0" not in keys:
        return None
    heads = [int(m[1]) for key in keys if (m := _HEAD.fullmatch(key)) and m[1]]
    last = max(heads, default=None)
    single = not any(".proj_layers." in key for key in keys)
    found = {key: _name(key, last, single) for key in keys}
    supervised = any(key.startswith("supervision.") for key in own)
    names: dict[str, str | None] = {}
    for key, name in found.items():
        if name is None:
            continue  # no such key was published: rejected
        # Heads that the network does not have are left out on purpose, and reported.
        unwanted = (name.startswith("supervision.") and not supervised) or (
            name.startswith("head.") and name not in own
        )
        names[key] = None if unwanted else name
    return KeyMap("published RevCol", names)


def _name(key: str, last: int | None, single: bool) -> str | None:
    """Returns the name of one published key; ``last`` is the number of the final head among several."""
    if m := _STEM.fullmatch(key):
        return f"stem.{('conv', 'norm')[int(m[1])]}.{m[2]}"
    if m := _ALPHA.fullmatch(key):
        # The first column's factors multiply nothing.
        return f"columns.steps.{m[1]}.gs.{m[2]}.alpha" if int(m[1]) else f"idle.{m[2]}"
    if m := _FUSION.fullmatch(key):
        part = "down" if m[3] == "down" else f"up.{int(m[3] == 'up2')}"
        first = "conv" if m[3] == "down" else "linear"
        return f"columns.steps.{m[1]}.fs.{m[2]}.{part}.{(first, 'norm')[int(m[4])]}.{m[5]}"
    if m := _BLOCK.fullmatch(key):
        return f"columns.steps.{m[1]}.fs.{m[2]}.blocks.{m[3]}.{_function(m[4])}"
    if m := _HEAD.fullmatch(key):
        head = "head" if m[1] is None or int(m[1]) == last else f"supervision.heads.{m[1]}"
        return f"{head}.{('norm', 'fc')[int(m[2])]}.{m[3]}"
    if m := _DECODER.fullmatch(key):
        decoder = f"supervision.decoders.{m[1]}"
        # The decoder for many classes has only a norm and a convolution, in the same list.
        if m[2] == "projback":
            return f"{decoder}.{'norm' if single and m[3] == '0' else 'pixels'}.{m[4]}"
        if m[2] == "proj_layers":
            return f"{decoder}.proj.{m[3]}.{m[4]}"
        return f"{decoder}.blocks.{m[3]}.{_function(m[4].removeprefix('0.'))}"
    return None


def _function(name: str) -> str:
    return name.replace("pwconv", "fc")


def pad_kernels(state: Mapping[str, Tensor], kernel_size: int, std: float = 1e-7) -> dict[str, Tensor]:
    """Centres a state dict's depthwise kernels in larger ones, for fine-tuning with a wider receptive field.

    The new entries are drawn from a normal distribution, so that the network starts as it was, up to about ``std``.

    Args:
        state: a state dict, in the published layout or this library's.
        kernel_size: side of the new kernels, odd; kernels that already have it are left as they are.
        std: standard deviation of the new entries.

    Returns:
        A new state dict; everything else is the same tensor as before.

    Raises:
        SchemeError: a kernel is larger than that, or the side is even.

    Example:
        >>> import torch
        >>> wide = pad_kernels({"blocks.0.dwconv.weight": torch.ones(4, 1, 3, 3)}, 7)["blocks.0.dwconv.weight"]
        >>> wide.shape, bool((wide[:, :, 2:5, 2:5] == 1).all())
        (torch.Size([4, 1, 7, 7]), True)
    """
    out = dict(state)
    for key, weight in state.items():
        # A decoder's blocks keep their kernel size of 3.
        if not _KERNEL.search(key) or "decoder" in key:
            continue
        margin, odd = divmod(kernel_size - weight.shape[-1], 2)
        if odd or margin < 0:
            raise SchemeError(
                f"{key} is {weight.shape[-2]} x {weight.shape[-1]}, and does not fit the middle of {kernel_size} x "
                f"{kernel_size}; want an odd side, at least as large."
            )
        if margin:
            wide = torch.empty(*weight.shape[:2], kernel_size, kernel_size, dtype=weight.dtype, device=weight.device)
            wide.normal_(std=std)
            wide[..., margin:-margin, margin:-margin] = weight
            out[key] = wide
    return out
