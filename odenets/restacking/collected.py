"""Hidden states for transformers to collect: those after the steps of the scheme, not those that its hooks would see.

Its models collect through forward hooks, on modules that a model names: on each block (ViT, Llama), or on the stage
around several blocks (ConvNeXt, Segformer), whose output is the same whatever runs inside.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from schemes.errors import SchemeError

_HOOKS = "transformers.utils.output_capturing"


class Collection:
    """Collects the hidden states of one pass.

    Args:
        path: path of the blocks in their model, for messages.
        collector: transformers' own, a list for each kind of output.
        hooks: for each block, the hook that collects its output.
    """

    def __init__(self, path: str, collector: dict[str, Any], hooks: Sequence[Callable[..., Any]]):
        self.path, self.collector, self.hooks = path, collector, hooks

    def take(self, x: Tensor, states: Sequence[Tensor], scheme: str) -> None:
        """Collects the input of the blocks and the states after the steps, as the hooks would: all, or those chosen.

        Raises:
            SchemeError: some are chosen by number, and there are not as many states as blocks.
        """
        chosen = self.collector.get("_hidden_states_layers")
        if chosen is not None and len(states) != len(self.hooks):
            raise SchemeError(
                f"restack: output_hidden_states chooses hidden states by number, and the {len(self.hooks)} blocks of "
                f"{self.path!r} make {len(states)} under {scheme}.\n  Ask for all of them: output_hidden_states=True."
            )
        # The hooks themselves know whether the input is collected too, and which states are chosen.
        for hook, before, after in zip(self.hooks, [x, *states], states, strict=False):
            hook(None, (before,), after)


class _Sieve(list[Any]):
    """A list that discards what is appended to it."""

    def append(self, value: Any) -> None:
        """Discards the value."""


@contextmanager
def collecting(path: str, blocks: Sequence[nn.Module]) -> Iterator[Collection | None]:
    """Yields a ``Collection`` for these blocks in this pass, or None; within the context their hooks collect nothing.

    Args:
        path: path of the blocks in their model, for messages.
        blocks: the blocks of the stack.

    Raises:
        SchemeError: hidden states are collected from modules inside the blocks.
    """
    module = sys.modules.get(_HOOKS)
    active = None if module is None else module._active_collector
    # A compiler cannot trace a context variable; transformers keeps a plain global for it.
    collector = active and (active.global_var if torch.compiler.is_compiling() else active.get())
    collected = collector.get("hidden_states") if collector else None
    found = [] if collected is None else [_hook(block) for block in blocks]
    hooks = [hook for hook in found if hook is not None]
    if not hooks:
        if found and any(_hook(m) for block in blocks for m in block.modules()):
            raise SchemeError(
                f"restack: the model collects hidden states inside of the blocks of {path!r}, where a scheme has none."
                "\n  Turn it off, output_hidden_states=False, or give the model back: odenets.unrestack(model)."
            )
        yield None
        return
    collector["hidden_states"] = _Sieve()  # type: ignore[index]
    try:
        # Left in place, the hooks would collect values of stages, which are not states of the network.
        yield Collection(path, collector, hooks)  # type: ignore[arg-type]
    finally:
        collector["hidden_states"] = collected  # type: ignore[index]


def _hook(module: nn.Module) -> Callable[..., Any] | None:
    """Returns the module's hook that collects hidden states, or None."""
    for hook in module._forward_hooks.values():
        # Only a hook's closure tells what it collects; a hook without the key is counted rather than overlooked.
        if getattr(hook, "__module__", None) == _HOOKS:
            if inspect.getclosurevars(hook).nonlocals.get("key", "hidden_states") == "hidden_states":
                return hook
    return None
