"""Design spaces of random networks, and seeded draws from them: no two networks alike, all inside the budget.

A space lists the depths, widths and parts that a network may have, and bounds its parameters and multiply-adds. The
networks inside the budget are enumerated, not found by rejection: a draw is uniform over them and cannot fail, and
their number is known.
"""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal, get_args

import schemes
from schemes import Scheme, SchemeError
from schemes.dense import Dense

Order = Literal["pre", "post", "post_linear"]
Activation = Literal["relu", "silu", "mish", "gelu", "leaky_relu"]
Norm = Literal["batch", "layer"]

ORDERS: tuple[Order, ...] = get_args(Order)
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
NORMS: tuple[Norm, ...] = get_args(Norm)


@dataclass(frozen=True)
class Candidate:
    """One network of a study: all that is needed to build it and to tell it from the others.

    Attributes:
        number: its place in the study, from 0.
        scheme: how the residual functions are combined: "euler" adds, "dense" concatenates.
        order: placement of norms and activations: "pre", "post", or "post_linear" (no activation after the last norm).
        depth: number of residual functions.
        middle: channels inside a residual function.
        width: channels that a residual function returns.
        kernel: side of the middle convolution.
        activation: kind of activation.
        norm: kind of norm.
        augment: the one augmentation besides crop and flip; "" for none.
        strength: strength of that augmentation.
        params: number of parameters.
        macs: multiply-adds of the convolutions and of the head, for one picture.
    """

    number: int
    scheme: str
    order: Order
    depth: int
    middle: int
    width: int
    kernel: int
    activation: Activation
    norm: Norm
    augment: str = ""
    strength: float = 0.0
    params: int = 0
    macs: int = 0


@dataclass(frozen=True)
class Space:
    """Ranges of a design space, its budget, and its recipe.

    Attributes:
        params: bounds on the number of parameters, both exclusive.
        macs: bounds on the multiply-adds for one picture, both exclusive.
        depths: choices of the number of residual functions.
        middles: choices of the channels inside.
        widths: choices of the channels that are added or appended.
        kernels: choices of the kernel.
        orders: choices of the block order; each gets the same number of networks.
        activations: choices of the activation.
        norms: choices of the norm.
        augments: names of augmentations and their strengths; each gets the same number of networks. Empty for none.
        epochs: training epochs of the recipe.
        optimizer: optimizer of the recipe.
    """

    params: tuple[float, float]
    macs: tuple[float, float]
    depths: tuple[int, ...]
    middles: tuple[int, ...]
    widths: tuple[int, ...]
    kernels: tuple[int, ...] = (3, 5, 7, 9)
    orders: tuple[Order, ...] = ORDERS
    activations: tuple[Activation, ...] = ACTIVATIONS
    norms: tuple[Norm, ...] = NORMS
    augments: tuple[tuple[str, tuple[float, ...]], ...] = ()
    epochs: int = 90
    optimizer: Literal["sgd", "adamw"] = "sgd"


def _steps(low: int, high: int, step: int) -> tuple[int, ...]:
    return tuple(range(low, high + 1, step))


_AUGMENTS = (
    ("rand_augment", (3.0, 5.0, 7.0)),
    ("mixup", (0.1, 0.3, 0.5)),
    ("cutmix", (0.1, 0.3, 0.5)),
    ("drop_path", (0.05, 0.1)),
    ("erase", (0.25,)),
)


def _paper(low: float, high: float, depths: tuple[int, ...], channels: tuple[int, ...], **more: object) -> Space:
    # One pair of bounds holds for parameters in millions and for multiply-adds in billions.
    return Space((low * 1e6, high * 1e6), (low * 1e9, high * 1e9), depths, channels, channels, **more)  # type: ignore


_C = (9, 10, _steps(3, 12, 1), _steps(64, 192, 8))

#: The spaces A to E of Kim et al. 2024, arXiv 2403.19588, section 5.1 and appendix, and one for two CPU cores.
SPACES: dict[str, Space] = {
    "A": _paper(2, 2.5, _steps(3, 6, 1), _steps(32, 96, 8)),
    "B": _paper(4, 5, _steps(3, 8, 1), _steps(64, 128, 8)),
    "C": _paper(*_C),
    "D": _paper(*_C, orders=("pre",), augments=_AUGMENTS, epochs=180),
    "E": _paper(*_C, orders=("pre",), augments=_AUGMENTS, epochs=180, optimizer="adamw"),
    # Without Mish, which takes five times as long as the others on a CPU.
    "mini": Space(
        (40e3, 50e3),
        (7e6, 12e6),
        _steps(3, 8, 1),
        _steps(8, 48, 4),
        _steps(8, 48, 4),
        kernels=(3, 5, 7),
        activations=("relu", "silu", "gelu", "leaky_relu"),
        epochs=6,
    ),
}


def scheme_of(name: str, width: int) -> Scheme:
    """Returns the scheme that a name means in a study, for functions that return ``width`` channels.

    Args:
        name: "dense", or a scheme.
        width: channels that a function returns.

    Raises:
        SchemeError: neither "dense" nor a fixed-step scheme of one stream, or one with functions that nothing reads.
    """
    if name == "dense":
        return Dense(width)
    scheme = schemes.get(name)
    # A step may begin with one stream and append others: such functions have other widths than `count` supposes.
    widened = scheme.streams != 1 or any(scheme.whole(n).streams_added for n in (0, 1))
    if widened or scheme.nodes is None or isinstance(scheme, Dense):
        raise SchemeError(
            f"a study compares dense and fixed-step schemes of one stream; {name} is none of them.\n"
            "  Take one of these, such as midpoint or rk4."
        )
    # Networks are compared at equal parameters and multiply-adds, so each function must be evaluated, and once.
    if scheme.unused or scheme.evaluations != scheme.stages:
        raise SchemeError(
            f"{name} has {scheme.stages} residual functions a step and evaluates {scheme.evaluations}: weights that do "
            "nothing would fill the budget\n  Take a scheme that evaluates each of its functions once, such as rk4."
        )
    return scheme


def count(
    scheme: str,
    order: Order,
    depth: int,
    middle: int,
    width: int,
    kernel: int,
    *,
    size: int,
    classes: int,
) -> tuple[int, int]:
    """Returns the parameters and multiply-adds of a ``RandomNet`` with these arguments, by formula.

    Args:
        scheme: "dense", or a scheme of one stream.
        order: block order.
        depth: number of residual functions.
        middle: channels inside.
        width: channels that are added or appended.
        kernel: side of the middle convolution.
        size: side of the pictures.
        classes: width of the head.

    Raises:
        SchemeError: a scheme that a study does not compare; see ``scheme_of``.

    Example:
        >>> count("euler", "pre", 3, 32, 32, 3, size=64, classes=200)
        (41896, 35494144)
    """
    scheme_of(scheme, width)
    return _count(scheme, order, depth, middle, width, kernel, size, classes)


def _count(
    scheme: str, order: Order, depth: int, middle: int, width: int, kernel: int, size: int, classes: int
) -> tuple[int, int]:
    """As ``count``, of a scheme that is known to be one of a study: thousands of shapes have the same."""
    dense = scheme == "dense"
    inputs = [width * (i + 1) if dense else width for i in range(depth)]
    last = width * (depth + 1) if dense else width
    # The stem has 3 x 3 x 3 weights for each channel; then the three convolutions of each function.
    weights = 27 * width + sum(c * middle + kernel**2 * middle**2 + middle * width for c in inputs)
    if order == "pre":  # norms precede the convolutions, and one precedes the pooling
        norms = sum(c + 2 * middle for c in inputs) + last
    else:
        norms = width + depth * (2 * middle + width)
    # After the stem's stride of 2, which rounds up.
    pixels = ((size + 1) // 2) ** 2
    return weights + 2 * norms + (last + 1) * classes, weights * pixels + last * classes


# Kinds that differ only in their augmentation have the same shapes, and enumerating those takes a while.
@lru_cache(maxsize=256)
def shapes(
    space: Space, scheme: str, order: Order, size: int, classes: int
) -> tuple[tuple[int, int, int, int, int, int], ...]:
    """All (depth, middle, width, kernel, params, macs) of a space inside its budget."""
    # Any width will do: the number of stages does not depend on it.
    stages = scheme_of(scheme, 1).stages
    found = []
    for depth, middle, width, kernel in itertools.product(space.depths, space.middles, space.widths, space.kernels):
        if depth % stages:
            continue
        params, macs = _count(scheme, order, depth, middle, width, kernel, size, classes)
        if space.params[0] < params < space.params[1] and space.macs[0] < macs < space.macs[1]:
            found.append((depth, middle, width, kernel, params, macs))
    return tuple(found)


def _kind(
    space: Space,
    scheme: str,
    order: Order,
    augment: str,
    strengths: tuple[float, ...],
    seed: int,
    size: int,
    classes: int,
) -> tuple[int, Iterator[Candidate]]:
    """The number of networks of one kind, and an iterator over them in random order, each once."""
    inside = shapes(space, scheme, order, size, classes)
    choices = (len(inside), len(space.activations), len(space.norms), len(strengths))
    total, drawn = math.prod(choices), partial(Candidate, -1, scheme, order)

    def draws() -> Iterator[Candidate]:
        # A string seeds Python's generator by its SHA-512: the same on every machine.
        generator = random.Random(f"{seed} {scheme} {order} {augment}")
        seen: set[int] = set()
        # Drawn, not shuffled: a space may hold millions of networks, of which a study takes a few hundred.
        while len(seen) < total:
            i = generator.randrange(total)
            if i in seen:
                continue
            seen.add(i)
            # The digits of the index, in these bases, are the network's choices.
            i, a = divmod(i, choices[1])
            i, n = divmod(i, choices[2])
            i, s = divmod(i, choices[3])
            depth, middle, width, kernel, params, macs = inside[i]
            act, norm, strength = space.activations[a], space.norms[n], strengths[s]
            yield drawn(depth, middle, width, kernel, act, norm, augment, strength, params, macs)

    return total, draws()


def sample(
    space: Space, schemes: Sequence[str], per_kind: int, *, seed: int = 0, size: int = 64, classes: int = 200
) -> list[Candidate]:
    """Draws the same number of networks of every kind: scheme, block order and, if the space has any, augmentation.

    Draws are uniform over the networks of that kind inside the budget, without repetition. The kinds alternate, so that
    any prefix of the list is balanced; a larger ``per_kind`` continues the same list.

    Args:
        space: one of ``SPACES``, or one of your own.
        schemes: the schemes to compare, e.g. ("euler", "dense").
        per_kind: number of networks of every kind.
        seed: seed of the draws.
        size: side of the pictures, which the multiply-adds depend on.
        classes: width of the head.

    Raises:
        SchemeError: a kind has fewer than ``per_kind`` networks inside the budget.

    Example:
        >>> [c.scheme for c in sample(SPACES["A"], ("euler", "dense"), 1)]
        ['euler', 'dense', 'euler', 'dense', 'euler', 'dense']
    """
    kinds = []
    for order, (augment, strengths) in itertools.product(space.orders, space.augments or (("", (0.0,)),)):
        for scheme in schemes:
            total, draws = _kind(space, scheme, order, augment, strengths, seed, size, classes)
            if total < per_kind:
                name = ", ".join(filter(None, (scheme, order, augment)))
                # With no network at all, the budget does not suit pictures of this size: multiply-adds grow with it.
                remedy = f"take {total:,} or fewer" if total else "take pictures of another size, or another space"
                raise SchemeError(
                    f"the space has {total:,} networks of {name} inside its budget (pictures of {size}, {classes} "
                    f"classes); per_kind is {per_kind:,}: {remedy}."
                )
            kinds.append(draws)
    # The kinds alternate, so that a study that is stopped early has as many of each.
    found = [next(kind) for _ in range(per_kind) for kind in kinds]
    return [Candidate(**{**vars(c), "number": i}) for i, c in enumerate(found)]
