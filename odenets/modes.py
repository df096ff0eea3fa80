"""Ways to backpropagate through a stack, as one writes them: "store", "checkpoint(4)", "reverse(every=8)"."""

from typing import Any, NamedTuple

from schemes.errors import SchemeError
from schemes.language import Reader


class Checkpoint(NamedTuple):
    """Keep the state every so many steps, and recompute the steps between in the backward pass."""

    every: int = 1


class Reverse(NamedTuple):
    """Keep the last state, and make those before it again by the scheme's inverse.

    Attributes:
        every: keep a state (an anchor) every so many steps; None lets the engine choose from the measured
            amplification of rounding errors, 0 keeps none.
        memory: MiB that anchors may take, in place of ``every``.
        bound: relative error of states made again that the chosen anchors keep to; that of gradients is smaller, as
            a rule. None stands for 1e-5 in fp32, 1e-11 in fp64.
        drift: whether to compare made-again states with kept ones, and to warn at the next forward pass.
        check_finite: whether to check every step for NaN and infinity; this waits for the device at each step.
    """

    every: int | None = None
    memory: float | None = None
    bound: float | None = None
    drift: bool = True
    check_finite: bool = False


class Exact(NamedTuple):
    """As Reverse, in exact arithmetic on a binary grid: states made again are equal to the last bit.

    Attributes:
        bits: streams and residual outputs are multiples of 2^-bits; None stands for 14 in fp32, 40 in fp64.
        store: keep all states instead, on the same grid: the run that exact gradients are compared with.
    """

    bits: int | None = None
    store: bool = False


Mode = Checkpoint | Reverse | Exact | None


def _count(what: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SchemeError(f"backprop: {what} is {value}, want a whole number, at least {least}.")


def mode(given: "str | Mode") -> Mode:
    """Reads a mode; None stands for "store".

    Raises:
        SchemeError: anything else.
    """
    if isinstance(given, str):
        families = {"checkpoint": Checkpoint, "reverse": Reverse, "exact": Exact}
        found = Reader({"store": None}, families, what="backprop mode").read(given)
    else:
        found = given
    if isinstance(found, Checkpoint):
        _count("checkpoint(every)", found.every, 1)
    elif isinstance(found, Reverse):
        if found.every is not None:
            _count("reverse(every)", found.every, 0)
        for what in ("memory", "bound"):
            value = getattr(found, what)
            if value is not None and not 0 < value < float("inf"):
                raise SchemeError(f"backprop: reverse({what}) is {value}, want a positive number.")
        if found.every is not None and found.memory is not None:
            raise SchemeError("backprop: reverse takes every or memory, not both.")
    elif isinstance(found, Exact):
        if found.bits is not None:
            _count("exact(bits)", found.bits, 1)
    elif found is not None:
        raise SchemeError(f"backprop is {given!r}, want 'store', 'checkpoint', 'checkpoint(k)', 'reverse' or 'exact'.")
    return found


def written(given: Mode) -> str:
    """The mode as one writes it."""
    if given is None:
        return "store"
    if isinstance(given, Checkpoint):
        return "checkpoint" if given.every == 1 else f"checkpoint({given.every})"
    changed = [
        f"{k}={str(v).lower() if isinstance(v, bool) else v}"
        for k, v in given._asdict().items()
        if v != given._field_defaults[k]
    ]
    name = type(given).__name__.lower()
    return f"{name}({', '.join(changed)})" if changed else name
