"""Spacing of anchors, from the growth of errors when steps are undone, measured by running them forward and back."""

import math
from typing import Any

import torch
from torch import nn

from schemes.scheme import State

from ..step import Step, Wrap
from .agreement import agreed
from .members import Members, hooks_set_aside
from .monitor import distance
from .replay import StepRecord, as_leaves, autocast_as, invert_step, members_of, run_step
from .surroundings import nothing_changed
from .walk import Pass

# Largest relative error of reconstructed states that automatic anchors allow.
BOUNDS = {torch.float64: 1e-11, torch.complex128: 1e-11}
WINDOW = 8  # steps that the measurement of growth runs forward and back in one go


class Trial:
    """Runs steps without a graph, and undoes them, to measure how they reconstruct."""

    def __init__(self, inverted: bool = False, wrap: Wrap | None = None) -> None:
        self.records: dict[int, StepRecord] = {}
        self.inverted, self.wrap = inverted, wrap

    def run(self, step: Step, state: State, shared: nn.Module | None, t: object, context: object, h: object) -> State:
        """The state after the step."""
        record = self.records[step.index] = StepRecord(
            step, state, shared, t, context, members_of(step, shared), inverted=self.inverted
        )
        # A function that asks for a graph may do something that fails without one, such as to register a hook.
        if record.members.asks:
            state = as_leaves(state)
        with torch.set_grad_enabled(record.members.asks), autocast_as(record.autocast):
            return tuple(x.detach() for x in run_step(record, state, self.wrap))

    def invert(self, step: Step, state: State, *given: object) -> State:
        """The state before the step, which must have been run before."""
        return invert_step(self.records[step.index], state)


def growth_of(steps: list[Step], trial: Trial, states: list[State]) -> tuple[float, list[float]]:
    """The factor by which undoing one of some steps grows an error, and the errors after undoing 1, 2, ... of them.

    Args:
        steps: steps that ``trial`` has just run.
        trial: the trial that ran them.
        states: the states before the first step and after each.
    """
    length, back = len(steps), states[-1]
    largest = torch.stack([x.abs().square().mean() for x in back if x.numel()] or [torch.ones(())]).max().sqrt()
    # The perturbation has the same size in all streams, since the direction that grows fastest may lie in a small one.
    # The root of the machine precision is far above rounding, yet small enough for the inverse to act linearly.
    moved = tuple(x + torch.finfo(x.dtype).eps ** 0.5 * largest * torch.randn_like(x) for x in back)
    # ``moved`` against ``back`` shows the growth of an error, ``back`` against the true states the error itself.
    distances, errors = [float(distance(moved, back))], []
    for n in reversed(range(length)):
        back, moved = (steps[n](x, runner=trial.invert) for x in (back, moved))
        distances.append(float(distance(moved, back)))
        errors.append(float(distance(back, states[n])))
    if not all(math.isfinite(d) for d in (*distances, *errors)):
        return math.inf, [math.inf] * length
    # The rate leaves out the first half, in which the random error turns into the direction that grows most.
    half = length // 2
    return max(1.0, (distances[-1] / max(distances[half], 1e-300)) ** (1 / (length - half))), errors


def windows_of(given: Pass, state: State) -> list[tuple[float, list[float]]]:
    """The growth over all steps, window by window; buffers and generators stay as they are."""
    modules = [*given.steps, *([given.shared] if given.shared else [])]
    try:
        with hooks_set_aside(Members(modules).modules):
            return _windows_of(given, state, modules)
    except Exception:  # a function may depend on its hooks
        return _windows_of(given, state, modules)


def _windows_of(given: Pass, state: State, modules: list[nn.Module]) -> list[tuple[float, list[float]]]:
    # ``wrap`` has the checks of a first call, which is still to come: what does not fit raises their messages.
    trial, found = Trial(given.inverted, given.wrap), []
    steps: list[Step] = []
    states = [state]

    def on_step(n: int, state: State) -> None:
        step = given.steps[n - given.first]
        steps.append(step)
        states.append(state)
        # Undoing a step that appends streams drops their errors, so a window ends after it.
        if len(steps) == WINDOW or step.scheme.streams_added or step is given.steps[-1]:
            found.append(growth_of(steps, trial, states))
            steps.clear()
            states[:] = states[-1:]

    with torch.no_grad(), nothing_changed(modules, True, (given.time, given.context)):
        given._replace(on_step=on_step, wrap=None).walk(state, trial.run)
    return found


def measure(given: Pass, state: State, bound: float) -> None:
    """Runs all steps forward and back, and sets the monitor's spacing of anchors.

    With several processes, all adopt the spacing of the first to finish measuring.
    """

    def decide() -> dict[str, Any]:
        windows = windows_of(given, tuple(x.detach() for x in state))
        weighted = [(growth, len(errors)) for growth, errors in windows]
        # A batch that is not finite decides only for itself: the next pass measures again.
        finite = max(g for g, _ in weighted) < math.inf
        # A geometric mean over steps, since the growths of successive steps multiply.
        mean = math.exp(sum(n * math.log(g) for g, n in weighted) / len(given.steps)) if finite else None
        return {"every": _spacing(windows, bound), "growth": mean}

    found = agreed(("anchors", bound), given.steps, state, decide)
    given.monitor.every, given.monitor.growth = found["every"], found["growth"]
    given.monitor.asked = asked_for(given, bound)


def asked_for(given: Pass, bound: float) -> list[float]:
    """What the spacing of a pass depends on besides the values of its steps."""
    return [bound, float(given.steps[0].index), float(len(given.steps))]


def _spacing(windows: list[tuple[float, list[float]]], bound: float) -> int | None:
    """The largest number of steps between anchors that keeps the error below the bound; None for no anchors.

    Each window consists of its growth per step, and its measured errors after undoing 1, 2, ... steps. Beyond one
    window, the error that arrives from above is multiplied by the window's growth, and the window's own error is added.
    """
    # Within a window the errors were measured step by step, so anchors this close need no model of growth.
    for k in range(WINDOW):
        if not max((errors[k] for _, errors in windows if k < len(errors)), default=0.0) <= bound:
            return max(1, k)
    sums = [errors[-1] for _, errors in windows]
    # After round ``length``, sums[top] is the error of undoing windows top, top - 1, ..., top - length in one go.
    for length in range(1, len(windows)):
        for top in range(length, len(windows)):
            growth, errors = windows[top - length]
            sums[top] = errors[-1] + growth ** len(errors) * sums[top]
            if not sums[top] <= bound:
                # length + 1 windows in one go exceed the bound; any ``length`` of them do not.
                return length * WINDOW
    return None
