"""The cost of a plan, and the fastest plan that fits: arithmetic on measured steps, without tensors.

A pass is cut into pieces, each run in one way: "store", "offload", "checkpoint", "reverse", "exact". What a piece keeps
is a set of named storages, since neighbours share them: the state that a stored step saves may be the last state of a
reversed piece before it. The peak is the most that is live at any moment of the forward and the backward pass: what
earlier pieces keep, and what the piece itself needs at that moment.

The fastest plan is found by dynamic programming over positions, front to back. A label at a position holds the bytes
kept so far, the time so far, and which of the streams there are held. A label is dropped if another with the same
streams held keeps no more and takes no more time. This is exact, because what a piece shares with those before it is
among the streams at its beginning. It is no longer exact where a position has more than 256 labels, or a long chain
allows more lengths of pieces than are tried: both are thinned out.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

Names = Mapping[int, int]  # bytes of each storage, by its name

MOST_LABELS = 256
MOST_PLACES = 128  # positions at which a longer chain may be cut
LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128)


class Cost(NamedTuple):
    """The cost of one step, run in one way.

    Attributes:
        forward: seconds of its forward pass.
        backward: seconds of its backward pass, including recomputation.
        rise: the most bytes that its forward pass takes, without its input.
        fall: the most bytes that its backward pass takes, above what is kept for it.
        extra: bytes that it keeps besides named storages: notes of random states, spilled bits, what nodes hold.
        first: bytes of a copy of its input that it keeps if a piece begins with it.
    """

    forward: float
    backward: float
    rise: int
    fall: int
    extra: int
    first: int = 0

    @property
    def time(self) -> float:
        """Seconds of both passes."""
        return self.forward + self.backward


class Profile(NamedTuple):
    """The measurements of one step.

    Attributes:
        before: storages of the streams before it.
        after: storages of the streams after it.
        saved: storages that autograd saves where the step is stored.
        costs: its cost for each way of running it; ways without an entry are not available.
        error: relative error of the state before it, reconstructed from the true one after it.
        growth: factor by which its inverse grows an error.
        ends: whether a stack ends here, so that no piece continues beyond it.
    """

    before: Names
    after: Names
    saved: Names
    costs: Mapping[str, Cost]
    error: float = 0.0
    growth: float = 1.0
    ends: bool = False


class Piece(NamedTuple):
    """Some steps, run in one way.

    Attributes:
        first: its first step.
        last: the step after its last one.
        way: how they are run.
        time: seconds.
        streams: storages of the streams before it.
        kept: storages that it keeps until its backward pass.
        extra: bytes that it keeps besides.
        tops: the most bytes that are live at once while it runs, without what earlier pieces keep: a figure for each
            set of its input streams that is among them, since an earlier piece may hold those already.
        error: relative error of the states that it reconstructs.
    """

    first: int
    last: int
    way: str
    time: float
    streams: Names
    kept: Names
    extra: int
    tops: Mapping[frozenset[int], int]
    error: float


class Outcome(NamedTuple):
    """The memory of a piece within a plan.

    Attributes:
        piece: the piece.
        kept: bytes that it keeps, besides what earlier pieces keep.
        peak: the most bytes that are live while it runs, forward and backward.
        live: bytes that are live after its forward pass.
    """

    piece: Piece
    kept: int
    peak: int
    live: int


class Chain:
    """A sequence of measured steps, and the costs of its pieces.

    Args:
        profiles: the steps.
        end: bytes live at the loss, besides all that is kept and the last streams: the output and its gradient.
        given: storages of the input, which the caller holds.
        base: bytes live all the time.
    """

    def __init__(self, profiles: Sequence[Profile], end: int = 0, given: Sequence[int] = (), base: int = 0):
        self.profiles, self.end, self.given, self.base = profiles, end, frozenset(given), base

    def pieces(self, first: int, way: str) -> Iterator[Piece]:
        """The pieces of that way that begin at a step, in order of length."""
        # Other ways keep what autograd saves: "store", "offload", and "fixed", what a model saves between its stacks.
        grow = {"checkpoint": self._checkpoint, "reverse": self._undone, "exact": self._undone}.get(way, self._stored)
        return grow(first, way)

    def piece(self, first: int, last: int, way: str) -> Piece:
        """The piece of the steps from ``first`` up to ``last``."""
        return next(p for p in self.pieces(first, way) if p.last == last)

    def _reach(self, first: int, way: str) -> Iterator[tuple[int, Profile, Cost]]:
        for n in range(first, len(self.profiles)):
            profile = self.profiles[n]
            if way not in profile.costs:
                return
            yield n, profile, profile.costs[way]
            if profile.ends:
                return

    def _stored(self, first: int, way: str) -> Iterator[Piece]:
        streams = self.profiles[first].before
        tops, saved, time, extra = _Tops(streams), _Union(), 0.0, 0
        for n, profile, cost in self._reach(first, way):
            # The forward pass of the step: its input is live, and all that earlier steps have saved.
            tops.add(saved, profile.before, cost.rise + extra)
            # On the host, saved storages take no device memory.
            if way != "offload":
                saved.add(profile.saved)
            extra += cost.extra
            tops.add(saved, {}, cost.fall + extra)
            time += cost.time
            yield Piece(first, n + 1, way, time, streams, dict(saved.sizes), extra, dict(tops.most), 0.0)

    def _checkpoint(self, first: int, way: str) -> Iterator[Piece]:
        streams = self.profiles[first].before
        tops, again, time, extra = _Tops(streams), _Tops(streams), 0.0, 0
        kept, saved = _Union(streams), _Union(streams)
        beside = self.profiles[first].costs[way].extra if way in self.profiles[first].costs else 0
        for n, profile, cost in self._reach(first, way):
            stored = profile.costs["store"]
            # Forward, the step drops what it saves: only the first streams stay.
            tops.add(kept, profile.before, cost.rise + beside)
            # Backward, all steps of the piece run again with a graph, and what they save accumulates as if stored.
            again.add(saved, profile.before, stored.rise + extra + beside)
            saved.add(profile.saved)
            extra += stored.extra
            # The piece may end here or continue, so what happens only at its end is added to a copy.
            now = tops.copy()
            now.join(again, sum(profile.after.values()))  # the gradients of the last streams wait during recomputation
            now.add(saved, {}, cost.fall + extra + beside)
            tops.add(saved, {}, stored.fall + extra + beside)
            time += cost.time
            yield Piece(first, n + 1, way, time, streams, streams, beside, now.most, 0.0)

    def _undone(self, first: int, way: str) -> Iterator[Piece]:
        streams = self.profiles[first].before
        own = {} if way == "exact" else streams  # exact arithmetic keeps a rounded copy instead
        start, tops, time, extra = _Union(own), _Tops(streams), 0.0, 0
        for n, profile, cost in self._reach(first, way):
            # Exact arithmetic rounds its first state into a copy, once per piece.
            extra += cost.first if n == first else 0
            tops.add(start, profile.before, cost.rise + extra)
            extra += cost.extra
            tops.add(start, {}, cost.fall + extra)
            time += cost.time
            error = self.error(first, n + 1) if way == "reverse" else 0.0
            # The first streams for comparison, and the last ones, from which all others are reconstructed.
            kept = {**own, **profile.after}
            yield Piece(first, n + 1, way, time, streams, kept, extra, dict(tops.most), error)

    def error(self, first: int, last: int) -> float:
        """The largest relative error of the states from ``first`` on, reconstructed from the one before ``last``."""
        error = most = 0.0
        for profile in reversed(self.profiles[first:last]):
            # From the last step back: undoing a step multiplies the error from above by its growth and adds its own.
            error = profile.error + profile.growth * error
            most = max(most, error)
        return most

    def outcomes(self, pieces: Sequence[Piece]) -> tuple[list[Outcome], int]:
        """The memory of each piece of a whole plan, and the peak of all."""
        held, kept = self._start(), self.base
        found = []
        for piece in pieces:
            top = kept + _above(piece, held)
            grown = _new(piece, held)
            # Only the streams at the border matter from here on: pieces share no other storages with earlier ones.
            held, kept = self._following(piece, held), kept + grown
            streams = self.profiles[piece.last - 1].after
            live = kept + sum(size for name, size in streams.items() if name not in held)
            found.append(Outcome(piece, grown, top, live))
        peak = max([kept + self._at_end(held), *(o.peak for o in found)])
        return found, peak

    def _start(self) -> frozenset[int]:
        return self.given & frozenset(self.profiles[0].before) if self.profiles else frozenset()

    def _at_end(self, held: frozenset[int]) -> int:
        last = self.profiles[-1].after if self.profiles else {}
        return self.end + sum(size for name, size in last.items() if name not in held)

    def _following(self, piece: Piece, held: frozenset[int]) -> frozenset[int]:
        after = self.profiles[piece.last - 1].after
        return frozenset(name for name in after if name in held or name in piece.kept)

    def fastest(
        self, ways: Sequence[str], memory: float, bound: float, by_peak: bool = False
    ) -> tuple[list[Piece], float] | None:
        """The plan of least time whose peak is at most ``memory`` and whose errors are at most ``bound``.

        Args:
            ways: the ways in which steps may be run, where their profile has a cost for it.
            memory: bytes.
            bound: largest relative error of reconstructed states.
            by_peak: find the plan of the smallest peak instead.

        Returns:
            Its pieces, and its time (or its peak); None if no plan fits.
        """
        places = self._places()
        labels: dict[int, dict[frozenset[int], list[_Label]]] = {
            0: {self._start(): [_Label(self.base, 0.0, None, None)]}
        }
        for place in places[:-1]:
            here = labels.pop(place, {})
            if not here:
                continue
            # Pieces lead forward only, so all labels of this position have arrived and can be thinned out now.
            here = {held: _front(found) for held, found in here.items()}
            for way in ways:
                for piece in self._candidates(place, way, places, bound):
                    for held, found in here.items():
                        above, grown = _above(piece, held), _new(piece, held)
                        target = labels.setdefault(piece.last, {}).setdefault(self._following(piece, held), [])
                        for label in found:
                            # Labels are sorted by what they keep, so none of the remaining ones fits either.
                            if label.kept + above > memory:
                                break
                            # One search for two objectives: times are summed, of peaks the maximum is taken.
                            cost = max(label.cost, label.kept + above) if by_peak else label.cost + piece.time
                            target.append(_Label(label.kept + grown, cost, piece, label))
        done = []
        for held, found in labels.get(places[-1], {}).items():
            for label in found:
                top = label.kept + self._at_end(held)
                if top <= memory:
                    done.append(label._replace(cost=max(label.cost, top)) if by_peak else label)
        if not done:
            return None
        best = min(done, key=lambda label: (label.cost, label.kept))
        return best.pieces(), best.cost

    def least(self, ways: Sequence[str], bound: float) -> int:
        """The smallest peak that any plan has."""
        found = self.fastest(ways, float("inf"), bound, by_peak=True)
        # Without a memory limit there is always a plan: every step can be stored.
        assert found is not None
        return int(found[1])

    def _places(self) -> list[int]:
        """The positions where pieces may begin and end; all positions of a short chain."""
        count = len(self.profiles)
        unit = -(-count // MOST_PLACES)
        # Whatever the spacing, the end of a stack is a position: there the plan is split into one per stack.
        ends = {n + 1 for n, p in enumerate(self.profiles) if p.ends}
        starts = sorted({0, count, *ends})
        return sorted({p for a, b in pairwise(starts) for p in (*range(a, b, unit), b)} or {0})

    def _candidates(self, place: int, way: str, places: Sequence[int], bound: float) -> Iterator[Piece]:
        at = places.index(place)
        # A piece that stores is the sum of its steps, so longer pieces would only add labels.
        fits = set(places[at + 1 : at + 2]) if way not in ("checkpoint", "reverse") else set()
        if not fits:
            lengths = range(1, len(places)) if len(places) <= 17 else LENGTHS
            fits = {places[at + k] for k in lengths if at + k < len(places)}
        whole = way in ("checkpoint", "reverse")
        last = None
        for piece in self.pieces(place, way):
            # Written as ``not <=`` so that NaN ends the loop, too.
            if not piece.error <= bound:
                break
            if piece.last in fits:
                yield piece
                last = None
            else:
                last = piece
            if not whole and piece.last >= max(fits):
                break
        # The longest piece: to the end of the stack, or as far as the errors allow.
        if whole and last is not None and last.last in places:
            yield last


class _Label(NamedTuple):
    kept: int
    cost: float
    piece: Piece | None
    before: "_Label | None"

    def pieces(self) -> list[Piece]:
        found, label = [], self
        while label.piece is not None and label.before is not None:
            found.append(label.piece)
            label = label.before
        return found[::-1]


def _front(labels: "list[_Label]") -> "list[_Label]":
    """The labels that no other dominates in both bytes kept and cost; the smallest first."""
    found: list[_Label] = []
    for label in sorted(labels, key=lambda label: (label.kept, label.cost)):
        if not found or label.cost < found[-1].cost:
            found.append(label)
    # Thinned evenly, with both ends: the smallest label may be the only one that fits, the fastest is the best.
    if len(found) > MOST_LABELS:
        found = [found[round(i * (len(found) - 1) / (MOST_LABELS - 1))] for i in range(MOST_LABELS)]
    return found


class _Union:
    """A growing set of storages."""

    def __init__(self, names: Names = MappingProxyType({})):
        self.sizes: dict[int, int] = {}
        self.total = 0
        self.add(names)

    def add(self, names: Names) -> None:
        """Adds the storages that are not in the set yet."""
        for name, size in names.items():
            if name not in self.sizes:
                self.sizes[name] = size
                self.total += size


class _Tops:
    """The most bytes live at any moment so far, for each set of input streams that was among them."""

    def __init__(self, streams: Names):
        self.streams = streams
        self.most: dict[frozenset[int], int] = {}

    def copy(self) -> "_Tops":
        """An independent copy."""
        found = _Tops(self.streams)
        found.most = dict(self.most)
        return found

    def add(self, live: _Union, more: Names, beside: int) -> None:
        """Adds a moment at which these storages are live, and some bytes beside them."""
        shared = frozenset(name for name in self.streams if name in live.sizes or name in more)
        most = live.total + beside + sum(size for name, size in more.items() if name not in live.sizes)
        # By the streams involved, since an earlier piece may hold them, whose bytes must then not be counted twice.
        self.most[shared] = max(self.most.get(shared, 0), most)

    def join(self, other: "_Tops", beside: int) -> None:
        """Adds all moments of another, with some bytes beside."""
        for shared, most in other.most.items():
            self.most[shared] = max(self.most.get(shared, 0), most + beside)


def _above(piece: Piece, held: frozenset[int]) -> int:
    """The most bytes live at any moment of a piece, besides what earlier pieces keep."""
    return max(most - sum(piece.streams[n] for n in names & held) for names, most in piece.tops.items())


def _new(piece: Piece, held: frozenset[int]) -> int:
    """Bytes that a piece keeps, besides what earlier pieces keep."""
    return piece.extra + sum(size for name, size in piece.kept.items() if name not in held)
