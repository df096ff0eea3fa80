"""Features of a network at named places, of any model, without a change to it."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from schemes import SchemeError

from ..stack import Stack


class Features:
    """Collects what modules return while the network runs; a context manager.

    A place is a module's name, as ``named_modules`` gives it; ``name:i`` is item i of what it returns, for steps, which
    return a tuple of streams: level l of column n of a RevCol is ``columns.steps.{n}:{l + 1}``.

    Args:
        model: the network.
        names: the places.

    Raises:
        SchemeError: no such module (the nearest are named), or no such item.

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
        self.found: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        modules = dict(model.named_modules())
        for name in self.names:
            if name.partition(":")[0] not in modules:
                raise SchemeError(
                    f"{type(model).__name__} has no module {name.partition(':')[0]!r}; "
                    f"places(model) names some: {', '.join(places(model)[:4])}, ..."
                )

    def __enter__(self) -> "Features":
        modules = dict(self.model.named_modules())
        for name in self.names:
            path, _, item = name.partition(":")
            self._handles.append(modules[path].register_forward_hook(self._hook(name, item)))
        return self

    def _hook(self, name: str, item: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if item:
                if not isinstance(output, (tuple, list)) or int(item) >= len(output):
                    raise SchemeError(f"{name}: the module returns no item {item}.")
                output = output[int(item)]
            elif isinstance(output, (tuple, list)):
                output = output[0] if len(output) == 1 else output
            if not isinstance(output, Tensor):
                raise SchemeError(f"{name}: the module returns {len(output)} tensors; name one, as in {name}:0.")
            self.found[name] = output

        return keep

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.found:
            raise SchemeError(f"{name}: the module did not run; choose a place that the forward pass calls.")
        return self.found[name]

    def items(self) -> Any:
        """Names and tensors, in the order in which the places were given."""
        return [(name, self.found[name]) for name in self.names if name in self.found]


def places(model: nn.Module) -> list[str]:
    """Places worth a look in any model.

    Every level of every column and the readouts of every step of its stacks, or, in a network without stacks, the
    modules that ``feature_info`` names.

    Example:
        >>> from odenets.models import RevCol
        >>> places(RevCol((4, 8), (1, 1), columns=2, num_classes=2))
        ['columns.steps.0:1', 'columns.steps.0:2', 'columns.steps.1:1', 'columns.steps.1:2']
    """
    found = []
    inside: list[str] = []  # stacks inside of residual functions are not looked into
    for name, module in model.named_modules():
        if not isinstance(module, Stack) or any(name.startswith(f"{outer}.") for outer in inside):
            continue
        inside.append(name)
        levels = getattr(module.scheme, "levels", 0)
        for n in range(len(module.steps)):
            step = f"{name}.steps.{n}" if name else f"steps.{n}"
            found += [f"{step}:{level + 1}" for level in range(levels)] if levels else [f"{step}:0"]
    return found or [row["module"] for row in getattr(model, "feature_info", [])]
