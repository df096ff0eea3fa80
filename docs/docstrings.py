"""Prepares docstrings for the pages: examples become code blocks, and formulas are typeset.

Markdown would read ``>>>`` as three nested quotations, and show the braces of an ASCII formula.
"""

import re
import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))

from typeset import typeset

EXAMPLE = re.compile(r"^( *)>>> .*(?:\n(?!\s*$).*)*", re.M)


class Docstrings(griffe.Extension):
    """Fences each block of lines from ``>>>`` to the next blank line, and typesets formulas."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            text = typeset(obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub(lambda m: f"{m[1]}```pycon\n{m[0]}\n{m[1]}```", text)
