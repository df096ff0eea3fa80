"""The command line behind `odenets.cli`: Lightning's, with short errors, one folder per run and safe resuming."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    Callback,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from schemes import SchemeError

from ..messages import explain, fail
from .callbacks import Predictions, RunSummary, Throughput
from .sources import DataError

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
    ".*You are trying to `self.log\\(\\)` but the `self.trainer` reference is not registered.*",
)


class TrainingParser(LightningArgumentParser):
    """A parser that ends in two lines where jsonargparse prints its usage of ninety."""

    command_line: Sequence[str] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        names = [action.dest for action in parser._actions]
        fail(*explain(message, self.command_line, names))


class Command(LightningCLI):
    """`fit|validate|test|predict` with a folder per run, default callbacks and loggers, checkpoints by short name."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, default="runs/default", help="Folder of this run's files.")
        parser.add_argument("--threads", type=int | None, default=None, help="CPU threads; None leaves torch's choice.")
        parser.add_class_arguments(ModelCheckpoint, "checkpoint", skip={"dirpath", "enable_version_counter"})
        parser.set_defaults(
            {
                "checkpoint.filename": "best",
                "checkpoint.monitor": "val/acc",
                "checkpoint.mode": "max",
                "checkpoint.save_last": True,
                "checkpoint.auto_insert_metric_name": False,
            }
        )
        for name in ("num_classes", "in_chans"):
            parser.link_arguments(f"data.{name}", f"model.init_args.net.init_args.{name}", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the checkpoint's hyper-parameters win over the command line; here the configuration
        # decides, and Classifier warns where the two differ.
        return

    def before_instantiate_classes(self) -> None:
        options = self.config[str(self.subcommand)]
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.run_dir = Path(options.run_dir)
        options.ckpt_path = find_checkpoint(options.ckpt_path, self.run_dir / "checkpoints", self.subcommand)
        if options.ckpt_path is None and self.subcommand in ("validate", "test", "predict"):
            rank_zero_warn(
                f"{self.subcommand} without --ckpt_path best|last|FILE uses the net as it was built, untrained"
            )

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, MisconfigurationException) as e:
            if os.environ.get("JSONARGPARSE_DEBUG"):
                raise
            cause = root_cause(e)
            fail(str(cause), "JSONARGPARSE_DEBUG=1 shows where it was raised")

    def before_fit(self) -> None:
        if not self.trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            keep_earlier_run(self.run_dir, resumed=self.config_init[str(self.subcommand)].ckpt_path is not None)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        settings = self.config_init[str(self.subcommand)]
        trainer = settings.trainer
        fit = self.subcommand == "fit"
        # Other subcommands log beside the training run's files, never over them.
        folder = self.run_dir if fit else self.run_dir / str(self.subcommand)
        if trainer.default_root_dir is None:
            kwargs["default_root_dir"] = folder
        if trainer.logger in (None, True):
            kwargs["logger"] = [logger(folder, name="", version="") for logger in (CSVLogger, TensorBoardLogger)]
        given = trainer.callbacks or []
        callbacks = list(given if isinstance(given, list) else [given])
        # Lightning 2.6 writes last.ckpt at the end of a fast_dev_run too, over that of a real run.
        kwargs["enable_checkpointing"] = trainer.enable_checkpointing is not False and not trainer.fast_dev_run
        if kwargs["enable_checkpointing"]:
            checkpoint = settings.checkpoint
            checkpoint.dirpath, checkpoint._enable_version_counter = str(self.run_dir.absolute() / "checkpoints"), False
            callbacks.append(checkpoint)
        if trainer.enable_progress_bar is not False:
            # A bar that redraws itself is noise in a log file: a tenth of the lines there.
            bar = RichProgressBar() if sys.stdout.isatty() else TQDMProgressBar(refresh_rate=10)
            callbacks += [] if has(callbacks, ProgressBar) else [bar]
        if fit:
            defaults: list[Callback] = [Throughput(), RunSummary()]
            if trainer.logger is not False:
                defaults.append(LearningRateMonitor("step"))
            callbacks += [callback for callback in defaults if not has(callbacks, type(callback))]
        if self.subcommand == "predict" and not has(callbacks, Predictions):
            callbacks.append(Predictions(folder / "predictions.csv"))
        return super().instantiate_trainer(**kwargs, callbacks=callbacks)


def has(callbacks: list[Callback], kind: type) -> bool:
    """Whether one of the callbacks is of this kind."""
    return any(isinstance(callback, kind) for callback in callbacks)


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


@rank_zero_only
def keep_earlier_run(folder: Path, resumed: bool) -> None:
    """Before training writes to `folder`: set an earlier run aside, or, when it is resumed, its metrics file."""
    metrics = folder / "metrics.csv"
    if "LOCAL_RANK" in os.environ and os.environ["LOCAL_RANK"] != "0":
        return
    if resumed and metrics.exists():
        metrics.rename(free_name(metrics))  # Lightning's CSVLogger starts by deleting the file
    elif not resumed and (folder / "config.yaml").exists():
        aside = folder.rename(free_name(folder))
        rank_zero_info(f"{folder} holds an earlier run: it is now {aside}")


def free_name(path: Path) -> Path:
    """`runs/x` -> `runs/x-1`, `metrics.csv` -> `metrics-1.csv`: the first number that is free."""
    number = 1
    while (free := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
        number += 1
    return free


def root_cause(error: BaseException) -> BaseException:
    """The error of ours in a chain of causes, else the first cause: jsonargparse wraps what a constructor raises."""
    chain = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) is not None and below not in chain:
        chain.append(below)
    return next((e for e in chain if isinstance(e, SchemeError | DataError)), chain[-1])


def no_advertisement(record: logging.LogRecord) -> bool:
    """False for Lightning's tips to install further products."""
    return "Tip: For seamless" not in record.getMessage()


def run(args: list[str] | None, prog: str = "lightning") -> Command | None:
    """Run one command line; errors that the user can mend end in two lines and exit status 2."""
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(no_advertisement)
    with warnings.catch_warnings():
        for text in QUIET:
            warnings.filterwarnings("ignore", text)
        try:
            TrainingParser.command_line = sys.argv[1:] if args is None else args
            return Command(
                L.LightningModule,
                L.LightningDataModule,
                parser_class=TrainingParser,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                save_config_kwargs={"overwrite": True},
                seed_everything_default=0,
                args=args,
                parser_kwargs={"prog": prog},
            )
        except (SchemeError, DataError) as e:
            fail(str(e))
