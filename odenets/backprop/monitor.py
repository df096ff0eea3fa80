"""Monitors the reconstruction of a stack from pass to pass: growth of errors, spacing of anchors, drift."""

import math
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from schemes.errors import SchemeError
from schemes.language import shorten
from schemes.scheme import State

from .agreement import shared_store

DRIFT_LIMIT = 1e-3


class PendingScalar(NamedTuple):
    """A scalar on its way from the device, the event that signals its arrival, and whether it must be zero."""

    value: Tensor
    event: Any
    must_be_zero: bool

    @classmethod
    def of(cls, value: Tensor, must_be_zero: bool = False) -> "PendingScalar":
        """Starts the transfer of a scalar to the host, without waiting for it."""
        if not value.is_cuda:
            return cls(value, None, must_be_zero)
        # Reading the value at once would make the host wait for all work that is queued on the device.
        value, event = value.to("cpu", non_blocking=True), torch.cuda.Event()
        event.record()
        return cls(value, event, must_be_zero)

    def read(self) -> float:
        """The value, as soon as it has arrived."""
        if self.event is not None:
            self.event.synchronize()
        return float(self.value)

    def ready(self) -> bool:
        """Whether the scalar has arrived."""
        return self.event is None or self.event.query()


class _Anchors(NamedTuple):
    """The spacing of anchors and the known growth of errors, as they are saved."""

    every: int | None
    growth: float
    asked: list[float] | None
    drifts: list[float]

    @classmethod
    def of(cls, state: Any) -> "_Anchors":
        try:
            every, growth, drifts = state["every"], state["growth"], [float(d) for d in state.get("drifts", ())]
            if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
                raise TypeError
            asked = state.get("asked")  # an older state does not tell
            if not math.isfinite(growth):  # it would count as measured for ever
                raise TypeError
            return cls(every, float(growth), None if asked is None else [float(a) for a in asked], drifts)
        except (LookupError, TypeError, ValueError, AttributeError):
            raise _no_state("'anchors' in it", state) from None


def _exact_of(state: Any) -> tuple[list[float], list[bool]]:
    """The drifts and overflow flags of exact arithmetic that were still to be read."""
    try:
        return [float(d) for d in state["drifts"]], [bool(flag) for flag in state["overflow"]]
    except (LookupError, TypeError, ValueError):
        raise _no_state("'exact' in it", state) from None


def _no_state(what: str, given: Any) -> SchemeError:
    return SchemeError(
        f"Stack: no plan state: {what} is {shorten(repr(given), 60)}.\n  Pass what plan_state() of such a stack gave."
    )


class Monitor:
    """The memory of a stack about its reconstruction: how often it needs anchors, and how far it drifts.

    Attributes:
        every: the chosen spacing of anchors, None for no anchors.
        growth: measured factor by which a rounding error grows per step undone.
        asked: the bound, first step and number of steps for which these two were measured; None where that is unknown.
        drift: relative error of reconstructed states in the last backward pass whose figure has arrived.
        pending: drifts on their way from the device.
        overflow: flags on their way from the device: whether a stream left the range of exact arithmetic.
        searched: (step, update) pairs whose graphs have been searched for tensors that a function captures.
        members: members of each step, as found by an earlier pass.
        parts: members of the steps that are checkpointed together, by the first of them.
        lock: held while a step runs or is run again, since its modules are modified for that.
        plan: the choice of mode "auto", None before there is one.
        planning: held while "auto" chooses.
        warned: whether a warning of drift was issued, which happens once.
    """

    def __init__(self) -> None:
        self.every: int | None = None
        self.growth: float | None = None
        self.asked: list[float] | None = None
        self.drift: float | None = None
        self.pending: list[PendingScalar] = []
        self.overflow: list[PendingScalar] = []
        self.searched: set[tuple[int, int]] = set()
        self.members: dict[int, Any] = {}
        self.parts: dict[int, Any] = {}
        self.lock = threading.RLock()
        self.plan: Any = None
        self.planning = threading.RLock()
        self._parts: dict[int, Monitor] = {}
        self.warned = False

    def __deepcopy__(self, memo: Any) -> "Monitor":
        # Locks cannot be copied, and a copy of a network may train on other data: it takes its own measurements.
        return Monitor()

    def __reduce__(self) -> Any:
        return Monitor, ()

    def part(self, i: int) -> "Monitor":
        """The monitor of segment i of a plan, which has its own anchors and drift."""
        if i not in self._parts:
            part = self._parts[i] = Monitor()
            # What belongs to the steps is shared, and so is the lock: a step's modules are modified during a pass,
            # whichever segment runs it.
            part.searched, part.members, part.parts = self.searched, self.members, self.parts
            part.lock = self.lock
        return self._parts[i]

    def state(self) -> dict[str, Any]:
        """The choices so far as plain values: the plan, the spacing of anchors, and the choices of the segments."""
        own: dict[str, Any] = {} if self.plan is None else {"auto": self.plan.state()}
        if self.growth is not None:
            # Unread drifts are saved too, since they may change the spacing of anchors at the next pass.
            drifts = [scalar.read() for scalar in self.pending if not scalar.must_be_zero]
            own["anchors"] = {"every": self.every, "growth": self.growth, "drifts": drifts, "asked": self.asked}
        exact = [scalar.read() for scalar in self.pending if scalar.must_be_zero]
        overflow = [bool(scalar.read()) for scalar in self.overflow]
        if any(exact) or any(overflow):  # the next pass is to raise
            own["exact"] = {"drifts": exact, "overflow": overflow}
        parts = {str(i): found for i, part in self._parts.items() if (found := part.state())}
        return {**own, **({"parts": parts} if parts else {})}

    def reader(self, state: Mapping[str, Any], chosen: Callable[[Any], Any]) -> Callable[[], None]:
        """Parses what ``state`` returned without changing anything; returns a function that loads it.

        Args:
            state: plain values.
            chosen: builds a choice from its plain values.

        Raises:
            SchemeError: the values are not such a state.
        """
        if not isinstance(state, Mapping) or not {*state} <= {"auto", "anchors", "exact", "parts"}:
            raise _no_state("this", state)
        plan = chosen(state["auto"]) if "auto" in state else None
        anchors = _Anchors.of(state["anchors"]) if "anchors" in state else None
        exact = _exact_of(state["exact"]) if "exact" in state else ([], [])
        parts = state.get("parts", {})
        if not isinstance(parts, Mapping) or not all(isinstance(i, str) and i.isdecimal() for i in parts):
            raise _no_state("'parts' in it", parts)
        # Parsed by a temporary monitor, since ``self.part(i)`` would create the part.
        readers = {int(i): Monitor().reader(part, chosen) and part for i, part in parts.items()}

        def load() -> None:
            # Also what the state does not mention: it was saved before there was a choice.
            self.plan = plan
            self.every, self.growth, self.asked = (None,) * 3 if anchors is None else anchors[:3]
            drifts = [] if anchors is None else anchors.drifts
            self.pending = [PendingScalar(torch.tensor(d), None, False) for d in drifts]
            self.pending += [PendingScalar(torch.tensor(d), None, True) for d in exact[0]]
            self.overflow = [PendingScalar(torch.tensor(flag), None, False) for flag in exact[1]]
            self.forget_parts()
            for i, part in readers.items():
                self.part(i).reader(part, chosen)()

        return load

    def forget_parts(self) -> None:
        """Forgets the monitors of the segments."""
        self._parts.clear()

    def gather(self) -> None:
        """Adopts the largest drift of the segments of a plan."""
        drifts = [part.drift for part in self._parts.values() if part.drift is not None]
        self.drift = max(drifts, default=self.drift)

    def read(self, bound: float | None, depth: int) -> None:
        """Reads the overflow flags and drifts of earlier passes that have arrived from the device; warns of drift once.

        Args:
            bound: anchors are moved closer together if the drift exceeds three times this bound; None leaves them
                where they are.
            depth: number of steps.

        Raises:
            SchemeError: in exact arithmetic a stream left the range, or a state was not reconstructed exactly.
        """
        # In the order in which they were sent: if one has not arrived, later ones have not either.
        while self.overflow and self.overflow[0].ready():
            if bool(self.overflow.pop(0).value):
                # The user may train on with other options: further flags of a spoiled pass must not raise again.
                self.overflow.clear()
                raise SchemeError(
                    "Stack: a stream left the range in which backprop='exact' adds without rounding; "
                    "use fewer binary places, such as backprop='exact(bits=10)', or normalise the streams."
                )
        while self.pending and self.pending[0].ready():
            scalar = self.pending.pop(0)
            self.drift = float(scalar.value)
            if scalar.must_be_zero and self.drift != 0.0:
                raise SchemeError(
                    f"Stack: backprop='exact' made a state again that is {self.drift:.1e} off: a function gives "
                    "other values the second time. Make it deterministic, or use backprop='reverse'."
                )
            # Several processes keep the anchors that they have agreed on.
            moved = bound is not None and shared_store() is None
            if moved and 3 * bound < self.drift < math.inf and self.every != 1:  # type: ignore[operator]
                # Learned scales change during training, and the growth of errors with them.
                self.every = max(1, (self.every or depth) // 2)
            if self.drift <= DRIFT_LIMIT:
                continue
            if not self.warned:
                # A batch that is not finite must not use up the one warning.
                self.warned = math.isfinite(self.drift)
                warnings.warn(
                    f"Stack: states made again by the inverse are {self.drift:.1e} off (relative), so gradients are "
                    "too; run Stack.diagnose(x) to see where, and keep more states: backprop='reverse(every=k)'.",
                    stacklevel=5,
                )


def distance(a: State, b: State) -> Tensor:
    """|a - b| / |b| over all streams together, on their device; streams that an inverse leaves empty are left out."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x.shape == y.shape]
    error = torch.stack([torch.linalg.vector_norm(_single(x - y)) for x, y in pairs])
    size = torch.stack([torch.linalg.vector_norm(_single(y)) for _, y in pairs])
    # A norm of norms, since streams may differ in shape, and concatenating them would copy all of them.
    return torch.linalg.vector_norm(error) / torch.linalg.vector_norm(size).clamp_min(1e-30)


def _single(x: Tensor) -> Tensor:
    return x.to(torch.complex64) if x.is_complex() else x.float()
