"""Fuzzes the text parsers and file readers, which may raise nothing but their documented error.

    python experiments/benchmarks/fuzz.py                      # 100,000 texts, 5,000 files of each kind
    python experiments/benchmarks/fuzz.py --minutes 5          # as many of them as five minutes allow
    python experiments/benchmarks/fuzz.py --texts 2000 --files 200 --seed 1

Texts are examples of every scheme, step size and mode of backpropagation in which parts are replaced, repeated, dropped
or turned into numbers that are too large, too small or invalid; a fifth consists of random words and signs. Files are
valid checkpoints, pictures and configurations in which bytes are changed, cut off or repeated. Each input may take a
second of processor time and 100 MB, measured. An input that takes more, or raises an error other than the documented
one, is printed at once. One that does not finish is stopped after ten seconds of processor time.

Input n of a kind depends only on the seed, the kind and n, so `--only KIND:n` reproduces what was found. All kinds
advance together, so that a run that is stopped (by its minutes, Ctrl-C or SIGTERM) has tried the same share of each; it
still ends with the table of what was tried.
"""

import argparse
import io
import random
import re
import resource
import signal
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import nn

import schemes
from odenets import checkpoints
from odenets.backprop import parse_mode
from odenets.config_files import check_file
from odenets.training.decode import Picture, Unreadable
from schemes.errors import SchemeError
from schemes.step_size import step_size

NUMBERS = (
    *("0", "-1", "1", "2", "3", "1/2", "1e400", "-1e-400", "999999999999", "0.1", "nan", "inf", "1/0", "2**99", "1_0"),
    *("None", "true", "'rk4'", "[1]", "(1, 2)", "()", "1j", "0x10", "²", "1e", "1.5.2"),
)
SIGNS = (*'()*-/=.[]{}:"\\\n \x00é', ", ", " + ", "**")
MODES = (
    *(
        "store",
        "offload",
        "checkpoint",
        "checkpoint(4)",
        "reverse",
        "reverse(every=8)",
        "reverse(memory=2GiB)",
        "exact",
    ),
    *("exact(bits=10)", "exact(store=true)", "4*store + 8*reverse", "auto", "auto(memory=2GB)", "auto(share=1/4)"),
)
STEPS = ("1", "0.5", "learned", "decay(0.5)", "error(1e-3)", "1/3", "learned(0.5)")
SECONDS, MEGABYTES = 1.0, 100.0
STOP = 10.0  # seconds of processor time after which an input is given up
MOST = 8 << 30  # bytes of the whole process: an input that wants more gets a MemoryError and spares the machine
SHOW = 10.0  # seconds between two lines of progress


def mutated(text: str, words: Sequence[str], draw: random.Random) -> str:
    """Returns the text with one number replaced, or one to four parts replaced, repeated, dropped or extended."""
    places = [m.span() for m in re.finditer(r"\d+(\.\d+)?", text)]
    if places and draw.random() < 0.4:
        # Most of these are still valid texts, so that the objects they describe are constructed.
        a, b = draw.choice(places)
        return text[:a] + draw.choice((*NUMBERS, str(draw.randrange(40)), str(10 ** draw.randrange(12)))) + text[b:]
    for _ in range(draw.randint(1, 4)):
        a, b = sorted(draw.randrange(len(text) + 1) for _ in range(2))
        b = min(b, a + draw.choice((1, 2, 5, 40)))
        kind = draw.randrange(5)
        middle = text[a:b]
        if kind == 0:
            middle = draw.choice(words)
        elif kind == 1:
            middle = middle * draw.choice((2, 3, 200))
        elif kind == 2:
            middle = ""
        elif kind == 3:
            middle += draw.choice(NUMBERS)
        else:
            middle = f"{draw.choice(words)}({text[a:b]}"
        text = text[:a] + middle + text[b:]
        if len(text) > 20_000:
            text = text[:20_000]
    return text


def languages() -> dict[str, tuple[Callable[[str], object], list[str]]]:
    """The parsers of texts, each with valid texts."""
    return {
        "schemes": (schemes.get, [str(s) for s in schemes.examples()]),
        "step sizes": (step_size, list(STEPS)),
        "modes": (parse_mode, list(MODES)),
    }


class Endless(BaseException):
    """An input was given up; no reader catches it as one of its own errors."""


class Kind:
    """One kind of input: how the n-th is drawn and read, and statistics of the attempts.

    Args:
        name: name of the kind.
        count: how many inputs are to be tried.
        make: draws the n-th input from a generator.
        read: reads an input, or raises.
        documented: the error that it may raise.
    """

    def __init__(
        self,
        name: str,
        count: int,
        make: Callable[[int, random.Random], tuple[str, Any]],
        read: Callable[[Any], object],
        documented: type[Exception],
    ):
        self.name, self.count, self.make, self.read, self.documented = name, count, make, read, documented
        self.tried = self.taken = self.wrong = 0
        self.slowest = self.largest = 0.0

    def attempt(self, n: int, seed: int) -> str:
        """Reads input n once; returns what went wrong, or an empty string.

        Records the time it took and its peak memory.
        """
        shown, given = self.make(n, random.Random(f"{seed} {self.name} {n}"))
        tracemalloc.reset_peak()
        before, began, wrong = tracemalloc.get_traced_memory()[0], time.process_time(), ""
        signal.setitimer(signal.ITIMER_PROF, STOP)
        try:
            self.read(given)
            self.taken += 1
        except self.documented as error:
            if str(error).count("\n") > 1:
                wrong = f"more than two lines: {error}"
        except (Exception, Endless) as error:
            wrong = f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        took, held = time.process_time() - began, (tracemalloc.get_traced_memory()[1] - before) / 1e6
        self.slowest, self.largest = max(self.slowest, took), max(self.largest, held)
        if not wrong and (took > SECONDS or held > MEGABYTES):
            wrong = f"{took:.2f} s, {held:.1f} MB"
        self.tried += 1
        self.wrong += bool(wrong)
        return wrong and f"{self.name}:{n} {shown!r:.200}: {wrong}"

    def row(self) -> str:
        """Its row of the table."""
        figures = f"{self.tried:,} | {self.taken:,} | {self.wrong:,} | {self.slowest:.2f} | {self.largest:.1f}"
        return f"| {self.name} | {figures} |"


def text_kinds(count: int) -> Iterator[Kind]:
    """Yields random texts for each parser."""
    words = (*schemes.names(), *NUMBERS, *SIGNS, "repeat(", "nested(", "decay(", "reverse(", "auto(memory=")
    for name, (read, examples) in languages().items():

        def make(n: int, draw: random.Random, examples: Sequence[str] = examples) -> tuple[str, str]:
            if n % 5 == 0:
                text = "".join(draw.choice(words) for _ in range(draw.randint(0, 30)))
            else:
                text = mutated(draw.choice(examples), words, draw)
            return text, text

        yield Kind(name, count if name == "schemes" else count // 10, make, read, SchemeError)


def damaged(whole: bytes, draw: random.Random) -> bytes:
    """Returns the bytes with some of them changed, cut off, or repeated."""
    data = bytearray(whole)
    for _ in range(draw.choice((1, 1, 4, 30))):
        place = draw.randrange(len(data)) if draw.random() < 0.5 else draw.randrange(min(len(data), 900))
        kind = draw.randrange(6)
        if kind == 0:
            del data[place : place + draw.choice((1, 4, 100, 10**6))]
        elif kind == 1:
            data[place:place] = data[place : place + draw.choice((1, 8, 100))]
        elif kind == 2:
            data[place : place + 4] = draw.choice((b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x7f\xff\xff\xff"))
        else:
            data[place] = draw.randrange(256)
        if not data:
            break
    return bytes(data)


def pictures(draw: random.Random) -> dict[str, bytes]:
    """Returns a picture in each format."""
    levels = np.random.default_rng(draw.randrange(2**31)).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    found = {}
    for name, mode in (("PNG", "RGBA"), ("JPEG", "RGB"), ("GIF", "P"), ("TIFF", "L"), ("WEBP", "RGB"), ("BMP", "RGB")):
        stream = io.BytesIO()
        Image.fromarray(levels).convert(mode).save(stream, name)
        found[name] = stream.getvalue()
    return found


def checkpoint_files(folder: Path) -> dict[str, bytes]:
    """Returns a checkpoint in each format."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    checkpoints.save(net, folder / "w.safetensors")
    torch.save({"state_dict": net.state_dict()}, folder / "w.pth")
    torch.save({"state_dict": net.state_dict()}, folder / "old.pth", _use_new_zipfile_serialization=False)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def load_twice(path: Path) -> None:
    """Loads a checkpoint into a network; a rejected one must leave the network unchanged."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    try:
        checkpoints.load(net, path)
    except SchemeError:
        if any(not torch.equal(v, before[k]) for k, v in net.state_dict().items()):
            raise RuntimeError("a refused file has changed the network") from None
        raise


def file_kinds(count: int, folder: Path, draw: random.Random) -> Iterator[Kind]:
    """Yields damaged files for each reader."""
    experiments = Path(__file__).resolve().parents[1]
    configurations = {p.name: p.read_bytes() for p in sorted(experiments.glob("*.yaml"))}
    (folder / "whole").mkdir()
    kinds: dict[str, tuple[dict[str, bytes], Callable[[Path], object], type[Exception]]] = {
        "checkpoints": (checkpoint_files(folder / "whole"), load_twice, SchemeError),
        "pictures": (pictures(draw), lambda path: Picture(path).whole(), Unreadable),
        "configurations": (configurations, check_file, SchemeError),
    }
    for kind, (whole, read, documented) in kinds.items():

        def make(n: int, draw: random.Random, whole: dict[str, bytes] = whole) -> tuple[str, Path]:
            name = draw.choice([*whole])
            data = damaged(whole[name], draw)
            path = folder / f"damaged{Path(name).suffix or '.bin'}"
            path.write_bytes(data)
            return f"{name} {data[:60]!r}", path

        yield Kind(kind, count, make, read, documented)


def run(kinds: Sequence[Kind], seed: int, minutes: float) -> bool:
    """Tries inputs of all kinds, always of the kind least far along; returns whether all were tried."""
    end, show = time.monotonic() + minutes * 60, time.monotonic() + SHOW
    while left := [kind for kind in kinds if kind.tried < kind.count]:
        if (now := time.monotonic()) > end:
            return False
        if now > show:
            show = now + SHOW
            # To stderr, since the table may be redirected into a file.
            done = ", ".join(f"{kind.name} {kind.tried:,}" for kind in kinds if kind.count)
            share = sum(kind.tried for kind in kinds) / sum(kind.count for kind in kinds)
            wrong = sum(kind.wrong for kind in kinds)
            print(f"{share:4.0%}: {done}; {wrong} wrong", file=sys.stderr, flush=True)
        kind = min(left, key=lambda kind: kind.tried / kind.count)
        if wrong := kind.attempt(kind.tried, seed):
            print(wrong, flush=True)
    return True


def guard() -> None:
    """Limits time and memory of inputs, and makes Ctrl-C and SIGTERM end the run with its table."""

    def endless(signum: int, frame: Any) -> NoReturn:
        raise Endless(f"stopped after {STOP:g} s")

    def interrupt(signum: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGPROF, endless)
    for signum in (signal.SIGINT, signal.SIGTERM):  # SIGINT too: a background process may have it ignored
        signal.signal(signum, interrupt)
    resource.setrlimit(resource.RLIMIT_DATA, (MOST, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--files", type=int, default=5_000)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="KIND:n", help="one input, as it was drawn with this seed")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    guard()
    tracemalloc.start(1)
    with tempfile.TemporaryDirectory() as scratch:
        kinds = [
            *text_kinds(options.texts),
            *file_kinds(options.files, Path(scratch), random.Random(options.seed)),
        ]
        if options.only:
            name, _, n = options.only.rpartition(":")
            wrong = next(kind for kind in kinds if kind.name == name).attempt(int(n), options.seed)
            raise SystemExit(wrong or 0)
        try:
            whole = run(kinds, options.seed, options.minutes)
        except KeyboardInterrupt:
            whole = False
        print("| input | tried | taken | wrong | slowest s | most MB |\n|---|--:|--:|--:|--:|--:|")
        for kind in kinds:
            print(kind.row())
    if any(kind.wrong for kind in kinds):
        raise SystemExit(1)
    if not whole:
        print(f"not all of {sum(kind.count for kind in kinds):,} were tried", file=sys.stderr)


if __name__ == "__main__":
    main()
