"""The options of a solve, by torchdiffeq's names and ours, read once; errors name the option that is wrong."""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import SchemeError
from ..language import closest
from .control import Control
from .functions import callable_as
from .trees import Packing

# Our names and torchdiffeq's, each with ours.
ADAPTIVE = {
    "first_step": "first_step",
    "min_step": "min_step",
    "max_step": "max_step",
    "max_steps": "max_steps",
    "max_num_steps": "max_steps",
    "safety": "safety",
    "smallest": "smallest",
    "dfactor": "smallest",
    "largest": "largest",
    "ifactor": "largest",
    "proportional": "proportional",
    "integral": "integral",
    "derivative": "derivative",
}
OTHERS = {"norm", "step_t", "jump_t", "outputs", "context", "dtype"}
FIXED = {"step_size", "steps", "grid", "grid_constructor", "interp", "perturb", "max_steps"}


@dataclass
class FixedOptions:
    """The options that place fixed steps."""

    step_size: float | None = None
    steps: int | None = None
    grid: Any = None
    constructor: Any = None
    interp: str | None = None
    perturb: bool = False
    max_steps: int | None = None


def is_fixed(options: Mapping[str, Any]) -> bool:
    """Whether the options ask for fixed steps."""
    return any(options.get(name) is not None for name in ("step_size", "steps", "grid", "grid_constructor"))


def _unknown(options: Mapping[str, Any], known: set[str], kind: str) -> None:
    for name in options:
        if name not in known:
            raise SchemeError(f"odeint: {kind} have no option {name!r}; {closest(str(name), known)}.")


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise SchemeError(f"odeint: the option {name} requires a gradient; a limit has none, detach it.")
        if value.numel() != 1:
            raise SchemeError(f"odeint: the option {name} is of shape {tuple(value.shape)}, want one number.")
        value = value.item()
    # ``True`` is a number to Python.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SchemeError(f"odeint: the option {name} is {value!r}, want a number.")
    return float(value)


def _whole(name: str, value: Any, more: str = "") -> int:
    number = _number(name, value)
    if not 1 <= number < float("inf") or number != int(number):
        raise SchemeError(f"odeint: {name} is {number:g}, want a whole number{more}, at least 1.")
    return int(number)


def row(name: str, value: Any, who: str = "odeint") -> Tensor:
    """Times as a tensor: a tensor of floating-point numbers as it is; numbers, and sequences of them, in double.

    Tensors in a sequence keep their gradients.
    """
    if not isinstance(value, Tensor):
        several = isinstance(value, (list, tuple)) and any(isinstance(x, Tensor) for x in value)
        try:
            if several:
                value = torch.stack([torch.as_tensor(x).to(torch.float64).reshape(()) for x in value])
            else:
                value = torch.as_tensor(value, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise SchemeError(f"{who}: {name} is {reprlib.repr(value)}, want numbers, or a tensor of them.") from None
    if value.is_meta:
        raise SchemeError(f"{who}: {name} is on the device meta and has no values.")
    if not value.is_floating_point():
        raise SchemeError(f"{who}: {name} is of {value.dtype}, want floating-point numbers.")
    return value


def _times(name: str, value: Any) -> list[float]:
    if value is None:
        return []
    if isinstance(value, Tensor) and not (value.is_complex() or value.dtype == torch.bool):
        value = value.to(torch.float64)  # whole numbers are times too
    found = row(name, value)
    if found.requires_grad:
        raise SchemeError(f"odeint: {name} requires a gradient, which is not known for it; detach it.")
    return found.reshape(-1).tolist()


def _stops(name: str, value: Any) -> list[float]:
    times = _times(name, value)
    if not all(map(math.isfinite, times)):
        raise SchemeError(f"odeint: {name} holds {times}, want finite times.")
    return times


def _flag(name: str, value: Any) -> bool:
    if value is not None and not isinstance(value, bool):
        raise SchemeError(f"odeint: the option {name} is {value!r}, want True or False.")
    return bool(value)


def control(options: Mapping[str, Any], rtol: Any, atol: Any, packing: Packing, y: Tensor) -> Control:
    """Tolerances, limits and the controller from the options of an adaptive solve."""
    _unknown(options, {*ADAPTIVE, *OTHERS}, "adaptive solves")
    found: dict[str, Any] = {}
    for name, ours in ADAPTIVE.items():
        # None means that an option is not given, as in torchdiffeq.
        if options.get(name) is not None:
            if ours in found:
                raise SchemeError(f"odeint: the option {ours} is given twice, as {name!r} too.")
            found[ours] = _number(name, options[name])
    if "max_steps" in found:
        found["max_steps"] = _whole("max_steps", found["max_steps"])
    steps, jumps = (_stops(name, options.get(name)) for name in ("step_t", "jump_t"))
    both = [*steps, *jumps]
    # The same stop twice would ask for a step of length 0.
    if len(set(both)) < len(both):
        raise SchemeError("odeint: step_t and jump_t repeat a time; name each once, in one of them.")
    if options.get("norm") is not None:
        callable_as("odeint: the option norm", options["norm"], "error")
    if options.get("dtype") not in (None, torch.float64):
        raise SchemeError(f"odeint: the option dtype is {options['dtype']!r}; times are kept in torch.float64 alone.")
    return Control(
        packing.tolerance("rtol", rtol, y),
        packing.tolerance("atol", atol, y),
        packing.norm(options.get("norm")),
        step_t=steps,
        jump_t=jumps,
        **found,
    )


def lands(options: Mapping[str, Any], pair: Any) -> bool:
    """Whether steps end on every time: as requested, else where the extension is less accurate than the steps."""
    given = options.get("outputs")
    if given not in (None, "step", "interpolate"):
        raise SchemeError(f"odeint: outputs is {given!r}, want 'step' or 'interpolate'.")
    if given is None:
        # Where the extension is as accurate as the error estimate, steps need not be cut short to land.
        return pair.dense[3] < pair.order
    return given == "step"


def fixed(options: Mapping[str, Any]) -> FixedOptions:
    """Reads the options that place fixed steps."""
    _unknown(options, FIXED, "fixed steps")
    given = [name for name in ("step_size", "steps", "grid", "grid_constructor") if options.get(name) is not None]
    if len(given) > 1:
        raise SchemeError(f"odeint: {' and '.join(given)} exclude each other; give one.")
    found = FixedOptions(perturb=_flag("perturb", options.get("perturb")), constructor=options.get("grid_constructor"))
    if found.constructor is not None:
        callable_as("odeint: the option grid_constructor", found.constructor, "func", "y0", "t")
    if options.get("step_size") is not None:
        found.step_size = abs(_number("step_size", options["step_size"]))
        if not 0 < found.step_size < float("inf"):
            raise SchemeError(f"odeint: step_size is {found.step_size:g}, want a positive number.")
    if options.get("steps") is not None:
        found.steps = _whole("steps", options["steps"], " of steps per interval")
    if options.get("grid") is not None:
        found.grid = options["grid"]
    found.interp = options.get("interp")
    if found.interp not in (None, "linear", "cubic"):
        raise SchemeError(f"odeint: interp is {found.interp!r}, want 'linear', 'cubic' or None.")
    if options.get("max_steps") is not None:
        found.max_steps = _whole("max_steps", options["max_steps"])
    return found


def grid_times(points: Any, start: float, end: float) -> list[float]:
    """A grid from the start to the end of a solve."""
    row = _times("the grid", points)
    if len(row) < 2:
        raise SchemeError(f"odeint: the grid has {len(row)} times, want the start and the end at least.")
    # Compared exactly: with a grid that ends a little early, the last value would be that of another time.
    if row[0] != start or row[-1] != end:
        raise SchemeError(f"odeint: the grid goes from {row[0]:g} to {row[-1]:g}, want from {start:g} to {end:g}.")
    sign = 1.0 if end > start else -1.0
    if not all((b - a) * sign > 0 for a, b in pairwise(row)):
        raise SchemeError("odeint: the grid must be strictly monotone, as t is.")
    return row
