"""Continuous depth: an adaptive solver in place of a fixed step, through torchdiffeq."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import SchemeError
from .scheme import Function, Scheme, State, StepSize

# Our names, and what torchdiffeq calls them.
METHODS = {"dopri5": "dopri5", "dopri8": "dopri8", "bosh3": "bosh3", "heun2": "adaptive_heun"}


class Adaptive(Scheme):
    r"""Solves x' = f(t, x) from t to t + h with a step size chosen from an error estimate.

    One residual function a step, called with (x, time since the start of the step); ``step`` and Stack adapt functions
    of another signature. A Stack with one shared function and depth d makes a single solve over [0, d h]; with d
    functions it solves d unit intervals in turn, function n on the n-th.

    Cost: evaluations depend on the input and are counted (``Stack.evaluations``); gradients by backpropagation through
    the solver, or with ``adjoint=true`` by the continuous adjoint: memory that does not grow with the steps, gradients
    right to the tolerances only.

    Args:
        method: one of dopri5, dopri8, bosh3, heun2.
        rtol: relative tolerance.
        atol: absolute tolerance.
        adjoint: whether to use the continuous adjoint.
        max_steps: upper bound on internal steps, so that a stiff field ends in an error and not in a hang.

    Raises:
        SchemeError: unknown method, tolerances that are not positive, or torchdiffeq is not installed.

    Source: Chen et al. 2018, Neural ordinary differential equations; solvers by torchdiffeq.

    Example:
        >>> import schemes
        >>> str(schemes.get("adaptive(dopri5, rtol=1e-4)"))
        'adaptive(dopri5, rtol=0.0001)'
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

    def __init__(
        self,
        method: Any = "dopri5",
        rtol: float = 1e-3,
        atol: float = 1e-6,
        adjoint: bool = False,
        max_steps: int = 10_000,
    ):
        name = str(method)
        if name not in METHODS:
            raise SchemeError(f"adaptive: no adaptive method {name!r}; torchdiffeq has {', '.join(METHODS)}.")
        self.method, self.rtol, self.atol = name, float(rtol), float(atol)
        self.adjoint, self.max_steps = bool(adjoint), int(max_steps)
        for key, value in (("rtol", self.rtol), ("atol", self.atol), ("max_steps", self.max_steps)):
            if not 0 < value < float("inf"):
                raise SchemeError(f"adaptive: {key} is {value}, want a positive number.")

    def _step(self, fs: Sequence[Function], state: State, h: StepSize = 1.0, gs: Sequence[Function] = ()) -> State:
        try:
            import torchdiffeq
        except ModuleNotFoundError:
            raise SchemeError('adaptive schemes need torchdiffeq: pip install "odenets[ode]".') from None
        if gs:
            raise SchemeError(f"{self} has one continuous stream; put a stride or projection before the Stack.")
        (x,) = state
        f = fs[0]
        end = h if isinstance(h, Tensor) else x.new_tensor(h, dtype=torch.promote_types(x.dtype, torch.float32))
        interval = torch.stack((torch.zeros_like(end), end))
        options: dict[str, Any] = {
            "rtol": self.rtol,
            "atol": self.atol,
            "method": METHODS[self.method],
            # Stepping right onto the end: an interpolated end has the interpolant's error, not the method's.
            "options": {"max_num_steps": self.max_steps, "step_t": interval[1:].detach()},
        }
        solver: Any = torchdiffeq.odeint
        if self.adjoint:
            solver = torchdiffeq.odeint_adjoint
            options["adjoint_params"] = _inputs(f)
            options["adjoint_options"] = {"max_num_steps": self.max_steps, "step_t": interval[:1].detach()}
        try:
            ys = solver(lambda since, y: f(y, since), x, interval, **options)
        except AssertionError as error:  # torchdiffeq reports both of its limits by assertions
            raise SchemeError(
                f"{self}: {str(error) or 'the step size fell below what the number format resolves'}; "
                "raise rtol and atol, or max_steps."
            ) from None
        return (ys[-1],)

    def __str__(self) -> str:
        defaults = {"rtol": 1e-3, "atol": 1e-6, "adjoint": False, "max_steps": 10_000}
        given = [f"{k}={str(getattr(self, k)).lower()}" for k, v in defaults.items() if getattr(self, k) != v]
        return f"adaptive({', '.join([self.method, *given])})"


def _inputs(f: Any) -> tuple[Tensor, ...]:
    """What the adjoint must send gradients to: the parameters of the function, and the tensors of its context."""
    found: list[Tensor] = []
    while not isinstance(f, torch.nn.Module) and hasattr(f, "function"):  # unwrap the time and context
        context = getattr(f, "context", None)
        items = context if isinstance(context, (tuple, list)) else (context,)
        found += [c for c in items if isinstance(c, Tensor) and c.requires_grad]
        f = f.function
    if isinstance(f, torch.nn.Module):
        found += list(f.parameters())
    return tuple(found)
