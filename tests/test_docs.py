"""Runs what the README and the pages promise: snippets, doctests, commands, tables, links."""

import ast
import doctest
import functools
import importlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from inspect import getdoc, isclass, ismodule
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import yaml

import odenets.models.catalogue
import schemes
import schemes.registry
from odenets import list_models, packaged

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs/pages").rglob("*.md"))
TEXTS = [ROOT / "README.md", *PAGES]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^(?P<note><!-- not run: .+ -->\n)?```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
# The output that a line states: print(...)  # this
PRINTS = re.compile(r"^print\(.*\)  # (.+)$", re.M)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def snippets(path: Path, *kinds: str) -> list[tuple[int, str, str]]:
    """(line, kind, code) of the fenced blocks of some kinds, less those that are marked as not run."""
    text = path.read_text(encoding="utf-8")
    found = [m for m in FENCE.finditer(text) if m["kind"] in kinds and not m["note"]]
    return [(text.count("\n", 0, m.start("code")) + 1, m["kind"], m["code"]) for m in found]


def modules() -> list[str]:
    """The modules whose docstrings hold examples."""
    files = [p for package in ("schemes", "odenets") for p in sorted((ROOT / package).rglob("*.py"))]
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files if ">>> " in p.read_text("utf-8")]
    return [n.removesuffix(".__init__") for n in names]


@pytest.fixture(autouse=True)
def registries(monkeypatch, tmp_path):
    """What an example registers is gone after it; what it writes lies in a folder of its own."""
    monkeypatch.setattr(schemes.registry, "_NAMES", dict(schemes.registry._NAMES))
    monkeypatch.setattr(schemes.registry, "_FAMILIES", dict(schemes.registry._FAMILIES))
    monkeypatch.setattr(odenets.models.catalogue, "_MODELS", dict(odenets.models.catalogue._MODELS))
    monkeypatch.chdir(tmp_path)


@pytest.mark.cases(8)
@pytest.mark.parametrize("path", [p for p in TEXTS if snippets(p, "python", "pycon")], ids=name)
def test_snippets_run_and_print_what_they_say(path):
    scope: dict = {"__name__": "__snippets__"}
    for line, kind, code in snippets(path, "python", "pycon"):
        where = f"{name(path)}:{line}"
        if kind == "pycon":
            test = doctest.DocTestParser().get_doctest(code, scope, where, str(path), line)
            out: list[str] = []
            runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
            runner.run(test, out=out.append, clear_globs=False)
            assert not runner.failures, "".join(out)
            scope.update(test.globs)
            continue
        with redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, where, "exec"), scope)
        assert printed.getvalue().splitlines() == PRINTS.findall(code), where


@pytest.mark.cases(44)
@pytest.mark.parametrize("module", modules())
def test_examples_of_docstrings(module):
    found = importlib.import_module(module)
    # Only names that the module defines, not those it imports: an example imports whatever else it uses.
    own = {n: v for n, v in vars(found).items() if getattr(v, "__module__", None if ismodule(v) else module) == module}
    runner_out: list[str] = []
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(found, module, globs=own):
        runner.run(test, out=runner_out.append)
    assert runner.tries and not runner.failures, "".join(runner_out)


def undocumented(module: str) -> list[str]:
    """Public methods and properties of a module's public classes without a docstring, their own or an inherited one."""
    classes = [
        (n, c) for n, c in vars(importlib.import_module(module)).items() if isclass(c) and c.__module__ == module
    ]
    return [
        f"{module}.{name}.{member}"
        for name, kind in classes
        if not name.startswith("_")
        for member, what in vars(kind).items()
        if not member.startswith("_") and isinstance(what, FunctionType | classmethod | staticmethod | property)
        if not getdoc(getattr(kind, member))
    ]


def test_public_methods_have_docstrings():
    """Ruff asks for all others; which methods override one that has a docstring, it cannot see."""

    class Own:
        def said(self):
            """What it does."""

        def unsaid(self): ...

        @property
        def held(self): ...

    Own.__module__ = "own"
    sys.modules["own"] = ModuleType("own")
    vars(sys.modules["own"]).update(Own=Own)
    try:
        assert undocumented("own") == ["own.Own.unsaid", "own.Own.held"]
    finally:
        del sys.modules["own"]
    files = [p for package in ("schemes", "odenets") for p in sorted((ROOT / package).rglob("*.py"))]
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in files]
    if importlib.util.find_spec("timm") is None:  # the one extra that the development tools do not bring
        names.remove("odenets.timm")
    assert [line for name in names if not name.endswith("__main__") for line in undocumented(name)] == []


# Cached, since tables share the models that they count.
@functools.cache
def tables() -> ModuleType:
    if str(ROOT / "docs") not in sys.path:  # it imports its neighbours
        sys.path.insert(0, str(ROOT / "docs"))
    return importlib.import_module("tables")


# The tables of models run each model on the meta device, and the table of choices trains a network per scheme.
WITH_TABLES = [
    pytest.param(
        p,
        marks=[pytest.mark.long] if p.parent.name == "models" or p.stem in ("models", "choose_a_scheme") else [],
        id=name(p),
    )
    for p in TEXTS
    if "<!-- table: " in p.read_text("utf-8")
]


@pytest.mark.parametrize("path", WITH_TABLES)
def test_tables_are_those_of_the_code(path):
    text = path.read_text(encoding="utf-8")
    stale = [m[2] for m in tables().MARKS.finditer(text) if m[0] not in tables().filled(m[0])]
    assert not stale, "run: python docs/tables.py"


def test_every_registered_model_stands_in_one_table():
    rows = [
        row for path in PAGES for row in re.findall(r"^\| `(\w+)` \|.* \| [\d,]+ \|.*$", path.read_text("utf-8"), re.M)
    ]
    assert sorted(rows.count(model) for model in list_models()) == [1] * len(list_models())


def navigation() -> list[str]:
    """The pages that docs/mkdocs.yml names, in order."""

    def files(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [f for e in (entry if isinstance(entry, list) else entry.values()) for f in files(e)]

    return files(yaml.safe_load((ROOT / "docs/mkdocs.yml").read_text(encoding="utf-8"))["nav"])


def test_every_page_is_in_the_navigation_once():
    assert sorted(navigation()) == sorted(str(p.relative_to(ROOT / "docs/pages")) for p in PAGES)


def slug(heading: str) -> str:
    """The anchor of a heading: its own, or as Markdown's table of contents makes it."""
    if given := re.search(r"\{#(\w+)\}$", heading):
        return given[1]
    plain = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
    return re.sub(r"[-\s]+", "-", plain)


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_internal_links_lead_somewhere(path):
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.is_file(), f"{target}: no such file"
        if anchor:
            if page.suffix != ".md":  # `#only-dark` on a picture states the palette under which it shows
                assert anchor in ("only-light", "only-dark"), target
                continue
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
            assert anchor in map(slug, headings), f"{target}: no such heading"


@pytest.mark.parametrize(
    "path", [*TEXTS, ROOT / "docs/mkdocs.yml", ROOT / ".ci/run", *ROOT.glob("experiments/*.*")], ids=name
)
def test_no_path_of_a_machine(path):
    found = re.findall(
        r"(?<![\w./:])(?:/(?:home|root|opt|work|mnt|Users|tmp|var)/|[A-Z]:\\)\S*", path.read_text("utf-8")
    )
    assert not found


def commands(kind: str = "bash") -> list[str]:
    """All the lines of shell on the pages and in the README."""
    return [line for p in TEXTS for _, _, code in snippets(p, kind) for line in code.splitlines() if line.strip()]


def test_the_readme_states_two_commands_that_set_everything_up():
    run, tests = (line for line in README.splitlines() if line.startswith("pip install "))
    for command, extra, then in (
        (run, "train", "lightning fit -c experiments/quickstart.yaml"),
        (tests, "dev", "pytest"),
    ):
        install, _, main = command.partition(" && ")
        assert main == then
        assert shlex.split(install) == ["pip", "install", "-c", ".ci/constraints.txt", "-e", f".[{extra}]"]
    assert (ROOT / ".ci/constraints.txt").is_file() and (ROOT / "experiments/quickstart.yaml").is_file()


def test_ci_runs_the_test_command_of_the_readme():
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    (pattern,) = re.findall(r"grep -E '(.+)' README\.md", script)
    assert len(re.findall(pattern, README, re.M)) == 1
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert subprocess.run(["bash", "-n", ROOT / ".ci/run"]).returncode == 0


# `lightning fit --help` and lines with FILE are templates, not commands.
NAMED = re.compile(r"(?:lightning|odenets) \w+ -c (\S+)")
RUNS = sorted({c for c in commands() if (m := NAMED.match(c)) and packaged.find(m[1])})


@pytest.mark.cases(8)
@pytest.mark.parametrize("command", RUNS)
def test_commands_name_files_and_options_that_exist(command):
    """Parsed by the command line itself, without building or training anything."""
    from odenets.training.command import run

    words = shlex.split(command)[1:]
    words = [str(ROOT / w) if w.startswith("experiments/") else w for w in words]
    with redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as stop:
        run([*words, "--print_config"])
    assert stop.value.code in (0, None) and "class_path" in printed.getvalue()


def test_the_file_that_the_training_page_takes_apart_is_the_quickstart():
    page = ROOT / "docs/pages/train.md"
    (shown,) = (code for _, _, code in snippets(page, "yaml") if code.startswith("seed_everything"))
    assert yaml.safe_load(shown) == yaml.safe_load((ROOT / "experiments/quickstart.yaml").read_text(encoding="utf-8"))


def test_what_a_contribution_costs():
    """The table on the page about adding schemes: files and lines of contributions that exist."""
    page = (ROOT / "docs/pages/add_a_scheme.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| an? ([^|]+) \| (.+) \| (.+) \|$", page, re.M)
    limits = {what: [int(n) for n in re.findall(r"\d+", lines)] for what, _, lines in rows}
    sources = {p: p.read_text("utf-8") for package in ("schemes", "odenets") for p in (ROOT / package).rglob("*.py")}

    data = ROOT / "schemes/tableaux.py"
    for method in ("huta6", "ssprk54", "rk46nl", "ralston3"):
        assert [p for p, text in sources.items() if re.search(rf"\b{method} =|\"{method}\"", text)] == [data]
    lines = {}
    for node in ast.parse(sources[data]).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            lines[node.targets[0].id] = node.end_lineno - node.lineno + 1  # type: ignore[operator]
    low, high = limits["Runge-Kutta method"]
    for method in ("midpoint", "rk4", "ralston3", "huta6"):
        array = len(str(schemes.get(method).tableau).splitlines())
        assert low <= lines[method] - array <= high, (method, lines[method], array)

    low, high = limits["experiment"]
    for file in ROOT.glob("experiments/*.yaml"):
        text = file.read_text(encoding="utf-8")
        assert low <= len([line for line in text.splitlines() if line and not line.startswith("#")]) <= high, file.name
