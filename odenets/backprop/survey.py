"""Measures a pass step by step: the memory and time of each step in each way it may be run.

Every residual function runs forward once, with a graph that is dropped as soon as its storages are named. Where plain
storing will not fit, and the scheme has an inverse, the steps are also undone twice, for the growth of errors. Time and
transient memory are measured on one step of each kind: the same scheme, modules and shapes. One step is alive at a
time. Parameters are replaced by leaves that share their memory, so that no gradient or gradient hook is touched;
buffers, attributes and generators are restored.
"""

import math
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from schemes.errors import SchemeError
from schemes.scheme import State

from ..step import Step
from .anchors import WINDOW, Trial, growth_of, windows_of
from .given import with_tensors
from .guard import learn, left_behind
from .limits import in_our_words
from .members import Members, hooks_set_aside, swapped
from .meter import Meter, meter_on
from .modes import Checkpoint, Exact, Mode, Offload, Reverse, Store
from .monitor import Monitor
from .plan import Cost, Names, Profile
from .replay import StepRecord, autocast_as, members_of, run_step
from .surroundings import nothing_changed
from .walk import Pass

MODES: dict[str, Mode] = {
    "store": Store(),
    "offload": Offload(),
    "checkpoint": Checkpoint(),
    "reverse": Reverse(every=0),
    "exact": Exact(),
}
ROUNDS, ENOUGH = 5, 0.02  # the most timed runs of a kind, and seconds after which they end; the fastest counts


class Namer:
    """Assigns each storage a number for its lifetime, and 0 to those that are not counted.

    Args:
        outside: tensors that are not counted.
    """

    def __init__(self, outside: Sequence[Tensor] = ()):
        self.known: dict[int, tuple[Any, int]] = {}
        self.count = 0
        for x in outside:
            if x.layout == torch.strided:
                # An address may be reused once its storage is gone; the weak reference tells the old from the new one.
                self.known[x.untyped_storage()._cdata] = (weakref.ref(x.untyped_storage()), 0)

    def name(self, x: Tensor) -> int:
        """The number of a tensor's storage."""
        storage = x.untyped_storage()
        found = self.known.get(storage._cdata)
        if found is None or found[0]() is not storage:
            self.count += 1
            found = self.known[storage._cdata] = (weakref.ref(storage), self.count)
        return found[1]

    def names(self, tensors: Sequence[Any]) -> dict[int, int]:
        """The storages of some tensors, by number, and their bytes."""
        found = {
            self.name(x): x.untyped_storage().nbytes()
            for x in tensors
            if isinstance(x, Tensor) and x.layout == torch.strided
        }
        # All storages that are not counted share the number 0.
        found.pop(0, None)
        return found

    @contextmanager
    def saving(self, found: dict[int, int]) -> Iterator[None]:
        """Inside, the storages of what autograd saves are added to ``found``."""

        def pack(x: Tensor) -> Tensor:
            found.update(self.names([x]))
            return x

        with saved_tensors_hooks(pack, lambda x: x):
            # Both hooks return the tensor unchanged: it is only inspected on its way into the graph.
            yield


class _Source(torch.autograd.Function):
    """A loss of some streams whose gradients are new tensors, like those of most losses."""

    @staticmethod
    def forward(ctx: Any, *streams: Tensor) -> Tensor:
        ctx.like = [(x.shape, x.dtype, x.device) for x in streams]
        return torch.zeros((), device=streams[0].device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        # Filled, not expanded: a gradient of stride 0 would take no memory, and kernels may treat it differently.
        return tuple(torch.full(s, 1.0 / max(1, s.numel()), dtype=d, device=v) for s, d, v in ctx.like)


class _Entry(torch.autograd.Function):
    """The streams before a step, as a previous step would return them: autograd's engine sums their gradients."""

    @staticmethod
    def forward(ctx: Any, *streams: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in streams)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        # The leaves get no gradients: accumulating them would count memory that a step in the middle does not take.
        return (None,) * len(grads)


def entered(state: State) -> tuple[State, State]:
    """Leaves for the streams that need a gradient, and all streams, computed from the leaves where there is one."""
    leaves = tuple(x.detach().requires_grad_() for x in state if x.requires_grad)
    behind = iter(_Entry.apply(*leaves) if leaves else ())  # type: ignore[arg-type]
    return leaves, tuple(next(behind) if x.requires_grad else x.detach() for x in state)


def differentiate(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Callable[[], None]:
    """Prepares a backward pass from the outputs to the inputs only, without other side effects."""
    wanted = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
    loss = _Source.apply(*wanted) if wanted else None
    leaves = [x for x in inputs if x.requires_grad]
    return lambda: None if loss is None or not leaves else torch.autograd.backward(loss, inputs=leaves)


class Aside(NamedTuple):
    """Replacements for what a pass reads.

    Attributes:
        leaves: the replacements of the parameters.
        context: the replacement of the context.
        time: the replacement of the time.
    """

    leaves: list[Tensor]
    context: Any
    time: Any


@contextmanager
def aside(modules: Sequence[nn.Module], context: Any = None, time: Any = None) -> Iterator[Aside]:
    """Inside, the modules hold leaves that share the memory of their parameters and drop their gradients."""
    slots = Members(modules).parameters()
    leaf_of: dict[int, Tensor] = {}
    for slot in slots:
        if id(slot.value) not in leaf_of:
            leaf = leaf_of[id(slot.value)] = slot.value.detach().requires_grad_(slot.value.requires_grad)
            if leaf.requires_grad:
                # Gradients of parameters are not counted: in training they are added to tensors that exist already.
                leaf.register_post_accumulate_grad_hook(_drop)

    context, time = with_tensors((context, time), lambda x: x.detach().requires_grad_(x.requires_grad))
    with swapped(slots, [leaf_of[id(slot.value)] for slot in slots]):
        yield Aside(list(leaf_of.values()), context, time)


def _drop(leaf: Tensor) -> None:
    leaf.grad = None


class _GraphTrial(Trial):
    """Runs steps with a graph, and undoes them."""

    def __init__(self, wrap: Any, inverted: bool):
        super().__init__(inverted)
        self.wrap = wrap

    def run(self, step: Step, state: State, shared: nn.Module | None, t: object, context: object, h: object) -> State:
        """The state after the step."""
        record = self.records[step.index] = StepRecord(
            step, state, shared, t, context, members_of(step, shared), inverted=self.inverted
        )
        with autocast_as(record.autocast):
            return run_step(record, state, self.wrap)


class Survey:
    """Measures the steps of a pass, one after the other.

    Args:
        given: the pass.
        state: the streams before it.
        namer: names storages.
        ways: the ways in which its steps may be run.
        enough: bytes that storing may take; other ways are measured if it seems to take more.
    """

    def __init__(self, given: Pass, state: State, namer: Namer, ways: Sequence[str], enough: float):
        self.given, self.namer, self.enough = given, namer, enough
        self.modules = modules_of(given)
        self.device = state[0].device
        self.ways = [way for way in ways if way != "reverse" or reversible(given)]
        self.refused: dict[str, str] = {}
        self.steps: list[Profile] = []
        self.kinds: list[Any] = []
        self.costs: dict[Any, dict[str, Cost]] = {}
        self.samples: dict[Any, tuple[Pass, State, Profile]] = {}
        self.saved: dict[int, int] = {}
        self.growths: dict[int, tuple[float, list[float]]] = {}
        self.finite = True
        self.start = state

    def run(self) -> State:
        """Measures all steps, and returns the state after the last.

        Raises:
            SchemeError: the steps are sharded.
        """
        given = self.given
        if any(type(step).__name__.startswith("FSDP") for step in given.steps):
            raise SchemeError(
                "Stack: steps that are sharded cannot be measured for backprop='auto': measure before they are, "
                "stack.backprop = stack.plan(x).plan, and shard them then."
            )
        context = with_tensors(given.context, Tensor.detach)
        with torch.no_grad(), nothing_changed(self.modules, True, (given.time, given.context)), unseen():
            state = self._walk(given._replace(context=context, on_step=None, sink=None))
            if self.pressed and "reverse" in self.ways and len(self.growths) < len(given.steps):
                self._measure_growth()
            if self.pressed:
                for kind, sample in self.samples.items():
                    self._measure(kind, *sample, self.ways)
        self.samples.clear()
        self._finish(state)
        return state

    @property
    def pressed(self) -> bool:
        """Whether storing all steps seems to take too much memory, extrapolated from the steps seen so far."""
        done = max(1, len(self.kinds))
        return sum(self.saved.values()) * len(self.given.steps) / done > 0.9 * self.enough

    def _walk(self, given: Pass) -> State:
        state = self.start
        trial = _GraphTrial(given.wrap, given.inverted) if "reverse" in self.ways else None
        states, steps = [_plain(state)], []
        for part in given.parts(1):
            # Each step has its own graph, which is freed before the next step begins.
            leaves = tuple(x.detach().requires_grad_(x.requires_grad) for x in state)
            before, saved = self.namer.names(leaves), {}
            with torch.enable_grad(), self.namer.saving(saved):
                out = (part if trial is None else part._replace(runner=trial.run)).keep(leaves)
            self.saved.update(saved)
            # In training the guard would raise in the backward pass; here the way is not offered at all.
            if trial is not None and left_behind(members_of(part.steps[0], part.shared)):
                self._refuse("reverse", "a residual function leaves something behind that can be differentiated")
            state = tuple(x.detach().requires_grad_(x.requires_grad) for x in out)
            self.steps.append(Profile(before, self.namer.names(state), saved, {}))
            del out
            self.kinds.append(self._kind(part, leaves, saved))
            self._sample(self.kinds[-1], part, leaves, self.steps[-1])
            steps.append(part.steps[0])
            states.append(_plain(state))
            if len(steps) == WINDOW or part.steps[0].scheme.streams_added or part.steps[0] is given.steps[-1]:
                if trial is not None and "reverse" in self.ways and self.pressed:
                    self._note_growth(growth_of(steps, trial, states), len(self.kinds) - len(steps), len(steps))
                steps, states = [], states[-1:]
        self.finite = all(bool(torch.isfinite(x).all()) for x in state if x.is_floating_point())
        return state

    def _kind(self, part: Pass, state: State, saved: Names) -> Any:
        step = part.steps[0]
        modules = Members((step, part.shared)).modules
        parameters = [p for m in modules for p in m._parameters.values() if p is not None]
        return (
            str(step.scheme),
            tuple((tuple(x.shape), x.dtype, x.requires_grad) for x in state),
            tuple((type(m), m.training) for m in modules),
            tuple((tuple(p.shape), p.requires_grad) for p in parameters),
            # What was saved, too: modules of the same type and shape may take different branches.
            tuple(sorted(saved.values())),
        )

    def _sample(self, kind: Any, part: Pass, state: State, profile: Profile) -> None:
        if kind in self.costs:
            return
        self.costs[kind] = {}
        self._measure(kind, part, state, profile, self.ways if self.pressed else ["store"])
        # Storing fits so far. If that changes, the other ways are measured later on this sample.
        if not self.pressed:
            self.samples[kind] = (part, _plain(state), profile)

    def _measure(self, kind: Any, part: Pass, state: State, profile: Profile, ways: Sequence[str]) -> None:
        for way in ways:
            if way not in self.costs[kind] and way not in self.refused:
                try:
                    self.costs[kind][way] = self._cost(kind, part, state, profile, way)
                except SchemeError as error:
                    # These two run what training without a plan would run, so the user should see their errors.
                    if way in ("store", "checkpoint"):
                        raise
                    self._refuse(way, str(error))

    def _refuse(self, way: str, why: str) -> None:
        self.refused.setdefault(way, why)
        self.ways = [w for w in self.ways if w != way]

    # long: one measurement, whose order of runs is what it measures
    def _cost(self, kind: Any, part: Pass, state: State, profile: Profile, way: str) -> Cost:
        # A separate monitor, since what a stack knows of its reconstruction must not come from a measurement.
        mode, monitor, known = MODES[way], Monitor(), self.costs[kind].get("store")
        members = members_of(part.steps[0], part.shared)
        learn(members)  # from its run with a graph, so that the first run here is not guarded as a first one
        monitor.members[part.steps[0].index], monitor.warned = members, True
        part = part._replace(monitor=monitor, wrap=None, sink=None)
        names: dict[int, int] = {}
        passed: dict[int, int] = {}  # streams that the step passes through, from which its inverse starts, too
        with aside(modules_of(part), part.context, part.time) as stand:
            part = part._replace(context=stand.context, time=stand.time)

            def once(meter: Meter | None) -> tuple[float, float]:
                leaves, streams = entered(state)
                mark = meter.mark if meter is not None else (lambda: None)
                # A device runs asynchronously: without waiting, the time of one pass would be charged to the next.
                wait(self.device)
                begin = time.perf_counter()
                mark()
                out = mode.run(part, streams)
                back = differentiate(out, [*leaves, *stand.leaves])
                wait(self.device)
                middle = time.perf_counter()
                if meter is not None:
                    names.update(Namer([*streams, *stand.leaves]).names(out))
                    passed.update(Namer(stand.leaves).names([x for x in out if not Namer(streams).names([x])]))
                # They are not held in training either: only ``back`` keeps what the step saved.
                del out, streams
                mark()
                back()
                wait(self.device)
                mark()
                return middle - begin, time.perf_counter() - middle

            with torch.enable_grad():
                with meter_on(self.device) as meter:
                    once(meter)
                times: list[tuple[float, float]] = []
                # At least twice, since the first run of a kernel is slow; a checkpoint's time is derived from storing.
                while way != "checkpoint" and len(times) < ROUNDS and (len(times) < 2 or sum(map(sum, times)) < ENOUGH):
                    times.append(once(None))
        forward, backward = self._times(way, times, known)
        rise, kept, most = meter.intervals[0].most, meter.intervals[1].start, meter.intervals[1].most
        # The streams before the step are counted by name where they are kept; this step only adds what is new.
        new = sum(size for name, size in profile.saved.items() if name not in profile.before)
        out = sum(names.values())
        rounded = sum(x.nbytes for x in state)  # the exact run's own copy of its first state
        named = {"store": new, "reverse": out, "exact": out + rounded}
        # What the meter saw but names do not explain: notes, spilled bits, what a kernel keeps for itself.
        extra = max(0, kept - named.get(way, 0))
        # What pieces count by name: saved storages of a step, even if it is run again, and the first state.
        counted = {"store": new, "checkpoint": new, "exact": rounded}
        first = rounded if way == "exact" else 0
        fall = most - extra - counted.get(way, 0) + (sum(passed.values()) if way == "reverse" else 0)
        return Cost(forward, backward, rise - first, fall, extra, first)

    def _times(self, way: str, times: Sequence[tuple[float, float]], stored: Cost | None) -> tuple[float, float]:
        """Seconds forward and backward; a way that runs a step again takes at least one more forward pass."""
        if way in ("store", "offload") or stored is None:
            return min(t for t, _ in times), min(t for _, t in times)
        # Noise can make a run that repeats a step seem faster than one that does not; a plan must not rely on that.
        forward, backward = stored.forward, stored.time
        if times:
            forward, backward = max(forward, min(t for t, _ in times)), max(backward, min(t for _, t in times))
        return forward, backward

    def _note_growth(self, window: tuple[float, list[float]], first: int, count: int) -> None:
        for n in range(first, first + count):
            self.growths[n] = window

    def _measure_growth(self) -> None:
        self.growths.clear()
        first = 0
        for window in windows_of(self.given._replace(on_step=None, sink=None), _plain(self.start)):
            self._note_growth(window, first, len(window[1]))
            first += len(window[1])

    def _finish(self, state: State) -> None:
        output, copied = readout_of(self.given, state)
        # The gradients of streams that the readout joined are parts of one tensor, which lives until the last is used.
        tail = max(0, output - max(x.nbytes for x in state)) if copied else 0
        for n, (profile, kind) in enumerate(zip(self.steps, self.kinds, strict=True)):
            costs = {way: cost for way, cost in self.costs[kind].items() if way not in self.refused}
            growth, errors = self.growths.get(n, (math.inf, [math.inf]))
            # The least error per step for which the accumulated error of a window is no less than what was measured.
            sums = [sum(growth**i for i in range(k + 1)) for k in range(len(errors))]
            error = max(e / s if s < math.inf else math.inf for e, s in zip(errors, sums, strict=True))
            ends = n == len(self.steps) - 1
            if ends:
                # Not for ways that undo steps, which release the gradients of the streams one by one.
                late = [way for way in ("store", "offload", "checkpoint") if way in costs]
                costs.update({way: costs[way]._replace(fall=costs[way].fall + tail) for way in late})
            self.steps[n] = profile._replace(costs=costs, error=error, growth=growth, ends=ends)
        # A batch that overflows says nothing about the next one, so the plan is made again.
        if any(growth == math.inf for growth, _ in self.growths.values()):
            self.finite = False


def wait(device: torch.device) -> None:
    """Waits until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def readout_of(given: Pass, state: State) -> tuple[int, bool]:
    """Bytes of the output, and whether it has its own storage rather than that of a stream."""
    with torch.no_grad():
        output = given.steps[-1].scheme.readout(state)
    return output.nbytes, output.untyped_storage()._cdata not in {x.untyped_storage()._cdata for x in state}


def reversible(given: Pass) -> bool:
    """Whether the steps of a pass can be undone."""
    return given.post_step is None and all(
        s.scheme.reversible_in_training and (s.scheme.invertible or s.training) for s in given.steps
    )


@in_our_words
def surveyed(*options: Any) -> tuple[Survey, State]:
    """A survey that has been run, and the state after the last step.

    Args:
        options: of ``Survey``.
    """
    survey = Survey(*options)
    try:
        with hooks_set_aside(Members(survey.modules).modules):
            return survey, survey.run()
    except SchemeError:
        raise
    except Exception:  # a function may depend on its hooks
        survey = Survey(*options)
        return survey, survey.run()


def unseen() -> saved_tensors_hooks:
    """Inside, a checkpoint around the measured steps does not see what they save."""
    return saved_tensors_hooks(lambda x: x, lambda x: x)


def modules_of(given: Pass) -> list[nn.Module]:
    """All modules that a pass runs."""
    modules = [*dict.fromkeys(given.steps)]
    return [*modules, *(m for m in (given.shared, given.post_step) if m is not None)]


def _plain(state: State) -> State:
    return tuple(x.detach().requires_grad_(x.requires_grad) for x in state)
