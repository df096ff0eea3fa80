"""``restack`` and ``unrestack``: containers of blocks are found, checked, and only then changed."""

import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from schemes.errors import SchemeError
from schemes.scheme import Scheme

from ..backprop.modes import Mode
from ..names import closest
from .container import Restacked, Restacking, RestackWarning, restacked

M = TypeVar("M", bound=nn.Module)


def restack(
    model: M,
    path: str | Sequence[str],
    scheme: str | Scheme = "euler",
    backprop: str | Mode = "store",
    *,
    step: float | str = 1.0,
    seed: int | None = None,
    outside: int | None = None,
) -> M:
    """Runs the residual blocks of a model as a ``Stack``, in place: under another scheme, or in less memory.

    A block that adds its input itself, y = block(x), becomes the residual function block(x) - x. Parameters,
    state-dict keys and children of the model are unchanged, so that weights load before or after, ``save_pretrained``
    works and adapters (LoRA) find their layers; ``unrestack`` restores the model. Under ``"euler"`` and, in evaluation,
    ``"bdia"`` its outputs are the same as before, with steps of size 1; under any other scheme or step it is another
    network with the same weights.

    Masks, positions and any other arguments that a model passes to its blocks still reach them. The stack itself is
    ``model.get_submodule(path).stack``.

    Args:
        model: the model; changed, and returned.
        path: name of the ``nn.ModuleList`` or ``nn.Sequential`` of its blocks, such as "vit.layers"; a pattern, as in
            "stages.*.blocks" or "layer?"; or several. Each container becomes its own stack; "" is the model itself.
        scheme: as in ``Stack``.
        backprop: as in ``Stack``: "exact" and "reverse" keep two states instead of all, "checkpoint" one per block.
        step: as in ``Stack``; not "learned".
        seed: as in ``Stack``: seeds what the scheme draws in training (bdia).
        outside: how many of the first blocks run before the stack. None keeps a first block outside that changes the
            shape, as in the levels of a ResNet; where it is built differently from the second, the first call decides.

    Returns:
        The model.

    Raises:
        SchemeError: no such container (the existing ones are named), or a scheme that does not fit its blocks.

    Warns:
        RestackWarning: under this scheme it is another network; or a key-value cache is dropped, in a pass whose blocks
            are run again.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Block(nn.Linear):
        ...     def forward(self, x):
        ...         return x + torch.tanh(super().forward(x))
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Sequential(*(Block(8, 8) for _ in range(6))))
        >>> x = torch.randn(2, 3)
        >>> y = net(x)
        >>> torch.allclose(restack(net, "1", scheme="bdia", backprop="exact").eval()(x), y, atol=1e-6)
        True
        >>> net[1].stack
        ... # doctest: +ELLIPSIS
        Stack(
          bdia, depth=6, evaluations=6, parameters=432, backprop=exact
        ...
    """
    found = {name: container for pattern in _listed(path) for name, container in _containers(model, pattern).items()}
    # All of them are built before the first is changed, so that an error leaves the model as it was.
    made = {
        name: Restacking(name, container, scheme, backprop, step, seed, outside) for name, container in found.items()
    }
    for name, container in found.items():
        # A container that was restacked before loses its hooks first: they would check for a stack that is gone.
        unrestack(model, name)
        # Bypasses Module.__setattr__, and changes the class: the container stays the object, with the children and
        # keys, that the model and its optimiser refer to.
        container.__dict__["_restacking"] = made[name]
        container.__class__ = restacked(type(container))
        owner, _, _ = name.rpartition(".")
        if name:
            owner = model.get_submodule(owner)
            owner.register_forward_pre_hook(_Begins(made[name]))
            owner.register_forward_hook(_Reached(made[name]))
    other = [name for name in found if not made[name].faithful]
    if other:
        warnings.warn(
            f"restack: under {scheme}{'' if step == 1 else f' with step={step}'} the blocks of "
            f"{', '.join(map(repr, other))} make another network than the one that their weights were trained for; "
            "train it, or use scheme='euler' or 'bdia'.",
            RestackWarning,
            stacklevel=2,
        )
    return model


def unrestack(model: M, path: str | Sequence[str] | None = None) -> M:
    """Restores the containers of a model that ``restack`` has changed, in place.

    Args:
        model: the model; changed, and returned.
        path: which containers, as in ``restack``; None means all.

    Returns:
        The model.

    Raises:
        SchemeError: no such container.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))))
        >>> type(unrestack(restack(net, "0"))[0]).__name__
        'Sequential'
    """
    chosen = None
    if path is not None:
        chosen = {id(c) for pattern in _listed(path) for c in _containers(model, pattern).values()}
    for container in list(model.modules()):
        if not isinstance(container, Restacked) or (chosen is not None and id(container) not in chosen):
            continue
        restacking = vars(container).pop("_restacking")
        container.__class__ = container._base  # type: ignore[assignment]
        # The owner is not known here, and a pattern may have given it several hooks.
        for m in model.modules():
            for hooks in (m._forward_pre_hooks, m._forward_hooks):
                for key in [k for k, hook in hooks.items() if getattr(hook, "restacking", None) is restacking]:
                    del hooks[key]
    return model


class _Begins:
    """Forward pre-hook on the module that owns a container: notes that its pass begins."""

    def __init__(self, restacking: Restacking):
        self.restacking = restacking

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self.restacking.reached.discard(threading.get_ident())


class _Reached(_Begins):
    """Forward hook on the module that owns a container: checks that its pass has run the stack.

    Raises:
        SchemeError: it has not.
    """

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        if not torch.compiler.is_compiling() and threading.get_ident() not in self.restacking.reached:
            raise SchemeError(
                f"restack: {type(module).__name__} has not run the blocks of {self.restacking.path!r} by iterating "
                "over them, so that they were no stack in this pass.\n  It calls them by number, or some of them, or "
                "none; give it its blocks back: odenets.unrestack(model)."
            )


def _listed(path: str | Sequence[str]) -> Sequence[str]:
    return (path,) if isinstance(path, str) else path


def _containers(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """Returns the containers of blocks that a pattern names.

    Raises:
        SchemeError: there is none, or the pattern names something else.
    """
    every: dict[str, Any] = {
        name: m for name, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m)
    }
    # As shell wildcards, except that a star stops at a dot: in "stages.*.blocks" it matches one name.
    form = re.compile(re.escape(pattern).replace(r"\*", r"[^.]*").replace(r"\?", r"[^.]"))
    found = {name: m for name, m in every.items() if form.fullmatch(name)}
    if found:
        return found
    named = dict(model.named_modules())
    what = f"{pattern!r} is no module of {type(model).__name__}"
    if pattern in named:
        what = f"{pattern!r} is a {type(named[pattern]).__name__}, want a ModuleList or Sequential of blocks"
    lists = [f"{name!r} ({len(m)} {type(m[0]).__name__})" for name, m in _of_equals(every) if name]
    # The names alone, since class names and counts would affect the similarity.
    names = [text.split("'")[1] for text in lists]
    close = closest(pattern, names, cutoff=0.0)
    ranked = sorted(lists, key=lambda text: (text.split("'")[1] not in close, lists.index(text)))
    raise SchemeError(f"restack: {what}.\n  There are: {', '.join(ranked[:8]) or 'no containers of several blocks'}.")


def _of_equals(every: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the containers of two or more modules of one class: those that look like blocks."""
    for name, m in every.items():
        if len(m) > 1 and len({type(child) for child in m._modules.values()}) == 1:
            yield name, m
