"""Auxiliary values of residual functions and log-determinants of couplings, summed over a pass."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from schemes.coupling import Coupling, Update, apply_update, rotated, shortcut_of
from schemes.errors import SchemeError
from schemes.language import shorten
from schemes.scheme import Function, Scheme, State, StepSize

LOG_DET = "log_det"
ENERGIES = ("kinetic", "jacobian")


class Sink:
    """Collects auxiliary values in the order in which they come.

    Args:
        log_det: whether couplings add the log-determinants of their updates.
    """

    def __init__(self, log_det: bool = False):
        self.log_det = log_det
        self.names: list[str] = []
        self.values: list[Tensor] = []
        self._open = True

    def add(self, name: str, value: Tensor) -> None:
        """Adds one value."""
        # A function that a backward pass recomputes has added its values before.
        if not self._open:
            return
        self.names.append(name)
        self.values.append(value)

    def extend(self, other: "Sink") -> None:
        """Adds the values of another sink, which keeps them."""
        for name, value in zip(other.names, other.values, strict=True):
            self.add(name, value)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Within it, the sink ignores what is added."""
        before, self._open = self._open, False
        try:
            yield
        finally:
            self._open = before

    def take(self) -> list[Tensor]:
        """Returns the values so far and empties the sink."""
        found, self.names, self.values = self.values, [], []
        return found

    def sums(self, wanted: bool | Sequence[str]) -> dict[str, Tensor]:
        """Returns the sum of the values under each name.

        Args:
            wanted: True for all, or some names, as `names_of` reads them.

        Raises:
            SchemeError: a wanted name that no function returned.
        """
        found: dict[str, Tensor] = {}
        for name, value in zip(self.names, self.values, strict=True):
            # No 0 to start from, whose dtype and device would have to be known.
            found[name] = found[name] + value if name in found else value
        if isinstance(wanted, bool):
            return found
        for name in wanted:
            if name not in found:
                there = ", ".join(sorted(found)) or "none"
                raise SchemeError(
                    f"Stack: no residual function returned an auxiliary value {name!r}; there are {there}.\n"
                    "  A residual function returns them beside its value: return y, {'balance': loss}."
                )
        return {name: found[name] for name in wanted}


def names_of(aux: bool | Collection[str]) -> bool | tuple[str, ...]:
    """Reads which auxiliary values a call asks for: all of them, none, or some by their names.

    Raises:
        SchemeError: anything else.

    Example:
        >>> names_of("energy"), names_of(["energy", "balance"]), names_of(True)
        (('energy',), ('energy', 'balance'), True)
    """
    if isinstance(aux, bool):
        return aux
    if isinstance(aux, str):  # one name, and not a collection of its letters
        return (aux,)
    if not isinstance(aux, Collection) or not all(isinstance(name, str) for name in aux):
        raise SchemeError(
            f"Stack: aux is {shorten(repr(aux), 60)}, want True for all auxiliary values, or the names of some.\n"
            "  stack(x, aux=True), stack(x, aux='balance') or stack(x, aux=['balance', 'energy'])."
        )
    return tuple(aux)


class Split:
    """A residual function whose auxiliary values go to a sink, or are dropped.

    Args:
        function: residual function ``i`` of the step.
        sink: collects the values.
        step: the step, whose ``auxiliary`` is set once there are values.
        i: the function's place in the step, for messages.
    """

    __slots__ = ("function", "i", "sink", "step")

    def __init__(self, function: Function, sink: Sink | None, step: Any, i: int):
        self.function, self.sink, self.step, self.i = function, sink, step, i

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        out = self.function(*args, **kwargs)
        if not is_pair(out):
            return out
        value, given = out  # type: ignore[misc]
        # In every call, since a value may be wrong in a single one; also where none are collected.
        self._check(given)  # type: ignore[arg-type]
        if self.sink is not None and self.sink.log_det and LOG_DET in given:
            raise SchemeError(
                f"{self._where}: returned an auxiliary value 'log_det', the name of the log-determinant of its step, "
                "which would be added to it.\n  Return it by another name."
            )
        self.step.auxiliary = True
        if self.sink is not None:
            for name, x in given.items():  # type: ignore[union-attr]
                self.sink.add(name, x)
        return value

    @property
    def _where(self) -> str:
        return f"{self.step.scheme}, steps.{self.step.index}.fs.{self.i}"

    def _check(self, given: Mapping[str, Tensor]) -> None:
        for name, x in given.items():
            if isinstance(name, str) and isinstance(x, Tensor):
                continue
            if not isinstance(name, str):
                what = f"an auxiliary value under the name {shorten(repr(name), 60)}, want a string"
            else:
                what = f"the auxiliary value {name!r} as a {type(x).__name__}, want a tensor"
            raise SchemeError(
                f"{self._where}: returned {what}.\n"
                "  Return tensors by their names, y, {'balance': loss}; of a number, y.new_tensor(number)."
            )


def is_pair(out: Any) -> bool:
    """Whether a residual function returned a value and its auxiliary values."""
    return isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], Mapping)


def with_energies(
    function: Function, args: tuple, kwargs: dict[str, Any], place: int, names: Collection[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Returns a residual function's value, and its own auxiliary values together with the wanted ``ENERGIES``.

    "kinetic" is the mean of |f|^2, "jacobian" that of |e^T df/dx|^2 for random signs e; in at least 32 bits. Complex
    values have random signs of both parts, over sqrt 2.

    Args:
        function: the residual function, called once.
        args: its positional arguments.
        kwargs: its keyword arguments.
        place: position of x among ``args``.
        names: the wanted ``ENERGIES``; a value of the same name that the function itself returns takes precedence.

    Source:
        Finlay et al. 2020, How to train your neural ODE, arXiv 2002.02798.
    """
    wanted, x = torch.is_grad_enabled(), args[place]
    jacobian = "jacobian" in names
    with torch.enable_grad() if jacobian else nullcontext():
        if jacobian:
            # The Jacobian needs a graph that begins at x, even if x is an input or the caller has gradients disabled.
            x = x if wanted and x.requires_grad else x.detach().requires_grad_()
        out = function(*args[:place], x, *args[place + 1 :], **kwargs)
        pair: Any = out if is_pair(out) else (out, {})
        y, own = pair
        found: dict[str, Any] = {}
        if "kinetic" in names:
            found["kinetic"] = _mean_square(y)
        if jacobian:
            (g,) = torch.autograd.grad(y, x, _random_signs(y), create_graph=wanted)
            found["jacobian"] = _mean_square(g)
    found.update(own)
    if jacobian and not wanted:
        # The graph built for the Jacobian must not leak into a pass without gradients.
        y, found = y.detach(), {name: value.detach() for name, value in found.items()}
    return y, found


def _random_signs(like: Tensor) -> Tensor:
    """Random numbers of modulus 1 and mean 0, independent in each real component."""
    if like.is_complex():
        return torch.complex(_random_signs(like.real), _random_signs(like.imag)) / math.sqrt(2)
    return torch.empty_like(like).bernoulli_(0.5).mul_(2).sub_(1)


def _mean_square(x: Tensor) -> Tensor:
    x = x.abs() if x.is_complex() else x
    # Summed over many evaluations in half precision, the last ones would be rounded away.
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().mean()


def measured(scheme: Any, fs: Sequence[Function], h: StepSize, streams: int, gs: Sequence, sink: Sink) -> list[Update]:
    """Returns the updates of a coupling, each of which adds its log-determinant to the sink.

    An update x_d <- scale * x_d + shift(others) has the determinant of its scale: sum log |scale| over the elements.

    Raises:
        SchemeError: not a coupling, or one that adds or overwrites streams, so that there is no determinant.
    """
    if not isinstance(scheme, Coupling) or scheme.streams_added or scheme.byproducts:
        raise SchemeError(
            f"Stack: a step of {scheme} is no map between streams of one size, and has no log-determinant.\n"
            "  Couplings such as revnet, affine and additive(3) have one."
        )
    for g in gs:
        if not isinstance(getattr(g, "scale", None), Tensor):
            raise SchemeError(f"Stack: the shortcut {g._get_name()} has no scale to take a log-determinant of.")

    def measure(update: Update) -> Update:
        def terms(state: State) -> tuple:
            found, g = update.terms(state), shortcut_of(update, gs)
            sink.add(LOG_DET, log_det(found[0] if g is None else g.scale, state[update.dst]))
            return found

        return update._replace(terms=terms)

    return [measure(update) for update in scheme.updates(fs, h, streams)]


def step_measured(scheme: Scheme, fs: Sequence, state: State, h: StepSize, gs: Sequence, sink: Sink) -> State:
    """Returns the state after a step of couplings, and adds their log-determinants to the sink."""
    for part, part_fs, part_h, part_gs in scheme.decompose(fs, h, gs):
        for update in measured(part, part_fs, part_h, len(state), part_gs, sink):
            state = apply_update(update, state, part_gs)
        # A permutation of equal streams has determinant 1 or -1, and adds nothing.
        state = rotated(state, part.rotate)  # type: ignore[attr-defined]
    return state


def log_det(scale: float | Tensor, x: Tensor) -> Tensor:
    """sum log |scale| over the elements of each sample of x, in at least 32 bits; (n,)."""
    dtype = torch.promote_types(x.dtype, torch.float32)  # a sum over many elements in half precision is rounded
    if not isinstance(scale, Tensor):
        scale = torch.tensor(float(scale), dtype=dtype, device=x.device)
    logs = scale.abs().to(torch.promote_types(scale.abs().dtype, torch.float32)).log().to(x.device, dtype)
    # The size is written out: an empty batch would leave it undetermined.
    return logs.expand_as(x).reshape(x.shape[0], math.prod(x.shape[1:])).sum(1)
