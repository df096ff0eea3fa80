"""Names of 0.1 that still work, with a warning, until 0.3."""

import warnings
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warns that ``old`` is now called ``new``."""
    warnings.warn(f"{old} is now {new}; the old name goes in 0.3.", DeprecationWarning, stacklevel=stacklevel)


def _method(old: str, new: str, target: Callable[..., Any]) -> Callable[..., Any]:
    """A method ``old`` that warns and calls ``target``, the method ``new`` of the class that defines it.

    It calls the method of that class, not the object's own, so that ``super().old()`` keeps its meaning.
    """

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        warn_renamed(f"{type(self).__name__}.{old}", new)
        return target(self, *args, **kwargs)

    method.__name__, method.__doc__ = old, f"The name of ``{new}`` before 0.2."
    return method


class _Attribute:
    """An attribute ``old`` that warns, and reads and sets ``new``."""

    def __init__(self, old: str, new: str):
        self.old, self.new = old, new

    def __get__(self, instance: Any, owner: type) -> Any:
        warn_renamed(f"{owner.__name__}.{self.old}", self.new)
        return getattr(owner if instance is None else instance, self.new)

    def __set__(self, instance: Any, value: Any) -> None:
        warn_renamed(f"{type(instance).__name__}.{self.old}", self.new)
        setattr(instance, self.new, value)


def adopt(cls: type, names: Mapping[str, str]) -> None:
    """Gives a class that defines old names, as written for 0.1, the new ones too, and vice versa.

    Args:
        cls: the class; inherited names were adopted in the class that defines them.
        names: old names and their new ones, of methods, properties and attributes.
    """
    for old, new in names.items():
        own = cls.__dict__
        if old in own and new not in own:
            # The level skips adopt, __init_subclass__ and abc, so that the warning points at the class.
            warn_renamed(f"{cls.__name__}.{old}", new, stacklevel=5)
            setattr(cls, new, own[old])
            # A method stays available under its old name as it was written, since its own class may still call it.
            if not isinstance(own[new], FunctionType):
                setattr(cls, old, _Attribute(old, new))  # so that both names keep meaning the same value
        elif new in own and old not in own:
            value = own[new]
            setattr(cls, old, _method(old, new, value) if isinstance(value, FunctionType) else _Attribute(old, new))


def renamed_names(module: str, values: Mapping[str, Any], names: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module that still resolves old names of its members.

    Args:
        module: its name, for messages.
        values: its namespace, ``globals()``.
        names: old names and their new ones.
    """

    def member(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", f"{module}.{names[name]}")
        return values[names[name]]

    return member


def renamed_arguments(what: str, given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Translates arguments given by their old names to the new names.

    Raises:
        TypeError: a name that is not among the old ones.
    """
    for old in given:
        if old not in names:
            raise TypeError(f"{what}() got an unexpected keyword argument {old!r}")
        warn_renamed(f"{what}({old}=)", f"{names[old]}=", stacklevel=4)
    return {names[old]: value for old, value in given.items()}
