"""Checks the built pages: ``python docs/check_site.py FOLDER``. Nothing is fetched.

Links and anchors have targets, the HTML conforms to the standard (``check_html``), pictures have a text alternative, a
page has one heading of the first level and skips no level, and no formula shows as its source.
"""

import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urldefrag

import check_html

VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())
# Traces of a formula that was not typeset, as a reader would see them.
RAW = re.compile(r"\\(?:frac|tfrac|sum|begin|alpha|mathrm|leftarrow)(?![a-z])|\$[^$]+\$|[_^]\{")
SILENT = frozenset(("code", "pre", "script", "style", "svg", "title"))


class Page(HTMLParser):
    """Collects the parts of a page that can be wrong.

    Args:
        text: the HTML.
    """

    def __init__(self, text: str):
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.problems: list[str] = []
        self.headings: list[int] = []
        self._open: list[tuple[str, bool]] = []
        self.feed(text)
        self.problems += [f"<{tag}> is not closed" for tag, _ in self._open]
        self.problems += [f"id {x!r} stands twice" for x in sorted({x for x in self.ids if self.ids.count(x) > 1})]
        if skipped := [b for a, b in pairwise(self.headings) if b > a + 1]:
            self.problems.append(f"a heading of level {skipped[0]} below one of level {skipped[0] - 2} or less")
        if self.headings.count(1) != 1:
            self.problems.append(f"{self.headings.count(1)} headings of the first level")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Records ids, links, pictures and headings."""
        given = dict(attrs)
        if given.get("id"):
            self.ids.append(given["id"] or "")
        if tag == "a" and given.get("name"):
            self.ids.append(given["name"] or "")
        self.links += [link for key in ("href", "src") if (link := given.get(key))]
        if tag == "img" and not (given.get("alt") or "").strip():
            self.problems.append(f"a picture without a text: {given.get('src')}")
        if tag == "svg" and given.get("role") == "img" and not given.get("aria-label"):
            self.problems.append("a drawing without a text")
        if tag == "html" and not given.get("lang"):
            self.problems.append("no language")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            quiet = tag in SILENT or "arithmatex" in (given.get("class") or "")
            self._open.append((tag, quiet or bool(self._open and self._open[-1][1])))

    def handle_endtag(self, tag: str) -> None:
        """Closes the element opened last; paragraphs, items and cells may end without a tag."""
        if tag in VOID:  # <img />
            return
        while (
            self._open and self._open[-1][0] != tag and self._open[-1][0] in ("p", "li", "td", "th", "tr", "dt", "dd")
        ):
            self._open.pop()
        if self._open and self._open[-1][0] == tag:
            self._open.pop()
        else:
            self.problems.append(f"</{tag}> closes <{self._open[-1][0] if self._open else 'nothing'}>")

    def handle_data(self, data: str) -> None:
        """Finds formulas that show as source."""
        if not (self._open and self._open[-1][1]) and (found := RAW.search(data)):
            self.problems.append(f"raw LaTeX: {data[max(0, found.start() - 30) : found.end() + 30].strip()!r}")


def problems(folder: Path) -> list[str]:
    """Returns the problems of the pages below a folder, one line each."""
    texts = {f: f.read_text(encoding="utf-8") for f in sorted(folder.rglob("*.html"))}
    pages = {f: Page(text) for f, text in texts.items()}
    found = []
    for file, page in pages.items():
        where = file.relative_to(folder)
        found += [f"{where}: {p}" for p in check_html.problems(texts[file])]
        # A server may show its page for missing files at any address, so its links are absolute.
        if where.name == "404.html":
            continue
        found += [f"{where}: {p}" for p in page.problems]
        for link in page.links:
            target, anchor = urldefrag(link)
            if re.match(r"[\w+.-]+:|//", link):
                continue
            to = (file.parent / unquote(target)).resolve() if target else file
            if to.is_dir():
                to = to / "index.html"
            if not to.is_file():
                found.append(f"{where}: {link}: no such file")
            elif anchor and to in pages and unquote(anchor) not in ("__tabbed", *pages[to].ids):
                found.append(f"{where}: {link}: no such anchor")
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/check_site.py FOLDER")
    wrong = problems(Path(sys.argv[1]).resolve())
    print("\n".join(wrong))
    sys.exit(bool(wrong))
