"""Continuous depth: an adaptive solver in place of a fixed step."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from numbers import Real
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from . import tableaux
from .errors import SchemeError
from .ode.control import Control
from .ode.field import clock, moved, number, time_dtype, tracked
from .ode.gradients import solved
from .ode.pairs import Pair
from .ode.reads import Reads
from .ode.run import NOT_FINITE, Run
from .ode.trees import HALF
from .runge_kutta import RungeKutta
from .scheme import Function, Scheme, State, StepSize

# Our names, and torchdiffeq's names for the same methods.
TORCHDIFFEQ = {"dopri5": "dopri5", "dopri8": "dopri8", "bosh3": "bosh3", "heun2": "adaptive_heun"}
PAIRS = ("bosh3", "dopri5", "dopri8", "fehlberg45", "heun2", "tsit5", "verner89")
BACKENDS = ("schemes", "torchdiffeq")
NO_GRAPH = (
    "the solver chooses its steps by the values that it meets, which no recorded graph can.\n"
    "  Record fixed steps of the same function: stack.rebuilt('rk4', depth=16), or Stack(f, 'rk4', 16, step='1/depth')."
)


def _written(value: Any) -> str:
    real = isinstance(value, Real) and not isinstance(value, bool)
    return str(float(value)) if real else repr(value)


class Solved(NamedTuple):
    """The result of ``Adaptive.solve``: the values at the requested times, and the run (None for torchdiffeq)."""

    values: list[Tensor]
    run: Run | None


class Adaptive(Scheme):
    r"""Solves x' = f(t, x) from t to t + h with a step size chosen from an error estimate.

    One residual function a step, called with (x, time since the start of the step); ``step`` and Stack adapt functions
    with other signatures. A Stack with one shared function makes a single solve over the length of all its
    steps; with d functions it solves d steps in turn, function n on the n-th. A step of 0 is the identity.

    Cost: evaluations depend on the input and are counted (``Stack.evaluations``); gradients by backpropagation through
    the accepted steps, or with ``adjoint=true`` by the continuous adjoint: memory does not grow with the steps, but
    gradients are accurate only to the tolerances. All that f reads (parameters, closures, contexts, the time) gets its
    gradient either way.

    Args:
        method: an embedded pair: bosh3, dopri5, dopri8, fehlberg45, heun2, tsit5, verner89, or one of your own.
        rtol: relative tolerance.
        atol: absolute tolerance.
        adjoint: whether to use the continuous adjoint.
        max_steps: upper bound on internal steps, so that a stiff field ends in an error and not in a hang.
        backend: "schemes", or "torchdiffeq" (bosh3, dopri5, dopri8, heun2) for comparison.

    Raises:
        SchemeError: the method is not a pair, or tolerances are not positive.

    Source: Chen et al. 2018, Neural ordinary differential equations.

    Example:
        >>> import schemes
        >>> str(schemes.get("adaptive(tsit5, rtol=1e-4)"))
        'adaptive(tsit5, rtol=0.0001)'
    """

    examples = (
        "adaptive(dopri5)",
        "adaptive(bosh3, rtol=1e-4, adjoint=true)",
        "adaptive(dopri8, 1/1000, atol=0.00001)",
        "adaptive(heun2, max_steps=99)",
    )
    stages = 1
    nodes = None
    shortcuts = 0
    evaluations = None
    words: ClassVar[dict[str, tuple[str, ...]]] = {"backend": BACKENDS}  # of the language, besides its own

    def __init__(
        self,
        method: Any = "dopri5",
        rtol: float = 1e-3,
        atol: float = 1e-6,
        adjoint: bool = False,
        max_steps: int = 10_000,
        backend: str = "schemes",
    ):
        if isinstance(method, str):
            if method not in tableaux.METHODS:
                raise SchemeError(f"adaptive: no adaptive method {method!r}; there are {', '.join(PAIRS)}.")
            method = RungeKutta(tableaux.METHODS[method])
        name = str(method)
        if not isinstance(method, RungeKutta) or method.tableau.b_hat is None:
            raise SchemeError(f"adaptive: no adaptive method {name!r}; there are {', '.join(PAIRS)}.")
        if backend not in BACKENDS:
            raise SchemeError(f"adaptive: no backend {backend!r}; there are {', '.join(BACKENDS)}.")
        own = name in tableaux.METHODS and method == RungeKutta(tableaux.METHODS[name])
        if backend == "torchdiffeq" and not (own and name in TORCHDIFFEQ):
            raise SchemeError(f"adaptive: no adaptive method {name!r}; torchdiffeq has {', '.join(TORCHDIFFEQ)}.")
        for key, value in (("rtol", rtol), ("atol", atol), ("max_steps", max_steps)):
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < float("inf"):
                raise SchemeError(f"adaptive: {key} is {_written(value)}, want a positive number.")
        if max_steps != int(max_steps):
            raise SchemeError(f"adaptive: max_steps is {float(max_steps):g}, want a whole number.")
        if not isinstance(adjoint, bool):
            raise SchemeError(f"adaptive: adjoint is {adjoint!r}, want true or false.")
        self.method, self.rtol, self.atol, self.backend = name, float(rtol), float(atol), backend
        self.adjoint, self.max_steps = adjoint, int(max_steps)
        self.pair = Pair(method)

    def __eq__(self, other: object) -> bool:
        # A user's pair may have the name of another.
        return super().__eq__(other) and self.pair.scheme == other.pair.scheme  # type: ignore[attr-defined]

    __hash__ = Scheme.__hash__

    def _step(self, fs: Sequence[Function], state: State, h: StepSize = 1.0, gs: Sequence[Function] = ()) -> State:
        return (self.solve(fs, state, h, gs=gs).values[-1],)

    # long: the cases in which nothing is solved come first, each in a line or two
    def solve(
        self,
        fs: Sequence[Function],
        state: State,
        h: StepSize = 1.0,
        at: Sequence[StepSize] | None = None,
        gs: Sequence[Function] = (),
        on_run: Callable[[Run], None] | None = None,
    ) -> Solved:
        """Solves over a step of size h, with values at the requested times within it.

        Args:
            fs: the residual function, called with (x, time since the start of the step).
            state: the one stream.
            h: the length of the interval.
            at: times since the start, strictly monotone from the start on, the last one h; None means h alone. Tensors
                get their gradients.
            gs: none.
            on_run: called with the run when it is over; with a failed run too, before the error is raised.

        Returns:
            The values, and the run: its status, and the numbers of accepted and rejected steps.

        Raises:
            SchemeError: the times are not in order, the input is not finite, or the solver cannot go on; the message
                says where and in which sample.
        """
        if gs:
            raise SchemeError(f"{self} has one continuous stream; put a stride or projection before the Stack.")
        (x,) = state
        self._check_input(x)
        f = fs[0]
        end, ends = number(h), [h] if at is None else [*at]
        times = self._times(ends, end)
        # A learned length needs a gradient even where it is 0, or it would stay there.
        if end == 0 and not tracked(h):
            return Solved([x] * (len(times) - 1), Run([x], 0.0, x))
        if x.numel() == 0 or end == 0:  # an Euler step, so that the graph has all that a gradient depends on
            y = x + (h if isinstance(h, Tensor) else end) * f(x, clock(0.0, x))
            return Solved([y] * (len(times) - 1), Run([y], end, y))
        if self.backend == "torchdiffeq":
            return Solved(self._torchdiffeq(f, x, times, [*ends[:-1], h]), None)
        control = Control(self.rtol, self.atol, max_steps=self.max_steps)
        own = x.dtype
        if own in HALF:
            # A small increment would be lost in a state of half precision; the function still receives its own dtype.
            x = x.float()

        def func(since: Tensor, y: Tensor) -> Tensor:
            return f(y.to(own), since)

        def check(run: Run) -> None:
            if on_run is not None:
                on_run(run)
            self._check(run)

        gradient = "adjoint" if self.adjoint else "store"
        # As in `odeint`: where the continuous extension is accurate enough, the requested times change no step.
        land = len(times) > 2 and self.pair.dense[3] < self.pair.order
        try:
            ys, run = solved(func, x, times, self.pair, control, gradient=gradient, land=land, check=check)
        except RuntimeError as error:
            if "data-dependent control flow" not in str(error):
                raise
            raise SchemeError(f"{self}: torch.func.vmap: {NO_GRAPH}") from error
        # Without the start, which is the step's input.
        values = list(ys.unbind()[1:])
        for i, since in enumerate([*ends[:-1], h]):
            if tracked(since):
                # Where a time moves, its value moves along the flow.
                d = (since - since.detach()).to(x.device, x.real.dtype if x.is_complex() else x.dtype)  # type: ignore
                values[i] = moved(func, clock(times[i + 1], x), values[i], d)
        return Solved([y.to(own) for y in values], run)

    def _times(self, ends: Sequence[StepSize], end: float) -> list[float]:
        """The start and the times asked for, as numbers; refuses those that are no way from the start to the end."""
        times = [0.0, *map(number, ends)]
        if times[-1] != end:
            raise SchemeError(f"{self}: the last time asked for is {times[-1]:g}, want the end of the step, {end:g}.")
        sign = math.copysign(1.0, end)
        # Written so that NaN is refused too; in a step of length 0 all times are the start.
        if not all((b - a) * sign > 0 for a, b in pairwise(times)) and (end != 0 or any(times)):
            raise SchemeError(
                f"{self}: the times asked for, {', '.join(f'{x:g}' for x in times[1:])}, are not in order from 0 to "
                f"{end:g};\n  name each once, the end last."
            )
        return times

    def _check_input(self, x: Tensor) -> None:
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise SchemeError(f"{self}: {NO_GRAPH}")
        if not (x.is_floating_point() or x.is_complex()):
            raise SchemeError(
                f"{self}: the input is of type {str(x.dtype)[6:]}, and a solve needs floating-point or complex numbers."
                "\n  Convert it before: x.float()."
            )

    def _check(self, run: Run) -> None:
        if not run.failed:
            return
        if run.status == "not_finite" and not run.accepted + run.rejected:
            raise SchemeError(
                f"{self}: {run.reason()}; look at the input and at what the residual function makes of it."
            )
        if run.status == "not_finite":
            raise SchemeError(f"{self}: {run.reason()}; {NOT_FINITE}.")
        raise SchemeError(f"{self}: {run.reason()}; raise rtol and atol, or max_steps.")

    def _torchdiffeq(self, f: Function, x: Tensor, times: Sequence[float], ends: Sequence[StepSize]) -> list[Tensor]:
        try:
            import torchdiffeq
        except ModuleNotFoundError:
            raise SchemeError('adaptive: backend=torchdiffeq needs torchdiffeq: pip install "odenets[ode]".') from None
        t = torch.tensor(times, dtype=time_dtype(x), device=x.device)
        if any(isinstance(since, Tensor) for since in ends):
            t = torch.stack(
                [t[0], *(s.reshape(()).to(t) if isinstance(s, Tensor) else t[i] for i, s in enumerate(ends, 1))]
            )
        options: dict[str, Any] = {
            "rtol": self.rtol,
            "atol": self.atol,
            "method": TORCHDIFFEQ[self.method],
            # Steps end exactly on the times: an interpolated value has the interpolant's error, not the method's.
            "options": {"max_num_steps": self.max_steps, "step_t": t[1:].detach()},
        }
        solver: Any = torchdiffeq.odeint
        if self.adjoint:
            solver = torchdiffeq.odeint_adjoint
            reads = Reads(lambda since, y: f(y, since), clock(0.0, x), x) if torch.is_grad_enabled() else ()
            options["adjoint_params"] = tuple(reads.tensors) if isinstance(reads, Reads) else ()
            options["adjoint_options"] = {"max_num_steps": self.max_steps, "step_t": t[:1].detach()}
        try:
            return list(solver(lambda since, y: f(y, since), x, t, **options)[1:])
        except AssertionError as error:  # torchdiffeq reports both of its limits by assertions
            text = str(error)
            if not text.startswith(("max_num_steps", "underflow", "non-finite")):
                raise
            if text.startswith("non-finite") or text.endswith("nan"):  # the step size is computed from the state
                raise SchemeError(f"{self}: {text}; {NOT_FINITE}.") from None
            raise SchemeError(f"{self}: {text}; raise rtol and atol, or max_steps.") from None

    def __str__(self) -> str:
        defaults = {"rtol": 1e-3, "atol": 1e-6, "adjoint": False, "max_steps": 10_000, "backend": "schemes"}
        given = [f"{k}={str(getattr(self, k)).lower()}" for k, v in defaults.items() if getattr(self, k) != v]
        return f"adaptive({', '.join([self.method, *given])})"
