"""The command `odenets study run|report|sample`: trains random networks, compares them, shows what would be trained."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

# Imported first: it names the extra that is missing, where the imports below would only name a module.
from ..training import needed as needed

# isort: split
from jsonargparse import ArgumentParser, Namespace

from schemes import SchemeError

from ..config_files import CheckedParser, check_files, refusal
from ..messages import TIP, closed_output, explain, fail
from ..packaged import with_files
from ..training.sources import DataError
from . import engine, report
from .store import Store
from .train import Study

HELP = "odenets study run --help lists every option"


class StudyParser(CheckedParser, ArgumentParser):
    """A parser whose errors are two lines."""

    command_line: Sequence[str] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if (own := refusal(ex)) is not None:
            fail(str(own), HELP)
        # An error inside a subcommand carries that subcommand's parser, whose options resemble a misspelt one.
        names = [action.dest for action in (getattr(ex, "subcommand_parser", None) or self)._actions]
        first, second = explain(message, self.command_line, names)
        fail(first, HELP if second == TIP else second)


def parser() -> ArgumentParser:
    """The options of all subcommands."""
    with_study = []
    for name, text in (("run", "Train the networks that the file lacks."), ("sample", "Show what would be trained.")):
        sub = StudyParser(prog=f"odenets study {name}", description=text)
        sub.add_argument("-c", "--config", action="config", help="YAML with the options below.")
        sub.add_class_arguments(Study, "study")
        sub.add_argument("--store", type=str, default="runs/study.sqlite", help="The SQLite file, one row per network.")
        sub.add_argument("--workers", type=int | None, default=None, help="Processes; 0 trains here; null: by cores.")
        sub.add_argument("--address", type=str | None, default=None, help="A running Ray cluster, or auto.")
        sub.add_argument("--retry", type=bool, default=False, help="Train again what failed.")
        with_study.append((name, sub))
    found = StudyParser(prog="odenets study")
    commands = found.add_subcommands()
    for name, sub in with_study:
        commands.add_subcommand(name, sub)
    sub = StudyParser(prog="odenets study report", description="Compare what a study's file holds, at any time.")
    sub.add_argument("store", type=str, help="The file of a study.")
    sub.add_argument("--out", type=str | None, default=None, help="Folder for the figures; none without it.")
    commands.add_subcommand("report", sub)
    return found


def run(args: Sequence[str]) -> None:
    """Runs one command line; errors that the user can fix end in two lines and exit status 2."""
    try:
        # On the class: whichever subcommand's parser fails needs the whole command line.
        StudyParser.command_line = args = with_files(args)
        check_files(args)
        options = parser().parse_args(list(args))
        if options.subcommand == "report":
            report.print_report(options.report.store, options.report.out)
        else:
            chosen = options[options.subcommand]
            study = Study(**vars(chosen.study.clone()))
            if options.subcommand == "sample":
                _show(study)
            else:
                _train(study, chosen)
    except (SchemeError, DataError) as error:
        fail(str(error), HELP)
    except BrokenPipeError:
        closed_output()


def _show(study: Study) -> None:
    found = study.candidates(study.data().num_classes)
    print("number scheme order depth middle width kernel activation norm augment params macs")
    for c in found:
        augment = f"{c.augment}={c.strength:g}" if c.augment else "-"
        print(
            *(c.number, c.scheme, c.order, c.depth, c.middle, c.width, c.kernel, c.activation, c.norm, augment),
            *(c.params, c.macs),
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences Lightning's messages about each training."""
    # Lightning's two halves log under separate names.
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _train(study: Study, options: Namespace) -> None:
    with _quiet(), Store(options.store, study.settings) as store:
        if options.retry:
            print(f"{store.forget_failed()} failed networks are trained again", flush=True)
        start = time.monotonic()
        try:
            ended = engine.run(study, store, workers=options.workers, address=options.address)
            for count, p in enumerate(ended, 1):
                c, r = p.candidate, p.result
                # From the networks of this run alone: those of earlier runs took none of its time.
                left = (time.monotonic() - start) / count * (p.total - p.done) / 60
                what = f"accuracy {r.accuracy:.3f}" if r.accuracy is not None else r.error
                print(
                    f"{p.done}/{p.total} #{c.number} {c.scheme} {c.order} {r.status}: {what}; {left:.0f} min left",
                    flush=True,
                )
        except KeyboardInterrupt:
            pass  # what is recorded stays
        done, failed = len(store.done()), store.failed()
    if failed:
        print(f"{failed} networks failed; --retry true trains them again")
    print(f"{done} networks in {options.store}; the same command goes on where it stopped.")
    print(f"odenets study report {options.store} --out FOLDER")
