"""One pass of a model over its blocks: each call records its arguments, and the last one runs them all.

A loop such as ``for block in self.layers: x = block(x, mask)`` works as written. The first blocks return a ``Pending``
in place of a hidden state that does not exist yet, and the last returns the readout of the stack. So each block gets
the arguments meant for it, and a model that computes between its blocks is detected.
"""

from typing import Any, Protocol

from torch import nn

from schemes.errors import SchemeError

from .arguments import Arguments, split
from .blocks import Form

# Attributes that a loop may read from a hidden state between two blocks: a scheme does not change them.
_KNOWN = frozenset({"shape", "dtype", "device", "ndim", "layout", "is_cuda", "size", "dim", "requires_grad"})
_OPERATORS = (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "matmul", "rmatmul", "pow", "neg"),
    *("iadd", "isub", "imul", "itruediv", "eq", "ne", "lt", "gt", "le", "ge", "bool", "float", "int", "len", "iter"),
)


class Pending:
    """Placeholder for the hidden state between two blocks, which does not exist in a pass under a scheme."""

    def __init__(self, x: Any, path: str):
        self.x, self.path, self.indexed = x, path, False

    def refuse(self, *_: Any, **__: Any) -> Any:
        """Raises: there is no such hidden state."""
        raise SchemeError(
            f"restack: the model reads the hidden state between two blocks of {self.path!r}, and they run as one "
            "stack.\n  Turn collected hidden states off (output_hidden_states=False), or give the model back its "
            "blocks: odenets.unrestack(model)."
        )

    def __getattr__(self, name: str) -> Any:
        if name in _KNOWN:
            return getattr(self.x, name)
        if name.startswith("__"):  # Python and copy look these up on any object
            raise AttributeError(name)
        return self.refuse()

    def __getitem__(self, item: Any) -> Any:
        if item != 0 or isinstance(item, bool):
            return self.refuse()
        # The first item of the tuple that a block returns; whether blocks return tuples is known once they have run.
        self.indexed = True
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*args, *(kwargs or {}).values()]
        given += [v for arg in given if isinstance(arg, (list, tuple)) for v in arg]
        next(v for v in given if isinstance(v, Pending)).refuse()

    __hash__ = object.__hash__


for _name in _OPERATORS:
    setattr(Pending, f"__{_name}__", Pending.refuse)


class Running(Protocol):
    """What a pass needs from the stack."""

    path: str
    blocks: list[nn.Module]
    outside: int | None

    def decide(self, block: nn.Module, x: Any, given: Arguments) -> int:
        """Returns how many of the first blocks are not part of the stack, where that is not known yet."""
        ...

    def finish(self, run: "Run", x: Any, given: list[Arguments]) -> Any:
        """Returns the output of the last block."""
        ...


class Run:
    """The calls of one pass over the blocks, in order.

    Args:
        stack: the stack that runs them.
    """

    def __init__(self, stack: Running):
        self.stack, self.path = stack, stack.path
        self.count, self.first = len(stack.blocks), stack.outside
        self.at = 0
        self.x: Any = None
        self.pending: Pending | None = None
        self.given: list[Arguments] = []

    def call(self, place: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the result of calling a block: the output of all blocks for the last, a ``Pending`` before that."""
        if place != self.at:
            raise SchemeError(
                f"restack: block {place} of {self.path!r} is called where block {self.at} is due; a stack runs all of "
                "its blocks, in order.\n  One block alone is run by its number, blocks[3](x); layers cannot be dropped."
            )
        self.at += 1
        if self.first is not None and place < self.first:
            return block(*args, **kwargs)
        hidden, given = split(block, args, kwargs)
        if self.first is None:
            self.first = self.stack.decide(block, hidden, given)
            if place < self.first:
                return block(*args, **kwargs)
        if place == self.first:
            self.x, self.pending = hidden, Pending(hidden, self.path)
        elif hidden is not self.pending:
            raise SchemeError(
                f"restack: the model computes between the blocks of {self.path!r}, or hands a block a tuple.\n"
                "  What is computed there would be lost: such a model cannot be restacked."
            )
        self.given.append(given)
        if self.at < self.count:
            return self.pending
        # Releases all references: views of the pass may outlive it, and would keep the input and the masks alive.
        x, collected, self.x, self.given = self.x, self.given, None, []
        return self.stack.finish(self, x, collected)

    def give(self, y: Any, form: Form) -> Any:
        """Returns the output in the form in which blocks return theirs.

        Raises:
            SchemeError: the model indexed the output of a block that returns no tuple, or did not index a tuple.
        """
        assert self.pending is not None
        if self.count - (self.first or 0) > 1 and self.pending.indexed != (form.beside is not None):
            self.pending.refuse()
        return form.give(y)


class Closed:
    """Placeholder for a pass over some of the blocks, which is impossible under a scheme not the model's own."""

    def __init__(self, path: str, scheme: str):
        self.path, self.scheme = path, scheme

    def call(self, *_: Any) -> Any:
        """Raises: some of the blocks cannot run without the others."""
        raise SchemeError(
            f"restack: some of the blocks of {self.path!r} are to be run without the others, and under {self.scheme} "
            "there is no state between them.\n  Run all of them, or give the model back: odenets.unrestack(model)."
        )


class Call:
    """A block as a compiler sees it in a pass: a call, and the block's attributes."""

    def __init__(self, block: nn.Module, place: int, run: Run):
        self.block, self.place, self.run = block, place, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run.call(self.place, self.block, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


class View:
    """Proxy of a block that a restacked container yields in iteration; all but calls is forwarded to the block."""

    __slots__ = ("__block", "__place", "__run")

    def __init__(self, block: nn.Module, place: int, run: Run | Closed):
        # Bypasses our own __setattr__, which would set them on the block.
        set_ = object.__setattr__
        set_(self, "_View__block", block)
        set_(self, "_View__place", place)
        set_(self, "_View__run", run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__run.call(self.__place, self.__block, args, kwargs)

    @property
    def __class__(self) -> type:  # type: ignore[override]  # isinstance reads this
        return type(self.__block)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__block, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__block, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.__block, name)

    def __repr__(self) -> str:
        return repr(self.__block)

    def __eq__(self, other: object) -> bool:
        return self.__block is (object.__getattribute__(other, "_View__block") if type(other) is View else other)

    def __hash__(self) -> int:
        return hash(self.__block)
