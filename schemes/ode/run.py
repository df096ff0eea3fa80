"""The result of a solve, and how it ended."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .dense import Segment

# No tolerance helps: the last step tried was as short as the number format allows.
NOT_FINITE = (
    "no shorter step helps.\n  Look at what the function gives there (a division, a root, a logarithm), or end the "
    "solve before"
)


@dataclass
class Run:
    """The result of a solve of packed states.

    Attributes:
        ys: values at the requested times, as far as the solve got.
        t: the time that it reached.
        y: the state there.
        status: "finished", "event", "max_steps", "underflow", "not_finite" or "unstable" (of reversible schemes).
        sample: the sample at fault.
        accepted: steps that were kept.
        rejected: steps that were not.
        evaluations: calls of the field.
        steps: start and size of each step that was kept.
        segments: the pieces of the continuous solution, where requested.
        events: the events found, as ``Place``.
    """

    ys: list[Tensor]
    t: float
    y: Tensor
    status: str = "finished"
    sample: int | None = None
    accepted: int = 0
    rejected: int = 0
    evaluations: int = 0
    steps: list[tuple[float, float]] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether the solve stopped before its end, and not at an event."""
        return self.status not in ("finished", "event")

    def reason(self) -> str:
        """What stopped the solve, where, and in which sample."""
        where = f"t={self.t:.6g}" + ("" if self.sample is None else f", sample {self.sample}")
        # No step can be at fault, so the remedy is a different one.
        if self.status == "not_finite" and not self.accepted + self.rejected:
            return f"the state or its slope is not finite at the start, {where}"
        return {
            "not_finite": f"the state stopped being finite after {where}",
            "underflow": f"the step size fell below what the number format resolves at {where}",
            "unstable": f"the streams of a reversible scheme have come apart at {where}, as on stiff fields they do",
            "max_steps": f"{self.accepted + self.rejected} steps were used up at {where}",
        }[self.status]
