"""Checks a page against the HTML standard: ``problems(text)``. Nothing is fetched; html5lib parses.

Four kinds of faults are found: errors of the parser (a tag that is not closed or closes another, a repeated attribute,
a stray ampersand); unknown or obsolete elements and attributes; misplaced elements, such as a paragraph in a heading or
a link in a button; and references to unknown ids, missing texts and duplicate ids.
"""

from collections.abc import Iterator
from typing import Any

import html5lib

SECTIONS = frozenset("article aside nav section".split())
HEADINGS = frozenset("h1 h2 h3 h4 h5 h6 hgroup".split())
PHRASING = frozenset(
    "a abbr area audio b bdi bdo br button canvas cite code data datalist del dfn em embed i iframe img input ins kbd "
    "label link map mark math meta meter noscript object output picture progress q ruby s samp script select slot "
    "small span strong sub sup svg template textarea time u var video wbr".split()
)
BLOCKS = frozenset(
    "address blockquote details dialog div dl fieldset figure footer form header hr main menu ol p pre search table "
    "ul".split()
)
FLOW = PHRASING | SECTIONS | HEADINGS | BLOCKS
SILENT = frozenset(("script", "template"))
# Elements that are allowed only in particular parents.
PARTS = frozenset(
    "base body caption col colgroup dd dt figcaption head html legend li optgroup option param rp rt source style "
    "summary tbody td tfoot th thead title tr track".split()
)
KNOWN = FLOW | PARTS
# These allow the content that their parent allows.
TRANSPARENT = frozenset("a audio canvas del ins map noscript object slot video".split())
_plain = FLOW - SECTIONS - HEADINGS - {"header", "footer"}
HOLDS = {
    **dict.fromkeys(
        "abbr b bdi bdo button cite code data dfn em h1 h2 h3 h4 h5 h6 i kbd label mark output p pre progress q s samp "
        "small span strong sub sup time u var".split(),
        PHRASING,
    ),
    **dict.fromkeys(("ul", "ol", "menu"), SILENT | {"li"}),
    "dl": SILENT | {"dt", "dd", "div"},
    "dt": _plain,
    "th": _plain,
    "table": SILENT | {"caption", "colgroup", "thead", "tbody", "tfoot"},
    **dict.fromkeys(("thead", "tbody", "tfoot"), SILENT | {"tr"}),
    "tr": SILENT | {"td", "th"},
    "colgroup": frozenset({"col", "template"}),
    "figure": FLOW | {"figcaption"},
    "details": FLOW | {"summary"},
    "summary": PHRASING | HEADINGS,
    "fieldset": FLOW | {"legend"},
    "picture": SILENT | {"source", "img"},
    "audio": frozenset({"source", "track"}),
    "video": frozenset({"source", "track"}),
    "select": SILENT | {"option", "optgroup", "hr"},
    "ruby": PHRASING | {"rt", "rp"},
    "html": frozenset({"head", "body"}),
    "head": SILENT | {"base", "link", "meta", "noscript", "style", "title"},
}
INTERACTIVE = frozenset("button details embed iframe input select textarea".split())
TABLES = "table tbody td tfoot th thead tr".split()
OBSOLETE = {
    "align": ["caption", "col", "colgroup", "div", "hr", "iframe", "img", "legend", "p", *HEADINGS, *TABLES],
    "bgcolor": "body table tr td th".split(),
    "border": "img table".split(),
    "cellpadding": ["table"],
    "cellspacing": ["table"],
    "frameborder": ["iframe"],
    "name": ["a", "img"],
    "valign": "td th tr col colgroup tbody thead tfoot".split(),
    "width": "table td th col hr pre".split(),
    "nowrap": ["td", "th"],
}
REQUIRED = {"img": ("src", "alt"), "iframe": ("title",), "html": ("lang",), "input": ("type",), "optgroup": ("label",)}
REFERENCES = ("for", "list", "headers", "aria-labelledby", "aria-describedby", "aria-controls", "aria-owns")
SVG, MATH = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1998/Math/MathML}"


def problems(text: str) -> list[str]:
    """Returns the problems of a page, one line each.

    Args:
        text: HTML of the whole page.
    """
    parser = html5lib.HTMLParser(html5lib.getTreeBuilder("etree"), namespaceHTMLElements=False)
    root: Any = parser.parse(text)
    found = [f"line {line}: {code.replace('-', ' ')} {data or ''}".rstrip() for (line, _), code, data in parser.errors]
    found += _attributes(root)
    ids: list[str] = []
    wanted: list[str] = []
    for element, parents in _walk(root, ()):
        found += _misplaced(element, parents)
        found += _attributes(element)
        given = element.attrib.get("id")
        if given is not None:
            ids.append(given)
        wanted += [name for key in REFERENCES for name in (element.attrib.get(key) or "").split()]
        if _named(element.tag, HEADINGS | {"a", "button", "summary", "title"}) and not _text(element):
            # A link without an address is an anchor, and may be empty.
            if element.tag != "a" or "href" in element.attrib:
                found.append(f"<{element.tag}> without a text")
    found += [f"the id {name!r} stands twice" for name in sorted({name for name in ids if ids.count(name) > 1})]
    found += ["an id that is empty or has a space" for name in ids if not name or name.split() != [name]]
    return found + [f"nothing has the id {name!r}" for name in sorted(set(wanted) - set(ids))]


def _named(tag: Any, names: frozenset[str]) -> bool:
    return isinstance(tag, str) and tag in names


def _walk(element: Any, parents: tuple[Any, ...]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yields elements with their ancestors, without the contents of drawings and formulas, which have other rules."""
    for child in element:
        if isinstance(child.tag, str):  # the tag of a comment is a function
            yield child, (*parents, element)
            if child.tag not in ("svg", "math") and not child.tag.startswith((SVG, MATH)):
                yield from _walk(child, (*parents, element))


def _misplaced(element: Any, parents: tuple[Any, ...]) -> list[str]:
    tag = element.tag.removeprefix(SVG).removeprefix(MATH)
    if tag not in KNOWN and "-" not in tag:
        return [f"<{tag}> is no element, or obsolete"]
    around = [parent.tag for parent in parents]
    found = []
    # The first ancestor that is not transparent determines the allowed content; the parent may add parts of its own.
    depth = len(around) - 1
    own = HOLDS.get(around[depth], frozenset()) if depth >= 0 and around[depth] in TRANSPARENT else frozenset()
    while depth > 0 and around[depth] in TRANSPARENT:
        depth -= 1
    holder = around[depth]
    # In a description list a div groups terms.
    allowed = HOLDS["dl"] if holder == "div" and "dl" in around[depth - 1 : depth] else HOLDS.get(holder, FLOW)
    if tag not in allowed | own and "-" not in tag:
        found.append(f"<{tag}> in <{around[-1]}>" + ("" if holder == around[-1] else f" in <{holder}>"))
    hidden = tag == "input" and element.attrib.get("type") == "hidden"
    if (tag in INTERACTIVE and not hidden) or (tag == "a" and "href" in element.attrib):
        found += [f"<{tag}> in <{outer}>" for outer in around if outer in ("a", "button")]
    return found


def _attributes(element: Any) -> list[str]:
    tag, given = element.tag, element.attrib
    found = [f"<{tag}> without {key}" for key in REQUIRED.get(tag, ()) if key not in given]
    found += [f"{key} of <{tag}> is obsolete" for key, tags in OBSOLETE.items() if key in given and tag in tags]
    classes = (given.get("class") or "").split()
    return found + [f"the class {name!r} twice" for name in sorted(set(classes)) if classes.count(name) > 1]


def _text(element: Any) -> str:
    """Returns the text that a screen reader reads out."""
    given = next((text for key in ("aria-label", "alt", "title") if (text := element.attrib.get(key))), None)
    if given is not None:
        return given.strip()
    parts = [element.text or ""]
    for child in element:
        parts += [_text(child) if isinstance(child.tag, str) else "", child.tail or ""]
    return "".join(parts).strip()
