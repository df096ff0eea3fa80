"""Invertible schemes as lists of elementary updates: step, inverse and gradient all derive from one list.

An elementary update changes one stream and reads the others: ``x_d <- scale * x_d + shift(other streams)``. Whatever
the other streams are, it is undone by ``x_d <- (x_d - shift) / scale``, with one evaluation of the same residual
functions. Three instances:

* revnet: ``x_0 <- x_0 + h F_0(x_1)``, then ``x_1 <- x_1 + h F_1(x_0)``.
* momentum: ``v <- beta v + (1 - beta) F(x)``, then ``x <- x + h v``.
* leapfrog: ``x_0 <- x_0 + 2 h F(x_1)``, then the two streams change places (``rotate``).

This module defines the contract, and the couplings whose streams are slices of the input; the others are in
``columns`` (levels of different shapes), ``multistep`` (neighbouring steps), ``dense`` and ``reversible``.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .deprecation import renamed_names, warn_renamed
from .errors import SchemeError
from .language import dimension, finite, written
from .scheme import MAX_FUNCTIONS, Function, Scheme, Slot, State, StepSize, limit_functions

Scale = float | Tensor

_RENAMED = {
    "do": "apply_update",
    "undo": "invert_update",
    "turned": "rotated",
    "RevNet": "RevNetCoupling",
}
__getattr__ = renamed_names(__name__, globals(), _RENAMED)


class _Update(NamedTuple):
    dst: int
    terms: Callable[[State], tuple]
    appends: bool = False
    shortcut: int | None = None
    byproduct: int | None = None


class Update(_Update):
    """One elementary update of a coupling: ``state[dst] <- scale * state[dst] + shift``.

    Attributes:
        dst: the stream that changes.
        terms: computes (scale, shift) from the state; must not read ``state[dst]``, nor any stream after it where
            ``dst`` is new. The shift is a new tensor that nothing else references; the scale is a number or a tensor
            that broadcasts, never zero.
        appends: whether ``dst`` is a new stream, one more than there were; the inverse drops it.
        shortcut: number of the shortcut that takes the place of ``scale *`` in a step that is given shortcuts: an
            invertible module with a method ``inverse``; None where there is none.
        byproduct: a stream that is overwritten by a third result of ``terms`` and that the inverse need not restore,
            such as a residual function's value that the readout uses; None where there is none.
    """

    __slots__ = ()

    # A named tuple accepts no other keywords; the old names of two fields are translated here.
    def __new__(
        cls,
        dst: int,
        terms: Callable[[State], tuple],
        appends: bool = False,
        shortcut: int | None = None,
        byproduct: int | None = None,
        **old: Any,
    ) -> "Update":
        if "makes" in old:
            warn_renamed("Update(makes=)", "Update(appends=)")
            appends = old.pop("makes")
        if "emit" in old:
            warn_renamed("Update(emit=)", "Update(byproduct=)")
            byproduct = old.pop("emit")
        if old:
            raise TypeError(f"Update: unexpected keyword {next(iter(old))!r}")
        return super().__new__(cls, dst, terms, appends, shortcut, byproduct)


def shortcut_of(update: Update, gs: Sequence[Function]) -> Any:
    """The shortcut that takes the place of the scale, or None.

    Args:
        update: the update.
        gs: the step's shortcuts.
    """
    return gs[update.shortcut] if gs and update.shortcut is not None else None


def apply_update(update: Update, state: State, gs: Sequence[Function] = ()) -> State:
    """The state after an elementary update.

    Args:
        update: the update.
        state: the streams.
        gs: the step's shortcuts.
    """
    d = update.dst
    # Before anything is written: the terms read the state from before this update.
    scale, shift, *byproducts = update.terms(state)
    if update.appends:
        return (*state, shift)
    new = list(state)
    x, g = state[d], shortcut_of(update, gs)
    # A shortcut replaces the scale but not the shift, so the inverse is one subtraction and g's own inverse.
    if g is not None:
        new[d] = g(x) + shift
    elif isinstance(scale, Tensor):
        # One kernel, and out of place: the shift may be a tensor saved for the backward pass, such as tanh's output.
        new[d] = torch.addcmul(shift, x, scale)
    else:
        new[d] = torch.add(shift, x, alpha=scale)
    if update.byproduct is not None:
        new[update.byproduct] = byproducts[0]
    return tuple(new)


def invert_update(update: Update, state: State, gs: Sequence[Function] = ()) -> State:
    """The state before an elementary update; a stream that it appended is dropped, a byproduct is left as it is.

    Args:
        update: the update.
        state: the streams after it.
        gs: the step's shortcuts.
    """
    d = update.dst
    if update.appends:
        return state[:d]
    new = list(state)
    scale, shift, *_ = update.terms(state)
    rest, g = state[d] - shift, shortcut_of(update, gs)
    if g is not None:
        new[d] = g.inverse(rest)
    else:
        # Scale 1 is the usual case; skipping the division saves a pass over memory.
        new[d] = rest if isinstance(scale, float) and scale == 1.0 else rest / scale
    return tuple(new)


def rotated(state: State, by: int) -> State:
    """The streams, rotated: the first ``by`` go to the end.

    Args:
        state: the streams.
        by: how many go to the end.
    """
    return state[by:] + state[:by] if by else state


def scaled(h: StepSize, x: Tensor) -> Tensor:
    """h x, without a multiplication where h is the number 1.

    Args:
        h: a step size.
        x: a tensor.
    """
    return x if isinstance(h, float) and h == 1.0 else x * h


class Coupling(Scheme):
    """An invertible scheme, given by its list of elementary updates.

    A subclass writes ``updates``; ``_step`` and ``_inverse`` follow from it, and so does the memory-saving backward
    pass.

    Attributes:
        rotate: number of leading streams that are moved to the end after the updates.
    """

    invertible = True
    exact = True
    shortcuts: int = 0
    rotate: int = 0

    @abstractmethod
    def updates(self, fs: Sequence[Function], h: StepSize, streams: int) -> list[Update]:
        """The elementary updates of one step, in order.

        Args:
            fs: the residual functions.
            h: step size.
            streams: number of streams before the step.
        """

    def _step(self, fs: Sequence[Function], state: State, h: StepSize = 1.0, gs: Sequence[Function] = ()) -> State:
        self._check(gs)
        for update in self.updates(fs, h, len(state)):
            state = apply_update(update, state, gs)
        return rotated(state, self.rotate)

    def _inverse(self, fs: Sequence[Function], state: State, h: StepSize = 1.0, gs: Sequence[Function] = ()) -> State:
        self._check(gs)
        state = rotated(state, -self.rotate)
        # The list depends on the number of streams before the step: dense couplings count by it.
        for update in reversed(self.updates(fs, h, len(state) - self.streams_added)):
            state = invert_update(update, state, gs)
        return state

    def _check(self, gs: Sequence[Function]) -> None:
        if len(gs) not in (0, self.shortcuts):
            want = f"none or {self.shortcuts}" if self.shortcuts else "none"
            raise SchemeError(f"{self}: {len(gs)} shortcuts, want {want}; put other maps between two stacks.")

    @property
    def raw(self) -> tuple[bool, ...]:
        # Shortcuts replace a factor here and keep the shape; a subclass where they do not overrides this.
        return (False,) * self.stages

    def widths(self, n: int, streams: tuple[int, ...], out_channels: int | None = None) -> tuple[int, ...]:
        return rotated(streams, self.rotate)  # type: ignore[arg-type,return-value]

    def shapes_after(self, streams: tuple[torch.Size | None, ...]) -> tuple[torch.Size | None, ...]:
        # Function i makes the i-th of the new streams.
        new = tuple(self.shape_of(i, streams) for i in range(self.streams_added))  # type: ignore[arg-type]
        return rotated((*streams, *new), self.rotate)  # type: ignore[arg-type,return-value]


class _Split(Coupling):
    """A coupling whose streams are the slices of the input along one dimension, joined again by the readout.

    Attributes:
        dim: the dimension.
        split: width of each slice; None for equal widths, the first ones wider by 1 where the width does not divide.
    """

    dim: int = 1
    split: tuple[int, ...] | None = None

    def _set_split(self, split: Any) -> None:
        """Reads the widths of the slices.

        Raises:
            SchemeError: not one positive whole number per stream.
        """
        if split is None:
            return
        widths = tuple(split) if isinstance(split, (tuple, list)) else (split,)
        whole = all(isinstance(w, int) and not isinstance(w, bool) and w > 0 for w in widths)
        if not whole or len(widths) != self.streams:
            raise SchemeError(
                f"the split is {split}, want {self.streams} positive whole numbers, the width of each stream: "
                f"split={tuple(range(1, self.streams + 1))}."
            )
        self.split = widths

    def _options(self, *others: str) -> str:
        given = [
            *others,
            "" if self.dim == 1 else f"dim={self.dim}",
            "" if self.split is None else f"split={self.split}",
        ]
        return ", ".join(filter(None, given))

    def init(self, fs: Sequence[Function], x: Tensor, h: StepSize = 1.0) -> State:
        if not isinstance(x, Tensor):  # a proxy in a trace, whose size cannot be checked
            parts = torch.tensor_split(x, self.streams, self.dim)
            if self.split is not None:
                parts = torch.split(x, list(self.split), self.dim)
            return tuple(parts[i] for i in range(self.streams))
        # A negative dim counts from the end: -1 needs one dimension, 0 needs one too.
        if self.split is not None and x.dim() > max(self.dim, -self.dim - 1):
            self.stream_widths(x.shape[self.dim])
            return torch.split(x, list(self.split), self.dim)
        if x.dim() <= max(self.dim, -self.dim - 1) or x.shape[self.dim] < self.streams:
            raise SchemeError(
                f"{self}: cannot split {tuple(x.shape)} along dim={self.dim} into {self.streams} streams."
            )
        # Unlike ``chunk``, which may return fewer slices than requested.
        return torch.tensor_split(x, self.streams, self.dim)

    def readout(self, state: State) -> Tensor:
        return torch.cat(state, self.dim)

    def state_from_output(self, y: Tensor) -> State:
        # After a rotation the widths are not in the order in which ``init`` would split them.
        if self.rotate and y.shape[self.dim] % self.streams:
            raise SchemeError(f"{self}: its streams differ in width and change places; invert from Stack.final_state.")
        return self.init((), y)

    def input_from_state(self, state: State) -> Tensor:
        return torch.cat(state, self.dim)

    def stream_widths(self, channels: int) -> tuple[int, ...]:
        if self.split is not None:
            if sum(self.split) != channels:
                raise SchemeError(f"{self}: the split adds up to {sum(self.split)}, the input has {channels} channels.")
            return self.split
        small, wider = divmod(channels, self.streams)
        return (small + 1,) * wider + (small,) * (self.streams - wider)

    def shape_of(self, i: int, streams: tuple[torch.Size, ...]) -> torch.Size | None:
        return streams[i]

    def slots(self, n: int, streams: tuple[int, ...], out_channels: int | None = None) -> tuple[Slot, ...]:
        # Streams before i have been updated, and have their new width where a shortcut changes it; those after i have
        # not.
        outs = streams if out_channels is None else self.stream_widths(out_channels)
        return tuple(
            Slot(n, i, self._arguments(outs[:i], streams[i + 1 :]), self._result(outs[i]), self.raw[i])
            for i in range(self.stages)
        )

    @property
    def raw(self) -> tuple[bool, ...]:
        return (True,) + (False,) * (self.stages - 1)

    def _arguments(self, before: tuple[int, ...], after: tuple[int, ...]) -> tuple[int, ...]:
        """Widths of a function's arguments, from the streams before its own and after it."""
        return (sum(before + after),)

    def _result(self, width: int) -> int:
        return width

    def widths(self, n: int, streams: tuple[int, ...], out_channels: int | None = None) -> tuple[int, ...]:
        return streams if out_channels is None else self.stream_widths(out_channels)


def _others(state: State, i: int, dim: int) -> Tensor:
    # The one other stream is returned itself: concatenating a single tensor would copy it.
    others = state[:i] + state[i + 1 :]
    return others[0] if len(others) == 1 else torch.cat(others, dim)


class RevNetCoupling(_Split):
    """Two streams, each moved by a function of the other: x_0 <- x_0 + h F_0(x_1), then x_1 <- x_1 + h F_1(x_0).

    The streams are the halves of the input along ``dim`` (of odd widths the first is wider); the readout joins them.
    Two shortcuts, if any, must be invertible (space to depth); F_0 then makes the new shape from the old one.

    Cost: 2 residual functions a step, 2 streams, each of half the width. Inverse: closed form, amplification 1.

    Args:
        dim: the channel dimension, along which the input is split.
        split: width of either stream, where they differ: ``split=(3, 5)``.

    Raises:
        SchemeError: a split that is not two positive whole numbers.

    Source:
        Gomez et al. 2017, The Reversible Residual Network, arXiv 1707.04585, equations 6 and 7.

    Example:
        >>> import torch, schemes
        >>> revnet, fs = schemes.get("revnet"), (torch.sin, torch.cos)
        >>> state = revnet.init(fs, torch.arange(4.0).view(1, 4))
        >>> back = revnet.inverse(fs, revnet.step(fs, state))
        >>> torch.allclose(revnet.readout(back), torch.arange(4.0))
        True
    """

    examples = ("revnet",)
    stages = evaluations = 2
    streams = shortcuts = 2
    nodes = (0.0, 1.0)

    def __init__(self, dim: int = 1, split: Sequence[int] | None = None):
        self.dim = dimension("revnet", dim)
        self._set_split(split)

    def updates(self, fs: Sequence[Function], h: StepSize, streams: int) -> list[Update]:
        f, g = fs
        return [
            # The float 1.0 tells the engine that nothing has to be multiplied, divided or differentiated.
            Update(0, lambda s: (1.0, scaled(h, f(s[1]))), shortcut=0),
            Update(1, lambda s: (1.0, scaled(h, g(s[0]))), shortcut=1),
        ]

    def __str__(self) -> str:
        return f"revnet({self._options()})" if self._options() else "revnet"


class Additive(_Split):
    """n streams, each moved by a function of all others: x_i <- x_i + h F_i(others), for i = 0 .. n - 1.

    Function i is given one argument: the other streams joined along ``dim``, in order, those before i already moved.
    Shortcuts are as in revnet, the case of 2 streams; with more than 2 streams they must keep the resolution.

    Cost: n residual functions a step, n streams, and a copy of n - 1 of them per function. Inverse: closed form,
    amplification 1.

    Args:
        n: number of streams, at least 2.
        dim: the channel dimension, along which the input is split.
        split: width of each stream, where they differ.

    Raises:
        SchemeError: fewer than 2 streams, or a split that is not as many positive whole numbers.

    Source:
        Dinh et al. 2014, NICE, arXiv 1410.8516, section 3.2; Gomez et al. 2017, arXiv 1707.04585.

    Example:
        >>> import schemes
        >>> [slot.in_channels for slot in schemes.get("additive(3)").slots(0, (4, 4, 4))]
        [(8,), (8,), (8,)]
    """

    examples = ("additive(3)", "additive(2)", "additive(4)")

    def __init__(self, n: int, dim: int = 1, split: Sequence[int] | None = None):
        if isinstance(n, bool) or not isinstance(n, int) or n < 2:
            raise SchemeError(f"additive: {n} streams, want a whole number of at least 2.")
        limit_functions("additive", n)
        self.n, self.dim = n, dimension("additive", dim)
        self.stages = self.evaluations = self.streams = self.shortcuts = n
        self.nodes = tuple(i / (n - 1) for i in range(n))  # the mean time of the streams that function i is given
        self._set_split(split)

    def updates(self, fs: Sequence[Function], h: StepSize, streams: int) -> list[Update]:
        # A separate function, so that each lambda captures its own i and not the loop's last.
        def update(i: int) -> Update:
            return Update(i, lambda s: (1.0, scaled(h, fs[i](_others(s, i, self.dim)))), shortcut=i)

        return [update(i) for i in range(self.n)]

    def __str__(self) -> str:
        return f"additive({self._options(str(self.n))})"


class Affine(_Split):
    """Two streams with a learned scale: x_i <- exp(h bound tanh(s_i / bound)) x_i + h b_i, (s_i, b_i) = F_i(x_other).

    Function i returns log-scale and shift joined along ``dim``, in twice the width of its stream. The log-scale is
    bounded softly, by tanh (as in Real NVP), so that a step's inverse cannot amplify by more than exp(h bound).

    Cost: 2 residual functions of twice the width a step, 2 streams. Inverse: closed form; ``amplification`` is the
    bound that no input exceeds, and 1 is usual where the log-scales start at zero.

    Args:
        dim: the channel dimension, along which the input is split.
        bound: bound of the log-scale, positive.
        split: width of either stream, where they differ.

    Raises:
        SchemeError: the bound is not positive, or the split is not two positive whole numbers.

    Source:
        Dinh et al. 2017, Density estimation using Real NVP, arXiv 1605.08803, equation 7 and section 4.

    Example:
        >>> import schemes
        >>> schemes.get("affine").slots(0, (4, 4))[0].out_channels
        8
    """

    examples = ("affine", "affine(bound=0.3)")
    stages = evaluations = 2
    streams = 2
    nodes = (0.0, 1.0)
    exact = False

    def __init__(self, dim: int = 1, bound: float = 1.0, split: Sequence[int] | None = None):
        self.dim, self.bound = dimension("affine", dim), finite("affine: the bound", bound)
        if not 0 < self.bound < 20:
            raise SchemeError(f"affine: the bound of the log-scale is {self.bound:g}, want 0 < bound < 20.")
        # For the worst input, since a declared figure must hold for all: the law drives the log-scales to their bound.
        self.amplification = math.exp(self.bound)
        self._set_split(split)

    def _terms(self, h: StepSize, y: Tensor) -> tuple[Tensor, Tensor]:
        # Log-scale first, shift second, as in Real NVP; a hand-written function must follow this order.
        s, b = y.chunk(2, self.dim)
        return torch.exp(h * self.bound * torch.tanh(s / self.bound)), h * b

    def updates(self, fs: Sequence[Function], h: StepSize, streams: int) -> list[Update]:
        f, g = fs
        return [Update(0, lambda s: self._terms(h, f(s[1]))), Update(1, lambda s: self._terms(h, g(s[0])))]

    def shape_of(self, i: int, streams: tuple[torch.Size, ...]) -> torch.Size | None:
        shape = list(streams[i])
        shape[self.dim] *= 2
        return torch.Size(shape)

    def _result(self, width: int) -> int:
        return 2 * width

    def __str__(self) -> str:
        given = self._options("" if self.bound == 1 else f"bound={written(self.bound)}")
        return f"affine({given})" if given else "affine"


class MultiLevel(_Split):
    """The multi-level coupling in its general form: x_t = h F_t(x_{t-1}, ..., x_{t-m+1}) + gamma x_{t-m}.

    The streams are (x_{t-m}, ..., x_{t-1}), at first the slices of the input along ``dim``. The function is given the
    m - 1 newer streams as separate arguments, newest first, so that they may differ in shape. A shortcut, if given,
    takes the place of gamma. With m = 2 and gamma = 1, two steps are one of revnet.

    Cost: 1 residual function a step, m streams. Inverse: closed form; amplifies by |gamma|^(-1/m) a step.

    Args:
        m: number of streams, at least 2.
        gamma: factor of the oldest stream, not zero.
        dim: the channel dimension, along which the input is split.

    Raises:
        SchemeError: fewer than 2 streams, or gamma is zero.

    Source:
        Cai et al. 2023, Reversible Column Networks, arXiv 2212.11696, equation 1 (section 2.2).

    Example:
        >>> import schemes
        >>> scheme = schemes.get("multilevel(3, 0.5)")
        >>> scheme.slots(0, (4, 5, 6))[0].in_channels, scheme.widths(0, (4, 5, 6))
        ((6, 5), (5, 6, 4))
    """

    examples = ("multilevel(3)", "multilevel(2)", "multilevel(2, 0.5)", "multilevel(3, -0.7)")
    stages = evaluations = 1
    shortcuts = 1
    nodes = (0.0,)
    rotate = 1

    def __init__(self, m: int, gamma: float = 1.0, dim: int = 1):
        if isinstance(m, bool) or not isinstance(m, int) or m < 2:
            raise SchemeError(f"multilevel: {m} streams, want a whole number of at least 2.")
        if m > MAX_FUNCTIONS:
            raise SchemeError(
                f"multilevel: {m} streams; at most {MAX_FUNCTIONS}, of which each has a part of the input."
            )
        self.streams, self.dim = m, dimension("multilevel", dim)
        self.gamma = finite("multilevel: gamma", gamma)
        if self.gamma == 0:
            raise SchemeError("multilevel: gamma is 0, so that the oldest stream is lost; want any other number.")
        # A stream is multiplied by gamma once in m steps, when it is the oldest.
        self.amplification = abs(self.gamma) ** (-1 / m)

    def updates(self, fs: Sequence[Function], h: StepSize, streams: int) -> list[Update]:
        (f,) = fs
        return [Update(0, lambda s: (self.gamma, scaled(h, f(*s[:0:-1]))), shortcut=0)]

    @property
    def raw(self) -> tuple[bool, ...]:
        return (False,)

    def slots(self, n: int, streams: tuple[int, ...], out_channels: int | None = None) -> tuple[Slot, ...]:
        return (Slot(n, 0, streams[:0:-1], streams[0]),)

    def widths(self, n: int, streams: tuple[int, ...], out_channels: int | None = None) -> tuple[int, ...]:
        return streams[1:] + streams[:1]

    def __str__(self) -> str:
        return f"multilevel({self._options(str(self.streams), written(self.gamma))})"
