"""Step: one use of a scheme, with the residual functions that it calls."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from schemes.adaptive import Adaptive
from schemes.errors import SchemeError
from schemes.scheme import Function, Scheme, State, bind, signature

from .auxiliary import Sink, Split, step_measured
from .draws import Draws
from .solves import Solves

Functions = tuple[Sequence[Function], Sequence[Function]]  # residual functions and shortcuts
Runner = Callable[["Step", State, nn.Module | None, Any, Any, Any], State]
_ARITHMETIC = ("schemes.", "odenets.step", "odenets.backprop.")  # modules that add what functions return
Wrap = Callable[["Step", State, Sequence[Function], Sequence[Function]], Functions]


class FunctionModule(nn.Module):
    """A plain callable as a module, so that a step can hold it among modules."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Calls the function."""
        return self.function(*args, **kwargs)

    def extra_repr(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", type(self.function).__name__)


class Revision:
    """Records whether residual functions of a stack were replaced since their signatures were read; steps share it."""

    def __init__(self) -> None:
        self.stale = True


class ResidualFunctions(nn.ModuleList):
    """The residual functions of a step; replacing one marks the stack's signatures stale, to be read again."""

    def __init__(self, functions: Sequence[nn.Module], revision: Revision):
        super().__init__()
        self.revision = revision
        self.extend(functions)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self.revision.stale = True


class PerSlot(nn.ModuleList):
    """Shared residual functions, one for each slot of a step, for a stack where a single shared one does not suffice.

    A RevNet's step has two residual functions, F and G. ``PerSlot([F, G])`` as the block of a stack uses these two in
    every step. State-dict keys: ``block.{i}.*``.

    Args:
        functions: one for each residual function of a step of the scheme, in order.

    Example:
        >>> import torch
        >>> from odenets import PerSlot, Stack
        >>> pair = PerSlot([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
        >>> net = Stack(pair, "revnet", depth=5, backprop="reverse")
        >>> net(torch.randn(3, 4)).shape, len(list(net.parameters()))
        (torch.Size([3, 4]), 4)
    """

    def __init__(self, functions: Iterable[nn.Module] = ()):
        super().__init__()
        # Of the stacks that share these functions; weak, since a regulariser may build a stack of them in every step.
        self.revisions: WeakSet[Revision] = WeakSet()
        self.extend(functions)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            for revision in self.revisions:
                revision.stale = True

    # Weak references are neither copied nor pickled, so those that are alive go as a list.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "revisions": [*self.revisions]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "revisions": WeakSet(state["revisions"])})


def in_each_slot(shared: nn.Module, stages: int) -> tuple[nn.Module, ...]:
    """The shared residual functions of a step with so many stages: the same for all, or one each (``PerSlot``)."""
    return tuple(shared._modules.values()) if isinstance(shared, PerSlot) else (shared,) * stages  # type: ignore[return-value]


class Step(nn.Module):
    """One use of a scheme with its residual functions, shortcuts and step size; the unit of sharding and of hooks.

    Keys: ``fs.{i}`` residual functions, ``gs.{i}`` shortcuts, ``h`` a learned step size.
    """

    def __init__(
        self,
        scheme: Scheme,
        fs: Sequence[nn.Module],
        gs: Sequence[nn.Module],
        h: float,
        learned: bool,
        index: int,
        shared: nn.Module | None,
        revision: Revision,
        draws: Draws | None = None,
    ):
        super().__init__()
        self.scheme, self.index, self.draws = scheme, index, draws
        self.revision = revision
        self.fs = ResidualFunctions(fs, revision) if shared is None else None
        self.gs = nn.ModuleList(gs) if gs else None
        self.h = nn.Parameter(torch.tensor(h)) if learned else h
        self.scheduled: Tensor | None = None  # h as a tensor, once a schedule has set it
        # None wraps every function, since only a returned value tells; False spares all later calls the wrapper.
        self.auxiliary: bool | None = None  # whether a function returns auxiliary values; None before a first call
        self.read(shared)

    def read(self, shared: nn.Module | None) -> None:
        """Reads from their signatures which arguments the residual functions take."""
        # For a plain callable its own signature counts, not that of the module that wraps it.
        fs = self._plain_functions(shared)
        self.takes = tuple(signature(f.function if isinstance(f, FunctionModule) else f) for f in fs)  # type: ignore
        self.timed = any(t.time for t in self.takes)
        self.plain = self.scheme.nodes is not None and not any(t.time or t.context for t in self.takes)
        # The condition of the shortest path in ``forward``, evaluated once here instead of in every call.
        self.bare = self.plain and self.gs is None and self.fs is not None and not self.scheme.training_differs

    @property
    def size(self) -> Any:
        """The step size; a tensor where a compiler would treat a scheduled number as a constant."""
        # A number would be baked into the graph, which would then be recompiled for every value of a schedule.
        return self.scheduled if self.scheduled is not None and torch.compiler.is_compiling() else self.h

    def functions(
        self,
        shared: nn.Module | None,
        t: Any,
        context: Any,
        h: Any,
        calls: list[int] | None = None,
        sink: Sink | None = None,
    ) -> Functions:
        """Returns the residual functions, with time and context bound where they take them, and the shortcuts.

        Args:
            shared: the residual function of all steps, where there is only one.
            t: time at the start of the step.
            context: passed to functions that have a parameter ``context``.
            h: step size.
            calls: counts the evaluations of an adaptive solver.
            sink: takes the auxiliary values of the functions; None drops them.
        """
        fs = self._plain_functions(shared)
        if not self.plain:
            fs = bind(fs, self.takes, self.scheme.nodes, t, h, context, calls)
        # Where auxiliary values are collected, functions that have returned none so far may start to.
        if self.auxiliary is not False or sink is not None:
            fs = tuple(Split(f, sink, self, i) for i, f in enumerate(fs))
        return fs, () if self.gs is None else tuple(self.gs)

    def _plain_functions(self, shared: nn.Module | None) -> Sequence[Function]:
        fs = self._modules.get("fs")
        # The dictionary, as iterating over a ModuleList costs five times as much.
        return in_each_slot(shared, self.scheme.stages) if fs is None else tuple(fs._modules.values())  # type: ignore

    def start(self, shared: nn.Module | None, t: Any, context: Any) -> Sequence[Function]:
        """The residual functions at the time where the step starts, as ``Scheme.init`` calls them."""
        fs = self._plain_functions(shared)
        if not self.plain:
            fs = bind(fs, self.takes, (0.0,) * len(fs), t, 1.0, context)
        return fs if self.auxiliary is False else tuple(Split(f, None, self, i) for i, f in enumerate(fs))

    def end(self, t: Any, h: Any = None) -> Any:
        """The time at the end of a step that starts at t; None where no function reads the time."""
        return None if t is None else t + self.scheme.span * (self.size if h is None else h)

    def scheme_on(self, state: State) -> Scheme:
        """The scheme, or in training its training scheme where that differs (bdia draws)."""
        # Not decided by whether gradients are enabled: a reentrant checkpoint runs the forward pass without them, and
        # must differentiate the same scheme.
        if self.training and self.scheme.training_differs:
            # Passed only if there is one: a user-defined scheme need not accept a generator.
            generator = () if self.draws is None else (self.draws.generator,)
            return self.scheme.training_scheme(self.index, state[-1], *generator)
        return self.scheme

    def forward(
        self,
        state: State,
        shared: nn.Module | None = None,
        t: Any = None,
        context: Any = None,
        h: Any = None,
        runner: Runner | None = None,
    ) -> State:
        """Returns the streams after the step.

        Args:
            state: the streams before it.
            shared: the residual function of all steps, where there is only one.
            t: time at the start, None where no function reads it.
            context: passed to functions that have a parameter ``context``.
            h: step size; None uses the step's own.
            runner: runs the step in place of ``evaluate`` (for a mode of backpropagation), here inside the module's
                call, to which the hooks of FSDP are attached.
        """
        try:
            if runner is not None:
                return runner(self, state, shared, t, context, h)
            if self.bare and h is None and self.auxiliary is False:
                # The common case; reading _modules avoids nn.Module's attribute lookup, a microsecond on small
                # states.
                h = self.h if self.scheduled is None else self.size
                return self.scheme._step(tuple(self._modules["fs"]._modules.values()), state, h)  # type: ignore
            return self.evaluate(state, shared, t, context, h)
        except (TypeError, AttributeError) as error:
            self._refuse_late(error)
            raise

    def _refuse_late(self, error: Exception) -> None:
        """Explains an error if a residual function has started to return something other than a tensor.

        Raises:
            SchemeError: it has, and the arithmetic of the scheme met a tuple; the next call looks for pairs.
        """
        # The functions run unwrapped, since no call so far has returned auxiliary values: a wrapper for each call would
        # slow down those that never do.
        where = error.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        inside = where is not None and str(where.tb_frame.f_globals.get("__name__", "")).startswith(_ARITHMETIC)
        if self.auxiliary is not False or not inside or not any(word in str(error) for word in ("tuple", "sequence")):
            return
        self.revision.stale = True
        raise SchemeError(
            f"{self.scheme}, step {self.index}: a residual function returned a tuple, where it returned a tensor in "
            "the calls before.\n"
            "  Call the stack again, which from now on looks for auxiliary values, return y, {'balance': loss}; or "
            "return some in the first call too."
        ) from error

    def evaluate(
        self,
        state: State,
        shared: nn.Module | None,
        t: Any,
        context: Any,
        h: Any = None,
        wrap: Wrap | None = None,
        calls: list[int] | None = None,
        sink: Sink | None = None,
        solves: Solves | None = None,
    ) -> State:
        """Evaluates the step itself, its functions wrapped by what a pass collects or checks."""
        h = self.size if h is None else h
        fs, gs = self.functions(shared, t, context, h, calls, sink)
        if wrap is not None:
            fs, gs = wrap(self, state, fs, gs)
        scheme = self.scheme_on(state)
        # Only on request: the general step of couplings costs more than a scheme's own.
        if sink is not None and sink.log_det:
            return step_measured(scheme, fs, state, h, gs, sink)
        if solves is not None and isinstance(scheme, Adaptive):
            return solves.step(scheme, fs, state, h, gs)
        return scheme._step(fs, state, h, gs)

    def check_undone(self) -> None:
        """Refuses to run the step backwards where a shortcut has no inverse.

        Raises:
            SchemeError: with the shortcut's class, and the remedy.
        """
        for g in self.gs or ():
            if not hasattr(g, "inverse"):
                raise SchemeError(
                    f"Stack: the shortcut {type(g).__name__} of step {self.index} has no inverse(y), which running the "
                    "step backwards needs.\n  Take one that has, such as odenets.layers.scale.ChannelScale, or "
                    "backprop='store' or 'checkpoint', and no inverse(y) of the stack."
                )

    def extra_repr(self) -> str:
        """Scheme and step size."""
        h = "learned" if isinstance(self.h, nn.Parameter) else f"{self.h:g}"
        return f"{self.scheme}, h={h}"
