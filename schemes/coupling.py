"""Invertible schemes as lists of elementary updates: step, inverse and gradient all derive from one list.

An elementary update changes one stream and reads the others: ``x_d <- scale * x_d + shift(other streams)``. Whatever the
other streams are, it is undone by ``x_d <- (x_d - shift) / scale``, with one evaluation of the same residual functions.
Three instances:

* revnet: ``x_0 <- x_0 + h F_0(x_1)``, then ``x_1 <- x_1 + h F_1(x_0)``.
* momentum: ``v <- beta v + (1 - beta) F(x)``, then ``x <- x + h v``.
* leapfrog: ``x_0 <- x_0 + 2 h F(x_1)``, then the two streams change places (``turn``).
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .scheme import Function, Scheme, State, StepSize

Scale = float | Tensor


class Update(NamedTuple):
    """One elementary update of a coupling: ``state[dst] <- scale * state[dst] + shift``.

    Attributes:
        dst: the stream that changes.
        terms: gives (scale, shift) from the state; must not read ``state[dst]``. The shift is a new tensor that
            nothing else holds; the scale is a number or a tensor that broadcasts, never zero.
        makes: whether ``dst`` is a new stream, one more than there were; its inverse is to drop it.
        shortcut: number of the shortcut that takes the place of ``scale *``: an invertible module with a method
            ``inverse``; None where there is none.
        emit: a stream that is overwritten by a by-product (a third result of ``terms``) which the inverse does not
            need back, such as a residual function's value that the readout uses; None where there is none.
    """

    dst: int
    terms: Callable[[State], tuple]
    makes: bool = False
    shortcut: int | None = None
    emit: int | None = None


def do(update: Update, state: State, gs: Sequence[Function] = ()) -> State:
    """The state after an elementary update."""
    d = update.dst
    scale, shift, *emitted = update.terms(state)
    if d == len(state):
        return (*state, shift)
    new = list(state)
    x = state[d]
    if update.shortcut is not None:
        new[d] = gs[update.shortcut](x) + shift
    else:
        new[d] = x + shift if isinstance(scale, float) and scale == 1.0 else torch.add(shift, x * scale)
    if update.emit is not None:
        new[update.emit] = emitted[0]
    return tuple(new)


def undo(update: Update, state: State, gs: Sequence[Function] = ()) -> State:
    """The state before an elementary update; a stream that it made is dropped, one that it emitted is left."""
    d = update.dst
    if update.makes:
        return state[:d]
    new = list(state)
    scale, shift, *_ = update.terms(state)
    if update.shortcut is not None:
        new[d] = gs[update.shortcut].inverse(state[d] - shift)  # type: ignore[attr-defined]
    else:
        new[d] = state[d] - shift if isinstance(scale, float) and scale == 1.0 else (state[d] - shift) / scale
    return tuple(new)


def turned(state: State, turn: int) -> State:
    """The streams, rotated: the first ``turn`` go to the end."""
    return state[turn:] + state[:turn] if turn else state


class Coupling(Scheme):
    """An invertible scheme, given by its list of elementary updates.

    A subclass writes ``updates``; ``advance`` and ``retreat`` follow from it, and so does the memory-saving backward
    pass. ``turn`` rotates the streams after the updates; ``made`` is the number of streams that a step makes.
    """

    invertible = True
    turn: int = 0
    made: int = 0

    @abstractmethod
    def updates(self, fs: Sequence[Function], h: StepSize, streams: int) -> list[Update]:
        """The elementary updates of one step, in order.

        Args:
            fs: the residual functions.
            h: step size.
            streams: number of streams before the step.
        """

    def advance(self, fs: Sequence[Function], state: State, h: StepSize = 1.0, gs: Sequence[Function] = ()) -> State:
        for update in self.updates(fs, h, len(state)):
            state = do(update, state, gs)
        return turned(state, self.turn)

    def retreat(self, fs: Sequence[Function], state: State, h: StepSize = 1.0, gs: Sequence[Function] = ()) -> State:
        state = turned(state, -self.turn)
        for update in reversed(self.updates(fs, h, len(state) - self.made)):
            state = undo(update, state, gs)
        return state
