"""All invertible schemes, and small networks of them, for the tests of the engine."""

import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import Tensor, nn

import schemes
from odenets import Stack
from odenets.layers.scale import ChannelScale
from schemes.bdia import Bidirectional
from schemes.scheme import Scheme, Slot

CHANNELS = 6

SCHEMES: dict[str, str | Scheme] = {
    name: name
    for name in (
        "revnet",
        "additive(3)",
        "affine(bound=0.3)",
        "multilevel(3, 0.9)",
        "revcol",
        "revcol(3, huge=true)",
        "leapfrog",
        "momentum(0.9)",
        "lm_resnet(-1/2)",
        "alf",
        "alf(0.9)",
        "reversible_heun",
        "reversible(rk4, coupling=0.95)",
        "dense(2)",
        "nested(revnet, midpoint)",
        "repeat(revnet, 2)",
    )
}
SCHEMES["revcol, learned"] = "revcol"
SCHEMES["momentum, learned"] = "momentum(0.9)"
SCHEMES["bidirectional"] = Bidirectional(0.75)

EACH = pytest.mark.parametrize("name", SCHEMES)
FEW = pytest.mark.parametrize("name", ["revnet", "momentum(0.9)", "reversible_heun", "revcol", "dense(2)"])
EXACT = 1e-12  # relative, double precision, a few steps


class Notes:
    """What a test is told of calls; kept beside the modules, whose attributes a second run leaves as they were."""

    def __init__(self) -> None:
        self.calls = 0
        self.dtypes: list[torch.dtype] = []


_NOTES: WeakKeyDictionary[nn.Module, Notes] = WeakKeyDictionary()


class Function(nn.Module):
    """size * V act(W [arguments]), with what else a test asks for; notes its calls."""

    def __init__(self, slot: Slot, *, size: float = 0.3, norm: bool = False, dropout: float = 0.0, hidden: int = 8):
        super().__init__()
        self.inner = nn.Linear(sum(slot.in_channels), hidden)
        self.norm = nn.BatchNorm1d(hidden) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(hidden, slot.out_channels)
        self.size = size

    @property
    def noted(self) -> Notes:
        """The notes of this module."""
        return _NOTES.setdefault(self, Notes())

    def forward(self, *args: Tensor) -> Tensor:
        self.noted.calls += 1
        x = self.inner(torch.cat(args, 1))
        self.noted.dtypes.append(x.dtype)
        return self.size * self.outer(self.dropout(torch.tanh(self.norm(x))))


class Timed(Function):
    """The same with a time and a context."""

    def forward(self, *args: Tensor, t: Any, context: Any) -> Tensor:  # type: ignore[override]
        return super().forward(*args) * (1 + 0.5 * torch.as_tensor(t).sin()) + 0.1 * context.mean()


def build(
    name: str,
    depth: int = 4,
    *,
    backprop: Any = "reverse",
    make: Callable[..., nn.Module] = Function,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    step: Any = 1.0,
    **options: Any,
) -> Stack:
    """A stack of that scheme; the same weights for the same seed."""
    torch.manual_seed(seed)
    scheme = schemes.get(SCHEMES[name])
    stack = Stack.from_factory(
        lambda slot: make(slot, **options),
        scheme,
        depth,
        channels=CHANNELS,
        backprop=backprop,
        step=step,
        shortcut=shortcuts(name, depth),
    )
    return stack.to(dtype)


def shortcuts(name: str, depth: int) -> Any:
    """One list per step, for the schemes whose scales are learned here."""
    if name == "revcol, learned":
        widths = [CHANNELS * 2**level for level in range(4)]
        return [[]] + [[ChannelScale(w, 0.7, ndim=2) for w in widths] for _ in range(depth - 1)]
    if name == "momentum, learned":
        return [[ChannelScale(CHANNELS, 0.8, ndim=2)] for _ in range(depth)]
    return None


def batch(n: int = 5, dtype: torch.dtype = torch.float64, grad: bool = True, seed: int = 1) -> Tensor:
    """An input."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, CHANNELS, dtype=torch.float64, generator=generator).to(dtype).requires_grad_(grad)


def gradients(stack: nn.Module, x: Tensor, loss: Callable[[Any], Tensor] = lambda y: y.square().mean(), **kwargs: Any):
    """Gradients by name, of the parameters and of the input."""
    stack.zero_grad()
    x.grad = None
    loss(stack(x, **kwargs)).backward()
    found = {name: p.grad for name, p in stack.named_parameters()}
    return {**found, "input": x.grad} if x.requires_grad else found


def distance(a: dict[str, Tensor | None], b: dict[str, Tensor | None]) -> float:
    """Relative distance in the global norm; the same gradients must be missing."""
    assert a.keys() == b.keys()
    assert {k for k, g in a.items() if g is None} == {k for k, g in b.items() if g is None}
    pairs = [(g.double(), b[k].double()) for k, g in a.items() if g is not None]  # type: ignore[union-attr]
    assert pairs
    error = sum(float((g - w).square().sum()) for g, w in pairs)
    return (error / sum(float(w.square().sum()) for _, w in pairs)) ** 0.5


def both(name: str, depth: int = 4, **options: Any) -> tuple[Stack, Stack]:
    """The same stack, reversed and stored."""
    return build(name, depth, **options), build(name, depth, **{**options, "backprop": "store"})


def deep(name: str, depth: int = 64) -> dict[str, Any]:
    # Concatenation grows by a stream each step, so that a deep one costs the square.
    return {"depth": 16 if name.startswith("dense") else depth, "step": 1 / 8}


def peak(stack: Stack, x: Tensor) -> int:
    """Largest number of bytes that a training step holds above what was there before, gradients preallocated."""
    from torch.profiler import ProfilerActivity, profile

    for p in stack.parameters():
        p.grad = torch.zeros_like(p)
    x.grad = torch.zeros_like(x)
    stack(x).square().mean().backward()
    with warnings.catch_warnings():
        # torch 2.11 says once that a profiler forgets an earlier cycle, before there is one.
        warnings.filterwarnings("ignore", "Warning: Profiler clears events")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=False) as prof:
            stack(x).square().mean().backward()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    total = most = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        total += e.nbytes()
        most = max(most, total)
    return most
