"""Dense concatenation as a scheme: each step appends a stream, and nothing is ever overwritten."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .coupling import Coupling, Update, scaled
from .errors import SchemeError
from .language import dimension
from .scheme import Function, Slot, State, StepSize


class Dense(Coupling):
    """Dense concatenation: x_{n+1} = h F_n([x_0, x_1, ..., x_n]), a new stream of width ``growth`` each step.

    The function is given all streams joined along ``dim``, the input first and the newest last, or, without ``join``,
    as separate arguments in that order (a function that joins them itself may drop the joined tensor and recompute it
    in the backward pass). The readout joins them.

    Cost: 1 residual function a step; the state holds everything computed so far, so memory grows with depth by the new
    streams (and the function's joined input is transient where inner tensors are recomputed). Inverse: drops the last
    stream, exact and without evaluations; amplification 1.

    Args:
        growth: width of the new stream.
        dim: the channel dimension.
        join: whether the function is given one joined argument.

    Raises:
        SchemeError: growth is not a positive whole number, dim not a whole one, or join neither true nor false.

    Source:
        Huang et al. 2017, Densely Connected Convolutional Networks, arXiv 1608.06993, equation 2.

    Example:
        >>> import schemes
        >>> dense = schemes.get("dense(growth=12)")
        >>> dense.slots(2, (24, 12, 12))[0].in_channels, dense.widths(2, (24, 12, 12))
        ((48,), (24, 12, 12, 12))
        >>> schemes.get("dense(12, join=false)").slots(2, (24, 12, 12))[0].in_channels
        (24, 12, 12)
    """

    examples = ("dense(12)", "dense(3)", "dense(2, join=false)")
    stages = evaluations = 1
    streams = 1
    streams_added = 1
    nodes = (0.0,)

    def __init__(self, growth: int, dim: int = 1, join: bool = True):
        if isinstance(growth, bool) or not isinstance(growth, int) or growth < 1:
            raise SchemeError(f"dense: growth is {growth}, want a whole number of at least 1.")
        if not isinstance(join, bool):
            raise SchemeError(f"dense: join is {join!r}, want true or false.")
        self.growth, self.dim, self.join = growth, dimension("dense", dim), join

    def readout(self, state: State) -> Tensor:
        return torch.cat(state, self.dim)

    def state_from_output(self, y: Tensor) -> State:
        raise SchemeError(f"{self}: its output does not determine its streams; invert from Stack.final_state(x).")

    def updates(self, fs: Sequence[Function], h: StepSize, streams: int) -> list[Update]:
        (f,) = fs

        def terms(state: State) -> tuple[float, Tensor]:
            given = state[:streams]  # the engine also calls this with the new stream still in place
            return 1.0, scaled(h, f(torch.cat(given, self.dim)) if self.join else f(*given))

        return [Update(streams, terms, appends=True)]

    def shape_of(self, i: int, streams: tuple[torch.Size, ...]) -> torch.Size | None:
        shape = list(streams[0])
        # All streams have one resolution, so any of them gives the rest of the shape.
        shape[self.dim] = self.growth
        return torch.Size(shape)

    def slots(self, n: int, streams: tuple[int, ...], out_channels: int | None = None) -> tuple[Slot, ...]:
        return (Slot(n, 0, (sum(streams),) if self.join else streams, self.growth),)

    def widths(self, n: int, streams: tuple[int, ...], out_channels: int | None = None) -> tuple[int, ...]:
        return (*streams, self.growth)

    def __str__(self) -> str:
        given = ["" if self.dim == 1 else f"dim={self.dim}", "" if self.join else "join=false"]
        return f"dense({', '.join([str(self.growth), *filter(None, given)])})"
