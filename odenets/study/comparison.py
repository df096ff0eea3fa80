"""Comparisons: one experiment over several option values and seeds, each run in a folder of its own.

A comparison is the product of cells and seeds. A cell is one choice of a value for each option that varies. Everything
else is the same for all runs; the comparison's file enforces this by refusing settings that it was not begun with.
"""

import importlib
import itertools
import json
import os
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from schemes import SchemeError

from ..config_files import flat
from ..training.command import resolve
from ..training.options import HARMLESS, short_name
from .runs import ROOT, RUNS, Cost, Outcome, Run, train
from .store import Store
from .values import folder_name
from .workers import by_processes, by_ray, check_workers, here

FILE = "runs.sqlite"  # in a comparison's folder
# Options that a comparison sets itself, and its own option that controls each.
OWN = {
    "run_dir": "--dir",
    "seed_everything": "--seeds",
    "ckpt_path": "no option: runs that have begun go on by themselves",
}
SILENT = ("trainer.fast_dev_run", "trainer.barebones")  # under these a run logs nothing


@dataclass(frozen=True)
class Comparison:
    """The runs of a comparison, and how each is made.

    Args:
        experiment: the YAML file.
        over: the options that vary, with their values; the first value of each makes up the first cell.
        seeds: seeds of every cell.
        folder: the folder for all output.
        overrides: further words of the command line, for all runs.
        threads: CPU threads of a run if neither the file nor the command line sets them; None leaves torch's choice.
    """

    experiment: str
    over: Mapping[str, Sequence[str]]
    seeds: Sequence[int]
    folder: Path
    overrides: Sequence[str] = ()
    threads: int | None = None

    def __post_init__(self) -> None:
        given = [word[2:].partition("=")[0] for word in self.overrides if word.startswith("--")]
        # An option has two spellings, model.net.scheme and model.init_args.net.init_args.scheme.
        for name in map(short_name, (*given, *self.over)):
            if name in OWN:
                raise SchemeError(f"{name} is not for you to set in a comparison\n  It is set by {OWN[name]}.")
        varies = list(map(short_name, self.over))
        for name in given:
            if short_name(name) in varies:
                raise SchemeError(
                    f"{short_name(name)} is given both by --over and by --{name}\n  Leave one of them out."
                )
        for key, name in zip(self.over, varies, strict=True):
            if varies.count(name) > 1:
                raise SchemeError(
                    f"--over {key} is given twice, in two spellings\n  Write all of its values behind --over {name}="
                )

    def cells(self) -> dict[str, dict[str, str]]:
        """Maps each cell's name to its options; the first option varies slowest."""
        # Names are for readers and folders: the last part of an option is enough if no other option ends in it.
        tails = [key.rpartition(".")[2] for key in self.over]
        short = {key: tail if tails.count(tail) == 1 else key for key, tail in zip(self.over, tails, strict=True)}
        found = {}
        for values in itertools.product(*self.over.values()):
            options = dict(zip(self.over, values, strict=True))
            found[", ".join(f"{short[key]}={value}" for key, value in options.items())] = options
        return found

    def runs(self) -> list[Run]:
        """Returns all runs, seed by seed: whatever stops them, most seeds have run in every cell or in none."""
        return [
            Run(f"{cell}, seed {seed}", cell, seed, options)
            for seed in self.seeds
            for cell, options in self.cells().items()
        ]

    def words(self, options: Mapping[str, str] | None = None) -> list[str]:
        """Returns the command line that all runs share, or that the runs of a cell share.

        Args:
            options: options of the cell; None for what all runs share.
        """
        words = ["fit", "-c", str(Path(self.experiment).absolute()), *self.overrides]
        return words + [f"--{key}={value}" for key, value in (options or {}).items()]

    def words_of(self, run: Run) -> list[str]:
        """Returns the command line of a run.

        Args:
            run: the run.
        """
        # Appended, so that the experiment's own callbacks stay.
        cost = f"--trainer.callbacks+={Cost.__module__}.{Cost.__name__}"
        own = [f"--seed_everything={run.seed}", f"--run_dir={folder_of(self.folder, run)}", cost]
        if self.threads is not None and self._config.get("threads") is None and "threads" not in run.options:
            own.append(f"--threads={self.threads}")
        return [*self.words(run.options), *own]

    @cached_property
    def _config(self) -> dict[str, Any]:
        return resolve(self.words(), "odenets")

    @property
    def cores(self) -> int:
        """The most cores that a run uses, as far as the options say."""
        return max(config.get("threads") or self.threads or 1 for config in self._configs.values())

    @cached_property
    def _configs(self) -> dict[str, dict[str, Any]]:
        return {cell: resolve(self.words(options), "odenets") for cell, options in self.cells().items()}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What determines the results: the settings that all runs share and, as "plan", the runs.

        For each cell, the plan has its options as they were typed, its seeds and, as "config", what the options mean:
        the values of the cell's configuration that not all runs share, each as JSON.
        """
        base = _texts(self._config)
        shared = {
            short_name(name): value
            for name, value in flat(self._config).items()
            if not self._varies(short_name(name)) and not _harmless(short_name(name))
        }
        plan = {}
        for cell, options in self.cells().items():
            config = _texts(self._configs[cell])
            own = {
                name: config.get(name, "")  # "": an option that this cell does not have
                for name in {**base, **config}
                if self._varies(name) or (config.get(name) != base.get(name) and not _harmless(name))
            }
            plan[cell] = {"options": options, "seeds": list(self.seeds), "config": own}
        # The file's name alone: moved to another place, it is the same experiment.
        return {"experiment": Path(self.experiment).name, "over": list(self.over), **shared, "plan": plan}

    def open_store(self) -> Store[Run, Outcome]:
        """Returns the file of this comparison, which refuses other settings once a run has begun; a context manager."""
        return Store(
            self.folder / FILE,
            self.settings,
            RUNS,
            growing=("plan",),
            check=lambda settings: check_plan(settings["plan"]),
            begun=lambda: any(path.is_dir() for path in self.folder.glob("*/seed-*")),
        )

    def _varies(self, name: str) -> bool:
        return any(name == option or name.startswith(f"{option}.") for option in map(short_name, self.over))

    def check(self) -> None:
        """Refuses a cell that cannot be trained, before any run is.

        Raises:
            SchemeError: an option or a value that does not exist, a net that refuses its arguments, or runs that log
                nothing (the cell is named); two cells that mean the same.
        """
        for cell, config in self._configs.items():
            try:
                _build(config.get("model", {}).get("init_args", {}).get("net"))
            except SchemeError as error:
                first, *rest = str(error).splitlines()
                raise SchemeError("\n".join([f"{cell}: {first}", *rest])) from None
            given = flat(config)
            for name in SILENT:
                if given.get(name):
                    raise SchemeError(f"{cell}: under {name} nothing is logged to be compared\n  Leave {name} out.")
        check_plan(self.settings["plan"])


def check_plan(plan: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses two spellings of one value, such as 0.1 and 1e-1: they would be trained twice and compared.

    Args:
        plan: the "plan" in the settings of a comparison.

    Raises:
        SchemeError: two cells mean the same.
    """
    meant: dict[str, str] = {}
    for cell, about in plan.items():
        meaning = json.dumps(about["config"], sort_keys=True)
        if meaning in meant:
            raise SchemeError(f"{meant[meaning]} and {cell} mean the same\n  Leave one of them out.")
        meant[meaning] = cell


def _harmless(name: str) -> bool:
    """Whether an option leaves all figures unchanged, or is what distinguishes the runs of a cell."""
    return name in (*OWN, ROOT) or HARMLESS.fullmatch(name) is not None


def _texts(config: Mapping[str, Any]) -> dict[str, str]:
    """Maps the short names of all options to their values as JSON, in which 1, 1.0 and true differ."""
    return {short_name(name): json.dumps(value, default=str) for name, value in flat(config).items()}


def folder_of(folder: Path, run: Run) -> Path:
    """Returns the folder of a run.

    Args:
        folder: folder of the comparison.
        run: the run.
    """
    return Path(folder) / folder_name(run.cell) / f"seed-{run.seed}"


def _build(config: Any) -> Any:
    """Builds a part of a configuration on the meta device; None if that needs what only a run knows."""
    if not isinstance(config, Mapping) or "class_path" not in config:
        return config
    arguments = {name: _build(value) for name, value in (config.get("init_args") or {}).items()}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module, _, name = config["class_path"].rpartition(".")
            return getattr(importlib.import_module(module), name)(**arguments)
        except SchemeError:
            raise
        except Exception:
            # The part may only lack what a run links to it, such as the number of classes. A SchemeError would be
            # raised in the run too.
            return None


class Progress(NamedTuple):
    """The progress of a comparison, reported after each run.

    Attributes:
        done: number of recorded runs, including those of earlier calls.
        total: number of runs in this call's plan.
        run: the run.
        outcome: its outcome; None if a signal stopped it.
    """

    done: int
    total: int
    run: Run
    outcome: Outcome | None


def carry_out(
    comparison: Comparison,
    store: Store[Run, Outcome],
    *,
    workers: int = 1,
    address: str | None = None,
    gpus: float = 0.0,
) -> Generator[Progress, None, None]:
    """Trains the runs that the store lacks; records and then yields each as soon as it has ended.

    Args:
        comparison: defines the runs.
        store: an open store; runs that it holds are skipped.
        workers: number of processes; 0 trains in this process, one run after the other.
        address: address of a running Ray cluster, of which at most ``workers`` workers are used; they see the folder,
            the file and the pictures under the same paths.
        gpus: GPUs per run, under Ray; a fraction lets several runs share one.

    Raises:
        SchemeError: fewer than 0 workers; or Ray is needed and is missing, or cannot be reached.
    """
    check_workers(workers)
    runs, done = comparison.runs(), store.done()
    left = [run for run in runs if run.name not in done]
    # Paths and words are made here: they can be sent to any worker, and none has to resolve the comparison again.
    work = partial(_work, {run.name: str(folder_of(comparison.folder, run)) for run in left}, _lines(comparison, left))
    if address is not None:
        results = by_ray(
            left,
            work,
            _failed,
            workers=workers or None,
            address=address,
            threads=comparison.cores,
            gpus=gpus,
            option="--gpus",
            otherwise="or leave --address out, and processes of this machine do the work",
            fresh=True,
        )
    elif workers == 0:
        results = here(left, work)
    else:
        preload = (__name__, "odenets.models", "odenets.training")
        results = by_processes(left, work, _failed, workers=workers, prepare=_take_gpu, preload=preload)
    finished = len(runs) - len(left)
    with closing(results):
        for run, outcome in results:
            if outcome is not None:
                store.add(run, outcome)
                finished += 1
            elif workers == 0:
                # The run had this process to itself, so the signal was meant for the command.
                raise KeyboardInterrupt
            yield Progress(finished, len(runs), run, outcome)


def _lines(comparison: Comparison, runs: Sequence[Run]) -> dict[str, list[str]]:
    return {run.name: comparison.words_of(run) for run in runs}


def _work(folders: Mapping[str, str], lines: Mapping[str, list[str]], run: Run) -> Outcome | None:
    return train(run, folders[run.name], lines[run.name])


def _failed(error: str) -> Outcome:
    return Outcome("failed", error=error)


def _take_gpu(place: int) -> None:
    """Assigns a process one of the GPUs, in turn; several processes share one if there are fewer GPUs."""
    # Counting does not initialise CUDA, which therefore still reads the variable set here.
    count = torch.cuda.device_count()
    if count > 1:
        # The GPUs that are visible already, by their own names: on a shared machine these need not begin at 0.
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = [name for name in seen.split(",") if name] or [str(n) for n in range(count)]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[place % len(names)]
