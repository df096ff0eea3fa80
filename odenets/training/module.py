"""The base of all modules that train one network, whatever its task."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from schemes import SchemeError

from ..auxiliary import ENERGIES
from ..gather import gathered, outermost, returning
from ..stack import named_stacks
from .averages import check_averages
from .groups import Frozen
from .sharding import shard_module
from .steps import as_trained, keep_states


def evaluations(net: nn.Module) -> int:
    """Counts residual-function evaluations of one forward pass, over the outermost parts of the net that count them."""
    own = getattr(net, "evaluations", None)
    return own if own is not None else sum(evaluations(part) for part in net.children())


def solver_figures(net: nn.Module) -> dict[str, float]:
    """Summarises the adaptive solves of the last forward pass: their total steps, and the share that finished.

    Empty if there were none.
    """
    # Stacks inside a stack have their own solves, each counted where it ran.
    solves = [solve for _, stack in named_stacks(net) for solve in stack.solves]
    if not solves:
        return {}
    return {
        "solver/accepted": float(sum(s.accepted for s in solves)),
        "solver/rejected": float(sum(s.rejected for s in solves)),
        "solver/finished": sum(s.status == "finished" for s in solves) / len(solves),
    }


def check_synchronised(trainer: L.Trainer) -> None:
    """Refuses norms that are synchronised over processes on a CPU, before the first batch reaches one.

    Args:
        trainer: of the run.

    Raises:
        SchemeError: torch has no such norm for a CPU.
    """
    strategy: Any = trainer.strategy
    asked = getattr(strategy, "_layer_sync", None) is not None  # where Lightning keeps ``sync_batchnorm``
    if asked and trainer.world_size > 1 and strategy.root_device.type == "cpu":
        raise SchemeError(
            "trainer.sync_batchnorm is true, and torch's SyncBatchNorm has no kernels for a CPU\n"
            "  Train on GPUs, or with --trainer.sync_batchnorm false and a net whose norms need no batch"
        )


def share_of(trainer: L.Trainer, own: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns this process's count over the mean count: the weight of its mean loss, since gradients are averaged.

    Args:
        trainer: of the run.
        own: the number of pixels, or words, in this process's batch.
        dtype: of the share.
    """
    count = own.to(dtype)
    mean: Any = trainer.strategy.reduce(count.clone(), reduce_op="mean")
    # Above 0 only: the mean is below 1 where there are fewer of them than processes.
    return count / mean.clamp(min=torch.finfo(dtype).tiny)


def of_a_whole_step(trainer: L.Trainer, loss: Tensor) -> Tensor:
    """Rescales the loss of a batch in a short last step: Lightning always divides by `accumulate_grad_batches`.

    The last step of an epoch takes the remaining batches and, like every step, uses their mean.

    Args:
        trainer: in a training batch.
        loss: already divided by Lightning.
    """
    every, batches = trainer.accumulate_grad_batches, trainer.num_training_batches
    left = 0 if math.isinf(batches) else int(batches) % every
    number = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return loss * (every / left) if left and number > batches - left else loss


class NetModule(L.LightningModule):
    """The training of `net`: its memory layout and compilation, the count of its evaluations, and its checkpoints.

    Attributes:
        net: The network.
        channels_last: Whether pictures and weights have the channels as the fastest axis.
        compile_net: Whether the net is compiled in place.
        aux: The weight in the loss of each auxiliary value of the net's stacks, by name.
        frozen: Which parts are not trained.
    """

    net: Any
    aux: Mapping[str, float] = {}
    frozen: Frozen | None = None
    channels_last: bool = False
    compile_net: bool = False
    _compiled: bool = False

    @property
    def body(self) -> nn.Module:
        """The module that a classifier's weights fit: the net, or the part of it that a head was put on."""
        return getattr(self.net, "body", self.net)

    @property
    def grouped(self) -> nn.Module:
        """The module whose parameters the optimiser's groups hold."""
        return self.net

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        # The first hook to run. Lightning takes any module with `configure_model` for a sharded one, and warns if its
        # weights are averaged: so the method is only set under the strategy that needs it.
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            self.configure_model = partial(shard_module, self, self.net)  # type: ignore[method-assign]
        return super().configure_callbacks()

    def setup(self, stage: str) -> None:
        if stage == "fit":
            check_synchronised(self.trainer)
            check_averages(self.trainer, self)
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # also a head beside the net
        # This hook runs for each stage, and a second compilation would discard the first.
        if self.compile_net and not self._compiled:
            self.net.compile()
            self._compiled = True

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(of_a_whole_step(self.trainer, loss), *args, **kwargs)

    def laid_out(self, x: Tensor) -> Tensor:
        """Pictures (n, c, h, w) in the net's memory layout."""
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    @property
    def freezable(self) -> nn.Module:
        """The module that the names in ``frozen`` refer to."""
        return self.net

    def take_frozen(self, patterns: Sequence[str]) -> None:
        """Freezes parts; ``train`` then keeps their norms with running statistics in evaluation mode.

        Args:
            patterns: see ``Frozen``.

        Raises:
            SchemeError: a pattern that matches no part.
        """
        self.frozen = Frozen(self.freezable, patterns)
        self.frozen.apply(self.freezable)

    def train(self, mode: bool = True) -> Self:
        """Sets the mode as for any module, except that norms in frozen parts stay in evaluation mode."""
        super().train(mode)
        if self.frozen is not None:
            self.frozen.hold(self.freezable)
        return self

    def take_auxiliary(self, aux: Mapping[str, float] | None) -> None:
        """Sets the weights of auxiliary values; fields return their energies if these are among them.

        Args:
            aux: names and weights; None for none.

        Raises:
            SchemeError: a weight that is not a number, a name that the module logs itself, or a net without stacks.
        """
        self.aux = dict(aux or {})
        name = type(self).__name__
        for key, weight in self.aux.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise SchemeError(f"{name}: the weight of the auxiliary value {key!r} is {weight!r}, want a number.")
            if key in ("loss", "acc"):
                raise SchemeError(
                    f"{name}: an auxiliary value named {key!r} would be logged as train/{key}, which is that of the "
                    "labels.\n  Let the residual function return it under another name."
                )
        if not self.aux:
            return
        if not outermost(self.net):
            raise SchemeError(
                f"{name}: aux is {dict(self.aux)}, and {type(self.net).__name__} has no Stack, whose residual "
                "functions would return such values.\n  Leave aux out, or build the net of stacks."
            )
        returning(self.net, [key for key in ENERGIES if key in self.aux])

    def name_parts(self, names: Iterable[str]) -> None:
        """Checks that no part of the loss is logged under the name of an auxiliary value.

        Args:
            names: of the parts.

        Raises:
            SchemeError: a part has such a name.
        """
        for name in names:
            if name in self.aux:
                raise SchemeError(
                    f"{type(self).__name__}: an auxiliary value named {name!r} would be logged as train/{name}, which "
                    "is a part of the loss.\n  Let the residual function return it under another name."
                )

    @contextmanager
    def auxiliary_loss(self, samples: int) -> Iterator[list[Tensor]]:
        """Wraps a training forward pass; yields a list that, on exit, holds the terms to add to the loss.

        Each value is summed over all calls, averaged over samples if it has one per sample, and multiplied by its
        weight. The values are logged without their weights, as train/NAME.

        Args:
            samples: in the batch, by which the mean over an epoch is weighted.

        Raises:
            SchemeError: on exit, a value that no residual function returned.
        """
        terms: list[Tensor] = []
        if not self.aux:
            yield terms
            return
        with gathered(self.net, list(self.aux)) as values:
            yield terms
        for key, value in values.items():
            mean = value.mean()
            self.log(f"train/{key}", mean.detach(), on_step=False, on_epoch=True, batch_size=samples, sync_dist=True)
            terms.append(self.aux[key] * mean)

    def on_train_epoch_end(self) -> None:
        # Read after the forward passes: a continuous-depth net only knows its count once it has run.
        count = evaluations(self.net)
        if count:
            self.log("evaluations", float(count), sync_dist=True)
        for name, figure in solver_figures(self.net).items():
            self.log(name, figure, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        keep_states(self.trainer, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # The callbacks that have moved them may not be there, and never are in load_from_checkpoint.
        as_trained(self, checkpoint)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:  # type: ignore[override]
        """Loads the module of a checkpoint; one built in Python needs its parts: `net=...`, `optimizer=...`."""
        kwargs.setdefault("weights_only", True)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
