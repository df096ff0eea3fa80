"""Schemes by name: ``get("rk4")``, ``get("nested(midpoint, repeat(euler, 2))")``, ``names()``, ``register``."""

import functools
import inspect
import keyword
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from . import stability, tableaux
from .adaptive import Adaptive
from .bdia import Bdia
from .columns import RevColCoupling
from .compose import Mix, Repeat, Substeps
from .coupling import Additive, Affine, MultiLevel, RevNetCoupling
from .dense import Dense
from .errors import SchemeError
from .language import Reader, shorten
from .multistep import AdamsBashforth2, Alf, Leapfrog, LmResNet, Momentum, ReversibleHeun
from .nested import Nested
from .reversible import Reversible
from .runge_kutta import RungeKutta, pruned
from .scheme import Scheme, check_attributes, limit_functions
from .tableau import Tableau


def _runge_kutta(make: Callable[..., Tableau]) -> Callable[..., Scheme]:
    """The family of schemes of a family of tableaux; cached, since building exact coefficients takes time."""

    # Typed, as 1, 1.0 and true are equal keys and may be different arguments.
    @functools.lru_cache(maxsize=64, typed=True)
    def build(*args: Any, **kwargs: Any) -> Scheme:
        # Cached by its arguments: equal texts must give the same object, whose scaled coefficients are then shared.
        return RungeKutta(make(*args, **kwargs))

    return functools.update_wrapper(build, make)


_NAMES: dict[str, Scheme] = {
    **{name: RungeKutta(tableau) for name, tableau in tableaux.METHODS.items()},
    "ab2": AdamsBashforth2(),
    "leapfrog": Leapfrog(),
    "reversible_heun": ReversibleHeun(),
}
_FAMILIES: dict[str, Callable[..., Scheme]] = {
    **{name: _runge_kutta(make) for name, make in tableaux.FAMILIES.items()},
    "adaptive": Adaptive,
    "additive": Additive,
    "affine": Affine,
    "alf": Alf,
    "bdia": Bdia,
    "dense": Dense,
    "lm_resnet": LmResNet,
    "momentum": Momentum,
    "multilevel": MultiLevel,
    "nested": Nested,
    "pruned": pruned,
    "repeat": Repeat,
    "revcol": RevColCoupling,
    "reversible": Reversible,
    "revnet": RevNetCoupling,
    "substeps": Substeps,
}


LISTING = "See all names: schemes.names() in Python, odenets schemes on a command line."


def get(scheme: "str | Scheme | Tableau") -> Scheme:
    """The scheme of that name or expression; a Scheme passes through, a Tableau becomes a Runge-Kutta scheme.

    Grammar: NAME, NAME(args, key=value), n*expr, expr + expr, integers, decimals, p/q, minus, true, false, none; at
    most 500 characters, nested at most 8 deep. The text is parsed, never evaluated.

    Args:
        scheme: a name or an expression, a Scheme, or a Tableau.

    Raises:
        SchemeError: anything else; the message names the position and the closest known name.

    Example:
        >>> import schemes
        >>> schemes.get("rk4").stages, schemes.get("3*rk4 + midpoint").stages
        (4, 14)
    """
    if isinstance(scheme, Scheme):
        return check_attributes(scheme)
    if isinstance(scheme, Tableau):
        return RungeKutta(scheme)
    # The dictionaries themselves, not copies: a reader then knows names that are registered later.
    found = Reader(_NAMES, _FAMILIES, Mix, listing=LISTING).read(scheme)
    if not isinstance(found, Scheme):
        raise SchemeError(f"{shorten(repr(scheme), 60)} is no scheme; write a name such as 'rk4' or an expression.")
    # Checked again at the end: each family keeps to the limit, but a sum of several may exceed it.
    if isinstance(getattr(found, "stages", None), int):
        limit_functions(str(found), found.stages)
    return check_attributes(found)


def names() -> tuple[str, ...]:
    """All names that ``get`` knows: plain ones, then those that take arguments, each sorted."""
    return (*sorted(_NAMES), *sorted(set(_FAMILIES) - set(_NAMES)))


def examples(name: str | None = None) -> tuple[str, ...]:
    """Expressions that sample everything registered: every plain name, and what each family and class declares.

    Laws, strategies and tables iterate over them, so that a new scheme need not be listed anywhere else: a class of
    schemes declares its ``examples`` in its body, a function by the decorator ``schemes.language.sampled``. A family
    that declares none and can be called without arguments is listed by its name.

    Args:
        name: only those of that name; None is all.

    Example:
        >>> import schemes
        >>> schemes.examples("affine")
        ('affine', 'affine(bound=0.3)')
    """
    found: list[str] = []
    for each in names() if name is None else (name,):
        make = _FAMILIES.get(each)
        if make is None:
            found.append(each)
            found += type(_NAMES[each]).__dict__.get("examples", ())
        else:
            found += vars(make).get("examples", ()) or ([each] if _needs_nothing(make) else [])
    if name is None:  # a sum has no name
        found += Mix.examples
    # Each once, and in order: families that are registered under two names give theirs twice.
    return tuple(dict.fromkeys(found))


def _needs_nothing(make: Callable[..., Any]) -> bool:
    """Whether a family can be called without arguments."""
    try:
        inspect.signature(make).bind()
    except (TypeError, ValueError):
        return False
    return True


def register(name: str, scheme: "Scheme | Tableau | Callable[..., Scheme]") -> None:
    r"""Gives a scheme, a tableau or a family of schemes a name that ``get`` and configurations know.

    Args:
        name: letters a-z, digits and _, first a letter; not taken.
        scheme: the scheme, its tableau, or a function that makes one from the arguments of a call.

    Raises:
        SchemeError: the name is taken or not an identifier, or the object is none of the three.

    Example:
        >>> import schemes
        >>> schemes.register("my_heun", schemes.Tableau.parse("0 |\n 1 | 1\n | 1/2 1/2", order=2, name="my_heun"))
        >>> schemes.get("my_heun").order
        2
    """
    # Exactly the names that the reader's grammar accepts.
    plain = isinstance(name, str) and name.isidentifier() and name.isascii()
    if not plain or keyword.iskeyword(name) or name.lower() in ("true", "false", "none"):
        raise SchemeError(
            f"cannot register {name!r}: want letters a-z, digits and _, first a letter, and no word of Python."
        )
    if name in _NAMES or name in _FAMILIES:
        raise SchemeError(f"cannot register {name!r}: the name is taken.")
    if isinstance(scheme, Tableau):
        scheme = RungeKutta(replace(scheme, name=name))  # so that it prints as the name that reads it
    if isinstance(scheme, Scheme):
        _NAMES[name] = check_attributes(scheme)
    elif callable(scheme):
        # Raises at once for a builtin without a signature, since calls in a text could not be checked against it.
        inspect.signature(scheme)
        _FAMILIES[name] = scheme
    else:
        raise SchemeError(f"cannot register {name!r}: want a Scheme, a Tableau or a function that makes a Scheme.")


class CatalogueEntry(NamedTuple):
    """One line of the catalogue."""

    name: str
    stages: int
    order: int | None
    companion: int | None
    mixing: float | None
    real: float | None
    imaginary: float | None
    exact: bool
    cite: str


def catalogue() -> tuple[CatalogueEntry, ...]:
    """What is known of each named scheme: stages and order; of Runge-Kutta methods, mixing and stability too.

    ``real`` and ``imaginary`` are the lengths of the intervals [-r, 0] and [-i, i] on which |R(z)| <= 1; ``mixing`` is
    max_i sum_j |a_ij|. A family of tableaux is represented by its usual member, the first of its examples.
    """
    samples = [*sorted(_NAMES), *(examples(name)[0] for name in sorted(tableaux.FAMILIES))]
    rows = []
    for name in samples:
        scheme = get(name)
        t = scheme.tableau
        if t is None:
            rows.append(CatalogueEntry(name, scheme.stages, scheme.order, None, None, None, None, True, ""))
            continue
        # Computed in exact numbers at each call: the catalogue serves documentation, and no other code waits for it.
        real, imaginary = stability.real_interval(t), stability.imaginary_interval(t)
        rows.append(
            CatalogueEntry(name, t.stages, t.order, t.order_hat, t.mixing, real, imaginary, t.digits is None, t.cite)
        )
    return tuple(rows)
