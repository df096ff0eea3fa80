"""Reports on each step of a stack under inversion: which is not finite, which drifts, which amplifies errors."""

from typing import NamedTuple

import torch

from schemes.scheme import State

from .anchors import Trial, growth_of
from .monitor import DRIFT_LIMIT
from .walk import Pass

GROWTH_LIMIT = 10.0  # of one step


class StepReport(NamedTuple):
    """One step in a diagnosis.

    Attributes:
        step: its number.
        scheme: its scheme.
        finite: whether its streams are finite after it.
        drift: relative error of the state that its inverse reconstructs.
        growth: factor by which its inverse grows a relative error of the state.
    """

    step: int
    scheme: str
    finite: bool
    drift: float
    growth: float


class Diagnosis(NamedTuple):
    """The result of ``Stack.diagnose``: a report for each step; prints as a table that names the guilty one.

    Args:
        steps: a report for each step, in order.
    """

    steps: list[StepReport]

    @property
    def predicted(self) -> float:
        """Predicted relative error of the first state, reconstructed from the last one without anchors."""
        error = 0.0
        for r in reversed(self.steps):
            error = r.drift + r.growth * error
        return error

    @property
    def guilty(self) -> StepReport | None:
        """The first step that is not finite; else the one that grows errors most, if errors grow too much."""
        for r in self.steps:
            if not r.finite:
                return r
        worst = max(self.steps, key=lambda r: r.growth)
        return worst if worst.growth > GROWTH_LIMIT or self.predicted > DRIFT_LIMIT else None

    def __str__(self) -> str:
        lines = [
            f"step {r.step:3d}  {r.scheme}: finite {r.finite}, drift {r.drift:.1e}, growth {r.growth:.3g}"
            for r in self.steps
        ]
        g = self.guilty
        lines.append("no step stands out" if g is None else f"look at step {g.step} ({g.scheme})")
        return "\n".join(lines)


def diagnose(given: Pass, state: State) -> Diagnosis:
    """Runs each step forward and back without gradients; statistics and generators stay as they are."""
    trial, reports, before = Trial(wrap=given.wrap), [], [state]

    def on_step(n: int, state: State) -> None:
        step = given.steps[n]
        # Step by step, although windows measure growth better: the report has to name the guilty step.
        growth, (drift,) = growth_of([step], trial, [before[0], state])
        finite = all(bool(torch.isfinite(x).all()) for x in state)
        reports.append(StepReport(n, str(step.scheme), finite, drift, growth))
        # Only the last two states are alive, whatever the depth of the stack.
        before[0] = state

    given._replace(on_step=on_step, wrap=None).walk(state, trial.run)
    return Diagnosis(reports)
