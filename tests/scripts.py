"""Loads scripts outside the packages as modules."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def load(path: str) -> Any:
    """Loads a script of this repository as a module, without leaving it in ``sys.modules``.

    Args:
        path: path from the root of the repository, e.g. ``"experiments/ode/flow.py"``.
    """
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # a dataclass looks up its module there
        spec.loader.exec_module(module)
    return module
