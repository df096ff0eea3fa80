"""Laws of schemes: each function raises AssertionError, with the figures, where a scheme breaks its law."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import get
from ..scheme import Function, Scheme, State, solve

DTYPE = torch.float64


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def _close(got: Tensor, want: Tensor, tolerance: float, message: str) -> None:
    _require(got.shape == want.shape, f"{message}: shape {tuple(got.shape)}, want {tuple(want.shape)}")
    scale = max(1.0, float(want.abs().max()))
    error = float((got - want).abs().max()) / scale
    _require(error <= tolerance, f"{message}: off by {error:.1e} of {scale:.3g}, want at most {tolerance:.0e}")


def _field(t: float, y: Tensor) -> Tensor:
    return y * y * math.cos(t)


def observed_order(scheme: Scheme, most: int = 3000) -> float:
    """The slope of log error against log step size on y' = y^2 cos t, y = 1 / (c + sin 1/2 - sin t) on [1/2, 2].

    The error is the norm over sixteen values of c, so that it has no zero where one solution's error changes sign. The
    slope is fitted to the four finest grids, a factor sqrt(2) apart, whose error is well above rounding and which
    make at most ``most`` calls of residual functions.
    """
    c = torch.linspace(0.87, 1.07, 16, dtype=DTYPE)
    want = 1 / (c + math.sin(0.5) - math.sin(2.0))
    size = float(want.norm())
    tableau = scheme.tableau
    # Below this an error is rounding, of sums or of published decimals, and its slope means nothing.
    floor = max(1e-13, 0.0 if tableau is None else 30 * tableau.tolerance) * size
    points: list[tuple[float, float]] = []
    steps = 2.0
    while round(steps) * scheme.stages <= most:
        n = round(steps)
        error = float((solve(scheme, _field, 1 / c, t=(0.5, 2.0), steps=n) - want).norm())
        if error < floor:
            break
        if error < size:  # a large step may blow up
            points.append((math.log(n), math.log(error)))
        # Finer than by 2: a method of high order has few grids between a rough error and rounding.
        steps *= math.sqrt(2.0)
    # Only the finest ones, where the leading term of the error dominates.
    points = points[-4:]
    _require(len(points) == 4, f"{scheme}: only {len(points)} errors between rounding and 1; no slope to fit")
    x, y = (sum(p[i] for p in points) / 4 for i in (0, 1))
    return -sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def check_order(scheme: Scheme, order: int | None = None, *, most: int = 3000) -> None:
    """The error on a nonlinear, time-dependent equation falls with the declared power of the step size, in fp64.

    Args:
        scheme: a scheme with fixed steps, whose functions are given one stream.
        order: what the slope must round to; ``scheme.order`` unless given.
        most: calls of residual functions on the finest grid.

    Raises:
        AssertionError: the slope is more than a half away.

    Example:
        >>> import schemes
        >>> check_order(schemes.get("rk4"))
        >>> check_order(schemes.get("nested(midpoint, midpoint)"), order=1)
    """
    want = scheme.order if order is None else order
    _require(want is not None, f"{scheme} declares no order; say which: check_order(scheme, order=2)")
    slope = observed_order(scheme, most)
    _require(abs(slope - want) < 0.5, f"{scheme}: the error falls with order {slope:.2f}, want {want}")  # type: ignore[operator]


class _Smooth(nn.Module):
    """tanh(sum_j x_j W_j + t u): reads all its arguments and the time, and records them."""

    def __init__(self, widths: Sequence[int], out: int, generator: torch.Generator):
        super().__init__()
        self.weights = [torch.randn(w, out, dtype=DTYPE, generator=generator) / math.sqrt(w) for w in widths]
        self.drift = torch.randn(out, dtype=DTYPE, generator=generator)
        self.seen: list[tuple[float, tuple[Tensor, ...]]] = []

    def forward(self, *xs: Tensor, t: float = 0.0) -> Tensor:
        self.seen.append((float(t), xs))
        # A slot whose widths are not those that arrive is reported by the laws, not by a failing product.
        products = [x @ w for x, w in zip(xs, self.weights, strict=False) if x.shape[-1] == w.shape[0]]
        return torch.tanh(sum(products, float(t) * self.drift))


def residual_functions(
    scheme: Scheme, step: int = 0, widths: Sequence[int] = (3,), out_channels: int | None = None, seed: int = 0
) -> list[Function]:
    """Smooth random residual functions that fit the slots of a step: separate, time-dependent, in fp64.

    Args:
        scheme: the scheme.
        step: number of the step.
        widths: width of every stream before the step; streams are (n, width).
        out_channels: width after the step, where a shortcut changes it.
        seed: seed of the functions.
    """
    generator = torch.Generator().manual_seed(1000 * seed + step)
    slots = scheme.slots(step, tuple(widths), out_channels)
    return [_Smooth(s.in_channels, s.out_channels, generator) for s in slots]


def _input(channels: int, seed: int) -> Tensor:
    return torch.randn(2, channels, dtype=DTYPE, generator=torch.Generator().manual_seed(seed))


def check_formula(scheme: Scheme, *, h: float = 0.3, t: float = 0.7, seed: int = 0) -> None:
    """A step equals k_i = f_i(g(x) + H sum_j a_ij k_j, t + c_i H), g(x) + H sum_i b_i k_i, with H = span h.

    The f_i are all different; a stage whose row is zero is given x itself. Checked without and with a shortcut that
    changes the width; the times that the residual functions receive are checked too.

    Args:
        scheme: a scheme with a tableau.
        h: step size.
        t: time at the start.
        seed: seed of the residual functions and the input.

    Raises:
        AssertionError: a value differs by more than 1e-10 of its size.

    Example:
        >>> import schemes
        >>> check_formula(schemes.get("2*rk4 + nested(midpoint, euler)"))
    """
    tableau = scheme.tableau
    _require(tableau is not None, f"{scheme} has no tableau")
    a, b, c, _ = tableau.floats()  # type: ignore[union-attr]
    size = h * scheme.span
    for gs, out in (((), None), ((lambda x: torch.cat((x, x[:, :2] - x[:, 1:]), 1),), 5)):
        what = f"{scheme} {'with' if gs else 'without'} a shortcut"
        fs = residual_functions(scheme, 0, (3,), out, seed)
        x = _input(3, seed)
        y = gs[0](x) if gs else x
        ks: list[Tensor] = []
        for f, row, node in zip(fs, a, c, strict=True):
            argument = y + size * sum((w * k for w, k in zip(row, ks, strict=True)), torch.zeros_like(y))
            ks.append(f(argument if any(row) else x, t=t + node * size))
            f.seen.clear()  # type: ignore[attr-defined]
        want = y + size * sum(w * k for w, k in zip(b, ks, strict=True))
        (got,) = scheme.step(fs, (x,), gs=gs, t=t, h=h)
        _close(got, want, 1e-10, f"{what}: a step is not the formula of its tableau")
        for i, (f, node) in enumerate(zip(fs, c, strict=True)):
            for time, _ in f.seen:  # type: ignore[attr-defined]
                wanted = t + node * size
                _require(
                    abs(time - wanted) <= 1e-10,
                    f"{what}: function {i} is evaluated at time {time:.6g}, its node says {wanted:.6g}",
                )
            calls, least = len(f.seen), int(b[i] != 0)  # type: ignore[attr-defined]
            _require(least <= calls <= 1, f"{what}: function {i} is called {calls} times, want once")


def _start(scheme: Scheme, channels: int, seed: int) -> tuple[State, list[Function]]:
    """Streams made from an input, and the residual functions of step 0."""
    fs = residual_functions(scheme.at(0), 0, scheme.stream_widths(channels), seed=seed)
    return scheme.init(fs, _input(channels, seed)), fs


def check_round_trip(scheme: Scheme, *, steps: int = 3, channels: int = 4, h: float = 0.5, seed: int = 0) -> None:
    """``inverse(step(x)) = x`` over several steps with separate, time-dependent residual functions, fp64, 1e-9.

    Args:
        scheme: an invertible scheme.
        steps: number of steps forth and back.
        channels: width of the input.
        h: step size.
        seed: seed of the residual functions and the input.

    Raises:
        AssertionError: a stream comes back different, or in another shape, or there is none.
    """
    _require(scheme.invertible, f"{scheme} says that it is not invertible")
    state, fs = _start(scheme, channels, seed)
    first, made = state, [fs]
    for n in range(steps):
        if n:
            made.append(residual_functions(scheme.at(n), n, [x.shape[1] for x in state], seed=seed))
        state = scheme.at(n).step(made[n], state, t=n * h, h=h)
    # A scheme that does nothing would pass every round trip.
    moved = max(float((x - y).abs().max()) for x, y in zip(state, first, strict=False))
    _require(moved > 1e-6, f"{scheme}: {steps} steps change nothing, so that going back proves nothing")
    for n in reversed(range(steps)):
        state = scheme.at(n).inverse(made[n], state, t=n * h, h=h)
    _require(len(state) == len(first), f"{scheme}: {len(state)} streams come back of {len(first)}")
    for i, (x, y) in enumerate(zip(state, first, strict=True)):
        _close(x, y, 1e-9, f"{scheme}: inverse(step(x)) is not x, stream {i} after {steps} steps")


def check_slots(scheme: Scheme, *, steps: int = 2, channels: int = 4, seed: int = 0) -> None:
    """Residual functions are given what ``slots`` promises, and a step leaves the widths that ``widths`` promises.

    A scheme of one stream is also run with a shortcut from 4 to 6 channels on the first step, where ``raw`` slots must
    receive the step's input itself and the others what comes after the shortcut.

    Args:
        scheme: any fixed-step scheme whose streams differ in width only.
        steps: number of steps.
        channels: width of the input.
        seed: seed of the residual functions and the input.

    Raises:
        AssertionError: a number of arguments, a width, or the number of slots differs.
    """
    # A change of width distinguishes the input from what comes after the shortcut.
    changes = ((None, ()), (channels + 2, (lambda x: torch.cat((x, x[:, :2]), 1),)))
    for out, gs in changes if scheme.one_stream and scheme.shortcuts == 1 else changes[:1]:
        state, _ = _start(scheme, channels, seed)
        for n in range(steps):
            part = scheme.at(n)
            before = tuple(x.shape[1] for x in state)
            width = out if n == 0 else None
            slots = part.slots(n, before, width)
            _require(len(slots) == part.stages, f"{part}: {len(slots)} slots for {part.stages} residual functions")
            raw = tuple(slot.raw for slot in slots)
            _require(raw == part.raw, f"{part}: raw is {part.raw}, its slots say {raw}")
            fs = residual_functions(part, n, before, width, seed)
            entered, state = state, part.step(fs, state, gs=gs if n == 0 else ())
            for i, (f, slot) in enumerate(zip(fs, slots, strict=True)):
                where = f"{part}, step {n}, residual function {i}"
                wrong = f"{where}: its slot is Slot({slot.step}, {slot.index}, ...), want Slot({n}, {i}, ...)"
                _require((slot.step, slot.index) == (n, i), wrong)
                for _, xs in f.seen:  # type: ignore[attr-defined]
                    given = tuple(x.shape[1] for x in xs)
                    _require(given == slot.in_channels, f"{where}: given {given}, its slot says {slot.in_channels}")
                    if part.streams == 1 and part.mixing is not None:
                        # By identity: a stage with an empty row is given the same tensor.
                        sees = xs[0] is entered[0]
                        _require(sees == slot.raw, f"{where}: sees the input itself: {sees}; slot.raw is {slot.raw}")
            after = tuple(x.shape[1] for x in state)
            want = part.widths(n, before, width)
            _require(after == want, f"{part}, step {n}: leaves streams of widths {after}, says {want}")


def check_expression(text: str) -> None:
    """``str(get(text))`` is read back as an equal scheme: same name, stages, times and coefficients.

    Args:
        text: an expression of the language of schemes.

    Raises:
        AssertionError: the two differ.

    Example:
        >>> check_expression("2*(rk4 + midpoint) + rkc2(s=5)")
    """
    scheme = get(text)
    # As a checkpoint or a saved configuration does with a scheme.
    again = get(str(scheme))
    message = f"{text!r} prints as {str(scheme)!r}, which is read as another scheme"
    _require(again == scheme and hash(again) == hash(scheme) and str(again) == str(scheme), message)
    for name in ("stages", "span", "order", "nodes", "raw", "streams", "invertible", "evaluations", "mixing"):
        one, other = getattr(scheme, name), getattr(again, name)
        _require(one == other, f"{message}: {name} was {one}, is {other}")
    _compare_settings(scheme, again, message)
    # Exact coefficients of larger compositions take seconds, and the text has been compared already.
    if scheme.stages <= 32:
        one, other = scheme.tableau, again.tableau
        same = one is other or (one is not None and other is not None and (one.a, one.b) == (other.a, other.b))
        _require(same, f"{message}: other coefficients")


def _compare_settings(scheme: Scheme, again: Scheme, message: str) -> None:
    """Compares all numbers and words that two schemes keep, and those of the schemes that they are made of."""
    for name, one in vars(scheme).items():
        if isinstance(one, (bool, int, float, str)):
            other = getattr(again, name)
            _require(one == other, f"{message}: {name} was {one}, is {other}")
    for one, other in zip(scheme._parts_compared(), again._parts_compared(), strict=True):
        _compare_settings(one, other, message)


def check_stack(
    make: Callable[[str], nn.Module], x: Tensor, *, mode: str = "checkpoint", tolerance: float = 0.0
) -> None:
    """A network trains: state-dict round trip, a gradient for every parameter, and ``mode`` does what "store" does.

    Outputs, gradients, buffers and the generator after a forward and a backward pass in training mode must be equal
    between the two modes: to the last bit, or within a tolerance (for "reverse") relative to their norm. For gradients
    it is the norm of all of them together, since some are zero but for rounding, such as that of a bias before
    BatchNorm. Counters and the generator must be equal to the last bit in any case.

    Args:
        make: builds the network for a mode of backprop, such as ``lambda mode: Stack(blocks(), "rk4", backprop=mode)``.
        x: an input.
        mode: the mode that is compared with "store".
        tolerance: relative difference that is allowed, in the Euclidean norm.

    Raises:
        AssertionError: one of these fails; the message names the parameter or buffer.
    """
    net, other = make("store"), make(mode)
    found = other.load_state_dict(net.state_dict())
    _require(not found.missing_keys and not found.unexpected_keys, f"state dicts of store and {mode} differ: {found}")
    results = []
    for m in (net, other):
        m.train()
        # Both modes draw the same dropout, and must leave the generator in the same state.
        torch.manual_seed(0)
        leaf = x.detach().clone().requires_grad_()
        y = m(leaf)
        y.square().mean().backward()
        for name, p in m.named_parameters():
            _require(p.grad is not None, f"parameter {name} gets no gradient")
            _require(bool(torch.isfinite(p.grad).all()), f"parameter {name} gets a gradient that is not finite")  # type: ignore[arg-type]
        grads = {name: p.grad for name, p in m.named_parameters()}
        made = {"the output": y, "the gradient of the input": leaf.grad, "the generator": torch.get_rng_state()}
        results.append({**made, **{f"gradient of {k}": v for k, v in grads.items()}, **dict(m.named_buffers())})
    want, have = results
    total = math.hypot(*(float(v.norm()) for k, v in want.items() if "gradient" in k and v is not None))
    for key, value in want.items():
        got: Any = have[key]
        same = torch.equal(got, value)  # type: ignore[arg-type]
        if not same and tolerance and value.is_floating_point():  # type: ignore[union-attr]
            scale = total if "gradient" in key else float(value.norm())  # type: ignore[union-attr]
            same = float((got - value).norm()) <= tolerance * scale
        _require(same, f"{mode}: {key} differs from store")
    fresh = make("store")
    fresh.load_state_dict(net.state_dict())
    net.eval()
    fresh.eval()
    with torch.no_grad():
        _require(torch.equal(net(x), fresh(x)), "a network loaded from the state dict gives other values")
