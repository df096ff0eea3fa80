"""Random texts for the language, and damaged files for all that reads files: nothing but the documented error.

    python experiments/benchmarks/fuzz.py                      # 100,000 texts, 5,000 files of each kind
    python experiments/benchmarks/fuzz.py --texts 2000 --files 200 --seed 1

Texts are examples of every scheme, step size and mode of backpropagation in which parts are exchanged, doubled, dropped
or replaced by numbers that are too large, too small or none; a fifth is made of random words and signs. Files are whole
checkpoints, pictures and configurations in which bytes are changed, cut off or repeated. Each text may take a second
of processor time and 100 MB, measured; whoever takes more, or raises another error than the documented one, is printed.
"""

import argparse
import io
import random
import re
import tempfile
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

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


def mutated(text: str, words: Sequence[str], draw: random.Random) -> str:
    """The text with a number exchanged, or one to four parts exchanged, doubled, dropped, or given a number."""
    places = [m.span() for m in re.finditer(r"\d+(\.\d+)?", text)]
    if places and draw.random() < 0.4:
        # Most of these are still texts of the language, so that what they mean is made.
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
    """What reads texts, each with texts that it takes."""
    return {
        "schemes": (schemes.get, [str(s) for s in schemes.examples()]),
        "step sizes": (step_size, list(STEPS)),
        "modes": (parse_mode, list(MODES)),
    }


class Record:
    """What was seen of one kind of input."""

    def __init__(self, what: str):
        self.what, self.count, self.taken = what, 0, 0
        self.slowest, self.largest = (0.0, ""), (0.0, "")
        self.wrong: list[str] = []
        self.errors: Counter[str] = Counter()

    def attempt(self, read: Callable[[], object], shown: str, documented: type[Exception]) -> None:
        """Reads once, and notes how long it took, how much memory it held at most, and what it raised."""
        self.count += 1
        tracemalloc.reset_peak()
        before, began = tracemalloc.get_traced_memory()[0], time.process_time()
        try:
            read()
            self.taken += 1
        except documented as error:
            if str(error).count("\n") > 1:
                self.wrong.append(f"{shown!r:.200}: more than two lines: {error}")
        except Exception as error:
            self.errors[type(error).__name__] += 1
            self.wrong.append(f"{shown!r:.200}: {type(error).__name__}: {str(error)[:200]}")
        took, held = time.process_time() - began, (tracemalloc.get_traced_memory()[1] - before) / 1e6
        self.slowest, self.largest = max(self.slowest, (took, shown[:200])), max(self.largest, (held, shown[:200]))
        if took > SECONDS or held > MEGABYTES:
            self.wrong.append(f"{shown!r:.200}: {took:.2f} s, {held:.1f} MB")

    def __str__(self) -> str:
        lines = [
            f"| {self.what} | {self.count:,} | {self.taken:,} | {len(self.wrong)} | {self.slowest[0]:.2f} | "
            f"{self.largest[0]:.1f} |"
        ]
        return "\n".join([*lines, *(f"    {text}" for text in self.wrong[:20])])


def fuzz_texts(count: int, draw: random.Random) -> list[Record]:
    """Random texts for each language."""
    found = []
    words = (*schemes.names(), *NUMBERS, *SIGNS, "repeat(", "nested(", "decay(", "reverse(", "auto(memory=")
    for what, (read, examples) in languages().items():
        record = Record(what)
        for n in range(count if what == "schemes" else count // 10):
            if n % 5 == 0:
                text = "".join(draw.choice(words) for _ in range(draw.randint(0, 30)))
            else:
                text = mutated(draw.choice(examples), words, draw)
            record.attempt(lambda read=read, text=text: read(text), text, SchemeError)
        found.append(record)
    return found


def damaged(whole: bytes, draw: random.Random) -> bytes:
    """The bytes with some changed, cut off, or repeated."""
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
    """One picture in each format."""
    levels = np.random.default_rng(draw.randrange(2**31)).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    found = {}
    for name, mode in (("PNG", "RGBA"), ("JPEG", "RGB"), ("GIF", "P"), ("TIFF", "L"), ("WEBP", "RGB"), ("BMP", "RGB")):
        stream = io.BytesIO()
        Image.fromarray(levels).convert(mode).save(stream, name)
        found[name] = stream.getvalue()
    return found


def checkpoint_files(folder: Path) -> dict[str, bytes]:
    """One checkpoint in each format."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    checkpoints.save(net, folder / "w.safetensors")
    torch.save({"state_dict": net.state_dict()}, folder / "w.pth")
    torch.save({"state_dict": net.state_dict()}, folder / "old.pth", _use_new_zipfile_serialization=False)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def load_twice(path: Path) -> None:
    """Loads a checkpoint into a network, which a refusal leaves as it was."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    try:
        checkpoints.load(net, path)
    except SchemeError:
        if any(not torch.equal(v, before[k]) for k, v in net.state_dict().items()):
            raise RuntimeError("a refused file has changed the network") from None
        raise


def fuzz_files(count: int, draw: random.Random) -> list[Record]:
    """Damaged files for each reader."""
    found = []
    experiments = Path(__file__).resolve().parents[1]
    configurations = {p.name: p.read_bytes() for p in sorted(experiments.glob("*.yaml"))}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "whole").mkdir()
        kinds: dict[str, tuple[dict[str, bytes], Callable[[Path], object], type[Exception]]] = {
            "checkpoints": (checkpoint_files(folder / "whole"), load_twice, SchemeError),
            "pictures": (pictures(draw), lambda path: Picture(path).whole(), Unreadable),
            "configurations": (configurations, check_file, SchemeError),
        }
        for what, (whole, read, documented) in kinds.items():
            record = Record(what)
            for _ in range(count):
                name = draw.choice([*whole])
                data = damaged(whole[name], draw)
                path = folder / f"damaged{Path(name).suffix or '.bin'}"
                path.write_bytes(data)
                record.attempt(lambda read=read, path=path: read(path), f"{name} {data[:60]!r}", documented)
            found.append(record)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--files", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tracemalloc.start(1)
    records = [*fuzz_texts(options.texts, draw), *fuzz_files(options.files, draw)]
    print("| input | tried | taken | wrong | slowest s | most MB |\n|---|---|---|---|---|---|")
    for record in records:
        print(record)
    if any(record.wrong for record in records):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
