"""One interpreter for every explicit Runge-Kutta method."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .errors import SchemeError
from .language import sampled
from .scheme import Function, Scheme, State, StepSize
from .tableau import Tableau

Terms = tuple[tuple[int, float], ...]


def terms(row: Sequence[float]) -> Terms:
    """The nonzero entries of a row, with their indices."""
    return tuple((j, float(a)) for j, a in enumerate(row) if a)


def combine(y: Tensor, ks: Sequence[Tensor], row: Terms) -> Tensor:
    """y + sum_j row[j] k_j, in one new tensor: the later terms are added in place, which saves their allocations."""
    # A stage that reads no other is given y itself: no sum, and no copy.
    if not row:
        return y
    j, a = row[0]
    out = torch.add(y, ks[j], alpha=a)
    for j, a in row[1:]:
        out.add_(ks[j], alpha=a)
    return out


def weighted(ks: Sequence[Tensor], row: Terms) -> Tensor:
    """sum_j row[j] k_j."""
    j, a = row[0]
    out = ks[j] if a == 1.0 else ks[j] * a
    for n, (j, a) in enumerate(row[1:]):
        # The first sum must not write into k; the later ones write into a tensor made here.
        out = torch.add(out, ks[j], alpha=a) if n == 0 else out.add_(ks[j], alpha=a)
    return out


class RungeKutta(Scheme):
    r"""An explicit Runge-Kutta method: k_i = f_i(g(x) + h sum_j a_ij k_j), x' = g(x) + h sum_i b_i k_i.

    A stage whose row of A is zero is given x itself, before the shortcut g: in a network this residual function applies
    the stride and the change of width.

    Cost: ``stages`` residual functions a step, less those that only an error estimate reads; one stream, no inverse;
    the k_i of a step are kept until its end.

    Args:
        tableau: the coefficients.

    Example:
        >>> import torch, schemes
        >>> rk4 = schemes.RungeKutta(schemes.tableaux.rk4)
        >>> (y,) = rk4.step([torch.neg] * 4, (torch.ones(()),), h=0.1)
        >>> round(float(y), 6)
        0.904837
    """

    examples = ("rk4",)

    def __init__(self, tableau: Tableau):
        a, b, c, b_hat = tableau.floats()
        self._tableau = tableau
        self.stages = tableau.stages
        self.order = tableau.order
        self.nodes = tuple(c)
        self.mixing, self.gain = tableau.mixing, sum(map(abs, b))
        self.pair_order = min((p for p in (tableau.order, tableau.order_hat) if p), default=1)
        self._rows = tuple(terms(row) for row in a)
        self._weights = terms(b)
        # The companion method minus the method: an estimate of the error of a step, per unit of h.
        self._errors = terms([v - u for u, v in zip(b, b_hat, strict=True)]) if b_hat else ()
        # Stages at the end that only the companion reads are not evaluated by a plain step (dopri5's seventh).
        self.live = self.evaluations = 1 + self._weights[-1][0]
        self._scaled: dict[float, tuple[tuple[Terms, ...], Terms]] = {1.0: (self._rows, self._weights)}

    @property
    def raw(self) -> tuple[bool, ...]:
        return tuple(not row for row in self._rows)

    @property
    def tableau(self) -> Tableau:
        return self._tableau

    def _at(self, h: float) -> tuple[tuple[Terms, ...], Terms]:
        """The rows times h, and the weights times h; cached for the few step sizes that a network uses."""
        # Numbers of other types are equal keys, and would leave coefficients of their own precision to the next caller.
        if type(h) is not float:
            h = float(h)
        found = self._scaled.get(h)
        if found is None:
            # A schedule or a solver uses a new size at every call, and the cache must not grow without bound.
            if len(self._scaled) >= 64:
                self._scaled = {1.0: (self._rows, self._weights)}
            rows = tuple(tuple((j, h * a) for j, a in row) for row in self._rows)
            found = self._scaled[h] = rows, tuple((j, h * b) for j, b in self._weights)
        return found

    def _step(self, fs: Sequence[Function], state: State, h: StepSize = 1.0, gs: Sequence[Function] = ()) -> State:
        (x,) = state
        y = gs[0](x) if gs else x
        # A learned size stays in the graph, so it multiplies the sums and is not folded into the coefficients.
        if isinstance(h, Tensor):
            ks = self._slopes(fs, x, y, h, self.live)
            return (torch.addcmul(y, weighted(ks, self._weights), h),)
        rows, weights = self._at(h)
        ks: list[Tensor] = []
        # Not strict: functions of stages that only a companion reads are passed too, but not called.
        for f, row in zip(fs, rows[: self.live], strict=False):
            ks.append(f(combine(y, ks, row) if row else x))
        return (combine(y, ks, weights),)

    def _slopes(self, fs: Sequence[Function], x: Tensor, y: Tensor, h: StepSize, stages: int) -> list[Tensor]:
        ks: list[Tensor] = []
        rows = None if isinstance(h, Tensor) else self._at(h)[0]
        for i, (f, row) in enumerate(zip(fs, self._rows[:stages], strict=False)):
            if not row:
                argument = x
            elif rows is None:
                argument = torch.addcmul(y, weighted(ks, row), h)  # type: ignore[arg-type]
            else:
                argument = combine(y, ks, rows[i])
            ks.append(f(argument))
        return ks

    def slope(self, fs: Sequence[Function], x: Tensor, h: StepSize = 1.0, gs: Sequence[Function] = ()) -> Tensor:
        return weighted(self._slopes(fs, x, gs[0](x) if gs else x, h, self.live), self._weights)

    def step_with_error(
        self, fs: Sequence[Function], state: State, h: StepSize = 1.0, gs: Sequence[Function] = ()
    ) -> tuple[State, Tensor]:
        """A step and its error estimate h sum_i (b_hat_i - b_i) k_i, by the embedded companion; differentiable.

        Args:
            fs: the residual functions, ``stages`` of them.
            state: the one stream.
            h: step size.
            gs: shortcuts, one per stream, or none.

        Raises:
            SchemeError: the method has no companion.
        """
        if not self._errors:
            raise SchemeError(f"{self} has no embedded companion; dopri5, tsit5 and verner89 estimate their error.")
        (x,) = state
        y = gs[0](x) if gs else x
        ks = self._slopes(fs, x, y, h, self.stages)
        return (y + h * weighted(ks, self._weights),), h * weighted(ks, self._errors)

    @property
    def unused(self) -> tuple[int, ...]:
        # Those that only the error estimate reads, or nothing. From the last stage back, a stage's readers come first.
        needed = {i for i, _ in self._weights}
        for i in reversed(range(self.live)):
            if i in needed:
                needed |= {j for j, _ in self._rows[i]}
        return tuple(i for i in range(self.stages) if i not in needed)

    def __eq__(self, other: object) -> bool:
        # By the coefficients: a user's method may have the same name as another.
        return isinstance(other, RungeKutta) and self._tableau == other._tableau

    def __hash__(self) -> int:
        return hash(self._tableau.name)

    def __str__(self) -> str:
        return self._tableau.name or "unnamed"


@sampled("pruned(dopri5)", "pruned(verner89)", "pruned(tsit5)", "pruned(bosh3)", "pruned(rk4)")
def pruned(scheme: Scheme) -> RungeKutta:
    """A Runge-Kutta method without its companion, and without the stages that only the companion reads.

    ``pruned(dopri5)`` has 6 stages, ``pruned(verner89)`` the 14 of verner8: every residual function reaches the output.

    Args:
        scheme: a Runge-Kutta method.

    Raises:
        SchemeError: not a Runge-Kutta method.

    Example:
        >>> import schemes
        >>> schemes.get("pruned(dopri5)").stages
        6
    """
    if not isinstance(scheme, RungeKutta):
        raise SchemeError(f"pruned: {scheme!r} is no single Runge-Kutta method; only an embedded pair can be pruned.")
    return RungeKutta(replace(scheme.tableau.pruned(), name=f"pruned({scheme})"))
