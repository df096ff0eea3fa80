"""Memory sizes in text form, such as 2GB or 512MiB; a plain number is in MiB."""

from fractions import Fraction
from typing import Any

from schemes.errors import SchemeError
from schemes.language import Reader

_MEBI = 2**20
_BYTES = {
    **{name: 1000**n for n, name in enumerate(("kB", "MB", "GB", "TB"), 1)},
    **{name: 1024**n for n, name in enumerate(("KiB", "MiB", "GiB", "TiB"), 1)},
}
# MiB in each unit: GB and the like are powers of 1000, GiB and the like powers of 1024.
UNITS = {**{name: Fraction(size, _MEBI) for name, size in _BYTES.items()}, "KB": Fraction(1000, _MEBI)}


def mebibytes(given: Any, what: str) -> float:
    """Converts a number of MiB, or the text of a size, to MiB.

    Args:
        given: the size.
        what: its name, for messages.

    Raises:
        SchemeError: anything else, or a size that is not positive.

    Example:
        >>> mebibytes("1.5GiB", "memory"), mebibytes(64, "memory")
        (1536.0, 64.0)
    """
    value = given
    # A text without a digit is not a size: the reader would look for a name, and there are none here.
    if isinstance(given, str) and any(c.isdigit() for c in given):
        value = Reader({}, {}, what="size", units=UNITS).read(given)
    if isinstance(value, bool) or not isinstance(value, (int, float, Fraction)) or not 0 < value < float("inf"):
        raise SchemeError(f"backprop: {what} is {given!r}, want a size such as 2GB, 512MiB, or a number of MiB.")
    return float(value)


def format_size(mib: float) -> str:
    """Formats a size in MiB so that ``mebibytes`` reads the same number.

    Example:
        >>> format_size(2048.0), format_size(mebibytes("2GB", "memory")), format_size(0.3)
        ('2GiB', '2GB', '307.2KiB')
    """
    for name, size in sorted(_BYTES.items(), key=lambda pair: -pair[1]):
        count = Fraction(mib) * _MEBI / size
        text = f"{round(float(count), 3):g}"
        if 1 <= count < 1000 and "e" not in text and float(Fraction(text) * UNITS[name]) == mib:
            return text + name
    return f"{mib:g}" if float(f"{mib:g}") == mib else repr(mib)


def show(size: float) -> str:
    """Formats a number of bytes for messages and tables.

    Example:
        >>> show(3 * 2**20), show(5000)
        ('3.00 MiB', '4.88 KiB')
    """
    for name in ("GiB", "MiB"):
        if abs(size) >= _BYTES[name]:
            return f"{size / _BYTES[name]:.2f} {name}"
    return f"{size / 1024:.2f} KiB"
