"""Step: one use of a scheme, with the residual functions that it calls."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from schemes.scheme import Function, Scheme, State, bind, signature

from . import backprop as engine


class Call(nn.Module):
    """A plain callable as a module, so that a step can hold it among modules."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.function(*args, **kwargs)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)


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
        shared: bool,
    ):
        super().__init__()
        self.scheme, self.index = scheme, index
        self.takes = tuple(signature(f.function if isinstance(f, Call) else f) for f in fs)
        self.timed = any(t.time for t in self.takes)
        self.plain = scheme.nodes is not None and not any(t.time or t.context for t in self.takes)
        self.fs = None if shared else nn.ModuleList(fs)
        self.gs = nn.ModuleList(gs) if gs else None
        self.h = nn.Parameter(torch.tensor(h)) if learned else h
        self.bare = self.plain and self.gs is None and not shared
        self.watch: Any = None  # set for the checks of a first call
        self.searched: set[int] = set()  # updates in which the engine has looked for tensors read unseen
        self.calls = [0]  # evaluations that an adaptive solver made in the last forward pass

    def functions(
        self, state: State | None, shared: nn.Module | None, t: Any, context: Any, h: Any
    ) -> tuple[Sequence[Function], Sequence[Function]]:
        """The residual functions, with time and context filled in where they take them, and the shortcuts."""
        fs: Sequence[Function] = (shared,) * self.scheme.stages if self.fs is None else tuple(self.fs)  # type: ignore
        gs: Sequence[Function] = () if self.gs is None else tuple(self.gs)
        if self.watch is not None and state is not None:
            fs, gs = self.watch(self, state, fs, gs)
        if not self.plain:
            self.calls[0] = 0
            fs = bind(fs, self.takes, self.scheme.nodes, t, h, context, self.calls)
        return fs, gs

    def start(self, shared: nn.Module | None, t: Any, context: Any) -> Sequence[Function]:
        """The residual functions at the start of the step in time, as ``Scheme.init`` calls them."""
        fs: Sequence[Function] = (shared,) * self.scheme.stages if self.fs is None else tuple(self.fs)  # type: ignore
        return fs if self.plain else bind(fs, self.takes, (0.0,) * len(fs), t, 1.0, context)

    def forward(
        self,
        state: State,
        shared: nn.Module | None = None,
        t: Any = None,
        context: Any = None,
        h: Any = None,
        tape: engine.Runner | None = None,
    ) -> State:
        if tape is not None:
            return tape.advance(self, state, shared, t, context)
        if self.bare and h is None and self.watch is None:
            # The usual step; reading _modules spares the attribute search of nn.Module, a microsecond on small states.
            return self.scheme._step(tuple(self._modules["fs"]._modules.values()), state, self.h)  # type: ignore
        h = self.h if h is None else h
        fs, gs = self.functions(state, shared, t, context, h)
        state = self.scheme._step(fs, state, h, gs)
        if self.scheme.nodes is None:
            self.calls = [*self.calls]  # an adjoint counts its calls in the backward pass in the old list
        return state

    def with_error(self, state: State, shared: nn.Module | None, t: Any, context: Any, h: Any) -> tuple[State, Tensor]:
        """The step, and the error estimate of the scheme's embedded companion."""
        fs, gs = self.functions(state, shared, t, context, h)
        return self.scheme.step_with_error(fs, state, h, gs)  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        h = "learned" if isinstance(self.h, nn.Parameter) else f"{self.h:g}"
        return f"{self.scheme}, h={h}"
