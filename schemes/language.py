"""The small language of schemes: names, calls, n*scheme, scheme + scheme, numbers, true, false, none.

The text is read by ``ast.parse`` and walked here, node by node; nothing is ever evaluated.
"""

import ast
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from numbers import Integral
from typing import Any, NoReturn

from .errors import SchemeError
from .spelling import closest as closest_names

MAX_CHARACTERS = 500
MAX_NESTING = 8
LITERALS = {"true": True, "false": False, "none": None}
# A number with a word behind it, as in 2GB; not 1e5, whose e belongs to it, nor a name such as rk4.
_QUANTITY = re.compile(r"(?<![\w.])(\d[\d_]*(?:\.\d*)?(?:[eE][+-]?\d+)?)(?![eE][+-]?\d)([A-Za-z]+)(?!\w)")


def sampled(*texts: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a function of the language its ``examples``, as a class of schemes declares them: the usual one first."""

    def mark(make: Callable[..., Any]) -> Callable[..., Any]:
        make.examples = texts  # type: ignore[attr-defined]
        return make

    return mark


def shorten(text: str, limit: int = 240) -> str:
    """The text, cut to the limit, so that messages stay readable whatever was typed."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def written(x: float) -> str:
    """A number as an expression has it: short where that is read back as the same number, else with all its digits.

    Args:
        x: the number.

    Example:
        >>> written(0.5), written(1 / 3)
        ('0.5', '0.3333333333333333')
    """
    short = f"{x:g}"
    return short if float(short) == x else repr(float(x))


def finite(name: str, value: Any) -> float:
    """A setting as a float.

    Args:
        name: what it is called in the message.
        value: a number of any type.

    Raises:
        SchemeError: it is no number, or not finite.
    """
    try:
        # NaN for everything that is not a number, so that the one comparison below refuses it all.
        found = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = float("nan")
    if not abs(found) < float("inf"):
        raise SchemeError(f"{name} is {shorten(str(value), 60)}, want a finite number.")
    return found


def dimension(name: str, value: Any) -> int:
    """The number of a dimension; negative ones count from the end.

    Args:
        name: of the scheme.
        value: the number.

    Raises:
        SchemeError: it is no whole number.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise SchemeError(f"{name}: dim is {shorten(str(value), 60)}, want a whole number, the number of a dimension.")
    return int(value)


def closest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """A hint for an unknown name: the closest known ones, or the first few."""
    known = sorted(known)
    near = closest_names(name, known, limit, 0.5)
    if near:
        return f"the closest are {', '.join(near)}"
    more = f" and {len(known) - 12} more" if len(known) > 12 else ""
    return f"there are {', '.join(known[:12])}{more}"


class Reader:
    """Reads one expression.

    Args:
        names: the values of bare names.
        families: the functions behind calls: of numbers, truth values, none and schemes.
        add: makes the value of ``a + b`` from the (count, value) pairs; None where sums are not part of the language.
        what: the word for the thing that is read, in messages.
        units: the factor of a number that is followed by one of these words, as in 2GB.
        listing: how to see all names: the second line of a message about an unknown name. If it is empty and there are
            few names, that line lists them all.
    """

    def __init__(
        self,
        names: Mapping[str, Any],
        families: Mapping[str, Callable[..., Any]],
        add: Callable[..., Any] | None = None,
        what: str = "scheme",
        units: Mapping[str, Fraction] | None = None,
        listing: str = "",
    ):
        self.names, self.families, self.add, self.what, self.units = names, families, add, what, units or {}
        self.listing = listing
        self.text = ""
        self._units_at: dict[int, Fraction] = {}

    def read(self, text: str) -> Any:
        """The value of the expression.

        Raises:
            SchemeError: the text is too long, too deep, or contains anything that the grammar does not allow; the
                message names the position (from 1) and the closest known name.
        """
        if not isinstance(text, str):
            like = next(iter([*self.names, *self.families]), "")
            raise SchemeError(f"a {self.what} is a name or an expression, such as {like!r}, not {type(text).__name__}.")
        if len(text) > MAX_CHARACTERS:
            raise SchemeError(f"the {self.what} has {len(text)} characters; at most {MAX_CHARACTERS} are read.")
        self.text = text.strip()
        if not self.text:
            raise SchemeError(
                f"the {self.what} is empty; write a name such as {next(iter([*self.names, *self.families]), '')!r}."
            )
        if "\n" in self.text or not self.text.isascii():
            raise SchemeError(f"the {self.what} {self._shown()} must be one line of plain ASCII characters.")
        # Units are blanked out, since 2GB is an error in Python; columns stay, and units are found again by them.
        text = self._without_units()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python warns about texts such as "1or 2", which are refused below
                tree = ast.parse(text, mode="eval")
        except SyntaxError as error:
            self._fail(f"cannot be read: {error.msg}", (error.offset or 1) - 1)
        # Python's parser gives up on thousands of brackets, with a different error in each version.
        except (RecursionError, MemoryError, ValueError) as error:
            self._fail(f"cannot be read: {error}", 0)
        return self._value(tree.body, 0)

    def _without_units(self) -> str:
        """The text with its units recorded and replaced by blanks, so that positions in it stay."""
        self._units_at.clear()

        def blank(found: re.Match[str]) -> str:
            number, unit = found.groups()
            if unit not in self.units:
                self._fail(f"there is no unit {shorten(unit, 20)!r}; {closest(unit, self.units)}", found.start(2))
            self._units_at[found.start()] = self.units[unit]
            return number + " " * len(unit)

        return _QUANTITY.sub(blank, self.text) if self.units else self.text

    def _shown(self) -> str:
        return repr(shorten(self.text, 60))

    def _fail(self, problem: str, at: int, remedy: str = "") -> NoReturn:
        rest = f"\n  {remedy}" if remedy else ""
        raise SchemeError(f"{self.what} {self._shown()}, position {at + 1}: {shorten(problem)}.{rest}")

    # long: one match over the grammar, a case a construct
    def _value(self, node: ast.expr, depth: int) -> Any:
        at = node.col_offset
        if depth > MAX_NESTING:
            self._fail(f"nested more than {MAX_NESTING} deep", at)
        match node:
            case ast.Constant():
                value = self._constant(node)
                return value * self._units_at[at] if at in self._units_at else value
            # A tuple is an argument such as split=(3, 5), not a scheme.
            case ast.Tuple(elts=elts) if depth:  # only within arguments
                return tuple(self._value(e, depth + 1) for e in elts)
            case ast.Name(id=name):
                return self._name(name, at)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                self._check_call(name, args, keywords, at)
                return self._call(
                    name,
                    [self._value(a, depth + 1) for a in args],
                    {str(k.arg): self._argument(name, k, depth + 1) for k in keywords},
                    at,
                )
            case ast.BinOp(op=ast.Add()):
                return self._sum(node, depth)
            case ast.BinOp(op=ast.Mult()):
                return self._sum(node, depth)
            case ast.BinOp(left=left, op=ast.Div(), right=right):
                p, q = self._value(left, depth + 1), self._value(right, depth + 1)
                if not (_number(p) and _number(q)) or q == 0:
                    self._fail("a division needs two numbers, the second not zero", at)
                return Fraction(p) / Fraction(q)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                value = self._value(operand, depth + 1)
                if not _number(value):
                    self._fail("minus stands before numbers only", at)
                return -value
        # Words for what people try; everything else is named by its node type.
        words: dict[type, str] = {
            ast.Attribute: "an attribute",
            ast.Lambda: "a lambda",
            ast.Subscript: "an index",
            ast.IfExp: "a condition",
            ast.Call: "a call of anything but a name",
        }
        what = words.get(type(node), f"the construct {type(node).__name__}")
        self._fail(f"{what} is not part of the language of {self.what}s", at)

    def _name(self, name: str, at: int) -> Any:
        if name.lower() in LITERALS:
            return LITERALS[name.lower()]
        if name in self.names:
            return self.names[name]
        if name in self.families:
            return self._call(name, [], {}, at)
        self._unknown(name, at)

    def _check_call(self, name: str, args: list[ast.expr], keywords: list[ast.keyword], at: int) -> None:
        if name not in self.families:
            if name in self.names:
                self._fail(f"{name} takes no arguments", at)
            self._unknown(name, at)
        if any(isinstance(a, ast.Starred) for a in args) or any(k.arg is None for k in keywords):
            self._fail("* and ** are not part of the language", at)

    def _argument(self, name: str, keyword: ast.keyword, depth: int) -> Any:
        """The value of key=value; a family may accept words of its own, which its ``words`` lists by key."""
        words = getattr(self.families[name], "words", {}).get(keyword.arg, ())
        if isinstance(keyword.value, ast.Name) and keyword.value.id in words:
            return keyword.value.id
        return self._value(keyword.value, depth)

    def _unknown(self, name: str, at: int) -> NoReturn:
        known = sorted([*self.names, *self.families])
        hint, few = closest(name, known), ", ".join(known) if len(known) <= 12 else ""
        # Does not repeat what the first line has just listed.
        rest = f"All names: {few}." if few and few not in hint else ""
        self._fail(f"there is no {shorten(name, 60)!r}; {hint}", at, self.listing or rest)

    def _constant(self, node: ast.Constant) -> Any:
        value = node.value
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            if abs(value) > 10**12:
                self._fail("this number is too large", node.col_offset)
            return value
        if isinstance(value, float):
            # Decimals are exact here: ees25(x=0.1) means 1/10. The bound keeps 1e999999 from filling the memory; so
            # would 1e-999999, which is 0 as a float, and 0e999999 as a fraction.
            digits = (ast.get_source_segment(self.text, node) or repr(value)).replace("_", "")
            if value == 0 and not re.search("[1-9]", digits.lower().partition("e")[0]):
                return Fraction(0)
            if not 1e-30 < abs(value) < 1e30:
                self._fail("this number is out of range", node.col_offset)
            return Fraction(digits)
        self._fail(f"a {type(value).__name__} is not part of the language of {self.what}s", node.col_offset)

    def _call(self, name: str, args: list[Any], kwargs: dict[str, Any], at: int) -> Any:
        make = self.families[name]
        try:
            # Bound before the call: a TypeError from inside would refer to code that the user never saw.
            inspect.signature(make).bind(*args, **kwargs)
        except TypeError as error:
            # Without annotations: the user writes numbers and names, not types.
            form = ", ".join(str(p).split(":")[0].strip() for p in inspect.signature(make).parameters.values())
            self._fail(f"{name}: {error}; it is written {name}({form})", at)
        try:
            return make(*args, **kwargs)
        except SchemeError as error:
            raise SchemeError(f"{self.what} {self._shown()}, position {at + 1}: {shorten(str(error))}") from None
        # A family is given whatever was written, such as a scheme in place of a number, and need not check types.
        except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
            self._fail(f"{name}: wrong kind of argument ({error})", at)

    def _sum(self, node: ast.expr, depth: int) -> Any:
        pairs: list[tuple[int, Any]] = []
        self._terms(node, depth, pairs)
        if self.add is None or (len(pairs) == 1 and _number(pairs[0][1])):
            self._fail("sums and products are not part of the language here", node.col_offset)
        try:
            return self.add(*pairs)
        except SchemeError as error:
            raise SchemeError(
                f"{self.what} {self._shown()}, position {node.col_offset + 1}: {shorten(str(error))}"
            ) from None

    def _terms(self, node: ast.expr, depth: int, pairs: list[tuple[int, Any]]) -> None:
        match node:
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                # A sum is flat: its left-leaning tree does not count as nesting.
                self._terms(left, depth, pairs)
                self._terms(right, depth, pairs)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                n, value = self._value(left, depth + 1), self._value(right, depth + 1)
                # The count comes first, as in 3*rk4: rk4*3 is refused, so that each mix has one spelling.
                if isinstance(n, bool) or not isinstance(n, int) or n < 1:
                    self._fail(f"n*{self.what} needs a whole number n of at least 1 before the *", left.col_offset)
                if _number(value) or value is None or isinstance(value, bool):
                    self._fail(f"n* must be followed by a {self.what}", right.col_offset)
                pairs.append((n, value))
            case _:
                value = self._value(node, depth + 1)
                if _number(value) or value is None or isinstance(value, bool):
                    self._fail(f"+ joins {self.what}s only", node.col_offset)
                pairs.append((1, value))


def _number(value: Any) -> bool:
    return isinstance(value, (int, Fraction)) and not isinstance(value, bool)
