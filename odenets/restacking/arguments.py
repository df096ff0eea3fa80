"""The arguments that a model passes to its blocks besides the hidden state: masks, rotary positions, caches."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from schemes.errors import SchemeError

from ..tracing import is_traced

_LARGEST = 4096  # limit on the objects of one call that are inspected
_LEFT_EMPTY = "_left_empty_by_restack"


class Arguments(NamedTuple):
    """One block's arguments besides its hidden state.

    Attributes:
        args: positional arguments, after the hidden state where that is the first of them.
        kwargs: keyword arguments.
        name: the keyword under which the hidden state is passed; None where it is the first positional argument.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012  never written to
    name: str | None = None

    def call(self, block: nn.Module, x: Any) -> Any:
        """Calls the block with a hidden state and these arguments."""
        if self.name is not None:
            return block(*self.args, **{self.name: x}, **self.kwargs)
        return block(x, *self.args, **self.kwargs)

    @property
    def empty(self) -> bool:
        """Whether the hidden state, passed by position, is the only argument."""
        return not self.args and not self.kwargs and self.name is None


def split(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Arguments]:
    """Splits a call into the hidden state, which is the block's first argument, and the other arguments.

    Raises:
        SchemeError: the hidden state is not given.
    """
    if args:
        return args[0], Arguments(args[1:], kwargs)
    # Some models pass the hidden state by keyword: the name of the block's first parameter.
    name = next(iter(inspect.signature(block.forward).parameters), None)
    if name is None or name not in kwargs:
        raise SchemeError(f"restack: {type(block).__name__} is called without its first argument, the hidden state.")
    return kwargs[name], Arguments((), {k: v for k, v in kwargs.items() if k != name}, name)


def common(given: Sequence[Arguments]) -> Any:
    """Returns the context of a pass: None, the one ``Arguments`` that all blocks share, or each block's by number."""
    first = given[0]
    if not all(_same(first, other) for other in given[1:]):
        return dict(enumerate(given))
    return None if first.empty else first


def _same(a: Arguments, b: Arguments) -> bool:
    if len(a.args) != len(b.args) or a.kwargs.keys() != b.kwargs.keys() or a.name != b.name:
        return False
    pairs = [*zip(a.args, b.args, strict=True), *((v, b.kwargs[k]) for k, v in a.kwargs.items())]
    # Numbers and strings by value, all else by identity: comparing tensors does not give a truth value.
    plain = (bool, int, float, str, type(None))
    return all(x is y or (type(x) is type(y) and isinstance(x, plain) and x == y) for x, y in pairs)


def is_cache(value: Any) -> bool:
    """Whether a value is a key-value cache in the style of transformers, which blocks extend."""
    # A traced value has every attribute, and would pass for a cache.
    if isinstance(value, (Tensor, nn.Module)) or is_traced(value):
        return False
    # By duck typing, since transformers has many cache classes, and need not be installed.
    return callable(getattr(value, "get_seq_length", None))


def caches(given: Sequence[Arguments]) -> list[Any]:
    """Returns the caches among the arguments, each once."""
    found = (v for a in given for v in (*a.args, *a.kwargs.values()) if is_cache(v))
    return list({id(v): v for v in found}.values())


def without_caches(given: Arguments) -> Arguments:
    """Returns the arguments with None in place of each cache."""
    args = tuple(None if is_cache(v) else v for v in given.args)
    return given._replace(args=args, kwargs={k: None if is_cache(v) else v for k, v in given.kwargs.items()})


def leave_empty(cache: Any) -> None:
    """Marks a cache that was withheld from the blocks, since a model that reads it later would find it empty."""
    setattr(cache, _LEFT_EMPTY, True)


def was_left_empty(cache: Any) -> bool:
    """Whether an earlier pass withheld this cache, or one that it was copied from, from its blocks."""
    return bool(getattr(cache, _LEFT_EMPTY, False))


def contents(value: Any) -> list[tuple[Any, int]]:
    """Lists all that is reachable from an argument: each object, with the version of each tensor."""
    found: list[tuple[Any, int]] = []
    queue, seen = [value], set[int]()
    while queue and len(found) < _LARGEST:
        v = queue.pop()
        if isinstance(v, Tensor):
            # Inference tensors do not track versions.
            found.append((v, -1 if v.is_inference() else v._version))
            continue
        found.append((v, 0))
        # A module may write to its own buffers as it runs, which is not a write to an argument.
        if id(v) in seen or isinstance(v, (type, nn.Module)):
            continue
        seen.add(id(v))
        if isinstance(v, dict):
            queue += [x for pair in v.items() for x in pair]
        elif isinstance(v, (list, tuple, set, frozenset)):
            queue += v
        elif hasattr(v, "__dict__") and not callable(v):
            queue += vars(v).values()
    return found


def changed(before: list[tuple[Any, int]], now: list[tuple[Any, int]]) -> bool:
    """Whether a block has written to an argument between two snapshots of its contents."""
    if len(before) != len(now):
        return True
    plain = (int, float, str)
    return any(
        version != v or not (x is y or (isinstance(x, plain) and isinstance(y, plain) and x == y))
        for (x, version), (y, v) in zip(before, now, strict=True)
    )
