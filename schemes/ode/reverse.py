"""Reversible solves: the backward pass reconstructs the states from the last one, along the recorded step sizes.

Memory holds the step sizes and the returned values. Gradients are those of the discrete solution, up to rounding that
the inverse amplifies (by 1/c a step under McCallum and Foster's rule). The same rules serve solves whose graph is
stored: all ways to differentiate share one solution.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SchemeError
from .control import Control
from .field import Field, clock, fitting
from .marching import Marched, along, march
from .reads import Autocast, Reads, once, refuse_tangents, refuse_transforms
from .rules import Rule, State, Tape
from .run import Run
from .trees import rms

# Relative error of a reconstructed state at which the backward pass is stopped.
DRIFT = 1e-3


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, back: "Backward", forward: Callable[..., Any], y0: Tensor, *reads: Tensor):
        run, state, kept = forward(y0.detach())
        ctx.back, ctx.steps, ctx.streams = back, run.steps, len(state)
        # A solve that stopped early has gone on from its last value, which is then not where its streams are.
        ctx.at_last = run.t == back.times[len(run.ys) - 1]
        # Tensors must be saved by autograd itself, which then detects a write to one; step numbers are kept separately.
        ctx.kept = {n: i for i, n in enumerate(kept)}
        ys = torch.stack(run.ys)
        run.ys = []  # the stacked values are the only ones kept
        ctx.save_for_backward(ys, *state, *(x for s in kept.values() for x in s), *reads)
        return ys

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        refuse_transforms("reverse", grad)
        (ys, *saved), n = ctx.saved_tensors, ctx.streams
        # The first n are the last streams; then n for each place where they started anew.
        kept = {step: tuple(saved[n * (i + 1) : n * (i + 2)]) for step, i in ctx.kept.items()}
        found = ctx.back(ctx.steps, ys.detach(), tuple(saved[:n]), kept, grad, ctx.at_last)
        return None, None, *once("reverse", ys, found)


class Backward:
    """The backward pass of a reversible solve."""

    def __init__(self, r: Rule, func: Callable[[Any, Tensor], Tensor], reads: Reads, times: Sequence[float]):
        self.rule, self.func, self.reads, self.times = r, func, reads, times
        self.precision = Autocast()

    def __call__(
        self,
        steps: list[tuple[float, float]],
        ys: Tensor,
        state: State,
        kept: dict[int, State],
        grad: Tensor,
        at_last: bool,
    ) -> list[Tensor | None]:
        with torch.no_grad(), self.precision.again(grad.device.type), self.reads.unhooked():
            tape = Tape(self.func, self.reads)
            s: State = tuple(state)
            # The loss depends on the first stream alone.
            g: State = (grad[-1] if at_last else torch.zeros_like(s[0]), *(torch.zeros_like(x) for x in s[1:]))
            # Looked up by equal numbers: steps end exactly on the requested times.
            places = {t: i for i, t in enumerate(self.times[:-1])}
            for n in reversed(range(len(steps))):
                t, h = steps[n]
                s, g = self.rule.back(tape, t, h, s, g)
                if n in kept:  # the streams started anew from their value
                    first = self.rule.back_start(tape, t, s, g)
                    s = tuple(kept[n])
                    # The gradients of the other streams have gone into the value from which they started.
                    g = (first, *(torch.zeros_like(x) for x in s[1:]))
                if t in places:
                    i = places[t]
                    self._close(s[0], ys[i], t)
                    g = (g[0] + grad[i], *g[1:])
            # A solve that failed before its first step has one stream, and nothing to go back through.
            found = self.rule.back_start(tape, self.times[0], s, g) if steps else g[0]
        return [found, *tape.gradients]

    def _close(self, again: Tensor, was: Tensor, t: float) -> None:
        """Refuses gradients of states that are not those of the forward pass."""
        drift, size = torch.stack((rms((again - was).abs()), rms(was.abs()))).tolist()
        # Written so that NaN is refused too. A little is allowed where the state itself is zero.
        if not drift <= DRIFT * max(size, 1e-30) + 1e-12:
            raise SchemeError(
                f"odeint: gradient='reverse' made the state at t={t:g} again with a relative error of "
                f"{drift / max(size, 1e-30):.1g}, want {DRIFT:g}; the field is too stiff or the solve too long for an "
                "inverse: take gradient='checkpoint', or more times in t."
            )


def solved(
    r: Rule,
    func: Callable[[Any, Tensor], Tensor],
    y0: Tensor,
    times: Sequence[float],
    steps: Control | Sequence[Sequence[float]],
    check: Callable[[Run], None],
    *,
    gradient: str = "reverse",
    known: Sequence[Tensor] = (),
    **options: Any,
) -> tuple[Tensor, Run]:
    """The values at all times, stacked, and the run.

    Args:
        r: the rule.
        func: the field of packed states.
        y0: the packed state.
        times: strictly monotone.
        steps: tolerances and limits of steps that are chosen, or a grid per interval.
        check: raises where a run failed.
        gradient: "reverse" reconstructs the states; "store" and "checkpoint" as elsewhere.
        known: tensors that func is known to read.
        options: passed to `march`, where steps are chosen.
    """
    f = Field(func, y0)
    runs: list[Run] = []

    def forward(y: Tensor) -> Marched:
        if isinstance(steps, Control):
            found = march(r, f, y, times, steps, again=again, **options)
        else:
            found = along(r, f, y, steps, again)
        found[0].evaluations = f.count[0]
        check(found[0])
        runs.append(found[0])
        return found

    again = gradient == "checkpoint" and torch.is_grad_enabled()
    if gradient != "reverse":
        return torch.stack(forward(y0)[0].ys), runs[0]
    same = fitting(func)
    reads = Reads(same, clock(times[0], y0), y0, known) if torch.is_grad_enabled() else None
    if reads is None or not (y0.requires_grad or len(reads)):
        ys = torch.stack(forward(y0)[0].ys)
        if ys.requires_grad:
            raise SchemeError(
                "odeint: func reads a tensor with a gradient (through a closure) that it did not read at the start of "
                "the solve; read all at every time, or take gradient='store' or 'checkpoint'."
            )
        return ys, runs[0]
    refuse_tangents("reverse")
    ys = _Reverse.apply(Backward(r, same, reads, times), forward, y0, *reads.tensors)
    return ys, runs[0]  # type: ignore[return-value]
