"""Mode "auto": measures the steps, chooses the fastest plan that fits, and reports its cost.

With several processes, the first to finish measuring decides for all.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from schemes.errors import SchemeError
from schemes.language import shorten
from schemes.scheme import State

from .agreement import agreed, shared_store
from .anchors import BOUNDS
from .given import tensors_in
from .meter import Meter
from .modes import Checkpoint, Exact, Mode, Offload, Plan, Reverse, Store, check_flags, parse_mode, positive
from .plan import Chain, Piece
from .sizes import mebibytes, show
from .survey import Namer, Survey, modules_of, readout_of, surveyed
from .walk import Pass

log = logging.getLogger("odenets.backprop")
LOSS = 4  # times the bytes of the output: its gradient, and what y.square().mean() takes to compute it
WAYS = ("store", "offload", "checkpoint", "reverse")


@dataclass(frozen=True)
class Limits:
    """The limits within which a plan is chosen.

    Attributes:
        memory: memory that the stack may take in training, in MiB, or a text such as "2GB"; None stands for a share of
            the device's free memory.
        share: that share.
        bound: largest relative error allowed in states that the inverse reconstructs; None stands for 1e-5 in fp32,
            1e-11 in fp64.
        exact: whether the whole stack may run in exact arithmetic, whose outputs are rounded to a grid.
        offload: whether saved tensors may be moved to the host.
    """

    memory: Any = None
    share: float = 0.5
    bound: float | None = None
    exact: bool = False
    offload: bool = True

    def __post_init__(self):
        if self.memory is not None:
            # Modes compare and hash by value, so "2GB" and 2000 MB must become the same number.
            object.__setattr__(self, "memory", mebibytes(self.memory, "auto(memory)"))
        number = isinstance(self.share, (int, float, Fraction)) and not isinstance(self.share, bool)
        if not number or not 0 < self.share <= 1:
            raise SchemeError(f"backprop: auto(share) is {self.share}, want a number above 0, at most 1.")
        object.__setattr__(self, "share", float(self.share))
        positive("auto(bound)", self.bound)
        if self.bound is not None:  # a fraction is written as a float, and must be equal to what is read from it
            object.__setattr__(self, "bound", float(self.bound))
        check_flags("auto", self)


class Chosen(NamedTuple):
    """A choice that a stack remembers.

    Attributes:
        plan: the plan.
        size: bytes of the streams that it was made for; larger streams are measured again.
        final: whether the measured values were finite; otherwise the next pass measures again.
        limits: the mode that it was made for, as it is written; "" where an older state does not tell.
    """

    plan: Plan
    size: int
    final: bool
    limits: str = ""

    def state(self) -> dict[str, Any]:
        """The choice as plain values."""
        segments = [[n, str(m)] for n, m in self.plan.segments]
        return {"plan": segments, "size": self.size, "final": self.final, "limits": self.limits}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Chosen":
        """The choice whose ``state`` gave these values.

        Raises:
            SchemeError: they do not describe a choice.
        """
        try:
            segments = tuple((n, parse_mode(str(m))) for n, m in state["plan"])
            size, final, limits = state["size"], state["final"], state.get("limits", "")
            if not isinstance(final, bool) or not isinstance(limits, str) or isinstance(size, bool) or size < 0:
                raise TypeError
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            # A SchemeError is a ValueError too; it says more precisely which mode cannot be read.
            if isinstance(error, SchemeError):
                raise
            raise SchemeError(
                f"Stack: 'auto' in this plan state is {shorten(repr(state), 60)}, and no choice of a plan.\n"
                "  Pass what plan_state() gave."
            ) from None
        return cls(Plan(segments), int(size), final, limits)


def chosen(limits: Limits, given: Pass, state: State, measured: "Callable[[], Measured] | None" = None) -> Plan:
    """The plan of a stack; measures the stack where it has none, or only one for a smaller input or other limits.

    Args:
        limits: the limits of the choice.
        given: the pass.
        state: the streams before it.
        measured: returns the measurement, where there is one already.

    Raises:
        SchemeError: no plan fits.
    """
    size = sum(x.nbytes for x in state)
    if given.sizes is not None:
        # One solve that is shown step by step: the plan is that of the stack's own steps, which is this one.
        given = given._replace(steps=list(given.steps)[:1], sizes=None)

    def choose() -> Chosen:
        found = measure(limits, given, state) if measured is None else measured()
        plan = found.choose()
        if given.inverted:  # a plan lists its segments in the stack's order
            plan = Plan(plan.segments[::-1])
        return Chosen(plan, size, found.survey.finite, str(limits))

    monitor = given.monitor
    # One thread measures; others that arrive meanwhile wait for its result.
    with monitor.planning:
        # A smaller input keeps the plan: it still fits, and the results of a stack should not change from batch to
        # batch.
        found: Chosen | None = monitor.plan
        # Several processes keep what they have agreed on: a larger input in one of them is unknown to the others.
        larger = found is not None and size > found.size and shared_store() is None
        # Compared here and not when the mode is set: what sets another for a while must not lose the choice.
        other = found is not None and found.limits not in ("", str(limits))
        if found is None or not found.final or larger or other:
            said = agreed(("plan", str(limits)), given.steps, state, lambda: choose().state())
            monitor.plan = found = Chosen.of(said)
            log.info("backprop: %s chose %s for %s of streams", limits, found.plan, show(size))
        return found.plan


class Measured:
    """The measured steps of a stack, and the plans that follow from them.

    Args:
        limits: the limits of the choice.
        survey: the measurement.
        end: bytes live at the loss.
        given: names of the input's storages, which the caller holds.
    """

    def __init__(self, limits: Limits, survey: Survey, end: int, given: Sequence[int]):
        self.limits, self.survey = limits, survey
        self.chain = Chain(survey.steps, end, given)
        self.memory = survey.enough

    def choose(self) -> Plan:
        """The fastest plan that fits.

        Raises:
            SchemeError: none does.
        """
        pieces = fastest(self.chain, self.limits, self.memory, self.bound)
        return Plan(tuple(segments_of(pieces)))

    @property
    def bound(self) -> float:
        """The largest relative error allowed in reconstructed states; infinity where the measurement was not finite."""
        if not self.survey.finite:
            # Errors that are not finite say nothing about the inverse; the next pass measures again.
            return float("inf")
        # By the dtype of the streams, in which the states are reconstructed.
        return float(self.limits.bound or BOUNDS.get(self.survey.start[0].dtype, 1e-5))


def fastest(chain: Chain, limits: Limits, memory: float, bound: float) -> list[Piece]:
    """The pieces of the fastest plan.

    Raises:
        SchemeError: no plan fits; the message says how much memory is missing.
    """
    ways = (*WAYS, "fixed")
    found = chain.fastest(ways, memory, bound)
    kinds = ["fixed" if "fixed" in p.costs else "exact" for p in chain.profiles]
    if limits.exact and all(kind in p.costs for kind, p in zip(kinds, chain.profiles, strict=True)):
        # Rounding to a grid changes the arithmetic, so all steps use it or none, whatever the memory.
        runs = [(kind, [n for n, _ in run]) for kind, run in groupby(enumerate(kinds), lambda pair: pair[1])]
        whole = [chain.piece(run[0], run[-1] + 1, kind) for kind, run in runs]  # between stacks, "fixed" is one each
        time = sum(piece.time for piece in whole)
        if chain.outcomes(whole)[1] <= memory and (found is None or time < found[1]):
            return whole
    if found is None:
        # Searched for only now: the message tells the user how much memory would have been enough.
        least = chain.least(ways, bound)
        raise SchemeError(
            f"Stack: no plan fits into {show(memory)}; the least that one takes is {show(least)}, "
            f"{show(least - memory)} more.\n  Give it more, backprop='auto(memory=...)', or a smaller batch."
        )
    return found[0]


def budget(limits: Limits, device: torch.device) -> float:
    """The bytes that training may take."""
    # Only a share of the free memory, since the model's needs outside of its stacks are unknown here.
    return limits.memory * 2**20 if limits.memory is not None else limits.share * free(device)


def ways_for(limits: Limits, state: State) -> list[str]:
    """The ways in which steps may be run."""
    ways = [way for way in WAYS if way != "offload" or (limits.offload and state[0].is_cuda)]
    return [*ways, "exact"] if limits.exact else ways


def measure(limits: Limits, given: Pass, state: State) -> Measured:
    """Measures the steps of a pass."""
    namer = Namer(outside_of(modules_of(given), given.context))
    names = namer.names(state)
    # The original forward pass was not rounded, so an inverse on the grid would not lead back to its start.
    ways = [way for way in ways_for(limits, state) if way != "exact" or not given.inverted]
    survey, last = surveyed(given, state, namer, ways, budget(limits, state[0].device))
    return Measured(limits, survey, end_of(given, last), tuple(names))


def outside_of(modules: Sequence[nn.Module], *given: Any) -> list[Tensor]:
    """The tensors that exist before a pass and are therefore not counted."""
    tensors = [x for m in modules for x in (*m.parameters(), *m.buffers())]
    return [*tensors, *tensors_in(given)]


def end_of(given: Pass, state: State) -> int:
    """Bytes of the output, unless it is one of the streams, and of what a loss such as y.square().mean() takes."""
    output, copied = readout_of(given, state)
    return (output if copied else 0) + LOSS * output


def free(device: torch.device) -> float:
    """Bytes that are free on a device, including those that torch's allocator has reserved but does not use."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        if device.type not in ("cpu", "mps"):  # which share the host's memory
            raise ValueError
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # not on this system
        raise SchemeError("backprop='auto' does not find out what is free here: say it, 'auto(memory=2GB)'.") from None


def segments_of(pieces: Sequence[Piece]) -> Iterator[tuple[int, Mode]]:
    """The segments of a plan: neighbouring pieces of the same way are merged where the merged segment runs the same."""
    run: list[Piece] = []
    for piece in (*pieces, None):
        if run and not (piece is not None and _joins(run, piece)):
            yield sum(p.last - p.first for p in run), _mode_of(run)
            run = []
        if piece is not None:
            run.append(piece)


def _joins(run: Sequence[Piece], piece: Piece) -> bool:
    """Whether a piece continues a run: stored ones always, others if all but the last have the same length."""
    if piece.way != run[0].way:
        return False
    lengths = {p.last - p.first for p in run}
    # ``checkpoint(k)`` and ``reverse(every=k)`` cut their steps into equal runs, of which only the last may be shorter.
    return piece.way in ("store", "offload") or (len(lengths) == 1 and piece.last - piece.first <= max(lengths))


def _mode_of(run: Sequence[Piece]) -> Mode:
    length = run[0].last - run[0].first
    match run[0].way:
        case "checkpoint":
            return Checkpoint(length)
        case "reverse":
            # A single piece needs no anchor: it is undone from its own end.
            return Reverse(every=length if len(run) > 1 else 0)
        case "exact":
            return Exact()
        case "offload":
            return Offload()
    return Store()


def pieces_of(chain: Chain, plan: Plan, first: int, monitor: Any, refused: Mapping[str, str]) -> Iterator[list[Piece]]:
    """The pieces that each segment of a plan runs."""
    for i, (count, mode) in enumerate(plan.segments):
        way, every = _way_of(mode, count, monitor.part(i), chain.profiles[first].before)
        if any(way not in p.costs for p in chain.profiles[first : first + count]):
            raise SchemeError(f"Stack: {mode} cannot be measured here: {refused.get(way, 'it does not run')}")
        # The same cuts as the mode makes, so that prediction and measurement describe the same pieces.
        places = [*range(first, first + count, every), first + count]
        yield [chain.piece(a, b, way) for a, b in pairwise(places)]
        first += count


def _way_of(mode: Mode, count: int, monitor: Any, streams: Mapping[int, int]) -> tuple[str, int]:
    match mode:
        case Checkpoint():
            return "checkpoint", mode.every
        case Reverse():
            every = mode.every
            if mode.memory is not None:
                # As ``reverse._anchors`` computes it when the pass runs.
                every = -(-count // max(1, int(float(mode.memory) * 2**20 / max(1, sum(streams.values())))))
            elif every is None:
                every = monitor.every
            return "reverse", every or count
        case Exact():
            # With ``store`` every state is kept: pieces of one step.
            return "exact", 1 if mode.store else count
        case Offload():
            return "offload", count
    return "store", count


# Reports


class Row(NamedTuple):
    """One segment in a report.

    Attributes:
        stack: name of its stack, "" if it is the only one.
        first: its first step.
        last: its last step.
        mode: how it is run.
        live: predicted bytes live after its forward pass.
        measured: the same, measured.
        peak: predicted peak of live bytes while it runs, forward and backward.
        seconds: predicted time of both passes.
        error: predicted relative error of the states that it reconstructs.
    """

    stack: str
    first: int
    last: int
    mode: str
    live: int
    measured: int | None
    peak: int
    seconds: float
    error: float


@dataclass
class Report:
    """The cost of a plan, predicted and measured; prints as a table.

    Attributes:
        rows: one for each segment.
        plans: the plan of each stack, by its name.
        predicted: predicted peak in bytes, without parameters, their gradients, and the input.
        measured: the same, measured in one pass.
        seconds: predicted time of a forward and backward pass through the stacks.
        measured_seconds: measured time of one pass; for a whole model it includes everything outside of stacks.
        memory: memory limit in bytes, None where none was given.
        error: largest predicted relative error of a reconstructed state.
        drift: the same, measured; None where no state was reconstructed, or the value has not arrived yet.
    """

    rows: list[Row]
    plans: dict[str, Plan]
    predicted: int
    seconds: float
    memory: float | None = None
    measured: int | None = None
    measured_seconds: float | None = None
    drift: float | None = None
    stacks: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def plan(self) -> Plan:
        """The plan, if there is only one stack."""
        (plan,) = self.plans.values()
        return plan

    @property
    def error(self) -> float:
        """The largest error of the rows."""
        return max((row.error for row in self.rows), default=0.0)

    def apply(self) -> None:
        """Sets the plans as ``backprop`` of their stacks."""
        for name, plan in self.plans.items():
            self.stacks[name].backprop = plan

    def __str__(self) -> str:
        named = any(row.stack for row in self.rows)
        head = [*(["stack"] if named else []), "steps", "mode", "live", "measured", "peak", "ms", "error"]
        table = [head]
        for r in self.rows:
            steps = f"{r.first}-{r.last}" if r.last > r.first else f"{r.first}"
            measured = "" if r.measured is None else show(r.measured)
            error = f"{r.error:.1e}" if r.error else "0"
            cells = [steps, r.mode, show(r.live), measured, show(r.peak), f"{1e3 * r.seconds:.2f}", error]
            table.append([*([r.stack] if named else []), *cells])
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        left = 3 if named else 2
        lines = [
            "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
            for line in table
        ]
        lines.append(f"peak: predicted {show(self.predicted)}" + self._measured())
        if self.memory is not None:
            lines[-1] += f", allowed {show(self.memory)}"
        return "\n".join(line.rstrip() for line in lines)

    def _measured(self) -> str:
        if self.measured is None or self.measured_seconds is None:
            return ""
        drift = "" if self.drift is None else f", drift {self.drift:.1e}"
        times = f"time: predicted {1e3 * self.seconds:.2f} ms, measured {1e3 * self.measured_seconds:.2f} ms"
        return f", measured {show(self.measured)}; {times}{drift}"


class Marked(Mode):
    """Runs a mode, then sets a mark on the meter."""

    def __init__(self, mode: Mode, meter: Meter):
        self.mode, self.meter, self.by_inverse = mode, meter, mode.by_inverse

    def run(self, given: Pass, state: State) -> State:
        """The state after the last step."""
        state = self.mode.run(given, state)
        self.meter.mark()
        return state
