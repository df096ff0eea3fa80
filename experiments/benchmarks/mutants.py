"""Plants single-line faults in a copy of the package, one at a time, and says which of them the tests see.

    python experiments/benchmarks/mutants.py                       # 120 faults; hours on one core
    python experiments/benchmarks/mutants.py --only odenets/training --count 30
    python experiments/benchmarks/mutants.py --list                # what would be planted

A fault changes one place of one line: a comparison, an operator, a number, an `and`, a condition, a name that has an
opposite (argmin for argmax), a statement that is dropped. Places are drawn over the files of both packages, the same
for one seed; `NAMED` adds faults that tests once missed. Messages, docstrings, annotations and printed forms are left
out.

A fault is tried on the test files that have most to do with it: those that name what the changed function is called,
what its module is called, or import from it. It is caught by the first test that fails, or that runs out of time;
otherwise it has survived, and wants a test or an explanation. Each fault is written to --out as it is tried, and one
that is there is not tried again, so that a run can be stopped and started.
"""

import argparse
import ast
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("schemes", "odenets")
# What is looked at and not computed with.
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

# (file, what stands there, what is put there): faults that tests did not see in earlier runs.
NAMED = [
    ("odenets/training/data.py", "(0.229, 0.224, 0.225)", "(0.229, 0.229, 0.225)"),
    ("odenets/models/catalogue.py", "(0.229, 0.224, 0.225)", "(0.229, 0.224, 0.22)"),
    ("odenets/training/augment.py", "zero, height, top", "zero, width, top"),
    ("odenets/training/augment.py", "(rows < (top + height)[:, None])", "(rows <= (top + height)[:, None])"),
    ("odenets/training/classifier.py", "logits.topk(min(5, ", "logits.topk(min(4, "),
    ("odenets/training/classifier.py", ", label_smoothing=self.label_smoothing)", ")"),
    ("odenets/training/classifier.py", "y if y.ndim == 1 else y.argmax(1)", "y if y.ndim == 1 else y.argmin(1)"),
    ("odenets/training/supervision.py", "(logits, y, label_smoothing=self.label_smoothing)", "(logits, y)"),
    ("schemes/coupling.py", "i / (n - 1) for i in range(n)", "i / n for i in range(n)"),
    ("odenets/backprop/grid.py", "self.rounder = 1.5 * self.limit", "self.rounder = 1.25 * self.limit"),
    ("odenets/backprop/grid.py", "high < self.limit)", "high <= self.limit)"),
    ("odenets/backprop/grid.py", "(math.ceil(1 / low) - 1).bit_length()", "math.ceil(1 / low).bit_length()"),
]


@dataclass(frozen=True)
class Fault:
    """One change.

    Attributes:
        file: path from the root.
        line: number of its line.
        before: the line as it is.
        after: the line with the fault.
        start: offset in the file of what is replaced.
        end: where it ends.
        put: what is put in its place.
        within: name of the function or class around it.
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
    """Collects the places of a file where a fault can be planted, as (start, end, text, name around)."""

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
        """Replaces an operator, which stands between two operands."""
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
        """Texts are left out."""

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
    """The faults of `NAMED`, where their text still stands."""
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
    """Faults drawn over the files, in turn, so that a long file does not take all of them."""
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


def test_files_for(fault: Fault, texts: dict[str, str]) -> list[str]:
    """Test files, those first that have most to do with a fault."""
    stem, module = Path(fault.file).stem, fault.file[:-3].replace("/", ".")
    source = (ROOT / fault.file).read_text()
    public = {n.name for n in ast.parse(source).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    scores: Counter[str] = Counter()
    for name, text in texts.items():
        words = Counter(re.findall(r"\w+", text))
        scores[name] += 6 * (stem in Path(name).stem) + 4 * (module in text)
        scores[name] += 5 * min(3, words[fault.within]) + sum(min(2, words[word]) for word in public)
        scores[name] += (
            Path(name).parts[1] == fault.file.split("/")[-2] or Path(name).parts[1] == fault.file.split("/")[0]
        )
    return [name for name, score in scores.most_common() if score > 0]


def tried(fault: Fault, copy: Path, files: list[str], most: int, seconds: float) -> str:
    """The test that saw a fault, "time" where one never came to an end, or "" where none did."""
    target, began = copy / fault.file, time.monotonic()
    raw = target.read_bytes()
    target.write_bytes(raw[: fault.start] + fault.put.encode() + raw[fault.end :])
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "--no-header",
        "--tb=no",
    ]
    try:
        for file in files[:most]:
            left = seconds - (time.monotonic() - began)
            if left <= 0:
                return ""
            try:
                run = subprocess.run(
                    [*command, file], cwd=copy, env=environment, capture_output=True, text=True, timeout=max(60.0, left)
                )
            except subprocess.TimeoutExpired:
                return "time" if left >= 60 else ""
            if run.returncode not in (0, 5):
                failed = re.search(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE)
                return failed[1] if failed else f"{file} (does not run)"
        return ""
    finally:
        target.write_bytes(raw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="files whose path begins so")
    parser.add_argument("--files", type=int, default=10, help="test files that a fault is tried on, at most")
    parser.add_argument("--seconds", type=float, default=240, help="time that a fault is tried for, at most")
    parser.add_argument("--out", type=Path, default=Path("mutants.json"))
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    faults = drawn(options.count, options.seed, options.only)
    if options.list:
        for fault in faults:
            print(f"{fault.file}:{fault.line}\n-{fault.before}\n+{fault.after}")
        return
    done = json.loads(options.out.read_text()) if options.out.exists() else []
    known = {(row["file"], row["start"], row["put"]) for row in done}
    tests = {str(p.relative_to(ROOT)): p.read_text() for p in sorted((ROOT / "tests").rglob("test_*.py"))}
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "copy")
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).exists():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy / name)
        for fault in faults:
            if (fault.file, fault.start, fault.put) in known:
                continue
            caught = tried(fault, copy, test_files_for(fault, tests), options.files, options.seconds)
            done.append({**asdict(fault), "caught": caught})
            options.out.write_text(json.dumps(done, indent=1))
            print(f"{'caught  ' if caught else 'SURVIVED'} {fault.file}:{fault.line}  {caught}", flush=True)
            if not caught:
                print(f"    -{fault.before.strip()}\n    +{fault.after.strip()}", flush=True)
    caught = sum(bool(row["caught"]) for row in done)
    print(f"{caught} of {len(done)} caught, {len(done) - caught} survived")


if __name__ == "__main__":
    main()
