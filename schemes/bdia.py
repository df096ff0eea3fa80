"""Bidirectional integration approximation (BDIA): an unmodified residual network, trained bit-exactly in flat memory.

In training each step mixes Euler's step from x_n with a step back from it, x_{n+1} = gamma x_{n-1} + (1 - gamma) x_n +
(1 + gamma) h F(x_n), with gamma = 1/2 or -1/2 drawn for each sample and step; at inference gamma takes its mean, 0, and
the network is plain Euler, a ResNet. Two layers:

* ``Bdia`` is the scheme: Euler, and ``draw`` and ``at_random`` for training.
* ``Bidirectional`` is the coupling of one step for a given gamma; its inverse amplifies by 1/|gamma|.

Exact arithmetic works as for any other coupling: on a binary grid, half a multiple of the unit loses its last bit and
nothing else; with that one bit per element stored, a step with gamma = 1/2 is undone bit for bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .coupling import Coupling, Update, scaled
from .errors import SchemeError
from .language import finite, written
from .scheme import Function, Scheme, Slot, State, StepSize


class _First(Coupling):
    """The first step, Euler's: x_1 = x_0 + h F(x_0) is a new stream."""

    stages = evaluations = 1
    streams = 1
    nodes = (0.0,)
    streams_added = 1

    def readout(self, state: State) -> Tensor:
        return state[-1]

    def updates(self, fs: Sequence[Function], h: StepSize, streams: int) -> list[Update]:
        (f,) = fs
        return [Update(1, lambda s: (1.0, s[0] + scaled(h, f(s[0]))), appends=True)]

    def slots(self, n: int, streams: tuple[int, ...], out_channels: int | None = None) -> tuple[Slot, ...]:
        return (Slot(n, 0, streams[-1:], streams[-1]),)

    def widths(self, n: int, streams: tuple[int, ...], out_channels: int | None = None) -> tuple[int, ...]:
        return streams * 2

    def __str__(self) -> str:
        return "bidirectional's first step"


class Bidirectional(Coupling):
    """One training step of BDIA: x_{n+1} = gamma x_{n-1} + (1 - gamma) x_n + (1 + gamma) h F(x_n), gamma given.

    Streams (x_{n-1}, x_n). The first step makes the second stream, x_1 = x_0 + h F(x_0) (``at(0)``).

    Cost: 1 residual function a step, 2 streams. Inverse: closed form; it amplifies by 1/|gamma| a step (gamma = 1/2:
    doubles), so train in exact arithmetic.

    Args:
        gamma: a number, or a tensor that broadcasts against the streams: one value per sample. Not zero.

    Raises:
        SchemeError: gamma is the number 0.

    Source:
        Zhang et al. 2024, On Exact Bit-level Reversible Transformers Without Changing Architectures, arXiv 2407.09093,
        section 4.
    """

    stages = evaluations = 1
    streams = 1
    nodes = (0.0,)
    rotate = 1

    def __init__(self, gamma: float | Tensor):
        self.gamma = gamma if isinstance(gamma, Tensor) else finite("bidirectional: gamma", gamma)
        if isinstance(self.gamma, float):
            if self.gamma == 0:
                raise SchemeError("bidirectional: gamma is 0, so that x_{n-1} is lost; want any other number.")
            self.amplification = max(1.0, 1 / abs(self.gamma))
        else:
            # The magnitude of a drawn gamma, a tensor, is known only from its values; ``Bdia`` sets the right figure.
            self.amplification = 2.0
        self.first = _First()

    def at(self, n: int) -> Scheme:
        return self if n else self.first

    def state_from_output(self, y: Tensor) -> State:
        raise SchemeError(f"{self}: its output does not determine its streams; invert from Stack.final_state(x).")

    def readout(self, state: State) -> Tensor:
        return state[-1]

    def updates(self, fs: Sequence[Function], h: StepSize, streams: int) -> list[Update]:
        (f,), gamma = fs, self.gamma
        # x_n stays where it is and becomes x_{n-1} by the rotation; only x_{n-1} is written.
        return [Update(0, lambda s: (gamma, (1 - gamma) * s[1] + (1 + gamma) * scaled(h, f(s[1]))))]

    def slots(self, n: int, streams: tuple[int, ...], out_channels: int | None = None) -> tuple[Slot, ...]:
        return (Slot(n, 0, streams[-1:], streams[-1]),)

    def __eq__(self, other: object) -> bool:
        # Two draws print alike but are not the same step.
        return self is other or (super().__eq__(other) and not isinstance(self.gamma, Tensor))

    __hash__ = Coupling.__hash__

    def __str__(self) -> str:
        return f"bidirectional({'drawn' if isinstance(self.gamma, Tensor) else written(self.gamma)})"


class Bdia(Scheme):
    """BDIA: Euler at inference, and in training a step forward mixed with a step back by a random gamma per sample.

    As it stands this is Euler's scheme on one stream, x_{n+1} = x_n + h F(x_n): gamma at its mean, 0. In training,
    ``at_random(n, draw(x))`` is step n: invertible, and in exact arithmetic bit for bit. Any published ResNet, ConvNeXt
    or ViT can be fine-tuned this way, without a change to its architecture.

    Cost: 1 residual function a step, no shortcuts; in training 2 streams, and 1 bit per element and step in exact
    arithmetic.

    Args:
        gamma: magnitude of gamma, a power of two up to 1/2; exact arithmetic wants 1/2.

    Raises:
        SchemeError: gamma is not 1/2, 1/4, 1/8, ...

    Source:
        Zhang et al. 2024, On Exact Bit-level Reversible Transformers Without Changing Architectures, arXiv 2407.09093,
        section 4.

    Example:
        >>> import torch, schemes
        >>> bdia = schemes.get("bdia")
        >>> bdia.draw(torch.zeros(3, 5, 2, 2)).shape
        torch.Size([3, 1, 1, 1])
    """

    examples = ("bdia", "bdia(1/4)")
    stages = evaluations = 1
    order = 1
    nodes = (0.0,)
    shortcuts = 0  # training mixes streams from before and after the first step: they must have one shape
    training_differs = True

    def __init__(self, gamma: float = 0.5):
        self.gamma = finite("bdia: gamma", gamma)
        # A power of two, so that the grid loses whole bits and nothing is rounded.
        if self.gamma not in (2.0**-n for n in range(1, 11)):
            raise SchemeError(
                f"bdia: gamma is {self.gamma:g}, want 1/2, 1/4, ... down to 1/1024; 1/2 is the usual one."
            )

    def _step(self, fs: Sequence[Function], state: State, h: StepSize = 1.0, gs: Sequence[Function] = ()) -> State:
        if gs:
            raise SchemeError(f"{self}: {len(gs)} shortcuts, want none; put other maps between two stacks.")
        (x,) = state
        return (x + scaled(h, fs[0](x)),)

    def readout(self, state: State) -> Tensor:
        return state[-1]

    @property
    def reversible_in_training(self) -> bool:
        return True

    def training_scheme(self, n: int, x: Tensor, generator: torch.Generator | None = None) -> Scheme:
        return self.at_random(n, self.draw(x, generator))

    def draw(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draws gamma or -gamma for each sample.

        Args:
            x: a stream, (n, ...).
            generator: source of the random bits, on any device; None is the default generator of x's device.

        Returns:
            (n, 1, ..., 1), of the dtype and device of x.

        Raises:
            SchemeError: x has no dimensions.
        """
        if not x.dim():
            raise SchemeError(
                "bdia: the stream has no dimensions, and training draws gamma for each sample, along the first.\n"
                "  Give a batch: x[None]."
            )
        shape = (x.shape[0],) + (1,) * (x.dim() - 1)
        # Per sample: one draw for the batch would make the gradient of a batch as noisy as that of a sample.
        device = x.device if generator is None else generator.device
        bits = torch.randint(0, 2, shape, generator=generator, device=device)
        return (2 * bits - 1).to(x.device, x.dtype) * self.gamma

    def at_random(self, n: int, gamma: float | Tensor) -> Scheme:
        """Step n of training, for a drawn gamma.

        Args:
            n: number of the step.
            gamma: weight of the step back; a number, or one for each sample.
        """
        step = Bidirectional(gamma)
        step.amplification = 1 / self.gamma
        return step.at(n)

    def __str__(self) -> str:
        return "bdia" if self.gamma == 0.5 else f"bdia({written(self.gamma)})"
