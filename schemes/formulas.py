"""The updates of a scheme as text, read from its step: the algebra runs once on names instead of tensors.

Streams are ``x0``, ``x1``, ..., residual functions ``F0``, ``F1``, ..., the step size is ``h``. Three instances:

* revnet: ``x0 <- x0 + h F0(x1)``, then ``x1 <- x1 + h F1(x0)``: each update reads the streams left by those before it.
* leapfrog: ``x0 <- x0 + 2 h F0(x1)``, then the streams rotate: ``x0, x1 <- x1, x0``.
* ab2: no list of updates; its step is written as one: ``x0, x1 <- x0 + ..., F0(x0)``.
"""

from collections.abc import Callable, Sequence
from typing import Any

from .coupling import Coupling, rotated
from .errors import SchemeError
from .scheme import Scheme


class _Term:
    """A symbol in place of a tensor: a sum of products, as text."""

    def __init__(self, sum_of: Sequence[tuple[float, tuple[str, ...]]]):
        like: dict[tuple[str, ...], float] = {}
        for number, factors in sum_of:
            like[factors] = like.get(factors, 0.0) + number
        self.parts = [(number, factors) for factors, number in like.items() if number]

    @classmethod
    def of(cls, value: Any) -> "_Term":
        """The term of a number, or of a text as one factor; a term passes through."""
        if isinstance(value, _Term):
            return value
        return cls([(1.0, (value,))] if isinstance(value, str) else [(float(value), ())])

    def __str__(self) -> str:
        text = ""
        for number, factors in self.parts:
            size = f"{abs(number):.4g}"
            # The step size comes before functions, as is customary.
            written = " ".join(sorted(factors, key=lambda f: (f != "h", "(" in f)))
            product = written if size == "1" and factors else f"{size} {written}".rstrip()
            sign = ("-" if number < 0 else "") if not text else (" - " if number < 0 else " + ")
            text += sign + product
        return text or "0"

    def __add__(self, other: Any) -> "_Term":
        return _Term([*self.parts, *_Term.of(other).parts])

    def __mul__(self, other: Any) -> "_Term":
        return _Term([(a * b, f + g) for a, f in self.parts for b, g in _Term.of(other).parts])

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> "_Term":
        return self * -1.0

    def __sub__(self, other: Any) -> "_Term":
        return self + -_Term.of(other)

    def __rsub__(self, other: Any) -> "_Term":
        return -self + other

    def __truediv__(self, other: Any) -> "_Term":
        return self * (1 / other) if isinstance(other, int | float) else _Term.of(f"{_atom(self)}/{_atom(other)}")

    def chunk(self, count: int, dim: int = 0) -> tuple["_Term", ...]:
        """Its parts."""
        return tuple(_Term.of(f"{_atom(self)}[{i}]") for i in range(count))

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name, kwargs = func.__name__, dict(kwargs or {})
        if name == "cat":
            return _Term.of("[" + ", ".join(map(str, args[0])) + "]")
        if name in ("add", "sub"):
            sign = 1.0 if name == "add" else -1.0
            return _Term.of(args[0]) + _Term.of(args[1]) * (sign * kwargs.get("alpha", 1.0))
        if name == "mul":
            return _Term.of(args[0]) * args[1]
        if name == "addcmul":
            return _Term.of(args[0]) + _Term.of(args[1]) * args[2]
        if len(args) == 1 and not kwargs:  # exp, tanh, ...
            return _Term.of(f"{name}({args[0]})")
        raise SchemeError(f"formulas: there is no way to write {name}.")


def _atom(term: Any) -> str:
    text = str(term)
    return text if " " not in text.split("(")[0] else f"({text})"


def _function(name: str) -> Callable[..., _Term]:
    return lambda *args: _Term.of(f"{name}({', '.join(map(str, args))})")


def formulas(*parts: Scheme) -> tuple[tuple[str, ...], ...]:
    """The updates of consecutive steps, in order; each acts on the streams that the one before it left.

    Args:
        parts: the scheme of each step, beginning with the first: ``scheme.at(0), scheme.at(1)``. Couplings can be
            written, and so can any scheme whose step is additions, products and functions of its streams.

    Returns:
        The lines of each step; none where a step does more than can be written this way.

    Example:
        >>> import schemes
        >>> formulas(schemes.get("momentum(0.75)"))
        (('x1 <- 0.75 x1 + 0.25 F0(x0)', 'x0 <- x0 + h x1'),)
        >>> formulas(schemes.get("leapfrog").at(1))
        (('x0 <- x0 + 2 h F0(x1)', 'x0, x1 <- x1, x0'),)
    """
    found: list[tuple[str, ...]] = []
    streams = parts[0].streams if parts else 0
    for step in parts:
        try:
            lines, streams = _updates(step, streams) if isinstance(step, Coupling) else _step(step, streams)
        # A scheme may do to tensors what names do not support: then its documentation alone describes it.
        except (SchemeError, TypeError, AttributeError, ValueError, IndexError):
            lines = ()
        found.append(lines)
    return tuple(found)


def _updates(scheme: Coupling, streams: int) -> tuple[tuple[str, ...], int]:
    names = [f"x{i}" for i in range(streams)]
    fs = [_function(f"F{i}") for i in range(scheme.stages)]
    lines = []
    for update in scheme.updates(fs, _Term.of("h"), streams):  # type: ignore[arg-type]
        # As in the engine: an appended stream is there for the updates that come after it.
        scale, shift, *byproducts = update.terms(tuple(map(_Term.of, names)))  # type: ignore[arg-type]
        if update.appends:
            names.append(f"x{update.dst}")
            lines.append(f"x{update.dst} <- {shift}")
            continue
        change = f"x{update.dst} <- {_Term.of(f'x{update.dst}') * scale + shift}"
        lines += [f"x{update.byproduct} <- {value}" for value in byproducts if update.byproduct is not None]
        lines.append(change)
    if scheme.rotate:
        turned = rotated(tuple(names), scheme.rotate)  # type: ignore[arg-type]
        lines.append(f"{', '.join(names)} <- {', '.join(turned)}")  # type: ignore[arg-type]
    return tuple(lines), len(names)


def _step(scheme: Scheme, streams: int) -> tuple[tuple[str, ...], int]:
    state: Any = tuple(_Term.of(f"x{i}") for i in range(streams))
    new = scheme._step([_function(f"F{i}") for i in range(scheme.stages)], state, _Term.of("h"))  # type: ignore[arg-type]
    names = [f"x{i}" for i in range(len(new))]
    return (f"{', '.join(names)} <- {', '.join(map(str, new))}",), len(new)
