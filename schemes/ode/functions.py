"""Functions that a solve is given: whether they can be called as they will be, told before the first call."""

import inspect
from typing import Any

import torch

from ..errors import SchemeError

CLOCKS = ("t", "time")


def callable_as(what: str, f: Any, *arguments: str) -> None:
    """Refuses what cannot be called with so many arguments, as far as its signature tells.

    Args:
        what: who is given it, and as what: "odeint: func".
        f: the function.
        arguments: names of the arguments; where the first is the time, one that names it second is refused too.

    Raises:
        SchemeError: with the signature, and what to write instead.
    """
    name, form = what.rsplit(" ", 1)[-1], ", ".join(arguments)
    if isinstance(f, type):
        raise SchemeError(
            f"{what} is the class {f.__name__}, want a function of ({form}).\n  Make one of it: {f.__name__}(...)."
        )
    if not callable(f):
        raise SchemeError(f"{what} is a {type(f).__name__}, want a function of ({form}).")
    # A module's own call takes anything; what counts is its ``forward``, unless it is called otherwise.
    plain = isinstance(f, torch.nn.Module) and type(f).__call__ is torch.nn.Module.__call__
    try:
        signature = inspect.signature(f.forward if plain else f)  # type: ignore[union-attr]
    except (TypeError, ValueError):  # some builtins have none
        return
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    shown = str(inspect.Signature(bare))
    try:
        bound = [*signature.bind(*arguments).arguments]
    except TypeError:
        raise SchemeError(
            f"{what} takes {shown}, and is called as {name}({form}).\n"
            f"  Wrap it in a function of these: lambda {form}: ..."
        ) from None
    # scipy's order: the time would be taken for the state, and broadcast against it without a word.
    if arguments[0] in CLOCKS and len(bound) > 1 and bound[1] in CLOCKS and bound[0] not in CLOCKS:
        raise SchemeError(
            f"{what} takes {shown}, the time second, and is called as {name}({form}).\n"
            "  Exchange them: lambda t, y: f(y, t)."
        )
