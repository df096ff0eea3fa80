"""The command `odenets compare`: trains the cells of a comparison over several seeds, and reports the outcomes."""

import argparse
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn

from schemes import SchemeError

from ..config_files import check_files
from ..messages import closed_output, counted, fail
from ..names import closest
from ..packaged import experiments
from ..packaged import find as find_experiment
from ..training.sources import DataError
from .comparison import Comparison, Progress, carry_out
from .comparison_report import find, heading, print_report, table_of
from .values import assignment, seeds

TIP = "odenets compare --help shows how the command is used"
HELP = """usage: odenets compare FILE.yaml --over KEY=V1,V2 --dir DIR [--seeds 0..4] [--workers N] [--KEY VALUE ...]
       odenets compare report DIR [--out FOLDER] [--baseline CELL] [--metric NAME] [--target VALUE]

Trains an experiment once for each choice of values and each seed, and compares the runs. Runs that have ended are not
trained again: the same command continues where it was stopped, also with more seeds or more values.

  --over KEY=V1,V2   an option and its values; commas inside brackets and quotes belong to a value. Given several times,
                     it makes all combinations. The first values make up the baseline.
  --seeds 0..4       both ends included; or 0,1,7 (0..4)
  --dir DIR          each run has a folder in it; DIR/runs.sqlite has a row for each that has ended
  --workers N        processes (1); 0 trains in this one
  --address ADDRESS  a running Ray cluster, or auto, in place of processes
  --gpus SHARE       share of a GPU for each run, with --address
  --retry            train again what failed
  --KEY VALUE        any option of `odenets fit`, for all runs

  odenets compare quickstart --over model.net.scheme=euler,midpoint,rk4 --seeds 0..4 --dir runs/digits
  odenets compare report runs/digits
"""
FLAGS = ("--retry",)
TAKE_VALUE = ("--over", "--seeds", "--dir", "--workers", "--address", "--gpus")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are two lines."""

    def error(self, message: str) -> NoReturn:
        fail(message, TIP)


def _own(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits the words into those of this command and, in order, all others, which are those of `fit`."""
    ours: list[str] = []
    others: list[str] = []
    take = False
    for word in words:
        name = word.partition("=")[0]
        if take or name in (*FLAGS, *TAKE_VALUE):
            ours.append(word)
            # The word after an option that takes a value is that value, whatever it looks like; after `--seeds=0..4`
            # there is none to take.
            take = not take and name in TAKE_VALUE and "=" not in word
        else:
            others.append(word)
    return ours, others


def run(words: Sequence[str]) -> None:
    """Runs one command line; errors that the user can fix end in two lines and exit status 2."""
    try:
        if not words or words[0] == "help" or {"-h", "--help"} & set(words):
            print(HELP, end="")
        elif words[0] == "report":
            _report(words[1:])
        else:
            _train(words)
    except (SchemeError, DataError) as error:
        fail(str(error), TIP)
    except BrokenPipeError:
        closed_output()


def _report(words: Sequence[str]) -> None:
    parser = _Parser(prog="odenets compare report", allow_abbrev=False, add_help=False)
    parser.add_argument("path")
    parser.add_argument("--out")
    parser.add_argument("--baseline")
    parser.add_argument("--metric", default="val/acc")
    parser.add_argument("--target", type=float)
    options = parser.parse_args(list(words))
    if options.target is not None and not math.isfinite(options.target):
        raise SchemeError(f"--target {options.target} is no finite number\n  Give a value of --metric: --target 0.9")
    print_report(options.path, options.out, options.metric, options.baseline, options.target)


def parser() -> argparse.ArgumentParser:
    """The options of this command alone; all others are those of `fit`."""
    found = _Parser(prog="odenets compare", allow_abbrev=False, add_help=False)
    found.add_argument("--over", action="append", default=[])
    found.add_argument("--seeds", default="0..4")
    found.add_argument("--dir")
    found.add_argument("--workers", type=int, default=1)
    found.add_argument("--address")
    found.add_argument("--gpus", type=float, default=0.0)
    found.add_argument("--retry", action="store_true")
    return found


def _options(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    ours, others = _own(words)
    return parser().parse_args(ours), others


def planned(words: Sequence[str]) -> tuple[Comparison, argparse.Namespace]:
    """Returns the comparison that a command line describes, and the options for carrying it out.

    Args:
        words: what follows ``odenets compare``.

    Raises:
        SchemeError: no experiment, no option that varies, no folder, or an invalid number.
    """
    options, others = _options(words)
    experiment, *overrides = others or [""]
    if not Path(experiment).is_file():
        experiment = str(find_experiment(experiment) or experiment)
    if not experiment.endswith((".yaml", ".yml")) or not Path(experiment).is_file():
        near = closest(experiment, experiments(), cutoff=0.5)
        hint = f"Closest: {', '.join(near)}" if near else f"The first word names its file: {HELP.split(chr(10))[0][7:]}"
        raise SchemeError(f"there is no experiment {experiment!r}\n  {hint}")
    if not options.over or not options.dir:
        lacking = "--dir DIR" if options.over else "--over KEY=V1,V2"
        raise SchemeError(f"{lacking} is not given\n  {TIP}.")
    if options.workers < 0 or options.gpus < 0:
        raise SchemeError(f"--workers {options.workers}, --gpus {options.gpus:g}: wanted 0 or more\n  {TIP}.")
    # Processes are assigned the GPUs of this machine in turn; only Ray divides one.
    if options.gpus and options.address is None:
        raise SchemeError(
            f"--gpus {options.gpus:g} is a share for runs on a Ray cluster, and --address is not given\n"
            "  Give --address auto too, or leave --gpus out."
        )
    over: dict[str, list[str]] = {}
    for text in options.over:
        key, values = assignment(text)
        if key in over:
            raise SchemeError(f"--over {key} is given twice\n  Write all of its values behind one: --over {key}=V1,V2")
        over[key] = values
    seed_list = seeds(options.seeds)
    check_files([experiment, *overrides])
    threads = None
    # Several processes that each take all cores slow each other down. A user who sets OMP_NUM_THREADS has decided
    # already, and Ray is told the cores of a run.
    if options.workers > 1 and options.address is None and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, (os.cpu_count() or 1) // options.workers)
    return Comparison(experiment, over, seed_list, Path(options.dir), overrides, threads), options


@contextmanager
def _terminable() -> Iterator[None]:
    """Makes SIGTERM end this process in an orderly way, as Ctrl-C does."""

    def stop(signum: int, frame: Any) -> None:
        # An exception, so that `finally` blocks run: the workers are told to stop, and waited for.
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _train(words: Sequence[str]) -> None:
    comparison, options = planned(words)
    # Before the file is made: a comparison that cannot be trained leaves nothing behind.
    comparison.check()
    # Seeds and cells, which are the plan, may be added later; all other settings must stay the same.
    with comparison.open_store() as store, _terminable():
        runs = comparison.runs()
        if options.retry:
            failed = store.forget_failed([run.name for run in runs])
            print(f"trained again: {counted(failed, 'failed run')}", flush=True)
        left = len(runs) - len({run.name for run in runs} & store.done())
        cells, seeds = counted(len(comparison.cells()), "cell"), counted(len(comparison.seeds), "seed")
        print(f"{cells}, {seeds}: {counted(left, 'run')} to do", flush=True)
        done = len(runs) - left
        began, stopped = time.monotonic(), 0
        who = {"workers": options.workers, "address": options.address, "gpus": options.gpus}
        try:
            # A generator that is merely dropped ends its workers only when it is collected.
            with closing(carry_out(comparison, store, **who)) as progress:
                for p in progress:
                    stopped += p.outcome is None
                    # From the runs of this call alone. If a signal stopped one, none of them may have ended yet, hence
                    # the 1.
                    left = (time.monotonic() - began) / max(1, p.done - done) * (p.total - p.done) / 60
                    print(_line(p, left), flush=True)
        except KeyboardInterrupt:
            stopped += 1
        failed = store.failed()
    # Read from the folder again, so that what is printed here is what `report` prints.
    found = find(comparison.folder)
    print(f"\n# {heading(found)}\n\n{table_of(found)}")
    if failed:
        print(f"{counted(failed, 'run')} failed: --retry trains again; what was said is in {comparison.folder}/*/*.log")
    print(f"odenets compare report {comparison.folder}")
    if stopped:
        # 130 is a shell's status for Ctrl-C: a script can tell it from a failure.
        fail("stopped before all runs had ended; what they have is kept", "The same command goes on", 130)


def _line(p: Progress, minutes: float) -> str:
    if p.outcome is None:
        return f"{p.done}/{p.total} {p.run.name}: stopped by a signal; it goes on next time"
    last = p.outcome.epochs[-1] if p.outcome.epochs else {}
    shown = [f"{name} {last[name]:.4g}" for name in ("val/acc", "val/loss", "train/loss") if name in last]
    what = ", ".join(shown) if p.outcome.status == "trained" else p.outcome.error
    return f"{p.done}/{p.total} {p.run.name} {p.outcome.status}: {what}; {minutes:.0f} min left"
