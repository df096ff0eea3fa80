"""The table of extras: it knows every package that is imported beside torch and einops, and where each comes from."""

import functools
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from odenets.extras import EXTRAS, MissingExtra, explained, install, require

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FILES = [p for package in ("schemes", "odenets") for p in sorted((ROOT / package).rglob("*.py"))]
BASE = {"torch", "einops", "schemes", "odenets", "__future__", *sys.stdlib_module_names}
# Used where it is there, by whoever brought it; nothing needs it.
NOT_OURS = {"torchvision"}


def brought(extra: str) -> set[str]:
    """The distributions of an extra, those of the extras that it names included."""
    found: set[str] = set()
    for text in PROJECT["optional-dependencies"][extra]:
        name, inner = re.match(r"([\w.-]+)(?:\[([\w,]+)\])?", text).groups()  # type: ignore[union-attr]
        if name == "odenets":
            found |= {d for part in inner.split(",") for d in brought(part)}
        else:
            found.add(name.lower().replace("_", "-"))
    return found


IMPORT = re.compile(r"^\s*(?:import (\w+)|from (\w+)[\w.]* import )", re.M)


def imported() -> dict[str, set[str]]:
    """The packages that are imported anywhere in the source, and by which files."""
    found: dict[str, set[str]] = {}
    for path in FILES:
        for names in IMPORT.findall(path.read_text("utf-8")):
            found.setdefault("".join(names), set()).add(str(path.relative_to(ROOT)))
    return found


def test_every_package_that_is_imported_is_in_the_table():
    found = imported()
    assert {"lightning", "torchdiffeq", "safetensors"} <= set(found)
    lacking = {name: files for name, files in found.items() if name not in {*BASE, *EXTRAS, *NOT_OURS}}
    assert not lacking


distributions = functools.cache(importlib.metadata.packages_distributions)


@pytest.mark.parametrize("module", sorted(EXTRAS))
def test_an_extra_brings_what_the_table_says(module):
    """By the metadata of what is installed: the extra asks for the distribution, or for one that requires it."""
    of = distributions().get(module)
    if not of:
        pytest.skip(f"{module} is not installed")
    wanted = {name.lower().replace("_", "-") for name in of}
    asked = brought(EXTRAS[module])
    required = {
        re.match(r"[\w.-]+", text)[0].lower().replace("_", "-")  # type: ignore[index]
        for name in asked
        for text in importlib.metadata.requires(name) or ()
    }
    assert wanted & (asked | required), (module, of, EXTRAS[module])


def test_the_lines_of_an_error():
    assert explained(ModuleNotFoundError("No module named 'sklearn.x'", name="sklearn.x")) == (
        "this needs the package sklearn, which is not installed",
        'pip install "odenets[train]"',
    )
    assert explained(ImportError(f"figures need matplotlib: {install('analysis')}")) == (
        "figures need matplotlib",
        'pip install "odenets[analysis]"',
    )
    assert explained(ModuleNotFoundError("No module named 'my_net'", name="my_net")) is None
    assert explained(ImportError("cannot import name 'a' from 'b'")) is None


def test_require_names_what_is_missing(monkeypatch):
    require("train", "this test")
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(MissingExtra, match=r'this test needs the package rich: pip install "odenets\[train\]"'):
        require("train", "this test")


BARE = """
import importlib, sys
sys.modules.update(dict.fromkeys({blocked}))  # None is what must not be imported
for name in {modules}:
    try:
        importlib.import_module(name)
    except ImportError as e:
        print(name, "|", e)
"""


@pytest.mark.long  # each module of the package is loaded once
def test_a_module_that_needs_an_extra_names_it_when_it_is_imported():
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in FILES]
    modules = [
        m for m in modules if not m.endswith("__main__") and not m.startswith(("schemes.testing", "odenets.cli"))
    ]
    code = BARE.format(blocked=sorted(EXTRAS), modules=modules)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    failed = dict(line.split(" | ", 1) for line in done.stdout.splitlines())
    assert {"odenets.training.classifier", "odenets.hf", "odenets.timm"} <= set(failed)
    assert {"odenets", "odenets.packaged", "odenets.plots", "odenets.export"}.isdisjoint(failed)
    assert not {name: said for name, said in failed.items() if 'pip install "odenets[' not in said}
