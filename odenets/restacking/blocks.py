"""A model's block as a residual function: the change that it makes to the hidden state."""

from typing import Any

from torch import Tensor, nn

from schemes.errors import SchemeError

from .arguments import Arguments


class Form:
    """The form in which blocks return their hidden state.

    Attributes:
        beside: None where they return a tensor; for a tuple, the number of further items, all None.
    """

    __slots__ = ("beside",)

    def __init__(self) -> None:
        self.beside: int | None = None

    def take(self, block: nn.Module, output: Any) -> Tensor:
        """Extracts the hidden state from a block's output, and records the output's form.

        Raises:
            SchemeError: the block returns more, which a model would pass on from block to block, or collect.
        """
        if not isinstance(output, (tuple, list)):
            self.beside = None
            return output
        # Models put None in place of an output that is switched off, so nothing is lost with it.
        more = [i for i, v in enumerate(output) if i and v is not None]
        if more or not output:
            what = f"more than its hidden state (item {more[0]})" if more else "an empty tuple"
            raise SchemeError(
                f"restack: {type(block).__name__} returns {what}, and a scheme carries hidden states alone.\n"
                "  Turn attention weights and caches off: output_attentions=False, use_cache=False. What a model hands "
                "from block to block, such as T5's position bias, cannot be restacked."
            )
        self.beside = len(output) - 1
        return output[0]

    def give(self, y: Any) -> Any:
        """Returns a hidden state in that form."""
        return y if self.beside is None else (y, *(None,) * self.beside)


class BlockFunction(nn.Module):
    """x -> block(x, ...) - x: the change that a block with a skip of its own makes.

    Args:
        block: the block.
        place: its number among the blocks of a stack, by which it finds its arguments.
        form: records the form in which the block returns its hidden state.
    """

    block: nn.Module

    def __init__(self, block: nn.Module, place: int, form: Form):
        super().__init__()
        self.block, self.place, self.form = block, place, form

    def forward(self, x: Tensor, context: Any) -> Tensor:
        """Returns the change of a hidden state; ``context`` comes from ``arguments.common``."""
        given = Arguments() if context is None else context
        # Where blocks have different arguments, each finds its own by number.
        if not isinstance(given, Arguments):
            given = given[self.place]
        return self.form.take(self.block, given.call(self.block, x)) - x
