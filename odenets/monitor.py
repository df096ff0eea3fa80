"""What a stack learns of its own reconstruction: how errors grow on the way back, what drifted, where anchors go."""

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from schemes.errors import SchemeError
from schemes.scheme import State

from . import checks
from .backprop import Figure, Tape, distance
from .exact import Grid
from .modes import Exact, Reverse
from .undo import Call, autocast_as, autocast_now, call_of, done, in_single_precision, made, undone

if TYPE_CHECKING:
    from .stack import Stack
    from .step import Step

# Relative error of states made again that automatic anchors keep to.
BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-5}
DRIFT_LIMIT = 1e-3
GROWTH_LIMIT = 10.0  # of one step, in a diagnosis
WINDOW = 8  # steps that the measurement of growth runs forward and back


class Trial:
    """Runs steps forward or back without a graph, to measure how they reconstruct."""

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}
        self.back = False

    def advance(self, step: "Step", state: State, shared: nn.Module | None, t: Any, context: Any) -> State:
        """The step, or the step undone that this object has seen before."""
        with torch.no_grad():
            if self.back:
                return undone(self.calls[step.index], state)
            call = self.calls[step.index] = call_of(step, state, shared, t, context)
            with autocast_as(call.autocast):
                return done(call, state)


class Monitor:
    """What a stack learns of its own reconstruction: how often it needs anchors, and how far it drifts.

    Attributes:
        every: the spacing of anchors that was chosen, None for no anchors.
        growth: factor by which a rounding error grows per step undone, as measured.
        drift: relative error of made-again states in the last backward pass whose figure has arrived.
    """

    def __init__(self) -> None:
        self.every: int | None = None
        self.growth: float | None = None
        self.drift: float | None = None
        self._pending: list[Figure] = []
        self._over: list[Figure] = []
        self._warned = False

    def __deepcopy__(self, memo: Any) -> "Monitor":
        return Monitor()

    def __reduce__(self) -> Any:
        return Monitor, ()

    def run(
        self,
        stack: "Stack",
        how: Reverse | Exact,
        state: State,
        time: Any,
        context: Any,
        states: list[State] | None = None,
    ) -> State:
        """The steps of a stack on a new tape; ``states`` collects the state after each."""
        if torch._C._are_functorch_transforms_active():
            raise SchemeError("Stack: torch.func transforms cannot pass backprop='reverse'; use backprop='store'.")
        if any(enabled for _, enabled, _ in autocast_now(state)):
            state = in_single_precision(state)
        if isinstance(how, Exact):
            _refuse_compiled(stack)
            self._read(None, len(stack.steps))
            grid = Grid(how.bits, state[0].dtype)
            state = tuple(grid.round(x) for x in state)
            tape = Tape(1 if how.store else None, True, grid)
        else:
            tape = Tape(self._anchors(stack, how, state, time, context), how.drift)
        for step in stack.steps:
            state = step(state, stack.block, time, context, None, tape)
            if states is not None:
                states.append(state)
            if isinstance(how, Reverse) and how.check_finite:
                _check_finite(step, state)
            if time is not None:
                time = time + step.scheme.span * step.h
        tape.close(state)
        tape.report = self._pending if tape.keep_first else None
        if tape.grid is not None:
            self._over.append(Figure.of(tape.over(state)))
            if not state[0].is_cuda:  # elsewhere the figure is read at the next pass, without waiting for it
                self._read(None, len(stack.steps))
        return state

    def _anchors(self, stack: "Stack", how: Reverse, state: State, time: Any, context: Any) -> int | None:
        """The spacing of anchors, given or chosen."""
        steps = len(stack.steps)
        bound = float(how.bound or BOUNDS.get(state[0].dtype, 1e-5))
        auto = how.every is None and how.memory is None
        self._read(bound if auto else None, steps)
        if how.memory is not None:
            size = sum(x.numel() * x.element_size() for x in state) / 2**20
            return max(1, -(-steps // max(1, int(float(how.memory) / size))))
        if how.every is not None:
            return how.every or None
        if self.growth is None:
            self._measure(stack, state, time, context, bound)
        return self.every

    def _measure(self, stack: "Stack", state: State, time: Any, context: Any, bound: float) -> None:
        """Runs all steps forward and back, some at a time, and spaces anchors by how errors grow on the way back."""
        trial, windows = Trial(), []
        n, depth = 0, len(stack.steps)
        with torch.no_grad(), checks.nothing_changed(stack, always=True):
            state = tuple(x.detach() for x in state)
            while n < depth:
                states, first, trial.back = [state], n, False
                # A step that makes streams drops their errors, so it is looked at by itself.
                while n < depth and n - first < WINDOW and (n == first or not made(stack.steps[n - 1])):
                    state = stack.steps[n](state, stack.block, time, context, None, trial)
                    states.append(state)
                    time = None if time is None else time + stack.steps[n].scheme.span * stack.steps[n].h
                    n += 1
                windows.append(_window(stack, trial, first, states))
        lengths = [len(errors) for _, errors in windows]
        growths = [growth for growth, _ in windows]
        self.growth = math.inf
        if max(growths) < math.inf:
            self.growth = math.exp(sum(n * math.log(g) for n, g in zip(lengths, growths, strict=True)) / depth)
        self.every = _spacing(windows, bound)

    def _read(self, bound: float | None, depth: int) -> None:
        """Reads what earlier passes found, where the device has it ready: overflow, drift. Warns of drift once.

        With a bound, anchors are moved closer together where the drift is above it.
        """
        while self._over and self._over[0].ready():
            if bool(self._over.pop(0).value):
                self._over.clear()
                raise SchemeError(
                    "Stack: a stream left the range in which backprop='exact' adds without rounding; "
                    "use fewer binary places, such as backprop='exact(bits=10)', or normalise the streams."
                )
        while self._pending and self._pending[0].ready():
            figure = self._pending.pop(0)
            self.drift = float(figure.value)
            if figure.exact and self.drift != 0.0:
                raise SchemeError(
                    f"Stack: backprop='exact' made a state again that is {self.drift:.1e} off: a function gives "
                    "other values the second time. Make it deterministic, or use backprop='reverse'."
                )
            if bound is not None and self.drift > 3 * bound and self.every != 1:
                # Learned scales move during training, and the growth of errors with them.
                self.every = max(1, (self.every or depth) // 2)
            if self.drift <= DRIFT_LIMIT:
                continue
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"Stack: states made again by the inverse are {self.drift:.1e} off (relative), so gradients are "
                    "too; run Stack.diagnose(x) to see where, and keep more states: backprop='reverse(every=k)'.",
                    stacklevel=5,
                )


def _window(stack: "Stack", trial: Trial, first: int, states: list[State]) -> tuple[float, list[float]]:
    """Undoes the steps that ``trial`` has just run: how much a step grows an error, and the error after 1, 2, ..."""
    length, trial.back = len(states) - 1, True
    back = states[-1]
    largest = torch.stack([x.square().mean() for x in back]).max().sqrt()
    # Of one size in all streams: what grows fastest may sit in a small one.
    moved = tuple(x + torch.finfo(x.dtype).eps ** 0.5 * largest * torch.randn_like(x) for x in back)
    distances, errors = [float(distance(moved, back))], []
    for n in reversed(range(length)):
        step = stack.steps[first + n]
        back = step(back, stack.block, None, None, None, trial)
        moved = step(moved, stack.block, None, None, None, trial)
        distances.append(float(distance(moved, back)))
        errors.append(float(distance(back, states[n])))
    if not all(math.isfinite(d) for d in (*distances, *errors)):
        return math.inf, [math.inf] * length
    half = length // 2  # until here the error turns into the direction that grows most
    return max(1.0, (distances[-1] / max(distances[half], 1e-300)) ** (1 / (length - half))), errors


def _spacing(windows: list[tuple[float, list[float]]], bound: float) -> int | None:
    """The largest number of steps between anchors that keeps the error below the bound; None for no anchors.

    Each window is its growth a step, and its errors after 1, 2, ... steps undone, as measured. Beyond one window the
    error that comes from above grows by the window's growth, and the window's own is added.
    """
    for k in range(WINDOW):
        if not max((errors[k] for _, errors in windows if k < len(errors)), default=0.0) <= bound:
            return max(1, k)
    sums = [errors[-1] for _, errors in windows]
    for length in range(1, len(windows)):
        for top in range(length, len(windows)):
            growth, errors = windows[top - length]
            sums[top] = errors[-1] + growth ** len(errors) * sums[top]
            if not sums[top] <= bound:
                return length * WINDOW
    return None


def _check_finite(step: "Step", state: State) -> None:
    for i, x in enumerate(state):
        if not torch.isfinite(x).all():
            raise SchemeError(f"{step.scheme}, step {step.index}: stream {i} is not finite after this step.")


def _refuse_compiled(stack: "Stack") -> None:
    for step in stack.steps:
        for name, m in step.named_modules():
            if m._compiled_call_impl is not None or type(m).__name__ == "OptimizedModule":
                raise SchemeError(
                    f"Stack: steps.{step.index}.{name} is compiled, and compiled code rounds differently with and "
                    "without gradients; backprop='exact' needs it eager, or use backprop='reverse'."
                )


class StepReport(NamedTuple):
    """One step in a diagnosis.

    Attributes:
        step: its number.
        scheme: its scheme.
        finite: whether its streams are finite after it.
        drift: relative error of the state that its inverse makes again.
        growth: by how much its inverse grows a relative error of the state.
    """

    step: int
    scheme: str
    finite: bool
    drift: float
    growth: float


class Diagnosis(NamedTuple):
    """What ``Stack.diagnose`` returns: a record for each step; printed, a table that names the guilty one."""

    steps: list[StepReport]

    @property
    def predicted(self) -> float:
        """Relative error of the first state, made again from the last one without anchors."""
        error = 0.0
        for r in reversed(self.steps):
            error = r.drift + r.growth * error
        return error

    @property
    def guilty(self) -> StepReport | None:
        """The first step that is not finite, else the one that grows errors most, if they grow too much."""
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


def diagnose(stack: "Stack", start: Callable[[], State], time: Any, context: Any) -> Diagnosis:
    """Runs each step forward and back, without gradients; statistics and generators stay as they are."""
    trial, records = Trial(), []
    with torch.no_grad(), checks.nothing_changed(stack, always=True):
        state = start()
        for step in stack.steps:
            trial.back = False
            after = step(state, stack.block, time, context, None, trial)
            growth, (drift,) = _window(stack, trial, step.index, [state, after])
            finite = all(bool(torch.isfinite(x).all()) for x in after)
            records.append(StepReport(step.index, str(step.scheme), finite, drift, growth))
            state = after
            time = None if time is None else time + step.scheme.span * step.h
    return Diagnosis(records)
