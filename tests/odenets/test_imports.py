"""Who may import whom, read from the source, and what ``import odenets`` loads."""

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("schemes", "odenets")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports(module, path):
    """The absolute names that a file imports anywhere in it, and those that it imports while it is loaded."""
    found = {False: set(), True: set()}
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]

    def walk(node, loading):
        for child in ast.iter_child_nodes(node):
            inner = loading
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                inner = False
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                inner = False
            if isinstance(child, ast.Import):
                found[inner] |= {alias.name for alias in child.names}
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                name = ".".join([*base, *([child.module] if child.module else [])])
                found[inner] |= {name, *(f"{name}.{alias.name}" for alias in child.names)}
            walk(child, inner)

    walk(ast.parse(path.read_text()), True)
    return found[True] | found[False], found[True]


@cache
def every():
    """Read when the first rule asks, not while tests are collected."""
    return {module: imports(module, path) for module, path in FILES.items()}


def within(name, *packages):
    return any(name == p or name.startswith(p + ".") for p in packages)


def users(package, loading=False):
    return {module for module, found in every().items() if any(within(name, package) for name in found[loading])}


def test_the_walk_sees_imports():
    """Otherwise every rule below would hold of nothing."""
    assert "schemes.scheme" in every()["schemes.runge_kutta"][1]
    assert "schemes.registry" in every()["odenets.stack"][1]
    assert "torchdiffeq" in every()["schemes.adaptive"][0] - every()["schemes.adaptive"][1]
    assert "schemes.tableau.Tableau" in every()["schemes.testing.strategies"][1]
    assert "schemes" in FILES and "odenets.stack" in FILES


def test_schemes_know_nothing_of_odenets():
    assert not {m for m in users("odenets") if within(m, "schemes")}


def test_schemes_need_torch_and_the_standard_library_alone():
    allowed = {"torch", "schemes", "torchdiffeq", "hypothesis", *sys.stdlib_module_names}
    for module in FILES:
        if within(module, "schemes"):
            assert {name.split(".")[0] for name in every()[module][0]} <= allowed, module


def test_mathematics_needs_no_torch():
    for module in ("tableau", "tableaux", "exact_numbers", "families", "order", "stability", "language", "errors"):
        assert f"schemes.{module}" not in users("torch"), module


def test_data_does_not_know_who_interprets_it():
    for module in ("tableau", "tableaux", "exact_numbers", "families", "order", "stability"):
        for name in every()[f"schemes.{module}"][0]:
            assert not within(name, "schemes.scheme", "schemes.registry", "schemes.runge_kutta"), (module, name)


def test_hypothesis_is_for_testing_alone():
    assert users("hypothesis") and all(within(m, "schemes.testing") for m in users("hypothesis"))
    assert all(within(m, "schemes.testing", "odenets.testing") for m in users("schemes.testing"))


def test_torchdiffeq_is_imported_when_it_is_used():
    assert users("torchdiffeq") <= {"schemes.adaptive"} and not users("torchdiffeq", loading=True)


def test_matplotlib_is_for_plots_inside_functions():
    assert users("matplotlib") <= {"odenets.plots"} and not users("matplotlib", loading=True)


def test_layers_know_no_schemes():
    assert not {m for m in users("schemes") if within(m, "odenets.layers")}


def test_models_know_no_lightning():
    allowed = ("odenets.training", "odenets.segmentation", "odenets.detection", "odenets.study", "odenets.cli")
    allowed += ("odenets.config_files", "odenets.__main__")
    for library in ("lightning", "pytorch_lightning", "jsonargparse", "torchmetrics", "datasets"):
        assert all(within(m, *allowed) for m in users(library)), library
    for module in FILES:
        if not within(module, *allowed):
            for name in every()[module][0]:
                assert not within(name, *allowed), f"{module} imports {name}"


def test_the_stack_knows_no_models():
    for module in (m for m in FILES if within(m, "odenets.stack", "odenets.checks", "odenets.backprop")):
        for name in every()[module][0]:
            assert not within(name, "odenets.models", "odenets.checkpoints", "odenets.analysis"), (module, name)


def edges(module):
    """The modules of ours that a module imports, in whatever function and under whatever condition."""
    found = set()
    for name in every()[module][0]:
        # `from package import module` reads the module; what the package itself re-exports is not asked for.
        if any(other != name and within(other, name) for other in every()[module][0] if other in FILES):
            continue
        while name and name not in FILES:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {"", module}


def circles(graph):
    """The sets of modules that reach each other (Tarjan's strongly connected components of more than one)."""
    number, low, stack, found = {}, {}, [], []

    def visit(module):
        number[module] = low[module] = len(number)
        stack.append(module)
        for other in graph[module]:
            if other not in number:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == number[module]:
            at = stack.index(module)
            found.append(stack[at:])
            del stack[at:]

    for module in graph:
        if module not in number:
            visit(module)
    return [sorted(c) for c in found if len(c) > 1]


def test_circles_are_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"]]
    assert edges("odenets.backprop.tape") >= {"odenets.backprop.walk", "odenets.step", "schemes.coupling"}
    assert "odenets.backprop.reverse" in edges("odenets.backprop.modes")  # in a function


def test_no_module_imports_what_imports_it():
    """Imports run one way: also those inside functions, and those under TYPE_CHECKING."""
    assert circles({module: edges(module) for module in FILES}) == []


def test_layers_of_the_stack():
    """schemes <- step <- checks, build, backprop <- stack <- models <- recipes <- training <- study <- cli."""
    order = ["odenets.step", "odenets.checks", "odenets.backprop", "odenets.stack", "odenets.models", "odenets.recipes"]
    order += ["odenets.training", "odenets.study", "odenets.cli"]
    for low, package in enumerate(order):
        for module in (m for m in FILES if within(m, package)):
            above = [name for name in edges(module) if within(name, *order[low + 1 :])]
            assert not above, (module, above)


def printed(code):
    """What a new process prints that runs this code."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def loaded(statement):
    return set(printed(f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"))


EXTRAS = (
    "lightning torchdiffeq hypothesis matplotlib datasets torchvision timm transformers jsonargparse sklearn "
    "torchmetrics".split()
)


@pytest.mark.long
def test_the_import_leaves_the_compiler_alone():
    has = "'torch._dynamo' in sys.modules"
    code = f"import sys, torch; had = {has}; import odenets; print(had, {has})"
    had, has = printed(code)
    assert had == has, "import odenets loads torch._dynamo, which takes as long as torch itself"


@pytest.mark.cases(1)
@pytest.mark.parametrize("statement", ["import odenets", "import schemes; schemes.get('nested(rk4, heun3)')"])
def test_what_the_base_import_loads(statement):
    found = loaded(statement)
    assert {"torch", "schemes"} <= found
    assert not found & set(EXTRAS)
