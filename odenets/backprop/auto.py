"""Mode "auto": the fastest plan that fits, chosen at the first training pass."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from schemes.scheme import Scheme, State

from .choice import Limits
from .modes import FAMILIES, Exact, Mode
from .replay import stream_precision
from .sizes import format_size
from .walk import Pass, has_no_values, needs_graph


@dataclass(frozen=True)
class Auto(Limits, Mode):
    """The fastest plan that fits: chosen at the first training pass, from the memory and the time of each step.

    Example:
        >>> from odenets.backprop import parse_mode
        >>> parse_mode("auto(memory=2GiB)").memory, str(Auto(memory="1.5GB"))
        (2048.0, 'auto(memory=1.5GB)')
    """

    alone = True

    @property
    def rounds(self) -> bool:  # type: ignore[override]
        """Whether its choice may round: inside a reversed step it is made before the run that is differentiated."""
        return self.exact

    def options(self) -> dict[str, Any]:
        """The arguments that differ from their defaults, as they are written."""
        found = super().options()
        return found if self.memory is None else {**found, "memory": format_size(self.memory)}

    def check(self, scheme: Scheme, post_step: nn.Module | None) -> None:
        """Refuses exact arithmetic where the scheme cannot run in it; everything else is left to the choice."""
        from . import uncompiled as uncompiled  # not within a trace: see _ByInverse.check

        if self.exact:
            Exact().check(scheme, post_step)

    def run(self, given: Pass, state: State) -> State:
        """The state after the last step."""
        if given.post_step is None and all(s.scheme.reversible_in_training for s in given.steps):
            state = stream_precision(state)  # so that the output's dtype does not depend on the choice
        # Cases in which nothing would be kept, or nothing can be measured: tensors of torch.func have no storage of
        # their own, and there is no backward pass for dual numbers and batches of gradients.
        inside = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        if not self.needed or inside or not _measurable(state):
            return given.keep(state)
        from .uncompiled import plan_for

        with nullcontext() if needs_graph() else torch.enable_grad():  # a pass that will be differentiated is measured
            plan = plan_for(self, given, state)  # type: ignore[reportCallIssue]
        return plan.run(given, state)


def _measurable(state: State) -> bool:
    """Whether the streams take memory that can be counted."""
    return not has_no_values(state) and all(x.layout is torch.strided for x in state)


FAMILIES["auto"] = Auto
