"""Adversarial attacks by small changes of a picture: FGSM and projected gradient descent.

An attack moves pictures in [0, 1] within a ball of radius eps, and within [0, 1], to raise the cross-entropy of their
labels; normalisation is part of the attacked network. During the attack a module is in evaluation mode (frozen
statistics, no dropout), and its parameters' gradients are left as they were.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemes import SchemeError
from schemes.language import Reader

from ..analysis.features import evaluating
from ..seeds import seed_of

Norm = Literal["linf", "l2"]
NORMS: tuple[Norm, ...] = ("linf", "l2")


class Attack(NamedTuple):
    """Projected gradient descent; one step of the whole radius from the picture itself is FGSM.

    Attributes:
        eps: Radius of the ball, for levels in [0, 1], such as 8/255.
        steps: Number of gradient steps.
        step_size: Length of each step.
        random: Whether it starts at a random point of the ball.
        norm: "linf", the largest change of a level, or "l2", over all levels of a picture.
        name: The attack as it is written.
    """

    eps: float
    steps: int
    step_size: float
    random: bool
    norm: Norm
    name: str

    def __call__(
        self, logits: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, seeds: Sequence[int] | None = None
    ) -> Tensor:
        """Returns the attacked pictures.

        Each step follows the sign (linf) or the direction (l2) of the gradient of each picture's own loss, and is then
        projected back into the ball and into [0, 1]. For l2 these two projections alternate once: the ball is held
        exactly, since clamping to [0, 1] moves no picture farther from one inside.

        Args:
            logits: Maps pictures in [0, 1] to logits (n, classes). A module runs in evaluation mode, and is left as it
                was.
            x: Pictures (n, c, h, w) in [0, 1], floats.
            labels: (n,).
            seeds: Seeds of the pictures' random starts; 0 to n - 1 if left out.

        Raises:
            SchemeError: Pictures of another kind, another number of labels or seeds, or a gradient that is not finite.
        """
        # Written so that NaN is refused too.
        inside = x.is_floating_point() and (not x.numel() or (float(x.min()) >= 0 and float(x.max()) <= 1))
        if not inside or x.dim() != 4:
            raise SchemeError(f"{self.name}: pictures {tuple(x.shape)} of {x.dtype}; want floats in [0, 1]")
        if labels.shape != x.shape[:1]:
            raise SchemeError(f"{self.name}: labels {tuple(labels.shape)}; want one for each of {len(x)} pictures")
        if seeds is not None and len(seeds) != len(x):
            raise SchemeError(f"{self.name}: {len(seeds)} seeds for {len(x)} pictures\n  Give one for each.")
        clean = x.detach()
        if not x.numel():
            return clean.clone()
        moved = self._start(clean, range(len(x)) if seeds is None else seeds)
        with evaluating(logits) if isinstance(logits, nn.Module) else nullcontext():
            for _ in range(self.steps):
                grad = self._gradient(logits, moved, labels)
                moved = self._inside(moved + self.step_size * self._direction(grad), clean)
        return moved

    def _gradient(self, logits: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor) -> Tensor:
        # The network gets a non-leaf copy, since it may write into its input. No parameter's gradient is touched.
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            # A sum: with a mean, each picture's gradient would depend on the size of the batch.
            loss = F.cross_entropy(logits(leaf.clone()).float(), labels, reduction="sum")
            [grad] = torch.autograd.grad(loss, leaf)
        if not bool(grad.isfinite().all()):
            raise SchemeError(f"{self.name}: the gradient of the pictures is not finite\n  Take an earlier checkpoint.")
        return grad

    def _start(self, x: Tensor, seeds: Sequence[int]) -> Tensor:
        if not self.random:
            return x.clone()
        drawn = []
        for seed in seeds:
            # On the CPU, and one generator per picture: a start depends on neither device nor batch.
            g = torch.Generator().manual_seed(seed_of(seed, "attack"))
            if self.norm == "linf":
                drawn.append(2 * torch.rand(x.shape[1:], generator=g) - 1)
            else:  # uniform in the ball: a direction, and a radius whose d-th power is uniform, in d dimensions
                way = torch.randn(x.shape[1:], generator=g)
                drawn.append(way / way.norm() * float(torch.rand((), generator=g)) ** (1 / way.numel()))
        return self._inside(x + self.eps * torch.stack(drawn).to(x), x)

    def _direction(self, grad: Tensor) -> Tensor:
        if self.norm == "linf":
            return grad.sign()
        # Scaled first: squares of small gradients would underflow to 0.
        most = grad.abs().flatten(1).amax(1).view(-1, 1, 1, 1)
        scaled = grad / torch.where(most > 0, most, 1)
        return scaled / scaled.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)

    def _inside(self, x: Tensor, clean: Tensor) -> Tensor:
        if self.norm == "linf":
            return torch.minimum(torch.maximum(x, clean - self.eps), clean + self.eps).clamp(0, 1)
        change = x - clean
        size = change.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return (clean + change * (self.eps / size.clamp_min(1e-12)).clamp(max=1)).clamp(0, 1)


def _positive(what: str, value: object) -> float:
    if isinstance(value, bool) or (not isinstance(value, (int, float)) and not hasattr(value, "numerator")):
        raise SchemeError(f"{what} {value}: want a number above 0")
    number = float(value)  # type: ignore[arg-type]
    if not 0 < number < float("inf"):
        raise SchemeError(f"{what} {number:g}: want a number above 0")
    return number


def fgsm(eps: float = 8 / 255) -> Attack:
    """The fast gradient sign method: x + eps sign(gradient), clamped to [0, 1].

    Args:
        eps: The largest change of a level.

    Source:
        Goodfellow, Shlens and Szegedy 2015, Explaining and Harnessing Adversarial Examples, arXiv 1412.6572.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> x = torch.full((1, 1, 2, 2), 0.5)
        >>> moved = fgsm(0.1)(net, x, torch.tensor([0]))
        >>> torch.allclose((moved - x).abs(), torch.tensor(0.1))
        True
    """
    size = _positive("eps", eps)
    return Attack(size, 1, size, False, "linf", f"fgsm(eps={size:.6g})")


def pgd(
    eps: float = 8 / 255,
    steps: int = 10,
    step_size: float | None = None,
    random: bool = True,
    norm: Norm = "linf",
) -> Attack:
    """Projected gradient descent.

    Args:
        eps: Radius of the ball.
        steps: Number of steps.
        step_size: Length of each; 2.5 eps / steps if left out, which reaches the edge from any point of the ball.
        random: Whether to start at a random point of the ball.
        norm: "linf" or "l2".

    Source:
        Madry et al. 2018, Towards Deep Learning Models Resistant to Adversarial Attacks, arXiv 1706.06083.

    Example:
        >>> pgd(0.5, steps=5, norm="l2").step_size
        0.25
    """
    size = _positive("eps", eps)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise SchemeError(f"steps {steps}: want a whole number from 1 on")
    if not isinstance(random, bool):
        raise SchemeError(f"random {random}: want true or false")
    if norm not in NORMS:
        raise SchemeError(f"norm {norm}: want one of {', '.join(NORMS)}")
    length = 2.5 * size / steps if step_size is None else _positive("step_size", step_size)
    start = "" if random else ", random=false"
    name = f"pgd(eps={size:.6g}, steps={steps}, step_size={length:.6g}{start}, norm={norm})"
    return Attack(size, steps, length, random, norm, name)


pgd.words = {"norm": NORMS}  # type: ignore[attr-defined]


def read_attack(text: str) -> Attack:
    """Parses a typed attack, ``fgsm(eps=4/255)`` or ``pgd(8/255, steps=20, norm=linf)``; never evaluates the text.

    Args:
        text: the name, with its settings in parentheses.

    Raises:
        SchemeError: The text is anything else.

    Example:
        >>> read_attack("pgd(eps=8/255, steps=20)").steps
        20
    """
    found = Reader({}, {"fgsm": fgsm, "pgd": pgd}, what="attack").read(text)
    if not isinstance(found, Attack):
        raise SchemeError(f"attack {text!r}: want fgsm(eps=8/255) or pgd(eps=8/255, steps=10)")
    return found
