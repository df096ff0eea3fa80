"""Features of any model at named places, without a change to the model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from schemes import Scheme, SchemeError

from ..stack import Stack
from ..step import Step

READOUT = "readout"


class Place(NamedTuple):
    """The parsed name of a place.

    Attributes:
        path: the module's name.
        call: which of its calls in a forward pass, from 0; None if it must be the only one.
        item: which item of what it returns, or "readout"; None if it returns one tensor.
    """

    path: str
    call: int | None
    item: int | str | None


class Found(NamedTuple):
    """What was found at a place.

    Attributes:
        value: a copy, in the graph of what the network computed.
        given: the tensor itself, if it has a gradient; later modules may write into it.
        version: version counter of that tensor when it was returned.
        edge: its gradient edge, which does not depend on what is written into it later.
        parts: for a readout with gradients enabled, the streams it is computed from; the network continues with these.
    """

    value: Tensor
    given: Tensor | None = None
    version: int = 0
    edge: GradientEdge | None = None
    parts: "tuple[Found, ...]" = ()


class Features:
    """Collects what modules return while the network runs; a context manager.

    A place is a module's name, as ``named_modules`` gives it; ``name:i`` is item i of what it returns, for steps, which
    return a tuple of streams: level l of column n of a RevCol is ``columns.steps.{n}:{l + 1}``. ``name:readout`` is
    the scheme's readout of all of a step's streams, such as all that a DenseNet has joined so far. A module that runs
    several times in a forward pass has a place per call, ``name@k`` or ``name@k:i``, k from 0.

    Features are copies, so that a later in-place module, such as ``nn.ReLU(inplace=True)``, does not change them; the
    network's own computation is unaffected. Each forward pass of the network begins anew, and what is recomputed in a
    backward pass is ignored. Cost: one copy per place.

    Args:
        model: the network.
        names: the places.

    Raises:
        SchemeError: no such module (some are named), no such item or call, or several calls and none is chosen.

    Example:
        >>> import torch
        >>> from odenets import create_model
        >>> net = create_model("ho_resnet26").eval()
        >>> with Features(net, ["stem", "levels.1"]) as features, torch.no_grad():
        ...     _ = net(torch.randn(1, 3, 32, 32))
        >>> {name: tuple(x.shape) for name, x in features.items()}
        {'stem': (1, 16, 16, 16), 'levels.1': (1, 32, 8, 8)}
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.model, self.names = model, tuple(names)
        self._found: dict[str, Found] = {}
        self._handles: list[Any] = []
        self._calls: dict[str, int] = {}
        # A module that is registered under several names can be given by each of them.
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._places = {name: self._parse(name) for name in self.names}

    def _parse(self, name: str) -> Place:
        # The whole name first: keys of a ModuleDict may contain these signs themselves.
        if name in self._modules:
            return Place(name, None, None)
        head, colon, item = name.rpartition(":") if ":" in name else (name, "", "")
        path, at, call = (head, "", "") if head in self._modules or "@" not in head else head.rpartition("@")
        if path not in self._modules:
            known = places(self.model) or [p for p in self._modules if p]
            raise SchemeError(
                f"{type(self.model).__name__} has no module {path!r}; "
                f"places(model) names some: {', '.join(known[:4])}, ..."
            )
        if item == READOUT and not isinstance(self._modules[path], Step):
            raise SchemeError(f"{name}: only the step of a stack has a readout; write {path}, or {path}:0.")
        for sign, number in ((colon, item), (at, call)):
            if sign and number != READOUT and not (number.isascii() and number.isdigit()):
                raise SchemeError(f"{name}: {number!r} after {sign!r} is no count from 0; write {path}{sign}0.")
        which = (item if item == READOUT else int(item)) if colon else None
        return Place(path, int(call) if at else None, which)

    def __enter__(self) -> "Features":
        self.clear()
        # Each forward pass of the network clears the features, before any module runs.
        self._handles.append(self.model.register_forward_pre_hook(self._begin))
        # Readouts last: their hooks replace the streams by new tensors, which no other place may see.
        for name, place in sorted(self._places.items(), key=lambda pair: pair[1].item == READOUT):
            self._handles.append(self._modules[place.path].register_forward_hook(self._hook(name, place)))
        return self

    def _begin(self, module: nn.Module, args: Any) -> None:
        if not _in_backward():
            self.clear()

    def clear(self) -> None:
        """Clears what was found; for networks that are run in another way than by calling them."""
        self._found.clear()
        self._calls.clear()

    def _hook(self, name: str, place: Place) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> Any:
            if _in_backward():
                return None
            call = self._calls.get(name, 0)
            self._calls[name] = call + 1
            if place.call is None and call:
                item = "" if place.item is None else f":{place.item}"
                raise SchemeError(
                    f"{name}: the module runs more than once in a forward pass.\n"
                    f"  Choose a call: {place.path}@0{item}, {place.path}@1{item}, ..."
                )
            if place.call in (None, call):
                found = _copied(_item(name, place, output, module))
                if place.item == READOUT and torch.is_grad_enabled():
                    # As new tensors: a stream that the step passes through unchanged has been read before, and only
                    # what comes after the step counts.
                    output = tuple(stream.view_as(stream) for stream in output)
                    self._found[name] = found._replace(parts=tuple(_copied(stream) for stream in output))
                    return output
                self._found[name] = found
            return None

        return keep

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _of(self, name: str) -> Found:
        if name not in self._places:
            raise SchemeError(f"{name}: not among the places of these features: {', '.join(self.names[:4])}.")
        if name not in self._found:
            calls, call = self._calls.get(name, 0), self._places[name].call
            if calls and call is not None:
                raise SchemeError(f"{name}: there is no call {call}; the module ran {calls} times, counted from 0.")
            raise SchemeError(f"{name}: the module did not run; choose a place that the forward pass calls.")
        return self._found[name]

    def __getitem__(self, name: str) -> Tensor:
        """Returns the features of a place: the tensor itself if it has a gradient and is unchanged since, else a copy.

        Raises:
            SchemeError: the module did not run.
        """
        value, given, version, *_ = self._of(name)
        # A write through ``.data`` leaves the version as it was.
        if given is not None and given._version == version and torch.equal(given.detach(), value.detach()):
            return given
        return value

    def edge(self, name: str) -> GradientEdge | None:
        """Returns the gradient edge of a place, for ``torch.autograd.grad(score, edge)``; None if it has no gradient.

        The edge is that of the tensor that the module returned, even if a later module writes into it.

        Args:
            name: the name of a place.

        Raises:
            SchemeError: the module did not run.

        Example:
            >>> import torch
            >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(inplace=True))
            >>> with Features(net, ["0"]) as features:
            ...     score = net(torch.ones(1, 2)).sum()
            >>> [grad] = torch.autograd.grad(score, features.edge("0"))
            >>> torch.equal(grad, (features["0"] > 0).float())
            True
        """
        return self._of(name).edge

    def parts(self, name: str) -> list[tuple[Tensor, GradientEdge | None]]:
        """Returns the streams behind a readout, each with its gradient edge; for any other place, that place alone.

        A network continues with a step's streams and not with their readout, so that the readout of a step of several
        streams has no gradient. Streams are kept if gradients are enabled, and their gradients come only from what
        follows the step.

        Args:
            name: the name of a place.

        Raises:
            SchemeError: the module did not run.

        Example:
            >>> import torch
            >>> from odenets.models import DenseNet
            >>> net = DenseNet([2], growth=4, stem="conv3", num_classes=3).eval()
            >>> with Features(net, ["levels.0.steps.1:readout"]) as features:
            ...     _ = net(torch.randn(1, 3, 8, 8))
            >>> [value.shape[1] for value, _ in features.parts("levels.0.steps.1:readout")]
            [8, 4, 4]
        """
        found = self._of(name)
        return [(part.value, part.edge) for part in found.parts] or [(self[name], found.edge)]

    def items(self) -> list[tuple[str, Tensor]]:
        """Returns names and tensors, in the order in which the places were given.

        Raises:
            SchemeError: a module did not run.
        """
        return [(name, self[name]) for name in self.names]


def _in_backward() -> bool:
    """Whether a backward pass is running: what checkpoints and inverses recompute there is not a new pass."""
    # Private, but torch offers no other way to ask.
    return torch._C._current_graph_task_id() != -1


def _item(name: str, place: Place, output: Any, module: nn.Module) -> Tensor:
    """Selects the tensor that a place names from what its module returned."""
    if place.item == READOUT and isinstance(module, Step):
        return module.scheme.readout(tuple(output))
    if isinstance(place.item, int):
        if not isinstance(output, (tuple, list)) or place.item >= len(output):
            raise SchemeError(f"{name}: the module returns no item {place.item}.")
        output = output[place.item]
    elif isinstance(output, (tuple, list)):
        if len(output) != 1:
            raise SchemeError(f"{name}: the module returns {len(output)} tensors; name one, as in {name}:0.")
        output = output[0]
    if not isinstance(output, Tensor):
        raise SchemeError(f"{name}: the module returns a {type(output).__name__}; choose one that returns a tensor.")
    return output


def _copied(output: Tensor) -> Found:
    if not (torch.is_grad_enabled() and output.requires_grad):
        return Found(output.detach().clone())
    # Taken now: a later in-place write gives the tensor another node.
    return Found(output.clone(), output, output._version, get_gradient_edge(output))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a network into evaluation mode; on exit, every module is as it was, frozen norms included.

    Args:
        model: the network.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.BatchNorm1d(2).eval(), nn.Dropout())
        >>> with evaluating(net):
        ...     print([m.training for m in net.modules()])
        [False, False, False]
        >>> [m.training for m in net.modules()]
        [True, False, True]
    """
    flags = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            # Not ``train``: it is recursive, and a module may override it.
            module.training = training


def _readout_of(step: nn.Module) -> str:
    """The item of a step's state that is its readout: the first stream, or the scheme's readout of all."""
    return READOUT if isinstance(step, Step) and type(step.scheme).readout is not Scheme.readout else "0"


def below(name: str, outer: str) -> bool:
    """Whether a module lies inside another, by their names in ``named_modules``; all lie inside the model itself.

    Args:
        name: the name of the module.
        outer: the name of the other; "" is the model.

    Example:
        >>> below("a.b", "a"), below("ab", "a"), below("a", "")
        (True, False, True)
    """
    return name.startswith(f"{outer}." if outer else "")


def places(model: nn.Module) -> list[str]:
    """Returns the places worth a look in any model.

    These are every level of every column, and the readout of every step of other stacks: one stream (``:0``), or
    computed from several (``:readout``). In a network without stacks, they are the modules that ``feature_info`` names.

    Args:
        model: the network.

    Example:
        >>> from odenets.models import RevCol
        >>> places(RevCol((4, 8), (1, 1), columns=2, num_classes=2))
        ['columns.steps.0:1', 'columns.steps.0:2', 'columns.steps.1:1', 'columns.steps.1:2']
    """
    found = []
    inside: list[str] = []  # stacks inside residual functions are skipped
    for name, module in model.named_modules():
        if not isinstance(module, Stack) or any(below(name, outer) for outer in inside):
            continue
        inside.append(name)
        levels = getattr(module.scheme, "levels", 0)
        for n in range(len(module.steps)):
            step = f"{name}.steps.{n}" if name else f"steps.{n}"
            found += [f"{step}:{level + 1}" for level in range(levels)] or [f"{step}:{_readout_of(module.steps[n])}"]
    return found or [row["module"] for row in getattr(model, "feature_info", [])]
