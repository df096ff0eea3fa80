"""Writes the pages with Python snippets as notebooks: ``python docs/notebooks.py FOLDER``.

A notebook has the text of the page and its ``python`` snippets as cells; interactive sessions and snippets marked as
not run stay text. Links are those of the page.
"""

import re
import sys
from pathlib import Path
from typing import Any

PAGES = Path(__file__).parent / "pages"
FENCE = re.compile(r"^(?P<note><!-- not run: .+ -->\n)?```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
NOT_RUN = re.compile(r"^<!-- not run: .+ -->\n```python$", re.M)


def tutorials() -> list[Path]:
    """Returns the pages with snippets, without generated ones and the reference."""
    found = [p for p in sorted(PAGES.rglob("*.md")) if p.parent.name not in ("reference", "schemes")]
    return [p for p in found if re.search(r"^```python$", NOT_RUN.sub("", p.read_text(encoding="utf-8")), re.M)]


def _kept(fence: re.Match[str]) -> str:
    run = fence["kind"] == "python" and not fence["note"]
    return fence[0] if run else f"{fence['note'] or ''}~~~{fence['kind']}\n{fence['code']}~~~"


def notebook(page: Path) -> Any:
    """Converts a page to a notebook of nbformat."""
    import jupytext  # from the extra docs

    # jupytext turns each fence whose language it knows into a cell; tildes keep one as text.
    text = FENCE.sub(_kept, page.read_text(encoding="utf-8"))
    found = jupytext.reads(text, fmt="md")
    found.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return found


def main(folder: Path) -> None:
    """Writes all notebooks below the folder, in the layout of ``pages``."""
    import jupytext

    for page in tutorials():
        file = folder / page.relative_to(PAGES).with_suffix(".ipynb")
        file.parent.mkdir(parents=True, exist_ok=True)
        jupytext.write(notebook(page), file)
        print(file)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/notebooks.py FOLDER")
    main(Path(sys.argv[1]))
