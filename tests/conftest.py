"""Single-threaded workers, fixed seeds, hypothesis profiles, and the folder of real pictures (``ODENETS_DATA``)."""

import functools
import gc
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may touch the network
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start, too

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# The first call of a torch operator can take longer than hypothesis' default deadline of 200 ms.
settings.register_profile("dev", max_examples=20, deadline=None)
settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=10_000, deadline=None)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_xdist_auto_num_workers(config) -> int:
    """Resolves ``-n auto`` of pyproject.toml: a worker per core for folders, none for files and single tests.

    A single file finishes before a worker has started. At most eight, since each takes more than a gigabyte.
    """
    if all(Path(config.invocation_params.dir, arg.split("::")[0]).is_file() for arg in config.args):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(8, int(os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS") or cores))
    return workers if workers > 1 else 0


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Implements ``cases(n)``: n of a test's cases, spread evenly, are quick, and the others are marked ``long``."""
    of: dict[object, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("cases"):
            of.setdefault((item.path, getattr(item, "originalname", item.name)), []).append(item)
    for cases in of.values():
        (quick,) = cases[0].get_closest_marker("cases").args  # type: ignore[union-attr]
        kept = {round(i * (len(cases) - 1) / max(1, quick - 1)) for i in range(quick)}
        for i, item in enumerate(cases):
            if i not in kept:
                item.add_marker("long")


def pytest_collection_finish() -> None:
    """Freezes the collected items, which live to the end, so that the garbage collector need not traverse them."""
    gc.collect()
    gc.freeze()


TRACED = 0.1  # seconds of each test function, over all its cases, during which `--cov` counts lines
_spent: dict[object, float] = defaultdict(float)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Limits the tracer that counts lines (up to Python 3.11), which makes all code two to three times slower.

    Later cases and examples of a test function run without it: nearly all lines that they run were counted before.
    Lines that are counted did run; the figure can only be too low, by the few lines that only later cases run.
    """
    tracer = sys.gettrace()
    if tracer is None or not item.config.pluginmanager.hasplugin("_cov"):
        return (yield)
    key = item.path, getattr(item, "originalname", item.name)
    handle = getattr(getattr(item, "obj", None), "hypothesis", None)
    if handle is not None and key not in _spent:
        handle.inner_test = _untraced_later(handle.inner_test, key)
    traced, began = _spent[key] < TRACED, time.process_time()
    if not traced:
        sys.settrace(None)
    try:
        return (yield)
    finally:
        # Restored in the frame that paused it: the tracer keeps a stack of frames and sees no return while paused.
        sys.settrace(tracer)
        if handle is None:
            _spent[key] += time.process_time() - began


def _untraced_later(test, key: object):
    @functools.wraps(test)
    def run(*args, **kwargs):
        tracer, began = sys.gettrace(), time.process_time()
        if _spent[key] >= TRACED:
            sys.settrace(None)
        try:
            return test(*args, **kwargs)
        finally:
            sys.settrace(tracer)
            _spent[key] += time.process_time() - began

    return run


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _environment():
    """Restores environment variables after each test: Lightning keeps its seed there, and processes inherit it."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # module-scoped fixtures train too
        os.environ.pop(name, None)
    before = dict(os.environ)
    yield
    # pytest's own variable for the running test changes while the test runs.
    for name in {*before, *os.environ} - {"PYTEST_CURRENT_TEST"}:
        if name not in before:
            del os.environ[name]
        elif os.environ.get(name) != before[name]:
            os.environ[name] = before[name]


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder with cifar10/, cifar100/, tiny_imagenet/ and imagenet_sample/; the test is skipped if it is missing."""
    root = os.environ.get("ODENETS_DATA", "")
    if not root or not Path(root).is_dir():
        pytest.skip("set ODENETS_DATA to a folder with cifar10/ and imagenet_sample/ to run this test")
    return Path(root)
