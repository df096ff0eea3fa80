"""Ways to backpropagate through a stack, one class each, and their texts: "checkpoint(4)", "reverse(every=8)"."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from schemes.coupling import Coupling
from schemes.errors import SchemeError
from schemes.language import Reader
from schemes.scheme import Scheme, State
from schemes.step_size import FromError

from ..step import Step
from .checkpoint import checkpointed
from .replay import stream_precision
from .walk import Pass, needs_graph


class Mode(ABC):
    """A way to run the steps of a pass, such that its output can be differentiated.

    Attributes:
        keeps_all: whether all that autograd asks for is kept, so that nothing needs to know of the pass.
        inverts: whether the steps may be run backwards under this mode.
    """

    keeps_all: ClassVar[bool] = False
    inverts: ClassVar[bool] = True

    @abstractmethod
    def run(self, given: Pass, state: State) -> State:
        """The state after the last step."""

    def check(self, scheme: Scheme, post_step: nn.Module | None) -> None:  # noqa: B027  most modes refuse nothing
        """Refuses what this mode cannot run, when a stack is built.

        Raises:
            SchemeError: with the remedy.
        """

    def __str__(self) -> str:
        return format_mode(self)


@dataclass(frozen=True)
class Store(Mode):
    """Keep all that autograd asks for."""

    keeps_all = True

    def run(self, given: Pass, state: State) -> State:
        """The state after the last step."""
        return given.keep(state)


@dataclass(frozen=True)
class Checkpoint(Mode):
    """Keep the state every so many steps, and recompute the steps between in the backward pass.

    Attributes:
        every: number of steps; where somebody looks at each state, each is kept.
    """

    every: int = 1

    def __post_init__(self):
        _count("checkpoint(every)", self.every, 1)

    def run(self, given: Pass, state: State) -> State:
        """The state after the last step."""
        if not needs_graph():
            return given.keep(state)
        for part in given.parts(1 if given.on_step is not None else self.every):
            modules = [*part.steps, *(m for m in (given.shared, given.post_step) if m is not None)]
            where = " and ".join(str(n) for n in dict.fromkeys((part.first, part.first + len(part.steps) - 1)))
            state = checkpointed(
                lambda *streams, part=part: part.keep(streams),
                state,
                modules,
                (given.context, part.time),
                f"step {where}",
            )
            if given.on_step is not None:
                given.on_step(part.first, state)
        return state


class _ByInverse(Mode):
    """Keep the last state, and make those before it again by the scheme's inverse."""

    def check(self, scheme: Scheme, post_step: nn.Module | None) -> None:
        """Refuses schemes without an inverse, and projections between the steps."""
        from . import reverse as reverse  # loads torch's compiler, to be kept out of it: at no import, nor in a trace

        if not scheme.reversible_in_training:
            raise SchemeError(
                f"Stack: {scheme} has no inverse, which backprop='reverse' needs: use backprop='checkpoint', or an "
                f"invertible scheme such as revnet or reversible({scheme})."
            )
        if post_step is not None:
            raise SchemeError(
                "Stack: post_step= is a projection that cannot be undone, so backprop='reverse' refuses it: put it "
                "into the residual functions (pre-activation), or use backprop='checkpoint'."
            )

    def run(self, given: Pass, state: State) -> State:
        """The state after the last step."""
        state = stream_precision(state)  # with gradients and without: the output has one type
        if not needs_graph() or not all(s.scheme.invertible or s.training for s in given.steps):
            return given.keep(state)  # bdia at inference is Euler's scheme, which has no inverse
        return self._by_inverse(given, state)

    @abstractmethod
    def _by_inverse(self, given: Pass, state: State) -> State:
        """The state after the last step, of a pass that will be differentiated."""


@dataclass(frozen=True)
class Reverse(_ByInverse):
    """Keep the last state, and make those before it again by the scheme's inverse.

    Attributes:
        every: keep a state (an anchor) every so many steps; None lets the engine choose from the measured
            amplification of rounding errors, 0 keeps none.
        memory: MiB that anchors may take, in place of ``every``.
        bound: relative error of states made again that the chosen anchors keep to; that of gradients is smaller, as
            a rule. None stands for 1e-5 in fp32, 1e-11 in fp64.
        drift: whether to compare made-again states with kept ones, and to warn at the next forward pass.
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
            value = getattr(self, what)
            if value is not None and not 0 < value < float("inf"):
                raise SchemeError(f"backprop: reverse({what}) is {value}, want a positive number.")
        if self.every is not None and self.memory is not None:
            raise SchemeError("backprop: reverse takes every or memory, not both.")

    def _by_inverse(self, given: Pass, state: State) -> State:
        from .reverse import run_reversed

        return run_reversed(given, state, self.every, self.memory, self.bound, self.drift, self.check_finite)


@dataclass(frozen=True)
class Exact(_ByInverse):
    """As Reverse, in exact arithmetic on a binary grid: states made again are equal to the last bit.

    Attributes:
        bits: streams and residual outputs are multiples of 2^-bits; None stands for 14 in fp32, 40 in fp64.
        store: keep all states instead, on the same grid: the run that exact gradients are compared with.
    """

    inverts = False

    bits: int | None = None
    store: bool = False

    def __post_init__(self):
        if self.bits is not None:
            _count("exact(bits)", self.bits, 1)

    def check(self, scheme: Scheme, post_step: nn.Module | None) -> None:
        """Refuses what Reverse refuses, and schemes whose inverse loses bits."""
        for part in (scheme.at(0), scheme.at(1)):
            fs = [nn.Identity()] * part.stages
            for p, *_ in part.training_scheme(0, torch.zeros(1, 1)).decompose(fs, 1.0):
                if not isinstance(p, Coupling) or not p.exact:
                    raise SchemeError(
                        f"Stack: {p} cannot be undone bit by bit, which backprop='exact' needs: use backprop='reverse'."
                    )
        super().check(scheme, post_step)

    def _by_inverse(self, given: Pass, state: State) -> State:
        from .reverse import run_exact

        return run_exact(given, state, self.bits, self.store)


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
        """The state after the last step, and the error estimate of each step, of the shape of the stream."""
        errors: list[Tensor] = []
        size: list[Any] = [None if self.rule is None else given.steps[0].h]

        # The estimate rides along as one more stream, so that each mode keeps it or makes it again as it does a state.
        def runner(step: Step, state: State, shared: Any, t: Any, context: Any, h: Any) -> State:
            h = step.h if h is None else h
            fs, gs = step.functions(shared, t, context, h)
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


def _count(what: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SchemeError(f"backprop: {what} is {value}, want a whole number, at least {least}.")


_FAMILIES: dict[str, type[Mode]] = {"checkpoint": Checkpoint, "reverse": Reverse, "exact": Exact}


def parse_mode(given: "str | Mode | None") -> Mode:
    """Reads a mode; None stands for "store".

    Raises:
        SchemeError: anything else.

    Example:
        >>> parse_mode("reverse(every=8)")
        Reverse(every=8, memory=None, bound=None, drift=True, check_finite=False)
    """
    found = Reader({"store": Store()}, _FAMILIES, what="backprop mode").read(given) if isinstance(given, str) else given
    if found is None:
        return Store()
    if not isinstance(found, Mode):
        raise SchemeError(f"backprop is {given!r}, want 'store', 'checkpoint', 'checkpoint(k)', 'reverse' or 'exact'.")
    return found


def format_mode(mode: Mode) -> str:
    """The mode as one writes it.

    Example:
        >>> format_mode(Reverse(every=8, drift=False)), format_mode(Checkpoint(4)), format_mode(Store())
        ('reverse(every=8, drift=false)', 'checkpoint(4)', 'store')
    """
    changed = {f.name: value for f in fields(mode) if (value := getattr(mode, f.name)) != f.default}  # type: ignore[arg-type]
    name = type(mode).__name__.lower()
    if isinstance(mode, Checkpoint):
        return f"{name}({mode.every})" if changed else name
    given = ", ".join(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in changed.items())
    return f"{name}({given})" if given else name
