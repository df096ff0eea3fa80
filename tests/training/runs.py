"""Training runs as tests need them: a command line in a forked process, or in this one; small nets on the digits."""

import importlib.util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def benchmark(name: str) -> Any:
    """A script of experiments/benchmarks as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kills = benchmark("kills")


def two_lines(folder: Path, status: int, code: int = 2) -> list[str]:
    """The two lines with which a forked command line ended."""
    text = (folder / "err").read_text()
    lines = text.splitlines()[-2:]
    assert status == code and lines[0].startswith("error: ") and lines[1].startswith("  "), (status, text[-1500:])
    assert "Traceback" not in text, text[-1500:]
    return lines
