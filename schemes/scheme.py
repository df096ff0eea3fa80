"""The central abstraction: a scheme sends streams to the next streams, and owns no weights.

Three instances explain the decomposition:

* ``rk4`` has one stream and four residual functions a step; its ``_step`` evaluates each at a sum of earlier values.
* ``revnet`` has two streams and two residual functions; its ``_step`` updates the streams in turn, and its ``_inverse``
  undoes the updates.
* ``dense`` has one residual function and a tuple of streams that grows by one each step.

Time is data, not code: ``nodes`` says at which time ``t + nodes[i] * h`` residual function i is evaluated, so the
algebra in ``_step`` never handles time, and a residual function that takes no time costs nothing extra.
"""

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .deprecation import adopt
from .errors import SchemeError
from .tableau import Tableau

State = tuple[Tensor, ...]
Function = Callable[..., Tensor]
StepSize = float | Tensor

MAX_FUNCTIONS = 4096


def limit_functions(name: str, count: int) -> None:
    """Refuses a step of more than 4,096 residual functions, before anything of that size is built.

    Raises:
        SchemeError: the count is larger.
    """
    if count > MAX_FUNCTIONS:
        raise SchemeError(
            f"{name}: {count} residual functions a step; at most {MAX_FUNCTIONS}.\n"
            "  The steps of a Stack have no limit: write a smaller scheme and make more steps of it."
        )


@dataclass(frozen=True)
class Slot:
    """The widths that one residual function is given and must return.

    Attributes:
        step: number of the step, from 0.
        index: number of the residual function in its step, from 0.
        in_channels: width of each argument, in order.
        out_channels: width of the result, at the resolution of the stream that it updates.
        raw: whether it receives the step's input itself, before the shortcut (it must then apply the stride and change
            the width).
    """

    step: int
    index: int
    in_channels: tuple[int, ...]
    out_channels: int
    raw: bool = False


class Scheme(ABC):
    """A rule that sends a tuple of streams, some residual functions and some shortcuts to the next streams.

    A subclass sets the attributes and writes ``_step``; an invertible one writes ``_inverse`` too.

    Attributes:
        stages: residual functions that one step consumes.
        order: order of accuracy for one vector field; None where no order holds.
        nodes: residual function i is evaluated at time ``t + nodes[i] * h``; None lets it be evaluated at any time
            in between (adaptive solvers). Where a step evaluates its functions several times over, there is one time
            per evaluation, and evaluation j calls function ``j % stages``.
        span: a step moves time on by ``span * h``.
        mixing: max_i sum_j |a_ij|, how far a stage's input strays from the step's, in units of the residual functions;
            None where this is not a Runge-Kutta method.
        gain: sum_i |b_i| over a step, likewise.
        streams: number of streams that ``init`` makes.
        invertible: whether ``_inverse`` undoes ``_step``.
        shortcuts: number of shortcuts that a step may be given, all or none.
        evaluations: calls of residual functions per step; None where it is known only at run time.
        training_differs: whether ``training_scheme`` returns a different scheme (bdia).
        streams_added: number of streams that a step appends.
        byproducts: the streams, numbered as after a step, that its inverse does not restore.
        amplification: the factor by which a step's inverse grows an error of the streams, in the long run and without
            residual functions: the spectral radius of the inverse's linear part. 1 where reconstruction does not
            amplify. Learned shortcuts change it; their effect must be measured.
        exact: whether the inverse can be made bit-exact on a grid; False where the scale of an update is computed from
            the streams.
        examples: expressions of the language that parse to members of this class, the usual one first. The laws of
            ``schemes.testing``, the strategies and the tables of the documentation iterate over them.
    """

    examples: ClassVar[tuple[str, ...]] = ()

    stages: int
    order: int | None = None
    nodes: tuple[float, ...] | None = ()
    span: int = 1
    mixing: float | None = None
    gain: float | None = None
    streams: int = 1
    shortcuts: int = 1
    invertible: bool = False
    evaluations: int | None = None
    training_differs: bool = False
    streams_added: int = 0
    byproducts: tuple[int, ...] = ()
    amplification: float = 1.0
    exact: bool = False

    _RENAMED: ClassVar[dict[str, str]] = {
        "advance": "_step",
        "retreat": "_inverse",
        "elementary": "decompose",
        "enter": "state_from_output",
        "origin": "input_from_state",
        "in_training": "training_scheme",
        "trains_by_inverse": "reversible_in_training",
        "turn": "rotate",
        "made": "streams_added",
        "emitted": "byproducts",
    }

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A user's subclass may still define the old names; the engine calls the new ones.
        adopt(cls, cls._RENAMED)

    @abstractmethod
    def _step(self, fs: Sequence[Function], state: State, h: StepSize = 1.0, gs: Sequence[Function] = ()) -> State:
        """One step: the algebra alone. ``gs`` are shortcuts, one per stream, or empty."""

    def _inverse(self, fs: Sequence[Function], state: State, h: StepSize = 1.0, gs: Sequence[Function] = ()) -> State:
        """The state from which ``_step`` computed ``state``."""
        raise SchemeError(f"{self} has no inverse; choose an invertible scheme such as revnet.")

    @property
    def reversible_in_training(self) -> bool:
        """Whether ``training_scheme`` is invertible, so that training can rebuild states instead of storing them."""
        return self.invertible

    def training_scheme(self, n: int, x: Tensor, generator: torch.Generator | None = None) -> "Scheme":
        """Returns the scheme that replaces this one in step n of a training pass; x is one of its streams.

        This is the scheme itself, unless training and inference differ (bdia). A Stack calls it on the scheme of its
        step, ``at(n).training_scheme(n, x)``, and passes a generator where it was given a seed.

        Args:
            n: number of the step.
            x: a stream, for its shape, dtype and device.
            generator: source of random numbers; None is torch's default generator.
        """
        return self

    @property
    def one_stream(self) -> bool:
        """Whether every step sends one stream to one stream, in training too: it can then act as a function."""
        return self.streams == 1 and not self.training_differs and not any(self.whole(n).streams_added for n in (0, 1))

    @property
    def unused(self) -> tuple[int, ...]:
        """Residual functions that do not reach the output of a step, and so get no gradient from it."""
        return ()

    def decompose(
        self, fs: Sequence[Function], h: StepSize, gs: Sequence[Function] = ()
    ) -> "list[tuple[Scheme, Sequence[Function], StepSize, Sequence[Function]]]":
        """The schemes that make up one step, in order, each with its functions, step size and shortcuts.

        Args:
            fs: the residual functions, ``stages`` of them.
            h: step size.
            gs: shortcuts, one per stream, or none.
        """
        return [(self, fs, h, gs)]

    def state_from_output(self, y: Tensor) -> State:
        """The streams whose readout is y, where the readout is lossless: the start of an inverse.

        Args:
            y: a result of ``readout``.
        """
        if self.streams != 1:
            raise SchemeError(f"{self}: its output does not determine its streams; invert from Stack.final_state(x).")
        return (y,)

    def input_from_state(self, state: State) -> Tensor:
        """The input from which ``init`` made these streams.

        Args:
            state: streams made by ``init``.
        """
        return state[0]

    def init(self, fs: Sequence[Function], x: Tensor, h: StepSize = 1.0) -> State:
        """Makes the streams from the input; ``fs`` and ``h`` are the first step's, with time at the start of that step.

        Args:
            fs: residual functions of the first step.
            x: the input.
            h: size of the first step.
        """
        return (x,)

    def readout(self, state: State) -> Tensor:
        """Makes the output from the streams.

        Args:
            state: the streams.
        """
        return state[0]

    def slope(self, fs: Sequence[Function], x: Tensor, h: StepSize = 1.0, gs: Sequence[Function] = ()) -> Tensor:
        """The increment of one step from x, divided by h: the step as a residual function. One stream only.

        Args:
            fs: the residual functions, ``stages`` of them.
            x: the one stream.
            h: step size.
            gs: shortcuts, one per stream, or none.
        """
        if self.streams != 1:
            raise SchemeError(f"{self} has {self.streams} streams; only a one-stream scheme can act as a function.")
        # Evaluated once, and passed to the step as a value: it is subtracted again below, and a BatchNorm in it must
        # update only once.
        shortcut = gs[0](x) if gs else x
        (y,) = self._step(fs, (x,), h, gs=(lambda _: shortcut,) if gs else ())
        return (y - shortcut) / h

    @property
    def tableau(self) -> Tableau | None:
        """The exact coefficients, over one use scaled to a step of 1; None where this is not a Runge-Kutta method."""
        return None

    @property
    def raw(self) -> tuple[bool, ...]:
        """Which residual functions receive the step's input itself, before the shortcut."""
        return (True,) * self.stages

    @property
    def plan(self) -> "tuple[Scheme, ...]":
        """The schemes of one period, step by step: the scheme itself, or the parts of a mix."""
        return (self,)

    def at(self, n: int) -> "Scheme":
        """The scheme of step n: the plan repeats, unless the first step differs from the others.

        Args:
            n: number of the step.
        """
        return self.plan[n % len(self.plan)]

    def whole(self, n: int) -> "Scheme":
        """The scheme of use n, where one use of a mix is its whole period; for any other scheme this is ``at(n)``.

        Args:
            n: number of the use.
        """
        return self.at(n) if len(self.plan) == 1 else self

    def stream_widths(self, channels: int) -> tuple[int, ...]:
        """Width of every stream that ``init`` makes from an input of that width.

        Args:
            channels: width of the input.
        """
        return (channels,) * self.streams

    def shape_of(self, i: int, streams: tuple[torch.Size, ...]) -> torch.Size | None:
        """The shape that residual function i must return, from the shapes of the streams after the shortcut.

        None where the function chooses the shape, since it makes a new stream.

        Args:
            i: number of the residual function.
            streams: shapes of the streams after the shortcut.
        """
        return streams[0]

    def shapes_after(self, streams: "tuple[torch.Size | None, ...]") -> "tuple[torch.Size | None, ...]":
        """The shape of every stream after a step, from those before it; None where a residual function chooses it.

        Args:
            streams: shapes of the streams before the step.
        """
        return streams

    def slots(self, n: int, streams: tuple[int, ...], out_channels: int | None = None) -> tuple[Slot, ...]:
        """The slot of each residual function of step n.

        Args:
            n: number of the step.
            streams: width of every stream before the step.
            out_channels: width after the step, where a shortcut changes it.
        """
        (width,) = streams
        out = width if out_channels is None else out_channels
        return tuple(Slot(n, i, (width if raw else out,), out, raw) for i, raw in enumerate(self.raw))

    def widths(self, n: int, streams: tuple[int, ...], out_channels: int | None = None) -> tuple[int, ...]:
        """Width of every stream after step n.

        Args:
            n: number of the step.
            streams: width of every stream before the step.
            out_channels: width after the step, where a shortcut changes it.
        """
        return streams if out_channels is None else (out_channels,) * len(streams)

    def step(
        self,
        fs: Sequence[Function],
        state: State,
        *,
        gs: Sequence[Function] = (),
        t: StepSize | None = None,
        h: StepSize = 1.0,
        context: Any = None,
    ) -> State:
        """One step with residual functions that may take time (a parameter ``t``) and a context (``context``).

        Args:
            fs: the residual functions, ``stages`` of them.
            state: the streams.
            gs: shortcuts, one per stream, or none.
            t: time at the start of the step; None leaves time out, so that functions use their default.
            h: step size.
            context: what all residual functions may read; None leaves it out.
        """
        fs, h = self._given(fs, t, h, context)
        return self._step(fs, state, h, gs)

    def inverse(
        self,
        fs: Sequence[Function],
        state: State,
        *,
        gs: Sequence[Function] = (),
        t: StepSize | None = None,
        h: StepSize = 1.0,
        context: Any = None,
    ) -> State:
        """The state before ``step``; ``t`` is the time at the start of that step.

        Args:
            fs: the residual functions, ``stages`` of them.
            state: the streams after the step.
            gs: shortcuts, one per stream, or none.
            t: time at the start of the step; None leaves time out, so that functions use their default.
            h: step size.
            context: what all residual functions may read; None leaves it out.
        """
        fs, h = self._given(fs, t, h, context)
        return self._inverse(fs, state, h, gs)

    def _given(
        self, fs: Sequence[Function], t: StepSize | None, h: StepSize, context: Any
    ) -> tuple[Sequence[Function], StepSize]:
        """The residual functions of one step, with time and context filled in, and the step size, checked."""
        if len(fs) != self.stages:
            raise SchemeError(f"{self}: {len(fs)} residual functions, want {self.stages} a step.")
        if not isinstance(h, (Tensor, float)):
            h = float(h)  # exact numbers, and those of numpy
        # Otherwise the functions are called as they are, and their signatures need not be read.
        if t is None and context is None and self.nodes is not None:
            return fs, h
        takes = [signature(f) for f in fs]
        if t is None and self.nodes is not None:
            takes = [_without_time(f, each) for f, each in zip(fs, takes, strict=True)]
        return bind(fs, takes, self.nodes, t, h, context), h

    @abstractmethod
    def __str__(self) -> str:
        """The expression that ``get`` reads as this scheme; it identifies one, unless a subclass compares more."""

    def _parts_compared(self) -> "tuple[Scheme, ...]":
        """The schemes that this one is made of, in the order of its text."""
        return ()

    def __eq__(self, other: object) -> bool:
        # The text is the identity: it is what a checkpoint stores and what ``get`` reads back. Parts compare more where
        # they do on their own: a user's method may have the same name as another.
        if type(self) is not type(other) or str(self) != str(other):
            return False
        return self._parts_compared() == other._parts_compared()  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash(str(self))

    def __repr__(self) -> str:
        return f"<scheme {self}>"


adopt(Scheme, Scheme._RENAMED)


class Takes(NamedTuple):
    """How a residual function is called.

    Attributes:
        time: with a time.
        context: with a context.
        first: with the time as its first argument, and not by keyword.
        opaque: unknown, since it takes any keyword (``**kwargs``); it is then given no context, and a time
            only if it has a parameter for it.
    """

    time: bool = False
    context: bool = False
    first: bool = False
    opaque: bool = False


# Attributes in which torch's wrappers keep the wrapped module: torch.compile, DataParallel and DDP, FSDP, checkpoints.
_WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def signature(f: Function) -> Takes:
    """Reads from the signature of f, or of its ``forward``, whether it takes a time ``t`` and a ``context``."""
    # Any object may have an attribute of that name, so its type decides.
    own = getattr(f, "takes", None)
    if isinstance(own, Takes):  # a stack within a stack takes what its functions take
        return own
    if isinstance(f, functools.partial) and isinstance(f.func, torch.nn.Module):
        found = signature(f.func)
        fixed = {*f.keywords, "t"} if found.first and f.args else f.keywords  # a time in front may be fixed by position
        time = found.time and "t" not in fixed
        return Takes(time, found.context and "context" not in fixed, time and found.first, found.opaque)
    try:
        parameters = inspect.signature(f.forward if isinstance(f, torch.nn.Module) else f).parameters
    except (TypeError, ValueError):  # some builtins have no signature
        return Takes()
    # Python lists what a partial function has fixed by name, as a default that may be given anew.
    fixed = f.keywords if isinstance(f, functools.partial) else {}
    parameters = {name: p for name, p in parameters.items() if name not in fixed}
    first = next(iter(parameters.values()), None)
    positional = first is not None and first.name == "t" and first.kind is not inspect.Parameter.KEYWORD_ONLY
    # A wrapper's (*args, **kwargs) tells nothing: the signature of the wrapped module counts.
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if anything and isinstance(f, torch.nn.Module):
        for name in _WRAPPED:
            inner = f._modules.get(name)
            if inner is not None:
                return signature(inner)
    return Takes("t" in parameters, "context" in parameters, positional, anything)


def _without_time(f: Function, takes: Takes) -> Takes:
    """How a residual function is called where no time is given: by its default.

    Raises:
        SchemeError: its time has no default.
    """
    if not takes.time:
        return takes
    try:
        time = inspect.signature(f.forward if isinstance(f, torch.nn.Module) else f).parameters["t"]
    except (TypeError, ValueError, KeyError):
        time = None
    if takes.first or time is None or time.default is inspect.Parameter.empty:
        raise SchemeError(
            "a step is given a context and no time, and a residual function takes the time t, without a default.\n"
            "  Give the time at the start of the step, t=0.0."
        )
    return takes._replace(time=False)


class Bound:
    """A residual function with its time and context filled in.

    With ``free`` time the caller appends the time since the start of the step; ``calls[0]`` then counts the calls.
    """

    __slots__ = ("calls", "context", "free", "function", "takes", "time")

    def __init__(
        self, function: Function, takes: Takes, time: Any, context: Any, free: bool, calls: list[int] | None = None
    ):
        self.function, self.takes, self.time, self.context = function, takes, time, context
        self.free, self.calls = free, calls

    def __call__(self, *args: Any) -> Tensor:
        time = self.time
        if self.free:
            # A solver chooses its evaluation times, and passes each as the last argument.
            args, since = args[:-1], args[-1]
            time = since if time is None else time + since
            if self.calls is not None:
                self.calls[0] += 1
        kwargs: dict[str, Any] = {"context": self.context} if self.takes.context else {}
        if self.takes.time:
            if time is None:
                time = 0.0
            if self.takes.first:
                return self.function(time, *args, **kwargs)
            kwargs["t"] = time
        return self.function(*args, **kwargs)


def bind(
    fs: Sequence[Function],
    takes: Sequence[Takes],
    nodes: tuple[float, ...] | None,
    t: StepSize | None,
    h: StepSize,
    context: Any,
    calls: list[int] | None = None,
) -> tuple[Function, ...]:
    """Fills in the time of each residual function, ``t + nodes[i] * h``, and the context, where it takes them."""
    if nodes is None:
        return tuple(Bound(f, needs, t, context, True, calls) for f, needs in zip(fs, takes, strict=True))
    # A scheme that evaluates its functions several times over has a node for each evaluation.
    uses = len(nodes) // len(fs)
    if not uses:
        if not any(needs.time or needs.context for needs in takes):
            return tuple(fs)
        raise SchemeError(
            f"a scheme of {len(fs)} residual functions a step sets no nodes, and a function takes time or a context.\n"
            "  Set nodes in the scheme's class: function i is evaluated at t + nodes[i] * h."
        )
    return tuple(
        Bound(f, needs, None if t is None else t + c * h, context, False) if needs.time or needs.context else f
        for f, needs, c in zip(tuple(fs) * uses, tuple(takes) * uses, nodes, strict=True)
    )


def solve(
    scheme: Scheme,
    f: Function,
    x: Tensor,
    *,
    t: tuple[float, float] = (0.0, 1.0),
    steps: int,
    context: Any = None,
) -> Tensor:
    """Integrates one vector field, x' = f(x) or f(t, x), over ``steps`` equal uses of a scheme.

    Args:
        scheme: the scheme.
        f: the vector field; takes the time if it has a parameter ``t``.
        x: initial value, any shape.
        t: start and end.
        steps: number of uses of the scheme.
        context: passed to f where it has a parameter ``context``.

    Returns:
        The value at the end, of the shape of x.

    Raises:
        SchemeError: steps is no whole number of at least 1, or x is of whole numbers.

    Example:
        >>> import torch, schemes
        >>> y = schemes.solve(schemes.get("rk4"), lambda x: -x, torch.ones((), dtype=torch.float64), steps=10)
        >>> round(float(y), 6)
        0.36788
    """
    if isinstance(steps, bool) or not isinstance(steps, Integral) or steps < 1:
        raise SchemeError(f"solve: steps is {steps!r}, want a whole number of at least 1.")
    if not (x.is_floating_point() or x.is_complex()):
        raise SchemeError(f"solve: the initial value is of {x.dtype}, which cannot hold steps.\n  Give x.double().")
    h = (t[1] - t[0]) / (steps * scheme.span)
    fs, takes = (f,) * scheme.stages, (signature(f),) * scheme.stages
    state: State = ()
    for n in range(steps):
        time = t[0] + n * scheme.span * h
        if not n:
            # Functions that make the streams are evaluated at the start, whatever the nodes of a step are.
            start = None if scheme.nodes is None else (0.0,) * scheme.stages
            state = scheme.init(bind(fs, takes, start, time, h, context), x, h)
        part = scheme.whole(n)
        state = part._step(bind(fs[: part.stages], takes[: part.stages], part.nodes, time, h, context), state, h)
    return scheme.readout(state)


def check_attributes(scheme: Scheme) -> Scheme:
    """Returns the scheme itself; raises a SchemeError where its class does not declare valid stages and nodes."""
    stages = getattr(scheme, "stages", None)
    if not isinstance(stages, int) or isinstance(stages, bool) or stages < 1:
        told = "does not set stages" if stages is None else f"sets stages to {stages!r}"
        raise SchemeError(
            f"{type(scheme).__name__} {told}: want the number of residual functions that one step takes, from 1 on.\n"
            "  Set it in the class, as in stages = 2, or in its constructor; schemes.Scheme lists the other attributes."
        )
    if scheme.nodes is not None and len(scheme.nodes) % stages:
        raise SchemeError(
            f"{type(scheme).__name__} sets {len(scheme.nodes)} nodes for {stages} residual functions a step.\n"
            "  Set one per function, which is evaluated at t + nodes[i] * h; or one per evaluation, where a step "
            "evaluates all of them several times."
        )
    return scheme
