"""The matrix form of a scheme, read from its step alone: a general linear method, its inverse and its amplification.

A scheme whose streams all have one shape is four matrices (Butcher 2006, General linear methods, Acta Numerica 15,
section 2): with streams y and evaluations Y_i = F_i(argument i),

    arguments = U y + h A F,        new y = V y + h B F.

``probe`` recovers them by feeding unit vectors through a step. They are an oracle: Runge-Kutta methods must reproduce
their tableau, a declared inverse must equal the derived one, and a contributor who writes ``_step`` alone gets the
rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import SchemeError
from .scheme import Function, Scheme, State

_ZERO = 1e-12


@dataclass(frozen=True)
class LinearMethod:
    """The matrices of one step: arguments = U y + A F, new y = V y + B F (the step size is inside).

    Attributes:
        a: (evaluations, evaluations).
        u: (evaluations, streams).
        b: (streams, evaluations).
        v: (streams, streams).
        functions: number of the residual function that each evaluation calls.
    """

    a: Tensor
    u: Tensor
    b: Tensor
    v: Tensor
    functions: tuple[int, ...]

    @property
    def read(self) -> tuple[int, ...]:
        """The streams that the step, or another step after it, reads; the others are byproducts for the readout."""
        kept = list(range(self.v.shape[0]))
        while True:
            used = [j for j in kept if bool(self.u[:, j].any()) or bool(self.v[kept, j].any())]
            # A stream that only dropped streams read is dropped in the next round.
            if used == kept:
                return tuple(kept)
            kept = used

    def restricted(self, streams: Sequence[int]) -> "LinearMethod":
        """The method on some of its streams, which must not read the others.

        Args:
            streams: numbers of the streams that are kept.
        """
        s = list(streams)
        return LinearMethod(self.a, self.u[:, s], self.b[s], self.v[s][:, s], self.functions)

    @property
    def invertible(self) -> bool:
        """Whether an explicit step leads back: V is nonsingular and no evaluation depends on itself.

        Streams that nothing reads are ignored.
        """
        m = self.restricted(self.read)
        return m._regular and m._order(m._backwards()) is not None

    @property
    def amplification(self) -> float:
        """Spectral radius of V^-1: the factor by which a step's inverse grows an error, in the long run, at h = 0."""
        m = self.restricted(self.read)
        if not m._regular:
            return float("inf")
        return float(torch.linalg.eigvals(torch.linalg.inv(m.v)).abs().max())

    def inverse(self) -> "LinearMethod":
        """The method that leads back: (A - U V^-1 B, U V^-1, -V^-1 B, V^-1), on the streams that are read.

        Raises:
            SchemeError: there is no explicit one.
        """
        m = self.restricted(self.read)
        if not self.invertible:
            # Backwards an evaluation may depend on its own result: a method that is explicit forwards need not be
            # explicit backwards.
            why = "it forgets a stream (V is singular)" if not m._regular else "its stages would be implicit"
            raise SchemeError(f"this scheme has no explicit inverse: {why}.")
        v = torch.linalg.inv(m.v)
        # Solved for the old streams: y = V^-1 (new y - B F), substituted into the arguments.
        return LinearMethod(m._backwards(), m.u @ v, -v @ m.b, v, m.functions)

    def step(self, fs: Sequence[Function], state: State) -> State:
        """One step, by the matrices; evaluations run in an order in which none depends on a later one.

        Args:
            fs: the residual functions.
            state: the streams.

        Raises:
            SchemeError: an evaluation depends on itself.
        """
        order = self._order(self.a)
        if order is None:
            raise SchemeError("this method is implicit: an evaluation depends on itself.")
        ks: dict[int, Tensor] = {}
        for i in order:
            ks[i] = fs[self.functions[i]](_sum(self.u[i], state, self.a[i], ks))
        return tuple(_sum(self.v[i], state, self.b[i], ks) for i in range(len(state)))

    @property
    def _regular(self) -> bool:
        return bool(torch.linalg.matrix_rank(self.v) == self.v.shape[0])

    def _backwards(self) -> Tensor:
        a = self.a - self.u @ torch.linalg.solve(self.v, self.b)
        # Cancellation leaves rounding errors, which would look like one evaluation depending on another.
        return torch.where(a.abs() > _ZERO * (1 + self.a.abs().max()), a, 0.0)

    def _order(self, a: Tensor) -> list[int] | None:
        """An order of the evaluations in which each comes after those that it reads, or None."""
        left, done = list(range(a.shape[0])), []
        while left:
            ready = [i for i in left if not bool(a[i, left].any())]
            if not ready:
                return None
            done += ready
            left = [i for i in left if i not in ready]
        return done


def _sum(row: Tensor, state: State, weights: Tensor, ks: dict[int, Tensor]) -> Tensor:
    out = torch.zeros_like(state[0])
    for j, x in enumerate(state):
        out = out + float(row[j]) * x
    for j, k in ks.items():
        if weights[j]:
            out = out + float(weights[j]) * k
    return out


def probe(scheme: Scheme, streams: int | None = None, h: float = 1.0) -> LinearMethod:
    """Reads the matrices A, U, B, V of a scheme from one step.

    Every stream and every evaluation is its own unit vector; the results of the step, and the functions' arguments, are
    then the rows of the matrices. A second step, from random vectors, checks that the scheme is linear in both.

    Args:
        scheme: a scheme whose streams have one shape and whose functions take one of that shape.
        streams: number of streams; None takes the scheme's own.
        h: step size.

    Raises:
        SchemeError: the scheme is not linear in its streams and evaluations, or its streams differ in shape or grow.

    Example:
        >>> import schemes
        >>> m = probe(schemes.get("momentum(0.5)"))
        >>> m.v.tolist(), m.b.tolist(), m.invertible, m.amplification
        ([[1.0, 0.5], [0.0, 0.5]], [[0.5], [0.5]], True, 2.0)
    """
    with torch.device("cpu"):  # whatever device a caller builds its network on
        return _probe(scheme, streams, h)


def _probe(scheme: Scheme, streams: int | None, h: float) -> LinearMethod:
    r = scheme.streams if streams is None else streams
    s = scheme.stages if scheme.evaluations is None else max(scheme.evaluations, scheme.stages)
    # Every stream and every evaluation has its own direction, so the entries of a sum are its coefficients.
    units = torch.eye(r + s, dtype=torch.float64)
    arguments, results, functions = _run(scheme, h, units[:r], units[r:])
    n = len(arguments)
    if n:
        m = LinearMethod(arguments[:, r : r + n], arguments[:, :r], results[:, r : r + n], results[:, :r], functions)
    else:
        m = LinearMethod(units[:0, :0], units[:0, :r], units[:r, :0], results[:, :r], ())
    # Unit vectors cannot tell x from x^2; random ones do.
    generator = torch.Generator().manual_seed(0)
    y, k = (torch.randn(c, r + s, dtype=torch.float64, generator=generator) for c in (r, s))
    got_arguments, got, _ = _run(scheme, h, y, k)
    want_arguments, want = m.u @ y + m.a @ k[:n], m.v @ y + m.b @ k[:n]
    if not (torch.allclose(got, want, atol=1e-9) and torch.allclose(got_arguments, want_arguments, atol=1e-9)):
        raise SchemeError(f"{scheme}: no general linear method; a step is not linear in streams and evaluations.")
    return m


def _run(scheme: Scheme, h: float, y: Tensor, k: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Arguments and results of a step from the rows of y, whose evaluation i returns row i of k."""
    arguments: list[Tensor] = []
    functions: list[int] = []

    def function(i: int) -> Function:
        def f(*args: Tensor) -> Tensor:
            if len(args) != 1 or args[0].shape != (1, y.shape[1]) or len(arguments) == len(k):
                raise SchemeError(f"{scheme}: no general linear method; function {i} is given several streams.")
            arguments.append(args[0])
            functions.append(i)
            # By the order of the calls, not by the function's number: a scheme may call a function several times.
            return k[len(arguments) - 1][None]

        return f

    try:
        new = scheme._step([function(i) for i in range(scheme.stages)], tuple(x[None] for x in y), h)
    except (RuntimeError, IndexError, ValueError) as error:
        if isinstance(error, SchemeError):
            raise
        raise SchemeError(f"{scheme}: no general linear method on {len(y)} streams of one shape ({error}).") from None
    if len(new) != len(y):
        raise SchemeError(f"{scheme}: no general linear method; a step makes {len(new)} streams of {len(y)}.")
    rows = torch.cat(arguments) if arguments else y[:0]
    return rows, torch.cat(new), tuple(functions)
