"""Exact resumption: the place in training that a checkpoint records, and when the last checkpoint is written.

A run that is killed and resumed must have the weights of an uninterrupted one. Four things ensure it: batches and
random numbers are functions of the place in training (``order``); the place is recorded as (epoch, batches done,
whether their validation is still due); a checkpoint is only written after a whole batch or a whole epoch; and the sums
behind an epoch's means are saved with it. Three examples of places:

* (3, 0, False): three epochs are done, with their validation and their rows of metrics;
* (3, 16, False): continue with batch 16 of epoch 3 (both from 0), whatever the sampler did before;
* (3, 22, True): all 22 batches of epoch 3 are done, then the signal came: validate, and end the epoch.
"""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import BaseFinetuning, Callback, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loops.evaluation_loop import RestartStage as EvaluationStage
from lightning.pytorch.loops.fit_loop import RestartStage as FitStage
from lightning.pytorch.loops.progress import _BatchProgress, _Progress
from lightning.pytorch.loops.training_epoch_loop import RestartStage as EpochStage
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from schemes import SchemeError

from .order import TrainingOrder, batch_seed, run_seed, seed_generators
from .schedules import KEY as KEY


class Interrupted(Exception):
    """A signal stopped the run; its progress is saved.

    Attributes:
        signum: the signal.
        step: the number of optimiser steps taken.
        path: the checkpoint; None if training had not begun.
    """

    def __init__(self, signum: int, step: int, path: Path | None) -> None:
        super().__init__(signum, step, path)
        self.signum, self.step, self.path = signum, step, path


class Place(NamedTuple):
    """A place in training.

    Attributes:
        epoch: epochs that are done.
        batch: batches of the next epoch that are done.
        validate: whether validation follows before the next batch.
        stepped: Lightning's count for the column `step` of metrics.
    """

    epoch: int
    batch: int
    validate: bool
    stepped: int


def place_of(trainer: L.Trainer, validate: bool = False) -> Place:
    """Returns the place of a run, at any hook of a callback.

    Args:
        trainer: in its fit loop.
        validate: whether the validation that is running, or comes next, is to be repeated.
    """
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    epochs: Any = fit.epoch_progress.current
    batches: Any = loop.batch_progress.current
    epoch, done, stepped = epochs.processed, batches.processed, loop._batches_that_stepped
    whole = done >= trainer.num_training_batches
    if epochs.started == epochs.processed:  # between epochs, or after the last
        if whole or not done:
            return Place(epoch, 0, False, stepped)
        return Place(epoch - 1, done, False, stepped)  # max_steps ended it inside an epoch
    if validate:
        return Place(epoch, done, True, stepped)
    # Validation at the epoch's end belongs to an epoch that is done; within an epoch it comes between two batches.
    if trainer.validating:
        return Place(epoch + 1, 0, False, stepped + 1) if whole else Place(epoch, done, False, stepped)
    # At the hook after a batch, Lightning has counted it as processed but not yet as completed.
    inside_batch_end = batches.completed < done
    due = inside_batch_end and loop._should_check_val_fx(fit._data_fetcher)  # pyright: ignore[reportArgumentType]
    # The increment that Lightning makes right after this hook, and that the checkpoint would lack.
    counted = inside_batch_end and not due and not loop._should_accumulate()
    return Place(epoch, done, due, stepped + counted)


def _set(progress: _Progress | _BatchProgress, current: int, total: int | None = None, begun: int = 0) -> None:
    for tracker, count in ((progress.current, current), (progress.total, current if total is None else total)):
        # All four counters: Lightning infers from their differences where it was stopped.
        tracker.processed = tracker.completed = count  # type: ignore[attr-defined]
        tracker.ready = tracker.started = count + begun  # type: ignore[attr-defined]


def go_to(trainer: L.Trainer, place: Place) -> None:
    """Makes a fit loop that was restored, and has not begun yet, continue from a place.

    Args:
        trainer: the owner of the loop.
        place: epoch and batch.
    """
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    inside = place.batch > 0
    _set(fit.epoch_progress, place.epoch, begun=int(inside))
    _set(loop.batch_progress, place.batch, loop.batch_progress.total.ready)
    # Otherwise the loop would request a batch that the epoch does not have.
    loop.batch_progress.is_last_batch = inside and place.batch == trainer.num_training_batches
    loop._batches_that_stepped = place.stepped
    loop.restarting = inside  # the setter also sets the inner loops
    loop.val_loop.batch_progress.reset()
    fit._restart_stage = FitStage.RESTARTED_MID_EPOCH if inside else FitStage.NONE
    loop._restart_stage = EpochStage.RESTARTED_ON_LAST if inside else EpochStage.NONE
    again = inside and place.validate
    loop.val_loop._restart_stage = EvaluationStage.RESTARTED_MID_EVALUATION if again else EvaluationStage.NONE
    # The loader's iterator was created when the optimiser was set up, before the checkpoint gave the first batch.
    order = order_of(trainer)
    if order is not None and fit._data_fetcher is not None:
        order.set_epoch(place.epoch)
        order.skip = place.batch
        iter(fit._data_fetcher)


def order_of(trainer: L.Trainer) -> TrainingOrder | None:
    """The order of the training samples, if the loader's sampler is a ``TrainingOrder``, else None.

    Args:
        trainer: of the run.
    """
    order = getattr(trainer.train_dataloader, "sampler", None)
    return order if isinstance(order, TrainingOrder) else None


class Seeds(Callback):
    """Seeds torch, Python and NumPy at each training batch by (seed, epoch, batch, process).

    Dropout and all other draws of a net are then the same in a resumed run.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        run_seed(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        seed_generators(batch_seed(trainer, run_seed(trainer), "net"))


class Resume(Callback):
    """Writes the place in training into every checkpoint, and resumes from it.

    Learning rates follow the configuration: a schedule with a new length, or an optimiser with a new learning rate,
    continues from the checkpoint's step.

    Args:
        keep_rate: whether a learning rate that a finder has found remains; False takes the optimiser's, given anew.
    """

    def __init__(self, keep_rate: bool = True) -> None:
        self.keep_rate = keep_rate
        self.validate = False  # set by a caller that saves before a validation
        self._loaded: dict[str, Any] = {}
        self._counts: dict[str, int] = {}
        self._sums: dict[str, Any] = {}
        self._ended: dict[str, Any] = {}
        self._fresh: list[tuple[Any, list[dict[str, Any]], dict[str, Any]]] = []

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        place = place_of(trainer, self.validate)
        order = order_of(trainer)
        sums = (self._ended or _sums(trainer)) if place.batch else {}
        # Gathered from all processes, as each has seen different samples: one process's sums cover only its share.
        checkpoint.setdefault(KEY, {}).update(
            place=tuple(place),
            sums=_gathered(trainer, sums),
            data=None if order is None else _data(order),
            groups=[groups for _, groups, _ in self._fresh],
            optimizers=[type(optimizer).__name__ for optimizer in trainer.optimizers],
        )

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint.get(KEY, {}) if "fit_loop" in checkpoint.get("loops", {}) else {}
        states = {"optimiser": "optimizer_states", "schedule": "lr_schedulers"}
        self._counts = {name: len(checkpoint.get(key, [])) for name, key in states.items()} if self._loaded else {}
        if self._loaded and not self.keep_rate and hasattr(pl_module, "lr"):
            pl_module.lr = None  # type: ignore[assignment]
        # Here, before Lightning restores the states of the callbacks.
        _relocate(trainer, checkpoint.get("callbacks", {}))
        if "place" in self._loaded:  # Lightning decides by the epoch progress whether anything is left to train
            done, most = self._loaded["place"][0], trainer.max_epochs
            if most is not None and 0 <= most <= done:
                rank_zero_info(f"the checkpoint has {done} epochs, and trainer.max_epochs is {most}: nothing to train")
                # Lightning would refuse a checkpoint beyond the end; a run that was shortened is done.
                done = most
            for progress in (checkpoint["loops"]["fit_loop"]["epoch_progress"][k] for k in ("total", "current")):
                progress.update(processed=done, completed=done)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._check_states(trainer)
        # Groups and schedules as configured; the checkpoint's replace them after this hook.
        self._fresh = []
        for scheduler in (config.scheduler for config in trainer.lr_scheduler_configs):
            groups = [{k: v for k, v in g.items() if k != "params"} for g in scheduler.optimizer.param_groups]
            self._fresh.append((scheduler, groups, dict(scheduler.state_dict())))

    def _check_states(self, trainer: L.Trainer) -> None:
        """Refuses another optimiser's state, or another number of states: Lightning pairs them, and drops the rest."""
        counts, self._counts = self._counts, {}
        for name, parts in (("optimiser", trainer.optimizers), ("schedule", trainer.lr_scheduler_configs)):
            if counts and counts[name] != len(parts):
                raise SchemeError(
                    f"the checkpoint holds the states of {counts[name]} {name}s, and this run has {len(parts)}\n"
                    "  Resume what it was trained with; or start anew from its weights: --weights FILE"
                )
        before = self._loaded.get("optimizers", [])
        for old, new in zip(before, (type(optimizer).__name__ for optimizer in trainer.optimizers), strict=False):
            # One optimiser's state means nothing to another, which would silently start afresh, or fail.
            if old != new:
                raise SchemeError(
                    f"the checkpoint holds the state of an optimiser {old}, and this run has {new}\n"
                    f"  Resume with {old}; or start anew from its weights: --weights FILE"
                )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if "place" not in self._loaded:
            return
        place = Place(*self._loaded["place"])
        order, before = order_of(trainer), self._loaded.get("data")
        sums = self._loaded.get("sums") or []
        # Only within an epoch: between epochs, any number of processes may resume.
        if place.batch and order is not None and before is not None and (now := _data(order)) != before:
            changed = ", ".join(f"{k} {before[k]} there, {now[k]} here" for k in now if before.get(k) != now[k])
            rank_zero_warn(
                f"the checkpoint ends after batch {place.batch} of epoch {place.epoch}, which cannot go on with other "
                f"data or processes ({changed}): the run goes on with epoch {place.epoch + 1}"
            )
            place, sums = Place(place.epoch + 1, 0, False, place.stepped), []
        go_to(trainer, place)
        self._sums = sums[trainer.global_rank] if trainer.global_rank < len(sums) else {}
        # No batch follows that would clear the sums, so they can be restored at once.
        if self._sums and (place.validate or place.batch == trainer.num_training_batches):
            self._restore_sums(trainer)
        if any(isinstance(c, BaseFinetuning) for c in trainer.callbacks):  # pyright: ignore
            _thaw(trainer, pl_module)
        before_groups = self._loaded.get("groups") or []
        for n, (scheduler, groups, state) in enumerate(self._fresh):
            _reschedule(scheduler, groups, state, before_groups[n] if n < len(before_groups) else [])
        self._loaded = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._ended = {}
        if self._sums:  # only now, since the first batch begins by clearing them
            self._restore_sums(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended = _sums(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended = {}

    def _restore_sums(self, trainer: L.Trainer) -> None:
        results: Any = trainer.fit_loop.epoch_loop._results
        for key, (log, value, count) in self._sums.items():
            value = value.to(trainer.strategy.root_device)
            if key not in results:
                fold = getattr(torch, log["reduce_fx"])
                sync = {"sync_dist_fn": trainer.strategy.reduce, "sync_dist_group": None}
                results.log(**{**log, "reduce_fx": fold}, value=value, batch_size=1, **sync)
                results[key].value, results[key].cumulated_batch_size = value, torch.tensor(count, device=value.device)
            elif log["reduce_fx"] in ("mean", "sum"):
                results[key].value = results[key].value + value
                if log["reduce_fx"] == "mean":
                    results[key].cumulated_batch_size = results[key].cumulated_batch_size + count
            else:
                results[key].value = getattr(torch, log["reduce_fx"] + "imum")(results[key].value, value)
            # The mean was cached when the batch was logged.
            results[key]._computed = None
        self._sums = {}


def _relocate(trainer: L.Trainer, states: dict[str, Any]) -> None:
    """Updates the path of `best` if the run's folder was moved; otherwise a worse checkpoint would replace it."""
    for callback in trainer.checkpoint_callbacks:
        state = states.get(callback.state_key)
        if not isinstance(callback, ModelCheckpoint) or not state or callback.dirpath is None:
            continue
        old, new = str(state.get("dirpath")), str(callback.dirpath)
        if old != new and os.path.exists(os.path.join(new, os.path.basename(state["best_model_path"] or "-"))):
            # Bound as defaults, since the loop rebinds both names.
            def moved(path: Any, old: str = old, new: str = new) -> Any:
                return path.replace(old, new, 1) if isinstance(path, str) and path.startswith(old) else path

            states[callback.state_key] = {key: moved(value) for key, value in state.items()} | {
                "best_k_models": {moved(path): score for path, score in state["best_k_models"].items()}
            }


def _thaw(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Unfreezes what an optimiser holds: Lightning's callback freezes at every start, and unfreezes in one epoch."""
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    for part in module.modules():
        for p in part.parameters(recurse=False):
            if id(p) in held:
                p.requires_grad_(True)
                if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
                    part.track_running_stats = True


def _data(order: TrainingOrder) -> dict[str, int]:
    """The figures that a place within an epoch depends on."""
    return {
        "samples": len(order.dataset),  # type: ignore[arg-type]
        "batch size": order.batch_size,
        "processes": order.num_replicas,
    }


def _sums(trainer: L.Trainer) -> dict[str, Any]:
    """For each figure of this epoch: how it was logged, its sum so far, and its number of samples."""
    found = {}
    for key, metric in trainer.fit_loop.epoch_loop._results.items():
        meta = metric.meta
        if metric.is_tensor and meta.on_epoch and not meta.is_custom_reduction and not metric.has_reset:
            names = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "add_dataloader_idx")
            log = {name: getattr(meta, name) for name in names}
            log |= {"reduce_fx": meta.reduce_fx.__name__, "sync_dist": meta.sync.should}
            count = int(metric.cumulated_batch_size) if meta.is_mean_reduction else 0
            found[key] = (log, metric.value.detach().cpu().clone(), count)
    return found


def _gathered(trainer: L.Trainer, value: Any) -> list[Any]:
    """Gathers the value of every process."""
    if trainer.world_size == 1:
        return [value]
    found: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(found, value)
    return found


# The options that a schedule moves: they follow from the configuration and the step, whatever a checkpoint holds.
_SCHEDULED = {"lr", "initial_lr", "max_lr", "min_lr", "momentum", "betas"}


def _reschedule(
    scheduler: LRScheduler, groups: list[dict[str, Any]], state: dict[str, Any], before: list[dict[str, Any]]
) -> None:
    """Advances a schedule, as configured now, to the step of a checkpoint.

    Args:
        scheduler: as the checkpoint has it.
        groups: the optimiser's groups, without their parameters, as configured now.
        state: of the schedule, as configured now.
        before: the groups as configured for the run that wrote the checkpoint; [] if the checkpoint lacks them.
    """
    # With these two the rate follows from the step alone; others (by plateaus) carry more state, and are left alone.
    if not isinstance(scheduler, LambdaLR | OneCycleLR):
        return
    step = scheduler.last_epoch
    # A callback may have added groups, with rates of their own.
    for n, (group, fresh) in enumerate(zip(scheduler.optimizer.param_groups, groups, strict=False)):
        old = before[n] if n < len(before) else {}
        # An optimiser may keep counters in its groups: beside what a schedule moves, only changed options are set.
        group.update({k: v for k, v in fresh.items() if k in _SCHEDULED or k not in old or old[k] != v})
    if step == 0:
        return
    if isinstance(scheduler, OneCycleLR) and step >= state["total_steps"]:
        raise SchemeError(
            f"OneCycle ends after {state['total_steps'] - 1} steps, and the checkpoint has taken {step}\n"
            "  Resume with a longer run: --trainer.max_epochs or --trainer.max_steps"
        )
    # With a count of one, torch would check whether the optimiser has stepped; it has, but in an earlier process.
    scheduler.load_state_dict({**state, "last_epoch": step - 1, "_step_count": step + 1})
    scheduler.step()
    scheduler._step_count = step + 1


class LastCheckpoint(Callback):
    """Writes ``last.ckpt`` at the end of each epoch and of the run, on a signal, and, if requested, every n steps.

    It comes before the user's callbacks: at the hooks where it saves, all of them are done with the previous batch or
    epoch. SIGTERM and SIGINT are deferred until a checkpoint can be written; a second one ends the process.

    Args:
        every_n_train_steps: also write after every so many optimiser steps.
    """

    def __init__(self, every_n_train_steps: int | None = None) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise SchemeError(f"last.every_n_train_steps={every_n_train_steps}: wants 1 or more, or null")
        self.every_n_train_steps = every_n_train_steps
        self.path = Path("last.ckpt")
        self.resume: Resume | None = None
        self._requeue: Callable[[int, Any], Any] | None = None
        # A place that no run can be at.
        self._saved = (-1, -1, False)
        self._signum = 0
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step, self._saved = trainer.global_step, place_of(trainer)[:3]
        # Python sets signal handlers only in the main thread; a run in another thread does without.
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in (signal.SIGTERM, signal.SIGINT):
            self._handlers[signum] = signal.signal(signum, self._note)
        if SLURMEnvironment.detect() and callable(requeue := signal.getsignal(signal.SIGUSR1)):
            # Lightning's handler saves and requeues wherever training is; here it waits for a safe point.
            self._requeue = requeue
            self._handlers[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._note)

    def _note(self, signum: int, frame: Any) -> None:
        # A second signal ends the process at once: its sender does not want to wait for a safe point.
        if self._signum and signum != signal.SIGUSR1:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self._signum = signum

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore_handlers()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._handlers = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        done = place_of(trainer).batch
        if done and done % trainer.accumulate_grad_batches == 0:  # else a step's gradients are only partly accumulated
            self._safe_point(trainer, self._due(trainer))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._fits(trainer) and not trainer.fit_loop.epoch_loop._should_accumulate():
            self._safe_point(trainer, self._due(trainer), validate=True)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.sanity_checking and self._agreed(trainer):
            raise Interrupted(self._signum, trainer.global_step, None)
        # During validation the net holds averaged weights, if there are any: then wait for its end.
        averaging = any(isinstance(c, WeightAveraging) for c in trainer.callbacks)  # pyright: ignore
        if self._fits(trainer) and not averaging and not trainer.fit_loop.epoch_loop._should_accumulate():
            self._safe_point(trainer, False, validate=True)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step:
            self._safe_point(trainer, True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)
        self._restore_handlers()  # before Lightning restores those that it replaced

    def _fits(self, trainer: L.Trainer) -> bool:
        return trainer.state.fn == "fit" and not trainer.sanity_checking

    def _due(self, trainer: L.Trainer) -> bool:
        n, step = self.every_n_train_steps, trainer.global_step
        due = n is not None and step // n > self._step // n
        self._step = step
        return due

    def _agreed(self, trainer: L.Trainer) -> bool:
        """Whether a signal has come to any process."""
        if trainer.world_size == 1:
            return bool(self._signum)
        signum = torch.tensor(self._signum, device=trainer.strategy.root_device)
        # A signal reaches processes at different batches, or not all of them; all must stop at the same batch.
        torch.distributed.all_reduce(signum, torch.distributed.ReduceOp.MAX)
        self._signum = int(signum)
        return bool(self._signum)

    def _safe_point(self, trainer: L.Trainer, due: bool, validate: bool = False) -> None:
        stop = self._agreed(trainer)
        if due or stop:
            self._save(trainer, validate)
        if stop and self._signum == signal.SIGUSR1 and self._requeue is not None:
            self._signum = 0
            self._requeue(signal.SIGUSR1, None)
        elif stop:
            raise Interrupted(self._signum, trainer.global_step, self.path)

    def _save(self, trainer: L.Trainer, validate: bool = False) -> None:
        if self.resume is not None:
            self.resume.validate = validate
        try:
            # The end of an epoch, the end of the run and a signal may coincide: the place is written once.
            place = place_of(trainer, validate)[:3]
            if place == self._saved:
                return
            for logger in trainer.loggers:  # the checkpoint counts these rows as written
                logger.save()
            trainer.save_checkpoint(self.path, weights_only=False)
            self._saved = place
        finally:
            if self.resume is not None:
                self.resume.validate = False
