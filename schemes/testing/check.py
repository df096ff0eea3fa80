"""All laws that hold for a scheme, in one call."""

import torch

from ..errors import SchemeError
from ..order import order as tableau_order
from ..registry import get
from ..scheme import Scheme
from .laws import check_expression, check_formula, check_order, check_slots
from .reversible import check_amplification, check_declared, check_inverse, check_updates, smooth_functions
from .wrappers import check_wrapper

CHANNELS = 8


def check_scheme(scheme: str | Scheme) -> None:
    """Every law that holds for what the scheme declares: text, slots, streams, calls, order, inverse, training.

    Each law documents what it checks: `check_expression`, `check_slots`, `check_declared`, `check_order` (for a
    tableau the order conditions, exactly, and `check_formula`), `check_inverse`, `check_amplification`,
    `check_updates`; where training differs, the last three in training too.

    Args:
        scheme: a scheme, or its expression, whose text is then checked too.

    Raises:
        AssertionError: a law is broken; the message names scheme and figure.

    Example:
        >>> check_scheme("momentum(0.5)")
    """
    if isinstance(scheme, str):
        check_expression(scheme)
        scheme = get(scheme)
    if scheme.nodes is None:  # adaptive: the other laws are for fixed steps
        return
    x = torch.randn(2, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check_slots(scheme, channels=CHANNELS)
    check_declared(scheme, smooth_functions(scheme, CHANNELS, 3), x)
    tableau = scheme.tableau
    if tableau is not None:
        check_formula(scheme)
        # One more than declared, so that an order declared too low is found as well.
        computed = tableau_order(tableau, limit=(scheme.order or 0) + 1)
        # A method of one's own need not declare its order.
        assert scheme.order in (None, computed), f"{scheme}: order {scheme.order} is declared, {computed} computed"
    elif scheme.order is not None:
        check_order(scheme, most=600)  # every method of high order has a tableau
    if scheme.invertible:
        _check_reversible(scheme, x, training=False)
    else:
        fs = smooth_functions(scheme, CHANNELS, 1)[0]
        try:
            # A scheme without an inverse has to raise; doing nothing would return a wrong state silently.
            scheme.inverse(fs, scheme.init(fs, x))
        except SchemeError:
            pass
        else:
            raise AssertionError(f"{scheme} says that it is not invertible, and has an inverse")
    if scheme.training_differs and scheme.reversible_in_training:
        _check_reversible(scheme, x, training=True)


def _check_reversible(scheme: Scheme, x: torch.Tensor, training: bool) -> None:
    check_inverse(scheme, x, h=0.8, training=training)
    check_updates(scheme, training=training)
    check_amplification(scheme, training=training)


def check_wrappers(text: str) -> None:
    """Every wrapper of the language around a scheme is that scheme, or n steps of it.

    ``repeat(s, 1)``, ``substeps(s, 1)``, ``1*s``, ``nested(s, euler)`` and, for one stream, ``nested(euler, s)``; also
    two steps, by ``repeat``, ``substeps`` and a sum. A wrapper that cannot be right has to raise when it is made.

    Args:
        text: the expression of a scheme with fixed steps.

    Raises:
        AssertionError: a wrapper differs from the scheme; the message names the attribute, state or slot.

    Example:
        >>> check_wrappers("leapfrog")
    """
    scheme = get(text)
    for wrapper in (f"repeat({text}, 1)", f"substeps({text}, 1)", f"1*({text})"):
        check_wrapper(get(wrapper), scheme)
    check_wrapper(get(f"repeat({text}, 2)"), scheme, n=2)
    check_wrapper(get(f"2*({text})"), scheme, n=2)
    check_wrapper(get(f"substeps({text}, 2)"), scheme, n=2, shorter=True)
    for wrapper, able in ((f"nested({text}, euler)", _nests(scheme)), (f"nested(euler, {text})", scheme.one_stream)):
        try:
            # A wrapper that cannot be right must raise when it is made, not when it runs.
            made = get(wrapper)
        except SchemeError as error:
            assert not able, f"{wrapper} is refused, and could be made: {error}"
        else:
            assert able, f"{wrapper} is made, and cannot be right"
            check_wrapper(made, scheme)


def _nests(scheme: Scheme) -> bool:
    """Whether its residual functions are given one stream and return its width."""
    widths = scheme.stream_widths(4 * scheme.streams)
    for n in (0, 1):
        if any(slot.in_channels != (slot.out_channels,) for slot in scheme.whole(n).slots(n, widths)):
            return False
        widths = scheme.whole(n).widths(n, widths)
    return True
