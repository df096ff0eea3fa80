"""Step sizes as rules: a number, a decay over the whole network, learned, or from the error of the previous step.

The step size h multiplies every a_ij and b_i of a scheme. Four readings of "RK-8 with a decaying scaling factor"
(arXiv 2103.15244 gives no formula) are these rules and, for a change over the epochs, ``Stack.set_step``.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from .errors import SchemeError
from .language import Reader, finite, shorten, written


def _positive(name: str, value: Any) -> float:
    found = finite(name, value)
    if found <= 0:
        raise SchemeError(f"{name} is {found:g}, want a positive number.")
    return found


def _others(rule: Any, **defaults: float) -> str:
    """The arguments of a rule that are not the usual ones, as they follow its first one in its text."""
    given = {name: getattr(rule, name) for name, usual in defaults.items() if getattr(rule, name) != usual}
    return "".join(f", {name}={written(x)}" for name, x in given.items())


class StepSize(ABC):
    """A rule for the size of step n, n counted over the whole network from 0."""

    learned = False
    from_error = False

    @abstractmethod
    def __call__(self, n: int) -> float:
        """The size of step n before training or, for rules that adapt, of the first step."""


class Fixed(StepSize):
    """The same step size everywhere; 1 is the residual network.

    Args:
        h: the step size.
    """

    def __init__(self, h: Any = 1.0):
        self.h = finite("the step size", h)

    def __call__(self, n: int) -> float:
        return self.h

    def __str__(self) -> str:
        return written(self.h)


class Decay(StepSize):
    r"""h_n = h0 * rate^n, n counted over the steps of the whole network.

    Args:
        rate: the factor from one step to the next, positive.
        h0: the size of step 0.
    """

    def __init__(self, rate: Any, h0: Any = 1.0):
        self.rate, self.h0 = _positive("decay: the rate", rate), _positive("decay: h0", h0)

    def __call__(self, n: int) -> float:
        try:
            found = self.h0 * self.rate**n
        except OverflowError:
            found = float("inf")
        if found == float("inf"):
            raise SchemeError(
                f"the step size {self} is too large for a number at step {shorten(str(n), 30)}.\n"
                "  Take a rate nearer to 1, or fewer steps."
            )
        return found

    def __str__(self) -> str:
        return f"decay({written(self.rate)}{_others(self, h0=1.0)})"


class Learned(StepSize):
    """One parameter per step, ``steps.{n}.h``, that starts at h0 and is trained (under its own weight decay).

    Args:
        h0: where each starts.
    """

    learned = True

    def __init__(self, h0: Any = 1.0):
        self.h0 = _positive("learned: h0", h0)

    def __call__(self, n: int) -> float:
        return self.h0

    def __str__(self) -> str:
        return "learned" if self.h0 == 1.0 else f"learned(h0={written(self.h0)})"


class FromError(StepSize):
    r"""h_{n+1} = h_n * min(largest, max(smallest, safety * (tol / e_n)^(1/(q+1)))); no step is rejected.

    e_n is the root mean square of the step's error estimate (its embedded companion), q the lower order of the pair.
    The factor carries no gradient and is computed on the device.

    Args:
        tol: target error of a step, in units of the stream.
        h0: the size of step 0.
        safety: factor of at most 1 that keeps the error clear of the tolerance.
        smallest: smallest change from one step to the next.
        largest: largest change.
    """

    from_error = True

    def __init__(self, tol: Any, h0: Any = 1.0, safety: Any = 0.9, smallest: Any = 0.2, largest: Any = 5.0):
        self.tol, self.h0 = _positive("error: tol", tol), _positive("error: h0", h0)
        self.safety = _positive("error: safety", safety)
        self.smallest, self.largest = _positive("error: smallest", smallest), _positive("error: largest", largest)
        # The bounds of `schemes.ode.control.Control`: else steps would leave the tolerance, or one bound the other.
        if not (self.smallest < 1 <= self.largest and self.safety <= 1):
            raise SchemeError(
                f"error: smallest, largest and safety are {self.smallest:g}, {self.largest:g} and {self.safety:g};\n"
                "  want smallest < 1 <= largest and safety <= 1."
            )

    def __call__(self, n: int) -> float:
        return self.h0

    def following(self, h: float | Tensor, error: Tensor, order: int) -> Tensor:
        """The next step size after a step of size h with that error estimate; ``order`` is the lower of the pair.

        Args:
            h: the size of the step that was taken.
            error: its error estimate.
            order: the lower order of the pair.
        """
        # Detached: otherwise training could lower its loss by changing the steps instead of the functions.
        # The absolute value first: a complex error would lose its imaginary part.
        rms = error.detach().abs().float().square().mean().sqrt()
        factor = self.safety * (self.tol / rms.clamp_min(torch.finfo(rms.dtype).tiny)) ** (1 / (order + 1))
        return h * factor.clamp(self.smallest, self.largest)

    def __str__(self) -> str:
        return f"error({written(self.tol)}{_others(self, h0=1.0, safety=0.9, smallest=0.2, largest=5.0)})"


class PerDepth(StepSize):
    """h = length / depth: a stack's steps end at the time ``length``, however many they are.

    Args:
        length: the time at the end; None is the span of the stack's field.
        h: the step size, once the depth of the stack is known.
    """

    def __init__(self, length: Any = None, h: float | None = None):
        self.length, self.h = None if length is None else _positive("the step size: the length", length), h

    def of(self, length: float, units: int) -> "PerDepth":
        """The rule for steps that move time on by ``units`` step sizes in all.

        Args:
            length: the span of the stack's field; a length that the rule itself names takes precedence.
            units: the sum of the steps' spans.
        """
        return PerDepth(self.length, length / units)

    def __call__(self, n: int) -> float:
        if self.h is None:
            raise SchemeError(f"the step size '{self}' belongs to a Stack, which knows its depth.")
        return self.h

    def __str__(self) -> str:
        return f"{'span' if self.length is None else written(self.length)}/depth"


def step_size(rule: "float | str | StepSize") -> StepSize:
    """Reads a rule: a number, "learned", "decay(0.9)", "error(1e-3)", "span/depth", or a StepSize.

    Args:
        rule: the rule.

    Raises:
        SchemeError: anything else.

    Example:
        >>> from schemes.step_size import step_size
        >>> step_size("decay(1/2)")(3)
        0.125
    """
    if isinstance(rule, StepSize):
        return rule
    if isinstance(rule, str):
        length, slash, over = rule.rpartition("/")
        if slash and over.strip() == "depth":
            return PerDepth(None if length.strip() == "span" else Reader({}, {}, what="step size").read(length))
        families = {"learned": Learned, "decay": Decay, "error": FromError}
        found = Reader({}, families, what="step size").read(rule)
        # A text may be a plain number, such as "1/2".
        return found if isinstance(found, StepSize) else Fixed(found)
    if isinstance(rule, (int, float)) and not isinstance(rule, bool):
        return Fixed(rule)
    raise SchemeError(
        f"the step size is {rule!r}, want a number, 'learned', 'decay(0.9)', 'error(1e-3)' or 'span/depth'."
    )
