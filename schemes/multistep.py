"""Schemes of two or three streams that use the previous step: leapfrog, momentum, ALF, reversible Heun, ...

All but Adams-Bashforth are couplings. Their streams hold the solution at neighbouring steps, or the solution and its
slope, so a single vector field is evaluated once a step without loss of order; with separate weights they are the
networks of the same names.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .coupling import Coupling, Update, scaled
from .errors import SchemeError
from .language import finite, written
from .scheme import Function, Scheme, Slot, State, StepSize


class _OneFunction(Coupling):
    """A coupling of streams of one shape whose single function is given one of them."""

    stages = evaluations = 1
    nodes = (0.0,)

    def slots(self, n: int, streams: tuple[int, ...], out_channels: int | None = None) -> tuple[Slot, ...]:
        return (Slot(n, 0, streams[:1], streams[0]),)


class Leapfrog(_OneFunction):
    """Leapfrog, the two-step midpoint rule: x_{n+1} = x_{n-1} + 2 h F_n(x_n).

    Streams (x_{n-1}, x_n), at first (x, x). The first step, x_1 = x_0 + h F_0(x_0), differs (``at(0)``), which keeps
    order 2; 2 h F_0 in its place would start half a step ahead and leave order 1. A shortcut, if given, takes the place
    of the factor 1 of x_{n-1}.

    Cost: 1 residual function a step, 2 streams. Inverse: closed form, amplification 1. Stable on the imaginary axis
    only, up to 1.

    Args:
        first: whether this is the variant that begins a run.

    Source:
        Hairer, Norsett, Wanner 1993, Solving Ordinary Differential Equations I, III.1 (the explicit midpoint rule).

    Example:
        >>> import math, torch, schemes
        >>> y = schemes.solve(schemes.get("leapfrog"), torch.neg, torch.ones((), dtype=torch.float64), steps=100)
        >>> abs(float(y) - math.exp(-1)) < 1e-4
        True
    """

    examples = ("leapfrog",)
    order = 2
    streams = 2
    shortcuts = 1
    rotate = 1

    def __init__(self, first: bool = False):
        # The first step is a separate scheme, whose own first step is itself: this ends the recursion.
        self.first = self if first else Leapfrog(first=True)

    def at(self, n: int) -> Scheme:
        return self if n else self.first

    def init(self, fs: Sequence[Function], x: Tensor, h: StepSize = 1.0) -> State:
        return x, x

    def readout(self, state: State) -> Tensor:
        return state[1]

    def updates(self, fs: Sequence[Function], h: StepSize, streams: int) -> list[Update]:
        (f,) = fs
        # With x_{-1} = x_0 a full weight would be a step of 2 h from x_0, one step too far.
        weight = h if self.first is self else 2.0 * h
        return [Update(0, lambda s: (1.0, scaled(weight, f(s[1]))), shortcut=0)]

    def __str__(self) -> str:
        return "leapfrog's first step" if self.first is self else "leapfrog"


class Momentum(_OneFunction):
    """Momentum: v <- beta v + (1 - beta) F(x), then x <- x + h v.

    Streams (x, v), at first (x, 0). A shortcut, if given, takes the place of beta.

    Cost: 1 residual function a step, 2 streams. Order 1 for |beta| < 1. Inverse: closed form; it amplifies by
    1/|beta| a step, so that small betas need anchors. Stable on the negative real axis up to
    2 (1 + beta) / (1 - beta).

    Args:
        beta: share of the old velocity, neither 0 nor 1.

    Raises:
        SchemeError: beta is 0 (no inverse) or 1 (the functions would drop out).

    Source:
        Sander et al. 2021, Momentum Residual Neural Networks, arXiv 2102.07870, equation 2.

    Example:
        >>> import schemes
        >>> schemes.get("momentum(0.5)").amplification
        2.0
    """

    examples = ("momentum(9/10)", "momentum", "momentum(0.5)", "momentum(-0.5)", "momentum(2)")
    streams = 2
    shortcuts = 1

    def __init__(self, beta: float = 0.9):
        self.beta = finite("momentum: beta", beta)
        if self.beta in (0.0, 1.0):
            raise SchemeError(f"momentum: beta is {self.beta:g}, want any number but 0 and 1; 0 is Euler: 'euler'.")
        self.order = 1 if abs(self.beta) < 1 else None  # else the velocity grows, or oscillates, step by step
        self.amplification = max(1.0, 1 / abs(self.beta))

    def init(self, fs: Sequence[Function], x: Tensor, h: StepSize = 1.0) -> State:
        return x, torch.zeros_like(x)

    def updates(self, fs: Sequence[Function], h: StepSize, streams: int) -> list[Update]:
        (f,) = fs
        return [
            Update(1, lambda s: (self.beta, (1 - self.beta) * f(s[0])), shortcut=0),
            # Multiplied even where h is 1: a shift has to be a new tensor, and s[1] is a stream.
            Update(0, lambda s: (1.0, h * s[1])),
        ]

    def __str__(self) -> str:
        return f"momentum({written(self.beta)})"


class LmResNet(_OneFunction):
    """The linear multistep network LM-ResNet: x_{n+1} = (1 - k) x_n + k x_{n-1} + h F(x_n).

    Kept as streams (x_n, d_n) with d_n = x_n - x_{n-1}, which is equivalent: d <- -k d + h F(x), then x <- x + d; at
    first (x, 0). A shortcut, if given, takes the place of -k: a learned k is a learned scale of d, of opposite sign.

    Cost: 1 residual function a step, 2 streams. No order for F itself: for small h it follows (1 + k) x' = F(x).
    Inverse: closed form; amplifies by 1/|k| a step where |k| < 1.

    Args:
        k: share of x_{n-1}, not 0.

    Raises:
        SchemeError: k is 0 (Euler, which has no inverse).

    Source:
        Lu et al. 2018, Beyond Finite Layer Neural Networks, arXiv 1710.10121, equation 3.

    Example:
        >>> import schemes
        >>> schemes.get("lm_resnet(-1/2)").amplification
        2.0
    """

    examples = ("lm_resnet(1/2)", "lm_resnet(-2)")
    streams = 2
    shortcuts = 1

    def __init__(self, k: float):
        self.k = finite("lm_resnet: k", k)
        if self.k == 0:
            raise SchemeError("lm_resnet: k is 0, want any other number; 0 is Euler: 'euler'.")
        self.amplification = max(1.0, 1 / abs(self.k))

    def init(self, fs: Sequence[Function], x: Tensor, h: StepSize = 1.0) -> State:
        return x, torch.zeros_like(x)

    def updates(self, fs: Sequence[Function], h: StepSize, streams: int) -> list[Update]:
        (f,) = fs
        return [
            Update(1, lambda s: (-self.k, scaled(h, f(s[0]))), shortcut=0),
            # Times 1, since a shift has to be a new tensor, and s[1] is a stream.
            Update(0, lambda s: (1.0, 1.0 * s[1])),
        ]

    def __str__(self) -> str:
        return f"lm_resnet({written(self.k)})"


class Alf(_OneFunction):
    """The asynchronous leapfrog of MALI: half a step along v, v reflected at the slope there, half a step along v.

    m = x + h/2 v, u = F(t + h/2, m), v' = v + 2 eta (u - v), x' = m + h/2 v'. Streams (x, v), at first (x, F(x)), for
    which the first function is evaluated once more.

    Cost: 1 residual function a step, 2 streams. Order 2 for eta = 1, else 1. Inverse: closed form; eta < 1 damps and
    amplifies by 1/|2 eta - 1| a step. Stable on the imaginary axis up to 1; on the negative real axis only if damped
    (eta = 0.9: 0.222).

    Args:
        eta: 1, or less for damping, but not 1/2.

    Raises:
        SchemeError: eta is 1/2 (v would be lost) or not in (0, 1].

    Source:
        Zhuang et al. 2021, MALI, arXiv 2102.04668, algorithms 2 and 3, appendix A.5 (damping); Mutze 2013, arXiv
        1311.6602.

    Example:
        >>> import math, torch, schemes
        >>> y = schemes.solve(schemes.get("alf"), torch.neg, torch.ones((), dtype=torch.float64), steps=100)
        >>> abs(float(y) - math.exp(-1)) < 1e-4
        True
    """

    examples = ("alf", "alf(0.9)", "alf(0.8)")
    streams = 2
    nodes = (0.5,)

    def __init__(self, eta: float = 1.0):
        self.eta = finite("alf: eta", eta)
        if not 0 < self.eta <= 1 or self.eta == 0.5:
            raise SchemeError(f"alf: eta is {self.eta:g}, want 0 < eta <= 1 and not 1/2, where v would be lost.")
        self.order = 2 if self.eta == 1 else 1
        self.amplification = 1 / abs(1 - 2 * self.eta)

    def init(self, fs: Sequence[Function], x: Tensor, h: StepSize = 1.0) -> State:
        return x, fs[0](x)

    def updates(self, fs: Sequence[Function], h: StepSize, streams: int) -> list[Update]:
        (f,) = fs
        eta = self.eta

        def half(s: State) -> tuple[float, Tensor]:
            return 1.0, (0.5 * h) * s[1]

        # Two half steps, each with the velocity that holds there, make the scheme symmetric in time at eta = 1.
        return [Update(0, half), Update(1, lambda s: (1 - 2 * eta, 2 * eta * f(s[0]))), Update(0, half)]

    def __str__(self) -> str:
        return "alf" if self.eta == 1 else f"alf({written(self.eta)})"


class ReversibleHeun(_OneFunction):
    """Reversible Heun: z' = 2 y - z + h F(z), y' = y + h/2 (F(z) + F(z')), with one evaluation a step.

    With w = y + h/2 F(z) this is a list of elementary updates, z <- 2 w - z, then w <- w + h F(z): the function that
    neighbouring steps share stays inside w. Streams (w, z, e), where e = h/2 F(z) is a byproduct that the readout
    y = w - e uses and no step reads; at first (x + e, x, e), for which the first function is evaluated once more.

    Cost: 1 residual function a step, 3 streams. Order 2, for equal steps: w carries half a step of the previous size.
    Inverse: closed form, amplification 1. Stable on the imaginary axis only, up to 1.

    Source:
        Kidger et al. 2021, Efficient and Accurate Gradients for Neural SDEs, arXiv 2105.13493, algorithms 1 and 2.

    Example:
        >>> import math, torch, schemes
        >>> heun = schemes.get("reversible_heun")
        >>> y = schemes.solve(heun, torch.neg, torch.ones((), dtype=torch.float64), steps=100)
        >>> abs(float(y) - math.exp(-1)) < 1e-4
        True
    """

    examples = ("reversible_heun",)
    order = 2
    streams = 3
    byproducts = (2,)
    nodes = (1.0,)

    def init(self, fs: Sequence[Function], x: Tensor, h: StepSize = 1.0) -> State:
        e = (0.5 * h) * fs[0](x)
        return x + e, x, e

    def readout(self, state: State) -> Tensor:
        return state[0] - state[2]

    def input_from_state(self, state: State) -> Tensor:
        return state[1]

    def updates(self, fs: Sequence[Function], h: StepSize, streams: int) -> list[Update]:
        (f,) = fs

        def move(s: State) -> tuple[Any, ...]:
            k = f(s[1])
            # One evaluation gives both the increment of the stream and the half that the readout subtracts again.
            return 1.0, scaled(h, k), (0.5 * h) * k

        return [Update(1, lambda s: (-1.0, 2.0 * s[0])), Update(0, move, byproduct=2)]

    def __str__(self) -> str:
        return "reversible_heun"


class AdamsBashforth2(Scheme):
    """The two-step Adams-Bashforth method: x_{n+1} = x_n + h (3/2 F_n(x_n) - 1/2 F_{n-1}(x_{n-1})).

    Streams (x_n, F_{n-1}(x_{n-1})), at first (x, 0). The first step is Euler's (``at(0)``), which keeps order 2.

    Cost: 1 residual function a step, 2 streams, no inverse. Order 2, for equal steps. Stable on the negative real axis
    up to 1.

    Args:
        first: whether this is the variant that begins a run.

    Source:
        Hairer, Norsett, Wanner 1993, Solving Ordinary Differential Equations I, III.1, equation 1.5.

    Example:
        >>> import math, torch, schemes
        >>> y = schemes.solve(schemes.get("ab2"), torch.neg, torch.ones((), dtype=torch.float64), steps=100)
        >>> abs(float(y) - math.exp(-1)) < 1e-4
        True
    """

    examples = ("ab2",)
    order = 2
    stages = evaluations = 1
    streams = 2
    shortcuts = 0
    nodes = (0.0,)

    def __init__(self, first: bool = False):
        self.first = self if first else AdamsBashforth2(first=True)

    def at(self, n: int) -> Scheme:
        return self if n else self.first

    def init(self, fs: Sequence[Function], x: Tensor, h: StepSize = 1.0) -> State:
        return x, torch.zeros_like(x)

    def _step(self, fs: Sequence[Function], state: State, h: StepSize = 1.0, gs: Sequence[Function] = ()) -> State:
        if gs:
            raise SchemeError(f"{self}: {len(gs)} shortcuts, want none; put other maps between two stacks.")
        x, before = state
        k = fs[0](x)
        # There is no slope before the first. One Euler step, with a local error of order 2, keeps the global order 2.
        slope = k if self.first is self else 1.5 * k - 0.5 * before
        return x + scaled(h, slope), k

    @property
    def raw(self) -> tuple[bool, ...]:
        return (False,)

    def slots(self, n: int, streams: tuple[int, ...], out_channels: int | None = None) -> tuple[Slot, ...]:
        return (Slot(n, 0, streams[:1], streams[0]),)

    def __str__(self) -> str:
        return "ab2's first step" if self.first is self else "ab2"
