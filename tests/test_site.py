"""The site: drawings, formulas, pages of the catalogue, the reference, notebooks, and the built pages."""

import ast
import importlib
import inspect
import itertools
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zlib
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import yaml

import odenets
import schemes

ROOT = Path(__file__).parents[1]
DOCS, PAGES = ROOT / "docs", ROOT / "docs/pages"
REFERENCE = [p for p in sorted((PAGES / "reference").rglob("*.md")) if p.name != "index.md"]
ENTRY = re.compile(r"^::: (\S+)$", re.M)


def tool(name: str):
    """A script of the folder docs, as a module."""
    if str(DOCS) not in sys.path:
        sys.path.insert(0, str(DOCS))
    return importlib.import_module(name)


# --- drawings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wiring", "memory_figure"])
def test_drawings_are_those_that_their_scripts_draw(name):
    stale = [f.name for f, text in tool(name).files().items() if f.read_text(encoding="utf-8") != text]
    assert not stale, f"run: python docs/{name}.py"


@pytest.mark.parametrize("name", ["midpoint", "kutta3", "rk4", "gill4"])
def test_the_trace_of_a_step_is_its_tableau(name):
    scheme = schemes.get(name)
    assert scheme.tableau is not None
    a, b, *_ = scheme.tableau.floats()
    found = tool("wiring").trace(scheme, 1)
    for i, rows in enumerate(found.arguments):
        want = torch.tensor([[1.0, *a[i][:i], *[0.0] * (len(b) - i)]], dtype=rows.dtype)
        assert torch.allclose(rows, want), i
    assert torch.allclose(found.results, torch.tensor([[1.0, *b]], dtype=found.results.dtype))


def test_a_drawing_shows_every_coefficient_that_is_not_1():
    drawn = tool("wiring").drawing(tool("wiring").THEMES["wiring"], ["rk38"])
    tableau = schemes.get("rk38").tableau
    assert tableau is not None
    want = sorted(str(x) for row in (*tableau.a, tableau.b) for x in row if x not in (0, 1))
    texts = re.findall(r'text-anchor="middle" font-size="13"[^>]*>([^<]+)<', drawn)
    assert sorted(texts) == want


def luminance(colour: str) -> float:
    """Of sRGB, as the Web Content Accessibility Guidelines define it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_of_drawings_can_be_told_from_their_ground():
    assert round(contrast("#ffffff", "#000000")) == 21 and contrast("#777777", "#777777") == 1
    for k, theme in enumerate(tool("wiring").THEMES.values()):
        for colour in ("line", "weak"):
            assert contrast(theme[colour], theme["ground"]) >= 4.5, (colour, theme)
        assert contrast(theme["on_box"], theme["box"]) >= 4.5, theme
        for name, _, colours, _ in tool("memory_figure").ROWS:
            assert contrast(colours[k], theme["ground"]) >= 4.5, name


# --- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Leapfrog: x_{n+1} = x_{n-1} + 2 h F_n(x_n).", "Leapfrog: $x_{n+1} = x_{n-1} + 2 h F_n(x_n)$."),
        ("with gamma_{n} <- alpha_ij, given", r"with $\gamma_{n} \leftarrow \alpha_{ij}$, given"),
        ("the larger of x and y", "the larger of x and y"),
        ("in code: `x_{n}`, ``y_{n}``", "in code: `x_{n}`, ``y_{n}``"),
        (">>> f'x_{n}'\n'x_{n}'", ">>> f'x_{n}'\n'x_{n}'"),
        ("so:\n\n    x_{n} = 1", "so:\n\n    x_{n} = 1"),
    ],
)
def test_formulas_of_docstrings_are_typeset_and_code_is_not(text, want):
    assert tool("typeset").typeset(text) == want


def formulas() -> list[str]:
    """Those of the pages, and those that are typeset in docstrings."""
    typeset = tool("typeset")
    texts = [p.read_text(encoding="utf-8") for p in PAGES.rglob("*.md")]
    for package in ("schemes", "odenets"):
        for file in (ROOT / package).rglob("*.py"):
            nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            held = [ast.get_docstring(n) for n in nodes if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
            texts += [typeset.typeset(text) for text in held if text and typeset.SEEDS.search(text)]
    found = []
    for text in texts:
        plain = re.sub(r"^ *(```+)\w*\n.*?^ *\1$|``.*?``|`[^`\n]+`|^ *>>> .*$", "", text, flags=re.M | re.S)
        found += [a or b for a, b in re.findall(r"\$\$\n(.*?)\n\$\$|\$([^$\n]+)\$", plain, re.S)]
    return found


@pytest.mark.long
def test_every_formula_is_one_that_katex_takes():
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    assert len(formulas()) > 50
    script = (
        "const katex = require(process.argv[1]); const wrong = [];"
        "for (const tex of JSON.parse(require('fs').readFileSync(0, 'utf8')))"
        " try { katex.renderToString(tex, {displayMode: true, strict: 'error'}) } catch (e) { wrong.push(tex + e) }"
        "console.log(JSON.stringify(wrong))"
    )
    command = [node, "-e", script, str(PAGES / "katex/katex.min.js")]

    def refused(texts: list[str]) -> list[str]:
        done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    assert refused(formulas()) == []
    assert len(refused([r"\frac{1}{2", r"\nosuchthing"])) == 2


def test_katex_is_vendored_with_its_licence():
    folder = PAGES / "katex"
    assert "MIT License" in (folder / "LICENSE").read_text(encoding="utf-8")
    css = (folder / "katex.min.css").read_text(encoding="utf-8")
    fonts = set(re.findall(r"url\((fonts/[\w.-]+\.woff2)\)", css))
    assert fonts == {f"fonts/{f.name}" for f in (folder / "fonts").iterdir()}


# --- the catalogue's pages --------------------------------------------------------------------------------------------


def test_every_registered_scheme_has_one_anchor():
    held = [re.findall(r"\{#(\w+)\}$", p.read_text("utf-8"), re.M) for p in sorted((PAGES / "schemes").glob("*.md"))]
    assert sorted(x for page in held for x in page) == sorted(schemes.names())


def test_exact_numbers_are_set_with_one_fraction_bar():
    catalogue = tool("catalogue")
    root = schemes.tableau.sqrt(2)
    for x, want in (
        (Fraction(-1, 2), r"-\tfrac{1}{2}"),
        (Fraction(3), "3"),
        ((2 - root) / 2, r"\tfrac{2-\sqrt{2}}{2}"),
        (-root / 2, r"-\tfrac{\sqrt{2}}{2}"),
        (3 * root, r"3\sqrt{2}"),
    ):
        assert catalogue.exact(x) == want


def test_a_region_holds_the_points_where_a_step_does_not_grow():
    """Points of a grid are inside the drawn outline just where |R(z)| < 1, by the rule of even and odd."""
    catalogue = tool("catalogue")
    entry = catalogue.entries()["rk4"]
    tableau = schemes.get("rk4").tableau
    drawn = catalogue.region("rk4", tableau, entry)
    left, right, high = catalogue._box(tableau)
    margin = 0.08 * max(right - left, 2 * high)
    left, right, high = left - margin, max(right, 0.0) + margin, high + margin
    scale = min(300 / (right - left), 220 / (2 * high))
    (path,) = re.findall(r'class="inside"[^>]* d="([^"]+)"', drawn)
    rings = [
        [tuple(map(float, p.split())) for p in ring.strip("MZ").split("L")] for ring in re.findall(r"M[^Z]+Z", path)
    ]

    def inside(x: float, y: float) -> bool:
        hits = 0
        for ring in rings:
            for (a, b), (c, d) in zip(ring, [*ring[1:], ring[0]], strict=True):
                hits += (b > y) != (d > y) and x < a + (y - b) * (c - a) / (d - b)
        return hits % 2 == 1

    told = 0
    for re_, im in ((u / 4, v / 4) for u in range(-14, 4) for v in range(-13, 14)):
        size = abs(schemes.stability.R(tableau, complex(re_, im)))
        if abs(size - 1) > 0.15 and left < re_ < right and -high < im < high:
            told += 1
            assert inside((re_ - left) * scale, (high - im) * scale) == (size < 1), (re_, im, size)
    assert told > 100


# --- reference --------------------------------------------------------------------------------------------------------


def resolved(path: str):
    """The object of a dotted name, and the module that defines it."""
    first, *parts = path.split(".")
    found = importlib.import_module(first)
    for name in parts:
        if not hasattr(found, name):
            importlib.import_module(f"{found.__name__}.{name}")
        found = getattr(found, name)
    return found, found.__name__ if inspect.ismodule(found) else found.__module__


def entries_of_the_reference() -> list[tuple[Path, str]]:
    return [(p, name) for p in REFERENCE for name in ENTRY.findall(p.read_text(encoding="utf-8"))]


def test_a_page_of_the_reference_holds_names_of_its_module():
    wrong = []
    for page, name in entries_of_the_reference():
        module = ".".join(page.relative_to(PAGES / "reference").with_suffix("").parts)
        if name.startswith("odenets.timm"):
            continue  # the one extra that the development tools do not bring
        if resolved(name)[1] != module:
            wrong.append(f"{page.name}: {name} is of {resolved(name)[1]}")
    assert not wrong


def public() -> list[str]:
    """What the two packages export."""
    return [
        f"{package.__name__}.{name}"
        for package in (schemes, odenets)
        for name, value in vars(package).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__.startswith(("schemes", "odenets"))
    ]


def test_every_exported_name_stands_in_the_reference_once():
    listed = [resolved(name)[0] for _, name in entries_of_the_reference()]
    modules = {m.__name__ for m in listed if inspect.ismodule(m)}
    for name in public():
        value = resolved(name)[0]
        places = sum(x is value for x in listed) + (value.__module__ in modules)
        assert places == 1, f"{name} stands in the reference {places} times"


HELD = re.compile(r"^\s+((?:\*{0,2}\w+, )*\*{0,2}\w+)(?: \([^)]*\))?:", re.M)
OURS = ("schemes", "odenets")


def described(value) -> set[str]:
    """Names that a docstring, or that of a class's constructor, says something of."""
    text = (inspect.getdoc(value) or "") + "\n" + (inspect.getdoc(getattr(value, "__init__", None)) or "")
    return {x.strip("* ") for m in HELD.finditer(text) for x in m[1].split(",")}


def undescribed(value) -> list[str]:
    """Arguments of a function, or of a class's constructor, that its docstring does not name.

    What a class passes on may be described by the base that takes it; those of other packages are
    documented there.
    """
    held = described(value)
    if inspect.isclass(value):
        maker = next((b for b in value.__mro__ if {"__init__", "__new__"} & vars(b).keys()), object)
        if not maker.__module__.startswith((*OURS, __name__)):
            return []
        for base in value.__mro__[1:-1]:
            foreign = not base.__module__.startswith((*OURS, __name__))
            held |= set(inspect.signature(base.__init__).parameters) if foreign else described(base)
    arguments = [
        p.name for p in inspect.signature(value).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    return [name for name in arguments if name not in ("self", "cls") and name[0] != "_" and name not in held]


def shown() -> dict[str, object]:
    """Everything that a page of the reference shows: the names on it, those of whole modules, and methods.

    Exceptions, and methods that override one that is shown elsewhere, are left out.
    """
    found: dict[str, object] = {}
    for _, entry in entries_of_the_reference():
        if entry.startswith("odenets.timm"):
            continue  # the one extra that the development tools do not bring
        value = resolved(entry)[0]
        values = vars(value).values() if inspect.ismodule(value) else [value]
        for each in values:
            own = not inspect.ismodule(value) or getattr(each, "__module__", "") == value.__name__
            if not own or not (inspect.isclass(each) or inspect.isfunction(each)) or each.__name__[0] == "_":
                continue
            if inspect.isclass(each) and issubclass(each, Exception):
                continue
            name = f"{each.__module__}.{each.__qualname__}"
            found[name] = each
            for member, what in vars(each).items() if inspect.isclass(each) else ():
                function = getattr(what, "__func__", what)
                inherited = any(member in vars(base) for base in each.__mro__[1:])
                if member[0] != "_" and not inherited and inspect.isfunction(function):
                    found[f"{name}.{member}"] = function
    return found


def test_whatever_the_reference_shows_describes_its_arguments():
    def half(a, b): ...

    half.__doc__ = "Says something of one.\n\nArgs:\n    a: this one.\n"
    assert undescribed(half) == ["b"]

    class Base:
        def __init__(self, a): ...

    class Derived(Base):
        def __init__(self, a, b): ...

    Derived.__doc__ = "Takes two.\n\nArgs:\n    b: the second.\n"
    assert undescribed(Derived) == ["a"]
    exported = [resolved(name)[0] for name in public()]
    values = shown() | {f"{value.__module__}.{value.__qualname__}": value for value in exported}
    plain = {n: v for n, v in values.items() if not (inspect.isclass(v) and issubclass(v, Exception))}
    assert len(plain) > 600
    assert not {name: left for name, value in plain.items() if (left := undescribed(value))}


# --- measured tables -------------------------------------------------------------------------------------------------


def test_measured_times_are_of_the_schemes_of_the_page():
    """One figure for each scheme and mode that the table shows, in the time of euler."""
    bench, tables = tool("tables").bench, tool("tables")
    times = json.loads((tables.RESULTS / "choices.json").read_text(encoding="utf-8"))["times"]
    assert list(times) == bench.chosen()
    assert all(set(modes) == {"store", bench.least(name)} for name, modes in times.items())
    assert times["euler"]["store"] == 1 and all(0.3 < x < 5 for modes in times.values() for x in modes.values())
    # Modes that recompute take longer than storing.
    assert all(modes[bench.least(name)] > modes["store"] for name, modes in times.items())


def cells(page: str, heading: str) -> dict[str, list[float]]:
    """The rows of the table below a line of a page, by their first column."""
    lines = (PAGES / page).read_text(encoding="utf-8").split(heading, 1)[1].splitlines()[2:]
    rows = [
        [c.strip() for c in line.strip("|").split("|")] for line in itertools.takewhile(lambda s: s[:1] == "|", lines)
    ]
    return {name: [float(re.sub(r"[^\d.e-]", "", value)) for value in values] for name, *values in rows}


def test_drawn_results_are_those_of_the_tables_beside_the_drawings():
    results = tool("tables").RESULTS
    held = json.loads((results / "input_size.json").read_text(encoding="utf-8"))
    for unit, head in (("ms", "| ms per picture |"), ("MiB", "| MiB per picture in training |")):
        rows = cells("results.md", head)
        assert all(row[:-1] == held["models"][name][unit] for name, row in rows.items()) and len(rows) >= 4
    assert set(rows) == set(held["models"])
    held = json.loads((results / "revcol_columns.json").read_text(encoding="utf-8"))
    rows = cells("models/revcol.md", "| columns | store |")
    assert [int(name) for name in rows] == held["columns"]
    for mode, place in (("store", 0), ("checkpoint", 2), ("reverse", 3), ("exact", 5)):
        assert [row[place] for row in rows.values()] == held["MiB"][mode]


# --- tables by hand ---------------------------------------------------------------------------------------------------


def test_every_experiment_and_every_extra_stands_in_its_table():
    train, start = ((PAGES / name).read_text(encoding="utf-8") for name in ("train.md", "start.md"))
    experiments = [f.relative_to(ROOT / "experiments").as_posix() for f in (ROOT / "experiments").rglob("*.yaml")]
    assert [name for name in experiments if f"`{name}`" not in train] == []
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert [name for name in extras if f"| `{name}` |" not in start] == []


# --- README, notebooks ------------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_a_notebook_holds_the_snippets_of_its_page():
    pytest.importorskip("jupytext", reason="the extra docs is not installed")
    notebooks = tool("notebooks")
    pages = notebooks.tutorials()
    assert {p.name for p in pages} >= {p.name for p in (PAGES / "tutorials").glob("*.md") if p.name != "index.md"}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        want = re.findall(r"^(<!-- not run: .+ -->\n)?```python\n(.*?)^```$", text, re.M | re.S)
        cells = [c["source"] for c in notebooks.notebook(page)["cells"] if c["cell_type"] == "code"]
        assert cells == [code.strip() for note, code in want if not note], page.name


# --- the built pages --------------------------------------------------------------------------------------------------


def test_the_checks_of_built_pages_find_what_is_wrong(tmp_path):
    check = tool("check_site")
    good = '<html lang="en"><head><title>t</title></head><body><h1 id="a">A</h1><p>x<img src="p.svg" alt="p">'
    good = f'<!doctype html>{good}<a href="#a">b</a></p></body></html>'
    (tmp_path / "p.svg").write_text("<svg/>")
    (tmp_path / "page.html").write_text(good)
    assert check.problems(tmp_path) == []
    for old, new, says in (
        ('alt="p"', 'alt=""', "without a text"),
        ("#a", "#b", "no such anchor"),
        ("#a", "other.html", "no such file"),
        ("p.svg", "q.svg", "no such file"),
        ("</h1>", "", "closes"),
        ("<p>x", '<p id="a">x', "stands twice"),
        ("<p>x", "<p>$x_1$", "raw LaTeX"),
        ("<p>x", r"<p>\frac{1}2", "raw LaTeX"),
        (' lang="en"', "", "no language"),
        ("h1", "h2", "0 headings"),
        ("<p>x", "<h3>y</h3><p>x", "a heading of level 3 below one of level 1"),
        ("<p>x", "<p>&nosuch;x", "expected named entity"),
    ):
        (tmp_path / "page.html").write_text(good.replace(old, new))
        assert any(says in p for p in check.problems(tmp_path)), new


BROKEN = {
    "<p><div>x</div></p>": "unexpected end tag",
    "<em>x": "expected one end tag but got another",
    "<b><i>x</b></i>": "adoption agency",
    "<p a='1' a='2'>x</p>": "duplicate attribute",
    "<p a='1'b='2'>x</p>": "unexpected character after attribute value",
    "<p>a & b &nosuch;</p>": "expected named entity",
    "<p>a < b</p>": "expected tag name",
    "<div/>x": "non void element with trailing solidus",
    "<table><div>x</div></table>": "table voodoo",
    "<a href='x'>x<a href='x'>y</a></a>": "implies end tag",
    "<ul><p>x</p></ul>": "<p> in <ul>",
    "<dl><p>x</p></dl>": "<p> in <dl>",
    "<dl><div><p>x</p></div></dl>": "<p> in <div>",
    "<h2><p>x</p></h2>": "<p> in <h2>",
    "<span><div>x</div></span>": "<div> in <span>",
    "<span><a href='x'><ul><li>x</li></ul></a></span>": "<ul> in <a> in <span>",
    "<button><a href='x'>y</a></button>": "<a> in <button>",
    "<blink>x</blink>": "<blink> is no element, or obsolete",
    "<table align='left'><tr><td>x</td></tr></table>": "align of <table> is obsolete",
    "<img src='x'>": "<img> without alt",
    "<input>": "<input> without type",
    "<label for='q'>x</label>": "nothing has the id 'q'",
    "<p aria-describedby='q'>x</p>": "nothing has the id 'q'",
    "<p id='q'>x</p><p id='q'>y</p>": "the id 'q' stands twice",
    "<p id='a b'>x</p>": "an id that is empty or has a space",
    "<p class='a b a'>x</p>": "the class 'a' twice",
    "<a href='x'><b></b></a>": "<a> without a text",
    "<h2> </h2>": "<h2> without a text",
}
SOUND = """
<ul><li>a<li><p>b</p></ul> <dl><div><dt>x</dt><dd><p>y</p></dd></div></dl> <a href='x'><div>x</div></a> <a id='m'></a>
<details><summary><h3>x</h3></summary><p>y</p></details> <p aria-describedby='m'>a &amp; b<br>c</p> <my-part>x</my-part>
<table><caption>x</caption><tr><td><p>x</p></td></tr></table> <a href='x'><img src='x' alt='y'></a>
<svg viewBox='0 0 1 1'><path d='M0 0'></path><text>x</text></svg>
<picture><source srcset='x'><img src='x' alt='y'></picture>
"""


def test_broken_html_is_found_and_sound_html_is_not():
    check = tool("check_html")
    page = "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>t</title></head><body>{}</body></html>"
    assert check.problems(page.format(SOUND)) == []
    for part, says in BROKEN.items():
        assert any(says in problem for problem in check.problems(page.format(part))), part
    assert any("<html> without lang" in p for p in check.problems(page.format("x").replace(" lang='en'", "")))
    assert any("expected doctype" in p for p in check.problems(page.format("x").removeprefix("<!doctype html>")))


@pytest.mark.long
def test_the_pages_build(tmp_path):
    """Strictly; then every page is checked, and what others search and link is there."""
    pytest.importorskip("zensical", reason="the extra docs is not installed")
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("site", ".cache", "__pycache__"))
    for package in ("schemes", "odenets"):  # where mkdocstrings reads docstrings
        (tmp_path / package).symlink_to(ROOT / package)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "-f", "mkdocs.yml"],
        cwd=tmp_path / "docs",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "docs/site"
    assert len(list(site.rglob("*.html"))) == len(list(PAGES.rglob("*.md"))) + 1
    assert tool("check_site").problems(site) == []

    search = (site / "search.json").read_text(encoding="utf-8").lower()
    for word in ("onnx", "odeint", "ema", "fine-tune", "butcher", "adjoint", "wandb"):
        assert word in search, word
    assert "self.steps = " not in search  # sources are shown, but not indexed
    inventory = (site / "objects.inv").read_bytes()
    names = zlib.decompress(inventory.partition(b"zlib.\n")[2]).decode()
    there = {line.split(" ", 1)[0] for line in names.splitlines()}
    for name in public():
        value = resolved(name)[0]
        # The page of a whole module lists names as defined there, not the names under which they are exported.
        assert there & {name, f"{value.__module__}.{value.__qualname__}"}, name


def test_the_configuration_names_nothing_that_a_builder_would_pass_over():
    """Zensical ignores plugins that it does not know without a word: only those that both builders have are used."""
    config = yaml.safe_load((DOCS / "mkdocs.yml").read_text(encoding="utf-8"))
    plugins = [p if isinstance(p, str) else next(iter(p)) for p in config["plugins"]]
    assert set(plugins) <= {"search", "mkdocstrings"}
    assert config["site_dir"] == "site" and config["docs_dir"] == "pages"
