"""Modes of backpropagation through a stack, one class each, and their texts: "checkpoint(4)", "4*store + 8*reverse"."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import partial
from itertools import accumulate, groupby
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from schemes.coupling import Coupling
from schemes.errors import SchemeError
from schemes.language import Reader, written
from schemes.scheme import Scheme, State
from schemes.step_size import FromError

from ..step import Step
from .checkpoint import checkpointed
from .grid import DEFAULT_BITS, most_bits
from .members import remembered
from .offload import offloaded
from .replay import stream_precision
from .sizes import UNITS
from .walk import AGAIN, Pass, has_no_values, needs_graph


class Mode(ABC):
    """A way to run the steps of a pass so that its output can be differentiated.

    Attributes:
        keeps_all: whether everything that autograd saves is kept, so that nothing else needs to know of the pass.
        alone: whether the mode cannot be part of a plan.
        inverts: whether the steps may be run backwards under this mode.
        by_inverse: whether states are reconstructed by the scheme's inverse, which needs streams in single precision.
        rounds: whether its sums differ from those of a run that stores everything.
    """

    keeps_all: ClassVar[bool] = False
    alone: ClassVar[bool] = False
    inverts: ClassVar[bool] = True
    by_inverse: bool = False
    rounds: bool = False

    @abstractmethod
    def run(self, given: Pass, state: State) -> State:
        """The state after the last step."""

    def check(self, scheme: Scheme, post_step: nn.Module | None) -> None:  # noqa: B027  most modes refuse nothing
        """Refuses, when a stack is built, what this mode cannot run.

        Raises:
            SchemeError: with the remedy.
        """

    def check_depth(self, steps: int) -> None:  # noqa: B027  most modes take any number
        """Refuses, when a stack is built, a number of steps that this mode cannot run.

        Raises:
            SchemeError: with the remedy.
        """

    def options(self) -> dict[str, Any]:
        """The arguments that differ from their defaults, as they are written."""
        # Leaving out the defaults is safe: parsing the text restores an equal mode.
        found = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}  # type: ignore[arg-type]
        return {k: _written(v) for k, v in found.items()}

    @property
    def needed(self) -> bool:
        """Whether this pass may be differentiated, or must at least give the same sums as one that will be."""
        # Inside a reversed step, which first runs without a graph and must give the same numbers when it is replayed.
        return needs_graph() or (self.rounds and AGAIN.inside)

    @property
    def name(self) -> str:
        """The name of the mode, as it is written."""
        return type(self).__name__.lower()

    def __str__(self) -> str:
        return format_mode(self)


@dataclass(frozen=True)
class Store(Mode):
    """Keep everything that autograd saves."""

    keeps_all = True

    def run(self, given: Pass, state: State) -> State:
        """The state after the last step."""
        return given.keep(state)


@dataclass(frozen=True)
class Offload(Mode):
    """Keep everything that autograd saves, in host memory; leaves and tensors below 4 KiB stay on the device."""

    def run(self, given: Pass, state: State) -> State:
        """The state after the last step."""
        if not needs_graph():
            return given.keep(state)
        return offloaded(lambda: given.keep(state))


@dataclass(frozen=True)
class Checkpoint(Mode):
    """Keep the state every so many steps, and recompute the steps in between in the backward pass.

    Attributes:
        every: number of steps; under an observer of the states, every state is kept.
    """

    every: int = 1

    def __post_init__(self):
        _count("checkpoint(every)", self.every, 1)

    def run(self, given: Pass, state: State) -> State:
        """The state after the last step."""
        # Under torch.func transforms there are no saved tensors that could be dropped.
        if not needs_graph() or torch._C._are_functorch_transforms_active():
            return given.keep_alone(state)
        # An observer inside a checkpointed run would be called again at recomputation. It is called between runs, so
        # each step becomes a run of its own when there is an observer.
        for part in given.parts(1 if given.on_step is not None else self.every):
            modules = [*part.steps, *(m for m in (given.shared, given.post_step) if m is not None)]
            where = " and ".join(str(n) for n in dict.fromkeys((part.first, part.first + len(part.steps) - 1)))
            state = checkpointed(
                # Bound now, since the backward pass calls it after the loop has moved on to the last part.
                lambda *streams, part=part: part.keep(streams),
                state,
                partial(remembered, given.monitor.parts, part.first, modules),
                (given.context, part.time),
                f"step {where}",
                part.sink,
                part.monitor.lock,
            )
            if given.on_step is not None:
                given.on_step(part.first, state)
        return state


class _ByInverse(Mode):
    """Keep the last state, and reconstruct those before it by the scheme's inverse."""

    by_inverse = True

    def check(self, scheme: Scheme, post_step: nn.Module | None) -> None:
        """Refuses schemes without an inverse, and projections between the steps."""
        # Imported here since it loads torch's compiler, which must happen neither at import of the package nor within
        # a trace.
        from . import reverse as reverse

        if not scheme.reversible_in_training:
            raise SchemeError(
                f"Stack: {scheme} has no inverse, which backprop='{self.name}' needs: use backprop='checkpoint', or an "
                f"invertible scheme such as revnet or reversible({scheme})."
            )
        if post_step is not None:
            raise SchemeError(
                f"Stack: post_step= is a projection that cannot be undone, so backprop='{self.name}' refuses it: put "
                "it into the residual functions (pre-activation), or use backprop='checkpoint'."
            )

    def run(self, given: Pass, state: State) -> State:
        """The state after the last step."""
        state = stream_precision(state)  # with and without gradients, so that the output always has the same dtype
        if not self.needed or has_no_values(state) or not all(s.scheme.invertible or s.training for s in given.steps):
            return given.keep_alone(state)  # at inference bdia is Euler's scheme, which has no inverse
        return self._by_inverse(given, state)

    @abstractmethod
    def _by_inverse(self, given: Pass, state: State) -> State:
        """The state after the last step of a pass that will be differentiated."""


@dataclass(frozen=True)
class Reverse(_ByInverse):
    """Keep the last state, and reconstruct those before it by the scheme's inverse.

    Attributes:
        every: keep a state (an anchor) every so many steps; None lets the engine choose from the measured
            amplification of rounding errors, 0 keeps none.
        memory: MiB that anchors may take, in place of ``every``.
        bound: largest relative error of reconstructed states that the choice of anchors allows; that of gradients is
            usually smaller. None stands for 1e-5 in fp32, 1e-11 in fp64.
        drift: whether to compare reconstructed states with kept ones, and to warn at the next forward pass.
        check_finite: whether to check every step for NaN and infinity; this waits for the device at each step.
    """

    every: int | None = None
    memory: float | None = None
    bound: float | None = None
    drift: bool = True
    check_finite: bool = False

    def __post_init__(self):
        if self.every is not None:
            _count("reverse(every)", self.every, 0)
        for what in ("memory", "bound"):
            positive(f"reverse({what})", value := getattr(self, what))
            if value is not None:  # a fraction is written as a float, and must be equal to what is read from it
                object.__setattr__(self, what, float(value))
        check_flags("reverse", self)
        if self.every is not None and self.memory is not None:
            raise SchemeError("backprop: reverse takes every or memory, not both.")

    def _by_inverse(self, given: Pass, state: State) -> State:
        from .reverse import run_reversed

        return run_reversed(given, state, self.every, self.memory, self.bound, self.drift, self.check_finite)  # type: ignore


@dataclass(frozen=True)
class Exact(_ByInverse):
    """As Reverse, in exact arithmetic on a binary grid: reconstructed states are equal to the last bit.

    Attributes:
        bits: streams and residual outputs are multiples of 2^-bits; None stands for 14 in fp32, 40 in fp64.
        store: keep all states instead, on the same grid: the reference run for exact gradients.
    """

    inverts = False
    rounds = True

    bits: int | None = None
    store: bool = False

    def __post_init__(self):
        if self.bits is not None:
            # Refuses what no format has. What only a narrower format lacks is refused at the first pass, where the
            # dtype is known.
            _count("exact(bits)", self.bits, 1, max(map(most_bits, DEFAULT_BITS)))
        check_flags("exact", self)

    def check(self, scheme: Scheme, post_step: nn.Module | None) -> None:
        """Refuses what Reverse refuses, and schemes whose inverse loses bits."""
        # The first step may differ (it may append a stream); all later ones are like the second.
        for part in (scheme.at(0), scheme.at(1)):
            fs = [nn.Identity()] * part.stages
            with torch.random.fork_rng([]):  # bdia draws, and building a stack must not move the generator
                trained = part.training_scheme(0, torch.zeros(1, 1))
            for p, *_ in trained.decompose(fs, 1.0):
                # A scale computed from the streams can have any size, and the smaller it is, the more bits an update
                # spills.
                if not isinstance(p, Coupling) or not p.exact:
                    raise SchemeError(
                        f"Stack: {p} cannot be undone bit by bit, which backprop='exact' needs: use backprop='reverse'."
                    )
        super().check(scheme, post_step)

    def _by_inverse(self, given: Pass, state: State) -> State:
        from .reverse import run_exact

        return run_exact(given, state, self.bits, self.store)  # type: ignore


@dataclass(frozen=True)
class Plan(Mode):
    """Several modes in sequence, each for some steps: "4*store + 8*reverse".

    Attributes:
        segments: pairs of a number of steps and their mode.
    """

    segments: tuple[tuple[int, Mode], ...]
    alone = True

    def __post_init__(self):
        segments = []
        for count, mode in self.segments:
            _count("plan(steps)", count, 1)
            mode = parse_mode(mode)
            if mode.alone:
                raise SchemeError(f"backprop: a plan is made of plain modes, such as store or reverse, not of {mode}.")
            segments.append((count, mode))
        if not segments:
            raise SchemeError("backprop: a plan has at least one segment, such as '4*store + 8*reverse'.")
        # The class is frozen so that modes can be compared and hashed; the parsed segments are therefore set like this.
        object.__setattr__(self, "segments", tuple(segments))

    @property
    def by_inverse(self) -> bool:  # type: ignore[override]
        """Whether any of its modes works by the inverse."""
        return any(mode.by_inverse for _, mode in self.segments)

    @property
    def rounds(self) -> bool:  # type: ignore[override]
        """Whether any of its modes rounds."""
        return any(mode.rounds for _, mode in self.segments)

    @property
    def inverts(self) -> bool:  # type: ignore[override]
        """Whether all of its modes invert."""
        return all(mode.inverts for _, mode in self.segments)

    @property
    def steps(self) -> int:
        """The number of steps."""
        return sum(count for count, _ in self.segments)

    def check(self, scheme: Scheme, post_step: nn.Module | None) -> None:
        """Refuses what one of its modes refuses."""
        for mode in dict.fromkeys(mode for _, mode in self.segments):
            mode.check(scheme, post_step)

    def check_depth(self, steps: int) -> None:
        """Refuses any other number of steps."""
        if steps != self.steps:
            raise SchemeError(f"Stack: the plan {self} is one for {self.steps} steps, and the stack has {steps}.")

    def run(self, given: Pass, state: State) -> State:
        """The state after the last step."""
        if self.by_inverse:
            state = stream_precision(state)  # in all segments, so that the output's dtype does not depend on the plan
        if not self.needed:
            return given.keep_alone(state)
        for mode, part in self.parts(given):
            state = mode.run(part, state)
        # Each segment has its own monitor; the stack's monitor shows the worst of them.
        given.monitor.gather()
        return state

    def parts(self, given: Pass) -> Iterator[tuple[Mode, Pass]]:
        """The modes, and the passes through their steps.

        Args:
            given: the pass through all steps.
        """
        # By the step's number in the stack, not its place in the pass: an inverted pass begins in the last segment.
        ends = [*accumulate(count for count, _ in self.segments)]
        owners = [next(i for i, end in enumerate(ends) if step.index < end) for step in given.steps]
        runs = [(i, len([*group])) for i, group in groupby(owners)]
        for (i, _), part in zip(runs, given.parts([count for _, count in runs]), strict=True):
            # ``parts`` drops the observer, since checkpointed parts report their states themselves; a segment needs it
            # back.
            yield self.segments[i][1], part._replace(on_step=given.on_step, monitor=given.monitor.part(i))


class WithErrors(Mode):
    """Collects the error estimate of each step by the scheme's embedded companion, under another mode.

    Args:
        mode: how states are kept.
        rule: chooses each step size from the error of the step before; None leaves the steps their own.
    """

    def __init__(self, mode: Mode, rule: FromError | None = None):
        self.mode, self.rule = mode, rule

    def run(self, given: Pass, state: State) -> State:
        """The state after the last step."""
        return self.estimates(given, state)[0]

    def estimates(self, given: Pass, state: State) -> tuple[State, list[Tensor]]:
        """The state after the last step, and the error estimate of each step, in the shape of the stream."""
        errors: list[Tensor] = []
        # A mutable cell: the observer writes it after a step, and the generator below reads it before the next.
        size: list[Any] = [None if self.rule is None else given.steps[0].h]

        # The estimate is carried as one more stream, so that every mode stores or recomputes it like a state.
        def runner(step: Step, state: State, shared: Any, t: Any, context: Any, h: Any) -> State:
            h = step.h if h is None else h
            fs, gs = step.functions(shared, t, context, h, sink=given.sink)
            if given.wrap is not None:
                fs, gs = given.wrap(step, state[:1], fs, gs)
            state, error = step.scheme.step_with_error(fs, state[:1], h, gs)  # type: ignore[attr-defined]
            return (*state, error)

        def on_step(n: int, state: State) -> None:
            errors.append(state[1])
            if self.rule is not None:
                order = given.steps[n - given.first].scheme.pair_order  # type: ignore[attr-defined]
                size[0] = self.rule.following(size[0], state[1], order)
            if given.on_step is not None:
                given.on_step(n, state[:1])

        def sizes() -> Iterator[Any]:
            while True:
                yield size[0]

        own = None if self.rule is None else sizes()
        inner = given._replace(runner=runner, on_step=on_step, sizes=own, extras=1)
        return self.mode.run(inner, state)[:1], errors


def _written(value: Any) -> Any:
    if isinstance(value, float):
        return written(value)
    return str(value).lower() if isinstance(value, bool) else value


def _count(what: str, value: Any, least: int, most: float = float("inf")) -> None:
    # ``True`` is an int in Python, but not a number of steps.
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        limit = f"at least {least}" + ("" if most == float("inf") else f" and at most {most}")
        raise SchemeError(f"backprop: {what} is {value}, want a whole number, {limit}.")


def positive(what: str, value: Any) -> None:
    """Raises a SchemeError where an option is neither None nor a positive number."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, Fraction)) or not 0 < value < float("inf"):
        raise SchemeError(f"backprop: {what} is {value}, want a positive number.")


def check_flags(name: str, mode: Any) -> None:
    """Raises a SchemeError where a boolean option of a mode is not a bool."""
    # Boolean options are recognised by their defaults, so that new ones are checked without a change here.
    for f in fields(mode):
        if isinstance(f.default, bool) and not isinstance(value := getattr(mode, f.name), bool):
            raise SchemeError(f"backprop: {name}({f.name}) is {value!r}, want true or false.")


_NAMES = {"store": Store(), "offload": Offload()}
# "auto" registers itself: it depends on the code that measures the modes, which imports this module.
FAMILIES: dict[str, type[Mode]] = {"checkpoint": Checkpoint, "reverse": Reverse, "exact": Exact}


def parse_mode(given: "str | Mode | None") -> Mode:
    """Reads a mode; None stands for "store".

    Args:
        given: the text of a mode, a mode, or None.

    Raises:
        SchemeError: anything else.

    Example:
        >>> parse_mode("reverse(every=8)")
        Reverse(every=8, memory=None, bound=None, drift=True, check_finite=False)
        >>> parse_mode("4*store + 8*checkpoint(2)").steps, str(parse_mode("reverse(memory=2GiB)"))
        (12, 'reverse(memory=2048)')
    """
    found = given
    if isinstance(given, str):
        reader = Reader(_NAMES, FAMILIES, lambda *pairs: Plan(pairs), what="backprop mode", units=UNITS)
        found = reader.read(given)
    if found is None:
        return Store()
    if not isinstance(found, Mode):
        raise SchemeError(
            f"backprop is {given!r}, want 'store', 'checkpoint', 'checkpoint(k)', 'reverse' or 'exact'; or 'offload', "
            "'auto(memory=2GB)', a plan such as '4*store + 8*reverse'."
        )
    return found


def format_mode(mode: Mode) -> str:
    """Returns the text of a mode, as ``parse_mode`` reads it.

    Example:
        >>> format_mode(Reverse(every=8, drift=False)), format_mode(Checkpoint(4)), format_mode(Store())
        ('reverse(every=8, drift=false)', 'checkpoint(4)', 'store')
        >>> format_mode(Plan(((4, Store()), (1, Reverse()))))
        '4*store + reverse'
    """
    if isinstance(mode, Plan):
        alone = len(mode.segments) == 1
        return " + ".join(f"{count}*{part}" if count > 1 or alone else str(part) for count, part in mode.segments)
    changed = mode.options()
    name = mode.name
    # The only argument of checkpoint is written without its name.
    if isinstance(mode, Checkpoint):
        return f"{name}({mode.every})" if changed else name
    given = ", ".join(f"{k}={v}" for k, v in changed.items())
    return f"{name}({given})" if given else name
