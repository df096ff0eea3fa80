"""Exact arithmetic on a binary grid: a coupling's inverse recovers every bit.

Streams and the shifts that are added to them are rounded to multiples of 2^-bits, with straight-through gradients. Sums
and differences of such numbers are exact while they stay below a limit, so an update with scale 1 or -1 loses nothing.
An update with another scale a maps the integer n of an element to floor(|a| n), and keeps beside it which of the at
most ceil(1/|a|) integers with that floor n was: 1 bit per element for a = 1/2, none for |a| >= 1. No inverse can do
with less.

Prior art: Zhang et al. 2024 (BDIA), arXiv 2407.09093, for transformers and a = 1/2; MacKay et al. 2018, Reversible
recurrent neural networks, arXiv 1810.10999, for fixed-point numbers.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from schemes.coupling import Update, shortcut_of
from schemes.errors import SchemeError
from schemes.scheme import Function, State

SMALLEST = 2.0**-31  # scale: the places of integers with equal products are counted in 32 bits
DEFAULT_BITS = {torch.float32: 14, torch.float64: 40}


def _digits(dtype: torch.dtype) -> int:
    """The length of the significand, which must hold the integer part and the binary places together."""
    return 1 - round(math.log2(torch.finfo(dtype).eps))


def most_bits(dtype: torch.dtype) -> int:
    """The largest number of binary places of a grid; it leaves at least two digits for the integer part."""
    return _digits(dtype) - 3


class Spilled(NamedTuple):
    """The bits that an update did not keep: for each element a number of ``width`` bits, as packed planes."""

    planes: list[Tensor]
    shape: torch.Size


class _Straight(torch.autograd.Function):
    """``value`` in the forward pass; the gradient goes to ``surrogate`` in the backward pass."""

    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, value: Tensor) -> Tensor:
        ctx.dtype = surrogate.dtype
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        # Rounding has derivative 0 almost everywhere; the straight-through gradient is that of the unrounded sum.
        return grad.to(ctx.dtype), None


class Grid:
    """The multiples of 2^-bits in one floating-point format.

    Args:
        bits: binary places.
        dtype: dtype of the streams; single or double precision.

    Raises:
        SchemeError: half precision, or more places than the format has.
    """

    def __init__(self, bits: int | None, dtype: torch.dtype):
        if dtype not in DEFAULT_BITS:
            raise SchemeError(f"exact arithmetic needs streams in float32 or float64, not {str(dtype)[6:]}.")
        self.bits = DEFAULT_BITS[dtype] if bits is None else bits
        most = most_bits(dtype)
        if not 0 < self.bits <= most:
            raise SchemeError(f"exact arithmetic: {self.bits} binary places, want 1 to {most} in this format.")
        digits = _digits(dtype)
        self.unit, self.per_unit = 2.0**-self.bits, 2.0**self.bits
        # A sum of two multiples below this bound is exact.
        self.limit = 2.0 ** (digits - 1 - self.bits)

    def round(self, x: Tensor) -> Tensor:
        """x rounded to the grid, ties to even; straight through."""
        # Adding and subtracting 1.5 limit would save a pass over memory, but between -limit and -limit / 2 that sum has
        # a digit below the unit, and the result is off the grid.
        value = torch.mul(x.detach(), self.per_unit).round_().mul_(self.unit)
        return _Straight.apply(x, value) if x.requires_grad else value  # type: ignore[return-value]

    def over(self, x: Tensor) -> Tensor:
        """Whether x leaves the range in which sums are exact, or is not finite; a flag on its device."""
        if not x.numel():
            return torch.zeros((), dtype=torch.bool, device=x.device)
        # NaN passes through ``aminmax``; the negated comparison counts it as out of range.
        low, high = torch.aminmax(x.detach())
        return ~((low > -self.limit) & (high < self.limit))

    def apply(self, update: Update, state: State, gs: Sequence[Function], spills: list[Spilled | None]) -> State:
        """The state after an elementary update on the grid; appends the bits that it did not keep to ``spills``."""
        d = update.dst
        scale, shift, *byproducts = update.terms(state)
        if shift.is_complex():
            raise SchemeError(
                "exact arithmetic needs real streams, and a residual function returned a complex tensor.\n"
                "  Use backprop='checkpoint', or 'reverse' with a complex input."
            )
        if update.appends:
            # Nothing is overwritten, so nothing can be lost.
            spills.append(None)
            return (*state, self.round(shift.to(state[0].dtype)))
        x, g = state[d], shortcut_of(update, gs)
        # Both terms must be on the grid, or their sum would be rounded.
        shift = self.round(shift.to(x.dtype))
        if g is None and isinstance(scale, (int, float)) and abs(scale) == 1:
            spills.append(None)
            new = x + shift if scale == 1 else shift - x
        else:
            factor = _factor(update, scale, g, x)
            kept, spill = self._shrink(x.detach(), factor)
            spills.append(spill)
            if torch.is_grad_enabled():
                # The gradient is that of the unrounded product; only the value is rounded.
                kept = _Straight.apply(g(x) if g is not None else x * scale, kept)
            new = kept + shift
        out = list(state)
        out[d] = new
        if update.byproduct is not None:
            out[update.byproduct] = byproducts[0]
        return tuple(out)

    def invert(self, update: Update, state: State, gs: Sequence[Function], spills: list[Spilled | None]) -> State:
        """The state before an elementary update on the grid; pops the bits that it did not keep from ``spills``."""
        d, spill = update.dst, spills.pop()
        if update.appends:
            return state[:d]
        scale, shift, *_ = update.terms(state)
        x = self.before(update, scale, shift, state[d], shortcut_of(update, gs), spill)
        return (*state[:d], x, *state[d + 1 :])

    def before(self, update: Update, scale: Any, shift: Tensor, y: Tensor, g: Any, spill: Spilled | None) -> Tensor:
        """The stream before an update, from the stream after it, the update's terms and the spilled bits."""
        # Both are on the grid, so the difference is exact; rounding the shift again gives the same bits as before.
        rest = y - self.round(shift.detach().to(y.dtype))
        if g is None and isinstance(scale, (int, float)) and abs(scale) == 1:
            return rest if scale == 1 else -rest
        return self._grow(rest, _factor(update, scale, g, y), spill)

    def _shrink(self, x: Tensor, factor: Tensor) -> tuple[Tensor, Spilled | None]:
        """sign(a) floor(|a| n) for the integers n of x, and the place of n among the integers with that floor."""
        a = factor.detach()
        low, high = _range_of(a)
        width = _width(low)
        if _is_power_of_two(low, high):
            n = x * self.per_unit
            m = torch.floor(n * low)
            # m / low is exact here, and the smallest integer with this floor where low <= 1.
            spill = Spilled(_planes(n - m / low, width), x.shape) if width else None
            return (m * self.unit) * a.to(x.dtype).sign(), spill
        # A product with a factor that is not a power of two has more digits than single precision can hold.
        n, a = x.double() * self.per_unit, a.double()
        size = a.abs()
        m = torch.floor(size * n)
        spill = Spilled(_planes(n - _first(m, size), width), x.shape) if width else None
        return (torch.sign(a) * m * self.unit).to(x.dtype), spill

    def _grow(self, x: Tensor, factor: Tensor, spill: Spilled | None) -> Tensor:
        """The inverse of ``_shrink``."""
        a = factor.detach()
        low, high = _range_of(a)
        if _is_power_of_two(low, high):
            n = (x * a.to(x.dtype).sign()) * (self.per_unit / low)
            return (n if spill is None else n + _from_planes(spill, x.dtype)) * self.unit
        a = a.double()
        n = _first(torch.sign(a) * x.double() * self.per_unit, a.abs())
        if spill is not None:
            n = n + _from_planes(spill, n.dtype)
        return (n * self.unit).to(x.dtype)


def _factor(update: Update, scale: Any, g: Any, x: Tensor) -> Tensor:
    """The scale of an update as a tensor that broadcasts over the stream."""
    if g is not None:
        found = getattr(g, "scale", None)
        if not isinstance(found, Tensor):
            raise SchemeError(f"exact arithmetic cannot undo the shortcut {g._get_name()}; it has no scale.")
        return found
    if isinstance(scale, Tensor):
        return scale
    return torch.tensor(float(scale), dtype=torch.float64, device=x.device)


def _range_of(factor: Tensor) -> tuple[float, float]:
    """The smallest and largest absolute value of a factor; 1 for an empty one (one per sample of an empty batch)."""
    if not factor.numel():
        return 1.0, 1.0
    # This waits for the device: the number of spilled bits must be known on the host.
    low, high = torch.stack(torch.aminmax(factor.abs())).tolist()
    return low, high


def _is_power_of_two(low: float, high: float) -> bool:
    """Whether all factors are the same power of two, so that products are exact without double precision."""
    # Places of integers among those with equal products, below 1 / low, must be exact in single precision too.
    return low == high and math.frexp(low)[0] == 0.5 and low >= 2.0**-20


def _width(low: float) -> int:
    """Bits for the place of an integer among those with equal floor(size * n), of which there are <= ceil(1 / size)."""
    if not low >= SMALLEST:
        raise SchemeError(
            f"exact arithmetic: a stream is scaled by {low:g}, which leaves more than 31 bits of each element beside.\n"
            f"  Scales are at least {SMALLEST:.1e} in size; use a larger one, or backprop='checkpoint'."
        )
    return (math.ceil(1 / low) - 1).bit_length()


def _first(m: Tensor, size: Tensor) -> Tensor:
    """The smallest integer n with floor(size * n) >= m."""
    # The quotient may be rounded the wrong way and n then be off by one, so both neighbours are checked.
    n = torch.ceil(m / size)
    n = torch.where(size * (n - 1) >= m, n - 1, n)
    return torch.where(size * n < m, n + 1, n)


def _planes(place: Tensor, width: int) -> list[Tensor]:
    """Packs numbers of ``width`` bits into ``width`` tensors of bytes, eight elements to a byte."""
    # Bytes instead of bools, which would take eight times the memory that the scheme promises.
    flat = torch.nn.functional.pad(place.reshape(-1), (0, -place.numel() % 8)).view(-1, 8)
    # A product with powers of two packs eight elements at once; sums below 256 are exact in float32.
    weights = torch.exp2(torch.arange(8, device=place.device, dtype=torch.float32))
    whole = flat if width == 1 else flat.to(torch.int32)
    return [((whole if width == 1 else whole >> i & 1).float() @ weights).to(torch.uint8) for i in range(width)]


def _from_planes(spill: Spilled, dtype: torch.dtype) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=spill.planes[0].device)
    count = spill.shape.numel()
    total: Any = 0.0
    for i, plane in enumerate(spill.planes):
        bits = (plane[:, None] >> shifts & 1).view(-1)[:count].view(spill.shape)
        total = total + bits.to(dtype) * 2.0**i
    return total
