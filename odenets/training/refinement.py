"""Training by refinement: a network whose weights are functions of depth starts coarse, and is refined in training."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from schemes import SchemeError

from ..continuous import fields_of
from ..knots import mapped
from ..rebuild import continuous_stacks
from .classifier import evaluations
from .steps import as_refined, refine, refinements

Moments = Literal["map", "reset"]
# The states of squared gradients: of Adam and its variants, AMSGrad, RMSprop, Adagrad, Adadelta.
SQUARED = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta"}


class Refinement(Callback):
    """Doubles knots and steps of all continuous stacks at given epochs, and optionally changes their scheme.

    New knots leave the weights unchanged as functions of depth, and the optimiser's state follows the change of basis.
    The loss then changes only by the effect of the finer steps on the scheme's error, and not at all if only knots are
    added. Logs `evaluations_spent`, the calls of residual functions in training so far, per sample and in 10^6: the
    cost by which multi-level training is compared. Without epochs it counts, and changes nothing.

    Args:
        at: Epochs, from 0, at whose start the network is refined.
        knots: Factor of the number of intervals each time; 1 leaves it.
        depth: Factor of the number of steps each time; 1 leaves it.
        schemes: One scheme per epoch of `at`, where an empty string keeps the current one; None keeps the scheme
            throughout.
        moments: "map" maps first moments as the coefficients, and second moments by the squared entries of that map;
            "reset" sets both to zero.

    Raises:
        SchemeError: Epochs that do not increase, factors below 1, or a wrong number of schemes; and when training
            begins, a net without continuous stacks, several processes, or averaged weights.

    Source:
        Chang et al. 2018, Multi-level Residual Networks from Dynamical Systems View, arXiv 1710.10348.
    """

    def __init__(
        self,
        at: Sequence[int] = (),
        knots: int = 2,
        depth: int = 2,
        schemes: Sequence[str] | None = None,
        moments: Moments = "map",
    ) -> None:
        if any(b <= a for a, b in zip([0, *at], at, strict=False)):
            raise SchemeError(f"Refinement: at is {[*at]}, want rising epochs from 1 on")
        if min(knots, depth) < 1:
            raise SchemeError(
                f"Refinement: factors {knots} of knots and {depth} of steps, want whole numbers from 1 on"
            )
        if schemes is not None and len(schemes) != len(at):
            raise SchemeError(f"Refinement: {len(schemes)} schemes for {len(at)} epochs, want one each, or none")
        self.at, self.knots, self.depth = tuple(at), knots, depth
        self.schemes = None if schemes is None else tuple(schemes)
        self.moments: Moments = moments
        self.done, self.spent = 0, 0.0
        self.steps: list[tuple[str, int]] = []  # of each refinement that is done: its scheme and factor

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.at:
            return
        if not continuous_stacks(pl_module):
            raise SchemeError(
                "Refinement: the net has no weights that are functions of depth\n  Build it with continuous=8."
            )
        if trainer.world_size > 1:
            raise SchemeError(
                "Refinement: parameters change their shapes, which processes that share gradients do not follow\n"
                "  Train in one process."
            )
        if any(isinstance(c, WeightAveraging) for c in trainer.callbacks):  # pyright: ignore
            raise SchemeError("Refinement: averaged weights keep their shapes\n  Drop one of the two callbacks.")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        while self.done < len(self.at) and self.at[self.done] <= trainer.current_epoch:
            if self.knots > 1:
                maps = refine_knots(pl_module, self.knots)
                for optimizer in trainer.optimizers:
                    follow(optimizer, maps, self.moments)
            self.steps.append(self._numbered(self.done))
            refine(pl_module, *self.steps[-1])
            self.done += 1
            shown = [f"{s.scheme} x {s.depth}" for s in continuous_stacks(pl_module).values()]
            rank_zero_info(f"epoch {trainer.current_epoch}: refined to {', '.join(dict.fromkeys(shown))}")

    def _numbered(self, number: int) -> tuple[str, int]:
        """The scheme of a refinement, "" for no other, and its factor of the number of steps."""
        return "" if self.schemes is None else self.schemes[number], self.depth

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Every process has as many samples.
        self.spent += trainer.world_size * len(batch[0]) * evaluations(pl_module.net) / 1e6  # type: ignore[arg-type]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("evaluations_spent", self.spent)

    def state_dict(self) -> dict[str, Any]:
        # Readers of the checkpoint need no configuration to build the net that was trained.
        return {"done": self.done, "spent": self.spent, "steps": [[*step] for step in self.steps]}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # The weights carry their knots; steps and scheme are those after as many refinements.
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is None:
            return
        if state["done"] > len(self.at):
            raise SchemeError(
                f"Refinement: the checkpoint was refined {state['done']} times, and at has {len(self.at)} epochs\n"
                "  Give the epochs that it was trained with."
            )
        found = refinements(checkpoint)
        self.steps = [self._numbered(n) for n in range(state["done"])] if found is None else found
        as_refined(pl_module, self.steps)
        self.done, self.spent = state["done"], state["spent"]


def refine_knots(net: nn.Module, factor: int) -> dict[nn.Parameter, Tensor]:
    """Multiplies the intervals of all fields in place, keeping the functions; returns the map of each parameter.

    Raises:
        SchemeError: knots that are not uniform.
    """
    maps: dict[nn.Parameter, Tensor] = {}
    for field in fields_of(net):
        if field.space.uniform_intervals is None:
            raise SchemeError("Refinement: the knots are not uniform, and no factor says where new ones lie.")
        matrix = field.change(field.space.refined(field.knots * factor))
        maps |= dict.fromkeys(field.coefficients().values(), matrix)
    return maps


def follow(optimizer: Optimizer, maps: Mapping[nn.Parameter, Tensor], moments: Moments = "map") -> None:
    """Maps an optimiser's state of some parameters to their new basis.

    A first moment is a direction in which the weights move: mapped by c' = T c, it moves the same functions. A second
    moment is a mean of squares: it is mapped by the squared entries of T, as for independent directions.

    Args:
        optimizer: any; its state is changed.
        maps: the map of the coefficients of each parameter, (new, old).
        moments: "map", or "reset" to zeros.
    """
    for p, matrix in maps.items():
        state = optimizer.state.get(p, {})
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[1:] != p.shape[1:]:
                continue  # step counts, or state in another form
            if moments == "reset":
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
            else:
                state[name] = mapped(matrix.square() if name in SQUARED else matrix, value)
