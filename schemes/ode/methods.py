"""Finds the scheme of a solve from its argument ``method``; torchdiffeq's names are known."""

from typing import Any

from ..errors import SchemeError
from ..scheme import Scheme

# torchdiffeq's names of methods that the language names differently, and of those that it does not have.
ALIASES = {"adaptive_heun": "heun2"}
ABSENT = {
    "fehlberg2": "heun2 or bosh3",
    "explicit_adams": "ab2",
    "implicit_adams": "dopri8, as implicit methods are not there yet",
    "fixed_adams": "ab2",
    "scipy_solver": "dopri8",
}


def scheme_of(method: Any) -> Scheme:
    """The scheme that a name or an expression stands for; None stands for dopri5.

    Raises:
        SchemeError: there is none; the message names the closest method.
    """
    from ..registry import get  # not at import: the registry knows adaptive(...), which is built on this package

    if method is None:
        method = "dopri5"
    if isinstance(method, str):
        if method in ABSENT:
            raise SchemeError(f"odeint: there is no {method}; take {ABSENT[method]}.")
        method = ALIASES.get(method, method)
    return get(method)
