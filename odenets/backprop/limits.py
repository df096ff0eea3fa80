"""Error messages of our own for what torch cannot do in a pass that watches saved tensors or is run again."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from schemes.errors import SchemeError

P = ParamSpec("P")
R = TypeVar("R")
# A mark in the text of torch's error, and its meaning for a residual function.
_MEANINGS = {
    "don't yet support saved tensor hooks": (
        "torch.func.grad, vjp, jacrev and hessian inside of a residual function, or of a stack that offloads, run "
        "under backprop='store' alone: all else watches what autograd saves, which they refuse.\n"
        "  Use backprop='store', or torch.autograd.grad(..., create_graph=True) in their place."
    ),
    "torch.utils.checkpoint is incompatible with .grad()": (
        "torch.utils.checkpoint(use_reentrant=True) inside of a residual function cannot be differentiated step by "
        "step, as backprop='reverse' and 'exact' and the measuring for 'auto' do.\n"
        "  Give it use_reentrant=False, or use backprop='store'."
    ),
    "implement the jvp function for custom autograd.Function": (
        "a forward-mode derivative met a torch.autograd.Function without jvp; torch's own checkpoint is one, in early "
        "versions.\n"
        "  Use backprop='store', and write jvp for Functions of your own."
    ),
}
# The same for errors raised where a backward pass runs functions again.
_AGAIN = {
    "calling random operations inside of vmap": (
        "a batch of gradients (is_grads_batched=True, vectorize=True) runs the residual functions again inside of "
        "torch's vmap, where they cannot draw random numbers.\n"
        "  Ask for the gradients one by one, call model.eval(), or use backprop='store'."
    ),
    **_MEANINGS,
}


def in_our_words(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function to replace torch's errors by ours where they report a known limit that has a workaround.

    Raises:
        SchemeError: such a limit was met; all other errors are unchanged.
    """

    @functools.wraps(function)
    def told(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            _raise(error, _MEANINGS)
            raise

    return told


def raise_in_our_words(error: BaseException | None) -> None:
    """Replaces the error that has ended the second run of a function by ours, where it reports a known limit.

    Raises:
        SchemeError: it does.
    """
    if isinstance(error, RuntimeError):
        _raise(error, _AGAIN)


def _raise(error: RuntimeError, meanings: dict[str, str]) -> None:
    text = str(error)
    meaning = next((meaning for mark, meaning in meanings.items() if mark in text), None)
    if meaning is not None and not isinstance(error, SchemeError):
        # Chained to its cause, whose traceback shows the line in the residual function.
        raise SchemeError(f"Stack: {meaning}") from error
