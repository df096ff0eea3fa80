"""The command line behind `odenets.cli`: Lightning's, with short errors, one folder per run and safe resuming."""

import argparse
import errno
import logging
import os
import re
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import lightning as L
import torch
import yaml
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.io import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BasePredictionWriter,
    BatchSizeFinder,
    Callback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
    RichProgressBar,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from schemes import SchemeError

from ..config_files import CheckedParser, check_files, flat, refusal
from ..extras import explained
from ..messages import explain, fail
from ..packaged import with_files
from ..recipes import written_out
from ..run_words import is_configured, option
from ..start import Adapt
from .callbacks import Agreement, EpochLines, Predictions, RunSummary, Summary, Throughput
from .files import (
    UNWRITABLE,
    FolderLock,
    WholeCheckpoints,
    close_part,
    first_process,
    open_checkpoint,
    unwritable,
    write_whole,
)
from .finite import FiniteLoss
from .groups import group_rows, table_of_groups
from .loggers import Metrics
from .options import changes, check_groups, check_numbers, check_resumed, given, short_name
from .resume import KEY, Interrupted, LastCheckpoint, Resume, Seeds
from .sources import DataError
from .steps import as_trained
from .weights import Source, check_fits, configuration, loads_weights, read_source, start_from

MONITOR = "val/acc"  # the figure that selects the best checkpoint, unless the configuration or the module sets another
# Lightning's hints that do not apply: pictures in memory need no workers, and a run's folder is meant to be used again.
QUIET = (
    ".*does not have many workers.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*Experiment logs directory .* exists and is not empty.*",
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*treespec, LeafSpec.*",
    r"(?s).*JsonargparseDeprecationWarning.*",
    r"(?s).*deprecated in v4.*removed in v5.*",
    ".*is not supported by the model summary.*",
    ".*LightningCLI's args parameter is intended to run from within Python.*",
    # Raised for each of our schedules, which are stepped after each batch; SWA replaces them.
    ".*SWA is currently only supported every epoch.*",
    # Frozen norms are in eval mode: see Classifier.
    ".*in eval mode at the start of training.*",
    ".*You are trying to `self.log\\(\\)` but the `self.trainer` reference is not registered.*",
)


# Evaluation saves nothing, so it does not matter which checkpoint was the best so far.
QUIET_IN_EVALUATION = (
    ".*The dirpath has changed from.*",
    r".*Please add the following callbacks: \['(StepSchedule|Refinement)'\].*",  # as_trained does the callback's work
)
FINDERS = (BatchSizeFinder, LearningRateFinder)
SIZE, RATE = "data.batch_size", "model.optimizer.lr"  # the options in whose place finders put their values


class TrainingParser(CheckedParser, LightningArgumentParser):
    """A parser whose errors are two lines, where jsonargparse prints a usage of ninety."""

    command_line: Sequence[str] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviation that works today may mean another option once one is added.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def add_function_arguments(self, *args: Any, linked_targets: Any = None, **kwargs: Any) -> list[str]:
        """As jsonargparse's, without linked targets, which it passes on but accepts only for classes."""
        return super().add_function_arguments(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if (own := refusal(ex)) is not None:
            fail(str(own))
        # Suggestions for a mistyped option come from those of the subcommand.
        parser = getattr(ex, "subcommand_parser", None) or self
        names = [action.dest for action in parser._actions]
        fail(*explain(message, self.command_line, names))


class SavedConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's folder, and the same configuration into every checkpoint.

    Wherever the file is used, it starts a new run: the checkpoint that a run was resumed from is not part of it.
    """

    resolved: Mapping[str, Any]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        folder = trainer.log_dir or trainer.default_root_dir  # a collective call of all processes
        if trainer.is_global_zero and not self.already_saved:
            # In the order of the options, which is the readable one.
            text = yaml.safe_dump({**self.resolved, "ckpt_path": None}, sort_keys=False, allow_unicode=True)
            write_whole(Path(folder) / self.config_filename, text.encode())
        self.already_saved = True

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        metrics = next((logger.written for logger in trainer.loggers if isinstance(logger, Metrics)), None)
        checkpoint.setdefault(KEY, {}).update(config={**self.resolved, "ckpt_path": None}, metrics=metrics)


class Command(LightningCLI):
    """`fit|validate|test|predict` with a folder per run, default callbacks and loggers, checkpoints by short name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.lock: FolderLock | None = None
        try:
            super().__init__(*args, **kwargs)
        finally:
            if self.lock is not None:
                # However the command ends, also by a refusal before training.
                self.lock.release()

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommand that was typed, or all of them if the line does not begin with one."""
        every = LightningCLI.subcommands()
        # Building the options of one subcommand takes as long as a small run, and only one is ever parsed.
        typed = next(iter(TrainingParser.command_line), None)
        return {typed: every[typed]} if typed in every else every

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, default="runs/default", help="Folder of this run's files.")
        parser.add_argument("--threads", type=int | None, default=None, help="CPU threads; None leaves torch's choice.")
        parser.add_argument(
            "--weights",
            type=str | None,
            default=None,
            help="Weights to start from: a file or folder, a tag (resnet50.v1), a repository (hf:OWNER/NAME).",
        )
        parser.add_class_arguments(Adapt, "adapt")
        parser.add_argument("--print_groups", action=PrintGroups, help="Print what the optimiser is given, and exit.")
        parser.add_class_arguments(ModelCheckpoint, "checkpoint", skip={"dirpath", "enable_version_counter"})
        parser.add_class_arguments(LastCheckpoint, "last")
        parser.set_defaults(
            {
                "checkpoint.filename": "best",
                "checkpoint.monitor": MONITOR,
                "checkpoint.mode": "max",
                "checkpoint.save_last": True,
                "checkpoint.auto_insert_metric_name": False,
            }
        )
        # Linked when both are built: only the data module knows these numbers.
        for name in ("num_classes", "in_chans"):
            parser.link_arguments(f"data.{name}", f"model.init_args.net.init_args.{name}", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the checkpoint's hyper-parameters win over the command line; here the configuration
        # decides, and Classifier warns where the two differ.
        return

    def _set_seed(self) -> None:
        # Checked here, since the seed is set before anything else is checked.
        check_numbers({"seed_everything": self._get(self.config, "seed_everything")})
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Refuses everything that can be refused before any data is opened."""
        options = self.config[str(self.subcommand)]
        check_groups(options)
        text = self._parser(self.subcommand).dump(options, skip_none=False)
        self.resolved: dict[str, Any] = yaml.safe_load(text)
        # Lightning's CLI would dump the options again, to tell the model how it was configured.
        self.config_dump = self.resolved
        check_numbers(self.resolved)
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.run_dir = Path(options.run_dir)
        fit = self.subcommand == "fit"
        if fit and not options.trainer.fast_dev_run and first_process() and not PrintGroups.asked:
            self.lock = FolderLock(self.run_dir)
            self.lock.acquire()
        self.written: dict[str, int] | None = None
        self.source: Source | None = None
        self.held: Mapping[str, Any] = {}
        self.changed: Mapping[str, tuple[Any, Any]] = {}  # options of a resumed run: before, and now
        # A job that SLURM has requeued resumes, though its command names no checkpoint.
        given = options.ckpt_path or (requeued(self.run_dir) if fit else None)
        if not fit and loads_weights(given):
            given, options.weights = None, given
        options.ckpt_path = find_checkpoint(given, self.run_dir / "checkpoints", self.subcommand)
        if options.ckpt_path is not None:
            self._open_checkpoint(Path(options.ckpt_path))
        elif options.weights is not None:
            self.source = read_source(options.weights)
        elif not fit:
            rank_zero_warn(
                f"{self.subcommand} without --ckpt_path best|last|FILE uses the net as it was built, untrained"
            )

    def _open_checkpoint(self, path: Path) -> None:
        """Refuses a checkpoint that is damaged, or trained with other options, before the run changes anything."""
        fit = self.subcommand == "fit"
        held = self.held = open_checkpoint(path, resume=fit).held
        ours = held.get(KEY, {})
        if not fit:
            self._take_classes(held.get("Images", {}).get("classes"))
        if fit:
            if isinstance(ours.get("config"), dict):
                self._keep_start(ours["config"], str(path))
                check_resumed(ours["config"], self.resolved, TrainingParser.command_line, str(path))
                self.changed = changes(ours["config"], self.resolved)
            # A checkpoint from another folder does not describe the metrics in this one.
            self.written = ours.get("metrics") if path.parent == self.run_dir / "checkpoints" else None

    def _keep_start(self, before: Mapping[str, Any], name: str) -> None:
        """Keeps the initial weights of a resumed run in its configuration; they are not read again."""
        given, first = self.resolved.get("weights"), before.get("weights")
        if given not in (None, first):
            raise SchemeError(
                f"--weights {given} begins a run, and {name} goes on with one that began with {first or 'none'}\n"
                "  Give one of them: --weights or --ckpt_path"
            )
        self.resolved.update({key: before[key] for key in ("weights", "adapt") if key in before})

    def _take_classes(self, names: list[str] | None) -> None:
        """Numbers the classes of the data by the names trained on, since the data may lack some or all of them."""
        options = self.config[str(self.subcommand)].data.get("init_args") or {}
        # The user's own names take precedence.
        if names and "classes" in options and options["classes"] is None:
            options["classes"] = list(names)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except Exception as e:
            if os.environ.get("JSONARGPARSE_DEBUG"):
                raise
            cause = root_cause(e)
            if isinstance(cause, ImportError) and explained(cause) is not None:
                raise cause from None  # the caller names the extra that installs it
            # Other errors, such as a KeyError, say too little without their type.
            kind = "" if isinstance(cause, ValueError | MisconfigurationException) else f"{type(cause).__name__}: "
            # The cause rather than the chain: parsers wrap an error once for each level of the configuration.
            fail(
                f"{kind}{cause}",
                "odenets schemes and odenets models list what there is; JSONARGPARSE_DEBUG=true traces it",
            )
        if self.source is not None:
            adapt = self.config_init[str(self.subcommand)].adapt
            start_from(self._begun_with(), self.source, adapt, self.subcommand == "fit")
        # Without strict_loading, a checkpoint may have other tensors than the module.
        elif self.held and self.model.strict_loading:
            check_fits(self.model, Path(str(self.config_init[str(self.subcommand)].ckpt_path)), self.held)
        if self.subcommand != "fit":
            # The callbacks that would do this may not be configured, but the weights belong to these steps.
            as_trained(self.model, self.held)
        if self.subcommand == "fit":
            self._take_what_was_found(self.held.get(KEY, {}))
        if PrintGroups.asked:
            print_groups(self.model)

    def _take_what_was_found(self, ours: Mapping[str, Any]) -> None:
        """Takes the batch size that a finder has found for a resumed run, unless another is given now."""
        size = (ours.get("data") or {}).get("batch size") if has(self._given_callbacks(), BatchSizeFinder) else None
        if size is not None and SIZE not in self.changed:
            self.datamodule.batch_size = size
        # The rate comes with the checkpoint. A line that is repeated gives the values that the searches began with.
        repeated = given(TrainingParser.command_line) - self.changed.keys()
        now = {short_name(name): value for name, value in flat(self.resolved).items()}
        for name, value in ((SIZE, size), (RATE, ours.get("lr"))):
            if value not in (None, now.get(name)) and name in repeated:
                rank_zero_info(f"{name}: {value}, as a finder has found; give another value to replace it")

    def _begun_with(self) -> nn.Module:
        """The part of the model that ``--weights`` is read into."""
        net = getattr(self.model, "net", self.model)
        body = getattr(self.model, "body", net)
        count, whole = (sum(1 for _ in part.parameters()) for part in (body, self.model))
        if count < whole and self.subcommand != "fit":
            fail(
                f"--weights fills {type(body).__name__} alone, {type(self.model).__name__} would guess with the rest",
                f"To {self.subcommand} a trained one: --ckpt_path FILE",
            )
        return body

    def _given_callbacks(self) -> list[Callback]:
        """The callbacks of the configuration."""
        given = self.config_init[str(self.subcommand)].trainer.callbacks or []
        return list(given if isinstance(given, list) else [given])

    def before_fit(self) -> None:
        """Closes the earlier part of a resumed run, or sets an earlier run in the same folder aside."""
        if self.lock is None:
            return
        if self.config_init["fit"].ckpt_path is not None:
            close_part(self.run_dir, self.written)
        else:
            # Only now, after everything else of the run could be built: a typo must not rename a folder.
            self.lock.set_aside()
        for logger in self.trainer.loggers:
            if isinstance(logger, Metrics):
                logger.count_parts()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        settings = self.config_init[str(self.subcommand)]
        trainer = settings.trainer
        fit = self.subcommand == "fit"
        going_on = fit and bool(self.held)
        # Other subcommands log beside the training run's files, never over them.
        self.folder = self.run_dir if fit else self.run_dir / str(self.subcommand)
        if trainer.default_root_dir is None:
            kwargs["default_root_dir"] = self.folder
        if trainer.logger is not False:
            given = [] if trainer.logger in (None, True) else trainer.logger
            extra = list(given) if isinstance(given, Sequence) else [given]
            ours: list[Logger] = [Metrics(self.folder), TensorBoardLogger(self.folder, name="", version="")]
            kwargs["logger"] = ours + extra
        plugins = trainer.plugins or []
        plugins = list(plugins) if isinstance(plugins, Sequence) and not isinstance(plugins, str) else [plugins]
        # A user's own checkpoint plugin takes precedence.
        if not has(plugins, CheckpointIO):
            kwargs["plugins"] = [*plugins, WholeCheckpoints()]
        # Lightning 2.6 writes last.ckpt at the end of a fast_dev_run too, and would overwrite that of a real run.
        kwargs["enable_checkpointing"] = trainer.enable_checkpointing is not False and not trainer.fast_dev_run
        callbacks = self._given_callbacks()
        if going_on:  # the checkpoint holds what the finders have found
            callbacks = [c for c in callbacks if not isinstance(c, FINDERS)]
        shown, kwargs["enable_progress_bar"] = self._output(trainer, callbacks)
        callbacks += shown
        if fit:
            callbacks = self._around(callbacks, settings, kwargs["enable_checkpointing"])
        elif kwargs["enable_checkpointing"]:
            callbacks += [self._best(settings)]
        if self.subcommand == "predict" and not has(callbacks, BasePredictionWriter):
            # A module that predicts something other than classes has its own writer.
            writer = getattr(self.model, "prediction_writer", None)
            callbacks.append(writer(self.folder) if writer else Predictions(self.folder / "predictions.csv"))
        self.save_config_callback = type("SavedConfig", (SavedConfig,), {"resolved": self.resolved})
        return super().instantiate_trainer(**kwargs, callbacks=[Agreement(), *callbacks])

    def _output(self, trainer: Any, callbacks: list[Callback]) -> tuple[list[Callback], bool]:
        """The callbacks that show a run's progress, and whether there is a bar."""
        shown: list[Callback] = []
        bar = trainer.enable_progress_bar is not False
        if bar and not has(callbacks, ProgressBar):
            # A bar redraws itself with control characters, which a log file would keep.
            bar = sys.stdout.isatty()
            shown.append(RichProgressBar() if bar else EpochLines())
        if trainer.enable_model_summary is not False and not has(callbacks, ModelSummary):
            shown.append(Summary())
        return shown, bar

    def _around(self, callbacks: list[Callback], settings: Any, checkpoints: bool) -> list[Callback]:
        """The callbacks of a training run, in the order that resuming relies on: those that save state come first."""
        last = settings.last if checkpoints and settings.checkpoint.save_last else None
        # Resume comes first: at each hook it must see the state before others have changed it.
        before: list[Callback] = [resume := Resume(keep_rate=RATE not in self.changed)]
        if last is not None:
            last.path, last.resume = (self.run_dir / "checkpoints" / "last.ckpt").absolute(), resume
            before.append(last)
        if not has(callbacks, Seeds):
            before.append(Seeds())
        if not has(callbacks, FiniteLoss):
            before.append(FiniteLoss(None if settings.trainer.fast_dev_run else self.run_dir))
        after: list[Callback] = [Throughput(), RunSummary(self.run_dir, last and last.path)]
        if settings.trainer.logger is not False:
            after.append(LearningRateMonitor("step"))
        after = [callback for callback in after if not has(callbacks, type(callback))]
        return [*before, *callbacks, *after, *([self._best(settings)] if checkpoints else [])]

    def _best(self, settings: Any) -> ModelCheckpoint:
        best = settings.checkpoint
        if best.monitor == MONITOR:  # a module without this figure names its own
            best.monitor = getattr(self.model, "monitor", MONITOR)
        best.dirpath, best._enable_version_counter = str(self.run_dir.absolute() / "checkpoints"), False
        best.save_last = None  # left to LastCheckpoint: Lightning writes `last` only when `best` improves
        return best


class PrintGroups(argparse.Action):
    """An option without a value, which prints the optimiser's groups of parameters and ends the command."""

    asked: ClassVar[bool] = False

    def __init__(self, option_strings: Sequence[str], dest: str = argparse.SUPPRESS, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=kwargs.get("help"))

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        PrintGroups.asked = True


def print_groups(model: L.LightningModule) -> NoReturn:
    """Prints a row for each group of parameters of a module's optimiser, and ends the command."""
    make = getattr(model, "make_optimizer", None)
    if make is None:
        fail(
            f"--print_groups: {type(model).__name__} has no groups of parameters",
            "odenets' modules have: model.layer_decay",
        )
    print(table_of_groups(group_rows(getattr(model, "grouped", model.net), make())))  # type: ignore[arg-type]
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    if frozen:
        print(f"frozen: {frozen:,} parameters")
    sys.exit(0)


class _Resolved(Exception):
    """Ends a command once its configuration is resolved, and carries it."""


class _Resolving(Command):
    """A command that stops before it opens or builds anything."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only ``fit``: one parser takes a quarter of the time of four."""
        return {"fit": Command.subcommands()["fit"]}

    def _set_seed(self) -> None:
        """Does nothing, so that the process keeps its random state."""

    def before_instantiate_classes(self) -> None:
        check_groups(self.config[str(self.subcommand)])
        text = self._parser(self.subcommand).dump(self.config[str(self.subcommand)], skip_none=False)
        found = yaml.safe_load(text)
        check_numbers(found)
        raise _Resolved(found)


def has(things: Sequence[Any], kind: type) -> bool:
    """Whether one of the callbacks, or of the plugins, is of the given kind."""
    return any(isinstance(thing, kind) for thing in things)


def requeued(folder: Path) -> str | None:
    """The checkpoint that Lightning wrote when SLURM requeued this job."""
    if not SLURMEnvironment.detect():
        return None
    found = [(int(path.stem.rpartition("_")[2]), path) for path in folder.glob("hpc_ckpt_*.ckpt")]
    return str(max(found)[1]) if found else None


def find_checkpoint(given: str | None, folder: Path, subcommand: str | None) -> str | None:
    """The file that `--ckpt_path best|last|FILE` means; a missing one is an error, never a fresh start."""
    if given is None:
        return None
    path = folder / f"{given}.ckpt" if given in ("best", "last") else Path(given)
    if not path.is_file():
        remedy = "Train first, without --ckpt_path" if subcommand == "fit" else "Train first"
        raise DataError(
            f"ckpt_path: {given!r} asks for {path}, and there is no such file\n  {remedy}, or give --run_dir."
        )
    return str(path)


def root_cause(error: BaseException) -> BaseException:
    """Our own error in a chain of causes, else the first cause: jsonargparse wraps what a constructor raises."""
    chain = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) is not None and below not in chain:
        chain.append(below)
    return next((e for e in chain if isinstance(e, SchemeError | DataError)), chain[-1])


def worth_saying(record: logging.LogRecord) -> bool:
    """False for Lightning's tips to install further products, and for its messages at every checkpoint."""
    return not any(
        text in record.getMessage()
        for text in ("Tip: For seamless", "`weights_only` was not set", "Trainer already configured with")
    )


def resuming_line(words: Sequence[str], prog: str) -> str:
    """The command line that resumes a stopped run."""
    kept, skip = [], False
    for word in words:
        if not skip and not word.startswith("--ckpt_path="):
            kept += [] if word == "--ckpt_path" else [word]
        skip = word == "--ckpt_path"
    return shlex.join([prog, *kept, "--ckpt_path", "last"])


def run(args: list[str] | None, prog: str = "lightning") -> Command | None:
    """Runs one command line; errors that the user can fix end in two lines and exit status 2."""
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    for name in (
        "utilities.rank_zero",
        "trainer.connectors.checkpoint_connector",
        "trainer.connectors.callback_connector",
    ):
        logging.getLogger(f"lightning.pytorch.{name}").addFilter(worth_saying)
    words = sys.argv[1:] if args is None else args
    with warnings.catch_warnings():
        for text in QUIET if words[:1] == ["fit"] else (*QUIET, *QUIET_IN_EVALUATION):
            warnings.filterwarnings("ignore", text)
        PrintGroups.asked = False
        try:
            return _command(Command, with_configuration(words), prog)
        except Exception as e:
            explain_failure(e, words, prog)
        except KeyboardInterrupt:
            fail("interrupted before training began", "Nothing was trained, and nothing is lost", 130)


def with_configuration(words: Sequence[str]) -> Sequence[str]:
    """Adds the checkpoint's configuration to a command line of evaluation that names a checkpoint and none itself.

    Options such as `--data.batch_size` override it, and so does another class for the network or the data.
    """
    given = option(words, "--ckpt_path")
    if not words or words[0] not in ("validate", "test", "predict") or given is None or is_configured(words):
        return words
    return [words[0], "--config", configuration(given, option(words, "--run_dir")), *words[1:]]


def _command(kind: type[Command], words: Sequence[str], prog: str) -> Command:
    """Parses a command line, builds the objects that it describes, and runs it."""
    words = with_files(words)
    TrainingParser.command_line = words
    check_files(words)
    written = written_out(words)  # only for the parser: messages show the line as it was typed
    return kind(
        L.LightningModule,
        L.LightningDataModule,
        parser_class=TrainingParser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=SavedConfig,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        args=written,
        parser_kwargs={"prog": prog},
    )


def resolve(words: Sequence[str], prog: str = "lightning") -> dict[str, Any]:
    """Resolves the configuration of a ``fit`` command line, checked as for a run; nothing is opened, built or seeded.

    Args:
        words: the line, ``["fit", "-c", "FILE.yaml", ...]``.
        prog: the name of the command, for messages.

    Raises:
        SchemeError: a number that no run can have, or a file that is not what it seems.
        SystemExit: the parser refuses the line, after printing two lines.
    """
    with warnings.catch_warnings():
        for text in QUIET:
            warnings.filterwarnings("ignore", text)
        try:
            _command(_Resolving, words, prog)
        except _Resolved as stop:
            return stop.args[0]
    raise AssertionError("a command ended without a configuration")


def explain_failure(error: Exception, words: Sequence[str], prog: str) -> NoReturn:
    """Ends with two lines for an error that the user can fix; any other is raised again."""
    again = resuming_line(words, prog)
    if isinstance(error, Interrupted):
        if getattr(rank_zero_only, "rank", 0) not in (0, None):
            sys.exit(128 + error.signum)
        name = signal.Signals(error.signum).name
        where = "before the first step" if error.path is None else f"at step {error.step}; {error.path} holds it"
        fail(f"stopped by {name} {where}", f"Go on: {again}", 128 + error.signum)
    if isinstance(error, SchemeError | DataError):
        fail(str(error))
    if isinstance(error, MisconfigurationException) or refuses_options(error):
        fail(" ".join(str(error).split()), "lightning fit --help lists every option")
    if isinstance(error, OSError) and error.errno in UNWRITABLE - {errno.EEXIST}:
        fail(str(unwritable(Path(error.filename or "the run's folder"), error)))
    if isinstance(error, ProcessRaisedException) and (found := OURS.search(str(error))):
        fail(found[1])  # from a forked process, whose traceback arrives as text
    if isinstance(error, ProcessExitedException) or any(text in str(error) for text in PEER_GONE):
        fail("another process of this run has ended, and this one cannot go on alone", f"Once mended, go on: {again}")
    raise error


def refuses_options(error: Exception) -> bool:
    """Whether the error is Lightning's, or a torch optimiser's, refusal of an option."""
    frames = list(traceback.walk_tb(error.__traceback__))
    origin = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    # Judged by the module that raised it: the same kinds of error from elsewhere are bugs, and need their traceback.
    return (isinstance(error, ValueError) and origin.startswith(("lightning.", "torch.optim."))) or (
        isinstance(error, RuntimeError) and origin.startswith("torch.optim.")
    )


OURS = re.compile(r"^[\w.]*(?:SchemeError|NotFinite|CheckpointError|DataError): (.+)", re.M | re.S)
# Messages of gloo and NCCL when a process of the group is gone.
PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "NCCL remote process exited", "Broken pipe")
