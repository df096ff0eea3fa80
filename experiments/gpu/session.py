"""Runs the parts of ``run.sh`` within its minutes: tests, measurements, runs of the campaign, and the tables.

    python experiments/gpu/session.py OUT MINUTES [--tiny]

Each part is a separate process. When its time is over it receives SIGTERM, and ten seconds later it is killed.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TESTS = 90.0  # seconds at most
RESERVE = 30.0  # seconds reserved for the report, the tables and processes that are slow to stop
SCHEMES = "euler,midpoint,heun2,kutta3,rk4,ssprk33"


class Session:
    """A session of limited time on a device, and the folder of its results.

    Args:
        out: the folder.
        minutes: total time.
        tiny: whether sizes are those for a CPU.
    """

    def __init__(self, out: Path, minutes: float, tiny: bool):
        self.out, self.tiny, self.end = out, tiny, time.monotonic() + 60 * minutes - RESERVE

    def left(self) -> float:
        """Returns the seconds that are left."""
        return self.end - time.monotonic()

    def run(self, name: str, words: Sequence[str], seconds: float) -> int | None:
        """Runs a command with a time limit, its output in ``NAME.log``; returns its status, or None if time ran out."""
        with (self.out / f"{name}.log").open("a") as log:
            process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=log, stderr=log)
            try:
                return process.wait(max(0.0, min(seconds, self.left())))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                return None

    def tests(self) -> None:
        """Runs the tests that need a device, once, and sorts the failures by the exception raised."""
        if (self.out / "tests.json").exists():
            return
        report = self.out / "tests.xml"
        words = ["-m", "pytest", "-n", "0", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        status = self.run("tests", [*words, *(["tests/odenets/test_gpu.py"] if self.tiny else [])], TESTS)
        found: dict = {"status": status, "in_time": status is not None, "counts": {}, "failures": {}}
        if report.exists():
            found |= sorted_failures(report)
        write(self.out / "tests.json", found)
        for kind, names in found["failures"].items():
            name = re.sub(r"\W+", "-", kind).strip("-")[:60]
            (self.out / f"failures-{name}.txt").write_text("\n".join(names) + "\n")

    def measurements(self) -> None:
        """Runs the cases of ``measure.py``, in a new process if a case ended the last one."""
        until = self.left() * (0.4 if self.tiny else 0.5)
        began = time.monotonic()
        while (left := until - (time.monotonic() - began)) > 5:
            words = [str(HERE / "measure.py"), str(self.out), "--seconds", f"{left:.0f}"]
            status = self.run("measure", [*words, *(["--tiny"] if self.tiny else [])], left)
            if status in (0, 2, None):  # done, arguments rejected, or out of time; otherwise a case crashed the process
                return

    def campaign(self) -> None:
        """Continues the campaign for the rest of the time."""
        pictures = Path(os.environ.get("ODENETS_DATA", "")) / "cifar10"
        words = ["-m", "odenets", "compare"]
        if self.tiny or not (os.environ.get("ODENETS_DATA") and pictures.is_dir()):
            words += ["experiments/quickstart.yaml", "--over", "model.net.scheme=euler,rk4", "--seeds", "0"]
            words += ["--trainer.max_epochs", "1"]
        else:
            words += ["experiments/cifar10_ho_resnet.yaml", "--over", f"model.net.scheme={SCHEMES}", "--seeds", "0..4"]
            words += ["--model.net.functions", "[12, 12, 12]", "--model.net.widths", "[8, 16, 32]", "--workers", "4"]
            words += ["--model.net.placement", "preact", "--trainer.max_epochs", "10", "--data.root", str(pictures)]
            words += ["--data.on_device", "true", "--model.compile", "true"]
        self.run("campaign", [*words, "--dir", str(self.out / "campaign")], self.left())
        if (self.out / "campaign" / "runs.sqlite").exists():
            words = ["-m", "odenets", "compare", "report", str(self.out / "campaign")]
            self.end += 0.7 * RESERVE
            self.run("report", words, self.left())


def sorted_failures(report: Path) -> dict:
    """Returns counts of outcomes, and the names of failed tests by the exception raised."""
    counts = {"passed": 0, "skipped": 0, "failed": 0}
    failures: dict[str, list[str]] = {}
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        if bad is not None:
            kind = (bad.get("message") or "no message").partition("\n")[0].partition(":")[0]
            failures.setdefault(kind, []).append(f"{case.get('classname')}::{case.get('name')}")
        counts["failed" if bad is not None else "skipped" if case.find("skipped") is not None else "passed"] += 1
    return {"counts": counts, "failures": failures}


def write(path: Path, value: object) -> None:
    """Writes JSON atomically: the file is either complete or absent."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(value, indent=1) + "\n")
    beside.replace(path)


def machine() -> dict[str, object]:
    """Returns the hardware and versions that the figures depend on."""
    import torch

    def said(*words: str) -> str:
        try:
            return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    commit = said("git", "rev-parse", "HEAD")
    return {"card": card, "driver": driver, "torch": torch.__version__, "cuda": torch.version.cuda, "commit": commit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("minutes", type=float)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if not args.minutes > 0.5:
        parser.error(f"{args.minutes} minutes: wants more than half a minute")
    session, here = Session(args.out, args.minutes, args.tiny), machine()
    if not args.tiny and here["card"] == "CPU":
        parser.error("there is no GPU; --tiny runs all of this on the CPU, at sizes for it")
    # One machine per folder: otherwise one table would mix figures of two.
    known = args.out / "machine.json"
    if known.exists() and (held := json.loads(known.read_text())) != here:
        differing = ", ".join(f"{k}: {held.get(k)} there, {here[k]} here" for k in here if held.get(k) != here[k])
        parser.error(f"{args.out} holds measurements of another machine or commit ({differing}); give another folder")
    write(known, here)
    for part in (session.tests, session.measurements, session.campaign):
        if session.left() > 5:
            print(f"{part.__name__}, {session.left():.0f} s left", flush=True)
            part()
    subprocess.run([sys.executable, str(HERE / "tables.py"), str(args.out)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
