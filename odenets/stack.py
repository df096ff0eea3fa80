"""Stack: residual functions combined by a scheme."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from schemes import registry
from schemes.adaptive import Adaptive
from schemes.deprecation import adopt, renamed_arguments
from schemes.errors import SchemeError
from schemes.ode.field import number
from schemes.scheme import Function, Scheme, Slot, State, Takes
from schemes.step_size import Fixed, FromError, StepSize, step_size

from . import build, checks, times
from .auxiliary import LOG_DET, Sink, names_of
from .backprop.choice import Chosen, Report
from .backprop.diagnose import Diagnosis, diagnose
from .backprop.modes import Mode, Store, WithErrors, format_mode, parse_mode
from .backprop.monitor import Monitor
from .backprop.planning import Planning
from .backprop.surroundings import initialise, nothing_changed
from .backprop.walk import Observer, Pass
from .solves import Solve, Solves
from .step import Revision, Step
from .tracing import is_traced

_OLD = {"steps_before": "step_offset", "after": "post_step"}  # names of arguments before 0.2
Run = Callable[[Any, Pass], State]  # runs a pass from an input


class Estimate(NamedTuple):
    """The result of ``Stack.forward_with_errors``: the output, and one error estimate per step."""

    output: Tensor
    errors: list[Tensor]


class Stack(nn.Module):
    """Residual functions combined by a scheme: a residual network is a numerical scheme.

    ``block`` is one residual function shared by all stages (a module or a callable; an nn.Sequential is one module), a
    sequence of residual functions, one per stage in order, or ``PerSlot([f, g])``, one shared function for each slot
    of a step. A residual function has no skip connection of its own (see ``as_residual``), returns a tensor of the
    shape of the stream that it updates, never writes to its arguments, and may take a time ``t`` and a ``context``
    under those names.

    Stable state-dict keys: ``steps.{n}.fs.{i}.*`` for residual function i of step n, ``steps.0.gs.{i}.*`` for
    shortcuts, ``steps.{n}.h`` for learned step sizes, ``block.*`` for a shared residual function, ``block.{i}.*`` for
    one shared function per slot, ``after.*`` for ``post_step``.

    Args:
        block: the residual function, or the residual functions.
        scheme: a name, an expression such as "nested(midpoint, repeat(euler, 2))", or a Scheme.
        depth: number of steps; implied by a sequence; for a shared residual function, by default 1 or a mix's period.
        shortcut: module that replaces the identity in the first step (stride, projection). The residual functions that
            see the step's input itself (``Slot.raw``) apply the same stride and width. For schemes of several streams,
            one module per stream, or a list of such lists, one per step (learned scales; None for no shortcut).
        step: step size: a number, "learned", "decay(rate)" or "error(tol)"; with "span/depth" or "2/depth" the steps
            end at that time.
        step_offset: number of steps before this stack in the whole network; a decay counts from there.
        post_step: applied to the streams after each step (the ReLU on the sum of post-activation networks).
        backprop: "store" keeps what autograd saves; "checkpoint" or "checkpoint(k)" keeps the state every k steps and
            recomputes the rest, with dropout replayed and BatchNorm statistics updated once; "reverse" keeps the last
            state, from which the scheme's inverse reconstructs the others; "exact" does so to the last bit; "offload"
            keeps everything on the host; "4*store + 8*reverse" is a plan of several modes; "auto(memory=2GB)" chooses
            a plan by measurement.
        example: a tensor or its shape; shapes are then checked at construction instead of at the first call.
        seed: seeds a generator of the stack's own, from which a scheme that draws in training (bdia) takes its random
            numbers, the same on every device; None uses torch's generator.

    Shapes:
        x: whatever the residual functions take, e.g. (n, c, h, w); the output likewise.

    Raises:
        SchemeError: unknown scheme, counts that do not fit (the nearest that do are named), shapes that do not agree.

    Warns:
        MixingWarning: a scheme with a mixing figure above 30, used with separate weights.

    Example:
        >>> import torch
        >>> from odenets import Stack
        >>> blocks = [torch.nn.Linear(4, 4) for _ in range(8)]
        >>> stack = Stack(blocks, scheme="rk4")
        >>> stack.depth, stack.evaluations, stack(torch.randn(2, 4)).shape
        (2, 8, torch.Size([2, 4]))
    """

    block: nn.Module | None
    steps: Sequence[Step]  # at runtime an nn.ModuleList
    _solves: tuple[Solve, ...]
    into: Sink | None = None  # where passes add their auxiliary values; set by ``gather.gathered``

    def __init__(
        self,
        block: nn.Module | Function | Sequence[nn.Module | Function],
        scheme: str | Scheme = "euler",
        depth: int | None = None,
        *,
        shortcut: nn.Module | Sequence[nn.Module] | Sequence[Sequence[nn.Module | None]] | None = None,
        step: float | str | StepSize = 1.0,
        step_offset: int = 0,
        post_step: nn.Module | None = None,
        backprop: str | Mode | None = "store",
        example: Tensor | Sequence[int] | None = None,
        seed: int | None = None,
        **old: Any,
    ):
        super().__init__()
        step_offset, post_step = build.newer(renamed_arguments("Stack", old, _OLD), step_offset, post_step)
        # All arguments are read before anything is built, so that a refused one has no side effects.
        mode, start = parse_mode(backprop), None if example is None else build.example_of(example)
        self.scheme, functions, shared = build.read(scheme, block)
        self.depth = build.depth_of(self.scheme, None if shared is not None else len(functions), depth)
        self.rule = build.resolved(step_size(step), shared, self.scheme, self.depth)
        build.warn(self.scheme, self.rule, functions, shared is not None)
        # One revision for all steps: replacing any function makes the whole stack read its signatures again.
        self._revision, self._draws = Revision(), build.draws_of(self.scheme, seed)
        self.block = shared
        # The attribute keeps the name of the state-dict keys.
        self.after = None if post_step is None else build.called(post_step, "post_step")
        # A continuous scheme with one shared function and nothing between the steps is one solve over the whole depth.
        self._merged = shared is not None and self.scheme.nodes is None and post_step is None
        shortcuts = build.shortcuts_of(shortcut, self.scheme, self.depth)
        self._sizes = build.sizes_of(self.rule, step_offset, self.depth)
        build.check_end(build.fields_shared(shared), self._sizes, self.scheme)
        # ``set_step`` scales these, so that the ratios between steps stay those of the rule, whatever was set before.
        self._initial = [build.sum_of(self._sizes, self.rule)] if self._merged else self._sizes
        self._check_mode(mode)
        parts = (self.scheme, functions, shared, shortcuts, self._initial, self.rule.learned)
        self.monitor, self._inverse_monitor = Monitor(), Monitor()
        self.steps = nn.ModuleList(build.steps_of(*parts, self._revision, self._draws))  # type: ignore[assignment]
        # Determined from the class, since calling ``init`` would run residual functions.
        self._makes_streams = type(self.scheme).init is not Scheme.init
        self._calls, self._solves = 0, ()  # evaluations and solves of an adaptive solver in the last pass
        self.backprop = mode
        if start is not None:
            # Without gradients, and with side effects undone: an example determines shapes and nothing else.
            with torch.no_grad():
                self._first_call(start, self._pass(0.0, None), self._run, always=True)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "post_step":  # torch would make it a child that never runs
            raise SchemeError(
                "Stack: post_step= is given when a stack is built, whose steps and mode are checked with it.\n"
                "  Build it anew: Stack(..., post_step=...); the module itself may be changed."
            )
        super().__setattr__(name, value)
        # Only after the assignment succeeded: one that torch refuses must not make the signatures stale.
        if name in ("block", "after"):
            self._revision.stale = True

    @property
    def backprop(self) -> Mode:
        """The mode of backpropagation; setting it, to a mode or its text, checks that it fits the scheme.

        Raises:
            SchemeError: an unknown mode, or one that this scheme cannot run.
        """
        return self._backprop

    @backprop.setter
    def backprop(self, mode: str | Mode | None) -> None:
        # All checks come before the attribute changes.
        found = parse_mode(mode)
        self._check_mode(found)
        self._backprop = found
        self._read_functions()

    def _check_mode(self, mode: Mode) -> None:
        """Refuses a mode that this stack cannot run."""
        mode.check(self.scheme, self.after)
        mode.check_depth(len(self._initial))
        if isinstance(self.rule, FromError):
            build.check_companion(self.scheme)
            if not mode.keeps_all:
                raise SchemeError(
                    f"Stack: step='{self.rule}' makes each step depend on the step before; want backprop='store'."
                )

    def _read_functions(self) -> None:
        """Reads which arguments the residual functions take, and makes the next calls check the functions again."""
        for step in self.steps:
            step.read(self.block)
        every = [takes for step in self.steps for takes in step.takes]
        time, context, opaque = (any(getattr(takes, what) for takes in every) for what in ("time", "context", "opaque"))
        self._takes = Takes(time, context, opaque=opaque)
        self._fields = build.fields_shared(self.block)
        # Pairs (training, gradients enabled): a function may write to its arguments under one pair and not another.
        # Cleared together with the signatures, since a new function has not been checked.
        self._checked: set[tuple[bool, bool]] = set()
        self._revision.stale = False
        # True where nothing happens before, between or after the steps, and all have residual functions of their own.
        self._direct = (
            self._backprop.keeps_all
            and self.scheme.streams == 1
            and self.scheme.evaluations is not None  # solves are counted, and an adjoint is guarded, by the pass
            and not self._makes_streams
            and type(self.scheme).readout is Scheme.readout
            and self.after is None
            and self.block is None
            and not (self._takes.time or self._takes.opaque)
            and not isinstance(self.rule, FromError)
        )

    def look_again(self) -> None:
        """Marks the signatures stale when what functions take or return has changed without a module being replaced."""
        self._revision.stale = True

    @property
    def takes(self) -> Takes:
        """The arguments that this stack takes as a residual function of another stack."""
        return self._takes

    @property
    def post_step(self) -> nn.Module | None:
        """The module applied to the streams after each step, if any."""
        return self.after

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
        """Builds a stack whose residual functions are made one by one, each to the requirements of its slot.

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
        return cls(build.functions_made(make, found, depth, channels, out_channels), found, depth, **options)

    def forward(
        self, x: Tensor, *, t: float | Tensor = 0.0, context: Any = None, aux: bool | str | Collection[str] = False
    ) -> Any:
        """Returns the readout of the last step.

        Args:
            x: the input; or, under a scheme of several streams, a tuple of streams, which makes the result a tuple too.
            t: time at the start, for residual functions that take one.
            context: passed to residual functions that have a parameter ``context``.
            aux: returns a pair: the readout and a dictionary of auxiliary values, each summed over the calls of the
                residual functions in the steps. True selects all that these return beside their value,
                ``return y, {"balance": loss}``; a name, or several, selects those. "log_det" is the log-determinant of
                a coupling's steps, (n,). The values have gradients in every mode of backpropagation.

        Raises:
            SchemeError: a name that no function returned, or the log-determinant of a scheme that has none.
        """
        if (
            self._direct
            and aux is False
            and self.into is None
            and (self.training, torch.is_grad_enabled()) in self._checked
            and context is None
            and not self._revision.stale
            and isinstance(x, Tensor)
        ):  # the walk without its overhead, which is microseconds on small states
            state: State = (x,)
            for step in self._modules["steps"]._modules.values():  # type: ignore[union-attr]
                state = step(state)  # type: ignore[misc]
            return state[0]
        # A tuple of streams as input returns a tuple of streams.
        readout = self.scheme.readout if isinstance(x, Tensor) or is_traced(x) else tuple
        if aux is False:
            return readout(self._walk(x, self._pass(t, context)))
        names = names_of(aux)
        sink = Sink(not isinstance(names, bool) and LOG_DET in names)
        return readout(self._walk(x, self._pass(t, context, sink=sink))), sink.sums(names)

    def _pass(self, t: Any, context: Any, on_step: Observer | None = None, **collected: Any) -> Pass:
        """A pass through the steps, with its observer and what it collects into (``sink``, ``solves``)."""
        if self._revision.stale:
            self._read_functions()
        checks.check_given(self._takes, t, context)
        if self._fields:  # a replaced field or a loaded state dict may have changed the span
            build.check_end(self._fields, self._sizes, self.scheme)
        steps, sizes = self.steps, None
        if self._merged and on_step is not None:  # a continuous scheme is then solved step by step
            # Steps of size 0 have no ratios.
            total, parts = (self._initial[0], self._sizes) if self._initial[0] else (self.depth, [1.0] * self.depth)
            scale = steps[0].h / total
            steps, sizes = [steps[0]] * self.depth, [scale * part for part in parts]
        time = t if self._takes.time else None
        return Pass(steps, self.monitor, self.block, self.after, time, context, sizes, on_step, **collected)

    def _start(self, x: Any, given: Pass) -> State:
        """The streams that a pass starts from."""
        if not isinstance(x, Tensor) and not is_traced(x):
            return build.streams_of(x, self.scheme)
        if not self._makes_streams:
            return (x,)
        first = self.steps[0]
        return self.scheme.init(first.start(self.block, given.time, given.context), x, first.h)

    def _walk(self, x: Tensor | State, given: Pass, run: Run | None = None) -> State:
        """The state after the last step of a pass; ``run`` runs it, by default under the mode of backpropagation."""
        run = run or self._run
        if (into := self.into) is not None:
            # A sink for this pass alone, since a mode may take out the values that it finds in it.
            self.into, own = None, Sink(into.log_det) if given.sink is None else given.sink
            try:
                state = self._checked_run(x, given._replace(sink=own), run)
            finally:
                self.into = into
            into.extend(own)
            return state
        return self._checked_run(x, given, run)

    def _checked_run(self, x: Tensor | State, given: Pass, run: Run) -> State:
        """Runs a pass, under the checks of a first call where it is one."""
        if is_traced(x):  # a proxy has nothing that could be checked
            build.check_traced("Stack", self.scheme, self._backprop.keeps_all, self.training)
            return run(x, given)
        seen = (self.training, torch.is_grad_enabled())
        # Under a compiler or a trace the checks would be recorded in the graph.
        if seen not in self._checked and not torch.compiler.is_compiling() and not torch.jit.is_tracing():  # type: ignore
            return self._first_call(x, given, run)
        return run(x, given)

    def _first_call(self, x: Tensor | State, given: Pass, run: Run, always: bool = False) -> State:
        """Runs a pass under ``checks.watch``; restores buffers and generators if it fails, or always."""
        if not isinstance(x, (Tensor, tuple, list)):
            raise SchemeError(f"Stack: the input is a {type(x).__name__}, want a tensor.")
        # Before the watch: a lazy layer changes its class and its parameters in its first call.
        initialise(self, lambda: run(x, given._replace(on_step=None, sink=None, solves=None)))
        for step in self.steps:
            # Steps that have returned auxiliary values stay wrapped. The others are examined again, since functions
            # may differ in training, or with gradients.
            step.auxiliary = step.auxiliary or None  # decided by what the functions return now
        with nothing_changed([self], always, (given.time, given.context)):
            state = run(x, given._replace(wrap=checks.watch_inverse if given.inverted else checks.watch))
        for step in self.steps:
            step.auxiliary = bool(step.auxiliary)
        self._checked.add((self.training, torch.is_grad_enabled()))
        return state

    def _run(self, x: Tensor | State, given: Pass) -> State:
        state = self._start(x, given)
        # A rule that reads errors wraps the mode, so that no mode needs to know about step sizes.
        mode = WithErrors(self._backprop, self.rule) if isinstance(self.rule, FromError) else self._backprop
        if self.scheme.evaluations is not None:
            return mode.run(given, state)
        # A list, so that residual functions deep inside a solver can increment the count.
        calls, solves = [0], given.solves or Solves()
        if solves.at:
            # Values within a step are outputs too, of which a mode that recomputes steps would not know.
            mode = Store()
        try:
            return mode.run(given._replace(calls=calls, solves=solves), state)
        finally:
            # Also after a solve that could not go on, whose status says why. A tuple, since a backward pass that
            # recomputes steps appends to the list.
            self._calls, self._solves = calls[0], tuple(solves.found)

    def trajectory(
        self, x: Tensor, *, at: Sequence[float] | None = None, t: float | Tensor = 0.0, context: Any = None
    ) -> list[Tensor]:
        """Returns the readout after each step, ``depth`` tensors, the last one the output; differentiable.

        A continuous scheme is solved step by step; with ``at`` it is solved as in the forward pass, and evaluated at
        these times.

        Args:
            x: the input, or a tuple of streams.
            at: times since the start, in order, at which to return values instead of after each step: any times under
                an adaptive scheme, otherwise 0 and the ends of steps. Where step sizes are learned, the end of a step
                moves with them, and the other times stay.
            t: time at the start.
            context: passed to residual functions that have this parameter.

        Raises:
            SchemeError: times out of order, beyond the steps, or within a step of a scheme that has no values there;
                or steps of both directions.

        Example:
            >>> import torch
            >>> from odenets import Stack
            >>> stack = Stack(torch.neg, "adaptive(tsit5, rtol=1e-6)", depth=2)
            >>> [round(float(y), 4) for y in stack.trajectory(torch.ones(1), at=[0.5, 1.5])]
            [0.6065, 0.2231]
            >>> stack.solves[0].status
            'finished'
        """
        if at is not None:
            return self._values_at(x, at, t, context)
        found: list[Tensor] = []
        self._walk(x, self._pass(t, context, lambda n, state: found.append(self.scheme.readout(state))))
        return found

    def _values_at(self, x: Tensor, at: Sequence[float], t: Any, context: Any) -> list[Tensor]:
        """The readouts at times since the start."""
        lengths, slack = times.lengths_of(self.steps, self.rule), times.slack_of(self.steps, at)
        if isinstance(self.scheme, Adaptive):
            solves = Solves(times.at_ends(times.times_within(at, lengths, slack), lengths, slack))
            self._walk(x, self._pass(t, context, solves=solves))
            return solves.values
        found: dict[int, Tensor] = {}

        def on_step(n: int, state: State) -> None:
            if n + 1 in places:
                found[n + 1] = self.scheme.readout(state)

        given = self._pass(t, context, on_step)
        if given.sizes is not None:  # another scheme that is one solve over the depth, here taken step by step
            lengths = [self.scheme.span * number(h) for h in given.sizes]
        places = times.ends_at(times.times_within(at, lengths, slack), lengths, slack, self.scheme)
        if 0 in places:
            found[0] = self.scheme.readout(self._start(x, given))
        self._walk(x, given)
        return [found[n] for n in places]

    def visit_states(
        self, x: Tensor, visitor: Observer | None = None, *, t: float | Tensor = 0.0, context: Any = None
    ) -> State:
        """Runs the steps, calls ``visitor(n, streams)`` after step n, and returns the last streams; differentiable.

        For heads that read intermediate states: they see each state while it exists, and none is kept for them.

        Args:
            x: the input, or a tuple of streams.
            visitor: called after each step; None visits nothing.
            t: time at the start.
            context: passed to residual functions that have this parameter.
        """
        return self._walk(x, self._pass(t, context, visitor))

    def final_state(self, x: Tensor, *, t: float | Tensor = 0.0, context: Any = None) -> State:
        """Returns all streams after the last step, before the readout; ``inverse`` can start from them.

        Args:
            x: the input, or a tuple of streams.
            t: time at the start.
            context: passed to residual functions that have this parameter.
        """
        return self._walk(x, self._pass(t, context))

    def forward_with_errors(self, x: Tensor, *, t: float | Tensor = 0.0, context: Any = None) -> Estimate:
        """Returns the output and each step's error estimate h sum_i (b_hat_i - b_i) k_i, of the shape of the stream.

        The estimates are differentiable: log their size, add them to the loss, or let ``step="error(tol)"`` choose the
        step sizes by them.

        Args:
            x: the input, or a tuple of streams.
            t: time at the start.
            context: passed to residual functions that have this parameter.

        Raises:
            SchemeError: the scheme has no embedded companion.
        """
        build.check_companion(self.scheme)
        # Under step="error(tol)" the rule chooses the sizes here too, so that the errors are those of the steps taken.
        mode = WithErrors(self._backprop, self.rule if isinstance(self.rule, FromError) else None)
        errors: list[Tensor] = []

        def run(x: Any, given: Pass) -> State:
            state, errors[:] = mode.estimates(given, self._start(x, given))
            return state

        return Estimate(self.scheme.readout(self._walk(x, self._pass(t, context), run)), errors)

    def diagnose(self, x: Tensor, *, t: float | Tensor = 0.0, context: Any = None) -> Diagnosis:
        """Runs each step forward and back without gradients, and reports finiteness, drift and growth of errors.

        Leaves statistics and generators unchanged.

        Args:
            x: the input, or a tuple of streams.
            t: time at the start.
            context: passed to residual functions that have this parameter.

        Raises:
            SchemeError: the scheme has no inverse.

        Example:
            >>> import torch
            >>> from odenets import Stack
            >>> stack = Stack([torch.nn.Linear(2, 2) for _ in range(4)], "revnet", backprop="reverse")
            >>> [r.finite for r in stack.diagnose(torch.randn(3, 4)).steps]
            [True, True]
        """
        self._check_invertible(self.training and self.scheme.reversible_in_training)
        given, found = self._pass(t, context), list[Diagnosis]()

        def run(x: Any, given: Pass) -> State:
            state = self._start(x, given)
            found[:] = [diagnose(given, state)]
            return state

        with torch.no_grad():
            # Before all is noted that is to be left unchanged: a lazy layer has nothing yet.
            initialise(self, lambda: self._run(x, given))
            with nothing_changed([self], True, (given.time, context)):
                self._checked_run(x, given, run)  # without ``into``: a diagnosis adds no auxiliary values
        return found[0]

    def plan(
        self, x: Tensor, *, memory: float | str | None = None, t: float | Tensor = 0.0, context: Any = None
    ) -> Report:
        """Returns a report on the cost of training by segment, predicted and measured; printed, it is a table.

        The report is on the current mode; "auto" makes its choice here, if it has not yet, and trains by it. With
        ``memory``, it is on the fastest plan that fits, which its ``apply()`` sets. Gradients, statistics and
        generators are left as they were. For a whole model see ``odenets.plan``.

        Args:
            x: an input of the size used in training.
            memory: the memory that training may take, such as "2GB", or a number of MiB.
            t: time at the start.
            context: passed to residual functions that have a parameter ``context``.

        Raises:
            SchemeError: no plan fits; the message says what is missing.

        Example:
            >>> import torch
            >>> from odenets import Stack
            >>> stack = Stack([torch.nn.Linear(8, 8) for _ in range(4)], "revnet", backprop="store + checkpoint")
            >>> [row.mode for row in stack.plan(torch.randn(64, 16)).rows]
            ['store', 'checkpoint']
        """
        stacks = {} if isinstance(self.rule, FromError) else {"": self}
        return Planning(self, stacks, (x,), {"t": t, "context": context}).report(memory)

    def plan_state(self) -> dict[str, Any]:
        """Returns what determines how training runs, as plain values and a tensor, to be saved with a checkpoint.

        This is the plan that "auto" has chosen and where "reverse" keeps anchors; empty before the first training pass.
        With a seed, it includes the state of the stack's generator.
        """
        own = {} if self._draws is None else {"draws": self._draws.generator.get_state()}
        return {**self.monitor.state(), **own}

    def load_plan_state(self, state: Mapping[str, Any]) -> None:
        """Restores what ``plan_state`` returned, so that a resumed run continues exactly.

        Args:
            state: what ``plan_state`` of a stack with the same steps returned.

        Raises:
            SchemeError: it is not such a state, or it is that of another stack; nothing is changed then.
        """
        self._read_plan_state(state)()

    def _read_plan_state(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """Reads what ``plan_state`` returned without changing anything; returns a function that applies it."""
        draws = None
        if isinstance(state, Mapping) and "draws" in state:
            draws, state = state["draws"], {k: v for k, v in state.items() if k != "draws"}
            build.check_draws(draws, self._draws)
        take_over = self.monitor.reader(state, self._read_chosen)

        def load() -> None:
            if draws is not None and self._draws is not None:
                self._draws.generator.set_state(draws)
            take_over()

        return load

    def _read_chosen(self, state: Mapping[str, Any]) -> Chosen:
        found = Chosen.of(state)
        self._check_mode(found.plan)
        return found

    def inverse(self, y: Tensor | State, *, t: float | Tensor = 0.0, context: Any = None, streams: bool = False) -> Any:
        """Returns the input whose output is y; differentiable, under backprop="reverse" in memory constant in depth.

        Args:
            y: an output, if the readout loses nothing (revnet); otherwise all streams, from ``final_state``.
            t: time at the start of the forward pass.
            context: as in the forward pass.
            streams: returns the tuple of streams before the first step instead of the input that they were made from.

        Raises:
            SchemeError: the scheme has no inverse, the readout does not determine its streams, or the number of streams
                is wrong.
        """
        self._check_invertible()
        if isinstance(y, Tensor) and any(step.scheme.streams_added for step in self.steps):
            raise SchemeError(f"Stack: {self.scheme} makes streams that its output does not tell; use final_state(x).")
        if self.into is not None and self.into.log_det:
            raise SchemeError(
                "Stack: an inverse adds no log-determinants; its own is minus that of the forward pass.\n"
                "  stack(x, aux='log_det') at the input x that it returns, or gather other names."
            )
        parts = [step.scheme for step in self.steps]
        state = self.scheme.state_from_output(y) if isinstance(y, Tensor) else build.streams_after(y, parts)
        given = self._pass(t, context)
        starts = [given.time]
        for step in self.steps:
            starts.append(step.end(starts[-1]))
        given = given._replace(steps=list(self.steps)[::-1], monitor=self._inverse_monitor)
        given = given._replace(time=None, times=starts[-2::-1], inverted=True)
        # Exact arithmetic is not used here: the values that it would round were not rounded on the way to y.
        mode = self._backprop if self._backprop.inverts else Store()
        state = self._walk(state, given, lambda y, given: mode.run(given._replace(runner=partial(_invert, given)), y))
        return state if streams else self.scheme.input_from_state(state)

    def _check_invertible(self, or_else: bool = False) -> None:
        if not (self.scheme.invertible or or_else) or self.after is not None:
            what = "post_step= cannot be undone" if self.after is not None else f"{self.scheme} has no inverse"
            raise SchemeError(f"Stack: {what}; choose an invertible scheme such as revnet, without post_step=.")
        for step in self.steps:
            step.check_undone()

    def rebuilt(
        self,
        scheme: str | Scheme | None = None,
        depth: int | None = None,
        *,
        backprop: str | Mode | None = None,
    ) -> "Stack":
        """Returns a stack of the same shared modules, not copies, under another scheme, depth or mode.

        It ends at the same time: twice the depth means half the step size. Arguments left out stay as they are.

        Args:
            scheme: as in Stack.
            depth: number of steps.
            backprop: as in Stack.

        Raises:
            SchemeError: separate weights, which are not a function of time; step sizes that are not plain numbers; or
                anything that Stack refuses.

        Example:
            >>> import torch
            >>> net, x = Stack(torch.tanh, "euler", depth=4, step="1/depth"), torch.ones(1)
            >>> [round(float(net.rebuilt(depth=n)(x) - net.rebuilt("rk4", 64)(x)), 4) for n in (4, 8)]
            [-0.0278, -0.0137]
        """
        rule = build.rule_kept(self.rule, self.block, self.steps)
        new = registry.get(self.scheme if scheme is None else scheme)
        seeded = self._draws is not None and any(part.training_differs for part in new.plan)
        found = Stack(
            self.block,  # type: ignore[arg-type]
            new,
            self.depth if depth is None else depth,
            step=rule,
            post_step=self.after,
            backprop=self.backprop if backprop is None else backprop,
            seed=self._draws.generator.initial_seed() if seeded else None,  # type: ignore[union-attr]
        )
        # Not ``train``, which would set the flags of the shared modules too, such as of a BatchNorm in evaluation mode.
        for m in (found, found.steps, *found.steps):
            m.training = self.training  # type: ignore[union-attr]
        return found

    def set_step(self, h: float) -> None:
        """Sets the size of every step, for a schedule over the epochs; a decay keeps its ratios.

        Args:
            h: size of the first step; with ``step_offset``, of the first step of the whole network.

        Raises:
            SchemeError: the step sizes are learned, or end at the span of the weights.
        """
        if self.rule.learned:
            raise SchemeError("Stack: the step sizes are learned; a schedule cannot set them too.")
        if build.fields_shared(self.block):
            raise SchemeError("Stack: its steps end at the span of its weights; rebuilt(depth=...) changes their size.")
        if isinstance(h, Tensor) and h.requires_grad:
            raise SchemeError(
                "Stack: set_step takes a number, and the tensor that is given would get no gradient.\n"
                "  Detach it, or train the step sizes: Stack(..., step='learned')."
            )
        h = Fixed(h).h
        # Steps of size 0 have no ratios; only a fixed rule gives them.
        first, initial = self.rule(0), self._initial
        if not first:
            first, initial = 1.0, [self.depth] if self._merged else [1.0] * self.depth
        for step, h0 in zip(self.steps, initial, strict=True):
            step.h = h * h0 / first
            # Not a buffer, so that scheduled and plain stacks have the same state dict.
            step.scheduled = torch.tensor(step.h, dtype=torch.float64)

    @property
    def solves(self) -> tuple[Solve, ...]:
        """The adaptive solves of the last forward pass, in order; empty for other schemes.

        There is one for the whole depth, or with separate functions one for each; with ``backend=torchdiffeq`` none.
        Where a solve could not go on, which is an error, the last one says why.
        """
        return self._solves

    @property
    def evaluations(self) -> int:
        """The number of calls of residual functions in the steps of a pass; for an adaptive solver, in the last one.

        Schemes that make their streams by a call, ``alf`` and ``reversible_heun``, call one once more before the steps.
        """
        if self.scheme.evaluations is None:
            return self._calls
        # The companion of an embedded pair reads all stages.
        every = isinstance(self.rule, FromError)
        return sum(s.scheme.stages if every else s.scheme.evaluations or 0 for s in self.steps)

    def extra_repr(self) -> str:
        # Lazy parameters have no number of elements yet, and numel raises.
        count = sum(p.numel() for p in self.parameters() if not is_lazy(p))
        parts = [str(self.scheme), f"depth={self.depth}"]
        parts.append("evaluations=adaptive" if self.scheme.evaluations is None else f"evaluations={self.evaluations}")
        parts.append(f"parameters={count:,}")
        if str(self.rule) != "1":
            parts.append(f"step={self.rule}")
        if not self.backprop.keeps_all:
            parts.append(f"backprop={format_mode(self.backprop)}")
        return ", ".join(parts)


class StackHolder(ABC):
    """A module that runs a stack which is not its child: the stack's blocks are, under the names they had before."""

    __slots__ = ()  # keeps the layout, so that an existing object can be given a class that inherits from this one

    @property
    @abstractmethod
    def stack(self) -> Stack:
        """The stack."""


def named_stacks(module: nn.Module) -> Iterator[tuple[str, Stack]]:
    """Yields all stacks of a module with their names; one that is not a child has the name of the module that runs it.

    Example:
        >>> from torch import nn
        >>> [name for name, _ in named_stacks(nn.Sequential(nn.Linear(2, 2), Stack(nn.Linear(2, 2))))]
        ['1']
    """
    for name, m in module.named_modules():
        if isinstance(m, Stack):
            yield name, m
        elif isinstance(m, StackHolder):
            yield name, m.stack


def _invert(given: Pass, step: Step, state: State, shared: nn.Module | None, t: Any, context: Any, h: Any) -> State:
    """The state before a step of a pass."""
    fs, gs = step.functions(shared, t, context, step.h, sink=given.sink)
    if given.wrap is not None:
        fs, gs = given.wrap(step, state, fs, gs)
    return step.scheme._inverse(fs, state, step.h, gs)


adopt(Stack, {"visit": "visit_states"})


@contextmanager
def keeping_all(module: nn.Module) -> Iterator[None]:
    """Within it, all stacks of a module store: a recomputed state has no graph to what its step computes from it.

    Args:
        module: the module that holds the stacks, or a stack.

    Example:
        >>> from torch import nn
        >>> net = Stack([nn.Linear(2, 2) for _ in range(4)], "revnet", backprop="reverse")
        >>> with keeping_all(net):
        ...     print(net.backprop)
        store
    """
    stacks = [stack for _, stack in named_stacks(module)]
    modes = [stack.backprop for stack in stacks]
    try:
        for stack in stacks:
            stack.backprop = Store()
        yield
    finally:
        for stack, mode in zip(stacks, modes, strict=True):
            stack.backprop = mode
