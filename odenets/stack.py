"""Stack: residual functions, put together by a scheme."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from schemes import registry
from schemes.errors import SchemeError
from schemes.runge_kutta import RungeKutta
from schemes.scheme import Function, Scheme, Slot, State
from schemes.step_size import Fixed, FromError, StepSize, step_size

from . import checks, structure
from . import monitor as watching
from .modes import Checkpoint, Exact, Mode, Reverse, mode, written
from .recompute import buffers_kept
from .step import Step
from .undo import made


def as_residual(module: nn.Module) -> nn.Module:
    """Makes a residual function of a module that has a skip of its own: x -> module(x) - x.

    Example:
        >>> import torch
        >>> from odenets import Stack, as_residual
        >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        >>> x = torch.randn(1, 3, 8)
        >>> torch.allclose(Stack(as_residual(layer), "euler")(x), layer(x), atol=1e-6)
        True
    """
    return _AsResidual(module)


class _AsResidual(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x) - x


class Estimate(NamedTuple):
    """What ``Stack.forward_with_errors`` returns: the output, and one error estimate per step."""

    output: Tensor
    errors: list[Tensor]


class _Visits(list):
    """Takes the states of a run one by one, and keeps none."""

    def __init__(self, visitor: Callable[[int, State], None] | None):
        super().__init__()
        self.visitor, self.n = visitor, 0

    def append(self, state: State) -> None:
        if self.visitor is not None:
            self.visitor(self.n, state)
        self.n += 1


class Stack(nn.Module):
    """Residual functions put together by a scheme: a residual network is a numerical scheme.

    ``block`` is one residual function shared by all stages (a module or a callable; an nn.Sequential is one module), or
    a sequence of them, one per stage in order. A residual function has no skip of its own (see ``as_residual``),
    returns the shape of the stream that it updates, never writes to its arguments, and may take a time ``t`` and a
    ``context`` by those names.

    State-dict keys, stable: ``steps.{n}.fs.{i}.*`` for residual function i of step n, ``steps.0.gs.{i}.*`` for
    shortcuts, ``steps.{n}.h`` for learned step sizes, ``block.*`` for a shared residual function, ``after.*``.

    Args:
        block: the residual function, or the residual functions.
        scheme: a name, an expression such as "nested(midpoint, repeat(euler, 2))", or a Scheme.
        depth: number of steps; given by a sequence, 1 for a shared residual function.
        shortcut: module used by the first step in place of the identity (stride, projection). The residual functions
            that see the step's input itself (``Slot.raw``) make the same stride and width. For schemes of several
            streams one per stream, or a list of those, one per step (learned scales; None where there is none).
        step: step size: a number, "learned", "decay(rate)", "error(tol)".
        steps_before: steps that come before this stack in the whole network; a decay counts from there.
        after: applied to the streams after each step (the ReLU on the sum of post-activation networks).
        backprop: "store", "checkpoint" or "checkpoint(k)": keep the state every k steps and recompute the rest, with
            dropout replayed and BatchNorm statistics moved once.
        example: a tensor or the shape of one; shapes are then checked here and not at the first call.

    Shapes:
        x: whatever the residual functions take, e.g. (n, c, h, w); the output likewise.

    Raises:
        SchemeError: unknown scheme, counts that do not fit (the nearest that do are named), shapes that do not agree.

    Warns:
        MixingWarning: a scheme whose mixing figure is above 30, over separate weights.

    Example:
        >>> import torch
        >>> from odenets import Stack
        >>> blocks = [torch.nn.Linear(4, 4) for _ in range(8)]
        >>> stack = Stack(blocks, scheme="rk4")
        >>> stack.depth, stack.evaluations, stack(torch.randn(2, 4)).shape
        (2, 8, torch.Size([2, 4]))
    """

    block: nn.Module | None
    steps: Sequence[Step]  # in truth an nn.ModuleList

    def __init__(
        self,
        block: nn.Module | Function | Sequence[nn.Module | Function],
        scheme: str | Scheme = "euler",
        depth: int | None = None,
        *,
        shortcut: nn.Module | Sequence[nn.Module] | Sequence[Sequence[nn.Module | None]] | None = None,
        step: float | str | StepSize = 1.0,
        steps_before: int = 0,
        after: nn.Module | None = None,
        backprop: str | Mode = "store",
        example: Tensor | Sequence[int] | None = None,
    ):
        super().__init__()
        self.scheme = registry.get(scheme)
        self.backprop = mode(backprop)
        self.rule = step_size(step)
        functions, shared = structure.functions_of(block)
        plan = self.scheme.plan
        if shared is None:
            depth = structure.depth_of(self.scheme, len(functions), depth)
        elif depth is None:
            depth = len(plan)
        elif isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise SchemeError(f"Stack: depth is {depth!r}, want a whole number of steps, at least 1.")
        for f in functions:
            checks.warn_of_own_skip(f)
        if shared is None:
            structure.warn_of_mixing(self.scheme)
            structure.warn_of_unused(self.scheme, self.rule)
        if isinstance(self.rule, FromError):
            structure.check_companion(self.scheme)
            if self.backprop is not None:
                raise SchemeError(
                    f"Stack: step='{self.rule}' makes each step depend on the step before; want backprop='store'."
                )
        shortcuts = structure.shortcuts_of(shortcut, self.scheme, depth)
        if isinstance(self.backprop, (Reverse, Exact)):
            _keep_eager()
            structure.check_reverse(self.scheme, after, isinstance(self.backprop, Exact))
        self.block = shared
        self.after = after
        self.depth = depth
        steps = []
        # A continuous scheme with one shared function and nothing between the steps is one solve over the whole depth.
        merged = shared is not None and self.scheme.nodes is None and after is None
        start = 0
        self._initial: list[float] = []
        for n in range(1 if merged else depth):
            part = self.scheme.at(n)
            fs = (shared,) * part.stages if shared is not None else functions[start : start + part.stages]
            start += part.stages
            h = self.rule(steps_before + n) * (depth if merged else 1)
            self._initial.append(h)
            steps.append(Step(part, fs, shortcuts.get(n, ()), h, self.rule.learned, n, shared is not None))
        self.monitor = watching.Monitor()
        self.steps = nn.ModuleList(steps)  # type: ignore[assignment]
        self._timed = any(s.timed for s in steps)
        # Nothing happens before, between or after the steps, which all have residual functions of their own.
        self._direct = (
            self.scheme.streams == 1
            and type(self.scheme).init is Scheme.init
            and type(self.scheme).readout is Scheme.readout
            and self.backprop is None
            and after is None
            and shared is None
            and not self._timed
            and not isinstance(self.rule, FromError)
        )
        self._checked = False
        if example is not None:
            x = example if isinstance(example, Tensor) else torch.zeros(tuple(example))
            with torch.no_grad():
                checks.first_call(self, x, 0.0, None, always=True)
            self._checked = True

    @classmethod
    def from_factory(
        cls,
        make: Callable[[Slot], nn.Module],
        scheme: str | Scheme,
        depth: int,
        *,
        channels: int,
        out_channels: int | None = None,
        **options: Any,
    ) -> "Stack":
        """Makes a stack whose residual functions are made one by one, each from what its place asks for.

        Args:
            make: called once per slot with ``Slot(step, index, in_channels, out_channels, raw)``.
            scheme: as in Stack.
            depth: number of steps.
            channels: width of the input.
            out_channels: width after the first step, where the shortcut changes it.
            options: passed to Stack.

        Example:
            >>> import torch
            >>> from odenets import Stack
            >>> make = lambda slot: torch.nn.Linear(slot.in_channels[0], slot.out_channels)
            >>> net = Stack.from_factory(make, "rk4", 2, channels=4, out_channels=8, shortcut=torch.nn.Linear(4, 8))
            >>> net(torch.randn(3, 4)).shape
            torch.Size([3, 8])
        """
        found = registry.get(scheme)
        streams = found.stream_widths(channels)
        fs: list[nn.Module] = []
        for n in range(depth):
            part = found.at(n)
            out = out_channels if n == 0 else None
            fs += [make(slot) for slot in part.slots(n, streams, out)]
            streams = part.widths(n, streams, out)
        return cls(fs, found, depth, **options)

    def forward(self, x: Tensor, *, t: float | Tensor = 0.0, context: Any = None) -> Tensor:
        """The readout of the last step.

        Args:
            x: the input.
            t: time at the start, for residual functions that take one.
            context: what residual functions with a parameter ``context`` read.
        """
        if self._direct and self._checked:
            state: State = (x,)
            for step in self._modules["steps"]._modules.values():  # type: ignore[union-attr]
                state = step(state, None, None, context)  # type: ignore[misc]
            return state[0]
        if not self._checked and not torch.compiler.is_compiling():
            if not isinstance(x, Tensor):
                raise SchemeError(f"Stack: the input is a {type(x).__name__}, want a tensor.")
            y = checks.first_call(self, x, t, context)
            self._checked = True
            return y
        return self.run(x, t, context)

    def run(self, x: Tensor, t: Any, context: Any) -> Tensor:
        """The forward pass without the checks of a first call."""
        if isinstance(self.rule, FromError):
            return self.forward_with_errors(x, t=t, context=context).output
        state = self._start(x, t, context)
        time = t if self._timed else None
        if isinstance(self.backprop, (Reverse, Exact)) and torch.is_grad_enabled():
            return self.scheme.readout(_eager(self, self.backprop, state, time, context))
        if isinstance(self.backprop, Checkpoint) and torch.is_grad_enabled():
            every = self.backprop.every
            for first in range(0, len(self.steps), every):
                state = self._recomputed(self.steps[first : first + every], state, time, context)
                if time is not None:
                    time = time + sum(s.scheme.span * s.h for s in self.steps[first : first + every])
            return self.scheme.readout(state)
        return self.scheme.readout(self._advance(self.steps, state, time, context))

    def _start(self, x: Tensor, t: Any, context: Any) -> State:
        if type(self.scheme).init is Scheme.init:
            return (x,)
        first = self.steps[0]
        return self.scheme.init(first.start(self.block, t if self._timed else None, context), x, first.h)

    def _advance(self, steps: Iterable[Step], state: State, time: Any, context: Any) -> State:
        for step in steps:
            state = step(state, self.block, time, context)
            if self.after is not None:
                state = tuple(self.after(x) for x in state)
            if time is not None:
                time = time + step.scheme.span * step.h
        return state

    def _recomputed(self, steps: Sequence[Step], state: State, time: Any, context: Any) -> State:
        """Steps whose inner tensors are dropped, and made again in the backward pass with the same dropout."""
        modules = [*steps, *(m for m in (self.block, self.after) if m is not None)]
        return checkpoint(
            lambda *streams: self._advance(steps, streams, time, context),
            *state,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), buffers_kept(modules)),
        )  # type: ignore[return-value]

    def _reversed(
        self, how: Reverse | Exact, state: State, time: Any, context: Any, states: list[State] | None = None
    ) -> State:
        return self.monitor.run(self, how, state, time, context, states)

    def trajectory(self, x: Tensor, *, t: float | Tensor = 0.0, context: Any = None) -> list[Tensor]:
        """The readout after each step, ``depth`` tensors, the last one the output; differentiable.

        A continuous scheme is solved from one whole time to the next.
        """
        if isinstance(self.rule, FromError):
            raise SchemeError("Stack: trajectory has no step sizes from errors; use forward_with_errors.")
        state = self._start(x, t, context)
        time = t if self._timed or self.scheme.nodes is None else None
        if isinstance(self.backprop, (Reverse, Exact)) and torch.is_grad_enabled():
            states: list[State] = []
            _eager(self, self.backprop, state, time, context, states)
            return [self.scheme.readout(s) for s in states]
        found = []
        for n in range(self.depth):
            step = self.steps[n if n < len(self.steps) else 0]
            h = step.h if len(self.steps) == self.depth else step.h / self.depth
            state = step(state, self.block, time, context, h)
            if self.after is not None:
                state = tuple(self.after(x) for x in state)
            if time is not None:
                time = time + step.scheme.span * h
            found.append(self.scheme.readout(state))
        return found

    def visit(
        self,
        x: Tensor,
        visitor: Callable[[int, State], None] | None = None,
        *,
        t: float | Tensor = 0.0,
        context: Any = None,
    ) -> State:
        """Runs the steps, calls ``visitor(n, streams)`` after step n, and returns the last streams; differentiable.

        For heads that read the middle of a network: they see a state while it exists, and none is kept for them.
        """
        state = self._start(x, t, context)
        time = t if self._timed else None
        seen = _Visits(visitor)
        if isinstance(self.backprop, Reverse) and torch.is_grad_enabled():
            return _eager(self, self.backprop, state, time, context, seen)
        advance = self._recomputed if self.backprop is not None and torch.is_grad_enabled() else self._advance
        for step in self.steps:
            state = advance((step,), state, time, context)
            seen.append(state)
            if time is not None:
                time = time + step.scheme.span * step.h
        return state

    def final_state(self, x: Tensor, *, t: float | Tensor = 0.0, context: Any = None) -> State:
        """All streams after the last step, before the readout: what ``inverse`` can start from."""
        state, time = self._start(x, t, context), t if self._timed else None
        if isinstance(self.backprop, Reverse) and torch.is_grad_enabled():
            return _eager(self, self.backprop, state, time, context)
        return self._advance(self.steps, state, time, context)

    def diagnose(self, x: Tensor, *, t: float | Tensor = 0.0, context: Any = None) -> watching.Diagnosis:
        """Runs each step forward and back without gradients, and reports what is finite, drifts and grows errors.

        Statistics and generators are left as they were.

        Raises:
            SchemeError: the scheme has no inverse.

        Example:
            >>> import torch
            >>> from odenets import Stack
            >>> stack = Stack([torch.nn.Linear(2, 2) for _ in range(4)], "revnet", backprop="reverse")
            >>> [r.finite for r in stack.diagnose(torch.randn(3, 4)).steps]
            [True, True]
        """
        if not self.scheme.invertible or self.after is not None:
            raise SchemeError(f"Stack: diagnose runs steps back, and {self.scheme} or after= has no inverse.")
        time = t if self._timed else None
        return watching.diagnose(self, lambda: self._start(x, t, context), time, context)

    def inverse(self, y: Tensor | State, *, t: float | Tensor = 0.0, context: Any = None) -> Tensor:
        """The input whose output is y.

        Args:
            y: an output, where the readout loses nothing (revnet); else all streams, from ``final_state``.
            t: time at the start of the forward pass.
            context: as in the forward pass.

        Raises:
            SchemeError: the scheme has no inverse, or the readout does not tell its streams.
        """
        if not self.scheme.invertible or self.after is not None:
            what = "after= cannot be undone" if self.scheme.invertible else f"{self.scheme} has no inverse"
            raise SchemeError(f"Stack: {what}; choose an invertible scheme such as revnet.")
        if isinstance(y, Tensor) and any(made(step) for step in self.steps):
            raise SchemeError(f"Stack: {self.scheme} makes streams that its output does not tell; use final_state(x).")
        state = self.scheme.state_from_output(y) if isinstance(y, Tensor) else tuple(y)
        times: list[Any] = [t if self._timed else None]
        for step in self.steps:
            times.append(None if times[-1] is None else times[-1] + step.scheme.span * step.h)
        for n in range(len(self.steps) - 1, -1, -1):
            step = self.steps[n]
            fs, gs = step.functions(state, self.block, times[n], context, step.h)
            state = step.scheme._inverse(fs, state, step.h, gs)
        return self.scheme.input_from_state(state)

    def forward_with_errors(self, x: Tensor, *, t: float | Tensor = 0.0, context: Any = None) -> Estimate:
        """The output and each step's error estimate h sum_i (b_hat_i - b_i) k_i, of the shape of the stream.

        Differentiable: log its size, add it to the loss, or let ``step="error(tol)"`` choose the step sizes by it.

        Raises:
            SchemeError: the scheme has no embedded companion.
        """
        structure.check_companion(self.scheme)
        state = self._start(x, t, context)
        time = t if self._timed else None
        h = self.steps[0].h
        errors = []
        for step in self.steps:
            if not isinstance(self.rule, FromError):
                h = step.h
            state, error = step.with_error(state, self.block, time, context, h)
            if self.after is not None:
                state = tuple(self.after(x) for x in state)
            if time is not None:
                time = time + h
            if isinstance(self.rule, FromError):
                assert isinstance(step.scheme, RungeKutta)
                h = self.rule.following(h, error, step.scheme.pair_order)
            errors.append(error)
        return Estimate(self.scheme.readout(state), errors)

    def set_step(self, h: float) -> None:
        """Sets the size of every step, as a schedule over the epochs does; a decay keeps its ratios.

        Raises:
            SchemeError: the step sizes are learned.
        """
        if self.rule.learned:
            raise SchemeError("Stack: the step sizes are learned; a schedule cannot set them too.")
        Fixed(h)
        first = self.rule(0)
        for step, h0 in zip(self.steps, self._initial, strict=True):
            step.h = h * h0 / first

    @property
    def evaluations(self) -> int:
        """Calls of residual functions in one forward pass; of an adaptive solver, those of the last one."""
        if isinstance(self.rule, FromError):  # the companion reads all of them
            return sum(s.scheme.stages for s in self.steps)
        return sum(s.calls[0] if s.scheme.evaluations is None else s.scheme.evaluations for s in self.steps)

    def extra_repr(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        parts = [str(self.scheme), f"depth={self.depth}"]
        parts.append("evaluations=adaptive" if self.scheme.evaluations is None else f"evaluations={self.evaluations}")
        parts.append(f"parameters={count:,}")
        if str(self.rule) != "1":
            parts.append(f"step={self.rule}")
        if self.backprop is not None:
            parts.append(f"backprop={written(self.backprop)}")
        return ", ".join(parts)


_kept: list[Any] = []


def _keep_eager() -> None:
    """Keeps torch.compile out of the reverse modes. Asking for it loads the compiler, so no import does it."""
    if not _kept:
        _kept.append(torch.compiler.disable(Stack._reversed))


def _eager(stack: Stack, *args: Any) -> State:
    return (_kept[0] if _kept else Stack._reversed)(stack, *args)
