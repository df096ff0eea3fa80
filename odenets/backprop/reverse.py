"""Passes whose states are reconstructed by the inverse: in ordinary floating point, or exactly on a grid.

They run outside torch's compiler, which must not take their autograd nodes apart. The decorator for that loads the
compiler, which takes as long as torch itself, so this module is imported only when a stack needs such a pass.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from schemes.errors import SchemeError
from schemes.scheme import State

from .anchors import BOUNDS, asked_for, measure
from .grid import Grid
from .limits import in_our_words
from .monitor import PendingScalar
from .replay import stream_precision
from .surroundings import python_generators, same_python
from .tape import Tape
from .walk import Pass


@torch.compiler.disable
@in_our_words
def run_reversed(
    given: Pass,
    state: State,
    every: int | None,
    memory: float | None,
    bound: float | None,
    drift: bool,
    check_finite: bool,
) -> State:
    """The state after the last step; see ``modes.Reverse`` for the options."""
    # What cannot be undone is refused before the first function runs, while nothing has changed.
    state = _start(given, state, "reverse")
    bound = float(bound or BOUNDS.get(state[0].dtype, 1e-5))
    tape = Tape(_anchors(given, state, every, memory, bound), drift, None, given)
    if check_finite:
        seen = given.on_step

        def on_step(n: int, state: State) -> None:
            _check_finite(given, n, state)
            if seen is not None:
                seen(n, state)

        given = given._replace(on_step=on_step)
    state = _walk(given, state, tape)
    tape.close(state)
    # Set after the walk, so that a pass that raised reports nothing.
    tape.report = given.monitor.pending if drift else None
    return state


@torch.compiler.disable
@in_our_words
def run_exact(given: Pass, state: State, bits: int | None, store: bool) -> State:
    """The state after the last step; see ``modes.Exact`` for the options."""
    state, monitor = _start(given, state, "exact"), given.monitor
    _refuse_compiled(given)
    monitor.read(None, len(given.steps))
    grid = Grid(bits, state[0].dtype)
    # The first state is kept to be compared bit by bit, which reveals a function that is not deterministic.
    tape = Tape(1 if store else None, True, grid, given)
    state = _walk(given, tuple(grid.round(x) for x in state), tape)
    tape.close(state)
    tape.report = monitor.pending
    monitor.overflow.append(PendingScalar.of(tape.over(state)))
    if not state[0].is_cuda:  # on CUDA the flag is read at the next pass, without waiting for it
        monitor.read(None, len(given.steps))
    return state


def _start(given: Pass, state: State, mode: str) -> State:
    if torch._C._are_functorch_transforms_active():
        raise SchemeError(f"Stack: torch.func transforms cannot pass backprop='{mode}'; use backprop='store'.")
    # Tests for an open level, not for dual streams: parameters and captured tensors may be dual numbers, too.
    if forward_ad._current_level >= 0:
        raise SchemeError(f"Stack: forward-mode differentiation cannot pass backprop='{mode}'; use backprop='store'.")
    # The cache would be filled in a forward pass without a graph, and its weights would have no gradient.
    if parametrize._cache_enabled and any("parametrizations" in m._modules for m in _modules(given)):
        raise SchemeError(
            f"Stack: parametrize.cached() keeps weights without their graph in backprop='{mode}', which runs each step "
            "twice.\n  Call the stack outside of that context, or use backprop='store'."
        )
    for x in state:
        # The reconstruction is a sum of dense floating-point tensors.
        if not (x.is_floating_point() or x.is_complex()) or x.layout is not torch.strided:
            kind = str(x.dtype if x.layout is torch.strided else x.layout).removeprefix("torch.")
            raise SchemeError(
                f"Stack: a stream of {kind} is not made again as it was by an inverse, which backprop='{mode}' needs.\n"
                "  Give a dense tensor of floating-point numbers, or use backprop='store' or 'checkpoint'."
            )
    for step in given.steps:
        if step.gs is not None:
            step.check_undone()
    # Cloned, since an inference tensor cannot be made a leaf, which the replay of a step differentiates from.
    return stream_precision(tuple(x.clone() if x.is_inference() else x for x in state))


def _walk(given: Pass, state: State, tape: Tape) -> State:
    """The state after the last step.

    Raises:
        SchemeError: a function began to draw from a generator of Python or NumPy, whose states were not recorded.
    """
    members = given.monitor.members.values()
    # These states are large and slow to read, so they are recorded per update only where functions were seen to draw.
    quiet = bool(members) and all(m.draws.get(m.modules[0].training, True) is False for m in members)
    before = python_generators() if quiet else None
    state = given.walk(state, tape.run)
    if before is not None and not same_python(before, python_generators()):
        for m in members:
            m.draws.clear()
        raise SchemeError(
            f"Stack: Python's or NumPy's generator moved during a pass under backprop='{tape.mode}' whose residual "
            "functions had not drawn from it before.\n"
            "  Call the stack again: from now on their draws are noted, as those from torch's generator always are."
        )
    return state


def _modules(given: Pass) -> Iterator[nn.Module]:
    for root in (*given.steps, *(() if given.shared is None else (given.shared,))):
        yield from root.modules()


def _anchors(given: Pass, state: State, every: int | None, memory: float | None, bound: float) -> int | None:
    """The spacing of anchors, given or chosen."""
    # A spacing that the user asked for is not adapted to the observed drift.
    auto = every is None and memory is None
    if not any(x.numel() for x in state):  # an empty batch has no size, and its errors decide nothing
        return every or None
    given.monitor.read(bound if auto else None, len(given.steps))
    # Computed from this batch, so a larger batch has its anchors further apart.
    if memory is not None:
        # Rounded up to whole steps, so that the anchors do not take more memory than was given.
        size = sum(x.numel() * x.element_size() for x in state) / 2**20
        return max(1, -(-len(given.steps) // max(1, int(float(memory) / size))))
    if not auto:
        # A user writes 0 for "no anchors".
        return every or None
    monitor = given.monitor
    # Another bound, or a plan with other segments, asks for another spacing.
    known = lambda: monitor.growth is not None and monitor.asked in (None, asked_for(given, bound))  # noqa: E731
    if not known():
        # Under the lock: a pass of another thread must not see the statistics that measuring changes and restores.
        with monitor.lock:
            if not known():
                measure(given, state, bound)
    return monitor.every


def _check_finite(given: Pass, n: int, state: State) -> None:
    for i, x in enumerate(state):
        if not torch.isfinite(x).all():
            raise SchemeError(
                f"{given.steps[n - given.first].scheme}, step {n}: stream {i} is not finite after this step.\n"
                "  stack.diagnose(x) shows how the states of each step behave; a smaller step size may help."
            )


def _refuse_compiled(given: Pass) -> None:
    shared = () if given.shared is None else [("block", given.shared)]
    for root, top in (*((f"steps.{step.index}", step) for step in given.steps), *shared):
        for name, m in top.named_modules(prefix=root):
            if m._compiled_call_impl is not None or type(m).__name__ == "OptimizedModule":
                raise SchemeError(
                    f"Stack: {name} is compiled, and compiled code rounds differently with and "
                    "without gradients; backprop='exact' needs it eager, or use backprop='reverse'."
                )
