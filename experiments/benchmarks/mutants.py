"""Plants single-line faults in a copy of the packages, one at a time, and reports which of them the tests catch.

    python experiments/benchmarks/mutants.py                       # 120 faults; under an hour on one core
    python experiments/benchmarks/mutants.py --again --seconds 300 # more tests for those that survived
    python experiments/benchmarks/mutants.py --only odenets/training --count 30
    python experiments/benchmarks/mutants.py --list                # lists the faults without planting them

A fault changes one place of one line: a comparison, an operator, a number, an `and`, a condition, a name that has an
opposite (argmin for argmax), a statement that is dropped. Places are drawn over the files of both packages and are the
same for the same seed; `NAMED` adds faults that tests once missed. Messages, docstrings, annotations and printed forms
are left out.

All quick tests run once, in a copy of the tree whose functions record that they are called (--calls keeps the record).
A fault is then tried on the tests that call the changed function, as many as fit into --seconds, those in the most
relevant files first. They run in a process forked after torch, Lightning and the like have been imported, until one
fails or that much processor time is spent, so the load of the machine makes no difference. A fault is caught if a test
fails with it and passes without it, or does not finish with it. All others have survived and need a test or an
explanation. Each fault is written to --out as it is tried and is not tried again, so that a run can be stopped and
resumed.
"""

import argparse
import ast
import builtins
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("schemes", "odenets")
# Code whose results are displayed, not computed with.
LEFT_OUT = re.compile(r"deprecation|plots|messages|__main__|/report|/page")
FORMS = {"__repr__", "__str__", "extra_repr", "_options", "format_mode", "to_text"}
OPPOSITES = {
    **{"argmax": "argmin", "min": "max", "any": "all", "amin": "amax", "minimum": "maximum", "floor": "ceil"},
    **{"first": "last", "zeros": "ones", "zeros_like": "ones_like", "sin": "cos"},
}
OPPOSITES |= {v: k for k, v in OPPOSITES.items()}
COMPARISONS = {
    **{ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">")},
    **{ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is")},
    **{ast.In: ("in", "not in"), ast.NotIn: ("not in", "in")},
}
OPERATORS = {
    **{ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*")},
    **{ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "//"), ast.Pow: ("**", "*")},
}

# (file, text, replacement): faults that tests missed in earlier runs.
NAMED = [
    ("odenets/models/catalogue.py", "(0.485, 0.456, 0.406)", "(0.485, 0.456, 0.46)"),
    ("odenets/models/catalogue.py", "(0.229, 0.224, 0.225)", "(0.229, 0.224, 0.22)"),
    ("odenets/training/augment.py", "zero, height, top", "zero, width, top"),
    ("odenets/training/augment.py", "(rows < (top + height)[:, None])", "(rows <= (top + height)[:, None])"),
    ("odenets/training/classifier.py", "best_of(logits, 5)[1]", "best_of(logits, 4)[1]"),
    ("odenets/training/classifier.py", ", label_smoothing=self.label_smoothing)", ")"),
    ("odenets/training/classifier.py", "y if y.ndim == 1 else y.argmax(1)", "y if y.ndim == 1 else y.argmin(1)"),
    ("odenets/training/supervision.py", "(logits, y, label_smoothing=self.label_smoothing)", "(logits, y)"),
    ("schemes/coupling.py", "i / (n - 1) for i in range(n)", "i / n for i in range(n)"),
    ("odenets/backprop/grid.py", ".round_().mul_(self.unit)", ".floor_().mul_(self.unit)"),
    ("odenets/backprop/grid.py", "high < self.limit)", "high <= self.limit)"),
    ("odenets/backprop/grid.py", "(math.ceil(1 / low) - 1).bit_length()", "math.ceil(1 / low).bit_length()"),
]


@dataclass(frozen=True)
class Fault:
    """One change.

    Attributes:
        file: path from the root.
        line: line number.
        before: the line as it is.
        after: the line with the fault.
        start: byte offset in the file of the text that is replaced.
        end: byte offset of its end.
        put: the replacement.
        within: name of the enclosing function or class.
    """

    file: str
    line: int
    before: str
    after: str
    start: int
    end: int
    put: str
    within: str


class _Places(ast.NodeVisitor):
    """Collects the places of a file where a fault can be planted, as (start, end, replacement, enclosing name)."""

    def __init__(self, source: str):
        self.source, self.found, self.around = source, list[tuple[int, int, str, str]](), [""]
        lengths = [len(line.encode()) for line in source.splitlines(keepends=True)]
        self.starts = [sum(lengths[:n]) for n in range(len(lengths))] if len(lengths) < 2000 else []
        self.raw = source.encode()

    def at(self, line: int, column: int) -> int:
        return self.starts[line - 1] + column

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)  # type: ignore

    def add(self, start: int, end: int, text: str) -> None:
        self.found.append((start, end, text, self.around[-1]))

    def between(self, left: ast.AST, right: ast.AST, old: str, new: str) -> None:
        """Replaces an operator between two operands."""
        start, end = self.span(left)[1], self.span(right)[0]
        text = self.raw[start:end].decode()
        match = re.search(rf"(?<![=<>!*/]){re.escape(old)}(?![=*/])" if not old[0].isalpha() else rf"\b{old}\b", text)
        if match:
            self.add(start + len(text[: match.start()].encode()), start + len(text[: match.end()].encode()), new)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name in FORMS:
            return
        self.around.append(node.name)
        for child in node.body:
            self.visit(child)
        for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(default)
        self.around.pop()

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.around.append(node.name)
        for child in node.body:
            self.visit(child)
        self.around.pop()

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        """Messages are left out."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """F-strings are left out."""

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return
        if isinstance(node.value, ast.Call) and node.lineno == node.end_lineno:
            self.add(*self.span(node), "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        pair = OPERATORS.get(type(node.op))
        if pair is not None and pair[1] in "+-*/":
            self.between(node.target, node.value, pair[0] + "=", pair[1] + "=")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, op, right in zip((node.left, *node.comparators), node.ops, node.comparators, strict=False):
            self.between(left, right, *COMPARISONS[type(op)])
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        pair = OPERATORS.get(type(node.op))
        text = any(isinstance(x, (ast.JoinedStr, ast.List, ast.Tuple)) for x in (node.left, node.right))
        if pair is not None and not text:
            self.between(node.left, node.right, *pair)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        self.between(node.values[0], node.values[1], old, new)
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        start, end = self.span(node.test)
        self.add(start, end, f"not ({self.raw[start:end].decode()})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.add(*self.span(node), str(not node.value))
        elif isinstance(node.value, int):
            self.add(*self.span(node), str(node.value + 1))
        elif isinstance(node.value, float):
            self.add(*self.span(node), repr(node.value * 1.25 if node.value else 0.25))

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in OPPOSITES:
            end = self.span(node.func)[1]
            self.add(end - len(name), end, OPPOSITES[name])
        if name in ("warn", "SchemeError"):
            return
        self.generic_visit(node)


def faults_in(file: str, source: str) -> list[Fault]:
    """All faults that can be planted in a file, each within one line."""
    places = _Places(source)
    if not places.starts:
        return []
    places.visit(ast.parse(source))
    found, raw = [], source.encode()
    for start, end, put, within in sorted(set(places.found)):
        begin = raw.rfind(b"\n", 0, start) + 1
        stop = raw.find(b"\n", end)
        if b"\n" in raw[start:end]:
            continue
        before, after = raw[begin:stop].decode(), (raw[begin:start] + put.encode() + raw[end:stop]).decode()
        if before != after and not before.lstrip().startswith(("from ", "import ", "@", "__slots__", "__all__")):
            found.append(Fault(file, raw.count(b"\n", 0, start) + 1, before, after, start, end, put, within))
    return found


def named() -> Iterator[Fault]:
    """Yields the faults of `NAMED`; fails if the text of one is no longer there."""
    for file, old, new in NAMED:
        source = (ROOT / file).read_text()
        start = source.find(old)
        if start < 0:
            raise SystemExit(f"mutants: {old!r} stands no longer in {file}; mend NAMED.")
        raw = len(source[:start].encode())
        line = source.count("\n", 0, start) + 1
        before = source.splitlines()[line - 1]
        yield Fault(file, line, before, before.replace(old, new), raw, raw + len(old.encode()), new, "")


def drawn(count: int, seed: int, only: str) -> list[Fault]:
    """Draws faults from the files in turn, so that a long file does not supply all of them."""
    generator, pools = random.Random(seed), []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            file = str(path.relative_to(ROOT))
            if file.startswith(only) and not LEFT_OUT.search(file):
                pool = faults_in(file, path.read_text())
                generator.shuffle(pool)
                pools.append(pool)
    generator.shuffle(pools)
    found = [fault for fault in named() if fault.file.startswith(only)]
    while pools and len(found) < count:
        for pool in [p for p in pools if p]:
            found.append(pool.pop())
            if len(found) == count:
                break
        pools = [p for p in pools if p]
    return found


def relevance(fault: Fault, source: str, texts: dict[str, str]) -> Counter[str]:
    """Scores how relevant test files are to a fault in a source, by the words in them."""
    stem, module = Path(fault.file).stem, fault.file[:-3].replace("/", ".")
    public = {n.name for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    scores: Counter[str] = Counter()
    for name, text in texts.items():
        words = Counter(re.findall(r"\w+", text))
        scores[name] += 6 * (stem in Path(name).stem) + 4 * (module in text)
        scores[name] += 5 * min(3, words[fault.within]) + sum(min(2, words[word]) for word in public)
        scores[name] += 2 * (Path(name).parts[1] == fault.file.split("/")[-2])
        scores[name] += Path(name).parts[1] == fault.file.split("/")[0]
    return scores


def functions(source: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Returns the functions of a file, outer ones first."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return sorted(nodes, key=lambda node: node.lineno)


def marked(file: str, source: str) -> str:
    """Returns the source with a line in each function that records that it was called."""
    lines = source.splitlines()
    # From the end, so that the line numbers of earlier functions stay valid.
    for node in reversed(functions(source)):
        first = next(
            (n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))), None
        )
        if first is not None and first.lineno > node.lineno:
            first_line = min([first.lineno, *(d.lineno for d in getattr(first, "decorator_list", []))])
            lines.insert(first_line - 1, " " * first.col_offset + f"_called.add({f'{file}:{node.lineno}'!r})")
    return "\n".join(lines) + "\n"


# Accompanies the marked sources: processes started by tests write down at exit which functions they called.
NOTING = """
import atexit, builtins, os
builtins._called = set()
def note():
    folder, test = os.environ.get("MUTANTS_CALLED"), os.environ.get("PYTEST_CURRENT_TEST", "")
    if folder and test:
        with open(f"{folder}/{os.getpid()}", "a") as file:
            file.write("\\n".join([test.rsplit(" ", 1)[0], *builtins._called]))
atexit.register(note)
"""


@dataclass
class Calls:
    """Which tests call which functions, and how long they take.

    Attributes:
        seconds: processor time of each test.
        tests: for each function, as "file:line of its def", the tests that call it, by their positions in `seconds`.
    """

    seconds: dict[str, float]
    tests: dict[str, list[int]]

    def of(self, fault: Fault, source: str, texts: dict[str, str], seconds: float) -> list[str]:
        """Returns the tests for a fault that fit into the time, those of the most relevant files first."""
        around = [n for n in functions(source) if n.body[0].lineno <= fault.line <= n.end_lineno]
        numbers = self.tests.get(f"{fault.file}:{around[-1].lineno}", []) if around else []
        if not numbers:  # a table at module level, or a function that no test calls
            numbers = sorted({n for place, ns in self.tests.items() if place.split(":")[0] == fault.file for n in ns})
        names, scores = list(self.seconds), relevance(fault, source, texts)
        found = [names[n] for n in numbers] or [name for name in names if scores[name.split("::")[0]] > 1]
        # First cases named like something in the changed line or the table around it, then three cases of each test.
        lines = source.splitlines()
        top = next((n for n in ast.parse(source).body if n.lineno <= fault.line <= (n.end_lineno or 0)), None)
        text = f"{fault.before} {lines[top.lineno - 1] if top is not None else ''}"
        words = {word for word in re.findall(r"\w{4,}", text) if re.search(r"[0-9_]", word)}
        nth, cases = {}, Counter[str]()
        for test in found:
            law = test.split("[")[0]
            nth[test] = cases[law]
            cases[law] += 1
        called = {t: bool(words & set(re.findall(r"\w+", t.partition("[")[2]))) for t in found}
        found.sort(key=lambda t: (not called[t], nth[t] >= 3, -scores[t.split("::")[0]], nth[t], self.seconds[t]))
        kept, total = [], 0.0
        for test in found:
            total += self.seconds[test] + 0.02
            if total <= seconds or not kept:
                kept.append(test)
        return kept


class Watch:
    """A pytest plugin that logs which test runs and which fail, and ends the session when time is up.

    Args:
        log: file that it writes to.
        tests: the tests to run, in this order; all if empty.
        seconds: processor time after which no further test begins.
    """

    def __init__(self, log: Path, tests: list[str], seconds: float):
        self.log, self.seconds = log, seconds
        self.rank = {test: n for n, test in enumerate(tests) if "::" in test}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list) -> None:
        if self.rank:
            items[:] = sorted((i for i in items if i.nodeid in self.rank), key=lambda item: self.rank[item.nodeid])

    def note(self, what: str, test: str) -> None:
        with self.log.open("a") as file:
            file.write(f"{what} {test}\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.note("began", nodeid)

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.note("failed", report.nodeid)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.note("failed", report.nodeid)

    def pytest_runtest_protocol(self, item) -> None:
        if sum(os.times()[:4]) > self.seconds:
            item.session.shouldstop = "time"

    def pytest_sessionfinish(self) -> None:
        self.note("ended", "")


def run_tests(
    copy: Path, tests: list[str], seconds: float, *options: str, plugin: type[Watch] = Watch
) -> list[list[str]]:
    """Runs tests in the copy, in a forked process.

    Returns:
        The lines that the plugin wrote, each split into its first word and the rest.

    Raises:
        TimeoutError: The process hung.
    """
    log, out = copy.parent / "log", copy.parent / "out"
    log.write_text("")
    if not (child := os.fork()):
        code = 1
        try:
            os.setpgid(0, 0)
            for number in (1, 2):
                os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 120,) * 2)
            os.chdir(copy)
            sys.path[0] = str(copy)
            os.environ |= {"PYTHONPATH": str(copy), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
            os.environ.pop("HYPOTHESIS_NO_PLUGINS", None)
            plugins = ["-p", "xdist.plugin", "-p", "_hypothesis_pytestplugin", "-p", "no:cacheprovider"]
            files = list(dict.fromkeys(test.split("::")[0] for test in tests))
            words = ["-q", "-n", "0", "--tb=short", *plugins, *options, *files]
            code = int(pytest.main(words, [plugin(log, tests, seconds)]))
        finally:
            sys.stdout.flush()
            os._exit(code)
    late = time.monotonic() + 20 * (seconds + 120)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > late:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError
        time.sleep(0.1)
    try:
        os.killpg(child, signal.SIGKILL)  # processes that the tests left running
    except ProcessLookupError:
        pass
    return [line.split(" ", 1) for line in log.read_text().splitlines()]


def first_failed(lines: list[list[str]]) -> str:
    """Returns the first test that failed, or that was running when its process died; "" if there is none."""
    failed = [test for what, test in lines if what == "failed"]
    if failed:
        return failed[0]
    if lines and lines[-1][0] == "ended":
        return ""
    return lines[-1][1] if lines else "tests"


class CallsWatch(Watch):
    """Records which marked functions a test calls, and how much processor time it takes."""

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        vars(builtins)["_called"].clear()
        self.began = sum(os.times()[:4])

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.note("took", f"{sum(os.times()[:4]) - self.began} {nodeid}")
        self.note("called", "\t".join([nodeid, *vars(builtins)["_called"]]))


def calls(copy: Path) -> Calls:
    """Runs all quick tests once, in a copy whose functions are marked, and restores the copy."""
    whole = {p: p.read_text() for package in PACKAGES for p in sorted((copy / package).rglob("*.py"))}
    seconds, tests, called = Counter[str](), dict[str, set[str]](), copy.parent / "called"
    called.mkdir()
    os.environ["MUTANTS_CALLED"] = str(called)
    try:
        for path, source in whole.items():
            path.write_text(marked(str(path.relative_to(copy)), source))
        (copy / "sitecustomize.py").write_text(NOTING)
        vars(builtins)["_called"] = set()
        lines = run_tests(copy, [], 7200, plugin=CallsWatch)
    finally:
        for path, source in whole.items():
            path.write_text(source)
        (copy / "sitecustomize.py").unlink()
        del os.environ["MUTANTS_CALLED"]
    for what, text in lines:
        if what == "took":
            first, test = text.split(" ", 1)
            seconds[test] += float(first)
    notes = [text.split("\t") for what, text in lines if what == "called"]
    for test, *places in [*notes, *(file.read_text().splitlines() for file in called.iterdir())]:
        for place in places:
            tests.setdefault(place, set()).add(test)
    number = {test: n for n, test in enumerate(seconds)}
    return Calls(dict(seconds), {place: sorted(number[t] for t in ts & number.keys()) for place, ts in tests.items()})


class Trial:
    """Tries faults in a copy of the tree.

    Args:
        copy: root of the copy.
        seconds: processor time spent on a fault; the test that is then running still finishes.
    """

    def __init__(self, copy: Path, seconds: float):
        self.copy, self.seconds = copy, seconds
        self.pass_whole, self.fail_whole = set[str](), set[str]()

    def sound(self, test: str) -> bool:
        """Whether a test passes without a fault."""
        if test not in self.pass_whole | self.fail_whole:
            only = [] if "::" in test else ["--collect-only"]
            failed = first_failed(run_tests(self.copy, [test], self.seconds, *only))
            (self.fail_whole if failed else self.pass_whole).add(test)
        return test in self.pass_whole

    def caught_by(self, fault: Fault, tests: list[str]) -> str:
        """Returns the test that catches a fault, or "" if none does."""
        target = self.copy / fault.file
        raw = target.read_bytes()
        while tests := [t for t in tests if not {t, t.split("::")[0]} & self.fail_whole]:
            target.write_bytes(raw[: fault.start] + fault.put.encode() + raw[fault.end :])
            try:
                test = first_failed(run_tests(self.copy, tests, self.seconds, "-x"))
            except TimeoutError:
                print(f"stood still: {fault.file}:{fault.line}", flush=True)
                return ""
            finally:
                target.write_bytes(raw)
            if not test or self.sound(test):
                return test
            print(f"fails without a fault: {test}", flush=True)
        return ""


def import_others() -> None:
    """Imports what tests need besides the two packages, once for all forked processes."""
    os.environ["HYPOTHESIS_NO_PLUGINS"] = "1"  # our own plugin would import the packages
    names = ("torch", "lightning.pytorch", "jsonargparse", "datasets", "PIL.Image", "torchmetrics", "safetensors.torch")
    names += ("sklearn.datasets", "matplotlib.pyplot", "scipy.stats", "transformers", "torchdiffeq", "tensorboard")
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            print(f"not imported: {name}", flush=True)
    importlib.import_module("torch").set_num_threads(1)


def copied(scratch: Path) -> Path:
    """Copies the files of the tree that git lists."""
    copy = scratch / "copy"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


def table(done: list[dict]) -> str:
    """Formats the numbers of caught and surviving faults by folder."""
    counts: dict[str, Counter[bool]] = {}
    for row in done:
        counts.setdefault(str(Path(row["file"]).parent), Counter())[bool(row["caught"])] += 1
    lines = ["| Folder | planted | caught | survived |", "|---|--:|--:|--:|"]
    for folder, count in [*sorted(counts.items()), ("all", sum(counts.values(), Counter[bool]()))]:
        lines.append(f"| {folder} | {count.total()} | {count[True]} | {count[False]} |")
    return "\n".join(lines)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose path begins so")
    parser.add_argument("--seconds", type=float, default=30, help="processor time that a fault is tried for")
    parser.add_argument("--out", type=Path, default=Path("mutants.json"), help="what was seen, fault by fault")
    parser.add_argument("--calls", type=Path, default=Path("calls.json"), help="which tests call which functions")
    parser.add_argument("--again", action="store_true", help="tries those of --out that survived once more")
    parser.add_argument("--list", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = read_options()
    faults = drawn(options.count, options.seed, options.only)
    if options.list:
        for fault in faults:
            print(f"{fault.file}:{fault.line}\n-{fault.before}\n+{fault.after}")
        return
    done = json.loads(options.out.read_text()) if options.out.exists() else []
    if options.again:
        done = [row for row in done if row["caught"]]
    known = {(row["file"], row["before"], row["after"]) for row in done}
    texts = {str(p.relative_to(ROOT)): p.read_text() for p in sorted((ROOT / "tests").rglob("test_*.py"))}
    os.environ["OMP_NUM_THREADS"], os.environ["PYTHONDONTWRITEBYTECODE"] = "1", "1"
    import_others()
    with tempfile.TemporaryDirectory() as scratch:
        copy = copied(Path(scratch))
        if not options.calls.exists():
            options.calls.write_text(json.dumps(asdict(calls(copy))))
        called, trial = Calls(**json.loads(options.calls.read_text())), Trial(copy, options.seconds)
        for fault in faults:
            if (fault.file, fault.before, fault.after) in known:
                continue
            source = (copy / fault.file).read_text()
            caught = trial.caught_by(fault, called.of(fault, source, texts, options.seconds))
            done.append({**asdict(fault), "caught": caught})
            options.out.write_text(json.dumps(done, indent=1))
            print(f"{'caught  ' if caught else 'SURVIVED'} {fault.file}:{fault.line}  {caught}", flush=True)
            if not caught:
                print(f"    -{fault.before.strip()}\n    +{fault.after.strip()}", flush=True)
    print(table(done))


if __name__ == "__main__":
    main()
