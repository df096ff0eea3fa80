"""Names of 0.1 that still work, with a warning, until 0.3."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warns that ``old`` is now called ``new``."""
    warnings.warn(f"{old} is now {new}; the old name goes in 0.3.", DeprecationWarning, stacklevel=stacklevel)


def renamed(old: str, new: str) -> Callable[..., Any]:
    """A method ``old`` that warns and calls ``new``."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        warn_renamed(f"{type(self).__name__}.{old}", new)
        return getattr(self, new)(*args, **kwargs)

    method.__name__, method.__doc__ = old, f"The name of ``{new}`` before 0.2."
    return method


def adopt(cls: type, names: Mapping[str, str]) -> None:
    """Gives a class that defines old names, as written for 0.1, the new ones too."""
    for old, new in names.items():
        if old in cls.__dict__ and new not in cls.__dict__:
            warn_renamed(f"{cls.__name__}.{old}", new, stacklevel=4)
            setattr(cls, new, cls.__dict__[old])


def renamed_arguments(what: str, given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Arguments that were given by their old names, under the new ones.

    Raises:
        TypeError: a name that is not among the old ones.
    """
    for old in given:
        if old not in names:
            raise TypeError(f"{what}() got an unexpected keyword argument {old!r}")
        warn_renamed(f"{what}({old}=)", f"{names[old]}=", stacklevel=4)
    return {names[old]: value for old, value in given.items()}
