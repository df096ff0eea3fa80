"""Counts lines: ``python .ci/lines.py`` lists functions over 40 lines of code and fails if one does not say why.

A line of code holds more than a comment and is not part of a docstring. The lines of a function reach from its ``def``
to its end, nested functions included. A function that is better left whole says so on its ``def`` line or on the line
above it (above its decorators, if it has any)::

    # long: one table, which would be harder to read in two
    def convert(...):

The output ends with the share of comments in each package: lines with a comment among all lines that are not blank.
Directives to tools, such as ``# type: ignore``, do not count as comments.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("schemes", "odenets")
LIMIT = 40
REASON = re.compile(r"#\s*long: \S")
DIRECTIVE = re.compile(r"#\s*(type:|pyright:|noqa|fmt:|ruff:|pragma:)")
# Tokens without text on a line.
BLANK = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Source:
    """The lines of a file, classified.

    Attributes:
        code: numbers of the lines that hold code.
        comments: comments by line number, without directives to tools.
        length: the number of lines that are not blank.
    """

    def __init__(self, text: str):
        self.tree = ast.parse(text)
        self.length = sum(1 for line in text.splitlines() if line.strip())
        self.comments: dict[int, str] = {}
        self.code: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                if not DIRECTIVE.match(token.string):
                    self.comments[token.start[0]] = token.string
            elif token.type not in BLANK:
                self.code.update(range(token.start[0], token.end[0] + 1))
        self.code -= set(self._docstrings())

    def _docstrings(self) -> Iterator[int]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node, clean=False):
                first = node.body[0]
                yield from range(first.lineno, (first.end_lineno or first.lineno) + 1)

    def functions(self) -> Iterator[tuple[Function, int, bool]]:
        """Yields each function, its lines of code, and whether it says why it is long."""
        for node in ast.walk(self.tree):
            if isinstance(node, Function):
                size = len(self.code & set(range(node.lineno, (node.end_lineno or node.lineno) + 1)))
                top = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                said = any(REASON.match(self.comments.get(n, "")) for n in (top - 1, node.lineno))
                yield node, size, said


def main() -> int:
    """Prints the long functions and the shares of comments; returns the number of functions that do not say why."""
    unsaid = 0
    shares = []
    for package in PACKAGES:
        comments = lines = 0
        for path in sorted((ROOT / package).rglob("*.py")):
            source = Source(path.read_text(encoding="utf-8"))
            comments, lines = comments + len(source.comments), lines + source.length
            for node, size, said in source.functions():
                if size > LIMIT:
                    unsaid += not said
                    why = "says why" if said else "split it, or say why not: # long: REASON"
                    print(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}: {size} lines of code, {why}")
        shares.append(f"{package} {comments / lines:.1%}")
    print(f"functions over {LIMIT} lines that do not say why: {unsaid}; lines with comments: {', '.join(shares)}")
    return unsaid


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
