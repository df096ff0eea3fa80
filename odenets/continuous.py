"""Weights as functions of depth: theta(t) is a B-spline, and a residual network integrates one field.

``ContinuousWeights`` turns a block into a residual function f(t, x) = block(x; theta(t)). The block stays a module with
its own names: each of its parameters gains a leading dimension for the coefficients.

* a convolution's ``block.conv.weight`` is (knots + degree, out, in, 3, 3), for knots that differ;
* evaluated at t it is the convolution with the weights sum_k B_k(t) c_k, which exist for that call alone;
* under euler, at the knots of a linear spline, these weights are single coefficients, and nothing is computed.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor, peek_interpreter_stack
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from schemes.errors import SchemeError
from schemes.scheme import Takes, signature
from schemes.splines import SAME, Row, SplineSpace, distance, fit, projection, slack_of, transfer

from .auxiliary import with_energies
from .interpolation import Interpolation, Place, blend, kept_out, places_of, product, standing
from .knots import (
    KNOTS,
    alike,
    mapped,
    misshapen,
    on_a_grid,
    read_knots,
    relative_errors,
    rounding_of,
    space_of,
    widened,
)

# Beyond its span a field continues its last piece, as far as the nodes of a step reach: verner8 has one at 4/3.
BEYOND = 1 / 3


class Approximation(NamedTuple):
    """A field that approximates given weights, and its distance from them.

    Attributes:
        field: the field.
        error: the root mean square of the difference over depth and weights, relative to that of the weights.
        errors: the same for each parameter of the block, by name.
    """

    field: "ContinuousWeights"
    error: float
    errors: dict[str, float]


class Basis:
    """The basis to which the coefficients of a field refer; copies that share the parameters share it too.

    Args:
        span: the end of the time interval.
        space: the splines.
    """

    __slots__ = ("space", "span")

    def __init__(self, span: float, space: SplineSpace):
        self.span, self.space = span, space


class ContinuousWeights(nn.Module):
    r"""A residual function f(t, x) = block(x; theta(t)) whose weights are splines in time, theta(t) = sum_k B_k(t) c_k.

    Shared by all stages of a stack, it is one vector field: scheme and depth may then change after training, and the
    results differ by the scheme's error. Initially theta is constant, with the block's weights. A scheme attains its
    order where f is smooth along a step: with a smooth activation, and knots where steps begin. With ReLU, or knots
    inside steps, the order stops at 2.

    Cost: one weighted sum of ``degree + 1`` coefficients per parameter and evaluation, none at the knots of a linear
    spline. The sums are not kept for the backward pass, which recomputes them.

    Stable state-dict keys: ``block.*`` as the block names them, with the coefficients in front; ``knots``.

    Args:
        block: any module: with convolutions, attention, several arguments, a ``context``, or a time argument of its
            own. It becomes part of the field.
        knots: number of intervals, or their ends from 0 to ``span`` in ascending order, in double precision or on a
            uniform grid; an inner knot repeated m times leaves ``degree - m`` continuous derivatives. Or a space.
        degree: of the splines: 0 (constant on each interval), 1 (lines), 2 or 3; None is 1, or that of a spline space.
        span: t runs over [0, span].

    Shapes:
        t: a number or a scalar; x: whatever the block takes.

    Raises:
        SchemeError: norms with running statistics, parameters that are still lazy, or an invalid spline.

    Source:
        Queiruga et al. 2020, Continuous-in-Depth Neural Networks, arXiv 2008.02389.

    Example:
        >>> import torch
        >>> from odenets import ContinuousWeights, Stack
        >>> field = ContinuousWeights(torch.nn.Linear(4, 4), knots=8)
        >>> net, x = Stack(field, "rk4", depth=8, step="span/depth"), torch.randn(2, 4)
        >>> field.block.weight.shape, (net(x) - net.rebuilt("midpoint", 16)(x)).abs().max() < 1e-2
        (torch.Size([9, 4, 4]), tensor(True))
    """

    _looked: frozenset[tuple[int, bool]] = frozenset()  # blocks whose weights were compared after a call, by mode

    def __init__(
        self,
        block: nn.Module,
        knots: int | Sequence[float] | SplineSpace = 8,
        degree: int | None = None,
        span: float = 1.0,
    ):
        super().__init__()
        if isinstance(span, bool) or not isinstance(span, (int, float)) or not 0 < span < float("inf"):
            raise SchemeError(f"ContinuousWeights: span is {span!r}, want a positive number.")
        _check_block(block)
        self.basis = Basis(float(span), space_of(knots, degree, float(span)))
        for places in places_of(block):
            p = places[0].value
            # Basis functions sum to 1, so that equal coefficients represent a constant.
            held = nn.Parameter(p.detach().expand(self.space.count, *p.shape).clone(), p.requires_grad)
            for place in places:
                setattr(place.module, place.name, held)
        self.block = block
        self.energies: frozenset[str] = frozenset()  # auxiliary values to return in training, set by gather.returning
        self._found: tuple[nn.Module, list[list[Place]]] | None = None
        self._read: tuple[nn.Module, Takes] | None = None
        self._compiled: Callable[..., Any] | None = None
        self._split: dict[int, tuple[Tensor, Any, Sequence[Tensor]]] = {}

    @property
    def span(self) -> float:
        """The end of the time interval."""
        return self.basis.span

    @property
    def space(self) -> SplineSpace:
        """The splines."""
        return self.basis.space

    @property
    def knots(self) -> int:
        """The number of intervals."""
        return len(self.space.breaks) - 1

    @property
    def degree(self) -> int:
        """The degree of the splines."""
        return self.space.degree

    @property
    def takes(self) -> Takes:
        """The arguments that a stack passes: the time first, and a context if the block takes one."""
        inner = self._inner
        return Takes(True, inner.context, True, inner.opaque)

    @property
    def _inner(self) -> Takes:
        """The arguments that the block takes, read once."""
        if self._read is None or self._read[0] is not self.block:
            self._read = self.block, signature(self.block)
        return self._read[1]

    def _places(self) -> list[list["Place"]]:
        """The places where the block keeps its parameters, grouped by parameter."""
        # Found once: walking the block costs more than a small convolution. A replica has a block of its own.
        if self._found is None or self._found[0] is not self.block:
            self._found = self.block, places_of(self.block)
        return self._found[1]

    def coefficients(self) -> dict[str, nn.Parameter]:
        """Returns the coefficients of each of the block's parameters, by name: (coefficients, ...).

        There are knots + degree of them, and more where inner knots are repeated.
        """
        return {places[0].key: places[0].now() for places in self._places()}

    def weights(self, t: float | Tensor) -> dict[str, Tensor]:
        """Returns the block's weights at time t, by name; differentiable.

        Args:
            t: a time in [0, span].

        Raises:
            SchemeError: a time further outside the span than the nodes of a step reach.
        """
        names = [places[0].key for places in self._places()]
        return dict(zip(names, self._at(t)[0], strict=True))

    def _at(self, t: float | Tensor) -> "tuple[Sequence[Tensor], Row | None]":
        """Returns the weights at t, and the basis functions where t is a number on the host."""
        coefficients = [places[0].now() for places in self._places()]
        if torch.compiler.is_compiling() or (isinstance(t, Tensor) and (t.requires_grad or t.device.type != "cpu")):
            given = t if isinstance(t, Tensor) else torch.as_tensor(t, dtype=torch.float64)
            if not torch.compiler.is_compiling() and given.device.type == "cpu" and not is_batchedtensor(given):
                self._checked(float(given.detach()))
            # Half precision is given up before the division, which would round a time once more.
            given = given if given.dtype in (torch.float32, torch.float64) else given.float()
            # Compared with every knot, but never read: the graph is the same for all times.
            basis = self.space.basis((given / self.span).reshape(()))
            return [product(basis, c) for c in coefficients], None
        # The same interval as above, or a learned size of a step would find another weight where nothing is learned.
        slack = slack_of(t) if isinstance(t, Tensor) else SAME
        row = self.space.row(self._checked(float(t)) / self.span, slack)
        if not torch.is_grad_enabled():
            return [blend(c, row) for c in coefficients], row
        if peek_interpreter_stack() is not None:
            # Inside vmap, grad and similar transforms, tensors have no address by which a kept one could be identified.
            return [blend(c, row) for c in coefficients], None
        used = [(row.first + k, w) for k, w in enumerate(row.values) if w != 0.0]
        rows = [self._rows(n, c) for n, c in enumerate(coefficients)]
        if len(used) == 1:  # at a knot: a view, which autograd keeps for free
            return [each[used[0][0]] for each in rows], None
        found = Interpolation.apply(tuple(w for _, w in used), *(each[k] for each in rows for k, _ in used))
        return found, row  # type: ignore[return-value]

    def _rows(self, n: int, c: Tensor) -> Sequence[Tensor]:
        """Returns the single coefficients of parameter n, as views; the same views for all evaluations of a pass.

        Their gradients are then summed one by one and stacked once, instead of at full size in every evaluation.
        """
        # An optimiser's step, a freeze and a move to a device each make the views stale.
        key = (c._version, c.requires_grad, c.data_ptr())
        held = self._split.get(n)
        if held is not None and held[0] is c and held[1] == key:
            return held[2]
        rows = c.unbind()
        if c.is_leaf:  # a computed tensor would be kept alive with its graph
            self._split[n] = c, key, rows
        return rows

    def __getstate__(self) -> dict[str, Any]:
        # Views have a graph, which deepcopy refuses; they are created again on demand.
        return {**self.__dict__, "_split": {}}

    def _checked(self, t: float) -> float:
        if not -BEYOND - 1e-6 <= t / self.span <= 1 + BEYOND + 1e-6:
            raise SchemeError(
                f"ContinuousWeights: asked for the weights at t = {t:g}, which are functions on [0, {self.span:g}].\n"
                "  Let the steps end there: Stack(field, ..., step='span/depth'), or give the field a longer span."
            )
        return t

    def forward(self, t: float | Tensor, *args: Any, **kwargs: Any) -> Any:
        """Calls the block with its weights at time t."""
        if self.energies and self.training:
            return with_energies(partial(self._call, t), args, kwargs, 0, self.energies)
        return self._call(t, *args, **kwargs)

    def _call(self, t: float | Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._compiled is not None and not torch.compiler.is_compiling():
            if not isinstance(t, Tensor):
                t = torch.tensor(self._checked(float(t)), dtype=torch.float64)
            return self._compiled(self, t, *args, **kwargs)
        return self._evaluate(t, *args, **kwargs)

    def _evaluate(self, t: float | Tensor, *args: Any, **kwargs: Any) -> Any:
        inner = self._inner
        if inner.time:
            args, kwargs = ((t, *args), kwargs) if inner.first else (args, {**kwargs, "t": t})
        weights, row = self._at(t)
        places = self._places()
        if torch.compiler.is_compiling():
            # A compiler does not follow writes into the modules' dictionaries.
            named = {place.key: w for same, w in zip(places, weights, strict=True) for place in same}
            return functional_call(self.block, named, args, kwargs)
        # The first evaluation in each mode of training compares the weights after the call.
        key = id(self.block), self.training
        hooks = kept_out(row, places, weights, key not in self._looked)
        with hooks, standing(places, weights):
            found = self.block(*args, **kwargs)
        if key not in self._looked and not isinstance(hooks, nullcontext):
            self._looked = self._looked | {key}
        return found

    def module_at(self, t: float) -> nn.Module:
        """Returns an independent block with the weights at time t: what a plain network has in that place.

        Args:
            t: a time in [0, span].

        Example:
            >>> import torch
            >>> field = ContinuousWeights(torch.nn.Linear(2, 3), knots=4)
            >>> field.module_at(0.3).weight.shape
            torch.Size([3, 2])
        """
        found = copy.deepcopy(self.block)
        with torch.no_grad():
            # At a knot a weight is a view of the coefficients.
            weights = [w.clone() for w in self._at(t)[0]]
        for same, w in zip(places_of(found), weights, strict=True):
            held = nn.Parameter(w, same[0].value.requires_grad)
            for place in same:
                setattr(place.module, place.name, held)
        return found

    # Changes of basis ----------------------------------------------------------------------------------------------

    def change(self, space: SplineSpace, matrix: Tensor | None = None) -> Tensor:
        """Expresses the weights in another basis, in place; the parameters stay the same objects.

        Args:
            space: the new splines.
            matrix: the map of coefficients, (new, old); None computes the exact one.

        Returns:
            The map, for tensors kept beside the coefficients, such as an optimiser's moments.

        Raises:
            SchemeError: the new space does not contain the present spline.
        """
        matrix = transfer(self.space, space) if matrix is None else matrix
        self._split.clear()  # views of the old shape, which would keep the parameters' nodes in the graph alive
        with torch.no_grad():
            for places in self._places():
                p = places[0].now()
                # Through `data`, so that an optimiser keeps the same parameter in its new shape. The node that
                # accumulates its gradient has the old shape, and lives as long as a graph or a copy of this field that
                # shares the parameter; torch makes a new node when the dtype changes.
                new = mapped(matrix, p.data)
                p.data = p.data.new_empty(0, dtype=torch.float32 if p.dtype != torch.float32 else torch.float64)
                p.data = new
                # The gradient has the old shape.
                p.grad = None
        self.basis.space = space
        return matrix

    def _changed(self, space: SplineSpace, matrix: Tensor | None = None) -> Self:
        found = copy.deepcopy(self)
        found.change(space, matrix)
        return found

    def refined(self, knots: int) -> Self:
        """Returns a new field with more knots that is the same function of depth, up to rounding.

        Args:
            knots: number of uniform intervals, whose ends must include the present knots.

        Raises:
            SchemeError: they do not; the nearest numbers that do are named.

        Example:
            >>> import torch
            >>> field = ContinuousWeights(torch.nn.Linear(2, 2), knots=4)
            >>> field.refined(8).block.bias.shape
            torch.Size([9, 2])
        """
        return self._changed(self.space.refined(knots))

    def elevated(self, degree: int) -> Self:
        """Returns a new field of a higher degree that is the same function of depth, up to rounding.

        Each inner knot is then repeated once more per added degree, since the function is no smoother than it was.

        Args:
            degree: of the new splines, at least the old one.

        Raises:
            SchemeError: a lower degree.
        """
        return self._changed(self.space.elevated(degree))

    def projected(self, knots: int, degree: int | None = None) -> Approximation:
        """Returns the nearest field with other knots, in the mean square over depth: compression after training.

        Args:
            knots: number of uniform intervals.
            degree: of the splines; None keeps it.

        Returns:
            The field, and the distance of its weights from the present ones.

        Example:
            >>> import torch
            >>> field = ContinuousWeights(torch.nn.Linear(2, 2), knots=4)
            >>> field.projected(2).error < 1e-6  # constant so far
            True
        """
        space = SplineSpace.uniform(knots, self.degree if degree is None else degree)
        found = self._changed(space, projection(self.space, space))
        old, new, weights = distance(self.space, space)
        pairs = {}
        for a, b in zip(self._places(), found._places(), strict=True):
            was, now = widened(a[0].now().detach()), widened(b[0].now().detach())
            pairs[a[0].key] = mapped(old, was), mapped(new, now)
        return Approximation(found, *relative_errors(pairs, weights))

    @classmethod
    def from_modules(
        cls,
        modules: Sequence[nn.Module],
        knots: int | Sequence[float] | SplineSpace | None = None,
        degree: int | None = None,
        span: float = 1.0,
        times: Sequence[float] | None = None,
    ) -> Approximation:
        """Fits a spline to the weights of separate modules: a start for fine-tuning a trained network.

        The fit is by least squares at the times of the modules; what they leave undetermined is as smooth as possible.
        With as many knots as modules the spline interpolates them all, and the network is the same under the same
        steps; between the modules, weights that were trained separately say nothing. Buffers are those of the first
        module.

        Args:
            modules: modules of one kind, in the order of depth.
            knots: as in ``ContinuousWeights``; None is one interval per module.
            degree: as in ``ContinuousWeights``.
            span: as in ``ContinuousWeights``.
            times: the time of each module; None uses the times where steps of euler begin, n span / len(modules).

        Returns:
            The field, and the distance of its weights from those of the modules.

        Raises:
            SchemeError: modules whose parameters differ in names or shapes.

        Example:
            >>> import torch
            >>> layers = [torch.nn.Linear(2, 2) for _ in range(4)]
            >>> found = ContinuousWeights.from_modules(layers)
            >>> found.error < 1e-6, torch.allclose(found.field(0.5, layers[0].weight), layers[2](layers[0].weight))
            (True, True)
        """
        modules = list(modules)
        if not modules:
            raise SchemeError("ContinuousWeights: from_modules was given no modules, want at least one.")
        n = len(modules)
        eps = 0.0 if times is None else rounding_of(times, [float(t) for t in times])
        times = [i * span / n for i in range(n)] if times is None else [float(t) for t in times]
        if len(times) != n:
            raise SchemeError(f"ContinuousWeights: {len(times)} times for {n} modules, want one each.")
        for t in times:
            if not -1e-6 * span <= t <= (1 + 1e-6) * span:
                raise SchemeError(f"ContinuousWeights: a module stands at t = {t:g}, outside of [0, {span:g}].")
        for module in modules:
            _check_block(module)
        states = [{name: p.detach() for name, p in module.named_parameters()} for module in modules]
        for i, state in enumerate(states):
            if {k: p.shape for k, p in state.items()} != {k: p.shape for k, p in states[0].items()}:
                raise SchemeError(
                    f"ContinuousWeights: module {i} has other parameters than module 0; a spline goes through weights "
                    "of one shape."
                )
        found = cls(copy.deepcopy(modules[0]), n if knots is None else knots, degree, span)
        us = [t / found.span for t in times]
        us = (on_a_grid(us, eps) if eps else None) or us
        matrix, rows = fit(found.space, us), found.space.rows(us)
        pairs = {}
        for places in found._places():
            own = torch.stack([state[places[0].key] for state in states])
            places[0].now().data = mapped(matrix, own)
            pairs[places[0].key] = widened(own), mapped(rows, widened(places[0].now().detach()))
        return Approximation(found, *relative_errors(pairs, torch.full((n,), 1 / n, dtype=torch.float64, device="cpu")))

    # State and movement --------------------------------------------------------------------------------------------

    def _knot_vector(self) -> Tensor:
        return self.span * torch.tensor(self.space.knots, dtype=torch.float64, device="cpu")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Not a buffer: half() would round it, and two fields with equally many coefficients would be confused.
        destination[prefix + KNOTS] = self._knot_vector()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = state_dict.get(prefix + KNOTS)
        if given is None:
            missing_keys.append(prefix + KNOTS)
        else:
            wrong, (span, space) = [], (self.span, self.space)
            try:
                span, space = read_knots(given, self.span)
                wrong = misshapen(space, self._shapes(f"{prefix}block."), state_dict)
            except SchemeError as error:
                wrong = [f"{prefix}{KNOTS}: {error}"]
            error_msgs.extend(wrong)
            # A state dict that is refused leaves the field its shapes.
            if not wrong:
                if not alike(space, self.space):  # a field that was refined during training
                    # Sets the shapes, since the values are then read from the state dict; parameters that it leaves out
                    # stay the same function, or the nearest one.
                    self.change(space, None if space.holds(self.space) else projection(self.space, space))
                self.basis.span = span
        # torch would report the knots as unexpected, since they are not a buffer.
        inner = {k: v for k, v in state_dict.items() if k != prefix + KNOTS}
        super()._load_from_state_dict(inner, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _shapes(self, prefix: str) -> dict[str, torch.Size]:
        """The shape of each parameter that is a function of time, by its key; a tied one has several."""
        return {f"{prefix}{place.key}": same[0].now().shape for same in self._places() for place in same}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Memory formats are meant for the block's own dimensions: channels_last refuses a five-dimensional tensor.
        return super()._apply(lambda x: fn(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if x.dim() > 3 else fn(x))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the field: one graph for all times, so that compile time does not grow with depth.

        The time enters as a tensor; as a number it would be a constant of the graph.

        Args:
            args: as in ``torch.compile``.
            kwargs: as in ``torch.compile``.
        """
        # The compiled function takes the field as an argument, so that copies keep it and use their own weights.
        self._compiled = torch.compile(ContinuousWeights._evaluate, *args, **kwargs)

    def extra_repr(self) -> str:
        uniform = "" if self.space.uniform_intervals else ", not uniform"
        return f"knots={self.knots}, degree={self.degree}, span={self.span:g}{uniform}"


def _check_block(block: Any) -> None:
    if not isinstance(block, nn.Module):
        raise SchemeError(
            f"ContinuousWeights: the block is a {type(block).__name__}, want a module, whose weights become functions."
        )
    for name, module in block.named_modules():
        if isinstance(module, ContinuousWeights):
            raise SchemeError("ContinuousWeights: the block holds weights that are functions of depth already.")
        if isinstance(module, _NormBase) and module.track_running_stats:
            raise SchemeError(
                f"ContinuousWeights: {name or 'the block'} is a {type(module).__name__}, whose running statistics each "
                "evaluation would move, at whatever time.\n  Use GroupNorm or LayerNorm, or track_running_stats=False."
            )
        if _normed_by_iteration(module):
            raise SchemeError(
                f"ContinuousWeights: {name or 'the block'} has a spectral norm, which follows one matrix from call "
                "to call, and not one for each time.\n  Remove it."
            )
        for key, p in module._parameters.items():
            if p is not None and is_lazy(p):
                raise SchemeError(f"ContinuousWeights: {name}.{key} is lazy; call the block once on an input first.")


def _normed_by_iteration(module: nn.Module) -> bool:
    """Whether a module keeps the vectors of a power iteration, as a parametrisation or as a hook."""
    hooks = module._forward_pre_hooks.values()
    return isinstance(module, _SpectralNorm) or any(isinstance(hook, SpectralNorm) for hook in hooks)


# Queries about fields -----------------------------------------------------------------------------------------------


def fields_of(module: nn.Module | None) -> list[ContinuousWeights]:
    """Returns the fields inside a module, each once.

    Example:
        >>> import torch
        >>> from odenets import ContinuousWeights, Stack
        >>> len(fields_of(Stack(ContinuousWeights(torch.nn.Linear(2, 2)), depth=8, step="span/depth")))
        1
    """
    return [] if module is None else [m for m in module.modules() if isinstance(m, ContinuousWeights)]


def dimensions(module: nn.Module) -> dict[int, int]:
    """Returns the number of dimensions of each parameter of a module, by id, without that of the coefficients."""
    own = {id(p) for field in fields_of(module) for p in field.coefficients().values()}
    return {id(p): p.ndim - (id(p) in own) for p in module.parameters()}


def expected_shapes(model: nn.Module, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Returns the shapes that a model accepts from a state dict: a field, any number of coefficients with its knots."""
    shapes = {key: value.shape for key, value in own.items()}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, ContinuousWeights) and (given := state.get(prefix + KNOTS)) is not None:
            span, space = read_knots(given, module.span)
            # A field on its own accepts any span; in a network the steps would still end where they do now.
            if name and abs(span - module.span) > 1e-6 * module.span:
                raise SchemeError(
                    f"{name}: its weights are functions on [0, {module.span:g}], and those of the file on "
                    f"[0, {span:g}].\n"
                    "  Build the network with the steps of the file, then change them: odenets.rebuild.rebuilt."
                )
            shapes[prefix + KNOTS] = given.shape
            for key, shape in module._shapes(f"{prefix}block.").items():
                shapes[key] = torch.Size([space.count, *shape[1:]])
    return shapes
