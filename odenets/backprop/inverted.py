"""Inverted steps as steps in their own right: the inverse of a list of elementary updates is such a list too."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from schemes.coupling import Coupling, Update, rotated, shortcut_of
from schemes.errors import SchemeError
from schemes.scheme import Function, Scheme, State, StepSize


class Inverted:
    """The inverse of a scheme, as the parts that the engine runs, undoes and differentiates.

    Raises:
        SchemeError: the scheme adds or overwrites streams, or is not a list of elementary updates.
    """

    def __init__(self, scheme: Scheme):
        self.scheme = scheme

    def decompose(self, fs: Sequence[Function], h: StepSize, gs: Sequence[Function] = ()) -> list[Any]:
        """The inverses of the scheme's parts, the last one first."""
        parts = reversed(self.scheme.decompose(fs, h, gs))
        return [(_Part(part, part_gs), part_fs, part_h, ()) for part, part_fs, part_h, part_gs in parts]

    def __str__(self) -> str:
        return f"the inverse of {self.scheme}"


class _Part(Coupling):
    """x_d' = s x_d + b backwards: x_d = (1/s) x_d' - b/s, from the last update to the first.

    A coupling rotates its streams after its updates, so its inverse would have to begin with a rotation. Instead the
    updates index their streams where the forward rotation has left them, and the streams are rotated back at the end.
    """

    def __init__(self, scheme: Any, gs: Sequence[Function]):
        if not isinstance(scheme, Coupling) or scheme.streams_added or scheme.byproducts:
            raise SchemeError(
                f"Stack: the inverse of {scheme} cannot be trained with backprop='reverse': it adds or overwrites "
                "streams.\n"
                "  Use backprop='store' or 'checkpoint', or a coupling such as revnet, affine or leapfrog."
            )
        for g in gs:
            if not isinstance(getattr(g, "scale", None), Tensor):
                name = g._get_name()  # type: ignore[union-attr]  # the shortcut's own, also under the checks
                raise SchemeError(
                    f"Stack: the inverse of the shortcut {name} cannot be trained with backprop='reverse': "
                    "it has no scale.\n  Use backprop='store' or 'checkpoint'."
                )
        self.scheme, self.gs, self.rotate, self.stages = scheme, gs, -scheme.rotate, scheme.stages

    def updates(self, fs: Sequence[Function], h: StepSize, streams: int) -> list[Update]:
        """The inverses of the scheme's updates, the last one first."""
        return [self._inverse_of(u, streams) for u in reversed(self.scheme.updates(fs, h, streams))]

    def _inverse_of(self, update: Update, streams: int) -> Update:
        def terms(state: State) -> tuple:
            scale, shift = update.terms(rotated(state, self.rotate))
            g = shortcut_of(update, self.gs)
            scale = scale if g is None else g.scale  # type: ignore[union-attr]
            # The engine skips the division for exactly the float 1.0, and without division -b is exact.
            if isinstance(scale, float) and scale == 1.0:
                return 1.0, -shift
            return 1 / scale, -shift / scale

        # The index where the forward rotation has left the stream; ``self.rotate`` is its negative.
        return Update((update.dst + self.rotate) % streams, terms)

    def __str__(self) -> str:
        return f"the inverse of {self.scheme}"
