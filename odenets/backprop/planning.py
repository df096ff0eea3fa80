"""Measures a model that contains stacks, and reports the cost of their plans."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from schemes.errors import SchemeError
from schemes.scheme import State

from .auto import Auto
from .choice import (
    LOSS,
    Marked,
    Measured,
    Report,
    Row,
    budget,
    chosen,
    end_of,
    fastest,
    pieces_of,
    segments_of,
    ways_for,
)
from .meter import Interval, Meter, meter_on
from .modes import Mode, Plan
from .plan import Chain, Cost, Piece, Profile
from .replay import stream_precision
from .sizes import mebibytes
from .surroundings import initialise, nothing_changed
from .survey import Namer, aside, surveyed, unseen, wait
from .walk import Pass


class _Surveying(Mode):
    """Measures the steps of a stack instead of running them."""

    def __init__(self, planning: "Planning", name: str):
        self.planning, self.stack = planning, name

    def run(self, given: Pass, state: State) -> State:
        """The state after the last step, detached."""
        return self.planning.measure(self.stack, given, state)


class Planning:
    """The measurement of a model, and the plans and the report that follow from it.

    Args:
        model: the model.
        stacks: its stacks, by name, none inside another.
        args: its input.
        kwargs: further arguments.
    """

    def __init__(self, model: nn.Module, stacks: Mapping[str, Any], args: Sequence[Any], kwargs: Mapping[str, Any]):
        self.model, self.stacks, self.args, self.kwargs = model, dict(stacks), args, dict(kwargs)
        if not self.stacks:
            raise SchemeError(f"plan: there is no Stack in this {type(model).__name__}, or none whose steps are fixed.")
        tensors = [x for x in pytree.tree_leaves((args, self.kwargs)) if isinstance(x, Tensor)]
        if not tensors:
            raise SchemeError("plan: there is no tensor among the arguments; give an input of the size of training.")
        initialise(model, lambda: model(*args, **kwargs))  # a lazy parameter has no storage to be named
        self.device = next((p.device for p in model.parameters()), tensors[0].device)
        self.namer = Namer([*model.parameters(), *model.buffers(), *tensors])
        self.profiles: list[Profile] = []
        self.outside: dict[int, int] = {}
        self.measured: dict[str, tuple[int, Measured]] = {}  # the place of a stack's first step, and its measurement
        self.modes: dict[str, Mode] = {name: stack.backprop for name, stack in self.stacks.items()}

    def report(self, memory: float | str | None) -> Report:
        """The plan, predicted and measured."""
        auto = None if memory is None else Auto(memory=mebibytes(memory, "plan(memory)"))
        if auto is not None:
            # The other limits of a stack's own "auto" hold for this memory too.
            own = {name: mode if isinstance(mode, Auto) else auto for name, mode in self.modes.items()}
            self.modes = {name: replace(mode, memory=auto.memory) for name, mode in own.items()}
            auto = replace(auto, exact=any(mode.exact for mode in own.values()))
        end = self._survey()
        chain = Chain(self.profiles, end)
        if auto is not None:
            pieces = fastest(chain, auto, auto.memory * 2**20, min(m.bound for _, m in self.measured.values()))
            plans = self._split(pieces)
        else:
            plans = {name: self._in_use(name, stack) for name, stack in self.stacks.items()}
        found = Report([], plans, 0, 0.0, None if auto is None else auto.memory * 2**20, stacks=dict(self.stacks))
        marks = self._run(found)
        self._fill(found, chain, marks)
        for name, mode in self.modes.items():
            if not isinstance(mode, (Plan, Auto)):
                self.stacks[name].monitor.forget_parts()
        return found

    # Measuring

    def _survey(self) -> int:
        """Runs the model once, measuring its stacks; returns the bytes that its loss takes."""
        # The stacks are measured when the model calls them, since only then their input is known.
        modes = {name: _Surveying(self, name) for name in self.stacks}
        with torch.enable_grad(), nothing_changed([self.model], True, (self.args, self.kwargs)), self._set(modes):
            # Inside a stack, the survey's hooks are on top of these, so what is noted here was saved outside of stacks.
            with self.namer.saving(self.outside):
                outputs = self.model(*self.args, **self.kwargs)
            outputs = [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor)]
            self._pass_by(outputs)
        missing = [name for name in self.stacks if name not in self.measured]
        if missing:
            raise SchemeError(f"plan: the stack {missing[0]!r} was not called by the model's forward pass.")
        return LOSS * sum(x.nbytes for x in outputs if x.requires_grad)

    def measure(self, name: str, given: Pass, state: State) -> State:
        """Measures a stack; the state after its last step, detached."""
        if name in self.measured:
            raise SchemeError(f"plan: the stack {name!r} is called twice, which no plan counts: plan its own calls.")
        mode = self.modes[name]
        if isinstance(mode, Auto) or mode.by_inverse:
            # As the mode itself does before its first step; sizes in half precision would be half the true ones.
            state = stream_precision(state)
        self._pass_by(state)
        # Storing comes first, since the costs of the other ways are derived from it.
        ways = ["store", *dict.fromkeys(ways_of(mode, state))]
        survey, out = surveyed(given, state, self.namer, ways, 0.0)
        auto = mode if isinstance(mode, Auto) else Auto()
        own = Measured(auto, survey, end_of(given, out), ())
        own.memory = budget(auto, self.device) if isinstance(mode, Auto) else float("inf")
        self.measured[name] = len(self.profiles), own
        self.profiles += survey.steps
        return out

    def _pass_by(self, tensors: Sequence[Tensor]) -> None:
        """Adds a profile for what the model has saved outside of stacks since the last stack."""
        before = self.profiles[-1].after if self.profiles else {}
        saved = dict(self.outside)
        # Emptied and not replaced, since the hooks write into this dictionary.
        self.outside.clear()
        nothing = Cost(0.0, 0.0, 0, 0, 0)
        self.profiles.append(Profile(before, self.namer.names(tensors), saved, {"fixed": nothing}, ends=True))

    # Choosing

    def _in_use(self, name: str, stack: Any) -> Plan:
        """The plan that a stack's present mode amounts to; "auto" chooses one if it has none for this input."""
        mode, count = self.modes[name], len(stack.steps)
        if isinstance(mode, Plan):
            return mode
        if not isinstance(mode, Auto):
            return Plan(((count, mode),))
        own = self.measured[name][1]
        state = own.survey.start
        return chosen(mode, own.survey.given, state, lambda: own)

    def _split(self, pieces: Sequence[Piece]) -> dict[str, Plan]:
        plans = {}
        for name, (first, own) in self.measured.items():
            last = first + len(own.survey.steps)
            plans[name] = Plan(tuple(segments_of([p for p in pieces if first <= p.first < last])))
        return plans

    # Running

    def _run(self, found: Report) -> list[Interval]:
        """Measures a pass under the plans; returns the intervals between the marks, at the start and after segments."""
        with (
            nothing_changed([self.model], True, (self.args, self.kwargs)),
            torch.enable_grad(),
            aside([self.model]) as stand,
            unseen(),
        ):
            args, kwargs = pytree.tree_map(_alone, (self.args, self.kwargs))
            inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.requires_grad]

            def once() -> None:
                outputs = [x for x in pytree.tree_leaves(self.model(*args, **kwargs)) if isinstance(x, Tensor)]
                loss = sum(x.square().mean() for x in outputs if x.requires_grad)
                del outputs
                if not isinstance(loss, Tensor):
                    raise SchemeError(
                        "plan: no output needs a gradient, so there is no training to be measured.\n"
                        "  Give an input that needs one, or parameters that are not frozen."
                    )
                # Into the replacements only: the model's own gradients are untouched, and their hooks do not run.
                loss.backward(inputs=[x for x in (*inputs, *stand.leaves) if x.requires_grad])  # type: ignore[union-attr]

            with self._set(found.plans):
                once()  # a warm-up: what is set up in the first pass does not count
            with meter_on(self.device) as meter, self._set({k: marked(p, meter) for k, p in found.plans.items()}):
                meter.mark()
                once()
            with self._set(found.plans):
                wait(self.device)
                # In a separate pass, since the meter slows operations down, and its marks would add to the time.
                begin = time.perf_counter()
                once()
                wait(self.device)
            found.measured, found.measured_seconds = meter.peak, time.perf_counter() - begin
            for x in inputs:
                x.grad = None
        drifts = [d for stack in self.stacks.values() if (d := stack.monitor.drift) is not None]
        found.drift = max(drifts, default=None)
        return meter.intervals

    @contextmanager
    def _set(self, modes: Mapping[str, Mode]) -> Iterator[None]:
        before = {name: self.stacks[name].backprop for name in modes}
        try:
            for name, mode in modes.items():
                self.stacks[name].backprop = mode
            yield
        finally:
            for name, mode in before.items():
                self.stacks[name].backprop = mode

    # Reporting

    def _fill(self, found: Report, chain: Chain, marks: Sequence[Interval]) -> None:
        starts = {first: name for name, (first, _) in self.measured.items()}
        pieces: list[Piece] = []
        segments: list[tuple[str, Mode, int, int, int]] = []  # stack, mode, first step, its pieces from and to
        place = 0
        while place < len(self.profiles):
            name = starts.get(place)
            if name is None:
                # Between stacks there is nothing to choose, but what the model saves there takes memory.
                pieces.append(chain.piece(place, place + 1, "fixed"))
                place += 1
                continue
            plan, first = found.plans[name], place
            survey = self.measured[name][1].survey
            own = pieces_of(chain, plan, place, self.stacks[name].monitor, survey.refused)
            for (count, mode), run in zip(plan.segments, own, strict=True):
                segments.append((name, mode, place - first, len(pieces), len(pieces) + len(run)))
                pieces += run
                place += count
        outcomes, found.predicted = chain.outcomes(pieces)
        # A mark begins an interval; the first was set before the model ran, the others at the end of each segment.
        ends = iter(marks[1:])
        for name, mode, step, a, b in segments:
            run, mark = outcomes[a:b], next(ends, None)
            seconds = sum(o.piece.time for o in run)
            peak, error = max(o.peak for o in run), max(o.piece.error for o in run)
            last = step + sum(o.piece.last - o.piece.first for o in run) - 1
            measured = None if mark is None else mark.start
            found.rows.append(Row(name, step, last, str(mode), run[-1].live, measured, peak, seconds, error))
        found.seconds = sum(row.seconds for row in found.rows)


def ways_of(mode: Mode, state: State) -> list[str]:
    """The ways in which steps may be run under a mode."""
    if isinstance(mode, Plan):
        return [way for _, part in mode.segments for way in ways_of(part, state)]
    if isinstance(mode, Auto):
        return ways_for(mode, state)
    return [type(mode).__name__.lower()]


def marked(plan: Plan, meter: Meter) -> Plan:
    """The plan, with a mark at the end of each segment."""
    return Plan(tuple((count, Marked(mode, meter)) for count, mode in plan.segments))


def _alone(x: Any) -> Any:
    return x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
