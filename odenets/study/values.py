"""Parses the words of a comparison's command line: `key=v1,v2`, `0..4,7`."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from schemes import SchemeError

PAIRS = {"(": ")", "[": "]", "{": "}"}


def split(text: str) -> list[str]:
    """Splits a text at its commas, except those inside brackets or quotes.

    As in YAML, a quote begins only outside a word: the one in ``don't`` is a letter.

    Args:
        text: the values.

    Raises:
        SchemeError: an unmatched bracket or quote, no value between two commas, or a value twice.

    Example:
        >>> split("euler, nested(midpoint, rk4),'a,b',[4, 4]")
        ['euler', 'nested(midpoint, rk4)', "'a,b'", '[4, 4]']
    """
    cuts = [-1, *_commas(text), len(text)]
    values = [text[a + 1 : b].strip() for a, b in pairwise(cuts)]
    if "" in values:
        raise SchemeError(
            f"{text!r} has a comma too many, or no value\n  Write one comma between two values: euler,midpoint,rk4"
        )
    if (twice := _repeated(values)) is not None:
        raise SchemeError(f"{text!r} has the value {twice!r} twice\n  Write each value once.")
    return values


def _repeated(values: Sequence[Any]) -> Any:
    """The first value that occurs more than once; None if there is none."""
    return next((value for value, count in Counter(values).items() if count > 1), None)


def _commas(text: str) -> Iterator[int]:
    """Yields the positions of the commas outside brackets and quotes."""
    closing: list[str] = []
    quote, place = "", 0
    while place < len(text):
        letter = text[place]
        if quote:
            # As in YAML, a backslash escapes only in double quotes.
            if quote == '"' and letter == "\\":
                place += 1
            elif letter == quote:
                quote = ""
        # At the beginning the slice is text[-1:0], which is empty: no letter precedes.
        elif letter in "'\"" and not re.match(r"\w", text[place - 1 : place]):
            quote = letter
        elif letter in PAIRS:
            closing.append(PAIRS[letter])
        elif letter in PAIRS.values():
            if not closing or closing.pop() != letter:
                raise SchemeError(
                    f"{text!r}: the {letter} at position {place + 1} closes no bracket\n  Write both halves."
                )
        elif letter == "," and not closing:
            yield place
        place += 1
    if quote or closing:
        raise SchemeError(f"{text!r}: {quote or closing[-1]} is missing at the end\n  Write both halves.")


def assignment(text: str) -> tuple[str, list[str]]:
    """Splits ``key=v1,v2`` into the option and its values.

    Args:
        text: as it was typed.

    Raises:
        SchemeError: the text is not such a pair.

    Example:
        >>> assignment("model.net.scheme=euler,rk4")
        ('model.net.scheme', ['euler', 'rk4'])
    """
    key, equals, values = text.partition("=")
    key = key.strip().removeprefix("--")
    if not equals or not re.fullmatch(r"[\w.]+", key):
        raise SchemeError(
            f"--over {text!r} is no option with values\n  Write --over model.net.scheme=euler,midpoint,rk4"
        )
    return key, split(values)


def seeds(text: str) -> list[int]:
    """Returns seeds in the order in which they are written: single ones, and ranges that include both ends.

    Args:
        text: such as ``0..4`` or ``0,1,7``.

    Raises:
        SchemeError: the text is not such a list, or has a seed twice.

    Example:
        >>> seeds("0..3,7")
        [0, 1, 2, 3, 7]
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,10})(?:\.\.(\d{1,10}))?\s*", part, re.ASCII)
        # A range is written out below: 0..999999999 would fill the memory before anything could refuse it.
        if match is None or int(match[2] or match[1]) - int(match[1]) not in range(100_000):
            raise SchemeError(
                f"--seeds {text!r}: {part!r} is no seed and no range\n  Write --seeds 0..4 or --seeds 0,1,7"
            )
        if (last := int(match[2] or match[1])) >= 2**32:
            raise SchemeError(f"--seeds {text!r}: {last} is too large\n  Seeds are 0 to {2**32 - 1}.")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    if (twice := _repeated(found)) is not None:
        raise SchemeError(f"--seeds {text!r} has {twice} twice\n  Write each seed once.")
    return found


def folder_name(text: str) -> str:
    """Returns a folder name for a text: the text itself if it needs no quotes, else its letters and a digest of it.

    Args:
        text: what the folder stands for.

    Example:
        >>> folder_name("scheme=rk4"), folder_name("step=decay(9/10)")
        ('scheme=rk4', 'step=decay-9-10-eb556f')
    """
    # No leading dot, which would hide the folder. Cut, since file systems refuse names of more than 255 bytes; the
    # digest still tells two long texts apart.
    plain = re.sub(r"[^\w=.,+-]+", "-", text, flags=re.ASCII).strip("-.")[:80]
    if plain == text:
        return text
    return f"{plain or 'value'}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
