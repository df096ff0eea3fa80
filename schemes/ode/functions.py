"""Checks before the first call whether the functions given to a solve can be called as the solve will call them."""

import inspect
from typing import Any

import torch

from ..errors import SchemeError

CLOCKS = ("t", "time")


def callable_as(what: str, f: Any, *arguments: str) -> None:
    """Refuses a function that cannot be called with that many arguments, as far as its signature tells.

    Args:
        what: the caller and the argument, for messages: "odeint: func".
        f: the function.
        arguments: names of the arguments; where the first is the time, a function that names it second is refused too.

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
    # A module's ``__call__`` takes anything; its ``forward`` counts, unless its class overrides ``__call__``.
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
    # scipy's order: the time would be taken for the state, and silently broadcast against it.
    if arguments[0] in CLOCKS and len(bound) > 1 and bound[1] in CLOCKS and bound[0] not in CLOCKS:
        raise SchemeError(
            f"{what} takes {shown}, the time second, and is called as {name}({form}).\n"
            "  Exchange them: lambda t, y: f(y, t)."
        )
